"""An `Attribution` as JSON: the schema of the text, the fields it holds, and how numbers survive the journey."""

import json
from dataclasses import asdict
from math import isfinite
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError, model_validator
from torch import Tensor

from tl_scopes.models import Target, Token

FORMAT, VERSION = "tl_scopes.Attribution", 2

_DType = Literal["bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64", "float"]
_TokenRecord: TypeAlias = tuple[NonNegativeInt, str]
_Id: TypeAlias = Annotated[int, Field(ge=0, lt=2**63)]


class _Numbers(BaseModel):
    """A tensor, or one number that JSON does not have, which is a text then."""

    model_config = ConfigDict(extra="forbid", strict=True)

    dtype: _DType
    values: Any

    def decoded(self, name: str) -> Any:
        """The tensor or number.

        Raises:
            ValueError: for values that do not make a tensor of this type.
        """
        try:
            if self.dtype == "float":
                return float(self.values)
            return torch.from_numpy(np.array(self.values, dtype=self.dtype))  # which reads "Infinity" and "NaN"
        except (ValueError, TypeError, OverflowError) as error:
            raise ValueError(f"{name} does not hold numbers of the type {self.dtype}: {error}") from error


class _Scores(_Numbers):
    dtype: Literal["float32", "float64"]
    values: list[float]


class TargetRecord(BaseModel):
    """What is explained."""

    model_config = ConfigDict(extra="forbid", strict=True)

    tokens: Annotated[list[_TokenRecord], Field(min_length=1)]
    any_of: bool


class _Record(BaseModel):
    """What the text must hold; anything else is refused."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal["tl_scopes.Attribution"]
    version: Literal[2]
    scores: _Scores
    tokens: list[_Id]
    str_tokens: list[str]
    positions: list[NonNegativeInt]
    position: NonNegativeInt
    target: TargetRecord | None
    versus: TargetRecord | None
    scope: str
    unit: str
    predictions: list[tuple[_TokenRecord, Annotated[float, Field(ge=0, le=1)]]]
    wrt: str
    of: str
    model: str
    dtype: str
    notes: list[str]
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
        # Of an answer of several tokens the first is predicted at the position, and earlier ones may be scored.
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
    record = {"format": FORMAT, "version": VERSION, **fields, "tokens": fields["tokens"].tolist()}
    if fields["value"] is not None and not isfinite(fields["value"]):
        record["value"] = json.loads(json.dumps(fields["value"]), parse_constant=str)
    record |= {name: fields[name] and asdict(fields[name]) for name in ("target", "versus")}
    record["scores"] = _encoded(fields["scores"], "scores")
    record["details"] = {name: _encoded(value, f"the detail {name!r}") for name, value in fields["details"].items()}
    return json.dumps(record, ensure_ascii=True, allow_nan=False)


def read(text: str) -> dict[str, Any]:
    """The fields that a text holds, with tensors and plain tuples; tokens are (id, text).

    Raises:
        TypeError: for something that is not text.
        ValueError: for text that is not an Attribution, or that a later version has written, with the field and its
            value.
    """
    if not isinstance(text, str):
        raise TypeError(f"an Attribution is read from the text that to_json wrote, got {type(text).__name__}.")
    given = _known_format(text)
    if given["version"] == 1:
        text = json.dumps(_from_version_1(given))
    try:
        record = _Record.model_validate_json(text)
    except ValidationError as error:
        raise ValueError(f"a field of this Attribution is not what it should be: {_first(error)}.") from error
    fields = record.model_dump(exclude={"format", "version"})
    fields["scores"] = record.scores.decoded("scores")
    fields["value"] = None if record.value is None else float(record.value)
    fields["tokens"] = torch.tensor(record.tokens, dtype=torch.long, device="cpu")
    fields["details"] = {name: _decoded(value, f"the detail {name!r}") for name, value in record.details.items()}
    return fields | {
        name: tuple(fields[name]) for name in ("str_tokens", "positions", "notes", "predictions", "parts", "uncounted")
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


def target_of(record: dict[str, Any] | None) -> Target | None:
    """The target that a `TargetRecord` holds, as the dict of its fields."""
    return None if record is None else Target(tuple(Token(*token) for token in record["tokens"]), record["any_of"])


def _known_format(text: str) -> dict[str, Any]:
    """Say first what the text is, if it is something else."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"this text is not an Attribution but broken JSON: {reason}.") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f'this JSON is not an Attribution: its "format" is not "{FORMAT}".')
    version = record.get("version")
    if isinstance(version, int) and version > VERSION:
        raise ValueError("this Attribution was written by a later version of tl_scopes: upgrade to read it.")
    if type(version) is not int or version < 1:
        raise ValueError(f"this Attribution has the version {version!r}, and versions are numbers from 1 on.")
    return record


def _first(error: ValidationError) -> str:
    """The first thing that is wrong: which field, what it must be, what it is."""
    found = error.errors(include_url=False)[0]
    place = ".".join(map(str, found["loc"]))
    value = repr(found["input"])
    shown = value if len(value) <= 60 else value[:57] + "..."
    if found["type"] == "value_error":
        return str(found["ctx"]["error"])
    return f"{place}: {found['msg']}" if found["type"] == "missing" else f"{place}: {found['msg']}, got {shown}"


def _encoded(value: Any, name: str) -> Any:
    """A value as JSON: tensors, dicts, and numbers that JSON does not have, say what they are."""
    if isinstance(value, Tensor):
        dtype, numbers = str(value.dtype).removeprefix("torch."), value.tolist()
        return {"dtype": dtype, "values": json.loads(json.dumps(numbers), parse_constant=str)}
    if isinstance(value, float) and not isfinite(value):
        return {"dtype": "float", "values": json.loads(json.dumps(value), parse_constant=str)}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"items": {key: _encoded(one, name) for key, one in value.items()}}
    if isinstance(value, list | tuple):
        return [_encoded(one, name) for one in value]
    if value is None or isinstance(value, str | int | float):
        return value
    raise ValueError(
        f"{name} cannot be written as JSON: it is a {type(value).__name__}. Details are tensors, numbers, texts, and "
        "lists and dicts of these."
    )


def _decoded(value: Any, name: str) -> Any:
    if isinstance(value, dict):
        if set(value) == {"items"} and isinstance(value["items"], dict):
            return {key: _decoded(one, name) for key, one in value["items"].items()}
        try:
            return _Numbers.model_validate(value).decoded(name)
        except ValidationError as error:
            raise ValueError(f"{name} of this Attribution is not what it should be: {_first(error)}.") from error
    return tuple(_decoded(one, name) for one in value) if isinstance(value, list) else value
