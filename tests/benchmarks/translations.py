"""Two long texts, each with a translation, and which word of the one stands for which word of the other.

Dante's Inferno, canto I, lines 1 to 18, in the English of Henry Wadsworth Longfellow (1867), both in the public domain:
first the whole source, then the whole translation. And plain German sentences, each with its translation behind it,
written for this table, which is what a small model does. A text comes in passages, a tercet or a sentence each. The
pairs are a lexicon by hand: words that translate one another there, where each is the first occurrence in its passage.
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

FILE = Path(__file__).with_suffix(".json")
DANTE = FILE.with_name("dante.json")
"""The first ninety lines of the Divine Comedy, each with Longfellow's translation."""


class Pair(NamedTuple):
    """A word and its translation.

    Attributes:
        passage: where they stand.
        source: the characters of the source word in prompt and answer together, from and to.
        translated: the same of its translation.
        alone: the characters of the translation in the text without the source.
        words: both words.
    """

    passage: int
    source: tuple[int, int]
    translated: tuple[int, int]
    alone: tuple[int, int]
    words: tuple[str, str]


class Translation(NamedTuple):
    """A text that a model reads, its translation, and the lexicon.

    Attributes:
        name: of the text.
        prompt: what is given: the source, or the first sentence of it.
        answer: the translation; with the other sentences of the source, where these stand between.
        alone: prompt and answer without the source.
        source: the characters of each passage of the source in prompt and answer together, from and to.
        pairs: the words that translate one another.
    """

    name: str
    prompt: str
    answer: str
    alone: tuple[str, str]
    source: tuple[tuple[int, int], ...]
    pairs: tuple[Pair, ...]


def read(passages: int | None = None) -> tuple[Translation, ...]:
    """All texts, or their first passages."""
    dante, plain = json.loads(FILE.read_text(encoding="utf-8"))
    verses = json.loads(DANTE.read_text(encoding="utf-8"))
    for n, tercet in enumerate(dante["passages"]):
        source, translation = map("\n".join, zip(*verses[3 * n : 3 * n + 3], strict=True))
        tercet |= {"source": source, "translation": translation}
    return tuple(laid_out(one, passages) for one in (dante, plain))


def laid_out(text: dict[str, Any], count: int | None = None) -> Translation:
    """The prompt and the answer, and where in them everything stands."""
    passages = text["passages"][:count]
    places, parts, alone, bare = {}, [], [], []
    language = text["language"]
    sides = ("source", "translation")
    if text["between"]:
        order = [(n, side) for n in range(len(passages)) for side in sides]
        before = {"source": f"{language}: ", "translation": " English: "}
        end = {"source": "", "translation": "\n"}
    else:
        order = [(n, side) for side in sides for n in range(len(passages))]
        before, end = {"source": "", "translation": ""}, {"source": "\n", "translation": "\n"}
        parts, alone = [f"{language}:\n"], ["English:\n"]
    first = order.index((0, "translation"))
    for at, (n, side) in enumerate(order):
        if at == first and not text["between"]:
            parts.append("\nEnglish:\n")
        parts.append(before[side])
        if at == first:
            # A space belongs to the word behind it.
            length = len("".join(parts).rstrip(" "))
        places[n, side] = len("".join(parts))
        parts += [passages[n][side], end[side]]
        if side == "translation":
            alone.append(before[side].lstrip())
            bare.append(len("".join(alone)))
            alone += [passages[n][side], end[side]]
    whole, without = "".join(parts).rstrip(), "".join(alone).rstrip()
    pairs = [
        Pair(
            n,
            found(left, passage["source"], places[n, "source"]),
            found(right, passage["translation"], places[n, "translation"]),
            found(right, passage["translation"], bare[n]),
            (left, right),
        )
        for n, passage in enumerate(passages)
        for left, right in passage["pairs"]
    ]
    start = len("English:") if text["between"] else len("English:\n")
    spans = tuple((places[n, "source"], places[n, "source"] + len(one["source"])) for n, one in enumerate(passages))
    return Translation(
        text["name"], whole[:length], whole[length:], (without[:start], without[start:]), spans, tuple(pairs)
    )


def found(word: str, passage: str, before: int) -> tuple[int, int]:
    """The characters of a word in a passage that stands behind `before` others.

    Raises:
        ValueError: for a word that is not there.
    """
    place = re.search(rf"\b{re.escape(word)}\b", passage)
    if place is None:
        raise ValueError(f"{word!r} is not a word of the passage {passage!r}: mend the lexicon.")
    return before + place.start(), before + place.end()
