"""EmpRL, end to end: the recipe from top to bottom, and the command line.

    python emprl.py [--preset toy|real|paper|smoke] [--data DIR] [--t5 DIR] [--run DIR] [--seed N] [--device cpu|cuda] [--set key=value ...]
    python emprl.py evaluate --run DIR --data DIALOGUES     measure a finished run on other dialogues
    python emprl.py chat --run DIR                          talk to a finished run
    python emprl.py rate RUN [YOUR NAME]                    compare its two policies blindly, reply by reply
    python emprl.py ablate NAME RUN [RUN ...]               repeat PPO on finished runs with a part left out or changed
Stages: pretrain -> sft -> identifiers -> judge -> label -> context -> ppo -> evaluate -> report. The same command goes on where it was cut.
"""

import os, signal

if __name__ == "__main__":

    def leave(*_):
        """Ctrl-C while torch is still being imported, or again after main has said how to go on: no traceback."""
        os.write(2, b"\nstopped\n")
        os._exit(130)

    signal.signal(signal.SIGINT, leave)

import argparse, atexit, contextlib, copy, ctypes, errno, functools, hashlib, itertools, json, math, re, subprocess, sys
import shutil, tempfile, threading, time, traceback, warnings, zlib
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
try:
    import msvcrt
except ImportError:  # elsewhere
    msvcrt = None

import data
from data import (
    DataError,
    Pairs,
    Tokenizer,
    batches,
    oracle_levels,
    pad,
    random_spans,
    span_corrupt,
)
from identifiers import (
    LEVELS,
    MECHANISMS,
    IdentifierConfig,
    Identifiers,
    before_after,
    best_of,
    ceiling,
    confusion,
    empathy_reward,
    even,
    identifier_scores,
    identifier_trainer,
    level_scores,
    make_reward,
    paired_bootstrap,
    predict,
    predict_levels,
    table,
    text_scores,
    words,
)
from ppo import PPOConfig, PPOTrainer, respond, sampled_kl, signs_of_collapse
from t5_small import (
    T5,
    T5_RANGES,
    CheckpointError,
    Sampling,
    T5Config,
    TrainConfig,
    Trainer,
    from_pretrained,
    load_state,
    official_file,
    save_atomically,
    save_pretrained,
    some_of,
    weights_file,
)


# ---- configuration --------------------------------------------------------------------------------------------------
@dataclass
class DataConfig:
    corpus: str = "embedded"  # "embedded", "real", or a .jsonl / .csv file of yours
    num_train: int = 12000  # embedded corpus: how many dialogues
    num_valid: int = 300
    num_test: int = 600
    num_labelled: int = (
        8000  # embedded corpus: labelled pairs for the identifiers, and as many for the judge
    )
    vocab_size: int = 1200  # pieces and 100 sentinels; a pretrained T5 brings its own
    max_source: int = 72  # tokens of context; the newest are kept
    max_target: int = 64  # tokens of response, </s> included, that MLE learns from
    max_scored: int = (
        512  # the same where a human response is measured: its levels, its perplexity
    )
    identifier_source: int = 72  # the same for the identifiers' labelled posts
    identifier_target: int = 64


@dataclass
class SFTConfig(TrainConfig):
    epochs: int = 0  # passes over the pairs, instead of a number of steps


@dataclass
class PretrainConfig(TrainConfig):
    task: str = (
        "spans"  # "spans": T5's span corruption; "turns": the next turn, whoever speaks
    )


@dataclass
class RewardConfig:
    difference: str = "cross_entropy"  # or "ordinal"
    mechanisms: str = "er,ip,ex"  # which of them count
    target: str = "expected"  # levels by what the context tells: "expected", or only the "likeliest"; or the one "human"'s
    balance: float = 0.0  # exponent of 1 / (share of the level) in what the context tells: above 0 rare levels count for more

    def options(self):
        return {"difference": self.difference, "mechanisms": self.mechanisms}


@dataclass
class EvalConfig:
    contexts: int = 0  # test contexts to generate for; 0: all
    batch_size: int = 128
    valid_contexts: int = 128  # for the validation inside PPO
    best_of: int = 4  # n of the rival without RL: the best, by expected reward, of n samples of the MLE policy; 1: its samples


@dataclass
class Config:
    preset: str = "toy"
    seed: int = 0
    data_dir: str = ""
    t5_dir: str = ""
    data: DataConfig = field(default_factory=DataConfig)
    t5: T5Config = field(
        default_factory=lambda: T5Config(
            d_kv=16, d_ff=256, num_layers=1, num_heads=8, dropout_rate=0.0
        )
    )
    pretrain: PretrainConfig = field(
        default_factory=lambda: PretrainConfig(steps=0)
    )  # 0: MLE learns sooner without
    sft: SFTConfig = field(
        default_factory=lambda: SFTConfig(steps=1000, batch_size=16, lr=4e-2, eval_every=250)
    )
    identifiers: IdentifierConfig = field(default_factory=IdentifierConfig)
    context: IdentifierConfig = field(
        default_factory=lambda: IdentifierConfig(
            steps=400, lr=5e-2, class_weight=0.0, keep="loss"
        )
    )
    reward: RewardConfig = field(default_factory=RewardConfig)
    # what PPO explores with and scores, and what replies are given with
    sampling: Sampling = field(default_factory=lambda: Sampling(max_length=64))
    replying: Sampling = field(default_factory=lambda: Sampling(max_length=64))
    ppo: PPOConfig = field(default_factory=PPOConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


PRESETS = {  # what differs from the defaults above, which are `toy`
    "toy": "",
    "smoke": """data.num_train=200 data.num_valid=40 data.num_test=40 data.num_labelled=200 data.vocab_size=500 t5.d_model=32
        t5.d_kv=16 t5.d_ff=64 t5.num_heads=2 t5.num_layers=1 t5.num_decoder_layers=1 pretrain.steps=4 sft.steps=12 sft.eval_every=6
        identifiers.steps=8 identifiers.eval_every=4 identifiers.batch_size=16 context.steps=4 context.batch_size=16 ppo.steps=4
        ppo.batch_size=8 ppo.minibatch_size=4 ppo.eval_every=2 eval.valid_contexts=8 sampling.max_length=12
        replying.max_length=12""",
    "real": """data.corpus=real data.vocab_size=5000 data.max_source=96 data.max_target=40 data.identifier_source=96 data.identifier_target=256
        t5.d_model=160 t5.d_kv=32 t5.d_ff=640 t5.num_layers=2 t5.num_heads=5 t5.dropout_rate=0.1 pretrain.task=turns pretrain.steps=600
        pretrain.batch_size=96 pretrain.muon=on sft.steps=1200 sft.eval_every=300 sft.batch_size=96 sft.lr=3e-2 sft.muon=on
        identifiers.ngrams=65536 identifiers.class_weight=1 context.ngrams=65536 context.penalty=3e-6 reward.balance=0.6
        sampling.min_length=5 sampling.max_length=40 replying.min_length=5 replying.max_length=40 ppo.steps=150 ppo.batch_size=256 ppo.lr=6e-3 ppo.kl_coef=0.1 ppo.ptx_coef=0.5
        ppo.average=0.99 eval.contexts=1024 eval.best_of=8""",
    "paper": """data.corpus=real data.max_source=200 data.max_target=50 data.identifier_source=250 data.identifier_target=250
        pretrain.steps=0 sft.epochs=3 sft.batch_size=8 sft.lr=1e-4 sft.rms_scaled=off sft.warmup=0 sft.eval_every=2000
        identifiers.start=t5 identifiers.shared=off identifiers.steps=600 identifiers.lr=2e-5 identifiers.rms_scaled=off
        identifiers.warmup=0 identifiers.batch_size=32 identifiers.micro_batch=8 context.start=t5 context.steps=2000 context.lr=2e-5
        context.rms_scaled=off context.warmup=0 context.batch_size=32 context.micro_batch=8 reward.target=human
        sampling.temperature=0.9 sampling.top_k=20 sampling.min_length=5 sampling.max_length=30
        replying.temperature=0.9 replying.top_k=20 replying.max_length=30 ppo.batch_size=32 ppo.minibatch_size=32 ppo.micro_batch=8
        ppo.ppo_epochs=4 ppo.steps=1000 ppo.lr=1e-5 ppo.rms_scaled=off ppo.warmup=0 ppo.lam=0.95 ppo.kl_coef=0.2 ppo.adaptive_kl=on
        ppo.kl_horizon=10000 ppo.whiten_rewards=on ppo.normalise_scores=on eval.batch_size=32""",
}
RANGES = {
    **T5_RANGES,
    "temperature": (0.01, 100),
    "top_p": (0.01, 1),
    "gamma": (0, 1),
    "lam": (0, 1),
    "average": (0, 0.9999),
    **dict.fromkeys(("steps", "warmup", "top_k", "micro_batch", "contexts"), (0, 1e9)),
    "kl_target": (1e-3, 1e9),
    "kl_horizon": (1, 1e9),
    # what memory or patience has to be made for: larger ones are slips of the pen
    **dict.fromkeys(("min_length", "max_length"), (1, 4096)),
    **dict.fromkeys(
        ("max_source", "max_target", "identifier_source", "identifier_target"), (1, 100_000)
    ),
    **dict.fromkeys(("num_train", "num_valid", "num_test", "num_labelled"), (1, 10_000_000)),
    **dict.fromkeys(("batch_size", "minibatch_size"), (1, 1_000_000)),
    "ngrams": (0, 2**26),
    "ppo_epochs": (1, 1000),
    "epochs": (0, 1000),
    "best_of": (1, 10_000),
    # exponents of 1 / share, and what weights shrink by: larger ones overflow
    **dict.fromkeys(("class_weight", "balance"), (0, 4)),
    "weight_decay": (0, 100),
    "penalty": (0, 1e6),
}  # any other: from 0, integers from 1
CHOICES = {
    "difference": ("cross_entropy", "ordinal"),
    "keep": ("macro_f1", "loss"),
    "start": ("sft", "t5"),
    "task": ("spans", "turns"),
    "feed_forward_proj": ("relu", "gated-gelu"),
    "mechanisms": ("er,ip,ex", "er,ip", "er,ex", "ip,ex", "er", "ip", "ex"),
    "target": ("expected", "likeliest", "human"),
    "corpus": ("embedded", "real"),  # a file of yours: by --data
}
ORDER = [
    "t5",
    "pretrain",
    "sft",
    "identifiers",
    "context",
    "reward",
    "sampling",
    "replying",
    "ppo",
]  # a stage depends on its section and all before
say = functools.partial(print, flush=True)


def make_config(preset="toy", seed=0, data_dir="", t5_dir="", settings=()):
    """The preset's configuration with `settings` ("section.field=value") applied. Raises DataError."""
    config, flags = (
        Config(preset, seed, str(data_dir), str(t5_dir)),
        {"on": True, "off": False},
    )
    if os.path.isfile(config.data_dir):
        config.data.corpus = config.data_dir
    for setting in [*PRESETS[preset].split(), *settings]:
        key, _, value = setting.partition("=")
        section, _, name = key.partition(".")
        sections = {k: x for k, x in vars(config).items() if is_dataclass(x)}
        target = sections.get(section)
        if target is None or name not in asdict(target):
            known = sections if target is None else asdict(target)
            raise DataError(
                f"--set {setting}: no such option; write section.field=value with one of {', '.join(known)}"
            )
        kind = type(getattr(target, name))
        try:
            setattr(target, name, flags[value] if kind is bool else kind(value))
        except (ValueError, KeyError):
            raise DataError(
                f"--set {setting}: not {'on or off' if kind is bool else f'a valid {kind.__name__}'}"
            ) from None
        low, high = RANGES.get(name, (1 if kind is int else 0, 1e9))
        if (
            value not in CHOICES.get(name, [value])
            or kind in (int, float)
            and not low <= getattr(target, name) <= high
        ):
            raise DataError(
                f"--set {setting}: {' or '.join(CHOICES.get(name, [f'from {low} to {high:g}']))}"
            )
    s, p, t = config.sampling, config.ppo, config.t5
    replying = config.replying
    for wrong, words in (
        (seed < 0, "--seed is below 0; change it"),
        (
            s.min_length > s.max_length,
            "sampling.min_length is above sampling.max_length; change it by --set",
        ),
        (
            replying.min_length > replying.max_length,
            "replying.min_length is above replying.max_length; change it by --set",
        ),
        (
            config.data.max_scored < config.data.max_target,
            "data.max_scored is below data.max_target; change it by --set",
        ),
        (
            p.minibatch_size > p.batch_size,
            "ppo.minibatch_size is above ppo.batch_size; change it by --set",
        ),
        (
            2 * t.relative_attention_max_distance <= t.relative_attention_num_buckets,
            "t5: max_distance must be above num_buckets / 2; change it by --set",
        ),
        (
            config.data.corpus != (config.data_dir or "embedded")
            and not (config.data.corpus == "real" and os.path.isdir(config.data_dir)),
            f"--data {config.data_dir or 'DIR'}: --preset real and paper need the folder that `python data.py download DIR` fills; "
            "toy and smoke need none, or a .jsonl or .csv file of yours",
        ),
        (
            preset == "paper" and not t5_dir,
            "--preset paper needs --t5 DIR: an official checkpoint's config.json, weights and spiece.model",
        ),
    ):
        if wrong:
            raise DataError(words)
    return config


# ---- figures in files -----------------------------------------------------------------------------------------------
def to_json(figures, indent=None):
    """JSON that every program reads. It has no infinity and no NaN, so they are the strings "inf", "-inf" and "nan"."""

    def plain(x):
        if isinstance(x, float) and not math.isfinite(x):
            return str(x)
        if isinstance(x, dict):
            return {key: plain(value) for key, value in x.items()}
        return [plain(value) for value in x] if isinstance(x, (list, tuple)) else x

    return json.dumps(plain(figures), indent=indent, allow_nan=False)


def from_json(text):
    """What to_json wrote, with numbers for "inf", "-inf" and "nan"."""

    def numbers(x):
        if x in ("inf", "-inf", "nan"):
            return float(x)
        if isinstance(x, dict):
            return {key: numbers(value) for key, value in x.items()}
        return [numbers(value) for value in x] if isinstance(x, list) else x

    return numbers(json.loads(text))


def perplexity(nats):
    """e^nats, of the mean negative log-likelihood; infinite where a float ends, at 710 nats."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


def refuse_without_effect(config, settings):
    """Raises DataError for a setting of a part that is not used, since another one takes its place."""
    replaced = {"t5.vocab_size": "data.vocab_size takes its place"}
    if config.t5_dir:
        replaced["t5."] = replaced["data.vocab_size"] = "the checkpoint of --t5 has its own"
    if config.data_dir:
        for name in ("num_train", "num_valid", "num_test", "num_labelled"):
            replaced[f"data.{name}"] = "all of --data is used"
    if not config.pretrain.steps:
        for name in asdict(config.pretrain).keys() - {"steps"}:
            replaced[f"pretrain.{name}"] = "pretrain.steps is 0"
    if config.sft.epochs:
        replaced["sft.steps"] = "sft.epochs takes its place"
    for section in ("identifiers", "context"):
        reader = getattr(config, section)
        network = asdict(reader).keys() - {"ngrams", "penalty", "class_weight"}
        for name in network if reader.ngrams else {"penalty"}:
            takes_its_place = "n-grams take the network's place" if reader.ngrams else "is 0"
            replaced[f"{section}.{name}"] = f"{section}.ngrams: {takes_its_place}"
    replaced["context.shared"] = "identifiers.shared counts for all"
    for setting in settings:
        key = setting.partition("=")[0]
        why = replaced.get(key) or replaced.get(key.partition(".")[0] + ".")
        if why:
            raise DataError(f"--set {setting}: has no effect here ({why}); leave it out")


# ---- what a result is a result of -----------------------------------------------------------------------------------
STAGES = ["pretrain", "sft", "identifiers", "judge", "label", "context", "ppo"]
RESULTS = ("metrics.json", "responses.jsonl", "report.md", "samples.md")  # of all stages
EVALUATE = "evaluate"  # comes after all stages; its result is metrics.json


def digest(content):
    """The SHA-256 of tensors and plain values in dicts and lists, however deep."""
    found = hashlib.sha256()

    def add(x):
        if torch.is_tensor(x):
            found.update(f"{x.dtype} {tuple(x.shape)}".encode())
            found.update(x.detach().cpu().reshape(-1).view(torch.uint8).numpy())
        elif isinstance(x, dict):
            found.update(f"dict of {len(x)}".encode())
            for name in sorted(x):
                add(name)
                add(x[name])
        elif isinstance(x, (list, tuple)):
            found.update(f"list of {len(x)}".encode())
            for one in x:
                add(one)
        else:
            found.update(f"{type(x).__name__} {x!r};".encode())

    add(content)
    return found.hexdigest()


def code_version(folder=Path(__file__).parent):
    """The code in a folder: its commit, a digest of what was changed since (None: nothing), and one of all its modules."""
    folder = Path(folder).resolve()
    outside = {name: x for name, x in os.environ.items() if not name.startswith("GIT_")}
    outside["GIT_CEILING_DIRECTORIES"] = str(folder.parent)  # a repository around is another's

    def git(*arguments):
        try:
            asked = subprocess.run(
                ["git", "-C", str(folder), *arguments], capture_output=True, env=outside
            )
        except OSError:  # no git
            return None
        return asked.stdout if asked.returncode == 0 else None

    commit, changes = git("rev-parse", "HEAD"), git("diff", "--binary", "HEAD")
    modules = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in (*folder.glob("*.py"), *folder.glob("tests/*.py"))
    }
    return {
        "commit": commit and commit.decode().strip(),
        "changed": hashlib.sha256(changes).hexdigest() if changes else None,
        "modules": digest(modules),
    }


def gflops(threads, size=1024):
    """GFLOP/s of a float32 matrix product on some threads, the best of a few: how fast this machine is."""
    before, matrix = torch.get_num_threads(), torch.ones(size, size)
    torch.set_num_threads(threads)
    try:
        seconds = []
        for _ in range(3):  # the first is slow
            started = time.perf_counter()
            matrix @ matrix
            seconds.append(time.perf_counter() - started)
    finally:
        torch.set_num_threads(before)
    return 2 * size**3 / min(seconds) / 1e9


def digest_of(dialogues):
    """The SHA-256 of all that dialogues have: texts, levels, emotions, ids."""
    return digest(json.dumps([[*vars(d).values()] for d in dialogues]))


def content_of(corpus, tokenizer, t5, config):
    """What training starts from, as it was read: the digest of each part of the data, of the tokenizer and of a T5 from --t5."""
    content = {"tokenizer": hashlib.sha256(tokenizer.model).hexdigest()}
    for kind, parts in (("dialogues", corpus.dialogues), ("labelled", corpus.labelled)):
        for part, dialogues in parts.items():
            content[f"{kind}/{part}"] = digest_of(dialogues)
    if config.t5_dir:
        content["t5"] = digest([asdict(t5.config), t5.state_dict()])
    return content


def comparable(raw):
    """A configuration (as config.json has it) without paths, and without what the content tells: a folder may be moved."""
    settings = {
        name: x
        for name, x in raw.items()
        if name not in ("data_dir", "t5_dir", "preset", "content")
    }
    settings["data"] = dict(raw["data"])
    if raw["data"]["corpus"] not in ("embedded", "real"):
        settings["data"]["corpus"] = "your own"
    settings["t5"] = {name: x for name, x in raw["t5"].items() if name != "vocab_size"}
    if raw["t5_dir"]:
        del settings["t5"], settings["data"]["vocab_size"]
    return settings


def relevant(stage, settings, content):
    """{name: value} of all that a stage's result depends on: its own section and those before it, and what it is trained on."""
    sections, left_out = set(settings), set()
    if stage != EVALUATE:
        last = ORDER.index(
            stage if stage in ORDER else "identifiers"
        )  # of "judge" and "label", too
        sections = {"seed", "data", *ORDER[: last + 1]}
        left_out = {"dialogues/test", "labelled/test"}
    found = {
        f"{section}.{name}": value
        for section in sections & set(settings)
        if isinstance(settings[section], dict)
        for name, value in settings[section].items()
    }
    found["seed"] = settings["seed"]
    if stage == "ppo":  # validates, by sampling, while it trains
        for name in ("valid_contexts", "batch_size"):
            found[f"eval.{name}"] = settings["eval"][name]
    found |= {
        f"the content of {part}": x for part, x in content.items() if part not in left_out
    }
    return found


def differing(one, two):
    """The names of what differs between two dicts."""
    return sorted(name for name in {*one, *two} if one.get(name) != two.get(name))


@contextlib.contextmanager
def alone(folder):
    """Nobody else in a folder meanwhile. Raises DataError if somebody is. The system frees it when the process ends, however it ends."""
    with open(Path(folder) / ".lock", "a", encoding="utf-8") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            elif msvcrt:
                file.seek(0)
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK):
                raise DataError(
                    f"{folder}: another command is at work there; wait for its end or take another folder"
                ) from None  # another error: a file system without locks
        yield


@functools.cache
def find_device(wanted=""):
    """ "cuda" or "cpu": the wanted one, or a GPU if one can be used. Says, once, why one that is there is not used."""
    if wanted == "cpu":
        return "cpu"
    why = ""
    with warnings.catch_warnings(
        record=True
    ) as warned:  # torch warns of a driver that is too old
        warnings.simplefilter("always")
        try:
            if torch.cuda.is_available():
                torch.ones(2, 2, device="cuda").mm(
                    torch.ones(2, 2, device="cuda")
                ).sum().item()
                return "cuda"
        except (
            RuntimeError,
            AssertionError,
        ) as error:  # no code for this GPU, or it is in use
            why = str(error)
    why = why or "".join(str(warning.message) for warning in warned[:1])
    why = " ".join(why.split())[:150]
    if not why and shutil.which("nvidia-smi"):
        why = f"torch {torch.__version__} is built without it or finds no driver for it"
    if wanted == "cuda":
        raise DataError(
            f"--device cuda: no GPU that torch can use ({why or 'none is seen'}); "
            "leave --device out, or install the build of torch that fits its driver"
        )
    if why:
        say(f"device      a GPU is seen but can not be used, the CPU is ({why})")
    elif torch.backends.mps.is_available():
        say("device      Apple's GPU is not used, the CPU is")
    return "cpu"


# ---- the run folder -------------------------------------------------------------------------------------------------
class Run:
    """A folder with config.json, metrics.jsonl and checkpoints/, and the loop that every training stage shares."""

    save_every = 30.0  # seconds between checkpoints
    command = None  # the arguments of the command line, if it was one
    given = ()  # stages that must be there: they are never trained anew

    def __init__(self, folder, config, device=""):
        self.code = (
            code_version()
        )  # noted beside results; another one is no reason to refuse them
        self.content = {}  # of what training starts from: see content_of
        self.made = {}  # stage -> the digest of its result
        self.folder, self.config, self.seconds, self.log = (
            Path(folder),
            config,
            {},
            {},
        )  # log: stage -> a record a step
        self.device, self.in_loop, self.interrupted = (
            find_device(device),
            False,
            False,
        )
        (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)

    def key(self, stage):
        """What a stage's result is a result of: the settings and the data it depends on, and the checkpoints it is made from."""
        settings = comparable(asdict(self.config))
        earlier = STAGES if stage == EVALUATE else STAGES[: STAGES.index(stage)]
        before = [self.made.get(name) for name in earlier]
        return digest(
            [2, relevant(stage, settings, self.content), before]
        )  # 2: format version

    def refuse_another(self, content=None):
        """Raises DataError if a result in the folder depends on a setting, or on data (once `content` is known), that is now another."""
        path, results = self.folder / "config.json", []
        for stage in STAGES:
            if (self.folder / "checkpoints" / f"{stage}.pt").exists():
                results.append(stage)
        if (self.folder / "metrics.json").exists():
            results.append(EVALUATE)
        if not results or not path.exists():
            return
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            there, old = comparable(raw), raw.get("content", {})
        except (AttributeError, KeyError, TypeError, ValueError):
            raise DataError(f"{path}: damaged; {self.elsewhere()}") from None
        now = comparable(asdict(self.config))
        content = old if content is None else content
        for stage in results:
            changed = differing(relevant(stage, there, old), relevant(stage, now, content))
            if changed:
                words = ", ".join(changed[:3]) + (", ..." if len(changed) > 3 else "")
                raise DataError(
                    f"{self.folder}: has results of another configuration ({words}), which stay; {self.elsewhere()}"
                )

    def note_environment(self):
        """Append to environment.json, a list with an entry for each start of the run, what this one runs on."""
        try:
            known = json.loads((self.folder / "environment.json").read_text(encoding="utf-8"))
            known = known if isinstance(known, list) else [known]
        except (OSError, ValueError):
            known = []
        last = known[-1] if known and isinstance(known[-1], dict) else self.code
        if last.get("modules") != self.code["modules"]:
            say(
                "warning: the code is not that of the last start; what is finished is kept "
                "(to train a stage anew, delete its file in checkpoints)"
            )
        threads = torch.get_num_threads()
        environment = {
            "command": data.command_line(sys.argv),
            **self.code,
            "python": sys.version,
            **{name: version(name) for name in ("torch", "sentencepiece", "numpy")},
            "device": self.device,
            "threads": threads,
            "gflops": {str(n): round(gflops(n), 1) for n in sorted({1, threads})},
        }
        self.write("environment.json", json.dumps([*known, environment], indent=2) + "\n")

    def elsewhere(self):
        """The same command with a folder that is not there yet."""
        folder = next(
            f for i in itertools.count(2) if not (f := Path(f"{self.folder}-{i}")).exists()
        )
        if self.command is None:
            return f"take another folder: {folder}"
        command = list(self.command)
        if "--run" in command:
            at = command.index("--run")
            del command[at : at + 2]
        return f"take another folder: {data.command_line(['python', 'emprl.py', *command, '--run', str(folder)])}"

    def write(self, name, text):  # a file of the run folder, atomically
        (self.folder / f"{name}.tmp").write_bytes(
            text if isinstance(text, bytes) else text.encode()
        )
        os.replace(self.folder / f"{name}.tmp", self.folder / name)

    def write_log(self, stage, records):
        self.log[stage] = records
        self.write(
            "metrics.jsonl",
            "".join(to_json(record) + "\n" for log in self.log.values() for record in log),
        )

    def seed(self, stage, step=0):
        """Seed torch from (seed, stage, step): a resumed step draws what an uninterrupted one would."""
        torch.manual_seed(zlib.crc32(f"{self.config.seed}/{stage}/{step}".encode()))

    def on_interrupt(
        self, *_
    ):  # Ctrl-C: a training loop finishes its step and saves; anything else stops at once
        self.interrupted = True
        if not self.in_loop:
            raise KeyboardInterrupt

    def stage(self, name, compute):
        """compute(state, save) -> the stage's final state, unless that is there for the same configuration.
        `state` is what an interrupted call left by save(**state), or {}."""
        path, key = self.folder / "checkpoints" / f"{name}.pt", self.key(name)
        state = load_state(path) if path.exists() else {"key": None}
        if not isinstance(state, dict) or "key" not in state:
            raise CheckpointError(f"{path}: not a checkpoint of this program; delete it")
        state = state if state["key"] == key else {}
        before, started = state.get("seconds", 0.0), time.time()

        def save(**new):
            self.write_log(
                name, new.get("log", [])
            )  # first: what a kill leaves too much in it, a resumed run rewrites
            save_atomically(
                {
                    "key": key,
                    "code": self.code,
                    "seconds": before + time.time() - started,
                    **new,
                },
                path,
            )

        if not state.get("done"):
            if name in self.given:
                raise DataError(
                    f"{path}: of other data or other settings than the run's, or not finished; make the run again"
                )
            for stale in RESULTS:
                (self.folder / stale).unlink(missing_ok=True)
            self.seed(name)
            new = compute(state, save)
            result = {part: x for part, x in new.items() if part != "log"}
            save(done=True, made=digest(result), **new)
            state = load_state(path)
        self.write_log(name, state.get("log", []))
        self.seconds[name] = round(state["seconds"], 1)
        self.made[name] = state["made"]
        return state

    def train(self, name, make_trainer, steps, model):
        """All steps of make_trainer()'s trainer, resumed where it was cut; leaves the result in `model`."""

        lower = f"lower {'identifiers' if name == 'judge' else name}.lr"  # they share their options

        def compute(state, save):
            trainer, log = make_trainer(), state.get("log", [])
            if log:
                trainer.load_state_dict(state["trainer"])
            first, started, self.in_loop = len(log), time.time(), True
            saved = shown = started
            for i in range(first, steps):
                self.seed(name, i)
                record, now = trainer.step(i), time.time()
                log.append({"stage": name, "step": i, **record})
                signs = (
                    signs_of_collapse(record, log[0], self.config.sampling.max_length)
                    if "entropy" in record
                    else []
                )
                if signs or now - shown > 5 or i in (first, steps - 1):
                    shown, speed = now, (i + 1 - first) / max(now - started, 1e-9)
                    minutes, seconds = divmod(int((steps - i - 1) / speed), 60)
                    shown_keys = (
                        "loss",
                        "valid",
                        "reward",
                        "kl",
                        "length",
                        "entropy",
                        *(k for k in ("skipped", "stopped_early") if record.get(k)),
                    )
                    say(
                        f"{name:<12}{i + 1:>5}/{steps}  {speed:5.2f} steps/s  {minutes}:{seconds:02d} left",
                        *(f" {k} {record[k]:.4g}" for k in shown_keys if k in record),
                        *(f"\n    warning: {words}" for words in signs),
                    )
                if len(log) > 9 and all(r.get("skipped") == 1 for r in log[-10:]):
                    raise DataError(
                        f"{name}, step {i + 1}: 10 steps in a row had no finite loss and gradient and were skipped; "
                        f"{lower}. What was saved before them is in {self.folder}/checkpoints"
                    )
                stop = self.config.ppo.stop_on_collapse and signs
                if (
                    now - saved > self.save_every
                    and not record.get("skipped")
                    or self.interrupted
                    or stop
                ):
                    save(trainer=trainer.state_dict(), log=log)
                    saved = now
                if stop:
                    raise DataError(
                        f"{name}, step {i + 1}: {'; '.join(signs)}. It is saved; the same command goes on from there"
                    )
                if self.interrupted:
                    raise KeyboardInterrupt
            self.in_loop = False
            trainer.finish()
            broken = [key for key, p in model.named_parameters() if not p.isfinite().all()]
            if broken:
                raise DataError(
                    f"{name}: training diverged, not finite are {some_of(broken)}; {lower}"
                )
            return {"weights": model.state_dict(), "log": log}

        model.load_state_dict(self.stage(name, compute)["weights"])


# ---- the recipe -----------------------------------------------------------------------------------------------------
def run_all(run):
    """Every stage, in order. Returns the final metrics (also in metrics.json)."""
    with alone(run.folder):
        return recipe(run)


def recipe(run):
    """What run_all does, alone in the folder."""
    run.refuse_another()  # before much is read
    config, c, started = run.config, run.config.data, time.time()
    say(
        f"EmpRL, preset {config.preset}, seed {config.seed}, on {run.device}; results go to {run.folder}"
    )
    corpus = (
        data.embedded_corpus(config.seed, c.num_train, c.num_valid, c.num_test, c.num_labelled)
        if c.corpus == "embedded"
        else data.real_corpus(config.data_dir)
        if c.corpus == "real"
        else data.own_corpus(c.corpus)
    )
    tokenizer, t5 = start(run, corpus)
    run.content = content_of(corpus, tokenizer, t5, config)
    run.refuse_another(run.content)
    run.note_environment()
    run.write("tokenizer.model", tokenizer.model)
    corpus.dialogues["test"] = corpus.dialogues["test"][: config.eval.contexts or None]
    corpus.dialogues["probe"] = corpus.dialogues["valid"][
        : config.eval.valid_contexts
    ]  # for a look inside PPO
    pairs = {
        part: Pairs(ds, tokenizer, c.max_source, c.max_target, run.device)
        for part, ds in corpus.dialogues.items()
        if part in ("turns", "train", "valid")
    }
    whole = {  # for what is read in human responses, and measured on them: uncut
        part: Pairs(corpus.dialogues[part], tokenizer, c.max_source, c.max_scored, run.device)
        for part in ("train", "valid", "test", "probe")
    }
    labelled = {
        part: Pairs(ds, tokenizer, c.identifier_source, c.identifier_target, run.device)
        for part, ds in corpus.labelled.items()
    }
    run.write(
        "config.json", json.dumps({**asdict(config), "content": run.content}, indent=2) + "\n"
    )
    size = f"{tokenizer.vocab_size} tokens, {sum(p.numel() for p in t5.parameters()) / 1e6:.2f} M parameters"
    say("\n".join(f"data        {note}" for note in (*corpus.notes, size)))
    run.seconds["data"] = round(time.time() - started, 1)
    untrained = copy.deepcopy(t5)
    # 1. The initial policy: pre-training on the training texts, then maximum likelihood on the pairs.
    run.train(
        "pretrain",
        lambda: pretrain_trainer(config, t5, tokenizer, pairs.get("turns", pairs["train"])),
        config.pretrain.steps,
        t5,
    )
    sft = config.sft
    if sft.epochs:
        sft = replace(sft, steps=sft.epochs * math.ceil(len(pairs["train"]) / sft.batch_size))
    rows_at = batches(pairs["train"].lengths(), sft.batch_size, config.seed)
    run.train(
        "sft",
        lambda: mle_trainer(t5, pairs["train"], pairs["valid"], rows_at, sft),
        sft.steps,
        t5,
    )
    save_pretrained(t5, run.folder / "sft")

    # 2. The identifiers that give the reward, and the judge: another seed on other data, never used as reward.
    def reader(stage, train, valid, settings):
        run.seed(stage)
        model = Identifiers(t5.config, config.identifiers.shared, settings.ngrams).to(
            run.device
        )
        model.start_from(untrained if settings.start == "t5" else t5)
        rows_at = batches(
            train.lengths(), settings.batch_size, zlib.crc32(stage.encode()) + config.seed
        )
        run.train(
            stage,
            lambda: identifier_trainer(model, train, valid, rows_at, settings),
            0 if settings.ngrams else settings.steps,
            model,
        )
        return model.eval().requires_grad_(False)

    readers = [
        reader("identifiers", labelled["train"], labelled["valid"], config.identifiers),
        reader("judge", labelled["judge_train"], labelled["judge_valid"], config.identifiers),
    ]
    # 3. Targets: what the identifiers read in every human response; and what the context alone tells of that, to a reader of
    #    empty responses. No policy can know more: it estimates a ceiling, and makes the expected reward.
    levels = run.stage(
        "label",
        lambda *_: {
            part: predict_levels(readers[0], whole[part]) for part in ("train", "valid")
        },
    )
    empty = {
        part: whole[part].but([[1]] * len(whole[part]), levels.get(part))
        for part in ("train", "valid", "test")
    }
    foresight = reader("context", empty["train"], empty["valid"], config.context)
    expected = {part: predict(foresight, empty[part]).exp() for part in ("train", "test")}
    share, target = expected["train"].mean(0), config.reward.target
    promised = {
        part: even(probs, share, config.reward.balance) for part, probs in expected.items()
    }
    promised = (
        {part: probs.argmax(-1) for part, probs in promised.items()}
        if target == "likeliest"
        else promised
    )
    # 4. PPO towards the target levels, held near the MLE policy.
    policy, train = copy.deepcopy(t5), pairs["train"]
    rows_at = batches(
        [0] * len(train), config.ppo.batch_size, config.seed
    )  # long and short ones mixed
    test, probe = (
        Evaluation(run, tokenizer, readers, t5, whole[part], corpus.level_probs)
        for part in ("test", "probe")
    )
    targets = levels["train"] if target == "human" else promised["train"]
    reward, batch_at = (
        make_reward(readers[0], targets, **config.reward.options()),
        lambda i: (train.batch(rows_at(i))[0], torch.tensor(rows_at(i))),
    )
    human_loss = lambda index: policy.loss_sum(*train.batch(index.tolist()))
    run.train(
        "ppo",
        lambda: PPOTrainer(
            policy, reward, batch_at, probe.validate, config.sampling, config.ppo, human_loss
        ),
        config.ppo.steps,
        policy,
    )
    save_pretrained(policy, run.folder / "emprl")
    # 5. Before and after, on the same test contexts; then tables, plots and samples.
    started = time.time()
    metrics = {
        name: identifier_scores(reader, labelled["test"])
        for name, reader in zip(("identifiers", "judge"), readers)
    }
    metrics |= test.compare(
        {"sft": t5, "emprl": policy},
        whole["train"],
        levels["train"],
        {"context": expected["test"], "context_balanced": even(expected["test"], share, 0.5)},
        promised["test"],
    )
    run.seconds["evaluate"] = round(time.time() - started, 1)
    metrics |= {"config": asdict(config), "seed": config.seed, "seconds": run.seconds}
    metrics |= {"key": run.key(EVALUATE), "code": run.code}
    run.write("metrics.json", to_json(metrics, indent=2) + "\n")
    report(run, metrics, test)
    return metrics


def start(run, corpus):
    """Tokenizer and T5: those of the official folder, or a tokenizer trained on the training texts and a new T5."""
    config, folder = run.config, run.config.t5_dir
    if folder:
        tokenizer = Tokenizer(official_file(folder, "spiece.model"))
        t5 = from_pretrained(folder, tokenizer.vocab_size)
        config.t5 = t5.config  # so that config.json says what is used
    else:
        dialogues = (
            corpus.dialogues["train"]
            + corpus.labelled["train"]
            + corpus.labelled["judge_train"]
        )
        tokenizer = Tokenizer.train(
            [u for d in dialogues for u in (*d.context[-2:], d.response)],
            config.data.vocab_size,
        )
        config.t5.vocab_size = tokenizer.vocab_size
        run.seed("t5")
        t5 = T5(config.t5)
    return tokenizer, t5.to(run.device).eval()


def pretrain_trainer(config, t5, tokenizer, pairs):
    """Span corruption on context and response of every pair, or the pairs as they are; nothing to validate, the last weights stay."""
    texts = [(c + r)[-128:] for c, r in zip(pairs.contexts, pairs.responses)]

    def loss_sum(rows):
        if config.pretrain.task == "turns":
            return t5.loss_sum(*pairs.batch(rows))
        corrupted = [
            span_corrupt(texts[i], random_spans(len(texts[i])), tokenizer.sentinels)
            for i in rows
        ]
        return t5.loss_sum(*(pad(side).to(pairs.device) for side in zip(*corrupted)))

    return Trainer(
        t5,
        loss_sum,
        batches(pairs.lengths(), config.pretrain.batch_size, config.seed),
        None,
        config.pretrain,
    )


def mle_trainer(t5, train, valid, rows_at, config):
    """Maximum likelihood on pairs (with `.batch(rows)` and `.chunks(size)`, as data.Pairs); validated by the loss per token."""

    def validate():
        losses, counts = zip(*(t5.loss_sum(*valid.batch(rows)) for rows in valid.chunks(64)))
        return (sum(losses) / sum(counts)).item()

    return Trainer(t5, lambda rows: t5.loss_sum(*train.batch(rows)), rows_at, validate, config)


# ---- evaluation -----------------------------------------------------------------------------------------------------
class Evaluation:
    """Measures policies on `pairs`, human responses uncut, by the reward's identifiers, by the judge and, in the embedded world, by the oracle."""

    def __init__(self, run, tokenizer, readers, reference, pairs, level_probs):
        self.run, self.tokenizer, self.readers, self.reference = (
            run,
            tokenizer,
            readers,
            reference,
        )
        self.pairs, self.level_probs, self.results = pairs, level_probs, {}
        self.gold = self.levels(pairs.responses)
        truth = "oracle_" if level_probs else "judge_"
        self.matches = {"exact_match": "identifiers", f"{truth}exact_match": truth.rstrip("_")}

    def levels(self, responses):
        """{prefix of the reader's figures: (N, M) levels} of a response (ids) to each context."""
        tables = {
            who: predict_levels(reader, self.pairs.but(responses))
            for who, reader in zip(("", "judge_"), self.readers)
        }
        if self.level_probs:
            tables["oracle_"] = torch.tensor(
                [
                    oracle_levels(d.context, self.tokenizer.decode(r))
                    for d, r in zip(self.pairs.dialogues, responses)
                ]
            )
        return tables

    def scores(self, tables):
        return {
            who + key: x
            for who in tables
            for key, x in level_scores(tables[who], self.gold[who]).items()
        }

    def perplexities(self, t5):
        """Of the whole human responses, a token and a word. Of one that is longer than data.max_scored its beginning counts, in
        the likelihood and in the number of words. The end is predicted, too: + 1."""
        pairs, nll, tokens, count = self.pairs, 0.0, 0, 0
        for rows in pairs.chunks(self.run.config.eval.batch_size, 2**13):
            loss, n = t5.loss_sum(*pairs.batch(rows))
            nll, tokens = nll + loss.item(), tokens + n
        for d, ids in zip(pairs.dialogues, pairs.responses):
            cut = len(ids) >= self.run.config.data.max_scored
            count += len(words(self.tokenizer.decode(ids) if cut else d.response)) + 1
        return {
            "perplexity": perplexity(nll / tokens),
            "perplexity_per_word": perplexity(nll / count),
        }

    @torch.no_grad()
    def measure(self, name, t5, sampling, expected=None):
        """All figures of one policy, or with `expected` (see best_of) of its best of eval.best_of samples, the first of which is its only one
        without. Perplexities, always the policy's, ignore top-k and temperature; kl is that of what is sampled from, null for greedy
        replies and for the best of several. Texts, levels and rewards: self.results[name]."""
        seed = "evaluate " + ("sft" if name == "best_of_n" else name)
        self.run.seed(seed)
        config, pairs, options = self.run.config, self.pairs, self.run.config.reward.options()
        tries = [
            pairs.but(respond(t5, pairs, sampling, config.eval.batch_size))
            for _ in range(config.eval.best_of if expected is not None else 1)
        ]
        answered = (
            tries[0]
            if expected is None
            else best_of(self.readers[0], tries, expected, **options)
        )
        texts, tables = (
            [self.tokenizer.decode(r) for r in answered.responses],
            self.levels(answered.responses),
        )
        rewards = empathy_reward(predict(self.readers[0], answered), self.gold[""], **options)
        kl = None
        if expected is None:
            self.run.seed(seed)  # the same replies again
            kl = sampled_kl(t5, self.reference, pairs, sampling, config.eval.batch_size)
        self.results[name] = {"texts": texts, "levels": tables, "rewards": rewards.tolist()}
        return {
            **self.scores(tables),
            "reward": rewards.mean().item(),
            **self.perplexities(t5),
            "kl": kl,
            **text_scores(texts, [d.response for d in pairs.dialogues]),
        }

    def describe(self, name, i):
        r = self.results[name]
        return f"{r['texts'][i]}   {r['levels'][''][i].tolist()} for {self.gold[''][i].tolist()}, reward {r['rewards'][i]:.2f}"

    def validate(self, t5):
        """Inside PPO: three samples for the eye, and a few figures: among them the share of replies with all three levels right
        as the identifiers see it, beside the truth: of one kind, so that a gap tells of a reward that is hacked."""
        scores = self.measure("valid", t5, self.run.config.replying)
        for i, d in enumerate(self.pairs.dialogues[:3]):
            say(f"    {d.context[-1]}\n    -> {self.describe('valid', i)}")
        return {
            f"valid_{key}": scores[key]
            for key in ("reward", "emp_f1", "kl", "perplexity", "unique", *self.matches)
        }

    def compare(self, policies, train=None, train_levels=None, foreseen=None, promised=None):
        """metrics.json's figures: floors, ceilings, both policies sampled and greedy, gains with intervals."""
        s, n, human = (
            self.run.config.replying,
            len(self.pairs),
            [d.response for d in self.pairs.dialogues],
        )
        metrics = {"ceiling": {}, "target": text_scores(human, human)}
        if self.level_probs:
            metrics["ceiling"] = ceiling(
                [self.level_probs[d.id] for d in self.pairs.dialogues], self.gold["oracle_"]
            )
        if train is not None:
            metrics["ceiling"] |= {
                name: self.scores({who: probs.argmax(-1) for who in self.gold})
                for name, probs in foreseen.items()
            }
            rows = torch.randint(
                len(train), (n,), generator=torch.Generator().manual_seed(0)
            ).tolist()
            majority = train_levels.mode(0).values.expand(n, -1)
            metrics["floors"] = {
                "majority": self.scores({who: majority for who in self.gold}),
                "random_copy": self.scores(self.levels([train.responses[i] for i in rows])),
            }
        greedy = Sampling(min_length=s.min_length, max_length=s.max_length, greedy=True)
        for name, t5 in policies.items():
            metrics[name] = self.measure(name, t5, s)
            metrics[name + "_greedy"] = self.measure(name + "_greedy", t5, greedy)
        if promised is not None:
            k = (
                self.run.config.eval.best_of
            )  # its KL is at most log k - (k - 1) / k (Beirami et al. 2024)
            metrics["best_of_n"] = self.measure("best_of_n", policies["sft"], s, promised) | {
                "kl": math.log(k) - (k - 1) / k
            }
        metrics["gain"] = {
            who + "emp_f1": paired_bootstrap(
                *(self.results[p]["levels"][who] for p in policies), gold, gold
            )
            for who, gold in self.gold.items()
        }
        return metrics


PLOTS = ("losses", "ppo", "emp_f1", "levels", "learnt_vs_truth")


# ---- report ---------------------------------------------------------------------------------------------------------
def replies(evaluation):
    """responses.jsonl: all texts, and the levels that each reader sees in them."""
    records, results = [], evaluation.results
    for i, d in enumerate(evaluation.pairs.dialogues):
        levels = {
            who.strip("_") or "identifiers": {"target": gold[i].tolist()}
            | {name: r["levels"][who][i].tolist() for name, r in results.items()}
            for who, gold in evaluation.gold.items()
        }
        records.append(
            {
                "id": d.id,
                "context": d.context,
                "target": d.response,
                "responses": {name: r["texts"][i] for name, r in results.items()},
                "levels": levels,
            }
        )
    return "".join(json.dumps(record) + "\n" for record in records)


def report(run, metrics, evaluation):
    """report.md, samples.md, responses.jsonl (all texts, and the levels that each reader sees in them) and plots/*.png."""
    try:
        draw_plots(run, metrics, evaluation)
    except Exception as error:  # a picture less is no reason to lose the report
        if not isinstance(error, (ImportError, OSError)):
            traceback.print_exc()
        say(f"no more plots: {type(error).__name__}: {error}; everything else is there")
    scores = [(m, s) for m in MECHANISMS for s in ("accuracy", "macro_f1", "weighted_f1")]
    identifiers = table(
        ["identifiers, test part", *map(" ".join, scores)],
        [[who, *(metrics[who][m][s] for m, s in scores)] for who in ("identifiers", "judge")],
    )
    plots = "\n\n".join(
        f"![{name}](plots/{name}.png)"
        for name in PLOTS
        if (run.folder / "plots" / f"{name}.png").exists()
    )
    run.write(
        "report.md",
        f"# EmpRL, preset {run.config.preset}, seed {run.config.seed}\n\n{before_after(metrics)}\n\n"
        f"{identifiers}\n\n{plots}\n\nSeconds: {run.seconds}. Responses to read: [samples.md](samples.md).\n",
    )
    lines = [
        "# Samples",
        "[ER, IP, EX] of a response, for those of the target, as the reward's identifiers read them.",
    ]
    results, dialogues = evaluation.results, evaluation.pairs.dialogues
    for i, d in enumerate(dialogues[:24]):
        lines.append(
            f"**{i + 1}. {d.emotion}** {' / '.join(d.context)}\n\n* target: {d.response}\n"
            + "\n".join(f"* {name}: {evaluation.describe(name, i)}" for name in results)
        )
    run.write("samples.md", "\n\n".join(lines) + "\n")
    run.write("responses.jsonl", replies(evaluation))
    say(
        f"\n{before_after(metrics)}\n\n{identifiers}\n\nreport {run.folder}/report.md, samples {run.folder}/samples.md"
    )


def figure_class():
    """matplotlib's Figure, which draws into files and needs neither a window nor pyplot. MPLBACKEND, which a command inherits from
    Jupyter, may name a backend that is not here: then it is hidden while matplotlib is imported. Who has no home folder, as some
    in containers, has no place for matplotlib's list of fonts: then it is for once."""
    try:
        Path.home()
    except RuntimeError:
        if "MPLCONFIGDIR" not in os.environ:
            os.environ["MPLCONFIGDIR"] = tempfile.mkdtemp()
            atexit.register(shutil.rmtree, os.environ["MPLCONFIGDIR"], ignore_errors=True)
    try:
        from matplotlib.figure import Figure
    except ValueError:
        backend = os.environ.pop("MPLBACKEND", "")
        from matplotlib.figure import Figure

        os.environ["MPLBACKEND"] = backend
    return Figure


def draw_plots(run, metrics, evaluation):
    """plots/*.png: the curves of metrics.jsonl, Emp-F1 before and after, level confusions, what the identifiers see against the truth.
    Left out is what was not measured (of a skipped stage, for instance) and what is not finite."""
    Figure = figure_class()
    (run.folder / "plots").mkdir(exist_ok=True)
    for name in PLOTS:  # of an earlier call
        (run.folder / "plots" / f"{name}.png").unlink(missing_ok=True)

    def figure(
        name, panels
    ):  # panels: (title, x label, y label, draw, its arguments) of each picture, side by side
        panels = [panel for panel in panels if panel]
        if not panels:
            return
        fig = Figure(figsize=(4 * len(panels), 3.4), layout="constrained")
        axes = fig.subplots(1, len(panels), squeeze=False)
        for axis, (title, x, y, draw, *arguments) in zip(axes[0], panels):
            draw(axis, *arguments)
            axis.set(title=title, xlabel=x, ylabel=y)
        fig.savefig(run.folder / "plots" / f"{name}.png", dpi=110)

    def points(stage, key):
        return [
            (record["step"] + 1, record[key])
            for record in run.log.get(stage, ())
            if abs(record.get(key, math.nan))
            < 1e100  # not what is infinite, NaN or beyond an axis
        ]

    def panel(title, x, y, stage, labels):
        """A panel of curves; None if there is nothing to draw."""
        lines = {label: points(stage, key) for key, label in labels.items()}
        return (title, x, y, curves, lines) if any(lines.values()) else None

    def curves(axis, lines):
        for label, line in lines.items():
            if line:
                axis.plot(*zip(*line), label=label)
        axis.legend()

    def bars(axis):
        bar = {
            f"{m.upper()}\n{name}": metrics[name][f"emp_f1_{m}"]
            for m in MECHANISMS
            for name in ("sft", "emprl")
        }
        axis.bar([*bar], [*bar.values()], color=["C0", "C1"] * 3)

    def heat(axis, name, m):
        counts = confusion(
            evaluation.results[name]["levels"][""][:, m], evaluation.gold[""][:, m]
        )
        share = counts / counts.sum(1, keepdim=True).clamp(min=1)
        axis.imshow(share.numpy(), vmin=0, vmax=1, cmap="Blues")
        for row, column in itertools.product(range(LEVELS), repeat=2):
            axis.text(
                column,
                row,
                f"{share[row, column]:.2f}",
                ha="center",
                color="wk"[share[row, column] < 0.5],
            )
        axis.set(xticks=range(LEVELS), yticks=range(LEVELS))

    x = "PPO iteration"
    learnt = {f"valid_{key}": label for key, label in evaluation.matches.items()}
    figure(
        "losses",
        [
            panel(stage, "step", "loss (nats)", stage, {"loss": "training", "valid": valid})
            for stage, valid in (
                ("sft", "validation"),
                ("identifiers", "-macro-F1, validation"),
                ("judge", "-macro-F1, validation"),
            )
        ],
    )
    figure(
        "ppo",
        [
            panel(title, x, unit, "ppo", labels)
            for title, unit, labels in (
                ("reward", "0..1", {"reward": "training"}),
                ("KL to the MLE policy", "nats a response", {"kl": "k1", "kl_k3": "k3"}),
                ("KL coefficient", "", {"kl_coef": "beta"}),
                ("response length", "tokens", {"length": "mean"}),
            )
        ],
    )
    figure("emp_f1", [("Emp-F1 before and after", "mechanism", "weighted F1", bars)])
    figure(
        "levels",
        [
            (f"{p}: {m.upper()}", "generated level", "target level", heat, p, i)
            for p in ("sft", "emprl")
            for i, m in enumerate(MECHANISMS)
        ],
    )
    unit = "all three levels right (share)"
    figure("learnt_vs_truth", [panel("validation", x, unit, "ppo", learnt)])


# ---- the command line -----------------------------------------------------------------------------------------------
def keep_memory():
    """glibc's allocator hands a step's freed tensors back to the kernel, which clears their pages anew at the next step: it is told to keep them."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        [
            ctypes.CDLL(None).mallopt(threshold, 2**30) for threshold in (-1, -3)
        ]  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "command",
        nargs="?",
        default="run",
        choices=("run", "evaluate", "chat", "rate", "ablate"),
    )
    parser.add_argument(
        "what", nargs="*", help="of rate: RUN [YOUR NAME]; of ablate: NAME [RUN ...]"
    )
    parser.add_argument("--preset", default="toy", choices=PRESETS)
    parser.add_argument(
        "--data",
        default="",
        help="folder of the real corpora, or your .jsonl/.csv of dialogues",
    )
    parser.add_argument(
        "--t5", default="", help="folder of an official T5 checkpoint with its spiece.model"
    )
    parser.add_argument(
        "--run", default="", help="where results go (default: runs/PRESET-seedN)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--device",
        default="",
        choices=("cpu", "cuda"),
        help="of run, evaluate, chat (default: cuda if it can be used)",
    )
    parser.add_argument(
        "--set",
        action="extend",
        nargs="+",
        default=[],
        metavar="key=value",
        help="e.g. ppo.kl_coef=0 ppo.steps=50",
    )
    parser.add_argument(
        "--again", action="store_true", help="ablate: measure anew what has been measured"
    )
    parser.add_argument(
        "--write", default="", metavar="FILE", help="ablate: write all figures there, too"
    )
    parser.error = lambda words: sys.exit(
        print(f"emprl.py: {words}; see --help", file=sys.stderr) or 2
    )
    a = parser.parse_args(arguments)
    folder = a.run or f"runs/{a.preset}-seed{a.seed}"
    if hasattr(sys.stdout, "reconfigure"):  # a letter that the terminal does not have is a "?"
        sys.stdout.reconfigure(errors="replace")
    before = on_ctrl_c(signal.default_int_handler)
    try:
        if a.command != "run" and (a.set or a.t5 or bool(a.data) != (a.command == "evaluate")):
            raise DataError(
                "evaluate takes --run and --data FILE, chat takes --run; neither takes --set or --t5: the run has its own"
            )
        number = {"rate": (1, 2), "ablate": range(1, 100)}.get(a.command, (0,))
        ablates = a.command == "ablate"
        if (
            len(a.what) not in number
            or a.run
            and a.what
            or (a.again or a.write)
            and not ablates
        ):
            raise DataError(
                "only rate takes RUN [YOUR NAME] here, and ablate NAME [RUN ...] [--again] [--write FILE]; see --help"
            )
        if a.device and a.command in ("rate", "ablate"):
            raise DataError(f"{a.command} takes no --device; leave it out")
        if a.command == "run":
            keep_memory()
            config = make_config(a.preset, a.seed, a.data, a.t5, a.set)
            refuse_without_effect(config, a.set)
            if a.t5:  # before anything is trained or written
                official_file(a.t5, "config.json")
                official_file(a.t5, "spiece.model")
                weights_file(a.t5)
            run = Run(folder, config, a.device)
            run.command = sys.argv[1:] if arguments is None else arguments
            on_ctrl_c(run.on_interrupt)
            run_all(run)
        else:  # what is done with finished runs is no part of the recipe: it is kept with the tests
            sys.path.insert(0, str(Path(__file__).parent / "tests"))
            import finished

            getattr(finished, a.command)(a, folder)
        return 0
    except KeyboardInterrupt:
        on_ctrl_c(signal.SIG_IGN)  # a second one comes too late
        command = data.command_line(arguments or sys.argv[1:])
        print(f"\nstopped; go on with: python emprl.py {command}", file=sys.stderr)
        return 130
    except Exception as error:
        words = in_one_line(error, folder)
        if words:
            print(f"emprl.py: {words}", file=sys.stderr)
            return 2
        # not foreseen, perhaps a fault in a changed copy: whoever mends it needs all of it
        traceback.print_exc()
        if a.command == "run":
            words = (
                f"what was finished is saved in {folder}; the same command goes on from there"
            )
        else:
            words = "the finished runs are as they were; the same command tries again"
        print(f"emprl.py: a fault in the program, see above; {words}", file=sys.stderr)
        return 1
    finally:
        on_ctrl_c(before)


def on_ctrl_c(handler):
    """From now on Ctrl-C calls the handler. Returns the one before. Only the main thread may ask for that: elsewhere, nothing."""
    if handler is not None and threading.current_thread() is threading.main_thread():
        return signal.signal(signal.SIGINT, handler)


def in_one_line(error, folder):
    """What is wrong and what to do, if that could be foreseen: input, disk, memory. None for anything else."""
    if isinstance(error, (DataError, CheckpointError)):
        return str(error)
    if isinstance(error, ImportError):
        if error.name is None:  # not from an import statement: it says itself what to do
            return str(error)
        return f"{error}; install what it needs: pip install -r requirements.txt"
    if isinstance(error, BrokenPipeError):
        # Python would write what is left on its way out, and complain once more
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return "stopped: the program that read the output has ended; the same command goes on, best into a file"
    if isinstance(error, OSError):
        cures = {
            **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room"),
            **dict.fromkeys(
                (errno.EACCES, errno.EPERM, errno.EROFS), "name a folder you may write to"
            ),
            errno.EMFILE: "close other programs",
        }
        cure = cures.get(error.errno, "name another path")
        return f"{error.filename or folder}: {error.strerror or error}; {cure}"
    memory = "out of memory|can't allocate|not enough memory"
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and re.search(memory, str(error))
    ):
        return (
            "out of memory; lower the stage's micro_batch (the gradient stays the same but for dropout), ppo.batch_size or "
            "eval.batch_size"
        )
    return None


if __name__ == "__main__":
    sys.exit(main())
