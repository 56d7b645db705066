"""Which reply do people prefer, MLE's or EmpRL's? Blind: the two are A and B.

    python -m tests.lab.rate RUN [NAME]     rate, as NAME; then the table of all raters
    python -m tests.lab.rate RUN --number 50 --seed 1

All raters of a run see the same contexts, drawn by the seed, each in an order of their own.
Answers are kept one by one in RUN/ratings-NAME.jsonl; an empty line stops, the same command goes
on. An item counts as most of its raters prefer, since they are not independent; p: sign test of
that; equal: share of equal answers of two raters; kappa: Cohen's (1960), the mean over pairs.

Cost: a minute for each context.
"""

import getpass
import hashlib
import itertools
import json
import math
import random
import re
import sys
from pathlib import Path
from urllib.parse import quote

from data import DataError, printable
from emprl import OPENING, say
from tests.lab.command import Parser, mean, start

CONTENT = (
    "Content note: the contexts are about hard moments of people's lives, and some replies to",
    "them are cold, false or hurtful.",
)
NOTE = (*CONTENT, "Stop whenever you like: an empty line is enough.", *OPENING)
QUESTIONS = {
    "empathy": "shows more empathy",
    "relevance": "is more relevant to what was said",
    "fluency": "is more fluent",
}
ANSWERS = {"a": 1, "b": -1, "t": 0}


# ---- statistics -----------------------------------------------------------------------------


def sign_test(wins, losses):
    """How likely a fair coin is this uneven: 2 sum_{k <= min} C(n, k) / 2^n, at most 1."""
    count = wins + losses
    tail = sum(math.comb(count, k) for k in range(min(wins, losses) + 1))
    return min(1, 2 * tail / 2**count)


def kappa(first, second):
    """(p_o - p_e) / (1 - p_e) of two raters' answers to the same items; None if p_e = 1."""
    count = len(first)
    equal = sum(x == y for x, y in zip(first, second))
    chance = sum(first.count(x) * second.count(x) for x in set(first))  # count^2 p_e
    if chance == count**2:
        return None
    return (count * equal - chance) / (count**2 - chance)


def table(items, raters):
    """A line for each question. raters: [{item: {question: 1 EmpRL, -1 MLE, 0 tie}}]."""
    lines = [f"raters: {len(raters):<5} EmpRL    MLE    tie       p   equal   kappa"]
    for question in QUESTIONS:
        leads = []
        for item in items:
            answers = [rater[item][question] for rater in raters if item in rater]
            if answers:
                leads.append(sum(answers))
        wins = sum(lead > 0 for lead in leads)
        losses = sum(lead < 0 for lead in leads)
        counts = f"{wins:7}{losses:7}{leads.count(0):7}{sign_test(wins, losses):8.3f}"
        lines.append(f"{question:<12}{counts}{agreement(items, raters, question)}")
    return "\n".join(lines)


def agreement(items, raters, question):
    """Share of equal answers, and mean kappa, over all pairs of raters; "-" for none."""
    equal, kappas = [], []
    for first, second in paired(items, raters, question):
        equal += [x == y for x, y in zip(first, second)]
        kappas.append(kappa(first, second))
    kappas = [x for x in kappas if x is not None]
    return "".join(f"{mean(x):8.2f}" if x else f"{'-':>8}" for x in (equal, kappas))


def paired(items, raters, question):
    """Of each two raters the answers to the items that both have rated: two lists."""
    for one, other in itertools.combinations(raters, 2):
        both = [item for item in items if item in one and item in other]
        yield [one[item][question] for item in both], [other[item][question] for item in both]


# ---- files ----------------------------------------------------------------------------------


def read(path, entry):
    """entry(record) of each line of a .jsonl. Raises DataError."""
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            if line.strip():
                yield entry(json.loads(line))
        except (KeyError, TypeError, ValueError):
            raise DataError(f"{path}:{number}: damaged; repair or remove this line") from None


def read_items(run, number, seed):
    """{item: (context, MLE's reply, EmpRL's)} where the two differ, drawn by the seed.

    An item is named by all that is shown: ratings of other replies are of other items.
    """

    def item(record):
        replies = record["replies"]
        shown = [*record["context"], replies["mle"], replies["emprl"]]
        name = hashlib.sha256(json.dumps([seed, *shown]).encode()).hexdigest()
        return name, [printable(text) for text in shown]

    items = dict(read(run / "responses.jsonl", item))
    drawn = [name for name in sorted(items) if items[name][-1] != items[name][-2]][:number]
    return {name: items[name] for name in drawn}  # in the order of their hashes


def read_ratings(path):
    """{item: {question: answer}} of one rater."""

    def rating(record):
        answers = {question: record[question] for question in QUESTIONS}
        if not set(answers.values()) <= {-1, 0, 1}:
            raise ValueError
        return str(record["item"]), answers

    return dict(read(path, rating))


def ratings_file(run, name):
    """Two raters never share a file, whatever their names hold."""
    quoted = re.sub(r"[^\w-]", lambda found: quote(found[0], safe=""), name)
    return run / f"ratings-{quoted}.jsonl"


def user_name():
    try:
        return getpass.getuser()
    except (ImportError, KeyError, OSError):  # which of them depends on Python and the system
        raise DataError("this system does not tell who you are; give a NAME") from None


# ---- a session ------------------------------------------------------------------------------


def ask(question):
    """1 for A, -1 for B, 0 for a tie; None to stop."""
    while True:
        answer = input(f"Which {question} (a, b, t: tie, empty line: stop)? ").strip().lower()
        if answer in ANSWERS or not answer:
            return ANSWERS.get(answer)


def rate(items, path):
    """Ask about all items that are not in the rater's file yet, each written at once."""
    done = read_ratings(path) if path.exists() else {}
    numbers = {item: number for number, item in enumerate(items, 1)}
    todo = [item for item in items if item not in done]
    random.Random(path.name).shuffle(todo)
    for item in todo:
        *context, mle, emprl = items[item]
        a_is_emprl = random.Random(item + path.name).random() < 0.5
        first, second = (emprl, mle) if a_is_emprl else (mle, emprl)
        say(f"\n{numbers[item]} of {len(items)}", *context, sep="\n")
        say(f"A: {first}\nB: {second}")
        record = {"item": item}
        for question, text in QUESTIONS.items():
            answer = ask(text)
            if answer is None:
                return
            record[question] = answer if a_is_emprl else -answer
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def main():
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("name", nargs="?", default="", help="yours; else the system's")
    parser.add_argument("--number", type=int, default=30, help="contexts")
    parser.add_argument("--seed", type=int, default=0, help="which contexts")
    options = parser.parse_args()
    if options.number < 1:
        parser.error("--number is from 1")
    for stream in (sys.stdin, sys.stdout):  # texts and answers may hold anything
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    path = ratings_file(options.run, options.name or user_name())
    items = read_items(options.run, options.number, options.seed)
    say(*NOTE, sep="\n")
    try:
        rate(items, path)
    except (EOFError, KeyboardInterrupt):
        say()
    files = sorted(options.run.glob("ratings-*.jsonl"))
    raters = [read_ratings(file) for file in files]
    raters = [rater for rater in raters if rater.keys() & items.keys()]
    say(f"\nseed {options.seed}, answers in {path}\n{table(items, raters)}")


if __name__ == "__main__":
    sys.exit(start(main))
