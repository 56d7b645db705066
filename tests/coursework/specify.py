"""Write the exercise: python tests/coursework/specify.py my_solution.py

Every graded function with its signature, docstring (formula, shapes, source) and a worked example, to be written
by the student. Grade it with: pytest tests --impl my_solution.py
"""

import ast
import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]
import torch

from data import command_line
from units import UNITS

HEADER = '''"""EmpRL coursework. Replace each `raise NotImplementedError`; what you delete falls back to the project's.

Legend of the shapes: B batch, S source length, T response length, D model width, H heads, V vocabulary, M = 3 mechanisms,
L = 3 levels. Grade it from the project's folder with: {grade}
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

import identifiers, ppo, t5_small
from t5_small import Dropout, T5Config

MECHANISMS, LEVELS = ("er", "ip", "ex"), 3
'''


def stub(function, lines):
    """The lines of a function with its body, but for the docstring, replaced."""
    documented = isinstance(function.body[0], ast.Expr) and isinstance(
        function.body[0].value, ast.Constant
    )
    head = lines[
        function.lineno - 1 : function.body[0].end_lineno
        if documented
        else function.body[0].lineno - 1
    ]
    return [*head, " " * function.body[0].col_offset + "raise NotImplementedError"]


def specification(name, graded):
    """Source of one exercise and the comment with its example."""
    module = importlib.import_module(graded.module)
    source = Path(module.__file__).read_text(encoding="utf-8")
    lines, node = (
        source.splitlines(),
        next(n for n in ast.parse(source).body if getattr(n, "name", "") == name),
    )
    if graded.methods:
        text, at = [], node.lineno - 1
        for method in node.body:
            if getattr(method, "name", "") in graded.methods:
                text += [*lines[at : method.lineno - 1], *stub(method, lines)]
                at = method.end_lineno
        text += lines[at : node.end_lineno]
    else:
        text = stub(node, lines)
    torch.manual_seed(0)
    value = eval(graded.example, {**vars(module), "tensor": torch.tensor})
    shown = " ".join(repr(value.detach() if torch.is_tensor(value) else value).split())
    return "\n".join(
        [
            f"# About {graded.minutes} minutes. Example: {graded.example}",
            f"#     gives {shown}",
            *text,
        ]
    )


def write(path):
    grade = command_line(["python", "-m", "pytest", "-q", "tests", "--impl", str(path)])
    grade = grade.replace("\\", "\\\\").replace('"', '\\"')  # it stands in a docstring
    parts = [HEADER.replace("{grade}", grade)]
    for unit, (effort, hint, functions) in UNITS.items():
        parts.append(f"# ---- {unit}: about {effort}. {hint}\n")
        parts += [specification(name, graded) + "\n" for name, graded in functions.items()]
    Path(path).write_text("\n\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2 or Path(sys.argv[1]).exists():
        sys.exit(
            "usage: python tests/coursework/specify.py NEW_FILE.py (it must not exist yet)"
        )
    write(sys.argv[1])
    grade = command_line(["python", "-m", "pytest", "-q", "tests", "--impl", sys.argv[1]])
    print(f"written: {sys.argv[1]}; grade it with: {grade}")
