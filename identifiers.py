"""Empathy identifiers, the empathy reward, and the metrics that compare generated with target responses.

Source: EmpRL (arXiv 2408.02976), after EPITOME's bi-encoder (Sharma et al. 2020, arXiv 2009.08441). Legend: B batch,
S source (context) length, T response length, D model width, M = 3 mechanisms (emotional reaction ER, interpretation IP,
exploration EX), L = 3 levels (0 none, 1 weak, 2 strong). This file knows nothing of PPO."""

import itertools, math, re
from collections import Counter
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from t5_small import (
    Attention,
    Dropout,
    T5Encoder,
    TrainConfig,
    Trainer,
    autocast,
    padding_bias,
)

MECHANISMS, LEVELS = ("er", "ip", "ex"), 3


# ---- the identifier -------------------------------------------------------------------------------------------------
class Identifier(nn.Module):
    """(context, response) -> logits of the levels of `num_mechanisms` mechanisms.
    c = Encoder_c(context), r = Encoder_r(response)              two separate T5 encoders
    h = r + Dropout(Attention(query = r, key = value = c))       one head, the context's padding hidden
    logits = W_2 Dropout(tanh(W_1 mean_t h_t))                   mean over the response's tokens"""

    def __init__(self, config, num_mechanisms=1):
        super().__init__()
        d = config.d_model
        self.context_encoder, self.response_encoder = T5Encoder(config), T5Encoder(config)
        self.attention = Attention(replace(config, num_heads=1, d_kv=d))
        nn.init.normal_(
            self.attention.q.weight, std=1 / d
        )  # as T5: the usual 1/sqrt(d) is in q's start
        self.dropout = Dropout(config.dropout_rate)
        self.head = nn.Sequential(
            nn.Linear(d, d // 2),
            nn.Tanh(),
            Dropout(0.1),
            nn.Linear(d // 2, num_mechanisms * LEVELS),
        )

    def forward(self, context, response):
        """(B, S) and (B, T) ids, right-padded with 0 -> (B, num_mechanisms, L) logits."""
        c, r = (
            self.context_encoder.encode(context),
            self.response_encoder.encode(response),
        )  # (B, S, D), (B, T, D)
        h = r + self.dropout(
            self.attention(r, self.attention.keys_values(c), padding_bias(context))
        )
        return self.head(masked_mean(h, response != 0)).unflatten(-1, (-1, LEVELS))


def masked_mean(x, mask):
    """(B, T, D), (B, T) -> (B, D): the mean over the positions where mask is true."""
    weight = mask[:, :, None].to(x.dtype)  # (B, T, 1)
    return (x * weight).sum(1) / weight.sum(1)


@dataclass
class IdentifierConfig(TrainConfig):
    steps: int = 150
    batch_size: int = 64
    lr: float = 2e-2
    eval_every: int = 50
    shared: bool = (
        True  # one pair of encoders with three heads; off: the original's three pairs
    )
    class_weight: float = (
        0.5  # exponent of 1 / (share of the level) in the loss: 0 off, 1 fully balanced
    )
    start: str = (
        "sft"  # what the encoders are copies of: the MLE policy, or the "t5" it was made from
    )
    keep: str = "macro_f1"  # what the best state is chosen by: "macro_f1", or "loss" where probabilities count
    penalty: float = 2e-4  # of NGrams.fit
    ngrams: int = 0  # weights a level of `NGrams`, which reads better where labels are few; 0: the network


class NGrams(nn.Module):
    """Logistic regression on the 1- and 2-grams g of both sides' ids, hashed to `size` weights a level (fastText, Joulin et al.
    2017): logits = b + sum over the sides of scale sum_g w[side, g] / sqrt(number of g), with scale 0.3 for the context, 1 for the
    response. A gram counts once however often it occurs: a long response is no stronger than a short one for repeating itself."""

    def __init__(self, size):
        super().__init__()
        self.size, outputs = size, len(MECHANISMS) * LEVELS
        self.weight, self.bias = (
            nn.Parameter(torch.zeros(1 + size, outputs)),
            nn.Parameter(torch.zeros(outputs)),
        )

    def grams(self, ids, side):
        """(B, T) ids -> (B, 2 T - 1) hashes from 1 on, sorted, 0 in the place of padding and repetitions."""
        two = ((ids[:, :-1] + 1) * 1_000_003 + ids[:, 1:]).masked_fill(ids[:, 1:] == 0, 0)
        both = torch.cat([ids, two], 1)
        grams = (
            torch.where(both == 0, 0, 1 + (both * 2_654_435_761 + side) % self.size)
            .sort(1)
            .values
        )
        return torch.cat(
            [grams[:, :1], grams[:, 1:].masked_fill(grams[:, 1:] == grams[:, :-1], 0)], 1
        )

    def log_probs(self, *sides):
        """The grams of both sides -> (B, M, L) log-probabilities. Those that are 0 are dropped before the look-up, not looked up."""
        logits = self.bias
        for grams, scale in zip(sides, (0.3, 1.0)):
            count = (grams != 0).sum(1)
            total = F.embedding_bag(
                grams[grams != 0], self.weight, count.cumsum(0) - count, mode="sum"
            )  # (B, M L)
            logits = logits + scale * total / count.clamp(min=1).sqrt()[:, None]
        return logits.unflatten(-1, (-1, LEVELS)).log_softmax(-1)

    def forward(self, *sides):
        """(B, S), (B, T) ids -> (B, M, L) log-probabilities."""
        return self.log_probs(*(self.grams(ids, side) for side, ids in enumerate(sides)))

    def fit(self, train, weights, penalty):
        """The minimum of the weighted cross-entropy + penalty |w|^2 on all of `train`: a convex problem, so no validation. It is
        found when an iteration no longer changes the objective in fp32: after 50 iterations, or 130 where the penalty is small."""
        optimizer = torch.optim.LBFGS(
            self.requires_grad_().parameters(),
            max_iter=500,  # a cap, not what ends it
            tolerance_change=1e-9,
            line_search_fn="strong_wolfe",
        )
        sides = [
            self.grams(ids, side) for side, ids in enumerate(train.batch(range(len(train))))
        ]
        levels = train.levels.to(self.bias.device)

        def loss():
            optimizer.zero_grad()
            total = (
                identification_loss(self.log_probs(*sides), levels, weights) / len(levels)
                + penalty * self.weight.pow(2).sum()
            )
            total.backward()
            return total

        optimizer.step(loss)
        self.requires_grad_(False)


class Identifiers(nn.Module):
    """All three mechanisms: one Identifier with three heads (shared), or three of one head each; or, with `ngrams`, NGrams."""

    def __init__(self, config, shared=True, ngrams=0):
        super().__init__()
        self.config, self.ngrams = config, NGrams(ngrams) if ngrams else None
        self.towers = nn.ModuleList(
            []
            if ngrams
            else [Identifier(config, 3)]
            if shared
            else [Identifier(config) for _ in MECHANISMS]
        )

    def start_from(self, t5):
        """Copy a trained T5's embedding and encoder into every encoder."""
        for tower in self.towers:
            for encoder in (tower.context_encoder, tower.response_encoder):
                encoder.load_state_dict(t5.state_dict(), strict=False)

    def forward(self, context, response):
        """(B, S), (B, T) ids -> (B, M, L) log-probabilities of the levels."""
        if self.ngrams:
            return self.ngrams(context, response)
        with autocast(context.device):
            logits = torch.cat([tower(context, response) for tower in self.towers], 1)
        return logits.float().log_softmax(-1)


def class_weights(levels, exponent):
    """(N, M) levels -> (M, L) loss weights (1 / share)^exponent, of mean 1 over a mechanism's examples; an absent level counts as one."""
    counts = torch.stack([(levels == k).sum(0) for k in range(LEVELS)], 1).float()  # (M, L)
    weights = (len(levels) / counts.clamp(min=1)) ** exponent
    return weights / ((weights * counts).sum(1, keepdim=True) / len(levels))


def even(probs, share, exponent):
    """(N, M, L) probabilities of levels of (M, L) shares -> proportional to probs / share^exponent: above 0, rare levels count for more."""
    return F.normalize(probs / share**exponent, p=1, dim=-1)


def identification_loss(log_probs, levels, weights):
    """Weighted cross-entropy summed over a batch: (B, M, L), (B, M), (M, L) -> scalar."""
    return -(F.one_hot(levels, LEVELS) * weights * log_probs).sum()


def identifier_trainer(model, train, valid, rows_at, config):
    """A Trainer on labelled pairs: class-weighted cross-entropy; keeps what does best on `valid`.
    train, valid: anything with `len`, `.levels` (N, M) and `.batch(rows) -> (context ids, response ids)`."""
    weights = class_weights(train.levels, config.class_weight)
    if model.ngrams:
        model.ngrams.fit(train, weights.to(train.device), config.penalty)

    def loss_sum(rows):
        log_probs = model(*train.batch(rows))
        return identification_loss(
            log_probs, train.levels[rows].to(log_probs.device), weights.to(log_probs.device)
        ), len(rows)

    def validate():
        log_probs = predict(model, valid)
        loss = identification_loss(
            log_probs, valid.levels, torch.ones_like(weights)
        ).item() / len(valid)
        return (
            loss
            if config.keep == "loss"
            else -emp_f1(log_probs.argmax(-1), valid.levels, "macro_f1")
        )

    return Trainer(model, loss_sum, rows_at, validate, config)


@torch.no_grad()
def predict(identifiers, pairs, size=128):
    """The identifiers' log-probabilities on all pairs (see identifier_trainer), like lengths together: (N, M, L)."""
    log_probs = torch.zeros(len(pairs), len(MECHANISMS), LEVELS)
    for rows in pairs.chunks(size):
        log_probs[rows] = identifiers(*pairs.batch(rows)).cpu()
    return log_probs


def predict_levels(identifiers, pairs):
    """The likeliest levels, (N, M)."""
    return predict(identifiers, pairs).argmax(-1)


def identifier_scores(identifiers, pairs):
    """{er: {accuracy, macro_f1, weighted_f1, confusion}, ...} on labelled pairs."""
    levels = predict_levels(identifiers, pairs)
    tables = {m: confusion(levels[:, i], pairs.levels[:, i]) for i, m in enumerate(MECHANISMS)}
    return {
        m: {**{k: v.item() for k, v in f1_scores(t).items()}, "confusion": t.tolist()}
        for m, t in tables.items()
    }


# ---- the reward -----------------------------------------------------------------------------------------------------
def empathy_reward(log_probs, target, difference="cross_entropy", mechanisms="er,ip,ex"):
    """r = prod_m sum_l P_m(l) exp(-difference_m(l)), in (0, 1]. With certain target levels it is EmpRL's exp(-sum_m difference_m).
    log_probs: (B, M, L) of the generated response's levels. target: (B, M), the human response's levels, or (B, M, L), P of
    each level: then r is the expected reward over human responses, with far less noise (if P is right, and the M levels independent).
    "cross_entropy": -log p_m(target), so that r is the product of the targets' probabilities (the paper's).
    "ordinal": E_p |level - target|, which also says how far off a wrong level is.
    mechanisms: which of the three count, with commas; "": none, r = 1. Returns (B,). Raises ValueError on another difference."""
    probs, level = log_probs.exp(), torch.arange(LEVELS, device=log_probs.device)
    if difference == "cross_entropy":
        likeness = probs  # (B, M, L): exp(-d), each level the target
    elif difference == "ordinal":
        likeness = torch.exp(-probs @ (level[:, None] - level).abs().float())
    else:
        raise ValueError(f"difference {difference!r}: use cross_entropy or ordinal")
    certain = (
        target if target.dim() == 3 else (target[..., None] == level).float()
    )  # (B, M, L)
    return (
        (certain * likeness)
        .sum(-1)[:, [i for i, m in enumerate(MECHANISMS) if m in mechanisms.split(",")]]
        .prod(-1)
    )


def make_reward(identifiers, targets, **options):
    """reward(context ids, response ids, index) -> (B,), as ppo.py asks for it: it reads the sampled ids themselves. `index`
    names the training pairs, whose targets, (N, M) or (N, M, L), were found beforehand. options: empathy_reward's."""

    @torch.no_grad()
    def reward(context, response, index):
        return empathy_reward(
            identifiers(context, response), targets[index].to(context.device), **options
        )

    return reward


def best_of(identifiers, tries, expected, **options):
    """Of several tries (Pairs with the same contexts) for each context the response that promises most reward, where `expected`
    (N, M, L) is P(level | context): the rival of RL that trains nothing. Returns Pairs."""
    promised = torch.stack(
        [empathy_reward(predict(identifiers, one), expected, **options) for one in tries]
    )  # (tries, N)
    return tries[0].but(
        [tries[k].responses[i] for i, k in enumerate(promised.argmax(0).tolist())]
    )


# ---- metrics of levels ----------------------------------------------------------------------------------------------
def confusion(predicted, gold):
    """(N,), (N,) levels -> (L, L) counts, row = gold, column = predicted."""
    return torch.bincount(gold * LEVELS + predicted, minlength=LEVELS**2).view(LEVELS, LEVELS)


def f1_scores(counts):
    """Confusion counts (..., L, L) -> accuracy, macro-F1, weighted F1, each (...).
    F1_k = 2 TP_k / (predicted_k + gold_k), 0 where a level is neither; macro-F1 is the mean over the levels
    that occur in gold or prediction, weighted F1 the mean by the gold's share (as scikit-learn's). Rows are gold; 0 of nothing."""
    counts = counts.double()
    hit, gold, predicted = counts.diagonal(dim1=-2, dim2=-1), counts.sum(-1), counts.sum(-2)
    f1 = 2 * hit / (gold + predicted).clamp(min=1)
    present = (gold + predicted > 0).double()
    total = gold.sum(-1).clamp(min=1)
    return {
        "accuracy": hit.sum(-1) / total,
        "macro_f1": (f1 * present).sum(-1) / present.sum(-1).clamp(min=1),
        "weighted_f1": (f1 * gold).sum(-1) / total,
    }


def emp_f1(predicted, gold, kind="weighted_f1"):
    """Emp-F1: the mean over the mechanisms of the weighted (or macro) F1 between two (N, M) level tables."""
    counts = torch.stack(
        [confusion(predicted[:, m], gold[:, m]) for m in range(gold.shape[1])]
    )
    return f1_scores(counts)[kind].mean().item()


def information(counts):
    """I(row; column) in bits of tables of counts (..., L, L): (...). A level that never occurs adds nothing: 0 log 0 = 0."""
    joint = counts.double() / counts.sum((-2, -1), keepdim=True)
    independent = joint.sum(-1, keepdim=True) * joint.sum(-2, keepdim=True)
    return torch.where(joint > 0, joint * (joint / independent).log2(), 0).sum((-2, -1))


def mutual_information(predicted, gold):
    """Mean over the mechanisms of I(predicted; gold) in bits: what a constant policy gets none of."""
    return (
        sum(
            information(confusion(predicted[:, m], gold[:, m])).item()
            for m in range(gold.shape[1])
        )
        / gold.shape[1]
    )


def level_scores(predicted, gold):
    """Every figure that compares two (N, M) level tables; exact_match is the share with all three levels right."""
    return {
        "emp_f1": emp_f1(predicted, gold),
        "emp_macro_f1": emp_f1(predicted, gold, "macro_f1"),
        "mutual_information": mutual_information(predicted, gold),
        "exact_match": (predicted == gold).all(1).double().mean().item(),
        **{
            f"emp_f1_{m}": emp_f1(predicted[:, [i]], gold[:, [i]])
            for i, m in enumerate(MECHANISMS)
        },
    }


def ceiling(probs, gold, draws=50):
    """Emp-F1 with P(level | context) known, (N, M, L): of always giving the likeliest levels, and of sampling them."""
    probs, generator = torch.tensor(probs), torch.Generator().manual_seed(0)
    sampled = torch.multinomial(
        probs.view(-1, LEVELS), draws, replacement=True, generator=generator
    )  # (N * M, draws)
    ideal = sum(emp_f1(levels.view(gold.shape), gold) for levels in sampled.T) / draws
    return {
        "best": {"oracle_emp_f1": emp_f1(probs.argmax(-1), gold)},
        "mle_ideal": {"oracle_emp_f1": ideal},
    }


def paired_bootstrap(before, after, gold_before, gold_after, resamples=2000, seed=0):
    """Emp-F1 of two systems on the same N contexts: relative gain with a 95 % percentile interval.
    Every argument is an (N, M) table of levels; each system has its own gold. A resample draws contexts, the same for both.
    Returns {"relative", "low", "high"}: (after - before) / max(before, 1e-9). Efron & Tibshirani 1993, chapter 13."""
    n, mechanisms = gold_before.shape
    generator = torch.Generator().manual_seed(seed)

    def scores(predicted, gold, draws):
        """Emp-F1 of each resample: (R, N) indices of contexts -> (R,)."""
        cell = (gold * LEVELS + predicted)[draws] + LEVELS**2 * torch.arange(
            mechanisms
        )  # (R, N, M)
        one_hot = torch.zeros(len(draws), mechanisms * LEVELS**2)
        one_hot.scatter_add_(
            1,
            cell.flatten(1),
            torch.ones(cell[:, :, 0].numel() * mechanisms).view(len(draws), -1),
        )
        return f1_scores(one_hot.view(-1, mechanisms, LEVELS, LEVELS))["weighted_f1"].mean(
            -1
        )  # (R,)

    # The contexts as they are, then the resamples: in pieces, since all at once take 0.1 MB a context.
    few = max(1, 2**18 // n)
    sizes = [few] * (resamples // few) + [resamples % few] * (resamples % few > 0)
    pieces = itertools.chain(
        [torch.arange(n)[None]],
        (torch.randint(n, (size, n), generator=generator) for size in sizes),
    )
    old, new = map(
        torch.cat,
        zip(
            *(
                (scores(before, gold_before, draws), scores(after, gold_after, draws))
                for draws in pieces
            )
        ),
    )
    gain = (new - old) / old.clamp(min=1e-9)
    low, high = torch.quantile(
        gain[1:], torch.tensor([0.025, 0.975], dtype=gain.dtype)
    ).tolist()
    return {"relative": gain[0].item(), "low": low, "high": high}


# ---- metrics of text ------------------------------------------------------------------------------------------------
def words(text):
    """Lower-cased words and punctuation marks: what per-word figures count."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def text_scores(texts, references):
    """Figures of a list of responses; length is in words."""
    split = [words(t) for t in texts]
    return {
        "bleu": bleu(split, [words(t) for t in references]),
        "dist1": distinct(split, 1),
        "dist2": distinct(split, 2),
        "unique": len(set(texts)) / len(texts),
        "length": sum(map(len, split)) / len(split),
    }


def ngrams(words, n):
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def distinct(responses, n):
    """Dist-n x 100: different n-grams over all n-grams of the whole corpus (Li et al. 2016). Lists of words."""
    grams = [g for words in responses for g in ngrams(words, n)]
    return 100 * len(set(grams)) / max(len(grams), 1)


def bleu(responses, references):
    """Corpus BLEU-4 (Papineni et al. 2002), one reference each, lists of words; sacrebleu's exponential
    smoothing: the k-th order without a match counts 1 / 2^k of a match."""
    log_precision, halvings = 0.0, 0
    for n in range(1, 5):
        counts = [
            [Counter(ngrams(words, n)) for words in pair]
            for pair in zip(responses, references)
        ]
        match, total = (
            sum((a & b).total() for a, b in counts),
            sum(a.total() for a, _ in counts),
        )
        if total == 0 or (n == 1 and match == 0):
            return 0.0
        halvings += match == 0
        log_precision += math.log(match / total if match else 1 / (2**halvings * total)) / 4
    length, reference_length = sum(map(len, responses)), sum(map(len, references))
    return 100 * math.exp(log_precision + min(0.0, 1 - reference_length / length))


def table(header, rows):
    """Markdown, figures with three decimals."""
    rows = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(
        "| " + " | ".join(f"{x:.3f}" if isinstance(x, float) else str(x) for x in row) + " |"
        for row in rows
    )


def before_after(metrics):
    """The table of every figure before and after, floors and ceiling below; blank where there is none."""
    rows, columns = (
        [],
        [
            c
            for c in ("sft", "best_of_n", "emprl", "sft_greedy", "emprl_greedy")
            if c in metrics
        ],
    )
    for key in metrics["emprl"]:
        gain = metrics["gain"].get(key)
        rows.append(
            [
                key,
                *("" if metrics[c][key] is None else metrics[c][key] for c in columns),
                "{relative:+.1%} ({low:+.1%} to {high:+.1%})".format(**gain) if gain else "",
            ]
        )
    for kind in ("floors", "ceiling"):
        rows += [
            [f"{kind}: {name}, {key}", value, *[""] * len(columns)]
            for name, scores in metrics.get(kind, {}).items()
            for key, value in scores.items()
            if key.endswith("emp_f1")
        ]
    return table(["", *columns, "gain, 95 % interval"], rows)
