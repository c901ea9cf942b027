"""Direction Scope: what moves this feature?"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from tl_scopes.jacobian.linearization import Linearization
from tl_scopes.scopes.scope import JacobianScope


@dataclass(frozen=True, eq=False)
class DirectionScope(JacobianScope):
    """The steepest change of the projection dᵀy that a unit step in each token's embedding can make, for a direction d
    of the space where the linearisation ends:

        score_t = ‖dᵀ J_t‖₂

    A steering vector, the weights of a linear probe, an encoder or decoder row of a sparse autoencoder, the difference
    of two rows of the unembedding. The length of d counts: the scores of 2d are twice those of d. For an encoder row
    dᵀy + b is the feature's pre-activation, and the answer is its gradient whether or not the feature is active.

    Args:
        direction: d, a vector as wide as the value at the `of` hook.
        name: what to call the projection, "plural" say.

    Unit: dᵀy, or the name, per unit of embedding norm.
    Cost: one backward pass.
    Raises: TypeError for a direction that is no tensor; ValueError for one that is no vector, zero, NaN or infinite, or
        not as wide as the value at the `of` hook.
    Source: the paper's construction (Liu et al. 2026, arXiv:2601.16407, section 2), with a cotangent of your own.

    Example:
        >>> plural = model.W_U[:, 0] - model.W_U[:, 1]
        >>> lin = tls.linearize(model, "The keys to the old cabinet", of="blocks.3.hook_resid_post")
        >>> answer = tls.DirectionScope(plural / plural.norm(), name="plural")(lin)
        >>> answer.scope, answer.unit
        ("DirectionScope(direction=<128 tensor of norm 1>, name='plural')", 'plural per unit of embedding norm')
    """

    direction: Tensor
    name: str | None = None

    def __post_init__(self) -> None:
        d = self.direction
        if not isinstance(d, Tensor):
            raise TypeError(f"a direction is a tensor [d_of], got {type(d).__name__}: pass torch.as_tensor(direction).")
        if d.ndim != 1:
            raise ValueError(f"a direction is one vector [d_of], got the shape {list(d.shape)}: ask once for each.")
        if not d.isfinite().all():
            raise ValueError("the direction has NaN or infinite entries.")
        if not d.any():
            raise ValueError(f"the direction is zero ({len(d)} entries): nothing can move the projection on it.")

    def cotangents(self, lin: Linearization) -> Float[Tensor, "1 d_of"]:
        if self.direction.shape != lin.readout.shape:
            raise ValueError(
                f"the direction has {len(self.direction)} entries, the value at {lin.of!r} has {len(lin.readout)}: "
                "linearise with `of` the hook where the direction was found."
            )
        return self.direction.detach().to(lin.readout)[None]

    def unit(self, lin: Linearization) -> str:
        return f"{self.name or 'dᵀy'} per {lin.unit}"
