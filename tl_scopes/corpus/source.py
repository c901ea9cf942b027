"""Where the prompts of a corpus come from: files, tables and iterables, read row by row."""

import csv
import json
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from tl_scopes import models
from tl_scopes.log import checksum

ASKED = ("answer", "target", "foil")
"""The columns that say what is asked about a prompt, each as in `attribute_many`."""
_PROMPTS = ("prompt", "text", "messages", "input_ids")
"""The columns that hold prompts, the first that is there."""
_ENDINGS = (".jsonl", ".ndjson", ".csv", ".parquet")


class Row(NamedTuple):
    """One prompt, and what is asked about it."""

    id: int | str
    prompt: Any
    asked: Mapping[str, Any]
    """The answer, target and foil, as far as it has them."""
    wrong: str = ""
    """Why it is not a prompt, where it is not: that is its error then."""

    @property
    def written(self) -> str:
        """The prompt as text: itself, or JSON for a chat and token ids."""
        plain = self.prompt if isinstance(self.prompt, str) else json.dumps(_plain(self.prompt), ensure_ascii=False)
        return encodable(plain)

    @property
    def checksum(self) -> int:
        """What tells this row from others."""
        return checksum([self.id, self.written, _plain(self.asked)])


@dataclass(frozen=True, eq=False)
class Source:
    """The prompts of a call.

    Attributes:
        prompts: a path, or an iterable.
        columns: what the columns "id", "prompt", "answer", "target" and "foil" are called there.
    """

    prompts: Any
    columns: Mapping[str, str | None]

    @classmethod
    def of(cls, prompts: Any, columns: Mapping[str, str | None]) -> "Source":
        """Refuse what cannot be, before any work.

        Raises:
            ValueError: for a file that is not there, of another kind, or without a row; for columns of other names.
            TypeError: for something that is not prompts, a table whose rows cannot be taken among others.
        """
        unknown = set(columns) - {"id", "prompt", *ASKED}
        if unknown:
            raise ValueError(
                f"columns names the columns for id, prompt, {', '.join(ASKED)}, and not for {min(unknown)!r}: write "
                "columns={'prompt': 'question'} for prompts in a column called question."
            )
        if isinstance(prompts, str | Path):
            path = Path(prompts)
            if not path.exists():
                raise ValueError(
                    f"there is no file {str(prompts)!r}: prompts are the path of a file, or an iterable of prompts, a "
                    "list say."
                )
            if path.is_file() and path.suffix.lower() not in _ENDINGS:
                raise ValueError(
                    f"the prompts in {str(prompts)!r} cannot be read: give JSON lines (.jsonl), CSV (.csv), Parquet "
                    "(.parquet), or a folder of Parquet files."
                )
            return cls(path, columns)
        if type(prompts).__module__.startswith("datasets."):  # which has columns, and gives its rows
            return cls(prompts, columns)
        if hasattr(prompts, "columns"):
            prompts = _rows_of_table(prompts)
        return cls(models.each_prompt(prompts), columns)

    @property
    def is_rereadable(self) -> bool:
        """Whether the rows can be gone through twice."""
        return isinstance(self.prompts, Path) or iter(self.prompts) is not self.prompts

    def __iter__(self) -> Iterator[Row]:
        """The rows in their order.

        Raises:
            ValueError: for a line that cannot be read, a column that the first row lacks, ids that are missing, that
                stand there twice or are not all of one kind.
        """
        seen: set[int | str] = set()
        first: _Columns | None = None
        for number, (where, value) in enumerate(self._values()):
            first = first or _Columns.of(value, self.columns, where)
            row = first.row(number, value, where)
            if row.id in seen:
                raise ValueError(f"{where} has the id {row.id!r}, which an earlier one has: give each its own.")
            if first.id is not None:  # numbers of rows are different anyway
                seen.add(row.id)
            yield row

    def _values(self) -> Iterator[tuple[str, Any]]:
        """Each value with where it stands."""
        if not isinstance(self.prompts, Path):
            yield from ((f"prompt {number}", value) for number, value in enumerate(self.prompts))
            return
        read = {".csv": _csv, ".jsonl": _jsonl, ".ndjson": _jsonl}.get(self.prompts.suffix.lower(), _parquet)
        yield from _parquet(self.prompts) if self.prompts.is_dir() else read(self.prompts)


class _Columns(NamedTuple):
    """What the columns are called, as the first row has them."""

    id: str | None
    """None where rows are counted."""
    prompt: str | None
    """None where each value is a prompt."""
    asked: Mapping[str, str]
    id_type: type | None = None

    @classmethod
    def of(cls, value: Any, columns: Mapping[str, str | None], where: str) -> "_Columns":
        if not isinstance(value, Mapping):
            if any(columns.values()):
                raise ValueError(
                    f"{where} is a {type(value).__name__} without columns, so that columns={dict(columns)!r} names "
                    "nothing: leave it out, or give dicts."
                )
            return cls(None, None, {})
        for name in columns.values():
            if name is not None and name not in value:
                raise ValueError(f"{where} has no column {name!r}: it has {_listed(value)}.")
        prompt = columns.get("prompt") or next((name for name in _PROMPTS if name in value), None)
        if prompt is None:
            example = next((str(name) for name in value if name != "id"), "question")
            raise ValueError(
                f"{where} has no column 'prompt': it has {_listed(value)}. Say which one holds the prompts, "
                f"columns={{'prompt': {example!r}}} say."
            )
        id = columns.get("id", "id" if "id" in value else None)
        named = {name: columns.get(name, name) for name in ASKED}
        found = cls(id, prompt, {name: column for name, column in named.items() if column is not None})
        return found._replace(id_type=type(found.id_of(0, value, where)))

    def row(self, number: int, value: Any, where: str) -> Row:
        """The row of a value."""
        if isinstance(value, Mapping) != (self.prompt is not None):
            wrong = f"it is a {type(value).__name__}, and the first prompt is not of that kind: give all as they are, "
            return Row(self.id_of(number, {}, where), value, {}, f"{wrong}or all as dicts.")
        if self.prompt is None:
            return Row(number, value, {})
        id = self.id_of(number, value, where)
        prompt = cell(value.get(self.prompt))
        if prompt is None:
            there = f"null in its column {self.prompt!r}" if self.prompt in value else f"no column {self.prompt!r}"
            value = {name: cell(one) for name, one in value.items()}
            return Row(id, value, {}, f"it has {there}, where the first has its prompt: it has {_listed(value)}.")
        if self.prompt == "input_ids":
            prompt = {name: value[name] for name in ("input_ids", "attention_mask") if name in value}
        asked = {name: cell(value.get(column)) for name, column in self.asked.items()}
        # A field of CSV that is empty is None.
        return Row(id, prompt, {name: one for name, one in asked.items() if one is not None and one != ""})

    def id_of(self, number: int, value: Mapping[str, Any], where: str) -> int | str:
        """The id of a row: an integer or a text."""
        if self.id is None:
            return number
        id = cell(value.get(self.id))
        if id is None or id == "":
            raise ValueError(f"{where} has no id in its column {self.id!r}: give every prompt one, or none.")
        if not isinstance(id, str):
            try:
                id = operator.index(id) if not isinstance(id, bool) else operator.index(None)  # type: ignore[arg-type]
            except TypeError:
                raise ValueError(f"{where} has the id {id!r}: ids are texts or integers.") from None
        if self.id_type not in (None, type(id)):
            raise ValueError(
                f"{where} has the id {id!r}, and the first id is not of that kind: give all ids as texts, or all as "
                "integers."
            )
        return encodable(id) if isinstance(id, str) else id


def cell(value: Any) -> Any:
    """What a table holds as Python's own: None for NaN, NaT and NA, which stand for gaps in pandas, and an integer for
    the 5.0 that an integer becomes there beside a gap; a list for an array."""
    if type(value).__name__ in ("NAType", "NaTType"):
        return None
    if isinstance(value, np.ndarray):
        return value.tolist()
    if not isinstance(value, float | np.floating):
        return value
    if np.isnan(value):
        return None
    return int(value) if float(value).is_integer() else value


def encodable(text: str) -> str:
    """The text, with halves of characters, which no file can hold, written out."""
    return text.encode("utf-8", "backslashreplace").decode()


def _rows_of_table(table: Any) -> Any:
    """The rows of a table of polars or pandas, as dicts.

    Raises:
        TypeError: for another table.
        ValueError: for a column that is there twice.
    """
    names = list(table.columns)
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"the table has {names.count(name)} columns {name!r}: give each another name.")
    if hasattr(table, "to_dicts"):
        return table.to_dicts()
    if hasattr(table, "to_dict"):
        return table.to_dict("records")
    raise TypeError(
        f"prompts must be an iterable of prompts, got a {type(table).__name__}: give its rows, each as a dict."
    )


def _listed(value: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, list(value)[:8])) or "none"


def _plain(value: Any) -> Any:
    """A value as JSON can hold it."""
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, set | frozenset):
        return sorted(map(_plain, value), key=repr)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain(one) for one in value]
    return value if value is None or isinstance(value, str | int | float) else repr(value)


# -- files ------------------------------------------------------------------------------------------------------------


def _jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    for number, text in _lines(path):
        if text.strip():
            where = f"line {number} of {str(path)!r}"
            try:
                value = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where} is not JSON: {error}. Mend the line, or leave it out.") from error
            yield where, value


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    reader = csv.reader((text for _, text in _lines(path)), strict=True)
    try:
        names = next(reader, None)
        if names is None:
            raise ValueError(f"{str(path)!r} is empty: its first line must name the columns.")
        for fields in reader:
            where = f"line {reader.line_num} of {str(path)!r}"
            if len(fields) != len(names) and fields:
                raise ValueError(
                    f"{where} has {len(fields)} fields, and the first line names {len(names)} columns: put a text with "
                    'commas into "quotes".'
                )
            if fields:
                yield where, dict(zip(names, fields, strict=True))
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num} of {str(path)!r} is not CSV: {error}.") from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"line {number} of {str(path)!r} is not UTF-8: {error}.") from error


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.dataset as ds

    number = 0
    try:
        for batch in ds.dataset(path, format="parquet").to_batches(batch_size=1024):
            for row in batch.to_pylist():
                yield f"row {number} of {str(path)!r}", row
                number += 1
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{str(path)!r} cannot be read as Parquet after {number} rows: {error}") from error
