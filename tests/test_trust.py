"""Interrupted, misled or fed rubbish, it keeps working and loses nothing. `python tests/faults.py` prints the counts."""

import io
import json
import shutil
import sys
from dataclasses import asdict, is_dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data
import emprl
import faults
import finished
import identifiers
import ppo
import t5_small
from data import DataError

settings.register_profile(
    "trust",
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("trust")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("trust")


@pytest.fixture(scope="module")
def whole(folder):
    """A finished smoke run."""
    if not (folder / "whole" / "metrics.json").exists():
        assert faults.run(folder / "whole") == (0, "")
    return folder / "whole"


# ---- interrupted


def test_killed_in_every_stage_nothing_is_lost(folder):
    """Twice in each; `python tests/faults.py` kills twice as often."""
    killed, different = faults.kills(2 * len(faults.STEPS), folder)
    assert (
        killed.total() >= 2 * len(faults.STEPS)
        and min(killed.values()) > 0
        and len(killed) == len(faults.STEPS)
    ), f"in every stage: {killed}"
    assert not different, different


def test_faults_end_in_one_line_and_leave_something_to_go_on_from(folder, whole):
    """Full disks and Ctrl-C in two stages; `python tests/faults.py` tries more."""
    some = [
        name
        for name in faults.FAULTS
        if not name.endswith((" in pretrain", " in identifiers", " in judge"))
    ]
    number, wrong = faults.inject(folder, whole, some, stages=("sft",))
    assert number >= 15 and not wrong, wrong


def test_a_skipped_step_is_counted(tmp_path):
    faults.run(tmp_path / "run", before=faults.FAULTS["one reward is NaN"][0])
    ppo_records = [
        r
        for r in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
        if r["stage"] == "ppo"
    ]
    assert [r.get("skipped", 0) for r in ppo_records] == [1, 0, 0, 0]
    assert all(
        p.isfinite().all()
        for p in t5_small.from_pretrained(tmp_path / "run" / "emprl").parameters()
    )


# ---- collapse

FIRST = {"kl": 0.0, "entropy": 2.0, "length": 20.0}


@pytest.mark.parametrize(
    "change, words",
    [
        ({}, None),
        ({"kl": 14.0, "entropy": 0.3, "length": 12.0, "valid_unique": 0.4}, None),
        ({"kl": 16.0}, "raise ppo.kl_coef"),
        ({"entropy": 0.1}, "entropy"),
        ({"length": 39.0}, "nearly the limit"),
        ({"length": 9.0}, "below half"),
        ({"valid_unique": 0.1}, "10% of the responses differ"),
    ],
)
def test_signs_of_collapse(change, words):
    signs = ppo.signs_of_collapse({**FIRST, **change}, FIRST, 40)
    assert len(signs) == (words is not None) and all(words in s for s in signs)


def test_an_option_stops_on_collapse(tmp_path, capsys):
    """The smoke run's policy is untrained and never ends its responses: a collapse from the start."""
    arguments = [
        "--preset",
        "smoke",
        "--run",
        str(tmp_path),
        "--set",
        "ppo.stop_on_collapse=on",
    ]
    assert emprl.main(arguments) == 2
    assert (
        "ppo, step 1: responses of 12 tokens, nearly the limit: train the MLE policy longer"
        in capsys.readouterr().err
    )
    assert t5_small.load_state(tmp_path / "checkpoints" / "ppo.pt")["log"][0]["step"] == 0


# ---- rubbish

tried = {"files": 0, "refused": 0}


def reads_or_refuses(read, path):
    """read(path) gives dialogues or one line: where, what, what to do. Nothing else may come out."""
    tried["files"] += 1
    try:
        found = read(path)
        assert found if isinstance(found, list) else found[0], "nothing read and nothing said"
    except DataError as error:
        tried["refused"] += 1
        message = str(error)
        assert (
            str(path).rpartition("/")[0] in message
            and "\n" not in message
            and ";" in message
            and len(message) < 500
        ), message


ODD = st.sampled_from(
    [
        "",
        " ",
        "\0",
        "\ufeff",
        "\ud83d\ude00" if False else "😀",
        '"',
        '""',
        ",",
        "\r",
        "_comma_",
        "</s>",
        "1",
        "2",
        "7",
        "-1",
        "x" * 300,
        "NaN",
        "null",
        "[]",
        "{}",
        "\u202e",
        "\u200b",
        "hello",
        "I am sad.",
        "hit:0_conv:1",
    ]
)
CELL = st.one_of(ODD, st.text(max_size=12))


def lines_of(header, width):
    """Files that begin right and go wrong: the header, then rows of about the right width."""
    row = st.lists(CELL, min_size=width - 2, max_size=width + 2).map(",".join)
    return st.lists(row, max_size=6).map(
        lambda rows: "\n".join([header, *rows]).encode("utf-8", "surrogatepass")
    )


def json_lines():
    value = st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(-3, 4), st.floats(), CELL),
        lambda inner: st.lists(inner, max_size=3),
        max_leaves=4,
    )
    record = st.dictionaries(st.sampled_from([*data.FIELDS, "other"]), value, max_size=7)
    return st.lists(record, max_size=4).map(
        lambda rows: "\n".join(map(json.dumps, rows)).encode("utf-8", "surrogatepass")
    )


FILES = {
    "ed.csv": (data.read_empathetic_dialogues, lines_of(data.ED_HEADER, 8)),
    "mine.csv": (data.read_dialogues, lines_of("context,response,emotion,er,ip,ex", 6)),
    "mine.jsonl": (data.read_dialogues, json_lines()),
    "epitome": (
        data.read_epitome,
        lines_of("sp_id,rp_id,seeker_post,response_post,level,rationales", 6),
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_two_thousand_files_are_read_or_refused(name, tmp_path_factory):
    folder, (read, structured) = tmp_path_factory.mktemp("rubbish"), FILES[name]

    @settings(max_examples=550)
    @given(st.one_of(st.binary(max_size=200), structured))
    def throw(content):
        if name == "epitome":
            for file in data.EPITOME_FILES:
                (folder / file).write_bytes(content)
            reads_or_refuses(lambda path: read(folder), folder / "x")
        else:
            (folder / name).write_bytes(content)
            reads_or_refuses(read, folder / name)

    before = dict(tried)
    throw()
    assert tried["files"] - before["files"] >= 500 and tried["refused"] > before["refused"]


def test_rubbish_for_models(tmp_path):
    """Tokenizers, checkpoints and their configurations."""

    @settings(max_examples=100)
    @given(st.binary(max_size=300), st.one_of(json_lines(), st.binary(max_size=50)))
    def throw(content, config):
        for name in ("spiece.model", "pytorch_model.bin"):
            (tmp_path / name).write_bytes(content)
        (tmp_path / "config.json").write_bytes(config)
        for load, error in (
            (lambda: data.Tokenizer(tmp_path / "spiece.model"), DataError),
            (
                lambda: t5_small.load_state(tmp_path / "pytorch_model.bin"),
                t5_small.CheckpointError,
            ),
            (lambda: t5_small.from_pretrained(tmp_path), t5_small.CheckpointError),
        ):
            with pytest.raises(error) as raised:
                load()
            assert "\n" not in str(raised.value)

    throw()


FIELDS = [
    (section, name, value)
    for section, part in vars(emprl.Config()).items()
    if is_dataclass(part)
    for name, value in asdict(part).items()
]


def test_every_option_refuses_values_it_can_not_have():
    """Each option with eight bad values: one line that names it. What is taken must be in its range."""
    refused = 0
    for section, name, default in FIELDS:
        for value in ("", "x", "-1", "nan", "inf", "1e99", "on on", "\0"):
            if isinstance(default, str) and name not in emprl.CHOICES:
                continue
            with pytest.raises(DataError) as error:
                emprl.make_config(settings=[f"{section}.{name}={value}"])
            message = str(error.value)
            assert data.printable(f"{section}.{name}={value}") in message
            assert message.isprintable()
            refused += 1
    assert refused > 400


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--set", "sampling.min_length=70"], "min_length"),
        (["--set", "t5.relative_attention_max_distance=12"], "max_distance"),
        (["--set", "t5.eos_token_id=5"], "eos_token_id"),
        (["--set", "ppo.kl_horizon=0"], "kl_horizon"),
        (["--set", "ppo.minibatch_size=500"], "minibatch_size"),
        (["--seed", "-1"], "--seed"),
        (["--data", "missing.jsonl"], "missing.jsonl"),
        (["--preset", "real", "--data", "config.py"], "download DIR"),
        (["evaluate"], "evaluate takes --run and --data"),
        (["chat", "--data", "x"], "chat takes --run"),
        (["--data", "."], "toy and smoke need none"),
        (["chat", "--set", "ppo.lr=1"], "--set"),
        (["evaluate", "--t5", "x"], "--t5"),
    ],
)
def test_contradictions_are_refused(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert emprl.main(arguments) == 2
    assert words in (err := capsys.readouterr().err) and err.count("\n") == 1, err
    assert not list(tmp_path.iterdir()), "nothing was written"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--sed=1"], "unrecognized"),
        (["--seed", "x"], "invalid int"),
        (["rn"], "invalid choice"),
        (["--preset", "huge"], "invalid choice"),
        (["--data"], "expected one argument"),
    ],
)
def test_a_wrong_command_line_is_one_line(arguments, words, capsys):
    with pytest.raises(SystemExit) as ended:
        emprl.main(arguments)
    assert (
        ended.value.code == 2
        and words in (err := capsys.readouterr().err)
        and err.count("\n") == 1
    ), err


@pytest.mark.parametrize(
    "name, content",
    [
        ("config.json", b"{"),
        ("config.json", b"[]"),
        ("config.json", b'{"data": {"x": 1}}'),
        ("config.json", b'{"seed": "a", "data": 3}'),
        ("tokenizer.model", b"rubbish"),
        ("emprl/config.json", b"{}"),
        ("sft/pytorch_model.bin", b""),
        ("checkpoints/judge.pt", b"\x80"),
    ],
)
def test_a_damaged_run_folder_is_refused_by_evaluate_and_chat(
    name, content, whole, tmp_path, capsys
):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / name).write_bytes(content)
    (tmp_path / "mine.jsonl").write_text('{"context": "Hello", "response": "Hi"}\n')
    for command in (["evaluate", "--data", str(tmp_path / "mine.jsonl")], ["chat"]):
        assert emprl.main([*command, "--run", str(tmp_path / "run")]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and str(tmp_path / "run") in err, err


# ---- chat


def chat(whole, typed, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed)))
    assert emprl.main(["chat", "--run", str(whole)]) == 0
    return capsys.readouterr().out.splitlines()


def test_chat_survives_what_people_type(whole, capsys, monkeypatch):
    typed = (
        b"\n\n  \nHello\n"
        + b"\xff\xfe broken\n"
        + b"\0\x07\x1b[2J\n"
        + b"very long " * 30_000
        + b"\n"
        + "😀\n".encode()
        + b"no end of line"
    )
    out = chat(whole, typed, capsys, monkeypatch)
    assert "not a counsellor" in out[0] and len(out) == 1 + 2 * 6, (
        "two replies to each of six lines that say something"
    )
    assert len(chat(whole, b"", capsys, monkeypatch)) == 1, "the end of the file at once"


@pytest.mark.parametrize(
    "text",
    [
        "I want to die",
        "I am going to die tonight, by my own hand",
        "i am going to kill myself",
        "Suicidal thoughts again",
        "I don't want to live anymore",
        "I have been cutting myself",
        "they would be better off without me",
        "I wish I was dead",
        "self-harm",
        "I took an overdose",
        "there is no reason to live",
        "I want to end it all",
        "I dont want to be alive",
    ],
)
def test_signs_of_crisis_get_a_pointer_to_people(text, whole, capsys, monkeypatch):
    out = chat(whole, f"Hello\n{text}\nHello\n".encode(), capsys, monkeypatch)
    assert out[3] == finished.HELP and len(out) == 1 + 2 + 1 + 2, (
        "no generated line answers it, and it is not kept in the context"
    )


@pytest.mark.parametrize(
    "text",
    [
        "My dog died",
        "I could die laughing",
        "The exam killed me",
        "My phone is dead",
        "My dog is going to die",
        "I live alone",
        "He is going to dye it",
    ],
)
def test_ordinary_sorrow_is_answered(text):
    assert not finished.CRISIS.search(text)


# ---- fair figures


def test_the_test_part_influences_nothing_before_the_evaluation(whole, tmp_path, monkeypatch):
    """Other test dialogues and test labels: every stage leaves the same weights and the same log."""
    embedded = data.embedded_corpus

    def other_test(*arguments):
        corpus, other = embedded(*arguments), embedded(99, 1, 1, 40, 1)
        corpus.dialogues["test"], corpus.labelled["test"] = (
            other.dialogues["test"],
            other.labelled["test"],
        )
        corpus.level_probs |= other.level_probs
        return corpus

    monkeypatch.setattr(data, "embedded_corpus", other_test)
    emprl.run_all(emprl.Run(tmp_path, emprl.make_config("smoke")))
    assert (tmp_path / "samples.md").read_text() != (whole / "samples.md").read_text(), (
        "the test part is another one"
    )
    assert (tmp_path / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    for name in ("sft", "identifiers", "judge", "label", "context", "ppo"):
        one, two = (
            {**t5_small.load_state(x / "checkpoints" / f"{name}.pt"), "seconds": 0}
            for x in (tmp_path, whole)
        )
        assert json.dumps(one, default=lambda x: x.tolist()) == json.dumps(
            two, default=lambda x: x.tolist()
        ), name


def test_no_option_names_the_test_part():
    names = [f"{section}.{name}" for section, name, _ in FIELDS if "test" in name]
    assert names == ["data.num_test"], "how many there are, and nothing else"


def test_the_judge_never_sees_what_the_reward_was_trained_on():
    for parts in (
        data.embedded_corpus(0, 5, 5, 5, 300).labelled,
        data.split_labelled(
            [
                data.Dialogue((f"speaker {i % 80}",), "b", "", (0, 0, 0), f"{i % 80}/{i}")
                for i in range(400)
            ],
            0,
        ),
    ):
        seen = [
            {d.context for name in names for d in parts[name]}
            for names in (("train", "valid"), ("judge_train", "judge_valid"), ("test",))
        ]
        assert all(seen) and not seen[0] & seen[1] and not (seen[0] | seen[1]) & seen[2]


def test_the_run_folder_says_what_it_came_from(whole):
    (found,) = json.loads((whole / "environment.json").read_text())
    assert (
        found["torch"] == torch.__version__.split("+")[0]
        or found["torch"] == torch.__version__
    )
    assert {"command", "commit", "python", "sentencepiece", "numpy", "threads"} <= set(found)
