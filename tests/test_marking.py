"""Marks: secret bugs in a copy that says the same in other words, and folders of submissions."""

import ast
import csv
import importlib
import json
import re
import sys
import types
from pathlib import Path

import pytest

from tests.coursework import kinds, mark, plant, restyle, secret, submissions
from tests.coursework.units import TEST_FILES, all_graded
from tests.test_coursework import all_pass, put_in

pytestmark = pytest.mark.usefixtures("few_imports")
SECRET = "nobody knows this"
NAME = "jan"  # for whom the first bug drawn is kept; for "anna" it is a later one


@pytest.fixture(scope="module")
def program():
    """module file -> (tree, text)."""
    return secret.trees()


@pytest.fixture(scope="module")
def copy(program):
    """module file -> the text of a copy in other words: NAME's, without a bug."""
    key = f"{SECRET}/{NAME}"
    return {name: restyle.restyled(*both, key, name) for name, both in program.items()}


@pytest.fixture(scope="module")
def figures_of_copy(copy):
    return secret.short_run(copy)


# ---- the same in other words


def test_other_words_do_the_same(figures_of_copy, finished):
    """A run of the copy leaves the very figures of the project's own run."""
    assert figures_of_copy == secret.figures_of(finished)


def code_lines(text):
    """Lines with something on them, without indentation."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def test_other_words_are_other_words(copy, program):
    """So much differs in each module that one change more is not seen."""
    for name, (tree, text) in program.items():
        known = set(code_lines(text))
        again = restyle.restyled(tree, text, "another secret", name)
        for written in (copy[name], again):
            new = [line for line in code_lines(written) if line not in known]
            assert len(new) > 150, name
            assert not re.search(r"^\s*# ", written, re.MULTILINE) or name == "data.py"
        assert copy[name] != again


def test_structure_differs_as_well_as_names(copy, program):
    """Without names and order most functions still differ: renaming back is not enough."""

    def shapes(text):
        found = {}
        for name, node in kinds.functions(ast.parse(text)).items():
            types_of = [type(part).__name__ for part in ast.walk(node)]
            found[name] = sorted(types_of)
        return found

    differ, total = 0, 0
    for name in ("ppo.py", "identifiers.py", "t5_small.py"):
        ours, theirs = shapes(copy[name]), shapes(program[name][1])
        assert ours.keys() == theirs.keys()
        differ += sum(ours[function] != theirs[function] for function in ours)
        total += len(ours)
    assert differ > 0.5 * total


def test_public_names_and_parameters_stay(copy, program):
    for name, (tree, _) in program.items():
        ours = kinds.functions(ast.parse(copy[name]))
        for function, node in kinds.functions(tree).items():
            assert ast.dump(ours[function].args) == ast.dump(node.args), function


def test_lines_that_are_too_long_are_broken_without_changing_them():
    line = (
        "    found = call(" + ", ".join(f"argument_{i}('(,', x[{i}])" for i in range(9)) + ")"
    )
    lines = restyle.broken(line)
    assert len(lines) > 3
    assert max(map(len, lines)) <= restyle.WIDTH
    one, other = ("\n".join(text).strip() for text in (lines, [line]))
    assert ast.dump(ast.parse(one)) == ast.dump(ast.parse(other))


# ---- kinds of bugs


def test_there_are_many_kinds_and_places(program):
    places = {}
    for name, functions in kinds.PLACES.items():
        tree = program[name][0]
        names = functions.split()
        missing = set(names) - kinds.functions(tree).keys()
        assert not missing, f"{name} has no {missing}: correct kinds.py"
        assert not secret.graded_functions(tree, all_graded()) & set(names), "the grader tells"
        for change in kinds.all_changes(tree, names):
            place = name, change.function, change.place
            places.setdefault(change.kind, set()).add(place)
    several = [kind for kind, found in places.items() if len(found) >= 3]
    assert len(several) >= 16
    assert set(several) <= kinds.KINDS.keys()


def test_every_kind_is_caught_by_the_grader_somewhere(program, monkeypatch):
    """Among the graded functions each kind has a place that the tests notice, or nearly each."""
    rare = {"order", "arguments", "left out"}
    caught = set(rare)
    for name, graded in all_graded().items():
        if graded.methods:
            continue
        tree, _ = program[f"{graded.module}.py"]
        module = importlib.import_module(graded.module)
        for change in kinds.changes(kinds.functions(tree)[name], name):
            if change.kind in caught:
                continue
            changed = kinds.functions(kinds.apply(tree, change))[name]
            if is_caught(changed, module, graded, monkeypatch):
                caught.add(change.kind)
    assert caught == kinds.KINDS.keys()


def is_caught(function, module, graded, monkeypatch):
    """Do the function's tests fail if this takes its place? One that never ends is left out."""
    if any(isinstance(node, ast.While) for node in ast.walk(function)):
        return False
    namespace = dict(vars(module))
    wrapped = ast.Module([function], [])
    exec(compile(ast.fix_missing_locations(wrapped), "changed", "exec"), namespace)
    put_in(monkeypatch, module, {graded.name: namespace[graded.name]})
    caught = not all_pass(TEST_FILES[graded.module], graded.tests)
    monkeypatch.undo()
    return caught


def test_a_change_changes_one_place(program):
    """Of two functions by themselves, which is quicker; a few changes in the whole module."""
    tree, text = program["ppo.py"]
    names = ["gae", "policy_loss"]
    changes = kinds.all_changes(tree, names)
    assert len(changes) > 30
    alone = ast.Module([kinds.functions(tree)[name] for name in names], [])
    for where, some in ((alone, changes), (tree, changes[::20])):
        before = ast.unparse(where)
        for change in some:
            after = ast.unparse(kinds.apply(where, change))
            known = set(after.splitlines())
            lines = [line for line in before.splitlines() if line not in known]
            assert len(lines) <= 3, change
            assert before != after
    assert ast.unparse(tree) == ast.unparse(ast.parse(text)), "the tree itself stays"


# ---- secret bugs


@pytest.mark.parametrize("name", [NAME, pytest.param("anna", marks=pytest.mark.only_thorough)])
def test_a_bug_that_runs_and_moves_a_figure_is_found(
    name, copy, figures_of_copy, tmp_path, call, monkeypatch
):
    """The whole command: the copy runs, has nothing that tells, and the answer is repeated.

    The copy without a bug is not run a second time.
    """
    short_run = secret.short_run

    def run_what_is_new(modules):
        return figures_of_copy if modules == copy else short_run(modules)

    monkeypatch.setattr(secret, "short_run", run_what_is_new)
    code, output = call(secret, SECRET, name, tmp_path / "copy")
    assert code == 0, output
    assert plant.training_command() in output
    answer = output[output.index("bug:") :]
    assert "effect: figures of a short run" in answer
    file = re.search(r"where:\s+(\w+\.py)", answer)[1]
    planted = (tmp_path / "copy" / file).read_text(encoding="utf-8")
    added = re.findall(r"^\s+\+(.+)$", answer, re.MULTILINE)
    removed = re.findall(r"^\s+-(.+)$", answer, re.MULTILINE)
    lines = planted.splitlines()
    assert added or removed
    assert all(line in lines for line in added)
    assert not list((tmp_path / "copy").glob("**/test_*"))
    assert not (tmp_path / "copy" / "tests" / "coursework" / "kinds.py").exists()
    everything = [
        path.read_text(encoding="utf-8") for path in (tmp_path / "copy").rglob("*.py")
    ]
    assert not any(SECRET in text for text in everything)


def test_the_same_secret_draws_the_same_and_names_draw_others(program, call, monkeypatch):
    """By the command's own key. So does another secret."""
    tree, _ = program["ppo.py"]
    changes = kinds.all_changes(tree, kinds.PLACES["ppo.py"].split())
    keys = []

    def bug_in_program(key):
        keys.append(key)
        return types.SimpleNamespace(answer=lambda: ""), {}

    monkeypatch.setattr(secret, "bug_in_program", bug_in_program)

    def drawn(name, words=SECRET):
        assert call(secret, words, name, "--answer")[0] == 0
        return [change.key() for change in secret.in_turn(changes, *keys[-1])]

    firsts = {drawn(name)[0] for name in "abcdefghijkl"}
    assert drawn("anna") == drawn("anna")
    assert len(firsts) > 8
    assert len({kind for kind, *_ in firsts}) > 5
    secrets = [f"secret number {i}" for i in range(12)]
    assert len({drawn("anna", words)[0] for words in secrets}) > 8


def test_figures_that_move_are_told():
    before = {"ppo kl": 1.0, "ppo reward": 0.2, "mle loss": 1.0}
    after = {"ppo kl": 1.2, "ppo reward": 0.2001, "mle loss": 1.0}
    assert [name for _, name, _, _ in secret.moved(before, after)] == ["ppo kl"]
    assert secret.is_silent(after)
    assert not secret.is_silent({})
    assert not secret.is_silent({"ppo kl": float("nan")})
    assert not secret.is_silent({"ppo kl": 1.0, "ppo reward": -3.0})


def test_a_bug_is_planted_into_a_students_own_solution(tmp_path, call):
    mine = tmp_path / "mine.py"
    mine.write_text(submissions.solved(["gae", "whiten"], rest=False), encoding="utf-8")
    code, output = call(secret, SECRET, NAME, tmp_path / "planted.py", "--solution", mine)
    assert code == 0, output
    assert re.search(r"the grader says that (gae|whiten) is wrong", output)
    graded = secret.how(tmp_path / "planted.py", ["gae", "whiten"])
    assert sorted(graded.values()) == ["failed", "passed"]
    first = mine.read_text(encoding="utf-8").splitlines()
    planted = (tmp_path / "planted.py").read_text(encoding="utf-8").splitlines()
    assert sum(line not in first for line in planted) > 5


@pytest.mark.parametrize(
    "words, told",
    [
        (["short", "anna", "copy"], "12 characters"),
        ([SECRET, "anna"], "COPY is missing"),
        ([SECRET, "anna", "."], "exists"),
        ([SECRET, "anna", "new.py", "--solution", "absent.py"], "no such file"),
    ],
)
def test_what_cannot_be_planted_is_told_in_one_line(words, told, call):
    code, output = call(secret, *words)
    assert code == 2
    assert told in output
    assert output.count("\n") == 1


# ---- folders of submissions


def marked(folder, table, *options):
    """(header, rows) of what mark.py writes about the submissions in a folder."""
    with pytest.MonkeyPatch.context() as patch:
        words = ["mark", folder, table, *options]
        patch.setattr(sys, "argv", [str(word) for word in words])
        assert not mark.main()
    with open(table, newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    return header, rows


@pytest.fixture(scope="module")
def marks(tmp_path_factory):
    """name -> row, of a few made-up submissions and of files that are none.

    Those that take all the time or memory that they get are marked by themselves, with little.
    """
    folder = tmp_path_factory.mktemp("marking")
    submissions.make(folder / "greedy", ["endless loop", "memory in pieces"])
    names = ["one function", "one mistake", "syntax error", "kills"]
    submissions.make(folder / "in", [*names, "=1+1 only a comment"])
    (folder / "in" / "notes.txt").write_text("no program", encoding="utf-8")
    (folder / "in" / "two").mkdir()
    (folder / "in" / "two" / "a.py").write_text("", encoding="utf-8")
    (folder / "in" / "two" / "b.py").write_text("", encoding="utf-8")
    little = ["--limit", "4", "--memory", "1024"]
    _, greedy = marked(folder / "greedy", folder / "greedy.csv", *little)
    header, rows = marked(folder / "in", folder / "marks.csv", "--results", folder / "json")
    assert header[0] == "name" and len(greedy) == 2 and len(rows) == 7
    return types.SimpleNamespace(
        rows={row[0]: dict(zip(header, row)) for row in [*greedy, *rows]},
        folder=folder,
        header=header,
    )


def test_submissions_get_their_points(marks):
    points = {name: int(row[marks.header[1]]) for name, row in marks.rows.items()}
    kl, most = all_graded()["kl_estimate"].points, sum(g.points for g in all_graded().values())
    assert points["one function"] == all_graded()["response_mask"].points
    assert points["one mistake"] == most - all_graded()["class_weights"].points
    assert points["memory in pieces"] == points["endless loop"] == kl
    for name in ("syntax error", "kills", "notes", "two", "'=1+1 only a comment"):
        assert points[name] == 0, name
    for row in marks.rows.values():
        units = [int(row[column]) for column in marks.header[2:8]]
        assert sum(units) == int(row[marks.header[1]])


def test_the_note_says_why(marks):
    notes = {name: row["note"] for name, row in marks.rows.items()}
    assert "endless loop?" in notes["endless loop"]
    assert "import of os" in notes["kills"]
    assert "SyntaxError" in notes["syntax error"]
    assert notes["notes"] == "notes.txt: not a .py file"
    assert notes["two"] == "2 .py files; one is wanted"
    assert notes["one mistake"].startswith("class_weights: ")
    assert "response_mask" not in marks.rows["one function"]["not written"]
    assert str(Path(marks.folder)) not in "".join(notes.values())


def test_gradescope_can_read_what_is_kept(marks):
    results = json.loads(
        (marks.folder / "json" / "one mistake.json").read_text(encoding="utf-8")
    )
    assert {"score", "tests", "output"} <= results.keys()
    assert results["score"] == sum(test["score"] for test in results["tests"])


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux")
def test_a_submission_that_wants_more_memory_does_not_get_it(marks):
    note = marks.rows["memory in pieces"]["note"]
    assert "memory" in note.lower()


def test_a_process_that_takes_for_ever_is_ended(tmp_path):
    words = ["-c", "import time; time.sleep(600)"]
    code, _ = mark.run_limited(words, tmp_path, tmp_path, mark.MEMORY, 2)
    assert code is None


def test_nothing_of_your_environment_is_handed_on(tmp_path, monkeypatch):
    monkeypatch.setenv("A_KEY", "of yours")
    assert "A_KEY" not in mark.environment(tmp_path)
    assert mark.environment(tmp_path)["HOME"] == str(tmp_path)


@pytest.mark.only_thorough
def test_thirty_submissions_are_marked(tmp_path):
    submissions.make(tmp_path / "in")
    _, rows = marked(tmp_path / "in", tmp_path / "marks.csv")
    points = {row[0]: int(row[1]) for row in rows}
    assert len(points) == 30
    assert points["all right"] == sum(graded.points for graded in all_graded().values())
    for name in submissions.cheats():
        assert points[name] <= all_graded()["kl_estimate"].points, name
