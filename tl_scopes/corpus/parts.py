"""The folder of a corpus: parts in Parquet, and the log that says which of them are whole."""

import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl_scopes import log
from tl_scopes.corpus.source import Row

if TYPE_CHECKING:
    import pyarrow as pa

MANIFEST = "_manifest.jsonl"
"""The log. Readers of Parquet leave out names that begin with an underscore or a dot."""

_NAME = r"part-\d{6,}\.parquet"

FORMAT = log.LogFormat(
    "tl_scopes.attribute_corpus",
    1,
    "answers to a corpus",
    "attribute_corpus",
    "give another folder",
    ("part", "rows", "errors", "inputs", "bytes", "crc32"),
)
"""An entry has the number of a part, how many prompts and errors it holds, a checksum of the prompts and of what was
asked, and size and checksum of the file."""


@dataclass(frozen=True)
class Parts:
    """The parts of a corpus that are being written.

    A part is written under a temporary name, brought to the disk, renamed, and then entered in the log. Whenever a
    process is killed, a part either stands in the log and is whole, or is computed again.
    """

    folder: Path
    log: log.Log
    entries: dict[int, log.Entry]
    """By the number of the part."""

    @classmethod
    @contextmanager
    def open(cls, folder: Path, settings: Mapping[str, Any], about: Mapping[str, Any]) -> Iterator["Parts"]:
        """Take up what is in the folder, and keep others from it until the end of the block.

        Raises:
            ValueError: for a folder that holds something else, the answers of another job, or a damaged log.
            RuntimeError: while another job has the folder.
            OSError: where the folder cannot be written to.
        """
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{str(folder)!r} is a file: give the path of a folder for the answers.")
        folder.mkdir(parents=True, exist_ok=True)
        manifest = folder / MANIFEST
        strange = [path.name for path in sorted(folder.iterdir()) if not path.name.startswith(MANIFEST)]
        if strange and not manifest.exists():
            raise ValueError(
                f"the folder {str(folder)!r} holds {', '.join(map(repr, strange[:3]))} and no {MANIFEST}, so it is not "
                "one of attribute_corpus: give an empty folder, or a new one."
            )
        with log.Log.open(manifest, FORMAT, settings, about) as kept:
            if kept.faults:
                number, why = kept.faults[0]
                raise ValueError(
                    f"line {number} of {str(manifest)!r} {why}: delete this line, and its part is computed again."
                )
            kept.begin()
            others = [path.name for path in folder.glob("*.parquet") if not re.fullmatch(_NAME, path.name)]
            if others:
                raise ValueError(
                    f"the folder {str(folder)!r} also holds {min(others)!r}, which readers of the folder would take "
                    "for a part of it: move it elsewhere."
                )
            yield cls(folder, kept, {entry["part"]: entry for _, entry in kept.entries})

    def path(self, number: int) -> Path:
        """Where a part is."""
        return path_of(self.folder, number)

    def has(self, number: int, rows: Sequence[Row]) -> bool:
        """Whether a part is there with the answers to these prompts; one that has too few is computed again.

        Raises:
            ValueError: for a part with answers to other prompts, and for a file that is not what was written.
        """
        entry = self.entries.get(number)
        if entry is None:
            return False
        if entry["rows"] > len(rows) or entry["inputs"] != _inputs(rows[: entry["rows"]]):
            first = rows[0].id if rows else None
            raise ValueError(
                f"the {len(rows)} prompts from the id {first!r} on, or their answers and targets, are not the "
                f"{entry['rows']} whose scores are in {str(self.path(number))!r}: give another folder."
            )
        if not self.path(number).exists():
            return False
        require_whole(self.path(number), entry)
        return entry["rows"] == len(rows)

    def write(self, number: int, rows: Sequence[Row], table: "pa.Table", errors: int) -> None:
        """Keep a part.

        Raises:
            OSError: where it cannot be written; what was kept before stays.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        data = sink.getvalue().to_pybytes()
        path = self.path(number)
        temporary = path.with_name(f".{path.name}.tmp")
        entry = {"part": number, "rows": len(rows), "errors": errors, "inputs": _inputs(rows)}
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            log.to_disk(self.folder)
            self.entries[number] = entry = entry | {"bytes": len(data), "crc32": zlib.crc32(data)}
            self.log.append(entry)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise OSError(
                error.errno,
                f"{path.name} could not be written ({error.strerror or error}); the parts before it are kept: make "
                "room, and run the same again to go on",
                str(path),
            ) from error


def path_of(folder: Path, number: int) -> Path:
    """Where a part is."""
    return folder / f"part-{number:06}.parquet"


def require_whole(path: Path, entry: log.Entry) -> bytes:
    """The bytes of a part.

    Raises:
        ValueError: for a file that is missing, or is not what was written.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"{str(path)!r} is missing: run attribute_corpus again, which computes it again.") from error
    if len(data) != entry["bytes"] or zlib.crc32(data) != entry["crc32"]:
        raise ValueError(
            f"{str(path)!r} is not what was written, it was cut off or changed ({len(data)} bytes of "
            f"{entry['bytes']}): delete it and run attribute_corpus again, which computes it again; or keep what you "
            "have changed in a copy elsewhere."
        )
    return data


def entries_of(folder: Path) -> list[log.Entry]:
    """The entries of all parts, by their number.

    Raises:
        ValueError: for a folder that `attribute_corpus` has not written.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise ValueError(
            f"there is no {MANIFEST} in {str(folder)!r}: give the folder that attribute_corpus has written into."
        )
    found = {entry["part"]: entry for _, entry in log.entries(manifest, FORMAT)}
    return [found[number] for number in sorted(found)]


def _inputs(rows: Sequence[Row]) -> int:
    return log.checksum([row.checksum for row in rows])
