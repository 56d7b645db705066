"""The wiring: who saw which data, whose weights moved, which figure is of which classifier.

Two small runs are watched from outside. What the tests need of the program's inside is in
`Watched`, nowhere else.
"""

import functools
import inspect
import itertools
import json
import math
import signal
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import data
import emprl
import identifiers
import ppo
import t5_small
from tests.tools import MECHANISMS, read_json, read_lines, records, stages_of, words

# Every option that could be taken for another has a value of its own.
SETTINGS = """
pretrain.task=turns mle.micro_batch=5 identifiers.class_weight=1
ppo.batch_size=8 ppo.minibatch_size=8 ppo.lam=0.8 ppo.clip_range=0.21
ppo.value_clip_range=0.34 ppo.kl_coef=0.05 ppo.ptx_coef=0.5 ppo.lr=2e-2 eval.best_of=2
""".split()


class Watched:
    """A run, and what passed through a handful of places of the program while it went on."""

    def __init__(self, folder, settings=(), data_file="", on_reward=lambda calls: None):
        self.folder = folder
        self.stage = ""
        self.on_reward = on_reward
        self.batches = []  # (stage, learning?, dialogue, (context, response) ids) of a row
        self.read = []  # (classifier, stage, learning?, contexts, responses, log-probs), a call
        self.rewarded = []  # (contexts, targets, rewards) of every call of the reward
        self.calls = []  # (name, arguments by name, result) of PPO's equations
        self.pairs = {}  # id -> (context ids, response ids), as a person wrote them
        self.gold = {}  # (context ids, response ids) -> levels of the corpus
        self.targets = None  # what find_targets returned
        self.known = {}  # classifier -> the stages whose weights it has
        by_name = {x.partition("=")[0]: x for x in (*SETTINGS, *settings)}  # the last counts
        command = words(folder, *by_name.values())
        if data_file:
            command += ["--data", str(data_file)]
        with pytest.MonkeyPatch.context() as patch:
            self.watch_stages(patch)
            self.watch_pairs(patch)
            self.watch_classifiers(patch)
            for name in ("gae", "policy_loss", "value_loss"):
                self.watch_equation(patch, name)
            self.code = emprl.main(command)

    def watch_stages(self, patch):
        train, find_targets = emprl.Run.train, emprl.find_targets

        def watched(run, name, *arguments, **named):
            self.stage = name
            model = train(run, name, *arguments, **named)
            self.stage = f"after {name}"
            return model

        def watched_targets(*arguments):
            self.targets = find_targets(*arguments)
            return self.targets

        patch.setattr(emprl.Run, "train", watched)
        patch.setattr(emprl.Run, "save_every", math.inf)
        patch.setattr(emprl, "find_targets", watched_targets)
        patch.setattr(emprl, "draw_plots", lambda *_: {})  # longer than all the rest

    def watch_pairs(self, patch):
        make, batch = data.Pairs.__init__, data.Pairs.batch

        def watched_make(pairs, *arguments):
            make(pairs, *arguments)
            for d, context, response in zip(pairs.dialogues, pairs.contexts, pairs.responses):
                ids = (tuple(context), tuple(response))
                self.pairs[d.id] = ids
                self.gold[ids] = d.levels

        def watched_batch(pairs, rows):
            rows = [int(row) for row in rows]
            for row in rows:
                ids = (tuple(pairs.contexts[row]), tuple(pairs.responses[row]))
                seen = (self.stage, torch.is_grad_enabled(), pairs.dialogues[row], ids)
                self.batches.append(seen)
            return batch(pairs, rows)

        patch.setattr(data.Pairs, "__init__", watched_make)
        patch.setattr(data.Pairs, "batch", watched_batch)

    def watch_classifiers(self, patch):
        for kind in (identifiers.NetworkClassifier, identifiers.NGramClassifier):
            self.watch_classifier(patch, kind)
        reward = identifiers.EmpathyReward.__call__

        def watched_reward(rewarder, source, response, targets):
            result = reward(rewarder, source, response, targets)
            self.rewarded.append((plain(source), targets, result))
            self.on_reward(len(self.rewarded))
            return result

        patch.setattr(identifiers.EmpathyReward, "__call__", watched_reward)

    def watch_classifier(self, patch, kind):
        read = kind.forward

        def watched_read(classifier, context, response):
            log_probs = read(classifier, context, response)
            sides = (plain(context), plain(response), log_probs.detach())
            self.read.append((classifier, self.stage, torch.is_grad_enabled(), *sides))
            return log_probs

        patch.setattr(kind, "forward", watched_read)

    def watch_equation(self, patch, name):
        function = getattr(ppo, name)

        def call(*arguments, **options):
            result = function(*arguments, **options)
            bound = inspect.signature(function).bind(*arguments, **options)
            bound.apply_defaults()
            self.calls.append((name, bound.arguments, result))
            return result

        patch.setattr(ppo, name, call)

    # what a finished run left in its folder
    def figures(self):
        return read_json(self.folder / "metrics.json")

    def log(self, stage):
        log = read_lines(self.folder / "metrics.jsonl")
        return [record for record in log if record["stage"] == stage]

    def responses(self):
        return read_lines(self.folder / "responses.jsonl")

    def checkpoint(self, stage):
        return t5_small.load_state(self.folder / "checkpoints" / f"{stage}.pt")

    def model(self, name):
        return t5_small.from_pretrained(self.folder / name).eval()

    # what the tests ask
    def parts(self, stage, learning):
        """The parts of the corpus that a stage learnt from, or only looked at."""
        seen = [d.id for s, learns, d, _ in self.batches if (s, learns) == (stage, learning)]
        return {name.rpartition("/")[0] for name in seen}

    @functools.cached_property
    def trained(self):
        """{stage: the weights that it left}."""
        stages = ("identifiers", "judge", "context")
        return {name: self.checkpoint(name)["weights"] for name in stages}

    def ids(self, stage, learning):
        """(context ids, response ids) of every row of these batches, in order."""
        return [ids for s, learns, _, ids in self.batches if (s, learns) == (stage, learning)]

    def stages_of(self, classifier):
        """Which stage's weights a classifier has, now that the run is over."""
        if classifier not in self.known:
            state = classifier.state_dict()
            found = [name for name, trained in self.trained.items() if same(trained, state)]
            self.known[classifier] = found
        return self.known[classifier]

    def levels_read(self, name):
        """{(context ids, response ids): (M, L) probabilities} of a trained classifier."""
        found = {}
        for classifier, _, learns, contexts, responses, log_probs in self.read:
            if not learns and self.stages_of(classifier) == [name]:
                found.update(zip(zip(contexts, responses), log_probs.exp()))
        return found

    def part(self, name):
        return {key: pair for key, pair in self.pairs.items() if key.startswith(f"{name}/")}


def plain(ids):
    """Rows of ids as tuples, without padding."""
    return [tuple(filter(None, row)) for row in ids.tolist()]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def nll(model, pairs):
    """-log p(response | context) of each pair, summed over its tokens, one pair at a time."""
    losses = []
    for context, response in pairs:
        source, ids = torch.tensor([context]), torch.tensor([response])
        with torch.no_grad():
            logits = model.logits(model.response_states(source, ids))[0]
        losses.append(F.cross_entropy(logits, ids[0], reduction="sum").item())
    return losses


def per_token(model, pairs):
    return sum(nll(model, pairs)) / sum(len(response) for _, response in pairs)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A whole run, every stage of which is watched."""
    watched = Watched(tmp_path_factory.mktemp("recipe") / "run")
    assert watched.code == 0
    return watched


def again(run, folder, *settings, **options):
    """PPO once more with other settings, on the stages before it of the finished run."""
    return Watched(stages_of(run.folder, folder, "ppo"), settings, **options)


# ---- who saw which data ---------------------------------------------------------------------
@pytest.mark.parametrize(
    "stage, learns_from, looks_at",
    [
        ("pretrain", {"train"}, set()),
        ("mle", {"train"}, {"valid"}),
        ("identifiers", {"labelled/train"}, {"labelled/valid"}),
        ("judge", {"labelled/judge_train"}, {"labelled/judge_valid"}),
        ("context", {"train"}, {"valid"}),
        ("ppo", {"train"}, {"valid"}),
        ("after ppo", set(), {"test", "labelled/test"}),
    ],
)
def test_each_stage_sees_its_own_part(stage, learns_from, looks_at, run):
    ids = [*run.part("labelled/train"), *run.part("train")]
    assert len(ids) == len(set(ids)) == 400
    assert run.parts(stage, True) == learns_from
    assert run.parts(stage, False) - learns_from == looks_at


def test_texts_for_pretraining_are_learnt_from_nowhere_else(tmp_path, monkeypatch):
    """Of a corpus that has more of them than training pairs."""
    embedded = data.generated_corpus

    def with_more(*sizes):
        corpus = embedded(*sizes)
        more = embedded(9, 30, 1, 1, 1).dialogues["train"]
        corpus.dialogues["pretrain"] = [replace(d, id=f"pretrain/{d.id}") for d in more]
        return corpus

    monkeypatch.setattr(data, "generated_corpus", with_more)
    few = ("pretrain.steps=2", "mle.steps=4", "identifiers.steps=1", "ppo.steps=1")
    watched = Watched(tmp_path / "run", (*few, "eval.contexts=4"))
    assert watched.parts("pretrain", True) == {"pretrain/train"}
    for stage in ("mle", "context", "ppo"):
        assert watched.parts(stage, True) == {"train"}, stage
    assert watched.parts("identifiers", True) == {"labelled/train"}
    assert watched.parts("judge", True) == {"labelled/judge_train"}


def test_the_context_classifier_sees_no_response(run):
    calls = [c for c in run.read if run.stages_of(c[0]) == ["context"] or c[1] == "context"]
    assert calls
    assert all(set(responses) == {(1,)} for *_, responses, _ in calls), "only </s>"


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A run on a file of one's own, with dropout."""
    folder = tmp_path_factory.mktemp("own")
    file = folder / "mine.jsonl"
    file.write_text("".join(records(120)), encoding="utf-8")
    settings = ("data.vocab_size=300", "t5.dropout_rate=0.3")
    watched = Watched(folder / "run", settings, data_file=file)
    assert watched.code == 0
    return watched


def test_own_data_has_no_oracle(own):
    figures = own.figures()
    assert figures["mle"]["perplexity"] > 1
    assert "judge_emp_f1" in figures["mle"]
    assert not [name for name in figures["mle"] if name.startswith("oracle_")]


def test_own_data_keeps_its_test_part_and_its_judge_apart(own):
    learnt = {}
    for stage, learns, dialogue, _ in own.batches:
        if learns:
            learnt.setdefault(stage, set()).add(dialogue.context)
    tested = {tuple(r["context"]) for r in own.responses()}
    assert len(tested) > 10
    assert {"mle", "identifiers", "judge", "context", "ppo"} <= set(learnt)
    assert not tested & set.union(*learnt.values())
    assert not learnt["identifiers"] & learnt["judge"]


# ---- whose weights moved --------------------------------------------------------------------
def test_ppo_moves_its_own_policy_only(run):
    assert run.code == 0
    before, after = run.model("mle"), run.model("emprl")
    assert not same(before.state_dict(), after.state_dict())
    assert same(before.state_dict(), run.checkpoint("mle")["weights"]), "MLE as it was"
    test = [*run.part("test").values()]
    for name, model in (("mle", before), ("emprl", after)):
        expected = math.exp(per_token(model, test))
        assert run.figures()[name]["perplexity"] == pytest.approx(expected, rel=1e-4), name


def test_classifiers_stay_as_they_were_trained(run):
    for stage in ("identifiers", "judge", "context"):
        seen = [c[0] for c in run.read if c[1] == stage]
        assert seen and all(run.stages_of(one) == [stage] for one in seen), stage


def test_kl_starts_at_zero_against_the_mle_policy(run):
    kl = [record["kl"] for record in run.log("ppo")]
    assert kl[0] == pytest.approx(0, abs=1e-4) and max(map(abs, kl)) > 1e-3


def test_human_responses_pull_the_policy(run, tmp_path):
    """ptx_coef: the loss is of the policy in training, on the responses to the very contexts it
    answered."""
    first = run.rewarded[0][0]
    human = dict(run.part("train").values())
    mle = run.model("mle")
    expected = per_token(mle, [(context, human[context]) for context in first])
    assert run.log("ppo")[0]["human_loss"] == pytest.approx(expected, rel=1e-4)

    few = [*run.part("train").values()][:60]
    losses = []
    for coef in (0, 20):
        settings = (f"ppo.ptx_coef={coef}", "ppo.lr=4e-2", "eval.contexts=4")
        other = again(run, tmp_path / str(coef), *settings)
        losses.append(per_token(other.model("emprl"), few))
    assert losses[1] < losses[0] - 0.01, losses


def test_dropout_is_for_learning_only(own):
    """Not in a validation, a rollout or what the classifiers say: all that is what the saved
    weights say."""
    best = min(r["valid"] for r in own.log("mle") if "valid" in r)
    valid = dict.fromkeys(own.ids("mle", False))
    assert best == pytest.approx(per_token(own.model("mle"), valid), rel=1e-4)
    start = own.model("mle")
    start.load_state_dict(own.checkpoint("pretrain")["weights"])
    loss, rows = (
        own.log("mle")[0]["loss"],
        own.ids("mle", True),
    )  # the first batch may be short
    plainly = [per_token(start, rows[:size]) for size in range(1, 17)]
    assert min(abs(loss - x) for x in plainly) > 1e-5, "it learns without dropout"
    first = own.log("ppo")[0]
    assert first["first_ratio_error"] < 1e-4 and abs(first["kl"]) < 1e-4
    said = {}
    for classifier, stage, learns, contexts, responses, log_probs in own.read:
        for pair, row in zip(zip(contexts, responses), log_probs):
            if not learns and not own.stages_of(classifier) == [stage]:
                once = said.setdefault((classifier, *pair), row)
                assert torch.allclose(once, row, atol=1e-4)


def test_the_value_head_moves_with_the_whole_learning_rate(run):
    """It starts at 0, so a step relative to its size would leave it there."""
    values = [record["value_mean"] for record in run.log("ppo")]
    assert values[0] == 0 and abs(values[-1]) > 0.05, values


# ---- maximum likelihood ---------------------------------------------------------------------
def test_mle_loss_is_a_mean_over_tokens(run):
    """Of the first step, in parts; and the validation that chose the weights."""
    start = run.model("mle")
    start.load_state_dict(run.checkpoint("pretrain")["weights"])
    first = run.ids("mle", True)[:16]
    lengths = {len(response) for _, response in first}
    assert len(lengths) > 2, "of one length the two means would be equal"
    assert run.log("mle")[0]["loss"] == pytest.approx(per_token(start, first), rel=1e-4)

    best = min(r["valid"] for r in run.log("mle") if "valid" in r)
    valid = [*run.part("valid").values()]
    assert best == pytest.approx(per_token(run.model("mle"), valid), rel=1e-4)


# ---- the classifiers ------------------------------------------------------------------------
def human_levels(run, part):
    """{context ids: the levels that the identifiers read in the human response}."""
    read = run.levels_read("identifiers")
    return {pair[0]: read[pair].argmax(-1) for pair in run.part(part).values()}


def losses_of(calls, levels):
    """Cross-entropy of each row, (N, M), of calls of a classifier; and the levels, (N, M).

    levels: (context ids, response ids) -> (M,).
    """
    losses, gold = [], []
    for *_, contexts, responses, log_probs in calls:
        rows = [torch.as_tensor(levels(*ids)) for ids in zip(contexts, responses)]
        gold += rows
        loss = F.nll_loss(log_probs.mT, torch.stack(rows), reduction="none")
        losses.append(loss)
    return torch.cat(losses), torch.stack(gold)


def test_validation_counts_every_example_the_same(run):
    """The validation loss of `context`, which is trained and chosen by plain cross-entropy."""
    human = human_levels(run, "valid")
    calls = [c for c in run.read if c[1] == "context" and not c[2]]
    loss, _ = losses_of(calls, lambda context, response: human[context])
    valid = [r["valid"] for r in run.log("context") if "valid" in r]
    assert len(loss) == 40 * len(valid)
    expected = loss.view(len(valid), 40, 3).sum(2).mean(1)
    assert valid == pytest.approx(expected.tolist(), rel=1e-4)

    human = human_levels(run, "train")
    first = next(c for c in run.read if c[1] == "context" and c[2])
    loss, _ = losses_of([first], lambda context, response: human[context])
    expected = loss.sum(1).mean().item()
    assert run.log("context")[0]["loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("stage", ["identifiers", "judge"])
def test_training_weighs_classes_by_their_share_in_training(stage, run):
    part = {"identifiers": "labelled/train", "judge": "labelled/judge_train"}[stage]
    all_levels = torch.tensor([run.gold[ids] for ids in run.part(part).values()])
    first = next(c for c in run.read if c[1] == stage and c[2])
    loss, gold = losses_of([first], lambda *ids: run.gold[ids])
    share = F.one_hot(all_levels, 3).float().mean(0)  # (M, L)
    weights = 1 / share.clamp(min=1 / len(all_levels))
    weights /= (weights * share).sum(1, keepdim=True)
    weighted = loss * weights[torch.arange(3), gold]
    expected = weighted.sum(1).mean().item()
    assert run.log(stage)[0]["loss"] == pytest.approx(expected, rel=1e-4)
    assert run.log(stage)[0]["loss"] != pytest.approx(loss.sum(1).mean().item(), rel=1e-4)


def test_judge_and_identifiers_are_two(run):
    identifiers, judge = (run.checkpoint(name)["weights"] for name in ("identifiers", "judge"))
    assert not same(identifiers, judge)
    for name in ("identifiers", "judge"):
        assert set(run.figures()[name]) >= set(MECHANISMS)
    assert run.figures()["identifiers"] != run.figures()["judge"]


def test_ngrams_are_fitted_each_to_its_own_part(tmp_path):
    settings = ("identifiers.kind=ngrams", "identifiers.size=512", "eval.contexts=4")
    few = ("pretrain.steps=1", "mle.steps=2", "ppo.steps=1")
    watched = Watched(tmp_path / "run", (*settings, *few))
    expected = {
        "identifiers": "labelled/train",
        "judge": "labelled/judge_train",
        "context": "train",
    }
    for stage, part in expected.items():
        assert watched.parts(stage, True) == {part}
        calls = [call for call in watched.read if watched.stages_of(call[0]) == [stage]]
        rows = torch.cat([log_probs for *_, log_probs in calls])
        assert rows.std(0).max() > 0.01, f"{stage}: the same to every response"


# ---- targets and reward ---------------------------------------------------------------------
def test_a_target_is_that_of_its_context(run, tmp_path):
    """Expected: what the context classifier says of this context. Human: the levels of this
    context's response."""
    told = run.levels_read("context")
    human = human_levels(run, "train")
    copied = again(run, tmp_path / "human", "reward.target=human", "eval.contexts=4")
    assert len({tuple(x.tolist()) for x in human.values()}) > 1, "all alike: the test is blind"
    for watched, expected in (
        (run, {context: told[context, (1,)] for context in human}),
        (copied, human),
    ):
        assert len(watched.rewarded) >= 4
        for contexts, targets, _ in watched.rewarded:
            wanted = torch.stack([expected[context] for context in contexts])
            assert wanted.shape == targets.shape
            assert torch.allclose(wanted.float(), targets.float(), atol=1e-5)


def test_targets_are_balanced_and_chosen_as_the_reward_says(run, tmp_path):
    """Of the reward (training contexts), and of best of n (test contexts)."""
    plain, told = run.targets.train, run.targets.probs
    assert torch.allclose(plain.sum(-1), torch.ones(200, 3))
    assert torch.allclose(run.targets.test, told), "as the context classifier says"
    share = plain.mean(0)
    train, test = (probs / share**0.7 for probs in (plain, told))
    train, test = (probs / probs.sum(-1, keepdim=True) for probs in (train, test))
    assert not torch.equal(train.argmax(-1), plain.argmax(-1)), "the test is blind"
    likeliest = [F.one_hot(probs.argmax(-1), 3) for probs in (train, test)]
    levels = torch.stack(list(human_levels(run, "train").values()))
    for target, of_train, of_test in (
        ("expected", train, test),
        ("likeliest", *likeliest),
        ("human", levels, test),
    ):
        settings = (f"reward.target={target}", "reward.balance=0.7", "ppo.steps=0")
        found = again(run, tmp_path / target, *settings).targets
        assert found.train.shape == of_train.shape, target
        assert torch.allclose(found.train.double(), of_train.double(), atol=1e-6), target
        assert torch.allclose(found.test.double(), of_test.double(), atol=1e-6), target


def test_ceilings_are_of_the_plain_probabilities(run, tmp_path):
    """Of the test contexts, and not of the targets, which reward.balance has raised already."""
    found = again(run, tmp_path / "balanced", "reward.balance=0.7", "ppo.steps=0")
    share = run.targets.train.mean(0)  # without a balance they are the probabilities
    told = run.levels_read("context")
    gold, rows = [], []
    for record in found.responses():
        gold.append(record["levels"]["identifiers"]["human"])
        rows.append(told[run.pairs[record["id"]][0], (1,)])
    gold, probs = torch.tensor(gold), torch.stack(rows)
    raised = probs / share**0.7
    assert not torch.equal(levels_of(raised, share), levels_of(probs, share)), "blind"
    for name, levels in (
        ("context", probs.argmax(-1)),
        ("context_balanced", levels_of(probs, share)),
    ):
        figure = found.figures()["ceiling"][name]["emp_f1"]
        assert figure == pytest.approx(identifiers.emp_f1(levels, gold)), name


def levels_of(probs, share):
    """The likeliest levels when rare ones are raised by the square root of their share."""
    return (probs / share**0.5).argmax(-1)


def test_only_the_identifiers_give_reward(run):
    """From log-probs to the figure in the log: the product over mechanisms of the sum over
    levels of target times p."""
    train = {context for context, _ in run.part("train").values()}
    calls = [c for c in run.read if c[1] == "ppo" and set(c[3]) <= train]
    assert len(calls) == len(run.rewarded) == 4
    assert all(run.stages_of(call[0]) == ["identifiers"] for call in calls)
    assert not any(c[2] for c in calls), "no gradient"
    for call, (_, targets, _), record in zip(calls, run.rewarded, run.log("ppo")):
        reward = (call[5].exp() * targets).sum(-1).prod(-1)
        assert record["reward"] == pytest.approx(reward.mean().item(), rel=1e-4)


# ---- PPO's equations, as they are called ----------------------------------------------------
def calls_of(run, name):
    return [(arguments, result) for one, arguments, result in run.calls if one == name]


def test_every_option_reaches_its_own_place(run):
    assert {(a["gamma"], a["lam"]) for a, _ in calls_of(run, "gae")} == {(1, 0.8)}
    assert {a["clip_range"] for a, _ in calls_of(run, "policy_loss")} == {0.21}
    assert {a["clip_range"] for a, _ in calls_of(run, "value_loss")} == {0.34}


def test_the_value_head_learns_plain_returns_the_policy_whitened_advantages(run):
    rounds = zip(
        calls_of(run, "gae"), calls_of(run, "value_loss"), calls_of(run, "policy_loss")
    )
    for (_, (advantages, returns)), (value, _), (policy, _) in rounds:
        mask = value["mask"]
        n = mask.sum()
        assert value["returns"].sum().item() == pytest.approx(returns.sum().item(), rel=1e-4)
        assert sorted(value["returns"][mask].tolist()) == pytest.approx(
            sorted(returns[returns != 0].tolist()), abs=1e-4
        )
        white = policy["advantages"][policy["mask"]]
        assert white.mean().item() == pytest.approx(0, abs=1e-4)
        assert white.std(correction=0).item() == pytest.approx(math.sqrt(1 - 1 / n), rel=1e-2)
        assert not torch.allclose(advantages[advantages != 0].mean(), torch.tensor(0.0))


def test_an_early_stop_ends_all_epochs_and_is_marked(run, tmp_path, monkeypatch):
    monkeypatch.setattr(ppo, "MAX_UPDATE_KL", 1e-9)
    stopped = again(run, tmp_path / "stopped", "ppo.ppo_epochs=4", "eval.contexts=4")
    assert [r["stopped_early"] for r in stopped.log("ppo")][1:] == [1, 1, 1]
    assert [r["optimizer_steps"] for r in stopped.log("ppo")][1:] == [1, 1, 1]
    assert len(calls_of(stopped, "policy_loss")) <= 2 * 4, "one step, one look that stops"


def test_a_resumed_run_goes_on_with_its_beta(run, tmp_path):
    settings = ("ppo.adaptive_kl=on", "ppo.kl_horizon=30", "eval.contexts=4")
    whole = again(run, tmp_path / "whole", *settings)
    beta = [r["kl_coef"] for r in whole.log("ppo")]
    assert len(set(beta)) == 4, "beta moves"

    def interrupt(calls):
        if calls == 2:
            signal.raise_signal(signal.SIGINT)

    cut = again(run, tmp_path / "cut", *settings, on_reward=interrupt)
    assert cut.code == 130 and len(cut.log("ppo")) == 2
    resumed = Watched(tmp_path / "cut", settings)
    assert [r["kl_coef"] for r in resumed.log("ppo")] == beta
    assert resumed.log("ppo") == whole.log("ppo")


# ---- figures --------------------------------------------------------------------------------
SYSTEMS = ("mle", "emprl", "best_of_n", "mle_greedy", "emprl_greedy")


@pytest.mark.parametrize("who", ["identifiers", "judge"])
def test_levels_are_those_of_their_classifier(who, run):
    decode = data.Tokenizer(run.folder / "tokenizer.model").decode
    read = run.levels_read(who)
    by_text = {
        (context, decode(ids)): p.argmax(-1).tolist() for (context, ids), p in read.items()
    }
    other = run.levels_read({"judge": "identifiers"}.get(who, "judge"))
    both = [pair for pair in read if pair in other]
    assert any((read[pair].argmax(-1) != other[pair].argmax(-1)).any() for pair in both)

    for record in run.responses():
        context, response = run.pairs[record["id"]]
        table = record["levels"][who]
        assert table["human"] == read[context, response].argmax(-1).tolist()
        for system in SYSTEMS:
            assert table[system] == by_text[context, record["replies"][system]], system


def test_the_oracles_levels_are_read_from_the_texts(run):
    for record in run.responses():
        for system in ("human", *SYSTEMS):
            text = record["replies"].get(system, record["human"])
            levels = data.oracle_levels(record["context"], text)
            assert record["levels"]["oracle"][system] == list(levels), system


def test_best_of_n_is_the_one_that_promises_most(run):
    """Of the samples seen by the identifiers; two of them are the MLE policy's candidates."""
    decode = data.Tokenizer(run.folder / "tokenizer.model").decode
    read, told = run.levels_read("identifiers"), run.levels_read("context")
    by_text = {(context, decode(ids)): probs for (context, ids), probs in read.items()}
    better = []
    for record in run.responses():
        context = run.pairs[record["id"]][0]
        promised = {}
        for name in ("mle", "best_of_n"):
            earned = by_text[context, record["replies"][name]] * told[context, (1,)]
            promised[name] = earned.sum(-1).prod()
        better.append((promised["best_of_n"] - promised["mle"]).item())
    assert min(better) > -1e-6 and max(better) > 0, "its first candidate is MLE's own sample"


def test_the_majority_is_that_of_the_training_responses(run):
    majority = torch.stack([*human_levels(run, "train").values()]).mode(0).values
    for who, prefix in (("identifiers", ""), ("judge", "judge_"), ("oracle", "oracle_")):
        gold = torch.tensor([r["levels"][who]["human"] for r in run.responses()])
        expected = identifiers.emp_f1(majority.expand_as(gold), gold)
        floor = run.figures()["floors"]["majority"][f"{prefix}emp_f1"]
        assert floor == pytest.approx(expected)


def test_a_random_reply_is_a_response_of_the_training_part(run):
    """Drawn again here, and its levels looked up among those of the run."""
    decode = data.Tokenizer(run.folder / "tokenizer.model").decode
    responses = [response for _, response in run.part("train").values()]
    records = run.responses()
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(len(responses), (len(records),), generator=generator)
    copies = [responses[row] for row in rows]
    contexts = [run.pairs[record["id"]][0] for record in records]
    levels = {"oracle": []}
    for record, copy in zip(records, copies):
        levels["oracle"].append(data.oracle_levels(record["context"], decode(copy)))
    for who in ("identifiers", "judge"):
        read = run.levels_read(who)
        levels[who] = [read[pair].argmax(-1).tolist() for pair in zip(contexts, copies)]

    floor = run.figures()["floors"]["random_copy"]
    for who, prefix in (("identifiers", ""), ("judge", "judge_"), ("oracle", "oracle_")):
        gold = torch.tensor([record["levels"][who]["human"] for record in records])
        expected = identifiers.emp_f1(torch.tensor(levels[who]), gold)
        assert floor[f"{prefix}emp_f1"] == pytest.approx(expected)


def test_gain_is_of_emprl_over_mle(run):
    figures = run.figures()
    for name, gain in figures["gain"].items():
        before, after = figures["mle"][name], figures["emprl"][name]
        assert gain["relative"] == pytest.approx((after - before) / before, abs=1e-6)
    assert any(gain["relative"] for gain in figures["gain"].values())


def test_kl_in_the_table_is_of_emprl_from_mle(run):
    """From the two saved policies, on the sampled responses: log p - log p_ref, a response."""
    decode = data.Tokenizer(run.folder / "tokenizer.model").decode
    ids = {(c, decode(r)): r for c, r in run.levels_read("identifiers")}
    contexts = {name: context for name, (context, _) in run.part("test").items()}
    sampled = [(contexts[r["id"]], r["replies"]["emprl"]) for r in run.responses()]
    pairs = [(context, ids[context, text]) for context, text in sampled]
    mle, policy = (sum(nll(run.model(name), pairs)) for name in ("mle", "emprl"))
    expected = (mle - policy) / len(pairs)
    assert abs(expected) > 0.05
    # sampling leaves out two tokens, padding and unknown: hence not to the last digit
    assert run.figures()["emprl"]["kl"] == pytest.approx(expected, rel=0.1)


# ---- an interval, a corpus and the oracle ---------------------------------------------------
def test_the_interval_is_of_95_percent():
    """`after` is right in h of 400 contexts, h binomial: Emp-F1 is 2 h / (400 + h), and the
    ends of h are known."""
    n = 400
    gold = torch.ones(n, 3, dtype=torch.long)
    after = gold.clone()
    after[: n // 5] = 0
    found = identifiers.paired_bootstrap(gold, after, gold, gold, resamples=8000)
    chances = [math.comb(n, h) * 0.8**h * 0.2 ** (n - h) for h in range(n + 1)]
    below = list(itertools.accumulate(chances))

    def end_of(share):
        h = next(h for h in range(n + 1) if below[h] >= share)
        return 2 * h / (n + h) - 1

    for end, (right, wrong) in {"low": (0.025, 0.05), "high": (0.975, 0.95)}.items():
        assert abs(found[end] - end_of(right)) < abs(found[end] - end_of(wrong)), end


@pytest.mark.parametrize(
    "rows, settled",
    [
        ([(0, 0, 0), (0, 0, 0), (2, 2, 2)], (0, 0, 0)),
        ([(2, 1, 2), (2, 1, 0), (0, 2, 0)], (2, 1, 0)),
        ([(0, 1, 2), (2, 0, 1)], (0, 1, 2)),  # a tie: the first row's
        ([(2, 1, 0), (0, 2, 1), (0, 1, 1)], (0, 1, 1)),
    ],
)
def test_conflicting_levels_are_settled_by_majority(rows, settled, tmp_path):
    for m, name in enumerate(data.EPITOME_FILES):
        lines = [f"s1,r1,a post,a response,{levels[m]},{name}" for levels in rows]
        header = "sp_id,rp_id,seeker_post,response_post,level,rationales"
        (tmp_path / name).write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    dialogues, _ = data.read_epitome(tmp_path)
    assert [d.levels for d in dialogues] == [settled]


@pytest.mark.parametrize(
    "topic, er",
    [
        ("trip to Rome", 2),
        ("your trip to Rome", 2),
        ("trip to Romeo", 1),
        ("trip to Rome2", 1),
        ("atrip to Rome", 1),
        ("the roundtrip to Rome", 1),
        ("strip to Romes", 1),
    ],
)
def test_the_oracle_finds_a_topic_as_whole_words(topic, er):
    context = ("I booked a trip to Rome.",)
    assert data.oracle_levels(context, f"I am overjoyed for you about {topic}.") == (er, 0, 0)
    assert data.oracle_levels(context, f"What makes {topic} so special to you?") == (0, 0, er)


@pytest.mark.parametrize(
    "response, levels",
    [
        ("How lovely.", (1, 0, 0)),
        ("Somehow lovely.", (0, 0, 0)),
        ("How lovelyish.", (0, 0, 0)),
        ("What comes next?", (0, 0, 1)),
        ("What comes nextdoor?", (0, 0, 0)),
        ("Somewhat comes next?", (0, 0, 0)),
    ],
)
def test_the_oracle_finds_a_phrase_as_whole_words(response, levels):
    assert data.oracle_levels(("I booked a trip to Rome.",), response) == levels


def test_a_level_that_occurs_once_counts_in_macro_f1():
    counts = torch.tensor([[2, 0, 0], [1, 0, 0], [0, 0, 0]])  # gold 0, 0, 1; predicted 0, 0, 0
    macro = identifiers.f1_scores(counts)["macro_f1"].item()
    assert macro == pytest.approx((2 * 2 / 5 + 0) / 2)


# ---- files ----------------------------------------------------------------------------------
def test_own_data_needs_levels_everywhere_and_fifty_dialogues(tmp_path):
    def refused(count, without=()):
        file = tmp_path / "mine.jsonl"
        rows = [
            {"context": [f"I ate {i} pies."], "response": f"Oh, {i}?"} for i in range(count)
        ]
        levels = dict.fromkeys(MECHANISMS, 1)
        rows = [row if i in without else row | levels for i, row in enumerate(rows)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        try:
            data.own_corpus(file)
        except data.DataError:
            return True
        return False

    assert refused(49) and refused(60, without=[7]) and not refused(60)


def test_a_csv_row_with_a_field_too_many_is_refused(tmp_path):
    for name in data.EPITOME_FILES:
        header = "sp_id,rp_id,seeker_post,response_post,level,rationales"
        row = "s1,r1,a post,a response,1,,one more"
        (tmp_path / name).write_text(f"{header}\n{row}\n", encoding="utf-8")
    with pytest.raises(data.DataError, match=":2: "):
        data.read_epitome(tmp_path)
