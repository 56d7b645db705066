"""The lab: its arithmetic by hand and against real tensors; every command on tiny work."""

import ast
import json
import math
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import emprl
import identifiers
import ppo
import t5_small
from data import Corpus, DataError, Dialogue, Pairs, Tokenizer
from ppo import PPOConfig, PPOTrainer, Prompts
from t5_small import T5, Sampling, T5Config
from tests.conftest import check
from tests.lab import ablate, bench, blind, command, identify, mutate, tables
from tests.tools import ragged, tiny_config, tiny_t5


@pytest.fixture
def call(monkeypatch):
    """call(script, argument, ...) -> its exit code."""

    def start(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, arguments)])
        return command.start(script.main)

    return start


def test_errors_are_one_line(call, capsys, finished, tmp_path):
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "metrics.json").write_text("[]", encoding="utf-8")
    for script, words, arguments in (
        (ablate, "invalid choice", ["nothing", finished]),
        (ablate, "missing: no finished run", ["kl", "missing"]),
        (ablate, "of different seeds", ["kl", finished, finished]),
        (ablate, "no such folder", ["kl", finished, "--write", "missing/x.json"]),
        (tables, "cut/metrics.json: damaged", [tmp_path / "cut"]),
        (bench, "parts are step", ["speed"]),
        (bench, "from 1", ["--repeats", "0"]),
        (identify, "none: no such folder", ["--data", tmp_path / "none"]),
        (blind, "responses.jsonl", [tmp_path, "--sheet", "x"]),
        (blind, "--number is from 1", [finished, "--number", "0", "--sheet", "x"]),
        (blind, "--number is from 1", [finished, "--number", "-1", "--sheet", "x"]),
        (blind, "give --sheet FILE, or filled", [finished]),
        (
            blind,
            "no 'nobody'; it has human, mle",
            [finished, "--systems", "nobody", "--sheet", "x"],
        ),
        (blind, "no such folder", [finished, "--sheet", "missing/x"]),
    ):
        assert call(script, *arguments) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error
    assert [path.name for path in tmp_path.iterdir()] == ["cut"]


@pytest.mark.parametrize("script", [ablate, bench, blind, identify, mutate, tables])
def test_help_says_what_it_costs(script, call, capsys):
    with pytest.raises(SystemExit):
        call(script, "--help")
    assert "Cost: " in capsys.readouterr().out


# ---- ablate


def trainer_of(kind, ids, **settings):
    """A trainer whose rollouts are given: rows of ids, reward i + 1 for row i, no KL."""
    t5 = tiny_t5()
    config = PPOConfig(steps=2, batch_size=len(ids), minibatch_size=len(ids), **settings)
    source = torch.arange(3, 3 + len(ids))[:, None].repeat(1, 4)
    prompts = Prompts(source, source, ids)
    return kind(t5, None, lambda i: prompts, Sampling(max_length=6), config, lambda t5: {})


def given_rollout(returns, mask):
    """A Rollout of which only what an advantage is made of is there."""
    names = "source targets human ids support log_probs values ref_log_probs rewards".split()
    return ppo.Rollout(**dict.fromkeys(names), mask=mask, returns=returns)


def advantages_of(kind, totals):
    """The advantages that a rival gives to responses with these total rewards, (B, 2)."""
    mask = torch.tensor([[True, True]] * len(totals))
    mask[-1, 1] = False
    sampled = given_rollout(torch.tensor(totals)[:, None].repeat(1, 2), mask)
    seen = []

    class Watched(kind):
        pass

    trainer = Watched.__new__(Watched)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PPOTrainer, "update", lambda self, sampled: seen.append(sampled))
        trainer.update(sampled)
    return seen[0].advantages


def test_advantages_of_the_rivals_by_hand():
    """Totals 1, 3, 2, 2: mean 2, standard deviation (2/3)^0.5. The last response has one token."""
    high = 1.5**0.5
    plain = [[-high, -high], [high, high], [0.0, 0.0], [0.0, 0.0]]
    check("REINFORCE", advantages_of(ablate.Reinforce, [1.0, 3.0, 2.0, 2.0]), plain)
    two = [1.0, 3.0, 2.0, 2.0, 11.0, 13.0, 12.0, 12.0]
    check("GRPO: each context by itself", advantages_of(ablate.GRPO, two), plain + plain)


def test_a_group_answers_one_context(monkeypatch):
    monkeypatch.setattr(ppo, "rollout", lambda policy, ref, reward, prompts, s: prompts)
    ids = torch.arange(16).view(8, 2)
    trainer = trainer_of(ablate.GRPO, ids)
    prompts = trainer.rollout(trainer.prompts(0))
    assert prompts.source[:, 0].tolist() == [3] * 4 + [4] * 4
    assert prompts.human[:, 0].tolist() == [0] * 4 + [2] * 4


def test_the_best_of_n_by_hand(monkeypatch):
    """Two contexts, three samples each: rewards 1 3 2 and 2 0 5."""
    ids = torch.arange(12).view(6, 2)
    seen = []

    def generate(t5, source, sampling):
        seen.append(source[:, 0].tolist())
        return t5_small.Generation(ids, None, None, None)

    def reward(source, response, targets):
        assert torch.equal(response, ids)
        seen.append(targets[:, 0].tolist())
        return torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0, 5.0])

    monkeypatch.setattr(ablate, "generate", generate)
    source, targets = torch.tensor([[7], [8]]), torch.tensor([[1], [2]])
    best = ablate.best_of_n(None, reward, source, targets, None, 3)
    assert best.tolist() == [[2, 3], [10, 11]]
    assert seen == [[7, 7, 7, 8, 8, 8], [1, 1, 1, 2, 2, 2]]


WORDS = torch.tensor([[21, 22, 23], [24, 25, 26], [27, 28, 29]])


def test_a_told_t5_is_one_that_reads_three_words_more():
    """Levels 2, 0, 1 for the first context and 1, 1, 1 for the others; one context is shorter."""
    plain = tiny_t5()
    levels = torch.tensor([[2, 0, 1], [1, 1, 1], [1, 1, 1]])
    told = ablate.Told(plain, WORDS, lambda source: levels[: len(source)]).eval()
    source, response = ragged([6, 4, 6], high=20), ragged([5, 3, 4], high=20, seed=1)
    words = torch.tensor([[23, 24, 28], [22, 25, 28], [22, 25, 28]])
    longer = torch.cat([words, source], 1)
    wanted = plain.response_states(longer, response)
    assert torch.allclose(told.response_states(source, response), wanted, atol=1e-6)
    assert not torch.allclose(plain.response_states(source, response), wanted, atol=1e-2)
    greedy = Sampling(greedy=True, max_length=8)
    found = t5_small.generate(told, source, greedy)
    wanted = t5_small.generate(plain, longer, greedy)
    assert torch.equal(found.ids, wanted.ids)
    assert torch.allclose(found.log_probs, wanted.log_probs, atol=1e-5)

    assert told.state_dict().keys() == plain.state_dict().keys()


def test_in_training_it_reads_the_words_that_are_spoken():
    plain = tiny_t5()
    told = ablate.Told(plain, WORDS, lambda source: pytest.fail("asked")).train()
    told.spoken = torch.tensor([[0, 0, 0], [1, 2, 1], [2, 2, 2]])
    words = torch.tensor([[21, 24, 27], [22, 26, 28], [23, 26, 29]])
    source, response = ragged([6, 4, 6], high=20), ragged([5, 3, 4], high=20, seed=1)
    wanted, _ = plain.loss_sum(torch.cat([words, source], 1), response)
    assert told.loss_sum(source, response)[0].item() == pytest.approx(wanted.item(), rel=1e-6)


def rollout_of(kind, sampling):
    t5 = tiny_t5(vocab_size=60, d_model=32)
    source = torch.randint(3, 60, (6, 5))
    prompts = Prompts(source, source, source)
    config = PPOConfig(batch_size=6, minibatch_size=6)
    trainer = kind(
        t5, lambda s, r, t: torch.ones(6), lambda i: prompts, sampling, config, None
    )
    torch.manual_seed(1)
    return trainer, trainer.rollout(prompts)


def test_log_probs_recomputed_and_unfiltered():
    """The same within noise; without top-k and temperature a token is less likely than it was."""
    sampling = Sampling(temperature=0.9, top_k=5, max_length=8)
    _, plain = rollout_of(PPOTrainer, sampling)
    _, recomputed = rollout_of(ablate.Recomputed, sampling)
    trainer, unfiltered = rollout_of(ablate.Unfiltered, sampling)
    assert torch.equal(plain.ids, recomputed.ids) and torch.equal(plain.ids, unfiltered.ids)
    assert torch.allclose(plain.log_probs, recomputed.log_probs, atol=1e-5)
    assert unfiltered.log_probs.sum() < plain.log_probs.sum() - 10
    t5 = trainer.policy.t5
    logits = t5.logits(t5.response_states(plain.source, plain.ids)).log_softmax(-1)
    wanted = logits.gather(-1, plain.ids[..., None])[..., 0] * plain.mask
    assert torch.allclose(unfiltered.log_probs, wanted, atol=1e-5)

    # What the loss scores with is what the rollout was scored with: the ratio is 1.
    unfiltered.advantages = unfiltered.returns = torch.zeros_like(plain.log_probs)
    _, _, ratio_error = trainer.loss(unfiltered)
    assert ratio_error < 1e-4


def test_the_first_token_counts_for_nothing():
    trainer, sampled = rollout_of(ablate.WithoutFirstToken, Sampling(max_length=8))
    losses = []
    for first in (0.0, 9.0):
        sampled.advantages = torch.arange(sampled.ids.numel()).view(sampled.ids.shape) / 10.0
        sampled.returns = sampled.advantages.clone()
        sampled.advantages[:, 0] = sampled.returns[:, 0] = first
        losses.append(trainer.loss(sampled)[0].item())
    assert losses[0] == losses[1]
    trainer, plain = rollout_of(PPOTrainer, Sampling(max_length=8))
    plain.advantages, plain.returns = sampled.advantages, sampled.returns
    assert trainer.loss(plain)[0].item() != losses[1]


def test_every_variant_is_another_one():
    for variants in ablate.ABLATIONS.values():
        made = []
        for variant in variants.values():
            config = emprl.make_config("toy")
            for setting in (*ablate.SHORT.split(), *variant.settings.split()):
                emprl.apply_setting(config, setting)
            made.append((config, replace(variant, settings="")))
        assert all(made.count(one) == 1 for one in made)


TINY = "ppo.steps=2 ppo.warmup=1 ppo.batch_size=16 ppo.minibatch_size=8 eval.contexts=12"


@pytest.fixture
def short(monkeypatch, no_pictures):
    """Variants of next to no work; only the stage of PPO may be trained."""
    monkeypatch.setattr(ablate, "SHORT", TINY)
    monkeypatch.setattr(ablate, "plot", lambda *_: None)
    monkeypatch.setattr(emprl, "gflops", lambda threads: 50.0)
    loop = emprl.Run.loop

    def only_ppo(run, name, *arguments):
        assert name == "ppo", "all that comes before is the finished run's"
        return loop(run, name, *arguments)

    monkeypatch.setattr(emprl.Run, "loop", only_ppo)


@pytest.fixture
def counted(monkeypatch):
    """The folders in which something has been measured."""
    folders, run_all = [], emprl.run_all

    def watched(run, *arguments):
        folders.append(run.folder)
        return run_all(run, *arguments)

    monkeypatch.setattr(emprl, "run_all", watched)
    return folders


def figures(path):
    """{variant: figures} of a single run, as --write wrote them."""
    written = json.loads(path.read_text(encoding="utf-8"))
    return {variant: by_seed["0"] for variant, by_seed in written.items()}


@pytest.fixture
def few_details(thorough, monkeypatch):
    """Without --thorough only those that have a trainer of their own."""
    if not thorough:
        few = {"default": ablate.DEFAULT}
        for name, variant in ablate.ABLATIONS["details"].items():
            if variant.trainer is not PPOTrainer:
                few[name] = variant
        monkeypatch.setitem(ablate.ABLATIONS, "details", few)


@pytest.mark.usefixtures("short", "few_details")
def test_every_variant_runs_and_stays(copied, counted, call, tmp_path, capsys):
    file = tmp_path / "all.json"
    assert call(ablate, "algorithm", copied, "--write", file) == 0
    found = figures(file)
    assert list(found) == list(ablate.ABLATIONS["algorithm"])
    assert len(counted) == 4, "MLE, best of n and PPO are of one run"
    assert found["MLE"]["gain"] == 0 and found["best of n"]["KL"] > 0
    for one in found.values():
        assert all(math.isfinite(x) for x in one.values())
    out = capsys.readouterr().out
    assert all(f"| {variant} |" in out for variant in found)

    assert call(ablate, "details", copied) == 0
    count = 4 + len(ablate.ABLATIONS["details"]) - 1
    assert len(counted) == count >= 4 + 3, "the default is known"
    out = capsys.readouterr().out
    assert all(f"| {variant} |" in out for variant in ablate.ABLATIONS["details"])
    assert call(ablate, "details", copied) == 0 and len(counted) == count
    assert all(folder.parent == copied / "ablations" for folder in counted)
    assert (counted[0] / "responses.jsonl").exists(), "a variant's replies can be read"


def test_other_settings_are_measured(copied, short, counted, call, monkeypatch):
    monkeypatch.setitem(ablate.ABLATIONS, "reward", {"default": ablate.DEFAULT})
    assert call(ablate, "reward", copied) == 0 and len(counted) == 1
    monkeypatch.setattr(ablate, "SHORT", f"{TINY} ppo.lr=1e-3")
    assert call(ablate, "reward", copied) == 0 and len(counted) == 2


def test_other_runs_and_other_code_are_measured(
    copied, short, counted, call, monkeypatch, tmp_path
):
    monkeypatch.setitem(ablate.ABLATIONS, "reward", {"default": ablate.DEFAULT})
    assert call(ablate, "reward", copied) == 0 and len(counted) == 1
    assert call(ablate, "reward", copied) == 0 and len(counted) == 1

    project = tmp_path / "project"
    (project / "tests" / "lab").mkdir(parents=True)
    root = Path(emprl.__file__).parent
    for path in (*root.glob("*.py"), Path(ablate.__file__)):
        shutil.copy(path, project / path.relative_to(root))
    for module in (emprl, ablate):
        elsewhere = project / Path(module.__file__).relative_to(root)
        monkeypatch.setattr(module, "__file__", str(elsewhere))
    assert call(ablate, "reward", copied) == 0 and len(counted) == 1, "the same code elsewhere"
    (project / "ppo.py").write_text("changed", encoding="utf-8")
    assert call(ablate, "reward", copied) == 0 and len(counted) == 2
    (project / "tests" / "lab" / "ablate.py").write_text("changed", encoding="utf-8")
    assert call(ablate, "reward", copied) == 0 and len(counted) == 3

    metrics = json.loads((copied / "metrics.json").read_text(encoding="utf-8"))
    metrics["made_of"]["ppo"] = "another run"
    (copied / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    assert call(ablate, "reward", copied) == 0 and len(counted) == 4


def test_a_variants_figures_that_are_cut_are_named(
    copied, short, call, monkeypatch, capsys, tmp_path
):
    monkeypatch.setitem(ablate.ABLATIONS, "reward", {"default": ablate.DEFAULT})
    assert call(ablate, "reward", copied) == 0
    (file,) = copied.glob("ablations/*/metrics.json")
    file.write_bytes(file.read_bytes()[:-10])
    capsys.readouterr()
    assert call(ablate, "reward", copied) == 2
    error = capsys.readouterr().err
    assert f"{file}: damaged; delete it" in error and error.count("\n") == 1
    file.unlink()
    assert call(ablate, "reward", copied) == 0, "measured again"


def test_checkpoints_of_another_run_are_refused(copied, short, call, capsys):
    metrics = json.loads((copied / "metrics.json").read_text(encoding="utf-8"))
    metrics["config"]["mle"]["lr"] = 1.0
    (copied / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    assert call(ablate, "kl", copied) == 2
    error = capsys.readouterr().err
    assert re.search(r"(pretrain|mle)\.pt: of (an)?other", error), error
    assert error.count("\n") == 1, error


def test_interrupted_it_goes_on(copied, short, counted, call, monkeypatch, capsys):
    two = {"default": ablate.DEFAULT, "lambda": ablate.Variant("ppo.lam=0.5")}
    monkeypatch.setitem(ablate.ABLATIONS, "reward", two)
    run_all = emprl.run_all

    def interrupted(run, *arguments):
        if len(counted) == 1:
            raise KeyboardInterrupt
        return run_all(run, *arguments)

    monkeypatch.setattr(emprl, "run_all", interrupted)
    assert call(ablate, "reward", copied) == 130
    assert "the same command goes on" in capsys.readouterr().err
    monkeypatch.setattr(emprl, "run_all", run_all)
    assert call(ablate, "reward", copied) == 0 and len(counted) == 2


def test_the_ideal_keeps_to_the_perplexity(copied, short, call, monkeypatch, tmp_path):
    monkeypatch.setattr(PPOTrainer, "step", lambda *_: pytest.fail("no PPO is needed"))
    monkeypatch.setattr(ablate, "TRIES", 6)
    monkeypatch.setattr(ablate.Ideal, "sampled", {})
    times = (1.0001, 1.01, 1.2)
    variants = {}
    for one in times:
        variants[str(one)] = ablate.Variant("ppo.steps=0", system="best_of_n", times=one)
    monkeypatch.setitem(ablate.ABLATIONS, "ideal", variants)
    assert call(ablate, "ideal", copied, "--write", tmp_path / "all.json") == 0
    found = list(figures(tmp_path / "all.json").values())
    assert [one["perplexity, times"] for one in found] == pytest.approx(times, rel=1e-6)
    kl = [one["KL"] for one in found]
    assert 0 < kl[0] < kl[1] < kl[2] < math.log(6) + 1e-6, "at most that of the best of 6"
    assert len(ablate.Ideal.sampled) == 1, "sampled once"


def test_the_rivals_stand_beside_the_runs_own(
    copied, short, counted, call, monkeypatch, tmp_path
):
    monkeypatch.setattr(PPOTrainer, "step", lambda *_: pytest.fail("no PPO is needed"))
    monkeypatch.setattr(ablate, "TRIES", 3)
    monkeypatch.setattr(ablate.Ideal, "sampled", {})
    assert call(ablate, "rivals", copied, "--write", tmp_path / "all.json") == 0
    found = figures(tmp_path / "all.json")
    metrics = json.loads((copied / "metrics.json").read_text(encoding="utf-8"))
    for name, system in (("MLE", "mle"), ("best of n", "best_of_n"), ("EmpRL", "emprl")):
        assert found[name]["bits, judge"] == metrics[system]["judge_mutual_information"]
        assert found[name]["perplexity a word"] == metrics[system]["perplexity_per_word"]
    assert found["human"] == {
        "Dist-2": metrics["human"]["dist2"],
        "distinct": metrics["human"]["unique"],
        "words": metrics["human"]["length"],
    }
    assert found["EmpRL"]["seconds of training"] == metrics["seconds"]["ppo"]
    mle = found["MLE"]["perplexity a word"]
    ideal = found["ideal, perplexity times 1.1"]
    assert ideal["perplexity"] == pytest.approx(1.1 * metrics["mle"]["perplexity"], rel=1e-3)
    assert ideal["perplexity a word"] > mle
    for rival in ("MLE on best of n", "MLE, told the levels"):
        assert found[rival]["perplexity a word"] != mle
        assert found[rival]["KL"] > 0 and found[rival]["seconds of training"] >= 0
    assert len(counted) == 4, "human, MLE, best of n and EmpRL are of one run"


@pytest.fixture
def told(copied, short, call, monkeypatch):
    """What is seen of MLE that is told its levels: its trainer, its batches, PPO's targets."""
    seen = {"batches": []}
    find_targets, loss_sum = emprl.find_targets, T5.loss_sum

    def watched_targets(run, mle, classifier, pairs):
        seen["test"] = pairs["test"]
        seen["targets"] = find_targets(run, mle, classifier, pairs)
        return seen["targets"]

    def watched_loss(t5, source, response):
        if t5.training:
            seen["batches"].append((source, response, t5.spoken))
        return loss_sum(t5, source, response)

    def watched_trainer(run, mle, reward, *others):
        seen["run"], seen["reward"] = run, reward
        seen["t5"] = (trainer := ablate.told_trainer(run, mle, reward, *others)).model
        return trainer

    monkeypatch.setattr(emprl, "find_targets", watched_targets)
    monkeypatch.setattr(T5, "loss_sum", watched_loss)
    variant = ablate.Variant("reward.balance=0.6", rival=watched_trainer)
    monkeypatch.setitem(ablate.ABLATIONS, "algorithm", {"told": variant})
    assert call(ablate, "algorithm", copied) == 0
    return seen


def test_in_training_it_is_told_the_levels_of_the_human_response(told):
    words = told["t5"].words
    assert words.min() >= told["run"].tokenizer.num_pieces, "no text has these ids"
    assert len(set(words.flatten().tolist())) == 9
    assert len(told["batches"]) == round(ablate.TOLD_RESPONSES * 2 * 16 / 8)
    for source, response, spoken in told["batches"]:
        levels = told["reward"].identifiers(source, response).argmax(-1)
        assert torch.equal(spoken, levels)


def test_in_replies_it_is_told_the_likeliest_levels_that_ppo_aims_for(told):
    source, _ = told["test"].batch(range(len(told["test"])))
    assert torch.equal(told["t5"].levels_of(source), told["targets"].test.argmax(-1))


def test_figures_of_draws_are_those_of_the_drawn_levels():
    torch.manual_seed(0)
    levels = torch.randint(0, 3, (4, 50, 3))
    gold = torch.randint(0, 3, (50, 3))
    one = torch.randint(0, 4, (50,))
    plain = identifiers.compare_levels(levels[one, torch.arange(50)], gold)
    assert ablate.drawn_figures(levels, one[:, None], gold) == pytest.approx(plain)
    half = ablate.drawn_figures(levels, torch.tensor([[0, 1]]).repeat(50, 1), gold)
    twice = identifiers.compare_levels(levels[:2].flatten(0, 1), torch.cat([gold, gold]))
    assert half == pytest.approx(twice), "every context twice, once with each"


def test_the_picture_is_drawn(tmp_path):
    row = {"KL": 1.0, "all three right, identifiers": 0.4, "all three right, judge": 0.4}
    ablate.plot({"one": row, "other": row | {"KL": 2.0}}, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


# ---- bench: arithmetic

LITTLE = tiny_config(vocab_size=300, num_layers=1, num_decoder_layers=1)


def middling(**changes):
    """A T5 small enough to run, and large enough that what the arithmetic leaves out is little."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 1000, "d_model": 64, "d_kv": 16, "d_ff": 256}
    return T5(T5Config(**{**sizes, "num_decoder_layers": 3, **changes})).train()


def test_official_sizes():
    """The parameters of t5-small and t5-base, as everyone counts them."""
    with torch.device("meta"):
        assert bench.parameter_count(T5(bench.SMALL)) == 60_506_624
        assert bench.parameter_count(T5(bench.BASE)) == 222_903_552


def test_bytes_of_weights_gradients_and_optimizer():
    model = T5(LITTLE)
    optimizer = t5_small.Optimizer(model)
    model.loss_sum(*bench.random_batch(LITTLE, 4, 40, 24))[0].backward()
    gradients = [p.grad for p in model.parameters()]
    found = {"weights": size(model.parameters()), "gradients": size(gradients)}
    optimizer.step()
    (adam,) = optimizer.parts
    found["AdamW"] = 0
    for state in adam.state.values():
        found["AdamW"] += size([state["exp_avg"], state["exp_avg_sq"]])
    count = bench.parameter_count(model)
    assert found == {"weights": 4 * count, "gradients": 4 * count, "AdamW": 8 * count}
    assert sum(found.values()) + 2 * count == bench.TRAINED * count


def size(tensors):
    return sum(x.numel() * x.element_size() for x in tensors)


def saved_bytes(model, forward):
    """Bytes of all that autograd keeps of forward(), but for the weights."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept, alive = {}, []

    def pack(x):
        alive.append(x)  # so that no address is used twice
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        forward()
    return sum(n for address, n in kept.items() if address not in own)


def bf16(device):
    return torch.autocast("cpu", torch.bfloat16)


def dropout_of_a_gpu(self, x):
    """It keeps a mask of bytes, a CPU's one of floats."""
    return torch.native_dropout(x, self.p, True)[0] if self.training else x


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(t5_small, "autocast", bf16)
    monkeypatch.setattr(ppo, "autocast", bf16)
    monkeypatch.setattr(torch.nn.Dropout, "forward", dropout_of_a_gpu)
    monkeypatch.setattr(t5_small.Dropout, "forward", dropout_of_a_gpu)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_activation_bytes_within_a_tenth():
    """If it fails after a change of t5_small.py or ppo.py: correct activation_bytes."""
    model = middling(dropout_rate=0.1)
    source, target = bench.random_batch(model.config, 8, 40, 24)
    copies = 2 * bench.parameter_count(model)  # of the weights, in bf16
    found = saved_bytes(model, lambda: model.loss_sum(source, target))
    logits = 24 * model.config.vocab_size
    expected = 8 * (bench.activation_bytes(model.config, 40, 24) + 4 * logits)
    assert found == pytest.approx(copies + expected, rel=0.1)

    # PPO has no dropout, so it needs less.
    model.eval()
    mask = torch.ones_like(target, dtype=torch.bool)
    support = torch.rand(*target.shape, model.config.vocab_size) < 0.5
    asked = (model, source, target, mask, support, 1.0)
    found = saved_bytes(model, lambda: ppo.response_log_probs(*asked))
    expected = 8 * (bench.activation_bytes(model.config, 40, 24) + 9 * logits)
    assert 0.7 * expected < found - copies < expected


def test_cache_bytes():
    model = middling()
    source = torch.ones(2, 7, dtype=torch.long)
    kept, made = [], t5_small.BlockCache

    class Watched(made):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            kept.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(t5_small, "BlockCache", Watched)
        t5_small.generate(model, source, Sampling(min_length=5, max_length=5))
    found = sum(size([*cache.memory, cache.keys, cache.values]) for cache in kept)
    assert 2 * 2 * bench.cache_bytes(model.config, 7, 5) == found  # fp32 here, two rows


def test_plan_says_what_is_needed(call, capsys):
    assert call(bench, "--plan") == 0
    out = capsys.readouterr().out
    assert out.index("t5-small, paper as it is") < out.index("t5-base, paper as it is")
    needed = re.findall(r"\| (\S+) \|$", out, re.M)  # the last column: all
    assert needed.count("all") == 2
    assert max(float(gib) for gib in needed if gib[0].isdigit()) < 12, "a consumer's card"
    assert "By arithmetic" in out
    config = emprl.make_config("paper", 0, ".", ".")
    stages = bench.stages(config, bench.BASE)
    ppo, validation = stages["PPO"], stages["validation"]
    assert ppo["trained"] == bench.TRAINED * 222_903_552
    assert ppo["activations"] >= 20 * 32 * 30 * 32128, "all logits of the reference"
    six_encoders = 4 * 6 * 109_628_544
    assert six_encoders < ppo["held"] - 4 * 222_903_552 < 1.05 * six_encoders
    assert validation["held"] - ppo["held"] == ppo["held"] - 4 * 222_903_552, "the judge's"


# ---- bench: measuring


def test_works_take_turns(monkeypatch):
    calls, clock = [], iter(range(100))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock) ** 2)
    works = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    found = bench.medians(works, 3)
    assert calls == ["a", "b"] * 4
    # Calls 0 to 7 take 4 n + 1 seconds; the first of each is not counted.
    assert found == {"a": 17_000, "b": 21_000}


class Here:
    """In the place of another process, which would import torch anew."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *arguments):
        self.answer = function(*arguments)
        return self

    def result(self):
        return self.answer


def test_every_part_runs(call, monkeypatch, tmp_path, capsys):
    some = bench.random_batch
    monkeypatch.setattr(bench, "SIZES", {"tiny": LITTLE, "small": LITTLE})
    monkeypatch.setattr(bench, "random_batch", lambda config: some(config, 4))
    for work in bench.WORK.values():
        monkeypatch.delitem(work, "transformers", raising=False)
    monkeypatch.setattr(bench, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(emprl, "gflops", lambda threads: 50.0)
    assert call(bench, "--repeats", 1, "--write", tmp_path / "bench.json") == 0
    found = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    assert list(found) == ["machine", *bench.PARTS]
    assert found["machine"]["GFLOP/s, one thread"] == 50.0
    assert found["step"]["step, small"]["EmpRL, ms"] > 0
    assert found["memory"]["sample, tiny"]["EmpRL, MiB"] > 100
    out = capsys.readouterr().out
    for part in bench.PARTS:
        assert all(f"| {row} |" in out for row in found[part])


def test_ratios():
    row = bench.with_ratios({"EmpRL": 2.0, "transformers": 3.0}, "ms")
    assert row == {"EmpRL, ms": 2.0, "transformers, ms": 3.0, "transformers / EmpRL": 1.5}


# ---- identify


def labelled(count):
    """One word tells ER, another IP; EX is always 0."""
    words = [("cat", "table"), ("sorry", "chair"), ("grief", "window")]
    dialogues = []
    for i in range(count):
        text = f"well {words[i % 3][0]} and {words[i % 2][1]} {'so ' * (i % 5)}".strip()
        dialogues.append(Dialogue(("we met there",), text, levels=(i % 3, i % 2, 0)))
    return dialogues


def test_the_n_grams_read_the_ids_of_preset_real(monkeypatch):
    def enough(texts, *size_and_kind):
        raise DataError(str(size_and_kind))

    corpus = Corpus({"train": []}, {"train": labelled(3), "judge_train": []}, [])
    monkeypatch.setattr(identify, "real_corpus", lambda *_: corpus)
    monkeypatch.setattr(Tokenizer, "train", enough)
    with pytest.raises(DataError) as error:
        identify.one_seed("DIR", 0)
    assert str(error.value) == "(5000, 'unigram')"


def test_ours_learn_what_a_word_tells():
    train, test = labelled(60), labelled(25)
    tokenizer = Tokenizer.train([d.response for d in train] + ["we met there"], 160)
    pairs = [Pairs(part, tokenizer, 20, 20) for part in (train, test)]
    assert torch.equal(identify.ours(*pairs), pairs[1].levels)


def test_the_baseline_learns_it_too():
    pytest.importorskip("sklearn")
    train, test = labelled(60), labelled(25)
    train[0] = replace(train[0], levels=(0, 0, 1))  # scikit-learn wants two classes
    told = identify.tf_idf(train, test)
    assert told[:, :2].tolist() == [list(d.levels[:2]) for d in test]


def test_without_scikit_learn_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.feature_extraction.text", None)
    with pytest.raises(DataError, match="pip install scikit-learn"):
        identify.tf_idf(labelled(6), labelled(6))


def test_figures_of_levels_and_their_summary():
    gold = torch.tensor([[0, 1, 2], [0, 1, 2], [1, 1, 0]])
    found = identify.figures_of(gold, gold)
    assert found["ER f1_1"] == found["EX accuracy"] == 1 and found["IP f1_0"] == 0
    other = identify.figures_of(gold.flip(0), gold)
    rows = identify.summary([{"ours": found}, {"ours": other}])
    assert rows["ER accuracy"]["ours"] == "0.667 (0.333)"


# ---- blind


def write_four(path, number):
    """Contexts of one to three turns with four replies, of which best of n's may be MLE's."""
    lines = []
    for i in range(number):
        mle = f"mle says {i}"
        replies = {"mle": mle, "best_of_n": mle if i % 3 == 0 else f"best says {i}"}
        replies["emprl"] = f"rl says {i}"
        context = ["My Dog\x1b[1m ran\naway.", "Oh?", f"Yes, {i}."][-1 - i % 3 :]
        record = {
            "id": f"c{i}",
            "context": context,
            "human": f"I See {i}!",
            "replies": replies,
        }
        lines.append(json.dumps(record) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path


def fill(text, ratings):
    """A sheet with ratings(item number, text of the reply) behind each of its open lines."""
    lines, texts = [], {}
    for line in text.splitlines():
        if re.match("[A-Z]: ", line):
            texts[line[0]] = line[3:]
        if re.fullmatch(r"\d+ [A-Z]", line):
            number, letter = line.split()
            line += " " + " ".join(map(str, ratings(int(number), texts[letter])))
        lines.append(line)
    return "\n".join(lines)


def by_system(number, text):
    """The same whoever the item is of; odd items have one more of fluency."""
    base = {"i": [4, 5, 5], "m": [2, 2, 1], "b": [2, 3, 1], "r": [3, 3, 4]}[text[0]]
    return [base[0] + number % 2, *base[1:]]


def test_a_sheet_tells_nothing_of_who_wrote_what(tmp_path, call, capsys):
    replies = write_four(tmp_path / "r.jsonl", 20)
    for name in ("one", "same"):
        assert call(blind, replies, "--number", 9, "--sheet", tmp_path / name) == 0
    text = (tmp_path / "one").read_text(encoding="utf-8")
    assert text == (tmp_path / "same").read_text(encoding="utf-8")
    assert call(blind, replies, "--number", 9, "--seed", 1, "--sheet", tmp_path / "other") == 0
    assert text != (tmp_path / "other").read_text(encoding="utf-8")
    assert "Content note: " in text.splitlines()[1] and '"17 B 4 3 2"' in text
    assert text.index("findahelpline.com") < text.index("# ---- 1")
    assert not re.search("emprl|best_of_n", text)
    assert "I See" not in text, "capitals are a person's"
    assert "\x1b" not in text and "> person: My Dog\\x1b[1m ran away." in text
    shown = re.findall(
        r"^(> person: My .*\n> listener: Oh\?\n)?> person: Yes, (\d+)", text, re.M
    )
    assert len(shown) >= 2 and text.count("# ---- ") == 9

    # A filled sheet is not written over.
    assert call(blind, replies, "--sheet", tmp_path / "one") == 2
    assert (tmp_path / "one").read_text(encoding="utf-8") == text


def test_every_reply_is_shown_once_in_an_order_by_chance(tmp_path, call):
    """Best of n's is not shown a second time where it is MLE's own."""
    replies = write_four(tmp_path / "r.jsonl", 9)
    assert call(blind, replies, "--sheet", tmp_path / "sheet") == 0
    text = (tmp_path / "sheet").read_text(encoding="utf-8")
    first_letters = set()
    for item in text.split("# ---- ")[1:]:
        found = re.findall(r"^([A-Z]): (.*)", item, re.M)
        said = [reply for _, reply in found]
        number = said[0].rstrip("!").split()[-1]
        wanted = {f"i see {number}!", f"mle says {number}", f"rl says {number}"}
        if int(number) % 3:
            wanted.add(f"best says {number}")
        assert set(said) == wanted and len(said) == len(wanted)
        assert [letter for letter, _ in found] == list("ABCD"[: len(wanted)])
        first_letters.add(said[0][0])
    assert len(first_letters) > 2


def test_answers_come_back_to_their_systems(tmp_path, call, capsys):
    replies = write_four(tmp_path / "r.jsonl", 4)
    assert call(blind, replies, "--sheet", tmp_path / "sheet") == 0
    text = (tmp_path / "sheet").read_text(encoding="utf-8")
    one = fill(text, by_system)
    (tmp_path / "ann.txt").write_text(one, encoding="utf-8")
    lines = [line for line in one.splitlines() if re.match(r"\d+ ", line)]
    own_file = "\r\n".join([text.splitlines()[0], "", *lines[::-1]])
    (tmp_path / "bob.txt").write_text(own_file, encoding="utf-8")
    written = tmp_path / "answers.json"
    files = tmp_path / "ann.txt", tmp_path / "bob.txt"
    capsys.readouterr()
    assert call(blind, replies, *files, "--write", written) == 0
    out = capsys.readouterr().out
    assert out.startswith("2 readers")
    # Fluency is 4, 5, 4, 5: mean 4.5, 1.96 * (1/3)^0.5 / 2 = 0.57.
    assert "| human | 4.50 (3.93 to 5.07) | 5.00 (5.00 to 5.00) |" in out
    assert "| human - mle | 2.00 (2.00 to 2.00) | 3.00 " in out
    assert "| emprl - mle | 1.00 (1.00 to 1.00) | 1.00 (1.00 to 1.00) | 3.00 " in out
    assert "| kappa | 1.00 | 1.00 | 1.00 |" in out

    raw = written.read_text(encoding="utf-8")
    found = json.loads(raw)
    assert found["readers"]["ann"] == found["readers"]["bob"]
    assert len(found["readers"]["ann"]) == 16, "an equal reply is rated once, and counts twice"
    same = [
        line.split()[2:] for line in found["readers"]["ann"] if re.match("c[03] [mb]", line)
    ]
    assert same[0] == same[1] and same[2] == same[3]
    assert " says " not in raw and "Yes" not in raw


@pytest.mark.parametrize(
    "line",
    [
        "1 A 4 3",
        "1 A 4 3 6",
        "1 A 4 0 3",
        "1 A four 3 2",
        "1 Z 4 3 2",  # no such reply
        "9 A 4 3 2",
        "1 B 1 1 1",  # rated twice
    ],
)
def test_a_bad_answer_is_named_by_its_line(line, tmp_path, call, capsys):
    replies = write_four(tmp_path / "r.jsonl", 2)
    assert call(blind, replies, "--sheet", tmp_path / "sheet") == 0
    first = (tmp_path / "sheet").read_text(encoding="utf-8").splitlines()[0]
    answers = tmp_path / "ann.txt"
    answers.write_text(f"{first}\n\n1 B 4 3 2\n{line}\n", encoding="utf-8")
    assert call(blind, replies, answers) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{answers}:4: {line!r}: ") and "as in '17 B 4 3 2'" in error
    assert error.count("\n") == 1

    answers.write_text("1 B 4 3 2\n", encoding="utf-8")
    assert call(blind, replies, answers) == 2
    assert f"{answers}:1: not a sheet of these replies" in capsys.readouterr().err
    answers.write_text(f"{first}\n1 B\n", encoding="utf-8")
    assert call(blind, replies, answers) == 2
    assert "no answers" in capsys.readouterr().err


def answers_of(rated, items=2, systems=("mle", "emprl")):
    """{(item, system): three numbers} -> a reader's answers, as blind.read_answers has them."""
    answers = torch.full((items, len(systems), 3), torch.nan)
    for (item, system), numbers in rated.items():
        answers[item - 1, systems.index(system)] = torch.tensor(numbers).float()
    return answers


def test_readers_means_and_differences_by_hand():
    """Item 1: MLE 2 and 4, EmpRL 5 and 5. Item 2: one reader; EmpRL is left out."""
    ann = answers_of({(1, "mle"): [2, 1, 1], (1, "emprl"): [5, 1, 1], (2, "mle"): [5, 3, 1]})
    bob = answers_of({(1, "mle"): [4, 1, 1], (1, "emprl"): [5, 2, 1]})
    rows = blind.table(torch.stack([ann, bob]), ["mle", "emprl"])
    # MLE's fluency: 3 and 5; standard deviation 2^0.5, so 4 +- 1.96.
    assert rows["mle"]["fluency"] == "4.00 (2.04 to 5.96)" and rows["mle"]["contexts"] == "2"
    assert rows["emprl"]["fluency"] == "5.00"
    difference = {"fluency": "2.00", "fit": "0.50", "empathy": "0.00", "contexts": "1"}
    assert rows["emprl - mle"] == difference


@pytest.mark.parametrize(
    "first, second, expected",
    [
        ([1, 2, 3], [1, 2, 3], 1),
        ([1, 5], [5, 1], -1),  # seen 16, by chance 8
        ([1, 2], [2, 3], 0.5 / 1.5),  # seen 1; by chance (1 + 4 + 0 + 1) / 4
        ([1, torch.nan, 2, 4], [2, 5, 3, torch.nan], 0.5 / 1.5),
        ([3, 3], [3, 3], torch.nan),
    ],
)
def test_weighted_kappa_by_hand(first, second, expected):
    readers = torch.tensor([first, second]).float()[:, :, None]  # who rate one question
    assert blind.weighted_kappa(*readers).item() == pytest.approx(expected, nan_ok=True)


def test_agreement_is_of_what_both_have_rated():
    ann = {(1, "mle"): [1, 3, 1], (2, "mle"): [5, 3, 1], (3, "mle"): [1, 1, 1]}
    bob = {(1, "mle"): [5, 3, 1], (2, "mle"): [1, 3, 2], (4, "mle"): [2, 2, 2]}
    cy = {(1, "mle"): [1, 2, 4], (2, "mle"): [5, 3, 1]}
    # Fluency: -1, 1, -1. Fit: none; then seen 1/2, by chance 1/2, twice. Empathy, twice
    # with ann 1 and 1, cy 4 and 1: seen 9/2, by chance 9/2; bob and cy: see below.
    readers = torch.stack([answers_of(one, items=4) for one in (ann, bob, cy)])
    found = blind.table(readers, ["mle", "emprl"])["kappa"]
    assert found["fluency"] == f"{-1 / 3:.2f}" and found["fit"] == "0.00"
    # bob 1, 2 and cy 4, 1: seen (9 + 1) / 2, by chance (9 + 0 + 4 + 1) / 4; ann and bob: 0.
    assert found["empathy"] == f"{(0 + 0 + 1 - 5 / 3.5) / 3:.2f}"


@pytest.mark.parametrize(
    "text, line",
    [
        ('{"id": "x"', ":1"),
        ("[]", ":1"),
        ('{"context": ["Hi"], "human": "Oh", "replies": {}, "id": ""}\n{"context": 3}', ":2"),
        ("\xff", ":1"),
    ],
)
def test_damaged_replies_are_one_line(tmp_path, text, line):
    path = tmp_path / "responses.jsonl"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError) as error:
        command.read_replies(path)
    assert str(error.value).startswith(f"{path}{line}: damaged")


# ---- tables


def test_the_interval_over_seeds_and_contexts():
    """EmpRL right everywhere, MLE in two mechanisms of three: no spread. Then one without gain."""
    human = torch.randint(0, 3, (60, 3), generator=torch.Generator().manual_seed(0))
    before = human.clone()
    before[:, 2] = (human[:, 2] + 1) % 3
    for kind in ("weighted_f1", "macro_f1"):
        for shared in (True, False):
            runs = [(human, before, human)] * 3
            ends = tables.interval_over_seeds(runs, kind, shared, 200)
            assert ends == pytest.approx([0.5, 0.5], abs=1e-5)
    runs = [(human, before, human)] * 2 + [(human, human, human)]
    low, high = tables.interval_over_seeds(runs, "weighted_f1", True)
    assert low == pytest.approx(0, abs=1e-5), "three times the seed without gain"
    assert high == pytest.approx(0.5, abs=1e-5)


def test_shared_contexts_are_drawn_jointly():
    """An easy context is easy for all: the interval is as wide as that of a single seed."""
    generator = torch.Generator().manual_seed(0)
    human = torch.randint(0, 3, (50, 3), generator=generator)
    right = torch.rand(50, 1, generator=generator) < 0.5
    after = torch.where(right, human, (human + 1) % 3)
    before = torch.where(right.flip(0), human, (human + 1) % 3)
    widths = {}
    for count, shared in ((1, True), (4, True), (4, False)):
        runs = [(human, before, after)] * count
        low, high = tables.interval_over_seeds(runs, "weighted_f1", shared)
        widths[count, shared] = high - low
    assert widths[4, True] == pytest.approx(widths[1, True], rel=0.1)
    assert widths[4, False] < 0.8 * widths[1, True]


def test_shuffled_levels_by_hand():
    """Gold 0, 0, 1, 2; given 0, 1, 1, 1: a level meets another as often as chance has it."""
    gold = torch.tensor([0, 0, 1, 2])[:, None].repeat(1, 3)
    given = torch.tensor([0, 1, 1, 1])[:, None].repeat(1, 3)
    # TP_0 = 2 * 1 / 4, TP_1 = 1 * 3 / 4, TP_2 = 0; F1_0 = 2 * 0.5 / 3, F1_1 = 2 * 0.75 / 4
    f1 = [1 / 3, 3 / 8, 0]
    weighted = (2 * f1[0] + f1[1] + f1[2]) / 4
    assert tables.shuffled_emp_f1(given, gold, "weighted_f1") == pytest.approx(weighted)
    assert tables.shuffled_emp_f1(given, gold, "macro_f1") == pytest.approx(sum(f1) / 3)


def test_tables_of_two_seeds(copied, call, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(copied, other)
    metrics = json.loads((other / "metrics.json").read_text(encoding="utf-8"))
    metrics["config"]["seed"] = 1
    metrics["emprl"]["perplexity"] = 2 * metrics["mle"]["perplexity"]
    (other / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    ideal = Path(__file__).parent / "results" / "ideal-real.json"
    drawn = ["--plot", tmp_path / "two", "--ideal", ideal]
    assert call(tables, other, copied, "--write", tmp_path / "all.json", *drawn) == 0
    assert (tmp_path / "two-levels.png").exists() and (tmp_path / "two-gain.png").exists()
    out = capsys.readouterr().out
    assert out.count("| judge, weighted, seed ") == 2 and "| judge, weighted, mean |" in out
    assert re.search(r"\| oracle, macro, mean \|.*\(.*% to .*%\) \|", out)
    assert "| seed 1 |" in out and " | 2.000 | " in out and "| EX 2 |" in out

    found = json.loads((tmp_path / "all.json").read_text(encoding="utf-8"))
    assert list(found["price"]) == ["seed 0", "seed 1", "mean"], "by seed"
    row = found["Emp-F1"]["judge, macro, seed 0"]
    assert row["MLE"] == metrics["mle"]["judge_emp_macro_f1"]
    row = found["Emp-F1"]["judge, macro, mean"]
    gain = row["EmpRL"] / row["MLE"] - 1
    assert row["gain, 95 % interval"].startswith(f"{gain:+.1%} (")
    for rows in found.values():
        assert all(f"| {name} |" in out for name in rows), "what is printed"


def test_nothing_is_written_without_being_told(copied, short, call, monkeypatch):
    root = Path(emprl.__file__).parent / "tests" / "results"
    before = {path: path.read_bytes() for path in root.iterdir()}
    monkeypatch.setitem(ablate.ABLATIONS, "reward", {"default": ablate.DEFAULT})
    assert call(ablate, "reward", copied) == call(tables, copied) == 0
    assert {path: path.read_bytes() for path in root.iterdir()} == before


# ---- mutate

MODULE = '''
class Loss:
    def of(self, context, response):
        """The mean over all tokens."""
        if len(response) == 0:
            raise ValueError(f"{response}: give one that is longer")
        rows = self.rows("judge", context).detach()
        return self.mean(rows, response, "train")
'''


def test_mutants_differ_and_compile_and_leave_messages_alone():
    right = ast.unparse(ast.parse(MODULE))
    drawn = mutate.draw({"small": right}, 100)
    texts = [text for _, text in drawn.values()]
    assert len({right, *texts}) == 1 + len(texts)
    for text in texts:
        compile(text, "small.py", "exec")
        assert '"""The mean over all tokens."""' in text
        assert "raise ValueError(f'{response}: give one that is longer')" in text

    changed = [title.partition("  ->  ")[2] for title in drawn]
    assert {
        "if len(context) == 0:",  # another parameter
        "rows = self.mean('judge', context).detach()",  # another attribute
        "rows = self.rows('train', context).detach()",  # another text
        "rows = self.rows(context, 'judge').detach()",  # two arguments swapped
        "rows = self.rows('judge', context)",  # a call left out
        "if len(response) != 0:",
    } <= {*changed}
    assert {*mutate.draw({"small": right}, 5)} < {*drawn}
