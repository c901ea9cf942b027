"""Temperature Scope: what moves the model's confidence?"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tl_scopes import models
from tl_scopes.jacobian.linearization import Linearization
from tl_scopes.jacobian.metric import Metric
from tl_scopes.scopes.first_order import JacobianScope


@dataclass(frozen=True)
class TemperatureScope(JacobianScope):
    """The steepest change of the effective inverse temperature β that a unit step in each token's embedding can make:

        score_t = ‖(∂β/∂y) J_t‖₂,   β = ‖y‖₂,   ∂β/∂y = ŷ = y/‖y‖₂

    The logits are W y = β W ŷ: the direction of the readout says what the model predicts, its norm how firmly. Of an
    answer of several tokens it is the sum of their β, so that the gradient is the sum of those of its tokens.

    Args:
        norm: "readout", as in the paper, or "logits": β = ‖z − mean z‖₂/√vocab, the spread of the logits, which is an
            inverse temperature of the same softmax and does not depend on coordinates in the residual stream.

    Unit: β per unit of embedding norm.
    Cost: one backward pass.
    Raises: ValueError for another `norm`; with "readout" for a model whose final norm was folded, where ‖y‖ is constant
        and the scores would be rounding errors; for a linearisation that does not end at the readout.
    Source: Liu et al. 2026 (arXiv:2601.16407), Temperature Scope.
    Departure: norm="logits" is ours.

    Example:
        >>> lin = tls.linearize(model, "The keys to the old cabinet near the door")
        >>> tls.TemperatureScope()(lin).unit
        'inverse temperature per unit of embedding norm'
    """

    norm: Literal["readout", "logits"] = "readout"

    def __post_init__(self) -> None:
        if self.norm not in ("readout", "logits"):
            raise ValueError(f'norm is "readout" or "logits", got {self.norm!r}.')

    _knows_spans = True

    def cotangents(self, lin: Linearization) -> Float[Tensor, "1 d_of"]:
        beta = self.metric(lin)
        if self.norm == "logits":
            return lin.cotangent(partial(beta, lin.readout))[None]
        y = torch.stack([one.readout for one in lin.single])
        y = y.to(models.sum_dtype(y))  # float16 ends at 65,504
        return (y / y.norm(dim=-1, keepdim=True)).reshape(1, -1)

    def metric(self, lin: Linearization) -> Metric:
        lin.require_readout()
        if self.norm == "logits":
            return lambda readout, logits: _spread(logits).sum()
        if models.has_constant_readout_norm(lin.model):
            raise ValueError(
                f"the final norm of {models.model_name(lin.model)!r} has no gain (folded, untrained, or by "
                "design), so the readout's norm is constant and its Temperature Scope identically zero. Load a folded "
                "model unprocessed (a TransformerBridge without enable_compatibility_mode; on TransformerLens 3.9 by "
                'HookedTransformer.from_pretrained_no_processing), or ask TemperatureScope(norm="logits").'
            )
        d_of = len(lin.single[0].readout)
        return lambda readout, logits: readout.reshape(-1, d_of).norm(dim=-1).sum()

    def quantity_explained(self, lin: Linearization) -> str:
        return "β"

    def unit(self, lin: Linearization) -> str:
        return f"inverse temperature per {lin.unit}"


def _spread(logits: Float[Tensor, "*row vocab"]) -> Float[Tensor, "*row"]:
    """‖z − mean z‖₂/√vocab, of the tokens that can come: a logit of minus infinity does not count."""
    known = logits.isfinite()
    count = known.sum(-1, keepdim=True).to(logits)
    mean = logits.where(known, 0).sum(-1, keepdim=True) / count
    return (logits - mean).where(known, 0).norm(dim=-1) / count[..., 0].sqrt()
