"""Ablations and sweeps: python emprl.py ablate NAME RUN [RUN ...]

Each variant of NAME repeats PPO and the evaluation from the MLE policy and the identifiers of finished runs of one preset and
different seeds, shortened (see SHORT) so that a laptop does a variant in about a minute. `frontier` repeats no PPO: it measures
policies between MLE's weights and EmpRL's, and beyond; nor does `ideal`: it measures what any RL with a KL penalty tends to.
`pretraining`, `data` and `own` take no RUN: they train seeds 0 to 2 of a small toy from the start, in runs/ablate-*. What has been
measured is kept in RUN/ablations/NAME.json, with a key: the run it is made of and the code. Under the same key it is not measured
again, but with --again. The table of means is printed; --write FILE also writes all figures there (and a picture beside it), as
tests/results/ablate-NAME.json (ablate-NAME-PRESET.json unless toy), from which tests/publish.py puts the table into README.md.
"""

import contextlib, copy, json, math, shutil, sys, time
from collections import namedtuple
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data, emprl, identifiers, ppo, publish

SHORT = [
    "ppo.steps=12",
    "ppo.warmup=2",
    "ppo.batch_size=256",
    "ppo.eval_every=12",
    "eval.contexts=200",
    "eval.valid_contexts=32",
]
SEEDS = (0, 1, 2)  # of what is trained from the start
GROUP = 4  # responses a context, of GRPO
TRIES, SAMPLES = 32, {}  # samples a context, of `ideal`, and what they are, by seed
BATCHES, POLICY_LOSS, VALUE_LOSS, WHITEN = (
    emprl.batches,
    ppo.policy_loss,
    ppo.value_loss,
    ppo.whiten,
)
ROLLOUT, SCORE, TOKEN_REWARDS = ppo.rollout, ppo.score, ppo.token_rewards

# ---- what takes the place of the project's functions


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
    """In batches' place: PPO's contexts (their lengths are given as 0) GROUP times each."""
    rows_at = BATCHES(lengths, size if any(lengths) else size // GROUP, seed)
    return (
        rows_at
        if any(lengths)
        else lambda step: [row for row in rows_at(step) for _ in range(GROUP)]
    )


def later(mask):
    """The original's mask: without the first generated token."""
    mask = mask.clone()
    mask[:, 0] = False
    return mask


def rewards_of_later(scores, log_probs, ref_log_probs, mask, kl_coef):
    """In token_rewards' place: no KL at the first token."""
    return TOKEN_REWARDS(
        scores,
        torch.where(later(mask), log_probs, ref_log_probs),
        ref_log_probs,
        mask,
        kl_coef,
    )


@torch.no_grad()
def recomputed(policy, reference, reward, source, index, sampling):
    """In rollout's place: log-probs by a forward pass, not from the sampling."""
    r = ROLLOUT(policy, reference, reward, source, index, sampling)
    r.log_probs = ppo.score(
        policy.t5, r.source, r.ids, r.mask, r.support, sampling.temperature
    )[0]
    return r


def unmodified(t5, source, ids, mask, support, temperature, value=None):
    """In score's place: under the distribution before temperature, top-k and minimum length."""
    return SCORE(t5, source, ids, mask, torch.ones_like(support), 1.0, value)


def between(share):
    """In Evaluation's place: of EmpRL the policy `share` of the way from MLE's weights to its own; not best of n."""

    class Between(emprl.Evaluation):
        def compare(self, policies, *arguments):
            mixed = copy.deepcopy(policies["emprl"])
            for p, start in zip(mixed.parameters(), policies["sft"].parameters()):
                p.data.lerp_(start, 1 - share)
            return super().compare({"sft": policies["sft"], "emprl": mixed}, *arguments[:3])

    return {"emprl.Evaluation": Between}


def expected_scores(levels, weights, gold):
    """Emp-F1, its parts and macro Emp-F1, and bits, of a policy that gives the levels (K, N, M) of K responses to each of N contexts
    with probabilities `weights` (K, N): from the expected confusion, so without a draw's noise."""
    seen, meant = (
        torch.nn.functional.one_hot(x, identifiers.LEVELS).double() for x in (levels, gold)
    )
    counts = torch.einsum(
        "kn,nmg,knml->mgl", weights.double(), meant, seen
    )  # rows gold, columns generated
    f1 = identifiers.f1_scores(counts)
    return {
        "emp_f1": f1["weighted_f1"].mean().item(),
        "emp_macro_f1": f1["macro_f1"].mean().item(),
        "mutual_information": identifiers.information(counts).mean().item(),
        **{f"emp_f1_{m}": x for m, x in zip(emprl.MECHANISMS, f1["weighted_f1"].tolist())},
    }


def tilted(times):
    """In Evaluation's place: of EmpRL what RL with a KL penalty tends to, pi*(y) ~ pi_MLE(y) exp(r(y) / beta) (Ziegler et al. 2019), from
    TRIES samples of MLE for each context with those weights; beta is such that the human responses' perplexity is `times` MLE's.
    With Z the mean of exp(r / beta) over a context's samples, log pi*(human) = log pi_MLE(human) + r(human) / beta - log Z."""

    class Tilted(emprl.Evaluation):
        def sampled(self, sft):
            """MLE's figures, TRIES samples of it for each context, and their levels: the same for all variants."""
            self.run.seed("ideal")
            tries = [
                self.pairs.but(ppo.respond(sft, self.pairs, self.run.config.replying))
                for _ in range(TRIES)
            ]
            levels = [self.levels(some.responses) for some in tries]
            return (
                self.measure("sft", sft, self.run.config.replying),
                tries,
                {who: torch.stack([x[who] for x in levels]) for who in self.gold},
            )

        @torch.no_grad()
        def compare(self, policies, train, train_levels, foreseen, promised):
            seed, options, pairs = (
                self.run.config.seed,
                self.run.config.reward.options(),
                self.pairs,
            )
            before, tries, levels = SAMPLES[seed] = SAMPLES.get(seed) or self.sampled(
                policies["sft"]
            )
            reward = lambda some: identifiers.empathy_reward(
                identifiers.predict(self.readers[0], some), promised, **options
            ).double()
            r, human = torch.stack([*map(reward, tries)]), reward(pairs)  # (K, N), (N,)
            log_z = lambda beta: (r / beta).logsumexp(0) - math.log(len(r))
            low, high = 1e-6, 1e3
            for _ in range(60):  # halve the interval, on the logarithmic scale
                beta = math.sqrt(low * high)
                rise = (log_z(beta) - human / beta).sum().item() / sum(
                    map(len, pairs.responses)
                )  # nats a token
                low, high = (beta, high) if rise > math.log(times) else (low, beta)
            weights = (r / beta).softmax(0)
            drawn = [
                tries[k].responses[i]
                for i, k in enumerate(torch.multinomial(weights.T, 1)[:, 0].tolist())
            ]
            texts = (
                [self.tokenizer.decode(ids) for ids in drawn],
                [d.response for d in pairs.dialogues],
            )
            after = {
                **before,
                **identifiers.text_scores(*texts),
                "reward": None,  # not measured, nor the three that follow
                **{who + "exact_match": None for who in levels},
                **{
                    who + key: x
                    for who in levels
                    for key, x in expected_scores(levels[who], weights, self.gold[who]).items()
                },
                "perplexity": before["perplexity"] * math.exp(rise),
                "kl": ((weights * r / beta).sum(0) - log_z(beta)).mean().item(),
            }
            return {"ceiling": {}, "sft": before, "emprl": after, "gain": {}}

    return {"emprl.Evaluation": Tilted, "emprl.report": lambda *_: None}


NO_FIRST_TOKEN = {
    "ppo.token_rewards": rewards_of_later,
    "ppo.whiten": lambda x, mask, **k: WHITEN(x, later(mask), **k),
    "ppo.policy_loss": lambda a, b, c, mask, *d: POLICY_LOSS(a, b, c, later(mask), *d),
    "ppo.value_loss": lambda a, b, c, mask, *d: VALUE_LOSS(a, b, c, later(mask), *d),
}

# ---- the ablations: {variant: settings; what is replaced; the policy that is compared with MLE}

Variant = namedtuple("Variant", "settings replaced after", defaults=("", {}, "emprl"))
DEFAULT = Variant()  # measured once for all ablations
TOP_K = "sampling.top_k=20 sampling.temperature=0.9 replying.top_k=20 replying.temperature=0.9"
ABLATIONS = {
    "mechanisms": {
        "all three": DEFAULT,
        **{
            f"without {m.upper()}": Variant(f"reward.mechanisms={rest}")
            for m, rest in (("er", "ip,ex"), ("ip", "er,ex"), ("ex", "er,ip"))
        },
        **{f"only {m.upper()}": Variant(f"reward.mechanisms={m}") for m in emprl.MECHANISMS},
    },
    "reward": {
        "expected, cross-entropy": DEFAULT,
        "likeliest levels": Variant("reward.target=likeliest"),
        "one human's levels": Variant("reward.target=human"),
        "ordinal": Variant("reward.difference=ordinal"),
    },
    "kl": {
        **{f"beta {beta}": Variant(f"ppo.kl_coef={beta}") for beta in (0, 0.1, 0.3, 1)},
        "adaptive, target 1": Variant("ppo.adaptive_kl=on ppo.kl_target=1 ppo.kl_horizon=256"),
    },
    "algorithm": {
        "MLE": Variant("ppo.steps=0"),
        "best of n": Variant("ppo.steps=0", {}, "best_of_n"),
        "PPO": DEFAULT,
        "REINFORCE": Variant("ppo.value_coef=0", {"ppo.gae": reinforce}),
        "GRPO": Variant("ppo.value_coef=0", {"ppo.gae": grpo, "emprl.batches": grouped}),
    },
    "details": {
        "default": DEFAULT,
        "advantages not whitened": Variant("ppo.whiten_advantages=off"),
        "values not clipped": Variant("ppo.value_clip_range=1e9"),
        "scores not scaled": Variant("ppo.scale_scores=off"),
        "lambda 0.95": Variant("ppo.lam=0.95"),
        "4 epochs": Variant("ppo.ppo_epochs=4"),
        "rewards whitened": Variant("ppo.whiten_rewards=on"),
        "log-probs recomputed": Variant("", {"ppo.rollout": recomputed}),
        "first token left out": Variant("", NO_FIRST_TOKEN),
        "top-k 20, temperature 0.9": Variant(TOP_K),
        "the same, scored without them": Variant(
            TOP_K, {"ppo.rollout": recomputed, "ppo.score": unmodified}
        ),
    },
    "pretraining": {
        "none": Variant("data.num_train=3000"),
        "300 steps of spans": Variant("data.num_train=3000 pretrain.steps=300"),
        "none, 300 steps of MLE more": Variant("data.num_train=3000 sft.steps=1300"),
    },
    "data": {f"{n} dialogues": Variant(f"data.num_train={n}") for n in (3000, 6000, 12000)},
    "own": {"your own data": DEFAULT},
    "frontier": {
        f"{share:.0%} of the way": Variant("", between(share))
        for share in (0.25, 0.5, 0.75, 1, 1.25, 1.5)
    },
    "ideal": {
        **{
            f"perplexity times {times}": Variant("ppo.steps=0", tilted(times))
            for times in (1.01, 1.03, 1.06, 1.1, 1.15)
        },
        **{
            f"likeliest levels, perplexity times {times}": Variant(
                "ppo.steps=0 reward.target=likeliest reward.balance=0.55", tilted(times)
            )
            for times in (1.03, 1.06, 1.1)
        },
    },
}
FROM_THE_START = ("pretraining", "data", "own")
FINISHED = ("frontier", "ideal")  # PPO is not repeated
MATCHES = ("match, identifiers", "match, truth")  # all three levels right, by either
PRICE = ("KL", "perplexity, times", "dist2, times", "unique, times")
OLDER = (
    "learnt reward",
    "true reward",
)  # of two kinds: in results that are still to be measured anew
REWARDS = (*OLDER, *MATCHES, *PRICE)
FRONTIER = [
    f"{measure}, {reader}"
    for reader in reversed(publish.READERS)
    for measure in publish.MEASURES.values()
]
COLUMNS = {
    None: ("er", "ip", "ex", *REWARDS),
    **dict.fromkeys(FINISHED, (*FRONTIER, *PRICE, "words, times")),
    "kl": ("er", "ip", "ex", "gain, identifiers", "gain, judge", *REWARDS),
    **dict.fromkeys(
        ("pretraining", "data"), ("MLE's Emp-F1", "MLE's perplexity per word", *REWARDS)
    ),
}

# ---- measuring


def settings_of(raw):
    """All options of a config.json as --set has them."""
    return [
        f"{section}.{key}={('off', 'on')[x] if isinstance(x, bool) else x}"
        for section, options in raw.items()
        if isinstance(options, dict)
        for key, x in options.items()
        if key != "corpus"
    ]


def run(folder, config, replaced, given=()):
    """metrics.json of emprl.run_all with some functions replaced, without its output and plots. given: stages that must be there."""
    replaced = replaced | {"emprl.draw_plots": lambda *_: None}
    places = [
        (globals()[module], name, f)
        for key, f in replaced.items()
        for module, name in [key.split(".")]
    ]
    before = [(module, name, getattr(module, name)) for module, name, _ in places]
    try:
        for place in places:
            setattr(*place)
        with contextlib.redirect_stdout(None):
            repeated = emprl.Run(folder, config)
            repeated.given = given
            return emprl.run_all(repeated)
    finally:
        for place in before:
            setattr(*place)


def measure(source, name, variant):
    """The figures of one variant from a finished run's MLE policy and identifiers."""
    raw = emprl.from_json((source / "metrics.json").read_text(encoding="utf-8"))["config"]
    folder = source / "ablations" / f"{name}-run"
    repeated, settings = (["ppo.pt"], SHORT) if name not in FINISHED else ([], [])
    given = [stage for stage in emprl.STAGES if stage != "ppo" or name == "frontier"]
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source / "checkpoints", folder / "checkpoints", ignore=lambda *_: repeated)
    config = emprl.make_config(
        raw["preset"],
        raw["seed"],
        raw.get("data_dir", ""),
        raw.get("t5_dir", ""),
        [*settings_of(raw), *settings, *variant.settings.split()],
    )
    return figures_of(run(folder, config, variant.replaced, given), variant.after)


def train(seed, name, variant):
    """The figures of one variant, trained from the start. `own`: 1,500 dialogues of the embedded world, as if they were yours."""
    folder = own_folder(name, variant, seed)
    shutil.rmtree(folder, ignore_errors=True)  # half of it may be of other code
    folder.mkdir(parents=True, exist_ok=True)
    if name == "own":
        dialogues = data.embedded_corpus(1000 + seed, 1500, 1, 1, 1).dialogues["train"]
        records = [
            {
                "context": d.context,
                "response": d.response,
                **dict(zip(emprl.MECHANISMS, d.levels)),
            }
            for d in dialogues
        ]
        (folder / "mine.jsonl").write_text(
            "".join(json.dumps(record) + "\n" for record in records), encoding="utf-8"
        )
    file = folder / "mine.jsonl" if name == "own" else ""
    return figures_of(
        run(
            folder,
            emprl.make_config("toy", seed, file, settings=[*SHORT, *variant.settings.split()]),
            {},
        )
    )


def own_folder(name, variant, seed):
    """The run folder of a variant that is trained from the start."""
    values = variant.settings.replace("=", " ").split()[1::2]
    return Path("runs") / "-".join(["ablate", name, *values, f"seed{seed}"])


def figures_of(m, policy="emprl"):
    """What is kept of a metrics.json: the gain by the oracle where there is one, else by the judge, and by the others too."""
    truth, before, after = (
        "oracle_" if "oracle_emp_f1" in m["sft"] else "judge_",
        m["sft"],
        m[policy],
    )
    gain = {key: after[key] - before[key] for key in before if "emp_f1" in key}
    return {
        "gain": gain[truth + "emp_f1"],
        **{k: gain[f"{truth}emp_f1_{k}"] for k in emprl.MECHANISMS},
        "gain, identifiers": gain["emp_f1"],
        "gain, judge": gain["judge_emp_f1"],
        "match, identifiers": after["exact_match"],
        "match, truth": after[truth + "exact_match"],
        "KL": after["kl"],
        **{f"{k}, times": after[k] / before[k] for k in ("perplexity", "dist2", "unique")},
        **{
            f"{measure}, {reader}": after[prefix + key]
            for reader, prefix in publish.READERS.items()
            for key, measure in publish.MEASURES.items()
        },
        "words, times": after["length"] / before["length"],
        "MLE's Emp-F1": before[truth + "emp_f1"],
        "MLE's perplexity per word": before["perplexity_per_word"],
    }


def mean(by_seed, key):
    return sum(figures[key] for figures in by_seed.values()) / len(by_seed)


def table(figures, name):
    """Means over the runs, the gain with its lowest and highest."""
    some = next(iter(next(iter(figures.values())).values()))
    columns, rows = [k for k in COLUMNS.get(name, COLUMNS[None]) if k in some], []
    for variant, by_seed in figures.items():
        gains = [f["gain"] for f in by_seed.values()]
        gain = f"{mean(by_seed, 'gain'):+.3f} ({min(gains):+.3f} to {max(gains):+.3f})"
        rows.append([variant, gain, *(mean(by_seed, k) for k in columns)])
    return emprl.table(["variant", "gain in Emp-F1, lowest and highest", *columns], rows)


def plot(figures, path, truth):
    """The share of replies with all three levels right, as the identifiers see it and as the truth (`truth` says whose), and
    perplexity, against the KL."""
    fig = emprl.figure_class()(figsize=(9, 3.4), layout="constrained")
    axes = fig.subplots(1, 2)
    points = sorted((mean(by_seed, "KL"), variant) for variant, by_seed in figures.items())
    for axis, unit, keys in zip(
        axes,
        ("all three levels right (share)", "perplexity, times MLE's"),
        (MATCHES, ("perplexity, times",)),
    ):
        for key in keys:
            axis.plot(
                [kl for kl, _ in points],
                [mean(figures[variant], key) for _, variant in points],
                "o-",
                label=truth if key == MATCHES[1] else key,
            )
        for kl, variant in points:
            axis.annotate(
                variant.removesuffix(" of the way"),
                (kl, mean(figures[variant], keys[0])),
                fontsize=7,
                rotation=20,
            )
        axis.set(xlabel="KL to the MLE policy (nats a response)", ylabel=unit)
        axis.margins(0.15)
    axes[0].legend()
    fig.savefig(path, dpi=110)


def key_of(metrics):
    """What figures are figures of: the finished run (None: trained from the start), how it is shortened, and the code, to the last change."""
    return emprl.digest([metrics and metrics["key"], SHORT, emprl.code_version()])


def stored(folder, name, key):
    """{variant: figures} of what has been measured under this key; None if there is nothing."""
    try:
        raw = emprl.from_json(
            (folder / "ablations" / f"{name}.json").read_text(encoding="utf-8")
        )
        return raw["figures"] if raw["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def keep(folder, name, key, variant, figures):
    """Add a variant's figures to those in the run folder."""
    path = folder / "ablations" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    found = (stored(folder, name, key) or {}) | {variant: figures}
    text = emprl.to_json(
        {"key": key, "code": emprl.code_version(), "figures": found}, indent=1
    )
    path.with_suffix(".tmp").write_text(text + "\n", encoding="utf-8")
    path.with_suffix(".tmp").replace(path)


def known(folder, key, variant):
    """The default's figures, if another ablation of the same run has them."""
    for other, variants in ABLATIONS.items():
        figures = stored(folder, other, key) or {}
        for v, what in variants.items():
            if what == variant == DEFAULT and other not in FROM_THE_START and v in figures:
                return figures[v]


def main(name, *runs, again=False, write=""):
    if name not in ABLATIONS:
        raise data.DataError(
            f"ablate {name}: no such ablation; choose one of {', '.join(ABLATIONS)}"
        )
    if bool(runs) == (name in FROM_THE_START):
        raise data.DataError(
            f"ablate {name}: {'takes no RUN, it trains its own' if runs else 'give one finished RUN or more'}"
        )
    configs, keys = {}, {}
    for folder in map(Path, runs):
        try:
            metrics = emprl.from_json((folder / "metrics.json").read_text(encoding="utf-8"))
            configs[folder], keys[folder] = metrics["config"], key_of(metrics)
            preset, seed = configs[folder]["preset"], configs[folder]["seed"]
            if preset not in emprl.PRESETS or type(seed) is not int:
                raise ValueError
        except OSError:
            raise data.DataError(
                f"ablate: {folder}: no finished run of this version there; make one with `{data.command_line(['python', 'emprl.py', '--run', str(folder)])}`"
            ) from None
        except (ValueError, KeyError, TypeError):
            raise data.DataError(
                f"ablate: {folder}/metrics.json: damaged; delete it and finish the run again by its own command"
            ) from None
    presets = {c["preset"] for c in configs.values()} or {"toy"}
    if len(presets) > 1 or len({c["seed"] for c in configs.values()}) < len(runs):
        raise data.DataError(
            "ablate: the RUNs must be of one preset and of different seeds; give others"
        )
    if write and not Path(write).resolve().parent.is_dir():
        raise data.DataError(f"--write {write}: no such folder; make it first")
    sources = {str(c["seed"]): folder for folder, c in configs.items()}
    with contextlib.ExitStack() as stack:
        for folder in sources.values():
            stack.enter_context(emprl.alone(folder))
        figures = measure_all(name, sources, keys, again)
    pictured, told = name in ("kl", "frontier"), ""
    where = Path(write) if write else None
    if where:
        where.write_text(emprl.to_json(figures, indent=1) + "\n", encoding="utf-8")
        told = f"\nwritten to {where}"
    elif sources:
        where = [*sources.values()][-1] / "ablations" / f"{name}.json"
    if pictured:
        truth = "the oracle's" if presets <= {"toy", "smoke"} else "the judge's"
        plot(figures, where.with_suffix(".png"), truth)
        told += f"\npicture: {where.with_suffix('.png')}"
    emprl.say(f"{table(figures, name)}{told}")


def measure_all(name, sources, keys, again):
    """{variant: {seed: figures}}, of what is there under the runs' keys and of what is measured now."""
    figures, todo, started, slow, done = {}, [], time.time(), 0, 0
    places = {}  # (variant, seed) -> (the folder that keeps its figures, their key)
    for seed in sources or map(str, SEEDS):
        for v, variant in ABLATIONS[name].items():
            folder = sources[seed] if sources else own_folder(name, variant, seed)
            key = keys[folder] if sources else key_of(None)
            places[v, seed] = folder, key
            found = None if again else (stored(folder, name, key) or {}).get(v)
            if found:
                figures.setdefault(v, {})[seed] = found
            else:
                todo.append((v, seed))
    try:
        for done, (v, seed) in enumerate(todo):
            variant, (folder, key) = ABLATIONS[name][v], places[v, seed]
            left = (
                f", {(time.time() - started) / slow * (len(todo) - done) / 60:.0f} min left"
                if slow
                else ""
            )
            emprl.say(f"{done + 1}/{len(todo)}  {v}, seed {seed}{left}")
            found = None if again or not sources else known(folder, key, variant)
            if not found:
                slow += 1
                found = (
                    measure(folder, name, variant)
                    if sources
                    else train(int(seed), name, variant)
                )
            keep(folder, name, key, v, found)
            figures.setdefault(v, {})[seed] = found
    except KeyboardInterrupt:
        emprl.say(
            f"\nkept: {done} of {len(todo)}; the same command, without --again, goes on from there"
        )
        raise
    return {v: figures[v] for v in ABLATIONS[name] if v in figures}  # in the order above


if __name__ == "__main__":
    sys.exit(emprl.main(["ablate", *sys.argv[1:]]))
