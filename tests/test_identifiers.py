"""identifiers.py: classifiers, the reward and the measures, against figures made by hand, by
scikit-learn 1.9 (F1) and by sacrebleu 2.6 (BLEU; tokenize="none", smooth_method="exp").

Functions that students write are called through their module: `--impl` can replace them.
"""

import copy
import math
import random

import pytest
import torch
import torch.nn.functional as F

import identifiers
import t5_small
from conftest import check
from identifiers import ClassifierConfig, RewardConfig
from t5_small import T5
from tests.tools import tiny_config

TINY = tiny_config(vocab_size=24, num_layers=1, num_decoder_layers=1)
CONTEXT = torch.tensor([[5, 6, 7, 8, 1], [9, 3, 1, 0, 0], [12, 1, 0, 0, 0]])
RESPONSE = torch.tensor([[4, 9, 1, 0], [10, 11, 12, 1], [13, 1, 0, 0]])
LENGTHS = ((5, 3), (3, 4), (2, 2))  # of both, row by row


def model(shared=True, seed=0):
    torch.manual_seed(seed)
    config = ClassifierConfig(shared=shared)
    return identifiers.make_classifier(T5(TINY), config).eval()


def ngrams_of(size):
    return identifiers.make_classifier(None, ClassifierConfig(kind="ngrams", size=size))


class Pairs:
    """Labelled pairs in memory: what classifiers and the reward ask of data.Pairs."""

    device = torch.device("cpu")

    def __init__(self, context, response, levels):
        self.context, self.responses, self.levels = context, response, levels

    def __len__(self):
        return len(self.context)

    def chunks(self, size):
        return torch.randperm(len(self)).split(size)  # any order will do

    def batch(self, rows):
        return self.context[rows], self.responses[rows]

    def with_responses(self, responses, levels=None):
        other = copy.copy(self)
        other.responses = torch.stack(list(responses))
        other.levels = levels
        return other


# ---- a classifier --------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
def test_shapes_and_probabilities(shared):
    log_probs = model(shared)(CONTEXT, RESPONSE)
    assert log_probs.shape == (3, 3, 3) and log_probs.dtype == torch.float32
    check("probabilities of the levels add up to 1", log_probs.exp().sum(-1), torch.ones(3, 3))
    one = identifiers.BiEncoder(TINY, 2)
    assert one(CONTEXT, RESPONSE).shape == (3, 2, 3)


@pytest.mark.parametrize("shared", [True, False])
def test_padding_does_not_change_the_levels(shared):
    m = model(shared)
    plain = m(CONTEXT, RESPONSE)
    check("more context padding", m(F.pad(CONTEXT, (0, 9)), RESPONSE), plain)
    check("more response padding", m(CONTEXT, F.pad(RESPONSE, (0, 6))), plain)
    for row, (s, t) in enumerate(LENGTHS):
        alone = m(CONTEXT[row : row + 1, :s], RESPONSE[row : row + 1, :t])
        check(f"row {row} alone", alone[0], plain[row])


@pytest.mark.parametrize("shared", [True, False])
def test_context_and_response_matter(shared):
    m = model(shared)
    plain = m(CONTEXT, RESPONSE)
    other = {
        "context": m(CONTEXT[[1, 2, 0]], RESPONSE),
        "response": m(CONTEXT, RESPONSE[[1, 2, 0]]),
    }
    for name, log_probs in other.items():
        difference = (log_probs - plain).abs().amax((1, 2)).min()
        assert difference > 1e-3, f"the {name} is not used"


def test_bi_encoder_by_hand():
    """h = r + W_o (softmax(W_q r (W_k c)^T) W_v c) over the context's tokens, and its mean."""
    torch.manual_seed(1)
    one = identifiers.BiEncoder(TINY, 1).eval()
    a, head = one.attention, one.head
    for row, (s, t) in enumerate(LENGTHS):
        c = one.context_encoder.encode(CONTEXT[row : row + 1, :s])[0]
        r = one.response_encoder.encode(RESPONSE[row : row + 1, :t])[0]
        h = []
        for query in r:
            scores = [(a.q.weight @ query) @ (a.k.weight @ key) for key in c]
            weights = torch.stack(scores).softmax(0)
            h.append(query + a.o.weight @ (a.v.weight @ (weights @ c)))
        pooled = sum(h) / t
        hidden = torch.tanh(head[0].weight @ pooled + head[0].bias)
        expected = head[3].weight @ hidden + head[3].bias
        check(f"logits of row {row}", one(CONTEXT, RESPONSE)[row, 0], expected)
    assert head[0].weight.shape == (8, 16)
    assert abs(a.q.weight.std() * 16 - 1) < 0.2, "q starts with std 1 / d"


def test_mean_pool():
    first = [[1.0, 2.0], [3.0, 4.0], [100.0, 100.0]]
    second = [[5.0, 6.0], [7.0, 7.0], [7.0, 7.0]]
    mask = torch.tensor([[True, True, False], [True, False, False]])
    x = torch.tensor([first, second], requires_grad=True)
    got = identifiers.mean_pool(x, mask)
    check("mean of the first two positions; of the first", got, [[2.0, 3.0], [5.0, 6.0]])
    got[:, 0].sum().backward()
    what = "gradient of the means by the first column: 1 / number of positions"
    check(what, x.grad[..., 0], [[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])


def size_of(model):
    return sum(p.numel() for p in model.parameters())


def test_shared_and_separate_encoders():
    shared, separate = model(True), model(False)
    assert len(shared.encoders) == 1 and len(separate.encoders) == 3
    assert size_of(separate) > 2.9 * size_of(shared)
    separate(CONTEXT, RESPONSE)[:, 1].sum().backward()  # interpretation is the second's alone
    has_gradient = []
    for encoder in separate.encoders:
        gradients = [p.grad for p in encoder.parameters() if p.grad is not None]
        has_gradient.append(any(gradient.any() for gradient in gradients))
    assert has_gradient == [False, True, False]
    first, second, _ = separate.encoders
    assert not torch.equal(first.head[0].weight, second.head[0].weight)


def test_parts_share_the_weights_and_tell_one_mechanism_each():
    whole = model(False)
    parts = whole.parts("judge")
    assert list(parts) == ["judge-er", "judge-ip", "judge-ex"]
    told = [part(CONTEXT, RESPONSE) for part in parts.values()]
    check("side by side", torch.cat(told, 1), whole(CONTEXT, RESPONSE))
    own = set()
    for part in parts.values():
        own |= set(map(id, part.parameters()))
    assert own == {id(p) for p in whole.parameters()}, "not copies"
    assert [size_of(part) * 3 for part in parts.values()] == [size_of(whole)] * 3


def test_training_a_part_leaves_the_others_alone():
    """It learns its own mechanism's levels: here the second, the only one with a rule."""
    train = synthetic(400, 1)
    valid = synthetic(150, 2)
    whole = model(False, seed=3)
    before = copy.deepcopy(whole.state_dict())
    part = whole.parts("identifiers")["identifiers-ip"]
    config = ClassifierConfig(steps=60, batch_size=32, warmup=2, eval_every=20, shared=False)
    trainer = part.trainer(
        train, valid, lambda i: range(32 * i % 320, 32 * i % 320 + 32), config
    )
    losses = [trainer.step(i)["loss"] for i in range(60)]
    assert losses[-1] < losses[0] / 2
    for name, weights in whole.state_dict().items():
        assert torch.equal(weights, before[name]) != name.startswith("encoders.1."), name


@pytest.mark.parametrize("shared", [True, False])
def test_every_encoder_starts_as_a_copy(shared):
    t5 = T5(TINY).eval()
    m = identifiers.make_classifier(t5, ClassifierConfig(shared=shared))
    encoders = []
    for both in m.eval().encoders:
        encoders += [both.context_encoder, both.response_encoder]
    states = t5.encode(CONTEXT)
    for encoder in encoders:
        check("states of a started encoder", encoder.encode(CONTEXT), states)
    encoders[0].shared.weight.data.zero_()
    check("each encoder has its own copy", encoders[1].encode(CONTEXT), states)
    assert t5.shared.weight.abs().sum() > 0


# ---- its training --------------------------------------------------------------------------


def test_class_weights():
    levels = [[0, 2], [0, 2], [0, 0], [1, 1], [1, 1], [2, 0]]  # shares 3:2:1 and 2:2:2

    def weights(exponent):
        return identifiers.class_weights(torch.tensor(levels), exponent)

    what = "exponent 1: 1 / share, mean over examples 1"
    check(what, weights(1.0), [[2 / 3, 1, 2], [1.0, 1, 1]])
    check("exponent 0.5", weights(0.5), [[0.835476, 1.023244, 1.447087], [1.0, 1, 1]])
    check("exponent 0", weights(0.0), [[1.0, 1, 1], [1.0, 1, 1]])


@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_class_weights_of_absent_levels(exponent):
    levels = torch.tensor([[0, 0]] * 6 + [[2, 0]] * 3)
    weights = identifiers.class_weights(levels, exponent)
    assert weights.isfinite().all(), f"weights of absent levels: {weights.tolist()}"
    mean = torch.stack([weights[m][levels[:, m]].mean() for m in range(2)])
    check("mean weight of an example, levels {0, 2} and {0} present", mean, [1.0, 1.0])
    common = (3 / 2) ** exponent
    scale = (6 * common + 3 * 3**exponent) / 9
    first = [common / scale, 9**exponent / scale, 3**exponent / scale]
    what = "6, 0 and 3 of 9: a level that never occurs counts as if it occurred once"
    check(what, weights[0], first)
    check("9, 0 and 0 of 9", weights[1], [1.0, 9**exponent, 9**exponent])


def test_classification_loss():
    first = [[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]
    second = [[0.2, 0.2, 0.6], [0.3, 0.3, 0.4]]
    levels = torch.tensor([[0, 1], [2, 0]])
    weights = torch.tensor([[1.0, 5.0, 2.0], [3.0, 0.5, 7.0]])
    log_probs = torch.tensor([first, second]).log()
    got = identifiers.classification_loss(log_probs, levels, weights)
    log = math.log
    expected = -(1 * log(0.5) + 0.5 * log(0.8) + 2 * log(0.6) + 3 * log(0.3))
    check("weighted cross-entropy, summed", got, expected)


def synthetic(count, seed):
    """ER is 2 with token 5 in the response, 1 with 6, else 0; IP the same with 7 and 8; EX
    with 9 and 10 in the context."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    levels = draw(0, 3, count, 3)
    context = draw(12, 24, count, 7)
    response = draw(12, 24, count, 6)
    for row in range(count):
        er, ip, ex = levels[row].tolist()
        response[row, draw(0, 3)] = (20, 6, 5)[er]
        response[row, 3 + draw(0, 2)] = (20, 8, 7)[ip]
        context[row, draw(0, 5)] = (20, 10, 9)[ex]
        response[row, draw(5, 7) :] = 0
    return Pairs(context, response, levels)


def rows_of_400(i):
    return torch.randperm(400, generator=torch.Generator().manual_seed(i))[:64]


@pytest.mark.parametrize("shared", [True, False])
def test_trainer_learns_a_rule(shared):
    train, valid, m = synthetic(400, 1), synthetic(150, 2), model(shared, seed=3)
    settings = {"steps": 120, "batch_size": 64, "warmup": 10, "eval_every": 40}
    config = ClassifierConfig(**settings, shared=shared)
    before = identifiers.classifier_figures(m, valid)
    trainer = m.trainer(train, valid, rows_of_400, config)

    def mean(figures):
        return sum(figures[name]["macro_f1"] for name in figures) / 3

    check("what is validated: minus the mean macro-F1", trainer.validate(), -mean(before))
    for i in range(config.steps):
        trainer.step(i)
    trainer.finish()
    after = identifiers.classifier_figures(m, valid)
    for mechanism in ("er", "ip", "ex"):
        assert before[mechanism]["macro_f1"] < 0.6, before
        assert after[mechanism]["macro_f1"] > 0.9, f"{mechanism}: {after[mechanism]}"
    check("the best validation is minus the mean macro-F1", trainer.best_loss, -mean(after))


def test_validation_by_the_loss_is_the_plain_cross_entropy():
    """Where probabilities count: -log p of the levels, summed over the mechanisms, a pair."""
    valid, m = synthetic(150, 2), model()
    log_probs = m(valid.context, valid.responses)
    expected = -log_probs.gather(2, valid.levels[..., None]).sum() / 150
    check("keep = loss", identifiers.validation_loss(m, valid, "loss"), expected)
    f1 = identifiers.emp_f1(log_probs.argmax(-1), valid.levels, "macro_f1")
    check("keep = macro_f1", identifiers.validation_loss(m, valid, "macro_f1"), -f1)


def levels_in_response(context, response):
    """A stand-in for the identifiers: the level of mechanism m is response token m, less 3."""
    return F.one_hot(response[:, :3] - 3, 3).float().log_softmax(-1)


class LevelsInResponse(torch.nn.Linear):
    """A module, since `predict` asks where its weights are."""

    def __init__(self):
        super().__init__(1, 1)

    def forward(self, context, response):
        return levels_in_response(context, response)


def test_predict_levels_keeps_the_order():
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(3, (50, 3), generator=generator)
    rest = torch.randint(3, 9, (50, 6), generator=generator)
    response = torch.cat([levels + 3, rest], 1)
    for row in range(50):
        response[row, 3 + int(torch.randint(7, (1,), generator=generator)) :] = 0
    pairs = Pairs(torch.zeros(50, 2, dtype=torch.long), response, levels)

    log_probs = identifiers.predict(LevelsInResponse(), pairs, size=8)
    check("levels in the pairs' own order", log_probs.argmax(-1), levels)
    found = identifiers.predict_levels(LevelsInResponse(), pairs)
    check("and by predict_levels", found, levels)
    figures = identifiers.classifier_figures(LevelsInResponse(), pairs)
    assert list(figures) == ["er", "ip", "ex"]
    assert figures["ip"]["accuracy"] == figures["ex"]["weighted_f1"] == 1.0
    counts = torch.bincount(levels[:, 0], minlength=3)
    assert figures["er"]["confusion"] == torch.diag(counts).tolist()


# ---- n-grams


def test_ngrams_by_hand():
    """Response 7 8 7 8 has the grams 7, 8, (7, 8), (8, 7), each of which counts once:

    logits = bias + (the sum of their weights) / sqrt(4)

    The context's grams are others, and count 0.3 times: one of them, 7, / sqrt(1).
    """
    torch.manual_seed(0)
    m = ngrams_of(1000)
    torch.nn.init.normal_(m.weight)
    torch.nn.init.normal_(m.bias)

    def hashes(ids, side):
        return {*m.rows(torch.tensor([ids]), side)[0].tolist()} - {0}

    seven, eight = hashes([7], 1), hashes([8], 1)
    pair = hashes([7, 8], 1) - seven - eight
    turned = hashes([8, 7], 1) - seven - eight
    assert [len(one) for one in (seven, eight, pair, turned)] == [1, 1, 1, 1]
    assert pair != turned, "the order of two tokens counts"
    grams = seven | eight | pair | turned
    assert hashes([7, 8, 7, 8], 1) == grams
    (other,) = hashes([7], 0)
    assert {other} != seven

    response = m.weight[sorted(grams)].sum(0) / 2
    logits = m.bias + response + 0.3 * m.weight[other]
    got = m(torch.tensor([[7, 0]]), torch.tensor([[7, 8, 7, 8, 0]]))
    check("log-probabilities", got[0], logits.view(3, 3).log_softmax(-1))


def test_ngrams_do_not_see_padding_or_the_batch():
    torch.manual_seed(0)
    m = ngrams_of(500)
    torch.nn.init.normal_(m.weight)
    together = m(CONTEXT, RESPONSE)
    check("more padding", m(F.pad(CONTEXT, (0, 4)), F.pad(RESPONSE, (0, 2))), together)
    for row in range(3):
        alone = m(CONTEXT[row : row + 1], RESPONSE[row : row + 1])
        check(f"row {row} alone", alone[0], together[row])


def rule(count, width, vocab_size, levels_seed=0):
    """Random ids, and random levels but for ER, which is 2 where there is a 5."""
    torch.manual_seed(levels_seed)
    ids = torch.randint(3, vocab_size, (count, width))
    levels = torch.randint(0, 3, (count, 3))
    levels[:, 0] = (ids == 5).any(1) * 2
    return ids, levels


def objective(m, pairs, class_weight, penalty):
    """The weighted cross-entropy, a mean over pairs, + penalty |w|^2."""
    weights = identifiers.class_weights(pairs.levels, class_weight)
    log_probs = m(pairs.context, pairs.responses)
    loss = identifiers.classification_loss(log_probs, pairs.levels, weights) / len(pairs)
    return loss + penalty * m.weight.pow(2).sum()


def ngram_trainer(m, pairs, **settings):
    """Of a configuration with more than one step, none of which is asked for."""
    return m.trainer(pairs, None, None, ClassifierConfig(kind="ngrams", **settings))


def test_ngrams_are_fitted_to_the_minimum():
    """The objective's gradient, worked out from the outside, is 0 there; nothing trains on."""
    response, levels = rule(60, 6, 24)
    pairs = Pairs(response[:, :2], response, levels)
    m = ngrams_of(300)
    trainer = ngram_trainer(m, pairs, class_weight=1.0, penalty=1e-2)
    assert trainer.config.steps == 1 and trainer.model is m
    record = trainer.step(0)
    trainer.finish()
    assert not any(p.requires_grad for p in m.parameters())
    found = identifiers.predict_levels(m, pairs)
    right = (found[:, 0] == levels[:, 0]).float().mean()
    assert right > 0.95, "a word that always means level 2"

    m.requires_grad_()
    loss = objective(m, pairs, 1.0, 1e-2)
    check("what is logged", record["loss"], loss)
    loss.backward()
    assert max(p.grad.abs().max() for p in m.parameters()) < 1e-3


@pytest.mark.parametrize("penalty", [1e-2, 1e-4, 3e-6])
def test_ngrams_are_fitted_until_nothing_changes(penalty):
    """However small the penalty, which takes more iterations: the gradient's norm falls to a
    thousandth."""
    context, levels = rule(300, 8, 40)
    pairs = Pairs(context, torch.ones(300, 1, dtype=torch.long), levels)
    m = ngrams_of(2000)

    def gradient():
        loss = objective(m, pairs, 0.0, penalty)
        parts = torch.autograd.grad(loss, [m.weight, m.bias])
        return torch.cat([part.flatten() for part in parts]).norm()

    start = gradient()
    trainer = ngram_trainer(m, pairs, class_weight=0.0, penalty=penalty)
    trainer.step(0)
    end = gradient()
    assert start > 0.05 and end < 1e-3 * start, f"gradient norm {start:.2e} -> {end:.2e}"


def test_ngrams_resume(tmp_path):
    """A run that was cut before its one step does it afterwards, to the same weights."""
    response, levels = rule(60, 6, 24)
    pairs = Pairs(response[:, :2], response, levels)
    whole, cut = ngrams_of(300), ngrams_of(300)
    record = ngram_trainer(whole, pairs).step(0)

    before = ngram_trainer(ngrams_of(300), pairs)
    t5_small.save_atomically(before.state_dict(), tmp_path / "ngrams.pt")
    resumed = ngram_trainer(cut, pairs)
    resumed.load_state_dict(t5_small.load_state(tmp_path / "ngrams.pt"))
    assert resumed.step(0) == record
    for name, weights in whole.state_dict().items():
        assert torch.equal(cut.state_dict()[name], weights), name
    assert resumed.warnings(record, record) == []


# ---- the reward ----------------------------------------------------------------------------

LOG_PROBS = torch.tensor(
    [
        [[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0.25, 0.5, 0.25]],
        [[0.0625, 0.0625, 0.875], [1 / 3, 1 / 3, 1 / 3], [0.9, 0.05, 0.05]],
    ]
).log()
TARGETS = torch.tensor([[0, 2, 1], [0, 1, 2]])


def test_empathy_reward_is_the_product():
    def reward(*mechanisms):
        return identifiers.empathy_reward(LOG_PROBS, TARGETS, mechanisms=mechanisms)

    what = "the product of the targets' probabilities: .7 * .6 * .5 and .0625 * .333 * .05"
    expected = [0.21, 0.0625 / 3 * 0.05]
    check(what, identifiers.empathy_reward(LOG_PROBS, TARGETS), expected)
    check("of ER and EX only: .7 * .5", reward("er", "ex"), [0.35, 0.0625 * 0.05])
    check("of none: exp(0)", reward(), [1.0, 1.0])


def test_empathy_reward_ordinal():
    """E|level - target| is .2 + 2 * .1 = .4, 2 * .1 + .3 = .5 and .25 + .25 = .5; of the
    second response 1.8125, 2/3 and 2 * .9 + .05 = 1.85."""
    all_three = identifiers.empathy_reward(LOG_PROBS, TARGETS, "ordinal")
    expected = [math.exp(-1.4), math.exp(-1.8125 - 2 / 3 - 1.85)]
    check("exp(-(.4 + .5 + .5)) and exp(-(1.8125 + .667 + 1.85))", all_three, expected)
    one = identifiers.empathy_reward(LOG_PROBS, TARGETS, "ordinal", ["ip"])
    check("of IP only", one, [math.exp(-0.5), math.exp(-2 / 3)])


def test_empathy_reward_is_expected_over_uncertain_targets():
    """P(target) = (.5, .5, 0), certain 2, (0, 0, 1): (.5 * .7 + .5 * .2) * .6 * .25; and
    half of each of the two."""
    target = torch.tensor([[[0.5, 0.5, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]])
    one = LOG_PROBS[:1]
    check("cross-entropy", identifiers.empathy_reward(one, target), [0.45 * 0.6 * 0.25])
    for difference in ("cross_entropy", "ordinal"):
        both = []
        for level in (0, 1):
            certain = torch.tensor([[level, 2, 2]])
            both.append(identifiers.empathy_reward(one, certain, difference))
        expected = identifiers.empathy_reward(one, target, difference)
        check("half of each", expected, sum(both) / 2)


def test_empathy_reward_unknown_difference():
    with pytest.raises(ValueError, match="manhattan"):
        identifiers.empathy_reward(LOG_PROBS, TARGETS, "manhattan")


def test_reward_asks_the_identifiers():
    seen = []

    def fake(context, response):
        seen.append((context, response, torch.is_grad_enabled()))
        return LOG_PROBS

    def reward(**settings):
        asked = identifiers.EmpathyReward(fake, RewardConfig(**settings))
        return asked(CONTEXT[:2], RESPONSE[:2], TARGETS)

    check("all three, as the paper has it", reward(), [0.21, 0.0625 / 3 * 0.05])
    context, response, with_gradient = seen[0]
    assert torch.equal(context, CONTEXT[:2]) and torch.equal(response, RESPONSE[:2])
    assert not with_gradient, "the reward needs no gradient"
    ordinal = reward(difference="ordinal", mechanisms="er")
    check("ordinal, ER only", ordinal, [math.exp(-0.4), math.exp(-1.8125)])
    two = reward(mechanisms="er,ex")
    check("two of them, with commas", two, [0.35, 0.0625 * 0.05])


@pytest.mark.parametrize("uncertain", [False, True])
def test_best_of(uncertain):
    """The response with the highest reward, context by context; of equal ones the first."""
    generator = torch.Generator().manual_seed(0)
    context = torch.zeros(20, 2, dtype=torch.long)
    tries = []
    for _ in range(5):
        response = torch.randint(3, 6, (20, 4), generator=generator)
        tries.append(Pairs(context, response, None))
    targets = torch.randint(3, (20, 3), generator=generator)
    if uncertain:
        targets = torch.rand(20, 3, 3, generator=generator)

    reward = identifiers.EmpathyReward(LevelsInResponse(), RewardConfig())
    best = reward.best_of(tries, targets)
    chosen = []
    for row in range(20):
        rewards = []
        for one in tries:
            log_probs = LevelsInResponse()(None, one.responses[row : row + 1])
            earned = identifiers.empathy_reward(log_probs, targets[row : row + 1])
            rewards.append(earned.item())
        first = rewards.index(max(rewards))
        assert torch.equal(best.responses[row], tries[first].responses[row]), f"row {row}"
        chosen.append(first)
    assert {*chosen} == {0, 1, 2, 3, 4}, "not every try is the best of one"
    assert torch.equal(best.context, context)


def test_a_level_that_is_never_expected_stays_so_balanced():
    """A classifier that has diverged is certain: the shares of two levels are 0."""
    probs = torch.tensor([[[1.0, 0.0, 0.0]]])
    for exponent in (0.5, 1.0, 2.0):
        found = identifiers.balanced(probs, torch.tensor([[1.0, 0.0, 0.0]]), exponent)
        check("balanced", found, probs)


def test_balanced_by_hand():
    """P .6, .3, .1 over shares .8, .1, .1: to the power 1, .75, 3, 1 -> / 4.75; to the power 0
    nothing changes."""
    probs, share = torch.tensor([[[0.6, 0.3, 0.1]]]), torch.tensor([[0.8, 0.1, 0.1]])
    one = identifiers.balanced(probs, share, 1.0)
    check("exponent 1", one, [[[0.75 / 4.75, 3 / 4.75, 1 / 4.75]]])
    check("exponent 0", identifiers.balanced(probs, share, 0.0), probs)
    half = identifiers.balanced(probs, share, 0.5)
    check("exponent 1/2", half, F.normalize(probs / share.sqrt(), p=1, dim=-1))


def test_targets_from_contexts():
    """P .6, .3, .1 over shares .8, .1, .1: the likeliest level is 0, and balanced it is 1."""
    probs, share = torch.tensor([[[0.6, 0.3, 0.1]]]), torch.tensor([[0.8, 0.1, 0.1]])

    def targets(**settings):
        return identifiers.targets_from_contexts(RewardConfig(**settings), probs, share)

    check("expected: as the context tells", targets(target="expected"), probs)
    balanced = targets(target="expected", balance=1.0)
    check("balanced", balanced, [[[0.75 / 4.75, 3 / 4.75, 1 / 4.75]]])
    check("the likeliest, certain", targets(target="likeliest"), [[[1.0, 0.0, 0.0]]])
    likeliest = targets(target="likeliest", balance=1.0)
    check("the likeliest of the balanced", likeliest, [[[0.0, 1.0, 0.0]]])


# ---- measures of levels --------------------------------------------------------------------

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


def column(levels):
    """Levels of one mechanism, (N, 1)."""
    return torch.tensor(levels)[:, None]


def test_confusions():
    gold, predicted, *_ = F1_CASES["all levels"]
    table = [[3, 1, 1], [1, 2, 0], [0, 1, 1]]
    got = identifiers.confusions(column(predicted), column(gold))
    check("rows gold, columns predicted", got, [table])
    both = torch.tensor([gold, predicted]).T
    same = torch.tensor([predicted, predicted]).T
    expected = [table, [[4, 0, 0], [0, 4, 0], [0, 0, 2]]]
    check("a table for each mechanism", identifiers.confusions(same, both), expected)


@pytest.mark.parametrize("case", F1_CASES)
def test_f1_scores(case):
    gold, predicted, accuracy, macro, weighted = F1_CASES[case]
    table = torch.zeros(3, 3, dtype=torch.long)
    for g, p in zip(gold, predicted):
        table[g, p] += 1
    got = identifiers.f1_scores(table)
    expected = {"accuracy": accuracy, "macro_f1": macro, "weighted_f1": weighted}
    for name, number in expected.items():
        what = f"{name} of gold {gold}, predicted {predicted} (scikit-learn's)"
        check(what, float(got[name]), number, tol=1e-6)


def test_f1_scores_of_many_tables():
    """Counts of shape (2, 2, 3, 3), integers and floats; one of them has no counts at all, one
    a single one, and in one a level occurs only once, in gold."""
    table, nothing = [[3, 1, 1], [1, 2, 0], [0, 1, 1]], [[0] * 3] * 3
    single, rare = [[0, 0, 0], [0, 1, 0], [0, 0, 0]], [[3, 0, 0], [0, 2, 0], [1, 0, 0]]
    counts = torch.tensor([[table, nothing], [single, rare]])
    of_rare = 6 / 7  # its F1s are 6/7, 1 and 0
    expected = {
        "accuracy": [[0.6, 0.0], [1.0, 5 / 6]],
        "macro_f1": [[0.5793650794, 0.0], [1.0, (of_rare + 1) / 3]],
        "weighted_f1": [[0.6047619048, 0.0], [1.0, (3 * of_rare + 2) / 6]],
    }
    for given in (counts, counts.float()):
        got = identifiers.f1_scores(given)
        for name, numbers in expected.items():
            what = f"{name} of four tables; of one without counts it is 0"
            check(what, torch.as_tensor(got[name]), numbers)


def test_emp_f1():
    """The mean of the mechanisms' F1s, each over the whole corpus."""
    cases = [F1_CASES[name] for name in ("2 in neither", "2 only in gold", "constant")]
    gold = torch.tensor([case[0] for case in cases]).T
    predicted = torch.tensor([case[1] for case in cases]).T
    weighted = identifiers.emp_f1(predicted, gold)
    check("weighted", weighted, (2 / 3 + 0.5333333333 + 1 / 6) / 3, tol=1e-7)
    macro = identifiers.emp_f1(predicted, gold, "macro_f1")
    check("macro", macro, (0.625 + 0.5333333333 + 1 / 6) / 3, tol=1e-7)
    accuracy = identifiers.emp_f1(predicted, gold, "accuracy")
    check("accuracy", accuracy, (2 / 3 + 2 / 3 + 1 / 3) / 3, tol=1e-7)
    check("of gold itself", identifiers.emp_f1(gold, gold), 1.0)


def test_mutual_information():
    gold = column([0, 0, 0, 1, 1, 1])
    constant = torch.zeros_like(gold)
    same = column([0, 0, 0, 0, 1, 1, 2, 2])
    independent = column([0, 1, 0, 1] * 3), column([0, 0, 1, 1] * 3)

    def bits(predicted, gold):
        counts = identifiers.confusions(predicted, gold)
        return identifiers.mutual_information(counts)

    check("a constant policy", bits(constant, gold), [0.0], tol=1e-7)
    check("independent", bits(*independent), [0.0], tol=1e-7)
    check("identical: the entropy of 1/2, 1/4, 1/4", bits(same, same), [1.5], tol=1e-7)
    check("a relabelling loses nothing", bits((same + 1) % 3, same), [1.5], tol=1e-7)
    mostly = bits(column([0, 0, 1, 0, 1, 1]), gold)
    check("2/3 right: 2/3 log2 4/3 + 1/3 log2 2/3", mostly, [0.0817042], tol=1e-6)
    three = torch.cat([same, torch.zeros_like(same), same], 1)
    check("each mechanism by itself", bits(three, three), [1.5, 0.0, 1.5], tol=1e-7)
    figures = identifiers.compare_levels(three, three)
    check("mean over the mechanisms", figures["mutual_information"], 1.0, tol=1e-7)


def systems(count, gain, seed=0):
    """Gold levels, a system that is right half of the time, and one that mends a share of its
    mistakes."""
    generator = torch.Generator().manual_seed(seed)

    def chance(share):
        return torch.rand(count, 3, generator=generator) < share

    def levels():
        return torch.randint(3, (count, 3), generator=generator)

    gold = levels()
    before = torch.where(chance(0.5), gold, levels())
    return gold, before, torch.where(chance(gain), gold, before)


@pytest.mark.parametrize("kind", ["weighted_f1", "macro_f1"])
def test_weighted_emp_f1_is_the_plain_loop(kind):
    """A context that counts three times is one that stands there three times."""
    gold, before, _ = systems(40, 0.0)
    times = torch.randint(0, 4, (6, 40), generator=torch.Generator().manual_seed(1))
    expected = []
    for row in times:
        rows = torch.arange(40).repeat_interleave(row)
        expected.append(identifiers.emp_f1(before[rows], gold[rows], kind))
    got = identifiers.weighted_emp_f1(before, gold, times.float(), kind)
    assert got.tolist() == pytest.approx(expected, rel=1e-12), "one for each row of times"
    assert len({*expected}) == 6


GAIN = ("relative", "low", "high")


def test_paired_bootstrap():
    gold, before, after = systems(40, 0.6)

    def gain(old, new, resamples=50, **settings):
        settings = {"resamples": resamples, **settings}
        return identifiers.paired_bootstrap(old, new, gold, gold, **settings)

    same = gain(before, before)
    what = "two identical systems: gain and interval"
    check(what, [same[name] for name in GAIN], [0.0, 0.0, 0.0])
    got = gain(before, after)
    old, new = identifiers.emp_f1(before, gold), identifiers.emp_f1(after, gold)
    check("relative gain", got["relative"], (new - old) / old)
    assert 0 < got["low"] < got["relative"] < got["high"], f"a clear gain: {got}"
    assert got == gain(before, after), "the same seed gives another interval"
    other = gain(before, after, seed=1)
    assert other["low"] != got["low"], "another seed gives the same interval"
    check("and the same gain", other["relative"], got["relative"])
    assert gain(after, before)["high"] < 0, "a clear loss has an interval below 0"

    one = gain(before, after, resamples=1)
    check("of one resample both percentiles are its gain", one["high"], one["low"])
    wrong = (gold + 1) % 3
    figures = gain(wrong, gold)
    check("nothing right before: 1 / 1e-9", figures["relative"], 1e9)


def test_paired_bootstrap_is_the_exact_interval():
    """Three contexts have 27 resamples, all as likely. The worst and the best are each one
    context three times: 1/27, or 3.7 %, is between 2.5 % and 5 %, so they end the interval."""
    before = torch.tensor([[1, 1, 0], [2, 0, 1], [2, 0, 0]])
    after = torch.tensor([[0, 2, 2], [1, 0, 1], [2, 1, 2]])
    gold_before = torch.tensor([[0, 2, 0], [2, 1, 2], [0, 0, 1]])
    gold_after = torch.tensor([[0, 2, 0], [1, 1, 2], [0, 0, 1]])
    tables = before, after, gold_before, gold_after
    got = identifiers.paired_bootstrap(*tables, resamples=4000, seed=3)
    # e.g. the last context: 1 of 3 levels right before, none of 3 after
    what = "percentiles of the gains of resamples, both systems drawn alike"
    check(what, [got["low"], got["high"]], [-1.0, 1.0])
    check("the gain of the contexts as they are", got["relative"], 2 / 3)


def test_paired_bootstrap_is_the_plain_loop():
    """Loops with another generator give the same interval up to chance. Both systems must see
    the same draw; each may come with its own table of gold levels."""
    gold_after, before, after = systems(60, 0.25, seed=1)
    before, after, gold = before.flip(0), after.flip(0), gold_after.flip(0)
    gold_after = gold.clone()
    gold[:5, 0] = (gold[:5, 0] + 1) % 3
    dice, gains = random.Random(5), []
    for _ in range(1000):
        rows = torch.tensor([dice.randrange(60) for _ in range(60)])
        old = identifiers.emp_f1(before[rows], gold[rows])
        new = identifiers.emp_f1(after[rows], gold_after[rows])
        gains.append((new - old) / old)
    gains.sort()
    low, high = gains[25], gains[974]
    got = identifiers.paired_bootstrap(before, after, gold, gold_after, resamples=4000)
    what = f"expected about [{low:.3f}, {high:.3f}], got {got}"
    off = max(abs(got["low"] - low), abs(got["high"] - high))
    assert off < 0.15 * (high - low), what


IN_ONE_PIECE = {  # contexts: figures noted down from a version that drew all resamples at once
    40: (-0.04635851490967336, -0.3754295022073759, 0.4348363009359203),
    600: (0.04791071619869397, -0.0444052624824635, 0.1520600959325762),
}


@pytest.mark.parametrize("count", IN_ONE_PIECE)
def test_paired_bootstrap_in_pieces(count):
    """The figures are those of one piece, to the last bit."""
    generator = torch.Generator().manual_seed(count)
    tables = [torch.randint(3, (count, 3), generator=generator) for _ in range(3)]
    before, after, gold = tables
    got = identifiers.paired_bootstrap(before, after, gold, gold)
    assert got == dict(zip(GAIN, IN_ONE_PIECE[count]))


def test_paired_bootstrap_needs_little_memory(monkeypatch):
    """Not 0.1 MB a context at once."""
    gold, before, after = systems(20_000, 0.4)
    drawn, plain = [], torch.randint

    def spy(*arguments, **options):
        numbers = plain(*arguments, **options)
        drawn.append(numbers.numel())
        return numbers

    monkeypatch.setattr(torch, "randint", spy)
    identifiers.paired_bootstrap(before, after, gold, gold, resamples=60)
    assert sum(drawn) == 60 * 20_000
    assert max(drawn) < 300_000


def test_compare_levels_by_hand():
    gold = torch.tensor([[0, 0, 0], [1, 1, 1], [2, 2, 2], [0, 1, 2]])
    same = identifiers.compare_levels(gold, gold)
    for name in ("emp_f1", "emp_macro_f1", "exact_match", "emp_f1_ex"):
        assert same[name] == 1, name
    one_off = gold.clone()
    one_off[3, 2] = 0  # ex: gold 0 1 2 2, predicted 0 1 2 0
    figures = identifiers.compare_levels(one_off, gold)
    check("three of four responses are right in all", figures["exact_match"], 0.75)
    untouched = [figures["emp_f1_er"], figures["emp_f1_ip"]]
    check("ER and IP are untouched", untouched, [1.0, 1.0])
    what = "EX: F1 of levels 0, 1, 2 is 2/3, 1, 2/3, with shares 1/4, 1/4, 1/2"
    ex = 2 / 3 / 4 + 1 / 4 + 2 / 3 / 2
    check(what, figures["emp_f1_ex"], ex)
    check("their mean", figures["emp_f1"], (2 + ex) / 3)


def test_ceiling_by_hand():
    gold = torch.tensor([[0, 1, 2]] * 300 + [[1, 2, 0]] * 300)
    certain = F.one_hot(gold, 3).float()
    assert identifiers.ceiling(certain, gold) == {"best": 1.0, "mle_ideal": 1.0}

    other = F.one_hot((gold + 1) % 3, 3)
    ceiling = identifiers.ceiling(0.5 * certain + 0.5 * other + 1e-4 * certain, gold)
    check("the likeliest level is the gold one", ceiling["best"], 1.0)
    # A mechanism has two levels in gold, each of 300: TP 150. The level sampled by mistake for
    # the other adds 150 or 0 to its count.
    expected = (300 / 600 + 300 / 450) / 2
    check("sampling is right half of the time", ceiling["mle_ideal"], expected, tol=0.02)


# ---- measures of text ----------------------------------------------------------------------


def test_distinct():
    texts = [text.split() for text in ("i am so sorry", "i am so happy for you", "sorry")]
    check("7 different words of 11", identifiers.distinct(texts, 1), 100 * 7 / 11)
    what = "6 different pairs of 8, none across responses"
    check(what, identifiers.distinct(texts, 2), 100 * 6 / 8)
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
    split = [text.split() for text in responses]
    got = identifiers.bleu(split, [text.split() for text in references])
    what = f"BLEU of {responses} against {references} (sacrebleu's)"
    check(what, got, expected, tol=1e-7)


def test_text_figures_by_hand():
    texts = ["I see.", "I see.", "Oh no, I see!"]
    figures = identifiers.text_figures(texts, ["I see.", "Go on.", "Oh no, I see!"])
    assert identifiers.words("Don't  STOP, now!") == ["don", "'", "t", "stop", ",", "now", "!"]
    check("words and marks a response", figures["length"], (3 + 3 + 6) / 3)
    check("two of three differ", figures["unique"], 2 / 3)
    check("i see . oh no , ! are 7 of 12", figures["dist1"], 100 * 7 / 12)
    what = "i-see see-. oh-no no-, ,-i see-! are 6 of 9"
    check(what, figures["dist2"], 100 * 6 / 9)
