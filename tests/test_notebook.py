"""train.ipynb runs, in its reduced setting and without Jupyter; its stored outputs are whole."""

import copy
import json
import re

import pytest

from tests.coursework.units import UNITS
from tests.lab import notebook

CONTENT = notebook.read()
RESULTS = notebook.PATH.parent / "tests" / "results"


def text_of(heading):
    """The markdown cell that holds a heading."""
    for cell in CONTENT["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown" and heading in text:
            return text
    raise AssertionError(f"no cell has {heading!r}")


@pytest.mark.filterwarnings(
    "error",
    "ignore:builtin type:DeprecationWarning",  # sentencepiece's import
)
def test_every_cell_runs_without_a_warning():
    namespace = notebook.run(copy.deepcopy(CONTENT), reduced=True)
    assert namespace["REDUCED"]
    assert set(namespace["test"].replies) == {"MLE", "EmpRL", "no KL"}


def test_committed_outputs_are_of_these_cells():
    stored = CONTENT["metadata"]["executed_source"]
    found = notebook.source_hash(CONTENT)
    assert stored == found, "run: python -m tests.lab.notebook --write"


def test_committed_outputs_are_of_one_run_from_top_to_bottom():
    cells = notebook.code_cells(CONTENT)
    counts = [cell["execution_count"] for cell in cells]
    assert counts == list(range(1, len(cells) + 1))
    assert "REDUCED = False" in "".join(cells[0]["source"])
    for cell in cells:
        source = "".join(cell["source"])
        if "plt." in source and "import" not in source:
            assert cell["outputs"], source


def test_cells_fit_the_page():
    """Short cells, and lines that a page shows without a scroll bar."""
    for cell in notebook.code_cells(CONTENT):
        lines = "".join(cell["source"]).splitlines()
        assert len(lines) <= 25, lines[0]
        assert max(len(line) for line in lines) <= 95, lines[0]


def test_figures_of_the_real_data_are_those_of_the_results():
    metrics = json.loads((RESULTS / "real-seed0.json").read_text(encoding="utf-8"))
    known = [metrics["identifiers"][name]["macro_f1"] for name in ("er", "ip", "ex")]
    for policy in ("sft", "emprl"):
        for key in ("emp_f1", "judge_emp_f1", "perplexity", "reward"):
            known.append(metrics[policy][key])
    found = re.findall(r"\d+\.\d{3}", text_of("## 13. Real data"))
    assert len(found) == 11, "correct the text of section 13"
    assert set(found) <= {f"{x:.3f}" for x in known}, "correct the text of section 13"


def test_its_last_section_has_the_units():
    text = text_of("## 14. Now build it yourself")
    for unit in UNITS:
        row = rf"^\| {re.escape(unit.title)}.* \| {unit.hours:g} hours \|$"
        assert re.search(row, text, re.MULTILINE), unit.title
