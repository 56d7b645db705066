"""Publish a finished run: python tests/publish.py RUN NAME

Copies RUN/metrics.json to tests/results/NAME.json (with the data folder's path as the README has it) and writes its
table of before and after into README.md, where "(tests/results/NAME.json)" stands above it.
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


def main(run, name):
    metrics = json.loads((Path(run) / "metrics.json").read_text())
    if metrics["config"]["data_dir"]:
        metrics["config"]["data_dir"] = "../shared/data"
    (ROOT / "tests" / "results" / f"{name}.json").write_text(json.dumps(metrics, indent=2) + "\n")
    readme = (ROOT / "README.md").read_text()
    start = readme.index("|", readme.index(f"(tests/results/{name}.json)"))
    end = readme.index("\n\n", start)
    (ROOT / "README.md").write_text(readme[:start] + table(metrics) + readme[end:])


if __name__ == "__main__":
    main(*sys.argv[1:])
