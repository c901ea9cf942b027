"""Results as JSON: numbers and targets that come back as they were, and errors for texts that are something else.

This is a file of its own since all results that are written as JSON need it: `Attribution`, `AnswerMap` and `Paths`.
"""

import json
import re
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError
from torch import Tensor

from tl_scopes.models import Provenance, Target, Token

DType = Literal["bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64", "float"]
TokenRecord: TypeAlias = tuple[NonNegativeInt, str]
Id: TypeAlias = Annotated[int, Field(ge=0, lt=2**63)]
Record = TypeVar("Record", bound=BaseModel)


class Numbers(BaseModel):
    """A tensor, or one number that JSON does not have, which is a text then."""

    model_config = ConfigDict(extra="forbid", strict=True)

    dtype: DType
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


class TargetRecord(BaseModel):
    """What is explained."""

    model_config = ConfigDict(extra="forbid", strict=True)

    tokens: Annotated[list[TokenRecord], Field(min_length=1)]
    any_of: bool

    @property
    def target(self) -> Target:
        """The target itself."""
        return Target(tuple(Token(*token) for token in self.tokens), self.any_of)


class AnswerRecord(BaseModel):
    """What every answer about one prediction holds; anything that its schema does not name is refused."""

    model_config = ConfigDict(extra="forbid", strict=True)

    tokens: list[Id]
    str_tokens: list[str]
    positions: list[NonNegativeInt]
    position: NonNegativeInt
    target: TargetRecord | None
    versus: TargetRecord | None
    scope: str
    unit: str
    predictions: list[tuple[TokenRecord, Annotated[float, Field(ge=0, le=1)]]]
    wrt: str
    of: str
    model: str
    dtype: str
    rules: str | None = None
    notes: list[str]
    provenance: Provenance | None = None

    def fields(self) -> dict[str, Any]:
        """All fields, with a tensor of tokens and plain tuples; the tokens of predictions are (id, text)."""
        found = self.model_dump(exclude={"format", "version"})
        found |= {"target": self.target and self.target.target, "versus": self.versus and self.versus.target}
        found |= {"tokens": torch.tensor(self.tokens, dtype=torch.long, device="cpu"), "provenance": self.provenance}
        return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}


def common(fields: dict[str, Any], kind: str, version: int) -> dict[str, Any]:
    """The fields of an answer as JSON has them, but for those that only this kind of answer has."""
    parts = {name: fields[name] and asdict(fields[name]) for name in ("target", "versus", "provenance")}
    return {"format": f"tl_scopes.{kind}", "version": version, **fields, "tokens": fields["tokens"].tolist()} | parts


def text_of(given: str | Path) -> str:
    """The text, from a file where its path is given."""
    return given.read_text(encoding="utf-8") if isinstance(given, Path) else given


def parsed(text: str, what: str, version: int) -> dict[str, Any]:
    """The JSON of a text that says that it is a result of this kind, "an Attribution" say, and of a version known here.

    Raises:
        TypeError: for something that is not text.
        ValueError: for text that is something else, or that a later version has written.
    """
    kind = what.split()[-1]
    if not isinstance(text, str):
        raise TypeError(
            f"{what} is read from the text that to_json wrote, got {type(text).__name__}: give the text, or the Path "
            "of its file."
        )
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        if re.fullmatch(r"[^\s{}\[\]\"][^\n{}\[\]\"]*\.\w+", text):
            raise ValueError(
                f"{text!r} is not {what} but looks like the name of a file: write {kind}.from_json(Path({text!r}))."
            ) from error
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"this text is not {what} but broken JSON: {reason}.") from error
    if not isinstance(record, dict) or record.get("format") != f"tl_scopes.{kind}":
        raise ValueError(f'this JSON is not {what}: its "format" is not "tl_scopes.{kind}".')
    given = record.get("version")
    if isinstance(given, int) and given > version:
        raise ValueError(f"this {kind} was written by a later version of tl_scopes: upgrade to read it.")
    if type(given) is not int or given < 1:
        raise ValueError(f"this {kind} has the version {given!r}, and versions are numbers from 1 on.")
    return record


def checked(schema: type[Record], text: str, kind: str) -> Record:
    """The record that a text holds.

    Raises:
        ValueError: with the first field that is not what it should be, and its value.
    """
    try:
        return schema.model_validate_json(text)
    except ValidationError as error:
        raise ValueError(f"a field of this {kind} is not what it should be: {first_error(error)}.") from error


def first_error(error: ValidationError) -> str:
    """The first thing that is wrong: which field, what it must be, what it is."""
    found = error.errors(include_url=False)[0]
    place = ".".join(map(str, found["loc"]))
    value = repr(found["input"])
    shown = value if len(value) <= 60 else value[:57] + "..."
    if found["type"] == "value_error":
        return str(found["ctx"]["error"])
    return f"{place}: {found['msg']}" if found["type"] == "missing" else f"{place}: {found['msg']}, got {shown}"


def encoded(value: Any, name: str) -> Any:
    """A value as JSON: tensors, dicts, and numbers that JSON does not have, say what they are."""
    if isinstance(value, Tensor):
        dtype, numbers = str(value.dtype).removeprefix("torch."), value.tolist()
        return {"dtype": dtype, "values": json.loads(json.dumps(numbers), parse_constant=str)}
    if isinstance(value, float) and not isfinite(value):
        return {"dtype": "float", "values": json.loads(json.dumps(value), parse_constant=str)}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"items": {key: encoded(one, name) for key, one in value.items()}}
    if isinstance(value, list | tuple):
        return [encoded(one, name) for one in value]
    if value is None or isinstance(value, str | int | float):
        return value
    raise ValueError(
        f"{name} cannot be written as JSON: it is a {type(value).__name__}. Details are tensors, numbers, texts, and "
        "lists and dicts of these."
    )


def decoded(value: Any, name: str) -> Any:
    """What `encoded` wrote.

    Raises:
        ValueError: for something else, with the name.
    """
    if isinstance(value, dict):
        if set(value) == {"items"} and isinstance(value["items"], dict):
            return {key: decoded(one, name) for key, one in value["items"].items()}
        try:
            return Numbers.model_validate(value).decoded(name)
        except ValidationError as error:
            raise ValueError(f"{name} of this Attribution is not what it should be: {first_error(error)}.") from error
    return tuple(decoded(one, name) for one in value) if isinstance(value, list) else value
