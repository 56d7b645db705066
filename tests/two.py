"""A pytest plugin: two processes share the tests. tests/conftest.py loads it.

The first begins with the first test, the second with the last, and each goes on to the next until
they meet. So a fixture of a file is made twice in one file at most. The second process is a fork:
it has the collected tests, the options and a student's functions. What it would tell the terminal
it writes into a file; the first process reads it there and tells it as its own, so that -x,
--durations and the exit code are as with one process.

One process is enough for one file, for -s and --pdb, which show what a test prints or ask for
commands, for a test that runs pytest itself, and where there is one core or no safe fork.
"""

import multiprocessing
import os
import pickle
import sys
import tempfile
import time

import pytest


def pytest_addoption(parser):
    parser.addoption(
        "--processes", type=int, choices=(1, 2), default=2, help="1 or 2 (default)"
    )


def two_are_wanted(session):
    config = session.config
    return (
        config.getoption("processes") == 2
        and not config.getoption("collectonly")
        and not config.getoption("usepdb")
        and config.getoption("capture") != "no"
        and len({item.path for item in session.items}) > 1
        and "PYTEST_CURRENT_TEST" not in os.environ
        and sys.platform == "linux"
        and len(os.sched_getaffinity(0)) > 1
    )


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    """True: the tests have been run; None leaves it to pytest."""
    if session.testsfailed or not two_are_wanted(session):
        return None
    session.config._tmp_path_factory.getbasetemp()  # both make their folders in this one
    fork = multiprocessing.get_context("fork")
    left = Left(fork, len(session.items))
    with tempfile.NamedTemporaryFile("r", encoding="ascii") as file:
        second = fork.Process(target=run_in_second, args=(session, left, file.name))
        second.start()
        told = Told(session.config, file)
        try:
            run(session, left, left.first, told.pass_on_now_and_then)
            while second.is_alive():
                second.join(0.1)
                told.pass_on_now_and_then()
        finally:
            left.stop()
            second.join()  # after the test that it is at
        told.pass_on()
    stop_if_told(session)
    if second.exitcode:
        raise session.Interrupted(f"the second process ended with {second.exitcode}")
    return True


class Left:
    """The tests that are left, from low to high - 1; both processes see and change the two."""

    def __init__(self, context, count):
        self.ends = context.Array("i", [0, count])

    def first(self):
        """The number of the next test of the first process, None if there is none."""
        with self.ends.get_lock():
            low, high = self.ends
            if low >= high:
                return None
            self.ends[0] = low + 1
            return low

    def last(self):
        """The number of the next test of the second process, None if there is none."""
        with self.ends.get_lock():
            low, high = self.ends
            if low >= high:
                return None
            self.ends[1] = high - 1
            return high - 1

    def stop(self):
        self.ends[1] = -1

    def is_stopped(self):
        first = multiprocessing.parent_process()  # of the second process
        return self.ends[1] == -1 or (first is not None and not first.is_alive())


def run(session, left, take, after_each):
    """Run tests until none is left. A test has to know the next: what both need stays."""
    number = take()
    while number is not None and not left.is_stopped():
        following = take()
        item = session.items[number]
        nextitem = None if following is None else session.items[following]
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=nextitem)
        after_each()
        if session.shouldfail or session.shouldstop:
            left.stop()
        number = following


def stop_if_told(session):
    """As pytest does after -x or --maxfail."""
    if session.shouldfail:
        raise session.Failed(session.shouldfail)
    if session.shouldstop:
        raise session.Interrupted(session.shouldstop)


# ---- the second process ---------------------------------------------------------------------


def run_in_second(session, left, path):
    plugins = session.config.pluginmanager
    capture = plugins.getplugin("capturemanager")
    capture.stop_global_capturing()  # into files that the first process has, too
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # no terminal
    capture.start_global_capturing()
    capture.suspend_global_capture()
    with open(path, "w", encoding="ascii") as file:
        plugins.register(Teller(session.config, file))
        run(session, left, left.last, file.flush)


class Teller:
    """Writes what the terminal is told: a line for each, the name of a hook and its arguments."""

    def __init__(self, config, file):
        self.config = config
        self.file = file

    def tell(self, hook, **arguments):
        self.file.write(pickle.dumps((hook, arguments)).hex() + "\n")

    def pytest_runtest_logstart(self, nodeid, location):
        self.tell("pytest_runtest_logstart", nodeid=nodeid, location=location)

    def pytest_runtest_logreport(self, report):
        data = self.config.hook.pytest_report_to_serializable(
            config=self.config, report=report
        )
        self.tell("pytest_runtest_logreport", report=data)

    def pytest_runtest_logfinish(self, nodeid, location):
        self.tell("pytest_runtest_logfinish", nodeid=nodeid, location=location)

    def pytest_warning_recorded(self, warning_message, when, nodeid, location):
        if when != "runtest":  # told before the fork
            return
        warning_message.source = None  # any object at all
        self.tell(
            "pytest_warning_recorded",
            warning_message=warning_message,
            when=when,
            nodeid=nodeid,
            location=location,
        )


class Told:
    """Reads in the first process what the second has written, and passes it on."""

    def __init__(self, config, file):
        self.config = config
        self.file = file
        self.rest = ""  # the beginning of a line
        self.last = 0.0

    def pass_on_now_and_then(self):
        """Once a second: so that the terminal does not name another file for each test."""
        if time.time() - self.last > 1:
            self.last = time.time()
            self.pass_on()

    def pass_on(self):
        *lines, self.rest = (self.rest + self.file.read()).split("\n")
        for line in lines:
            name, arguments = pickle.loads(bytes.fromhex(line))
            if "report" in arguments:
                arguments["report"] = self.config.hook.pytest_report_from_serializable(
                    config=self.config, data=arguments["report"]
                )
            hook = getattr(self.config.hook, name)
            hook.call_historic(kwargs=arguments) if hook.is_historic() else hook(**arguments)
