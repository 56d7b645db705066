"""Run the cells of train.ipynb without Jupyter: python tests/notebook.py [--write]

Prints how long each cell took. --write stores what the cells printed and drew in the notebook, as Jupyter would, and which
source they came from: test_notebook.py tells when a cell has been changed since.
"""

import ast
import base64
import contextlib
import hashlib
import io
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def outputs_of(source, namespace):
    """Execute one cell. A last line that is an expression is shown, unless a semicolon ends it."""
    tree, printed, outputs = ast.parse(source), io.StringIO(), []
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "<cell>", "exec"), namespace)
        value = (
            eval(compile(ast.Expression(last.value), "<cell>", "eval"), namespace)
            if last
            else None
        )
    if value is not None and not source.rstrip().endswith(";"):
        printed.write(f"{value!r}\n")
    if printed.getvalue():
        outputs.append(
            {
                "name": "stdout",
                "output_type": "stream",
                "text": printed.getvalue().splitlines(True),
            }
        )
    for number in plt.get_fignums():
        picture = io.BytesIO()
        plt.figure(number).savefig(picture, format="png")
        outputs.append(
            {
                "output_type": "display_data",
                "metadata": {},
                "data": {
                    "image/png": base64.b64encode(picture.getvalue()).decode(),
                    "text/plain": ["<Figure>"],
                },
            }
        )
    plt.close("all")
    return outputs


def run(notebook, reduced=False, progress=lambda text: None):
    """Execute all code cells in order in one namespace and store their outputs in them. Returns the namespace."""
    namespace, count = {"__name__": "__main__"}, 0
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        count, started, source = count + 1, time.time(), "".join(cell["source"])
        if reduced:
            source = source.replace("REDUCED = False", "REDUCED = True")
        cell["outputs"], cell["execution_count"] = outputs_of(source, namespace), count
        progress(
            f"cell {count:2d}  {time.time() - started:6.1f} s  {source.splitlines()[0][:80]}"
        )
    return namespace


def source_hash(notebook):
    """Of all code cells."""
    code = [
        "".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"
    ]
    return hashlib.sha256("\n".join(code).encode()).hexdigest()


if __name__ == "__main__":
    path = ROOT / "train.ipynb"
    content = json.loads(path.read_text(encoding="utf-8"))
    run(content, progress=lambda text: print(text, flush=True))
    if "--write" in sys.argv:
        content["metadata"]["executed_source"] = source_hash(content)
        path.write_text(
            json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        print(f"outputs stored in {path.name}")
