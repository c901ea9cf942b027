"""Direction Scope: what moves this feature?"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from tl_scopes import models
from tl_scopes.jacobian.linearization import Linearization
from tl_scopes.jacobian.metric import Metric
from tl_scopes.jacobian.tensor_arguments import require_finite, require_real
from tl_scopes.models.arguments import require_name
from tl_scopes.scopes.first_order import JacobianScope


@dataclass(frozen=True, eq=False)
class DirectionScope(JacobianScope):
    """The steepest change of the projection dᵀy that a unit step in each token's embedding can make, for a direction d
    of the space at a hook:

        score_t = ‖dᵀ J_t‖₂

    d may be a steering vector, the weights of a linear probe, an encoder or decoder row of a sparse autoencoder, the
    difference of two rows of the unembedding. Its length counts: the scores of 2d are twice those of d. For an encoder
    row dᵀy + b is the feature's pre-activation, and the scores are the sizes of its gradient, whether or not the
    feature is active.

    Args:
        direction: d, a vector as wide as the value at the hook.
        hook: where d was found, which is where the linearisation must end: "blocks.3.hook_resid_post", or "ln_final"
            for what the unembedding reads. Many hooks are equally wide, and a direction means nothing at another one.
        name: what to call the projection, such as "plural".

    Unit: dᵀy, or the name, per unit of embedding norm.
    Cost: one backward pass.
    Raises: TypeError for a direction that is not a tensor, and without a hook. ValueError for a direction that is not
        one vector of real numbers, is zero, NaN or infinite, or is not as wide as the value at the hook; for a
        linearisation that ends at another hook.
    Source: the paper's construction (Liu et al. 2026, arXiv:2601.16407, section 2), with a cotangent of your own.

    Example:
        >>> plural, hook = model.W_U[:, 0] - model.W_U[:, 1], "blocks.3.hook_resid_post"
        >>> lin = tls.linearize(model, "The keys to the old cabinet", of=hook)
        >>> answer = tls.DirectionScope(plural / plural.norm(), hook, name="plural")(lin)
        >>> answer.scope
        "DirectionScope(direction=<128 tensor of norm 1>, hook='blocks.3.hook_resid_post', name='plural')"
        >>> answer.unit
        'plural per unit of embedding norm'
    """

    direction: Tensor
    hook: str | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        d = self.direction
        require_real(d, "a direction", "[d_of]")
        if d.ndim != 1:
            raise ValueError(f"a direction is one vector [d_of], got the shape {list(d.shape)}: ask once for each.")
        require_finite(d, "a direction")
        if not d.any():
            raise ValueError(f"the direction is zero ({len(d)} entries): nothing can move the projection on it.")
        require_name(self.name, "a direction")
        if not isinstance(self.hook, str):
            raise TypeError(
                f"a direction belongs to the hook where it was found, named by a str, got hook={self.hook!r}: write "
                'DirectionScope(direction, "blocks.3.hook_resid_post"), for example; the readout is "ln_final".'
            )

    _knows_spans = True

    def cotangents(self, lin: Linearization) -> Float[Tensor, "1 d_of"]:
        self._require_at_home(lin)
        d = models.precise(self.direction.detach().to(lin.readout.device))
        return d.repeat(len(lin.single))[None]  # of an answer of several tokens it is the sum of dᵀy over its readouts

    def metric(self, lin: Linearization) -> Metric:
        d = self.cotangents(lin)[0]
        return lambda readout, logits: d.to(readout) @ readout

    def quantity_explained(self, lin: Linearization) -> str:
        return self.name or "dᵀy"

    def unit(self, lin: Linearization) -> str:
        return f"{self.name or 'dᵀy'} per {lin.unit}"

    @property
    def depends_on_basis(self) -> bool:
        return True

    def _require_at_home(self, lin: Linearization) -> None:
        """Refuse a linearisation that ends at another hook, and a direction of another width."""
        hook = str(self.hook)
        if hook != lin.of and not (models.is_readout(hook) and models.is_readout(lin.of)):
            raise ValueError(
                f"the direction belongs to {hook!r}, and the linearisation ends at {lin.of!r}: linearise with "
                f"of={hook!r}, or, if the direction was found there, write DirectionScope(direction, {lin.of!r})."
            )
        width = len(lin.single[0].readout)
        if len(self.direction) != width:
            raise ValueError(
                f"the direction has {len(self.direction)} entries, the value at {lin.of!r} has {width}: "
                "name the hook where the direction was found, and linearise with `of` that hook."
            )
