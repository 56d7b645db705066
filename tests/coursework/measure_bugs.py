"""What each silent bug does to the curves: python tests/coursework/measure_bugs.py RUN0 RUN1 RUN2

RUN0.. are finished toy runs of different seeds. For each bug and run PPO's first iterations are repeated in a copy with the
bug planted (bug 7 also retrains the identifiers there, bug 8 the MLE policy; bug 9 is in a metric only and is left out).
Writes bugs.json and bugs.png beside this file; a figure that is there already is not measured again.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from plant_bug import BUGS, plant

HERE = Path(__file__).resolve().parent
DRIVER = """
import json, sys
from pathlib import Path
import torch
import data, emprl, identifiers, ppo, t5_small
folder, bug, steps = Path(sys.argv[1]), int(sys.argv[2]), 15
config = emprl.make_config("toy", json.loads((folder / "config.json").read_text())["seed"],
                           settings=[f"ppo.steps={steps}", "ppo.batch_size=192", "ppo.lr=4e-3", "ppo.kl_coef=0.1", "sft.steps=600"])
c, seed = config.data, config.seed
corpus, tokenizer = data.embedded_corpus(seed), data.Tokenizer(folder / "tokenizer.model")
pairs = {part: data.Pairs(corpus.dialogues[part], tokenizer, c.max_source, c.max_target) for part in ("train", "valid")}
t5 = t5_small.from_pretrained(folder / "sft").eval()

def fit(trainer, n):
    for i in range(n):
        torch.manual_seed(1000 * seed + i)
        yield trainer.step(i)
    trainer.finish()

if bug == 8:
    torch.manual_seed(seed)
    t5 = t5_small.T5(t5.config)
    rows_at = data.batches(pairs["train"].lengths(), config.sft.batch_size, seed)
    list(fit(t5_small.mle_trainer(t5, pairs["train"], pairs["valid"], rows_at, config.sft), config.sft.steps))
reader = identifiers.Identifiers(t5.config)
targets = t5_small.load_state(folder / "checkpoints" / "label.pt")["train"]
if bug == 7:
    labelled = {part: data.Pairs(corpus.labelled[part], tokenizer, c.identifier_source, c.identifier_target) for part in ("train", "valid")}
    torch.manual_seed(seed)
    reader.start_from(t5)
    rows_at = data.batches(labelled["train"].lengths(), config.identifiers.batch_size, seed)
    list(fit(identifiers.identifier_trainer(reader, labelled["train"], labelled["valid"], rows_at, config.identifiers), config.identifiers.steps))
    targets = identifiers.predict_levels(reader.eval(), pairs["train"])
else:
    reader.load_state_dict(t5_small.load_state(folder / "checkpoints" / "identifiers.pt")["weights"])
rows_at, train = data.batches([0] * len(pairs["train"]), config.ppo.batch_size, seed), pairs["train"]
trainer = ppo.PPOTrainer(t5, identifiers.make_reward(reader.eval(), targets), lambda i: (train.batch(rows_at(i))[0], torch.tensor(rows_at(i))),
                         lambda t5: {}, config.sampling, config.ppo)
print(json.dumps([{k: record[k] for k in ("reward", "kl", "length", "value_loss")} for record in fit(trainer, steps)]))
"""


def measure(runs):
    path = HERE / "bugs.json"
    figures = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    todo = [
        (bug, i, run)
        for bug in [0, *(b for b in BUGS if b != 9)]
        for i, run in enumerate(runs)
        if f"{bug}/{i}" not in figures
    ]
    for done, (bug, i, run) in enumerate(todo, 1):
        with tempfile.TemporaryDirectory() as folder:
            plant(bug, f"{folder}/copy")
            out = subprocess.run(
                [sys.executable, "-c", DRIVER, str(Path(run).resolve()), str(bug)],
                cwd=f"{folder}/copy",
                env={**os.environ, "PYTHONPATH": f"{folder}/copy"},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
                encoding="utf-8",
            ).stdout
        figures[f"{bug}/{i}"] = json.loads(out.splitlines()[-1])
        path.with_suffix(".tmp").write_text(json.dumps(figures) + "\n", encoding="utf-8")
        path.with_suffix(".tmp").replace(path)
        print(f"{done}/{len(todo)}: bug {bug}, run {i}", flush=True)
    return figures


def draw(figures, keys=("reward", "kl", "length", "value_loss")):
    """One row a figure, one column a bug; the grey curves are the correct program's."""
    bugs = sorted({int(name.split("/")[0]) for name in figures} - {0})
    fig, axes = plt.subplots(
        len(keys),
        len(bugs),
        figsize=(1.9 * len(bugs), 1.7 * len(keys)),
        sharex=True,
        layout="constrained",
    )
    for row, key in zip(axes, keys):
        for axis, bug in zip(row, bugs):
            for number, colour in ((0, "#888888"), (bug, "#E69F00")):
                for name, records in figures.items():
                    if name.startswith(f"{number}/"):
                        axis.plot([r[key] for r in records], color=colour, lw=1)
            axis.tick_params(labelsize=6)
            if key == keys[0]:
                axis.set_title(f"bug {bug}", fontsize=8)
        row[0].set_ylabel(key.replace("_", " "), fontsize=8)
    fig.supxlabel(
        "PPO iteration (grey: correct, orange: with the bug; one line a seed)", fontsize=8
    )
    fig.savefig(HERE / "bugs.png", dpi=80)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(
            "usage: python tests/coursework/measure_bugs.py RUN0 [RUN1 ..] (finished toy runs)"
        )
    draw(measure(sys.argv[1:]))
    print(f"written: {HERE / 'bugs.json'}, {HERE / 'bugs.png'}")
