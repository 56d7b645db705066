"""Which replies are worth reading? Blind sheets for readers, and the table of their answers.

    python -m tests.lab.blind RUN --sheet FILE            the sheet: give each reader a copy
    python -m tests.lab.blind RUN FILLED [FILLED ...]     the table; the same other options
    python -m tests.lab.blind RUN --number 50 --seed 1 --systems human,mle --sheet FILE

RUN is a finished run, or a file with lines as in its responses.jsonl. Contexts are drawn by the
seed, replies shuffled; those that are equal are shown once. A reader needs nothing but the sheet,
and writes three numbers for each reply. The table has means over contexts of the readers' means,
with 95 % intervals (1.96 standard errors over contexts), and differences to MLE, context by
context. kappa: Cohen's, quadratic weights (1968), the mean over pairs of readers.

Cost: seconds; a reader takes about an hour for 100 contexts.
"""

import itertools
import math
import random
import re
import sys
import unicodedata
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase

import torch

from data import DataError, printable
from emprl import OPENING, digest, say
from tests.lab.command import Parser, new_file, read_replies, sheet, start, write_json

QUESTIONS = ("fluency", "fit", "empathy")
INSTRUCTIONS = f"""\
# Content note: the contexts are about hard moments of people's lives, and some replies to
# them are cold, false or hurtful. Stop whenever you like.
# {OPENING[1]}
#
# Below are {{count}} conversations, each with several replies to its last turn. The replies are in
# random order, and all in lower case. Rate every reply on its own, from 1 (worst) to 5 (best):
#   fluency   Is it good English?
#   fit       Does it answer what was said, and make sense?
#   empathy   Does it show that the person's feelings were understood?
# Write the item's number, the reply's letter and the three numbers in this order: "17 B 4 3 2".
# Complete the lines below, or write yours into a file of their own; its first line must be the
# first line of this one. An item may be left out.
"""
OPEN = re.compile(r"\d+ [A-Z]|([#>]|[A-Z]:).*|")  # the sheet's own lines
ANSWER = re.compile(r"(\d+ [A-Z]) +([1-5]) +([1-5]) +([1-5])")


@dataclass
class Item:
    """A context and its replies: each text once, with the systems that gave it."""

    id: str
    context: list  # of turns
    replies: dict  # letter -> (text, [system, ...])


def one_line(text):
    return printable(" ".join(text.split()))


def as_a_model(text):
    """As a tokenizer leaves a text, so that capitals do not tell who wrote it."""
    return one_line(unicodedata.normalize("NFKC", text).casefold())


def read_items(path, systems, number, seed):
    """[Item, ...], drawn and shuffled by the seed. Raises DataError."""
    records = read_replies(path)
    generator = random.Random(seed)
    items = []
    for record in generator.sample(records, min(number, len(records))):
        replies = {"human": record["human"], **record["replies"]}
        of_text = defaultdict(list)
        for system in systems:
            if system not in replies:
                raise DataError(f"{path}: no {system!r}; it has {', '.join(replies)}")
            of_text[as_a_model(replies[system])].append(system)
        shuffled = list(of_text.items())
        generator.shuffle(shuffled)
        context = [one_line(turn) for turn in record["context"]]
        items.append(Item(record["id"], context, dict(zip(ascii_uppercase, shuffled))))
    return items


# ---- the sheet ------------------------------------------------------------------------------


def first_line(items):
    """It tells which sheet the answers are of."""
    return f"# sheet {digest([[item.context, item.replies] for item in items])[:12]}"


def sheet_text(items):
    """What a reader gets."""
    lines = [first_line(items), INSTRUCTIONS.format(count=len(items))]
    for number, item in enumerate(items, 1):
        lines.append(f"# ---- {number} of {len(items)}")
        for place, text in enumerate(item.context, 1 - len(item.context)):
            lines.append(f"> {'listener' if place % 2 else 'person'}: {text}")  # 0: the last
        lines += [f"{letter}: {text}" for letter, (text, _) in item.replies.items()]
        lines += [*(f"{number} {letter}" for letter in item.replies), ""]
    return "\n".join(lines)


def read_answers(path, items, systems):
    """(items, systems, 3) numbers of a filled sheet, NaN where nothing is. Raises DataError."""
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    lines = [line.strip() for line in text.splitlines()]
    if lines[:1] != [first_line(items)]:
        raise DataError(
            f"{path}:1: not a sheet of these replies and options; its first line must be "
            f"{first_line(items)!r}"
        )
    rated_by = {}  # "17 B" -> the item, and the systems that gave this reply
    for number, item in enumerate(items):
        for letter, (_, gave_it) in item.replies.items():
            rated_by[f"{number + 1} {letter}"] = number, [systems.index(x) for x in gave_it]
    answers = torch.full((len(items), len(systems), len(QUESTIONS)), torch.nan)
    for place, line in enumerate(lines, 1):
        if OPEN.fullmatch(line):
            continue
        found = ANSWER.fullmatch(line)
        if not found or found[1] not in rated_by:
            raise DataError(
                f"{path}:{place}: {printable(line)[:40]!r}: give each reply of the sheet three "
                "numbers from 1 to 5, once, as in '17 B 4 3 2'"
            )
        answers[rated_by.pop(found[1])] = torch.tensor([float(x) for x in found.groups()[1:]])
    if answers.isnan().all():
        raise DataError(f"{path}: no answers; write lines such as '17 B 4 3 2'")
    return answers


# ---- the table ------------------------------------------------------------------------------


def interval(numbers):
    """ "3.50 (3.11 to 3.89)": the mean of those that are there, and 1.96 standard errors."""
    numbers = numbers[~numbers.isnan()]
    middle = numbers.mean().item()
    if len(numbers) < 2:
        return f"{middle:.2f}"
    error = 1.96 * numbers.std().item() / math.sqrt(len(numbers))
    return f"{middle:.2f} ({middle - error:.2f} to {middle + error:.2f})"


def row_of(rated):
    """A row of the table from (items, 3) numbers."""
    row = {question: interval(column) for question, column in zip(QUESTIONS, rated.T)}
    return row | {"contexts": str((~rated[:, 0].isnan()).sum().item())}


def table(readers, systems):
    """Markdown rows of answers (readers, items, systems, 3): means, differences to MLE, kappa."""
    means = dict(zip(systems, readers.nanmean(0).unbind(1)))  # system -> (items, 3)
    rows = {system: row_of(rated) for system, rated in means.items()}
    for system, rated in means.items():
        if system != "mle" and "mle" in systems:
            rows[f"{system} - mle"] = row_of(rated - means["mle"])
    pairs = itertools.combinations(readers.flatten(1, 2), 2)
    kappas = [weighted_kappa(first, second) for first, second in pairs]
    if kappas:
        mean = torch.stack(kappas).nanmean(0).tolist()
        rows["kappa"] = {question: f"{x:.2f}" for question, x in zip(QUESTIONS, mean)}
    return rows


def weighted_kappa(first, second):
    """1 - mean (x_i - y_i)^2 / mean over all i, j of (x_i - y_j)^2; NaN if that is 0.

    (replies, questions) twice -> (questions,), of the replies that both have rated.
    """
    both = ~(first - second).isnan().any(1)
    x, y = first[both], second[both]
    seen = ((x - y) ** 2).mean(0)
    chance = ((x[:, None] - y) ** 2).mean((0, 1))
    return 1 - seen / chance


def without_texts(answers, items, systems):
    """["CONTEXT'S-ID SYSTEM 4 3 2", ...] of one reader."""
    lines = []
    for item, rated in zip(items, answers.tolist()):
        for system, numbers in zip(systems, rated):
            if not math.isnan(numbers[0]):
                lines.append(" ".join([item.id, system, *(f"{x:.0f}" for x in numbers)]))
    return lines


def make_parser():
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished run, or a .jsonl")
    parser.add_argument("filled", nargs="*", type=Path, help="filled sheets, one a reader")
    parser.add_argument("--sheet", type=new_file, metavar="FILE", help="write the sheet")
    parser.add_argument("--number", type=int, default=100, help="contexts")
    parser.add_argument("--seed", type=int, default=0, help="which contexts, which order")
    parser.add_argument("--systems", default="human,mle,best_of_n,emprl")
    parser.can_write()
    return parser


def main():
    parser = make_parser()
    options = parser.parse_intermixed_args()  # files after options, too
    if options.number < 1 or bool(options.sheet) == bool(options.filled):
        parser.error("give --sheet FILE, or filled sheets; --number is from 1")
    path = options.run / "responses.jsonl" if options.run.is_dir() else options.run
    systems = options.systems.split(",")
    items = read_items(path, systems, options.number, options.seed)
    if options.sheet:
        with options.sheet.open("x", encoding="utf-8") as file:  # never over a filled one
            file.write(sheet_text(items))
        say(f"{len(items)} contexts in {options.sheet}")
        return

    readers = {file.stem: read_answers(file, items, systems) for file in options.filled}
    if len(readers) < len(options.filled):
        parser.error("the filled sheets must have different names")
    rows = table(torch.stack(list(readers.values())), systems)
    say(f"{len(readers)} readers; means over contexts, 95 % intervals\n\n{sheet(rows)}")
    told = {name: without_texts(one, items, systems) for name, one in readers.items()}
    columns = f"context system {' '.join(QUESTIONS)}"
    write_json(options.write, {"seed": options.seed, "columns": columns, "readers": told})


if __name__ == "__main__":
    sys.exit(start(main))
