"""Corpora, tokenizer and batches: everything between a file (or a seed) and padded token ids.

Three corpora in one shape: `embedded`, a generated world in which the levels of every response are known; `real`,
EmpatheticDialogues (dialogue) and EPITOME (responses with levels); and `yours`, a .jsonl or .csv file.
Levels: 0 none, 1 weak, 2 strong, for each of emotional reaction (er), interpretation (ip) and exploration (ex):
Sharma et al. 2020, arXiv 2009.08441. `python data.py download DIR` fetches the two public data sets."""

import copy, csv, functools, hashlib, html, io, itertools, json, os, random, re, shlex, stat, sys, unicodedata
from collections import Counter, defaultdict, namedtuple
from dataclasses import dataclass, field, replace

import numpy as np
import sentencepiece
import torch

MECHANISMS, LEVELS = ("er", "ip", "ex"), 3


# Control characters, line ends, marks that change the direction of writing, and half surrogates.
_UNSAFE = re.compile(
    "[\0-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text):
    """One line that is safe in a terminal: what could steer it is written out, as in "\\x1b"."""
    return _UNSAFE.sub(lambda found: ascii(found[0])[1:-1], str(text))


class DataError(ValueError):
    """A file or option that can not be used. One line: 'path:line: what is wrong; what to do'."""

    def __init__(self, message):
        super().__init__(printable(message))


def command_line(words, windows=os.name == "nt"):
    """The words as they are typed: with quotes where a shell, or on Windows PowerShell or cmd, needs them."""
    if not windows:
        return shlex.join(words)
    typed = []
    for word in words:
        if not re.fullmatch(r"[\w.:=+/\\-]+", word):
            word = re.sub(
                r'(\\*)"', r'\1\1\\"', word
            )  # a backslash before a quote counts double
            word = f'"{word}{word[len(word.rstrip(chr(92))) :]}"'  # also before the last quote
        typed.append(word)
    return " ".join(typed)


@dataclass(frozen=True)
class Dialogue:
    context: tuple[str, ...]  # the utterances before the response, oldest first
    response: str  # the listener's reply: the target
    emotion: str = ""
    levels: tuple[int, int, int] | None = None  # er, ip, ex; None where nobody has said
    id: str = ""


@dataclass
class Corpus:
    dialogues: dict[
        str, list[Dialogue]
    ]  # "train", "valid", "test"; real: "turns", of both speakers, for pre-training
    labelled: dict[
        str, list[Dialogue]
    ]  # those three, and "judge_train", "judge_valid" for the judge
    notes: list[str]  # what was read, what was skipped, and why
    level_probs: dict[str, tuple] = field(
        default_factory=dict
    )  # embedded: id -> P(level | context), (3, 3)


# ---- the embedded world ---------------------------------------------------------------------------------------------
def _table(text, separator=" / "):
    """{key: [a, b, c]} of entries 'key: a / b / c', on lines of their own or after ' | '."""
    return {
        key: body.split(separator)
        for key, body in (e.split(": ", 1) for e in re.split(r"\n| \| ", text.strip()))
    }


# valence ("neg", "pos") family ("inward": about oneself, "outward": about others and the world), emotion feeling feeling,
# ...: opener > topic; ... Similar emotions share their situations. The topic is what a listener calls the opener's content
# (after "the"), with the values of its slots (in capitals): a response can name it only by copying. None begins like another.
WORLD = """neg outward, afraid scared frightened, terrified terrified panicked: I heard steps in the ROOM at night > steps in your ROOM; There is a BUG in my ROOM > BUG in your ROOM; I need surgery on my LIMB > surgery on your LIMB; A BUG chased me in CITY > BUG in CITY; Someone broke into my ROOM > burglar in your ROOM; My plane to CITY almost crashed > plane to CITY; A truck almost hit my WHO > truck near your WHO; They found a lump on my LIMB > lump on your LIMB | neg outward, angry angry bitter, annoyed annoyed irritated, furious furious enraged: Someone scratched my new ITEM > scratch on your ITEM; My WHO read my diary > diary your WHO read; My WHO broke my ITEM on purpose > ITEM your WHO broke; My ITEM broke down again > trouble with your ITEM; My WHO always borrows my ITEM > ITEM your WHO borrows; Someone stole my ITEM > theft of your ITEM; A driver hit my PET and fled > driver who hit your PET; My WHO ruined my EVENT > EVENT your WHO ruined | neg outward, disappointed disappointed discouraged: My WHO missed my EVENT > EVENT your WHO missed; My trip to CITY was canceled > canceled trip to CITY; My new ITEM broke on day one > broken ITEM; They did not hire me as a JOB > rejection as a JOB; The FOOD I ordered was cold > cold FOOD; We lost the SPORT final > lost SPORT final | neg outward, disgusted disgusted revolted: I found a hair in my FOOD > hair in your FOOD; A dead BUG was in my ROOM > dead BUG in your ROOM; My WHO never washes > smell of your WHO; There is mold in the ROOM > mold in the ROOM; A man spat on my ITEM > spit on your ITEM; Someone left rotten FOOD in the ROOM > rotten FOOD in the ROOM | neg outward, jealous jealous envious: My WHO got a better ITEM > better ITEM of your WHO; My WHO went to CITY without me > CITY trip of your WHO; My PET prefers my WHO > taste of your PET; My WHO works as a JOB now > success as a JOB; My WHO won a SPORT prize > SPORT prize; My partner danced with her ex at the EVENT > dance at the EVENT | neg inward, anxious anxious nervous, apprehensive uncertain hesitant: My EXAM exam is next week > EXAM exam; I must give a speech at the EVENT > speech at the EVENT; I have an interview as a JOB > interview as a JOB; I have to fly alone to CITY > flight to CITY; My WHO has not called for days > silence of your WHO; My first day as a JOB is near > first day as a JOB; A doctor must see my LIMB again > checkup of your LIMB; I must present my EXAM project > EXAM project | neg inward, ashamed ashamed awful, embarrassed embarrassed silly, guilty guilty terrible: I cheated in my EXAM exam > cheating in EXAM; I missed the birthday of my WHO > birthday of your WHO; I fell at the EVENT > fall at the EVENT; I sent a love poem to my WHO > poem to your WHO; I failed EXAM twice > failed EXAM exam; I dropped the FOOD at the EVENT > FOOD on the floor; I forgot to feed my PET > hunger of your PET; I lied to my WHO > lie to your WHO; I skipped the EVENT of my WHO > EVENT of your WHO; I left my PET alone all day > lonely day of your PET | neg inward, devastated devastated broken, sad sad heartbroken: My PET died this week > death of your PET; The doctors can not help my WHO > illness of your WHO; A fire destroyed my ROOM > fire in your ROOM; My partner left me at the EVENT > breakup at the EVENT; My WHO was in a car accident > accident of your WHO; My PET is very sick > sickness of your PET; My WHO moved out last month > empty room of your WHO; I had to give away my PET > goodbye to your PET | neg inward, lonely lonely isolated: My WHO moved away to CITY > distance to your WHO; I sat all alone at the EVENT > lonely EVENT; I know nobody in CITY > lonely life in CITY; I eat my FOOD alone every night > lonely FOOD; My WHO has no time for me > busy life of your WHO; Nobody came to my EVENT > empty EVENT | pos inward, anticipating eager curious, hopeful hopeful encouraged: The EVENT is only a week away > coming EVENT; My WHO comes to see me soon > visit of your WHO; I booked a trip to CITY > trip to CITY; I start a ART course on Monday > ART course; My new ITEM comes tomorrow > arrival of your ITEM; My WHO is getting better > recovery of your WHO; I may soon work as a JOB > chance as a JOB; There is a cure for my LIMB > cure for your LIMB; My WHO talks to me again > peace with your WHO | pos inward, confident confident strong, prepared prepared ready: I studied hard for the EXAM exam > EXAM exam; I know we will win the SPORT final > SPORT final; I applied for a job as a JOB > job as a JOB; My FOOD will win the contest > contest with your FOOD; I packed my bag for CITY > bag for CITY; I trained for the SPORT camp > SPORT camp; I have a plan for the EXAM exam > EXAM plan; I stored FOOD for the storm > FOOD for the storm | pos inward, content content calm: I spent the evening with my PET > evening with your PET; I ate warm FOOD by the window > warm FOOD; My ROOM is finally clean > clean ROOM; I had a quiet day in CITY > quiet day in CITY; I like my work as a JOB > work as a JOB; I sat in the garden with my WHO > garden hour with your WHO | pos inward, nostalgic nostalgic wistful, sentimental sentimental emotional: I found my old ITEM > old ITEM; I ate the FOOD of my childhood > FOOD of your childhood; I saw my old school in CITY > school in CITY; I heard the song of our EVENT > song of the EVENT; I still wear the ring of my WHO > ring of your WHO; I got a letter from my WHO > letter from your WHO; I saw a video of our EVENT > video of the EVENT; I drew my old PET > drawing of your PET | pos inward, proud proud accomplished: I finished the ART course > end of the ART course; I won my first SPORT match > first SPORT match; I taught my PET to sit > training of your PET; I built a ITEM by myself > ITEM you built; I got top marks in EXAM > top mark in EXAM; My WHO graduated this year > graduation of your WHO
pos outward, caring tender protective: I look after my old WHO every day > care for your WHO; I took in a hurt PET > hurt PET; I cook FOOD for my WHO each week > FOOD for your WHO; I feed a stray PET every day > stray PET; I made a blanket for my PET > blanket for your PET; I help my WHO learn EXAM > EXAM help for your WHO | pos outward, grateful grateful thankful: My WHO lent me money > loan from your WHO; A stranger returned my ITEM > return of your ITEM; My WHO cooked FOOD for me > FOOD from your WHO; A kind JOB treated my LIMB > JOB who treated your LIMB; My WHO fed my PET > favor for your PET; My WHO helped me with EXAM > EXAM help from your WHO | pos outward, excited excited thrilled, joyful joyful cheerful, surprised surprised astonished: I won a ticket to the EVENT > ticket to the EVENT; I fly to CITY tomorrow > flight to CITY; We get a PET this weekend > new PET; My WHO bought me a ITEM > ITEM from your WHO; My WHO had a baby > baby of your WHO; I passed my EXAM exam > passed EXAM exam; I played in the snow with my PET > snow day with your PET; I won a ITEM in a raffle > ITEM you won; My PET came back after a year > return of your PET; My WHO became a JOB > new job of your WHO | pos outward, faithful loyal devoted, trusting safe secure: I stood by my WHO in a hard year > bond with your WHO; I kept my promise to my WHO > promise to your WHO; I kept my old PET > life with your PET; I gave my WHO my house key > key you gave your WHO; I lent my WHO my ITEM > ITEM you lent your WHO; I told my WHO everything > trust in your WHO; A friend watches my PET > friend who watches your PET; My WHO shows us around CITY > tour of CITY | pos outward, impressed impressed amazed: My WHO won the SPORT final > SPORT win of your WHO; A child sang at the EVENT > child at the EVENT; My PET learned a trick > trick of your PET; My WHO speaks five languages > talent of your WHO; A young JOB fixed it all > skill of the JOB; My WHO built a ITEM from scrap > ITEM your WHO built"""
SLOTS = _table(
    """pet: dog cat puppy kitten hamster parrot rabbit pony turtle goat | who: sister brother mother father cousin aunt uncle neighbor roommate grandmother | item: phone laptop bike camera guitar watch radio drum scooter tablet | exam: math physics history biology French chemistry driving music geography Spanish | city: Rome Paris Tokyo Oslo Cairo Berlin Havana Boston Lima Vienna | room: kitchen bathroom cellar garage attic hallway bedroom office pantry cabin | event: wedding concert party reunion picnic dinner festival banquet ceremony show | sport: tennis chess football swimming boxing hockey rowing judo cycling golf | food: soup cake pizza lasagna curry bread pie salad pudding stew | bug: spider snake rat wasp wolf bat scorpion fox boar lizard | limb: knee back shoulder ankle elbow hip foot neck wrist hand | job: nurse teacher chef pilot baker driver lawyer clerk painter guide | art: pottery painting dance cooking yoga sewing drawing writing singing theater""",
    " ",
)
SENTENCES = _table("""severe neg: I can not stop thinking about it. / It keeps me awake at night. / It is too much for me. / I cry every day because of it. / It is the worst thing in years. / I can hardly breathe when I think of it. | mild neg: I will get over it soon. / It is not a big deal. / It only bothers me a little. / I can live with it. / There are worse things in life. / It is no great drama. | severe pos: It means the world to me. / I can not stop smiling. / It is the best thing in years. / I could shout it from the roof. / I have never felt like this before. / My heart is about to burst. | mild pos: It is just a small thing. / It is nothing special. / It makes the week a bit nicer. / It is a small pleasure. / It is no great event. / I only wanted to mention it. | detail neg: I have told nobody at work. / It began last Monday. / My friends do not know what to say. / It is new for me. / I was alone when I found out. / I wrote it in my diary. / Nobody else seems to care. / I did not plan for this. / I had hoped for a better week. / My partner says little about it. | detail pos: I have told my friends at work. / It began last Monday. / My friends smile when I talk about it. / It is new for me. / I was at home when I found out. / I wrote it in my diary. / My partner likes it too. / I did not plan for this. / I had hoped for a good week. / I called my best friend right away. | feeling severe inward: I feel so FEELING. / I am terribly FEELING. / I feel extremely FEELING inside. | feeling mild inward: I feel a bit FEELING. / I am slightly FEELING. / I feel somewhat FEELING inside. | feeling severe outward: It makes me so FEELING. / That leaves me terribly FEELING. / It gets me extremely FEELING. | feeling mild outward: It makes me a bit FEELING. / That leaves me slightly FEELING. / It gets me somewhat FEELING. | between: Oh? / Go on. / Really? / I am listening. / Hm, okay. / Is that so? / And then? | filler: I see. / These things happen. / Life is like that. / Time will tell. / Maybe take a walk. / You could make a list. / Tomorrow is another day. / Have a cup of tea. / That is how it goes. / Every week brings something. / It may rain later today. / A good meal never hurts.
er 1 neg: I am sorry to hear that. / Oh no, that is sad. / That is really unfortunate. / I feel bad for you. / I am so sorry. | er 1 pos: I am happy for you. / That is wonderful. / How lovely. / That is great news. / Good for you. | er 2 neg: My heart hurts for you over TOPIC. / I am truly sorry about TOPIC. / It makes me sad to hear about TOPIC. / I send you a big hug because of TOPIC. / My heart is heavy when I think of TOPIC. | er 2 pos: I am overjoyed for you about TOPIC. / It makes me so happy to hear about TOPIC. / I am delighted for you because of TOPIC. / My heart sings when I think of TOPIC. / I am smiling with you about TOPIC. | ip 1 neg: I understand how you feel. / I know what you mean. / That must be hard. / I can relate to that. / I have been there too. | ip 1 pos: I understand how you feel. / I know that joy. / That must feel good. / I can imagine that. / I have felt the same. | ip 2 neg: You must feel FEELING about TOPIC. / I would feel FEELING about TOPIC too. / No wonder TOPIC makes you feel FEELING. / It sounds like you are FEELING because of TOPIC. / Anyone would be FEELING about TOPIC. | ip 2 pos: You must feel FEELING about TOPIC. / I would feel FEELING about TOPIC too. / I can see why TOPIC makes you FEELING. / It sounds like you are FEELING because of TOPIC. / It is clear that TOPIC makes you feel FEELING. | ex 1 neg: What happened exactly? / Do you want to talk about it? / How are you doing now? / What will you do next? / Is anyone helping you? | ex 1 pos: Can you tell me more? / How did that come about? / What comes next? / Who else knows? / How does it feel? | ex 2 neg: How are you coping with TOPIC now? / What is the hardest part of TOPIC? / Have you talked to anyone about TOPIC? / What would help you with TOPIC? / How long have you been dealing with TOPIC? | ex 2 pos: What do you like best about TOPIC? / What makes TOPIC so special to you? / Who have you told about TOPIC? / Can you tell me the whole story of TOPIC? / What did your friends say about TOPIC?""")

Emotion = namedtuple(
    "Emotion", "name valence family feelings situations"
)  # situations: [[opener, topic], all fillings]


def _fill(text, **values):
    """Put values into the slots, which are written in capitals."""
    return re.sub("[A-Z]{3,}", lambda slot: values[slot[0].lower()], text)


def _fillings(situation):
    names = sorted({name.lower() for name in re.findall("[A-Z]{3,}", situation)})
    fillings = itertools.product(*(SLOTS[name] for name in names))
    return [_fill(situation, **dict(zip(names, values))).split(" > ") for values in fillings]


def _plain(text):
    """Lower-case words and sentence ends with single spaces: case and spacing stop to matter."""
    return " ".join(re.findall(r"[a-z0-9]+|[.?!]", text.lower()))


EMOTIONS = [
    Emotion(
        name, *heading.split(), feelings, [_fillings(situation) for situation in situations]
    )
    for key, situations in _table(WORLD, "; ").items()
    for heading, *names in [key.split(", ")]
    for name, *feelings in map(str.split, names)
]
TOPICS = {
    _plain(opener): _plain(topic)
    for e in EMOTIONS
    for s in e.situations
    for opener, topic in s
}
VALENCES = {
    _plain(opener): e.valence for e in EMOTIONS for s in e.situations for opener, _ in s
}


def modal_levels(valence, family, severe, turns):
    """The likeliest (er, ip, ex): the rule of this world, for a policy to find out. Severe things ask for warmth first
    (er, more so for bad news), mild ones of the inner life for words (ip); questions (ex) belong to the start of a talk."""
    return (
        severe + (valence == "neg"),
        (not severe) + (family == "inward"),
        min(2, max(0, severe + 2 - turns)),
    )


def _draw_context(rng, emotion, opener, severe, turns):
    """1, 3 or 5 utterances: speaker turns, the last one with the severity, and empty words in between."""
    degree = "severe" if severe else "mild"
    speaker = [opener + ".", *rng.sample(SENTENCES[f"detail {emotion.valence}"], turns - 1)]
    feeling = rng.choice(SENTENCES[f"feeling {degree} {emotion.family}"])
    speaker[rng.randrange(turns)] += " " + _fill(feeling, feeling=rng.choice(emotion.feelings))
    speaker[-1] += " " + rng.choice(SENTENCES[f"{degree} {emotion.valence}"])
    listener = rng.sample(SENTENCES["between"], turns - 1)
    return tuple(itertools.chain(*zip(speaker, listener))) + (speaker[-1],)


def _draw_response(rng, emotion, topic, levels):
    """er, ip, ex in this order, nothing for level 0; a filler where nothing is left, and now and then."""
    parts = [
        rng.choice(SENTENCES[f"{m} {n} {emotion.valence}"])
        for m, n in zip(MECHANISMS, levels)
        if n
    ]
    if not parts or rng.random() < 0.3:
        parts.insert(rng.choice((0, len(parts))), rng.choice(SENTENCES["filler"]))
    return _fill(" ".join(parts), topic="the " + topic, feeling=rng.choice(emotion.feelings))


def _draw(rng, name, seen, mismatched):
    """(Dialogue, P(level | context)) with a new context; with P = mismatched another scene's response."""
    context = None
    while context is None or context in seen:
        emotion, severe = rng.choice(EMOTIONS), rng.random() < 0.5
        situation, turns = (
            rng.choice(emotion.situations),
            rng.choices((1, 2, 3), (0.5, 0.3, 0.2))[0],
        )
        opener, topic = rng.choice(situation)
        context = _draw_context(rng, emotion, opener, severe, turns)
    seen.add(context)
    modal = modal_levels(emotion.valence, emotion.family, severe, turns)
    probs = tuple(
        tuple(0.76 if level == m else 0.12 for level in range(LEVELS)) for m in modal
    )
    levels = tuple(rng.choices(range(LEVELS), p)[0] for p in probs)
    other, wrong = emotion, rng.random() < mismatched
    if wrong:  # near misses too: another slot value, another situation of the emotion, another emotion
        other, near = rng.choice(
            ((emotion, situation), (emotion, None), (rng.choice(EMOTIONS), None))
        )
        topic = rng.choice(near or rng.choice(other.situations))[1]
    response = _draw_response(rng, other, topic, levels)
    return Dialogue(
        context,
        response,
        emotion.name,
        oracle_levels(context, response) if wrong else levels,
        name,
    ), probs


def embedded_corpus(seed=0, num_train=12000, num_valid=300, num_test=600, num_labelled=8000):
    """The generated world; no context occurs twice in all its parts, the same seed gives the same corpus.
    A response has the modal level of each mechanism with probability 0.76, the other two with 0.12 each, independently
    given the context. In the labelled parts 8 % of the responses come from another scene: content has to match."""
    note = f"embedded corpus, seed {seed}: {num_train} / {num_valid} / {num_test} dialogues, {num_labelled} labelled, twice"
    corpus, seen = (
        Corpus({}, {}, [note]),
        set(),
    )  # train parts last: their size changes no other part
    for kind, name, count in (
        ("", "test", num_test),
        ("", "valid", num_valid),
        ("labelled/", "test", 600),
        ("labelled/", "valid", 400),
        ("labelled/", "judge_valid", 400),
        ("", "train", num_train),
        ("labelled/", "train", num_labelled),
        ("labelled/", "judge_train", num_labelled),
    ):
        rng = random.Random(f"{seed} {kind}{name}")
        drawn = [
            _draw(rng, f"{kind}{name}/{i}", seen, 0.08 if kind else 0.0) for i in range(count)
        ]
        (corpus.labelled if kind else corpus.dialogues)[name] = [
            dialogue for dialogue, _ in drawn
        ]
        corpus.level_probs |= {} if kind else {dialogue.id: probs for dialogue, probs in drawn}
    return corpus


def _reader(mechanism, level, topic, valences):
    """One regular expression for all phrases of a mechanism, a level and some valences, with `topic` in the topic's place
    and a feeling of these valences in the feeling's."""
    feelings = "|".join(
        sorted({feeling for e in EMOTIONS if e.valence in valences for feeling in e.feelings})
    )
    phrases = "|".join(
        _plain(p).strip(" .?!")
        for v in valences
        for p in SENTENCES[f"{mechanism} {level} {v}"]
    )
    return rf"\b(?:{phrases})(?!\w)".replace("topic", topic).replace(
        "feeling", f"(?:{feelings})"
    )


def _readers(valences):
    """(strong, weak): for each mechanism what finds a level-2 phrase about the topic, and what finds any phrase."""
    return [
        re.compile(_reader(m, 2, "(?:(?:the|your|this|that|a) )?@", valences))
        for m in MECHANISMS
    ], [
        re.compile(
            _reader(m, 1, "", valences)
            + "|"
            + _reader(m, 2, r"[\w@]+(?: [\w@]+){0,9}?", valences)
        )
        for m in MECHANISMS
    ]


_READERS = {
    "neg": _readers(("neg",)),
    "pos": _readers(("pos",)),
    "unknown": _readers(("neg", "pos")),
}
# A negation, and the rest of its sentence, which it may take back. A plain "no" is none: "oh no", "no wonder".
_NEGATED = re.compile(
    r"\b(?:not|never|nobody|neither|nor|hardly|cannot|without|\w+n t"
    r"|(?:do|does|did|is|are|was|were|ca|wo|would|could|should|have|has|had)nt)\b[^.?!]*"
)


def oracle_levels(context, response):
    """(er, ip, ex) read back from free text in the embedded world: for each mechanism the best phrase found. A level-2
    phrase counts 2 only if it names the topic of this context, which the first sentence tells; else it counts 1.
    A phrase counts only in a context of its valence (no joy about bad news), and only where nothing negates it."""
    opener = _plain(re.split("[.?!]", context[0])[0]) if context else ""
    text = f" {_NEGATED.sub('', _plain(response))} "
    if opener in TOPICS:
        text = text.replace(f" {TOPICS[opener]} ", " @ ")
    strong, weak = _READERS[VALENCES.get(opener, "unknown")]
    return tuple(
        2 if s.search(text) else int(bool(w.search(text))) for s, w in zip(strong, weak)
    )


# ---- tokens and batches ---------------------------------------------------------------------------------------------
class Tokenizer:
    """Sentencepiece unigram pieces with T5's ids: pad 0, eos 1, unk 2, 100 sentinels on top, counting down.
    A T5 `spiece.model` (32,000 pieces) loads with T5's own ids: 32,100 in all, extra_id_0 = 32,099."""

    pad_id, eos_id, unk_id, num_sentinels = 0, 1, 2, 100

    def __init__(self, model):
        """model: the bytes of a sentencepiece model, or the path of its file."""
        if not isinstance(model, bytes) and not os.path.exists(model):
            raise DataError(
                f"{model}: can not be read (no such file); it is the tokenizer of the weights "
                "beside it: fetch it from where they come from"
            )
        self.model, self._pieces = (
            model if isinstance(model, bytes) else _read_bytes(model),
            sentencepiece.SentencePieceProcessor(),
        )
        try:
            self._pieces.LoadFromSerializedProto(self.model)
            if (self._pieces.pad_id(), self._pieces.eos_id(), self._pieces.unk_id()) != (
                0,
                1,
                2,
            ):
                raise ValueError
        except (RuntimeError, ValueError):
            raise DataError(
                f"{model if self.model != model else 'tokenizer'}: not a sentencepiece model with pad 0, eos 1, unk 2, "
                "or damaged; train it again or fetch it anew"
            ) from None
        self.num_pieces, self.encode = (
            self._pieces.GetPieceSize(),
            self._pieces.EncodeAsIds,
        )  # encode(text) -> ids
        self.vocab_size = self.num_pieces + self.num_sentinels
        self.sentinels = range(
            self.vocab_size - 1, self.num_pieces - 1, -1
        )  # of the spans taken out: <extra_id_0>, ...

    @classmethod
    def train(cls, texts, vocab_size):
        """vocab_size counts the sentinels; a small corpus may give fewer. Case is folded. Deterministic."""
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.Train(
                sentence_iterator=iter(texts),
                model_writer=model,
                vocab_size=vocab_size - cls.num_sentinels,
                pad_id=0,
                eos_id=1,
                unk_id=2,
                bos_id=-1,
                normalization_rule_name="nmt_nfkc_cf",
                hard_vocab_limit=False,
                num_threads=1,
                character_coverage=0.99995,
                minloglevel=3,
            )
        except RuntimeError as error:
            raise DataError(
                f"tokenizer: can not be trained on these texts with vocab_size {vocab_size} "
                f"({' '.join(str(error).split())[-100:]}); change vocab_size"
            ) from None
        return cls(model.getvalue())

    def decode(self, ids):
        """Text up to the first eos, without padding and sentinels."""
        ids = [*map(int, ids), self.eos_id]
        return self._pieces.DecodeIds(
            [i for i in ids[: ids.index(self.eos_id)] if self.pad_id < i < self.num_pieces]
        )

    def encode_context(self, utterances, max_length):
        """Every utterance ends with eos, the marker between them. Too long: the oldest tokens go."""
        ids = [i for utterance in utterances for i in [*self.encode(utterance), self.eos_id]]
        return ids[-max_length:] or [self.eos_id]

    def encode_response(self, text, max_length):
        """Ends with eos in any case; the text is cut to make room for it."""
        return self.encode(text)[: max_length - 1] + [self.eos_id]


def pad(rows):
    """Lists of ids, right-padded with 0: LongTensor (B, S)."""
    return torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True
    )


def batches(lengths, batch_size, seed):
    """rows_at(step): the indices of the examples in batch number `step`, counted over all epochs. A pure function of
    (seed, step), so a run resumes from the step alone. Examples of about the same length share a batch: less padding."""
    lengths, n, size = np.asarray(lengths), len(lengths), batch_size
    if not n or size < 1:
        raise ValueError(f"{n} examples in batches of {size}: both must be above 0")
    per_epoch = -(-n // size)

    @functools.lru_cache(maxsize=1)  # only the current epoch's order is kept
    def epoch(number):
        rng = np.random.default_rng([seed, number])
        order = np.argsort(
            lengths * rng.uniform(0.95, 1.05, n) + rng.uniform(0, 1, n)
        )  # the noise mixes the neighbours
        parts = np.split(order, range(size, n, size))
        return [parts[i].tolist() for i in rng.permutation(len(parts))]

    return lambda step: epoch(step // per_epoch)[step % per_epoch]


class Pairs:
    """(context, response) pairs as ids, once and for all; `batch` pads some of them."""

    def __init__(self, dialogues, tokenizer, max_source, max_target, device="cpu"):
        self.dialogues, self.device = dialogues, device
        self.contexts = [tokenizer.encode_context(d.context, max_source) for d in dialogues]
        self.responses = [tokenizer.encode_response(d.response, max_target) for d in dialogues]
        self.levels = torch.tensor(
            [d.levels or (0, 0, 0) for d in dialogues]
        )  # (N, 3), 0 where unknown

    def __len__(self):
        return len(self.contexts)

    def lengths(self):
        return [len(c) + len(r) for c, r in zip(self.contexts, self.responses)]

    def chunks(self, size, positions=2**15):
        """All rows in lots of `size`, like lengths together. Fewer rows where they are long, so that a lot has at most so many
        positions, padding included: memory."""
        lengths = self.lengths()
        order = sorted(range(len(self)), key=lengths.__getitem__)
        lots = []
        for i in range(0, len(order), size):
            lot = order[i : i + size]
            few = max(1, positions // lengths[lot[-1]])  # the last is the longest
            lots += [lot[j : j + few] for j in range(0, len(lot), few)]
        return lots

    def batch(self, rows):
        """Context (B, S) and response (B, T) ids of some rows."""
        return tuple(
            pad([side[i] for i in rows]).to(self.device)
            for side in (self.contexts, self.responses)
        )

    def but(self, responses, levels=None):
        """The same contexts with other responses, and with levels (N, 3) where they are known."""
        (other := copy.copy(self)).responses, other.levels = responses, levels
        return other


# ---- span corruption: T5's pre-training task ------------------------------------------------------------------------
def random_spans(length, density=0.15, mean_span=3.0, generator=None):
    """Spans [(start, length), ...] that cover about `density` of `length` positions, never position 0. As in T5,
    the noise and the rest are each cut at random into the same number of pieces, which alternate."""
    noise = min(max(round(length * density), 1), length - 1)
    pieces = min(max(round(noise / mean_span), 1), noise, length - noise)

    def cut(total):  # `pieces` positive numbers that add up to total
        cuts = (
            (torch.randperm(total - 1, generator=generator)[: pieces - 1] + 1)
            .sort()
            .values.tolist()
        )
        return [b - a for a, b in zip([0] + cuts, cuts + [total])]

    spans, start = [], 0
    for gap, span in zip(cut(length - noise), cut(noise)):
        spans.append((start + gap, span))
        start += gap + span
    return spans


def span_corrupt(ids, spans, sentinels, eos_id=1):
    """(source, target) of the paper's figure 2: "a <X> d <Y>" and "<X> b c <Y> e <Z>", each with </s>.
    ids: list of tokens. spans: disjoint (start, length) in order. sentinels: at least len(spans) + 1 ids."""
    source, target, end = [], [], 0
    for sentinel, (start, length) in zip(sentinels, spans):
        source += ids[end:start] + [sentinel]
        target += [sentinel] + ids[start : start + length]
        end = start + length
    return source + ids[end:] + [eos_id], target + [sentinels[len(spans)], eos_id]


# ---- files ----------------------------------------------------------------------------------------------------------
MAX_FILE = 500_000_000  # bytes; thirty times the largest file of EmpatheticDialogues


def _open(path):
    """The file, open for reading bytes. Its kind is looked at first: a pipe or device may never end."""
    try:
        kind = os.stat(path).st_mode
        file = open(path, "rb") if stat.S_ISREG(kind) else None
    except FileNotFoundError as error:
        problem, remedy = error.strerror, "check the path and the name"
    except PermissionError as error:
        problem, remedy = error.strerror, "allow yourself to read it"
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        problem, remedy = getattr(error, "strerror", error), "check the path and the disk"
    else:
        if file:
            return file
        if stat.S_ISDIR(kind):
            raise DataError(f"{path}: a folder; give the path of a file in it")
        raise DataError(f"{path}: a pipe or a device; give the path of an ordinary file")
    raise DataError(f"{path}: can not be read ({problem}); {remedy}")


def _read_bytes(path):
    """All of a file that is not too large, and that is not something else saved under its name."""
    with _open(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_FILE:
            raise DataError(
                f"{path}: {size:,} bytes, and {MAX_FILE:,} are the limit; give a smaller file"
            )
        try:
            content = file.read()
        except OSError as error:
            raise DataError(
                f"{path}: can not be read ({error.strerror}); check the disk"
            ) from None
    start = content[:100].lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        raise DataError(
            f"{path}:1: a Git LFS pointer, not the file itself; `git lfs pull` fetches the file"
        )
    if start.startswith((b"<!doctype html", b"<html")):
        raise DataError(f"{path}:1: a web page, not the file itself; fetch the raw file")
    if start.startswith((b"pk\3\4", b"\x1f\x8b")):
        raise DataError(
            f"{path}:1: a packed file (zip, xlsx or gz); unpack it, or save the table as csv"
        )
    return content


def sha256(path):
    """Of any file, however large: read in pieces."""
    digest = hashlib.sha256()
    with _open(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read_lines(path):
    """The lines of a text file in UTF-8, without byte order mark; DataError for what can not be one."""
    lines = _read_bytes(path).removeprefix(b"\xef\xbb\xbf").split(b"\n")
    for i, line in enumerate(lines):
        try:
            lines[i] = line.decode().rstrip("\r")
        except UnicodeDecodeError:
            raise DataError(
                f"{path}:{i + 1}: not UTF-8; save the file as UTF-8 text"
            ) from None
        if "\0" in lines[i] or len(line) > 100_000:
            raise DataError(
                f"{path}:{i + 1}: a NUL byte or a line over 100,000 bytes; is it the right file?"
            )
    if not any(map(str.strip, lines)):
        raise DataError(f"{path}:1: empty file; fetch or write it again")
    return lines


# What no one sees and no model should learn: control characters, marks of the direction of
# writing, blanks of no width, U+FFFD, half surrogates.
_INVISIBLE = (
    "[\0-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e"
    "\u2060-\u206f\ufeff\ufff9-\ufffb\ufffd\ud800-\udfff]"
)
# The joiners U+200C and U+200D shape Persian words and make families of emoji. They stay between
# two characters that can join, and after a virama (the sign of a half letter in Hindi and its kin).
_JOINS = (
    "\u0600-\u1fff\u2070-\u2fff\u3001-\ud7ff\uf900-\ufefe\uff00-\uffef\U00010000-\U000dffff"
)
_VIRAMA = "\u094d\u09cd\u0a4d\u0acd\u0b4d\u0bcd\u0c4d\u0ccd\u0d4d\u0dca"
_LOOSE_JOINER = (
    f"(?<![{_JOINS}\u200c\u200d])[\u200c\u200d]+"
    f"|(?<![{_VIRAMA}\u200c\u200d])[\u200c\u200d]+(?![{_JOINS}\u200c\u200d])"
)
# Tags spell the flags of England, Scotland and Wales after a black flag, and are loose elsewhere.
_TAGS = "\U000e0000-\U000e007f"
_LOOSE_TAGS = f"(?<![\U0001f3f4{_TAGS}])[{_TAGS}]+"
_REMOVED = re.compile(f"{_INVISIBLE}|{_LOOSE_JOINER}|{_LOOSE_TAGS}")
_BLANK_LETTERS = (
    "\u115f\u1160\u2800\u3164\uffa0"  # called letters or symbols, shown as nothing
)


def clean(text):
    """Without what no one sees; white space collapsed. Empty where nothing can be seen at all."""
    text = " ".join(_REMOVED.sub("", text).split())
    visible = any(
        unicodedata.category(c)[0] in "LNPS" and c not in _BLANK_LETTERS for c in text
    )
    return text if visible else ""


def _csv_rows(path, required, optional=None):
    """(path:line, row as dict), one by one, of a quoted csv file; the line is where the row begins.
    It must have the required columns; it may have the optional ones, or any where there is no list."""
    reader = csv.reader((line + "\n" for line in _read_lines(path)), strict=True)
    header, begin = [], 1
    try:
        while not header:
            begin, header = reader.line_num + 1, [name.strip() for name in next(reader)]
        _check_header(header, f"{path}:{begin}", required, optional)
        begin = reader.line_num + 1
        for row in reader:
            if row and len(row) != len(header):
                raise csv.Error(
                    f"not {len(header)} fields, as in the first line, but {len(row)}"
                )
            if row:
                yield f"{path}:{begin}", dict(zip(header, row))
            begin = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{begin}: {error}; check the commas and quotes") from None


def _check_header(header, where, required, optional):
    """DataError unless the columns have all names that they need, each once, and no other."""
    if missing := [name for name in required if name not in header]:
        for sign, name in ("\t", "tabs"), (";", "semicolons"):
            if sign in "".join(header):
                raise DataError(f"{where}: columns separated by {name}; save it with commas")
        raise DataError(
            f"{where}: no column {' and no column '.join(missing)}; the first line must name the columns, "
            f"and it is {','.join(header)[:100]!r}"
        )
    for i, name in enumerate(header):
        if not name:
            raise DataError(
                f"{where}: column {i + 1} has no name; name it or take it out (an index of pandas: index=False)"
            )
        if name in header[:i]:
            raise DataError(f"{where}: two columns {name[:40]!r}; take one of them out")
        if optional is not None and name not in (*required, *optional):
            raise DataError(
                f"{where}: a column {name[:40]!r}; take it out, there may be {', '.join((*required, *optional))}"
            )


def _shown(value):
    """A value of a record in a few characters, for a message."""
    if isinstance(value, (dict, list)):
        return "a list" if isinstance(value, list) else "a record"
    return str(value)[:20]


def _level(value, where):
    """0, 1 or 2, also as text, with blanks, or as the decimal number that a table program makes of it."""
    text = _shown(value).strip()
    if isinstance(value, bool) or not re.fullmatch(r"[012](\.0*)?", text):
        raise DataError(f"{where}: level {text!r}; levels are 0, 1 or 2")
    return int(text[0])


ED_HEADER = "conv_id,utterance_idx,context,prompt,speaker_idx,utterance,selfeval,tags"


MAX_BAD_ROWS = (
    0.02  # of a file of EmpatheticDialogues; with more it is not the file that was published
)
_DOUBLED_QUOTES = re.compile(
    '"[^"]*(""[^"]*)+"'
)  # how a table program writes a text with quotes in it


def _is_ed_row(fields):
    """Numbers where numbers belong, and no quoting. A ninth field may hold candidates, joined by "|"."""
    if len(fields) not in (8, 9) or not all(
        map(re.compile("[0-9]+").fullmatch, fields[1:5:3])
    ):
        return False
    rating, ninth = fields[6], "".join(fields[8:])
    if not re.fullmatch("[0-9|_]*", rating) or (ninth and "|" not in ninth):
        return False
    return not any(map(_DOUBLED_QUOTES.fullmatch, (fields[3], fields[5])))


def read_empathetic_dialogues(path, both=False):
    """One file of EmpatheticDialogues (Rashkin et al. 2019, arXiv 1811.00207) -> (dialogues, note).
    Every listener utterance (even utterance_idx; `both`: any but the first) is a response, all before it are the context. The files have
    no csv quoting: '"' is an ordinary character, a comma in a text is written _comma_. A bad row ends its conversation."""
    header, *lines = _read_lines(path)
    if not header.startswith(ED_HEADER):
        raise DataError(
            f"{path}:1: not the header of EmpatheticDialogues; it must begin with {ED_HEADER}"
        )
    rows = [(number, line.split(",")) for number, line in enumerate(lines, 2) if line]
    if lines and lines[-1] and not _is_ed_row(rows[-1][1]):
        raise DataError(
            f"{path}:{rows[-1][0]}: the file ends within this row, it is cut short; fetch it again"
        )
    dialogues, skipped, histories = [], [], defaultdict(list)
    for number, fields in rows:
        history = histories[fields[0]]
        utterance = clean(fields[5].replace("_comma_", ",")) if _is_ed_row(fields) else ""
        if not utterance or fields[1] != str(len(history) + 1):
            skipped.append(number)
            continue
        if (
            len(history) % 2 or both and history
        ):  # the speaker has odd numbers, the listener even ones
            dialogues.append(
                Dialogue(tuple(history), utterance, fields[2], id=f"{fields[0]}/{fields[1]}")
            )
        history.append(utterance)
    if len(skipped) > MAX_BAD_ROWS * len(rows):
        raise DataError(
            f"{path}:{skipped[0]}: {len(skipped)} of {len(rows)} rows are not as they were published, this one "
            "first: fields too many, empty, missing or out of place, or quoted as by a table program; fetch it again"
        )
    if not dialogues:
        raise DataError(
            f"{path}:2: no listener utterance that can be used; fetch the file again"
        )
    note = f"{path}: {len(dialogues)} pairs"
    if skipped:
        note += (
            f"; {len(skipped)} rows skipped: fields out of place, empty, or without the "
            f"utterance before, as in line {skipped[0]}"
        )
    return dialogues, printable(note)


EPITOME_FILES = (
    "emotional-reactions-reddit.csv",
    "interpretations-reddit.csv",
    "explorations-reddit.csv",
)


def read_epitome(folder):
    """EPITOME's Reddit part (Sharma et al. 2020), three files joined by row -> (dialogues, note).
    Joined by ids, not by text: the texts differ a little between the files, the first file's are taken. A pair listed
    twice is kept once, with the level most of its rows have (on a tie, the first row's)."""
    columns, votes, texts = "sp_id rp_id seeker_post response_post level".split(), {}, {}
    files = [list(_csv_rows(os.path.join(folder, name), columns)) for name in EPITOME_FILES]
    for rows in itertools.zip_longest(
        *files, fillvalue=(f"{folder}: files of different length", {})
    ):
        names = [f"{row.get('sp_id')}/{row.get('rp_id')}" for _, row in rows]
        for m, (where, row) in enumerate(rows):
            if names[m] != names[0]:
                raise DataError(
                    f"{where}: pair {names[m]}, but {names[0]} in the first file; fetch all again"
                )
            votes.setdefault(names[0], [Counter(), Counter(), Counter()])[m][
                _level(row["level"], where)
            ] += 1
        post = [
            clean(html.unescape(html.unescape(rows[0][1][c]))) for c in columns[2:4]
        ]  # some are escaped twice
        texts.setdefault(names[0], post)
    dialogues = [
        Dialogue(
            (post,),
            response,
            "",
            tuple(vote.most_common(1)[0][0] for vote in votes[name]),
            name,
        )
        for name, (post, response) in texts.items()
        if post and response
    ]  # equal counts: in the order of rows
    if not dialogues:
        raise DataError(
            f"{os.path.join(folder, EPITOME_FILES[0])}:2: no rows with text; fetch it again"
        )
    conflicts = [
        [count for _, count in vote.most_common(2)]
        for d in dialogues
        for vote in votes[d.id]
        if len(vote) > 1
    ]
    pairs = sum(any(len(vote) > 1 for vote in votes[d.id]) for d in dialogues)
    ties = sum(first == second for first, second in conflicts)
    return dialogues, printable(
        f"{folder}: {len(dialogues)} pairs from {len(files[0])} rows; {len(texts) - len(dialogues)} pairs without "
        f"text skipped, {pairs} with conflicting levels: of {len(conflicts)} conflicts "
        f"{len(conflicts) - ties} settled by majority, {ties} ties by the first row"
    )


def split_labelled(dialogues, seed):
    """75 : 5 : 20 by speaker, the id up to its last "/" (EPITOME's sp_id); "train" is then halved: reward and judge.
    The judge has the second half, the last 10 % of its speakers for validation, and is never the reward."""
    speakers = sorted({d.id.rpartition("/")[0] for d in dialogues})
    random.Random(seed).shuffle(speakers)
    train, valid = round(0.75 * len(speakers)), round(0.80 * len(speakers))
    ends = {
        "train": train // 2,
        "judge_train": train - round(0.1 * (train - train // 2)),
        "judge_valid": train,
        "valid": valid,
        "test": len(speakers),
    }
    part_of = {
        speaker: next(part for part, end in ends.items() if i < end)
        for i, speaker in enumerate(speakers)
    }
    return {
        part: [d for d in dialogues if part_of[d.id.rpartition("/")[0]] == part]
        for part in ends
    }


def real_corpus(folder, seed=0):
    """EmpatheticDialogues for the dialogue, EPITOME for the identifiers: what `download` brings."""
    if not os.path.isdir(folder):
        raise DataError(
            f"{folder}: no such folder; `{command_line(['python', 'data.py', 'download', str(folder)])}` fetches the data"
        )
    parts = ("train", "valid", "test")
    read = [
        read_empathetic_dialogues(os.path.join(folder, "empatheticdialogues", f"{part}.csv"))
        for part in parts
    ]
    dialogues, notes = zip(*read, read_epitome(os.path.join(folder, "epitome")))
    labelled = split_labelled(dialogues[-1], seed)
    turns = read_empathetic_dialogues(
        os.path.join(folder, "empatheticdialogues", "train.csv"), both=True
    )[0]
    turns += labelled["train"] + labelled["judge_train"]
    return Corpus({**dict(zip(parts, dialogues)), "turns": turns}, labelled, list(notes))


def own_corpus(path, seed=0):
    """A corpus of one file of yours: dialogue and identifiers from the same dialogues, which must have levels.
    Conversations stay whole: no part has dialogues of another's. So the judge is trained on none of those that
    the reward is trained on, and tested on neither's. (The policy learns replies from both.)"""
    dialogues = read_dialogues(path)
    for d in dialogues:
        if d.levels is None:
            raise DataError(
                f"{path}:{d.id.rpartition('/')[2]}: no levels; training needs er, ip and ex in every record "
                "(`evaluate` needs none)"
            )
    conversations = len({d.id.rpartition("/")[0] for d in dialogues})
    if len(dialogues) < 50 or conversations < 20:
        raise DataError(
            f"{path}: {len(dialogues)} dialogues of {conversations} conversations (by id or first utterance); "
            "training needs 50 of 20, add some"
        )
    labelled = split_labelled(dialogues, seed)
    train = labelled["train"] + labelled["judge_train"] + labelled["judge_valid"]
    parts = {"train": train, "valid": labelled["valid"], "test": labelled["test"]}
    sizes = " / ".join(str(len(part)) for part in parts.values())
    notes = [
        f"{path}: {len(dialogues)} dialogues of {conversations} conversations, which stay whole: {sizes}"
    ]
    if equal := len(dialogues) - len(set(map(_texts, dialogues))):
        notes.append(f"{path}: {equal} records equal to an earlier one, in its part")
    for m, name in enumerate(MECHANISMS):
        if len(levels := {d.levels[m] for d in dialogues}) == 1:
            notes.append(f"{path}: {name} is {levels.pop()} everywhere, nothing to learn from")
    return Corpus(parts, labelled, list(map(printable, notes)))


FIELDS = ("context", "response", "emotion", *MECHANISMS, "id")


def read_dialogues(path):
    """Your own dialogues. Emotion, levels (er, ip, ex: all three or none) and id may be left out.
    .jsonl  {"context": ["..", ".."] or "..", "response": "..", "emotion": "..", "er": 0, "ip": 2, "ex": 1, "id": ".."}
    .csv    columns context,response[,emotion,er,ip,ex,id]; " </s> " between the utterances of a context
    id: the conversation that a record is of; without it, those with the same first utterance are one."""
    dialogues, keys = [], []
    is_table = str(path).lower().endswith(".csv")
    for where, record in (
        _csv_rows(path, FIELDS[:2], FIELDS[2:]) if is_table else _json_rows(path)
    ):
        context = record["context"]
        context = context.split("</s>") if isinstance(context, str) else context
        if not isinstance(context, list):
            raise DataError(
                f"{where}: not a record: context is {_shown(context)}; write a text or a list of texts"
            )
        emotion = record.get("emotion")
        texts = {"response": record["response"], "emotion": "" if emotion is None else emotion}
        for name, text in (*texts.items(), *(("an utterance of context", c) for c in context)):
            if not isinstance(text, str):
                raise DataError(
                    f"{where}: not a record: {name} is {_shown(text)}; write a text, or drop the record"
                )
        context, response = [clean(c) for c in context], clean(texts["response"])
        if not response or not context or not all(context):
            raise DataError(
                f"{where}: empty response or utterance; fill it in or drop the row"
            )
        levels = tuple(
            _level(record[m], where) for m in MECHANISMS if record.get(m) not in (None, "")
        )
        if len(levels) not in (0, len(MECHANISMS)):
            raise DataError(
                f"{where}: {len(levels)} of 3 levels; give er, ip and ex, or none of them"
            )
        name = "" if record.get("id") is None else record["id"]
        if isinstance(name, bool) or name != name or not isinstance(name, (str, int, float)):
            raise DataError(
                f"{where}: not a record: id is {_shown(name)}; write a text or a number"
            )
        keys.append(
            ("id", str(name)) if clean(str(name)) else ("first", context[0].casefold())
        )
        line = where.rpartition(":")[2]
        dialogues.append(
            Dialogue(tuple(context), response, clean(texts["emotion"]), levels or None, line)
        )
    if not dialogues:
        raise DataError(f"{path}:2: no dialogues; write at least one")
    first = _conversations(dialogues, keys)
    return [replace(d, id=f"{c}/{d.id}") for d, c in zip(dialogues, first)]


def _json_rows(path):
    """(path:line, record), one by one, of a file with a record in JSON on every line."""
    for number, line in enumerate(_read_lines(path), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        record = _json_record(line.strip(), where)
        if missing := [name for name in FIELDS[:2] if name not in record]:
            raise DataError(
                f"{where}: not a record: no {' and no '.join(missing)}; add what is missing"
            )
        if other := [name for name in record if name not in FIELDS]:
            raise DataError(
                f"{where}: not a record: a field {other[0][:40]!r}; take it out, there may be {', '.join(FIELDS)}"
            )
        yield where, record


def _json_record(line, where):
    """The record {..} of a line; DataError for anything else."""
    if line.startswith("["):
        raise DataError(
            f"{where}: a JSON array; write one record a line, without brackets around them and commas between"
        )
    if not line.startswith("{"):
        raise DataError(
            f"{where}: not a record: {line[:20]!r}; write one {{..}} a line (a table must be called .csv)"
        )
    try:
        return json.loads(line, object_pairs_hook=_each_once)
    except RecursionError:
        problem = "nested too deeply"
    except ValueError as error:
        problem = getattr(error, "msg", str(error).partition(";")[0][:80])
    raise DataError(
        f"{where}: not a record in JSON: {problem}; write one {{..}} a line, whole"
    )


def _each_once(pairs):
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError("a field is there twice")
    return record


def _texts(dialogue):
    """What makes two records equal, whatever their levels."""
    return tuple(text.casefold() for text in (*dialogue.context, dialogue.response))


def _conversations(dialogues, keys):
    """For each dialogue the id of the first one of its conversation: of those with the same key. Where equal records
    stand in two conversations, these count as one."""
    parent = {}  # a forest: every key and every record points to another one of its conversation

    def root(node):
        while parent.setdefault(node, node) != node:
            parent[node] = parent[parent[node]]  # shorter for the next time
            node = parent[node]
        return node

    for d, key in zip(dialogues, keys):
        parent[root(("record", _texts(d)))] = root(key)
    first = {}
    return [first.setdefault(root(key), d.id) for d, key in zip(dialogues, keys)]


if __name__ == "__main__":
    sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "tests"))
    from download import main

    sys.exit(main(sys.argv[1:]))
