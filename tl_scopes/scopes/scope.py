"""A `Scope` is a question: asked of a `Linearization`, it gives an `Attribution`."""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set, Sized
from contextlib import suppress
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, NamedTuple, SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor

from tl_scopes import models
from tl_scopes.jacobian.linearization import Linearization, squared_norms
from tl_scopes.jacobian.metric import Metric
from tl_scopes.jacobian.softmax import log_prob, log_prob_of_any
from tl_scopes.jacobian.span import Exchange, Span, linearize_answers
from tl_scopes.jacobian.tensor_arguments import require_real
from tl_scopes.models import Target, Token
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

    def explained(self, lin: Linearization) -> tuple[Target | None, Target | None]:
        """The target, and what it is compared with; None where the question has none."""
        return None, None

    def with_target(self, lin: Linearization, target: int) -> "Scope":
        """The same question about this target, where it has one that was left to the prediction."""
        if isinstance(lin, Span):
            return self  # what is said is what is explained
        if is_dataclass(self) and getattr(self, "target", 0) is None and self.explained(lin)[0] is not None:
            return replace(self, target=target)
        return self

    def named_targets(self, model: models.Model, vocab: int | None = None) -> tuple[Target | None, Target | None]:
        """The target and what it is compared with, as far as the scope itself names them.

        Args:
            model: a checked model.
            vocab: how many logits it has; None is as many as it has token ids.
        """
        return None, None

    def quantity_explained(self, lin: Linearization) -> str | None:
        """What `value` is, as a formula or in words: "log p(' Paris')"; None where it has no name."""
        return None

    def value(self, lin: Linearization) -> float | None:
        """The number that the scores are about, where `metric` is one: a logit, a log-probability."""
        metric = self.metric(lin)
        logits = lin.readout[:0] if lin.trace.logits is None else lin.logits
        found = None if metric is None else metric(models.precise(lin.readout), models.precise(logits))
        return float(found) if found is not None and found.numel() == 1 else None

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
    def asks_for_mean(self) -> bool:
        """Whether the mean embedding of the vocabulary was left out of its option `mean`, and is computed at each
        prompt: what asks many prompts can hand it in."""
        return False

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

    def depends_on_mean_logit(self, lin: Linearization) -> bool:
        """Whether scores depend on the mean of all logits, which centring the unembedding sets to zero."""
        return False

    @property
    def takes_spans(self) -> bool:
        """Whether it can be asked about all predictions of an answer together, a `Span`."""
        return False

    @property
    def compares(self) -> bool:
        """Whether it can be asked about the difference of two answers."""
        return False

    @property
    def grouping(self) -> Literal["norm", "sum", "signed"] | None:
        """What the score of several tokens together is: √Σ score² for norms, whose gradients are written one after
        another; Σ score; for sizes of signed numbers |Σ signed|, with the detail "signed"; None where it is not known
        from the scores of the tokens.
        """
        return None

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
        if not self.takes_spans and all(isinstance(lin, Span) and len(lin.rows) == 1 for lin in lins):
            # A prediction of an answer is a prediction, of which it is known what is to be explained.
            for lin in lins:
                self.with_answer(lin)  # says so where the question names another target
            asked = [(self.with_target(lin.single[0], lin.answer.tokens[0].id), lin.single[0]) for lin in lins]  # type: ignore[attr-defined]
            return [answer for scope, lin in asked for answer in scope.ask([lin])]
        # The targets come first, so that an unknown one is refused before the work.
        answered = [self.with_answer(lin) for lin in lins]
        if any(one is not lin for one, lin in zip(answered, lins, strict=True)) and len(lins) > 1:
            return [answer for lin in lins for answer in self.ask([lin])]  # they no longer share a forward pass
        lins = answered
        explained = [targets_of(self, lin) for lin in lins]
        for lin in lins:
            self._require_model(lin)
            self._require_single(lin)
        found = self.measure_many(lins)
        return [self._answer(lin, *tokens, one) for lin, tokens, one in zip(lins, explained, found, strict=True)]

    def exchange(
        self,
        model: models.Model,
        read: models.ReadPrompt,
        answer: Target | None = None,
        against: Target | None = None,
        vocab: int | None = None,
    ) -> Exchange | None:
        """The prompt and what is said after it that the question is about: an answer that is given, or the target that
        the scope names, where that or what it is compared with is several tokens. It is None where the question is
        about the next prediction.

        Args:
            model: a checked model.
            read: the prompt.
            answer, against: what is said after it, and what that is compared with; None where neither is given.
            vocab: how many logits the model has; None is as many as it has token ids.

        Raises:
            ValueError: where the scope names another target, or another one to compare with, than is given; and as
                `Exchange.of` does.
        """
        own = self.named_targets(model, vocab)
        for named, given in zip(own, (answer, against), strict=True):
            if named is not None and given is not None and named != given:
                raise ValueError(
                    f"{as_written(self)} asks about {named.text!r}, and what is given to be explained after the "
                    f"prompt is {given.text!r}: leave one of them out."
                )
        notes = tuple(
            note
            for name, named, given in zip(("target", "versus"), own, (answer, against), strict=True)
            if named is not None and named.is_span and given is None
            for note in models.where_they_meet(model, read.tokens, named, name)
        )
        named, versus = answer or own[0], against or own[1]
        if named is None or not (answer is not None or named.is_span or (versus is not None and versus.is_span)):
            return None
        return Exchange.of(model, read._replace(notes=read.notes + notes), named, versus)

    def with_answer(self, lin: Linearization) -> Linearization:
        """The linearisation that the question is about, where it names an answer of several tokens that has to be put
        behind the prompt first, which takes a forward pass; else the one given.

        Raises:
            ValueError: when the model's hooks or weights have changed since it was linearised; when the linearisation
                is of another answer than the one that the question names.
        """
        said, against, length, score_answer = None, None, len(lin.tokens), False
        if isinstance(lin, Span):
            said, against, length, score_answer = lin.answer, lin.against, lin.prompt_length, lin.score_answer
        target, versus = self.named_targets(lin.model, lin.vocab)
        if said is None and target is None and versus is not None and versus.is_span:
            said = Target((lin.token(),))
        read = models.ReadPrompt(lin.tokens[:length], lin.notes, lin.parts)
        exchange = self.exchange(lin.model, read, said, against, lin.vocab)
        if exchange is None or not exchange.is_span or (isinstance(lin, Span) and exchange.against == against):
            return lin
        lin.require_repeatable()
        lin.require_readout()
        options: dict[str, Any] = {"checkpoint": lin.trace.checkpointed, "rules": lin.rules}
        (span,) = linearize_answers(lin.model, [exchange], lin.wrt, lin.of, score_answer=score_answer, **options)
        span.require_finite()
        return span

    def _require_single(self, lin: Linearization) -> None:
        """Refuse an answer of several tokens where the question is about one prediction.

        Raises:
            ValueError: with what to do instead.
        """
        if isinstance(lin, Span) and lin.against is not None and not self.compares:
            raise ValueError(
                f"{as_written(self)} does not compare two answers, and this is {lin.answer.text!r} against "
                f"{lin.against.text!r}: linearise each of them."
            )
        if isinstance(lin, Span) and not self.takes_spans:
            raise ValueError(
                f"{as_written(self)} is about one prediction at a time, and this is the answer {lin.answer.text!r} of "
                f"{len(lin.answer)} tokens: ask it of each, [scope(one) for one in lin.single]."
            )

    def _answer(
        self, lin: Linearization, target: Target | None, versus: Target | None, found: Measurement
    ) -> Attribution:
        self._require_valid(lin, found)
        return self._recorded(lin, target, versus, found, self.value(lin), self.quantity_explained(lin))

    def _recorded(
        self,
        lin: Linearization,
        target: Target | None,
        versus: Target | None,
        found: Measurement,
        value: float | None,
        quantity: str | None,
    ) -> Attribution:
        scored = lin.scored
        dtype = _kept_dtype(lin, found.scores[:scored])
        details = {
            name: value[..., :scored] if isinstance(value, Tensor) else value for name, value in found.details.items()
        }
        return Attribution(
            scores=_kept(found.scores[:scored], dtype),
            tokens=lin.tokens[:scored].cpu(),
            str_tokens=lin.str_tokens[:scored],
            positions=tuple(range(scored)),
            **circumstances(self, lin),
            target=lin.answer if target is None and isinstance(lin, Span) else target,
            versus=versus,
            predictions=most_likely(lin),
            wrt=lin.wrt,
            parts=(*lin.parts, *["answer"] * scored)[:scored] if lin.parts else (),
            grouping=self.grouping,
            details={name: _kept(value, dtype) for name, value in details.items()},
            value=value,
            quantity=quantity,
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
        cotangents = self.joint_cotangents(lin)
        return lambda readout, logits: cotangents.to(readout) @ readout

    def value(self, lin: Linearization) -> float | None:
        """None where no metric is given: c·y changes with the prompt as the cotangents c do, and is not a quantity."""
        return None if type(self).metric is JacobianScope.metric else super().value(lin)

    def combine(self, lin: Linearization, squared_norms: Float[Tensor, "probe token"]) -> Measurement:
        """√(Σ_c ‖cᵀJ_t‖²)."""
        return Measurement(squared_norms.sum(0).sqrt())

    def measure(self, lin: Linearization) -> Measurement:
        return self.measure_many([lin])[0]

    def measure_many(self, lins: Sequence[Linearization]) -> list[Measurement]:
        if type(self).measure is not JacobianScope.measure:  # a scope of the user's with an equation of its own
            return [self.measure(lin) for lin in lins]
        cotangents = self._cotangents_of(lins)
        norms = squared_norms(lins, cotangents)
        return [self.combine(lin, of_one) for lin, of_one in zip(lins, norms, strict=True)]

    @property
    def takes_spans(self) -> bool:
        return True

    @property
    def grouping(self) -> Literal["norm", "sum", "signed"] | None:
        own = type(self).combine is not JacobianScope.combine or type(self).measure is not JacobianScope.measure
        return None if own else "norm"

    def _cotangents_of(self, lins: Sequence[Linearization]) -> list[Tensor]:
        """The cotangents of several linearisations of one forward pass, which a scope may find together."""
        return [self.joint_cotangents(lin) for lin in lins]

    _knows_spans = False
    """Whether `cotangents` takes a Span itself; else it is asked about each prediction of it."""

    def joint_cotangents(self, lin: Linearization) -> Float[Tensor, "probe d_of"]:
        """`cotangents`, checked, and for a span of several predictions those of all of them together.

        Raises:
            ValueError: for cotangents of another shape; for a span where there are several for one prediction.
            TypeError: for something that is not a tensor.
        """
        if isinstance(lin, Span) and not self._knows_spans:
            return self._joined(lin)
        found = self.cotangents(lin)
        if not isinstance(found, Tensor) or found.shape[1:] != lin.readout.shape:
            got = f"shape {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"the cotangents of {as_written(self)} must have the shape [probe d_of] = "
                f"[any number, {len(lin.readout)}], got {got}."
            )
        require_real(found, f"the cotangents of {as_written(self)}", "[probe d_of]")
        return found

    def _joined(self, span: Span) -> Float[Tensor, "1 d_of"]:
        """One cotangent of the span: that of each prediction in it, so that their gradients are summed.

        Raises:
            ValueError: for a question that has several cotangents at one prediction, whose norms would not add up.
        """
        each = [self.joint_cotangents(one) for one in span.single]
        if any(len(found) != 1 for found in each):
            raise ValueError(
                f"{as_written(self)} has {max(map(len, each))} cotangents at one prediction, and how those of several "
                "predictions belong together is not known: ask it of each, [scope(one) for one in lin.single]."
            )
        return torch.cat(each, dim=1)


@dataclass(frozen=True, eq=False)
class TargetScope(Scope):
    """A question about what is said: about one token's logit z_v, or about the log-probability of several tokens,

        S = Σ_k log p(v_k | prompt, v_1 … v_{k−1})

    With `versus` it is about a difference: z_v − z_u for two tokens, S_v − S_u for longer texts, which may differ in
    length. A difference of log-probabilities of two tokens is a difference of logits, so that there both quantities are
    the same.

    A target may be text, an id, a list of ids, or a set of tokens any of which is meant: then it is log Σ_v exp z_v.
    Where nothing else is said, one token is explained by its logit, as in the paper, and several by S.
    """

    target: str | SupportsIndex | Collection[Any] | None = None
    versus: str | SupportsIndex | Collection[Any] | None = None
    quantity: Literal["logit", "log_prob"] | None = None

    def __post_init__(self) -> None:
        for name in ("target", "versus"):
            value = getattr(self, name)
            if isinstance(value, Set):
                object.__setattr__(self, name, frozenset(value))
            elif getattr(value, "ndim", 0) or isinstance(value, list):  # of torch or NumPy
                object.__setattr__(self, name, tuple(value if isinstance(value, list) else value.tolist()))
            elif value is not None and not isinstance(value, str | tuple):
                with suppress(TypeError):  # a number of NumPy or torch is shown as the number that it is
                    object.__setattr__(self, name, models.as_int(value, name))
        if self.quantity not in (None, "logit", "log_prob"):
            raise ValueError(f'quantity is "logit" or "log_prob", got {self.quantity!r}.')

    def named_targets(self, model: models.Model, vocab: int | None = None) -> tuple[Target | None, Target | None]:
        return tuple(
            None if given is None else models.read_target(model, given, vocab, name)
            for name, given in (("target", self.target), ("versus", self.versus))
        )  # type: ignore[return-value]

    def explained(self, lin: Linearization) -> tuple[Target, Target | None]:
        """The target, by default the answer linearised, or else the most likely token; and what it is compared with.

        Raises:
            ValueError: for an unknown token, and for `versus` equal to the target or, of two sets, sharing a token.
        """
        lin.require_readout()
        target, versus = self.named_targets(lin.model, lin.vocab)
        if isinstance(lin, Span):
            target, versus = target or lin.answer, versus or lin.against
        else:
            target = target or Target((lin.token(),))
            for one in (target, versus):
                if one is not None and one.is_span:
                    raise ValueError(
                        f"{one.text!r} is {len(one)} tokens, which are predicted at several positions, and this "
                        "linearisation is of one prediction: linearise with answer=, or call attribute."
                    )
        if versus is not None and set(target.ids) & set(versus.ids) and not (target.is_span or versus.is_span):
            same = next(token for token in target.tokens if token in versus.tokens)
            raise ValueError(
                f"target and versus are the same token, {same.text!r}: their difference is zero. {self._remedy(lin)}"
            )
        if target == versus:
            raise ValueError(
                f"target and versus are the same tokens, {target.text!r}: their difference is zero. {self._remedy(lin)}"
            )
        if self.quantity == "logit" and (target.is_span or (versus is not None and versus.is_span)):
            longer = target if target.is_span else versus
            assert longer is not None
            hint = models.spacing_hint(lin.model, longer.text)
            raise ValueError(
                f'quantity="logit" of {longer.text!r} has no meaning: it is {len(longer)} tokens, each predicted '
                f'elsewhere, and only their log-probabilities add up. Take quantity="log_prob", the default.{hint}'
            )
        return target, versus

    def _remedy(self, lin: Linearization) -> str:
        """What to do where both are the same."""
        if self.target is not None or isinstance(lin, Span):
            return "Name another token to compare with."
        return "It is what the model finds likeliest here: name another to compare with, or a target."

    def function(self, lin: Linearization) -> Callable[[Tensor], Tensor]:
        """The quantity explained, as a function of the logits [vocab], or of those of all predictions [row vocab]."""
        target, versus = self.explained(lin)
        if isinstance(lin, Span) and len(lin.rows) > 1:
            tokens = [*lin.answer.ids, *(lin.against.ids if lin.against else ())]
            signed = list(zip(lin.signs.tolist(), tokens, strict=True))
            return lambda logits: torch.stack(
                [sign * log_prob(z, id) for z, (sign, id) in zip(logits, signed, strict=True)]
            ).sum()
        of_one = self._function_of_one(target, versus, self.quantity_of(lin))
        return (lambda logits: of_one(logits[0])) if isinstance(lin, Span) else of_one

    def _function_of_one(
        self, target: Target, versus: Target | None, quantity: Literal["logit", "log_prob"]
    ) -> Callable[[Tensor], Tensor]:
        if versus is not None:
            return lambda logits: _logit(logits, target) - _logit(logits, versus)
        if quantity == "log_prob":
            if target.any_of:
                return lambda logits: log_prob_of_any(logits, target.ids)
            return lambda logits: log_prob(logits, target.id)
        return lambda logits: _logit(logits, target)

    def metric(self, lin: Linearization) -> Metric:
        """`function`, which does not look at the readout."""
        function = self.function(lin)
        return lambda readout, logits: function(logits)

    def quantity_of(self, lin: Linearization) -> Literal["logit", "log_prob"]:
        """What is explained of the target."""
        if self.quantity is not None:
            return self.quantity
        return "log_prob" if isinstance(lin, Span) and (len(lin.rows) > 1 or lin.of_answer) else "logit"

    def quantity_unit(self, lin: Linearization) -> str:
        """The unit of the quantity explained."""
        return "logit" if self.quantity_of(lin) == "logit" else "nat"

    def quantity_explained(self, lin: Linearization) -> str:
        target, versus = self.explained(lin)
        name = "logit of {}" if self.quantity_of(lin) == "logit" else "log p({})"
        return " − ".join(name.format(repr(one.text)) for one in (target, versus) if one is not None)

    @property
    def takes_spans(self) -> bool:
        return True

    @property
    def compares(self) -> bool:
        return True

    def depends_on_mean_logit(self, lin: Linearization) -> bool:
        """A single logit does. A difference of logits and a log-probability do not."""
        against = lin.against if isinstance(lin, Span) else None
        return self.quantity_of(lin) == "logit" and self.versus is None and against is None

    def notes(self, lin: Linearization) -> tuple[str, ...]:
        notes = []
        if self.depends_on_mean_logit(lin) and lin.is_centered:
            notes.append("the unembedding is centred: the logit explained is the logit minus the vocabulary mean")
        notes += notes_on_spaces(lin, self.target, self.versus)
        noted = any(note.endswith(models.MIND_THE_SPACE) for note in (*lin.notes, *notes))
        for name, given in (("target", self.target), ("versus", self.versus)):
            if noted or not (isinstance(given, str) and isinstance(lin, Span)):
                continue
            if hint := models.spacing_hint(lin.model, given):
                steps = models.read_target(lin.model, given, lin.vocab, name).steps
                if steps > 1:
                    notes.append(f"the {name} {given!r} is explained as {steps} tokens.{hint.rstrip('.')}")
        return tuple(notes)


def _logit(logits: Float[Tensor, " vocab"], target: Target) -> Float[Tensor, ""]:
    """The logit of a token, or of a set of tokens together: log Σ_v exp z_v."""
    return logits[target.ids].logsumexp(0) if target.any_of else logits[target.id]


def circumstances(scope: Scope, lin: Linearization) -> dict[str, Any]:
    """The fields that every kind of answer has beside its numbers: what was asked, where, and with what."""
    return {
        "position": lin.position,
        "scope": as_written(scope),
        "unit": scope.unit(lin),
        "of": lin.of,
        "model": models.model_name(lin.model),
        "dtype": lin.computed_in,
        "rules": None if lin.rules is None else str(lin.rules),
        "notes": (*lin.notes, *scope.notes(lin)),
        "provenance": models.Provenance.of(lin.model, lin.trace.state.weights),
    }


def targets_of(scope: Scope, lin: Linearization) -> tuple[Target | None, Target | None]:
    """What a scope explains, and what that is compared with; a scope of the user's may name a Token, as in 0.1."""
    target, versus = (Target((one,)) if isinstance(one, Token) else one for one in scope.explained(lin))
    return target, versus


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
    first = lin.single[0]
    best = first.log_probs.exp().topk(min(count, len(first.log_probs)))
    return tuple(
        Prediction(lin.token(id), p) for id, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    )


def how_often(missed: Sized, answers: Sized) -> str:
    """The end of a warning about the worst of several answers: how many others it is about."""
    if len(answers) == 1:
        return ""
    return f" This is the worst of {len(missed)} such predictions, of {len(answers)} in all."


def ask_each(scope: Scope, lins: Sequence[Linearization]) -> list[Attribution]:
    """Ask about every prediction of a text.

    Where a prediction is the very token that it is compared with, the difference is zero whatever the prompt, and so is
    each score; a note says so. It is an error only where it is so with all.

    Raises: as the scope does.
    """
    versus = scope.named_targets(lins[0].model, lins[0].vocab)[1]
    own = [None if versus is None else _own_target(scope, lin) for lin in lins]
    others = [lin for lin, target in zip(lins, own, strict=True) if target is None or target != versus]
    asked = iter(scope.ask(others or lins))
    if not others:
        return list(asked)
    return [
        next(asked) if target is None or target != versus else _nothing(scope, lin, target)
        for lin, target in zip(lins, own, strict=True)
    ]


def _own_target(scope: Scope, lin: Linearization) -> Target | None:
    """What the prediction itself says is explained, where the scope names no target."""
    if scope.named_targets(lin.model, lin.vocab)[0] is not None:
        return None
    return lin.answer if isinstance(lin, Span) else Target((lin.token(),))


def _nothing(scope: Scope, lin: Linearization, target: Target) -> Attribution:
    """The answer about the difference of a token and itself."""
    zeros = lin.readout.new_zeros(len(lin.tokens))
    details = {"signed": zeros} if scope.grouping == "signed" else {}
    name = f"the difference of {target.text!r} and itself"
    found = scope._recorded(lin, target, target, Measurement(zeros, details), 0.0, name)
    note = f"where the prediction is {target.text!r} itself, the difference is zero, and so is each score"
    return replace(found, notes=(*found.notes, note))


def notes_on_spaces(lin: Linearization, *named: Any) -> tuple[str, ...]:
    """A note for each text, as which a scope names a token, that lacks the space with which the model would write it.

    Those of a span's answers are among the span's own notes.
    """
    if lin.trace.logits is None:
        return ()
    first = lin.single[0]
    read = [
        models.read_target(lin.model, one, lin.vocab)
        for one in named
        if isinstance(one, str) or (isinstance(one, Set) and all(isinstance(member, str) for member in one))
    ]
    known = (lin.answer, lin.against) if isinstance(lin, Span) else ()
    others = [*read, *(one for one in known if one is not None)]
    return tuple(
        note
        for one in read
        if one not in known
        for other in [next((other for other in others if other != one), None)]
        for note in models.missing_space(lin.model, first.tokens, first.logits, one, other)
    )


def caveat_of(scope: Scope, answers: Sequence[Attribution]) -> str | None:
    """What there is to warn of about these answers, once for all of them; None where nothing is amiss."""
    same = [answer for answer in answers if answer.target is not None and answer.target == answer.versus]
    asked = [answer for answer in answers if answer.target is None or answer.target != answer.versus]
    said = [scope.caveat(asked)] if asked else []
    found = [next((note for note in answer.notes if note.endswith(models.MIND_THE_SPACE)), None) for answer in asked]
    if missing := [note for note in found if note is not None]:
        more = f" So it is with {len(missing)} of {len(answers)} predictions." if len(set(missing)) > 1 else ""
        said.append(f"{missing[0]}.{more}")
    if same:
        text = same[0].target.text if same[0].target is not None else ""
        places = ", ".join(str(answer.position) for answer in same[:8]) + (", …" if len(same) > 8 else "")
        said.append(
            f"{len(same)} of {len(answers)} predictions (after position {places}) "
            f"{'is' if len(same) == 1 else 'are'} {text!r}, with which all are compared: the difference "
            "is zero there, and so is each score."
        )
    return " ".join(one for one in said if one is not None) or None


def warn(scope: Scope, answers: Sequence[Attribution]) -> bool:
    """Warn of what is amiss with these answers, and return whether there was anything."""
    caveat = caveat_of(scope, answers)
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
    given = {n: value for n, (value, default) in values.items() if getattr(value, "ndim", 0) or value != default}
    return f"{type(scope).__name__}({', '.join(f'{name}={_shown(value)}' for name, value in given.items())})"


def _shown(value: Any) -> str:
    if isinstance(value, frozenset):
        return "{" + ", ".join(sorted(map(repr, value))) + "}"
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
