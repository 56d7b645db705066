"""Empathy: classifiers of its levels, the reward built on them, and measures.

    a classifier        (context ids, response ids) -> log-probabilities of the levels
    its training        class-weighted cross-entropy
    the reward          how close a response's levels are to those aimed for
    measures of levels  Emp-F1, mutual information, the bootstrap
    measures of text    Dist-n, BLEU
    n-grams             the other classifier, for when labels are few; skip it at first reading

A response shows empathy by three mechanisms, each with a level: 0 none, 1 weak, 2 strong.

    er  emotional reaction  "I am so sorry."
    ip  interpretation      "You must feel lonely."
    ex  exploration         "What happened exactly?"

Emp-F1 compares the levels of replies with those of the human responses: the weighted F1 over
the levels of each mechanism, averaged over the three.

The classifier that gives the reward is called the *identifiers*, as in the paper. The *judge*
is another, for evaluation only. The *context classifier* is of the same class, but trained
with empty responses (only </s>): it predicts P(level | context). All learn from `Pairs`
(data.py):

    batch(rows)                padded ids of the pairs with these indices, such as [7, 2]:
                               contexts (B, S), responses (B, T)
    chunks(size)               all rows, by length, in lists of at most `size`
    levels                     (N, M), those of the responses
    with_responses(responses, levels=None)   the same contexts with these; None: unknown

Shapes: B batch, N all pairs, S context length, T response length, D model width, M = 3
mechanisms, L = 3 levels. PPO calls EmpathyReward; nothing here depends on how PPO learns.
Sources: EmpRL (arXiv 2408.02976), and EPITOME for the bi-encoder (Sharma et al. 2020, arXiv
2009.08441).
"""

import math
import re
from collections import Counter
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import LEVELS, MECHANISMS
from t5_small import (
    PAD_ID,
    Attention,
    Dropout,
    T5Encoder,
    TrainConfig,
    Trainer,
    autocast,
    option,
    padding_bias,
)


@dataclass
class ClassifierConfig(TrainConfig):
    """TrainConfig with other defaults, and what kind of classifier is trained."""

    steps: int = option(150, "optimizer steps of the network")
    batch_size: int = option(64, "labelled pairs a step", 1, 10**6)
    lr: float = option(
        2e-2, "learning rate, relative to each tensor's RMS if rms_scaled", high=10
    )
    eval_every: int = option(50, "steps between validations; the best weights are kept", low=1)
    kind: str = option("network", "the type of classifier", choices=("network", "ngrams"))
    shared: bool = option(True, "one network with an output for each mechanism; off: three")
    class_weight: float = option(
        0.5, "a level's weight in the loss: 1 / its share, to this power", high=2
    )
    penalty: float = option(2e-4, "n-grams: weight of the squared norm", high=1)
    size: int = option(65536, "n-grams: rows of the weight table", 1, 10**8)
    # A network's encoders start as copies of the T5's after MLE ("mle") or before it ("t5").
    start: str = "mle"
    keep: str = "macro_f1"  # the validation score that selects weights: "macro_f1" or "loss"


# ---- a classifier ---------------------------------------------------------------------------


def mean_pool(x, mask):
    """The mean over the positions where mask is true: (B, T, D), (B, T) -> (B, D)."""
    weight = mask[:, :, None].to(x.dtype)  # (B, T, 1)
    return (x * weight).sum(1) / weight.sum(1)


class BiEncoder(nn.Module):
    """Logits of the levels of one mechanism, or of several:

    c = Encoder_c(context)                                   (B, S, D)
    r = Encoder_r(response)                                  (B, T, D), another T5 encoder
    h = r + dropout(attention(query r, keys and values c))   one head, padding hidden
    logits = W_2 dropout(tanh(W_1 mean_t h_t))               a mean over the response's tokens
    """

    def __init__(self, config, num_mechanisms):
        super().__init__()
        width = config.d_model
        self.context_encoder = T5Encoder(config)
        self.response_encoder = T5Encoder(config)
        self.attention = Attention(replace(config, num_heads=1, d_kv=width))
        # T5Encoder.initialise does not reach this attention. T5 does not divide scores by
        # sqrt(d_kv): q's std, (d_model d_kv)^(-1/2), makes up for it. Here d_kv = d_model.
        nn.init.normal_(self.attention.q.weight, std=1 / width)
        self.dropout = Dropout(config.dropout_rate)
        self.head = nn.Sequential(
            nn.Linear(width, width // 2),
            nn.Tanh(),
            Dropout(0.1),  # as in EPITOME's head, whatever dropout_rate is
            nn.Linear(width // 2, num_mechanisms * LEVELS),
        )

    def forward(self, context, response):
        """(B, S) and (B, T) ids -> (B, num_mechanisms, L) logits."""
        c = self.context_encoder.encode(context)
        r = self.response_encoder.encode(response)
        attended = self.attention(r, self.attention.keys_values(c), padding_bias(context))
        h = r + self.dropout(attended)  # (B, T, D)
        logits = self.head(mean_pool(h, response != PAD_ID))
        return logits.unflatten(-1, (-1, LEVELS))


class NetworkClassifier(nn.Module):
    """One bi-encoder with an output for each mechanism (shared), or a bi-encoder for each."""

    def __init__(self, bi_encoders, columns):
        """columns: the numbers of the mechanisms that it predicts."""
        super().__init__()
        self.encoders = nn.ModuleList(bi_encoders)
        self.columns = columns

    def forward(self, context, response):
        """(B, S) and (B, T) ids, right-padded with 0 -> (B, M, L) log-probabilities."""
        with autocast(context.device):
            logits = [encoder(context, response) for encoder in self.encoders]
        return torch.cat(logits, 1).float().log_softmax(-1)

    def parts(self, name):
        """{name of a training stage: the module to train in it}: itself, or each bi-encoder.

        The three share no weights; one at a time needs a third of the gradients' memory.
        """
        if len(self.encoders) == 1:
            return {name: self}
        parts = {}
        for i, mechanism in enumerate(MECHANISMS):
            parts[f"{name}-{mechanism}"] = NetworkClassifier([self.encoders[i]], [i])
        return parts

    def trainer(self, train, valid, rows_at, config):
        """A Trainer of it on labelled pairs. rows_at: step -> rows of train."""
        # The same pairs, with the levels of its own mechanisms only.
        train = train.with_responses(train.responses, train.levels[:, self.columns])
        valid = valid.with_responses(valid.responses, valid.levels[:, self.columns])
        weights = class_weights(train.levels, config.class_weight).to(train.device)

        def loss_sum(rows):  # -> (sum of losses, number of pairs)
            log_probs = self(*train.batch(rows))
            levels = train.levels[rows].to(log_probs.device)
            return classification_loss(log_probs, levels, weights), len(rows)

        def validate():  # the Trainer calls eval() before
            return validation_loss(self, valid, config.keep)

        return Trainer(self, loss_sum, rows_at, validate, config)


def make_classifier(t5, config):
    """The classifier that config.kind names; n-grams stand last in this file.

    Every encoder of a network starts as a copy of t5's, a trained T5.
    """
    if config.kind == "ngrams":
        return NGramClassifier(config)
    columns = list(range(len(MECHANISMS)))
    if config.shared:
        bi_encoders = [BiEncoder(t5.config, len(MECHANISMS))]
    else:
        bi_encoders = [BiEncoder(t5.config, 1) for _ in MECHANISMS]
    for bi_encoder in bi_encoders:  # strict=False: t5's decoder has no place here
        bi_encoder.context_encoder.load_state_dict(t5.state_dict(), strict=False)
        bi_encoder.response_encoder.load_state_dict(t5.state_dict(), strict=False)
    return NetworkClassifier(bi_encoders, columns)


# ---- its training ---------------------------------------------------------------------------


def class_weights(levels, exponent):
    """(1 / share of the level)^exponent, scaled so that its mean over the examples is 1.

    levels: (N, M). Returns (M, L). A level that never occurs counts as if it occurred once.
    """
    counts = torch.stack([(levels == k).sum(0) for k in range(LEVELS)], 1).float()  # (M, L)
    weights = (len(levels) / counts.clamp(min=1)) ** exponent
    mean = (weights * counts).sum(1, keepdim=True) / len(levels)
    return weights / mean


def classification_loss(log_probs, levels, weights):
    """Weighted cross-entropy, summed over a batch: (B, M, L), (B, M), (M, L) -> scalar."""
    return -(F.one_hot(levels, LEVELS) * weights * log_probs).sum()


def validation_loss(classifier, valid, keep):
    """Lower is better: minus macro-F1 (keep = "macro_f1") or the plain cross-entropy ("loss").

    Macro-F1, because in it a rare level counts as much as a common one.
    """
    log_probs = predict(classifier, valid)
    if keep == "macro_f1":
        return -emp_f1(log_probs.argmax(-1), valid.levels, "macro_f1")
    plain = torch.ones_like(log_probs[0])  # (M, L)
    return classification_loss(log_probs, valid.levels, plain).item() / len(valid)


@torch.no_grad()
def predict(classifier, pairs, size=32):
    """A classifier's log-probabilities on all pairs: (N, M, L), on the CPU.

    Call classifier.eval() first: in training mode there would be dropout. A classifier that is
    kept on the CPU is moved to the pairs' device for the call, and back afterwards.
    size: pairs at a time. More need more memory, and are no faster on a CPU.
    """
    home = next(classifier.parameters()).device
    classifier.to(pairs.device)
    rows, found = [], []
    for chunk in pairs.chunks(size):
        rows += chunk
        found.append(classifier(*pairs.batch(chunk)).cpu())
    classifier.to(home)
    # Result j is that of pair rows[j]; argsort gives the inverse order, that of the pairs.
    return torch.cat(found)[torch.tensor(rows).argsort()]


def predict_levels(classifier, pairs):
    """The likeliest levels, (N, M)."""
    return predict(classifier, pairs).argmax(-1)


# ---- the reward -----------------------------------------------------------------------------


@dataclass
class RewardConfig:
    difference: str = option(
        "cross_entropy", "distance to the target levels", choices=("cross_entropy", "ordinal")
    )
    mechanisms: str = option(
        "er,ip,ex",
        "the mechanisms that count",
        choices=("er", "ip", "ex", "er,ip", "er,ex", "ip,ex", "er,ip,ex"),
    )
    target: str = option(
        "expected",
        "the levels to aim for: their probabilities given the context, only the likeliest, or "
        "those of the one human response (the paper's)",
        choices=("expected", "likeliest", "human"),
    )
    balance: float = option(0.0, "above 0: rare levels count for more", high=2)


def empathy_reward(log_probs, target, difference="cross_entropy", mechanisms=MECHANISMS):
    """How close a response's levels are to those aimed for, in (0, 1].

    p_m(l): the identifiers' probability that the generated response has level l (mechanism m).
    d_m(l): how far the response is from level l.
    P_m(l): the probability that the human response has level l, given the context.

    One mechanism, level l of the human response known:  r = exp(-d(l)); p(l) if d = -log p
    Several mechanisms, the paper's:                     r = exp(-sum_m d_m) = prod_m exp(-d_m)
    Level uncertain, l with probability P(l):            r = prod_m sum_l P_m(l) exp(-d_m(l))

    The last is the expectation of the line above over the human's levels, if these are
    independent given the context (assumed). It is less noisy than one human's levels. With
    d = -log p the response that earns most has the likeliest level of each mechanism.

    log_probs:  (B, M, L), log p of the levels of the generated response, by the identifiers.
    target:     (B, M), the levels of the human response, by the identifiers; or (B, M, L),
                their probabilities P.
    difference: d_m(l) is "cross_entropy", -log p_m(l), the paper's; or "ordinal",
                E_p |level - l|, in which two levels off cost more than one.
    mechanisms: the names of those that count.
    Returns (B,). Raises ValueError on another difference.
    """
    probs = log_probs.exp()  # (B, M, L)

    # exp(-d_m(l)): what the response earns if l is the level of the human one.
    if difference == "cross_entropy":  # exp(-d) = exp(log p) = p
        earned = probs
    elif difference == "ordinal":
        levels = torch.arange(LEVELS, device=probs.device)
        distance = (levels[:, None] - levels).abs().float()  # (L, L)
        earned = torch.exp(-probs @ distance)
    else:
        raise ValueError(f"difference {difference!r}: use cross_entropy or ordinal")

    if target.dim() == 2:
        target = F.one_hot(target, LEVELS).float()  # certain: all weight on one level
    reward = (target * earned).sum(-1)  # (B, M)

    counted = [i for i, name in enumerate(MECHANISMS) if name in mechanisms]
    return reward[:, counted].prod(-1)


def balanced(probs, share, exponent):
    """P(l) / share(l)^exponent, normalised: an exponent above 0 favours rare levels.

    probs: (N, M, L). share: (M, L), the mean P(l) over the training contexts; a 0, from a
    context classifier that has diverged, counts as a very small one. Returns (N, M, L).
    """
    share = share.clamp(min=1e-12)
    return F.normalize(probs / share**exponent, p=1, dim=-1)  # p=1: divided by their sum


def targets_from_contexts(config, probs, share):
    """The levels to aim for, predicted from the context alone: (N, M, L) from probs (N, M, L).

    With target "human" PPO aims for the levels of the human response instead. Best of n must
    not see that response: it aims for the probabilities returned here, as with "expected".
    """
    probs = balanced(probs, share, config.balance)
    if config.target == "likeliest":
        return F.one_hot(probs.argmax(-1), LEVELS).float()
    return probs


class EmpathyReward:
    """(context ids, response ids, targets) -> rewards, as ppo.py calls it.

    It reads the sampled ids themselves, not text. The identifiers must be in eval mode.
    """

    def __init__(self, identifiers, config):
        self.identifiers = identifiers
        self.difference = config.difference
        self.mechanisms = config.mechanisms.split(",")

    @torch.no_grad()
    def __call__(self, context, response, targets):
        """(B, S) and (B, T) ids, targets (B, M) or (B, M, L) -> (B,)."""
        log_probs = self.identifiers(context, response)
        return self.of(log_probs, targets)

    def of(self, log_probs, targets):
        """The same from the identifiers' log-probabilities, (B, M, L)."""
        return empathy_reward(log_probs, targets, self.difference, self.mechanisms)

    def best_of(self, tries, targets):
        """Best of n, a baseline without training: for each context the best of n responses.

        tries: n Pairs with the same contexts and different responses. Returns Pairs, with the
        responses of highest reward.
        """
        rewards = [self.of(predict(self.identifiers, one), targets) for one in tries]
        chosen = torch.stack(rewards).argmax(0).tolist()  # (N,) the number of a try
        responses = [tries[k].responses[i] for i, k in enumerate(chosen)]
        return tries[0].with_responses(responses)


# ---- measures of levels ---------------------------------------------------------------------


def confusions(predicted, gold):
    """(N, M), (N, M) levels -> (M, L, L) counts; rows are gold, columns predicted.

    Give it the whole corpus: the corpus's F1 is not the mean of its batches' F1s.
    """
    cells = F.one_hot(gold * LEVELS + predicted, LEVELS**2)  # (N, M, L * L)
    return cells.sum(0).unflatten(-1, (LEVELS, LEVELS))


def f1_scores(counts):
    """Accuracy, macro-F1 and weighted F1 of counts (..., L, L), rows gold; each (...).

    F1_k = 2 TP_k / (predicted_k + gold_k); 0 for a level neither predicted nor in gold.
    macro_f1:    the mean of F1_k over the levels that occur in gold or prediction.
    weighted_f1: the mean of F1_k over all levels, weighted by their shares of the gold.
    Both as scikit-learn's. If all counts are 0, so is every figure.
    """
    counts = counts.double()
    hits = counts.diagonal(dim1=-2, dim2=-1)  # (..., L)
    gold = counts.sum(-1)
    predicted = counts.sum(-2)
    f1 = 2 * hits / (gold + predicted).clamp(min=1)
    occurs = (gold + predicted > 0).double()
    total = gold.sum(-1).clamp(min=1)  # (...)
    return {
        "accuracy": hits.sum(-1) / total,
        "macro_f1": (f1 * occurs).sum(-1) / occurs.sum(-1).clamp(min=1),
        "weighted_f1": (f1 * gold).sum(-1) / total,
    }


def emp_f1(predicted, gold, kind="weighted_f1"):
    """One of f1_scores, averaged over the mechanisms; weighted_f1 is Emp-F1.

    predicted, gold: levels, (N, M) each. kind: "weighted_f1", "macro_f1" or "accuracy".
    """
    return f1_scores(confusions(predicted, gold))[kind].mean().item()


def mutual_information(counts):
    """I(row; column) in bits: counts (..., L, L) -> (...). 0 if either is constant."""
    joint = counts.double() / counts.sum((-2, -1), keepdim=True)
    independent = joint.sum(-1, keepdim=True) * joint.sum(-2, keepdim=True)
    bits = joint * (joint / independent).log2()
    return torch.where(joint > 0, bits, 0).sum((-2, -1))  # 0 log 0 = 0


def compare_levels(predicted, gold):
    """All figures that compare the levels of replies with the humans' levels, (N, M) each."""
    figures = {
        "emp_f1": emp_f1(predicted, gold),
        "emp_macro_f1": emp_f1(predicted, gold, "macro_f1"),
        "mutual_information": mutual_information(confusions(predicted, gold)).mean().item(),
        "exact_match": (predicted == gold).all(1).double().mean().item(),
    }
    for m, name in enumerate(MECHANISMS):
        figures[f"emp_f1_{name}"] = emp_f1(predicted[:, [m]], gold[:, [m]])
    return figures


def classifier_figures(classifier, pairs):
    """{"er": {"accuracy", "macro_f1", "weighted_f1", "confusion"}, ...} on labelled pairs."""
    tables = confusions(predict_levels(classifier, pairs), pairs.levels)
    figures = {}
    for name, table in zip(MECHANISMS, tables):
        figures[name] = {kind: score.item() for kind, score in f1_scores(table).items()}
        figures[name]["confusion"] = table.tolist()
    return figures


def ceiling(probs, gold, draws=50):
    """The Emp-F1 of levels predicted from the context alone: a yardstick, not a strict bound.

    probs: (N, M, L), P(level | context). gold: (N, M).

    best:      always giving the likeliest level. That is best for accuracy; F1 can be higher.
    mle_ideal: sampling from P, as a perfect MLE model does; a mean over `draws` samples.
    """
    generator = torch.Generator().manual_seed(0)
    flat = probs.view(-1, LEVELS)  # (N * M, L)
    sampled = torch.multinomial(flat, draws, replacement=True, generator=generator)
    # sampled is (N * M, draws): each column is one draw of all levels
    scores = [emp_f1(levels.view(gold.shape), gold) for levels in sampled.T]
    return {"best": emp_f1(probs.argmax(-1), gold), "mle_ideal": sum(scores) / draws}


def paired_bootstrap(before, after, gold_before, gold_after, resamples=2000, seed=0):
    """The relative gain in Emp-F1 of one system over another, with a 95 % percentile interval.

    Every table of levels is (N, M), on the same N contexts. A resample draws N contexts with
    replacement, the same for both systems. Gold: the levels that a classifier gives to the
    human responses. Systems of two runs, with different classifiers, have different golds;
    those of one run have the same.
    Returns {"relative", "low", "high"} of (new - old) / max(old, 1e-9), in Emp-F1.
    Source: Efron & Tibshirani 1993, chapter 13.
    """

    def gain(times):
        old = weighted_emp_f1(before, gold_before, times)
        new = weighted_emp_f1(after, gold_after, times)
        return (new - old) / old.clamp(min=1e-9)

    contexts = len(before)
    generator = torch.Generator().manual_seed(seed)
    gains = []
    size = max(1, 2**18 // contexts)  # resamples at once; this bounds the memory
    for start in range(0, resamples, size):
        count = min(size, resamples - start)
        drawn = torch.randint(contexts, (count, contexts), generator=generator)
        times = torch.zeros(count, contexts)  # how often each resample drew each context
        times.scatter_add_(1, drawn, torch.ones(count, contexts))
        gains.append(gain(times))
    bounds = torch.tensor([0.025, 0.975], dtype=torch.double)
    low, high = torch.cat(gains).quantile(bounds).tolist()
    observed = gain(torch.ones(1, contexts))
    return {"relative": observed.item(), "low": low, "high": high}


def weighted_emp_f1(predicted, gold, times, kind="weighted_f1"):
    """emp_f1 in each of R resamples: (N, M), (N, M), (R, N) -> (R,).

    Context n counts times[r, n] times in resample r, also in the shares of the gold levels.
    """
    cells = F.one_hot(gold * LEVELS + predicted, LEVELS**2).float()  # (N, M, L * L)
    counts = torch.einsum("rn,nmc->rmc", times, cells)
    counts = counts.unflatten(-1, (LEVELS, LEVELS))  # (R, M, L, L), rows gold
    return f1_scores(counts)[kind].mean(-1)


# ---- measures of text -----------------------------------------------------------------------


def words(text):
    """What counts as a word in all figures: words and punctuation marks, in lower case."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def ngrams(tokens, n):
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def distinct(responses, n):
    """Dist-n x 100: different n-grams over all n-grams, of a whole corpus (Li et al. 2016).

    responses: lists of words.
    """
    seen, total = set(), 0
    for response in responses:
        grams = ngrams(response, n)
        seen.update(grams)
        total += len(grams)
    return 100 * len(seen) / max(total, 1)


def bleu(responses, references):
    """Corpus BLEU-4 (Papineni et al. 2002) with one reference each; lists of words. 0 to 100.

    Smoothed as sacrebleu's "exp": the k-th n without a match counts as 1 / 2^k of a match.
    """
    log_precision, halvings = 0.0, 0
    for n in range(1, 5):
        matches, total = 0, 0
        for response, reference in zip(responses, references):
            grams = Counter(ngrams(response, n))
            matches += (grams & Counter(ngrams(reference, n))).total()
            total += grams.total()
        if total == 0 or (n == 1 and matches == 0):
            return 0.0
        if matches == 0:
            halvings += 1
            matches = 1 / 2**halvings
        log_precision += math.log(matches / total) / 4

    length = sum(map(len, responses))
    brevity = min(0.0, 1 - sum(map(len, references)) / length)
    return 100 * math.exp(log_precision + brevity)


def text_figures(texts, references):
    """Figures of replies as text. length is the mean number of words, punctuation included."""
    split = [words(text) for text in texts]
    total = sum(map(len, split))
    return {
        "bleu": bleu(split, [words(text) for text in references]),
        "dist1": distinct(split, 1),
        "dist2": distinct(split, 2),
        "unique": len(set(texts)) / len(texts),
        "length": total / len(split),
    }


# ---- n-grams: the other classifier ----------------------------------------------------------

# How much the context's grams count, and the response's: levels are mostly in the response.
SIDE_SCALES = (0.3, 1.0)


class NGramClassifier(nn.Module):
    """Logistic regression on the tokens and bigrams of context and response (the two sides):

    logits = b + sum over the sides of scale * sum_g w[row of g] / sqrt(number of grams)

    A gram g counts once however often it occurs: 7 8 7 8 has the grams 7, 8, (7, 8), (8, 7).
    So repeating one gains nothing, and the root slows the growth of logits with the length.
    Grams are hashed, fastText's way: w is a table of `size` rows, and grams that share a row
    (a collision) share its weights, and count once in a text.
    Better than a network where labels are few. Source: Joulin et al. 2017, arXiv 1607.01759.
    """

    def __init__(self, config):
        super().__init__()
        outputs = len(MECHANISMS) * LEVELS
        self.size = config.size
        self.weight = nn.Parameter(torch.zeros(1 + config.size, outputs))  # row 0: no gram
        self.bias = nn.Parameter(torch.zeros(outputs))

    def rows(self, ids, side):
        """(B, T) ids -> (B, 2 T - 1) rows of the table for its grams; 0: padding, repetition.

        side: 0 context, 1 response.
        """
        # A token's number is its id; a bigram's is above all ids.
        bigrams = (ids[:, :-1] + 1) * 1_000_003 + ids[:, 1:]
        bigrams = bigrams.masked_fill(ids[:, 1:] == PAD_ID, 0)
        grams = torch.cat([ids, bigrams], 1)

        # The row of each, by hashing: a large factor (Knuth's) moves neighbouring numbers
        # apart. Both sides share it; `side` shifts the rows by one. With factor 1, token i of
        # the response would share its row with token i + 1 of the context. The product may
        # wrap around in int64, but torch's % is never negative.
        rows = 1 + (grams * 2_654_435_761 + side) % self.size
        rows = torch.where(grams == 0, 0, rows)

        # Sorted, equal rows stand side by side: all but the first are repetitions.
        rows = rows.sort(1).values
        repeated = rows[:, 1:] == rows[:, :-1]
        return torch.cat([rows[:, :1], rows[:, 1:].masked_fill(repeated, 0)], 1)

    def log_probs(self, rows_of_sides):
        """Rows of the context's and the response's grams -> (B, M, L) log-probabilities."""
        logits = self.bias
        for rows, scale in zip(rows_of_sides, SIDE_SCALES):
            present = rows != 0  # row 0 stands for nothing
            count = present.sum(1)  # (B,)
            begins = count.cumsum(0) - count  # where each example begins in rows[present]
            total = F.embedding_bag(rows[present], self.weight, offsets=begins, mode="sum")
            logits = logits + scale * total / count.clamp(min=1).sqrt()[:, None]
        return logits.unflatten(-1, (-1, LEVELS)).log_softmax(-1)

    def forward(self, context, response):
        """(B, S), (B, T) ids -> (B, M, L) log-probabilities."""
        return self.log_probs([self.rows(context, 0), self.rows(response, 1)])

    def parts(self, name):
        """{name of the training stage: the module to train in it}."""
        return {name: self}

    def trainer(self, train, valid, rows_at, config):
        """Nothing to validate, no batches: the problem is convex, and one step solves it."""
        return NGramTrainer(self, train, config)


class NGramTrainer:
    """Has the interface of t5_small.Trainer. Its one step finds the minimum."""

    shown = ("loss",)

    def __init__(self, model, train, config):
        self.model = model
        self.train = train
        self.config = replace(config, steps=1)

    def step(self, i):
        """Minimise the weighted cross-entropy + penalty |w|^2 on all of train, by L-BFGS.

        LBFGS's own tolerances end it, or its limits: 500 iterations, 625 evaluations.
        """
        model, train = self.model, self.train
        optimizer = torch.optim.LBFGS(
            model.parameters(),
            max_iter=500,
            tolerance_change=1e-9,
            line_search_fn="strong_wolfe",
        )
        context, response = train.batch(range(len(train)))
        rows = [model.rows(context, 0), model.rows(response, 1)]
        levels = train.levels.to(train.device)
        weights = class_weights(train.levels, self.config.class_weight).to(train.device)

        def objective():
            optimizer.zero_grad()
            loss = classification_loss(model.log_probs(rows), levels, weights) / len(levels)
            loss = loss + self.config.penalty * model.weight.pow(2).sum()
            loss.backward()
            return loss

        optimizer.step(objective)
        return {"loss": objective().item()}  # optimizer.step returns the loss at its start

    def finish(self):
        """There are no best weights to go back to. The model is frozen."""
        self.model.requires_grad_(False)

    def warnings(self, record, first):
        return []

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        """No state: there is only one step."""
