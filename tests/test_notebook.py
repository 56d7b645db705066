"""train.ipynb runs, in its reduced setting and without Jupyter; its stored outputs are whole, and
it teaches in order: no word before it is explained, each function from its source."""

import copy
import inspect
import json
import re

import pytest

import identifiers
import ppo
import t5_small
from tests.lab import notebook

CONTENT = notebook.read()
RESULTS = notebook.PATH.parent / "tests" / "results"
SECTIONS = (
    "The problem",
    "Reinforcement learning in twenty lines",
    "Data",
    "The model",
    "Maximum likelihood",
    "Measure",
    "Identifiers",
    "The empathy reward",
    "From REINFORCE to PPO",
    "Training",
    "Results",
    "Reward hacking",
    "Real data",
    "Exercises",
)
SHOWN = (
    ppo.gae,
    ppo.policy_loss,
    ppo.value_loss,
    ppo.token_rewards,
    ppo.kl_estimate,
    ppo.whiten,
    identifiers.empathy_reward,
    identifiers.f1_scores,
    t5_small.relative_position_bucket,
)
# where each is explained it stands in bold; nowhere before
EXPLAINED = ("policy gradient", "baseline", "Emp-F1", "value head", "advantage")


def source_of(cell):
    return "".join(cell["source"])


def texts():
    return [source_of(cell) for cell in CONTENT["cells"] if cell["cell_type"] == "markdown"]


def printed():
    """All that the cells have printed."""
    outputs = sum((cell["outputs"] for cell in notebook.code_cells(CONTENT)), [])
    return "".join("".join(output.get("text", [])) for output in outputs)


def pictures():
    """(the markdown that follows, the output) of each picture."""
    found = []
    cells = CONTENT["cells"]
    for i, cell in enumerate(cells):
        after = next((source_of(c) for c in cells[i:] if c["cell_type"] == "markdown"), "")
        found += [
            (after, o) for o in cell.get("outputs", []) if "image/png" in o.get("data", {})
        ]
    return found


@pytest.mark.filterwarnings(
    "error",
    "ignore:builtin type:DeprecationWarning",  # sentencepiece's import
)
def test_every_cell_runs_without_a_warning():
    namespace = notebook.run(copy.deepcopy(CONTENT), reduced=True)
    assert namespace["REDUCED"]
    assert {"mle", "best_of_n", "emprl", "beta 0"} <= set(namespace["test"].replies)


def test_committed_outputs_are_of_these_cells():
    stored = CONTENT["metadata"]["executed_source"]
    found = notebook.source_hash(CONTENT)
    assert stored == found, "run: python -m tests.lab.notebook --write"


def test_committed_outputs_are_of_one_run_from_top_to_bottom():
    cells = notebook.code_cells(CONTENT)
    counts = [cell["execution_count"] for cell in cells]
    assert counts == list(range(1, len(cells) + 1))
    assert "REDUCED = False" in source_of(cells[0])
    for cell in cells:
        if "show(" in source_of(cell):
            assert cell["outputs"], source_of(cell)


def test_cells_fit_the_page():
    """Short cells, and lines that a page shows without a scroll bar."""
    for cell in notebook.code_cells(CONTENT):
        lines = source_of(cell).splitlines()
        assert len(lines) <= 25, lines[0]
        assert max(len(line) for line in lines) <= 95, lines[0]


def test_sections_come_in_order():
    found = re.findall(r"^## (\d+)\. (.*)$", "\n".join(texts()), re.MULTILINE)
    assert [int(number) for number, _ in found] == list(range(1, len(SECTIONS) + 1))
    for (_, heading), wanted in zip(found, SECTIONS):
        assert heading.startswith(wanted)


@pytest.mark.parametrize("function", SHOWN, ids=lambda function: function.__name__)
def test_the_reader_sees_the_source_as_it_is(function):
    """Without its docstring, if that is long; what is shown has about 25 lines at most."""
    lines = inspect.getsource(function).splitlines()
    code = lines[-6:]
    shown = printed()
    assert f"def {function.__name__}(" in shown
    assert "\n".join(code) in shown
    begin = shown.index(f"def {function.__name__}(")
    end = shown.index(code[-1], shown.index("\n".join(code)))
    assert shown[begin:end].count("\n") < 27


@pytest.mark.parametrize("term", EXPLAINED)
def test_no_word_comes_before_its_explanation(term):
    """Its first occurrence, in text or code, is the bold one that explains it."""
    everything = "\n".join(source_of(cell) for cell in CONTENT["cells"])
    first = everything.lower().index(term.lower())
    explained = everything.index(f"**{term}**")
    assert first == explained + 2, everything[first - 60 : first + 60]


def test_every_picture_is_described_and_read():
    """An alt text where screen readers find it, and below it a paragraph that reads it."""
    found = pictures()
    assert len(found) >= 20
    for after, output in found:
        assert len(output["metadata"]["image/png"]["alt"]) >= 60
        assert after.startswith("*Reading"), after[:60]


def test_answers_are_folded_away():
    text = "\n".join(texts())
    assert text.count("<details>") == text.count("</details>") >= 12
    numbers = re.findall(r"<b>Exercise (\d+)\.</b>", text)
    assert [int(n) for n in numbers] == list(range(1, len(numbers) + 1))


def test_figures_of_the_real_data_are_those_of_the_results():
    metrics = json.loads((RESULTS / "real-seed0.json").read_text(encoding="utf-8"))
    known = [metrics["identifiers"][name]["macro_f1"] for name in ("er", "ip", "ex")]
    for policy in (metrics.get("mle") or metrics["sft"], metrics["emprl"]):
        for key in ("emp_f1", "judge_emp_f1", "perplexity", "reward"):
            if key in policy:
                known.append(policy[key])
    (text,) = (text for text in texts() if "## 13. Real data" in text)
    found = re.findall(r"\d+\.\d{3}", text)
    assert found, "section 13 has lost its figures"
    assert set(found) <= {f"{x:.3f}" for x in known}, "correct the text of section 13"
