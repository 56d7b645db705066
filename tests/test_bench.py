"""bench.py: its arithmetic against hand-worked figures and real small models, its bookkeeping, its command line."""

import contextlib
import json
import sys
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench
import data
import ppo
import t5_small
from bench import BASE, SMALL, activation_bytes, cache_bytes, forward_flops, parameter_count
from identifiers import Identifiers
from t5_small import T5, T5Config

LITTLE = T5Config(
    vocab_size=300,
    d_model=16,
    d_kv=4,
    d_ff=24,
    num_layers=1,
    num_decoder_layers=1,
    num_heads=2,
)
KINDS = ("relu", "gated-gelu")


def middling(**changes):
    """A T5 small enough to run and large enough that what the arithmetic leaves out is little."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=1000, d_model=64, d_kv=16, d_ff=128, num_decoder_layers=3)
    return T5(T5Config(**{**sizes, **changes})).train()


def batch(c, size=4, source=40, target=24):
    return bench.random_batch(c, size, source, target)


# ---- arithmetic


def test_forward_flops_by_hand():
    """D 4, I 2, F 8, V 10. Encoder of 3: q, k, v, o 4 x 2 x 3 x 8 = 192, scores and context 2 x 2 x 9 x 2 = 72,
    feed-forward 2 x 2 x 3 x 32 = 384. Decoder of 2: 128 + 32, over the source 64 + 96 + 48, feed-forward 256, V 160."""
    c = T5Config(
        10, d_model=4, d_kv=2, d_ff=8, num_layers=1, num_decoder_layers=1, num_heads=1
    )
    assert forward_flops(c, 1, 3) == 192 + 72 + 384
    assert forward_flops(c, 5, 3, 2) == 5 * (648 + 160 + 208 + 256 + 160)


@pytest.mark.parametrize("kind", KINDS)
def test_flops_are_those_that_torch_counts(kind):
    model = middling(feed_forward_proj=kind)
    with FlopCounterMode(display=False) as counter:
        loss, _ = model.loss_sum(*batch(model.config))
        forward = counter.get_total_flops()
        loss.backward()
    assert forward == forward_flops(model.config, 4, 40, 24)
    assert counter.get_total_flops() == pytest.approx(3 * forward, rel=0.01), (
        "a training step is three forward passes"
    )


def test_official_sizes():
    """The parameters of t5-small and t5-base, as everyone counts them."""
    assert (
        parameter_count(T5, SMALL) == 60_506_624 and parameter_count(T5, BASE) == 222_903_552
    )


@pytest.mark.parametrize(
    "kind, arguments", [(T5, ()), (Identifiers, ()), (Identifiers, (False,))]
)
def test_bytes_of_weights_gradients_and_optimizer(kind, arguments):
    model = kind(LITTLE, *arguments)
    (optimizer,) = t5_small.make_optimizers(model)
    loss = (
        model.loss_sum(*batch(LITTLE))[0]
        if isinstance(model, T5)
        else model(*batch(LITTLE)).sum()
    )
    loss.backward()
    optimizer.step()
    size = lambda tensors: sum(x.numel() * x.element_size() for x in tensors)
    moments = [
        state[k] for state in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")
    ]
    gradients = [p.grad for p in model.parameters()]
    found = {
        "weights": size(model.parameters()),
        "gradients": size(gradients),
        "optimizer": size(moments),
    }
    assert found == {
        what: n * parameter_count(kind, LITTLE, *arguments)
        for what, n in bench.TRAINED.items()
    }


def saved_bytes(model, forward):
    """Bytes of all that autograd keeps of forward(), but for the weights."""
    own, kept, alive = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}, []

    def pack(x):
        alive.append(x)  # so that no address is used twice
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = forward()
    return sum(n for address, n in kept.items() if address not in own), result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout, half", [(0.0, False), (0.1, False), (0.0, True)])
def test_activation_bytes_within_a_tenth(kind, dropout, half, monkeypatch):
    """If this fails after a change of t5_small.py or ppo.py, less or more is kept now: correct activation_bytes."""
    bf16 = (
        lambda device: torch.autocast("cpu", torch.bfloat16)
        if half
        else contextlib.nullcontext()
    )
    for module in (t5_small, ppo):
        monkeypatch.setattr(module, "autocast", bf16)
    model = middling(feed_forward_proj=kind, dropout_rate=dropout)
    c, (source, target) = model.config, batch(model.config, 8)
    everything = torch.ones_like(target, dtype=torch.bool)
    support = torch.rand(*target.shape, c.vocab_size) < 0.5
    copies = 2 * half * parameter_count(T5, c)  # of the weights, in bf16
    for in_ppo, forward in (
        (False, lambda: model.loss_sum(source, target)),
        (True, lambda: ppo.score(model, source, target, everything, support, 1.0)),
    ):
        found, _ = saved_bytes(model, forward)
        expected = activation_bytes(c, 8, 40, 24, half, dropout > 0, in_ppo, cpu=True)
        assert found == pytest.approx(copies + expected, rel=0.1)


def test_activation_bytes_of_an_encoder():
    model = middling(dropout_rate=0.0)
    found, _ = saved_bytes(model, lambda: model.encode(batch(model.config, 8)[0]))
    assert found == pytest.approx(activation_bytes(model.config, 8, 40), rel=0.1)


@pytest.mark.parametrize("kind", ["relu", "gated-gelu"])
def test_bytes_a_token(kind):
    c = replace(LITTLE, num_decoder_layers=2, feed_forward_proj=kind)
    read = [
        p.numel()
        for name, p in T5(c).named_parameters()
        if name == "shared.weight"
        or p.dim() == 2
        and name.startswith("decoder")
        and not any(part in name for part in ("cross_attn.k", "cross_attn.v", "relative_bias"))
    ]
    assert bench.bytes_a_token(c) == 4 * sum(read)


def test_cache_bytes():
    c = middling().config
    model = T5(c)
    memory = model.encode(torch.ones(2, 7, dtype=torch.long))
    kept = []
    for block in model.decoder.blocks:
        cache = t5_small.BlockCache(block, memory, 5)
        kept += [*cache.memory, cache.keys, cache.values]
    assert cache_bytes(c, 2, 7, 5) == sum(4 * x.numel() for x in kept)


def test_plan_says_what_fits():
    base, small = bench.plan("base", 30.0), bench.plan("small", 60.0)
    assert (
        "paper as it is: does NOT fit into 12 GiB in identifiers, judge, context, ppo" in base
    )
    assert (
        "identifiers.shared=on: fits into 12 GiB" in base
        and "t5-small, paper as it is: fits" in small
    )
    assert all(
        "assum" in text.lower() and "measured on a GPU" in text for text in (base, small)
    )


def test_plan_adds_up():
    config = bench.emprl.make_config("paper", 0, ".", ".")
    stages = bench.stages(BASE, config)
    (sft, flops), (in_ppo, _) = stages["sft"], stages["ppo"]
    assert sft["weights"] == 4 * 222_903_552 and flops == 3 * 12900 * forward_flops(
        BASE, 8, 200, 50
    )
    assert in_ppo["rollout"] >= 32 * 30 * 32128, (
        "the support: a byte for each token of the vocabulary"
    )


# ---- measuring and keeping


def test_works_take_turns():
    calls = []
    seconds = bench.alternately(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2
    )
    assert calls == ["a", "b"] * 9 and len(seconds["a"]) == len(seconds["b"]) == 8, (
        "a warm-up; quick: 4 times as often"
    )
    assert len(bench.rounds(5, 100.0)) == 3 and len(bench.rounds(1, 100.0)) == 1


def outer():
    bench.CLOCK[0] += 1.0
    inner()


def inner():
    bench.CLOCK[0] += 2.0


def test_parts_do_not_count_each_other(monkeypatch):
    monkeypatch.setattr(bench, "CLOCK", [0.0], raising=False)
    monkeypatch.setattr(bench.time, "perf_counter", lambda: bench.CLOCK[0])
    times = bench.by_part(
        lambda: (outer(), inner(), bench.CLOCK.__setitem__(0, bench.CLOCK[0] + 4.0)),
        {"outer": f"{__name__}.outer", "inner": f"{__name__}.inner"},
        2,
    )
    assert times == {"outer": 1.0, "inner": 4.0, "the rest": 4.0}


@pytest.fixture
def little(tmp_path, monkeypatch):
    """The benchmark on models that take no time, written to a folder of the test."""
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "bench.json")
    for name in ("TINY", "SMALL"):
        monkeypatch.setattr(bench, name, LITTLE)
    monkeypatch.setattr(
        bench, "WORK", {work: (kind, LITTLE, n) for work, (kind, _, n) in bench.WORK.items()}
    )
    some = bench.random_batch
    monkeypatch.setattr(
        bench,
        "random_batch",
        lambda c, batch=32, *lengths, **_: some(c, min(batch, 4), *lengths),
    )
    monkeypatch.setattr(bench, "AXES", {"batch": (2, 4), "width": (32, 64)})
    monkeypatch.setattr(bench, "everyone", lambda kind, accumulated=False: ["EmpRL"])
    monkeypatch.setattr(bench, "gemm_peak", lambda: 1e9)
    monkeypatch.setattr(bench, "bandwidth", lambda: 1e9)
    monkeypatch.setattr(bench, "rounds", lambda repeats, once: range(1))
    monkeypatch.setattr(
        bench.emprl, "make_config", lambda preset, **_: bench.emprl.Config(t5=LITTLE)
    )
    return tmp_path


class Here(contextlib.nullcontext):
    """In the place of another process, which would import torch anew."""

    def __init__(self, *_):
        super().__init__(self)

    def submit(self, function, *arguments):
        self.result = lambda: function(*arguments)
        return self


def test_every_part_runs(little, monkeypatch, capsys):
    monkeypatch.setattr(bench, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(
        bench, "peaks", lambda work, who: {"MiB": 3.0, "MiB above imports": 2.0}
    )
    kept = []
    monkeypatch.setattr(bench.emprl, "keep_memory", lambda: kept.append(1))
    conversations = "".join(
        f"c{i},{k},sad,it rained,1,word{i % 7} said {k} times in town {i % 11},5|5|5_2|2|2,\n"
        for i in range(300)
        for k in (1, 2)
    )
    (little / "empatheticdialogues").mkdir()
    (little / "empatheticdialogues" / "train.csv").write_text(
        data.ED_HEADER + "\n" + conversations, encoding="utf-8"
    )
    (little / "metrics.json").write_text(
        json.dumps({"seconds": {"sft": 3.0, "ppo": 1.0}}), encoding="utf-8"
    )
    assert bench.main(["--data", str(little), "--run", str(little)]) == 0
    found = json.loads((little / "bench.json").read_text(encoding="utf-8"))
    assert set(found) == set(bench.PARTS) and not list(little.glob("*.tmp"))
    (row,) = [x["rows"]["training step, tiny"] for x in found["step"].values()]
    assert row["EmpRL, ms"] > 0 and row["GFLOP"] == 3 * forward_flops(LITTLE, 32, 64, 24) / 1e9
    (one,) = [x["rows"]["sample 1 x 30, small"] for x in found["sample"].values()]
    assert one["of memory's speed"] == pytest.approx(
        30 * bench.bytes_a_token(LITTLE) / one["EmpRL, ms"] / 1e6
    )
    (memory,) = found["memory"].values()
    assert (
        memory["rows"]["PPO iteration, tiny, EmpRL"]["MiB / EmpRL"] == 1.0
        and memory["cpu"]
        and memory["date"]
    )
    (tricks,) = [x["rows"] for x in found["tricks"].values()]
    assert (
        all(row["without / with"] > 0 for row in tricks.values())
        and len(tricks) == len(bench.TRICKS) + 1
        and len(kept) == 1
    )
    (pieces,) = [x["rows"] for x in found["parts"].values()]
    assert pieces[f"run {little.name}: sft"]["share"] == 0.75 and any(
        name.endswith("update") for name in pieces
    )
    assert (little / "bench-scaling.png").stat().st_size > 5000
    shown = capsys.readouterr().out
    assert (
        all(f"{part}: " in shown for part in bench.PARTS)
        and bench.published("scaling") in shown
    )


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory(little, monkeypatch):
    """What is held while the work runs is seen, though it is given back."""
    monkeypatch.setitem(
        bench.WORK, "a tensor", (lambda *_: lambda: torch.ones(2**26), LITTLE, 1)
    )
    found = bench.peaks("a tensor", "EmpRL")
    assert found["MiB"] > 256 + 100 and 0 <= found["MiB above imports"] <= found["MiB"]


def test_results_of_environments_stand_side_by_side(little, monkeypatch):
    bench.record("step", "one", {"ms": 1.0})
    bench.record("step", "two", {"ms": 2.0, "seconds": [2.0]})
    monkeypatch.setattr(bench, "version", lambda library: "9.9")
    assert bench.record("step", "one", {"ms": 3.0}) == {"one": {"ms": 3.0}}
    assert sorted(len(x["rows"]) for x in bench.results()["step"].values()) == [1, 2]
    assert bench.published("step").count("| one |") == 2 and "seconds" not in bench.published(
        "step"
    )


def test_ctrl_c_loses_nothing(little, monkeypatch, capsys):
    def part(a):
        yield "measured", {"ms": 1.0}
        raise KeyboardInterrupt

    monkeypatch.setitem(bench.PARTS, "step", part)
    assert bench.main(["step"]) == 130 and "stopped" in capsys.readouterr().err
    assert "| measured |" in bench.published("step")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["speed"], "no such part"),
        (["padded"], "train.csv is not there"),
        (["--repeats", "0"], "from 1"),
        (["--run", "nowhere"], "nowhere/metrics.json"),
        (["--data", "nowhere"], "nowhere/empatheticdialogues/train.csv"),
        (["--fast"], "unrecognized"),
        (["--plan", "--t5", "huge"], "invalid choice"),
    ],
)
def test_errors_are_one_line(arguments, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(arguments)
    errors = capsys.readouterr().err
    assert stopped.value.code == 2 and words in errors and errors.count("\n") == 1


def test_in_pieces_it_is_the_same_step():
    records, batch = {}, bench.random_batch(LITTLE)
    for who in ("EmpRL", "EmpRL 8 x 4"):
        torch.manual_seed(0)
        (records[who],) = bench.step(replace(LITTLE, dropout_rate=0.0), [batch], who)()
    assert all(
        abs(x - records["EmpRL 8 x 4"][k]) < 1e-5 for k, x in records["EmpRL"].items()
    ), records
