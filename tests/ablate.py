"""Ablations and sweeps: python tests/ablate.py NAME RUN0 RUN1 RUN2

Each variant of NAME repeats PPO and the evaluation from the MLE policy and the identifiers of finished runs of different
seeds, shortened (see SHORT) so that a laptop does a variant in about a minute. What has been measured is in
tests/results/ablate-NAME.json and is not measured again; the table of means over the runs is printed and put into
coursework/open.md. `own` takes no runs: it trains on a file of dialogues as if they were yours.
"""
import contextlib
import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import emprl
import ppo
import publish

ROOT = Path(emprl.__file__).parent
SHORT = ["ppo.steps=12", "ppo.warmup=2", "ppo.batch_size=256", "ppo.eval_every=12", "eval.contexts=200", "eval.valid_contexts=32"]
GROUP = 4


def reinforce(rewards, values, mask, gamma, lam):
    """In gae's place: every token has the response's whole reward, less the batch's mean. No value head."""
    total = rewards.sum(1, keepdim=True)
    return (total - total.mean()) * mask, torch.zeros_like(rewards)


def grpo(rewards, values, mask, gamma, lam):
    """In gae's place: every token has the response's whole reward, compared with those of the same context (GROUP of them)."""
    total = rewards.sum(1).view(-1, GROUP)
    advantages = (total - total.mean(1, keepdim=True)) / (total.std(1, keepdim=True) + 1e-6)
    return advantages.view(-1, 1) * mask, torch.zeros_like(rewards)


def grouped(lengths, size, seed):
    """In batches' place: each context GROUP times."""
    rows_at = BATCHES(lengths, size // GROUP, seed)
    return lambda step: [row for row in rows_at(step) for _ in range(GROUP)]


BATCHES, GAE = emprl.batches, ppo.gae
ABLATIONS = {   # name: {variant: settings, and the function that takes gae's place}; the first is the default, [], measured once for all
    "mechanisms": {"all three": [], "without ER": ["reward.mechanisms=ip,ex"], "without IP": ["reward.mechanisms=er,ex"],
                   "without EX": ["reward.mechanisms=er,ip"]},
    "kl": {"beta 0.3": [], "beta 0": ["ppo.kl_coef=0"], "beta 0.1": ["ppo.kl_coef=0.1"], "beta 1": ["ppo.kl_coef=1"]},
    "algorithm": {"PPO": [], "REINFORCE": ["ppo.value_coef=0", reinforce], "GRPO": ["ppo.value_coef=0", grpo]},
    "reward": {"expected, cross-entropy": [], "one human's levels": ["reward.expected=off"], "ordinal": ["reward.difference=ordinal"]},
}


def measure(run, name, variant):
    """The figures of one variant of an ablation from one finished run."""
    config = json.loads((Path(run) / "config.json").read_text())
    settings = [x for x in variant if isinstance(x, str)]
    replaced = next((x for x in variant if callable(x)), GAE)
    folder = Path(run) / f"ablate-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "checkpoints").mkdir(parents=True)
    for path in (Path(run) / "checkpoints").glob("*.pt"):
        if path.stem != "ppo":
            shutil.copy(path, folder / "checkpoints")
    ppo.gae, plots, emprl.draw_plots = replaced, emprl.draw_plots, lambda *_: None
    try:
        emprl.batches = (lambda lengths, *a: (grouped if not any(lengths) else BATCHES)(lengths, *a)) if replaced is grpo else BATCHES
        with contextlib.redirect_stdout(None):
            m = emprl.run_all(emprl.Run(folder, emprl.make_config(config["preset"], config["seed"], config["data_dir"], config["t5_dir"], SHORT + settings)))
    finally:
        ppo.gae, emprl.draw_plots, emprl.batches = GAE, plots, BATCHES
    return figures_of(m)


def own(seed, runs):
    """1,500 dialogues of the embedded world as a .jsonl, as if they were a reader's own: no oracle, few labels."""
    folder = runs / f"own-seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    dialogues = data.embedded_corpus(1000 + seed, 1500, 1, 1, 1).dialogues["train"]
    (folder / "mine.jsonl").write_text("".join(json.dumps({"context": d.context, "response": d.response, **dict(zip(emprl.MECHANISMS, d.levels))}) + "\n"
                                               for d in dialogues))
    with contextlib.redirect_stdout(None):
        return figures_of(emprl.run_all(emprl.Run(folder / "run", emprl.make_config("toy", seed, folder / "mine.jsonl", settings=SHORT))))


def figures_of(m):
    """What the tables show of a metrics.json: Emp-F1 by the oracle where there is one, else by the judge."""
    truth = "oracle_" if "oracle_emp_f1" in m["emprl"] else "judge_"
    before, after = m["sft"], m["emprl"]
    return {"gain": after[truth + "emp_f1"] - before[truth + "emp_f1"], **{k: after[f"{truth}emp_f1_{k}"] - before[f"{truth}emp_f1_{k}"] for k in emprl.MECHANISMS},
            "learnt reward": after["reward"], "true reward": after["held_out_reward"], "KL": after["kl"],
            **{f"{k}, times": after[k] / before[k] for k in ("perplexity", "dist2", "unique")}}


def table(figures):
    """Means over the runs, the gain with its lowest and highest."""
    rows = []
    for variant, by_seed in figures.items():
        runs = list(by_seed.values())
        gains = [r["gain"] for r in runs]
        rows.append([variant, f"{sum(gains) / len(runs):+.3f} ({min(gains):+.3f} to {max(gains):+.3f})",
                     *(sum(r[k] for r in runs) / len(runs) for k in runs[0] if k != "gain")])
    return emprl.table(["variant", "gain in Emp-F1, lowest and highest", *(k for k in runs[0] if k != "gain")], rows)


def published(name):
    """The table of what has been measured."""
    return table(json.loads((ROOT / "tests" / "results" / f"ablate-{name}.json").read_text()))


def known(variant, name, seed):
    """The default's figures, if another ablation has them."""
    if name in ABLATIONS and ABLATIONS[name][variant] == []:
        for other, variants in ABLATIONS.items():
            path = ROOT / "tests" / "results" / f"ablate-{other}.json"
            found = json.loads(path.read_text()).get(next(iter(variants)), {}).get(seed) if path.exists() else None
            if found:
                return found


def main(name, runs):
    path = ROOT / "tests" / "results" / f"ablate-{name}.json"
    figures = json.loads(path.read_text()) if path.exists() else {}
    if name == "own":
        todo = {"your own data": {str(seed): lambda seed=seed: own(seed, ROOT / "runs") for seed in range(3)}}
    else:
        seeds = {run: str(json.loads((Path(run) / "config.json").read_text())["seed"]) for run in runs}
        todo = {variant: {seeds[run]: lambda run=run, what=what: measure(run, name, what) for run in runs} for variant, what in ABLATIONS[name].items()}
    for variant, by_seed in todo.items():
        for seed, compute in by_seed.items():
            if seed not in figures.setdefault(variant, {}):
                figures[variant][seed] = known(variant, name, seed) or compute()
                path.with_suffix(".tmp").write_text(json.dumps(figures, indent=1) + "\n")
                path.with_suffix(".tmp").replace(path)
                print(f"{variant}, seed {seed}: gain {figures[variant][seed]['gain']:+.3f}", flush=True)
    page = ROOT / "tests" / "coursework" / "open.md"
    start, end = publish.shown(page.read_text(), f"tests/results/{path.name}")
    page.write_text(page.read_text()[:start] + table(figures) + page.read_text()[end:])
    print(f"{table(figures)}\nwritten to {path} and {page}")


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in [*ABLATIONS, "own"] or not all((Path(run) / "metrics.json").exists() for run in sys.argv[2:]):
        sys.exit(f"usage: python tests/ablate.py {'|'.join(ABLATIONS)}|own RUN0 [RUN1 ..] (finished runs; none for own)")
    main(sys.argv[1], sys.argv[2:])
