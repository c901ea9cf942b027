"""Does a model's prediction change more where successors of neighbours are corrupted than where matched others are?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_scopes.models import Model, as_count, as_number
from tl_scopes.series.forecast import forecast
from tl_scopes.series.neighbors import LEAST, delays
from tl_scopes.series.numbers import Numbers

Forecaster = Callable[[list[tuple[int, ...]]], Float[Tensor, "series kind"]]
"""The probabilities of the numbers 0, 1, … that may come next after each of several series."""


@dataclass(frozen=True, eq=False, repr=False)
class Intervention:
    """What corrupting the successors of neighbours does to a prediction, beside what corrupting others does.

    Attributes:
        moved: [series side], KL(before ‖ after) of the next number, in nats; side 0 is the successors, 1 the others.
        copied: [series side], by how much the numbers that were put in became likelier to come next, in nats.
        p_moved, p_copied: how often the difference of the sides, averaged over the series, is as large where the sides
            of each series are exchanged at random; one-sided.
        balance: by how much the successors differ from the others in what they are matched for: the logarithm to base 2
            of how far back they are, and how unlike the last number they are. Zeros are a perfect match.
        successors, others: for each series the numbers that were corrupted, counted from 0, in pairs.
        dimension: of the delay embedding.
    """

    moved: Float[Tensor, "series 2"]
    copied: Float[Tensor, "series 2"]
    p_moved: float
    p_copied: float
    balance: tuple[float, float]
    successors: tuple[tuple[int, ...], ...]
    others: tuple[tuple[int, ...], ...]
    dimension: int

    def __repr__(self) -> str:
        (near, far), (put, elsewhere) = self.moved.mean(0).tolist(), self.copied.mean(0).tolist()
        return (
            f"Intervention(dimension {self.dimension}: prediction moved by {near:.3f} and {far:.3f} nat, p = "
            f"{self.p_moved:.3f}; copied {put:+.2f} and {elsewhere:+.2f} nat, p = {self.p_copied:.3f}; "
            f"{len(self.moved)} series)"
        )


def intervention(
    model: Model | Forecaster,
    series: Sequence[Numbers],
    *,
    generator: torch.Generator,
    dimension: int = 1,
    neighbors: int = 5,
    caliper: float | int = 0.5,
    draws: int = 4,
    permutations: int = 999,
) -> Intervention:
    """Corrupt what followed a similar past, and as many other numbers that are matched to it, and compare the effects.

    `neighbor_test` asks whether influence, which is a derivative, goes together with neighbours. This asks the model
    itself. The successors i of the nearest neighbours are those of `neighbor_test`. To each belongs another number j of
    the same series, which is neither a successor nor a part of the state before one nor of the present one, and is
    nearest in

        |log₂ (n − i) − log₂ (n − j)| + | |v_i − v_{n−1}| − |v_j − v_{n−1}| | / sd(v)

    so as far back, and as like the last number; the best pairs are made first, and successors for which this is more
    than `caliper` for every number that is left are not corrupted. Then the same numbers u of the series, drawn at
    random, are put in the place of all the successors, or in that of all the others, with p the prediction of what
    comes next:

        moved = KL(p ‖ p′),   copied = mean over u of log p′(u) − log p(u)

    where that no number comes next is one more outcome of p.

    A model that looks up what followed a similar past is moved more by the first, and says what was put there.

    Args:
        model: a model; or a function that gives the probabilities of the numbers 0, 1, … after each of several series.
        series: the series, one at least for each of 6 units.
        generator: of what is put in, and of the permutations.
        dimension: of the delay embedding.
        neighbors: how many successors are corrupted in each series at most, together; of equally near ones the latest.
        caliper: how unlike a pair may be. In smooth series and random walks successors of neighbours are recent and
            like the last number, and few others are; `balance` says what is left of that. The best pair of a series
            stays, however unlike.
        draws: how often other numbers are put in; the effects are averaged.
        permutations: how many are drawn for the values of p.

    Unit: nats.
    Cost: for each series 1 + 2 · draws times what `forecast` costs.

    Raises:
        TypeError: for something else than a model or a forecaster, Numbers, integers as counts, and a number as
            caliper; for a forecaster that gives no tensor.
        ValueError: for a forecaster that gives no probabilities of the numbers that occur; for fewer than 6 series; for
            one with fewer than three different numbers, or too short to have others beside the successors; for counts
            below 1, and a caliper that is not positive.

    Source: the question is that of `neighbor_test`; the design is a matched pair with exchanged sides (Rosenbaum 2002,
        Observational Studies, chapter 3).

    Example:
        >>> import torch
        >>> from tl_scopes import series
        >>> generator = torch.Generator().manual_seed(0)
        >>> drawn = [series.Numbers.of(series.LogisticMap().draw(30, generator)) for _ in range(6)]
        >>> found = series.intervention(model, drawn, generator=generator, neighbors=3, draws=1)
        >>> found.moved.shape, len(found.successors[0]) == len(found.others[0]) <= 3
        (torch.Size([6, 2]), True)
    """
    dimension, neighbors = (as_count(n, "dimension and neighbors are 1 or more") for n in (dimension, neighbors))
    draws, permutations = (as_count(n, "draws and permutations are 1 or more") for n in (draws, permutations))
    rule = "the caliper, how unlike a pair may be, is more than 0"
    caliper = as_number(caliper, rule, lambda number: number > 0)
    if len(series) < LEAST:
        raise ValueError(f"a comparison has series for units and needs at least {LEAST}, got {len(series)}.")
    moved, copied, pairs = [], [], []
    if not (isinstance(model, torch.nn.Module) or callable(model)):
        raise TypeError(f"expected a model, or a function that forecasts, got {model!r}.")
    for number, numbers in enumerate(series):
        if not isinstance(numbers, Numbers):
            raise TypeError(f"series {number} is {type(numbers).__name__}, not Numbers: write Numbers.of(values).")
        matched = _matched(numbers.values, dimension, neighbors, caliper, number)
        effects = _effects(model, numbers, matched, draws, generator)
        moved.append(effects.mean(0)[0])
        copied.append(effects.mean(0)[1])
        pairs.append(matched)
    of_moved, of_copied = torch.stack(moved), torch.stack(copied)
    signs = torch.randint(2, (permutations, len(series)), generator=generator).double() * 2 - 1
    return Intervention(
        moved=of_moved,
        copied=of_copied,
        p_moved=_exchanged(of_moved[:, 0] - of_moved[:, 1], signs),
        p_copied=_exchanged(of_copied[:, 0] - of_copied[:, 1], signs),
        balance=_balance(series, pairs),
        successors=tuple(tuple(i for i, _ in of_one) for of_one in pairs),
        others=tuple(tuple(j for _, j in of_one) for of_one in pairs),
        dimension=dimension,
    )


def _matched(
    values: Float[Tensor, " number"], dimension: int, neighbors: int, caliper: float | int, number: int
) -> list[tuple[int, int]]:
    """Successors of the nearest neighbours, each with another number that is matched to it; the best pairs first."""
    if len(values) < 2 * dimension + 2 * neighbors:
        raise ValueError(
            f"series {number} has {len(values)} numbers, too few for {neighbors} neighbours in {dimension} dimensions "
            f"and as many others: {2 * dimension + 2 * neighbors} at least."
        )
    if len(values.unique()) < 3:
        raise ValueError(f"series {number} holds fewer than three different numbers: there is nothing to put in.")
    after, distance = delays(values[None], dimension)
    order = (distance[0] - 1e-9 * after).argsort()
    successors = after[order[:neighbors]].tolist()
    states = {i - back for i in successors for back in range(dimension + 1)}
    others = [j for j in after.tolist() if j not in states]
    if not others:
        raise ValueError(
            f"series {number} has no number that is not a successor of one of the {neighbors} neighbours or a part of "
            "the state before it: take fewer neighbours, or a longer series."
        )
    traits = {at: _traits(values, at) for at in (*successors, *others)}
    apart = sorted(
        (sum(abs(a - b) for a, b in zip(traits[i], traits[j], strict=True)), i, j) for i in successors for j in others
    )
    pairs: list[tuple[int, int]] = []
    for unlike, i, j in apart:
        if pairs and unlike > caliper:
            break
        if all(i != successor and j != other for successor, other in pairs):
            pairs.append((i, j))
    return pairs


def _traits(values: Tensor, at: int) -> tuple[float, float]:
    """What numbers are matched for: how far back, and how unlike the last number."""
    return (
        float(torch.tensor(float(len(values) - at)).log2()),
        float((values[at] - values[-1]).abs() / values.std()),
    )


def _effects(
    model: Any, numbers: Numbers, pairs: list[tuple[int, int]], draws: int, generator: torch.Generator
) -> Float[Tensor, "draw 2 2"]:
    """[draw, moved or copied, side], from the same numbers put in on both sides."""
    kinds = sorted(set(numbers.numbers))
    texts, puts = [numbers.numbers], []
    for _ in range(draws):
        put = []
        for pair in pairs:
            free = [kind for kind in kinds if kind not in {numbers.numbers[at] for at in pair}]
            put.append(free[int(torch.randint(len(free), (), generator=generator))])
        puts.append(put)
        for side in (0, 1):
            changed = list(numbers.numbers)
            for pair, one in zip(pairs, put, strict=True):
                changed[pair[side]] = one
            texts.append(tuple(changed))
    found = _predicted(model, texts, numbers).double()
    elsewhere = 1 - found.sum(-1, keepdim=True)  # what comes next may be no number
    said = torch.cat([found, elsewhere], -1).clamp(min=1e-12).log()
    before, after = said[0], said[1:].unflatten(0, (draws, 2))
    moved = (before.exp() * (before - after)).sum(-1)
    copied = torch.stack([(after[n][:, put] - before[put]).mean(-1) for n, put in enumerate(puts)])
    return torch.stack([moved, copied], 1)


def _predicted(model: Any, texts: list[tuple[int, ...]], numbers: Numbers) -> Float[Tensor, "series kind"]:
    if isinstance(model, torch.nn.Module):
        return torch.stack([forecast(model, Numbers(one, numbers.delimiter)).probabilities for one in texts])
    found = model(texts)
    if not isinstance(found, Tensor):
        raise TypeError(f"a forecaster gives a tensor of probabilities [series kind], got {type(found).__name__}.")
    kinds = 1 + max(map(max, texts))
    if found.ndim != 2 or len(found) != len(texts) or found.shape[1] < kinds:
        raise ValueError(
            f"a forecaster gives the probabilities of the numbers 0 to {kinds - 1}, or more of them, after each of "
            f"{len(texts)} series, [{len(texts)}, {kinds}], got the shape {list(found.shape)}."
        )
    if not bool((found >= 0).all() and (found.sum(-1) <= 1 + 1e-4).all()):
        raise ValueError(
            "a forecaster gives probabilities, which are 0 or more and sum to 1 at most, got values from "
            f"{found.min().item():.3g} on that sum to {found.sum(-1).max().item():.3g}."
        )
    return found


def _exchanged(differences: Float[Tensor, " series"], signs: Float[Tensor, "permutation series"]) -> float:
    """How often the mean difference is as large with the sides exchanged at random."""
    drawn = (signs * differences).mean(1)
    return (1 + int((drawn >= differences.mean() - 1e-12).sum())) / (1 + len(signs))


def _balance(series: Sequence[Numbers], pairs: Sequence[list[tuple[int, int]]]) -> tuple[float, float]:
    traits = [
        [torch.tensor(_traits(numbers.values, at)) for at in pair]
        for numbers, of_one in zip(series, pairs, strict=True)
        for pair in of_one
    ]
    lag, likeness = torch.stack([successor - other for successor, other in traits]).mean(0).tolist()
    return lag, likeness
