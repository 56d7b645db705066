"""What all tests share: one thread, and a comparison that says what was expected and what came."""

import contextlib
import functools
import os
import shutil
import sys
from collections import Counter

import pytest
import torch

pytest_plugins = [
    "tests.coursework.grade",  # the option --impl, which grades a student's file
    "tests.two",  # two processes share the tests
]

# The tests' models are too small for more, which on a busy machine is far slower.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for processes that tests start: figures depend on it


def check(what, got, expected, tol=1e-5):
    """got is expected (numbers, lists or tensors) to tol; a failure says what both were."""
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
        expected, got = rounded(expected, got)
        pytest.fail(f"{what}\n  expected {expected}\n  got      {got}", pytrace=False)


def rounded(expected, got):
    """Both as lists of numbers of 4 digits, or of as many as it takes to tell them apart."""
    for digits in (4, 6, 9, 17):
        lists = [shortened(x.tolist(), digits) for x in (expected, got)]
        if lists[0] != lists[1]:
            break
    return lists


def shortened(x, digits):
    """A number, or a list of lists of them, with so many digits."""
    if isinstance(x, list):
        return [shortened(part, digits) for part in x]
    number = float(f"{x:.{digits}g}")
    return int(number) if number.is_integer() and abs(number) < 1e6 else number


@pytest.fixture(scope="session", autouse=True)
def speed_is_measured_once():
    """Every run says how fast the machine is; measuring it is a tenth of a small run."""
    import emprl  # here: a student's file is put into the modules before

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emprl, "gflops", functools.cache(emprl.gflops))
        yield


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of a finished smoke run; nobody writes into it. What it printed lies beside it."""
    import emprl

    folder = tmp_path_factory.mktemp("finished") / "run"
    with open(folder.with_suffix(".txt"), "w", encoding="utf-8") as file:
        with contextlib.redirect_stdout(file):
            code = emprl.main(["--preset", "smoke", "--run", str(folder)])
    assert code == 0
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of it, to write into."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def no_pictures(monkeypatch):
    """They take longer than all the rest of a small run."""
    import emprl

    monkeypatch.setattr(emprl, "draw_plots", lambda *_: {})


@pytest.fixture(scope="module")
def few_imports():
    """Workers of the grader and runs of a copy are forks, which have imported torch already."""
    with pytest.MonkeyPatch.context() as patch:
        if hasattr(os, "fork"):  # Windows has none
            from tests import forks
            from tests.coursework import grade, measure_bugs, secret

            patch.setattr(grade, "start_worker", forks.start_worker)
            for module in (measure_bugs, secret):
                patch.setattr(module, "run_without_pictures", forks.run_without_pictures)
        yield


@pytest.fixture
def refusal(capsys):
    """refusal(words): the one line that a command ends with, which must be bad input (exit 2)."""
    import emprl

    def refused(words):
        assert emprl.main(list(map(str, words))) == 2
        line = capsys.readouterr().err
        assert line.startswith("emprl.py: ") and line.count("\n") == 1, line
        return line

    return refused


@pytest.fixture
def call(monkeypatch, capsys):
    """call(script, word, ...) -> exit code and output, as `python -m` of it, in this process."""

    def start(script, *words):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, words)])
        try:
            code = script.main() or 0
        except SystemExit as ended:
            code = ended.code
        told = capsys.readouterr()
        return code, told.out + told.err

    return start


# ---- few cases by default, many with --thorough


def pytest_addoption(parser):
    parser.addoption(
        "--thorough", action="store_true", help="kills, faults and odd input in large numbers"
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "only_thorough: left out without --thorough")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--thorough"):
        left_out = [item for item in items if item.get_closest_marker("only_thorough")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    # Last, where the second process begins (see two.py), and not where the two meet: there both
    # make the fixtures of a file, and these take 10 seconds.
    items.sort(key=lambda item: item.path.name == "test_marking.py")


def pytest_terminal_summary(terminalreporter, config):
    """What was tried, and how often, in a thorough run."""
    if not config.getoption("--thorough"):
        return
    total = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", "") == "teardown":
                total.update(dict(report.user_properties))
    terminalreporter.section("tried")
    for what, count in sorted(total.items()):
        terminalreporter.write_line(f"{count:>6}  {what}")


@pytest.fixture(scope="session")
def thorough(request):
    """Large numbers are wanted."""
    return request.config.getoption("--thorough")


@pytest.fixture
def counts(record_property):
    """What a test has tried -> how often; it goes into the test's report."""
    counts = Counter()
    yield counts
    for what, count in counts.items():
        record_property(what, count)
