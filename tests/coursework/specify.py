"""Write the exercise: python -m tests.coursework.specify my_solution.py

Every graded function with its signature, its docstring (formula, shapes, source) and a worked
example, for the student to write. It takes two seconds. Grade the file from the project's folder
with: python -m pytest -q tests --impl my_solution.py
"""

import argparse
import ast
import importlib
import sys
import textwrap
from pathlib import Path

import torch

from emprl import command_line
from tests.coursework.units import UNITS

HEADER = '''"""EmpRL coursework: replace each `raise NotImplementedError`.

What you delete is taken from the project. Grade it from the project's folder with:
{grade}

Shapes: B batch, S source length, T response length, D model width, H heads, V vocabulary,
M = 3 mechanisms, L = 3 levels.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

import identifiers
import ppo
import t5_small
from data import LEVELS, MECHANISMS
from t5_small import EOS_ID, HIDDEN, PAD_ID, T5Config
'''


def grade_command(path):
    """The command that grades a student's file."""
    return command_line(["python", "-m", "pytest", "-q", "tests", "--impl", str(path)])


def stub(function, lines):
    """The lines of a function with its body, but for the docstring, replaced."""
    body = function.body
    end = body[0].lineno - 1
    if ast.get_docstring(function):
        end = body[0].end_lineno
    indent = " " * body[0].col_offset
    return [*lines[function.lineno - 1 : end], indent + "raise NotImplementedError"]


def class_stub(node, lines, methods):
    """The lines of a class in which some methods are still to be written."""
    text = []
    copied = node.lineno - 1  # lines before this one are in text
    for part in node.body:
        if getattr(part, "name", "") in methods:
            text += lines[copied : part.lineno - 1]
            text += stub(part, lines)
            copied = part.end_lineno
    return text + lines[copied : node.end_lineno]


def example_value(graded, module):
    """What the example gives, in one line."""
    torch.manual_seed(0)
    value = eval(graded.example, {**vars(module), "tensor": torch.tensor})
    if torch.is_tensor(value):
        value = value.detach()
    return " ".join(repr(value).split())


def exercise(graded):
    """The comment with the example, and the source of one exercise."""
    module = importlib.import_module(graded.module)
    source = Path(module.__file__).read_text(encoding="utf-8")
    lines = source.splitlines()
    definitions = {getattr(node, "name", ""): node for node in ast.parse(source).body}
    node = definitions[graded.name]
    if graded.methods:
        text = class_stub(node, lines, graded.methods)
    else:
        text = stub(node, lines)
    example = [
        f"# About {graded.minutes} minutes. Example: {graded.example}",
        f"#     gives {example_value(graded, module)}",
    ]
    return "\n".join([*example, *text])


def write(path):
    """The whole exercise, unit by unit."""
    command = grade_command(path)
    command = command.replace("\\", "\\\\").replace('"', '\\"')  # it stands in a docstring
    parts = [HEADER.replace("{grade}", command)]
    for unit in UNITS:
        heading = f"---- {unit.title}: about {unit.hours:g} hours. {unit.hint}"
        comment = textwrap.wrap(heading, 95, initial_indent="# ", subsequent_indent="# ")
        parts.append("\n".join(comment) + "\n")
        parts += [exercise(graded) + "\n" for graded in unit.functions]
    Path(path).write_text("\n\n".join(parts), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(
        prog="python -m tests.coursework.specify",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", help="a new file; it must not exist yet")
    path = parser.parse_args().file
    if Path(path).exists():
        parser.exit(2, f"{path} exists, and may be somebody's work; name a new file\n")
    write(path)
    print(f"written: {path}; grade it with: {grade_command(path)}")


if __name__ == "__main__":
    sys.exit(main())
