"""Would the tests notice? Change one expression of the modules, run the tests, and see.

    python -m tests.lab.mutate                 list 200 mutants
    python -m tests.lab.mutate --log FILE      try them: half an hour for 200 on one thread

A mutant is one small change, made on the syntax tree: of an equation (a sign, a constant, a
comparison) or of the wiring (two arguments swapped, a name replaced by its sibling, a statement
left out). First all tests run once, and it is noted which functions each of them calls. A mutant
gets those that call its function: of its module, then of the recipe, then of the whole program,
fast ones first; the first that fails ends it. All this happens in a copy of the project, each
time in a fork that has torch already. FILE gets a line for each mutant; the same command goes
on. After new tests delete the lines of the survivors: they alone are tried again.
"""

import argparse
import ast
import contextlib
import copy
import hashlib
import importlib
import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict, namedtuple
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = "t5_small data identifiers ppo emprl".split()
FORK = multiprocessing.get_context("fork")
TESTS = "test_recipe test_emprl test_figures test_results".split()  # after the module's own

# each may stand in the other's place
PAIRS = """Add Sub, Mult Div, Lt LtE, Gt GtE, Eq NotEq, And Or,
min max, argmin argmax, any all, sum mean, no_grad enable_grad, inference_mode enable_grad"""
OTHER = {}
for first, second in map(str.split, PAIRS.split(",")):
    OTHER |= {first: second, second: first}

ROLES = """train valid test probe judge_train judge_valid pretrain, mle emprl best_of_n,
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
class Recorder:
    """A pytest plugin: {test: (seconds of CPU, {(file, first line) of each function it calls})}.

    What a fixture of a file or of the session calls counts for all tests that use it.
    """

    def __init__(self):
        self.called = set()
        self.of_fixture = {}
        self.tests = {}
        self.failed = ""

    def profile(self, frame, event, _):
        if event == "call":
            code = frame.f_code
            self.called.add((os.path.basename(code.co_filename), code.co_firstlineno))

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        before, self.called = self.called, set()
        try:
            return (yield)
        finally:
            if fixturedef.scope != "function":
                self.of_fixture[fixturedef.argname] = self.called
            self.called = before | self.called

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.called = set()
        started = time.process_time()
        sys.setprofile(self.profile)
        try:
            return (yield)
        finally:
            sys.setprofile(None)
            for name in item.fixturenames:
                self.called |= self.of_fixture.get(name, set())
            self.tests[item.nodeid] = (time.process_time() - started, self.called)

    def pytest_runtest_logreport(self, report):
        if report.failed and not self.failed:
            self.failed = report.nodeid

    pytest_collectreport = pytest_runtest_logreport


class Chosen(Recorder):
    """Runs some tests, in this order, and records nothing but the first that fails."""

    def __init__(self, names):
        super().__init__()
        self.names = names

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        found = {item.nodeid: item for item in items}
        items[:] = [found[name] for name in self.names if name in found]

    def profile(self, frame, event, _):
        sys.setprofile(None)


def run_tests(answer, project, files, plugin, limit):
    """In a fork: pytest on a copy of the project. Sends what the plugin has found."""
    os.setsid()  # so that all it starts can be ended with it
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    for number in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    sys.dont_write_bytecode = True
    for name in [*sys.modules]:
        if name.split(".")[0] == "tests":
            del sys.modules[name]  # it is not the copy's
    os.chdir(project)
    options = ["-xq", "-p", "no:cacheprovider", "-o", "pythonpath=.", "--processes", "1"]
    code = pytest.main([*options, *files], plugins=[plugin])
    answer.send((plugin.failed or (f"exit code {code}" if code else ""), plugin.tests))


def in_a_fork(project, files, plugin, limit):
    """(the test that fails first, "" if none does; {test: (seconds, calls)}).

    limit: seconds of CPU; a machine that is busy may take ten times as long.
    """
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=run_tests, args=(theirs, project, files, plugin, limit))
    process.start()
    theirs.close()
    found = "no end", {}  # as good as a failed test
    with contextlib.suppress(EOFError):
        if ours.poll(10 * limit):
            found = ours.recv()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    return found


def file_of(test):
    return test.partition("::")[0]


def tests_of(mutant, project, tests):
    """The tests that call the function that the mutant is in: file by file, fast ones first."""
    first = 0  # line of the innermost function around the mutant, or of its decorator
    for node in ast.walk(ast.parse((project / f"{mutant.module}.py").read_bytes())):
        if isinstance(node, ast.FunctionDef):
            start = min([node.lineno, *(x.lineno for x in node.decorator_list)])
            if first < start <= mutant.line <= node.end_lineno:
                first = start
    function = (f"{mutant.module}.py", first)
    own = f"test_{mutant.module.removesuffix('_small')}"
    files = [f"tests/{name}.py" for name in dict.fromkeys([own, *TESTS])]
    chosen = [
        x for x, (_, calls) in tests.items() if function in calls and file_of(x) in files
    ]
    return sorted(chosen, key=lambda x: (files.index(file_of(x)), tests[x][0]))


def try_mutant(mutant, content, project, tests):
    chosen = tests_of(mutant, project, tests)
    failed = "", {}
    if chosen:
        path = project / f"{mutant.module}.py"
        original = path.read_bytes()
        path.write_bytes(content)
        files = list(dict.fromkeys(map(file_of, chosen)))
        limit = 60 + 5 * int(sum(tests[x][0] for x in chosen))
        failed = in_a_fork(project, files, Chosen(chosen), limit)
        path.write_bytes(original)
    return {**mutant._asdict(), "caught_by": failed[0], "tests": len(chosen)}


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


def try_all(mutants, log, caught_by):
    """A line of the log for each that is not in caught_by yet, and caught_by with it."""
    importlib.import_module("torch._dynamo")  # takes long: once, before the forks
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder) / "project"
        left_out = shutil.ignore_patterns(".*", "__pycache__", "runs", "*.ipynb")
        shutil.copytree(ROOT, project, ignore=left_out)
        own = [f"test_{module.removesuffix('_small')}" for module in MODULES]
        files = [f"tests/{name}.py" for name in dict.fromkeys([*own, *TESTS])]
        failed, tests = in_a_fork(project, files, Recorder(), 3600)
        if failed:
            sys.exit(f"{failed} fails on the code as it is; mend that first")
        for mutant, content in mutants.items():
            if mutant.id in caught_by:
                continue
            record = try_mutant(mutant, content, project, tests)
            caught_by[mutant.id] = record["caught_by"]
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            print(len(caught_by), record["caught_by"] or "survived", flush=True)


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
    try:
        try_all(chosen, options.log, caught_by)
    finally:
        show([mutant for mutant in chosen if mutant.id in caught_by], caught_by)


if __name__ == "__main__":
    main()
