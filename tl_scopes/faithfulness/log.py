"""The results of an evaluation on disk: JSON lines, one prompt each, from which a later run goes on.

The first line says what the results depend on, so that results of other settings are never mixed in.
"""

import json
import os
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from filelock import FileLock, Timeout
from torch import Tensor

from tl_scopes import models
from tl_scopes.faithfulness.fingerprint import identity
from tl_scopes.faithfulness.perturbation import Perturbation
from tl_scopes.models import Model
from tl_scopes.scopes.scope import Scope

if TYPE_CHECKING:
    import pandas as pd

Record: TypeAlias = dict[str, Any]
"""What was measured at one prompt, under the names of `FIELDS`."""

FIELDS = ("prompt", "key", "tokens", "results", "checksum")
"""The prompt's index, a checksum of its tokens and of what was asked, how many tokens it has; for each scope and
replacement the values; and a checksum of all this."""

COLUMNS = ("prompt", "tokens", "target", "scope", "replacement", "measure", "quantity", "fraction", "value")
_FORMAT, _VERSION = "tl_scopes.evaluate", 3


def settings(
    model: Model, scopes: Mapping[str, Scope], perturbation: Perturbation, prompts: Mapping[int, Tensor]
) -> dict[str, Any]:
    """What results depend on beside the prompt itself, as numbers and texts: model, weights, scopes, perturbation.

    Cost: a pass over the weights, on the CPU.

    Raises:
        ValueError: for a model with hooks of the user's.
        TypeError: for a scope with an option whose contents cannot be read.
    """
    if models.user_hooks(model) or models.has_backward_hooks(model):
        raise ValueError(
            "the model has hooks of yours, and in a file results under hooks cannot be told from those without: leave "
            "`path` out, or evaluate outside of model.hooks(...)."
        )
    found = {
        "tl_scopes": version("tl-scopes"),
        "model": models.model_name(model),
        "weights": models.fingerprint(model),
        "dtype": str(models.autocast_of(model) or next(model.parameters()).dtype).removeprefix("torch."),
        "scopes": {name: identity(scope, name) for name, scope in scopes.items()},
    } | asdict(perturbation)
    if "resample" in perturbation.replacements:
        found["prompts to resample from"] = _checksum([[i, ids.tolist()] for i, ids in prompts.items()])
    return found


@dataclass(frozen=True)
class Log:
    """The results so far, and the file that keeps them, if there is one."""

    path: Path | None
    records: dict[int, Record]
    """By the index of the prompt."""
    header: str = ""
    """The first line of the file, which is written with the first record."""

    @classmethod
    @contextmanager
    def open(cls, path: str | Path | None, settings: Mapping[str, Any]) -> Iterator["Log"]:
        """Read what is there, and keep others from the file until the end of the block.

        A line that cannot be used is left out with a warning. Nothing is written but the end of a line that an
        interrupted run has left.

        Raises:
            ValueError: for a file that holds something else, or results of other settings; for something that is not
                an ordinary file, a folder or a device say; for a file in a folder that does not exist.
            RuntimeError: while another evaluation has the file.
            OSError: where the file cannot be locked.
        """
        if path is None:
            yield cls(None, {})
            return
        path = Path(path)
        if not path.parent.is_dir():
            raise ValueError(f"there is no folder {str(path.parent)!r} to put {path.name!r} into: make it first.")
        if path.is_dir():
            raise ValueError(f"{str(path)!r} is a folder: give the path of a file in it.")
        if path.exists() and not path.is_file():
            raise ValueError(
                f"{str(path)!r} is a device or a pipe, from which results cannot be read again: give the path of an "
                "ordinary file."
            )
        header = {"format": _FORMAT, "version": _VERSION, "settings": json.loads(json.dumps(settings))}
        with _locked(path):
            yield cls(path, _read(path, header), json.dumps(header))

    def has(self, index: int, key: int) -> bool:
        """Whether this prompt was evaluated.

        Raises:
            ValueError: when the file has results of another prompt, or another target, under this index.
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
            line = json.dumps(record | {"checksum": _checksum(record)})
            with self.path.open("a", encoding="utf-8") as file:
                file.write(("" if file.tell() else f"{self.header}\n") + f"{line}\n")

    def to_dataframe(self, prompts: Sequence[int]) -> "pd.DataFrame":
        """One row per number, for those of the prompts that have results."""
        import pandas as pd

        rows = [
            (i, record["tokens"], result["target"], result["scope"], result["replacement"], *value)
            for i, record in ((i, self.records[i]) for i in prompts if i in self.records)
            for result in record["results"]
            for value in result["values"]
        ]
        return pd.DataFrame(rows, columns=list(COLUMNS)).astype({"fraction": float, "value": float})


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of a results file: an empty file beside it, which stays there."""
    lock = FileLock(f"{path.resolve()}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise RuntimeError(
            f"another evaluation is writing to {str(path)!r}, and two of them would do everything twice: wait for it, "
            "or give another path."
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


def _read(path: Path, header: Mapping[str, Any]) -> dict[int, Record]:
    """The records of a file, with the end of an interrupted run mended.

    Raises:
        ValueError: for a file that holds something else, or results of other settings.
    """
    data = path.read_bytes() if path.exists() else b""
    first_line = f"{json.dumps(header)}\n".encode()
    if not data.strip() or (first_line.startswith(data) and data != first_line):  # nothing, or half of a first line
        if data:
            os.truncate(path, 0)
        return {}
    lines = [(number, line) for number, line in enumerate(data.split(b"\n"), 1) if line.strip()]
    _require_same(_parsed(lines[0][1]), header, repr(str(path)))
    records: dict[int, Record] = {}
    unusable = []
    for number, line in lines[1:]:
        entry = _parsed(line)
        if not isinstance(entry, dict) and line is lines[-1][1] and not data.endswith(b"\n"):  # interrupted here
            data = data[: -len(line)]
            os.truncate(path, len(data))
        elif isinstance(entry, dict) and "format" in entry:
            _require_same(entry, header, f"line {number} of {str(path)!r}")
            unusable.append(f"line {number} is a second first line")
        elif fault := _fault(entry, records):
            unusable.append(f"line {number} {fault}")
        else:
            records[entry["prompt"]] = entry
    if not data.endswith(b"\n"):  # an editor may have taken it away
        with path.open("ab") as file:
            file.write(b"\n")
    if unusable:
        listed = "; ".join(unusable[:5]) + (f"; and {len(unusable) - 5} more" if len(unusable) > 5 else "")
        warnings.warn(
            f"{str(path)!r} has lines that are left out: {listed}. Prompts without another line are evaluated again.",
            stacklevel=5,
        )
    return records


def _parsed(line: bytes) -> Any:
    """What a line holds; None where it is not JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _require_same(first: Any, header: Mapping[str, Any], where: str) -> None:
    if not isinstance(first, dict) or first.get("format") != _FORMAT:
        raise ValueError(f"{where} holds no results of an evaluation: give another path.")
    then, now = first.get("settings"), header["settings"]
    if first.get("version") != _VERSION or not isinstance(then, dict):
        raise ValueError(f"{where} holds no results of an evaluation of this version: give another path.")
    different = [name for name in sorted({*then, *now}) if then.get(name) != now.get(name)]
    if different:
        listed = "; ".join(f"{name} was {then.get(name)!r}, is {now.get(name)!r}" for name in different)
        raise ValueError(f"{where} holds results of other settings ({listed}): give another path.")


def _fault(entry: Any, records: Mapping[int, Record]) -> str | None:
    """What is wrong with what a line holds; None for a record that can be used."""
    if not isinstance(entry, dict):
        return "is not a record in JSON"
    missing = [name for name in FIELDS if name not in entry]
    if missing:
        return f"has no {missing[0]!r}"
    if entry["checksum"] != _checksum({name: part for name, part in entry.items() if name != "checksum"}):
        return "is not what was written, some of it was cut off or changed"
    if entry["checksum"] != records.get(entry["prompt"], entry)["checksum"]:
        return f"is a second record of prompt {entry['prompt']}"
    return None


def _checksum(value: Any) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())
