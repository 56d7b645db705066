"""A silent bug that no page tells: python -m tests.coursework.secret SECRET NAME COPY

For marks. Writes a copy of the program for the student NAME into the new folder COPY, with one
bug, and prints the answer: for you only. With --solution FILE the bug is in a copy of the
student's own solution, and COPY is a new file. Which bug it is depends on SECRET and NAME alone:
the same command with --answer prints the answer again and writes nothing.

The copy says the same in other words (restyle.py), so comparing it with the project tells nothing.
A bug is kept only if the program still runs without an error, and if it has an effect: a figure
of a short run moves, or, in a student's solution, the grader finds it. It takes about a minute.
"""

import ast
import difflib
import json
import math
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from emprl import command_line
from tests.coursework.command import make_parser
from tests.coursework.grade import grade
from tests.coursework.kinds import KINDS, PLACES, all_changes, apply, functions
from tests.coursework.plant import (
    MODULES,
    ROOT,
    copy_program,
    run_without_pictures,
    training_command,
)
from tests.coursework.restyle import draw, restyled
from tests.coursework.student import Refused
from tests.coursework.units import all_graded

LIMIT = 300  # seconds for a short run; it takes about ten
PER_KIND = 4  # so many places of a kind are tried before another kind is drawn
MOVED = 0.01  # a figure has moved if it differs by this share
SHORTEST = 12  # characters of a secret


@dataclass
class Bug:
    """What the teacher is told."""

    file: str
    kind: str
    function: str
    right: str  # text of the file in the student's copy, without the bug
    wrong: str  # and with it
    effect: list  # lines

    def answer(self):
        right, wrong = self.right.splitlines(), self.wrong.splitlines()
        changed = list(difflib.unified_diff(right, wrong, lineterm="", n=1))
        lines = [f"bug:    {self.kind}. {KINDS[self.kind]}"]
        lines.append(f"where:  {self.file}, {self.function}; + is what the copy has")
        lines += [f"        {line}" for line in changed[2:]]
        lines.append("effect: " + "\n        ".join(self.effect))
        return "\n".join(lines)


# ---- what is drawn


def in_turn(changes, *key):
    """Changes in the order in which they are tried: a kind is drawn, then a place for it."""
    ordered = sorted(
        changes, key=lambda x: (draw(*key, x.kind), x.kind, draw(*key, *x.key()), x.key())
    )
    for _, of_kind in groupby(ordered, lambda x: x.kind):
        yield from list(of_kind)[:PER_KIND]


def trees():
    """module file -> (its syntax tree, its text)."""
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in MODULES}
    return {name: (ast.parse(text), text) for name, text in texts.items()}


# ---- a copy of the program


def write_copy(folder, modules):
    """The program with other texts of its modules."""
    copy_program(folder)
    for name, text in modules.items():
        (folder / name).write_text(text, encoding="utf-8")


def short_run(modules):
    """The figures of a run of `smoke`, by name; {} if it ends with an error or takes for ever."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        write_copy(copy, modules)
        if not ends_well("emprl", copy, ["--preset", "smoke", "--run", "run"]):
            return {}
        return figures_of(copy / "run")


def ends_well(module, folder, words):
    """Does a module's command come to its end without an error, and in time?"""
    options = {"stderr": subprocess.DEVNULL, "timeout": LIMIT}
    try:
        return run_without_pictures(module, words, folder, **options) == 0
    except subprocess.TimeoutExpired:
        return False


def figures_of(run):
    """Of each training stage the mean over its second half, and all figures of the evaluation."""
    series = defaultdict(list)
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        for name, value in numbers_in(record):
            if name != "step":
                series[f"{record['stage']} {name}"].append(value)
    figures = {}
    for name, values in series.items():
        late = values[len(values) // 2 :]
        figures[name] = sum(late) / len(late)
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    for part in ("config", "seconds", "made_of", "code"):
        del metrics[part]
    for name, value in numbers_in(metrics):
        figures[f"evaluation {name}"] = value
    return figures


def numbers_in(content, name=""):
    """(name, number) of everything in a JSON object that is a number."""
    if isinstance(content, dict):
        for key, part in content.items():
            yield from numbers_in(part, f"{name} {key}".strip())
    elif isinstance(content, (int, float)):
        yield name, float(content)


def moved(before, after):
    """[(change, name, before, after)] of the figures that differ, the largest change first."""
    found = []
    for name in before.keys() & after.keys():
        size = max(abs(before[name]), abs(after[name]))
        change = abs(after[name] - before[name]) / max(size, 1e-3)
        if change > MOVED:
            found.append((change, name, before[name], after[name]))
    return sorted(found, reverse=True)


def is_silent(figures):
    """The program ended well, all figures are finite, and the reward is in its range."""
    possible = all(map(math.isfinite, figures.values()))
    return bool(figures) and possible and 0 <= figures.get("ppo reward", 0) <= 1


def bug_in_program(key):
    """The first bug drawn that is silent and has an effect. Returns it and all modules' texts."""
    program = trees()
    clean = {name: restyled(*both, key[0], name) for name, both in program.items()}
    before = short_run(clean)
    if not before:
        raise RuntimeError("the copy without a bug does not run; is the project in order?")
    places = {}
    for name, functions_in in PLACES.items():
        for change in all_changes(program[name][0], functions_in.split()):
            places[name, change.key()] = change
    owner = {id(change): name for (name, _), change in places.items()}
    for change in in_turn(places.values(), *key):
        name = owner[id(change)]
        tree, text = program[name]
        planted = restyled(apply(tree, change), text, key[0], name)
        modules = {**clean, name: planted}
        after = short_run(modules)
        differences = moved(before, after)
        if is_silent(after) and differences:
            effect = ["figures of a short run, right -> wrong:"]
            for _, figure, right, wrong in shown(differences):
                effect.append(f"{figure}: {right:.4g} -> {wrong:.4g}")
            bug = Bug(name, change.kind, change.function, clean[name], planted, effect)
            return bug, modules
    raise RuntimeError("no bug of these has an effect")


def shown(differences, count=6):
    """The largest changes, those of the curves that everyone looks at first."""
    usual = ("reward", "kl", "length", "entropy", "value_loss", "loss", "clip_share")
    first = [d for d in differences if d[1].split()[-1] in usual]
    return [*first, *(d for d in differences if d not in first)][:count]


# ---- a student's own solution


# what a message of the grader says if a wrong function does not merely give wrong numbers
LOUD = ("of your file)", "cannot use what it returns", "shape", "an endless loop?", "ends the")


def how(path, names):
    """name -> "passed", "failed", "error" or another status, of functions in a student's file."""
    found = {}
    for name, result in grade(path, names).items():
        loud = any(words in result.message for words in LOUD)
        found[name] = "error" if result.status == "failed" and loud else result.status
    return found


def graded_functions(tree, right):
    """Names of the functions and methods that are graded under one of the names `right`."""
    found = set()
    for name in functions(tree):
        graded, _, method = name.partition(".")
        if graded in right and (not method or method in all_graded()[graded].methods):
            found.add(name)
    return found


def trains(file):
    """Does a short training with the functions of a file come to its end?"""
    with tempfile.TemporaryDirectory() as folder:
        words = [str(file), "--preset", "smoke", "--run", str(Path(folder) / "run")]
        return ends_well("tests.coursework.train", ROOT, words)


def bug_in_solution(path, key):
    """The same in a student's file: a bug that the grader finds and that raises no error."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    clean = restyled(tree, text, key[0], "solution")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / path.name
        file.write_text(clean, encoding="utf-8")
        right = [name for name, status in how(file, None).items() if status == "passed"]
        names = sorted(graded_functions(tree, right))
        for change in in_turn(all_changes(tree, names), *key):
            planted = restyled(apply(tree, change), text, key[0], "solution")
            file.write_text(planted, encoding="utf-8")
            graded = change.function.split(".")[0]
            if how(file, [graded])[graded] == "failed" and trains(file):
                effect = [f"the grader says that {graded} is wrong"]
                place = path.name, change.kind, change.function
                return Bug(*place, clean, planted, effect), planted
    raise Refused(f"{path}: no graded function in it is right, so none can be made wrong")


# ---- the command


def problem_with(arguments):
    """What is wrong with the command line, in one line; "": nothing."""
    if len(arguments.secret) < SHORTEST:
        return f"SECRET: a short one can be tried out; take {SHORTEST} characters or more"
    if arguments.solution and not Path(arguments.solution).is_file():
        return f"--solution {arguments.solution}: no such file"
    if not arguments.answer and not arguments.copy:
        return "COPY is missing: a new folder, with --solution a new file"
    if arguments.copy and Path(arguments.copy).exists():
        return f"{arguments.copy} exists; name a new one"
    return ""


def main():
    parser = make_parser("secret", __doc__)
    parser.add_argument("secret", help="some words that only you know")
    parser.add_argument("name", help="the student's; with another name it is another bug")
    parser.add_argument("copy", nargs="?", help="a new folder, or with --solution a new file")
    parser.add_argument("--solution", metavar="FILE", help="the student's own functions")
    parser.add_argument("--answer", action="store_true", help="write nothing, say the answer")
    arguments = parser.parse_args()
    if problem := problem_with(arguments):
        parser.exit(2, f"{problem}\n")

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the same figures whatever else runs
    key = (f"{arguments.secret}/{arguments.name}", "bug")
    if arguments.solution:
        try:
            bug, written = bug_in_solution(Path(arguments.solution), key)
        except SyntaxError as error:
            parser.exit(2, f"{arguments.solution}:{error.lineno}: SyntaxError; correct it\n")
        except (Refused, ValueError) as error:
            parser.exit(2, f"{error}\n")
    else:
        bug, written = bug_in_program(key)
    if not arguments.answer:
        copy = Path(arguments.copy)
        if arguments.solution:
            copy.write_text(written, encoding="utf-8")
        else:
            write_copy(copy, written)
            there = command_line(["cd", arguments.copy])
            print(f"for the student: {there}, then {training_command()}")
        print(f"for you, about {arguments.name}'s copy:")
    print(bug.answer())


if __name__ == "__main__":
    sys.exit(main())
