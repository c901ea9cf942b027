"""A `Scope` is a question: asked of a `Linearization`, it gives an `Attribution`."""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from contextlib import suppress
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, NamedTuple, SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor

from tl_scopes import models
from tl_scopes.jacobian.linearization import Linearization, squared_norms
from tl_scopes.jacobian.metric import Metric
from tl_scopes.jacobian.softmax import log_prob
from tl_scopes.jacobian.tensor_arguments import require_real
from tl_scopes.models import Token
from tl_scopes.results.attribution import Attribution, Prediction

_PREDICTIONS = 5


@dataclass(frozen=True, eq=False)
class Measurement:
    """What a scope finds at one prompt."""

    scores: Float[Tensor, "token"]
    """One number per token."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What else is worth keeping: tensors with the tokens on their last axis; numbers, texts, and lists of these. They
    become `Attribution.details`."""


class Estimate(NamedTuple):
    """How well estimated scores are known."""

    relative_error: float
    """The error of the largest score, as a part of that score; infinite where it is not known."""
    finding: str
    """A sentence that says so."""


class Scope(ABC):
    """A question about a linearised prediction: call it on a `Linearization` to get an `Attribution`.

    A scope of your own is a frozen dataclass whose fields are its options. It needs two methods: `measure`, its
    equation, and `unit`. Where the question is the gradient of a number that is computed from the prediction, derive it
    from `JacobianScope`, which needs `cotangents` in place of `measure`.

    A scope also says what kind of number its scores are: `metric`, `is_slope`, `saturates`, `depends_on_basis`,
    `depends_on_mean_logit` and `estimate`. That is all that `tl_scopes.check` knows about it.
    """

    @abstractmethod
    def measure(self, lin: Linearization) -> Measurement:
        """The scope's equation: one number per token."""

    @abstractmethod
    def unit(self, lin: Linearization) -> str:
        """The unit of a score."""

    def measure_many(self, lins: Sequence[Linearization]) -> list[Measurement]:
        """`measure` for several linearisations of one forward pass."""
        return [self.measure(lin) for lin in lins]

    # -- what the scores are about ------------------------------------------------------------------------------------

    def explained(self, lin: Linearization) -> tuple[Token | None, Token | None]:
        """The target, and the token that it is compared with; None where the question has none."""
        return None, None

    def aimed(self, lin: Linearization, target: int) -> "Scope":
        """The same question about this target, where it has one that was left to the prediction."""
        if is_dataclass(self) and getattr(self, "target", 0) is None and self.explained(lin)[0] is not None:
            return replace(self, target=target)
        return self

    def metric(self, lin: Linearization) -> Metric | None:
        """The quantity that the scores are about, as a function of readout and logits; None where there is none.

        What it depends on beside these, such as the target that was most likely or a cotangent, stays as it is at
        `lin`.
        """
        return None

    # -- what kind of number a score is -------------------------------------------------------------------------------

    @property
    def is_slope(self) -> bool:
        """Whether scores are slopes of `metric` at the prompt, so that they predict its change under small moves."""
        return True

    @property
    def saturates(self) -> bool:
        """Whether scores shrink where a sure prediction has flattened the gradients at the prompt."""
        return True

    @property
    def runs_again(self) -> Literal["no", "point", "prompt"]:
        """What the scope has to run the model on again: nothing, points near the linearisation's, or the prompt itself.

        It is refused then when the model's hooks or weights have changed since it was linearised; and where the prompt
        itself is run, at a point that `Linearization.at` moved to.
        """
        return "no"

    @property
    def depends_on_basis(self) -> bool:
        """Whether scores depend on the coordinates of the readout, which folding the final norm's gain changes."""
        return False

    @property
    def depends_on_mean_logit(self) -> bool:
        """Whether scores depend on the mean of all logits, which centring the unembedding sets to zero."""
        return False

    def estimate(self, answer: Attribution) -> Estimate | None:
        """How well the scores of an answer to this question are known; None where nothing was estimated.

        Unless a scope says otherwise, the detail "standard_error" tells.
        """
        error = answer.details.get("standard_error")
        return None if error is None else estimate_by(answer, error, "standard error")

    def notes(self, lin: Linearization) -> tuple[str, ...]:
        """Sentences that a reader of the scores should know."""
        return ()

    def caveat(self, answers: Sequence[Attribution]) -> str | None:
        """A warning about these answers, given once for all answers of a call; None where nothing is amiss."""
        return None

    # -- asking it ----------------------------------------------------------------------------------------------------

    def __init_subclass__(cls) -> None:
        # This runs before @dataclass, which writes a repr only where there is none. Its own would show every default,
        # and tensors in full.
        if "__repr__" not in vars(cls):
            cls.__repr__ = cls.__repr__  # type: ignore[method-assign]

    def __repr__(self) -> str:
        return as_written(self) if is_dataclass(self) else super().__repr__()

    def __call__(self, lin: Linearization) -> Attribution:
        """Ask the question.

        Raises:
            TypeError: for something that is not a Linearization, such as a model. Else as the scope does.
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
        # The targets come first, so that an unknown one is refused before the work.
        explained = [self.explained(lin) for lin in lins]
        for lin in lins:
            self._require_model(lin)
        found = self.measure_many(lins)
        return [self._answer(lin, *tokens, one) for lin, tokens, one in zip(lins, explained, found, strict=True)]

    def _answer(
        self, lin: Linearization, target: Token | None, versus: Token | None, found: Measurement
    ) -> Attribution:
        self._require_valid(lin, found)
        dtype = _kept_dtype(lin, found.scores)
        return Attribution(
            scores=_kept(found.scores, dtype),
            tokens=lin.tokens.cpu(),
            str_tokens=lin.str_tokens,
            positions=tuple(range(len(lin.tokens))),
            position=lin.position,
            target=target,
            versus=versus,
            scope=as_written(self),
            unit=self.unit(lin),
            predictions=most_likely(lin),
            wrt=lin.wrt,
            of=lin.of,
            model=models.model_name(lin.model),
            dtype=str(lin.readout.dtype).removeprefix("torch."),
            notes=(*lin.notes, *self.notes(lin)),
            details={name: _kept(value, dtype) for name, value in found.details.items()},
        )

    def _require_model(self, lin: Linearization) -> None:
        """Refuse a model that would compute something else now, where the scope runs it again.

        Raises:
            ValueError: then, see `runs_again`.
        """
        if self.runs_again == "prompt":
            lin.require_repeatable()
        elif self.runs_again == "point":
            lin.require_unchanged()

    def _require_valid(self, lin: Linearization, found: object) -> None:
        """Refuse what `measure` of a user's own scope may give by mistake.

        Raises:
            TypeError: for something that is not a Measurement; for a detail that could not be saved.
            ValueError: for scores that are not one real number per token.
        """
        if not isinstance(found, Measurement):
            raise TypeError(
                f"measure of {as_written(self)} must give a Measurement, got {type(found).__name__}: "
                "write Measurement(scores)."
            )
        unit = self.unit(lin)
        if not isinstance(unit, str):
            raise TypeError(f"the unit of {as_written(self)} must be a text, got {unit!r}.")
        scores = found.scores
        if not isinstance(scores, Tensor) or scores.shape != lin.tokens.shape:
            got = f"shape {list(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(
                f"{as_written(self)} must give one score per token, a tensor of shape [{len(lin.tokens)}], got {got}."
            )
        require_real(scores, f"the scores of {as_written(self)}", "[token]")
        for name, value in found.details.items():
            if isinstance(value, Tensor):
                require_real(value, f"the detail {name!r} of {as_written(self)}", "[... token]")
            elif not _can_be_kept(value):
                raise TypeError(
                    f"the detail {name!r} of {as_written(self)} is a {type(value).__name__}, which an answer cannot "
                    "keep: make it a tensor with the tokens on its last axis, a number, a text, or a list of these."
                )


class JacobianScope(Scope):
    """A first-order scope: the norms of cᵀJ_t for some cotangents c of the readout,

        score_t = √(Σ_c ‖cᵀ J_t‖²),

    for one cotangent the size of a gradient. It needs `cotangents` and `unit`; several prompts and positions go
    through the network together. Where the question is about a number f of the logits, `lin.cotangent(f)[None]` is its
    cotangent; give it the `metric` f as well, so that the checks measure f, and not its first order at the prompt.

    Source: Liu et al. 2026 (arXiv:2601.16407), section 2.
    """

    @abstractmethod
    def cotangents(self, lin: Linearization) -> Float[Tensor, "probe d_of"]:
        """The directions of the readout that the question is about."""

    def metric(self, lin: Linearization) -> Metric | None:
        """c·y for every cotangent c, with the cotangents of this point."""
        cotangents = self.cotangents(lin)
        return lambda readout, logits: cotangents.to(readout) @ readout

    def combine(self, lin: Linearization, squared_norms: Float[Tensor, "probe token"]) -> Measurement:
        """√(Σ_c ‖cᵀJ_t‖²)."""
        return Measurement(squared_norms.sum(0).sqrt())

    def measure(self, lin: Linearization) -> Measurement:
        return self.measure_many([lin])[0]

    def measure_many(self, lins: Sequence[Linearization]) -> list[Measurement]:
        if type(self).measure is not JacobianScope.measure:  # a scope of the user's with an equation of its own
            return [self.measure(lin) for lin in lins]
        cotangents = [self._checked_cotangents(lin) for lin in lins]
        norms = squared_norms(lins, cotangents)
        return [self.combine(lin, of_one) for lin, of_one in zip(lins, norms, strict=True)]

    def _checked_cotangents(self, lin: Linearization) -> Tensor:
        found = self.cotangents(lin)
        if not isinstance(found, Tensor) or found.shape[1:] != lin.readout.shape:
            got = f"shape {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"the cotangents of {as_written(self)} must have the shape [probe d_of] = "
                f"[any number, {len(lin.readout)}], got {got}."
            )
        require_real(found, f"the cotangents of {as_written(self)}", "[probe d_of]")
        return found


@dataclass(frozen=True, eq=False)
class TargetScope(Scope):
    """A question about one token's logit z_v; with `versus` about z_v − z_u; with quantity="log_prob" about log p_v.

    A difference of log-probabilities is a difference of logits, so that with `versus` both quantities are the same.
    """

    target: str | SupportsIndex | None = None
    versus: str | SupportsIndex | None = None
    quantity: Literal["logit", "log_prob"] = "logit"

    def __post_init__(self) -> None:
        for name in ("target", "versus"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                with suppress(TypeError):  # a number of NumPy or torch is shown as the number that it is
                    object.__setattr__(self, name, models.as_int(value, name))
        if self.quantity not in ("logit", "log_prob"):
            raise ValueError(f'quantity is "logit" or "log_prob", got {self.quantity!r}.')

    def explained(self, lin: Linearization) -> tuple[Token, Token | None]:
        """The target, by default the most likely token, and the token that it is compared with.

        Raises:
            ValueError: for a token that is unknown or several, and for `versus` equal to the target.
        """
        target = lin.token(self.target)
        versus = None if self.versus is None else lin.token(self.versus, "versus")
        if target == versus:
            raise ValueError(f"target and versus are the same token, {target.text!r}: their difference is zero.")
        return target, versus

    def function(self, lin: Linearization) -> Callable[[Tensor], Tensor]:
        """The quantity explained, as a function of the logits [vocab]."""
        target, versus = self.explained(lin)
        if versus is not None:
            return lambda logits: logits[target.id] - logits[versus.id]
        if self.quantity == "log_prob":
            return lambda logits: log_prob(logits, target.id)
        return lambda logits: logits[target.id]

    def metric(self, lin: Linearization) -> Metric:
        """`function`, which does not look at the readout."""
        function = self.function(lin)
        return lambda readout, logits: function(logits)

    @property
    def quantity_unit(self) -> str:
        """The unit of the quantity explained."""
        return "logit" if self.quantity == "logit" else "nat"

    @property
    def depends_on_mean_logit(self) -> bool:
        """A single logit does. A difference of logits and a log-probability do not."""
        return self.quantity == "logit" and self.versus is None

    def notes(self, lin: Linearization) -> tuple[str, ...]:
        if self.depends_on_mean_logit and lin.is_centered:
            return ("the unembedding is centred: the logit explained is the logit minus the vocabulary mean",)
        return ()


def estimate_by(answer: Attribution, error: Float[Tensor, "token"], kind: str) -> Estimate | None:
    """How well the largest score is known, from an error per token of this kind; None where no token has an error."""
    if not error.any():
        return None
    first = answer.top(1)[0]
    relative = float(error[answer.positions.index(first.position)]) / (abs(first.score) or 1.0)
    if not math.isfinite(relative):
        return Estimate(relative, "how far off the scores are is not known: give the scope more probes")
    return Estimate(relative, f"the score of {first.token!r} is known to {relative:.1%} ({kind})")


def most_likely(lin: Linearization, count: int = _PREDICTIONS) -> tuple[Prediction, ...]:
    """The most likely next tokens, best first; empty where the linearisation ends before the logits."""
    if lin.trace.logits is None:
        return ()
    best = lin.log_probs.exp().topk(min(count, len(lin.log_probs)))
    return tuple(
        Prediction(lin.token(id), p) for id, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    )


def how_often(missed: Sized, answers: Sized) -> str:
    """The end of a warning about the worst of several answers: how many others it is about."""
    if len(answers) == 1:
        return ""
    return f" This is the worst of {len(missed)} such predictions, of {len(answers)} in all."


def warn(scope: Scope, answers: Sequence[Attribution]) -> bool:
    """Warn of what the scope has to say about these answers, and return whether there was anything."""
    caveat = scope.caveat(answers)
    if caveat is not None:
        warnings.warn(caveat, stacklevel=3)
    return caveat is not None


def require_scope(scope: object) -> None:
    """Refuse what is not a scope.

    Raises:
        TypeError: with a hint where it is a scope's class.
    """
    if not isinstance(scope, Scope):
        hint = f": write {scope.__name__}()" if isinstance(scope, type) else ""
        raise TypeError(f"expected a scope such as SemanticScope(), got {scope!r}{hint}.")


def names(scopes: Scope | Iterable[Scope] | Mapping[str, Scope]) -> dict[str, Scope]:
    """Scopes by name: the names that were given, or else the scopes as they are written.

    Raises:
        ValueError: when there are no scopes, or two of the same name.
        TypeError: for something that is not a scope.
    """
    given = scopes.values() if isinstance(scopes, Mapping) else scopes
    listed = list(given) if isinstance(given, Iterable) else [given]
    if not listed:
        raise ValueError("there are no scopes to evaluate: give one at least, [SemanticScope()] say.")
    for scope in listed:
        require_scope(scope)
    if isinstance(scopes, Mapping):
        return dict(scopes)
    named = {as_written(scope): scope for scope in listed}
    if len(named) < len(listed):
        raise ValueError(f"there are {len(listed)} scopes and {len(named)} names: name them, in a dict.")
    return named


def as_written(scope: Scope) -> str:
    """A scope as it is written in Python, without options that have their defaults; tensors as shape and norm."""
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


def _kept(value: Any, dtype: torch.dtype) -> Any:
    """A value as an answer keeps it: a tensor without its graph, on the CPU, floats in the precision of the scores."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().to("cpu", dtype if value.is_floating_point() else value.dtype)


def _kept_dtype(lin: Linearization, scores: Tensor) -> torch.dtype:
    """float32; float64 for a float64 model, and for scores that float32 cannot hold with all digits."""
    held = torch.finfo(torch.float32)
    largest = float(scores.detach().abs().max()) if len(scores) else 0.0
    if lin.readout.dtype == torch.float64 or 0 < largest < held.tiny / held.eps or held.max < largest < math.inf:
        return torch.float64
    return torch.float32


def _can_be_kept(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_can_be_kept, value))
    return value is None or isinstance(value, str | bool | int | float)
