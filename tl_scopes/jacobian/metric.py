"""q(x) near one point: its values, its derivative both ways, its curvature."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from tl_scopes import models
from tl_scopes.jacobian import curvature, pullback
from tl_scopes.jacobian.linearization import Linearization
from tl_scopes.scopes.scope import Observable

_POWER_ITERATIONS = 8
"""Towards the steepest direction of a vector, which need not be met exactly. One is exact for a number."""

_ROUNDED = 0.3
"""Root mean square of a rounding error, in units of the machine's epsilon: 1/√12 of the distance of two numbers."""


@dataclass(frozen=True, eq=False)
class Rays:
    """Directions [ray token d_model] of unit norm: the first ones move a single token each, the last ones all of them.

    What is zero stays zero: a token whose gradient vanishes, say.
    """

    token: Int[Tensor, " single"]
    single: Float[Tensor, "single d_model"]
    joint: Float[Tensor, "joint token d_model"]

    def __len__(self) -> int:
        return len(self.single) + len(self.joint)

    def dense(self, rows: Int[Tensor, " some"]) -> Float[Tensor, "some token d_model"]:
        """Some of them, written out."""
        written = self.joint.new_zeros(len(rows), *self.joint.shape[1:])
        one = rows < len(self.single)
        written[one.nonzero()[:, 0], self.token[rows[one]]] = _unit(self.single[rows[one]], -1)
        written[~one] = _unit(self.joint[rows[~one] - len(self.single)], (-2, -1))
        return written


def _unit(vectors: Tensor, axes: int | tuple[int, int]) -> Tensor:
    norms = vectors.norm(dim=axes, keepdim=True)
    return vectors / norms.where(norms > 0, torch.ones_like(norms))


class LocalObservable:
    """A function q of readout and logits, as a function of the embeddings near the point of a linearisation.

    Its value [m] is a vector; a number is one with m = 1.
    """

    def __init__(self, lin: Linearization, function: Observable) -> None:
        self.lin, self.function = lin, function
        # Apple's GPUs have no float64.
        self.precise = torch.float32 if lin.readout.device.type == "mps" else torch.float64
        self.batch = pullback.batch_size(lin.model, lin.embeddings[None])
        with torch.enable_grad():
            if lin.trace.logits is None:
                self._readout: Tensor = lin.readout[None].clone().requires_grad_()
                logits = None
            else:
                self._readout, logits = models.readout_graph(lin.model, lin.trace, lin.row)
            self._value = self._apply(self._readout, logits)[0]

    @property
    def value(self) -> Float[Tensor, " m"]:
        """q at the point itself."""
        return self._value.detach()

    def values(self, points: Float[Tensor, "point token d_model"]) -> Float[Tensor, "point m"]:
        """q(x) elsewhere.

        Cost: one forward pass per point, in batches, without a graph.
        """
        lin, found = self.lin, []
        for some in points.split(self.batch):
            tokens = lin.tokens.expand(len(some), -1)
            found.append(self._apply(*models.evaluate(lin.model, tokens, wrt=lin.wrt, of=lin.of, values=some)))
        return torch.cat(found)

    def replaced(self, positions: list[int], embedding: Float[Tensor, " d_model"]) -> Float[Tensor, "position m"]:
        """q with another embedding in the place of each of these tokens, one at a time.

        Cost: one forward pass per position.
        """
        found = []
        for at in range(0, len(positions), self.batch):
            some = positions[at : at + self.batch]
            points = self.lin.embeddings.repeat(len(some), 1, 1)
            points[range(len(some)), some] = embedding
            found.append(self.values(points))
        return torch.cat(found)

    def residuals(
        self, rays: Rays, slopes: Float[Tensor, "ray m"], sizes: Float[Tensor, " size"]
    ) -> Float[Tensor, "ray size"]:
        """‖q(x + su) − q(x) − s Ju‖ for every direction u and every size s.

        Cost: one forward pass per direction and size.
        """
        x, found = self.lin.embeddings, []
        origin = self.values(x[None])
        every = torch.arange(len(rays) * len(sizes), device=x.device)
        for some in every.split(self.batch):
            ray, step = some // len(sizes), sizes[some % len(sizes)][:, None]
            moved = self.values(x + step[..., None].to(x) * rays.dense(ray))
            found.append((moved - origin - step * slopes[ray]).norm(dim=-1))
        return torch.cat(found).reshape(len(rays), len(sizes))

    def rounding(self, draws: int, generator: torch.Generator) -> float:
        """How much q changes (root mean square) when the last digits of the embeddings do, and of what q reads.

        Cost: one forward pass per draw.
        """
        lin, eps = self.lin, torch.finfo(self.lin.readout.dtype).eps

        def blurred(values: Tensor, digits: float) -> Tensor:
            noise = torch.randn(draws, *values.shape, generator=generator, device=values.device)
            return values * (1 + digits * eps * noise.to(values))

        inside = self.values(blurred(lin.embeddings, 1.0)) - self.values(lin.embeddings[None])
        # So small a step may be lost between two numbers that a logit can be: those of half precision are far apart.
        logits = None if lin.trace.logits is None else blurred(lin.logits.to(self.precise), _ROUNDED)
        outside = self._apply(blurred(lin.readout.to(self.precise), _ROUNDED), logits) - self.value
        return float((inside.square() + outside.square()).sum(-1).mean().sqrt())

    # -- first order --------------------------------------------------------------------------------------------------

    @cached_property
    def gradient(self) -> Float[Tensor, "token d_model"]:
        """∂q/∂x of a number."""
        (cotangent,) = torch.autograd.grad(self._value, self._readout, retain_graph=True)
        return self.lin.vjp(cotangent)[0]

    def pull(self, cotangents: Float[Tensor, "some m"]) -> Float[Tensor, "some token d_model"]:
        """cᵀ ∂q/∂x. Cost: a backward pass each, of a number one in all."""
        if len(self._value) == 1:
            return cotangents.to(self.gradient)[..., None] * self.gradient
        (pulled,) = torch.autograd.grad(
            self._value, self._readout, cotangents, is_grads_batched=True, retain_graph=True
        )
        return self.lin.vjp(pulled[:, 0])

    def push(self, tangents: Float[Tensor, "some token d_model"]) -> Float[Tensor, "some m"]:
        """∂q/∂x δ. Cost: a double backward pass each, for a number none.

        Raises:
            RuntimeError: of a vector, under an attention kernel that has no double backward.
        """
        if len(self._value) == 1:
            return einsum(tangents.to(self.precise), self.gradient.to(self.precise), "some token d, token d -> some")[
                :, None
            ]
        cotangent = torch.zeros_like(self._value, requires_grad=True)
        (pulled,) = torch.autograd.grad(self._value, self._readout, cotangent, create_graph=True)
        (pushed,) = torch.autograd.grad(
            pulled, cotangent, self.lin.jvp(tangents)[:, None].to(pulled), is_grads_batched=True
        )
        return pushed

    def slopes(self, rays: Rays) -> Float[Tensor, "ray m"]:
        """Ju for every direction."""
        rows = torch.arange(len(rays), device=rays.token.device).split(self.batch)
        return torch.cat([self.push(rays.dense(some)) for some in rows])

    def steepest(self, starts: Rays) -> Rays:
        """The direction of largest ‖Ju‖ for each token and for all of them, by power iteration from a random start.

        Where the slope is zero, the start.
        """
        single, joint = [], []
        for row in range(len(starts)):
            ray = start = starts.dense(torch.tensor([row], device=starts.token.device))
            support = start.any(-1, keepdim=True)
            for _ in range(_POWER_ITERATIONS if len(self._value) > 1 else 1):
                ascent = self.pull(self.push(ray) if len(self._value) > 1 else self.value.new_ones(1, 1))
                ray = _unit(support * ascent, (-2, -1))
                ray = ray if ray.any() else start
            if row < len(starts.single):
                single.append(ray[0, starts.token[row]])
            else:
                joint.append(ray[0])
        return Rays(starts.token, torch.stack(single), torch.stack(joint))

    # -- second order -------------------------------------------------------------------------------------------------

    def curvatures(self, rays: Rays) -> Float[Tensor, " ray"] | None:
        """uᵀHu for every direction u, H = ∂²q/∂x² of a number:

            uᵀHu = uᵀ (∂²(cᵀy)/∂x²) u + (Ju)ᵀ (∂²q/∂y²) (Ju),   c = ∂q/∂y

        None of a vector, and under an attention kernel that has no double backward.

        Cost: a Hessian-vector product each, in batches: about two backward passes.
        """
        if len(self._value) > 1:
            return None
        lin = self.lin
        leaf = lin.trace.perturbations[lin.wrt]
        found = []
        with torch.enable_grad(), suppress(pullback.NoSecondDerivativeError), pullback.differentiated_twice():
            (cotangent,) = torch.autograd.grad(self._value, self._readout, create_graph=True)
            c = cotangent[0].detach().requires_grad_()
            (pulled,) = torch.autograd.grad(lin.trace.output[lin.row], leaf, c, create_graph=True)
            for some in torch.arange(len(rays), device=leaf.device).split(curvature.batch_size(lin.model, leaf)):
                u = rays.dense(some)[:, None]
                pushed, bent = _batched_grad(pulled, [c, leaf], u)
                (turned,) = _batched_grad(cotangent, [self._readout], pushed[:, None])
                found.append((bent * u).sum((1, 2, 3)) + (turned[:, 0] * pushed).sum(-1))
            return torch.cat(found).to(self.precise)
        return None

    # -- private ------------------------------------------------------------------------------------------------------

    def _apply(
        self, readouts: Float[Tensor, "row d_of"], logits: Float[Tensor, "row vocab"] | None
    ) -> Float[Tensor, "row m"]:
        empty: Sequence[Tensor] = [readouts.new_empty(0)] * len(readouts)
        seen = zip(readouts, empty if logits is None else logits, strict=True)
        return torch.stack([self.function(y.to(self.precise), z.to(self.precise)).reshape(-1) for y, z in seen])


def _batched_grad(output: Tensor, inputs: list[Tensor], cotangents: Tensor) -> list[Tensor]:
    """Gradients for each of the cotangents; zeros where an input has none, in what is linear."""
    if not output.requires_grad:
        return [x.new_zeros(len(cotangents), *x.shape) for x in inputs]
    found = torch.autograd.grad(output, inputs, cotangents, is_grads_batched=True, retain_graph=True, allow_unused=True)
    return [
        x.new_zeros(len(cotangents), *x.shape) if of_one is None else of_one
        for x, of_one in zip(inputs, found, strict=True)
    ]
