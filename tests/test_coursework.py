"""The course: right solutions pass, wrong ones are told what and why, bugs can be planted."""

import importlib
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import emprl
from tests.coursework import measure_bugs, plant, specify
from tests.coursework.units import TEST_FILES, UNITS, all_graded, graders
from tests.coursework.wrong import WRONG

TESTS = Path(__file__).parent
COURSE = TESTS / "coursework"


def run_module(*words):
    """python -m ... from the project's folder. Returns the exit code and all output."""
    done = subprocess.run(
        [sys.executable, "-m", *map(str, words)],
        cwd=plant.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )
    return done.returncode, done.stdout


def grade(path, text):
    """The exit code and the output of grading a file with this text."""
    path.write_text(text, encoding="utf-8")
    return run_module("pytest", "-q", "-p", "no:cacheprovider", "tests", "--impl", path)


def parameters(test):
    """The values that a test is parametrized with; [()] if it is not."""
    for mark in getattr(test, "pytestmark", []):
        if mark.name == "parametrize":
            return [(value,) for value in mark.args[1]]
    return [()]


def all_pass(file, names):
    """Call test functions as pytest would, with all their parameters. Does none fail?"""
    module = importlib.import_module(Path(file).stem)
    for name in names:
        test = getattr(module, name)
        for values in parameters(test):
            try:
                test(*values)
            except KeyboardInterrupt:
                raise
            except BaseException:  # pytest.fail is no Exception
                return False
    return True


def remade(module, source, filename):
    """What a module would hold if this source were executed in it."""
    namespace = dict(vars(module))
    exec(compile(source, filename, "exec"), namespace)
    return namespace


# ---- the grader


@pytest.mark.parametrize("name", WRONG)
def test_wrong_solutions_are_caught(name, monkeypatch):
    graded = all_graded()[name]
    module = importlib.import_module(graded.module)
    tests = TEST_FILES[graded.module]
    source = inspect.getsource(getattr(module, name))
    assert all_pass(tests, graded.tests), "the project's own function passes"
    assert len(WRONG[name]) >= 3
    for right, wrong in WRONG[name]:
        assert right in source, f"{name} has no {right!r}: correct wrong.py"
        mutant = remade(module, source.replace(right, wrong, 1), name)
        monkeypatch.setattr(module, name, mutant[name])
        caught = not all_pass(tests, graded.tests)
        monkeypatch.undo()
        assert caught, f"{wrong!r} instead of {right!r} is not caught"


def test_every_function_has_wrong_solutions():
    assert set(WRONG) == set(all_graded())


def test_units_are_whole():
    """Every grading test is there, every file grades something, hours are whole."""
    assert len(UNITS) == 5
    assert len(all_graded()) == sum(len(unit.functions) for unit in UNITS) >= 14
    for unit in UNITS:
        assert unit.hours == round(unit.hours), unit.title
    for file, test in graders():
        text = (TESTS / file).read_text(encoding="utf-8")
        assert f"def {test}(" in text, f"{file} has no {test}"
    assert {file for file, _ in graders()} == set(TEST_FILES.values())


def test_the_students_page_has_these_units_and_functions():
    page = (COURSE / "README.md").read_text(encoding="utf-8")
    for unit in UNITS:
        names = ", ".join(f"`{graded.name}`" for graded in unit.functions)
        assert f"| {unit.title} | {names} | {unit.hours:g} hours |" in page


def test_specification_is_python_with_nothing_solved(tmp_path):
    specify.write(tmp_path / "mine.py")
    text = (tmp_path / "mine.py").read_text(encoding="utf-8")
    compile(text, "mine.py", "exec")
    count = len(all_graded())
    assert text.count(" minutes. Example: ") == count
    assert text.count("#     gives ") == count
    assert text.count("raise NotImplementedError\n") >= count
    assert "error =" not in text


def test_a_students_work_is_not_written_over(tmp_path):
    (tmp_path / "mine.py").write_text("work\n", encoding="utf-8")
    code, output = run_module("tests.coursework.specify", tmp_path / "mine.py")
    assert code == 2
    assert output.count("\n") == 1
    assert (tmp_path / "mine.py").read_text(encoding="utf-8") == "work\n"


def test_a_solution_is_graded_by_unit(tmp_path):
    """A right gae, a whiten that forgets the mask, a mean_pool that is not written yet."""
    code, output = grade(
        tmp_path / "mine.py",
        "from ppo import gae\n"
        "def whiten(x, mask, shift_mean=True):\n    return (x - x.mean()) / x.std()\n"
        "def mean_pool(x, mask):\n    raise NotImplementedError\n",
    )
    assert code == 1
    for words in (
        "4 from a reward to advantages       2 / 3",
        "3 identifiers, reward, metrics      0 / 1",
        "not in your file: token_log_probs",
        "expected",
        "got",
        "hint: Take the log-probs under the distribution that was sampled from",
    ):
        assert words in output, output


@pytest.mark.parametrize(
    "text, words",
    [("def gae(:\n", "SyntaxError"), ("x = 1\n", "defines none of the graded functions")],
)
def test_a_file_that_can_not_be_graded_is_one_line(text, words, tmp_path):
    code, output = grade(tmp_path / "mine.py", text)
    assert code == 4
    assert words in output
    assert "Traceback" not in output


def test_an_empty_specification_fails_everything_that_is_graded(tmp_path):
    specify.write(tmp_path / "source.py")
    text = (tmp_path / "source.py").read_text(encoding="utf-8")
    code, output = grade(tmp_path / "mine.py", text)
    assert code == 1
    assert " passed" not in output.splitlines()[-1], output
    assert output.count("FAILED") >= len(graders())


# ---- silent bugs


def teachers_tests(number):
    """The test file and the names of the tests that teacher.md names for a bug."""
    page = (COURSE / "teacher.md").read_text(encoding="utf-8")
    row = re.search(rf"^\| {number} \| .*$", page, re.MULTILINE)[0]
    file = re.search(r"`(test_\w+\.py)::", row)[1]
    return file, re.findall(r"(test_\w+)`", row)


def put_in(monkeypatch, module, namespace):
    """The namespace's functions and classes take the place of the module's, for all users."""
    for name, value in namespace.items():
        if not callable(value) or getattr(value, "__module__", "") != module.__name__:
            continue
        original = getattr(module, name)
        for user in list(sys.modules.values()):
            if getattr(user, "__dict__", {}).get(name) is original:
                monkeypatch.setattr(user, name, value)


@pytest.mark.parametrize("number", plant.BUGS)
def test_the_tests_that_the_teacher_names_catch_the_bug(number, monkeypatch):
    """The program made anew passes them, with the bug it passes none."""
    name, buggy = plant.with_bug(number)
    file, tests = teachers_tests(number)
    assert tests
    module = importlib.import_module(Path(name).stem)
    importlib.import_module(Path(file).stem)  # before its names are replaced
    right = (plant.ROOT / name).read_text(encoding="utf-8")
    for source, expected in ((right, True), (buggy, False)):
        put_in(monkeypatch, module, remade(module, source, name))
        for test in tests:
            assert all_pass(file, [test]) == expected, f"bug {number}: {test}"
        monkeypatch.undo()


def test_a_planted_copy_has_one_change_and_nothing_that_tells(tmp_path):
    code, output = run_module("tests.coursework.plant", 5, tmp_path / "copy")
    assert code == 0
    assert "start with: cd " in output
    changed = []
    for path in (tmp_path / "copy").glob("**/*"):
        original = plant.ROOT / path.relative_to(tmp_path / "copy")
        if path.is_file() and path.read_bytes() != original.read_bytes():
            changed.append(path.name)
    assert changed == ["ppo.py"]
    assert not [*(tmp_path / "copy").glob("**/test_*")]
    course = tmp_path / "copy" / "tests" / "coursework"
    assert {path.name for path in course.glob("*")} <= {plant.PICTURES.name}


IMPORT_ALL = """
import importlib, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        print(error.name)
"""


def test_a_planted_copy_is_complete(tmp_path):
    """The modules and the scripts of the lab need nothing of the project that is not there."""
    plant.plant(3, tmp_path / "copy")
    lab = (tmp_path / "copy" / "tests" / "lab").glob("*.py")
    scripts = [f"tests.lab.{path.stem}" for path in lab]
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, "emprl", *scripts],
        cwd=tmp_path / "copy",
        stdout=subprocess.PIPE,
        check=True,
        encoding="utf-8",
    )
    for missing in done.stdout.split():  # packages that only the lab's users have
        assert not missing.startswith("tests"), missing
        assert not (plant.ROOT / f"{missing}.py").exists(), missing


def test_planting_over_a_folder_is_refused_in_one_line(tmp_path):
    code, output = run_module("tests.coursework.plant", 5, tmp_path)
    assert code == 2
    assert output.count("\n") == 1


@pytest.mark.parametrize("bug", [5, 8])
def test_the_teachers_curves_can_be_measured(bug, finished):
    """The printed command in a copy, from a finished run; bug 8 trains everything anew."""
    found = measure_bugs.train_with(bug, finished, ["ppo.steps=2"])
    assert len(found["ppo"]) == 2
    for record in found["ppo"]:
        assert set(record) == set(measure_bugs.PANELS)
    assert set(found["mle"]) == set(found["emprl"]) == set(measure_bugs.FIGURES)


def test_the_teachers_curves_are_of_the_printed_command():
    """Both pages for students name it as plant.py prints it, and it can be parsed."""
    command = plant.training_command()
    assert command == "python emprl.py --set " + " ".join(plant.SETTINGS)
    emprl.make_config("toy", settings=plant.SETTINGS)
    for page in ("README.md", "teacher.md"):
        assert command in (COURSE / page).read_text(encoding="utf-8")


def test_what_is_no_finished_run_is_not_measured(tmp_path):
    code, output = run_module("tests.coursework.measure_bugs", tmp_path)
    assert code == 2
    assert output.count("\n") == 1


def test_the_teachers_curves_are_drawn(tmp_path):
    figures = json.loads((COURSE / "bugs.json").read_text(encoding="utf-8"))
    few = {name: figures[name] for name in ("0/0", "3/0")}
    measure_bugs.draw(few, tmp_path / "bugs.png")
    assert (tmp_path / "bugs.png").read_bytes().startswith(b"\x89PNG")


def test_the_teachers_table_is_that_of_the_curves():
    figures = json.loads((COURSE / "bugs.json").read_text(encoding="utf-8"))
    page = (COURSE / "teacher.md").read_text(encoding="utf-8")
    for line in measure_bugs.table(figures).splitlines():
        assert line.removesuffix(" |") in page
