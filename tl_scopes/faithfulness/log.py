"""The results of an evaluation on disk: JSON lines, one prompt each, that a later run goes on from."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import pandas as pd

Record: TypeAlias = dict[str, Any]
"""One prompt: its index, key, number of tokens, and for each scope and replacement what was measured."""

COLUMNS = ("prompt", "tokens", "target", "scope", "replacement", "measure", "quantity", "fraction", "value")
_FORMAT, _VERSION = "tl_scopes.evaluate", 2


@dataclass(frozen=True)
class Log:
    """Results so far, and the file they are kept in, if any."""

    path: Path | None
    records: dict[int, Record]
    header: str = ""
    """What the file begins with: written with the first record."""

    @classmethod
    def open(cls, path: str | Path | None, settings: Mapping[str, Any]) -> "Log":
        """Read what is there; write nothing but an interrupted run's half of a line away.

        Raises:
            ValueError: for a file that holds something else, or results of other settings; for a folder, and one that
                is not there.
        """
        if path is None:
            return cls(None, {})
        path = Path(path)
        if not path.parent.is_dir():
            raise ValueError(f"there is no folder {str(path.parent)!r} to put {path.name!r} into: make it first.")
        if path.is_dir():
            raise ValueError(f"{str(path)!r} is a folder: give the path of a file in it.")
        header = {"format": _FORMAT, "version": _VERSION, "settings": json.loads(json.dumps(settings))}
        line = json.dumps(header) + "\n"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        if line.startswith(text) and text != line:  # nothing, or the beginning of a first line
            if text:
                path.write_text("", encoding="utf-8")
            return cls(path, {}, line)
        whole = text[: text.rfind("\n") + 1]  # an interrupted run may have left half a line
        try:
            first, *lines = (json.loads(line) for line in whole.splitlines())
        except ValueError as error:
            raise ValueError(f"{str(path)!r} holds no results of an evaluation: give another path.") from error
        if not isinstance(first, dict) or first.get("format") != _FORMAT or first.get("version") != _VERSION:
            raise ValueError(f"{str(path)!r} holds no results of an evaluation of this version: give another path.")
        then, now = first["settings"], header["settings"]
        different = [name for name in sorted({*then, *now}) if then.get(name) != now.get(name)]
        if different:
            listed = "; ".join(f"{name} was {then.get(name)!r}, is {now.get(name)!r}" for name in different)
            raise ValueError(f"{str(path)!r} holds results of other settings ({listed}): give another path.")
        if len(whole) < len(text):
            path.write_text(whole, encoding="utf-8")
        return cls(path, {record["prompt"]: record for record in lines}, line)

    def has(self, index: int, key: int) -> bool:
        """Whether this prompt was evaluated.

        Raises:
            ValueError: when it was another prompt, or another target.
        """
        if index not in self.records:
            return False
        if self.records[index]["key"] != key:
            raise ValueError(
                f"prompt {index}, or its target, is not the one whose results are in {str(self.path)!r}: give another "
                "path."
            )
        return True

    def append(self, record: Record) -> None:
        """Keep a prompt's results, also on disk."""
        self.records[record["prompt"]] = record
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(("" if file.tell() else self.header) + json.dumps(record) + "\n")

    def to_dataframe(self, prompts: int) -> "pd.DataFrame":
        """One row per number, of those of the first so many prompts that have results."""
        import pandas as pd

        rows = [
            (i, record["tokens"], result["target"], result["scope"], result["replacement"], *value)
            for i, record in ((i, self.records[i]) for i in range(prompts) if i in self.records)
            for result in record["results"]
            for value in result["values"]
        ]
        return pd.DataFrame(rows, columns=list(COLUMNS)).astype({"fraction": float, "value": float})
