"""A student's file: what may stand in it, how it is loaded, and how its functions are put in.

grade.py (in a process of its own) and train.py use it. It is read before it runs: a solution needs
arithmetic and tensors, so what reaches for the program around it is refused by its line. That
stops a careless file and an idle cheat; a stranger's file belongs into a container all the same.
"""

import ast
import functools
import importlib
import importlib.util
import inspect
import sys
import types
from pathlib import Path

from tests.coursework.units import all_graded

ROOT = Path(__file__).resolve().parents[2]
PROJECT = ("t5_small", "data", "identifiers", "ppo", "emprl")
# what a solution may import
LIBRARIES = """__future__ abc bisect collections copy dataclasses enum fractions functools heapq
itertools math numbers numpy random statistics time torch typing""".split()
FORBIDDEN_NAMES = """__builtins__ __import__ __loader__ __spec__ breakpoint compile delattr eval
exec exit getattr globals locals memoryview open quit setattr vars""".split()
FORBIDDEN_ATTRIBUTES = """builtins ctypes distributed f_back f_globals f_locals gc hub importlib
inspect io jit library load modules multiprocessing os pathlib pickle serialization shutil signal
storage subprocess sys testing threading types""".split()
DUNDERS = ("__init__", "__call__", "__len__", "__getitem__", "__name__", "__iter__")


class Refused(ValueError):
    """A file that cannot be graded: one line that says where, what and what to do."""


# ---- what may stand in it -------------------------------------------------------------------


def parse(path):
    """The syntax tree of a file. Raises Refused."""
    try:
        return ast.parse(Path(path).read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise Refused(f"{path}:{error.lineno}: SyntaxError: {error.msg}; correct it") from None
    except OSError as error:
        raise Refused(f"{path}: {error.strerror}; name the file of a solution") from None
    except (ValueError, RecursionError) as error:
        raise Refused(f"{path}: no Python text ({error}); name another file") from None


def check(path, tree):
    """Raises Refused at the first thing that a solution has no use for."""
    modules = module_names(tree)
    for node in ast.walk(tree):
        what = forbidden_import(node) or forbidden_name(node) or changed_module(node, modules)
        if what:
            raise Refused(
                f"{path}:{node.lineno}: {what}: a solution needs nothing of the program around "
                f"it; take it out (it may import {', '.join((*LIBRARIES[1:], *PROJECT))})"
            )


def module_names(tree):
    """The names under which modules, and what comes from them, are known in a file."""
    found, others = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(name.asname or name.name).split(".")[0] for name in node.names}
        if isinstance(node, ast.ImportFrom):
            found |= {name.asname or name.name for name in node.names}
        if isinstance(node, ast.arg):
            others.add(node.arg)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            others.add(node.id)
    return found - others


def forbidden_import(node):
    names = []
    if isinstance(node, ast.Import):
        names = [name.name for name in node.names]
    if isinstance(node, ast.ImportFrom):
        names = [node.module or "."] + [f"{node.module}.{name.name}" for name in node.names]
    for name in names:
        first, *others = name.split(".")
        if first not in (*LIBRARIES, *PROJECT) or set(others) & set(FORBIDDEN_ATTRIBUTES):
            return f"import of {name}"
        if any(part.startswith("_") for part in others):
            return f"import of {name}"
    return ""


def forbidden_name(node):
    if isinstance(node, ast.Name) and node.id in FORBIDDEN_NAMES:
        return node.id
    if isinstance(node, ast.Attribute):
        word = node.attr
        own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
        if word in FORBIDDEN_ATTRIBUTES:
            return f".{word}"
        if word.startswith("_") and word not in DUNDERS and not own:
            return f".{word}"
    return ""


def changed_module(node, modules):
    """Assignment to what belongs to a module: torch.isclose = ..., ppo.gae.x = ..."""
    if not isinstance(node, (ast.Attribute, ast.Subscript)) or isinstance(node.ctx, ast.Load):
        return ""
    root = node
    while isinstance(root, (ast.Attribute, ast.Subscript, ast.Call)):
        root = root.func if isinstance(root, ast.Call) else root.value
    if isinstance(root, ast.Name) and root.id in modules:
        return f"a change of {ast.unparse(node)}"
    return ""


# ---- how it is loaded -----------------------------------------------------------------------


def defined(tree):
    """The names of the graded functions that a file defines or imports, in the units' order."""
    names = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {name.asname or name.name for name in node.names}
        elif isinstance(node, ast.Assign):
            names |= {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    return [name for name in all_graded() if name in names]


def unwritten(tree, name):
    """The methods, or the function, whose body is still `raise NotImplementedError`."""
    found = []
    methods = all_graded()[name].methods
    for node in tree.body:
        if getattr(node, "name", "") != name:
            continue
        parts = node.body if isinstance(node, ast.ClassDef) else [node]
        for part in parts:
            if is_stub(part) and (part is node or part.name in methods):
                found.append(name if part is node else f"{name}.{part.name}")
    return found


def is_stub(node):
    """A function with nothing but a docstring and `raise NotImplementedError`, or `pass`."""
    if not isinstance(node, ast.FunctionDef):
        return False
    body = [part for part in node.body if not is_text(part)]
    written = [part for part in body if not isinstance(part, ast.Pass)]
    return not written or (
        isinstance(written[0], ast.Raise) and "NotImplementedError" in ast.unparse(written[0])
    )


def is_text(node):
    """A docstring, or `...`."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def execute(path):
    """The file as a module, run. Raises whatever it raises."""
    spec = importlib.util.spec_from_file_location("student", path)
    student = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(student)
    return student


def load(path):
    """The file, read and run: (module, its syntax tree). Raises Refused."""
    tree = parse(path)
    check(path, tree)
    if not defined(tree):
        raise Refused(
            f"{path}: defines none of the graded functions; "
            "`python -m tests.coursework.specify NEW_FILE.py` writes them down"
        )
    try:
        return execute(path), tree
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit, too
        raise Refused(f"{path}{line_in(error, path)}: {told(error)}; correct it") from None


def told(error):
    """An exception in a few words on one line."""
    words = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def line_in(error, path):
    """ ":12", the last line of the file that an exception came through; "" if it did not."""
    found = ""
    trace = error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == str(path):
            found = f":{trace.tb_lineno}"
        trace = trace.tb_next
    return found


# ---- whose function it is -------------------------------------------------------------------


def problem_of(value, graded, path):
    """Why a graded name of the file cannot be taken as the student's work; "" if it can."""
    if not graded.methods:
        return problem_of_function(value, graded.name, path)
    if not inspect.isclass(value):
        return f"{graded.name} has to be a class"
    for method in graded.methods:
        own = vars(value).get(method)
        if own is None:
            return f"your class {graded.name} defines no {method}: write it there"
        problem = problem_of_function(own, f"{graded.name}.{method}", path)
        if problem:
            return problem
    return ""


def problem_of_function(value, name, path):
    value = inspect.unwrap(value) if callable(value) else value
    if getattr(value, "lent", False):
        return f"{name} is the project's own: write it yourself"
    if isinstance(value, functools.partial):
        return f"{name} is a functools.partial: write it as a function"
    if not isinstance(value, types.FunctionType):
        return f"{name} is no function of your file: write it as one"
    file = value.__code__.co_filename
    if file == str(path):
        return ""
    if Path(file).parent == ROOT:
        return f"{name} is the project's own ({Path(file).name}): write it yourself"
    return f"{name} comes from {Path(file).name}, not from your file: write it there"


def same_as_project(tree):
    """Functions of some length with the project's very code, but for names and comments.

    It is for the teacher: short functions can hardly be written otherwise, so only those of four
    statements or more are looked at. No points are taken.
    """
    return [name for name in defined(tree) if is_the_projects(tree, name)]


def is_the_projects(tree, name):
    graded = all_graded()[name]
    source = (ROOT / f"{graded.module}.py").read_text(encoding="utf-8")
    theirs = [shape(part) for part in parts_of(tree, graded)]
    ours = [shape(part) for part in parts_of(ast.parse(source), graded)]
    long = sum(text.count("\n") for text in theirs) >= 4
    return long and theirs == ours


def parts_of(tree, graded):
    """The functions of a file that are graded under a name."""
    found = []
    for node in tree.body:
        if getattr(node, "name", "") == graded.name:
            methods = [
                part for part in node.body if getattr(part, "name", "") in graded.methods
            ]
            found += methods if graded.methods else [node]
    return found


def shape(function):
    """The text of a function without its docstring, its names numbered as they come."""
    function = ast.parse(ast.unparse(function)).body[0]
    function.body = [part for part in function.body if not is_text(part)] or [ast.Pass()]
    numbers = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Name):
            node.id = f"v{numbers.setdefault(node.id, len(numbers))}"
        if isinstance(node, ast.arg):
            node.arg = f"v{numbers.setdefault(node.arg, len(numbers))}"
            node.annotation = None
    return ast.unparse(function)


# ---- how its functions are put in -----------------------------------------------------------


def put_in(name, value):
    """Put a function in the place of the project's, wherever a module has it by its name.

    Returns the places as (module, what was there), for `put_back`.
    """
    original = vars(importlib.import_module(all_graded()[name].module))[name]
    places = []
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get(name) is original:
            setattr(module, name, value)
            places.append((module, original))
    return places


def put_back(name, places):
    for module, original in places:
        setattr(module, name, original)
