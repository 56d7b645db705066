"""What chat takes for a sign of crisis: a few unmistakable sentences in any spelling, no other.

The list is short on purpose and no safety feature: where help is found stands at the top of
every chat, and /help repeats it (test_trust.py).
"""

import random
import re

import pytest

from emprl import signs_of_crisis

UNMISTAKABLE = """
I want to die
I just want to die
I wanna die
I wanna die today
I want to be dead
I want to kill myself
I am going to kill myself
I'm going to kill myself tonight
I'm gonna kill myself
I wanna kill myself
I will kill myself
I'll kill myself
I want to end my life
I'm going to end my life now
I want to take my own life
I want to commit suicide
I am suicidal
I'm suicidal
I feel suicidal
I don't want to live anymore
I do not want to live
I don't want to be alive
I wish I was dead
I wish I were dead
Life is not worth living
My brother is gone. I want to die.
""".strip().split("\n")

ORDINARY = """
I can't live without coffee
My dog died
I could die laughing
The exam killed me
My phone is dead
My dog is going to die
I live alone
He is going to dye it
I want to diet
I don't want to diet anymore
I want to die laughing
I am dying to see that film
I'm going to die if I eat another bite
I'm going to die of embarrassment
I nearly killed myself laughing
I could kill myself for forgetting her birthday
I want to kill myself laughing at this show
My legs are killing me
I killed a spider in my room
My boss is going to kill me
This traffic is murder
I cut myself while cooking
I cut myself shaving
I have been cutting myself some slack
I hurt myself playing football
I hurt my knee on purpose-built stairs
I overdosed on chocolate last night
I took all my pills this morning, as the doctor said
I took my pills
I took all my pills
We watched Suicide Squad
Suicide Squad was a great film
I am writing an essay about suicide prevention
I do not want to live in a big city
I don't want to live with my parents anymore
There is no reason to live in London
Life is not worth living without music
I want to end it with my boyfriend
I want to end my subscription
I want to end my life as a bachelor
I want to take my life savings out of the bank
I want to take my life in a new direction
I want to end it all with a nice dinner
They would be better off without me as a goalkeeper
We are better off without him
You are better off without that job
I wish I was dead tired, then I could sleep
I wish I was at the Dead Sea
I wish I had never been born in this town
I don't want to be here anymore
I never want to wake up at five again
I hope I don't wake up the baby
I am tired of living out of a suitcase
I am sick of living with my roommate
I have no reason to be sad
I have nothing to wear
There is nothing left to eat
I want to hang myself a picture in the hall
I want to hang out with myself
I want to shoot myself a short film
I am thinking of ending my membership
I am thinking about cutting myself a fringe
My grandfather took his own sandwich
My grandmother died last week and I miss her so much
My cat was put to sleep yesterday
My friend was killed in an accident
I don't want to die
I am not going to kill myself over one exam
I ran 10 kms today
I feel like dying my hair
I almost died of boredom
The deadline is killing me
I want to sleep forever on weekends
I am harmless by myself
I think of killing time by myself
Self-harm is a difficult subject for a novel
I shot myself a glance in the mirror
I would kill for a pizza
I am so done with this day
I can't go on like this with my diet
I'm considering a suicide squeeze for the next inning
I want to die, that was so embarrassing!
I want to die again, this game is so much fun
I want to die again
I wanna die, this cake is so good
I'm going to kill myself, he said in the film
I'll kill myself if they cancel that show
If I fail, I want to kill myself laughing, not crying
I don't want to live, I want to thrive
Life is not worth living; that is what the villain says
""".strip().split("\n")


def repeated(text):
    """Every letter up to three times."""
    rng = random.Random(text)
    return re.sub("[A-Za-z]", lambda found: found[0] * rng.randint(1, 3), text)


def wide(text):
    """Letters as wide as Chinese characters."""
    return re.sub("[a-z]", lambda found: chr(ord(found[0]) + 0xFEE0), text)


SPELLINGS = {
    "as it is": lambda text: text,
    "capitals": str.upper,
    "small": str.lower,
    "typographic apostrophes": lambda text: text.replace("'", "\u2019"),
    "no apostrophes": lambda text: text.replace("'", ""),
    "blanks for apostrophes": lambda text: text.replace("'", " "),
    "repeated letters": repeated,
    "wide blanks": lambda text: text.replace(" ", " \u00a0\t "),
    "invisible characters": lambda text: "\u200b".join(text),
    "accents": lambda text: text.replace("i", "\u00ed").replace("e", "e\u0301"),
    "wide letters": wide,
    "digits for letters": lambda text: text.translate(str.maketrans("oie", "013")),
    "excitement": lambda text: text.rstrip(".") + "!!!",
    "in other talk": lambda text: f"Hello there. {text}. What do you say?",
}
IN_ONE_SENTENCE = {  # spellings that leave no sign of where a sentence ends
    "no blanks": lambda text: text.replace(" ", ""),
    "blanks between letters": " ".join,
    "dots between letters": lambda text: re.sub(r"(?<=\w)(?=\w)", ".", text),
}


@pytest.mark.parametrize("how", SPELLINGS)
def test_unmistakable_sentences_are_seen_in_every_spelling(how):
    spelled = map(SPELLINGS[how], UNMISTAKABLE)
    assert [text for text in spelled if not signs_of_crisis(text)] == []


@pytest.mark.parametrize("how", IN_ONE_SENTENCE)
def test_they_are_seen_without_blanks_or_with_too_many(how):
    single = [text for text in UNMISTAKABLE if not re.search("[.,]", text)]
    spelled = map(IN_ONE_SENTENCE[how], single)
    assert [text for text in spelled if not signs_of_crisis(text)] == []


@pytest.mark.parametrize("how", [*SPELLINGS, *IN_ONE_SENTENCE])
def test_ordinary_sentences_are_not(how):
    spelled = map({**SPELLINGS, **IN_ONE_SENTENCE}[how], ORDINARY)
    assert [text for text in spelled if signs_of_crisis(text)] == []


def test_enough_sentences_none_twice():
    assert len({*UNMISTAKABLE}) == len(UNMISTAKABLE) >= 20
    assert len({*ORDINARY}) == len(ORDINARY) >= 60


ODD_LINES = ["", " ", "\0", "i " * 1000, "'" * 1000, "\ud83d", "\U0001f600" * 500, "?!" * 1000]


@pytest.mark.parametrize("text", ODD_LINES, ids=range(len(ODD_LINES)))
def test_odd_lines_are_no_sign(text):
    assert not signs_of_crisis(text)
