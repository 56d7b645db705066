"""PPO's first iterations once more, from a finished run: short_run.py RUN BUG [NAME=VALUE ...]

measure_bugs.py puts this file into copies of the program and starts it there, so that it runs the
copy's code, bug and all. It prints a record for each iteration, as JSON. What bugs 7 and 8 change
is trained anew: the identifiers, or the MLE policy.
"""

import json
import sys

import torch

import emprl
from data import batches
from identifiers import EmpathyReward, make_classifier, predict_levels
from ppo import PPOTrainer
from t5_small import T5

SETTINGS = [
    "mle.steps=600",
    "ppo.steps=15",
    "ppo.batch_size=192",
    "ppo.lr=4e-3",
    "ppo.kl_coef=0.1",
]
KEYS = ("reward", "kl", "length", "value_loss")


def fit(trainer, seed):
    """All steps of a trainer. Returns their records."""
    records = []
    for i in range(trainer.config.steps):
        torch.manual_seed(1000 * seed + i)
        records.append(trainer.step(i))
    trainer.finish()
    return records


def retrained_policy(mle, pairs, config):
    """An MLE policy from the start."""
    torch.manual_seed(config.seed)
    policy = T5(mle.config)
    fit(emprl.mle_trainer(policy, pairs["train"], pairs["valid"], config), config.seed)
    return policy.eval()


def retrained_identifiers(mle, labelled, config):
    """Identifiers from the MLE policy's encoder on."""
    torch.manual_seed(config.seed)
    classifier = make_classifier(mle, config.identifiers)
    lengths = labelled["train"].lengths()
    rows_at = batches(lengths, config.identifiers.batch_size, config.seed)
    trainer = classifier.trainer(
        labelled["train"], labelled["valid"], rows_at, config.identifiers
    )
    fit(trainer, config.seed)
    return classifier.eval()


def no_validation(t5):
    return {}


def main(folder, bug, *settings):
    finished = emprl.load_run(folder, "cpu")
    run, config = finished.run, finished.run.config
    for setting in (*SETTINGS, *settings):
        emprl.apply_setting(config, setting)
    corpus = emprl.load_corpus(config)
    tokenizer = finished.tokenizer
    pairs = emprl.encode(run, corpus.dialogues, tokenizer, "max_source", "max_target")

    mle = finished.policies["mle"]
    identifiers = finished.classifiers["identifiers"]
    if bug == "8":
        mle = retrained_policy(mle, pairs, config)
    if bug == "7":
        labelled = emprl.encode(
            run, corpus.labelled, tokenizer, "identifier_source", "identifier_target"
        )
        identifiers = retrained_identifiers(mle, labelled, config)

    # One human's levels as the target: the identifiers' own, so that bug 7 reaches them.
    targets = predict_levels(identifiers, pairs["train"])
    reward = EmpathyReward(identifiers, config.reward)
    prompts = emprl.PromptBatches(pairs["train"], targets, config.ppo.batch_size, config.seed)
    trainer = PPOTrainer(mle, reward, prompts, config.exploring, config.ppo, no_validation)
    shown = []
    for record in fit(trainer, config.seed):
        shown.append({key: record[key] for key in KEYS})
    print(json.dumps(shown))


if __name__ == "__main__":
    main(*sys.argv[1:])
