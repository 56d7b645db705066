"""Every result says what it is a result of, and whatever uses it looks: folders, settings, ablations, environments."""

import io
import errno
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

import emprl
import faults
import t5_small


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows can not fork")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished smoke run."""
    folder = tmp_path_factory.mktemp("results") / "whole"
    assert faults.run(folder) == (0, "")
    return folder


@pytest.fixture
def copied(whole, tmp_path):
    """A copy of it."""
    return shutil.copytree(whole, tmp_path / "run")


def records(number, seed=3):
    """Lines of a .jsonl of dialogues with levels."""
    dialogues = emprl.data.embedded_corpus(seed, number, 1, 1, 1).dialogues["train"]
    lines = []
    for d in dialogues:
        levels = dict(zip(emprl.MECHANISMS, d.levels))
        lines.append(
            json.dumps({"context": list(d.context), "response": d.response, **levels}) + "\n"
        )
    return lines


def contents(folder):
    """{path: bytes} of a folder."""
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def weights(folder, stage):
    """{name: values} of a stage's result."""
    state = t5_small.load_state(folder / "checkpoints" / f"{stage}.pt")
    return {name: x.tolist() for name, x in state["weights"].items()}


# ---- a folder has the results of one configuration


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--set", "ppo.kl_coef=0"], "ppo.kl_coef"),
        (["--set", "eval.best_of=1"], "eval.best_of"),
        (["--set", "eval.valid_contexts=9"], "eval.valid_contexts"),
        (["--seed", "7"], "seed"),
        (["--set", "data.num_train=201"], "data.num_train"),
    ],
)
def test_another_configuration_is_refused_and_nothing_is_lost(
    arguments, words, copied, capsys
):
    before = contents(copied)
    command = ["--preset", "smoke", *arguments, "--run", str(copied)]
    assert emprl.main(command) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and words in err, err
    assert contents(copied) == before
    again = f"python emprl.py --preset smoke {' '.join(arguments)} --run {copied}-2"
    assert err.endswith(f"{again}\n"), "the same command with another --run"


def test_the_default_folder_too(tmp_path, capsys, monkeypatch):
    """Without --run; and the folder that is proposed is not there yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(emprl, "draw_plots", lambda *_: None)
    (tmp_path / "runs" / "smoke-seed0-2").mkdir(parents=True)
    assert emprl.main(["--preset", "smoke"]) == 0
    capsys.readouterr()
    assert emprl.main(["--preset", "smoke", "--set", "ppo.lr=1"]) == 2
    assert "--set ppo.lr=1 --run runs/smoke-seed0-3" in capsys.readouterr().err


@needs_fork
def test_half_finished_results_are_refused_as_well_and_go_on_by_their_own_command(
    whole, tmp_path
):
    here = tmp_path / "run"
    code, _ = faults.run(here, before=lambda: faults.at("judge", 3, faults.interrupt))
    assert code == 130
    assert faults.run(here, "sft.lr=1e-3")[0] == 2
    assert faults.run(here) == (0, "") and not faults.differences(here, whole)


@needs_fork
def test_settings_of_stages_of_which_nothing_is_there_may_change(tmp_path, whole):
    """After Ctrl-C in the judge's training PPO's options are still free; nothing is trained anew."""
    here = tmp_path / "run"
    faults.run(here, before=lambda: faults.at("judge", 3, faults.interrupt))
    assert faults.run(here, "ppo.lr=1e-3") == (0, "")
    assert json.loads((here / "config.json").read_text(encoding="utf-8"))["ppo"]["lr"] == 1e-3
    assert weights(here, "judge") == weights(whole, "judge")


@needs_fork
def test_results_go_when_a_stage_is_made_anew(copied):
    (copied / "checkpoints" / "ppo.pt").unlink()
    code, _ = faults.run(copied, before=lambda: faults.at("ppo", 2, faults.interrupt))
    assert code == 130
    assert not (copied / "metrics.json").exists() and not (copied / "responses.jsonl").exists()
    assert emprl.main(["chat", "--run", str(copied)]) == 2, "not a finished run any more"


# ---- the content of the data counts


def test_data_that_has_changed_is_seen(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(emprl, "draw_plots", lambda *_: None)
    lines = records(61)
    file, run = tmp_path / "mine.jsonl", tmp_path / "run"
    file.write_text("".join(lines[:60]), encoding="utf-8")
    command = ["--preset", "smoke", "--set", "data.vocab_size=300", "--run", str(run)]
    assert emprl.main([*command, "--data", str(file)]) == 0
    before = contents(run)

    file.write_text("".join(lines[1:]), encoding="utf-8")
    capsys.readouterr()
    assert emprl.main([*command, "--data", str(file)]) == 2
    err = capsys.readouterr().err
    assert "the content of" in err and err.count("\n") == 1 and contents(run) == before

    moved = tmp_path / "moved.jsonl"
    moved.write_text("".join(lines[:60]), encoding="utf-8")
    monkeypatch.setattr(t5_small.Trainer, "step", lambda *_: pytest.fail("trained again"))
    assert emprl.main([*command, "--data", str(moved)]) == 0, "the same data at another place"


def test_data_is_read_once_and_its_key_is_of_what_was_read(tmp_path, monkeypatch):
    """The file changes while the run goes on: all stages are of the old content, and a run of the new one is refused."""
    monkeypatch.setattr(emprl, "draw_plots", lambda *_: None)
    lines = records(61)
    file, here = tmp_path / "mine.jsonl", tmp_path / "run"
    file.write_text("".join(lines[:60]), encoding="utf-8")
    config = emprl.make_config("smoke", 0, file, settings=["data.vocab_size=300"])
    run = emprl.Run(here, config)
    old = run.seed

    def seed(stage, step=0):
        if stage == "identifiers":
            file.write_text("".join(lines[1:]), encoding="utf-8")
        old(stage, step)

    monkeypatch.setattr(run, "seed", seed)
    emprl.run_all(run)
    with pytest.raises(emprl.DataError, match="the content of"):
        emprl.run_all(emprl.Run(here, config))
    file.write_text("".join(lines[:60]), encoding="utf-8")
    monkeypatch.setattr(t5_small.Trainer, "step", lambda *_: pytest.fail("trained again"))
    emprl.run_all(emprl.Run(here, config))


def official(folder, whole, scale=1.0):
    """The run's MLE policy as if it were an official checkpoint, its weights times `scale`."""
    shutil.copytree(whole / "sft", folder, dirs_exist_ok=True)
    shutil.copy(whole / "tokenizer.model", folder / "spiece.model")
    state = t5_small.load_state(folder / "pytorch_model.bin")
    t5_small.save_atomically(
        {name: x * scale for name, x in state.items()}, folder / "pytorch_model.bin"
    )
    return str(folder)


def test_a_t5_folder_with_other_weights_is_seen(whole, tmp_path):
    t5, here = official(tmp_path / "t5", whole), tmp_path / "run"
    emprl.Run.save_every, saved = 0.0, emprl.Run.save_every
    try:
        emprl.run_all(emprl.Run(here, emprl.make_config("smoke", t5_dir=t5)))
    finally:
        emprl.Run.save_every = saved
    official(tmp_path / "t5", whole, 1.01)
    with pytest.raises(emprl.DataError, match="the content of t5"):
        emprl.run_all(emprl.Run(here, emprl.make_config("smoke", t5_dir=t5)))


# ---- a mixture is refused


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.model",
        "checkpoints/identifiers.pt",
        "checkpoints/sft.pt",
        "checkpoints/ppo.pt",
        "sft/pytorch_model.bin",
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
        assert emprl.main([*command, "--run", str(copied)]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and name in err, err


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A finished smoke run of another seed."""
    folder = tmp_path_factory.mktemp("results") / "other"
    assert faults.run(folder, "ppo.lr=1e-3", "sft.lr=1e-2", "data.num_train=220") == (0, "")
    return folder


@needs_fork
def test_a_stage_made_anew_from_other_weights_is_followed_by_all_after_it(copied, other):
    """A student changes MLE's code and deletes its checkpoint: nothing that was made from the old one is kept."""

    def other_rate():
        old = t5_small.Trainer.step
        count = iter(range(10**9))

        def step(self, i):
            record = old(self, i)
            if next(count) == 0:
                with emprl.torch.no_grad():
                    next(self.model.parameters()).add_(0.01)
            return record

        t5_small.Trainer.step = step

    stages = ("sft", "identifiers", "judge", "ppo")
    before = {stage: weights(copied, stage) for stage in stages}
    (copied / "checkpoints" / "sft.pt").unlink()
    assert faults.run(copied, before=other_rate) == (0, "")
    for stage in stages:
        assert weights(copied, stage) != before[stage], stage


# ---- a setting has the effect that it names, or is refused


def test_every_set_counts(tmp_path, monkeypatch):
    """`--set a=1 --set b=2` is `--set a=1 b=2`."""
    seen = []
    monkeypatch.setattr(emprl, "run_all", lambda run: seen.append(run.config))
    run = ["--run", str(tmp_path / "run")]
    one = ["--set", "ppo.lr=1", "--set", "sft.lr=2", "ppo.steps=3", *run]
    assert emprl.main(one) == emprl.main(run) == 0
    assert (seen[0].ppo.lr, seen[0].sft.lr, seen[0].ppo.steps) == (1, 2, 3)
    assert seen[1] == emprl.Config(), "and nothing is left over for the next call"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--data", "/dev/null"], "--data /dev/null"),
        (["--data", "pipe"], "--data pipe"),
        (["--data", "mine.jsonl", "--set", "data.corpus=embedded"], "--data mine.jsonl"),
        (["--set", "data.corpus=mine.jsonl"], "data.corpus=mine.jsonl"),
        (["--preset", "smoke", "--data", "folder"], "toy and smoke need none"),
        (["--t5", "t5", "--set", "t5.d_model=64"], "t5.d_model=64: has no effect"),
        (["--t5", "t5", "--set", "data.vocab_size=600"], "data.vocab_size=600: has no"),
        (["--set", "t5.vocab_size=600"], "t5.vocab_size=600: has no effect"),
        (["--data", "mine.jsonl", "--set", "data.num_train=9"], "data.num_train=9: has"),
        (["--preset", "real", "--data", "folder", "--set", "data.num_test=9"], "num_test=9"),
        (["--set", "pretrain.task=turns"], "pretrain.task=turns: has no effect"),
        (["--set", "identifiers.ngrams=99", "identifiers.lr=1"], "identifiers.lr=1: has no"),
        (["--set", "context.penalty=1"], "context.penalty=1: has no effect"),
        (["--set", "data.__class__=1"], "data.__class__=1: no such option"),
        (["--set", "data.__dict__=1"], "data.__dict__=1: no such option"),
        (["--set", "__class__.preset=1"], "__class__.preset=1: no such option"),
        (["--set", "reward.options=1"], "reward.options=1: no such option"),
    ],
)
def test_a_setting_without_effect_is_refused_by_name(
    arguments, words, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(emprl, "run_all", lambda run: pytest.fail("accepted"))
    (tmp_path / "mine.jsonl").write_text("".join(records(60)), encoding="utf-8")
    (tmp_path / "folder").mkdir()
    (tmp_path / "t5").mkdir()
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
    assert emprl.main(arguments) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1, err
    assert not (tmp_path / "runs").exists()


def test_settings_with_an_effect_stay(whole, tmp_path, monkeypatch):
    """The sources' own options, and those of the parts that are used."""
    folder = official(tmp_path / "t5", whole)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(emprl, "run_all", lambda run: None)
    (tmp_path / "mine.jsonl").write_text("".join(records(60)), encoding="utf-8")
    (tmp_path / "folder").mkdir()
    for arguments in (
        ["--data", "mine.jsonl", "--set", "t5.d_model=64", "data.vocab_size=300"],
        ["--preset", "smoke", "--data", "folder", "--set", "data.corpus=real"],
        ["--t5", folder, "--set", "data.num_train=99", "data.max_source=50"],
        ["--set", "pretrain.steps=5", "pretrain.task=turns"],
        ["--set", "context.ngrams=99", "context.penalty=1", "identifiers.lr=1"],
    ):
        assert emprl.main(arguments) == 0, arguments


def test_config_json_says_which_t5_was_used(whole, tmp_path):
    here = tmp_path / "run"
    config = emprl.make_config("smoke", t5_dir=official(tmp_path / "t5", whole))
    config.t5.d_model = 999  # of what --t5 replaces
    emprl.run_all(emprl.Run(here, config))
    used = json.loads((whole / "sft" / "config.json").read_text(encoding="utf-8"))
    said = json.loads((here / "config.json").read_text(encoding="utf-8"))["t5"]
    assert said == {name: used[name] for name in said}


@pytest.mark.parametrize("name", ["pad_token_id", "eos_token_id", "decoder_start_token_id"])
def test_a_t5_with_other_ids_is_refused(name, whole, tmp_path):
    official(tmp_path / "t5", whole)
    raw = json.loads((tmp_path / "t5" / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "t5" / "config.json").write_text(
        json.dumps({**raw, name: 2}), encoding="utf-8"
    )
    with pytest.raises(t5_small.CheckpointError, match=f"{name} is 2"):
        t5_small.from_pretrained(tmp_path / "t5")


# ---- one at a time


def start(arguments, **options):
    """`python emprl.py` in a process of its own."""
    program = Path(emprl.__file__)
    return subprocess.Popen(
        [sys.executable, str(program), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
        encoding="utf-8",
    )


def test_a_second_run_in_the_folder_is_refused_until_the_first_is_killed(tmp_path, whole):
    here = tmp_path / "run"
    command = ["--preset", "smoke", "--run", str(here)]
    long = start([*command, "--set", "sft.steps=100000", "sft.eval_every=100000"])
    try:
        while "sft" not in (line := long.stdout.readline()):
            assert line, long.stderr.read()
        for other in (command, [*command, "--set", "sft.steps=100000"]):
            second = start(other)
            _, err = second.communicate(timeout=100)
            assert second.returncode == 2 and err.count("\n") == 1, err
            assert "another command is at work" in err
        assert long.poll() is None, "and the first goes on"
    finally:
        long.kill()
        long.communicate()
    shutil.rmtree(here / "checkpoints")
    assert faults.run(here) == (0, "") and not faults.differences(here, whole)


def test_without_locks_it_runs_all_the_same(tmp_path, monkeypatch):
    """A file system or a system that has none."""

    def unsupported(*_):
        raise OSError(errno.ENOTSUP, "not supported")

    if emprl.fcntl:
        monkeypatch.setattr(emprl.fcntl, "flock", unsupported)
        with emprl.alone(tmp_path), emprl.alone(tmp_path):
            pass
    monkeypatch.setattr(emprl, "fcntl", None)
    monkeypatch.setattr(emprl, "msvcrt", None)
    with emprl.alone(tmp_path), emprl.alone(tmp_path):
        pass


def test_the_lock_of_windows_is_asked_for_and_believed(tmp_path, monkeypatch):
    asked = []

    def locking(number, mode, size):
        asked.append((mode, size))
        if len(asked) == 2:
            raise OSError(errno.EACCES, "Permission denied")

    windows = types.SimpleNamespace(locking=locking, LK_NBLCK=2)
    monkeypatch.setattr(emprl, "fcntl", None)
    monkeypatch.setattr(emprl, "msvcrt", windows)
    with emprl.alone(tmp_path):
        with pytest.raises(emprl.DataError, match="another command"):
            with emprl.alone(tmp_path):
                pytest.fail("not alone")
    assert asked == [(2, 1), (2, 1)]


# ---- the environment


def git(folder, *arguments):
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    done = subprocess.run(
        ["git", "-C", str(folder), *who, *arguments],
        capture_output=True,
        check=True,
        text=True,
        encoding="utf-8",
    )
    return done.stdout.strip()


def test_code_is_known_by_its_own_commit_and_its_changes(tmp_path):
    """A repository; a change in it; a new module; a copy without .git inside of it."""
    (tmp_path / "emprl.py").write_text("one = 1\n", encoding="utf-8")
    alone = emprl.code_version(tmp_path)
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "emprl.py")
    git(tmp_path, "commit", "-qm", "one")
    clean = emprl.code_version(tmp_path)
    assert (alone["commit"], alone["changed"]) == (None, None)
    assert (clean["commit"], clean["changed"]) == (git(tmp_path, "rev-parse", "HEAD"), None)

    (tmp_path / "emprl.py").write_text("one = 2\n", encoding="utf-8")
    changed = emprl.code_version(tmp_path)
    assert changed["commit"] == clean["commit"] and changed["changed"]
    (tmp_path / "emprl.py").write_text("one = 3\n", encoding="utf-8")
    assert emprl.code_version(tmp_path)["changed"] not in (None, changed["changed"])
    (tmp_path / "emprl.py").write_text("one = 1\n", encoding="utf-8")
    assert emprl.code_version(tmp_path) == clean
    (tmp_path / "new.py").write_text("", encoding="utf-8")
    assert emprl.code_version(tmp_path) != clean, "that git does not know of yet"

    inner = tmp_path / "copy"
    inner.mkdir()
    shutil.copy(tmp_path / "emprl.py", inner)
    assert emprl.code_version(inner) == alone, "the repository around is not its own"


@needs_fork
def test_a_resumed_run_keeps_its_first_environment_and_says_that_the_code_is_another(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(emprl, "draw_plots", lambda *_: None)
    here = tmp_path / "run"
    monkeypatch.setattr(sys, "argv", ["emprl.py", "first"])
    assert faults.run(here, before=lambda: faults.at("sft", 3, faults.interrupt))[0] == 130
    monkeypatch.setattr(sys, "argv", ["emprl.py", "second"])
    arguments = ["--preset", "smoke", "--run", str(here)]
    assert emprl.main(arguments) == 0
    assert "warning: the code" not in capsys.readouterr().out
    code = {"commit": "abc", "changed": None, "modules": "x"}
    monkeypatch.setattr(emprl, "code_version", lambda: code)
    monkeypatch.setattr(t5_small.Trainer, "step", lambda *_: pytest.fail("trained again"))
    assert emprl.main(arguments) == 0, "other code is no reason to refuse"
    assert "warning: the code" in capsys.readouterr().out
    found = json.loads((here / "environment.json").read_text(encoding="utf-8"))
    assert [e["command"] for e in found] == [
        "emprl.py first",
        "emprl.py second",
        "emprl.py second",
    ]
    assert found[2]["commit"] == "abc" != found[0]["commit"]


def test_how_fast_the_machine_is_on_one_and_on_all_threads(whole):
    (found,) = json.loads((whole / "environment.json").read_text(encoding="utf-8"))
    assert set(found["gflops"]) == {"1", str(found["threads"])}
    assert all(x > 0.01 for x in found["gflops"].values())
    before = emprl.torch.get_num_threads()
    state = emprl.torch.get_rng_state()
    assert emprl.gflops(2) > 0.01
    assert emprl.torch.get_num_threads() == before
    assert emprl.torch.equal(emprl.torch.get_rng_state(), state)


# ---- files of people


def test_evaluations_of_different_files_are_kept_apart_with_their_replies(copied, tmp_path):
    """a/mine.jsonl, b/mine.csv and a changed a/mine.jsonl; the same file again is the same."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, two = tmp_path / "a" / "mine.jsonl", tmp_path / "b" / "mine.csv"
    one.write_text(
        '{"context": ["My dog is sick."], "response": "I am so sorry."}\n' * 3,
        encoding="utf-8",
    )
    two.write_text("context,response\nMy cat is sick.,Oh no\n", encoding="utf-8")
    for number, file in ((1, one), (2, two), (2, one)):
        assert emprl.main(["evaluate", "--run", str(copied), "--data", str(file)]) == 0
        assert len([*copied.glob("evaluate-*.json")]) == number
    one.write_text(
        '{"context": ["My dog is sad."], "response": "I am so sorry."}\n', encoding="utf-8"
    )
    assert emprl.main(["evaluate", "--run", str(copied), "--data", str(one)]) == 0
    found = sorted(copied.glob("evaluate-*.jsonl"))
    assert len(found) == 3
    texts = []
    for path in found:
        replies = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        texts.append([r["context"][0] for r in replies])
        assert all(set(r["responses"]) >= {"sft", "emprl"} for r in replies)
    assert sorted(texts) == [["My cat is sick."], ["My dog is sad."], ["My dog is sick."] * 3]


def test_raters_never_share_a_file(copied, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda _: "a")
    names = ["a b", "a-b", "a_b", "a%20b", "a/b", "../a", "Zoë", "a  b", "a."]
    for number, name in enumerate(names, 1):
        assert emprl.main(["rate", str(copied), name]) == 0
        assert len([*copied.glob("ratings-*.jsonl")]) == number, name
