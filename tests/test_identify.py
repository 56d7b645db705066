"""identify.py: TF-IDF by hand, both systems on a corpus where one word tells the level, its command line."""

import math
import subprocess
import sys

import torch

import identify
from conftest import check
from data import Dialogue, Pairs, Tokenizer


def test_tf_idf_by_hand():
    """Of 2 texts: idf = ln(3 / (1 + texts with the gram)) + 1. "ab ab cd": ab twice, cd, "ab ab", "ab cd"; a word has two letters or more."""
    train = ["ab ab cd x", "cd ef"]
    (ids, offsets, values), size = identify.tf_idf(train, ["AB ab cd", "unseen"])
    assert size == 6 and offsets.tolist() == [0, 4], (
        "ab, cd, 'ab ab', 'ab cd', ef, 'cd ef'; nothing of the second text is known"
    )
    rare, common = math.log(3 / 2) + 1, 1.0
    vector = torch.tensor([2 * rare, common, rare, rare])
    check("values of ab, cd, 'ab ab', 'ab cd'", values, vector / vector.norm())
    assert len(set(ids.tolist())) == 4


def corpus(n):
    words = [("cat", "table"), ("sorry", "chair"), ("grief", "window")]
    return [
        Dialogue(
            ("we met at the station",),
            f"well {words[i % 3][0]} and {words[i % 2][1]} {'so ' * (i % 5)}".strip(),
            levels=(i % 3, i % 2, 0),
        )
        for i in range(n)
    ]


def test_both_learn_what_a_word_tells():
    train, test = corpus(60), corpus(25)
    gold = torch.tensor([d.levels for d in test])
    assert torch.equal(identify.baseline(train, test), gold)
    tokenizer = Tokenizer.train([d.response for d in train] + ["we met at the station"], 160)
    pairs = [Pairs(part, tokenizer, 20, 20) for part in (train, test)]
    assert torch.equal(identify.ngrams(*pairs).argmax(-1), gold)


def test_best_levels_are_those_of_the_best_thresholds():
    """Of ER and EX plain argmax is right. Of IP level 1 never comes out on top, but is likelier where it is right: a bias tells it."""
    gold = torch.tensor([[0, 0, 2], [1, 1, 1], [2, 0, 0], [0, 1, 0]])
    probs = torch.full((4, 3, 3), 0.1).scatter(2, gold[..., None], 0.8)
    probs[:, 1] = torch.tensor(
        [[0.9, 0.05, 0.05], [0.6, 0.3, 0.1], [0.9, 0.05, 0.05], [0.6, 0.3, 0.1]]
    )
    assert not torch.equal(probs.argmax(-1), gold) and torch.equal(
        identify.best_levels(probs.log(), gold), gold
    )
    noise = torch.rand(400, 3, 3).log_softmax(-1)
    labels = torch.randint(0, 3, (400, 3))
    plain, best = (
        identify.f1_scores(identify.confusion(levels[:, 1], labels[:, 1]))["macro_f1"].item()
        for levels in (noise.argmax(-1), identify.best_levels(noise, labels))
    )
    assert plain <= best < 0.45, "nothing to be known: little to be gained"


def test_errors_are_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, identify.__file__, "--data", str(tmp_path / "none")],
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "none" in done.stderr
