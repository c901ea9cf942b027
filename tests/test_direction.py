"""Any direction at any hook: the gradient of the projection on it, of a probe, of a feature of an autoencoder."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import tl_scopes as tls
from tests import zoo
from tests.zoo import PROMPT, WIDTH, Specimen

POSITION, TARGET, VERSUS = 5, 7, 9
EXACT = {"rtol": 1e-10, "atol": 1e-12}
HOOK = "blocks.0.hook_resid_post"


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_readout(specimen: Specimen) -> None:
    """score_t = ‖dᵀJ_t‖, with J from the oracle."""
    lin = tls.linearize(specimen.model, PROMPT, POSITION)
    J = zoo.oracle(specimen, PROMPT, POSITION, TARGET)["jacobian"][:, : POSITION + 1]
    d = randn(WIDTH)
    answer = tls.DirectionScope(d, "ln_final")(lin)
    assert_close(answer.scores, torch.einsum("k,ktd->td", d, J).norm(dim=-1), **EXACT)
    assert_close(tls.DirectionScope(-2 * d, "unembed.hook_in")(lin).scores, 2 * answer.scores, **EXACT)


def test_in_the_middle(specimen: Specimen) -> None:
    """The gradient of dᵀy by finite differences, y in the middle of the network: its length is the score."""
    lin = tls.linearize(specimen.model, PROMPT, POSITION, of=HOOK)
    d = randn(WIDTH)
    answer = tls.DirectionScope(d, HOOK)(lin)
    steepest = lin.vjp(d[None])[0]
    steepest = steepest / steepest.norm(dim=-1, keepdim=True)
    h = 1e-5
    for t in (0, POSITION):
        step = torch.zeros_like(steepest)
        step[t] = h * steepest[t]
        change = (lin.at(lin.embeddings + step).readout - lin.at(lin.embeddings - step).readout) @ d / (2 * h)
        assert_close(answer.scores[t], change, rtol=1e-5, atol=1e-8)


def test_unembedding_difference(specimen: Specimen) -> None:
    """w_v − w_u is SemanticScope's logit difference, where logits are linear."""
    lin = tls.linearize(specimen.model, PROMPT, POSITION)
    rows = lin.logits_vjp(torch.eye(len(lin.logits), dtype=torch.float64)[[TARGET, VERSUS]])
    semantic = tls.SemanticScope(TARGET, VERSUS)(lin)
    assert_close(tls.DirectionScope(rows[0] - rows[1], "ln_final")(lin).scores, semantic.scores, **EXACT)


def test_linear_probe(specimen: Specimen) -> None:
    """A trainable weight is a direction as well, in whatever precision, and gets no gradient."""
    probe = torch.nn.Linear(WIDTH, 1)
    lin = tls.linearize(specimen.model, PROMPT, POSITION, of=HOOK)
    answer = tls.DirectionScope(probe.weight[0], HOOK, name="plural")(lin)
    assert_close(answer.scores, tls.DirectionScope(probe.weight[0].detach().double(), HOOK)(lin).scores, rtol=0, atol=0)
    assert answer.unit == "plural per unit of embedding norm"
    assert probe.weight.grad is None
    assert not answer.scores.requires_grad


def test_as_it_is_written() -> None:
    scope = tls.DirectionScope(torch.ones(4), HOOK)
    assert repr(scope) == f"DirectionScope(direction=<4 tensor of norm 2>, hook='{HOOK}')"
    lin = tls.linearize(zoo.specimen("bridge llama").model, PROMPT, of=HOOK)
    answer = tls.DirectionScope(torch.ones(WIDTH, dtype=torch.long), HOOK, name="sum")(lin)
    assert answer.scope == f"DirectionScope(direction=<16 tensor of norm 4>, hook='{HOOK}', name='sum')"
    assert answer.target is None
    assert answer.predictions == ()
    assert tls.Attribution.from_json(answer.to_json()).scope == answer.scope


# -- sparse autoencoders ----------------------------------------------------------------------------------------------


@pytest.fixture
def sae() -> Any:
    """A random one, for the stream after block 0."""
    sae_lens = pytest.importorskip("sae_lens")
    config = sae_lens.StandardSAEConfig(d_in=WIDTH, d_sae=40, dtype="float64", device="cpu")
    config.metadata.hook_name = HOOK
    sae = sae_lens.StandardSAE(config)
    for i, parameter in enumerate(sae.parameters()):
        parameter.data = 0.3 * randn(*parameter.shape, seed=i)
    return sae.eval()


@pytest.fixture
def hooked(sae: Any) -> Any:
    """SAELens' own HookedTransformer, with the weights of the zoo's."""
    import sae_lens

    plain = zoo.specimen("hooked layer norm").model
    model = sae_lens.HookedSAETransformer(plain.cfg)
    model.load_state_dict(plain.state_dict())
    return model.double().eval()


@pytest.mark.parametrize("feature", [0, 17])
def test_sae_feature(hooked: Any, sae: Any, feature: int) -> None:
    """An encoder row: the gradient of the feature's pre-activation wᵀy + b, active or not, by autograd alone."""
    scope = tls.DirectionScope(sae.W_enc[:, feature], HOOK, name=f"feature {feature}")
    answer = scope(tls.linearize(hooked, PROMPT, of=HOOK))
    seen: list[Tensor] = []
    embeddings = hooked.embed(torch.tensor([PROMPT])).detach().requires_grad_()
    with hooked.hooks(
        fwd_hooks=[("hook_embed", lambda value, hook: embeddings), (HOOK, lambda value, hook: seen.append(value))]
    ):
        hooked(torch.tensor([PROMPT]))
    before = (seen[0][0, -1] - sae.b_dec) @ sae.W_enc[:, feature] + sae.b_enc[feature]
    (gradient,) = torch.autograd.grad(before, embeddings)
    assert_close(answer.scores, gradient[0].norm(dim=-1), **EXACT)
    assert answer.unit == f"feature {feature} per unit of embedding norm"


def test_attached_sae(hooked: Any, sae: Any) -> None:
    """With the autoencoder in the model, a unit vector at its own hook asks the same of the same feature."""
    alone = tls.DirectionScope(sae.W_enc[:, 17], HOOK)(tls.linearize(hooked, PROMPT, of=HOOK))
    with hooked.saes(saes=[sae]):
        hook = f"{HOOK}.hook_sae_acts_pre"
        attached = tls.DirectionScope(torch.eye(40)[17], hook)(tls.linearize(hooked, PROMPT, of=hook))
    assert_close(attached.scores, alone.scores, **EXACT)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("direction", "error", "message"),
    [
        (
            [1.0, 2.0],
            TypeError,
            r"a direction must be a tensor of the shape \[d_of\], got list: torch.as_tensor makes one",
        ),
        (np.ones(16), TypeError, "got ndarray"),
        (torch.ones(2, 16), ValueError, r"one vector \[d_of\], got the shape \[2, 16\]: ask once for each"),
        (torch.tensor(1.0), ValueError, r"one vector \[d_of\], got the shape \[\]"),
        (torch.zeros(16), ValueError, r"the direction is zero \(16 entries\)"),
        (torch.tensor([1.0, torch.inf]), ValueError, "a direction must be finite, got NaN or infinite entries"),
        (torch.tensor([1.0, torch.nan]), ValueError, "NaN or infinite entries"),
        (torch.ones(16) + 1j, ValueError, "a direction must be real, got torch.complex64, whose imaginary part would"),
        (torch.ones(16).to_sparse(), ValueError, r"a dense tensor, got one of the layout torch.sparse_coo: call .to_d"),
        (torch.ones(16, device="meta"), ValueError, "a direction must have values, got a tensor on the meta device"),
    ],
)
@pytest.mark.usefixtures("no_type_checks")
def test_bad_directions(direction: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tls.DirectionScope(direction, HOOK)


@pytest.mark.usefixtures("no_type_checks")
def test_names_that_are_none() -> None:
    """Of everything that can be given a name."""
    ones, name = torch.ones(WIDTH), torch.ones(3)
    with pytest.raises(TypeError, match=r"the name of a direction is a str, got tensor\(\[1., 1., 1.\]\)"):
        tls.DirectionScope(ones, HOOK, name=name)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="the name of a metric is a str, got 3"):
        tls.MetricScope(lambda logits: logits.sum(), name=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="the name of features is a str, got b'x'"):
        tls.Features(ones[None], HOOK, name=b"x")  # type: ignore[arg-type]


def test_wrong_width() -> None:
    lin = tls.linearize(zoo.specimen("bridge llama").model, PROMPT, of=HOOK)
    with pytest.raises(ValueError, match=f"direction has 3 entries, the value at '{HOOK}' has 16: name the hook where"):
        tls.DirectionScope(torch.ones(3), HOOK)(lin)


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize("hook", [None, 3])
def test_a_direction_without_a_hook(hook: Any) -> None:
    message = rf"belongs to the hook where it was found, named by a str, got hook={hook}: write DirectionScope\(dire"
    with pytest.raises(TypeError, match=message):
        tls.DirectionScope(torch.ones(WIDTH), hook)


def test_a_direction_of_another_hook() -> None:
    """All hooks of the stream are equally wide: the width says nothing about where a direction was found."""
    model, scope = zoo.specimen("bridge llama").model, tls.DirectionScope(torch.ones(WIDTH), HOOK)
    message = (
        f"the direction belongs to '{HOOK}', and the linearisation ends at 'ln_final': linearise with of='{HOOK}', or, "
        r"if the direction was found there, write DirectionScope\(direction, 'ln_final'\)"
    )
    for ask in (
        lambda: tls.attribute(model, PROMPT, scope),
        lambda: tls.attribution_map(model, PROMPT, scope),
        lambda: list(tls.attribute_many(model, [PROMPT], scope, on_error="raise")),
        lambda: scope(tls.linearize(model, PROMPT)),
        lambda: tls.linearity(tls.linearize(model, PROMPT), scope),
    ):
        with pytest.raises(ValueError, match=message):
            ask()
    expected = scope(tls.linearize(model, PROMPT, of=HOOK)).scores
    assert_close(tls.attribute(model, PROMPT, scope, of=HOOK).scores, expected, **EXACT)
    assert_close(tls.attribution_map(model, PROMPT, scope, of=HOOK)[-1].scores, expected, **EXACT)


def test_no_imaginary_part_is_lost(no_type_checks: None) -> None:
    """In cotangents, tangents, embeddings, functions of the logits, and what a user's own scope gives."""
    lin = tls.linearize(zoo.specimen("bridge llama").model, PROMPT)
    cotangents, tangents = torch.ones(1, WIDTH) + 1j, lin.embeddings[None] + 1j

    class Own(tls.JacobianScope):
        def cotangents(self, lin: tls.Linearization) -> Tensor:
            return cotangents

        def unit(self, lin: tls.Linearization) -> str:
            return "none"

    class Scores(Own):
        def measure_many(self, lins: Any) -> list[tls.Measurement]:
            return [tls.Measurement(torch.ones(len(PROMPT)) + 1j)]

    class Detail(Own):
        def measure_many(self, lins: Any) -> list[tls.Measurement]:
            return [tls.Measurement(torch.ones(len(PROMPT)), {"phase": torch.ones(len(PROMPT)) + 1j})]

    for ask, what in (
        (lambda: lin.vjp(cotangents), "cotangents must be real, got torch.complex64"),
        (lambda: lin.squared_norms(cotangents), "cotangents must be real, got torch.complex64"),
        (lambda: lin.jvp(tangents), "tangents must be real, got torch.complex128"),
        (lambda: lin.logits_jvp(cotangents), "tangents must be real, got torch.complex64"),
        (lambda: lin.logits_vjp(lin.logits[None] * 1j), "cotangents must be real, got torch.complex128"),
        (lambda: lin.at(tangents[0]), "embeddings must be real, got torch.complex128"),
        (lambda: lin.cotangent(lambda logits: logits), r"got a tensor of shape \[\d+\]: sum it up, or choose"),
        (lambda: lin.cotangent(lambda logits: logits.sum() * 1j), "one finite number, a real tensor, got tensor"),
        (lambda: Own()(lin), "the cotangents of .*Own.* must be real, got torch.complex64"),
        (lambda: Scores()(lin), "the scores of .*Scores.* must be real, got torch.complex64"),
        (lambda: Detail()(lin), "the detail 'phase' of .*Detail.* must be real, got torch.complex64"),
    ):
        with pytest.raises(ValueError, match=what):
            ask()
