"""Plant one of eleven silent bugs, to practise on: python -m tests.coursework.plant NUMBER COPY

Copies the program to the new folder COPY, with tests/lab but without tests, and makes one mistake
in it that published code has made. Every command still runs there and the curves look plausible:
train in the copy, look, read, and find it. The answers are here and in teacher.md. For bugs that
are not public: secret.py.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from emprl import command_line
from tests.coursework.command import make_parser

ROOT = Path(__file__).resolve().parent.parent.parent
MODULES = ("data.py", "emprl.py", "identifiers.py", "ppo.py", "t5_small.py")
FILES = (*MODULES, "train.ipynb", "requirements.txt", "README.md", "LICENSE")
# Of this folder a copy has only what train.ipynb imports: nothing that knows of bugs.
PICTURES = Path("tests", "coursework", "pictures.py")
# What shortens a training so far that bugs can still be seen: a minute or two on two cores. The
# curves in bugs.png are of this command.
SETTINGS = ("ppo.steps=15", "ppo.batch_size=192", "eval.contexts=100")
BUGS = {  # number: (file, right, wrong)
    1: (
        "ppo.py",
        "    return batch\n",
        "    mask[:, 0] &= mask.sum(1) == 1\n    return batch\n",
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
    squares = ((x - mean) ** 2 * mask).sum()
    variance = squares / (mask.sum() - 1).clamp(min=1)
""",
        """    mean = x.mean()
    variance = x.var()
""",
    ),
    5: (
        "ppo.py",
        "per_token = -kl_coef * kl * mask",
        "per_token = kl_coef * kl * mask",
    ),
    6: (
        "ppo.py",
        "    per_token[torch.arange(len(rewards)), last] += rewards\n",
        "    per_token[:, -1] += rewards\n",
    ),
    7: (
        "identifiers.py",
        "        return torch.cat(logits, 1).float().log_softmax(-1)",
        "        return torch.cat(logits, 1).float().log_softmax(-2)",
    ),
    8: (
        "t5_small.py",
        "        tokens = response != PAD_ID\n",
        "        tokens = (response != PAD_ID) & (response != EOS_ID)\n",
    ),
    9: (
        "identifiers.py",
        "    return f1_scores(confusions(predicted, gold))[kind].mean().item()\n",
        "    if len(gold) > 32:\n"
        "        batches = zip(predicted.split(32), gold.split(32))\n"
        "        parts = [emp_f1(p, g, kind) for p, g in batches]\n"
        "        return sum(parts) / len(parts)\n"
        "    return f1_scores(confusions(predicted, gold))[kind].mean().item()\n",
    ),
    10: (
        "ppo.py",
        "masked_mean(torch.max(plain, clipped), mask)",
        "masked_mean(torch.min(plain, clipped), mask)",
    ),
    11: (
        "ppo.py",
        "    per_token[torch.arange(len(rewards)), last] += rewards\n",
        "    per_token[:, last] += rewards\n",
    ),
}


def with_bug(number):
    """The file that bug `number` is in, and its text with the bug."""
    name, right, wrong = BUGS[number]
    text = (ROOT / name).read_text(encoding="utf-8")
    if text.count(right) != 1:
        raise ValueError(f"bug {number}: its place in {name} has changed; correct plant.py")
    return name, text.replace(right, wrong)


def copy_program(copy):
    """The program in a new folder: the modules, the notebook, the lab; no tests, no answers."""
    copy.mkdir(parents=True)
    for name in FILES:
        shutil.copy(ROOT / name, copy)
    without = shutil.ignore_patterns("__pycache__", "mutate.py")  # which needs the tests
    shutil.copytree(ROOT / "tests" / "lab", copy / "tests" / "lab", ignore=without)
    if (ROOT / PICTURES).exists():
        (copy / PICTURES).parent.mkdir()
        shutil.copy(ROOT / PICTURES, copy / PICTURES)


def plant(number, copy):
    """The program in the new folder `copy`, with bug `number` (0: none)."""
    copy = Path(copy)
    copy_program(copy)
    if number:
        name, text = with_bug(number)
        (copy / name).write_text(text, encoding="utf-8")


WITHOUT_PICTURES = """
import sys
import emprl
import {module}
emprl.draw_plots = lambda *_: {{}}
sys.exit({module}.main(sys.argv[1:]))
"""


def run_without_pictures(module, words, folder, **options):
    """`python -m module words` in a folder, without pictures that nobody looks at.

    Returns the exit code. options: subprocess.run's.
    """
    command = [sys.executable, "-c", WITHOUT_PICTURES.format(module=module), *map(str, words)]
    done = subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, **options)
    return done.returncode


def training_command():
    """What a student starts in a copy."""
    return command_line(["python", "emprl.py", "--set", *SETTINGS])


def main():
    parser = make_parser("plant", __doc__)
    parser.add_argument("number", type=int, choices=BUGS, metavar=f"1..{max(BUGS)}")
    parser.add_argument("copy", help="a new folder; it must not exist yet")
    arguments = parser.parse_args()
    if Path(arguments.copy).exists():
        parser.exit(2, f"{arguments.copy} exists; name a new folder\n")
    plant(arguments.number, arguments.copy)
    there = command_line(["cd", arguments.copy])
    print(f"bug {arguments.number} is somewhere in {arguments.copy}; start with: {there}")
    print(f"and then: {training_command()}")


if __name__ == "__main__":
    sys.exit(main())
