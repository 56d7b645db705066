"""Plausible wrong solutions of every graded function; test_coursework.py sees that all are caught.

Each is a pair of pieces: what stands in the project's own source, and what takes its place.
"""

WRONG = {
    "RMSNorm": [
        ("x = x.float()", "x = x.float() - x.float().mean(-1, keepdim=True)"),
        (".mean(-1, keepdim=True)", ".sum(-1, keepdim=True)"),
        (" + self.eps", ""),
        ("torch.rsqrt(mean_square", "torch.rsqrt(mean_square.detach()"),
        ("x = x.float()", "pass"),
    ],
    "padding_bias": [
        ("ids == pad_id", "ids != pad_id"),
        ("[:, None, None, :]", "[:, None, :]"),
        ("* HIDDEN", "* -1.0"),
        ("ids == pad_id", "ids == PAD_ID"),
        (
            "(ids == pad_id)[:, None, None, :] * HIDDEN",
            "torch.zeros(ids.shape).masked_fill(ids == pad_id, -math.inf)[:, None, None, :]",
        ),
    ],
    "Attention": [
        (".transpose(-1, -2) + bias", ".transpose(-1, -2) / self.d_kv ** 0.5 + bias"),
        ("dim=-1)", "dim=-2)"),
        (".transpose(-1, -2) + bias", ".transpose(-1, -2)"),
        ("F.softmax(scores.float(), dim=-1)", "F.softmax(scores.float(), dim=-1).detach()"),
        ("self.dropout(self.weights(x, keys, bias))", "self.weights(x, keys, bias)"),
        (
            "self.dropout(self.weights(x, keys, bias))",
            "F.softmax(self.dropout(self.weights(x, keys, bias).log()), -1)",
        ),
    ],
    "relative_position_bucket": [
        ("relative_position > 0", "relative_position >= 0"),
        ("(-relative_position).clamp", "relative_position.clamp"),
        ("num_buckets = num_buckets // 2", "num_buckets = num_buckets // 1"),
    ],
    "response_mask": [
        ("return ended_before == 0", "return (ids != eos_id) & (ended_before == 0)"),
        ("is_eos.cumsum(1) - is_eos", "is_eos.cumsum(1)"),
        ("return ended_before == 0", "return ids != 0"),
    ],
    "span_corrupt": [
        ("[*ids[end:], eos_id]", "[eos_id]"),
        ("[sentinels[len(spans)], eos_id]", "[eos_id]"),
        ("end = start + length", "end = start + length + 1"),
        ("[*ids[end:], eos_id]", "[*ids[end:], 1]"),
        ("[sentinels[len(spans)], eos_id]", "[sentinels[len(spans)], 1]"),
        ("source = []", "source = []\n    ids[:] = ids[:-1] + [0]"),
    ],
    "filter_logits": [
        ("mass_before >= top_p", "mass_before + probs >= top_p"),
        ("if top_p < 1:", "if False:"),
        ("logits < kth", "logits <= kth"),
        ("logits = logits.masked_fill(drop", "logits = logits.masked_fill_(drop"),
        ("probs = ordered.softmax(-1)", "probs = ordered.exp()"),
    ],
    "mean_pool": [
        ("weight.sum(1)", "weight.shape[1]"),
        ("(x * weight).sum(1)", "x.sum(1)"),
        ("(x * weight).sum(1) / weight.sum(1)", "x.mean(1)"),
    ],
    "class_weights": [
        ("** exponent", "* exponent"),
        ("(len(levels) / counts.clamp(min=1))", "(counts.clamp(min=1) / len(levels))"),
        ("return weights / mean", "return weights"),
        ("clamp(min=1)", "clamp(min=1e-9)"),
    ],
    "empathy_reward": [
        ("earned = probs\n", "earned = log_probs\n"),
        (".prod(-1)", ".sum(-1)"),
        (".abs()", ""),
        ("F.one_hot(target, LEVELS)", "(1 - F.one_hot(target, LEVELS))"),
    ],
    "f1_scores": [
        ("(f1 * gold).sum(-1) / total", "f1.mean(-1)"),
        ("2 * hits", "hits"),
        ("counts.sum(-1)", "counts.sum(-2)"),
        ("counts.diagonal(dim1=-2, dim2=-1)", "counts.diagonal()"),
        ("total = gold.sum(-1).clamp(min=1)", "total = gold.sum(-1)"),
    ],
    "emp_f1": [
        ("confusions(predicted, gold)", "confusions(gold, predicted)"),
        ("[kind]", '["accuracy"]'),
        (".mean().item()", ".max().item()"),
    ],
    "paired_bootstrap": [
        ("(new - old) / old.clamp(min=1e-9)", "new - old"),
        ("[0.025, 0.975]", "[0.25, 0.75]"),
        ("gold_after, times)", "gold_after, times).roll(1)"),
        ("[0.025, 0.975]", "[0.05, 0.95]"),
        (
            '"low": low, "high": high',
            '"low": 2 * observed.item() - high, "high": 2 * observed.item() - low',
        ),
        (
            "low, high = torch.cat(gains).quantile(bounds).tolist()",
            "gains, z = torch.cat(gains), torch.tensor([-1.96, 1.96])\n"
            "    low, high = (gains.mean() + gains.std() * z).tolist()",
        ),
        (
            "(new - old) / old.clamp(min=1e-9)",
            "(new - old) / weighted_emp_f1(before, gold_before, torch.ones(1, contexts))",
        ),
        ("torch.Generator().manual_seed(seed)", "torch.manual_seed(seed)"),
    ],
    "token_log_probs": [
        ("logits.float() / temperature", "logits.float()"),
        ("masked_fill(~support", "masked_fill(support"),
        ("-(logits.softmax(-1) * log_probs)", "(logits.softmax(-1) * log_probs)"),
        (
            "return log_probs.gather",
            "log_probs = log_probs.detach()\n    return log_probs.gather",
        ),
    ],
    "kl_estimate": [
        ("log_probs - ref_log_probs", "ref_log_probs - log_probs"),
        ("torch.exp(-difference) - 1 + difference", "difference**2 / 2"),
        ("torch.exp(-difference) - 1 + difference", "torch.exp(difference) - 1 - difference"),
    ],
    "token_rewards": [
        ("-kl_coef * kl", "kl_coef * kl"),
        ("mask.sum(1) - 1", "mask.sum(1) * 0 + mask.shape[1] - 1"),
        (" * mask\n", "\n"),
        ("-kl_coef * kl * mask", "kl.mul_(-kl_coef).mul_(mask)"),
    ],
    "gae": [
        ("gamma * lam *", "gamma *"),
        (
            "(delta + gamma * lam * next_advantage) * mask[:, t]",
            "delta + gamma * lam * next_advantage",
        ),
        ("advantages + values", "advantages"),
        ("values = values * mask", "values *= mask"),
    ],
    "whiten": [
        ("mean = masked_mean(x, mask)", "mean = x.mean()"),
        ("(mask.sum() - 1)", "mask.numel()"),
        ("whitened + mean", "whitened"),
        ("(x - mean) * torch.rsqrt", "x.sub_(mean) * torch.rsqrt"),
    ],
    "policy_loss": [
        ("torch.max(plain, clipped)", "torch.min(plain, clipped)"),
        ("log_probs - old_log_probs", "old_log_probs - log_probs"),
        ("1 - clip_range, 1 + clip_range", "-clip_range, clip_range"),
        ("torch.exp(log_probs", "torch.exp(log_probs.detach()"),
    ],
    "value_loss": [
        ("torch.max((values", "torch.min((values"),
        ("0.5 * ", ""),
        ("old_values + clip_range", "returns + clip_range"),
        (
            "old_values - clip_range, old_values + clip_range",
            "old_values - 0.2, old_values + 0.2",
        ),
    ],
    "adapt_kl_coef": [
        ("kl / target - 1", "target / kl - 1"),
        ("* batch_size / horizon", "/ horizon"),
        ("-0.2), 0.2)", "-2.0), 2.0)"),
    ],
    "Block": [
        ("x = x + self.dropout(self.self_attn(h", "x = h + self.dropout(self.self_attn(h"),
        ("h = self.cross_norm(x)", "h = x"),
        (
            "self.cross_attn.keys_values(memory)",
            "self.cross_attn.keys_values(self.cross_norm(memory))",
        ),
        ("return x + self.dropout(self.ff(h))", "return x + self.ff(h)"),
        ("keys_values = cache.append(*keys_values)", "cache.append(*keys_values)"),
    ],
    "draw": [
        (
            "filter_logits(logits / sampling.temperature, sampling.top_k, sampling.top_p)",
            "filter_logits(logits, sampling.top_k, sampling.top_p) / sampling.temperature",
        ),
        ("log_probs.argmax", "log_probs.argmin"),
        ("logits.log_softmax(-1)", "(logits * sampling.temperature).log_softmax(-1)"),
        ("log_probs > -torch.inf", "logits <= 0"),
    ],
    "PPOTrainer": [
        (
            "kl = kl_estimate(batch.log_probs, batch.ref_log_probs)",
            "kl = kl_estimate(batch.ref_log_probs, batch.log_probs)",
        ),
        (
            "batch.advantages, batch.returns = advantages, returns",
            "batch.advantages, batch.returns = advantages, advantages + batch.values",
        ),
        ("self.scaled(batch.rewards)", "batch.rewards"),
        ("config.value_coef * value_part", "value_part"),
        ("mask, GAMMA, config.lam)", "mask)"),
        (
            "log_probs, part.log_probs, part.advantages",
            "log_probs, log_probs.detach(), part.advantages",
        ),
    ],
}
