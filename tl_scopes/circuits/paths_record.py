"""A `Paths` as JSON: the schema of the text, and the fields it holds."""

import json
from dataclasses import asdict
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from tl_scopes.results.json_record import TargetRecord, _encoded, _first, _Id, _Numbers, _TokenRecord

FORMAT, VERSION = "tl_scopes.Paths", 1
_TENSORS = ("values", "around", "scores", "where", "standard_error", "stream")


class _Record(BaseModel):
    """What the text must hold; anything else is refused."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal["tl_scopes.Paths"]
    version: Literal[1]
    values: _Numbers
    around: _Numbers
    scores: _Numbers
    where: _Numbers | None
    standard_error: _Numbers | None
    stream: _Numbers | None
    stream_layers: list[NonNegativeInt]
    layers: list[NonNegativeInt]
    by: Literal["position", "layer", "head", "qkv", "neuron"]
    mode: Literal["forward", "backward"]
    positions: list[NonNegativeInt]
    tokens: list[_Id]
    str_tokens: list[str]
    position: NonNegativeInt
    predictions: list[tuple[_TokenRecord, Annotated[float, Field(ge=0, le=1)]]]
    target: TargetRecord | None
    versus: TargetRecord | None
    scope: str
    unit: str
    wrt: str
    of: str
    model: str
    dtype: str
    notes: list[str]


def written(fields: dict[str, Any]) -> str:
    """The text for the fields of an answer."""
    record = {"format": FORMAT, "version": VERSION, **fields, "tokens": fields["tokens"].tolist()}
    record |= {name: _encoded(fields[name], name) for name in _TENSORS}
    record |= {name: fields[name] and asdict(fields[name]) for name in ("target", "versus")}
    return json.dumps(record, ensure_ascii=True, allow_nan=False)


def read(text: str) -> dict[str, Any]:
    """The fields that a text holds, with tensors and plain tuples; tokens are (id, text).

    Raises:
        TypeError: for something that is not text.
        ValueError: for text that is not a Paths, or that a later version has written, with the field and its value.
    """
    if not isinstance(text, str):
        raise TypeError(f"a Paths is read from the text that to_json wrote, got {type(text).__name__}.")
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"this text is not a Paths but broken JSON: {error}.") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f'this JSON is not a Paths: its "format" is not "{FORMAT}".')
    if isinstance(record.get("version"), int) and record["version"] > VERSION:
        raise ValueError("this Paths was written by a later version of tl_scopes: upgrade to read it.")
    try:
        checked = _Record.model_validate_json(text)
    except ValidationError as error:
        raise ValueError(f"a field of this Paths is not what it should be: {_first(error)}.") from error
    fields = checked.model_dump(exclude={"format", "version"})
    for name in _TENSORS:
        numbers = getattr(checked, name)
        fields[name] = None if numbers is None else numbers.decoded(name)
    fields["tokens"] = torch.tensor(checked.tokens, dtype=torch.long, device="cpu")
    tuples = ("layers", "stream_layers", "positions", "str_tokens", "predictions", "notes")
    return fields | {name: tuple(fields[name]) for name in tuples}
