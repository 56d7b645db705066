"""Run the cells of train.ipynb without Jupyter, about four minutes on two cores.

    python -m tests.lab.notebook             prints how long each cell takes
    python -m tests.lab.notebook --write     also stores in it what the cells print and draw

As Jupyter would. Stored with it is which source the outputs came from, so that test_notebook.py
can tell when a cell has been changed since.
"""

import ast
import base64
import contextlib
import io
import json
import sys
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from emprl import digest_bytes
from tests.lab.command import Parser, start

PATH = Path(__file__).resolve().parent.parent.parent / "train.ipynb"


def read():
    """The notebook, as the dict that its file holds."""
    return json.loads(PATH.read_text(encoding="utf-8"))


def write(notebook):
    text = json.dumps(notebook, indent=1, ensure_ascii=False)
    PATH.write_text(text + "\n", encoding="utf-8")


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def source_hash(notebook):
    """Of all code cells."""
    sources = ["".join(cell["source"]) for cell in code_cells(notebook)]
    return digest_bytes("\n".join(sources).encode())


def execute(source, namespace):
    """Run one cell. A last line that is an expression is shown, unless a semicolon ends it."""
    tree = ast.parse(source)
    shown = []
    if isinstance(tree.body[-1], ast.Expr) and not source.rstrip().endswith(";"):
        shown.append(tree.body.pop())
    exec(compile(tree, "<cell>", "exec"), namespace)
    exec(compile(ast.Interactive(shown), "<cell>", "single"), namespace)  # prints its value


def figures():
    """All figures that are open, as outputs of a cell; they are closed.

    A figure's label, which pictures.show sets, is the text for people who cannot see it. It
    goes where Jupyter puts the alt text of a picture, and screen readers find it.
    """
    outputs = []
    for figure in map(plt.figure, plt.get_fignums()):
        picture = io.BytesIO()
        figure.savefig(picture, format="png")
        alt = figure.get_label()
        output = {
            "output_type": "display_data",
            "metadata": {"image/png": {"alt": alt}},
            "data": {
                "image/png": base64.b64encode(picture.getvalue()).decode(),
                "text/plain": [f"<Figure: {alt}>"],
            },
        }
        outputs.append(output)
    plt.close("all")
    return outputs


def outputs_of(source, namespace):
    """What a cell prints and draws, in the notebook's format."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        execute(source, namespace)
    outputs = figures()
    lines = printed.getvalue().splitlines(keepends=True)
    if lines:
        outputs.insert(0, {"name": "stdout", "output_type": "stream", "text": lines})
    return outputs


def run(notebook, reduced=False):
    """Execute all cells in one namespace and store their outputs. Returns the namespace."""
    namespace = {"__name__": "__main__"}
    for number, cell in enumerate(code_cells(notebook), 1):
        source = "".join(cell["source"])
        if reduced:
            source = source.replace("REDUCED = False", "REDUCED = True")
        started = time.time()
        cell["outputs"] = outputs_of(source, namespace)
        cell["execution_count"] = number
        seconds = time.time() - started
        print(f"cell {number:2d}  {seconds:6.1f} s  {source.splitlines()[0][:70]}", flush=True)
    return namespace


def main():
    parser = Parser(__doc__)
    parser.add_argument("--write", action="store_true", help="store the outputs")
    arguments = parser.parse_args()
    notebook = read()
    run(notebook)
    if arguments.write:
        notebook["metadata"]["executed_source"] = source_hash(notebook)
        write(notebook)
        print(f"outputs stored in {PATH.name}")


if __name__ == "__main__":
    sys.exit(start(main))
