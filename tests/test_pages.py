"""The pages: README's table has the figures of the results, it is short, every link leads
somewhere, and every test that is named exists."""

import itertools
import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest

import emprl
from tests import test_emprl, test_rubbish
from tests.coursework.kinds import KINDS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROMISES = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")


def load(preset):
    paths = sorted((ROOT / "tests" / "results").glob(f"{preset}-seed?.json"))
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return [run | {"mle": run.get("mle", run.get("sft"))} for run in runs]


def average(values):
    values = list(values)
    return sum(values) / len(values)


def rise_of_perplexity(run):
    return run["emprl"]["perplexity"] / run["mle"]["perplexity"]


def in_the_table(name, preset, key, ceiling):
    """The row of README's table is that of the runs. Returns the averages, by system."""
    runs = load(preset)
    means = {
        "majority": average(run["floors"]["majority"][key] for run in runs),
        "mle": average(run["mle"][key] for run in runs),
        "best_of_n": average(run["best_of_n"][key] for run in runs),
        "emprl": average(run["emprl"][key] for run in runs),
        "ceiling": average(run["ceiling"][ceiling][key] for run in runs),
        "dearer": average(map(rise_of_perplexity, runs)),
    }
    cells = " | ".join(f"{mean:.3f}" for mean in means.values())
    assert f"| {name} | {len(runs)} | {cells} |" in README
    return means


def test_the_results_quoted_for_toy_are_those_of_the_runs():
    means = in_the_table("`toy`, weighted, by the oracle", "toy", "oracle_emp_f1", "best")
    way = (means["emprl"] - means["mle"]) / (means["ceiling"] - means["mle"])
    assert f"covers {way * 100:.0f} % of" in README
    assert f"for {means['dearer'] * 100 - 100:.0f} % more perplexity" in README

    first = load("toy")[0]
    greedy = first["mle_greedy"] if "mle_greedy" in first else first["sft_greedy"]
    assert f"reach {greedy['oracle_emp_f1']:.3f} by the oracle" in README
    assert f"sampled ones {first['emprl']['oracle_emp_f1']:.3f}" in README


def test_the_results_quoted_for_real_are_those_of_the_runs():
    ceiling = "context_balanced"
    means = in_the_table("`real`, weighted, by the judge", "real", "judge_emp_f1", ceiling)
    gain = means["emprl"] / means["mle"] - 1
    assert f"{gain * 100:+.1f} % in weighted" in README, "its interval is in no file"
    assert f"MLE ({means['mle']:.3f}) is below" in README
    assert f"commonest levels ({means['majority']:.3f})" in README
    in_the_table("`real`, macro, by the judge", "real", "judge_emp_macro_f1", ceiling)


def test_the_last_screen_has_its_form():
    """Its figures are of one run on one machine and published nowhere else."""
    (screen,) = re.findall(r"```\n(A T5 learned.*?)\n```", README, re.S)
    lines = screen.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[-1] == "    python emprl.py chat --run runs/toy-seed0"

    emp_f1 = {}
    for name in ("MLE", "best of 4 replies of MLE", "EmpRL"):
        numbers = re.search(rf"^{name}((?: +\d+\.\d{{3}}){{4}})$", screen, re.M)
        assert numbers, name
        _, emp_f1[name], perplexity, distinct = map(float, numbers[1].split())
        assert 0 < emp_f1[name] < 1 <= perplexity and 0 < distinct <= 1

    gain = emp_f1["EmpRL"] / emp_f1["MLE"] * 100 - 100
    told, low, high = map(float, re.findall(r"([+-]\d+\.\d)%", screen))
    assert told == pytest.approx(gain, abs=0.2), "of the figures above it"
    assert low < told < high


def test_readme_is_short():
    assert len(README.encode()) <= 15_000
    assert README.count("\n") <= 250


PAGES = [
    "README.md",
    "tests/README.md",
    "tests/results/README.md",
    "tests/coursework/README.md",
]


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text(encoding="utf-8"))
    assert links
    for link in links:
        if not link.startswith("https://"):
            assert (ROOT / page).parent.joinpath(link).exists(), link


def cases(test):
    """How many a test is parametrized with."""
    (mark,) = (mark for mark in test.pytestmark if mark.name == "parametrize")
    return len(mark.args[1])


def test_the_numbers_on_the_page_are_those_of_the_code():
    """Those of the mutants are checked where the mutants are made, in test_coursework.py."""
    options = len(emprl.settings_of(emprl.toy()))
    values = len(test_rubbish.VALUES)
    command_lines = cases(test_emprl.test_bad_input_is_one_line_and_exit_code_2)
    command_lines += cases(test_rubbish.test_a_wrong_command_line_is_one_line)
    for told in (
        f"| impossible values of options | {options * values:,} | {options * values:,} |",
        f"| {values} values for each of {options} options |",
        f"| {command_lines} command lines; ",
        f"has the original's settings | {len(test_emprl.ORIGINAL.split())} options |",
        f"cannot be found by `diff` | drawn from {len(KINDS)} kinds; ",
    ):
        assert told in PROMISES, told


def defined_in(file):
    source = (ROOT / "tests" / file).read_text(encoding="utf-8")
    return set(re.findall(r"^def (test_\w+)", source, re.M))


def promised_in(cell):
    """(file, test) of a cell like "`test_a.py`: `test_x`, `test_y`; `test_b.py`: `test_z*`"."""
    file = None
    for name in re.findall(r"`(test_[\w.*]+)`", cell):
        if name.endswith(".py"):
            file = name
            assert defined_in(file), name
        else:
            yield file, name


def test_every_test_that_is_named_exists():
    cells = [line.split("|")[-2] for line in PROMISES.splitlines() if line.startswith("|")]
    named = list(itertools.chain(*map(promised_in, cells)))
    assert len(named) == len(re.findall(r"`test_\w+\*?`", PROMISES)) > 60
    for file, name in named:
        assert file, f"{name}: of which file?"
        pattern = re.compile(name.replace("*", r"\w*"))
        assert any(map(pattern.fullmatch, defined_in(file))), f"{file} has no {name}"


@pytest.mark.parametrize("name", ["toy", "real"])
def test_published_runs_have_the_settings_that_their_preset_has_now(name):
    preset = asdict(emprl.PRESETS[name]())
    for config in (preset, *(run["config"] for run in load(name))):
        del config["seed"], config["data_path"], config["t5"]["vocab_size"]
        assert config == preset


def test_published_runs_have_the_tokenizer_of_now():
    """No setting names it; its size does."""
    for name, size in (("toy", 1200), ("real", 5000)):
        assert {run["config"]["t5"]["vocab_size"] for run in load(name)} == {size}
