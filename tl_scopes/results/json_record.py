"""An `Attribution` as JSON: the schema of the text, and the fields it holds."""

import json
from math import isfinite
from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from tl_scopes.results.json_text import AnswerRecord, Numbers, checked, common, decoded, encoded, parsed, text_of

VERSION = 2


class _Scores(Numbers):
    dtype: Literal["float32", "float64"]
    values: list[float]


class _Record(AnswerRecord):
    """What the text must hold."""

    format: Literal["tl_scopes.Attribution"]
    version: Literal[2]
    scores: _Scores
    details: dict[str, Any]
    value: float | Literal["Infinity", "-Infinity", "NaN"] | None
    quantity: str | None
    parts: list[str]
    uncounted: list[str]
    grouping: Literal["norm", "sum", "signed"] | None

    @model_validator(mode="after")
    def _positions_increase(self) -> "_Record":
        if any(a >= b for a, b in zip(self.positions, self.positions[1:], strict=False)):
            raise ValueError(f"positions must increase, got {self.positions[:20]}")
        # Where the target is several tokens, the position is that of the first, and all but the last may have scores.
        last = self.position + (len(self.target.tokens) - 1 if self.target and not self.target.any_of else 0)
        if self.positions and self.positions[-1] > last:
            raise ValueError(f"the prediction was read at position {last}, before {self.positions[-1]}")
        return self


def written(fields: dict[str, Any]) -> str:
    """The text for the fields of an answer.

    JSON has no infinite numbers and no NaN. Where they are among the details, as in an unknown standard error, they are
    written as the texts "Infinity", "-Infinity" and "NaN".

    Raises:
        ValueError: for a detail that JSON cannot hold, a set say.
    """
    record = common(fields, "Attribution", VERSION)
    if fields["value"] is not None and not isfinite(fields["value"]):
        record["value"] = json.loads(json.dumps(fields["value"]), parse_constant=str)
    record["scores"] = encoded(fields["scores"], "scores")
    record["details"] = {name: encoded(value, f"the detail {name!r}") for name, value in fields["details"].items()}
    return json.dumps(record, ensure_ascii=True, allow_nan=False)


def read(text: str | Path) -> dict[str, Any]:
    """The fields that a text or a file holds, with tensors and plain tuples; tokens are (id, text).

    Raises:
        TypeError: for something that is neither.
        ValueError: for text that is not an Attribution, or that a later version has written, with the field and its
            value.
    """
    text = text_of(text)
    given = parsed(text, "an Attribution", VERSION)
    if given["version"] == 1:
        text = json.dumps(_from_version_1(given))
    record = checked(_Record, text, "Attribution")
    return record.fields() | {
        "scores": record.scores.decoded("scores"),
        "value": None if record.value is None else float(record.value),
        "details": {name: decoded(value, f"the detail {name!r}") for name, value in record.details.items()},
    }


def _from_version_1(given: dict[str, Any]) -> dict[str, Any]:
    """What version 1 wrote, as version 2 writes it: its targets are one token, and it has no value."""
    later: dict[str, Any] = {"version": 2, "value": None, "quantity": None}
    later |= {"parts": [], "uncounted": ["template"], "grouping": None}
    for name in ("target", "versus"):
        if isinstance(given.get(name), list):
            later[name] = {"tokens": [given[name]], "any_of": False}
    if isinstance(details := given.get("details"), dict) and isinstance(details.get("value"), float):
        later |= {"value": details["value"], "details": {k: v for k, v in details.items() if k != "value"}}
    return {**given, **later}
