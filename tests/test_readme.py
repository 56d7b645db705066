"""The README's figures are those of the committed results, letter by letter, and the house is as DESIGN draws it."""
import json
import re
from pathlib import Path

import pytest

import ablate
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
    assert README[start:end] == publish.seeds() and README[start:end].count("\n") >= 6, "header, rule, five seeds"


def numbers(value):
    """Every number in a results file."""
    if isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from numbers(inner)
    elif isinstance(value, (int, float)):
        yield value


def test_figures_in_the_text_are_those_of_the_results():
    """Every decimal and percentage in the prose of "Results" is a number of tests/results, or in a table made from them."""
    section = README[README.index("## Results"):README.index("## The files")]
    prose = "\n".join(line for line in section.splitlines() if not line.startswith("|"))
    known = {0.95}                                                               # of the intervals
    for path in (ROOT / "tests" / "results").glob("*-seed*.json"):
        known |= set(numbers(json.loads(path.read_text())))
    tables = {word.strip("()+-,%") for line in section.splitlines() if line.startswith("|") for word in line.split()}
    for text, percent in re.findall(r"(?<![\d.])(\d+\.\d+|\d+(?= %))( %)?", prose):
        digits = len(text.partition(".")[2])
        right = text in tables or any(f"{abs(x) * (100 if percent else 1):.{digits}f}" == text for x in known)
        assert right, f"{text}{percent} is in no results file: correct README's text"


@pytest.mark.parametrize("path", sorted((ROOT / "tests" / "results").glob("ablate-*.json")), ids=lambda path: path.stem)
def test_open_tasks_show_the_committed_results(path):
    page = (ROOT / "tests" / "coursework" / "open.md").read_text()
    start, end = publish.shown(page, f"tests/results/{path.name}")
    assert page[start:end] == ablate.published(path.stem.removeprefix("ablate-")), f"run: python tests/ablate.py {path.stem.removeprefix('ablate-')}"


def test_five_modules_within_the_budget():
    """DESIGN, section 2: together under 2,000 lines, none over 500."""
    lines = {name: len((ROOT / name).read_text().splitlines()) for name in ("data.py", "t5_small.py", "identifiers.py", "ppo.py",
                                                                            "emprl.py")}
    assert max(lines.values()) <= 500 and sum(lines.values()) < 2000, lines
