"""The results of an evaluation on disk: a log with an entry for each prompt, from which a later run goes on."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor

from tl_scopes import log, models
from tl_scopes.faithfulness.perturbation import FRACTIONS, Perturbation
from tl_scopes.models import Model
from tl_scopes.scopes.fingerprint import settings_of
from tl_scopes.scopes.scope import Scope

if TYPE_CHECKING:
    import pandas as pd

Record: TypeAlias = dict[str, Any]
"""What was measured at one prompt, under the names of `LOG.fields`."""

COLUMNS = ("prompt", "tokens", "target", "scope", "replacement", "measure", "quantity", "fraction", "value")
LOG = log.LogFormat(
    "tl_scopes.evaluate",
    3,
    "results of an evaluation",
    "evaluation",
    "give another path",
    ("prompt", "key", "tokens", "results"),
)
"""An entry has the prompt's index, a checksum of its tokens and of what was asked, how many tokens it has, and for each
scope and replacement the values."""


def settings(
    model: Model, scopes: Mapping[str, Scope], perturbation: Perturbation, prompts: Mapping[int, Tensor]
) -> dict[str, Any]:
    """What results depend on beside the prompt itself, as numbers and texts: model, weights, scopes, perturbation.

    Cost: a pass over the weights, on the CPU.

    Raises:
        ValueError: for a model with hooks of the user's.
        TypeError: for a scope with an option whose contents cannot be read.
    """
    # Fractions that count by themselves are told as the numbers that they are for a longer prompt.
    known = asdict(perturbation) | {"fractions": perturbation.fractions or FRACTIONS}
    found = settings_of(model, scopes, "leave `path` out, or evaluate outside of model.hooks(...)") | known
    if "resample" in perturbation.replacements:
        found["prompts to resample from"] = log.checksum([[i, ids.tolist()] for i, ids in prompts.items()])
    return found


@dataclass(frozen=True)
class Log:
    """The results so far, and the file that keeps them, if there is one."""

    file: log.Log | None
    records: dict[int, Record]
    """By the index of the prompt."""

    @classmethod
    @contextmanager
    def open(cls, path: str | Path | None, settings: Mapping[str, Any]) -> Iterator["Log"]:
        """Read what is there, and keep others from the file until the end of the block.

        A line that cannot be used is left out with a warning.

        Raises: as `log.Log.open` does.
        """
        if path is None:
            yield cls(None, {})
            return
        with log.Log.open(Path(path), LOG, settings) as file:
            yield cls(file, _records(file))

    def has(self, index: int, key: int) -> bool:
        """Whether this prompt was evaluated.

        Raises:
            ValueError: when the file has results of another prompt, or another target, under this index.
        """
        if index not in self.records:
            return False
        if self.records[index]["key"] != key:
            path = None if self.file is None else str(self.file.path)
            raise ValueError(
                f"prompt {index}, or its target, is not the one whose results are in {path!r}: give another path."
            )
        return True

    def append(self, record: Record) -> None:
        """Keep a prompt's results, also on disk."""
        self.records[record["prompt"]] = record
        if self.file is not None:
            self.file.append(record)

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


def _records(file: log.Log) -> dict[int, Record]:
    """The records of a file, the first of each prompt."""
    records: dict[int, Record] = {}
    unusable = list(file.faults)
    for number, entry in file.entries:
        if entry["checksum"] != records.setdefault(entry["prompt"], entry)["checksum"]:
            unusable.append(log.Fault(number, f"is a second record of prompt {entry['prompt']}"))
    if unusable:
        listed = "; ".join(f"line {number} {why}" for number, why in sorted(unusable)[:5])
        listed += f"; and {len(unusable) - 5} more" if len(unusable) > 5 else ""
        models.warn(
            f"{str(file.path)!r} has lines that are left out: {listed}. Prompts without another line are evaluated "
            "again."
        )
    return records
