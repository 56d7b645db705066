"""What is done with a finished run: python emprl.py evaluate | chat | rate | ablate. See python emprl.py --help."""

import hashlib
import json
import sys
from dataclasses import asdict
from pathlib import Path

import ablate as ablations
import crisis
import data
import rate as rating
from data import DataError, Pairs, Tokenizer
from emprl import (
    EVALUATE,
    STAGES,
    Config,
    Evaluation,
    Run,
    digest,
    digest_of,
    find_device,
    make_config,
    from_json,
    replies,
    say,
    to_json,
)
from identifiers import MECHANISMS, Identifiers, before_after, predict_levels
from ppo import respond
from t5_small import from_pretrained, load_state


def load_run(folder, device=""):
    """A finished run -> (Run, Tokenizer, readers, {"sft": T5, "emprl": T5}). Raises DataError where there is none."""
    folder = Path(folder)
    if not (folder / "metrics.json").exists():
        raise DataError(
            f"--run {folder}: no finished run there; make one with `{data.command_line(['python', 'emprl.py', '--run', str(folder)])}`"
        )
    device = find_device(device)
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        sections = [k for k, v in asdict(Config()).items() if isinstance(v, dict)]
        config = make_config(
            seed=raw["seed"], settings=ablations.settings_of({s: raw[s] for s in sections})
        )
        config.data.corpus = raw["data"]["corpus"]
        config.preset, config.data_dir, config.t5_dir = (
            raw[name] for name in ("preset", "data_dir", "t5_dir")
        )
        tokenizer, run = Tokenizer(folder / "tokenizer.model"), Run(folder, config, device)
        run.content = raw["content"]
        models = {
            name: from_pretrained(folder / name, tokenizer.vocab_size).to(run.device).eval()
            for name in ("sft", "emprl")
        }
        readers = []
        for stage in ("identifiers", "judge"):
            reader = Identifiers(
                models["sft"].config, config.identifiers.shared, config.identifiers.ngrams
            ).to(run.device)
            reader.load_state_dict(
                load_state(folder / "checkpoints" / f"{stage}.pt")["weights"]
            )
            if not all(p.isfinite().all() for p in reader.parameters()):
                raise ValueError(f"checkpoints/{stage}.pt has weights that are not finite")
            readers.append(reader.eval())
        foreign = mixed(run, tokenizer, models)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        words = " ".join(str(error).split())[:200]
        raise DataError(
            f"--run {folder}: a file of it is damaged or of another run ({words}); make it again"
        ) from None
    if foreign:
        raise DataError(
            f"--run {folder}: {foreign} is not of the run that config.json describes; make it again"
        )
    return run, tokenizer, readers, models


def mixed(run, tokenizer, models):
    """The first file of a run folder that is not made from the others, or ""."""
    if hashlib.sha256(tokenizer.model).hexdigest() != run.content["tokenizer"]:
        return "tokenizer.model"
    for stage in STAGES:
        state = load_state(run.folder / "checkpoints" / f"{stage}.pt")
        if state["key"] != run.key(stage) or not state.get("done"):
            return f"checkpoints/{stage}.pt"
        run.made[stage] = state["made"]
    for name, stage in (("sft", "sft"), ("emprl", "ppo")):
        if digest({"weights": models[name].state_dict()}) != run.made[stage]:
            return f"{name}/pytorch_model.bin"
    metrics = from_json((run.folder / "metrics.json").read_text(encoding="utf-8"))
    if metrics["code"]["modules"] != run.code["modules"]:
        print("warning: the run was made by other code than this", file=sys.stderr)
    return "" if metrics["key"] == run.key(EVALUATE) else "metrics.json"


def evaluate(arguments, folder):
    """Before and after on any dialogue file; prints the table and writes it into the run folder."""
    run, tokenizer, readers, models = load_run(folder, arguments.device)
    dialogues = data.read_dialogues(arguments.data)
    pairs = Pairs(
        dialogues,
        tokenizer,
        run.config.data.max_source,
        run.config.data.max_scored,
        run.device,
    )
    content = digest_of(dialogues)
    evaluation = Evaluation(run, tokenizer, readers, models["sft"], pairs, {})
    metrics = evaluation.compare(models)
    metrics["of"] = {"data": str(arguments.data), "content": content, "run": run.key(EVALUATE)}
    # named by content: another folder's or another day's mine.jsonl does not write over this one
    name = f"evaluate-{Path(arguments.data).stem}-{content[:12]}"
    run.write(f"{name}.json", to_json(metrics, indent=2) + "\n")
    run.write(f"{name}.jsonl", replies(evaluation))
    say(
        f"{before_after(metrics)}\n\nwritten to {run.folder}/{name}.json, replies to {run.folder}/{name}.jsonl"
    )


def chat(arguments, folder):
    """You write, both policies answer, with the levels that the identifiers read in each answer."""
    run, tokenizer, readers, models = load_run(folder, arguments.device)
    say(*crisis.OPENING, sep="\n")
    say("An empty line starts a new conversation, /help repeats this, the end of input ends.")
    history, c = (), run.config.data
    getattr(sys.stdin, "reconfigure", lambda **_: None)(errors="replace")
    for line in map(data.clean, sys.stdin):
        line = line[-2000:]
        if line == "/help":  # nothing that was said, and the conversation goes on
            say(*crisis.OPENING, sep="\n")
            continue
        history = (*history, line) if line else ()
        if crisis.signs_of_crisis(line):
            say(*crisis.OPENING, sep="\n")
            history = ()
        pairs = Pairs(
            [data.Dialogue(history, "")], tokenizer, c.max_source, c.max_target, run.device
        )
        for name, t5 in models.items() if history else ():
            answered = pairs.but(respond(t5, pairs, run.config.replying))
            reply = tokenizer.decode(answered.responses[0])
            say(
                f"{name:<6} {reply}   {dict(zip(MECHANISMS, predict_levels(readers[0], answered)[0].tolist()))}"
            )
        history = (*history, reply) if history else ()


def rate(arguments, _):
    rating.main(*arguments.what)


def ablate(arguments, _):
    ablations.main(*arguments.what, again=arguments.again, write=arguments.write)
