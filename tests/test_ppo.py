"""ppo.py: every equation against figures made by hand, and the trainer on a tiny policy with a trivial reward."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import ppo
import t5_small
from conftest import check
from t5_small import T5, Sampling, T5Config

SAMPLING = Sampling(temperature=0.9, top_k=5, min_length=3, max_length=8)
LN = math.log


# ---- equations -------------------------------------------------------------------------------------


def test_response_mask():
    ids = torch.tensor(
        [
            [5, 6, 1, 0, 0],  # t1 .. </s>, exactly
            [1, 0, 0, 0, 0],  # </s> first
            [5, 6, 7, 8, 9],  # never ends
            [5, 1, 7, 1, 0],  # what follows the first </s> is not the response
            [5, 6, 7, 8, 1],
        ]
    )
    check(
        "mask of t1 .. the first </s>",
        ppo.response_mask(ids).long(),
        [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]],
    )
    check(
        "another </s> id",
        ppo.response_mask(torch.tensor([[4, 1, 3, 0]]), eos_id=3).long(),
        [[1, 1, 1, 0]],
    )
    assert ppo.response_mask(ids).dtype == torch.bool


def test_token_log_probs():
    logits = torch.tensor([[[1.0, 2.0, 4.0, 8.0], [8.0, 4.0, 2.0, 2.0]]]).log()
    ids = torch.tensor([[2, 0]])
    log_probs, entropy = ppo.token_log_probs(logits, ids)
    check("log 4/15 and log 8/16", log_probs, [[LN(4 / 15), LN(8 / 16)]])
    check("entropy of the second, 1/2 1/4 1/8 1/8", entropy[0, 1], 1.75 * LN(2))
    support = torch.tensor([[[False, True, True, False], [True, True, True, True]]])
    log_probs, entropy = ppo.token_log_probs(logits, ids, support, temperature=0.5)
    check(
        "temperature 0.5 squares: 16/(4 + 16) over the support, 64/(64 + 16 + 4 + 4)",
        log_probs,
        [[LN(16 / 20), LN(64 / 88)]],
    )
    check("entropy over the support", entropy[0, 0], -0.2 * LN(0.2) - 0.8 * LN(0.8))
    total = sum(
        ppo.token_log_probs(logits, torch.full((1, 2), v), support, 0.5)[0].exp()
        for v in range(4)
    )
    check("the tokens' probabilities add up to 1", total, [[1.0, 1.0]])
    assert entropy.isfinite().all()


def test_kl_estimate():
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    k1, k3 = (ppo.kl_estimate(p.log(), q.log(), kind) for kind in ("k1", "k3"))
    check("k1 = log p - log q", k1, [LN(2.5), LN(1.5), LN(1 / 3)])
    check(
        "k3 = q / p - 1 + log p - log q",
        k3,
        [0.4 - 1 + LN(2.5), 2 / 3 - 1 + LN(1.5), 3 - 1 + LN(1 / 3)],
    )
    kl = (p * (p / q).log()).sum()
    check("the mean of k1 under p is KL(p || q)", (p * k1).sum(), kl)
    check("the mean of k3 under p is KL(p || q)", (p * k3).sum(), kl)
    d = torch.linspace(-3, 3, 61)
    assert (ppo.kl_estimate(d, torch.zeros(61), "k3") >= -1e-6).all(), "k3 is never negative"
    check("k1 is the default", ppo.kl_estimate(p.log(), q.log()), k1)


def test_masked_mean():
    x, mask = (
        torch.tensor([[1.0, 2.0, 99.0], [6.0, 99.0, 99.0]]),
        torch.tensor([[1, 1, 0], [1, 0, 0]]).bool(),
    )
    check("(1 + 2 + 6) / 3: every token counts the same", ppo.masked_mean(x, mask), 3.0)


def test_whiten():
    x, mask = (
        torch.tensor([[2.0, 4.0, 99.0], [6.0, -50.0, 7.0]]),
        torch.tensor([[1, 1, 0], [1, 0, 0]]).bool(),
    )
    check(
        "2, 4, 6 have mean 4 and sample std 2; padding becomes 0",
        ppo.whiten(x, mask),
        [[-1.0, 0, 0], [1, 0, 0]],
    )
    check(
        "without the shift the mean stays 4",
        ppo.whiten(x, mask, shift_mean=False),
        [[3.0, 4, 0], [5, 0, 0]],
    )
    check(
        "no variance: zeros, not nan",
        ppo.whiten(torch.full((2, 3), 7.0), mask),
        torch.zeros(2, 3),
        tol=1e-3,
    )
    one = torch.tensor([[True, False]])
    check(
        "one token: zero, not nan", ppo.whiten(torch.tensor([[3.0, 5.0]]), one), [[0.0, 0.0]]
    )


def test_token_rewards():
    log_probs = torch.tensor([[-1.0, -2.0, -0.5, -9.0], [-1.0, -3.0, -2.0, -1.0]])
    ref = torch.tensor([[-1.5, -1.0, -0.5, 5.0], [-1.0, -1.0, -3.0, -2.0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]).bool()  # the second response never ends
    scores = torch.tensor([10.0, 20.0])
    got = ppo.token_rewards(scores, log_probs, ref, mask, kl_coef=0.1)
    check(
        "-0.1 (log p - log p_ref), and the score at the last real token",
        got,
        [[-0.05, 0.1, 10.0, 0.0], [0.0, 0.2, -0.1, 19.9]],
    )
    check("the scores are left alone", scores, [10.0, 20.0])
    one = torch.tensor([[True, False, False, False]])
    check(
        "one token",
        ppo.token_rewards(torch.tensor([3.0]), log_probs[:1], ref[:1], one, 1.0),
        [[2.5, 0, 0, 0]],
    )


def test_gae():
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.6, 0.7]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    advantages, returns = ppo.gae(rewards, values, mask, gamma=0.9, lam=0.8)
    # delta = .9 * .6 - .5, .9 * .7 - .6, 1 - .7 = .04, .03, .3;  A = delta + .72 A_next
    check("advantages", advantages, [[0.21712, 0.246, 0.3]])
    check("returns = A + V", returns, [[0.71712, 0.846, 1.0]])
    check(
        "lambda 0: the one-step errors",
        ppo.gae(rewards, values, mask, 0.9, 0.0)[0],
        [[0.04, 0.03, 0.3]],
    )
    rewards = torch.tensor([[0.1, -0.2, 1.0]])
    advantages, returns = ppo.gae(rewards, values, mask, 1.0, 1.0)
    check("lambda 1, gamma 1: returns are the rewards to come", returns, [[0.9, 0.8, 1.0]])
    check("lambda 1, gamma 1: minus the value", advantages, [[0.4, 0.2, 0.3]])


def test_gae_ignores_padding():
    rewards, values = (
        torch.tensor([[0.0, 1.0, 77.0, -5.0]] * 2),
        torch.tensor([[0.5, 0.6, 88.0, 9.0]] * 2),
    )
    mask = torch.tensor([[True, True, False, False]] * 2)
    advantages, returns = ppo.gae(rewards, values, mask, 1.0, 0.5)
    check("advantages", advantages, [[0.3, 0.4, 0, 0]] * 2)  # delta = .1, .4
    check("returns", returns, [[0.8, 1.0, 0, 0]] * 2)


def test_policy_loss():
    ratio = torch.tensor([[1.5, 0.5, 1.5, 0.5], [1.1, 3.0, 3.0, 3.0]])
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0], [2.0, 9.0, -9.0, 9.0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    old = torch.full((2, 4), -2.0)
    log_probs = (old + ratio.log()).requires_grad_()
    loss, share = ppo.policy_loss(log_probs, old, advantages, mask, 0.2)
    check("-(1.2 + 0.5 - 1.5 - 0.8 + 2.2) / 5", loss, -0.32)
    check("clipped: 1.5 with A > 0 and 0.5 with A < 0, of 5", share, 0.4)
    loss.backward()
    check(
        "no gradient where clipped, -ratio A / 5 elsewhere",
        log_probs.grad,
        [[0.0, -0.1, 0.3, 0.0], [-0.44, 0.0, 0.0, 0.0]],
    )
    check(
        "clipped at 0.1: -(1.1 + 0.5 - 1.5 - 0.9 + 2.2) / 5",
        ppo.policy_loss(log_probs, old, advantages, mask, 0.1)[0],
        -0.28,
    )


def test_value_loss():
    values = torch.tensor(
        [[0.5, -0.5, 0.5, -0.5], [0.1, 50.0, 50.0, 50.0]], requires_grad=True
    )
    returns = torch.tensor([[1.0, 1.0, -1.0, -1.0], [1.0, 0.0, 0.0, 0.0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    loss = ppo.value_loss(values, torch.zeros(2, 4), returns, mask, 0.2)
    check("1/2 (0.8^2 + 1.5^2 + 1.5^2 + 0.8^2 + 0.9^2) / 5, clipped at +-0.2", loss, 0.659)
    loss.backward()
    check(
        "no gradient where the clipped error is the larger",
        values.grad,
        [[0, -0.3, 0.3, 0], [-0.18, 0, 0, 0]],
    )
    old = torch.tensor([[0.4, 0.0, 0.0, 0.0]])
    check(
        "clipped around the old value 0.4: 1/2 max(0, 0.4^2)",
        ppo.value_loss(
            torch.tensor([[1.0, 0, 0, 0]]),
            old,
            torch.tensor([[1.0, 0, 0, 0]]),
            torch.tensor([[True, False, False, False]]),
            0.2,
        ),
        0.08,
    )


def test_beta_stays_positive():
    """Any horizon, batch and KL, many times over: 1,000 random cases. Where the horizon is long it is Ziegler's formula."""
    g = torch.Generator().manual_seed(0)
    for batch, horizon, kl, target in 10 ** (
        6 * torch.rand(1000, 4, generator=g).double() - 1
    ):
        batch, beta = max(int(batch), 1), 0.3
        for sign in (1, -1, 1, -1, -1):
            changed = ppo.adapt_kl_coef(beta, sign * kl.item(), target, batch, horizon)
            assert 0 < changed < math.inf, (batch, horizon, kl, target)
            error = float(min(max(sign * kl / target - 1, -0.2), 0.2))
            assert (changed - beta) * error >= 0, "the wrong way"
            if batch <= horizon:
                expected = beta * (1 + error * batch / float(horizon))
                assert changed == pytest.approx(expected, rel=1e-9)
            beta = float(changed)


def test_adapt_kl_coef():
    check("KL at its target", ppo.adapt_kl_coef(0.2, 6.0, 6.0, 32, 1000), 0.2)
    check(
        "10 % above: 0.2 (1 + 0.1 * 32 / 1000)",
        ppo.adapt_kl_coef(0.2, 6.6, 6.0, 32, 1000),
        0.20064,
    )
    check(
        "far above: the error is clipped at 0.2",
        ppo.adapt_kl_coef(0.2, 60.0, 6.0, 32, 1000),
        0.20128,
    )
    check("far below: at -0.2", ppo.adapt_kl_coef(0.2, -1.0, 6.0, 32, 1000), 0.19872)
    for kl in (-5.0, 0.0, 5.9, 8.0, 1000.0):
        change = abs(ppo.adapt_kl_coef(1.0, kl, 6.0, 32, 10_000) - 1)
        assert change <= 0.00064 + 1e-12, (
            f"the original's beta moves at most 0.064 % a step, not {change:.4%}"
        )


def test_running_moments():
    g = torch.Generator().manual_seed(0)
    batches = [
        torch.randn(n, generator=g) * s + m
        for n, s, m in ((5, 1, 0), (1, 0, 9), (32, 0.1, -3), (7, 4, 100))
    ]
    moments = ppo.RunningMoments()
    for i, batch in enumerate(batches):
        moments.update(batch)
        seen = torch.cat(batches[: i + 1])
        check(
            f"mean and std of all {len(seen)} scores",
            [moments.mean, moments.std],
            [seen.mean(), seen.std()],
        )
    same = ppo.RunningMoments()
    for _ in range(3):
        same.update(torch.full((4,), 0.7))
    assert same.std == 1.0, "equal scores: nothing to scale by"


# ---- a tiny policy ---------------------------------------------------------------------------------


def share_of(token):
    """The reward: the share of one token among the response's."""
    return lambda source, ids, index: (ids == token).float().sum(1) / (ids != 0).sum(1)


def some_reward(source, ids, index):
    return (ids.float().sum(1) * 0.37 + index).sin()


def sources(step, batch=12):
    g = torch.Generator().manual_seed(1000 + step)
    source = torch.randint(3, 16, (batch, 6), generator=g)
    for row in range(batch):
        source[row, 2 + row % 5 :] = 0
    return source, torch.arange(batch) + step


class Tiny(T5):
    """A small random T5; eos: added to the logit of </s>."""

    def __init__(self, eos):
        torch.manual_seed(0)
        super().__init__(
            T5Config(
                vocab_size=16,
                d_model=16,
                d_kv=8,
                d_ff=32,
                num_layers=1,
                num_decoder_layers=1,
                num_heads=2,
                relative_attention_num_buckets=8,
                relative_attention_max_distance=16,
            )
        )
        self.eos = eos

    def logits(self, states):
        return super().logits(states) + self.eos * F.one_hot(torch.tensor(1), 16)


def trainer(reward=some_reward, eos=1.5, sampling=SAMPLING, batch=12, **changes):
    config = {
        "steps": 20,
        "ppo_epochs": 2,
        "minibatch_size": 4,
        "warmup": 1,
        "lr": 1e-2,
        "lam": 0.95,
        "eval_every": 100,
        **changes,
    }
    config = ppo.PPOConfig(**config)
    return ppo.PPOTrainer(
        Tiny(eos), reward, lambda i: sources(i, batch), lambda t5: {}, sampling, config
    )


def run(trainer, steps):
    records = []
    for i in steps:
        torch.manual_seed(500 + i)
        records.append(trainer.step(i))
    return records


def t5_weights(t5):
    return torch.cat([p.detach().flatten() for p in t5.parameters()])


def weights(trainer):
    return t5_weights(trainer.policy)


def assert_finite(trainer, records):
    assert weights(trainer).isfinite().all()
    for record in records:
        bad = {k: v for k, v in record.items() if not math.isfinite(v)}
        assert not bad, f"not finite: {bad}"


# ---- rollout and score -----------------------------------------------------------------------------


def test_rollout_is_what_score_says():
    """Log-probs and values of the sampling itself = those of a second, teacher-forced pass."""
    t, (source, index) = trainer(), sources(0)
    t.policy.value_head.weight.data.normal_()
    r = ppo.rollout(t.policy, t.reference, some_reward, source, index, SAMPLING)
    with torch.no_grad():
        log_probs, entropy, values = ppo.score(
            t.policy.t5, source, r.ids, r.mask, r.support, 0.9, t.policy.values
        )
        logits = t.policy.t5.logits(t.policy.t5.response_states(source, r.ids))
    assert torch.equal(r.mask, ppo.response_mask(r.ids)) and not r.mask.all()
    check("log-probs", r.log_probs, log_probs)
    check("values", r.values, values)
    full = (logits / 0.9).masked_fill(~r.support, -1e9).log_softmax(-1)
    by_hand = full.gather(-1, r.ids[..., None])[..., 0] * r.mask
    check("log-probs by hand, 0 on padding", r.log_probs, by_hand)
    check("entropy by hand", entropy, -(full.exp() * full).sum(-1) * r.mask)
    states = t.policy.t5.response_states(source, r.ids)
    check("values by hand, 0 on padding", r.values, t.policy.values(states) * r.mask)
    check("the reference is the policy as yet", r.ref_log_probs, r.log_probs)
    check("scores", r.scores, some_reward(source, r.ids, index))
    assert ((r.support & r.mask[..., None]).sum(-1)[r.mask] == 5).all() and not r.support[
        :, :2, 1
    ].any()
    for name, temperature, support in (
        ("temperature", 1.0, r.support),
        ("support", 0.9, torch.ones_like(r.support)),
    ):
        wrong = ppo.score(t.policy.t5, source, r.ids, r.mask, support, temperature)[0]
        assert (wrong - r.log_probs).abs().max() > 0.05, (
            f"the {name} makes no difference: the test is blind"
        )


def test_rollout_hands_the_reward_what_was_sampled():
    seen = []

    def reward(source, ids, index):
        seen.extend(zip(source.tolist(), ids.tolist(), index.tolist()))
        return index.double()

    t, (source, index) = trainer(), sources(3)
    r = ppo.rollout(t.policy, t.reference, reward, source, index, SAMPLING)
    assert len(seen) == len(index), "each response once, in whatever order"
    for context, ids, i in seen:
        row = index.tolist().index(i)
        assert (
            context == source[row].tolist()
            and ids == r.ids[row, : len(ids)].tolist()
            and not r.ids[row, len(ids) :].any()
        )
    assert r.scores.tolist() == index.tolist(), "and the scores are in the rollout's order"
    assert (
        r.scores.dtype == torch.float32
        and not r.log_probs.requires_grad
        and not r.values.requires_grad
    )


@pytest.mark.parametrize(
    "sampling", [SAMPLING, replace(SAMPLING, top_k=0, top_p=0.7), Sampling(max_length=8)]
)
def test_ratio_is_one_before_the_first_step(sampling):
    t = trainer(sampling=sampling, minibatch_size=5)
    for record in run(t, range(3)):  # also once the policy has left the reference
        assert record["first_ratio_error"] < 1e-5, (
            f"ratio differs from 1 by {record['first_ratio_error']:.1e}"
        )
    assert abs(record["kl"]) > 1e-3


def test_kl_is_zero_at_first_and_the_reference_stays():
    t = trainer()
    before = [p.clone() for p in t.reference.parameters()]
    records = run(t, range(4))
    assert abs(records[0]["kl"]) < 1e-4 and abs(records[0]["kl_k3"]) < 1e-4
    assert records[3]["kl_k3"] > 1e-3
    assert all(
        torch.equal(p, q) and not p.requires_grad
        for p, q in zip(t.reference.parameters(), before)
    )


# ---- the trainer -----------------------------------------------------------------------------------


def test_step_records_and_counts():
    t = trainer(
        ppo_epochs=3,
        minibatch_size=5,
        adaptive_kl=True,
        kl_coef=0.3,
        kl_target=0.7,
        kl_horizon=100.0,
    )
    record = run(t, [0])[0]
    assert record["optimizer_steps"] == 9, "3 epochs of 12 rollouts in minibatches of 5"
    assert record["kl_coef"] == 0.3
    first = ppo.adapt_kl_coef(0.3, record["kl"], 0.7, 12, 100.0)
    check("beta after the first iteration", t.kl_coef, first, tol=1e-7)
    second = run(t, [1])[0]
    assert second["kl_coef"] == first and abs(second["kl"] / 0.7 - 1) < 0.2, (
        "not a test of the unclipped case"
    )
    check(
        "beta after the second: by k1's estimate",
        t.kl_coef,
        first * (1 + (second["kl"] / 0.7 - 1) * 0.12),
        tol=1e-7,
    )
    fresh = trainer()
    torch.manual_seed(500)
    r = ppo.rollout(fresh.policy, fresh.reference, some_reward, *sources(0), SAMPLING)
    check("mean length", record["length"], r.mask.sum(1).float().mean())
    check("mean reward, as it came", record["reward"], r.scores.mean())
    fixed = trainer(adaptive_kl=False, kl_coef=0.3)
    run(fixed, range(2))
    assert fixed.kl_coef == 0.3


@pytest.mark.parametrize("normalise", [False, True])
def test_scores_are_scaled_by_running_moments(normalise, monkeypatch):
    handed, raw, plain = [], [], ppo.token_rewards

    def spy(scores, *others):
        handed.append(scores.clone())
        return plain(scores, *others)

    def reward(source, ids, index):
        scores = some_reward(source, ids, index)
        raw.append(scores[index.argsort()])  # they come with like lengths together
        return scores

    monkeypatch.setattr(ppo, "token_rewards", spy)
    run(trainer(reward, scale_scores=True, normalise_scores=normalise), range(2))
    seen = torch.cat(raw)
    check(
        "scores of the second iteration",
        handed[1],
        (raw[1] - (seen.mean() if normalise else 0)) / seen.std(),
    )
    handed.clear()
    run(trainer(some_reward, scale_scores=False, normalise_scores=False), range(1))
    check("flags off: as they came", handed[0], raw[0])


@pytest.mark.parametrize("on", [False, True])
def test_rewards_are_whitened_on_request(on, monkeypatch):
    handed, made, gae, token_rewards = [], [], ppo.gae, ppo.token_rewards
    monkeypatch.setattr(
        ppo,
        "token_rewards",
        lambda *a: made.append((token_rewards(*a), a[3])) or made[-1][0].clone(),
    )
    monkeypatch.setattr(
        ppo, "gae", lambda rewards, *a: handed.append(rewards.clone()) or gae(rewards, *a)
    )
    run(trainer(whiten_rewards=on), [0])
    rewards, mask = made[0]
    check(
        "rewards that GAE sees",
        handed[0],
        rewards / rewards[mask].std()
        + ((rewards[mask].mean() - rewards[mask].mean() / rewards[mask].std()) * mask)
        if on
        else rewards,
    )


def spied_gradients(monkeypatch, **changes):
    gradients, plain = [], ppo.optimizer_step

    def spy(optimizers, max_grad_norm):
        gradients.append(
            [
                g["params"][0].grad.clone()
                for optimizer in optimizers
                for g in optimizer.param_groups
            ]
        )
        return plain(optimizers, max_grad_norm)

    monkeypatch.setattr(ppo, "optimizer_step", spy)
    record = run(trainer(ppo_epochs=1, minibatch_size=12, **changes), [0])[0]
    monkeypatch.setattr(ppo, "optimizer_step", plain)
    return gradients[0], record


def test_human_responses_are_learnt_on_request(monkeypatch):
    """ptx_coef g adds g x the gradient of the human responses' mean negative log-likelihood a token, of the rollout's own contexts."""
    human = torch.tensor([[3, 4, 1], [5, 1, 0], [6, 7, 1]])
    asked = []

    def losses(t):
        def human_loss(index):
            asked.append(index.tolist())
            return t.policy.t5.loss_sum(sources(0)[0][: len(index)], human[index % 3])

        return human_loss

    gradients, plain = [], ppo.optimizer_step
    monkeypatch.setattr(
        ppo,
        "optimizer_step",
        lambda o, n: gradients.append(
            {g["name"]: g["params"][0].grad.clone() for g in o[0].param_groups}
        )
        or plain(o, n),
    )
    for coef in (0.0, 0.5):
        t = trainer(ppo_epochs=1, minibatch_size=12, ptx_coef=coef)
        t.human_loss = losses(t)
        fresh = trainer()
        record = run(t, [0])[0]
        assert ("human_loss" in record) == (coef > 0)
    (index,) = asked
    assert sorted(index) == sorted(sources(0)[1].tolist()), (
        "once, for the pairs of the rollout"
    )
    total, tokens = fresh.policy.t5.loss_sum(sources(0)[0], human[torch.tensor(index) % 3])
    check("what is logged", record["human_loss"], total / tokens)
    (total / tokens).backward()
    for name, p in fresh.policy.named_parameters():
        if p.grad is not None:
            check(name, gradients[1][name] - gradients[0][name], 0.5 * p.grad, tol=1e-4)


def ragged_humans(t):
    """Human responses whose lengths have nothing to do with those of the sampled ones: 1, 8, 2, 1, ... tokens."""

    def human_loss(index):
        lengths = torch.tensor([1, 8, 2])[index % 3]
        ids = torch.arange(8) + 3 + index[:, None] % 5
        ids = ids.masked_fill(torch.arange(8) >= lengths[:, None], 0)
        ids[torch.arange(len(index)), lengths - 1] = 1
        return t.policy.t5.loss_sum(sources(0)[0][index], ids)

    return human_loss


@pytest.mark.parametrize("ptx_coef", [0.0, 0.5])
@pytest.mark.parametrize("micro_batch", [1, 5, 7])
def test_micro_batch_is_the_whole_minibatch(micro_batch, ptx_coef, monkeypatch):
    """Gradient and log, value loss and human responses included; 5 and 7 do not divide the 12 rollouts."""
    seen, plain = [], ppo.optimizer_step

    def spy(optimizers, max_grad_norm):
        groups = [g for optimizer in optimizers for g in optimizer.param_groups]
        seen.append({g["name"]: g["params"][0].grad.clone() for g in groups})
        return plain(optimizers, max_grad_norm)

    monkeypatch.setattr(ppo, "optimizer_step", spy)
    records = []
    for size in (0, micro_batch):
        t = trainer(
            ppo_epochs=1,
            minibatch_size=12,
            micro_batch=size,
            ptx_coef=ptx_coef,
            value_coef=3.0,
        )
        t.human_loss = ragged_humans(t)
        torch.nn.init.normal_(t.policy.value_head.weight, generator=torch.manual_seed(1))
        records.append(run(t, [0])[0])
    whole, parts = seen
    assert len(whole) > 10 and whole["value_head.weight"].abs().max() > 1e-3
    for name in whole:
        check(name, parts[name], whole[name], tol=1e-6)
    for name in records[0]:
        check(name, records[1][name], records[0][name], tol=1e-5)
    assert ("human_loss" in records[1]) == (ptx_coef > 0)


def test_first_gradient_is_reinforce(monkeypatch):
    """At ratio 1 the policy's gradient is that of -mean(A log p): worked out here for the decoder's final norm."""
    gradients, _ = spied_gradients(
        monkeypatch,
        value_coef=0.0,
        whiten_advantages=False,
        kl_coef=0.0,
        lam=1.0,
        scale_scores=False,
    )
    t, (source, index) = trainer(), sources(0)
    torch.manual_seed(500)
    r = ppo.rollout(t.policy, t.reference, some_reward, source, index, SAMPLING)
    logits = t.policy.t5.logits(t.policy.t5.response_states(source, r.ids)) / 0.9
    log_probs = (
        logits.masked_fill(~r.support, -1e9)
        .log_softmax(-1)
        .gather(-1, r.ids[..., None])[..., 0]
    )
    (
        -(r.scores[:, None] * log_probs)[r.mask].sum() / r.mask.sum()
    ).backward()  # value 0, so A = the score
    index = [n for n, _ in t.policy.named_parameters()].index("t5.decoder.final_norm.weight")
    check(
        "gradient of decoder.final_norm",
        gradients[index],
        t.policy.t5.decoder.final_norm.weight.grad,
    )


def test_ratio_guard():
    t = trainer(max_ratio=0.5)  # the mean ratio is 1 at first: never learnt from
    before = weights(t)
    record = run(t, [0])[0]
    assert record["optimizer_steps"] == 0 and torch.equal(weights(t), before)
    assert all(p.grad is None or not p.grad.any() for p in t.policy.parameters()), (
        "a refused gradient was kept"
    )
    assert run(trainer(max_ratio=1.5), [0])[0]["optimizer_steps"] == 6


def test_kl_early_stop():
    t = trainer(max_update_kl=-1.0)
    before = weights(t)
    assert run(t, [0])[0]["optimizer_steps"] == 0 and torch.equal(weights(t), before), (
        "stops before the first step"
    )
    t = trainer(max_update_kl=1e-5, minibatch_size=12, ppo_epochs=5)
    record = run(t, [0])[0]
    assert record["optimizer_steps"] == 1, (
        "the second pass finds that the first step moved too far"
    )
    check("and leaves the weights of one step", weights(t), one_step_weights())
    assert all(p.grad is None or not p.grad.any() for p in t.policy.parameters())
    assert (
        run(trainer(max_update_kl=1e9, minibatch_size=12, ppo_epochs=5), [0])[0][
            "optimizer_steps"
        ]
        == 5
    )


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_an_early_stop_ends_all_epochs_and_is_logged(average, monkeypatch):
    """3 minibatches, 5 epochs; the first minibatch of the second epoch finds that the policy has moved too far."""
    looked_at, policy_loss, kl_estimate = [], ppo.policy_loss, ppo.kl_estimate

    def count(*arguments):
        looked_at.append(1)
        return policy_loss(*arguments)

    def far(*arguments):
        return kl_estimate(*arguments) + 9.0 * (len(looked_at) == 4)

    monkeypatch.setattr(ppo, "policy_loss", count)
    monkeypatch.setattr(ppo, "kl_estimate", far)
    options = dict(max_update_kl=5.0, average=average)
    stopped = trainer(ppo_epochs=5, **options)
    record = run(stopped, [0])[0]
    assert len(looked_at) == 4, "an epoch went on"
    assert record["stopped_early"] == 1 and record["epochs"] == 1
    assert record["optimizer_steps"] == 3
    monkeypatch.undo()
    once = trainer(ppo_epochs=1, **options)
    run(once, [0])
    assert torch.equal(weights(stopped), weights(once)), "and leaves the weights of one epoch"
    assert torch.equal(t5_weights(stopped.average), t5_weights(once.average))
    whole = run(trainer(ppo_epochs=5, **options), [0])[0]
    assert whole["stopped_early"] == 0 and whole["epochs"] == 5
    assert whole["optimizer_steps"] == 15


def one_step_weights():
    t = trainer(minibatch_size=12, ppo_epochs=1)
    run(t, [0])
    return weights(t)


def test_learning_rate_warms_up_and_decays(monkeypatch):
    rates = []
    monkeypatch.setattr(
        ppo, "set_lr", lambda optimizer, lr, rms_scaled: rates.append((lr, rms_scaled))
    )
    run(trainer(steps=5, warmup=2, lr=1.0, rms_scaled=False), range(5))
    check("1/2, then 1 - i / 5", [lr for lr, _ in rates], [0.5, 0.8, 0.6, 0.4, 0.2])
    assert not any(scaled for _, scaled in rates)


def test_the_mean_of_the_weights_is_the_result(monkeypatch):
    """By hand from the weights after every optimizer step; the rate stays, since the mean does what its decay would."""
    rates, seen, plain = [], [], trainer(average=0.8, minibatch_size=6)
    set_lr, optimizer_step = ppo.set_lr, ppo.optimizer_step

    def watched(*arguments):
        norm = optimizer_step(*arguments)
        seen.append(t5_weights(plain.policy.t5))
        return norm

    monkeypatch.setattr(
        ppo, "set_lr", lambda o, lr, scaled: rates.append(lr) or set_lr(o, lr, scaled)
    )
    monkeypatch.setattr(ppo, "optimizer_step", watched)
    mean = t5_weights(plain.reference)
    run(plain, range(3))
    for new in seen:
        mean = 0.8 * mean + 0.2 * new
    assert len(seen) == 3 * 2 * 2 and len({*rates}) == 1, rates
    check("the mean", t5_weights(plain.average), mean)
    check(
        "the policy goes on from its own weights", t5_weights(plain.policy.t5), seen[-1], tol=0
    )
    plain.finish()
    check("the result", t5_weights(plain.policy.t5), mean)
    last = trainer()
    run(last, range(2))
    before = weights(last)
    last.finish()
    assert last.average is last.policy.t5 and torch.equal(weights(last), before), (
        "0: the last weights"
    )


def test_validation_is_logged():
    t = ppo.PPOTrainer(
        Tiny(0),
        some_reward,
        sources,
        lambda t5: {"valid": float(isinstance(t5, T5))},
        SAMPLING,
        ppo.PPOConfig(steps=3, eval_every=2),
    )
    assert [r.get("valid") for r in run(t, range(3))] == [None, 1.0, 1.0]


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"whiten_rewards": True, "normalise_scores": True},
        {"whiten_advantages": False, "scale_scores": False},
    ],
)
def test_equal_rewards_stay_finite(flags):
    t = trainer(lambda source, ids, index: torch.full((len(ids),), 0.5), kl_coef=0.0, **flags)
    assert_finite(t, run(t, range(3)))


def test_responses_of_one_token():
    t = trainer(eos=80.0, sampling=Sampling(max_length=8))
    records = run(t, range(2))
    assert records[0]["length"] == 1 and records[0]["optimizer_steps"] == 6
    assert_finite(t, records)
    assert records[0]["first_ratio_error"] < 1e-5


def test_one_response_of_one_token():
    t = trainer(eos=80.0, sampling=Sampling(max_length=8), batch=1)
    run(t, range(2))
    assert weights(t).isfinite().all()


def test_responses_that_never_end():
    t = trainer(eos=-80.0)
    records = run(t, range(2))
    assert records[0]["length"] == SAMPLING.max_length and records[0]["optimizer_steps"] == 6
    assert_finite(t, records)
    assert records[0]["first_ratio_error"] < 1e-5


LEARN = dict(batch=48, minibatch_size=24, steps=25, lr=1e-2, adaptive_kl=False, ppo_epochs=2)


def test_learns_a_trivial_reward_and_kl_holds_back():
    free = trainer(share_of(7), sampling=Sampling(max_length=6), kl_coef=0.0, **LEARN)
    held = trainer(share_of(7), sampling=Sampling(max_length=6), kl_coef=5.0, **LEARN)
    free_records, held_records = run(free, range(25)), run(held, range(25))
    first, last = free_records[0]["reward"], sum(r["reward"] for r in free_records[-5:]) / 5
    assert first < 0.2 and last > first + 0.4, f"reward {first:.3f} -> {last:.3f}"
    kl, held_kl = (
        sum(r["kl"] for r in records[-5:]) / 5 for records in (free_records, held_records)
    )
    assert kl > 1 and held_kl < 0.2 * kl, (
        f"KL {kl:.3f} without a penalty, {held_kl:.3f} with one of 5"
    )


def test_value_head_learns_the_return():
    """With equal rewards of 1 and no penalty every return is 1: the value has to get there from 0."""
    t = trainer(
        lambda source, ids, index: torch.ones(len(ids)), kl_coef=0.0, **{**LEARN, "steps": 60}
    )
    records = run(t, range(60))
    assert records[0]["value_mean"] == 0.0
    value = records[-1]["value_mean"]
    assert value > 0.5, f"value {value:.3f} of a return of 1 after 60 iterations"


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_resume_is_bit_identical(tmp_path, average):
    whole = trainer(average=average)
    records = run(whole, range(4))
    half = trainer(average=average)
    run(half, range(2))
    t5_small.save_atomically(half.state_dict(), tmp_path / "ppo.pt")
    resumed = trainer(average=average)
    for p in (
        *resumed.policy.parameters(),
        *resumed.average.parameters(),
    ):  # all must come from the file; the reference is the start
        p.data += 1.0
    resumed.load_state_dict(t5_small.load_state(tmp_path / "ppo.pt"))
    again = run(resumed, range(2, 4))
    assert torch.equal(weights(whole), weights(resumed)), "not bit-identical"
    assert torch.equal(t5_weights(whole.average), t5_weights(resumed.average))
    assert (
        again == records[2:]
        and whole.kl_coef == resumed.kl_coef
        and vars(whole.moments) == vars(resumed.moments)
    )
