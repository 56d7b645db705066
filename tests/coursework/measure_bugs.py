"""What each silent bug does to the curves: python -m tests.coursework.measure_bugs RUN0 RUN1 RUN2

RUN0 .. are finished toy runs of different seeds. For each bug and run this is the command that
plant.py prints, in a copy with the bug; stages that the bug does not touch are taken from the
finished run. About half an hour for three runs. Writes bugs.json and bugs.png beside this file;
what bugs.json has already is not measured again.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from tests.coursework.command import make_parser
from tests.coursework.plant import BUGS, SETTINGS, plant, run_without_pictures

HERE = Path(__file__).resolve().parent
PANELS = ("reward", "kl", "length", "value_loss", "explained_variance")
FIGURES = ("emp_f1", "oracle_emp_f1")  # of the replies of both policies
KEPT = {  # bug -> the stages before PPO that are not trained again with it
    7: ("pretrain", "mle"),
    8: ("pretrain",),
}
ALL_KEPT = ("pretrain", "mle", "identifiers", "judge", "context")


def train_with(bug, run, settings=SETTINGS):
    """The figures of the printed command in a copy with a bug (0: none)."""
    config = json.loads((Path(run) / "config.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        plant(bug, copy)
        checkpoints = copy / "run" / "checkpoints"
        checkpoints.mkdir(parents=True)
        for stage in KEPT.get(bug, ALL_KEPT):
            shutil.copy(Path(run) / "checkpoints" / f"{stage}.pt", checkpoints)
        words = ["--run", "run", "--preset", config["preset"], "--seed", config["seed"]]
        if run_without_pictures("emprl", [*words, "--set", *settings], copy):
            raise RuntimeError(f"the copy with bug {bug} does not run")
        return figures_of(copy / "run")


def figures_of(run):
    """{"ppo": a record for each iteration, "mle": Emp-F1s, "emprl": Emp-F1s}, rounded."""
    records = []
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["stage"] == "ppo":
            records.append(rounded(record, PANELS))
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    figures = {policy: rounded(metrics[policy], FIGURES) for policy in ("mle", "emprl")}
    return {"ppo": records, **figures}


def rounded(figures, keys):
    return {key: round(figures[key], 4) for key in keys}


def measure(runs, path):
    """Figures of all bugs and runs, by "bug/number of the run", kept in a file as they come."""
    figures = {}
    if path.exists():
        figures = json.loads(path.read_text(encoding="utf-8"))
    for i, run in enumerate(runs):
        for bug in [0, *BUGS]:
            name = f"{bug}/{i}"
            if name in figures:
                continue
            figures[name] = train_with(bug, run)
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(figures) + "\n", encoding="utf-8")
            temporary.replace(path)
            print(f"bug {bug}, run {i}", flush=True)
    return figures


def table(figures):
    """A line of Markdown for each bug: from the first two iterations to the last three."""
    lines = []
    for bug in [0, *BUGS]:
        of_bug = [found for name, found in figures.items() if name.startswith(f"{bug}/")]
        cells = [str(bug or "none")]
        for key, digits in zip(PANELS, (3, 2, 1, 2, 2)):
            first = mean(mean_of(found["ppo"][:2], key) for found in of_bug)
            last = mean(mean_of(found["ppo"][-3:], key) for found in of_bug)
            first, last = round(first, digits) + 0.0, round(last, digits) + 0.0  # no -0.00
            cells.append(f"{first:.{digits}f} to {last:.{digits}f}")
        for policy in ("mle", "emprl"):
            cells.append(
                f"{mean_of([found[policy] for found in of_bug], 'oracle_emp_f1'):.3f}"
            )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def mean(numbers):
    numbers = list(numbers)
    return sum(numbers) / len(numbers)


def mean_of(records, key):
    return mean(record[key] for record in records)


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
    """A quantity of all runs with a bug; iterations count from 1."""
    for name, found in figures.items():
        if name.startswith(f"{bug}/"):
            values = [record[key] for record in found["ppo"]]
            axis.plot(range(1, len(values) + 1), values, color=colour, lw=1)


def main():
    parser = make_parser("measure_bugs", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a finished toy run")
    runs = parser.parse_args().runs
    for run in runs:
        if not (Path(run) / "metrics.json").exists():
            parser.exit(2, f"{run}: no finished run there; make one with python emprl.py\n")
    figures = measure(runs, HERE / "bugs.json")
    draw(figures, HERE / "bugs.png")
    print(table(figures))
    print(f"written: {HERE / 'bugs.json'}, {HERE / 'bugs.png'}")


if __name__ == "__main__":
    sys.exit(main())
