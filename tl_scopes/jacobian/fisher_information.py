"""The Fisher information F of a prediction about the readout: products with it, its root, and F as a sum for sketching.

`Seen` is a part of F that a few directions hold; `remainder_probes` are random draws of the rest.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_scopes import models
from tl_scopes.jacobian.linearization import Linearization
from tl_scopes.jacobian.metric import Metric
from tl_scopes.jacobian.pullback import jvps
from tl_scopes.jacobian.randomness import source
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
    return lambda readout, logits: (p.sqrt() * deviations(p, logits)).flatten()


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
    if len(lin.single) == 1:
        return _root(lin.single[0])
    # Predictions of one answer are made one given the others, so that F has a block for each and nothing between them.
    roots = [_root(one) for one in lin.single]
    whole = torch.block_diag(*roots)
    return whole[whole.square().sum(-1).argsort(descending=True, stable=True)]


def _root(lin: Linearization) -> Float[Tensor, "direction d_of"]:
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


def leading_root(lin: Linearization, count: int) -> tuple[Float[Tensor, "direction d_of"], float] | None:
    """The `count` first rows of `fisher_root`, and the trace of F, without forming F: by a block Krylov space.

    The space grows until F u = λ u holds for each of them but for rounding, of which the asymmetry of the products with
    F tells the size: on SmolLM2-135M in float32 it is 2e-5 of the largest eigenvalue, and by as much the direction may
    be off.

    Returns:
        None where all of F is not much dearer, or where the space would have to grow too far, since directions are
        almost equally steep.

    Cost: some ten products with the unembedding per direction, and that of `fisher_trace`.

    Raises:
        ValueError: when the linearisation does not end at the readout.
    """
    d = len(lin.readout)
    if len(lin.single) > 1 or 16 * (count + 2) > d:
        return None
    tolerance = 1e-10 if lin.readout.dtype == torch.float64 else 2e-6
    block = torch.randn(
        count + 2, d, generator=source(lin, None, "leading_root"), device=lin.readout.device, dtype=torch.float32
    )
    block = models.precise(block)
    Q = P = block[:0]  # an orthonormal basis of the space, and F Q
    while len(Q) + len(block) <= d // 2:
        for _ in range(2):  # rounding leaves some of what was taken away
            block = torch.linalg.qr((block - (block @ Q.T) @ Q).T).Q.T
        product = fisher_products(lin, block)
        Q, P = torch.cat([Q, block]), torch.cat([P, product])
        inner = (Q @ P.T).cpu()
        eigenvalues, columns = (part.to(Q).flip(-1) for part in torch.linalg.eigh((inner + inner.T) / 2))
        eigenvalues, mix = eigenvalues[:count], columns.T[:count]
        u = mix @ Q
        error = (mix @ P - eigenvalues[:, None] * u).norm(dim=-1).amax()
        # F is symmetric, but for the rounding of the products with it, and no direction is known better than that.
        rounding = (inner - inner.T).norm().to(error) / 2
        floor = torch.maximum(tolerance * eigenvalues[0], rounding)
        if error <= floor and eigenvalues[-1] > floor:
            return eigenvalues[:, None].sqrt() * u, fisher_trace(lin)
        block = product
    return None


def fisher_trace(lin: Linearization) -> float:
    """tr F = Σ_v p_v ‖a_v − Σ_w p_w a_w‖², a_v = ∂z_v/∂y, with a_v from the weights of the unembedding.

    Where they do not say it, tr F = Σ_i e_iᵀ F e_i, one product with the unembedding per dimension of y.
    """
    p = lin.log_probs.exp()
    W = models.unembedding(lin.model, lin.trace, lin.row)
    if W is not None:
        some = list(zip(p.split(4096), lin.trace.slope[lin.row].split(4096), W.split(4096), strict=True))
        mean = sum((q * slope) @ models.precise(w) for q, slope, w in some)
        return sum(float(q @ (slope[:, None] * models.precise(w) - mean).square().sum(-1)) for q, slope, w in some)
    basis = torch.eye(len(lin.readout), device=lin.readout.device)
    return sum(float((p * deviations(p, lin.logits_jvp(some)).square()).sum()) for some in basis.split(128))


# -- F as a sum -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Seen:
    """A part of F, seen along a few directions Q of the readout: F = LᵀL + what Q does not see."""

    Q: Float[Tensor, "direction d_of"]
    """The directions, with Q F Qᵀ = 1."""
    L: Float[Tensor, "direction d_of"]
    """Q F, whose rows are the cotangents to pull back."""

    def and_also(self, other: "Seen") -> "Seen":
        """Both parts, where the other was made of directions that are `unseen` by this one."""
        return Seen(torch.cat([self.Q, other.Q]), torch.cat([self.L, other.L]))

    def unseen(self, directions: Float[Tensor, "some d_of"]) -> Float[Tensor, "some d_of"]:
        """What is left of some directions of the readout: δ with Q F δ = 0."""
        return directions - (directions @ self.L.T) @ self.Q


def seen(lin: Linearization, directions: Float[Tensor, "some d_of"]) -> Seen:
    """The part of F that these directions see, whatever their lengths.

    Cost: two products with the unembedding per direction.
    """
    products = fisher_products(lin, directions)
    sizes = (directions * products).sum(-1).clamp(min=0).sqrt()
    there = sizes > 0
    sizes = sizes[there, None]
    return _ritz(directions[there] / sizes, products[there] / sizes, len(directions))


def _ritz(directions: Tensor, products: Tensor, most: int) -> Seen:
    """Q and L from directions δ and F δ: the steepest combinations of them, without those that others span already."""
    eigenvalues, columns = (part.to(products) for part in torch.linalg.eigh((directions @ products.T).cpu()))
    kept = eigenvalues > 1e-12 * eigenvalues.amax(0) if len(eigenvalues) else eigenvalues > 0
    eigenvalues, ritz = eigenvalues[kept][-most:], columns.T[kept][-most:]
    root = eigenvalues[:, None].sqrt()
    return Seen((ritz @ directions) / root, (ritz @ products) / root)


def pulled_further(
    lins: Sequence[Linearization],
    parts: Sequence[Seen],
    pulled: Sequence[Float[Tensor, "_ _ d_model"]],
) -> list[Seen]:
    """For each linearisation the part of F along J Jᵀ L, which the part L given does not see.

    J stretches directions in which F is small, so that the leading directions of F are not those of the scores. One
    product with √F J Jᵀ √F turns them towards its own, of which few hold most of every score.

    Args:
        lins: linearisations of different prompts of a batch.
        parts: what is seen already.
        pulled: LᵀJ for each of them.

    Cost: a Jacobian-vector product per direction.

    Raises:
        NoSecondDerivativeError: under an attention kernel that has no double backward.
    """
    found = []
    for lin, part, pushed in zip(lins, parts, jvps(lins, pulled), strict=True):
        directions = part.unseen(models.precise(pushed))
        norms = directions.norm(dim=-1, keepdim=True)
        directions = directions / norms.where(norms > 0, torch.ones_like(norms))
        found.append(seen(lin, part.unseen(directions)))  # twice, since rounding leaves some of what was seen
    return found


def root_if_small(lin: Linearization, most: int) -> Float[Tensor, "direction d_of"] | None:
    """R with RᵀR = F, where it has no more than so many rows."""
    for one in lin.single:
        p = one.log_probs.exp().sort(descending=True).values
        # So few tokens are likely, or the readout has so few dimensions; else F need not be looked at.
        if most < len(one.readout) and p[most:].sum() > 1e-9 * p[1:].sum():
            return None
    root = fisher_root(lin)
    return root if len(root) <= most else None


def leading_part(lin: Linearization, count: int, generator: torch.Generator) -> Seen:
    """The part of F that directions close to its `count` leading ones see.

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
    return _ritz(Q, product, count)


def remainder_probes(
    lin: Linearization, count: int, part: Seen | None, generator: torch.Generator
) -> Float[Tensor, "probe d_of"]:
    """Random v with E[v vᵀ] = F − LᵀL, what a part of F leaves; with E[v vᵀ] = F without one.

    √p ε, with random signs ε over the vocabulary, goes through (diag p − p pᵀ)^½ and the unembedding, which gives F;
    taking (Q v) L away from it gives the remainder.

    Cost: one product with the unembedding per probe.
    """
    p = lin.log_probs.exp()
    signs = torch.randint(0, 2, (count, *p.shape), generator=generator, device=p.device).to(p) * 2 - 1
    draws = p.sqrt() * signs
    v = lin.logits_vjp(balanced(p, draws - p * draws.sum(-1, keepdim=True)))
    return v if part is None else v - (v @ part.Q.T) @ part.L
