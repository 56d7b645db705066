"""PPO for a policy that writes responses: sample, reward, find the advantages, update.

    settings              every trick has a name, and a switch
    the equations         mask, log-probs, KL, whitening, GAE, the two clipped losses
    policy and rollout    a T5 with a value head; responses and all that is known of them
    one iteration         PPOTrainer.step, numbered 1 to 7; update; the loss
    watching              what a collapse looks like

Sources: PPO, Schulman et al. 2017 (arXiv 1707.06347); GAE, Schulman et al. 2016 (arXiv 1506.02438);
KL control, Ziegler et al. 2019 (arXiv 1909.08593). Shapes: B batch, S source length, T response
length, D model width, V vocabulary. An action is one token, an episode one response. Whatever
belongs to a token is (B, T) and masked on t1 .. </s>. This file knows nothing of empathy: the reward
is handed in as a function of ids.
"""

import copy
import math
from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.nn as nn

from t5_small import EOS_ID, HIDDEN, PAD_ID, Optimizer, autocast, generate, option

GAMMA = 1.0  # no discount: a response is short, and only its end is rewarded
MAX_RATIO = 10.0  # a minibatch whose mean ratio is above it is not learnt from
MAX_UPDATE_KL = 0.5  # nats a token; an update that has moved further ends early


@dataclass
class PPOConfig:
    """In brackets: the original's value, where ours differs, and why it does."""

    steps: int = option(64, "iterations of rollout and update", low=0)
    batch_size: int = option(384, "responses an iteration [32; more are less noisy]", 1, 10**6)
    minibatch_size: int = option(
        64, "responses an optimizer step [8, but 4 accumulated]", low=1
    )
    micro_batch: int = option(0, "responses a forward pass, to save memory; 0: all", low=0)
    ppo_epochs: int = option(
        1, "passes over a rollout [4; fresh ones are cheap here]", 1, 1000
    )

    lr: float = option(6e-3, "learning rate, relative if rms_scaled [1e-5, absolute]", high=10)
    rms_scaled: bool = True  # see t5_small.Optimizer.set_lr; off for a pretrained T5
    warmup: int = option(5, "iterations in which the rate rises [0]", low=0)
    average: float = option(
        0.0, "decay of the running mean of the weights; 0: take the last ones", high=0.9999
    )

    lam: float = option(1.0, "GAE's lambda [0.95; the one reward has far to go back]", high=1)
    clip_range: float = option(0.2, "how far the ratio may move")
    value_clip_range: float = option(0.2, "how far the value may move")
    value_coef: float = option(0.1, "weight of the value loss")
    ptx_coef: float = option(0.0, "weight of the human responses' loss [absent]")

    whiten_advantages: bool = option(True, "advantages to mean 0 and variance 1")
    whiten_rewards: bool = option(
        False, "token rewards to variance 1 [on; it rescales the KL]"
    )
    scale_rewards: bool = option(True, "divide rewards by their running standard deviation")
    centre_rewards: bool = option(
        False, "subtract their running mean [on; the value learns it]"
    )

    kl_coef: float = option(0.3, "beta, the strength of the KL penalty [0.2]")
    adaptive_kl: bool = option(
        False, "steer beta towards kl_target [on, but as good as fixed]"
    )
    kl_target: float = option(6.0, "nats a response that adaptive beta steers to", low=1e-3)
    kl_horizon: float = option(1000.0, "responses it takes to get there [10,000]", low=1)
    eval_every: int = option(16, "iterations between validations", low=1)
    valid_contexts: int = option(128, "contexts of each validation", low=1)


# ---- the equations --------------------------------------------------------------------------


def response_mask(ids, eos_id=EOS_ID):
    """Which tokens belong to a response: t1 .. the first </s>, or all if there is none.

    ids: (B, T). Returns (B, T) bool.
    """
    is_eos = (ids == eos_id).long()
    ended_before = is_eos.cumsum(1) - is_eos
    return ended_before == 0


def token_log_probs(logits, ids, support=None, temperature=1.0):
    """log p(ids) under softmax(logits / temperature) on `support`, and the entropy there.

    logits:  (..., V).
    ids:     (...).
    support: (..., V) bool, the tokens that could have been sampled (top-k, top-p, minimum
             length), as the rollout kept them. This is the very distribution that was sampled
             from, so the importance ratio is unbiased, and 1 before the first step.
    Returns two (...) tensors.
    """
    logits = logits.float() / temperature
    if support is not None:
        logits = logits.masked_fill(~support, HIDDEN)  # not -inf: 0 * inf is nan below
    log_probs = logits.log_softmax(-1)
    with torch.no_grad():
        entropy = -(logits.softmax(-1) * log_probs).sum(-1)
    return log_probs.gather(-1, ids[..., None])[..., 0], entropy


def kl_estimate(log_probs, ref_log_probs, kind="k1"):
    """KL(policy || reference), estimated token by token from the policy's own samples.

    With d = log p - log p_ref:
        k1 = d               unbiased; can be negative
        k3 = e^-d - 1 + d    unbiased; never negative
    Source: Schulman, "Approximating KL divergence", 2020.
    """
    difference = log_probs - ref_log_probs
    if kind == "k1":
        return difference
    return torch.exp(-difference) - 1 + difference


def masked_mean(x, mask):
    """The mean of x (B, T) where mask (B, T) is true; every token counts the same. A scalar."""
    return (x * mask).sum() / mask.sum()


def whiten(x, mask, shift_mean=True):
    """(x - mean) / sqrt(variance + 1e-8), both over the n masked entries of the whole batch.

    The variance has n - 1 in its denominator (1 if n = 1). With shift_mean off, the mean is
    added back. x, mask: (B, T). Returns (B, T), 0 where mask is false.
    """
    mean = masked_mean(x, mask)
    squares = ((x - mean) ** 2 * mask).sum()
    variance = squares / (mask.sum() - 1).clamp(min=1)
    whitened = (x - mean) * torch.rsqrt(variance + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return whitened * mask


def token_rewards(rewards, kl, mask, kl_coef):
    """r_t = -beta KL_t, plus the response's reward at its last token.

    rewards: (B,). kl, mask: (B, T). Returns (B, T), 0 on padding.
    """
    per_token = -kl_coef * kl * mask
    last = mask.sum(1) - 1  # (B,) position of </s>, or of the last token
    per_token[torch.arange(len(rewards)), last] += rewards
    return per_token


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Generalised advantage estimation, from the last token to the first:

        delta_t = r_t + gamma V_{t+1} - V_t        V = 0 after the last token
        A_t     = delta_t + gamma lambda A_{t+1}
        R_t     = A_t + V_t

    rewards, values, mask: (B, T). Returns advantages A and returns R, both 0 on padding.
    """
    values = values * mask
    advantages = torch.zeros_like(rewards)
    next_value = torch.zeros_like(rewards[:, 0])  # (B,)
    next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = (delta + gamma * lam * next_advantage) * mask[:, t]
        next_value = values[:, t]
        next_advantage = advantages[:, t]
    return advantages, (advantages + values) * mask


def policy_loss(log_probs, old_log_probs, advantages, mask, clip_range=0.2):
    """PPO's clipped objective, a mean over tokens, with ratio = p / p_old:

        -min(ratio A, clip(ratio, 1 - eps, 1 + eps) A)

    All (B, T). Returns the loss, and the share of tokens where clipping makes it larger.
    Source: PPO's paper, equation 7.
    """
    ratio = torch.exp(log_probs - old_log_probs)
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = masked_mean(torch.max(plain, clipped), mask)
    clip_share = masked_mean((clipped > plain).float(), mask)
    return loss, clip_share


def value_loss(values, old_values, returns, mask, clip_range=0.2):
    """Mean over tokens of 1/2 max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2).

    All (B, T). Returns a scalar.
    """
    clipped = torch.max(torch.min(values, old_values + clip_range), old_values - clip_range)
    error = torch.max((values - returns) ** 2, (clipped - returns) ** 2)
    return 0.5 * masked_mean(error, mask)


def explained_variance(values, returns, mask):
    """1 - Var(R - V) / Var(R) over tokens: 1 is a perfect value head, 0 one that is constant."""
    returns, values = returns[mask], values[mask]
    variance = returns.var(correction=0)
    if variance == 0:
        return 0.0
    return (1 - (returns - values).var(correction=0) / variance).item()


def adapt_kl_coef(kl_coef, kl, target, batch_size, horizon):
    """beta <- beta (1 + clip(KL / target - 1, -0.2, 0.2) batch_size / horizon).

    One update at most halves or doubles beta: with a horizon that is short beside the batch it
    would jump, or turn negative. Source: Ziegler et al., section 2.2.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    factor = 1 + error * batch_size / horizon
    return kl_coef * min(max(factor, 0.5), 2.0)


class RunningMoments:
    """Mean and variance of all rewards so far, batch by batch (Chan et al. 1979)."""

    def __init__(self):
        self.count = 0
        self.mean = 0.0
        self.squares = 0.0  # sum of squared differences from the mean

    def update(self, rewards):
        count = len(rewards)
        mean = rewards.mean().item()
        total = self.count + count
        shift = mean - self.mean
        self.squares += ((rewards - mean) ** 2).sum().item()
        self.squares += shift**2 * self.count * count / total
        self.mean += shift * count / total
        self.count = total

    @property
    def std(self):
        """Sample standard deviation; 1 while all rewards are equal (nothing to scale by)."""
        std = math.sqrt(self.squares / max(self.count - 1, 1))
        return std if std > 1e-6 else 1.0


# ---- policy and rollout ---------------------------------------------------------------------


class Policy(nn.Module):
    """A T5 and a value head: one linear layer on the decoder's last states, started at 0.

    V_t sees the context and the tokens before t. There is no dropout in PPO (the original has
    some before the value head), so that the ratio is 1 before the first step.
    """

    def __init__(self, t5):
        super().__init__()
        self.t5 = t5
        self.value_head = nn.Linear(t5.config.d_model, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def values(self, states):
        """(..., D) -> (...)."""
        return self.value_head(states.float())[..., 0]


@dataclass
class Prompts:
    """A batch of contexts to answer, with what the reward and the loss need to know of them."""

    source: torch.Tensor  # (B, S) ids of the contexts
    targets: torch.Tensor  # (B, ...) handed to the reward as they are
    human: torch.Tensor  # (B, T') ids of the human responses, for ptx_coef


@dataclass
class Rollout:
    """Sampled responses, and what everybody says of them."""

    source: torch.Tensor  # (B, S)
    human: torch.Tensor  # (B, T')
    ids: torch.Tensor  # (B, T)
    mask: torch.Tensor  # (B, T) t1 .. </s>
    support: torch.Tensor  # (B, T, V) tokens that could have been sampled
    log_probs: torch.Tensor  # (B, T) by the policy that sampled
    ref_log_probs: torch.Tensor  # (B, T) by the reference
    values: torch.Tensor  # (B, T)
    rewards: torch.Tensor  # (B,) as the reward gave them
    advantages: torch.Tensor = None  # (B, T), from step 4 of an iteration on
    returns: torch.Tensor = None  # (B, T)

    PER_TOKEN = (
        "ids",
        "mask",
        "support",
        "log_probs",
        "ref_log_probs",
        "values",
        "advantages",
        "returns",
    )

    def is_finite(self):
        numbers = (self.log_probs, self.ref_log_probs, self.values, self.rewards)
        return all(x.isfinite().all() for x in numbers)

    def take(self, rows):
        """Some of the responses, with no more columns than the longest of them needs."""
        width = int(self.mask[rows].sum(1).max())
        whole = {name: getattr(self, name)[rows] for name in ("source", "human", "rewards")}
        cut = {name: getattr(self, name)[rows, :width] for name in self.PER_TOKEN}
        return Rollout(**whole, **cut)


def unpack(x, mask):
    """One number for each true entry of mask (B, T), in order -> (B, T), 0 elsewhere."""
    return torch.zeros_like(mask, dtype=x.dtype).masked_scatter(mask, x)


def response_log_probs(t5, source, ids, mask, support, temperature):
    """What a model says of responses that were sampled from `support` (see token_log_probs).

    source (B, S), ids and mask (B, T), support (B, T, V). Returns log-probs and entropies, both
    (B, T) and 0 on padding, and the decoder's states at the tokens, (tokens, D): padding is
    dropped before the product with the vocabulary.
    """
    with autocast(source.device):
        states = t5.response_states(source, ids)[mask]  # (tokens, D)
        logits = t5.logits(states)  # (tokens, V)
    log_probs, entropy = token_log_probs(logits, ids[mask], support[mask], temperature)
    return unpack(log_probs, mask), unpack(entropy, mask), states


@torch.no_grad()
def rollout(policy, reference, reward, prompts, sampling):
    """Sample a response to each prompt, and ask everybody about it. Returns a Rollout.

    reward: (source ids, response ids, targets) -> (B,).
    """
    source = prompts.source
    with autocast(source.device):
        sampled = generate(policy.t5, source, sampling)
    ids, support = sampled.ids, sampled.support
    mask = response_mask(ids)
    ref_log_probs, _, _ = response_log_probs(
        reference, source, ids, mask, support, sampling.temperature
    )
    return Rollout(
        source=source,
        human=prompts.human,
        ids=ids,
        mask=mask,
        support=support,
        log_probs=sampled.log_probs,
        ref_log_probs=ref_log_probs,
        values=policy.values(sampled.states) * mask,
        rewards=reward(source, ids, prompts.targets).float(),
    )


def sample(t5, pairs, sampling, size):
    """Responses to all contexts, a lot at a time: rows, source (B, S), Generation, mask (B, T)."""
    for rows in pairs.chunks(size):
        source, _ = pairs.batch(rows)
        with autocast(source.device):
            sampled = generate(t5, source, sampling)
        yield rows, source, sampled, response_mask(sampled.ids)


@torch.no_grad()
def respond(t5, pairs, sampling, size=128):
    """A response for every context of pairs: lists of ids without padding, </s> included."""
    responses = [None] * len(pairs)
    for rows, _, sampled, mask in sample(t5, pairs, sampling, size):
        for row, ids, seen in zip(rows, sampled.ids, mask):
            responses[row] = ids[seen].tolist()
    return responses


@torch.no_grad()
def respond_and_compare(t5, reference, pairs, sampling, size=128):
    """The same, and KL(t5 || reference) in nats a response, by k1 on these samples."""
    responses, total = [None] * len(pairs), 0.0
    for rows, source, sampled, mask in sample(t5, pairs, sampling, size):
        for row, ids, seen in zip(rows, sampled.ids, mask):
            responses[row] = ids[seen].tolist()
        asked = (source, sampled.ids, mask, sampled.support, sampling.temperature)
        log_probs, _, _ = response_log_probs(t5, *asked)
        ref_log_probs, _, _ = response_log_probs(reference, *asked)
        total += kl_estimate(log_probs, ref_log_probs).sum().item()
    return responses, total / len(pairs)


# ---- one iteration --------------------------------------------------------------------------


class PPOTrainer:
    """Moves a copy of `reference` towards responses that `reward` likes.

    reference: the T5 to start from and to stay close to; it is not changed.
    reward:    (source ids, response ids, targets) -> (B,).
    prompts:   iteration -> Prompts.
    sampling:  what responses are explored with.
    validate:  T5 -> dict of numbers for the log, every eval_every iterations.
    An iteration depends on its number, the state and torch's generator only.
    """

    shown = ("reward", "kl", "length", "entropy")

    def __init__(self, reference, reward, prompts, sampling, config, validate):
        self.reference = reference
        self.reward = reward
        self.prompts = prompts
        self.sampling = sampling
        self.config = config
        self.validate = validate
        self.policy = Policy(copy.deepcopy(reference)).eval()
        self.policy.to(next(reference.parameters()).device)
        self.policy.requires_grad_(True)
        self.optimizer = Optimizer(self.policy, unscaled=("relative_bias", "value_head"))
        self.moments = RunningMoments()
        self.kl_coef = config.kl_coef
        self.model = self.policy.t5  # whose weights are the result
        if config.average:
            self.model = copy.deepcopy(reference).eval()

    def step(self, i):
        """Iteration i: sample, reward, find the advantages, update. Returns what to log."""
        config = self.config

        # 1. A response to each context, and what policy, reference and reward say of it.
        sampled = rollout(
            self.policy, self.reference, self.reward, self.prompts(i), self.sampling
        )
        mask = sampled.mask
        if not sampled.is_finite():  # nothing to learn from
            return {"reward": sampled.rewards.mean().item(), "skipped": 1.0}

        # 2. The responses' rewards, on one scale over the whole run.
        rewards = self.scaled(sampled.rewards)

        # 3. A reward for each token: the KL penalty everywhere, the response's on its last.
        kl = kl_estimate(sampled.log_probs, sampled.ref_log_probs)
        per_token = token_rewards(rewards, kl, mask, self.kl_coef)
        if config.whiten_rewards:
            per_token = whiten(per_token, mask, shift_mean=False)

        # 4. Advantages: how much better than the value head expected, token by token.
        advantages, returns = gae(per_token, sampled.values, mask, GAMMA, config.lam)
        if config.whiten_advantages:
            advantages = whiten(advantages, mask)
        sampled.advantages, sampled.returns = advantages, returns

        # 5. A few passes of minibatches over these responses.
        self.optimizer.set_lr(self.learning_rate(i), config.rms_scaled)
        record = self.describe(sampled)
        record.update(self.update(sampled))

        # 6. How far the policy is from the reference may move beta.
        if config.adaptive_kl:
            self.kl_coef = adapt_kl_coef(
                self.kl_coef, record["kl"], config.kl_target, len(mask), config.kl_horizon
            )

        # 7. Now and then, a look from outside; at the start also at the reference.
        if i == 0:
            record["start"] = self.validate(self.reference)
        early = i + 1 in (1, 2, 4, 8)
        if early or (i + 1) % config.eval_every == 0 or i + 1 == config.steps:
            record.update(self.validate(self.model))
        return record

    def scaled(self, rewards):
        """Rewards (B,) on one scale over the whole run, these included."""
        self.moments.update(rewards)
        if self.config.centre_rewards:
            rewards = rewards - self.moments.mean
        if self.config.scale_rewards:
            rewards = rewards / self.moments.std
        return rewards

    def learning_rate(self, i):
        """It rises linearly, then falls linearly; a mean of the weights needs no fall."""
        config = self.config
        rise = min((i + 1) / max(config.warmup, 1), 1)
        fall = 1 if config.average else 1 - i / config.steps
        return config.lr * min(rise, fall)

    def describe(self, sampled):
        """What to log of a rollout. KL in nats a response, length in tokens."""
        mask = sampled.mask
        k1 = kl_estimate(sampled.log_probs, sampled.ref_log_probs)
        k3 = kl_estimate(sampled.log_probs, sampled.ref_log_probs, "k3")
        record = {"reward": sampled.rewards.mean().item(), "kl_coef": self.kl_coef}
        record["kl"] = k1.sum(1).mean().item()
        record["kl_k3"] = k3.sum(1).mean().item()
        record["length"] = mask.sum(1).float().mean().item()
        record["value_mean"] = masked_mean(sampled.values, mask).item()
        record["return_mean"] = masked_mean(sampled.returns, mask).item()
        record["explained_variance"] = explained_variance(
            sampled.values, sampled.returns, mask
        )
        return record

    def update(self, sampled):
        """ppo_epochs passes over one rollout. Returns the means of what was measured."""
        config = self.config
        log = defaultdict(list)
        optimizer_steps, stopped_early = 0, 0.0
        for rows in minibatches(len(sampled.ids), config):
            measured = self.gradient(sampled, rows)
            for name, number in measured.items():
                log[name].append(number)
            if measured["update_kl"] > MAX_UPDATE_KL:  # far enough: all epochs end here
                self.optimizer.zero_grad()
                stopped_early = 1.0
                break
            if measured["ratio"] > MAX_RATIO:
                self.optimizer.zero_grad()
                continue
            norm = self.optimizer.step()
            log["grad_norm"].append(norm)
            log["skipped"].append(float(not math.isfinite(norm)))
            optimizer_steps += math.isfinite(norm)
            if config.average:
                move_towards(self.model, self.policy.t5, 1 - config.average)

        # The ratio before the first step is 1 if sampling and scoring agree.
        first_ratio_error = log.pop("ratio_error")[0]
        means = {name: sum(numbers) / len(numbers) for name, numbers in log.items()}
        return {
            **means,
            "first_ratio_error": first_ratio_error,
            "optimizer_steps": optimizer_steps,
            "stopped_early": stopped_early,
        }

    def gradient(self, sampled, rows):
        """The gradient of the loss on some rows, a micro-batch at a time. Returns its parts.

        A mean over all tokens is the sum over micro-batches of their means, weighted by their
        shares of the tokens; the human responses have shares of their own.
        """
        config = self.config
        tokens = sampled.mask[rows].sum()
        human_tokens = (sampled.human[rows] != PAD_ID).sum()
        measured = defaultdict(float)
        for micro_rows in rows.split(config.micro_batch or len(rows)):
            part = sampled.take(micro_rows)
            share = (part.mask.sum() / tokens).item()
            loss, seen, ratio_error = self.loss(part)
            loss = share * loss
            if config.ptx_coef:
                human_loss, _ = self.policy.t5.loss_sum(part.source, part.human)
                human_loss = human_loss / human_tokens
                loss = loss + config.ptx_coef * human_loss
                measured["human_loss"] += human_loss.item()
            loss.backward()
            for name, number in seen.items():
                measured[name] += share * number.item()
            measured["ratio_error"] = max(measured["ratio_error"], ratio_error.item())
        return measured

    def loss(self, part):
        """L = L_policy + value_coef L_value on a part of the rollout, and what is logged of it."""
        config, mask = self.config, part.mask
        log_probs, entropy, states = response_log_probs(
            self.policy.t5,
            part.source,
            part.ids,
            mask,
            part.support,
            self.sampling.temperature,
        )
        values = unpack(self.policy.values(states), mask)
        on_policy, clip_share = policy_loss(
            log_probs, part.log_probs, part.advantages, mask, config.clip_range
        )
        on_value = value_loss(values, part.values, part.returns, mask, config.value_clip_range)

        ratio = torch.exp(log_probs.detach() - part.log_probs)
        update_kl = kl_estimate(part.log_probs, log_probs.detach(), "k3")
        measured = {
            "policy_loss": on_policy,
            "value_loss": on_value,
            "entropy": masked_mean(entropy, mask),
            "clip_share": clip_share,
            "ratio": masked_mean(ratio, mask),
            "update_kl": masked_mean(update_kl, mask),
        }
        ratio_error = ((ratio - 1).abs() * mask).max()
        return on_policy + config.value_coef * on_value, measured, ratio_error

    def finish(self):
        """The result is in self.model: the last weights, or their running mean."""

    def warnings(self, record, first):
        return signs_of_collapse(record, first, self.sampling.max_length)

    def state_dict(self):
        return {
            "policy": self.policy.state_dict(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "moments": vars(self.moments),
            "kl_coef": self.kl_coef,
        }

    def load_state_dict(self, state):
        self.policy.load_state_dict(state["policy"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        vars(self.moments).update(state["moments"])
        self.kl_coef = state["kl_coef"]


def minibatches(count, config):
    """The rows of each minibatch, in a new order for every epoch."""
    for _ in range(config.ppo_epochs):
        yield from torch.randperm(count).split(config.minibatch_size)


def move_towards(mean, model, share):
    """mean <- mean + share (model - mean), for all weights (Polyak & Juditsky 1992)."""
    weights = [p.data for p in model.parameters()]
    torch._foreach_lerp_([p.data for p in mean.parameters()], weights, share)


# ---- watching -------------------------------------------------------------------------------


def signs_of_collapse(record, first, max_length):
    """What in an iteration's record looks like a collapse: sentences that say what to change.

    first: the record of the run's first iteration. max_length: of a response, in tokens.
    """
    kl, entropy, length = record["kl"], record["entropy"], record["length"]
    unique = record.get("valid_unique", 1.0)
    signs = []
    if kl > 15:
        signs.append(f"KL {kl:.1f} nats, far from MLE: raise ppo.kl_coef or lower ppo.lr")
    if entropy < first["entropy"] / 10:
        signs.append(f"entropy {entropy:.3g}, a tenth of its start: raise ppo.kl_coef")
    if length > 0.9 * max_length:
        signs.append(f"responses of {length:.0f} tokens, nearly the limit: train MLE longer")
    if length < first["length"] / 2:
        signs.append(
            f"responses of {length:.0f} tokens, half of their start: raise ppo.kl_coef"
        )
    if unique < 0.3:
        signs.append(f"only {unique:.0%} of the responses differ: raise ppo.kl_coef")
    return signs
