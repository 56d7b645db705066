"""Grade a student's file: python -m pytest -q tests --impl my_solution.py

A pytest plugin, which tests/conftest.py loads. The student's functions take the place of the
project's in the modules, and of the project's tests those are run that grade what the file
defines. The last lines count the tests of each unit. Exit code 0: all pass; 1: some fail; 4: the
file cannot be graded. It takes a minute or two.
"""

import importlib
import importlib.util
from collections import Counter
from pathlib import Path

import pytest

from tests.coursework.units import TEST_FILES, UNITS, all_graded, graders


def pytest_addoption(parser):
    parser.addoption("--impl", help="a student's file, to be graded")


def pytest_configure(config):
    """Put the student's functions into the modules before any test looks at them."""
    path = config.getoption("--impl")
    if not path:
        return
    student = load(path)
    defined = set()
    for name, graded in all_graded().items():
        if hasattr(student, name):
            module = importlib.import_module(graded.module)
            setattr(module, name, getattr(student, name))
            defined.add(name)
    if not defined:
        raise pytest.UsageError(
            f"--impl {path}: defines none of the graded functions; "
            "`python -m tests.coursework.specify NEW_FILE.py` writes them down"
        )
    config.pluginmanager.register(Grading(defined))


def load(path):
    """The student's file as a module. Raises UsageError, which is one line."""
    try:
        spec = importlib.util.spec_from_file_location("student", path)
        student = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(student)
    except Exception as error:
        raise pytest.UsageError(f"--impl {path}: {type(error).__name__}: {error}") from None
    return student


def graded_by(nodeid):
    """(unit, name of the function) that a test grades; (None, "") if none."""
    path, _, test = nodeid.partition("::")
    test = test.split("[")[0]  # without its parameters
    return graders().get((Path(path).name, test), (None, ""))


class Grading:
    """What pytest does otherwise while a student's file is graded."""

    def __init__(self, defined):
        self.defined = defined  # names of the graded functions in the file

    def pytest_ignore_collect(self, collection_path):
        """Only files that grade something are read; None leaves it to pytest."""
        if collection_path.is_file() and collection_path.name not in TEST_FILES.values():
            return True
        return None

    def pytest_collection_modifyitems(self, config, items):
        """Only tests that grade something in the file are run."""
        kept, others = [], []
        for item in items:
            _, name = graded_by(item.nodeid)
            if name in self.defined:
                kept.append(item)
            else:
                others.append(item)
        config.hook.pytest_deselected(items=others)
        items[:] = kept

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item):
        """A failed test also gives the hint of its unit."""
        report = yield
        if report.failed:
            unit, name = graded_by(item.nodeid)
            report.sections.append((f"{name}, unit {unit.title}", f"hint: {unit.hint}"))
        return report

    def pytest_terminal_summary(self, terminalreporter):
        """A line for each unit: how many of its tests pass."""
        counts = Counter()
        for outcome in ("passed", "failed", "error"):
            for report in terminalreporter.stats.get(outcome, []):
                if outcome == "passed" and report.when != "call":
                    continue
                unit, _ = graded_by(report.nodeid)
                if unit:  # a file that could not be read grades nothing
                    counts[unit.title, outcome] += 1
        terminalreporter.section("units: tests passed / total")
        for unit in UNITS:
            passed = counts[unit.title, "passed"]
            total = passed + counts[unit.title, "failed"] + counts[unit.title, "error"]
            line = f"{unit.title:<34}{passed:3d} / {total}"
            names = [graded.name for graded in unit.functions]
            missing = [name for name in names if name not in self.defined]
            if missing:
                line += f"   not in your file: {', '.join(missing)}"
            terminalreporter.write_line(line)
