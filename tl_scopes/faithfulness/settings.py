"""What the results of an evaluation depend on, written beside them: results of other settings are never mixed in."""

import json
import zlib
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, fields, is_dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tl_scopes import models
from tl_scopes.faithfulness.perturbation import Protocol
from tl_scopes.models import Model
from tl_scopes.scopes.scope import Scope, as_written


def settings(model: Model, scopes: Mapping[str, Scope], protocol: Protocol, tokens: Sequence[Tensor]) -> dict[str, Any]:
    """Model, weights, scopes and protocol, as numbers and texts.

    Cost: a pass over the weights, on the CPU.

    Raises:
        ValueError: for a model with hooks of the user's.
    """
    if models.user_hooks(model) or models.has_backward_hooks(model):
        raise ValueError(
            "the model has hooks of yours, and in a file results under hooks cannot be told from those without: leave "
            "`path` out, or evaluate outside of model.hooks(...)."
        )
    found = {
        "tl_scopes": version("tl-scopes"),
        "model": models.model_name(model),
        "weights": models.fingerprint(model),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "scopes": {name: _in_full(scope) for name, scope in scopes.items()},
    } | asdict(protocol)
    if "resample" in protocol.replacements:
        found["prompts to resample from"] = _checksum(repr([ids.tolist() for ids in tokens]))
    return found


def _in_full(scope: Scope) -> str:
    """As it is written, which leaves out what tensors hold, with a checksum of that."""
    written = as_written(scope) if is_dataclass(scope) else type(scope).__qualname__
    return f"{written} holding {_checksum(json.dumps(contents(scope))):08x}"


def contents(value: Any) -> Any:
    """What tells a scope's options apart, as lists and texts: the same in another process.

    Tensors and arrays by their numbers, whatever their field shows. Generators do not count: what they will give cannot
    be told. Functions count by name.
    """
    if isinstance(value, Tensor):
        numbers = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        return [str(value.dtype), list(value.shape), zlib.crc32(numbers.data)]
    if isinstance(value, np.ndarray):
        return [str(value.dtype), list(value.shape), zlib.crc32(np.ascontiguousarray(value).tobytes())]
    if isinstance(value, torch.Generator):
        return "generator"
    if is_dataclass(value) and not isinstance(value, type):
        options = {f.name: getattr(value, f.name) for f in fields(value) if f.init}
        return [type(value).__qualname__, contents(options)]
    if isinstance(value, Mapping):
        return [[contents(key), contents(one)] for key, one in value.items()]
    if isinstance(value, list | tuple):
        return [contents(one) for one in value]
    if isinstance(value, AbstractSet):
        return sorted(map(repr, value))
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        return f"{value.__module__}.{value.__qualname__}"
    if getattr(type(value), "__repr__", None) is object.__repr__:  # which shows an address
        return [type(value).__qualname__, contents(vars(value) if hasattr(value, "__dict__") else {})]
    return repr(value)


def _checksum(text: str) -> int:
    return zlib.crc32(text.encode())
