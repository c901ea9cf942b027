"""Several answers side by side: about one prompt, or about a pair of prompts."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl_scopes.models import abridged, counted
from tl_scopes.results.attribution import Attribution
from tl_scopes.views import comparison as card
from tl_scopes.views.live import LiveViews
from tl_scopes.views.markup import saved
from tl_scopes.views.palette import Colors

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """Answers side by side.

    Attributes:
        answers: the answers by their names. Where they are about the same positions they are aligned token by token.
    """

    answers: Mapping[str, Attribution]

    def __repr__(self) -> str:
        return f"Comparison({', '.join(self.answers)}; {counted(len(self._first.tokens), 'token')})"

    @property
    def aligned(self) -> bool:
        """Whether all answers are about the same positions, so that their tokens stand for one another."""
        return all(answer.positions == self._first.positions for answer in self.answers.values())

    @property
    def differing(self) -> tuple[int, ...]:
        """The positions at which the tokens of aligned answers differ; none where answers are not aligned."""
        texts = zip(*(answer.str_tokens for answer in self.answers.values()), strict=False)
        pairs = zip(self._first.positions, texts, strict=False) if self.aligned else ()
        return tuple(position for position, several in pairs if len(set(several)) > 1)

    @property
    def str_tokens(self) -> tuple[str, ...]:
        """The text of each token of aligned answers, with a bar between those that differ."""
        columns = zip(*(answer.str_tokens for answer in self.answers.values()), strict=False)
        return tuple("|".join(dict.fromkeys(several)) for several in columns)

    @property
    def caveat(self) -> str:
        """What a reader should know who compares scores: that they are about different numbers; else nothing."""
        explained = dict.fromkeys(answer.quantity for answer in self.answers.values() if answer.quantity is not None)
        named = list(explained)
        told = ", ".join(named[:4]) + (f" and {len(named) - 4} more" if len(named) > 4 else "")
        return f"the answers are about different numbers: {told}" if len(named) > 1 else ""

    @property
    def _first(self) -> Attribution:
        return next(iter(self.answers.values()))

    def to_dataframe(self) -> "pd.DataFrame":
        """The shares: one row for each position and token, one column for each answer.

        Answers that are not aligned have a row for each position of any of them, and two columns each: its token and
        its share.
        """
        import pandas as pd

        if not self.aligned:
            columns: dict[tuple[str, str], Any] = {}
            for name, answer in self.answers.items():
                frame = answer.to_dataframe().set_index("position")
                columns |= {(name, "token"): frame.token, (name, "share"): frame.share}
            return pd.DataFrame(columns).sort_index()
        index = pd.MultiIndex.from_arrays([self._first.positions, self.str_tokens], names=["position", "token"])
        return pd.DataFrame({name: answer.share.tolist() for name, answer in self.answers.items()}, index=index)

    # -- pictures -----------------------------------------------------------------------------------------------------

    def to_html(self, path: str | Path | None = None, *, colors: Colors = "root") -> str:
        """A static page. It has no script and needs no network.

        Args:
            path: where to write it.
            colors: how scores become colours, as in `Attribution.to_html`.
        """
        return saved(card.page(self, colors), path)

    def show(self) -> LiveViews:
        """circuitsvis' tokens for each answer, for a live notebook."""
        return card.colored_tokens(self)

    def _repr_html_(self) -> str:
        return card.fragment(self)


def compare(answers: Attribution | Iterable[Attribution] | Mapping[str, Attribution], *more: Attribution) -> Comparison:
    """Put several answers side by side: of all scopes, of two models, before and after a patch, of a pair of prompts.

    Answers about prompts of one length are aligned, and the tokens that differ are marked; others stand side by side
    without that.

    Args:
        answers: several answers, named by their scopes, and where these are alike by what differs: what is explained,
            the prompt, the position or the model; or by the keys of a mapping.
        more: more answers, where the first is a single one: a pair may be given as it is, `compare(clean, corrupted)`.

    Raises:
        TypeError: for anything among them that is not an Attribution, and for a single one.
        ValueError: for no answers; for names that are the same as text; for answers about prompts of one length from
            which other tokens were set aside.

    Example:
        >>> lin = tls.linearize(model, "The keys to the old cabinet near the door", position=-1)
        >>> comparison = tls.compare(scope(lin) for scope in (tls.SemanticScope(), tls.FisherScope()))
        >>> comparison
        Comparison(SemanticScope(), FisherScope(); 10 tokens)
        >>> comparison.to_dataframe().idxmax()["FisherScope()"]
        (2, ' keys')
    """
    given: Any = [answers, *more] if isinstance(answers, Attribution) and more else answers
    if isinstance(given, Attribution) or not isinstance(given, Iterable):
        raise TypeError(
            f"answers must be several Attributions, in a list or by name in a dict, got one {type(given).__name__}."
        )
    pairs = list(given.items()) if isinstance(given, Mapping) else [(None, answer) for answer in given]
    if not pairs:
        raise ValueError("there is nothing to compare: give at least one answer.")
    named: dict[str, Attribution] = {}
    for _, answer in pairs:
        if not isinstance(answer, Attribution):
            raise TypeError(f"answers must be Attributions, got one {type(answer).__name__} among them.")
    listed = [answer for _, answer in pairs]
    for name, answer in pairs:
        alike = [other for other in listed if other.question == answer.question]
        text = _free(answer.question + _apart(answer, alike), named) if name is None else str(name)
        if text in named:
            raise ValueError(f"the name {name!r} is that of an earlier answer, as text: give each its own.")
        named[text] = answer
    for name, answer in named.items():
        _require_comparable(next(iter(named.items())), (name, answer))
    return Comparison(named)


def _apart(answer: Attribution, alike: Sequence[Attribution]) -> str:
    """What tells an answer from all others to the same question, " about ' are'" say; nothing for a single one."""
    tellers: tuple[Callable[[Attribution], str | None], ...] = (
        lambda one: None if one.target is None else f" about {one.target.text!r}",
        lambda one: f" on {abridged(''.join(one.str_tokens), 40)}" if one.positions[0] == 0 else None,
        lambda one: f" after position {one.position}",
        lambda one: f" of {one.model}",
    )
    for tell in tellers:
        told = {tell(one) for one in alike}
        if None not in told and len(told) == len(alike) > 1:
            return str(tell(answer))
    return ""


def _free(question: str, taken: Mapping[str, Attribution]) -> str:
    """The name of a question, with a number where it is taken."""
    names = chain([question], (f"{question} ({number})" for number in count(2)))
    return next(name for name in names if name not in taken)


def _require_comparable(*named: tuple[str, Attribution]) -> None:
    (one, first), (other, second) = named
    aside = any(answer.positions != tuple(range(len(answer.positions))) for answer in (first, second))
    if first.position == second.position and first.positions != second.positions and aside:
        raise ValueError(
            f"answers must be about the same positions: {one} has {len(first.positions)}, {other} "
            f"{len(second.positions)}, from {first.positions[0]} and {second.positions[0]} on. Use `without` on all of "
            "them or on none."
        )
