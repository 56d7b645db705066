"""Processes that need not import torch again, which takes a second and more: forks of this one.

They stand in for `python -m ...` in tests of what such a process does. That it starts in a new
Python as well is tested a few times, not each time.
"""

import contextlib
import importlib
import os
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import pytest
import torch._dynamo  # noqa: F401, which every optimizer imports

from tests.coursework import plant, worker
from tests.coursework.student import PROJECT
from tests.coursework.units import TEST_FILES

HIGHEST = 4096  # no file of this process has a higher number


class Fork:
    """A fork that calls a function and ends; for the rest it is as subprocess.Popen with pipes.

    Of this process's open files it has none. Its stderr goes into the file `log`.
    """

    def __init__(self, function, log):
        theirs, self.stdin = pipe_to_write()
        self.stdout, theirs_too = pipe_to_read()
        sys.stdout.flush()
        self.returncode = None
        self.pid = os.fork()
        if self.pid == 0:
            with the_end_of_the_process():
                replace_files(theirs, theirs_too, log)
                function()
        os.close(theirs)
        os.close(theirs_too)

    def poll(self):
        """The exit code; None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout=float("inf")):
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("a fork", timeout)
            time.sleep(0.005)
        return self.returncode

    def kill(self):
        if self.poll() is None:
            os.kill(self.pid, 9)


def pipe_to_write():
    """(the number of its other end, a file to write into it)."""
    theirs, ours = os.pipe()
    return theirs, open(ours, "w", encoding="utf-8", errors="replace")


def pipe_to_read():
    ours, theirs = os.pipe()
    return open(ours, encoding="utf-8", errors="replace"), theirs


@contextlib.contextmanager
def the_end_of_the_process():
    """What is within is the last thing that this process does."""
    code = 1
    try:
        yield
        code = 0
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def replace_files(stdin, stdout, log):
    """The three files that every process has, in the place of all that are open; a session."""
    os.setsid()  # what it starts ends with it
    for number, file in enumerate([stdin, stdout, log.fileno()]):
        os.dup2(file, number)
    os.closerange(3, HIGHEST)
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    sys.stdout = to_write(1)
    sys.stderr = to_write(2)


def to_write(number):
    """A text file of which a line is written as soon as it ends."""
    options = {"buffering": 1, "errors": "backslashreplace", "closefd": False}
    return open(number, "w", encoding="utf-8", **options)


# ---- what they stand in for


def start_worker(path, log):
    """As grade.py starts it."""
    for file in TEST_FILES.values():  # once, and not in each fork
        importlib.import_module(file.removesuffix(".py"))

    def work():
        warnings.simplefilter("ignore")
        sys.argv = ["worker", path]
        worker.main()

    if log == subprocess.DEVNULL:
        with open(os.devnull, "wb") as nothing:
            return Fork(work, nothing)
    return Fork(work, log)


def run_without_pictures(module, words, folder, timeout=float("inf"), **_):
    """As plant.py does: with the modules that are in the folder."""

    def work():
        os.dup2(2, 1)
        for name in list(sys.modules):
            if name in PROJECT or name.split(".")[0] == "tests":
                del sys.modules[name]
        os.chdir(folder)
        pytest.MonkeyPatch().syspath_prepend(folder)
        for name in PROJECT:
            file = Path(importlib.import_module(name).__file__)
            assert file.parent.samefile(folder), f"the copy has no {name}"
        sys.argv = [module, *map(str, words)]
        exec(plant.WITHOUT_PICTURES.format(module=module), {"__name__": "__main__"})

    with tempfile.TemporaryFile() as log:
        fork = Fork(work, log)
        try:
            return fork.wait(timeout)
        finally:
            fork.kill()
