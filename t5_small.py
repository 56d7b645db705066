"""T5 from scratch, in the order of a lecture.

    the model        norm, position buckets, attention, feed-forward, block, stack, T5, loss
    sampling         one token at a time, with a cache; top-k, top-p, minimum length
    training         learning rates, the optimizer, a trainer that keeps its best weights
    checkpoints      this program's files, official T5 folders; skip it at first reading
    only for speed   a faster dropout; skip it, too

The presets `toy` and `real` that comments speak of are in emprl.py.
Sources: T5, Raffel et al. 2020 (arXiv 1910.10683); v1.1 (gated GELU, untied head), Shazeer
2020 (arXiv 2002.05202). Shapes: B batch, S source (or key) length, T response (or query)
length, D model width, H heads, V vocabulary. Ids in, ids out: this file knows nothing of text.
"""

import copy
import errno
import json
import math
import os
import zipfile
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

PAD_ID = 0  # fills up the rows of a batch, and starts the decoder
EOS_ID = 1  # </s>: ends an utterance, and a response
UNK_ID = 2  # a piece that the tokenizer does not know; never sampled
# Stands for minus infinity: softmax makes 0 of it, and never NaN. It is added to the attention
# scores of what must not be seen; ppo.py puts it in place of the logits of excluded tokens.
HIDDEN = -1e9


def option(default, help, low=0, high=1e9, choices=None):
    """A dataclass field that users may set, with its sentence of help and its legal values.

    option(2, "encoder blocks", 1, 1000) may be 1 to 1000, both included. A field without
    option() is not for users.
    """
    metadata = {"help": help, "low": low, "high": high, "choices": choices}
    return field(default=default, metadata=metadata)


def constant(default, low=0, high=1e9, choices=None):
    """A field that users do not set, but an official file may: it is checked all the same."""
    return option(default, "", low, high, choices)


# ---- the model ------------------------------------------------------------------------------


@dataclass
class T5Config:
    """Named as in T5's config.json, so that an official file can be read field by field."""

    d_model: int = option(128, "D: width of the residual stream", 2, 65536)
    d_kv: int = option(32, "width of one head; H * d_kv need not be d_model", 1, 8192)
    d_ff: int = option(512, "width inside the feed-forward layer", 1, 262144)
    num_layers: int = option(2, "encoder blocks", 1, 1000)
    num_decoder_layers: int = option(2, "decoder blocks", 1, 1000)
    num_heads: int = option(4, "H: attention heads", 1, 1024)
    dropout_rate: float = option(0.1, "share of activations dropped in training", 0, 0.99)

    # A new T5 keeps these defaults, but for its tokenizer's vocab_size; an official one sets
    # its own.
    vocab_size: int = constant(2048, 1, 10**6)  # V: the tokenizer's pieces and <extra_id_...>
    relative_attention_num_buckets: int = constant(32, 4, 1000)
    # distances from this one on, and some before it, share the last bucket
    relative_attention_max_distance: int = constant(128, 1, 10**6)
    layer_norm_epsilon: float = constant(1e-6, 1e-12, 1)
    initializer_factor: float = constant(1.0, 0, 100)
    feed_forward_proj: str = constant("relu", choices=("relu", "gated-gelu"))  # v1.0, v1.1
    # v1.0: the output layer (lm_head) is the embedding, and logits are scaled by D^-1/2
    tie_word_embeddings: bool = constant(True, choices=(True, False))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32.

    Unlike LayerNorm it subtracts no mean and adds no bias. x: (..., D). Returns (..., D).
    Source: Zhang & Sennrich 2019, arXiv 1910.07467.
    """

    def __init__(self, d_model, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.eps = eps

    def forward(self, x):
        x = x.float()
        mean_square = x.pow(2).mean(-1, keepdim=True)  # (..., 1)
        return self.weight * (x * torch.rsqrt(mean_square + self.eps))


def relative_position_bucket(
    relative_position, bidirectional, num_buckets=32, max_distance=128
):
    """The bucket of a distance in tokens: exact when near, logarithmic when far.

    With n = num_buckets, a distance d < n/2 has a bucket of its own, d. A larger one gets
        n/2 + floor(n/2 * log(d / (n/2)) / log(max_distance / (n/2))), at most n - 1.
    bidirectional (encoder): n is halved first; the upper half is for keys after the query.
    Otherwise (decoder): a key after the query gets bucket 0; a mask hides it anyway.

    Example: 32 buckets, bidirectional, max_distance 128; so n = 16, and 0 to 7 are exact.
        -3 -> 3 and +3 -> 16 + 3 = 19, -50 -> 8 + floor(8 * log(50/8) / log(128/8)) = 13.

    relative_position: position of the key - position of the query, integers of any shape.
    Returns buckets of the same shape. Source: Raffel et al. 2020 (arXiv 1910.10683), section
    2.1, and T5's code.
    """
    if bidirectional:
        num_buckets = num_buckets // 2
        offset = (relative_position > 0).long() * num_buckets
        distance = relative_position.abs()
    else:
        offset = torch.zeros_like(relative_position)
        distance = (-relative_position).clamp(min=0)

    max_exact = num_buckets // 2
    log_distance = torch.log(distance.clamp(min=1) / max_exact)
    log_ratio = log_distance / math.log(max_distance / max_exact)
    far = max_exact + (log_ratio * (num_buckets - max_exact)).long()
    far = far.clamp(max=num_buckets - 1)
    return offset + torch.where(distance < max_exact, distance, far)


class Attention(nn.Module):
    """Multi-head attention: o(dropout(softmax(q(x) k^T + bias)) v).

    bias: T5's position bias (self-attention only) plus HIDDEN for what must not be seen; Stack
    and padding_bias make it. Many other transformers add position embeddings to the input.
    T5 does not divide the scores by sqrt(d_kv); the initialisation of q takes care of that.
    """

    def __init__(self, config):
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.num_heads = config.num_heads
        self.d_kv = config.d_kv
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)
        # nn.Dropout, faster on a CPU: see the end
        self.dropout = Dropout(config.dropout_rate)

    def split(self, x):
        """(B, T, H * d_kv) -> (B, H, T, d_kv): a head is a batch dimension of its own."""
        return x.unflatten(-1, (self.num_heads, self.d_kv)).transpose(1, 2)

    def keys_values(self, memory):
        """memory (B, S, D) -> keys and values, (B, H, S, d_kv) each.

        Memory is what is attended to: in self-attention x itself, in cross-attention the
        encoder's states.
        """
        return self.split(self.k(memory)), self.split(self.v(memory))

    def weights(self, x, keys, bias):
        """softmax(q(x) k^T + bias): how much each position of x attends to each of memory.

        x (B, T, D), keys (B, H, S, d_kv), bias (B or 1, H or 1, T or 1, S).
        Returns (B, H, T, S).
        """
        queries = self.split(self.q(x))  # (B, H, T, d_kv)
        scores = queries @ keys.transpose(-1, -2) + bias  # (B, H, T, S)
        return F.softmax(scores.float(), dim=-1)

    def forward(self, x, keys_values, bias):
        """x (B, T, D) asks, keys_values (from a memory of S positions) answer: (B, T, D)."""
        keys, values = keys_values
        weights = self.dropout(self.weights(x, keys, bias)).to(values.dtype)
        context = weights @ values  # (B, H, T, d_kv)
        return self.o(context.transpose(1, 2).flatten(2))  # (B, T, D)


class FeedForward(nn.Module):
    """v1.0: W_o relu(W_i x). v1.1: W_o (gelu(W_i0 x) * W_i1 x). (B, T, D) -> (B, T, D)."""

    def __init__(self, config):
        super().__init__()
        self.gated = config.feed_forward_proj == "gated-gelu"
        if self.gated:
            self.wi_0 = nn.Linear(config.d_model, config.d_ff, bias=False)
            self.wi_1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        else:
            self.wi = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)
        self.dropout = Dropout(config.dropout_rate)

    def forward(self, x):
        if self.gated:
            hidden = F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x)
        else:
            hidden = F.relu(self.wi(x))
        return self.wo(self.dropout(hidden))


class Block(nn.Module):
    """x + dropout(f(norm(x))): self-attention, cross-attention (decoder), feed-forward."""

    def __init__(self, config, is_decoder):
        super().__init__()
        self.is_decoder = is_decoder
        self.self_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.self_attn = Attention(config)
        if is_decoder:
            self.cross_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
            self.cross_attn = Attention(config)
        self.ff_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.ff = FeedForward(config)
        self.dropout = Dropout(config.dropout_rate)

    def forward(self, x, self_bias, memory=None, memory_bias=None, cache=None):
        """x (B, T, D) -> (B, T, D). A decoder block reads memory (B, S, D) by cross-attention.

        With a cache, x is the newest token only (T = 1), and memory is not read: the cache has
        the keys and values of the earlier tokens and of the memory.
        """
        h = self.self_norm(x)
        keys_values = self.self_attn.keys_values(h)
        if cache is not None:
            keys_values = cache.append(*keys_values)
        x = x + self.dropout(self.self_attn(h, keys_values, self_bias))

        if self.is_decoder:
            h = self.cross_norm(x)
            if cache is not None:
                memory_keys_values = cache.memory
            else:
                memory_keys_values = self.cross_attn.keys_values(memory)
            x = x + self.dropout(self.cross_attn(h, memory_keys_values, memory_bias))

        h = self.ff_norm(x)
        return x + self.dropout(self.ff(h))


class Stack(nn.Module):
    """The encoder or the decoder. All blocks share one table of relative position biases."""

    def __init__(self, config, is_decoder):
        super().__init__()
        self.config = config
        self.is_decoder = is_decoder
        num_layers = config.num_decoder_layers if is_decoder else config.num_layers
        self.blocks = nn.ModuleList(Block(config, is_decoder) for _ in range(num_layers))
        self.relative_bias = nn.Embedding(
            config.relative_attention_num_buckets, config.num_heads
        )
        self.final_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.dropout = Dropout(config.dropout_rate)

    def position_bias(self, length):
        """What is added to the scores of self-attention: (1, H, length, length)."""
        position = torch.arange(length, device=self.relative_bias.weight.device)
        relative = position[None, :] - position[:, None]  # key - query
        bucket = relative_position_bucket(
            relative,
            not self.is_decoder,
            self.config.relative_attention_num_buckets,
            self.config.relative_attention_max_distance,
        )
        bias = self.relative_bias(bucket).permute(2, 0, 1)[None]  # (1, H, T, T)
        if self.is_decoder:
            bias = bias.masked_fill(relative > 0, HIDDEN)  # no token sees the future
        return bias

    def forward(self, x, self_bias, memory=None, memory_bias=None, caches=None):
        """x (B, T, D) -> (B, T, D). See Block; caches: one for each block.

        self_bias comes from position_bias. T5Encoder.encode adds padding_bias to it; generate
        passes only the newest token's row.
        """
        x = self.dropout(x)
        for i, block in enumerate(self.blocks):
            cache = None if caches is None else caches[i]
            x = block(x, self_bias, memory, memory_bias, cache)
        return self.dropout(self.final_norm(x))


def padding_bias(ids, pad_id=PAD_ID):
    """Hides padding from attention: ids (B, S) -> (B, 1, 1, S), -1e9 on padding, else 0."""
    return (ids == pad_id)[:, None, None, :] * HIDDEN


class T5Encoder(nn.Module):
    """Embedding and encoder: the half of a T5 that a classifier needs."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = Stack(config, is_decoder=False)
        self.initialise()

    def initialise(self):
        """T5's initialisation: normal; std 1 for embedding and head, fan-in^-1/2 for matrices.

        For q it is (d_model * d_kv)^-1/2, in place of attention's division by sqrt(d_kv). The
        position biases are an nn.Embedding too, but start with std d_model^-1/2.
        """
        config = self.config
        std = {
            "shared": 1.0,
            "lm_head": 1.0,
            "q": (config.d_model * config.d_kv) ** -0.5,
            "o": (config.num_heads * config.d_kv) ** -0.5,
            "wo": config.d_ff**-0.5,
        }
        for name, parameter in self.named_parameters():
            layer = name.split(".")[-2]  # encoder.blocks.0.self_attn.q.weight -> q
            if parameter.dim() == 2:
                scale = std.get(layer, config.d_model**-0.5)
                nn.init.normal_(parameter, std=config.initializer_factor * scale)

    def encode(self, source):
        """(B, S) ids -> (B, S, D) states; padding is hidden from the other positions."""
        bias = self.encoder.position_bias(source.shape[1]) + padding_bias(source)
        return self.encoder(self.shared(source), bias)


class T5(T5Encoder):
    """The encoder-decoder: encode, decode, logits, each of them usable alone."""

    def __init__(self, config):
        super().__init__(config)
        self.decoder = Stack(config, is_decoder=True)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.initialise()  # once more: now there are a decoder and a head

    def decode(self, inputs, memory, source):
        """Decoder inputs (B, T), the encoder's states (B, S, D) -> the decoder's (B, T, D).

        source (B, S) is needed only to hide its padding.
        """
        bias = self.decoder.position_bias(inputs.shape[1])
        return self.decoder(self.shared(inputs), bias, memory, padding_bias(source))

    def logits(self, states):
        """(..., D) -> (..., V). v1.0 ties the head to the embedding and scales by D^-1/2."""
        if self.config.tie_word_embeddings:
            return F.linear(states * self.config.d_model**-0.5, self.shared.weight)
        return self.lm_head(states)

    def response_states(self, source, response):
        """Teacher forcing: the states (B, T, D) that predict the tokens of response (B, T).

        The decoder reads the response shifted by one, so that token t is predicted from those
        before it. It starts from PAD_ID.
        """
        start = response.new_full((len(response), 1), PAD_ID)
        inputs = torch.cat([start, response[:, :-1]], 1)
        return self.decode(inputs, self.encode(source), source)

    def loss_sum(self, source, response):
        """The sum over tokens of -log p(response | source), and the number of tokens."""
        tokens = response != PAD_ID
        with autocast(source.device):
            # No logits for padding: a training step of the preset `real` is 1.16x faster.
            states = self.response_states(source, response)[tokens]  # (tokens, D)
            logits = self.logits(states)  # (tokens, V)
        loss = F.cross_entropy(logits.float(), response[tokens], reduction="sum")
        return loss, int(tokens.sum())


def autocast(device):
    """bf16 on a GPU, plain fp32 on a CPU. Never fp16: T5's activations overflow it."""
    if torch.device(device).type == "cuda":
        return torch.autocast("cuda", torch.bfloat16)
    return nullcontext()


# ---- sampling -------------------------------------------------------------------------------


@dataclass
class Sampling:
    """What responses are sampled with. PPO computes log-probs under the same distribution."""

    temperature: float = option(1.0, "logits are divided by it", 0.01, 100)
    top_k: int = option(0, "sample from the k likeliest tokens only; 0: from all", 0, 10**6)
    top_p: float = option(
        1.0, "then only from the smallest set of at least this probability", 0.01, 1
    )
    min_length: int = option(1, "shortest response in tokens, </s> included", 1, 1000)
    max_length: int = option(64, "longest response in tokens, </s> included", 1, 1000)
    greedy: bool = False  # always the likeliest token


@dataclass
class Generation:
    """Sampled responses. After a response's </s> everything is 0."""

    ids: torch.Tensor  # (B, T)
    log_probs: torch.Tensor  # (B, T), under the distribution that was sampled from
    states: torch.Tensor  # (B, T, D), the decoder states that the tokens were sampled from
    support: torch.Tensor  # (B, T, V) bool, the tokens that could have been sampled


def filter_logits(logits, top_k=0, top_p=1.0):
    """-inf on all but the k likeliest tokens, then on all but the smallest set of mass >= p.

    logits: (B, V). top_k 0 and top_p 1 keep everything. Ties with the k-th stay.
    """
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probs = ordered.softmax(-1)
        mass_before = probs.cumsum(-1) - probs  # of the likelier tokens
        drop = torch.zeros_like(logits, dtype=torch.bool)
        drop = drop.scatter(-1, order, mass_before >= top_p)
        logits = logits.masked_fill(drop, -torch.inf)
    return logits


def draw(logits, sampling):
    """Sample from softmax(filter_logits(logits / temperature)).

    logits: (B, V), -inf for what must not come. sampling: temperature, top_k, top_p, and
    greedy, which takes the likeliest token. Returns tokens (B,), their log-probs (B,), and the
    support (B, V) bool: the tokens that could have been sampled.
    """
    logits = filter_logits(logits / sampling.temperature, sampling.top_k, sampling.top_p)
    log_probs = logits.log_softmax(-1)  # (B, V)
    if sampling.greedy:
        chosen = log_probs.argmax(-1, keepdim=True)  # (B, 1)
    else:
        # The token at which the cumulative probability passes a uniform number: 1.27 to 1.41
        # times faster than torch.multinomial. In double, or rounding would skip rare tokens.
        # right=True: a token of probability 0 is not chosen, even if the number is 0.
        cumulative = log_probs.exp().cumsum(-1, dtype=torch.double)
        uniform = torch.rand(len(logits), 1, dtype=torch.double, device=logits.device)
        chosen = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
        chosen = chosen.clamp(max=logits.shape[-1] - 1)  # with NaN logits it would be V
    chosen_log_probs = log_probs.gather(1, chosen)[:, 0]  # (B,)
    return chosen[:, 0], chosen_log_probs, log_probs > -torch.inf


class BlockCache:
    """A decoder block's keys and values: of the source, and of the tokens generated so far."""

    def __init__(self, block, memory):
        keys, values = block.cross_attn.keys_values(memory)  # (B, H, S, d_kv)
        # The memory's keys and values, laid out once and not at each step: with the preset
        # `toy` sampling is 1.28x faster.
        self.memory = keys.contiguous(), values.contiguous()
        # The tokens' keys and values: none yet. The memory's are used only for their shape.
        self.keys = keys[:, :, :0]  # (B, H, 0, d_kv)
        self.values = values[:, :, :0]

    def append(self, keys, values):
        """The newest token's, (B, H, 1, d_kv) -> those of all tokens so far."""
        self.keys = torch.cat([self.keys, keys], 2)
        self.values = torch.cat([self.values, values], 2)
        return self.keys, self.values


@torch.no_grad()
def generate(model, source, sampling, banned=(PAD_ID, UNK_ID)):
    """Sample a response for each row of source (B, S), with torch's global random generator.

    model: a T5 in eval mode. banned: ids that are never sampled.
    Returns a Generation, as long as the longest response.
    """
    # 32 rows at a time, which fit into the processor's cache: with the preset `real` sampling
    # is 1.17x faster.
    memory = torch.cat([model.encode(part) for part in source.split(32)])  # (B, S, D)
    memory_bias = padding_bias(source)
    self_bias = model.decoder.position_bias(sampling.max_length)  # (1, H, T, T)
    caches = [BlockCache(block, memory) for block in model.decoder.blocks]

    token = source.new_full((len(source),), PAD_ID)  # (B,)
    ended = torch.zeros_like(token, dtype=torch.bool)
    steps = []  # a Generation's four tensors, of one token each
    for t in range(sampling.max_length):
        # The state that predicts token t, from the token before it and the caches.
        state = model.decoder(
            model.shared(token[:, None]),  # (B, 1, D)
            self_bias[:, :, t : t + 1, : t + 1],  # (1, H, 1, t + 1)
            None,  # memory: the caches have its keys and values
            memory_bias,
            caches,
        )[:, 0]  # (B, D)

        # Never what is banned, and no </s> too early.
        logits = model.logits(state).float()  # (B, V)
        logits[:, banned] = -torch.inf
        if t + 1 < sampling.min_length:
            logits[:, EOS_ID] = -torch.inf
        token, log_prob, support = draw(logits, sampling)
        steps.append((token, log_prob, state, support))
        ended = ended | (token == EOS_ID)
        if ended.all():
            break
    sampled = Generation(*(torch.stack(column, 1) for column in zip(*steps)))

    # Rows that ended early went on until the last one did: there all is set to 0.
    is_eos = (sampled.ids == EOS_ID).long()
    after_eos = is_eos.cumsum(1) - is_eos > 0  # (B, T)
    for tensor in (sampled.ids, sampled.log_probs, sampled.states, sampled.support):
        tensor[after_eos] = 0
    return sampled


# ---- training -------------------------------------------------------------------------------

MAX_GRAD_NORM = 1.0


class Optimizer:
    """AdamW with one learning rate per tensor; if asked, Muon takes the layers' matrices.

    unscaled: tensors with one of these words in their names always get the plain rate (see
              set_lr). relative_bias and PPO's value head start at 0 or near it, and have to
              grow; a step relative to that start would be too small.
    muon:     Muon makes all singular values of a matrix's step equal. From scratch it needs
              about half of AdamW's steps (its authors' figure, Jordan et al. 2024).
    """

    def __init__(self, model, unscaled=("relative_bias",), muon=False):
        adam, matrices = [], []
        for name, parameter in model.named_parameters():
            # Is the rate relative to the tensor's RMS? (relative_bias: relative positions.)
            relative = not any(word in name for word in unscaled)
            # relative_bias and the value head are 2-D, too, but no matrices of a layer.
            is_layer_matrix = relative and parameter.dim() == 2 and not is_embedding(name)
            group = {"params": [parameter], "relative": relative}
            if muon and is_layer_matrix:
                matrices.append(group)
            else:
                adam.append(group)

        # The rates come from set_lr. fused makes AdamW's own step 1.9x faster, and a whole
        # training step 1.03x. match_rms_adamw: Muon's steps are about as large as AdamW's, so
        # that one rate serves both.
        self.parts = [torch.optim.AdamW(adam, lr=0.0, weight_decay=0.0, fused=True)]
        if matrices:
            part = torch.optim.Muon(
                matrices, lr=0.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
            )
            self.parts.append(part)
        self.tensors = [group["params"][0] for group in adam + matrices]

    def set_lr(self, lr, rms_scaled):
        """lr for every tensor; with rms_scaled, lr * max(RMS(tensor), 1e-3).

        T5 starts with embeddings of std 1 beside matrices of std D^-1/2. One absolute step is
        too small for the first or too large for the second; a relative one fits both
        (Adafactor's "relative step", Shazeer & Stern 2018, arXiv 1804.04235).
        """
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr
                if rms_scaled and group["relative"]:
                    group["lr"] = lr * max(rms(group["params"][0]), 1e-3)

    def step(self):
        """Clip the gradient, step, clear it; a gradient that is not finite is dropped.

        Returns the gradient's norm before clipping.
        """
        norm = nn.utils.clip_grad_norm_(self.tensors, MAX_GRAD_NORM).item()
        if math.isfinite(norm):
            for part in self.parts:
                part.step()
        self.zero_grad()
        return norm

    def zero_grad(self):
        for part in self.parts:
            part.zero_grad()

    def state_dict(self):
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state):
        for part, saved in zip(self.parts, state["parts"]):
            part.load_state_dict(saved)


def is_embedding(name):
    """The embedding or the head: a row for each token, no map between states; so no Muon."""
    return "shared" in name or "lm_head" in name


def rms(tensor):
    """The root of the mean of the squares."""
    return tensor.detach().norm().item() / math.sqrt(tensor.numel())


@dataclass
class TrainConfig:
    steps: int = option(600, "optimizer steps", low=0)
    batch_size: int = option(32, "examples per step", low=1)
    micro_batch: int = option(0, "examples per forward pass, to save memory; 0: all", low=0)
    lr: float = option(3e-2, "learning rate, relative if rms_scaled", high=10)
    rms_scaled: bool = True  # lr is relative to each tensor's RMS; off for a pretrained T5
    muon: bool = False  # Muon for the layers' matrices; see Optimizer
    warmup: int = option(50, "steps in which the rate rises; then it falls to 0", low=0)
    eval_every: int = option(200, "steps between validations; the best weights stay", low=1)


class Trainer:
    """Gradient descent on the mean of a loss, keeping the weights of the best validation.

    Rows are indices of examples, such as [7, 2].
    loss_sum: rows -> (sum of their losses, number of items that the mean is over). It looks
              the examples up, and asks a model; see T5.loss_sum.
    rows_at:  step -> the rows of its batch.
    validate: () -> validation loss, lower is better. None: the last weights are kept.
    A step depends on its number, the state and torch's generator only.
    """

    shown = ("loss", "valid")  # what emprl.py's line of progress shows of a record

    def __init__(self, model, loss_sum, rows_at, validate, config):
        self.model = model
        self.loss_sum = loss_sum
        self.rows_at = rows_at
        self.validate = validate
        self.config = config
        self.optimizer = Optimizer(model, muon=config.muon)
        self.best_loss = math.inf
        self.best_weights = None

    def step(self, i):
        """Step i, counted from 0. Returns what it measured, as plain numbers."""
        config = self.config
        self.model.train()
        lr = self.learning_rate(i)
        self.optimizer.set_lr(lr, config.rms_scaled)

        # The gradient of the mean, a micro-batch at a time.
        rows = self.rows_at(i)
        size = config.micro_batch or len(rows)
        total, count = 0.0, 0
        for start in range(0, len(rows), size):
            loss, items = self.loss_sum(rows[start : start + size])
            loss.backward()
            total += loss.item()
            count += items
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad /= count

        norm = self.optimizer.step()
        record = {"loss": total / count, "lr": lr, "grad_norm": norm}
        record["skipped"] = float(not math.isfinite(norm))

        # Now and then, and at the end: is this the best so far?
        last = i + 1 == config.steps
        if self.validate is not None and ((i + 1) % config.eval_every == 0 or last):
            record["valid"] = self.validate_and_keep_best()
        return record

    def learning_rate(self, i):
        """It rises linearly over the warm-up, then falls linearly to 0."""
        config = self.config
        rise = (i + 1) / max(config.warmup, 1)
        fall = (config.steps - i) / max(config.steps - config.warmup, 1)
        return config.lr * min(rise, fall)

    @torch.no_grad()
    def validate_and_keep_best(self):
        """Returns the validation loss; of the best so far a copy of the weights is kept."""
        self.model.eval()
        loss = self.validate()
        if loss < self.best_loss:
            self.best_loss = loss
            self.best_weights = copy.deepcopy(self.model.state_dict())
        return loss

    def finish(self):
        """Leaves the best weights in the model; without validate, the last stay."""
        self.model.eval()
        if self.best_weights is not None:
            self.model.load_state_dict(self.best_weights)

    def warnings(self, record, first):
        """Warnings about a record; first: the stage's first, to compare with. None here."""
        return []

    def state_dict(self):
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best_loss": self.best_loss,
            "best_weights": self.best_weights,
        }

    def load_state_dict(self, state):
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.best_loss = state["best_loss"]
        self.best_weights = state["best_weights"]


# ---- checkpoints ----------------------------------------------------------------------------


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: which file, what is wrong, what to do; in one line."""


@contextmanager
def reading(path):
    """Whatever goes wrong in here becomes a CheckpointError that begins with the path.

    So the functions that are called in here may raise what they like.
    """
    try:
        yield
    except PermissionError:  # nothing is wrong with the file
        raise
    except CheckpointError as error:  # its message says what to do
        raise CheckpointError(f"{path}: {error}") from None
    except Exception as error:  # a damaged file leads to errors of many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        message = f"{path}: cannot be used ({reason}); delete it or put back a good copy"
        raise CheckpointError(message) from None


def save_atomically(state, path):
    """torch.save beside path, then rename: nobody sees half a file; the old one is safe.

    Raises OSError if it cannot be written.
    """
    temporary = Path(f"{path}.tmp")
    try:
        torch.save(state, temporary)
        os.replace(temporary, path)
    except RuntimeError as error:  # torch raises this one, not OSError, if a write fails
        reason = "could not be written, is the disk full?"
        raise OSError(errno.ENOSPC, reason, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def load_state(path):
    """Loads a torch.save file: tensors and plain values only; no code in it is run.

    Raises CheckpointError.
    """
    with reading(path):
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError("no ordinary file")  # to open a pipe may take for ever
        if zipfile.is_zipfile(path):
            check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        check_storage(state)
        return state


def check_archive(path):
    """Raises an error for a zip file that is compressed (torch's are not) or damaged."""
    with zipfile.ZipFile(path) as archive:
        # The sizes first: torch compresses nothing; a harmful file may unpack to terabytes.
        unpacked = sum(part.file_size for part in archive.infolist())
        if unpacked > os.path.getsize(path):
            raise ValueError(f"compressed, {unpacked / 1e9:.3g} GB when unpacked")
        damaged = archive.testzip()  # torch itself compares no checksums
        if damaged:
            raise ValueError(f"{damaged} fails its checksum")


def check_storage(state):
    """Raises ValueError for a tensor of more numbers than its storage has.

    A file of 100 kB may hold one row of zeros, expanded to gigabytes when somebody reads it.
    """
    if torch.is_tensor(state):
        if state.numel() * state.element_size() > state.untyped_storage().nbytes():
            raise ValueError(f"a tensor of {tuple(state.shape)} is larger than its storage")
    elif isinstance(state, dict):
        check_storage(list(state.values()))
    elif isinstance(state, (list, tuple)):
        for part in state:
            check_storage(part)


FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.half,
    "BF16": torch.bfloat16,
}


def load_safetensors(path):
    """A .safetensors file: the length of a JSON header in 8 bytes, the header, the numbers.

    Raises CheckpointError.
    """
    with reading(path):
        content = bytearray(Path(path).read_bytes())
        begin = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:begin])
        header.pop("__metadata__", None)
        numbers = memoryview(content)[begin:]
        state = {}
        for name, tensor in header.items():
            if tensor["dtype"] not in FLOATS:
                raise ValueError(f"{name} is of type {tensor['dtype']}")
            first, end = tensor["data_offsets"]
            flat = torch.frombuffer(numbers[first:end], dtype=FLOATS[tensor["dtype"]])
            state[name] = flat.reshape(tensor["shape"])
        return state


def official_file(folder, *names):
    """The path of the first of these files that an official checkpoint's folder has.

    Raises CheckpointError, with a remedy for each of the usual mistakes.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder / names[0]}: there is no folder {folder}; a T5 is given by a folder, "
            "not by its name: download its config.json, weights and spiece.model"
        )
    problem = f"{folder}: has no {' or '.join(names)}; download it from where the rest is from"
    for name in names:
        path = folder / name
        if path.is_file():
            with open(path, "rb") as file:
                if not file.read(40).startswith(b"version https://git-lfs"):
                    return path
            problem = f"{path}: only git-LFS's pointer to the file; run `git lfs pull` there"
        elif (folder / f"{name}.index.json").is_file():
            problem = f"{path}: in several files, which are not read; save the T5 as one"
    raise CheckpointError(problem)


def weights_file(folder):
    """The path of the weights in an official checkpoint's folder. Raises CheckpointError."""
    return official_file(folder, "model.safetensors", "pytorch_model.bin")


IDS = {"pad_token_id": PAD_ID, "eos_token_id": EOS_ID, "decoder_start_token_id": PAD_ID}


def read_config(path):
    """An official config.json -> T5Config, and the file's own dict. Call it in `reading`."""
    text = path.read_text(encoding="utf-8")
    if text.lstrip().startswith("<"):
        raise ValueError("a web page, not JSON")
    raw = json.loads(text)
    raw = {name: value for name, value in raw.items() if value is not None}
    kind = raw.get("model_type", "t5")
    if kind not in ("t5", "mt5"):
        raise ValueError(f"model_type is {repr(kind)[:40]}, not t5 or mt5")
    for name, wanted in IDS.items():
        if raw.get(name, wanted) != wanted:
            raise ValueError(f"{name} is {raw[name]}, not {wanted}")

    config = T5Config(**{f.name: raw[f.name] for f in fields(T5Config) if f.name in raw})
    if "num_decoder_layers" not in raw:  # older files give one number of layers
        config.num_decoder_layers = config.num_layers
    if config.feed_forward_proj == "gelu" and raw.get("is_gated_act") is True:
        config.feed_forward_proj = "gated-gelu"  # flan-t5 of 2022 writes gelu for it
    check_config(config)
    return config, raw


def check_config(config):
    """Raises ValueError for sizes that no T5 has, before 10^12 layers are built."""
    for f in fields(config):
        value = getattr(config, f.name)
        low, high, choices = f.metadata["low"], f.metadata["high"], f.metadata["choices"]
        if choices:
            legal = value in choices
        else:
            # no isinstance: True is no number here, and an int may stand for a float
            legal = type(value) in (int, f.type) and low <= value <= high
        if not legal:
            wanted = choices or f"from {low} to {high}"
            raise ValueError(f"{f.name} is {repr(value)[:40]}, not {wanted}")
    # otherwise relative_position_bucket would take the logarithm of 1 or less
    if config.relative_attention_num_buckets >= 2 * config.relative_attention_max_distance:
        raise ValueError(
            "relative_attention_max_distance is not above half of "
            "relative_attention_num_buckets"
        )


# The parts of our names that are called otherwise in official files. {ff} is the number of the
# feed-forward layer: 1, or after cross-attention 2; official_name puts it in.
OFFICIAL = {
    "blocks": "block",
    "self_attn": "layer.0.SelfAttention",
    "self_norm": "layer.0.layer_norm",
    "cross_attn": "layer.1.EncDecAttention",
    "cross_norm": "layer.1.layer_norm",
    "final_norm": "final_layer_norm",
    "ff": "layer.{ff}.DenseReluDense",
    "ff_norm": "layer.{ff}.layer_norm",
    "relative_bias": "block.0.layer.0.SelfAttention.relative_attention_bias",
}
EMBEDDING = "shared.weight"
HEAD = "lm_head.weight"
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# a table that the official conversion left behind; never used
LEFTOVER = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


def official_name(name):
    """Our parameter's name -> its name in an official checkpoint."""
    official = ".".join(OFFICIAL.get(part, part) for part in name.split("."))
    feed_forward = 1 if name.startswith("encoder") else 2
    return official.format(ff=feed_forward)


def merge_embeddings(state, config, raw):
    """Changes state and config: afterwards state has the embedding once, a head if needed.

    Official files have the embedding up to four times: shared, encoder's, decoder's, and head.
    Left, what the file has: tied, its tie_word_embeddings; scaled, whether its logits are
    multiplied by D^-1/2. Right, what this function makes of it. "Transformers 5" is version 5
    of Hugging Face's library.

    written by       tied    scaled   head in the file       tied now   head now
    v1.0             true    yes      the embedding          True       none
    v1.1, mT5        false   no       its own                False      the file's
    mT5              true    no       the embedding          False      the embedding
    Transformers 5   true    no       its own                False      the file's
    Transformers 5   true    yes      its own                False      the file's * D^-1/2

    A tied head may be left out of the file: it is the embedding. Transformers 5 always says
    tied; whether logits are scaled is its scale_decoder_outputs.
    """
    state.pop(LEFTOVER, None)
    for name in COPIES:
        if name in state:
            copied = state[name]
            state.setdefault(EMBEDDING, copied)
            if torch.equal(copied, state[EMBEDDING]):
                del state[name]
    if EMBEDDING not in state:
        return  # check_shapes will name it

    tied = config.tie_word_embeddings
    scaled = raw.get("scale_decoder_outputs", tied and raw.get("model_type") != "mt5")
    config.tie_word_embeddings = False
    if tied:
        state.setdefault(HEAD, state[EMBEDDING])
    if not scaled or HEAD not in state:
        return

    # Scaled logits: tied only if head and embedding are equal, whatever config.json says.
    if torch.equal(state[HEAD], state[EMBEDDING]):
        config.tie_word_embeddings = True
        del state[HEAD]
    else:
        state[HEAD] = state[HEAD] * config.d_model**-0.5


def check_tensors(state):
    """Raises CheckpointError unless state maps names without a prefix to finite tensors."""
    if not isinstance(state, dict) or not all(torch.is_tensor(x) for x in state.values()):
        raise CheckpointError("not tensors by name; save the T5's state_dict() itself")
    for name, tensor in state.items():
        if name.endswith(EMBEDDING) and name != EMBEDDING:
            prefix = name.removesuffix(EMBEDDING)
            raise CheckpointError(
                f"its names begin with {prefix[:40]!r}, a wrapper's; save the T5 inside it"
            )
        if not tensor.isfinite().all():
            raise CheckpointError(
                f"{name[:80]} is not finite; take a checkpoint from before training diverged"
            )


def check_shapes(state, wanted):
    """Raises CheckpointError unless the two {name: tensor} agree in names and shapes."""
    found = {f"{name[:80]} {tuple(x.shape)}" for name, x in state.items()}
    needed = {f"{name} {tuple(x.shape)}" for name, x in wanted.items()}
    wrong = [f"{tensor} is missing" for tensor in needed - found]
    wrong += [f"{tensor} has no place" for tensor in found - needed]
    wrong.sort()
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(
            f"tensors of another configuration: {'; '.join(wrong[:3])}{more}; "
            "put its own config.json beside it"
        )


def from_pretrained(folder, vocab_size=0):
    """A T5 from an official folder: config.json, and model.safetensors or pytorch_model.bin.

    vocab_size: how many embeddings its tokenizer needs. A tensor of the file that is neither
    used nor known to be a copy is an error. Raises CheckpointError.
    """
    path = official_file(folder, "config.json")
    with reading(path):
        config, raw = read_config(path)
        if config.vocab_size < vocab_size:
            raise CheckpointError(
                f"vocab_size {config.vocab_size}, but its tokenizer has {vocab_size} pieces; "
                "take all files from one T5"
            )

    path = weights_file(folder)
    state = load_safetensors(path) if path.suffix == ".safetensors" else load_state(path)
    with reading(path):
        check_tensors(state)
        merge_embeddings(state, config, raw)
        with torch.device("meta"):  # shapes only: no memory before all is known to fit
            model = T5(config)
        wanted = {official_name(name): x for name, x in model.state_dict().items()}
        check_shapes(state, wanted)
        weights = {name: state[official_name(name)] for name in model.state_dict()}
        model.to_empty(device="cpu").load_state_dict(weights)
    return model


def save_pretrained(model, folder):
    """Writes config.json and pytorch_model.bin, as transformers' T5 reads them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    description = {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "is_encoder_decoder": True,
    }
    text = json.dumps({**description, **IDS, **asdict(model.config)}, indent=2)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    weights = {official_name(name): x for name, x in model.state_dict().items()}
    save_atomically(weights, folder / "pytorch_model.bin")


# ---- only for speed -------------------------------------------------------------------------


class Dropout(nn.Dropout):
    """nn.Dropout; on a CPU with one random byte per element, not torch's random float.

    On a CPU p is rounded to a multiple of 1/256. The mean stays exact: what is kept is divided
    by its exact share, keep / 256. With nn.Dropout a training step of the preset `real` takes
    1.2 times as long.
    """

    def forward(self, x):
        keep = 256 - round(256 * self.p)  # how many of a byte's 256 values mean "keep"
        if not self.training or keep == 256 or x.device.type != "cpu":
            return super().forward(x)

        # Each random 64-bit integer gives eight bytes.
        words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
        random_bytes = words.view(torch.uint8)[: x.numel()].view(x.shape)
        # Written as floats at once: a mask of bools would have to be converted.
        mask = torch.lt(random_bytes, keep, out=torch.empty_like(x))
        return x * mask.mul_(256 / keep)
