"""PPO for a policy that writes responses: sample, reward, find the advantages, update.

    settings              PPOConfig: the tricks, each with a name
    the equations         mask, log-probs, KL, whitening, rewards, GAE, the two clipped losses
    policy and rollout    a T5 with a value head; responses and all that is known of them
    one iteration         PPOTrainer.step, numbered 1 to 7; update; the loss
    watching              what a collapse looks like
    replying              responses to a whole data set, when nothing is learnt

An episode is one response, an action one token, a state the context and the tokens so far. The
*reference* is the policy before PPO: a T5 trained by maximum likelihood (MLE).

    p, p_ref, p_old   probabilities: policy, reference, policy that sampled
    r_t, R_t, A_t     reward, return, advantage of token t
    V_t               the value head's estimate of R_t
    beta, eps         kl_coef, clip_range

Shapes: B batch, S source length, T response length, D model width, V vocabulary. Tensors with
one number per token are (B, T); the mask is true on the response's tokens, false on padding.
This file does not know what the reward measures: it is passed in as a function of ids.

Sources: PPO, Schulman et al. 2017 (arXiv 1707.06347); GAE, Schulman et al. 2016 (arXiv
1506.02438); PPO on language models, Ziegler et al. 2019 (arXiv 1909.08593).
"""

import copy
import math
from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.nn as nn

from t5_small import EOS_ID, HIDDEN, PAD_ID, Optimizer, autocast, generate, option

GAMMA = 1.0  # no discount: responses are short, and the reward comes last
# In nats per token: an update that goes further ends there (an emergency brake).
MAX_UPDATE_KL = 0.5


@dataclass
class PPOConfig:
    """In [brackets]: the value in the code of EmpRL's authors, and what we have against it.

    option(default, help, low, high): low and high are the legal range.
    """

    steps: int = option(64, "iterations of rollout and update")
    batch_size: int = option(
        256, "responses per iteration [32: gradients are noisier]", 1, 10**6
    )
    minibatch_size: int = option(
        64, "responses per optimizer step [8, accumulated 4 times]", 1
    )
    micro_batch: int = option(0, "responses per forward pass, to save memory; 0: all")
    ppo_epochs: int = option(
        1, "passes over a rollout [4: a new rollout is cheap here]", 1, 1000
    )

    lr: float = option(
        9e-3, "learning rate, times the RMS of each tensor's weights [1e-5, absolute]"
    )
    rms_scaled: bool = True  # see t5_small.Optimizer.set_lr; off for a pretrained T5
    warmup: int = option(5, "iterations in which the learning rate rises [0]")
    average: float = option(
        0.0,
        "decay of a moving average of the weights, which is then the result; 0: off",
        0,
        0.9999,
    )

    lam: float = option(
        1.0, "GAE's lambda [0.95: early tokens rely on V, which is poor]", 0, 1
    )
    clip_range: float = option(
        0.2, "eps: the ratio gains nothing by moving further than this from 1"
    )
    value_clip_range: float = option(
        0.2, "eps of the value loss: how far a value may usefully move"
    )
    value_coef: float = option(0.1, "weight of the value loss")
    ptx_coef: float = option(0.0, "weight of the human responses' MLE loss (PPO-ptx) [none]")

    whiten_advantages: bool = option(True, "advantages to mean 0 and variance 1")
    whiten_rewards: bool = option(
        False, "token rewards to variance 1 [on: rescales the KL too]"
    )
    scale_rewards: bool = option(True, "divide rewards by their running standard deviation")
    centre_rewards: bool = option(False, "subtract their running mean [on: V learns the mean]")

    kl_coef: float = option(0.3, "beta: strength of the KL penalty [0.2]")
    adaptive_kl: bool = option(False, "beta follows the KL [on: too slow to matter]")
    kl_target: float = option(6.0, "nats per response; a larger KL raises beta", 1e-3)
    kl_horizon: float = option(
        1e3, "beta moves by at most 20 % in this many responses [1e4]", 1
    )
    eval_every: int = option(16, "iterations between validations", 1)
    valid_contexts: int = option(128, "contexts of each validation", 1)


# ---- the equations --------------------------------------------------------------------------


def response_mask(ids, eos_id=EOS_ID):
    """Which tokens belong to a response: up to and with the first </s>; all if there is none.

    ids: (B, T). Returns (B, T) bool.
    """
    is_eos = (ids == eos_id).long()
    ended_before = is_eos.cumsum(1) - is_eos
    return ended_before == 0


def token_log_probs(logits, ids, support=None, temperature=1.0):
    """log p(ids) under softmax(logits / temperature) on `support`, and its entropy.

    logits:  (..., V).
    ids:     (...).
    support: (..., V) bool, the tokens that could have been sampled (top-k, top-p, minimum
             length); None: all.
    Returns two (...) tensors.

    A rollout keeps the support of each of its tokens. Policy, old policy and reference are all
    renormalised over that one set: so the ratio is 1 before the first step (up to rounding),
    and the KL compares policy and reference on it. What they give to other tokens counts
    nowhere.
    """
    logits = logits.float() / temperature
    if support is not None:
        # Not -inf: 0 * -inf would be NaN in the entropy.
        logits = logits.masked_fill(~support, HIDDEN)
    log_probs = logits.log_softmax(-1)
    with torch.no_grad():
        entropy = -(logits.softmax(-1) * log_probs).sum(-1)
    return log_probs.gather(-1, ids[..., None])[..., 0], entropy


def kl_estimate(log_probs, ref_log_probs, kind="k1"):
    """KL(p || p_ref) of policy and reference, estimated token by token from samples of p.

    The loss asks it for KL(p_old || p), too. With d = log p - log p_ref:
        k1 = d               unbiased, may be negative: the penalty, and `kl` in the log
        k3 = e^-d - 1 + d    unbiased, never negative, less noisy near 0: `kl_k3`, `update_kl`
    Source: Schulman 2020, joschu.net/blog/kl-approx.html.
    """
    difference = log_probs - ref_log_probs
    if kind == "k1":
        return difference
    return torch.exp(-difference) - 1 + difference


def masked_mean(x, mask):
    """The mean of x where mask is true, (B, T) each: every token counts the same. A scalar."""
    return (x * mask).sum() / mask.sum()


def whiten(x, mask, shift_mean=True):
    """(x - mean) / sqrt(variance + 1e-8), over the n entries of the batch that mask keeps.

    The variance has n - 1 in its denominator (1 if n = 1). shift_mean=False adds the mean
    back afterwards (as the library trl does).
    x, mask: (B, T). Returns (B, T), 0 where mask is false.
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

    The penalty comes token by token, since each token has its share of the KL; the reward is
    that of a whole response.
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

    With gamma = lambda = 1 this is simply R_t = r_t + r_{t+1} + ..., A_t = R_t - V_t.
    rewards (of tokens), values, mask: (B, T). Returns A and R, both 0 on padding.
    """
    values = values * mask
    advantages = torch.zeros_like(rewards)
    next_value, next_advantage = 0.0, 0.0  # nothing comes after the last token
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = (delta + gamma * lam * next_advantage) * mask[:, t]
        next_value, next_advantage = values[:, t], advantages[:, t]
    return advantages, advantages + values


def policy_loss(log_probs, old_log_probs, advantages, mask, clip_range=0.2):
    """Minus PPO's clipped objective, a mean over tokens, with ratio = p / p_old:

        -min(ratio A, clip(ratio, 1 - eps, 1 + eps) A)

    Once a token's ratio has moved past eps in its advantage's direction, its gradient is 0.
    All (B, T). Returns the loss, and the share of tokens where clipping makes it larger.
    Source: Schulman et al. 2017 (arXiv 1707.06347), equation 7.
    """
    ratio = torch.exp(log_probs - old_log_probs)
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = masked_mean(torch.max(plain, clipped), mask)
    clip_share = masked_mean((clipped > plain).float(), mask)
    return loss, clip_share


def value_loss(values, old_values, returns, mask, clip_range=0.2):
    """Mean over tokens of 1/2 max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2).

    As for the policy, the larger of the two counts. All (B, T). Returns a scalar.
    """
    clipped = values.clamp(old_values - clip_range, old_values + clip_range)
    error = torch.max((values - returns) ** 2, (clipped - returns) ** 2)
    return 0.5 * masked_mean(error, mask)


def explained_variance(values, returns, mask):
    """1 - Var(R - V) / Var(R) over tokens: 1 for a perfect value head, 0 for a constant.

    All (B, T). Returns a number; 0 if all returns are equal: nothing to explain.
    """
    returns = returns[mask]
    error = returns - values[mask]
    variance = returns.var(correction=0)
    if variance == 0:
        return 0.0
    return (1 - error.var(correction=0) / variance).item()


def adapt_kl_coef(kl_coef, kl, target, batch_size, horizon):
    """beta <- beta clip(1 + clip(KL / target - 1, -0.2, 0.2) batch_size / horizon, 0.5, 2).

    The outer clip is ours: for a batch of more than five horizons beta could turn negative.
    Source: Ziegler et al. 2019 (arXiv 1909.08593), section 2.2.
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
    """A T5 and a value head: one linear layer on the decoder's outputs, started at 0.

    The output at t predicts token t, so V_t knows the context and the tokens before t. The
    value loss trains the T5, too. PPO runs without dropout (the authors' code has some before
    the value head), so that the ratio is 1 before the first step.
    """

    def __init__(self, t5):
        super().__init__()
        self.t5 = t5
        self.value_head = nn.Linear(t5.config.d_model, 1, device=t5.shared.weight.device)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def values(self, states):
        """(..., D) -> (...)."""
        return self.value_head(states.float())[..., 0]


@dataclass
class Prompts:
    """Prompts (contexts to answer), and what reward and loss need to know of them."""

    source: torch.Tensor  # (B, S) ids
    targets: torch.Tensor  # (B, ...) what to aim for; only the reward reads them
    human: torch.Tensor  # (B, T') ids of the human responses, for ptx_coef


@dataclass
class Rollout:
    """Sampled responses, and what the models and the reward say of them."""

    source: torch.Tensor  # (B, S)
    targets: torch.Tensor  # (B, ...)
    human: torch.Tensor  # (B, T')
    ids: torch.Tensor  # (B, T)
    mask: torch.Tensor  # (B, T) true up to </s>
    support: torch.Tensor  # (B, T, V) tokens that could have been sampled
    log_probs: torch.Tensor  # (B, T) by the policy that sampled
    values: torch.Tensor  # (B, T)
    ref_log_probs: torch.Tensor  # (B, T) by the reference
    rewards: torch.Tensor  # (B,) as the reward gave them
    advantages: torch.Tensor = None  # (B, T), from step 4 of an iteration on
    returns: torch.Tensor = None  # (B, T)

    def is_finite(self):
        """False once a model or the reward has diverged."""
        numbers = (self.log_probs, self.ref_log_probs, self.values, self.rewards)
        return all(x.isfinite().all() for x in numbers)

    def take(self, rows):
        """Some of the responses, with no more columns than the longest of them needs."""
        part = {name: x[rows] for name, x in vars(self).items() if x is not None}
        width = int(part["mask"].sum(1).max())
        for name in part.keys() - {"source", "targets", "human", "rewards"}:
            part[name] = part[name][:, :width]
        return Rollout(**part)


def unpack(x, mask):
    """(tokens,), one for each true entry of mask (B, T) -> (B, T), 0 elsewhere.

    It undoes x = y[mask].
    """
    return torch.zeros_like(mask, dtype=x.dtype).masked_scatter(mask, x)


def response_log_probs(t5, source, ids, mask, support, temperature):
    """The log-probs that a model gives to responses sampled from `support` (teacher forcing).

    source (B, S), ids and mask (B, T), support (B, T, V); see token_log_probs. Padding is
    dropped before the logits, which cost most in a small model.
    Returns log-probs and entropies, (B, T) and 0 on padding, and the states that predict the
    tokens, (tokens, D).
    """
    with autocast(source.device):
        states = t5.response_states(source, ids)[mask]  # (tokens, D)
        logits = t5.logits(states)  # (tokens, V)
    log_probs, entropy = token_log_probs(logits, ids[mask], support[mask], temperature)
    return unpack(log_probs, mask), unpack(entropy, mask), states


@torch.no_grad()
def rollout(policy, reference, reward, prompts, sampling):
    """Sample a response to each prompt; ask reference, value head and reward about it.

    reward: (source ids, response ids, targets) -> (B,). Returns a Rollout.
    """
    source = prompts.source
    with autocast(source.device):
        sampled = generate(policy.t5, source, sampling)
    mask = response_mask(sampled.ids)
    batch = Rollout(
        source=source,
        targets=prompts.targets,
        human=prompts.human,
        ids=sampled.ids,
        mask=mask,
        support=sampled.support,
        # By-products of the sampling, 0 on padding. Teacher forcing would give the same up to
        # rounding.
        log_probs=sampled.log_probs,
        values=policy.values(sampled.states) * mask,
        ref_log_probs=torch.zeros_like(sampled.log_probs),  # filled in below
        rewards=sampled.log_probs.new_zeros(len(source)),
    )

    # Reference and reward look at 64 responses of like length at a time: with all of them at
    # once a rollout takes 1.2 times as long, and more memory.
    for rows in mask.sum(1).argsort().split(64):
        part = batch.take(rows)
        log_probs, _, _ = response_log_probs(
            reference, part.source, part.ids, part.mask, part.support, sampling.temperature
        )
        batch.ref_log_probs[rows, : part.ids.shape[1]] = log_probs
        batch.rewards[rows] = reward(part.source, part.ids, part.targets).float()
    return batch


# ---- one iteration --------------------------------------------------------------------------


class PPOTrainer:
    """Moves a copy of `reference` towards responses that earn more; the result is `model`.

    reference: the T5 to start from and to stay close to; it is not changed.
    reward:    (source ids, response ids, targets) -> (B,).
    prompts:   iteration -> Prompts, config.batch_size of them.
    sampling:  the Sampling of the rollouts.
    validate:  T5 -> dict of numbers for the log, over config.valid_contexts contexts.
    An iteration depends on its number, state_dict() and torch's generator only. The methods
    that emprl.py calls are those of t5_small.Trainer.
    """

    # What the line of progress shows of a record.
    shown = ("reward", "kl", "length", "entropy")

    def __init__(self, reference, reward, prompts, sampling, config, validate):
        self.reference = reference
        self.reward = reward
        self.prompts = prompts
        self.sampling = sampling
        self.config = config
        self.validate = validate
        self.policy = Policy(copy.deepcopy(reference)).requires_grad_()
        self.policy.eval()  # learns, but without dropout
        # These weights start at 0 or near it: their rate is lr itself, not lr times their RMS.
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
        batch = self.rollout(self.prompts(i))
        mask = batch.mask
        if not batch.is_finite():  # nothing to learn from
            return {"reward": batch.rewards.mean().item(), "skipped": 1.0}

        # 2. The responses' rewards, scaled (and centred) by the running moments of all so far.
        rewards = self.scaled(batch.rewards)

        # 3. A reward per token: the KL penalty at each, the response's reward at the last.
        kl = kl_estimate(batch.log_probs, batch.ref_log_probs)
        per_token = token_rewards(rewards, kl, mask, self.kl_coef)
        if config.whiten_rewards:
            per_token = whiten(per_token, mask, shift_mean=False)

        # 4. Advantages: how much better than the value head expected, token by token.
        advantages, returns = gae(per_token, batch.values, mask, GAMMA, config.lam)
        if config.whiten_advantages:
            advantages = whiten(advantages, mask)
        batch.advantages, batch.returns = advantages, returns

        # 5. One pass of minibatches over these responses, or more.
        self.optimizer.set_lr(self.learning_rate(i), config.rms_scaled)
        record = self.describe(batch)
        record.update(self.update(batch))

        # 6. With adaptive_kl beta rises if the KL is above its target, and falls if below.
        if config.adaptive_kl:
            self.kl_coef = adapt_kl_coef(
                self.kl_coef, record["kl"], config.kl_target, len(mask), config.kl_horizon
            )

        # 7. Validation: often at first, when most changes, then every eval_every iterations.
        #    The reference, where the run starts, never changes and is validated once.
        if i == 0:
            record["start"] = self.validate(self.reference)
        done = i + 1
        if done in (1, 2, 4, 8, config.steps) or done % config.eval_every == 0:
            record.update(self.validate(self.model))
        return record

    def rollout(self, prompts):
        """Sample a response to each prompt, and score it."""
        return rollout(self.policy, self.reference, self.reward, prompts, self.sampling)

    def scaled(self, rewards):
        """Add rewards (B,) to the running moments, then centre and scale them by these."""
        self.moments.update(rewards)
        if self.config.centre_rewards:
            rewards = rewards - self.moments.mean
        if self.config.scale_rewards:
            rewards = rewards / self.moments.std
        return rewards

    def learning_rate(self, i):
        """A linear rise, then a linear fall (none where the weights are averaged)."""
        config = self.config
        rise = (i + 1) / max(config.warmup, 1)
        fall = 1 if config.average else 1 - i / config.steps
        return config.lr * min(rise, fall)

    def describe(self, batch):
        """What to log of a rollout. KL in nats per response, length in tokens."""
        mask, values, returns = batch.mask, batch.values, batch.returns
        k1 = kl_estimate(batch.log_probs, batch.ref_log_probs)
        k3 = kl_estimate(batch.log_probs, batch.ref_log_probs, "k3")
        record = {
            "reward": batch.rewards.mean().item(),
            "kl_coef": self.kl_coef,
            "kl": k1.sum(1).mean().item(),  # padding adds 0
            "kl_k3": k3.sum(1).mean().item(),
        }
        record["length"] = mask.sum(1).float().mean().item()
        record["value_mean"] = masked_mean(values, mask).item()
        record["return_mean"] = masked_mean(returns, mask).item()
        record["explained_variance"] = explained_variance(values, returns, mask)
        return record

    def update(self, batch):
        """ppo_epochs passes over one rollout. Returns the means of what was measured."""
        log = defaultdict(list)
        stopped_early = 0.0
        for rows in minibatches(len(batch.ids), self.config):
            measured = self.accumulate_gradient(batch, rows)
            for name, number in measured.items():
                log[name].append(number)

            if measured["update_kl"] > MAX_UPDATE_KL:  # far enough: all epochs end here
                self.optimizer.zero_grad()
                stopped_early = 1.0
                break

            # Our Optimizer clips the gradient, takes the step unless the norm is infinite or
            # NaN, and clears the gradient.
            norm = self.optimizer.step()
            log["grad_norm"].append(norm)
            log["skipped"].append(float(not math.isfinite(norm)))
            if self.config.average:
                move_towards(self.model, self.policy.t5, 1 - self.config.average)

        record = {name: sum(numbers) / len(numbers) for name, numbers in log.items()}
        del record["ratio_error"]
        record["first_ratio_error"] = log["ratio_error"][0]  # near 0: sampling and loss agree
        record["optimizer_steps"] = sum(map(math.isfinite, log["grad_norm"]))
        record["stopped_early"] = stopped_early
        return record

    def accumulate_gradient(self, batch, rows):
        """Add the gradient of the loss on some rows to .grad; optimizer.step clears it.

        It is done a micro-batch at a time. With n_k of the minibatch's n tokens in part k,
        mean = sum_k (n_k / n) mean_k. The human loss is a sum over a part, divided by the
        human tokens of the minibatch.
        Returns what was measured on the way.
        """
        config = self.config
        tokens = batch.mask[rows].sum()
        human_tokens = (batch.human[rows] != PAD_ID).sum()
        measured = defaultdict(float)
        for micro_rows in rows.split(config.micro_batch or len(rows)):
            part = batch.take(micro_rows)
            share = (part.mask.sum() / tokens).item()
            part_loss, seen, ratio_error = self.loss(part)
            loss = share * part_loss

            # The human responses' negative log-likelihood keeps the policy fluent (PPO-ptx,
            # Ouyang et al. 2022, arXiv 2203.02155).
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
        """L = L_policy + value_coef L_value, means over the tokens of a part of the rollout.

        Returns the loss, what is logged of it, and the largest |ratio - 1|.
        """
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

        # log_probs and values are new; part.log_probs and part.values are the rollout's.
        policy_part, clip_share = policy_loss(
            log_probs, part.log_probs, part.advantages, mask, config.clip_range
        )
        value_part = value_loss(
            values, part.values, part.returns, mask, config.value_clip_range
        )

        # How far the update has gone by now. KL(p_old || p), since p_old drew the samples.
        new = log_probs.detach()
        ratio = torch.exp(new - part.log_probs)
        update_kl = kl_estimate(part.log_probs, new, "k3")
        measured = {
            "policy_loss": policy_part,
            "value_loss": value_part,
            "entropy": masked_mean(entropy, mask),
            "clip_share": clip_share,
            "ratio": masked_mean(ratio, mask),
            "update_kl": masked_mean(update_kl, mask),
        }
        ratio_error = ((ratio - 1).abs() * mask).max()
        return policy_part + config.value_coef * value_part, measured, ratio_error

    def finish(self):
        """Nothing to do: self.model has the result already."""

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
    """mean <- mean + share (model - mean), for all weights: an exponential moving average."""
    for old, new in zip(mean.parameters(), model.parameters()):
        old.data.lerp_(new.data, share)


# ---- watching -------------------------------------------------------------------------------


def signs_of_collapse(record, first, max_length):
    """Warnings of a collapse, with what to do about it.

    first: the record of the run's first iteration. max_length: of a response, in tokens.
    """
    if "kl" not in record:  # a skipped iteration
        return []
    kl, entropy, length = record["kl"], record["entropy"], record["length"]
    unique = record.get("valid_unique", 1.0)  # a validation's, so not in every record
    signs = []
    if kl > 15:
        signs.append(f"KL {kl:.1f} nats, far from MLE: raise ppo.kl_coef or lower ppo.lr")
    if entropy < first.get("entropy", 0) / 10:
        signs.append(f"entropy {entropy:.3g}, a tenth of its start: raise ppo.kl_coef")
    if length > 0.9 * max_length:
        signs.append(f"responses of {length:.0f} tokens, nearly the limit: train MLE longer")
    if length < first.get("length", 0) / 2:
        signs.append(
            f"responses of {length:.0f} tokens, half of their start: raise ppo.kl_coef"
        )
    if unique < 0.3:
        signs.append(f"only {unique:.0%} of the responses differ: raise ppo.kl_coef")
    return signs


# ---- replying -------------------------------------------------------------------------------


def sample(t5, pairs, sampling, size):
    """Respond to all contexts, some rows at a time.

    pairs: data.Pairs. Yields the rows, their responses as lists of ids, and the arguments of
    response_log_probs that are the same for all models.
    """
    for rows in pairs.chunks(size):
        source, _ = pairs.batch(rows)
        with autocast(source.device):
            sampled = generate(t5, source, sampling)
        mask = response_mask(sampled.ids)
        responses = [ids[is_token].tolist() for ids, is_token in zip(sampled.ids, mask)]
        arguments = source, sampled.ids, mask, sampled.support, sampling.temperature
        yield rows, responses, arguments


@torch.no_grad()
def respond(t5, pairs, sampling, size=128):
    """A response to every context of pairs: lists of ids without padding, </s> included."""
    found = {}  # row -> response; chunks() orders the rows by length
    for rows, responses, _ in sample(t5, pairs, sampling, size):
        found.update(zip(rows, responses))
    return [found[row] for row in range(len(pairs))]


@torch.no_grad()
def respond_and_compare(t5, reference, pairs, sampling, size=128):
    """Responses as `respond` gives them, and KL(t5 || reference) in nats a response, by k1.

    The log-probs of both are by teacher forcing: so the reference's own KL is exactly 0.
    """
    found, total = {}, 0.0
    for rows, responses, arguments in sample(t5, pairs, sampling, size):
        found.update(zip(rows, responses))
        log_probs, _, _ = response_log_probs(t5, *arguments)
        ref_log_probs, _, _ = response_log_probs(reference, *arguments)
        total += kl_estimate(log_probs, ref_log_probs).sum().item()
    return [found[row] for row in range(len(pairs))], total / len(pairs)
