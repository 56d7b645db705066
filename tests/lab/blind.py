"""Which replies are worth reading? Blind sheets for readers, and the table of their answers.

    python -m tests.lab.blind RUN --sheet FILE            the sheet: give each reader a copy
    python -m tests.lab.blind RUN FILLED [FILLED ...]     the table; the same other options
    python -m tests.lab.blind RUN --number 50 --seed 1 --systems human,mle --sheet FILE

RUN is a finished run, or a file with lines as in its responses.jsonl. Contexts are drawn by the
seed, replies shuffled; those that are equal are shown once. A reader needs nothing but the sheet,
and writes three numbers for each reply. The table has means over contexts of the readers' means,
with 95 % intervals (1.96 standard errors over contexts), and differences to --base, context by
context. kappa: Cohen's, quadratic weights (1968), the mean over pairs of readers.

Cost: seconds; a reader takes about an hour for 100 contexts.
"""

import itertools
import math
import random
import re
import statistics
import sys
import unicodedata
from collections import defaultdict
from dataclasses import dataclass
from operator import sub
from pathlib import Path
from string import ascii_uppercase

from data import DataError, printable
from emprl import digest, say
from tests.lab.command import Parser, mean, new_file, sheet, start, write_json
from tests.lab.rate import CONTENT, paired, read

QUESTIONS = ("fluency", "fit", "empathy")
INSTRUCTIONS = f"""\
# {" ".join(CONTENT)}
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
ANSWER = re.compile(r"(\d+)\s+([A-Z])((?:\s+\d+)*)")


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


def turns(context):
    """Who speaks, and what they say; the last turn is the person's."""
    for place, text in enumerate(context, 1 - len(context)):
        yield f"> {'listener' if place % 2 else 'person'}: {text}"


def read_items(path, systems, number, seed):
    """{1: Item, ...}, drawn and shuffled by the seed. Raises DataError."""

    def record_of(record):
        replies = {"human": record["human"], **record["replies"]}
        return str(record.get("id", "")), list(map(one_line, record["context"])), replies

    records = list(read(path, record_of))
    generator = random.Random(seed)
    items = {}
    drawn = generator.sample(records, min(number, len(records)))
    for place, (name, context, replies) in enumerate(drawn, 1):
        of_text = defaultdict(list)
        for system in systems:
            if system not in replies:
                raise DataError(f"{path}: no {system!r}; it has {', '.join(replies)}")
            of_text[as_a_model(replies[system])].append(system)
        shuffled = list(of_text.items())
        generator.shuffle(shuffled)
        items[place] = Item(name, context, dict(zip(ascii_uppercase, shuffled)))
    return items


# ---- the sheet ------------------------------------------------------------------------------


def first_line(items):
    """It tells which sheet the answers are of."""
    shown = [[item.context, item.replies] for item in items.values()]
    return f"# sheet {digest(shown)[:12]}"


def sheet_text(items):
    """What a reader gets."""
    lines = [first_line(items), INSTRUCTIONS.format(count=len(items))]
    for number, item in items.items():
        lines += [f"# ---- {number} of {len(items)}", *turns(item.context)]
        lines += [f"{letter}: {text}" for letter, (text, _) in item.replies.items()]
        lines += [*(f"{number} {letter}" for letter in item.replies), ""]
    return "\n".join(lines)


def read_answers(path, items):
    """{(item, system): three numbers} of a filled sheet. Raises DataError with the line."""
    lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    if not lines or lines[0].strip() != first_line(items):
        raise DataError(
            f"{path}:1: not a sheet of these replies and options; its first line must be "
            f"{first_line(items)!r}"
        )
    answers = {}
    for place, line in enumerate(map(str.strip, lines), 1):
        if not line or line[0] in "#>" or line[1:2] == ":":  # the sheet's own
            continue
        try:
            number, letter, ratings = parse(line)
            if ratings:  # else it is left out
                _, systems = items[number].replies[letter]
                if (number, systems[0]) in answers:
                    raise ValueError("this reply is rated twice")
                for system in systems:
                    answers[number, system] = ratings
        except (KeyError, ValueError) as error:
            why = error if isinstance(error, ValueError) else "there is no such reply"
            raise DataError(f"{path}:{place}: {printable(line)[:40]!r}: {why}") from None
    if not answers:
        raise DataError(f"{path}: no answers; write lines such as '17 B 4 3 2'")
    return answers


def parse(line):
    """ "17 B 4 3 2" -> 17, "B", [4, 3, 2]; "17 B" -> 17, "B", []."""
    found = ANSWER.fullmatch(line)
    ratings = [int(x) for x in found[3].split()] if found else None
    if not found or len(ratings) not in (0, 3) or not set(ratings) <= set(range(1, 6)):
        raise ValueError("not as '17 B 4 3 2', with three numbers from 1 to 5")
    return int(found[1]), found[2], ratings


# ---- the table ------------------------------------------------------------------------------


def interval(numbers):
    """ "3.50 (3.11 to 3.89)": the mean, and 1.96 standard errors."""
    middle = mean(numbers)
    if len(numbers) < 2:
        return f"{middle:.2f}"
    error = 1.96 * statistics.stdev(numbers) / math.sqrt(len(numbers))
    return f"{middle:.2f} ({middle - error:.2f} to {middle + error:.2f})"


def means_of(readers):
    """{(item, system): the readers' mean for each question}."""
    collected = defaultdict(list)
    for answers in readers:
        for reply, ratings in answers.items():
            collected[reply].append(ratings)
    return {reply: list(map(mean, zip(*ratings))) for reply, ratings in collected.items()}


def table(readers, systems, base):
    """Markdown rows: a system's means, then its differences to `base`."""
    means = means_of(readers)
    of_system = defaultdict(dict)  # system -> {item: its means}
    for (item, system), rated in means.items():
        of_system[system][item] = rated
    rows = {system: row_of(of_system[system].values()) for system in systems}
    for system in systems:
        differences = []
        for item in of_system[system].keys() & of_system[base].keys():
            differences.append(list(map(sub, means[item, system], means[item, base])))
        if system != base:
            rows[f"{system} - {base}"] = row_of(differences)
    return rows


def row_of(rated):
    """rated: for each context three numbers."""
    columns = zip(QUESTIONS, zip(*rated))
    row = {question: interval(numbers) for question, numbers in columns}
    return row | {"contexts": str(len(rated))}


def weighted_kappa(first, second):
    """1 - mean (x_i - y_i)^2 / mean over all i, j of (x_i - y_j)^2; None if that is 0."""
    seen = mean((x - y) ** 2 for x, y in zip(first, second))
    chance = mean((x - y) ** 2 for x, y in itertools.product(first, second))
    return 1 - seen / chance if chance else None


def agreement(readers):
    """{question: mean kappa over the pairs of readers}, of the replies that both have rated."""
    replies = means_of(readers)
    found = {}
    for k, question in enumerate(QUESTIONS):
        kappas = [weighted_kappa(*pair) for pair in paired(replies, readers, k) if pair[0]]
        kappas = [kappa for kappa in kappas if kappa is not None]
        if kappas:
            found[question] = f"{mean(kappas):.2f}"
    return found


def without_texts(readers, items):
    """{reader: ["CONTEXT'S-ID SYSTEM 4 3 2", ...]}."""
    found = {}
    for name, answers in readers.items():
        found[name] = []
        for (item, system), ratings in sorted(answers.items()):
            found[name].append(" ".join(map(str, (items[item].id, system, *ratings))))
    return found


def make_parser():
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished run, or a .jsonl")
    parser.add_argument("filled", nargs="*", type=Path, help="filled sheets, one a reader")
    parser.add_argument("--sheet", type=new_file, metavar="FILE", help="write the sheet")
    parser.add_argument("--number", type=int, default=100, help="contexts")
    parser.add_argument("--seed", type=int, default=0, help="which contexts, which order")
    parser.add_argument("--systems", default="human,mle,best_of_n,emprl")
    parser.add_argument("--base", default="mle", help="the others are compared with it")
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

    readers = {file.stem: read_answers(file, items) for file in options.filled}
    if len(readers) < len(options.filled):
        parser.error("the filled sheets must have different names")
    rows = table(readers.values(), systems, options.base)
    rows["kappa"] = agreement(readers.values())
    say(
        f"{len(readers)} readers; means over contexts, 95 % intervals", sheet(rows), sep="\n\n"
    )
    about = {"seed": options.seed, "columns": f"context system {' '.join(QUESTIONS)}"}
    write_json(options.write, {**about, "readers": without_texts(readers, items)})


if __name__ == "__main__":
    sys.exit(start(main))
