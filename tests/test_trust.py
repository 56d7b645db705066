"""Interrupted, misled or fed rubbish, it keeps working and loses nothing. `python tests/faults.py` prints the counts."""

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, is_dataclass
from pathlib import Path

import pytest
import torch

import crisis
import data
import emprl
import faults
import ppo
import t5_small
from data import DataError


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows can not fork")


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


@needs_fork
def test_killed_in_every_stage_nothing_is_lost(folder):
    """Twice in each; `python tests/faults.py` kills twice as often."""
    killed, different = faults.kills(2 * len(faults.STEPS), folder)
    assert (
        killed.total() >= 2 * len(faults.STEPS)
        and min(killed.values()) > 0
        and len(killed) == len(faults.STEPS)
    ), f"in every stage: {killed}"
    assert not different, different


@needs_fork
def test_faults_end_in_one_line_and_leave_something_to_go_on_from(folder, whole):
    """Full disks and Ctrl-C in two stages; `python tests/faults.py` tries more."""
    some = [
        name
        for name in faults.FAULTS
        if not name.endswith((" in pretrain", " in identifiers", " in judge"))
    ]
    number, wrong = faults.inject(folder, whole, some, stages=("sft",))
    assert number >= 15 and not wrong, wrong


@needs_fork
def test_a_skipped_step_is_counted(tmp_path):
    faults.run(tmp_path / "run", before=faults.FAULTS["one reward is NaN"][0])
    ppo_records = [
        r
        for r in map(
            json.loads,
            (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines(),
        )
        if r["stage"] == "ppo"
    ]
    assert [r.get("skipped", 0) for r in ppo_records] == [1, 0, 0, 0]
    assert all(
        p.isfinite().all()
        for p in t5_small.from_pretrained(tmp_path / "run" / "emprl").parameters()
    )


# ---- after training

EMPRL = Path(emprl.__file__)
SKIPPED = [
    f"{stage}.steps=0" for stage in ("pretrain", "sft", "identifiers", "context", "ppo")
]


def same_command(folder, name="run", **process):
    """`python emprl.py --preset smoke --run folder/name` once more, in a process of its own."""
    arguments = ["--preset", "smoke", "--run", name]
    return subprocess.run(
        [sys.executable, EMPRL, *arguments], cwd=folder, stderr=subprocess.PIPE, **process
    )


def strictly(text):
    """Parsed by the letter of the standard, which knows no NaN and no Infinity."""

    def refuse(word):
        pytest.fail(f"bare {word} in JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("factor, word", [(1e6, "inf"), (float("nan"), "nan")])
def test_a_policy_that_has_diverged_is_reported_and_not_a_crash(factor, word, whole, tmp_path):
    """Perplexities beyond what a float holds, and weights that are no numbers: a report that says so, in valid JSON."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    state = t5_small.load_state(run / "checkpoints" / "ppo.pt")
    for x in state["weights"].values():
        x *= factor
    torch.save(state, run / "checkpoints" / "ppo.pt")
    assert emprl.main(["--preset", "smoke", "--run", str(run)]) == 0
    found = strictly((run / "metrics.json").read_text(encoding="utf-8"))
    assert found["emprl"]["perplexity"] == word and found["sft"]["perplexity"] > 1
    assert f"| {word} |" in (run / "report.md").read_text(encoding="utf-8")
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        strictly(line)
    assert (
        str(
            emprl.from_json((run / "metrics.json").read_text(encoding="utf-8"))["emprl"][
                "perplexity"
            ]
        )
        == word
    )


@pytest.mark.parametrize("command", ["chat", "evaluate"])
def test_weights_that_are_no_numbers_are_refused_by_chat_and_evaluate(
    command, whole, tmp_path, capsys
):
    run = tmp_path / "run"
    (tmp_path / "mine.jsonl").write_text(
        '{"context": "Hello", "response": "Hi"}\n', encoding="utf-8"
    )
    data_option = ["--data", str(tmp_path / "mine.jsonl")] if command == "evaluate" else []
    for name, key in (("emprl/pytorch_model.bin", None), ("checkpoints/judge.pt", "weights")):
        shutil.copytree(whole, run)
        state = t5_small.load_state(run / name)
        next(iter((state[key] if key else state).values())).fill_(float("nan"))
        torch.save(state, run / name)
        assert emprl.main([command, "--run", str(run), *data_option]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and Path(name).name in err and "not finite" in err, err
        shutil.rmtree(run)


def test_training_that_diverges_at_its_end_is_named(tmp_path, capsys):
    """Fewer steps than the ten in a row after which a stage gives up."""
    settings = ["judge", "identifiers.lr"]
    arguments = ["--preset", "smoke", "--run", str(tmp_path), "--set", "sft.steps=1"]

    def spoil(self, stage, step=0):
        seed(self, stage, step)
        if (stage, step) == ("judge", 7):
            made[-1].weight.data.fill_(float("inf"))

    made, seed, init = [], emprl.Run.seed, torch.nn.Linear.__init__

    def remember(self, *a, **k):
        init(self, *a, **k)
        made.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Linear, "__init__", remember)
        patch.setattr(emprl.Run, "seed", spoil)
        patch.setattr(t5_small.Trainer, "finish", lambda self: None)
        assert emprl.main(arguments) == 2
    err = capsys.readouterr().err
    assert all(word in err for word in settings) and err.count("\n") == 1, err


def test_a_run_of_skipped_stages_has_a_report_without_their_pictures(tmp_path):
    assert emprl.main(["--preset", "smoke", "--run", str(tmp_path), "--set", *SKIPPED]) == 0
    drawn = {path.stem for path in (tmp_path / "plots").iterdir()}
    assert drawn == {"emp_f1", "levels"}
    assert (tmp_path / "report.md").read_text(encoding="utf-8").count("![") == len(drawn)


def test_a_picture_that_can_not_be_drawn_costs_no_report(whole, tmp_path, capsys, monkeypatch):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "report.md").unlink()

    def broken(*_):
        raise ZeroDivisionError("in a changed copy")

    monkeypatch.setattr(emprl, "draw_plots", broken)
    assert emprl.main(["--preset", "smoke", "--run", str(tmp_path / "run")]) == 0
    out, err = capsys.readouterr()
    assert "ZeroDivisionError: in a changed copy" in out and "Traceback" in err
    assert (tmp_path / "run" / "report.md").exists()


def test_jupyters_backend_and_a_poor_terminal_cost_nothing(whole, tmp_path):
    """MPLBACKEND names what is not installed, and the folder's name has letters that ASCII lacks."""
    shutil.copytree(whole, tmp_path / "läufe 😀")
    for path in (tmp_path / "läufe 😀").glob("plots/*"):
        path.unlink()
    environment = {
        "MPLBACKEND": "module://not_installed.backend",
        "PYTHONIOENCODING": "ascii:strict",
    }
    done = same_command(
        tmp_path, "läufe 😀", env={**os.environ, **environment}, stdout=subprocess.PIPE
    )
    assert done.returncode == 0, done.stderr
    assert b"l?ufe ?" in done.stdout and b"no more plots" not in done.stdout
    assert (tmp_path / "läufe 😀" / "plots" / "ppo.png").exists()


def test_who_has_no_home_has_pictures(tmp_path):
    """As in a container whose user has no entry in passwd: Path.home() finds nothing there."""
    code = f"""
import pathlib, sys
def home():
    raise RuntimeError("Could not determine home directory.")
pathlib.Path.home = home
sys.path.insert(0, {str(EMPRL.parent)!r})
import emprl
emprl.figure_class()().savefig({str(tmp_path / "empty.png")!r})
"""
    hidden = ("MPLCONFIGDIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "HOME")
    environment = {key: x for key, x in os.environ.items() if key not in hidden}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert (tmp_path / "empty.png").exists()


def test_a_reader_of_the_output_that_has_ended_is_not_a_full_disk(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    ours, theirs = os.pipe()
    os.close(ours)
    done = same_command(tmp_path, stdout=theirs)
    os.close(theirs)
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1, done.stderr
    assert b"read the output" in done.stderr and b"room" not in done.stderr


# ---- Ctrl-C, threads and what nobody foresaw


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="sees imports by /proc")
def test_ctrl_c_while_importing(tmp_path):
    started = subprocess.Popen(
        [sys.executable, EMPRL, "--help"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    while "libtorch" not in Path(f"/proc/{started.pid}/maps").read_text(encoding="utf-8"):
        time.sleep(0.001)
    started.send_signal(signal.SIGINT)
    err = started.communicate()[1]
    assert started.returncode == 130 and err == b"\nstopped\n", err


def test_a_second_ctrl_c_after_the_last_line_changes_nothing(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    class Impatient(io.StringIO):
        def write(self, text):
            signal.raise_signal(signal.SIGINT)
            return super().write(text)

    monkeypatch.setattr(emprl, "run_all", interrupted)
    monkeypatch.setattr(sys, "stderr", Impatient())
    before = signal.getsignal(signal.SIGINT)
    assert emprl.main(["--preset", "smoke", "--run", str(tmp_path)]) == 130
    assert "go on with" in sys.stderr.getvalue()
    assert signal.getsignal(signal.SIGINT) is before, "the handler is given back"


def test_main_outside_the_main_thread(tmp_path, monkeypatch):
    codes = []
    monkeypatch.setattr(emprl, "run_all", lambda run: None)
    arguments = ["--preset", "smoke", "--run", str(tmp_path)]
    thread = threading.Thread(target=lambda: codes.append(emprl.main(arguments)))
    thread.start()
    thread.join()
    assert codes == [0]


def test_what_nobody_foresaw_keeps_its_traceback_and_says_what_is_saved(
    tmp_path, monkeypatch, capsys
):
    def changed(*_):
        return {}["a student's key"]

    monkeypatch.setattr(emprl, "mle_trainer", changed)
    assert emprl.main(["--preset", "smoke", "--run", str(tmp_path)]) == 1
    *lines, last = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback") and 'KeyError: "a student\'s key"' in lines
    assert f"saved in {tmp_path}; the same command goes on" in last
    assert (tmp_path / "checkpoints" / "pretrain.pt").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{",
        b"{}",
        b'{"config": {}}',
        b'{"config": {"preset": "x", "seed": 0}}',
        b"\xff",
    ],
)
def test_ablate_refuses_a_damaged_run(content, tmp_path, capsys):
    (tmp_path / "metrics.json").write_bytes(content)
    assert emprl.main(["ablate", "kl", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "metrics.json: damaged" in err, err


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


# Every case is drawn from a seeded random.Random: the same files on every machine, with no package for it.
ODD = [
    "",
    " ",
    "\0",
    "\ufeff",
    "\U0001f600",
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
CHARACTERS = [(0x20, 0x7E), (0, 0x1F), (0x7F, 0xFF), (0x100, 0xD7FF), (0xE000, 0x10FFFF)]
NUMBERS = [0.0, -0.0, 1.5, -1e308, 5e-324, float("nan"), float("inf"), float("-inf")]


def text_of(rng):
    """Up to 12 characters of every kind; seldom a lone surrogate, which no encoding can hold."""
    if rng.random() < 0.01:
        return "\ud83d"
    return "".join(
        chr(rng.randint(*rng.choice(CHARACTERS))) for _ in range(rng.randint(0, 12))
    )


def cell_of(rng):
    return rng.choice(ODD) if rng.random() < 0.5 else text_of(rng)


def bytes_of(rng, longest):
    """Rubbish: any bytes at all, or few different ones, so that line ends and quotes are among them."""
    length = rng.randint(0, longest)
    if rng.random() < 0.5:
        return rng.randbytes(length)
    return bytes(rng.choice(b'\0\n\r,"{}[]:\\\xff\xef1a ') for _ in range(length))


def lines_of(header, *good):
    """Files that begin right and go wrong: the header, then rows like the good ones, or of about their width.
    Good rows belong together, as a conversation does; {n} in them is another number each time."""
    columns = len(good[0].split(","))

    def row_of(rng, n):
        rows = "\n".join(good).replace("{n}", str(n))
        if rng.random() < 0.3:
            return rows
        if rng.random() < 0.3:  # one cell is another
            cells = rows.split(",")
            cells[rng.randrange(len(cells))] = cell_of(rng)
            return ",".join(cells)
        width = rng.randint(columns - 2, columns + 2)
        return ",".join(cell_of(rng) for _ in range(width))

    def draw(rng):
        rows = [row_of(rng, n) for n in range(rng.randint(0, 6))]
        return "\n".join([header, *rows]).encode("utf-8", "surrogatepass")

    return draw


def value_of(rng, depth=0):
    kind = rng.randrange(6 if depth < 3 else 5)
    if kind == 0:
        return rng.choice([None, True, False])
    if kind == 1:
        return rng.randint(-3, 4)
    if kind == 2:
        return rng.choice([*NUMBERS, rng.gauss(0, 1e3)])
    if kind in (3, 4):
        return cell_of(rng)
    return [value_of(rng, depth + 1) for _ in range(rng.randint(0, 3))]


def json_lines(rng):
    """Records like a good one, or with any of the right names, others among them, and values of every kind."""
    names = [*data.FIELDS, "other"]
    records = []
    for _ in range(rng.randint(0, 4)):
        record = {"context": ["I am sad."], "response": "Why?", "er": 1, "ip": 0, "ex": 2}
        if rng.random() < 0.7:
            changed = rng.sample(names, rng.randint(0, len(names)))
            record = record if rng.random() < 0.3 else {}
            record |= {name: value_of(rng) for name in changed}
        records.append(record)
    return "\n".join(map(json.dumps, records)).encode("utf-8", "surrogatepass")


FILES = {
    "ed.csv": (
        data.read_empathetic_dialogues,
        lines_of(
            data.ED_HEADER,
            "hit:0_conv:{n},1,sad,I am sad.,7,I am sad.,5|5|5_2|2|2,",
            "hit:0_conv:{n},2,sad,I am sad.,8,Oh no.,5|5|5_2|2|2,",
        ),
    ),
    "mine.csv": (
        data.read_dialogues,
        lines_of("context,response,emotion,er,ip,ex", "I am sad.,Why?,sad,1,0,2"),
    ),
    "mine.jsonl": (data.read_dialogues, json_lines),
    "epitome": (
        data.read_epitome,
        lines_of(
            "sp_id,rp_id,seeker_post,response_post,level,rationales", "a,b,I am sad.,Why?,2,"
        ),
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_two_thousand_files_are_read_or_refused(name, tmp_path):
    read, structured = FILES[name]
    before = dict(tried)
    for case in range(600):
        rng = random.Random(f"{name} {case}")
        content = bytes_of(rng, 200) if rng.random() < 0.1 else structured(rng)
        if name == "epitome":
            for file in data.EPITOME_FILES:
                (tmp_path / file).write_bytes(content)
            reads_or_refuses(lambda path: read(tmp_path), tmp_path / "x")
        else:
            (tmp_path / name).write_bytes(content)
            reads_or_refuses(read, tmp_path / name)
    files, refused = (tried[key] - before[key] for key in ("files", "refused"))
    assert files >= 550 and 0 < refused < files, "some are read, others are refused"


def test_rubbish_for_models(tmp_path):
    """Tokenizers, checkpoints and their configurations."""
    for case in range(120):
        rng = random.Random(f"model {case}")
        for name in ("spiece.model", "pytorch_model.bin"):
            (tmp_path / name).write_bytes(bytes_of(rng, 300))
        config = json_lines(rng) if rng.random() < 0.5 else bytes_of(rng, 50)
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
    "setting",
    [
        "t5.d_model=1",
        "t5.num_layers=1000000000",
        "t5.initializer_factor=1e9",
        "sft.weight_decay=1e9",
        "identifiers.class_weight=1e9",
        "context.class_weight=1e9",
        "identifiers.ngrams=1000000000",
        "reward.balance=1e9",
        "sampling.max_length=1000000000",
        "ppo.batch_size=1000000000",
        "ppo.ppo_epochs=1000000000",
        "eval.best_of=1000000000",
        "data.num_train=1000000000",
    ],
)
def test_sizes_and_exponents_have_a_sane_limit(setting):
    with pytest.raises(DataError, match=setting):
        emprl.make_config(settings=[setting])


def test_a_models_name_is_no_folder(tmp_path, capsys, monkeypatch):
    """And a folder without its tokenizer, or with a pointer to it. Nothing is written before."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()

    def refusal():
        assert emprl.main(["--preset", "paper", "--data", "data", "--t5", "t5-small"]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and not (tmp_path / "runs").exists()
        return err

    assert "not by its name" in refusal()
    (tmp_path / "t5-small").mkdir()
    (tmp_path / "t5-small" / "config.json").write_text("{}", encoding="utf-8")
    assert "has no spiece.model; download" in refusal()
    (tmp_path / "t5-small" / "spiece.model").write_text(
        "version https://git-lfs.github.com/spec/v1\n", encoding="utf-8"
    )
    assert "spiece.model: only git-LFS's pointer" in refusal()
    (tmp_path / "t5-small" / "spiece.model").write_text("a model", encoding="utf-8")
    assert "has no model.safetensors or pytorch_model.bin" in refusal()


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
    (tmp_path / "mine.jsonl").write_text(
        '{"context": "Hello", "response": "Hi"}\n', encoding="utf-8"
    )
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
    assert len(out) == 3 + 2 * 6, "two replies to each of six lines that say something"
    assert len(chat(whole, b"", capsys, monkeypatch)) == 3, "the end of the file at once"


def test_chat_says_first_what_it_is_and_where_help_is(whole, capsys, monkeypatch):
    """Two lines before anything is read, and again on /help, which is no part of the conversation."""
    torch.manual_seed(0)
    told = chat(whole, b"Hello\n/help\nHello\n", capsys, monkeypatch)
    exercise, help_is = told[:2]
    assert "exercise" in exercise and "no person reads along" in exercise
    assert all(words in help_is for words in ("112", "911", "988", "findahelpline.com"))
    assert told[5:7] == told[:2] and len(told) == 3 + 2 + 2 + 2
    torch.manual_seed(0)
    assert chat(whole, b"Hello\nHello\n", capsys, monkeypatch)[5:] == told[7:]


def test_evaluate_and_chat_take_a_device(whole, tmp_path, capsys, monkeypatch):
    """On a machine with no GPU: cuda is refused in one line; with cpu no GPU is even looked for."""
    file = tmp_path / "mine.jsonl"
    file.write_text('{"context": "Hello", "response": "Hi"}\n', encoding="utf-8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    emprl.find_device.cache_clear()
    for command in (["evaluate", "--data", str(file)], ["chat"]):
        assert emprl.main([*command, "--run", str(whole), "--device", "cuda"]) == 2
        err = capsys.readouterr().err
        assert err.startswith("emprl.py: --device cuda") and err.count("\n") == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("looked for"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Hello\n")))
    assert emprl.main(["chat", "--run", str(whole), "--device", "cpu"]) == 0
    emprl.find_device.cache_clear()


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
    assert out[5:7] == out[:2] and len(out) == 3 + 2 + 2 + 2, (
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
    assert not crisis.signs_of_crisis(text)


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
    assert (tmp_path / "samples.md").read_text(encoding="utf-8") != (
        whole / "samples.md"
    ).read_text(encoding="utf-8"), "the test part is another one"
    assert (tmp_path / "metrics.jsonl").read_text(encoding="utf-8") == (
        whole / "metrics.jsonl"
    ).read_text(encoding="utf-8")
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
    (found,) = json.loads((whole / "environment.json").read_text(encoding="utf-8"))
    assert (
        found["torch"] == torch.__version__.split("+")[0]
        or found["torch"] == torch.__version__
    )
    assert {"command", "commit", "python", "sentencepiece", "numpy", "threads"} <= set(found)
    assert found["device"] == emprl.find_device()
