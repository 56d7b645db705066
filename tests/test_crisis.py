"""What chat takes for a sign of crisis: unmistakable phrases in any spelling, and no ordinary one."""

import random
import re

import pytest

import crisis

UNMISTAKABLE = """
I wanna die
I want to die
I just want to die
I don't want to live anymore
I do not want to be alive
I don't want to live
I want to kill myself
i am going to kill myself
I'm going to kill myself tonight
I will kill myself because nobody cares
I'm thinking of killing myself
I keep thinking about killing myself
I think about suicide every day
I am planning to commit suicide
I want to commit suicide
I'm considering suicide
I am suicidal
I feel suicidal again
Suicidal thoughts again
I have suicidal thoughts
I want to end my life
I'm going to end my own life
I want to take my own life
I've been thinking about ending my life
I'm thinking about ending it all
I want to end it all
Life is not worth living
My life isn't worth living anymore
There is no reason to live
I see no point in living
There's nothing left to live for
I have nothing to live for
I'm tired of living
I am sick of being alive
I wish I was dead
I wish I were dead
I wish I had never been born
I hope I don't wake up tomorrow
I never want to wake up again
Everyone would be better off without me
they would be better off without me
My family would be better off if I was dead
I'd be better off dead
I want to hang myself
I'm gonna hang myself
I want to slit my wrists
I have been cutting myself
I started cutting myself again
I hurt myself on purpose
I've been harming myself
I want to hurt myself
self-harm
I took an overdose
I took all my pills
I swallowed the whole bottle of pills
I wrote a suicide note
I can't go on living
I feel like dying
My brother is gone. I want to die.
Nobody calls, I want to die, goodbye
He wants to kill himself
She tried to kill herself
I am going to die tonight, by my own hand
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
""".strip().split("\n")


def doubled(text):
    rng = random.Random(text)
    return re.sub("[A-Za-z]", lambda found: found[0] * rng.randint(1, 3), text)


SPELLINGS = {
    "as it is": lambda text: text,
    "capitals": str.upper,
    "small": str.lower,
    "typographic apostrophes": lambda text: text.replace("'", "\u2019"),
    "no apostrophes": lambda text: text.replace("'", ""),
    "blanks for apostrophes": lambda text: text.replace("'", " "),
    "repeated letters": doubled,
    "wide blanks": lambda text: text.replace(" ", " \u00a0\t "),
    "no blanks": lambda text: "".join(text.split(" ")),
    "blanks between letters": " ".join,
    "dots between letters": lambda text: re.sub(r"(?<=\w)(?=\w)", ".", text),
    "invisible characters": lambda text: "\u200b".join(text),
    "accents": lambda text: text.replace("i", "\u00ed").replace("e", "e\u0301"),
    "wide letters": lambda text: re.sub("[a-z]", lambda c: chr(ord(c[0]) + 0xFEE0), text),
    "digits for letters": lambda text: text.translate(str.maketrans("oie", "013")),
    "excitement": lambda text: text.rstrip(".") + "!!!",
    "in other talk": lambda text: f"Hello there. {text}. What do you say?",
}


@pytest.mark.parametrize("how", SPELLINGS)
def test_unmistakable_phrases_are_seen_in_every_spelling(how):
    missed = []
    for text in UNMISTAKABLE:
        spelled = SPELLINGS[how](text)
        if how in (
            "no blanks",
            "blanks between letters",
            "dots between letters",
        ) and re.search("[.,-]|because", text):
            continue  # without its parts it is another text
        if not crisis.signs_of_crisis(spelled):
            missed.append(spelled)
    assert not missed


@pytest.mark.parametrize("how", SPELLINGS)
def test_ordinary_phrases_are_not(how):
    assert [text for text in ORDINARY if crisis.signs_of_crisis(SPELLINGS[how](text))] == []


def test_enough_phrases_none_twice():
    assert len({*UNMISTAKABLE}) == len(UNMISTAKABLE) >= 40
    assert len({*ORDINARY}) == len(ORDINARY) >= 60


@pytest.mark.parametrize(
    "text", ["", " ", "\0", "i " * 1000, "'" * 1000, "\ud83d", "\U0001f600" * 500]
)
def test_odd_lines_are_no_sign(text):
    assert not crisis.signs_of_crisis(text)
