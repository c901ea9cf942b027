"""The curvature of a metric along the change of each component: what a first-order effect leaves out."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_scopes import models
from tl_scopes.circuits.traced import ComponentTrace
from tl_scopes.jacobian import pullback
from tl_scopes.jacobian.randomness import error_of_mean


@dataclass(frozen=True, eq=False)
class Curvature:
    """ΔᵀG and ΔᵀHΔ for every component k by itself, with Δ the change of k."""

    slope: Float[Tensor, "layer component"]
    """Δ_kᵀ G_k, with G_k = ∂m/∂k."""
    bend: Float[Tensor, "layer component"]
    """Δ_kᵀ H_kk Δ_k, with H_kk = ∂²m/∂k²: exact, or estimated."""
    error: Float[Tensor, "layer component"] | None
    """The standard error of `bend`; None where it is exact, infinite where too few draws tell."""


def curvature(
    of: ComponentTrace,
    metric: Callable[[Tensor], Tensor],
    changes: Float[Tensor, "layer token head d_head"],
    by_head: bool,
    products: int,
    generator: torch.Generator,
) -> Curvature:
    """The derivatives of a metric along the change of each component, the others held where they do not follow from it.

    M_kj = Δ_kᵀ H_kj Δ_j is a matrix of component by component. Its product with a vector of signs ε is one Hessian
    product, for all components together, and

        E ε_k (M ε)_k = M_kk.

    With as many products as there are components they are those with the unit vectors, and M_kk is exact.

    Args:
        of: the run where the components are changed, with them in its graph.
        metric: m, from the logits of the run.
        changes: Δ for the value of each site.
        by_head: whether a component is a head at all positions, or else all heads at a position.
        products: how many Hessian products are spent.
        generator: the source of the signs.

    Cost: a backward pass that can be differentiated, and for each product another one through its graph, in batches.

    Raises:
        NoSecondDerivativeError: under an attention kernel that has no double backward.
    """
    values = [site.value for site in of.sites]
    logits = of.trace.logits
    assert logits is not None
    # At a slope near 1, as `Gradients` are.
    scale = pullback.power_of_two(float(of.lin.logits_gradient(metric).norm()))
    with pullback.differentiated_twice(), models.undisturbed(of.trace), torch.enable_grad():
        m = metric(models.precise(logits[of.lin.row])) / scale
        gradients = torch.autograd.grad(m, values, create_graph=True, materialize_grads=True)
    axis = 2 if by_head else 1
    whole = tuple(i for i in (1, 2, 3) if i != axis)
    heads = torch.stack([site.as_heads(g.detach()) for site, g in zip(of.sites, gradients, strict=True)])
    slope = (models.precise(heads) * changes).sum(whole) * scale  # [layer component]
    count = slope.numel()
    exact = products >= count
    weights = (
        torch.eye(count, dtype=changes.dtype, device=changes.device).reshape(count, *slope.shape)
        if exact
        else torch.randint(2, (products, *slope.shape), generator=generator, device=generator.device)
        .to(changes)
        .mul_(2)
        .sub_(1)
    )
    of_products = []
    for some in weights.split(of.size):
        steps = some[:, :, None, :, None] if by_head else some[:, :, :, None, None]
        moved = steps * changes
        given = [site.as_hooked(moved[:, i]) for i, site in enumerate(of.sites)]
        with pullback.differentiated_twice(), models.undisturbed(of.trace):
            bent = _products(gradients, values, given, together=of.size > 1)
        seen = torch.stack([site.as_heads(one) for site, one in zip(of.sites, bent, strict=True)], dim=1)
        of_products.append(some * (models.precise(seen) * changes).sum(tuple(i + 1 for i in whole)))
    found = torch.cat(of_products) * scale
    if exact:
        return Curvature(slope, found.sum(0), None)
    return Curvature(slope, found.mean(0), error_of_mean(found))


def _products(
    gradients: tuple[Tensor, ...], values: list[Tensor], steps: list[Float[Tensor, "product ..."]], *, together: bool
) -> list[Float[Tensor, "product ..."]]:
    """Σ_k s_kᵀ ∂G_k/∂j for every component j and each of several steps s."""
    live = [i for i, gradient in enumerate(gradients) if gradient.requires_grad]
    if not live:  # the metric is linear in all of them
        return [value.new_zeros(len(steps[0]), *value.shape) for value in values]
    given = [steps[i].to(gradients[i]) for i in live]
    found = pullback.gradients([gradients[i] for i in live], values, given, together=together)
    return [
        value.new_zeros(len(steps[0]), *value.shape) if one is None else one
        for value, one in zip(values, found, strict=True)
    ]
