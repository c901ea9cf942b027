"""The answer: how much each input token moves one prediction."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, SupportsIndex

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_scopes.models import Provenance, Target, Token, as_count, as_int, counted, readable
from tl_scopes.models.linear_rules import under
from tl_scopes.results import json_record, units
from tl_scopes.results.units import Unit
from tl_scopes.views import attribution as card
from tl_scopes.views.live import LiveView
from tl_scopes.views.markup import saved
from tl_scopes.views.palette import Colors

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


class Influence(NamedTuple):
    """One row of `Attribution.top`.

    Attributes:
        position: where the token stands in the prompt, counted from 0.
        token: its text.
        score: its score, in the answer's unit.
        share: the score over the sum of the sizes of all scores, from -1 to 1.
    """

    position: int
    token: str
    score: float
    share: float


class Prediction(NamedTuple):
    """One of the most likely next tokens.

    Attributes:
        token: the token, as id and text.
        probability: how likely it is, from 0 to 1.
    """

    token: Token
    probability: float


@dataclass(frozen=True, eq=False, repr=False)
class Attribution:
    """How much each input token moves one prediction. No method changes it: `without` returns another one.

    What else the scope found is reached by its name: `answer.standard_error` is short for
    `answer.details["standard_error"]`.

    Attributes:
        scores: [token], one number for each token, in `unit`. On the CPU, in float32 (float64 for a float64 model).
        tokens: [token], the ids of the tokens. On the CPU.
        str_tokens: the text of each token.
        positions: where each token stands in the prompt, counted from 0.
        position: the position after which the prediction was read.
        target: what is explained, a token or several, with ids and text; None where the scope asks about the whole
            prediction. Of an answer that was said it is that answer, whose predictions such a scope explains.
        versus: what the target is compared with, for a difference; else None.
        scope: the question, as it is written in Python.
        unit: the unit of a score, in words.
        predictions: the most likely next tokens with their probabilities, the best first; empty where the linearisation
            ends before the logits.
        wrt: the name of the hook where the tokens were perturbed.
        of: the name of the hook where the effect was read.
        model: the name of the model.
        dtype: the precision of the model, such as "float32".
        notes: what a reader of the scores should know, such as how the weights were processed.
        details: what else the scope found, by names that no field or method has: tensors with the tokens on their last
            axis, and numbers and texts about the whole. The scope's docstring gives their units.
        value: the number that the scores are about, such as a logit or a log-probability; None where it is not one.
        quantity: what `value` is, such as "log p(' Paris')"; None where it has no name.
        parts: the part of a chat that each token belongs to: "system", "user", "assistant", "tool", "reasoning",
            "answer", or "template" for what the chat's template puts around the messages; empty for other prompts.
            Where a role speaks several times, its turns are numbered: "user 1", "user 2".
        uncounted: parts that stand outside of shares and `top`.
        grouping: what the score of several tokens together is: "norm" for √Σ score², "sum" for Σ score, "signed" for
            |Σ signed| with the detail of that name; None where the scores of the tokens do not tell.
        rules: the rules that differentiated the model in place of some of its own derivatives, "linear" say; else None.
        provenance: the versions, the model and its revision, the device and the day with which the answer was made;
            None where it is not known.
    """

    scores: Float[Tensor, "token"]
    tokens: Int[Tensor, "token"]
    str_tokens: tuple[str, ...]
    positions: tuple[int, ...]
    position: int
    target: Target | None
    versus: Target | None
    scope: str
    unit: str
    predictions: tuple[Prediction, ...]
    wrt: str
    of: str
    model: str
    dtype: str
    notes: tuple[str, ...] = field(default=())
    details: Mapping[str, Any] = field(default_factory=dict)
    value: float | None = None
    quantity: str | None = None
    parts: tuple[str, ...] = ()
    uncounted: tuple[str, ...] = ("template",)
    grouping: Literal["norm", "sum", "signed"] | None = None
    rules: str | None = None
    provenance: Provenance | None = None

    def __post_init__(self) -> None:
        lengths = {len(self.scores), len(self.tokens), len(self.str_tokens), len(self.positions)}
        if len(lengths) != 1:
            raise ValueError(
                f"scores, tokens, str_tokens and positions differ in length: {len(self.scores)}, {len(self.tokens)}, "
                f"{len(self.str_tokens)}, {len(self.positions)}."
            )
        if self.parts and len(self.parts) != len(self.scores):
            raise ValueError(f"parts must be one for each of the {len(self.scores)} tokens, got {len(self.parts)}.")
        taken = [name for name in self.details if name in {f.name for f in fields(self)} or hasattr(type(self), name)]
        if taken:
            raise ValueError(
                f"details may not be called {', '.join(map(repr, taken))}: an Attribution has fields or methods of "
                "these names, behind which they could not be reached. Call them something else."
            )
        for name, value in self.details.items():
            if isinstance(value, Tensor) and value.shape[-1:] != self.scores.shape:
                raise ValueError(
                    f"the last axis of the detail {name!r} must be the {len(self.scores)} tokens, got the shape "
                    f"{list(value.shape)}."
                )
        if not self.scores.isfinite().all():
            half = "Load it in float32 or bfloat16, which hold larger numbers than float16. "
            raise ValueError(
                f"NaN or infinite scores from {self.scope}: the model, in {self.dtype}, overflows on the way back. "
                f"{half if self.dtype == 'float16' else ''}Check its weights and your hooks."
            )

    def __repr__(self) -> str:
        rows = self.top(3)
        shown = ", ".join(f"{row.token!r}{self.place(row.position)} {row.share:.0%}" for row in rows)
        shown = shown or "no token that is counted"
        return f"Attribution({self.question}: {shown}; {counted(len(self.scores), self.column)}, {self.unit})"

    @property
    def column(self) -> str:
        """What a score is of: a token, or what `by` has put together, a word say."""
        return str(self.details.get("grouped_by", "token"))

    @property
    def question(self) -> str:
        """The scope, with the rules it was asked under."""
        return under(self.scope, self.rules)

    def __getattr__(self, name: str) -> Any:
        details = self.__dict__.get("details", {})
        if name in details:
            return details[name]
        if name == "checks":
            raise AttributeError(
                "an Attribution no longer runs the model again: write tls.check(lin, scope), with "
                "lin = tls.linearize(model, prompt)."
            )
        if name == "biases" and "gap" in details:
            raise AttributeError(
                "this answer has no biases, because its parts do not add up: they do for a logit, or a difference of "
                f'two, under rules="linear" and with baseline="zero". `gap` ({details["gap"]:.3g}) is what is left to '
                "`value` by the scores of all tokens, those set aside included."
            )
        known = f"; the details of this one are {', '.join(details)}" if details else ""
        raise AttributeError(f"an Attribution of {self.__dict__.get('scope')} has no {name!r}{known}.")

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self.details})

    @property
    def share(self) -> Float[Tensor, "token"]:
        """Each score over the sum of the sizes of all scores; zeros where all scores are zero.

        So a share has the sign of its score, and the sizes of all shares sum to 1. Tokens of an `uncounted` part have
        no share: they count as zero.
        """
        scores = self.scores
        if not all(self.is_counted):
            scores = scores * torch.tensor(self.is_counted, device="cpu")
        # Without a copy where none is needed, because the sum of a copy may be rounded otherwise.
        total = (scores.abs() if (scores < 0).any() else scores).sum()
        if total.isinf():
            exact = scores.double()
            return (exact / exact.abs().sum()).to(scores)
        return scores / total if total != 0 else torch.zeros_like(scores)

    @property
    def shown_tokens(self) -> tuple[str, ...]:
        """The tokens as pictures show them: of tokens that are bytes of one character, the first shows it whole."""
        return units.shown(self.str_tokens)

    @property
    def labels(self) -> tuple[str, ...]:
        """The tokens as tables and axes name them: `shown_tokens`, with the later bytes of a character written out."""
        return units.labels(self.str_tokens)

    def place(self, position: int) -> str:
        """ " at 3", for a token whose text stands more than once among the answer's; else nothing."""
        text = self.str_tokens[self.positions.index(position)]
        return f" at {position}" if self.str_tokens.count(text) > 1 else ""

    @property
    def is_counted(self) -> tuple[bool, ...]:
        """For each token whether it has a share: tokens of an `uncounted` part have none."""
        return tuple(part not in self.uncounted for part in self.parts) or (True,) * len(self.scores)

    def top(self, count: int | SupportsIndex = 5) -> tuple[Influence, ...]:
        """The most influential tokens, the score of the largest size first; all tokens where there are fewer.

        Raises:
            TypeError: for a count that is not an integer.
            ValueError: for a count below 1.
        """
        count = as_count(count, "count must be at least 1")
        share, counted = self.share, self.is_counted
        order = [i for i in self.scores.abs().argsort(descending=True, stable=True).tolist() if counted[i]][:count]
        return tuple(
            Influence(self.positions[i], self.str_tokens[i], self.scores[i].item(), share[i].item()) for i in order
        )

    def without(self, positions: Iterable[int | SupportsIndex]) -> "Attribution":
        """The same answer without the tokens at these positions of the prompt; shares are then those of the rest.

        A note says so where the scores are parts that added up to the value, and no longer do.

        `answer.without([0])` sets aside the BOS token, on which much influence tends to rest. Negative positions count
        from where the prediction was read.

        Raises:
            ValueError: for a position that the answer does not have, or where no token would be left.
            TypeError: for positions that are not integers, such as a mask of booleans.
        """
        if isinstance(positions, str) or not isinstance(positions, Iterable):
            raise TypeError(f"positions must be integers, in a list such as [0], got {positions!r}.")
        given = (as_int(position, "positions must be integers") for position in positions)
        gone = {position + self.position + 1 if position < 0 else position for position in given}
        absent = gone - set(self.positions)
        if absent:
            raise ValueError(
                f"there is no token at position {min(absent)}: the answer has positions "
                f"{self.positions[0]} to {self.positions[-1]}."
            )
        kept = [i for i, position in enumerate(self.positions) if position not in gone]
        if not kept:
            raise ValueError("no token would be left: leave at least one position in.")
        return self._of(kept)

    def _of(self, kept: list[int]) -> "Attribution":
        """The same answer with some of its tokens alone."""
        notes = self.notes
        rest = next((name for name in ("biases", "gap") if name in self.details), None)
        if rest is not None and self.value is not None and len(kept) < len(self.scores):
            gone = f"tokens are set aside, so that the scores and the {rest} no longer add up to the value"
            notes = tuple(dict.fromkeys((*notes, gone)))
        return replace(
            self,
            scores=self.scores[kept],
            tokens=self.tokens[kept],
            str_tokens=tuple(self.str_tokens[i] for i in kept),
            positions=tuple(self.positions[i] for i in kept),
            parts=tuple(self.parts[i] for i in kept) if self.parts else (),
            notes=notes,
            details={k: v[..., kept] if isinstance(v, Tensor) else v for k, v in self.details.items()},
        )

    def part(self, name: str) -> "Attribution":
        """The same answer with the tokens of one part of a chat alone: "user", "system", "template"; "user 2" for the
        second turn of the user's where there are several, all of which "user" means.

        Raises:
            ValueError: for a part that the answer does not have.
        """
        kept = [i for i, part in enumerate(self.parts) if name in (part, part.rstrip("0123456789").rstrip())]
        if not kept:
            known = ", ".join(map(repr, dict.fromkeys(self.parts))) or "no parts, since its prompt was not a chat"
            raise ValueError(f"the answer has no part {name!r}: it has {known}.")
        return replace(self._of(kept), uncounted=tuple(part for part in self.uncounted if part != name))

    def with_template(self) -> "Attribution":
        """The same answer with what the chat's template puts around the messages counted in shares."""
        return replace(self, uncounted=tuple(part for part in self.uncounted if part != "template"))

    def by(self, unit: Unit | Iterable[tuple[int, int] | range]) -> "Attribution":
        """The same answer with tokens put together to words, sentences or numbers, or to spans of your own.

        The score of a unit is what the scope would find for its tokens together: √Σ score² where scores are norms of
        gradients, the sum for Fisher's, |Σ signed| for gradient times input and integrated gradients. A unit's position
        is that of its first token, and its id that of its first token.

        Args:
            unit: "word" and "sentence" by Unicode's rules (UAX #29, by the library uniseg), "number" for the digits of
                a number, everything else token by token; or spans, each a range of positions or a pair (start, stop),
                which may leave tokens to themselves.

        Raises:
            TypeError: for spans that are neither ranges nor pairs of positions.
            ValueError: for another unit; for spans that overlap, that the answer does not have, or that go from one
                part of a chat over into another; where the scores of the scope do not tell what several tokens have
                together, such as leave-one-out; for an answer whose tokens were put together before.
        """
        self.require_grouping()
        return self.grouped(*self.groups_of(unit))

    def groups_of(self, unit: Unit | Iterable[tuple[int, int] | range]) -> tuple[list[range], str]:
        """Which tokens `by` puts together, each group a range of their numbers, and what a group is called.

        Raises: as `by` does.
        """
        parts = self.parts or ("",) * len(self.scores)
        if not isinstance(unit, str):
            return units.spanned(self.positions, unit, parts), "span"
        # Where tokens were set aside, what stood beside them does not belong together.
        apart = [(part, position - i) for i, (part, position) in enumerate(zip(parts, self.positions, strict=True))]
        return units.grouped(self.str_tokens, unit, apart), unit

    def require_grouping(self) -> None:
        """Refuse to put tokens together where the scores do not tell what several have together.

        Raises:
            ValueError: for scores that are neither norms nor parts of a sum; where that was done before.
        """
        if "grouped_by" in self.details:
            raise ValueError(
                f"the tokens of this answer were put together by {self.details['grouped_by']} before: ask the answer "
                "that has the tokens themselves."
            )
        if self.grouping is None:
            raise ValueError(
                f"the scores of {self.scope} do not tell what several tokens have together: they are neither norms of "
                "gradients nor parts of a sum. Ask SemanticScope, TemperatureScope or FisherScope."
            )

    def grouped(self, groups: Sequence[range], how: str) -> "Attribution":
        """The same answer with these groups of tokens put together, each a range of their numbers: see `by`.

        Args:
            groups: every token in one group, in their order.
            how: what a group is called.
        """
        assert self.grouping is not None
        rule = {"norm": "√Σ score²", "sum": "Σ score", "signed": "|Σ signed|"}[self.grouping]
        details = {name: value for name, value in self.details.items() if not isinstance(value, Tensor)}
        added = self.details["signed"] if self.grouping == "signed" else self.scores
        parts = [added[group.start : group.stop] for group in groups]
        # In double, since float32 may not hold the squares of very small scores.
        combined = torch.stack([part.double().norm() if self.grouping == "norm" else part.sum() for part in parts])
        if self.grouping == "signed":
            details["signed"], combined = combined, combined.abs()
        details["grouped_by"] = how
        firsts = [group.start for group in groups]
        return replace(
            self,
            scores=combined.to(self.scores),
            tokens=self.tokens[firsts],
            str_tokens=tuple(readable("".join(self.str_tokens[g.start : g.stop])) for g in groups),
            positions=tuple(self.positions[i] for i in firsts),
            parts=tuple(self.parts[i] for i in firsts) if self.parts else (),
            details=details,
            notes=(*self.notes, f"tokens are grouped by {how}: the score of a {how} is {rule} over its tokens"),
        )

    # -- other forms --------------------------------------------------------------------------------------------------

    def to_dataframe(self) -> "pd.DataFrame":
        """One row for each token: position, token, id, score, share, and the details with one number for each token."""
        import pandas as pd

        return pd.DataFrame(
            {
                "position": self.positions,
                "token": self.str_tokens,
                "id": self.tokens.tolist(),
                "score": self.scores.tolist(),
                "share": self.share.tolist(),
            }
            | ({"part": self.parts} if self.parts else {})
            | {k: v.tolist() for k, v in self.details.items() if isinstance(v, Tensor) and v.ndim == 1}
        )

    def to_json(self, path: str | Path | None = None) -> str:
        """The whole answer as text that `from_json` reads back without loss.

        JSON has no infinite numbers and no NaN. Where they are among the details, as in an unknown standard error, they
        are written as the texts "Infinity", "-Infinity" and "NaN".

        Args:
            path: where to write it.
        """
        return saved(json_record.written(dict(vars(self))), path)

    @classmethod
    def from_json(cls, text: str | Path) -> "Attribution":
        """Read what `to_json` wrote. A warning says so where it was made with other versions of the model's libraries.

        Args:
            text: the text itself, or the path of the file that holds it, as a `pathlib.Path`.

        Raises:
            TypeError: for something that is neither.
            OSError: for a file that cannot be read.
            ValueError: for text that is not an Attribution, or that a later version has written.
        """
        found = json_record.read(text)
        if found["provenance"] is not None:
            found["provenance"].warn_of_other_versions("this answer")
        found["predictions"] = tuple(Prediction(Token(*token), p) for token, p in found["predictions"])
        return cls(**found)

    # -- pictures -----------------------------------------------------------------------------------------------------

    def plot(self, colors: Colors = "root") -> "Figure":
        """A bar chart: a bar for each token, as high as its share; tokens that are not counted have none.

        Args:
            colors: how scores become colours, as in `to_html`.
        """
        return card.plot(self, colors)

    def to_html(self, path: str | Path | None = None, *, colors: Colors = "root") -> str:
        """A static page of the coloured tokens. It has no script and needs no network.

        Args:
            path: where to write it.
            colors: how scores become colours. "root": by their square root, which shows the small ones too; "linear":
                in proportion, so that the few largest stand out on a long prompt; "even": in proportion to what they
                are above an even share, so that all others are white.

        Raises:
            ValueError: for other colours.
        """
        return saved(card.page(self, colors=colors), path)

    def show(self) -> LiveView:
        """circuitsvis' coloured tokens, for a live notebook; its script comes from the installed package.

        Raises:
            ValueError: for more than 4,000 tokens, which a browser draws slowly: see `to_html`, or set tokens aside.
        """
        return card.colored_tokens(self)

    def _repr_html_(self) -> str:
        return card.fragment(self)
