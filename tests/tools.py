"""Plain helpers of the tests: small models, small runs, what they leave behind, files for them."""

import json
import shutil
import signal

import torch

import data
import emprl
import t5_small
from t5_small import EOS_ID, T5, T5Config

MECHANISMS = ("er", "ip", "ex")


# ---- small models


TINY = {
    "vocab_size": 30,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "dropout_rate": 0.0,
}


def tiny_config(**changes):
    return T5Config(**{**TINY, **changes})


def tiny_t5(seed=0, **changes):
    """A random T5 in eval mode, small, but positions, padding and context all matter to it."""
    torch.manual_seed(seed)
    return T5(tiny_config(**changes)).eval()


def ragged(lengths, low=3, high=30, seed=0):
    """Random ids from low to high - 1; each row ends in </s> and is filled up with padding."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        tokens = torch.randint(low, high, (length - 1,), generator=generator)
        rows.append(torch.cat([tokens, torch.tensor([EOS_ID])]))
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


# ---- small runs


def smoke(folder, *settings, **options):
    """The figures of a run of `smoke` with some settings. options: make_config's others."""
    config = emprl.make_config("smoke", settings=settings, **options)
    return emprl.run_all(emprl.Run(folder, config))


def words(folder, *settings):
    """The command line of the same run."""
    line = ["--preset", "smoke", "--run", str(folder)]
    return [*line, "--set", *settings] if settings else line


def interrupt_at(patch, stage, step):
    """Ctrl-C when a step of a stage begins."""
    seed = emprl.Run.seed

    def seed_and_interrupt(run, name, i=0):
        seed(run, name, i)
        if (name, i) == (stage, step):
            signal.raise_signal(signal.SIGINT)

    patch.setattr(emprl.Run, "seed", seed_and_interrupt)


def stages_of(run, folder, *but):
    """A new folder with the checkpoints of a finished run, all but some, and nothing else."""
    shutil.copytree(run / "checkpoints", folder / "checkpoints")
    for name in but:
        (folder / "checkpoints" / f"{name}.pt").unlink()
    return folder


# ---- what they leave behind


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path):
    """The records of a .jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def contents(folder):
    """{path: bytes} of a folder."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path: path.read_bytes() for path in files}


def weights(folder, stage):
    """{name: values} of a stage's result."""
    state = t5_small.load_state(folder / "checkpoints" / f"{stage}.pt")
    return {name: x.tolist() for name, x in state["weights"].items()}


# ---- files to feed them


def records(count, seed=3):
    """Lines of a .jsonl of dialogues with levels."""
    lines = []
    for dialogue in data.generated_corpus(seed, count, 1, 1, 1).dialogues["train"]:
        levels = dict(zip(MECHANISMS, dialogue.levels))
        record = {"context": list(dialogue.context), "response": dialogue.response, **levels}
        lines.append(json.dumps(record) + "\n")
    return lines


def official(folder, run, scale=1.0):
    """The MLE policy of a run as an official checkpoint, its weights times `scale`."""
    shutil.copytree(run / "mle", folder, dirs_exist_ok=True)
    shutil.copy(run / "tokenizer.model", folder / "spiece.model")
    state = t5_small.load_state(folder / "pytorch_model.bin")
    scaled = {name: x * scale for name, x in state.items()}
    t5_small.save_atomically(scaled, folder / "pytorch_model.bin")
    return str(folder)
