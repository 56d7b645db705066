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


def test_figures_in_the_text_are_those_of_the_results():
    """Every decimal and percentage in the prose of "Results" is in a table above or below it, or a macro-F1, or a rise in perplexity."""
    section = README[README.index("## Results"):README.index("## The files")]
    prose = "\n".join(line for line in section.splitlines() if not line.startswith("|"))
    runs = {path.stem: json.loads(path.read_text()) for path in (ROOT / "tests" / "results").glob("*-seed*.json")}
    known = {0.95, *(m[who][mechanism]["macro_f1"] for m in runs.values() for who in ("identifiers", "judge") for mechanism in ("er", "ip", "ex")),
             *(m["emprl"]["perplexity"] / m["sft"]["perplexity"] - 1 for m in runs.values()), 0.64, 0.53, 0.58}       # the last three: TF-IDF, DESIGN
    tables = {word.strip("()+-,%") for line in section.splitlines() if line.startswith("|") for word in line.split()}
    for text, percent in re.findall(r"(?<![\d.])(\d+\.\d+|\d+(?= %))( %)?", prose):
        digits = len(text.partition(".")[2])
        right = text in tables or any(f"{float(x):.{digits}f}" == text for x in tables if re.fullmatch(r"\d+\.\d+", x)) or any(f"{abs(x) * (100 if percent else 1):.{digits}f}" == text for x in known)
        assert right, f"{text}{percent} is in no results file: correct README's text"


@pytest.mark.parametrize("name", [*ablate.ABLATIONS, "own"])
def test_open_tasks_show_the_committed_results(name):
    page = (ROOT / "tests" / "coursework" / "open.md").read_text()
    start, end = publish.shown(page, f"tests/results/ablate-{name}.json")
    assert page[start:end] == ablate.published(name), f"run: python tests/ablate.py {name}"
    assert all(len(by_seed) >= 3 for by_seed in json.loads((ROOT / "tests" / "results" / f"ablate-{name}.json").read_text()).values())


def test_five_modules_within_the_budget():
    """DESIGN, section 2: together under 2,000 lines, none over 500."""
    lines = {name: len((ROOT / name).read_text().splitlines()) for name in ("data.py", "t5_small.py", "identifiers.py", "ppo.py",
                                                                            "emprl.py")}
    assert max(lines.values()) <= 500 and sum(lines.values()) < 2000, lines
