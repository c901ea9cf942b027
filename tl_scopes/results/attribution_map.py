"""The answer for a whole prompt: one `Attribution` for every prediction in it."""

import json
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex, overload

from jaxtyping import Float
from torch import Tensor

from tl_scopes.models import as_int, counted
from tl_scopes.results.attribution import Attribution
from tl_scopes.results.json_text import parsed, text_of
from tl_scopes.results.units import Unit
from tl_scopes.views import attribution_map as card
from tl_scopes.views.live import LiveView, LiveViews
from tl_scopes.views.markup import saved
from tl_scopes.views.palette import Colors

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


VERSION = 1


@dataclass(frozen=True, eq=False, repr=False)
class AttributionMap:
    """How much each token of a prompt moves each prediction in it.

    `prompt_map[position]` is the `Attribution` of one prediction, `prompt_map[2:5]` the map of three, and
    `prompt_map.by("word")` that of the words.

    Attributes:
        answers: one answer for each prediction, in the order of their positions; each has the scores of the tokens up
            to its position.

    Example:
        >>> prompt_map = tls.attribution_map(model, "The keys to the old cabinet near the door", tls.SemanticScope())
        >>> prompt_map
        AttributionMap(SemanticScope(): 10 predictions, 10 tokens, logit per unit of embedding norm)
        >>> prompt_map[-1].top(1)[0].token, prompt_map.scores.shape
        (' keys', torch.Size([10, 10]))
    """

    answers: tuple[Attribution, ...]

    def __post_init__(self) -> None:
        if not self.answers:
            raise ValueError("a map needs at least one answer, got none.")

    def __repr__(self) -> str:
        last = self.answers[-1]
        size = f"{counted(len(self), 'prediction')}, {counted(len(last.tokens), last.column)}"
        return f"AttributionMap({last.question}: {size}, {last.unit})"

    def __len__(self) -> int:
        return len(self.answers)

    def __iter__(self) -> Iterator[Attribution]:
        return iter(self.answers)

    @overload
    def __getitem__(self, position: int | SupportsIndex) -> Attribution: ...
    @overload
    def __getitem__(self, position: slice) -> "AttributionMap": ...
    def __getitem__(self, position: int | SupportsIndex | slice) -> "Attribution | AttributionMap":
        """The answer at a position of the prompt, or for a slice the map of its answers, in their order.

        Negative positions count from the last prediction.

        Raises:
            IndexError: for a position without an answer, or a slice without any.
            TypeError: for a position that is not an integer.
        """
        first, last = self.answers[0].position, self.answers[-1].position
        wanted: Container[int]
        if isinstance(position, slice):
            wanted = range(last + 1)[position]
        else:
            index = as_int(position, "position must be an integer")
            wanted = (index + last + 1 if index < 0 else index,)
        found = tuple(answer for answer in self.answers if answer.position in wanted)
        if not found:
            raise IndexError(
                f"there is no prediction at position {_shown(position)}: the map has those from {first} to {last}. "
                "Positions are those of the prompt: map.answers[0] is the first prediction there is."
            )
        return AttributionMap(found) if isinstance(position, slice) else found[0]

    @property
    def str_tokens(self) -> tuple[str, ...]:
        """The text of each token."""
        return self.answers[-1].str_tokens

    @property
    def scores(self) -> Float[Tensor, "position token"]:
        """One row for each prediction: the scores of the tokens, in the scope's unit; zero for those after it."""
        return self._matrix([answer.scores for answer in self.answers])

    @property
    def share(self) -> Float[Tensor, "position token"]:
        """One row for each prediction: the shares of the tokens, whose sizes sum to 1; zero for those after it."""
        return self._matrix([answer.share for answer in self.answers])

    def _matrix(self, rows: list[Tensor]) -> Tensor:
        matrix = rows[-1].new_zeros(len(rows), len(rows[-1]))
        for line, row in zip(matrix, rows, strict=True):
            line[: len(row)] = row
        return matrix

    def without(self, positions: Iterable[int | SupportsIndex]) -> "AttributionMap":
        """The same map without the tokens at these positions, and without the predictions that had no others.

        `prompt_map.without([0])` sets aside the BOS token. Negative positions count from the last prediction.

        Raises:
            ValueError: for a position that the map does not have, or where no token would be left.
        """
        given = (as_int(position, "positions must be integers") for position in positions)
        last = self.answers[-1]
        gone = {position + last.position + 1 if position < 0 else position for position in given}
        last.without(gone)  # says what is wrong, if anything is
        left = [answer for answer in self.answers if not set(answer.positions) <= gone]
        return AttributionMap(tuple(answer.without(gone & set(answer.positions)) for answer in left))

    def by(self, unit: Unit | Iterable[tuple[int, int] | range]) -> "AttributionMap":
        """The same map with tokens put together to words, sentences or numbers, or to spans of your own, in rows and
        columns.

        The score of a column is what its tokens have together, as in `Attribution.by`. The rows are the predictions
        after the last token of each unit; those within a unit are left out. Positions of what is returned count units:
        `prompt_map.by("word")[3]` is the prediction after the fourth one.

        Args:
            unit: "word", "sentence", "number", or spans of positions.

        Raises: as `Attribution.by` does. ValueError where no prediction is read at the end of a unit.

        Example:
            >>> words = tls.attribution_map(model, "The unheard keys near the cabinet", tls.SemanticScope()).by("word")
            >>> words[-2].top(1)[0].token, words.scores.shape
            (' unheard', torch.Size([7, 7]))
        """
        last = self.answers[-1]
        last.require_grouping()
        groups, how = last.groups_of(unit)
        ends = {last.positions[group.stop - 1]: number for number, group in enumerate(groups)}
        rows = [(ends[answer.position], answer) for answer in self.answers if answer.position in ends]
        if not rows:
            raise ValueError(f"no prediction of this map is read after the last token of a {how}: take the whole map.")
        return AttributionMap(
            tuple(
                replace(answer.grouped(groups[: n + 1], how), positions=tuple(range(n + 1)), position=n)
                for n, answer in rows
            )
        )

    def to_dataframe(self) -> "pd.DataFrame":
        """One row for each prediction and token: its position, and the columns of `Attribution.to_dataframe`."""
        import pandas as pd

        frames = {answer.position: answer.to_dataframe() for answer in self.answers}
        return pd.concat(frames, names=["prediction"]).reset_index(level=0).reset_index(drop=True)

    def to_json(self, path: str | Path | None = None) -> str:
        """The answers as text that `from_json` reads back without loss; `path` is where to write it."""
        return saved(written("AttributionMap", VERSION, self.answers), path)

    @classmethod
    def from_json(cls, text: str | Path) -> "AttributionMap":
        """Read what `to_json` wrote.

        Args:
            text: the text itself, or the path of the file that holds it, as a `pathlib.Path`.

        Raises:
            TypeError: for something that is neither.
            OSError: for a file that cannot be read.
            ValueError: for text that is not an AttributionMap, or that a later version has written.
        """
        return cls(answers_of(parsed(text_of(text), "an AttributionMap", VERSION)))

    # -- pictures -----------------------------------------------------------------------------------------------------

    def plot(self, colors: Colors = "root") -> "Figure":
        """A heat map: predictions from top to bottom, tokens from left to right.

        Args:
            colors: how shares become colours, as in `Attribution.to_html`.
        """
        return card.plot(self, colors)

    def to_html(self, path: str | Path | None = None, *, colors: Colors = "root") -> str:
        """A static page of the heat map. It has no script and needs no network.

        Args:
            path: where to write it.
            colors: how shares become colours, as in `Attribution.to_html`.
        """
        return saved(card.page(self, colors), path)

    def show(self) -> LiveView | LiveViews:
        """circuitsvis' attention view, for a live notebook; its script comes from the installed package.

        A slice is drawn as circuitsvis' tokens, once for each prediction.
        """
        return card.live(self)

    def _repr_html_(self) -> str:
        return card.fragment(self)


def _shown(position: object) -> str:
    """A position, or a slice of them, as it is written in brackets."""
    if not isinstance(position, slice):
        return str(position)
    return ":".join("" if one is None else str(one) for one in (position.start, position.stop))


# -- several answers as JSON ------------------------------------------------------------------------------------------


def written(kind: str, version: int, answers: Iterable[Attribution], **more: Any) -> str:
    """The text for a result that holds several answers, and what else it has."""
    record = {"format": f"tl_scopes.{kind}", "version": version, **more}
    return json.dumps(record | {"answers": [json.loads(answer.to_json()) for answer in answers]}, allow_nan=False)


def answers_of(record: Mapping[str, Any]) -> tuple[Attribution, ...]:
    """The answers that such a text holds.

    Raises:
        ValueError: where it holds none.
    """
    if not isinstance(record.get("answers"), list):
        raise ValueError(f"this {record['format'].split('.')[-1]} does not hold what it should: a list of answers.")
    return tuple(Attribution.from_json(json.dumps(one)) for one in record["answers"])
