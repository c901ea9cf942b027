"""Fisher Scope: what moves the whole predictive distribution?"""

from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from tl_scopes.attribution import Scope
from tl_scopes.linearization import Linearization


def fisher_information(lin: Linearization) -> Float[Tensor, "d_of d_of"]:
    """F = (∂z/∂y)ᵀ (diag p − p pᵀ) (∂z/∂y), the Fisher information of the prediction p = softmax z about the readout y.

    In nats per squared unit of y: KL(p(y) ‖ p(y + δ)) ≈ ½ δᵀ F δ. In float64.

    Cost: two products with the unembedding per dimension of y.

    Raises:
        ValueError: when the linearisation does not end at the readout.

    Source: Liu et al. 2026 (arXiv:2601.16407), Fisher Scope.
    """
    p = lin.log_probs.exp()
    rows = []
    for basis in torch.eye(len(lin.readout), device=p.device).split(256):
        dz = lin.logits_jvp(basis).to(p)
        rows.append(lin.logits_vjp(p * (dz - einsum(dz, p, "probe vocab, vocab -> probe")[:, None])).to(p))
    fisher = torch.cat(rows)
    return (fisher + fisher.T) / 2


@dataclass(frozen=True)
class FisherScope(Scope):
    """How fast the predictive distribution moves, in KL divergence, under a random step in each token's embedding:

        score_t = tr(J_tᵀ F J_t) = Σ_k λ_k ‖u_kᵀ J_t‖²,   F = Σ_k λ_k u_k u_kᵀ

    with F the Fisher information of the prediction (`fisher_information`). The exact trace: neither folding the norms
    nor centring the unembedding changes it.

    Unit: nat per squared unit of embedding norm.
    Cost: one backward pass per direction u_k that matters, at most d_model of them; about 0.6 of a forward pass each.
    Raises: ValueError for a linearisation that does not end at the readout.
    Source: Liu et al. 2026 (arXiv:2601.16407), Fisher Scope.
    Departure: the paper's code keeps the leading direction only; here are all, but for those which together hold no
        more of the trace of F than a rounding error.

    Example:
        >>> lin = tls.linearize(model, "The keys to the old cabinet near the door")
        >>> tls.FisherScope()(lin).unit
        'nat per squared unit of embedding norm'
    """

    def scores(self, lin: Linearization) -> Float[Tensor, "token"]:
        eigenvalues, directions = torch.linalg.eigh(fisher_information(lin).cpu().double())
        rounding = torch.finfo(lin.readout.dtype).eps if lin.readout.dtype == torch.float64 else 1e-7
        # Ascending, so this drops the tail of the spectrum; all of it for a prediction that is sure beyond float64.
        kept = eigenvalues.clamp(min=0).cumsum(0) > rounding * eigenvalues.sum()
        norms = lin.squared_norms(directions.T[kept])
        return einsum(eigenvalues[kept].to(norms), norms, "probe, probe token -> token")

    def unit(self, lin: Linearization) -> str:
        return f"nat per squared {lin.unit}"
