"""Every result says what it is a result of, and whatever uses it looks: folders, data, code."""

import errno
import io
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import emprl
import t5_small
from data import DataError
from tests.forks import Fork
from tests.lab import tables
from tests.tools import (
    contents,
    interrupt_at,
    official,
    read_json,
    records,
    smoke,
    weights,
    words,
)


@pytest.fixture
def nothing_is_trained(monkeypatch):
    for trainer in (t5_small.Trainer, emprl.PPOTrainer):
        monkeypatch.setattr(trainer, "step", lambda *_: pytest.fail("trained again"))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A finished smoke run of other settings and other data."""
    folder = tmp_path_factory.mktemp("other") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emprl, "draw_plots", lambda *_: {})
        settings = ("ppo.lr=1e-3", "mle.lr=1e-2", "data.num_train=220")
        assert emprl.main(words(folder, *settings)) == 0
    return folder


def refused(command, folder, capsys):
    """The line on stderr of a command that is refused and changes nothing in the folder."""
    before = contents(folder)
    capsys.readouterr()
    assert emprl.main(command) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    assert contents(folder) == before
    return err


def interrupted(folder, stage, step, *settings):
    """A run that is stopped by Ctrl-C in a stage."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, stage, step)
        assert emprl.main(words(folder, *settings)) == 130
    return folder


def same_result(folder, whole):
    """Bit-identical, but for how long it took, where it lies, and of which code it is: somebody
    may be at work on it while the tests run."""
    for name in ("metrics.jsonl", "config.json", "tokenizer.model", "responses.jsonl"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    other = {"seconds": 0, "code": ""}
    one, two = read_json(folder / "metrics.json"), read_json(whole / "metrics.json")
    assert {**one, **other} == {**two, **other}
    for stage in ("pretrain", "mle", "identifiers", "judge", "context", "ppo"):
        assert weights(folder, stage) == weights(whole, stage), stage
    return True


# ---- a folder has the results of one configuration ----------------------------------------------


def test_a_second_call_skips_every_stage(copied, finished, no_pictures, nothing_is_trained):
    assert emprl.main(words(copied)) == 0
    assert same_result(copied, finished)
    assert min(read_json(copied / "metrics.json")["seconds"].values()) >= 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["--seed", "7"],
        ["--set", "data.num_train=201"],
        ["--set", "t5.num_heads=1", "t5.d_kv=32"],
        ["--set", "t5.dropout_rate=0.1"],
        ["--set", "pretrain.task=turns"],
        ["--set", "mle.lr=1"],
        ["--set", "identifiers.steps=9"],
        ["--set", "context.steps=9"],
        ["--set", "reward.balance=0.5"],
        ["--set", "exploring.top_k=5"],
        ["--set", "replying.top_k=5"],
        ["--set", "ppo.kl_coef=0"],
        ["--set", "ppo.valid_contexts=9"],
        ["--set", "eval.best_of=1"],
        ["--set", "eval.contexts=20"],
        ["--set", "data.num_test=41"],
    ],
)
def test_another_configuration_is_refused_and_nothing_is_lost(arguments, copied, capsys):
    command = ["--preset", "smoke", *arguments, "--run", str(copied)]
    err = refused(command, copied, capsys)
    again = f"python emprl.py --preset smoke {' '.join(arguments)} --run {copied}-2"
    assert err.endswith(f"{again}\n"), "the same command with another --run"


def test_without_metrics_it_is_refused_as_well(copied, capsys, no_pictures):
    """The stages are there, the evaluation is not: only its settings are still free."""
    for name in ("metrics.json", "report.md", "samples.md", "responses.jsonl"):
        (copied / name).unlink()
    for setting in ("mle.lr=1", "context.steps=9", "ppo.kl_coef=0", "replying.top_k=5"):
        refused(words(copied, setting), copied, capsys)
    assert emprl.main(words(copied, "eval.best_of=1")) == 0
    assert read_json(copied / "config.json")["eval"]["best_of"] == 1
    refused(words(copied), copied, capsys)


def test_the_default_folder_too(tmp_path, capsys, monkeypatch, no_pictures):
    """Without --run; and the folder that is proposed is not there yet."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "smoke-seed0-2").mkdir(parents=True)
    few = ["--preset", "smoke", "--set", "eval.contexts=4", *NO_STEPS]
    assert emprl.main(few) == 0
    err = refused([*few, "t5.num_heads=1"], tmp_path, capsys)
    again = " ".join([*few, "t5.num_heads=1", "--run", "runs/smoke-seed0-3"])
    assert err.endswith(f"python emprl.py {again}\n")


def test_a_run_that_was_stopped_goes_on_by_its_own_command_only(
    finished, tmp_path, capsys, no_pictures
):
    """In one stage, then in a later one, then in the last."""
    here = tmp_path / "run"
    for stage, step in (("pretrain", 2), ("judge", 3), ("ppo", 2)):
        interrupted(here, stage, step)
        assert "go on with: python emprl.py --preset smoke" in capsys.readouterr().err
        for setting in ("mle.lr=1e-3", "data.num_train=201", f"{stage}.steps=20"):
            if setting != "judge.steps=20":
                refused(words(here, setting), here, capsys)
        refused(["--seed", "7", *words(here)], here, capsys)
    assert emprl.main(words(here)) == 0
    assert same_result(here, finished)


@pytest.fixture(scope="module")
def stopped_in_judge(tmp_path_factory):
    """A run that was stopped there; nobody writes into it."""
    return interrupted(tmp_path_factory.mktemp("stopped") / "run", "judge", 3)


@pytest.mark.parametrize("setting", ["ppo.lr=1e-3", "ppo.valid_contexts=9", "eval.best_of=2"])
def test_settings_of_stages_that_are_not_there_may_change(
    setting, stopped_in_judge, finished, tmp_path, no_pictures
):
    """After Ctrl-C in the judge's training those of PPO are still free."""
    here = shutil.copytree(stopped_in_judge, tmp_path / "run")
    assert emprl.main(words(here, "ppo.steps=1", "eval.contexts=4", setting)) == 0
    section, _, name = setting.partition("=")[0].partition(".")
    said = read_json(here / "config.json")[section][name]
    assert said == float(setting.partition("=")[2])
    assert weights(here, "judge") == weights(finished, "judge")


EVALUATION = "evaluate-mine-0123456789ab.json"


def test_what_is_not_of_a_stage_made_anew_stays(copied, no_pictures):
    """An evaluation, while nothing is trained; one's own notes and folders, even then."""
    (copied / EVALUATION).write_text("{}", encoding="utf-8")
    own = ["evaluate-notes.txt", "evaluate-mine.json", "evaluate-a-0123456789ab.txt"]
    for name in own:
        (copied / name).write_text("mine", encoding="utf-8")
    folders = ["evaluate-all", "evaluate-all-0123456789ab.json"]
    for name in folders:
        (copied / name).mkdir()

    assert emprl.main(words(copied)) == 0
    for name in (EVALUATION, *own, *folders):
        assert (copied / name).exists(), name
    (copied / "checkpoints" / "ppo.pt").unlink()
    interrupted(copied, "ppo", 2)
    for name in (*own, *folders):
        assert (copied / name).exists(), name
    assert not (copied / EVALUATION).exists()


def test_results_go_when_a_stage_is_made_anew(copied):
    (copied / "checkpoints" / "ppo.pt").unlink()
    (copied / EVALUATION).write_text("{}", encoding="utf-8")
    (copied / "plots").mkdir(exist_ok=True)
    (copied / "plots" / "ppo.png").write_bytes(b"")
    results = ["metrics.json", "report.md", "samples.md", "responses.jsonl"]
    results += [EVALUATION, "plots/ppo.png"]
    interrupted(copied, "ppo", 2)
    for name in results:
        assert not (copied / name).exists(), name
    assert emprl.main(["chat", "--run", str(copied)]) == 2, "not a finished run any more"


def test_a_stage_made_anew_from_other_weights_refuses_all_after_it(
    copied, monkeypatch, capsys
):
    """A student changes MLE's code and deletes its checkpoint: nothing made from the old one is
    taken for a result of the new one."""
    step = t5_small.Trainer.step

    def changed(trainer, i):
        record = step(trainer, i)
        with torch.no_grad():
            next(trainer.model.parameters()).add_(0.01)
        return record

    monkeypatch.setattr(t5_small.Trainer, "step", changed)
    (copied / "checkpoints" / "mle.pt").unlink()
    assert emprl.main(words(copied)) == 2
    err = capsys.readouterr().err
    assert "identifiers.pt" in err
    assert "--run" in err


# ---- the content of the data counts -------------------------------------------------------------


def test_a_stage_is_saved_at_its_end_and_now_and_then(tmp_path, monkeypatch, no_pictures):
    """Not at every step, which would cost more than the steps; skipped ones are not saved."""
    saved, save, step = [], emprl.save_atomically, t5_small.Trainer.step

    def watched(state, path):
        saved.append(f"{path.stem} {len(state['log'])}" if "log" in state else path.stem)
        save(state, path)

    def skipped(trainer, i):
        return {**step(trainer, i), "skipped": float(i % 2)}

    monkeypatch.setattr(emprl, "save_atomically", watched)
    monkeypatch.setattr(emprl.Run, "save_every", 1e9)
    smoke(tmp_path / "a", "eval.contexts=4")
    stages = ["pretrain 4", "mle 12", "identifiers 8", "context 4", "judge 8", "ppo 4"]
    assert saved == stages

    saved.clear()
    monkeypatch.setattr(emprl.Run, "save_every", -1.0)
    monkeypatch.setattr(t5_small.Trainer, "step", skipped)
    smoke(tmp_path / "b", *NO_PPO, "eval.contexts=4")
    assert saved[:3] == ["pretrain 1", "pretrain 3", "pretrain 4"]


def test_data_that_has_changed_is_seen(tmp_path, capsys, no_pictures, nothing_is_trained):
    lines = records(61)
    file, run = tmp_path / "mine.jsonl", tmp_path / "run"
    file.write_text("".join(lines[:60]), encoding="utf-8")
    command = words(run, "data.vocab_size=300", *NO_STEPS)
    assert emprl.main([*command, "--data", str(file)]) == 0

    file.write_text("".join(lines[1:]), encoding="utf-8")
    err = refused([*command, "--data", str(file)], run, capsys)
    assert "other data" in err

    moved = tmp_path / "moved.jsonl"
    moved.write_text("".join(lines[:60]), encoding="utf-8")
    assert emprl.main([*command, "--data", str(moved)]) == 0, "the same at another place"


NO_PPO = ["mle.steps=0", "identifiers.steps=0", "context.steps=0", "ppo.steps=0"]
NO_STEPS = [
    f"{stage}.steps=0" for stage in ("pretrain", "mle", "identifiers", "context", "ppo")
]


def test_other_test_data_is_other_data(copied, capsys, monkeypatch):
    """What is only tested on is in no stage, but in the figures."""
    world = emprl.data.generated_corpus

    def another(*sizes):
        corpus = world(*sizes)
        corpus.dialogues["test"] = corpus.dialogues["test"][::-1]
        return corpus

    monkeypatch.setattr(emprl.data, "generated_corpus", another)
    assert "metrics.json" in refused(words(copied), copied, capsys)


def test_data_is_read_once_and_its_key_is_of_what_was_read(tmp_path, monkeypatch, no_pictures):
    """The file changes while the run goes on: all stages are of the old content, and a run of
    the new one is refused."""
    lines = records(61)
    file, here = tmp_path / "mine.jsonl", tmp_path / "run"
    file.write_text("".join(lines[:60]), encoding="utf-8")
    config = emprl.make_config("smoke", 0, file, settings=["data.vocab_size=300", *NO_STEPS])
    run = emprl.Run(here, config)
    seed = run.seed

    def seed_and_change(stage, step=0):
        if stage == "identifiers":
            file.write_text("".join(lines[1:]), encoding="utf-8")
        seed(stage, step)

    monkeypatch.setattr(run, "seed", seed_and_change)
    emprl.run_all(run)
    with pytest.raises(emprl.DataError, match="other data"):
        emprl.run_all(emprl.Run(here, config))
    file.write_text("".join(lines[:60]), encoding="utf-8")
    emprl.run_all(emprl.Run(here, config))


def test_a_t5_folder_with_other_weights_is_seen(finished, tmp_path, no_pictures):
    t5, here = official(tmp_path / "t5", finished), tmp_path / "run"
    smoke(here, *NO_PPO, t5_dir=t5)
    official(tmp_path / "t5", finished, 1.01)
    before = contents(here)
    with pytest.raises(emprl.DataError, match="pretrain.pt.* other data"):
        smoke(here, *NO_PPO, t5_dir=t5)
    assert contents(here) == before


# ---- a mixture is refused -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.model",
        "checkpoints/identifiers.pt",
        "checkpoints/judge.pt",
        "mle/pytorch_model.bin",
        "emprl/pytorch_model.bin",
        "metrics.json",
    ],
)
def test_a_mixture_of_two_runs_is_refused(name, copied, other, capsys, monkeypatch):
    shutil.copy(other / name, copied / name)
    file = copied / "mine.jsonl"
    file.write_text('{"context": "Hello", "response": "Hi"}\n', encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    for command in (["chat"], ["evaluate", "--data", str(file)]):
        err = refused([*command, "--run", str(copied)], copied, capsys)
        assert str(copied) in err
        assert "of another run" in err
        if name != "metrics.json":  # which is right of none of the others
            assert name.split("/")[-2 if "bin" in name else -1] in err


def test_a_configuration_that_someone_edited_is_refused(copied, capsys):
    metrics = read_json(copied / "metrics.json")
    metrics["config"]["replying"]["max_length"] = 3
    (copied / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    err = refused(["chat", "--run", str(copied)], copied, capsys)
    assert "its configuration is not what metrics.json was measured on" in err


def test_tables_refuse_the_replies_of_another_run(copied, other):
    shutil.copy(other / "responses.jsonl", copied)
    with pytest.raises(DataError, match="responses.jsonl: not the replies"):
        tables.read_levels(copied)


@pytest.mark.parametrize(
    "content", ["[]", '{"made_of": 3}', "[" * 100_000], ids=["list", "number", "deep"]
)
def test_a_metrics_json_of_another_shape_does_not_stop_a_run(content, copied, no_pictures):
    (copied / "metrics.json").write_text(content, encoding="utf-8")
    (copied / "environment.json").write_text("[{}]", encoding="utf-8")
    assert emprl.main(words(copied)) == 0
    assert "made_of" in read_json(copied / "metrics.json")


@pytest.mark.parametrize(
    "content", ['[1, [1, 2], "ab", null]', '[[1, 2], {"code": 3}, 1, null]']
)
def test_an_odd_environment_json_does_not_stop_a_run(
    content, copied, no_pictures, nothing_is_trained
):
    """What is a record of a start stays, the rest is ignored."""
    (copied / "environment.json").write_text(content, encoding="utf-8")
    assert emprl.main(words(copied)) == 0
    *earlier, last = read_json(copied / "environment.json")
    assert earlier == [start for start in json.loads(content) if isinstance(start, dict)]
    assert last["code"] == emprl.code_version()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes")
def test_a_pipe_that_is_called_metrics_json_is_not_waited_for(
    copied, no_pictures, nothing_is_trained, capsys
):
    (copied / "metrics.json").unlink()
    os.mkfifo(copied / "metrics.json")
    told = refused(["chat", "--run", str(copied)], copied, capsys)
    assert (
        f"no finished run there; make one with `{emprl.program('--run', str(copied))}`" in told
    )
    assert emprl.main(words(copied)) == 0
    assert "made_of" in read_json(copied / "metrics.json")


@pytest.mark.parametrize("stage", ["mle", "context", "ppo"])
def test_a_checkpoint_of_another_run_is_not_trained_on(stage, copied, other, capsys):
    shutil.copy(other / "checkpoints" / f"{stage}.pt", copied / "checkpoints")
    assert f"{stage}.pt" in refused(words(copied), copied, capsys)


# ---- one at a time ------------------------------------------------------------------------------


def started(command):
    """A run in a process of its own: a fork where there is one, which need not import torch."""
    if hasattr(os, "fork"):
        with open(os.devnull, "wb") as nothing:
            return Fork(lambda: sys.exit(emprl.main(command)), nothing)
    line = [sys.executable, emprl.__file__, *command]
    return subprocess.Popen(line, stdout=subprocess.PIPE, encoding="utf-8")


def test_a_second_run_in_the_folder_is_refused_until_the_first_is_killed(
    tmp_path, finished, no_pictures, capsys
):
    here = tmp_path / "run"
    endless = words(here, "mle.steps=100000", "mle.eval_every=100000", "pretrain.steps=0")
    first = started(endless)
    try:
        while "mle " not in (line := first.stdout.readline()):
            assert line, "it has ended"
        for command in (words(here), endless):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(emprl, "run_all", lambda run: pytest.fail("it runs"))
                assert emprl.main(command) == 2
            err = capsys.readouterr().err
            assert err.count("\n") == 1, err
            assert "another command is at work" in err
        assert first.poll() is None, "and the first goes on"
    finally:
        first.kill()
        first.wait()
    shutil.rmtree(here / "checkpoints")
    assert emprl.main(words(here)) == 0
    assert same_result(here, finished)


def test_without_locks_it_runs_all_the_same(tmp_path, monkeypatch):
    """A disk or a system that has none."""

    def unsupported(*_):
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setitem(sys.modules, "msvcrt", None)
    no_disk = types.SimpleNamespace(flock=unsupported, LOCK_EX=2, LOCK_NB=4)
    for fcntl in (no_disk, None):
        monkeypatch.setitem(sys.modules, "fcntl", fcntl)
        with emprl.alone(tmp_path), emprl.alone(tmp_path):
            pass


def test_the_lock_of_windows_is_asked_for_and_believed(tmp_path, monkeypatch):
    asked = []

    def locking(number, mode, size):
        asked.append((mode, size))
        if len(asked) == 2:
            raise OSError(errno.EACCES, "Permission denied")

    windows = types.SimpleNamespace(locking=locking, LK_NBLCK=2)
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", windows)
    with emprl.alone(tmp_path):
        with pytest.raises(emprl.DataError, match="another command"):
            with emprl.alone(tmp_path):
                pytest.fail("not alone")
    assert asked == [(2, 1), (2, 1)]


# ---- the environment ----------------------------------------------------------------------------


def git(folder, *arguments):
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *who, *arguments]
    done = subprocess.run(command, capture_output=True, check=True, encoding="utf-8")
    return done.stdout.strip()


def test_code_is_known_by_its_own_commit_and_its_changes(tmp_path, monkeypatch):
    """A repository; a change in it; a new module; a copy without .git inside of it, and a
    change in that."""

    def version(folder, text=None):
        if text:
            (folder / "emprl.py").write_text(text, encoding="utf-8")
        monkeypatch.setattr(emprl, "__file__", str(folder / "emprl.py"))
        return emprl.code_version()

    alone = version(tmp_path, "one = 1\n")
    assert (alone["commit"], alone["changed"]) == (None, None)
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "emprl.py")
    git(tmp_path, "commit", "-qm", "one")
    clean = version(tmp_path)
    assert clean == {**alone, "commit": git(tmp_path, "rev-parse", "HEAD")}

    changed = version(tmp_path, "one = 2\n")
    assert changed["commit"] == clean["commit"]
    assert changed["changed"]
    assert version(tmp_path, "one = 3\n")["changed"] not in (None, changed["changed"])
    assert version(tmp_path, "one = 1\n") == clean
    (tmp_path / "new.py").write_text("", encoding="utf-8")
    assert version(tmp_path) != clean, "that git does not know of yet"

    inner = tmp_path / "copy"
    inner.mkdir()
    assert version(inner, "one = 1\n") == alone, "the repository around is not its own"
    assert version(inner, "one = 2\n") != alone, "a change is seen without git"


def test_a_resumed_run_keeps_its_first_environment_and_says_that_the_code_is_another(
    tmp_path, monkeypatch, capsys, no_pictures
):
    here = tmp_path / "run"
    monkeypatch.setattr(sys, "argv", ["emprl.py", "first"])
    few = ["pretrain.steps=1", "mle.steps=4", "identifiers.steps=1", "context.steps=1"]
    few += ["ppo.steps=1", "eval.contexts=4"]
    interrupted(here, "mle", 3, *few)
    monkeypatch.setattr(sys, "argv", ["emprl.py", "second"])
    assert emprl.main(words(here, *few)) == 0
    assert "warning: other code" not in capsys.readouterr().out
    monkeypatch.setattr(emprl, "code_version", lambda: {"commit": "abc", "changed": None})
    monkeypatch.setattr(t5_small.Trainer, "step", lambda *_: pytest.fail("trained again"))
    assert emprl.main(words(here, *few)) == 0, "other code is no reason to refuse"
    assert "warning: other code" in capsys.readouterr().out
    starts = read_json(here / "environment.json")
    commands = [one["command"] for one in starts]
    assert commands == ["emprl.py first", "emprl.py second", "emprl.py second"]
    assert starts[2]["code"]["commit"] == "abc" != starts[0]["code"]["commit"]
    monkeypatch.setattr(emprl, "code_version", lambda: {"commit": "def", "changed": None})
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert emprl.main(["chat", "--run", str(here)]) == 0
    assert "warning: the run was made by other code" in capsys.readouterr().out


def test_a_file_that_is_not_written_to_its_end_stays_as_it_was(copied, monkeypatch):
    """As when the process is killed: either the old one is there, or the new one."""

    def killed(*_):
        raise KeyboardInterrupt

    before = contents(copied)
    run = emprl.Run(copied, emprl.make_config("smoke"))
    monkeypatch.setattr(emprl.os, "replace", killed)
    for name in ("metrics.json", "metrics.jsonl", "report.md"):
        with pytest.raises(KeyboardInterrupt):
            run.write(name, "half of")
        assert (copied / name).read_bytes() == before[copied / name]


@pytest.mark.parametrize(
    "given, found",
    [
        ({}, {"GOMP_SPINCOUNT": "1500"}),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, {"OMP_WAIT_POLICY": "PASSIVE"}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
    ],
)
def test_how_threads_wait_is_set_unless_you_do(given, found, monkeypatch):
    """By the lines above the imports: before torch is loaded, which reads it then."""
    monkeypatch.setattr(os, "environ", dict(given))
    source = Path(emprl.__file__).read_text(encoding="utf-8")
    head, _ = source.split("import argparse")
    assert "import torch" not in head
    exec(head, {"__name__": "emprl"})
    run = types.SimpleNamespace(code={}, device="cpu")
    assert emprl.environment(run)["waiting"] == found


def test_how_fast_the_machine_is_on_one_and_on_all_threads(finished):
    (found,) = read_json(finished / "environment.json")
    assert set(found["gflops"]) == {"1", str(found["threads"])}
    assert all(x > 0.01 for x in found["gflops"].values())
    before = torch.get_num_threads()
    state = torch.get_rng_state()
    assert emprl.gflops(2) > 0.01
    assert torch.get_num_threads() == before
    assert torch.equal(torch.get_rng_state(), state)
