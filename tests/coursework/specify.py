"""Write the exercise: python -m tests.coursework.specify my_solution.py

Every graded function with its signature, its docstring (formula, shapes, source), what it leaves
open, and a worked example, for the student to write. It takes two seconds. Grade the file from the
project's folder with: python -m tests.coursework.grade my_solution.py
"""

import ast
import importlib
import re
import sys
import textwrap
from pathlib import Path

import torch

from emprl import command_line
from tests.coursework.command import make_parser
from tests.coursework.units import UNITS, all_graded

WIDTH = 95
HEADER = '''"""EmpRL coursework: replace each `raise NotImplementedError`.

Grade it from the project's folder, as often as you like, with:
{grade}

An example can be pasted: start `python -i {file}` in the project's folder (if your file is
in another one: `PYTHONPATH=. python -i {file}`), and paste its lines without the "# ".
What comes below it is what the project's own function gives.

You may delete what you do not write: the project's own is used in its place. If a function of yours
needs another graded one, call it by its module, such as identifiers.f1_scores(...) or ppo.gae(...):
then you get the project's while yours is graded, so that a mistake costs only once, and your own
when you train. Only what you are asked to write is refused: a function that is, or calls, the
project's own of the same name. Leave arguments as they are, and torch's global generator, too.
To train with your functions: python -m tests.coursework.train {file} --preset toy

Shapes: B batch, S source length, T response length, D model width, H heads, V vocabulary,
N examples, M = 3 mechanisms, L = 3 levels.

Not graded, and at hand: identifiers.confusions(predicted, gold) -> counts (M, L, L), rows gold;
ppo.masked_mean(x, mask); data.LEVELS, which is 3. A Sampling has temperature, top_k, top_p,
greedy, min_length and max_length.

References, as they are named below:
T5's paper            Raffel et al. 2020, arXiv 1910.10683; its code:
                      github.com/google-research/text-to-text-transfer-transformer
PPO's paper           Schulman et al. 2017, arXiv 1707.06347
GAE                   Schulman et al. 2016, arXiv 1506.02438
Ziegler et al.        "Fine-Tuning Language Models from Human Preferences", 2019, arXiv 1909.08593
"Approximating KL divergence"  joschu.net/blog/kl-approx.html
the paper             EmpRL: Ma et al. 2024, arXiv 2408.02976
EPITOME               Sharma et al. 2020, arXiv 2009.08441
Efron & Tibshirani    "An Introduction to the Bootstrap", 1993
scikit-learn, trl     libraries: scikit-learn.org, huggingface.co/docs/trl
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import tensor

import data
import identifiers
import ppo
import t5_small
from data import LEVELS, MECHANISMS
from t5_small import EOS_ID, HIDDEN, PAD_ID, Dropout, FeedForward, T5Config
'''


def grade_command(path):
    """The command that grades a student's file."""
    return command_line(["python", "-m", "tests.coursework.grade", str(path)])


# ---- a function without its body ------------------------------------------------------------


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
    return by_module(text + lines[copied : node.end_lineno], node.name)


def by_module(lines, own):
    """Other graded functions and classes, called by their module."""
    for graded in all_graded().values():
        if graded.name != own:
            name = re.compile(rf"(?<![\w.]){graded.name}\(")
            lines = [name.sub(f"{graded.module}.{graded.name}(", line) for line in lines]
    return lines


def subclass_stub(node, lines, graded):
    """A class that inherits all from the project's but the methods to be written."""
    text = [f"class {graded.name}({graded.module}.{graded.name}):"]
    text += lines[node.lineno : node.body[0].end_lineno]  # the docstring
    for part in node.body:
        if getattr(part, "name", "") in graded.methods:
            text += ["", *stub(part, lines)]
    return text


# ---- what stands above it -------------------------------------------------------------------


def example_value(graded):
    """What the last line of the example gives."""
    namespace = {}
    exec(header_imports(), namespace)
    torch.manual_seed(0)
    namespace[graded.name] = getattr(importlib.import_module(graded.module), graded.name)
    *statements, expression = graded.example.splitlines()
    exec("\n".join(statements), namespace)
    return eval(expression, namespace)


def header_imports():
    """The imports at the end of the header."""
    return HEADER[HEADER.index("import math") :]


def shown(value):
    """A value in one line, numbers without the history of their gradient."""
    if isinstance(value, tuple):
        return f"({', '.join(map(shown, value))})"
    if torch.is_tensor(value):
        value = value.detach()
        value = value + 0.0 if value.is_floating_point() else value  # no -0.0
    return " ".join(repr(value).split())


def comment(text, indent="# "):
    """A text as a comment; each of its paragraphs (lines) is wrapped."""
    lines = []
    for paragraph in text.splitlines():
        inner = "    " if paragraph[:1].isdigit() else ""
        lines += textwrap.wrap(
            paragraph,
            WIDTH,
            initial_indent=indent,
            subsequent_indent=indent + inner,
            break_long_words=False,
        )
    return lines


def exercise(graded):
    """The comment with points, what is left open and the example; the source without body."""
    module = importlib.import_module(graded.module)
    source = Path(module.__file__).read_text(encoding="utf-8")
    lines = source.splitlines()
    definitions = {getattr(node, "name", ""): node for node in ast.parse(source).body}
    node = definitions[graded.name]
    if graded.inherits:
        text = subclass_stub(node, lines, graded)
    elif graded.methods:
        text = class_stub(node, lines, graded.methods)
    else:
        text = stub(node, lines)
    above = comment(f"{graded.name}: {graded.points} points, about {graded.minutes} minutes.")
    above += comment(graded.mind)
    above += [f"# {line}" for line in ["Example:", *graded.example.splitlines()]]
    above += comment(shown(example_value(graded)), "#     ")
    return "\n".join([*above, *text])


# ---- the file -------------------------------------------------------------------------------


def write(path):
    """The whole exercise, unit by unit."""
    header = HEADER
    for name, value in {"{grade}": grade_command(path), "{file}": str(path)}.items():
        value = value.replace("\\", "\\\\").replace('"', '\\"')  # it stands in a docstring
        header = header.replace(name, value)
    parts = [header]
    for unit in UNITS:
        hours = f"about {unit.hours:g} hours, {unit.points} points"
        parts.append(f"# ---- {unit.title}: {hours} ----\n")
        parts += [exercise(graded) + "\n" for graded in unit.functions]
    Path(path).write_text("\n\n".join(parts), encoding="utf-8")


def main():
    parser = make_parser("specify", __doc__)
    parser.add_argument("file", help="a new file; it must not exist yet")
    path = parser.parse_args().file
    if Path(path).exists():
        parser.exit(2, f"{path} exists, and may be somebody's work; name a new file\n")
    try:
        write(path)
    except OSError as error:
        parser.exit(2, f"{path}: {error.strerror}; name another path\n")
    print(f"written: {path}; grade it with: {grade_command(path)}")


if __name__ == "__main__":
    sys.exit(main())
