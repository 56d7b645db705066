"""Publish a finished run: python tests/publish.py RUN NAME, and without arguments: write all tables anew

Copies RUN/metrics.json to tests/results/NAME.json (with the data folder's path as the README has it). Of a NAME real-seedN
also the levels of its responses, without texts, to tests/results/levels-NAME.json, and of real-seed0 the responses to 40
contexts to tests/results/real-page.md. topk-seedN is `real` with the original's sampling; topk-seed0 has such a page, too.
Then writes the tables of README.md anew, each below the paragraph that names it in parentheses; see `tables`.
"""

import itertools
import json
import random
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import bench
import crisis
import emprl
from data import DataError
from identifiers import LEVELS, MECHANISMS, emp_f1, f1_scores

ROOT = Path(emprl.__file__).parent
RESULTS = ROOT / "tests" / "results"
PAGES = (ROOT / "README.md", ROOT / "tests" / "coursework" / "open.md")
LEFT_OUT = ("_er", "_ip", "_ex")  # by mechanism: in tests/results, too long for a README
READERS = {"identifiers": "", "judge": "judge_"}
SYSTEMS = {"sft": "MLE", "best_of_n": "best of n", "emprl": "EmpRL"}
MEASURES = {"emp_f1": "weighted", "emp_macro_f1": "macro", "mutual_information": "bits"}
F1 = {"emp_f1": "weighted_f1", "emp_macro_f1": "macro_f1"}


# ---- pages


def shown(page, anchor):
    """(start, end) of the table below an anchor of a page."""
    start = page.index("|", page.index(f"({anchor})"))
    return start, (page + "\n").index("\n\n", start)


def put(anchor, table):
    """Write the table below the paragraph with (anchor), in the place of the one there; in every page that has it. Returns those."""
    pages = [
        path for path in PAGES if f"({anchor})" in path.read_text(encoding="utf-8") and table
    ]
    for path in pages:
        page = path.read_text(encoding="utf-8").rstrip("\n") + "\n\n"
        start = page.index("\n\n", page.index(f"({anchor})")) + 2
        end = page.index("\n\n", start) if page.startswith("|", start) else start - 2
        path.write_text(
            (page[:start] + table + page[end:]).rstrip("\n") + "\n", encoding="utf-8"
        )
    return pages


def tables():
    """{anchor: table} of all results."""
    import ablate  # which imports this module

    found = {
        f"tests/results/{preset}-seed{m['seed']}.json": table(m)
        for preset in ("toy", "real")
        for m in load(preset)
    }
    for (
        part,
        environments,
    ) in bench.results().items():  # of a part the environment where most was measured
        rows = max(environments.values(), key=lambda x: sum(map(len, x["rows"].values())))[
            "rows"
        ]
        found[f"bench: {part}"] = bench.sheet(rows)
    for path in sorted(RESULTS.glob("ablate-*.json")):
        name = path.stem.split("-")[1]
        found[f"tests/results/{path.name}"] = ablate.table(
            json.loads(path.read_text(encoding="utf-8")), name
        )
    if (RESULTS / "identifiers.json").exists():
        found["tests/results/identifiers.json"] = identifiers()
    if load("toy"):
        found["tests/publish.py"] = seeds()
    if load("toy") and load("real"):
        found["at a glance"] = glance()
    if load("real"):
        found |= {
            "real seeds: levels": real_levels(),
            "real seeds: text": real_text(),
            "real seeds: classes": real_classes(),
            "real seeds: dealt out": real_dealt_out(),
            "real seeds: sampling": real_sampling(),
        }
    return found


# ---- the tables


def table(metrics):
    """The rows of the report that the README shows."""
    rows = emprl.before_after(metrics).splitlines()
    return "\n".join(row for row in rows if not row.split(" | ")[0].endswith(LEFT_OUT))


def load(preset):
    return [
        emprl.from_json(path.read_text(encoding="utf-8"))
        for path in sorted(RESULTS.glob(f"{preset}-seed?.json"))
    ]


def share(old, new, best):
    """How much of the way from old to best new goes."""
    return (new - old) / (best - old)


def seeds():
    """One row for each committed toy run: the oracle's Emp-F1, the share of the gap to the ceiling, and what it cost; their means."""
    rows, shares = [], []
    for m in load("toy"):
        before, after, best = m["sft"], m["emprl"], m["ceiling"]["best"]["oracle_emp_f1"]
        old, new = before["oracle_emp_f1"], after["oracle_emp_f1"]
        shares.append(share(old, new, best))
        rows.append(
            [
                m["seed"],
                old,
                new,
                best,
                interval(m["gain"]["oracle_emp_f1"]),
                f"{shares[-1]:.0%}",
                *(after[k] / before[k] for k in ("perplexity", "dist2", "unique")),
                after["exact_match"],
                after["oracle_exact_match"],
            ]
        )
    mean = [
        sum(column) / len(rows)
        for column in zip(*([x for x in row[1:] if isinstance(x, float)] for row in rows))
    ]
    rows.append(["mean", *mean[:3], "", f"{sum(shares) / len(shares):.0%}", *mean[3:]])
    return emprl.table(
        [
            "seed",
            "MLE",
            "EmpRL",
            "ceiling",
            "gain, 95 % interval",
            "of the gap",
            "perplexity, times",
            "dist2, times",
            "unique, times",
            "all three levels right, identifiers",
            "oracle",
        ],
        rows,
    )


def identifiers():
    """EPITOME's test part: mean (standard deviation) over the seeds of tests/identify.py."""
    means = json.loads((RESULTS / "identifiers.json").read_text(encoding="utf-8"))[
        "mean_and_std"
    ]
    measures = [
        (m, k)
        for m in MECHANISMS
        for k in ("macro_f1", "weighted_f1", "accuracy", "f1_0", "f1_1", "f1_2")
    ]
    rows = [
        [
            f"{m.upper()} {k}",
            *("{:.3f} ({:.3f})".format(*scores[m][k]) for scores in means.values()),
        ]
        for m, k in measures
    ]
    return emprl.table(["", *means], rows)


def glance():
    """A row for what matters most: means over the seeds, by the reader that never gave the reward."""
    rows = []
    for what, preset, key, top in (
        ("`toy`, oracle, weighted", "toy", "oracle_emp_f1", "best"),
        ("`real`, judge, weighted", "real", "judge_emp_f1", "context_balanced"),
        ("`real`, judge, macro", "real", "judge_emp_macro_f1", "context_balanced"),
    ):
        found = [
            (
                m["floors"]["majority"][key],
                *(m[system][key] for system in SYSTEMS),
                m["ceiling"][top][key],
                m["emprl"]["perplexity"] / m["sft"]["perplexity"],
            )
            for m in load(preset)
        ]
        *scores, times = (sum(column) / len(found) for column in zip(*found))
        _, mle, _, empathic, ceiling = scores
        rows.append([what, len(found), *scores, f"{share(mle, empathic, ceiling):.0%}", times])
    return emprl.table(
        [
            "Emp-F1 by",
            "seeds",
            "majority",
            *SYSTEMS.values(),
            "ceiling",
            "of the gap",
            "perplexity, times MLE's",
        ],
        rows,
    )


def interval(gain):
    return "{relative:+.1%} ({low:+.1%} to {high:+.1%})".format(**gain)


def real_levels():
    """By each reader and measure, a row a seed and their mean: all that is compared, the share of the gap from MLE to the context
    ceiling that EmpRL closes, and its relative gain, in the mean's row with an interval over seeds and contexts."""
    runs, rows = load("real"), []
    for reader, prefix in reversed(READERS.items()):
        for key, measure in MEASURES.items():
            columns = [
                [
                    m.get(part, {}).get(name, {}).get(prefix + key)
                    if name
                    else m.get(part, {}).get(prefix + key)
                    for m in runs
                ]
                for part, name in (
                    *((s, "") for s in SYSTEMS),
                    ("floors", "majority"),
                    ("floors", "random_copy"),
                    ("ceiling", "context_balanced"),
                )
            ]
            columns = [c + [sum(c) / len(c) if None not in c else None] for c in columns]
            gain = bootstrap(reader, key) if key in F1 else None
            for who, row in zip([m["seed"] for m in runs] + ["mean"], zip(*columns)):
                old, new, best = row[0], row[2], row[-1]
                relative = (
                    interval(gain)
                    if gain and who == "mean"
                    else f"{new / old - 1:+.1%}"
                    if key in F1
                    else ""
                )
                closed = f"{share(old, new, best):.0%}" if best > old and key in F1 else ""
                rows.append(
                    [
                        f"{reader}, {measure}",
                        who,
                        *("" if x is None else x for x in row),
                        closed,
                        relative,
                    ]
                )
    return emprl.table(
        [
            "",
            "seed",
            *SYSTEMS.values(),
            "majority",
            "random copy",
            "context ceiling",
            "of the gap",
            "gain, 95 % interval",
        ],
        rows,
    )


def real_text():
    """What the gain costs: EmpRL's figures over MLE's, its length over the human responses'."""
    rows = [
        [
            m["seed"],
            m["sft"]["perplexity_per_word"],
            *(m["emprl"][k] / m["sft"][k] for k in ("perplexity", "dist2", "unique")),
            m["emprl"]["length"] / m["target"]["length"] if "target" in m else "",
            m["emprl"]["kl"],
        ]
        for m in load("real")
    ]
    mean = [sum(c) / len(c) if "" not in c else "" for c in zip(*(row[1:] for row in rows))]
    return emprl.table(
        [
            "seed",
            "MLE's perplexity per word",
            "perplexity, times MLE's",
            "dist2, times MLE's",
            "unique, times MLE's",
            "length, times the humans'",
            "KL",
        ],
        [*rows, ["mean", *mean]],
    )


def real_classes():
    """F1 of each level of each mechanism, by each reader, means over the seeds; "" without levels."""
    rows, found = [], levels("real")
    for i, m in enumerate(MECHANISMS):
        for level in range(LEVELS):
            row = [f"{m.upper()} {level}"]
            for reader in reversed(READERS):
                hits = [
                    [one[reader][name][:, i] == level for name in ("target", *SYSTEMS)]
                    for one in found
                ]
                row.append(sum(h[0].double().mean().item() for h in hits) / max(len(hits), 1))
                for k in range(1, 1 + len(SYSTEMS)):
                    row.append(
                        sum(
                            2
                            * (h[0] & h[k]).sum().item()
                            / max((h[0].sum() + h[k].sum()).item(), 1)
                            for h in hits
                        )
                        / max(len(hits), 1)
                    )
            rows.append(row)
    header = [
        f"{reader}: {what}"
        for reader in reversed(READERS)
        for what in ("share", *SYSTEMS.values())
    ]
    return emprl.table(["", *header], rows) if found else ""


def real_sampling():
    """`real` as it is and with the original's sampling: by the judge, and what it costs, means over the seeds."""
    rows = []
    for what, runs in (
        ("temperature 1", load("real")),
        ("top-k 20, temperature 0.9", load("topk")),
    ):
        if not runs:
            continue
        mean = lambda value: sum(map(value, runs)) / len(runs)
        rows.append(
            [
                what,
                len(runs),
                *(
                    mean(lambda m: m[system]["judge_" + key])
                    for key in MEASURES
                    for system in SYSTEMS
                ),
                *(
                    mean(lambda m: m["emprl"][k] / m["sft"][k])
                    for k in ("perplexity", "dist2")
                ),
                mean(lambda m: m["emprl"]["unique"]),
                mean(lambda m: m["emprl"]["length"] / m["target"]["length"]),
            ]
        )
    header = [
        f"{system}, {measure}" for measure in MEASURES.values() for system in SYSTEMS.values()
    ]
    return emprl.table(
        [
            "",
            "seeds",
            *header,
            "perplexity, times MLE's",
            "dist2, times MLE's",
            "unique",
            "length, times the humans'",
        ],
        rows,
    )


def dealt_out(given, gold, kind):
    """Emp-F1 of levels (N, M) that are dealt out to the contexts at random: by the expected confusion, in which a level that gold has
    A times and the replies B times meet in A B / N contexts."""
    gold, given = (
        torch.nn.functional.one_hot(x, LEVELS).double() for x in (gold, given)
    )  # (N, M, L)
    return (
        f1_scores(torch.einsum("mg,ml->mgl", gold.sum(0), given.mean(0)))[kind].mean().item()
    )


def real_dealt_out():
    """How much of Emp-F1 comes from how often each level is given, and how much from where: means over the seeds; "" without levels."""
    rows, found = [], levels("real")
    for reader, (key, kind) in (
        itertools.product(reversed(READERS), F1.items()) if found else ()
    ):
        row = [f"{reader}, {MEASURES[key]}"]
        for name in SYSTEMS:
            plain, dealt = (
                sum(f(one[reader][name], one[reader]["target"], kind) for one in found)
                / len(found)
                for f in (emp_f1, dealt_out)
            )
            row += [plain, dealt, plain - dealt]
        rows.append(row)
    header = [
        f"{system}{what}"
        for system in SYSTEMS.values()
        for what in ("", ", dealt out", ", difference")
    ]
    return emprl.table(["", *header], rows) if found else ""


# ---- levels and intervals


def levels(preset):
    """[{reader: {"target" or system: (N, M) levels}} of each committed run of a preset], [] if one lacks them."""
    files = [
        RESULTS / f"levels-{path.name}"
        for path in sorted(RESULTS.glob(f"{preset}-seed?.json"))
    ]
    texts = (
        [json.loads(path.read_text(encoding="utf-8")) for path in files]
        if all(path.exists() for path in files)
        else []
    )
    return [
        {
            reader: {
                name: torch.tensor([*map(int, digits)]).view(-1, len(MECHANISMS))
                for name, digits in systems.items()
            }
            for reader, systems in text.items()
        }
        for text in texts
    ]


def scores(predicted, gold, draws, key):
    """Emp-F1 of resamples: (N, M) levels, (R, N) indices -> (R,)."""
    cell = (gold * LEVELS + predicted)[draws] + LEVELS**2 * torch.arange(
        len(MECHANISMS)
    )  # (R, N, M)
    counts = torch.zeros(len(draws), len(MECHANISMS) * LEVELS**2)
    counts.scatter_add_(1, cell.flatten(1), torch.ones(cell.flatten(1).shape))
    return f1_scores(counts.view(-1, len(MECHANISMS), LEVELS, LEVELS))[F1[key]].mean(-1)


def bootstrap(reader, key, preset="real"):
    """The gain of a preset's committed runs, see gain_over_seeds; None without levels. The runs of `real` share their test
    contexts, each of `toy` has a world of its own."""
    names = ("target", "sft", "emprl")
    runs = [tuple(run[reader][name] for name in names) for run in levels(preset)]
    return gain_over_seeds(runs, key, shared=preset != "toy") if runs else None


def gain_over_seeds(runs, key, shared, resamples=2000, seed=0):
    """Relative gain of the mean over seeds, with a 95 % percentile interval of a bootstrap over seeds and contexts.
    runs: (gold, before, after) levels, (N, M) each, of every seed. A resample draws as many seeds with replacement, and contexts, the
    same for before and after: with `shared` once for all seeds, whose N contexts are the same ones, so that an easy context
    is easy for all; without it anew for each. Returns {"relative", "low", "high"}."""
    generator = torch.Generator().manual_seed(seed)
    numbers = range(len(runs))
    chosen = torch.randint(len(runs), (resamples, len(runs)), generator=generator)
    chosen = torch.cat([torch.tensor([[*numbers]]), chosen])  # first: as they are

    def draw(n):
        anew = torch.randint(n, (resamples, n), generator=generator)
        return torch.cat([torch.arange(n)[None], anew])

    together = draw(len(runs[0][0])) if shared else None
    totals = torch.zeros(2, resamples + 1, dtype=torch.double)
    for slot in numbers:
        for k, (gold, *systems) in enumerate(runs):
            draws = together if shared else draw(len(gold))
            rows = (chosen[:, slot] == k).nonzero()[:, 0]
            for total, predicted in zip(totals, systems):
                total[rows] += scores(predicted, gold, draws[rows], key)
    old, new = totals
    gain = (new - old) / old.clamp(min=1e-9)
    low, high = torch.quantile(
        gain[1:], torch.tensor([0.025, 0.975], dtype=gain.dtype)
    ).tolist()
    return {"relative": gain[0].item(), "low": low, "high": high}


# ---- a run's responses


def responses(run):
    records = [
        json.loads(line)
        for line in (Path(run) / "responses.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    if not records or not {*READERS} <= {*records[0]["levels"]}:
        raise DataError(
            f"{run}/responses.jsonl: of an older version; delete {run}/metrics.json and run the same command again"
        )
    return records


def compact(records):
    """{reader: {"target" or system: one digit a level}}: what the intervals need, and no text."""
    names = [name for name in ("target", *SYSTEMS) if name in records[0]["levels"]["judge"]]
    return {
        reader: {
            name: "".join(str(x) for r in records for x in r["levels"][reader][name])
            for name in names
        }
        for reader in records[0]["levels"]
    }


def page(records, name, number=40, seed=0):
    """The page of some test contexts: ids, generated responses and all levels. The corpus's own text stays out (licence)."""
    rows = sorted(random.Random(seed).sample(range(len(records)), min(number, len(records))))
    lines = [
        f"# {len(rows)} test contexts of {name}",
        crisis.NOTE,
        f"Drawn by `random.Random({seed}).sample` from {len(records)}; nothing is selected. "
        "Levels are [ER, IP, EX], by the reward's identifiers and by the judge. The contexts and the human responses are EmpatheticDialogues' "
        "own (CC BY-NC 4.0): the run folder's responses.jsonl has them; here stand their ids (conversation / utterance).",
    ]
    for r in (records[i] for i in rows):
        cells = [
            ["human", "(not shown)", "target"],
            *(
                [label, escaped(r["responses"][s]), s]
                for s, label in SYSTEMS.items()
                if s in r["responses"]
            ),
        ]
        lines.append(
            f"`{r['id']}`\n\n"
            + emprl.table(
                ["", "response", *READERS],
                [
                    [label, text, *(str(r["levels"][reader][key]) for reader in READERS)]
                    for label, text, key in cells
                ],
            )
        )
    return "\n\n".join(lines) + "\n"


def escaped(text):
    return "".join("\\" + c if c in "\\|*_`<>[]" else c for c in text)


def main(run="", name=""):
    if run:
        metrics, records = (
            emprl.from_json((Path(run) / "metrics.json").read_text(encoding="utf-8")),
            responses(run),
        )
        if metrics["config"]["data_dir"]:
            metrics["config"]["data_dir"] = "../shared/data"
        (RESULTS / f"{name}.json").write_text(
            emprl.to_json(metrics, indent=2) + "\n", encoding="utf-8"
        )
        if name.startswith("real"):
            (RESULTS / f"levels-{name}.json").write_text(
                json.dumps(compact(records), indent=0) + "\n", encoding="utf-8"
            )
        if name in ("real-seed0", "topk-seed0"):
            (RESULTS / f"{name.removesuffix('-seed0')}-page.md").write_text(
                page(records, name), encoding="utf-8"
            )
    for anchor, new in tables().items():
        put(anchor, new)


if __name__ == "__main__":
    if len(sys.argv) not in (1, 3):
        sys.exit("usage: python tests/publish.py [RUN NAME]")
    main(*sys.argv[1:])
