"""The grader: what it grades exists, a right solution passes, a wrong one is told what and why."""

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import plant_bug
import specify
from units import FILES, UNITS, graders
from wrong import WRONG

TESTS = Path(__file__).parent


def grade(path, text):
    path.write_text(text, encoding="utf-8")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            str(TESTS),
            "--impl",
            str(path),
        ],
        capture_output=True,
        text=True,
        cwd=path.parent,
        encoding="utf-8",
    )
    return done.returncode, done.stdout + done.stderr


def graders_pass(file, tests):
    """Call test functions as pytest would, with all their parameters; True if none fails."""
    module = importlib.import_module(Path(file).stem)
    for test in (getattr(module, name) for name in tests):
        marks = [m.args for m in getattr(test, "pytestmark", []) if m.name == "parametrize"]
        for values in marks[0][1] if marks else [()]:
            try:
                test(*((values,) if marks else ()))
            except BaseException as error:  # pytest.fail is no Exception
                if isinstance(error, KeyboardInterrupt):
                    raise
                return False
    return True


@pytest.mark.parametrize("name", WRONG)
def test_wrong_solutions_are_caught(name, monkeypatch):
    graded = next(functions[name] for _, _, functions in UNITS.values() if name in functions)
    module = importlib.import_module(graded.module)
    source = inspect.getsource(getattr(module, name))
    assert graders_pass(FILES[graded.module], graded.tests), (
        "the project's own function passes"
    )
    assert len(WRONG[name]) >= 3
    for right, wrong in WRONG[name]:
        assert source.count(right) >= 1, f"{name} has no {right!r}: correct wrong.py"
        mutant = dict(vars(module))
        exec(compile(source.replace(right, wrong, 1), name, "exec"), mutant)
        monkeypatch.setattr(module, name, mutant[name])
        assert not graders_pass(FILES[graded.module], graded.tests), (
            f"{wrong!r} instead of {right!r} is not caught"
        )
        monkeypatch.undo()


def test_every_function_has_wrong_solutions():
    assert set(WRONG) == {name for _, _, functions in UNITS.values() for name in functions}


def test_units_are_whole():
    assert len(UNITS) == 5 and sum(len(functions) for _, _, functions in UNITS.values()) >= 14
    for unit, (effort, _, functions) in UNITS.items():
        assert (
            effort == f"{sum(graded.minutes for graded in functions.values()) // 60} hours"
        ), unit
    for file, test in graders():
        assert f"def {test}(" in (TESTS / file).read_text(encoding="utf-8"), (
            f"{file} has no {test}"
        )
    assert {g.module for _, _, functions in UNITS.values() for g in functions.values()} == set(
        FILES
    )


def test_specification_is_python_with_nothing_solved(tmp_path):
    specify.write(tmp_path / "mine.py")
    text = (tmp_path / "mine.py").read_text(encoding="utf-8")
    compile(text, "mine.py", "exec")
    names = [name for _, _, functions in UNITS.values() for name in functions]
    assert text.count(" minutes. Example: ") == text.count("#     gives ") == len(names)
    assert text.count("raise NotImplementedError\n") >= len(names) and "error =" not in text
    again = subprocess.run(
        [sys.executable, specify.__file__, str(tmp_path / "mine.py")], capture_output=True
    )
    assert (
        again.returncode == 1 and (tmp_path / "mine.py").read_text(encoding="utf-8") == text
    ), "a student's work is not written over"


def test_a_solution_is_graded_by_unit(tmp_path):
    """A right gae, a whiten that forgets the mask, a masked_mean not yet written; everything else is not in the file."""
    code, output = grade(
        tmp_path / "mine.py",
        "import torch\nfrom ppo import gae\n"
        "def whiten(x, mask, shift_mean=True):\n    return (x - x.mean()) / x.std()\n"
        "def masked_mean(x, mask):\n    raise NotImplementedError\n",
    )
    assert code == 1 and "4 from a score to advantages        2 / 3" in output, output
    assert (
        "3 identifiers, reward, metrics      0 / 1" in output
        and "not in your file: token_log_probs" in output
    )
    assert (
        "expected" in output
        and "got" in output
        and "hint: Score the distribution that was sampled from" in output
    )


@pytest.mark.parametrize(
    "text, words",
    [("def gae(:\n", "SyntaxError"), ("x = 1\n", "defines none of the graded functions")],
)
def test_a_file_that_can_not_be_graded_is_one_line(text, words, tmp_path):
    code, output = grade(tmp_path / "mine.py", text)
    assert code == 4 and words in output and "Traceback" not in output


@pytest.mark.parametrize("number", plant_bug.BUGS)
def test_a_bug_has_its_place_and_the_copy_is_python(number):
    file, right, wrong = plant_bug.BUGS[number]
    text = (plant_bug.ROOT / file).read_text(encoding="utf-8")
    assert text.count(right) == 1 and right != wrong
    compile(text.replace(right, wrong), file, "exec")


@pytest.mark.parametrize("number", plant_bug.BUGS)
def test_the_test_that_the_teacher_names_catches_the_bug(number, monkeypatch):
    """The mutant's functions take the place of the module's: with the bug every named test fails, without it none."""
    file, right, wrong = plant_bug.BUGS[number]
    row = next(
        line
        for line in (TESTS / "coursework" / "teacher.md")
        .read_text(encoding="utf-8")
        .splitlines()
        if line.startswith(f"| {number} |")
    )
    module, named, test_file = (
        importlib.import_module(file[:-3]),
        re.findall(r"(test_\w+)`", row),
        re.search(r"`(test_\w+\.py)::", row)[1],
    )
    assert named
    for instead in (
        right,
        wrong,
    ):  # the same program, made anew, passes: it is the bug that is caught
        mutant = dict(vars(module))
        exec(
            compile(
                (plant_bug.ROOT / file).read_text(encoding="utf-8").replace(right, instead),
                file,
                "exec",
            ),
            mutant,
        )
        for name, value in mutant.items():
            if getattr(value, "__module__", "") == module.__name__ and callable(value):
                for user in (module, importlib.import_module(test_file[:-3])):
                    if hasattr(user, name):
                        monkeypatch.setattr(user, name, value)
        for test in named:
            assert graders_pass(test_file, [test]) == (instead == right), (
                f"bug {number}: {test}"
            )
        monkeypatch.undo()


def test_planting_copies_the_project_with_one_change(tmp_path):
    plant_bug.plant(5, tmp_path / "copy")
    changed = [
        name
        for name in ("data.py", "emprl.py", "identifiers.py", "ppo.py", "t5_small.py")
        if (tmp_path / "copy" / name).read_text(encoding="utf-8")
        != (plant_bug.ROOT / name).read_text(encoding="utf-8")
    ]
    assert changed == ["ppo.py"] and not [*(tmp_path / "copy").glob("tests/**/test_*")], (
        "the tests would tell"
    )


def test_an_empty_specification_fails_everything_that_is_graded(tmp_path):
    specify.write(tmp_path / "source.py")
    code, output = grade(
        tmp_path / "mine.py", (tmp_path / "source.py").read_text(encoding="utf-8")
    )
    assert code == 1 and " passed" not in output.splitlines()[-2] + output.splitlines()[-1], (
        output
    )
    assert output.count("FAILED") >= len(graders())
