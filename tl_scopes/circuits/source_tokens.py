"""Which tokens of a prompt are meant by texts and positions.

This is a file of its own since the question is asked with tokens, and so is every answer.
"""

from collections.abc import Iterable, Sequence
from typing import SupportsIndex

from tl_scopes.models import as_int

Sources = str | SupportsIndex | Iterable[str | SupportsIndex] | None


def as_positions(tokens: Sources, texts: Sequence[str]) -> list[int]:
    """The positions of tokens that are given as texts, as positions (negative ones from the end), or both.

    Args:
        tokens: one, or several; None is all.
        texts: the text of each token of the prompt.

    Raises:
        ValueError: for a text that does not stand in the prompt, or stands there more than once; for a position that
            is not there; for no tokens.
        TypeError: for something that is neither text nor position.
    """
    if tokens is None:
        return list(range(len(texts)))
    several = not isinstance(tokens, str) and isinstance(tokens, Iterable)
    found = [_position(one, texts) for one in (tokens if several else [tokens])]  # type: ignore[union-attr]
    if not found:
        raise ValueError("no source tokens are given: name one at least, or None for all.")
    return sorted(set(found))


def _position(one: object, texts: Sequence[str]) -> int:
    if isinstance(one, str):
        at = [i for i, text in enumerate(texts) if text == one]
        if len(at) == 1:
            return at[0]
        if at:
            raise ValueError(f"the token {one!r} stands at the positions {', '.join(map(str, at))}: give one of these.")
        near = [text for text in texts if text.strip() == one.strip()]
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"there is no token {one!r} in the prompt: its tokens are {list(texts)[:40]!r}.{hint}")
    position = as_int(one, "a source token is a text or a position")
    if not -len(texts) <= position < len(texts):
        raise ValueError(f"position {position} is outside the prompt of {len(texts)} tokens.")
    return position % len(texts)
