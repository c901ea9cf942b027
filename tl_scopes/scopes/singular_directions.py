"""What the leading singular vectors of a token's Jacobian mean, in words of the vocabulary."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tl_scopes import models
from tl_scopes.jacobian.linearization import Linearization
from tl_scopes.jacobian.softmax import deviations
from tl_scopes.jacobian.spectrum import Sketch
from tl_scopes.models import Token

_LISTED = 5


class Ranked(NamedTuple):
    """A token in one of the lists of a `SingularDirection`."""

    token: Token
    value: float


@dataclass(frozen=True, eq=False, repr=False)
class SingularDirection:
    """One way in which a token can move the prediction: A_t v = σ u.

    Signs are arbitrary: (−u, −v) is the same direction, with all four lists turned round together. Here the token that
    changes most is among the raised ones.
    """

    position: int
    """Where the token stands in the prompt."""
    token: str
    """Its text."""
    singular_value: float
    """σ."""
    share: float
    """σ² over the sum of all squared singular values of this token."""
    step: Float[Tensor, " d_model"]
    """v, of norm 1: the step of the token's embedding."""
    effect: Float[Tensor, " d_of"]
    """J_t v, the change of the readout; with space="distribution" up to what the distribution does not notice."""
    raises: tuple[Ranked, ...]
    """The tokens whose logit grows most along the step, per unit of it; with space="distribution" the tokens whose
    probability grows most."""
    lowers: tuple[Ranked, ...]
    """The tokens whose logit, or probability, falls most."""
    towards: tuple[Ranked, ...]
    """The tokens whose embeddings have the largest cosine with the step; empty when the tokens are not perturbed at
    the embedding, and for an embedding that holds positions (BERT)."""
    away: tuple[Ranked, ...]
    """The tokens whose embeddings have the most negative cosine with it."""

    def __repr__(self) -> str:
        def listed(tokens: tuple[Ranked, ...]) -> str:
            return ", ".join(repr(row.token.text) for row in tokens[:3])

        towards = f"towards {listed(self.towards)}, away from {listed(self.away)}: " if self.towards else ""
        return (
            f"SingularDirection({self.token!r} at {self.position}, {self.singular_value:.3g}, {self.share:.0%}: "
            f"{towards}raises {listed(self.raises)}, lowers {listed(self.lowers)}, or the opposite)"
        )


def singular_directions(
    lin: Linearization, sketch: Sketch, position: int, count: int, of_probabilities: bool
) -> tuple[SingularDirection, ...]:
    """The leading singular directions of one token, the largest singular value first.

    Args:
        lin: a linearisation that ends at the readout.
        sketch: what was computed of its A_t = R J_t.
        position: where the token stands.
        count: how many; all of them where there are fewer.
        of_probabilities: whether tokens are ranked by the change of their probability, or of their logit.

    Cost: for each direction one product with the unembedding.
    """
    left, sigma, steps = torch.linalg.svd(models.precise(sketch.seen[:, position]), full_matrices=False)
    images, R = (sigma[:, None] * left.T) @ sketch.U.to(left), sketch.root.to(left)
    # R's rows are orthogonal, so its inverse on their span is Rᵀ over their squared norms.
    effects = (images / R.square().sum(-1).clamp(min=torch.finfo(R.dtype).tiny)) @ R
    shares = sigma.square() / sketch.sums().second[position, 0].clamp(min=torch.finfo(sigma.dtype).tiny)
    found = []
    for i in range(min(count, len(sigma))):
        change = _change(lin, effects[i], of_probabilities)
        sign = 1 if change.max() >= -change.min() else -1
        step, effect = ((sign * vector).to(models.sum_dtype(lin.embeddings)) for vector in (steps[i], effects[i]))
        cosines = _cosines(lin, step)
        found.append(
            SingularDirection(
                position,
                lin.str_tokens[position],
                float(sigma[i]),
                float(shares[i]),
                step,
                effect,
                raises=_ranked(lin, sign * change),
                lowers=_ranked(lin, sign * change, largest=False),
                towards=_ranked(lin, cosines),
                away=_ranked(lin, cosines, largest=False),
            )
        )
    return tuple(found)


def _change(lin: Linearization, effect: Tensor, of_probabilities: bool) -> Float[Tensor, " vocab"]:
    """How the logits or the probabilities change along the effect: dz, or dp = p (dz − p·dz)."""
    dz = lin.logits_jvp(effect[None])[0]
    p = lin.log_probs.exp()
    return p * deviations(p, dz) if of_probabilities else dz


def _cosines(lin: Linearization, step: Tensor) -> Float[Tensor, " vocab"]:
    """Between the step and the embeddings of the vocabulary; empty where tokens are perturbed elsewhere, and where
    the embedding holds positions too.
    """
    if lin.wrt != models.EMBEDDING or models.holds_positions(lin.model):
        return step.new_empty(0)
    vocabulary = models.embedding_matrix(lin.model).to(step)
    return vocabulary @ step / vocabulary.norm(dim=-1).clamp(min=torch.finfo(step.dtype).tiny)


def _ranked(lin: Linearization, values: Float[Tensor, " vocab"], largest: bool = True) -> tuple[Ranked, ...]:
    top = values.topk(min(_LISTED, len(values)), largest=largest)
    return tuple(
        Ranked(Token(id, models.token_text(lin.model, id)), value)
        for id, value in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    )
