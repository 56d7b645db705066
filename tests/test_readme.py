"""The README's figures are those of the committed results, letter by letter, and the house is as DESIGN draws it."""
import json
from pathlib import Path

import pytest

import publish

ROOT = Path(publish.ROOT)
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", ["toy-seed0", "real-seed0"])
def test_tables_agree_with_the_committed_results(name):
    metrics = json.loads((ROOT / "tests" / "results" / f"{name}.json").read_text())
    start, end = publish.shown(README, f"tests/results/{name}.json")
    assert README[start:end] == publish.table(metrics), "run: python tests/publish.py RUN NAME"
    assert "| emp_f1 |" in README[start:end] and README[start:end].count("\n") > 15


def test_table_of_seeds_agrees():
    start, end = publish.shown(README, "tests/publish.py")
    assert README[start:end] == publish.seeds() and README[start:end].count("\n") == 4, "header, rule, three seeds"


def test_five_modules_within_the_budget():
    """DESIGN, section 2: together under 2,000 lines, none over 500."""
    lines = {name: len((ROOT / name).read_text().splitlines()) for name in ("data.py", "t5_small.py", "identifiers.py", "ppo.py",
                                                                            "emprl.py")}
    assert max(lines.values()) <= 500 and sum(lines.values()) < 2000, lines
