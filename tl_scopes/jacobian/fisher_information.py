"""The Fisher information F of a prediction about the readout: products with it, its root, and F as a sum for sketching.

`Split` is the form in which the Fisher Scope takes it.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_scopes.jacobian.linearization import Linearization
from tl_scopes.jacobian.metric import Metric
from tl_scopes.jacobian.softmax import balanced, deviations, left_open

_OVERSAMPLING, _ITERATIONS = 8, 2
"""More directions and more rounds of the block power iteration than it needs at least. They cost products with the
unembedding only, and few are enough."""


def weighted_logits(lin: Linearization) -> Metric:
    """√p (z − p·z), whose Jacobian G has GᵀG = JᵀFJ: squared lengths of its changes are twice the KL divergence.

    Raises:
        ValueError: when the linearisation does not end at the readout.
    """
    p = lin.log_probs.exp()
    return lambda readout, logits: p.sqrt() * deviations(p, logits)


def fisher_products(lin: Linearization, tangents: Float[Tensor, "probe d_of"]) -> Float[Tensor, "probe d_of"]:
    """F δ for every probe δ, with F = (∂z/∂y)ᵀ (diag p − p pᵀ) (∂z/∂y), never formed. In float64.

    Cost: two products with the unembedding per probe.

    Raises:
        ValueError: when the linearisation does not end at the readout.
    """
    p = lin.log_probs.exp()
    dz = lin.logits_jvp(tangents)
    return lin.logits_vjp(balanced(p, p * deviations(p, dz)))


def fisher_information(lin: Linearization) -> Float[Tensor, "d_of d_of"]:
    """F = (∂z/∂y)ᵀ (diag p − p pᵀ) (∂z/∂y), the Fisher information of the prediction p = softmax z about the readout y.

    In nats per squared unit of y: KL(p(y) ‖ p(y + δ)) ≈ ½ δᵀ F δ. In float64.

    Cost: two products with the unembedding per dimension of y.

    Raises:
        ValueError: when the linearisation does not end at the readout.

    Source: Liu et al. 2026 (arXiv:2601.16407), Fisher Scope.
    """
    basis = torch.eye(len(lin.readout), device=lin.readout.device)
    fisher = torch.cat([fisher_products(lin, some) for some in basis.split(256)])
    return (fisher + fisher.T) / 2


def fisher_root(lin: Linearization) -> Float[Tensor, "direction d_of"]:
    """R with RᵀR = F, from the steepest direction to the flattest: its rows are √λ_k u_k, F = Σ_k λ_k u_k u_kᵀ.

    Directions that together hold no more of the trace of F than a rounding error are left out, so there are fewer of
    them for a sure prediction, a small vocabulary, an unembedding with repeated rows. In float64.

    Cost: two products with the unembedding per dimension of y; one per likely token, when there are fewer of these.

    Raises:
        ValueError: when the linearisation does not end at the readout.
    """
    p = lin.log_probs.exp()
    rounding = torch.finfo(lin.readout.dtype).eps if lin.readout.dtype == torch.float64 else 1e-7
    ascending, tokens = p.sort()
    # The other tokens together weigh nothing against what the prediction leaves open.
    likely = tokens[ascending.cumsum(0) > rounding * 1e-2 * left_open(p)]
    if len(likely) <= len(lin.readout):
        rows = []
        for some in likely.split(64):
            deviating = p.new_zeros(len(some), len(p)).scatter_(1, some[:, None], 1) - p
            rows.append(lin.logits_vjp(balanced(p, p[some, None].sqrt() * deviating)))
        _, singular, directions = torch.linalg.svd(torch.cat(rows), full_matrices=False)
        eigenvalues = singular.square()
    else:
        eigenvalues, columns = torch.linalg.eigh(fisher_information(lin).cpu())
        eigenvalues, directions = eigenvalues.clamp(min=0).flip(0).to(p), columns.T.flip(0).to(p)
    tail = eigenvalues.flip(0).cumsum(0).flip(0)
    kept = tail > rounding * eigenvalues.sum()
    return eigenvalues[kept, None].sqrt() * directions[kept]


# -- F as a sum -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Split:
    """F = LᵀL + E[v vᵀ]: a few directions that are summed, and random draws that are averaged."""

    L: Float[Tensor, "direction d_of"]
    """The directions."""
    v: Float[Tensor, "probe d_of"]
    """The draws; empty where L is all of F."""
    trace_share: float = 1.0
    """The share of tr F that is kept."""


def whole(lin: Linearization) -> Split:
    """All of F, from `fisher_root`."""
    root = fisher_root(lin)
    return Split(root, root[:0])


def truncated(lin: Linearization, rank: int) -> Split:
    """The leading directions of F alone, which are less than F."""
    root = fisher_root(lin)
    eigenvalues = root.square().sum(-1)
    share = float(eigenvalues[:rank].sum() / eigenvalues.sum()) if len(root) else 1.0
    return Split(root[:rank], root[:0], share)


def drawn(lin: Linearization, probes: int, generator: torch.Generator) -> Split:
    """A quarter of the probes for leading directions of F, the others for random draws of the remainder."""
    leading = leading_part(lin, probes // 4, generator) if probes >= 4 else None
    L = lin.log_probs.new_zeros(0, len(lin.readout)) if leading is None else leading[1]
    return Split(L, remainder_probes(lin, probes - len(L), leading, generator))


def whole_if_small(lin: Linearization, most: int) -> Split | None:
    """All of F, where it has no more than so many directions."""
    p = lin.log_probs.exp().sort(descending=True).values
    # So few tokens are likely, or the readout has so few dimensions; else F need not be looked at.
    if most < len(lin.readout) and p[most:].sum() > 1e-9 * p[1:].sum():
        return None
    found = whole(lin)
    return found if len(found.L) <= most else None


def leading_part(
    lin: Linearization, count: int, generator: torch.Generator
) -> tuple[Float[Tensor, "direction d_of"], Float[Tensor, "direction d_of"]]:
    """Q, close to the `count` leading directions of F, and L = (Q F Qᵀ)^-½ Q F, so that LᵀL is the part of F they see.

    By block power iteration and a Rayleigh-Ritz step. F − LᵀL is positive and what Q does not see, for any Q.

    Cost: a few products with the unembedding per direction, no pass through the network.
    """
    start = torch.randn(
        count + _OVERSAMPLING, len(lin.readout), generator=generator, device=lin.readout.device, dtype=torch.float32
    )
    product = fisher_products(lin, start)
    for _ in range(_ITERATIONS):
        Q = torch.linalg.qr(product.T).Q.T
        product = fisher_products(lin, Q)
    eigenvalues, columns = (part.to(Q) for part in torch.linalg.eigh((Q @ product.T).cpu()))
    seen = eigenvalues > 1e-12 * eigenvalues.max()
    eigenvalues, ritz = eigenvalues[seen][-count:], columns.T[seen][-count:]
    root = eigenvalues[:, None].sqrt()
    return (ritz @ Q) / root, (ritz @ product) / root


def remainder_probes(
    lin: Linearization, count: int, leading: tuple[Tensor, Tensor] | None, generator: torch.Generator
) -> Float[Tensor, "probe d_of"]:
    """Random v with E[v vᵀ] = F − LᵀL, what the `leading_part` (Q, L) leaves; with E[v vᵀ] = F without one.

    √p ε, with random signs ε over the vocabulary, goes through (diag p − p pᵀ)^½ and the unembedding, which gives F;
    taking (Q v) L away from it gives the remainder.

    Cost: one product with the unembedding per probe.
    """
    p = lin.log_probs.exp()
    signs = torch.randint(0, 2, (count, len(p)), generator=generator, device=p.device).to(p) * 2 - 1
    draws = p.sqrt() * signs
    v = lin.logits_vjp(balanced(p, draws - p * draws.sum(-1, keepdim=True)))
    if leading is None:
        return v
    Q, L = leading
    return v - (v @ Q.T) @ L
