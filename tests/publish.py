"""Publish a finished run: python tests/publish.py RUN NAME

Copies RUN/metrics.json to tests/results/NAME.json (with the data folder's path as the README has it) and writes the tables
of README.md anew: before and after below "(tests/results/NAME.json)", all seeds of the toy preset below "(tests/publish.py)".
"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import emprl

ROOT = Path(emprl.__file__).parent
LEFT_OUT = ("_er", "_ip", "_ex")        # by mechanism: in tests/results, too long for a README


def table(metrics):
    """The rows of the report that the README shows."""
    rows = emprl.before_after(metrics).splitlines()
    return "\n".join(row for row in rows if not row.split(" | ")[0].endswith(LEFT_OUT))


def seeds():
    """One row for each committed toy run: the oracle's Emp-F1, the share of the gap to the ceiling, and what it cost; their means."""
    rows, shares = [], []
    for path in sorted((ROOT / "tests" / "results").glob("toy-seed*.json")):
        m = json.loads(path.read_text())
        before, after, best = m["sft"], m["emprl"], m["ceiling"]["best"]["oracle_emp_f1"]
        old, new = before["oracle_emp_f1"], after["oracle_emp_f1"]
        shares.append((new - old) / (best - old))
        rows.append([m["seed"], old, new, best, "{relative:+.1%} ({low:+.1%} to {high:+.1%})".format(**m["gain"]["oracle_emp_f1"]),
                     f"{shares[-1]:.0%}", *(after[k] / before[k] for k in ("perplexity", "dist2", "unique")), after["reward"],
                     after["held_out_reward"]])
    mean = [sum(column) / len(rows) for column in zip(*([x for x in row[1:] if isinstance(x, float)] for row in rows))]
    rows.append(["mean", *mean[:3], "", f"{sum(shares) / len(shares):.0%}", *mean[3:]])
    return emprl.table(["seed", "MLE", "EmpRL", "ceiling", "gain, 95 % interval", "of the gap", "perplexity, times", "dist2, times",
                        "unique, times", "learnt reward", "oracle's"], rows)


def shown(readme, anchor):
    """(start, end) of the table below an anchor of the README."""
    start = readme.index("|", readme.index(f"({anchor})"))
    return start, (readme + "\n").index("\n\n", start)


def main(run, name):
    metrics = json.loads((Path(run) / "metrics.json").read_text())
    if metrics["config"]["data_dir"]:
        metrics["config"]["data_dir"] = "../shared/data"
    (ROOT / "tests" / "results" / f"{name}.json").write_text(json.dumps(metrics, indent=2) + "\n")
    readme = (ROOT / "README.md").read_text()
    for anchor, new in ((f"tests/results/{name}.json", table(metrics)), ("tests/publish.py", seeds())):
        if f"({anchor})" in readme:
            start, end = shown(readme, anchor)
            readme = readme[:start] + new + readme[end:]
    (ROOT / "README.md").write_text(readme)


if __name__ == "__main__":
    main(*sys.argv[1:])
