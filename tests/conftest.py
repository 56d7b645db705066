"""What all tests share: the modules' folder on the path, one thread, and one comparison that explains itself.

With --impl FILE the tests grade a student's functions (see coursework/): only the tests of what FILE defines are run.
"""

import importlib
import importlib.util
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

sys.path[:0] = [
    str(Path(__file__).resolve().parent.parent),
    str(Path(__file__).resolve().parent / "coursework"),
]
from units import FILES, UNITS, graders

torch.set_num_threads(
    1
)  # the tests' models are too small for more, which on a busy machine is far slower


def check(what, got, expected, tol=1e-5):
    """got is expected (numbers, lists or tensors) to tol; otherwise fails saying what was expected and got."""
    got, expected = (
        x.detach() if torch.is_tensor(x) else torch.tensor(x) for x in (got, expected)
    )
    if got.shape != expected.shape:
        pytest.fail(
            f"{what}\n  expected shape {tuple(expected.shape)}\n  got      {tuple(got.shape)}",
            pytrace=False,
        )
    got, expected = got.double(), expected.double()
    wrong = ~torch.isclose(got, expected, rtol=tol, atol=tol)
    if wrong.any() and got.numel() > 100:  # too many to read: only those that differ
        what, got, expected = (
            f"{what} ({wrong.sum()} of {wrong.numel()} differ)",
            got[wrong][:20],
            expected[wrong][:20],
        )
    if wrong.any():
        pytest.fail(
            f"{what}\n  expected {expected.tolist()}\n  got      {got.tolist()}", pytrace=False
        )


# ---- grading a student's file


def pytest_addoption(parser):
    parser.addoption(
        "--impl", help="a student's file: its functions take the place of the project's"
    )


def pytest_configure(config):
    """Put the student's functions into the modules before any test looks at them."""
    config.defined, path = set(), config.getoption("--impl")
    if not path:
        return
    try:
        spec = importlib.util.spec_from_file_location("student", path)
        student = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(student)
    except Exception as error:
        raise pytest.UsageError(f"--impl {path}: {type(error).__name__}: {error}") from None
    for _, _, functions in UNITS.values():
        for name, graded in functions.items():
            if hasattr(student, name):
                setattr(importlib.import_module(graded.module), name, getattr(student, name))
                config.defined.add(name)
    if not config.defined:
        raise pytest.UsageError(
            f"--impl {path}: defines none of the graded functions; see tests/coursework/specify.py"
        )


def pytest_ignore_collect(collection_path, config):
    """Only the files that grade something; None leaves the decision to pytest."""
    if (
        config.getoption("--impl")
        and collection_path.is_file()
        and collection_path.name not in FILES.values()
    ):
        return True


def graded_by(item_or_nodeid):
    """(unit, function) that a test grades, or None."""
    file, _, test = getattr(item_or_nodeid, "nodeid", item_or_nodeid).partition("::")
    return graders().get((Path(file).name, test.split("[")[0]))


def pytest_collection_modifyitems(config, items):
    if config.getoption("--impl"):
        kept = [item for item in items if (graded_by(item) or ("", ""))[1] in config.defined]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed and item.config.getoption("--impl"):
        unit, name = graded_by(item)
        report.sections.append((f"{name}, unit {unit}", "hint: " + UNITS[unit][1]))
    return report


def pytest_terminal_summary(terminalreporter, config):
    if not config.getoption("--impl"):
        return
    counts = Counter(
        (graded_by(r.nodeid)[0], kind)
        for kind in ("passed", "failed", "error")
        for r in terminalreporter.stats.get(kind, [])
        if kind != "passed" or r.when == "call"
    )
    terminalreporter.section("units: tests passed / total")
    for unit, (_, _, functions) in UNITS.items():
        passed, total = (
            counts[unit, "passed"],
            sum(counts[unit, kind] for kind in ("passed", "failed", "error")),
        )
        missing = [name for name in functions if name not in config.defined]
        terminalreporter.write_line(
            f"{unit:<34}{passed:3d} / {total}"
            + (f"   not in your file: {', '.join(missing)}" if missing else "")
        )
