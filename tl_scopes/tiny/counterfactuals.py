"""Prompts with one word replaced, whose right answer is known: they show whether a cause is one for the model too.

A cause is confirmed when replacing it turns the prediction into the answer that is then right, and any other word when
replacing it leaves the prediction as it is. New words come from the vocabulary of `tl_scopes.tiny.language`; words
without an alternative of their kind there (articles, "had", "is") stay.
"""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tl_scopes.tiny.example import Example
from tl_scopes.tiny.language import (
    ADJECTIVES,
    ASIDES,
    CITIES,
    CONSERVATIVE_COLLEGES,
    FRAMES,
    GERMAN_ADJECTIVES,
    GERMAN_ADVERBS,
    GERMAN_NOUNS,
    GERMAN_VERBS,
    HOBBIES,
    HOLDERS,
    LIBERAL_COLLEGES,
    NAMES,
    NOUNS,
    PEOPLE,
    PREPOSITIONS,
    SEEN,
    THINGS,
)

Span = tuple[int, int]
Lexicon = dict[str, str]


@dataclass(frozen=True)
class Counterfactual:
    """A prompt with something replaced."""

    prompt: str
    answer: str
    """The answer that is right for this prompt: the example's target where no cause was replaced."""
    cause: Span | None
    """The cause that was replaced; None where another word was."""


def replaced(prompt: str, *changes: tuple[Span, str]) -> str:
    """A text with some of its spans replaced; the spans are those of the old text."""
    for (start, stop), word in sorted(changes, reverse=True):
        prompt = prompt[:start] + word + prompt[stop:]
    return prompt


def counterfactuals(example: Example) -> list[Counterfactual]:
    """One counterfactual for each cause, and one for each other word that has an alternative; the same ones every time.

    Raises:
        ValueError: for a task that has none: the answer of a series that was changed is not known.
    """
    if example.task not in CHANGES and not example.task.startswith("inference"):
        raise ValueError(f"there are no counterfactuals for the task {example.task!r}: choose from {', '.join(TASKS)}.")
    task = "inference" if example.task.startswith("inference") else example.task
    return list(CHANGES[task](example, random.Random(example.prompt)))


def _other(rng: random.Random, words: Sequence[str], *present: str) -> str:
    return rng.choice([word for word in words if word not in present])


def _words(text: str) -> Iterator[tuple[Span, str]]:
    for match in re.finditer(r"\w+", text):
        yield match.span(), match[0]


def _agreement(example: Example, rng: random.Random) -> Iterator[Counterfactual]:
    """With the subject in the other number the other verb is right; without "Yesterday" it is in the present."""
    assert example.foil is not None
    prompt = example.prompt
    for span, word in _words(prompt):
        singular = word.removesuffix("s")
        if span in example.causes and word == "Yesterday":
            present = " is" if example.target == " was" else " are"
            yield Counterfactual("T" + prompt[len("Yesterday t") :], present, span)
        elif span in example.causes:
            other = f"{word}s" if word in NOUNS else singular
            yield Counterfactual(replaced(prompt, (span, other)), example.foil, span)
        elif word in (*NOUNS, *PEOPLE) or singular in (*NOUNS, *PEOPLE):
            other = f"{word}s" if word in (*NOUNS, *PEOPLE) else singular
            yield Counterfactual(replaced(prompt, (span, other)), example.target, None)
        else:
            kind = next((kind for kind in (ADJECTIVES, PREPOSITIONS, SEEN) if word in kind), None)
            if kind:
                yield Counterfactual(replaced(prompt, (span, _other(rng, kind, word))), example.target, None)


def _inference(example: Example, rng: random.Random) -> Iterator[Counterfactual]:
    """Three causes, each with its own answer.

    A new name for who is asked for is the answer itself. Another one named in the question asks for who goes with that
    one. Where two facts exchange what the question names, the answer comes from the other fact.
    """
    prompt = example.prompt

    def text(span: Span) -> str:
        return prompt[slice(*span)]

    facts = [(m.span(1), m.span(2)) for m in re.finditer(r"The (\w+) had the (\w+)\.", prompt)]
    question = re.search(r"The (\w+) was the (\w+)\. The (\w+) is the$", prompt)
    assert question is not None
    named = 1 if text(question.span(2)) in THINGS else 0  # which part of a fact the question names
    asked = 1 - named
    own = next(fact for fact in facts if text(fact[named]) == text(question.span(2)))
    others = [fact for fact in facts if fact is not own]
    other = others[0]
    pool = (HOLDERS, THINGS)
    fresh = [_other(rng, words, *re.findall(r"\w+", prompt)) for words in pool]

    def changed(answer: str, cause: Span | None, *changes: tuple[Span, str]) -> Counterfactual:
        return Counterfactual(replaced(prompt, *changes), answer, cause)

    yield changed(f" {fresh[asked]}", own[asked], (own[asked], fresh[asked]))
    exchange = ((own[named], text(other[named])), (other[named], text(own[named])))
    yield changed(f" {text(other[asked])}", own[named], *exchange)
    yield changed(f" {text(other[asked])}", question.span(2), (question.span(2), text(other[named])))
    for fact in others:
        for part in (0, 1):
            yield changed(example.target, None, (fact[part], fresh[part]))
    for i in (1, 3):
        role = text(question.span(i))
        kind = next(roles for roles in zip(*FRAMES, strict=True) if role in roles)
        yield changed(example.target, None, (question.span(i), _other(rng, kind, role)))
    for aside in ASIDES:
        if aside in prompt:
            start = prompt.index(aside)
            yield changed(example.target, None, ((start, start + len(aside)), _other(rng, ASIDES, aside)))


def _translation(example: Example, rng: random.Random) -> Iterator[Counterfactual]:
    """For another German word of the same kind, gender and ending the translation of that one is right.

    Any other German word, and any English word given so far, changes nothing, though the two sentences then differ.
    """
    prompt = example.prompt
    form = 1 if " hat " in prompt else 2 if " will " in prompt else 0
    nouns: list[Lexicon] = [{n: english for n, g, english in GERMAN_NOUNS if g == gender} for gender in "mfn"]
    adjectives: list[Lexicon] = [
        {stem + ending: english for stem, english in GERMAN_ADJECTIVES} for ending in ("e", "en")
    ]
    lexicons = [
        *nouns,
        *adjectives,
        {verb[form]: verb[form + 3] for verb in GERMAN_VERBS},
        {entry[0]: entry[1] for entry in GERMAN_ADVERBS},
    ]
    present = [word for _, word in _words(prompt)]
    for span, word in _words(prompt):
        german = next((lexicon for lexicon in lexicons if word in lexicon), {})
        english = [list(lexicon.values()) for lexicon in lexicons if word in lexicon.values()]
        if span in example.causes:
            other = _other(rng, [w for w in german if german[w] != german[word]], *present)
            yield Counterfactual(replaced(prompt, (span, other)), f" {german[other]}", span)
        elif german or english:
            other = _other(rng, list(german) or english[0], *present)
            yield Counterfactual(replaced(prompt, (span, other)), example.target, None)


def _association(example: Example, rng: random.Random) -> Iterator[Counterfactual]:
    """With a college of the other kind the other label is right."""
    assert example.foil is not None
    prompt = example.prompt
    (cause,) = example.causes
    liberal = prompt[slice(*cause)] in LIBERAL_COLLEGES
    college = rng.choice(CONSERVATIVE_COLLEGES if liberal else LIBERAL_COLLEGES)
    yield Counterfactual(replaced(prompt, (cause, college)), example.foil, cause)
    for kind in (HOBBIES, CITIES, *NAMES.values()):
        for word in kind:
            spans = [match.span() for match in re.finditer(rf"\b{word}\b", prompt)]
            if spans:
                other = _other(rng, kind, word)
                yield Counterfactual(replaced(prompt, *((span, other) for span in spans)), example.target, None)


CHANGES: dict[str, Callable[[Example, random.Random], Iterator[Counterfactual]]] = {
    "agreement": _agreement,
    "agreement_far": _agreement,
    "inference": _inference,
    "translation": _translation,
    "association": _association,
}
TASKS = ("agreement", "agreement_far", "inference_what", "inference_who", "translation", "association")
"""The tasks whose causes can be confirmed."""
