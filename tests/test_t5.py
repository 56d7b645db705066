"""t5_small.py, against transformers (fixtures/parity) and against figures made by hand."""

import json
import math
import random
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import t5_small
from conftest import check
from t5_small import CheckpointError, Optimizer, Sampling, T5Config, TrainConfig, Trainer
from tests.tools import ragged, tiny_t5

PARITY = Path(__file__).parent / "fixtures" / "parity"
VERSIONS = ("t5_v10", "t5_v11")
LEFTOVER = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
COPIES = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}


def favour(model, token, amount):
    """The model, with `amount` added to one token's logit."""
    plain = model.logits
    bonus = amount * F.one_hot(torch.tensor(token), model.config.vocab_size)

    def logits(states):
        return plain(states) + bonus

    model.logits = logits
    return model


def unfinished(ids):
    """(B, T) bool: t1 .. the first </s>, by a plain loop."""
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for b, row in enumerate(ids.tolist()):
        for t, token in enumerate(row):
            mask[b, t] = True
            if token == 1:
                break
    return mask


def tensors_of(folder):
    return torch.load(folder / "pytorch_model.bin", weights_only=True)


def config_of(folder):
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def write_config(folder, raw):
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")


def copy_of_fixture(folder, change=None, **config):
    """v1.0's checkpoint, its tensors changed by change(state), and some settings."""
    write_config(folder, {**config_of(PARITY / "t5_v10"), **config})
    state = tensors_of(PARITY / "t5_v10")
    if change:
        change(state)
    torch.save(state, folder / "pytorch_model.bin")


def expected_of(folder):
    return torch.load(folder / "expected.pt", weights_only=True)


def same_logits(model, expected, tol=1e-4):
    """Our logits are transformers', wherever there is a token."""
    source, labels = expected["source"], expected["labels"]
    with torch.no_grad():
        logits = model.logits(model.response_states(source, labels))
    error = (logits - expected["logits"])[labels != 0].abs().max().item()
    assert error < tol, f"logits differ from transformers' by up to {error:.1e}"


# ---- parity with transformers ---------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_parity_logits_and_loss(version):
    model = t5_small.from_pretrained(PARITY / version).eval()
    expected = expected_of(PARITY / version)
    source, labels = expected["source"], expected["labels"]
    assert (source == 0).any() and (labels == 0).any(), "there must be padding on both sides"
    same_logits(model, expected)
    with torch.no_grad():
        loss, tokens = model.loss_sum(source, labels)
    assert tokens == (labels != 0).sum()
    check("mean loss of a token", loss / tokens, expected["loss"])


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name, min_length", [("greedy", 1), ("greedy_min_6", 6)])
def test_parity_greedy_token_for_token(version, name, min_length):
    model = t5_small.from_pretrained(PARITY / version).eval()
    expected = expected_of(PARITY / version)
    sampling = Sampling(greedy=True, min_length=min_length, max_length=12)
    ids = t5_small.generate(model, expected["source"], sampling).ids
    theirs = expected[name].tolist()
    assert ids.tolist() == theirs, f"transformers generates {theirs}"


def test_parity_fixture_is_official_and_demanding():
    """The files have what official ones have and we do without; v1.1 has a head of its own."""
    v10, v11 = (tensors_of(PARITY / version) for version in VERSIONS)
    assert LEFTOVER in v10
    assert COPIES <= v10.keys() and COPIES <= v11.keys()
    assert not torch.equal(v11["lm_head.weight"], v11["shared.weight"])
    assert sum(path.stat().st_size for path in PARITY.rglob("*.*")) < 250_000


# ---- the parts of the model -----------------------------------------------------------------


# distance: bucket of a key that is before the query; 8 + floor(8 ln(d / 8) / ln 16) from 8 on
BUCKETS = {0: 0, 1: 1, 7: 7, 8: 8, 11: 8, 12: 9, 15: 9, 16: 10, 22: 10, 23: 11, 31: 11, 32: 12}
BUCKETS |= {45: 12, 46: 13, 63: 13, 64: 14, 90: 14, 91: 15, 127: 15, 128: 15, 1000: 15}


def test_relative_position_bucket():
    """Bidirectional: 16 a side, 8 of them exact. Causal: 32, 16 of them exact."""
    bucket = t5_small.relative_position_bucket
    distances, table = torch.tensor([*BUCKETS]), torch.tensor([*BUCKETS.values()])
    before = bucket(-distances, bidirectional=True)
    check(f"bidirectional, key before query by {[*BUCKETS]}", before, table)
    after = bucket(distances, bidirectional=True)
    check(
        f"bidirectional, key after query by {[*BUCKETS]}", after, table + 16 * (distances > 0)
    )

    causal = torch.tensor([0, 1, 15, 16, 18, 19, 20, 21, 26, 27, 112, 113, 127, 128, 1000])
    check(
        f"causal, key before query by {causal.tolist()}",
        bucket(-causal, bidirectional=False),
        [0, 1, 15, 16, 16, 17, 17, 18, 19, 20, 30, 31, 31, 31, 31],
    )
    check("causal, key after query", bucket(causal, bidirectional=False), [0] * 15)

    small = torch.tensor([[0, -1, -2, -3, -4, -5], [1, 2, 3, 6, -6, -20]])
    check(
        "8 buckets, maximum 12, bidirectional, of shape (2, 6)",
        bucket(small, True, num_buckets=8, max_distance=12),
        [[0, 1, 2, 2, 2, 3], [5, 6, 6, 7, 3, 3]],
    )


@pytest.mark.parametrize("query, key", [(5, 5), (5, 3), (11, 0), (3, 5)])
def test_position_bias_is_key_minus_query(query, key):
    model = tiny_t5(relative_attention_num_buckets=32, relative_attention_max_distance=128)
    relative = torch.tensor(key - query)
    for stack, bidirectional in ((model.encoder, True), (model.decoder, False)):
        bias = stack.position_bias(12)
        assert bias.shape == (1, 2, 12, 12)
        bias = bias[0, :, query, key]
        if not bidirectional and key > query:
            assert (bias <= -1e8).all(), "the decoder sees the future"
            continue
        bucket = t5_small.relative_position_bucket(relative, bidirectional)
        check(f"bias of query {query}, key {key}", bias, stack.relative_bias.weight[bucket])


def test_rms_norm():
    norm = t5_small.RMSNorm(4, eps=1e-6)
    norm.weight.data = torch.tensor([1.0, 2.0, 1.0, -1.0])
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 5.0, 5.0, 5.0]])  # rms sqrt(30 / 4) and 5
    check(
        "RMSNorm of [1, 2, 3, 4] and [5, 5, 5, 5], weight [1, 2, 1, -1]: no mean is subtracted",
        norm(x),
        [[0.365148, 1.460593, 1.095445, -1.460593], [1.0, 2.0, 1.0, -1.0]],
    )
    check("epsilon keeps zeros finite", norm(torch.zeros(1, 4)), [[0.0] * 4])
    norm.eps = 3.0
    check(
        "epsilon 3 is added to the mean of squares: 1 / sqrt(1 + 3)",
        norm(torch.ones(1, 4)),
        [[0.5, 1.0, 0.5, -0.5]],
    )
    norm.eps = 0.0
    both = torch.tensor([[[1.0, 1.0, 1.0, 1.0], [2.0, -2.0, 2.0, -2.0]]])
    what = "of shape (1, 2, 4): each position has its own root mean square, 1 and 2"
    check(what, norm(both), [[[1.0, 2.0, 1.0, -1.0], [1.0, -2.0, 1.0, 1.0]]])


def test_rms_norm_is_learnt_and_in_float32():
    norm = t5_small.RMSNorm(2, eps=0.0)
    large = torch.tensor([[300.0, 400.0]]).half()  # their squares are above float16's limit
    got = norm(large)
    check("300 and 400 in float16", got, [[300 / 353.55339, 400 / 353.55339]])
    assert got.dtype == torch.float32, f"RMSNorm of float16 returns {got.dtype}, not float32"

    x = torch.tensor([[3.0, 4.0]], requires_grad=True)
    norm(x)[0, 0].backward()
    what = "gradient of y_1 by x: 1 / rms - x_1^2 / (2 rms^3), -x_1 x_2 / (2 rms^3)"
    check(what, x.grad, [[0.181019, -0.135765]])
    check("gradient of y_1 by the weight: x_1 / rms", norm.weight.grad, [0.848528, 0.0])


def test_attention_one_head():
    """q = k = v = o = identity: softmax(1, 0.5) = (.622, .378) of plain products, no scaling."""
    config = T5Config(d_model=2, d_kv=2, num_heads=1, dropout_rate=0.0)
    attention = t5_small.Attention(config)
    for linear in (attention.q, attention.k, attention.v, attention.o):
        linear.weight.data = torch.eye(2)
    x = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    memory = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [9.0, 9.0]]])
    bias = torch.tensor([0.0, 0.5, -1e9]).view(1, 1, 1, 3)  # the third position is padding
    check(
        "one head over two positions and a hidden third",
        attention(x, attention.keys_values(memory), bias),
        [[[0.622459, 0.377541], [0.075858, 0.924142]]],
    )


def attention_of_one_query(attention, x, memory, bias, head):
    """What one head of two columns makes of x (D,), memory (S, D) and bias (S,), in plain sums."""
    rows = slice(2 * head, 2 * head + 2)
    query = attention.q.weight[rows] @ x
    keys = memory @ attention.k.weight[rows].T
    values = memory @ attention.v.weight[rows].T
    weights = torch.exp(keys @ query + bias)
    return weights @ values / weights.sum()


def same_gradients(what, module, got, expected):
    """The sum of both has the same gradient by all weights of a module."""
    weights = [*module.parameters()]
    ours = torch.autograd.grad(got.sum(), weights, allow_unused=True)
    theirs = torch.autograd.grad(expected.sum(), weights, allow_unused=True)
    for (name, weight), one, other in zip(module.named_parameters(), ours, theirs):
        one = torch.zeros_like(weight) if one is None else one
        check(f"{what}: gradient by {name}", one, other)


def test_attention_many_heads():
    """Against plain loops over batch, query and head; the inner width is not d_model."""
    torch.manual_seed(1)
    config = T5Config(d_model=6, d_kv=2, num_heads=2, dropout_rate=0.0)
    attention = t5_small.Attention(config)
    x, memory = torch.randn(2, 3, 6), torch.randn(2, 5, 6)
    bias = torch.randn(2, 2, 3, 5)
    bias[1, :, :, 3:] = -1e9
    expected = torch.zeros(2, 3, 6)
    for b in range(2):
        for t in range(3):
            one, two = (
                attention_of_one_query(attention, x[b, t], memory[b], bias[b, h, t], h)
                for h in range(2)
            )
            expected[b, t] = attention.o.weight @ torch.cat([one, two])
    got = attention(x, attention.keys_values(memory), bias)
    check("two heads", got, expected)
    same_gradients("two heads", attention, got, expected)


def test_attention_weights():
    """q = identity: softmax(1, 0) = (.731, .269), whose derivatives are +- .731 * .269."""
    config = T5Config(d_model=2, d_kv=2, num_heads=1, dropout_rate=0.5)
    attention = t5_small.Attention(config)
    attention.q.weight.data = torch.eye(2)
    x, keys = torch.tensor([[[1.0, 0.0]]]), torch.eye(2)[None, None]
    weights = attention.weights(x, keys, torch.zeros(1, 1, 1, 2))
    check("softmax(1, 0): no scaling, no dropout", weights, [[[[0.731059, 0.268941]]]])
    weights[..., 0].sum().backward()
    what = "gradient of the first weight by q"
    check(what, attention.q.weight.grad, [[0.196612, 0.0], [-0.196612, 0.0]])

    attention = attention.bfloat16().eval()
    x, keys = x.bfloat16(), keys.bfloat16()
    bias = torch.zeros(1, 1, 1, 2).bfloat16()
    weights = attention.weights(x, keys, bias)
    assert weights.dtype == torch.float32, "softmax of bfloat16 is taken in float32"
    check("and is as exact", weights, [[[[0.731059, 0.268941]]]])
    values = attention.keys_values(torch.ones(1, 2, 2).bfloat16())
    got = attention(x, values, bias)
    assert got.dtype == torch.bfloat16, f"forward in bfloat16 returns {got.dtype}"


def test_attention_drops_weights_in_training():
    """Equal scores over 8 positions whose values are the unit vectors: each column of what comes
    out is one weight, 1/8; in training a half of them is dropped, and the others are 1/4."""
    config = T5Config(d_model=8, d_kv=8, num_heads=1, dropout_rate=0.5)
    attention = t5_small.Attention(config)
    attention.q.weight.data.zero_()
    for linear in (attention.k, attention.v, attention.o):
        linear.weight.data = torch.eye(8)
    x, bias = torch.ones(1, 16, 8), torch.zeros(1, 1, 1, 8)
    keys_values = attention.keys_values(torch.eye(8)[None])

    whole = attention.eval()(x, keys_values, bias)
    check("in eval mode nothing is dropped", whole, torch.full((1, 16, 8), 1 / 8))
    dropped = attention.train()(x, keys_values, bias)
    share = (dropped == 0).float().mean().item()
    assert 0.25 < share < 0.75, f"in training {share:.0%} of the weights are dropped, not half"
    kept = dropped[dropped != 0]
    check("the weights that are kept count twice", kept, torch.full_like(kept, 1 / 4))


def test_padding_bias():
    bias = t5_small.padding_bias(torch.tensor([[5, 1, 0], [7, 8, 1]]))
    what = "-1e9 on padding, 0 elsewhere, of shape (B, 1, 1, S)"
    check(what, bias, [[[[0.0, 0.0, -1e9]]], [[[0.0, 0.0, 0.0]]]])
    other = t5_small.padding_bias(torch.tensor([[5, 0, 3]]), pad_id=5)
    check("another padding id", other, [[[[-1e9, 0.0, 0.0]]]])


def block_of(is_decoder):
    """A block of random weights, the norms' included, without dropout."""
    torch.manual_seed(1)
    config = T5Config(d_model=6, d_kv=2, num_heads=2, d_ff=8, dropout_rate=0.0)
    block = t5_small.Block(config, is_decoder)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return block


def block_by_hand(block, x, self_bias, memory, memory_bias):
    h = block.self_norm(x)
    x = x + block.self_attn(h, block.self_attn.keys_values(h), self_bias)
    if block.is_decoder:
        keys_values = block.cross_attn.keys_values(memory)
        x = x + block.cross_attn(block.cross_norm(x), keys_values, memory_bias)
    return x + block.ff(block.ff_norm(x))


def test_block_by_hand():
    torch.manual_seed(2)
    x, memory = torch.randn(2, 3, 6), torch.randn(2, 5, 6)
    biases = torch.randn(1, 2, 3, 3), torch.randn(2, 1, 1, 5)
    for is_decoder in (False, True):
        block = block_of(is_decoder)
        expected = block_by_hand(block, x, biases[0], memory, biases[1])
        if is_decoder:
            got = block(x, biases[0], memory, biases[1])
        else:
            got = block(x, biases[0])
        what = "a decoder's block" if is_decoder else "an encoder's block"
        check(what, got, expected)
        same_gradients(what, block, got, expected)


def test_block_with_a_cache():
    """Token by token it gives what it gives for all tokens at once, the future hidden."""
    torch.manual_seed(2)
    x, memory = torch.randn(2, 3, 6), torch.randn(2, 5, 6)
    future = torch.ones(3, 3).triu(1) * -1e9
    self_bias, memory_bias = torch.randn(1, 2, 3, 3) + future, torch.randn(2, 1, 1, 5)
    block = block_of(True)
    expected = block_by_hand(block, x, self_bias, memory, memory_bias)
    cache = t5_small.BlockCache(block, memory)
    for t in range(3):
        row = self_bias[:, :, t : t + 1, : t + 1]
        got = block(x[:, t : t + 1], row, None, memory_bias, cache)
        check(f"token {t}, with a cache", got, expected[:, t : t + 1])


def test_block_drops_in_training():
    """What a branch adds is dropped or doubled; the other branches are made to add nothing."""
    x, memory = torch.randn(2, 3, 6), torch.randn(2, 5, 6)
    arguments = (x, torch.zeros(1, 2, 3, 3), memory, torch.zeros(2, 1, 1, 5))
    ends = {"self_attn": "o", "cross_attn": "o", "ff": "wo"}
    for branch in ends:
        block = block_of(True)
        for other, end in ends.items():
            if other != branch:
                getattr(getattr(block, other), end).weight.data.zero_()
        whole = block.eval()(*arguments) - x
        block.dropout.p = 0.5
        check(f"{branch} in eval mode", block(*arguments) - x, whole)
        dropped = block.train()(*arguments) - x
        kept = dropped.abs() > 1e-6
        assert not kept.all(), f"nothing that {branch} adds is dropped in training"
        assert kept.any(), f"all that {branch} adds is dropped in training"
        check(f"what is kept of {branch}, doubled", dropped[kept], 2 * whole[kept])


def test_initialisation():
    model = tiny_t5(
        d_model=64, d_kv=8, num_heads=4, d_ff=128, vocab_size=200, tie_word_embeddings=False
    )
    block = model.decoder.blocks[0]
    for name, layer, std in (
        ("shared", model.shared, 1),
        ("lm_head", model.lm_head, 1),
        ("q", block.self_attn.q, 512**-0.5),
        ("k", block.self_attn.k, 64**-0.5),
        ("cross v", block.cross_attn.v, 64**-0.5),
        ("o", block.cross_attn.o, 32**-0.5),
        ("wi", block.ff.wi, 64**-0.5),
        ("wo", block.ff.wo, 128**-0.5),
        ("relative_bias", model.decoder.relative_bias, 64**-0.5),
    ):
        found = layer.weight.std().item()
        five_sigma = 5 / math.sqrt(2 * layer.weight.numel())
        assert abs(found / std - 1) < five_sigma, f"std of {name}: {found:.4f}, not {std:.4f}"
    assert torch.equal(block.ff_norm.weight, torch.ones(64))


def test_tied_head_is_scaled():
    model, states = tiny_t5(), torch.randn(3, 16)
    expected = states / 4 @ model.shared.weight.T
    check("v1.0: states D^-1/2 times the embedding", model.logits(states), expected)


def test_dropout():
    torch.manual_seed(0)
    drop = t5_small.Dropout(0.1)  # 26 of 256 dropped, the rest times 256 / 230
    x = torch.ones(100, 1003, requires_grad=True)
    y = drop(x)
    kept = y != 0
    check("kept elements are scaled so that the mean stays", y[kept].unique(), [256 / 230])
    dropped = (~kept).float().mean().item()
    deviation = math.sqrt(26 / 256 * 230 / 256 / x.numel())
    assert abs(dropped - 26 / 256) < 5 * deviation, "share dropped"
    assert (kept.float().mean(0) < 1).float().mean() > 0.99, "some columns are never dropped"
    neighbours = (kept[:, 1:] & kept[:, :-1]).float().mean()
    assert abs(neighbours - (230 / 256) ** 2) < 0.005, "neighbours are not independent"
    y.sum().backward()
    check("the gradient goes through the same mask", x.grad, y)
    assert not torch.equal(drop(x), y), "the mask must be drawn anew each time"
    drop.eval()
    assert torch.equal(drop(x), x)
    half = t5_small.Dropout(0.5)(torch.ones(10001)) != 0
    assert abs(half.float().mean() - 0.5) < 0.03
    assert torch.equal(t5_small.Dropout(0.0)(x), x)


def test_dropout_is_everywhere_and_only_in_training():
    model, source, response = tiny_t5(dropout_rate=0.2), ragged([5, 4]), ragged([4, 3], seed=1)
    assert model.loss_sum(source, response)[0] == model.loss_sum(source, response)[0]

    model.train()
    places = [m for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    for place in places:  # each alone must change the loss
        for other in places:
            other.p = 0.2 if other is place else 0.0
        torch.manual_seed(0)
        losses = {model.loss_sum(source, response)[0].item() for _ in range(3)}
        assert len(losses) > 1

    calls = []
    for place in places:
        place.register_forward_hook(lambda *call: calls.append(call))
    model.loss_sum(source, response)
    encoder_block = 1 + 1 + 2  # attention's weights, inside the feed-forward, each residual
    decoder_block = 2 + 1 + 3
    stacks = 2 * 2  # input and output
    assert len(calls) == 2 * encoder_block + 2 * decoder_block + stacks


# ---- the loss -------------------------------------------------------------------------------


def test_loss_is_the_sum_over_tokens():
    """Row by row, token by token, without padding."""
    model, source, response = tiny_t5(), ragged([6, 3, 4]), ragged([5, 1, 3], seed=1)
    total, tokens = model.loss_sum(source, response)
    expected = 0.0
    for s, r in zip(source, response):
        s, r = s[s != 0][None], r[r != 0]
        for t, token in enumerate(r):
            inputs = torch.cat([torch.tensor([0]), r[:t]])[None]
            logits = model.logits(model.decode(inputs, model.encode(s), s))[0, -1]
            expected -= logits.log_softmax(-1)[token].item()
    assert tokens == 9
    check("sum of -log p over the 9 tokens", total, expected, tol=1e-4)


def test_padding_columns_do_not_change_the_loss():
    model = tiny_t5(tie_word_embeddings=False)
    source, response = ragged([6, 3, 4]), ragged([5, 1, 3], seed=1)
    narrow, tokens = model.loss_sum(source, response)
    wide, tokens_too = model.loss_sum(F.pad(source, (0, 7)), F.pad(response, (0, 4)))
    check("loss with more padding", wide, narrow)
    assert tokens == tokens_too == 9


def test_decoder_is_causal_and_sees_the_context():
    model, source, response = tiny_t5(), ragged([6, 6]), ragged([5, 5], seed=1)
    changed = response.clone()
    changed[:, 3] = 29 - changed[:, 3]
    states = model.response_states(source, response)
    after_change = model.response_states(source, changed)
    check("states up to the changed token", states[:, :4], after_change[:, :4])
    assert (states[:, 4] - after_change[:, 4]).abs().max() > 1e-3

    of_another = model.response_states(source.flip(0), response)
    assert (states - of_another).abs().amax((1, 2)).min() > 1e-3, "context is not used"


# ---- sampling -------------------------------------------------------------------------------


def keeps(logits, top_k=0, top_p=1.0):
    """Which tokens filter_logits keeps, after checking that their logits are unchanged."""
    filtered = t5_small.filter_logits(logits.clone(), top_k, top_p)
    assert filtered.shape == logits.shape, f"shape {tuple(filtered.shape)}, not the logits'"
    kept = filtered > -torch.inf
    assert torch.equal(filtered[kept], logits[kept]), "kept logits must not change"
    return kept.long().tolist()


EVERYTHING = [[1, 1, 1, 1], [1, 1, 1, 1]]
LIKELIEST = [[0, 1, 0, 0], [1, 0, 0, 0]]
KEPT = [  # of probabilities (.05, .5, .15, .3) and (.4, .31, .28, .01)
    ("top_k 0 and top_p 1 keep all", 0, 1.0, EVERYTHING),
    ("top_k 1", 1, 1.0, LIKELIEST),
    ("top_k 3", 3, 1.0, [[0, 1, 1, 1], [1, 1, 1, 0]]),
    ("top_k = V", 4, 1.0, EVERYTHING),
    ("top_k > V", 9, 1.0, EVERYTHING),
    ("top_p .6: the smallest set of at least .6", 0, 0.6, [[0, 1, 0, 1], [1, 1, 0, 0]]),
    ("top_p .75", 0, 0.75, [[0, 1, 0, 1], [1, 1, 1, 0]]),
    ("top_p .98", 0, 0.98, [[1, 1, 1, 1], [1, 1, 1, 0]]),
    ("a tiny top_p keeps the likeliest", 0, 1e-9, LIKELIEST),
    ("top_p of what top_k left: .8/.95 = .842", 3, 0.84, [[0, 1, 0, 1], [1, 1, 1, 0]]),
]


def test_filter_logits():
    logits = torch.tensor([[0.05, 0.5, 0.15, 0.3], [0.4, 0.31, 0.28, 0.01]]).log()
    for what, top_k, top_p, expected in KEPT:
        check(what, keeps(logits, top_k, top_p), expected)
    banned = torch.tensor([[1.0, -torch.inf, 0.0, -torch.inf]])
    check("a banned token stays banned", keeps(banned, 3, 0.99), [[1, 0, 1, 0]])
    unlikely = torch.tensor([[0.0, -40.0, -50.0]])  # the first has all mass, rounded
    check("top_p 1 keeps the least likely, too", keeps(unlikely, 0, 1.0), [[1, 1, 1]])


def test_filter_logits_ties():
    tied = torch.tensor([[1.0, 2.0, 1.0, 1.0, 0.0]])
    check("top_k 1: the likeliest", keeps(tied, 1), [[0, 1, 0, 0, 0]])
    for k in (2, 3, 4):
        what = f"top_k {k} of {tied.tolist()}: all that tie with the k-th stay"
        check(what, keeps(tied, k), [[1, 1, 1, 1, 0]])
    (kept,) = keeps(torch.zeros(1, 4), 0, 0.5)
    assert sum(kept) == 2, f"top_p .5 of four equals keeps two, not {kept}"


def test_draw_greedy_and_support():
    """Temperature 0.5 squares: 1 4 16 64; top_k 3 keeps 4 16 64, top_p .9 then 16 64."""
    logits = torch.tensor([[1.0, 2.0, 4.0, 8.0], [8.0, 4.0, 1.0, 2.0]]).log()
    sampling = Sampling(temperature=0.5, top_k=3, top_p=0.9, greedy=True)
    tokens, log_probs, support = t5_small.draw(logits.repeat(20, 1), sampling)
    check("greedy: the likeliest tokens", tokens, [3, 0] * 20)
    what = "their log-probs among those that are left: log 64/80"
    check(what, log_probs, [math.log(0.8)] * 40)
    check("support", support.long(), [[0, 0, 1, 1], [1, 1, 0, 0]] * 20)
    assert support.dtype == torch.bool, f"the support is {support.dtype}, not bool"

    banned = torch.tensor([[-torch.inf, 0.0, -torch.inf, 1.0]])
    for greedy in (True, False):
        tokens, log_probs, support = t5_small.draw(banned, Sampling(greedy=greedy))
        check("a banned token is not in the support", support.long(), [[0, 1, 0, 1]])
        assert tokens[0] in (1, 3), f"a banned token, {tokens.tolist()}, is sampled"
        assert log_probs.isfinite().all(), "log-probs are finite"


def test_draw_samples_what_it_says():
    """Chi-square of 4,000 tokens; with 3 degrees of freedom, 21.1 is p = 1e-4."""
    n = 4000
    logits = torch.tensor([[0.1, 1.0, 2.0, 4.0, 8.0]]).log().repeat(n, 1)
    probs = torch.tensor([0.0, 1.0, 2.0, 4.0, 8.0]).sqrt()  # temperature 2
    probs = probs / probs.sum()
    sampling = Sampling(temperature=2.0, top_k=4)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        tokens, log_probs, _ = t5_small.draw(logits, sampling)
        assert tokens.shape == log_probs.shape == (n,), "one token and log-prob for each row"
        check("log-probs of the tokens", log_probs, probs.log()[tokens])
        drawn.append(tokens)
    assert torch.equal(drawn[0], drawn[1]), "the same seed of torch, other tokens"
    assert not torch.equal(drawn[0], drawn[2]), "another seed of torch, the same tokens"
    counts, expected = torch.bincount(drawn[2], minlength=5)[1:], n * probs[1:]
    assert counts.sum() == n, "a token that top_k leaves out is sampled"
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    what = f"sampled {counts.tolist()}, expected about {expected.round().tolist()}"
    assert chi_square < 21.1, what


def restricted_log_probs(logits, step, sampling):
    """The distribution of a step as `generate` promises it, written down again."""
    logits = logits.clone()
    logits[:, [0, 2]] = -torch.inf
    if step + 1 < sampling.min_length:
        logits[:, 1] = -torch.inf
    logits = logits / sampling.temperature
    return t5_small.filter_logits(logits, sampling.top_k, sampling.top_p).log_softmax(-1)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(0.8, 9, 0.95, 3, 12),
        Sampling(2.0, 0, 1.0, 1, 12),
        Sampling(1.0, 0, 1.0, 4, 12, greedy=True),
    ],
)
def test_generate_cached_is_uncached(sampling):
    """Teacher forcing of the sampled ids gives the same states, supports and log-probs."""
    model = favour(tiny_t5(1, tie_word_embeddings=False), 1, 4.0)
    source = ragged([9, 3, 6, 2, 14, 5, 7, 4])
    torch.manual_seed(3)
    with torch.no_grad():
        sampled = t5_small.generate(model, source, sampling)
        states = model.response_states(source, sampled.ids)
    mask = unfinished(sampled.ids)
    lengths = set(mask.sum(1).tolist())
    assert len(lengths) >= 3, "the rows should end at different times"
    check("states", sampled.states[mask], states[mask])

    for t in range(sampled.ids.shape[1]):
        log_probs = restricted_log_probs(model.logits(states[:, t]), t, sampling)
        rows = mask[:, t]
        support = log_probs[rows] > -torch.inf
        assert torch.equal(sampled.support[rows, t], support), f"support at step {t}"
        of_tokens = log_probs.gather(1, sampled.ids[:, t : t + 1])[rows, 0]
        check(f"log-probs at step {t}", sampled.log_probs[rows, t], of_tokens)

    for after_the_end in (sampled.ids, sampled.log_probs, sampled.states, sampled.support):
        assert (after_the_end[~mask] == 0).all()
    if sampling.greedy:
        allowed = model.logits(sampled.states).masked_fill(~sampled.support, -99)
        assert torch.equal(sampled.ids[mask], allowed.argmax(-1)[mask])


def test_generate_rows_do_not_mix():
    """Greedy in a batch of very different lengths = each row alone, without any padding."""
    model = favour(tiny_t5(10, tie_word_embeddings=False), 1, 4.0)
    source = ragged([2, 25, 9, 4, 17, 3, 12, 6], seed=2)
    sampling = Sampling(greedy=True, max_length=14)
    together = t5_small.generate(model, source, sampling)
    lengths = unfinished(together.ids).sum(1).tolist()
    assert sum(n <= 4 for n in lengths) >= 4, f"too alike: {lengths}"
    assert max(lengths) >= 10, f"too alike: {lengths}"
    for row, n in enumerate(lengths):
        own_source = source[row][source[row] != 0][None]
        alone = t5_small.generate(model, own_source, sampling)
        assert alone.ids[0].tolist() == together.ids[row, :n].tolist(), f"row {row}"
        check(f"log-probs of row {row}", together.log_probs[row, :n], alone.log_probs[0])
        check(f"states of row {row}", together.states[row, :n], alone.states[0])


@pytest.mark.parametrize("n", [1, 2, 5])
def test_generate_min_length(n):
    """Where </s> is as good as certain it comes at the first chance."""
    sampling = Sampling(min_length=n, max_length=9)
    ids = t5_small.generate(favour(tiny_t5(), 1, 80.0), ragged([5, 3, 7]), sampling).ids
    assert ids.shape == (3, n), f"</s> at the first chance, token {n}: {ids.tolist()}"
    assert (ids[:, -1] == 1).all()
    assert (ids[:, :-1] > 2).all()


def test_generate_max_length():
    """Responses that never end stop there."""
    source, sampling = ragged([5, 3, 7]), Sampling(max_length=7)
    endless = t5_small.generate(favour(tiny_t5(), 1, -80.0), source, sampling)
    assert endless.ids.shape == endless.log_probs.shape == (3, 7)
    assert (endless.ids > 2).all()
    assert (endless.log_probs < 0).all()


def test_generate_never_samples_banned_ids():
    model, source = tiny_t5(vocab_size=8), ragged([4, 3], high=8).repeat(200, 1)
    sampling = Sampling(temperature=10.0, max_length=6, min_length=3)
    sampled = t5_small.generate(model, source, sampling)
    mask = unfinished(sampled.ids)
    assert set(sampled.ids[mask].tolist()) == {1, 3, 4, 5, 6, 7}
    assert not sampled.support[..., [0, 2]].any()
    assert not sampled.support[:, :2, 1].any()
    assert sampled.support[:, 2, 1][mask[:, 2]].all()

    sampling = Sampling(temperature=10.0, max_length=6)
    ids = t5_small.generate(model, source, sampling, banned=(0, 2, 5, 7)).ids
    assert set(ids[unfinished(ids)].tolist()) == {1, 3, 4, 6}


def test_generate_samples_what_it_says():
    """Chi-square of 4,000 first tokens; with 7 degrees of freedom, 29.9 is p = 1e-4."""
    model, n = tiny_t5(2), 4000
    source = ragged([6]).repeat(n, 1)
    sampling = Sampling(temperature=0.7, top_k=8, max_length=1)
    torch.manual_seed(0)
    sampled = t5_small.generate(model, source, sampling)
    first = sampled.ids[:, 0]
    with torch.no_grad():
        logits = model.logits(model.response_states(source[:1], torch.tensor([[3]])))[:, 0]
    probs = restricted_log_probs(logits, 0, sampling).exp()[0]
    check("stated probability of the tokens", sampled.log_probs[:, 0].exp(), probs[first])

    counts = torch.bincount(first, minlength=30).float()
    support = probs > 0
    assert support.sum() == 8
    assert counts[~support].sum() == 0
    counts, expected = counts[support], n * probs[support]
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_square < 29.9, f"{chi_square:.1f}: {counts.tolist()}, not {expected.tolist()}"


def test_generate_depends_on_the_seed_only():
    model, source, sampling = tiny_t5(), ragged([4, 6, 3]), Sampling(max_length=8)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(t5_small.generate(model, source, sampling).ids.tolist())
    assert runs[0] == runs[1] != runs[2]


# ---- the training step ----------------------------------------------------------------------


def rates(model, lr, rms_scaled, **unscaled):
    """Each tensor's learning rate: Adam's first step is that long, whatever the gradient."""
    optimizer = Optimizer(model, **unscaled)
    optimizer.set_lr(lr, rms_scaled)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return [(before[name] - p).mean().item() for name, p in model.named_parameters()]


def test_learning_rates_scale_by_rms():
    """RMS of [3, 4] is 3.536, of zeros at least 1e-3; a position bias belongs to the scale of 1."""

    def model():
        tensors = {
            "a": torch.tensor([3.0, 4.0]),
            "b": torch.zeros(5),
            "c": torch.full((2, 2), -0.1),
            "relative_bias": torch.full((3,), 0.2),
        }
        return torch.nn.ParameterDict(tensors)

    root = 12.5**0.5
    scaled = [0.02 * root, 0.02 * 1e-3, 0.02 * 0.1, 0.02]
    check("scaled", rates(model(), 0.02, True), scaled, tol=1e-6)
    check("absolute", rates(model(), 0.02, False), [0.02] * 4, tol=1e-6)
    scaled = [0.02 * root, 0.02, 0.02 * 0.1, 0.02]
    check("names with a b", rates(model(), 0.02, True, unscaled=("b",)), scaled, tol=1e-6)


@pytest.fixture
def descent():
    """Two numbers, 10 each, and an Optimizer that steps along the gradient itself."""
    model = torch.nn.ParameterDict({"p": torch.tensor([10.0]), "q": torch.tensor([10.0])})
    optimizer = Optimizer(model)
    optimizer.parts = [torch.optim.SGD(model.parameters(), lr=1.0)]

    def step(*gradient):
        """The gradient's norm as the optimizer states it, and how far the numbers moved."""
        before = [model["p"].item(), model["q"].item()]
        model["p"].grad, model["q"].grad = (torch.tensor([x]) for x in gradient)
        norm = optimizer.step()
        for parameter in model.parameters():
            assert parameter.grad is None or parameter.grad == 0, "kept for the next step"
        return norm, [before[0] - model["p"].item(), before[1] - model["q"].item()]

    return step


def test_optimizer_step_clips(descent):
    for _ in range(2):  # every step is clipped, not only the first
        norm, moved = descent(3.0, 4.0)
        check("norm before clipping", norm, 5.0)
        check("a step along (3, 4) of length 1", moved, [0.6, 0.8])
    _, moved = descent(0.3, 0.4)
    check("a short gradient is not lengthened", moved, [0.3, 0.4])


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_optimizer_step_skips(bad, descent):
    norm, moved = descent(bad, 4.0)
    assert not math.isfinite(norm)
    assert moved == [0, 0], "a gradient that is not finite was applied"


needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch 2.9 has it")


@needs_muon
def test_muon_takes_the_matrices_of_the_layers():
    """Only those; all else stays with AdamW, and every tensor is in one group once."""
    model = tiny_t5(tie_word_embeddings=False)
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def layers(part):
        """The layers whose matrices this optimizer has."""
        tensors = [group["params"][0] for group in part.param_groups]
        return {names[id(x)].split(".")[-2] for x in tensors if x.dim() == 2}

    adam, muon = Optimizer(model, muon=True).parts
    assert layers(muon) == {"q", "k", "v", "o", "wi", "wo"}
    assert layers(adam) == {"shared", "lm_head", "relative_bias"}
    owned = sum((group["params"] for group in adam.param_groups + muon.param_groups), [])
    assert sorted(map(id, owned)) == sorted(names)
    assert len(Optimizer(model).parts) == 1, "without muon AdamW has them all"


@needs_muon
def test_a_step_of_muon_has_equal_singular_values():
    model = tiny_t5()
    optimizer = Optimizer(model, muon=True)
    optimizer.set_lr(0.01, rms_scaled=False)
    weight = model.encoder.blocks[0].self_attn.q.weight
    before = weight.detach().clone()
    model.loss_sum(ragged([5, 3, 7]), ragged([4, 4, 2], seed=1))[0].backward()
    gradient = torch.linalg.svdvals(weight.grad)
    assert gradient.max() / gradient.median() > 2, "a gradient like that would show nothing"
    optimizer.step()
    length = 0.01 * 0.2 * max(weight.shape) ** 0.5
    values = torch.linalg.svdvals(before - weight.detach()) / length
    near_one = values.max() < 1.3 and values.median() > 0.6  # by five Newton-Schulz steps
    assert near_one, f"{values.tolist()}"


def copy_trainer(model, steps, batch=8, validate=None, **config):
    """Learns to copy 16 random sequences of 2 to 6 tokens."""
    lengths = [2 + i % 5 for i in range(16)]
    data = ragged(lengths, high=model.config.vocab_size, seed=9)

    def rows_at(i):
        return torch.randperm(16, generator=torch.Generator().manual_seed(i))[:batch]

    def loss_sum(rows):
        return model.loss_sum(data[rows], data[rows])

    def mean_loss():
        loss, tokens = model.loss_sum(data, data)
        return loss.item() / tokens

    config = TrainConfig(steps=steps, warmup=2, **config)
    return Trainer(model, loss_sum, rows_at, validate or mean_loss, config)


@pytest.mark.parametrize("muon", [False, pytest.param(True, marks=needs_muon)])
def test_trainer_overfits(muon):
    model = tiny_t5(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_decoder_layers=1)
    trainer = copy_trainer(model, 120, batch=16, lr=3e-2, eval_every=120, muon=muon)
    records = [trainer.step(i) for i in range(120)]
    assert records[0]["loss"] > 2.5
    assert records[-1]["valid"] < 0.1


@pytest.fixture
def gradients(monkeypatch):
    """The gradients that each step of an Optimizer applies: a list of tensors for each."""
    seen, step = [], Optimizer.step

    def spy(optimizer):
        seen.append([tensor.grad.clone() for tensor in optimizer.tensors])
        return step(optimizer)

    monkeypatch.setattr(Optimizer, "step", spy)
    return seen


@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_trainer_micro_batch_is_the_same(micro_batch, gradients):
    losses, weights = [], []
    for size in (0, micro_batch):
        model = tiny_t5()
        losses.append(copy_trainer(model, 4, micro_batch=size).step(0)["loss"])
        weights.append(list(model.parameters()))
    check("loss", losses[1], losses[0], tol=1e-6)
    for whole, parts, p, q in zip(*gradients, *weights):
        check("gradient", parts, whole, tol=1e-6)
        matters = whole.abs() > 1e-4  # Adam's first step is the sign: rounding decides below
        check("weights after the step", q[matters], p[matters], tol=1e-6)


def test_trainer_loss_is_a_mean_over_tokens():
    """The gradient is that of the mean over tokens: a batch repeated gives the same."""

    def first_step(rows):
        model, data = tiny_t5(), ragged([3, 5, 2])

        def loss_sum(rows):
            return model.loss_sum(data[rows], data[rows])

        trainer = Trainer(model, loss_sum, lambda i: rows, lambda: 0.0, TrainConfig(steps=1))
        return trainer.step(0)

    once, twice = first_step(torch.arange(3)), first_step(torch.arange(3).repeat(2))
    check("loss", twice["loss"], once["loss"])
    check("norm", twice["grad_norm"], once["grad_norm"])


def test_trainer_schedule_and_best_weights():
    losses = iter([5.0, 1.0, 3.0])
    model = tiny_t5()
    trainer = copy_trainer(model, 6, lr=0.01, eval_every=2, validate=lambda: next(losses))
    records, weights = [], []
    for i in range(6):
        records.append(trainer.step(i))
        weights.append(model.shared.weight.detach().clone())
    lr = [record["lr"] for record in records]
    check("2 steps up, 4 down", lr, [0.005, 0.01, 0.01, 0.0075, 0.005, 0.0025], tol=1e-9)
    assert [r.get("valid") for r in records] == [None, 5.0, None, 1.0, None, 3.0]
    assert trainer.best_loss == 1.0

    model.train()
    trainer.finish()
    assert torch.equal(model.shared.weight, weights[3])
    assert not torch.equal(weights[3], weights[5])
    assert not model.training


def test_trainer_resume_is_bit_identical(tmp_path):
    def make(seed):
        return copy_trainer(tiny_t5(seed, dropout_rate=0.1), 6, eval_every=2)

    def steps(trainer, numbers):
        for i in numbers:
            torch.manual_seed(100 + i)
            trainer.step(i)
        return trainer.state_dict()

    whole = steps(make(0), range(6))
    half = make(0)
    t5_small.save_atomically(steps(half, range(3)), tmp_path / "state.pt")
    resumed = make(1)  # other weights: all must come from the file
    resumed.load_state_dict(t5_small.load_state(tmp_path / "state.pt"))
    assert resumed.best_loss == half.best_loss < math.inf, "the best loss is forgotten"

    resumed = steps(resumed, range(3, 6))
    assert whole["best_loss"] == resumed["best_loss"]
    for part in ("model", "best_weights"):
        assert whole[part].keys() == resumed[part].keys()
        for name, tensor in whole[part].items():
            assert torch.equal(tensor, resumed[part][name]), f"{name} is not bit-identical"


# ---- checkpoints ----------------------------------------------------------------------------


def refusal(folder, at_most=500):
    """What from_pretrained says of a folder that it refuses: one short line."""
    with pytest.raises(CheckpointError) as error:
        t5_small.from_pretrained(folder)
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < at_most
    return message


@pytest.mark.parametrize("version", VERSIONS)
def test_checkpoint_round_trip(version, tmp_path):
    folder = tmp_path / "new" / "folder"
    model = t5_small.from_pretrained(PARITY / version)
    t5_small.save_pretrained(model, folder)
    again = t5_small.from_pretrained(folder)
    assert again.config == model.config
    for tensor, copied in zip(model.state_dict().values(), again.state_dict().values()):
        assert torch.equal(tensor, copied)

    without = {*COPIES, LEFTOVER}
    if version == "t5_v10":
        without.add("lm_head.weight")
    official = tensors_of(PARITY / version).keys()
    assert tensors_of(folder).keys() == official - without

    raw = config_of(folder)
    assert raw["model_type"] == "t5"
    assert raw["is_encoder_decoder"] is True
    assert raw["tie_word_embeddings"] is (version == "t5_v10")
    assert raw["decoder_start_token_id"] == 0
    config = asdict(model.config)
    assert {name: raw[name] for name in config} == config
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["config.json", "pytorch_model.bin"]


def test_checkpoint_of_transformers_5(tmp_path):
    """It always writes tie_word_embeddings true; scale_decoder_outputs says what v1.0 does."""
    raw = config_of(PARITY / "t5_v11")
    raw.update(tie_word_embeddings=True, scale_decoder_outputs=False)
    write_config(tmp_path, raw)
    state = tensors_of(PARITY / "t5_v11")
    torch.save(state, tmp_path / "pytorch_model.bin")
    model = t5_small.from_pretrained(tmp_path)
    assert torch.equal(model.lm_head.weight, state["lm_head.weight"])

    del state["lm_head.weight"]  # a head that equals the embedding is not written
    torch.save(state, tmp_path / "pytorch_model.bin")
    model = t5_small.from_pretrained(tmp_path)
    check("an unscaled tied head", model.logits(torch.eye(24)), state["shared.weight"].T)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_an_untied_model_as_transformers_5_saves_it(name, tmp_path):
    """Its config.json claims that the head is the embedding; its file has another, which counts."""
    folder = PARITY / "mt5_untied"
    expected = expected_of(folder)
    assert expected["logits"][expected["labels"] != 0].std() > 1
    if name == "pytorch_model.bin":
        state = t5_small.load_safetensors(folder / "model.safetensors")
        torch.save(state, tmp_path / name)
        write_config(tmp_path, config_of(folder))
        folder = tmp_path
    same_logits(t5_small.from_pretrained(folder).eval(), expected)


def test_a_head_of_its_own_counts_although_config_json_claims_it_is_the_embedding(tmp_path):
    """As in transformers 5; v1.0's logits are scaled by D^-1/2 with that head, too."""
    head = torch.randn(80, 24, generator=torch.Generator().manual_seed(1))
    copy_of_fixture(tmp_path, lambda state: state.update({"lm_head.weight": head}))
    model = t5_small.from_pretrained(tmp_path)
    check("logits of unit states", model.logits(torch.eye(24)), head.T * 24**-0.5)


def test_the_embedding_under_another_of_its_names(tmp_path):
    """Files that have each tensor once may have it as the encoder's."""
    copy_of_fixture(tmp_path, lambda state: state.pop("shared.weight"))
    model = t5_small.from_pretrained(tmp_path)
    assert torch.equal(model.shared.weight, tensors_of(PARITY / "t5_v10")["shared.weight"])


def test_a_head_and_the_embedding_of_one_storage_are_trained_apart(tmp_path):
    """mT5's: one tensor in the file, two in the model."""
    copy_of_fixture(tmp_path, scale_decoder_outputs=False)
    model = t5_small.from_pretrained(tmp_path)
    before = model.lm_head.weight.detach().clone()
    model.shared.weight.data += 1
    assert torch.equal(model.lm_head.weight, before)


@pytest.mark.parametrize("name", [*sorted(COPIES), "encoder.adapter.weight"])
def test_every_tensor_is_used_or_named(name, tmp_path):
    """Also what would be a copy of the embedding, but is not."""
    copy_of_fixture(tmp_path, lambda state: state.update({name: torch.ones(80, 24)}))
    assert name in refusal(tmp_path)


def test_checkpoint_missing_tensor_is_named(tmp_path):
    name = "decoder.block.1.layer.1.EncDecAttention.k.weight"
    copy_of_fixture(tmp_path, lambda state: state.pop(name))
    message = refusal(tmp_path)
    assert name in message
    assert "pytorch_model.bin" in message


def test_checkpoint_without_an_embedding(tmp_path):
    def drop(state):
        for name in ("shared.weight", *COPIES):
            del state[name]

    copy_of_fixture(tmp_path, drop)
    assert "shared.weight (80, 24) is missing" in refusal(tmp_path)


def test_checkpoint_wrong_shape_is_named(tmp_path):
    name = "encoder.block.0.layer.1.DenseReluDense.wi.weight"
    copy_of_fixture(tmp_path, lambda state: state.update({name: torch.zeros(7, 24)}))
    message = refusal(tmp_path)
    for part in (name, "(7, 24)", "(32, 24)"):
        assert part in message


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: b"not a checkpoint",
        lambda content: content[:100] + bytes(100) + content[200:],
    ],
)
def test_checkpoint_damaged_file_is_named(tmp_path, damage):
    copy_of_fixture(tmp_path)
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(damage(path.read_bytes()))
    assert "pytorch_model.bin" in refusal(tmp_path)


def test_checkpoint_missing_files_are_named(tmp_path):
    assert str(Path("nowhere", "config.json")) in refusal(tmp_path / "nowhere")
    copy_of_fixture(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    assert "pytorch_model.bin" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{half of a file", encoding="utf-8")
    assert "config.json" in refusal(tmp_path)


def test_checkpoint_of_another_architecture(tmp_path):
    copy_of_fixture(tmp_path, feed_forward_proj="gated-silu")
    assert "gated-silu" in refusal(tmp_path)


@pytest.mark.parametrize("kind", ["bart", "umt5", ["t5"]])
def test_a_model_of_another_kind_is_told_so(kind, tmp_path):
    copy_of_fixture(tmp_path, model_type=kind)
    assert f"model_type is {kind!r}, not t5 or mt5" in refusal(tmp_path)


def test_a_web_page_instead_of_config_json_is_told_so(tmp_path):
    copy_of_fixture(tmp_path)
    page = "\n<!DOCTYPE html><html><body>Not found</body></html>"
    (tmp_path / "config.json").write_text(page, encoding="utf-8")
    message = refusal(tmp_path)
    assert "config.json" in message
    assert "a web page, not JSON" in message


def test_flan_t5_of_2022_is_gated(tmp_path):
    """Its config.json said "gelu" and is_gated_act, which later became gated-gelu."""
    raw = config_of(PARITY / "t5_v11")
    raw.update(feed_forward_proj="gelu", is_gated_act=True, dense_act_fn="gelu_new")
    write_config(tmp_path, raw)
    content = (PARITY / "t5_v11" / "pytorch_model.bin").read_bytes()
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    model = t5_small.from_pretrained(tmp_path).eval()
    official = t5_small.from_pretrained(PARITY / "t5_v11").eval()
    source, response = ragged([6, 9]), ragged([5, 3])
    states = model.response_states(source, response)
    assert torch.equal(states, official.response_states(source, response))

    write_config(tmp_path, {**raw, "is_gated_act": False})
    assert "'gelu'" in refusal(tmp_path)


class RunsCode:
    def __reduce__(self):
        return Path.touch, (Path("proof_that_code_ran"),)


def test_checkpoint_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"shared.weight": RunsCode()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="evil.pt"):
        t5_small.load_state(tmp_path / "evil.pt")
    assert not Path("proof_that_code_ran").exists()


def safetensors(state, kind):
    """A .safetensors file of these tensors, written by hand."""
    header, numbers = {"__metadata__": {"format": "pt"}}, b""
    for name, x in state.items():
        content = x.contiguous().view(torch.uint8).numpy().tobytes()
        place = [len(numbers), len(numbers) + len(content)]
        header[name] = {"dtype": kind, "shape": [*x.shape], "data_offsets": place}
        numbers += content
    header = json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + numbers


@pytest.mark.parametrize(
    "kind, dtype", [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)]
)
def test_safetensors_are_read_without_the_package(kind, dtype, tmp_path):
    """And before pytorch_model.bin; one that is damaged is named."""
    copy_of_fixture(tmp_path)
    state = {name: x.to(dtype) for name, x in tensors_of(tmp_path).items()}
    (tmp_path / "pytorch_model.bin").write_bytes(b"not looked at")
    whole = safetensors(state, kind)
    path = tmp_path / "model.safetensors"
    path.write_bytes(whole)
    model = t5_small.from_pretrained(tmp_path)
    assert torch.equal(model.shared.weight, state["shared.weight"].float())
    last = state["decoder.block.1.layer.2.DenseReluDense.wo.weight"]
    assert torch.equal(model.decoder.blocks[1].ff.wo.weight, last.float())

    without_shapes = whole.replace(b'"shape"', b'"shap"')
    for damaged in (whole[:-10], whole[:5], b"", b"\xff" * 100, without_shapes):
        path.write_bytes(damaged)
        assert "model.safetensors" in refusal(tmp_path)


def test_safetensors_of_no_floats_are_named(tmp_path):
    copy_of_fixture(tmp_path)
    state = tensors_of(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(safetensors(state, "I32"))
    assert f"{[*state][0]} is of type I32" in refusal(tmp_path)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 242043056\n"


def test_what_is_no_folder_of_a_checkpoint_is_told_apart(tmp_path, monkeypatch):
    """Each cause has its own remedy, in a short line."""
    monkeypatch.chdir(tmp_path)
    assert "not by its name" in refusal("t5-small", at_most=400)
    folder = tmp_path / "t5-small"
    folder.mkdir()
    assert "has no config.json" in refusal("t5-small", at_most=400)

    copy_of_fixture(folder)
    whole = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(POINTER)
    assert "git lfs pull" in refusal("t5-small", at_most=400)
    (folder / "pytorch_model.bin").write_bytes(whole)
    (folder / "model.safetensors").write_bytes(POINTER)
    t5_small.from_pretrained(folder)  # the other file is whole

    for name in ("model.safetensors", "pytorch_model.bin"):
        (folder / name).unlink()
    assert "has no model.safetensors or pytorch_model.bin" in refusal("t5-small", at_most=400)
    (folder / "model.safetensors.index.json").write_text("{}", encoding="utf-8")
    assert "in several files" in refusal("t5-small", at_most=400)


def test_names_of_a_wrapped_model_are_a_short_message(tmp_path):
    def wrap(state):
        for name in [*state]:
            state["module." + name] = state.pop(name)

    copy_of_fixture(tmp_path, wrap)
    message = refusal(tmp_path, at_most=300)
    assert "'module.'" in message
    assert "wrapper" in message


def test_many_missing_tensors_are_a_short_message(tmp_path):
    def drop_blocks(state):
        for name in [*state]:
            if "block" in name:
                del state[name]

    copy_of_fixture(tmp_path, drop_blocks)
    assert "and 41 more" in refusal(tmp_path)


def test_a_dict_around_the_tensors_is_told_so(tmp_path):
    copy_of_fixture(tmp_path)
    torch.save({"state_dict": tensors_of(tmp_path)}, tmp_path / "pytorch_model.bin")
    assert "not tensors by name" in refusal(tmp_path)


@pytest.mark.parametrize(
    "name, value",
    [
        ("num_layers", 10**12),
        ("num_decoder_layers", 10**12),
        ("d_model", 10**15),
        ("d_model", 1),
        ("d_ff", -3),
        ("num_heads", 0),
        ("num_heads", 2.5),
        ("vocab_size", True),
        ("dropout_rate", 7),
        ("layer_norm_epsilon", math.nan),
        ("initializer_factor", math.inf),
        ("relative_attention_num_buckets", 10**9),
        ("relative_attention_max_distance", 16),
        ("eos_token_id", 2),
        ("pad_token_id", 1),
        ("d_kv", "64"),
        ("tie_word_embeddings", "no"),
    ],
)
def test_config_json_out_of_range_is_refused_before_anything_is_built(
    name, value, tmp_path, monkeypatch
):
    copy_of_fixture(tmp_path, **{name: value})
    monkeypatch.setattr(t5_small, "T5", lambda config: pytest.fail("built"))
    message = refusal(tmp_path, at_most=300)
    assert name in message
    assert "config.json" in message


def test_sizes_are_looked_at_before_memory_is_taken(tmp_path):
    """Possible sizes, but not the file's: no two terabytes are allocated to say so."""
    sizes = {"num_layers": 100, "num_decoder_layers": 100, "d_ff": 200_000, "d_model": 60_000}
    copy_of_fixture(tmp_path, **sizes)
    assert "tensors of another configuration" in refusal(tmp_path)


def test_a_tensor_larger_than_its_storage_is_refused_before_it_is_read(tmp_path, monkeypatch):
    """100 kB may hold 14,000 times the same row, or a number at every place: gigabytes when
    they are read. Also deep inside a stage's checkpoint."""
    monkeypatch.setattr(t5_small, "check_tensors", lambda state: pytest.fail("read"))
    row = torch.zeros(1, 24)
    for tensor in (row.expand(80, 24), torch.zeros(1).expand(80, 24), windows(row[0])):
        copy_of_fixture(tmp_path, lambda state, x=tensor: state.update({"shared.weight": x}))
        assert "is larger than its storage" in refusal(tmp_path)
        torch.save({"key": "x", "log": [1, (2, {"w": tensor})]}, tmp_path / "mle.pt")
        with pytest.raises(CheckpointError, match="mle.pt.* is larger than its storage"):
            t5_small.load_state(tmp_path / "mle.pt")


def windows(row):
    """Every two neighbours of a row: (24,) -> (23, 2), in the storage of 24 numbers."""
    return row.as_strided((23, 2), (1, 1))


def test_a_part_of_a_storage_is_no_tensor_too_large(tmp_path):
    """torch saves whole storages, of which tensors may be a part, or which they share."""
    numbers = torch.arange(12.0).view(3, 4)
    state = {"part": numbers[1:, :2], "turned": numbers.T, "empty": numbers[:0]}
    torch.save(state, tmp_path / "mle.pt")
    loaded = t5_small.load_state(tmp_path / "mle.pt")
    assert loaded["part"].tolist() == [[4, 5], [8, 9]]
    assert loaded["turned"].shape == (4, 3)


def test_weights_that_are_not_finite_are_named(tmp_path):
    name = "decoder.block.0.layer.2.DenseReluDense.wo.weight"
    copy_of_fixture(tmp_path, lambda state: state[name][0].fill_(math.nan))
    message = refusal(tmp_path)
    assert f"{name} is not finite" in message


def test_every_flipped_bit_that_matters_is_noticed(tmp_path):
    """torch.load reads a tensor with a flipped bit without a word; load_state compares sums."""
    path, broken = tmp_path / "state.pt", tmp_path / "broken.pt"
    weights = torch.randn(500, generator=torch.Generator().manual_seed(0))
    t5_small.save_atomically({"w": weights, "key": "abc"}, path)
    content, rng, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(300):
        flipped, at = bytearray(content), rng.randrange(len(content))
        flipped[at] ^= 1 << rng.randrange(8)
        broken.write_bytes(flipped)
        try:
            loaded = t5_small.load_state(broken)
        except CheckpointError as error:
            assert "broken.pt" in str(error)
            assert "\n" not in str(error)
            refused += 1
            continue
        assert torch.equal(loaded["w"], weights), "a damaged state was loaded"
        assert loaded["key"] == "abc", "a damaged state was loaded"
    assert refused > 150, "the rest is padding between the parts"


def test_a_zip_bomb_is_refused_by_its_directory(tmp_path, monkeypatch):
    """20 MB of zeros in 20 kB, or gigabytes in a few MB: refused before anything is unpacked."""
    path = tmp_path / "state.pt"
    t5_small.save_atomically({"x": torch.ones(100)}, path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/1", bytes(20_000_000))
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda _: pytest.fail("unpacked"))
    with pytest.raises(CheckpointError, match="state.pt.*compressed") as error:
        t5_small.load_state(path)
    assert "\n" not in str(error.value)


def test_save_atomically_leaves_no_half_file(tmp_path, monkeypatch):
    path = tmp_path / "state.pt"
    t5_small.save_atomically({"x": torch.tensor([1.0])}, path)

    def disk_full(state, file):
        Path(file).write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError, match="is the disk full"):
        t5_small.save_atomically({"x": torch.tensor([2.0])}, path)
    left = [path.name for path in tmp_path.iterdir()]
    assert left == ["state.pt"], "a temporary file was left behind"
    assert t5_small.load_state(path)["x"].item() == 1.0, "the old file was harmed"


# ---- bf16 -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"}]
)
def test_bf16_is_close_to_fp32(changes):
    model = tiny_t5(**changes)
    source, response = ragged([6, 9, 4]), ragged([5, 3, 7], seed=1)
    sampling = Sampling(top_k=5, max_length=8)
    exact = model.loss_sum(source, response)[0].item()
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = model.loss_sum(source, response)
        sampled = t5_small.generate(model, source, sampling)
    loss.backward()
    for parameter in model.parameters():
        assert parameter.grad.isfinite().all()
    for tensor in (loss, sampled.log_probs, sampled.states):
        assert tensor.dtype == torch.float32
    assert abs(loss.item() / exact - 1) < 0.02, f"bf16 loss {loss.item()}, fp32 {exact}"

    with torch.no_grad():
        logits = model.logits(model.response_states(source, sampled.ids))
    log_probs = logits.masked_fill(~sampled.support, -1e9).log_softmax(-1)
    log_probs = log_probs.gather(-1, sampled.ids[..., None])[..., 0]
    assert sampled.log_probs.isfinite().all()
    difference = sampled.log_probs - log_probs
    assert difference[unfinished(sampled.ids)].abs().max() < 0.2


@pytest.mark.parametrize("state", [[], {"a": 3.0}, {"a": torch.ones(1), "b": 3.0}])
def test_every_entry_of_a_checkpoint_is_a_tensor(state):
    with pytest.raises(CheckpointError, match="not tensors by name"):
        t5_small.check_tensors(state)
