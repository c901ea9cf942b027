"""From measured changes to radii of validity: functions of plain tensors, which `linearity` and the checks share."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_scopes import models


def relative_error(
    residuals: Float[Tensor, "*batch direction size"],
    slopes: Float[Tensor, "*batch direction"],
    sizes: Float[Tensor, " size"],
    tolerance: float,
    rounding: float = 0.0,
) -> Float[Tensor, "*batch size"]:
    """√(Σ_u residual(s, u)² / Σ_u (s · slope(u))²), with residual(s, u) = ‖q(x + su) − q(x) − s Ju‖.

    It is NaN at the sizes where changes as small as `rounding` hide whether the error is within the tolerance.
    """
    found = residuals.square().mean(-2).sqrt()
    predicted = sizes * slopes.square().mean(-1, keepdim=True).sqrt()
    visible = torch.maximum(tolerance * predicted, found) >= 3 * rounding
    return (found / predicted).where(visible, torch.nan).where((predicted > 0) | (found > 0), 0.0)


def radius(
    sizes: Float[Tensor, " size"], errors: Float[Tensor, "*batch size"], tolerance: float
) -> Float[Tensor, "*batch"]:
    """The size at which the error first passes the tolerance.

    Between two sizes the error is taken to be a power of the size, below the smallest size to be proportional to it.
    The radius is infinite where the error does not pass at any size, and NaN where it is NaN at all sizes.
    """
    return torch.stack([_radius(sizes, e, tolerance) for e in errors.reshape(-1, len(sizes))]).reshape(
        errors.shape[:-1]
    )


def _radius(sizes: Tensor, errors: Tensor, tolerance: float) -> Tensor:
    sizes, errors = sizes[~errors.isnan()], errors[~errors.isnan()]
    passed = (errors > tolerance).nonzero()
    if not len(passed):
        return errors.new_tensor(torch.inf if len(errors) else torch.nan)
    first = int(passed[0])
    if first == 0:
        return sizes[0] * tolerance / errors[0]
    below = errors[first - 1].clamp(min=torch.finfo(errors.dtype).tiny)
    power = (tolerance / below).log() / (errors[first] / below).log()
    return sizes[first - 1] * (sizes[first] / sizes[first - 1]) ** power


def first_passed(
    sizes: Float[Tensor, " size"], errors: Float[Tensor, "*batch size"], tolerance: float
) -> Float[Tensor, "*batch"]:
    """The smallest of the sizes at which the error was measured and passes the tolerance; infinite where none does."""
    return torch.where(errors > tolerance, sizes, torch.inf).min(-1).values


def curvature_radius(
    slopes: Float[Tensor, "*batch direction"], curvatures: Float[Tensor, "*batch direction"], tolerance: float
) -> Float[Tensor, "*batch"]:
    """2 · tolerance · |Ju| / |uᵀHu|, pooled over directions: where the second order is `tolerance` of the first.

    It is infinite where there is no second order.
    """
    slope, bend = (values.square().mean(-1).sqrt() for values in (slopes, curvatures))
    return (2 * tolerance * slope / bend).where((slope > 0) | (bend != 0), torch.inf)


class NearestRows:
    """The rows nearest to each token, of a matrix that is seen some rows at a time.

    A token's own row and rows that equal it do not count.

    Args:
        x: the tokens.
        own: the row of the matrix that is each token's own.
        count: how many rows to find; where the matrix has fewer others, all of these.
    """

    at_once = 2**22
    """How many distances are held: 32 MiB in float64."""

    def __init__(self, x: Float[Tensor, "token d_model"], own: Int[Tensor, "token"], count: int) -> None:
        self.x, self.own, self.count, self.seen = x.to(models.sum_dtype(x)), own, count, 0
        self._near = self.x.new_empty(len(x), 0), own.new_empty(len(x), 0)

    def see(self, rows: Float[Tensor, "row d_model"]) -> None:
        """Take the next rows of the matrix."""
        for some in rows.split(max(1, self.at_once // max(1, len(self.x)))):
            away = torch.cdist(self.x, some.to(self.x), compute_mode="donot_use_mm_for_euclid_dist")
            numbers = torch.arange(self.seen, self.seen + len(some), device=away.device)
            self.seen += len(some)
            away = away.masked_fill((away == 0) | (numbers == self.own[:, None]), torch.inf)
            away = torch.cat([self._near[0], away], dim=1)
            numbers = torch.cat([self._near[1], numbers.expand(len(self.x), -1)], dim=1)
            away, at = away.topk(min(self.count, away.shape[1]), largest=False)
            self._near = away, numbers.gather(1, at)

    @property
    def found(self) -> tuple[Float[Tensor, "token near"], Int[Tensor, "token near"]]:
        """The distances of the nearest rows, and which rows these are, the nearest first."""
        others = self.seen - 1
        return self._near[0][:, :others], self._near[1][:, :others]
