"""What each silent bug does to the curves: python -m tests.coursework.measure_bugs RUN0 RUN1 RUN2

RUN0 .. are finished toy runs of different seeds. For each bug and run, PPO's first 15 iterations
are repeated in a copy with the bug (bug 7 also retrains the identifiers there, bug 8 the MLE
policy; bug 9 changes a figure only and is left out). About an hour for three runs. Writes
bugs.json and bugs.png beside this file; what bugs.json has already is not measured again.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from tests.coursework.plant import BUGS, plant

HERE = Path(__file__).resolve().parent
PANELS = ("reward", "kl", "length", "value_loss")


def short_run(bug, run, settings=()):
    """The records of a short run with a bug (0: none): see short_run.py."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        plant(bug, copy)
        shutil.copy(HERE / "short_run.py", copy)
        command = [sys.executable, "short_run.py", str(Path(run).resolve()), str(bug)]
        done = subprocess.run(
            [*command, *settings],
            cwd=copy,
            stdout=subprocess.PIPE,
            check=True,
            encoding="utf-8",
        )
    return json.loads(done.stdout.splitlines()[-1])


def measure(runs, path):
    """Records of all bugs and runs, by "bug/number of the run", kept in a file as they come."""
    figures = {}
    if path.exists():
        figures = json.loads(path.read_text(encoding="utf-8"))
    for bug in [0, *BUGS]:
        for i, run in enumerate(runs):
            name = f"{bug}/{i}"
            if bug == 9 or name in figures:
                continue
            figures[name] = short_run(bug, run)
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(figures) + "\n", encoding="utf-8")
            temporary.replace(path)
            print(f"bug {bug}, run {i}", flush=True)
    return figures


def draw(figures, path):
    """A row for each quantity, a column for each bug; the grey curves are without a bug."""
    bugs = sorted({int(name.split("/")[0]) for name in figures} - {0})
    figure, axes = plt.subplots(
        len(PANELS),
        len(bugs),
        figsize=(1.9 * len(bugs), 1.7 * len(PANELS)),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for row, key in zip(axes, PANELS):
        row[0].set_ylabel(key.replace("_", " "), fontsize=8)
        for axis, bug in zip(row, bugs):
            draw_curves(axis, figures, 0, key, "#888888")
            draw_curves(axis, figures, bug, key, "#E69F00")
            axis.tick_params(labelsize=6)
    for axis, bug in zip(axes[0], bugs):
        axis.set_title(f"bug {bug}", fontsize=8)
    figure.supxlabel(
        "PPO iteration (grey: correct, orange: with the bug; one line a seed)", fontsize=8
    )
    figure.savefig(path, dpi=80)


def draw_curves(axis, figures, bug, key, colour):
    """A quantity of all runs with a bug."""
    for name, records in figures.items():
        if name.startswith(f"{bug}/"):
            axis.plot([record[key] for record in records], color=colour, lw=1)


def main():
    parser = argparse.ArgumentParser(
        prog="python -m tests.coursework.measure_bugs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a finished toy run")
    runs = parser.parse_args().runs
    for run in runs:
        if not (Path(run) / "metrics.json").exists():
            parser.exit(2, f"{run}: no finished run there; make one with python emprl.py\n")
    figures = measure(runs, HERE / "bugs.json")
    draw(figures, HERE / "bugs.png")
    print(f"written: {HERE / 'bugs.json'}, {HERE / 'bugs.png'}")


if __name__ == "__main__":
    sys.exit(main())
