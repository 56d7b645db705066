"""What does each part contribute? PPO and the evaluation, repeated in variants.

    python -m tests.lab.ablate NAME RUN [RUN ...]     finished runs of one preset

Each variant starts from the MLE policy and the classifiers of a finished run, and is shortened
(see SHORT). It prints a Markdown table of means over the runs. A variant's own run, with its
replies, stays in RUN/ablations/, named by what it is made of: the same run, settings and code
are not measured again.

Two are never shortened. `ideal` trains nothing: it measures what any RL with a KL penalty tends
to. `rivals` is PPO beside what else may take its time: its table has plain figures.

Cost: a minute for each variant and run of `toy`, 5 minutes of `real`; `ideal` and `rivals` take
longer.
"""

import copy
import io
import math
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

import emprl
from data import LEVELS, MECHANISMS, batches
from identifiers import (
    balanced,
    compare_levels,
    make_classifier,
    predict,
    predict_levels,
)
from ppo import PPOTrainer, Prompts, respond, response_log_probs, rollout, whiten
from t5_small import (
    EOS_ID,
    T5,
    Stack,
    TrainConfig,
    Trainer,
    autocast,
    generate,
)
from tests.lab.command import Parser, means, read_metrics, read_runs, sheet, start, write_json

SHORT = "ppo.steps=12 ppo.warmup=2 ppo.batch_size=256 eval.contexts=200"
GROUP = 4  # responses to each context, where they are compared with each other
TRIES = 32  # of MLE for each context, of which `ideal` is made
DRAWS = 100  # from these tries, for its levels


# ---- rivals of PPO --------------------------------------------------------------------------


class Reinforce(PPOTrainer):
    """Every token's advantage is the whole response's reward, on the batch's scale."""

    def update(self, sampled):
        total = sampled.returns[:, 0]  # (B,) with lambda 1 the sum of all token rewards
        sampled.advantages = self.advantages(total)[:, None] * sampled.mask
        return super().update(sampled)

    def advantages(self, total):
        return (total - total.mean()) / (total.std() + 1e-6)


class GRPO(Reinforce):
    """GROUP responses to each context: a response counts by how much it is above the others.

    Source: Shao et al. 2024 (arXiv 2402.03300); the KL penalty is part of the reward here.
    """

    def rollout(self, prompts):
        """The first contexts of the batch, GROUP times each."""
        rows = torch.arange(len(prompts.source) // GROUP).repeat_interleave(GROUP)
        repeated = {name: x[rows] for name, x in vars(prompts).items()}
        return super().rollout(Prompts(**repeated))

    def advantages(self, total):
        groups = total.view(-1, GROUP)
        centred = groups - groups.mean(1, keepdim=True)
        return (centred / (groups.std(1, keepdim=True) + 1e-6)).flatten()


# ---- MLE, trained once more: rivals that are no RL -------------------------------------------

# How many responses they learn with, over those that PPO samples: so they take PPO's time.
BEST_OF_N_SAMPLES = 1.5  # these are sampled and rewarded, but most are not learnt from
TOLD_RESPONSES = 2.4  # these are the humans'


def mle_again(run, model, loss_sum, lengths, share, validate=None):
    """A trainer on so many responses, over those that PPO samples, with PPO's learning rate."""
    config = run.config.ppo
    steps = round(share * config.steps * config.batch_size / config.minibatch_size)
    settings = TrainConfig(
        steps=steps,
        batch_size=config.minibatch_size,
        micro_batch=config.micro_batch,
        lr=config.lr,
        rms_scaled=config.rms_scaled,
        warmup=config.warmup,
        eval_every=max(steps // 4, 1),
    )
    rows_at = batches(lengths, settings.batch_size, run.config.seed)
    return Trainer(model, loss_sum, rows_at, validate, settings)


def best_of_n_trainer(run, mle, reward, prompts, *others):
    """MLE on the best of n samples of MLE for each context, and no KL penalty; n: eval.best_of.

    Source: RAFT, Dong et al. 2023 (arXiv 2304.06767), with one round of it.
    """
    policy = copy.deepcopy(mle).requires_grad_()
    n = run.config.eval.best_of

    def loss_sum(rows):
        source, _ = prompts.pairs.batch(rows)
        aims = prompts.targets[rows].to(source.device)
        ids = best_of_n(mle, reward, source, aims, run.config.exploring, n)
        return policy.loss_sum(source, ids)

    lengths = [0] * len(prompts.pairs)  # all alike: the human responses are not learnt from
    return mle_again(run, policy, loss_sum, lengths, BEST_OF_N_SAMPLES / n)


@torch.no_grad()
def best_of_n(t5, reward, source, targets, sampling, n):
    """Of n responses to each context the one of highest reward: (B, S), (B, ...) -> (B, T)."""
    often = source.repeat_interleave(n, 0)  # (B * n, S)
    with autocast(source.device):
        ids = generate(t5, often, sampling).ids
    rewards = reward(often, ids, targets.repeat_interleave(n, 0))
    best = rewards.view(-1, n).argmax(1)  # (B,)
    return ids.unflatten(0, (-1, n))[torch.arange(len(source)), best]


class Told(T5):
    """A T5 that is told which levels its response should have, by three words before the context.

    words:     (M, L) ids of a word for each level; nothing else may use them.
    levels_of: contexts (B, S) -> levels (B, M): when it replies, or is measured, it is told these.
    spoken:    (B, M): in training mode it is told these.
    """

    def __init__(self, t5, words, levels_of):
        super().__init__(t5.config)
        self.decoder = ToldDecoder(t5.config, is_decoder=True)
        self.load_state_dict(t5.state_dict())
        self.words = words
        self.levels_of = levels_of
        self.spoken = None

    def encode(self, source):
        """(B, S) -> (B, M + S, D)."""
        levels = self.spoken if self.training else self.levels_of(source)
        words = self.words[torch.arange(len(MECHANISMS)), levels]  # (B, M)
        return super().encode(torch.cat([words.to(source.device), source], 1))


class ToldDecoder(Stack):
    """It reads the states of the words, too, which its caller does not know of."""

    def forward(self, x, self_bias, memory, memory_bias, caches=None):
        memory_bias = F.pad(memory_bias, (len(MECHANISMS), 0))  # 0: not hidden
        return super().forward(x, self_bias, memory, memory_bias, caches)


def told_trainer(run, mle, reward, prompts, *others):
    """MLE on the human responses, told their levels; when it replies, those to be expected.

    These are the likeliest by the context classifier, balanced as the targets of the reward.
    The weights of the best perplexity of human responses are kept, as in MLE's own training.
    """
    pairs = prompts.pairs
    sentinels = run.tokenizer.sentinels[-len(MECHANISMS) * LEVELS :]  # the last that are used
    words = torch.tensor(sentinels).view(-1, LEVELS)  # (M, L)
    told = Told(mle, words, expected_levels(run, mle, pairs)).to(run.device)
    levels = predict_levels(reward.identifiers, pairs)  # (N, M)

    def loss_sum(rows):
        told.spoken = levels[rows]
        return told.loss_sum(*pairs.batch(rows))

    def validate():
        return others[-1](told)["valid_perplexity"]

    return mle_again(run, told, loss_sum, pairs.lengths(), TOLD_RESPONSES, validate)


def expected_levels(run, mle, train):
    """A function: contexts (B, S) -> the likeliest levels (B, M), by the run's own classifier."""
    settings = emprl.classifier_settings(run.config, "context")
    classifier = make_classifier(mle, settings)
    emprl.load_classifier(classifier, "context", run.folder, run.results)
    classifier = classifier.to(run.device).eval()
    share = predict(classifier, emprl.without_response(train, None)).exp().mean(0)  # (M, L)

    @torch.no_grad()
    def levels_of(source):
        nothing = source.new_full((len(source), 1), EOS_ID)
        probs = classifier(source, nothing).exp().cpu()
        return balanced(probs, share, run.config.reward.balance).argmax(-1)

    return levels_of


# ---- details of PPO, done otherwise ---------------------------------------------------------


class WithoutFirstToken(PPOTrainer):
    """The original's mask: the first token is sampled, but never learnt from.

    Its KL penalty only reaches its own advantage, which is left out with it.
    """

    def update(self, sampled):
        sampled.advantages = whiten(sampled.advantages, without_first(sampled.mask))
        return super().update(sampled)

    def loss(self, part):
        return super().loss(replace(part, mask=without_first(part.mask)))


def without_first(mask):
    return F.pad(mask[:, 1:], (1, 0))


class Recomputed(PPOTrainer):
    """Log-probs of the sampled tokens by a forward pass, not from the sampling."""

    def rollout(self, prompts):
        sampled = super().rollout(prompts)
        sampled.log_probs = self.scored_by(self.policy.t5, sampled)
        return sampled

    @torch.no_grad()
    def scored_by(self, t5, sampled):
        temperature = self.sampling.temperature
        log_probs, _, _ = response_log_probs(
            t5, sampled.source, sampled.ids, sampled.mask, sampled.support, temperature
        )
        return log_probs


class Unfiltered(Recomputed):
    """Temperature, top-k and minimum length say what is sampled, not how it is scored."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.exploring = self.sampling
        self.sampling = replace(self.sampling, temperature=1.0)  # what the loss scores with

    def rollout(self, prompts):
        sampled = rollout(self.policy, self.reference, self.reward, prompts, self.exploring)
        sampled.support.fill_(True)
        sampled.log_probs = self.scored_by(self.policy.t5, sampled)
        sampled.ref_log_probs = self.scored_by(self.reference, sampled)
        return sampled


# ---- what RL tends to -----------------------------------------------------------------------


class Ideal(emprl.Evaluator):
    """pi*(y) ~ pi_MLE(y) exp(r(y) / beta): the optimum of RL with a KL penalty (Ziegler 2019).

    It takes the place of best of n, and is made of TRIES samples of MLE for each context,
    weighted by exp(r / beta). beta is such that the human responses' perplexity is `times` MLE's:
    with Z the mean of exp(r / beta) over a context's samples,

        log pi*(human) = log pi_MLE(human) + r(human) / beta - log Z
    """

    sampled = {}  # run -> its samples and their levels, the same for all variants

    def __init__(self, times, *arguments):
        super().__init__(*arguments)
        self.times = times

    def best_of_n(self, reward, targets):
        source = self.run.folder.parent
        if source not in self.sampled:
            self.sampled[source] = self.sample_often()
        tries, told = self.sampled[source]
        rewards = torch.stack([promised(reward, one, targets) for one in tries])  # (K, N)
        human = promised(reward, self.pairs, targets)  # (N,)
        beta, rise = self.find_beta(rewards, human)
        weights = (rewards / beta).softmax(0)  # (K, N)

        # Texts of one draw; levels of many, which have little of a draw's noise.
        chosen = torch.multinomial(weights.T, DRAWS, replacement=True)  # (N, DRAWS)
        texts = [tries[k].responses[i] for i, k in enumerate(chosen[:, 0].tolist())]
        figures = self.measure("best_of_n", texts)
        for who, gold in self.human.items():
            levels = torch.stack([one[who] for one in told])  # (K, N, M)
            for name, number in drawn_figures(levels, chosen, gold).items():
                figures[emprl.PREFIX[who] + name] = number

        # Each perplexity is the exponential of the same loss, over the tokens or the words.
        before = self.perplexities(self.mle)
        factor = 1 + rise / math.log(before["perplexity"])  # how much larger the loss is
        for name, perplexity in before.items():
            figures[name] = perplexity**factor

        kl = (weights * rewards / beta).sum(0) - log_z(rewards, beta)
        figures["kl"] = kl.mean().item()
        return figures

    def sample_often(self):
        """TRIES lots of responses, and of each {classifier: (N, M) levels}."""
        config = self.run.config
        self.run.seed("ideal")
        tries, told = [], []
        for _ in range(TRIES):
            responses = respond(self.mle, self.pairs, config.replying, config.eval.batch_size)
            tries.append(self.pairs.with_responses(responses))
            told.append(self.levels(responses))
        return tries, told

    def find_beta(self, rewards, human):
        """beta, and by how much a token's loss rises with it: (K, N), (N,) -> two numbers."""
        tokens = sum(map(len, self.pairs.responses))
        low, high = 1e-6, 1e3
        for _ in range(60):  # halve the interval, on the logarithmic scale
            beta = math.sqrt(low * high)
            rise = (log_z(rewards, beta) - human / beta).sum().item() / tokens
            if rise > math.log(self.times):
                low = beta
            else:
                high = beta
        return beta, rise


def log_z(rewards, beta):
    """The log of the mean over samples of exp(r / beta): (K, N) -> (N,)."""
    return (rewards / beta).logsumexp(0) - math.log(len(rewards))


def promised(reward, pairs, targets):
    """The expected reward of a response to each context, (N,)."""
    return reward.of(predict(reward.identifiers, pairs), targets).double()


def drawn_figures(levels, chosen, gold):
    """Figures of levels (K, N, M), of which chosen (N, D) are given D times to each context."""
    given = levels[chosen, torch.arange(len(chosen))[:, None]]  # (N, D, M)
    return compare_levels(given.flatten(0, 1), gold.repeat_interleave(chosen.shape[1], 0))


# ---- the ablations --------------------------------------------------------------------------


@dataclass
class Variant:
    settings: str = ""  # as of --set
    trainer: type = PPOTrainer
    rival: Callable = None  # what makes the trainer of a rival, in its place
    system: str = "emprl"  # which system of metrics.json is compared with MLE
    own: bool = False  # nothing is trained: EmpRL's weights are the run's own
    times: float = None  # ideal: MLE's perplexity, times so much


def by_settings(text):
    """ "NAME: SETTINGS" lines -> {NAME: Variant}."""
    lines = [line.split(":") for line in text.strip().splitlines()]
    return {name.strip(): Variant(settings.strip()) for name, settings in lines}


TOP_K = (
    "exploring.top_k=20 exploring.temperature=0.9 replying.top_k=20 replying.temperature=0.9"
)
DEFAULT = Variant()
ABLATIONS = {
    "mechanisms": by_settings("""
        all three:
        without ER: reward.mechanisms=ip,ex
        without IP: reward.mechanisms=er,ex
        without EX: reward.mechanisms=er,ip
        only ER: reward.mechanisms=er
        only IP: reward.mechanisms=ip
        only EX: reward.mechanisms=ex
    """),
    "reward": by_settings("""
        expected, cross-entropy:
        likeliest levels: reward.target=likeliest
        one human's levels: reward.target=human
        ordinal: reward.difference=ordinal
    """),
    "kl": by_settings("""
        beta 0: ppo.kl_coef=0
        beta 0.1: ppo.kl_coef=0.1
        beta 0.3: ppo.kl_coef=0.3
        beta 1: ppo.kl_coef=1
        adaptive, target 1: ppo.adaptive_kl=on ppo.kl_target=1 ppo.kl_horizon=256
    """),
    "algorithm": {
        "MLE": Variant(system="mle"),
        "best of n": Variant(system="best_of_n"),
        "PPO": DEFAULT,
        "REINFORCE": Variant("ppo.value_coef=0 ppo.lam=1", Reinforce),
        "GRPO": Variant("ppo.value_coef=0 ppo.lam=1", GRPO),
        "MLE on best of n": Variant(rival=best_of_n_trainer),
    },
    "rivals": {
        "MLE": Variant(own=True, system="mle"),
        "best of n": Variant(own=True, system="best_of_n"),
        "MLE on best of n": Variant(rival=best_of_n_trainer),
        "MLE, told the levels": Variant(rival=told_trainer),
        "EmpRL": Variant(own=True),
        "ideal, perplexity times 1.1": Variant("ppo.steps=0", system="best_of_n", times=1.1),
        "human": Variant(own=True, system="human"),
    },
    "details": {
        **by_settings("""
            default:
            advantages not whitened: ppo.whiten_advantages=off
            values not clipped: ppo.value_clip_range=1e9
            rewards not scaled: ppo.scale_rewards=off
            lambda 0.95: ppo.lam=0.95
            4 epochs: ppo.ppo_epochs=4
            rewards whitened: ppo.whiten_rewards=on
        """),
        "log-probs recomputed": Variant(trainer=Recomputed),
        "first token left out": Variant(trainer=WithoutFirstToken),
        "top-k 20, temperature 0.9": Variant(TOP_K),
        "the same, scored without them": Variant(TOP_K, Unfiltered),
    },
    "ideal": {
        f"perplexity times {times}": Variant("ppo.steps=0", system="best_of_n", times=times)
        for times in (1.01, 1.03, 1.06, 1.1)
    },
}
MEASURES = {
    "emp_f1": "weighted",
    "emp_macro_f1": "macro",
    "mutual_information": "bits",
    "exact_match": "all three right",
}
PRICE = {
    "perplexity": "perplexity",
    "dist2": "Dist-2",
    "unique": "distinct",
    "length": "words",
}
PLAIN = {"perplexity_per_word": "perplexity a word", **PRICE, "kl": "KL"}


# ---- measuring ------------------------------------------------------------------------------


def measure(source, finished, variant, shortened):
    """The metrics of a variant of a finished run: those that are there, or measured now."""
    config = emprl.read_config(finished["config"])
    for setting in f"{shortened} {variant.settings}".split():
        emprl.apply_setting(config, setting)
    by = (variant.rival or variant.trainer).__name__
    made_of = [finished["made_of"], asdict(config), by, variant.own, variant.times]
    code = [emprl.code_version()["modules"], emprl.digest_bytes(Path(__file__).read_bytes())]
    folder = source / "ablations" / emprl.digest([made_of, code])[:16]
    if (folder / "metrics.json").exists():
        return read_metrics(folder)

    # All that comes before PPO is the finished run's.
    shutil.rmtree(folder, ignore_errors=True)
    made_anew = shutil.ignore_patterns("" if variant.own else "ppo.pt")
    shutil.copytree(source / "checkpoints", folder / "checkpoints", ignore=made_anew)

    evaluator = emprl.Evaluator
    if variant.times:
        evaluator = partial(Ideal, variant.times)
    trainer = partial(unwatched, variant.trainer)
    with mock.patch.object(emprl, "Evaluator", evaluator), redirect_stdout(io.StringIO()):
        run = emprl.Run(folder, config, emprl.find_device())
        if variant.rival:
            trainer = partial(variant.rival, run)
        return emprl.run_all(run, trainer)


def unwatched(trainer, *arguments):
    """A trainer without validations: only the end counts here."""
    return trainer(*arguments[:-1], lambda t5: {})


def figures_of(metrics, system):
    """What the table shows of a system, beside MLE."""
    before, after = metrics["mle"], metrics[system]
    truth = "oracle" if "oracle_emp_f1" in before else "judge"
    prefix = emprl.PREFIX[truth]
    figures = {}
    gains = {"gain": "emp_f1", **{m.upper(): f"emp_f1_{m}" for m in MECHANISMS}}
    for name, key in gains.items():
        figures[name] = after[prefix + key] - before[prefix + key]
    for who in (truth, "identifiers"):
        for key, name in MEASURES.items():
            figures[f"{name}, {who}"] = after[emprl.PREFIX[who] + key]
    figures["KL"] = after["kl"]
    for key, name in PRICE.items():
        figures[f"{name}, times"] = float(after[key]) / float(before[key])
    return figures


def plain_figures(metrics, system):
    """What the table of the rivals shows of a system, as it is; of people only their texts."""
    measured = metrics[system]
    figures = {}
    for who, prefix in emprl.PREFIX.items():
        for key, name in MEASURES.items():
            if prefix + key in measured:
                figures[f"{name}, {who}"] = measured[prefix + key]
    for key, name in PLAIN.items():
        if key in measured:
            figures[name] = float(measured[key])
    if system == "emprl":
        figures["seconds of training"] = metrics["seconds"]["ppo"]
    return figures


def rows_of(figures):
    """{variant: {seed: figures}} -> {variant: means over the runs}, of a gain its range, too."""
    rows = {}
    for variant, by_seed in figures.items():
        seeds = list(by_seed.values())
        row = means(seeds)
        if "gain" in row:
            gains = [one["gain"] for one in seeds]
            row["gain"] = f"{row['gain']:+.3f} ({min(gains):+.3f} to {max(gains):+.3f})"
        rows[variant] = row
    return rows


def plot(rows, path):
    """All three levels right, by each classifier, against the KL."""
    from matplotlib.figure import Figure

    figure = Figure((7.8, 3.4), layout="constrained")
    axis = figure.subplots()
    ordered = sorted(rows.values(), key=itemgetter("KL"))
    kl = [row["KL"] for row in ordered]
    for name in ordered[0]:
        if name.startswith("all three right"):
            axis.plot(kl, [row[name] for row in ordered], "o-", label=name)
    for variant, row in rows.items():
        place = row["KL"], row["all three right, identifiers"]
        axis.annotate(variant, place, (-9, -13), textcoords="offset points", fontsize=7)
    axis.set(xlabel="KL to MLE, nats a response", ylabel="share of replies")
    axis.legend()
    figure.savefig(path)


def main():
    parser = Parser(__doc__)
    parser.add_argument("name", choices=ABLATIONS)
    parser.add_argument("run", nargs="+", help="folder of a finished run")
    parser.can_write()
    options = parser.parse_args()

    shortened = "" if options.name in ("ideal", "rivals") else SHORT
    runs = read_runs(options.run)
    variants = ABLATIONS[options.name]
    shown = plain_figures if options.name == "rivals" else figures_of
    figures = {name: {} for name in variants}
    for folder, finished in runs.items():
        seed = finished["config"]["seed"]
        with emprl.alone(folder):
            for number, (name, variant) in enumerate(variants.items(), 1):
                emprl.say(f"seed {seed}, {number} of {len(variants)}: {name}")
                metrics = measure(folder, finished, variant, shortened)
                figures[name][seed] = shown(metrics, variant.system)
    rows = rows_of(figures)
    emprl.say(f"\nMeans over {len(runs)} runs; of a gain its range, too\n\n{sheet(rows)}")
    write_json(options.write, figures)
    if options.write and options.name != "rivals":
        plot(rows, options.write.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(start(main))
