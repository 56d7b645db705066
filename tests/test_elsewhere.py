"""Elsewhere than here: other devices, another encoding of text files, Windows as far as it can
be simulated."""

import ast
import json
import os
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import emprl
from tests.coursework import specify
from tests.tools import words

ROOT = Path(__file__).resolve().parent.parent
FEW_STEPS = """
pretrain.steps=1 mle.steps=2 identifiers.steps=2 context.steps=2 ppo.steps=1
""".split()


# ---- the device


def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(emprl, "NVIDIA_DRIVER", "/no/such/path")


def old_driver(monkeypatch):
    def is_available():
        text = "CUDA initialization: The NVIDIA driver on your system is too old"
        warnings.warn(text, stacklevel=1)
        return False

    no_gpu(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", is_available)


def no_kernels(monkeypatch):
    def ones(*size, device=None):
        raise RuntimeError("CUDA error: no kernel image is available\nfor execution")

    no_gpu(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", ones)


def cpu_build(monkeypatch):
    no_gpu(monkeypatch)
    monkeypatch.setattr(emprl, "NVIDIA_DRIVER", os.devnull)


@pytest.fixture
def started_on(monkeypatch, tmp_path):
    """The exit code of `emprl.py` and the device that its run would be on, if there is one."""

    def start(*options, folder="run"):
        found = []
        monkeypatch.setattr(emprl, "run_all", lambda run: found.append(run.device))
        code = emprl.main([*words(tmp_path / folder), *options])
        return code, *found

    return start


def told_of_devices(capsys):
    """The lines about them; nothing may be on stderr."""
    told = capsys.readouterr()
    assert not told.err
    return [line for line in told.out.splitlines() if line.startswith("device")]


@pytest.mark.parametrize(
    "there, says",
    [
        (old_driver, "driver on your system is too old"),
        (no_kernels, "no kernel image is available for execution"),
        (cpu_build, "is built without it"),
    ],
)
def test_a_device_that_can_not_be_used_is_one_line(
    there, says, started_on, tmp_path, monkeypatch, capsys
):
    there(monkeypatch)
    assert started_on() == (0, "cpu")
    (line,) = told_of_devices(capsys)
    assert says in line

    assert started_on("--device", "cuda", folder="new") == (2,)
    err = capsys.readouterr().err
    assert says in err and "--device cuda" in err and err.count("\n") == 1
    assert not (tmp_path / "new").exists(), "nothing was written"


def test_without_a_device_there_is_nothing_to_say(started_on, monkeypatch, capsys):
    no_gpu(monkeypatch)
    assert started_on() == (0, "cpu")
    assert started_on("--device", "cpu") == (0, "cpu")
    assert told_of_devices(capsys) == []
    assert started_on("--device", "cuda") == (2,)
    err = capsys.readouterr().err
    assert "sees no GPU" in err and err.count("\n") == 1


def test_apples_gpu_is_not_used(started_on, monkeypatch, capsys):
    no_gpu(monkeypatch)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert started_on() == (0, "cpu")
    (line,) = told_of_devices(capsys)
    assert "Apple's GPU is not used" in line


def test_a_gpu_is_used_if_nothing_is_said_and_left_alone_if_the_cpu_is(
    started_on, monkeypatch
):
    ones = torch.ones
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", lambda *size, device=None: ones(*size))
    assert started_on() == (0, "cuda")
    assert started_on("--device", "cuda") == (0, "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("asked"))
    assert started_on("--device", "cpu") == (0, "cpu")


@pytest.mark.parametrize("command", [["download", "x"], ["options"]])
def test_commands_without_a_device_refuse_one(command, refusal):
    assert "--device" in refusal([*command, "--device", "cpu"])


# ---- an older torch


def test_without_muon_only_what_asks_for_it_ends_in_one_line(
    tmp_path, monkeypatch, refusal, no_pictures
):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    line = refusal(words(tmp_path / "run", "mle.muon=on"))
    assert "has no Muon" in line and "mle.muon=off" in line
    assert not (tmp_path / "run").exists(), "nothing was written"
    assert emprl.main(words(tmp_path / "other", *FEW_STEPS, "eval.contexts=4")) == 0


# ---- the encoding of text files


def name_of(node):
    """x.y.name or name -> "name"."""
    return getattr(node, "attr", getattr(node, "id", ""))


def is_binary(call):
    """Does it say "rb" or the like, anywhere among its arguments?"""
    given = [*call.args, *[keyword.value for keyword in call.keywords]]
    constants = [x for x in ast.walk(ast.Tuple(given)) if isinstance(x, ast.Constant)]
    modes = [x.value for x in constants if isinstance(x.value, str)]
    return any("b" in mode and set(mode) <= set("rwxab+") for mode in modes)


def without_encoding(source):
    """Lines of the calls that open a text file, or read what a program writes as text, in the
    machine's own encoding."""
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call):
            continue
        name = name_of(call.func)
        options = {keyword.arg for keyword in call.keywords}
        opens = name == "open" and not is_binary(call)
        if opens and isinstance(call.func, ast.Attribute):
            opens = name_of(call.func.value) not in ("os", "tarfile")
        reads = opens or name in ("read_text", "write_text") or "text" in options
        if reads and "encoding" not in options:
            yield call.lineno


def test_every_text_file_is_opened_as_utf_8():
    assert [*without_encoding("open('x'); p.write_text(y)\nrun(z, text=True)")] == [1, 1, 2]
    assert not [*without_encoding("open('x', 'rb'); p.read_text(encoding='utf-8')")]
    found = {}
    for path in (*ROOT.glob("*.py"), *ROOT.glob("tests/**/*.py")):
        lines = [*without_encoding(path.read_text(encoding="utf-8"))]
        if lines:
            found[str(path.relative_to(ROOT))] = lines
    assert found == {}


PROGRAM = """
import sys
import emprl
from tests.coursework import specify
emprl.draw_plots = lambda *_: {}
assert not any([emprl.main(command) for command in COMMANDS])
specify.write(sys.argv[1])
"""


def test_a_run_where_text_is_ascii(tmp_path):
    """As on an old Windows: what is not opened as UTF-8 is opened as ASCII."""
    mine = tmp_path / "mine.jsonl"
    said, replied = "My caf\u00e9 is gone \U0001f436.", "Oh \u2026 d\u00e9j\u00e0 vu."
    record = json.dumps({"context": [said], "response": replied}, ensure_ascii=False) + "\n"
    mine.write_text(record * 20, encoding="utf-8")
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment |= {"PYTHONIOENCODING": "utf-8", "PYTHONWARNDEFAULTENCODING": "1"}

    run = str(tmp_path / "run")
    commands = [
        words(run, *FEW_STEPS, "eval.contexts=8"),
        ["evaluate", "--run", run, "--data", str(mine)],
        ["chat", "--run", run],
    ]
    program = PROGRAM.replace("COMMANDS", repr(commands))
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "mine.py"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        input="My caf\u00e9 is gone.\n",
    )
    assert done.returncode == 0, done.stderr
    assert "exercise" in done.stdout and (tmp_path / "mine.py").exists()
    ours = [line for line in done.stderr.split("\n") if str(ROOT) in line]
    assert not [line for line in ours if "Encoding" in line and "site-packages" not in line]


# ---- Windows

POSSIBLE_PATHS = [
    "runs/toy-seed0",
    "my runs/toy (1)",
    "it's mine",
    "a&b",
    "50%",
    "$HOME",
    "",
    "runs;rm",
    "C:\\Users\\Ann Lee\\run",
    "C:\\Users\\Ann Lee\\",
    "caf\u00e9",
]


def typed_on_windows(line):
    """What a Windows program gets of a line, by the rules of CommandLineToArgvW."""
    words, word, quoted, slashes, started = [], "", False, 0, False
    for character in line + " ":
        if character == "\\":
            slashes, started = slashes + 1, True
            continue
        if character == '"':
            word += "\\" * (slashes // 2)
            if slashes % 2:
                word += '"'
            else:
                quoted, started = not quoted, True
        else:
            word += "\\" * slashes
            if character == " " and not quoted:
                words += [word] if started else []
                word, started = "", False
            else:
                word, started = word + character, True
        slashes = 0
    return words


def test_printed_commands_can_be_typed_again(monkeypatch):
    typed = ["python", "emprl.py", "--run", *POSSIBLE_PATHS, 'a "word"', 'end\\"']
    assert shlex.split(emprl.command_line(typed)) == typed
    with monkeypatch.context() as windows:
        windows.setattr(os, "name", "nt")
        line = emprl.command_line(typed)
        plain = emprl.command_line(["a", r"C:\Users\x", "b.c=1"])
    assert typed_on_windows(line) == typed
    assert "'" not in line.replace("it's", ""), "cmd knows no single quotes"
    assert plain == r"a C:\Users\x b.c=1"


def test_a_stopped_run_prints_a_quoted_command(tmp_path, monkeypatch, capsys, refusal):
    def stopped(run):
        raise KeyboardInterrupt

    monkeypatch.setattr(emprl, "run_all", stopped)
    command = words(tmp_path / "my run")
    assert emprl.main(command) == 130
    line = capsys.readouterr().err.strip().split("go on with: ")[1]
    assert shlex.split(line) == ["python", "emprl.py", *command]
    line = refusal(["chat", "--run", tmp_path / "no run"]).split("`")[1]
    assert shlex.split(line) == ["python", "emprl.py", "--run", str(tmp_path / "no run")]


@pytest.mark.parametrize(
    "path", [r"C:\Users\new\x.py", "my solution.py", "it's.py", 'a"b.py', '"""', "\\N{x}\\"]
)
def test_the_exercise_can_have_any_path(path, tmp_path, monkeypatch):
    """Its first lines name the path; on Linux a backslash may stand in a file's name, too."""
    monkeypatch.chdir(tmp_path)
    specify.write(path)
    source = Path(path).read_text(encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an invalid escape is only a warning
        compiled = ast.parse(source)
    command = ast.get_docstring(compiled).split("as you like, with:\n")[1].split("\n")[0]
    assert shlex.split(command)[-1] == path


WITHOUT = """
import os, signal, sys
import pytest
sys.modules["resource"] = None
sys.modules["torch._dynamo"] = sys  # takes a second, and nothing is trained here
del os.fork, signal.SIGKILL
options = ["-q", "-p", "no:cacheprovider", "tests/test_trust.py", "-k", sys.argv[1]]
sys.exit(pytest.main(options))
"""


LAB = """
import importlib, multiprocessing, os, pathlib, signal, sys
sys.modules |= dict.fromkeys(["resource", "fcntl", "pwd", "termios"])
del os.fork, signal.SIGKILL
multiprocessing.get_all_start_methods = lambda: ["spawn"]
del multiprocessing.context._concrete_contexts["fork"]
for path in pathlib.Path("tests/lab").glob("*.py"):
    importlib.import_module(f"tests.lab.{path.stem}")
    print(path.stem)
"""


def test_what_windows_lacks_is_needed_only_where_it_is_used():
    """Every program of the lab can at least say what it is."""
    done = subprocess.run(
        [sys.executable, "-c", LAB], cwd=ROOT, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    assert {"paper", "mutate", "bench"} <= {*done.stdout.split()}


def test_what_windows_lacks_stops_no_other_test():
    """The tests that need fork are skipped, one beside them is run."""
    some = "killed_at or GPU or mle-truncate or names_the_test_part"
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, some], cwd=ROOT, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed, 3 skipped" in done.stdout, done.stdout
