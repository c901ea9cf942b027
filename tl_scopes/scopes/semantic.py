"""Semantic Scope: what moves this token's logit?"""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from tl_scopes.jacobian.linearization import Linearization
from tl_scopes.jacobian.pullback import cotangents_of
from tl_scopes.scopes.first_order import JacobianScope
from tl_scopes.scopes.target import TargetScope


@dataclass(frozen=True)
class SemanticScope(TargetScope, JacobianScope):
    """The steepest change of one token's logit z_v that a unit step in each token's embedding can make:

        score_t = ‖(∂z_v/∂y) J_t‖₂

    With `versus`, of the difference z_v − z_u of two logits, which neither centring nor the softmax changes. For a
    target of several tokens, of its log-probability after the prompt, the sum of those of its tokens, each given the
    ones before it:

        score_t = ‖∂S/∂x_t‖₂,   S = Σ_k log p(v_k | prompt, v_1 … v_{k−1}) = Σ_k log softmax(z_k)_{v_k}

    Args:
        target: a text, an id, or a list of ids; a set of tokens any of which is meant, {" Yes", " yes"}; None is the
            most likely next token, or the answer of a linearisation that has one.
        versus: what to compare with, "why this rather than that?": as `target`, also of another length.
        quantity: "logit", as in the paper, or "log_prob"; None is "logit" for one token and "log_prob" for several,
            whose logits do not add up.

    Unit: logit (nat for a log-probability) per unit of embedding norm.
    Cost: one backward pass; and a forward pass over prompt and target, where the linearisation is of the prompt alone
        and the target has several tokens.
    Raises: ValueError for a target that is unknown, `versus` equal to the target, another quantity, "logit" of several
        tokens, a set with a member of several tokens, an answer that does not fit into the context, or a linearisation
        that does not end at the readout.
    Source: Liu et al. 2026 (arXiv:2601.16407), Semantic Scope.
    Departure: the cotangent is ∂z_v/∂y through the model's real readout, which is the row w_v of the unembedding only
        where logits are linear. The target need not stand in the prompt. Targets of several tokens and sets are ours.

    Example:
        >>> lin = tls.linearize(model, "The keys to the old cabinet near the door")
        >>> tls.SemanticScope(target=" are", versus=" is")(lin).unit
        'logit per unit of embedding norm'
        >>> answer = tls.SemanticScope(" are very old")(lin)
        >>> answer.quantity, answer.unit
        ("log p(' are very old')", 'nat per unit of embedding norm')
    """

    _knows_spans = True

    def cotangents(self, lin: Linearization) -> Float[Tensor, "1 d_of"]:
        return lin.cotangent(self.function(lin))[None]

    def _cotangents_of(self, lins: Sequence[Linearization]) -> list[Tensor]:
        if len(lins) == 1 or type(self).cotangents is not SemanticScope.cotangents:
            return super()._cotangents_of(lins)
        return [cotangent[None] for cotangent in cotangents_of(lins, [self.function(lin) for lin in lins])]

    def unit(self, lin: Linearization) -> str:
        return f"{self.quantity_unit(lin)} per {lin.unit}"
