"""Scopes around scopes: the position divided out, attention frozen."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import factorial
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import tl_scopes as tls
from tests import zoo
from tests.test_attention import HOLDABLE
from tests.zoo import PROMPT, Specimen
from tl_scopes.jacobian.linearization import Linearization
from tl_scopes.models import Target, held_attention
from tl_scopes.scopes.baselines import IntegratedGradients, RandomBaseline
from tl_scopes.scopes.measurement import Measurement

TARGET = 7
SCOPES = (tls.SemanticScope(TARGET), tls.FisherScope(exact=True), IntegratedGradients(steps=3))
EXACT = {"rtol": 1e-9, "atol": 1e-11}
PROMPT_OF_TINY = "The keys to the old cabinet near the door"


@dataclass(frozen=True)
class OfPosition(tls.Scope):
    """A score that owes all to the position, but for a factor of the token's own."""

    own: bool = False

    def measure(self, lin: Linearization) -> Measurement:
        score = 1 / torch.arange(1, len(lin.tokens) + 1, dtype=torch.float64) ** 2
        return Measurement(score * lin.tokens if self.own else score)

    def unit(self, lin: Linearization) -> str:
        return "none"


class Signed(OfPosition):
    def measure(self, lin: Linearization) -> Measurement:
        return Measurement(super().measure(lin).scores - 0.5)


@pytest.fixture(params=HOLDABLE)
def holdable(request: pytest.FixtureRequest) -> Iterator[Specimen]:
    """Models whose attention can be held."""
    with zoo.Float64():
        yield zoo.specimen(request.param)


@pytest.fixture
def toy() -> Iterator[tls.Linearization]:
    """Linear in the embeddings: zoo.linear_toy."""
    with zoo.Float64():
        yield tls.linearize(zoo.linear_toy(TARGET).model, PROMPT)


@pytest.fixture
def lin(specimen: Specimen) -> tls.Linearization:
    return tls.linearize(specimen.model, PROMPT)


def test_a_score_of_the_position_alone_is_one(lin: tls.Linearization) -> None:
    answer = tls.PositionCorrectedScope(OfPosition())(lin)
    assert_close(answer.scores, torch.ones(len(PROMPT), dtype=torch.float64))
    assert_close(answer.standard_error, torch.zeros(len(PROMPT), dtype=torch.float64))


def test_expected_share_by_hand(lin: tls.Linearization) -> None:
    """Every linearisation at a shuffle anew, with the target that the prompt itself makes most likely."""
    shuffles, seed = 3, 5
    found = tls.PositionCorrectedScope(tls.SemanticScope(), shuffles, torch.Generator().manual_seed(seed))(lin)
    generator, target = torch.Generator().manual_seed(seed), lin.token().id
    orders = [torch.randperm(len(PROMPT), generator=generator) for _ in range(shuffles)]
    prompts = [torch.tensor(PROMPT), *(torch.tensor(PROMPT)[order] for order in orders)]
    shares = torch.stack([tls.attribute(lin.model, ids, tls.SemanticScope(target)).share for ids in prompts])
    assert_close(found.expected, shares[1:].mean(0), **EXACT)
    assert_close(found.scores, shares[0] / shares[1:].mean(0), **EXACT)
    assert_close(found.uncorrected, tls.SemanticScope()(lin).scores, **EXACT)
    assert found.target == Target((lin.token(),))


def test_standard_error_is_honest(toy: tls.Linearization) -> None:
    """Over many draws, the spread of the score is what each draw says of itself."""
    draws = [
        tls.PositionCorrectedScope(OfPosition(own=True), 8, torch.Generator().manual_seed(seed))(toy)
        for seed in range(80)
    ]
    spread = torch.stack([draw.scores for draw in draws]).std(0)
    said = torch.stack([draw.standard_error for draw in draws]).square().mean(0).sqrt()
    assert ((spread / said - 1).abs() < 0.25).all()


@pytest.mark.parametrize("shuffles", [4, 6])
def test_few_shuffles_tell_little_of_their_error(toy: tls.Linearization, shuffles: int) -> None:
    """The deviation is 1 in units of the standard error (root mean square): few draws raise it."""
    answers = [
        tls.PositionCorrectedScope(OfPosition(own=True), shuffles, torch.Generator().manual_seed(seed))(toy)
        for seed in range(200)
    ]
    exact = tls.PositionCorrectedScope(OfPosition(own=True), 400)(toy).expected
    away = torch.stack([(one.expected - exact) / (one.standard_error / one.scores * one.expected) for one in answers])
    # Its mean is heavy-tailed for few draws, so the middle is compared: that of Student's t over √((n − 1)/(n − 3)).
    middle = {4: 0.765, 6: 0.727}[shuffles] / ((shuffles - 1) / (shuffles - 3)) ** 0.5
    assert float(away.abs().median()) == pytest.approx(middle, rel=0.2)
    few = tls.PositionCorrectedScope(OfPosition(own=True), 3)(toy)
    assert few.standard_error.isinf().all()


def test_expectation_over_all_orders(toy: tls.Linearization) -> None:
    """With many shuffles the correction of a product, position times token, leaves the token's factor."""
    answer = tls.PositionCorrectedScope(OfPosition(own=True), shuffles=300)(toy)
    mean = torch.zeros(len(PROMPT), dtype=torch.float64)
    weights = 1 / torch.arange(1, len(PROMPT) + 1, dtype=torch.float64) ** 2
    generator = torch.Generator().manual_seed(0)
    for _ in range(3000):
        score = weights * torch.tensor(PROMPT)[torch.randperm(len(PROMPT), generator=generator)]
        mean += score / score.sum() / 3000
    assert factorial(len(PROMPT)) > 3000
    assert ((answer.expected / mean - 1).abs() < 0.2).all()


def test_bos_stays_in_front(tiny: Any) -> None:
    """A BOS token is in its place in all orders: what it gets is what is expected, within the spread of shuffles."""
    lin = tls.linearize(tiny, PROMPT_OF_TINY)
    answer = tls.PositionCorrectedScope(OfPosition(own=False))(lin)
    assert_close(answer.scores, torch.ones_like(answer.scores))
    firsts: list[int] = []

    @dataclass(frozen=True)
    class Watching(OfPosition):
        def measure(self, lin: Linearization) -> Measurement:
            firsts.append(int(lin.tokens[0]))
            assert sorted(lin.tokens.tolist()) == tokens
            return super().measure(lin)

    tokens = sorted(lin.tokens.tolist())
    tls.PositionCorrectedScope(Watching())(lin)
    assert set(firsts) == {tiny.tokenizer.bos_token_id}
    assert len(firsts) == 9


@pytest.mark.parametrize("prompt", [[5], [0, 5]])
def test_nothing_to_shuffle(tiny: Any, prompt: list[int]) -> None:
    prompt = [tiny.tokenizer.bos_token_id if id == 0 else id for id in prompt]
    answer = tls.attribute(tiny, prompt, tls.PositionCorrectedScope(tls.SemanticScope()))
    assert_close(answer.scores, torch.ones(len(prompt)))


def test_same_prompt_same_numbers(tiny: Any) -> None:
    scope = tls.PositionCorrectedScope(tls.SemanticScope())
    first, again = (tls.attribute(tiny, PROMPT_OF_TINY, scope) for _ in range(2))
    assert torch.equal(first.scores, again.scores)
    state = torch.random.get_rng_state()
    tls.attribute(tiny, PROMPT_OF_TINY, scope)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("keys", [None, (0, 2)])
@pytest.mark.parametrize(
    "scope", [tls.SemanticScope(TARGET), tls.FisherScope(exact=True), IntegratedGradients(steps=3)]
)
@pytest.mark.filterwarnings("ignore:.*steps=3 is too few")  # where attention is held by hand
def test_frozen_attention(holdable: Specimen, scope: tls.Scope, keys: tuple[int, ...] | None) -> None:
    """The scope of a linearisation made while attention is held."""
    lin = tls.linearize(holdable.model, PROMPT)
    with held_attention(holdable.model, keys):
        expected = scope(tls.linearize(holdable.model, PROMPT))
    assert_close(tls.FrozenAttentionScope(scope, keys)(lin).scores, expected.scores, **EXACT)
    assert (scope(lin).scores - expected.scores).abs().max() > 1e-6


@pytest.mark.parametrize(
    "scope", [tls.SemanticScope(), tls.SemanticScope([7, 3, 4]), tls.SemanticScope(7, versus=[3, 4])]
)
def test_keys_are_positions_of_the_prompt(holdable: Specimen, scope: tls.Scope) -> None:
    """Also where an answer goes through the model behind it, or two of different lengths: neither these nor what fills
    up the shorter one counts."""
    lin, last = tls.linearize(holdable.model, PROMPT), len(PROMPT) - 1
    named, counted = (tls.FrozenAttentionScope(scope, keys=(key,))(lin).scores for key in (last, -1))
    assert torch.equal(named, counted)
    assert (scope(lin).scores - counted).abs().max() > 1e-6
    with pytest.raises(ValueError, match=f"attention cannot be held: position {last + 1} is out of range"):
        tls.FrozenAttentionScope(scope, keys=(last + 1,))(lin)


def test_a_line_with_attention_frozen(tiny: Any) -> None:
    """Contributions do not sum to the change then: points cannot be added until they do, and no number is too few."""
    line = tls.PathIntegratedScope(TARGET)
    message = r"PathIntegratedScope\(target=\d+\) adds points to its line until .* with attention frozen: give their"
    with pytest.raises(ValueError, match=message):
        tls.FrozenAttentionScope(tls.PositionCorrectedScope(line))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tls.attribute(tiny, PROMPT_OF_TINY, tls.FrozenAttentionScope(replace(line, steps=3)))


def test_nothing_frozen(holdable: Specimen) -> None:
    """With no keys the scope is what it was; with attention that is constant by itself as well."""
    lin, scope = tls.linearize(holdable.model, PROMPT), tls.SemanticScope(TARGET)
    assert_close(tls.FrozenAttentionScope(scope, ())(lin).scores, scope(lin).scores, **EXACT)


def test_aimed(toy: tls.Linearization) -> None:
    """A scope around one without a target of its own is aimed, and says so."""
    around = tls.PositionCorrectedScope(tls.FrozenAttentionScope(tls.SemanticScope()))
    assert around.with_target(toy, 3) == tls.PositionCorrectedScope(tls.FrozenAttentionScope(tls.SemanticScope(3)))
    assert tls.PositionCorrectedScope(tls.SemanticScope(4)).with_target(toy, 3).explained(toy)[0] == Target(
        (toy.token(4),)
    )
    assert tls.PositionCorrectedScope(tls.TemperatureScope()).with_target(toy, 3).explained(toy) == (None, None)


def test_errors_of_an_estimate_add_up(tiny: Any) -> None:
    """Fisher Scope's own error and that of the shuffles."""
    lin = tls.linearize(tiny, PROMPT_OF_TINY)
    exact, estimate = (
        tls.PositionCorrectedScope(scope)(lin) for scope in (tls.FisherScope(exact=True), tls.FisherScope(probes=24))
    )
    inner = tls.FisherScope(probes=24)(lin)
    relative = (inner.standard_error / inner.scores).square()
    assert ((estimate.standard_error / estimate.scores).square() > relative).all()
    assert (exact.standard_error > 0).any()


def test_a_position_that_gets_nothing_elsewhere() -> None:
    """One token has all the influence: its position gets nothing from shuffles that put it elsewhere."""

    @dataclass(frozen=True)
    class OfOneToken(OfPosition):
        def measure(self, lin: Linearization) -> Measurement:
            return Measurement((lin.tokens == PROMPT[2]).double())

    def elsewhere(seed: int) -> bool:
        generator = torch.Generator().manual_seed(seed)
        return all(PROMPT[torch.randperm(len(PROMPT), generator=generator)[2]] != PROMPT[2] for _ in range(2))

    lin = tls.linearize(zoo.linear_toy(TARGET).model, PROMPT)
    generator = torch.Generator().manual_seed(next(filter(elsewhere, range(100))))
    answer = tls.PositionCorrectedScope(OfOneToken(), 2, generator)(lin)
    assert answer.scores[2] == 3
    assert answer.scores.sum() == 3


class TestBadInput:
    @pytest.mark.usefixtures("no_type_checks")
    def test_keys(self) -> None:
        with pytest.raises(TypeError, match=r"keys are several positions, or None for all, got 0: write \(0,\)"):
            tls.FrozenAttentionScope(tls.SemanticScope(), 0)  # type: ignore[arg-type]

    @pytest.mark.usefixtures("no_type_checks")
    def test_shuffles(self) -> None:
        for shuffles, error, got in (
            (1, ValueError, "got 1"),
            (2.5, TypeError, "and an integer, got 2.5"),
            (True, TypeError, "and an integer, got True"),
        ):
            with pytest.raises(error, match=f"shuffles is a number, 2 at least, {got}"):
                tls.PositionCorrectedScope(RandomBaseline(), shuffles)  # type: ignore[arg-type]

    @pytest.mark.usefixtures("no_type_checks")
    @pytest.mark.parametrize("kind", [tls.PositionCorrectedScope, tls.FrozenAttentionScope])
    def test_no_scope(self, kind: Any) -> None:
        with pytest.raises(TypeError, match="SemanticScope"):
            kind(tls.SemanticScope)

    def test_no_rules(self) -> None:
        with pytest.raises(ValueError, match="UnderRulesScope asks under rules, got rules=None: take the"):
            tls.UnderRulesScope(tls.SemanticScope(), rules=None)

    def test_signs(self, toy: tls.Linearization) -> None:
        with pytest.raises(ValueError, match=r"Signed\(\) has negative scores, -0.484 for one token, and how many"):
            tls.PositionCorrectedScope(Signed())(toy)

    def test_models_whose_attention_cannot_be_held(self) -> None:
        with zoo.Float64():
            lin = tls.linearize(zoo.specimen("bridge mamba").model, PROMPT)
        with pytest.raises(ValueError, match="no attention patterns: there is nothing to hold"):
            tls.FrozenAttentionScope(tls.SemanticScope())(lin)


def test_a_scope_around_another_is_a_slope_where_that_is() -> None:
    assert tls.FrozenAttentionScope(tls.SemanticScope()).is_slope
    assert not tls.FrozenAttentionScope(tls.HetaScope()).is_slope
    assert not tls.PositionCorrectedScope(tls.SemanticScope()).is_slope  # a ratio of shares
