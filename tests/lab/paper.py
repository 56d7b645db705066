"""How much memory does the preset `paper` need? Two steps of every stage, with random weights.

    python -m tests.lab.paper small --data DIR     t5-small's sizes
    python -m tests.lab.paper base --data DIR      t5-base's
    python -m tests.lab.paper small --data DIR --set "identifiers.micro_batch=2"

DIR holds the real corpora, of which 400 dialogues of each part are taken. On a GPU a row is the
peak of its stage; on a CPU (Linux) it is the peak of the process so far, what is imported
included. `bench --plan` has the same by arithmetic.

Cost: a minute on a GPU; on a CPU half an hour for `small`.
"""

import sys
import tempfile
from functools import partial
from pathlib import Path
from unittest import mock

import emprl
import torch

from tests.lab.bench import BASE, SMALL
from tests.lab.command import Parser, peak_memory, sheet, start

SETTINGS = """
mle.epochs=0 mle.steps=2 identifiers.steps=2 context.steps=2 ppo.steps=2
eval.contexts=8 eval.best_of=2 ppo.valid_contexts=8
"""
DIALOGUES = 400


class Measured(emprl.Run):
    """A run that notes the peak of each stage."""

    def train(self, name, trainer, made_of=()):
        model = super().train(name, trainer, made_of)
        self.note_peak(name)
        return model

    def note_peak(self, name):
        self.peaks[name] = {"GiB": peak_memory(self.device) / 2**30}
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()


def few_dialogues(load_corpus, config):
    """load_corpus, but for DIALOGUES of each part."""
    corpus = load_corpus(config)
    for parts in (corpus.dialogues, corpus.labelled):
        for name in parts:
            parts[name] = parts[name][:DIALOGUES]
    return corpus


def random_checkpoint(folder, t5, data_path):
    """An official folder with random weights, and the tokenizer of preset `real`."""
    config = emprl.make_config("real", data_path=data_path)
    tokenizer = emprl.make_tokenizer(config, emprl.load_corpus(config))
    (folder / "spiece.model").write_bytes(tokenizer.model)
    torch.manual_seed(0)
    emprl.save_pretrained(emprl.T5(t5), folder)


def main():
    parser = Parser(__doc__)
    parser.add_argument("size", choices=("small", "base"))
    parser.add_argument("--data", required=True, help="folder of the real corpora")
    parser.add_argument("--set", default="", help="more settings, in quotes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        random_checkpoint(folder, {"small": SMALL, "base": BASE}[options.size], options.data)
        settings = f"{SETTINGS} {options.set}".split()
        config = emprl.make_config("paper", 0, options.data, folder, settings)
        run = Measured(folder / "run", config, emprl.find_device())
        run.peaks = {}
        few = partial(few_dialogues, emprl.load_corpus)
        with mock.patch.object(emprl, "load_corpus", few):
            emprl.run_all(run)
        run.note_peak("evaluate")
    print(sheet(run.peaks))


if __name__ == "__main__":
    sys.exit(start(main))
