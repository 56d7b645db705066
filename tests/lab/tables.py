"""What came out over several seeds? The tables of tests/results/README.md.

    python -m tests.lab.tables RUN [RUN ...]           finished runs of one preset
    python -m tests.lab.tables RUN [RUN ...] --plot PREFIX --write FILE

1. Levels, by each classifier: MLE, best of n, EmpRL, floors, ceiling, how much of the way from
   MLE to the ceiling EmpRL goes, and its gain. The interval of the mean gain is a 95 % percentile
   bootstrap over seeds and contexts; contexts that the runs share are drawn jointly.
2. The price: perplexity, variety, length, KL.
3. How often each level occurs in human responses and in replies.
4. F1 of each level.
5. How much of Emp-F1 comes from how often a level is given, and how much from where:
   "shuffled" gives the levels to the contexts at random.

--plot draws the third table (PREFIX-levels.png), and for each run Emp-F1 against perplexity and
what PPO learns against the KL (PREFIX-gain.png); with --ideal also what any RL tends to.

Cost: seconds.
"""

import itertools
import json
import sys
from operator import itemgetter
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from data import LEVELS, MECHANISMS, DataError
from emprl import COLOURS, MECHANISM_NAMES, PREFIX, SYSTEMS, digest_bytes, say
from identifiers import emp_f1, f1_scores, weighted_emp_f1
from tests.lab.command import (
    Parser,
    means,
    new_file,
    read_metrics,
    read_replies,
    read_runs,
    sheet,
    start,
    write_json,
)

MEASURES = {"weighted": "emp_f1", "macro": "emp_macro_f1", "bits": "mutual_information"}
WITH_HUMAN = {"human": "human", **SYSTEMS}
KINDS = ("weighted_f1", "macro_f1")


def read_levels(folder):
    """responses.jsonl -> {classifier: {"human" or system: (N, M) levels}}, and the contexts."""
    path = folder / "responses.jsonl"
    if digest_bytes(path.read_bytes()) != read_metrics(folder)["made_of"].get("responses"):
        raise DataError(
            f"{path}: not the replies that metrics.json was measured on; give the run's own "
            "command again"
        )
    records = read_replies(path)
    levels = {}
    for who, systems in records[0]["levels"].items():
        levels[who] = {}
        for system in systems:
            told = [record["levels"][who][system] for record in records]
            levels[who][system] = torch.tensor(told)
    return levels, [record["context"] for record in records]


# ---- the joint bootstrap --------------------------------------------------------------------


def interval_over_seeds(runs, kind, shared, resamples=2000):
    """The two ends of the interval of the mean's relative gain.

    runs: (human, before, after) levels of each seed, (N, M) each. A resample draws seeds and
    contexts with replacement: with `shared` the same contexts for all seeds, so that an easy
    context is easy for all; without it others for each.
    """
    generator = torch.Generator().manual_seed(0)
    count = len(runs[0][0])
    seeds = torch.randint(len(runs), (resamples, len(runs)), generator=generator)
    old, new = torch.zeros(2, resamples)  # Emp-F1, summed over the seeds that were drawn
    times = None
    for drawn_seed, (k, run) in itertools.product(seeds.T, enumerate(runs)):
        human, before, after = run
        if times is None or not shared:
            drawn = torch.randint(count, (resamples, count), generator=generator)
            times = torch.zeros(resamples, count)
            times.scatter_add_(1, drawn, torch.ones(resamples, count))
        is_drawn = drawn_seed == k
        old += is_drawn * weighted_emp_f1(before, human, times, kind)
        new += is_drawn * weighted_emp_f1(after, human, times, kind)
    gains = (new - old) / old.clamp(min=1e-9)
    return gains.quantile(torch.tensor([0.025, 0.975])).tolist()


# ---- the tables -----------------------------------------------------------------------------


def level_rows(runs, levels, shared):
    """A row for each seed, and their mean, for each classifier and measure."""
    rows = {}
    for who in reversed(levels[0]):
        for measure, key in MEASURES.items():
            table = {}
            for metrics in runs.values():
                name = f"{who}, {measure}, seed {metrics['config']['seed']}"
                table[name] = level_row(metrics, PREFIX[who] + key)
            total = means(list(table.values()))
            table[f"{who}, {measure}, mean"] = total
            for row in table.values():
                to_go = row["ceiling"] - row["MLE"]
                way = f"{(row['EmpRL'] - row['MLE']) / to_go:.0%}" if to_go > 0 else ""
                row["share of the way"] = way
            if f"{measure}_f1" in KINDS:
                chosen = itemgetter("human", "mle", "emprl")
                told = [chosen(one[who]) for one in levels]
                low, high = interval_over_seeds(told, f"{measure}_f1", shared)
                gain = total["EmpRL"] / max(total["MLE"], 1e-9) - 1
                total["gain, 95 % interval"] = f"{gain:+.1%} ({low:+.1%} to {high:+.1%})"
            rows |= table
    return rows


def level_row(metrics, key):
    row = {name: metrics[system][key] for system, name in SYSTEMS.items()}
    row["always commonest"] = metrics["floors"]["majority"][key]
    row["random response"] = metrics["floors"]["random_copy"][key]
    ceilings = metrics["ceiling"]
    by_rule = ceilings.get("best", {})  # of the generated world
    row["ceiling"] = by_rule.get(key, ceilings["context_balanced"][key])
    return row


def price_rows(runs):
    """EmpRL's figures over MLE's; length over the humans'; all three levels right."""
    rows = {}
    for metrics in runs.values():
        mle, emprl = metrics["mle"], metrics["emprl"]
        truth = "oracle" if "oracle_emp_f1" in mle else "judge"
        row = {"MLE's perplexity a word": float(mle["perplexity_per_word"])}
        for key in ("perplexity", "dist2", "unique"):
            row[f"{key}, times"] = float(emprl[key]) / float(mle[key])
        row["length, times the humans'"] = emprl["length"] / metrics["human"]["length"]
        row["KL"] = emprl["kl"]
        for who in ("identifiers", truth):
            row[f"all three right, {who}"] = emprl[PREFIX[who] + "exact_match"]
        rows[f"seed {metrics['config']['seed']}"] = row
    return rows | {"mean": means(list(rows.values()))}


def by_level(levels, systems, figure):
    """figure(given, human) of each level, (N,) bool each; means over the seeds."""
    rows = {}
    for m, k in itertools.product(range(len(MECHANISMS)), range(LEVELS)):
        row = {}
        for who in reversed(levels[0]):
            human = [one[who]["human"][:, m] == k for one in levels]
            for system, name in systems.items():
                given = [one[who][system][:, m] == k for one in levels]
                row[f"{who}: {name}"] = fmean(map(figure, given, human))
        rows[f"{MECHANISMS[m].upper()} {k}"] = row
    return rows


def share_of(given, human):
    return given.double().mean().item()


def f1_of(given, human):
    return 2 * (given & human).sum().item() / max((given.sum() + human.sum()).item(), 1)


def placement_rows(levels):
    """Emp-F1, the same with the levels shuffled over the contexts, and the difference."""
    rows = {}
    for who, kind in itertools.product(reversed(levels[0]), KINDS):
        row = {}
        for system, name in SYSTEMS.items():
            told = [(one[who][system], one[who]["human"]) for one in levels]
            row[name] = fmean(emp_f1(*pair, kind) for pair in told)
            row[f"{name}, shuffled"] = fmean(shuffled_emp_f1(*pair, kind) for pair in told)
            row[f"{name}, placement"] = row[name] - row[f"{name}, shuffled"]
        rows[f"{who}, {kind.removesuffix('_f1')}"] = row
    return rows


def shuffled_emp_f1(levels, human, kind):
    """Emp-F1 of levels (N, M) given to the contexts at random: by the expected confusion."""
    given = F.one_hot(levels, LEVELS).double().mean(0)  # (M, L)
    wanted = F.one_hot(human, LEVELS).double().sum(0)
    counts = wanted[:, :, None] * given[:, None, :]  # (M, L, L), rows gold
    return f1_scores(counts)[kind].mean().item()


# ---- pictures -------------------------------------------------------------------------------


def draw_levels(shares, path):
    """Weak and strong levels of each mechanism, as the judge sees them: human and systems."""
    figure = Figure((7.8, 3.4), layout="constrained")
    axes = figure.subplots(1, len(MECHANISMS), sharey=True)
    for axis, mechanism in zip(axes, MECHANISMS):
        _, weak, strong = (shares[f"{mechanism.upper()} {k}"] for k in range(LEVELS))
        for system, name in WITH_HUMAN.items():
            told, colour = f"judge: {name}", COLOURS[system]
            axis.bar(name, strong[told], color=colour)
            axis.bar(name, weak[told], bottom=strong[told], color=colour, alpha=0.45)
        axis.set_title(MECHANISM_NAMES[mechanism], fontsize=10)
        axis.tick_params("x", rotation=30)
    axes[0].set_ylabel("share of replies: strong, weak (pale)")
    figure.savefig(path)


def draw_gain(runs, ideal, mean, path):
    """What is gained, by the judge, against the price, a point for each run and system.

    ideal: what `ablate ideal` wrote of these runs, {} to leave it out. On the right draw_ppo.
    """
    figure = Figure((7.8, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    measured = runs.values()
    for system, name in SYSTEMS.items():
        found = [run[system]["judge_emp_f1"] for run in measured]
        times = [
            float(run[system]["perplexity"]) / run["mle"]["perplexity"] for run in measured
        ]
        left.plot(times, found, "o", color=COLOURS[system], label=name)
    for seeds in ideal.values():
        place = itemgetter("perplexity, times", "weighted, judge")
        left.plot(*zip(*map(place, seeds.values())), "kx")
    for name, style in (("always commonest", ":"), ("ceiling", "--")):
        left.axhline(mean[name], color="black", ls=style, label=name)
    left.set(
        xlabel="perplexity, times MLE's (x: the ideal policy)",
        ylabel="weighted Emp-F1, by the judge",
    )
    left.legend(fontsize=8)

    draw_ppo(runs, right)
    figure.savefig(path)


def draw_ppo(folders, axis):
    """How PPO gets there: each run's reward of every rollout, and what is validated."""
    for folder in folders:
        lines = (folder / "metrics.jsonl").read_bytes().splitlines()
        log = [record for record in map(json.loads, lines) if record["stage"] == "ppo"]
        valid = [log[0]["start"], *(record for record in log if "valid_kl" in record)]
        axis.plot(*zip(*map(itemgetter("kl", "reward"), log)), "C0.")
        # the judge's; nothing where the oracle was asked
        points = [(one["valid_kl"], one.get("valid_judge_exact_match")) for one in valid]
        axis.plot(*zip(*points), "o-", color="0.4")
    axis.set(xlabel="KL to MLE, nats a response", ylabel="reward; grey: right by the judge")


def main():
    parser = Parser(__doc__)
    parser.add_argument("--plot", type=new_file, metavar="PREFIX", help="also draw pictures")
    parser.add_argument("--ideal", type=Path, help="what `ablate ideal` wrote: x in a picture")
    parser.add_argument("run", nargs="+", help="folder of a finished run")
    parser.can_write()
    options = parser.parse_args()
    runs = read_runs(options.run)
    levels, contexts = zip(*map(read_levels, runs))
    shared = all(other == contexts[0] for other in contexts)
    tables = {
        "Emp-F1": level_rows(runs, levels, shared),
        "price": price_rows(runs),
        "shares": by_level(levels, WITH_HUMAN, share_of),
        "F1 of each level": by_level(levels, SYSTEMS, f1_of),
        "placement": placement_rows(levels),
    }
    for rows in tables.values():
        say(f"{sheet(rows)}\n")
    if options.plot:
        draw_levels(tables["shares"], f"{options.plot}-levels.png")
        mean = tables["Emp-F1"]["judge, weighted, mean"]
        ideal = json.loads(options.ideal.read_bytes()) if options.ideal else {}
        draw_gain(runs, ideal, mean, f"{options.plot}-gain.png")
    write_json(options.write, tables)


if __name__ == "__main__":
    sys.exit(start(main))
