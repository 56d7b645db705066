"""Plausible wrong solutions of every graded function; test_coursework.py sees that all are caught.

Each is a pair of pieces: what stands in the project's own source, and what takes its place.
"""

WRONG = {
    "RMSNorm": [
        ("x = x.float()", "x = x.float() - x.float().mean(-1, keepdim=True)"),
        (".mean(-1, keepdim=True)", ".sum(-1, keepdim=True)"),
        (" + self.eps", ""),
    ],
    "padding_bias": [
        ("ids == pad_id", "ids != pad_id"),
        ("[:, None, None, :]", "[:, None, :]"),
        ("* HIDDEN", "* -1.0"),
    ],
    "Attention": [
        (".transpose(-1, -2) + bias", ".transpose(-1, -2) / self.d_kv ** 0.5 + bias"),
        ("dim=-1)", "dim=-2)"),
        (".transpose(-1, -2) + bias", ".transpose(-1, -2)"),
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
    ],
    "filter_logits": [
        ("mass_before >= top_p", "mass_before + probs >= top_p"),
        ("if top_p < 1:", "if False:"),
        ("logits < kth", "logits <= kth"),
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
    ],
    "token_log_probs": [
        ("logits.float() / temperature", "logits.float()"),
        ("masked_fill(~support", "masked_fill(support"),
        ("-(logits.softmax(-1) * log_probs)", "(logits.softmax(-1) * log_probs)"),
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
    ],
    "gae": [
        ("gamma * lam *", "gamma *"),
        (
            "(delta + gamma * lam * next_advantage) * mask[:, t]",
            "delta + gamma * lam * next_advantage",
        ),
        ("advantages + values", "advantages"),
    ],
    "whiten": [
        ("mean = masked_mean(x, mask)", "mean = x.mean()"),
        ("(mask.sum() - 1)", "mask.numel()"),
        ("whitened + mean", "whitened"),
    ],
    "policy_loss": [
        ("torch.max(plain, clipped)", "torch.min(plain, clipped)"),
        ("log_probs - old_log_probs", "old_log_probs - log_probs"),
        ("1 - clip_range, 1 + clip_range", "-clip_range, clip_range"),
    ],
    "value_loss": [
        ("torch.max((values", "torch.min((values"),
        ("0.5 * ", ""),
        ("old_values + clip_range", "returns + clip_range"),
    ],
    "adapt_kl_coef": [
        ("kl / target - 1", "target / kl - 1"),
        ("* batch_size / horizon", "/ horizon"),
        ("-0.2), 0.2)", "-2.0), 2.0)"),
    ],
}
