"""Numbers, flags and positions that a user gives: turned into Python's own, or refused with the rule and the value.

A value of the wrong kind is a TypeError. One of the right kind that does not fit the rule is a ValueError.
"""

import operator
from collections.abc import Callable
from contextlib import suppress
from typing import Any, SupportsFloat

import numpy as np
import torch

from tl_scopes.models.wording import counted


def as_int(value: Any, rule: str) -> int:
    """An integer of Python, NumPy or torch; truth values and floats are refused.

    Raises:
        TypeError: for anything else.
    """
    if not isinstance(value, bool) and getattr(value, "dtype", None) is not torch.bool:
        with suppress(TypeError):
            return operator.index(value)
    raise TypeError(f"{rule}, got {value!r}.")


def as_count(value: Any, rule: str, least: int = 1) -> int:
    """An integer of Python, NumPy or torch that is not below the least.

    Raises:
        TypeError: for anything but an integer.
        ValueError: for an integer below the least.
    """
    count = as_int(value, f"{rule}, and an integer")
    if count < least:
        raise ValueError(f"{rule}, got {value!r}.")
    return count


def as_position(value: Any, tokens: int, what: str = "position") -> int:
    """A position in a prompt of so many tokens, counted from 0; a negative one counts from the end.

    Raises:
        TypeError: for anything but an integer.
        ValueError: for a position that the prompt does not have. Errors call it by `what` it is for.
    """
    position = as_int(value, f"{what} must be an integer")
    if not -tokens <= position < tokens:
        raise ValueError(
            f"{what} {position} is out of range: the prompt has {counted(tokens, 'token')}, so it runs from 0 to "
            f"{tokens - 1}, or from -{tokens} to -1."
        )
    return position % tokens


def as_flag(value: Any, name: str) -> bool:
    """True or False, of Python's or NumPy's: a text such as "no" would count as true.

    Raises:
        TypeError: for anything else.
    """
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} is True or False, got {value!r}.")
    return bool(value)


def require_name(value: Any, what: str) -> None:
    """Refuse what is neither a text nor None, for no name.

    Raises:
        TypeError: for anything else. Errors call it by `what` it names.
    """
    if value is not None and not isinstance(value, str):
        raise TypeError(f"the name of {what} is a str, got {value!r}.")


def as_number(value: Any, rule: str, fits: Callable[[float], bool] = lambda number: True) -> float:
    """A number of Python's, NumPy's or torch's as a float; texts and truth values are not numbers.

    Raises:
        TypeError: for anything else.
        ValueError: for a number that does not fit the rule, and an integer that is too large for a float.
    """
    is_truth = isinstance(value, bool | np.bool_) or getattr(value, "dtype", None) is torch.bool
    if isinstance(value, SupportsFloat) and not is_truth:
        try:
            number = float(value)
        except OverflowError as error:
            raise ValueError(f"{rule}, got a number too large for a float.") from error
        except (TypeError, ValueError, RuntimeError):  # several numbers, or one without a value
            pass
        else:
            if not fits(number):
                raise ValueError(f"{rule}, got {value!r}.")
            return number
    raise TypeError(f"{rule}, got {value!r}.")
