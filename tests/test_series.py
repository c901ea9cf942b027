"""Time series: systems, numbers as tokens, influence by number, forecasts."""

from itertools import islice
from typing import Any

import pytest
import torch

import tl_scopes as tls
from tl_scopes import models, series
from tl_scopes.series import numbers as numbers_module
from tl_scopes.tiny.markov import MarkovChain
from tl_scopes.tiny.series import lorenz_orbit

SYSTEMS = [
    series.LogisticMap(),
    series.LogisticMap(noise=0.02),
    series.Lorenz(),
    series.Lorenz(drift=0.4),
    series.BrownianMotion(),
]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- systems ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", SYSTEMS, ids=str)
def test_a_series_is_drawn_from_its_generator(system: series.System) -> None:
    values = system.draw(60, seeded())
    assert values.isfinite().all()
    assert torch.equal(values, system.draw(60, seeded()))
    assert not torch.equal(values, system.draw(60, seeded(1)))
    assert torch.equal(values[:20], system.draw(20, seeded()))


def test_logistic_map() -> None:
    """The next number follows from the last one; with noise it does not, and stays in [0, 1] all the same."""
    values = series.LogisticMap(r=3.8).draw(200, seeded())
    torch.testing.assert_close(values[1:], 3.8 * values[:-1] * (1 - values[:-1]))
    noisy = series.LogisticMap(noise=0.05).draw(2000, seeded())
    assert 0 <= noisy.min() < noisy.max() <= 1
    left = noisy[1:] - 3.9 * noisy[:-1] * (1 - noisy[:-1])
    inside = (noisy[1:] > 0.2) & (noisy[1:] < 0.8)
    assert left[inside].std() == pytest.approx(0.05, rel=0.1)


def test_lorenz() -> None:
    """It stays on its two wings, and agrees with a finer integration; drift adds so much at every number."""
    values = series.Lorenz().draw(300, seeded())
    assert values.abs().max() < 25
    assert values.min() < -5 < 5 < values.max()
    drifting = series.Lorenz(drift=0.4).draw(300, seeded())
    torch.testing.assert_close(drifting - values, 0.4 * torch.arange(300, dtype=torch.float64))


def test_lorenz_is_integrated_well() -> None:
    """At half a unit of time a coarse and a fine step agree; the first state is a quarter of an interval ahead."""
    coarse = list(islice(lorenz_orbit((3.0, 5.0, 20.0), 0.1), 5))
    fine = list(islice(lorenz_orbit((3.0, 5.0, 20.0), 0.02), 22))
    assert coarse[4] == pytest.approx(fine[21], abs=0.02)
    assert coarse[4] != coarse[3]


def test_brownian_motion() -> None:
    steps = series.BrownianMotion().draw(4000, seeded()).diff()
    assert float(steps.std()) == pytest.approx(1, abs=0.05)
    assert float((steps[1:] * steps[:-1]).mean()) == pytest.approx(0, abs=0.05)


@pytest.mark.parametrize("system", [series.LogisticMap(r=4.5), series.Lorenz(interval=1.0)], ids=str)
def test_a_system_that_diverges(system: series.System) -> None:
    with pytest.raises(ValueError, match=r"diverges: of 60 numbers the first \d+ are below 1e\+06"):
        system.draw(60, seeded())


def test_no_numbers() -> None:
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        series.LogisticMap().draw(0, seeded())


# -- numbers ----------------------------------------------------------------------------------------------------------


def test_scaling() -> None:
    found = series.Numbers.of(torch.tensor([-3.0, 1.0, 0.0, -1.0]))
    assert found.numbers == (15, 85, 68, 50)
    assert found.text == "15,85,68,50,"
    assert found[1:3].text == "85,68,"
    assert series.Numbers.of([1.0, 2.0], low=3, high=9, delimiter=" ").text == "03 09 "
    assert repr(found) == "Numbers('15,85,68,50,'; 4 numbers)"
    assert "…" in repr(series.Numbers(tuple(range(20))))


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ([1.0, 1.0, 1.0], "the series is constant, 1 throughout"),
        ([1.0, float("nan"), 2.0], "number 1 of the series is nan"),
        ([1.0, 2.0, float("inf")], "number 2 of the series is inf"),
        ([1.0], r"two numbers or more in a row, got the shape \[1\]"),
    ],
)
def test_series_without_a_scale(values: list[float], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        series.Numbers.of(values)


def test_other_bad_numbers() -> None:
    with pytest.raises(ValueError, match="0 ≤ low < high ≤ 99, got 20 and 120"):
        series.Numbers.of([0.0, 1.0], low=20, high=120)
    with pytest.raises(ValueError, match="0 to 99, got 100"):
        series.Numbers((1, 100))
    with pytest.raises(ValueError, match="a text without digits, else no one could tell, got '0'"):
        series.Numbers((1, 2), delimiter="0")
    with pytest.raises(TypeError, match="a part of a series is a slice"):
        _ = series.Numbers((1, 2))[0]


class Digits:
    """A tokenizer in which each of these texts is a token, the longest first."""

    bos_token_id = None

    def __init__(self, texts: list[str]) -> None:
        self.texts = sorted(texts, key=len, reverse=True)

    def read(self, text: str) -> torch.Tensor:
        ids = []
        while text:
            piece = next(one for one in self.texts if text.startswith(one))
            ids.append(self.texts.index(piece))
            text = text[len(piece) :]
        return torch.tensor(ids)


@pytest.fixture
def spelled(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The spelling by a tokenizer that knows certain texts."""

    def spelling(texts: list[str]) -> series.Spelling:
        tokenizer = Digits(texts)
        monkeypatch.setattr(numbers_module.models, "tokenize", lambda model, text: tokenizer.read(text))
        monkeypatch.setattr(numbers_module.models, "token_text", lambda model, id: tokenizer.texts[id])
        monkeypatch.setattr(numbers_module.models, "starts_with_bos", lambda model, tokens: False)
        return series.Spelling.of(tokenizer)  # type: ignore[arg-type]

    return spelling


def test_spelling(spelled: Any, tiny: Any) -> None:
    assert series.Spelling.of(tiny).tokens.shape == (100, 1)
    digits = [str(i) for i in range(10)]
    assert spelled([*digits, ","]).tokens.shape == (100, 2)
    with pytest.raises(ValueError, match="do not tokenise alike: 50 is '5' '0', 47 is '47'.*groups the tokens"):
        spelled([*digits, ",", "47"])
    with pytest.raises(ValueError, match="a token holds a digit and the delimiter ',' together"):
        spelled([*digits, ",", "0,"])
    with pytest.raises(ValueError, match="the tokens of 07 depend on what stands beside it"):
        spelled([*digits, ",", "7,"])


def test_the_tokens_are_those_of_the_text(tiny: Any) -> None:
    found = series.Numbers.of(series.LogisticMap().draw(20, seeded()))
    assert torch.equal(series.Spelling.of(tiny).ids(found), models.tokenize(tiny, found.text))


def test_more_numbers_than_the_context_holds(tiny: Any) -> None:
    found = series.Numbers.of(series.LogisticMap().draw(300, seeded()))
    for call in (lambda: series.forecast(tiny, found), lambda: series.losses(tiny, [found])):
        with pytest.raises(ValueError, match=r"300 numbers is 60\d tokens long.*holds 256.*the last 127 numbers"):
            call()


# -- influence --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", [tls.TemperatureScope(), tls.SemanticScope(), tls.RelevanceScope()])
def test_influence_by_number(tiny: Any, scope: tls.Scope) -> None:
    """One score for each number, that of its token; delimiters and BOS have none."""
    found = series.Numbers.of(series.LogisticMap().draw(20, seeded()))
    answer = tls.attribute(tiny, found.text, scope)
    by_number = series.influence(answer)
    assert by_number.numbers == found.numbers
    at = [i for i, text in enumerate(answer.str_tokens) if text.isdigit()]
    assert torch.equal(by_number.scores, answer.scores[at])
    assert float(by_number.share.abs().sum()) == pytest.approx(1)
    assert by_number.of_last(20) == pytest.approx(1)
    assert "20 numbers" in repr(by_number)


def pieces(answer: tls.Attribution, texts: tuple[str, ...]) -> tls.Attribution:
    from dataclasses import replace

    count = len(texts)
    return replace(
        answer,
        scores=torch.arange(1.0, count + 1),
        tokens=torch.arange(count),
        str_tokens=texts,
        positions=tuple(range(count)),
        details={},
    )


def test_the_digits_of_a_number_are_grouped(tiny: Any) -> None:
    """Numbers that do not tokenise alike are put together all the same: √Σ score² for norms."""
    answer = tls.attribute(tiny, "15,50,", tls.TemperatureScope())
    found = series.influence(pieces(answer, ("<s>", "4", "7", ",", "08", ",", " ", "9", "9", ",")))
    assert found.numbers == (47, 8, 99)
    torch.testing.assert_close(found.scores, torch.tensor([(4 + 9) ** 0.5, 5.0, (64 + 81) ** 0.5]))


def test_numbers_end_where_tokens_were_set_aside(tiny: Any) -> None:
    """Without the delimiter between them two numbers stay two, whatever else was set aside."""
    answer = tls.attribute(tiny, "15,50,85,20,", tls.TemperatureScope())
    for gone in ([2], [0, 2, 4], [0, 2, 4, 6, 8]):
        found = series.influence(answer.without(gone))
        assert found.numbers == (15, 50, 85, 20)
        assert torch.equal(found.scores, answer.scores[1::2])
    assert series.influence(answer.without([2, 3])).numbers == (15, 85, 20)
    split = pieces(answer, ("<s>", "4", "7", ",", "08", ",")).without([3])
    assert series.influence(split).numbers == (47, 8)


def test_the_last_numbers(tiny: Any, no_type_checks: None) -> None:
    found = series.influence(tls.attribute(tiny, "15,50,85,20,", tls.TemperatureScope()))
    shares = [found.of_last(count) for count in range(6)]
    assert shares == pytest.approx([0, *found.share.flip(0).cumsum(0).tolist(), 1])
    with pytest.raises(ValueError, match="count is how many of the last numbers, 0 or more, got -1"):
        found.of_last(-1)
    with pytest.raises(TypeError, match=r"0 or more, and an integer, got 1\.5"):
        found.of_last(1.5)  # type: ignore[arg-type]


def test_numbers_that_are_not_apart(tiny: Any) -> None:
    answer = tls.attribute(tiny, "15,50,", tls.TemperatureScope())
    with pytest.raises(ValueError, match="the tokens '4' '7,' hold the number 47 and something else"):
        series.influence(pieces(answer, ("4", "7,", "12")))
    with pytest.raises(ValueError, match="holds no number in digits"):
        series.influence(tls.attribute(tiny, "The keys to the old", tls.TemperatureScope()))


# -- forecasts --------------------------------------------------------------------------------------------------------


def test_forecast(tiny: Any) -> None:
    """The probabilities are the model's own; of a number of two tokens they are the product."""
    found = series.Numbers.of(series.LogisticMap().draw(40, seeded()))
    said = series.forecast(tiny, found)
    lin = tls.linearize(tiny, found.text)
    token = tls.SemanticScope("47")(lin).target
    assert token is not None
    assert float(said.probabilities[47]) == pytest.approx(float(lin.log_probs[token.id].exp()))
    assert said.elsewhere == pytest.approx(0, abs=0.01)
    assert said.loss(47) == pytest.approx(-float(lin.log_probs[token.id]))
    assert said.deviation > 0
    assert 0 <= said.mean <= 99
    assert "after 40 numbers" in repr(said)


def test_forecast_of_digits(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a number is two tokens its probability is that of the span of both."""
    ten = [models.tokenize(tiny, f"{i}0")[-1] for i in range(10)]
    table = torch.tensor([[ten[i // 10], ten[i % 10]] for i in range(100)])
    plain = series.Spelling.of(tiny)
    monkeypatch.setattr(series.Spelling, "of", lambda *_: plain._replace(tokens=table))
    found = series.Numbers((10, 50, 20))
    prompt = series.Spelling.of(tiny).ids(found)
    said = series.forecast(tiny, found)
    span = tls.linearize(tiny, prompt, answer=table[47])
    rows = torch.stack([one.log_probs[id] for one, id in zip(span.single, table[47], strict=True)])
    assert float(said.probabilities[47].log()) == pytest.approx(float(rows.sum()), rel=1e-4)


def test_the_loss_of_a_number_that_cannot_come(tiny: Any, no_type_checks: None) -> None:
    said = series.forecast(tiny, series.Numbers((15, 50, 85)))
    for truth in (-1, 100):
        with pytest.raises(ValueError, match=f"the number that came next is one of two digits, 0 to 99, got {truth}"):
            said.loss(truth)
    with pytest.raises(TypeError, match=r"and an integer, got 1\.5"):
        said.loss(1.5)  # type: ignore[arg-type]


def test_losses_without_bos(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is said of the first number, which means leave out."""
    monkeypatch.setattr(tiny.cfg, "default_prepend_bos", False)
    drawn = [series.Numbers.of(series.LogisticMap().draw(4, seeded(i))) for i in range(2)]
    found = series.losses(tiny, drawn)
    assert found.values[:, 0].isnan().all()
    for row, numbers in zip(found.values.tolist(), drawn, strict=True):
        assert row[1:] == pytest.approx(
            [series.forecast(tiny, numbers[:i]).loss(numbers.numbers[i]) for i in (1, 2, 3)]
        )
    assert repr(found).startswith(f"Losses({found.values[:, 1].mean():.2f} in the first half, ")
    (line, *_) = found.plot().axes[0].lines
    assert line.get_ydata()[1:] == pytest.approx(found.values[:, 1:].mean(0).tolist())  # type: ignore[index]


def test_losses(tiny: Any) -> None:
    """Each is that of a forecast from what stands before; a Markov chain that knows the system comes with it."""
    drawn = [series.Numbers.of(series.LogisticMap().draw(30, seeded(i))) for i in range(12)]
    chain = series.MarkovChain([one.numbers for one in drawn[2:]])
    found = series.losses(tiny, drawn[:2], chain)
    assert found.values.shape == (2, 30)
    for at in (5, 29):
        assert float(found.values[1, at]) == pytest.approx(
            series.forecast(tiny, drawn[1][:at]).loss(drawn[1].numbers[at]), rel=1e-4
        )
    assert found.markov is not None
    assert found.values[:, 15:].mean() < found.values[:, :3].mean()
    assert "Markov chain" in repr(found)
    assert len(found.plot().axes) == 1
    with pytest.raises(ValueError, match="are of one length, got 10, 30"):
        series.losses(tiny, [drawn[0], drawn[1][:10]])


def test_markov_chain() -> None:
    """Probabilities sum to 1 whatever the context, and the order counts."""
    numbers = [1, 2, 3, 1, 2, 4, 1, 2, 3]
    chain = MarkovChain([numbers], order=2, kinds=5)
    for context in ([], [1], [1, 2], [4, 4], [0, 1, 2]):
        assert sum(chain.probability(n, context) for n in range(5)) == pytest.approx(1)
    assert chain.probability(3, [1, 2]) > chain.probability(4, [1, 2]) > chain.probability(0, [1, 2])
    assert chain.probability(3, [9, 1, 2]) == chain.probability(3, [1, 2])
    assert MarkovChain([numbers], order=0, kinds=5).probability(1, [2]) == pytest.approx((3 + 4 / 5) / 13)
    assert len(chain.losses(numbers)) == 9
    assert repr(chain) == "MarkovChain(order 2, fitted on 9 numbers)"


# -- pictures ---------------------------------------------------------------------------------------------------------


def test_pictures(tiny: Any) -> None:
    """Bars and line along the series, and the forecast beside them where there is one."""
    found = series.Numbers.of(series.LogisticMap().draw(30, seeded()))
    by_number = series.influence(tls.attribute(tiny, found[:29].text, tls.TemperatureScope()))
    assert len(by_number.plot().axes) == 2
    figure = by_number.plot(series.forecast(tiny, found[:29]), found.numbers[29])
    assert len(figure.axes) == 3
    bars, line = figure.axes[0], figure.axes[-1]
    assert [patch.get_height() for patch in bars.patches] == pytest.approx(by_number.scores.tolist())
    assert list(line.lines[0].get_ydata()) == list(by_number.numbers)
    figure.draw_without_rendering()
    box = bars.yaxis.label.get_window_extent()  # the long unit is not cut
    assert box.y0 >= 0
    assert box.y1 <= figure.bbox.height
    assert line.get_ylabel() == "series (line)"
    assert figure.axes[1].get_xlabel() == "probability"
    assert by_number._repr_png_().startswith(b"\x89PNG")
