"""The README's figures are those of the committed results, row by row, and the house is as DESIGN draws it."""
import json
from pathlib import Path

import emprl

ROOT = Path(emprl.__file__).parent


def test_tables_agree_with_the_committed_results():
    """Each row of a results table in README stands, letter by letter, in the report of the run it belongs to."""
    readme = (ROOT / "README.md").read_text()
    for name in ("toy-seed0", "real-seed0"):
        metrics = json.loads((ROOT / "tests" / "results" / f"{name}.json").read_text())
        begin = readme.index(f"(tests/results/{name}.json)")
        table = readme[begin:].split("\n\n")[1].splitlines()
        report = emprl.before_after(metrics).splitlines()
        assert len(table) > 10 and table[2].startswith("| emp_f1 |"), table[:3]
        assert [row for row in table if row not in report] == [], name
