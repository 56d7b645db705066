"""How well do the n-gram identifiers tell EPITOME's levels, beside the usual baseline?

    python -m tests.lab.identify --data DIR    DIR: see `emprl.py download`

Each of five seeds splits EPITOME by seeker: three quarters to learn from, a fifth to test on.
"TF-IDF" is scikit-learn's class-balanced logistic regression on words and word pairs of the
response, "ours" the n-grams of preset `real`, each trained on all three quarters; a "half" is
what identifiers or judge get of them in a run. It prints a table of means (standard deviations)
over the seeds.

Cost: two and a half minutes. Needs scikit-learn.
"""

import sys
from statistics import fmean, pstdev

import torch

from data import LEVELS, MECHANISMS, DataError, Pairs, real_corpus
from emprl import make_tokenizer, real, say
from identifiers import NGramClassifier, confusions, f1_scores, predict_levels
from tests.lab.command import Parser, sheet, start, write_json
from tests.lab.tables import f1_of


def tf_idf(train, test):
    """Levels (N, M) of the responses of `test`, by scikit-learn."""
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.multioutput import MultiOutputClassifier
        from sklearn.pipeline import make_pipeline
    except ImportError:
        raise DataError("identify needs scikit-learn: pip install scikit-learn") from None
    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2)),
        MultiOutputClassifier(LogisticRegression(class_weight="balanced", max_iter=1000)),
    )
    model.fit([d.response for d in train], [d.levels for d in train])
    return torch.tensor(model.predict([d.response for d in test]))


def ours(train, test):
    """Levels (N, M) by the n-gram identifiers, as preset `real` trains them."""
    config = real().identifiers
    classifier = NGramClassifier(config)
    classifier.trainer(train, None, None, config).step(0)
    return predict_levels(classifier, test)


def figures_of(levels, gold):
    """{"ER macro_f1": number, ...} of levels (N, M)."""
    counts = confusions(levels, gold)  # (M, L, L)
    figures = {}
    for m, mechanism in enumerate(MECHANISMS):
        name = mechanism.upper()
        for measure, number in f1_scores(counts[m]).items():
            figures[f"{name} {measure}"] = number.item()
        for k in range(LEVELS):
            figures[f"{name} f1_{k}"] = f1_of(levels[:, m] == k, gold[:, m] == k)
    return figures


def one_seed(folder, seed):
    """{system: its figures} on the test part of one split."""
    corpus = real_corpus(folder, seed)
    sizes = real()
    tokenizer = make_tokenizer(sizes, corpus)
    parts = corpus.labelled
    parts["all"] = parts["train"] + parts["judge_train"] + parts["judge_valid"]
    lengths = sizes.data.identifier_source, sizes.data.identifier_target
    pairs = {part: Pairs(parts[part], tokenizer, *lengths) for part in parts}
    test = pairs["test"]
    told = {
        "TF-IDF": tf_idf(parts["all"], parts["test"]),
        "ours": ours(pairs["all"], test),
        "the identifiers' half": ours(pairs["train"], test),
        "the judge's half": ours(pairs["judge_train"], test),
    }
    return {system: figures_of(levels, test.levels) for system, levels in told.items()}


def summary(seeds):
    """{figure: {system: "mean (standard deviation)"}} over the seeds."""
    rows = {}
    for name in seeds[0]["ours"]:
        rows[name] = {}
        for system in seeds[0]:
            values = [seed[system][name] for seed in seeds]
            rows[name][system] = f"{fmean(values):.3f} ({pstdev(values):.3f})"
    return rows


def main():
    parser = Parser(__doc__)
    parser.add_argument("--data", default="data", help="folder of the corpora")
    parser.can_write()
    options = parser.parse_args()
    seeds = []
    for seed in range(5):
        say(f"seed {seed}, of 0 to 4")
        seeds.append(one_seed(options.data, seed))
    say(sheet(summary(seeds)))
    write_json(options.write, seeds)


if __name__ == "__main__":
    sys.exit(start(main))
