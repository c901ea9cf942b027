"""Corrupting the successors of neighbours: found where a network looks them up, and not where nothing is looked up."""

from importlib.metadata import version
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import induction, lookup
from tl_scopes import series
from tl_scopes.series.intervention import _exchanged, _matched

SERIES, LENGTH = 12, 40


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(system: series.System, count: int = SERIES, length: int = LENGTH) -> list[series.Numbers]:
    generator = seeded(1)
    return [series.Numbers.of(system.draw(length, generator)) for _ in range(count)]


def chained(system: series.System, order: int = 2) -> series.Forecaster:
    """A Markov chain that knows the system from other series, and sees of a series the last two numbers alone."""
    chain = series.MarkovChain([numbers.numbers for numbers in drawn(system, 40, 60)], order=order)
    return lambda texts: torch.tensor([[chain.probability(n, text) for n in range(100)] for text in texts])


def looked_up(texts: list[tuple[int, ...]]) -> Tensor:
    """What followed the number that is most like the last one, and the uniform distribution with a tenth of weight."""
    found = torch.full((len(texts), 100), 0.001)
    for row, text in enumerate(texts):
        at = min(range(1, len(text) - 1), key=lambda i: (abs(text[i - 1] - text[-1]), -i))
        found[row, text[at]] += 0.9
    return found


@pytest.mark.parametrize("system", [series.LogisticMap(), series.Lorenz(), series.BrownianMotion()], ids=str)
def test_a_markov_chain_looks_nothing_up(system: series.System) -> None:
    """The control: what it sees is left alone on both sides, so that neither moves it by anything."""
    found = series.intervention(chained(system), drawn(system), generator=seeded(), dimension=2, draws=2)
    assert torch.equal(found.moved, torch.zeros(SERIES, 2, dtype=torch.float64))
    assert torch.equal(found.copied, found.moved)
    assert found.p_moved == found.p_copied == 1


@pytest.mark.parametrize("system", [series.LogisticMap(), series.BrownianMotion()], ids=str)
def test_a_forecaster_that_looks_it_up(system: series.System) -> None:
    """It says what was put in the place of the nearest neighbour's successor, also for a random walk."""
    found = series.intervention(looked_up, drawn(system), generator=seeded(), neighbors=3, caliper=9)
    assert found.p_moved < 0.01
    assert found.p_copied < 0.01
    assert (found.moved[:, 0] > 1).all()
    assert found.copied[:, 0].mean() > 1 > found.copied[:, 1].mean()


@pytest.mark.skipif(version("transformer-lens").startswith("3."), reason="the native model of 3.9 has other weights")
def test_a_network_that_must_look_it_up() -> None:
    """The positive control of `neighbor_test`, asked itself: one random map for each prompt."""
    model = induction.trained()
    prompts, _ = lookup.orbits(60)
    numbers = [series.Numbers(tuple(prompt)) for prompt in prompts.tolist()]

    @torch.no_grad()
    def said(texts: list[tuple[int, ...]]) -> Tensor:
        return model(torch.tensor(texts))[:, -1].softmax(-1)

    found = series.intervention(said, numbers, generator=seeded(), neighbors=1)
    assert found.p_moved < 0.01
    assert found.p_copied < 0.01
    near, far = found.moved.mean(0).tolist()
    assert near > 2 * far
    put, elsewhere = found.copied.mean(0).tolist()
    assert put > elsewhere + 1


def test_level() -> None:
    """Where the sides are alike, p is at most .05 in a twentieth of the cases."""
    generator = seeded()
    signs = torch.randint(2, (199, SERIES), generator=generator).double() * 2 - 1
    rejected = sum(
        _exchanged(torch.randn(SERIES, generator=generator, dtype=torch.float64), signs) <= 0.05 for _ in range(400)
    )
    assert rejected <= 32  # with a probability of .995 (binomial)


def test_pairs() -> None:
    """Others are none of the successors and no part of a state that is compared, and each stands once."""
    for numbers in drawn(series.LogisticMap(), 20):
        values, dimension = numbers.values, 2
        pairs = _matched(values, dimension, 5, 9.0, 0)
        successors, others = zip(*pairs, strict=True)
        assert len({*successors, *others}) == 10
        states = {i - back for i in successors for back in range(dimension + 1)}
        assert not states & set(others)
        assert all(dimension <= j < LENGTH - dimension for j in (*successors, *others))
        after = torch.arange(dimension, LENGTH - dimension)
        distance = sum((values[after - 1 - k] - values[LENGTH - 1 - k]).square() for k in range(dimension))
        assert isinstance(distance, Tensor)
        assert distance[torch.tensor(successors) - dimension].max() <= distance.sort().values[4]
        assert set(_matched(values, dimension, 5, 0.3, 0)) <= set(pairs)


def test_caliper() -> None:
    """What has no match is left alone, so that the sides are alike also for a random walk."""
    numbers = drawn(series.BrownianMotion(), length=60)
    wide, narrow = (
        series.intervention(looked_up, numbers, generator=seeded(), caliper=caliper) for caliper in (9.0, 0.5)
    )
    assert max(map(abs, narrow.balance)) < 0.2 < max(map(abs, wide.balance))
    assert sum(map(len, narrow.successors)) < sum(map(len, wide.successors)) == 60


def test_a_model(tiny: Any) -> None:
    """The bundled model, whose forecasts are those of `forecast`; what moved it is reported."""
    numbers = drawn(series.LogisticMap(), 6, 20)
    found = series.intervention(tiny, numbers, generator=seeded(), neighbors=2, caliper=9, draws=1)
    (i, k), (j, m) = found.successors[0], found.others[0]
    assert (found.moved > 0).all()
    assert len({i, j, k, m}) == 4
    by_hand = series.intervention(
        lambda texts: torch.stack([series.forecast(tiny, series.Numbers(one)).probabilities for one in texts]),
        numbers,
        generator=seeded(),
        neighbors=2,
        caliper=9,
        draws=1,
    )
    assert torch.equal(found.moved, by_hand.moved)
    assert len(found.balance) == 2
    assert "dimension 1: prediction moved by" in repr(found)
    assert "6 series" in repr(found)


def test_no_number_is_an_outcome_too() -> None:
    """The divergence is never below 0, though the numbers alone may all become likelier."""

    def sure_where_it_is_changed(texts: list[tuple[int, ...]]) -> Tensor:
        told = torch.tensor([0.002, *[0.009] * (len(texts) - 1)])
        return told[:, None].expand(-1, 100)

    found = series.intervention(sure_where_it_is_changed, drawn(series.LogisticMap()), generator=seeded(), caliper=9)
    kept, left = torch.tensor([0.2, 0.8]).double(), torch.tensor([0.9, 0.1]).double()
    assert found.moved.flatten().tolist() == pytest.approx([float((kept * (kept / left).log()).sum())] * 2 * SERIES)


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize(
    ("forecaster", "error", "match"),
    [
        ("gpt2", TypeError, "expected a model, or a function that forecasts, got 'gpt2'"),
        (lambda texts: [0.5], TypeError, r"a tensor of probabilities \[series kind\], got list"),
        (
            lambda texts: torch.ones(len(texts), 10),
            ValueError,
            r"the numbers 0 to \d\d, or more of them, after each of 9 series, \[9, \d\d\d?\], got the shape \[9, 10\]",
        ),
        (lambda texts: torch.ones(len(texts), 100), ValueError, "sum to 1 at most, got values from 1 on that sum to 1"),
        (lambda texts: torch.full((len(texts), 100), torch.nan), ValueError, "probabilities, which are 0 or more"),
    ],
)
def test_bad_forecasters(forecaster: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        series.intervention(forecaster, drawn(series.LogisticMap()), generator=seeded())


@pytest.mark.usefixtures("no_type_checks")
def test_bad_input() -> None:
    numbers = drawn(series.LogisticMap())

    def ask(some: list[series.Numbers] = numbers, **options: Any) -> None:
        series.intervention(looked_up, some, generator=seeded(), **options)

    with pytest.raises(TypeError, match="series 1 is list, not Numbers: write Numbers.of"):
        ask([numbers[0], [0.1, 0.2], *numbers[2:]])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="needs at least 6, got 2"):
        ask(numbers[:2])
    with pytest.raises(ValueError, match="series 0 has 40 numbers, too few for 20 neighbours in 1 dimensions"):
        ask(neighbors=20)
    with pytest.raises(
        ValueError, match=r"series \d has no number that is not a successor of one of the 14 neighbours"
    ):
        ask(neighbors=14, dimension=5)
    with pytest.raises(ValueError, match="how unlike a pair may be, is more than 0, got 0"):
        ask(caliper=0)
    with pytest.raises(TypeError, match="how unlike a pair may be, is more than 0, got 'wide'"):
        ask(caliper="wide")
    with pytest.raises(ValueError, match="series 0 holds fewer than three different numbers"):
        ask([series.Numbers((20, 60) * 20)] * 6)
    with pytest.raises(ValueError, match="dimension and neighbors are 1 or more, got 0"):
        ask(neighbors=0)
    with pytest.raises(ValueError, match="draws and permutations are 1 or more, got 0"):
        ask(draws=0)
