"""PPO for a sequence-to-sequence policy: rollout, KL control, GAE, clipped losses.

Sources: Schulman et al. 2017 (PPO, arXiv 1707.06347), Schulman et al. 2016 (GAE, arXiv 1506.02438), Ziegler et al. 2019 (KL control,
arXiv 1909.08593). B batch, S source length, T response length, D model width, V vocabulary. An action is one token, an episode one
response; all per token is (B, T), masked on t1 .. </s>. The reward (context ids, response ids, index) -> (B,) is handed in."""

import copy, itertools, math
from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn as nn

from t5_small import autocast, generate, make_optimizers, optimizer_step, set_lr


@dataclass
class PPOConfig:
    """Each trick has a name. In brackets the original's value, where ours differs, and why."""

    steps: int = 64  # iterations of rollout and update
    batch_size: int = (
        384  # rollouts an iteration [32: noisier, and a small model can afford more]
    )
    minibatch_size: int = 64  # rollouts an optimizer step [8, but 4 accumulated: 32 in effect]
    micro_batch: int = (
        0  # rollouts a forward pass; 0: the whole minibatch. Fewer need less memory
    )
    ppo_epochs: int = 1  # passes over a rollout [4: fresh rollouts are cheap here, and move the policy less astray]
    lr: float = (
        6e-3  # relative to each tensor's RMS if rms_scaled [1e-5, absolute, for T5-base]
    )
    rms_scaled: bool = True  # see t5_small.set_lr; off for a pretrained T5
    warmup: int = (
        5  # iterations of linear warm-up, then linear decay unless `average` [no warm-up]
    )
    gamma: float = 1.0
    lam: float = 1.0  # GAE's lambda [0.95: the one score comes at the end and fades before it reaches t1]
    clip_range: float = 0.2
    value_clip_range: float = 0.2
    value_coef: float = 0.1
    ptx_coef: float = 0.0  # of the human responses' negative log-likelihood a token: keeps the language (Ouyang et al. 2022)
    average: float = 0.0  # decay, a step, of the weights' running mean, the result then: noise cancels out (Polyak & Juditsky 1992)
    max_grad_norm: float = (
        1.0  # at every step [only the first one is clipped, by a fault of its library]
    )
    whiten_advantages: bool = True
    whiten_rewards: bool = (
        False  # [on: it rescales the KL penalty together with the reward, batch by batch]
    )
    scale_scores: bool = True  # divide scores by their running standard deviation
    normalise_scores: bool = (
        False  # and subtract their running mean [on: the value head learns the mean anyway]
    )
    kl_coef: float = 0.3  # beta [0.2]
    adaptive_kl: bool = False  # [on, but as good as fixed: see kl_horizon]
    kl_target: float = 6.0  # nats a response that adaptive beta steers to
    kl_horizon: float = (
        1000.0  # rollouts [10,000: at batch 32 beta then moves < 0.07 % a step]
    )
    max_ratio: float = (
        10.0  # a minibatch whose mean ratio is above is not learnt from (ratio guard)
    )
    max_update_kl: float = (
        0.5  # nats a token by which one update may move; then its epochs stop early
    )
    eval_every: int = 16  # iterations between validations
    stop_on_collapse: bool = (
        False  # end the run, not only warn, at a sign of collapse (see signs_of_collapse)
    )


# ---- equations ------------------------------------------------------------------------------------------------------
def response_mask(ids, eos_id=1):
    """(B, T) ids -> (B, T) bool: true on t1 .. the first </s>; everywhere in a response that never ends."""
    ended_before = (ids == eos_id).cumsum(1) - (ids == eos_id).long()
    return ended_before == 0


def token_log_probs(logits, ids, support=None, temperature=1.0):
    """log p(ids) under softmax(logits / temperature) restricted to `support`, and that distribution's entropy.
    logits: (..., V). ids: (...). support: (..., V) bool, the tokens that could have been sampled (top-k,
    top-p, minimum length), kept from the rollout: the very distribution that was sampled from, so that the
    importance ratio is unbiased, and 1 before the first step (to 1e-5 in fp32, to 0.03 in bf16). Returns two (...) tensors."""
    logits = logits.float() / temperature
    if support is not None:
        logits = logits.masked_fill(~support, -1e9)  # not -inf: 0 * inf is nan in the entropy
    log_probs = logits.log_softmax(-1)
    with torch.no_grad():  # softmax, not exp: on a CPU exp(-1e9) takes ten times as long
        entropy = -(logits.softmax(-1) * log_probs).sum(-1)
    return log_probs.gather(-1, ids[..., None])[..., 0], entropy


def kl_estimate(log_probs, ref_log_probs, kind="k1"):
    """Estimates of KL(policy || reference) from the policy's own samples (Schulman, "Approximating KL").
    With d = log p - log p_ref:  k1 = d (unbiased, can be negative), k3 = e^-d - 1 + d (unbiased, >= 0)."""
    d = log_probs - ref_log_probs
    return d if kind == "k1" else torch.exp(-d) - 1 + d


def masked_mean(x, mask):
    """The mean of x (B, T) where mask (B, T) is true: every token counts the same. Returns a scalar."""
    return (x * mask).sum() / mask.sum()


def whiten(x, mask, shift_mean=True):
    """(x - mean) / sqrt(SS / max(n - 1, 1) + 1e-8) over the n masked entries of the whole batch, SS their sum of squared differences
    from the mean; 0 elsewhere. With shift_mean off the mean is added back."""
    mean = masked_mean(x, mask)
    variance = ((x - mean) ** 2 * mask).sum() / (mask.sum() - 1).clamp(min=1)
    whitened = (x - mean) * torch.rsqrt(variance + 1e-8)
    return (whitened if shift_mean else whitened + mean) * mask


def token_rewards(scores, log_probs, ref_log_probs, mask, kl_coef):
    """r_t = -beta (log p_t - log p_ref,t), plus the response's score at its last token.
    scores: (B,); the others (B, T). Returns (B, T), 0 on padding."""
    rewards = -kl_coef * kl_estimate(log_probs, ref_log_probs) * mask
    last = mask.sum(1) - 1  # (B,) position of </s>, or of the last token
    rewards[torch.arange(len(scores)), last] += scores
    return rewards


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Generalised advantage estimation: A_t = delta_t + gamma lambda A_{t+1}, with delta_t = r_t + gamma V_{t+1} - V_t and V = 0
    after the last token. All (B, T). Returns advantages and returns (A + V), both 0 on padding."""
    values, advantages = values * mask, torch.zeros_like(rewards)
    following_value = following_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * following_value - values[:, t]
        following_advantage = (delta + gamma * lam * following_advantage) * mask[:, t]
        advantages[:, t], following_value = following_advantage, values[:, t]
    return advantages, (advantages + values) * mask


def policy_loss(log_probs, old_log_probs, advantages, mask, clip_range=0.2):
    """Mean over tokens of -min(ratio A, clip(ratio, 1 - eps, 1 + eps) A). All (B, T).
    Returns (loss, share of tokens where the clipped loss is the larger one, strictly); ratio = p / p_old."""
    ratio = torch.exp(log_probs - old_log_probs)
    plain, clipped = (
        -advantages * ratio,
        -advantages * ratio.clamp(1 - clip_range, 1 + clip_range),
    )
    return masked_mean(torch.max(plain, clipped), mask), masked_mean(
        (clipped > plain).float(), mask
    )


def value_loss(values, old_values, returns, mask, clip_range=0.2):
    """Mean over tokens of 1/2 max((V - R)^2, (clip(V, V_old -+ eps) - R)^2). All (B, T). Returns a scalar."""
    clipped = torch.max(torch.min(values, old_values + clip_range), old_values - clip_range)
    return 0.5 * masked_mean(
        torch.max((values - returns) ** 2, (clipped - returns) ** 2), mask
    )


def adapt_kl_coef(kl_coef, kl, target, batch_size, horizon):
    """beta <- beta (1 + clip(KL / target - 1, -0.2, 0.2) batch_size / horizon) (Ziegler et al., section 2.2). A horizon that is short
    beside the batch would make it jump, or negative: one update at most doubles or halves it."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * min(max(1 + error * batch_size / horizon, 0.5), 2.0)


def signs_of_collapse(record, first, max_length):
    """What in an iteration's record (`first`: the run's first) looks like a collapse, in words, with what to change."""
    kl, entropy, length, unique = (
        record.get(k, 1) for k in ("kl", "entropy", "length", "valid_unique")
    )
    signs = {
        f"KL {kl:.1f} nats, far from the MLE policy: raise ppo.kl_coef or lower ppo.lr": kl
        > 15,
        f"entropy {entropy:.3g}, below a tenth of its start: raise ppo.kl_coef": entropy
        < first.get("entropy", 0) / 10,
        f"responses of {length:.0f} tokens, nearly the limit: train the MLE policy longer": length
        > 0.9 * max_length,
        f"responses of {length:.0f} tokens, below half of their start: raise ppo.kl_coef": length
        < first.get("length", 0) / 2,
        f"only {unique:.0%} of the responses differ: raise ppo.kl_coef": unique < 0.3,
    }
    return [words for words, seen in signs.items() if seen]


class RunningMoments:
    """Mean and variance of all scores seen so far, batch by batch (Chan et al. 1979)."""

    def __init__(self):
        self.count, self.mean, self.m2 = (
            0,
            0.0,
            0.0,
        )  # m2: sum of squared differences from the mean

    def update(self, scores):
        n, mean = len(scores), scores.mean().item()
        delta, total = mean - self.mean, self.count + n
        self.m2 += ((scores - mean) ** 2).sum().item() + delta**2 * self.count * n / total
        self.mean, self.count = self.mean + delta * n / total, total

    @property
    def std(self):
        """Sample standard deviation; 1 while all scores have been equal (nothing to scale by)."""
        std = math.sqrt(self.m2 / max(self.count - 1, 1))
        return std if std > 1e-6 else 1.0


# ---- policy and rollout ---------------------------------------------------------------------------------------------
class Policy(nn.Module):
    """A T5 and a value head on its decoder's last state, one linear layer, started at 0: V_t sees the context and the tokens before t.
    The original puts dropout before it; PPO here runs without dropout (so that the ratio starts at 1)."""

    def __init__(self, t5):
        super().__init__()
        self.t5, self.value_head = t5, nn.Linear(t5.config.d_model, 1)
        [nn.init.zeros_(p) for p in self.value_head.parameters()]

    def values(self, states):
        return self.value_head(states.float())[..., 0]  # (..., D) -> (...)


def score(t5, source, ids, mask, support, temperature, value=None):
    """Log-probs (B, T), entropies (B, T) and, with `value` a function of states, values (B, T) of responses.
    Padding is dropped before the product with the vocabulary; all three are 0 there."""
    with autocast(source.device):
        states = t5.response_states(source, ids)[mask]  # (tokens, D)
        logits = t5.logits(states)  # (tokens, V)
    results = [*token_log_probs(logits, ids[mask], support[mask], temperature)] + (
        [value(states)] if value else []
    )
    return [torch.zeros_like(mask, dtype=torch.float).masked_scatter(mask, x) for x in results]


@dataclass
class Rollout:
    source: torch.Tensor  # (B, S)
    ids: torch.Tensor  # (B, T) response
    mask: torch.Tensor  # (B, T) t1 .. </s>
    support: torch.Tensor  # (B, T, V) tokens that could have been sampled
    log_probs: torch.Tensor  # (B, T) by the policy that sampled
    ref_log_probs: torch.Tensor  # (B, T) by the reference
    values: torch.Tensor  # (B, T)
    scores: torch.Tensor  # (B,) the reward, as it came
    index: torch.Tensor  # (B,) of the training pairs


@torch.no_grad()
def rollout(policy, reference, reward, source, index, sampling):
    """Sample one response for each row of source (B, S) and look at it from every side. See Rollout.
    Log-probs and values of the policy come from the sampling itself, not from another forward pass."""
    with autocast(source.device):
        g = generate(policy.t5, source, sampling)  # 1. responses
    mask = response_mask(g.ids, policy.t5.config.eos_token_id)  # 2. what counts of them
    values = policy.values(g.states) * mask  # 3. what the value head expected
    ref_log_probs, scores = (
        torch.zeros_like(g.log_probs),
        torch.zeros(len(source), device=source.device),
    )
    for rows in mask.sum(1).argsort().cpu().split(64):  # like lengths together: less padding
        ids, seen = (x[rows, : int(mask[rows].sum(1).max())] for x in (g.ids, mask))
        support = g.support[rows, : ids.shape[1]]
        ref_log_probs[rows, : ids.shape[1]] = score(
            reference, source[rows], ids, seen, support, sampling.temperature
        )[0]  # 4. the reference
        scores[rows] = reward(source[rows], ids, index[rows]).float()  # 5. what it got
    return Rollout(
        source,
        g.ids,
        mask,
        g.support,
        g.log_probs * mask,
        ref_log_probs,
        values,
        scores,
        index,
    )


@torch.no_grad()
def generations(t5, pairs, sampling, size=128):
    """Responses to all contexts of pairs, lot by lot: (rows, source (B, S), Generation, mask (B, T) of t1 .. </s>)."""
    for rows in pairs.chunks(size):
        source = pairs.batch(rows)[0]
        with autocast(pairs.device):
            g = generate(t5, source, sampling)
        yield rows, source, g, response_mask(g.ids, t5.config.eos_token_id)


def respond(t5, pairs, sampling, size=128):
    """A response for every context of pairs: lists of ids, padding removed, </s> kept."""
    responses = [None] * len(pairs)
    for rows, _, g, mask in generations(t5, pairs, sampling, size):
        for i, ids, seen in zip(rows, g.ids, mask):
            responses[i] = ids[seen].tolist()
    return responses


@torch.no_grad()
def sampled_kl(t5, reference, pairs, sampling, size=128):
    """KL(t5 || reference) in nats a response, by k1 on one sample for each context (with the same seed those of `respond`),
    under the distribution they are sampled from, as in training. None for greedy replies: nothing is sampled."""
    if sampling.greedy:
        return None
    total = 0.0
    for _, source, g, mask in generations(t5, pairs, sampling, size):
        ours, theirs = (
            score(model, source, g.ids, mask, g.support, sampling.temperature)[0]
            for model in (t5, reference)
        )
        total += kl_estimate(ours, theirs).sum().item()
    return total / len(pairs)


# ---- training -------------------------------------------------------------------------------------------------------
class PPOTrainer:
    """One call of step = one iteration: rollout, rewards, advantages, ppo_epochs passes of minibatches. reward(source ids, response
    ids, index) -> (B,). batch_at(step) -> (source (B, S), index (B,)). validate(t5) -> dict of numbers, logged every eval_every
    iterations. human_loss(index) -> (sum, tokens), if ptx_coef > 0. A step depends on its number, the state and torch's generator only."""

    def __init__(self, t5, reward, batch_at, validate, sampling, config, human_loss=None):
        self.policy = Policy(t5).eval().to(next(t5.parameters()).device)
        frozen = lambda: copy.deepcopy(t5).eval().requires_grad_(False)
        self.reference, self.average = frozen(), frozen() if config.average else t5
        self.reward, self.batch_at, self.validate, self.human_loss = (
            reward,
            batch_at,
            validate,
            human_loss,
        )
        self.sampling, self.config = sampling, config
        self.optimizers = make_optimizers(self.policy, unit=("relative_bias", "value_head"))
        self.kl_coef, self.moments = config.kl_coef, RunningMoments()

    def step(self, i):
        c, (source, index) = self.config, self.batch_at(i)
        r = rollout(self.policy, self.reference, self.reward, source, index, self.sampling)
        if not all(
            x.isfinite().all() for x in (r.scores, r.values, r.log_probs, r.ref_log_probs)
        ):
            return {"reward": r.scores.mean().item(), "skipped": 1.0}  # nothing to learn from
        self.moments.update(r.scores)  # 6. scores on one scale over the whole run
        scores = (r.scores - (self.moments.mean if c.normalise_scores else 0)) / (
            self.moments.std if c.scale_scores else 1
        )
        rewards = token_rewards(
            scores, r.log_probs, r.ref_log_probs, r.mask, self.kl_coef
        )  # 7.
        rewards = whiten(rewards, r.mask, shift_mean=False) if c.whiten_rewards else rewards
        advantages, returns = gae(rewards, r.values, r.mask, c.gamma, c.lam)  # 8.
        advantages = whiten(advantages, r.mask) if c.whiten_advantages else advantages
        set_lr(
            self.optimizers,
            c.lr * min((i + 1) / max(c.warmup, 1), 1 if c.average else 1 - i / c.steps),
            c.rms_scaled,
        )
        update = self.update(r, advantages, returns)  # 9.
        kl, k3 = (
            (kl_estimate(r.log_probs, r.ref_log_probs, k) * r.mask).sum(1).mean().item()
            for k in ("k1", "k3")
        )
        record = {
            "reward": r.scores.mean().item(),
            "kl": kl,
            "kl_k3": k3,
            "kl_coef": self.kl_coef,
            "length": r.mask.sum(1).float().mean().item(),
            "advantage_std": advantages[r.mask].std(correction=0).item(),
            "value_mean": r.values[r.mask].mean().item(),
            "return_mean": returns[r.mask].mean().item(),
            **update,
        }
        if c.adaptive_kl:  # 10.
            self.kl_coef = adapt_kl_coef(
                self.kl_coef, kl, c.kl_target, len(source), c.kl_horizon
            )
        if (i + 1) % c.eval_every == 0 or i + 1 == c.steps:
            record.update(self.validate(self.average))
        return record

    def update(self, r, advantages, returns):
        """ppo_epochs passes over one rollout. Returns the means of what was measured at each optimizer step;
        `first_ratio_error` is max |ratio - 1| before the first one, which tells that sampling and scoring agree: below 1e-5 in fp32,
        0.02 to 0.03 in bf16, whose passes round differently;
        `stopped_early` is 1 if the policy had moved by max_update_kl, `epochs` how many passes were made until then."""
        c, log, steps, ratio_errors = self.config, [], 0, []
        epochs = [
            torch.randperm(len(r.ids)).split(c.minibatch_size) for _ in range(c.ppo_epochs)
        ]
        for rows in itertools.chain(*epochs):
            tokens, measured = r.mask[rows].sum(), Counter()
            parts = rows.split(c.micro_batch or len(rows))
            if c.ptx_coef:
                measured["human_loss"] = self.human_gradient(r.index, parts)
            for part in parts:
                loss, seen, error = self.loss(r, part, advantages, returns)
                share = (
                    r.mask[part].sum() / tokens
                ).item()  # makes the parts' mean the minibatch's mean
                (loss * share).backward()
                measured.update({name: share * x for name, x in seen.items()})
                ratio_errors += [error] if not log else []
            log.append(measured)
            stop = measured["update_kl"] > c.max_update_kl
            if stop or measured["ratio"] > c.max_ratio:
                [x.zero_grad() for x in self.optimizers]
            else:
                measured["grad_norm"] = norm = optimizer_step(self.optimizers, c.max_grad_norm)
                if c.average:
                    torch._foreach_lerp_(
                        [*self.average.parameters()],
                        [p.data for p in self.policy.t5.parameters()],
                        1 - c.average,
                    )
                measured["skipped"] = float(not math.isfinite(norm))
                steps += math.isfinite(norm)
            if stop:
                break
        epochs_done = (len(log) - stop) / len(
            epochs[0]
        )  # what stopped them is not learnt from
        seen = {
            name: [m[name] for m in log if name in m] for name in itertools.chain(*log)
        }  # no grad_norm without a step
        means = {name: sum(xs) / len(xs) for name, xs in seen.items()}
        return {
            **means,
            "first_ratio_error": max(ratio_errors),
            "optimizer_steps": steps,
            "stopped_early": float(stop),
            "epochs": epochs_done,
        }

    def human_gradient(self, index, parts):
        """The gradient of ptx_coef times the human responses' mean negative log-likelihood a token, which is returned. It is
        divided by all tokens at the end: the parts' human responses have other shares of the tokens than the sampled ones."""
        total, tokens = 0.0, 0
        for part in parts:
            loss, count = self.human_loss(index[part])
            loss.backward()
            total, tokens = total + loss.item(), tokens + count
        gradients = [p.grad for p in self.policy.parameters() if p.grad is not None]
        torch._foreach_mul_(gradients, self.config.ptx_coef / tokens)
        return total / tokens

    def loss(self, r, rows, advantages, returns):
        """L = L_policy + value_coef L_value on some rows; also what is logged of it, and max |ratio - 1|."""
        c, width = (
            self.config,
            int(r.mask[rows].sum(1).max()),
        )  # shorter responses need fewer columns
        ids, mask, old = r.ids[rows, :width], r.mask[rows, :width], r.log_probs[rows, :width]
        log_probs, entropy, values = score(
            self.policy.t5,
            r.source[rows],
            ids,
            mask,
            r.support[rows, :width],
            self.sampling.temperature,
            self.policy.values,
        )
        pg_loss, clip_share = policy_loss(
            log_probs, old, advantages[rows, :width], mask, c.clip_range
        )
        v_loss = value_loss(
            values, r.values[rows, :width], returns[rows, :width], mask, c.value_clip_range
        )
        ratio = torch.exp(log_probs.detach() - old)
        measured = {
            "policy_loss": pg_loss,
            "value_loss": v_loss,
            "entropy": masked_mean(entropy, mask),
            "clip_share": clip_share,
            "ratio": masked_mean(ratio, mask),
            "update_kl": masked_mean(kl_estimate(old, log_probs, "k3"), mask),
        }
        return (
            pg_loss + c.value_coef * v_loss,
            {k: x.item() for k, x in measured.items()},
            ((ratio - 1).abs() * mask).max().item(),
        )

    def finish(self):  # the averaged weights are the result
        self.policy.t5.load_state_dict(self.average.state_dict())

    def state_dict(self):
        return {
            "policy": self.policy.state_dict(),
            "average": self.average.state_dict(),
            "kl_coef": self.kl_coef,
            "optimizers": [x.state_dict() for x in self.optimizers],
            "moments": vars(self.moments),
        }

    def load_state_dict(self, state):
        self.policy.load_state_dict(state["policy"])
        self.average.load_state_dict(state["average"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        self.kl_coef = state["kl_coef"]
        vars(self.moments).update(state["moments"])
