"""What must hold of every scope on every kind of model. A new scope is one file and one row here."""

import math
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import tl_scopes as tls
from tests import zoo
from tests.test_attention import HOLDABLE
from tests.test_attribution import same
from tests.test_left_as_found import unchanged
from tests.zoo import PROMPT, Specimen
from tl_scopes.scopes.baselines import AttentionRollout, LeaveOneOut

POSITION, TARGET = 5, 7
EXACT = {"rtol": 1e-8, "atol": 1e-11}
DIRECTION = torch.linspace(-1, 2, zoo.WIDTH, dtype=torch.float64)


def squares(logits: torch.Tensor) -> torch.Tensor:
    """A metric that is none of the package's own."""
    return logits[0, -1, :3].square().sum()


SCOPES: dict[str, tls.Scope] = {
    "semantic": tls.SemanticScope(TARGET),
    "semantic versus": tls.SemanticScope(TARGET, versus=3),
    "temperature": tls.TemperatureScope(),
    "temperature of the logits": tls.TemperatureScope(norm="logits"),
    "fisher": tls.FisherScope(probes=6),
    "fisher exact": tls.FisherScope(exact=True),
    "path integrated": tls.PathIntegratedScope(TARGET, steps=4, start=0.5),
    "spectral": tls.SpectralScope(),
    "spectral distribution": tls.SpectralScope("effective_rank", space="distribution", rank=3),
    "direction": tls.DirectionScope(DIRECTION, "ln_final"),
    "heta": tls.HetaScope(TARGET, probes=2),
    "position corrected": tls.PositionCorrectedScope(tls.SemanticScope(TARGET), shuffles=2),
    "frozen attention": tls.FrozenAttentionScope(tls.SemanticScope(TARGET)),
    "under rules": tls.UnderRulesScope(tls.SemanticScope(TARGET), rules="lookup"),
    "relevance": tls.RelevanceScope(TARGET, versus=3),
    "metric": tls.MetricScope(squares),
}
SIGNED = {"relevance"}
NEEDS_LOGITS = set(SCOPES) - {"spectral", "direction"}


@pytest.fixture(params=SCOPES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def scope(name: str, specimen: Specimen, request: pytest.FixtureRequest) -> tls.Scope:
    """Every scope, on every model that has what it asks about."""
    if name == "heta" and getattr(specimen.model.cfg, "architecture", "") == "MambaForCausalLM":
        pytest.skip("no attention patterns")
    if name == "frozen attention" and request.node.callspec.params["specimen"] not in HOLDABLE:
        pytest.skip("its attention cannot be held")
    return SCOPES[name]


_answers: dict[tuple[str, int], tls.Attribution] = {}


@pytest.fixture
def answer(name: str, scope: tls.Scope, specimen: Specimen) -> tls.Attribution:
    """Asked once, for all laws."""
    key = name, id(specimen)
    if key not in _answers:
        _answers[key] = tls.attribute(specimen.model, PROMPT, scope, POSITION)
    return _answers[key]


@pytest.mark.filterwarnings("ignore:.*steps=4 is too few")
class TestEveryScope:
    """One law, one test."""

    def test_one_finite_score_per_token(self, name: str, answer: tls.Attribution) -> None:
        assert answer.scores.shape == (POSITION + 1,)
        assert answer.scores.isfinite().all()
        assert (answer.scores >= 0).all() or name in SIGNED
        assert answer.scores.dtype == torch.float64
        assert answer.share.abs().sum() == pytest.approx(1)
        assert answer.unit

    def test_nothing_after_the_position_matters(
        self, answer: tls.Attribution, scope: tls.Scope, specimen: Specimen
    ) -> None:
        other = [*PROMPT[: POSITION + 1], *(11 for _ in PROMPT[POSITION + 1 :])]
        assert_close(tls.attribute(specimen.model, other, scope, POSITION).scores, answer.scores, **EXACT)
        assert_close(tls.attribute(specimen.model, other[: POSITION + 1], scope).scores, answer.scores, **EXACT)

    def test_a_checkpoint_changes_nothing(self, answer: tls.Attribution, scope: tls.Scope, specimen: Specimen) -> None:
        lin = tls.linearize(specimen.model, PROMPT, POSITION, checkpoint=True)
        assert_close(scope(lin).scores, answer.scores, **EXACT)

    def test_company_changes_nothing(self, answer: tls.Attribution, scope: tls.Scope, specimen: Specimen) -> None:
        """In a batch, and in a map."""
        prompts = [PROMPT, PROMPT[: POSITION + 1], [5, 4]]
        _, found, _ = tls.attribute_many(specimen.model, prompts, scope, progress=False)
        assert found is not None
        assert_close(found.scores, answer.scores, **EXACT)
        found = tls.attribution_map(specimen.model, PROMPT[: POSITION + 1], scope)[POSITION]
        assert_close(found.scores, answer.scores, **EXACT)

    def test_company_does_not_change_how_far_it_is_linear(self, scope: tls.Scope, specimen: Specimen) -> None:
        """Beside other predictions of its forward pass, of which one goes through the unembedding by itself."""
        alone = tls.linearize(specimen.model, PROMPT, POSITION)
        if scope.metric(alone) is None:
            pytest.skip("it has no metric")
        span = tls.linearize(specimen.model, PROMPT[:POSITION], answer=PROMPT[POSITION:])
        sizes = [0.01, 0.1]
        found, expected = (
            tls.linearity(lin, scope, positions=[1], sizes=sizes, directions=1) for lin in (span.single[1], alone)
        )
        # An error is the small difference of large numbers.
        for field in ("error", "joint_error"):
            assert_close(getattr(found, field), getattr(expected, field), rtol=1e-5, atol=1e-8, equal_nan=True)
        for field in ("slope", "radius", "predicted_radius", "joint_radius", "joint_predicted_radius"):
            assert_close(getattr(found, field), getattr(expected, field), rtol=1e-5, atol=1e-9, equal_nan=True)

    @pytest.mark.filterwarnings("ignore:the relative standard error")
    def test_what_cannot_come_weighs_nothing(self, name: str, scope: tls.Scope, specimen: Specimen) -> None:
        """A logit of minus infinity is one that is far below all others, in a batch and to the checks too."""
        if name == "temperature of the logits":
            pytest.skip("a logit far below all others is what it is about")
        if name == "under rules" and float(tls.linearize(specimen.model, PROMPT).trace.slope.min()) < 1:
            pytest.skip("a soft-cap is differentiated by its secant, which there is not at infinity")

        def found(logit: float) -> list[torch.Tensor]:
            def never(value: torch.Tensor, hook: object) -> torch.Tensor:
                ids = torch.tensor([11, 20, 33])
                return value.index_fill(-1, ids, logit)

            with specimen.model.hooks(fwd_hooks=[("unembed.hook_out", never)]):
                lin = tls.linearize(specimen.model, PROMPT, POSITION)
                span = tls.linearize(specimen.model, PROMPT[:POSITION], answer=PROMPT[POSITION:])
                asked = [scope(lin).scores, scope(span.single[1]).scores]
                if scope.takes_spans and scope.named_targets(specimen.model)[0] is None:
                    asked.append(scope(span).scores)
                if scope.metric(lin) is not None:
                    asked.append(tls.linearity(lin, scope, positions=[1], sizes=[0.1], directions=1).radius)
            return asked

        for one, expected in zip(found(-math.inf), found(-1e6), strict=True):
            assert_close(one, expected, rtol=1e-7, atol=1e-10, equal_nan=True)
            assert not one.isnan().any()

    def test_model_left_as_found(self, answer: tls.Attribution, scope: tls.Scope, specimen: Specimen) -> None:
        """After a first run: a bridge registers hooks of its own then."""
        with unchanged(specimen.model):
            tls.attribute(specimen.model, PROMPT, scope, POSITION)

    def test_save_and_load(self, answer: tls.Attribution) -> None:
        assert same(tls.Attribution.from_json(answer.to_json()), answer)

    def test_fewer_tokens(self, answer: tls.Attribution) -> None:
        rest = answer.without([0])
        assert_close(rest.scores, answer.scores[1:])
        for key, value in answer.details.items():
            assert not isinstance(value, torch.Tensor) or torch.equal(rest.details[key], value[..., 1:])

    def test_printed(self, name: str, answer: tls.Attribution, scope: tls.Scope) -> None:
        """In one line, as the Python that asks it."""
        assert "\n" not in repr(answer)
        assert len(repr(answer)) < 300
        if name not in ("direction", "metric"):  # a tensor is shown short, and a function not at all
            assert repr(eval(answer.scope, {public: getattr(tls, public) for public in tls.__all__})) == repr(scope)

    def test_rows_of_a_table(self, answer: tls.Attribution) -> None:
        frame = answer.to_dataframe()
        assert len(frame) == POSITION + 1
        assert not frame.isna().any().any()

    def test_the_readout_is_needed(self, name: str, scope: tls.Scope, specimen: Specimen) -> None:
        """Elsewhere the question has no answer, or another one, but never a wrong one."""
        hook = next(h for h in ("blocks.1.hook_resid_pre", "blocks.1.hook_in") if h in specimen.model.hook_dict)
        if name == "direction":  # a direction belongs to its hook
            scope = tls.DirectionScope(DIRECTION, hook)
        lin = tls.linearize(specimen.model, PROMPT, POSITION, of=hook)
        if name in NEEDS_LOGITS:
            with pytest.raises(ValueError, match="needs the logits"):
                scope(lin)
        else:
            assert math.isfinite(float(scope(lin).scores.sum()))


@pytest.mark.parametrize("species", ["bridge llama", "bridge gpt2"])
def test_the_spread_of_the_logits_that_can_come(species: str) -> None:
    """A logit of minus infinity is not among them; where all are, or one is plus infinity, nothing can be said."""

    def hook(ids: list[int], logit: float) -> list[tuple[str, object]]:
        return [("unembed.hook_out", lambda value, hook: value.index_fill(-1, torch.tensor(ids), logit))]

    with zoo.Float64():
        model, never = zoo.specimen(species).model, [11, 20, 33]
        rest = [i for i in range(zoo.VOCAB) if i not in never]
        with model.hooks(fwd_hooks=hook(never, -math.inf)):
            lin = tls.linearize(model, PROMPT)
            found = tls.TemperatureScope(norm="logits")(lin)
            expected = lin.vjp(lin.cotangent(lambda z: z[rest].std(correction=0))[None])[0].norm(dim=-1)
            assert_close(found.scores, expected, **EXACT)
            assert_close(found.value, float(lin.logits[rest].std(correction=0)), **EXACT)
            assert not lin.log_probs.exp()[never].any()
            with pytest.raises(ValueError, match="'<11>' cannot come here: a hook gives it a logit of minus infinity"):
                tls.SemanticScope(11)(lin)
            with pytest.raises(ValueError, match="'<11>' cannot come here: a hook gives it a logit of minus infinity"):
                LeaveOneOut(quantity="log_prob", target=11)(lin)
        for ids, logit in ((range(zoo.VOCAB), -math.inf), (never, math.inf), (never, math.nan)):
            with model.hooks(fwd_hooks=hook([*ids], logit)):
                with pytest.raises(ValueError, match="NaN or infinite activations at 'the logits'"):
                    tls.linearize(model, PROMPT)


def test_a_set_is_not_one_token(tiny: Any) -> None:
    """A scope that explains one token refuses the set of a row; what has no target does not mind."""
    rows: dict[str, Any] = {"targets": [{" are", " is"}], "on_error": "raise"}
    for scope in (tls.HetaScope(probes=1), tls.FrozenAttentionScope(tls.HetaScope(probes=1))):
        with pytest.raises(ValueError, match=r"HetaScope.* explains one token, got the set ' are\| is': ask once for"):
            next(tls.attribute_many(tiny, ["The keys"], scope, **rows))
    (found,) = tls.attribute_many(tiny, ["The keys"], AttentionRollout(), **rows)
    assert found is not None


def test_every_public_scope_is_here() -> None:
    public = {name for name in tls.__all__ if name.endswith("Scope")} - {"Scope", "JacobianScope"}
    assert public == {type(scope).__name__ for scope in SCOPES.values()}
