"""Ablations on a smoke run: every variant runs, is stored, resumed and shown; faults put back do what they say."""

import itertools
import json
import math
import shutil
from pathlib import Path

import pytest
import torch

import ablate
import emprl
import faults
import identifiers
import ppo
import publish
import t5_small
from t5_small import T5, Sampling, T5Config

TINY = [
    "ppo.steps=2",
    "ppo.warmup=1",
    "ppo.batch_size=16",
    "ppo.minibatch_size=8",
    "ppo.eval_every=2",
    "eval.contexts=12",
    "eval.valid_contexts=4",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished smoke run."""
    folder = tmp_path_factory.mktemp("ablate") / "smoke"
    assert faults.run(folder) == (0, "")
    return str(folder)


@pytest.fixture
def two(tmp_path):
    """Two folders that look like finished smoke runs of seeds 0 and 1."""
    for seed in range(2):
        (tmp_path / f"run{seed}").mkdir()
        (tmp_path / f"run{seed}" / "metrics.json").write_text(
            json.dumps({"config": {"preset": "smoke", "seed": seed}, "key": f"run{seed}"}),
            encoding="utf-8",
        )
    return [str(tmp_path / f"run{seed}") for seed in range(2)]


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder for results; everything as short as can be."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ablate, "SHORT", TINY)
    monkeypatch.setattr(ablate, "SEEDS", (0,))
    return tmp_path


def stored(path):
    """{variant: {seed: figures}} as --write wrote it."""
    return json.loads(path.read_text(encoding="utf-8"))


def test_settings_of_every_variant_are_options():
    for variants in ablate.ABLATIONS.values():
        for preset in ("toy", "smoke"):
            whole = [
                (
                    emprl.make_config(preset, settings=[*ablate.SHORT, *v.settings.split()]),
                    v.replaced,
                    v.after,
                )
                for v in variants.values()
            ]
            assert all(one != other for one, other in itertools.combinations(whole, 2)), (
                "two variants are the same"
            )
    assert ablate.settings_of(
        {"ppo": {"lr": 1e-5, "adaptive_kl": True}, "data": {"corpus": "x"}, "seed": 3}
    ) == ["ppo.lr=1e-05", "ppo.adaptive_kl=on"]


@pytest.mark.parametrize("name", ["details", "algorithm"])
def test_every_variant_runs(name, finished, results, capsys, monkeypatch):
    monkeypatch.setattr(
        t5_small.Trainer, "step", lambda *_: pytest.fail("only PPO is repeated")
    )
    assert emprl.main(["ablate", name, finished, "--write", str(results / "all.json")]) == 0
    out, figures = capsys.readouterr().out, stored(results / "all.json")
    assert list(figures) == list(ablate.ABLATIONS[name]) and all(
        f"| {variant} |" in out for variant in figures
    )
    assert all(
        x == x and abs(x) < 1e6 for by_seed in figures.values() for x in by_seed["0"].values()
    ), "finite"
    functions = (ablate.ROLLOUT, ablate.SCORE, ablate.TOKEN_REWARDS, ablate.WHITEN)
    assert (
        ppo.rollout,
        ppo.score,
        ppo.token_rewards,
        ppo.whiten,
    ) == functions and emprl.batches is ablate.BATCHES, "put back"
    if name == "algorithm":
        assert (
            figures["MLE"]["0"]["gain"] == figures["MLE"]["0"]["KL"] == 0
            and figures["best of n"]["0"]["KL"] > 0
        )


def test_the_frontier_is_measured_without_training(finished, results, monkeypatch):
    monkeypatch.setattr(
        ppo.PPOTrainer, "step", lambda *_: pytest.fail("the run's own EmpRL is measured")
    )
    monkeypatch.setitem(
        ablate.ABLATIONS,
        "frontier",
        {f"{s:.0%} of the way": ablate.Variant("", ablate.between(s)) for s in (0.25, 1)},
    )
    assert (
        emprl.main(["ablate", "frontier", finished, "--write", str(results / "all.json")]) == 0
    )
    figures = {
        variant: by_seed["0"] for variant, by_seed in stored(results / "all.json").items()
    }
    metrics = json.loads(open(f"{finished}/metrics.json", encoding="utf-8").read())
    assert (
        list(figures) == list(ablate.ABLATIONS["frontier"]) and (results / "all.png").exists()
    )
    whole = figures["100% of the way"]
    assert (
        whole["weighted, judge"] == metrics["emprl"]["judge_emp_f1"]
        and whole["bits, identifiers"] == metrics["emprl"]["mutual_information"]
    )
    assert (
        whole["perplexity, times"]
        == metrics["emprl"]["perplexity"] / metrics["sft"]["perplexity"]
    )
    distance = [abs(1 - f["perplexity, times"]) for f in figures.values()]
    assert distance[0] < distance[1], "further on, further away"


def test_between_two_policies():
    seen, at = (
        {},
        ablate.between(0.75)["emprl.Evaluation"].__new__(
            ablate.between(0.75)["emprl.Evaluation"]
        ),
    )
    torch.manual_seed(0)
    policies = {
        name: T5(T5Config(30, d_model=8, d_ff=8, num_layers=1, num_decoder_layers=1))
        for name in ("sft", "emprl")
    }
    before = [p.clone() for p in policies["emprl"].parameters()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            emprl.Evaluation,
            "compare",
            lambda self, found, *rest: seen.update(found, rest=rest),
        )
        at.compare(policies, 1, 2, 3, "not best of n")
    assert seen["sft"] is policies["sft"] and seen["rest"] == (1, 2, 3)
    for mixed, start, end, kept in zip(
        seen["emprl"].parameters(),
        policies["sft"].parameters(),
        policies["emprl"].parameters(),
        before,
    ):
        assert torch.allclose(mixed, 0.25 * start + 0.75 * end, atol=1e-6) and torch.equal(
            end, kept
        )


def test_expected_scores_of_certain_weights_are_those_of_the_levels():
    torch.manual_seed(0)
    levels, gold, one = (
        torch.randint(0, 3, (4, 50, 3)),
        torch.randint(0, 3, (50, 3)),
        torch.randint(0, 4, (50,)),
    )
    certain = torch.nn.functional.one_hot(one, 4).T.float()
    plain = identifiers.level_scores(levels[one, torch.arange(50)], gold)
    assert ablate.expected_scores(levels, certain, gold) == pytest.approx(
        {k: x for k, x in plain.items() if k != "exact_match"}
    )
    half = ablate.expected_scores(levels[:2], torch.full((2, 50), 0.5), gold)
    twice = identifiers.level_scores(
        levels[:2].flatten(0, 1), torch.cat([gold, gold])
    )  # every context twice, once with each
    assert half == pytest.approx({k: x for k, x in twice.items() if k != "exact_match"})


def test_the_ideal_keeps_to_the_perplexity_and_gains_what_it_pays_for(
    finished, results, monkeypatch
):
    monkeypatch.setattr(ppo.PPOTrainer, "step", lambda *_: pytest.fail("no PPO is needed"))
    monkeypatch.setattr(ablate, "TRIES", 6)
    monkeypatch.setattr(ablate, "SAMPLES", {})
    monkeypatch.setitem(
        ablate.ABLATIONS,
        "ideal",
        {str(t): ablate.Variant("ppo.steps=0", ablate.tilted(t)) for t in (1.0001, 1.01, 1.2)},
    )
    assert emprl.main(["ablate", "ideal", finished, "--write", str(results / "all.json")]) == 0
    figures = {
        float(times): by_seed["0"] for times, by_seed in stored(results / "all.json").items()
    }
    assert [f["perplexity, times"] for f in figures.values()] == pytest.approx(
        [*figures], rel=1e-6
    )
    kl = [f["KL"] for f in figures.values()]
    assert 0 < kl[0] < kl[1] < kl[2] < math.log(6) + 1e-6, (
        "never more than that of the best of 6"
    )


def test_progress_resuming_again_and_the_default_measured_once(
    two, results, capsys, monkeypatch
):
    measured = []
    monkeypatch.setattr(
        ablate,
        "measure",
        lambda run, name, variant: measured.append(run.name) or ablate.figures_of(METRICS),
    )
    assert emprl.main(["ablate", "reward", two[0]]) == 0 and measured == ["run0"] * 4
    assert emprl.main(["ablate", "reward", *two]) == 0 and measured[4:] == ["run1"] * 4, (
        "only what is new"
    )
    assert "4/4  ordinal, seed 1, 0 min left" in capsys.readouterr().out
    assert emprl.main(["ablate", "mechanisms", *two]) == 0 and len(measured) == 8 + 2 * 6, (
        "the default is known from reward"
    )
    assert emprl.main(["ablate", "kl", *two]) == 0 and len(measured) == 20 + 2 * 5
    assert (results / "run1" / "ablations" / "kl.png").read_bytes().startswith(b"\x89PNG")
    assert emprl.main(["ablate", "reward", two[0], "--again"]) == 0 and len(measured) == 34
    assert emprl.main(["ablate", "reward", *two]) == 0 and len(measured) == 34


@pytest.fixture
def counted(monkeypatch):
    """The runs whose variants have been measured."""
    measured = []

    def measure(run, name, variant):
        measured.append(run.name)
        return ablate.figures_of(METRICS)

    monkeypatch.setattr(ablate, "measure", measure)
    return measured


def test_other_runs_figures_are_never_shown(two, results, counted):
    """Figures are kept with the run they are of: another run of the same seed is measured, and so is this one once made anew."""
    assert emprl.main(["ablate", "reward", two[0]]) == 0 and len(counted) == 4
    other = results / "other"
    shutil.copytree(two[1], other)
    (other / "metrics.json").write_text(
        json.dumps({"config": {"preset": "smoke", "seed": 0}, "key": "other"}),
        encoding="utf-8",
    )
    assert emprl.main(["ablate", "reward", str(other)]) == 0 and len(counted) == 8
    assert emprl.main(["ablate", "reward", two[0]]) == 0 and len(counted) == 8
    (results / "run0" / "metrics.json").write_text(
        json.dumps({"config": {"preset": "smoke", "seed": 0}, "key": "made anew"}),
        encoding="utf-8",
    )
    assert emprl.main(["ablate", "reward", two[0]]) == 0 and len(counted) == 12


@pytest.mark.parametrize("what", ["commit", "changed", "modules"])
def test_changed_code_is_measured(what, two, counted, monkeypatch):
    """A student changes PPO: nothing that older code measured is shown."""
    code = emprl.code_version()
    assert emprl.main(["ablate", "reward", two[0]]) == 0 and len(counted) == 4
    monkeypatch.setattr(emprl, "code_version", lambda: {**code, what: "another"})
    assert emprl.main(["ablate", "reward", two[0]]) == 0 and len(counted) == 8
    assert emprl.main(["ablate", "mechanisms", two[0]]) == 0 and len(counted) == 8 + 6


def test_nothing_is_written_elsewhere_without_being_told(two, results, counted):
    """Neither into the repository nor into the present folder: only into the run's own."""
    root = Path(emprl.__file__).parent
    pages = [*publish.PAGES, *(root / "tests" / "results").iterdir()]
    before = {path: path.read_bytes() for path in pages}
    for name in ("kl", "reward"):
        assert emprl.main(["ablate", name, *two]) == 0
    assert {path: path.read_bytes() for path in before} == before
    assert {path.name for path in results.iterdir()} == {"run0", "run1"}
    assert emprl.main(["ablate", "kl", *two, "--write", str(results / "kl.json")]) == 0
    assert set(stored(results / "kl.json")["beta 0"]) == {"0", "1"}
    assert (results / "kl.png").exists() and len(counted) == 2 * (5 + 4)


def test_a_run_whose_checkpoints_are_of_another_is_not_trained_anew_in_silence(
    finished, results, capsys, monkeypatch
):
    monkeypatch.setattr(t5_small.Trainer, "step", lambda *_: pytest.fail("trained"))
    copied = shutil.copytree(finished, results / "copied")
    metrics = json.loads((copied / "metrics.json").read_text(encoding="utf-8"))
    metrics["config"]["sft"]["lr"] = 1.0
    (copied / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    assert emprl.main(["ablate", "kl", str(copied)]) == 2
    err = capsys.readouterr().err
    assert "sft.pt: of other data or other settings" in err and err.count("\n") == 1, err


def test_interrupted_it_says_what_is_kept(two, results, capsys, monkeypatch):
    calls = []

    def interrupted(*_):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return ablate.figures_of(METRICS)

    monkeypatch.setattr(ablate, "measure", interrupted)
    assert emprl.main(["ablate", "reward", two[0]]) == 130
    out, err = capsys.readouterr()
    assert (
        "kept: 1 of 4" in out and f"go on with: python emprl.py ablate reward {two[0]}" in err
    )
    assert emprl.main(["ablate", "reward", two[0]]) == 0 and len(calls) == 5


@pytest.mark.parametrize("name", ablate.FROM_THE_START)
def test_from_the_start(name, results, monkeypatch):
    asked = []
    monkeypatch.setattr(
        ablate,
        "run",
        lambda folder, config, replaced: asked.append((folder.name, config)) or METRICS,
    )
    assert emprl.main(["ablate", name, "--write", str(results / "all.json")]) == 0
    assert len(asked) == len({folder for folder, _ in asked}) == len(ablate.ABLATIONS[name])
    assert list(stored(results / "all.json")) == list(ablate.ABLATIONS[name])
    trained = [c.data.num_train for _, c in asked]
    assert (
        trained
        == {"data": [3000, 6000, 12000], "pretraining": [3000] * 3, "own": [12000]}[name]
    )
    if name == "own":
        assert (
            len(
                (results / "runs" / "ablate-own-seed0" / "mine.jsonl")
                .read_text(encoding="utf-8")
                .splitlines()
            )
            == 1500
        )


SIDE = {
    f"{who}{key}": 0.5
    for who in ("", "judge_")
    for key in (
        "emp_f1",
        "emp_f1_er",
        "emp_f1_ip",
        "emp_f1_ex",
        "exact_match",
        *publish.MEASURES,
    )
}
METRICS = {
    name: {
        **SIDE,
        "length": 9.0,
        "reward": 0.2,
        "kl": 1.0,
        "perplexity": 2.0,
        "dist2": 3.0,
        "unique": 0.9,
        "perplexity_per_word": 4.0,
    }
    for name in ("sft", "emprl")
}


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["nothing", "x"], "no such ablation; choose one of mechanisms"),
        (["kl"], "give one finished RUN"),
        (["own", "x"], "takes no RUN"),
        (["kl", "missing"], "missing: no finished run of this version there"),
        ([], "ablate NAME [RUN ...]"),
    ],
)
def test_bad_calls_are_one_line(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert emprl.main(["ablate", *arguments]) == 2
    assert words in (err := capsys.readouterr().err) and err.count("\n") == 1, err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["[]", "", "{}", "\udcff"])
def test_damaged_and_equal_runs_are_refused(content, two, tmp_path, capsys):
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "metrics.json").write_text(
        content, errors="surrogateescape", encoding="utf-8"
    )
    assert emprl.main(["ablate", "kl", str(tmp_path / "cut")]) == 2
    assert emprl.main(["ablate", "kl", two[0], two[0]]) == 2
    err = capsys.readouterr().err
    assert (
        err.count("cut/metrics.json: damaged; delete it") == 1
        and "of different seeds" in err
        and err.count("\n") == 2
    )


# ---- the variants' own functions


def test_reinforce_and_grpo_by_hand():
    rewards, mask = (
        torch.tensor([[0.0, 1.0], [0.0, 3.0], [2.0, 0.0], [2.0, 0.0]]),
        torch.tensor([[1, 1], [1, 1], [1, 0], [1, 0]]).bool(),
    )
    advantages, returns = ablate.reinforce(
        rewards, None, mask, 1, 1
    )  # totals 1, 3, 2, 2, of mean 2
    assert advantages.tolist() == [[-1, -1], [1, 1], [0, 0], [0, 0]] and not returns.any()
    advantages, _ = ablate.grpo(
        rewards, None, mask, 1, 1
    )  # their standard deviation: (2/3)^0.5
    assert (
        torch.allclose(
            advantages[:2], torch.tensor([[-1.0, -1.0], [1.0, 1.0]]) * 1.5**0.5, atol=1e-5
        )
        and not advantages[2:].any()
    )


def test_grouped_gives_each_context_four_times():
    rows = [ablate.grouped([0] * 40, 16, 0)(i) for i in range(10)]
    assert all(len(r) == 16 and r[0] == r[3] != r[4] for r in rows) and sorted(
        sum(rows, [])
    ) == sorted([*range(40)] * 4)
    assert ablate.grouped([3, 4, 5, 6], 2, 0)(0) == ablate.BATCHES([3, 4, 5, 6], 2, 0)(0), (
        "other batches stay"
    )


def test_the_first_token_counts_for_nothing():
    mask, kl = (
        torch.tensor([[True, True, True], [True, True, False]]),
        torch.tensor([[5.0, 1.0, 2.0], [7.0, 1.0, 0.0]]),
    )
    rewards = ablate.rewards_of_later(
        torch.tensor([1.0, 2.0]), kl, torch.zeros(2, 3), mask, 0.5
    )
    assert rewards.tolist() == [[0, -0.5, 0], [0, 1.5, 0]], (
        "0.5 KL a token, and the score at the last"
    )
    a, b = torch.rand(2, 3), torch.rand(2, 3)
    c, d = a.clone(), b.clone()
    c[:, 0], d[:, 0] = 9.0, -9.0
    loss = [
        ablate.NO_FIRST_TOKEN["ppo.policy_loss"](x, b, y, mask, 0.2)[0]
        for x, y in ((a, b), (c, d))
    ]
    assert loss[0] == loss[1]


def test_recomputed_log_probs_are_those_of_the_sampling_and_unmodified_ones_are_not(
    monkeypatch,
):
    """The same within noise; without temperature and top-k every sampled token is less likely than it was, on the whole."""
    torch.manual_seed(0)
    policy = ppo.Policy(
        T5(
            T5Config(
                vocab_size=60,
                d_model=32,
                d_kv=8,
                d_ff=32,
                num_layers=1,
                num_decoder_layers=1,
                num_heads=2,
            )
        )
    ).eval()
    source, sampling = (
        torch.randint(3, 60, (6, 5)),
        Sampling(temperature=0.9, top_k=5, max_length=8),
    )

    def sample(rollout):
        torch.manual_seed(1)
        return rollout(
            policy,
            policy.t5,
            lambda context, response, index: torch.zeros(len(index)),
            source,
            torch.arange(6),
            sampling,
        )

    one, two = sample(ablate.ROLLOUT), sample(ablate.recomputed)
    assert torch.equal(one.ids, two.ids) and torch.allclose(
        one.log_probs, two.log_probs, atol=1e-5
    )
    monkeypatch.setattr(ppo, "score", ablate.unmodified)
    three = sample(ablate.recomputed)
    assert torch.equal(one.ids, three.ids) and three.log_probs.sum() < one.log_probs.sum() - 10
    logits = policy.t5.logits(policy.t5.response_states(source, three.ids)).log_softmax(-1)
    assert torch.allclose(
        three.log_probs,
        logits.gather(-1, three.ids[..., None])[..., 0] * three.mask,
        atol=1e-5,
    )


def test_a_table_is_put_below_its_anchor_and_nothing_else_moves(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(
        "# Page\n\n(tests/results/ablate-kl-smoke.json)\n\n| old |\n\nEnd.\n", encoding="utf-8"
    )
    monkeypatch.setattr(publish, "PAGES", (page,))
    figures = {v: {"0": ablate.figures_of(METRICS)} for v in ablate.ABLATIONS["kl"]}
    publish.put("tests/results/ablate-kl-smoke.json", ablate.table(figures, "kl"))
    text = page.read_text(encoding="utf-8")
    assert text.startswith(
        "# Page\n\n(tests/results/ablate-kl-smoke.json)\n\n| variant | gain"
    ) and text.endswith(" |\n\nEnd.\n")
    assert "old" not in text and text.count("\n| beta") == 4
