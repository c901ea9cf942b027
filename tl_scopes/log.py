"""An append-only log of JSON lines, from which an interrupted job goes on.

The first line says what the others depend on, so that results of other settings are never mixed in. Every line ends in
a checksum of what stands before it, and is on the disk when `append` returns.
"""

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from filelock import FileLock, Timeout

Entry: TypeAlias = dict[str, Any]
"""What a line holds."""


class LogFormat(NamedTuple):
    """What a log is for, and how its errors call it."""

    name: str
    version: int
    holds: str
    """What is in it: "results of an evaluation"."""
    job: str
    """What writes it: "evaluation"."""
    remedy: str
    """What to do where it holds something else: "give another path"."""
    fields: tuple[str, ...]
    """What every entry holds."""


class Fault(NamedTuple):
    """A line that cannot be used."""

    line: int
    why: str


@dataclass(frozen=True)
class Log:
    """The lines of a log, and the file that keeps them."""

    path: Path
    header: str
    """The first line of the file, which is written with the first entry."""
    entries: tuple[tuple[int, Entry], ...]
    """What could be read, with the numbers of the lines."""
    faults: tuple[Fault, ...]
    """What could not."""

    @property
    def about(self) -> Entry:
        """The first line, as the first run has written it."""
        with self.path.open("rb") as file:
            return dict(json.loads(file.readline()))

    @classmethod
    @contextmanager
    def open(
        cls, path: Path, kind: LogFormat, settings: Mapping[str, Any], about: Mapping[str, Any] | None = None
    ) -> Iterator["Log"]:
        """Read what is there, and keep others from the file until the end of the block.

        Nothing is written but the end of a line that an interrupted job has left.

        Args:
            path: the file.
            kind: what it is for.
            settings: what all entries depend on; a file with others is refused.
            about: what else the first line says, which may differ from one run to the next.

        Raises:
            ValueError: for a file that holds something else, or entries under other settings; for something that is not
                an ordinary file, a folder or a device say; for a file in a folder that does not exist.
            RuntimeError: while another job has the file.
            OSError: where the file cannot be locked.
        """
        if not path.parent.is_dir():
            raise ValueError(f"there is no folder {str(path.parent)!r} to put {path.name!r} into: make it first.")
        if path.is_dir():
            raise ValueError(f"{str(path)!r} is a folder: give the path of a file in it.")
        if path.exists() and not path.is_file():
            raise ValueError(
                f"{str(path)!r} is a device or a pipe, from which results cannot be read again: give the path of an "
                "ordinary file."
            )
        first = {"format": kind.name, "version": kind.version, "settings": json.loads(json.dumps(settings))}
        header = json.dumps(first | dict(about or {}))
        with _locked(path, kind):
            data = path.read_bytes() if path.exists() else b""
            if data and (not data.strip() or _is_half(data, header)):
                os.truncate(path, 0)
                data = b""
            yield cls(path, header, *_read(path, data, kind, settings=first["settings"]))

    def begin(self) -> None:
        """Write the first line now, if there is none yet.

        Raises:
            OSError: where the file cannot be written.
        """
        if not self.path.exists() or not self.path.stat().st_size:
            self._write("")

    def append(self, entry: Entry) -> None:
        """Keep an entry. It is on the disk when this returns; where that fails, the file is as it was.

        Raises:
            OSError: where the file cannot be written.
        """
        self._write(json.dumps(entry | {"checksum": checksum(entry)}) + "\n")

    def _write(self, line: str) -> None:
        with self.path.open("ab") as file:
            before = file.tell()
            try:
                file.write((b"" if before else f"{self.header}\n".encode()) + line.encode())
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                with suppress(OSError):
                    os.truncate(self.path, before)
                raise
        if not before:
            to_disk(self.path.parent)


def first_line(path: Path, kind: LogFormat) -> Entry:
    """The first line of a log.

    Raises:
        ValueError: for a file that holds something else.
        OSError: for a file that cannot be read.
    """
    with path.open("rb") as file:
        return _first(file.readline(), kind, repr(str(path)))


def entries(path: Path, kind: LogFormat) -> tuple[tuple[int, Entry], ...]:
    """What a log holds, which another job may be writing at the moment.

    Raises:
        ValueError: for a file that holds something else.
        OSError: for a file that cannot be read.
    """
    found, _ = _read(path, path.read_bytes(), kind, mend=False)
    return found


def checksum(value: Any) -> int:
    """A checksum of a value that JSON can hold."""
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk; some systems cannot do that with folders."""
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0)
    if path.is_dir():
        with suppress(OSError):
            _synced(path, flags)
    else:
        _synced(path, flags)


def _synced(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _locked(path: Path, kind: LogFormat) -> Iterator[None]:
    """Hold the lock of a log: an empty file beside it, which stays there. The system frees it when a process dies."""
    lock = FileLock(f"{path.resolve()}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise RuntimeError(
            f"another {kind.job} is writing to {str(path)!r}, and two of them would do everything twice: wait for it, "
            f"or {kind.remedy}."
        ) from None
    except (OSError, NotImplementedError) as error:
        raise OSError(
            f"no results can be kept in {str(path)!r}, since the file {lock.lock_file!r} cannot be locked ({error}): "
            "give a path in a folder that you may write to."
        ) from error
    try:
        yield
    finally:
        lock.release()


def _read(
    path: Path, data: bytes, kind: LogFormat, settings: Mapping[str, Any] | None = None, mend: bool = True
) -> tuple[tuple[tuple[int, Entry], ...], tuple[Fault, ...]]:
    """The usable lines of a file, and the others; with `mend`, the end of an interrupted job is cut off."""
    if not data:
        return (), ()
    lines = [(number, line) for number, line in enumerate(data.split(b"\n"), 1) if line.strip()]
    _require_same(lines[0][1], kind, settings, repr(str(path)))
    found: list[tuple[int, Entry]] = []
    faults = []
    for number, line in lines[1:]:
        entry = _parsed(line)
        if not isinstance(entry, dict) and line is lines[-1][1] and not data.endswith(b"\n"):  # interrupted here
            data = data[: -len(line)]
            if mend:
                os.truncate(path, len(data))
        elif isinstance(entry, dict) and "format" in entry:
            _require_same(line, kind, settings, f"line {number} of {str(path)!r}")
            faults.append(Fault(number, "is a second first line"))
        elif not isinstance(entry, dict):
            faults.append(Fault(number, "is not a record in JSON"))
        elif missing := [name for name in (*kind.fields, "checksum") if name not in entry]:
            faults.append(Fault(number, f"has no {missing[0]!r}"))
        elif entry["checksum"] != checksum({name: part for name, part in entry.items() if name != "checksum"}):
            faults.append(Fault(number, "is not what was written, some of it was cut off or changed"))
        else:
            found.append((number, entry))
    if mend and not data.endswith(b"\n"):  # an editor may have taken it away
        with path.open("ab") as file:
            file.write(b"\n")
    return tuple(found), tuple(faults)


def _is_half(data: bytes, header: str) -> bool:
    """Whether a file holds a part of a first line alone, of this run or of an earlier one."""
    start = header[: header.index('"settings"')].encode()
    begun = data.startswith(start) and _parsed(data) is None and b"\n" not in data
    return begun or header.encode().startswith(data)


def _parsed(line: bytes) -> Any:
    """What a line holds; None where it is not JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _first(line: bytes, kind: LogFormat, where: str) -> Entry:
    first = _parsed(line)
    if not isinstance(first, dict) or first.get("format") != kind.name:
        raise ValueError(f"{where} holds no {kind.holds}: {kind.remedy}.")
    if first.get("version") != kind.version or not isinstance(first.get("settings"), dict):
        raise ValueError(f"{where} holds no {kind.holds} of this version: {kind.remedy}.")
    return first


def _require_same(line: bytes, kind: LogFormat, settings: Mapping[str, Any] | None, where: str) -> None:
    then = _first(line, kind, where)["settings"]
    if settings is None:
        return
    different = [name for name in sorted({*then, *settings}) if then.get(name) != settings.get(name)]
    if different:
        listed = "; ".join(f"{name} was {then.get(name)!r}, is {settings.get(name)!r}" for name in different)
        raise ValueError(f"{where} holds results of other settings ({listed}): {kind.remedy}.")
