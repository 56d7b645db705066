"""How fast is it, and how much memory does it take, beside transformers and trl?

    python -m tests.lab.bench [PART ...]    step sample ppo tricks memory; all by default
    python -m tests.lab.bench step sample   the four ratios to transformers that README quotes
    python -m tests.lab.bench --plan        memory of preset `paper` on a GPU, by arithmetic

step    a training step with dropout: 32 pairs of 64 and 24 tokens, forward, backward, AdamW
sample  30 tokens for each of 32 sources of 64: top-k 20, temperature 0.9, with a cache
ppo     an iteration: 32 responses of 30 tokens, 4 optimizer steps, a random reward
tricks  sampling with each trick and without it
memory  peak of step, sample and ppo, each in a process of its own (on a CPU: Linux)

Everyone takes turns; medians, and their ratio, above 1 where this project needs less. What is
not installed is left out. The first line says how fast the machine is. On a GPU: bf16 autocast.
Cost: two minutes a part on an idle laptop. Nothing else should run meanwhile.
"""

import multiprocessing
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import emprl  # before torch: it says how torch's threads wait
import torch

import t5_small
from identifiers import NetworkClassifier
from ppo import PPOConfig, PPOTrainer, Prompts
from t5_small import (
    EOS_ID,
    PAD_ID,
    T5,
    Sampling,
    T5Config,
    TrainConfig,
    Trainer,
    autocast,
    generate,
)
from tests.lab.command import Parser, sheet, start, write_json

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TINY = T5Config(num_layers=3, num_decoder_layers=3)
SMALL = T5Config(
    vocab_size=32128,
    d_model=512,
    d_kv=64,
    d_ff=2048,
    num_layers=6,
    num_decoder_layers=6,
    num_heads=8,
)
BASE = replace(
    SMALL, d_model=768, d_ff=3072, num_layers=12, num_decoder_layers=12, num_heads=12
)
SAMPLING = Sampling(temperature=0.9, top_k=20, min_length=30, max_length=30)
THEIR_SAMPLING = {
    "do_sample": True,
    "temperature": 0.9,
    "top_k": 20,
    "min_new_tokens": 30,
    "max_new_tokens": 30,
    "use_cache": True,
}
FOREVER = 10**9


# ---- the work: each makes a function of no arguments ----------------------------------------


def random_batch(config, rows=32, source=64, target=24):
    """Ids (B, S) and (B, T) without padding."""
    shapes = ((rows, source), (rows, target))
    return [torch.randint(3, config.vocab_size, shape, device=DEVICE) for shape in shapes]


def our_step(config, compiled=False):
    batch = random_batch(config)
    model = T5(config).to(DEVICE)
    if compiled:
        model.encoder.compile()
        model.decoder.compile()
    trainer = Trainer(
        model,
        loss_sum=lambda rows: model.loss_sum(*batch),
        rows_at=lambda i: range(len(batch[0])),
        validate=None,
        config=TrainConfig(steps=FOREVER),
    )
    return lambda: trainer.step(0)


def their_t5(config):
    """transformers' T5, with scaled_dot_product_attention where it has that for T5."""
    import transformers

    transformers.logging.set_verbosity_error()
    theirs = transformers.T5ForConditionalGeneration
    attention = "sdpa" if getattr(theirs, "_supports_sdpa", False) else "eager"
    ids = {"pad_token_id": PAD_ID, "eos_token_id": EOS_ID, "decoder_start_token_id": PAD_ID}
    their_config = transformers.T5Config(**asdict(config), **ids)
    return theirs._from_config(their_config, attn_implementation=attention).to(DEVICE)


def their_step(config):
    """The plain loop around transformers, with the same clipping and the same AdamW."""
    source, target = random_batch(config)
    model = their_t5(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def work():
        with autocast(DEVICE):
            loss = model(source, attention_mask=torch.ones_like(source), labels=target).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return work


def our_sample(config, rows=32):
    source, _ = random_batch(config, rows)
    model = T5(config).to(DEVICE).eval()

    def work():
        with autocast(DEVICE):
            return generate(model, source, SAMPLING).ids

    return work


def their_sample(config):
    source, _ = random_batch(config)
    model = their_t5(config).eval()

    def work():
        with autocast(DEVICE):
            return model.generate(
                source, attention_mask=torch.ones_like(source), **THEIR_SAMPLING
            )

    return work


def our_ppo(config):
    source, target = random_batch(config)
    settings = PPOConfig(
        steps=FOREVER, eval_every=FOREVER, minibatch_size=32, ppo_epochs=4, lr=1e-5
    )
    trainer = PPOTrainer(
        T5(config).to(DEVICE).eval(),
        reward=lambda source, response, targets: torch.rand(len(source), device=DEVICE),
        prompts=lambda i: Prompts(source, source, target),
        sampling=SAMPLING,
        config=settings,
        validate=None,
    )
    return lambda: trainer.step(FOREVER - 2)  # neither the first nor the last: no validation


def their_ppo(config):
    """trl 0.9.6, the last with PPO for encoder-decoders: 32 responses at once, as ours."""
    import tokenizers
    import transformers
    import trl

    words = tokenizers.models.WordLevel({"<pad>": 0, "</s>": 1}, "</s>")  # only asked to pad
    padding = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), pad_token="<pad>", eos_token="</s>"
    )
    model = trl.AutoModelForSeq2SeqLMWithValueHead.from_pretrained(their_t5(config))
    settings = trl.PPOConfig(
        batch_size=32, mini_batch_size=32, ppo_epochs=4, max_grad_norm=1.0
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    reference = trl.create_reference_model(model)
    trainer = trl.PPOTrainer(settings, model, reference, padding, optimizer=optimizer)
    queries = list(random_batch(config)[0])

    def work():
        responses = trainer.generate(queries, batch_size=32, **THEIR_SAMPLING)
        return trainer.step(queries, responses, list(torch.rand(32)))

    return work


def everyone(part):
    """{who: what makes their work} of those who are installed here."""
    ours = {"step": our_step, "sample": our_sample, "ppo": our_ppo}
    theirs = {"step": their_step, "sample": their_sample, "ppo": their_ppo}
    library = "trl" if part == "ppo" else "transformers"
    makers = {"EmpRL": ours[part]}
    if part == "step" and DEVICE == "cuda":
        makers["EmpRL compiled"] = partial(our_step, compiled=True)
    if find_spec(library):
        makers[library] = theirs[part]
    return makers


# ---- measuring ------------------------------------------------------------------------------


def seconds_of(work):
    started = time.perf_counter()
    work()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def medians(works, repeats):
    """{who: median ms} of works {who: function}, in turn; the first round only warms up."""
    seconds = {who: [] for who in works}
    for _ in range(repeats + 1):
        for who, work in works.items():
            seconds[who].append(seconds_of(work))
    return {who: 1000 * statistics.median(x[1:]) for who, x in seconds.items()}


def compare(part, sizes, repeats):
    """Rows {"step, tiny": {"EmpRL, ms", "transformers, ms", "transformers / EmpRL"}}."""
    rows = {}
    for size, config in sizes.items():
        works = {who: make(config) for who, make in everyone(part).items()}
        rows[f"{part}, {size}"] = with_ratios(medians(works, repeats), "ms")
    return rows


def with_ratios(figures, unit):
    """Each figure, and how many times that of EmpRL, which is the first."""
    ours = figures["EmpRL"]
    row = {f"{who}, {unit}": x for who, x in figures.items()}
    row.update({f"{who} / EmpRL": x / ours for who, x in figures.items() if who != "EmpRL"})
    return row


def plain_draw(logits, sampling):
    """By torch.multinomial."""
    logits = t5_small.filter_logits(logits / sampling.temperature, sampling.top_k)
    log_probs = logits.log_softmax(-1)
    token = torch.multinomial(log_probs.exp(), 1)
    return token[:, 0], log_probs.gather(1, token)[:, 0], log_probs > -torch.inf


class PlainCache(t5_small.BlockCache):
    """The source's keys and values as they come: a view, laid out anew at each step."""

    def __init__(self, block, memory):
        self.memory = block.cross_attn.keys_values(memory)
        self.keys, self.values = (x[:, :, :0] for x in self.memory)


def in_one_piece(source, size):
    return [source]


TRICKS = {  # name -> the rows that are sampled, where the trick is, what takes its place
    "drawn by cumulative probability": (32, "t5_small.draw", plain_draw),
    "keys and values of the source laid out once": (32, "t5_small.BlockCache", PlainCache),
    "encoder in pieces of 32": (384, "torch.Tensor.split", in_one_piece),
}


def tricks(repeats):
    """{trick: {"with, ms", "without, ms", "without / with"}} of sampling at tiny."""
    rows = {}
    for name, (count, place, plain) in TRICKS.items():
        fast = our_sample(TINY, count)

        def slow(place=place, plain=plain, fast=fast):
            with mock.patch(place, plain):
                fast()

        ms = medians({"with": fast, "without": slow}, repeats)
        row = {f"{who}, ms": x for who, x in ms.items()}
        row["without / with"] = ms["without"] / ms["with"]
        rows[f"{name}, {count} sources"] = row
    return rows


def peak_of(part, who, config):
    """MiB that this process held at most in two calls. Called in a process of its own."""
    work = everyone(part)[who](config)
    work()
    work()
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def memory(sizes):
    """Rows of peak MiB, what is imported included."""
    rows = {}
    for part in ("step", "sample", "ppo"):
        for size, config in sizes.items() if part != "ppo" else [("tiny", TINY)]:
            peaks = {}
            for who in everyone(part):
                spawn = multiprocessing.get_context("spawn")
                with ProcessPoolExecutor(1, spawn) as process:
                    peaks[who] = process.submit(peak_of, part, who, config).result()
            rows[f"{part}, {size}"] = with_ratios(peaks, "MiB")
    return rows


# ---- arithmetic: what `paper` needs on a GPU ------------------------------------------------

CARD = 12.0  # GiB
CUDA = 0.6  # GiB that CUDA itself takes


def parameter_count(make, *arguments):
    """Of the module that make(*arguments) makes, on a device that has shapes and no memory."""
    with torch.device("meta"):
        return sum(p.numel() for p in make(*arguments).parameters())


def classifier_of(config, identifiers):
    return NetworkClassifier(T5(config), identifiers)


def activation_bytes(config, rows, S, T=0, half=False, in_ppo=False):
    """What a forward pass of `rows` keeps for the backward pass; with T = 0 the encoder's.

    A matrix product keeps its operand: 4 bytes a number, or a copy of 2 in bf16 (half). Norms,
    softmax, residual stream and log-probs keep 4, a dropout's mask 1. in_ppo: no dropout, but
    entropy and support. The position biases are left out.
    """
    width, inner = config.d_model, config.num_heads * config.d_kv
    gated = config.feed_forward_proj == "gated-gelu"
    number = 2 if half else 4
    dropout = config.dropout_rate > 0 and not in_ppo
    mask = int(dropout)

    def norm(t, products):
        copies = products if half else 1
        return t * width * (8 + number * copies)  # what comes in, what comes out, its copies

    def attention(t, k):
        each_weight = 4 + mask + (number if half or dropout else 0)
        kept = 2 * number * inner * (t + k)  # queries, keys, values, context
        return kept + config.num_heads * t * k * each_weight + mask * t * width

    def feed_forward(t):
        inside = 4 * number + mask if gated else number * (1 + mask) + mask
        return norm(t, 1 + gated) + t * config.d_ff * inside + mask * t * width

    block = norm(S, 3) + attention(S, S) + feed_forward(S)
    last_norm = S * width * (8 + 2 * mask + (0 if half else 4))
    encoder = config.num_layers * block + last_norm
    if not T:
        return rows * encoder

    block = norm(T, 3) + attention(T, T) + norm(T, 1) + attention(T, S) + feed_forward(T)
    if half:
        block += 4 * S * width
    last_norm = T * width * (8 + 2 * mask + number)
    logits = T * config.vocab_size * (9 if in_ppo else 4)
    return rows * (encoder + config.num_decoder_layers * block + last_norm + logits)


def cache_bytes(config, rows, S, T, half=False):
    """Keys and values in every decoder block, of the source and of the response."""
    inner = config.num_heads * config.d_kv
    return (2 if half else 4) * 2 * rows * (S + T) * inner * config.num_decoder_layers


def training(trained, best):
    """{what: bytes} of `trained` parameters. AdamW has two moments."""
    return {
        "weights": 4 * trained,
        "gradients": 4 * trained,
        "AdamW": 8 * trained,
        "bf16 copy": 2 * trained,
        "best weights": 4 * trained if best else 0,
    }


def stages(config, t5):
    """{stage: {what: bytes at its peak}} of emprl.py, every sequence at its longest."""
    lengths, ids = config.data, config.identifiers
    N = parameter_count(T5, t5)
    R = parameter_count(classifier_of, t5, ids)
    part = parameter_count(classifier_of, t5, replace(ids, shared=True))  # trained at a time
    rows = ids.micro_batch or ids.batch_size

    def encoders(*sources):
        return sum(activation_bytes(t5, rows, S, half=True) for S in sources)

    # Held: the MLE policy; in PPO the reference, which is the same, and the identifiers.
    found = {}
    found["mle"] = training(N, best=True) | {"held": 0}
    found["mle"]["activations"] = train_bytes(config.mle, t5, lengths)
    labelled = encoders(lengths.identifier_source, lengths.identifier_target)
    for stage in ("identifiers", "judge", "context"):
        found[stage] = training(part, best=True) | {"held": 4 * N}
        found[stage]["activations"] = labelled
    found["context"]["activations"] = encoders(lengths.max_source, 1)

    found["ppo"] = training(N, best=False) | {"held": 4 * (N + R)}
    found["ppo"]["activations"] = ppo_bytes(config, t5)
    # The judge is asked at validation, when there are neither gradients nor activations.
    found["validation"] = training(N, best=False) | {"held": 4 * (N + 2 * R), "gradients": 0}
    found["validation"]["activations"] = rollout_bytes(config, t5)
    return found


def rollout_bytes(config, t5):
    """Support and cache of all responses, and what the reference makes of them at once."""
    S, T = config.data.max_source, config.exploring.max_length
    support = config.ppo.batch_size * T * t5.vocab_size
    return 21 * support + cache_bytes(t5, config.ppo.batch_size, S, T, half=True)


def ppo_bytes(config, t5):
    """The rollout's, or the updates', part by part, while its support is kept."""
    S, T = config.data.max_source, config.exploring.max_length
    part = config.ppo.micro_batch or config.ppo.minibatch_size
    update = activation_bytes(t5, part, S, T, half=True, in_ppo=True)
    update += 8 * part * T * t5.vocab_size
    support = config.ppo.batch_size * T * t5.vocab_size
    cache = cache_bytes(t5, config.ppo.batch_size, S, T, half=True)
    return max(update + support + cache, rollout_bytes(config, t5))


def train_bytes(mle, t5, lengths):
    """Activations of a step of MLE, and the float32 logits of all tokens in passing."""
    rows = mle.micro_batch or mle.batch_size
    kept = activation_bytes(t5, rows, lengths.max_source, lengths.max_target, half=True)
    return kept + 8 * rows * lengths.max_target * t5.vocab_size


def plan():
    """The text of --plan."""
    text = [f"By arithmetic, in GiB; nothing of it was measured. {CUDA} GiB are CUDA's own."]
    for name, t5 in (("t5-small", SMALL), ("t5-base", BASE)):
        config = emprl.make_config("paper", 0, ".", ".")  # reads no folder
        rows = {}
        for stage, parts in stages(config, t5).items():
            rows[stage] = {what: x / 2**30 for what, x in parts.items()}
            rows[stage]["all"] = sum(rows[stage].values()) + CUDA
        most = max(row["all"] for row in rows.values())
        verdict = "fits" if most <= CARD else "does NOT fit"
        text += [
            f"{name}, paper as it is: {most:.1f} GiB {verdict} into {CARD:g}",
            sheet(rows),
        ]
    return "\n\n".join(text)


# ---- the command ----------------------------------------------------------------------------

PARTS = {
    "step": partial(compare, "step"),
    "sample": partial(compare, "sample"),
    "ppo": lambda sizes, repeats: compare("ppo", {"tiny": TINY}, repeats),
    "tricks": lambda sizes, repeats: tricks(repeats),
    "memory": lambda sizes, repeats: memory(sizes),
}


def machine():
    """What the figures depend on: versions, threads, GFLOP/s of a 1,024-square product."""
    libraries = ("torch", "transformers", "trl")
    threads = torch.get_num_threads()
    return {
        **{name: version(name) for name in libraries if find_spec(name)},
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        "threads": threads,
        "GFLOP/s, one thread": round(emprl.gflops(1), 1),
        "GFLOP/s, all threads": round(emprl.gflops(threads), 1),
    }


def main():
    parser = Parser(__doc__)
    parser.add_argument("part", nargs="*", default=list(PARTS), help=", ".join(PARTS))
    parser.add_argument("--repeats", type=int, default=7, help="rounds, of which the median")
    parser.add_argument("--plan", action="store_true", help="memory of preset paper")
    parser.can_write()
    options = parser.parse_args()
    unknown = set(options.part) - set(PARTS)
    if unknown or options.repeats < 1:
        parser.error(f"parts are {', '.join(PARTS)}; --repeats is from 1")
    if options.plan:
        print(plan())
        return
    torch.manual_seed(0)
    results = {"machine": machine()}
    print(results["machine"], flush=True)
    for part in options.part:
        results[part] = PARTS[part]({"tiny": TINY, "small": SMALL}, options.repeats)
        print(f"\n{sheet(results[part])}", flush=True)
        write_json(options.write, results)  # at once: what comes next takes minutes


if __name__ == "__main__":
    sys.exit(start(main))
