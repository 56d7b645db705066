"""Blind A/B rating: python emprl.py rate RUN [YOUR NAME]. In the table at the end, an item
counts as most of its raters prefer, as they are not independent; p: sign test of that; equal: share of equal answers of
two raters to an item; kappa: Cohen's (1960), the mean over pairs of raters (Light 1971), over the items that both rated."""

import contextlib, getpass, hashlib, itertools, json, math, pathlib, random, re, sys, urllib.parse

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import crisis
import data

ASKED = {
    "empathy": "shows more empathy",
    "relevance": "is more relevant to what was said",
    "fluency": "is more fluent",
}


def sign_test(wins, losses):
    """Two-sided exact p of a split this uneven by a fair coin: 2 sum_{k <= min(wins, losses)} C(n, k) / 2^n, or 1."""
    return min(
        1,
        2
        * sum(math.comb(wins + losses, k) for k in range(min(wins, losses) + 1))
        / 2 ** (wins + losses),
    )


def kappa(a, b):
    """(p_o - p_e) / (1 - p_e) of two raters' answers to the same n items, times n^2 / n^2; None if p_e = 1 or n = 0."""
    n, equal, chance = (
        len(a),
        sum(x == y for x, y in zip(a, b)),
        sum(a.count(x) * b.count(x) for x in {*a}),
    )
    return (n * equal - chance) / (n * n - chance) if chance < n * n else None


def read(
    path, entry=lambda r: (str(r["item"]), {q: (-1, 0, 1).index(r[q]) - 1 for q in ASKED})
):  # 1: EmpRL, -1: MLE
    for number, line in enumerate(data._read_bytes(path).splitlines(), 1):
        try:
            yield from [entry(json.loads(line))] if line.strip() else []
        except (KeyError, TypeError, ValueError):
            raise data.DataError(
                f"{path}:{number}: damaged; repair or remove this line"
            ) from None


def ask(
    words,
):  # 1 for A, -1 for B, 0 for a tie; an empty line ends iter, whereupon next raises StopIteration
    answers = iter(
        lambda: input(f"Which {words} (a, b, t: tie, empty line: stop)? ").strip().lower(), ""
    )
    return next({"a": 1, "b": -1, "t": 0}[x] for x in answers if x in ("a", "b", "t"))


def file_name(rater):
    """A name that a file can have; two raters never share one."""
    return re.sub(r"[^\w-]", lambda found: urllib.parse.quote(found[0], safe=""), rater)


def main(folder, rater="", number=30, seed=0):
    for stream in (sys.stdin, sys.stdout):  # texts and answers may hold anything
        getattr(stream, "reconfigure", lambda **_: None)(errors="replace")
    try:
        rater = rater or getpass.getuser()
    except (ImportError, KeyError, OSError):  # which of them depends on Python and the system
        raise data.DataError(
            f"rate: this system does not tell who you are; give a name: {data.command_line(['python', 'emprl.py', 'rate', str(folder), 'NAME'])}"
        ) from None
    print(crisis.NOTE)
    path = pathlib.Path(folder) / ("ratings-" + file_name(rater) + ".jsonl")
    texts = dict(
        read(
            path.with_name("responses.jsonl"),
            lambda r: (
                hashlib.sha256(json.dumps([seed, r]).encode()).hexdigest(),
                {
                    0: "\n".join(r["context"]),
                    1: r["responses"]["emprl"],
                    -1: r["responses"]["sft"],
                },
            ),
        )
    )
    items = [i for i in sorted(texts) if texts[i][1] != texts[i][-1]][
        :number
    ]  # in the order of their hash: drawn
    with (
        contextlib.suppress(StopIteration, EOFError, KeyboardInterrupt),
        path.open("a", buffering=1, encoding="utf-8") as file,
    ):
        for item in sorted({*items} - {*dict(read(path))}):
            text, a = (
                texts[item],
                random.Random(item + path.name).choice((1, -1)),
            )  # A is 1: EmpRL's, -1: MLE's
            print(
                f"\n{items.index(item) + 1} of {len(items)}\n{text[0]}\nA: {text[a]}\nB: {text[-a]}"
            )
            print(
                json.dumps(
                    {"item": item, **{q: a * ask(words) for q, words in ASKED.items()}}
                ),
                file=file,
            )
    raters = [
        r
        for p in sorted(path.parent.glob("ratings-*.jsonl"))
        if {*items} & {*(r := dict(read(p)))}
    ]
    print(
        f"\nseed {seed}, answers in {path}\nraters: {len(raters):<5} EmpRL    MLE    tie       p   equal   kappa"
    )
    for q in ASKED:
        lead = [
            sum(r[i][q] for r in raters if i in r)
            for i in items
            if any(i in r for r in raters)
        ]
        wins, losses = sum(x > 0 for x in lead), sum(x < 0 for x in lead)
        pairs = [
            [[x[i][q] for i in items if i in r and i in s] for x in (r, s)]
            for r, s in itertools.combinations(raters, 2)
        ]
        means = (
            [x == y for ab in pairs for x, y in zip(*ab)],
            [k for ab in pairs if (k := kappa(*ab)) is not None],
        )
        print(
            f"{q:<12}{wins:7}{losses:7}{lead.count(0):7}{sign_test(wins, losses):8.3f}",
            *(f"{sum(x) / len(x):7.2f}" if x else "      -" for x in means),
        )


if __name__ == "__main__":
    sys.tracebacklimit = 0  # an error is one line
    main(*sys.argv[1:3])
