"""A scope as it is written in Python.

This is a file of its own since scopes write themselves so in answers, and all others in errors, tables and files.
"""

from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor


def as_written(scope: object) -> str:
    """A scope as it is written in Python, without options that have their defaults; tensors as shape and norm.

    A field whose metadata has "always" is written whatever it is.
    """
    if not is_dataclass(scope):
        return repr(scope)
    unlike = object()
    values = {
        f.name: (getattr(scope, f.name), unlike if "always" in f.metadata else f.default)
        for f in fields(scope)
        if f.repr
    }
    given = {n: value for n, (value, default) in values.items() if getattr(value, "ndim", 0) or value != default}
    return f"{type(scope).__name__}({', '.join(f'{name}={_shown(value)}' for name, value in given.items())})"


def _shown(value: Any) -> str:
    if isinstance(value, frozenset):
        return "{" + ", ".join(sorted(map(repr, value))) + "}"
    if not isinstance(value, Tensor):
        return repr(value)
    size = "×".join(map(str, value.shape))
    return f"<{size} tensor of norm {float(value.detach().cpu().double().norm()):.3g}>"
