"""The answer: how much each input token moves one prediction."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsIndex

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_scopes.models import Token, as_count, as_int
from tl_scopes.results import json_record
from tl_scopes.views import attribution as card
from tl_scopes.views.live import LiveView

if TYPE_CHECKING:
    import pandas as pd


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
    """How much each input token moves one prediction. It never changes: `without` returns another one.

    What else the scope found is reached by its name: `answer.standard_error` is short for
    `answer.details["standard_error"]`.

    Attributes:
        scores: [token], one number for each token, in `unit`. On the CPU, in float32 (float64 for a float64 model).
        tokens: [token], the ids of the tokens. On the CPU.
        str_tokens: the text of each token.
        positions: where each token stands in the prompt, counted from 0.
        position: the position after which the prediction was read.
        target: the token explained, as id and text; None where the scope asks about the whole prediction.
        versus: the token that the target is compared with, for a difference of logits; else None.
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
    """

    scores: Float[Tensor, "token"]
    tokens: Int[Tensor, "token"]
    str_tokens: tuple[str, ...]
    positions: tuple[int, ...]
    position: int
    target: Token | None
    versus: Token | None
    scope: str
    unit: str
    predictions: tuple[Prediction, ...]
    wrt: str
    of: str
    model: str
    dtype: str
    notes: tuple[str, ...] = field(default=())
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lengths = {len(self.scores), len(self.tokens), len(self.str_tokens), len(self.positions)}
        if len(lengths) != 1:
            raise ValueError(
                f"scores, tokens, str_tokens and positions differ in length: {len(self.scores)}, {len(self.tokens)}, "
                f"{len(self.str_tokens)}, {len(self.positions)}."
            )
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
        shown = ", ".join(f"{row.token!r} {row.share:.0%}" for row in self.top(3))
        return f"Attribution({self.scope}: {shown}; {len(self.scores)} tokens, {self.unit})"

    def __getattr__(self, name: str) -> Any:
        details = self.__dict__.get("details", {})
        if name in details:
            return details[name]
        if name == "checks":
            raise AttributeError(
                "an Attribution no longer runs the model again: write tls.check(lin, scope), with "
                "lin = tls.linearize(model, prompt)."
            )
        known = f"; the details of this one are {', '.join(details)}" if details else ""
        raise AttributeError(f"an Attribution of {self.__dict__.get('scope')} has no {name!r}{known}.")

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self.details})

    @property
    def share(self) -> Float[Tensor, "token"]:
        """Each score over the sum of the sizes of all scores; zeros where all scores are zero.

        So a share has the sign of its score, and the sizes of all shares sum to 1.
        """
        # Without a copy where none is needed, because the sum of a copy may be rounded otherwise.
        total = (self.scores.abs() if (self.scores < 0).any() else self.scores).sum()
        return self.scores / total if total != 0 else torch.zeros_like(self.scores)

    def top(self, count: int | SupportsIndex = 5) -> tuple[Influence, ...]:
        """The most influential tokens, the score of the largest size first; all tokens where there are fewer.

        Raises:
            ValueError: for a count below 1.
        """
        count = as_count(count, "count must be at least 1")
        share = self.share
        order = self.scores.abs().argsort(descending=True, stable=True)[:count].tolist()
        return tuple(
            Influence(self.positions[i], self.str_tokens[i], self.scores[i].item(), share[i].item()) for i in order
        )

    def without(self, positions: Iterable[int | SupportsIndex]) -> "Attribution":
        """The same answer without the tokens at these positions of the prompt; shares are then those of the rest.

        `answer.without([0])` sets aside the BOS token, on which much influence tends to rest. Negative positions count
        from where the prediction was read.

        Raises:
            ValueError: for a position that the answer does not have, or where no token would be left.
            TypeError: for positions that are not integers, such as a mask of booleans.
        """
        counted = (as_int(position, "positions must be integers") for position in positions)
        gone = {position + self.position + 1 if position < 0 else position for position in counted}
        absent = gone - set(self.positions)
        if absent:
            raise ValueError(
                f"there is no token at position {min(absent)}: the answer has positions "
                f"{self.positions[0]} to {self.positions[-1]}."
            )
        kept = [i for i, position in enumerate(self.positions) if position not in gone]
        if not kept:
            raise ValueError("no token would be left: leave at least one position in.")
        return replace(
            self,
            scores=self.scores[kept],
            tokens=self.tokens[kept],
            str_tokens=tuple(self.str_tokens[i] for i in kept),
            positions=tuple(self.positions[i] for i in kept),
            details={k: v[..., kept] if isinstance(v, Tensor) else v for k, v in self.details.items()},
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
            | {k: v.tolist() for k, v in self.details.items() if isinstance(v, Tensor) and v.ndim == 1}
        )

    def to_json(self) -> str:
        """The whole answer as text that `from_json` reads back without loss.

        JSON has no infinite numbers and no NaN. Where they are among the details, as in an unknown standard error, they
        are written as the texts "Infinity", "-Infinity" and "NaN".
        """
        return json_record.written(dict(vars(self)))

    @classmethod
    def from_json(cls, text: str) -> "Attribution":
        """Read what `to_json` wrote.

        Raises:
            ValueError: for text that is not an Attribution, or that a later version has written.
        """
        found = json_record.read(text)
        found |= {name: found[name] and Token(*found[name]) for name in ("target", "versus")}
        found["predictions"] = tuple(Prediction(Token(*token), p) for token, p in found["predictions"])
        return cls(**found)

    # -- pictures -----------------------------------------------------------------------------------------------------

    def to_html(self, path: str | Path | None = None) -> str:
        """A static page of the coloured tokens. It has no script and needs no network; `path` is where to write it."""
        html = card.page(self)
        if path is not None:
            Path(path).write_text(html, encoding="utf-8")
        return html

    def show(self) -> LiveView:
        """circuitsvis' coloured tokens, for a live notebook; its script comes from the installed package."""
        return card.colored_tokens(self)

    def _repr_html_(self) -> str:
        return card.fragment(self)
