"""What was found of a prompt as rows of a Parquet file, and back."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor

from tl_scopes.answers import AnswerMap
from tl_scopes.circuits.paths import Paths
from tl_scopes.corpus.job import Found
from tl_scopes.corpus.source import Row, encodable
from tl_scopes.failures import reason
from tl_scopes.models import Provenance
from tl_scopes.results.attribution import Attribution
from tl_scopes.results.attribution_map import AttributionMap

if TYPE_CHECKING:
    import pyarrow as pa

Kind: TypeAlias = Literal["prediction", "map", "paths"]
"""What a folder holds: an answer for each prompt, one for each of its predictions, or the paths of its score."""

_COLUMNS_OF_THEIR_OWN = ("scores", "tokens", "str_tokens", "provenance")
"""Fields of an answer that are not in the column `record`, since they are long or the same in all rows."""


def schema(ids: type, double: bool, kind: Kind = "prediction") -> "pa.Schema":
    """The columns of a part.

    Args:
        ids: the type of the ids, int or str.
        double: whether scores are in float64, as those of a float64 model are.
        kind: what is kept of each prompt.
    """
    import pyarrow as pa

    text, number = pa.string(), pa.float64() if double else pa.float32()
    fields = {
        "id": pa.int64() if ids is int else text,
        "prompt": text,
        "scores": pa.list_(number),
        "token_ids": pa.list_(pa.int64()),
        "tokens": pa.list_(text),
        "target": text,
        "value": pa.float64(),
        "quantity": text,
        "scope": text,
        "unit": text,
        "standard_error": pa.list_(number),
        "notes": pa.list_(text),
        "error": text,
        "provenance": pa.struct([(name, text) for name in Provenance.__dataclass_fields__]),
        "record": text,
    }
    if kind == "map":
        fields |= {"position": pa.int64(), "answer_token": text}
    if kind == "paths":
        fields |= {"positions": pa.list_(pa.int64()), "parts": pa.list_(text), "values": pa.list_(pa.list_(number))}
    return pa.schema(list(fields.items()))


def rows_of(row: Row, found: Found | Exception, scope: str, provenance: Provenance) -> list[dict[str, Any]]:
    """The rows of what was found of a prompt, or the row of the error where nothing was.

    Args:
        row: the prompt.
        found: its answer.
        scope: the question, as it is written.
        provenance: what all answers of the job are made with.
    """
    kept: dict[str, Any] = {"id": row.id, "prompt": row.written, "scope": scope, "provenance": vars(provenance)}
    match found:
        case Exception():
            return [kept | {"error": encodable(reason(found))}]
        case Paths():
            return [kept | _columns(found) | _of_paths(found)]
        case Attribution():
            return [kept | _columns(found) | _of_scores(found)]
    texts = found.answer_texts if isinstance(found, AnswerMap) else [None] * len(found)
    return [
        kept
        | _columns(one)
        | _of_scores(one)
        | {"position": one.position, "answer_token": None if text is None else encodable(text)}
        for one, text in zip(found, texts, strict=True)
    ]


def attributions(found: Found | Exception) -> list[Attribution]:
    """The Attributions that it consists of."""
    if isinstance(found, Attribution):
        return [found]
    return list(found) if isinstance(found, AttributionMap | AnswerMap) else []


def _columns(found: Attribution | Paths) -> dict[str, Any]:
    """The columns that all answers have."""
    return {
        "scores": found.scores.tolist(),
        "token_ids": found.tokens.tolist(),
        "tokens": [encodable(token) for token in found.str_tokens],
        "target": None if found.target is None else encodable(found.target.text),
        "scope": found.scope,
        "unit": found.unit,
        "notes": [encodable(note) for note in found.notes],
    }


def _of_scores(found: Attribution) -> dict[str, Any]:
    error = found.details.get("standard_error")
    return {
        "value": found.value,
        "quantity": None if found.quantity is None else encodable(found.quantity),
        "standard_error": error.tolist() if isinstance(error, Tensor) and error.ndim == 1 else None,
        "record": _record(found),
    }


def _of_paths(found: Paths) -> dict[str, Any]:
    """What each part carries of each score. At which positions it does is left out: it takes as many numbers again for
    each token."""
    kept = replace(found, where=None, stream=None, stream_layers=())
    return {
        "positions": list(found.positions),
        "parts": list(found.names),
        "values": found.values.flatten(0, -2).tolist(),
        "record": _record(kept, values=list(found.values.shape)),
    }


def _record(found: Attribution | Paths, **instead: Any) -> str:
    record = json.loads(found.to_json()) | instead
    return json.dumps({name: part for name, part in record.items() if name not in _COLUMNS_OF_THEIR_OWN})


# -- and back ---------------------------------------------------------------------------------------------------------


def answers_of(table: "pa.Table") -> Iterator[tuple[int | str, Found | None]]:
    """Each id with what was found of its prompt, or None where nothing was."""
    double = str(table.schema.field("scores").type.value_type) == "double"
    rows: list[dict[str, Any]] = table.to_pylist()
    start = 0
    while start < len(rows):
        stop = start + 1
        while stop < len(rows) and rows[stop]["id"] == rows[start]["id"]:
            stop += 1
        yield rows[start]["id"], _answer(rows[start:stop], double)
        start = stop


def _answer(rows: Sequence[dict[str, Any]], double: bool) -> Found | None:
    """What was found of a prompt."""
    first = rows[0]
    if first["record"] is None:
        return None
    answers: list[Any] = [_one(row, double) for row in rows]
    if "position" not in first:
        return answers[0]
    texts = [row["answer_token"] for row in rows]
    return AttributionMap(tuple(answers)) if texts[0] is None else AnswerMap.of_tokens(answers, texts)


def _one(row: dict[str, Any], double: bool) -> Attribution | Paths:
    """What a row holds."""
    record = json.loads(row["record"]) | {"tokens": row["token_ids"], "str_tokens": row["tokens"]}
    record["scores"] = _numbers(row["scores"], double)
    kind: type[Attribution | Paths] = Attribution
    if "values" in row:
        kind, values = Paths, torch.tensor(row["values"], dtype=torch.float64).reshape(record["values"])
        record["values"] = _numbers(values.tolist(), double)
    return replace(kind.from_json(json.dumps(record)), provenance=Provenance(**row["provenance"]))


def _numbers(values: list[Any], double: bool) -> dict[str, Any]:
    """Numbers as they stand in the JSON of an answer."""
    return {"dtype": "float64" if double else "float32", "values": values}
