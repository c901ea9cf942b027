"""What must hold of every linearisation and every scope, on every kind of model, in float64.

The oracle (`zoo.oracle`) differentiates a copy of the model directly: no hooks of TransformerLens, no batching, the
whole prompt, one backward pass per number.
"""

from typing import Any

import pytest
import torch
from torch.testing import assert_close

import tl_scopes as tls
from tests import zoo
from tests.zoo import PROMPT, Specimen
from tl_scopes.jacobian.fisher_information import fisher_information
from tl_scopes.jacobian.pullback import pull, pulls

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
    monkeypatch.setattr("tl_scopes.jacobian.pullback._WORKING_BYTES_OF_CPU", 1)
    assert_close(lin.vjp(cotangents), whole, **EXACT)
    assert_close(lin.jvp(tangents), pushed, **EXACT)
    dealt = pulls([0], lin.trace.places, [cotangents])
    assert [len(batch) for batch in pull(lin.model, lin.trace, lin.wrt, dealt)] == [1] * 5


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
    answer = tls.TemperatureScope(of="logits")(lin)
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
