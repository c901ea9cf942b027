"""The question, a `Scope`, and the answer, an `Attribution`."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_scopes import models
from tl_scopes.linearization import Linearization
from tl_scopes.models import Token

if TYPE_CHECKING:
    import pandas as pd


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

    def __post_init__(self) -> None:
        lengths = {len(self.scores), len(self.tokens), len(self.str_tokens), len(self.positions)}
        if len(lengths) != 1:
            raise ValueError(
                f"scores, tokens, str_tokens and positions differ in length: {len(self.scores)}, {len(self.tokens)}, "
                f"{len(self.str_tokens)}, {len(self.positions)}."
            )
        if not self.scores.isfinite().all():
            raise ValueError(
                f"NaN or infinite scores from {self.scope}: a model in {self.dtype} may overflow on the way back, "
                "float32 or bfloat16 does not."
            )

    def __repr__(self) -> str:
        shown = ", ".join(f"{row.token!r} {row.share:.0%}" for row in self.top(3))
        return f"Attribution({self.scope}: {shown}; {len(self.scores)} tokens, {self.unit})"

    @property
    def share(self) -> Float[Tensor, "token"]:
        """Each score over the sum of all; zeros where all scores are zero."""
        total = self.scores.sum()
        return self.scores / total if total != 0 else torch.zeros_like(self.scores)

    def top(self, count: int = 5) -> tuple[Influence, ...]:
        """The most influential tokens, best first (all of them where there are fewer).

        Raises:
            ValueError: for a count below 1.
        """
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}.")
        share = self.share
        order = self.scores.argsort(descending=True, stable=True)[:count].tolist()
        return tuple(
            Influence(self.positions[i], self.str_tokens[i], self.scores[i].item(), share[i].item()) for i in order
        )

    def without(self, positions: Iterable[int]) -> "Attribution":
        """The same answer without the tokens at these positions of the prompt; shares are then of the rest.

        `answer.without([0])` sets aside the BOS token, on which much influence tends to rest.

        Raises:
            ValueError: for a position that is not there, or when no token would be left.
        """
        gone = set(positions)
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
        )

    # -- other forms --------------------------------------------------------------------------------------------------

    def to_dataframe(self) -> "pd.DataFrame":
        """One row per token: position, token, id, score, share."""
        import pandas as pd

        return pd.DataFrame(
            {
                "position": self.positions,
                "token": self.str_tokens,
                "id": self.tokens.tolist(),
                "score": self.scores.tolist(),
                "share": self.share.tolist(),
            }
        )

    def to_json(self) -> str:
        """Everything, as text that `from_json` reads back without loss."""
        record = asdict(self) | {"scores": self.scores.tolist(), "tokens": self.tokens.tolist()}
        record["score_dtype"] = str(self.scores.dtype).removeprefix("torch.")
        return json.dumps({"format": "tl_scopes.Attribution", "version": 1} | record, ensure_ascii=True)

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
        names = {f.name for f in fields(cls)} | {"score_dtype"}
        if set(record) != names:
            raise ValueError(f"this Attribution lacks or adds the fields {sorted(names ^ set(record))}.")
        try:
            return cls._from_record(record)
        except (KeyError, TypeError) as error:
            raise ValueError(f"a field of this Attribution is not what it should be: {error}.") from error

    @classmethod
    def _from_record(cls, record: dict[str, Any]) -> "Attribution":
        dtype = {"float32": torch.float32, "float64": torch.float64}[record.pop("score_dtype")]
        return cls(
            **record
            | {
                "scores": torch.tensor(record["scores"], dtype=dtype),
                "tokens": torch.tensor(record["tokens"], dtype=torch.long),
                "target": record["target"] and Token(*record["target"]),
                "versus": record["versus"] and Token(*record["versus"]),
                "predictions": tuple(Prediction(Token(*t), p) for t, p in record["predictions"]),
            }
            | {name: tuple(record[name]) for name in ("str_tokens", "positions", "notes")}
        )

    # -- pictures -----------------------------------------------------------------------------------------------------

    def to_html(self, path: str | Path | None = None) -> str:
        """A static page of the coloured tokens, self-contained: no script, no network. Written to `path` if given."""
        from tl_scopes import views

        html = views.page(self)
        if path is not None:
            Path(path).write_text(html, encoding="utf-8")
        return html

    def show(self) -> Any:
        """circuitsvis' coloured tokens, for a live notebook; its script comes from the installed package."""
        from tl_scopes import views

        return views.colored_tokens(self)

    def _repr_html_(self) -> str:
        from tl_scopes import views

        return views.fragment(self)


class Scope(ABC):
    """A question about a linearised prediction: call it on a `Linearization` to get an `Attribution`.

    A scope of your own is a frozen dataclass with these two methods.
    """

    @abstractmethod
    def scores(self, lin: Linearization) -> Float[Tensor, "token"]:
        """One number per token: the scope's equation."""

    @abstractmethod
    def unit(self, lin: Linearization) -> str:
        """The unit of a score."""

    def explained(self, lin: Linearization) -> tuple[Token | None, Token | None]:
        """The target, and the token it is compared with, where the question has them."""
        return None, None

    def notes(self, lin: Linearization) -> tuple[str, ...]:
        """What a reader of the scores should know."""
        return ()

    def __call__(self, lin: Linearization) -> Attribution:
        """Ask the question."""
        target, versus = self.explained(lin)
        predictions: tuple[Prediction, ...] = ()
        if lin.trace.logits is not None:
            best = lin.log_probs.exp().topk(min(5, len(lin.log_probs)))
            predictions = tuple(
                Prediction(lin.token(id), p) for id, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            )
        dtype = lin.readout.dtype
        scores = self.scores(lin)
        if not isinstance(scores, Tensor) or scores.shape != lin.tokens.shape:
            got = f"shape {list(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(f"{self} must give one score per token, a tensor of shape [{len(lin.tokens)}], got {got}.")
        return Attribution(
            scores=scores.detach().to("cpu", torch.float64 if dtype == torch.float64 else torch.float32),
            tokens=lin.tokens.cpu(),
            str_tokens=lin.str_tokens,
            positions=tuple(range(len(lin.tokens))),
            position=lin.position,
            target=target,
            versus=versus,
            scope=_as_written(self),
            unit=self.unit(lin),
            predictions=predictions,
            wrt=lin.wrt,
            of=lin.of,
            model=models.model_name(lin.model),
            dtype=str(dtype).removeprefix("torch."),
            notes=self.notes(lin),
        )


def _as_written(scope: Scope) -> str:
    """A scope in Python, without what is as by default."""
    if not is_dataclass(scope):
        return repr(scope)
    given = {f.name: getattr(scope, f.name) for f in fields(scope) if f.repr and getattr(scope, f.name) != f.default}
    return f"{type(scope).__name__}({', '.join(f'{name}={value!r}' for name, value in given.items())})"
