"""tests/publish.py: its tables, its pages and its intervals. What README says is checked by test_pages.py."""

import json
import re
from pathlib import Path

import pytest
import torch

import emprl
import identifiers
import publish

ROOT = Path(publish.ROOT)


def test_five_seeds_of_toy_are_published():
    assert publish.seeds().count("\n") >= 6, "header, rule, five seeds"


def responses(number):
    """`number` records of a run's responses.jsonl; EmpRL's levels are the target's, MLE's are one beside."""
    levels = {
        "target": [0, 1, 2],
        "sft": [1, 1, 2],
        "best_of_n": [0, 1, 2],
        "emprl": [0, 1, 2],
    }
    return [
        {
            "id": f"hit:{i}_conv:{2 * i}/2",
            "context": [f"context {i}", "secret"],
            "target": f"human {i}",
            "responses": {
                "sft": f"sft {i} | <b>",
                "best_of_n": f"best {i}",
                "emprl": f"emprl {i}",
                "sft_greedy": "greedy",
            },
            "levels": {
                reader: {k: [(x + i) % 3 for x in v] for k, v in levels.items()}
                for reader in publish.READERS
            },
        }
        for i in range(number)
    ]


def test_page_of_test_contexts_has_no_text_of_the_corpus():
    page = publish.page(responses(100), "real-seed0")
    assert page.count("`hit:") == page.count("| human |") == 40 and page == publish.page(
        responses(100), "real-seed0"
    ), "a stated seed"
    assert (
        not any(words in page for words in ("context 1", "secret", "human 1", "greedy"))
        and "sft " in page
        and "\\| \\<b\\>" in page
    )
    assert page != publish.page(responses(100), "real-seed0", seed=1)
    first = page.split("`hit:")[1]
    i = int(first.split("_")[0])
    assert (
        f"| MLE | sft {i} " in first
        and f"[{(i + 1) % 3}, {(i + 1) % 3}, {(i + 2) % 3}]" in first
    ), "all levels"


def test_committed_page_is_of_forty_contexts_without_their_text():
    path = ROOT / "tests" / "results" / "real-page.md"
    if path.exists():
        assert (
            path.read_text().count("`hit:")
            == path.read_text().count("| human | (not shown) |")
            == 40
        )


def test_intervals_over_seeds_and_contexts(tmp_path, monkeypatch):
    """EmpRL right everywhere, MLE right in two mechanisms of three, on every context of every seed: no spread at all. One seed whose
    MLE is right too: the interval reaches down to the gain of nearly only that one."""
    monkeypatch.setattr(publish, "RESULTS", tmp_path)
    assert publish.bootstrap("judge", "emp_f1") is None and publish.real_classes() == "", (
        "nothing is there"
    )
    for seed in range(3):
        (tmp_path / f"real-seed{seed}.json").write_text("{}")
        (tmp_path / f"levels-real-seed{seed}.json").write_text(
            json.dumps(publish.compact(responses(60)))
        )
    gain = publish.bootstrap("judge", "emp_f1")
    assert all(x == pytest.approx(0.5) for x in gain.values()), "from 2/3 to 1"
    assert publish.bootstrap("identifiers", "emp_macro_f1")["relative"] == pytest.approx(0.5)
    assert (
        "| ER 0 | 0.333 | 0.000 | 1.000 | 1.000 | 0.333 | 0.000 | 1.000 | 1.000 |"
        in publish.real_classes()
    )
    equal = [
        {**r, "levels": {k: {**v, "sft": v["target"]} for k, v in r["levels"].items()}}
        for r in responses(60)
    ]
    (tmp_path / "levels-real-seed2.json").write_text(json.dumps(publish.compact(equal)))
    gain = publish.bootstrap("judge", "emp_f1")
    assert (
        gain["relative"] == pytest.approx((3 - 7 / 3) / (7 / 3))
        and gain["low"] == pytest.approx(0)
        and gain["high"] == pytest.approx(0.5)
    )
    assert publish.bootstrap("judge", "emp_f1") == gain, "seeded"


def test_dealt_out_by_hand_and_by_dealing():
    gold, given = (
        torch.tensor([[0]] * 6 + [[2]] * 2),
        torch.tensor([[0], [0], [0], [2], [2], [2], [2], [0]]),
    )
    # as it is: 0 three times hit of 6 and 4, F1 0.6; 2 once of 2 and 4, F1 1/3. Dealt out: 6 * 4 / 8 = 3 and 2 * 4 / 8 = 1: the same
    assert (
        publish.dealt_out(given, gold, "weighted_f1")
        == pytest.approx(0.75 * 0.6 + 0.25 / 3)
        == identifiers.emp_f1(given, gold)
    )
    assert publish.dealt_out(gold, gold, "macro_f1") == pytest.approx(
        (4.5 / 6 + 0.5 / 2) / 2
    ), "36 / 8 and 4 / 8 hits"
    torch.manual_seed(0)
    gold, given = (
        torch.randint(0, 3, (400, 3)),
        torch.randint(0, 3, (400, 3)) * torch.randint(0, 2, (400, 3)),
    )
    found = [identifiers.emp_f1(given[torch.randperm(400)], gold) for _ in range(200)]
    assert publish.dealt_out(given, gold, "weighted_f1") == pytest.approx(
        sum(found) / 200, abs=0.003
    )


def test_committed_levels_give_the_committed_figures():
    runs = publish.levels("real")
    for m, one in zip(publish.load("real"), runs):
        for reader, prefix in publish.READERS.items():
            for system in publish.SYSTEMS:
                found = emprl.level_scores(one[reader][system], one[reader]["target"])
                assert {k: pytest.approx(m[system][prefix + k]) for k in found} == found, (
                    m["seed"],
                    reader,
                    system,
                )


def test_publish_a_run(tmp_path, monkeypatch):
    """A run's figures, levels and page are copied, and the tables made of them."""
    run, results, page = tmp_path / "run", tmp_path / "results", tmp_path / "page.md"
    assert emprl.main(["--preset", "smoke", "--run", str(run)]) == 0
    results.mkdir()
    page.write_text(
        "(tests/results/real-seed0.json)\n\n(real seeds: levels)\n\n(real seeds: text)\n\n(real seeds: classes)\n\n"
        "(real seeds: sampling)\n\n(at a glance)\n"
    )
    monkeypatch.setattr(publish, "RESULTS", results)
    monkeypatch.setattr(publish, "PAGES", (page,))
    publish.main(run, "toy-seed0")
    publish.main(run, "real-seed0")
    assert {p.name for p in results.iterdir()} == {
        "toy-seed0.json",
        "real-seed0.json",
        "levels-real-seed0.json",
        "real-page.md",
    }
    assert publish.real_sampling().count("\n") == 2, "no run with top-k yet"
    publish.main(run, "topk-seed0")
    assert (
        (results / "topk-seed0.json").exists()
        and "`" in (results / "topk-page.md").read_text()
        and not (results / "levels-topk-seed0.json").exists()
    )
    tables, metrics = publish.tables(), json.loads((run / "metrics.json").read_text())
    for anchor in re.findall(r"^\((.*)\)$", page.read_text(), re.M):
        if table := tables[anchor]:
            start, end = publish.shown(page.read_text(), anchor)
            assert page.read_text()[start:end] == table and table.count("\n") > 2, anchor
    before, after, best = (
        metrics["sft"]["judge_emp_f1"],
        metrics["emprl"]["judge_emp_f1"],
        metrics["ceiling"]["context_balanced"]["judge_emp_f1"],
    )
    assert (
        f"| {before:.3f} | {metrics['best_of_n']['judge_emp_f1']:.3f} | {after:.3f} | {best:.3f} | {(after - before) / (best - before):.0%} |"
        in publish.glance()
    )
    assert all(
        f"| {what} | 1 | {before:.3f} |" in tables["real seeds: sampling"]
        for what in ("temperature 1", "top-k 20, temperature 0.9")
    )
    assert "best of n" in publish.real_levels() and re.search(
        r"judge, macro \| mean .*% \(", publish.real_levels()
    )
    test_committed_levels_give_the_committed_figures()
    (run / "responses.jsonl").write_text('{"levels": {"target": [0, 0, 0]}}\n')
    with pytest.raises(publish.DataError, match="older version"):
        publish.main(run, "real-seed0")


def test_a_table_is_put_below_its_paragraph(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    monkeypatch.setattr(publish, "PAGES", (page,))
    for before, after in (
        ("a (x):\n\n| 1 |\n| 2 |\n\nb (y)\n", "a (x):\n\n| n |\n\nb (y)\n"),
        ("a (x):\n\nb\n", "a (x):\n\n| n |\n\nb\n"),
        ("a (x)", "a (x)\n\n| n |\n"),
        ("a (x)\n\n| 1 |", "a (x)\n\n| n |\n"),
        ("a", "a"),
    ):
        page.write_text(before)
        assert (
            publish.put("x", "| n |") == ([page] if "(x)" in before else [])
            and page.read_text() == after
        )
        publish.put("x", "")
        assert page.read_text() == after, "no table, no change"
