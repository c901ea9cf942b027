"""Spectral Scope: singular values of every token's Jacobian beside a dense SVD; the sketch, its bounds and errors."""

from typing import Any, Literal

import pytest
import torch
from torch.testing import assert_close

import tl_scopes as tls
from tests import zoo
from tests.zoo import PROMPT, Specimen
from tl_scopes import models
from tl_scopes.jacobian import pullback, spectrum
from tl_scopes.jacobian.randomness import prompt_generator
from tl_scopes.scopes.spectral import statistics
from tl_scopes.tiny.tasks import examples

POSITION = 5
EXACT = {"rtol": 1e-9, "atol": 1e-11}
KEYS = "The keys to the old cabinet near the door"
Space = Literal["readout", "distribution"]
SPACES: list[Space] = ["readout", "distribution"]


@pytest.fixture
def lin(specimen: Specimen) -> tls.Linearization:
    return tls.linearize(specimen.model, PROMPT, POSITION)


@pytest.fixture(scope="module")
def keys(tiny: Any) -> tls.Linearization:
    return tls.linearize(tiny, KEYS)


def dense(specimen: Specimen, space: Space) -> torch.Tensor:
    """A_t = J_t, or (diag p)^½ (∂log p/∂x_t), whose singular values are those of √F J_t: no root of F is taken."""
    truth = zoo.oracle(specimen, PROMPT, POSITION, target=0)
    if space == "readout":
        return truth["jacobian"][:, : POSITION + 1].transpose(0, 1)
    delta = torch.zeros(len(PROMPT), zoo.WIDTH, dtype=torch.float64, requires_grad=True)
    log_probs = specimen.forward(torch.tensor(PROMPT), delta)[1][POSITION].log_softmax(-1)
    rows = [torch.autograd.grad(value, delta, retain_graph=True)[0] for value in log_probs]
    weighted = torch.stack([p.exp().sqrt() * row for p, row in zip(log_probs.detach(), rows, strict=True)])
    return weighted[:, : POSITION + 1].transpose(0, 1)


# -- exact ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", SPACES)
def test_singular_values_are_the_oracles(specimen: Specimen, lin: tls.Linearization, space: Space) -> None:
    """σ, and the three numbers computed from them, are those of a dense SVD of the plain model's Jacobian."""
    sigma = torch.linalg.svdvals(dense(specimen, space)).T
    answer = tls.SpectralScope(space=space)(lin)
    found = answer.singular_values
    assert_close(found, sigma[: len(found)], rtol=1e-7, atol=1e-9 * float(sigma.max()))
    assert_close(answer.largest, sigma[0], **EXACT)
    assert_close(answer.frobenius, sigma.square().sum(0).sqrt(), **EXACT)
    assert_close(answer.effective_rank, sigma.square().sum(0) ** 2 / sigma.pow(4).sum(0), **EXACT)
    assert answer.method == "exact"
    assert torch.equal(answer.largest_at_most, answer.largest)
    assert not answer.frobenius_error.any()
    assert not answer.effective_rank_error.any()
    for statistic in ("largest", "frobenius", "effective_rank"):
        assert torch.equal(tls.SpectralScope(statistic, space)(lin).scores, answer.details[statistic])


def test_frobenius_is_the_jacobian_and_the_fisher_scope(lin: tls.Linearization) -> None:
    """Σσ² = ‖J_t‖_F², and tr(J_tᵀ F J_t) for the distribution."""
    whole = lin.as_matrix().square().sum((0, 2))
    assert_close(tls.SpectralScope("frobenius")(lin).scores ** 2, whole, **EXACT)
    fisher = tls.FisherScope(exact=True)(lin).scores
    assert_close(tls.SpectralScope("frobenius", "distribution")(lin).scores ** 2, fisher, **EXACT)


def test_ranks_in_order(lin: tls.Linearization) -> None:
    """1 ≤ Σσ²/σ₁² ≤ effective rank ≤ rank; no unit cotangent gives a score above the largest singular value."""
    answer = tls.SpectralScope()(lin)
    stable = answer.frobenius**2 / answer.largest**2
    rank = (answer.singular_values > 1e-12 * answer.largest).sum(0)
    assert (stable >= 1 - 1e-12).all()
    assert (answer.effective_rank >= stable - 1e-9).all()
    assert (answer.effective_rank <= rank + 1e-9).all()
    assert (tls.TemperatureScope()(lin).scores <= answer.largest * (1 + 1e-12)).all()


def test_the_distribution_does_not_feel_how_weights_were_processed() -> None:
    """Folding and centring change the singular values of the readout, not those of the distribution."""
    before, after = zoo.llama(zoo.GOLDEN, "bridge"), zoo.llama(zoo.GOLDEN, "bridge")
    after.enable_compatibility_mode(disable_warnings=True)
    free, folded = (tls.linearize(model, PROMPT) for model in (before, after))
    one, other = (tls.SpectralScope(space="distribution")(lin) for lin in (free, folded))
    assert_close(one.scores, other.scores, rtol=1e-3, atol=0)
    assert_close(one.effective_rank, other.effective_rank, rtol=1e-3, atol=0)
    readout = tls.SpectralScope()(free).scores
    assert ((tls.SpectralScope()(folded).scores - readout).abs() > 0.02 * readout).any()


def test_between_inner_hooks(lin: tls.Linearization) -> None:
    """J between any two hooks has singular values; the distribution has not unless it is reached."""
    inner = tls.linearize(lin.model, PROMPT, POSITION, of="blocks.1.hook_resid_pre")
    answer = tls.SpectralScope()(inner)
    assert_close(answer.singular_values, torch.linalg.svdvals(inner.as_matrix().transpose(0, 1)).T, **EXACT)
    assert answer.unit == "norm at blocks.1.hook_resid_pre per unit of embedding norm"
    with pytest.raises(ValueError, match="needs the logits"):
        tls.SpectralScope(space="distribution")(inner)


@pytest.mark.parametrize("rank", [None, 2])
def test_a_token_without_influence(rank: int | None) -> None:
    """J_t = 0 says nothing, in no direction: zeros, not NaN."""
    with zoo.Float64():
        lin = tls.linearize(zoo.specimen("native layer norm").model, PROMPT, wrt="blocks.1.hook_mlp_out")
        answer = tls.SpectralScope(rank=rank)(lin)
        [direction] = tls.SpectralScope(rank=rank).directions(lin, 0, count=1)
    assert direction.singular_value == direction.share == 0
    for name in ("largest", "largest_at_most", "frobenius", "effective_rank"):
        assert not answer.details[name][:-1].any()
        assert answer.details[name][-1] > 0


# -- from a few products ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("rank", [1, 3])
def test_lower_bounds(lin: tls.Linearization, space: Space, rank: int) -> None:
    """No singular value is overestimated, whatever the draw."""
    truth = tls.SpectralScope(space=space)(lin)
    for seed in range(4):
        answer = tls.SpectralScope(space=space, rank=rank, generator=torch.Generator().manual_seed(seed))(lin)
        assert answer.singular_values.shape == (rank, POSITION + 1)
        assert (answer.singular_values <= truth.singular_values[:rank] * (1 + 1e-9)).all()
        if answer.method == "exact":  # F has few directions: of a sure prediction
            continue
        assert answer.method == f"{rank} directions and 8 random probes"
        assert (answer.largest_at_most >= answer.largest).all()
        assert (answer.effective_rank >= 1 - 1e-9).all()


def test_the_upper_bound_mostly_holds() -> None:
    """For 97 of 100 tokens, of all kinds of random models."""
    held = []
    with zoo.Float64():
        for species in zoo.SPECIES:
            lin = tls.linearize(zoo.specimen(species).model, PROMPT, POSITION)
            truth = tls.SpectralScope()(lin).largest
            for seed in range(5):
                answer = tls.SpectralScope(rank=3, generator=torch.Generator().manual_seed(seed))(lin)
                held.append(answer.largest_at_most >= truth * (1 - 1e-9))
    assert torch.cat(held).double().mean() > 0.97


def test_products_seen_and_unseen(lin: tls.Linearization) -> None:
    """U has orthonormal rows, seen = U A_t, and the probes see the rest: E ‖unseen‖² = ‖A_t‖² − ‖seen‖²."""
    J = lin.as_matrix()
    sketch = spectrum.sketch(lin, torch.eye(len(J)), 3, torch.Generator().manual_seed(0))
    U = sketch.U
    assert_close(U @ U.T, torch.eye(3, dtype=torch.float64), **EXACT)
    assert_close(sketch.seen, torch.einsum("ij,jtd->itd", U, J), **EXACT)
    assert_close(torch.einsum("kj,jtd->ktd", U, J).square().sum((0, 2)), sketch.seen.square().sum((0, 2)), **EXACT)
    # Signs that are orthonormal in the sense of the estimate: Σ_i ω_i ω_iᵀ = n I makes it exact.
    rest = J - torch.einsum("ki,ktd->itd", U, sketch.seen)
    again = statistics(spectrum.Sketch(sketch.root, U, sketch.seen, len(J) ** 0.5 * rest, 0))
    assert_close(again["frobenius"], J.square().sum((0, 2)).sqrt(), **EXACT)


@pytest.mark.parametrize("true_rank", [2, 3])
def test_few_directions_suffice_where_there_are_few(lin: tls.Linearization, true_rank: int) -> None:
    """A Jacobian of rank 2 or 3 is found whole by 3 directions: all numbers are exact, and the errors say so."""
    root = torch.zeros(len(lin.readout), len(lin.readout), dtype=torch.float64)
    draw = torch.randn(true_rank, len(lin.readout), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    root[:true_rank] = draw
    truth = statistics(spectrum.exact(lin, draw))
    found = statistics(spectrum.sketch(lin, root, 3, torch.Generator().manual_seed(0)))
    for name in ("largest", "largest_at_most", "frobenius", "effective_rank"):
        assert_close(found[name], truth[name], rtol=1e-7, atol=0)
    assert_close(found["singular_values"][:true_rank], truth["singular_values"], rtol=1e-7, atol=0)
    assert (found["frobenius_error"] < 1e-9 * truth["frobenius"]).all()


@pytest.mark.parametrize("space", SPACES)
def test_estimates_are_honest(keys: tls.Linearization, space: Space) -> None:
    """Over seeds, the squared norm is unbiased, the errors are as large as they say, and σ₁ lies between its bounds."""
    truth = tls.SpectralScope(space=space)(keys)
    answers = [
        tls.SpectralScope(space=space, rank=8, generator=torch.Generator().manual_seed(s))(keys) for s in range(24)
    ]
    stacked = {
        name: torch.stack([answer.details[name] for answer in answers]).double()
        for name in truth.details
        if name not in ("method", "backward_passes", "singular_values")
    }
    squares = stacked["frobenius"].square()
    bias = (squares.mean(0) - truth.frobenius.double().square()) / (squares.std(0) / len(answers) ** 0.5)
    assert bias.abs().max() < 4  # 10 tokens
    for name in ("frobenius", "effective_rank"):
        z = (stacked[name] - truth.details[name]) / stacked[f"{name}_error"]
        assert 0.6 < z.square().mean().sqrt() < 1.4
    between = (stacked["largest"] <= truth.largest * 1.0001) & (stacked["largest_at_most"] >= truth.largest * 0.9999)
    assert between.double().mean() > 0.96


def test_how_many_directions(tiny: Any) -> None:
    """As the docstring says, 16 do for the distribution, and the readout 32; weak tokens are found like others."""
    lin = tls.linearize(tiny, examples("translation", 1, seed=3)[0].prompt)
    space: Space
    for space, rank, mean, worst in (("distribution", 16, 2e-3, 5e-3), ("readout", 32, 0.03, 0.06)):
        truth, answer = tls.SpectralScope(space=space)(lin), tls.SpectralScope(space=space, rank=rank)(lin)
        assert truth.scores.max() > 9 * truth.scores.min()
        assert (1 - answer.scores / truth.scores).mean() < mean
        assert (1 - answer.scores / truth.scores).max() < worst


@pytest.mark.parametrize("space", SPACES)
def test_where_the_kernel_has_no_second_derivative(
    keys: tls.Linearization, space: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Differences steer as well as derivatives do, and the bounds hold for any direction."""
    expected = tls.SpectralScope(space=space, rank=16)(keys)

    def jvp(*_: Any) -> Any:
        raise pullback.NoSecondDerivativeError("this model's attention kernel cannot be differentiated twice")

    monkeypatch.setattr(tls.Linearization, "jvp", jvp)
    assert_close(tls.SpectralScope(space=space, rank=16)(keys).scores, expected.scores, rtol=0.02, atol=0)

    def out_of_memory(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(tls.Linearization, "jvp", out_of_memory)
    with pytest.raises(RuntimeError, match="out of memory"):
        tls.SpectralScope(space=space, rank=16)(keys)


def test_passes_are_as_said(keys: tls.Linearization, monkeypatch: pytest.MonkeyPatch) -> None:
    """One per product with J."""
    counted: list[int] = []
    for verb in ("vjp", "jvp"):
        product = getattr(tls.Linearization, verb)

        def count(self: Any, vectors: torch.Tensor, product: Any = product) -> torch.Tensor:
            counted.append(len(vectors))
            return product(self, vectors)

        monkeypatch.setattr(tls.Linearization, verb, count)
    for scope, passes in (
        (tls.SpectralScope(rank=5), 18),
        (tls.SpectralScope(), 128),
        (tls.SpectralScope(rank=60), 128),
    ):
        counted.clear()
        assert scope(keys).backward_passes == sum(counted) == passes


def test_the_exact_answer_where_it_is_no_dearer(keys: tls.Linearization) -> None:
    """2 rank + 8 passes that would be as many as the exact answer's are spent on that."""
    exact, answer = tls.SpectralScope()(keys), tls.SpectralScope(rank=60)(keys)
    assert answer.method == "exact"
    assert torch.equal(answer.scores, exact.scores)
    assert torch.equal(answer.singular_values, exact.singular_values[:60])


def test_the_same_every_time(keys: tls.Linearization) -> None:
    """Without a generator the answer is the same again, and the global one is not touched; with one it is drawn."""
    before = torch.get_rng_state()
    one, again = (tls.SpectralScope(rank=4)(keys) for _ in range(2))
    assert torch.equal(one.scores, again.scores)
    assert torch.equal(before, torch.get_rng_state())
    generator = prompt_generator(keys, "SpectralScope")
    drawn = [tls.SpectralScope(rank=4, generator=generator)(keys).scores for _ in range(2)]
    assert torch.equal(drawn[0], one.scores)
    assert not torch.equal(drawn[0], drawn[1])
    assert tls.Attribution.from_json(one.to_json()).method == one.method


def test_written_and_measured(keys: tls.Linearization) -> None:
    units = {
        tls.SpectralScope(): "readout per unit of embedding norm",
        tls.SpectralScope("frobenius", "distribution"): "nat^½ per unit of embedding norm",
        tls.SpectralScope("effective_rank"): "independent directions",
    }
    assert {scope: scope(keys).unit for scope in units} == units
    assert tls.SpectralScope("frobenius", rank=4)(keys).scope == "SpectralScope(statistic='frobenius', rank=4)"


# -- directions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", SPACES)
def test_directions(lin: tls.Linearization, space: Space) -> None:
    """The step has norm 1, J_t takes it to the effect, whose size in the metric is σ; steps are orthogonal."""
    position = 2
    found = tls.SpectralScope(space=space).directions(lin, position, count=4)
    answer = tls.SpectralScope(space=space)(lin)
    steps = torch.stack([direction.step for direction in found])
    assert_close(steps @ steps.T, torch.eye(len(found), dtype=torch.float64), **EXACT)
    p = lin.log_probs.exp()
    for i, direction in enumerate(found):
        assert_close(direction.singular_value, answer.singular_values[i, position].item())
        assert_close(direction.share, (answer.singular_values[i] / answer.frobenius)[position].item() ** 2)
        tangent = torch.zeros_like(lin.embeddings)
        tangent[position] = direction.step
        pushed = lin.jvp(tangent[None])
        change = lin.logits_jvp(pushed)[0]
        if space == "readout":
            assert_close(direction.effect, pushed[0], rtol=1e-6, atol=1e-8 * direction.singular_value)
            assert_close(direction.effect.norm().item(), direction.singular_value)
        else:
            change = p * (change - p @ change)
            assert_close((change.square() / p).sum().sqrt().item(), direction.singular_value, rtol=1e-6, atol=0.0)
        expected = change.topk(5)
        scale = 1e-6 * float(change.abs().max())
        assert_close([row.value for row in direction.raises], expected.values.tolist(), rtol=1e-5, atol=scale)
        assert_close(
            [row.value for row in direction.lowers], (-(-change).topk(5).values).tolist(), rtol=1e-5, atol=scale
        )
        assert direction.raises[0].value >= -direction.lowers[0].value
        cosines = torch.cosine_similarity(models.embedding_matrix(lin.model), direction.step[None])
        assert [row.token.id for row in direction.towards] == cosines.topk(5).indices.tolist()
        assert [row.token.id for row in direction.away] == (-cosines).topk(5).indices.tolist()
        assert_close(direction.away[0].value, cosines.min().item())
        assert (direction.position, direction.token) == (position, lin.str_tokens[position])


def test_directions_are_what_happens(lin: tls.Linearization) -> None:
    """A small step along the first direction changes the logits as it says."""
    [first] = tls.SpectralScope().directions(lin, -1, count=1)
    moved = lin.embeddings.clone()
    moved[-1] += 1e-6 * first.step
    change = (lin.at(moved).logits - lin.logits) / 1e-6
    for row in (*first.raises, *first.lowers):
        assert_close(change[row.token.id].item(), row.value, rtol=1e-3, atol=1e-3 * first.raises[0].value)


@pytest.mark.parametrize("space", SPACES)
def test_directions_from_a_few_products(keys: tls.Linearization, space: Space) -> None:
    """Sought for one token alone, 8 directions find the first as well as the exact answer does."""
    [truth] = tls.SpectralScope(space=space).directions(keys, 2, count=1)
    [found] = tls.SpectralScope(space=space, rank=8).directions(keys, 2, count=1)
    assert found.singular_value == pytest.approx(truth.singular_value, rel=1e-3)
    assert found.share == pytest.approx(truth.share, rel=0.1)
    assert float(found.step @ truth.step) > 0.999
    assert [row.token for row in found.raises[:2]] == [row.token for row in truth.raises[:2]]


def test_directions_read_as_sentences(keys: tls.Linearization) -> None:
    """The noun's first direction for the distribution is grammatical number, in the verbs and in the nouns."""
    first, second = tls.SpectralScope(space="distribution").directions(keys, 2, count=2)
    assert first.raises[0].token.text == " are"
    assert repr(first).startswith("SingularDirection(' keys' at 2, 1.6, 87%: towards ")
    assert repr(first).endswith(", or the opposite)")
    assert "raises ' are', " in repr(first)
    assert first.singular_value > second.singular_value
    late = tls.linearize(keys.model, KEYS, wrt="blocks.3.hook_resid_pre")
    [inner] = tls.SpectralScope().directions(late, 2, count=1)
    assert inner.towards == inner.away == ()
    assert "towards" not in repr(inner)


def test_all_directions_there_are(lin: tls.Linearization) -> None:
    """A count beyond the singular values gives all of them, whose shares sum to 1."""
    found = tls.SpectralScope().directions(lin, 0, count=99)
    assert len(found) == len(lin.readout)
    assert sum(direction.share for direction in found) == pytest.approx(1)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"statistic": "trace"}, 'statistic is "largest", "frobenius" or "effective_rank", got \'trace\''),
        ({"space": "logits"}, 'space is "readout" or "distribution", got \'logits\''),
        ({"rank": 0}, "rank is a number of directions, 1 at least, got 0"),
    ],
)
def test_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tls.SpectralScope(**options)


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize("rank", [True, 2.0])
def test_a_rank_is_an_integer(rank: Any) -> None:
    with pytest.raises(TypeError, match=f"rank is a number of directions, 1 at least, and an integer, got {rank}"):
        tls.SpectralScope(rank=rank)


@pytest.mark.usefixtures("no_type_checks")
def test_asked_wrongly(keys: tls.Linearization) -> None:
    with pytest.raises(ValueError, match="rank=129 is more than the 128 dimensions of the readout: leave it out"):
        tls.SpectralScope(rank=129)(keys)
    with pytest.raises(ValueError, match="the generator is on meta, the model on cpu: take torch.Generator.'cpu'"):
        tls.SpectralScope(rank=4, generator=_MetaGenerator())(keys)  # type: ignore[arg-type]
    for position in (10, -11):
        with pytest.raises(ValueError, match=f"position {position} is out of range: the prompt has 10"):
            tls.SpectralScope().directions(keys, position)
    with pytest.raises(TypeError, match="position must be an integer, got 1.5"):
        tls.SpectralScope().directions(keys, 1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        tls.SpectralScope().directions(keys, 2, count=0)
    with pytest.raises(ValueError, match="needs the logits"):
        tls.SpectralScope().directions(tls.linearize(keys.model, KEYS, of="blocks.3.hook_resid_pre"), 2)


class _MetaGenerator(torch.Generator):
    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("meta")
