"""Several answers about one prompt, side by side."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING

from tl_scopes.results.attribution import Attribution
from tl_scopes.views import attribution as card
from tl_scopes.views import markup
from tl_scopes.views.live import LiveView, as_html
from tl_scopes.views.markup import MUTED, SMALL, chip, tag, visible
from tl_scopes.views.palette import Scale

if TYPE_CHECKING:
    import pandas as pd

_STATIC = "colour: square root of the score, each answer on its own scale"
_LIVE = "colour: share, white at 0 and full at Positive Bound"


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """Answers about the same tokens, each under a name."""

    answers: Mapping[str, Attribution]

    def __repr__(self) -> str:
        return f"Comparison({', '.join(self.answers)}; {len(self._first.tokens)} tokens)"

    @property
    def _first(self) -> Attribution:
        return next(iter(self.answers.values()))

    def to_dataframe(self) -> "pd.DataFrame":
        """Shares: one row per position and token, one column per answer."""
        import pandas as pd

        index = pd.MultiIndex.from_arrays([self._first.positions, self._first.str_tokens], names=["position", "token"])
        return pd.DataFrame({name: answer.share.tolist() for name, answer in self.answers.items()}, index=index)

    # -- pictures -----------------------------------------------------------------------------------------------------

    def to_html(self, path: str | Path | None = None) -> str:
        """A static page, self-contained: no script, no network. Written to `path` if given."""
        html = markup.page(", ".join(self.answers), self._repr_html_())
        if path is not None:
            Path(path).write_text(html, encoding="utf-8")
        return html

    def show(self) -> LiveView:
        """circuitsvis' tokens with a choice of the answer, for a live notebook.

        Departure: it has one bound for all answers and colours in proportion, so that it is given shares; the bound is
        the largest share that is on the scale of its own answer, and can be changed there.
        """
        shares = [answer.share.tolist() for answer in self.answers.values()]
        bound = max(Scale.of(line).end for line in shares) or 1.0
        props = {
            "tokens": [as_html(visible(text)) + "\n" * text.count("\n") for text in self._first.str_tokens],
            "values": list(zip(*shares, strict=True)),
            "labels": list(self.answers),
            "positiveBounds": [bound] * len(shares),
            "negativeBounds": [-bound] * len(shares),
        }
        return LiveView("ColoredTokensMulti", props, self._texts(), lambda live: self._card(live, _LIVE), repr(self))

    def _repr_html_(self) -> str:
        return self._card(self._texts(), _STATIC)

    def _card(self, body: str, legend: str) -> str:
        places = dict.fromkeys(card.about(answer) for answer in self.answers.values())
        notes = dict.fromkeys(note for answer in self.answers.values() for note in answer.notes)
        return markup.card(
            f"{len(self.answers)} answer{'s' * (len(self.answers) > 1)} about one prompt",
            *(tag("div", SMALL, escape(place)) for place in places if len(places) == 1),
            tag("div", "margin:14px 0 6px", body),
            tag("div", SMALL, legend),
            self._most_influential(alone=len(places) > 1),
            notes=notes,
        )

    def _texts(self) -> str:
        """The prompt once for each answer."""
        html = ""
        for name, answer in self.answers.items():
            html += tag("div", "font-weight:600;font-size:13px", escape(name))
            tokens = card.running_text(answer, marks=False) + card.next_token(answer)
            html += tag("div", "font-size:16px;line-height:2;margin-bottom:8px", tokens)
        return html

    def _most_influential(self, *, alone: bool) -> str:
        """Of each answer, with its unit, and where it was asked if `alone` there."""
        html = tag("div", f"color:{MUTED}", "Most influential tokens and their shares")
        for name, answer in self.answers.items():
            scale = Scale.of(answer.scores.tolist())
            top = [f"{chip(text, scale.strength(score))} {share:.1%}" for _, text, score, share in answer.top()]
            told = [f"in {escape(answer.unit)}", card.explains(answer), escape(card.about(answer)) if alone else ""]
            about = tag("span", f"color:{MUTED}", " · ".join(filter(None, told)))
            html += tag("div", "margin-top:6px", tag("b", "font-weight:600", escape(name)) + " " + about)
            apart = "display:inline-block;margin-right:10px"
            html += tag("div", "line-height:1.8", "".join(tag("span", apart, one) for one in top))
        return tag("div", "margin-top:14px;font-size:12px", html)


def compare(answers: Iterable[Attribution] | Mapping[str, Attribution]) -> Comparison:
    """Several answers about the same prompt in one picture: of all scopes, of two models, before and after a patch.

    Args:
        answers: about the same tokens; named by their scopes, or by the keys of a mapping.

    Raises:
        TypeError: for one that is no Attribution.
        ValueError: for none, or for answers about different tokens.

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
    """A scope's name, with a number where it is taken."""
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
