"""Fisher Scope from fewer backward passes than the readout has dimensions."""

import sys
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import tl_scopes as tls
from tests import zoo
from tests.zoo import PROMPT, Specimen
from tl_scopes import models
from tl_scopes.jacobian import fisher_information as fisher_information_module
from tl_scopes.jacobian import pullback, randomness
from tl_scopes.jacobian.fisher_information import (
    fisher_information,
    fisher_root,
    leading_part,
    pulled_further,
    remainder_probes,
)
from tl_scopes.jacobian.randomness import raised
from tl_scopes.scopes import fisher
from tl_scopes.scopes.fisher import Draws
from tl_scopes.tiny.tasks import examples

EXACT = {"rtol": 1e-9, "atol": 1e-12}


@pytest.fixture
def lin(specimen: Specimen) -> tls.Linearization:
    return tls.linearize(specimen.model, PROMPT)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sure(scale: float) -> tls.Linearization:
    """A prediction with few likely tokens."""
    model = zoo.SPECIES["native no norm"]().model
    with torch.no_grad():
        model.original_model.head.weight.mul_(scale)
    return tls.linearize(model, PROMPT)


# -- the whole of F ---------------------------------------------------------------------------------------------------


def test_root(lin: tls.Linearization) -> None:
    """RᵀR = F."""
    root = fisher_root(lin)
    assert_close(root.T @ root, fisher_information(lin), **EXACT)


@pytest.mark.parametrize("scale", [6.0, 10.0])
def test_root_of_a_sure_prediction(scale: float) -> None:
    """From the few likely tokens, without a product per dimension: the same F, and fewer directions."""
    lin = sure(scale)
    root = fisher_root(lin)
    fisher = fisher_information(lin)
    assert_close(root.T @ root, fisher, rtol=1e-8, atol=1e-10 * float(fisher.diagonal().sum()))
    assert len(root) < 16
    exact, answer = tls.FisherScope(exact=True)(lin), tls.FisherScope(probes=15)(lin)
    assert answer.backward_passes == exact.backward_passes == len(root)
    assert_close(answer.scores, exact.scores, **EXACT)
    assert not answer.standard_error.any()


def test_repeated_directions_cost_nothing() -> None:
    """A rank-deficient unembedding has as many directions as its rank."""
    model = zoo.SPECIES["bridge llama"]().model
    with torch.no_grad(), zoo.Float64():
        weight = model.original_model.lm_head.weight
        weight[:, 4:] = 0
        answer = tls.FisherScope(exact=True)(tls.linearize(model, PROMPT))
    assert answer.backward_passes == 4


def test_leading_directions_without_all_of_them(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the readout has many dimensions, the leading ones are found without the others, to the same scores."""
    prompts = ["The keys to the old cabinet near the door", "German: Der Hund schläft. English:"]
    lins = [tls.linearize(tiny, prompt) for prompt in prompts]
    assert all(fisher_information_module.leading_root(lin, 3) is not None for lin in lins)
    found = [tls.FisherScope(rank=3)(lin) for lin in lins]
    monkeypatch.setattr(fisher_information_module, "leading_root", lambda lin, count: None)
    for answer, lin in zip(found, lins, strict=True):
        whole = tls.FisherScope(rank=3)(lin)
        assert_close(answer.scores, whole.scores, rtol=1e-4, atol=1e-6 * float(whole.scores.max()))
        assert answer.trace_share == pytest.approx(whole.trace_share, rel=1e-5)
        assert answer.score_share == pytest.approx(whole.score_share, rel=0.25)
        assert answer.backward_passes == whole.backward_passes == 3 + 8


def test_trace(lin: tls.Linearization, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trace of F from the weights of the unembedding is that of F, and that by products where these say nothing."""
    assert models.unembedding(lin.model, lin.trace, lin.row) is not None
    expected = float(fisher_information(lin).trace())
    assert fisher_information_module.fisher_trace(lin) == pytest.approx(expected, rel=1e-9)
    monkeypatch.setattr(models, "unembedding", lambda model, trace, row: None)
    assert fisher_information_module.fisher_trace(lin) == pytest.approx(expected, rel=1e-9)


def test_the_weights_of_the_unembedding_do_not_say_what_a_hook_does(tiny: Any) -> None:
    """Under a hook that changes the logits the trace is found by products, which go through it."""
    lin = tls.linearize(tiny, PROMPT)
    with tiny.hooks([("unembed.hook_out", lambda logits, hook: 2 * logits)]):
        doubled = tls.linearize(tiny, PROMPT)
        assert models.unembedding(tiny, doubled.trace, doubled.row) is None
        expected = float(fisher_information(doubled).trace())
        assert fisher_information_module.fisher_trace(doubled) == pytest.approx(expected, rel=1e-4)
    assert models.unembedding(tiny, lin.trace, lin.row) is not None


def test_rank(lin: tls.Linearization) -> None:
    """Truncation grows with the rank, holds the shares it says, and is exact at full rank."""
    exact = tls.FisherScope(exact=True)(lin)
    answers = [tls.FisherScope(rank=k)(lin) for k in (1, 4, 15, 16)]
    for fewer, more in pairwise(answers):
        assert (fewer.scores <= more.scores + 1e-12).all()
        assert fewer.trace_share <= more.trace_share + 1e-12
    assert_close(answers[-1].scores, exact.scores, **EXACT)
    assert answers[-1].trace_share == pytest.approx(1)
    assert answers[-1].score_share == 1
    shares = [float(answer.scores.sum() / exact.scores.sum()) for answer in answers]
    assert answers[2].score_share == pytest.approx(shares[2])  # what is left is so little that all of it is taken
    drawn = [tls.FisherScope(rank=4, generator=generator(seed))(lin).score_share for seed in range(20)]
    assert torch.tensor(drawn).mean() == pytest.approx(shares[1], rel=0.15)
    eigenvalues = torch.linalg.eigvalsh(fisher_information(lin))
    assert answers[0].trace_share == pytest.approx(float(eigenvalues[-1] / eigenvalues.sum()))
    assert answers[0].backward_passes == 1 + 8
    with pytest.raises(AttributeError, match=r"FisherScope\(rank=1\) has no 'standard_error'; the details"):
        _ = answers[0].standard_error  # a truncation is biased: its error is not a matter of chance


# -- estimates --------------------------------------------------------------------------------------------------------


def test_leading_part_leaves_a_remainder(lin: tls.Linearization) -> None:
    """F − LᵀL is positive and does not see Q; with all directions nothing is left."""
    fisher = fisher_information(lin)
    part = leading_part(lin, 5, generator())
    remainder = fisher - part.L.T @ part.L
    assert torch.linalg.eigvalsh(remainder).min() > -1e-10 * fisher.diagonal().sum()
    assert_close(part.Q @ remainder, torch.zeros_like(part.Q), rtol=0, atol=1e-10)
    best = torch.linalg.eigvalsh(fisher)[:-5].sum()
    assert remainder.diagonal().sum() <= 1.2 * best + 1e-12


def test_probes_have_the_remainder_for_covariance(lin: tls.Linearization) -> None:
    """E[v vᵀ] = F − LᵀL, so the estimate is unbiased whatever Q is."""
    part = leading_part(lin, 2, generator())
    v = remainder_probes(lin, 20_000, part, generator(1))
    remainder = fisher_information(lin) - part.L.T @ part.L
    assert (v.T @ v / len(v) - remainder).norm() < 0.05 * remainder.norm()


def test_the_same_question_has_the_same_answer(lin: tls.Linearization) -> None:
    """Without a generator, and without touching torch's own; with one, draws go on."""
    state = torch.get_rng_state()
    scope = tls.FisherScope(probes=8)
    assert_close(scope(lin).scores, scope(lin).scores, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    scope = tls.FisherScope(probes=8, generator=generator())
    assert not torch.equal(scope(lin).scores, scope(lin).scores)


@pytest.mark.parametrize("scope", [tls.FisherScope(probes=8), tls.SpectralScope(rank=2), tls.HetaScope(3, probes=1)])
def test_random_numbers_belong_to_the_prompt(scope: tls.Scope, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same for all, errors of similar prompts went together, and the mean over a corpus kept them."""
    drawn: dict[tuple[int, ...], list[int]] = {}

    def watch(lin: tls.Linearization, *given: Any) -> torch.Generator:
        source = randomness.source(lin, *given)
        drawn.setdefault(tuple(lin.tokens.tolist()), []).append(source.initial_seed())
        return source

    monkeypatch.setattr(sys.modules[type(scope).__module__], "source", watch)
    model, prompts = zoo.specimen("bridge llama").model, [PROMPT, [*PROMPT[:-1], 1], PROMPT[:4]]
    for prompt in prompts:
        tls.attribute(model, prompt, scope)
    list(tls.attribute_many(model, prompts, scope))
    assert [len(set(drawn[tuple(prompt)])) for prompt in prompts] == [1, 1, 1]
    assert len({drawn[tuple(prompt)][0] for prompt in prompts}) == 3
    drawn.clear()
    tls.attribution_map(model, PROMPT, scope)
    assert len({seed for seeds in drawn.values() for seed in seeds}) == len(PROMPT)


def test_errors_of_similar_prompts_are_unrelated(tiny: Any) -> None:
    """Prompts of one sentence's words: in the mean over them errors cancel as 1/√n."""
    errors = []
    for noun, adjective, thing, place in product(("keys", "doors"), ("old", "red"), ("cabinet", "box"), ("door",)):
        lin = tls.linearize(tiny, f"The {noun} to the {adjective} {thing} near the {place}")
        exact = tls.FisherScope(exact=True)(lin).scores
        errors.append((tls.FisherScope(probes=8)(lin).scores - exact) / exact.sum())
    found = torch.stack([error[-7:] for error in errors])
    assert found.mean(0).norm() < 0.6 * found.norm(dim=1).mean()


def test_as_many_probes_as_dimensions_are_exact(lin: tls.Linearization) -> None:
    answer = tls.FisherScope(probes=16)(lin)
    assert_close(answer.scores, tls.FisherScope(exact=True)(lin).scores, **EXACT)
    assert_close(tls.FisherScope()(lin).scores, answer.scores, **EXACT)


@pytest.mark.parametrize(("probes", "known"), [(1, False), (3, False), (5, False), (8, False), (23, False), (24, True)])
def test_few_probes(tiny: Any, probes: int, known: bool) -> None:
    """From a few draws nothing can be said about the error."""
    lin = tls.linearize(tiny, examples("agreement", 1)[0].prompt)
    answer = tls.FisherScope(probes=probes)(lin)
    assert answer.backward_passes == probes
    assert bool(answer.standard_error.isfinite().all()) == known


TASKS = ["agreement", "inference_what", "translation", "logistic", "association"]


def dense(monkeypatch: pytest.MonkeyPatch, lin: tls.Linearization) -> None:
    """From here on all passes through the network are products with its Jacobian, which is faster for many draws."""
    J = lin.as_matrix().double()

    def vjps(lins: Any, cotangents: Any) -> list[Tensor]:
        return [torch.einsum("pk,ktd->ptd", c.double(), J) for c in cotangents]

    monkeypatch.setattr(fisher, "vjps", vjps)
    monkeypatch.setattr(
        fisher, "squared_norms", lambda lins, cotangents: [c.square().sum(-1) for c in vjps(lins, cotangents)]
    )
    monkeypatch.setattr(
        fisher_information_module,
        "jvps",
        lambda lins, tangents: [torch.einsum("ktd,ptd->pk", J, t.double()) for t in tangents],
    )


def drawn_often(lin: tls.Linearization, passes: int, often: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    """Estimates from so many passes, their standard errors, and the exact scores."""
    exact = tls.FisherScope(exact=True)(lin).scores.double()
    answer = tls.FisherScope(probes=passes, generator=generator(0))(lin)
    with pytest.MonkeyPatch.context() as monkeypatch:
        dense(monkeypatch, lin)
        answers = [tls.FisherScope(probes=passes, generator=generator(seed))(lin) for seed in range(often)]
    scores, errors = (
        torch.stack([getattr(each, name) for each in answers]).double() for name in ("scores", "standard_error")
    )
    assert_close(answer.scores.double(), scores[0], rtol=1e-3, atol=1e-3 * float(exact.mean()))
    assert_close(answer.standard_error.double(), errors[0], rtol=1e-2, atol=1e-3 * float(exact.mean()))
    return scores, errors, exact


@pytest.mark.parametrize("task", TASKS)
def test_thirty_two_probes_are_enough(tiny: Any, task: str) -> None:
    """Over 200 seeds a prompt's scores are missed by less than 3% of their sum in the mean, as the docstring says, and
    (estimate − exact) / standard error is centred and has a standard deviation near 1."""
    scores, errors, exact = drawn_often(tls.linearize(tiny, examples(task, 1)[0].prompt), 32)
    assert ((scores - exact).abs().sum(-1) / exact.sum()).mean() < 0.03
    z = (scores - exact) / errors
    assert 0.8 < z.std() < 1.25
    assert abs(z.mean(0)).mean() < 0.25


@pytest.mark.parametrize("passes", [24, 64])
@pytest.mark.parametrize("task", ["agreement", "logistic"])
def test_the_standard_error_is_honest_at_every_budget(tiny: Any, task: str, passes: int) -> None:
    scores, errors, exact = drawn_often(tls.linearize(tiny, examples(task, 1)[0].prompt), passes, 60)
    assert 0.8 < ((scores - exact) / errors).std() < 1.25


def test_to_a_tolerance(tiny: Any) -> None:
    """Probes are added until the error of the tokens that matter is small enough; where it is at once, none are."""
    lin = tls.linearize(tiny, examples("logistic", 1)[0].prompt)
    loose = tls.FisherScope(rtol=0.5)(lin)
    matter = loose.scores >= loose.scores.mean()
    rtol = float((loose.standard_error / loose.scores)[matter].max()) / 1.5
    tight = tls.FisherScope(rtol=rtol)(lin)
    assert loose.backward_passes == 32 < tight.backward_passes < 128
    assert (tight.standard_error <= rtol * tight.scores)[matter].all()


def test_a_tolerance_out_of_reach(tiny: Any) -> None:
    """What would take more than the exact answer stops there, and says so."""
    lin = tls.linearize(tiny, examples("logistic", 1)[0].prompt)
    with pytest.warns(UserWarning, match=r"relative standard error is .*% after 128 backward passes, not the rtol of"):
        answer = tls.FisherScope(rtol=1e-6)(lin)
    assert answer.backward_passes == 128


def test_a_sure_prediction_meets_any_tolerance() -> None:
    lin = sure(10.0)
    answer = tls.FisherScope(rtol=1e-9)(lin)
    assert_close(answer.scores, tls.FisherScope(exact=True)(lin).scores, **EXACT)


def test_a_leading_direction_is_known_up_to_rounding(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products with F that are off by 1e-5, as with a large vocabulary in float32, do not keep it from ending."""
    lin = tls.linearize(tiny, examples("agreement", 1)[0].prompt)
    exact = fisher_root(lin)[0]
    d = len(exact)
    wrong = torch.randn(d, d, generator=generator(), dtype=torch.float64) * 1e-5 * float(exact.square().sum()) / d**0.5
    products, count = fisher_information_module.fisher_products, 0

    def rounded(lin: tls.Linearization, tangents: Tensor) -> Tensor:
        nonlocal count
        count += len(tangents)
        return products(lin, tangents) + tangents @ wrong

    monkeypatch.setattr(fisher_information_module, "fisher_products", rounded)
    found = fisher_information_module.leading_root(lin, 1)
    assert found is not None
    assert count < 40
    ((root,), _) = found
    assert_close(root * (root @ exact).sign(), exact, rtol=0, atol=1e-4 * float(exact.norm()))


# -- the sketch -------------------------------------------------------------------------------------------------------


def test_the_sketch_adds_directions(tiny: Any) -> None:
    """All of them are orthonormal to F, and those that J Jᵀ shows are new: tests/real tells what they hold."""
    lin = tls.linearize(tiny, examples("agreement", 1)[0].prompt)
    part = leading_part(lin, 4, generator())
    (further,) = pulled_further([lin], [part], [lin.vjp(part.L)])
    both = part.and_also(further)
    assert_close(both.Q @ both.L.T, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-5)
    assert_close(fisher_information(lin) @ both.Q.T, both.L.T, rtol=0, atol=1e-5 * float(both.L.abs().max()))


def test_a_kernel_without_second_derivative(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The leading directions of F take the place of those that the kernel cannot show."""

    def refuse(*given: Any) -> None:
        raise pullback.NoSecondDerivativeError("this kernel cannot be differentiated twice")

    lin = tls.linearize(tiny, examples("agreement", 1)[0].prompt)
    monkeypatch.setattr(fisher_information_module, "jvps", refuse)
    answer = tls.FisherScope()(lin)
    assert answer.backward_passes == 32
    assert ((answer.scores - tls.FisherScope(exact=True)(lin).scores) / answer.standard_error).abs().max() < 6


def test_batches_and_maps_draw_as_one_prompt_does(tiny: Any) -> None:
    """Sketches and draws of several prompts, and of several positions of one, do not mix."""
    prompts = ["The keys to the old cabinet near the door", "The dog"]
    for prompt, answer in zip(prompts, tls.attribute_many(tiny, prompts, tls.FisherScope()), strict=True):
        alone = tls.attribute(tiny, prompt, tls.FisherScope())
        assert_close(answer.scores, alone.scores, rtol=1e-3, atol=1e-4 * float(alone.scores.sum()))
    found = tls.attribution_map(tiny, prompts[0], tls.FisherScope())
    alone = tls.attribute(tiny, prompts[0], tls.FisherScope(), 6)
    assert_close(found[6].scores, alone.scores, rtol=1e-3, atol=1e-4 * float(alone.scores.sum()))


@pytest.mark.parametrize("draws", [6, 12, 40])
def test_a_raised_error_is_honest(draws: int) -> None:
    """The mean of a few normal numbers is off by 1 in units of its own standard error, root mean square."""
    drawn = torch.randn(200_000, draws, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    off = drawn.mean(1) / (drawn.std(1) / draws**0.5)
    assert off.square().mean().sqrt() / raised(draws) == pytest.approx(1, abs=0.02)
    assert off.square().mean().sqrt() > 1.02


def test_the_error_of_random_signs_is_bounded() -> None:
    """2 tr A² is above the variance 2 (tr A² − Σ A_ii²) of εᵀAε, over all signs ε; draws tell it from their pairs."""
    J = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    signs = torch.cartesian_prod(*[torch.tensor([1.0, -1.0], dtype=torch.float64)] * 6)
    A = J @ J.T
    forms = (signs @ J).square().sum(-1)
    bound = 2 * A.square().sum()
    assert forms.var(correction=0).item() == pytest.approx((bound - 2 * A.diag().square().sum()).item())
    draws = Draws(1, torch.device("cpu"))
    draws.add((signs @ J)[:, None])
    n = len(signs)  # of all pairs, those of a draw with itself are not among them
    pairs = (bound / 2 * n**2 - forms.square().sum()) / (n * (n - 1))
    assert draws.standard_error.item() == pytest.approx((2 * pairs / n).sqrt().item() * raised(n))
