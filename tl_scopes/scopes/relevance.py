"""Relevance Scope: what speaks for this token, and what against?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tl_scopes import models
from tl_scopes.jacobian.linearization import Linearization
from tl_scopes.jacobian.pullback import vjps
from tl_scopes.scopes.measurement import Measurement
from tl_scopes.scopes.target import TargetScope


@dataclass(frozen=True)
class RelevanceScope(TargetScope):
    """How much of a logit, or of the difference of two, each token brings: the derivative times the input,

        score_t = g_t · x_t,   g_t = ∂z/∂x_t,   z = z_v, or z_v − z_u with `versus`

    signed: above zero it speaks for the target, below zero against it. Under `rules="linear"` the network is linear at
    the prompt, and nothing is lost:

        Σ_t g_t · x_t + biases = z

    Args:
        target, versus: as in `SemanticScope`.
        quantity: as in `SemanticScope`. A log-probability is not linear in the logits, so that of it, and so of a
            target of several tokens, the parts do not add up under any rules.
        baseline: what an input is counted from. "zero" counts all of it. "prompt" takes the mean b_t of the prompt's
            other tokens, score_t = g_t · (x_t − b_t): what a token says more than these would in its place. It leaves
            out what all tokens of the prompt share, and finds more causes, but its parts do not add up. The tokens of
            an answer are among them where they get scores too (`score_answer`).

    Unit: logit (nat for a log-probability). `answer.biases` is what no token brings, under rules that make the network
        linear: the biases of the model, and learned positions; where `wrt` is another hook than the embedding, also
        what goes around that hook. Otherwise `answer.gap` is what the scores of all tokens leave to `answer.value`, and
        has no meaning of its own.
    Cost: one backward pass.
    Raises: as `SemanticScope` does.
    Source: gradient times input (Shrikumar et al. 2017, arXiv:1605.01713), which under the rules of AttnLRP (Achtibat
        et al. 2024, arXiv:2402.05602) is layer-wise relevance propagation.
    Departure: from AttnLRP, the attention pattern is constant under "linear", so that the parts add up.

    Example:
        >>> lin = tls.linearize(model, "The keys to the old cabinet near the door", rules="linear")
        >>> answer = tls.RelevanceScope(" are", versus=" is")(lin)
        >>> answer.top(1)[0].token
        ' keys'
        >>> bool(abs(float(answer.scores.sum()) + answer.biases - answer.value) < 1e-4)
        True
    """

    baseline: Literal["zero", "prompt"] = "zero"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.baseline not in ("zero", "prompt"):
            raise ValueError(
                f'baseline is "zero" or "prompt", the mean of the prompt\'s other tokens; got {self.baseline!r}.'
            )

    @property
    def grouping(self) -> Literal["sum"]:
        return "sum"

    def measure(self, lin: Linearization) -> Measurement:
        return self.measure_many([lin])[0]

    def cotangents(self, lin: Linearization) -> Float[Tensor, "1 d_of"]:
        """c = ∂z/∂y, of which g = cᵀJ."""
        return lin.cotangent(self.function(lin))[None]

    def moves(self, lin: Linearization) -> Float[Tensor, "token d_model"]:
        """x_t, or what is counted of it: the move of each token whose first-order effect its score is."""
        x = models.precise(lin.embeddings)
        return x - self._baseline(x, lin.scored)

    def measure_many(self, lins: Sequence[Linearization]) -> list[Measurement]:
        gradients = vjps(lins, [self.cotangents(lin) for lin in lins])
        found = []
        for lin, gradient in zip(lins, gradients, strict=True):
            scores = (models.precise(gradient[0]) * self.moves(lin)).sum(-1)
            scores[lin.scored :] = 0  # an answer that is given, and gets no scores
            left = float(self.value(lin) or 0.0) - float(scores.sum())
            found.append(Measurement(scores, {"biases" if self._adds_up(lin) else "gap": left}))
        return found

    def _baseline(self, x: Float[Tensor, "token d_model"], scored: int) -> Float[Tensor, "token d_model"]:
        """What is subtracted from each of the inputs that get scores; where there is one alone, nothing."""
        if self.baseline == "zero" or scored < 2:
            return torch.zeros_like(x)
        return (x[:scored].sum(0) - x) / (scored - 1)

    def _adds_up(self, lin: Linearization) -> bool:
        """Whether the quantity is linear in the embeddings, biases aside."""
        said = [one for one in self.explained(lin) if one is not None]
        is_logits = not any(one.is_span or one.any_of for one in said)  # a difference of them is one too
        of_logits = is_logits and (len(said) == 2 or self.quantity_of(lin) == "logit")
        return of_logits and self.baseline == "zero" and lin.rules is not None and lin.rules.conserve

    def unit(self, lin: Linearization) -> str:
        return self.quantity_unit(lin)
