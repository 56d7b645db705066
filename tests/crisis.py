"""A short list of phrases that can hardly mean anything but that someone thinks of suicide or self-harm.

It is no safety feature: it misses most of what people say. Chat tells everyone at its start where help is found; on
one of these phrases it tells it again, in place of the models' replies.

Spelling does not matter: case, apostrophes, accents, repeated letters, digits for letters, blanks inside words or
none between them ("KILLL my self", "i'm going to k1llmyself").
"""

import functools
import itertools
import re
import unicodedata

OPENING = (
    "An exercise with a small research model, not a counsellor: no person reads along, and nothing is understood.",
    "If you or someone near you may be in danger, please talk to a person now: the emergency number (112, 911, 999), "
    "a crisis line (988 in the US; findahelpline.com lists others), or someone you trust.",
)
NOTE = (
    "Content note: people write here about grief, illness, violence, self-harm and suicide, and the models' replies "
    "can hurt. Where help is found: the emergency number (112, 911, 999), findahelpline.com, someone you trust."
)

# [a|b] is a choice, [a|] may be left out. A word in capitals stands for its choice.
WORDS = {
    "WANT": "[|just|really|still|honestly|sometimes|often|only|do] "
    "[want to|wanna|wana|wish to|need to|wanted to|plan to|intend to]",
    "AM": "[i am|im|i was|i have been|ive been|i keep]",
    "WILL": "[i will|ill|i am going to|im going to|i am gonna|im gonna|i am about to|im about to|i tried to]",
    "THINK": "[thinking of|thinking about|planning|considering|contemplating]",
    "WOULD": "[would be|will be|d be|are|is]",
    "WITHOUT": "[without me|if i was dead|if i were dead|if i died]",
    "DONT": "[do not|dont|dnt|no longer|never]",
}
# The phrase ends the sentence, or these words do.
SOON = (
    "[|now|right now|tonight|today|tomorrow|soon|anymore|any more|any longer|again|so much|so bad|so badly|badly|"
    "sometimes|every day|all the time|lately|already|please|tonight by my own hand]"
)
LAST = """
    i WANT die
    i WANT be dead
    i WANT [end it all|not exist|stop existing|stop living|hurt myself|harm myself|cut myself|overdose]
    i WANT [hang|shoot|drown|unalive] myself
    i WANT [end|take] my [|own] life
    WILL [hang|shoot|drown|unalive|harm] myself
    WILL [end|take] my own life
    WILL [end it all|end my life|overdose|die tonight by my own hand]
    AM THINK [ending|taking] my [|own] life
    AM THINK [killing|hanging|drowning|shooting|hurting|harming|cutting] myself
    AM THINK [suicide|sucide|ending it all]
    i think [of|about] [suicide|sucide|killing myself|ending my life|ending it all]
    i feel like [dying|killing myself|ending my life|ending it all|hurting myself]
    [i am|im|i feel|feeling] [so|] [suicidal|sucidal]
    [i have|i am having|im having|i get|having] [suicidal|sucidal] thoughts
    [i am|im|i have been|ive been|i started|i keep] [cutting|harming] myself
    [i hurt|hurting|i cut|cutting|i burn|burning|i harm|harming] myself on purpose
    [i took|i have taken|ive taken] an overdose
    i wish i [was|were] dead
    i wish i [was|were|had|had been] never [|been] born
    i hope i DONT wake up [|again|tomorrow|in the morning]
    i never want to wake up again
    i DONT want to [live|be alive|exist|go on living|keep living]
    i [can not|cannot|cant] [go on|keep] living
    i [have|see] no [reason|point] [to live|in living|in being alive|to be alive|to go on living]
    [there is|theres] no [reason|point] [to live|in living|in being alive|to be alive|to go on living]
    [there is|theres|i have|ive|i have got|ive got] nothing [|left] to live for
    [life|my life] [is not|isnt|aint] worth living
    [i am|im] [so|] [tired|sick] of [living|being alive]
    [they|everyone|everybody|the world|my family|my kids|my children|my parents] WOULD better off WITHOUT
    i [would be|d be] better off dead
    id be better off dead
    [he|she] [wants to|wanted to|tried to|threatened to|threatens to] [kill|hang] [himself|herself]
"""
# The sentence may go on, unless with one of these words ("I want to kill myself laughing").
ANYWHERE = """
    i WANT kill myself
    WILL kill myself
    AM THINK killing myself
    i WANT [commit suicide|commit sucide|slit my wrists|cut my wrists]
    WILL [commit suicide|commit sucide|slit my wrists|cut my wrists]
    AM [planning to|going to] [commit suicide|commit sucide|kill myself]
    i [wrote|have written|am writing] [a|my] suicide note
"""
NOT_AFTER = {
    *"an laughing over for every everytime when whenever if in with at by trying unles".split()
}
# Nothing else stands in the sentence.
ALONE = """
    self [harm|harming]
    [suicidal|sucidal] [|thoughts|thoughts again]
    i took all [of|] my [sleeping|] pills
    i [took|swallowed] [a|the] [whole|entire|full] bottle of [sleeping|] pills
    i swallowed all [of|] my [sleeping|] pills
"""


def squeezed(words):
    """Letters only, none twice in a row: "kill myself", "kil my  selff" are the same."""
    return re.sub(r"(.)\1+", r"\1", "".join(words).replace(" ", ""))


@functools.cache
def spelled_out(templates, ending=""):
    """All phrases of templates, one a line, as `squeezed` writes them."""
    phrases = set()
    for template in templates.split("\n"):
        for name, choice in WORDS.items():
            template = re.sub(rf"\b{name}\b", lambda _: choice, template)
        if template.strip():
            parts = re.split(
                r"\[([^][]*)\]", f"{template} {ending}"
            )  # every second is a choice
            choices = [part.split("|") if i % 2 else [part] for i, part in enumerate(parts)]
            phrases |= {squeezed(phrase) for phrase in itertools.product(*choices)}
    return phrases


MOST_WORDS = 60  # of a phrase, even if each letter of it stands alone
DIGITS = str.maketrans("013457@$", "oieastas")


def sentences(text):
    """Lists of words, plainly spelled: each sentence, and each of its parts between commas."""
    text = unicodedata.normalize(
        "NFKD", text.lower()
    )  # accents on their own, wide letters plain
    text = "".join(c for c in text if unicodedata.category(c) not in ("Mn", "Cf"))
    text = re.sub(r"\b2\b", "to", text).translate(DIGITS)
    text = re.sub(r"['\u2019\u2018`\u00b4\u02bc]", "", text)  # apostrophes
    for sentence in re.split(r"[.!?;:\u2026]+(?:\s|$)|[\r\n]+|\s[-\u2013\u2014]+\s", text):
        parts = re.split(r",+(?:\s|$)|\b(?:but|and i|and nobody|because)\b", sentence)
        for part in {sentence, *parts}:
            yield re.findall(r"[a-z]+", part)


def signs_of_crisis(text):
    """Is one of the phrases in the text?"""
    at_the_end = spelled_out(LAST + ANYWHERE, SOON)
    anywhere = spelled_out(ANYWHERE)
    alone = spelled_out(ALONE)

    for words in sentences(text):
        if squeezed(words) in alone:
            return True
        for first in range(len(words)):
            phrase = ""
            for last in range(first, min(len(words), first + MOST_WORDS)):
                phrase = squeezed([phrase, words[last]])
                following = squeezed(words[last + 1 : last + 2])
                if not following and phrase in at_the_end:
                    return True
                ordinary = following in NOT_AFTER or len(following) == 1 and following != "i"
                if phrase in anywhere and not ordinary:
                    return True
    return False
