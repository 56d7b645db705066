"""How well the n-gram identifiers read EPITOME: python tests/identify.py [--data DIR] [--seeds N]

The test part, split by seeker, on several seeds of the split. Beside `NGrams` stands the usual baseline on the same splits: TF-IDF
of the response's words and word pairs, and class-balanced logistic regression (as scikit-learn's defaults: C = 1). Trained on the
whole training part, and on the halves that the recipe gives to the reward's identifiers and to the judge. And, as a bound, what the
best thresholds would give if the test labels were known.
Prints the table of means (standard deviations) and writes tests/results/identifiers.json: figures only, no texts."""

import argparse, json, os, re, statistics, sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import DataError, Pairs, Tokenizer, real_corpus
from identifiers import (
    LEVELS,
    MECHANISMS,
    NGrams,
    class_weights,
    confusion,
    f1_scores,
    identification_loss,
)

MEASURES = ("macro_f1", "weighted_f1", "accuracy")
SIZE, CHEAT = 65536, "ours, thresholds set on the test labels"


def tf_idf(train, texts):
    """TF-IDF vectors of length 1 of `texts`, with the words and idf of `train`: (token ids, offsets, values), as embedding_bag asks."""

    def grams(text):
        words = re.findall(r"\b\w\w+\b", text.lower())
        return Counter(words + [" ".join(two) for two in pairwise(words)])

    seen = Counter(gram for text in train for gram in grams(text))
    frequency = Counter(gram for text in train for gram in set(grams(text)))
    index = {gram: i for i, gram in enumerate(seen)}
    idf = (
        (1 + len(train)) / (1 + torch.tensor([frequency[gram] for gram in index]))
    ).log() + 1
    rows = [[(index[g], n) for g, n in grams(text).items() if g in index] for text in texts]
    ids = [torch.tensor([i for i, _ in row], dtype=torch.long) for row in rows]
    values = [torch.tensor([float(n) for _, n in row]) * idf[i] for row, i in zip(rows, ids)]
    offsets = torch.tensor([0, *map(len, rows)]).cumsum(0)[:-1]
    return (torch.cat(ids), offsets, torch.cat([F.normalize(v, dim=0) for v in values])), len(
        index
    )


def baseline(train, test):
    """The levels (N, M) that TF-IDF and balanced logistic regression give the responses of `test`."""
    texts, gold = [d.response for d in train], torch.tensor([d.levels for d in train])
    (ids, offsets, values), size = tf_idf(texts, texts)
    weight, bias = (
        torch.zeros(*shape, len(MECHANISMS) * LEVELS, requires_grad=True)
        for shape in ((size,), ())
    )

    def log_probs(ids, offsets, values):
        logits = (
            F.embedding_bag(ids, weight, offsets, mode="sum", per_sample_weights=values) + bias
        )
        return logits.unflatten(-1, (-1, LEVELS)).log_softmax(-1)

    optimizer, balanced = (
        torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe"),
        class_weights(gold, 1.0),
    )

    def loss():
        optimizer.zero_grad()
        total = (
            identification_loss(log_probs(ids, offsets, values), gold, balanced)
            + weight.pow(2).sum() / 2
        )
        total.backward()
        return total

    optimizer.step(loss)
    with torch.no_grad():
        return log_probs(*tf_idf(texts, [d.response for d in test])[0]).argmax(-1)


def ngrams(train, test):
    """The log-probabilities (N, M, L) that the n-gram identifiers, trained on the pairs `train`, give the levels of `test`."""
    model = NGrams(SIZE)
    model.fit(train, class_weights(train.levels, 1.0), 2e-4)
    with torch.no_grad():
        return model(*test.batch(range(len(test))))


def best_levels(log_probs, gold):
    """Of (N, M, L) log-probabilities the levels (N, M) with the biases for levels 1 and 2 that give the best macro-F1 on the gold levels
    themselves, on a grid. No identifier: what any choice of thresholds could reach at most."""
    grid = torch.arange(-6, 6.1, 0.2)
    biases = torch.cartesian_prod(torch.zeros(1), grid, grid)  # (G, L)

    def of(log_probs, gold):
        levels = (log_probs + biases[:, None]).argmax(-1)  # (G, N)
        cell = LEVELS**2 * torch.arange(len(biases))[:, None] + LEVELS * gold + levels
        counts = torch.bincount(cell.flatten(), minlength=LEVELS**2 * len(biases)).view(
            -1, LEVELS, LEVELS
        )
        return levels[f1_scores(counts)["macro_f1"].argmax()]

    return torch.stack([of(log_probs[:, m], gold[:, m]) for m in range(len(MECHANISMS))], 1)


def one_seed(folder, seed):
    """{system: {mechanism: {measure: value}}} on the test part of one split."""
    corpus = real_corpus(folder, seed)
    seen = (
        corpus.dialogues["train"] + corpus.labelled["train"] + corpus.labelled["judge_train"]
    )
    tokenizer = Tokenizer.train(
        [text for d in seen for text in (*d.context[-2:], d.response)], 5000
    )  # as emprl.py's
    parts = corpus.labelled | {
        "all": sum(
            (corpus.labelled[part] for part in ("train", "judge_train", "judge_valid")), []
        )
    }
    pairs = {part: Pairs(dialogues, tokenizer, 96, 256) for part, dialogues in parts.items()}
    systems = {"TF-IDF": baseline(parts["all"], parts["test"])}
    for name, part in (
        ("ours", "all"),
        ("ours, the reward's part", "train"),
        ("ours, the judge's part", "judge_train"),
    ):
        log_probs = ngrams(pairs[part], pairs["test"])
        systems[name] = log_probs.argmax(-1)
        if name == "ours":
            systems[CHEAT] = best_levels(log_probs, pairs["test"].levels)

    def scores(levels, m):
        table = confusion(levels[:, m], pairs["test"].levels[:, m])
        f1 = 2 * table.diagonal() / (table.sum(0) + table.sum(1)).clamp(min=1)
        return {
            **{name: f1_scores(table)[name].item() for name in MEASURES},
            **{f"f1_{k}": f1[k].item() for k in range(LEVELS)},
        }

    return {
        name: {mechanism: scores(levels, m) for m, mechanism in enumerate(MECHANISMS)}
        for name, levels in systems.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", default="data", help="the folder that `python data.py download DIR` fills"
    )
    parser.add_argument(
        "--seeds", type=int, default=5, help="how many seeds of the split, at least 1"
    )
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error("--seeds is below 1; give 1 or more")
    seeds = []
    for seed in range(options.seeds):
        seeds.append(one_seed(options.data, seed))
        for name, scores in seeds[-1].items():
            print(
                f"seed {seed}  macro-F1",
                *(f"{m} {scores[m]['macro_f1']:.3f}" for m in MECHANISMS),
                name,
                sep="  ",
                flush=True,
            )

    def mean_and_std(name, m, measure):
        values = [scores[name][m][measure] for scores in seeds]
        return statistics.mean(values), statistics.pstdev(values)

    summary = {
        name: {m: {k: mean_and_std(name, m, k) for k in seeds[0][name][m]} for m in MECHANISMS}
        for name in seeds[0]
    }
    print(
        "",
        "| | " + " | ".join(f"{m.upper()} {k}" for m in MECHANISMS for k in MEASURES) + " |",
        "| --- |" + " --- |" * 9,
        sep="\n",
    )
    for name, scores in summary.items():
        print(
            f"| {name} | "
            + " | ".join(
                "{:.3f} ({:.3f})".format(*scores[m][k]) for m in MECHANISMS for k in MEASURES
            )
            + " |"
        )
    path = Path(__file__).parent / "results" / "identifiers.json"
    path.parent.mkdir(exist_ok=True)
    path.with_suffix(".tmp").write_text(
        json.dumps({"mean_and_std": summary, "seeds": seeds}, indent=1) + "\n",
        encoding="utf-8",
    )
    os.replace(path.with_suffix(".tmp"), path)


if __name__ == "__main__":
    try:
        main()
    except (DataError, OSError) as error:
        sys.exit(print(f"identify.py: {error}", file=sys.stderr) or 2)
