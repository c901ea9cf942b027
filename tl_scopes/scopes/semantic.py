"""Semantic Scope: what moves this token's logit?"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from tl_scopes.jacobian.linearization import Linearization
from tl_scopes.scopes.scope import JacobianScope, TargetScope


@dataclass(frozen=True)
class SemanticScope(TargetScope, JacobianScope):
    """The steepest change of one token's logit z_v that a unit step in each token's embedding can make:

        score_t = ‖(∂z_v/∂y) J_t‖₂

    With `versus`, of the difference z_v − z_u of two logits, which neither centring nor the softmax changes.

    Args:
        target: the token, as text or id; None is the most likely next token.
        versus: a token to compare with: "why this rather than that?".
        quantity: "logit", as in the paper, or "log_prob".

    Unit: logit (nat for "log_prob") per unit of embedding norm.
    Cost: one backward pass.
    Raises: ValueError for a target that is several tokens or unknown, `versus` equal to the target, another
        quantity, or a linearisation that does not end at the readout.
    Source: Liu et al. 2026 (arXiv:2601.16407), Semantic Scope.
    Departure: the cotangent is ∂z_v/∂y through the model's real readout, which is the row w_v of the unembedding only
        where logits are linear. The target need not stand in the prompt.

    Example:
        >>> lin = tls.linearize(model, "The keys to the old cabinet near the door")
        >>> tls.SemanticScope(target=" are", versus=" is")(lin).unit
        'logit per unit of embedding norm'
    """

    def cotangents(self, lin: Linearization) -> Float[Tensor, "1 d_of"]:
        return lin.cotangent(self.function(lin))[None]

    def unit(self, lin: Linearization) -> str:
        return f"{self.quantity_unit} per {lin.unit}"
