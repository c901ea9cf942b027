"""How sentences name what they are about, numbers of things, long values and errors of other libraries; and warnings.

This is a file of its own since errors, notes and printed answers in every folder above need it.
"""

import sys
import traceback
import warnings
from typing import Any


def counted(number: int, noun: str) -> str:
    """A number of things, as English says it: "1 token", "2 tokens"."""
    return f"{number} {noun}{'s' * (number != 1)}"


def abridged(value: Any, most: int = 80) -> str:
    """A value as an error shows it: the first entries of a long list and how many there are, the beginning of a text.

    Args:
        value: any value.
        most: how many characters are shown, at most, of what is not a list.
    """
    if isinstance(value, list | tuple) and len(value) > 8:
        first = ", ".join(map(repr, value[:5]))
        return f"[{first}, … {len(value)} in all]"
    shown = value if isinstance(value, str) else repr(value)
    shown = shown if len(shown) <= most else shown[: most - 1] + "…"
    return repr(shown) if isinstance(value, str) else shown


def first_sentence(error: Exception) -> str:
    """The message of an error up to its first full stop, on one line and without it; its type where it is empty."""
    return " ".join(str(error).split()).split(". ")[0].rstrip(".") or type(error).__name__


def warn(message: str) -> None:
    """Warn at the line outside this package that called into it, however many calls lie between."""
    package = __name__.partition(".")[0]
    outermost = 0
    for depth, (frame, _) in enumerate(traceback.walk_stack(sys._getframe())):
        if frame.f_globals.get("__name__", "").partition(".")[0] == package:
            outermost = depth
    warnings.warn(message, stacklevel=outermost + 2)
