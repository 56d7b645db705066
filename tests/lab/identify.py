"""How well do the n-gram identifiers tell EPITOME's levels, beside the usual baseline?

    python -m tests.lab.identify [--data DIR] [--seeds N]    DIR: what `emprl.py download DIR` filled

Each seed splits EPITOME by seeker: four fifths to learn from, a fifth to test on. "TF-IDF" is
scikit-learn's class-balanced logistic regression on words and word pairs of the response. "ours" is
trained on the whole training part, and on the halves of it that the identifiers and the judge get
in a run. The third column is a bound: our probabilities with the thresholds that are best for the
test labels themselves. It prints a Markdown table of means (standard deviations) over the seeds.

Cost: half a minute a seed. Needs scikit-learn.
"""

import statistics
import sys

import torch

from data import LEVELS, MECHANISMS, DataError, Pairs, real_corpus
from emprl import make_tokenizer, real, say, table
from identifiers import NGramClassifier, confusion, f1_scores, predict
from tests.lab.command import Parser, start, write_json


def tf_idf(train, test):
    """Levels (N, M) of the responses of `test`, by scikit-learn."""
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
    except ImportError:
        raise DataError("identify needs scikit-learn: pip install scikit-learn") from None
    levels = []
    for m in range(len(MECHANISMS)):
        model = make_pipeline(
            TfidfVectorizer(ngram_range=(1, 2)),
            LogisticRegression(class_weight="balanced", max_iter=1000),
        )
        model.fit([d.response for d in train], [d.levels[m] for d in train])
        levels.append(torch.tensor(model.predict([d.response for d in test])))
    return torch.stack(levels, 1)


def ours(train, test):
    """Log-probabilities (N, M, L) of the n-gram identifiers, as preset `real` trains them."""
    config = real().identifiers
    classifier = NGramClassifier(config)
    classifier.trainer(train, None, None, config).step(0)
    return predict(classifier, test)


def best_levels(log_probs, gold):
    """The levels with the biases for levels 1 and 2 that give `gold` the best macro-F1, on a grid.

    log_probs: (N, M, L). gold: (N, M). No classifier: what any thresholds could reach at most.
    """
    grid = torch.arange(-6, 6.1, 0.2)
    biases = torch.cartesian_prod(torch.zeros(1), grid, grid)  # (G, L)
    best = []
    for m in range(len(MECHANISMS)):
        levels = (log_probs[:, m] + biases[:, None]).argmax(-1)  # (G, N)
        counts = torch.stack([confusion(some, gold[:, m]) for some in levels])
        best.append(levels[f1_scores(counts)["macro_f1"].argmax()])
    return torch.stack(best, 1)


def figures_of(levels, gold):
    """{"ER macro_f1": number, ...} of levels (N, M)."""
    figures = {}
    for m, name in enumerate(MECHANISMS):
        counts = confusion(levels[:, m], gold[:, m])
        f1 = 2 * counts.diagonal() / (counts.sum(0) + counts.sum(1)).clamp(min=1)
        scores = f1_scores(counts) | {f"f1_{k}": f1[k] for k in range(LEVELS)}
        for measure, score in scores.items():
            figures[f"{name.upper()} {measure}"] = score.item()
    return figures


def one_seed(folder, seed):
    """{system: its figures} on the test part of one split."""
    corpus = real_corpus(folder, seed)
    sizes = real()
    tokenizer = make_tokenizer(sizes, corpus)
    parts = dict(corpus.labelled)
    parts["all"] = parts["train"] + parts["judge_train"] + parts["judge_valid"]
    lengths = sizes.data.identifier_source, sizes.data.identifier_target
    pairs = {part: Pairs(parts[part], tokenizer, *lengths) for part in parts}
    test = pairs["test"]
    log_probs = ours(pairs["all"], test)
    told = {"TF-IDF": tf_idf(parts["all"], parts["test"])}
    told["ours"] = log_probs.argmax(-1)
    told["ours, best thresholds for the test labels"] = best_levels(log_probs, test.levels)
    for name, part in (
        ("the identifiers' half", "train"),
        ("the judge's half", "judge_train"),
    ):
        told[f"ours, {name}"] = ours(pairs[part], test).argmax(-1)
    return {system: figures_of(levels, test.levels) for system, levels in told.items()}


def summary(seeds):
    """Markdown: a row for each figure, a column for each system; mean (standard deviation)."""
    rows = []
    for name in seeds[0]["ours"]:
        cells = []
        for system in seeds[0]:
            values = [seed[system][name] for seed in seeds]
            cells.append(f"{statistics.mean(values):.3f} ({statistics.pstdev(values):.3f})")
        rows.append([name, *cells])
    return table(["", *seeds[0]], rows)


def main():
    parser = Parser(__doc__)
    parser.add_argument("--data", default="data", help="folder of the corpora")
    parser.add_argument("--seeds", type=int, default=5, help="splits")
    parser.can_write()
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error("--seeds is from 1")
    seeds = []
    for seed in range(options.seeds):
        say(f"seed {seed} of {options.seeds}")
        seeds.append(one_seed(options.data, seed))
    say(summary(seeds))
    write_json(options.write, seeds)


if __name__ == "__main__":
    sys.exit(start(main))
