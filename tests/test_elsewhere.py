"""Elsewhere than here: other devices, another encoding of text files, Windows as far as it can be simulated."""

import warnings

import pytest
import torch

import emprl


@pytest.fixture(autouse=True)
def look_again():
    """Which device there is, is looked up once a process."""
    emprl.find_device.cache_clear()
    yield
    emprl.find_device.cache_clear()


# ---- the device


def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(emprl.shutil, "which", lambda name: None)


def old_driver(monkeypatch):
    def is_available():
        warnings.warn("CUDA initialization: The NVIDIA driver on your system is too old")
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)


def no_kernels(monkeypatch):
    def ones(*size, device=None):
        raise RuntimeError("CUDA error: no kernel image is available\nfor execution")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", ones)


def cpu_build(monkeypatch):
    no_gpu(monkeypatch)
    monkeypatch.setattr(emprl.shutil, "which", lambda name: f"/bin/{name}")


def device_of_a_run(monkeypatch, tmp_path, *arguments):
    """The exit code of `emprl.py` and the device that its run would be on; None if there is none."""
    found = []
    monkeypatch.setattr(emprl, "run_all", lambda run: found.append(run.device))
    code = emprl.main(["--preset", "smoke", "--run", str(tmp_path / "run"), *arguments])
    return code, *found


@pytest.mark.parametrize(
    "there, words",
    [
        (old_driver, "driver on your system is too old"),
        (no_kernels, "no kernel image is available for execution"),
        (cpu_build, "is built without it"),
    ],
)
def test_a_device_that_can_not_be_used_is_one_line(
    there, words, tmp_path, monkeypatch, capsys
):
    there(monkeypatch)
    assert device_of_a_run(monkeypatch, tmp_path) == (0, "cpu")
    told = capsys.readouterr()
    assert words in told.out and told.out.count("\n") == 1 and not told.err
    assert device_of_a_run(monkeypatch, tmp_path) == (0, "cpu")
    assert not capsys.readouterr().out, "said once"

    assert device_of_a_run(monkeypatch, tmp_path / "new", "--device", "cuda") == (2,)
    told = capsys.readouterr()
    assert words in told.err and "--device cuda" in told.err and told.err.count("\n") == 1
    assert not (tmp_path / "new").exists(), "nothing was written"


def test_without_a_device_there_is_nothing_to_say(tmp_path, monkeypatch, capsys):
    no_gpu(monkeypatch)
    assert device_of_a_run(monkeypatch, tmp_path) == (0, "cpu")
    assert device_of_a_run(monkeypatch, tmp_path, "--device", "cpu") == (0, "cpu")
    told = capsys.readouterr()
    assert not told.out and not told.err
    assert device_of_a_run(monkeypatch, tmp_path, "--device", "cuda") == (2,)
    assert "none is seen" in (err := capsys.readouterr().err) and err.count("\n") == 1


def test_apples_gpu_is_not_used(tmp_path, monkeypatch, capsys):
    no_gpu(monkeypatch)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert device_of_a_run(monkeypatch, tmp_path) == (0, "cpu")
    assert (
        "Apple's GPU is not used" in (out := capsys.readouterr().out) and out.count("\n") == 1
    )


def test_a_gpu_is_used_if_nothing_is_said_and_left_alone_if_the_cpu_is(tmp_path, monkeypatch):
    ones = torch.ones
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", lambda *size, device=None: ones(*size))
    assert device_of_a_run(monkeypatch, tmp_path) == (0, "cuda")
    assert device_of_a_run(monkeypatch, tmp_path, "--device", "cuda") == (0, "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("asked"))
    assert device_of_a_run(monkeypatch, tmp_path, "--device", "cpu") == (0, "cpu")


@pytest.mark.parametrize("command", [["rate", "x"], ["ablate", "kl", "x"]])
def test_commands_without_a_device_refuse_one(command, capsys):
    assert emprl.main([*command, "--device", "cpu"]) == 2
    assert "--device" in (err := capsys.readouterr().err) and err.count("\n") == 1
