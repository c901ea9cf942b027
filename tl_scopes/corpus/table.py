"""An answer as a row of a Parquet file, and back."""

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tl_scopes.corpus.source import Row, encodable
from tl_scopes.failures import reason
from tl_scopes.models import Provenance
from tl_scopes.results.attribution import Attribution

if TYPE_CHECKING:
    import pyarrow as pa

_COLUMNS_OF_THEIR_OWN = ("scores", "tokens", "str_tokens", "provenance")
"""Fields of an Attribution that are not in the column `record`, since they are long or the same in all rows."""


def schema(ids: type, double: bool) -> "pa.Schema":
    """The columns of a part.

    Args:
        ids: the type of the ids, int or str.
        double: whether scores are in float64, as those of a float64 model are.
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
    return pa.schema(list(fields.items()))


def row_of(row: Row, found: Attribution | Exception, scope: str, provenance: Provenance) -> dict[str, Any]:
    """The row of an answer, or of the error where there is none.

    Args:
        row: the prompt.
        found: its answer.
        scope: the question, as it is written.
        provenance: what all answers of the job are made with.
    """
    kept: dict[str, Any] = {"id": row.id, "prompt": row.written, "scope": scope, "provenance": vars(provenance)}
    if isinstance(found, Exception):
        return kept | {"error": encodable(reason(found))}
    error = found.details.get("standard_error")
    record = json.loads(found.to_json())
    return kept | {
        "scores": found.scores.tolist(),
        "token_ids": found.tokens.tolist(),
        "tokens": [encodable(token) for token in found.str_tokens],
        "target": None if found.target is None else encodable(found.target.text),
        "value": found.value,
        "quantity": None if found.quantity is None else encodable(found.quantity),
        "unit": found.unit,
        "standard_error": error.tolist() if isinstance(error, Tensor) and error.ndim == 1 else None,
        "notes": [encodable(note) for note in found.notes],
        "record": json.dumps({name: part for name, part in record.items() if name not in _COLUMNS_OF_THEIR_OWN}),
    }


def attribution_of(row: dict[str, Any], double: bool) -> Attribution | None:
    """The answer in a row; None where it has none."""
    if row["record"] is None:
        return None
    scores = {"dtype": "float64" if double else "float32", "values": row["scores"]}
    whole = json.loads(row["record"]) | {"scores": scores, "tokens": row["token_ids"], "str_tokens": row["tokens"]}
    return replace(Attribution.from_json(json.dumps(whole)), provenance=Provenance(**row["provenance"]))
