"""ppo.py: every equation against figures made by hand; the trainer on a tiny policy.

Functions that students write are called through their module: `--impl` can replace them.
"""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import ppo
import t5_small
from conftest import check
from t5_small import T5, Sampling
from tests.tools import tiny_config

SAMPLING = Sampling(temperature=0.9, top_k=5, min_length=3, max_length=8)
LN = math.log
SEED = 557  # of an iteration: some of its responses end, others are cut


def mask_of(*rows):
    """1 1 0 -> True True False."""
    return torch.tensor(rows).bool()


# ---- the equations -------------------------------------------------------------------------


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
    expected = [
        [1, 1, 1, 0, 0],
        [1, 0, 0, 0, 0],
        [1, 1, 1, 1, 1],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1],
    ]
    check("mask of t1 .. the first </s>", ppo.response_mask(ids).long(), expected)
    other = ppo.response_mask(torch.tensor([[4, 1, 3, 0]]), eos_id=3)
    check("another </s> id", other.long(), [[1, 1, 1, 0]])
    dtype = ppo.response_mask(ids).dtype
    assert dtype == torch.bool, f"the mask is {dtype}, not torch.bool"


def test_token_log_probs():
    logits = torch.tensor([[[1.0, 2.0, 4.0, 8.0], [8.0, 4.0, 2.0, 2.0]]]).log()
    ids = torch.tensor([[2, 0]])
    log_probs, entropy = ppo.token_log_probs(logits, ids)
    check("log 4/15 and log 8/16", log_probs, [[LN(4 / 15), LN(8 / 16)]])
    check("entropy of the second, 1/2 1/4 1/8 1/8", entropy[0, 1], 1.75 * LN(2))

    support = mask_of([0, 1, 1, 0], [1, 1, 1, 1])[None]
    log_probs, entropy = ppo.token_log_probs(logits, ids, support, temperature=0.5)
    what = "temperature 0.5 squares: 16/(4 + 16) over the support, 64/(64 + 16 + 4 + 4)"
    check(what, log_probs, [[LN(16 / 20), LN(64 / 88)]])
    check("entropy over the support", entropy[0, 0], -0.2 * LN(0.2) - 0.8 * LN(0.8))
    assert entropy.isfinite().all(), f"entropy {entropy.tolist()}: 0 log 0 is 0"

    total = torch.zeros(1, 2)
    for token in range(4):
        same = torch.full((1, 2), token)
        total += ppo.token_log_probs(logits, same, support, 0.5)[0].exp()
    check("the tokens' probabilities add up to 1", total, [[1.0, 1.0]])


def test_token_log_probs_pass_their_gradient():
    """d log p(chosen) / d logits = (1 for the chosen - p) / temperature, 0 off the support."""
    logits = torch.tensor([[1.0, 1.0, 2.0]]).log().requires_grad_()
    support = mask_of([1, 0, 1])
    log_probs, _ = ppo.token_log_probs(logits, torch.tensor([2]), support, temperature=0.5)
    log_probs.sum().backward()
    check("gradient by the logits", logits.grad, [[-0.4, 0.0, 0.4]])
    coarse = torch.tensor([[1.0, 3.0]]).bfloat16()
    log_probs, _ = ppo.token_log_probs(coarse, torch.tensor([1]))
    check("logits in bfloat16: computed in float32", log_probs, [-math.log1p(math.exp(-2))])


def test_kl_estimate():
    p = torch.tensor([0.5, 0.3, 0.2])
    q = torch.tensor([0.2, 0.2, 0.6])
    k1 = ppo.kl_estimate(p.log(), q.log(), "k1")
    k3 = ppo.kl_estimate(p.log(), q.log(), "k3")
    check("k1 = log p - log q", k1, [LN(2.5), LN(1.5), LN(1 / 3)])
    expected = [0.4 - 1 + LN(2.5), 2 / 3 - 1 + LN(1.5), 3 - 1 + LN(1 / 3)]
    check("k3 = q / p - 1 + log p - log q", k3, expected)
    kl = (p * (p / q).log()).sum()
    check("the mean of k1 under p is KL(p || q)", (p * k1).sum(), kl)
    check("the mean of k3 under p is KL(p || q)", (p * k3).sum(), kl)
    d = torch.linspace(-3, 3, 61)
    assert (ppo.kl_estimate(d, torch.zeros(61), "k3") >= -1e-6).all(), "k3 is never negative"
    check("k1 is the default", ppo.kl_estimate(p.log(), q.log()), k1)


def test_kl_estimate_passes_its_gradient():
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    expected = {"k1": [1.0, 1.0, 1.0], "k3": [1 - 0.4, 1 - 2 / 3, 1 - 3]}  # 1, and 1 - q / p
    for kind, gradient in expected.items():
        log_probs = p.log().requires_grad_()
        ppo.kl_estimate(log_probs, q.log(), kind).sum().backward()
        check(f"gradient of {kind}", log_probs.grad, gradient)


def test_masked_mean():
    x = torch.tensor([[1.0, 2.0, 99.0], [6.0, 99.0, 99.0]])
    mask = mask_of([1, 1, 0], [1, 0, 0])
    check("(1 + 2 + 6) / 3: every token counts the same", ppo.masked_mean(x, mask), 3.0)


def test_whiten():
    x = torch.tensor([[2.0, 4.0, 99.0], [6.0, -50.0, 7.0]])
    mask = mask_of([1, 1, 0], [1, 0, 0])
    what = "2, 4, 6 have mean 4 and sample std 2; padding becomes 0"
    check(what, ppo.whiten(x, mask), [[-1.0, 0, 0], [1, 0, 0]])
    unshifted = ppo.whiten(x, mask, shift_mean=False)
    check("without the shift the mean stays 4", unshifted, [[3.0, 4, 0], [5, 0, 0]])
    equal = ppo.whiten(torch.full((2, 3), 7.0), mask)
    check("no variance: zeros, not nan", equal, torch.zeros(2, 3), tol=1e-3)
    one = ppo.whiten(torch.tensor([[3.0, 5.0]]), mask_of([1, 0]))
    check("one token: zero, not nan", one, [[0.0, 0.0]])
    near = ppo.whiten(torch.tensor([[1e-4, -1e-4]]), mask_of([1, 1]))
    what = "1e-8 is added to the variance, 2e-8, under the root: 1e-4 / sqrt(3e-8)"
    check(what, near, [[0.577350, -0.577350]], tol=1e-4)


def test_token_rewards():
    kl = torch.tensor([[0.5, -1.0, 0.0, -14.0], [0.0, -2.0, 1.0, 1.0]])
    mask = mask_of([1, 1, 1, 0], [1, 1, 1, 1])  # the second response never ends
    rewards = torch.tensor([10.0, 20.0])
    got = ppo.token_rewards(rewards, kl, mask, kl_coef=0.1)
    what = "-0.1 KL, and the reward at the last real token"
    check(what, got, [[-0.05, 0.1, 10.0, 0.0], [0.0, 0.2, -0.1, 19.9]])
    check("the rewards are left alone", rewards, [10.0, 20.0])
    one = ppo.token_rewards(torch.tensor([3.0]), kl[:1], mask_of([1, 0, 0, 0]), 1.0)
    check("one token", one, [[2.5, 0, 0, 0]])


def test_gae():
    rewards = torch.tensor([[0.0, 0.0, 1.0]])
    values = torch.tensor([[0.5, 0.6, 0.7]])
    mask = mask_of([1, 1, 1])
    advantages, returns = ppo.gae(rewards, values, mask, gamma=0.9, lam=0.8)
    # delta = .9 * .6 - .5, .9 * .7 - .6, 1 - .7 = .04, .03, .3;  A = delta + .72 A_next
    check("advantages", advantages, [[0.21712, 0.246, 0.3]])
    check("returns = A + V", returns, [[0.71712, 0.846, 1.0]])
    one_step, _ = ppo.gae(rewards, values, mask, 0.9, 0.0)
    check("lambda 0: the one-step errors", one_step, [[0.04, 0.03, 0.3]])

    rewards = torch.tensor([[0.1, -0.2, 1.0]])
    advantages, returns = ppo.gae(rewards, values, mask, 1.0, 1.0)
    check("lambda 1, gamma 1: returns are the rewards to come", returns, [[0.9, 0.8, 1.0]])
    check("lambda 1, gamma 1: minus the value", advantages, [[0.4, 0.2, 0.3]])


def test_gae_ignores_padding():
    rewards = torch.tensor([[0.0, 1.0, 77.0, -5.0]] * 2)
    values = torch.tensor([[0.5, 0.6, 88.0, 9.0]] * 2)
    mask = mask_of(*[[1, 1, 0, 0]] * 2)
    advantages, returns = ppo.gae(rewards, values, mask, 1.0, 0.5)
    check("advantages", advantages, [[0.3, 0.4, 0, 0]] * 2)  # delta = .1, .4
    check("returns", returns, [[0.8, 1.0, 0, 0]] * 2)
    lengths = mask_of([1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0])
    rewards, values = torch.tensor([[1.0, 2.0, 3.0, 4.0]] * 3), torch.ones(3, 4)
    advantages, returns = ppo.gae(rewards, values, lengths, 1.0, 1.0)
    what = "responses of 2, 4 and 1 tokens: the rewards to come, within each"
    check(what, returns, [[3.0, 2, 0, 0], [10, 9, 7, 4], [1, 0, 0, 0]])
    check("minus the value", advantages, [[2.0, 1, 0, 0], [9, 8, 6, 3], [0, 0, 0, 0]])
    by_default, _ = ppo.gae(rewards, values, lengths)
    given, _ = ppo.gae(rewards, values, lengths, gamma=1.0, lam=0.95)
    check("gamma 1 and lambda 0.95 are the defaults", by_default, given)


def test_policy_loss():
    ratio = torch.tensor([[1.5, 0.5, 1.5, 0.5], [1.1, 3.0, 3.0, 3.0]])
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0], [2.0, 9.0, -9.0, 9.0]])
    mask = mask_of([1, 1, 1, 1], [1, 0, 0, 0])
    old = torch.full((2, 4), -2.0)
    log_probs = (old + ratio.log()).requires_grad_()
    loss, share = ppo.policy_loss(log_probs, old, advantages, mask, 0.2)
    check("-(1.2 + 0.5 - 1.5 - 0.8 + 2.2) / 5", loss, -0.32)
    check("clipped: 1.5 with A > 0 and 0.5 with A < 0, of 5", share, 0.4)
    loss.backward()
    what = "no gradient where clipped, -ratio A / 5 elsewhere"
    check(what, log_probs.grad, [[0.0, -0.1, 0.3, 0.0], [-0.44, 0.0, 0.0, 0.0]])
    narrow, _ = ppo.policy_loss(log_probs, old, advantages, mask, 0.1)
    check("clipped at 0.1: -(1.1 + 0.5 - 1.5 - 0.9 + 2.2) / 5", narrow, -0.28)
    by_default, _ = ppo.policy_loss(log_probs, old, advantages, mask)
    check("0.2 is the default", by_default, loss)


def test_policy_loss_of_equal_policies():
    """Before the first step: minus the mean advantage, nothing clipped, but a gradient."""
    log_probs = torch.tensor([[-1.0, -2.0, -9.0]], requires_grad=True)
    advantages = torch.tensor([[1.0, -3.0, 7.0]])
    mask = mask_of([1, 1, 0])
    loss, share = ppo.policy_loss(log_probs, log_probs.detach(), advantages, mask)
    check("-(1 - 3) / 2", loss, 1.0)
    check("both losses are equal: nothing is clipped", share, 0.0)
    loss.backward()
    check("-A / 2", log_probs.grad, [[-0.5, 1.5, 0.0]])


def test_value_loss():
    values = torch.tensor([[0.5, -0.5, 0.5, -0.5], [0.1, 50.0, 50.0, 50.0]])
    values.requires_grad_()
    returns = torch.tensor([[1.0, 1.0, -1.0, -1.0], [1.0, 0.0, 0.0, 0.0]])
    mask = mask_of([1, 1, 1, 1], [1, 0, 0, 0])
    loss = ppo.value_loss(values, torch.zeros(2, 4), returns, mask, 0.2)
    check("1/2 (0.8^2 + 1.5^2 + 1.5^2 + 0.8^2 + 0.9^2) / 5, clipped at +-0.2", loss, 0.659)
    loss.backward()
    what = "no gradient where the clipped error is the larger"
    check(what, values.grad, [[0, -0.3, 0.3, 0], [-0.18, 0, 0, 0]])

    old = torch.tensor([[0.4, 0.0, 0.0, 0.0]])
    one = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    loss = ppo.value_loss(one, old, one, mask_of([1, 0, 0, 0]), 0.2)
    check("clipped around the old value 0.4: 1/2 max(0, 0.4^2)", loss, 0.08)


def test_value_loss_clips_where_it_is_told():
    """V 1, V_old 0, R 2: the clipped error is 2 - eps, 1 at the least."""
    value, old, target = (
        torch.tensor([[1.0, -7.0]]),
        torch.zeros(1, 2),
        torch.full((1, 2), 2.0),
    )
    mask = mask_of([1, 0])
    for eps, expected in ((0.1, 1.9), (0.2, 1.8), (0.5, 1.5), (3.0, 1.0)):
        loss = ppo.value_loss(value, old, target, mask, eps)
        check(f"clipped at +-{eps}: 1/2 {expected}^2", loss, expected**2 / 2)
    by_default = ppo.value_loss(value, old, target, mask)
    check("0.2 is the default", by_default, 1.8**2 / 2)


def test_explained_variance():
    """Returns 1, 2, 3 have variance 2/3; padding, which is far off, does not count."""
    returns = torch.tensor([[1.0, 2.0, 99.0], [3.0, -99.0, 99.0]])
    mask = mask_of([1, 1, 0], [1, 0, 0])

    def explained(*values):
        first, second, third = values
        table = torch.tensor([[first, second, 7.0], [third, 7.0, 7.0]])
        return ppo.explained_variance(table, returns, mask)

    check("perfect", explained(1.0, 2.0, 3.0), 1.0)
    check("perfect but for a constant", explained(6.0, 7.0, 8.0), 1.0)
    check("a constant explains nothing", explained(2.0, 2.0, 2.0), 0.0)
    check("errors 0, 1, 0 have variance 2/9: 1 - 1/3", explained(1.0, 1.0, 3.0), 2 / 3)
    check("the wrong way round: 1 - (8/3) / (2/3)", explained(3.0, 2.0, 1.0), -3.0)
    equal = ppo.explained_variance(returns, torch.full((2, 3), 5.0), mask)
    assert equal == 0.0, "equal returns: nothing to explain, and no nan"
    one = ppo.explained_variance(returns, returns, mask_of([1, 0, 0], [0, 0, 0]))
    assert one == 0.0, "one token"


def test_beta_stays_positive():
    """Any horizon, batch and KL; with a horizon above the batch it is Ziegler's formula."""
    generator = torch.Generator().manual_seed(0)
    cases = 10 ** (6 * torch.rand(1000, 4, generator=generator).double() - 1)
    for batch, horizon, kl, target in cases.tolist():
        batch = max(int(batch), 1)
        beta = 0.3
        for sign in (1, -1, 1, -1, -1):
            changed = ppo.adapt_kl_coef(beta, sign * kl, target, batch, horizon)
            case = f"beta {beta:.3g}, KL {sign * kl:.3g}, target {target:.3g}, "
            case += f"batch {batch}, horizon {horizon:.3g}: {changed:.4g}"
            assert 0 < changed < math.inf, f"{case} is not positive and finite"
            error = min(max(sign * kl / target - 1, -0.2), 0.2)
            assert (changed - beta) * error >= 0, f"{case} is the wrong way"
            factor = min(max(1 + error * batch / horizon, 0.5), 2.0)
            expected = pytest.approx(beta * factor, rel=1e-9)
            assert changed == expected, f"{case}, not {beta * factor:.4g}"
            beta = changed


def test_adapt_kl_coef():
    def changed(kl):
        return ppo.adapt_kl_coef(0.2, kl, 6.0, 32, 1000)

    check("KL at its target", changed(6.0), 0.2)
    check("10 % above: 0.2 (1 + 0.1 * 32 / 1000)", changed(6.6), 0.20064)
    check("far above: the error is clipped at 0.2", changed(60.0), 0.20128)
    check("far below: at -0.2", changed(-1.0), 0.19872)
    for kl in (-5.0, 0.0, 5.9, 8.0, 1000.0):
        change = abs(ppo.adapt_kl_coef(1.0, kl, 6.0, 32, 10_000) - 1)
        what = f"the original's beta moves at most 0.064 % a step, not {change:.4%}"
        assert change <= 0.00064 + 1e-12, what


def test_running_moments():
    generator = torch.Generator().manual_seed(0)
    moments = ppo.RunningMoments()
    seen = torch.zeros(0)
    for count, std, mean in ((5, 1, 0), (1, 0, 9), (32, 0.1, -3), (7, 4, 100)):
        batch = torch.randn(count, generator=generator) * std + mean
        moments.update(batch)
        seen = torch.cat([seen, batch])
        what = f"mean and std of all {len(seen)} rewards"
        check(what, [moments.mean, moments.std], [seen.mean(), seen.std()])

    same = ppo.RunningMoments()
    for _ in range(3):
        same.update(torch.full((4,), 0.7))
    assert same.std == 1.0, "equal rewards: nothing to scale by"


def test_unpack():
    """The inverse of x[mask], in the order of the rows, for numbers of any kind."""
    mask = mask_of([1, 1, 0], [1, 0, 0], [0, 0, 1])
    got = ppo.unpack(torch.tensor([1.0, 2.0, 3.0, 4.0]), mask)
    check("row by row", got, [[1.0, 2, 0], [3, 0, 0], [0, 0, 4]])
    x = torch.tensor([[7, 8, 9], [4, 5, 6], [1, 2, 3]])
    assert torch.equal(ppo.unpack(x[mask], mask), x * mask)
    packed = torch.ones(4, requires_grad=True)
    (2 * ppo.unpack(packed, mask)).sum().backward()
    check("gradients pass", packed.grad, [2.0] * 4)


# ---- a tiny policy -------------------------------------------------------------------------


def share_of(token):
    """The reward: the share of one token among the response's."""

    def reward(source, ids, targets):
        return (ids == token).float().sum(1) / (ids != 0).sum(1)

    return reward


def some_reward(source, ids, targets):
    return (ids.float().sum(1) * 0.37 + targets).sin()


def same_reward(source, ids, targets):
    return torch.full((len(ids),), 0.5)


def prompts(i, batch=12):
    """Random contexts; targets that number them; human responses of 1, 8, 2, 1, ... tokens."""
    generator = torch.Generator().manual_seed(1000 + i)
    source = torch.randint(3, 16, (batch, 6), generator=generator)
    human = torch.randint(3, 16, (batch, 8), generator=generator)
    for row in range(batch):
        source[row, 2 + row % 5 :] = 0
        length = (1, 8, 2)[row % 3]
        human[row, length - 1] = 1
        human[row, length:] = 0
    return ppo.Prompts(source, torch.arange(batch) + i, human)


class Tiny(T5):
    """A small random T5; eos: added to the logit of </s>."""

    def __init__(self, eos):
        torch.manual_seed(0)
        sizes = {"vocab_size": 16, "d_kv": 8, "d_ff": 32}
        super().__init__(tiny_config(**sizes, num_layers=1, num_decoder_layers=1))
        self.eval()
        self.eos = eos

    def logits(self, states):
        return super().logits(states) + self.eos * F.one_hot(torch.tensor(1), 16)


def nothing(t5):
    return {}


def trainer(reward=some_reward, eos=1.5, sampling=SAMPLING, batch=12, **changes):
    settings = {
        "steps": 20,
        "ppo_epochs": 2,
        "minibatch_size": 4,
        "warmup": 1,
        "lr": 1e-2,
        "lam": 0.95,
        "eval_every": 100,
        **changes,
    }
    config = ppo.PPOConfig(**settings)
    return ppo.PPOTrainer(
        Tiny(eos), reward, lambda i: prompts(i, batch), sampling, config, nothing
    )


def run(trainer, steps):
    records = []
    for i in steps:
        torch.manual_seed(SEED + i)
        records.append(trainer.step(i))
    return records


def run_one(**changes):
    """One iteration with one optimizer step: its record and the gradients by name."""
    one = trainer(ppo_epochs=1, minibatch_size=12, **changes)
    gradients = watch_gradients(one)
    (record,) = run(one, [0])
    return record, gradients[0]


def watch_gradients(trainer):
    """A list that gets, by name, the gradients of each of a trainer's optimizer steps."""
    seen = []
    plain = trainer.optimizer.step

    def step():
        gradients = {}
        for name, parameter in trainer.policy.named_parameters():
            if parameter.grad is not None:
                gradients[name] = parameter.grad.clone()
        seen.append(gradients)
        return plain()

    trainer.optimizer.step = step
    return seen


def rollout_of(trainer, i=0, reward=some_reward):
    """The rollout that `run` makes in iteration i, if the trainer is fresh."""
    torch.manual_seed(SEED + i)
    return ppo.rollout(trainer.policy, trainer.reference, reward, prompts(i), SAMPLING)


def all_weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def has_gradient(model):
    return any(p.grad is not None and p.grad.any() for p in model.parameters())


def assert_finite(trainer, records):
    assert all_weights(trainer.policy).isfinite().all()
    for record in records:
        numbers = {name: x for name, x in record.items() if name != "start"}
        bad = {name: x for name, x in numbers.items() if not math.isfinite(x)}
        assert not bad, f"not finite: {bad}"


def log_softmax_over(support, logits):
    """By hand, at SAMPLING's temperature."""
    return (logits / 0.9).masked_fill(~support, -1e9).log_softmax(-1)


# ---- rollout -------------------------------------------------------------------------------


def test_rollout_is_what_teacher_forcing_says():
    """Log-probs and values of the sampling are those of a second, teacher-forced pass."""
    t = trainer()
    t5 = t.policy.t5
    t.policy.value_head.weight.data.normal_()
    r = rollout_of(t)
    source, mask = r.source, r.mask
    assert torch.equal(mask, ppo.response_mask(r.ids)) and not mask.all()

    with torch.no_grad():
        asked = (source, r.ids, mask, r.support, 0.9)
        log_probs, entropy, states = ppo.response_log_probs(t5, *asked)
        whole = t5.response_states(source, r.ids)
        logits = t5.logits(whole)
    check("log-probs", r.log_probs, log_probs)
    check("values", r.values, ppo.unpack(t.policy.values(states), mask))
    check("states", states, whole[mask])

    full = log_softmax_over(r.support, logits)
    by_hand = full.gather(-1, r.ids[..., None])[..., 0] * mask
    check("log-probs by hand, 0 on padding", r.log_probs, by_hand)
    check("entropy by hand", entropy, -(full.exp() * full).sum(-1) * mask)
    check("values by hand, 0 on padding", r.values, t.policy.values(whole) * mask)


def test_rollout_knows_its_prompts_and_what_was_allowed():
    r, asked = rollout_of(trainer()), prompts(0)
    check("the reference is the policy as yet", r.ref_log_probs, r.log_probs)
    check("rewards", r.rewards, some_reward(r.source, r.ids, asked.targets))
    assert torch.equal(r.source, asked.source) and torch.equal(r.human, asked.human)
    assert (r.support.sum(-1)[r.mask] == 5).all(), "top-k"
    assert not r.support[:, :2, 1].any(), "</s> before the minimum length"


def test_the_support_and_the_temperature_matter():
    """Without them log-probs are others: else the test above would be blind."""
    t = trainer()
    r = rollout_of(t)
    cases = {"temperature": (1.0, r.support), "support": (0.9, torch.ones_like(r.support))}
    for name, (temperature, support) in cases.items():
        asked = (r.source, r.ids, r.mask, support, temperature)
        wrong, _, _ = ppo.response_log_probs(t.policy.t5, *asked)
        assert (wrong - r.log_probs).abs().max() > 0.05, f"the {name} makes no difference"


def test_rollout_hands_the_reward_what_was_sampled():
    seen = []

    def reward(source, ids, targets):
        seen.extend(zip(source.tolist(), ids.tolist(), targets.tolist()))
        return targets.double()

    asked = prompts(3)
    r = rollout_of(trainer(), 3, reward)
    numbers = asked.targets.tolist()
    assert len(seen) == len(numbers), "each response once, in whatever order"
    for context, ids, number in seen:
        row = numbers.index(number)
        assert context == asked.source[row].tolist()
        assert ids == r.ids[row, : len(ids)].tolist()
        assert not r.ids[row, len(ids) :].any()
    assert r.rewards.tolist() == numbers, "and the rewards are in the rollout's order"
    assert r.rewards.dtype == torch.float32
    assert not r.log_probs.requires_grad and not r.values.requires_grad


def test_take_cuts_what_belongs_to_tokens_and_nothing_else():
    r = rollout_of(trainer())
    r.advantages = torch.randn(r.ids.shape)
    r.returns = torch.randn(r.ids.shape)
    lengths = r.mask.sum(1)
    rows = (lengths < lengths.max()).nonzero()[:, 0].flip(0)
    assert len(rows) > 1
    part = r.take(rows)
    width = lengths[rows].max().item()
    assert width < r.ids.shape[1], "not a test of the cut"
    for name in ("source", "human", "rewards"):
        assert torch.equal(getattr(part, name), getattr(r, name)[rows]), name
    per_token = ("ids", "mask", "support", "log_probs", "ref_log_probs", "values")
    for name in (*per_token, "advantages", "returns"):
        assert torch.equal(getattr(part, name), getattr(r, name)[rows, :width]), name
    assert part.mask.sum() == r.mask[rows].sum(), "no token is lost"


@pytest.mark.parametrize("name", ["log_probs", "ref_log_probs", "values", "rewards"])
def test_a_rollout_that_is_not_finite_is_skipped(name, monkeypatch):
    t = trainer()
    before = all_weights(t.policy)
    plain = ppo.rollout

    def diverged(*arguments):
        sampled = plain(*arguments)
        assert sampled.is_finite()
        getattr(sampled, name)[0] = math.nan
        return sampled

    monkeypatch.setattr(ppo, "rollout", diverged)
    (record,) = run(t, [0])
    assert record["skipped"] == 1.0 and t.moments.count == 0
    assert torch.equal(all_weights(t.policy), before)
    assert t.warnings(record, record) == []

    # The run goes on, and its warnings need no first iteration.
    monkeypatch.undo()
    (second,) = run(t, [1])
    assert second["optimizer_steps"] == 6
    assert t.warnings({**second, "length": 1.0}, record) == []
    (warning,) = t.warnings({**second, "kl": 16.0, "length": 1.0}, record)
    assert "ppo.kl_coef" in warning


class Contexts:
    """What respond asks of data.Pairs: contexts of different lengths, in lots of any order."""

    def __init__(self, count):
        self.source = prompts(0, count).source

    def __len__(self):
        return len(self.source)

    def chunks(self, size):
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(1))
        return [rows.tolist() for rows in order.split(size)]

    def batch(self, rows):
        return self.source[rows], None


GREEDY = Sampling(greedy=True, max_length=8, min_length=2)


def test_respond_keeps_the_order():
    t5, pairs = Tiny(1.5), Contexts(11)
    responses = ppo.respond(t5, pairs, GREEDY, size=4)
    assert len(responses) == 11 and len({*map(tuple, responses)}) > 3
    for row, response in enumerate(responses):
        alone = t5_small.generate(t5, pairs.source[row : row + 1], GREEDY).ids[0]
        expected = alone[ppo.response_mask(alone[None])[0]].tolist()
        assert response == expected, f"row {row}"


def log_prob_of(t5, source, ids, support):
    """log p of one response, by hand."""
    full = log_softmax_over(support, t5.logits(t5.response_states(source, ids)))
    return full.gather(-1, ids[..., None]).sum().item()


def test_respond_and_compare():
    """The responses are respond's; KL is the mean over them of sum_t log p - log p_ref."""
    t5, other, pairs = Tiny(1.5), Tiny(4.0), Contexts(11)
    torch.manual_seed(3)
    plain = ppo.respond(t5, pairs, SAMPLING, size=4)
    torch.manual_seed(3)
    responses, kl = ppo.respond_and_compare(t5, other, pairs, SAMPLING, size=4)
    assert responses == plain
    torch.manual_seed(3)
    _, to_itself = ppo.respond_and_compare(t5, t5, pairs, SAMPLING, size=4)
    assert to_itself == 0.0, "exactly"

    # The same by hand, row by row; only the support must come from the sampling.
    torch.manual_seed(3)
    total = 0.0
    for rows in pairs.chunks(4):
        sampled = t5_small.generate(t5, pairs.source[rows], SAMPLING)
        for place, row in enumerate(rows):
            source, length = pairs.source[row][None], len(responses[row])
            support = sampled.support[place, :length][None]
            ids = torch.tensor([responses[row]])
            total += log_prob_of(t5, source, ids, support)
            total -= log_prob_of(other, source, ids, support)
    check("KL in nats a response", kl, total / 11, tol=1e-4)
    assert abs(kl) > 0.1, "the models do not differ: the test is blind"


@pytest.mark.parametrize(
    "sampling", [SAMPLING, replace(SAMPLING, top_k=0, top_p=0.7), Sampling(max_length=8)]
)
def test_ratio_is_one_before_the_first_step(sampling):
    t = trainer(sampling=sampling, minibatch_size=5)
    for record in run(t, range(3)):  # also once the policy has left the reference
        error = record["first_ratio_error"]
        assert error < 1e-5, f"ratio differs from 1 by {error:.1e}"
    assert abs(record["kl"]) > 1e-3


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_kl_is_zero_at_first_and_the_reference_stays(average):
    t = trainer(average=average)
    before = all_weights(t.reference)
    records = run(t, range(4))
    assert abs(records[0]["kl"]) < 1e-4 and abs(records[0]["kl_k3"]) < 1e-4
    assert records[3]["kl_k3"] > 1e-3
    assert torch.equal(all_weights(t.reference), before)
    assert all(p.grad is None for p in t.reference.parameters())
    assert not torch.equal(all_weights(t.policy.t5), before), "the policy does not"
    assert not torch.equal(all_weights(t.model), before), "nor does the result"


# ---- one iteration -------------------------------------------------------------------------


def off_policy(t):
    """A rollout with advantages and returns, and the trainer's policy moved away from it."""
    part = rollout_of(t)
    generator = torch.Generator().manual_seed(4)
    part.advantages = torch.randn(part.ids.shape, generator=generator) * part.mask
    part.returns = torch.randn(part.ids.shape, generator=generator) * part.mask
    for parameter in t.policy.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data += 0.2 * noise * parameter.std(correction=0).clamp(min=0.05)
    return part


def value_loss_by_hand(t, part, states):
    """Over a flat list of tokens."""
    values = t.policy.value_head(states)[..., 0][part.mask]
    old_values, returns = part.values[part.mask], part.returns[part.mask]
    eps = t.config.value_clip_range
    clipped = old_values + (values - old_values).clamp(-eps, eps)
    return torch.max((values - returns) ** 2, (clipped - returns) ** 2).mean() / 2


def loss_by_hand(t, part):
    """L, what is logged of it, the largest |ratio - 1|: over a flat list of tokens."""
    mask, eps = part.mask, t.config.clip_range
    states = t.policy.t5.response_states(part.source, part.ids)
    full = log_softmax_over(part.support, t.policy.t5.logits(states))
    log_probs = full.gather(-1, part.ids[..., None])[..., 0][mask]
    log_ratio = log_probs - part.log_probs[mask]
    ratio, advantages = torch.exp(log_ratio), part.advantages[mask]
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - eps, 1 + eps)
    measured = {
        "policy_loss": torch.max(plain, clipped).mean(),
        "value_loss": value_loss_by_hand(t, part, states),
        "entropy": -(full.exp() * full).sum(-1)[mask].mean(),
        "clip_share": (clipped > plain).float().mean(),
        "ratio": ratio.mean(),
        "update_kl": (ratio - 1 - log_ratio).mean(),
    }
    loss = measured["policy_loss"] + t.config.value_coef * measured["value_loss"]
    return loss, measured, (ratio - 1).abs().max()


def test_loss_by_hand():
    """Other clip ranges and another coefficient than the defaults; gradients, too."""
    t = trainer(clip_range=0.15, value_clip_range=0.3, value_coef=0.7)
    part = off_policy(t)
    loss, measured, error = t.loss(part)
    expected_loss, expected, expected_error = loss_by_hand(t, part)
    missing = expected.keys() - measured.keys()
    assert not missing, f"loss measures no {', '.join(sorted(missing))}"
    for name, number in expected.items():
        check(f"{name} of a policy that has moved", measured[name], number)
    check("policy loss + value_coef * value loss", loss, expected_loss)
    check("the largest |ratio - 1|", error, expected_error)
    assert 0 < measured["clip_share"] < 1, "not a test of clipping"

    gradients = []
    for one in (loss, expected_loss):
        t.policy.zero_grad()
        one.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in t.policy.parameters()]))
    check("gradient by all weights", *gradients)


def iteration_by_hand(t, i):
    """What step does, with the trainer's own parts. Returns the record."""
    config = t.config
    batch = ppo.rollout(t.policy, t.reference, t.reward, t.prompts(i), t.sampling)
    mask, rewards = batch.mask, t.scaled(batch.rewards)
    kl = (batch.log_probs - batch.ref_log_probs) * mask
    per_token = -t.kl_coef * kl
    for row, length in enumerate(mask.sum(1).tolist()):
        per_token[row, length - 1] += rewards[row]
    if config.whiten_rewards:
        per_token = ppo.whiten(per_token, mask, shift_mean=False)
    advantages, batch.returns = ppo.gae(per_token, batch.values, mask, 1.0, config.lam)
    if config.whiten_advantages:
        advantages = ppo.whiten(advantages, mask)
    batch.advantages = advantages
    t.optimizer.set_lr(t.learning_rate(i), config.rms_scaled)
    record = {**t.describe(batch), **t.update(batch)}
    if config.adaptive_kl:
        kl, target = record["kl"], config.kl_target
        horizon = config.kl_horizon
        t.kl_coef = ppo.adapt_kl_coef(t.kl_coef, kl, target, len(mask), horizon)
    return record


def compare_iterations(count, validated, **settings):
    """step and iteration_by_hand give the same records, weights and beta."""
    one, other = trainer(**settings), trainer(**settings)
    asked = []

    def validate(t5):
        asked.append(t5)
        return {"valid": float(len(asked))}

    one.validate = validate
    for i in range(count):
        torch.manual_seed(SEED + i)
        got = one.step(i)
        torch.manual_seed(SEED + i)
        expected = iteration_by_hand(other, i)
        start, valid = got.pop("start", None), got.pop("valid", None)
        assert start == ({"valid": 1.0} if i == 0 else None), f"start, iteration {i}: {start}"
        assert (valid is not None) == (i in validated), f"validation, iteration {i}: {valid}"
        assert got.keys() == expected.keys(), f"the record has {', '.join(sorted(got))}"
        for name, number in expected.items():
            check(f"{name} of iteration {i}", got[name], number)
        what = f"weights of the policy after iteration {i}"
        check(what, all_weights(one.policy), all_weights(other.policy))
        what = f"weights of the result after iteration {i}"
        check(what, all_weights(one.model), all_weights(other.model))
        check(f"beta after iteration {i}", one.kl_coef, other.kl_coef)
    assert asked[0] is one.reference, "the first validation is of the reference"
    assert all(t5 is one.model for t5 in asked[1:]), "the others are of the result"


def test_one_iteration_by_hand():
    """Three of them: in the second and third the policy is not the reference."""
    compare_iterations(3, {0, 1, 2}, steps=3, eval_every=100)


def test_one_iteration_by_hand_with_other_settings():
    adaptive = {"adaptive_kl": True, "kl_target": 0.7, "kl_horizon": 30.0, "kl_coef": 0.5}
    rewards = {"whiten_rewards": True, "centre_rewards": True, "scale_rewards": False}
    settings = {"whiten_advantages": False, "average": 0.5, "lam": 0.6, "rms_scaled": False}
    validated = {0, 1, 2, 3, 5, 7, 8}  # after 1, 2, 4, 8 and every 3
    compare_iterations(9, validated, eval_every=3, **adaptive, **rewards, **settings)


def test_an_iteration_that_is_not_finite_changes_nothing():
    def reward(source, ids, targets):
        return torch.full((len(ids),), math.nan)

    t = trainer(reward, adaptive_kl=True)
    before, beta = all_weights(t.policy), t.kl_coef
    (record,) = run(t, [0])
    assert record.get("skipped") == 1.0, f"the record of a skipped iteration: {record}"
    assert math.isnan(record["reward"]), "and the mean reward as it came, NaN"
    check("the weights stay", all_weights(t.policy), before, tol=0)
    assert t.moments.count == 0, "rewards of NaN come into the running moments"
    assert t.kl_coef == beta, "beta moves"

    t = trainer(same_reward)
    t.policy.value_head.weight.data.fill_(math.nan)
    (record,) = run(t, [0])
    assert record.get("skipped") == 1.0, f"values of NaN are not skipped: {record}"
    assert record["reward"] == 0.5, f"the mean reward is the number 0.5: {record['reward']}"
    assert not torch.is_tensor(record["reward"]), "the reward in the record is a tensor"


def test_a_tiny_policy_learns():
    """A reward for one token raises its share; a strong KL penalty holds the policy back."""
    settings = {"batch": 32, "minibatch_size": 16, "sampling": Sampling(max_length=6)}
    free = run(trainer(share_of(7), kl_coef=0.0, steps=15, lr=2e-2, **settings), range(15))
    held = run(trainer(share_of(7), kl_coef=5.0, steps=15, lr=2e-2, **settings), range(15))
    first, last = free[0]["reward"], mean_of_last(free, "reward")
    what = (
        f"without a penalty the reward goes from {first:.2f} to {last:.2f}, by less than 0.3"
    )
    assert last > first + 0.3, what
    kl, held_kl = mean_of_last(free, "kl"), mean_of_last(held, "kl")
    what = f"KL {kl:.2f} without a penalty, {held_kl:.2f} with one of 5: it does not hold back"
    assert held_kl < 0.3 * kl, what


def test_a_frozen_reference_is_no_frozen_policy():
    t = trainer()
    t = ppo.PPOTrainer(
        t.reference.requires_grad_(False), t.reward, t.prompts, t.sampling, t.config, nothing
    )
    before = all_weights(t.policy.t5)
    run(t, [0])
    assert not torch.equal(all_weights(t.policy.t5), before)


def test_step_records_and_counts():
    adaptive = {"adaptive_kl": True, "kl_target": 0.7, "kl_horizon": 100.0}
    t = trainer(ppo_epochs=3, minibatch_size=5, kl_coef=0.3, **adaptive)
    record = run(t, [0])[0]
    assert record["optimizer_steps"] == 9, "3 epochs of 12 rollouts in minibatches of 5"
    assert record["kl_coef"] == 0.3
    first = ppo.adapt_kl_coef(0.3, record["kl"], 0.7, 12, 100.0)
    check("beta after the first iteration", t.kl_coef, first, tol=1e-7)
    second = run(t, [1])[0]
    error = second["kl"] / 0.7 - 1
    assert abs(error) < 0.2, "not a test of the unclipped case"
    assert second["kl_coef"] == first
    expected = first * (1 + error * 0.12)
    check("beta after the second: by k1's estimate", t.kl_coef, expected, tol=1e-7)

    r = rollout_of(trainer())
    check("mean length", record["length"], r.mask.sum(1).float().mean())
    check("mean reward, as it came", record["reward"], r.rewards.mean())
    fixed = trainer(adaptive_kl=False, kl_coef=0.3)
    run(fixed, range(2))
    assert fixed.kl_coef == 0.3


@pytest.mark.parametrize("centre", [False, True])
def test_rewards_are_scaled_by_running_moments(centre, monkeypatch):
    handed, raw, plain = [], [], ppo.token_rewards

    def spy(rewards, *others):
        handed.append(rewards.clone())
        return plain(rewards, *others)

    def rollout(*arguments):
        sampled = plain_rollout(*arguments)
        raw.append(sampled.rewards.clone())
        return sampled

    plain_rollout = ppo.rollout
    monkeypatch.setattr(ppo, "token_rewards", spy)
    monkeypatch.setattr(ppo, "rollout", rollout)
    run(trainer(scale_rewards=True, centre_rewards=centre), range(2))
    seen = torch.cat(raw)
    expected = raw[1] / seen.std()
    if centre:
        expected = (raw[1] - seen.mean()) / seen.std()
    check("rewards of the second iteration", handed[1], expected)

    handed.clear()
    run(trainer(some_reward, scale_rewards=False, centre_rewards=False), range(1))
    check("flags off: as they came", handed[0], raw[0])


@pytest.mark.parametrize("on", [False, True])
def test_rewards_are_whitened_on_request(on, monkeypatch):
    handed, made, gae, token_rewards = [], [], ppo.gae, ppo.token_rewards

    def spy_rewards(rewards, kl, mask, kl_coef):
        made.append((token_rewards(rewards, kl, mask, kl_coef), mask))
        return made[0][0].clone()

    def spy_gae(rewards, *others):
        handed.append(rewards.clone())
        return gae(rewards, *others)

    monkeypatch.setattr(ppo, "token_rewards", spy_rewards)
    monkeypatch.setattr(ppo, "gae", spy_gae)
    run(trainer(whiten_rewards=on), [0])
    expected, mask = made[0]
    if on:  # to variance 1, around the mean that they have
        mean, std = expected[mask].mean(), expected[mask].std()
        expected = ((expected - mean) / std + mean) * mask
    check("rewards that GAE sees", handed[0], expected)


def test_human_responses_are_learnt_on_request():
    """ptx_coef g adds g x the gradient of -log p of the human responses, per token."""
    without, plain = run_one(ptx_coef=0.0)
    record, learnt = run_one(ptx_coef=0.5)
    assert "human_loss" not in without

    asked = prompts(0)
    fresh = trainer().policy
    total, tokens = fresh.t5.loss_sum(asked.source, asked.human)
    assert tokens == 4 * (1 + 8 + 2)
    check("what is logged", record["human_loss"], total / tokens)
    (total / tokens).backward()
    for name, parameter in fresh.named_parameters():
        if parameter.grad is not None:
            check(name, learnt[name] - plain[name], 0.5 * parameter.grad, tol=1e-4)


@pytest.mark.parametrize("ptx_coef", [0.0, 0.5])
@pytest.mark.parametrize("micro_batch", [1, 5, 7])
def test_micro_batch_is_the_whole_minibatch(micro_batch, ptx_coef):
    """Gradient and log, value loss and human responses included; 5 and 7 do not divide 12."""

    def one_step(size):
        settings = {"micro_batch": size, "ptx_coef": ptx_coef, "value_coef": 3.0}
        t = trainer(ppo_epochs=1, minibatch_size=12, **settings)
        torch.nn.init.normal_(t.policy.value_head.weight, generator=torch.manual_seed(1))
        gradients = watch_gradients(t)
        return run(t, [0])[0], gradients[0]

    whole_record, whole = one_step(0)
    record, parts = one_step(micro_batch)
    assert len(whole) > 10 and whole["value_head.weight"].abs().max() > 1e-3
    for name in whole:
        check(name, parts[name], whole[name], tol=1e-6)
    assert record.pop("start") == whole_record.pop("start") == {}
    assert record.keys() == whole_record.keys()
    for name in whole_record:
        check(name, record[name], whole_record[name], tol=1e-5)
    assert ("human_loss" in record) == (ptx_coef > 0)


def test_first_gradient_is_reinforce():
    """At ratio 1 the gradient is that of -mean(A log p), here for the decoder's final norm."""
    settings = {"value_coef": 0.0, "kl_coef": 0.0, "lam": 1.0}
    settings |= {"whiten_advantages": False, "scale_rewards": False}
    _, gradients = run_one(**settings)
    t = trainer()
    t5 = t.policy.t5
    r = rollout_of(t)
    logits = t5.logits(t5.response_states(r.source, r.ids))
    log_probs = log_softmax_over(r.support, logits).gather(-1, r.ids[..., None])[..., 0]
    weighted = r.rewards[:, None] * log_probs  # value 0, so A = the reward
    (-weighted[r.mask].mean()).backward()
    name = "t5.decoder.final_norm.weight"
    check("gradient of it", gradients[name], t5.decoder.final_norm.weight.grad)


def test_kl_early_stop(monkeypatch):
    monkeypatch.setattr(ppo, "MAX_UPDATE_KL", -1.0)
    t = trainer()
    before = all_weights(t.policy)
    assert run(t, [0])[0]["optimizer_steps"] == 0, "stops before the first step"
    assert torch.equal(all_weights(t.policy), before)

    monkeypatch.setattr(ppo, "MAX_UPDATE_KL", 1e-5)
    t = trainer(minibatch_size=12, ppo_epochs=5)
    record = run(t, [0])[0]
    what = "the second pass finds that the first step moved too far"
    assert record["optimizer_steps"] == 1, what
    once = trainer(minibatch_size=12, ppo_epochs=1)
    run(once, [0])
    check("the weights of one step", all_weights(t.policy), all_weights(once.policy))
    assert not has_gradient(t.policy)

    monkeypatch.setattr(ppo, "MAX_UPDATE_KL", 1e9)
    record = run(trainer(minibatch_size=12, ppo_epochs=5), [0])[0]
    assert record["optimizer_steps"] == 5


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_an_early_stop_ends_all_epochs_and_is_logged(average, monkeypatch):
    """3 minibatches, 5 epochs; the first of the second epoch finds the policy too far."""
    looked_at, policy_loss, kl_estimate = [], ppo.policy_loss, ppo.kl_estimate

    def count(*arguments):
        looked_at.append(1)
        return policy_loss(*arguments)

    def far(*arguments):
        return kl_estimate(*arguments) + 9.0 * (len(looked_at) == 4)

    with monkeypatch.context() as patched:
        patched.setattr(ppo, "MAX_UPDATE_KL", 5.0)
        patched.setattr(ppo, "policy_loss", count)
        patched.setattr(ppo, "kl_estimate", far)
        stopped = trainer(ppo_epochs=5, average=average)
        record = run(stopped, [0])[0]
    assert len(looked_at) == 4, "an epoch went on"
    assert record["stopped_early"] == 1
    assert record["optimizer_steps"] == 3

    monkeypatch.setattr(ppo, "MAX_UPDATE_KL", 5.0)
    once = trainer(ppo_epochs=1, average=average)
    run(once, [0])
    for got, expected in ((stopped.policy, once.policy), (stopped.model, once.model)):
        assert torch.equal(all_weights(got), all_weights(expected)), "the weights of one epoch"
    whole = run(trainer(ppo_epochs=5, average=average), [0])[0]
    assert whole["stopped_early"] == 0
    assert whole["optimizer_steps"] == 15


def watch_rates(trainer):
    """A list that gets the learning rate of every iteration, and whether it is relative."""
    rates = []
    plain = trainer.optimizer.set_lr

    def set_lr(lr, rms_scaled):
        rates.append((lr, rms_scaled))
        plain(lr, rms_scaled)

    trainer.optimizer.set_lr = set_lr
    return rates


def test_learning_rate_warms_up_and_decays():
    t = trainer(steps=5, warmup=2, lr=1.0, rms_scaled=False)
    rates = watch_rates(t)
    run(t, range(5))
    check("1/2, then 1 - i / 5", [lr for lr, _ in rates], [0.5, 0.8, 0.6, 0.4, 0.2])
    assert not any(scaled for _, scaled in rates)


def test_the_mean_of_the_weights_is_the_result():
    """By hand, from the weights after every step; the rate stays: the mean needs no decay."""
    t = trainer(average=0.8, minibatch_size=6)
    rates, seen, plain = watch_rates(t), [], t.optimizer.step

    def step():
        norm = plain()
        seen.append(all_weights(t.policy.t5))
        return norm

    t.optimizer.step = step
    mean = all_weights(t.reference)
    run(t, range(3))
    for new in seen:
        mean = 0.8 * mean + 0.2 * new
    assert len(seen) == 3 * 2 * 2 and len({*rates}) == 1, rates
    check("the mean", all_weights(t.model), mean)
    own = all_weights(t.policy.t5)
    check("the policy goes on from its own weights", own, seen[-1], tol=0)
    t.finish()
    check("the result", all_weights(t.model), mean)

    last = trainer()
    run(last, range(2))
    before = all_weights(last.policy)
    last.finish()
    assert last.model is last.policy.t5, "0: the last weights"
    assert torch.equal(all_weights(last.policy), before)


@pytest.mark.parametrize("average", [0.0, 0.5])
def test_validation_is_logged(average):
    """Of the reference at the start; of the result early, every eval_every, and at the end."""
    asked = []

    def validate(t5):
        asked.append(t5)
        return {"valid": float(len(asked))}

    config = ppo.PPOConfig(steps=15, eval_every=6, average=average, minibatch_size=12)
    reference = Tiny(0)
    t = ppo.PPOTrainer(reference, some_reward, prompts, SAMPLING, config, validate)
    records = run(t, range(15))
    logged = [i + 1 for i, record in enumerate(records) if "valid" in record]
    assert logged == [1, 2, 4, 6, 8, 12, 15]
    assert asked[0] is reference and all(t5 is t.model for t5 in asked[1:])
    assert records[0]["start"] == {"valid": 1.0} and records[0]["valid"] == 2.0
    assert not any("start" in record for record in records[1:])


FLAGS = [
    {},
    {"whiten_rewards": True, "centre_rewards": True},
    {"whiten_advantages": False, "scale_rewards": False},
]


@pytest.mark.parametrize("flags", FLAGS)
def test_equal_rewards_stay_finite(flags):
    t = trainer(same_reward, kl_coef=0.0, **flags)
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
    assert all_weights(t.policy).isfinite().all()


def test_responses_that_never_end():
    t = trainer(eos=-80.0)
    records = run(t, range(2))
    assert records[0]["length"] == SAMPLING.max_length and records[0]["optimizer_steps"] == 6
    assert_finite(t, records)
    assert records[0]["first_ratio_error"] < 1e-5


# ---- learning ------------------------------------------------------------------------------

LEARN = {"batch": 48, "minibatch_size": 24, "steps": 25, "lr": 1e-2, "ppo_epochs": 2}


def mean_of_last(records, name):
    """The mean over the last five iterations."""
    return sum(record[name] for record in records[-5:]) / 5


def test_learns_a_trivial_reward_and_kl_holds_back():
    settings = {**LEARN, "lr": 2e-2, "sampling": Sampling(max_length=6)}
    free = run(trainer(share_of(7), kl_coef=0.0, **settings), range(15))
    held = run(trainer(share_of(7), kl_coef=5.0, **settings), range(15))
    first, last = free[0]["reward"], mean_of_last(free, "reward")
    assert first < 0.2 and last > first + 0.4, f"reward {first:.3f} -> {last:.3f}"
    kl, held_kl = mean_of_last(free, "kl"), mean_of_last(held, "kl")
    what = f"KL {kl:.3f} without a penalty, {held_kl:.3f} with one of 5"
    assert kl > 1 and held_kl < 0.2 * kl, what


def test_value_head_learns_the_return():
    """With rewards of 1 and no penalty every return is 1: values have to get there from 0."""

    def one(source, ids, targets):
        return torch.ones(len(ids))

    records = run(trainer(one, kl_coef=0.0, **{**LEARN, "lr": 3e-2}), range(25))
    assert records[0]["value_mean"] == 0.0
    value = records[-1]["value_mean"]
    assert value > 0.5, f"value {value:.3f} of a return of 1 after 25 iterations"


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_resume_is_bit_identical(tmp_path, average):
    whole = trainer(average=average)
    records = run(whole, range(4))
    half = trainer(average=average)
    run(half, range(2))
    t5_small.save_atomically(half.state_dict(), tmp_path / "ppo.pt")

    resumed = trainer(average=average)
    for model in (resumed.policy, resumed.model):
        for parameter in model.parameters():  # all must come from the file
            parameter.data += 1.0
    resumed.load_state_dict(t5_small.load_state(tmp_path / "ppo.pt"))
    again = run(resumed, range(2, 4))
    for got, expected in ((resumed.policy, whole.policy), (resumed.model, whole.model)):
        assert torch.equal(all_weights(got), all_weights(expected)), "not bit-identical"
    assert again == records[2:]
    assert whole.kl_coef == resumed.kl_coef
    assert vars(whole.moments) == vars(resumed.moments)
