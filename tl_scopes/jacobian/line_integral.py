"""The mean of the gradient of a number along a straight line of embeddings, by Gauss-Legendre quadrature."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, TypeAlias

import numpy as np
import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from tl_scopes import models
from tl_scopes.jacobian.linearization import Linearization
from tl_scopes.jacobian.pullback import vjps
from tl_scopes.progress import progress_bar

OfLogits: TypeAlias = Callable[[Tensor], Tensor]
"""A number that is computed from the logits [vocab]."""

_POINTS = 6
"""The points of a panel."""
_NARROWEST = 1e-9
"""Panels that are narrower than this are not divided: where f jumps no number of points is enough."""


@dataclass(frozen=True, eq=False)
class LineIntegral:
    """What a number f and its gradient do along the line x(α) = begin + α (x − begin), from α = 0 to 1."""

    mean: Float[Tensor, "token d_model"]
    """The mean over α of ∂f/∂x at x(α)."""
    rough_mean: Float[Tensor, "token d_model"]
    """The same from every other point."""
    alphas: tuple[float, ...]
    """The points α, and 1."""
    profile: Float[Tensor, "alpha token"]
    """‖∂f/∂x_t‖₂ at these points."""
    ends: tuple[float, float]
    """f where the line begins, and at the point of the linearisation."""

    def error(self, step: Float[Tensor, "token d_model"]) -> Float[Tensor, "token"]:
        """An estimate of the quadrature's error of ‖step_t ⊙ mean_t‖₂, from how far off the rough mean is.

        The rule on half the points is off by far more than the rule itself, whose error falls with the number of points
        like a power, here taken for the square. That was measured to hold for nine tokens in ten, and to exaggerate by
        a factor of five.
        """
        size, rough_error = (step * self.mean).norm(dim=-1), (step * (self.mean - self.rough_mean)).norm(dim=-1)
        return rough_error * (rough_error.sum() / size.sum()).nan_to_num(0).clamp(max=1)


def integrate(lin: Linearization, f: OfLogits, begin: Float[Tensor, "token d_model"], steps: int) -> LineIntegral:
    """The mean gradient of f from `begin` to the point of the linearisation. In float64.

    Cost: `steps` forward and backward passes, in groups of bounded memory, a forward pass where the line begins, and a
        backward pass where it ends. A progress bar appears after a few seconds.

    Raises: as `Linearization.at` and `Linearization.cotangent` do.
    """
    nodes, weights = gauss_legendre(steps)
    weights = torch.as_tensor(weights, dtype=begin.dtype, device=begin.device)
    means = begin.new_zeros(2, *begin.shape)
    profile: list[Tensor] = []
    done = 0
    for gradients, _ in _gradients(lin, f, begin, nodes):
        some = slice(done, done := done + len(gradients))
        means += einsum(weights[:, some], gradients, "rule alpha, alpha token d_model -> rule token d_model")
        profile.append(gradients.norm(dim=-1))
    profile.append(_slopes_at_end(lin, f, begin))
    ends = _values(lin, f, begin, [0.0])[0.0], _value(f, lin.logits)
    return LineIntegral(means[0], means[1], (*nodes.tolist(), 1.0), torch.cat(profile), ends)


@dataclass(frozen=True, eq=False)
class _Panel:
    """A part of the line, and the rule's integral over it."""

    begin: float
    end: float
    integrals: Float[Tensor, "rule token d_model"]
    gap: float
    """How far off the integral is from what f changes by, which both ends tell."""
    bend: tuple[float, float]
    """The two neighbours, among its points and ends, between which f does least what its slopes there say."""

    def parts(self) -> list[tuple[float, float]]:
        """What it is divided into: what stands between the two points of the bend, and what is left on both sides."""
        return list(pairwise(sorted({self.begin, *self.bend, self.end})))


def integrate_in_panels(
    lin: Linearization, f: OfLogits, begin: Float[Tensor, "token d_model"], ends: list[float], share: float, most: int
) -> LineIntegral:
    """The mean gradient of f from `begin` to the point of the linearisation, with more points where f is rough.

    Each panel has 6 points. What its contributions miss of f(end) − f(begin) is its error, known exactly from two
    forward passes. The worst panels are divided in three, the bend of f in the middle (see `_Panel`), until the sum of
    these errors is within a share of the whole change (or of a tenth of what all tokens contribute, if the change is
    smaller), or there are too many points. In float64.

    A step of f that is far narrower than a panel lies between two of its points, where the third part closes in on it
    five times as fast as a half would.

    Args:
        lin: the linearisation at the end of the line.
        f: the number.
        begin: where the line begins.
        ends: the panels to begin with, by their ends, from 0 to 1.
        share: the share of the change that may be missed.
        most: how many points there may be at most.

    Cost: a forward and a backward pass for each point, a forward pass for each of the `ends`.

    Raises: as `integrate` does.
    """
    step = lin.embeddings.to(begin) - begin
    seen: dict[float, Tensor] = {}
    values = {1.0: _value(f, lin.logits)}
    panels: list[_Panel] = []
    new = list(pairwise(ends))
    spent = 0
    while True:
        spent += _POINTS * len(new)
        panels += _evaluated(lin, f, begin, new, values, seen)
        means = torch.stack([panel.integrals for panel in panels]).sum(0)
        change = values[1.0] - values[0.0]
        allowed = share * max(abs(change), 0.1 * float((means[0] * step).sum(-1).abs().sum()))
        panels.sort(key=lambda panel: abs(panel.gap))
        # Errors of two panels may cancel, but not by much more than they add up to.
        gaps = [panel.gap for panel in panels]
        if abs(sum(gaps)) <= allowed and sum(map(abs, gaps)) <= 5 * allowed:
            break
        # The worst first: where f jumps, all points are needed there.
        least = max(allowed / (2 * len(panels)), abs(gaps[-1]) / 4)
        worst = [panel for panel in panels if abs(panel.gap) >= least and panel.end - panel.begin > _NARROWEST]
        many = min((most - spent) // (3 * _POINTS), len(worst))
        if many < 1:
            break
        divided = worst[-many:]
        panels = [panel for panel in panels if panel not in divided]
        new = [part for panel in divided for part in panel.parts()]
    alphas = sorted(seen)
    profile = torch.cat([torch.stack([seen[alpha] for alpha in alphas]), _slopes_at_end(lin, f, begin)])
    return LineIntegral(means[0], means[1], (*alphas, 1.0), profile, (values[0.0], values[1.0]))


def _evaluated(
    lin: Linearization,
    f: OfLogits,
    begin: Tensor,
    new: list[tuple[float, float]],
    values: dict[float, float],
    seen: dict[float, Tensor],
) -> list[_Panel]:
    """The integrals over some panels; what was found on the way is added to `values` and `seen`."""
    nodes, weights = gauss_legendre(_POINTS)
    rules = torch.as_tensor(weights, dtype=begin.dtype, device=begin.device)
    values |= _values(lin, f, begin, sorted({end for panel in new for end in panel} - values.keys()))
    all_nodes = np.concatenate([a + (b - a) * nodes for a, b in new])
    parts, at_nodes = zip(*_gradients(lin, f, begin, all_nodes), strict=True)
    gradients = torch.cat(parts)
    seen |= dict(zip(all_nodes.tolist(), gradients.norm(dim=-1), strict=True))
    values |= dict(zip(all_nodes.tolist(), chain(*at_nodes), strict=True))
    step, found = lin.embeddings.to(begin) - begin, []
    for (a, b), inside, of_panel in zip(new, all_nodes.reshape(-1, _POINTS), gradients.split(_POINTS), strict=True):
        integrals = (b - a) * einsum(rules, of_panel, "rule alpha, alpha token d_model -> rule token d_model")
        gap = float((integrals[0] * step).sum()) - (values[b] - values[a])
        slopes = einsum(of_panel, step, "alpha token d_model, token d_model -> alpha").tolist()
        alphas = np.array([a, *inside, b])
        found.append(_Panel(a, b, integrals, gap, _bend(alphas, np.array([values[i] for i in alphas]), slopes)))
    return found


def _bend(alphas: Any, values: Any, slopes: list[float]) -> tuple[float, float]:
    """The neighbours between which f changes least as the mean of its slopes there says; none is known at the ends."""
    known = np.array([slopes[0], *slopes, slopes[-1]])
    missed = np.diff(values) - np.diff(alphas) * (known[1:] + known[:-1]) / 2
    worst = int(np.abs(missed).argmax())
    return float(alphas[worst]), float(alphas[worst + 1])


def _points(
    lin: Linearization, begin: Tensor, alphas: Any, size: int
) -> Iterator[Float[Tensor, "alpha token d_model"]]:
    """The points of the line at some α, in groups of this size."""
    step = lin.embeddings.to(begin) - begin
    for i in range(0, len(alphas), size):
        some = torch.as_tensor(alphas[i : i + size], dtype=begin.dtype, device=begin.device)
        yield begin + some[:, None, None] * step


def _value(f: OfLogits, logits: Float[Tensor, "*row vocab"]) -> float:
    return float(f(logits.cpu().double()))


def _values(lin: Linearization, f: OfLogits, begin: Tensor, alphas: list[float]) -> dict[float, float]:
    """f at points of the line, from forward passes without a graph."""
    found: list[float] = []
    for points in _points(lin, begin, alphas, lin.at_once(models.Work.PREDICTION)):
        _, logits = lin.evaluate(points)
        assert logits is not None
        found += [_value(f, of_point) for of_point in logits]
    return dict(zip(alphas, found, strict=True))


def _slopes_at_end(lin: Linearization, f: OfLogits, begin: Tensor) -> Float[Tensor, "1 token"]:
    """‖∂f/∂x_t‖₂ at the point of the linearisation."""
    return lin.vjp(lin.cotangent(f)[None]).to(begin).norm(dim=-1)


def _gradients(
    lin: Linearization, f: OfLogits, begin: Tensor, nodes: Any
) -> Iterator[tuple[Float[Tensor, "alpha token d_model"], list[float]]]:
    """∂f/∂x at the nodes on the line, and f, in groups that are run together."""
    with progress_bar(len(nodes), "path") as bar:
        for embeddings in _points(lin, begin, nodes, lin.at_once(models.Work.GRAPH)):
            points = lin.at_each(embeddings)
            gradients = vjps(points, [point.cotangent(f)[None] for point in points])
            yield torch.cat(gradients).to(begin), [_value(f, point.logits) for point in points]
            bar.update(len(points))


def gauss_legendre(steps: int) -> tuple[Any, Any]:
    """Points in [0, 1], and two rows of weights: of the Gauss-Legendre rule, exact for polynomials of degree
    2·steps − 1, and of the rule on every other point, exact for as many powers as it has points.
    """
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    some = slice(steps % 2 == 0, None, 2)
    powers = np.polynomial.legendre.legvander(nodes[some], len(nodes[some]) - 1).T
    rougher = np.zeros(steps)
    rougher[some] = np.linalg.solve(powers, [2.0, *[0.0] * (len(powers) - 1)])
    return (1 + nodes) / 2, np.stack([weights, rougher]) / 2
