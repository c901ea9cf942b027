"""Features: from tokens to all that fire, and on to the prediction, exact over the whole stream; lens directions."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import tl_scopes as tls
from tests import zoo
from tests.test_left_as_found import unchanged
from tests.zoo import PROMPT

HOOK, WIDTH = "blocks.0.hook_resid_post", 16
SEMANTIC = tls.SemanticScope(7, versus=3)
EXACT = {"rtol": 1e-10, "atol": 1e-12}
SPECIES = ["bridge llama", "bridge gpt2", "native soft cap", *(["hooked layer norm"] if zoo.HookedTransformer else [])]
TEXT = "The keys to the old cabinet near the door"


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(params=SPECIES)
def model(request: pytest.FixtureRequest) -> Iterator[Any]:
    with zoo.Float64():
        yield zoo.specimen(request.param).model


@pytest.fixture
def llama() -> Iterator[Any]:
    with zoo.Float64():
        yield zoo.specimen("bridge llama").model


@pytest.fixture
def features() -> tls.Features:
    """A random dictionary of which about half fires."""
    encoder, decoder = 0.5 * randn(40, WIDTH), 0.3 * randn(40, WIDTH, seed=1)
    return tls.Features(encoder, HOOK, bias=0.1 * randn(40, seed=2), decoder=decoder)


def whole(width: int = WIDTH, hook: str = HOOK) -> tls.Features:
    """A dictionary that leaves nothing out: a rotation, with a bias under which everything fires."""
    rotation = torch.linalg.qr(randn(width, width)).Q
    return tls.Features(rotation, hook, bias=torch.full((width,), 1e3, dtype=torch.float64), decoder=rotation)


# -- tokens, features, prediction -------------------------------------------------------------------------------------


def test_scores_are_those_of_the_direction(model: Any, features: tls.Features) -> None:
    """For a feature that fires: the Direction Scope of its encoder row, read where it fires."""
    found = tls.feature_map(model, PROMPT, features, at=4)
    lin = tls.linearize(model, PROMPT, 4, of=HOOK)
    before = features.encoder @ lin.readout + features.bias
    assert sorted(found.features) == (before > 0).nonzero()[:, 0].tolist()
    assert_close(found.activations, before[list(found.features)], **EXACT)
    assert (found.activations.diff() <= 0).all()
    for row, feature in enumerate(found.features[:4]):
        assert_close(found.scores[row, :5], features.scope(feature)(lin).scores, **EXACT)
    assert not found.scores[:, 5:].any()


@pytest.mark.parametrize("rules", [None, "linear", "lookup"])
def test_parts_of_all_features_sum_to_the_score(model: Any, rules: str | None) -> None:
    """Over all positions of a dictionary that leaves nothing out, the parts are the score; position by position they
    are those of the stream."""
    lin = tls.linearize(model, PROMPT, rules=rules)
    found = tls.feature_map(model, PROMPT, whole(), SEMANTIC, at=None, rules=rules)
    assert found.rules == rules
    assert found.carried is not None
    assert found.around is not None
    assert len(found.features) == WIDTH * len(PROMPT)
    assert_close(found.carried.sum(0), SEMANTIC(lin).scores, rtol=1e-9, atol=1e-10)
    assert_close(found.around, torch.zeros(len(PROMPT), dtype=torch.float64), rtol=0, atol=1e-10)
    stream = tls.carried_by(lin, SEMANTIC, "position")
    at = torch.tensor(found.positions)
    for position in (2, 7):
        assert_close(found.carried[at == position].sum(0), stream.values[1, position], rtol=1e-9, atol=1e-10)


def test_what_is_left_goes_around(model: Any, features: tls.Features) -> None:
    found = tls.feature_map(model, PROMPT, features, SEMANTIC)
    assert found.carried is not None
    assert found.around is not None
    assert_close(found.carried.sum(0) + found.around, SEMANTIC(tls.linearize(model, PROMPT)).scores, **EXACT)
    first = found.top(3)
    assert first.carried is not None
    assert first.around is not None
    assert_close(first.carried.sum(0) + first.around, found.carried.sum(0) + found.around, **EXACT)


def test_scores_under_rules(model: Any, features: tls.Features) -> None:
    """A feature's own derivative, and the rules' derivative of the stream that it reads."""
    found = tls.feature_map(model, PROMPT, features, at=4, rules="linear")
    lin = tls.linearize(model, PROMPT, 4, of=HOOK, rules="linear")
    for row, feature in enumerate(found.features[:4]):
        assert_close(found.scores[row, :5], features.scope(feature)(lin).scores, **EXACT)
    assert repr(found).endswith("8 tokens under linear rules)")
    assert "features that fire under linear rules" in found.to_html()


def test_an_effect_is_the_slope_of_the_feature(model: Any, features: tls.Features) -> None:
    """The derivative of the logit difference when the feature's part of the stream is scaled."""
    found = tls.feature_map(model, PROMPT, features, SEMANTIC, at=5)
    assert found.effects is not None
    assert features.decoder is not None
    feature, activation = found.features[0], found.activations[0]
    written = activation * features.decoder[feature]

    def difference(h: float) -> float:
        def add(value: Tensor, hook: Any) -> Tensor:
            value = value.clone()
            value[0, 5] += h * written
            return value

        with torch.no_grad(), model.hooks(fwd_hooks=[(HOOK, add)]):
            last = model(torch.tensor([PROMPT]))[0, -1]
        return (last[7] - last[3]).item()

    slope = (difference(1e-4) - difference(-1e-4)) / 2e-4
    assert found.effects[0].item() == pytest.approx(slope, rel=1e-4, abs=1e-8)


def test_of_heads(llama: Any) -> None:
    """A dictionary of what heads give out, with the heads one after another."""
    hook = "blocks.0.attn.hook_z"
    found = tls.feature_map(llama, PROMPT, whole(32, hook), SEMANTIC, at=None)
    heads = tls.carried_by(tls.linearize(llama, PROMPT), SEMANTIC, "head")
    assert found.carried is not None
    assert_close(found.carried.sum(0), heads.values[0].sum(0), rtol=1e-9, atol=1e-10)


def test_from_another_hook(llama: Any, features: tls.Features) -> None:
    found = tls.feature_map(llama, PROMPT, features, wrt="blocks.0.hook_resid_pre", at=2)
    assert (found.wrt, found.effects, found.unit) == ("blocks.0.hook_resid_pre", None, None)


def test_batches_change_no_number(llama: Any, features: tls.Features, monkeypatch: pytest.MonkeyPatch) -> None:
    together = tls.feature_map(llama, PROMPT, features, SEMANTIC)
    zoo.batches_of(monkeypatch, 1)
    assert_close(tls.feature_map(llama, PROMPT, features, SEMANTIC).scores, together.scores, **EXACT)


def test_the_model_is_left_as_found(llama: Any, features: tls.Features) -> None:
    with unchanged(llama):
        tls.feature_map(llama, PROMPT, features, SEMANTIC)


@pytest.mark.parametrize("part", ["q", "k"])
def test_rules_hold_what_features_write(llama: Any, part: str) -> None:
    """Under held patterns queries and keys do nothing: features there fire, and have no effect."""
    hook, width = f"blocks.1.attn.hook_{part}", 32 if part == "q" else 16
    found = tls.feature_map(llama, PROMPT, whole(width, hook), SEMANTIC, rules="linear")
    assert found.scores.any()
    assert found.effects is not None
    assert found.carried is not None
    assert found.around is not None
    assert not found.effects.any()
    assert not found.carried.any()
    assert_close(found.around, SEMANTIC(tls.linearize(llama, PROMPT, rules="linear")).scores, **EXACT)


@pytest.mark.parametrize("rules", [None, "linear"])
def test_features_on_a_side_branch(llama: Any, rules: str | None) -> None:
    """What nothing reads can be asked about by itself, and gives nothing to the prediction."""
    features = whole(hook="ln_final.hook_normalized")
    assert tls.feature_map(llama, PROMPT, features, rules=rules).scores.any()
    with pytest.raises(ValueError, match="'ln_final' does not depend on 'ln_final.hook_normalized': it is a side bran"):
        tls.feature_map(llama, PROMPT, features, SEMANTIC, rules=rules)


def test_features_of_what_does_not_follow_from_the_tokens(llama: Any) -> None:
    hook = "blocks.0.attn.hook_z"
    with llama.hooks(fwd_hooks=[(hook, lambda value, hook: value.detach())]):
        for scope in (None, SEMANTIC):
            with pytest.raises(ValueError, match=f"the value at '{hook}' does not depend on 'hook_embed'"):
                tls.feature_map(llama, PROMPT, whole(32, hook), scope)


# -- forms ------------------------------------------------------------------------------------------------------------


def test_rows_and_pictures(llama: Any, features: tls.Features) -> None:
    found = tls.feature_map(llama, PROMPT, features, SEMANTIC, at=[4, 5])
    assert repr(features) == "Features(40 of 16 dimensions at blocks.0.hook_resid_post)"
    assert f"{len(found.features)} features fire at 2 positions of {HOOK}; 8 tokens, SemanticScope(" in repr(found)
    assert found.names[0].startswith(f"F{found.features[0]} at ")
    first = found.top(1)
    assert found.effects is not None
    assert first.effects is not None
    assert first.effects.abs().item() == found.effects.abs().max().item()
    frame = found.to_dataframe()
    assert len(frame) == len(found.features) * 8
    assert {"feature", "at", "activation", "token", "score", "effect", "carried"} < set(frame.columns)
    assert found.plot().axes
    alone = tls.feature_map(llama, PROMPT, features, at=4)
    assert alone.names[0] == f"F{alone.features[0]}"
    assert alone.top(1).features == alone.features[:1]
    assert alone.plot().axes
    for one in (found, alone):
        assert "<script" not in one.to_html()
        assert one._repr_html_() in one.to_html()
    assert "effect" not in alone.to_dataframe()


# -- SAELens ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["StandardSAE", "JumpReLUSAE", "TopKSAE"])
def sae(request: pytest.FixtureRequest) -> Any:
    sae_lens = pytest.importorskip("sae_lens")
    more = {"k": 6} if request.param == "TopKSAE" else {}
    config = getattr(sae_lens, f"{request.param}Config")(d_in=WIDTH, d_sae=40, dtype="float64", device="cpu", **more)
    config.metadata.hook_name = HOOK
    made = getattr(sae_lens, request.param)(config)
    for i, parameter in enumerate(made.parameters()):
        parameter.data = 0.3 * randn(*parameter.shape, seed=i)
    return made.eval()


def test_of_an_autoencoder(llama: Any, sae: Any) -> None:
    """Its own activation function says what fires; the gradient of that is by autograd alone."""
    features = tls.Features.of_sae(sae)
    assert repr(features) == f"Features({type(sae).__name__}: 40 of 16 dimensions at {HOOK})"
    found = tls.feature_map(llama, PROMPT, features, SEMANTIC)
    lin = tls.linearize(llama, PROMPT, of=HOOK)
    with torch.no_grad():
        own = sae.encode(lin.readout)
    assert sorted(found.features) == (own > 0).nonzero()[:, 0].tolist()
    assert_close(found.activations, own[list(found.features)], **EXACT)
    for row, feature in enumerate(found.features[:3]):
        h = lin.readout.clone().requires_grad_()
        (slope,) = torch.autograd.grad(sae.encode(h)[feature], h)
        assert_close(found.scores[row], lin.vjp(slope[None])[0].norm(dim=-1), **EXACT)


def test_of_an_autoencoder_of_heads(llama: Any) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    hook = "blocks.0.attn.hook_z"
    config = sae_lens.StandardSAEConfig(d_in=32, d_sae=50, dtype="float64", device="cpu", reshape_activations="hook_z")
    config.metadata.hook_name = hook
    made = sae_lens.StandardSAE(config).eval()
    found = tls.feature_map(llama, PROMPT, tls.Features.of_sae(made), SEMANTIC)
    assert found.hook == hook
    assert (found.activations > 0).all()


def test_autoencoders_that_are_refused(llama: Any) -> None:
    class Plain:
        W_enc, W_dec = randn(WIDTH, 40), randn(40, WIDTH)

        def encode(self, value: Tensor) -> Tensor:
            return (value @ self.W_enc).relu()

    class Transcoder(Plain):
        pass

    class Rescaled(Plain):
        class cfg:  # noqa: N801
            normalize_activations, hook_name = "layer_norm", HOOK

    with pytest.raises(TypeError, match="expected a sparse autoencoder with W_enc, W_dec and encode, got int"):
        tls.Features.of_sae(3)
    with pytest.raises(TypeError, match="a Transcoder reads at one hook and writes at another"):
        tls.Features.of_sae(Transcoder(), HOOK)
    with pytest.raises(ValueError, match="does not say which hook it belongs to"):
        tls.Features.of_sae(Plain())
    with pytest.raises(ValueError, match="rescales what it reads .normalize_activations='layer_norm'."):
        tls.Features.of_sae(Rescaled())
    assert tls.feature_map(llama, PROMPT, tls.Features.of_sae(Plain(), HOOK), SEMANTIC).scores.any()


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"encoder": [[1.0]]}, TypeError, "an encoder must be a tensor"),
        ({"encoder": torch.ones(16)}, ValueError, "an encoder has a row for each feature"),
        ({"encoder": torch.full((3, 16), float("nan"))}, ValueError, "an encoder must be finite"),
        ({"bias": torch.ones(3)}, ValueError, r"a bias of these 40 features of 16 dimensions has the shape \[40\]"),
        ({"decoder": torch.ones(16, 40)}, ValueError, r"a decoder of .* has the shape \[40, 16\], got \[16, 40\]"),
        ({"decoder": torch.full((40, 16), float("inf"))}, ValueError, "a decoder must be finite"),
        ({"hook": 3}, TypeError, "features belong to the hook where they are read"),
    ],
)
def test_bad_features(arguments: dict[str, Any], error: type[Exception], match: str, no_type_checks: None) -> None:
    with pytest.raises(error, match=match):
        tls.Features(**{"encoder": torch.ones(40, 16), "hook": HOOK} | arguments)


def test_bad_questions(llama: Any, features: tls.Features, no_type_checks: None) -> None:
    def ask(some: Any, scope: Any = None, **options: Any) -> None:
        tls.feature_map(llama, PROMPT, some, scope, **options)

    with pytest.raises(TypeError, match="expected Features, got Tensor"):
        ask(torch.ones(40, 16))
    with pytest.raises(ValueError, match="have no decoder, so that it is not known what they give"):
        ask(tls.Features(features.encoder, HOOK), SEMANTIC)
    with pytest.raises(ValueError, match="the features have 12 dimensions, and the value at .* has 16"):
        ask(tls.Features(torch.ones(3, 12), HOOK))
    with pytest.raises(ValueError, match="no feature of .* fires at '<.*>'"):
        ask(tls.Features(features.encoder, HOOK, bias=torch.full((40,), -1e6)))
    with pytest.raises(ValueError, match="does not lie between 'blocks.1.hook_resid_post' and the prediction"):
        ask(features, wrt="blocks.1.hook_resid_post")
    for scope in (tls.FisherScope(exact=True), tls.FisherScope(rtol=0.1)):
        with pytest.raises(TypeError, match="asks with .* cotangents, and a feature's effect is on one number"):
            ask(features, scope)
    with pytest.raises(TypeError, match="take SemanticScope, DirectionScope, TemperatureScope, MetricScope, or a Jac"):
        ask(features, tls.RelevanceScope(7))
    with pytest.raises(ValueError, match="is 2 tokens, .* and a feature's effect is on one prediction: name one token"):
        ask(features, tls.SemanticScope([7, 3]))
    with pytest.raises(ValueError, match="the model has no hook 'blocks.9"):
        ask(tls.Features(features.encoder, "blocks.9.hook_resid_post"))
    with pytest.raises(ValueError, match="there are 40 features, from 0 on, got 40"):
        features.scope(40)
    with pytest.raises(TypeError, match="a feature is a number"):
        features.scope("3")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("encode", "error", "match"),
    [
        (
            lambda h: h.detach().relu(),
            ValueError,
            "cannot be differentiated with respect to what they read: let encode",
        ),
        (lambda h: (h > 0).to(h), ValueError, "cannot be differentiated with respect to what they read: let encode"),
        (
            lambda h: h[:, :12].relu(),
            ValueError,
            r"what encode gives must have the shape .* = \[8, 16\], got \[8, 12\]",
        ),
        (lambda h: h.repeat(1, 2), ValueError, r"what encode gives must have the shape .* = \[8, 16\], got \[8, 32\]"),
        (lambda h: h * float("nan"), ValueError, "what encode gives must be finite"),
        (lambda h: (h.relu(), h), TypeError, "what encode gives must be a tensor .*, got tuple"),
    ],
)
def test_encoders_that_do_not_fit(llama: Any, encode: Any, error: Any, match: str, no_type_checks: None) -> None:
    features = tls.Features(torch.eye(WIDTH), HOOK, decoder=torch.eye(WIDTH), encode=encode)
    for scope in (None, SEMANTIC):
        with pytest.raises(error, match=match):
            tls.feature_map(llama, PROMPT, features, scope)


def test_an_encoder_that_stops_gradients(llama: Any) -> None:
    """Also where it has weights that could be trained, so that something of it can be differentiated."""
    weight = torch.eye(WIDTH, requires_grad=True)
    for encode in (torch.no_grad()(torch.relu), lambda h: h.detach() @ weight.to(h)):
        features = tls.Features(torch.eye(WIDTH), HOOK, encode=encode)
        with pytest.raises(ValueError, match="without torch.no_grad, detach or item"):
            tls.feature_map(llama, PROMPT, features)


# -- Jacobian lenses --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lens(tiny: Any) -> Any:
    """A lens fitted on the bundled model, by TransformerLens."""
    analysis = pytest.importorskip("transformer_lens.tools.analysis")
    if not hasattr(analysis, "JacobianLens"):
        pytest.skip("TransformerLens 3.9 has no JacobianLens")
    prompts = [
        f"The {noun} near the old {place}" for noun in ("key", "keys", "dog", "dogs") for place in ("door", "box")
    ]
    return analysis.JacobianLens.fit(tiny, prompts, corpus="test", skip_first_positions=1, show_progress=False)


def test_a_lens_direction_is_the_lens(lens: Any, tiny: Any) -> None:
    """Its projection is the lens' own reading before the norm, and its scores are the slope of that."""
    scope = tls.lens_direction(lens, tiny, " are", 3)
    lin = tls.linearize(tiny, TEXT, of=scope.hook)
    transported = lens.transport(lin.readout, 3)
    expected = (transported @ tiny.W_U[:, tiny.to_single_token(" are")]).item()
    assert (scope.direction @ lin.readout).item() == pytest.approx(expected, rel=1e-4)
    answer = scope(lin)
    assert answer.unit == "lens ' are' per unit of embedding norm"
    step = 1e-3 * lin.vjp(scope.cotangents(lin))[0]
    ahead, behind = (lin.evaluate((lin.embeddings + sign * step)[None])[0][0] for sign in (1, -1))
    slope = ((ahead - behind) @ scope.direction / 2).item()
    assert slope == pytest.approx((1e3 * step.square().sum()).item(), rel=1e-2)
    assert tls.lens_direction(lens, tiny, " are", -3).hook == scope.hook


def test_which_token_puts_the_word_there(lens: Any, tiny: Any) -> None:
    """The number of the noun decides between both verbs in the middle of the network, and the noun is found."""
    scope = tls.lens_direction(lens, tiny, " are", layer=3, versus=" is")
    assert scope.name == "lens ' are' − ' is'"
    plural, singular = (tls.linearize(tiny, text, of=scope.hook) for text in (TEXT, TEXT.replace("keys", "key")))
    assert scope.direction @ plural.readout > scope.direction @ singular.readout
    assert scope(plural).top(1)[0].token == " keys"
    assert tls.carried_by(plural, scope, tokens=" keys").top(1)[0].at == " door"


def test_bad_lenses(lens: Any, tiny: Any, llama: Any, no_type_checks: None) -> None:
    with pytest.raises(ValueError, match="not in this lens's source layers"):
        tls.lens_direction(lens, tiny, " are", 5)
    with pytest.raises(ValueError, match="lens was fitted for"):
        tls.lens_direction(lens, llama, 7, 0)
    with pytest.raises(TypeError, match="a layer is an integer"):
        tls.lens_direction(lens, tiny, " are", "3")  # type: ignore[arg-type]


def test_something_else_than_a_lens(llama: Any) -> None:
    with pytest.raises(TypeError, match="expected a fitted JacobianLens, got Tensor"):
        tls.lens_direction(torch.eye(3), llama, 7, 0)
