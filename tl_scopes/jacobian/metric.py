"""A metric q(x) near one point: its values, its derivative both ways, its curvature.

A metric is what is measured of the readout and the logits. The word is that of activation patching in TransformerLens.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from tl_scopes import models
from tl_scopes.jacobian import pullback
from tl_scopes.jacobian.linearization import Linearization
from tl_scopes.jacobian.replacement import with_replaced
from tl_scopes.models import Work

Metric: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""A function from a readout [d_of] and its logits [vocab] (empty where there are none), in float64, to a number or a
vector."""

_POWER_ITERATIONS = 8
"""How many power iterations lead to the steepest direction of a vector metric. For a number one is exact."""

_ROUNDED = 0.3
"""The root mean square of a rounding error, in units of the machine's epsilon: 1/√12 of the distance between
neighbouring numbers."""


@dataclass(frozen=True, eq=False)
class Rays:
    """Directions [ray token d_model] of unit norm: the first ones move a single token each, the last ones all of them.

    A direction that is zero, such as the gradient of a token that does not matter, stays zero.
    """

    token: Int[Tensor, " single"]
    """Which token each of the first ones moves."""
    single: Float[Tensor, "single d_model"]
    """Where to, of any norm."""
    joint: Float[Tensor, "joint token d_model"]
    """Where the last ones move all tokens to, of any norm."""

    def __len__(self) -> int:
        return len(self.single) + len(self.joint)

    def dense(self, rows: Int[Tensor, " some"]) -> Float[Tensor, "some token d_model"]:
        """Some of the directions, with a vector for every token."""
        written = self.joint.new_zeros(len(rows), *self.joint.shape[1:])
        one = rows < len(self.single)
        written[one.nonzero()[:, 0], self.token[rows[one]]] = _unit(self.single[rows[one]], -1).to(written)
        written[~one] = _unit(self.joint[rows[~one] - len(self.single)], (-2, -1))
        return written


def _unit(vectors: Tensor, axes: int | tuple[int, int]) -> Tensor:
    norms = models.precise(vectors).norm(dim=axes, keepdim=True).to(vectors)
    return vectors / norms.where(norms > 0, torch.ones_like(norms))


class LocalMetric:
    """A metric q of readout and logits, as a function of the embeddings near the point of a linearisation.

    Its value [m] is a vector; a number is a vector with m = 1. Away from the point the model runs again, under the
    hooks that act then.

    Raises:
        ValueError: for a function whose value is not a real tensor, or does not depend on what it is given.
    """

    def __init__(self, lin: Linearization, function: Metric) -> None:
        self.lin, self.function = lin, function
        self.precise = models.precise_dtype(lin.readout.device)
        self.batch = lin.at_once(Work.PREDICTION)
        self._scale = self._size_of_slope()
        with torch.enable_grad():
            if lin.trace.logits is None:
                self._readout: Tensor = lin.readout.reshape(len(lin.ends.rows), -1).clone().requires_grad_()
                logits = None
            else:
                self._readout, logits = models.readout_graph(lin.model, lin.trace, lin.ends.rows, twice=True)
                logits = logits.reshape(1, *lin.logits.shape)
            self._value = self._apply(self._readout.reshape(1, -1), logits)[0]

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
            found.append(self._apply(*lin.evaluate(some)))
        return torch.cat(found)

    def replaced(self, positions: list[int], embedding: Float[Tensor, " d_model"]) -> Float[Tensor, "position m"]:
        """q with another embedding in the place of each of these tokens, one at a time.

        Cost: one forward pass per position.
        """
        return self.values(with_replaced(self.lin.embeddings, positions, embedding))

    def residuals(
        self, rays: Rays, slopes: Float[Tensor, "ray m"], sizes: Float[Tensor, "#ray size"]
    ) -> Float[Tensor, "ray size"]:
        """‖q(x + su) − q(x) − s Ju‖ for every direction u and every size s; each direction may have its own sizes.

        Cost: one forward pass per direction and size, and one for q(x).
        """
        x, steps, found = self.lin.embeddings, sizes.expand(len(rays), -1), []
        origin: Tensor | None = None
        for some in torch.arange(steps.numel(), device=x.device).split(self.batch):
            ray, step = some // steps.shape[1], steps.flatten()[some][:, None]
            moved = x + step[..., None].to(x) * rays.dense(ray)
            if (
                origin is None
            ):  # q(x) goes through the model with the first points, which costs less than a pass of its own
                values = self.values(torch.cat([x[None], moved]))
                origin, values = values[:1], values[1:]
            else:
                values = self.values(moved)
            found.append((values - origin - step * slopes[ray]).norm(dim=-1))
        return torch.cat(found).reshape(steps.shape)

    def rounding(self, draws: int, generator: torch.Generator) -> float:
        """How much q changes (root mean square) when the last digits of the embeddings, and of what q reads, change.

        Cost: one forward pass per draw.
        """
        lin, eps = self.lin, torch.finfo(self.lin.readout.dtype).eps

        def blurred(values: Tensor, digits: float) -> Tensor:
            noise = torch.randn(draws, *values.shape, generator=generator, device=values.device)
            return values * (1 + digits * eps * noise.to(values))

        inside = self.values(blurred(lin.embeddings, 1.0)) - self.values(lin.embeddings[None])
        # A small step may be lost between two neighbouring values of a logit, which are far apart in half precision.
        logits = None if lin.trace.logits is None else blurred(lin.logits.to(self.precise), _ROUNDED)
        outside = self._apply(blurred(lin.readout.to(self.precise), _ROUNDED), logits) - self.value
        return float((inside.square() + outside.square()).sum(-1).mean().sqrt())

    @property
    def rounding_unit(self) -> float:
        """About how far q moves when one of the numbers that it reads is rounded, for a q that is a number:

            ε · max(|y|, |z|) · ‖∂q/∂(y, z)‖

        with the readout y, its logits z and the machine's epsilon ε. Of the slope the next lower power of two is taken.
        """
        lin = self.lin
        read = [lin.readout, *([] if lin.trace.logits is None else [lin.logits])]
        largest = max(float(values[values.isfinite()].abs().max()) for values in read)
        return torch.finfo(lin.readout.dtype).eps * largest * self._scale

    # -- first order --------------------------------------------------------------------------------------------------

    @cached_property
    def gradient(self) -> Float[Tensor, "token d_model"]:
        """∂q/∂x, for a q that is a number. In float64."""
        seed = torch.full_like(self._value, 1 / self._scale)
        (cotangent,) = torch.autograd.grad(self._value, self._readout, seed, retain_graph=True)
        return models.precise(self.lin.vjp(cotangent.reshape(1, -1))[0]) * self._scale

    def pull(self, cotangents: Float[Tensor, "some m"]) -> Float[Tensor, "some token d_model"]:
        """cᵀ ∂q/∂x for every c.

        Cost: a backward pass for each c; one in all for a q that is a number.
        """
        if len(self._value) == 1:
            return cotangents.to(self.gradient)[..., None] * self.gradient
        together = self.lin.unembeds_together
        return self.lin.vjp(pullback.products(self._value, self._readout, cotangents, together=together).flatten(1))

    def push(self, tangents: Float[Tensor, "some token d_model"]) -> Float[Tensor, "some m"]:
        """∂q/∂x δ for every δ.

        Cost: a double backward pass for each δ; for a q that is a number, the one pass of its gradient.

        Raises:
            RuntimeError: for a vector q under an attention kernel that has no double backward.
        """
        if len(self._value) == 1:
            slope = self.gradient
            return einsum(tangents.to(slope), slope, "some token d, token d -> some")[:, None]
        cotangent = torch.zeros_like(self._value, requires_grad=True)
        (pulled,) = torch.autograd.grad(self._value, self._readout, cotangent, create_graph=True)
        moved = self.lin.jvp(tangents).to(pulled).reshape(-1, *pulled.shape)
        return pullback.products(pulled, cotangent, moved, together=self.lin.unembeds_together)

    def slopes(self, rays: Rays) -> Float[Tensor, "ray m"]:
        """Ju for every direction."""
        rows = torch.arange(len(rays), device=rays.token.device).split(self.batch)
        return torch.cat([self.push(rays.dense(some)) for some in rows])

    def steepest(self, starts: Rays) -> Rays:
        """The direction of largest ‖Ju‖ for each token and for all of them, by power iteration from a random start.

        Where the slope is zero, the start is the answer.
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
        """uᵀHu for every direction u, with H = ∂²q/∂x² for a q that is a number:

            uᵀHu = uᵀ (∂²(cᵀy)/∂x²) u + (Ju)ᵀ (∂²q/∂y²) (Ju),   c = ∂q/∂y

        It is None for a vector q, and under an attention kernel that has no double backward.

        Cost: a Hessian-vector product for each u, about two backward passes, in batches.
        """
        if len(self._value) > 1:
            return None
        lin, y = self.lin, self._readout
        leaf = lin.trace.perturbations[lin.wrt]
        size = pullback.batch_size(lin.model, lin.trace, leaf, Work.CURVATURE)
        found = []
        with torch.enable_grad(), suppress(pullback.NoSecondDerivativeError), pullback.differentiated_twice():
            seed = torch.full_like(self._value, 1 / self._scale)
            (slope,) = torch.autograd.grad(self._value, y, seed, create_graph=True)
            c = slope.detach().requires_grad_()
            (pulled,) = torch.autograd.grad(lin.trace.output[list(lin.ends.rows)], leaf, c, create_graph=True)
            for some in torch.arange(len(rays), device=leaf.device).split(size):
                u = lin.ends.spread(rays.dense(some), leaf.new_zeros(len(some), *leaf.shape))
                Ju, bent = _derivatives(pulled, [c, leaf], u, together=size > 1)
                (turned,) = _derivatives(slope, [y], Ju, together=lin.unembeds_together)
                found.append((bent * u).sum((1, 2, 3)) + (turned * Ju).sum((1, 2)))
            return torch.cat(found).to(self.precise) * self._scale
        return None

    # -- private ------------------------------------------------------------------------------------------------------

    def _apply(
        self, readouts: Float[Tensor, "row d_of"], logits: Float[Tensor, "row *prediction vocab"] | None
    ) -> Float[Tensor, "row m"]:
        empty: Sequence[Tensor] = [readouts.new_empty(0)] * len(readouts)
        seen = zip(readouts, empty if logits is None else logits, strict=True)
        return torch.stack([self.function(y.to(self.precise), z.to(self.precise)).reshape(-1) for y, z in seen])

    def _size_of_slope(self) -> float:
        """A power of two near ‖∂q/∂(y, z)‖, by which a q that is a number is divided on its way through the model."""
        given = [self.lin.readout, self.lin.readout[:0] if self.lin.trace.logits is None else self.lin.logits]
        with torch.enable_grad():
            leaves = [x.to(self.precise).clone().requires_grad_() for x in given]
            value = self.function(*(leaf.clone() for leaf in leaves))
            if not isinstance(value, Tensor) or value.is_complex():
                raise ValueError(f"a metric must give a tensor of real numbers, got {value!r}.")
            slopes = torch.autograd.grad(value.sum(), leaves, allow_unused=True) if value.requires_grad else ()
        known = [slope for slope in slopes if slope is not None]
        if not known:
            raise ValueError(
                f"the metric gave {value!r}, which cannot be differentiated with respect to the readout or the logits: "
                "compute it from what it is given, without detach, argmax or item."
            )
        if value.numel() > 1:
            return 1.0
        return pullback.power_of_two(float(torch.cat([slope.flatten() for slope in known]).norm()))


def _derivatives(output: Tensor, inputs: list[Tensor], cotangents: Tensor, *, together: bool) -> list[Tensor]:
    """∂(cᵀ output)/∂x for every cotangent c and each input x; zeros where the output is linear in another one alone."""
    found: list[Tensor | None] = [None] * len(inputs)
    if output.requires_grad:
        found = pullback.gradients([output], inputs, [cotangents], together=together)
    return [
        x.new_zeros(len(cotangents), *x.shape) if of_one is None else of_one
        for x, of_one in zip(inputs, found, strict=True)
    ]
