"""The whole program on the preset `smoke`: its files, its last screen, its pages, its commands."""

import ast
import errno
import io
import json
import math
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

import emprl
import t5_small
from tests.tools import (
    MECHANISMS,
    official,
    read_json,
    read_lines,
    records,
    smoke,
    stages_of,
    tiny_t5,
    words,
)

ROOT = Path(emprl.__file__).parent
SYSTEMS = {"mle", "best_of_n", "emprl", "mle_greedy", "emprl_greedy"}
PICTURES = ("losses", "ppo", "emp_f1", "levels", "learnt_vs_truth")
PREFIXES = {"identifiers": "", "judge": "judge_", "oracle": "oracle_"}
FIGURES = """
emp_f1 emp_f1_er emp_f1_ip emp_f1_ex emp_macro_f1 exact_match mutual_information
judge_emp_f1 judge_emp_macro_f1 judge_exact_match oracle_emp_f1 oracle_exact_match
perplexity perplexity_per_word bleu dist1 dist2 unique length kl
""".split()


def told_by(records, who, system):
    """(N, M) levels of a system's replies in responses.jsonl."""
    return torch.tensor([record["levels"][who][system] for record in records])


# ---- what a run leaves --------------------------------------------------------------------------


def test_the_folder_holds_what_the_readme_says(finished):
    for name in (
        "config.json",
        "environment.json",
        "metrics.jsonl",
        "metrics.json",
        "responses.jsonl",
        "report.md",
        "samples.md",
        "tokenizer.model",
        "mle/pytorch_model.bin",
        "emprl/pytorch_model.bin",
    ):
        assert (finished / name).stat().st_size > 0, name
    for name in PICTURES:
        assert (finished / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG"), name
    steps = {"pretrain": 4, "mle": 12, "identifiers": 8, "judge": 8, "context": 4, "ppo": 4}
    stages = [record["stage"] for record in read_lines(finished / "metrics.jsonl")]
    assert {stage: stages.count(stage) for stage in stages} == steps


def test_metrics_have_every_figure(finished):
    metrics = read_json(finished / "metrics.json")
    for who in ("identifiers", "judge"):
        for mechanism in MECHANISMS:
            assert {"accuracy", "macro_f1", "weighted_f1"} <= set(metrics[who][mechanism])
    levels = {"emp_f1", "judge_emp_f1", "oracle_emp_f1"}
    for floor in ("majority", "random_copy"):
        assert levels <= set(metrics["floors"][floor])
    best, ideal = metrics["ceiling"]["best"], metrics["ceiling"]["mle_ideal"]
    assert best["oracle_emp_f1"] > ideal["oracle_emp_f1"] > 0
    for policy in SYSTEMS:
        assert set(FIGURES) <= set(metrics[policy]), policy
    for name in levels:
        gain = metrics["gain"][name]
        assert gain["low"] <= gain["relative"] <= gain["high"]
    assert metrics["mle"]["kl"] == pytest.approx(0, abs=1e-6), "no distance to itself"
    assert metrics["human"]["length"] > 3
    assert metrics["human"]["bleu"] == pytest.approx(100)
    assert metrics["config"]["preset"] == "smoke"
    assert metrics["config"]["seed"] == 0
    assert {"mle", "ppo", "evaluate"} <= set(metrics["seconds"])
    assert min(metrics["seconds"].values()) >= 0


def test_the_figures_can_be_had_again_from_the_replies(finished):
    metrics = read_json(finished / "metrics.json")
    found = read_lines(finished / "responses.jsonl")
    assert len(found) == 40
    for record in found:
        assert set(record["replies"]) == SYSTEMS
        assert set(record["levels"]) == set(PREFIXES)
        for table in record["levels"].values():
            assert set(table) == {"human", *SYSTEMS}
    for who, prefix in PREFIXES.items():
        gold = told_by(found, who, "human")
        for system in SYSTEMS:
            figures = emprl.compare_levels(told_by(found, who, system), gold)
            for name, value in figures.items():
                assert metrics[system][prefix + name] == value, (who, system, name)


def test_best_of_one_is_plain_sampling_and_of_many_no_worse(finished, tmp_path, no_pictures):
    """The first of n samples is MLE's own; perplexities are MLE's either way."""
    one = smoke(stages_of(finished, tmp_path / "run"), "eval.best_of=1")
    assert one["best_of_n"] == pytest.approx(one["mle"])
    many = read_json(finished / "metrics.json")
    for key in ("perplexity", "perplexity_per_word"):
        assert many["best_of_n"][key] == pytest.approx(many["mle"][key], rel=1e-4)
    assert many["best_of_n"]["kl"] == pytest.approx(math.log(4) - 3 / 4)


def test_ratio_is_one_at_the_first_minibatch_of_every_iteration(finished):
    log = read_lines(finished / "metrics.jsonl")
    errors = [record["first_ratio_error"] for record in log if record["stage"] == "ppo"]
    assert len(errors) == 4
    assert max(errors) < 1e-5


# ---- the end of a run ---------------------------------------------------------------------------


def fits(screen):
    lines = screen.splitlines()
    return len(lines) <= 20 and max(map(len, lines)) <= 80


def test_the_last_screen_says_what_it_must(finished):
    printed = finished.with_suffix(".txt").read_text(encoding="utf-8")
    screen = printed[printed.index("A T5 learned") :]
    assert fits(screen.replace(str(finished), "run")), screen
    for row in ("human", "always the commonest", "MLE ", "best of 4", "EmpRL "):
        assert re.search(f"^{row}.* [01][.][0-9]{{3}}", screen, re.M), row
    head = next(line for line in screen.splitlines() if "judge" in line)
    assert re.search("judge +oracle +perplex.* +distinct", head)
    assert re.search(
        r"EmpRL over MLE: .*% \(95 % interval .*% to .*%\), by the oracle", screen
    )
    level = "(none|weak|strong)"
    in_words = f"emotional reaction {level}, interpretation {level}, exploration {level}"
    levels = re.findall(rf"^(\w+) +\[{in_words}\]$", screen, re.M)
    assert [found[0] for found in levels] == ["human", "MLE", "EmpRL"]
    assert "report.md" in screen
    assert "chat --run" in screen
    assert "reward      0 to 1" in printed, "what a reward of 0.03 means"


@pytest.mark.parametrize(
    "name",
    ["x" * 200, "two words and läufe 😀, a line\nbreak and\x1b[1m"],
    ids=["long", "letters"],
)
def test_the_last_screen_fits_whatever_the_folder_is_called(
    name, tmp_path, capsys, copied, no_pictures
):
    folder = copied.rename(tmp_path / name)
    assert emprl.main(words(folder)) == 0
    printed = capsys.readouterr().out
    screen = printed[printed.index("A T5 learned") :]
    assert fits(screen), screen
    assert "\x1b" not in screen


N = 40  # contexts of the small evaluations below


def seen(improved, worse, truth="oracle", text="A reply."):
    """An evaluation: EmpRL is closer than MLE in some contexts, less close in others."""
    human = torch.zeros(N, 3, dtype=torch.long)
    gold = {truth: human, "judge": human}
    mle, policy = human.clone(), human.clone()
    mle[:improved, 1] = 2
    policy[improved : improved + worse, 0] = 1
    tables = {"mle": mle, "best_of_n": human, "emprl": policy}
    replies = {"human": emprl.Replies([text] * N, gold)}
    for system, levels in tables.items():
        texts = [f"{system} {i}: {text}" for i in range(N)]
        replies[system] = emprl.Replies(texts, {truth: levels, "judge": levels})
    dialogues = [emprl.Dialogue((f"context {i} {text}",), text, "sad") for i in range(N)]
    pairs = MagicMock(dialogues=dialogues)
    pairs.__len__.return_value = N
    run = SimpleNamespace(folder=Path("run"), config=emprl.make_config("smoke"))
    return SimpleNamespace(run=run, truth=truth, human=gold, replies=replies, pairs=pairs)


def gain(low, high):
    return {"relative": (low + high) / 2, "low": low, "high": high}


def figures_of(own, judge, oracle=None, perplexity=4.0):
    """Figures with these gains: (low, high) by the identifiers, the judge and the oracle."""
    gains = {"emp_f1": gain(*own), "judge_emp_f1": gain(*judge)}
    if oracle:
        gains["oracle_emp_f1"] = gain(*oracle)
    system = {"emp_f1": 0.5, "judge_emp_f1": 0.5, "oracle_emp_f1": 0.5}
    for key in list(system):
        system |= {f"{key}_{m}": 0.5 for m in emprl.MECHANISMS}
    system |= {"perplexity": perplexity, "unique": 0.9}
    systems = ("mle", "mle_greedy", "best_of_n", "emprl")
    return {
        "gain": gains,
        "floors": {"majority": dict(system)},
        "human": {"unique": 1.0},
        **{name: dict(system) for name in systems},
    }


UP, DOWN, UNSURE, NONE = (0.1, 0.3), (-0.3, -0.1), (-0.1, 0.1), (0.0, 0.0)


@pytest.mark.parametrize(
    "own, judge, oracle, says",
    [
        (UP, UP, UP, ["better than MLE's", "+20.0%", "no sign that the reward was gamed"]),
        (UNSURE, UNSURE, UNSURE, ["no better than MLE's", "+0.0%", "has not surely risen"]),
        (DOWN, DOWN, DOWN, ["worse than MLE's", "-20.0%", "has not surely risen"]),
        (UP, UNSURE, UNSURE, ["no better than MLE's", "may have been gamed"]),
        (UP, DOWN, DOWN, ["worse than MLE's", "may have been gamed"]),
        (NONE, NONE, NONE, ["no better than MLE's", "+0.0%", "has not surely risen"]),
        (UP, UNSURE, None, ["no better than MLE's", "by the judge", "may have been gamed"]),
        (
            UP,
            UP,
            None,
            ["better than MLE's", "by the judge", "no sign that the reward was gamed"],
        ),
    ],
)
def test_the_answer_is_three_sentences_and_honest(own, judge, oracle, says):
    truth = "oracle" if oracle else "judge"
    text = emprl.answer(figures_of(own, judge, oracle), truth)
    assert len(re.findall(r"[.](?= [A-Z]|$)", text)) == 3, text
    for said in says:
        assert said in text
    assert ("no better" in text) == ("no better than MLE's" in says), text


def test_the_answer_names_what_is_as_good_without_ppo():
    figures = figures_of(UP, UP)
    figures["emprl"] |= {"judge_emp_f1": 0.6, "judge_emp_f1_er": 0.4, "judge_emp_f1_ex": 0.4}
    figures["best_of_n"]["judge_emp_f1"] = 0.7
    text = emprl.answer(figures, "judge")
    assert "above always the commonest levels (0.500)" in text
    assert "not above the best of several replies of MLE (0.700)" in text
    assert ", above MLE decoded greedily (0.500)" in text
    assert "in emotional reaction and exploration it is below the commonest level" in text
    figures["emprl"] |= {"judge_emp_f1_er": 0.5, "judge_emp_f1_ex": 0.6}
    assert "is below" not in emprl.answer(figures, "judge")


@pytest.mark.parametrize("truth", ["oracle", "judge"])
@pytest.mark.parametrize("improved, worse", [(10, 4), (0, 7), (0, 0), (40, 0), (0, 40)])
def test_the_last_screen_of_any_outcome_fits(improved, worse, truth):
    """Figures without a bound, texts without an end; an example that improved if there is one."""
    for size in (0.1, 1e9, math.inf, math.nan):
        metrics = figures_of((0, size), (0, size), (0, size), perplexity=1e300 * size)
        test = seen(improved, worse, truth, "so\x1b[1m sad " * 40)
        test.run.config.eval.best_of = 10**4
        screen = emprl.last_screen(metrics, test)
        assert fits(screen), screen
        assert "\x1b" not in screen
        assert f"In {improved / N:.0%} of contexts" in screen
        assert f"in {worse / N:.0%} less close" in screen
        assert ("One of the" in screen) == (improved > 0)
        assert ("oracle" in screen) == (truth == "oracle")
        assert ("interpretation strong" in screen) == (improved > 0), "EmpRL's reply is better"


@pytest.mark.parametrize(
    "improved, worse, shown",
    [(10, 10, [3, 6, 3]), (0, 0, [0, 12, 0]), (40, 0, [12, 0, 0]), (14, 13, [4, 4, 4])],
)
def test_samples_are_twelve_in_their_true_proportion(improved, worse, shown):
    page = emprl.samples_page(seen(improved, worse))
    sections = re.split("^## EmpRL is ", page, flags=re.M)[1:]
    assert [section.split(":")[0] for section in sections] == [
        "closer than MLE",
        "as close",
        "less close",
    ]
    assert [section.count("* human: ") for section in sections] == shown
    shares = [improved, N - improved - worse, worse]
    for section, share, count in zip(sections, shares, shown):
        assert f": {share / N:.0%}\n" in section
        assert section.count("* EmpRL: ") == section.count("* best of n: ") == count
    assert "emotional reaction (ER)" in page
    assert len(set(re.findall(r"context \d+", page))) == 12, "each once"


def test_the_report_is_a_page(finished):
    page = (finished / "report.md").read_text(encoding="utf-8")
    metrics = read_json(finished / "metrics.json")
    parts = page.split("\n\n")
    assert parts[1].strip("*").endswith("?"), "the question"
    assert parts[2] == emprl.answer(metrics, "oracle")
    for name in PICTURES:
        (i,) = [i for i, part in enumerate(parts) if f"](plots/{name}.png)" in part]
        assert re.fullmatch(r"\*[A-Z].*[.?]\*", parts[i + 1]), "how to read it"
    topics = re.findall("^## (.*)", page, re.M)
    assert topics == [
        "Levels",
        "By mechanism",
        "Floors and ceilings",
        "Text",
        "The classifiers",
    ]
    rows = {}  # in brackets behind a plain name: the key
    for name, key, cells in re.findall(r"^\| (.*?) \[([\w.]+)\] \| (.*) \|$", page, re.M):
        assert re.match("[A-Za-z]", name), key
        rows.setdefault(key, [cell.strip() for cell in cells.split("|")])
    systems = ("mle", "best_of_n", "emprl", "mle_greedy", "emprl_greedy")
    for key in ("emp_f1", "judge_exact_match", "perplexity", "bleu", "unique"):
        wanted = [f"{metrics[system][key]:.3f}" for system in systems]
        assert rows[key][:5] == wanted, key
    majority = metrics["floors"]["majority"]
    wanted = [f"{majority[prefix + 'emp_f1']:.3f}" for prefix in PREFIXES.values()]
    assert rows["floors.majority"] == wanted
    floor, *middle, ceiling = rows["oracle_emp_f1_er"]
    assert middle == [f"{metrics[system]['oracle_emp_f1_er']:.3f}" for system in systems[:3]]
    assert floor == f"{majority['oracle_emp_f1_er']:.3f}"
    balanced = metrics["ceiling"]["context_balanced"]
    assert ceiling == f"{balanced['oracle_emp_f1_er']:.3f}"


def test_a_picture_that_fails_costs_nothing_else(copied, monkeypatch, capsys):
    def broken(*_, **__):
        raise ZeroDivisionError("in a changed copy")

    monkeypatch.setattr(emprl, "curve", broken)  # ppo and losses need it
    (copied / "report.md").unlink()
    assert emprl.main(words(copied)) == 0
    printed = capsys.readouterr().out
    assert printed.count("ZeroDivisionError: in a changed copy") == 2
    page = (copied / "report.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"\(plots/(\w+)[.]png\)", page))
    assert shown == {"emp_f1", "levels", "learnt_vs_truth"}
    assert "A T5 learned" in printed


# ---- settings: each has the effect that it names, or is refused ---------------------------------


def test_every_set_counts(tmp_path, monkeypatch):
    """`--set a=1 --set b=2` is `--set a=1 b=2`."""
    seen = []
    monkeypatch.setattr(emprl, "run_all", lambda run: seen.append(run.config))
    run = ["--run", str(tmp_path / "run")]
    one = ["--set", "ppo.lr=1", "--set", "mle.lr=2", "ppo.steps=3", *run]
    assert emprl.main(one) == emprl.main(run) == 0
    assert (seen[0].ppo.lr, seen[0].mle.lr, seen[0].ppo.steps) == (1, 2, 3)
    assert seen[1] == emprl.toy(), "and nothing is left over for the next call"


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--data", "/dev/null"], "--data /dev/null"),
        (["--data", "pipe"], "--data pipe"),
        (["--t5", "t5", "--set", "t5.d_model=64"], "t5.d_model=64: has no effect"),
        (["--t5", "t5", "--set", "data.vocab_size=600"], "data.vocab_size=600: has no"),
        (["--data", "mine.jsonl", "--set", "data.num_train=9"], "data.num_train=9: has"),
        (["--preset", "real", "--data", "folder", "--set", "data.num_test=9"], "num_test=9"),
        (["--set", "pretrain.task=turns"], "pretrain.task=turns: has no effect"),
        (["--set", "identifiers.kind=ngrams", "identifiers.lr=1"], "identifiers.lr=1: has no"),
        (
            ["--set", "identifiers.kind=ngrams", "identifiers.eval_every=1"],
            "eval_every=1: has",
        ),
        (["--set", "identifiers.kind=ngrams", "context.lr=1"], "context.lr=1: has no"),
        (["--set", "context.penalty=1"], "context.penalty=1: has no effect"),
        (["--set", "mle.epochs=1", "mle.steps=1"], "mle.steps=1: has no effect"),
        (
            ["--set", "ppo.steps=2", "ppo.steps=3"],
            "ppo.steps=2: has no effect here (it is set",
        ),
        (
            ["--set", "ppo.lr=1", "--set", "ppo.lr=1"],
            "ppo.lr=1: has no effect here (it is set",
        ),
        (["--set", "t5.vocab_size=600"], "t5.vocab_size=600: no such option"),
        (["--set", "data.__class__=1"], "data.__class__=1: no such option"),
        (["--set", "data.__dict__=1"], "data.__dict__=1: no such option"),
        (["--set", "__class__.preset=1"], "__class__.preset=1: no such option"),
        (["--set", "reward.options=1"], "reward.options=1: no such option"),
        (["--set", "ppo.learning_rate=1"], "no such option"),
        (["--set", "ppo"], "no such option"),
        (["--set", "ppo.steps=many"], "a whole number from 0"),
        (["--set", "ppo.steps=-1"], "a whole number from 0"),
        (["--set", "ppo.lr=nan"], "ppo.lr=nan"),
        (["--set", "ppo.lr=inf"], "ppo.lr=inf"),
        (["--set", "ppo.adaptive_kl=yes"], "on or off"),
        (["--set", "reward.target=best"], "one of expected | likeliest | human"),
        (["--set", "reward.mechanisms=all"], "reward.mechanisms=all"),
        (["--set", "reward.mechanisms="], "reward.mechanisms="),
        (["--set", "replying.min_length=99", "replying.max_length=9"], "replying.min_length"),
        (["--set", "ppo.batch_size=8", "ppo.minibatch_size=9"], "ppo.minibatch_size"),
        (["--seed", "-1"], "--seed"),
        (["--preset", "real"], "--data DIR"),
        (["--preset", "paper", "--data", "folder"], "--t5"),
        (["--preset", "real", "--data", "missing"], "--data missing"),
        (["--t5", "t5"], "config.json"),
        (["evaluate", "--run", "missing", "--data", "x"], "no finished run"),
        (["chat", "--run", "missing"], "no finished run"),
        (["run", "x"], "see python emprl.py --help"),
        (["chat", "--run", "x", "y"], "see python emprl.py --help"),
        (["rate"], "invalid choice"),
        (["--again"], "--again"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(emprl, "run_all", lambda run: pytest.fail("accepted"))
    (tmp_path / "mine.jsonl").write_text("".join(records(60)), encoding="utf-8")
    (tmp_path / "folder").mkdir()
    (tmp_path / "t5").mkdir()
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
    before = set(tmp_path.iterdir())
    assert emprl.main(arguments) == 2
    err = capsys.readouterr().err
    assert says in err, err
    assert err.count("\n") == 1, err
    assert set(tmp_path.iterdir()) == before, "nothing was written"


ORIGINAL = """
mle.epochs=3 mle.batch_size=8 mle.lr=0.0001 mle.warmup=0 data.max_source=200 data.max_target=50
exploring.temperature=0.9 exploring.top_k=20 exploring.min_length=5 exploring.max_length=30
replying.temperature=0.9 replying.top_k=20 replying.min_length=1 reward.target=human
data.identifier_source=250 data.identifier_target=250 identifiers.shared=False
identifiers.start=t5 ppo.batch_size=32 ppo.ppo_epochs=4 ppo.lr=1e-05 ppo.warmup=0 ppo.lam=0.95
ppo.clip_range=0.2 ppo.value_clip_range=0.2 ppo.value_coef=0.1 ppo.scale_rewards=True
ppo.centre_rewards=True ppo.whiten_rewards=True ppo.adaptive_kl=True ppo.kl_coef=0.2
ppo.kl_target=6.0 ppo.kl_horizon=10000
"""


def test_the_preset_paper_is_the_originals():
    """The facts of the authors' code, one by one."""
    config = emprl.PRESETS["paper"]()
    found = []
    for setting in ORIGINAL.split():
        section, name = setting.partition("=")[0].split(".")
        found.append(f"{section}.{name}={getattr(getattr(config, section), name)}")
    assert found == ORIGINAL.split()


def test_presets_know_their_names():
    for name, make in emprl.PRESETS.items():
        assert make().preset == name


def test_a_new_tokenizer_learns_the_newest_two_turns_and_the_responses(monkeypatch):
    dialogue = emprl.Dialogue(("one", "two", "three"), "four")
    labelled = emprl.Dialogue(("five",), "six")
    corpus = SimpleNamespace(
        dialogues={"train": [dialogue], "test": [labelled]},
        labelled={"train": [labelled], "judge_train": [dialogue]},
    )
    monkeypatch.setattr(emprl.Tokenizer, "train", lambda *arguments: arguments)
    config = emprl.make_config("smoke")
    for corpus.level_probs, kind in (({"id": ()}, "bpe"), ({}, "unigram")):
        texts, *others = emprl.make_tokenizer(config, corpus)
        assert texts == "two three four five six two three four".split()
        assert others == [500, kind]


def test_words_of_the_generated_world_stay_whole():
    """With bpe, which only that world gets. Unigram cuts a third of them."""
    settings = ["data.num_train=2000", "data.num_labelled=500"]
    config = emprl.make_config("toy", settings=settings)
    corpus = emprl.load_corpus(config)
    responses = " ".join(d.response.lower() for d in corpus.dialogues["test"])
    words = re.findall("[a-z]+", responses)

    def share_whole():
        tokenizer = emprl.make_tokenizer(config, corpus)
        return sum(len(tokenizer.encode(word)) == 1 for word in words) / len(words)

    assert share_whole() > 0.95
    corpus.level_probs = {}  # as if it were another corpus
    assert share_whole() < 0.8, "unigram would do now"


def test_settings_with_an_effect_stay(finished, tmp_path, monkeypatch):
    """The sources' own options, and those of the parts that are used."""
    t5 = official(tmp_path / "t5", finished)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(emprl, "run_all", lambda run: None)
    (tmp_path / "mine.jsonl").write_text("".join(records(60)), encoding="utf-8")
    (tmp_path / "folder").mkdir()
    for arguments in (
        ["--data", "mine.jsonl", "--set", "t5.d_model=64", "data.vocab_size=300"],
        ["--preset", "real", "--data", "folder", "--set", "data.max_source=50"],
        ["--t5", t5, "--set", "data.num_train=99", "data.max_source=50"],
        ["--set", "pretrain.steps=5", "pretrain.task=turns"],
        ["--set", "identifiers.kind=ngrams", "context.penalty=1", "identifiers.penalty=1"],
        ["--set", "reward.mechanisms=er,ex", "identifiers.lr=1"],
    ):
        assert emprl.main(arguments) == 0, arguments


def test_config_json_says_which_t5_was_used(finished, tmp_path, no_pictures):
    few = ["mle.steps=1", "identifiers.steps=1", "context.steps=1", "ppo.steps=1"]
    t5 = official(tmp_path / "t5", finished)
    config = emprl.make_config("smoke", t5_dir=t5, settings=[*few, "eval.contexts=4"])
    config.t5.d_model = 999  # of what --t5 replaces
    emprl.run_all(emprl.Run(tmp_path / "run", config))
    used = read_json(finished / "mle" / "config.json")
    said = read_json(tmp_path / "run" / "config.json")["t5"]
    assert said == {name: used[name] for name in said}


@pytest.mark.parametrize("name", ["pad_token_id", "eos_token_id", "decoder_start_token_id"])
def test_a_t5_with_other_ids_is_refused(name, finished, tmp_path):
    official(tmp_path / "t5", finished)
    path = tmp_path / "t5" / "config.json"
    path.write_text(json.dumps({**read_json(path), name: 2}), encoding="utf-8")
    with pytest.raises(t5_small.CheckpointError, match=f"{name} is 2"):
        t5_small.from_pretrained(tmp_path / "t5")


# ---- the other commands -------------------------------------------------------------------------


def test_evaluations_of_different_files_are_kept_apart(copied, tmp_path, capsys):
    """a/mine.jsonl, b/mine.csv and a changed a/mine.jsonl; the same file again is the same."""

    def evaluate(file, text):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
        assert emprl.main(["evaluate", "--run", str(copied), "--data", str(file)]) == 0
        return len([*copied.glob("evaluate-mine-*.json")])

    one, two = tmp_path / "a" / "mine.jsonl", tmp_path / "b" / "mine.csv"
    line = '{"context": ["My dog is %s."], "response": "I am so sorry."}\n'
    assert evaluate(one, line % "sick" * 3) == 1
    printed = capsys.readouterr().out
    assert "[emp_f1]" in printed
    assert "oracle" not in printed, "there is none for other dialogues"
    assert evaluate(two, "context,response\nMy cat is sick.,Oh no\n") == 2
    assert evaluate(one, line % "sick" * 3) == 2
    assert evaluate(one, line % "sad") == 3

    for path in copied.glob("evaluate-*.json"):
        found = read_json(path)
        assert 0 <= found["emprl"]["emp_f1"] <= 1
        assert found["mle"]["perplexity"] > 1
    texts = []
    for path in copied.glob("evaluate-*.jsonl"):
        replies = read_lines(path)
        texts.append([record["context"][0] for record in replies])
        assert all(set(record["replies"]) >= {"mle", "emprl"} for record in replies)
    assert sorted(texts) == [["My cat is sick."], ["My dog is sad."], ["My dog is sick."] * 3]


def test_evaluate_says_that_it_writes_at_the_end(copied, tmp_path, capsys, monkeypatch):
    """Stopped before, it leaves nothing. Levels in the file are not needed, nor an oracle."""
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(records(3)), encoding="utf-8")
    command = ["evaluate", "--run", str(copied), "--data", str(file)]

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(emprl, "responses_jsonl", stopped)
        assert emprl.main(command) == 130
    assert "3 dialogues; figures and replies are written at the end" in capsys.readouterr().out
    assert not [*copied.glob("evaluate-*.jsonl")]
    assert emprl.main(command) == 0
    table = capsys.readouterr().out
    assert "oracle" not in table and "best_of_n" not in table
    (path,) = copied.glob("evaluate-*.json")
    assert "oracle_emp_f1" not in read_json(path)["emprl"]


def test_an_evaluation_that_can_not_be_kept_is_shown(copied, tmp_path, capsys, monkeypatch):
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(records(2)), encoding="utf-8")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(emprl.Run, "write", full)
    assert emprl.main(["evaluate", "--run", str(copied), "--data", str(file)]) == 2
    told = capsys.readouterr()
    assert "[emp_f1]" in told.out
    assert told.err == "emprl.py: No space left on device; make room\n"


@pytest.mark.parametrize("letter", ["x", "\U0001f436"])
def test_an_evaluation_of_a_file_with_a_long_name_is_kept(letter, copied, tmp_path):
    """Of as many bytes as a name may have."""
    file = tmp_path / f"{letter * (249 // len(letter.encode()))}.jsonl"
    file.write_text("".join(records(2)), encoding="utf-8")
    assert emprl.main(["evaluate", "--run", str(copied), "--data", str(file)]) == 0
    assert len([*copied.glob(f"evaluate-{letter * 50}-*.json*")]) == 2


def test_in_chat_each_policy_has_its_own_conversation(finished, monkeypatch):
    """What a person said, and what this policy replied, oldest first; then a new one."""
    asked = []

    def answer(finished, name, history):
        asked.append((name, history))
        return f"{name} {len(asked)}", [0, 0, 0]

    monkeypatch.setattr(emprl, "answer_to", answer)
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n\nthree\n"))
    assert emprl.main(["chat", "--run", str(finished)]) == 0
    assert asked == [
        ("mle", ("one",)),
        ("emprl", ("one",)),
        ("mle", ("one", "mle 1", "two")),
        ("emprl", ("one", "emprl 2", "two")),
        ("mle", ("three",)),
        ("emprl", ("three",)),
    ]


def test_chat_replies_with_both_models_and_their_levels(finished, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("My dog is sick.\n\nHello\n"))
    assert emprl.main(["chat", "--run", str(finished)]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == emprl.OPENING[0]
    for name in ("mle", "emprl"):
        assert len(re.findall(rf"^{name} .*\[emotional reaction \w+, .*\]$", out, re.M)) == 2


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as ended:
        emprl.main(["--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    for command in ("evaluate", "chat", "download", "options"):
        assert f"python emprl.py {command}" in out


def test_options_lists_all_with_their_range_and_meaning(capsys):
    assert emprl.main(["options"]) == 0
    out = capsys.readouterr().out
    options = emprl.settings_of(emprl.toy())
    assert len(options) <= 80
    assert f"{len(options)} options" in out
    for name, (_, field) in options.items():
        assert re.search(rf"^  {re.escape(name)} = .*\(.+\)\n      \S", out, re.M), name
        assert field.metadata["help"] in out
    assert "ppo.whiten_advantages = on " in out
    assert re.search("ppo.adaptive_kl = off .*\n.*\n      paper: on\n", out)
    assert "er,ip,ex" in out
    assert "0 to 1e+09" not in out.split("reward.mechanisms")[1].split("\n")[0], "it is a text"


OWN_IMPORTS = {  # module -> those of the project that it may import
    "t5_small": set(),
    "data": set(),
    "ppo": {"t5_small"},
    "identifiers": {"data", "t5_small"},
    "emprl": {"data", "identifiers", "ppo", "t5_small"},
}
PACKAGES = {"torch", "numpy", "sentencepiece", "matplotlib"}


def imported_by(source):
    """The packages that a module imports, at its head or within a function."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module)
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("name", OWN_IMPORTS)
def test_modules_keep_to_the_design(name):
    """Arrows point one way; no excluded package; no fp16 and no fixed device."""
    source = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    found = imported_by(source) - sys.stdlib_module_names
    assert found & OWN_IMPORTS.keys() == OWN_IMPORTS[name]
    assert found <= PACKAGES | OWN_IMPORTS.keys()
    assert ".cuda(" not in source and ".half(" not in source
    assert "float16" not in source.replace("bfloat16", "")


# ---- a network for each mechanism


def test_a_network_for_each_mechanism_from_the_corpus_to_the_pictures(
    tmp_path, capsys, monkeypatch
):
    """As in `paper`: three stages for each classifier; load_run puts them together."""
    monkeypatch.setattr(emprl, "PICTURES", {emprl.draw_losses: "A curve for each network."})
    settings = (
        "identifiers.shared=off identifiers.steps=2 context.steps=2 mle.steps=2 ppo.steps=1"
    )
    run = tmp_path / "run"
    words = [
        "--preset",
        "smoke",
        "--run",
        str(run),
        "--set",
        *settings.split(),
        "eval.best_of=1",
        "eval.contexts=8",
    ]
    assert emprl.main(words) == 0
    out = capsys.readouterr().out
    for k, stage in enumerate(("identifiers-er", "identifiers-ip", "identifiers-ex"), 3):
        assert f"stage {k} of 13  {stage}" in out
    assert (run / "report.md").exists() and (run / "plots" / "losses.png").exists()

    finished = emprl.load_run(run, "cpu")
    assert len(finished.classifiers["judge"].encoders) == 3
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    assert emprl.main(["chat", "--run", str(run)]) == 0
    assert len(re.findall("^(mle|emprl) .*interpretation", capsys.readouterr().out, re.M)) == 2
    (run / "checkpoints" / "judge-ip.pt").write_bytes(
        (run / "checkpoints" / "judge-er.pt").read_bytes()
    )
    with pytest.raises(emprl.DataError, match="checkpoints/judge-ip.pt is not what"):
        emprl.load_run(run, "cpu")


def test_the_time_that_a_run_still_takes(capsys, monkeypatch):
    """A run twice as fast as expected so far halves what it expects of the rest, with time."""
    config = emprl.make_config("toy")
    expected = emprl.stages_of(config)
    assert expected["ppo"] == config.ppo.steps * emprl.SECONDS["ppo"][0]
    assert list(expected) == ["mle", "identifiers", "context", "judge", "ppo", "evaluate"]
    progress = emprl.Progress(config)
    progress.worked, progress.began = 10_000.0, 1000.0
    monkeypatch.setattr(emprl.time, "time", lambda: 6000.0)
    progress.announce("ppo")
    rest = (expected["ppo"] + expected["evaluate"]) / 2
    minutes, seconds = divmod(int(rest * 5020 / 5010), 60)
    out = capsys.readouterr().out
    assert out.startswith("stage 5 of 6  ppo")
    assert re.search(rf"{minutes}:{seconds:02d}|{minutes}:{seconds + 1:02d}", out)


def test_numbers_and_texts_fit_their_place():
    assert emprl.number(None) == ""
    assert [emprl.number(x) for x in (0.12345, -99999.0)] == ["0.123", "-99999.000"]
    assert [emprl.number(x) for x in (123456.0, -123456.0)] == ["1.2e+05", "-1.2e+05"]
    whole = "x" * emprl.WIDTH
    assert emprl.shorten(whole) == whole
    assert emprl.shorten("y" + whole) == "..." + whole[3:]


def test_a_loaded_run_replies_without_dropout(finished):
    loaded = emprl.load_run(finished, "cpu")
    models = [*loaded.policies.values(), *loaded.classifiers.values()]
    assert not any(model.training for model in models)


@pytest.mark.parametrize("task, tokens", [("turns", 4 + 3), ("spans", 5 + 5)])
def test_pretraining_learns_the_task_that_it_is_told(task, tokens, monkeypatch):
    """The target of a span of two tokens: a sentinel, the two, a last sentinel, </s>."""
    pairs = emprl.Pairs([], None, 9, 9, "cpu")
    pairs.contexts, pairs.responses = [[5, 6, 7, 1], [5, 6, 1]], [[8, 9, 10, 1], [8, 9, 1]]
    monkeypatch.setattr(emprl, "random_spans", lambda length: [(1, 2)])
    config = emprl.make_config("smoke", settings=[f"pretrain.task={task}"])
    tokenizer = SimpleNamespace(sentinels=[29, 28])
    trainer = emprl.pretrainer(tiny_t5(), pairs, tokenizer, config)
    assert trainer.loss_sum([0, 1])[1] == tokens


def test_only_what_is_about_memory_is_called_out_of_memory():
    assert emprl.in_one_line(RuntimeError("the shapes do not fit")) == ""
    assert emprl.in_one_line(ValueError("out of memory")) == ""
    assert "lower the stage's micro_batch" in emprl.in_one_line(RuntimeError("out of memory"))
