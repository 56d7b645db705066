"""t5_small.py: against transformers (fixtures/parity, from fixtures/make_parity.py) and against hand-made figures."""

import json
import math
import random
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import t5_small
from conftest import check
from t5_small import CheckpointError, Sampling, T5, T5Config, TrainConfig, Trainer

PARITY = Path(__file__).parent / "fixtures" / "parity"
VERSIONS = ("t5_v10", "t5_v11")


def tiny(seed=0, **changes):
    """A small random T5 in eval mode whose positions, padding and context all matter."""
    torch.manual_seed(seed)
    config = dict(
        vocab_size=30,
        d_model=16,
        d_kv=4,
        d_ff=24,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=2,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        dropout_rate=0.0,
    )
    return T5(T5Config(**{**config, **changes})).eval()


def ragged(lengths, low=3, high=30, seed=0):
    """Random ids, each row ending in </s> and padded with 0."""
    g = torch.Generator().manual_seed(seed)
    rows = [
        torch.cat([torch.randint(low, high, (n - 1,), generator=g), torch.tensor([1])])
        for n in lengths
    ]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def favour(model, token, amount):
    """Adds `amount` to one token's logit wherever the model is asked."""
    plain = model.logits
    model.logits = lambda states: plain(states) + amount * F.one_hot(
        torch.tensor(token), model.config.vocab_size
    )
    return model


def unfinished(ids):
    """(B, T) bool: t1 .. the first </s>, by a plain loop."""
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for b, row in enumerate(ids.tolist()):
        for t, token in enumerate(row):
            mask[b, t] = True
            if token == 1:
                break
    return mask


# ---- parity with transformers ----------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_parity_logits_and_loss(version):
    model = t5_small.from_pretrained(PARITY / version).eval()
    expected = torch.load(PARITY / version / "expected.pt", weights_only=True)
    source, labels, real = expected["source"], expected["labels"], expected["labels"] != 0
    with torch.no_grad():
        logits = model.logits(model.response_states(source, labels))
        loss, tokens = model.loss_sum(source, labels)
    assert (source == 0).any() and not real.all(), (
        "the fixture must have padding on both sides"
    )
    error = (logits - expected["logits"])[real].abs().max().item()
    assert error < 1e-4, f"logits differ from transformers' by up to {error:.1e}"
    assert tokens == real.sum()
    check("mean loss of a token", loss / tokens, expected["loss"])


@pytest.mark.parametrize("version", VERSIONS)
def test_parity_greedy_token_for_token(version):
    model = t5_small.from_pretrained(PARITY / version).eval()
    expected = torch.load(PARITY / version / "expected.pt", weights_only=True)
    for name, min_length in (("greedy", 1), ("greedy_min_6", 6)):
        sampling = Sampling(greedy=True, min_length=min_length, max_length=12)
        ids = t5_small.generate(model, expected["source"], sampling).ids
        assert ids.tolist() == expected[name].tolist(), (
            f"{name}: transformers generates {expected[name].tolist()}"
        )


def test_parity_fixture_is_official_and_demanding():
    """The files have what official ones have and we must do without; v1.1's head is not its embedding."""
    files = {
        v: torch.load(PARITY / v / "pytorch_model.bin", weights_only=True) for v in VERSIONS
    }
    assert (
        "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
        in files["t5_v10"]
    )
    assert all(
        "encoder.embed_tokens.weight" in f and "decoder.embed_tokens.weight" in f
        for f in files.values()
    )
    assert not torch.equal(files["t5_v11"]["lm_head.weight"], files["t5_v11"]["shared.weight"])
    assert sum(f.stat().st_size for f in PARITY.rglob("*.*")) < 250_000


# ---- checkpoints -----------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_checkpoint_round_trip(version, tmp_path):
    model = t5_small.from_pretrained(PARITY / version)
    t5_small.save_pretrained(model, tmp_path / "new" / "folder")
    again = t5_small.from_pretrained(tmp_path / "new" / "folder")
    assert again.config == model.config
    assert all(
        torch.equal(p, q)
        for p, q in zip(model.state_dict().values(), again.state_dict().values())
    )
    written = set(
        torch.load(tmp_path / "new" / "folder" / "pytorch_model.bin", weights_only=True)
    )
    official = set(torch.load(PARITY / version / "pytorch_model.bin", weights_only=True))
    useless = {
        "encoder.embed_tokens.weight",
        "decoder.embed_tokens.weight",
        "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
    }
    if version == "t5_v10":
        useless.add("lm_head.weight")
    assert written == official - useless
    raw = json.loads((tmp_path / "new" / "folder" / "config.json").read_text(encoding="utf-8"))
    assert raw["model_type"] == "t5" and raw["is_encoder_decoder"] is True
    assert (
        raw["tie_word_embeddings"] is (version == "t5_v10")
        and raw["decoder_start_token_id"] == 0
    )
    assert {f: raw[f] for f in asdict(model.config)} == asdict(model.config)
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == [
        "config.json",
        "pytorch_model.bin",
    ]


def test_checkpoint_of_transformers_5(tmp_path):
    """Transformers 5 writes tie_word_embeddings true always, and scale_decoder_outputs for what v1.0 does."""
    raw = json.loads((PARITY / "t5_v11" / "config.json").read_text(encoding="utf-8"))
    state = torch.load(PARITY / "t5_v11" / "pytorch_model.bin", weights_only=True)
    raw.update(tie_word_embeddings=True, scale_decoder_outputs=False)
    (tmp_path / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert torch.equal(
        t5_small.from_pretrained(tmp_path).lm_head.weight, state["lm_head.weight"]
    )
    del state["lm_head.weight"]  # a head that equals the embedding is not written
    torch.save(state, tmp_path / "pytorch_model.bin")
    model = t5_small.from_pretrained(tmp_path)
    check("an unscaled tied head", model.logits(torch.eye(24)), state["shared.weight"].T)


def copy_of_fixture(folder, change=lambda state: None, **config):
    raw = json.loads((PARITY / "t5_v10" / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**raw, **config}), encoding="utf-8")
    state = torch.load(PARITY / "t5_v10" / "pytorch_model.bin", weights_only=True)
    change(state)
    torch.save(state, folder / "pytorch_model.bin")


def test_checkpoint_missing_tensor_is_named(tmp_path):
    name = "decoder.block.1.layer.1.EncDecAttention.k.weight"
    copy_of_fixture(tmp_path, lambda state: state.pop(name))
    with pytest.raises(CheckpointError) as error:
        t5_small.from_pretrained(tmp_path)
    assert name in str(error.value) and "pytorch_model.bin" in str(error.value)


def test_checkpoint_wrong_shape_is_named(tmp_path):
    name = "encoder.block.0.layer.1.DenseReluDense.wi.weight"
    copy_of_fixture(tmp_path, lambda state: state.update({name: torch.zeros(7, 24)}))
    with pytest.raises(CheckpointError) as error:
        t5_small.from_pretrained(tmp_path)
    assert all(part in str(error.value) for part in (name, "(7, 24)", "(32, 24)"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b[: len(b) // 2],
        lambda b: b"",
        lambda b: b"not a checkpoint",
        lambda b: b[:100] + bytes(100) + b[200:],
    ],
)
def test_checkpoint_damaged_file_is_named(tmp_path, damage):
    copy_of_fixture(tmp_path)
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match="pytorch_model.bin"):
        t5_small.from_pretrained(tmp_path)


def test_checkpoint_missing_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere.config.json"):
        t5_small.from_pretrained(tmp_path / "nowhere")
    copy_of_fixture(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match="pytorch_model.bin"):
        t5_small.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{half of a file", encoding="utf-8")
    with pytest.raises(CheckpointError, match="config.json"):
        t5_small.from_pretrained(tmp_path)


def test_checkpoint_of_another_architecture(tmp_path):
    copy_of_fixture(tmp_path, feed_forward_proj="gated-silu")
    with pytest.raises(CheckpointError, match="gated-silu"):
        t5_small.from_pretrained(tmp_path)


class RunsCode:
    def __reduce__(self):
        return Path.touch, (Path("proof_that_code_ran"),)


def test_checkpoint_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"shared.weight": RunsCode()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="evil.pt"):
        t5_small.load_state(tmp_path / "evil.pt")
    assert not Path("proof_that_code_ran").exists()


def logits_of_transformers(folder):
    """(ours, theirs) where there is a token, for a fixture's weights in `folder`."""
    expected = torch.load(PARITY / "mt5_untied" / "expected.pt", weights_only=True)
    source, labels = expected["source"], expected["labels"]
    model = t5_small.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model.logits(model.response_states(source, labels))
    return logits[labels != 0], expected["logits"][labels != 0]


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_an_untied_model_as_transformers_5_saves_it(name, tmp_path):
    """Its config.json claims that the head is the embedding; its file has another head, which counts."""
    folder = PARITY / "mt5_untied"
    if name == "pytorch_model.bin":
        (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
        torch.save(t5_small.load_safetensors(folder / "model.safetensors"), tmp_path / name)
        folder = tmp_path
    ours, theirs = logits_of_transformers(folder)
    assert (ours - theirs).abs().max() < 1e-4
    assert theirs.std() > 1


def test_a_head_of_its_own_counts_although_config_json_claims_it_is_the_embedding(tmp_path):
    """As in transformers 5; v1.0's logits are scaled by D^-1/2 with that head, too."""
    head = torch.randn(80, 24, generator=torch.Generator().manual_seed(1))
    copy_of_fixture(tmp_path, lambda state: state.update({"lm_head.weight": head}))
    model = t5_small.from_pretrained(tmp_path)
    check("logits of unit states", model.logits(torch.eye(24)), head.T * 24**-0.5)


@pytest.mark.parametrize(
    "name",
    ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "encoder.adapter.weight"],
)
def test_every_tensor_is_used_or_named(name, tmp_path):
    """Also what would be a copy of the embedding, but is not."""
    copy_of_fixture(tmp_path, lambda state: state.update({name: torch.ones(80, 24)}))
    with pytest.raises(CheckpointError, match=name):
        t5_small.from_pretrained(tmp_path)


def test_the_embedding_under_another_of_its_names(tmp_path):
    """Files that have each tensor once may have it as the encoder's."""
    copy_of_fixture(tmp_path, lambda state: state.pop("shared.weight"))
    state = torch.load(PARITY / "t5_v10" / "pytorch_model.bin", weights_only=True)
    model = t5_small.from_pretrained(tmp_path)
    assert torch.equal(model.shared.weight, state["shared.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_safetensors_are_read_without_the_package(dtype, tmp_path):
    """A file written by hand; one that is cut short, or whose header is none, is named."""
    copy_of_fixture(tmp_path)
    state = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not looked at")
    header, numbers = {"__metadata__": {"format": "pt"}}, b""
    kind = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    for name, x in state.items():
        content = x.to(dtype).contiguous().view(torch.uint8).numpy().tobytes()
        place = [len(numbers), len(numbers) + len(content)]
        header[name] = {"dtype": kind, "shape": [*x.shape], "data_offsets": place}
        numbers += content
    head = json.dumps(header).encode()
    whole = len(head).to_bytes(8, "little") + head + numbers
    path = tmp_path / "model.safetensors"
    path.write_bytes(whole)
    model = t5_small.from_pretrained(tmp_path)
    assert torch.equal(model.shared.weight, state["shared.weight"].to(dtype).float())
    assert torch.equal(
        model.decoder.blocks[1].ff.wo.weight,
        state["decoder.block.1.layer.2.DenseReluDense.wo.weight"].to(dtype).float(),
    )
    for damaged in (
        whole[:-10],
        whole[:5],
        b"",
        b"\xff" * 100,
        whole.replace(b'"shape"', b'"shap"'),
    ):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="model.safetensors"):
            t5_small.from_pretrained(tmp_path)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 242043056\n"


def test_what_is_no_folder_of_a_checkpoint_is_told_apart(tmp_path, monkeypatch):
    """Each cause has its own remedy, in a short line."""
    monkeypatch.chdir(tmp_path)

    def message():
        with pytest.raises(CheckpointError) as error:
            t5_small.from_pretrained("t5-small")
        assert "\n" not in str(error.value) and len(str(error.value)) < 400
        return str(error.value)

    assert "not by its name" in message()
    folder = tmp_path / "t5-small"
    folder.mkdir()
    assert "has no config.json" in message()
    copy_of_fixture(folder)
    whole = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(POINTER)
    assert "git lfs pull" in message()
    (folder / "pytorch_model.bin").write_bytes(whole)
    (folder / "model.safetensors").write_bytes(POINTER)
    t5_small.from_pretrained(folder)  # the other file is whole
    for name in ("model.safetensors", "pytorch_model.bin"):
        (folder / name).unlink()
    assert "has no model.safetensors or pytorch_model.bin" in message()
    (folder / "model.safetensors.index.json").write_text("{}", encoding="utf-8")
    assert "in several files" in message()


def test_names_of_a_wrapped_model_are_a_short_message(tmp_path):
    def wrap(state):
        for name in [*state]:
            state["module." + name] = state.pop(name)

    copy_of_fixture(tmp_path, wrap)
    with pytest.raises(CheckpointError, match="'module.'.*wrapper") as error:
        t5_small.from_pretrained(tmp_path)
    assert len(str(error.value)) < 300

    copy_of_fixture(tmp_path, lambda state: [state.pop(k) for k in [*state] if "block" in k])
    with pytest.raises(CheckpointError, match="and 41 more") as error:
        t5_small.from_pretrained(tmp_path)
    assert len(str(error.value)) < 500

    copy_of_fixture(tmp_path)
    state = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    torch.save({"state_dict": state}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="not tensors by name"):
        t5_small.from_pretrained(tmp_path)


def test_flan_t5_of_2022_is_gated(tmp_path):
    """Its config.json said "gelu" and is_gated_act, which later became gated-gelu."""
    raw = json.loads((PARITY / "t5_v11" / "config.json").read_text(encoding="utf-8"))
    raw.update(feed_forward_proj="gelu", is_gated_act=True, dense_act_fn="gelu_new")
    (tmp_path / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    (tmp_path / "pytorch_model.bin").write_bytes(
        (PARITY / "t5_v11" / "pytorch_model.bin").read_bytes()
    )
    model, official = (
        t5_small.from_pretrained(tmp_path),
        t5_small.from_pretrained(PARITY / "t5_v11"),
    )
    source, response = ragged([6, 9]), ragged([5, 3])
    assert torch.equal(
        model.eval().response_states(source, response),
        official.eval().response_states(source, response),
    )
    raw["is_gated_act"] = False
    (tmp_path / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(CheckpointError, match="'gelu'"):
        t5_small.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "name, value",
    [
        ("num_layers", 10**12),
        ("num_decoder_layers", 10**12),
        ("d_model", 10**15),
        ("d_model", 1),
        ("d_ff", -3),
        ("num_heads", 0),
        ("num_heads", 2.5),
        ("vocab_size", True),
        ("dropout_rate", 7),
        ("layer_norm_epsilon", math.nan),
        ("initializer_factor", math.inf),
        ("relative_attention_num_buckets", 10**9),
        ("relative_attention_max_distance", 16),
        ("eos_token_id", 2),
        ("pad_token_id", 1),
        ("d_kv", "64"),
        ("tie_word_embeddings", "no"),
    ],
)
def test_config_json_out_of_range_is_refused_before_anything_is_built(
    name, value, tmp_path, monkeypatch
):
    copy_of_fixture(tmp_path, **{name: value})
    monkeypatch.setattr(t5_small, "T5", lambda config: pytest.fail("built"))
    with pytest.raises(CheckpointError, match=name) as error:
        t5_small.from_pretrained(tmp_path)
    assert "config.json" in str(error.value) and len(str(error.value)) < 300


def test_sizes_are_looked_at_before_memory_is_taken(tmp_path):
    """A config.json with possible sizes, but not those of the file: two terabytes are not allocated to say so."""
    copy_of_fixture(
        tmp_path, num_layers=100, num_decoder_layers=100, d_ff=200_000, d_model=60_000
    )
    with pytest.raises(CheckpointError, match="tensors of another configuration"):
        t5_small.from_pretrained(tmp_path)


def test_weights_that_are_not_finite_are_named(tmp_path):
    def spoil(state):
        state["decoder.block.0.layer.2.DenseReluDense.wo.weight"][0, 0] = math.nan

    copy_of_fixture(tmp_path, spoil)
    with pytest.raises(CheckpointError, match="not finite"):
        t5_small.from_pretrained(tmp_path)


def test_a_zip_bomb_is_refused_by_its_directory(tmp_path, monkeypatch):
    """20 MB of zeros in 20 kB, or gigabytes in a few MB: refused before anything is unpacked."""
    path = tmp_path / "state.pt"
    t5_small.save_atomically({"x": torch.ones(100)}, path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/1", bytes(20_000_000))
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda _: pytest.fail("unpacked"))
    with pytest.raises(CheckpointError, match="state.pt.*compressed") as error:
        t5_small.load_state(path)
    assert "\n" not in str(error.value)


def test_save_atomically_leaves_no_half_file(tmp_path, monkeypatch):
    path = tmp_path / "state.pt"
    t5_small.save_atomically({"x": torch.tensor([1.0])}, path)

    def disk_full(state, file):
        Path(file).write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError, match="is the disk full"):
        t5_small.save_atomically({"x": torch.tensor([2.0])}, path)
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"], (
        "a temporary file was left behind"
    )
    assert t5_small.load_state(path)["x"].item() == 1.0, "the old file was harmed"


# ---- the parts of the model ------------------------------------------------------------------------

DISTANCES = [
    0,
    1,
    7,
    8,
    11,
    12,
    15,
    16,
    22,
    23,
    31,
    32,
    45,
    46,
    63,
    64,
    90,
    91,
    127,
    128,
    1000,
]


def test_relative_position_bucket():
    """Tables from the formula: 16 a side, 8 exact, then 8 + floor(8 ln(d/8) / ln 16); causal: 32 and 16 exact."""
    distance = torch.tensor(DISTANCES)
    table = torch.tensor(
        [0, 1, 7, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15, 15, 15]
    )
    before, after = (
        t5_small.relative_position_bucket(s * distance, bidirectional=True) for s in (-1, 1)
    )
    check(f"bidirectional, key before query by {DISTANCES}", before, table)
    check(f"bidirectional, key after query by {DISTANCES}", after, table + 16 * (distance > 0))
    causal = torch.tensor([0, 1, 15, 16, 18, 19, 20, 21, 26, 27, 112, 113, 127, 128, 1000])
    check(
        f"causal, key before query by {causal.tolist()}",
        t5_small.relative_position_bucket(-causal, bidirectional=False),
        torch.tensor([0, 1, 15, 16, 16, 17, 17, 18, 19, 20, 30, 31, 31, 31, 31]),
    )
    check(
        "causal, key after query",
        t5_small.relative_position_bucket(causal, bidirectional=False),
        torch.zeros(15, dtype=torch.long),
    )
    small = torch.tensor([[0, -1, -2, -3, -4, -5], [1, 2, 3, 6, -6, -20]])
    check(
        "8 buckets, maximum 12, bidirectional, of shape (2, 6)",
        t5_small.relative_position_bucket(small, True, num_buckets=8, max_distance=12),
        torch.tensor([[0, 1, 2, 2, 2, 3], [5, 6, 6, 7, 3, 3]]),
    )


def test_position_bias_is_key_minus_query():
    model = tiny(relative_attention_num_buckets=32, relative_attention_max_distance=128)
    for stack, bidirectional in ((model.encoder, True), (model.decoder, False)):
        bias = stack.position_bias(12)
        assert bias.shape == (1, 2, 12, 12)
        for query, key in ((5, 5), (5, 3), (11, 0), (3, 5)):
            if bidirectional or key <= query:
                bucket = t5_small.relative_position_bucket(
                    torch.tensor(key - query), bidirectional
                ).item()
                check(
                    f"bias of query {query}, key {key}",
                    bias[0, :, query, key],
                    stack.relative_bias.weight[bucket],
                )
            else:
                assert (bias[0, :, query, key] <= -1e8).all(), "the decoder sees the future"


def test_rms_norm():
    norm = t5_small.RMSNorm(4, eps=1e-6)
    norm.weight.data = torch.tensor([1.0, 2.0, 1.0, -1.0])
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 5.0, 5.0, 5.0]])  # rms sqrt(30 / 4) and 5
    check(
        "RMSNorm of [1, 2, 3, 4] and [5, 5, 5, 5], weight [1, 2, 1, -1]: no mean is subtracted",
        norm(x),
        [[0.365148, 1.460593, 1.095445, -1.460593], [1.0, 2.0, 1.0, -1.0]],
    )
    check("epsilon keeps zeros finite", norm(torch.zeros(1, 4)), [[0.0] * 4])
    norm.eps = 3.0
    check(
        "epsilon 3 is added to the mean of squares: 1 / sqrt(1 + 3)",
        norm(torch.ones(1, 4)),
        [[0.5, 1.0, 0.5, -0.5]],
    )


def test_attention_one_head():
    """q = k = v = o = identity: scores are plain products, softmax(1, 0.5) = (.622, .378), no 1/sqrt(d)."""
    attention = t5_small.Attention(T5Config(d_model=2, d_kv=2, num_heads=1, dropout_rate=0.0))
    for linear in (attention.q, attention.k, attention.v, attention.o):
        linear.weight.data = torch.eye(2)
    x, memory = (
        torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]),
        torch.tensor([[[1.0, 0.0], [0.0, 1.0], [9.0, 9.0]]]),
    )
    bias = torch.tensor([0.0, 0.5, -1e9]).view(1, 1, 1, 3)  # the third position is padding
    got = attention(x, attention.keys_values(memory), bias)
    check(
        "one head over two positions and a hidden third",
        got,
        [[[0.622459, 0.377541], [0.075858, 0.924142]]],
    )


def test_attention_many_heads():
    """Against plain loops over batch, head, query; an inner width that is not d_model."""
    torch.manual_seed(1)
    attention = t5_small.Attention(T5Config(d_model=6, d_kv=2, num_heads=2, dropout_rate=0.0))
    x, memory, bias = torch.randn(2, 3, 6), torch.randn(2, 5, 6), torch.randn(2, 2, 3, 5)
    bias[1, :, :, 3:] = -1e9
    expected = torch.zeros(2, 3, 6)
    for b in range(2):
        for t in range(3):
            heads = []
            for h in range(2):
                rows = slice(2 * h, 2 * h + 2)
                q = attention.q.weight[rows] @ x[b, t]
                scores = (
                    torch.stack([q @ (attention.k.weight[rows] @ m) for m in memory[b]])
                    + bias[b, h, t]
                )
                p = torch.exp(scores - scores.max())
                heads.append((p / p.sum()) @ (memory[b] @ attention.v.weight[rows].T))
            expected[b, t] = attention.o.weight @ torch.cat(heads)
    check("two heads", attention(x, attention.keys_values(memory), bias), expected)


def test_padding_bias():
    got = t5_small.padding_bias(torch.tensor([[5, 1, 0], [7, 8, 1]]))
    assert got.shape == (2, 1, 1, 3) and got[0, 0, 0, 2] < -1e8
    check("tokens are not hidden", got[0, 0, 0, :2], [0.0, 0.0])
    check("tokens are not hidden", got[1, 0, 0], [0.0, 0.0, 0.0])


def test_initialisation():
    model = tiny(
        d_model=64, d_kv=8, num_heads=4, d_ff=128, vocab_size=200, tie_word_embeddings=False
    )
    block = model.decoder.blocks[0]
    for name, weight, std in (
        ("shared", model.shared, 1),
        ("lm_head", model.lm_head, 1),
        ("q", block.self_attn.q, 512**-0.5),
        ("k", block.self_attn.k, 64**-0.5),
        ("cross v", block.cross_attn.v, 64**-0.5),
        ("o", block.cross_attn.o, 32**-0.5),
        ("wi", block.ff.wi, 64**-0.5),
        ("wo", block.ff.wo, 128**-0.5),
        ("relative_bias", model.decoder.relative_bias, 64**-0.5),
    ):
        got, wide = weight.weight.std().item(), 5 / math.sqrt(2 * weight.weight.numel())
        assert abs(got / std - 1) < wide, f"std of {name}: expected {std:.4f}, got {got:.4f}"
    assert torch.equal(block.ff_norm.weight, torch.ones(64))


def test_tied_head_is_scaled():
    model, states = tiny(), torch.randn(3, 16)
    check(
        "v1.0: states D^-1/2 times the embedding",
        model.logits(states),
        states / 4 @ model.shared.weight.T,
    )


def test_dropout():
    torch.manual_seed(0)
    drop = t5_small.Dropout(0.1)  # 26 of 256 dropped, the rest times 256 / 230
    x = torch.ones(100, 1003, requires_grad=True)
    y = drop(x)
    kept = y != 0
    check("kept elements are scaled so that the mean stays", y[kept].unique(), [256 / 230])
    n = x.numel()
    assert abs((~kept).sum().item() / n - 26 / 256) < 5 * math.sqrt(
        26 / 256 * 230 / 256 / n
    ), "share dropped"
    assert (kept.float().mean(0) < 1).float().mean() > 0.99, "some columns are never dropped"
    assert abs((kept[:, 1:] & kept[:, :-1]).float().mean() - (230 / 256) ** 2) < 0.005, (
        "neighbours are not independent"
    )
    y.sum().backward()
    check("the gradient goes through the same mask", x.grad, y)
    assert not torch.equal(drop(x), y), "the mask must be drawn anew each time"
    drop.eval()
    assert drop(x) is x or torch.equal(drop(x), x)
    torch.manual_seed(0)
    assert (t5_small.Dropout(0.5)(torch.ones(10001)) != 0).float().mean().sub(0.5).abs() < 0.03
    assert torch.equal(t5_small.Dropout(0.0)(x), x)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_dropout_of_relu(kind):
    """One function for both: what is negative or dropped is 0 and has no gradient, the rest is scaled, as with one after the other."""
    torch.manual_seed(0)
    x = torch.randn(40, 501).to(kind).requires_grad_()
    gradient = torch.randn(40, 501).to(kind)
    y = t5_small.Dropout(0.25)(x, relu=True)
    kept, scale = y != 0, torch.tensor(256 / 192).to(kind)
    assert y.dtype == kind and not kept[x <= 0].any()
    assert abs(kept[x > 0].float().mean() - 0.75) < 0.02
    check("kept", y[kept], (x * scale)[kept])
    y.backward(gradient)
    check("gradient", x.grad, torch.where(kept, gradient * scale, 0.0))
    check("in evaluation", t5_small.Dropout(0.25).eval()(x, relu=True), torch.relu(x))


def test_dropout_is_everywhere_and_only_in_training():
    model, source, response = tiny(dropout_rate=0.2), ragged([5, 4]), ragged([4, 3], seed=1)
    assert model.loss_sum(source, response)[0] == model.loss_sum(source, response)[0]
    model.train()
    places = [m for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    for module in places:  # each place alone must change the loss
        for other in places:
            other.p = 0.2 if other is module else 0.0
        torch.manual_seed(0)
        assert len({model.loss_sum(source, response)[0].item() for _ in range(3)}) > 1
    calls = []
    for module in places:
        module.register_forward_hook(lambda *call: calls.append(call))
    model.loss_sum(source, response)
    # a block: each attention's weights, inside the feed-forward, each residual; a stack: its input and its output
    assert len(calls) == 2 * (1 + 1 + 2) + 2 * (2 + 1 + 3) + 2 * 2


# ---- the loss --------------------------------------------------------------------------------------


def test_loss_is_the_sum_over_tokens():
    model, source, response = tiny(), ragged([6, 3, 4]), ragged([5, 1, 3], seed=1)
    total, tokens = model.loss_sum(source, response)
    expected = 0.0
    for s, r in zip(source, response):  # row by row, token by token, without padding
        s, r = s[s != 0][None], r[r != 0]
        for t, token in enumerate(r):
            inputs = torch.cat([torch.tensor([0]), r[:t]])[None]
            logits = model.logits(model.decode(inputs, model.encode(s), s))[0, -1]
            expected -= logits.log_softmax(-1)[token].item()
    assert tokens == 9
    check("sum of -log p over the 9 tokens", total, torch.tensor(expected), tol=1e-4)


def test_padding_columns_do_not_change_the_loss():
    model, source, response = (
        tiny(tie_word_embeddings=False),
        ragged([6, 3, 4]),
        ragged([5, 1, 3], seed=1),
    )
    wide = model.loss_sum(F.pad(source, (0, 7)), F.pad(response, (0, 4)))
    narrow = model.loss_sum(source, response)
    check("loss with more padding", wide[0], narrow[0])
    assert wide[1] == narrow[1] == 9


def test_decoder_is_causal_and_sees_the_context():
    model, source, response = tiny(), ragged([6, 6]), ragged([5, 5], seed=1)
    changed = response.clone()
    changed[:, 3] = 29 - changed[:, 3]
    a, b = model.response_states(source, response), model.response_states(source, changed)
    check("states up to the changed token", a[:, :4], b[:, :4])
    assert (a[:, 4] - b[:, 4]).abs().max() > 1e-3
    assert (a - model.response_states(source.flip(0), response)).abs().amax(
        (1, 2)
    ).min() > 1e-3, "context is not used"


def test_every_flipped_bit_that_matters_is_noticed(tmp_path):
    """torch.load reads a tensor with a flipped bit without a word; load_state compares the sums that the file holds."""
    path, broken = tmp_path / "state.pt", tmp_path / "broken.pt"
    state = {"w": torch.randn(500, generator=torch.Generator().manual_seed(0)), "key": "abc"}
    t5_small.save_atomically(state, path)
    content, rng, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(300):
        flipped, at = bytearray(content), rng.randrange(len(content))
        flipped[at] ^= 1 << rng.randrange(8)
        broken.write_bytes(flipped)
        try:
            loaded = t5_small.load_state(broken)
            assert torch.equal(loaded["w"], state["w"]) and loaded["key"] == "abc", (
                "a damaged state was loaded"
            )
        except t5_small.CheckpointError as error:
            assert "broken.pt" in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 150, "the rest is padding between the parts"


# ---- generation ------------------------------------------------------------------------------------


def keeps(logits, top_k=0, top_p=1.0):
    """Which tokens filter_logits keeps, after checking that their logits are unchanged."""
    got = t5_small.filter_logits(logits.clone(), top_k, top_p)
    kept = got > -torch.inf
    assert torch.equal(got[kept], logits[kept]), "kept logits must not change"
    return kept.long().tolist()


def test_filter_logits():
    logits = torch.tensor([[0.05, 0.5, 0.15, 0.3], [0.4, 0.31, 0.28, 0.01]]).log()
    check("top_k 0 and top_p 1 keep all", keeps(logits), [[1] * 4] * 2)
    check("top_k 1", keeps(logits, 1), [[0, 1, 0, 0], [1, 0, 0, 0]])
    check("top_k 3", keeps(logits, 3), [[0, 1, 1, 1], [1, 1, 1, 0]])
    check("top_k = V", keeps(logits, 4), [[1] * 4] * 2)
    check("top_k > V", keeps(logits, 9), [[1] * 4] * 2)
    check(
        "top_p .6: the smallest set of at least .6",
        keeps(logits, 0, 0.6),
        [[0, 1, 0, 1], [1, 1, 0, 0]],
    )
    check("top_p .75", keeps(logits, 0, 0.75), [[0, 1, 0, 1], [1, 1, 1, 0]])
    check("top_p .98", keeps(logits, 0, 0.98), [[1, 1, 1, 1], [1, 1, 1, 0]])
    check(
        "a tiny top_p keeps the likeliest",
        keeps(logits, 0, 1e-9),
        [[0, 1, 0, 0], [1, 0, 0, 0]],
    )
    check(
        "top_p of what top_k 3 left: .5/.95 + .3/.95 = .842",
        keeps(logits, 3, 0.84),
        [[0, 1, 0, 1], [1, 1, 1, 0]],
    )
    banned = torch.tensor([[1.0, -torch.inf, 0.0, -torch.inf]])
    check("a banned token stays banned", keeps(banned, 3, 0.99), [[1, 0, 1, 0]])


def test_filter_logits_ties():
    tied = torch.tensor([[1.0, 2.0, 1.0, 1.0, 0.0]])
    for k in (1, 2, 3):
        (kept,) = keeps(tied, k)
        assert kept[1] and not kept[4] and k <= sum(kept) <= 4, (
            f"top_k {k} of {tied.tolist()} keeps {kept}"
        )
    (kept,) = keeps(torch.zeros(1, 4), 0, 0.5)
    assert sum(kept) == 2, f"top_p .5 of four equals keeps two, not {kept}"


def restricted_log_probs(logits, step, s):
    """The distribution of a step as `generate` promises it, written down again (no min_length: step is enough)."""
    logits = logits.clone()
    logits[:, [0, 2]] = -torch.inf
    if step + 1 < s.min_length:
        logits[:, 1] = -torch.inf
    return t5_small.filter_logits(logits / s.temperature, s.top_k, s.top_p).log_softmax(-1)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(0.8, 9, 0.95, 3, 12),
        Sampling(2.0, 0, 1.0, 1, 12),
        Sampling(1.0, 0, 1.0, 4, 12, greedy=True),
    ],
)
def test_generate_cached_is_uncached(sampling):
    """Teacher-forced scoring of the sampled ids gives the same states, supports and log-probs."""
    model, source = (
        favour(tiny(1, tie_word_embeddings=False), 1, 4.0),
        ragged([9, 3, 6, 2, 14, 5, 7, 4]),
    )
    torch.manual_seed(3)
    with torch.no_grad():
        g = t5_small.generate(model, source, sampling)
        states = model.response_states(source, g.ids)
    mask = unfinished(g.ids)
    assert len(set(mask.sum(1).tolist())) >= 3, "the rows should end at different times"
    check("states", g.states[mask], states[mask])
    for t in range(g.ids.shape[1]):
        log_probs = restricted_log_probs(model.logits(states[:, t]), t, sampling)
        rows = mask[:, t]
        assert torch.equal(g.support[rows, t], log_probs[rows] > -torch.inf), (
            f"support at step {t}"
        )
        check(
            f"log-probs at step {t}",
            g.log_probs[rows, t],
            log_probs.gather(1, g.ids[:, t : t + 1])[rows, 0],
        )
    assert (
        (g.ids[~mask] == 0).all()
        and (g.log_probs[~mask] == 0).all()
        and not g.support[~mask].any()
    )
    if sampling.greedy:
        assert torch.equal(
            g.ids[mask], model.logits(g.states).masked_fill(~g.support, -99).argmax(-1)[mask]
        )


def test_generate_rows_do_not_mix():
    """Greedy in a batch of very different lengths = each row alone, without any padding."""
    model = favour(tiny(10, tie_word_embeddings=False), 1, 4.0)
    source, sampling = (
        ragged([2, 25, 9, 4, 17, 3, 12, 6], seed=2),
        Sampling(greedy=True, max_length=14),
    )
    together = t5_small.generate(model, source, sampling)
    lengths = unfinished(together.ids).sum(1).tolist()
    assert sum(n <= 4 for n in lengths) >= 4 and max(lengths) >= 10, (
        f"too alike to test compaction: {lengths}"
    )
    for row, (ids, n) in enumerate(zip(together.ids, lengths)):
        alone = t5_small.generate(
            model, source[row : row + 1, : int((source[row] != 0).sum())], sampling
        )
        assert alone.ids[0].tolist() == ids[:n].tolist(), (
            f"row {row} alone gives {alone.ids[0].tolist()}"
        )
        check(f"log-probs of row {row}", together.log_probs[row, :n], alone.log_probs[0])
        check(f"states of row {row}", together.states[row, :n], alone.states[0])


def test_generate_min_and_max_length():
    source = ragged([5, 3, 7])
    for n in (1, 2, 5):
        ids = t5_small.generate(
            favour(tiny(), 1, 80.0), source, Sampling(min_length=n, max_length=9)
        ).ids
        assert ids.shape == (3, n), f"</s> at the first chance, token {n}: got {ids.tolist()}"
        assert (ids[:, -1] == 1).all() and (ids[:, :-1] > 2).all()
    endless = t5_small.generate(favour(tiny(), 1, -80.0), source, Sampling(max_length=7))
    assert endless.ids.shape == (3, 7) and (endless.ids > 2).all(), (
        "never-ending responses stop at max_length"
    )
    assert endless.log_probs.shape == (3, 7) and (endless.log_probs < 0).all()


def test_generate_never_samples_banned_ids():
    model, source = tiny(vocab_size=8), ragged([4, 3], high=8).repeat(200, 1)
    g = t5_small.generate(
        model, source, Sampling(temperature=10.0, max_length=6, min_length=3)
    )
    mask = unfinished(g.ids)
    assert set(g.ids[mask].tolist()) == {1, 3, 4, 5, 6, 7}
    assert (
        not g.support[..., [0, 2]].any()
        and not g.support[:, :2, 1].any()
        and g.support[:, 2, 1][mask[:, 2]].all()
    )
    g = t5_small.generate(
        model, source, Sampling(temperature=10.0, max_length=6), banned=(0, 2, 5, 7)
    )
    assert set(g.ids[unfinished(g.ids)].tolist()) == {1, 3, 4, 6}


def test_generate_samples_what_it_says():
    """Chi-square of 4,000 first tokens against exp(log_probs); 7 degrees of freedom, 29.9 is p = 1e-4."""
    model, n = tiny(2), 4000
    source = ragged([6]).repeat(n, 1)
    torch.manual_seed(0)
    g = t5_small.generate(model, source, Sampling(temperature=0.7, top_k=8, max_length=1))
    with torch.no_grad():
        logits = model.logits(model.response_states(source[:1], torch.tensor([[3]])))[:, 0]
    expected = restricted_log_probs(logits, 0, Sampling(temperature=0.7, top_k=8)).exp()[0]
    check(
        "stated probability of the tokens drawn",
        g.log_probs[:, 0].exp(),
        expected[g.ids[:, 0]],
    )
    counts = torch.bincount(g.ids[:, 0], minlength=30).float()
    support = expected > 0
    assert support.sum() == 8 and counts[~support].sum() == 0
    chi_square = ((counts - n * expected)[support] ** 2 / (n * expected[support])).sum().item()
    assert chi_square < 29.9, (
        f"chi-square {chi_square:.1f}: expected {(n * expected[support]).tolist()}, "
        f"got {counts[support].tolist()}"
    )


def test_generate_depends_on_the_seed_only():
    model, source, sampling = tiny(), ragged([4, 6, 3]), Sampling(max_length=8)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(t5_small.generate(model, source, sampling).ids.tolist())
    assert runs[0] == runs[1] != runs[2]


# ---- the training step -----------------------------------------------------------------------------


def test_set_lr_scales_by_rms():
    model = torch.nn.ParameterDict(
        {
            "a": torch.tensor([3.0, 4.0]),
            "b": torch.zeros(5),
            "c": torch.full((2, 2), -0.1),
            "relative_bias": torch.full((3,), 0.2),
        }
    )
    optimizer = t5_small.make_optimizers(model)
    rates = lambda: [group["lr"] for group in optimizer[0].param_groups]
    t5_small.set_lr(optimizer, 0.02, rms_scaled=True)
    check(
        "0.02 x RMS of [3, 4] (3.536), of 0s (at least 1e-3), of -0.1s; a position bias's is 1",
        rates(),
        [0.02 * 12.5**0.5, 0.02 * 1e-3, 0.02 * 0.1, 0.02],
        tol=1e-7,
    )
    t5_small.set_lr(optimizer, 0.02, rms_scaled=False)
    check("absolute", rates(), [0.02] * 4)
    optimizer = t5_small.make_optimizers(model, weight_decay=0.1, unit=("b",))
    t5_small.set_lr(optimizer, 0.02, rms_scaled=True)
    check(
        "tensors whose name holds a b",
        rates(),
        [0.02 * 12.5**0.5, 0.02, 0.02 * 0.1, 0.02],
        tol=1e-7,
    )
    assert [g["weight_decay"] for g in optimizer[0].param_groups] == [0.1] * 4


def test_optimizer_step_clips_and_skips():
    p, q = (torch.tensor([10.0], requires_grad=True) for _ in range(2))
    optimizer = [torch.optim.SGD([{"params": [x]}], lr=1.0) for x in (p, q)]
    for _ in range(2):  # every step is clipped, not only the first
        before = [p.item(), q.item()]
        p.grad, q.grad = torch.tensor([3.0]), torch.tensor([4.0])
        check("norm before clipping", t5_small.optimizer_step(optimizer, 1.0), 5.0)
        check(
            "a step along (3, 4) of length 1",
            [before[0] - p.item(), before[1] - q.item()],
            [0.6, 0.8],
        )
        assert p.grad is None and q.grad is None or p.grad == q.grad == 0
    p.grad, q.grad = torch.tensor([0.3]), torch.tensor([0.4])
    before = p.item()
    t5_small.optimizer_step(optimizer, 1.0)
    check("a short gradient is not lengthened", before - p.item(), 0.3)
    for bad in (math.inf, math.nan):
        before = [p.item(), q.item()]
        p.grad, q.grad = torch.tensor([bad]), torch.tensor([4.0])
        assert not math.isfinite(t5_small.optimizer_step(optimizer, 1.0))
        assert [p.item(), q.item()] == before, "a gradient that is not finite was applied"
        assert p.grad is None or p.grad == 0, "a bad gradient was kept for the next step"


needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch 2.9 has it")


@needs_muon
def test_muon_takes_the_matrices_of_the_layers():
    """And only those: embeddings, norms and position biases stay with AdamW, and every tensor is in one group once."""
    model = tiny(tie_word_embeddings=False)
    adam, muon = t5_small.make_optimizers(model, muon=True)
    assert {g["name"].split(".")[-2] for g in muon.param_groups} == {
        "q",
        "k",
        "v",
        "o",
        "wi",
        "wo",
    }
    assert {
        g["name"].split(".")[-2] for g in adam.param_groups if g["params"][0].dim() == 2
    } == {"shared", "lm_head", "relative_bias"}
    assert sorted(g["name"] for o in (adam, muon) for g in o.param_groups) == sorted(
        n for n, _ in model.named_parameters()
    )
    assert len(t5_small.make_optimizers(model)) == 1, "without muon AdamW has them all"


@needs_muon
def test_a_step_of_muon_has_equal_singular_values():
    model = tiny()
    optimizers = t5_small.make_optimizers(model, muon=True)
    t5_small.set_lr(optimizers, 0.01, rms_scaled=False)
    weight = model.encoder.blocks[0].self_attn.q.weight
    before = weight.detach().clone()
    model.loss_sum(ragged([5, 3, 7]), ragged([4, 4, 2], seed=1))[0].backward()
    gradient = torch.linalg.svdvals(weight.grad)
    t5_small.optimizer_step(optimizers, 1.0)
    values = torch.linalg.svdvals(before - weight.detach()) / (
        0.01 * 0.2 * max(weight.shape) ** 0.5
    )
    assert gradient.max() / gradient.median() > 2, "a gradient like that would show nothing"
    assert values.max() < 1.3 and values.median() > 0.6, (
        f"{values.tolist()}: all near 1, as five Newton-Schulz steps make them"
    )


def copy_trainer(model, steps, batch=8, validate=None, **config):
    """Learn to copy 16 random sequences of 2 to 6 tokens."""
    data = ragged([2 + i % 5 for i in range(16)], high=model.config.vocab_size, seed=9)
    rows_at = lambda i: torch.randperm(16, generator=torch.Generator().manual_seed(i))[:batch]
    loss_sum = lambda rows: model.loss_sum(data[rows], data[rows])

    def mean_loss():
        loss, tokens = model.loss_sum(data, data)
        return loss.item() / tokens

    return Trainer(
        model,
        loss_sum,
        rows_at,
        validate or mean_loss,
        TrainConfig(steps=steps, warmup=2, **config),
    )


@pytest.mark.parametrize("muon", [False, pytest.param(True, marks=needs_muon)])
def test_trainer_overfits(muon):
    model = tiny(
        d_model=32, d_kv=8, d_ff=64, num_layers=1, num_decoder_layers=1, dropout_rate=0.0
    )
    trainer = copy_trainer(model, 120, batch=16, lr=3e-2, eval_every=120, muon=muon)
    records = [trainer.step(i) for i in range(120)]
    assert records[0]["loss"] > 2.5 and records[-1]["valid"] < 0.1, (
        f"{records[0]['loss']} -> {records[-1]['valid']}"
    )


@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_trainer_micro_batch_is_the_same(micro_batch, monkeypatch):
    gradients, step = [], t5_small.optimizer_step

    def spy(optimizers, max_grad_norm):
        gradients.append(
            [
                g["params"][0].grad.clone()
                for optimizer in optimizers
                for g in optimizer.param_groups
            ]
        )
        return step(optimizers, max_grad_norm)

    monkeypatch.setattr(t5_small, "optimizer_step", spy)
    results = []
    for size in (0, micro_batch):
        model = tiny()
        record = copy_trainer(model, 4, micro_batch=size).step(0)
        results.append((record["loss"], list(model.parameters())))
    check("loss", results[1][0], results[0][0], tol=1e-6)
    for whole, parts, p, q in zip(*gradients, results[0][1], results[1][1]):
        check("gradient", parts, whole, tol=1e-6)
        matters = whole.abs() > 1e-4  # Adam's first step is the sign: rounding decides below
        check("weights after the step", q[matters], p[matters], tol=1e-6)


def test_trainer_loss_is_a_mean_over_tokens():
    """The gradient of a batch is that of the mean over its tokens, so a batch repeated gives the same."""
    norms = []
    for repeat in (1, 2):
        model, data = tiny(), ragged([3, 5, 2])
        trainer = Trainer(
            model,
            lambda rows: model.loss_sum(data[rows], data[rows]),
            lambda i: torch.arange(3).repeat(repeat),
            lambda: 0.0,
            TrainConfig(steps=1),
        )
        norms.append(trainer.step(0))
    check(
        "loss and norm",
        [norms[1][k] for k in ("loss", "grad_norm")],
        [norms[0][k] for k in ("loss", "grad_norm")],
    )


def test_trainer_schedule_and_best_weights():
    scores = iter([5.0, 1.0, 3.0])
    model = tiny()
    trainer = copy_trainer(model, 6, lr=0.01, eval_every=2, validate=lambda: next(scores))
    records, weights = [], []
    for i in range(6):
        records.append(trainer.step(i))
        weights.append(model.shared.weight.detach().clone())
    check(
        "2 steps up, 4 down",
        [r["lr"] for r in records],
        [0.005, 0.01, 0.01, 0.0075, 0.005, 0.0025],
        tol=1e-9,
    )
    assert [r.get("valid") for r in records] == [None, 5.0, None, 1.0, None, 3.0]
    assert trainer.best["score"] == 1.0
    trainer.finish()
    assert torch.equal(model.shared.weight, weights[3]) and not torch.equal(
        weights[3], weights[5]
    )
    assert not model.training


def test_trainer_resume_is_bit_identical(tmp_path):
    def steps(trainer, numbers):
        for i in numbers:
            torch.manual_seed(100 + i)
            trainer.step(i)
        return trainer

    make = lambda seed: copy_trainer(tiny(seed, dropout_rate=0.1), 6, eval_every=2)
    whole = steps(make(0), range(6))
    t5_small.save_atomically(steps(make(0), range(3)).state_dict(), tmp_path / "state.pt")
    resumed = make(1)  # other weights: all must come from the file
    resumed.load_state_dict(saved := t5_small.load_state(tmp_path / "state.pt"))
    assert resumed.best["score"] == saved["best"]["score"] < math.inf, (
        "the best validation so far is forgotten"
    )
    steps(resumed, range(3, 6))
    whole, resumed = whole.state_dict(), resumed.state_dict()
    for a, b in (
        (whole["model"], resumed["model"]),
        (whole["best"]["weights"], resumed["best"]["weights"]),
    ):
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), (
            "not bit-identical"
        )
    assert whole["best"]["score"] == resumed["best"]["score"]


# ---- bf16 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"}]
)
def test_bf16_is_close_to_fp32(changes):
    model, source, response = tiny(**changes), ragged([6, 9, 4]), ragged([5, 3, 7], seed=1)
    sampling = Sampling(top_k=5, max_length=8)
    exact = model.loss_sum(source, response)[0].item()
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = model.loss_sum(source, response)
        g = t5_small.generate(model, source, sampling)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert loss.dtype == g.log_probs.dtype == g.states.dtype == torch.float32
    assert abs(loss.item() / exact - 1) < 0.02, f"bf16 loss {loss.item()}, fp32 {exact}"
    mask = unfinished(g.ids)
    with torch.no_grad():
        logits = model.logits(model.response_states(source, g.ids)).masked_fill(
            ~g.support, -1e9
        )
    log_probs = logits.log_softmax(-1).gather(-1, g.ids[..., None])[..., 0]
    assert g.log_probs.isfinite().all() and (g.log_probs - log_probs)[mask].abs().max() < 0.2
