"""Scopes that explain a target: the logit of a token, the log-probability of a text, or the difference of two."""

from collections.abc import Callable, Collection, Set
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal, SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor

from tl_scopes import models
from tl_scopes.jacobian.linearization import Linearization
from tl_scopes.jacobian.metric import Metric
from tl_scopes.jacobian.softmax import log_prob, log_prob_of_any
from tl_scopes.jacobian.span import Span
from tl_scopes.models import Target
from tl_scopes.scopes.scope import Scope
from tl_scopes.scopes.spaces import notes_on_spaces


@dataclass(frozen=True, eq=False)
class TargetScope(Scope):
    """A question about what is said: about one token's logit z_v, or about the log-probability of several tokens,

        S = Σ_k log p(v_k | prompt, v_1 … v_{k−1})

    With `versus` it is about a difference: z_v − z_u for two tokens, S_v − S_u for longer texts, which may differ in
    length. A difference of log-probabilities of two tokens is a difference of logits, so that there both quantities are
    the same.

    A target is a text, an id, a list of ids, or a set of tokens any of which is meant. The logit of a set is
    log Σ_v exp z_v. Unless `quantity` says otherwise, one token is explained by its logit, as in the paper, and several
    are explained by S.
    """

    target: str | SupportsIndex | Collection[Any] | None = None
    versus: str | SupportsIndex | Collection[Any] | None = None
    quantity: Literal["logit", "log_prob"] | None = None

    def __post_init__(self) -> None:
        for name in ("target", "versus"):
            value = getattr(self, name)
            if isinstance(value, Set):
                object.__setattr__(self, name, frozenset(value))
            elif getattr(value, "ndim", 0) or isinstance(value, list):  # or a tensor, or an array
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

    def with_target(self, lin: Linearization, target: int) -> Scope:
        # The likeliest token does not matter, which may be the very one that it is compared with.
        return replace(self, target=target) if self.target is None and not isinstance(lin, Span) else self

    def explained(self, lin: Linearization) -> tuple[Target, Target | None]:
        """The target, by default the answer linearised, or else the most likely token; and what it is compared with.

        Raises:
            ValueError: for an unknown token, and for a `versus` that is the target or shares one of its tokens.
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
        lin.require_possible(target, versus)
        if target == versus:
            noun = "token" if len(target) == 1 else "tokens"
            raise ValueError(
                f"target and versus are the same {noun}, {target.text!r}: their difference is zero. {self._remedy(lin)}"
            )
        if versus is not None and target.overlaps(versus):
            same = next(token for token in target.tokens if token in versus.tokens)
            raise ValueError(
                f"target {target.text!r} and versus {versus.text!r} share the token {same.text!r}, which would be "
                f"compared with itself: leave it out of one of them. {self._remedy(lin)}"
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
        """What to do where target and `versus` are the same."""
        if self.target is not None or isinstance(lin, Span):
            return "Name another token to compare with."
        return "The target is what the model predicts here: name another token to compare with, or a target."

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
        """A single logit does; a difference of logits and a log-probability do not."""
        against = lin.against if isinstance(lin, Span) else None
        return self.quantity_of(lin) == "logit" and self.versus is None and against is None

    def notes(self, lin: Linearization) -> tuple[str, ...]:
        notes = []
        if self.depends_on_mean_logit(lin) and lin.is_centered:
            notes.append("the unembedding is centred: the logit explained is the logit minus the vocabulary mean")
        notes += notes_on_spaces(lin, self.target, self.versus)
        noted = any(isinstance(note, models.SpacingNote) for note in (*lin.notes, *notes))
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
