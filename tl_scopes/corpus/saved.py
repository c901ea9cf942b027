"""A corpus that was kept: its answers, read back part by part."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tl_scopes import log
from tl_scopes.corpus.job import Found
from tl_scopes.corpus.parts import FORMAT, MANIFEST, entries_of, path_of, require_whole
from tl_scopes.corpus.table import answers_of
from tl_scopes.models import Provenance, counted

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa


def read_corpus(out: str | Path) -> "Corpus":
    """The answers that `attribute_corpus` has kept in a folder, also while it goes on.

    The folder is Parquet, so that it can be read without this function too: `pandas.read_parquet("scores")`,
    `polars.read_parquet("scores/*.parquet")`, `datasets.load_dataset("parquet", data_files="scores/*.parquet")`.

    Args:
        out: the folder.

    Returns:
        A `Corpus`, whose iteration gives the answers in the order of the prompts, None where there is no answer:
        Attributions, maps, or paths, as `attribute_corpus` was asked.

    Raises:
        ValueError: for a folder that `attribute_corpus` has not written. While it is read, for a part that is missing,
            cut off or changed.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> prompts = ["The keys near the door", "The key near the doors"]
        >>> corpus = tls.attribute_corpus(prompts, folder, tls.SemanticScope())
        >>> [answer.target.text for answer in tls.read_corpus(folder)]
        [' are', ' is']
    """
    folder = Path(out)
    entries = tuple(entries_of(folder))
    made = Provenance(**log.first_line(folder / MANIFEST, FORMAT)["provenance"])
    made.warn_of_other_versions(f"the corpus in {str(out)!r}")
    return Corpus(folder, entries, made)


@dataclass(frozen=True, eq=False, repr=False)
class Corpus:
    """The answers to many prompts, in a folder.

    Attributes:
        path: the folder.
        entries: what its log says of each part.
        provenance: what the answers were made with.
    """

    path: Path
    entries: tuple[log.Entry, ...]
    provenance: Provenance

    def __repr__(self) -> str:
        errors = sum(entry["errors"] for entry in self.entries)
        prompts = counted(len(self), "prompt")
        return f"Corpus({str(self.path)!r}: {prompts}, {errors} without an answer, {self.provenance.model})"

    def __len__(self) -> int:
        return sum(entry["rows"] for entry in self.entries)

    def __iter__(self) -> Iterator[Found | None]:
        return (answer for _, answer in self.items())

    def __getitem__(self, id: int | str) -> Found | None:
        """The answer to the prompt of this id.

        Raises:
            KeyError: for an id that is not there.
        """
        for entry in self.entries:
            table = self._table(entry)
            ids = table["id"].to_pylist()
            if id in ids:
                ((_, answer),) = answers_of(table.slice(ids.index(id), ids.count(id)))
                return answer
        first = next(iter(self.items()), (id,))[0]
        told = "" if type(first) is type(id) else f": ids there are {type(first).__name__}s, such as {first!r}"
        raise KeyError(f"there is no prompt with the id {id!r} in {str(self.path)!r}{told}.")

    def items(self) -> Iterator[tuple[int | str, Found | None]]:
        """Each id with its answer, in the order of the prompts."""
        for entry in self.entries:
            yield from answers_of(self._table(entry))

    @property
    def errors(self) -> dict[int | str, str]:
        """Why prompts have no answer, by their ids."""
        found: dict[int | str, str] = {}
        for entry in self.entries:
            if entry["errors"]:
                table = self._table(entry)
                pairs = zip(table["id"].to_pylist(), table["error"].to_pylist(), strict=True)
                found |= {id: error for id, error in pairs if error is not None}
        return found

    def to_dataframe(self) -> "pd.DataFrame":
        """The whole folder as a table: one row for each prompt, or for each of its predictions where every one was
        asked about."""
        import pandas as pd
        import pyarrow as pa

        tables = [self._table(entry) for entry in self.entries]
        return pa.concat_tables(tables).to_pandas() if tables else pd.DataFrame()

    def _table(self, entry: log.Entry) -> "pa.Table":
        import pyarrow as pa
        import pyarrow.parquet as pq

        return pq.read_table(pa.BufferReader(require_whole(path_of(self.path, entry["part"]), entry)))
