"""The question: a `Scope`, asked of a `Linearization` to get an `Attribution`."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, SupportsIndex, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from tl_scopes import models
from tl_scopes.centering import is_centered
from tl_scopes.jacobian import pullback
from tl_scopes.jacobian.linearization import Linearization
from tl_scopes.models import Token
from tl_scopes.origin import Origin, without_graphs
from tl_scopes.results.attribution import Attribution, Prediction

Observable: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""From a readout [d_of] and its logits [vocab] (empty where there are none), in float64, to a number or a vector."""


@dataclass(frozen=True, eq=False)
class Measurement:
    """What a scope finds."""

    scores: Float[Tensor, "token"]
    """One number per token."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What else is worth keeping: tensors with the tokens on their last axis, numbers, texts. Goes to
    `Attribution.details`."""


def squared_norms(lins: Sequence[Linearization], cotangents: Sequence[Tensor]) -> list[Float[Tensor, "_ _"]]:
    """‖cᵀJ_t‖² [probe token] for the cotangents [probe d_of] of linearisations that share a forward pass."""
    one = lins[0]
    return pullback.squared_norms(one.model, one.trace, one.wrt, [lin.row for lin in lins], cotangents)


def vjps(lins: Sequence[Linearization], cotangents: Sequence[Tensor]) -> list[Float[Tensor, "_ _ d_model"]]:
    """cᵀJ [probe token d_model] for the cotangents [probe d_of] of linearisations that share a forward pass."""
    one = lins[0]
    return pullback.vjps(one.model, one.trace, one.wrt, [lin.row for lin in lins], cotangents)


class Scope(ABC):
    """A question about a linearised prediction: call it on a `Linearization` to get an `Attribution`.

    A scope of your own is a frozen dataclass. Where the question is the gradient of a number computed from the
    prediction, derive it from `JacobianScope`, which needs two short methods.
    """

    @abstractmethod
    def measure(self, lin: Linearization) -> Measurement:
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

    def aimed(self, lin: Linearization, target: int) -> "Scope":
        """The same question about this token, where it is about one and none was given."""
        if is_dataclass(self) and getattr(self, "target", 0) is None and self.explained(lin)[0] is not None:
            return replace(self, target=target)
        return self

    def caveat(self, answers: Sequence[Attribution]) -> str | None:
        """What to warn of, once for all the answers of a call; None where there is nothing."""
        return None

    def observable(self, lin: Linearization) -> Observable | None:
        """What the scores are about, first-order ones the slope of: a function of readout and logits, with everything
        else (the target that was most likely, a cotangent) as it is at `lin`. None where there is no such thing."""
        return None

    def measure_many(self, lins: Sequence[Linearization]) -> list[Measurement]:
        """`measure` for several linearisations of one forward pass."""
        return [self.measure(lin) for lin in lins]

    def __init_subclass__(cls) -> None:
        # Before @dataclass, which writes a repr only where there is none: with every default, and tensors in full.
        if "__repr__" not in vars(cls):
            cls.__repr__ = cls.__repr__  # type: ignore[method-assign]

    def __repr__(self) -> str:
        return as_written(self) if is_dataclass(self) else super().__repr__()

    def __call__(self, lin: Linearization) -> Attribution:
        """Ask the question.

        Raises:
            TypeError: for what is no Linearization, a model say. Else as the scope does.
        """
        if not isinstance(lin, Linearization):
            raise TypeError(
                f"a scope is asked of a Linearization, got {type(lin).__name__}: write "
                "attribute(model, prompt, scope), or scope(linearize(model, prompt))."
            )
        answers = self.ask([lin])
        warn(self, answers)
        return answers[0]

    def ask(self, lins: Sequence[Linearization]) -> list[Attribution]:
        """Ask it of several linearisations of one forward pass, together where the scope can."""
        # First, so that a target that is unknown is refused before the work.
        explained = [self.explained(lin) for lin in lins]
        own = without_graphs(self)
        return [
            self._answer(lin, *tokens, measurement, own)
            for lin, tokens, measurement in zip(lins, explained, self.measure_many(lins), strict=True)
        ]

    def _answer(
        self, lin: Linearization, target: Token | None, versus: Token | None, measurement: Measurement, own: "Scope"
    ) -> Attribution:
        predictions: tuple[Prediction, ...] = ()
        if lin.trace.logits is not None:
            best = lin.log_probs.exp().topk(min(5, len(lin.log_probs)))
            predictions = tuple(
                Prediction(lin.token(id), p) for id, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            )
        dtype = torch.float64 if lin.readout.dtype == torch.float64 else torch.float32
        if not isinstance(measurement, Measurement):
            raise TypeError(
                f"measure of {as_written(self)} must give a Measurement, got {type(measurement).__name__}: "
                "write Measurement(scores)."
            )
        scores = measurement.scores
        if not isinstance(scores, Tensor) or scores.shape != lin.tokens.shape:
            got = f"shape {list(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(
                f"{as_written(self)} must give one score per token, a tensor of shape [{len(lin.tokens)}], got {got}."
            )
        return Attribution(
            scores=scores.detach().to("cpu", dtype),
            tokens=lin.tokens.cpu(),
            str_tokens=lin.str_tokens,
            positions=tuple(range(len(lin.tokens))),
            position=lin.position,
            target=target,
            versus=versus,
            scope=as_written(self),
            unit=self.unit(lin),
            predictions=predictions,
            wrt=lin.wrt,
            of=lin.of,
            model=models.model_name(lin.model),
            dtype=str(lin.readout.dtype).removeprefix("torch."),
            notes=self.notes(lin),
            details={
                name: value.detach().to("cpu", dtype if value.is_floating_point() else value.dtype)
                if isinstance(value, Tensor)
                else value
                for name, value in measurement.details.items()
            },
            _origin=Origin.of(lin, own),
        )


def warn(scope: Scope, answers: Sequence[Attribution]) -> bool:
    """Warn of what the scope has to say of these answers, and tell whether there was anything."""
    caveat = scope.caveat(answers)
    if caveat is not None:
        warnings.warn(caveat, stacklevel=3)
    return caveat is not None


class JacobianScope(Scope):
    """A first-order scope: the norms of cᵀJ_t for some cotangents c of the readout,

        score_t = √(Σ_c ‖cᵀ J_t‖²),

    for one cotangent the size of a gradient. It needs `cotangents` and `unit`; several prompts and positions go
    through the network together.

    Source: Liu et al. 2026 (arXiv:2601.16407), section 2.
    """

    @abstractmethod
    def cotangents(self, lin: Linearization) -> Float[Tensor, "probe d_of"]:
        """The directions of the readout that the question is about."""

    def observable(self, lin: Linearization) -> Observable | None:
        """c·y for every cotangent c."""
        cotangents = self.cotangents(lin)
        return lambda readout, logits: cotangents.to(readout) @ readout

    def combine(self, lin: Linearization, squared_norms: Float[Tensor, "probe token"]) -> Measurement:
        """From ‖cᵀJ_t‖² to scores."""
        return Measurement(squared_norms.sum(0).sqrt())

    def measure(self, lin: Linearization) -> Measurement:
        """The scores of one prompt."""
        return self.measure_many([lin])[0]

    def measure_many(self, lins: Sequence[Linearization]) -> list[Measurement]:
        """The scores of several prompts or positions, which go back through the network together."""
        cotangents = [self.cotangents(lin) for lin in lins]
        for lin, of_one in zip(lins, cotangents, strict=True):
            if not isinstance(of_one, Tensor) or of_one.shape[1:] != lin.readout.shape:
                got = f"shape {list(of_one.shape)}" if isinstance(of_one, Tensor) else type(of_one).__name__
                raise ValueError(
                    f"the cotangents of {as_written(self)} must have the shape [probe d_of] = "
                    f"[any number, {len(lin.readout)}], got {got}."
                )
        norms = squared_norms(lins, cotangents)
        return [self.combine(lin, of_one) for lin, of_one in zip(lins, norms, strict=True)]


@dataclass(frozen=True, eq=False)
class TargetScope(Scope):
    """A question about one token's logit z_v; with `versus` about z_v − z_u; with quantity="log_prob" about log p_v."""

    target: str | SupportsIndex | None = None
    versus: str | SupportsIndex | None = None
    quantity: Literal["logit", "log_prob"] = "logit"

    def __post_init__(self) -> None:
        for name in ("target", "versus"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                with suppress(TypeError):  # a number of NumPy's or a tensor's is shown as the number that it is
                    object.__setattr__(self, name, models.as_int(value, name))
        if self.quantity not in ("logit", "log_prob"):
            raise ValueError(f'quantity is "logit" or "log_prob", got {self.quantity!r}.')

    def explained(self, lin: Linearization) -> tuple[Token, Token | None]:
        """The target, by default the most likely token, and the token it is compared with."""
        target, versus = lin.token(self.target), None if self.versus is None else lin.token(self.versus)
        if target == versus:
            raise ValueError(f"target and versus are the same token, {target.text!r}: their difference is zero.")
        return target, versus

    def function(self, lin: Linearization) -> Callable[[Tensor], Tensor]:
        """What is explained, as a function of the logits [vocab]."""
        target, versus = self.explained(lin)

        def explained(logits: Float[Tensor, " vocab"]) -> Tensor:
            values = logits if self.quantity == "logit" else logits.log_softmax(-1)
            return values[target.id] - (values[versus.id] if versus else 0)

        return explained

    def observable(self, lin: Linearization) -> Observable:
        """`function`, which reads the logits alone."""
        function = self.function(lin)
        return lambda readout, logits: function(logits)

    @property
    def quantity_unit(self) -> str:
        """The unit of what is explained."""
        return "logit" if self.quantity == "logit" else "nat"

    def notes(self, lin: Linearization) -> tuple[str, ...]:
        """Say so when the logits are not the model's own."""
        if self.quantity == "logit" and self.versus is None and is_centered(lin):
            return ("the unembedding is centred: the logit explained is the logit minus the vocabulary mean",)
        return ()


def as_written(scope: Scope) -> str:
    """A scope in Python, without what is as by default; of tensors the shape and the norm."""
    if not is_dataclass(scope):
        return repr(scope)
    values = {f.name: (getattr(scope, f.name), f.default) for f in fields(scope) if f.repr}
    given = {n: value for n, (value, default) in values.items() if isinstance(value, Tensor) or value != default}
    return f"{type(scope).__name__}({', '.join(f'{name}={_shown(value)}' for name, value in given.items())})"


def _shown(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    size = "×".join(map(str, value.shape))
    return f"<{size} tensor of norm {float(value.detach().cpu().double().norm()):.3g}>"
