"""The pages: README's figures are those of the results, it is short, and every link leads somewhere."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
LATER = ("toy-emp_f1.png", "toy-ppo.png")  # pictures of a run that are still to be added


def load(preset):
    paths = sorted((ROOT / "tests" / "results").glob(f"{preset}-seed?.json"))
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return [run | {"mle": run.get("mle", run.get("sft"))} for run in runs]


def test_the_results_quoted_are_those_of_the_runs():
    def row(name, preset, key, ceiling):
        runs = load(preset)
        parts = [run["floors"] | run | {"ceiling": run["ceiling"][ceiling]} for run in runs]
        names = ("majority", "mle", "best_of_n", "emprl", "ceiling")
        means = [sum(part[name][key] for part in parts) / len(runs) for name in names]
        ratios = [run["emprl"]["perplexity"] / run["mle"]["perplexity"] for run in runs]
        ratio = sum(ratios) / len(runs)
        cells = " | ".join(f"{x:.3f}" for x in [*means, ratio])
        assert f"| {name} | {len(runs)} | {cells} |" in README
        _, mle, _, emprl, best = means
        return emprl / mle - 1, (emprl - mle) / (best - mle), ratio - 1

    _, way, dearer = row("`toy`, weighted, by the oracle", "toy", "oracle_emp_f1", "best")
    assert f"covers {way * 100:.0f} % of" in README
    assert f"price of {dearer * 100:.0f} % more" in README
    ceiling = "context_balanced"
    gain, *_ = row("`real`, weighted, by the judge", "real", "judge_emp_f1", ceiling)
    assert f"{gain * 100:+.1f} % in weighted" in README  # its interval is in no file
    row("`real`, macro, by the judge", "real", "judge_emp_macro_f1", ceiling)


def test_the_last_screen_is_that_of_seed_0():
    (run, *_) = load("toy")
    keys = ("judge_emp_f1", "oracle_emp_f1", "perplexity", "unique")
    for name, who in (
        ("MLE", "mle"),
        ("best of 4 replies of MLE", "best_of_n"),
        ("EmpRL", "emprl"),
    ):
        figures = " +".join(f"{run[who][key]:.3f}" for key in keys)
        assert re.search(f"^{name} +{figures}$", README, re.M), name
    figures = " +".join(f"{run['floors']['majority'][key]:.3f}" for key in keys[:2])
    assert re.search(f"^the commonest levels +{figures}$", README, re.M)
    gain = run["gain"]["oracle_emp_f1"]
    relative, low, high = (f"{gain[key] * 100:+.1f}" for key in ("relative", "low", "high"))
    assert f"by the oracle: {relative} % (95 % interval {low} to {high} %)" in README


def test_readme_is_short():
    assert len(README.encode()) <= 15_000 and README.count("\n") <= 250


@pytest.mark.parametrize("page", ["README.md", "tests/README.md", "tests/results/README.md"])
def test_every_link_leads_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text(encoding="utf-8"))
    assert links
    for link in links:
        if not link.startswith("https://") and not link.endswith(LATER):
            assert (ROOT / page).parent.joinpath(link).exists(), link
