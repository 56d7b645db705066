"""Odd input: files, checkpoints, options, command lines. It is used, or one line says where it
is wrong and what to do.

Every case is drawn from a seeded random.Random: the same on every machine. Many more of them
with --thorough. What interrupts or spoils a run is in test_trust.py.
"""

import io
import json
import os
import pickle
import random
import re
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch

import data
import emprl
import t5_small
from data import DataError
from t5_small import CheckpointError

# ---- what may stand in a file

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


def odd_text(rng):
    """Up to 12 characters of every kind; seldom half a surrogate, which has no encoding."""
    if rng.random() < 0.01:
        return "\ud83d"
    ranges = [rng.choice(CHARACTERS) for _ in range(rng.randint(0, 12))]
    return "".join(chr(rng.randint(*limits)) for limits in ranges)


def odd_cell(rng):
    return rng.choice(ODD) if rng.random() < 0.5 else odd_text(rng)


def odd_bytes(rng, longest):
    """Any bytes at all, or few different ones, with line ends and quotes among them."""
    length = rng.randint(0, longest)
    if rng.random() < 0.5:
        return rng.randbytes(length)
    return bytes(rng.choices(b'\0\n\r,"{}[]:\\\xff\xef1a ', k=length))


def odd_row(rng, good):
    """A row like the good one, or one of about its width."""
    cells = good.split(",")
    if rng.random() < 0.3:
        return good
    if rng.random() < 0.3:  # one cell is another
        cells[rng.randrange(len(cells))] = odd_cell(rng)
        return ",".join(cells)
    width = rng.randint(len(cells) - 2, len(cells) + 2)
    return ",".join(odd_cell(rng) for _ in range(width))


def odd_table(header, good):
    """rng -> a table that begins right and goes wrong."""

    def draw(rng):
        rows = [odd_row(rng, good) for _ in range(rng.randint(0, 6))]
        return "\n".join([header, *rows]).encode("utf-8", "surrogatepass")

    return draw


def odd_value(rng, depth=0):
    """A value of JSON; lists are nested three deep at most."""
    kind = rng.randrange(6 if depth < 3 else 5)
    if kind == 0:
        return rng.choice([None, True, False])
    if kind == 1:
        return rng.randint(-3, 4)
    if kind == 2:
        return rng.choice([*NUMBERS, rng.gauss(0, 1e3)])
    if kind in (3, 4):
        return odd_cell(rng)
    return [odd_value(rng, depth + 1) for _ in range(rng.randint(0, 3))]


def odd_records(rng):
    """Records like a good one, or with some of the right names and any values."""
    names = [*data.FIELDS, "other"]
    records = []
    for _ in range(rng.randint(0, 4)):
        record = {"context": ["I am sad."], "response": "Why?", "er": 1, "ip": 0, "ex": 2}
        if rng.random() < 0.7:
            changed = rng.sample(names, rng.randint(0, len(names)))
            record = record if rng.random() < 0.3 else {}
            record |= {name: odd_value(rng) for name in changed}
        records.append(record)
    return "\n".join(map(json.dumps, records)).encode("utf-8", "surrogatepass")


# ---- files of dialogues

ED_HEADER = f"{data.ED_HEADER}\nhit:0_conv:1,1,sad,I am sad.,6,Hello.,5|5|5_2|2|2,"
ED_ROW = "hit:0_conv:1,2,sad,I am sad.,7,Oh no.,5|5|5_2|2|2,"
EPITOME_HEADER = "sp_id,rp_id,seeker_post,response_post,level,rationales"
FILES = {  # name -> who reads it, and what draws one
    "ed.csv": (data.read_empathetic_dialogues, odd_table(ED_HEADER, ED_ROW)),
    "mine.csv": (
        data.read_dialogues,
        odd_table("context,response,emotion,er,ip,ex", "I am sad.,Why?,sad,1,0,2"),
    ),
    "mine.jsonl": (data.read_dialogues, odd_records),
    "epitome": (data.read_epitome, odd_table(EPITOME_HEADER, "a,b,I am sad.,Why?,2,")),
}


def is_read(read, path):
    """Are there dialogues? Else one line: where, what, what to do, and nothing else."""
    try:
        found = read(path)
        assert found if isinstance(found, list) else found[0], "nothing read, nothing said"
        return True
    except DataError as error:
        message = str(error)
        assert str(path) in message and ";" in message
        assert "\n" not in message and len(message) < 500, message
        return False


@pytest.mark.parametrize("name", FILES)
def test_an_odd_file_is_read_or_refused(name, tmp_path, thorough, counts):
    read, draw = FILES[name]
    path = tmp_path / name
    names = [name]
    if name == "epitome":  # a folder with three of them
        path = tmp_path
        names = data.EPITOME_FILES
    used = []
    for case in range(2000 if thorough else 600):
        rng = random.Random(f"{name} {case}")
        content = odd_bytes(rng, 200) if rng.random() < 0.1 else draw(rng)
        for level, file in enumerate(names):  # three equal files would be refused
            (tmp_path / file).write_bytes(content.replace(b"Why?,2,", b"Why?,%d," % level))
        used.append(is_read(read, path))
    counts["odd files of dialogues"] += len(used)
    assert len(used) >= 600 and 0 < sum(used) < len(used), "some are read, others refused"


# ---- tokenizers and checkpoints


def test_rubbish_for_models(tmp_path, thorough, counts):
    loaders = {
        "spiece.model": (data.Tokenizer, DataError),
        "pytorch_model.bin": (t5_small.load_state, CheckpointError),
        "config.json": (lambda path: t5_small.from_pretrained(path.parent), CheckpointError),
    }
    for case in range(500 if thorough else 120):
        rng = random.Random(f"model {case}")
        config = odd_records(rng) if rng.random() < 0.5 else odd_bytes(rng, 50)
        (tmp_path / "config.json").write_bytes(config)
        for name in ("spiece.model", "pytorch_model.bin"):
            (tmp_path / name).write_bytes(odd_bytes(rng, 300))
        for name, (load, kind) in loaders.items():
            with pytest.raises(kind) as raised:
                load(tmp_path / name)
            assert "\n" not in str(raised.value)
            counts["odd models"] += 1


PROOF = "proof_that_code_ran"
CALLS = [  # what a malicious pickle would call
    (Path.touch, Path(PROOF)),
    (open, PROOF, "w"),
    (eval, f"open({PROOF!r}, 'w')"),
    (exec, f"open({PROOF!r}, 'w')"),
    (os.system, f"echo > {PROOF}"),
    (os.mkdir, PROOF),
    (subprocess.getoutput, f"echo > {PROOF}"),
    (torch.save, [1], PROOF),
]
PLACES = {  # where it stands in a checkpoint
    "alone": lambda evil: evil,
    "a weight": lambda evil: {"weights": {"shared.weight": evil}},
    "a name": lambda evil: {"key": "x", "weights": {}, evil: 1},
    "in a list": lambda evil: {"key": "x", "log": [0, [evil]]},
    "a key": lambda evil: {"key": evil, "done": True},
}


class Evil:
    def __init__(self, call):
        self.call = call

    def __reduce__(self):
        function, *arguments = self.call
        return function, tuple(arguments)


def plain_pickle(content, path):
    path.write_bytes(pickle.dumps(content))


def old_format(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call[0].__name__)
def test_a_malicious_pickle_would_leave_a_proof(call, tmp_path, monkeypatch):
    """Loaded without a look at it: else the next test could not fail."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Evil(call)))
    assert Path(PROOF).exists()


@pytest.mark.parametrize("save", [torch.save, old_format, plain_pickle])
def test_a_malicious_pickle_runs_no_code(save, tmp_path, monkeypatch, counts):
    monkeypatch.chdir(tmp_path)
    for call in CALLS:
        for place in PLACES.values():
            save(place(Evil(call)), tmp_path / "evil.pt")
            with pytest.raises(CheckpointError, match="evil.pt"):
                t5_small.load_state(tmp_path / "evil.pt")
            assert not Path(PROOF).exists()
            counts["malicious pickles"] += 1


def test_an_archive_that_unpacks_to_terabytes_is_refused_by_its_sizes(tmp_path, monkeypatch):
    buffer = io.BytesIO()
    torch.save({"key": "x"}, buffer)
    with zipfile.ZipFile(buffer, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(10**7))
    (tmp_path / "bomb.pt").write_bytes(buffer.getvalue())
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda _: pytest.fail("unpacked"))
    with pytest.raises(CheckpointError, match="bomb.pt: .*compressed"):
        t5_small.load_state(tmp_path / "bomb.pt")


# ---- options and command lines

VALUES = (
    "",
    "x",
    "-1",
    "nan",
    "inf",
    "1e99",
    "on on",
    "\0",
    "1" * 400,
    "0x10",
    "1,0",
    "true",
    "[1]",
)


def test_every_option_refuses_values_it_can_not_have(counts):
    """One line that names it."""
    tried = 0
    for name in emprl.settings_of(emprl.toy()):
        for value in VALUES:
            with pytest.raises(DataError) as error:
                emprl.make_config(settings=[f"{name}={value}"])
            message = str(error.value)
            assert data.printable(f"{name}={value}") in message and message.isprintable()
            tried += 1
    assert tried > 900
    counts["odd values of options"] += tried


HUGE = [
    "t5.d_model=1",
    "t5.num_layers=1000000000",
    "identifiers.class_weight=1e9",
    "identifiers.size=1000000000",
    "reward.balance=1e9",
    "exploring.max_length=1000000000",
    "replying.max_length=1000000000",
    "mle.batch_size=1000000000",
    "identifiers.batch_size=1000000000",
    "ppo.batch_size=1000000000",
    "ppo.ppo_epochs=1000000000",
    "ppo.valid_contexts=1000000000000",
    "eval.best_of=1000000000",
    "eval.batch_size=1000000000",
    "data.num_train=1000000000",
    "data.vocab_size=1000000000",
]


@pytest.mark.parametrize("setting", HUGE)
def test_sizes_and_exponents_have_a_sane_limit(setting):
    with pytest.raises(DataError, match=setting):
        emprl.make_config(settings=[setting])


@pytest.mark.parametrize(
    "words, says",
    [
        (["--sed=1"], "unrecognized"),
        (["--seed", "x"], "invalid int"),
        (["rn"], "invalid choice"),
        (["--preset", "huge"], "invalid choice"),
        (["--data"], "expected one argument"),
        (["evaluate"], "arguments are required: --"),
        (["download"], "required: folder"),
        (["chat", "--data", "x"], "required: --run"),
        (["chat", "--run", "x", "--set", "ppo.lr=1"], "--set"),
        (["evaluate", "--run", "x", "--data", "x", "--t5", "x"], "--t5"),
        (["--set", "ppo.kl_horizon=0"], "kl_horizon"),
        (["--data", "missing.jsonl"], "missing.jsonl"),
        (["--preset", "real", "--data", "config.py"], "config.py"),
        (["--data", "a\nb\x1b[1m.jsonl"], "a\\nb\\x1b[1m.jsonl"),
        (["\n\x1b[2J"], "invalid choice"),
        (["--data", ""], "argument --data: empty"),
        (["--t5", ""], "argument --t5: empty"),
        (["--run="], "argument --run: empty"),
        (["--run", "a\0b"], "argument --run: empty, or with a NUL"),
        (["--t5", "a\0b"], "argument --t5: empty, or with a NUL"),
        (["evaluate", "--run", "x", "--data", ""], "argument --data: empty"),
        (["chat", "--run", "a\0b"], "argument --run: empty, or with a NUL"),
        (["download", ""], "argument folder: empty"),
    ],
)
def test_a_wrong_command_line_is_one_line(words, says, refusal, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = refusal(words)
    assert says in line and line[:-1].isprintable()
    assert not list(tmp_path.iterdir()), "nothing was written"


def test_odd_command_lines_never_end_in_a_traceback(
    tmp_path, monkeypatch, thorough, counts, capsys
):
    """Whatever a shell can pass (no NUL, no half surrogate), and no path that leads elsewhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(emprl, "run_all", lambda run: None)
    known = [
        "run",
        "chat",
        "evaluate",
        "options",
        "--run",
        "--data",
        "--set",
        "--seed",
        "--t5",
    ]
    for case in range(1000 if thorough else 100):
        rng = random.Random(f"command {case}")
        drawn = [rng.choice(known) for _ in range(rng.randint(0, 3))]
        typed = [odd_text(rng) for _ in range(rng.randint(0, 2))]
        drawn += [re.sub("[/\0\ud83d]", "", text) for text in typed]
        rng.shuffle(drawn)
        if {"-h", "--help"}.isdisjoint(drawn):
            code = emprl.main(drawn)
            errors = capsys.readouterr().err
            assert (code, errors.count("\n")) in ((0, 0), (2, 1)), (drawn, errors)
            counts["odd command lines"] += 1


def test_a_models_name_is_no_folder(tmp_path, refusal, monkeypatch):
    """And a folder without its tokenizer, or with a pointer to it. Nothing is written."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "t5-small"
    (tmp_path / "data").mkdir()

    def said():
        line = refusal(["--preset", "paper", "--data", "data", "--t5", "t5-small"])
        assert not (tmp_path / "runs").exists()
        return line

    assert "not by its name" in said()
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    assert "has no spiece.model; download" in said()
    pointer = "version https://git-lfs.github.com/spec/v1\n"
    (folder / "spiece.model").write_text(pointer, encoding="utf-8")
    assert "spiece.model: only git-LFS's pointer" in said()
    (folder / "spiece.model").write_text("a model", encoding="utf-8")
    assert "has no model.safetensors or pytorch_model.bin" in said()


@pytest.mark.parametrize(
    "name, content",
    [
        ("metrics.json", b""),
        ("metrics.json", b"[]"),
        ("metrics.json", b"{}"),
        ("metrics.json", b'{"config": {}, "made_of": {}}'),
        ("metrics.json", b"\xff"),
        ("tokenizer.model", b"rubbish"),
        ("emprl/config.json", b"{}"),
        ("emprl/config.json", b'{"num_layers": 1000000000000}'),
        ("mle/pytorch_model.bin", b""),
        ("checkpoints/judge.pt", b"\x80"),
    ],
)
def test_a_damaged_run_folder_is_refused_by_evaluate_and_chat(
    name, content, copied, tmp_path, refusal
):
    (copied / name).write_bytes(content)
    mine = tmp_path / "mine.jsonl"
    mine.write_text('{"context": "Hello", "response": "Hi"}\n', encoding="utf-8")
    for command in (["evaluate", "--data", mine], ["chat"]):
        assert str(copied) in refusal([*command, "--run", copied])


@pytest.mark.parametrize("name", emprl.RUN_FILES)
def test_a_run_folder_that_lacks_a_part_is_refused(name, copied, refusal):
    for part in copied.glob(name):
        part.unlink()
    line = refusal(["chat", "--run", copied])
    name = name.replace("*", "")
    assert f"{name} is missing; the command that made the run makes it again" in line


def test_metrics_that_do_not_say_of_which_code_they_are_are_refused(copied, refusal):
    metrics = json.loads((copied / "metrics.json").read_text(encoding="utf-8"))
    del metrics["code"]
    (copied / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    assert "'code'" in refusal(["chat", "--run", copied])
