"""Tokens put together to what readers see: words, numbers, sentences; and readable text for tokens that are bytes."""

import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from torch import Tensor

from tl_scopes.models import as_int, readable

Unit = Literal["word", "sentence", "number"]


def offsets(texts: Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
    """The text that tokens make up, and where in it each stands. Tokens that are bytes of one character share it."""
    whole, found, i = "", [], 0
    while i < len(texts):
        run = 1
        if re.fullmatch("(?:<0x[0-9A-F]{2}>)+", texts[i]):
            # The shortest run of bytes that is text; what is none stays as it is written.
            while i + run < len(texts) and "<0x" in readable("".join(texts[i : i + run])):
                if not texts[i + run].startswith("<0x"):
                    break
                run += 1
            run = run if "<0x" not in readable("".join(texts[i : i + run])) else 1
        shown = readable("".join(texts[i : i + run]))
        found += [(len(whole), len(whole) + len(shown))] * run
        whole += shown
        i += run
    return whole, found


def shown(texts: Sequence[str]) -> tuple[str, ...]:
    """Tokens as they are shown one by one: of those that are bytes of one character, the first shows it whole."""
    whole, found = offsets(texts)
    before = [(-1, -1), *found[:-1]]
    return tuple("⋯" if one == previous else whole[slice(*one)] for one, previous in zip(found, before, strict=True))


def labels(texts: Sequence[str]) -> tuple[str, ...]:
    """Tokens as tables name them: as they are shown, but for the later bytes of a character, which are written out."""
    return tuple(own if one == "⋯" != own else one for one, own in zip(shown(texts), texts, strict=True))


def grouped(texts: Sequence[str], unit: Unit, apart: Sequence[object]) -> list[range]:
    """Which tokens stand together in one unit.

    Words and sentences end where Unicode's rules say so (UAX #29), and where `apart` changes from one token to the
    next. A token that holds the end of one word and the beginning of the next keeps them together.

    Raises:
        ValueError: for another unit.
    """
    if unit not in ("word", "sentence", "number"):
        raise ValueError(f'tokens are grouped by "word", "sentence", "number", or a list of spans, got {unit!r}.')
    whole, places = offsets(texts)
    ends = _ends(whole, unit)
    starts = [0]
    for i in range(1, len(texts)):
        (_, end), (start, _) = places[i - 1], places[i]
        inside = start < end  # bytes of one character
        spaces = len(texts[i]) - len(texts[i].lstrip()) if unit == "sentence" else 0  # which end the sentence before
        at = bisect_left(ends, end)
        ended = at < len(ends) and ends[at] <= end + spaces
        if not inside and (ended or apart[i] != apart[i - 1]):
            starts.append(i)
    return [range(a, b) for a, b in zip(starts, [*starts[1:], len(texts)], strict=True)]


def spanned(positions: Sequence[int], spans: Any, parts: Sequence[str]) -> list[range]:
    """Which tokens stand together in spans of positions; those in none of them stand by themselves.

    Args:
        positions: of the tokens, in their order.
        spans: each a range of positions or a pair (start, stop).
        parts: the part of a chat that each token belongs to.

    Raises:
        TypeError: for spans that are neither ranges nor pairs of positions.
        ValueError: for what is not a list of spans, and for spans that overlap, that hold no token, or tokens of
            several parts.
    """
    if not isinstance(spans, Iterable) or isinstance(spans, Tensor):
        raise ValueError(f'tokens are grouped by "word", "sentence", "number", or a list of spans, got {spans!r}.')
    groups: list[range] = []
    done = 0
    pairs = [_pair(span) for span in spans]
    for start, stop in sorted(pairs):
        begin, end = positions[0], positions[-1] + 1
        if not begin <= start < stop <= end:
            raise ValueError(
                f"the span ({start}, {stop}) is not in the answer, whose positions are {begin} to {end - 1}: a span is "
                "its first position, and the one after its last."
            )
        inside = [i for i, position in enumerate(positions) if start <= position < stop]
        if not inside or inside[0] < done:
            raise ValueError(f"the span ({start}, {stop}) overlaps another one, or holds no token of the answer.")
        crossed = dict.fromkeys(parts[i] for i in inside)
        if len(crossed) > 1:
            raise ValueError(
                f"the span ({start}, {stop}) goes over several parts of the chat, {', '.join(map(repr, crossed))}, "
                "which are counted apart: give a span within one."
            )
        groups += [range(i, i + 1) for i in range(done, inside[0])]
        groups.append(range(inside[0], inside[-1] + 1))
        done = inside[-1] + 1
    return groups + [range(i, i + 1) for i in range(done, len(positions))]


def _pair(span: object) -> tuple[int, int]:
    """Where a span begins, and where it ends.

    Raises:
        TypeError: for something that is neither a range of positions nor a pair of them.
    """
    if isinstance(span, range) and span.step == 1:
        return span.start, span.stop
    if not isinstance(span, tuple | list) or len(span) != 2:
        raise TypeError(f"a span is a range of positions or a pair (start, stop), got {span!r}.")
    start, stop = (as_int(end, "a span is given by positions") for end in span)
    return start, stop


def _ends(text: str, unit: Unit) -> list[int]:
    """Where units end, in characters."""
    from uniseg.sentencebreak import sentence_boundaries
    from uniseg.wordbreak import word_boundaries

    if unit == "sentence":
        return list(sentence_boundaries(text))
    ends = list(word_boundaries(text))
    if unit == "word":
        return ends
    numbers = [range(*found.span()) for found in re.finditer(r"\d[\d.,]*\d|\d", text)]
    within = {at for number in numbers for at in number[1:]}
    return [at for at in range(len(text) + 1) if at not in within]
