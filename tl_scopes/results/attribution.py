"""The answer: how much each input token moves one prediction."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsIndex

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_scopes.models import Model, Token, as_count, as_int
from tl_scopes.origin import Origin

if TYPE_CHECKING:
    import pandas as pd

    from tl_scopes.diagnostics.check_report import Checks


class Influence(NamedTuple):
    """One row of `Attribution.top`."""

    position: int
    token: str
    score: float
    share: float


class Prediction(NamedTuple):
    """One of the most likely next tokens."""

    token: Token
    probability: float


@dataclass(frozen=True, eq=False, repr=False)
class Attribution:
    """How much each input token moves one prediction. Every change returns a new one."""

    scores: Float[Tensor, "token"]
    """One number per token, in `unit`; on the CPU, float32 (float64 for a float64 model)."""
    tokens: Int[Tensor, "token"]
    """Token ids, on the CPU."""
    str_tokens: tuple[str, ...]
    """Their text."""
    positions: tuple[int, ...]
    """Where each of them stands in the prompt."""
    position: int
    """Where the prediction was read."""
    target: Token | None
    """The token explained; None where the scope asks about the whole prediction."""
    versus: Token | None
    """The token it is compared with, for a logit difference."""
    scope: str
    """The question, as it is written in Python."""
    unit: str
    """Unit of a score."""
    predictions: tuple[Prediction, ...]
    """The most likely next tokens, best first; empty where the linearisation ends before the logits."""
    wrt: str
    """The hook where the tokens were perturbed."""
    of: str
    """The hook where the effect was read."""
    model: str
    """Name of the model."""
    dtype: str
    """Precision of the model."""
    notes: tuple[str, ...] = field(default=())
    """What a reader of the scores should know: how the weights were processed, say."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What else the scope found: tensors with the tokens on their last axis, numbers and texts about the whole, by
    names that are not those of fields and methods.
    `answer.standard_error` is short for `answer.details["standard_error"]`, and so for all of them."""
    _origin: Origin | None = field(default=None)
    """Stays behind where the answer is written down, as JSON or as a pickle."""

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
            raise ValueError(
                f"NaN or infinite scores from {self.scope}: a model in {self.dtype} may overflow on the way back, "
                "float32 or bfloat16 does not."
            )

    def __repr__(self) -> str:
        shown = ", ".join(f"{row.token!r} {row.share:.0%}" for row in self.top(3))
        return f"Attribution({self.scope}: {shown}; {len(self.scores)} tokens, {self.unit})"

    def __getattr__(self, name: str) -> Any:
        details = self.__dict__.get("details", {})
        if name in details:
            return details[name]
        known = f"; the details of this one are {', '.join(details)}" if details else ""
        raise AttributeError(f"an Attribution of {self.__dict__.get('scope')} has no {name!r}{known}.")

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_origin": None}  # a reference to a model cannot travel, nor need a scope

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self.details})

    @property
    def share(self) -> Float[Tensor, "token"]:
        """Each score over the sum of their sizes; zeros where all scores are zero.

        So shares keep the sign of their score, and their sizes sum to 1.
        """
        # No copy where none is needed: its sum may be rounded otherwise.
        total = (self.scores.abs() if (self.scores < 0).any() else self.scores).sum()
        return self.scores / total if total != 0 else torch.zeros_like(self.scores)

    def top(self, count: SupportsIndex = 5) -> tuple[Influence, ...]:
        """The most influential tokens, the largest score first, whatever its sign (all of them where there are fewer).

        Raises:
            ValueError: for a count below 1.
        """
        count = as_count(count, "count must be at least 1")
        share = self.share
        order = self.scores.abs().argsort(descending=True, stable=True)[:count].tolist()
        return tuple(
            Influence(self.positions[i], self.str_tokens[i], self.scores[i].item(), share[i].item()) for i in order
        )

    def without(self, positions: Iterable[SupportsIndex]) -> "Attribution":
        """The same answer without the tokens at these positions of the prompt; shares are then of the rest.

        `answer.without([0])` sets aside the BOS token, on which much influence tends to rest.

        Raises:
            ValueError: for a position that is not there, or when no token would be left.
            TypeError: for positions that are no integers, a mask of booleans say.
        """
        gone = {as_int(position, "positions must be integers") for position in positions}
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
        """One row per token: position, token, id, score, share, and the details that are one number per token."""
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
        """Everything, as text that `from_json` reads back without loss.

        What is infinite or NaN among the details, an unknown standard error say, is written as the text "Infinity",
        "-Infinity" or "NaN", for JSON has no such numbers.
        """
        record = {name: value for name, value in vars(self).items() if name not in ("details", "_origin")}
        record |= {"scores": _as_record(self.scores), "tokens": self.tokens.tolist()}
        record |= {"details": {name: _as_record(value) for name, value in self.details.items()}}
        record = {"format": "tl_scopes.Attribution", "version": 1} | record
        return json.dumps(record, ensure_ascii=True, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Attribution":
        """Read what `to_json` wrote.

        Raises:
            ValueError: for text that is no Attribution, or of a later version.
        """
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"this is no Attribution but broken JSON: {error}.") from error
        if not isinstance(record, dict) or record.pop("format", None) != "tl_scopes.Attribution":
            raise ValueError('this JSON is no Attribution: its "format" is not "tl_scopes.Attribution".')
        if record.pop("version", None) != 1:
            raise ValueError("this Attribution was written by a later version of tl_scopes: upgrade to read it.")
        names = {f.name for f in fields(cls)} - {"_origin"}
        if set(record) != names:
            raise ValueError(f"this Attribution lacks or adds the fields {sorted(names ^ set(record))}.")
        try:
            return cls._from_record(record)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"a field of this Attribution is not what it should be: {error}.") from error

    @classmethod
    def _from_record(cls, record: dict[str, Any]) -> "Attribution":
        return cls(
            **record
            | {
                "scores": _tensor(record["scores"]),
                "tokens": torch.tensor(record["tokens"], dtype=torch.long),
                "target": record["target"] and Token(*record["target"]),
                "versus": record["versus"] and Token(*record["versus"]),
                "predictions": tuple(Prediction(Token(*t), p) for t, p in record["predictions"]),
                "details": {name: _from_record(value) for name, value in record["details"].items()},
            }
            | {name: tuple(record[name]) for name in ("str_tokens", "positions", "notes")}
        )

    def checks(self, model: Model | None = None, *, thorough: bool = False) -> "Checks":
        """What a careful reviewer would ask of these scores, in a few lines: see `tl_scopes.diagnostics.checks`.

        Example:
            >>> answer = tls.attribute(model, "The keys to the old cabinet near the door", tls.SemanticScope())
            >>> [check.name for check in answer.checks() if check.verdict == "look"]
            []
        """
        from tl_scopes.diagnostics.checks import checks

        return checks(self, model, thorough=thorough)

    # -- pictures -----------------------------------------------------------------------------------------------------

    def to_html(self, path: str | Path | None = None) -> str:
        """A static page of the coloured tokens, self-contained: no script, no network. Written to `path` if given."""
        from tl_scopes.views import attribution as card

        html = card.page(self)
        if path is not None:
            Path(path).write_text(html, encoding="utf-8")
        return html

    def show(self) -> Any:
        """circuitsvis' coloured tokens, for a live notebook; its script comes from the installed package."""
        from tl_scopes.views import attribution as card

        return card.colored_tokens(self)

    def _repr_html_(self) -> str:
        from tl_scopes.views import attribution as card

        return card.fragment(self)


def _as_record(value: Any) -> Any:
    """A detail as JSON: tensors, and numbers that JSON does not have, with their type, the rest as it is."""
    if isinstance(value, Tensor):
        dtype, value = str(value.dtype).removeprefix("torch."), value.tolist()
    elif isinstance(value, float) and not isfinite(value):
        dtype = "float"
    else:
        return list(map(_as_record, value)) if isinstance(value, list | tuple) else value
    return {"dtype": dtype, "values": json.loads(json.dumps(value), parse_constant=str)}


def _from_record(value: Any) -> Any:
    if isinstance(value, dict):
        return float(value["values"]) if value["dtype"] == "float" else _tensor(value)
    return tuple(map(_from_record, value)) if isinstance(value, list) else value


def _tensor(record: dict[str, Any]) -> Tensor:
    return torch.from_numpy(np.array(record["values"], dtype=record["dtype"]))  # which reads "Infinity" and "NaN"
