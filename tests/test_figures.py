"""Figures are what their label says: each from a run of the smallest preset, or by hand."""

import pytest
import torch

import data
import emprl
import finished
import ppo
import t5_small


def smoke(folder, *settings):
    """The metrics of a run of `smoke` with some settings."""
    return emprl.run_all(emprl.Run(folder, emprl.make_config("smoke", settings=settings)))


def weights(folder):
    return t5_small.load_state(folder / "pytorch_model.bin")


def test_without_a_validation_the_last_weights_stay(tmp_path):
    """Pre-training has nothing to validate by: how often it would makes no difference."""
    for every in (2, 6):
        settings = [f"pretrain.eval_every={every}", "sft.steps=0", "ppo.steps=0"]
        smoke(tmp_path / str(every), "pretrain.steps=6", *settings)
    often, once = (weights(tmp_path / str(every) / "sft") for every in (2, 6))
    assert all((often[name] == once[name]).all() for name in once)
    logs = [(tmp_path / str(every) / "metrics.jsonl").read_text() for every in (2, 6)]
    assert logs[0] == logs[1] and logs[0].count('"pretrain"') == 6


# ---- kl


FAR = (
    "ppo.lr=0.5 ppo.steps=2 ppo.warmup=0 ppo.kl_coef=0 ppo.max_update_kl=1e9 ppo.max_ratio=1e9"
)
SAMPLINGS = [
    [],
    ["sampling.temperature=0.5", "sampling.top_k=5", "sampling.min_length=4"],
    ["sampling.temperature=1.5", "sampling.top_p=0.6"],
]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_kl_is_that_of_the_distribution_sampled_from(sampling, tmp_path):
    """As PPO's log has it, worked out anew by a rollout to the same contexts; and never far below 0."""
    metrics = smoke(tmp_path, *FAR.split(), *sampling)
    run, tokenizer, _, models = finished.load_run(tmp_path)
    c = run.config.data
    corpus = data.embedded_corpus(0, c.num_train, c.num_valid, c.num_test, c.num_labelled)
    pairs = data.Pairs(corpus.dialogues["test"], tokenizer, c.max_source, c.max_target)
    policy = ppo.Policy(models["emprl"])
    (rows,) = pairs.chunks(128)
    run.seed("evaluate emprl")
    r = ppo.rollout(
        policy,
        models["sft"],
        lambda source, ids, index: index.float(),
        pairs.batch(rows)[0],
        torch.tensor(rows),
        run.config.sampling,
    )
    expected = ppo.kl_estimate(r.log_probs, r.ref_log_probs).sum(1).mean().item()
    assert expected > 0.3, "no distance: the test is blind"
    assert metrics["emprl"]["kl"] == pytest.approx(expected, rel=1e-3)
    assert metrics["sft"]["kl"] == 0


def test_greedy_replies_have_no_kl(tmp_path):
    """Null in metrics.json, blank in the table; the bound of the best of n stays."""
    metrics = smoke(tmp_path, "ppo.steps=0")
    assert metrics["sft_greedy"]["kl"] is metrics["emprl_greedy"]["kl"] is None
    (row,) = (
        line for line in (tmp_path / "report.md").read_text().splitlines() if "| kl |" in line
    )
    assert [cell.strip() for cell in row.split("|")[4:7]] == ["0.000", "", ""], row
    assert metrics["best_of_n"]["kl"] > 0
