"""A `Paths` as JSON: the schema of the text, and the fields it holds.

This is a file of its own since pydantic is needed for it alone.
"""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import NonNegativeInt

from tl_scopes.results.json_text import AnswerRecord, Numbers, checked, common, encoded, parsed, text_of

VERSION = 1
_TENSORS = ("values", "around", "scores", "where", "standard_error", "stream")


class _Record(AnswerRecord):
    """What the text must hold."""

    format: Literal["tl_scopes.Paths"]
    version: Literal[1]
    values: Numbers
    around: Numbers
    scores: Numbers
    where: Numbers | None
    standard_error: Numbers | None
    stream: Numbers | None
    stream_layers: list[NonNegativeInt]
    layers: list[NonNegativeInt]
    by: Literal["position", "layer", "head", "qkv", "neuron"]
    mode: Literal["forward", "backward"]
    quantity: str | None = None


def written(fields: dict[str, Any]) -> str:
    """The text for the fields of an answer."""
    record = common(fields, "Paths", VERSION) | {name: encoded(fields[name], name) for name in _TENSORS}
    return json.dumps(record, ensure_ascii=True, allow_nan=False)


def read(text: str | Path) -> dict[str, Any]:
    """The fields that a text or a file holds, with tensors and plain tuples; tokens are (id, text).

    Raises:
        TypeError: for something that is neither.
        ValueError: for text that is not a Paths, or that a later version has written, with the field and its value.
    """
    text = text_of(text)
    parsed(text, "a Paths", VERSION)
    record = checked(_Record, text, "Paths")
    numbers = {name: getattr(record, name) for name in _TENSORS}
    return record.fields() | {name: one if one is None else one.decoded(name) for name, one in numbers.items()}
