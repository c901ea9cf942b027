"""What must hold of every linearisation and every scope, on every kind of model, in float64.

The oracle (`zoo.oracle`) differentiates a copy of the model directly: no hooks of TransformerLens, no batching, the
whole prompt, one backward pass per number.
"""

from typing import Any, get_args

import pytest
import torch
from torch.testing import assert_close

import tl_scopes as tls
from tests import zoo
from tests.zoo import PROMPT, Specimen
from tl_scopes.circuits.cut import By
from tl_scopes.jacobian.fisher_information import fisher_information, leading_part, remainder_probes
from tl_scopes.jacobian.metric import LocalMetric
from tl_scopes.jacobian.pullback import near_one, power_of_two, pull, summed_over_vocabulary
from tl_scopes.jacobian.softmax import balanced, deviations, left_open, log_prob
from tl_scopes.models.supported import parameters_of, run_by

POSITION, TARGET = 5, 7
EXACT = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture
def lin(specimen: Specimen) -> tls.Linearization:
    return tls.linearize(specimen.model, PROMPT, POSITION)


@pytest.fixture
def truth(specimen: Specimen) -> dict[str, torch.Tensor]:
    return zoo.oracle(specimen, PROMPT, POSITION, TARGET)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# -- the linearisation ------------------------------------------------------------------------------------------------


def test_readout_and_logits_are_the_models_own(lin: tls.Linearization, truth: dict[str, Any]) -> None:
    """y and z(y) are what the plain model computes, though later tokens and other positions are not run."""
    assert_close(lin.readout, truth["readout"], **EXACT)
    assert_close(lin.logits, truth["logits"], **EXACT)


def test_as_matrix_is_the_jacobian(lin: tls.Linearization, truth: dict[str, Any]) -> None:
    """as_matrix = dy/dx, and no token after the position has any influence."""
    assert_close(lin.as_matrix(), truth["jacobian"][:, : POSITION + 1], **EXACT)
    assert not truth["jacobian"][:, POSITION + 1 :].any()


def test_vjp_rows(lin: tls.Linearization) -> None:
    """vjp(c) = c as_matrix, one probe or many."""
    cotangents = randn(3, len(lin.readout))
    expected = torch.einsum("pk,ktd->ptd", cotangents, lin.as_matrix())
    assert_close(lin.vjp(cotangents), expected, **EXACT)
    assert_close(lin.vjp(cotangents[:1]), expected[:1], **EXACT)


def test_adjoint(lin: tls.Linearization) -> None:
    """⟨c, Jδ⟩ = ⟨Jᵀc, δ⟩."""
    cotangents, tangents = randn(3, len(lin.readout)), randn(2, *lin.embeddings.shape, seed=1)
    left = torch.einsum("pk,qk->pq", cotangents, lin.jvp(tangents))
    right = torch.einsum("ptd,qtd->pq", lin.vjp(cotangents), tangents)
    assert_close(left, right, **EXACT)
    assert_close(lin.jvp(tangents), lin.jvp(tangents), rtol=0, atol=0)  # asking does not use the graph up


def test_finite_differences(lin: tls.Linearization) -> None:
    """(y(x + hδ) − y(x − hδ)) / 2h → Jδ, through `at`."""
    tangent = randn(*lin.embeddings.shape)
    h = 1e-5
    forward, backward = lin.at(lin.embeddings + h * tangent), lin.at(lin.embeddings - h * tangent)
    assert_close((forward.readout - backward.readout) / (2 * h), lin.jvp(tangent[None])[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("species", ["bridge llama", *(["hooked layer norm"] if zoo.HookedTransformer else [])])
def test_written_to_in_place(species: str) -> None:
    """A graph whose weights were written to is refused with what to do, and not in torch's words."""
    model = zoo.SPECIES[species]().model
    lin = tls.linearize(model, PROMPT, POSITION)
    c = randn(2, len(lin.readout)).to(lin.readout)
    with torch.no_grad():
        max(model.blocks[0].parameters(), key=torch.numel).mul_(1.01)
    for ask in (lambda: lin.vjp(c), lambda: lin.vjp(c[:1]), lambda: lin.jvp(lin.embeddings[None])):
        with pytest.raises(ValueError, match="a weight, or a tensor that a hook holds, was written to in place since"):
            ask()


@pytest.mark.parametrize("species", ["bridge llama", *(["hooked layer norm"] if zoo.HookedTransformer else [])])
def test_weights_that_are_others(species: str) -> None:
    """Another precision, and numbers that were assigned, are other weights, though the parameters are the same."""

    def in_half(model: Any) -> None:
        model.to(torch.float16)

    def assigned(model: Any) -> None:
        weight = max(model.blocks[0].parameters(), key=torch.numel)
        weight.data = weight.data * 3

    for change in (in_half, assigned):
        model = zoo.SPECIES[species]().model
        lin = tls.linearize(model, PROMPT, POSITION)
        lin.require_unchanged()
        change(model)
        with pytest.raises(ValueError, match="the weights have changed since the model was linearised"):
            lin.require_unchanged()


def test_at_the_same_point(lin: tls.Linearization) -> None:
    """at(x) is the same linearisation."""
    again = lin.at(lin.embeddings)
    assert_close(again.readout, lin.readout, **EXACT)
    assert_close(again.as_matrix(), lin.as_matrix(), **EXACT)


def test_squared_norms(lin: tls.Linearization) -> None:
    """squared_norms(c) = ‖vjp(c)‖² per token."""
    cotangents = randn(4, len(lin.readout))
    assert_close(lin.squared_norms(cotangents), lin.vjp(cotangents).square().sum(-1), **EXACT)


def test_batches_change_no_number(lin: tls.Linearization, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch size is about memory alone."""
    cotangents = randn(5, len(lin.readout))
    tangents = randn(5, *lin.embeddings.shape)
    whole, pushed = lin.vjp(cotangents), lin.jvp(tangents)
    zoo.batches_of(monkeypatch, 1)
    assert_close(lin.vjp(cotangents), whole, **EXACT)
    assert_close(lin.jvp(tangents), pushed, **EXACT)
    assert [len(batch) for batch in pull([lin], [cotangents])] == [1] * 5


def test_logits_products(lin: tls.Linearization, truth: dict[str, Any]) -> None:
    """logits_jvp and logits_vjp are the two sides of ∂z/∂y, and (∂z/∂y) J = ∂z/∂x."""
    G = lin.logits_jvp(torch.eye(len(lin.readout), dtype=torch.float64)).T
    cotangents = randn(2, len(lin.logits))
    assert_close(lin.logits_vjp(cotangents), cotangents @ G, **EXACT)
    semantic = torch.einsum("k,ktd->td", G[TARGET], lin.as_matrix()).norm(dim=-1)
    assert_close(semantic, truth["semantic"][: POSITION + 1], **EXACT)


def test_between_inner_hooks(specimen: Specimen) -> None:
    """J from the embedding to the stream after block 0, times J from there to the readout, is the whole J.

    At the last position only: that is where both ends meet when the prompt is one token long.
    """
    model, prompt = specimen.model, PROMPT[:1]
    middle = "blocks.1.hook_resid_pre" if "blocks.1.hook_resid_pre" in model.hook_dict else "blocks.1.hook_in"
    first = tls.linearize(model, prompt, of=middle).as_matrix()[:, 0]
    second = tls.linearize(model, prompt, wrt=middle).as_matrix()[:, 0]
    assert_close(second @ first, tls.linearize(model, prompt).as_matrix()[:, 0], **EXACT)


# -- the scopes -------------------------------------------------------------------------------------------------------

SCOPES = {
    "semantic": tls.SemanticScope(target=TARGET),
    "log_prob": tls.SemanticScope(target=TARGET, quantity="log_prob"),
    "temperature": tls.TemperatureScope(),
    "fisher": tls.FisherScope(exact=True),
}


@pytest.mark.parametrize("name", SCOPES)
def test_scores_are_the_oracles(lin: tls.Linearization, truth: dict[str, Any], name: str) -> None:
    """Every scope equals its equation, taken literally."""
    answer = SCOPES[name](lin)
    assert_close(answer.scores, truth[name][: POSITION + 1], **EXACT)
    assert answer.scores.dtype == torch.float64
    assert answer.position == POSITION
    assert len(answer.str_tokens) == len(answer.scores) == POSITION + 1


def test_fisher_of_the_softmax(lin: tls.Linearization) -> None:
    """F is the Hessian of KL(p(y) ‖ p(y + δ)) at δ = 0."""
    G = lin.logits_jvp(torch.eye(len(lin.readout), dtype=torch.float64)).T
    p = lin.logits.softmax(-1)
    expected = G.T @ (p.diag() - torch.outer(p, p)) @ G
    assert_close(fisher_information(lin), expected, **EXACT)


def test_fisher_is_half_the_kl(lin: tls.Linearization) -> None:
    """KL(p(x) ‖ p(x + δ)) → ½ δᵀ Jᵀ F J δ as δ → 0."""
    tangent = 1e-4 * randn(*lin.embeddings.shape)
    moved = lin.at(lin.embeddings + tangent).log_probs
    divergence = (lin.log_probs.exp() * (lin.log_probs - moved)).sum()
    push = lin.jvp(tangent[None])[0]
    assert_close(divergence, push @ fisher_information(lin) @ push / 2, rtol=2e-2, atol=1e-14)


def test_versus_is_antisymmetric(lin: tls.Linearization) -> None:
    """z_v − z_u and z_u − z_v move alike, and log-probabilities differ as logits do."""
    one, other = tls.SemanticScope(target=3, versus=4)(lin), tls.SemanticScope(target=4, versus=3)(lin)
    log_prob = tls.SemanticScope(target=3, versus=4, quantity="log_prob")(lin)
    assert_close(one.scores, other.scores, **EXACT)
    assert_close(one.scores, log_prob.scores, **EXACT)


def test_semantic_is_the_steepest_change(lin: tls.Linearization) -> None:
    """No unit step in one token's embedding moves the logit by more than its score; the steepest one just does."""
    answer = tls.SemanticScope(target=TARGET)(lin)
    gradient = lin.vjp(lin.cotangent(lambda z: z[TARGET])[None])[0]
    assert_close((gradient * gradient / gradient.norm(dim=-1, keepdim=True)).sum(-1), answer.scores, **EXACT)


def test_temperature_of_the_logits(lin: tls.Linearization) -> None:
    """of="logits" is the gradient of the spread of the logits, unchanged by a common shift of them."""
    answer = tls.TemperatureScope(norm="logits")(lin)
    spread = lin.cotangent(lambda z: (z + 5 * z[0] - (z + 5 * z[0]).mean()).std(correction=0))
    assert_close(answer.scores, lin.vjp(spread[None])[0].norm(dim=-1), **EXACT)


def test_target_none_is_the_prediction(lin: tls.Linearization) -> None:
    """target=None explains the most likely token, and the answer says which."""
    best = int(lin.logits.argmax())
    answer = tls.SemanticScope()(lin)
    assert answer.target is not None
    assert answer.target.id == best == answer.predictions[0].token.id
    assert_close(answer.scores, tls.SemanticScope(target=best)(lin).scores, rtol=0, atol=0)
    assert answer.predictions[0].probability == pytest.approx(lin.logits.softmax(-1)[best].item())


def test_one_forward_pass_for_all_scopes(specimen: Specimen, monkeypatch: pytest.MonkeyPatch) -> None:
    """A linearisation runs the model once; scopes on it do not run it at all."""
    runs = []
    handle = specimen.model.hook_dict["hook_embed"].register_forward_hook(lambda *_: runs.append(1))
    try:
        lin = tls.linearize(specimen.model, PROMPT, POSITION)
        for scope in SCOPES.values():
            scope(lin)
        lin.jvp(torch.zeros(1, *lin.embeddings.shape))
    finally:
        handle.remove()
    assert len(runs) == 1


def test_nothing_runs_after_the_position(specimen: Specimen) -> None:
    """Only tokens up to the position pass the embedding, and only one position passes the unembedding."""
    seen = {}
    handles = [
        specimen.model.hook_dict[name].register_forward_hook(
            lambda module, args, out, name=name: seen.update({name: out.shape[1]})
        )
        for name in ("hook_embed", "unembed.hook_out")
    ]
    try:
        tls.linearize(specimen.model, PROMPT, POSITION)
    finally:
        for handle in handles:
            handle.remove()
    assert seen == {"hook_embed": POSITION + 1, "unembed.hook_out": 1}


# -- sure predictions, small and large numbers ------------------------------------------------------------------------

SURE = ["native no norm", "bridge llama"]


def sure(species: str, dtype: torch.dtype = torch.float64, margin: float = 50.0) -> Any:
    """A model whose most likely token is ahead by so many nats, so that float64 rounds 1 − p to 0."""
    model = zoo.SPECIES[species]().model
    first, second = model(torch.tensor([PROMPT]))[0, -1].topk(2).values.tolist()
    with torch.no_grad():
        head = model.original_model.head if "native" in species else model.original_model.lm_head
        head.weight.mul_(margin / (first - second))
    return model.to(dtype).eval()


def outer_products(lin: tls.Linearization) -> tuple[torch.Tensor, torch.Tensor, int]:
    """p, the rows (w_u − w_v) J counted from the most likely token's, and that token v: no 1 − p is taken."""
    v = int(lin.logits.argmax())
    G = lin.logits_jvp(torch.eye(len(lin.readout), dtype=torch.float64)).T
    return lin.log_probs.exp(), torch.einsum("vk,ktd->vtd", G - G[v], lin.as_matrix()), v


@pytest.mark.parametrize("species", SURE)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 5e-3)])
def test_what_a_sure_prediction_leaves_open(species: str, dtype: torch.dtype, rtol: float) -> None:
    """1 − p rounds to 0 there; the slopes of log p, F, and the singular values of √F J keep their digits."""
    with zoo.Float64():
        exact, lin = (tls.linearize(sure(species, of), PROMPT) for of in (torch.float64, dtype))
        p, rows, v = outer_products(exact)
    assert exact.log_probs[v] == 0
    assert 0 < left_open(p) < 1e-16
    close = {"rtol": rtol, "atol": 0.0, "check_dtype": False}
    slope = tls.SemanticScope(v, quantity="log_prob")(lin)
    assert_close(slope.scores, torch.einsum("v,vtd->td", p, rows).norm(dim=-1), **close)
    weighted = p.sqrt()[:, None, None] * (rows - torch.einsum("v,vtd->td", p, rows))
    fisher = weighted.square().sum((0, 2))
    for scope in (tls.FisherScope(exact=True), tls.FisherScope(), tls.FisherScope(rtol=0.1), tls.FisherScope(rank=16)):
        assert_close(scope(lin).scores, fisher, **close)
    sigma = torch.linalg.svdvals(weighted.transpose(0, 1)).T
    for statistic, expected in (
        ("largest", sigma[0]),
        ("frobenius", sigma.square().sum(0).sqrt()),
        ("effective_rank", sigma.square().sum(0) ** 2 / sigma.pow(4).sum(0)),
    ):
        assert_close(tls.SpectralScope(statistic, "distribution")(lin).scores, expected, **close)  # type: ignore[arg-type]
    path = tls.PathIntegratedScope(v, quantity="log_prob", steps=2, start=0.999)(lin)
    expected = (0.001 * exact.embeddings * torch.einsum("v,vtd->td", p, rows)).norm(dim=-1)
    assert_close(path.scores, expected, rtol=0.2, atol=0.0, check_dtype=False)
    assert path.signed.any()


@pytest.mark.parametrize("species", SURE)
def test_estimates_of_a_sure_prediction(species: str) -> None:
    """The random draws and the leading directions have F for covariance there as well."""
    with zoo.Float64():
        lin = tls.linearize(sure(species), PROMPT)
        _, rows, _ = outer_products(lin)
        fisher, leading = fisher_information(lin), leading_part(lin, 3, torch.Generator().manual_seed(0))
        draws = remainder_probes(lin, 20_000, leading, torch.Generator().manual_seed(1))
        pushed = torch.einsum("kj,ktd->jtd", fisher, lin.as_matrix())
    trace = torch.einsum("jtd,jtd->t", pushed, lin.as_matrix())
    assert_close(trace, tls.FisherScope(exact=True)(lin).scores, rtol=1e-7, atol=0.0)
    remainder = fisher - leading.L.T @ leading.L
    assert (draws.T @ draws / len(draws) - remainder).norm() < 0.05 * fisher.norm()
    assert rows.any()


@pytest.mark.parametrize("sure", [1.0, 40.0])
def test_the_softmax_by_hand(sure: float) -> None:
    """log p and its first two derivatives, Σ p = 1, and deviations from the mean, for every target."""
    logits = sure * torch.tensor([0.3, -1.0, 2.0, 1.0, -torch.inf], dtype=torch.float64)
    p = logits.softmax(-1)
    for target in range(4):
        z = logits.clone().requires_grad_()
        value = log_prob(z, target)
        assert_close(value, logits.log_softmax(-1)[target])
        (slope,) = torch.autograd.grad(value, z, create_graph=True)
        expected = -p
        expected[target] = sum(p[u] for u in range(5) if u != target)
        assert_close(slope, expected, rtol=1e-12, atol=0.0)
        (bent,) = torch.autograd.grad(slope[0], z)
        assert_close(bent[1], p[0] * p[1], rtol=1e-12, atol=0.0)
    x = torch.tensor([1.0, 5.0, 2.0, -1.0, 7.0], dtype=torch.float64)
    mean = 2 + sum(p[u] * (x[u] - 2) for u in range(5))
    assert_close(deviations(p, x)[[0, 1, 3]], (x - mean)[[0, 1, 3]])
    assert_close(deviations(p, x)[2], -sum(p[u] * (x[u] - 2) for u in range(5)), rtol=1e-12, atol=0.0)
    assert deviations(p, logits).isfinite().all()
    found = balanced(p, torch.stack([x, x]))
    assert_close(found[:, [0, 1, 3, 4]], torch.stack([x, x])[:, [0, 1, 3, 4]])
    assert_close(found.sum(-1), torch.zeros(2, dtype=torch.float64))
    assert_close(left_open(p), p[0] + p[1] + p[3])


@pytest.mark.parametrize("size", [1e-30, 1e-25, 1e25, 1e35])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_that_a_square_would_not_survive(size: float, dtype: torch.dtype) -> None:
    """Whatever the length of a direction, scores are in proportion to it, in float32 and below."""
    lin = tls.linearize(zoo.llama(zoo.GOLDEN, "bridge", dtype), PROMPT)
    c = torch.randn(2, len(lin.readout), generator=torch.Generator().manual_seed(0))
    factor = power_of_two(size)
    assert_close(lin.squared_norms(factor * c), factor**2 * lin.squared_norms(c), rtol=0, atol=0)
    assert_close(lin.vjp(factor * c), factor * lin.vjp(c), rtol=0, atol=0)
    x = torch.randn(2, *lin.embeddings.shape, generator=torch.Generator().manual_seed(1))
    assert_close(lin.jvp(factor * x), factor * lin.jvp(x), rtol=0, atol=0)
    one = tls.DirectionScope(c[0], "ln_final")(lin).scores
    other = tls.DirectionScope(factor * c[0], "ln_final")(lin).scores
    assert_close(other.double() / factor, one.double(), rtol=1e-6, atol=0.0)


def test_in_float16_a_small_slope_survives() -> None:
    """1 − p is below the smallest number of float16, and its slopes are those of float32."""
    scores = {}
    for dtype in (torch.float16, torch.float32):
        model = zoo.llama(zoo.GOLDEN, "bridge", torch.float16)
        with torch.no_grad():
            model.original_model.lm_head.weight.mul_(10)
        lin = tls.linearize(model.to(dtype), PROMPT)
        assert 0 < left_open(lin.log_probs.exp()) < 6e-8
        target = int(lin.logits.argmax())
        scope = tls.SemanticScope(target, quantity="log_prob")
        q = LocalMetric(lin, scope.metric(lin))
        scores[dtype] = scope(lin).scores, q.gradient.norm(dim=-1)
    for half, full in zip(scores[torch.float16], scores[torch.float32], strict=True):
        half, full = (values / left for values, left in ((half, half.sum()), (full, full.sum())))
        assert_close(half, full, rtol=0.1, atol=1e-3, check_dtype=False)


def test_near_one() -> None:
    """A power of two, and a norm between 1 and 2; zeros, and what is not finite, stay as they are."""
    vectors = torch.tensor([[3e-30, 4e-30], [0.0, 0.0], [3e30, 4e30], [torch.inf, 1.0], [1.0, 0.0]])
    units, scales = near_one(vectors)
    assert_close(units * torch.tensor(scales)[:, None].double(), vectors.double(), rtol=0, atol=0)
    norms = units.norm(dim=-1)
    assert ((norms >= 1) & (norms < 2))[[0, 2, 4]].all()
    assert (scales[1], scales[3], scales[4]) == (1.0, 1.0, 1.0)
    assert power_of_two(5e-324) == 5e-324


# -- torch's own checks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check_nan", [True, False])
def test_under_detect_anomaly(check_nan: bool) -> None:
    """Its checks have no batching rules: cotangents go back one by one, and the numbers are the same."""
    model = zoo.specimen("bridge llama").model
    scopes = [
        tls.SemanticScope(TARGET),
        tls.FisherScope(),
        tls.SpectralScope(rank=2),
        tls.HetaScope(TARGET, probes=2),
        tls.PathIntegratedScope(TARGET, steps=40),
    ]

    def ask() -> list[torch.Tensor]:
        lin = tls.linearize(model, PROMPT, POSITION)
        maps = [tls.attribution_map(model, PROMPT[:4], scope)[-1].scores for scope in scopes[:2]]
        radii = [tls.linearity(lin, scope, positions=[1], directions=1).radius for scope in scopes[:2]]
        checks = [tls.check(lin, scope) for scope in scopes[:2]]
        made = ("linearity", "saturation", "weights")
        assert all(found[name].verdict != "not applicable" for found in checks for name in made)
        pair = tls.PromptPair(model, PROMPT, [*PROMPT[:2], 20, *PROMPT[3:]], answer=TARGET, wrong=3)
        patched = [pair.attribution_patching("mlp_out", order=order).values for order in (1, 2)]
        paths = [tls.carried_by(lin, scopes[0], by, tokens=[1, 2]).values for by in get_args(By)]
        features = tls.Features(torch.eye(16), "blocks.0.hook_resid_post", decoder=torch.eye(16))
        fired = tls.feature_map(model, PROMPT, features, scopes[0]).scores
        return [*(scope(lin).scores for scope in scopes), *maps, *radii, *patched, *paths, fired]

    with zoo.Float64():
        expected = ask()
        with torch.autograd.detect_anomaly(check_nan=check_nan):
            found = ask()
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, rtol=1e-7, atol=1e-9)


def test_parameters_are_those_of_the_model(specimen: Specimen) -> None:
    """What is frozen, and what is compared to see whether weights have changed, in torch's own order."""
    whole = getattr(specimen.model, "original_model", specimen.model)
    found = parameters_of(run_by(specimen.model))
    assert list(map(id, found)) == list(map(id, whole.parameters()))
    assert set(map(id, found)) >= {id(one) for one in specimen.model.parameters()}


def test_a_dense_cotangent_is_as_exact_as_a_sparse_one() -> None:
    """The derivative of a log-probability sums over the whole vocabulary, to the last digits of float32."""
    torch.manual_seed(0)
    weight, readout = torch.randn(60_000, 64), torch.randn(1, 64, requires_grad=True)
    logits = readout @ weight.T
    p = logits.detach().double().mul(0.1).softmax(-1)
    expected = p @ weight.double()
    found = summed_over_vocabulary(logits, readout, p.float()[None], together=True)
    assert float((found[0] - expected).norm() / expected.norm()) < 3e-6
