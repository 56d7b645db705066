"""Figures are what their label says: each from a run of the smallest preset, or by hand."""

import json
import math
from dataclasses import replace

import pytest
import torch
from matplotlib.figure import Figure

import data
import emprl
import identifiers
import ppo
import t5_small
from tests.tools import read_json, read_lines, smoke, stages_of, weights


def parts_of(config):
    """The dialogues that a run of the generated world has."""
    sizes = config.data
    corpus = data.generated_corpus(
        config.seed, sizes.num_train, sizes.num_valid, sizes.num_test, sizes.num_labelled
    )
    return corpus.dialogues


def test_without_a_validation_the_last_weights_stay(tmp_path, no_pictures):
    """Pre-training has nothing to validate by: how often it would makes no difference."""
    for every in (2, 6):
        settings = [f"mle.eval_every={every}", "mle.steps=0", "ppo.steps=0"]
        settings += ["identifiers.steps=1", "context.steps=1", "eval.contexts=4"]
        smoke(tmp_path / str(every), "pretrain.steps=6", *settings)
    often, once = tmp_path / "2", tmp_path / "6"
    assert weights(often, "mle") == weights(once, "mle")
    logs = [read_lines(folder / "metrics.jsonl") for folder in (often, once)]
    assert logs[0] == logs[1]
    assert [record["stage"] for record in logs[0]].count("pretrain") == 6


# ---- kl -------------------------------------------------------------------------------------

FAR = "ppo.lr=0.5 ppo.steps=2 ppo.warmup=0 ppo.kl_coef=0".split()
SAMPLINGS = [
    [],
    ["temperature=0.5", "top_k=5", "min_length=4"],
    ["temperature=1.5", "top_p=0.6"],
]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_kl_is_that_of_the_distribution_sampled_from(
    sampling, finished, tmp_path, monkeypatch, no_pictures
):
    """As PPO's log has it, worked out anew by a rollout to the same contexts."""
    monkeypatch.setattr(ppo, "MAX_UPDATE_KL", math.inf)
    both = [f"exploring.{x}" for x in sampling] + [f"replying.{x}" for x in sampling]
    metrics = smoke(stages_of(finished, tmp_path / "run", "ppo"), *FAR, *both)
    run = emprl.load_run(tmp_path / "run", "cpu")
    config, policies = run.run.config, run.policies
    sizes = config.data
    dialogues = parts_of(config)["test"]
    pairs = data.Pairs(dialogues, run.run.tokenizer, sizes.max_source, sizes.max_scored)
    (rows,) = pairs.chunks(128)
    source, human = pairs.batch(rows)
    prompts = ppo.Prompts(source, torch.tensor(rows), human)
    policy = ppo.Policy(policies["emprl"])
    run.run.seed("evaluate emprl")
    sampled = ppo.rollout(policy, policies["mle"], no_reward, prompts, config.replying)
    kl = ppo.kl_estimate(sampled.log_probs, sampled.ref_log_probs).sum(1).mean().item()
    assert kl > 0.3, "no distance: the test is blind"
    assert metrics["emprl"]["kl"] == pytest.approx(kl, rel=1e-3)
    assert metrics["mle"]["kl"] == 0


def no_reward(source, response, targets):
    return targets.float()


def test_greedy_replies_have_no_kl(finished):
    """Null in metrics.json, blank in the table; the bound of the best of n stays."""
    metrics = read_json(finished / "metrics.json")
    assert metrics["mle_greedy"]["kl"] is metrics["emprl_greedy"]["kl"] is None
    assert metrics["best_of_n"]["kl"] > 0
    page = (finished / "report.md").read_text(encoding="utf-8")
    (row,) = [line for line in page.splitlines() if "[kl] |" in line]
    _, _, mle, best, emprl_, *greedy, human, _ = [cell.strip() for cell in row.split("|")]
    assert mle == "0.000"
    assert best
    assert emprl_
    assert [*greedy, human] == ["", "", ""], row


# ---- what is read in human responses, and measured on them ----------------------------------


def of_each(dialogues, tokenizer, max_source, value):
    """value(context ids, whole response's ids) of each dialogue, one by one."""
    found = []
    for dialogue in dialogues:
        context = tokenizer.encode_context(dialogue.context, max_source)
        response = [*tokenizer.encode(dialogue.response), 1]
        with torch.no_grad():
            found.append(value(torch.tensor([context]), torch.tensor([response])))
    return found


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A run that trains on 8 tokens of a response: (folder, figures, lengths, targets)."""
    learnt, targets = [], []
    loss_sum, find_targets = t5_small.T5.loss_sum, emprl.find_targets

    def watched_loss(model, source, response):
        if torch.is_grad_enabled():
            learnt.append(response.shape[1])
        return loss_sum(model, source, response)

    def watched_targets(*arguments):
        targets.append(find_targets(*arguments))
        return targets[0]

    folder = tmp_path_factory.mktemp("short") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(t5_small.T5, "loss_sum", watched_loss)
        patch.setattr(emprl, "find_targets", watched_targets)
        patch.setattr(emprl, "draw_plots", lambda *_: {})
        settings = ["data.max_target=8", "ppo.ptx_coef=0.5", "pretrain.task=turns"]
        metrics = smoke(folder, *settings, "ppo.steps=2")
    return folder, metrics, learnt, targets[0]


def test_human_responses_are_cut_for_training(short):
    _, _, learnt, _ = short
    assert len(learnt) == 4 + 12 + 2 * 2, "pre-training, MLE, and PPO's two minibatches twice"
    assert max(learnt) == 8


def test_perplexities_are_of_whole_human_responses(short):
    folder, metrics, _, _ = short
    run = emprl.load_run(folder, "cpu")
    test = parts_of(run.run.config)["test"]
    count = sum(len(identifiers.words(dialogue.response)) + 1 for dialogue in test)
    for name, policy in run.policies.items():
        measured = of_each(test, run.run.tokenizer, 72, policy.loss_sum)
        losses, tokens = zip(*measured)
        loss = sum(x.item() for x in losses)  # in double precision
        assert metrics[name]["perplexity"] == pytest.approx(math.exp(loss / sum(tokens)))
        per_word = metrics[name]["perplexity_per_word"]
        assert per_word == pytest.approx(math.exp(loss / count))


def test_gold_levels_and_targets_are_of_whole_human_responses(short):
    folder, _, _, targets = short
    run = emprl.load_run(folder, "cpu")
    parts = parts_of(run.run.config)
    gold = [record["levels"] for record in read_lines(folder / "responses.jsonl")]
    assert [tuple(levels["oracle"]["human"]) for levels in gold] == [
        dialogue.levels for dialogue in parts["test"]
    ]
    for name, classifier in run.classifiers.items():

        def told(context, response, classifier=classifier):
            return classifier(context, response).argmax(-1)[0].tolist()

        read = of_each(parts["test"], run.run.tokenizer, 72, told)
        assert [levels[name]["human"] for levels in gold] == read
        if name == "identifiers":
            read = of_each(parts["train"], run.run.tokenizer, 72, told)
            assert targets.human.tolist() == read


def test_one_endless_response_does_not_make_the_perplexity_look_low(copied, tmp_path):
    """18,000 words among ten short responses: what is not scored is not counted."""
    short = {"context": ["My dog is sick."], "response": "I am so sorry to hear that."}
    long = {"context": ["My dog is sick."], "response": "so sad " * 9000}
    file = tmp_path / "long.jsonl"
    lines = [json.dumps(record) for record in [short] * 10 + [long]]
    file.write_text("\n".join(lines), encoding="utf-8")
    assert emprl.main(["evaluate", "--run", str(copied), "--data", str(file)]) == 0
    (written,) = copied.glob("evaluate-long-*.json")
    found = read_json(written)["mle"]
    assert found["perplexity_per_word"] >= found["perplexity"] > 50, (
        "a word is a token or more"
    )


class Letters:
    """A tokenizer: each letter is an id."""

    encode = staticmethod(lambda text: [5] * len(text))

    def encode_context(self, context, limit):
        return self.encode(context[0])

    def encode_response(self, text, limit):
        return self.encode(text)


def test_chunks_have_a_limit_of_memory():
    """Every row once, like lengths together; fewer long ones, an endless one alone."""
    lengths = [*range(1, 40), 900, 5000]
    dialogues = [data.Dialogue(("c",), "w" * (n - 1)) for n in lengths]
    pairs = data.Pairs(dialogues, Letters(), 10**6, 10**6)
    chunks = pairs.chunks(16, 1000)
    assert sorted(sum(chunks, [])) == list(range(41))
    assert chunks[-2:] == [[39], [40]]
    for rows in chunks[:-1]:
        assert len(rows) * max(lengths[row] for row in rows) <= 1000
    assert pairs.chunks(16, 10**6) == [[*range(16)], [*range(16, 32)], [*range(32, 41)]]


# ---- what the identifiers see, and the truth ------------------------------------------------


@pytest.fixture
def all_see_the_same(monkeypatch):
    """Every classifier tells what the identifiers tell."""
    levels = emprl.Evaluator.levels

    def same_for_all(test, responses):
        tables = levels(test, responses)
        return dict.fromkeys(tables, tables["identifiers"])

    monkeypatch.setattr(emprl.Evaluator, "levels", same_for_all)


def without_oracle(monkeypatch):
    """The generated world, whose rule nobody knows."""
    world = data.generated_corpus

    def unknown(*sizes):
        corpus = world(*sizes)
        corpus.level_probs = {}
        for part, dialogues in corpus.dialogues.items():
            corpus.dialogues[part] = [replace(d, levels=None) for d in dialogues]
        return corpus

    monkeypatch.setattr(data, "generated_corpus", unknown)


def heights(figure):
    """{label: heights} of a picture's lines."""
    return {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].lines}


def bands(figure):
    """The lower and upper ends of a picture's bands, from left to right: [[low, high, ...]]."""
    found = []
    for band in figure.axes[0].collections:
        ends = {}
        for x, y in band.get_paths()[0].vertices.tolist():
            ends.setdefault(x, []).append(y)
        one = []
        for x in sorted(ends):
            one += [min(ends[x]), max(ends[x])]
        found.append(one)
    return found


def of_eight_contexts(shares):
    """p -+ 1.96 (p (1 - p) / 8)^0.5, one after the other."""
    ends = []
    for share in shares:
        half = 1.96 * math.sqrt(share * (1 - share) / 8)
        ends += [share - half, share + half]
    return ends


@pytest.mark.parametrize("truth", ["oracle", "judge"])
def test_the_learnt_and_the_true_are_of_one_kind(
    truth, tmp_path, monkeypatch, all_see_the_same
):
    """In the log, the picture and the replies: shares of replies with all three levels right.

    Where all classifiers see the same the two are equal, however unsure the identifiers are.
    The corpus has fewer contexts to validate on than the setting asks for.
    """
    if truth == "judge":
        without_oracle(monkeypatch)
    figure = Figure()
    drawn = {lambda _, *seen: emprl.draw_learnt_vs_truth(figure, *seen): ""}
    monkeypatch.setattr(emprl, "PICTURES", drawn)
    metrics = smoke(tmp_path, "data.num_valid=8", "ppo.valid_contexts=100")
    by_learnt, by_true, floor, ceiling = heights(figure).values()

    log = read_lines(tmp_path / "metrics.jsonl")
    points = [record["start"] for record in log if "start" in record]
    points += [record for record in log if "valid_exact_match" in record]
    assert len(points) == 4, "MLE, and after iterations 1, 2 and 4"
    learnt = [record["valid_exact_match"] for record in points]
    true = [record[f"valid_{truth}_exact_match"] for record in points]
    assert learnt == true == by_learnt == by_true

    found = read_lines(tmp_path / "responses.jsonl")
    right = [r["levels"][truth]["emprl"] == r["levels"][truth]["human"] for r in found]
    for name in ("exact_match", f"{truth}_exact_match"):
        assert metrics["emprl"][name] == sum(right) / len(right)
    assert list(heights(figure))[1].startswith(truth)
    assert bands(figure)[0] == pytest.approx(of_eight_contexts(learnt))
    assert set(floor) == {metrics["floors"]["majority"][f"{truth}_exact_match"]}
    balanced = metrics["ceiling"]["context_balanced"]
    assert set(ceiling) == {balanced[f"{truth}_exact_match"]}
