"""Does influence sit on nearest neighbours in delay-embedding space, beyond recency and value similarity?"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Float, Int, Real
from torch import Tensor

from tl_scopes.models import abridged, as_count
from tl_scopes.series.influence import SeriesInfluence
from tl_scopes.views import series as pictures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Given = Literal["recency", "value", "next", "previous"]
LEAST = 6
"""How many series a test needs at least."""
_RIDGE, _KNOTS = 0.1, 6


@dataclass(frozen=True, eq=False, repr=False)
class NeighborTest:
    """Whether influence sits on the successors of nearest neighbours.

    Attributes:
        gain: by how much of the whole ranking (1 is from the last place to the first) these numbers rank higher than
            numbers that are alike in all that is `given`; the mean over the series.
        statistic: the mean over the series of the covariance of both residuals, over its standard error.
        p: how often the null reaches that; one-sided.
        per_series: [series], the covariance in each series.
        null: [permutation], the statistic where the influence in one series is laid over the neighbours in another.
        dimension: of the delay embedding.
        neighbors: how many neighbours count.
        given: what is held fixed.
    """

    gain: float
    statistic: float
    p: float
    per_series: Float[Tensor, " series"]
    null: Float[Tensor, " permutation"]
    dimension: int
    neighbors: int
    given: tuple[str, ...]

    def __repr__(self) -> str:
        held = " and ".join(self.given) or "nothing"
        return (
            f"NeighborTest(dimension {self.dimension}, given {held}: gain {self.gain:+.3f}, p = {self.p:.3f}; "
            f"{len(self.per_series)} series)"
        )

    def plot(self) -> "Figure":
        """The null, and where the statistic stands in it."""
        return pictures.neighbors(self)


def neighbor_test(
    influence: Sequence[SeriesInfluence] | Real[Tensor, "series number"],
    series: Real[Tensor, "other number2"] | None = None,
    *,
    generator: torch.Generator,
    dimension: int = 1,
    neighbors: int = 5,
    given: Sequence[str] = ("recency", "value"),
    following: Real[Tensor, " series"] | Sequence[float | int] | None = None,
    mirrored: bool = False,
    permutations: int = 999,
) -> NeighborTest:
    """Test whether a model that continues a series looks at what followed the last time that things stood as they do.

    The number at i is the successor of a neighbour where what stands before it is among the `neighbors` states that are
    nearest to the present one,

        d_i = ‖(v_{i−1} … v_{i−E}) − (v_{n−1} … v_{n−E})‖,   h_i = 1 where d_i is among the smallest

    Influence also falls on recent numbers, and on numbers that are like the last one, and in a smooth series these are
    successors of neighbours too. So two regressions over all *other* series say what is to be expected of the rank a_i
    of the influence in its series, and of h_i, given these, z; and what is tested is whether the residuals go together,

        T_m = Σ_i (a_i − E[a | z_i]) (h_i − E[h | z_i])

    whose mean is zero under the null where either regression is right. The null is drawn by laying the residuals of the
    influence in one series over the neighbours in another, at the same lags, and taking what the regression leaves of
    them anew, so that its own error, of which the series share much, is in the null too. Each series counts once, so
    that numbers near one another need not be independent. Numbers whose delay vector overlaps the present one are left
    out.

    Args:
        influence: an answer for each series, all of one length; or their scores.
        series: the numbers, where `influence` is scores; answers hold theirs.
        generator: of the permutations.
        dimension: of the delay embedding, E.
        neighbors: how many neighbours count; more where several are equally near.
        given: what is held fixed. "recency": how far back i is. "value": |v_i − v_{n−1}|, how alike the number is to
            the last one. "next": |v_i − v_n|, how alike it is to the one to come (`following`). "previous":
            |v_{i−1} − v_{n−1}|, how alike the number before it is to the last one, which is the neighbourhood in one
            dimension: then a test in more asks for what an embedding adds to induction.
        following: the number that came next in each series, one for each, for given="next".
        mirrored: ask about the *predecessor* of a neighbour in place of its successor, with time run backwards:
            d_i = ‖(v_{i+1} … v_{i+E}) − (v_{n−1} … v_{n−E})‖. A model that looks up what came next has no use for it;
            but influence that spreads to whatever stands beside a number like the last one is as strong there. It is
            the control for a model, as Brownian motion is that for a series.
        permutations: how many are drawn.

    Unit: `gain` is a part of the ranking.
    Cost: no pass of the model.

    Raises:
        ValueError: for a series shorter than the embedding needs, fewer than 6 of them, ones of different lengths or
            with NaN, constant ones; for scores without `series`, and answers with it; for counts below 1; for unknown
            `given`, and "next" without `following`, or with other than a finite number for each series; for numbers so
            large that there is no statistic.
        TypeError: for counts that are not integers.

    Source: the question is one that Liu et al. 2026 (arXiv:2601.16407), section 3.3, leave open. The statistic is the
        generalised covariance measure (Shah and Peters 2020, arXiv:1804.07203), with series as units.
    """
    scores, values = _read(influence, series)
    dimension, neighbors = (as_count(n, "dimension and neighbors are 1 or more") for n in (dimension, neighbors))
    permutations = as_count(permutations, "permutations must be at least 1")
    count, length = values.shape
    _require(scores, values, dimension, neighbors)
    after, distance = delays(values, dimension, mirrored)
    lags = length - after
    is_neighbor = distance <= distance.sort(1).values[:, neighbors - 1 : neighbors]
    ranks = _ranks(scores[:, after].abs())
    others = _Others(_features(lags, _controls(values, after, tuple(given), following)).expand(count, -1, -1))
    rank_left, neighbor_left = (others.residual(y) for y in (ranks, is_neighbor.double()))
    per_series = (rank_left * neighbor_left).mean(1)
    orders = torch.stack([torch.randperm(count, generator=generator) for _ in range(permutations)])
    null = _studentised(others.exchanged(rank_left, neighbor_left, orders) / len(after))
    statistic = float(_studentised(per_series))
    if not (distance.isfinite().all() and isfinite(statistic) and null.isfinite().all()):
        raise ValueError(
            "there is no p, since differences of these numbers, or squares of differences, are too large for a float: "
            f"they go up to {values.abs().max():.3g}. Divide the series, and `following`, by one number."
        )
    gain = float((rank_left * is_neighbor).sum(1).div(is_neighbor.sum(1)).mean())
    p = (1 + int((null >= statistic).sum())) / (1 + permutations)
    return NeighborTest(gain, statistic, p, per_series, null, dimension, neighbors, tuple(given))


def delays(
    values: Float[Tensor, "series number"], dimension: int, mirrored: bool = False
) -> tuple[Int[Tensor, " successor"], Float[Tensor, "series successor"]]:
    """The numbers i that can be successors of neighbours, and for each d_i, how far the state before it (or, mirrored,
    behind it) is from the present one.

    Args:
        values: the series.
        dimension: of the delay embedding.
        mirrored: run time backwards, as in `neighbor_test`.
    """
    after = torch.arange(dimension, values.shape[1] - dimension)
    states = values.unfold(1, dimension, 1)  # [series start delay]
    present = states[:, -1:].flip(-1) if mirrored else states[:, -1:]
    beside = after + 1 if mirrored else after - dimension
    return after, (states[:, beside] - present).square().sum(-1).sqrt()


def _read(influence: Any, series: Tensor | None) -> tuple[Tensor, Tensor]:
    if series is not None and not isinstance(influence, Tensor):
        raise ValueError("answers hold their own numbers: leave `series` out, which goes with scores [series number].")
    if isinstance(influence, Tensor):
        if series is None or series.shape != influence.shape or influence.ndim != 2:
            raise ValueError("scores come with the series they are about, both [series number].")
        return influence.double(), series.double()
    lengths = sorted({len(one) for one in influence})
    if len(lengths) != 1:
        raise ValueError(f"the series must be of one length, so that lags match, got {lengths or 'none'}.")
    return (
        torch.stack([one.scores.double() for one in influence]),
        torch.tensor([one.numbers for one in influence]).double(),
    )


def _require(scores: Tensor, values: Tensor, dimension: int, neighbors: int) -> None:
    count, length = values.shape
    if count < LEAST:
        raise ValueError(
            f"the test has series for units and needs at least {LEAST}, got {count}: a single picture shows nothing."
        )
    needed = 2 * dimension + 2 * neighbors
    if length < needed:
        raise ValueError(
            f"series of {length} numbers are too short for {neighbors} neighbours in {dimension} dimensions: "
            f"{needed} numbers are needed, so that twice as many are compared."
        )
    if not (scores.isfinite().all() and values.isfinite().all()):
        raise ValueError("the influence or the series holds NaN or infinite values: leave that series out.")
    constant = (values.amax(1) == values.amin(1)).nonzero()[:, 0].tolist()
    if constant:
        raise ValueError(f"series {constant[0]} is constant, so that everything in it is a neighbour: leave it out.")


def _ranks(scores: Float[Tensor, "series number"]) -> Float[Tensor, "series number"]:
    """Ranks from 0 to 1, the least first, ties at their mean."""
    less = (scores[:, None] < scores[:, :, None]).double().sum(2)
    equal = (scores[:, None] == scores[:, :, None]).double().sum(2)
    return (less + (equal - 1) / 2) / (scores.shape[1] - 1)


def _controls(
    values: Tensor, after: Int[Tensor, " number"], given: tuple[str, ...], following: Any
) -> dict[str, Float[Tensor, "series number"] | None]:
    unknown = [name for name in given if name not in get_args(Given)]
    if unknown:
        raise ValueError(f"given is any of {', '.join(get_args(Given))}, got {unknown[0]!r}.")
    last = values[:, -1:]
    found: dict[str, Tensor | None] = {}
    for name in given:
        if name == "next":
            if following is None:
                raise ValueError('given="next" needs `following`, the number that came next in each series.')
            found[name] = (values[:, after] - _to_come(following, len(values))).abs()
        elif name == "recency":
            found[name] = None
        else:
            found[name] = (values[:, after - int(name == "previous")] - last).abs()
    return found


def _to_come(following: Any, count: int) -> Float[Tensor, "series 1"]:
    """The number that came next in each series.

    Raises:
        ValueError: where it is not one finite number for each.
    """
    rule = f"`following` is the number that came next in each of the {count} series"
    try:
        found = torch.as_tensor(following, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{rule}, got {abridged(following)}.") from error
    if found.shape != (count,):
        raise ValueError(f"{rule}, [{count}], got the shape {list(found.shape)}.")
    if not found.isfinite().all():
        which = int(found.isfinite().logical_not().nonzero()[0])
        raise ValueError(f"{rule}, and that of series {which} is {float(found[which])}: leave that series out.")
    return found[:, None]


def _features(
    lags: Int[Tensor, " number"], controls: dict[str, Tensor | None]
) -> Float[Tensor, "series number feature"]:
    """Piecewise linear functions of the lag's logarithm, of each control, and their products."""
    alike = [control for control in controls.values() if control is not None]
    count = len(alike[0]) if alike else 1
    ones = torch.ones(count, len(lags), 1, dtype=torch.float64)
    recency = ones
    if "recency" in controls:
        logs = lags.double().log2()
        knots = torch.arange(float(logs.min().floor()), float(logs.max().ceil()) + 1, dtype=torch.float64)
        recency = _hats(logs, knots).expand(count, -1, -1)
    parts = [recency]
    # What is near to the present, of all that stands in one series, goes by the order in that series too.
    for control in (one for raw in alike for one in (raw, _ranks(raw))):
        quantiles = torch.linspace(0, 1, _KNOTS, dtype=torch.float64)
        knots = control.flatten().quantile(quantiles).unique()
        hats = _hats(control, knots)
        parts.append((recency[..., :, None] * hats[..., None, :]).flatten(2))
    return torch.cat(parts, -1)


def _hats(x: Float[Tensor, "*shape"], knots: Float[Tensor, " knot"]) -> Float[Tensor, "*shape knot"]:
    """Functions that are 1 at a knot, 0 at the others, and linear in between."""
    if len(knots) == 1:
        return torch.ones_like(x)[..., None]
    place = torch.searchsorted(knots, x.contiguous()).clamp(1, len(knots) - 1)
    share = ((x - knots[place - 1]) / (knots[place] - knots[place - 1])).clamp(0, 1)
    found = torch.zeros(*x.shape, len(knots), dtype=x.dtype)
    found.scatter_(-1, place[..., None] - 1, (1 - share)[..., None])
    return found.scatter_add_(-1, place[..., None], share[..., None])


class _Others:
    """A linear regression for each series, on features X, that is fitted on all the others.

    Args:
        features: X [series number feature].
    """

    def __init__(self, features: Float[Tensor, "series number feature"]) -> None:
        self.features = features
        grams = features.mT @ features
        eye = torch.eye(features.shape[-1], dtype=features.dtype)
        self.grams = grams.sum(0) - grams + _RIDGE * eye

    def residual(self, y: Float[Tensor, "series number"]) -> Float[Tensor, "series number"]:
        """y_m − X_m w_m, what the regression on the others leaves, with w_m = (Σ_{l≠m} X_lᵀX_l)⁻¹ Σ_{l≠m} X_lᵀy_l."""
        moments = self.features.mT @ y[..., None]
        weights = torch.linalg.solve(self.grams, moments.sum(0) - moments)
        return y - (self.features @ weights)[..., 0]

    def exchanged(
        self,
        y: Float[Tensor, "series number"],
        h: Float[Tensor, "series number"],
        orders: Int[Tensor, "permutation series"],
    ) -> Float[Tensor, "permutation series"]:
        """Σ_i h_m · residual(y_π)_m for permutations π of the series, with y_π the rows y_π(m).

        The residual is taken anew for each permutation, so that what the fits of the series share, since each is on
        nearly the same others, is in the null as well. No fit is repeated for it:

            h_m · residual(y_π)_m = h_m · y_π(m) − g_m · Σ_{l≠m} X_lᵀ y_π(l),   g_m = (Σ_{l≠m} X_lᵀX_l)⁻¹ X_mᵀh_m
        """
        series = torch.arange(len(y))
        moments = torch.einsum("mif,li->mlf", self.features, y)  # [m l]: X_mᵀ y_l
        pulled = torch.linalg.solve(self.grams, self.features.mT @ h[..., None])[..., 0]
        found = []
        for some in orders.split(100):
            moved = moments[series, some]  # [permutation series feature]
            found.append((h @ y.T)[series, some] - ((moved.sum(1, keepdim=True) - moved) * pulled).sum(-1))
        return torch.cat(found)


def _studentised(values: Float[Tensor, "*draw series"]) -> Float[Tensor, "*draw"]:
    return values.mean(-1) / (values.std(-1) / values.shape[-1] ** 0.5 + 1e-12)
