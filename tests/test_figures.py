"""Figures are what their label says: each from a run of the smallest preset, or by hand."""

import emprl
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
    logs = [(tmp_path / str(every) / "metrics.jsonl").read_text() for every in (2, 6)]
    assert logs[0] == logs[1] and logs[0].count('"pretrain"') == 6
