"""Metrics, pairs of prompts, and agreement with TransformerLens' own activation patching."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformer_lens import patching

import tl_scopes as tls
from tests import zoo
from tests.test_attention import MORE
from tests.test_left_as_found import unchanged
from tests.zoo import PROMPT

CLEAN, CORRUPTED = "The keys to the old cabinet near the door", "The key to the old cabinet near the door"
SHORT = "The keys to the door near the cabinet", "The key to the door near the cabinet"
SCOPE = tls.SemanticScope(" are", versus=" is")
EXACT = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture(scope="module")
def pairs(tiny: Any) -> list[tls.PromptPair]:
    texts = [(CLEAN, CORRUPTED), SHORT]
    return [tls.PromptPair(tiny, clean, corrupted, answer=" are", wrong=" is") for clean, corrupted in texts]


@pytest.fixture(scope="module")
def compared(pairs: list[tls.PromptPair]) -> tls.Agreement:
    return tls.agreement(pairs, sites=("head_out", "resid_pre"), top=4)


# -- metrics ----------------------------------------------------------------------------------------------------------


def difference(logits: Tensor) -> Tensor:
    """As circuit papers write it."""
    last = logits[:, -1, :]
    return (last[:, 7] - last[:, 3]).mean()


@pytest.mark.parametrize("species", ["bridge llama", "bridge gpt2", "native soft cap"])
def test_a_metric_is_a_scope(species: str) -> None:
    """A difference of logits is the Semantic Scope of it."""
    with zoo.Float64():
        lin = tls.linearize(zoo.specimen(species).model, PROMPT)
        answer = tls.MetricScope(difference)(lin)
        assert_close(answer.scores, tls.SemanticScope(7, versus=3)(lin).scores, **EXACT)
        assert (answer.scope, answer.unit) == (
            "MetricScope(name='difference')",
            "difference per unit of embedding norm",
        )
        assert answer.quantity == "difference"
        assert answer.value == pytest.approx(difference(lin.logits[None, None]).item())
        assert_close(
            tls.carried_by(lin, tls.MetricScope(difference), tokens=2).values,
            tls.carried_by(lin, tls.SemanticScope(7, versus=3), tokens=2).values,
            **EXACT,
        )
        assert tls.MetricScope(lambda logits: logits.logsumexp(-1), name="lse")(lin).scores.all()


def test_checks_measure_the_metric(tiny: Any) -> None:
    """The checks of a difference of logits are those of the Semantic Scope of it, at a prompt and of an answer."""
    scope, same = tls.MetricScope(difference), tls.SemanticScope(7, versus=3)
    for options in ({}, {"answer": " are"}):
        lin = tls.linearize(tiny, CLEAN, **options)
        alone = tls.linearize(tiny, CLEAN)
        metric = scope.joint_metric(lin)
        assert metric(lin.readout, lin.logits).item() == pytest.approx(difference(alone.logits[None, None]).item())
        found, expected = tls.check(lin, scope), tls.check(alone, same)
        for name in ("linearity", "saturation", "leave-one-out", "weights"):
            assert found[name].finding == expected[name].finding
            assert found[name].verdict == expected[name].verdict != "not applicable"
        report, other = tls.linearity(lin, scope, positions=[2]), tls.linearity(alone, same, positions=[2])
        assert_close(report.radius, other.radius)
        assert_close(report.predicted_radius, other.predicted_radius)
    assert repr(scope) == "MetricScope(name='difference')"
    assert repr(tls.MetricScope(lambda logits: logits[0, -1, 1])) == "MetricScope(name='metric')"


def test_a_metric_of_centred_logits() -> None:
    """A single logit is counted from the mean there; a difference is not."""
    with zoo.Float64():
        model = zoo.SPECIES["bridge gpt2"]().model
        model.enable_compatibility_mode()
        lin = tls.linearize(model, PROMPT)
        assert tls.MetricScope(difference)(lin).notes == lin.notes
        [note] = set(tls.MetricScope(lambda logits: logits[0, -1, 7])(lin).notes) - set(lin.notes)
        lin = tls.linearize(model, PROMPT, answer=[5, 7])
        assert tls.MetricScope(difference)(lin).notes == lin.notes
        assert note in tls.MetricScope(lambda logits: logits[0, -1, 7])(lin).notes
    assert "the metric counts logits from the vocabulary mean" in note


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (lambda logits: logits[:, -1, :2], "must give one finite number"),
        (lambda logits: logits[0, -1, 0].item(), "must give one finite number"),
        (lambda logits: logits[0, -1].argmax(), "cannot be differentiated with respect to them"),
        (lambda logits: logits[0, -1, 0].detach(), "cannot be differentiated with respect to them"),
        (lambda logits: logits[0, 3, 0], "looks for something that is not there.*sees the logits of one position"),
        (lambda logits: logits[0, -1, 0] * float("nan"), "must give one finite number"),
    ],
)
def test_bad_metrics(tiny: Any, function: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        tls.attribute(tiny, CLEAN, tls.MetricScope(function))


def test_something_else_than_a_metric(tiny: Any, no_type_checks: None) -> None:
    with pytest.raises(TypeError, match="a metric is a function of the logits"):
        tls.MetricScope(" are")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs the logits, and the linearisation ends at 'blocks.2.hook_resid_post'"):
        tls.attribute(tiny, CLEAN, tls.MetricScope(difference), of="blocks.2.hook_resid_post")


def test_a_scope_is_a_patching_metric(tiny: Any) -> None:
    lin = tls.linearize(tiny, CLEAN)
    metric = tls.patching_metric(SCOPE, lin)
    logits = tiny(lin.tokens[None])
    are, versus = (tiny.to_single_token(text) for text in (" are", " is"))
    assert metric(logits).item() == pytest.approx((logits[0, -1, are] - logits[0, -1, versus]).item(), rel=1e-5)
    assert metric(logits.expand(3, -1, -1)).shape == (3,)
    log_prob = tls.patching_metric(tls.SemanticScope(" are", quantity="log_prob"), lin)
    assert log_prob(logits).item() == pytest.approx(logits[0, -1].log_softmax(-1)[are].item(), rel=1e-5)
    again = tls.patching_metric(tls.MetricScope(difference), lin)
    assert again(logits).item() == pytest.approx(difference(logits).item(), rel=1e-5)


def test_a_patching_metric_of_one_token_of_an_answer(tiny: Any) -> None:
    """It is the metric of the next prediction; several predictions are not at the last position."""
    lin = tls.linearize(tiny, CLEAN, answer=" are")
    logits = tiny(tls.linearize(tiny, CLEAN).tokens[None])
    for scope in (SCOPE, tls.MetricScope(difference), tls.HetaScope(" are")):
        expected = tls.patching_metric(scope, tls.linearize(tiny, CLEAN))(logits)
        assert_close(tls.patching_metric(scope, lin)(logits), expected)
    longer = tls.linearize(tiny, CLEAN, answer=" are old")
    for scope, lin in ((tls.SemanticScope(), longer), (tls.SemanticScope(" are old"), tls.linearize(tiny, CLEAN))):
        with pytest.raises(ValueError, match="reads the last position, and SemanticScope.* is about 2 predictions"):
            tls.patching_metric(scope, lin)


def test_bad_patching_metrics(tiny: Any, no_type_checks: None) -> None:
    lin = tls.linearize(tiny, CLEAN)
    with pytest.raises(TypeError, match="expected a scope such as SemanticScope"):
        tls.patching_metric(difference, lin)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is about 1621 numbers, and a patching metric is one number"):
        tls.patching_metric(tls.FisherScope(), lin)
    with pytest.raises(ValueError, match="is about the readout, and a patching metric is one number"):
        tls.patching_metric(tls.TemperatureScope(), lin)
    with pytest.raises(ValueError, match="is not about a number of the logits"):
        tls.patching_metric(tls.PositionCorrectedScope(tls.SemanticScope()), lin)


# -- pairs ------------------------------------------------------------------------------------------------------------


def test_a_pair(pairs: list[tls.PromptPair], tiny: Any) -> None:
    pair = pairs[0]
    assert pair.differing == (2,)
    assert pair.is_confirmed
    assert pair.clean_value == pytest.approx(
        SCOPE.function(tls.linearize(tiny, CLEAN))(tls.linearize(tiny, CLEAN).logits).item()
    )
    assert pair.clean_value > 0 > pair.corrupted_value
    assert repr(pair).startswith("PromptPair(' are' against ' is': ' keys' for ' key' of 10 tokens; 6.7 and -7.9)")
    alone = tls.PromptPair(tiny, CLEAN, CORRUPTED, answer=" are")
    assert alone.clean_value == pytest.approx(tls.linearize(tiny, CLEAN).log_probs.max().item(), rel=1e-5)
    assert not alone.is_confirmed
    assert alone.scope == tls.SemanticScope(" are", quantity="log_prob")


def test_bad_pairs(tiny: Any) -> None:
    with pytest.raises(
        ValueError, match=r"got 10 and 9. From position 5 they read \[' old', ' cabinet'.*\] and \[' cab"
    ):
        tls.PromptPair(tiny, CLEAN, "The keys to the cabinet near the door", answer=" are", wrong=" is")
    with pytest.raises(ValueError, match="the prompts of the pair are the same"):
        tls.PromptPair(tiny, CLEAN, CLEAN, answer=" are", wrong=" is")
    with pytest.raises(ValueError, match="target and versus are the same token, ' is'"):
        tls.PromptPair(tiny, CLEAN, CORRUPTED, answer=" is", wrong=" is")
    with pytest.raises(ValueError, match="'quite unknown' is 8 tokens, which are predicted at several positions"):
        tls.PromptPair(tiny, CLEAN, CORRUPTED, answer="quite unknown", wrong=" is")
    with pytest.raises(ValueError, match="' not' .* the metric of a pair is about one prediction: name one token"):
        tls.PromptPair(tiny, CLEAN, CORRUPTED, answer=" are", wrong=" not")


def test_a_pair_that_differs_in_nothing_that_matters() -> None:
    linear = zoo.linear_toy().model
    with pytest.raises(ValueError, match="the metric is .* at both prompts: what differs, .*, does not matter to it"):
        tls.PromptPair(linear, [3, 5, 4], [3, 6, 4], answer=1, wrong=2)


def test_a_sure_answer_is_a_number_like_any_other() -> None:
    """Its log-probability is near zero, and keeps all digits: the pair's metric is what its scope explains."""
    model = zoo.SPECIES["bridge llama"]().model.float()
    with torch.no_grad():
        model.original_model.lm_head.weight.mul_(150)
    answer = int(tls.linearize(model, PROMPT).logits.argmax())
    others = [[*PROMPT[:3], other, *PROMPT[4:]] for other in range(3, 30)]
    same = next(o for o in others if o != PROMPT and int(tls.linearize(model, o).logits.argmax()) == answer)
    pair = tls.PromptPair(model, PROMPT, same, answer=answer)
    for prompt, value in ((PROMPT, pair.clean_value), (same, pair.corrupted_value)):
        lin = tls.linearize(model, prompt)
        assert value == pair.scope.value(lin) == pair.metric(lin.logits[None, None]).item()
        left = torch.cat([lin.logits[:answer], lin.logits[answer + 1 :]]).double() - lin.logits[answer].double()
        assert 0 > value == pytest.approx(-left.logsumexp(0).exp().log1p().item(), rel=1e-9)
    assert abs(pair.clean_value - pair.corrupted_value) < 1e-6


def test_a_pair_belongs_to_the_model_that_it_was_made_with() -> None:
    """Inside hooks it is made and asked there; a metric of one model is never compared with runs of another."""

    def halve(value: Tensor, hook: Any) -> Tensor:
        return value / 2

    with zoo.Float64():
        model = zoo.SPECIES["bridge llama"]().model

        def make() -> tls.PromptPair:
            return tls.PromptPair(model, PROMPT, [*PROMPT[:2], 20, *PROMPT[3:]], answer=7, wrong=3)

        def values(of: tls.PromptPair) -> list[Tensor]:
            asked = (of.activation_patching, of.attribution_patching, of.carried)
            return [ask("mlp_out").values for ask in asked]

        def hooked() -> Any:
            return model.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", halve)])

        def refused(pair: tls.PromptPair, changed: str) -> None:
            asked = (pair.activation_patching, pair.attribution_patching, pair.carried, lambda: tls.agreement([pair]))
            for ask in asked:
                with pytest.raises(ValueError, match=f"so make another PromptPair: {changed}"):
                    ask()

        before = make()
        with hooked():
            refused(before, "the hooks at .*blocks.0.hook_mlp_out.* inside the same model.hooks")
            inside = make()
            expected = values(inside)
        refused(inside, "the hooks at")
        with hooked():
            for one, other in zip(values(inside), expected, strict=True):
                assert_close(one, other, **EXACT)
        values(before)
        with torch.no_grad():
            model.original_model.lm_head.weight.mul_(2)
        refused(before, "the weights have changed")
        model.train()
        with pytest.raises(ValueError, match=r"model\.eval\(\)"):
            before.activation_patching()


class Scaled(tls.PromptPair):
    """A pair whose metric is a small part of the difference of two logits."""

    factor = 1.0

    @property
    def scope(self) -> Any:
        answer, wrong, factor = self.answer, self.wrong, self.factor
        return tls.MetricScope(lambda logits: factor * (logits[0, -1, answer] - logits[0, -1, wrong]))


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float16, 2.0**-20), (torch.float32, 2.0**-140)])
def test_a_factor_of_the_metric_is_a_factor_of_its_effects(dtype: torch.dtype, factor: float) -> None:
    """Also where the model's own precision would lose so small a gradient, or the answer's so small an effect."""
    model = zoo.SPECIES["bridge llama"]().model.to(dtype)
    kinds = (Scaled, type("Small", (Scaled,), {"factor": factor}))
    pair, small = (kind(model, PROMPT, [*PROMPT[:3], 4, *PROMPT[4:]], answer=7, wrong=3) for kind in kinds)

    def both(ask: Any) -> None:
        one, other = ask(pair), ask(small)
        assert one.any()
        assert_close(other.double(), factor * one.double(), rtol=1e-6, atol=0)

    for site in ("head_out", "mlp_out"):
        both(lambda of, site=site: of.attribution_patching(site).values)
        both(lambda of, site=site: of.attribution_patching(site, order=2, products=100).values)
    both(lambda of: of.carried("head_out").values)
    for ask in (tls.head_map, tls.layer_map):
        both(lambda of, ask=ask: ask(model, PROMPT, of.scope).scores)
    E = torch.eye(16, dtype=dtype)
    features = tls.Features(E, "blocks.0.hook_resid_post", decoder=E)
    both(lambda of: tls.feature_map(model, PROMPT, features, of.scope).effects)
    both(lambda of: tls.feature_map(model, PROMPT, features, of.scope).carried)
    for by in ("position", "layer", "qkv", "neuron"):
        both(lambda of, by=by: tls.carried_by(tls.linearize(model, PROMPT), of.scope, by, 2).values)


def test_patching_is_transformer_lens_own(pairs: list[tls.PromptPair], tiny: Any) -> None:
    """One head by hand: its output of the clean run in the corrupted one."""
    pair = pairs[0]
    clean, corrupted = (tiny.to_tokens(text) for text in (CLEAN, CORRUPTED))
    _, cache = tiny.run_with_cache(clean)

    def put(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        value[:, :, 2] = cache["blocks.2.attn.hook_z"][:, :, 2]
        return value

    with torch.no_grad(), tiny.hooks(fwd_hooks=[("blocks.2.attn.hook_z", put)]):
        expected = pair.metric(tiny(corrupted)).item() - pair.corrupted_value
    effects = pair.activation_patching()
    assert effects.values[2, 2].item() == pytest.approx(expected, rel=1e-4)
    assert effects.normalized[2, 2].item() == pytest.approx(
        expected / (pair.clean_value - pair.corrupted_value), rel=1e-4
    )
    assert repr(effects).startswith("Effects(activation patching of head_out: 6 x 4; the largest is L2H2, ")
    assert effects.names[10] == "L2H2"
    assert pair.activation_patching("resid_pre").names[12] == "L1 at ' key'"


def test_at_the_first_layer_the_stream_is_all() -> None:
    """Of the stream before the first layer, patching the token that differs gives the clean run, whatever the model."""
    with zoo.Float64():
        model = zoo.specimen("bridge llama").model
        pair = tls.PromptPair(model, PROMPT, [*PROMPT[:2], 20, *PROMPT[3:]], answer=7, wrong=3)
        effects = pair.activation_patching("resid_pre")
    assert effects.normalized[0, 2].item() == pytest.approx(1.0, rel=1e-5)
    assert effects.normalized[0, 1].item() == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("site", ["head_out", "resid_pre", "attn_out", "mlp_out"])
def test_attribution_patching_is_the_slope(site: Any) -> None:
    """(k_clean − k_corrupted) · ∂metric/∂k: the derivative of patching by degrees."""
    with zoo.Float64():
        model = zoo.specimen("bridge llama").model
        clean, corrupted = PROMPT, [*PROMPT[:2], 20, *PROMPT[3:]]
        pair = tls.PromptPair(model, clean, corrupted, answer=7, wrong=3)
        effects = pair.attribution_patching(site)
        name = {"head_out": "attn.hook_z"}.get(site, f"hook_{site}")
        _, cache = model.run_with_cache(torch.tensor([clean]))
        h = 1e-4

        def patched(size: float, layer: int, place: int) -> float:
            hook = f"blocks.{layer}.{name}"

            def put(value: Tensor, hook: Any) -> Tensor:
                value, to = value.clone(), cache[f"blocks.{layer}.{name}"]
                at = (slice(None), slice(None), place) if site == "head_out" else (slice(None), place)
                value[at] += size * (to[at] - value[at])
                return value

            with torch.no_grad(), model.hooks(fwd_hooks=[(hook, put)]):
                return pair.metric(model(torch.tensor([corrupted]))).item()

        for layer, place in ((0, 2), (1, 1), (1, 3)):
            slope = (patched(h, layer, place) - patched(-h, layer, place)) / (2 * h)
            assert effects.values[layer, place].item() == pytest.approx(slope, rel=1e-3, abs=1e-5)


SITES = ["head_out", "resid_pre", "attn_out", "mlp_out"]


@pytest.mark.parametrize("site", ["head_out", "resid_pre", "attn_out"])
def test_of_a_quadratic_metric_the_second_order_is_patching(site: Any) -> None:
    """Attention that is the same sum for every prompt, and a readout y + y²: the metric is quadratic in every part."""
    with zoo.Float64():
        model = zoo.linear_toy().model
        with model.hooks(fwd_hooks=[("unembed.hook_in", lambda value, hook: value + value * value)]):
            pair = tls.PromptPair(model, PROMPT, [*PROMPT[:2], 20, *PROMPT[3:]], answer=7, wrong=3)
            truth = pair.activation_patching(site)
            found = pair.attribution_patching(site, order=2, products=10_000)
            first = pair.attribution_patching(site)
    assert (found.method, found.standard_error) == ("second order", None)
    assert_close(found.values, truth.values.double(), rtol=1e-5, atol=1e-6)  # patching answers in float32
    assert_close(found.first_order, first.values, rtol=1e-5, atol=1e-6)
    assert (found.values - first.values).abs().max() > 0.01 * first.values.abs().max()


@pytest.mark.parametrize("species", ["bridge llama", "bridge gemma2", "native soft cap"])
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("wrong", [3, None])
def test_the_second_order_is_the_curvature(species: str, site: Any, wrong: int | None) -> None:
    """½ d²/ds² of the metric with one part replaced by s of its change, also where it bends in the logits."""
    with zoo.Float64():
        model = zoo.specimen(species).model
        clean, corrupted = PROMPT, [*PROMPT[:2], 20, *PROMPT[3:]]
        pair = tls.PromptPair(model, clean, corrupted, answer=7, wrong=wrong)
        found = pair.attribution_patching(site, order=2, products=10_000)
        assert found.first_order is not None
        assert_close(found.first_order, pair.attribution_patching(site).values, rtol=1e-5, atol=1e-7)
        name = {"head_out": "attn.hook_z"}.get(site, f"hook_{site}")
        _, cache = model.run_with_cache(torch.tensor([clean]))

        def patched(size: float, layer: int, place: int) -> float:
            def put(value: Tensor, hook: Any) -> Tensor:
                value, to = value.clone(), cache[f"blocks.{layer}.{name}"]
                at = (slice(None), slice(None), place) if site == "head_out" else (slice(None), place)
                value[at] += size * (to[at] - value[at])
                return value

            with torch.no_grad(), model.hooks(fwd_hooks=[(f"blocks.{layer}.{name}", put)]):
                return pair.metric(model(torch.tensor([corrupted]))).item()

        h = 1e-3
        for layer, place in ((0, 2), (1, 1), (1, 3)):
            if place >= found.values.shape[1]:
                continue
            bend = (patched(h, layer, place) - 2 * patched(0, layer, place) + patched(-h, layer, place)) / h**2
            second = found.values[layer, place] - found.first_order[layer, place]
            assert second.item() == pytest.approx(bend / 2, rel=2e-3, abs=2e-6)


def test_estimates_of_the_second_order_are_unbiased() -> None:
    """Over seeds the mean meets the exact one, and the standard error is honest."""
    with zoo.Float64():
        model = zoo.specimen("bridge llama").model
        pair = tls.PromptPair(model, PROMPT, [*PROMPT[:2], 20, *PROMPT[3:]], answer=7, wrong=3)
        exact = pair.attribution_patching(order=2, products=8).values
        off = []
        for seed in range(60):
            found = pair.attribution_patching(order=2, products=6, generator=torch.Generator().manual_seed(seed))
            assert found.standard_error is not None
            off.append((found.values - exact) / found.standard_error)
            if seed == 0:
                again = pair.attribution_patching(order=2, products=6, generator=torch.Generator().manual_seed(seed))
                assert torch.equal(again.values, found.values)
    z = torch.stack(off)
    assert z.mean().abs() < 0.2
    assert 0.7 < z.square().mean().sqrt() < 1.6  # of six draws a standard error is known to a third


def test_few_products_do_not_say_how_good_they_are() -> None:
    """From four draws on the error allows for its own uncertainty; below nothing is said."""
    with zoo.Float64():
        model = zoo.specimen("bridge llama").model
        pair = tls.PromptPair(model, PROMPT, [*PROMPT[:2], 20, *PROMPT[3:]], answer=7, wrong=3)
        exact = pair.attribution_patching(order=2, products=8).values

        def found(products: int, seed: int = 0) -> tls.Effects:
            random = torch.Generator().manual_seed(seed)
            return pair.attribution_patching(order=2, products=products, generator=random)

        for products in (1, 2, 3):
            assert found(products).standard_error.isinf().all()  # type: ignore[union-attr]
        z = torch.stack([(one.values - exact) / one.standard_error for seed in range(60) if (one := found(4, seed))])
    assert 0.7 < z.square().mean().sqrt() < 1.3


def test_batches_change_no_second_order(monkeypatch: pytest.MonkeyPatch) -> None:
    with zoo.Float64():
        model = zoo.specimen("bridge llama").model
        pair = tls.PromptPair(model, PROMPT, [*PROMPT[:2], 20, *PROMPT[3:]], answer=7, wrong=3)
        whole = pair.attribution_patching("mlp_out", order=2)
        with monkeypatch.context() as patch:
            zoo.batches_of(patch, 1)
            assert_close(pair.attribution_patching("mlp_out", order=2).values, whole.values, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("site", ["head_out", "mlp_out"])
def test_what_stands_out(pairs: list[tls.PromptPair], site: Any, tmp_path: Path) -> None:
    """The largest effects by name, and the picture of all of them."""
    found = pairs[0].attribution_patching(site)
    frame = found.to_dataframe()
    best = frame.reindex(frame.effect.abs().sort_values(ascending=False, kind="stable").index)[:3]
    assert [tuple(row) for row in found.top(3)] == list(zip(best.name, best.effect, best.normalized, strict=True))
    axes = found.plot().axes[0]
    assert_close(torch.tensor(axes.images[0].get_array().shape), torch.tensor(found.values.shape))
    assert axes.get_xlabel() == ("head" if site == "head_out" else "token of the corrupted prompt")
    html = found.to_html(tmp_path / "effects.html")
    assert f"{best.normalized.iloc[0]:.0%} of the whole, " in html
    assert found._repr_html_() in html
    assert "<script" not in html
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        found.top(0)


def test_reliability(pairs: list[tls.PromptPair]) -> None:
    """From 0 to 1, as its definition says, and in the data frame."""
    found = pairs[0].attribution_patching("mlp_out", order=2)
    assert found.first_order is not None
    second = (found.values - found.first_order).abs()
    expected = found.first_order.abs() / (found.first_order.abs() + second)
    moved = found.first_order.abs() > 0
    assert_close(found.reliability[moved], expected[moved])
    assert (found.reliability[~moved & (second == 0)] == 1).all()  # nothing that differs comes before them
    frame = found.to_dataframe()
    assert frame["reliability"].between(0, 1).all()
    assert frame["first_order"].tolist() == found.first_order.flatten().tolist()
    with pytest.raises(
        ValueError, match="attribution patching has no orders: ask pair.attribution_patching.'mlp_out', "
    ):
        _ = pairs[0].attribution_patching("mlp_out").reliability


def test_bad_orders(pairs: list[tls.PromptPair], no_type_checks: None) -> None:
    with pytest.raises(ValueError, match="the order is 1 or 2, got 3"):
        pairs[0].attribution_patching(order=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="products is a number of Hessian products, 1 at least, got 0"):
        pairs[0].attribution_patching(order=2, products=0)
    with pytest.raises(TypeError, match="generator must be a torch.Generator or None, got 3"):
        pairs[0].attribution_patching(order=2, generator=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="attribution patching has the order 1 or 2, got 0"):
        tls.agreement(pairs, order=0)  # type: ignore[arg-type]


def test_the_second_order_under_a_kernel_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MORE["opt"]().model.float()
    monkeypatch.setattr(model.original_model.config, "_attn_implementation", "sdpa")
    pair = tls.PromptPair(model, PROMPT, [*PROMPT[:2], 20, *PROMPT[3:]], answer=7, wrong=3)
    with pytest.raises(RuntimeError, match='cannot be differentiated twice .*attn_implementation="eager"'):
        pair.attribution_patching("mlp_out", order=2)


def test_positions_before_the_difference_are_not_run(tiny: Any) -> None:
    """Both runs are the same there; the numbers are those of a sweep over all positions."""
    pair = tls.PromptPair(tiny, CLEAN, CORRUPTED, answer=" are", wrong=" is")
    runs: list[int] = []
    with tiny.hooks(fwd_hooks=[("hook_embed", lambda value, hook: runs.append(1))]):
        found = tls.PromptPair(tiny, CLEAN, CORRUPTED, answer=" are", wrong=" is")
        runs.clear()
        values = found.activation_patching("attn_out").values
        assert len(runs) == 1 + 6 * 8
    assert values.shape == (6, 10)
    assert not values[:, :2].any()
    clean, corrupted = (tiny.to_tokens(text) for text in (CLEAN, CORRUPTED))
    _, cache = tiny.run_with_cache(clean)
    whole = patching.get_act_patch_attn_out(tiny, corrupted, cache, lambda logits: pair.metric(logits))
    assert_close(values, whole - pair.corrupted_value, rtol=1e-4, atol=1e-4)


def test_carried_of_a_pair(pairs: list[tls.PromptPair], tiny: Any) -> None:
    """What the clean prompt's own paths say about the token that differs."""
    paths = tls.carried_by(tls.linearize(tiny, CLEAN), SCOPE, tokens=2)
    assert_close(pairs[0].carried().values, paths.values[..., 0])
    stream = pairs[0].carried("resid_pre")
    assert stream.values.shape == (6, 10)
    branches = tls.carried_by(tls.linearize(tiny, CLEAN), SCOPE, "layer", tokens=2)
    assert_close(pairs[0].carried("mlp_out").values.sum(-1), branches.values[:, 1, 0])
    frame = pairs[0].carried("mlp_out").to_dataframe()
    assert frame["name"].tolist()[:2] == ["L0 at '<|bos|>'", "L0 at 'The'"]


def test_methods_call_components_the_same(pairs: list[tls.PromptPair]) -> None:
    """By the tokens of the corrupted prompt, so that their tables can be joined."""
    asked = (pairs[0].activation_patching, pairs[0].attribution_patching, pairs[0].carried)
    names = [ask("mlp_out").names for ask in asked]
    assert names[0] == names[1] == names[2]
    assert names[0][2] == "L0 at ' key'"


@pytest.mark.parametrize("site", ["head_out", "mlp_out"])
@pytest.mark.parametrize(
    "scope",
    [
        tls.SemanticScope(" are old"),
        tls.SemanticScope(versus=" are old"),
        tls.FrozenAttentionScope(tls.SemanticScope(" are old")),
    ],
    ids=repr,
)
def test_carried_of_several_tokens(pairs: list[tls.PromptPair], scope: tls.Scope, site: Any) -> None:
    """Their influence runs through positions behind the prompt, which no patching has."""
    match = "' are old' is 2 tokens, .* patching, which this is compared with, is about one prediction: name one token"
    with pytest.raises(ValueError, match=match):
        pairs[0].carried(site, scope)
    with pytest.raises(ValueError, match=match):
        tls.agreement(pairs[:1], scope, [site])


def test_bad_sites(pairs: list[tls.PromptPair], no_type_checks: None) -> None:
    for ask in (pairs[0].carried, pairs[0].attribution_patching, pairs[0].activation_patching):
        with pytest.raises(
            ValueError, match="a site is one of 'resid_pre', 'attn_out', 'mlp_out', 'head_out', got 'z'"
        ):
            ask("z")  # type: ignore[arg-type]


def test_too_many_tokens_differ(tiny: Any) -> None:
    pair = tls.PromptPair(tiny, [5, 600, 7, 8, 9, 10, 11, 12], [5, 20, 21, 22, 23, 24, 25, 26], answer=602, wrong=291)
    with pytest.raises(ValueError, match="so many tokens differ"):
        pair.carried("mlp_out")


def test_the_model_is_left_as_found() -> None:
    with zoo.Float64():
        model = zoo.SPECIES["bridge llama"]().model
        model.run_with_cache(torch.tensor([PROMPT]))  # Hugging Face registers hooks of its own at the first one
        with unchanged(model):
            pair = tls.PromptPair(model, PROMPT, [*PROMPT[:2], 20, *PROMPT[3:]], answer=7, wrong=3)
            tls.agreement([pair], sites=("head_out", "mlp_out"))
            tls.head_map(model, PROMPT, pair.scope)


# -- agreement --------------------------------------------------------------------------------------------------------


def test_agreement(compared: tls.Agreement, pairs: list[tls.PromptPair]) -> None:
    table = compared.to_dataframe()
    assert len(table) == 2 * 2 * len(pairs)
    row = table.iloc[0]
    carried = compared.effects["head_out", "carried"][0].values.flatten().abs()
    truth = compared.effects["head_out", "activation patching"][0].values.flatten().abs()
    assert row["pearson"] == pytest.approx(torch.corrcoef(torch.stack([carried, truth]))[0, 1].item(), rel=1e-5)
    assert row["overlap"] == len({*carried.topk(4).indices.tolist()} & {*truth.topk(4).indices.tolist()}) / 4
    assert table["same_first"][:2].all()
    summary = compared.summary()
    first = summary.iloc[0]
    assert first["pearson"] == pytest.approx(table["pearson"][:2].mean())
    assert first["pearson_low"] <= first["pearson"] <= first["pearson_high"]
    assert first["least_pearson"] == table["pearson"][:2].min()
    second = tls.agreement(pairs[:1], sites=("mlp_out",), order=2)
    assert second.to_dataframe()["method"].tolist() == ["carried", "attribution patching", "second order"]
    assert len(second.plot().axes) == 3
    assert repr(compared).startswith("Agreement(Pearson with activation patching over 2 pairs: head_out carried 0.89 (")


def test_on_the_bundled_model(compared: tls.Agreement) -> None:
    """The figures of DESIGN: .89 for heads, without any corrupted prompt."""
    summary = compared.summary().set_index(["site", "method"])
    assert summary.loc[("head_out", "carried"), "pearson"] > 0.85
    assert summary.loc[("resid_pre", "carried"), "pearson"] > 0.95
    assert summary.loc[("head_out", "carried"), "same_first"] == 1


def test_pairs_go_together(pairs: list[tls.PromptPair], compared: tls.Agreement, tiny: Any) -> None:
    """Patching pairs of one length as a batch changes no number."""
    more = tls.PromptPair(tiny, "The keys to the new cabinet near the door", CORRUPTED, answer=" are", wrong=" is")
    both = tls.agreement([pairs[0], more])
    assert_close(
        both.effects["head_out", "activation patching"][0].values,
        compared.effects["head_out", "activation patching"][0].values,
        rtol=1e-3,
        atol=1e-4,
    )


def test_the_scatter(compared: tls.Agreement) -> None:
    figure = compared.plot("resid_pre")
    assert len(figure.axes) == 2
    assert compared.plot().axes
    with pytest.raises(ValueError, match="the sites compared are head_out, resid_pre, got 'mlp_out'"):
        compared.plot("mlp_out")


def test_nothing_to_compare(pairs: list[tls.PromptPair], no_type_checks: None) -> None:
    with pytest.raises(ValueError, match="there are no pairs to compare at"):
        tls.agreement([])
    with pytest.raises(TypeError, match="expected PromptPairs, got tuple"):
        tls.agreement([(CLEAN, CORRUPTED)])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="top is a number of components, 1 at least, and an integer, got True"):
        tls.agreement(pairs, top=True)
    with pytest.raises(ValueError, match="there are no sites to compare: give one at least"):
        tls.agreement(pairs, sites=[])
    with pytest.raises(TypeError, match=r"sites are several, got the text 'head_out': write \['head_out'\]"):
        tls.agreement(pairs, sites="head_out")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="pairs are several PromptPairs, got one: put it into a list"):
        tls.agreement(pairs[0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="top is a number of components, 1 at least, got 0"):
        tls.agreement(pairs, top=0)


def test_nothing_counts_twice(pairs: list[tls.PromptPair]) -> None:
    """A site or a pair that is given twice would make intervals narrow."""
    with pytest.raises(ValueError, match="'head_out' is given 2 times, and would count as often in the means"):
        tls.agreement(pairs, sites=["head_out", "mlp_out", "head_out"])
    with pytest.raises(ValueError, match=r"PromptPair\(.* is given 3 times, .*: give it once"):
        tls.agreement([pairs[0], *pairs, pairs[0]])


def test_pairs_of_two_models() -> None:
    """One model would have been patched for both."""
    pairs = []
    for species in ("bridge llama", "bridge gpt2"):
        model = zoo.specimen(species).model
        pairs.append(tls.PromptPair(model, PROMPT, [*PROMPT[:2], 20, *PROMPT[3:]], answer=7, wrong=3))
    with pytest.raises(ValueError, match=r"pair 1, PromptPair\(.*\), is of another model than pair 0"):
        tls.agreement(pairs)


def test_a_patching_metric_keeps_no_graph() -> None:
    """It is a function of logits alone, and so is what a pair keeps of its prompts."""
    lin = tls.linearize(zoo.specimen("bridge llama").model, [3, 14, 15, 9])
    trace, metric = weakref.ref(lin.trace), tls.patching_metric(tls.SemanticScope(5), lin)
    del lin
    gc.collect()
    assert trace() is None
    assert metric(torch.zeros(1, 4, 37)).shape == ()
