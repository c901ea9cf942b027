"""The verdict beside the picture: each check beside a closed form or a slower way, and what the checks leave behind."""

import copy
import gc
import pickle
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import tl_scopes as tls
from tests import zoo
from tests.test_left_as_found import unchanged
from tests.zoo import PROMPT, Specimen
from tl_scopes import models
from tl_scopes.diagnostics.again import linearize_again, read_scope
from tl_scopes.diagnostics.checks import ROUNDINGS
from tl_scopes.diagnostics.evidence import TOLERANCE, Checked
from tl_scopes.diagnostics.sinks import attention_mass
from tl_scopes.jacobian.metric import LocalObservable
from tl_scopes.jacobian.replacement import effects, substitute
from tl_scopes.scopes.baselines import LeaveOneOut, RandomBaseline
from tl_scopes.scopes.scope import as_written
from tl_scopes.tiny.tasks import examples

TARGET = 7
EXACT = {"rtol": 1e-9, "atol": 1e-11}
NAMES = ["sinks", "linearity", "saturation", "weights", "leave-one-out", "estimation"]
SOME = ["bridge llama", "bridge mamba", "native soft cap", *(["hooked layer norm"] if zoo.HookedTransformer else [])]
STREAM = "blocks.1.hook_resid_pre"


@pytest.fixture(params=SOME)
def some_specimen(request: pytest.FixtureRequest) -> Iterator[Specimen]:
    with zoo.Float64():
        yield zoo.specimen(request.param)


@pytest.fixture
def llama() -> Iterator[Any]:
    with zoo.Float64():
        yield zoo.specimen("bridge llama").model


def verdicts(answer: tls.Attribution, **options: Any) -> dict[str, str]:
    return {check.name: check.verdict for check in answer.checks(**options)}


def checked(answer: tls.Attribution, thorough: bool = False) -> Checked:
    return Checked(answer, *linearize_again(answer, None), thorough)


@dataclass(frozen=True)
class Directions(tls.JacobianScope):
    """Some coordinates of the value at the end of the Jacobian."""

    count: int = 1

    def cotangents(self, lin: tls.Linearization) -> Tensor:
        return torch.eye(len(lin.readout), dtype=lin.readout.dtype)[: self.count]

    def unit(self, lin: tls.Linearization) -> str:
        return f"coordinate per {lin.unit}"


# -- every scope, every kind of model ---------------------------------------------------------------------------------


def test_every_kind_of_model_has_an_answer(specimen: Specimen) -> None:
    """All are asked, one by one, and the model is left as found."""
    for scope in (tls.SemanticScope(target=TARGET, versus=3), tls.FisherScope(probes=8), RandomBaseline()):
        answer = tls.attribute(specimen.model, PROMPT, scope)
        with unchanged(specimen.model):
            checks = answer.checks()
        assert [check.name for check in checks] == NAMES
        assert checks["leave-one-out"].verdict in ("fine", "look")
        assert (checks["linearity"].verdict == "not applicable") == isinstance(scope, RandomBaseline)


# -- sinks ------------------------------------------------------------------------------------------------------------


def to_the_first(pattern: Tensor, hook: Any) -> Tensor:
    """Nine tenths of all attention rests on the first token."""
    first = torch.zeros_like(pattern)
    first[..., 0] = 1
    return 0.1 * pattern + 0.9 * first


def test_a_sink_is_found(llama: Any) -> None:
    """A model made to have one; set aside, all is well."""
    hooks = [(f"blocks.{layer}.attn.hook_pattern", to_the_first) for layer in range(2)]
    scope, plain = tls.SemanticScope(target=TARGET), tls.attribute(llama, PROMPT, tls.SemanticScope(target=TARGET))
    assert plain.checks()["sinks"].verdict == "fine"
    with llama.hooks(fwd_hooks=hooks):
        lin = tls.linearize(llama, PROMPT, position=6)
        sunk = scope(lin).without([6])  # which speaks past attention
        check = sunk.checks()["sinks"]
        mass = attention_mass(llama, lin.tokens).mean((0, 1))[0]
        rest = sunk.without([0]).checks()["sinks"]
    assert mass > 0.9
    assert check.verdict == "look"
    assert (
        f"holds {sunk.share[0]:.0%} of the scores, where an even share is {1 / 6:.0%}, and {mass:.0%}" in check.finding
    )
    assert "answer.without([0])" in check.finding
    assert (rest.verdict, rest.finding) == ("fine", "'<3>' at 0 is set aside")


def test_without_patterns_there_are_no_sinks() -> None:
    with zoo.Float64():
        check = tls.attribute(zoo.specimen("bridge mamba").model, PROMPT, tls.FisherScope()).checks()["sinks"]
    assert check.verdict == "not applicable"
    assert "MambaForCausalLM has layers in which tokens mix other than by attention" in check.finding


# -- linearity --------------------------------------------------------------------------------------------------------


def test_what_is_linear_is_linear_all_the_way(some_specimen: Specimen) -> None:
    """Up to the first block everything is, numbers and vectors."""
    of = next(n for n in ("blocks.0.hook_resid_pre", "blocks.0.hook_in") if n in some_specimen.model.hook_dict)
    lin = tls.linearize(some_specimen.model, PROMPT, of=of)
    number, vector = (Directions(count)(lin).checks()["linearity"] for count in (1, 2))
    assert number.verdict == vector.verdict == "fine"
    assert "within 10% all the way to the nearest other token" in number.finding
    assert "10% of the way to the nearest other token" in vector.finding  # no longer step is tried


def test_a_linear_logit() -> None:
    with zoo.Float64():
        toy = zoo.linear_toy(TARGET)
        answer = tls.attribute(toy.model, PROMPT, tls.SemanticScope(TARGET))
        assert verdicts(answer)["linearity"] == "fine"
        assert verdicts(answer)["saturation"] == "fine"


def test_the_predicted_radius_is_that_of_linearity(some_specimen: Specimen) -> None:
    for scope in (tls.SemanticScope(target=TARGET), tls.TemperatureScope(of="logits")):
        answer = tls.attribute(some_specimen.model, PROMPT, scope)
        reach, top = checked(answer).reach, [row.position for row in answer.top(3)]
        report = tls.linearity(some_specimen.model, PROMPT, scope, positions=top, directions=1, sizes=[1.0])
        assert_close(reach.radius, report.predicted_radius[0], **EXACT)
        assert_close(reach.distance, report.nearest_distance, **EXACT)


def test_the_radius_of_a_vector_by_its_definition(llama: Any) -> None:
    """error(s) = ‖q(x + su) − q(x) − sJu‖ / ‖sJu‖, in proportion to s below the step."""
    scope = tls.FisherScope(exact=True)
    one = checked(tls.attribute(llama, PROMPT, scope))
    reach, q, lin = one.reach, scope.observable(one.lin), one.lin
    table = models.embedding_matrix(llama)
    step = TOLERANCE * reach.distance.median()
    for token, found in zip(one.top(3), reach.radius, strict=True):
        away = table - lin.embeddings[token]
        u = torch.zeros_like(lin.embeddings)
        nearest = away.norm(dim=-1).where(away.norm(dim=-1) > 0, torch.inf).argmin()
        u[token] = away[nearest] / away[nearest].norm()
        moved, slope = lin.at(lin.embeddings + step * u), LocalObservable(lin, q).push(u[None])[0]
        first = step * slope
        error = (q(moved.readout, moved.logits) - q(lin.readout, lin.logits) - first).norm() / first.norm()
        assert_close(found, step * min(1.0, float(TOLERANCE / error)), rtol=1e-6, atol=1e-9)


# -- saturation -------------------------------------------------------------------------------------------------------


def test_saturation_is_that_of_linearity(tiny: Any) -> None:
    """On a sure prediction the log-probability is saturated, the logit is not, and `linearity` says the same."""
    for quantity, expected in (("log_prob", "look"), ("logit", "fine")):
        answer = tls.attribute(tiny, examples("inference_who", 1)[0].prompt, tls.SemanticScope(quantity=quantity))
        check, one = answer.checks()["saturation"], checked(answer)
        report = tls.linearity(
            tiny, answer.tokens, tls.SemanticScope(quantity=quantity), positions=one.effects.positions, directions=1
        )
        assert check.verdict == expected == ("look" if report.saturated else "fine")
        assert_close(one.understated(one.effects).double(), report.understated, rtol=1e-2, atol=0.0)


def test_an_unsure_prediction_is_not_saturated(tiny: Any) -> None:
    answer = tls.attribute(tiny, "The keys to the old cabinet near the door", tls.SemanticScope(quantity="log_prob"))
    assert answer.checks()["saturation"].finding == "p(' are') = 86.5%, which leaves the gradients room"


def test_a_slope_of_a_vector_is_no_less_than_its_steepest(llama: Any) -> None:
    """On average over the signs: the Frobenius norm, whose square Fisher Scope is."""
    scope = tls.FisherScope(exact=True)
    one = checked(tls.attribute(llama, PROMPT, scope))
    every = list(range(len(PROMPT)))
    squares = torch.stack([one.slopes(every).square() for _ in range(400)]).mean(0)
    assert_close(squares, one.answer.scores, rtol=0.15, atol=0.0)


# -- weights ----------------------------------------------------------------------------------------------------------


def test_processed_weights_are_named() -> None:
    """Folded and centred weights, and whether it matters to the question."""
    plain, processed = zoo.llama(zoo.GOLDEN, "bridge"), zoo.llama(zoo.GOLDEN, "bridge")
    processed.enable_compatibility_mode()
    direction = torch.randn(processed.cfg.d_model, generator=torch.Generator().manual_seed(0))
    for scope, matters in (
        (tls.SemanticScope(target=3), True),
        (tls.SemanticScope(target=3, versus=4), False),
        (tls.FisherScope(), False),
        (tls.FisherScope(rank=2), True),
        (tls.DirectionScope(direction), True),
        (tls.SpectralScope(rank=2), True),
        (tls.SpectralScope(of="distribution", rank=2), False),
    ):
        before, after = (tls.attribute(m, PROMPT, scope).checks()["weights"] for m in (plain, processed))
        assert (before.verdict, before.finding) == ("fine", "neither folded, centred nor capped, in float32")
        assert after.verdict == ("look" if matters else "fine")
        assert "no gain (folded, or untrained)" in after.finding
        assert "the unembedding is centred" in after.finding


def test_a_soft_cap_is_named() -> None:
    """z = c tanh(u/c) has the slope 1 − (z/c)²."""
    with zoo.Float64():
        model = zoo.specimen("native soft cap").model
        for target in range(4):
            answer = tls.attribute(model, PROMPT, tls.SemanticScope(target))
            logits = tls.linearize(model, PROMPT).logits
            slopes = 1 - (logits / 3).square()
            left = float(slopes[target] / slopes.max())
            check = answer.checks()["weights"]
            assert check.finding == f"a soft-cap leaves {left:.0%} of the slope of '<{target}>'"
            assert check.verdict == ("look" if left < 0.5 else "fine")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_named(dtype: torch.dtype) -> None:
    model = zoo.llama(zoo.GOLDEN, "bridge", dtype)
    answer = tls.attribute(model, PROMPT, tls.SemanticScope(target=3))
    first, second = answer.top(2)
    close = 1 - second.score / first.score < ROUNDINGS * torch.finfo(dtype).eps
    check = answer.checks()["weights"]
    assert check.finding.startswith(f"{answer.dtype} rounds to {torch.finfo(dtype).eps:.1%}")
    assert check.verdict == ("look" if close else "fine")
    vector = tls.attribute(model, PROMPT, tls.FisherScope()).checks()["linearity"]
    assert (vector.verdict, vector.finding) == ("not applicable", f"in {answer.dtype} rounding hides a small step")


# -- leave-one-out ----------------------------------------------------------------------------------------------------


def test_leave_one_out_agrees_with_itself(some_specimen: Specimen) -> None:
    answer = tls.attribute(some_specimen.model, PROMPT, LeaveOneOut("mean"))
    check = answer.checks(thorough=True)["leave-one-out"]
    assert check.verdict == "fine"
    assert check.finding == (
        "replaced, 4 of the top 4 change the prediction, in KL, more than the median of the other 4; the first is "
        "number 1 of 8; rank correlation 1.00"
    )
    signed = tls.attribute(some_specimen.model, PROMPT, LeaveOneOut("mean", of="log_prob"))
    assert "rank correlation 1.00 (KL:" in signed.checks(thorough=True)["leave-one-out"].finding


def test_the_opposite_does_not_agree(some_specimen: Specimen) -> None:
    """Scores that put last what does most."""

    @dataclass(frozen=True)
    class Opposite(LeaveOneOut):
        def measure(self, lin: tls.Linearization) -> tls.Measurement:
            return tls.Measurement(1 / super().measure(lin).scores)

    check = tls.attribute(some_specimen.model, PROMPT, Opposite("mean")).checks(thorough=True)["leave-one-out"]
    assert check.verdict == "look"
    assert "0 of the top 4" in check.finding
    assert "rank correlation -1.00" in check.finding


def test_effects_are_those_of_replacement(some_specimen: Specimen) -> None:
    scope = tls.SemanticScope(target=TARGET, quantity="log_prob")
    one = checked(tls.attribute(some_specimen.model, PROMPT, scope), thorough=True)
    found, kept = one.effects, ~torch.eye(len(PROMPT), dtype=torch.bool)[one.effects.positions, :, None]
    log_probs, divergences = effects(one.lin, substitute(one.lin, "mean"), kept, torch.tensor([TARGET]))
    assert found.positions[: found.top] == [row.position for row in one.answer.top(found.top)]
    assert sorted(found.positions) == list(range(len(PROMPT)))
    assert found.divergence is not None
    assert found.change is not None
    assert_close(found.divergence, divergences, **EXACT)
    assert_close(found.change, (log_probs[:, 0] - one.lin.log_probs[TARGET]).abs(), **EXACT)


# -- estimation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scope", "verdict", "words"),
    [
        (tls.FisherScope(exact=True), "not applicable", "nothing was estimated"),
        (tls.SemanticScope(), "not applicable", "nothing was estimated"),
        (tls.FisherScope(probes=3), "look", "is not known: give it more probes"),
        (tls.FisherScope(rank=1), "look", "of the trace"),
        (tls.SpectralScope(rank=1), "look", "(distance to its upper bound)"),
        (tls.SpectralScope("frobenius", rank=1), "look", "(frobenius error)"),
    ],
)
def test_estimation(llama: Any, scope: tls.Scope, verdict: str, words: str) -> None:
    check = tls.attribute(llama, PROMPT, scope).checks()["estimation"]
    assert (check.verdict, words in check.finding) == (verdict, True)


def test_the_error_is_that_of_the_first(llama: Any) -> None:
    answer = tls.attribute(llama, PROMPT, tls.FisherScope(probes=8)).without([0])
    first = answer.scores.argmax()
    share = float(answer.standard_error[first] / answer.scores[first])
    check = answer.checks()["estimation"]
    assert f"is known to {share:.1%} (standard error)" in check.finding
    assert check.verdict == ("look" if share > 0.05 else "fine")


# -- where an answer comes from ---------------------------------------------------------------------------------------


def test_from_a_map_and_from_a_batch(llama: Any) -> None:
    """What is checked is the prediction, however it was asked about."""
    scope = tls.SemanticScope(quantity="log_prob")
    prompts = [PROMPT, PROMPT[:6], PROMPT[:3], PROMPT[:1]]
    alone = [repr(tls.attribute(llama, prompt, scope).checks()) for prompt in prompts]
    prompt_map = tls.attribution_map(llama, PROMPT, scope)
    many = tls.attribute_many(llama, prompts, scope, progress=False)
    assert [repr(prompt_map[len(prompt) - 1].checks()) for prompt in prompts] == alone
    assert [repr(answer.checks()) for answer in many if answer] == alone


@pytest.mark.parametrize(("wrt", "of"), [(STREAM, "ln_final"), ("hook_embed", STREAM)])
@pytest.mark.parametrize("thorough", [False, True])
def test_between_other_hooks(llama: Any, wrt: str, of: str, thorough: bool) -> None:
    lin = tls.linearize(llama, PROMPT, wrt=wrt, of=of)
    found = verdicts(Directions()(lin), thorough=thorough)
    assert found["linearity"] != "not applicable"
    assert found["leave-one-out"] != "not applicable"
    assert (found["saturation"] == "not applicable") == (of == STREAM)


def test_checkpointed(llama: Any) -> None:
    answers = [tls.attribute(llama, PROMPT, tls.SemanticScope(), checkpoint=c) for c in (True, False)]
    assert repr(answers[0].checks()) == repr(answers[1].checks())


@pytest.mark.parametrize(
    "scope", [tls.SemanticScope(), tls.SemanticScope(3, 4, "log_prob"), tls.FisherScope(), tls.HetaScope(probes=2)]
)
def test_after_a_journey(llama: Any, scope: tls.Scope) -> None:
    """What was written down is checked all the same, with the model."""
    answer = tls.attribute(llama, PROMPT, scope)
    expected = repr(answer.checks())
    copies = [pickle.loads(pickle.dumps(answer)), copy.deepcopy(answer), tls.Attribution.from_json(answer.to_json())]
    for other in copies:
        assert repr(other.checks(llama)) == expected
        with pytest.raises(
            ValueError, match="was read from JSON or a pickle, and its checks run the model again: pass"
        ):
            other.checks()


def test_a_scope_around_another(llama: Any) -> None:
    """Its scores are no slopes, and what it explains is asked about."""
    found = tls.attribute(llama, PROMPT, tls.PositionCorrectedScope(tls.SemanticScope())).checks()
    assert found["linearity"].verdict == "not applicable"
    assert "change what is asked about" in found["leave-one-out"].finding
    assert "(standard error)" in found["estimation"].finding


def test_a_scope_that_cannot_be_read(llama: Any) -> None:
    answer = tls.attribute(llama, PROMPT, tls.DirectionScope(torch.ones(zoo.WIDTH)))
    found = tls.Attribution.from_json(answer.to_json()).checks(llama)
    assert found["linearity"].verdict == "not applicable"
    assert "no public scope without tensors" in found["linearity"].finding
    assert "in KL" in found["leave-one-out"].finding


def test_an_answer_that_lost_its_prompt(llama: Any) -> None:
    """Cut before it was written, it does not know what stood there; cut afterwards it does."""
    answer = tls.attribute(llama, PROMPT, tls.SemanticScope())
    with pytest.raises(ValueError, match="lacks the token at position 2, and no longer knows its prompt"):
        tls.Attribution.from_json(answer.without([2]).to_json()).checks(llama)
    assert answer.without([2]).checks()["sinks"].verdict == "fine"


def patched(value: Tensor, hook: Any) -> Tensor:
    value = value.clone()
    value[:, 2] = 0.5
    return value


def test_another_prediction_is_refused(llama: Any) -> None:
    """Hooks gone, another point, other weights, another model."""
    scope = tls.SemanticScope(target=TARGET)
    plain = tls.linearize(llama, PROMPT)
    with llama.hooks(fwd_hooks=[(STREAM, patched)]), unchanged(llama):
        inside = tls.attribute(llama, PROMPT, scope)
        deep = Directions()(tls.linearize(llama, PROMPT, of="blocks.1.hook_mlp_out"))
        assert len(inside.checks()) == len(deep.checks()) == 6
        with pytest.raises(ValueError, match=r"computes something else now than for this answer, p\('<"):
            scope(plain).checks()
    message = "hooks or weights have changed, or the answer is of another point"
    with pytest.raises(ValueError, match=message):
        inside.checks()
    with pytest.raises(ValueError, match="‖y‖ at 'blocks.1.hook_mlp_out' was"):
        deep.checks()
    with pytest.raises(ValueError, match=message):
        scope(plain.at(0.5 * plain.embeddings)).checks()
    with pytest.raises(ValueError, match=message):
        scope(plain).checks(zoo.specimen("bridge qwen2").model)
    shuffled = models.shuffled_weights(llama, torch.Generator().manual_seed(0))
    with models.exchanged_weights(llama, shuffled), pytest.raises(ValueError, match=message):
        scope(plain).checks()
    with pytest.raises(TypeError, match="expected a HookedTransformer or a TransformerBridge, got str"):
        scope(plain).checks("gpt2")


def test_left_as_found_after_a_failure(llama: Any) -> None:
    """Wherever the model fails on the way, it is as it was."""
    answer = tls.attribute(llama, PROMPT, tls.FisherScope(probes=8))
    for calls in range(1, 6):  # to linearise, for attention, at the prompt, a step off it, without tokens
        left = [calls]

        def fail(value: Tensor, hook: Any, left: list[int] = left) -> None:
            left[0] -= 1
            if not left[0]:
                raise ZeroDivisionError("the user's hook fails")

        with llama.hooks(fwd_hooks=[(STREAM, fail)]):
            with unchanged(llama), pytest.raises(ZeroDivisionError, match="the user's hook fails"):
                answer.checks()


def test_an_answer_keeps_neither_model_nor_graph() -> None:
    """Nor a weight, through a scope that was made from one."""
    model = zoo.SPECIES["bridge llama"]().model
    lin = tls.linearize(model, PROMPT)
    row = model.unembed.weight[TARGET]
    assert row.requires_grad or row._base is not None
    answer = tls.DirectionScope(row)(lin)
    within = tls.FrozenAttentionScope(tls.DirectionScope(row))(lin)
    answers = [answer, answer.without([0]), within, *tls.attribution_map(model, PROMPT, tls.FisherScope(probes=4))]
    kept = [weakref.ref(thing) for thing in (lin.trace, lin, model, next(model.parameters()))]
    del model, lin, row
    gc.collect()
    assert [reference() for reference in kept] == [None] * 4
    assert answer._origin.scope.direction._base is within._origin.scope.scope.direction._base is None
    for one in answers:
        with pytest.raises(
            ValueError, match=r"has outlived its model, and its checks .* pass it, answer.checks\(model\)"
        ):
            one.checks()


# -- reading a scope --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scope",
    [
        tls.SemanticScope(" are", 4, "log_prob"),
        tls.TemperatureScope(of="logits"),
        tls.FisherScope(rtol=0.1),
        tls.SpectralScope("effective_rank", rank=3),
        tls.PathIntegratedScope(3, baseline="mean", start=0.5),
        tls.HetaScope(mask=3, normalize=True),
    ],
)
def test_a_scope_is_read_as_it_is_written(scope: tls.Scope, llama: Any) -> None:
    read = read_scope(as_written(scope))
    assert type(read) is type(scope)
    assert as_written(read) == as_written(scope)


@pytest.mark.parametrize(
    "text",
    [
        "load_tiny()",
        "AttributionMap(answers=(1,))",
        "SemanticScope(__import__('os'))",
        "SemanticScope(target=open('file'))",
        "SemanticScope(target=1, targets=2)",
        "FisherScope(probes=-1)",
        "tls.SemanticScope()",
        "SemanticScope",
        "DirectionScope(direction=<128 tensor of norm 1>)",
        "Scope()",
        "MyScope()",
        "",
    ],
)
def test_nothing_else_is_read(text: str) -> None:
    assert read_scope(text) is None


# -- the report -------------------------------------------------------------------------------------------------------


def test_the_report(tiny: Any) -> None:
    checks = tls.attribute(tiny, "The keys to the old cabinet near the door", tls.SemanticScope()).checks()
    title, *lines = repr(checks).splitlines()
    assert title == "Checks of SemanticScope() on tiny, after position 9:"
    assert [line.split()[0] for line in lines] == NAMES
    assert len({line.index(check.finding) for line, check in zip(lines, checks, strict=True)}) == 1
    for line, check in zip(lines, checks, strict=True):  # what it cost, unless it was free
        assert line.endswith(check.finding if check.cost == "none" else f"[{check.cost}]")
    frame = checks.to_dataframe()
    assert list(frame.columns) == ["check", "verdict", "finding", "cost"]
    assert frame.cost.tolist()[0] == "1 forward pass"
    assert len(checks) == len(frame) == 6
    with pytest.raises(KeyError, match="there is no check 'sink': there are sinks, linearity,"):
        checks["sink"]


def test_the_card(tiny: Any) -> None:
    """Every verdict and every finding, with tokens that are no markup."""
    checks = tls.attribute(tiny, "The keys to the old cabinet near the door", tls.SemanticScope()).checks()
    html = checks._repr_html_()
    assert html.count("<tr") == 6
    assert "<|bos|>" not in html
    assert "&lt;|bos|&gt;" in html
    for check in checks:
        assert check.name in html
        assert check.verdict in html
