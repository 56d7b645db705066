"""data.py: the generated world and its oracle, tokenizer, batches, readers, download."""

import contextlib
import csv
import errno
import hashlib
import http.server
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import socket
import ssl
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
import unicodedata
from collections import Counter
from pathlib import Path
from urllib.error import HTTPError, URLError

import numpy as np
import pytest
import sentencepiece
import torch

import data
import emprl
from conftest import check
from data import DataError, Dialogue, Tokenizer, batches, oracle_levels
from t5_small import from_pretrained, load_state
from tests.tools import official, read_lines

REAL = Path(
    os.environ.get(
        "EMPRL_DATA", Path(data.__file__).resolve().parent.parent / "shared" / "data"
    )
)
real = pytest.mark.skipif(
    not REAL.is_dir(), reason="no real data: set EMPRL_DATA to their folder"
)


@pytest.fixture(scope="module")
def corpus():
    return data.generated_corpus(seed=3, num_train=3000, num_labelled=1500)


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def tokenizer(corpus, kind):
    texts = joined(map(texts_of, corpus.dialogues["train"]))
    return Tokenizer.train(texts, 1000, kind)


def joined(lists):
    """All their elements in one list."""
    return [*itertools.chain.from_iterable(lists)]


def texts_of(dialogue):
    return [*dialogue.context, dialogue.response]


def ids_of(dialogues):
    return {dialogue.id for dialogue in dialogues}


def everything(corpus):
    return joined([*corpus.dialogues.values(), *corpus.labelled.values()])


# ---- the generated world


def test_32_emotions_with_six_situations_and_level_rule():
    assert len(data.world().emotions) == len({e.name for e in data.world().emotions}) == 32
    assert all(len(e.situations) >= 6 and len(e.feelings) >= 2 for e in data.world().emotions)
    assert Counter((e.valence, e.family) for e in data.world().emotions) == dict.fromkeys(
        itertools.product(("neg", "pos"), ("inward", "outward")), 8
    )
    assert data.modal_levels("neg", "outward", True, 1) == (2, 0, 2)
    assert data.modal_levels("neg", "inward", False, 1) == (1, 2, 1)
    assert data.modal_levels("pos", "outward", False, 3) == (0, 1, 0)
    assert data.modal_levels("pos", "inward", True, 2) == (1, 1, 1)
    for options in (
        ("neg", "pos"),
        ("inward", "outward"),
        (False, True),
        (1, 2, 3),
    ):  # every feature matters
        index = (("neg", "pos"), ("inward", "outward"), (False, True), (1, 2, 3)).index(
            options
        )
        rules = set()
        for option in options:
            features = ["neg", "outward", False, 1]
            features[index] = option
            rules.add(data.modal_levels(*features))
        assert len(rules) > 1


def test_texts_are_unambiguous():
    situations = joined(emotion.situations for emotion in data.world().emotions)
    fillings = joined(situations)  # (opener, topic)
    openers = [opener for opener, _ in fillings]
    topics = sorted({topic for topic, _ in data.world().openers.values()})
    assert {*".?!"}.isdisjoint("".join(openers))
    # No topic is the beginning of another (they would be neighbours here), else cutting helps.
    starts = [(a, b) for a, b in itertools.pairwise(topics) if f"{b} ".startswith(f"{a} ")]
    assert not starts
    for some in openers[::97]:
        same = {data._plain(topic) for opener, topic in fillings if opener == some}
        assert len(same) == 1, some
    for key, phrases in data.world().sentences.items():
        texts = [
            phrase.replace("TOPIC", "the dog").replace("FEELING", "sad") for phrase in phrases
        ]
        if key[:2] not in data.MECHANISMS:  # what a context or a filler says is of no level
            assert {oracle_levels((), text) for text in texts} == {(0, 0, 0)}, key
            continue
        assert len(phrases) >= 5
        mechanism, level = data.MECHANISMS.index(key[:2]), int(key[3])
        for phrase, text in zip(
            phrases, texts
        ):  # a phrase of one mechanism is none of another
            assert oracle_levels(("I have a dog.",), text) == tuple(
                int(m == mechanism) for m in range(3)
            ), text
            assert (level == 2) == ("TOPIC" in phrase)
    assert len(data.world().sentences["filler"]) >= 10


def test_sizes_ids_turns_and_notes(corpus):
    assert {name: len(part) for name, part in corpus.dialogues.items()} == {
        "train": 3000,
        "valid": 300,
        "test": 600,
    }
    assert {name: len(part) for name, part in corpus.labelled.items()} == {
        "train": 1500,
        "valid": 400,
        "test": 600,
        "judge_train": 1500,
        "judge_valid": 400,
    }
    assert len(corpus.notes) == 1
    ids = [d.id for d in everything(corpus)]
    assert len(ids) == len(set(ids))
    assert set(corpus.level_probs) == ids_of(joined(corpus.dialogues.values()))
    turns = Counter(len(d.context) for d in corpus.dialogues["train"])
    assert (
        set(turns) == {1, 3, 5}
        and abs(turns[1] / 3000 - 0.5) < 0.04
        and abs(turns[5] / 3000 - 0.2) < 0.04
    )
    words = [len(" ".join(d.context).split()) for d in everything(corpus)]
    assert max(words) <= 50
    assert max(len(d.response.split()) for d in everything(corpus)) <= 48


def test_no_context_occurs_twice(corpus):
    contexts = [d.context for d in everything(corpus)]
    assert len(contexts) == len(set(contexts))


def test_deterministic_and_test_part_independent_of_training_size(corpus):
    again = data.generated_corpus(seed=3, num_train=3000, num_labelled=1500)
    assert again == corpus
    small = data.generated_corpus(seed=3, num_train=10, num_labelled=10)
    assert (
        small.dialogues["test"] == corpus.dialogues["test"]
        and small.labelled["valid"] == corpus.labelled["valid"]
    )
    assert (
        data.generated_corpus(seed=4, num_train=10, num_labelled=10).dialogues["test"]
        != corpus.dialogues["test"]
    )


def test_levels_follow_level_probs(corpus):
    pairs = [(d.levels, corpus.level_probs[d.id]) for d in corpus.dialogues["train"]]
    for m in range(3):
        hits = sum(
            max(range(3), key=probs[m].__getitem__) == levels[m] for levels, probs in pairs
        )
        assert abs(hits / len(pairs) - 0.76) < 0.03
        for level in range(3):
            expected = sum(probs[m][level] for _, probs in pairs) / len(pairs)
            seen = sum(levels[m] == level for levels, _ in pairs) / len(pairs)
            assert abs(seen - expected) < 0.03 and 0.2 < seen < 0.5  # no level is rare
    for probs in joined(probs for _, probs in pairs):
        assert abs(sum(probs) - 1) < 1e-9


# ---- the oracle

FIELD = ("My dog died this week. It is too much for me.",)


@pytest.mark.parametrize(
    "response, levels",
    [
        ("My heart hurts for you over the death of your dog.", (2, 0, 0)),
        ("my heart hurts for you over the death of your dog", (2, 0, 0)),
        ("MY HEART HURTS for you over  the death of your dog !", (2, 0, 0)),
        ("My heart hurts for you over death of your dog.", (2, 0, 0)),
        ("My heart hurts for you over the death of your cat.", (1, 0, 0)),
        ("My heart hurts for you over the", (1, 0, 0)),
        ("My heart hurts for", (0, 0, 0)),
        ("I am so sorry. I am so sorry. Oh no, that is sad.", (1, 0, 0)),
        (
            "You must feel broken about the death of your dog. What happened exactly?",
            (0, 2, 1),
        ),
        ("No wonder the death of your dog makes you feel sad. I see.", (0, 2, 0)),
        ("No wonder the fire in your attic makes you feel sad.", (0, 1, 0)),
        (
            "I understand how you feel. "
            "How long have you been dealing with the death of your dog?",
            (0, 1, 2),
        ),
        ("How lovely.", (0, 0, 0)),  # said to bad news
        ("I see. Time will tell.", (0, 0, 0)),
        ("", (0, 0, 0)),
        ("dog dog dog the death of your dog", (0, 0, 0)),
        ("Wow, how lovelyish", (0, 0, 0)),
    ],
)
def test_oracle_by_hand(response, levels):
    assert oracle_levels(FIELD, response) == levels


STEPS, EXAM = "I heard steps in the kitchen at night", "I passed my math exam"


@pytest.mark.parametrize(
    "opener, response, levels",
    [
        (STEPS, "I am overjoyed for you about the steps in your kitchen.", (0, 0, 0)),
        (
            STEPS,
            "It makes me so happy to hear about the steps in your kitchen. I am so sorry.",
            (1, 0, 0),
        ),
        (STEPS, "You must feel cheerful about the steps in your kitchen.", (0, 0, 0)),
        (STEPS, "You must feel scared about the steps in your kitchen.", (0, 2, 0)),
        (STEPS, "What do you like best about the steps in your kitchen?", (0, 0, 0)),
        (EXAM, "I am overjoyed for you about the passed math exam.", (2, 0, 0)),
        (EXAM, "My heart is heavy when I think of the passed math exam.", (0, 0, 0)),
        (EXAM, "I am overjoyed for you about the steps in your kitchen.", (1, 0, 0)),
        (EXAM, "You must feel scared about the passed math exam. How lovely.", (1, 0, 0)),
        (EXAM, "I understand how you feel.", (0, 1, 0)),
        ("My dog died this week", "I understand how you feel.", (0, 1, 0)),
    ],
)
def test_oracle_hears_the_valence(opener, response, levels):
    assert oracle_levels((f"{opener}. It began last Monday.",), response) == levels


NEGATIONS = [
    "I can not say that",
    "I do not think",
    "Do not believe that",
    "It is not true that",
    "I never said",
    "I don't think",
    "I don\u2019t think",
    "I dont think",
    "Nobody would say",
    "I hardly think",
    "I cannot say",
    "It isn't so that",
]


@pytest.mark.parametrize("negation", NEGATIONS)
def test_oracle_hears_a_negation(negation):
    """Nothing counts that is negated, and everything that stands in another sentence."""
    for context, valence, topic in (
        (FIELD, "neg", "the death of your dog"),
        (("I passed my math exam. How I laughed.",), "pos", "the passed math exam"),
    ):
        feeling = {"neg": "sad", "pos": "joyful"}[valence]
        for m, mechanism in enumerate(data.MECHANISMS):
            for level in (1, 2):
                for phrase in data.world().sentences[f"{mechanism} {level} {valence}"]:
                    said = phrase.replace("TOPIC", topic).replace("FEELING", feeling)
                    expected = tuple(level * (i == m) for i in range(3))
                    assert oracle_levels(context, said) == expected
                    assert oracle_levels(context, f"{negation} {said}") == (0, 0, 0), said
                    assert oracle_levels(context, f"{negation} it. {said}") == expected
                    assert oracle_levels(context, f"{said} {negation} it.") == expected


def test_oracle_outside_its_world():
    text = "My heart hurts for you over the death of your dog."
    for context in (
        (),
        ("",),
        ("Hello there, how are you?",),
        ("My dog did something else.",),
    ):
        assert oracle_levels(context, text) == (1, 0, 0)
    assert oracle_levels(
        ("my dog died this week . it is too much for me .", "oh ?", "it is new ."), text
    ) == (2, 0, 0)


def test_oracle_reads_its_own_corpus(corpus, tokenizer):
    dialogues = everything(corpus)
    right = [oracle_levels(d.context, d.response) == d.levels for d in dialogues]
    assert np.mean(right) >= 0.995
    through = []  # the tokenizer and back
    for d in dialogues[:2000]:
        context = [tokenizer.decode(tokenizer.encode(text)) for text in d.context]
        response = tokenizer.decode(tokenizer.encode_response(d.response, 128))
        through.append(oracle_levels(context, response) == d.levels)
    assert np.mean(through) >= 0.995


def test_oracle_on_damaged_texts(corpus):
    rng = random.Random(0)
    for d in everything(corpus)[:1500]:
        words, sentences = d.response.split(), re.findall("[^.?]+[.?]", d.response)
        levels = oracle_levels(d.context, d.response)
        assert (
            oracle_levels(d.context, " ".join(rng.sample(sentences, len(sentences)))) == levels
        )
        assert oracle_levels(d.context, d.response + " " + d.response) == levels
        for worse in (
            " ".join(words[: rng.randrange(len(words) + 1)]),
            " ".join(rng.sample(words, len(words))),
            d.response[: rng.randrange(len(d.response))],
        ):
            assert all(a <= b for a, b in zip(oracle_levels(d.context, worse), levels)), (
                worse,
                d.response,
            )


def test_other_situations_count_one(corpus):
    rng = random.Random(0)
    test = corpus.dialogues["test"]
    for d in test:
        other = rng.choice(test)
        openers = [data._plain(x.context[0].split(".")[0]) for x in (d, other)]
        (topic, valences), (others, others_valences) = map(data.world().openers.get, openers)
        expected = other.levels if topic == others else tuple(min(1, n) for n in other.levels)
        if valences != others_valences:  # one phrase is of both
            expected = (0, int("I understand how you feel." in other.response), 0)
        assert oracle_levels(d.context, other.response) == expected


def test_labelled_parts_have_mismatched_responses(corpus):
    """About 8 % are of another scene: where they name its topic, the level is 1, not 2."""
    part, strong, foreign, near = corpus.labelled["train"], 0, 0, 0
    sentences = data.world().sentences
    phrases = joined(sentences[key] for key in sentences if " 2 " in key)
    marks = [re.sub("TOPIC|FEELING", "(.+)", phrase[:-1]) for phrase in phrases]
    for d in part:
        assert d.levels == oracle_levels(d.context, d.response)
        topic, _ = data.world().openers[data._plain(d.context[0].split(".")[0])]
        if any(re.search(mark, d.response) for mark in marks):
            strong += 1
            foreign += topic not in data._plain(d.response)
            near += topic not in data._plain(d.response) and topic.split()[0] in data._plain(
                d.response
            )
    assert 0.05 < foreign / strong < 0.11 and near > 0.1 * foreign


# ---- tokenizer


def test_tokenizer_ids(tokenizer):
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id) == (0, 1, 2)
    assert 500 < tokenizer.vocab_size <= 1000
    assert (
        tokenizer.sentinels[0] == tokenizer.vocab_size - 1
        and tokenizer.sentinels[99] == tokenizer.vocab_size - 100
    )
    ids = tokenizer.encode("I am so sorry.")
    assert (
        1 not in ids
        and max(ids) < tokenizer.sentinels[99]
        and tokenizer.decode(ids) == "i am so sorry."
    )


def test_tokenizer_has_every_character_of_the_world(corpus, tokenizer):
    for text in joined(map(texts_of, everything(corpus))):
        assert 2 not in tokenizer.encode(text), text


def test_decode_stops_at_eos_and_skips_padding_and_sentinels(tokenizer):
    ids = tokenizer.encode("go on.")
    assert tokenizer.decode([0, tokenizer.sentinels[3], *ids, 0, 1, *ids]) == "go on."
    assert tokenizer.decode(torch.tensor([0, *ids, 1, 0])) == "go on."
    assert tokenizer.decode([1, *ids]) == tokenizer.decode([]) == ""


def test_context_keeps_the_newest_and_marks_every_utterance(tokenizer):
    first, second = tokenizer.encode("it is new for me."), tokenizer.encode("oh?")
    whole = tokenizer.encode_context(("it is new for me.", "oh?"), 100)
    assert whole == [*first, 1, *second, 1]
    assert tokenizer.encode_context(("it is new for me.", "oh?"), len(second) + 2) == [
        1,
        *second,
        1,
    ]
    assert tokenizer.encode_context(("it is new for me.", "oh?"), 1) == [1]
    assert tokenizer.encode_context((), 10) == [1]


def test_response_always_ends(tokenizer):
    ids = tokenizer.encode("i am so sorry.")
    assert tokenizer.encode_response("i am so sorry.", 50) == [*ids, 1]
    assert tokenizer.encode_response("i am so sorry.", 3) == [*ids[:2], 1]
    assert (
        tokenizer.encode_response("i am so sorry.", 1)
        == tokenizer.encode_response("", 9)
        == [1]
    )


def test_marker_written_by_a_user_is_only_text(tokenizer):
    assert 1 not in tokenizer.encode("no </s> eos")


def test_training_is_deterministic_and_a_model_reloads(corpus, kind, tokenizer, tmp_path):
    texts = [d.response for d in corpus.dialogues["train"][:500]]
    one, two = Tokenizer.train(texts, 400, kind), Tokenizer.train(iter(texts), 400, kind)
    assert one.model == two.model and one.vocab_size <= 400
    path = tmp_path / "spiece.model"
    path.write_bytes(tokenizer.model)
    again = Tokenizer(str(path))
    assert again.model == tokenizer.model
    assert again.encode("How lovely.") == tokenizer.encode("How lovely.")


def test_t5_like_model_keeps_t5_ids(corpus):
    """T5's spiece.model: pad 0, eos 1, unk 2, sentinels not in the file; case may stay."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter([d.response for d in corpus.dialogues["train"]]),
        model_writer=model,
        vocab_size=300,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=3,
    )
    tokenizer = Tokenizer(model.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    assert tokenizer.encode("How lovely.") == pieces.EncodeAsIds("How lovely.")
    assert tokenizer.decode(tokenizer.encode("How lovely.")) == "How lovely."
    assert tokenizer.vocab_size == pieces.GetPieceSize() + 100
    assert tokenizer.sentinels[0] == tokenizer.vocab_size - 1


def test_damaged_models_are_refused(corpus, kind, tokenizer, tmp_path):
    foreign = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter([d.response for d in corpus.dialogues["train"][:200]]),
        model_writer=foreign,
        vocab_size=200,
        hard_vocab_limit=False,
        minloglevel=3,
    )
    for model in (b"", b"rubbish", tokenizer.model[:1000], foreign.getvalue(), b"\0" * 100):
        with pytest.raises(DataError, match="; train it again"):
            Tokenizer(model)
    with pytest.raises(DataError, match="none.model: cannot be read"):
        Tokenizer(tmp_path / "none.model")
    with pytest.raises(DataError, match="vocab_size"):
        Tokenizer.train(["ab"] * 3, 101, kind)
    with pytest.raises(DataError, match="vocab_size"):
        Tokenizer.train([], 500, kind)


# ---- batches


def test_pad():
    batch = data.pad([[5, 6], [7], []])
    assert batch.dtype == torch.long and batch.tolist() == [[5, 6], [7, 0], [0, 0]]
    assert data.pad([[], []]).shape == (2, 0)


@pytest.mark.parametrize("count, size", [(1, 1), (7, 3), (100, 8), (1000, 8), (1601, 16)])
def test_every_example_once_an_epoch(count, size):
    rows_at, per_epoch = (
        batches(np.random.default_rng(0).integers(1, 60, count), size, seed=5),
        -(-count // size),
    )
    for epoch in range(2):
        parts = [rows_at(epoch * per_epoch + i) for i in range(per_epoch)]
        assert sorted(joined(parts)) == list(range(count))
        assert sorted(map(len, parts))[1:] == [size] * (per_epoch - 1)


def test_batches_depend_on_seed_and_step_alone():
    lengths = list(np.random.default_rng(0).integers(1, 60, 500))  # 63 batches an epoch
    one, two, other = batches(lengths, 8, 1), batches(lengths, 8, 1), batches(lengths, 8, 2)
    steps = [200, 3, 70, 199, 0, 63]
    assert {s: one(s) for s in steps} == {s: two(s) for s in sorted(steps)}
    assert [one(i) for i in range(63)] != [one(63 + i) for i in range(63)]
    assert [one(i) for i in range(5)] != [other(i) for i in range(5)]


def test_batches_are_of_like_length():
    lengths = np.random.default_rng(0).integers(1, 100, 2000)

    def padding(parts):
        return sum(len(b) * lengths[b].max() for b in parts) / lengths.sum()

    assert (
        padding(map(batches(lengths, 8, 0), range(250)))
        < 1.06
        < 1.5
        < padding(range(i, i + 8) for i in range(0, 2000, 8))
    )


def test_no_examples():
    for lengths, size in (([], 8), ([3], 0)):
        with pytest.raises(ValueError, match="above 0"):
            batches(lengths, size, 0)


# ---- what is printed


def test_printable_shows_what_would_steer_a_terminal():
    for unsafe in (
        "\x1b[2J",  # clears the screen
        "\x9b31m",  # the same introducer in one character
        "\x07\x08\r\n\t\0\x7f",
        "\u202eevil\u202c",  # right to left from here on
        "\u2066\u2069\u200e\u200f\u061c",
        "\u2028\u2029",
        "\udc9b\ud83d",  # half surrogates, as in a file's name that is not UTF-8
    ):
        shown = data.printable(f"a{unsafe}b")
        assert shown.isprintable() and shown[0] == "a" and shown[-1] == "b"
        shown.encode()
        assert "\\" in shown, "nothing vanishes without a trace"
    for text in (
        "",
        "I am sad, caf\u00e9 \u0422\u0430\u043a!",
        "\U0001f468\u200d\U0001f469\u200d\U0001f467",
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
        "C:\\new\\table.csv",
    ):
        assert data.printable(text) == text


# ---- rubbish files: one line 'path:line: what is wrong; what to do'

RUBBISH = {
    "empty": b"",
    "blank": b" \n\n \n",
    "binary": bytes(range(256)) * 8,
    "nul": b"context,response\na\0b,c\n",
    "latin1": "context,response\ncaf\u00e9,x\n".encode("latin-1"),
    "one column": b"context\nhello\n",
    "long": b"context,response\n" + b"x" * 1_000_000 + b",y\n",
    "prose": b"This is not a table.\n",
    "header only": b"context,response\n",
    "quote": b'context,response\n"open,x\ny,z\n',
    "utf16": "\ufeffa".encode("utf-16"),
    "deep": b"[" * 90_000,
    "json list": b"[1, 2]\n",
    "json null": b"null\n",
    "json cut": b'{"context": ["a"], "resp',
    "short row": b"context,response\na\n",
    "long row": b"context,response\na,b,c\n",
    "empty response": b"context,response\na,\n",
    "empty context": b"context,response\n,b\n",
}


@pytest.mark.parametrize("name", RUBBISH)
def test_rubbish(name, tmp_path):
    (tmp_path / "epitome").mkdir()
    for path in (
        tmp_path / "x.csv",
        tmp_path / "x.jsonl",
        *(tmp_path / "epitome" / f for f in data.EPITOME_FILES),
    ):
        path.write_bytes(RUBBISH[name])
    for read, path in (
        (data.read_dialogues, tmp_path / "x.csv"),
        (data.read_dialogues, tmp_path / "x.jsonl"),
        (data.read_empathetic_dialogues, tmp_path / "x.csv"),
        (data.read_epitome, tmp_path / "epitome"),
    ):
        with pytest.raises(DataError) as error:
            read(path)
        message = str(error.value)
        assert message.count("\n") == 0 and str(path) in message and len(message) < 400
        where, _, rest = message.removeprefix(str(tmp_path)).partition(": ")
        assert where.rpartition(":")[2].isdigit() and ";" in rest, message


def test_missing_files_and_folders(tmp_path):
    for read in (
        data.read_dialogues,
        data.read_empathetic_dialogues,
        data.read_epitome,
        data.real_corpus,
    ):
        for path in (tmp_path / "none.csv", tmp_path):
            with pytest.raises(DataError, match="; "):
                read(path)
    with pytest.raises(DataError, match="python emprl.py download"):
        data.real_corpus(tmp_path / "none")


needs_pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such pipes")

READERS = {
    "own.jsonl": data.read_dialogues,
    "own.csv": data.read_dialogues,
    "ed.csv": data.read_empathetic_dialogues,
    "spiece.model": Tokenizer,
    "hashed": data.sha256,
}


@needs_pipes
def test_what_is_no_ordinary_file_is_refused_before_it_is_opened(tmp_path):
    """An idle pipe would wait for ever: so in a process that can be stopped."""
    os.mkfifo(tmp_path / "pipe.csv")
    paths = [str(tmp_path / "pipe.csv"), "/dev/zero", "/dev/null", str(tmp_path)]
    code = """
import sys, data
for read in data.read_dialogues, data.read_empathetic_dialogues, data.Tokenizer, data.sha256:
    for path in sys.argv[1:]:
        try:
            read(path)
        except data.DataError as error:
            print(error)
"""
    ended = subprocess.run(
        [sys.executable, "-c", code, *paths],
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        cwd=Path(data.__file__).parent,
    )
    endings = ["a pipe or a device; give the path of an ordinary file"] * 3
    endings += ["a folder; give the path of a file in it"]
    assert (
        ended.stdout.splitlines()
        == [f"{path}: {ending}" for path, ending in zip(paths, endings)] * 4
    )


@needs_pipes
def test_a_file_in_the_place_of_epitome_s_may_be_a_pipe(tmp_path):
    for name in data.EPITOME_FILES:
        os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match="a pipe or a device"):
        data.read_epitome(tmp_path)


@pytest.mark.parametrize("name", [name for name in READERS if name != "hashed"])
def test_a_huge_file_is_refused_by_its_size(name, tmp_path):
    with open(tmp_path / name, "wb") as file:
        file.truncate(10**13)  # 10 TB that take no room
    with pytest.raises(DataError, match="10,000,000,000,000 bytes, .* are the limit"):
        READERS[name](tmp_path / name)


@pytest.mark.parametrize("name", [name for name in READERS if name != "hashed"])
@pytest.mark.parametrize(
    "content, words",
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "a Git LFS pointer.*lfs pull",
        ),
        (b"\n<!DOCTYPE html>\n<html>", "a web page.*fetch the raw file"),
        (b"BZh91AY&SY", r"packed file \(bz2\); unpack"),
        (b"\xfd7zXZ\0\0", r"packed file \(xz\); unpack"),
        (b"\x28\xb5\x2f\xfd\x04\x00", r"packed file \(zst\); unpack"),
        (b"PAR1\x15\x04", "a parquet file; save the table as csv"),
        (pickle.dumps(["a"]), "a pickle, .*; save the table as csv"),
    ],
    ids=["git lfs", "html", "bz2", "xz", "zst", "parquet", "pickle"],
)
def test_what_is_saved_in_the_place_of_a_file_is_named(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        READERS[name](tmp_path / name)


def test_each_cause_has_its_own_remedy(tmp_path):
    with pytest.raises(DataError, match="spiece.model: .*No such file.*; check the path"):
        Tokenizer(tmp_path / "spiece.model")
    with pytest.raises(DataError, match="No such file.*; check the path"):
        data.read_dialogues(tmp_path / "none.csv")
    with pytest.raises(DataError, match="; check the path"):
        data.read_dialogues("a\0b.csv")


def test_a_message_is_one_line_and_safe_whatever_a_file_is_called(tmp_path):
    with pytest.raises(DataError) as error:
        data.read_dialogues(tmp_path / "a\n\x1b[2J\u202eb.csv")
    assert str(error.value).isprintable()


# ---- text


@pytest.mark.parametrize(
    "text",
    [
        "\U0001f468\u200d\U0001f469\u200d\U0001f467",  # a family
        "\U0001f469\U0001f3fd\u200d\U0001f4bb",  # with a colour of skin
        "\u2764\ufe0f\u200d\U0001f525",  # a heart on fire
        "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",  # England
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",  # Persian: I want
        "\u0915\u094d\u200d\u0937",  # Hindi, a half letter
        "\u0d28\u0d4d\u200d",  # Malayalam, at the end of a word
        "caf\u00e9, 5 \u20ac ...",
    ],
)
def test_clean_leaves_every_script_as_it_is(text):
    assert data.clean(f"  so {text} \n it is ") == f"so {text} it is"


@pytest.mark.parametrize(
    "invisible",
    [
        *"\0\x07\x1b\x7f\x80\x9b\x9f\xad\ufeff\ufffd\u2060\u200b",
        *"\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069",
        *"\u200c\u200d",
        "\U000e0067\U000e0062",
        "\ud800",
    ],
    ids=ascii,
)
def test_clean_takes_out_what_no_one_sees(invisible):
    assert data.clean(f"I am {invisible}sa{invisible}d{invisible}.") == "I am sad."
    assert data.clean(f" {invisible} ") == ""


def test_a_text_without_a_visible_character_is_no_text(tmp_path):
    path = tmp_path / "x.jsonl"
    for blank in ("\u3164", "\u2800", "\ufe0f", "\u200c", "\u00ad \u115f", "\u202e\u202c"):
        for context, response in ((blank, "Oh."), ("Hello.", blank)):
            path.write_text(
                json.dumps({"context": [context], "response": response}), encoding="utf-8"
            )
            with pytest.raises(
                DataError, match=":1: empty (response|utterance in the context);"
            ):
                data.read_dialogues(path)


def test_byte_order_mark_and_windows_lines(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes(b"\xef\xbb\xbfcontext,response\r\nHello. </s> Hm? </s> Bye.,Good\r\n")
    assert data.read_dialogues(path)[0].context == ("Hello.", "Hm?", "Bye.")
    path.write_bytes(
        b"\xef\xbb\xbf" + "\r\n".join([ED_HEADER, *ed_rows("c:1", "a", "b")]).encode()
    )
    assert listener_pairs(path)[0][0].response == "b"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_may_end_as_on_any_system(end, tmp_path):
    table = ["context,response", "Hello.,Hm?", '"Bye, now.",Good']
    (tmp_path / "x.csv").write_bytes(end.join([*table, ""]).encode())
    read = data.read_dialogues(tmp_path / "x.csv")
    assert [texts_of(d) for d in read] == [["Hello.", "Hm?"], ["Bye, now.", "Good"]]
    assert [d.id for d in read] == ["2/2", "3/3"]
    (tmp_path / "x.jsonl").write_bytes(end.join([GOOD, GOOD, ""]).encode())
    assert len(data.read_dialogues(tmp_path / "x.jsonl")) == 2


# ---- yours


def test_yours_jsonl_and_csv_agree(tmp_path):
    levels = {"er": 0, "ip": 1, "ex": 2}
    records = [
        {
            "context": ["Hello.", "Hm?", "It rained."],
            "response": "I see.",
            "emotion": "sad",
            **levels,
        },
        {"context": ["One, two"], "response": 'He said "no".'},
    ]
    (tmp_path / "a.jsonl").write_text(
        "\n".join(map(json.dumps, records)) + "\n\n", encoding="utf-8"
    )
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["context", "response", "emotion", "er", "ip", "ex"])
        writer.writeheader()
        writer.writerows({**r, "context": " </s> ".join(r["context"])} for r in records)
    read = data.read_dialogues(tmp_path / "a.jsonl")
    assert [(d.context, d.response, d.emotion, d.levels) for d in read] == [
        (("Hello.", "Hm?", "It rained."), "I see.", "sad", (0, 1, 2)),
        (("One, two",), 'He said "no".', "", None),
    ]
    assert [d.__dict__ | {"id": ""} for d in data.read_dialogues(tmp_path / "a.csv")] == [
        d.__dict__ | {"id": ""} for d in read
    ]
    assert len({d.id for d in read}) == 2
    (tmp_path / "b.jsonl").write_text(
        '{"context": "One </s> two", "response": "x\\u0000\\ud800 y", "er": null}',
        encoding="utf-8",
    )
    assert data.read_dialogues(tmp_path / "b.jsonl")[0].context == ("One", "two")
    assert data.read_dialogues(tmp_path / "b.jsonl")[0].response == "x y"


@pytest.mark.parametrize(
    "record, problem",
    [
        ({"context": ["a"], "response": "b", "er": 0, "ip": 1, "ex": 3}, "level '3'"),
        ({"context": ["a"], "response": "b", "er": 0, "ip": 1, "ex": -1}, "level '-1'"),
        ({"context": ["a"], "response": "b", "er": 0, "ip": 1, "ex": True}, "level 'True'"),
        ({"context": ["a"], "response": "b", "er": 0, "ip": 1, "ex": [1]}, "level"),
        ({"context": ["a"], "response": "b", "er": 0}, "1 of 3 levels"),
        ({"context": ["a"], "response": " "}, "empty response"),
        ({"context": [], "response": "b"}, "empty"),
        ({"context": ["a", ""], "response": "b"}, "empty"),
        ({"context": [1], "response": "b"}, "not a record"),
        ({"context": None, "response": "b"}, "not a record"),
        ({"context": ["a"], "response": None}, "not a record"),
        ({"context": ["a"], "response": "b", "emotion": 5}, "not a record"),
        ({"context": {"a": 1}, "response": "b"}, "not a record"),
        ({"context": ["a"], "answer": "b"}, "not a record"),
        ({"context": ["a"], "response": "b", "empotion": "sad"}, "not a record"),
    ],
)
def test_yours_names_the_line(record, problem, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(
        '{"context": ["a"], "response": "b"}\n\n' + json.dumps(record) + "\n", encoding="utf-8"
    )
    with pytest.raises(DataError) as error:
        data.read_dialogues(path)
    assert str(error.value).startswith(f"{path}:3: ") and problem in str(error.value)


@pytest.mark.parametrize(
    "value, level", [(1.0, 1), ("2 ", 2), (" 0", 0), ("2.0", 2), ("1.", 1)]
)
def test_a_level_as_table_programs_write_it(value, level, tmp_path):
    (tmp_path / "x.jsonl").write_text(
        json.dumps({"context": "a", "response": "b", "er": value, "ip": 0, "ex": 2}),
        encoding="utf-8",
    )
    (tmp_path / "x.csv").write_text(
        f"context,response,er,ip,ex\na,b,{value},0,2\n", encoding="utf-8"
    )
    for name in ("x.jsonl", "x.csv"):
        assert data.read_dialogues(tmp_path / name)[0].levels == (level, 0, 2)


@pytest.mark.parametrize(
    "value",
    ["1.5", "12", "0.1", "-0", "1e0", "\u0661", "nan", "1 2", "+1", "1.0000000000000000005"],
)
def test_what_is_no_level(value, tmp_path):
    (tmp_path / "x.csv").write_text(
        f"context,response,er,ip,ex\na,b,{value},0,2\n", encoding="utf-8"
    )
    with pytest.raises(DataError, match="x.csv:2: level .*; levels are 0, 1 or 2"):
        data.read_dialogues(tmp_path / "x.csv")


def test_the_extension_may_be_in_capitals(tmp_path):
    (tmp_path / "A.CSV").write_text("context,response\na,b\n", encoding="utf-8")
    (tmp_path / "A.JSONL").write_text('{"context": "a", "response": "b"}\n', encoding="utf-8")
    one, two = (data.read_dialogues(tmp_path / name)[0] for name in ("A.CSV", "A.JSONL"))
    assert one.context == two.context == ("a",) and one.response == two.response == "b"


TABLES = {
    "an index without a name": (
        ",context,response\n0,a,b\n",
        1,
        "not a header: column 1 has no name.*index=False",
    ),
    "a blank column": ("context,response, \na,b,\n", 1, "not a header: column 3 has no name"),
    "a column twice": (
        "context,response,response\na,b,c\n",
        1,
        "not a header: two columns 'response'",
    ),
    "a surplus column": (
        "context,response,split\na,b,c\n",
        1,
        "not a header: a column 'split'; take it out",
    ),
    "one column missing": (
        "context,answer\na,b\n",
        1,
        "not a header: no column response",
    ),
    "no header": ("I failed.,Oh no.,1,1,2\n", 1, "not a header: no column context"),
    "no header, a blank field": (
        "I failed.,Oh no.,,1\n",
        1,
        "not a header: no column context",
    ),
    "a spreadsheet's hint": (
        "sep=,\ncontext,response\na,b\n",
        1,
        "a hint .*take this line out",
    ),
    "records in JSON": (
        '{"context": ["a", "b"], "response": "c"}\n',
        1,
        "records in JSON.*call the file .jsonl",
    ),
    "a list as text": (
        "context,response\n\"['I failed.', 'Oh no.']\",b\n",
        2,
        'context is a list as text; write its utterances with " </s> " between',
    ),
    "a list in JSON as text": (
        'context,response\n"[""I failed.""]",b\n',
        2,
        "context is a list as text",
    ),
    "a separator too many": (
        "context,response\na </s> ,b\n",
        2,
        "empty utterance .*</s> that",
    ),
    "tabs": ("context\tresponse\na\tb\n", 1, "columns separated by tabs; save it with commas"),
    "semicolons": (
        "context;response\na;b\n",
        1,
        "columns separated by semicolons; save it with commas",
    ),
    "a comma without quotes": ("context,response\na,b\na,b,c\n", 3, "not 2 fields.* but 3"),
    "a quote that stays open": (
        'context,response\na,b\n"c,d\n' + "e,f\n" * 9,
        3,
        "unexpected end",
    ),
    "lines in a text": ('context,response\n"a\na\na",b\nc,\n', 5, "empty response"),
    "packed": ("PK\x03\x04", 1, "a packed file .*save the table as csv"),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_that_can_not_be_used_is_told_why_and_where(name, tmp_path):
    content, line, problem = TABLES[name]
    (tmp_path / "x.csv").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=f"x.csv:{line}: {problem}"):
        data.read_dialogues(tmp_path / "x.csv")


GOOD = '{"context": "a", "response": "b"}'
RECORDS = {
    "an array": (f"[{GOOD},\n{GOOD}]", 1, "a JSON array; write one record a line"),
    "an array over lines": (f"[\n  {GOOD}\n]", 1, "a JSON array; write one record a line"),
    "a record over lines": (
        '{\n"context": "a",\n"response": "b"}',
        1,
        "not a record in JSON.*one",
    ),
    "a table": (f"{GOOD}\na\tb\n", 2, "not a record: .*a table must be called .csv"),
    "NaN": (
        f'{GOOD}\n{{"context": "a", "response": NaN}}',
        2,
        "response is nan; write a text",
    ),
    "NaN as emotion": (
        '{"context": "a", "response": "b", "emotion": NaN}',
        1,
        "emotion is nan",
    ),
    "NaN as a level": ('{"context": "a", "response": "b", "er": NaN}', 1, "level 'nan'"),
    "a number as utterance": (
        '{"context": ["a", 1], "response": "b"}',
        1,
        "utterance of context is 1",
    ),
    "a surplus field": (
        '{"context": "a", "response": "b", "split": "c"}',
        1,
        "a field 'split'; take",
    ),
    "a field twice": (
        '{"context": "a", "response": "b", "response": "c"}',
        1,
        "two fields 'response'; take one",
    ),
    "a field missing": ('{"context": "a"}', 1, "no field response; add"),
    "cut": (f"{GOOD}\n{GOOD[:-2]}", 2, "not a record in JSON: Unterminated string"),
    "a list as id": ('{"context": "a", "response": "b", "id": []}', 1, "id is a list"),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_that_can_not_be_used_is_told_why_and_where(name, tmp_path):
    content, line, problem = RECORDS[name]
    (tmp_path / "x.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=f"x.jsonl:{line}: .*{problem}"):
        data.read_dialogues(tmp_path / "x.jsonl")


def test_nested_json_of_any_depth_is_refused(tmp_path):
    """Python's own reader gives up at some depth, its writer at another one."""
    limit = sys.getrecursionlimit()
    for depth in (10, *range(limit - 140, limit + 5, 16), 40_000):
        deep = "[" * depth + "]" * depth
        for record in (
            f'{{"context": {deep}, "response": "b"}}',
            f'{{"context": ["a", {deep}], "response": "b"}}',
            f'{{"context": "a", "response": {deep}}}',
            f'{{"context": "a", "response": "b", "emotion": {deep}}}',
            f'{{"context": "a", "response": "b", "er": {deep}, "ip": 0, "ex": 0}}',
            f'{{"context": "a", "response": "b", "id": {deep}}}',
            f'{{"context": "a", "response": "b", "other": {deep}}}',
        ):
            (tmp_path / "x.jsonl").write_text(record, encoding="utf-8")
            with pytest.raises(DataError, match="x.jsonl:1: .*; "):
                data.read_dialogues(tmp_path / "x.jsonl")


# ---- a corpus of yours


def write_own(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def conversation(number, turns, **more):
    """A record for each listener turn, as one has them who has unrolled conversations."""
    said = [f"This is conversation {number}."] + [f"{number}, {i}." for i in range(2 * turns)]
    rng = random.Random(number)
    records = []
    for i in range(turns):
        levels = {name: rng.randrange(3) for name in data.MECHANISMS}
        texts = {"context": said[: 2 * i + 1], "response": said[2 * i + 1]}
        records.append({**texts, **levels, **more})
    return records


def conversations(count, turns=1):
    """The records of several."""
    return joined(conversation(number, turns) for number in range(count))


def parts_of(corpus):
    """The five labelled parts; the policy's three are made of the same dialogues."""
    assert corpus.dialogues["valid"] == corpus.labelled["valid"]
    assert corpus.dialogues["test"] == corpus.labelled["test"]
    learnt = joined(corpus.labelled[part] for part in ("train", "judge_train", "judge_valid"))
    assert sorted(d.id for d in corpus.dialogues["train"]) == sorted(d.id for d in learnt)
    return corpus.labelled


def nothing_shared(parts, what):
    seen = [set(map(what, part)) for part in parts.values()]
    assert all(seen)
    assert not any(a & b for a, b in itertools.combinations(seen, 2))


@pytest.mark.parametrize("seed", range(5))
def test_own_conversations_and_equal_records_stay_in_one_part(seed, tmp_path):
    """The judge sees nothing of the reward's data, nobody anything of the test part."""
    rng = random.Random(seed)
    records = joined(conversation(n, rng.choice((1, 2, 3, 5))) for n in range(40))
    again = [rng.choice(records) | {"er": 0} for _ in range(20)]  # with other levels, perhaps
    records += [r | {"response": r["response"].upper() + " "} for r in again]  # and other case
    rng.shuffle(records)
    corpus = data.own_corpus(write_own(tmp_path / "x.jsonl", records), seed)
    parts = parts_of(corpus)
    assert sum(map(len, parts.values())) == len(records)
    nothing_shared(parts, lambda d: d.context[0])
    assert "dialogues of 40 conversations" in corpus.notes[0]
    assert "20 records equal to an earlier one" in corpus.notes[1]


def test_own_conversations_by_id(tmp_path):
    """All begin alike, so the first utterance tells nothing; the id does, and joins others."""
    records = joined(conversation(n, 2, id=f"a long name, {n // 2}") for n in range(60))
    for record in records:
        record["context"] = ["Hello.", *record["context"]]
    corpus = data.own_corpus(write_own(tmp_path / "x.jsonl", records))
    nothing_shared(parts_of(corpus), lambda d: int(d.context[1].split()[-1][:-1]) // 2)
    assert "of 30 conversations" in corpus.notes[0]
    for record in records:
        del record["id"]
    with pytest.raises(
        DataError, match="120 dialogues of 1 conversations .*50 dialogues from 20"
    ):
        data.own_corpus(write_own(tmp_path / "x.jsonl", records))


def test_own_equal_records_join_conversations_with_different_ids(tmp_path):
    """A chain: each conversation has a record of the one before, so all of a chain are one."""
    records = []
    for n in range(100):
        records += conversation(n, 1, id=n)
        records += conversation(n - 1, 1, id=n) if n % 4 else []
    corpus = data.own_corpus(write_own(tmp_path / "x.jsonl", records))
    nothing_shared(parts_of(corpus), lambda d: int(d.context[0].split()[-1][:-1]) // 4)
    assert "of 25 conversations" in corpus.notes[0] and "75 records equal" in corpus.notes[1]


def lines_of_conversations(path, *rows):
    """For each row of a csv with ids: the line where its conversation begins."""
    path.write_text("\n".join(["id,context,response", *rows]), encoding="utf-8")
    return [int(dialogue.id.partition("/")[0]) for dialogue in data.read_dialogues(path)]


def test_own_ids_in_a_csv(tmp_path):
    rows = ["7,Hi.,A", "8,Hi.,B", "7,Hi. </s> A </s> Go on.,C", ",Bye.,D", ",bye.,E"]
    assert lines_of_conversations(tmp_path / "x.csv", *rows) == [2, 3, 2, 5, 5]


def test_own_ids_are_one_however_they_are_written(tmp_path):
    rows = ["C1,a,b", '"c1 ",c,d', "1,e,f", "1.0,g,h", "\uff43\uff11,i,j", "10,k,l"]
    assert lines_of_conversations(tmp_path / "x.csv", *rows) == [2, 2, 4, 4, 2, 7]
    records = [
        {"context": str(n), "response": "a", "id": name}
        for n, name in enumerate([3, 3.0, "3", "3 ", 30])
    ]
    read = data.read_dialogues(write_own(tmp_path / "x.jsonl", records))
    assert [d.id.partition("/")[0] for d in read] == ["1", "1", "1", "1", "5"]


def test_own_record_without_id_is_of_the_conversation_that_begins_like_it(tmp_path):
    """It may be of either when two begin alike, so these are kept together, too."""
    rows = ["7,Hi.,A", "8,Oh.,B", "9,Oh.,C", ",Hi. </s> A </s> So?,D", "7,Yes?,E"]
    assert lines_of_conversations(tmp_path / "x.csv", *rows) == [2, 3, 4, 2, 2]
    both = lines_of_conversations(tmp_path / "x.csv", *rows, ",Oh. </s> B </s> So?,F")
    assert both == [2, 3, 3, 2, 2, 3]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize(
    "text", ["Caf\u00e9.", "\uff27\uff4f.", "A \ufb01ne day.", "Stra\u00dfe."]
)
def test_own_texts_are_equal_however_they_are_written(text, form, tmp_path):
    plain = unicodedata.normalize("NFKC", text).casefold()
    other = unicodedata.normalize(form, text.upper())
    rows = [f"1,{text},One.", "2,Two.,Two.", f"3,{plain},One.", f"4,{other},ONE."]
    assert lines_of_conversations(tmp_path / "x.csv", *rows) == [2, 3, 2, 2]
    rows = [f",{text},One.", ",Two.,Two.", f",{other},Three."]
    assert lines_of_conversations(tmp_path / "x.csv", *rows) == [2, 3, 2]


@pytest.mark.parametrize("count", range(20, 90))
def test_own_parts_are_never_empty(count):
    dialogues = [Dialogue(("a",), "b", "", (0, 0, 0), f"{i}/{i}") for i in range(count)]
    parts = data.split_labelled(dialogues, 0)
    assert all(parts.values()) and sum(map(len, parts.values())) == count


def test_own_levels_that_never_differ_are_noted(tmp_path):
    records = [record | {"ip": 2} for record in conversations(60)]
    notes = data.own_corpus(write_own(tmp_path / "x.jsonl", records)).notes
    assert [note.partition(": ")[2] for note in notes[1:]] == [
        "ip is 2 everywhere, nothing to learn from"
    ]


def test_own_dialogue_without_levels_is_named_by_its_line(tmp_path):
    records = conversations(60)
    for name in data.MECHANISMS:
        del records[36][name]
    with pytest.raises(DataError, match="x.jsonl:37: no levels; training needs"):
        data.own_corpus(write_own(tmp_path / "x.jsonl", records))
    with pytest.raises(DataError, match="x.jsonl: 30 dialogues .*needs at least 50"):
        data.own_corpus(write_own(tmp_path / "x.jsonl", records[:30]))


# ---- EmpatheticDialogues


def listener_pairs(path):
    """The listener's responses of a file, and the note."""
    dialogues, note = data.read_empathetic_dialogues(path)
    return data.listeners(dialogues), note


ED_HEADER = "conv_id,utterance_idx,context,prompt,speaker_idx,utterance,selfeval,tags"


def ed_rows(conversation, *utterances, emotion="proud", end=","):
    return [
        f"{conversation},{i},{emotion},A situation.,{i % 2},{text},{end}"
        for i, text in enumerate(utterances, 1)
    ]


def read_ed(tmp_path, *rows):
    (tmp_path / "ed.csv").write_text("\n".join([ED_HEADER, *rows]) + "\n", encoding="utf-8")
    return listener_pairs(tmp_path / "ed.csv")


def test_ed_pairs_quotes_and_commas(tmp_path):
    dialogues, note = read_ed(
        tmp_path,
        *ed_rows("hit:0_conv:1", 'I said "yes_comma_ dear', "Oh?", "True.", 'And "then'),
        *ed_rows("hit:1_conv:2", "One", "Two", "Three", end=",a|b|c", emotion="sad"),
    )  # 9 fields
    assert dialogues == [
        Dialogue(('I said "yes, dear',), "Oh?", "proud", None, "hit:0_conv:1/2"),
        Dialogue(
            ('I said "yes, dear', "Oh?", "True."), 'And "then', "proud", None, "hit:0_conv:1/4"
        ),
        Dialogue(("One",), "Two", "sad", None, "hit:1_conv:2/2"),
    ]
    assert note == f"{tmp_path / 'ed.csv'}: 3 pairs"


def test_ed_bad_rows_cut_their_conversation(tmp_path):
    ragged = ed_rows("c:1", "a", "b", "c", "d", "e", "f")
    ragged[3] = (
        "c:1,4,proud,A situation.,0,too,many,fields,in,it"  # line 5: it and the two after it
    )
    empty = ed_rows("c:2", "a", " ", "c", "d")  # three rows
    gap = ed_rows("c:3", "a", "b", "c", "d")
    del gap[2]  # 1, 2, 4: the last row
    rows = [
        *ragged,
        *empty,
        *gap,
        "c:4,1,short",
        *ed_rows("c:5", "a", "b"),
        *ed_rows("c:1", "x", "y"),
    ]  # and it comes back: two rows
    good = many_ed_rows(2020)[20:]
    dialogues, note = read_ed(tmp_path, *rows, *good)
    assert [d.id for d in dialogues if d.id[0] == "c"] == ["c:1/2", "c:3/2", "c:5/2"]
    assert note.endswith(
        "; 10 rows skipped, the first in line 5: fields too many, empty, missing or out of place"
    )
    with pytest.raises(DataError, match=":5: fields too many.* first of 10 rows of 1998 "):
        read_ed(tmp_path, *rows, *good[:-20])  # more than 0.5 %


@pytest.mark.parametrize(
    "change, found",
    [
        (lambda rows: rows[::-1], "2: utterance 4 where 1 should be"),
        (lambda rows: sorted(rows * 2), "3: utterance 1 where 2 should be"),
        (
            lambda rows: random.Random(0).sample(rows, len(rows)),
            "2: utterance . where 1 should",
        ),
        (lambda rows: rows[1::2], "2: utterance 2 where 1 should be"),
    ],
    ids=["reversed", "doubled", "shuffled", "listener only"],
)
def test_ed_out_of_order_is_told_so(change, found, tmp_path):
    with pytest.raises(DataError, match=f"ed.csv:{found}.* missing, doubled or out of order"):
        read_ed(tmp_path, *change(many_ed_rows(400)))


@pytest.mark.parametrize(
    "header",
    [
        ED_HEADER.replace(",", "\t"),
        ED_HEADER.replace(",", ";"),
        f",{ED_HEADER}",
        '"' + ED_HEADER.replace(",", '","') + '"',
    ],
)
def test_ed_with_another_header_is_to_be_fetched_again(header, tmp_path):
    (tmp_path / "ed.csv").write_text(f"{header}\n{ed_rows('c', 'a')[0]}\n", encoding="utf-8")
    with pytest.raises(DataError, match="ed.csv:1: not the header .*; fetch the file again"):
        data.read_empathetic_dialogues(tmp_path / "ed.csv")


def many_ed_rows(count):
    """Rows of conversations of four utterances; with quotes and commas, as in the original."""
    texts = (
        'He said "no_comma_ never" to me',
        "Oh_comma_ why?",
        "I do not know.",
        '"Hm" he says',
    )
    rows = joined(ed_rows(f"hit:{i}_conv:{i}", *texts) for i in range(count // 4))
    return [row.replace("A situation.", 'I asked_comma_ he said "no"') for row in rows]


def with_commas(fields):
    return [text.replace("_comma_", ",") for text in fields]


REWRITTEN = {  # how programs write a file that they have read
    "real commas, quoted": lambda rows: [*map(with_commas, rows)],
    "quotes doubled": lambda rows: rows,
    "an utterance's comma alone": lambda rows: [
        [*row[:5], row[5].replace("_comma_", ",").replace('"', ""), *row[6:]] for row in rows
    ],
    "all rows shifted": lambda rows: [[*row[:4], "", *row[4:]][:8] for row in rows],
    "no numbers": lambda rows: [[*row[:4], "speaker", *row[5:]] for row in rows],
    "a ninth field": lambda rows: [[*row, "unnamed"] for row in rows],
}


@pytest.mark.parametrize("change", REWRITTEN)
def test_ed_rewritten_by_a_table_program_is_refused(change, tmp_path):
    """Else half the pairs are lost, and others have cut texts or another column's."""
    rows = [row.split(",") for row in many_ed_rows(400)]
    assert len(read_ed(tmp_path, *map(",".join, rows))[0]) == 200
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(REWRITTEN[change](rows))
    with pytest.raises(DataError, match=r"ed.csv:[235]: (quotes|fields|utterance) .*; fetch "):
        read_ed(tmp_path, *text.getvalue().splitlines())


@pytest.mark.parametrize("read", [csv.reader, lambda rows: [row.split(",") for row in rows]])
def test_ed_with_few_quotes_rewritten_is_refused(read, tmp_path):
    """One text in a hundred has quotes, as in the original: the others are written as before."""
    rows = [row.replace('"', "") for row in many_ed_rows(2000)]
    for at in range(70, 2000, 100):
        rows[at] = many_ed_rows(2000)[at]
    assert len(read_ed(tmp_path, *rows)[0]) == 1000
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(read(rows))
    with pytest.raises(DataError, match="ed.csv:72: quotes doubled.*; fetch it again"):
        read_ed(tmp_path, *text.getvalue().splitlines())


def test_ed_cut_short_is_refused_wherever_the_cut_is(tmp_path):
    """Within a row, that is: a file cut at the end of a row is a shorter file."""
    whole = "\n".join([ED_HEADER, *many_ed_rows(2000)]) + "\n"
    last = whole.rstrip("\n").rfind("\n") + 1
    for end in [*range(last + 1, len(whole) - 2)]:
        (tmp_path / "ed.csv").write_text(whole[:end], encoding="utf-8")
        with pytest.raises(DataError, match="ed.csv:2001: .*cut short; fetch it again"):
            data.read_empathetic_dialogues(tmp_path / "ed.csv")
    (tmp_path / "ed.csv").write_text(
        whole[:-1], encoding="utf-8"
    )  # only the last end of line is missing
    assert len(listener_pairs(tmp_path / "ed.csv")[0]) == 1000


@real
def test_ed_real_rewritten_is_refused(tmp_path):
    for part in ("valid", "test"):
        lines = (
            (REAL / "empatheticdialogues" / f"{part}.csv")
            .read_text(encoding="utf-8")
            .splitlines()
        )
        rows = [line.split(",") for line in lines]
        for rewritten in (rows, map(with_commas, rows)):
            with open(tmp_path / f"{part}.csv", "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(rewritten)
            with pytest.raises(DataError, match=r"csv:\d+: quotes doubled"):
                data.read_empathetic_dialogues(tmp_path / f"{part}.csv")


@real
def test_ed_real_counts():
    """The listener's pairs. All utterances can be used, so nothing is cut."""
    for name, pairs in (("valid", 4880), ("test", 4463), ("train", 34225)):
        dialogues, note = listener_pairs(REAL / "empatheticdialogues" / f"{name}.csv")
        assert len(dialogues) == pairs, note
        assert len({d.emotion for d in dialogues}) == 32 and all(
            len(d.context) % 2 for d in dialogues
        )
        assert len({d.id for d in dialogues}) == pairs


# ---- EPITOME


def write_epitome(folder, rows, change=None):
    """rows: (sp_id, rp_id, seeker, response, (er, ip, ex)); change(file, row, fields)."""
    folder.mkdir(exist_ok=True)
    for m, name in enumerate(data.EPITOME_FILES):
        with open(folder / name, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)  # CRLF and quotes where needed, as in the originals
            writer.writerow(
                ["sp_id", "rp_id", "seeker_post", "response_post", "level", "rationales"]
            )
            for i, (seeker, responder, post, answer, levels) in enumerate(rows):
                fields = [seeker, responder, post, answer, levels[m], ""]
                writer.writerow(change(m, i, fields) if change else fields)


POSTS = [  # a tie, a majority, texts to clean, a response without any text
    ("s1", "r1", "Rain, &amp;amp; wind", 'He said\n"go"  &gt;&#x200B; on\ufffd', (0, 1, 2)),
    ("s2", "r2", "a", "b", (0, 0, 0)),
    ("s2", "r2", "a", "b", (0, 0, 2)),
    ("s2", "r2", "a", "b", (0, 0, 2)),
    ("s2", "r3", "a", "c", (1, 0, 0)),
    ("s2", "r3", "a", "c", (0, 0, 0)),
    ("s3", "r4", "a", "d", (1, 1, 1)),
    ("s3", "r4", "a", "d", (1, 1, 1)),
    ("s4", "r5", "a", "&#x200B;", (0, 0, 0)),
]


def test_epitome_join_cleaning_and_duplicates(tmp_path):
    def other_texts(file, row, fields):
        """As in the original, the texts of the three files differ a little."""
        speaker, responder, post, _, *rest = fields
        if file == 0:
            return fields
        return [speaker, responder, post + "  ", "other text", *rest]

    write_epitome(tmp_path, POSTS, other_texts)
    dialogues, note = data.read_epitome(tmp_path)
    assert dialogues == [
        Dialogue(("Rain, & wind",), 'He said "go" > on', "", (0, 1, 2), "s1/r1"),
        Dialogue(("a",), "b", "", (0, 0, 2), "s2/r2"),  # majority
        Dialogue(("a",), "c", "", (1, 0, 0), "s2/r3"),  # tie: the first row
        Dialogue(("a",), "d", "", (1, 1, 1), "s3/r4"),
    ]
    assert (
        "4 pairs from 9 rows; 1 pairs without text skipped; of 2 levels in conflict "
        "1 settled by majority, 1 ties by the first row" in note
    )


@pytest.mark.parametrize(
    "change, file, line, problem",
    [
        (lambda m, i, f: [*f[:4], 3, ""] if (m, i) == (1, 2) else f, 1, 4, "level '3'"),
        (lambda m, i, f: [*f[:4], "", ""] if (m, i) == (2, 0) else f, 2, 2, "level ''"),
        (lambda m, i, f: ["other", *f[1:]] if (m, i) == (2, 1) else f, 2, 3, "pair other/r1"),
        (lambda m, i, f: f[:3] if (m, i) == (0, 1) else f, 0, 3, "not 6 fields"),
        (lambda m, i, f: ["", *f[1:]], 0, 2, "sp_id or rp_id is empty; fetch"),
        (
            lambda m, i, f: [f[0], " ", *f[2:]] if i == 3 else f,
            0,
            5,
            "sp_id or rp_id is empty",
        ),
    ],
)
def test_epitome_errors_name_file_and_line(change, file, line, problem, tmp_path):
    write_epitome(
        tmp_path, [(f"s{i}", f"r{i}", "a", "b", (0, 1, 2)) for i in range(4)], change
    )
    with pytest.raises(DataError) as error:
        data.read_epitome(tmp_path)
    where = f"{tmp_path / data.EPITOME_FILES[file]}:{line}: "
    assert str(error.value).startswith(where) and problem in str(error.value)


def test_epitome_files_of_different_length(tmp_path):
    write_epitome(tmp_path, [(f"s{i}", "r", "a", "b", (0, 1, 2)) for i in range(4)])
    path = tmp_path / data.EPITOME_FILES[1]
    path.write_bytes(b"\r\n".join(path.read_bytes().split(b"\r\n")[:-2]) + b"\r\n")
    wrong = f"{data.EPITOME_FILES[0]}: 4 rows, but 3 in .*{data.EPITOME_FILES[1]}; fetch both"
    with pytest.raises(DataError, match=wrong):
        data.read_epitome(tmp_path)


@pytest.mark.parametrize("copied, of", itertools.permutations(range(3), 2))
def test_epitome_one_file_under_two_names(copied, of, tmp_path):
    write_epitome(tmp_path, [(f"s{i}", "r", "a", "b", (0, 1, 2)) for i in range(4)])
    names = data.EPITOME_FILES
    (tmp_path / names[copied]).write_bytes((tmp_path / names[of]).read_bytes())
    first, second = sorted((copied, of))
    with pytest.raises(
        DataError, match=f"{names[first]}:1: the same .*{names[second]}; fetch"
    ):
        data.read_epitome(tmp_path)


def write_published(folder, posts):
    """A folder as `download` leaves it, with few dialogues."""
    (folder / "empatheticdialogues").mkdir()
    for part in ("train", "valid", "test"):
        text = "\n".join([ED_HEADER, *many_ed_rows(40)]) + "\n"
        (folder / "empatheticdialogues" / f"{part}.csv").write_text(text, encoding="utf-8")
    write_epitome(folder / "epitome", posts)


def test_real_corpus_needs_pairs_for_every_part(tmp_path, capsys):
    """Told before any training: else MLE has been trained when the classifiers find nothing."""
    posts = [(f"s{i}", "r", f"a {i}", "b", (0, 1, 2)) for i in range(40)]
    write_published(tmp_path, posts)
    assert all(data.real_corpus(tmp_path).labelled.values())
    write_epitome(tmp_path / "epitome", posts[:5])
    with pytest.raises(DataError, match="epitome: 5 pairs are too few; .*emprl.py download"):
        data.real_corpus(tmp_path)
    run = ["run", "--preset", "real", "--data", str(tmp_path), "--run", str(tmp_path / "run")]
    assert emprl.main(run) == 2
    assert "5 pairs are too few" in capsys.readouterr().err
    assert not list(tmp_path.glob("run/**/*.pt"))


@pytest.mark.parametrize(
    "file, content, problem",
    [
        ("epitome/explorations-reddit.csv", b"caf\xe9\n", ":1: not text in UTF-8"),
        ("epitome/explorations-reddit.csv", b"sp_id,level\na,1\n", ":1: .*no column rp_id"),
        ("epitome/explorations-reddit.csv", b"\n", ":1: empty file"),
        ("empatheticdialogues/valid.csv", b"\x1f\x8b\x08", ":1: a packed file"),
        ("empatheticdialogues/valid.csv", f"{ED_HEADER}\na,1".encode(), ":2: .*cut short"),
    ],
)
def test_a_published_file_is_fetched_again_whatever_is_wrong(file, content, problem, tmp_path):
    posts = [(f"s{i}", "r", f"a {i}", "b", (0, 1, 2)) for i in range(40)]
    write_published(tmp_path, posts)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError, match=f"{file}{problem}") as error:
        data.real_corpus(tmp_path)
    what_to_do = str(error.value).rpartition("; ")[2]
    assert what_to_do == f"`python emprl.py download {tmp_path}` fetches what was published"


FEW_STEPS = {
    "real": """data.vocab_size=180 pretrain.steps=1 mle.steps=2 mle.batch_size=4
        identifiers.size=64 ppo.steps=1 ppo.batch_size=4 ppo.minibatch_size=4
        exploring.max_length=9 replying.max_length=9""",
    "paper": """mle.lr=1e-2 identifiers.steps=1 context.steps=1 ppo.steps=1 ppo.ppo_epochs=1
        ppo.batch_size=4 ppo.minibatch_size=4""",
}


def run_on_published(preset, folder, *options):
    """The folder of a short run of a preset, on 10 conversations a part and 40 posts."""
    posts = []
    for i in range(40):
        levels = (i % 3, i // 3 % 3, i // 9 % 3)
        posts.append((f"s{i}", "r", f"I lost {i} things.", f"Why {i}? I am sorry.", levels))
    write_published(folder, posts)
    run = folder / "run"
    words = ["--preset", preset, "--data", str(folder), "--run", str(run), *options, "--set"]
    settings = f"eval.contexts=4 eval.best_of=1 {FEW_STEPS[preset]}"
    assert emprl.main([*words, *settings.split()]) == 0
    assert (run / "report.md").stat().st_size > 0
    return run


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch 2.9 has it")
def test_real_from_published_files_to_the_report(tmp_path, no_pictures):
    run = run_on_published("real", tmp_path)
    log = [record["stage"] for record in read_lines(run / "metrics.jsonl")]
    stages = {"pretrain": 1, "mle": 2, "identifiers": 1, "judge": 1, "context": 1, "ppo": 1}
    assert Counter(log) == stages


def test_paper_from_published_files_to_the_report(finished, tmp_path, no_pictures):
    """Three passes of MLE; the identifiers start from the folder's T5, not from MLE's."""
    run = run_on_published("paper", tmp_path, "--t5", official(tmp_path / "t5", finished))
    log = Counter(record["stage"] for record in read_lines(run / "metrics.jsonl"))
    pairs = len(data.real_corpus(tmp_path).dialogues["train"])
    assert log["mle"] == 3 * math.ceil(pairs / 8) > 3
    assert log["identifiers-er"] == log["judge-ex"] == log["context-ip"] == 1

    state = load_state(run / "checkpoints" / "identifiers-ip.pt")["weights"]
    embeddings = state["encoders.0.context_encoder.shared.weight"]  # after one small step
    for folder, is_start in ((tmp_path / "t5", True), (run / "mle", False)):
        moved = (embeddings - from_pretrained(folder).shared.weight).abs().max()
        assert (moved < 1e-4) == is_start, folder


def conversations_of(dialogues):
    """What stands before the "/" of their ids: in EPITOME the speaker."""
    return {dialogue.id.partition("/")[0] for dialogue in dialogues}


def test_split_labelled_by_seeker():
    dialogues = [
        Dialogue(("a",), "b", "", (0, 0, 0), f"s{i % 1000}/r{i}") for i in range(1300)
    ]
    parts = data.split_labelled(dialogues, seed=0)
    seekers = {name: conversations_of(part) for name, part in parts.items()}
    assert {name: len(s) for name, s in seekers.items()} == {
        "train": 375,
        "judge_train": 337,
        "judge_valid": 38,
        "valid": 50,
        "test": 200,
    }
    assert not any(a & b for a, b in itertools.combinations(seekers.values(), 2))
    shared_out = joined(parts.values())
    assert len(shared_out) == len(dialogues) and ids_of(shared_out) == ids_of(dialogues)
    again = data.split_labelled(dialogues[::-1], seed=0)
    assert again.keys() == parts.keys()
    assert all(ids_of(again[name]) == ids_of(parts[name]) for name in parts)
    assert data.split_labelled(dialogues, seed=1) != parts


@real
def test_real_corpus():
    corpus = data.real_corpus(REAL)
    labelled = joined(corpus.labelled.values())
    # 3,023 distinct pairs in the original; empty responses are left out and counted
    assert 3015 <= len(labelled) <= 3023 and any("3084 rows" in note for note in corpus.notes)
    assert all(d.levels and d.response and all(d.context) for d in labelled)
    assert {*"\u200b\ufffd\n"}.isdisjoint("".join(joined(map(texts_of, labelled))))
    assert (
        set(corpus.dialogues) == {"train", "valid", "test", "pretrain"}
        and corpus.level_probs == {}
        and len(corpus.notes) == 4
    )


@real
def test_texts_for_pretraining_are_of_the_training_parts_only():
    """Both speakers' turns of the training conversations and the labelled training pairs."""
    corpus = data.real_corpus(REAL)
    pretrain, train = corpus.dialogues["pretrain"], corpus.dialogues["train"]
    assert ids_of(train) < ids_of(pretrain), "each of them, and the speakers' turns beside"
    allowed = conversations_of(train)
    talks = [d for d in pretrain if d.levels is None]
    assert conversations_of(talks) == allowed
    learnt = corpus.labelled["train"] + corpus.labelled["judge_train"]
    assert [d for d in pretrain if d.levels] == learnt
    kept_out = conversations_of(corpus.dialogues["valid"] + corpus.dialogues["test"])
    assert not kept_out & allowed
    assert sum(len(d.context) % 2 == 0 for d in talks) > 20_000


# ---- download, from a server on this machine


class Files(http.server.BaseHTTPRequestHandler):
    """Serves what the fixture `server` has."""

    def do_GET(self):
        state = self.server.state
        state["log"].append((self.path, self.headers.get("Range")))
        if self.path in state["moved"]:
            self.send_response(302)
            self.send_header("Location", state["moved"][self.path])
            self.end_headers()
        elif self.path not in state["files"]:
            self.send_error(404)
        else:
            self.send_file(state["files"][self.path], state)

    def send_file(self, body, state):
        start = 0
        if state["ranges"] and self.headers.get("Range"):
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        if start >= len(body) > 0:
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        for at in range(start, len(body), 100_000):
            self.wfile.write(body[at : at + 100_000][: state["limit"]])
            time.sleep(state["pause"])
            if state["limit"]:
                break

    def log_message(self, *args):
        pass


class Server(http.server.ThreadingHTTPServer):
    def handle_error(self, request, address):
        """Nothing: a traceback of a client that hung up would stand in a later test's stderr."""


@contextlib.contextmanager
def serving(handler):
    """A server on a free port of this machine, and its address."""
    httpd = Server(("127.0.0.1", 0), handler)
    often = {"poll_interval": 0.01}
    threading.Thread(target=httpd.serve_forever, kwargs=often, daemon=True).start()
    try:
        yield httpd, f"http://127.0.0.1:{httpd.server_address[1]}"
    finally:
        httpd.shutdown()
        httpd.server_close()


@pytest.fixture
def server():
    """`files` {path: bytes}; `log` of (path, Range); `limit` bytes before it hangs up."""
    with serving(Files) as (httpd, url):
        httpd.state = {"url": url, "files": {}, "moved": {}, "log": []}
        httpd.state.update(ranges=True, limit=None, pause=0)
        yield httpd.state


BODY = bytes(i * 7 % 251 for i in range(300_000))


def source(server, body=BODY, members=(), digest=None):
    server["files"]["/f"] = body
    return [
        (
            server["url"] + "/f",
            "sub/f.csv",
            digest or hashlib.sha256(body).hexdigest(),
            list(members),
        )
    ]


def test_download_then_nothing_to_do(server, tmp_path):
    lines = []
    sources = source(server)
    data.download(tmp_path / "new", sources, lines.append)
    assert (tmp_path / "new/sub/f.csv").read_bytes() == BODY and os.listdir(
        tmp_path / "new/sub"
    ) == ["f.csv"]
    assert any(f"{len(BODY):,} of {len(BODY):,} bytes" in line for line in lines)
    data.download(tmp_path / "new", sources, lines.append)
    assert server["log"] == [("/f", None)] and "already there" in lines[-1]


@pytest.mark.parametrize("ranges", [True, False])
def test_download_goes_on_after_a_cut(ranges, server, tmp_path):
    server.update(limit=100_000, ranges=ranges)
    sources = source(server)
    with pytest.raises(
        DataError, match="cut off at 100000 of 300000|IncompleteRead|same command"
    ):
        data.download(tmp_path, sources, str)
    assert (
        os.listdir(tmp_path / "sub") == ["f.csv.part"]
        and (tmp_path / "sub/f.csv.part").stat().st_size == 100_000
    )
    server["limit"] = None
    data.download(tmp_path, sources, str)
    assert (tmp_path / "sub/f.csv").read_bytes() == BODY
    assert server["log"] == [("/f", None), ("/f", "bytes=100000-")]


def test_download_follows_a_redirection(server, tmp_path):
    sources = source(server)
    server["moved"]["/f"], server["files"]["/g"] = "/g", BODY
    data.download(tmp_path, sources, str)
    assert (tmp_path / "sub/f.csv").read_bytes() == BODY and [
        path for path, _ in server["log"]
    ] == ["/f", "/g"]


def test_download_slow_and_stalled(server, tmp_path, monkeypatch):
    """A slow server is waited for, a silent one is given up; what came is kept."""
    urlopen = data.urlopen
    monkeypatch.setattr(
        data, "urlopen", lambda request, timeout: urlopen(request, timeout=0.5)
    )
    server["pause"] = 0.1
    data.download(tmp_path / "slow", source(server), str)
    assert (tmp_path / "slow/sub/f.csv").read_bytes() == BODY
    server["pause"] = 1.0
    with pytest.raises(DataError, match="timed out; run the same command again"):
        data.download(tmp_path / "stalled", source(server), str)
    server["pause"] = 0
    data.download(tmp_path / "stalled", source(server), str)
    assert (tmp_path / "stalled/sub/f.csv").read_bytes() == BODY


def test_download_finished_part_needs_no_server(server, tmp_path):
    sources = source(server)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/f.csv.part").write_bytes(BODY)
    data.download(tmp_path, sources, str)
    assert (tmp_path / "sub/f.csv").read_bytes() == BODY and server["log"] == []


def test_download_part_of_something_else_starts_over(server, tmp_path):
    sources = source(server)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/f.csv.part").write_bytes(BODY + b"more")  # the server has no rest: 416
    with pytest.raises(DataError, match="SHA-256 differs; run the same command again"):
        data.download(tmp_path, sources, str)
    data.download(tmp_path, sources, str)
    assert (tmp_path / "sub/f.csv").read_bytes() == BODY


def test_download_wrong_hash(server, tmp_path):
    """Nothing of it is kept, and nothing unpacked."""
    body = archive(("d/a.csv", b"A"))
    with pytest.raises(DataError, match="SHA-256 differs.*with a browser"):
        data.download(tmp_path, source(server, body, ["d/a.csv"], digest="0" * 64), str)
    assert os.listdir(tmp_path) == ["sub"] and os.listdir(tmp_path / "sub") == []


def test_download_refused_and_missing(server, tmp_path):
    with pytest.raises(DataError, match="404"):
        data.download(tmp_path, [(server["url"] + "/none", "f.csv", "0" * 64, [])], str)
    with pytest.raises(DataError, match="refused"):
        data.download(tmp_path, [("http://127.0.0.1:1/f", "f.csv", "0" * 64, [])], str)
    assert os.listdir(tmp_path) == []


def archive(*entries):
    """A .tar.gz of (name, bytes) or of TarInfo."""
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode="w:gz") as tar:
        for entry in entries:
            info = entry if isinstance(entry, tarfile.TarInfo) else tarfile.TarInfo(entry[0])
            info.size = 0 if isinstance(entry, tarfile.TarInfo) else len(entry[1])
            tar.addfile(
                info, None if isinstance(entry, tarfile.TarInfo) else io.BytesIO(entry[1])
            )
    return body.getvalue()


def test_download_unpacks_what_is_expected_only(server, tmp_path):
    folder = tarfile.TarInfo("d")
    folder.type = tarfile.DIRTYPE
    body = archive(folder, ("./d/a.csv", b"A"), ("d/b.csv", b"B"), ("d/extra.sh", b"X"))
    sources = source(server, body, ["d/a.csv", "d/b.csv"])
    for _ in range(2):
        data.download(tmp_path, sources, str)
    assert len(server["log"]) == 1 and os.listdir(tmp_path / "sub") == ["f.csv"]
    assert sorted(os.listdir(tmp_path / "d")) == ["a.csv", "b.csv"]
    assert (tmp_path / "d/a.csv").read_bytes() == b"A"


@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_download_unpacks_again_what_is_not_as_it_was_unpacked(damage, server, tmp_path):
    files = {"a.csv": random.Random(1).randbytes(5000), "b.csv": b"B" * 5000}
    body = archive(*((f"d/{name}", content) for name, content in files.items()))
    sources = source(server, body, ["d/a.csv", "d/b.csv"])
    data.download(tmp_path, sources, str)
    if damage == "cut":
        os.truncate(tmp_path / "d/b.csv", 10)
    elif damage == "changed":
        (tmp_path / "d/b.csv").write_bytes(b"C" * 5000)
    else:
        (tmp_path / "d/b.csv").unlink()
    data.download(tmp_path, sources, str)
    assert {name: (tmp_path / "d" / name).read_bytes() for name in files} == files
    assert len(server["log"]) == 1, "the archive is still there"


@pytest.mark.parametrize("members", [[], ["d/a.csv"]])
def test_download_takes_what_was_put_in_place_by_hand(members, server, tmp_path):
    body = archive(("d/a.csv", b"A"))
    sources = source(server, body, members)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/f.csv").write_bytes(body)
    for _ in range(2):
        data.download(tmp_path, sources, str)
    assert server["log"] == [] and os.listdir(tmp_path / "sub") == ["f.csv"]
    assert not members or (tmp_path / "d/a.csv").read_bytes() == b"A"
    (tmp_path / "sub/f.csv").write_bytes(body[:-1])  # not the right one, after all
    if members:
        (tmp_path / "d/a.csv").unlink()
    lines = []
    data.download(tmp_path, sources, lines.append)
    assert len(server["log"]) == 1 and "not the published file" in lines[0]


class Endless(http.server.BaseHTTPRequestHandler):
    """An answer without an end, of which only so much is promised."""

    length = None
    sent = 0

    def do_GET(self):
        self.send_response(200)
        if self.length:
            self.send_header("Content-Length", str(self.length))
        self.end_headers()
        with contextlib.suppress(OSError):
            for _ in range(10**4):
                self.wfile.write(bytes(1 << 20))
                Endless.sent += 1 << 20

    def log_message(self, *args):
        pass


@pytest.mark.parametrize("length", [None, 10**10])
def test_download_has_an_end(length, tmp_path, monkeypatch):
    monkeypatch.setattr(Endless, "length", length)
    monkeypatch.setattr(Endless, "sent", 0)
    with serving(Endless) as (_, url):
        with pytest.raises(DataError, match="SHA-256 differs.*with a browser"):
            data.download(tmp_path, [(url, "other.csv", "0" * 64, [])], str)
    assert os.listdir(tmp_path) == [] and Endless.sent < data.MAX_DOWNLOAD + 20_000_000


@real
def test_the_limits_leave_room_for_the_published_files():
    sizes = [28_022_709]  # the archive's
    sizes += [path.stat().st_size for path in (REAL / "epitome").iterdir()]
    assert max(sizes) < data.MAX_DOWNLOAD / 1.5


@pytest.mark.parametrize(
    "error, remedy",
    [
        (ssl.SSLCertVerificationError("certificate verify failed"), "fetch it with a browser"),
        (
            OSError("Tunnel connection failed: 407 Proxy Authentication Required"),
            "fetch it with a",
        ),
        (
            socket.gaierror(-2, "Name or service not known"),
            "once the network .* with a browser",
        ),
        (
            ConnectionRefusedError(111, "Connection refused"),
            "once the network .* with a browser",
        ),
        (ConnectionResetError(104, "reset by peer"), "again, it goes on from here"),
        (TimeoutError("timed out"), "again, it goes on from here"),
        (HTTPError("", 403, "Forbidden", {}, None), "fetch it with a browser"),
        (HTTPError("", 404, "Not Found", {}, None), "fetch it with a browser"),
        (HTTPError("", 503, "Service Unavailable", {}, None), "again, it goes on from here"),
    ],
    ids=str,
)
def test_download_names_the_remedy_that_helps(error, remedy, tmp_path, monkeypatch, capsys):
    def fails(request, timeout):
        raise error if isinstance(error, HTTPError) else URLError(error)

    monkeypatch.setattr(data, "urlopen", fails)
    assert emprl.main(["download", str(tmp_path / "new")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and re.search(remedy, err)
    archive_path = str(tmp_path / "new" / "empatheticdialogues.tar.gz")
    assert ("browser" in err) == (archive_path in err), "it says where to put the file"
    by_hand_first = err.index("fetch it with a browser") < err.index("the same command again")
    lasts = re.search("certificate|403|404", str(error)) is not None
    assert by_hand_first == lasts, "to run it again helps when the fault passes"


def test_download_tells_a_full_disk_from_the_network(server, tmp_path, monkeypatch):
    def full(path, mode, **options):
        if "b" in mode and mode != "rb":
            raise OSError(errno.ENOSPC, "No space left on device")
        return open(path, mode, **options, encoding="utf-8")

    monkeypatch.setattr(data, "open", full, raising=False)
    with pytest.raises(OSError) as raised:
        data.download(tmp_path, source(server), str)
    assert emprl.in_one_line(raised.value) == "No space left on device; make room"


def test_download_into_what_is_no_folder(tmp_path, capsys):
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert emprl.main(["download", str(tmp_path / "file")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "file: File exists; name another path" in err


def special(name, kind):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/hosts"
    return info


@pytest.mark.parametrize(
    "entry",
    [
        ("../evil.csv", b"x"),
        ("d/../../evil.csv", b"x"),
        ("/tmp/evil.csv", b"x"),
        special("d/a.csv", tarfile.SYMTYPE),
        special("d/a.csv", tarfile.LNKTYPE),
        special("d/a.csv", tarfile.FIFOTYPE),
        special("d/a.csv", tarfile.CHRTYPE),
    ],
    ids=lambda e: e[0] if isinstance(e, tuple) else f"type {e.type.decode()}",
)
def test_download_writes_nothing_unsafe_that_an_archive_holds(entry, server, tmp_path):
    """Files are written by their names in SOURCES, wherever an entry would go."""
    body = archive(entry, ("d/b.csv", b"B"))
    data.download(tmp_path / "in", source(server, body, ["d/b.csv"]), str)
    found = [str(x.relative_to(tmp_path / "in")) for x in tmp_path.glob("**/*.csv")]
    assert sorted(found) == ["d/b.csv", "sub/f.csv"] and not Path("/tmp/evil.csv").exists()
    with pytest.raises(DataError, match="no d/a.csv in it"):
        data.download(tmp_path / "in", source(server, body, ["d/a.csv"]), str)


def test_download_bad_archives(server, tmp_path):
    huge = tarfile.TarInfo("d/a.csv")
    huge.size = 300_000_000
    cut = archive(("d/a.csv", random.Random(0).randbytes(9000)))[:5000]
    for i, (body, problem) in enumerate(
        (
            (huge.tobuf(), "damaged"),
            (b"no archive", "damaged"),
            (cut, "damaged"),
            (archive(("d/b.csv", b"B")), "no d/a.csv"),
        )
    ):
        with pytest.raises(DataError, match=problem):
            data.download(tmp_path / str(i), source(server, body, ["d/a.csv"]), str)
        assert not (tmp_path / str(i) / "d").exists()


def test_official_sources():
    assert [name for _, name, _, _ in data.SOURCES] == [
        "empatheticdialogues.tar.gz",
        *(f"epitome/{name}" for name in data.EPITOME_FILES),
    ]
    assert all(
        url.startswith("https://") and len(digest) == 64 for url, _, digest, _ in data.SOURCES
    )


# ---- span corruption


def test_span_corruption():
    """The paper's figure 2: Thank you [for inviting] me to your party [last] week."""
    thank, you, for_, inviting, me, to, your, party, last, week = range(10, 20)
    x, y, z = 99, 98, 97
    source, target = data.span_corrupt(list(range(10, 20)), [(2, 2), (8, 1)], [x, y, z, 96])
    check(
        "source: Thank you <X> me to your party <Y> week </s>",
        source,
        [thank, you, x, me, to, your, party, y, week, 1],
    )
    check(
        "target: <X> for inviting <Y> last <Z> </s>",
        target,
        [x, for_, inviting, y, last, z, 1],
    )
    source, target = data.span_corrupt([5, 6, 7, 8], [(1, 1), (3, 1)], [x, y, z])
    check("a span at the end", source, [5, x, 7, y, 1])
    check("a span at the end", target, [x, 6, y, 8, z, 1])
    source, target = data.span_corrupt([5, 6], [], [x])
    check("no span", source, [5, 6, 1])
    check("no span", target, [x, 1])
    source, target = data.span_corrupt([5, 6, 7], [(0, 2)], [x, y], eos_id=3)
    check("a span at the start, </s> is 3", source, [x, 7, 3])
    check("a span at the start, </s> is 3", target, [x, 5, 6, y, 3])


def test_random_spans():
    for length in range(2, 201):
        for seed in range(3):
            spans = data.random_spans(length, generator=torch.Generator().manual_seed(seed))
            noise, end = sum(n for _, n in spans), 0
            assert noise == max(round(0.15 * length), 1), (
                f"{noise} of {length} positions are noise"
            )
            assert len(spans) == max(round(noise / 3), 1), (
                f"{len(spans)} spans for {noise} positions"
            )
            for start, n in spans:
                assert start > end or start > 0 == end, f"spans touch, or start at 0: {spans}"
                assert n >= 1
                end = start + n
            assert end <= length
    draws = {
        tuple(data.random_spans(60, generator=torch.Generator().manual_seed(s)))
        for s in range(20)
    }
    assert len(draws) >= 15, "spans are hardly random"
    half = data.random_spans(100, density=0.5, mean_span=5.0)
    assert sum(n for _, n in half) == 50 and len(half) == 10


# ---- the ids of a corpus in one array


def test_rows_of_ids_are_read_like_a_list_of_lists():
    lists = [[5, 6, 7], [], [40_000], [1]]
    rows = data.IdRows(iter(lists))
    assert len(rows) == 4 and list(rows) == lists
    assert rows[-1] == [1] and rows[torch.tensor(2)] == [40_000]
    with pytest.raises(IndexError):
        rows[4]


def test_pairs_take_no_more_memory_than_their_ids(corpus, tokenizer):
    """4 bytes an id, 8 a row and 24 for its levels; what a list has in reserve beside."""
    dialogues = corpus.dialogues["train"]
    tracemalloc.start()
    pairs = data.Pairs(dialogues, tokenizer, 64, 32)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size < 1.3 * (4 * sum(pairs.lengths()) + 2 * 8 * len(pairs)) + 10_000
