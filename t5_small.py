"""T5 from scratch: the model, generation, official checkpoints, and the training step.

Source: Raffel et al. 2020 (arXiv 1910.10683); v1.1 (gated GELU, untied head): Shazeer 2020 (arXiv 2002.05202). B batch, S source
length, T response length, D model width, H heads, V vocabulary. Ids in, ids out: id 0 is padding and also starts the decoder."""

import copy, errno, json, math, os, zipfile
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F


class CheckpointError(ValueError):
    """A checkpoint that can't be used; the message says which file, what is wrong and what to do."""


PAD_ID = 0  # fills up the rows of a batch, and starts the decoder
EOS_ID = 1  # </s>: ends an utterance, and a response
UNK_ID = 2  # a piece that the tokenizer does not know; never sampled


@dataclass
class T5Config:
    """T5's own config.json names, so that an official file can be read field by field."""

    vocab_size: int = 2048
    d_model: int = 128  # D: width of the residual stream
    d_kv: int = 32  # width of one head (H * d_kv need not be d_model)
    d_ff: int = 512  # width inside the feed-forward layer
    num_layers: int = 2  # encoder blocks
    num_decoder_layers: int = 2
    num_heads: int = 4  # H
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128  # all larger distances share the last bucket
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    initializer_factor: float = 1.0
    feed_forward_proj: str = "relu"  # "relu" (v1.0) or "gated-gelu" (v1.1)
    tie_word_embeddings: bool = (
        True  # v1.0: the head is the embedding, logits scaled by D^-1/2
    )
    pad_token_id: int = 0
    eos_token_id: int = 1
    decoder_start_token_id: int = 0


T5_RANGES = {  # what a T5 may have: sizes a few times those of T5-11B, the largest
    "vocab_size": (1, 1_000_000),
    "d_model": (2, 65_536),
    "d_kv": (1, 8_192),
    "d_ff": (1, 262_144),
    "num_layers": (1, 1_000),
    "num_decoder_layers": (1, 1_000),
    "num_heads": (1, 1_024),
    "relative_attention_num_buckets": (4, 1_000),
    "relative_attention_max_distance": (1, 1_000_000),
    "dropout_rate": (0, 0.99),
    "layer_norm_epsilon": (1e-12, 1),
    "initializer_factor": (0, 100),
    "pad_token_id": (0, 0),
    "eos_token_id": (1, 1),
    "decoder_start_token_id": (0, 0),
}


def relative_position_bucket(
    relative_position, bidirectional, num_buckets=32, max_distance=128
):
    """The bucket of key position - query position, integers of any shape (paper, section 2.1, and its code). Of n buckets a
    distance d below n/2 has its own, d; the others share n/2 + floor(n/2 log(d / (n/2)) / log(max_distance / (n/2))), at most n - 1.
    Bidirectional: n is halved, and the upper half is for keys after the query. Causal: those keys all get bucket 0."""
    bucket, distance = torch.zeros_like(relative_position), (-relative_position).clamp(min=0)
    if bidirectional:
        num_buckets //= 2
        bucket, distance = (
            (relative_position > 0).long() * num_buckets,
            relative_position.abs(),
        )
    max_exact = num_buckets // 2
    log_ratio = torch.log(distance.clamp(min=1) / max_exact) / math.log(
        max_distance / max_exact
    )
    far = (max_exact + (log_ratio * (num_buckets - max_exact)).long()).clamp(
        max=num_buckets - 1
    )
    return bucket + torch.where(distance < max_exact, distance, far)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight in float32: no mean is subtracted, there is no bias (Zhang & Sennrich 2019)."""

    def __init__(self, d_model, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(d_model)), eps

    def forward(self, x):
        x = x.float()
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


def scaled_mask(random_bytes, keep, like):
    """256 / keep where a byte is below keep, else 0, as floats at once: by way of bools it takes three times as long."""
    return torch.lt(random_bytes, keep, out=torch.empty_like(like)).mul_(256 / keep)


class ByteDropout(torch.autograd.Function):
    """Dropout that draws, and keeps for the backward pass, one byte an element, where torch draws and keeps floats on a CPU."""

    @staticmethod
    def forward(ctx, x, keep, relu):
        words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(
            -(2**63), None
        )  # 8 bytes a draw
        random_bytes = words.view(torch.uint8)[: x.numel()].view(x.shape)
        y = scaled_mask(random_bytes, keep, x).mul_(x.clamp(min=0) if relu else x)
        ctx.save_for_backward(
            y if relu else random_bytes
        )  # y > 0: neither dropped nor cut off by relu
        ctx.keep, ctx.relu = keep, relu
        return y

    @staticmethod
    def backward(ctx, gradient):
        (kept,) = ctx.saved_tensors
        if ctx.relu:
            return (
                torch.gt(kept, 0, out=torch.empty_like(gradient))
                .mul_(256 / ctx.keep)
                .mul_(gradient),
                None,
                None,
            )
        return scaled_mask(kept, ctx.keep, gradient).mul_(gradient), None, None


class Dropout(nn.Dropout):
    """torch's on a GPU; on a CPU `ByteDropout`: p is rounded to 1/256, the mean stays exact. relu: of relu(x)."""

    def forward(self, x, relu=False):
        keep = 256 - round(256 * self.p)
        if self.training and keep < 256 and x.device.type == "cpu":
            return ByteDropout.apply(x, keep, relu)
        return super().forward(F.relu(x) if relu else x)


class Attention(nn.Module):
    """Multi-head attention, o(dropout(`weights`) v) with weights = softmax(q(x) k^T + bias), (B, H, T, S), of keys k that are
    projected and split already. T5 has no 1/sqrt(d_kv): it is in q's initialisation."""

    def __init__(self, config):
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.num_heads, self.d_kv = config.num_heads, config.d_kv
        self.q, self.k, self.v = (
            nn.Linear(config.d_model, inner, bias=False) for _ in range(3)
        )
        self.o = nn.Linear(inner, config.d_model, bias=False)
        self.dropout = Dropout(config.dropout_rate)

    def split(self, x):
        return x.unflatten(-1, (self.num_heads, self.d_kv)).transpose(
            1, 2
        )  # (B, T, H*d_kv) -> (B, H, T, d_kv)

    def keys_values(self, memory):
        return self.split(self.k(memory)), self.split(self.v(memory))  # 2 x (B, H, S, d_kv)

    def weights(self, x, k, bias):
        scores = self.split(self.q(x)) @ k.transpose(-1, -2) + bias  # (B, H, T, S)
        return F.softmax(scores.float(), dim=-1)

    def forward(self, x, keys_values, bias):
        """x: (B, T, D) asks; keys_values: two (B, H, S, d_kv) answer; bias broadcasts to (B, H, T, S)."""
        k, v = keys_values
        context = self.dropout(self.weights(x, k, bias)).to(v.dtype) @ v  # (B, H, T, d_kv)
        return self.o(context.transpose(1, 2).flatten(2))  # (B, T, D)


class FeedForward(nn.Module):
    """v1.0: W_o relu(W_i x). v1.1: W_o (gelu(W_i0 x) * W_i1 x)."""

    def __init__(self, config):
        super().__init__()
        self.gated = config.feed_forward_proj == "gated-gelu"
        for name in ("wi_0", "wi_1") if self.gated else ("wi",):
            setattr(self, name, nn.Linear(config.d_model, config.d_ff, bias=False))
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)
        self.dropout = Dropout(config.dropout_rate)

    def forward(self, x):
        if self.gated:
            return self.wo(
                self.dropout(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))
            )
        return self.wo(self.dropout(self.wi(x), relu=True))


class Block(nn.Module):
    """Pre-norm residual layers: x + f(norm(x)) for self-attention, cross-attention (decoder), feed-forward."""

    def __init__(self, config, is_decoder):
        super().__init__()
        norm = lambda: RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.self_norm, self.self_attn = norm(), Attention(config)
        self.cross_norm, self.cross_attn = (
            (norm(), Attention(config)) if is_decoder else (None, None)
        )
        self.ff_norm, self.ff = norm(), FeedForward(config)
        self.dropout = Dropout(config.dropout_rate)

    def forward(self, x, self_bias, memory=None, memory_bias=None, cache=None):
        """x (B, T, D) -> (B, T, D). With a cache, x is the newest token only (T = 1)."""
        h = self.self_norm(x)
        keys_values = self.self_attn.keys_values(h)
        if cache is not None:
            keys_values = cache.append(*keys_values)
        x = x + self.dropout(self.self_attn(h, keys_values, self_bias))
        if self.cross_attn is not None:
            h = self.cross_norm(x)
            if cache is None:
                keys_values = self.cross_attn.keys_values(memory)
            else:
                keys_values = cache.memory
            x = x + self.dropout(self.cross_attn(h, keys_values, memory_bias))
        return x + self.dropout(self.ff(self.ff_norm(x)))


class Stack(nn.Module):
    """The encoder or the decoder. One table of relative position biases serves all its layers."""

    def __init__(self, config, is_decoder):
        super().__init__()
        self.config, self.is_decoder = config, is_decoder
        self.blocks = nn.ModuleList(
            Block(config, is_decoder)
            for _ in range(config.num_decoder_layers if is_decoder else config.num_layers)
        )
        self.relative_bias = nn.Embedding(
            config.relative_attention_num_buckets, config.num_heads
        )
        self.final_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.dropout = Dropout(config.dropout_rate)

    def position_bias(self, length):
        """(1, H, length, length); the decoder's also hides the future."""
        position = torch.arange(length, device=self.relative_bias.weight.device)
        relative = position[None, :] - position[:, None]  # key - query
        limits = (
            self.config.relative_attention_num_buckets,
            self.config.relative_attention_max_distance,
        )
        bucket = relative_position_bucket(relative, not self.is_decoder, *limits)
        bias = self.relative_bias(bucket).permute(2, 0, 1)[None]  # (1, H, T, T)
        return bias.masked_fill(relative > 0, -1e9) if self.is_decoder else bias

    def forward(self, x, self_bias, memory=None, memory_bias=None, caches=None):
        x = self.dropout(x)  # (B, T, D)
        for i, block in enumerate(self.blocks):
            cache = None if caches is None else caches[i]
            x = block(x, self_bias, memory, memory_bias, cache)
        return self.dropout(self.final_norm(x))


def padding_bias(ids, pad_id=0):
    """(B, S) -> (B, 1, 1, S): 0 on tokens, -1e9 on padding, to be added to attention scores."""
    return (ids == pad_id)[:, None, None, :] * -1e9


class T5Encoder(nn.Module):
    """Embedding and encoder: half a T5, all that an identifier needs; its names are T5's own."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = Stack(config, is_decoder=False)
        self.initialise()

    def initialise(self):
        """T5's initialisation: normal with std 1 for embeddings, fan-in^-1/2 for matrices, and for q
        (d_model * d_kv)^-1/2, which takes the place of attention's usual scaling."""
        c = self.config
        std = {
            "shared": 1.0,
            "lm_head": 1.0,
            "q": (c.d_model * c.d_kv) ** -0.5,
            "o": (c.num_heads * c.d_kv) ** -0.5,
            "wo": c.d_ff**-0.5,
        }
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(
                    p, std=c.initializer_factor * std.get(name.split(".")[-2], c.d_model**-0.5)
                )

    def encode(self, source):
        """(B, S) ids -> (B, S, D) states; padding is hidden from the other positions."""
        return self.encoder(
            self.shared(source),
            self.encoder.position_bias(source.shape[1]) + padding_bias(source),
        )


class T5(T5Encoder):
    """The encoder-decoder. encode -> decode -> logits, each usable alone."""

    def __init__(self, config):
        super().__init__(config)
        self.decoder = Stack(config, is_decoder=True)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.initialise()

    def decode(self, inputs, memory, source):
        """Decoder inputs (B, T) and the encoder's memory (B, S, D) -> the decoder's last states (B, T, D)."""
        return self.decoder(
            self.shared(inputs),
            self.decoder.position_bias(inputs.shape[1]),
            memory,
            padding_bias(source),
        )

    def logits(self, states):
        """(..., D) -> (..., V). v1.0 ties the head to the embedding and scales the states by D^-1/2."""
        if self.config.tie_word_embeddings:
            return F.linear(states * self.config.d_model**-0.5, self.shared.weight)
        return self.lm_head(states)

    def response_states(self, source, response):
        """States that predict each token of response (B, T), right-padded: (B, T, D) (teacher forcing)."""
        start = response.new_full((len(response), 1), self.config.decoder_start_token_id)
        return self.decode(
            torch.cat([start, response[:, :-1]], 1), self.encode(source), source
        )

    def loss_sum(self, source, response):
        """Sum over tokens of -log p(response | source), and the number of tokens. Padding is dropped before the
        product with the vocabulary, the largest in a small model."""
        tokens = response != self.config.pad_token_id
        with autocast(source.device):
            logits = self.logits(self.response_states(source, response)[tokens])  # (tokens, V)
        return F.cross_entropy(logits.float(), response[tokens], reduction="sum"), int(
            tokens.sum()
        )


# ---- generation -----------------------------------------------------------------------------------------------------
@dataclass
class Sampling:
    """The distribution that is sampled from. PPO scores with the very same one (see ppo.py)."""

    temperature: float = 1.0
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0  # 1: all tokens
    min_length: int = 1  # tokens before </s> is allowed
    max_length: int = 32  # tokens, </s> included
    greedy: bool = False


@dataclass
class Generation:
    ids: torch.Tensor  # (B, T) sampled tokens; this and the rest is 0 after </s>
    log_probs: torch.Tensor  # (B, T) of the distribution sampled from
    states: torch.Tensor  # (B, T, D) decoder states that the tokens were sampled from
    support: torch.Tensor  # (B, T, V) bool: the tokens that could have been sampled


def filter_logits(logits, top_k=0, top_p=1.0):
    """Logits (B, V), -inf on all but the k likeliest (0: all), then on all but the smallest set of probability >= p (1: all)."""
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(
            logits < logits.topk(top_k, dim=-1).values[:, -1:], -torch.inf
        )
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(
            -1
        )  # mass of the likelier tokens
        drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(drop, -torch.inf)
    return logits


def draw(logits, sampling):
    """Sample from softmax(filter_logits(logits / temperature)).

    logits: (B, V). Returns tokens (B,), their log-probs (B,), and the support (B, V) bool.
    """
    # The k likeliest come first: what follows looks at k columns, not at V of them.
    vocab_size = logits.shape[-1]
    columns = None
    if 0 < sampling.top_k < vocab_size:
        logits, columns = logits.topk(sampling.top_k)
    logits = filter_logits(logits / sampling.temperature, top_p=sampling.top_p)
    log_probs = logits.log_softmax(-1)  # (B, V or k)

    if sampling.greedy:
        chosen = log_probs.argmax(-1, keepdim=True)  # (B, 1)
    else:
        # The column at which the cumulative probability passes a uniform number.
        cumulative = log_probs.exp().cumsum(-1, dtype=torch.double)
        uniform = torch.rand(len(logits), 1, dtype=torch.double, device=logits.device)
        chosen = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
        chosen = chosen.clamp(max=log_probs.shape[-1] - 1)  # a diverged model has no number

    log_prob = log_probs.gather(1, chosen)[:, 0]
    support = log_probs > -torch.inf
    if columns is None:
        return chosen[:, 0], log_prob, support
    everything = torch.zeros(len(logits), vocab_size, dtype=torch.bool, device=logits.device)
    support = everything.scatter(1, columns, support)
    return columns.gather(1, chosen)[:, 0], log_prob, support


class BlockCache:
    """A decoder block's keys and values: of the source, and of the tokens generated so far."""

    def __init__(self, block, memory, max_length):
        keys, values = block.cross_attn.keys_values(memory)  # (B, H, S, d_kv)
        self.memory = keys.contiguous(), values.contiguous()  # laid out once, not at each step
        batch, heads, _, width = keys.shape
        self.keys = keys.new_empty(batch, heads, max_length, width)
        self.values = torch.empty_like(self.keys)
        self.length = 0

    def append(self, keys, values):
        """The newest token's, (B, H, 1, d_kv) -> those of all tokens so far."""
        self.keys[:, :, self.length] = keys[:, :, 0]
        self.values[:, :, self.length] = values[:, :, 0]
        self.length += 1
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


@torch.no_grad()
def generate(model, source, sampling, banned=(PAD_ID, UNK_ID)):
    """Sample a response for each row of source (B, S), by torch's global generator.

    banned: ids that are never sampled. Returns a Generation; T is the longest response's length.
    """
    with torch.inference_mode():  # as no_grad, with less overhead
        steps = generation_steps(model, source, sampling, banned)
    ids, log_probs, states, support = (torch.stack(x, 1) for x in zip(*steps))

    # Rows that ended early went on until the last one did: that part is dropped.
    is_eos = (ids == EOS_ID).long()
    after_eos = is_eos.cumsum(1) - is_eos > 0  # (B, T)
    for x in (ids, log_probs, states, support):
        x[after_eos] = 0
    return Generation(ids, log_probs, states, support)


def generation_steps(model, source, sampling, banned):
    """Token by token: tokens (B,), log-probs (B,), states (B, D) and support (B, V) of each."""
    memory = torch.cat([model.encode(part) for part in source.split(32)])  # fits a CPU's cache
    memory_bias = padding_bias(source)
    self_bias = model.decoder.position_bias(sampling.max_length)  # (1, H, T, T)
    caches = [BlockCache(b, memory, sampling.max_length) for b in model.decoder.blocks]
    never = torch.tensor([*banned], device=source.device)
    too_early = torch.tensor([*banned, EOS_ID], device=source.device)
    token = source.new_full((len(source),), PAD_ID)
    ended = torch.zeros_like(token, dtype=torch.bool)
    steps = []
    for t in range(sampling.max_length):
        # The state that predicts token t, from the token before it and the caches.
        x = model.shared(token[:, None])  # (B, 1, D)
        bias = self_bias[:, :, t : t + 1, : t + 1]  # (1, H, 1, t + 1)
        states = model.decoder(x, bias, memory, memory_bias, caches)[:, 0]  # (B, D)

        logits = model.logits(states).float()  # (B, V)
        forbidden = too_early if t + 1 < sampling.min_length else never
        logits = logits.index_fill(1, forbidden, -torch.inf)
        token, log_probs, support = draw(logits, sampling)
        steps.append((token, log_probs, states, support))

        ended = ended | (token == EOS_ID)
        if ended.all():
            break
    return steps


# ---- checkpoints ----------------------------------------------------------------------------------------------------
def save_atomically(state, path):
    """torch.save to a temporary file beside path, then rename: nobody ever sees half a file, a full disk leaves the old one."""
    temporary = Path(f"{path}.tmp")
    try:
        torch.save(state, temporary)
        os.replace(temporary, path)
    except RuntimeError as error:  # what torch makes of a write that failed
        raise OSError(
            errno.ENOSPC, "could not be written, is the disk full?", str(path)
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def load_state(path):
    """A saved state dict, tensors and plain values only (no code is run). Raises CheckpointError."""
    try:
        if zipfile.is_zipfile(path):
            check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        raise CheckpointError(
            f"{path}: can't be read as a checkpoint ({reason}); delete it or put back a good copy"
        ) from None


def check_archive(path):
    """Raises ValueError for a zip file that torch did not write, or whose content has changed; torch itself checks no sums."""
    with zipfile.ZipFile(path) as archive:
        # The directory first: a file made to harm unpacks to a thousand times its size. torch compresses nothing.
        unpacked = sum(part.file_size for part in archive.infolist())
        if unpacked > os.path.getsize(path):
            raise ValueError(f"compressed, {unpacked / 1e9:.3g} GB when unpacked")
        damaged = archive.testzip()
        if damaged:
            raise ValueError(f"{damaged} has another checksum")


NUMBERS = {  # of files; computed with is none of them but float32, and bfloat16 on a GPU
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.half,
    "BF16": torch.bfloat16,
}


def load_safetensors(path):
    """The tensors of a .safetensors file: the length of its header (8 bytes), the header (JSON: each tensor's type, shape and
    place), and then the numbers. Other types than floats are left out. Raises CheckpointError."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > os.path.getsize(path):
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            state = {}
            for name, tensor in header.items():
                if tensor["dtype"] in NUMBERS:
                    start, end = tensor["data_offsets"]
                    if not 0 <= start < end <= os.path.getsize(path) - 8 - length:
                        raise ValueError(f"{name} is not all there")
                    file.seek(8 + length + start)
                    numbers = torch.frombuffer(
                        bytearray(file.read(end - start)), dtype=NUMBERS[tensor["dtype"]]
                    )
                    state[name] = numbers.reshape(tensor["shape"])
            return state
    except Exception as error:  # what a header that is not one can lead to has many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        raise CheckpointError(
            f"{path}: can't be read as safetensors ({reason}); put back a good copy"
        ) from None


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


def official_name(name):
    """Our parameter name -> the name in an official T5 checkpoint."""
    official = ".".join(OFFICIAL.get(part, part) for part in name.split("."))
    return official.format(
        ff=1 if name.startswith("encoder") else 2
    )  # the decoder's layer 1 is cross-attention


EMBEDDING = "shared.weight"
SAME_AS_EMBEDDING = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
UNUSED = (  # a leftover of the official conversion
    "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
)


def official_file(folder, *names):
    """The path of the first of these files that an official checkpoint's folder has. Raises CheckpointError."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder / names[0]}: there is no folder {folder}; a T5 is given by a folder on this machine with its config.json, "
            "weights and spiece.model, not by its name: download these three files"
        )
    pointers = []
    for path in [folder / name for name in names if (folder / name).is_file()]:
        with open(path, "rb") as file:
            if not file.read(40).startswith(b"version https://git-lfs"):
                return path
        pointers.append(path)
    if pointers:
        raise CheckpointError(
            f"{pointers[0]}: only git-LFS's pointer to the file; run `git lfs pull` in its folder, or download the file itself"
        )
    parts = [
        f"{name}.index.json" for name in names if (folder / f"{name}.index.json").is_file()
    ]
    if parts:
        raise CheckpointError(
            f"{folder / parts[0]}: a checkpoint in several files, which is not read here; save it as one file"
        )
    raise CheckpointError(
        f"{folder}: has no {' or '.join(names)}; download it from where the checkpoint is from"
    )


def weights_file(folder):
    return official_file(folder, "model.safetensors", "pytorch_model.bin")


def some_of(names, most=3):
    """The first names of a list, and how many others there are: a page of names is no message."""
    others = [f"and {len(names) - most} more"] if len(names) > most else []
    return "; ".join([*names[:most], *others])


def read_config(path):
    """An official config.json -> (T5Config, as if the head were the embedding; scaled, tied). scaled: logits are of states times
    D^-1/2. tied: the file of the weights may leave the head out. Raises ValueError."""
    raw = json.loads(path.read_text(encoding="utf-8"))
    config = T5Config(
        **{f.name: raw[f.name] for f in fields(T5Config) if raw.get(f.name) is not None}
    )
    # older files give one number of layers
    config.num_decoder_layers = raw.get("num_decoder_layers") or config.num_layers
    # flan-t5's of 2022: gated, but called by half its name
    if config.feed_forward_proj == "gelu" and raw.get("is_gated_act") is True:
        config.feed_forward_proj = "gated-gelu"
    if config.feed_forward_proj not in ("relu", "gated-gelu"):
        raise ValueError(f"feed_forward_proj {config.feed_forward_proj!r} is not one of T5's")

    # Transformers 5 writes tie_word_embeddings true always, and scale_decoder_outputs beside it; mT5 never scales.
    tied = config.tie_word_embeddings
    scaled = raw.get("scale_decoder_outputs", tied and raw.get("model_type") != "mt5")
    if not isinstance(tied, bool) or not isinstance(scaled, bool):
        raise ValueError("tie_word_embeddings and scale_decoder_outputs are true or false")
    config.tie_word_embeddings = True
    check_config(config)
    return config, scaled, tied


def check_config(config):
    """Raises ValueError for what no T5 has: looked at before building, since 10^12 layers would be built for ever."""
    for name, (low, high) in T5_RANGES.items():
        value = getattr(config, name)
        kinds = (int,) if isinstance(getattr(T5Config, name), int) else (int, float)
        if type(value) not in kinds or not low <= value <= high:
            raise ValueError(f"{name} is {str(value)[:40]}, not a number from {low} to {high}")
    if config.relative_attention_num_buckets >= 2 * config.relative_attention_max_distance:
        raise ValueError("relative_attention_max_distance is not above half of num_buckets")


def settle_head(state, config, scaled, tied):
    """Official files have the embedding up to four times, as embedding of encoder and decoder and as head. Leaves it once in
    `state`, and a head only if it is another one: then config.tie_word_embeddings is off. Raises ValueError."""
    for name in SAME_AS_EMBEDDING:
        if name in state:
            copy_of_embedding = state.pop(name)
            if not torch.equal(
                state.setdefault(EMBEDDING, copy_of_embedding), copy_of_embedding
            ):
                raise ValueError(f"{name} is not {EMBEDDING}: not a T5")
    embedding = state.get(EMBEDDING)
    head = state.pop("lm_head.weight", embedding if tied else None)
    config.tie_word_embeddings = (
        scaled and head is not None and embedding is not None and torch.equal(head, embedding)
    )
    if not config.tie_word_embeddings and head is not None:
        state["lm_head.weight"] = head * config.d_model**-0.5 if scaled else head


def from_pretrained(folder, vocab_size=0):
    """A T5 from an official folder: config.json and pytorch_model.bin or model.safetensors, with vocab_size embeddings or more.
    Every tensor of the file is used, or known to be a copy or a leftover, or named in the CheckpointError."""
    path = official_file(folder, "config.json")
    try:
        config, scaled, tied = read_config(path)
        if config.vocab_size < vocab_size:
            raise ValueError(
                f"vocab_size {config.vocab_size}, but its tokenizer has {vocab_size}"
            )
        path = weights_file(folder)
        state = load_safetensors(path) if path.suffix == ".safetensors" else load_state(path)
        if not isinstance(state, dict) or not all(map(torch.is_tensor, state.values())):
            raise ValueError("not tensors by name, but a state of training or the like")
        settle_head(state, config, scaled, tied)
    except (
        ArithmeticError,
        AttributeError,
        OSError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise (
            error
            if isinstance(error, CheckpointError)
            else CheckpointError(f"{path}: {error}; give the folder of a T5 checkpoint")
        ) from None
    check_names(path, state)

    with torch.device("meta"):  # shapes only
        model = T5(config)
    named = {official_name(name): (name, p.shape) for name, p in model.state_dict().items()}
    wrong = [
        f"{name} missing"
        if name not in state
        else f"{name} {tuple(state[name].shape)}, not {tuple(shape)}"
        for name, (_, shape) in named.items()
        if name not in state or state[name].shape != shape
    ]
    wrong += [f"{name} has no place" for name in state if name not in (*named, *UNUSED)]
    if wrong:
        raise CheckpointError(
            f"{path}: tensors of another configuration: {some_of(wrong)}; put the config.json beside it that belongs to it"
        )
    if sum(p.numel() for p in model.parameters()) > path.stat().st_size:
        raise CheckpointError(f"{path}: smaller than its tensors; put back a good copy")
    weights = {
        ours: state[name].to(
            torch.float, copy=True
        )  # a file's tensors may share their numbers
        for name, (ours, _) in named.items()
    }
    broken = [name for name, x in weights.items() if not x.isfinite().all()]
    if broken:
        raise CheckpointError(
            f"{path}: not finite (NaN or infinite): {some_of(broken)}; take a checkpoint from before training diverged"
        )
    model.load_state_dict(weights, assign=True)
    return model


def check_names(path, state):
    """Raises CheckpointError for names with a wrapper's prefix."""
    for name in state:
        prefix = name.removesuffix(EMBEDDING)
        if prefix not in ("", name):
            raise CheckpointError(
                f"{path}: its tensors' names begin with {prefix[:40]!r}, those of a wrapper around the T5; save the T5 inside it"
            )


def save_pretrained(model, folder):
    """Write config.json and pytorch_model.bin so that transformers' T5ForConditionalGeneration loads them."""
    (folder := Path(folder)).mkdir(parents=True, exist_ok=True)
    kind = {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "is_encoder_decoder": True,
    }
    (folder / "config.json").write_text(
        json.dumps({**kind, **asdict(model.config)}, indent=2) + "\n", encoding="utf-8"
    )
    save_atomically(
        {official_name(n): p for n, p in model.state_dict().items()},
        folder / "pytorch_model.bin",
    )


# ---- training -------------------------------------------------------------------------------------------------------
def autocast(device):
    """bf16 on a GPU, plain fp32 on a CPU. Never fp16: T5's activations overflow it."""
    return (
        torch.autocast("cuda", torch.bfloat16)
        if torch.device(device).type == "cuda"
        else nullcontext()
    )


def make_optimizers(model, weight_decay=0.0, muon=False, unit=("relative_bias",)):
    """[AdamW] with a parameter group for each tensor, so that `set_lr` can scale each one's step. Tensors whose name
    holds a word of `unit` start near 0 but belong to the scale of 1 (attention's logits, a value). muon: the layers' matrices by
    Muon (Jordan et al. 2024), which makes all singular values of a step equal: as good after half the steps, from scratch."""
    groups = [
        {"params": [p], "unit": any(word in name for word in unit), "name": name}
        for name, p in model.named_parameters()
    ]
    inside = (
        lambda g: muon
        and g["params"][0].dim() == 2
        and not any(k in g["name"] for k in ("shared", "lm_head", *unit))
    )
    adam = torch.optim.AdamW(
        [g for g in groups if not inside(g)], lr=0.0, weight_decay=weight_decay, fused=True
    )
    matrices = [g for g in groups if inside(g)]
    if matrices and not hasattr(torch.optim, "Muon"):
        raise ImportError(
            f"torch {torch.__version__} has no Muon, 2.9 and newer have; "
            "set pretrain.muon=off sft.muon=off, or install a newer torch"
        )
    return [adam] + (
        [torch.optim.Muon(matrices, 0.0, weight_decay, adjust_lr_fn="match_rms_adamw")]
        if matrices
        else []
    )


def set_lr(optimizers, lr, rms_scaled):
    """lr for every tensor; rms_scaled: lr * max(RMS(tensor), 1e-3), Adafactor's "relative step".
    T5 starts with embeddings of std 1 beside matrices of std D^-1/2: one absolute step size is too small for
    the first or too large for the second. A relative one fits both (nanoT5's remedy)."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    tensors = [group["params"][0].detach() for group in groups]
    for group, p, norm in zip(
        groups, tensors, torch.stack(torch._foreach_norm(tensors)).tolist()
    ):
        relative = rms_scaled and not group["unit"]
        group["lr"] = lr * (max(norm / math.sqrt(p.numel()), 1e-3) if relative else 1.0)


def optimizer_step(optimizers, max_grad_norm):
    """Clip the gradient to a norm, step, clear; a gradient that is not finite is dropped. Returns the norm before."""
    tensors = [
        group["params"][0] for optimizer in optimizers for group in optimizer.param_groups
    ]
    norm = nn.utils.clip_grad_norm_(tensors, max_grad_norm).item()
    for optimizer in optimizers:
        if math.isfinite(norm):
            optimizer.step()
        optimizer.zero_grad()
    return norm


@dataclass
class TrainConfig:
    steps: int = 600
    batch_size: int = 32
    micro_batch: int = (
        0  # rows a forward pass; 0: the whole batch. Fewer need less memory, same gradient
    )
    lr: float = (
        3e-2  # relative to each tensor's RMS if rms_scaled (original: AdamW 1e-4, absolute)
    )
    rms_scaled: bool = True  # from scratch; off for fine-tuning a pretrained T5
    muon: bool = False  # see make_optimizers
    warmup: int = 50  # steps of linear warm-up, then linear decay to 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    eval_every: int = 200  # steps between validations; the best state is kept


class Trainer:
    """Gradient descent on a sum-over-items loss, keeping the weights of the best validation.
    loss_sum(rows) -> (sum of losses, number of items) of some examples; rows_at(step) -> a step's examples;
    validate() -> number, lower is better; None where there is nothing to validate by: the last weights stay. Step i depends on i, the state and torch's generator (seeded for each step) only."""

    def __init__(self, model, loss_sum, rows_at, validate, config):
        self.model, self.loss_sum, self.rows_at, self.validate, self.config = (
            model,
            loss_sum,
            rows_at,
            validate,
            config,
        )
        self.optimizers = make_optimizers(model, config.weight_decay, config.muon)
        self.best = {"score": math.inf}  # and the weights, from the first validation on

    def step(self, i):
        """Optimizer step i (from 0). Returns what it measured, as plain numbers."""
        c, rows, model = self.config, self.rows_at(i), self.model.train()
        lr = c.lr * min(
            (i + 1) / max(c.warmup, 1), (c.steps - i) / max(c.steps - c.warmup, 1), 1
        )
        set_lr(self.optimizers, lr, c.rms_scaled)
        size, total, count = c.micro_batch or len(rows), 0.0, 0
        for start in range(0, len(rows), size):
            loss, items = self.loss_sum(rows[start : start + size])
            loss.backward()
            total, count = total + loss.item(), count + items
        torch._foreach_div_([p.grad for p in model.parameters() if p.grad is not None], count)
        norm = optimizer_step(self.optimizers, c.max_grad_norm)
        record = {
            "loss": total / count,
            "lr": lr,
            "grad_norm": norm,
            "skipped": float(not math.isfinite(norm)),
        }
        due = (i + 1) % c.eval_every == 0 or i + 1 == c.steps
        if self.validate and due:
            model.eval()
            with torch.no_grad():
                record["valid"] = self.validate()
            if record["valid"] < self.best["score"]:
                self.best = {
                    "score": record["valid"],
                    "weights": copy.deepcopy(model.state_dict()),
                }
        return record

    def finish(self):  # the best weights are the result, without a validation the last ones
        self.model.eval().load_state_dict(self.best.get("weights", self.model.state_dict()))

    def state_dict(self):
        return {
            "model": self.model.state_dict(),
            "optimizers": [x.state_dict() for x in self.optimizers],
            "best": self.best,
        }

    def load_state_dict(self, state):
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        self.best = state["best"]
