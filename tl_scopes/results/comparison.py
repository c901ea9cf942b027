"""Several answers about one prompt, side by side."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING

from tl_scopes.results.attribution import Attribution
from tl_scopes.views import comparison as card
from tl_scopes.views.live import LiveView

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """Answers about the same tokens, side by side.

    Attributes:
        answers: the answers by their names; all of them have the same tokens at the same positions.
    """

    answers: Mapping[str, Attribution]

    def __repr__(self) -> str:
        return f"Comparison({', '.join(self.answers)}; {len(self._first.tokens)} tokens)"

    @property
    def _first(self) -> Attribution:
        return next(iter(self.answers.values()))

    def to_dataframe(self) -> "pd.DataFrame":
        """The shares: one row for each position and token, one column for each answer."""
        import pandas as pd

        index = pd.MultiIndex.from_arrays([self._first.positions, self._first.str_tokens], names=["position", "token"])
        return pd.DataFrame({name: answer.share.tolist() for name, answer in self.answers.items()}, index=index)

    # -- pictures -----------------------------------------------------------------------------------------------------

    def to_html(self, path: str | Path | None = None) -> str:
        """A static page. It has no script and needs no network; `path` is where to write it."""
        html = card.page(self)
        if path is not None:
            Path(path).write_text(html, encoding="utf-8")
        return html

    def show(self) -> LiveView:
        """circuitsvis' tokens with a choice of the answer, for a live notebook."""
        return card.colored_tokens(self)

    def _repr_html_(self) -> str:
        return card.fragment(self)


def compare(answers: Iterable[Attribution] | Mapping[str, Attribution]) -> Comparison:
    """Put several answers about the same prompt side by side: of all scopes, of two models, before and after a patch.

    Args:
        answers: answers about the same tokens. They are named by their scopes, or by the keys of a mapping.

    Raises:
        TypeError: for anything among them that is not an Attribution.
        ValueError: for no answers, or for answers about different tokens.

    Example:
        >>> lin = tls.linearize(model, "The keys to the old cabinet near the door", position=-1)
        >>> comparison = tls.compare(scope(lin) for scope in (tls.SemanticScope(), tls.FisherScope()))
        >>> comparison
        Comparison(SemanticScope(), FisherScope(); 10 tokens)
        >>> comparison.to_dataframe().idxmax()["FisherScope()"]
        (2, ' keys')
    """
    if isinstance(answers, Attribution) or not isinstance(answers, Iterable):
        raise TypeError(
            f"answers must be several Attributions, in a list or by name in a dict, got one {type(answers).__name__}."
        )
    pairs = list(answers.items()) if isinstance(answers, Mapping) else [(None, answer) for answer in answers]
    if not pairs:
        raise ValueError("there is nothing to compare: give at least one answer.")
    named: dict[str, Attribution] = {}
    for name, answer in pairs:
        if not isinstance(answer, Attribution):
            raise TypeError(f"answers must be Attributions, got one {type(answer).__name__} among them.")
        named[_free(answer.scope, named) if name is None else str(name)] = answer
    for name, answer in named.items():
        _require_same_tokens(next(iter(named.items())), (name, answer))
    return Comparison(named)


def _free(scope: str, taken: Mapping[str, Attribution]) -> str:
    """The name of a scope, with a number where it is taken."""
    names = chain([scope], (f"{scope} ({number})" for number in count(2)))
    return next(name for name in names if name not in taken)


def _require_same_tokens(*named: tuple[str, Attribution]) -> None:
    (one, first), (other, second) = named
    here, there = (list(zip(answer.positions, answer.str_tokens, strict=True)) for answer in (first, second))
    if len(here) != len(there):
        raise ValueError(
            f"answers must be about the same tokens: {one} has {len(here)}, {other} {len(there)}. Ask both at the same "
            "position, and use `without` on all of them or on none."
        )
    for (position, text), (place, another) in zip(here, there, strict=True):
        if (position, text) != (place, another):
            raise ValueError(
                f"answers must be about the same tokens: {one} has {text!r} at position {position} where {other} has "
                f"{another!r} at position {place}."
            )
