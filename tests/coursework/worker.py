"""The process in which a student's file runs: started by grade.py, never by hand.

It reads the names of functions, a line each, and answers each with a line of JSON: which of their
tests fail, and why. It decides nothing: no answer, or an odd one, is a failure for grade.py.

The file gets the project's functions lent, but never the one that is being graded. On every call
of a graded function arguments and torch's generator must stay as they were; after its tests torch,
pytest and the tests themselves must.
"""

import contextlib
import functools
import importlib
import json
import os
import sys
import time

import pytest
import torch

from tests.coursework import student
from tests.coursework.units import TEST_FILES, all_graded

SEED = 20_263_701  # one that a solution is unlikely to set: setting it would not be seen
MEMORY = 2 * 2**30  # bytes
PRINTED = 2**24
COUNTS = {"a": 1, "two": 2, "three": 3}


class Wrong(AssertionError):
    """What a graded function does that is wrong whatever it computes, in words."""


# ---- lending --------------------------------------------------------------------------------


class Lender:
    """Lends the project's functions, all but the one that is being graded."""

    def __init__(self):
        self.graded = ""
        for graded in all_graded().values():
            module = importlib.import_module(graded.module)
            original = getattr(module, graded.name)
            lend = self.lent_class if graded.methods else self.lent_function
            student.put_in(graded.name, lend(graded.name, original))

    def lent_function(self, name, original):
        def lent(*arguments, **named):
            if self.graded == name.split(".")[0]:
                raise Wrong(f"{name} calls the project's own {name}: write it yourself")
            return original(*arguments, **named)

        lent.lent = True
        return lent

    def lent_class(self, name, original):
        methods = {}
        for method in all_graded()[name].methods:
            own = vars(original)[method]
            methods[method] = self.lent_function(f"{name}.{method}", own)
        return type(name, (original,), methods)


# ---- what must stay as it was ---------------------------------------------------------------


def watched():
    """What the tests rely on, as {(module, name): object}."""
    modules = [torch, torch.nn, torch.nn.functional, torch.Tensor, torch._C.TensorBase]
    modules += [torch.autograd, torch.testing, torch.nn.Module, pytest]
    names = ["builtins", "math", "conftest", "tests.tools", *student.PROJECT]
    names += [file.removesuffix(".py") for file in TEST_FILES.values()]
    modules += [importlib.import_module(name) for name in names]
    found = {}
    for module in modules:
        for name, value in vars(module).items():
            # torch itself exchanges manual_seed when a part of it is first used.
            if name not in ("_", "__warningregistry__", "manual_seed"):
                found[module, name] = value
    return found


def changed(before):
    """The name of something watched that is another object than before; "" if nothing is."""
    for (module, name), value in before.items():
        if vars(module).get(name) is not value:
            return f"{module.__name__}.{name}"
    if torch.get_default_dtype() != torch.float32 or not torch.is_grad_enabled():
        return "torch's default type or gradient mode"
    return ""


def changed_by_it(before):
    name = changed(before)
    return f"your file changes {name} while it is graded" if name else ""


def frozen(value):
    """A copy of what a caller hands in, as far as it is numbers; None for what is not."""
    if torch.is_tensor(value):
        return value.detach().clone()
    if isinstance(value, (list, tuple)):
        return [frozen(part) for part in value]
    return value if isinstance(value, (int, float, str)) else None


def same(one, other):
    """Two frozen values are equal, NaN to NaN."""
    if torch.is_tensor(one):
        return one.shape == other.shape and torch.equal(one.nan_to_num(), other.nan_to_num())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one is other or one == other


def restore(values, before):
    """Make tensors and lists again what they were."""
    for value, old in zip(values, before):
        if torch.is_tensor(value):
            value.data = old
        elif isinstance(value, tuple):
            restore(value, old)
        elif isinstance(value, list):
            value[:] = old


def guarded(graded, function):
    """The function, with Wrong raised for what is wrong whatever it computes."""

    @functools.wraps(function)
    def call(*arguments, **named):
        given = (*arguments, *named.values())
        before = frozen(given)
        state = torch.get_rng_state()
        value = function(*arguments, **named)
        if not same(before, frozen(given)):
            restore(given, before)  # they may be used again
            raise Wrong(f"{graded.name} changes its arguments in place: make a new tensor")
        draws = graded.random or (graded.methods and given[0].training)
        if not draws and not torch.equal(state, torch.get_rng_state()):
            raise Wrong(
                f"{graded.name} draws from torch's global generator, or seeds it: use one of "
                "its own (torch.Generator)"
            )
        if value is None or value is NotImplemented:
            raise Wrong(f"{graded.name} returns nothing: is there a `return`?")
        problem = wrong_kind(value, graded.returns)
        if problem:
            raise Wrong(f"{graded.name} has to return {graded.returns}; it returns {problem}")
        return value

    return call


def wrong_kind(value, wanted):
    """What a value is, in words, if it is not of the kind that is wanted; else ""."""
    if not wanted:
        return ""
    kind, _, names = wanted.partition(": ")
    count, thing = kind.split()
    if thing == "dict":
        missing = {*names.split(", ")} - {*value} if isinstance(value, dict) else True
        return in_words(value) if missing else ""
    if thing == "number":
        return "" if isinstance(value, (int, float)) else in_words(value)
    if COUNTS[count] == 1:
        return "" if torch.is_tensor(value) else in_words(value)
    parts = value if isinstance(value, (tuple, list)) else [value]
    kinds = list if thing == "lists" else torch.Tensor
    right = len(parts) == COUNTS[count] and all(isinstance(part, kinds) for part in parts)
    return "" if right else in_words(value)


def in_words(value):
    """What a value is: "a tensor of shape (2, 3)", "a tuple of 2 (float 1.0, float 2.0)"."""
    if torch.is_tensor(value):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, dict):
        return f"a dict of {', '.join(map(str, value)) or 'nothing'}"
    if isinstance(value, (tuple, list)):
        parts = ", ".join(map(in_words, value[:4]))
        return f"a {type(value).__name__} of {len(value)} ({parts})"
    return f"{type(value).__name__} {str(value)[:40]}"


def guard(graded, value):
    """The student's function or class, guarded."""
    if not graded.methods:
        return guarded(graded, value)
    for method in graded.methods:
        setattr(value, method, guarded(graded, vars(value)[method]))
    return value


# ---- the tests of one function --------------------------------------------------------------


def tests_of(graded):
    """The tests of a function, by name."""
    module = importlib.import_module(TEST_FILES[graded.module].removesuffix(".py"))
    return {test: getattr(module, test) for test in graded.tests}


def failures(tests, path):
    """(name, why it fails) of tests, as the modules are by now; path: the student's file."""
    for name, test in tests.items():
        torch.manual_seed(SEED)
        try:
            call(test)
        except BaseException as error:  # pytest.fail and SystemExit, too
            yield name, why(error, path)


def call(test):
    """Call a test as pytest would, with all its parameters."""
    for mark in getattr(test, "pytestmark", []):
        if mark.name == "parametrize":
            for value in mark.args[1]:
                test(value)
            return
    test()


def why(error, path):
    """What a student reads of an exception."""
    where = student.line_in(error, path)
    if isinstance(error, (pytest.fail.Exception, Wrong)):
        return str(error)
    if isinstance(error, AssertionError) and not where:
        return str(error) or "an assertion of the test fails"
    if isinstance(error, SystemExit) and where:
        return f"it ends the program (SystemExit, line {where[1:]} of your file)"
    if where:
        return f"{student.told(error)} (line {where[1:]} of your file)"
    if isinstance(error, TypeError) and " argument" in str(error):
        return f"it cannot be called as the specification says: {student.told(error)}"
    return f"the test cannot use what it returns: {student.told(error)}"


class Worker:
    """Grades what the file defines, one function at a time."""

    def __init__(self, path):
        # found before the file runs, which may put something in their place
        self.tests = {name: tests_of(graded) for name, graded in all_graded().items()}
        self.path = path
        self.lender = Lender()
        self.before = watched()
        self.file = student.execute(path)

    def answer(self, name):
        graded = all_graded()[name]
        started = time.process_time()
        value = getattr(self.file, name, None)
        problem = student.problem_of(value, graded, self.path)
        found = {}
        if not problem:
            self.lender.graded = name
            places = student.put_in(name, guard(graded, value))
            found = dict(failures(self.tests[name], self.path))
            student.put_back(name, places)
            self.lender.graded = ""
        seconds = round(time.process_time() - started, 2)
        problem = problem or changed_by_it(self.before)
        return {"failures": found, "seconds": seconds, "problem": problem}


def limit_itself():
    """No endless list and no endless printing; Windows has no such limits."""
    try:
        import resource
    except ImportError:
        return
    limits = {resource.RLIMIT_DATA: MEMORY, resource.RLIMIT_FSIZE: PRINTED}
    for kind, size in limits.items():
        _, highest = resource.getrlimit(kind)
        if highest != resource.RLIM_INFINITY:
            size = min(size, highest)
        with contextlib.suppress(OSError, ValueError):  # a system that has no such limit
            resource.setrlimit(kind, (size, highest))


def main():
    # Whatever the student's file prints goes to stderr; it has no stdin.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    secret = requests.readline().strip()

    def reply(**fields):
        answers.write(json.dumps({"secret": secret, **fields}) + "\n")
        answers.flush()

    path = sys.argv[1]
    torch.set_num_threads(1)
    limit_itself()
    try:
        worker = Worker(path)
        reply(loaded=True, changed=changed(worker.before))
    except BaseException as error:  # SystemExit, too
        where = student.line_in(error, path)
        reply(loaded=False, problem=f"{path}{where}: {student.told(error)}; correct it")
        os._exit(0)
    for line in requests:
        reply(**worker.answer(line.strip()))
    os._exit(0)  # nothing of the file runs at the end


if __name__ == "__main__":
    main()
