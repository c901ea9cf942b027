"""Baselines are scopes: their equations, on every kind of model, beside slow loops."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import tl_scopes as tls
from tests import zoo
from tests.test_left_as_found import unchanged
from tests.zoo import PROMPT, Specimen
from tl_scopes import models
from tl_scopes.jacobian.replacement import effects, substitute
from tl_scopes.scopes.baselines import (
    AttentionRollout,
    GradientTimesInput,
    IntegratedGradients,
    LeaveOneOut,
    RandomBaseline,
)

TARGET = 7
EXACT = {"rtol": 1e-9, "atol": 1e-11}
ALL = (
    RandomBaseline(),
    GradientTimesInput(),
    IntegratedGradients(steps=3, start=0.5),
    LeaveOneOut(),
    LeaveOneOut(quantity="log_prob"),
)


@pytest.fixture
def lin(specimen: Specimen) -> tls.Linearization:
    return tls.linearize(specimen.model, PROMPT)


@pytest.fixture
def toy() -> Iterator[tls.Linearization]:
    """Linear in the embeddings: zoo.linear_toy."""
    with zoo.Float64():
        yield tls.linearize(zoo.linear_toy(TARGET).model, PROMPT)


def test_gradient_times_input(lin: tls.Linearization, specimen: Specimen) -> None:
    """|g · x|, g from a copy of the model that tl_scopes never touched."""
    delta = torch.zeros(len(PROMPT), zoo.WIDTH, dtype=torch.float64, requires_grad=True)
    logit = specimen.forward(torch.tensor(PROMPT), delta)[1][-1, TARGET]
    signed = (torch.autograd.grad(logit, delta)[0] * lin.embeddings).sum(-1)
    answer = GradientTimesInput(target=TARGET)(lin)
    assert_close(answer.signed, signed, **EXACT)
    assert_close(answer.scores, signed.abs(), **EXACT)


def test_gradient_times_input_of_several_prompts(lin: tls.Linearization) -> None:
    """Together as one by one."""
    lins = lin.at_each(torch.stack([lin.embeddings, 0.5 * lin.embeddings]))
    together = GradientTimesInput(target=TARGET).ask(lins)
    assert_close(together[0].scores, GradientTimesInput(target=TARGET)(lin).scores, **EXACT)
    assert_close(together[1].scores, GradientTimesInput(target=TARGET)(lin.at(0.5 * lin.embeddings)).scores, **EXACT)


def test_integrated_gradients(lin: tls.Linearization) -> None:
    """The sum over dimensions whose norm is the path-integrated score, without its sign."""
    answer = IntegratedGradients(target=TARGET, steps=5, start=0.3)(lin)
    path = tls.PathIntegratedScope(target=TARGET, steps=5, start=0.3)(lin)
    assert_close(answer.scores, path.signed.abs(), **EXACT)
    assert_close(answer.profile, path.profile, **EXACT)
    assert not torch.allclose(answer.scores, path.scores)


def test_gradients_of_a_linear_model(toy: tls.Linearization) -> None:
    """Where logits are linear in the embeddings, g · x is what a token contributes, and all of it is the whole."""
    signed = GradientTimesInput(target=TARGET)(toy).signed
    assert_close(IntegratedGradients(target=TARGET, steps=2, start=0)(toy).signed, signed, **EXACT)
    nothing = toy.at(torch.zeros_like(toy.embeddings))
    assert_close(signed.sum(), toy.logits[TARGET] - nothing.logits[TARGET], **EXACT)
    for token in range(len(PROMPT)):
        without = toy.embeddings.clone()
        without[token] = 0
        assert_close(toy.logits[TARGET] - toy.at(without).logits[TARGET], signed[token], **EXACT)


@pytest.mark.parametrize("replacement", ["zero", "mean"])
def test_leave_one_out(lin: tls.Linearization, replacement: Any) -> None:
    """KL, and the drop of the target, from the model run once for each token: no batch."""
    instead = 0 if replacement == "zero" else models.mean_embedding(lin.model, 5)
    divergences, drops = [], []
    for token in range(len(PROMPT)):
        embeddings = lin.embeddings.clone()
        embeddings[token] = instead
        after = lin.at(embeddings).log_probs
        divergences.append((lin.log_probs.exp() * (lin.log_probs - after)).sum())
        drops.append(lin.log_probs[TARGET] - after[TARGET])
    assert_close(LeaveOneOut(replacement)(lin).scores, torch.stack(divergences), **EXACT)
    answer = LeaveOneOut(replacement, quantity="log_prob", target=TARGET)(lin)
    assert_close(answer.scores, torch.stack(drops), **EXACT)
    assert answer.target is not None
    assert answer.target.id == TARGET


def test_rows_do_not_depend_on_the_batch(lin: tls.Linearization, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = torch.rand(9, len(PROMPT), 1, generator=torch.Generator().manual_seed(0)) < 0.5
    arguments = (lin, torch.zeros_like(lin.embeddings), kept, torch.tensor([TARGET, 3]))
    whole = effects(*arguments)
    zoo.batches_of(monkeypatch, 1)
    assert_close(effects(*arguments), whole, **EXACT)


def test_nothing_replaced_is_no_effect(lin: tls.Linearization) -> None:
    """log p' = log p and KL = 0 where everything is kept; so it is where each token is replaced by itself."""
    everything = torch.ones(1, len(PROMPT), 1, dtype=torch.bool)
    targets = torch.tensor([TARGET])
    for kept in (everything, ~everything):
        log_probs, divergence = effects(lin, lin.embeddings, kept, targets)
        assert_close(log_probs[0], lin.log_probs[targets], **EXACT)
        assert_close(divergence, torch.zeros_like(divergence), rtol=0, atol=1e-11)


def test_pad(tiny: Any) -> None:
    lin = tls.linearize(tiny, "The keys")
    assert_close(substitute(lin, "pad")[0], tiny.embed(torch.tensor([[tiny.tokenizer.pad_token_id]]))[0, 0].detach())


def test_attention_rollout(lin: tls.Linearization, specimen: Specimen) -> None:
    """The product of the layers' mixing, taken apart: paths through attention and skips, summed one by one."""
    if specimen is zoo.specimen("bridge mamba"):
        with pytest.raises(ValueError, match="tokens mix other than by attention patterns"):
            AttentionRollout()(lin)
        return
    layers = list(models.attention_layers(lin.model, lin.tokens))
    last = len(PROMPT) - 1
    expected = torch.zeros(len(PROMPT), dtype=torch.float64)
    first, second = (layer.pattern.mean(0).double() for layer in layers)
    for token in range(len(PROMPT)):
        through = sum(second[last, middle] * first[middle, token] for middle in range(len(PROMPT)))
        expected[token] = 0.25 * (through + first[last, token] + second[last, token] + float(token == last))
    answer = AttentionRollout()(lin)
    assert_close(answer.scores, expected, **EXACT)
    assert float(answer.scores.sum()) == pytest.approx(1)


def test_random_baseline() -> None:
    """The same numbers for the same prompt and seed, others for another prompt or seed; the seed shows."""
    model = zoo.specimen("bridge llama").model
    one, other = tls.linearize(model, PROMPT), tls.linearize(model, PROMPT[::-1])
    scopes = [RandomBaseline(), RandomBaseline(1), RandomBaseline(-1)]
    assert list(map(repr, scopes)) == ["RandomBaseline()", "RandomBaseline(seed=1)", "RandomBaseline(seed=-1)"]
    drawn = [scope(lin).scores for scope in scopes for lin in (one, other)]
    again = [scope(lin).scores for scope in scopes for lin in (one, other)]
    assert all(map(torch.equal, drawn, again))
    assert len({tuple(scores.tolist()) for scores in drawn}) == len(drawn)


def test_the_mean_is_handed_in(lin: tls.Linearization, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the mean embedding given, it is not asked for, and the scores are the same."""
    expected, mean = LeaveOneOut("mean")(lin).scores, models.mean_embedding(lin.model, 5)
    monkeypatch.delattr(models, "mean_embedding")
    assert_close(LeaveOneOut("mean", mean=mean)(lin).scores, expected, **EXACT)


def test_batches_leave_room_for_wide_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probabilities are float64 whatever the model is: of eight such rows of the vocabulary no batch takes more."""
    model = zoo.llama(zoo.GOLDEN, "bridge")
    lin, evaluate, sizes = tls.linearize(model, [3, 4]), models.evaluate, []
    budget = 20 * 64 * model.cfg.d_vocab
    monkeypatch.setattr(models.Work.PREDICTION, "_value_", (budget, budget))
    monkeypatch.setattr(
        models, "evaluate", lambda m, tokens, **kw: sizes.append(len(tokens)) or evaluate(m, tokens, **kw)
    )
    effects(lin, lin.embeddings, torch.ones(30, 2, 1, dtype=torch.bool), torch.tensor([TARGET]))
    assert sum(sizes) == 30
    assert max(sizes) * 64 * model.cfg.d_vocab < budget


@pytest.mark.parametrize("scope", ALL, ids=repr)
def test_the_model_is_left_as_found(scope: tls.Scope) -> None:
    model = zoo.SPECIES["bridge llama"]().model
    model(torch.tensor([PROMPT]))  # a bridge registers a hook of its own at the first run
    with unchanged(model):
        scope(tls.linearize(model, PROMPT))


def test_bad_input(no_type_checks: None) -> None:
    lin = tls.linearize(zoo.specimen("bridge llama").model, PROMPT)
    late = tls.linearize(zoo.specimen("bridge llama").model, PROMPT, wrt="blocks.1.hook_resid_pre")
    with pytest.raises(TypeError, match="seed must be an integer, got <torch._C.Generator"):
        RandomBaseline(torch.Generator())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='quantity is "kl" or "log_prob", got \'logit\''):
        LeaveOneOut(quantity="logit")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has no target, got ' are': take quantity="):
        LeaveOneOut(target=" are")
    with pytest.raises(ValueError, match='replaced by "zero", "mean" or "pad", got \'noise\''):
        LeaveOneOut("noise")(lin)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no mean embedding at 'blocks.1.hook_resid_pre'"):
        LeaveOneOut("mean")(late)
    for mean, error, message in (
        (
            torch.ones(3),
            ValueError,
            r"mean embedding has the shape \[3\], this model's embeddings have \[16\]: leave it",
        ),
        (torch.ones(16) + 1j, ValueError, "the mean embedding must be real, got torch.complex64"),
        (torch.full((16,), torch.nan), ValueError, "the mean embedding must be finite, got NaN or infinite entries"),
        ([0.0] * 16, TypeError, r"the mean embedding must be a tensor of the shape \[d_model\], got list"),
    ):
        with pytest.raises(error, match=message):
            LeaveOneOut("mean", mean=mean)(lin)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the model has no padding token"):
        LeaveOneOut("pad")(lin)
    with pytest.raises(ValueError, match="goes back to the embedding, not to 'blocks.1.hook_resid_pre'"):
        AttentionRollout()(late)
    assert LeaveOneOut("zero")(late).scores.shape == lin.tokens.shape


def test_what_is_no_slope_is_not_checked_as_one(tiny: Any) -> None:
    """Neither the place nor the radius of scores that are no slopes."""
    lin = tls.linearize(tiny, "The keys to the old cabinet near the door")
    for scope in (LeaveOneOut(), LeaveOneOut(quantity="log_prob"), AttentionRollout(), RandomBaseline()):
        found = tls.check(lin, scope)
        assert (found["position"].verdict, found["linearity"].verdict) == ("not applicable", "not applicable")


def test_a_product_is_checked_as_its_size_is(tiny: Any) -> None:
    """g · x is the slope of taking the input away, with its sign and without: it is asked how far that reaches."""
    lin = tls.linearize(tiny, "The keys to the old cabinet near the door")
    signed, size = (tls.check(lin, kind(" are", versus=" is")) for kind in (tls.RelevanceScope, GradientTimesInput))
    assert signed["linearity"].verdict != "not applicable"
    assert signed["linearity"].finding == size["linearity"].finding
    assert size["position"].verdict != "not applicable"
    assert signed["position"].finding == size["position"].finding  # of scores with a sign, the sizes count
