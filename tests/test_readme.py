"""The README's figures are those of the committed results, letter by letter, and the house is as DESIGN draws it."""
import json
from pathlib import Path

import pytest

import publish

ROOT = Path(publish.ROOT)


@pytest.mark.parametrize("name", ["toy-seed0", "real-seed0"])
def test_tables_agree_with_the_committed_results(name):
    metrics = json.loads((ROOT / "tests" / "results" / f"{name}.json").read_text())
    readme = (ROOT / "README.md").read_text()
    shown = readme[readme.index("|", readme.index(f"(tests/results/{name}.json)")):].split("\n\n")[0]
    assert shown == publish.table(metrics), "run: python tests/publish.py RUN NAME"
    assert "| emp_f1 |" in shown and shown.count("\n") > 15


def test_five_modules_within_the_budget():
    """DESIGN, section 2: together under 2,000 lines, none over 500."""
    lines = {name: len((ROOT / name).read_text().splitlines()) for name in ("data.py", "t5_small.py", "identifiers.py", "ppo.py",
                                                                            "emprl.py")}
    assert max(lines.values()) <= 500 and sum(lines.values()) < 2000, lines
