"""The Fisher information of a prediction about the readout, and its root."""

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from tl_scopes.jacobian.linearization import Linearization
from tl_scopes.scopes.scope import Observable


def weighted_logits(lin: Linearization) -> Observable:
    """√p (z − p·z), whose Jacobian G has GᵀG = JᵀFJ: squared lengths of its changes are twice the KL divergence.

    Raises:
        ValueError: when the linearisation does not end at the readout.
    """
    p = lin.log_probs.exp()
    return lambda readout, logits: p.sqrt() * (logits - p @ logits)


def fisher_products(lin: Linearization, tangents: Float[Tensor, "probe d_of"]) -> Float[Tensor, "probe d_of"]:
    """F δ for every probe δ, with F = (∂z/∂y)ᵀ (diag p − p pᵀ) (∂z/∂y), never formed. In float64.

    Cost: two products with the unembedding per probe.

    Raises:
        ValueError: when the linearisation does not end at the readout.
    """
    p = lin.log_probs.exp()
    dz = lin.logits_jvp(tangents).to(p)
    return lin.logits_vjp(p * (dz - einsum(dz, p, "probe vocab, vocab -> probe")[:, None])).to(p)


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
    # The rest of the vocabulary weighs nothing against what the prediction leaves open.
    likely = tokens[ascending.cumsum(0) > rounding * 1e-2 * (1 - p.max()).clamp(min=0)]
    if len(likely) <= len(lin.readout):
        rows = []
        for some in likely.split(64):
            deviations = p.new_zeros(len(some), len(p)).scatter_(1, some[:, None], 1) - p
            rows.append(lin.logits_vjp(p[some, None].sqrt() * deviations).to(p))
        _, singular, directions = torch.linalg.svd(torch.cat(rows), full_matrices=False)
        eigenvalues = singular.square()
    else:
        eigenvalues, columns = torch.linalg.eigh(fisher_information(lin).cpu())
        eigenvalues, directions = eigenvalues.clamp(min=0).flip(0).to(p), columns.T.flip(0).to(p)
    tail = eigenvalues.flip(0).cumsum(0).flip(0)
    kept = tail > rounding * eigenvalues.sum()
    return eigenvalues[kept, None].sqrt() * directions[kept]
