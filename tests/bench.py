"""Speed and memory, side by side: python tests/bench.py [PART ...] [--repeats N] [--data DIR] [--run DIR ...]

Measures this project and, where they can be imported, transformers and trl, in turn, on the same work:
  step      training step, 32 x (64 -> 24) tokens, no padding: forward, backward, clipping, fused AdamW (for all).
            "8 x 4" reads 8 rows at a time, which is the same gradient in less memory
  sample    30 sampled tokens for 32 sources of 64, and for one: top-k 20, temperature 0.9, with a cache
  ppo       PPO iteration: 32 rollouts of exactly 30 tokens, 4 optimizer steps, random reward. "8 x 4" is trl 0.9.6's
            original setting: minibatch 8, accumulated 4 times, is one optimizer step, as is minibatch 32 at once
  tricks    the same work with each trick and without it
  parts     where the time goes, also of PPO at the toy preset's sizes; seconds by stage of finished runs (--run)
  padded    training steps on EmpatheticDialogues (--data DIR), batched by length, and the same dialogues mixed
  memory    peak memory, each piece of work in a process of its own (on a CPU: Linux)
  scaling   training step against batch, source, response, width and vocabulary: a table and a picture
Default: all. Medians, and ratios of medians, above 1 where this project needs less. Each row is merged at once into
results/bench.json by part and environment: a run where trl is installed adds to one where it is not. GFLOP: useful
matrix products only (forward_flops, x 3 to train). The GEMM peak is measured in the same run. On a GPU: bf16 autocast.
    python tests/bench.py --plan [--t5 base|small] [--tflops N]    memory and time of preset `paper`, by arithmetic
"""

import argparse, contextlib, datetime, functools, itertools, json, multiprocessing, os, pkgutil, platform, statistics, sys, time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data, emprl, ppo, t5_small
from identifiers import Identifiers, make_reward, table
from emprl import mle_trainer
from t5_small import T5, Sampling, T5Config, TrainConfig, autocast, generate

RESULTS, DEVICE = (
    Path(__file__).parent / "results" / "bench.json",
    "cuda" if torch.cuda.is_available() else "cpu",
)
CORPUS = "empatheticdialogues/train.csv"
TINY = T5Config(num_layers=3, num_decoder_layers=3)
SMALL = T5Config(
    32128, d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_decoder_layers=6, num_heads=8
)
BASE = replace(
    SMALL, d_model=768, d_ff=3072, num_layers=12, num_decoder_layers=12, num_heads=12
)
SAMPLING = Sampling(temperature=0.9, top_k=20, min_length=30, max_length=30)
THEIRS = dict(
    do_sample=True,
    top_k=20,
    temperature=0.9,
    min_new_tokens=30,
    max_new_tokens=30,
    use_cache=True,
)
ORIGINAL = dict(minibatch_size=32, ppo_epochs=4, lr=1e-5, rms_scaled=False)  # of PPO
AXES = {
    "batch": (4, 8, 16, 32, 64, 128),
    "source": (16, 32, 64, 128, 256),
    "target": (12, 24, 48, 96, 192),
    "width": (64, 128, 256, 512),
    "vocabulary": (512, 2048, 8192, 32768),
}
TRAINED = {
    "weights": 4,
    "gradients": 4,
    "optimizer": 8,
}  # bytes a parameter; AdamW has two moments
PAIRS, CARD, CUDA = (
    {"seen": 39105, "test": 4463},
    12,
    0.6,
)  # EmpatheticDialogues (seen: without test); GiB; GiB
SETTINGS = (
    "",
    "identifiers.micro_batch=1 context.micro_batch=1",
    "identifiers.shared=on",
)  # that --plan tries


# ---- arithmetic; c: a T5Config, D its width, I = H d_kv, F the feed-forward's, V the vocabulary, S source, T response
def forward_flops(c, batch, S, T=0):
    """Operations (2 a multiply-add) of the matrix products of a forward pass; with T = 0 of the encoder alone.
    t queries, k keys: 4 t D I (q, o) + 4 k D I (k, v) + 4 t k I (scores, context); each feed-forward matrix 2 t D F."""
    D, I, ff = (
        c.d_model,
        c.num_heads * c.d_kv,
        (6 if c.feed_forward_proj == "gated-gelu" else 4) * c.d_model * c.d_ff,
    )
    attention = lambda t, k: 4 * (t + k) * D * I + 4 * t * k * I
    decoder = (
        c.num_decoder_layers * (attention(T, T) + attention(T, S) + T * ff)
        + 2 * T * D * c.vocab_size
    )
    return batch * (c.num_layers * (attention(S, S) + S * ff) + (decoder if T else 0))


def parameter_count(make, *arguments):
    """Of the module that make(*arguments) makes; on the "meta" device, which has shapes and no memory."""
    with torch.device("meta"):
        return sum(p.numel() for p in make(*arguments).parameters())


def bytes_a_token(c):
    """Weights that a decoded token reads, in float32: the decoder's but for the keys and values of the source, and the head's."""
    D, I, ff = (
        c.d_model,
        c.num_heads * c.d_kv,
        (3 if c.feed_forward_proj == "gated-gelu" else 2) * c.d_model * c.d_ff,
    )
    return 4 * (c.num_decoder_layers * (6 * D * I + ff) + D * c.vocab_size)


def activation_bytes(c, batch, S, T=0, half=False, dropout=False, in_ppo=False, cpu=False):
    """Kept by a forward pass for the backward. A product's operand takes e = 4 bytes, or 2, a copy for each product,
    in bf16 autocast (half); norms, softmax, residual stream and the loss's (tokens, V) 4; an element of a dropout's mask 1.
    cpu: relu and its dropout keep one output together. in_ppo: with entropy and support. Left out: position biases."""
    D, I, e, n, G = (
        c.d_model,
        c.num_heads * c.d_kv,
        2 if half else 4,
        int(dropout),
        c.feed_forward_proj == "gated-gelu",
    )
    mask, gate = (
        n,
        4 * e + n if G else e if cpu else e * (1 + n) + n,
    )  # gate: of an element inside the feed-forward
    norm = (
        lambda t, products: t * D * (8 + e * (products if half else 1))
    )  # what comes, normed, and what goes on
    attention = (
        lambda t, k: 2 * e * I * (t + k)
        + c.num_heads * t * k * (4 + mask + e * (half or n))
        + mask * t * D
    )
    ff = lambda t: norm(t, 1 + G) + t * c.d_ff * gate + mask * t * D
    encoder = c.num_layers * (norm(S, 3) + attention(S, S) + ff(S)) + S * D * (
        8 + 2 * mask + (0 if half else 4)
    )
    layer = (
        norm(T, 3)
        + attention(T, T)
        + norm(T, 1)
        + attention(T, S)
        + ff(T)
        + (4 * S * D if half else 0)
    )
    decoder = (
        c.num_decoder_layers * layer
        + T * D * (8 + 2 * mask + e)
        + T * c.vocab_size * (9 if in_ppo else 4)
    )
    return batch * (encoder + (decoder if T else 0))


def cache_bytes(c, batch, S, T, half=False):
    """Keys and values in every decoder layer, of the source and of the response."""
    return (
        (2 if half else 4) * 2 * batch * (S + T) * c.num_heads * c.d_kv * c.num_decoder_layers
    )


def stages(c, config):
    """{stage: ({what: bytes at its peak}, operations)} of emprl.py on a GPU in bf16, every sequence at its longest.
    best: the best weights so far; held: what earlier stages leave there; loss: float32 of (tokens, V), in passing.
    To train is 3 forward passes, to generate 1. evaluate: 4 decodings, each scored three times and read three times."""
    o, p, f, ids, dropout = (
        config.data,
        config.ppo,
        config.sft,
        config.identifiers,
        c.dropout_rate > 0,
    )
    S, T, L, V, towers = (
        o.max_source,
        config.sampling.max_length,
        o.max_target,
        c.vocab_size,
        1 if ids.shared else 3,
    )
    N, R = parameter_count(T5, c), parameter_count(Identifiers, c, ids.shared)
    n, m = f.micro_batch or f.batch_size, p.micro_batch or p.minibatch_size  # rows at a time
    t5, kept = (
        functools.partial(forward_flops, c),
        functools.partial(activation_bytes, c, half=True),
    )
    read = lambda batch, *lengths: towers * sum(
        t5(batch, x) for x in lengths
    )  # without the attention between the two

    def stage(trained, held, activations, tokens=0, best=4):
        return {
            **{k: x * trained for k, x in TRAINED.items()},
            "bf16 weights": 2 * trained,
            "best": best * trained,
            "held": 4 * held,
            "activations": activations,
            "loss": 8 * tokens * V,
            "rollout": 0,
        }

    def reader(k, before, *lengths):
        activations = towers * sum(
            kept(k.micro_batch or k.batch_size, x, dropout=dropout) for x in lengths
        )
        return stage(R, N + before * R, activations), 3 * k.steps * read(
            k.batch_size, *lengths
        )

    update = stage(N, 2 * N + 3 * R, kept(m, S, T, in_ppo=True), m * T, best=0)
    update["loss"] = max(
        update["loss"], 20 * min(p.batch_size, 64) * T * V - update["activations"]
    )  # reference's
    update["rollout"] = p.batch_size * T * V + cache_bytes(
        c, p.batch_size, S, T, True
    )  # with support
    return {
        "sft": (
            stage(N, 0, kept(n, S, L, dropout=dropout), n * L),
            3 * f.steps * t5(f.batch_size, S, L),
        ),
        "identifiers": reader(ids, 0, o.identifier_source, o.identifier_target),
        "judge": reader(ids, 1, o.identifier_source, o.identifier_target),
        "label": ({}, read(PAIRS["seen"], S, L)),
        "context": reader(config.context, 2, S, 1),
        "ppo": (
            update,
            p.steps
            * ((2 + 3 * p.ppo_epochs) * t5(p.batch_size, S, T) + read(p.batch_size, S, T)),
        ),
        "evaluate": ({}, 4 * PAIRS["test"] * (4 * t5(1, S, T) + 3 * read(1, S, T))),
    }


def plan(size, tflops):
    """The text of --plan: the preset as it is and, if that needs too much, with other settings."""
    c, out = {"small": SMALL, "base": BASE}[size], []
    for settings in SETTINGS:
        rows, config = (
            {},
            emprl.make_config("paper", 0, ".", ".", settings.split()),
        )  # reads no folder
        for stage, (memory, flops) in stages(c, config).items():
            gib = {**{k: x / 2**30 for k, x in memory.items()}, "CUDA": CUDA} if memory else {}
            rows[stage] = {
                **gib,
                "GiB": sum(gib.values()) if gib else "less than ppo",
                "PFLOP": flops / 1e15,
                f"hours at {tflops:g} TFLOP/s": flops / tflops / 3.6e15,
            }
        over = [stage for stage, row in rows.items() if "CUDA" in row and row["GiB"] > CARD]
        rows["all"] = {k: sum(row[k] for row in rows.values()) for k in [*rows["ppo"]][-2:]}
        verdict = (
            f"does NOT fit into {CARD} GiB in {', '.join(over)}"
            if over
            else f"fits into {CARD} GiB"
        )
        out += [f"t5-{size}, {settings or 'paper as it is'}: {verdict}", sheet(rows)]
        if not over:
            break
    assumed = f"Assumed: every sequence at its longest, {tflops:g} TFLOP/s (--tflops), {CUDA} GiB for CUDA itself."
    return "\n\n".join(
        [*out, f"By arithmetic; nothing of this has been measured on a GPU. {assumed}"]
    )


# ---- measuring
def figure(x):
    """A number for a table, three digits or so."""
    return (
        f"{x:,.{0 if abs(x) >= 100 else 1 if abs(x) >= 10 else 2}f}"
        if isinstance(x, (int, float))
        else x
    )


def sheet(rows):
    """{row: {column: value}} -> markdown."""
    columns = [
        k for k in dict.fromkeys(k for row in rows.values() for k in row) if k != "seconds"
    ]
    return table(
        ["", *columns],
        [[name, *(figure(row.get(k, "")) for k in columns)] for name, row in rows.items()],
    )


def seconds_of(work):
    started = time.perf_counter()
    work()
    torch.cuda.synchronize() if DEVICE == "cuda" else None
    return time.perf_counter() - started


def rounds(repeats, once):
    """How often to measure what takes `once` seconds: quick work up to 4 times as often, slow work less."""
    return range(max(1, round(repeats * min(4, max(0.6, 0.5 / once)))))


def alternately(works, repeats):
    """{who: seconds of each call} of works {who: function}, in turn; the first round only warms up."""
    once = sum(map(seconds_of, works.values()))
    rows = [[seconds_of(work) for work in works.values()] for _ in rounds(repeats, once)]
    return dict(zip(works, zip(*rows)))


def by_part(work, places, repeats):
    """Median seconds that a call of `work` spends in the functions of places {name: "module.function"}, each without
    the others that it calls, and in "the rest"."""

    def watched(name, function):
        def call(*arguments, **options):
            inner, result = seconds.total(), []
            spent = seconds_of(lambda: result.append(function(*arguments, **options)))
            seconds[name] += spent - (seconds.total() - inner)
            return result[0]

        return call

    rows, seconds = [], Counter()
    with contextlib.ExitStack() as patches:
        for name, path in places.items():
            patches.enter_context(mock.patch(path, watched(name, pkgutil.resolve_name(path))))
        for _ in rounds(repeats, seconds_of(work)):
            rows.append(seconds := Counter())
            watched("the rest", work)()
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


@functools.cache
def gemm_peak():
    """Operations a second of the best square matrix product: float32 on a CPU, bf16 on a GPU."""

    def rate(n):
        a, b = torch.randn(
            2, n, n, device=DEVICE, dtype=torch.float if DEVICE == "cpu" else torch.bfloat16
        )
        return 2 * n**3 / min(seconds_of(lambda: a @ b) for _ in range(6))

    return max(map(rate, (512, 1024, 2048) if DEVICE == "cpu" else (4096, 8192)))


@functools.cache
def bandwidth():
    """Bytes a second at which a sum reads a gigabyte, more than caches hold."""
    x = torch.ones(2**28, device=DEVICE)
    return 4 * len(x) / min(seconds_of(x.sum) for _ in range(6))


def speed(flops, seconds):
    return (
        {"GFLOP": flops / 1e9, "of GEMM peak": flops / seconds / gemm_peak()} if flops else {}
    )


def compare(kind, c, whose, repeats, tokens, flops=0, accumulated=False):
    """A row of a table: kind(c, batches, who) of everyone, on the batches of `whose` {label: batches}."""
    works = {
        who + label: kind(c, batches, who)
        for label, batches in whose.items()
        for who in everyone(kind, accumulated)
    }
    seconds = alternately(works, repeats)
    ms = {who: 1000 * statistics.median(x) for who, x in seconds.items()}
    ratios = {f"{who} / EmpRL": x / ms["EmpRL"] for who, x in ms.items() if who != "EmpRL"}
    return {
        **{f"{who}, ms": x for who, x in ms.items()},
        **ratios,
        "tokens/s": 1000 * tokens / ms["EmpRL"],
        **speed(flops, ms["EmpRL"] / 1000),
        "seconds": seconds,
    }


# ---- the work: each makes a function of no arguments; batches: [(source (B, S), target (B, T)), ...]; who: `everyone`
def random_batch(c, batch=32, source=64, target=24):
    return tuple(
        torch.randint(3, c.vocab_size, (batch, n), device=DEVICE) for n in (source, target)
    )


def their_t5(c, attention):
    import transformers

    transformers.logging.set_verbosity_error()
    c = transformers.T5Config(**asdict(c))
    return transformers.T5ForConditionalGeneration._from_config(
        c, attn_implementation=attention
    ).to(DEVICE)


def step(c, batches, who):
    """An optimizer step on each batch: t5_small.Trainer's, or the plain loop around transformers. 8 x 4: 8 rows at a time."""
    if who.startswith("EmpRL"):
        size = 8 if who.endswith("8 x 4") else 10**9
        pieces = [piece for batch in batches for piece in zip(*(x.split(size) for x in batch))]
        model, pairs, n = (
            T5(c).to(DEVICE),
            SimpleNamespace(batch=lambda rows: pieces[rows[0]]),
            len(pieces) // len(batches),
        )
        for stack in (model.encoder, model.decoder) if "compiled" in who else ():
            stack.compile()
        trainer = mle_trainer(
            model,
            pairs,
            None,
            lambda i: range(n * i, n * i + n),
            TrainConfig(10**9, micro_batch=1, eval_every=10**9),
        )
        return lambda: [trainer.step(i) for i in range(len(batches))]
    model = their_t5(c, who.split()[1]).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def one(source, target):
        with autocast(DEVICE):
            loss = model(
                source,
                attention_mask=(source != 0).long(),
                labels=target.masked_fill(target == 0, -100),
            ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return lambda: [one(*batch) for batch in batches]


def sample(c, batches, who):
    """30 tokens for each source."""
    ours, source = who == "EmpRL", batches[0][0]
    model, mask = (
        (T5(c).to(DEVICE) if ours else their_t5(c, who.split()[1])).eval(),
        torch.ones_like(source),
    )
    ids = (
        (lambda: generate(model, source, SAMPLING).ids)
        if ours
        else (lambda: model.generate(source, attention_mask=mask, **THEIRS)[:, 1:])
    )  # without the start token

    def work():
        with autocast(DEVICE):
            assert ids().shape[1] == 30

    return work


def our_trainer(
    c,
    source,
    length,
    reward=lambda source, *_: torch.rand(len(source), device=DEVICE),
    **settings,
):
    settings = {
        "steps": 10**9,
        "eval_every": 10**9,
        "warmup": 1,
        "batch_size": len(source),
        **settings,
    }
    return ppo.PPOTrainer(
        T5(c).to(DEVICE),
        reward,
        lambda i: (source, torch.arange(len(source))),
        None,
        replace(SAMPLING, min_length=length, max_length=length),
        ppo.PPOConfig(**settings),
    )


def iteration(c, batches, who):
    """A PPO iteration of 32 rollouts; `who` ends in minibatch x accumulation, or it is all at once."""
    (source, _), (library, *how) = batches[0], who.split()
    if library == "EmpRL":
        trainer = our_trainer(c, source, 30, **ORIGINAL, micro_batch=int(how[0]) if how else 0)

        def work():
            assert trainer.step(0)["optimizer_steps"] == 4

        return work
    import tokenizers, transformers, trl

    pads = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<pad>": 0, "</s>": 1}, "</s>")
    )  # only asked to pad
    pads = transformers.PreTrainedTokenizerFast(
        tokenizer_object=pads, pad_token="<pad>", eos_token="</s>"
    )
    model = trl.AutoModelForSeq2SeqLMWithValueHead.from_pretrained(their_t5(c, "eager"))
    settings = trl.PPOConfig(
        batch_size=32,
        mini_batch_size=int(how[0]),
        gradient_accumulation_steps=int(how[2]),
        ppo_epochs=4,
        max_grad_norm=1.0,
    )
    trainer = trl.PPOTrainer(
        settings,
        model,
        trl.create_reference_model(model),
        pads,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True),
    )
    queries = list(source)
    return lambda: trainer.step(
        queries, trainer.generate(queries, batch_size=32, **THEIRS), list(torch.rand(32))
    )


def everyone(kind, accumulated=False):
    """Who can do this kind of work here, also in pieces. sdpa: scaled_dot_product_attention, where transformers has it for T5."""
    if kind is iteration:
        return [
            "EmpRL",
            "EmpRL 8 x 4",
            *(["trl 8 x 4", "trl 32 x 1"] if find_spec("trl") else []),
        ]
    found = [
        "EmpRL",
        *(["EmpRL 8 x 4"] if accumulated and kind is step else []),
        *(["EmpRL compiled"] if DEVICE == "cuda" and kind is step else []),
    ]
    if find_spec("transformers"):
        from transformers import T5ForConditionalGeneration as theirs

        found += [
            "transformers eager",
            *(["transformers sdpa"] if getattr(theirs, "_supports_sdpa", False) else []),
        ]
    return found


WORK = {
    "training step, tiny": (step, TINY, 32),
    "training step, small": (step, SMALL, 32),
    "training step, tiny, no dropout": (step, replace(TINY, dropout_rate=0.0), 32),
    "sample 32 x 30, tiny": (sample, TINY, 32),
    "sample 32 x 30, small": (sample, SMALL, 32),
    "sample 1 x 30, tiny": (sample, TINY, 1),
    "sample 1 x 30, small": (sample, SMALL, 1),
    "PPO iteration, tiny": (iteration, TINY, 32),
}
IN_MEMORY = (
    "training step, tiny",
    "training step, small",
    "sample 32 x 30, small",
    "PPO iteration, tiny",
)


# ---- the parts: each yields (a row's name, the row)
def all_of(kind, a):
    T, passes = {step: (24, 3), sample: (30, 1), iteration: (30, 14)}[
        kind
    ]  # 14: sample, reference, 4 epochs
    for work, (_, c, n) in ((work, x) for work, x in WORK.items() if x[0] is kind):
        row = compare(
            kind,
            c,
            {"": [random_batch(c, n)]},
            a.repeats,
            n * T,
            passes * forward_flops(c, n, 64, T),
            True,
        )
        if n == 1:  # bound by memory where the weights are more than caches hold
            row["of memory's speed"] = (
                T * bytes_a_token(c) / (row["EmpRL, ms"] / 1000) / bandwidth()
            )
        yield work, row


def plain_dropout(self, x, relu=False):
    return torch.nn.functional.dropout(torch.relu(x) if relu else x, self.p, self.training)


def plain_draw(logits, s):
    """t5_small.draw on all V columns, by torch.multinomial."""
    log_probs = t5_small.filter_logits(logits / s.temperature, s.top_k, s.top_p).log_softmax(
        -1
    )
    token = torch.multinomial(log_probs.exp(), 1)
    return token[:, 0], log_probs.gather(1, token)[:, 0], log_probs > -torch.inf


def uncached_steps(model, source, sampling, banned):
    """t5_small.generation_steps without a cache: all tokens are read again for each."""
    memory = model.encode(source)
    tokens = source.new_zeros(len(source), 1)
    forbidden = torch.tensor([*banned, 1], device=source.device)
    steps = []
    for _ in range(sampling.max_length):
        states = model.decode(tokens, memory, source)[:, -1]
        logits = model.logits(states).float().index_fill(1, forbidden, -torch.inf)
        token, log_probs, support = t5_small.draw(logits, sampling)
        steps.append((token, log_probs, states, support))
        tokens = torch.cat([tokens, token[:, None]], 1)
    return steps


def plain_loss(self, source, response):
    """t5_small.T5.loss_sum with the vocabulary's product also of padding."""
    logits = self.logits(self.response_states(source, response))
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), response.flatten(), reduction="sum", ignore_index=0
    )
    return loss, int((response != 0).sum())


def plain_adamw(*arguments, fused=True, adamw=torch.optim.AdamW, **options):
    return adamw(*arguments, foreach=False, **options)


TRICKS = {
    "dropout from bytes, relu's with relu": (
        "training step, tiny",
        "t5_small.Dropout.forward",
        plain_dropout,
    ),
    "fused AdamW": ("training step, tiny", "torch.optim.AdamW", plain_adamw),
    "no padding in the vocabulary's product": (
        "training step, tiny",
        "t5_small.T5.loss_sum",
        plain_loss,
    ),
    "drawing among the top k": ("sample 32 x 30, tiny", "t5_small.draw", plain_draw),
    "inference mode": ("sample 1 x 30, tiny", "torch.inference_mode", torch.no_grad),
    "decoding step by step, with a cache": (
        "sample 32 x 30, tiny",
        "t5_small.generation_steps",
        uncached_steps,
    ),
}


def tricks(a):
    """Half of each response is padding, so that there is some to drop."""
    for name, (work, path, plain) in TRICKS.items():
        kind, c, n = WORK[work]
        batch = random_batch(c, n)
        n, length = batch[1].shape
        batch[1][
            torch.arange(length, device=DEVICE)
            >= torch.randint(1, length + 1, (n, 1), device=DEVICE)
        ] = 0
        with mock.patch(path, plain):
            run = kind(c, [batch], "EmpRL")

        def without(run=run, path=path, plain=plain):
            with mock.patch(path, plain):
                run()

        seconds = alternately(
            {"with": kind(c, [batch], "EmpRL"), "without": without}, a.repeats
        )
        ms = {who: 1000 * statistics.median(x) for who, x in seconds.items()}
        yield (
            f"{name} ({work})",
            {
                **{f"{who}, ms": x for who, x in ms.items()},
                "without / with": ms["without"] / ms["with"],
                "seconds": seconds,
            },
        )
    times = [
        (alone(steps_of_real, True), alone(steps_of_real, False)) for _ in rounds(a.repeats, 1)
    ]
    ms = [1000 * statistics.median(itertools.chain(*x)) for x in zip(*times)]
    yield (
        "freed memory kept (training step, real)",
        {
            "with, ms": ms[0],
            "without, ms": ms[1],
            "without / with": ms[1] / ms[0],
            "seconds": times,
        },
    )


def alone(function, *arguments):
    """Its result from a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def steps_of_real(keep):
    """Seconds a training step, three times, at the real preset's sizes on batches of all lengths; keep: after emprl.keep_memory."""
    emprl.keep_memory() if keep else None
    torch.manual_seed(0)
    config = emprl.make_config("real", data_dir=".")
    c, lengths = (
        replace(config.t5, vocab_size=config.data.vocab_size),
        [(12, 8), (48, 24), (96, 40), (24, 16), (60, 12), (36, 32)],
    )
    work = step(c, [random_batch(c, config.sft.batch_size, *x) for x in lengths], "EmpRL")
    return [seconds_of(work) / len(lengths) for _ in range(4)][
        1:
    ]  # the first round only warms up


def parts(a):
    def rows(work, times, flops):
        for piece, x in times.items():
            whole = {"ms": 1000 * x, "share": x / sum(times.values())}
            yield f"{work}: {piece}", {**whole, **speed(flops.get(piece, 0), x)}

    for work in ("training step, tiny", "training step, small"):
        c = WORK[work][1]
        for who in everyone(step):
            once, model = (
                forward_flops(c, 32, 64, 24),
                "transformers.T5ForConditionalGeneration",
            )
            places = {
                "forward": "t5_small.T5.loss_sum" if "EmpRL" in who else f"{model}.forward",
                "backward": "torch.Tensor.backward",
                "clipping": "torch.nn.utils.clip_grad_norm_",
                "optimizer": "torch.optim.AdamW.step",
                "learning rates": "t5_small.set_lr",
            }
            times = by_part(step(c, [random_batch(c)], who), places, a.repeats)
            yield from rows(f"{work}, {who}", times, {"forward": once, "backward": 2 * once})
    toy = emprl.make_config("toy").t5
    reward = make_reward(Identifiers(toy).to(DEVICE).eval(), torch.full((384, 3, 3), 1 / 3))
    for size, c, n, S, T, epochs, settings in (
        ("tiny", TINY, 32, 64, 30, 4, ORIGINAL),
        ("toy", toy, 384, 72, 22, 1, {"reward": reward}),
    ):
        trainer, once = (
            our_trainer(c, random_batch(c, n, S)[0], T, **settings),
            forward_flops(c, n, S, T),
        )
        places = {
            "generate": "ppo.generate",
            "identifiers": "identifiers.Identifiers.forward",
            "reference": "ppo.rollout",
            "update": "ppo.PPOTrainer.update",
        }
        yield from rows(
            f"PPO, {size}, {n} x ({S} -> {T})",
            by_part(lambda: trainer.step(0), places, a.repeats),
            {"generate": once, "reference": once, "update": 3 * epochs * once},
        )
    for run in a.run:
        yield from rows(
            f"run {Path(run).name}",
            json.loads((Path(run) / "metrics.json").read_text(encoding="utf-8"))["seconds"],
            {},
        )


def padded(a):
    dialogues = data.read_empathetic_dialogues(os.path.join(a.data, CORPUS))[0]
    tokenizer = data.Tokenizer.train([d.response for d in dialogues[:20000]], TINY.vocab_size)
    c, pairs = (
        replace(TINY, vocab_size=tokenizer.vocab_size),
        data.Pairs(dialogues[:8000], tokenizer, 96, 40, DEVICE),
    )
    rows_at = data.batches(pairs.lengths(), 32, 0)
    rows = torch.tensor([rows_at(i) for i in range(8)])
    mixed = rows.flatten()[torch.randperm(256)].view(8, 32)
    whose = {
        label: [pairs.batch(part) for part in x.tolist()]
        for label, x in (("", rows), (", mixed", mixed))
    }
    tokens = sum(len(pairs.responses[i]) for i in rows.flatten())
    yield "8 training steps of 32 dialogues, tiny", compare(step, c, whose, a.repeats, tokens)


def peaks(work, who):
    """MiB that this process held at most, in all and above what its imports needed. Called in a process of its own."""

    def peak():  # not ru_maxrss, which starts at what the parent held
        if DEVICE == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        return (
            int(
                Path("/proc/self/status")
                .read_text(encoding="utf-8")
                .split("VmHWM:")[1]
                .split()[0]
            )
            / 1024
        )

    (kind, c, n), library = WORK[work], who.split()[0]
    __import__("torch._dynamo")  # every optimizer does
    if library != "EmpRL":
        their_t5(replace(TINY, d_model=8, d_ff=8, vocab_size=8), "eager"), __import__(library)
    imports, call = peak(), kind(c, [random_batch(c, n)], who)
    call(), call()
    return {"MiB": peak(), "MiB above imports": peak() - imports}


def memory(a):
    for work in IN_MEMORY:
        ours = None
        for who in everyone(WORK[work][0], True):
            found = alone(peaks, work, who)
            ours = ours or found
            yield (
                f"{work}, {who}",
                {**found, **{f"{k} / EmpRL": x / ours[k] for k, x in found.items()}},
            )


def scaling(a):
    for axis, x in ((axis, x) for axis, values in AXES.items() for x in values):
        wide = dict(d_model=x, num_heads=x // 32, d_ff=4 * x)
        other = {"width": wide, "vocabulary": {"vocab_size": x}}.get(axis, {})
        c, shape = (
            replace(TINY, **other),
            {"batch": 32, "source": 64, "target": 24, **({} if other else {axis: x})},
        )
        tokens, flops = shape["batch"] * shape["target"], 3 * forward_flops(c, *shape.values())
        yield (
            f"{axis} {x}",
            compare(step, c, {"": [random_batch(c, **shape)]}, a.repeats, tokens, flops),
        )


def draw(rows, path):
    """The rows of `scaling`: a panel an axis; dashed: a time that grows as the axis does."""
    fig = emprl.figure_class()(figsize=(3 * len(AXES), 2.8), layout="constrained")
    panels = fig.subplots(1, len(AXES), sharey=True)
    for panel, (axis, values) in zip(panels, AXES.items()):
        found = [rows[f"{axis} {x}"] for x in values]
        for column in [k for k in found[0] if k.endswith(", ms")]:
            panel.loglog(values, [row[column] for row in found], "o-", label=column[:-4])
        panel.loglog(
            values, [found[-1]["EmpRL, ms"] * x / values[-1] for x in values], "k--", lw=0.8
        )
        panel.set(xlabel=axis, ylabel="training step, ms" if axis == "batch" else "")
        panel.set_xticks(values, values)
        panel.minorticks_off()
    panels[0].legend(fontsize=7)
    fig.savefig(path, dpi=110)


PARTS = {
    "step": functools.partial(all_of, step),
    "sample": functools.partial(all_of, sample),
    "tricks": tricks,
    "parts": parts,
    "ppo": functools.partial(all_of, iteration),
    "padded": padded,
    "memory": memory,
    "scaling": scaling,
}


# ---- results and the command line
def results():
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}


def record(part, work, row):
    """Merge a row into RESULTS, atomically; returns all rows of the part in this environment."""
    what = {
        library: version(library)
        for library in ("torch", "transformers", "trl")
        if find_spec(library)
    }
    what |= (
        {"threads": torch.get_num_threads()}
        if DEVICE == "cpu"
        else {"GPU": torch.cuda.get_device_name()}
    )
    where, merged = ", ".join(f"{k} {x}" for k, x in what.items()), results()
    cpu = (
        Path("/proc/cpuinfo")
        .read_text(encoding="utf-8")
        .split("model name\t: ")[1]
        .split("\n")[0]
        if sys.platform == "linux"
        else ""
    )
    mine = merged.setdefault(part, {}).setdefault(where, {"rows": {}})
    mine |= {
        **what,
        "python": platform.python_version(),
        "cpu": f"{cpu} {torch.backends.cpu.get_cpu_capability()}",
        "date": str(datetime.date.today()),
    }
    mine["rows"][work] = row
    RESULTS.with_suffix(".tmp").write_text(
        json.dumps(merged, indent=1) + "\n", encoding="utf-8"
    )
    os.replace(RESULTS.with_suffix(".tmp"), RESULTS)
    return mine["rows"]


def published(part):
    """The tables of a part, one an environment."""
    return "\n\n".join(
        f"{part}: {where}\n\n{sheet(x['rows'])}"
        for where, x in results().get(part, {}).items()
    )


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", nargs="*", help=", ".join(PARTS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--data", default="", metavar="DIR")
    parser.add_argument("--run", nargs="+", default=[], metavar="DIR")
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--t5", default="base", choices=("base", "small"))
    parser.add_argument("--tflops", type=float, default=30.0)
    parser.error = lambda words: sys.exit(
        print(f"bench.py: {words}; see --help", file=sys.stderr) or 2
    )
    a = parser.parse_args(arguments)
    todo = a.part or [part for part in PARTS if part != "padded" or a.data]
    needed = [f"{run}/metrics.json" for run in a.run] + [os.path.join(a.data, CORPUS)] * (
        "padded" in todo
    )
    wrong = [
        f"{part}: no such part; there are {', '.join(PARTS)}"
        for part in todo
        if part not in PARTS
    ]
    wrong += [
        f"{path} is not there; --data takes the folder that `python data.py download` fills, --run finished runs"
        for path in needed
        if not os.path.exists(path)
    ] + ["--repeats: from 1"] * (a.repeats < 1)
    if wrong:
        parser.error(wrong[0])
    if a.plan:
        return print(plan(a.t5, a.tflops)) or 0
    try:
        for part in todo:
            for work, row in PARTS[part](a):
                rows = record(part, work, row)
                print(
                    f"{part}: {work}",
                    *(f"{k} {figure(row[k])}" for k in row if k != "seconds"),
                    sep="  ",
                    flush=1,
                )
            if part == "scaling":
                draw(rows, RESULTS.with_name("bench-scaling.png"))
    except KeyboardInterrupt:
        return print(f"\nstopped; what was measured is in {RESULTS}", file=sys.stderr) or 130
    return print("", *map(published, todo), sep="\n\n") or 0


if __name__ == "__main__":
    torch.manual_seed(0)
    sys.exit(main())
