"""Does a change of form change nothing? Two small runs, and a hash of everything they made.

    python -m tests.lab.same            15 seconds; prints a line for each result
    python -m tests.lab.same > before
    ... change the code ...
    python -m tests.lab.same | diff before -

The first run is `smoke`. The second switches on what `real` and `paper` use and `smoke` does not.
Weights, figures, the log and the replies are hashed; config.json, times and pages are not.
"""

import contextlib
import io
import sys
import tempfile
from pathlib import Path

import torch

import emprl
import t5_small
from tests.lab.command import read_metrics

EVERYTHING = """
t5.dropout_rate=0.1 pretrain.task=turns mle.muon=on mle.micro_batch=5
identifiers.kind=ngrams identifiers.size=512 identifiers.class_weight=1 context.penalty=3e-6
reward.balance=0.6 exploring.top_k=20 exploring.top_p=0.95 exploring.temperature=0.9
exploring.min_length=3 replying.top_k=20 replying.top_p=0.95 replying.temperature=0.9
replying.min_length=3 ppo.ptx_coef=0.5 ppo.average=0.9 ppo.adaptive_kl=on ppo.kl_horizon=100
ppo.ppo_epochs=2 ppo.micro_batch=3 ppo.lam=0.95 ppo.whiten_rewards=on ppo.centre_rewards=on
"""
RUNS = {"smoke": "", "everything": EVERYTHING}
OTHERS = ("config", "seconds", "made_of", "code")  # of metrics.json: no figures


def results(folder):
    """(name, hash) of each result of a finished run, and each figure of metrics.json."""
    for name in ("mle", "emprl"):
        state = t5_small.load_state(folder / name / "pytorch_model.bin")
        yield f"{name} weights", emprl.digest_weights(state)
    for name in ("metrics.jsonl", "responses.jsonl"):
        yield name, emprl.digest_bytes((folder / name).read_bytes())
    for name, figures in read_metrics(folder).items():
        if name not in OTHERS:
            yield name, emprl.digest(figures)


def main():
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for name, settings in RUNS.items():
            run_folder = Path(folder) / name
            config = emprl.make_config("smoke", settings=settings.split())
            with contextlib.redirect_stdout(io.StringIO()):
                emprl.run_all(emprl.Run(run_folder, config))
            for what, value in results(run_folder):
                print(f"{name:<11} {what:<16} {value[:16]}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
