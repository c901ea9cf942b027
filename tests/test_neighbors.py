"""Whether influence sits on neighbours in delay space: the test keeps its level, has power, and finds what is there."""

from functools import cache
from importlib.metadata import version

import pytest
import torch
from torch import Tensor

import tl_scopes as tls
from tests import induction, lookup
from tl_scopes import series
from tl_scopes.series.neighbors import _Others

SERIES, LENGTH, DRAWS, LEVEL = 12, 60, 150, 0.05
BOUND = 15
"""Of 150 tests at a level of .05, 15 or fewer reject with a probability of .995 (binomial)."""
SYSTEMS = {"Brownian": series.BrownianMotion(), "logistic": series.LogisticMap(), "Lorenz": series.Lorenz()}


@cache
def pool(name: str) -> Tensor:
    """Series from which each test takes some; the influence in them is drawn anew each time."""
    generator = torch.Generator().manual_seed(11)
    return torch.stack([series.Numbers.of(SYSTEMS[name].draw(LENGTH, generator)).values for _ in range(100)])


def drawn(name: str, generator: torch.Generator, count: int = SERIES) -> Tensor:
    return pool(name)[torch.randperm(100, generator=generator)[:count]]


def synthetic(values: Tensor, generator: torch.Generator, *, on: float = 0.0, dimension: int = 1) -> Tensor:
    """Influence that depends on recency and likeness to the last number, with noise that lasts from number to number.

    `on` is what neighbours have more, as a logarithm.
    """
    lags = LENGTH - torch.arange(LENGTH)
    found = -0.7 * lags.log() + 1.5 * torch.exp(-(values - values[:, -1:]).abs() / 10)
    noise = torch.randn(values.shape, generator=generator, dtype=torch.float64)
    for i in range(1, LENGTH):
        noise[:, i] = 0.6 * noise[:, i - 1] + 0.8 * noise[:, i]
    delays = values.unfold(1, dimension, 1)
    distance = (delays[:, :-1] - delays[:, -1:]).norm(dim=-1)
    found[:, dimension:] += on * (distance <= distance.sort(1).values[:, 4:5])
    return (found + 0.8 * noise).exp()


def rejections(name: str, given: tuple[str, ...], count: int = DRAWS, on: float = 0.0) -> int:
    generator = torch.Generator().manual_seed(3)
    found = 0
    for _ in range(count):
        values = drawn(name, generator)
        influence = synthetic(values, generator, on=on)
        test = series.neighbor_test(influence, values, generator=generator, given=given, permutations=199)
        found += test.p <= LEVEL
    return found


@pytest.mark.parametrize("name", SYSTEMS)
def test_honest_level(name: str) -> None:
    """Influence that knows nothing of neighbours is rejected no more often than the level says."""
    assert rejections(name, ("recency", "value")) <= BOUND


def test_the_null_holds_the_error_of_the_regressions() -> None:
    """Each permutation is what comes out where the influence of the series is exchanged and the regressions fitted
    anew."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(8, 30, 12, generator=generator, dtype=torch.float64)
    y, h = torch.randn(2, 8, 30, generator=generator, dtype=torch.float64)
    others = _Others(features)
    orders = torch.stack([torch.randperm(8, generator=generator) for _ in range(250)])
    found = others.exchanged(y, h, orders)
    by_hand = torch.stack([(others.residual(y[order]) * h).sum(1) for order in orders])
    torch.testing.assert_close(found, by_hand)


@pytest.mark.parametrize("name", ["Brownian", "Lorenz"])
def test_without_the_value_the_picture_deceives(name: str) -> None:
    """In a smooth series the same influence seems to sit on neighbours, as long as likeness is not held fixed."""
    assert rejections(name, ("recency",), 30) > 20


@pytest.mark.parametrize("name", SYSTEMS)
def test_power(name: str) -> None:
    """Influence that does sit on neighbours is found."""
    assert rejections(name, ("recency", "value"), 30, on=0.8) >= 27


def test_more_dimensions() -> None:
    """Neighbours in three dimensions are found beyond those in one, and only where there are some."""
    generator = torch.Generator().manual_seed(0)
    values = drawn("logistic", generator, 48)
    options = {"dimension": 3, "given": ("recency", "value", "previous"), "generator": generator}
    one, three = (synthetic(values, generator, on=1.5, dimension=dimension) for dimension in (1, 3))
    assert series.neighbor_test(one, values, **options).p > 0.05
    found = series.neighbor_test(three, values, **options)
    assert found.p < 0.01
    assert found.gain > 0.05
    assert "dimension 3, given recency and value and previous: gain +" in repr(found)
    assert len(found.plot().axes) == 1


def test_mirrored() -> None:
    """Influence on the predecessors of neighbours is found with time run backwards, and is not taken for successors."""
    generator = torch.Generator().manual_seed(0)
    values = drawn("logistic", generator, 24)
    found = synthetic(values, generator)
    near = (values[:, 1:] - values[:, -1:]).abs()
    found[:, :-1] *= (1.5 * (near <= near.sort(1).values[:, 5:6])).exp()
    assert series.neighbor_test(found, values, generator=generator, mirrored=True).p < 0.01
    assert series.neighbor_test(found, values, generator=generator).p > 0.05


@pytest.mark.skipif(version("transformer-lens").startswith("3."), reason="the native model of 3.9 has other weights")
def test_a_network_that_must_look_it_up() -> None:
    """The positive control: one random map for each prompt, on a network that goes on with what it has seen."""
    model = induction.trained()
    prompts, following = lookup.orbits(40)
    scores, right = [], 0
    for prompt, number in zip(prompts.tolist(), following.tolist(), strict=True):
        lin = tls.linearize(model, prompt)
        right += int(lin.logits.argmax()) == number
        scores.append(tls.TemperatureScope()(lin).scores)
    assert right >= 20  # chance is 2
    for given in (("recency",), ("recency", "value"), ("recency", "value", "next")):
        found = series.neighbor_test(
            torch.stack(scores),
            prompts.double(),
            neighbors=1,
            given=given,
            following=following,
            generator=torch.Generator().manual_seed(0),
        )
        assert found.p < 0.01


def test_answers_in_place_of_scores(tiny: object) -> None:
    """The same numbers, from answers about one model."""
    generator = torch.Generator().manual_seed(0)
    numbers = [series.Numbers.of(series.LogisticMap().draw(30, generator)) for _ in range(6)]
    answers = [series.influence(tls.attribute(tiny, one.text, tls.TemperatureScope())) for one in numbers]
    one = series.neighbor_test(answers, generator=torch.Generator().manual_seed(1))
    other = series.neighbor_test(
        torch.stack([answer.scores for answer in answers]),
        torch.stack([n.values for n in numbers]),
        generator=torch.Generator().manual_seed(1),
    )
    assert one.p == other.p
    assert one.gain == other.gain
    short = series.influence(tls.attribute(tiny, numbers[0][:20].text, tls.TemperatureScope()))
    with pytest.raises(ValueError, match=r"of one length, so that lags match, got \[20, 30\]"):
        series.neighbor_test([*answers, short], generator=generator)
    with pytest.raises(ValueError, match="answers hold their own numbers: leave `series` out"):
        series.neighbor_test(answers, torch.rand(6, 30), generator=generator)


def test_bad_input() -> None:
    generator = torch.Generator().manual_seed(0)
    values = drawn("logistic", generator)
    scores = torch.rand(values.shape, generator=generator)

    def ask(influence: Tensor = scores, numbers: Tensor = values, **options: object) -> None:
        series.neighbor_test(influence, numbers, generator=generator, **options)  # type: ignore[arg-type]

    with pytest.raises(ValueError, match="series of 10 numbers are too short for 5 neighbours in 3 dimensions: 16"):
        ask(scores[:, :10], values[:, :10], dimension=3)
    with pytest.raises(ValueError, match="needs at least 6, got 2: a single picture shows nothing"):
        ask(scores[:2], values[:2])
    with pytest.raises(ValueError, match="holds NaN or infinite values"):
        ask(scores / 0 * 0)
    constant = values.clone()
    constant[3] = 50
    with pytest.raises(ValueError, match="series 3 is constant, so that everything in it is a neighbour"):
        ask(numbers=constant)
    with pytest.raises(ValueError, match="given is any of recency, value, next, previous, got 'lag'"):
        ask(given=("lag",))
    with pytest.raises(ValueError, match='given="next" needs `following`'):
        ask(given=("next",))
    with pytest.raises(ValueError, match=r"there is no p, .* too large for a float: they go up to \d\S+e\+201"):
        ask(numbers=values * 1e200)
    with pytest.raises(ValueError, match=r"both \[series number\]"):
        ask(numbers=values[:, :5])
    with pytest.raises(ValueError, match="dimension and neighbors are 1 or more, got 0"):
        ask(dimension=0)
    with pytest.raises(ValueError, match="permutations must be at least 1, got 0"):
        ask(permutations=0)


def test_what_came_next_is_one_number_for_each_series(no_type_checks: None) -> None:
    generator = torch.Generator().manual_seed(0)
    values = drawn("logistic", generator)
    scores = torch.rand(values.shape, generator=generator)
    for following, got in (
        ([float("nan"), *[1.0] * 11], "each of the 12 series, and that of series 0 is nan: leave that series out"),
        (values[:, 0] / 0, "and that of series 0 is inf: leave that series out"),
        ([1.0], r"each of the 12 series, \[12\], got the shape \[1\]"),
        (1.0, r"got the shape \[\]"),
        ([[1.0]] * 12, r"got the shape \[12, 1\]"),
        (["a"] * 12, r"each of the 12 series, got \['a', 'a', 'a', 'a', 'a', … 12 in all\]"),
    ):
        with pytest.raises(ValueError, match=rf"`following` is the number that came next in .*{got}"):
            series.neighbor_test(
                scores,
                values,
                generator=generator,
                given=("recency", "next"),
                following=following,  # type: ignore[arg-type]
            )
