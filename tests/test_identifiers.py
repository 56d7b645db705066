"""identifiers.py: the identifier, the empathy reward and the metrics, against figures made by hand, by scikit-learn
1.9 (F1) and by sacrebleu 2.6 (BLEU; tokenize="none", smooth_method="exp")."""

import math
import random

import pytest
import torch
import torch.nn.functional as F

import identifiers
from conftest import check
from t5_small import T5, T5Config

TINY = T5Config(
    vocab_size=24,
    d_model=16,
    d_kv=8,
    d_ff=32,
    num_layers=1,
    num_decoder_layers=1,
    num_heads=2,
    dropout_rate=0.0,
)
CONTEXT = torch.tensor([[5, 6, 7, 8, 1], [9, 3, 1, 0, 0], [12, 1, 0, 0, 0]])
RESPONSE = torch.tensor([[4, 9, 1, 0], [10, 11, 12, 1], [13, 1, 0, 0]])


def model(shared=True, seed=0):
    torch.manual_seed(seed)
    return identifiers.Identifiers(TINY, shared).eval()


class Pairs:
    """Labelled pairs in memory, as identifier_trainer and predict_levels ask for them."""

    def __init__(self, context, response, levels):
        self.context, self.response, self.levels = context, response, levels

    def __len__(self):
        return len(self.levels)

    def chunks(self, size):
        return torch.randperm(len(self)).split(size)  # any order will do

    def batch(self, rows):
        return self.context[rows], self.response[rows]


# ---- the identifier --------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
def test_shapes_and_probabilities(shared):
    log_probs = model(shared)(CONTEXT, RESPONSE)
    assert log_probs.shape == (3, 3, 3) and log_probs.dtype == torch.float32
    check("probabilities of the levels add up to 1", log_probs.exp().sum(-1), torch.ones(3, 3))
    one = identifiers.Identifier(TINY, 2)
    assert one(CONTEXT, RESPONSE).shape == (3, 2, 3)


@pytest.mark.parametrize("shared", [True, False])
def test_padding_does_not_change_the_levels(shared):
    m = model(shared)
    plain = m(CONTEXT, RESPONSE)
    check("more context padding", m(F.pad(CONTEXT, (0, 9)), RESPONSE), plain)
    check("more response padding", m(CONTEXT, F.pad(RESPONSE, (0, 6))), plain)
    for row, (s, t) in enumerate(((5, 3), (3, 4), (2, 2))):
        check(
            f"row {row} alone",
            m(CONTEXT[row : row + 1, :s], RESPONSE[row : row + 1, :t])[0],
            plain[row],
        )


@pytest.mark.parametrize("shared", [True, False])
def test_context_and_response_matter(shared):
    m = model(shared)
    plain = m(CONTEXT, RESPONSE)
    assert (m(CONTEXT[[1, 2, 0]], RESPONSE) - plain).abs().amax((1, 2)).min() > 1e-3, (
        "the context is not used"
    )
    assert (m(CONTEXT, RESPONSE[[1, 2, 0]]) - plain).abs().amax((1, 2)).min() > 1e-3, (
        "the response is not used"
    )


def test_identifier_by_hand():
    """h = r + softmax(W_q r (W_k c)^T) W_v c W_o over the context's tokens; its mean over the response's tokens."""
    torch.manual_seed(1)
    one = identifiers.Identifier(TINY).eval()
    a, head = one.attention, one.head
    for row, (s, t) in enumerate(((5, 3), (3, 4), (2, 2))):
        c = one.context_encoder.encode(CONTEXT[row : row + 1, :s])[0]
        r = one.response_encoder.encode(RESPONSE[row : row + 1, :t])[0]
        h = []
        for query in r:
            weights = torch.stack(
                [(a.q.weight @ query) @ (a.k.weight @ key) for key in c]
            ).softmax(0)
            h.append(query + a.o.weight @ (a.v.weight @ (weights @ c)))
        pooled = sum(h) / t
        expected = (
            head[3].weight @ torch.tanh(head[0].weight @ pooled + head[0].bias) + head[3].bias
        )
        check(f"logits of row {row}", one(CONTEXT, RESPONSE)[row, 0], expected)
    assert head[0].weight.shape == (8, 16) and abs(a.q.weight.std() * 16 - 1) < 0.2, (
        "q starts with std 1 / d"
    )


def test_masked_mean():
    x = torch.tensor(
        [[[1.0, 2.0], [3.0, 4.0], [100.0, 100.0]], [[5.0, 6.0], [7.0, 7.0], [7.0, 7.0]]]
    )
    mask = torch.tensor([[True, True, False], [True, False, False]])
    check(
        "mean of the first two positions; of the first",
        identifiers.masked_mean(x, mask),
        [[2.0, 3.0], [5.0, 6.0]],
    )


def test_shared_and_separate_towers():
    shared, separate = model(True), model(False)
    size = lambda m: sum(p.numel() for p in m.parameters())
    assert (
        len(shared.towers) == 1
        and len(separate.towers) == 3
        and size(separate) > 2.9 * size(shared)
    )
    separate(CONTEXT, RESPONSE)[:, 1].sum().backward()  # interpretation is tower 1's alone
    has_gradient = [
        any(p.grad is not None and p.grad.abs().sum() > 0 for p in t.parameters())
        for t in separate.towers
    ]
    assert has_gradient == [False, True, False]
    assert not torch.equal(
        separate.towers[0].head[0].weight, separate.towers[1].head[0].weight
    )


@pytest.mark.parametrize("shared", [True, False])
def test_start_from_copies_the_encoder(shared):
    t5, m = T5(TINY), model(shared)
    m.start_from(t5)
    encoders = [e for t in m.towers for e in (t.context_encoder, t.response_encoder)]
    states = t5.eval().encode(CONTEXT)
    for encoder in encoders:
        check("states of a started encoder", encoder.encode(CONTEXT), states)
    encoders[0].shared.weight.data.zero_()
    check("each encoder has its own copy", encoders[1].encode(CONTEXT), states)
    assert t5.shared.weight.abs().sum() > 0


# ---- training --------------------------------------------------------------------------------------

# ---- n-grams


def test_ngrams_by_hand():
    """Response 7 8 7 8 has the grams 7, 8, (7, 8), (8, 7), each counted once: logits = bias + (the sum of their weights) / sqrt(4).
    The context's grams are others, and count 0.3 times: one of them, 7, / sqrt(1)."""
    torch.manual_seed(0)
    model = identifiers.NGrams(1000)
    with torch.no_grad():
        model.weight.normal_()
        model.bias.normal_()
    response, context = torch.tensor([[7, 8, 7, 8, 0]]), torch.tensor([[7, 0]])
    of = lambda ids, side: sorted(
        set(model.grams(torch.tensor([ids]), side)[0].tolist()) - {0}
    )
    seven, eight, both, turned = of([7], 1), of([8], 1), of([7, 8], 1), of([8, 7], 1)
    pair, other = set(both) - {*seven, *eight}, set(turned) - {*seven, *eight}
    assert len(seven) == len(eight) == len(pair) == len(other) == 1 and pair != other, (
        "the order of two tokens counts"
    )
    rows = [*seven, *eight, *pair, *other]
    assert of([7, 8, 7, 8], 1) == sorted(rows) and of([7], 0) != seven
    logits = model.bias + model.weight[rows].sum(0) / 2 + 0.3 * model.weight[of([7], 0)[0]]
    check("log-probabilities", model(context, response)[0], logits.view(3, 3).log_softmax(-1))


def test_ngrams_do_not_see_padding_or_the_batch():
    torch.manual_seed(0)
    model = identifiers.NGrams(500)
    torch.nn.init.normal_(model.weight)
    together, wider = (
        model(CONTEXT, RESPONSE),
        model(F.pad(CONTEXT, (0, 4)), F.pad(RESPONSE, (0, 2))),
    )
    check("more padding", wider, together)
    check(
        "row by row",
        torch.cat([model(c[None], r[None]) for c, r in zip(CONTEXT, RESPONSE)]),
        together,
    )


def test_ngrams_are_fitted_to_the_minimum():
    """The gradient of the weighted cross-entropy + penalty |w|^2, by autograd from the outside, is 0 there; nothing trains on."""
    torch.manual_seed(0)
    response, levels = torch.randint(3, 24, (60, 6)), torch.randint(0, 3, (60, 3))
    levels[:, 0] = (response == 5).any(1) * 2
    pairs, weights, penalty = (
        Pairs(response[:, :2], response, levels),
        identifiers.class_weights(levels, 1.0),
        1e-2,
    )
    model = identifiers.Identifiers(TINY, ngrams=300)
    assert len(model.towers) == 0
    model.ngrams.fit(pairs, weights, penalty)
    assert not any(p.requires_grad for p in model.parameters())
    model.requires_grad_()
    loss = (
        identifiers.identification_loss(model(response[:, :2], response), levels, weights) / 60
        + penalty * model.ngrams.weight.pow(2).sum()
    )
    loss.backward()
    assert max(p.grad.abs().max() for p in model.parameters()) < 1e-3
    found = identifiers.predict_levels(model.requires_grad_(False), pairs)
    assert (found[:, 0] == levels[:, 0]).float().mean() > 0.95, (
        "a word that always means level 2"
    )


@pytest.mark.parametrize("penalty", [1e-2, 1e-4, 3e-6])
def test_ngrams_are_fitted_until_nothing_changes(penalty):
    """However small the penalty, which takes more iterations: the gradient's norm is a thousandth of what it is at the start."""
    torch.manual_seed(0)
    context, levels = torch.randint(3, 40, (300, 8)), torch.randint(0, 3, (300, 3))
    levels[:, 0] = (context == 5).any(1) * 2
    empty = torch.ones(300, 1, dtype=torch.long)
    pairs, weights = Pairs(context, empty, levels), identifiers.class_weights(levels, 0.0)

    def gradient(model):
        loss = identifiers.identification_loss(model(context, empty), levels, weights) / 300
        loss = loss + penalty * model.weight.pow(2).sum()
        return torch.cat(
            [x.flatten() for x in torch.autograd.grad(loss, [model.weight, model.bias])]
        ).norm()

    model = identifiers.NGrams(2000)
    start = gradient(model)
    model.fit(pairs, weights, penalty)
    end = gradient(model.requires_grad_())
    assert start > 0.05 and end < 1e-3 * start, f"gradient norm {start:.2e} -> {end:.2e}"


def test_even_by_hand():
    """P .6, .3, .1 over shares .8, .1, .1: to the power 1, .75, 3, 1 -> / 4.75; to the power 0 nothing changes."""
    probs, share = torch.tensor([[[0.6, 0.3, 0.1]]]), torch.tensor([[0.8, 0.1, 0.1]])
    check(
        "exponent 1",
        identifiers.even(probs, share, 1.0),
        [[[0.75 / 4.75, 3 / 4.75, 1 / 4.75]]],
    )
    check("exponent 0", identifiers.even(probs, share, 0.0), probs)
    check(
        "exponent 1/2",
        identifiers.even(probs, share, 0.5),
        F.normalize(torch.tensor([[[0.6, 0.3, 0.1]]]) / share.sqrt(), p=1, dim=-1),
    )


def test_class_weights():
    levels = torch.tensor(
        [[0, 2], [0, 2], [0, 0], [1, 1], [1, 1], [2, 0]]
    )  # shares 3:2:1 and 2:2:2
    check(
        "exponent 1: 1 / share, mean over examples 1",
        identifiers.class_weights(levels, 1.0),
        [[2 / 3, 1, 2], [1.0, 1, 1]],
    )
    check(
        "exponent 0.5",
        identifiers.class_weights(levels, 0.5),
        [[0.835476, 1.023244, 1.447087], [1.0, 1, 1]],
    )
    check("exponent 0", identifiers.class_weights(levels, 0.0), [[1.0, 1, 1], [1.0, 1, 1]])


@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_class_weights_of_absent_levels(exponent):
    levels = torch.tensor([[0, 0]] * 6 + [[2, 0]] * 3)
    weights = identifiers.class_weights(levels, exponent)
    assert weights.isfinite().all()
    mean = torch.stack([weights[m][levels[:, m]].mean() for m in range(2)])
    check("mean weight of an example, levels {0, 2} and {0} present", mean, [1.0, 1.0])


def test_identification_loss():
    log_probs = torch.tensor(
        [[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]], [[0.2, 0.2, 0.6], [0.3, 0.3, 0.4]]]
    ).log()
    levels, weights = (
        torch.tensor([[0, 1], [2, 0]]),
        torch.tensor([[1.0, 5.0, 2.0], [3.0, 0.5, 7.0]]),
    )
    expected = -(
        1 * math.log(0.5) + 0.5 * math.log(0.8) + 2 * math.log(0.6) + 3 * math.log(0.3)
    )
    check(
        "weighted cross-entropy, summed",
        identifiers.identification_loss(log_probs, levels, weights),
        expected,
    )


def synthetic(n, seed):
    """ER: 2 with token 5 in the response, 1 with 6, else 0. IP: the same with 7, 8. EX: with 9, 10 in the context."""
    g = torch.Generator().manual_seed(seed)
    levels = torch.randint(3, (n, 3), generator=g)
    context, response = (
        torch.randint(12, 24, (n, 7), generator=g),
        torch.randint(12, 24, (n, 6), generator=g),
    )
    for row in range(n):
        er, ip, ex = levels[row].tolist()
        response[row, int(torch.randint(3, (1,), generator=g))] = (20, 6, 5)[er]
        response[row, 3 + int(torch.randint(2, (1,), generator=g))] = (20, 8, 7)[ip]
        context[row, int(torch.randint(5, (1,), generator=g))] = (20, 10, 9)[ex]
        length = int(torch.randint(5, 7, (1,), generator=g))
        response[row, length:] = 0
    return Pairs(context, response, levels)


@pytest.mark.parametrize("shared", [True, False])
def test_trainer_learns_a_rule(shared):
    train, valid, m = synthetic(400, 1), synthetic(150, 2), model(shared, seed=3)
    config = identifiers.IdentifierConfig(
        steps=120, batch_size=64, warmup=10, eval_every=40, shared=shared
    )
    before = identifiers.identifier_scores(m, valid)
    trainer = identifiers.identifier_trainer(
        m,
        train,
        valid,
        lambda i: torch.randperm(400, generator=torch.Generator().manual_seed(i))[:64],
        config,
    )
    check(
        "what is validated: minus the mean macro-F1",
        trainer.validate(),
        -sum(before[m]["macro_f1"] for m in before) / 3,
    )
    for i in range(config.steps):
        trainer.step(i)
    trainer.finish()
    after = identifiers.identifier_scores(m, valid)
    for mechanism in ("er", "ip", "ex"):
        assert before[mechanism]["macro_f1"] < 0.6, before
        assert after[mechanism]["macro_f1"] > 0.9, f"{mechanism}: {after[mechanism]}"
    mean = sum(after[m]["macro_f1"] for m in after) / 3
    check("the best validation is minus the mean macro-F1", trainer.best["score"], -mean)


def levels_in_response(context, response):
    """A stand-in for the identifiers: the level of mechanism m is response token m, less 3."""
    return F.one_hot(response[:, :3] - 3, 3).float().log_softmax(-1)


def test_predict_levels_keeps_the_order():
    g = torch.Generator().manual_seed(0)
    levels = torch.randint(3, (50, 3), generator=g)
    response = torch.cat([levels + 3, torch.randint(3, 9, (50, 6), generator=g)], 1)
    for row in range(50):
        response[row, 3 + int(torch.randint(7, (1,), generator=g)) :] = 0
    pairs = Pairs(torch.zeros(50, 2, dtype=torch.long), response, levels)
    check(
        "levels in the pairs' own order",
        identifiers.predict(levels_in_response, pairs, size=8).argmax(-1),
        levels,
    )
    scores = identifiers.identifier_scores(levels_in_response, pairs)
    assert (
        list(scores) == ["er", "ip", "ex"]
        and scores["ip"]["accuracy"] == scores["ex"]["weighted_f1"] == 1.0
    )
    assert (
        scores["er"]["confusion"]
        == torch.diag(torch.bincount(levels[:, 0], minlength=3)).tolist()
    )


# ---- the reward ------------------------------------------------------------------------------------

LOG_PROBS = torch.tensor(
    [
        [[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0.25, 0.5, 0.25]],
        [[0.0625, 0.0625, 0.875], [1 / 3, 1 / 3, 1 / 3], [0.9, 0.05, 0.05]],
    ]
).log()
TARGETS = torch.tensor([[0, 2, 1], [0, 1, 2]])


def test_empathy_reward_is_the_product():
    check(
        "the product of the targets' probabilities: .7 * .6 * .5 and .0625 * .333 * .05",
        identifiers.empathy_reward(LOG_PROBS, TARGETS),
        [0.21, 0.0625 / 3 * 0.05],
    )
    check(
        "of ER and EX only: .7 * .5",
        identifiers.empathy_reward(LOG_PROBS, TARGETS, mechanisms="er,ex"),
        [0.35, 0.0625 * 0.05],
    )
    check(
        "of none: exp(0)",
        identifiers.empathy_reward(LOG_PROBS, TARGETS, mechanisms=""),
        [1.0, 1.0],
    )


def test_empathy_reward_ordinal():
    """E|level - target|: .2 + 2 * .1 = .4;  2 * .1 + .3 = .5;  .25 + .25 = .5.  1.8125;  2/3;  2 * .9 + .05 = 1.85."""
    check(
        "exp(-(.4 + .5 + .5)) and exp(-(1.8125 + .667 + 1.85))",
        identifiers.empathy_reward(LOG_PROBS, TARGETS, "ordinal"),
        [math.exp(-1.4), math.exp(-1.8125 - 2 / 3 - 1.85)],
    )
    check(
        "of IP only",
        identifiers.empathy_reward(LOG_PROBS, TARGETS, "ordinal", "ip"),
        [math.exp(-0.5), math.exp(-2 / 3)],
    )


def test_empathy_reward_is_expected_over_uncertain_targets():
    """P(target) = (.5, .5, 0), certain 2, (0, 0, 1): (.5 * .7 + .5 * .2) * .6 * .25; and the mean over the levels drawn by hand."""
    target = torch.tensor([[[0.5, 0.5, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]])
    check(
        "cross-entropy", identifiers.empathy_reward(LOG_PROBS[:1], target), [0.45 * 0.6 * 0.25]
    )
    for difference in ("cross_entropy", "ordinal"):
        both = [
            identifiers.empathy_reward(
                LOG_PROBS[:1], torch.tensor([[level, 2, 2]]), difference
            )
            for level in (0, 1)
        ]
        check(
            "half of each",
            identifiers.empathy_reward(LOG_PROBS[:1], target, difference),
            sum(both) / 2,
        )


def test_empathy_reward_unknown_difference():
    with pytest.raises(ValueError, match="manhattan"):
        identifiers.empathy_reward(LOG_PROBS, TARGETS, "manhattan")


def test_reward_takes_the_target_of_the_index():
    seen = []

    def fake(context, response):
        seen.append((context, response, torch.is_grad_enabled()))
        return LOG_PROBS

    table = torch.tensor([[2, 2, 2], [0, 1, 2], [1, 1, 1], [0, 2, 1]])
    reward = identifiers.make_reward(fake, table)
    check(
        "pairs 3 and 1",
        reward(CONTEXT[:2], RESPONSE[:2], torch.tensor([3, 1])),
        [0.21, 0.0625 / 3 * 0.05],
    )
    assert torch.equal(seen[0][0], CONTEXT[:2]) and torch.equal(seen[0][1], RESPONSE[:2])
    assert not seen[0][2], "the reward needs no gradient"
    reward = identifiers.make_reward(fake, table, difference="ordinal", mechanisms="er")
    check(
        "ordinal, ER only",
        reward(CONTEXT[:2], RESPONSE[:2], torch.tensor([3, 1])),
        [math.exp(-0.4), math.exp(-1.8125)],
    )


# ---- metrics of levels -----------------------------------------------------------------------------

F1_CASES = {  # gold, predicted: accuracy, macro-F1, weighted F1 by scikit-learn
    "all levels": (
        [0, 0, 0, 0, 1, 1, 1, 2, 2, 0],
        [0, 0, 1, 2, 1, 1, 0, 2, 1, 0],
        0.6,
        0.5793650793650794,
        0.6047619047619047,
    ),
    "2 in neither": (
        [0, 0, 0, 1, 1, 0],
        [0, 1, 0, 1, 0, 0],
        0.6666666666666666,
        0.625,
        0.6666666666666666,
    ),
    "2 only predicted": (
        [0, 0, 1, 1, 0],
        [0, 2, 1, 2, 0],
        0.6,
        0.48888888888888893,
        0.7466666666666667,
    ),
    "2 only in gold": (
        [0, 1, 2, 2, 1, 0],
        [0, 1, 0, 1, 1, 0],
        0.6666666666666666,
        0.5333333333333333,
        0.5333333333333333,
    ),
    "constant": (
        [0, 1, 2, 2, 1, 0],
        [0] * 6,
        0.3333333333333333,
        0.16666666666666666,
        0.16666666666666666,
    ),
    "nothing right": ([2, 2, 2], [0, 1, 0], 0.0, 0.0, 0.0),
}


def test_confusion():
    gold, predicted = (
        torch.tensor(F1_CASES["all levels"][0]),
        torch.tensor(F1_CASES["all levels"][1]),
    )
    check(
        "rows gold, columns predicted",
        identifiers.confusion(predicted, gold),
        [[3, 1, 1], [1, 2, 0], [0, 1, 1]],
    )


@pytest.mark.parametrize("case", F1_CASES)
def test_f1_scores(case):
    gold, predicted, accuracy, macro, weighted = F1_CASES[case]
    table = torch.zeros(3, 3, dtype=torch.long)
    for g, p in zip(gold, predicted):
        table[g, p] += 1
    got = identifiers.f1_scores(table)
    for name, expected in (
        ("accuracy", accuracy),
        ("macro_f1", macro),
        ("weighted_f1", weighted),
    ):
        check(
            f"{name} of gold {gold}, predicted {predicted} (scikit-learn's)",
            float(got[name]),
            expected,
            tol=1e-7,
        )


def test_emp_f1():
    """The mean of the mechanisms' F1s, each over the whole corpus."""
    cases = [F1_CASES[c] for c in ("2 in neither", "2 only in gold", "constant")]
    gold, predicted = (torch.tensor([c[k] for c in cases]).T for k in (0, 1))
    check(
        "weighted",
        identifiers.emp_f1(predicted, gold),
        (2 / 3 + 0.5333333333 + 1 / 6) / 3,
        tol=1e-7,
    )
    check(
        "macro",
        identifiers.emp_f1(predicted, gold, "macro_f1"),
        (0.625 + 0.5333333333 + 1 / 6) / 3,
        tol=1e-7,
    )
    assert identifiers.emp_f1(gold, gold) == 1.0


def test_mutual_information():
    column = lambda values: torch.tensor(values)[:, None]
    gold = column([0, 0, 0, 1, 1, 1])
    mi = identifiers.mutual_information
    check("a constant policy", mi(torch.zeros_like(gold), gold), 0.0, tol=1e-7)
    check("independent", mi(column([0, 1, 0, 1] * 3), column([0, 0, 1, 1] * 3)), 0.0, tol=1e-7)
    identical = column([0, 0, 0, 0, 1, 1, 2, 2])
    check(
        "identical: the entropy of 1/2, 1/4, 1/4 in bits",
        mi(identical, identical),
        1.5,
        tol=1e-7,
    )
    check("a relabelling loses nothing", mi((identical + 1) % 3, identical), 1.5, tol=1e-7)
    check(
        "2/3 right: 2/3 log2 4/3 + 1/3 log2 2/3",
        mi(column([0, 0, 1, 0, 1, 1]), gold),
        0.0817042,
        tol=1e-6,
    )
    both = torch.cat([identical, torch.zeros_like(identical)], 1)
    check("mean over the mechanisms", mi(both, both), 0.75, tol=1e-7)


def systems(n, gain, seed=0):
    """Gold levels, a system that is right half of the time, and one that mends a share of its mistakes."""
    g = torch.Generator().manual_seed(seed)
    gold = torch.randint(3, (n, 3), generator=g)
    before = torch.where(
        torch.rand(n, 3, generator=g) < 0.5, gold, torch.randint(3, (n, 3), generator=g)
    )
    return gold, before, torch.where(torch.rand(n, 3, generator=g) < gain, gold, before)


def test_paired_bootstrap():
    gold, before, after = systems(300, 0.4)
    same = identifiers.paired_bootstrap(before, before, gold, gold, resamples=200)
    check(
        "two identical systems: gain and interval",
        [same[k] for k in ("relative", "low", "high")],
        [0.0, 0.0, 0.0],
    )
    got = identifiers.paired_bootstrap(before, after, gold, gold, resamples=500)
    old, new = identifiers.emp_f1(before, gold), identifiers.emp_f1(after, gold)
    check("relative gain", got["relative"], (new - old) / old)
    assert 0 < got["low"] < got["relative"] < got["high"], f"a clear gain: {got}"
    assert got == identifiers.paired_bootstrap(before, after, gold, gold, resamples=500), (
        "not reproducible"
    )
    other = identifiers.paired_bootstrap(before, after, gold, gold, resamples=500, seed=1)
    assert other["low"] != got["low"] and other["relative"] == got["relative"]
    worse = identifiers.paired_bootstrap(after, before, gold, gold, resamples=200)
    assert worse["high"] < 0
    none = identifiers.paired_bootstrap(
        *systems(300, 0.0, 3)[1:], *systems(300, 0.0, 3)[:1] * 2, resamples=200
    )
    assert none["low"] <= 0 <= none["high"]


def test_paired_bootstrap_is_the_plain_loop():
    """Against loops with another generator: the same interval up to chance. Both systems must see the same draw."""
    gold, before, after = systems(60, 0.25, seed=1)
    gold_after = gold.flip(0)
    after = after.flip(0)  # each system may come with its own table of gold levels
    before, gold = before.flip(0), gold.flip(0)
    gold[:5, 0] = (gold[:5, 0] + 1) % 3
    dice, gains = random.Random(5), []
    for _ in range(1000):
        rows = torch.tensor([dice.randrange(60) for _ in range(60)])
        old, new = (
            identifiers.emp_f1(before[rows], gold[rows]),
            identifiers.emp_f1(after[rows], gold_after[rows]),
        )
        gains.append((new - old) / old)
    low, high = sorted(gains)[25], sorted(gains)[974]
    got = identifiers.paired_bootstrap(before, after, gold, gold_after, resamples=4000)
    width = high - low
    assert abs(got["low"] - low) < 0.15 * width and abs(got["high"] - high) < 0.15 * width, (
        f"expected about [{low:.3f}, {high:.3f}], got {got}"
    )


def test_paired_bootstrap_in_pieces(monkeypatch):
    """The figures are those of one piece, to the last bit (noted down from a version without pieces); 0.1 MB a context are not
    needed at once."""
    expected = {
        40: {
            "relative": -0.04635851490967336,
            "low": -0.3754295022073759,
            "high": 0.4348363009359203,
        },
        600: {
            "relative": 0.04791071619869397,
            "low": -0.0444052624824635,
            "high": 0.1520600959325762,
        },
    }
    for n, figures in expected.items():
        g = torch.Generator().manual_seed(n)
        before, after, gold = (torch.randint(3, (n, 3), generator=g) for _ in range(3))
        assert identifiers.paired_bootstrap(before, after, gold, gold) == figures
    drawn, plain = [], torch.randint

    def spy(*arguments, **options):
        drawn.append(plain(*arguments, **options))
        return drawn[-1]

    gold, before, after = systems(20_000, 0.4)
    monkeypatch.setattr(torch, "randint", spy)
    identifiers.paired_bootstrap(before, after, gold, gold, resamples=60)
    assert sum(x.numel() for x in drawn) == 60 * 20_000
    assert max(x.numel() for x in drawn) < 300_000


# ---- metrics of text -------------------------------------------------------------------------------


def test_distinct():
    texts = [s.split() for s in ("i am so sorry", "i am so happy for you", "sorry")]
    check("7 different words of 11", identifiers.distinct(texts, 1), 100 * 7 / 11)
    check(
        "6 different pairs of 8, none across responses",
        identifiers.distinct(texts, 2),
        100 * 6 / 8,
    )
    check("no pairs at all", identifiers.distinct([["a"], ["b"]], 2), 0.0)


BLEU_CASES = {  # responses, references, sacrebleu's score
    "all orders match": (
        ["the cat sat on the mat today", "i am so sorry to hear that my friend"],
        ["the cat sat on the mat", "i am sorry to hear that my dear friend"],
        65.34189176286401,
    ),
    "brevity penalty": (
        ["the cat sat on", "that is really great"],
        ["the cat sat on the big red mat", "that is really great news for you"],
        41.686201967850856,
    ),
    "no 4-gram matches": (
        ["the cat is here now", "a dog ran far away"],
        ["the cat was here today", "a dog ran near home"],
        26.165878484802647,
    ),
    "single words match": (
        ["the cat the dog the cow the pig"],
        ["the cat sat with the dog and the cow"],
        16.882295545316378,
    ),
    "clipped counts": (
        ["the the the the the the"],
        ["the cat is on the mat"],
        9.652434877402245,
    ),
    "one short response": (
        ["hello", "i am glad that it went so well"],
        ["hello there", "i am glad it went so well for you"],
        40.19480958339268,
    ),
    "too short for 4-grams": (["a b c", "d e"], ["a b c", "d e"], 0.0),
    "nothing matches": (["a b c d e"], ["f g h i j"], 0.0),
}


@pytest.mark.parametrize("case", BLEU_CASES)
def test_bleu(case):
    responses, references, expected = BLEU_CASES[case]
    got = identifiers.bleu([s.split() for s in responses], [s.split() for s in references])
    check(f"BLEU of {responses} against {references} (sacrebleu's)", got, expected, tol=1e-7)


# ---- figures together


def test_level_scores_by_hand():
    gold = torch.tensor([[0, 0, 0], [1, 1, 1], [2, 2, 2], [0, 1, 2]])
    same = identifiers.level_scores(gold, gold)
    assert (
        same["emp_f1"] == same["emp_macro_f1"] == same["exact_match"] == same["emp_f1_ex"] == 1
    )
    one_off = gold.clone()
    one_off[3, 2] = 0  # ex: gold 0 1 2 2, predicted 0 1 2 0
    scores = identifiers.level_scores(one_off, gold)
    check("three of four responses are right in all", scores["exact_match"], 0.75)
    check("ER and IP are untouched", [scores["emp_f1_er"], scores["emp_f1_ip"]], [1.0, 1.0])
    check(
        "EX: F1 of levels 0, 1, 2 is 2/3, 1, 2/3, with shares 1/4, 1/4, 1/2",
        scores["emp_f1_ex"],
        2 / 3 / 4 + 1 / 4 + 2 / 3 / 2,
    )
    check("their mean", scores["emp_f1"], (2 + 2 / 3 / 4 + 1 / 4 + 1 / 3) / 3)


def test_ceiling_by_hand():
    gold = torch.tensor([[0, 1, 2]] * 300 + [[1, 2, 0]] * 300)
    certain = torch.nn.functional.one_hot(gold, 3).float().tolist()
    assert identifiers.ceiling(certain, gold) == {
        "best": {"oracle_emp_f1": 1.0},
        "mle_ideal": {"oracle_emp_f1": 1.0},
    }
    probs = (
        0.5 * torch.tensor(certain) + 0.5 * torch.nn.functional.one_hot((gold + 1) % 3, 3)
    ).tolist()
    scores = identifiers.ceiling(
        [
            [[p + 1e-4 * (k == g) for k, p in enumerate(row)] for g, row in zip(levels, rows)]
            for levels, rows in zip(gold.tolist(), probs)
        ],
        gold,
    )
    check("the likeliest level is the gold one", scores["best"]["oracle_emp_f1"], 1.0)
    # a mechanism has two levels in gold, each of 300: TP 150; the one drawn by mistake for the other adds 150 or 0 to its count
    check(
        "sampling is right half of the time",
        scores["mle_ideal"]["oracle_emp_f1"],
        (300 / 600 + 300 / 450) / 2,
        tol=0.02,
    )


def test_text_scores_by_hand():
    scores = identifiers.text_scores(
        ["I see.", "I see.", "Oh no, I see!"], ["I see.", "Go on.", "Oh no, I see!"]
    )
    assert identifiers.words("Don't  STOP, now!") == ["don", "'", "t", "stop", ",", "now", "!"]
    check("words and marks a response", scores["length"], (3 + 3 + 6) / 3)
    check("two of three differ", scores["unique"], 2 / 3)
    check("i see . oh no , ! are 7 of 12", scores["dist1"], 100 * 7 / 12)
    check("i-see see-. oh-no no-, ,-i see-! are 6 of 9", scores["dist2"], 100 * 6 / 9)
