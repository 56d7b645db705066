"""Would the tests notice? Change one expression of the modules, run the tests, and see.

    python -m tests.lab.mutate                 list 200 mutants
    python -m tests.lab.mutate --log FILE      try them: 20 s each, an hour or two for 200

A mutant is one small change, made on the syntax tree: of an equation (a sign, a constant, a
comparison) or of the wiring (two arguments swapped, a name replaced by its sibling, a statement
left out). Its tests are those of its module, then the recipe's, then the whole program's; the
first that fails ends it. All this happens in a copy of the project. FILE gets a line for each
mutant; the same command goes on. After new tests delete the lines of the survivors: they alone
are tried again.
"""

import argparse
import ast
import contextlib
import copy
import hashlib
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
from collections import Counter, defaultdict, namedtuple
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODULES = "t5_small data identifiers ppo emprl".split()
LIMIT = 300  # seconds for one mutant
TESTS = "test_recipe test_emprl".split()  # after the module's own

# each may stand in the other's place
PAIRS = """Add Sub, Mult Div, Lt LtE, Gt GtE, Eq NotEq, And Or,
min max, argmin argmax, any all, sum mean, no_grad enable_grad, inference_mode enable_grad"""
OTHER = {}
for first, second in map(str.split, PAIRS.split(",")):
    OTHER |= {first: second, second: first}

ROLES = """train valid test probe judge_train judge_valid turns, mle emprl best_of_n,
identifiers judge context, t5 policy reference average model, gamma lam, low high, before after,
rewards advantages returns values scores, context response source ids contexts responses,
gold predicted levels target targets expected promised, er ip ex"""
ROLES = [set(words.split()) for words in ROLES.split(",")]
TALK = re.compile("print|say|plot|help|error|table|report", re.I)  # for the eye only

Mutant = namedtuple("Mutant", "id kind module line before after")


# ---- what can be changed ------------------------------------------------------------------------
def word_of(node):
    """(where it belongs, the field, the word) of a name, an attribute or a text that is read."""
    match node:
        case ast.Name(id=word, ctx=ast.Load()):
            return "name", "id", word
        case ast.Attribute(attr=word, ctx=ast.Load()):
            return ast.unparse(node.value), "attr", word
        case ast.Constant(value=str(word)):
            return "text", "value", word
    return "", "", ""


def related(one, other):
    """Of the same role, or with a word in common: clip_range, value_clip_range."""
    common = {*one.split("_")} & {*other.split("_")} - {""}
    return one != other and (common or any({one, other} <= role for role in ROLES))


def changed(node, **fields):
    node = copy.copy(node)
    for name, value in fields.items():
        setattr(node, name, value)
    return node


def swapped(items):
    """The list with two neighbours swapped, for each two."""
    for i in range(len(items) - 1):
        yield [*items[:i], items[i + 1], items[i], *items[i + 2 :]]


def changes_of_word(node, siblings):
    place, field, word = word_of(node)
    if word in OTHER and field != "value":
        kind = "detach" if "grad" in OTHER[word] else "min-max"
        yield kind, changed(node, **{field: OTHER[word]})
    for other in sorted(siblings[place]):
        if place and related(word, other):
            yield "sibling", changed(node, **{field: other})


def changes_of_call(node):
    if getattr(node.func, "attr", "") in ("detach", "requires_grad_", "eval", "clone"):
        yield "detach", node.func.value
    for arguments in swapped(node.args):
        if ast.unparse(node.func) not in ("min", "max", "torch.min", "torch.max"):
            yield "swap", changed(node, args=arguments)
    for i in range(len(node.keywords)):
        yield "keyword", changed(node, keywords=node.keywords[:i] + node.keywords[i + 1 :])


def changes(node):
    """(kind, what may stand in the node's place), for each change of this very node."""
    match node:
        case ast.UnaryOp(op=ast.USub()):
            yield "sign", node.operand
        case ast.BinOp() | ast.BoolOp():
            if name := OTHER.get(type(node.op).__name__):
                yield "operator", changed(node, op=getattr(ast, name)())
        case ast.Compare(ops=[op]):
            if name := OTHER.get(type(op).__name__):
                yield "compare", changed(node, ops=[getattr(ast, name)()])
        case ast.Constant(value=bool(value)):
            yield "constant", ast.Constant(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield "constant", ast.Constant(value + 1)
        case ast.Call():
            yield from changes_of_call(node)
        case ast.Dict():
            for values in swapped(node.values):
                yield "key", changed(node, values=values)
        case ast.Assign(targets=[ast.Name(id=name)]) if name in ast.unparse(node.value):
            yield "statement", ast.Pass()
        case ast.AugAssign() | ast.Expr(value=ast.Call()):
            yield "statement", ast.Pass()


def without_talk(node):
    """The node and all below it, but for messages and pictures, where no figure can be wrong."""
    name = getattr(node, "name", "") or (isinstance(node, ast.Call) and ast.unparse(node.func))
    if not isinstance(node, (ast.Raise, ast.JoinedStr)) and not TALK.search(name or ""):
        yield node
        for child in ast.iter_child_nodes(node):
            yield from without_talk(child)


def mutants_of(source):
    """(kind, old node, new node) of all that can be changed inside a module's functions."""
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef):
            continue
        nodes = list(without_talk(function))
        siblings = defaultdict(set)
        for place, _, word in map(word_of, nodes):
            siblings[place].add(word)
        for node in nodes:
            for kind, new in itertools.chain(changes(node), changes_of_word(node, siblings)):
                yield kind, node, new
            if isinstance(node, (ast.If, ast.IfExp)):
                yield "condition", node.test, ast.UnaryOp(ast.Not(), node.test)


def mutants(module):
    """Each mutant of a module, and the module's content with it."""
    source = (ROOT / f"{module}.py").read_bytes()
    starts = [0, *itertools.accumulate(map(len, source.splitlines(keepends=True)))]
    for kind, old, new in mutants_of(source):
        start = starts[old.lineno - 1] + old.col_offset
        end = starts[old.end_lineno - 1] + old.end_col_offset
        before, after = ast.unparse(old), ast.unparse(ast.fix_missing_locations(new))
        text = after if after.isidentifier() else f"({after})"
        content = source[:start] + text.encode() + source[end:]
        name = hashlib.sha256(content).hexdigest()[:12]
        if before != after:
            yield Mutant(name, kind, module, old.lineno, before, after), content


def compiles(content):
    try:
        return bool(compile(content, "mutant", "exec"))
    except (SyntaxError, ValueError):
        return False


def sample(seed, count):
    """{mutant: content}: as many of each kind and module as can be; the seed decides which."""
    contents = {}
    for module in MODULES:
        contents |= dict(mutants(module))
    drawn = list(contents)
    random.Random(seed).shuffle(drawn)
    seen, turn = Counter(), {}
    for mutant in drawn:
        seen[mutant.module, mutant.kind] += 1
        turn[mutant] = seen[mutant.module, mutant.kind]
    drawn.sort(key=turn.get)
    valid = (mutant for mutant in drawn if compiles(contents[mutant]))
    return {mutant: contents[mutant] for mutant in itertools.islice(valid, count)}


# ---- the tests on one of them -------------------------------------------------------------------
def first_failure(folder, tests, limit):
    """The test that fails first in a copy of the project; "" if none does."""
    files = [f"tests/{test}.py" for test in tests]
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-xq", "-p", "no:cacheprovider", *files],
        cwd=folder,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        encoding="utf-8",
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        output = ""  # as good as a failed test
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # and what it started
    if process.wait():
        failed = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.M)
        return failed[1] if failed else f"exit code {process.returncode}"
    return ""


def try_mutant(mutant, content, project, limit):
    path = project / f"{mutant.module}.py"
    original = path.read_bytes()
    path.write_bytes(content)
    own = f"test_{mutant.module.removesuffix('_small')}"
    failed = first_failure(project, dict.fromkeys([own, *TESTS]), limit)
    path.write_bytes(original)
    return {**mutant._asdict(), "caught_by": failed}


def show(mutants, caught_by):
    """Of each kind how many were made and survived; then which."""
    survived = [m for m in mutants if not caught_by.get(m.id)]
    made = Counter(m.kind for m in mutants)
    left = Counter(m.kind for m in survived)
    for kind in sorted(made):
        print(f"{kind:<10}{made[kind]:>5} made{left[kind]:>5} survived")
    print(f"{'all':<10}{len(mutants):>5} made{len(survived):>5} survived")
    for m in survived:
        print(f"{m.module}.py:{m.line}  {m.before[:90]}  ->  {m.after[:90]}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--log", type=Path, help="JSON lines, one for each mutant")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    chosen = sample(options.seed, options.count)
    if not options.log:
        return show(chosen, {})
    options.log.touch()
    records = map(json.loads, options.log.read_text(encoding="utf-8").splitlines())
    caught_by = {record["id"]: record["caught_by"] for record in records}
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder) / "project"
        left_out = shutil.ignore_patterns(".*", "__pycache__", "runs", "*.ipynb")
        shutil.copytree(ROOT, project, ignore=left_out)
        if failed := first_failure(project, TESTS, 10 * LIMIT):
            sys.exit(f"{failed} fails on the code as it is; mend that first")
        try:
            for mutant, content in chosen.items():
                if mutant.id not in caught_by:
                    record = try_mutant(mutant, content, project, LIMIT)
                    caught_by[mutant.id] = record["caught_by"]
                    with options.log.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(record) + "\n")
                    print(len(caught_by), record["caught_by"] or "survived", flush=True)
        finally:
            show([mutant for mutant in chosen if mutant.id in caught_by], caught_by)


if __name__ == "__main__":
    main()
