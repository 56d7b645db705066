"""Would the tests notice? Make one small mistake in the modules, run the tests, and see.

    python -m tests.lab.mutate                 list 200 mutants
    python -m tests.lab.mutate --log FILE      try them

A mutant is a module with one change: a silent bug as the course plants them
(tests/coursework/kinds.py), a mistake as those that its graded functions are tried with
(mutants.py beside it), or one of the wiring: another parameter, attribute or text is used, two
arguments are swapped, a call is left out. Messages and pictures are left alone. 200 of about
17,000 are drawn; each kind in each module has the same chance.

pytest runs in a copy of the project: the module's own tests, then those of the whole program, up
to the first that fails. FILE gets a line for each mutant; the same command goes on. After new
tests delete the lines of the survivors (they end in ""): they alone are tried again.

Cost: 2 minutes of one CPU for the tests as they are, then 3 to 15 seconds for most mutants that
are caught and a minute and more for one that survives: about an hour for 200 if one in five does.
A busy machine takes three times as long.
"""

import ast
import contextlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from tests.coursework import kinds, mutants
from tests.lab.command import Parser, new_file, start

ROOT = Path(__file__).parents[2]
MODULES = "data t5_small identifiers ppo emprl".split()
WHOLE = "recipe emprl figures results".split()  # the tests after the module's own
PYTEST = "-W ignore -m pytest -xq --tb=no --processes 1 --basetemp ../tmp".split()

# What is only for the eye, where no figure can be wrong, begins so: sentences, pictures, tables.
TALK = re.compile(
    r"""['"]\w*[^\w'"]|(say|print)\(|print_|report|\w*table(\(|$)"""
    "|draw_(plots|emp|levels|ppo|learnt|losses)"
)


# ---- what can be changed ------------------------------------------------------------------------


def family(node, parameters):
    """Two nodes of one family may be confused. None: nothing is like this one."""
    match node:
        case ast.Name(id=name) if name in parameters:
            return "parameter"
        case ast.Attribute(value=owner):
            return f"attribute of {ast.unparse(owner)}"
        case ast.Constant(value=str(text)) if text.isidentifier():
            return "text"


def miswired(node):
    """(kind, new node) of a call: two arguments are swapped, or it is left out."""
    match node:
        case ast.Call(ast.Attribute(left, "detach" | "eval" | "clone" | "requires_grad_")):
            yield "no call", left
        case ast.Call(ast.Name() | ast.Attribute(attr="deepcopy"), [left]):
            if not isinstance(left, ast.Starred):
                yield "no call", left
        case ast.Call(args=args):
            for one, other in itertools.pairwise(args):
                swapped = {one: other, other: one}
                yield "arguments", kinds.changed(node, args=[swapped.get(a, a) for a in args])


def changes(function, name):
    """Every change of a function, some of them twice; not of what it raises and says."""
    nodes = kinds.walk(function)
    parameters = {argument.arg for argument in function.args.args} - {"self"}
    families = defaultdict(list)
    for node in nodes:
        families[family(node, parameters)].append(node)
    del families[None]

    found = kinds.changes(function, name)
    for place, node in enumerate(nodes):
        old = ast.unparse(node)
        key = family(node, parameters)
        others = [(key.split()[0], other) for other in families[key]]
        for kind, new in (*others, *miswired(node), *mutants.changes(node)):
            if ast.unparse(new) != old:
                found.append(kinds.Change(kind, name, place, new, old))
    not_raised = {*mutants.within(function)}
    return [c for c in found if nodes[c.place] in not_raised and not TALK.match(c.old)]


def draw(right, count):
    """{title: (module, text)}; each kind in each module has the same chance."""
    pools = defaultdict(list)
    for module, text in right.items():
        tree = ast.parse(text)
        for name, function in kinds.functions(tree).items():
            if not TALK.match(name):
                for change in changes(function, name):
                    pools[module, change.kind].append((module, tree, change))

    rng = random.Random(0)
    drawn = {}
    for _ in range(10 * count):  # some come twice, and there may be fewer than count
        if len(drawn) == count:
            break
        module, tree, change = rng.choice(rng.choice([*pools.values()]))
        text = ast.unparse(kinds.apply(tree, change))
        before, after = mutants.changed_line(right[module], text)
        title = f"{module}.py {change.function}: {before}  ->  {after}"
        drawn[title] = module, text
    return drawn


# ---- do the tests fail? -------------------------------------------------------------------------


def first_failure(project, texts, names):
    """The first test that fails on a copy of the project with these texts; "" if all pass."""
    for module, text in texts.items():
        (project / f"{module}.py").write_text(text, encoding="utf-8")
    files = [f"tests/test_{name.removesuffix('_small')}.py" for name in (*names, *WHOLE)]
    command = [sys.executable, *PYTEST, *files]
    with subprocess.Popen(
        command, cwd=project, stdout=subprocess.PIPE, encoding="utf-8", start_new_session=True
    ) as process:
        try:
            told, _ = process.communicate(timeout=600)  # seconds; all tests take 100
        except subprocess.TimeoutExpired:
            return "no end"  # as good as a failed test
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and all that it started
    failed = re.findall("(?:FAILED|ERROR) .*", told)
    return [*failed, "a crash"][0] if process.returncode else ""


def try_all(drawn, right, log):
    """{title: the test that catches it, or ""}; what the log lacks is tried and added to it."""
    with tempfile.TemporaryDirectory() as folder, log.open("a+", encoding="utf-8") as file:
        file.seek(0)
        caught_by = dict(map(json.loads, file))
        left_out = shutil.ignore_patterns(".*", "__pycache__", "runs")
        project = shutil.copytree(ROOT, Path(folder) / "project", ignore=left_out)
        left = [title for title in drawn if title not in caught_by]
        if left and (failed := first_failure(project, right, right)):
            sys.exit(f"{failed}: without a mutant; mend that first")

        began = time.monotonic()
        for i, title in enumerate(left, 1):
            module, text = drawn[title]
            caught_by[title] = first_failure(project, right | {module: text}, [module])
            print(json.dumps([title, caught_by[title]]), file=file, flush=True)
            seconds = (time.monotonic() - began) / i * (len(left) - i)
            print(f"{i}/{len(left)}, {seconds / 60:.0f} min left  {title}")
            print(f"    {caught_by[title] or 'SURVIVED'}", flush=True)
    return caught_by


def main():
    parser = Parser(__doc__)
    parser.add_argument("--log", type=new_file, help="JSON lines, one for each mutant")
    options = parser.parse_args()

    right = {
        module: ast.unparse(ast.parse((ROOT / f"{module}.py").read_bytes()))
        for module in MODULES
    }
    drawn = draw(right, 200)
    caught_by = try_all(drawn, right, options.log) if options.log else {}
    survivors = [title for title in drawn if not caught_by.get(title)]
    print(f"{len(drawn)} made, {len(survivors)} survived:", *survivors, sep="\n")


if __name__ == "__main__":
    sys.exit(start(main))
