"""What scopes are compared with: chance, the usual gradients, attention, and taking one token away.

All are scopes, so that they go wherever a scope goes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor

from tl_scopes import models
from tl_scopes.jacobian.linearization import Linearization
from tl_scopes.jacobian.pullback import vjps
from tl_scopes.jacobian.randomness import prompt_generator
from tl_scopes.jacobian.replacement import each_alone, effects, substitute
from tl_scopes.jacobian.span import Span
from tl_scopes.models import Target
from tl_scopes.scopes.measurement import Measurement
from tl_scopes.scopes.path_integrated import PathIntegratedScope
from tl_scopes.scopes.scope import Scope
from tl_scopes.scopes.target import TargetScope

__all__ = ["AttentionRollout", "GradientTimesInput", "IntegratedGradients", "LeaveOneOut", "RandomBaseline"]


@dataclass(frozen=True)
class RandomBaseline(Scope):
    """Uniform random numbers from 0 to 1, the scores of chance.

    Args:
        seed: seeds the numbers together with the tokens: the same prompt gets the same numbers, another prompt others.

    Unit: none.
    Cost: none.
    Raises: TypeError for a seed that is not an integer.

    Example:
        >>> lin = tls.linearize(model, "The keys to the old cabinet near the door")
        >>> bool((RandomBaseline()(lin).scores == RandomBaseline()(lin).scores).all())
        True
    """

    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", models.as_int(self.seed, "seed must be an integer"))

    @property
    def takes_spans(self) -> bool:
        return True

    @property
    def is_slope(self) -> bool:
        return False  # of nothing

    def measure(self, lin: Linearization) -> Measurement:
        purpose = (self.seed,) if self.seed else ()  # published tables were drawn without a seed
        return Measurement(torch.rand(len(lin.tokens), device="cpu", generator=prompt_generator(lin, *purpose)))

    def unit(self, lin: Linearization) -> str:
        return "random number"


@dataclass(frozen=True, eq=False, repr=False)
class GradientTimesInput(TargetScope):
    """The size of the first-order change of a logit when a token's embedding is set to zero:

        score_t = |g_t · x_t|,   g_t = ∂z_v/∂x_t

    `answer.signed` is g_t · x_t itself, which is positive where the embedding speaks for the target, to first order.

    Args: `target`, `versus` and `quantity` as in `SemanticScope`.

    Unit: logit (nat for "log_prob").
    Cost: one backward pass.
    Raises: as `SemanticScope` does.
    Source: Shrikumar et al. 2017 (arXiv:1605.01713); Denil et al. 2014 (arXiv:1412.6815) for words.
    Departure: the scores are absolute values, so that tokens rank by the size of their effect.

    Example:
        >>> lin = tls.linearize(model, "The keys to the old cabinet near the door")
        >>> GradientTimesInput(target=" are", versus=" is")(lin).top(1)[0].token
        ' keys'
    """

    def measure(self, lin: Linearization) -> Measurement:
        return self.measure_many([lin])[0]

    @property
    def grouping(self) -> Literal["signed"]:
        return "signed"

    def measure_many(self, lins: Sequence[Linearization]) -> list[Measurement]:
        gradients = vjps(lins, [lin.cotangent(self.function(lin))[None] for lin in lins])
        signed = [(g[0] * lin.embeddings).sum(-1) for lin, g in zip(lins, gradients, strict=True)]
        return [Measurement(one.abs(), {"signed": one}) for one in signed]

    def unit(self, lin: Linearization) -> str:
        return self.quantity_unit(lin)


@dataclass(frozen=True, eq=False, repr=False)
class IntegratedGradients(PathIntegratedScope):
    """Gradient times input, with the gradient averaged along the line from a baseline to the prompt:

        score_t = |Σ_d a_td|,   with a as in `PathIntegratedScope`, whose score is ‖a_t‖₂

    The arguments, the cost, the errors and the other details of the answer are those of `PathIntegratedScope`.
    `answer.signed` is Σ_d a_td without the absolute value; its sum is the change of the logit along the line.

    Unit: logit (nat for "log_prob").
    Source: Sundararajan et al. 2017 (arXiv:1703.01365), equation 3.
    Departure: the scores are absolute values; the line begins a little beyond the baseline, for the reason given there.

    Example:
        >>> lin = tls.linearize(model, "The keys to the old cabinet near the door")
        >>> IntegratedGradients(target=" are", versus=" is")(lin).top(1)[0].token
        ' keys'
    """

    def measure(self, lin: Linearization) -> Measurement:
        details = super().measure(lin).details
        return Measurement(details["signed"].abs(), details)

    @property
    def grouping(self) -> Literal["norm", "sum", "signed"]:
        return "signed"


@dataclass(frozen=True)
class LeaveOneOut(Scope):
    """How much the prediction changes when the embedding of this one token is replaced:

        score_t = KL(p ‖ p_t), or log p(target) − log p_t(target),   p_t the prediction with x_t replaced

    Of an answer of several tokens it is the sum over its predictions, each given the same tokens before it.

    Args:
        replacement: what takes the embedding's place: "zero"; "mean", the mean embedding of the vocabulary; "pad", the
            embedding of the padding token.
        quantity: "kl", the change of the whole prediction, or "log_prob", the drop of the target, which is negative
            where the token spoke against it.
        target: a text, an id or a list of ids, for "log_prob"; None is the most likely next token, or the answer.
        mean: the mean embedding (`models.mean_embedding`), so that "mean" need not compute it at each prompt.

    Unit: nat.
    Cost: a forward pass per token, in batches; with "mean" also the embedding of every token of the vocabulary, at each
        prompt (in `evaluate` once).
    Raises: ValueError for another `replacement` or `quantity`; for a target with "kl"; for a mean that is not as wide
        as the embeddings, or not real and finite; for a "mean" or "pad" that the model does not have; for hooks or
        weights that have changed since the model was linearised; else as `SemanticScope` does. TypeError for a mean
        that is not a tensor.
    Source: Li et al. 2016 (arXiv:1612.08220), erasure.

    Example:
        >>> lin = tls.linearize(model, "The keys to the old cabinet near the door")
        >>> LeaveOneOut()(lin).top(1)[0].token
        ' keys'
    """

    replacement: Literal["zero", "mean", "pad"] = "zero"
    quantity: Literal["kl", "log_prob"] = "kl"
    target: str | SupportsIndex | Sequence[int] | None = None
    mean: Float[Tensor, " d_model"] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.quantity not in ("kl", "log_prob"):
            raise ValueError(f'quantity is "kl" or "log_prob", got {self.quantity!r}.')
        if self.quantity == "kl" and self.target is not None:
            raise ValueError(
                f'quantity="kl" is about the whole prediction and has no target, got {self.target!r}: take '
                'quantity="log_prob".'
            )

    @property
    def runs_again(self) -> Literal["point"]:
        return "point"

    @property
    def is_slope(self) -> bool:
        return False  # but the change itself

    @property
    def asks_for_mean(self) -> bool:
        return self.replacement == "mean" and self.mean is None

    def measure(self, lin: Linearization) -> Measurement:
        lin.require_readout()
        instead = substitute(lin, self.replacement, self.mean)
        kept = each_alone(len(lin.tokens), lin.tokens.device)[: lin.scored]
        log_p = self.value(lin)
        target, _ = self.explained(lin)
        after, divergences = effects(lin, instead, kept, lin.tokens.new_tensor(target.ids[:1] if target else []))
        scores = divergences.new_zeros(len(lin.tokens))
        scores[: lin.scored] = divergences if log_p is None else log_p - after[:, 0]
        return Measurement(scores)

    def named_targets(self, model: models.Model, vocab: int | None = None) -> tuple[Target | None, Target | None]:
        return None if self.target is None else models.read_target(model, self.target, vocab), None

    def explained(self, lin: Linearization) -> tuple[Target | None, Target | None]:
        if self.quantity == "kl":
            return None, None
        target, _ = self.named_targets(lin.model, lin.vocab)
        target = target or (lin.answer if isinstance(lin, Span) else Target((lin.token(),)))
        if target.any_of:
            raise ValueError(f"LeaveOneOut takes one target, got the set {target.text!r}: ask once for each token.")
        lin.require_possible(target)
        return target, None

    def quantity_explained(self, lin: Linearization) -> str | None:
        target, _ = self.explained(lin)
        return None if target is None else f"log p({target.text!r})"

    def value(self, lin: Linearization) -> float | None:
        target, _ = self.explained(lin)
        if target is None:
            return None
        return float(lin.answer_log_prob(lin.log_probs) if isinstance(lin, Span) else lin.log_probs[target.id])

    @property
    def takes_spans(self) -> bool:
        return True

    def unit(self, lin: Linearization) -> str:
        return "nat"


@dataclass(frozen=True)
class AttentionRollout(Scope):
    """How much of each token's embedding would reach the position, if nothing but attention mixed tokens:

        score_t = (Ā_L ··· Ā_1)[position, t],   Ā = ½ (mean over heads of the pattern) + ½ I

    Unit: share of attention; the scores sum to one.
    Cost: one forward pass.
    Raises: ValueError for a model without attention patterns (see `models.attention_layers`), and for a linearisation
        that does not begin at the embedding.
    Source: Abnar & Zuidema 2020 (arXiv:2005.00928), equation 1.

    Example:
        >>> lin = tls.linearize(model, "The keys to the old cabinet near the door")
        >>> AttentionRollout()(lin).top(1)[0].token
        '<|bos|>'
    """

    @property
    def runs_again(self) -> Literal["prompt"]:
        return "prompt"

    @property
    def is_slope(self) -> bool:
        return False  # of the network, whose layers are more than attention

    @property
    def grouping(self) -> Literal["sum"]:
        return "sum"

    def measure(self, lin: Linearization) -> Measurement:
        if lin.wrt != models.EMBEDDING:
            raise ValueError(f'attention rollout goes back to the embedding, not to {lin.wrt!r}: wrt="hook_embed".')
        dtype = models.sum_dtype(lin.readout)
        identity = torch.eye(len(lin.tokens), dtype=dtype, device=lin.tokens.device)
        rollout = identity
        for layer in models.attention_layers(lin.model, lin.tokens):
            mixing = layer.pattern.to(dtype).mean(0)
            # Where a model has a learned sink logit, a row sums to less than one.
            rollout = (mixing / mixing.sum(-1, keepdim=True) + identity) / 2 @ rollout
        return Measurement(rollout[-1])

    def unit(self, lin: Linearization) -> str:
        return "share of attention"
