"""Plant a silent bug: python tests/coursework/plant_bug.py NUMBER COPY

Copies the project, without its tests but with the commands that live beside them, to the new folder COPY and makes one
mistake in it that published code has made. Everything still runs and the curves look plausible: train there, look, read, find it. teacher.md has the answers.
"""

import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
BUGS = {  # number: (file, right, wrong)
    1: (
        "ppo.py",
        "    return Rollout(\n",
        "    mask[:, 0] &= mask.sum(1) == 1\n    return Rollout(\n",
    ),
    2: (
        "t5_small.py",
        "cumulative = log_probs.exp().cumsum",
        "cumulative = (log_probs / 0.7).softmax(-1).cumsum",
    ),
    3: (
        "ppo.py",
        "torch.max((values - returns) ** 2, (clipped - returns) ** 2)",
        "torch.max((values - old_values) ** 2, (clipped - old_values) ** 2)",
    ),
    4: (
        "ppo.py",
        """    mean = masked_mean(x, mask)
    variance = ((x - mean) ** 2 * mask).sum() / (mask.sum() - 1).clamp(min=1)
""",
        """    mean, variance = x.mean(), x.var()
""",
    ),
    5: (
        "ppo.py",
        "rewards = -kl_coef * kl_estimate(log_probs, ref_log_probs) * mask",
        "rewards = kl_coef * kl_estimate(log_probs, ref_log_probs) * mask",
    ),
    6: (
        "ppo.py",
        "    rewards[torch.arange(len(scores)), last] += scores\n",
        "    rewards[:, -1] += scores\n",
    ),
    7: (
        "identifiers.py",
        "        return logits.float().log_softmax(-1)",
        "        return logits.float().log_softmax(-2)",
    ),
    8: (
        "t5_small.py",
        "        tokens = response != self.config.pad_token_id\n",
        "        tokens = (response != self.config.pad_token_id) & (response != self.config.eos_token_id)\n",
    ),
    9: (
        "identifiers.py",
        "    return f1_scores(counts)[kind].mean().item()\n",
        "    if len(gold) > 32:\n"
        "        parts = [emp_f1(p, g, kind) for p, g in zip(predicted.split(32), gold.split(32))]\n"
        "        return sum(parts) / len(parts)\n"
        "    return f1_scores(counts)[kind].mean().item()\n",
    ),
    10: (
        "ppo.py",
        "masked_mean(torch.max(plain, clipped), mask)",
        "masked_mean(torch.min(plain, clipped), mask)",
    ),
    11: (
        "ppo.py",
        "    rewards[torch.arange(len(scores)), last] += scores\n",
        "    rewards[:, last] += scores\n",
    ),
}


def plant(number, copy):
    """The project in `copy`, with bug `number` (0: none)."""
    shutil.copytree(
        ROOT, copy, ignore=shutil.ignore_patterns(".*", "runs", "tests", "__pycache__")
    )
    (Path(copy) / "tests").mkdir()
    for name in ("finished", "crisis", "rate", "ablate", "publish", "download"):
        shutil.copy(ROOT / "tests" / f"{name}.py", Path(copy) / "tests")
    if number:
        file, right, wrong = BUGS[number]
        text = (Path(copy) / file).read_text(encoding="utf-8")
        if text.count(right) != 1:
            raise ValueError(
                f"bug {number}: its place in {file} has changed; correct plant_bug.py"
            )
        (Path(copy) / file).write_text(text.replace(right, wrong), encoding="utf-8")


if __name__ == "__main__":
    numbers = [str(n) for n in BUGS]
    if len(sys.argv) != 3 or sys.argv[1] not in numbers or Path(sys.argv[2]).exists():
        sys.exit(
            f"usage: python tests/coursework/plant_bug.py {numbers[0]}..{numbers[-1]} NEW_FOLDER (it must not exist yet)"
        )
    plant(int(sys.argv[1]), sys.argv[2])
    sys.path.insert(0, str(ROOT))
    from data import command_line

    there = command_line(["cd", sys.argv[2]])
    print(f"bug {sys.argv[1]} is somewhere in {sys.argv[2]}; start with: {there}")
    print("and then: python emprl.py")
