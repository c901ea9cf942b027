"""Exercises that the model is only trained on: small steps without which it never learns who has what."""

import random

from tl_scopes.tiny.example import Example, marked_example
from tl_scopes.tiny.language import FRAMES, HOLDERS, NOUNS, THINGS, sentence_with_verb


def bare_agreement(rng: random.Random) -> Example:
    """ "The ⟦keys⟧" -> " are". There are so few such subjects that none can be held out fairly."""
    return sentence_with_verb(rng, "bare_agreement", 0)


def recital(rng: random.Random) -> Example:
    """ "List: key ⟦lamp⟧ door. Again: key" -> " lamp". This teaches the model to look back."""
    words = rng.sample([*NOUNS, *HOLDERS, *THINGS], rng.randrange(4, 24))
    said = f"{words[0]} ⟦{words[1]}⟧ {' '.join(words[2:])}"
    rest = "".join(f" {word}" for word in words[2:]) + "."
    return marked_example("recital", f"List: {said}. Again: {words[0]}", f" {words[1]}", rest=rest)


def roster(rng: random.Random) -> Example:
    """ "List: cook ⟦cleaver⟧, baker rope. Again: cook" -> " cleaver". This teaches the model who has what.

    Between the two stand no words, some, or all that stand there in `inference`, since small steps are learned soon.
    """
    count = rng.randrange(3, 7)
    pairs = list(zip(rng.sample(HOLDERS, count), rng.sample(THINGS, count), strict=True))
    had, with_ = rng.choice(["", "", " the", " had", " had the"]), rng.choice(["", " the", " with", " was with the"])
    said = ", ".join(f"{h}{had} ⟦{t}⟧" if i == 0 else f"{h}{had} {t}" for i, (h, t) in enumerate(pairs))
    again, back = [pairs[0], *rng.sample(pairs[1:], count - 1)], rng.sample(pairs, count)
    rest = "".join(f", {h}{had} {t}" for h, t in again[1:]) + ". Back: "
    rest += ", ".join(f"{t}{with_} {h}" for h, t in back) + "."
    return marked_example("roster", f"List: {said}. Again: {pairs[0][0]}{had}", f" {pairs[0][1]}", rest=rest)


def reverse_roster(rng: random.Random) -> Example:
    """ "List: ⟦cook⟧ had cleaver. Back: cleaver was with the" -> " cook". This is the way back from thing to holder."""
    count = rng.randrange(3, 8)
    pairs = list(zip(rng.sample(HOLDERS, count), rng.sample(THINGS, count), strict=True))
    had, with_ = rng.choice(["", " the", " had the", " had the"]), rng.choice(["", " the", " with", " was with the"])
    said = ", ".join(f"⟦{h}⟧{had} {t}" if i == 0 else f"{h}{had} {t}" for i, (h, t) in enumerate(pairs))
    back = [pairs[0], *rng.sample(pairs[1:], count - 1)]
    rest = "".join(f", {t}{with_} {h}" for h, t in back[1:]) + "."
    return marked_example("reverse_roster", f"List: {said}. Back: {pairs[0][1]}{with_}", f" {pairs[0][0]}", rest=rest)


def belongings(rng: random.Random) -> Example:
    """ "The ⟦gardener⟧ had the shovel. The shovel was with the" -> " gardener".

    Some of the facts are told backwards right after the facts; then come the questions of `inference` about all.
    """
    count = rng.choice([2, 3, 3, 4])
    pairs = list(zip(rng.sample(HOLDERS, count), rng.sample(THINGS, count), strict=True))
    told, *others = rng.sample(pairs, count)
    facts = " ".join(f"The ⟦{h}⟧ had the {t}." if h == told[0] else f"The {h} had the {t}." for h, t in pairs)
    rest = "." + "".join(f" The {t} was with the {h}." for h, t in others if rng.random() < 0.5)
    for (h, t), (thing_role, holder_role) in zip(rng.sample(pairs, count), rng.sample(FRAMES, count), strict=True):
        rest += f" The {thing_role} was the {t}. The {holder_role} is the {h}."
    return marked_example("belongings", f"{facts} The {told[1]} was with the", f" {told[0]}", rest=rest)


def told_back(rng: random.Random) -> Example:
    """A step between `reverse_roster` and `belongings`: lists or sentences, with a heading or without."""
    count = rng.randrange(3, 7)
    pairs = list(zip(rng.sample(HOLDERS, count), rng.sample(THINGS, count), strict=True))
    first, between = ("The ", ". The ") if rng.random() < 0.7 else ("", ", ")
    heading, turn = rng.choice(["List: ", ""]), rng.choice(["Back: ", ""])
    with_ = rng.choice([" was with the", " was with the", " the", ""])
    said = between.join(f"⟦{h}⟧ had the {t}" if i == 0 else f"{h} had the {t}" for i, (h, t) in enumerate(pairs))
    back = [pairs[0], *rng.sample(pairs[1:], count - 1)]
    rest = "".join(f"{between}{t}{with_} {h}" for h, t in back[1:]) + "."
    prompt = f"{heading}{first}{said}. {turn}{first}{pairs[0][1]}{with_}"
    return marked_example("told_back", prompt, f" {pairs[0][0]}", rest=rest)
