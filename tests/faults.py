"""Break it on purpose: python tests/faults.py [KILLS]

Kills smoke runs with SIGKILL at random moments until each one ends, injects faults into others, and prints how many were
survived with nothing lost. test_trust.py runs the same. Needs fork, so not Windows.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import torch._dynamo  # which every optimizer imports: done once, before the forks

import emprl
import identifiers
import ppo
import t5_small


def run(folder, *settings, before=lambda: None):
    """`python emprl.py --preset smoke` without plots, in a process of its own that saves at every step. before() is called there first.
    Returns (exit code, what it wrote to stderr); the exit code is -9 if it was killed."""
    command = ["--preset", "smoke", "--run", str(folder)]
    command += ["--set", *settings] if settings else []
    if not hasattr(
        os, "fork"
    ):  # Windows: a new Python, in which nothing can be changed before
        done = subprocess.run(
            [sys.executable, emprl.__file__, *command],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
        )
        return done.returncode, done.stderr

    errors = Path(f"{folder}.stderr")
    sys.stdout.flush()
    if (pid := os.fork()) == 0:
        with (
            open(os.devnull, "w", encoding="utf-8") as nothing,
            open(errors, "w", encoding="utf-8") as file,
            contextlib.redirect_stdout(nothing),
            contextlib.redirect_stderr(file),
        ):
            code = 3
            try:
                emprl.Run.save_every, emprl.draw_plots = (
                    0.0,
                    lambda *_: None,
                )  # the plots take longer than the rest
                before()
                code = emprl.main(command)
            finally:
                file.flush()
                os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), errors.read_text(encoding="utf-8")


def differences(a, b):
    """Names of what is not bit-identical in two finished run folders; how long things took is left out."""
    found = [
        name
        for name in ("metrics.jsonl", "samples.md", "config.json", "tokenizer.model")
        if (a / name).read_bytes() != (b / name).read_bytes()
    ]
    one, two = (
        {**json.loads((x / "metrics.json").read_text(encoding="utf-8")), "seconds": 0}
        for x in (a, b)
    )
    found += ["metrics.json"] if one != two else []
    for name in ("sft", "emprl"):
        one, two = (t5_small.load_state(x / name / "pytorch_model.bin") for x in (a, b))
        found += [f"{name}: {key}" for key in one if not torch.equal(one[key], two[key])]
    return found


STEPS = {
    "pretrain": 4,
    "sft": 12,
    "identifiers": 8,
    "judge": 8,
    "label": 1,
    "context": 4,
    "ppo": 4,
    "evaluate sft": 1,
    "evaluate emprl": 1,
}


def at(stage, step, happens):
    """happens() when a stage's step begins."""
    old = emprl.Run.seed

    def seed(self, name, i=0):
        old(self, name, i)
        if (name, i) == (stage, step):
            happens()

    emprl.Run.seed = seed


def kill_soon(delay):
    """SIGKILL after some seconds, whatever the process is then about to do."""
    threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()


def kills(count, folder, seed=0):
    """A run is killed at a random moment of each stage in turn, always started again by the same command, and then compared with
    one that was never killed; and so on until `count` kills. Returns (Counter of kills by stage, names of what differed)."""
    rng, killed, different = random.Random(seed), Counter(), []
    assert run(folder / "whole")[0] == 0
    while killed.total() < count:
        for stage, steps in STEPS.items():
            step, delay = rng.randrange(steps), rng.uniform(0, 0.08)
            code, _ = run(
                folder / "killed", before=lambda: at(stage, step, lambda: kill_soon(delay))
            )
            killed[stage] += code == -signal.SIGKILL
        assert run(folder / "killed")[0] == 0
        different += differences(folder / "killed", folder / "whole")
        shutil.rmtree(folder / "killed")
    return killed, different


# ---- faults: each is put into a run, which must end as said; then, without it, the same command must finish as if nothing had been


def sometimes(function, value, calls):
    """A function of which the results of some calls (counted from 0) are spoilt."""
    count = iter(range(10**9))
    return lambda *a, **k: function(*a, **k) * (value if next(count) in calls else 1.0)


EVERY = range(10**9)


def spoil_reward(value, calls):
    identifiers.empathy_reward = sometimes(identifiers.empathy_reward, value, calls)


def spoil_loss(value, calls):
    old = t5_small.T5.loss_sum

    def loss_sum(self, *batch):
        loss, n = old(self, *batch)
        return spoilt(loss), n

    spoilt = sometimes(lambda loss: loss, value, calls)
    t5_small.T5.loss_sum = loss_sum


def no_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def out_of_memory():
    ppo.generate = no_memory


def disk_full():
    """No file may grow over 20 kB: as a full disk, but for this process only."""
    import resource  # Windows has none

    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


FAULTS = {  # name: (what to do before the run, settings, exit code, words of the one line, may the figures change?)
    **{
        f"the disk is full in {stage}": (
            lambda stage=stage, step=step: at(stage, step, disk_full),
            [],
            2,
            "make room",
            False,
        )
        for stage, step in (("pretrain", 1), ("sft", 7), ("judge", 2), ("ppo", 3))
    },
    "one reward is NaN": (lambda: spoil_reward(float("nan"), {0}), [], 0, "", True),
    "one reward is infinite": (lambda: spoil_reward(float("inf"), {1}), [], 0, "", True),
    "every reward is NaN": (
        lambda: spoil_reward(float("nan"), EVERY),
        ["ppo.steps=12"],
        2,
        "10 steps in a row",
        True,
    ),
    "one loss is NaN": (lambda: spoil_loss(float("nan"), {5}), [], 0, "", True),
    "one loss is infinite": (lambda: spoil_loss(float("inf"), {6}), [], 0, "", True),
    "every loss is NaN": (
        lambda: spoil_loss(float("nan"), EVERY),
        [],
        2,
        "lower sft.lr",
        True,
    ),
    "the learning rate is absurd": (
        lambda: None,
        ["sft.lr=1e9", "sft.steps=40"],
        2,
        "lower sft.lr",
        True,
    ),
    "the GPU's memory is full": (out_of_memory, [], 2, "micro_batch", False),
    **{
        f"Ctrl-C in {stage}": (
            lambda stage=stage, step=step: at(stage, step, interrupt),
            [],
            130,
            "go on with",
            False,
        )
        for stage, step in (
            ("pretrain", 1),
            ("sft", 5),
            ("identifiers", 0),
            ("judge", 3),
            ("ppo", 2),
        )
    },
}


def damage(folder, stages):
    """(name, words of the one line, function that does it) for files of a finished run."""

    def truncate(path):
        path.write_bytes(path.read_bytes()[:-100])

    def flip(path):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 16
        path.write_bytes(content)

    def foreign(path):
        torch.save([1, 2], path)

    for stage in stages:
        path = folder / "checkpoints" / f"{stage}.pt"
        for how in (truncate, flip, foreign):
            yield f"{stage}.pt: {how.__name__}", f"{stage}.pt: ", path, how
    yield (
        "ppo.pt: a folder",
        "ppo.pt: ",
        folder / "checkpoints" / "ppo.pt",
        lambda path: (path.unlink(), path.mkdir()),
    )


def inject(
    folder,
    whole,
    faults=tuple(FAULTS),
    stages=("pretrain", "sft", "identifiers", "judge", "label", "ppo"),
):
    """Faults by name, and damage to the checkpoints of some stages. Returns (number, [what went wrong])."""
    wrong, number = [], 0
    for number, name in enumerate(faults, 1):
        before, settings, code, words, changes = FAULTS[name]
        here = folder / f"fault{number}"
        got, errors = run(here, *settings, before=before)
        if got != code or words not in errors or errors.strip().count("\n") > 0:
            wrong.append(f"{name}: exit code {got}, {errors!r}")
        damaged = [
            path.name
            for path in (here / "checkpoints").iterdir()
            if path.suffix == ".pt" and not t5_small.load_state(path)
        ]
        if (
            name.startswith("the disk is full in")
            and f"{name.split()[-1]}.pt" not in os.listdir(here / "checkpoints")
            or damaged
        ):
            wrong.append(f"{name}: no good checkpoint is left")
        if not changes and (run(here)[0] != 0 or differences(here, whole)):
            wrong.append(f"{name}: not as if nothing had been")
    for name, words, path, how in damage(folder / "damaged", stages):
        number += 1
        shutil.copytree(whole, folder / "damaged")
        how(path)
        before = {
            p: p.read_bytes()
            for p in (folder / "damaged").rglob("*")
            if p.is_file() and p.parent.name == "checkpoints"
        }
        got, errors = run(folder / "damaged")
        if (
            got != 2
            or words not in errors
            or errors.strip().count("\n") > 0
            or any(p.read_bytes() != x for p, x in before.items())
        ):
            wrong.append(f"{name}: exit code {got}, {errors!r}")
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        if run(folder / "damaged")[0] != 0 or differences(folder / "damaged", whole):
            wrong.append(f"{name}: not repaired by deleting it")
        shutil.rmtree(folder / "damaged")
    return number, wrong


if __name__ == "__main__":
    torch.set_num_threads(1)
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 30
    with tempfile.TemporaryDirectory() as folder:
        killed, different = kills(count, Path(folder))
        print(
            f"kills: {killed.total()} ({dict(killed)}); {len(different)} files or tensors differ from a run that was never killed"
        )
        number, wrong = inject(Path(folder), Path(folder) / "whole")
        print(f"faults: {number} injected, {number - len(wrong)} recovered")
        print(*wrong, sep="\n")
    sys.exit(1 if different or wrong else 0)
