"""Thirty made-up submissions, right, wrong and harmful, to try mark.py on.

python -m tests.coursework.submissions FOLDER
python -m tests.coursework.mark FOLDER MARKS.csv
"""

import ast
import builtins
import functools
import importlib
import sys
import tempfile
from pathlib import Path

from tests.coursework.command import make_parser
from tests.coursework import specify
from tests.coursework.units import UNITS, all_graded
from tests.coursework.wrong import WRONG

MODULES = ("t5_small", "data", "identifiers", "ppo")


@functools.cache
def empty():
    """The exercise as specify.py writes it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "exercise.py"
        specify.write(path)
        return path.read_text(encoding="utf-8")


def projects_body(name, method=""):
    """The statements of a function of the project, or of a method."""
    node = of_the_project(all_graded()[name].module)[name]
    if method:
        node = definitions(node.body)[method]
    return node.body


@functools.cache
def of_the_project(module):
    """name -> node, of a module's functions and classes."""
    file = Path(importlib.import_module(module).__file__)
    return definitions(ast.parse(file.read_text(encoding="utf-8")).body)


def definitions(body):
    return {node.name: node for node in body if hasattr(node, "name")}


def solved(names, rest=True):
    """The exercise with some functions written as the project has them; without rest no others."""
    tree = ast.parse(empty())
    for name in names:
        node = definitions(tree.body)[name]
        methods = all_graded()[name].methods
        for method in methods:
            definitions(node.body)[method].body = projects_body(name, method)
        if not methods:
            node.body = projects_body(name)
    if not rest:
        others = all_graded().keys() - set(names)
        tree.body = [node for node in tree.body if getattr(node, "name", "") not in others]
    return imports_of(tree) + "\n" + ast.unparse(tree) + "\n"


def imports_of(tree):
    """What the bodies use of the project and the exercise does not import."""
    used, known = set(), set(dir(builtins)) | set(definitions(tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            used.add(node.id)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            known.update((alias.asname or alias.name) for alias in node.names)
    lines = []
    for name in sorted(used - known):
        for module in MODULES:
            if hasattr(importlib.import_module(module), name):
                lines.append(f"from {module} import {name}")
                break
    return "\n".join(lines)


def with_mistakes(names):
    """All written, some wrong: a mistake of wrong.py in each of these."""
    text = solved(all_graded())
    for name in names:
        right, wrong = WRONG[name][0]
        right, wrong = plain(right), plain(wrong)
        if text.count(right) < 1:
            raise ValueError(f"{name}: the exercise has no {right!r}")
        start = text.index(f" {name}(")
        head, tail = text[:start], text[start:]
        text = head + tail.replace(right, wrong, 1)
    return text


def plain(code):
    """As ast.unparse writes it, as far as these pieces need it."""
    return code.replace("1e-4", "0.0001").replace('"', "'")


def unit(number):
    return [graded.name for graded in UNITS[number - 1].functions]


KL = "import torch\ndef kl_estimate(log_probs, ref_log_probs, kind='k1'):\n"
RIGHT = """    d = log_probs - ref_log_probs
    return d if kind == 'k1' else torch.exp(-d) - 1 + d
"""
GAE = "def gae(rewards, values, mask, gamma=1.0, lam=0.95):\n"


def honest():
    """Right, partly right and wrong."""
    half = [*unit(1), *unit(2), *unit(3)]
    return {
        "all right": solved(all_graded()),
        "empty exercise": empty(),
        "units 1 to 3": solved(half),
        "only unit 6": solved(unit(6), rest=False),
        "one function": solved(["response_mask"]),
        "one mistake": with_mistakes(["class_weights"]),
        "four mistakes": with_mistakes(["whiten", "policy_loss", "mean_pool", "value_loss"]),
        "returns nothing": f"{KL}    log_probs - ref_log_probs\n",
        "wrong shape": f"{KL}    return (log_probs - ref_log_probs).sum()\n",
        "changes arguments": f"{KL}    log_probs -= ref_log_probs\n    return log_probs\n",
        "reseeds torch": f"{KL}    torch.manual_seed(0)\n{RIGHT}",
        "misses an import": f"{KL}    return np.subtract(log_probs, ref_log_probs)\n",
    }


def harmful():
    """Endless, large, loud; kl_estimate is right where it is reached."""
    pieces = "    found = []\n    while True:\n        found.append(torch.ones(10**8))\n"
    return {
        "endless loop": f"{KL}{RIGHT}{GAE}    while True:\n        pass\n",
        "endless at import": f"{KL}{RIGHT}while True:\n    pass\n",
        "memory bomb": f"{KL}{RIGHT}{GAE}    return torch.ones(10**12), 1\n",
        "memory in pieces": f"{KL}{RIGHT}{GAE}{pieces}",
        "recursion": f"{KL}{RIGHT}{GAE}    return gae(rewards, values, mask)\n",
        "prints a lot": f"{KL}    print('x' * 10**7)\n{RIGHT}",
    }


def no_programs():
    return {
        "syntax error": "def gae(:\n    return 1\n",
        "nothing in it": "",
        "=1+1 only a comment": "# =HYPERLINK(0)\n",
        "binary": bytes(range(256)) * 20,
        "raises at import": f"{KL}{RIGHT}1 / 0\n",
    }


def cheats():
    source = "    exec(inspect.getsource(ppo.gae))\n"
    call = "    return ppo.gae(rewards, values, mask, gamma, lam)\n"
    return {
        "imports the project's": "from ppo import gae, whiten, policy_loss, value_loss\n",
        "ends at import": f"import sys\n{KL}{RIGHT}sys.exit(0)\n",
        "ends inside": f"{KL}{RIGHT}{GAE}    raise SystemExit(0)\n",
        "kills": f"import os\n{KL}{RIGHT}{GAE}    os._exit(0)\n",
        "changes torch": f"{KL}{RIGHT}torch.isclose = lambda *a, **k: torch.ones(1) > 0\n",
        "reads the project": f"import inspect\nimport ppo\n{GAE}{source}",
        "calls the project's": f"import ppo\n{GAE}{call}",
    }


def texts():
    """name -> what the file has."""
    return {**honest(), **harmful(), **no_programs(), **cheats()}


def make(folder, names=None):
    """Write them, or some."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts().items():
        if names is None or name in names:
            content = text if isinstance(text, bytes) else text.encode()
            (folder / f"{name}.py").write_bytes(content)


def main():
    parser = make_parser("submissions", __doc__)
    parser.add_argument("folder", help="a new folder")
    folder = Path(parser.parse_args().folder)
    if folder.exists():
        parser.exit(2, f"{folder} exists; name a new folder\n")
    make(folder)
    print(f"written: {len(texts())} submissions in {folder}")


if __name__ == "__main__":
    sys.exit(main())
