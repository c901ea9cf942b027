"""Path integrals: captum's on a plain copy of the model, completeness, and SemanticScope at every point of the line."""

import re
import warnings
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import IntegratedGradients
from torch import Tensor
from torch.testing import assert_close

import tl_scopes as tls
from tests import zoo
from tests.zoo import PROMPT, VOCAB, Specimen
from tl_scopes.jacobian.line_integral import _bend, _Panel, gauss_legendre, integrate_in_panels
from tl_scopes.scopes import baselines, path_integrated

POSITION, TARGET, VERSUS = 5, 7, 9
EXACT = {"rtol": 1e-9, "atol": 1e-11}
ROUNDED = {"rtol": 1e-6, "atol": 1e-7}
"""Captum rounds the weights of the rule to float32."""


@pytest.fixture
def lin(specimen: Specimen) -> tls.Linearization:
    return tls.linearize(specimen.model, PROMPT, POSITION)


@pytest.fixture
def one() -> Iterator[tls.Linearization]:
    """One kind, where the kind makes no difference."""
    with zoo.Float64():
        yield tls.linearize(zoo.specimen("bridge llama").model, PROMPT, POSITION)


@pytest.fixture(autouse=True)
def _few_steps_are_meant() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the contributions of the tokens sum to")
        yield


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def plain_logits(specimen: Specimen, tokens: list[int], embeddings: Tensor) -> Tensor:
    """Logits [batch vocab] at the last token, with these values in place of the embedding's, of the plain model."""
    handle = specimen.embed.register_forward_hook(lambda module, args, out: embeddings)
    try:
        out = specimen.plain(torch.tensor([tokens]).expand(len(embeddings), -1))
    finally:
        handle.remove()
    return getattr(out, "logits", out)[:, -1]


def plain_embeddings(specimen: Specimen, tokens: list[int]) -> Tensor:
    seen = []
    handle = specimen.embed.register_forward_hook(lambda module, args, out: seen.append(out.detach()))
    specimen.plain(torch.tensor([tokens]))
    handle.remove()
    return seen[0][0]


def agrees_with_captum(specimen: Specimen, given: Any, begin: Tensor) -> None:
    tokens = PROMPT[: POSITION + 1]
    x = plain_embeddings(specimen, tokens)
    expected, gap = IntegratedGradients(lambda e: plain_logits(specimen, tokens, e)).attribute(
        x[None],
        begin.expand_as(x)[None],
        target=TARGET,
        n_steps=7,
        method="gausslegendre",
        return_convergence_delta=True,
    )
    lin = tls.linearize(specimen.model, PROMPT, POSITION)
    answer = tls.PathIntegratedScope(TARGET, steps=7, baseline=given, start=0)(lin)
    assert_close(answer.scores, expected[0].norm(dim=-1), **ROUNDED)
    assert_close(answer.signed, expected[0].sum(-1), **ROUNDED)
    assert answer.completeness_gap == pytest.approx(float(gap), rel=1e-6, abs=1e-6)


def test_captum(specimen: Specimen) -> None:
    """The same as captum's integrated gradients of the plain model, by the same rule, from the mean embedding."""
    vocabulary = [
        plain_embeddings(specimen, list(range(some.start, some.stop))) for some in (range(20), range(20, VOCAB))
    ]
    agrees_with_captum(specimen, "mean", torch.cat(vocabulary).mean(0))


@pytest.mark.parametrize("species", ["bridge llama", "native layer norm"])
def test_captum_from_other_baselines(species: str) -> None:
    """So from zero, from a token, from any values."""
    with zoo.Float64():
        specimen = zoo.specimen(species)
        agrees_with_captum(specimen, "zero", torch.zeros(zoo.WIDTH, dtype=torch.float64))
        agrees_with_captum(specimen, 11, plain_embeddings(specimen, [11])[0])
        values = randn(POSITION + 1, zoo.WIDTH)
        agrees_with_captum(specimen, values, values)


def test_profile_is_semantic_scope(lin: tls.Linearization) -> None:
    """Row α of the profile is SemanticScope's answer at x(α); the last one is that of the prompt itself."""
    answer = tls.PathIntegratedScope(TARGET, VERSUS, steps=3)(lin)
    semantic = tls.SemanticScope(TARGET, VERSUS)
    assert_close(answer.profile[-1], semantic(lin).scores, **EXACT)
    assert answer.alphas[-1] == 1
    assert answer.alphas[1] == pytest.approx((0.01 + 1) / 2)
    for alpha, row in zip(answer.alphas, answer.profile, strict=True):
        assert_close(row, semantic(lin.at(alpha * lin.embeddings)).scores, **EXACT)


def test_the_end_of_the_line(one: tls.Linearization) -> None:
    """start → 1: the mean gradient is that of the prompt, so a → (x − x(s)) ⊙ ∂f/∂x."""
    short = tls.PathIntegratedScope(TARGET, steps=1, start=1 - 1e-6)(one)
    gradient = one.vjp(one.cotangent(lambda z: z[TARGET])[None])[0]
    assert_close(short.scores / 1e-6, (one.embeddings * gradient).norm(dim=-1), rtol=1e-3, atol=1e-6)


def test_completeness(lin: tls.Linearization) -> None:
    """Σ signed → f(x) − f(x(s)) as steps grow, and the values at both ends are the model's."""
    few, many = (tls.PathIntegratedScope(TARGET, VERSUS, steps=steps, baseline="mean")(lin) for steps in (3, 96))
    if getattr(lin.model.cfg, "architecture", "") == "MixtralForCausalLM":  # f jumps where another expert is chosen
        assert abs(many.completeness_gap) > 1e-2 * many.signed.abs().sum()
    else:
        assert abs(many.completeness_gap) < 1e-3 * many.signed.abs().sum()
        assert abs(many.completeness_gap) < max(0.1 * abs(few.completeness_gap), 1e-12)
    assert many.value == pytest.approx(float(lin.logits[TARGET] - lin.logits[VERSUS]), rel=1e-12)
    begin = 0.99 * tls.models.mean_embedding(lin.model, 5) + 0.01 * lin.embeddings
    logits = lin.at(begin).logits
    assert many.baseline_value == pytest.approx(float(logits[TARGET] - logits[VERSUS]), rel=1e-9)
    assert many.completeness_gap == pytest.approx(
        float(many.signed.sum()) - (many.value - many.baseline_value), abs=1e-12
    )


@pytest.mark.parametrize("species", ["bridge gpt2", "bridge llama", "bridge mamba", "native rotary grouped"])
def test_the_error_is_about_right(species: str) -> None:
    """quadrature_error is no smaller than a third of the error, and falls with it."""
    with zoo.Float64():
        lin = tls.linearize(zoo.specimen(species).model, PROMPT, POSITION)
        exact = tls.PathIntegratedScope(TARGET, steps=96, baseline="mean")(lin)
        for steps in (8, 16):
            answer = tls.PathIntegratedScope(TARGET, steps=steps, baseline="mean")(lin)
            error = (answer.scores - exact.scores).abs().sum()
            assert error < 3 * answer.quadrature_error.sum() + 1e-12 * exact.scores.sum()
    assert exact.quadrature_error.sum() < 1e-2 * exact.scores.sum()


@pytest.mark.parametrize(
    "species", ["native no norm", *(["hooked no norm"] if zoo.HookedTransformer else []), "bridge llama"]
)
def test_linear_model(species: str) -> None:
    """Where f is linear, one step is exact; of a polynomial of degree 2n, n steps are; and wrt may be any hook."""
    with zoo.Float64():
        linear = tls.linearize(zoo.specimen(species).model, PROMPT, wrt="blocks.1.hook_resid_post")
        answer = tls.PathIntegratedScope(TARGET, steps=1, start=0)(linear)
        several = tls.PathIntegratedScope(TARGET, steps=4, start=0)(linear)
    assert answer.unit == "logit"
    assert answer.signed[:-1].eq(0).all()
    if species == "bridge llama":  # a norm is in between
        assert abs(answer.completeness_gap) > 1e-3
    else:
        assert abs(answer.completeness_gap) < 1e-12
        assert_close(answer.scores, several.scores, **EXACT)
        assert several.quadrature_error.max() < 1e-12


def test_groups_change_no_number(one: tls.Linearization, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many points run together is about memory alone."""
    scope = tls.PathIntegratedScope(TARGET, steps=5)
    together = scope(one)
    zoo.batches_of(monkeypatch, 2)
    sizes: list[int] = []
    run = tls.Linearization.at_each
    monkeypatch.setattr(tls.Linearization, "at_each", lambda self, x: sizes.append(len(x)) or run(self, x))
    in_groups = scope(one)
    assert sizes == [2, 2, 1]
    assert_close(in_groups.scores, together.scores, **EXACT)
    assert_close(in_groups.profile, together.profile, **EXACT)


def test_token_baselines(one: tls.Linearization) -> None:
    """A token at every position, as the model embeds it; a position that has it already contributes nothing."""
    model, x = one.model, one.embeddings
    answer = tls.PathIntegratedScope(TARGET, steps=3, baseline=PROMPT[2])(one)
    assert answer.scores[2] == 0
    assert answer.scores[[0, 1, 3, 4, 5]].min() > 0
    same = tls.PathIntegratedScope(TARGET, steps=3, baseline=x[2])(one)
    assert_close(answer.scores, same.scores, **EXACT)
    assert_close(tls.models.embed(model, torch.tensor([PROMPT]))[0, : POSITION + 1], x, rtol=0, atol=0)
    whole = tls.PathIntegratedScope(TARGET, steps=3, baseline=x)(one)  # nowhere to go
    assert whole.scores.eq(0).all()
    assert whole.quadrature_error.eq(0).all()


@pytest.mark.parametrize("length", [1, 5, 24, 40])
def test_mean_embedding(one: tls.Linearization, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token of the vocabulary counts once, whatever the length of the prompts they are taken from."""
    zoo.batches_of(monkeypatch, max(1, 10 // length))
    assert_close(tls.models.mean_embedding(one.model, length), one.model.W_E.detach().mean(0), **EXACT)


def test_text_baselines(tiny: Any) -> None:
    lin = tls.linearize(tiny, "The keys to the old cabinet near the door")
    the = tiny.to_single_token(" the")
    by_text, by_id = (tls.PathIntegratedScope(steps=4, baseline=b)(lin) for b in ("token: the", the))
    assert_close(by_text.scores, by_id.scores, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"the baseline ' xyzzy' is \d tokens: .* say the first, baseline=\d"):
        tls.PathIntegratedScope(baseline="token: xyzzy")(lin)


def test_the_answer(tiny: Any) -> None:
    """Details follow the tokens, survive JSON, and the question is written as it was put."""
    answer = tls.attribute(tiny, "The keys to the old cabinet", tls.PathIntegratedScope(" are", steps=40))
    assert answer.scope == "PathIntegratedScope(target=' are', steps=40)"
    assert answer.target is not None
    assert answer.target.text == " are"
    assert answer.profile.shape == (41, len(answer.scores)) == (len(answer.alphas), len(answer.tokens))
    rest = answer.without([0])
    assert_close(rest.profile, answer.profile[:, 1:], rtol=0, atol=0)
    again = tls.Attribution.from_json(answer.to_json())
    assert again.alphas == answer.alphas
    assert again.completeness_gap == answer.completeness_gap
    assert_close(again.signed, answer.signed, rtol=0, atol=0)
    assert {"signed", "quadrature_error"} <= set(answer.to_dataframe())
    baseline = tls.PathIntegratedScope(baseline=torch.ones(128), start=0)
    assert repr(baseline) == "PathIntegratedScope(baseline=<128 tensor of norm 11.3>, start=0.0)"


def test_log_prob(one: tls.Linearization) -> None:
    """Log-probabilities differ as logits do."""
    log_prob, logit = (tls.PathIntegratedScope(TARGET, VERSUS, quantity=q, steps=3)(one) for q in ("log_prob", "logit"))
    assert_close(log_prob.scores, logit.scores, **EXACT)
    assert log_prob.unit == "nat"
    assert_close(log_prob.value, logit.value, **EXACT)


def test_half_precision() -> None:
    """The line is drawn and summed in float32: bfloat16 is off by its own rounding."""
    full, half = (
        tls.PathIntegratedScope(TARGET, steps=24, baseline="mean")(
            tls.linearize(zoo.llama(zoo.GOLDEN, "bridge", d), PROMPT)
        )
        for d in (torch.float32, torch.bfloat16)
    )
    assert half.scores.dtype == torch.float32
    assert (half.scores - full.scores).norm() < 0.05 * full.scores.norm()


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps is a number of points on the line, 1 at least, got 0"),
        ({"steps": 2.5}, TypeError, "steps is a number of points on the line, 1 at least, and an integer, got 2.5"),
        ({"start": 1}, ValueError, r"start is the α in \[0, 1\) where the line begins, got 1"),
        ({"start": -0.1}, ValueError, r"start is the α in \[0, 1\) where the line begins, got -0.1"),
        ({"start": "0.1"}, TypeError, r"start is the α in \[0, 1\) where the line begins, got '0.1'"),
        ({"start": None}, TypeError, r"start is the α in \[0, 1\) where the line begins, got None"),
        ({"start": float("nan")}, ValueError, r"start is the α in \[0, 1\) where the line begins, got nan"),
        ({"quantity": "p"}, ValueError, "quantity is .* got 'p'"),
        ({"baseline": "pad"}, ValueError, "baseline is \"zero\", .* got 'pad'. .* baseline='token:pad'"),
        ({"baseline": 1.5}, TypeError, 'baseline is "zero", "mean", .* got 1.5'),
        ({"baseline": None}, TypeError, 'baseline is "zero", "mean", .* got None'),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tls.PathIntegratedScope(**options)


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"baseline": torch.zeros(3)}, r"shape \[token d_model\] = \[6, 16\] or \[d_model\] = \[16\], got \[3\]"),
        ({"baseline": torch.zeros(5, 16)}, r"= \[6, 16\] or \[d_model\] = \[16\], got \[5, 16\]"),
        ({"baseline": torch.zeros(16) + 1j}, "the baseline must be real, got torch.complex64, whose imaginary part"),
        (
            {"baseline": torch.zeros(16).to_sparse()},
            "the baseline must be a dense tensor, got one of the layout torch.sp",
        ),
        ({"baseline": torch.full((16,), torch.nan)}, "the baseline must be finite, got NaN or infinite entries"),
        ({"baseline": VOCAB}, f"baseline {VOCAB} is outside the vocabulary of {VOCAB}"),
        (
            {"baseline": "token: the"},
            "has no tokenizer for its output: pass the baseline ' the' as a token id",
        ),
        ({"target": 3, "versus": 3}, "target and versus are the same token"),
        ({"target": VOCAB}, f"target {VOCAB} is outside the vocabulary"),
    ],
)
def test_bad_questions(one: tls.Linearization, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tls.PathIntegratedScope(**options)(one)


def test_under_rules(one: tls.Linearization) -> None:
    """Their derivative is another function's, whose change the contributions would sum to."""
    for scope in (tls.PathIntegratedScope(TARGET), baselines.IntegratedGradients(TARGET, steps=3)):
        message = f"{type(scope).__name__} adds up the model's own derivative along a line, and that of linear rules"
        with pytest.raises(ValueError, match=message):
            scope(one.under("linear"))
        with pytest.raises(ValueError, match=message):
            tls.UnderRulesScope(scope)(one)


@pytest.mark.parametrize("baseline", ["mean", 3])
def test_baselines_of_the_embedding(baseline: Any) -> None:
    late = tls.linearize(zoo.specimen("bridge llama").model, PROMPT, wrt="blocks.1.hook_resid_pre")
    with pytest.raises(ValueError, match=f"the baseline {baseline!r} is known at 'hook_embed' only, and this line"):
        tls.PathIntegratedScope(TARGET, baseline=baseline)(late)


def test_needs_the_readout() -> None:
    middle = tls.linearize(zoo.specimen("bridge llama").model, PROMPT, of="blocks.1.hook_resid_pre")
    with pytest.raises(ValueError, match="this question needs the logits"):
        tls.PathIntegratedScope(TARGET)(middle)


def test_too_few_steps_are_told_once_per_call(tiny: Any) -> None:
    """Not once per position of a map, or per prompt or batch of many; with how often it is so."""
    model = zoo.specimen("bridge llama").model
    scope = tls.PathIntegratedScope(TARGET, steps=1)
    for ask in (
        lambda: tls.attribution_map(model, PROMPT, scope),
        lambda: list(tls.attribute_many(model, [PROMPT[:n] for n in range(2, 9)], scope, batch_size=2)),
        lambda: tls.attribution_map(model, PROMPT, baselines.IntegratedGradients(TARGET, steps=1)),
        lambda: tls.attribution_map(tiny, "The keys to the", tls.FisherScope(rtol=1e-6)),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ask()
        (told,) = [str(w.message) for w in caught if "is too few" in str(w.message) or "the rtol" in str(w.message)]
        assert re.search(r"This is the worst of [1-8] such predictions, of [578] in all\.$", told)


def test_too_few_steps(one: tls.Linearization) -> None:
    with pytest.warns(UserWarning, match=r"sum to .*, not to the change of .*: steps=1 is too few. Leave steps out"):
        tls.PathIntegratedScope(TARGET, steps=1)(one)


def test_points_go_where_they_are_needed(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default the contributions sum to the change within 2%, as those of many equal steps do; else that is said."""
    lin = tls.linearize(tiny, "The keys to the old cabinet near the door")
    found, plain = tls.PathIntegratedScope()(lin), tls.PathIntegratedScope(steps=300)(lin)
    change = found.value - found.baseline_value
    allowed = 0.02 * max(abs(change), 0.1 * float(found.signed.abs().sum()))
    assert abs(found.completeness_gap) <= allowed
    assert_close(found.scores, plain.scores, rtol=0.1, atol=0.02 * float(plain.scores.max()))
    assert 42 <= len(found.alphas) - 1 <= 300
    assert list(found.alphas) == sorted(found.alphas)
    assert_close(found.profile[-1], tls.SemanticScope()(lin).scores, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(path_integrated, "_MOST", 12)
    monkeypatch.setattr(path_integrated, "_COMPLETE", 1e-6)
    monkeypatch.setattr(tls.PathIntegratedScope, "_panels", lambda self: [0.0, 1.0])
    with pytest.warns(
        UserWarning, match=r"6 points are too few\. Take steps, or a start farther from the baseline .* 0\.3"
    ):
        tls.PathIntegratedScope()(lin)


def test_a_panel_is_divided_where_f_bends() -> None:
    """A step of f between two points of a panel gets a part of its own; one at the edge leaves two parts."""
    inside = gauss_legendre(6)[0]
    for step, (low, high) in ((0.5, (inside[2], inside[3])), (0.0, (0.0, inside[0])), (0.99, (inside[5], 1.0))):
        alphas = np.array([0.0, *inside, 1.0])
        bend = _bend(alphas, (alphas > step) + 2 * alphas, [2.0] * 6)
        assert bend == (low, high)
        parts = _Panel(0.0, 1.0, torch.zeros(2, 1, 1), 1.0, bend).parts()
        assert parts == list(pairwise(sorted({0.0, low, high, 1.0})))


def test_a_narrow_step(one: tls.Linearization, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of f a thousand times narrower than the line is found, from far fewer points than halves would take."""
    x = one.embeddings
    begin = 0.2 * x
    middle = float((one.at(0.37 * x).logits[TARGET] - one.at(0.36 * x).logits[TARGET]).abs())
    center = float(one.at(0.365 * x).logits[TARGET])

    def f(logits: Tensor) -> Tensor:
        return torch.tanh((logits[TARGET] - center) / (0.1 * middle)) + logits[VERSUS]

    found = integrate_in_panels(one, f, begin, [0.0, 1.0], 0.02, 300)
    change = float(f(one.logits) - f(one.at(begin).logits))
    assert abs(float((found.mean * (x - begin)).sum()) - change) < 0.02 * max(abs(change), 0.1)
    points = len(found.alphas)
    halves = lambda panel: [(panel.begin, m := (panel.begin + panel.end) / 2), (m, panel.end)]  # noqa: E731
    monkeypatch.setattr(_Panel, "parts", halves)
    assert points < len(integrate_in_panels(one, f, begin, [0.0, 1.0], 0.02, 300).alphas)


def test_a_jump_ends_the_division(one: tls.Linearization) -> None:
    """Where f really jumps no panel is narrow enough: the points end, and the gap stays."""
    begin = 0.3 * one.embeddings
    low, high = (float(lin.logits[VERSUS]) for lin in (one.at(begin), one))

    def f(logits: Tensor) -> Tensor:
        return logits[TARGET] + 5 * (logits[VERSUS] > (low + high) / 2)

    found = integrate_in_panels(one, f, begin, [0.0, 1.0], 0.02, 600)
    assert len(found.alphas) - 1 <= 600
    change = float(f(one.logits) - f(one.at(begin).logits))
    missed = float((found.mean * (one.embeddings - begin)).sum()) - change
    assert abs(missed) == pytest.approx(5, abs=0.5)


def test_what_is_the_same_everywhere_is_named(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The warning says why such a baseline needs more points, and not so of others."""
    monkeypatch.setattr(path_integrated, "_TOLERABLE", 0.0)
    lin = tls.linearize(tiny, "The keys near the door")
    rows = torch.randn(1, lin.embeddings.shape[1]).expand_as(lin.embeddings)
    for baseline in ("mean", rows, rows[0]):
        with pytest.warns(UserWarning, match="each of them may begin as an attention sink"):
            tls.PathIntegratedScope(steps=2, baseline=baseline)(lin)
    with pytest.warns(UserWarning, match="too few") as told:
        tls.PathIntegratedScope(steps=2, baseline="zero")(lin)
    assert "attention sink" not in str(told[0].message)


def test_hooks_that_went_away() -> None:
    """The rest of the line would be another model's: refused; inside the hooks, the patched model is explained."""
    model = zoo.SPECIES["bridge llama"]().model

    def ablate(value: Tensor, hook: Any) -> Tensor:
        value[:, 2] = 0
        return value

    scope = tls.PathIntegratedScope(TARGET, baseline="mean")
    with zoo.Float64():
        with model.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", ablate)]):
            patched = tls.linearize(model, PROMPT)
            inside = scope(patched)
        before = scope(tls.linearize(model, PROMPT))
        with pytest.raises(ValueError, match="are not those under which the model was linearised"):
            scope(patched)
    assert abs(inside.completeness_gap) < 1e-2 * inside.signed.abs().sum()
    assert (inside.scores - before.scores).norm() > 0.1 * before.scores.norm()
