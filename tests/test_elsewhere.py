"""Elsewhere than here: other devices, another encoding of text files, Windows as far as it can be simulated."""

import ast
import os
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import data
import emprl
import specify

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def look_again():
    """Which device there is, is looked up once a process."""
    emprl.find_device.cache_clear()
    yield
    emprl.find_device.cache_clear()


# ---- the device


def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(emprl.shutil, "which", lambda name: None)


def old_driver(monkeypatch):
    def is_available():
        warnings.warn("CUDA initialization: The NVIDIA driver on your system is too old")
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)


def no_kernels(monkeypatch):
    def ones(*size, device=None):
        raise RuntimeError("CUDA error: no kernel image is available\nfor execution")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", ones)


def cpu_build(monkeypatch):
    no_gpu(monkeypatch)
    monkeypatch.setattr(emprl.shutil, "which", lambda name: f"/bin/{name}")


def device_of_a_run(monkeypatch, tmp_path, *arguments):
    """The exit code of `emprl.py` and the device that its run would be on; None if there is none."""
    found = []
    monkeypatch.setattr(emprl, "run_all", lambda run: found.append(run.device))
    code = emprl.main(["--preset", "smoke", "--run", str(tmp_path / "run"), *arguments])
    return code, *found


@pytest.mark.parametrize(
    "there, words",
    [
        (old_driver, "driver on your system is too old"),
        (no_kernels, "no kernel image is available for execution"),
        (cpu_build, "is built without it"),
    ],
)
def test_a_device_that_can_not_be_used_is_one_line(
    there, words, tmp_path, monkeypatch, capsys
):
    there(monkeypatch)
    assert device_of_a_run(monkeypatch, tmp_path) == (0, "cpu")
    told = capsys.readouterr()
    assert words in told.out and told.out.count("\n") == 1 and not told.err
    assert device_of_a_run(monkeypatch, tmp_path) == (0, "cpu")
    assert not capsys.readouterr().out, "said once"

    assert device_of_a_run(monkeypatch, tmp_path / "new", "--device", "cuda") == (2,)
    told = capsys.readouterr()
    assert words in told.err and "--device cuda" in told.err and told.err.count("\n") == 1
    assert not (tmp_path / "new").exists(), "nothing was written"


def test_without_a_device_there_is_nothing_to_say(tmp_path, monkeypatch, capsys):
    no_gpu(monkeypatch)
    assert device_of_a_run(monkeypatch, tmp_path) == (0, "cpu")
    assert device_of_a_run(monkeypatch, tmp_path, "--device", "cpu") == (0, "cpu")
    told = capsys.readouterr()
    assert not told.out and not told.err
    assert device_of_a_run(monkeypatch, tmp_path, "--device", "cuda") == (2,)
    assert "none is seen" in (err := capsys.readouterr().err) and err.count("\n") == 1


def test_apples_gpu_is_not_used(tmp_path, monkeypatch, capsys):
    no_gpu(monkeypatch)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert device_of_a_run(monkeypatch, tmp_path) == (0, "cpu")
    assert (
        "Apple's GPU is not used" in (out := capsys.readouterr().out) and out.count("\n") == 1
    )


def test_a_gpu_is_used_if_nothing_is_said_and_left_alone_if_the_cpu_is(tmp_path, monkeypatch):
    ones = torch.ones
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", lambda *size, device=None: ones(*size))
    assert device_of_a_run(monkeypatch, tmp_path) == (0, "cuda")
    assert device_of_a_run(monkeypatch, tmp_path, "--device", "cuda") == (0, "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("asked"))
    assert device_of_a_run(monkeypatch, tmp_path, "--device", "cpu") == (0, "cpu")


@pytest.mark.parametrize("command", [["rate", "x"], ["ablate", "kl", "x"]])
def test_commands_without_a_device_refuse_one(command, capsys):
    assert emprl.main([*command, "--device", "cpu"]) == 2
    assert "--device" in (err := capsys.readouterr().err) and err.count("\n") == 1


# ---- an older torch


def test_without_muon_only_what_asks_for_it_ends_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    small = ["--set", "sft.steps=2", "pretrain.steps=1", "ppo.steps=1", "eval.contexts=4"]
    command = ["--preset", "smoke", "--run", str(tmp_path / "run")]
    assert emprl.main([*command, *small, "sft.muon=on"]) == 2
    err = capsys.readouterr().err
    assert "has no Muon" in err and "sft.muon=off" in err and err.count("\n") == 1, err
    assert "requirements.txt" not in err, "one thing to do, not two"
    assert emprl.main([*command[:3], str(tmp_path / "other"), *small]) == 0


# ---- the encoding of text files


def without_encoding(source):
    """Lines of the calls that open a text file, or read a program's output as text, in the machine's own encoding."""
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call):
            continue
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        options = {keyword.arg: keyword.value for keyword in call.keywords}
        words = [
            part.value
            for part in ast.walk(ast.Module([*call.args, *options.values()], []))
            if isinstance(part, ast.Constant) and isinstance(part.value, str)
        ]
        binary = any(set(word) <= set("rwxab+") and "b" in word for word in words)
        reads = name in ("read_text", "write_text") or name == "open" and not binary
        owner = getattr(getattr(call.func, "value", None), "id", "")
        if name == "open" and owner in ("tarfile", "os"):
            reads = False
        if (reads or "text" in options) and "encoding" not in options:
            yield call.lineno


def test_every_text_file_is_opened_as_utf_8():
    assert [*without_encoding("open('x'); p.write_text(y)\nrun(z, text=True)")] == [1, 1, 2]
    assert not [*without_encoding("open('x', 'rb'); p.read_text(encoding='utf-8')")]
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in (*ROOT.glob("*.py"), *ROOT.glob("tests/**/*.py"))
        for line in without_encoding(path.read_text(encoding="utf-8"))
    ]
    assert not found


def test_a_run_where_text_is_ascii(tmp_path):
    """As on an old Windows: what is not opened as UTF-8 is opened as ASCII, and Python warns of it."""
    data = tmp_path / "mine.jsonl"
    record = '{"context": ["My caf\u00e9 is gone \U0001f436."], "response": "Oh \u2026 d\u00e9j\u00e0 vu."}\n'
    data.write_text(record * 20, encoding="utf-8")
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment |= {"PYTHONIOENCODING": "utf-8", "PYTHONWARNDEFAULTENCODING": "1"}

    run = str(tmp_path / "run")
    commands = [
        ["--preset", "smoke", "--run", run, "--set", "ppo.steps=1", "eval.contexts=8"],
        ["evaluate", "--run", run, "--data", str(data)],
        ["chat", "--run", run],
        ["rate", run, "ann"],
    ]
    program = (
        "import sys, emprl\n"
        f"assert not any([emprl.main(command) for command in {commands}])\n"
        "sys.path.append('tests/coursework')\n"
        f"import specify\nspecify.write({str(tmp_path / 'mine.py')!r})"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        input="My caf\u00e9 is gone.\n",
    )
    assert done.returncode == 0, done.stderr
    assert "written to" in done.stdout and "exercise" in done.stdout
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
    """The words of a command line as a Windows program gets them (the rules of CommandLineToArgvW)."""
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


def test_printed_commands_can_be_typed_again():
    words = ["python", "emprl.py", "--run", *POSSIBLE_PATHS, 'a "word"', 'end\\"']
    assert shlex.split(data.command_line(words, windows=False)) == words
    line = data.command_line(words, windows=True)
    assert typed_on_windows(line) == words
    assert "'" not in line.replace("it's", ""), "cmd knows no single quotes"
    assert data.command_line(["a", r"C:\Users\x", "b.c=1"], True) == r"a C:\Users\x b.c=1"


def test_a_stopped_run_prints_a_quoted_command(tmp_path, monkeypatch, capsys):
    def stopped(run):
        raise KeyboardInterrupt

    monkeypatch.setattr(emprl, "run_all", stopped)
    command = ["--preset", "smoke", "--run", str(tmp_path / "my run")]
    assert emprl.main(command) == 130
    line = capsys.readouterr().err.strip().split("go on with: ")[1]
    assert shlex.split(line) == ["python", "emprl.py", *command]
    assert emprl.main(["chat", "--run", str(tmp_path / "no run")]) == 2
    line = capsys.readouterr().err.split("`")[1]
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
    assert shlex.split(ast.get_docstring(compiled).split("folder with: ")[1])[-1] == path


WITHOUT = """
import os, signal, sys
import pytest
sys.modules["resource"] = None
del os.fork, signal.SIGKILL
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "tests/test_trust.py", "-k", sys.argv[1]]))
"""


def test_what_windows_lacks_stops_no_other_test():
    """The tests that need fork are skipped, those of the finished run beside them are run."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            WITHOUT,
            "killed_in or faults_end or skipped_step or run_folder_says",
        ],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed, 3 skipped" in done.stdout, done.stdout
