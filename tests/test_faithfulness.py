"""Evaluation by replacement: its measures beside slow loops and known answers, its prompts, its statistics."""

import gc
import math
import re
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import tl_scopes as tls
from tests import zoo
from tests.test_left_as_found import KINDS, unchanged
from tests.zoo import PROMPT, Specimen
from tl_scopes import models
from tl_scopes.bootstrap import bootstrap
from tl_scopes.faithfulness import Perturbation, aligned, differences, measures, plot, summary
from tl_scopes.faithfulness.evaluation import evaluate
from tl_scopes.faithfulness.measures import (
    Removal,
    candidates,
    drop_of_all,
    hard_measures,
    ranking,
    soft_measures,
)
from tl_scopes.faithfulness.perturbation import Substitutes
from tl_scopes.models.weights import learned
from tl_scopes.rank_correlation import kendall, spearman
from tl_scopes.scopes.baselines import LeaveOneOut, RandomBaseline

TARGET = 7
PROMPTS = [PROMPT, PROMPT[::-1], [4, 4, 30, 2, 1]]
FOIL = 5
SHORT = Perturbation(replacements=("zero", "resample"), fractions=(0.2, 0.5), steps=4, samples=2)


@dataclass(frozen=True)
class Fixed(tls.Scope):
    """A scope with the scores that a test wants, which remembers what it was asked and may fail."""

    scores: Any = None
    asked: list[tuple[int, ...]] = field(default_factory=list, init=False, repr=False, compare=False)
    failures: dict[int, BaseException] = field(default_factory=dict, init=False, repr=False, compare=False)

    def measure(self, lin: tls.Linearization) -> tls.Measurement:
        self.asked.append(tuple(lin.tokens.tolist()))
        if failure := self.failures.get(len(self.asked)):
            raise failure
        scores = torch.arange(len(lin.tokens)) if self.scores is None else torch.tensor(self.scores)
        return tls.Measurement(scores.double())

    def unit(self, lin: tls.Linearization) -> str:
        return "test"


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A fresh model of each kind."""
    with zoo.Float64():
        model = zoo.SPECIES[request.param]().model
        model(torch.tensor([PROMPT]))  # a bridge registers a hook of its own at the first run
        yield model


@pytest.fixture
def toy() -> Iterator[tls.Linearization]:
    """A prompt of zoo.linear_toy, whose log p(target) grows with a sum over tokens."""
    with zoo.Float64():
        yield tls.linearize(zoo.linear_toy(TARGET).model, PROMPT[:5])


def curve(values: list[measures.Value], measure: str, quantity: str) -> list[float]:
    return [v.value for v in values if (v.measure, v.quantity) == (measure, quantity)]


# -- the measures -----------------------------------------------------------------------------------------------------


def test_hard_measures_are_their_equations(specimen: Specimen) -> None:
    """They are computed by hand here, from one perturbed prompt after another."""
    lin = tls.linearize(specimen.model, PROMPT)
    random = torch.Generator().manual_seed(1)
    instead = torch.randn(len(PROMPT), zoo.WIDTH, generator=random, dtype=torch.float64)
    order, perturbation = torch.tensor([6, 2, 3, 1, 7, 4, 5]), Perturbation(fractions=(0.15, 0.5), steps=7)
    removal = Removal(lin, instead, range(1, 8))
    orders = {"a": order, "b": order.flip(0)}
    both = hard_measures(removal, orders, {"a": TARGET, "b": 3}, perturbation, {"a": FOIL, "b": None})
    found = both["a"]
    assert not curve(both["b"], "deletion area", "log_odds")

    def after(replaced: Tensor) -> tuple[float, float, float]:
        embeddings = lin.embeddings.clone()
        embeddings[replaced] = instead[replaced]
        other = lin.at(embeddings)
        divergence = float((lin.log_probs.exp() * (lin.log_probs - other.log_probs)).sum())
        return float(other.log_probs[TARGET]), divergence, float(other.logits[TARGET] - other.logits[FOIL])

    q, odds = float(lin.log_probs[TARGET]), float(lin.logits[TARGET] - lin.logits[FOIL])
    without, alone = zip(*((after(order[:k]), after(order[k:])) for k in range(8)), strict=True)
    expected = {
        ("deletion", "log_prob"): [q - one[0] for one in without],
        ("deletion", "kl"): [one[1] for one in without],
        ("insertion", "log_prob"): [one[0] - alone[0][0] for one in alone],
        ("insertion", "kl"): [alone[0][1] - one[1] for one in alone],
        ("deletion", "log_odds"): [odds - one[2] for one in without],
        ("insertion", "log_odds"): [one[2] - alone[0][2] for one in alone],
    }
    steps = [i for i, f in enumerate(perturbation.grid(7)) if f not in perturbation.fractions]
    for (measure, quantity), values in expected.items():
        assert [curve(found, measure, quantity)[i] for i in steps] == pytest.approx(values, abs=1e-9)
        area = sum(values) / 7 - (values[0] + values[-1]) / 14
        assert curve(found, f"{measure} area", quantity) == [pytest.approx(area, abs=1e-9)]
    taken = [(math.exp(q) - math.exp(without[k][0])) for k in (1, 4)]  # 15% and 50% of seven tokens
    left = [(math.exp(q) - math.exp(alone[k][0])) for k in (1, 4)]
    assert curve(found, "comprehensiveness", "probability") == [pytest.approx(sum(taken) / 2, abs=1e-9)]
    assert curve(found, "sufficiency", "probability") == [pytest.approx(sum(left) / 2, abs=1e-9)]
    single = [after(torch.tensor([t]))[1] for t in range(1, 8)]
    assert curve(found, "leave-one-out of the first", "kl") == [pytest.approx(single[5], abs=1e-9)]
    assert curve(found, "leave-one-out rank of the first", "rank") == [
        sorted(single, reverse=True).index(single[5]) + 1
    ]


def test_the_best_order_is_found_best(toy: tls.Linearization) -> None:
    """Where contributions add up, no order of the tokens takes more, or gives back more, than by contribution."""
    direction = toy.cotangent(lambda z: z[TARGET])
    contributions = (toy.vjp(direction[None])[0] * toy.embeddings).sum(-1)
    orders = {str(order): torch.tensor(order) for order in permutations(range(5))}
    orders["oracle"] = contributions.argsort(descending=True)
    removal = Removal(toy, torch.zeros_like(toy.embeddings), range(5))
    found = hard_measures(removal, orders, dict.fromkeys(orders, TARGET), Perturbation(fractions=(0.2,), steps=5))
    for measure in ("deletion", "insertion"):
        best = torch.tensor(curve(found["oracle"], measure, "log_prob"))
        others = torch.tensor([curve(found[name], measure, "log_prob") for name in orders])
        assert_close(others.max(0).values, best)
        areas = [curve(found[name], f"{measure} area", "log_prob")[0] for name in orders]
        assert areas.count(max(areas)) == 2  # the oracle, and the same order among all of them
        assert areas[-1] == max(areas)


def test_leave_one_out_ranks_first_by_itself(specimen: Specimen) -> None:
    """Leave-one-out's own first token has the first rank by leave-one-out."""
    perturbation = Perturbation(replacements=("zero",), fractions=(0.5,), steps=1, samples=0, randomise=False)
    results = evaluate(specimen.model, [PROMPT], [LeaveOneOut("zero")], perturbation)
    assert results[results.measure == "leave-one-out rank of the first"].value.tolist() == [1]


def test_leave_one_out_ranks_as_it_does_itself(specimen: Specimen) -> None:
    """Its whole ranking agrees with itself, and the reverse ranking disagrees as much."""
    lin = tls.linearize(specimen.model, PROMPT)
    removal = Removal(lin, torch.zeros_like(lin.embeddings[:1]), range(len(PROMPT)))
    single = LeaveOneOut("zero")(lin).scores
    orders = {"own": single.argsort(descending=True), "reverse": single.argsort()}
    perturbation = Perturbation(fractions=(0.5,), steps=1)
    found = hard_measures(removal, orders, dict.fromkeys(orders, TARGET), perturbation)
    for name, (correlation, overlap) in {"own": (1, 1), "reverse": (-1, 0)}.items():
        values = {value.measure: value.value for value in found[name]}
        assert values["leave-one-out Spearman"] == pytest.approx(correlation)
        assert values["leave-one-out Kendall"] == pytest.approx(correlation)
        assert values["leave-one-out first tenth"] == overlap


def test_kendall() -> None:
    """By its definition, with pairs that are equal in one list."""
    one, other = torch.tensor([1.0, 2.0, 2.0, 4.0]), torch.tensor([1.0, 3.0, 2.0, 0.0])
    concordant, discordant = 2, 3
    assert kendall(one, other) == pytest.approx((concordant - discordant) / (5 * 6) ** 0.5)
    assert math.isnan(kendall(one, torch.ones(4)))


def test_equal_scores_are_as_good_as_none(toy: tls.Linearization) -> None:
    """Both keep half of every token."""
    removal = Removal(toy, torch.zeros_like(toy.embeddings), range(5))
    orders, perturbation = {"": torch.arange(5)}, Perturbation(fractions=(0.2,))
    drop = drop_of_all(hard_measures(removal, orders, {"": TARGET}, perturbation)[""])
    nothing = toy.at(torch.zeros_like(toy.embeddings))
    assert drop == pytest.approx(float((toy.log_probs - nothing.log_probs)[TARGET]))
    equal, zero, negative = (
        soft_measures(removal, torch.full((5,), score), TARGET, drop, 3, torch.Generator().manual_seed(0))
        for score in (0.3, 0.0, -2.0)
    )
    assert equal == zero == negative


@pytest.mark.parametrize(
    ("scores", "chances"),
    [
        ([9.0, 0.5, 2.0, -1.0], [0.5, 1, 0]),  # the first is no candidate
        ([0.0, 7.0, 0.0, 0.0], [1, 0.25, 0.25]),
        ([0.0, 3.0, 2.0, 1.0], [0.75, 0.5, 0.25]),
        ([0.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.5]),
    ],
)
def test_soft_masks_keep_half_in_all(
    monkeypatch: pytest.MonkeyPatch, scores: list[float], chances: list[float]
) -> None:
    """The share of entries kept grows with the score, and its mean is a half for all scores; other tokens stay."""
    lin, seen = tls.linearize(zoo.specimen("bridge llama").model, PROMPT[:4]), []

    def remember(self: Removal, kept: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
        seen.append(kept)
        return torch.zeros(1, len(kept)), torch.zeros(len(kept))

    monkeypatch.setattr(Removal, "effects", remember)
    removal = Removal(lin, lin.embeddings, range(1, 4))
    soft_measures(removal, torch.tensor(scores), TARGET, 1.0, 400, torch.Generator().manual_seed(0))
    share = seen[0].double().mean(-1).view(2, 400, 4).mean(1)
    expected = torch.tensor([[1, *(1 - a for a in chances)], [1, *chances]], dtype=torch.float64)
    assert_close(share, expected, atol=0.02, rtol=0)


def test_soft_measures_have_no_scale_where_nothing_is_lost(toy: tls.Linearization) -> None:
    removal = Removal(toy, toy.embeddings, range(5))  # replaced by themselves
    found = soft_measures(removal, torch.ones(5), TARGET, 0.0, 1, torch.Generator().manual_seed(0))
    assert all(math.isnan(value.value) for value in found)


def test_ranking() -> None:
    """Only candidates are ranked, best first, and every order of equals is as likely."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.tensor([9.0, 1.0, 3.0, 1.0, -5.0])
    orders = [ranking(scores, range(1, 5), generator).tolist() for _ in range(200)]
    assert {tuple(order) for order in orders} == {(2, 1, 3, 4), (2, 3, 1, 4)}
    assert 60 < sum(order[1] == 1 for order in orders) < 140


def test_spearman() -> None:
    """It is the correlation of the ranks, where equals share theirs, as in pandas."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(0, 6, (20,), generator=generator).double() for _ in range(2))
    expected = pd.Series(a.numpy()).rank().corr(pd.Series(b.numpy()).rank())
    assert spearman(a, b) == pytest.approx(expected)
    assert spearman(a, 3 * a) == pytest.approx(1)
    assert spearman(a, -a) == pytest.approx(-1)
    assert math.isnan(spearman(a, torch.ones(20, dtype=torch.float64)))


# -- weights ----------------------------------------------------------------------------------------------------------


def test_exchanged_weights(model: Any) -> None:
    """Inside, the model computes with these weights; afterwards it is what it was, also after an exception."""
    weights = models.shuffled_weights(model, torch.Generator().manual_seed(0))
    with unchanged(model), models.exchanged_weights(model, weights):
        inside = tls.attribute(model, PROMPT, tls.SemanticScope(TARGET))
    with unchanged(model), pytest.raises(ZeroDivisionError), models.exchanged_weights(model, weights):
        raise ZeroDivisionError
    before = models.fingerprint(model)
    for own, other in zip(learned(model), weights, strict=True):
        assert torch.equal(own.flatten().sort().values, other.flatten().sort().values)
        own.data.copy_(other)
    assert_close(tls.attribute(model, PROMPT, tls.SemanticScope(TARGET)).scores, inside.scores, rtol=0, atol=0)
    assert models.fingerprint(model) != before


@pytest.mark.parametrize("processed", [False, True])
@pytest.mark.parametrize("species", zoo.SPECIES)
def test_no_weight_is_left_out(species: str, processed: bool) -> None:
    """With the weights of another model it computes what that one does, whatever was folded where; with all weights
    zero every token is as likely."""

    def made(factor: float) -> Any:
        model = zoo.SPECIES[species]().model
        for parameter in model.parameters():
            parameter.data *= factor * torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
        if processed and hasattr(model, "enable_compatibility_mode"):
            model.enable_compatibility_mode(disable_warnings=True)
        return model

    tokens, generator = torch.tensor([PROMPT]), torch.Generator().manual_seed(0)
    with zoo.Float64():
        model, other = made(1), made(1.5)
        before = model(tokens)
        with models.exchanged_weights(model, learned(other)):
            assert_close(model(tokens), other(tokens), rtol=0, atol=0)
        with models.exchanged_weights(model, [torch.zeros_like(weight) for weight in learned(model)]):
            assert_close(model(tokens), torch.zeros_like(before), rtol=0, atol=0)
        assert torch.equal(model(tokens), before)
        assert not torch.allclose(other(tokens), before)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_graphs_do_not_mind_exchanged_weights(model: Any, elsewhere: bool) -> None:
    """Made outside and asked inside, or the other way round, in this thread or another: the weights they were made
    with."""
    weights = models.shuffled_weights(model, torch.Generator().manual_seed(0))

    def scores(lin: tls.Linearization) -> Tensor:
        """Of the whole pass, and of rows that go through the unembedding by themselves."""
        if not isinstance(lin, tls.Span):
            return scope(lin).scores
        lin.trace.graphs.clear()
        rows = [asked(one).scores for one in lin.single for asked in (scope, tls.FisherScope(exact=True))]
        return torch.cat([scope(lin.part(0, 2)).scores, *rows])

    def ask(lin: tls.Linearization) -> Tensor:
        if not elsewhere:
            return scores(lin)
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(scores, lin).result(timeout=60)

    for options in ({}, {"answer": [3, 4, 5]}):
        scope = tls.SemanticScope(quantity="log_prob", **({} if options else {"target": TARGET}))
        outside = tls.linearize(model, PROMPT, **options)
        expected = ask(outside)
        with models.exchanged_weights(model, weights):
            assert_close(ask(outside), expected, rtol=0, atol=0)
            inside = tls.linearize(model, PROMPT, **options)
            shuffled = scores(inside)
            with models.exchanged_weights(model, learned(model)):  # whose own weights are those of the moment
                assert_close(ask(outside), expected, rtol=0, atol=0)
                assert_close(ask(inside), shuffled, rtol=0, atol=0)
        assert_close(ask(inside), shuffled, rtol=0, atol=0)
        assert not torch.allclose(shuffled, expected)


def test_a_row_says_that_its_unembedding_has_changed() -> None:
    """Its graph is made when it is asked for, with the weights and the hooks that the pass ran with."""
    model = zoo.SPECIES["bridge llama"]().model
    rows = tls.linearize(model, PROMPT, answer=[3, 4]).single
    with model.hooks(fwd_hooks=[("unembed.hook_in", lambda value, hook: 2 * value)]):
        with pytest.raises(ValueError, match=r"the hooks at 'unembed.hook_in' are not those under which"):
            tls.SemanticScope(TARGET)(rows[0])
    with torch.no_grad():
        model.original_model.lm_head.weight.mul_(-1)
    with pytest.raises(ValueError, match="the weights have changed since the model was linearised"):
        tls.SemanticScope(TARGET)(rows[0])


def test_hooks_of_another_threads_pass_are_nobodys(model: Any) -> None:
    """While a pass runs in one thread, another that asks for the user's hooks waits, and is told of those alone."""
    asked: list[Future[Any]] = []
    with ThreadPoolExecutor(1) as pool:

        def ask(value: Tensor, hook: Any) -> None:
            asked.append(pool.submit(models.user_hooks, model))
            wait(asked, timeout=0.2)

        with model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", ask)]):
            tls.linearize(model, PROMPT)
            assert asked[0].result(timeout=60) == models.user_hooks(model)


def test_a_checkpointed_graph_notices_exchanged_weights(model: Any) -> None:
    """It runs its blocks again, and would run them with the other weights."""
    lin, weights = tls.linearize(model, PROMPT, checkpoint=True), models.shuffled_weights(model, torch.Generator())
    with models.exchanged_weights(model, weights), pytest.raises(RuntimeError, match="the weights have changed since"):
        tls.SemanticScope(TARGET)(lin)
    assert_close(tls.SemanticScope(TARGET)(lin).scores, tls.attribute(model, PROMPT, tls.SemanticScope(TARGET)).scores)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_bit_of_the_weights_is_in_the_fingerprint(dtype: torch.dtype) -> None:
    """The last number of each tensor, changed by as little as can be; put back, it is as before."""
    model = zoo.SPECIES["bridge qwen2"]().model.to(dtype)
    before = models.fingerprint(model)
    for weight in learned(model):
        last = weight.data.view(-1)[-1:]
        own = last.clone()
        last.copy_(torch.nextafter(own, own + 1))
        assert models.fingerprint(model) != before
        last.copy_(own)
    assert models.fingerprint(model) == before


# -- evaluate ---------------------------------------------------------------------------------------------------------


def test_evaluate_has_every_number(model: Any) -> None:
    """All numbers of all prompts, scopes and replacements are there; a scope without weights has the correlation 1."""
    results = evaluate(model, PROMPTS, [tls.SemanticScope(), tls.FisherScope(), Fixed()], SHORT)
    per_replacement = 4 * (len(SHORT.grid(8)) + 1) + 9
    assert len(results) == 3 * 3 * (2 * per_replacement + 2)
    groups = results.groupby(["prompt", "scope", "replacement"]).size()
    assert set(groups.xs("zero", level=2)) == set(groups.xs("resample", level=2)) == {per_replacement}
    assert results[~results.measure.str.startswith("soft")].value.notna().all()
    correlation = results[results.measure == "shuffled weights"].set_index(["scope", "prompt"]).value
    assert correlation["Fixed()"].tolist() == pytest.approx([1, 1, 1])
    assert (correlation["SemanticScope()"] < 0.99).all()


def test_weights_are_shuffled_from_the_last_block_on(model: Any) -> None:
    """By hand: the blocks of that share hold other weights, the others and what is around them their own; afterwards
    and after an exception the model is what it was."""
    scopes, cascade = {"semantic": tls.SemanticScope(TARGET), "fixed": Fixed()}, (0.5, 1.0)
    perturbation = Perturbation(("zero",), (0.5,), randomise=False, cascade=cascade)
    before = models.fingerprint(model)
    with unchanged(model):
        results = evaluate(model, [PROMPT], scopes, perturbation)
    found = results[results.measure == "shuffled last blocks"].set_index(["scope", "fraction"]).value
    assert found["fixed"].tolist() == pytest.approx([1, 1])
    own = scopes["semantic"](tls.linearize(model, PROMPT)).scores
    weights, shuffled = learned(model), models.shuffled_weights(model, torch.Generator().manual_seed(0))
    blocks = len(model.blocks)
    for share in cascade:
        inside = models.in_last_blocks(model, share)
        names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
        for chosen, weight in zip(inside, weights, strict=True):
            number = re.search(r"(?:blocks|layers|h)\.(\d+)\.", names.get(id(weight), ""))
            if id(weight) in names:
                assert chosen == (number is not None and int(number[1]) >= blocks - math.ceil(share * blocks))
        mixed = [b if chosen else a for a, b, chosen in zip(weights, shuffled, inside, strict=True)]
        with models.exchanged_weights(model, mixed):
            other = scopes["semantic"](tls.linearize(model, PROMPT)).scores
        free = candidates(model, torch.tensor(PROMPT), bos=False)
        assert found["semantic", share] == pytest.approx(spearman(own[free], other[free]))
    failing = Fixed()
    failing.failures[2] = ZeroDivisionError("with shuffled weights")
    with unchanged(model), pytest.raises(ZeroDivisionError):
        evaluate(model, [PROMPT], [failing], perturbation, on_error="raise")
    assert models.fingerprint(model) == before


def test_leave_one_out_is_run_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it measured itself is not measured again, and all numbers are what they are without it."""
    perturbation = Perturbation(("zero",), (0.5,), samples=0, steps=1, randomise=False)
    alone = evaluate(model, [PROMPT], {"fixed": Fixed()}, perturbation)
    rows: list[int] = []
    effects = Removal.effects

    def counted(self: Removal, kept: Tensor, targets: Any) -> Any:
        rows.append(len(kept))
        return effects(self, kept, targets)

    monkeypatch.setattr(Removal, "effects", counted)
    both = evaluate(model, [PROMPT], {"fixed": Fixed(), "loo": LeaveOneOut()}, perturbation)
    assert sum(rows) < len(PROMPT)
    assert both[both.scope == "fixed"].value.tolist() == pytest.approx(alone.value.tolist(), abs=1e-9)


def test_another_answer_is_run_where_it_is_compared(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the curve of the scope that names it, and neither with each token left out nor on the curves of others."""
    runs: list[int] = []
    run = Removal.log_probs_of_other

    def counted(self: Removal, number: int, kept: Tensor) -> Tensor:
        runs.append(len(kept))
        return run(self, number, kept)

    monkeypatch.setattr(Removal, "log_probs_of_other", counted)
    perturbation = Perturbation(("zero",), (0.5,), samples=0, steps=1, randomise=False)
    scopes = {
        "one": tls.SemanticScope(versus=[3, 4, 5]),
        "also": tls.SemanticScope(versus=[3, 4, 5]),
        "other": tls.SemanticScope(versus=[6, 7]),
        "plain": tls.SemanticScope(),
    }
    evaluate(model, [PROMPT], scopes, perturbation, answers=[[1, 2]])
    assert len(runs) == 2
    # Nothing, all, and the first or the second half: of each ranking at most four masks.
    assert min(runs) >= 3
    assert max(runs) <= 4


def test_aligned_prompts(model: Any) -> None:
    """Those where the model predicts the target of every scope; an answer counts by its worst token."""
    best = [tls.linearize(model, prompt).token().id for prompt in PROMPTS]
    targets = [best[0], (best[1] + 1) % zoo.VOCAB, best[2]]
    perturbation = Perturbation(("zero",), (0.5,), samples=0, randomise=False)
    results = evaluate(model, PROMPTS, [tls.SemanticScope()], perturbation, targets=targets)
    ranks = results[results.measure == "rank of the target"].value.tolist()
    log_probs = tls.linearize(model, PROMPTS[1]).log_probs
    assert ranks == [1, int((log_probs > log_probs[targets[1]]).sum()) + 1, 1]
    assert aligned(results).prompt.unique().tolist() == [0, 2]
    second = tls.linearize(model, [*PROMPT, best[0]]).token().id
    for answer, rank in (([best[0], second], 1), ([best[0], (second + 1) % zoo.VOCAB], None)):
        results = evaluate(model, [PROMPT], [tls.SemanticScope()], perturbation, answers=[answer])
        (found,) = results[results.measure == "rank of the target"].value
        assert found == 1 if rank else found > 1
    with pytest.raises(ValueError, match="the model predicts the target at none of 1 prompts"):
        aligned(results)
    with pytest.raises(ValueError, match="these results do not tell the rank of the target"):
        aligned(results[results.measure == "deletion"])


def test_the_target_explained_is_measured(model: Any) -> None:
    """It is the scope's own target, or else the prompt's, or else the most likely token."""
    best = tls.linearize(model, PROMPT).token().text
    scopes = [
        tls.SemanticScope(),
        tls.SemanticScope(3),
        tls.FisherScope(),
        LeaveOneOut(),
        LeaveOneOut(quantity="log_prob"),
    ]
    results = evaluate(model, [PROMPT, PROMPT], scopes, Perturbation(("zero",), (0.5,)), targets=[None, 5])
    shown = results.groupby(["prompt", "scope"], sort=False).target.unique()
    assert [names.tolist() for names in shown] == [[best], ["<3>"], *[[best]] * 3, ["<5>"], ["<3>"], *[["<5>"]] * 3]
    total = results[(results.measure == "deletion") & (results.fraction == 1) & (results.quantity == "log_prob")]
    lin = tls.linearize(model, PROMPT)
    drop = lin.log_probs - lin.at(torch.zeros_like(lin.embeddings)).log_probs
    assert total[(total.prompt == 1) & (total.scope == "FisherScope()")].value.tolist() == [
        pytest.approx(float(drop[5]))
    ]
    aimed = evaluate(model, [PROMPT], [tls.SemanticScope(5)], Perturbation(("zero",), (0.5,)))
    ours = results[(results.prompt == 1) & (results.scope == "SemanticScope()")]
    assert ours.value.tolist() == pytest.approx(aimed.value.tolist(), abs=1e-9, nan_ok=True)


def test_the_prediction_may_be_what_a_given_target_is_compared_with(model: Any) -> None:
    """The target that is given counts, and not the likeliest token, which is the scope's `versus` here."""
    best = tls.linearize(model, PROMPT).token().id
    other, perturbation = (best + 1) % zoo.VOCAB, Perturbation(("zero",), (0.5,), samples=0, randomise=False)
    found = evaluate(model, [PROMPT], [tls.SemanticScope(versus=best)], perturbation, targets=[other])
    same = evaluate(model, [PROMPT], [tls.SemanticScope(other, versus=best)], perturbation)
    assert found.value.tolist() == pytest.approx(same.value.tolist(), abs=1e-9, nan_ok=True)
    assert set(found.quantity) >= {"log_odds"}


def test_all_scopes_are_measured_alike(model: Any) -> None:
    """The same scores under two names give the same numbers, among other scopes and alone."""
    both = evaluate(model, PROMPTS, {"one": Fixed(), "other": Fixed(), "third": RandomBaseline()}, SHORT)
    alone = evaluate(model, PROMPTS, {"one": Fixed()}, SHORT)
    parts = [both[both.scope == name].value.tolist() for name in ("one", "other")]
    assert parts[0] == pytest.approx(parts[1], abs=1e-9, nan_ok=True)
    assert parts[0] == pytest.approx(alone.value.tolist(), abs=1e-9, nan_ok=True)


def test_one_bad_prompt_does_not_end_it(model: Any, tmp_path: Path) -> None:
    """It is reported and left out, in the file too, so that the next run tries it again."""
    path, perturbation, scope = tmp_path / "results.jsonl", Perturbation(("zero",), (0.5,), randomise=False), Fixed()
    scope.failures[2] = ValueError("no such token")
    with pytest.warns(UserWarning, match="prompt 1 has no answer: no such token"):
        results = evaluate(model, PROMPTS, [scope], perturbation, path=path)
    assert results.prompt.unique().tolist() == [0, 2]
    whole = evaluate(model, PROMPTS, [again := Fixed()], perturbation, path=path)
    assert again.asked == [tuple(PROMPTS[1])]
    pd.testing.assert_frame_equal(whole, evaluate(model, PROMPTS, [Fixed()], perturbation), check_exact=True)


BAD: list[tuple[Any, dict[str, Any], str]] = [
    ("", {}, "the prompt is empty"),
    ([], {}, "the prompt is empty"),
    ([1, 99], {}, "token id 99 is outside the vocabulary"),
    ([None, 2], {}, "token ids must be integers, got None"),
    (3.5, {}, "a prompt is a str, a list of token ids or a 1-D tensor of them, got float"),
    ([3], {}, "the prompt has 1 token to rank: it takes at least two"),
    ([1, 2], {}, r"the prompt has 2 tokens to rank, and 20% of them is less than half a token: leave it out, or give"),
    (PROMPT, {"targets": 99}, "target 99 is outside the vocabulary"),
    (PROMPT, {"foils": 99}, "foil 99 is outside the vocabulary"),
    (PROMPT, {"targets": 4, "foils": 4}, "target and foil are the same token, '<4>': their diff"),
    (PROMPT, {"targets": "no such"}, "the model has no tokenizer for its output: pass the target 'no such'"),
]


@pytest.mark.parametrize("place", [0, 1, 3])
@pytest.mark.parametrize(("prompt", "asked", "message"), BAD)
def test_a_bad_prompt_is_left_out(
    prompt: Any, asked: dict[str, Any], message: str, place: int, no_type_checks: None
) -> None:
    """It is reported wherever it stands, and the others are evaluated as if it were not there."""
    model, perturbation = zoo.specimen("bridge llama").model, Perturbation(("resample",), (0.2,), randomise=False)
    prompts = [*PROMPTS[:place], prompt, *PROMPTS[place:]]
    options = {name: [value if i == place else None for i in range(4)] for name, value in asked.items()}
    with pytest.warns(UserWarning, match=rf"prompt {place} has no answer: {message}") as warned:
        results = evaluate(model, prompts, [Fixed()], perturbation, **options)
    assert len(warned) == 1
    assert sorted(set(results.prompt)) == [i for i in range(4) if i != place]
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        evaluate(model, prompts, [Fixed()], perturbation, on_error="raise", **options)
    assert caught.value.__notes__ == [f"prompt {place} of evaluate"]
    if place == 3:  # where the others have the numbers that they would have without it
        expected = evaluate(model, PROMPTS, [Fixed()], perturbation)
        pd.testing.assert_frame_equal(results, expected, check_exact=True)


def test_where_nothing_can_be_evaluated_the_first_error_is_raised(no_type_checks: None) -> None:
    """Only the first is warned of; what is wrong shows before anything is computed where it can."""
    model, scope = zoo.specimen("bridge llama").model, Fixed()
    scope.failures.update({1: ValueError("no such token"), 2: ZeroDivisionError("nor this")})
    for prompts, error, message in [
        ([[], [1], [99]], ValueError, "the prompt is empty"),
        ([PROMPT, PROMPT[::-1]], ValueError, "no such token"),
    ]:
        with pytest.warns(UserWarning, match=f"prompt 0 has no answer: {message}") as warned:
            with pytest.raises(error, match=message) as caught:
                evaluate(model, prompts, [scope], Perturbation(("zero",), (0.5,), randomise=False))
        assert len(warned) == 1
        assert caught.value.__notes__ == ["prompt 0 of evaluate"]
    assert len(scope.asked) == 2


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), IndexError("out of range"), MemoryError()])
def test_errors_of_other_kinds_do_not_end_it(model: Any, error: Exception) -> None:
    """A scope of the user's may fail in any way; the kind of the error is said where its message is not one of ours."""
    scope, text = Fixed(), f"{type(error).__name__}: {error}"
    scope.failures[1] = error
    with unchanged(model), pytest.warns(UserWarning, match=f"prompt 0 has no answer: {text}"):
        results = evaluate(model, PROMPTS, [scope], Perturbation(("zero",), (0.5,), randomise=False))
    assert results.prompt.unique().tolist() == [1, 2]


def test_results_of_an_earlier_run_count_as_answers(tmp_path: Path) -> None:
    """Where only what is left fails, the failure is not the fault of all."""
    model, scope, path = zoo.specimen("bridge llama").model, Fixed(), tmp_path / "results.jsonl"
    perturbation = Perturbation(("zero",), (0.5,), randomise=False)
    evaluate(model, PROMPTS[:2], [scope], perturbation, path=path)
    scope.failures[3] = ValueError("no such token")
    with pytest.warns(UserWarning, match="prompt 2 has no answer: no such token"):
        results = evaluate(model, PROMPTS, [scope], perturbation, path=path)
    assert results.prompt.unique().tolist() == [0, 1]


@pytest.mark.parametrize("at", [1, 2])
def test_an_error_can_end_it(model: Any, at: int) -> None:
    """The note says which prompt it was."""
    scope = Fixed()
    scope.failures[at] = ValueError("no such token")
    with unchanged(model), pytest.raises(ValueError, match="no such token") as caught:
        evaluate(model, PROMPTS, [scope], Perturbation(("zero",), (0.5,), randomise=False), on_error="raise")
    assert caught.value.__notes__ == [f"prompt {at - 1} of evaluate"]


def test_a_failed_prompt_keeps_no_graph() -> None:
    """The error that is kept for the end holds no forward pass."""
    model, graphs = zoo.specimen("bridge llama").model, []

    class Remembering(Fixed):
        def measure(self, lin: tls.Linearization) -> tls.Measurement:
            assert lin.trace.output is not None
            graphs.append(weakref.ref(lin.trace.output))
            if len(graphs) > 1:
                gc.collect()
                assert graphs[0]() is None
            return super().measure(lin)

    scope = Remembering()
    scope.failures[1] = ValueError("no such token")
    with pytest.warns(UserWarning, match="prompt 0 has no answer"):
        evaluate(model, PROMPTS, [scope], Perturbation(("zero",), (0.5,), randomise=False))
    assert len(graphs) == 3


def test_targets_and_foils_may_come_from_anywhere() -> None:
    """A list, an array, a tensor and a generator give the same tokens."""
    model, perturbation = zoo.specimen("bridge llama").model, Perturbation(("zero",), (0.5,), randomise=False)
    expected = evaluate(model, PROMPTS, [tls.SemanticScope()], perturbation, targets=[1, 2, 3], foils=[4, 5, 6])
    for made in (np.array, torch.tensor, iter, pd.Series, lambda tokens: (token for token in tokens)):
        columns = {"targets": made([1, 2, 3]), "foils": made([4, 5, 6])}
        results = evaluate(model, PROMPTS, [tls.SemanticScope()], perturbation, **columns)
        pd.testing.assert_frame_equal(results, expected, check_exact=True)


def test_a_shuffled_model_that_overflows_is_no_end(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is then no correlation; all else is measured, with the weights put back."""
    scopes, perturbation = [tls.SemanticScope(), Fixed()], Perturbation(("zero",), (0.5,))
    expected = evaluate(model, PROMPTS, scopes, perturbation)
    broken = [torch.full_like(weight, math.inf) for weight in learned(model)]
    monkeypatch.setattr(models, "shuffled_weights", lambda *_: broken)
    with unchanged(model):
        results = evaluate(model, PROMPTS, scopes, perturbation)
    sanity = expected.measure == "shuffled weights"
    assert results[sanity].value.isna().all()
    assert expected[sanity].value.notna().all()
    pd.testing.assert_frame_equal(results[~sanity], expected[~sanity], check_exact=True)


def test_one_scope_fails_with_shuffled_weights(model: Any) -> None:
    """The other scope keeps its correlation."""
    failing = Fixed()
    failing.failures[2] = ValueError("NaN or infinite scores")
    results = evaluate(model, [PROMPT], {"a": failing, "b": Fixed()}, Perturbation(("zero",), (0.5,)))
    correlation = results[results.measure == "shuffled weights"].set_index("scope").value
    assert math.isnan(correlation["a"])
    assert correlation["b"] == pytest.approx(1)


def test_the_vocabulary_is_gone_through_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """That is once for the model's mean embedding and once for the shuffled one's, and it changes no number."""
    perturbation = Perturbation(("mean",), (0.5,), samples=0)
    mean, calls = models.mean_embedding, []
    monkeypatch.setattr(models, "mean_embedding", lambda *arguments: calls.append(0) or mean(*arguments))
    results = evaluate(model, PROMPTS, [LeaveOneOut("mean")], perturbation)
    assert len(calls) == 2
    monkeypatch.setattr("tl_scopes.faithfulness.evaluation._with_mean", lambda scope, mean: scope)
    alone = evaluate(model, PROMPTS, [LeaveOneOut("mean")], perturbation)
    assert len(calls) > 6
    assert results.value.tolist() == pytest.approx(alone.value.tolist(), abs=1e-9)


def test_a_mean_of_the_users_is_not_the_evaluations(model: Any) -> None:
    """What leaving one token out does is measured anew unless a scope has replaced by just the same."""
    perturbation = Perturbation(("mean",), (0.5,), samples=0, randomise=False)

    class Doubled(LeaveOneOut):
        def measure(self, lin: tls.Linearization) -> tls.Measurement:
            return tls.Measurement(2 * super().measure(lin).scores)

    beside = [LeaveOneOut("mean", mean=torch.ones(zoo.WIDTH)), Doubled("mean"), LeaveOneOut("mean")]
    alone = evaluate(model, PROMPTS, {"one": Fixed()}, perturbation)
    for other in beside:
        both = evaluate(model, PROMPTS, {"other": other, "one": Fixed()}, perturbation)
        own = both[both.scope == "one"].value
        assert own.tolist() == pytest.approx(alone.value.tolist(), abs=1e-9, nan_ok=True)


def test_what_is_around_a_scope_asks_for_what_it_asks(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean embedding is handed through, and is the one that would be computed."""
    mean, calls = models.mean_embedding(model, len(PROMPT)), []
    lin = tls.linearize(model, PROMPT)
    around = [
        lambda scope: tls.PositionCorrectedScope(scope, shuffles=2),
        tls.FrozenAttentionScope,
        tls.UnderRulesScope,
        lambda scope: tls.FrozenAttentionScope(tls.PositionCorrectedScope(scope, shuffles=2)),
    ]
    expected = [of(LeaveOneOut("mean"))(lin).scores for of in around]
    monkeypatch.setattr(models, "mean_embedding", lambda *arguments: calls.append(0))
    for of, scores in zip(around, expected, strict=True):
        assert of(LeaveOneOut("mean")).asks_for_mean
        assert not of(LeaveOneOut()).asks_for_mean
        handed = of(LeaveOneOut("mean")).with_mean(mean)
        assert not handed.asks_for_mean
        assert_close(handed(lin).scores, scores)
        same = of(tls.SemanticScope(TARGET))
        assert same.with_mean(mean) == same
    assert not calls


def test_everything_is_replaced_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The soft measures take it from the hard ones."""
    seen: list[Tensor] = []
    effects = Removal.effects
    monkeypatch.setattr(Removal, "effects", lambda self, kept, ids: seen.append(kept) or effects(self, kept, ids))
    evaluate(model, [PROMPT], [Fixed(), tls.FisherScope()], Perturbation(("zero",), (0.5,), samples=3, randomise=False))
    assert sum(int((~kept).flatten(1).all(1).sum()) for kept in seen) == 1


def test_the_model_is_left_as_found(model: Any) -> None:
    with unchanged(model):
        evaluate(model, PROMPTS, [tls.SemanticScope(), RandomBaseline(), LeaveOneOut()], SHORT)


def test_bos_is_set_aside(tiny: Any) -> None:
    """BOS is neither ranked nor replaced, unless asked for."""
    prompts, text = ["The keys to the old doors", "The wheel of the car in the park"], "The keys"
    perturbation = {"replacements": ("zero",), "fractions": (0.2,), "samples": 0, "randomise": False}
    lin = tls.linearize(tiny, prompts[0])
    assert candidates(tiny, lin.tokens, bos=False) == [1, 2, 3, 4, 5, 6]
    assert candidates(tiny, lin.tokens, bos=True) == [0, 1, 2, 3, 4, 5, 6]
    assert candidates(tiny, tls.linearize(tiny, text, prepend_bos=False).tokens, bos=False) == [0, 1]
    everything = {}
    for bos in (False, True):
        results = evaluate(tiny, prompts, [RandomBaseline()], Perturbation(bos=bos, **perturbation))  # type: ignore[arg-type]
        last = results[(results.measure == "deletion") & (results.quantity == "log_prob") & (results.fraction == 1)]
        everything[bos] = last.value.tolist()[0]
        gone = lin.embeddings.clone()
        gone[int(not bos) :] = 0
        drop = (lin.log_probs - lin.at(gone).log_probs)[lin.token().id]
        assert everything[bos] == pytest.approx(float(drop), abs=1e-4)
    assert everything[False] != everything[True]


def test_resampled_tokens_come_from_other_prompts() -> None:
    """They never come from the prompt itself, and another seed draws others."""
    model = zoo.specimen("bridge llama").model
    prompts = {0: torch.tensor([1, 2, 3]), 3: torch.tensor([4, 5]), 4: torch.tensor([6])}
    lin = tls.linearize(model, prompts[0])
    substitutes = Substitutes.of(model, SHORT, prompts)
    table = substitutes.model.embed(torch.arange(zoo.VOCAB)[None])[0].detach()
    drawn = set()
    for seed in range(20):
        found = [substitutes(lin, "resample", 0, torch.Generator().manual_seed(seed)) for _ in range(2)]
        assert torch.equal(*found)
        drawn |= {int((table - row).norm(dim=-1).argmin()) for row in found[0]}
    assert drawn == {4, 5, 6}


# -- statistics -------------------------------------------------------------------------------------------------------


def table(values: dict[str, list[float]]) -> pd.DataFrame:
    rows = [(i, scope, "m", v) for scope, column in values.items() for i, v in enumerate(column)]
    return pd.DataFrame(rows, columns=["prompt", "scope", "measure", "value"])


def test_bootstrap_intervals_are_honest() -> None:
    """A 90% interval of the mean holds the true mean in about 90% of experiments."""
    experiments = torch.rand(40, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 2
    mean, low, high, prompts = bootstrap(experiments, 0.9, 1000, 0)
    assert set(prompts.tolist()) == {40}
    assert_close(mean, experiments.mean(0))
    assert 0.85 < ((low < 1 / 3) & (high > 1 / 3)).double().mean() < 0.95


def test_differences_are_paired() -> None:
    """What all prompts share does not matter: a constant lead is certain, however much prompts differ."""
    base = [0.0, 10.0, 20.0, 35.0]
    found = differences(table({"a": base, "b": [v + 1 for v in base], "c": base}), "a")
    assert found[["scope", "difference", "low", "high", "prompts"]].values.tolist() == [
        ["b", 1, 1, 1, 4],
        ["c", 0, 0, 0, 4],
    ]
    wide = summary(table({"a": base}))
    assert wide["mean"].tolist() == [16.25]
    assert wide["low"].item() < 10 < 25 < wide["high"].item()


@pytest.mark.parametrize("missing", [math.nan, math.inf, -math.inf])
def test_missing_numbers_do_not_count(missing: float) -> None:
    """Means, intervals, counts and differences are what they would be without NaN and infinities."""
    holes = table({"a": [1.0, missing, 3.0], "b": [missing] * 3, "c": [2.0, 5.0, 9.0]})
    found, without = summary(holes), summary(holes[(holes.prompt != 1) & (holes.scope != "b")])
    assert found["prompts"].tolist() == [2, 0, 3]
    assert found[["mean", "low", "high"]].isna().values.tolist() == [[False] * 3, [True] * 3, [False] * 3]
    assert found["mean"][0] == without["mean"][0] == 2
    assert 1 <= found["low"][0] <= found["high"][0] <= 3
    lead = differences(holes, "c")
    assert lead[["difference", "prompts"]].values.tolist()[0] == [-3.5, 2]
    assert math.isnan(lead["difference"][1])
    assert lead["prompts"][1] == 0
    assert -6 <= lead["low"][0] <= lead["high"][0] <= -1


def test_summary_of_an_evaluation(model: Any) -> None:
    """It has one row per scope, replacement and measure, in order, whatever the columns hold."""
    results = evaluate(model, PROMPTS, [Fixed(), tls.SemanticScope()], SHORT)
    found = summary(results)
    keys = ["scope", "replacement", "measure", "quantity", "fraction"]
    expected = results.groupby(keys, sort=False, dropna=False).value.mean().reset_index()
    pd.testing.assert_frame_equal(found[keys], expected[keys])
    assert found["mean"].tolist() == pytest.approx(expected.value.tolist(), nan_ok=True)
    assert (found.low <= found["mean"] + 1e-12).all()
    lead = differences(results, "Fixed()")
    assert set(lead.scope) == {"SemanticScope()"}
    assert len(lead) * 2 == len(found)


def test_plot(model: Any) -> None:
    """There is a curve per scope, through its means."""
    results = evaluate(model, PROMPTS, [Fixed(), tls.SemanticScope()], SHORT)
    figure = plot(results, "zero", "kl")
    found = summary(results[(results.replacement == "zero") & (results.quantity == "kl")])
    for axes, measure in zip(figure.axes, ("deletion", "insertion"), strict=True):
        for line, scope in zip(axes.lines, ("Fixed()", "SemanticScope()"), strict=True):
            rows = found[(found.scope == scope) & (found.measure == measure)]
            assert line.get_ydata().tolist() == rows["mean"].tolist()
            assert line.get_label().startswith(scope)


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_what_is_compared_is_measured(tmp_path: Path) -> None:
    """Log-odds are against a scope's own `versus`, or else the prompt's foil; without either there are none."""
    model, perturbation = (
        zoo.specimen("bridge llama").model,
        Perturbation(("zero",), (0.5,), samples=0, randomise=False),
    )
    scopes = {"own": tls.SemanticScope(TARGET, versus=FOIL), "plain": tls.SemanticScope(TARGET), "random": Fixed()}
    file = tmp_path / "results.jsonl"

    def whole(**options: Any) -> dict[str, list[float]]:
        results = evaluate(model, PROMPTS, scopes, perturbation, targets=[TARGET] * 3, path=file, **options)
        rows = results[(results.measure == "deletion") & (results.quantity == "log_odds") & (results.fraction == 1)]
        return {name: rows[rows.scope == name].value.tolist() for name in scopes}

    alone = whole()
    assert len(alone["own"]) == 3
    assert alone["plain"] == alone["random"] == []
    with pytest.raises(ValueError, match="prompt 0, or its target, is not the one"):
        whole(foils=[FOIL] * 3)
    file.unlink()
    same = whole(foils=[FOIL] * 3)
    assert same["own"] == same["plain"] == same["random"] == alone["own"]
    file.unlink()
    other = whole(foils=[None, 3, np.int64(3)])
    assert other["own"] == alone["own"]
    assert len(other["plain"]) == 2
    assert other["plain"] != alone["own"][1:]
    plot(evaluate(model, PROMPTS, scopes, perturbation, foils=[3] * 3), quantity="log_odds")
    with pytest.raises(ValueError, match=r"the foil '<\d+>' is the target of plain itself: their difference is zero"):
        evaluate(model, PROMPTS, scopes, perturbation, foils=[TARGET] * 3)


@pytest.mark.filterwarnings("error:prompt 0 has no answer")
@pytest.mark.parametrize(
    ("length", "given", "advice"),
    [
        (4, None, ["replacements"]),
        (2, None, ["fractions", "replacements"]),
        (4, Perturbation(fractions=(0.05, 0.5)), ["fractions", "replacements"]),
    ],
)
def test_advice_that_works(length: int, given: Perturbation | None, advice: list[str]) -> None:
    """With one short prompt and next to no other argument, each error says what to pass, and in the end it works.

    It is said once: nothing is warned of where the error follows.
    """
    model, perturbation = zoo.specimen("bridge llama").model, given
    for expected in advice:
        with pytest.raises(ValueError, match=rf"Perturbation\(.*{expected}=") as caught:
            evaluate(model, [PROMPT[:length]], [Fixed()], perturbation)
        perturbation = eval(re.search(r"Perturbation\(.*\)\)", str(caught.value))[0])  # type: ignore[index]
    assert len(evaluate(model, [PROMPT[:length]], [Fixed()], perturbation))


@pytest.mark.filterwarnings("error")
def test_of_a_single_prompt_the_error_alone_is_told() -> None:
    model = zoo.specimen("bridge llama").model
    for ask in (
        lambda: evaluate(model, [[99]], [Fixed()], Perturbation(("zero",))),
        lambda: list(tls.attribute_many(model, [[99]], Fixed())),
    ):
        with pytest.raises(ValueError, match="token id 99 is outside the vocabulary"):
            ask()


@pytest.mark.parametrize("tokens", [3, 4, 5, 9, 10, 11])
def test_the_default_fractions_of_a_short_prompt(tokens: int) -> None:
    """They are those that stand for a token, and the numbers are those that they would have if they were given."""
    chosen = Perturbation().shares(tokens)
    assert chosen == tuple(f for f in (0.05, 0.1, 0.2) if f * tokens >= 0.5)
    model, prompt = zoo.specimen("bridge llama").model, [*PROMPT, 3, 4, 6][:tokens]
    options = {"steps": 4, "samples": 0, "randomise": False}
    by_itself, given = (
        evaluate(model, [prompt], [Fixed()], Perturbation(("zero",), fractions, **options))
        for fractions in (None, chosen)
    )
    pd.testing.assert_frame_equal(by_itself, given, check_exact=True)
    for fraction in {0.05, 0.1, 0.2} - {*chosen}:
        assert not (by_itself.fraction == fraction).any()
        with pytest.raises(ValueError, match=f"{100 * fraction:g}% of them is less than half a token"):
            evaluate(model, [prompt], [Fixed()], Perturbation(("zero",), (fraction,), **options))


def test_default_fractions_in_a_file(tmp_path: Path) -> None:
    """They are known by their numbers, so that a file of the same ones written out goes on."""
    model, path = zoo.specimen("bridge llama").model, tmp_path / "results.jsonl"
    options = {"steps": 2, "samples": 0, "randomise": False}
    prompt = [*PROMPT, 3, 4, 6]
    given = evaluate(model, [prompt], [Fixed()], Perturbation(("zero",), (0.05, 0.1, 0.2), **options), path=path)
    again = evaluate(model, [prompt], [scope := Fixed()], Perturbation(("zero",), **options), path=path)
    pd.testing.assert_frame_equal(again, given, check_exact=True)
    assert not scope.asked


def test_a_summary_is_not_drawn(no_type_checks: None) -> None:
    results = evaluate(zoo.specimen("bridge llama").model, PROMPTS, [Fixed()], Perturbation(("zero",), (0.5,)))
    with pytest.raises(ValueError, match="no curves among these results: take what evaluate returned"):
        plot(summary(results))


def test_bad_input(no_type_checks: None, tmp_path: Path) -> None:
    model, scopes = zoo.specimen("bridge llama").model, [Fixed()]
    zero = Perturbation(("zero",), (0.5,))
    for arguments, error, message in [
        (([], scopes), ValueError, "there are no prompts to evaluate on"),
        (("one text", scopes), TypeError, "prompts are several, texts or lists of token ids, got str: give a list"),
        ((PROMPTS, scopes, {"steps": 3}), TypeError, r"perturbation is a Perturbation, such as .*, got \{'steps': 3\}"),
        ((PROMPTS, []), ValueError, "there are no scopes to evaluate"),
        ((PROMPTS, [tls.SemanticScope]), TypeError, r"got <class .*SemanticScope'>: write SemanticScope\(\)"),
        ((PROMPTS, [Fixed(), Fixed()]), ValueError, "there are 2 scopes and 1 names: name them, in a dict"),
        (
            ([PROMPT], scopes, Perturbation(fractions=(0.5,))),
            ValueError,
            '"resample" takes tokens of other prompts, and',
        ),
        ((PROMPTS, scopes, Perturbation(("pad",), (0.5,))), ValueError, "the model has no padding token"),
    ]:
        with pytest.raises(error, match=message):
            evaluate(model, *arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one foil per prompt: got 1 for 3 prompts"):
        evaluate(model, PROMPTS, scopes, zero, foils=[1])
    with pytest.raises(ValueError, match="one target per prompt: got 2 for 3 prompts"):
        evaluate(model, PROMPTS, scopes, zero, targets=[1, 2])
    with pytest.raises(TypeError, match="targets are one per prompt, got 'abc': give a list"):
        evaluate(model, PROMPTS, scopes, zero, targets="abc")
    with pytest.raises(ValueError, match="is a folder: give the path of a file in it"):
        evaluate(model, PROMPTS, scopes, zero, path=tmp_path)
    with pytest.raises(TypeError, match="targets are one per prompt, got {0: 1}: give a list"):
        evaluate(model, PROMPTS, scopes, zero, targets={0: 1})
    with pytest.raises(TypeError, match="foils are one per prompt, got 3: give a list"):
        evaluate(model, PROMPTS, scopes, zero, foils=3)
    with pytest.raises(ValueError, match='on_error is "warn" or "raise", got \'skip\''):
        evaluate(model, PROMPTS, scopes, zero, on_error="skip")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="there is no folder '.*nowhere' to put 'results.jsonl' into: make it first"):
        evaluate(model, PROMPTS, scopes, zero, path=tmp_path / "nowhere" / "results.jsonl")


def test_bad_perturbations(no_type_checks: None) -> None:
    """Bad arguments are refused by name; numbers and flags of NumPy's are taken for what they are."""
    made = {"seed": np.int64(3), "bos": np.True_, "steps": np.int32(4), "fractions": (np.float64(0.2), torch.tensor(1))}
    assert repr(Perturbation(**made)) == "Perturbation(fractions=(0.2, 1.0), steps=4, bos=True, seed=3)"
    for options, message in [
        ({"seed": 0.5}, "seed must be an integer, got 0.5"),
        ({"bos": "no"}, "bos is True or False, got 'no'"),
        ({"bos": 0}, "bos is True or False, got 0"),
        ({"randomise": "no"}, "randomise is True or False, got 'no'"),
        ({"randomise": None}, "randomise is True or False, got None"),
        ({"fractions": ("0.2",)}, "a fraction of the tokens is a number between 0 and 1, got '0.2'"),
        ({"fractions": (0.2, True)}, "a fraction of the tokens is a number between 0 and 1, got True"),
        ({"fractions": (torch.ones(2),)}, "a fraction of the tokens is a number between 0 and 1, got tensor"),
        ({"steps": "10"}, "steps must be at least 1, and an integer, got '10'"),
        ({"steps": True}, "steps must be at least 1, and an integer, got True"),
        ({"samples": 1.5}, "samples must be at least 0, and an integer, got 1.5"),
        ({"cascade": 0.5}, r"cascade is a tuple of shares of the blocks, such as \(0.25, 0.5, 1.0\), got 0.5"),
        ({"cascade": ("half",)}, "cascade is a tuple of shares of the blocks, .*, got 'half'"),
    ]:
        with pytest.raises(TypeError, match=message):
            Perturbation(**options)  # type: ignore[arg-type]
    for options, message in [
        ({"replacements": ("noise",)}, "no replacement 'noise': choose from 'zero', 'mean', 'pad', 'resample'"),
        ({"replacements": ()}, "replacements are given as a tuple of at least one"),
        ({"replacements": "zero"}, "replacements are given as a tuple of at least one, got 'zero'"),
        ({"fractions": (0.0, 0.5)}, "a fraction of the tokens is a number between 0 and 1, got 0.0"),
        ({"fractions": (math.nan,)}, "a fraction of the tokens is a number between 0 and 1, got nan"),
        ({"replacements": ("zero", "mean", "zero")}, "each replacement is given once, got .'zero', 'mean', 'zero'."),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"samples": -1}, "samples must be at least 0, got -1"),
        ({"cascade": (0.5, 1.5)}, "cascade is a tuple of shares of the blocks, .*, got 1.5"),
    ]:
        with pytest.raises(ValueError, match=message):
            Perturbation(**options)  # type: ignore[arg-type]


def test_statistics_refuse(no_type_checks: None) -> None:
    results = table({"a": [1.0, 2.0]})
    with pytest.raises(ValueError, match="an empty table has no mean"):
        summary(results[:0])
    with pytest.raises(ValueError, match="a confidence is a number between 0 and 1, got 95"):
        summary(results, confidence=95)
    with pytest.raises(TypeError, match="a confidence is a number between 0 and 1, got '0.9'"):
        summary(results, confidence="0.9")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="resamples must be at least 1, got 0"):
        differences(results, "a", resamples=0)
    with pytest.raises(TypeError, match="seed must be an integer, got 'x'"):
        differences(results, "a", seed="x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no scope 'b' among 'a'"):
        differences(results, "b")
    with pytest.raises(ValueError, match="an empty table has no mean"):
        differences(pd.DataFrame(), "a")
    with pytest.raises(ValueError, match="two results of the same scope, measure and prompt"):
        summary(pd.concat([results, results]))
    drawn = results.assign(replacement="zero", quantity="kl", fraction=0.0, measure="deletion")
    with pytest.raises(ValueError, match="no curves of 'kl' with the replacement 'pad': the replacements are 'zero'"):
        plot(drawn, "pad", "kl")
    with pytest.raises(ValueError, match="steep has no 'deletion area' among these"):
        plot(drawn.assign(scope="steep"), quantity="kl")
    with pytest.raises(ValueError, match="there are no curves among these results: take what evaluate returned"):
        plot(results)
    with pytest.raises(ValueError, match="nothing to compare 'a' with: results of another scope, .* scopes are 'a'"):
        differences(results, "a")
    apart = pd.concat([results, results.assign(scope="b", measure="other")])
    with pytest.raises(ValueError, match="a measure that both have, are missing; the scopes are 'a', 'b'"):
        differences(apart, "a")
