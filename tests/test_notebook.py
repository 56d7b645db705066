"""train.ipynb: every cell runs, in its reduced setting and without Jupyter, and the committed outputs are whole."""

import json
import re

import pytest

import notebook

CONTENT = json.loads((notebook.ROOT / "train.ipynb").read_text(encoding="utf-8"))


@pytest.mark.filterwarnings(
    "error", "ignore:builtin type:DeprecationWarning"
)  # the last: sentencepiece's import
def test_every_cell_runs_without_a_warning(capsys):
    namespace = notebook.run(json.loads(json.dumps(CONTENT)), reduced=True)
    assert namespace["REDUCED"] and set(namespace["replies"]) == {"MLE", "EmpRL", "no KL"}


def test_committed_outputs_are_of_these_cells():
    assert CONTENT["metadata"]["executed_source"] == notebook.source_hash(CONTENT), (
        "run: python tests/notebook.py --write"
    )


def test_figures_of_the_real_data_are_those_of_the_results():
    text = next(
        "".join(cell["source"])
        for cell in CONTENT["cells"]
        if "## 13. Real data" in "".join(cell["source"])
    )
    m = json.loads(
        (notebook.ROOT / "tests" / "results" / "real-seed0.json").read_text(encoding="utf-8")
    )
    known = [
        m[policy][key]
        for policy in ("sft", "emprl")
        for key in ("emp_f1", "judge_emp_f1", "perplexity", "reward")
    ]
    known += [m["identifiers"][mechanism]["macro_f1"] for mechanism in ("er", "ip", "ex")]
    found = re.findall(r"\d+\.\d{3}", text)
    assert set(found) <= {f"{x:.3f}" for x in known} and len(found) == 11, (
        "correct the text of section 13"
    )


def test_committed_outputs_are_of_one_run_from_top_to_bottom():
    code = [cell for cell in CONTENT["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert all(
        cell["outputs"]
        for cell in code
        if "plt." in "".join(cell["source"]) and "import" not in "".join(cell["source"])
    )
    assert "REDUCED = False" in "".join(code[0]["source"]) and all(
        len(cell["source"]) <= 15 for cell in code
    )
