"""Does a change of form change nothing? Two small runs, and a hash of everything they made.

    python -m tests.lab.same            a minute on two cores; prints a line for each result
    python -m tests.lab.same > before   ... change the code ...   python -m tests.lab.same | diff before -

The first run is `smoke`. The second switches on what `real` and `paper` use and `smoke` does not.
Weights, figures, the log and the replies are hashed; config.json, times and pages are not.
"""

import contextlib
import hashlib
import io
import json
import sys
import tempfile
from pathlib import Path

import torch

import emprl
import t5_small

EVERYTHING = """
t5.dropout_rate=0.1 pretrain.task=turns pretrain.muon=on sft.muon=on sft.micro_batch=5
identifiers.ngrams=512 identifiers.class_weight=1 context.ngrams=512 context.penalty=3e-6
reward.balance=0.6 sampling.top_k=20 sampling.top_p=0.95 sampling.temperature=0.9
sampling.min_length=3 replying.top_k=20 replying.top_p=0.95 replying.temperature=0.9
replying.min_length=3 ppo.ptx_coef=0.5 ppo.average=0.9 ppo.adaptive_kl=on ppo.kl_horizon=100
ppo.ppo_epochs=2 ppo.micro_batch=3 ppo.lam=0.95 ppo.whiten_rewards=on ppo.normalise_scores=on
"""
RUNS = {"smoke": "", "everything": EVERYTHING}


def digest(content):
    """The first 16 digits of a SHA-256."""
    return hashlib.sha256(content).hexdigest()[:16]


def weights(path):
    """The bytes of all tensors of a checkpoint, by name."""
    state = t5_small.load_state(path)
    return b"".join(name.encode() + state[name].numpy().tobytes() for name in sorted(state))


def results(folder):
    """(name, hash) of each result of a finished run, and each figure of metrics.json."""
    for name in ("sft", "emprl"):
        yield f"{name} weights", digest(weights(folder / name / "pytorch_model.bin"))
    for name in ("metrics.jsonl", "responses.jsonl"):
        yield name, digest((folder / name).read_bytes())
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    for key in (
        "sft",
        "emprl",
        "best_of_n",
        "identifiers",
        "judge",
        "floors",
        "ceiling",
        "gain",
    ):
        yield key, digest(json.dumps(metrics[key], sort_keys=True).encode())
    yield "emprl reward", metrics["emprl"]["reward"]


def main():
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for name, settings in RUNS.items():
            run_folder = Path(folder) / name
            config = emprl.make_config("smoke", settings=settings.split())
            with contextlib.redirect_stdout(io.StringIO()):
                emprl.run_all(emprl.Run(run_folder, config))
            for what, value in results(run_folder):
                print(f"{name:<11} {what:<16} {value}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
