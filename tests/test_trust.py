"""Interrupted, spoilt or misled, a run loses nothing and ends in a line that says what to do.

Few cases by default; with --thorough 200 kills, each fault in every stage, damage to every
checkpoint. Odd input is in test_rubbish.py.
"""

import contextlib
import io
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
import torch._dynamo  # noqa: F401, which every optimizer imports: once, before the forks

import data
import emprl
import identifiers
import ppo
import t5_small
from tests.tools import read_json, read_lines, words

EMPRL = Path(emprl.__file__)
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows can not fork")


# ---- a run in a process of its own


def nothing():
    pass


def run(folder, *settings, before=nothing):
    """`python emprl.py --preset smoke`, saving at every step and without pictures.

    before() is called in the new process first. Returns the exit code (-9: killed by signal 9)
    and what was written to stderr.
    """
    errors = Path(f"{folder}.stderr")
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        run_in_child(words(folder, *settings), before, errors)
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status), errors.read_text(encoding="utf-8")


def draw_nothing(*_):
    """Pictures take longer than all the rest of a small run."""
    return {}


def run_in_child(command, before, errors):
    """Ends the process."""
    code = 3
    try:
        with contextlib.ExitStack() as files:
            devnull = files.enter_context(open(os.devnull, "w", encoding="utf-8"))
            file = files.enter_context(open(errors, "w", encoding="utf-8"))
            files.enter_context(contextlib.redirect_stdout(devnull))
            files.enter_context(contextlib.redirect_stderr(file))
            emprl.Run.save_every = 0.0
            emprl.draw_plots = draw_nothing
            before()
            code = emprl.main(command)
    finally:
        os._exit(code)


def figures(folder):
    """metrics.json without how long it took, and of which code it is: somebody may be at work
    on it while the tests run."""
    return {**read_json(folder / "metrics.json"), "seconds": 0, "code": ""}


def differences(a, b):
    """Names of what is not bit-identical in two finished run folders."""
    files = "metrics.jsonl samples.md responses.jsonl config.json tokenizer.model".split()
    found = [name for name in files if (a / name).read_bytes() != (b / name).read_bytes()]
    if figures(a) != figures(b):
        found.append("metrics.json")
    for name in ("mle", "emprl"):
        one, two = (t5_small.load_state(x / name / "pytorch_model.bin") for x in (a, b))
        found += [f"{name}: {key}" for key in one if not torch.equal(one[key], two[key])]
    return found


STEPS = {
    "pretrain": 4,
    "mle": 12,
    "identifiers": 8,
    "context": 4,
    "judge": 8,
    "ppo": 4,
    "evaluate mle": 1,
    "evaluate emprl": 1,
}


def at(stage, step, happens):
    """happens() when a step of a stage begins."""
    seed = emprl.Run.seed

    def seed_and_happen(self, name, i=0):
        seed(self, name, i)
        if (name, i) == (stage, step):
            happens()

    emprl.Run.seed = seed_and_happen


# ---- killed

SIGNALS = ("SIGKILL", "SIGTERM", "SIGHUP", "SIGINT", "SIGUSR1")  # USR1: of a cluster's queue


def kill_soon(number, delay):
    """Send this process a signal after some seconds, whatever it is then about to do."""
    if number not in (signal.SIGINT, signal.SIGKILL):  # pytest may have been told to ignore it
        signal.signal(number, signal.SIG_DFL)
    threading.Timer(delay, os.kill, (os.getpid(), number)).start()


@needs_fork
def test_killed_at_any_moment_nothing_is_lost(finished, tmp_path, thorough, counts):
    """A signal in each stage in turn, the same command again, and so on to the end of the run:
    it is then as one that was never killed."""
    rng = random.Random(0)
    signals = itertools.cycle(SIGNALS)
    killed, used = Counter(), set()
    while killed.total() < (200 if thorough else len(STEPS)):
        for stage, steps in STEPS.items():
            number = getattr(signal, next(signals))
            kill = partial(kill_soon, number, rng.uniform(0, 0.08))
            when = partial(at, stage, rng.randrange(steps), kill)
            code, _ = run(tmp_path / "run", before=when)
            assert code in (0, 130 if number == signal.SIGINT else -number)
            if code != 0:
                killed[stage] += 1
                used.add(number.name)
                counts[f"kills by {number.name}"] += 1
        assert run(tmp_path / "run")[0] == 0
        assert differences(tmp_path / "run", finished) == []
        shutil.rmtree(tmp_path / "run")
    assert set(killed) == set(STEPS)
    assert used == set(SIGNALS)


# ---- faults


def spoilt(function, value, calls):
    """The function, with its results multiplied by value in some calls (counted from 0)."""
    count = iter(range(10**9))

    def wrapped(*arguments, **options):
        result = function(*arguments, **options)
        return result * value if next(count) in calls else result

    return wrapped


EVERY = range(10**9)


def spoil_reward(value, calls):
    identifiers.empathy_reward = spoilt(identifiers.empathy_reward, value, calls)


def spoil_loss(value, calls):
    loss_sum = t5_small.T5.loss_sum
    spoil = spoilt(lambda loss: loss, value, calls)

    def spoilt_loss_sum(self, *batch):
        loss, count = loss_sum(self, *batch)
        return spoil(loss), count

    t5_small.T5.loss_sum = spoilt_loss_sum


def out_of_memory():
    def generate(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    ppo.generate = generate


def disk_full():
    """No file may grow over 20 kB: as on a full disk, but for this process only."""
    import resource  # Windows has none

    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def ctrl_c_at(stage, step):
    """Ctrl-C, and within a stage nothing else makes the run save."""
    emprl.Run.save_every = float("inf")
    at(stage, step, interrupt)


@dataclass
class Fault:
    """What happens to a run, and how it has to end."""

    before: partial
    code: int = 0
    says: str = ""  # in its one line
    settings: tuple = ()
    skipped: str = ""  # the one step that is dropped
    harmless: bool = False  # the same command without it ends as if nothing had been


NAN, INFINITY = float("nan"), float("inf")
ABSURD = ("mle.lr=1e9", "mle.steps=40")
FEW = ("identifiers.steps=1", "context.steps=1", "eval.contexts=8")  # of what is not spoilt
FAULTS = {
    "one reward is NaN": Fault(partial(spoil_reward, NAN, {0}), settings=FEW, skipped="ppo 0"),
    "one reward is infinite": Fault(
        partial(spoil_reward, INFINITY, {2}), settings=FEW, skipped="ppo 2"
    ),
    "every reward is NaN": Fault(
        partial(spoil_reward, NAN, EVERY), 2, "10 steps in a row", (*FEW, "ppo.steps=12")
    ),
    # after the four of pre-training
    "one loss is NaN": Fault(partial(spoil_loss, NAN, {5}), settings=FEW, skipped="mle 1"),
    "one loss is infinite": Fault(
        partial(spoil_loss, INFINITY, {6}), settings=FEW, skipped="mle 2"
    ),
    "every loss is NaN": Fault(partial(spoil_loss, NAN, EVERY), 2, "lower mle.lr"),
    "every loss of MLE is NaN": Fault(
        partial(spoil_loss, NAN, EVERY),
        2,
        "mle, step 10: 10 steps in a row",
        ("pretrain.steps=0",),
    ),
    "the learning rate is absurd": Fault(nothing, 2, "lower mle.lr", ABSURD),
    "the GPU's memory is full": Fault(out_of_memory, 2, "micro_batch", harmless=True),
}
for stage, step in {"pretrain": 1, "mle": 7, "judge": 2, "context": 1, "ppo": 3}.items():
    FAULTS[f"the disk is full in {stage}"] = Fault(
        partial(at, stage, step, disk_full), 2, "make room", harmless=True
    )
for stage, step in {"pretrain": 1, "mle": 5, "identifiers": 1, "judge": 3, "ppo": 2}.items():
    FAULTS[f"Ctrl-C in {stage}"] = Fault(
        partial(ctrl_c_at, stage, step), 130, "go on with", harmless=True
    )
FAULTS["Ctrl-C before the identifiers"] = Fault(  # when they are made, which is seeded as 0
    partial(ctrl_c_at, "identifiers", 0), 130, "go on with", harmless=True
)
ENOUGH = (  # without --thorough
    "one reward is NaN",
    "every reward is NaN",
    "one loss is infinite",
    "every loss is NaN",
    "every loss of MLE is NaN",
    "the learning rate is absurd",
    "the GPU's memory is full",
    "the disk is full in mle",
    "Ctrl-C in ppo",
)


def few(cases, enough):
    """All cases; only those that are enough are run without --thorough."""
    rest = [pytest.mark.only_thorough]
    return [pytest.param(case, marks=[] if case in enough else rest) for case in cases]


@needs_fork
@pytest.mark.parametrize("name", few(FAULTS, ENOUGH))
def test_a_fault_is_one_line_and_leaves_something_to_go_on_from(
    name, finished, tmp_path, counts
):
    counts["faults inside a run"] += 1
    fault = FAULTS[name]
    folder = tmp_path / "run"
    code, errors = run(folder, *fault.settings, before=fault.before)
    assert code == fault.code and fault.says in errors, errors
    assert errors.strip().count("\n") == 0, errors

    checkpoints = {path.stem: path for path in folder.glob("checkpoints/*.pt")}
    for path in checkpoints.values():
        assert t5_small.load_state(path), f"{path} is damaged"
    if name.startswith(("the disk is full in", "Ctrl-C in")):
        assert name.split()[-1] in checkpoints, "no good checkpoint is left"
    if fault.code == 0:
        policy = t5_small.from_pretrained(folder / "emprl")
        assert all(weight.isfinite().all() for weight in policy.parameters())
        assert skipped_steps(folder) == {fault.skipped: 1}
    if fault.harmless:
        assert run(folder)[0] == 0
        assert differences(folder, finished) == []


def skipped_steps(folder):
    """{"mle 2": 1.0}: steps, and which share of each was dropped."""
    log = read_lines(folder / "metrics.jsonl")
    return {f"{x['stage']} {x['step']}": x["skipped"] for x in log if x.get("skipped")}


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def put_something_else(path):
    torch.save([1, 2], path)


def put_a_folder(path):
    path.unlink()
    path.mkdir()


def put_a_pipe(path):
    path.unlink()
    os.mkfifo(path)


def take_its_weights(path):
    state = t5_small.load_state(path)
    del state["weights"]
    torch.save(state, path)


HARMS = [
    truncate,
    flip_a_bit,
    put_something_else,
    put_a_folder,
    put_a_pipe,
    take_its_weights,
]


@needs_fork
@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize(
    "stage", few(["pretrain", "mle", "identifiers", "judge", "context", "ppo"], ["mle"])
)
def test_a_damaged_checkpoint_is_named_and_left_alone(
    stage, harm, finished, tmp_path, thorough, counts
):
    """Once it is deleted, the same command makes it anew: tried with a file and a folder, and
    with --thorough after each harm."""
    counts["damaged checkpoints"] += 1
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / f"{stage}.pt"
    harm(path)
    others = {p: p.read_bytes() for p in path.parent.iterdir() if p.is_file()}
    code, errors = run(tmp_path / "run")
    assert code == 2 and errors.count("\n") == 1 and f"{stage}.pt: " in errors, errors
    assert {p: p.read_bytes() for p in path.parent.iterdir() if p.is_file()} == others

    path.rmdir() if path.is_dir() else path.unlink()
    if thorough or harm in (truncate, put_a_folder):
        assert run(tmp_path / "run")[0] == 0
        assert differences(tmp_path / "run", finished) == []


# ---- after training


def strictly(text):
    """Parsed by the letter of the standard, which knows no NaN and no Infinity."""

    def refuse(word):
        pytest.fail(f"bare {word} in JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("factor, word", [(1e6, "inf"), (float("nan"), "nan")])
def test_a_policy_that_has_diverged_is_reported_and_no_crash(factor, word, copied):
    """Perplexities beyond what a float holds, and weights that are no numbers."""
    state = t5_small.load_state(copied / "checkpoints" / "ppo.pt")
    for weight in state["weights"].values():
        weight *= factor
    torch.save(state, copied / "checkpoints" / "ppo.pt")
    (copied / "metrics.json").unlink()
    assert emprl.main(words(copied)) == 0
    found = strictly((copied / "metrics.json").read_text(encoding="utf-8"))
    assert found["emprl"]["perplexity"] == word and found["mle"]["perplexity"] > 1
    assert f"| {word} |" in (copied / "report.md").read_text(encoding="utf-8")
    for line in (copied / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        strictly(line)


WEIGHTS = {  # file -> where in it the tensors are, and the word that names what is wrong
    "emprl/pytorch_model.bin": (None, "not finite"),
    "checkpoints/judge.pt": ("weights", "not what metrics.json was measured on"),
}


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("command", ["chat", "evaluate"])
def test_weights_that_are_no_numbers_are_refused(
    command, name, finished, tmp_path, refusal, mine
):
    shutil.copytree(finished, tmp_path / "run")
    key, says = WEIGHTS[name]
    state = t5_small.load_state(tmp_path / "run" / name)
    weights = state[key] if key else state
    next(iter(weights.values())).fill_(float("nan"))
    torch.save(state, tmp_path / "run" / name)
    options = ["--data", mine] if command == "evaluate" else []
    line = refusal([command, "--run", tmp_path / "run", *options])
    assert Path(name).stem in line and says in line


@pytest.fixture
def mine(tmp_path):
    """A file of own dialogues."""
    path = tmp_path / "mine.jsonl"
    path.write_text('{"context": "Hello", "response": "Hi"}\n', encoding="utf-8")
    return path


def test_training_that_diverges_at_its_end_is_named(tmp_path, refusal, monkeypatch):
    """Fewer steps than the ten in a row after which a stage gives up."""
    made = []
    init = torch.nn.Linear.__init__
    seed = emprl.Run.seed

    def remember(self, *sizes, **options):
        init(self, *sizes, **options)
        made.append(self)

    def spoil(self, stage, step=0):
        seed(self, stage, step)
        if (stage, step) == ("judge", 7):
            made[-1].weight.data.fill_(float("inf"))

    monkeypatch.setattr(torch.nn.Linear, "__init__", remember)
    monkeypatch.setattr(emprl.Run, "seed", spoil)
    monkeypatch.setattr(t5_small.Trainer, "finish", lambda self: None)
    line = refusal(words(tmp_path, "mle.steps=1"))
    assert "judge" in line and "lower identifiers.lr, or the lr of a stage before it" in line


def test_a_run_of_skipped_stages_has_a_report_without_their_pictures(tmp_path, capsys):
    skipped = [f"{x}.steps=0" for x in ("pretrain", "mle", "identifiers", "context", "ppo")]
    assert emprl.main(words(tmp_path, *skipped)) == 0
    assert "no picture" not in capsys.readouterr().out
    drawn = {path.stem for path in (tmp_path / "plots").iterdir()}
    assert drawn == {"emp_f1", "levels"}
    assert (tmp_path / "report.md").read_text(encoding="utf-8").count("![") == len(drawn)


def test_a_skipped_stage_leaves_the_pictures_of_the_others(tmp_path, capfd):
    skipped = ["mle.steps=0", "ppo.steps=0", "identifiers.steps=4", "eval.contexts=8"]
    assert emprl.main(words(tmp_path, *skipped)) == 0
    drawn = {path.stem for path in (tmp_path / "plots").iterdir()}
    assert drawn == {"emp_f1", "levels", "losses"}
    assert not capfd.readouterr().err, "no complaint of an empty panel"


def test_a_picture_that_can_not_be_drawn_costs_no_report(copied, capsys, monkeypatch):
    (copied / "report.md").unlink()

    def draw_broken(*_):
        raise ZeroDivisionError("in a changed copy")

    monkeypatch.setattr(emprl, "PICTURES", {draw_broken: "never seen"})
    assert emprl.main(words(copied)) == 0
    out, err = capsys.readouterr()
    assert "ZeroDivisionError: in a changed copy" in out and "Traceback" in err
    assert "never seen" not in (copied / "report.md").read_text(encoding="utf-8")


def test_without_matplotlib_there_is_a_report(copied, capsys, monkeypatch):
    (copied / "report.md").unlink()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert emprl.main(words(copied)) == 0
    assert "no pictures: " in capsys.readouterr().out
    assert "![" not in (copied / "report.md").read_text(encoding="utf-8")


POOR = """
import pathlib, sys
def home():
    raise RuntimeError("Could not determine home directory.")
def nobody(number):
    raise KeyError(f"getpwuid(): uid not found: {number}")
pathlib.Path.home = home
try:
    import pwd
    pwd.getpwuid = nobody
except ImportError:  # Windows
    pass
import emprl
emprl.PICTURES = {emprl.draw_ppo: ""}  # one of them is enough
sys.exit(emprl.main(sys.argv[1:]))
"""


def test_jupyters_backend_a_poor_terminal_and_no_home_cost_nothing(finished, tmp_path):
    """MPLBACKEND names what is not installed; the folder has letters that ASCII lacks; the user
    has no entry in passwd, as in a container. PPO, whose optimizer needs more of torch, is done
    anew."""
    folder = tmp_path / "läufe 😀"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "plots")
    (folder / "checkpoints" / "ppo.pt").unlink()
    hidden = ("MPLCONFIGDIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "HOME", "USER", "LOGNAME")
    poor = {key: x for key, x in os.environ.items() if key not in hidden}
    poor["MPLBACKEND"] = "module://not_installed.backend"
    poor |= {"PYTHONIOENCODING": "ascii:strict", "PYTHONPATH": str(EMPRL.parent)}
    line = [sys.executable, "-c", POOR, *words(folder.name)]
    done = subprocess.run(line, cwd=tmp_path, env=poor, capture_output=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert b"l?ufe ?" in done.stdout and b"no picture" not in done.stdout
    assert (folder / "plots" / "ppo.png").exists()


def test_a_reader_of_the_output_that_has_ended_is_no_full_disk(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    ours, theirs = os.pipe()
    os.close(ours)
    line = [sys.executable, EMPRL, *words(tmp_path / "run")]
    done = subprocess.run(line, stdout=theirs, stderr=subprocess.PIPE)
    os.close(theirs)
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1, done.stderr
    assert b"read the output" in done.stderr and b"room" not in done.stderr


# ---- Ctrl-C, threads and what nobody foresaw


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="sees imports by /proc")
def test_ctrl_c_while_importing():
    started = subprocess.Popen(
        [sys.executable, EMPRL, "--help"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    maps = Path(f"/proc/{started.pid}/maps")
    while "libtorch" not in maps.read_text(encoding="utf-8"):
        time.sleep(0.001)
    started.send_signal(signal.SIGINT)
    err = started.communicate()[1]
    assert started.returncode == 130 and err == b"\nstopped\n", err


def test_a_second_ctrl_c_after_the_last_line_changes_nothing(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    class Impatient(io.StringIO):
        def write(self, text):
            os.kill(os.getpid(), signal.SIGINT)
            return super().write(text)

    monkeypatch.setattr(emprl, "run_all", interrupted)
    monkeypatch.setattr(sys, "stderr", Impatient())
    before = signal.getsignal(signal.SIGINT)
    assert emprl.main(words(tmp_path)) == 130
    assert "go on with" in sys.stderr.getvalue()
    assert signal.getsignal(signal.SIGINT) is before, "the handler is given back"


def test_main_outside_the_main_thread(tmp_path, monkeypatch):
    codes = []
    monkeypatch.setattr(emprl, "run_all", lambda run: None)
    thread = threading.Thread(target=lambda: codes.append(emprl.main(words(tmp_path))))
    thread.start()
    thread.join()
    assert codes == [0]


def test_what_nobody_foresaw_keeps_its_traceback_and_says_what_is_saved(
    tmp_path, monkeypatch, capsys
):
    def changed(*_):
        return {}["a student's key"]

    monkeypatch.setattr(emprl, "mle_trainer", changed)
    assert emprl.main(words(tmp_path)) == 1
    *lines, last = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback") and 'KeyError: "a student\'s key"' in lines
    assert "saved" in last and "the same command goes on" in last
    assert (tmp_path / "checkpoints" / "pretrain.pt").exists()


# ---- collapse

FIRST = {"kl": 0.0, "entropy": 2.0, "length": 20.0}


@pytest.mark.parametrize(
    "change, says",
    [
        ({}, None),
        ({"kl": 14.0, "entropy": 0.3, "length": 12.0, "valid_unique": 0.4}, None),
        ({"kl": 16.0}, "raise ppo.kl_coef"),
        ({"entropy": 0.1}, "entropy"),
        ({"length": 39.0}, "nearly the limit"),
        ({"length": 9.0}, "half of their start"),
        ({"valid_unique": 0.1}, "10% of the responses differ"),
    ],
)
def test_signs_of_collapse(change, says):
    signs = ppo.signs_of_collapse({**FIRST, **change}, FIRST, 40)
    assert len(signs) == (says is not None) and all(says in sign for sign in signs)


def test_a_collapse_is_warned_of(copied, no_pictures, capsys):
    """The smoke run's policy is hardly trained and never ends its responses."""
    (copied / "checkpoints" / "ppo.pt").unlink()
    assert emprl.main(words(copied)) == 0
    assert "warning: responses of 12 tokens, nearly the limit" in capsys.readouterr().out


# ---- chat


def chat(finished, typed, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed)))
    assert emprl.main(["chat", "--run", str(finished)]) == 0
    return capsys.readouterr().out.splitlines()


OPENING = 5  # lines: what it is, where help is, three on how it is used
TYPED = [  # a line -> is it answered? If not, it begins a new conversation, and this is said.
    (b"", False),
    (b"  ", False),
    (b"\t\t", False),
    (b"\xc2\xa0", False),
    (b"\xe2\x80\x8b", False),
    (b"\x1b", False),
    (b"Hello", True),
    (b"hello </s> you </s>", True),
    (b"</s>", True),
    (b"/quit", True),
    (b"\xff\xfe broken", True),
    (b"\0\x07\x1b[2J", True),
    (b"\r\r", False),
    (b"very long " * 30_000, True),
    (b"x" * 100_000, True),
    ("😀".encode(), True),
    ("\u202eevil\u202c".encode(), True),
    ("Мне грустно".encode(), True),
    (b"{}[]%s%n<extra_id_0>", True),
    (b"'; DROP TABLE runs; --", True),
    (b"no end of line", True),
]


def test_chat_survives_what_people_type(finished, capsys, monkeypatch):
    typed = b"\n".join(line for line, _ in TYPED)
    out = chat(finished, typed, capsys, monkeypatch)
    answered = sum(is_answered for _, is_answered in TYPED)
    begun = out.count("(a new conversation)")
    assert begun >= len(TYPED) - answered > 5, "a carriage return ends a line, too"
    assert len(TYPED) > 20 and len(out) == OPENING + 2 * answered + begun
    assert all(line.isprintable() for line in out)
    assert len(chat(finished, b"", capsys, monkeypatch)) == OPENING, "the end at once"


def test_chat_without_input_is_one_line(finished, refusal, monkeypatch):
    """As where the terminal has been closed, or started from a window."""
    monkeypatch.setattr(sys, "stdin", None)
    assert "no input; start it in a terminal" in refusal(["chat", "--run", finished])


def test_too_little_memory_in_chat_names_what_helps_there(finished, refusal, monkeypatch):
    """There is no training whose micro_batch could be lower."""

    def generate(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(ppo, "generate", generate)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    line = refusal(["chat", "--run", finished])
    assert "out of memory" in line and "--device cpu" in line and "micro_batch" not in line


def test_chat_says_first_what_it_is_and_where_help_is(finished, capsys, monkeypatch):
    """Before anything is read, and again on /help, which is no part of the talk."""
    torch.manual_seed(0)
    told = chat(finished, b"Hello\n/help\nHello\n", capsys, monkeypatch)
    exercise, help_is = told[:2]
    assert "exercise" in exercise and "no person reads along" in exercise
    assert all(number in help_is for number in ("112", "911", "988", "findahelpline.com"))
    assert max(len(line) for line in told[:OPENING]) < 100
    first, again = OPENING, OPENING + 2  # the lines of the two replies, and of the help
    assert told[again : again + OPENING] == told[:OPENING] and len(told) == 2 * (OPENING + 2)
    torch.manual_seed(0)
    unhelped = chat(finished, b"Hello\nHello\n", capsys, monkeypatch)
    assert unhelped[first:] == told[first:again] + told[again + OPENING :]


LONG = "I want to die. " + "so " * 5000  # more than the models are given


@pytest.mark.parametrize("text", ["I want to die", "Nobody calls. I'm suicidal!", LONG])
def test_chat_answers_signs_of_crisis_with_a_pointer_to_people(
    text, finished, capsys, monkeypatch
):
    """No generated line answers it, and it is not kept in the context."""
    out = chat(finished, f"Hello\n{text}\nHello\n".encode(), capsys, monkeypatch)
    pointer = OPENING + 2
    assert out[pointer : pointer + 2] == out[:2] and len(out) == OPENING + 2 + 2 + 2


def test_evaluate_and_chat_take_a_device(finished, mine, refusal, monkeypatch, capsys):
    """Without a GPU: cuda is refused in one line; with cpu no GPU is even looked for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for command in (["evaluate", "--data", mine], ["chat"]):
        line = refusal([*command, "--run", finished, "--device", "cuda"])
        assert line.startswith("emprl.py: --device cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("looked for"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Hello\n")))
    assert emprl.main(["chat", "--run", str(finished), "--device", "cpu"]) == 0


# ---- fair figures


def test_the_test_part_influences_nothing_before_the_evaluation(
    finished, tmp_path, no_pictures, monkeypatch
):
    """Other test dialogues and test labels: every stage leaves the same weights and log."""
    embedded = data.generated_corpus

    def other_test(*arguments):
        corpus, other = embedded(*arguments), embedded(99, 1, 1, 40, 1)
        corpus.dialogues["test"] = other.dialogues["test"]
        corpus.labelled["test"] = other.labelled["test"]
        corpus.level_probs |= other.level_probs
        return corpus

    monkeypatch.setattr(data, "generated_corpus", other_test)
    assert emprl.main(words(tmp_path)) == 0
    changed = differences(tmp_path, finished)
    measured = ["samples.md", "responses.jsonl", "metrics.json"]
    assert changed == measured, "the test part is another one"
    for path in (finished / "checkpoints").iterdir():
        assert plain_state(path) == plain_state(tmp_path / "checkpoints" / path.name)


def plain_state(checkpoint):
    """All that it holds as a text, but for how long it took."""
    state = {**t5_small.load_state(checkpoint), "seconds": 0}
    return json.dumps(state, default=torch.Tensor.tolist)


def test_no_option_names_the_test_part():
    names = [name for name in emprl.settings_of(emprl.Config()) if "test" in name]
    assert names == ["data.num_test"], "how many there are, and nothing else"


def labelled_parts():
    """Of the generated world, and of real pairs of 80 speakers."""
    pairs = []
    for i in range(400):
        name = f"{i % 80}/{i}"
        pairs.append(data.Dialogue((f"speaker {i % 80}",), "b", "", (0, 0, 0), name))
    return data.generated_corpus(0, 5, 5, 5, 300).labelled, data.split_labelled(pairs, 0)


@pytest.mark.parametrize("parts", labelled_parts(), ids=["embedded", "real"])
def test_the_judge_never_sees_what_the_reward_was_trained_on(parts):
    def contexts(*names):
        return {dialogue.context for dialogue in itertools.chain(*map(parts.get, names))}

    reward = contexts("train", "valid")
    judge = contexts("judge_train", "judge_valid")
    test = contexts("test")
    assert reward and judge and test
    assert not reward & judge and not (reward | judge) & test


def test_too_little_memory_for_a_model_names_its_sizes():
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        line = emprl.in_one_line(error)
        assert "t5.d_model" in line and "identifiers.size" in line and "micro_batch" in line


def test_the_run_folder_says_what_it_came_from(finished):
    (found,) = read_json(finished / "environment.json")
    assert set(found["packages"]) == {"torch", "sentencepiece", "numpy"}
    assert found["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"command", "code", "python", "threads", "gflops"} <= set(found)
    assert found["device"] == emprl.find_device()


def test_a_short_stage_that_learns_nothing_is_no_result(tmp_path, capsys):
    """A context classifier that has diverged makes every reward NaN: PPO's four steps are all
    skipped, fewer than the ten in a row of longer stages."""
    assert emprl.main(words(tmp_path, "context.lr=1e9")) == 2
    err = capsys.readouterr().err
    assert "ppo, step 4: 4 steps in a row" in err and err.count("\n") == 1


def test_plots_that_cannot_be_kept_cost_no_report(copied):
    shutil.rmtree(copied / "plots", ignore_errors=True)
    (copied / "plots").write_bytes(b"")
    (copied / "report.md").unlink()
    assert emprl.main(words(copied)) == 0
    assert (copied / "report.md").exists()
