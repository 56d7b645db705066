"""EmpRL, end to end: settings and presets, the recipe, run folder, evaluation, commands.

A T5 first learns to reply as people did (MLE). PPO then rewards replies that show as much
empathy as a human reply would. Empathy has three mechanisms: emotional reaction (ER),
interpretation (IP), exploration (EX); each has the level 0 none, 1 weak or 2 strong. Emp-F1
measures how well the levels of replies match those of human replies.

    python emprl.py                            train and evaluate the preset `toy`: minutes
    python emprl.py --preset real --data DIR   the real corpora, from scratch
    python emprl.py evaluate --run RUN --data FILE
    python emprl.py chat --run RUN
    python emprl.py download DIR
    python emprl.py options                    every setting, its range and its meaning

Read `run_all` first: it is the whole method on a page. The commands at the end may be skipped.
"""

import os
import signal

if __name__ == "__main__":  # the imports below take a second, which Ctrl-C may end

    def stop(*_):
        os.write(2, b"\nstopped\n")
        os._exit(130)

    signal.signal(signal.SIGINT, stop)

# A thread of torch that waits for the others first spins: it asks again and again, and keeps
# its core busy. Here it sleeps after 1500 times. The default, 200 times as many, makes a run
# five times slower beside one busy program. libgomp (Linux) reads this when torch is loaded;
# on macOS and Windows OpenMP reads KMP_BLOCKTIME, which is not set here.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1500")

import argparse
import contextlib
import errno
import hashlib
import itertools
import json
import math
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import time
import timeit
import traceback
import unicodedata
import warnings
import zlib
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

import data
from data import (
    DataError,
    Dialogue,
    Pairs,
    Tokenizer,
    batches,
    pad,
    printable,
    random_spans,
    span_corrupt,
)
from identifiers import (
    MECHANISMS,
    ClassifierConfig,
    EmpathyReward,
    RewardConfig,
    balanced,
    ceiling,
    classifier_figures,
    compare_levels,
    confusions,
    f1_scores,
    targets_from_contexts,
    make_classifier,
    paired_bootstrap,
    predict,
    predict_levels,
    text_figures,
    words,
)
from ppo import PPOConfig, PPOTrainer, Prompts, respond, respond_and_compare
from t5_small import (
    EOS_ID,
    T5,
    CheckpointError,
    Sampling,
    T5Config,
    TrainConfig,
    Trainer,
    from_pretrained,
    load_state,
    official_file,
    option,
    save_atomically,
    save_pretrained,
    weights_file,
)

# ---- settings -------------------------------------------------------------------------------


@dataclass
class DataConfig:
    num_train: int = option(12000, "generated world: dialogues", 1, 10**7)
    num_valid: int = option(300, "generated world: dialogues to validate on", 1, 10**7)
    num_test: int = option(600, "generated world: dialogues to test on", 1, 10**7)
    num_labelled: int = option(
        8000,
        "generated world: labelled pairs for the identifiers, as many for the judge",
        1,
        10**7,
    )
    vocab_size: int = option(1200, "pieces and 100 sentinels of a new tokenizer", 110, 10**6)
    max_source: int = option(72, "tokens of a context; the newest are kept", 1, 10**5)
    max_target: int = option(64, "tokens of a response, </s> included", 1, 10**5)
    identifier_source: int = option(72, "the same for labelled posts", 1, 10**5)
    identifier_target: int = option(64, "the same for labelled responses", 1, 10**5)
    max_scored: int = 512  # as max_target, where human responses are measured, not learnt from


@dataclass
class PretrainConfig:
    steps: int = option(0, "optimizer steps before MLE, with MLE's other settings")
    task: str = option(
        "spans", "T5's span corruption, or the next turn", choices=("spans", "turns")
    )


@dataclass
class MLEConfig(TrainConfig):
    steps: int = option(1000, "optimizer steps")
    batch_size: int = option(16, "pairs per step", 1, 10**6)
    lr: float = option(4e-2, "peak learning rate, relative to each tensor's RMS if rms_scaled")
    eval_every: int = option(250, "steps between validations; the best weights stay", 1)
    muon: bool = option(False, "Muon for the layers' matrices; see t5_small.Optimizer")
    epochs: int = option(0, "passes over the pairs; above 0 they set the steps", high=1000)


@dataclass
class ContextConfig:
    """The context classifier is trained as the identifiers are, but for these."""

    steps: int = option(400, "optimizer steps of the network")
    lr: float = option(5e-2, "peak learning rate")
    penalty: float = option(2e-4, "n-grams: weight of the squared norm", 0, 1e6)


@dataclass
class EvalConfig:
    contexts: int = option(0, "test contexts to reply to; 0: all")
    batch_size: int = option(128, "replies sampled at once", 1, 10**6)
    best_of: int = option(4, "n of best of n, the rival that trains nothing", 1, 10**4)


@dataclass
class Config:
    """All settings of a run."""

    preset: str = "toy"
    seed: int = 0
    # "": the generated world; a folder: the real corpora; a file: your own
    data_path: str = ""
    t5_dir: str = ""  # the folder of an official T5; "": a new one
    data: DataConfig = field(default_factory=DataConfig)
    t5: T5Config = field(default_factory=T5Config)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    mle: MLEConfig = field(default_factory=MLEConfig)
    identifiers: ClassifierConfig = field(default_factory=ClassifierConfig)
    context: ContextConfig = field(default_factory=ContextConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    exploring: Sampling = field(default_factory=Sampling)  # what PPO samples and scores with
    replying: Sampling = field(default_factory=Sampling)  # what replies are given with
    ppo: PPOConfig = field(default_factory=PPOConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


def toy():
    """The generated world, 0.7 M parameters: minutes on a laptop."""
    return Config(
        preset="toy",
        # 2 decoder layers: copying the topic of a context into the reply takes two steps
        t5=T5Config(d_ff=256, num_layers=1, num_decoder_layers=2, dropout_rate=0.0),
    )


def smoke():
    """A sliver of toy, for tests: seconds, and no result."""
    return Config(
        preset="smoke",
        data=DataConfig(
            num_train=200, num_valid=40, num_test=40, num_labelled=200, vocab_size=500
        ),
        t5=T5Config(
            d_model=32,
            d_kv=16,
            d_ff=64,
            num_layers=1,
            num_decoder_layers=1,
            num_heads=2,
            dropout_rate=0.0,
        ),
        pretrain=PretrainConfig(steps=4),
        mle=MLEConfig(steps=12, eval_every=6),
        identifiers=ClassifierConfig(steps=8, eval_every=4, batch_size=16),
        context=ContextConfig(steps=4),
        exploring=Sampling(max_length=12),
        replying=Sampling(max_length=12),
        ppo=PPOConfig(steps=4, batch_size=8, minibatch_size=4, eval_every=2, valid_contexts=8),
    )


def real():
    """EmpatheticDialogues and EPITOME, from scratch: 2 M parameters, 25 minutes on a CPU."""
    return Config(
        preset="real",
        data=DataConfig(
            vocab_size=5000,
            max_source=96,
            max_target=40,
            identifier_source=96,
            identifier_target=256,
        ),
        t5=T5Config(d_model=160, d_kv=32, d_ff=640, num_heads=5),
        # both speakers' turns and EPITOME's posts: more English than the responses alone
        pretrain=PretrainConfig(steps=800, task="turns"),
        mle=MLEConfig(steps=1800, batch_size=96, lr=3e-2, eval_every=300, muon=True),
        # about 1,100 labelled pairs: n-grams do better than a network
        identifiers=ClassifierConfig(kind="ngrams", class_weight=1.0),
        context=ContextConfig(penalty=3e-6),
        # most levels are 0 here: without balance the safest aim is always "none"
        reward=RewardConfig(balance=0.6),
        # chosen by reading: at temperature 1 few replies of so small a model are sentences
        exploring=Sampling(temperature=0.7, top_k=40, min_length=8, max_length=40),
        replying=Sampling(temperature=0.7, top_k=40, min_length=8, max_length=40),
        # One step is noisy: small steps (lr), and a running mean of the weights (average). The
        # likelihood of the human responses in the loss (ptx_coef) keeps the language.
        ppo=PPOConfig(
            steps=60, batch_size=256, lr=2e-3, kl_coef=0.1, ptx_coef=0.5, average=0.99
        ),
        # one sampled reply is noisy: a gain in rare levels needs thousands to be seen
        eval=EvalConfig(contexts=4096, best_of=8),
    )


def paper():
    """The authors' settings, for an official T5 and a GPU. README lists what differs."""
    return Config(
        preset="paper",
        data=DataConfig(
            max_source=200, max_target=50, identifier_source=250, identifier_target=250
        ),
        # plain AdamW with linear decay and no warm-up, everywhere
        mle=MLEConfig(
            epochs=3, batch_size=8, lr=1e-4, rms_scaled=False, warmup=0, eval_every=2000
        ),
        # three separate networks that start from the T5 as it came; 8 rows at a time fit 12 GB
        identifiers=ClassifierConfig(
            steps=600,
            batch_size=32,
            micro_batch=8,
            lr=2e-5,
            rms_scaled=False,
            warmup=0,
            shared=False,
            start="t5",
        ),
        context=ContextConfig(steps=2000, lr=2e-5),
        reward=RewardConfig(target="human"),
        exploring=Sampling(temperature=0.9, top_k=20, min_length=5, max_length=30),
        replying=Sampling(temperature=0.9, top_k=20, max_length=30),
        ppo=PPOConfig(
            steps=1000,
            batch_size=32,
            minibatch_size=32,  # 4 times 8 accumulated
            micro_batch=8,
            ppo_epochs=4,
            lr=1e-5,
            rms_scaled=False,
            warmup=0,
            lam=0.95,
            whiten_rewards=True,
            centre_rewards=True,
            kl_coef=0.2,
            adaptive_kl=True,
            kl_horizon=10_000,
        ),
        eval=EvalConfig(batch_size=32),
    )


PRESETS = {"toy": toy, "smoke": smoke, "real": real, "paper": paper}


# ---- the recipe -----------------------------------------------------------------------------


def run_all(run, ppo_trainer=PPOTrainer):
    """EmpRL, from a corpus to a report. A stage that the run folder has is loaded, not redone.

    ppo_trainer: what aligns the policy: PPOTrainer, or another one with the same interface.
    Returns the figures of metrics.json.
    """
    config = run.config

    # 0. Dialogues to learn replies from, labelled pairs to learn levels from, one tokenizer, a
    #    new T5. Responses are cut where they are learnt from, whole where they are measured.
    corpus = load_corpus(config)
    run.tokenizer = make_tokenizer(config, corpus)
    t5 = initial_t5(run)
    run.begin(corpus, t5)
    pairs = encode(run, corpus.dialogues, config.data.max_source, config.data.max_target)
    whole = encode(run, corpus.dialogues, config.data.max_source, config.data.max_scored)
    labelled = encode(
        run, corpus.labelled, config.data.identifier_source, config.data.identifier_target
    )

    # 1. The initial policy: the T5 learns to reply as people did (maximum likelihood, MLE).
    #    Both stages train t5 in place; from then on it is called mle.
    #    `made_of`: settings that shape the result, besides the trainer's own. A checkpoint
    #    that was made with other settings is refused.
    trainer = pretrainer(t5, pairs["pretrain"], run.tokenizer, config)
    run.train("pretrain", trainer, made_of=[config.data, config.t5, config.pretrain])
    mle = run.train("mle", mle_trainer(t5, pairs["train"], pairs["valid"], config))

    # 2. The identifiers, which give the reward: classifiers of the levels of all mechanisms.
    classifiers = {}
    classifiers["identifiers"] = train_classifier(
        run, "identifiers", mle, labelled["train"], labelled["valid"]
    )

    # 3. The levels that a reply to each context should have. The classifier that tells them is
    #    gone before the judge comes: so no more than one waits while another is trained.
    targets = find_targets(run, mle, classifiers["identifiers"], whole)

    # 4. The judge, trained on other data, never gives the reward: a gain that it sees as well is
    #    less likely to be an artefact of the reward.
    classifiers["judge"] = train_classifier(
        run, "judge", mle, labelled["judge_train"], labelled["judge_valid"]
    )

    # 5. PPO trains a copy of the initial policy. The reward, 0 to 1, is how likely a response
    #    has all three levels that it should have.
    reward = EmpathyReward(classifiers["identifiers"].to(run.device), config.reward)
    prompts = PromptBatches(pairs["train"], targets.train, config.ppo.batch_size, config.seed)
    validate = Evaluator(run, whole["probe"], classifiers, mle).validate
    trainer = ppo_trainer(mle, reward, prompts, config.exploring, config.ppo, validate)
    say("reward      0 to 1: how likely a reply has all levels that the reward asks for")
    # `replying` is what the log's validations are sampled with.
    run.train("ppo", trainer, made_of=[config.reward, config.exploring, config.replying])
    save_pretrained(mle, run.folder / "mle")
    save_pretrained(trainer.model, run.folder / "emprl")

    # 6. Before and after: replies to the same test contexts, seen by the same classifiers.
    run.progress.announce("evaluate")
    test = Evaluator(run, whole["test"], classifiers, mle)
    metrics = {who: classifier_figures(c, labelled["test"]) for who, c in classifiers.items()}
    metrics |= test.before_and_after(trainer.model)
    metrics["best_of_n"] = test.best_of_n(reward, targets.test)
    metrics["floors"] = test.floors(whole["train"], targets.human)
    metrics["ceiling"] = test.ceilings(corpus.level_probs, targets)
    run.finish(metrics, responses_jsonl(test))
    report(metrics, test)
    return metrics


def load_corpus(config):
    """The corpus that config.data_path says: a generated world, the real corpora, or your own.

    Two parts are added to its dialogues: "pretrain", which pre-training reads, if the corpus
    has none of its own; and "probe", a few of "valid" for the validation inside PPO. "test" is
    cut to eval.contexts.
    """
    sizes = config.data
    if not config.data_path:
        corpus = data.generated_corpus(
            config.seed, sizes.num_train, sizes.num_valid, sizes.num_test, sizes.num_labelled
        )
    elif os.path.isdir(config.data_path):
        corpus = data.real_corpus(config.data_path)
    else:
        corpus = data.own_corpus(config.data_path)
    dialogues = corpus.dialogues
    dialogues.setdefault("pretrain", dialogues["train"])
    if config.eval.contexts:
        dialogues["test"] = dialogues["test"][: config.eval.contexts]
    dialogues["probe"] = dialogues["valid"][: config.ppo.valid_contexts]
    return corpus


def make_tokenizer(config, corpus):
    """That of the official folder, or a new one, trained on the training texts."""
    if config.t5_dir:
        return Tokenizer(official_file(config.t5_dir, "spiece.model"))
    labelled = corpus.labelled["train"] + corpus.labelled["judge_train"]
    texts = []
    for dialogue in corpus.dialogues["train"] + labelled:
        texts += [*dialogue.context[-2:], dialogue.response]
    # Unigram considers only pieces that occur before two different characters. In the generated
    # world half the words occur before one only, mostly a space: "your" would be "you" and "r".
    # In real corpora few words do, and T5's own kind of tokenizer stays.
    model_type = "bpe" if corpus.level_probs else "unigram"  # only that world has them
    return Tokenizer.train(texts, config.data.vocab_size, model_type)


def initial_t5(run):
    """The T5 before any training here: the official folder's, or one with random weights."""
    config = run.config
    if config.t5_dir:
        t5 = from_pretrained(config.t5_dir, run.tokenizer.vocab_size)
        config.t5 = t5.config  # so that config.json says what is used
    else:
        config.t5.vocab_size = run.tokenizer.vocab_size
        run.seed("t5")
        t5 = T5(config.t5)
    return t5.to(run.device).eval()


def encode(run, parts, max_source, max_target):
    """{part: dialogues} -> {part: Pairs}, cut to these numbers of tokens."""
    return {
        part: Pairs(dialogues, run.tokenizer, max_source, max_target, run.device)
        for part, dialogues in parts.items()
    }


MAX_CORRUPTED = 128  # tokens of a text in span corruption; the newest are kept


def pretrainer(t5, pairs, tokenizer, config):
    """Span corruption on context and response together, or the next turn as it is."""
    settings = replace(config.mle, steps=config.pretrain.steps)

    def corrupted_loss(rows):
        sources, targets = [], []
        for row in rows:
            text = (pairs.contexts[row] + pairs.responses[row])[-MAX_CORRUPTED:]
            spans = random_spans(len(text))
            source, target = span_corrupt(text, spans, tokenizer.sentinels)
            sources.append(source)
            targets.append(target)
        return t5.loss_sum(pad(sources).to(pairs.device), pad(targets).to(pairs.device))

    def turn_loss(rows):
        return t5.loss_sum(*pairs.batch(rows))

    loss_sum = corrupted_loss if config.pretrain.task == "spans" else turn_loss
    # rows_at(i): the rows of step i's batch, of about the same length
    rows_at = batches(pairs.lengths(), settings.batch_size, config.seed)
    return Trainer(t5, loss_sum, rows_at, None, settings)


def mle_trainer(t5, train, valid, config):
    """Maximum likelihood on pairs, validated by the loss per token."""
    settings = config.mle
    if settings.epochs:
        steps = settings.epochs * math.ceil(len(train) / settings.batch_size)
        settings = replace(settings, steps=steps)

    def loss_sum(rows):
        return t5.loss_sum(*train.batch(rows))

    def validate():
        loss, tokens = total_loss(t5, valid)
        return loss / tokens

    rows_at = batches(train.lengths(), settings.batch_size, config.seed)
    return Trainer(t5, loss_sum, rows_at, validate, settings)


@torch.no_grad()
def total_loss(t5, pairs, size=64, max_ids=2**15):
    """The negative log-likelihood of all responses in nats, and the number of their tokens."""
    total, tokens = 0.0, 0
    for rows in pairs.chunks(size, max_ids):
        loss, count = t5.loss_sum(*pairs.batch(rows))
        total += loss.item()
        tokens += count
    return total, tokens


def train_classifier(run, name, mle, train, valid):
    """A classifier of levels, trained on labelled pairs and frozen.

    It is returned on the CPU: three encoders of a large T5 are too much for a small GPU.
    """
    config = classifier_settings(run.config, name)
    # the T5 whose encoder a network copies
    start = initial_t5(run) if config.start == "t5" else mle
    run.seed(name)
    classifier = make_classifier(start, config)
    del start  # frees its memory before training
    # The parts: {stage: module}, the classifier itself or a network for each mechanism.
    for stage, part in classifier.parts(name).items():
        part.to(run.device)
        seed = zlib.crc32(stage.encode()) + run.config.seed
        rows_at = batches(train.lengths(), config.batch_size, seed)
        run.train(stage, part.trainer(train, valid, rows_at, config))
        part.to("cpu")
    return classifier.eval().requires_grad_(False)


def classifier_settings(config, name):
    """The identifiers', which the judge shares; the context classifier's differ a little."""
    if name != "context":
        return config.identifiers
    own = asdict(config.context)
    # Plain probabilities are wanted: no class weights, and the weights of the lowest loss.
    return replace(config.identifiers, class_weight=0.0, keep="loss", **own)


@dataclass
class Targets:
    """The levels that replies should have: levels (N, M), or probabilities of them (N, M, L).

    N contexts, M = 3 mechanisms, L = 3 levels.
    """

    human: torch.Tensor  # (N, M), by the identifiers, of the training pairs' human responses
    train: torch.Tensor  # (N, M) or (N, M, L): what PPO aims for, in the training contexts
    test: torch.Tensor  # (N, M, L): what best of n aims for, in the test contexts
    probs: torch.Tensor  # (N, M, L): P(level | context) of the test contexts, for the ceiling
    share: torch.Tensor  # (M, L): the mean of P(level | context) over the training contexts


def find_targets(run, mle, identifiers, pairs):
    """The levels to aim for, from the identifiers and a classifier that sees contexts only.

    The levels of the one human response, which the paper aims for, are noisy: other people
    would have replied otherwise. The context classifier learns how likely each level is.
    """
    # predict and predict_levels take a classifier to the pairs' device, and back.
    levels = {part: predict_levels(identifiers, pairs[part]) for part in ("train", "valid")}
    contexts = {}
    for part in ("train", "valid", "test"):
        contexts[part] = without_response(pairs[part], levels.get(part))
    context = train_classifier(run, "context", mle, contexts["train"], contexts["valid"])
    train_probs = predict(context, contexts["train"]).exp()  # predict gives log-probabilities
    test_probs = predict(context, contexts["test"]).exp()
    share = train_probs.mean(0)

    config = run.config.reward
    if config.target == "human":
        aims = levels["train"]
    else:
        aims = targets_from_contexts(config, train_probs, share)
    return Targets(
        human=levels["train"],
        train=aims,
        # never the human's: best of n must not see them
        test=targets_from_contexts(config, test_probs, share),
        probs=test_probs,
        share=share,
    )


def without_response(pairs, levels):
    """The same contexts with empty responses: a classifier can use the context only."""
    return pairs.with_responses([[EOS_ID]] * len(pairs), levels)


class PromptBatches:
    """Iteration -> Prompts: contexts with the levels to aim for and the human responses."""

    def __init__(self, pairs, targets, batch_size, seed):
        self.pairs = pairs
        self.targets = targets
        # `batches` groups rows of like length. Here every length is given as 0, so it mixes
        # long and short contexts.
        self.rows_at = batches([0] * len(pairs), batch_size, seed)

    def __call__(self, i):
        rows = self.rows_at(i)
        source, human = self.pairs.batch(rows)
        return Prompts(source, self.targets[rows].to(source.device), human)


# ---- the run folder -------------------------------------------------------------------------


class Run:
    """A folder with config.json, environment.json, metrics.jsonl and checkpoints/, and the
    loop that all training shares. What is there is checked against what it should be made of.
    """

    save_every = 30.0  # seconds between checkpoints

    def __init__(self, folder, config, device="cpu", command=()):
        self.folder = Path(folder)
        self.config = config
        self.device = device
        self.command = command  # the command line, for messages
        self.code = code_version()
        self.content = ""  # digest of what training starts from
        self.evaluation = ""  # digest of what else the figures depend on
        self.results = {}  # stage -> digest of its weights
        self.logs = {}  # stage -> a record for each step
        self.seconds = {}  # stage -> how long it took
        self.tokenizer = None
        self.noted = False
        self.clock = time.time()  # when the latest stage ended
        self.progress = Progress(config)
        (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)

    def begin(self, corpus, t5):
        """Digest the data, refuse figures of other data, say what there is to learn from."""
        learnt, measured = [], []
        for name, part in sorted(corpus.dialogues.items()) + sorted(corpus.labelled.items()):
            group = measured if name in ("test", "probe") else learnt
            group.append(part)
        self.content = digest([learnt, digest_weights(t5.state_dict())])
        settings = [self.config.replying, self.config.eval]
        self.evaluation = digest([measured, settings])
        made_of = self.read_json("metrics.json", {}).get("made_of")
        if isinstance(made_of, dict):
            self.check_key("metrics.json", made_of.get("evaluation"), self.evaluation)

        parameters = sum(p.numel() for p in t5.parameters()) / 1e6
        size = f"{self.tokenizer.vocab_size} tokens, {parameters:.2f} M parameters"
        for note in (*corpus.notes, size):
            say(f"data        {printable(note)}")
        self.seconds["data"] = round(time.time() - self.clock, 1)

    def check_key(self, name, found, wanted):
        """Raises DataError unless the key found is the one wanted, or None: no result yet."""
        if found not in (None, wanted):
            here = self.folder / name
            raise DataError(f"{here}: of other settings or other data; {self.elsewhere()}")

    def seed(self, stage, step=0):
        """Seed torch from (seed, stage, step): a resumed step draws what an uncut one does."""
        torch.manual_seed(zlib.crc32(f"{self.config.seed}/{stage}/{step}".encode()))

    def train(self, name, trainer, made_of=()):
        """All steps of a trainer, resumed where they were cut. Returns the trained model.

        trainer: has the interface of t5_small.Trainer, as ppo.PPOTrainer has.
        A stage is made of the data, of all earlier stages, of its trainer's settings and of
        those that `made_of` names. A checkpoint that is there must be made of the same, or it
        is refused.
        """
        file = f"checkpoints/{name}.pt"
        settings = [trainer.config, *made_of]
        key = digest([self.config.seed, self.content, self.results, settings])
        start = {"key": key, "seconds": 0.0, "log": []}
        state = load_stage(self.folder / file) or start
        self.check_key(file, state["key"], key)
        self.logs[name] = state["log"]
        if "weights" in state:
            trainer.model.load_state_dict(state["weights"])
        else:
            self.delete_results()
            self.note_start()
            self.loop(name, trainer, self.folder / file, state)
        self.seconds[name] = round(state["seconds"], 1)
        self.clock = time.time()
        model = trainer.model.eval()
        self.results[name] = digest_weights(model.state_dict())
        return model

    def loop(self, name, trainer, path, state):
        """Train to the end, saving the trainer now and then, at the end only the weights."""
        log, steps = state["log"], trainer.config.steps
        if log:
            trainer.load_state_dict(state.pop("trainer"))
        started = time.time() - state["seconds"]

        def save(**result):
            self.write_log()  # first: a log that is ahead of its checkpoint does no harm
            state["seconds"] = time.time() - started
            save_atomically({**state, **result}, path)

        saved = time.time()
        if len(log) < steps:
            self.progress.announce(name, len(log) / steps)
        with ctrl_c_waits() as pressed:
            for i in range(len(log), steps):
                self.seed(name, i)
                log.append({"stage": name, "step": i, **trainer.step(i)})
                self.progress.show(name, trainer, log, signs_of_trouble(name, trainer, log))
                # Save now and then, but not while training diverges.
                is_sound = not log[-1].get("skipped")
                due = is_sound and time.time() - saved > self.save_every
                if due or pressed.is_set():
                    save(trainer=trainer.state_dict())
                    saved = time.time()
                if pressed.is_set():
                    raise KeyboardInterrupt
        trainer.finish()
        weights = trainer.model.state_dict()
        broken = [tensor for tensor, x in weights.items() if not x.isfinite().all()]
        if broken:
            raise DataError(f"{name}: training diverged ({broken[0]}); {remedy(name)}")
        save(weights=weights)

    def elsewhere(self):
        """The same command with a folder that is not there yet."""
        number = 2
        while Path(f"{self.folder}-{number}").exists():
            number += 1
        words = list(self.command)
        if "--run" in words:
            at = words.index("--run")
            del words[at : at + 2]
        other = program(*words, "--run", f"{self.folder}-{number}")
        return f"take another folder: {other}"

    def delete_results(self):
        """Before a stage is trained: the figures and replies there are of other weights."""
        evaluations = f"evaluate-*-{'[0-9a-f]' * 12}.json*"
        results = "metrics.json report.md samples.md responses.jsonl plots/*.png".split()
        for pattern in (*results, evaluations):
            for path in self.folder.glob(pattern):
                if path.is_file():  # a folder is not ours
                    path.unlink()

    def note_start(self):
        """Before anything is trained or written: what this run is."""
        if self.noted:
            return
        self.noted = True
        self.write("tokenizer.model", self.tokenizer.model)
        self.write_json("config.json", asdict(self.config))
        found = self.read_json("environment.json", [])
        starts = [start for start in found if isinstance(start, dict)]
        if starts and starts[-1].get("code", self.code) != self.code:
            say("warning: other code than at the last start; finished stages are kept")
        self.write_json("environment.json", [*starts, environment(self)])

    def finish(self, metrics, responses):
        """responses.jsonl, and metrics.json: the figures, and what they are figures of."""
        self.note_start()
        self.write_log()
        self.write("responses.jsonl", responses)
        self.seconds["evaluate"] = round(time.time() - self.clock, 1)
        metrics["config"] = asdict(self.config)
        metrics["seconds"] = self.seconds
        metrics["made_of"] = {
            **self.results,
            "tokenizer": digest_bytes(self.tokenizer.model),
            "evaluation": self.evaluation,
            "responses": digest_bytes(responses.encode()),
            "config": digest(metrics["config"]),
        }
        metrics["code"] = self.code
        self.write_json("metrics.json", metrics)

    def write(self, name, content):
        """A file of the folder, atomically: nobody ever sees half of it."""
        content = content if isinstance(content, bytes) else content.encode()
        temporary = self.folder / f"{name}.tmp"
        temporary.write_bytes(content)
        os.replace(temporary, self.folder / name)

    def write_json(self, name, content):
        self.write(name, to_json(content, indent=2) + "\n")

    def read_json(self, name, default):
        """A JSON file of the folder; the default if there is none, or none of its kind."""
        if not (self.folder / name).is_file():  # to open a pipe may take for ever
            return default
        try:
            found = json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (OSError, RecursionError, ValueError):
            return default
        return found if isinstance(found, type(default)) else default

    def write_log(self):
        """metrics.jsonl: a line for each step of all stages so far."""
        records = itertools.chain(*self.logs.values())
        self.write("metrics.jsonl", "".join(to_json(record) + "\n" for record in records))


def signs_of_trouble(name, trainer, log):
    """What a trainer warns of. Raises DataError if the last ten steps have learnt nothing.

    record["skipped"]: the share of a step's gradients that were not finite, and were dropped
    (PPO has one for each minibatch); 1: the whole step is lost.
    """
    lost = 0  # steps at the end that were dropped as a whole
    for record in reversed(log):
        if record.get("skipped") != 1:
            break
        lost += 1
    if lost == min(10, trainer.config.steps):
        raise DataError(
            f"{name}, step {len(log)}: {lost} steps in a row had no finite loss and "
            f"gradient; {remedy(name)}. What was saved before is in the run's folder"
        )
    if lost:
        return []
    first = next(record for record in log if record.get("skipped") != 1)
    return trainer.warnings(log[-1], first)


class Progress:
    """Lines that say where a run is and, roughly, how long it still takes."""

    every = 5.0  # seconds between the lines of a stage

    def __init__(self, config):
        self.expected = stages_of(config)  # stage -> seconds it may take
        self.worked = 0.0  # the expected seconds of the steps done by this process
        self.began = time.time()
        self.shown = 0.0

    def announce(self, name, done=0.0, *figures):
        """Which stage it is, a share of which is done; how long the whole run still takes."""
        names = list(self.expected)
        number = names.index(name)
        later = sum(self.expected[other] for other in names[number + 1 :])
        rest = self.expected[name] * (1 - done) + later
        # Expected over actual time so far; the 20 seconds keep it near 1 at the start.
        speed = (self.worked + 20) / (time.time() - self.began + 20)
        place = f"stage {number + 1} of {len(names)}  {name:<15}"
        say(f"{place}about {minutes(rest / speed)} left", *figures, sep="  ")

    def show(self, name, trainer, log, warnings):
        """The latest step: now and then, at the end of a stage and with every warning."""
        steps, record = trainer.config.steps, log[-1]
        self.worked += self.expected[name] / steps
        if time.time() - self.shown < self.every and len(log) < steps and not warnings:
            return
        self.shown = time.time()
        keys = (*trainer.shown, "skipped", "stopped_early")
        figures = [f"{key} {record[key]:.4g}" for key in keys if record.get(key)]
        self.announce(name, len(log) / steps, f"step {len(log)} of {steps}", *figures)
        for warning in warnings:
            say(f"    warning: {warning}")


def minutes(seconds):
    """75 -> "1:15"."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


# (toy, real): seconds that a step takes on two cores of 160 GFLOP/s together. N-grams have one
# step, and `evaluate` counts as one. Progress rescales them by the speed so far.
SECONDS = {
    "pretrain": (0.04, 0.55),
    "mle": (0.033, 0.5),
    "identifiers": (0.07, 3),
    "context": (0.03, 25),
    "judge": (0.07, 3),
    "ppo": (1.2, 6),
    "evaluate": (16, 300),
}


def stages_of(config):
    """{stage: seconds it may take}, in the order of run_all."""
    column = 0 if config.preset in ("toy", "smoke") else 1
    is_network = config.identifiers.kind == "network"
    expected = {}
    for name, seconds in SECONDS.items():
        steps, parts = 1, [name]
        if name in ("pretrain", "mle", "ppo"):
            steps = getattr(config, name).steps
        elif name != "evaluate" and is_network:
            steps = classifier_settings(config, name).steps
            if not config.identifiers.shared:
                parts = [f"{name}-{m}" for m in MECHANISMS]
        if steps:
            expected |= dict.fromkeys(parts, steps * seconds[column])
    return expected


def load_stage(path):
    """A stage's checkpoint, {} if there is none. Raises CheckpointError."""
    if not path.exists():
        return {}
    state = load_state(path)
    is_ours = isinstance(state, dict) and {"key", "seconds", "log"} <= state.keys()
    if not is_ours or state.keys().isdisjoint(("weights", "trainer")):
        raise CheckpointError(f"{path}: not a checkpoint of this program; delete it")
    return state


def remedy(stage):
    """What to do if a stage diverges: "judge-er" -> "lower identifiers.lr, or ..."."""
    name = stage.partition("-")[0]
    section = {"judge": "identifiers", "pretrain": "mle"}.get(name, name)
    earlier = "" if section == "mle" else ", or the lr of a stage before it"
    return f"lower {section}.lr{earlier}"


@contextlib.contextmanager
def alone(folder):
    """Nobody else works in a folder meanwhile. Raises DataError if somebody does.

    The system takes the lock away when the process ends, however it ends.
    """
    with open(Path(folder) / ".lock", "a", encoding="utf-8") as file:
        try:
            lock(file)
        except (BlockingIOError, PermissionError):
            raise DataError(
                f"{folder}: another command is at work there; wait, or take another folder"
            ) from None
        except (ImportError, OSError):  # this system has no locks, or this disk
            pass
        yield


def lock(file):
    """Raises BlockingIOError or PermissionError if another process has it."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def digest_bytes(content):
    return hashlib.sha256(content).hexdigest()


def digest(content):
    """The SHA-256 of plain values and dataclasses, in dicts and lists."""
    return digest_bytes(json.dumps(content, sort_keys=True, default=vars).encode())


def digest_weights(state):
    """The SHA-256 of a state dict."""
    found = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        found.update(f"{name} {tuple(tensor.shape)}".encode())
        found.update(tensor.numpy().tobytes())
    return found.hexdigest()


def code_version():
    """The commit of this folder, the digest of what has changed since (None: nothing), and
    the digest of the modules, for a copy without .git."""
    folder = Path(__file__).resolve().parent
    environ = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}  # no parent's

    def git(*arguments):
        command = ["git", "-C", str(folder), *arguments]
        try:
            return subprocess.check_output(command, env=environ, stderr=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError):  # no git, or no repository
            return b""

    commit = git("rev-parse", "HEAD").decode().strip()
    changes = git("diff", "--binary", "HEAD")
    modules = {path.name: digest_bytes(path.read_bytes()) for path in folder.glob("*.py")}
    return {
        "commit": commit or None,
        "changed": digest_bytes(changes) if changes else None,
        "modules": digest(modules),
    }


def environment(run):
    """What a run was started with, and how fast the machine is."""
    threads = torch.get_num_threads()
    speeds = {str(n): round(gflops(n), 1) for n in sorted({1, threads})}
    packages = {name: version(name) for name in ("torch", "sentencepiece", "numpy")}
    variables = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    waiting = {name: os.environ[name] for name in variables if name in os.environ}
    return {
        "command": command_line(sys.argv),
        "code": run.code,
        "python": sys.version,
        "packages": packages,
        "device": run.device,
        "threads": threads,
        "waiting": waiting,
        "gflops": speeds,
    }


def gflops(threads, size=1024):
    """GFLOP/s of a float32 matrix product on some threads: the best of three."""
    before = torch.get_num_threads()
    matrix = torch.ones(size, size)
    torch.set_num_threads(threads)
    seconds = min(timeit.repeat(lambda: matrix @ matrix, number=1, repeat=3))
    torch.set_num_threads(before)
    return 2 * size**3 / seconds / 1e9


def to_json(content, indent=None):
    """JSON that every program reads: it has no infinity, so "inf", "-inf", "nan" are texts."""
    plain = json.loads(json.dumps(content), parse_constant=lambda word: str(float(word)))
    return json.dumps(plain, indent=indent, allow_nan=False)


def command_line(words):
    """The words as they are typed in a shell, with quotes where they are needed."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def program(*words):
    """The command that a reader can type to go on."""
    return command_line(["python", "emprl.py", *words])


def say(*texts, sep=" "):
    print(*texts, sep=sep, flush=True)


# ---- the evaluation -------------------------------------------------------------------------

PREFIX = {"identifiers": "", "judge": "judge_", "oracle": "oracle_"}  # of the keys of figures


@dataclass
class Replies:
    """A system's replies to all contexts, and their levels."""

    texts: list
    levels: dict  # classifier -> (N, M)


class Evaluator:
    """Measures replies to the contexts of `pairs`, whose human responses are whole.

    classifiers: {"identifiers", "judge"}; in the generated world the oracle is asked, too.
    mle: the policy before PPO, from which the KL is measured.
    """

    def __init__(self, run, pairs, classifiers, mle):
        self.run = run
        self.pairs = pairs
        self.classifiers = classifiers
        self.mle = mle
        # `evaluate` may measure a run of the generated world on other dialogues, which the
        # oracle does not know: it takes their levels away.
        has_oracle = not run.config.data_path and pairs.dialogues[0].levels is not None
        self.truth = "oracle" if has_oracle else "judge"  # whose levels are shown
        self.human = self.levels(pairs.responses)  # classifier -> (N, M)
        texts = [dialogue.response for dialogue in pairs.dialogues]
        self.replies = {"human": Replies(texts, self.human)}  # and of each system measured

    def levels(self, responses):
        """classifier -> (N, M) levels of a response (ids) to each context."""
        answered = self.pairs.with_responses(responses)
        levels = {who: predict_levels(c, answered) for who, c in self.classifiers.items()}
        if self.truth == "oracle":
            read = []
            for dialogue, ids in zip(self.pairs.dialogues, responses):
                text = self.run.tokenizer.decode(ids)
                read.append(data.oracle_levels(dialogue.context, text))
            levels["oracle"] = torch.tensor(read)
        return levels

    def compare(self, levels):
        """All figures that compare levels with those of the human responses."""
        figures = {}
        for who, table in levels.items():
            for name, number in compare_levels(table, self.human[who]).items():
                figures[PREFIX[who] + name] = number
        return figures

    def measure(self, system, responses):
        """The figures of a system's responses (ids); its Replies are kept for the report."""
        texts = [self.run.tokenizer.decode(ids) for ids in responses]
        levels = self.levels(responses)
        self.replies[system] = Replies(texts, levels)
        return {**self.compare(levels), **text_figures(texts, self.replies["human"].texts)}

    def policy(self, system, t5, sampling):
        """The figures of a policy's replies, its KL in nats per response, its perplexities."""
        self.run.seed(f"evaluate {system}")
        size = self.run.config.eval.batch_size
        responses, kl = respond_and_compare(t5, self.mle, self.pairs, sampling, size)
        figures = self.measure(system, responses)
        figures["kl"] = None if sampling.greedy else kl
        return {**figures, **self.perplexities(t5)}

    def perplexities(self, t5):
        """Of the human responses, per token and per word, their ends included.

        Responses of more than max_scored tokens are cut to it, for both figures.
        """
        config = self.run.config
        loss, tokens = total_loss(t5, self.pairs, config.eval.batch_size, max_ids=2**13)
        count = 0
        for text, ids in zip(self.replies["human"].texts, self.pairs.responses):
            if len(ids) >= config.data.max_scored:
                text = self.run.tokenizer.decode(ids)
            count += len(words(text)) + 1
        return {"perplexity": exp(loss / tokens), "perplexity_per_word": exp(loss / count)}

    def validate(self, t5):
        """A few figures for PPO's log; nothing is decided by them."""
        figures = self.policy("valid", t5, self.run.config.replying)
        shown = ["emp_f1", "kl", "perplexity", "unique", "exact_match"]
        shown.append(PREFIX[self.truth] + "exact_match")
        return {
            "valid_contexts": len(self.pairs),
            **{f"valid_{name}": figures[name] for name in shown},
        }

    def before_and_after(self, emprl):
        """MLE and EmpRL, sampled and greedy; the humans' texts; the gain with its interval."""
        sampled = self.run.config.replying
        greedy = replace(sampled, greedy=True)
        metrics = {}
        for system, t5, sampling in (
            ("mle", self.mle, sampled),
            ("mle_greedy", self.mle, greedy),
            ("emprl", emprl, sampled),
            ("emprl_greedy", emprl, greedy),
        ):
            say(f"evaluate    replies of {system}")
            metrics[system] = self.policy(system, t5, sampling)
        human = self.replies["human"].texts
        metrics["human"] = text_figures(human, human)
        metrics["gain"] = {}
        for who, gold in self.human.items():
            before = self.replies["mle"].levels[who]
            after = self.replies["emprl"].levels[who]
            metrics["gain"][PREFIX[who] + "emp_f1"] = paired_bootstrap(
                before, after, gold_before=gold, gold_after=gold
            )
        return metrics

    def best_of_n(self, reward, targets):
        """The rival that trains nothing: the best of n samples of MLE by expected reward."""
        config, sampling = self.run.config.eval, self.run.config.replying
        n = config.best_of
        self.run.seed("evaluate mle")  # so that the first of them are MLE's own replies
        tries = []
        for k in range(n):
            say(f"evaluate    replies of mle, {k + 1} of best of {n}")
            responses = respond(self.mle, self.pairs, sampling, config.batch_size)
            tries.append(self.pairs.with_responses(responses))
        figures = self.measure("best_of_n", reward.best_of(tries, targets).responses)
        figures["kl"] = math.log(n) - (n - 1) / n  # at most this (Beirami et al. 2024)
        return {**figures, **self.perplexities(self.mle)}

    def floors(self, train, levels):
        """What an answer is worth that knows nothing of the context.

        majority: always the commonest levels of train. random_copy: responses of train.
        """
        count = len(self.pairs)
        # The same levels for every classifier; self.human has all their names.
        majority = levels.mode(0).values.expand(count, -1)
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(len(train), (count,), generator=generator).tolist()
        copies = [train.responses[row] for row in rows]
        return {
            "majority": self.compare(dict.fromkeys(self.human, majority)),
            "random_copy": self.compare(self.levels(copies)),
        }

    def ceilings(self, level_probs, targets):
        """What a policy scores that gives the levels to be expected from the context.

        In the generated world P(level | context) is known (level_probs: id -> P); everywhere
        the context classifier estimates it. "context_balanced" divides P by the square root of
        the level's share, so that rare levels are chosen more often. These are estimates, not
        strict bounds of F1.
        """
        ceilings = {}
        if level_probs:
            known = torch.tensor([level_probs[d.id] for d in self.pairs.dialogues])
            for name, value in ceiling(known, self.human["oracle"]).items():
                ceilings[name] = {"oracle_emp_f1": value}
        for name, exponent in (("context", 0.0), ("context_balanced", 0.5)):
            levels = balanced(targets.probs, targets.share, exponent).argmax(-1)
            ceilings[name] = self.compare(dict.fromkeys(self.human, levels))
        return ceilings


def exp(nats):
    """e^nats; infinite above 700 nats, since a float ends at e^710."""
    return math.inf if nats > 700 else math.exp(nats)


# ---- the report -----------------------------------------------------------------------------

SYSTEMS = {"mle": "MLE", "best_of_n": "best of n", "emprl": "EmpRL"}
COLOURS = {"mle": "#0072B2", "best_of_n": "#009E73", "emprl": "#D55E00", "human": "#555555"}
MECHANISM_NAMES = {"er": "emotional reaction", "ip": "interpretation", "ex": "exploration"}
LEVEL_NAMES = ("none", "weak", "strong")


def report(metrics, test):
    """plots/, samples.md, report.md, and the last screen."""
    pictures = draw_plots(metrics, test)
    test.run.write("samples.md", samples_page(test))
    test.run.write("report.md", report_page(metrics, test, pictures))
    say("\n" + last_screen(metrics, test))


def responses_jsonl(test):
    """A line for each context: all replies to it, and their levels by each classifier."""
    lines = []
    for i, dialogue in enumerate(test.pairs.dialogues):
        texts, levels = {}, {who: {} for who in test.human}
        for system, replies in test.replies.items():
            texts[system] = replies.texts[i]
            for who, table in replies.levels.items():
                levels[who][system] = table[i].tolist()
        human = texts.pop("human")
        record = {"id": dialogue.id, "context": dialogue.context, "human": human}
        lines.append(json.dumps({**record, "replies": texts, "levels": levels}) + "\n")
    return "".join(lines)


def in_words(levels):
    """[2, 0, 1] -> "emotional reaction strong, interpretation none, exploration weak"."""
    parts = [
        f"{MECHANISM_NAMES[m]} {LEVEL_NAMES[level]}" for m, level in zip(MECHANISMS, levels)
    ]
    return ", ".join(parts)


def number(x):
    """Three decimals; nothing where nothing was measured."""
    if x is None:
        return ""
    return f"{x:.3f}" if abs(x) < 1e5 else f"{x:.2g}"


def percent(share):
    return ">+9999%" if share > 100 else f"{share:+.1%}"


def in_percent(gain):
    """+37.0% (95 % interval +31.6% to +43.1%)."""
    relative, low, high = (percent(gain[key]) for key in ("relative", "low", "high"))
    return f"{relative} (95 % interval {low} to {high})"


def last_screen(metrics, test):
    """What was trained, whether it worked, by how much, how sure; one context; what is next.

    At most 20 lines of 80 columns.
    """
    systems = {
        "human replies": {"judge_emp_f1": 1.0, "oracle_emp_f1": 1.0, **metrics["human"]},
        "always the commonest levels": metrics["floors"]["majority"],
        "MLE": metrics["mle"],
        f"best of {test.run.config.eval.best_of} replies of MLE": metrics["best_of_n"],
        "EmpRL": metrics["emprl"],
    }
    columns = {"judge_emp_f1": "judge", PREFIX[test.truth] + "emp_f1": test.truth}
    columns |= {"perplexity": "perplex.", "unique": "distinct"}
    lines = [
        "A T5 learned to reply as people did (MLE). PPO then rewarded it for replies with",
        f"the empathy levels of human replies (EmpRL). On {len(test.pairs)} test contexts:",
        f"{'do the levels match? (Emp-F1: 0 to 1)':<38}{in_columns(columns.values())}",
    ]
    for name, figures in systems.items():
        cells = in_columns(number(figures.get(key)) for key in columns)
        lines.append(f"{name:<38}{cells}".rstrip())
    gain = in_percent(metrics["gain"][PREFIX[test.truth] + "emp_f1"])
    lines.append(f"EmpRL over MLE: {gain}, by the {test.truth}.")
    judges = "Judge: a classifier that never gave the reward"
    if test.truth == "oracle":
        judges += "; oracle: this world's own rule"
    lines.append(f"{judges}.")
    lines += example_lines(test)

    command = program("chat", "--run", str(test.run.folder))
    if len(command) > 76 or command != printable(command):
        command = program("chat", "--run", "RUN") + "   (RUN: the folder in the first line)"
    lines.append(
        "Read report.md in the run's folder, open train.ipynb, or talk to both models:"
    )
    lines.append(f"    {command}")
    return "\n".join(lines)


def in_columns(cells):
    return "".join(f"{cell:>10}" for cell in cells)


def example_lines(test):
    """A context where EmpRL meets more levels than MLE, if any.

    Of these the one whose longest reply best fills a line.
    """
    change = changes(test)
    closer, further = change.count(1) / len(change), change.count(-1) / len(change)
    share = f"In {closer:.0%} of contexts EmpRL is closer than MLE, in {further:.0%}"
    texts = zip(*[test.replies[system].texts for system in ("human", "mle", "emprl")])
    longest = [max(map(len, replies)) for replies in texts]
    i = min(
        range(len(change)),
        key=lambda i: (-change[i], longest[i] > WIDTH, abs(longest[i] - WIDTH)),
    )
    lines = [
        f"{share} less close." + (f" One of the {closer:.0%}:" if closer else ""),
        f"context  {shorten(' / '.join(test.pairs.dialogues[i].context))}",
    ]
    replies = replies_to(test, i)
    for name in ("human", "MLE", "EmpRL"):
        text, levels = replies[name]
        lines += [f"{name:<9}[{levels}]", f"{'':<9}{shorten(text)}"]
    return lines


def replies_to(test, i):
    """Who -> (text, levels in words): the human's and the systems' replies to a context."""
    found = {}
    for system, name in {"human": "human", **SYSTEMS}.items():
        replies = test.replies[system]
        found[name] = (replies.texts[i], in_words(replies.levels[test.truth][i]))
    return found


WIDTH = 71  # characters of a text on a line of the last screen


def shorten(text):
    """One line of a terminal: the end is kept, since the newest turn is there."""
    text = printable(text)
    return text if len(text) <= WIDTH else "..." + text[-WIDTH + 3 :]


def changes(test):
    """For each context: 1 where EmpRL meets more of the human's levels than MLE, 0, or -1."""
    human = test.human[test.truth]
    hits = {}
    for system in ("mle", "emprl"):
        hits[system] = (test.replies[system].levels[test.truth] == human).sum(1)
    return (hits["emprl"] - hits["mle"]).sign().tolist()


def answer(metrics, truth):
    """Did it work? Three sentences from the figures, whatever they say.

    truth: "oracle", or "judge" where there is none.
    """
    before, after = metrics["mle"], metrics["emprl"]
    identifiers, judge = metrics["gain"]["emp_f1"], metrics["gain"]["judge_emp_f1"]
    key = PREFIX[truth] + "emp_f1"
    gain = metrics["gain"][key]
    if gain["low"] > 0:
        how = "better than MLE's"
    elif gain["high"] < 0:
        how = "worse than MLE's"
    else:
        how = "no better than MLE's, as far as can be told"
    if identifiers["low"] <= 0:
        verdict = "the reward itself has not surely risen"
    elif judge["low"] <= 0:
        verdict = "no sure gain, so the reward may have been gamed"
    else:
        verdict = "no sign that the reward was gamed"
    price = (
        f"the perplexity of the human replies goes from {number(before['perplexity'])} to "
        f"{number(after['perplexity'])}"
    )
    first = (
        f"EmpRL's replies match the human's levels {how}: Emp-F1 {number(after[key])} against "
        f"{number(before[key])} by the {truth}, {in_percent(gain)}; {price}."
    )
    third = (
        "The identifiers, which gave the reward, see "
        f"{percent(identifiers['relative'])}; the judge, which never did, sees "
        f"{percent(judge['relative'])}: {verdict}."
    )
    return f"{first} {beside_rivals(metrics, key)} {third}"


def beside_rivals(metrics, key):
    """Is EmpRL above what needs no PPO? One sentence. key: of the Emp-F1 to compare."""
    after, commonest = metrics["emprl"], metrics["floors"]["majority"]
    rivals = {
        "always the commonest levels": commonest,
        "the best of several replies of MLE": metrics["best_of_n"],
        "MLE decoded greedily": metrics["mle_greedy"],
    }
    places = []
    for name, rival in rivals.items():
        place = "above" if after[key] > rival[key] else "not above"
        places.append(f"{place} {name} ({number(rival[key])})")
    sentence = f"That is {', '.join(places)}"
    below = []
    for m, name in MECHANISM_NAMES.items():
        if after[f"{key}_{m}"] < commonest[f"{key}_{m}"]:
            below.append(name)
    if below:
        sentence += f"; in {' and '.join(below)} it is below the commonest level"
    return f"{sentence}."


# What the page's words mean.
TERMS = """
* **MLE**: a T5 that learned to reply as people did. **EmpRL**: the same T5 after PPO.
  **Best of n**: of {n} replies of MLE, the one that the identifiers find likeliest to have the
  levels that suit the context.
* **Levels**: each reply shows none, weak or strong *emotional reaction* (ER), *interpretation*
  (IP) and *exploration* (EX). **Emp-F1**: how well the replies' levels match those of the human
  replies; 1 is perfect.
* **Identifiers**: classifiers of levels; they gave the reward. **Judge**: classifiers that never
  did, trained on other data. **Oracle** (generated world only): the exact rule.
* **Intervals** are 95 %, over the {contexts} test contexts of this one run. Another seed may
  differ by more, and a classifier's own mistakes are not in them.
* In brackets: the key in metrics.json. Replies to read are in [samples.md](samples.md).
""".strip()

COLUMNS = ("mle", "best_of_n", "emprl", "mle_greedy", "emprl_greedy")
LEVEL_ROWS = {
    "emp_f1": "Emp-F1, weighted: the paper's measure",
    "emp_macro_f1": "Emp-F1, macro: every level counts the same, however rare",
    "mutual_information": "bits that a reply's level carries about the human's; 0 for a constant",
    "exact_match": "share of replies with all three levels right",
}
TEXT_ROWS = {
    "perplexity": "perplexity per token of whole human responses",
    "perplexity_per_word": "the same per word",
    "kl": "nats per reply between the policy and MLE, estimated (best of n: at most)",
    "bleu": "BLEU-4 with the human response, 0 to 100",
    "dist1": "different words, % of all",
    "dist2": "different pairs of words, % of all",
    "unique": "different replies, as a share of all",
    "length": "words per reply",
}
BOUND_ROWS = {
    "floors.majority": "always the commonest level of each mechanism, as the identifiers see it",
    "floors.random_copy": "a response of the training part, drawn at random",
    "ceiling.best": "always the likeliest levels, by the rule of the generated world",
    "ceiling.mle_ideal": "levels drawn by that rule, as a perfect MLE model does",
    "ceiling.context": "the likeliest levels by the context classifier",
    "ceiling.context_balanced": "the same, rare levels raised; called foreseeable above",
}


def report_page(metrics, test, pictures):
    """A page to be read: the question, the answer, the pictures, the tables by topic."""
    config = test.run.config
    parts = [
        f"# EmpRL, preset {config.preset}, seed {config.seed}",
        "**Does PPO bring the empathy levels of the replies closer to those of human replies?**",
        answer(metrics, test.truth),
        "**What the words mean.**",
        TERMS.format(n=config.eval.best_of, contexts=len(test.pairs)),
    ]
    for name, caption in pictures.items():
        parts += [f"![{caption}](plots/{name}.png)", f"*{caption}*"]
    parts += ["## Levels", level_table(metrics, test)]
    parts += ["## By mechanism", mechanism_table(metrics, test)]
    parts += ["## Floors and ceilings", bounds_table(metrics, test)]
    texts = {system: metrics[system] for system in (*COLUMNS, "human")}
    parts += ["## Text", table("text", texts, TEXT_ROWS)]
    parts += ["## The classifiers", classifier_table(metrics)]
    seconds = [f"{stage} {spent:.0f}" for stage, spent in test.run.seconds.items()]
    parts.append(f"Seconds: {', '.join(seconds)}.")
    return "\n\n".join(parts) + "\n"


def table(title, columns, rows):
    """Markdown. columns: {head: its figures by key}. rows: {key: what it means}."""
    lines = [[title, *columns], ["---"] + ["---:"] * len(columns)]
    for key, meaning in rows.items():
        cells = [number(figures.get(key)) for figures in columns.values()]
        lines.append([f"{meaning} [{key}]", *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def level_table(metrics, test):
    """Systems across; a row for each figure of levels and each classifier."""
    rows = {}
    for who in test.human:
        for key, meaning in LEVEL_ROWS.items():
            rows[PREFIX[who] + key] = f"{who}: {meaning}"
    systems = {system: metrics[system] for system in COLUMNS if system in metrics}
    return table("levels, according to", systems, rows)


def mechanism_table(metrics, test):
    floor, ceiling = bounds(metrics).items()  # (name, figures) each
    systems = [(name, metrics[system]) for system, name in SYSTEMS.items()]
    rows = {f"{PREFIX[test.truth]}emp_f1_{m}": name for m, name in MECHANISM_NAMES.items()}
    return table(f"F1, by the {test.truth}", dict([floor, *systems, ceiling]), rows)


def bounds(metrics):
    """The floor and the ceiling that tables and pictures show."""
    return {
        "commonest level": metrics["floors"]["majority"],
        "foreseeable": metrics["ceiling"]["context_balanced"],
    }


def bounds_table(metrics, test):
    columns, rows = {who: {} for who in test.human}, {}
    for row, meaning in BOUND_ROWS.items():
        kind, name = row.split(".")
        if name in metrics[kind]:  # not all are known of every corpus
            rows[row] = meaning
            for who, column in columns.items():
                column[row] = metrics[kind][name].get(PREFIX[who] + "emp_f1")
    return table("Emp-F1, according to", columns, rows)


def classifier_table(metrics):
    """Accuracy and F1 on labelled pairs that no classifier has seen."""
    columns = {}
    for who in ("identifiers", "judge"):
        for kind in ("accuracy", "macro_f1", "weighted_f1"):
            columns[f"{who} {kind}"] = {m: metrics[who][m][kind] for m in MECHANISMS}
    return table("on labelled pairs", columns, MECHANISM_NAMES)


def samples_page(test, count=12):
    """Contexts where EmpRL did better, as well or worse than MLE, in their true proportion."""
    change = changes(test)
    order = sorted(range(len(change)), key=lambda i: -change[i])
    count = min(count, len(order))
    # the middle of each of `count` equal slices
    evenly = [order[(2 * k + 1) * len(order) // (2 * count)] for k in range(count)]
    lines = [
        "# Samples",
        f"{count} of {len(order)} test contexts: where EmpRL meets more of the human's levels "
        "than MLE, as many, or fewer, in their true proportion; within each, evenly spaced. "
        f"Levels are by the {test.truth}: emotional reaction (ER), interpretation (IP), "
        "exploration (EX).",
    ]
    for sign, heading in ((1, "closer than MLE"), (0, "as close"), (-1, "less close")):
        share = change.count(sign) / len(change)
        lines.append(f"## EmpRL is {heading}: {share:.0%}")
        lines += [sample(test, i) for i in evenly if change[i] == sign]
    return "\n\n".join(lines) + "\n"


def sample(test, i):
    """A context, and what the human and each system replied."""
    dialogue = test.pairs.dialogues[i]
    lines = [f"**{dialogue.emotion or 'context'}** {' / '.join(dialogue.context)}", ""]
    for name, (text, levels) in replies_to(test, i).items():
        lines.append(f"* {name}: {text} [{levels}]")
    return "\n".join(lines)


def draw_plots(metrics, test):
    """plots/NAME.png -> {NAME: its caption}. A picture that fails costs no report."""
    try:
        Path.home()
    except RuntimeError:  # as in some containers: no place for matplotlib's list of fonts
        os.environ.setdefault("MPLCONFIGDIR", tempfile.gettempdir())
    try:
        from matplotlib.figure import Figure  # no window, no pyplot
    except (ImportError, ValueError) as error:  # ValueError: MPLBACKEND is no backend's name
        say(f"no pictures: {error}")
        return {}
    folder = test.run.folder / "plots"
    captions = {}
    for draw, caption in PICTURES.items():
        name = draw.__name__.removeprefix("draw_")
        figure = Figure(layout="constrained", dpi=100)
        try:
            draw(figure, metrics, test)
            if figure.axes:  # else there is nothing to draw: its stages were skipped
                folder.mkdir(exist_ok=True)
                figure.savefig(folder / f"{name}.png")
                captions[name] = caption.format(truth=test.truth)
        except Exception as error:
            traceback.print_exc()
            say(f"no picture {name}: {type(error).__name__}: {error}")
    return captions


def curve(axis, log, key, **style):
    """A key of a stage's records, where it is logged; steps count from 1."""
    points = [(r["step"] + 1, r[key]) for r in log if key in r and math.isfinite(r[key])]
    if points:
        axis.plot(*zip(*points), **style)


def interval(levels, human, resamples=300):
    """The 95 % bootstrap interval of each mechanism's F1: (N, M), (N, M) -> (2, M)."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(len(human), (resamples, len(human)), generator=generator)
    tables = [confusions(levels[rows], human[rows]) for rows in draws]
    f1 = f1_scores(torch.stack(tables))["weighted_f1"]  # (resamples, M)
    return np.quantile(f1, [0.025, 0.975], axis=0)


def draw_emp_f1(figure, metrics, test):
    """Bars by mechanism with intervals, floor and ceiling of each mechanism."""
    figure.set_size_inches(7.8, 3.8)
    axis = figure.subplots()
    keys = [f"{PREFIX[test.truth]}emp_f1_{m}" for m in MECHANISMS]
    places = np.arange(len(keys))
    for k, (system, name) in enumerate(SYSTEMS.items()):
        heights = np.array([metrics[system][key] for key in keys])
        ends = interval(test.replies[system].levels[test.truth], test.human[test.truth])
        style = {"color": COLOURS[system], "label": name}
        axis.bar(places + 0.26 * k, heights, 0.24, yerr=abs(ends - heights), **style)
    for (name, figures), style in zip(bounds(metrics).items(), (":", "--")):
        heights = [figures[key] for key in keys]
        axis.hlines(heights, places - 0.15, places + 0.67, "black", style, label=name)
    axis.set_xticks(places + 0.26, MECHANISM_NAMES.values())
    axis.set(ylim=(0, 1.1), ylabel=f"weighted F1, by the {test.truth}")
    axis.legend(ncols=5, loc="upper center", fontsize=8)


def draw_levels(figure, metrics, test):
    """Which level a reply has where the human's has which; MLE above, EmpRL below."""
    figure.set_size_inches(7.8, 5.4)
    axes = figure.subplots(2, 3, sharex=True, sharey=True)
    for row, system in zip(axes, ("mle", "emprl")):
        counts = confusions(test.replies[system].levels[test.truth], test.human[test.truth])
        for axis, m, table in zip(row, MECHANISMS, counts):
            share = table / table.sum(1, keepdim=True).clamp(min=1)
            axis.imshow(share, vmin=0, vmax=1, cmap="Blues")
            for (gold, predicted), part in np.ndenumerate(share.numpy()):
                text = f"{part:.0%}\n{table[gold, predicted]}"
                colour = "white" if part > 0.5 else "black"
                axis.text(predicted, gold, text, ha="center", va="center", color=colour)
            axis.set_title(f"{SYSTEMS[system]}: {MECHANISM_NAMES[m]}", fontsize=10)
            axis.set_xticks(range(3), LEVEL_NAMES)
            axis.set_yticks(range(3), LEVEL_NAMES)
    figure.supxlabel("level of the generated reply")
    figure.supylabel("level of the human reply")


PPO_PANELS = {  # key -> title, unit, healthy range
    "reward": ("reward", "0 to 1", None),
    "kl": ("KL to MLE", "nats per response", (0, 15)),
    "entropy": ("entropy", "nats per token", None),
    "length": ("length", "tokens", None),
    "value_loss": ("value loss", "", None),
    "explained_variance": ("explained variance", "of the returns", (0, 1)),
    "clip_share": ("clipped", "share of tokens", (0, 0.3)),
    "update_kl": ("KL of the update", "nats per token", (0, 0.1)),
}


def draw_ppo(figure, metrics, test):
    """What one looks at when PPO fails. A grey band is a healthy range."""
    log = test.run.logs["ppo"]
    if not log:
        return
    figure.set_size_inches(7.8, 4.6)
    axes = figure.subplots(2, 4, sharex=True)
    for axis, (key, (title, unit, healthy)) in zip(axes.flat, PPO_PANELS.items()):
        curve(axis, log, key, color=COLOURS["emprl"])
        if healthy:
            limits = axis.get_ylim()
            axis.axhspan(*healthy, color="0.92", zorder=0)
            axis.set_ylim(limits)
        axis.set_title(title, fontsize=10)
        axis.set_ylabel(unit, fontsize=8)
        axis.tick_params(labelsize=8)
    if test.run.config.ppo.adaptive_kl:
        curve(axes.flat[1].twinx(), log, "kl_coef", color="black", ls=":")
    figure.supxlabel("PPO iteration", fontsize=10)


def draw_learnt_vs_truth(figure, metrics, test):
    """The identifiers' opinion of the policy beside the truth; the first record has MLE's."""
    log = test.run.logs["ppo"]
    key = PREFIX[test.truth] + "exact_match"
    validated = [record for record in log if f"valid_{key}" in record]
    if not validated or "start" not in log[0]:  # the first iteration was not finite
        return
    iterations = [0, *(record["step"] + 1 for record in validated)]
    figure.set_size_inches(7.8, 3.6)
    axis = figure.subplots()
    for name, label, colour in (
        ("exact_match", "identifiers (they give the reward)", "#CC79A7"),
        (key, f"{test.truth} (never gives it)", "#555555"),
    ):
        share = [record[f"valid_{name}"] for record in (log[0]["start"], *validated)]
        share = np.array(share)
        error = 1.96 * np.sqrt(share * (1 - share) / log[0]["start"]["valid_contexts"])
        axis.plot(iterations, share, "o-", ms=4, color=colour, label=label)
        axis.fill_between(iterations, share - error, share + error, color=colour, alpha=0.15)
    for (name, figures), style in zip(bounds(metrics).items(), (":", "--")):
        axis.axhline(figures[key], color="black", ls=style, label=name)
    axis.set(xlabel="PPO iteration", ylabel="all three levels right (share)")
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8)


def draw_losses(figure, metrics, test):
    """MLE, identifiers and judge. Above the training loss, below what chooses the weights."""
    logs = test.run.logs
    names = ("mle", "identifiers", "judge")
    stages = [stage for stage in logs if stage.startswith(names)]
    # Not n-grams, which have one step. At most four: if each mechanism has a network of its
    # own, MLE and the identifiers' three, not the judge's.
    stages = [stage for stage in stages if len(logs[stage]) > 1][:4]
    if not stages:
        return
    figure.set_size_inches(7.8, 4.2)
    axes = figure.subplots(2, len(stages), sharex="col", squeeze=False)
    for stage, (above, below) in zip(stages, axes.T):
        above.set_title(stage, fontsize=10)
        curve(above, logs[stage], "loss", color="0.7")
        curve(below, logs[stage], "valid", color="black", marker="o")
    axes[0, 0].set_ylabel("training loss (nats)")
    axes[1, 0].set_ylabel("validation")
    figure.supxlabel("step", fontsize=10)


PICTURES = {
    draw_emp_f1: "By mechanism: how well the levels of the replies match the human's (1 is best), "
    "with 95 % intervals. Dotted: always the commonest level. Dashed: an estimate of what can be "
    "foreseen from the context.",
    draw_levels: "Among the contexts whose human reply has the level on the left: how often the "
    "generated reply has each level (a row adds up to 100 %), and below it the number of contexts. "
    "Above MLE, below EmpRL. The more on the diagonal, the better. Levels by the {truth}.",
    draw_learnt_vs_truth: "Does PPO please the identifiers, or does it really get levels right? "
    "With reward hacking the identifiers' line rises and the {truth}'s does not. Shaded: 95 % "
    "intervals, on the few contexts that PPO is validated on, so a line may pass the ceiling.",
    draw_ppo: "PPO, iteration by iteration. Look at the reward and the KL first. A grey band is a "
    "healthy range; without one there is no fixed range. Explained variance is the share of the "
    "variance of the returns that the value head predicts.",
    draw_losses: "Do MLE, identifiers and judge still learn? Above the training loss, below the "
    "validation that chooses their weights: MLE's loss, the classifiers' negative macro-F1. Both "
    "should fall.",
}


# ---- the commands ---------------------------------------------------------------------------


def settings_of(config):
    """section.name -> (the section, its field), of every option of --set."""
    options = {}
    for section in fields(config):
        part = getattr(config, section.name)
        if not is_dataclass(part):
            continue
        for f in fields(part):
            if f.metadata.get("help"):
                options[f"{section.name}.{f.name}"] = (part, f)
    return options


def apply_setting(config, setting):
    """One "section.name=value" of --set. Raises DataError."""
    name, _, text = setting.partition("=")
    options = settings_of(config)
    if name not in options:
        near = [x for x in options if x.split(".")[0] == name.split(".")[0]]
        known = ", ".join(near) or "those that `python emprl.py options` prints"
        raise DataError(
            f"--set {setting}: no such option; write NAME=VALUE with one of {known}"
        )
    part, f = options[name]
    value = value_of(f, text)
    if value is None:
        raise DataError(f"--set {setting}: it takes {legal(f)}")
    setattr(part, f.name, value)


def value_of(f, text):
    """What --set gives an option; None if it is not legal."""
    meta = f.metadata
    if isinstance(f.default, bool):
        return {"on": True, "off": False}.get(text)
    if meta["choices"]:
        return text if text in meta["choices"] else None
    try:
        value = type(f.default)(text)
    except ValueError:
        return None
    return value if meta["low"] <= value <= meta["high"] else None


def legal(f):
    """The values that an option takes, in words."""
    low, high, choices = f.metadata["low"], f.metadata["high"], f.metadata["choices"]
    if isinstance(f.default, bool):
        return "on or off"
    if choices:
        return "one of " + " | ".join(choices)
    kind = "a whole number" if isinstance(f.default, int) else "a number"
    return f"{kind} from {low:g} to {high:g}"


def make_config(preset="toy", seed=0, data_path="", t5_dir="", settings=()):
    """A preset with some settings changed. Raises DataError for what does not go together."""
    config = PRESETS[preset]()
    config.seed = seed
    config.data_path = str(data_path or "")
    config.t5_dir = str(t5_dir or "")
    for setting in settings:
        apply_setting(config, setting)

    if seed < 0:
        raise DataError("--seed is below 0; change it")
    for name in ("exploring", "replying"):
        sampling = getattr(config, name)
        if sampling.min_length > sampling.max_length:
            raise DataError(
                f"{name}.min_length is above {name}.max_length; change it by --set"
            )
    if config.ppo.minibatch_size > config.ppo.batch_size:
        raise DataError("ppo.minibatch_size is above ppo.batch_size; change it by --set")
    is_there = os.path.isdir(config.data_path) or os.path.isfile(config.data_path)
    if config.data_path and not is_there:  # a pipe or a device is neither
        raise DataError(f"--data {data_path}: no ordinary file or folder; give another path")
    if preset in ("real", "paper") and not os.path.isdir(config.data_path):
        raise DataError(
            f"--preset {preset} needs --data DIR, the folder that "
            "`python emprl.py download DIR` fills"
        )
    if config.mle.muon and not hasattr(torch.optim, "Muon"):
        raise DataError(f"torch {torch.__version__} has no Muon; add --set mle.muon=off")
    if preset == "paper" and not t5_dir:
        raise DataError("--preset paper needs --t5 DIR: config.json, weights and spiece.model")
    return config


def refuse_without_effect(config, settings):
    """Raises DataError for a setting of a part that something else replaces."""
    unused = {}  # reason -> options, or how their names begin
    if config.t5_dir:
        unused["--t5 has its own"] = ("t5.", "data.vocab_size")
    if config.data_path:
        unused["all of --data is used"] = ("data.num_",)
    if not config.pretrain.steps:
        unused["pretrain.steps is 0"] = ("pretrain.task",)
    if config.mle.epochs:
        unused["mle.epochs sets them"] = ("mle.steps",)
    if config.identifiers.kind == "ngrams":
        of_networks = "steps batch_size micro_batch lr warmup eval_every shared".split()
        of_networks = tuple(f"identifiers.{name}" for name in of_networks)
        unused["n-grams have none"] = (*of_networks, "context.steps", "context.lr")
    else:
        of_ngrams = ("identifiers.penalty", "identifiers.size", "context.penalty")
        unused["only n-grams have it"] = of_ngrams
    given = [setting.partition("=")[0] for setting in settings]
    unused["it is set twice"] = tuple(f"{x}=" for x in given if given.count(x) > 1)
    for setting in settings:
        for why, beginnings in unused.items():
            if setting.startswith(beginnings):
                raise DataError(f"--set {setting}: has no effect here ({why}); leave it out")


def print_options(arguments):
    """Every option with default, range and meaning, and the presets where it differs."""
    presets = {name: settings_of(make()) for name, make in PRESETS.items()}
    section = ""
    for name, (part, f) in presets["toy"].items():
        if name.split(".")[0] != section:
            section = name.split(".")[0]
            say(f"\n{section}")
        default = getattr(part, f.name)
        say(f"  {name} = {shown(default)}  ({legal(f)})\n      {f.metadata['help']}")
        for preset in ("real", "paper"):
            value = getattr(presets[preset][name][0], f.name)
            if value != default:
                say(f"      {preset}: {shown(value)}")
    say(f"\n{len(presets['toy'])} options; the defaults are those of toy")


def shown(value):
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass
class Finished:
    """What a run folder holds when the run has ended."""

    run: Run
    classifiers: dict  # "identifiers", "judge"
    policies: dict  # "mle", "emprl"


RUN_FILES = (  # what chat and evaluate need, too; *: nothing, or the name of a mechanism
    "tokenizer.model",
    "mle/config.json",
    "mle/pytorch_model.bin",
    "emprl/config.json",
    "emprl/pytorch_model.bin",
    "checkpoints/identifiers*.pt",
    "checkpoints/judge*.pt",
)


def refuse_without_its_files(folder):
    """Raises DataError unless all is there that a finished run leaves."""
    if not (folder / "metrics.json").is_file():
        command = program("--run", str(folder))
        raise DataError(f"--run {folder}: no finished run there; make one with `{command}`")
    for name in RUN_FILES:
        if not list(folder.glob(name)):
            raise DataError(
                f"--run {folder}: {name.replace('*', '')} is missing; the command that made the "
                "run makes it again"
            )


def load_run(folder, device):
    """A finished run. Raises DataError for one that is missing, damaged or mixed."""
    folder = Path(folder)
    refuse_without_its_files(folder)
    try:
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        config = read_config(metrics["config"])
        made_of = metrics["made_of"]
        check_origin("its configuration", digest(metrics["config"]), made_of["config"])
        run = Run(folder, config, device)
        same_code = metrics["code"] == run.code
        run.tokenizer = Tokenizer(folder / "tokenizer.model")
        found = digest_bytes(run.tokenizer.model)
        check_origin("tokenizer.model", found, made_of["tokenizer"])
        policies = {}
        for name, stage in (("mle", "mle"), ("emprl", "ppo")):
            policy = from_pretrained(folder / name, run.tokenizer.vocab_size)
            check_origin(name, digest_weights(policy.state_dict()), made_of[stage])
            policies[name] = policy.to(device).eval()
        classifiers = {}
        for name in ("identifiers", "judge"):
            classifier = make_classifier(policies["mle"], config.identifiers)
            load_classifier(classifier, name, folder, made_of)
            classifiers[name] = classifier.eval().requires_grad_(False)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"--run {folder}: a file of it is damaged or of another run ({reason}); make it again"
        ) from None
    if not same_code:
        say("warning: the run was made by other code than this")
    return Finished(run, classifiers, policies)


def load_classifier(classifier, name, folder, made_of):
    """The weights of its stages; they must be those that metrics.json names."""
    for stage, part in classifier.parts(name).items():
        file = f"checkpoints/{stage}.pt"
        weights = load_stage(folder / file)["weights"]
        check_origin(file, digest_weights(weights), made_of[stage])
        part.load_state_dict(weights)


def read_config(raw):
    """A Config from the dict that config.json has."""
    config = Config()
    for f in fields(config):
        value = raw[f.name]
        part = getattr(config, f.name)
        setattr(config, f.name, replace(part, **value) if is_dataclass(part) else value)
    return config


def check_origin(name, found, wanted):
    if found != wanted:
        raise ValueError(f"{name} is not what metrics.json was measured on")


def evaluate(arguments):
    """Both policies on any dialogues; figures and replies go into the run folder."""
    finished = load_run(arguments.run, find_device(arguments.device))
    run = finished.run
    # without levels: nothing here needs them, and the oracle knows only its own world
    dialogues = [replace(d, levels=None) for d in data.read_dialogues(arguments.data)]
    say(f"{len(dialogues)} dialogues; figures and replies are written at the end")
    limits = run.config.data.max_source, run.config.data.max_scored
    pairs = Pairs(dialogues, run.tokenizer, *limits, run.device)
    test = Evaluator(run, pairs, finished.classifiers, finished.policies["mle"])
    metrics = test.before_and_after(finished.policies["emprl"])
    say(level_table(metrics, test))  # first, for the disk may be full

    # Named by content: another mine.jsonl does not write over this one.
    content = digest([asdict(dialogue) for dialogue in dialogues])
    name = f"evaluate-{Path(arguments.data).stem[:50]}-{content[:12]}"
    run.write_json(f"{name}.json", metrics)
    run.write(f"{name}.jsonl", responses_jsonl(test))
    say(f"\nfigures {run.folder / name}.json, replies {run.folder / name}.jsonl")


OPENING = (
    "An exercise with a small research model: no person reads along, and it understands nothing.",
    "In danger, you or someone near you? Call 112, 911 or 999; in the US 988; findahelpline.com",
)
HOW_TO_CHAT = (
    "mle replies as before PPO, emprl as after it; each remembers its own replies. In brackets:",
    "the levels of empathy in the reply, in the identifiers' opinion, which can be wrong.",
    "An empty line: a new conversation. /help: this again. Ctrl-D, or Ctrl-Z and Enter: the end.",
)
# Whole sentences that can hardly mean anything else. It is no safety feature: see README.
CRISIS = """
I want to die
I just want to die
I wanna die
I want to be dead
I want to kill myself
I wanna kill myself
I am going to kill myself
I'm going to kill myself
I'm gonna kill myself
I will kill myself
I'll kill myself
I want to end my life
I'm going to end my life
I want to take my own life
I want to commit suicide
I am suicidal
I'm suicidal
I feel suicidal
I don't want to live
I do not want to live
I don't want to be alive
I wish I was dead
I wish I were dead
Life is not worth living
"""
SOON = "(anymore|now|rightnow|tonight|today)*"


def squeezed(text):
    """Only the letters, and none twice in a row: "W-wanna  D1EEE" -> "wanadie"."""
    text = text.lower().translate(str.maketrans("013", "oie"))
    letters = re.sub("[^a-z]", "", unicodedata.normalize("NFKD", text))
    return re.sub(r"(.)\1+", r"\1", letters)


def signs_of_crisis(text):
    """Does a sentence of the text say one of the phrases and nothing else, however spelled?"""
    phrases = "|".join(map(squeezed, CRISIS.strip().splitlines()))
    sign = re.compile(f"({phrases}){SOON}")
    # Not cut at commas: "I want to die, that was so embarrassing" is no such sentence.
    sentences = re.split(r"[.!?\n]+(?!\w)", text)
    return any(sign.fullmatch(squeezed(sentence)) for sentence in sentences)


def chat(arguments):
    """You write, both policies reply, and each reply has its levels by the identifiers."""
    if sys.stdin is None:
        raise DataError(
            "chat reads what you type, but it has no input; start it in a terminal"
        )
    finished = load_run(arguments.run, find_device(arguments.device))
    say(*OPENING, *HOW_TO_CHAT, sep="\n")
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    histories = dict.fromkeys(finished.policies, ())  # each policy knows its own replies only
    for line in sys.stdin:
        line = data.clean(line)
        if signs_of_crisis(line):
            say(*OPENING, sep="\n")
            continue
        if line == "/help":
            say(*OPENING, *HOW_TO_CHAT, sep="\n")
            continue
        if not line:
            histories = dict.fromkeys(finished.policies, ())
            say("(a new conversation)")
            continue
        for name, history in histories.items():
            history = (*history, line[-2000:])
            reply, levels = answer_to(finished, name, history)
            say(f"{name:<6} {printable(reply)}   [{in_words(levels)}]")
            histories[name] = (*history, reply)


def answer_to(finished, name, history):
    """A policy's reply to a conversation, and its levels as the identifiers see them."""
    run, config = finished.run, finished.run.config
    limits = config.data.max_source, config.data.max_target
    pairs = Pairs([Dialogue(history, "")], run.tokenizer, *limits, run.device)
    answered = pairs.with_responses(respond(finished.policies[name], pairs, config.replying))
    levels = predict_levels(finished.classifiers["identifiers"], answered)[0]
    return run.tokenizer.decode(answered.responses[0]), levels


def find_device(wanted=""):
    """ "cuda" or "cpu": the one that is wanted, or a GPU if torch can use one."""
    if wanted == "cpu":
        return "cpu"
    problem = problem_of_cuda()
    if not problem:
        return "cuda"
    if wanted == "cuda":
        raise DataError(f"--device cuda: {problem}; leave --device out, then the CPU is used")
    if torch.backends.mps.is_available():
        say("device      Apple's GPU is not used, the CPU is")
    elif problem != NO_GPU:
        say(f"device      a GPU is there but not used ({problem}); the CPU is")
    return "cpu"


NO_GPU = "torch sees no GPU"
NVIDIA_DRIVER = "/proc/driver/nvidia"


def problem_of_cuda():
    """What keeps torch from using a GPU, in a line; "" if nothing does."""
    with warnings.catch_warnings(record=True) as warned:  # torch warns of a driver that is old
        warnings.simplefilter("always")
        try:
            if torch.cuda.is_available():
                torch.ones(1, device="cuda").sum().item()  # it may be there, and not work
                return ""
            reason = warned[-1].message if warned else NO_GPU
        except RuntimeError as error:
            reason = error
    if reason == NO_GPU and os.path.exists(NVIDIA_DRIVER):
        reason = f"torch {torch.__version__} is built without it, or for another driver"
    return " ".join(str(reason).split())[:120]


def start_run(arguments):
    """Train and evaluate: the command `run`."""
    config = make_config(
        arguments.preset, arguments.seed, arguments.data, arguments.t5, arguments.set
    )
    refuse_without_effect(config, arguments.set)
    if config.t5_dir:  # raises if one is missing, before anything is trained or written
        official_file(config.t5_dir, "config.json")
        official_file(config.t5_dir, "spiece.model")
        weights_file(config.t5_dir)
    folder = arguments.run or f"runs/{arguments.preset}-seed{arguments.seed}"
    device = find_device(arguments.device)
    run = Run(folder, config, device, arguments.words)
    what = f"preset {config.preset}, seed {config.seed}, on {device}"
    say(f"EmpRL, {what}, threads: {torch.get_num_threads()}; results in {folder}")
    with alone(folder):
        run_all(run)


def download(arguments):
    data.download(arguments.folder)


class Parser(argparse.ArgumentParser):
    """argparse, whose errors are one line as all others are."""

    def error(self, message):
        raise DataError(f"{message}; see python emprl.py --help")


def a_path(text):
    """An argument that names a file or a folder."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError("empty, or with a NUL in it; give a path")
    return text


def make_parser():
    parser = Parser(
        prog="emprl.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, do, help):
        added = commands.add_parser(name, help=help)
        added.set_defaults(do=do)
        return added

    run = command("run", start_run, "train and evaluate (what is done by default)")
    add = run.add_argument
    add("--preset", default="toy", choices=PRESETS)
    add("--data", type=a_path, help="folder of the real corpora, or your own file")
    add("--t5", type=a_path, help="folder of an official T5 checkpoint")
    add("--run", type=a_path, help="where results go: runs/PRESET-seedN")
    add("--seed", type=int, default=0)
    settings = {"nargs": "+", "action": "extend", "default": [], "metavar": "NAME=VALUE"}
    add("--set", **settings, help="see options")
    measure = command("evaluate", evaluate, "measure a finished run on other dialogues")
    measure.add_argument(
        "--data", type=a_path, required=True, help="dialogues, .jsonl or .csv"
    )
    talk = command("chat", chat, "talk to a finished run")
    for added in (measure, talk):
        added.add_argument("--run", type=a_path, required=True, help="a finished run's folder")
    for added in (run, measure, talk):
        added.add_argument("--device", default="", choices=("cpu", "cuda"))
    fetch = command("download", download, "fetch the two public corpora")
    fetch.add_argument("folder", type=a_path)
    command("options", print_options, "print every setting of --set")
    return parser


def main(words=None):
    """The command line. Returns the exit code: 0, 1 a fault, 2 bad input, 130 Ctrl-C."""
    words = sys.argv[1:] if words is None else list(words)
    is_command = words and (not words[0].startswith("-") or words[0] in ("-h", "--help"))
    if hasattr(sys.stdout, "reconfigure"):  # a letter that the terminal does not have: "?"
        sys.stdout.reconfigure(errors="replace")
    before = on_ctrl_c(signal.default_int_handler)
    try:
        arguments = make_parser().parse_args(words if is_command else ["run", *words])
        arguments.words = words
        arguments.do(arguments)
        return 0
    except KeyboardInterrupt:
        on_ctrl_c(signal.SIG_IGN)  # a second one comes too late
        print(f"\nstopped; go on with: {program(*words)}", file=sys.stderr)
        return 130
    except Exception as error:
        message = in_one_line(error, trains=words[:1] not in (["chat"], ["evaluate"]))
        if message:
            print(f"emprl.py: {printable(message)}", file=sys.stderr)
            return 2
        # Unforeseen, perhaps a bug in a changed copy: whoever fixes it needs the traceback.
        traceback.print_exc()
        print(
            "emprl.py: a fault in the program, see above; what was finished is saved, "
            "the same command goes on from there",
            file=sys.stderr,
        )
        return 1
    finally:
        on_ctrl_c(before)


def on_ctrl_c(handler):
    """From now on Ctrl-C calls the handler (main thread only). Returns the one before."""
    if handler is not None and threading.current_thread() is threading.main_thread():
        return signal.signal(signal.SIGINT, handler)
    return None


@contextlib.contextmanager
def ctrl_c_waits():
    """Ctrl-C stops nothing meanwhile, but sets the event: a step is never cut in two."""
    pressed = threading.Event()
    before = on_ctrl_c(lambda *_: pressed.set())
    try:
        yield pressed
    finally:
        on_ctrl_c(before)


OUT_OF_MEMORY = "out of memory|can't allocate|not enough memory"
CURES = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EFBIG: "make room",
    errno.EACCES: "look at its permissions, or name another path",
    errno.EPERM: "look at its permissions, or name another path",
    errno.EROFS: "name a folder you may write to",
}


def in_one_line(error, trains=True):
    """What is wrong and what to do, if it could be foreseen: input, disk, memory. Else ""."""
    if isinstance(error, (DataError, CheckpointError)):
        return str(error)
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # no second complaint
        return "stopped: the program that read the output has ended; the same command resumes"
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        cure = CURES.get(error.errno, "name another path")
        return f"{where}{error.strerror or error}; {cure}"
    no_memory = isinstance(error, RuntimeError) and re.search(OUT_OF_MEMORY, str(error))
    if isinstance(error, MemoryError) or no_memory:
        if not trains:
            return "out of memory; end other programs, or add --device cpu if it is the GPU's"
        return (
            "out of memory; lower the stage's micro_batch (the gradient stays the same but for "
            "dropout), ppo.batch_size, eval.batch_size or what sets a model's size (t5.d_model, "
            "identifiers.size)"
        )
    return ""


if __name__ == "__main__":
    sys.exit(main())
