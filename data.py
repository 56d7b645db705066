"""From texts to padded token ids: corpora, tokenizer, batches, files, and a generated world.

What stands here, in this order:

1. Dialogue and Corpus: the one shape that all corpora have
2. Tokenizer: texts to token ids and back
3. Pairs and batches: which examples are seen together
4. Span corruption: T5's pre-training task
5. Files: EmpatheticDialogues, EPITOME, your own dialogues
6. Download: the two public corpora from their official addresses
7. The generated world: its rule, how dialogues are drawn, an oracle that reads their levels
8. The words of that world

At first reading, 1 to 3 and 7 up to generated_corpus are enough. Most of 5 and 6 is there to
tell what is wrong with a file. Add to 8 what you like; its rules stand at its head.

These learn from the data:

    policy        writes responses: a T5 that learns to answer as people do, and then, by
                  reinforcement learning, to earn a higher reward
    identifiers   classifiers that tell how empathetic a response is (its levels, below); the
                  closer they are to the levels aimed for, the higher the reward
    judge         a second classifier, only for evaluation: it never gives reward
    context       a third: from the context alone it predicts how likely each level of the
    classifier    human response is, as the identifiers see it; toy and real aim for these

    part of a Corpus                          what it is for
    dialogues["pretrain"]                     the policy's pre-training; if missing, "train"
    dialogues["train"], ["valid"]             policy, context classifier: to learn, to validate
    labelled["train"], ["valid"]              the identifiers: the same
    labelled["judge_train"], ["judge_valid"]  the judge: the same
    dialogues["test"], labelled["test"]       nobody learns from them: the published figures
"""

import contextlib
import copy
import csv
import functools
import hashlib
import html
import io
import itertools
import json
import math
import os
import random
import re
import ssl
import stat
import tarfile
import unicodedata
from array import array
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from http.client import HTTPException
from typing import NamedTuple
from urllib.error import URLError
from urllib.request import Request, urlopen

import numpy as np
import sentencepiece
import torch

# EPITOME's three communication mechanisms, the ways in which a response can show empathy:
# er  emotional reaction: "I am so sorry."
# ip  interpretation:     "You must feel lonely."
# ex  exploration:        "What happened exactly?"
# Each has a level: 0 none, 1 weak, 2 strong (Sharma et al. 2020, arXiv 2009.08441).
MECHANISMS = ("er", "ip", "ex")
LEVELS = 3


# ---- 1. Dialogue and Corpus -----------------------------------------------------------------


@dataclass(frozen=True)
class Dialogue:
    """A context, and a listener's response to it.

    The id is "group/record". In real data the group is a conversation; it stays in one part.

        generated world       test/17        part / number
        EmpatheticDialogues   hit:0_conv:1/4 conversation / number of the utterance
        EPITOME               s12/r34        speaker / responder
        your own file         12/14          line where its conversation begins / its line
    """

    context: tuple[str, ...]  # the utterances before the response, oldest first
    response: str
    emotion: str = ""
    levels: tuple[int, int, int] | None = None  # of the response: er, ip, ex; None: unknown
    id: str = ""


@dataclass
class Corpus:
    """What `generated_corpus`, `real_corpus` and `own_corpus` return."""

    # part -> dialogues; the table at the head of this file tells what each part is for
    dialogues: dict[str, list[Dialogue]]
    labelled: dict[str, list[Dialogue]]  # their levels are known
    # What was read, what was skipped, and why.
    notes: list[str]
    # The generated world only: id -> P(level | context), probs[mechanism][level].
    level_probs: dict[str, tuple] = field(default_factory=dict)


# ---- 2. Tokenizer ---------------------------------------------------------------------------


class Tokenizer:
    """Sentencepiece's pieces with T5's ids: pad 0, eos 1, unk 2, 100 sentinels on top.

    Pieces are whole words and fragments. A sentinel stands for a span taken out of a text
    (section 4).

    T5's own `spiece.model` (32,000 pieces) gets T5's own ids: 32,100 in all, and <extra_id_0>
    is 32,099.
    """

    pad_id = 0
    eos_id = 1
    unk_id = 2
    num_sentinels = 100

    def __init__(self, model):
        """model: the bytes of a sentencepiece model, or the path to one. Raises DataError."""
        name = "tokenizer"
        if not isinstance(model, bytes):
            name = model
            model = _read_bytes(model)
        self.model = model
        self._pieces = sentencepiece.SentencePieceProcessor()
        ids = None
        with contextlib.suppress(RuntimeError):
            self._pieces.LoadFromSerializedProto(model)
            ids = self._pieces.pad_id(), self._pieces.eos_id(), self._pieces.unk_id()
        if ids != (self.pad_id, self.eos_id, self.unk_id):
            raise DataError(
                f"{name}: not a sentencepiece model with pad 0, eos 1 and unk 2, or damaged; "
                "train it again or fetch it anew"
            )

        self.num_pieces = self._pieces.GetPieceSize()
        self.vocab_size = self.num_pieces + self.num_sentinels
        # <extra_id_0> is the last id, <extra_id_1> the one before it, and so on.
        self.sentinels = range(self.vocab_size - 1, self.num_pieces - 1, -1)

    @classmethod
    def train(cls, texts, vocab_size, model_type="unigram"):
        """A tokenizer of at most `vocab_size` ids, sentinels included, for lower case.

        model_type: "unigram", as in T5: many candidates are pruned to those that make the texts
                    likeliest (Kudo 2018, arXiv 1804.10959); or "bpe": the commonest pair of
                    neighbouring pieces in a word becomes one piece, again and again (Sennrich
                    et al. 2016, arXiv 1508.07909).
        Raises DataError.
        """
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.Train(
                sentence_iterator=iter(texts),
                model_writer=model,
                model_type=model_type,
                vocab_size=vocab_size - cls.num_sentinels,
                pad_id=cls.pad_id,
                eos_id=cls.eos_id,
                unk_id=cls.unk_id,
                bos_id=-1,
                normalization_rule_name="nmt_nfkc_cf",  # cf, case folding: to lower case
                hard_vocab_limit=False,  # a small corpus may give fewer pieces
                num_threads=1,  # else the result would depend on the machine
                character_coverage=0.99995,
                minloglevel=3,
            )
        except RuntimeError as error:
            problem = " ".join(str(error).split())[-100:]
            raise DataError(
                f"tokenizer: cannot be trained on these texts with vocab_size {vocab_size} "
                f"({problem}); change vocab_size"
            ) from None
        return cls(model.getvalue())

    def encode(self, text):
        """Token ids, without eos."""
        return self._pieces.EncodeAsIds(text)

    def decode(self, ids):
        """The text up to the first eos, without padding and sentinels."""
        ids = [int(i) for i in ids]
        if self.eos_id in ids:
            ids = ids[: ids.index(self.eos_id)]
        return self._pieces.DecodeIds([i for i in ids if self.pad_id < i < self.num_pieces])

    def encode_context(self, utterances, max_length):
        """Every utterance ends with eos. If that is too long, the oldest tokens go."""
        ids = []
        for utterance in utterances:
            ids += [*self.encode(utterance), self.eos_id]
        return ids[-max_length:] or [self.eos_id]

    def encode_response(self, text, max_length):
        """Ends with eos in any case: the text is cut to make room for it."""
        return [*self.encode(text)[: max_length - 1], self.eos_id]


# ---- 3. Pairs and batches -------------------------------------------------------------------


def pad(rows):
    """Lists of ids, padded on the right with 0: LongTensor (B, S)."""
    rows = [torch.tensor(row, dtype=torch.long) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def slices(rows, size):
    """A list cut into pieces of `size`; the last one may be shorter."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


class IdRows:
    """Lists of ids in one array: 4 bytes per id; a list of Python ints takes up to 36."""

    def __init__(self, rows):
        self.ids = array("i")
        self.ends = array("q", [0])  # row i is ids[ends[i] : ends[i + 1]]
        for row in rows:
            self.ids.extend(row)
            self.ends.append(len(self.ids))

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, row):
        row = range(len(self))[row]  # raises IndexError past the end, so that `for` works
        return self.ids[self.ends[row] : self.ends[row + 1]].tolist()


class Pairs:
    """Pairs of context and response as token ids; `batch` pads some of them."""

    def __init__(self, dialogues, tokenizer, max_source, max_target, device="cpu"):
        self.dialogues = dialogues
        self.device = device
        self.contexts = IdRows(
            tokenizer.encode_context(d.context, max_source) for d in dialogues
        )
        self.responses = IdRows(
            tokenizer.encode_response(d.response, max_target) for d in dialogues
        )
        # Unknown levels become 0. Nothing reads them: levels are asked for only of labelled
        # parts, where all are known. (N pairs, M mechanisms)
        self.levels = torch.tensor([d.levels or (0, 0, 0) for d in dialogues])

    def __len__(self):
        return len(self.contexts)

    def lengths(self):
        """The number of ids of each pair."""
        return [len(c) + len(r) for c, r in zip(self.contexts, self.responses)]

    def chunks(self, size, max_ids=2**15):
        """All rows in lists of at most `size`, where pairs of similar length stand together.

        A list of long pairs is shorter, which bounds the memory: the number of pairs times the
        ids of the longest one is at most `max_ids`, unless it is a single pair. Contexts and
        responses are padded separately, to at most 2 max_ids ids together (the longest context
        and the longest response may be of different pairs).
        """
        lengths = self.lengths()
        order = sorted(range(len(self)), key=lambda row: lengths[row])
        chunks = []
        for rows in slices(order, size):
            longest = lengths[rows[-1]]
            chunks += slices(rows, max(1, max_ids // longest))
        return chunks

    def batch(self, rows):
        """The ids of some pairs: contexts (B, S) and responses (B, T)."""
        contexts = pad([self.contexts[row] for row in rows])
        responses = pad([self.responses[row] for row in rows])
        return contexts.to(self.device), responses.to(self.device)

    def with_responses(self, responses, levels=None):
        """The same contexts with other responses; `dialogues` still has the original ones.

        responses: a list of ids for each context. levels: LongTensor (N, M); None: unknown.
        """
        other = copy.copy(self)
        other.responses = responses
        other.levels = levels
        return other


def batches(lengths, batch_size, seed):
    """Returns a function: rows_at(step) gives the rows of batch number `step`.

    Steps are counted over all epochs. A batch depends on seed and step alone, so that a run
    can be resumed from its step. Examples of similar length share a batch: less padding.
    """
    if len(lengths) == 0 or batch_size < 1:
        raise ValueError(
            f"{len(lengths)} examples in batches of {batch_size}: both must be above 0"
        )
    lengths = np.asarray(lengths)
    batches_per_epoch = math.ceil(len(lengths) / batch_size)

    @functools.lru_cache(maxsize=1)  # the batches of the current epoch are kept
    def shuffled(epoch):
        rng = np.random.default_rng([seed, epoch])
        # Sorted by length alone, every epoch would have the same batches. So each length gets
        # noise: up to 5 %, which mixes the long examples, and up to one id, which mixes the
        # short ones.
        noisy = lengths * rng.uniform(0.95, 1.05, len(lengths))
        noisy = noisy + rng.uniform(0, 1, len(lengths))
        rows = slices(np.argsort(noisy).tolist(), batch_size)
        return [rows[i] for i in rng.permutation(len(rows))]

    def rows_at(step):
        epoch, i = divmod(step, batches_per_epoch)
        return shuffled(epoch)[i]

    return rows_at


# ---- 4. Span corruption: T5's pre-training task ---------------------------------------------


def random_spans(length, density=0.15, mean_span=3.0, generator=None):
    """[(start, length), ...]: spans over about `density` of all positions, never position 0.

    As in T5, the kept and the removed positions are each split at random into `count` pieces;
    they alternate, a kept piece first. length: at least 2.
    """
    noise = min(max(round(length * density), 1), length - 1)
    kept = length - noise
    count = min(max(round(noise / mean_span), 1), noise, kept)
    gaps = _random_pieces(kept, count, generator)
    lengths = _random_pieces(noise, count, generator)

    spans = []
    position = 0
    for gap, span_length in zip(gaps, lengths):
        spans.append((position + gap, span_length))
        position += gap + span_length
    return spans


def _random_pieces(total, count, generator):
    """`count` positive numbers that add up to `total`, at random."""
    cuts = torch.randperm(total - 1, generator=generator)[: count - 1] + 1
    return np.diff([0, *sorted(cuts.tolist()), total]).tolist()


def span_corrupt(ids, spans, sentinels, eos_id=1):
    """The input and the target of span corruption, as in figure 2 of the T5 paper.

    "a b c d e" becomes "a <X> d <Y> </s>" and "<X> b c <Y> e <Z> </s>".

    ids: a list. spans: disjoint (start, length) in order. sentinels: at least len(spans) + 1
    ids. Returns (source, target), two lists of ids (Raffel et al. 2020, arXiv 1910.10683).
    """
    source = []
    target = []
    end = 0
    for sentinel, (start, length) in zip(sentinels, spans):
        source += [*ids[end:start], sentinel]
        end = start + length
        target += [sentinel, *ids[start:end]]
    source += [*ids[end:], eos_id]
    target += [sentinels[len(spans)], eos_id]
    return source, target


# ---- 5. Files: EmpatheticDialogues, EPITOME, your own dialogues -----------------------------


class DataError(ValueError):
    """Input that cannot be used. One line: 'path:line: what is wrong; what to do'."""

    def __init__(self, message):
        super().__init__(printable(message))


# Control characters, line ends, bidirectional control characters, lone surrogates.
_UNSAFE = re.compile(
    "[\0-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text):
    r"""One line, safe in a terminal: what could steer it is written out, as in "\x1b"."""
    return _UNSAFE.sub(lambda found: ascii(found[0])[1:-1], str(text))


def real_corpus(folder, seed=0):
    """EmpatheticDialogues for the policy, EPITOME for the classifiers, after `download`."""
    if not os.path.isdir(folder):
        raise DataError(
            f"{folder}: no such folder; `python emprl.py download {folder}` fetches the data"
        )
    try:
        return _published_corpus(folder, seed)
    except DataError as error:
        problem = str(error).rsplit("; ", 1)[0]  # without its advice, which is for own files
        raise DataError(
            f"{problem}; `python emprl.py download {folder}` fetches what was published"
        ) from None


def _published_corpus(folder, seed):
    """The files that `download` fetches, as a Corpus."""
    both_sides = {}  # part -> the speaker's and the listener's responses
    notes = []
    for part in ("train", "valid", "test"):
        path = os.path.join(folder, "empatheticdialogues", f"{part}.csv")
        both_sides[part], note = read_empathetic_dialogues(path)
        notes.append(note)
    epitome = os.path.join(folder, "epitome")
    pairs, note = read_epitome(epitome)
    notes.append(note)
    labelled = split_labelled(pairs, seed)
    if not all(labelled.values()):
        raise DataError(f"{epitome}: {len(pairs)} pairs are too few; fetch all again")

    # The policy learns to answer as the listener. First, in pre-training, it reads both sides'
    # and EPITOME's responses, of the training parts only.
    dialogues = {part: listeners(both) for part, both in both_sides.items()}
    dialogues["pretrain"] = both_sides["train"] + labelled["train"] + labelled["judge_train"]
    return Corpus(dialogues, labelled, notes)


def _conversation_of(dialogue):
    """The id up to the last "/": the conversation (in EPITOME, the speaker) it is from."""
    return dialogue.id.rpartition("/")[0]


def split_labelled(dialogues, seed):
    """{part: dialogues}, split by conversation; the shares count conversations.

    train        37.5 %    the identifiers learn from it
    judge_train  33.75 %   the judge learns from it
    judge_valid   3.75 %   ... and is validated on it
    valid         5 %      the identifiers are validated on it
    test         20 %
    """
    conversations = sorted({_conversation_of(dialogue) for dialogue in dialogues})
    random.Random(seed).shuffle(conversations)

    # 75 % are to learn from: the first half for the identifiers, the second for the judge.
    learn_end = round(0.75 * len(conversations))
    train_end = learn_end // 2
    judge_train_end = learn_end - round(0.1 * (learn_end - train_end))
    valid_end = round(0.80 * len(conversations))
    ends = (
        ("train", train_end),
        ("judge_train", judge_train_end),
        ("judge_valid", learn_end),
        ("valid", valid_end),
        ("test", len(conversations)),
    )
    parts = {}
    begin = 0
    for part, end in ends:
        chosen = set(conversations[begin:end])
        parts[part] = [d for d in dialogues if _conversation_of(d) in chosen]
        begin = end
    return parts


# Two names mislead: `context` holds the emotion, `prompt` the situation (which is not used).
# What we call context is what was said before, in the rows above.
ED_HEADER = "conv_id,utterance_idx,context,prompt,speaker_idx,utterance,selfeval,tags"
_ED_ROW = re.compile(
    r"""
    (?P<conversation> [^,]*),
    (?P<number> [0-9]+),
    (?P<emotion> [^,]*),
    [^,]*,                     # the situation
    [0-9]+,                    # the speaker
    (?P<utterance> [^,]*),
    [0-9|_]*,                  # self-evaluation
    [^,]*                      # tags
    ( , | ,[^,]*\|[^,]* )?     # a ninth field: other replies, joined by "|"
    """,
    re.VERBOSE,
)
# A text as it was published: he said "no". A table program writes: "he said ""no""".
_ED_QUOTED = re.compile(r'(?<=,)"[^",]*(""[^",]*)+"(?=,)')
MAX_BAD_SHARE = 0.005  # with a larger share of bad rows it is not the file that was published


def listeners(dialogues):
    """The listener's responses. The speaker begins, so their contexts are of odd length."""
    return [dialogue for dialogue in dialogues if len(dialogue.context) % 2]


def read_empathetic_dialogues(path):
    """(dialogues, note) of one file of EmpatheticDialogues: the responses of both sides.

    Any utterance but the first of its conversation is a response to those before it.
    The files are no ordinary csv: '"' is a character like any other, a comma in a text is
    written _comma_. Raises DataError (Rashkin et al. 2019, arXiv 1811.00207).
    """
    header, *lines = _read_lines(path)
    if not header.startswith(ED_HEADER):
        raise DataError(
            f"{path}:1: not the header of EmpatheticDialogues, which begins with {ED_HEADER}; "
            "fetch the file again"
        )
    if lines and lines[-1] and not _ED_ROW.fullmatch(lines[-1]):
        raise DataError(
            f"{path}:{len(lines) + 1}: the file ends within this row, it is cut short; "
            "fetch it again"
        )

    dialogues = []
    skipped = []  # "line: reason"
    histories = defaultdict(list)  # conversation -> its utterances so far
    rows = [(number, line) for number, line in enumerate(lines, 2) if line]
    for number, line in rows:
        if _ED_QUOTED.search(line):
            raise DataError(
                f"{path}:{number}: quotes doubled, a table program has saved the file anew; "
                "fetch it again"
            )

        # A bad row adds nothing to its history. So, unless it only repeated another, the
        # numbers of the rows after it do not fit either: it ends its conversation.
        row = _ED_ROW.fullmatch(line)
        utterance = row and clean(row["utterance"].replace("_comma_", ","))
        if not utterance:
            skipped.append(f"{number}: fields too many, empty, missing or out of place")
            continue
        history = histories[row["conversation"]]
        if row["number"] != str(len(history) + 1):
            skipped.append(
                f"{number}: utterance {row['number']} where {len(history) + 1} should be, rows "
                "are missing, doubled or out of order"
            )
            continue
        if history:
            its_id = f"{row['conversation']}/{row['number']}"
            dialogues.append(Dialogue(tuple(history), utterance, row["emotion"], id=its_id))
        history.append(utterance)

    if len(skipped) > MAX_BAD_SHARE * len(rows):
        raise DataError(
            f"{path}:{skipped[0]} (the first of {len(skipped)} rows of {len(rows)} that are "
            "not as they were published); fetch the file again"
        )
    if not dialogues:
        raise DataError(f"{path}:2: no response that can be used; fetch the file again")
    note = f"{path}: {len(listeners(dialogues))} pairs"
    if skipped:
        note += f"; {len(skipped)} rows skipped, the first in line {skipped[0]}"
    return dialogues, printable(note)


EPITOME_FILES = (  # one for each of MECHANISMS, in their order
    "emotional-reactions-reddit.csv",
    "interpretations-reddit.csv",
    "explorations-reddit.csv",
)
EPITOME_COLUMNS = ("sp_id", "rp_id", "seeker_post", "response_post", "level")


def read_epitome(folder):
    """(dialogues, note) of EPITOME's Reddit posts: a file for each mechanism, joined by row.

    In a row the ids must agree. Texts need not: they differ a little between the files, and
    the first file's are taken. A pair listed twice is kept once, with the level that most of
    its rows have (on a tie, the first row's). Raises DataError (Sharma et al. 2020, arXiv
    2009.08441).
    """
    paths = [os.path.join(folder, name) for name in EPITOME_FILES]
    files = _epitome_rows(paths)

    texts = {}  # id of a pair -> post and response
    votes = defaultdict(Counter)  # (id, mechanism) -> how many rows have which level
    for rows in zip(*files):  # a row of each file, all of the same pair
        _, first = rows[0]
        pair_id = _pair_id(first)
        texts.setdefault(pair_id, (_post(first["seeker_post"]), _post(first["response_post"])))
        for mechanism, path, (line, row) in zip(MECHANISMS, paths, rows):
            where = f"{path}:{line}"
            if not row["sp_id"].strip() or not row["rp_id"].strip():
                raise DataError(f"{where}: sp_id or rp_id is empty; fetch the file again")
            if _pair_id(row) != pair_id:
                raise DataError(
                    f"{where}: pair {_pair_id(row)}, but {pair_id} in the first file; "
                    "fetch all again"
                )
            votes[pair_id, mechanism][_level(row["level"], where)] += 1

    dialogues = []
    for pair_id, (post, response) in texts.items():
        if post and response:
            # Of equal counts, most_common puts the one first that was counted first.
            levels = [votes[pair_id, name].most_common(1)[0][0] for name in MECHANISMS]
            dialogues.append(Dialogue((post,), response, "", tuple(levels), pair_id))
    if not dialogues:
        raise DataError(f"{folder}/{EPITOME_FILES[0]}:2: no rows with text; fetch it again")

    conflicts = [vote.most_common(2) for vote in votes.values() if len(vote) > 1]
    ties = sum(count == next_count for (_, count), (_, next_count) in conflicts)
    note = (
        f"{folder}: {len(dialogues)} pairs from {len(files[0])} rows; "
        f"{len(texts) - len(dialogues)} pairs without text skipped; "
    )
    note += f"of {len(conflicts)} levels in conflict {len(conflicts) - ties} settled by "
    note += f"majority, {ties} ties by the first row"
    return dialogues, printable(note)


def _epitome_rows(paths):
    """The rows of each file as [(line, row)].

    Raises DataError if two files differ in their number of rows, or are the same file.
    """
    files = [list(_csv_rows(path, EPITOME_COLUMNS)) for path in paths]
    for (path, rows), (other, other_rows) in itertools.combinations(zip(paths, files), 2):
        if len(rows) != len(other_rows):
            raise DataError(
                f"{path}: {len(rows)} rows, but {len(other_rows)} in {other}; fetch both again"
            )
        if rows == other_rows:
            raise DataError(f"{path}:1: the same rows as in {other}; fetch both again")
    return files


def _pair_id(row):
    """The id of post and response: speaker (who seeks help) and responder."""
    return f"{row['sp_id'].strip()}/{row['rp_id'].strip()}"


def _post(text):
    """The clean text of a post; some are escaped twice, as in "&amp;amp;"."""
    return clean(html.unescape(html.unescape(text)))


REQUIRED = ("context", "response")
FIELDS = (*REQUIRED, "emotion", *MECHANISMS, "id")


def own_corpus(path, seed=0):
    """A corpus of one file of yours, which has to serve policy, identifiers and judge.

    Identifiers and judge never share a conversation. The policy trains on what both learn from
    and on the judge's validation part. The test conversations are new to all three. Every
    dialogue needs levels.
    """
    dialogues = read_dialogues(path)
    for dialogue in dialogues:
        if dialogue.levels is None:
            _, _, line = dialogue.id.rpartition("/")
            raise DataError(
                f"{path}:{line}: no levels; training needs er, ip and ex in every record "
                "(`evaluate` needs none)"
            )
    conversations = {_conversation_of(dialogue) for dialogue in dialogues}
    count = f"{len(dialogues)} dialogues of {len(conversations)} conversations"
    if len(dialogues) < 50 or len(conversations) < 20:
        raise DataError(
            f"{path}: {count} (by id or first utterance); training needs at least "
            "50 dialogues from 20 conversations, add some"
        )

    labelled = split_labelled(dialogues, seed)
    train = labelled["train"] + labelled["judge_train"] + labelled["judge_valid"]
    parts = {"train": train, "valid": labelled["valid"], "test": labelled["test"]}

    sizes = " / ".join(str(len(part)) for part in parts.values())
    notes = [f"{path}: {count}; train / valid / test, by conversation: {sizes}"]
    distinct = {_texts_key(dialogue) for dialogue in dialogues}
    if len(distinct) < len(dialogues):
        equal = len(dialogues) - len(distinct)
        notes.append(f"{path}: {equal} records equal to an earlier one, in the same part")
    for name, levels in zip(MECHANISMS, zip(*[d.levels for d in dialogues])):
        if len(set(levels)) == 1:
            notes.append(f"{path}: {name} is {levels[0]} everywhere, nothing to learn from")
    return Corpus(parts, labelled, [printable(note) for note in notes])


def read_dialogues(path):
    """Your own dialogues. Emotion, levels (all three or none) and id may be left out.

    .jsonl  {"context": ["..", ".."] or "..", "response": "..", "emotion": "..",
             "er": 0, "ip": 2, "ex": 1, "id": ".."}, one on each line
    .csv    columns context,response[,emotion,er,ip,ex,id]

    " </s> " separates the utterances of a context that is one text. Records with the same id
    are one conversation, and so are records with the same texts. A record without an id joins
    all that have its first utterance. The id of a Dialogue is not this one: it is made of line
    numbers. Raises DataError.
    """
    if str(path).lower().endswith(".csv"):
        records = _csv_rows(path, REQUIRED, FIELDS)
    else:
        records = _json_rows(path)
    dialogues = {}  # line -> its Dialogue
    keys = {}  # line -> what it shares with other records of its conversation
    begins_without_id = set()  # the first utterances of records without an id
    for line, record in records:
        where = f"{path}:{line}"
        dialogues[line] = _dialogue(record, where)
        texts = _texts_key(dialogues[line])
        keys[line] = [texts]
        id_key = _id_key(record, where)
        if id_key:
            keys[line].append(id_key)
        else:
            begins_without_id.add(texts[:1])
    if not dialogues:
        raise DataError(f"{path}:2: no dialogues; write at least one")

    # A record with an id joins the records without one that begin like it. Otherwise its first
    # utterance is no key: two ids that begin alike stay two conversations.
    for own_keys in keys.values():
        first_utterance = own_keys[0][:1]
        if first_utterance in begins_without_id:
            own_keys.append(first_utterance)

    begins = _beginnings(keys)
    return [replace(d, id=f"{begins[line]}/{line}") for line, d in dialogues.items()]


def _dialogue(record, where):
    """The Dialogue of a record, still without an id."""
    context = record["context"]
    if isinstance(context, str):
        if re.fullmatch(r"""\s*\[['"].*]\s*""", context, re.DOTALL):
            raise DataError(
                f'{where}: context is a list as text; write its utterances with " </s> " '
                "between them"
            )
        context = context.split("</s>")
    if not isinstance(context, list):
        context = [context]  # no text: refused in the next line
    context = tuple(_clean_field(text, "an utterance of context", where) for text in context)
    response = _clean_field(record["response"], "response", where)
    emotion = _clean_field(record.get("emotion", ""), "emotion", where)
    if not response:
        raise DataError(f"{where}: empty response; fill it in or drop the record")
    if not context or not all(context):
        raise DataError(
            f"{where}: empty utterance in the context; fill it in, drop the record, or take "
            "out a </s> that separates nothing"
        )

    given = [record[name] for name in MECHANISMS if record.get(name, "") != ""]
    levels = tuple(_level(value, where) for value in given)
    if len(levels) not in (0, len(MECHANISMS)):
        raise DataError(
            f"{where}: {len(levels)} of 3 levels; give er, ip and ex, or none of them"
        )
    return Dialogue(context, response, emotion, levels or None)


def _clean_field(value, name, where):
    """The clean text of a field, which must be a text."""
    if not isinstance(value, str):
        raise DataError(
            f"{where}: not a record: {name} is {_shown(value)}; "
            "write a text, or drop the record"
        )
    return clean(value)


def _level(value, where):
    """0, 1 or 2, also as text, with blanks, or as a spreadsheet writes it: 1.0."""
    written = None
    # A nested record is a list here, too (see _json_rows). str() of it may recurse too deep.
    if not isinstance(value, list):
        written = re.fullmatch(r"([012])(\.0*)?", str(value).strip())
    if not written:
        raise DataError(f"{where}: level {_shown(value)!r}; levels are 0, 1 or 2")
    return int(written[1])


def _shown(value):
    """A value of a record in a few characters, for a message."""
    if isinstance(value, list):
        return "a list or a record"
    return str(value)[:20]


def _id_key(record, where):
    """The record's id in a normal form, in which equal ids are equal; "" if it has none."""
    value = record.get("id", "")
    if type(value) not in (str, int, float) or value != value:  # NaN differs from itself
        raise DataError(
            f"{where}: not a record: id is {_shown(value)}; write a text or a number"
        )
    return clean(_normal(str(value))).removesuffix(".0")  # a spreadsheet's 1.0 is 1


def _beginnings(keys):
    """{line: keys} -> {line: the line where its conversation begins}.

    Lines that share a key are of one conversation, and so is whatever shares one with them.
    """
    lines_with = defaultdict(list)
    for line, own_keys in keys.items():
        for key in own_keys:
            lines_with[key].append(line)

    begins = {}
    for first in keys:
        reached = [first]
        while reached:
            line = reached.pop()
            if line not in begins:
                begins[line] = first
                for key in keys[line]:
                    reached += lines_with[key]
                    lines_with[key] = []  # followed
    return begins


def _texts_key(dialogue):
    """What two equal records share, whatever their levels: their texts."""
    return tuple(_normal(text) for text in (*dialogue.context, dialogue.response))


def _normal(text):
    """Lower case; accents, widths and ligatures in one form."""
    return unicodedata.normalize("NFKC", text).casefold()


def _json_rows(path):
    """(number, record) of each line of a .jsonl file. A field that is null is left out."""
    for number, line in enumerate(_read_lines(path), 1):
        line = line.strip()
        where = f"{path}:{number}"
        if not line:
            continue
        if line.startswith("["):
            raise DataError(
                f"{where}: a JSON array; write one record a line, without brackets "
                "around them and commas between them"
            )
        if not line.startswith("{"):
            raise DataError(
                f"{where}: not a record: {line[:20]!r}; write one {{..}} a line "
                "(a table must be called .csv)"
            )
        try:
            pairs = json.loads(line, object_pairs_hook=list)  # a dict hides a repeated name
        except (ValueError, RecursionError) as error:
            # no msg: nested too deep, or a number too long (then without Python's advice)
            problem = getattr(error, "msg", str(error).partition(";")[0])
            raise DataError(
                f"{where}: not a record in JSON: {problem}; write one {{..}} a line, whole"
            ) from None
        given = [(name, value) for name, value in pairs if value is not None]
        names = [name for name, _ in given]
        _check_names(names, f"{where}: not a record", "field", REQUIRED, FIELDS)
        yield number, dict(given)


NOT_A_HEADER = {  # signs, before the first comma, of another format
    "\t": "columns separated by tabs; save it with commas",
    ";": "columns separated by semicolons; save it with commas",
    "{": "records in JSON, not a table; call the file .jsonl",
    "sep=": "a hint for spreadsheets, not the names of the columns; take this line out",
}


def _csv_rows(path, required, allowed=None):
    """(number of the line where it begins, row as dict) of each row of a csv file.

    It must have the required columns, and may have those that are allowed (None: any).
    """
    lines = [f"{line}\n" for line in _read_lines(path)]
    for sign, problem in NOT_A_HEADER.items():
        if sign in lines[0].partition(",")[0]:
            raise DataError(f"{path}:1: {problem}")
    reader = csv.reader(lines, strict=True)
    begin = 1  # the line where the next row begins
    try:
        header = [name.strip() for name in next(filter(None, reader))]
        where = f"{path}:{reader.line_num}: not a header"
        _check_names(header, where, "column", required, allowed or header)
        begin = reader.line_num + 1
        for row in reader:
            if row:
                if len(row) != len(header):
                    raise csv.Error(
                        f"not {len(header)} fields, as in the first line, but {len(row)}"
                    )
                yield begin, dict(zip(header, row))
            begin = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{begin}: {error}; check the commas and quotes") from None


def _check_names(names, where, kind, required, allowed):
    """Raises DataError unless all required names are there, and allowed ones once at most."""
    for name in required:
        if name not in names:
            raise DataError(
                f"{where}: no {kind} {name}; add it: there is {', '.join(names)[:100]!r}"
            )
    for number, name in enumerate(names, 1):
        if not name:
            raise DataError(
                f"{where}: {kind} {number} has no name; name it or take it out "
                "(an index of pandas: index=False)"
            )
        if name not in allowed:
            allowed = ", ".join(allowed)
            raise DataError(
                f"{where}: a {kind} {name[:40]!r}; take it out, there may be {allowed}"
            )
        if names.count(name) > 1:
            raise DataError(f"{where}: two {kind}s {name[:40]!r}; take one of them out")


MAX_FILE = 500_000_000  # bytes; thirty times the largest file of EmpatheticDialogues
NOT_THE_FILE = {  # first bytes, in lower case -> what the file is instead; what to do
    b"version https://git-lfs": "a Git LFS pointer, not the file; `git lfs pull` fetches it",
    b"<!doctype html": "a web page, not the file itself; fetch the raw file",
    b"<html": "a web page, not the file itself; fetch the raw file",
    b"pk\3\4": "a packed file (zip or xlsx); unpack it, or save the table as csv",
    b"\x1f\x8b": "a packed file (gz); unpack it",
    b"bzh": "a packed file (bz2); unpack it",
    b"\xfd7zxz": "a packed file (xz); unpack it",
    b"\x28\xb5\x2f\xfd": "a packed file (zst); unpack it",
    b"par1": "a parquet file; save the table as csv",
    b"\x80": "a pickle, not a text; save the table as csv",
}


def _read_lines(path):
    """The lines of a text file in UTF-8, without a byte order mark."""
    content = _read_bytes(path).removeprefix(b"\xef\xbb\xbf")
    if not content.strip():
        raise DataError(f"{path}:1: empty file; fetch or write it again")
    damage = content.find(b"\0")  # -1: none
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        damage = error.start
    if damage >= 0:
        number = content.count(b"\n", 0, damage) + 1
        raise DataError(
            f"{path}:{number}: not text in UTF-8; is it the right file? Save it as UTF-8"
        )
    return re.split("\r\n|\n|\r", text)


def _read_bytes(path):
    """The bytes of a file, unless something else is saved under its name."""
    content = _read_file(path)
    start = content[:100].lstrip().lower()
    for beginning, problem in NOT_THE_FILE.items():
        if start.startswith(beginning):
            raise DataError(f"{path}:1: {problem}")
    return content


def sha256(path):
    """The SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(_read_file(path)).hexdigest()


def _read_file(path):
    """The bytes of an ordinary file that is not too large. Raises DataError."""
    try:
        found = os.stat(path)  # first: opening a pipe may block for ever
        is_file = stat.S_ISREG(found.st_mode)
        if is_file and found.st_size <= MAX_FILE:
            with open(path, "rb") as file:
                return file.read()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        problem = getattr(error, "strerror", error)
        raise DataError(
            f"{path}: cannot be read ({problem}); check the path and its permissions"
        ) from None
    if is_file:
        raise DataError(
            f"{path}: {found.st_size:,} bytes, and {MAX_FILE:,} are the limit; "
            "give a smaller file"
        )
    if stat.S_ISDIR(found.st_mode):
        raise DataError(f"{path}: a folder; give the path of a file in it")
    raise DataError(f"{path}: a pipe or a device; give the path of an ordinary file")


# What is invisible or broken, and no model should learn: control characters (but those that
# are white space: split() in `clean` takes them), marks of the direction of writing,
# zero-width spaces, U+FFFD, lone surrogates.
_INVISIBLE = (
    "[\0-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e"
    "\u2060-\u206f\ufeff\ufff9-\ufffb\ufffd\ud800-\udfff]"
)
# The joiners U+200C and U+200D shape Persian and Hindi words and make families of emoji. They
# stay after a character that can be joined, and are stray elsewhere.
_STRAY_JOINERS = (
    "(?<![\u200c\u200d\u0600-\u1fff\u2070-\u2fff\u3001-\ud7ff\uf900-\ufefe\uff00-\uffef"
    "\U00010000-\U000dffff])[\u200c\u200d]+"
)
# Tags spell the flags of England, Scotland and Wales after a black flag, and are stray
# elsewhere.
_STRAY_TAGS = "(?<![\U0001f3f4\U000e0000-\U000e007f])[\U000e0000-\U000e007f]+"
_REMOVED = re.compile(f"{_INVISIBLE}|{_STRAY_JOINERS}|{_STRAY_TAGS}")
# Letters or symbols that show nothing.
_BLANK_LETTERS = "\u115f\u1160\u2800\u3164\uffa0"


def clean(text):
    """The text without invisible characters, white space collapsed; "" if nothing shows."""
    text = " ".join(_REMOVED.sub("", text).split())
    for character in text:
        # letters, numbers, punctuation and symbols
        if unicodedata.category(character)[0] in "LNPS" and character not in _BLANK_LETTERS:
            return text
    return ""


# ---- 6. Download ----------------------------------------------------------------------------

EPITOME_URL = (
    "https://raw.githubusercontent.com/behavioral-data/Empathy-Mental-Health/master/dataset/"
)
SOURCES = [  # (url, path below the data folder, SHA-256, the files to unpack from an archive)
    (
        "https://dl.fbaipublicfiles.com/parlai/empatheticdialogues/empatheticdialogues.tar.gz",
        "empatheticdialogues.tar.gz",
        "56f234d77b7dd1f005fd365bb17769cfe346c3c84295b69bc069c8ccb83be03d",
        [
            "empatheticdialogues/train.csv",
            "empatheticdialogues/valid.csv",
            "empatheticdialogues/test.csv",
        ],
    ),
    (
        EPITOME_URL + "emotional-reactions-reddit.csv",
        "epitome/emotional-reactions-reddit.csv",
        "225b28ffdc257f8a997d557eb937e78b68235e6203c87c7e2203d00fef8545cc",
        [],
    ),
    (
        EPITOME_URL + "interpretations-reddit.csv",
        "epitome/interpretations-reddit.csv",
        "2cedbe4252c919d22a6f46685afa16d3192a91e3306c2d4a386be12a30ad3f29",
        [],
    ),
    (
        EPITOME_URL + "explorations-reddit.csv",
        "epitome/explorations-reddit.csv",
        "9efa1af8e0537c16894379598f2076cb380ae18aacd9a8d26ebd381f5b7f9645",
        [],
    ),
]
MAX_DOWNLOAD = 50_000_000  # bytes, nearly twice the archive: no server may fill the disk
NETWORK_ERRORS = (URLError, HTTPException, ConnectionError, TimeoutError, ssl.SSLError)


def download(folder, sources=SOURCES, progress=print):
    """Fetch what is missing, resume what was cut off, check SHA-256, unpack. Raises DataError.

    A second call only unpacks again, which repairs damaged csv files. A file that someone has
    put in its place by hand is taken if it is the published one.
    """
    for url, name, digest, members in sources:
        path = os.path.join(folder, name)
        if _is_published(path, digest):
            progress(f"{name}: already there, and as it was published")
        else:
            if os.path.exists(path):
                progress(f"{path}: not the published file, its SHA-256 differs; fetched anew")
            _fetch(url, path, digest, progress)
            progress(f"{name}: checked and in place")
        if members:
            _unpack(path, folder, members)


def _is_published(path, digest):
    """Whether the file is there and has this SHA-256."""
    return os.path.isfile(path) and sha256(path) == digest


def _fetch(url, path, digest, progress):
    """Put the file with this SHA-256 at `path`; until it is whole it is called `path`.part."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    partial = f"{path}.part"
    by_hand = f"fetch it with a browser, put it at {path}, then run the same command again"
    or_by_hand = f"if that does not help once the network lets you through, {by_hand}"
    try:
        if not _is_published(partial, digest):
            _fetch_rest(url, partial, progress)
    except NETWORK_ERRORS as error:
        # Trying again cannot mend a bad certificate, a refusal or a missing page.
        if re.search("certificate|Error 40[34]", str(error)):
            raise DataError(f"{url}: {error}; {by_hand}") from None
        if getattr(error, "code", 0) != 416:  # 416: nothing is left to fetch
            raise DataError(
                f"{url}: {error}; run the same command again, it goes on from here; {or_by_hand}"
            ) from None
    if not _is_published(partial, digest):
        os.remove(partial)
        raise DataError(
            f"{url}: not the published file, its SHA-256 differs; run the same command again; "
            f"{or_by_hand}"
        )
    os.replace(partial, path)


def _fetch_rest(url, partial, progress):
    """Append to a file what it still lacks; a server that ignores Range starts it over."""
    have = 0
    request = Request(url)
    if os.path.exists(partial):
        have = os.path.getsize(partial)
        request.add_header("Range", f"bytes={have}-")
    with urlopen(request, timeout=30) as answer:
        if answer.status != 206:  # not the rest of the file, but all of it
            have = 0
        size = have + (answer.length or 0)  # in all, if the server says it
        with open(partial, "ab") as file:
            file.truncate(have)
            while have <= MAX_DOWNLOAD and (block := answer.read(1 << 20)):
                file.write(block)
                have += len(block)
                of_all = f" of {size:,}" if size else ""
                progress(f"{os.path.basename(partial)}: {have:,}{of_all} bytes")
    if have < size <= MAX_DOWNLOAD:  # if larger, its SHA-256 will differ
        raise ConnectionError(f"cut off at {have} of {size} bytes")


def _unpack(archive, folder, names):
    """Write these files of an archive to the folder, and nothing else that it may hold."""
    contents = {}
    try:
        with tarfile.open(archive) as tar:
            for item in tar:
                name = item.name.removeprefix("./")
                if name in names and item.isfile():
                    contents[name] = tar.extractfile(item).read()
    except (tarfile.TarError, EOFError) as error:
        raise DataError(
            f"{archive}: damaged archive ({error}); remove it and fetch it again"
        ) from None
    for name in names:
        if name not in contents:
            raise DataError(f"{archive}: no {name} in it; fetch it again")
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(f"{path}.tmp", "wb") as file:
            file.write(contents[name])
        os.replace(f"{path}.tmp", path)  # a crash leaves no half file under the name


# ---- 7. The generated world: its rule, how dialogues are drawn, an oracle -------------------

# One dialogue of it, from the beginning:
#
# situation I saw my old school in CITY > school in CITY. On the left the opener, which begins
#           the context, on the right the topic, what a listener calls it. CITY is a slot.
# scene     the situation with CITY = Cairo; the emotion "nostalgic", of valence pos and family
#           inward; mild; 2 turns
# context   I saw my old school in Cairo. I feel somewhat nostalgic inside.
#           Is that so?
#           I have told my friends at work. It is just a small thing.
# modal     er 0, ip 2, ex 0: the likeliest levels, by the rule of `modal_levels`
# drawn     er 0, ip 2, ex 1: each level is the modal one with probability 0.76
# response  I can see why the school in Cairo makes you nostalgic. Can you tell me more?


class Emotion(NamedTuple):
    """One of the 32 emotions of EmpatheticDialogues."""

    name: str
    valence: str  # "neg" or "pos"
    family: str  # "inward": about oneself; "outward": about others and the world
    feelings: list[str]  # words for it
    situations: list[list[tuple[str, str]]]  # each a list of (opener, topic)


class Scene(NamedTuple):
    """What a context is about."""

    emotion: Emotion
    situation: list[tuple[str, str]]  # every (opener, topic) of it; the scene's own is below
    opener: str
    topic: str
    severe: bool  # the feeling is strong, also if it is joy; otherwise it is mild
    turns: int  # how often the speaker speaks, 1 to 3


def modal_levels(valence, family, severe, turns):
    """The likeliest (er, ip, ex): the rule of this world, for a policy to find out.

    er: 1 if severe, and 1 more if the news is bad.
    ip: 1 if mild, and 1 more if it is about the inner life.
    ex: 2, less 1 for each turn after the first, and less 1 if mild; never below 0.
    """
    mild = not severe
    er = severe + (valence == "neg")
    ip = mild + (family == "inward")
    ex = max(0, 2 - (turns - 1) - mild)
    return er, ip, ex


def generated_corpus(seed=0, num_train=12000, num_valid=300, num_test=600, num_labelled=8000):
    """Dialogues of the generated world.

    No context occurs twice; the same seed gives the same corpus. Given the context, each
    mechanism independently has its modal level with probability 0.76 and the other two with
    0.12 each. In the labelled parts 8 % of the responses are drawn for another topic, so
    that an identifier has to compare response and context.
    """
    note = (
        f"generated world, seed {seed}: {num_train} / {num_valid} / {num_test} dialogues, "
        f"{num_labelled} labelled for the identifiers, as many for the judge"
    )
    corpus = Corpus({}, {}, [note])
    # A context in `seen` is not drawn again. The training parts come last, so that their sizes
    # change no test and no validation part.
    sizes = [
        ("test", num_test),
        ("valid", num_valid),
        ("labelled/test", 600),
        ("labelled/valid", 400),
        ("labelled/judge_valid", 400),
        ("train", num_train),
        ("labelled/train", num_labelled),
        ("labelled/judge_train", num_labelled),
    ]
    seen = set()
    for name, size in sizes:
        rng = random.Random(f"{seed} {name}")
        is_labelled = name.startswith("labelled/")
        drawn = [
            draw_dialogue(rng, f"{name}/{i}", seen, 0.08 * is_labelled) for i in range(size)
        ]
        part = [dialogue for dialogue, _ in drawn]
        if is_labelled:
            corpus.labelled[name.removeprefix("labelled/")] = part
        else:
            corpus.dialogues[name] = part
            corpus.level_probs |= {dialogue.id: probs for dialogue, probs in drawn}
    return corpus


def draw_dialogue(rng, dialogue_id, seen, p_mismatch):
    """(Dialogue, P(level | context)) with a context that is not in `seen` and is added to it.

    With probability `p_mismatch` the response is about another topic.
    """
    while True:
        scene = draw_scene(rng)
        context = draw_context(rng, scene)
        if context not in seen:
            break
    seen.add(context)

    emotion = scene.emotion
    probs = []
    for modal in modal_levels(emotion.valence, emotion.family, scene.severe, scene.turns):
        probs.append(tuple(0.76 if level == modal else 0.12 for level in range(LEVELS)))
    levels = tuple(rng.choices(range(LEVELS), p)[0] for p in probs)

    topic = scene.topic
    is_mismatched = rng.random() < p_mismatch
    if is_mismatched:
        emotion, topic = draw_other_topic(rng, scene)
    response = draw_response(rng, emotion, topic, levels)
    if is_mismatched:
        # The drawn levels no longer hold, so the oracle reads those of the response: off topic
        # a phrase of level 2 counts as 1, a phrase of the other valence as 0.
        levels = oracle_levels(context, response)

    # A dialogue's emotion is what its speaker feels, whatever the response is about.
    name = scene.emotion.name
    return Dialogue(context, response, name, levels, dialogue_id), tuple(probs)


def draw_scene(rng):
    """A scene; a single turn of the speaker is the most frequent."""
    emotion = rng.choice(world().emotions)
    severe = rng.random() < 0.5
    situation = rng.choice(emotion.situations)
    turns = rng.choices((1, 2, 3), (0.5, 0.3, 0.2))[0]
    opener, topic = rng.choice(situation)
    return Scene(emotion, situation, opener, topic, severe, turns)


def draw_other_topic(rng, scene):
    """(emotion, topic) of the same situation, the same emotion, or any emotion.

    It may by chance be the same topic.
    """
    other = rng.choice(world().emotions)
    choices = (scene.emotion, scene.situation), (scene.emotion, None), (other, None)
    emotion, situation = rng.choice(choices)
    if situation is None:
        situation = rng.choice(emotion.situations)
    _, topic = rng.choice(situation)
    return emotion, topic


def draw_context(rng, scene):
    """1, 3 or 5 utterances: the speaker's turns, and short replies without content between.

    The first turn begins with the opener, one of them names the feeling, the last one tells
    how severe it is.
    """
    sentences = world().sentences
    valence = scene.emotion.valence
    degree = "severe" if scene.severe else "mild"
    details = rng.sample(sentences[f"detail {valence}"], scene.turns - 1)
    said = [f"{scene.opener}.", *details]

    feeling = rng.choice(sentences[f"feeling {degree} {scene.emotion.family}"])
    turn = rng.randrange(scene.turns)
    said[turn] += " " + feeling.replace("FEELING", rng.choice(scene.emotion.feelings))
    said[-1] += " " + rng.choice(sentences[f"{degree} {valence}"])

    context = said[:1]
    answers = rng.sample(sentences["between"], scene.turns - 1)
    for answer, utterance in zip(answers, said[1:]):
        context += [answer, utterance]
    return tuple(context)


def draw_response(rng, emotion, topic, levels):
    """A sentence for each mechanism, in the order er, ip, ex; none for level 0.

    A filler replaces an empty response, and sometimes joins another.
    """
    sentences = world().sentences
    said = []
    for name, level in zip(MECHANISMS, levels):
        if level:
            said.append(rng.choice(sentences[f"{name} {level} {emotion.valence}"]))
    if not said or rng.random() < 0.3:
        place = rng.choice((0, len(said)))
        said.insert(place, rng.choice(sentences["filler"]))
    response = " ".join(said).replace("TOPIC", f"the {topic}")
    return response.replace("FEELING", rng.choice(emotion.feelings))


def _plain(text):
    """Lower-case words and sentence ends, with single spaces between them."""
    return " ".join(re.findall(r"[a-z0-9]+|[.?!]", text.lower()))


# A negation, and the rest of its sentence, which it may negate. "no" is left out: "oh no", "no
# wonder".
_NEGATED = re.compile(
    r"\b(?:not|never|nobody|neither|nor|hardly|cannot|without|\w+n t"
    r"|(?:do|does|did|is|are|was|were|ca|wo|would|could|should|have|has|had)nt)\b[^.?!]*"
)


def oracle_levels(context, response):
    """(er, ip, ex) of any response: for each mechanism the level of its best phrase.

    If the context begins with "My dog died this week.", its topic is "death of your dog":

        I am truly sorry about the death of your dog.            (2, 0, 0)
        I am truly sorry about the lonely concert.               (1, 0, 0): another topic
        I am so sorry. What happened exactly?                    (1, 0, 1): phrases of level 1
        I do not think that I am so sorry.                       (0, 0, 0): negated
        How lovely.                                              (0, 0, 0): joy about bad news
    """
    opener = ""
    if context:
        opener = _plain(re.split("[.?!]", context[0])[0])  # its first sentence
    text = _NEGATED.sub("", _plain(response))
    text = f" {text} "

    # The topic becomes "@", so that one pattern finds a phrase about it in every context:
    # "i am truly sorry about the @ ."
    unknown = "", ("neg", "pos")  # no topic, so no level 2; phrases of both valences count
    topic, valences = world().openers.get(opener, unknown)
    if topic:
        text = text.replace(f" {topic} ", " @ ")

    levels = []
    for on_topic, any_phrase in _phrases(valences):
        if on_topic.search(text):
            levels.append(2)
        elif any_phrase.search(text):
            levels.append(1)
        else:
            levels.append(0)
    return tuple(levels)


@functools.cache
def _phrases(valences):
    """For each mechanism two patterns: what counts 2, and what counts 1 if that is not there.

    2: a phrase of level 2 about the topic of the context. 1: a phrase of level 2 about
    anything, or one of level 1.
    """
    its_topic = "(?:(?:the|your|this|that|a) )?@"
    any_topic = r"[\w@]+(?: [\w@]+){0,9}?"  # up to ten words: an article, and a topic of nine
    phrases = []
    for name in MECHANISMS:
        on_topic = _pattern(f"{name} 2", valences, its_topic)
        on_any_topic = _pattern(f"{name} 2", valences, any_topic)
        level_1 = _pattern(f"{name} 1", valences, "")
        phrases.append((re.compile(on_topic), re.compile(f"{level_1}|{on_any_topic}")))
    return phrases


def _pattern(key, valences, topic):
    r"""A regular expression for the sentences of `key`, with any feeling of these valences.

    topic: the expression for TOPIC. It may end in "@", after which \b does not match.
    """
    sentences = []
    feelings = []
    for valence in valences:
        sentences += world().sentences[f"{key} {valence}"]
        feelings += world().feelings[valence]
    feelings = "|".join(feelings)
    pattern = "|".join(_plain(sentence).strip(" .?!") for sentence in sentences)
    pattern = pattern.replace("topic", topic).replace("feeling", f"(?:{feelings})")
    return rf"\b(?:{pattern})(?!\w)"


# ---- 8. The words of the world --------------------------------------------------------------


class World:
    """The words below, as tables."""

    def __init__(self):
        self.sentences = read_sections(WORLD_SENTENCES)  # "er 1 neg" -> sentences
        self.emotions = []
        self.feelings = defaultdict(list)  # valence -> words for what is felt
        self.openers = {}  # plain opener -> its plain topic, and a tuple of its one valence
        slots = read_sections(WORLD_SLOTS)
        for heading, lines in read_sections(WORLD_SITUATIONS).items():
            kind, names = heading.split(": ")
            valence, family = kind.split()
            situations = [_fillings(line, slots) for line in lines]
            for words in names.split(", "):
                name, *feelings = re.split("[=/]", words)
                self.emotions.append(Emotion(name, valence, family, feelings, situations))
                self.feelings[valence] += feelings
            for opener, topic in itertools.chain(*situations):
                self.openers[_plain(opener)] = _plain(topic), (valence,)


@functools.cache
def world():
    """The words as tables, made on first use: importing this module takes no time."""
    return World()


def read_sections(text):
    """{heading: lines} of a text in which the lines of a section are indented."""
    sections = {}
    for line in text.strip().splitlines():
        if not line.startswith(" "):
            heading = line.rstrip(":")
        else:
            sections.setdefault(heading, []).append(" ".join(line.split()))
    return sections


def _fillings(situation, slots):
    """[(opener, topic), ...]: a situation with all values of its slots."""
    filled = [situation]
    for name in sorted(slots):
        if name in situation:
            choices = itertools.product(filled, slots[name][0].split())
            filled = [text.replace(name, value) for text, value in choices]
    return [tuple(text.split(" > ")) for text in filled]


# valence family: emotion=feeling/feeling, emotion=feeling/feeling, ...
#     opener > topic
# Similar emotions share their situations. Names in capitals are slots, which are filled with
# the values below. The topic is what a listener calls the opener's content (after "the"): a
# response can name it only by copying the slot's word from the context.
#
# Add situations, values and sentences as you like; the corpus and all figures change with
# them. What the oracle needs:
# - an opener is one sentence, without its full stop, and always has the same topic
# - a topic has at most nine words, and none is the beginning of another
# - the value of a slot is one word; all words are of plain letters a to z
# - er, ip and ex: sentences of level 2 have a TOPIC, those of level 1 have none
# - they have no negation (not, never, ...), nor the words "topic" and "feeling" themselves
# - no sentence contains one of another mechanism; fillers contain none at all
WORLD_SITUATIONS = """
neg outward: afraid=scared/frightened, terrified=terrified/panicked
    I heard steps in the ROOM at night > steps in your ROOM
    There is a BUG in my ROOM          > BUG in your ROOM
    I need surgery on my LIMB          > surgery on your LIMB
    A BUG chased me in CITY            > BUG in CITY
    Someone broke into my ROOM         > burglar in your ROOM
    My plane to CITY almost crashed    > plane to CITY
    A truck almost hit my WHO          > truck near your WHO
    They found a lump on my LIMB       > lump on your LIMB

neg outward: angry=angry/bitter, annoyed=annoyed/irritated, furious=furious/enraged
    Someone scratched my new ITEM   > scratch on your ITEM
    My WHO read my diary            > diary your WHO read
    My WHO broke my ITEM on purpose > ITEM your WHO broke
    My ITEM broke down again        > trouble with your ITEM
    My WHO always borrows my ITEM   > ITEM your WHO borrows
    Someone stole my ITEM           > theft of your ITEM
    A driver hit my PET and fled    > driver who hit your PET
    My WHO ruined my EVENT          > EVENT your WHO ruined

neg outward: disappointed=disappointed/discouraged
    My WHO missed my EVENT        > EVENT your WHO missed
    My trip to CITY was canceled  > canceled trip to CITY
    My new ITEM broke on day one  > broken ITEM
    They did not hire me as a JOB > rejection as a JOB
    The FOOD I ordered was cold   > cold FOOD
    We lost the SPORT final       > lost SPORT final

neg outward: disgusted=disgusted/revolted
    I found a hair in my FOOD            > hair in your FOOD
    A dead BUG was in my ROOM            > dead BUG in your ROOM
    My WHO never washes                  > smell of your WHO
    There is mold in the ROOM            > mold in the ROOM
    A man spat on my ITEM                > spit on your ITEM
    Someone left rotten FOOD in the ROOM > rotten FOOD in the ROOM

neg outward: jealous=jealous/envious
    My WHO got a better ITEM                   > better ITEM of your WHO
    My WHO went to CITY without me             > CITY trip of your WHO
    My PET prefers my WHO                      > taste of your PET
    My WHO works as a JOB now                  > success as a JOB
    My WHO won a SPORT prize                   > SPORT prize
    My partner danced with her ex at the EVENT > dance at the EVENT

neg inward: anxious=anxious/nervous, apprehensive=uncertain/hesitant
    My EXAM exam is next week         > EXAM exam
    I must give a speech at the EVENT > speech at the EVENT
    I have an interview as a JOB      > interview as a JOB
    I have to fly alone to CITY       > flight to CITY
    My WHO has not called for days    > silence of your WHO
    My first day as a JOB is near     > first day as a JOB
    A doctor must see my LIMB again   > checkup of your LIMB
    I must present my EXAM project    > EXAM project

neg inward: ashamed=ashamed/awful, embarrassed=embarrassed/silly, guilty=guilty/terrible
    I cheated in my EXAM exam       > cheating in EXAM
    I missed the birthday of my WHO > birthday of your WHO
    I fell at the EVENT             > fall at the EVENT
    I sent a love poem to my WHO    > poem to your WHO
    I failed EXAM twice             > failed EXAM exam
    I dropped the FOOD at the EVENT > FOOD on the floor
    I forgot to feed my PET         > hunger of your PET
    I lied to my WHO                > lie to your WHO
    I skipped the EVENT of my WHO   > EVENT of your WHO
    I left my PET alone all day     > lonely day of your PET

neg inward: devastated=devastated/broken, sad=sad/heartbroken
    My PET died this week           > death of your PET
    The doctors can not help my WHO > illness of your WHO
    A fire destroyed my ROOM        > fire in your ROOM
    My partner left me at the EVENT > breakup at the EVENT
    My WHO was in a car accident    > accident of your WHO
    My PET is very sick             > sickness of your PET
    My WHO moved out last month     > empty room of your WHO
    I had to give away my PET       > goodbye to your PET

neg inward: lonely=lonely/isolated
    My WHO moved away to CITY       > distance to your WHO
    I sat all alone at the EVENT    > lonely EVENT
    I know nobody in CITY           > lonely life in CITY
    I eat my FOOD alone every night > lonely FOOD
    My WHO has no time for me       > busy life of your WHO
    Nobody came to my EVENT         > empty EVENT

pos inward: anticipating=eager/curious, hopeful=hopeful/encouraged
    The EVENT is only a week away  > coming EVENT
    My WHO comes to see me soon    > visit of your WHO
    I booked a trip to CITY        > trip to CITY
    I start a ART course on Monday > ART course
    My new ITEM comes tomorrow     > arrival of your ITEM
    My WHO is getting better       > recovery of your WHO
    I may soon work as a JOB       > chance as a JOB
    There is a cure for my LIMB    > cure for your LIMB
    My WHO talks to me again       > peace with your WHO

pos inward: confident=confident/strong, prepared=prepared/ready
    I studied hard for the EXAM exam   > EXAM exam
    I know we will win the SPORT final > SPORT final
    I applied for a job as a JOB       > job as a JOB
    My FOOD will win the contest       > contest with your FOOD
    I packed my bag for CITY           > bag for CITY
    I trained for the SPORT camp       > SPORT camp
    I have a plan for the EXAM exam    > EXAM plan
    I stored FOOD for the storm        > FOOD for the storm

pos inward: content=content/calm
    I spent the evening with my PET > evening with your PET
    I ate warm FOOD by the window   > warm FOOD
    My ROOM is finally clean        > clean ROOM
    I had a quiet day in CITY       > quiet day in CITY
    I like my work as a JOB         > work as a JOB
    I sat in the garden with my WHO > garden hour with your WHO

pos inward: nostalgic=nostalgic/wistful, sentimental=sentimental/emotional
    I found my old ITEM             > old ITEM
    I ate the FOOD of my childhood  > FOOD of your childhood
    I saw my old school in CITY     > school in CITY
    I heard the song of our EVENT   > song of the EVENT
    I still wear the ring of my WHO > ring of your WHO
    I got a letter from my WHO      > letter from your WHO
    I saw a video of our EVENT      > video of the EVENT
    I drew my old PET               > drawing of your PET

pos inward: proud=proud/accomplished
    I finished the ART course  > end of the ART course
    I won my first SPORT match > first SPORT match
    I taught my PET to sit     > training of your PET
    I built a ITEM by myself   > ITEM you built
    I got top marks in EXAM    > top mark in EXAM
    My WHO graduated this year > graduation of your WHO

pos outward: caring=tender/protective
    I look after my old WHO every day > care for your WHO
    I took in a hurt PET              > hurt PET
    I cook FOOD for my WHO each week  > FOOD for your WHO
    I feed a stray PET every day      > stray PET
    I made a blanket for my PET       > blanket for your PET
    I help my WHO learn EXAM          > EXAM help for your WHO

pos outward: grateful=grateful/thankful
    My WHO lent me money        > loan from your WHO
    A stranger returned my ITEM > return of your ITEM
    My WHO cooked FOOD for me   > FOOD from your WHO
    A kind JOB treated my LIMB  > JOB who treated your LIMB
    My WHO fed my PET           > favor for your PET
    My WHO helped me with EXAM  > EXAM help from your WHO

pos outward: excited=excited/thrilled, joyful=joyful/cheerful, surprised=surprised/astonished
    I won a ticket to the EVENT      > ticket to the EVENT
    I fly to CITY tomorrow           > flight to CITY
    We get a PET this weekend        > new PET
    My WHO bought me a ITEM          > ITEM from your WHO
    My WHO had a baby                > baby of your WHO
    I passed my EXAM exam            > passed EXAM exam
    I played in the snow with my PET > snow day with your PET
    I won a ITEM in a raffle         > ITEM you won
    My PET came back after a year    > return of your PET
    My WHO became a JOB              > new job of your WHO

pos outward: faithful=loyal/devoted, trusting=safe/secure
    I stood by my WHO in a hard year > bond with your WHO
    I kept my promise to my WHO      > promise to your WHO
    I kept my old PET                > life with your PET
    I gave my WHO my house key       > key you gave your WHO
    I lent my WHO my ITEM            > ITEM you lent your WHO
    I told my WHO everything         > trust in your WHO
    A friend watches my PET          > friend who watches your PET
    My WHO shows us around CITY      > tour of CITY

pos outward: impressed=impressed/amazed
    My WHO won the SPORT final     > SPORT win of your WHO
    A child sang at the EVENT      > child at the EVENT
    My PET learned a trick         > trick of your PET
    My WHO speaks five languages   > talent of your WHO
    A young JOB fixed it all       > skill of the JOB
    My WHO built a ITEM from scrap > ITEM your WHO built
"""

WORLD_SLOTS = """
PET:
    dog cat puppy kitten hamster parrot rabbit pony turtle goat
WHO:
    sister brother mother father cousin aunt uncle neighbor roommate grandmother
ITEM:
    phone laptop bike camera guitar watch radio drum scooter tablet
EXAM:
    math physics history biology French chemistry driving music geography Spanish
CITY:
    Rome Paris Tokyo Oslo Cairo Berlin Havana Boston Lima Vienna
ROOM:
    kitchen bathroom cellar garage attic hallway bedroom office pantry cabin
EVENT:
    wedding concert party reunion picnic dinner festival banquet ceremony show
SPORT:
    tennis chess football swimming boxing hockey rowing judo cycling golf
FOOD:
    soup cake pizza lasagna curry bread pie salad pudding stew
BUG:
    spider snake rat wasp wolf bat scorpion fox boar lizard
LIMB:
    knee back shoulder ankle elbow hip foot neck wrist hand
JOB:
    nurse teacher chef pilot baker driver lawyer clerk painter guide
ART:
    pottery painting dance cooking yoga sewing drawing writing singing theater
"""

WORLD_SENTENCES = """
severe neg:
    I can not stop thinking about it.
    It keeps me awake at night.
    It is too much for me.
    I cry every day because of it.
    It is the worst thing in years.
    I can hardly breathe when I think of it.

mild neg:
    I will get over it soon.
    It is not a big deal.
    It only bothers me a little.
    I can live with it.
    There are worse things in life.
    It is no great drama.

severe pos:
    It means the world to me.
    I can not stop smiling.
    It is the best thing in years.
    I could shout it from the roof.
    I have never felt like this before.
    My heart is about to burst.

mild pos:
    It is just a small thing.
    It is nothing special.
    It makes the week a bit nicer.
    It is a small pleasure.
    It is no great event.
    I only wanted to mention it.

detail neg:
    I have told nobody at work.
    It began last Monday.
    My friends do not know what to say.
    It is new for me.
    I was alone when I found out.
    I wrote it in my diary.
    Nobody else seems to care.
    I did not plan for this.
    I had hoped for a better week.
    My partner says little about it.

detail pos:
    I have told my friends at work.
    It began last Monday.
    My friends smile when I talk about it.
    It is new for me.
    I was at home when I found out.
    I wrote it in my diary.
    My partner likes it too.
    I did not plan for this.
    I had hoped for a good week.
    I called my best friend right away.

feeling severe inward:
    I feel so FEELING.
    I am terribly FEELING.
    I feel extremely FEELING inside.

feeling mild inward:
    I feel a bit FEELING.
    I am slightly FEELING.
    I feel somewhat FEELING inside.

feeling severe outward:
    It makes me so FEELING.
    That leaves me terribly FEELING.
    It gets me extremely FEELING.

feeling mild outward:
    It makes me a bit FEELING.
    That leaves me slightly FEELING.
    It gets me somewhat FEELING.

between:
    Oh?
    Go on.
    Really?
    I am listening.
    Hm, okay.
    Is that so?
    And then?

filler:
    I see.
    These things happen.
    Life is like that.
    Time will tell.
    Maybe take a walk.
    You could make a list.
    Tomorrow is another day.
    Have a cup of tea.
    That is how it goes.
    Every week brings something.
    It may rain later today.
    A good meal never hurts.

er 1 neg:
    I am sorry to hear that.
    Oh no, that is sad.
    That is really unfortunate.
    I feel bad for you.
    I am so sorry.

er 1 pos:
    I am happy for you.
    That is wonderful.
    How lovely.
    That is great news.
    Good for you.

er 2 neg:
    My heart hurts for you over TOPIC.
    I am truly sorry about TOPIC.
    It makes me sad to hear about TOPIC.
    I send you a big hug because of TOPIC.
    My heart is heavy when I think of TOPIC.

er 2 pos:
    I am overjoyed for you about TOPIC.
    It makes me so happy to hear about TOPIC.
    I am delighted for you because of TOPIC.
    My heart sings when I think of TOPIC.
    I am smiling with you about TOPIC.

ip 1 neg:
    I understand how you feel.
    I know what you mean.
    That must be hard.
    I can relate to that.
    I have been there too.

ip 1 pos:
    I understand how you feel.
    I know that joy.
    That must feel good.
    I can imagine that.
    I have felt the same.

ip 2 neg:
    You must feel FEELING about TOPIC.
    I would feel FEELING about TOPIC too.
    No wonder TOPIC makes you feel FEELING.
    It sounds like you are FEELING because of TOPIC.
    Anyone would be FEELING about TOPIC.

ip 2 pos:
    You must feel FEELING about TOPIC.
    I would feel FEELING about TOPIC too.
    I can see why TOPIC makes you FEELING.
    It sounds like you are FEELING because of TOPIC.
    It is clear that TOPIC makes you feel FEELING.

ex 1 neg:
    What happened exactly?
    Do you want to talk about it?
    How are you doing now?
    What will you do next?
    Is anyone helping you?

ex 1 pos:
    Can you tell me more?
    How did that come about?
    What comes next?
    Who else knows?
    How does it feel?

ex 2 neg:
    How are you coping with TOPIC now?
    What is the hardest part of TOPIC?
    Have you talked to anyone about TOPIC?
    What would help you with TOPIC?
    How long have you been dealing with TOPIC?

ex 2 pos:
    What do you like best about TOPIC?
    What makes TOPIC so special to you?
    Who have you told about TOPIC?
    Can you tell me the whole story of TOPIC?
    What did your friends say about TOPIC?
"""
