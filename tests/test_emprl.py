"""The whole program on the smoke preset: every stage, its files, resuming, the command line."""

import builtins
import io
import json
import math
import shutil
import sys
import types
from pathlib import Path
from unittest import mock

import pytest
import torch

import emprl
import t5_small


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished smoke run: (folder, metrics)."""
    folder = tmp_path_factory.mktemp("run") / "smoke"
    return folder, emprl.run_all(emprl.Run(folder, emprl.make_config("smoke")))


def weights(folder):
    return t5_small.from_pretrained(folder / "emprl").state_dict()


def test_run_folder_holds_what_the_readme_says(finished):
    folder, metrics = finished
    for name in (
        "config.json",
        "metrics.jsonl",
        "metrics.json",
        "report.md",
        "samples.md",
        "tokenizer.model",
        "sft/pytorch_model.bin",
        "emprl/pytorch_model.bin",
    ):
        assert (folder / name).stat().st_size > 0, name
    for name in ("losses", "ppo", "emp_f1", "levels", "learnt_vs_truth"):
        assert (folder / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG"), name
    assert json.loads((folder / "metrics.json").read_text(encoding="utf-8")) == json.loads(
        json.dumps(metrics)
    )
    stages = [
        json.loads(line)["stage"]
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert {s: stages.count(s) for s in stages} == {
        "pretrain": 4,
        "sft": 12,
        "identifiers": 8,
        "judge": 8,
        "context": 4,
        "ppo": 4,
    }
    assert (folder / "samples.md").read_text(encoding="utf-8").count("* target: ") >= 20


def test_metrics_have_every_figure_of_the_issue(finished):
    _, m = finished
    for who in ("identifiers", "judge"):
        for mechanism in ("er", "ip", "ex"):
            assert {"accuracy", "macro_f1", "weighted_f1"} <= set(m[who][mechanism])
    assert {"emp_f1", "judge_emp_f1", "oracle_emp_f1"} <= set(m["floors"]["majority"]) & set(
        m["floors"]["random_copy"]
    )
    assert (
        m["ceiling"]["best"]["oracle_emp_f1"] > m["ceiling"]["mle_ideal"]["oracle_emp_f1"] > 0
    )
    for policy in ("sft", "emprl"):
        assert {
            "emp_f1",
            "emp_f1_er",
            "emp_f1_ip",
            "emp_f1_ex",
            "emp_macro_f1",
            "judge_emp_f1",
            "judge_emp_macro_f1",
            "oracle_emp_f1",
            "mutual_information",
            "reward",
            "perplexity",
            "bleu",
            "dist1",
            "dist2",
            "unique",
            "length",
            "kl",
        } <= set(m[policy])
    for gain in ("emp_f1", "judge_emp_f1", "oracle_emp_f1"):
        assert m["gain"][gain]["low"] <= m["gain"][gain]["relative"] <= m["gain"][gain]["high"]
    assert m["sft"]["kl"] == pytest.approx(0, abs=1e-6), (
        "the MLE policy has no distance to itself"
    )
    assert (
        m["config"]["preset"] == "smoke"
        and m["seed"] == 0
        and {"sft", "ppo", "evaluate"} <= set(m["seconds"])
    )


def test_responses_have_the_levels_of_every_reader(finished):
    folder, m = finished
    records = [
        json.loads(line)
        for line in (folder / "responses.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert len(records) == 40 and all(
        set(r["levels"]) == {"identifiers", "judge", "oracle"} for r in records
    )
    systems = {"sft", "best_of_n", "emprl", "sft_greedy", "emprl_greedy"}
    assert all(
        set(r["responses"]) == systems and set(table) == {"target", *systems}
        for r in records
        for table in r["levels"].values()
    )
    for reader, prefix in (("identifiers", ""), ("judge", "judge_"), ("oracle", "oracle_")):
        one, gold = (
            torch.tensor([r["levels"][reader][name] for r in records])
            for name in ("best_of_n", "target")
        )
        assert emprl.level_scores(one, gold)["emp_f1"] == m["best_of_n"][f"{prefix}emp_f1"], (
            "the figures can be had from them again"
        )
    assert m["target"]["length"] > 3 and m["target"]["bleu"] == pytest.approx(100)


def test_best_of_one_is_plain_sampling_and_of_many_no_worse(finished, tmp_path):
    """The first of n samples is MLE's own; perplexities are MLE's either way; n is taken from eval.best_of."""
    folder, m = shutil.copytree(finished[0], tmp_path / "run"), finished[1]
    (folder / "config.json").unlink()  # its stages are taken, its results written over
    one = emprl.run_all(
        emprl.Run(folder, emprl.make_config("smoke", settings=["eval.best_of=1"]))
    )
    assert one["best_of_n"] == one["sft"] and one["best_of_n"]["kl"] == pytest.approx(
        0, abs=1e-9
    )
    for key in ("perplexity", "perplexity_per_word"):
        assert m["best_of_n"][key] == pytest.approx(m["sft"][key], rel=1e-4)
    assert m["best_of_n"]["kl"] == pytest.approx(math.log(4) - 3 / 4)


def test_ratio_is_one_at_the_first_minibatch_of_every_iteration(finished):
    records = [
        json.loads(line)
        for line in (finished[0] / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert all(r["first_ratio_error"] < 1e-5 for r in records if r["stage"] == "ppo")


def test_a_second_call_skips_every_stage(finished, monkeypatch):
    folder, metrics = finished
    monkeypatch.setattr(t5_small.Trainer, "step", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(emprl.PPOTrainer, "step", lambda *_: pytest.fail("trained again"))
    again = emprl.run_all(emprl.Run(folder, emprl.make_config("smoke")))
    assert {**again, "seconds": 0} == {**metrics, "seconds": 0}


def test_another_configuration_repeats_only_what_depends_on_it(finished, tmp_path):
    run = emprl.Run(tmp_path, emprl.make_config("smoke"))
    done = []
    run.stage("sft", lambda *_: done.append(1) or {"weights": {}})
    run.stage("sft", lambda *_: done.append(2) or {"weights": {}})
    emprl.Run(tmp_path, emprl.make_config("smoke", settings=["ppo.lr=1"])).stage(
        "sft", lambda *_: done.append(3) or {}
    )
    assert done == [1], (
        "neither a second call nor another PPO learning rate touches the MLE stage"
    )
    emprl.Run(tmp_path, emprl.make_config("smoke", settings=["sft.lr=1"])).stage(
        "sft", lambda *_: done.append(4) or {}
    )
    assert done == [1, 4]


def test_targets_are_what_the_context_tells_or_the_one_humans(finished, tmp_path, monkeypatch):
    """Of the reward (training pairs) and of best of n (test pairs), by reward.target and reward.balance. Nothing is trained."""

    def targets(**options):
        seen, settings = [], [f"reward.{name}={x}" for name, x in options.items()]
        (folder / "config.json").unlink()  # of the settings before
        monkeypatch.setattr(
            emprl, "make_reward", lambda reader, targets, **_: seen.append(targets)
        )
        monkeypatch.setattr(
            emprl.Evaluation, "compare", lambda *arguments: seen.extend(arguments[3:]) or 1 / 0
        )
        with pytest.raises(ZeroDivisionError):  # as far as needed
            emprl.run_all(
                emprl.Run(
                    folder, emprl.make_config("smoke", settings=["ppo.steps=0", *settings])
                )
            )
        return seen  # of the reward, the humans', {of the ceiling}, of best of n

    folder = shutil.copytree(finished[0], tmp_path / "run")
    plain, levels, told, promised = targets(target="expected")
    assert torch.allclose(plain.sum(-1), torch.ones(200, 3)) and torch.allclose(
        promised, told["context"]
    ), "as the context's reader says"
    share = plain.mean(0)
    for balance in (0, 0.7):
        train, test = (emprl.even(probs, share, balance) for probs in (plain, told["context"]))
        for target, of_train, of_test in (
            ("expected", train, test),
            ("human", levels, test),
            ("likeliest", train.argmax(-1), test.argmax(-1)),
        ):
            found = targets(target=target, balance=balance)
            assert all(
                x.shape == y.shape and torch.allclose(x.double(), y.double())
                for x, y in ((found[0], of_train), (found[3], of_test))
            ), target
    assert not torch.equal(train.argmax(-1), plain.argmax(-1)), (
        "balance makes no difference: the test is blind"
    )


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--set", "reward.target=best"], "expected or likeliest or human"),
        (["--set", "ppo.learning_rate=1"], "no such option"),
        (["--set", "ppo.steps=many"], "not a valid int"),
        (["--set", "ppo"], "no such option"),
        (["--preset", "real"], "--data DIR"),
        (["--preset", "paper", "--data", "."], "--t5"),
        (["--preset", "real", "--data", "missing"], "download DIR"),
        (["evaluate", "--run", "missing", "--data", "x"], "no finished run"),
        (["chat", "--run", "missing"], "no finished run"),
        (["rate"], "only rate takes RUN"),
        (["rate", "a", "b", "c"], "only rate takes"),
        (["rate", "missing"], "missing/responses.jsonl"),
        (["rate", "x", "--data", "y"], "takes --run"),
        (["rate", "x", "--run", "y"], "see --help"),
        (["run", "x"], "only rate takes RUN"),
        (["chat", "x"], "only rate takes RUN"),
        (["--again"], "--again"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments, words, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert emprl.main(arguments) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1, err
    assert not list(tmp_path.iterdir()), "nothing was written"


def test_evaluate_and_chat_commands(finished, tmp_path, capsys, monkeypatch):
    folder, _ = finished
    file = tmp_path / "mine.jsonl"
    file.write_text(
        '{"context": ["My dog is sick."], "response": "I am so sorry."}\n' * 3,
        encoding="utf-8",
    )
    assert emprl.main(["evaluate", "--run", str(folder), "--data", str(file)]) == 0
    out = capsys.readouterr().out
    assert "| emp_f1 |" in out and "best_of_n" not in out, (
        "which needs what the context tells, of the run's own data"
    )
    (written,) = folder.glob("evaluate-mine-*.json")
    assert 0 <= json.loads(written.read_text(encoding="utf-8"))["emprl"]["emp_f1"] <= 1
    monkeypatch.setattr(sys, "stdin", io.StringIO("My dog is sick.\n\nHello\n"))
    assert emprl.main(["chat", "--run", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "not a counsellor" in out and out.count("sft ") == 2 and out.count("emprl ") == 2


def test_rate_command(finished, capsys, monkeypatch):
    folder, _ = finished
    monkeypatch.setattr(builtins, "input", lambda _: "t")
    assert emprl.main(["rate", str(folder), "ann"]) == 0
    assert (
        "raters: 1" in capsys.readouterr().out
        and len((folder / "ratings-ann.jsonl").read_text(encoding="utf-8").splitlines()) == 30
    )
    monkeypatch.setattr(builtins, "input", lambda _: "")
    assert emprl.main(["rate", str(folder)]) == 0 and "raters: 1" in capsys.readouterr().out, (
        "your login name, if you give none"
    )


@pytest.mark.parametrize("error", [OSError, AttributeError, TypeError])
def test_memory_is_kept_where_the_c_library_can(error, monkeypatch):
    asked = []
    monkeypatch.setattr(
        emprl.ctypes,
        "CDLL",
        lambda name: types.SimpleNamespace(mallopt=lambda *option: asked.append(option) or 1),
    )
    emprl.keep_memory()
    assert asked == [(-1, 2**30), (-3, 2**30)], "M_TRIM_THRESHOLD, M_MMAP_THRESHOLD (malloc.h)"
    monkeypatch.setattr(emprl.ctypes, "CDLL", mock.Mock(side_effect=error))
    emprl.keep_memory()  # elsewhere nothing happens


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as ended:
        emprl.main(["--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0 and "--again" in out
    assert all(
        f"python emprl.py {command}" in out
        for command in ("evaluate", "chat", "rate", "ablate")
    )


def test_own_data_runs_end_to_end(tmp_path):
    """60 dialogues with levels in a .jsonl: the same path to its report."""
    corpus = emprl.data.embedded_corpus(3, 60, 1, 1, 1)
    file = tmp_path / "mine.jsonl"
    file.write_text(
        "".join(
            json.dumps(
                {
                    "context": list(d.context),
                    "response": d.response,
                    **dict(zip(emprl.MECHANISMS, d.levels)),
                }
            )
            + "\n"
            for d in corpus.dialogues["train"]
        ),
        encoding="utf-8",
    )
    assert (
        emprl.main(
            [
                "--preset",
                "smoke",
                "--data",
                str(file),
                "--run",
                str(tmp_path / "run"),
                "--set",
                "data.vocab_size=300",
            ]
        )
        == 0
    )
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))
    assert "oracle_emp_f1" not in metrics["sft"] and metrics["sft"]["perplexity"] > 1


def test_modules_keep_to_the_design():
    """DESIGN: arrows point one way; no excluded package; no fp16 and no fixed device."""
    root = Path(emprl.__file__).parent
    allowed = {
        "t5_small": set(),
        "data": set(),
        "ppo": {"t5_small"},
        "identifiers": {"t5_small"},
    }
    for name, imports in allowed.items():
        source = (root / f"{name}.py").read_text(encoding="utf-8")
        found = {
            m
            for m in ("t5_small", "data", "ppo", "identifiers", "emprl")
            if f"from {m} import" in source or f"\nimport {m}" in source
        }
        assert found == imports, name
        assert ".cuda(" not in source and "float16" not in source.replace("bfloat16", "")
