"""Cuts of a network, and the parts of a score that pass the pieces of one: by forward and by backward mode."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from tl_scopes import models
from tl_scopes.circuits.traced import ComponentTrace, Gradients, Site, linearised
from tl_scopes.jacobian import pullback
from tl_scopes.models import Part, Work

By: TypeAlias = Literal["position", "layer", "head", "qkv", "neuron"]
"""What a layer is cut into."""

PARTS: dict[str, tuple[Part, ...]] = {
    "position": ("resid_pre", "resid_post"),
    "layer": ("attn_out", "mlp_out"),
    "head": ("z", "resid_pre", "resid_post"),
    "qkv": ("z", "q", "k", "v"),
    "neuron": ("post",),
}
"""The kinds of components whose values a cut needs. For heads the stream comes along, which costs nothing."""


@dataclass(frozen=True, eq=False)
class Piece:
    """Some components of one layer, with G_k = ∂(cᵀy)/∂k for each; heads that share keys have one each."""

    site: Site
    gradient: Float[Tensor, "token head d_head"]

    def parts(self, tangent: Tensor) -> Float[Tensor, "step token head"]:
        """⟨G_k, T_k⟩ at each position, for the tangents T_k [step ...] of the site's value."""
        arrived = self.site.as_heads(tangent)
        shared = self.gradient.shape[-2] // arrived.shape[-2]
        arrived = arrived.repeat_interleave(shared, -2) if shared > 1 else arrived
        return (models.precise(self.gradient) * models.precise(arrived)).sum(-1)

    def cotangents(self, by_position: bool) -> Iterator[Tensor]:
        """G_k in the shape of the site's value, zero but for one head, or one position, at a time."""
        tokens, heads, width = self.gradient.shape
        if by_position:
            for position in range(tokens):
                one = torch.zeros_like(self.gradient)
                one[position] = self.gradient[position]
                yield self.site.as_hooked(one)
            return
        groups = self.site.as_heads(self.site.value).shape[-2]
        for head in range(heads):
            one = self.gradient.new_zeros(tokens, groups, width)
            one[:, head * groups // heads] = self.gradient[:, head]
            yield self.site.as_hooked(one)


def pieces(of: ComponentTrace, by: By, gradients: Sequence[Tensor]) -> list[Piece]:
    """The components of a cut with their gradients."""
    known = dict(zip(of.sites, gradients, strict=True))
    if by != "qkv":
        return [Piece(site, site.as_heads(known[site])) for site in of.sites]
    found = []
    for z in of.of("z"):
        layer = z.component.layer
        found.append(Piece(z, z.as_heads(known[z])))
        found += _of_each_head(of, z, known, [s for s in of.of("q", "k", "v") if s.component.layer == layer])
    return found


def _of_each_head(of: ComponentTrace, z: Site, known: dict[Site, Tensor], sites: Sequence[Site]) -> list[Piece]:
    """The queries, keys and values of one layer, with gradients through each query head by itself.

    Each query head has queries of its own. Where several heads share a key, ∂(cᵀy)/∂k is a sum over them: a backward
    pass within the layer's attention for every head of a group but the last tells them apart.

    Raises:
        ValueError: for a layer without hooks on its queries, keys or values; for one where J begins behind them.
    """
    through = z.as_heads(known[z])
    heads = through.shape[-2]
    _require_qkv(of, z.component.layer, {site.component.part for site in sites})
    found = []
    shared = {site: heads // site.as_heads(site.value).shape[-2] for site in sites}
    parted = [site for site in sites if shared[site] > 1 and site.value.requires_grad and z.value.requires_grad]
    alone: dict[Site, list[Tensor]] = {site: [] for site in parted}
    for turn in range(max(shared.values()) - 1 if parted else 0):
        masked = torch.zeros_like(through)
        ours = slice(turn, None, max(shared.values()))
        masked[:, ours] = through[:, ours]
        with models.undisturbed(of.trace):
            values = [site.value for site in parted]
            seen = torch.autograd.grad(z.value, values, z.as_hooked(masked), retain_graph=True, allow_unused=True)
        for site, one in zip(parted, seen, strict=True):
            alone[site].append(torch.zeros_like(site.value) if one is None else one)  # None where the pattern is held
    for site in sites:
        whole = site.as_heads(known[site])
        if site in alone:
            some = [site.as_heads(one) for one in alone[site]]
            whole = torch.stack([*some, whole - sum(some)], dim=-2).flatten(-3, -2)  # [token (group head) d_head]
        found.append(Piece(site, whole))
    return found


def _require_qkv(of: ComponentTrace, layer: int, found: Collection[Part]) -> None:
    """Refuse a layer of which the graph does not have the queries, keys and values.

    Raises:
        ValueError: with the hook.
    """
    parts: tuple[Part, ...] = ("q", "k", "v")
    for part in parts:
        if part in found:
            continue
        there = [one.hook for one in models.components(of.lin.model, part) if one.layer == layer]
        if there and of.lin.wrt != models.EMBEDDING:  # from there on a hook that is not met does not run at all
            raise ValueError(
                f"{there[0]!r} does not lie between {of.lin.wrt!r} and {of.lin.of!r}, where this linearisation begins "
                "and ends, but what the heads of its layer give out does: linearise from an earlier hook, or ask "
                'by="head".'
            )
        raise models.absent(of.lin.model, part, [layer])


@dataclass(frozen=True, eq=False)
class Carried:
    """The parts of cᵀJ_t δ_t for one cotangent c, by piece, position and source token.

    All are of the cotangent at a norm near 1, as `Gradients` are.
    """

    gradients: Gradients
    steps: Float[Tensor, "token d_model"]
    """δ_t, how each token moves."""
    parts: list[tuple[Piece, Float[Tensor, "_ _ _"]]]
    """By backward mode the axis of positions, where it is not what the cut is made of, is summed and has length 1."""


def steepest(pulled: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_model"]:
    """ĝ_t = g_t/‖g_t‖; zero where the token does not matter."""
    exact = models.precise(pulled)
    norms = exact.norm(dim=-1, keepdim=True)
    return exact / norms.where(norms > 0, torch.ones_like(norms))


Steps: TypeAlias = Callable[[Float[Tensor, "token d_model"]], Float[Tensor, "token d_model"]]
"""How each token moves, from the gradients at the tokens: `steepest`, or whatever these are."""

Mode: TypeAlias = Callable[
    [ComponentTrace, By, Float[Tensor, " d_of"], Steps, Sequence[int], Callable[[int], object]],
    Carried,
]
"""`forward` or `backward`. The last argument is told how many of its products are done."""


def forward(
    of: ComponentTrace,
    by: By,
    cotangent: Float[Tensor, " d_of"],
    steps: Steps,
    sources: Sequence[int],
    done: Callable[[int], object],
) -> Carried:
    """One product with the Jacobian of all components for every source token.

    Cost: a backward pass and another one for each source token; where blocks are checkpointed, a backward pass and
        about three forward passes for each source token, with memory for one block.

    Raises:
        NoSecondDerivativeError: under an attention kernel that has no double backward.
    """
    try:
        return _forward(of, by, cotangent, steps, sources, done, dual=of.trace.checkpointed)
    except NotImplementedError:  # an operation without a forward-mode derivative (Bloom's activation)
        return _forward(of, by, cotangent, steps, sources, done, dual=False)


def _forward(
    of: ComponentTrace,
    by: By,
    cotangent: Tensor,
    steps: Steps,
    sources: Sequence[int],
    done: Callable[[int], object],
    *,
    dual: bool,
) -> Carried:
    push: Callable[[Tensor], list[Tensor]]
    if dual:
        gradients = of.gradients(cotangent)
        size = models.at_once(of.lin.model, len(of.lin.tokens), Work.PREDICTION, texts=2, rows=2)
        push = _by_dual_numbers(of)
    else:
        gradients, tangents = linearised(of, cotangent)
        push, size = tangents.push, of.size
    cut = pieces(of, by, gradients.of_sites)
    directions = steps(gradients.pulled)
    tokens = 1 if by == "neuron" else len(of.lin.tokens)
    parts = [(piece, directions.new_zeros(piece.gradient.shape[1], tokens, len(sources))) for piece in cut]
    place = {site: i for i, site in enumerate(of.sites)}
    for some in torch.arange(len(sources), device="cpu").split(size):
        alone = directions.new_zeros(len(some), *directions.shape)
        for row, i in enumerate(some.tolist()):
            alone[row, sources[i]] = directions[sources[i]]
        arrived = push(alone)
        for piece, into in parts:
            found = piece.parts(arrived[place[piece.site]])
            into[..., some] = (found.sum(1, keepdim=True) if by == "neuron" else found).permute(2, 1, 0)
        done(len(some))
    return Carried(gradients, directions, parts)


def _by_dual_numbers(of: ComponentTrace) -> Callable[[Tensor], list[Tensor]]:
    """T_k by forward-mode differentiation, in a pass of its own that keeps no graph."""
    lin = of.lin

    def push(steps: Float[Tensor, "step token d_model"]) -> list[Tensor]:
        arrived = [site.value.new_zeros(len(steps), *site.value.shape) for site in of.sites]

        def meet(into: Tensor) -> Callable[[Tensor], None]:
            def act(tangent: Tensor) -> None:
                into.copy_(tangent.reshape(into.shape))

            return act

        met = {site.component.hook: meet(into) for site, into in zip(of.sites, arrived, strict=True)}
        tokens = lin.tokens.expand(len(steps), -1)
        values = lin.embeddings.expand(len(steps), -1, -1) if of.trace.moved else None
        models.push(lin.model, tokens, steps, met, wrt=lin.wrt, of=lin.of, values=values, rules=lin.trace.rules)
        return arrived

    return push


def backward(
    of: ComponentTrace,
    by: By,
    cotangent: Float[Tensor, " d_of"],
    steps: Steps,
    sources: Sequence[int],
    done: Callable[[int], object],
) -> Carried:
    """One backward pass for every component, from there to all tokens at once.

    Cost: a backward pass, and about half of one for every component.
    """
    gradients = of.gradients(cotangent)
    moved = steps(gradients.pulled)
    directions = moved[list(sources)]
    work = Work.PULLBACK
    cut = [one for one in pieces(of, by, gradients.of_sites) if by != "head" or one.site.component.part == "z"]
    size = models.at_once(of.lin.model, len(of.lin.tokens), work, size=of.leaf.element_size()) if of.size > 1 else 1
    parts = []
    for piece in cut:
        found = []
        waiting = piece.cotangents(by == "position") if piece.site.value.requires_grad else iter(())
        while some := list(islice(waiting, size)):
            with models.undisturbed(of.trace):
                back = pullback.products(piece.site.value, of.leaf, torch.stack(some), together=size > 1)[:, 0]
            found.append((models.precise(back[:, list(sources)]) * directions).sum(-1))
            done(len(some))
        count = piece.gradient.shape[0 if by == "position" else 1]
        rows = torch.cat(found) if found else directions.new_zeros(count, len(sources))
        parts.append((piece, rows[None] if by == "position" else rows[:, None]))
    return Carried(gradients, moved, parts)
