"""How fast is it, and how much memory does it take, beside transformers?

    python -m tests.lab.bench [PART ...]    step sample memory; all by default
    python -m tests.lab.bench --plan        memory of preset `paper` on a GPU, by arithmetic

step    a training step with dropout: 32 pairs of 64 and 24 tokens, forward, backward, AdamW
sample  30 tokens for each of 32 sources of 64: top-k 20, temperature 0.9, with a cache
memory  peak of step and of sample, each in a process of its own (on a CPU: Linux)

The two take turns; medians, and their ratio, above 1 where this project needs less. Where
transformers is not installed, this project is measured alone. The first line says how fast the
machine is. On a GPU: bf16 autocast.

Cost: two minutes a part on an idle laptop. Nothing else should run meanwhile.
"""

import itertools
import multiprocessing
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec

import emprl  # before torch: it says how torch's threads wait
import torch

from identifiers import make_classifier
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
from tests.lab.command import Parser, peak_memory, sheet, start, write_json

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
        config=TrainConfig(steps=10**9),
    )
    return lambda: trainer.step(0)


def their_t5(config):
    """transformers' T5; it takes scaled_dot_product_attention where it has that for T5."""
    import transformers

    transformers.logging.set_verbosity_error()
    ids = {"pad_token_id": PAD_ID, "eos_token_id": EOS_ID, "decoder_start_token_id": PAD_ID}
    their_config = transformers.T5Config(**asdict(config), **ids)
    return transformers.T5ForConditionalGeneration(their_config).to(DEVICE)


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


def our_sample(config):
    source, _ = random_batch(config)
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
                source,
                attention_mask=torch.ones_like(source),
                do_sample=True,
                temperature=0.9,
                top_k=20,
                min_new_tokens=30,
                max_new_tokens=30,
                use_cache=True,
            )

    return work


WORK = {"step": {"EmpRL": our_step}, "sample": {"EmpRL": our_sample}}
if DEVICE == "cuda":
    WORK["step"]["EmpRL compiled"] = partial(our_step, compiled=True)
if find_spec("transformers"):
    WORK["step"]["transformers"] = their_step
    WORK["sample"]["transformers"] = their_sample
SIZES = {"tiny": TINY, "small": SMALL}


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


def with_ratios(figures, unit):
    """Each figure, and how many times ours."""
    row = {f"{who}, {unit}": x for who, x in figures.items()}
    for who, x in figures.items():
        if who != "EmpRL":
            row[f"{who} / EmpRL"] = x / figures["EmpRL"]
    return row


def compare(part, repeats):
    """Rows {"step, tiny": {"EmpRL, ms", "transformers, ms", "transformers / EmpRL"}}."""
    rows = {}
    for size, config in SIZES.items():
        works = {who: make(config) for who, make in WORK[part].items()}
        rows[f"{part}, {size}"] = with_ratios(medians(works, repeats), "ms")
    return rows


def peak_of(part, who, config):
    """MiB that this process held at most in two calls. Called in a process of its own."""
    work = WORK[part][who](config)
    work()
    work()
    return peak_memory(DEVICE) / 2**20


def memory():
    """Rows of peak MiB, what is imported included."""
    rows, spawn = {}, multiprocessing.get_context("spawn")
    for part, size in itertools.product(WORK, SIZES):
        peaks = {}
        for who in WORK[part]:
            with ProcessPoolExecutor(1, spawn) as process:
                peaks[who] = process.submit(peak_of, part, who, SIZES[size]).result()
        rows[f"{part}, {size}"] = with_ratios(peaks, "MiB")
    return rows


# ---- arithmetic: what `paper` needs on a GPU ------------------------------------------------

CUDA = 0.6  # GiB that CUDA itself takes
TRAINED = 18  # bytes a parameter: weights 4, gradients 4, AdamW 8, a copy in bf16 2


def activation_bytes(t5, S, T):
    """What a forward pass keeps of a row for the backward pass, without logits.

    In bf16 with dropout and d_ff = 4 d_model. An encoder's block keeps 54 bytes for each number
    of each token (norms 24, attention's operands 8, feed-forward 20, masks 2), a decoder's 69,
    and 8 for the source's; each attention weight takes 7.
    """
    encoder = t5.num_layers * (54 * S * t5.d_model + 7 * t5.num_heads * S * S)
    decoder = (69 * T + 8 * S) * t5.d_model + 7 * t5.num_heads * T * (S + T)
    return encoder + t5.num_decoder_layers * decoder


def cache_bytes(t5, S, T):
    """Keys and values of a row in every decoder block, of the source and of the response."""
    return 2 * 2 * (S + T) * t5.num_heads * t5.d_kv * t5.num_decoder_layers


def parameter_count(module):
    return sum(p.numel() for p in module.parameters())


def stages(config, t5):
    """{stage: bytes of what is trained, of what is held, of activations}, where a run needs most.

    PPO holds its reference, which is the MLE policy, and the identifiers; in a validation there
    is the judge, too, and there are no gradients.
    """
    with torch.device("meta"):  # shapes, no memory
        policy = T5(t5)
        identifiers = make_classifier(policy, config.identifiers)
    parameters = parameter_count(policy)
    classifier = 4 * parameter_count(identifiers)

    ppo = config.ppo
    S, T = config.data.max_source, config.exploring.max_length
    support = ppo.batch_size * T * t5.vocab_size
    cache = ppo.batch_size * cache_bytes(t5, S, T)
    row = activation_bytes(t5, S, T) + 17 * T * t5.vocab_size
    update = ppo.micro_batch * row + support + cache
    rollout = 21 * support + cache  # when the reference is asked
    return {
        "PPO": {
            "trained": TRAINED * parameters,
            "held": 4 * parameters + classifier,
            "activations": max(update, rollout),
        },
        "validation": {
            "trained": (TRAINED - 4) * parameters,
            "held": 4 * parameters + 2 * classifier,
            "activations": rollout,
        },
    }


def plan():
    """The text of --plan."""
    text = [f"By arithmetic, in GiB; nothing of it was measured. {CUDA} GiB are CUDA's own."]
    config = emprl.make_config("paper", 0, ".", ".")
    for name, t5 in (("t5-small", SMALL), ("t5-base", BASE)):
        rows = {}
        for stage, parts in stages(config, t5).items():
            gib = {what: x / 2**30 for what, x in parts.items()}
            rows[stage] = gib | {"all": sum(gib.values()) + CUDA}
        text += [f"{name}, paper as it is", sheet(rows)]
    return "\n\n".join(text)


# ---- the command ----------------------------------------------------------------------------

PARTS = (*WORK, "memory")


def machine():
    """What the figures depend on: versions, threads, GFLOP/s of a 1,024-square product."""
    threads = torch.get_num_threads()
    return {
        **{name: version(name) for name in ("torch", "transformers") if find_spec(name)},
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        "threads": threads,
        "GFLOP/s, one thread": round(emprl.gflops(1), 1),
        "GFLOP/s, all threads": round(emprl.gflops(threads), 1),
    }


def main():
    parser = Parser(__doc__)
    parser.add_argument("part", nargs="*", default=PARTS, help=", ".join(PARTS))
    parser.add_argument("--repeats", type=int, default=7, help="rounds, of which the median")
    parser.add_argument("--plan", action="store_true", help="memory of preset paper")
    parser.can_write()
    options = parser.parse_args()
    if not set(options.part) <= set(PARTS) or options.repeats < 1:
        parser.error(f"parts are {', '.join(PARTS)}; --repeats is from 1")
    if options.plan:
        print(plan())
        return
    torch.manual_seed(0)
    results = {"machine": machine()}
    print(results["machine"], flush=True)
    for part in options.part:
        if part == "memory":
            results[part] = memory()
        else:
            results[part] = compare(part, options.repeats)
        print(f"\n{sheet(results[part])}", flush=True)
        write_json(options.write, results)  # at once: what comes next takes minutes


if __name__ == "__main__":
    sys.exit(start(main))
