"""Would the tests notice? Change one expression of the modules, run the tests, and see.

    python -m tests.lab.mutate                 list 200 mutants
    python -m tests.lab.mutate --log FILE      try them: half an hour for 200 on one thread

A mutant is one small change, made on the syntax tree: of an equation, as those that the course
tries its graded functions with (tests/coursework/mutants.py), or of the wiring (two arguments
swapped, a name replaced by its sibling, a call left out). First all tests run once, and it is
noted which functions each of them calls. A mutant gets those that call its function: of its
module, then of the recipe, then of the whole program, fast ones first; the first that fails ends
it. All this happens in a copy of the project, each time in a fork that has torch already. FILE
gets a line for each mutant; the same command goes on. After new tests delete the lines of the
survivors: they alone are tried again.
"""

import ast
import contextlib
import hashlib
import importlib
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict, namedtuple
from pathlib import Path

import pytest

from tests.coursework import mutants as equations
from tests.coursework.kinds import changed, functions
from tests.lab.command import Parser, start

ROOT = Path(__file__).resolve().parents[2]
MODULES = "t5_small data identifiers ppo emprl".split()
TESTS = "test_recipe test_emprl test_figures test_results".split()  # after the module's own

# each may stand in the place of another of its line
ROLES = """min max, argmin argmax, any all, sum mean, no_grad enable_grad,
train valid test probe judge_train judge_valid pretrain, mle emprl best_of_n,
identifiers judge context, t5 policy reference average model, gamma lam, low high, before after,
rewards advantages returns values scores, context response source ids contexts responses,
gold predicted levels target targets expected promised, er ip ex"""
ROLES = [words.split() for words in ROLES.split(",")]
TWINS = ROLES[:5]  # everywhere; the others where a function has both
TALK = re.compile(
    "print|say|plot|draw_|figure[.]|axis|help|error|table|report", re.I
)  # for the eye only
IDLE = ("in place", "detach")  # kinds of equations that change little here

Mutant = namedtuple("Mutant", "id kind module function line before after")


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
    return common or any(one in role and other in role for role in ROLES)


def swapped(items):
    """The list with two neighbours swapped, for each two."""
    for i in range(len(items) - 1):
        yield [*items[:i], items[i + 1], items[i], *items[i + 2 :]]


def wiring(node, siblings):
    """(kind, what may stand in the node's place): another thing is used, or none."""
    place, field, word = word_of(node)
    others = {other for other in siblings[place] if related(word, other)}
    for twins in TWINS:
        if word in twins and field != "value":
            others |= {*twins}
    for other in sorted(others - {word, ""}):
        yield "sibling", changed(node, **{field: other})
    match node:
        case ast.Call(func=ast.Attribute(attr="detach" | "requires_grad_" | "eval" | "clone")):
            yield "no detach", node.func.value
        case ast.Call():
            for arguments in swapped(node.args):
                yield "swap", changed(node, args=arguments)
        case ast.Dict():
            for values in swapped(node.values):
                yield "key", changed(node, values=values)
        case ast.BoolOp():
            other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
            yield "operator", changed(node, op=other)
        case ast.Expr(value=ast.Call()):
            yield "statement", ast.Pass()
        case ast.If() | ast.IfExp():
            yield "condition", changed(node, test=ast.UnaryOp(ast.Not(), node.test))


def without_talk(node):
    """The node and all below it, but for messages and pictures, where no figure can be wrong."""
    name = getattr(node, "name", "") or (isinstance(node, ast.Call) and ast.unparse(node.func))
    if not isinstance(node, (ast.Raise, ast.JoinedStr)) and not TALK.search(name or ""):
        yield node
        for child in ast.iter_child_nodes(node):
            yield from without_talk(child)


def changes(function):
    """(kind, old node, new node) of all that can be changed inside a function."""
    nodes = list(without_talk(function))
    siblings = defaultdict(set)
    for place, _, word in map(word_of, nodes):
        siblings[place].add(word)
    for node in nodes:
        found = [*wiring(node, siblings), *equations.changes_of_statement(node)]
        if word_of(node)[1] != "value":  # of a text only the wiring
            found += equations.changes(node)
        for kind, new in found:
            if isinstance(node, ast.If):
                yield kind, node.test, new.test
            elif kind not in IDLE:
                yield kind, node, new


def mutants(module):
    """{mutant: the module's content with it}."""
    source = (ROOT / f"{module}.py").read_bytes()
    starts = [0, *itertools.accumulate(map(len, source.splitlines(keepends=True)))]
    found = {}
    for name, function in functions(ast.parse(source)).items():
        for kind, old, new in changes(function):
            start = starts[old.lineno - 1] + old.col_offset
            end = starts[old.end_lineno - 1] + old.end_col_offset
            before, after = ast.unparse(old), ast.unparse(ast.fix_missing_locations(new))
            text = after if isinstance(new, ast.stmt) else f"({after})"
            content = source[:start] + text.encode() + source[end:]
            key = hashlib.sha256(content).hexdigest()[:12]
            where = module, name.split(".")[-1], old.lineno
            if before != after:
                found[Mutant(key, kind, *where, before, after)] = content
    return found


def compiles(content):
    try:
        return bool(compile(content, "mutant", "exec"))
    except (SyntaxError, ValueError):
        return False


def sample(seed, count):
    """{mutant: content}: as many of each kind and module as can be; the seed decides which."""
    contents = {}
    for module in MODULES:
        contents |= mutants(module)
    drawn = list(contents)
    random.Random(seed).shuffle(drawn)
    seen, turn = Counter(), {}
    for mutant in drawn:
        seen[mutant.module, mutant.kind] += 1
        turn[mutant] = seen[mutant.module, mutant.kind]
    drawn.sort(key=turn.get)
    valid = (mutant for mutant in drawn if compiles(contents[mutant]))
    return {mutant: contents[mutant] for mutant in itertools.islice(valid, count)}


# ---- which tests, and do they fail? -------------------------------------------------------------


class Watch:
    """A pytest plugin. Without names: what does each test call, and how long does it take?

    tests: {test: (seconds of CPU, {(file, function)})}; what a fixture of a file or of the
    session calls counts for all tests that use it. With names these tests run, in this order.
    failed: the first that fails.
    """

    def __init__(self, names=()):
        self.names = names
        self.called = set()
        self.of_fixture = {}
        self.tests = {}
        self.failed = ""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        if self.names:
            found = {item.nodeid: item for item in items}
            items[:] = [found[name] for name in self.names if name in found]

    def profile(self, frame, event, _):
        if event == "call":
            code = frame.f_code
            self.called.add((os.path.basename(code.co_filename), code.co_name))

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
        sys.setprofile(None if self.names else self.profile)
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


def run_tests(answer, project, files, names, limit):
    """In a fork: pytest on a copy of the project. Sends what was found."""
    import resource  # Windows has none

    os.setsid()  # so that all it starts can be ended with it
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    for number in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    sys.dont_write_bytecode = True
    for name in [*sys.modules]:
        if name.split(".")[0] in ("tests", *MODULES):
            del sys.modules[name]  # it is not the copy's
    os.chdir(project)
    watch = Watch(names)
    options = ["-xq", "-p", "no:cacheprovider", "-o", "pythonpath=.", "--processes", "1"]
    code = pytest.main([*options, *files], plugins=[watch])
    answer.send((watch.failed or (f"exit code {code}" if code else ""), watch.tests))


def in_a_fork(project, files, names, limit):
    """(the test that fails first, "" if none does; {test: (seconds, calls)}).

    limit: seconds of CPU; a machine that is busy may take ten times as long.
    """
    fork = multiprocessing.get_context("fork")  # Windows has none
    ours, theirs = fork.Pipe()
    process = fork.Process(target=run_tests, args=(theirs, project, files, names, limit))
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


def files_for(modules):
    """The modules' own tests, then those of the whole."""
    own = [f"test_{module.removesuffix('_small')}" for module in modules]
    return [f"tests/{name}.py" for name in dict.fromkeys([*own, *TESTS])]


def try_mutant(mutant, content, project, tests):
    """What catches it, by the tests that call its function: file by file, fast ones first."""
    files = files_for([mutant.module])
    chosen = []
    for test, (seconds, calls) in tests.items():
        file = test.partition("::")[0]
        if file in files and (f"{mutant.module}.py", mutant.function) in calls:
            chosen.append((files.index(file), seconds, test))
    failed = ""
    if chosen:
        path = project / f"{mutant.module}.py"
        original = path.read_bytes()
        path.write_bytes(content)
        names = [test for _, _, test in sorted(chosen)]
        limit = 60 + 5 * int(sum(seconds for _, seconds, _ in chosen))
        failed, _ = in_a_fork(project, files, names, limit)
        path.write_bytes(original)
    return {**mutant._asdict(), "caught_by": failed, "tests": len(chosen)}


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
        failed, tests = in_a_fork(project, files_for(MODULES), (), 3600)
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
    parser = Parser(__doc__)
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
    sys.exit(start(main))
