"""Figures are what their label says: each from a run of the smallest preset, or by hand."""

import json
import math

import pytest
import torch

import ablate
import data
import emprl
import finished
import identifiers
import ppo
import publish
import t5_small


def smoke(folder, *settings):
    """The metrics of a run of `smoke` with some settings."""
    return emprl.run_all(emprl.Run(folder, emprl.make_config("smoke", settings=settings)))


def weights(folder):
    return t5_small.load_state(folder / "pytorch_model.bin")


def test_without_a_validation_the_last_weights_stay(tmp_path):
    """Pre-training has nothing to validate by: how often it would makes no difference."""
    for every in (2, 6):
        settings = [f"pretrain.eval_every={every}", "sft.steps=0", "ppo.steps=0"]
        smoke(tmp_path / str(every), "pretrain.steps=6", *settings)
    often, once = (weights(tmp_path / str(every) / "sft") for every in (2, 6))
    assert all((often[name] == once[name]).all() for name in once)
    logs = [
        (tmp_path / str(every) / "metrics.jsonl").read_text(encoding="utf-8")
        for every in (2, 6)
    ]
    assert logs[0] == logs[1] and logs[0].count('"pretrain"') == 6


# ---- kl


FAR = (
    "ppo.lr=0.5 ppo.steps=2 ppo.warmup=0 ppo.kl_coef=0 ppo.max_update_kl=1e9 ppo.max_ratio=1e9"
)
SAMPLINGS = [
    [],
    ["temperature=0.5", "top_k=5", "min_length=4"],
    ["temperature=1.5", "top_p=0.6"],
]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_kl_is_that_of_the_distribution_sampled_from(sampling, tmp_path):
    """As PPO's log has it, worked out anew by a rollout to the same contexts; and never far below 0."""
    both = [f"{part}.{x}" for part in ("sampling", "replying") for x in sampling]
    metrics = smoke(tmp_path, *FAR.split(), *both)
    run, tokenizer, _, models = finished.load_run(tmp_path)
    c = run.config.data
    corpus = data.embedded_corpus(0, c.num_train, c.num_valid, c.num_test, c.num_labelled)
    pairs = data.Pairs(corpus.dialogues["test"], tokenizer, c.max_source, c.max_target)
    policy = ppo.Policy(models["emprl"])
    (rows,) = pairs.chunks(128)
    run.seed("evaluate emprl")
    r = ppo.rollout(
        policy,
        models["sft"],
        lambda source, ids, index: index.float(),
        pairs.batch(rows)[0],
        torch.tensor(rows),
        run.config.sampling,
    )
    expected = ppo.kl_estimate(r.log_probs, r.ref_log_probs).sum(1).mean().item()
    assert expected > 0.3, "no distance: the test is blind"
    assert metrics["emprl"]["kl"] == pytest.approx(expected, rel=1e-3)
    assert metrics["sft"]["kl"] == 0


def test_greedy_replies_have_no_kl(tmp_path):
    """Null in metrics.json, blank in the table; the bound of the best of n stays."""
    metrics = smoke(tmp_path, "ppo.steps=0")
    assert metrics["sft_greedy"]["kl"] is metrics["emprl_greedy"]["kl"] is None
    (row,) = (
        line
        for line in (tmp_path / "report.md").read_text(encoding="utf-8").splitlines()
        if "| kl |" in line
    )
    assert [cell.strip() for cell in row.split("|")[4:7]] == ["0.000", "", ""], row
    assert metrics["best_of_n"]["kl"] > 0


# ---- what is read in human responses, and measured on them


def test_human_responses_are_cut_for_training_only(tmp_path, monkeypatch):
    """Training sees 8 tokens of a response; targets, gold levels and perplexities are of the whole text."""
    learnt, plain = [], t5_small.T5.loss_sum

    def spy(self, source, response):
        if torch.is_grad_enabled():
            learnt.append(response.shape[1])
        return plain(self, source, response)

    monkeypatch.setattr(t5_small.T5, "loss_sum", spy)
    settings = ["data.max_target=8", "ppo.ptx_coef=0.5", "pretrain.task=turns", "ppo.steps=2"]
    metrics = smoke(tmp_path, *settings)
    assert len(learnt) == 4 + 12 + 2 * 2 and max(learnt) == 8
    run, tokenizer, readers, models = finished.load_run(tmp_path)
    c = run.config.data
    corpus = data.embedded_corpus(0, c.num_train, c.num_valid, c.num_test, c.num_labelled)
    test, train = corpus.dialogues["test"], corpus.dialogues["train"]

    def one_by_one(dialogues, value):
        found = []
        for d in dialogues:
            context = torch.tensor([tokenizer.encode_context(d.context, c.max_source)])
            response = torch.tensor([[*tokenizer.encode(d.response), 1]])
            with torch.no_grad():
                found.append(value(context, response))
        return found

    for system in ("sft", "emprl"):
        losses, tokens = zip(*one_by_one(test, models[system].loss_sum))
        loss = sum(x.item() for x in losses)  # in double precision
        assert metrics[system]["perplexity"] == pytest.approx(math.exp(loss / sum(tokens)))
        count = sum(len(identifiers.words(d.response)) + 1 for d in test)
        per_word = metrics[system]["perplexity_per_word"]
        assert per_word == pytest.approx(math.exp(loss / count))
    records = map(
        json.loads, (tmp_path / "responses.jsonl").read_text(encoding="utf-8").splitlines()
    )
    gold = [r["levels"] for r in records]
    assert [tuple(levels["oracle"]["target"]) for levels in gold] == [d.levels for d in test]
    for name, reader in zip(("identifiers", "judge"), readers):
        read = one_by_one(test, lambda *ids: reader(*ids).argmax(-1)[0].tolist())
        assert [levels[name]["target"] for levels in gold] == read
    targets = t5_small.load_state(tmp_path / "checkpoints" / "label.pt")["train"]
    read = one_by_one(train, lambda *ids: readers[0](*ids).argmax(-1)[0].tolist())
    assert targets.tolist() == read


def test_one_endless_response_does_not_make_the_perplexity_look_low(tmp_path, capsys):
    """18,000 words among ten short responses: what is not scored is not counted."""
    smoke(tmp_path, "ppo.steps=0")
    short = {"context": ["My dog is sick."], "response": "I am so sorry to hear that."}
    long = {"context": ["My dog is sick."], "response": "so sad " * 9000}
    file = tmp_path / "long.jsonl"
    file.write_text("\n".join(json.dumps(x) for x in [short] * 10 + [long]), encoding="utf-8")
    assert emprl.main(["evaluate", "--run", str(tmp_path), "--data", str(file)]) == 0
    (written,) = tmp_path.glob("evaluate-long-*.json")
    found = json.loads(written.read_text(encoding="utf-8"))["sft"]
    assert found["perplexity_per_word"] >= found["perplexity"] > 50, (
        "a word has a token or more"
    )


def test_lots_have_a_limit_of_memory():
    """Every row once, like lengths together; long ones in smaller lots, an endless one alone."""

    class Words:
        encode = staticmethod(lambda text: [5] * len(text))
        eos_id = 1

        def encode_context(self, context, limit):
            return self.encode(context[0])

        def encode_response(self, text, limit):
            return self.encode(text)

    lengths = [*range(1, 40), 900, 5000]
    dialogues = [data.Dialogue(("c",), "w" * (n - 1)) for n in lengths]
    pairs = data.Pairs(dialogues, Words(), 10**6, 10**6)
    lots = pairs.chunks(16, 1000)
    assert sorted(sum(lots, [])) == list(range(41)) and lots[-2:] == [[39], [40]]
    assert all(len(lot) * max(lengths[i] for i in lot) <= 1000 for lot in lots[:-1])
    assert pairs.chunks(16, 10**6) == [[*range(16)], [*range(16, 32)], [*range(32, 41)]]


# ---- what the identifiers see, and the truth


@pytest.mark.parametrize("truth", ["oracle", "judge"])
def test_the_learnt_and_the_true_are_of_one_kind(truth, tmp_path, monkeypatch):
    """In the log, the picture and the ablations: shares of replies with all three levels right, by either reader. With readers
    that see the same the two are equal, however unsure the identifiers are."""
    pictures = []
    monkeypatch.setattr(
        emprl, "draw_plots", lambda run, metrics, e: pictures.append(e.matches)
    )
    if truth == "judge":  # a world without an oracle
        world = data.embedded_corpus

        def blind(*sizes):
            (corpus := world(*sizes)).level_probs = {}
            return corpus

        monkeypatch.setattr(data, "embedded_corpus", blind)
    seen = emprl.Evaluation.levels

    def same_for_all(self, responses):
        tables = seen(self, responses)
        return dict.fromkeys(tables, tables[""])

    monkeypatch.setattr(emprl.Evaluation, "levels", same_for_all)
    metrics = smoke(tmp_path)
    learnt, true = pictures[0]
    log = [
        json.loads(line)
        for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    checked = [record for record in log if f"valid_{true}" in record]
    assert truth in true and len(checked) == 2
    assert all(r[f"valid_{learnt}"] == r[f"valid_{true}"] for r in checked)
    after = ablate.figures_of(metrics)
    assert after["match, identifiers"] == after["match, truth"] == metrics["emprl"][true]
    records = map(
        json.loads, (tmp_path / "responses.jsonl").read_text(encoding="utf-8").splitlines()
    )
    right = [r["levels"][truth]["emprl"] == r["levels"][truth]["target"] for r in records]
    assert metrics["emprl"][true] == sum(right) / len(right)


# ---- intervals over seeds


def test_shared_contexts_are_drawn_jointly():
    """Three seeds with the same replies to the same contexts tell no more than one of them; with contexts of their own three times
    as much: an interval narrower by the root of 3."""
    g = torch.Generator().manual_seed(0)
    gold, before = torch.randint(3, (2, 400, 3), generator=g)
    after = torch.where(torch.rand(400, 3, generator=g) < 0.3, gold, before)
    one = (gold, before, after)

    def width(runs, shared):
        found = publish.gain_over_seeds(runs, "emp_f1", shared)
        assert found["relative"] == pytest.approx(alone["relative"])
        assert found["low"] < found["relative"] < found["high"]
        return found["high"] - found["low"]

    alone = identifiers.paired_bootstrap(before, after, gold, gold)
    single = width([one], True)
    assert single == pytest.approx(alone["high"] - alone["low"], rel=0.1)
    assert width([one] * 3, True) == pytest.approx(single, rel=0.1)
    assert width([one] * 3, False) == pytest.approx(single / 3**0.5, rel=0.1)


def test_the_interval_is_also_over_seeds():
    """One seed of two gains nothing, the other all: the interval reaches from one to the other."""
    gold = torch.arange(300).view(100, 3) % 3
    wrong = (gold + (torch.arange(3) == 0)) % 3  # one mechanism of three
    for shared in (True, False):
        runs = [(gold, wrong, gold), (gold, wrong, wrong)]
        found = publish.gain_over_seeds(runs, "emp_f1", shared)
        assert found["low"] == pytest.approx(0) and found["high"] == pytest.approx(
            0.5, rel=0.1
        )
        assert found["relative"] == pytest.approx(0.25)
