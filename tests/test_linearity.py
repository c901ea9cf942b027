"""How far the linear picture holds: the mathematics on closed forms, the rest on every kind of model."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import tl_scopes as tls
from tests import zoo
from tests.test_left_as_found import unchanged
from tests.zoo import PROMPT, VOCAB, Specimen
from tl_scopes import models
from tl_scopes.diagnostics.radius import NearestRows, curvature_radius, radius, relative_error
from tl_scopes.jacobian import curvature
from tl_scopes.jacobian.metric import LocalMetric, Rays
from tl_scopes.tiny.tasks import examples

POSITION, TARGET = 5, 7
EXACT = {"rtol": 1e-9, "atol": 1e-11}
FEW: Any = {"directions": 1, "sizes": [0.1, 1.0]}
KEYS = "The keys to the old cabinet near the door"


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Directions(tls.JacobianScope):
    """Some coordinates of the value at the end of the Jacobian."""

    count: int = 1

    def cotangents(self, lin: tls.Linearization) -> Tensor:
        return torch.eye(len(lin.readout), dtype=lin.readout.dtype)[: self.count]

    def unit(self, lin: tls.Linearization) -> str:
        return f"coordinate per {lin.unit}"


# -- the mathematics --------------------------------------------------------------------------------------------------


def test_the_radius_of_a_quadratic() -> None:
    """q = gᵀx + ½ xᵀHx: the error is s |uᵀHu| / 2|gᵀu|, and the radius what the curvature predicts, exactly."""
    g, H, u = randn(6), randn(6, 6, seed=1), randn(3, 6, seed=2)
    H, u = H + H.T, u / u.norm(dim=-1, keepdim=True)
    sizes = torch.tensor([0.01, 0.1, 1.0, 10.0, 100.0], dtype=torch.float64)

    def q(x: Tensor) -> Tensor:
        return x @ g + ((x @ H) * x).sum(-1) / 2

    slopes, curvatures = u @ g, ((u @ H) * u).sum(-1)
    residuals = (q(sizes[:, None] * u[:, None]) - sizes * slopes[:, None]).abs()
    for some in (slice(0, 1), slice(0, 3)):
        error = relative_error(residuals[some], slopes[some], sizes, 0.1)
        measured, predicted = radius(sizes, error, 0.1), curvature_radius(slopes[some], curvatures[some], 0.1)
        assert_close(measured, predicted, **EXACT)
    assert_close(curvature_radius(slopes[:1], curvatures[:1], 0.1), 0.2 * (slopes / curvatures)[0].abs(), **EXACT)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0, 3.0])
def test_the_radius_between_two_sizes(power: float) -> None:
    """error = tolerance · (s/r)^power has the radius r."""
    sizes = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
    assert_close(radius(sizes, 0.2 * (sizes / 2.5) ** power, 0.2), torch.tensor(2.5, dtype=torch.float64), **EXACT)


def test_the_radius_is_the_first_passing() -> None:
    """What comes after it does not count; without any it is infinite, without any that is known it is unknown."""
    inf, nan = torch.inf, torch.nan
    sizes = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    errors = [
        [0.2, 0.0, 0.0],
        [0.05, 0.2, 0.01],
        [0.0, 0.05, 0.1],
        [nan, nan, 0.4],
        [nan, 0.1, 0.4],
        [nan] * 3,
        [inf] * 3,
    ]
    expected = torch.tensor([0.5, 2**0.5, inf, 1.0, 2.0, nan, 0.0], dtype=torch.float64)
    assert_close(radius(sizes, torch.tensor(errors, dtype=torch.float64), 0.1), expected, equal_nan=True, **EXACT)


def test_an_error_is_of_all_directions() -> None:
    """A direction along which q is flat does not decide; nothing at all is no error; rounding hides what is small."""
    slopes, sizes = torch.tensor([3.0, 0.0]), torch.tensor([1.0, 10.0])
    residuals = torch.tensor([[0.0, 0.0], [0.3, 30.0]])
    assert_close(relative_error(residuals, slopes, sizes, 0.1), torch.tensor([0.1, 1.0]))
    assert not relative_error(residuals * 0, slopes * 0, sizes, 0.1, rounding=1.0).any()
    hidden = relative_error(residuals, slopes, sizes, 0.1, rounding=0.1)  # 3/√2 · 0.1 < 0.3 < 30/√2 · 0.1
    assert hidden.isnan().tolist() == [True, False]


@pytest.mark.parametrize("at_once", [1, 3, 4, 9])
def test_nearest_rows(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The distances of a loop, however many rows are seen together; a token's own row and its equals are no others."""
    monkeypatch.setattr(NearestRows, "at_once", 2 * at_once)
    table = randn(9, 4)
    table[5] = table[2]
    own = torch.tensor([2, 7])
    near = NearestRows(table[own], own, 3)
    near.see(table[:4])
    near.see(table[4:])
    distances, rows = near.found
    for i, token in enumerate(own.tolist()):
        others = sorted(
            (float((table[token] - table[r]).norm()), r) for r in range(9) if r not in (2, 5, token)[-3 + i :]
        )
        others = [(d, r) for d, r in others if d > 0]
        assert_close(distances[i], torch.tensor([d for d, _ in others[:3]], dtype=torch.float64), **EXACT)
        assert rows[i].tolist() == [r for _, r in others[:3]]


# -- the parts, on every kind of model --------------------------------------------------------------------------------

SCOPES = {
    "logit": tls.SemanticScope(target=TARGET),
    "log_prob": tls.SemanticScope(target=TARGET, versus=3, quantity="log_prob"),
    "sure": tls.SemanticScope(quantity="log_prob"),
    "spread": tls.TemperatureScope(norm="logits"),
    "norm": tls.TemperatureScope(),
    "fisher": tls.FisherScope(exact=True),
    "directions": Directions(2),
    "readout": tls.SpectralScope("frobenius"),
    "distribution": tls.SpectralScope("frobenius", space="distribution"),
}


def local(specimen: Specimen, name: str) -> LocalMetric:
    lin = tls.linearize(specimen.model, PROMPT, POSITION)
    metric = SCOPES[name].metric(lin)
    assert metric is not None
    return LocalMetric(lin, metric)


def some_rays(count: int = 2) -> Rays:
    return Rays(torch.tensor([1, POSITION]), randn(2, zoo.WIDTH), randn(count, POSITION + 1, zoo.WIDTH, seed=1))


def test_values(specimen: Specimen) -> None:
    """q at other points, in a batch without a graph, is q of the linearisations there."""
    for name in ("sure", "norm", "fisher"):
        q = local(specimen, name)
        points = q.lin.embeddings + 0.1 * randn(3, *q.lin.embeddings.shape)
        expected = [q.function(lin.readout, lin.logits).reshape(-1) for lin in q.lin.at_each(points)]
        assert_close(q.values(points), torch.stack(expected), **EXACT)
        assert_close(q.values(q.lin.embeddings[None])[0], q.value, **EXACT)


def test_curvature_in_company(specimen: Specimen) -> None:
    """uᵀHu of a prediction that shares its forward pass is that of the prompt alone, through a soft-cap too."""
    span = tls.linearize(specimen.model, PROMPT[:POSITION], answer=PROMPT[POSITION:])
    alone, rays = tls.linearize(specimen.model, PROMPT, POSITION), some_rays()
    for name in ("logit", "log_prob", "sure", "spread", "norm"):
        scope = SCOPES[name]
        found, expected = (LocalMetric(lin, scope.metric(lin)).curvatures(rays) for lin in (span.single[1], alone))
        assert_close(found, expected, **EXACT)


def test_scores_are_slopes(specimen: Specimen) -> None:
    """A scope's score is the Frobenius norm of ∂q/∂x_t (squared, for Fisher): q is what the score is about."""
    for name, scope in SCOPES.items():
        q = local(specimen, name)
        jacobian = q.pull(torch.eye(len(q.value), dtype=torch.float64))
        expected = scope(q.lin).scores.square() if name != "fisher" else scope(q.lin).scores
        assert_close(jacobian.square().sum((0, 2)), expected, **EXACT)


def test_what_is_no_slope(specimen: Specimen) -> None:
    """A path's contributions add up to a change of q, and HETA's curvature is that of q."""
    lin = tls.linearize(specimen.model, PROMPT, POSITION)
    path = tls.PathIntegratedScope(target=TARGET, versus=3, start=0.5)
    q, answer = LocalMetric(lin, path.metric(lin)), path(lin)
    change = q.value - q.values(0.5 * lin.embeddings[None])[0]
    assert_close(change, torch.tensor([answer.value - answer.baseline_value], dtype=torch.float64), **EXACT)

    q, t, h = LocalMetric(lin, tls.HetaScope(target=TARGET).metric(lin)), 2, 1e-5
    r = randn(1, POSITION + 1, zoo.WIDTH)
    step = torch.zeros_like(lin.embeddings)
    step[t] = h * r[0, t]
    after, before = (LocalMetric(lin.at(lin.embeddings + s * step), q.function).gradient[t] for s in (1, -1))
    (norms,) = curvature.block_norms([lin], [lin.token(TARGET)], [r])
    assert_close(norms[0, t], ((after - before) / (2 * h)).abs().sum(), rtol=1e-5, atol=1e-7)


def test_push_is_the_transpose_of_pull(specimen: Specimen) -> None:
    """⟨c, Jδ⟩ = ⟨Jᵀc, δ⟩."""
    for name in ("sure", "fisher", "directions"):
        q = local(specimen, name)
        c, tangents = randn(2, len(q.value)), randn(3, *q.lin.embeddings.shape, seed=1)
        left, right = c @ q.push(tangents).T, torch.einsum("ctd,ntd->cn", q.pull(c), tangents)
        assert_close(left, right, **EXACT)


def test_curvature(specimen: Specimen) -> None:
    """uᵀHu = d/ds of the slope along u, by central differences."""
    lin, rays, h = tls.linearize(specimen.model, PROMPT, POSITION), some_rays(1), 1e-5
    u = rays.dense(torch.arange(len(rays)))
    around = lin.at_each(lin.embeddings + h * torch.cat([u, -u]))
    for name in ("logit", "sure", "spread", "norm"):
        q = local(specimen, name)
        gradients = torch.stack([LocalMetric(other, q.function).gradient for other in around])
        expected = (gradients * torch.cat([u, -u])).sum((1, 2)).reshape(2, -1).sum(0) / (2 * h)
        found = q.curvatures(rays)
        assert found is not None
        assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_the_steepest_ray(specimen: Specimen) -> None:
    """Of a number the gradient; of a vector, close to the leading singular direction of its Jacobian."""
    for name, exactness in (("sure", 1 - 1e-9), ("fisher", 0.9)):
        q = local(specimen, name)
        rays = q.steepest(some_rays(1))
        jacobian = q.pull(torch.eye(len(q.value), dtype=torch.float64))
        tops = [torch.linalg.matrix_norm(jacobian[:, t], ord=2) for t in rays.token.tolist()]
        tops.append(torch.linalg.matrix_norm(jacobian.flatten(1), ord=2))
        ratio = q.slopes(rays).norm(dim=-1) / torch.stack(tops)
        assert ((ratio >= exactness) & (ratio <= 1 + 1e-9)).all()


def test_evaluate_is_trace(specimen: Specimen) -> None:
    """The forward pass without a graph gives the values of the one with it, between any two hooks."""
    model, tokens = specimen.model, torch.tensor([PROMPT, PROMPT[::-1]])
    last = "blocks.1.hook_resid_pre" if "blocks.1.hook_resid_pre" in model.hook_dict else "blocks.1.hook_in"
    values = randn(2, len(PROMPT), zoo.WIDTH)
    for of in ("ln_final", last):
        trace = models.trace(model, tokens, wrt=["hook_embed"], of=of, values={"hook_embed": values})
        readouts, logits = models.evaluate(model, tokens, of=of, values=values)
        assert_close(readouts, trace.output.detach(), **EXACT)
        assert (logits is None) == (trace.logits is None)
        if trace.logits is not None:
            assert_close(logits, trace.logits.detach(), **EXACT)
            assert_close(models.predict(model, tokens, values=values), logits, rtol=0, atol=0)


def test_embedding_matrix(specimen: Specimen) -> None:
    """Its rows are what stands at the embedding hook, and hooks that are set do not act."""
    with specimen.model.hooks(fwd_hooks=[("hook_embed", lambda value, hook: value * 0)]):
        table = models.embedding_matrix(specimen.model)
    assert table.shape == (VOCAB, zoo.WIDTH)
    assert not table.requires_grad
    assert_close(table[PROMPT], tls.linearize(specimen.model, PROMPT).embeddings, **EXACT)


SOME = ["bridge gpt2", "bridge mamba", "native soft cap", *(["hooked layer norm"] if zoo.HookedTransformer else [])]


def linearity(
    model: Any,
    prompt: Any,
    scope: tls.Scope,
    position: int = -1,
    wrt: str = "hook_embed",
    of: str = "ln_final",
    **options: Any,
) -> tls.LinearityReport:
    """The report of one prompt."""
    return tls.linearity(tls.linearize(model, prompt, position, wrt=wrt, of=of), scope, **options)


@pytest.fixture(params=SOME)
def some_specimen(request: pytest.FixtureRequest) -> Iterator[Specimen]:
    """A few kinds of model, for what is long and depends on the kind through the parts above alone."""
    with zoo.Float64():
        yield zoo.specimen(request.param)


# -- the whole --------------------------------------------------------------------------------------------------------


def test_a_linear_model_has_no_linearity_error(some_specimen: Specimen) -> None:
    """From the embedding to the stream before the first block everything is linear: no radius is finite."""
    names = some_specimen.model.hook_dict
    of = "blocks.0.hook_resid_pre" if "blocks.0.hook_resid_pre" in names else "blocks.0.hook_in"
    for scope in (Directions(), Directions(2)):
        report = linearity(some_specimen.model, PROMPT, scope, of=of, **FEW)
        assert (report.radius == torch.inf).all()
        assert (report.joint_radius == torch.inf).all()
        assert report.joint_error.max() < 1e-9
        assert report.error.max() < 1e-9
        assert report.reaches_a_token.all()
        assert not report.saturated
    assert (linearity(some_specimen.model, PROMPT, Directions(), of=of, **FEW).predicted_radius == torch.inf).all()


def test_curvature_predicts_the_radius_of_a_small_tolerance(some_specimen: Specimen) -> None:
    """predicted / measured → 1 as tolerance → 0."""
    scope = tls.SemanticScope(target=TARGET, quantity="log_prob")
    off = []
    for tolerance in (1e-2, 1e-4):
        sizes = [tolerance * 10 ** (k / 4) for k in range(-4, 13, 2)]
        report = linearity(
            some_specimen.model,
            PROMPT,
            scope,
            POSITION,
            tolerance=tolerance,
            sizes=sizes,
            positions=[1, 3],
            directions=2,
        )
        measured = torch.cat([report.radius, report.joint_radius[:, None]], 1)
        predicted = torch.cat([report.predicted_radius, report.joint_predicted_radius[:, None]], 1)
        within = (measured >= sizes[0]) & (measured < sizes[-1])
        assert within.float().mean() > 0.8
        off.append((predicted / measured - 1).abs()[within].median())
    assert off[1] < 1e-3
    assert off[1] < off[0]


def test_the_whole_from_its_definition(some_specimen: Specimen) -> None:
    """The error of the steepest direction, the slope and the removal, token by token, from linearisations elsewhere."""
    scope, sizes = tls.SemanticScope(target=TARGET), [0.01, 0.1, 1.0]
    report = linearity(some_specimen.model, PROMPT, scope, POSITION, sizes=sizes, positions=[1, -1])
    lin = tls.linearize(some_specimen.model, PROMPT, POSITION)
    g = lin.vjp(lin.cotangent(lambda z: z[TARGET])[None])[0]
    table = models.embedding_matrix(some_specimen.model)
    for row, t in enumerate((1, POSITION)):
        for column, size in enumerate(sizes):
            x = lin.embeddings.clone()
            x[t] += size * g[t] / g[t].norm()
            change = (lin.at(x).logits - lin.logits)[TARGET]
            error = (change - size * g[t].norm()).abs() / (size * g[t].norm())
            assert_close(report.error[0, row, column], error, rtol=1e-6, atol=1e-9)
        x = lin.embeddings.clone()
        x[t] = table.mean(0)
        change = (lin.at(x).logits - lin.logits)[TARGET].abs()
        assert_close(report.removal_change[row], change, **EXACT)
        assert_close(report.slope[row], scope(lin).scores[t], **EXACT)
        distance = (table.mean(0) - lin.embeddings[t]).norm()
        assert_close(report.understated[row], change / (distance * g[t].norm()), **EXACT)
        others = [i for i in range(VOCAB) if i != PROMPT[t]]
        assert_close(report.nearest_distance[row], (table[others] - lin.embeddings[t]).norm(dim=-1).min(), **EXACT)


def test_some_tokens_as_among_all(some_specimen: Specimen) -> None:
    """`positions` chooses rows; only what is drawn at random and the joint perturbation are others."""
    scope = tls.TemperatureScope(norm="logits")
    whole = linearity(some_specimen.model, PROMPT, scope, **FEW)
    some = linearity(some_specimen.model, PROMPT, scope, positions=[6, 2], **FEW)
    assert some.positions == (6, 2)
    for name in ("radius", "predicted_radius", "error"):
        assert_close(getattr(some, name)[[0, 2]], getattr(whole, name)[[0, 2]][:, [6, 2]], equal_nan=True, **EXACT)


def test_batches_change_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch size is about memory alone, and the same question has the same answer twice."""
    model = zoo.specimen("bridge llama").model
    with zoo.Float64():
        reports = [linearity(model, PROMPT[:3], tls.FisherScope(), **FEW) for _ in range(2)]
        numbers = [linearity(model, PROMPT[:3], tls.SemanticScope(), **FEW)]
        zoo.batches_of(monkeypatch, 1)
        reports.append(linearity(model, PROMPT[:3], tls.FisherScope(), **FEW))
        numbers.append(linearity(model, PROMPT[:3], tls.SemanticScope(), **FEW))
    for other in reports[1:]:
        assert_close(other.error, reports[0].error, **EXACT)
        assert_close(other.radius, reports[0].radius, **EXACT)
    assert_close(numbers[1].predicted_radius, numbers[0].predicted_radius, **EXACT)


def test_between_inner_hooks() -> None:
    """Away from the embedding the other tokens are those of the prompt."""
    model = zoo.specimen("bridge llama").model
    with zoo.Float64():
        report = linearity(model, PROMPT, tls.SemanticScope(), wrt="blocks.1.hook_resid_pre")
        x = tls.linearize(model, PROMPT, wrt="blocks.1.hook_resid_pre").embeddings
    distances = torch.cdist(x, x) + torch.eye(len(x)) * 1e9
    assert_close(report.nearest_distance, distances.min(-1).values, **EXACT)
    assert report.nearest_token == tuple(f"<{PROMPT[i]}>" for i in distances.argmin(-1).tolist())
    assert report.unit == "unit of norm at blocks.1.hook_resid_pre"


def test_the_model_is_left_as_found() -> None:
    """With the user's hooks acting, under no_grad, and after a refusal."""
    model = zoo.SPECIES["bridge llama"]().model
    with zoo.Float64():
        model(torch.tensor([PROMPT]))
        plain = linearity(model, PROMPT, tls.SemanticScope(target=TARGET))
        with model.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", lambda value, hook: value * 0.9)]), unchanged(model):
            patched = linearity(model, PROMPT, tls.SemanticScope(target=TARGET))
        assert not torch.allclose(plain.slope, patched.slope)
        with unchanged(model), torch.no_grad():
            assert_close(linearity(model, PROMPT, tls.SemanticScope(target=TARGET)).error, plain.error, **EXACT)
        with unchanged(model), pytest.raises(ValueError, match="unknown|outside"):
            linearity(model, PROMPT, tls.SemanticScope(target=VOCAB))


# -- on a trained model -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(tiny: Any) -> tls.LinearityReport:
    return linearity(tiny, KEYS, tls.SemanticScope())


def test_how_well_curvature_predicts(report: tls.LinearityReport) -> None:
    """At a tolerance of 10% it is a rule of thumb, on a trained model too."""
    ratio = (report.predicted_radius / report.radius).log()
    assert ratio.median().abs() < 0.2
    correlation = torch.corrcoef(torch.stack([report.radius, report.predicted_radius]).log().flatten(1))[0, 1]
    assert correlation > 0.8


def test_a_sure_prediction_is_saturated(tiny: Any) -> None:
    """Its log-probability has no slope and much to lose; its logit has a slope."""
    prompt = examples("translation", 1)[0].prompt
    sure = linearity(tiny, prompt, tls.SemanticScope(quantity="log_prob"), **FEW)
    assert sure.probability is not None
    assert sure.probability > 0.99
    assert sure.saturated
    assert sure.understated.max() > 100
    assert "Saturated: the prediction is sure (1 − p = " in sure.summary()
    surest = replace(sure, probability=1.0, left_open=3.2e-24)
    assert "(1 − p = 3.2e-24)" in surest.summary()
    lin = tls.linearize(tiny, prompt)
    others = lin.log_probs.exp().sort().values[:-1].sum()
    assert sure.left_open == pytest.approx(float(others), rel=1e-12)
    assert repr(sure).endswith("; saturated)")
    logit = linearity(tiny, prompt, tls.SemanticScope(), **FEW)
    assert not logit.saturated
    assert "aturated" not in logit.summary() + repr(logit)


def test_in_half_precision(tiny: Any) -> None:
    """Where rounding hides the error there is none; the radii that are left are those of float32."""
    model = tls.load_tiny(dtype=torch.bfloat16)
    half = linearity(model, KEYS, tls.SemanticScope())
    full = linearity(tiny, KEYS, tls.SemanticScope())
    assert half.error.isnan().float().mean() > full.error.isnan().float().mean()
    known = half.radius.isfinite() & full.radius.isfinite()
    assert known.float().mean() > 0.5
    assert (half.radius / full.radius)[known].log().abs().median() < 0.7


def test_repr(report: tls.LinearityReport) -> None:
    shown = repr(report)
    assert shown.startswith("LinearityReport(SemanticScope(): within 10% up to 0.0")
    assert shown.endswith("(medians of 10 tokens))")
    assert "\n" not in shown


def test_summary(report: tls.LinearityReport) -> None:
    lines = report.summary().splitlines()
    assert lines[0].startswith("SemanticScope(): the first-order prediction is within 10% up to a perturbation of 0.0")
    assert any(line.startswith("Curvature predicts the radii at ") for line in lines)
    assert any(line.startswith("Removing ") for line in lines)


def test_to_dataframe(report: tls.LinearityReport) -> None:
    frame = report.to_dataframe()
    assert list(frame.token) == list(report.str_tokens)
    assert frame.radius_swap.tolist() == report.radius[2].tolist()
    assert frame.predicted_radius_random.tolist() == report.predicted_radius[1].tolist()
    assert frame.nearest_distance.tolist() == report.nearest_distance.tolist()


def test_plot(report: tls.LinearityReport, tmp_path: Path) -> None:
    """It shows the curves and the radii, and opens no window."""
    import matplotlib.pyplot as plt

    figure = report.plot()
    curves, radii = figure.axes
    median = next(line for line in curves.lines if line.get_label() == "steepest")
    assert_close(torch.tensor(median.get_ydata(), dtype=torch.float64), report.error[0].nanquantile(0.5, dim=0))
    assert report.radius[0].tolist() in [list(line.get_xdata()) for line in radii.lines]
    assert [label.get_text() for label in radii.get_yticklabels()] == list(report.str_tokens)
    assert not plt.get_fignums()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(tmp_path / "figure.png")


# -- refusals ---------------------------------------------------------------------------------------------------------


class Opaque(tls.Scope):
    """A scope that is the slope of nothing."""

    def measure(self, lin: tls.Linearization) -> tls.Measurement:
        return tls.Measurement(lin.embeddings.norm(dim=-1))

    def unit(self, lin: tls.Linearization) -> str:
        return "norm"

    def __repr__(self) -> str:
        return "Opaque()"


class Constant(Directions):
    def metric(self, lin: tls.Linearization) -> Any:
        return lambda readout, logits: torch.tensor(3.0)


class Detached(Directions):
    def metric(self, lin: tls.Linearization) -> Any:
        return lambda readout, logits: logits.detach().max()


class Complex(Directions):
    def metric(self, lin: tls.Linearization) -> Any:
        return lambda readout, logits: logits.sum() * 1j


class Float(Directions):
    def metric(self, lin: tls.Linearization) -> Any:
        return lambda readout, logits: 3.0


class Infinite(Directions):
    def metric(self, lin: tls.Linearization) -> Any:
        return lambda readout, logits: logits.sum() / 0


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tolerance": 0.0}, ValueError, "tolerance is a relative error between 0 and 1, got 0.0"),
        ({"tolerance": 1.5}, ValueError, "tolerance is a relative error between 0 and 1, got 1.5"),
        ({"tolerance": "0.1"}, TypeError, "tolerance is a relative error between 0 and 1, got '0.1'"),
        ({"sizes": "0.1"}, ValueError, "positive and increasing, at least one, got '0.1'"),
        ({"sizes": 0.1}, ValueError, "positive and increasing, at least one, got 0.1"),
        ({"sizes": ["0.1"]}, TypeError, "positive and increasing, at least one, got '0.1'"),
        (
            {"generator": 5},
            TypeError,
            r"must be a torch.Generator or None, got 5: take torch.Generator\('cpu'\).manual_s",
        ),
        ({"sizes": []}, ValueError, r"positive and increasing, at least one, got \[\]"),
        ({"sizes": [0.0, 1.0]}, ValueError, r"positive and increasing, at least one, got 0.0"),
        ({"sizes": [2.0, 1.0]}, ValueError, r"positive and increasing, at least one, got \[2.0, 1.0\]"),
        ({"sizes": [1.0, float("inf")]}, ValueError, "positive and increasing"),
        ({"directions": 0}, ValueError, "directions is how many to try of each kind, 1 at least, got 0"),
        ({"directions": 1.5}, TypeError, "directions is how many .*, 1 at least, and an integer, got 1.5"),
        ({"positions": [8]}, ValueError, "position 8 is out of range: the prompt has 8 tokens"),
        ({"positions": [1, -7]}, ValueError, r"at least one, and each only once, got \[1, -7\]"),
        ({"positions": []}, ValueError, r"at least one, and each only once, got \[\]"),
        ({"positions": ["keys"]}, TypeError, "position must be an integer, got 'keys'"),
        ({"positions": 2}, TypeError, r"positions are several, got 2: write \[2\]"),
        ({"scope": tls.SemanticScope}, TypeError, r"write SemanticScope\(\)"),
        ({"scope": Opaque()}, ValueError, r"Opaque\(\) has no metric .*the method `metric`"),
        (
            {"scope": Infinite()},
            ValueError,
            r"the metric of Infinite\(\) is not finite at this prompt: \[(-?inf|nan)",
        ),
        *(({"scope": s()}, ValueError, "which cannot be differentiated with respect to") for s in (Constant, Detached)),
        *(({"scope": s()}, ValueError, "must give a tensor of real numbers, got") for s in (Complex, Float)),
        ({"of": "blocks.1.hook_resid_pre"}, ValueError, "needs the logits"),
        ({"prompt": [3], "wrt": "blocks.1.hook_resid_pre"}, ValueError, "one token, so that there is no other one at"),
    ],
)
def test_refusals(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = zoo.specimen("bridge llama").model
    arguments = {"prompt": PROMPT, "scope": tls.SemanticScope()} | options
    with pytest.raises(error, match=message):
        linearity(model, **arguments)


@pytest.mark.usefixtures("no_type_checks")
def test_a_generator_on_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere(torch.Generator):
        device = torch.device("cuda:0")

    with pytest.raises(
        ValueError, match=r"the generator is on cuda:0, the model on cpu: take torch.Generator\('cpu'\)"
    ):
        linearity(
            zoo.specimen("bridge llama").model,
            PROMPT,
            tls.SemanticScope(),
            generator=Elsewhere(),  # type: ignore[arg-type]
        )


def test_a_scope_that_cannot_be_asked() -> None:
    """Its own refusal comes through: here ‖y‖ is constant."""
    model = zoo.SPECIES["bridge llama"]().model
    torch.nn.init.ones_(model.original_model.model.norm.weight)
    with pytest.raises(ValueError, match="has no gain"):
        linearity(model, PROMPT, tls.TemperatureScope())


def test_a_hook_that_never_fires() -> None:
    model = zoo.specimen("bridge llama").model
    with pytest.raises(ValueError, match="'blocks.0.attn.hook_result' never fired"):
        models.evaluate(model, torch.tensor([PROMPT]), of="blocks.0.attn.hook_result")


def test_nothing_to_run_on() -> None:
    model = zoo.specimen("bridge llama").model
    with pytest.raises(ValueError, match=r"nothing to run the model on: the ids have the shape \[0, 3\]"):
        models.evaluate(model, torch.zeros(0, 3, dtype=torch.long))
    lin = tls.linearize(model, PROMPT)
    for ask in (lin.evaluate, lin.at_each):
        with pytest.raises(ValueError, match=rf"nothing to run the model on: .* \[0, {len(PROMPT)}\]"):
            ask(lin.embeddings.new_empty(0, *lin.embeddings.shape))
    span = tls.linearize(model, PROMPT, answer=[3, 4])
    with pytest.raises(ValueError, match="nothing to run the model on"):
        span.evaluate(span.embeddings.new_empty(0, *span.embeddings.shape))


def test_under_a_fused_attention_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no double backward: a number is reported without its predicted radius, a vector is refused."""
    model = zoo.specimen("bridge llama").model
    grad = torch.autograd.grad

    def once(*args: Any, create_graph: bool = False, **kwargs: Any) -> Any:
        if create_graph and kwargs.get("inputs", args[1]) is not None and args[0].shape[-1:] == (zoo.WIDTH,):
            raise RuntimeError("derivative for aten::_scaled_dot_product_flash_attention_backward is not implemented")
        return grad(*args, create_graph=create_graph, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", once)
    report = linearity(model, PROMPT, tls.SemanticScope(target=TARGET))
    assert report.predicted_radius.isnan().all()
    assert report.radius.isfinite().any()
    assert "cannot be differentiated twice" in report.notes[0]
    assert "Note: no predicted radius" in report.summary()
    report.plot()
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        linearity(model, PROMPT, tls.FisherScope())
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):
        linearity(model, PROMPT, tls.SemanticScope(target=TARGET))
