"""Answers of several tokens: what must hold of a span on every kind of model, and what people ask with it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import tl_scopes as tls
from tests import zoo
from tests.zoo import Specimen
from tl_scopes import models
from tl_scopes.jacobian.line_integral import integrate
from tl_scopes.jacobian.metric import LocalMetric
from tl_scopes.jacobian.span import Exchange, linearize_answers
from tl_scopes.models import Target, Token, Work, memory
from tl_scopes.scopes.baselines import GradientTimesInput, IntegratedGradients, LeaveOneOut

PROMPT, ANSWER, OTHER = [3, 14, 15, 9, 26], [5, 35, 8], [7, 30]
EXACT = {"rtol": 1e-10, "atol": 1e-12}
KEYS = "The keys to the old cabinet near the door"


@pytest.fixture
def span(specimen: Specimen) -> tls.Span:
    lin = tls.linearize(specimen.model, PROMPT, answer=ANSWER, score_answer=True)
    assert isinstance(lin, tls.Span)
    return lin


@pytest.fixture
def both(specimen: Specimen) -> tls.Span:
    """An answer compared with another one, of another length."""
    lin = tls.SemanticScope(ANSWER, versus=OTHER).with_answer(tls.linearize(specimen.model, PROMPT))
    assert isinstance(lin, tls.Span)
    return lin


@dataclass(frozen=True, eq=False)
class Ranked(tls.SemanticScope):
    """Given scores, about an answer beside another one."""

    scores: Any = None
    versus: Any = None

    def __init__(self, scores: torch.Tensor, versus: list[int]) -> None:
        super().__init__(versus=versus)
        object.__setattr__(self, "scores", scores)

    def measure_many(self, lins: Any) -> list[tls.Measurement]:
        rest = [len(lin.tokens) - lin.scored for lin in lins]
        return [
            tls.Measurement(torch.cat([self.scores[: len(lin.tokens) - n], torch.zeros(n)]))
            for lin, n in zip(lins, rest, strict=True)
        ]


def log_probs(specimen: Specimen, answer: list[int]) -> float:
    """Σ_k log p(y_k | prompt, y_<k), from a plain forward pass."""
    with torch.no_grad():
        logits = specimen.model(torch.tensor([[*PROMPT, *answer]]))[0].double().log_softmax(-1)
    return sum(float(logits[len(PROMPT) - 1 + k, id]) for k, id in enumerate(answer))


def gradient(specimen: Specimen, answer: list[int]) -> torch.Tensor:
    """∂S/∂x over prompt and answer, from the dense Jacobian of each prediction by itself."""
    total = torch.zeros(())
    for k, id in enumerate(answer):
        one = tls.linearize(specimen.model, [*PROMPT, *answer[:k]])
        pulled = torch.einsum("k,ktd->td", one.cotangent(lambda z, id=id: z.log_softmax(-1)[id]), one.as_matrix())
        padded = torch.zeros(len(PROMPT) + len(answer) - 1, pulled.shape[1], dtype=pulled.dtype)
        padded[: len(pulled)] = pulled
        total = total + padded
    return total


# -- the linearisation ------------------------------------------------------------------------------------------------


def test_rows_are_the_predictions_alone(specimen: Specimen, span: tls.Span) -> None:
    """Each prediction of a span is what a linearisation of the text up to there gives."""
    for k, one in enumerate(span.single):
        alone = tls.linearize(specimen.model, [*PROMPT, *ANSWER[:k]])
        assert_close(one.readout, alone.readout, **EXACT)
        assert_close(one.logits, alone.logits, **EXACT)
        assert_close(one.as_matrix(), alone.as_matrix(), **EXACT)
    assert_close(span.readout, torch.cat([one.readout for one in span.single]), **EXACT)
    assert_close(span.logits, torch.stack([one.logits for one in span.single]), **EXACT)


def test_span_is_log_probability_and_its_gradient(specimen: Specimen, span: tls.Span) -> None:
    answer = tls.SemanticScope()(span)
    assert_close(answer.value, log_probs(specimen, ANSWER), **EXACT)
    assert_close(answer.scores, gradient(specimen, ANSWER).norm(dim=-1), **EXACT)
    assert answer.target == Target(tuple(Token(id, f"<{id}>") for id in ANSWER))
    assert answer.quantity == "log p('<5><35><8>')"


def test_two_answers_of_different_length(specimen: Specimen, both: tls.Span) -> None:
    """The gradient of S_v − S_u with respect to the prompt they share; the answers are not scored."""
    answer, n = tls.SemanticScope()(both), len(PROMPT)
    difference = gradient(specimen, ANSWER)[:n] - gradient(specimen, OTHER)[:n]
    assert_close(answer.scores, difference.norm(dim=-1), **EXACT)
    assert_close(answer.value, log_probs(specimen, ANSWER) - log_probs(specimen, OTHER), **EXACT)
    assert len(both.ends.entries) == 2
    assert [answer.target.ids, answer.versus.ids] == [ANSWER, OTHER]
    with pytest.raises(ValueError, match=r"TemperatureScope\(.*\) does not compare two answers, and this is"):
        tls.TemperatureScope(norm="logits")(both)


def test_adjoint_and_finite_differences(span: tls.Span, both: tls.Span) -> None:
    """⟨c, Jδ⟩ = ⟨Jᵀc, δ⟩, and J is the slope of the readouts, through `at` and `evaluate`."""
    for lin in (span, both):
        generator = torch.Generator().manual_seed(0)
        c = torch.randn(2, len(lin.readout), dtype=torch.float64, generator=generator)
        d = torch.randn(2, *lin.embeddings.shape, dtype=torch.float64, generator=generator)
        left = torch.einsum("pk,qk->pq", c, lin.jvp(d))
        assert_close(left, torch.einsum("ptd,qtd->pq", lin.vjp(c), d), **EXACT)
        h = 1e-5
        ahead, behind = lin.at_each(torch.stack([lin.embeddings + h * d[0], lin.embeddings - h * d[0]]))
        assert_close((ahead.readout - behind.readout) / (2 * h), lin.jvp(d)[0], rtol=1e-5, atol=1e-7)
        readouts, logits = lin.evaluate(torch.stack([lin.embeddings, lin.embeddings + h * d[0]]))
        assert_close(readouts[0], lin.readout, **EXACT)
        assert_close(readouts[1], ahead.readout, **EXACT)
        assert logits is not None
        assert_close(logits[0], lin.logits, **EXACT)
        again = lin.at_tokens(lin.tokens)
        assert_close(again.vjp(c), lin.vjp(c), **EXACT)
        assert_close(lin.at(lin.embeddings).vjp(c), lin.vjp(c), **EXACT)


def test_batches_and_checkpoints_change_no_number(
    specimen: Specimen, span: tls.Span, monkeypatch: pytest.MonkeyPatch
) -> None:
    c = torch.randn(3, len(span.readout), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = span.vjp(c)
    lean = tls.linearize(specimen.model, PROMPT, answer=ANSWER, checkpoint=True)
    assert_close(lean.vjp(c), whole, **EXACT)
    zoo.batches_of(monkeypatch, 1)
    assert_close(span.vjp(c), whole, **EXACT)


def test_rows_sum_to_the_span(specimen: Specimen) -> None:
    """The gradient of a span is the sum of those of its rows, for every part of an answer."""
    rows = tls.answer_map(specimen.model, PROMPT, ANSWER, tls.SemanticScope())
    assert rows.scores.shape == (3, len(PROMPT) + 2)
    for start, stop in ((0, 3), (1, 3), (0, 2)):
        part = rows.lin.part(start, stop)
        f = tls.SemanticScope()
        summed = sum(
            one.vjp(one.cotangent(f.function(one))[None])[0, : part.prompt_length]
            for one in (rows.lin.part(k, k + 1) for k in range(start, stop))
        )
        assert_close(rows[start:stop].scores, summed.norm(dim=-1), **EXACT)
    for k, row in enumerate(rows):
        alone = tls.SemanticScope(ANSWER[k], quantity="log_prob")(tls.linearize(specimen.model, PROMPT + ANSWER[:k]))
        assert_close(row.scores, alone.scores, **EXACT)
        assert_close(row.value, alone.value, **EXACT)
        assert not rows.scores[k, len(PROMPT) + k :].any()


def test_one_token_is_what_it_was(specimen: Specimen) -> None:
    """A target of one token, as text, id, list or answer, is the same number to the last bit."""
    lin = tls.linearize(specimen.model, PROMPT)
    expected = tls.SemanticScope(7)(lin)
    for answer in (
        tls.SemanticScope([7])(lin),
        tls.SemanticScope({7})(lin),
        tls.attribute(specimen.model, PROMPT, tls.SemanticScope(7)),
        tls.attribute(specimen.model, PROMPT, tls.SemanticScope(), answer=[7]),
    ):
        assert_close(answer.scores, expected.scores, rtol=0, atol=0)
        assert (answer.unit, answer.value, answer.quantity) == (expected.unit, expected.value, expected.quantity)


# -- all scopes -------------------------------------------------------------------------------------------------------


def test_fisher_is_the_sum_over_predictions(span: tls.Span) -> None:
    """Σ_k tr(J_kᵀ F_k J_k) = the sum of the exact traces; the same probes as for one token estimate it."""
    expected = torch.zeros(len(span.tokens), dtype=torch.float64)
    for one in span.single:
        expected[: len(one.tokens)] += tls.FisherScope(exact=True)(one).scores
    assert_close(tls.FisherScope(exact=True)(span).scores, expected, rtol=1e-7, atol=1e-10)
    draws = [tls.FisherScope(12, generator=torch.Generator().manual_seed(i))(span) for i in range(30)]
    assert all(answer.backward_passes <= 12 for answer in draws)
    mean = torch.stack([answer.scores for answer in draws]).mean(0)
    error = torch.stack([answer.standard_error for answer in draws]).square().mean(0).sqrt()
    if error.any():
        z = (mean - expected) / (error / len(draws) ** 0.5)
        assert float(z.abs().max()) < 5


def test_sums_over_predictions(specimen: Specimen, span: tls.Span) -> None:
    """Temperature, a direction and gradient × input of a span: the gradient is the sum of those of its predictions."""
    d = torch.randn(len(span.single[0].readout), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for scope in (tls.TemperatureScope(norm="logits"), tls.DirectionScope(d, "ln_final")):
        total = torch.zeros_like(span.embeddings)
        for one in span.single:
            total[: len(one.tokens)] += one.vjp(scope.cotangents(one))[0]
        assert_close(scope(span).scores, total.norm(dim=-1), **EXACT)
        assert_close(scope(span).value, sum(scope(one).value for one in span.single), **EXACT)
    found = GradientTimesInput()(span)
    assert_close(found.signed, (gradient(specimen, ANSWER) * span.embeddings).sum(-1), **EXACT)


def test_a_scope_of_ones_own(span: tls.Span) -> None:
    """A scope that knows nothing of spans is asked about each prediction, and their cotangents belong together."""

    class Own(tls.JacobianScope):
        def cotangents(self, lin: tls.Linearization) -> torch.Tensor:
            return lin.cotangent(lambda logits: logits.log_softmax(-1).max())[None]

        def unit(self, lin: tls.Linearization) -> str:
            return "nat"

        def metric(self, lin: tls.Linearization) -> Any:
            def confidence(readout: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
                assert (readout.shape, logits.shape) == (lin.readout.shape, lin.logits.shape)
                return logits.log_softmax(-1).max()

            return confidence

    total = torch.zeros_like(span.embeddings)
    for one in span.single:
        total[: len(one.tokens)] += one.vjp(Own().cotangents(one))[0]
    assert_close(Own()(span).scores, total.norm(dim=-1), **EXACT)
    assert_close(Own()(span).value, sum(Own()(one).value for one in span.single), **EXACT)

    class Without(Own):
        def metric(self, lin: tls.Linearization) -> None:
            return None

    assert Without()(span).value is None
    assert tls.check(span, Without())["linearity"].verdict == "not applicable"

    class Several(Own):
        def cotangents(self, lin: tls.Linearization) -> torch.Tensor:
            return torch.eye(2, len(lin.readout), dtype=torch.float64)

    with pytest.raises(ValueError, match="has 2 cotangents at one prediction, and how those of several"):
        Several()(span)


def confidence(logits: torch.Tensor) -> torch.Tensor:
    """A metric of one prediction."""
    return logits[0, -1].log_softmax(-1).max() + logits[0, -1, 3]


def test_scores_are_slopes_of_the_joint_metric(specimen: Specimen, span: tls.Span) -> None:
    """Of an answer too: what a scope says that it is about is what its scores are slopes of, and its value."""
    d = torch.randn(len(span.single[0].readout), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for lin in (span, span.part(0, 1), span.part(1, 3)):
        for scope in (
            tls.SemanticScope(),
            tls.TemperatureScope(norm="logits"),
            tls.DirectionScope(d, "ln_final"),
            tls.MetricScope(confidence),
        ):
            answer, q = scope(lin), LocalMetric(lin, scope.joint_metric(lin))
            assert_close(q.gradient.norm(dim=-1)[: lin.scored], answer.scores, **EXACT)
            assert_close(q.value, torch.tensor([answer.value], dtype=torch.float64), **EXACT)


def test_one_token_of_an_answer_is_an_ordinary_prediction(tiny: Any) -> None:
    """Also to the checks, and to scopes that are about one prediction."""
    lin, said = tls.linearize(tiny, KEYS), tls.linearize(tiny, KEYS, answer=" are")
    for scope, alone in (
        (tls.HetaScope(probes=2), tls.HetaScope(" are", probes=2)),
        (tls.SpectralScope("frobenius"), tls.SpectralScope("frobenius")),
        (tls.MetricScope(confidence), tls.MetricScope(confidence)),
    ):
        report, expected = tls.linearity(said, scope, positions=[2]), tls.linearity(lin, alone, positions=[2])
        assert_close(report.radius, expected.radius)
        found, checks = tls.check(said, scope), tls.check(lin, alone)
        assert_close(found.answer.scores, checks.answer.scores)
        # What was said is its target also where the scope names none, which "repetition" asks for.
        assert [one for one in found if one.name != "repetition"] == [one for one in checks if one.name != "repetition"]
    longer = tls.linearize(tiny, KEYS, answer=" are old")
    for ask in (tls.linearity, tls.check):
        with pytest.raises(ValueError, match="is about one prediction at a time, and this is the answer"):
            ask(longer, tls.HetaScope(probes=2))


def test_maps_of_a_metric(tiny: Any, no_type_checks: None) -> None:
    """Each row of a map of an answer is the metric at that prediction."""
    scope = tls.MetricScope(confidence)
    rows = tls.answer_map(tiny, KEYS, " are old", scope)
    lin = tls.linearize(tiny, KEYS, answer=" are old")
    for row, one in zip(rows, lin.single, strict=True):
        assert row.value == pytest.approx(scope(one).value, rel=1e-5)
        assert_close(row.scores[: len(one.tokens)], scope(one).scores, rtol=1e-4, atol=1e-5)
    whole = tls.attribution_map(tiny, KEYS, scope, target="next")
    single = tls.attribution_map(tiny, KEYS, scope)
    assert_close(whole.scores, single.scores[:-1, :-1], rtol=1e-4, atol=1e-5)


def test_leave_one_out_by_hand(specimen: Specimen) -> None:
    lin = tls.linearize(specimen.model, PROMPT, answer=ANSWER)
    scores, kl = LeaveOneOut(quantity="log_prob")(lin), LeaveOneOut()(lin)
    for i in range(len(PROMPT)):
        moved = lin.embeddings.clone()
        moved[i] = 0
        other = lin.at(moved)
        ids = torch.tensor(ANSWER)
        drop = (lin.log_probs - other.log_probs)[torch.arange(3), ids].sum()
        assert_close(scores.scores[i], drop, rtol=1e-9, atol=1e-10)
        p = lin.log_probs.exp()
        assert_close(kl.scores[i], (p * (lin.log_probs - other.log_probs)).sum(), rtol=1e-9, atol=1e-10)
    assert len(scores.scores) == len(PROMPT)


def test_integrated_gradients_are_complete(span: tls.Span) -> None:
    """The line moves the prompt alone, and the contributions sum to the change of the answer's log-probability."""
    lin = tls.linearize(span.model, PROMPT, answer=ANSWER)
    answer = IntegratedGradients(steps=200, start=0.3)(lin)
    begin = torch.lerp(torch.zeros_like(lin.embeddings), lin.embeddings, 0.3)
    begin[len(PROMPT) :] = lin.embeddings[len(PROMPT) :]
    change = tls.SemanticScope()(lin).value - tls.SemanticScope()(lin.at(begin)).value
    if "mixtral" not in span.model.cfg.model_name.lower():  # a choice of experts has jumps
        assert_close(float(answer.signed.sum()), change, rtol=0.02, atol=1e-3)
    assert_close(answer.value - answer.baseline_value, change, **EXACT)


def test_corrections_and_other_scopes(span: tls.Span) -> None:
    lin = tls.linearize(span.model, PROMPT, answer=ANSWER)
    corrected = tls.PositionCorrectedScope(tls.SemanticScope(), 2)(lin)
    assert len(corrected.scores) == len(PROMPT)
    assert_close(corrected.uncorrected, tls.SemanticScope()(lin).scores, **EXACT)
    for scope in (tls.HetaScope(), tls.SpectralScope()):
        with pytest.raises(ValueError, match="is about one prediction at a time, and this is the answer"):
            scope(lin)


# -- sets -------------------------------------------------------------------------------------------------------------


def test_sets(specimen: Specimen) -> None:
    """A set is the log-sum-exp of its logits, or the log of the sum of its probabilities."""
    lin = tls.linearize(specimen.model, PROMPT)
    answer = tls.SemanticScope({5, 7}, versus={8, 9, 30})(lin)
    z = lin.logits
    assert_close(answer.value, float(z[[5, 7]].logsumexp(0) - z[[8, 9, 30]].logsumexp(0)), **EXACT)
    cotangent = lin.cotangent(lambda z: z[[5, 7]].logsumexp(0) - z[[8, 9, 30]].logsumexp(0))
    assert_close(answer.scores, lin.vjp(cotangent[None])[0].norm(dim=-1), **EXACT)
    best = int(z.argmax())
    for members in ({5, 7}, {best, (best + 1) % len(z)}):
        found = tls.SemanticScope(members, quantity="log_prob")(lin)
        assert_close(found.value, float(lin.log_probs.exp()[sorted(members)].sum().log()), **EXACT)
    assert found.target is not None
    exchange = Exchange.of(specimen.model, models.read_prompt(specimen.model, PROMPT), found.target)
    (span,) = linearize_answers(specimen.model, [exchange], models.EMBEDDING, models.READOUT)
    part = span.part(0, 1)  # of an answer that is a set, all of it
    assert part.answer == found.target
    assert_close(tls.SemanticScope()(part).value, found.value, **EXACT)
    assert tls.SemanticScope({5, 7}).target == frozenset({5, 7})
    assert repr(tls.SemanticScope({5, 7})) == "SemanticScope(target={5, 7})"


# -- use --------------------------------------------------------------------------------------------------------------


def test_targets_in_words(tiny: Any) -> None:
    lin = tls.linearize(tiny, KEYS)
    answer = tls.SemanticScope(" are old", versus=" is old.")(lin)
    assert (answer.target.text, answer.versus.text) == (" are old", " is old.")
    assert answer.quantity == "log p(' are old') − log p(' is old.')"
    assert answer.unit == "nat per unit of embedding norm"
    same = tls.attribute(tiny, KEYS, tls.SemanticScope(versus=" is old."), answer=" are old")
    assert_close(same.scores, answer.scores)
    assert len(tls.attribute(tiny, KEYS, tls.SemanticScope(), answer=" are old", score_answer=True).scores) == 11
    assert tls.Attribution.from_json(answer.to_json()).target == answer.target


def test_next_token_map(tiny: Any) -> None:
    """Each position explains the token that follows in the text."""
    found = tls.attribution_map(tiny, KEYS, tls.SemanticScope(), target="next")
    lin = tls.linearize(tiny, KEYS)
    assert [answer.target.id for answer in found] == lin.tokens[1:].tolist()
    assert_close(found[3].scores, tls.SemanticScope(int(lin.tokens[4]))(tls.linearize(tiny, KEYS, 3)).scores)
    hidden = tls.attribution_map(tiny, "The keys to", tls.HetaScope(), target="next")
    assert [answer.target.text for answer in hidden] == ["The", " keys", " to"]


def test_answer_map_in_words(tiny: Any, no_type_checks: None) -> None:
    said = tls.generate(tiny, KEYS, 4)
    rows = tls.answer_map(tiny, KEYS, said, tls.SemanticScope())
    assert rows.text == said.text == " are new. The"
    assert [row.target.text for row in rows] == list(said.str_tokens)
    assert rows[" new."].target.text == " new."
    assert_close(rows[" new."].scores, rows[1:3].scores, rtol=0, atol=0)
    assert_close(rows.span((4, 9)).scores, rows[1:3].scores, rtol=0, atol=0)
    assert rows[-1] is rows.answers[3]
    assert list(rows.to_dataframe().row.unique()) == [0, 1, 2, 3]
    assert "4 tokens of the answer, 10 of the prompt" in repr(rows)
    for where, message in (("keys", "does not hold 'keys'"), ("e", "holds 'e' at the characters"), ("", "not hold ''")):
        with pytest.raises(ValueError, match=message):
            rows[where]
    with pytest.raises(ValueError, match=r"has the characters 0 to 13, got \(5, 99\)"):
        rows.span((5, 99))
    with pytest.raises(TypeError, match=r"a span is a text or a pair of characters \(start, stop\), got 3"):
        rows.span(3)  # type: ignore[arg-type]
    with pytest.raises(IndexError, match="there is no token 4 in the answer: it has 4"):
        rows[4]
    with pytest.raises(IndexError, match="one token or more that follow one another"):
        rows[2:2]


def test_traced_by_hand(tiny: Any, no_type_checks: None) -> None:
    """Three tokens: w(I − Q)⁻¹R, in closed form and per hop."""
    rows = tls.answer_map(tiny, KEYS, " are new.", tls.SemanticScope())
    share = rows.share.double()
    R, (a, b, c) = share[:, :10], (share[1, 10], share[2, 10], share[2, 11])
    expected = (R[0] + (a * R[0] + R[1]) + ((b + a * c) * R[0] + c * R[1] + R[2])) / 3
    found = rows.traced()
    assert_close(found.total, expected)
    assert_close(found.total.sum(), torch.tensor(1.0, dtype=torch.float64), rtol=1e-6, atol=0)
    assert_close(found.hops[0], R.mean(0))
    last = rows.traced(2, span=slice(2, 3))
    with pytest.raises(TypeError, match="the span of a trace is a slice of the rows, .* got ' new'"):
        rows.traced(span=" new")  # type: ignore[arg-type]
    assert_close(last.hops[1], b * R[0] + c * R[1])
    assert last.left == pytest.approx(float(c * a))
    Q = torch.zeros(3, 3, dtype=torch.float64)
    Q[:, :2] = share[:, 10:]
    assert_close(found.total, torch.full((3,), 1 / 3, dtype=torch.float64) @ torch.linalg.inv(torch.eye(3) - Q) @ R)
    assert "shares, not derivatives" in repr(found)
    assert found.to_dataframe().total.sum() == pytest.approx(1)
    assert last.answer.predictions == ()  # those of the first token of the answer are not of this one
    assert "; explained are the tokens 3 to 3 of 3 of the answer" in last.answer.notes[-1]
    assert found.answer.predictions == rows[0].predictions
    signed = tls.answer_map(tiny, KEYS, " are new.", tls.RelevanceScope(), rules="linear")
    assert signed.share[1].min() < 0
    assert_close(signed.traced(1, span=slice(1, 2)).total, signed.share[1, :10].abs().double())
    assert signed.traced().answer.notes[-1].endswith("; of shares with a sign the sizes")
    assert "of shares with a sign" not in found.answer.notes[-1]
    with pytest.raises(ValueError, match="hops must be at least 1, got 0"):
        rows.traced(0)
    with pytest.raises(ValueError, match="holds no token of the answer, which has 3"):
        rows.traced(span=slice(3, 3))


def flashtrace(rows: torch.Tensor, prompt_length: int, sink: int, hops: int) -> list[torch.Tensor]:
    """FlashTrace's recursion (Pan et al. 2026, arXiv:2602.01914), for a token of the answer and given rows.

    What importance falls on the prompt is observed, and what falls on the tokens generated before, normalised, are the
    weights in which their rows are added up for the next hop. A hop counts by the ratio of what was passed on to what
    there was, times those of the hops before it.
    """
    importance, ratio, observed = rows[sink], 1.0, []
    for _ in range(hops + 1):
        observed.append(ratio * importance[:prompt_length])
        thinking = importance[prompt_length : prompt_length + sink]
        if not thinking.any():
            break
        ratio *= float(thinking.sum() / importance.sum())
        importance = thinking / thinking.sum() @ rows[:sink]
    return observed


def test_traced_is_the_recursion(specimen: Specimen) -> None:
    """`traced` is FlashTrace's recursion on the same rows, per hop, and w (I − Q)⁻¹ R for several tokens together."""
    rows = tls.answer_map(specimen.model, PROMPT, [*ANSWER, 30, 2], tls.SemanticScope())
    n = len(PROMPT)
    for sink in (2, 4):
        for hops in (0, 1, 5):
            expected = torch.stack(flashtrace(rows.share, n, sink, hops))
            found = rows.traced(hops + 1, span=slice(sink, sink + 1))
            assert_close(found.hops, expected[: len(found.hops)], **EXACT)
            assert not expected[len(found.hops) :].any()
    R, Q = rows.share[:, :n], torch.nn.functional.pad(rows.share[:, n:], (0, 1))
    for span, weight in ((slice(3, 5), [0, 0, 0, 0.5, 0.5]), (None, [0.2] * 5)):
        found = rows.traced(span=span)
        w = torch.tensor(weight, dtype=torch.float64)
        assert_close(found.total, w @ torch.linalg.inv(torch.eye(5, dtype=torch.float64) - Q) @ R, **EXACT)
        assert found.left == pytest.approx(0, abs=1e-12)
        if rows.share.any():
            assert_close(found.total.sum(), torch.tensor(1.0, dtype=torch.float64), rtol=1e-6, atol=0)


def test_words_of_an_answer(tiny: Any, no_type_checks: None) -> None:
    """A row for each word: its tokens' span, with columns put together, never across the end of the prompt."""
    prompt, answer = "The unheard", " keys and the unheard maison"
    rows = tls.answer_map(tiny, prompt, answer, tls.SemanticScope())
    words = rows.by("word")
    assert len(words) < len(rows)
    assert [text.strip() for text in words.answer_texts] == answer.split()
    assert words.text == rows.text
    assert words.answers[-1].str_tokens[words.prompt_length :] == words.answer_texts[:-1]
    n = rows.prompt_length
    for row, group in zip(words, words.groups[words.prompt_length :], strict=True):
        whole = rows[group.start - n : group.stop - n]
        assert row.value == pytest.approx(whole.value, rel=1e-6)
        assert_close(row.scores.norm(), whole.scores.norm())  # √Σ score² of all columns together
        assert_close(row.share.sum(), torch.tensor(1.0))
    assert_close(words[-2:].scores, words[" unheard maison"].scores)
    assert words[-2:].str_tokens == words.answers[-2].str_tokens
    assert words.traced().total.sum() == pytest.approx(1)
    spans = rows.by([(1, n), (n, n + 2)])
    assert spans.answer_texts[0] == "".join(rows.answer_texts[:2])
    assert "groups of tokens of the answer" in repr(spans)
    assert spans.map[-1].positions == tuple(range(len(spans.str_tokens)))
    with pytest.raises(ValueError, match=rf"the span \({n - 1}, {n + 1}\) goes from the prompt over into the answer"):
        rows.by([(n - 1, n + 1)])
    with pytest.raises(ValueError, match='grouped by "word", "sentence", "number", or a list of spans, got \'line\''):
        rows.by("line")  # type: ignore[arg-type]
    out = tls.answer_map(tiny, prompt, " keys", LeaveOneOut())
    with pytest.raises(ValueError, match="do not tell what several tokens have together"):
        out.by("word")


def test_the_strongest_cells(tiny: Any, no_type_checks: None) -> None:
    rows = tls.answer_map(tiny, KEYS, " are new.", tls.SemanticScope())
    cells = rows.top(4)
    assert [cell.share for cell in cells] == rows.share.flatten().sort(descending=True).values[:4].tolist()
    for cell in cells:
        assert rows.share[cell.row, cell.position] == cell.share
        assert (cell.answer_token, cell.token) == (rows.answer_texts[cell.row], rows.str_tokens[cell.position])
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        rows.top(0)
    traced = rows.traced()
    assert [row.score for row in traced.top(3)] == traced.total.sort(descending=True).values[:3].tolist()
    assert_close(traced.answer.by("word").scores.sum(), traced.total.sum())
    assert traced.answer.target.text == " are new."
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        traced.top(0)


def test_rows_as_json(tiny: Any, no_type_checks: None) -> None:
    tokens = tls.answer_map(tiny, KEYS, " are new.", tls.SemanticScope())
    for rows in (tokens.by("word"), tokens):
        again = tls.AnswerMap.from_json(rows.to_json())
        assert_close(again.scores, rows.scores, rtol=0, atol=0)
        assert (again.groups, again.prompt_length, again.answer_texts) == (
            rows.groups,
            rows.prompt_length,
            rows.answer_texts,
        )
        assert again.to_json() == rows.to_json()
        assert_close(again.traced().total, rows.traced().total, rtol=0, atol=0)
        assert again[0].to_json() == rows[0].to_json()
        for ask in (lambda again=again: again[0:2], lambda again=again: again.by("word")):
            with pytest.raises(ValueError, match="this map was read back, and has no model to ask again"):
                ask()
    text = rows.to_json()
    for wrong, message in (
        ("{", "not an AnswerMap but broken JSON"),
        ("{}", 'not an AnswerMap: its "format" is not "tl_scopes.AnswerMap"'),
        (
            text.replace('"version": 1', '"version": 9', 1),
            "this AnswerMap was written by a later version of tl_scopes: upgrade to read it",
        ),
        (text.replace('"groups"', '"group"'), "this AnswerMap does not hold what it should: KeyError"),
        (text.replace('"prompt_length": 10', '"prompt_length": 9'), "has 3 rows, 3 texts and 4 groups of the answer"),
    ):
        with pytest.raises(ValueError, match=message):
            tls.AnswerMap.from_json(wrong)
    with pytest.raises(TypeError, match="an AnswerMap is read from the text that to_json wrote, got bytes"):
        tls.AnswerMap.from_json(b"{}")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="an answer map has a row for each token of the answer, got none"):
        tls.AnswerMap.of_tokens([], [])


def test_one_character_has_one_name_on_both_axes(tiny: Any) -> None:
    """Rows and columns of tokens that are bytes of one character are named alike."""
    rows = tls.answer_map(tiny, "The keys", " \U0001f4a1 are", tls.SemanticScope())
    axes = rows.plot().axes[0]
    down, across = ([tick.get_text() for tick in ticks] for ticks in (axes.get_yticklabels(), axes.get_xticklabels()))
    assert any("<0x" in text for text in rows.answer_texts)
    assert down[:-1] == across[rows.prompt_length :]


def test_json_in_files(tiny: Any, tmp_path: Path, no_type_checks: None) -> None:
    """Whatever is written as JSON is written to a path, as pages are, and read from one."""
    scope, path = tls.SemanticScope(" are", versus=" is"), tmp_path / "x.json"
    lin = tls.linearize(tiny, KEYS)
    found: list[Any] = [
        scope(lin),
        tls.carried_by(lin, scope),
        tls.answer_map(tiny, KEYS, " are old", tls.SemanticScope()),
        tls.attribution_map(tiny, KEYS, tls.SemanticScope()),
    ]
    for one in found:
        assert one.to_json(str(path)) == path.read_text(encoding="utf-8") == one.to_json()
        assert type(one).from_json(path).to_json() == one.to_json()
        with pytest.raises(
            ValueError, match=rf"looks like the name of a file: write {type(one).__name__}\.from_json\(Pa"
        ):
            type(one).from_json(str(path))
    with pytest.raises(ValueError, match="this AttributionMap does not hold what it should: a list of answers"):
        tls.AttributionMap.from_json('{"format": "tl_scopes.AttributionMap", "version": 1}')
    with pytest.raises(ValueError, match="a map needs at least one answer, got none"):
        tls.AttributionMap.from_json('{"format": "tl_scopes.AttributionMap", "version": 1, "answers": []}')


def test_pictures_of_an_answer(tiny: Any, tmp_path: Path) -> None:
    """The answer's tokens are the rows; what arrives at the prompt has a card, also in a file; neither has a script."""
    rows = tls.answer_map(tiny, KEYS, " are new.", tls.SemanticScope())
    axes = rows.plot().axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["·are", "·new", "."]
    assert [line.get_xdata()[0] for line in axes.lines] == [9.5]
    for one, told in ((rows, "Heat map of 3 parts of an answer by 12"), (rows.traced(), "What arrives at the prompt")):
        path = tmp_path / "page.html"
        html = one.to_html(path)
        assert path.read_text(encoding="utf-8") == html
        assert told in html
        assert one._repr_html_() in html
        assert "<script" not in html
    partly = rows.traced(1)
    assert "left in the answer" in partly.to_html()
    assert f"{partly.left:.1%} of the weight is still in the answer" in partly.answer.notes[-1]
    assert str(rows.show())


@pytest.mark.parametrize("kind", ["bridge", *(["hooked"] if zoo.HookedTransformer else [])])
def test_generation_is_the_likeliest_text(tiny: Any, kind: str) -> None:
    """The text is that of a loop without a cache."""
    model = tiny if kind == "bridge" else tls.load_tiny(kind="hooked")
    ids = model.to_tokens(KEYS)
    with torch.no_grad():
        for _ in range(6):
            ids = torch.cat([ids, model(ids)[0, -1].argmax()[None, None]], dim=1)
    said = tls.generate(model, KEYS, 6)
    assert list(said.ids) == ids[0, -6:].tolist()
    assert [said.text[slice(*span)] for span in said.spans] == list(said.str_tokens)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        tls.generate(model, KEYS, 0)
    with pytest.raises(ValueError, match="and 99999 are to follow, the model's context is"):
        tls.generate(model, KEYS, 99_999)
    with pytest.raises(ValueError, match=r"temperature=0.7 would change nothing, .* add do_sample=True, or leave it"):
        tls.generate(model, KEYS, 3, temperature=0.7)
    with pytest.raises(ValueError, match=r"top_k=5, top_p=0.9 would change nothing, .* or leave them out"):
        tls.generate(model, KEYS, 3, do_sample=False, top_p=0.9, top_k=5)
    with pytest.raises(ValueError, match="num_return_sequences=2 asks for several answers, and generate returns one"):
        tls.generate(model, KEYS, 3, num_return_sequences=2)
    for option in ({"return_type": "str"}, {"verbose": True}, {"attention_mask": None}, {"generation_config": None}):
        with pytest.raises(ValueError, match=f"generate takes no {next(iter(option))}, which it sets itself"):
            tls.generate(model, KEYS, 3, **option)
    torch.manual_seed(0)
    assert len({tls.generate(model, KEYS, 6, do_sample=True, temperature=5.0).text for _ in range(3)}) > 1


@pytest.mark.parametrize("kind", ["bridge", *(["hooked"] if zoo.HookedTransformer else [])])
def test_another_end_of_sequence_is_no_part_of_the_answer(tiny: Any, kind: str) -> None:
    model = tiny if kind == "bridge" else tls.load_tiny(kind="hooked")
    ids = tls.generate(model, KEYS, 4).ids
    assert tls.generate(model, KEYS, 4, eos_token_id=ids[1]).ids == ids[:1]
    if kind == "bridge":
        for ends in ([ids[2], ids[1]], torch.tensor([ids[1]])):
            assert tls.generate(model, KEYS, 4, eos_token_id=ends).ids == ids[:1]


# -- bad input --------------------------------------------------------------------------------------------------------


def test_bad_answers(tiny: Any, no_type_checks: None) -> None:
    scope, lin = tls.SemanticScope(), tls.linearize(tiny, KEYS)
    for answer, message in (
        ("", "the answer is empty"),
        ([], "the answer is empty"),
        ([99_999], "answer 99999 is outside the vocabulary"),
        ("\ud800", "not valid Unicode"),
        (" old" * 9999, "tokens, the model's context is"),
    ):
        with pytest.raises(ValueError, match=message):
            tls.attribute(tiny, KEYS, scope, answer=answer)
    with pytest.raises(TypeError, match="an answer is a text or token ids in their order, got {' a'}"):
        tls.attribute(tiny, KEYS, scope, answer={" a"})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="an answer is a text or token ids in their order, got bytes"):
        tls.attribute(tiny, KEYS, scope, answer=b" x")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="answer_map takes the answer whose tokens are the rows, got None"):
        tls.answer_map(tiny, KEYS, None, scope)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="compares, and a map has a row for each token of one answer"):
        tls.answer_map(tiny, KEYS, " are", tls.SemanticScope(versus=" is"))
    with pytest.raises(ValueError, match="score_answer=True scores the tokens of an answer, and none is given"):
        tls.attribute(tiny, KEYS, scope, score_answer=True)
    for one, other in (({" are", " were"}, " is old"), (" is old", {" are", " were"})):
        with pytest.raises(ValueError, match="cannot be compared: one is a set of which any token is meant"):
            tls.attribute(tiny, KEYS, tls.SemanticScope(one, versus=other))
    with pytest.raises(
        ValueError, match=r"SemanticScope\(.* asks about ' is', and what is given .* is ' are': leave one"
    ):
        tls.attribute(tiny, KEYS, tls.SemanticScope(" is"), answer=" are")
    with pytest.raises(ValueError, match="target and versus are the same tokens, ' are old'"):
        tls.attribute(tiny, KEYS, tls.SemanticScope(versus=" are old"), answer=" are old")
    with pytest.raises(ValueError, match="' are' share the token ' are', which would be compared with itself: leave"):
        tls.SemanticScope({" are", " is"}, versus=" are")(lin)
    with pytest.raises(ValueError, match="target and versus are the same tokens, ' are | is'"):
        tls.SemanticScope({" are", " is"}, versus={" is", " are"})(lin)
    with pytest.raises(ValueError, match="the target is a set, of which ' are old' is 2 tokens: its members"):
        tls.SemanticScope({" are old", " is"})(lin)
    with pytest.raises(ValueError, match="the target is an empty set"):
        tls.SemanticScope(set())(lin)
    with pytest.raises(ValueError, match=r'quantity="logit" of \' are old\' has no meaning: it is 2 tokens'):
        tls.SemanticScope(" are old", quantity="logit")(lin)
    with pytest.raises(TypeError, match=r"a target is a text, an id, a list of ids, or a set"):
        tls.SemanticScope([" are", " old"])(lin)
    with pytest.raises(ValueError, match=r"asks about ' is', and what is given .* is ' are old': leave one of them"):
        tls.SemanticScope(" is")(tls.linearize(tiny, KEYS, answer=" are old"))
    with pytest.raises(ValueError, match=r"target ' are old' is 2 tokens, which are predicted at several positions"):
        tls.attribution_map(tiny, KEYS, tls.SemanticScope(" are old"))
    with pytest.raises(ValueError, match='target is "likeliest" or "next", got \'last\''):
        tls.attribution_map(tiny, KEYS, scope, target="last")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the text is one token, behind which nothing stands"):
        tls.attribution_map(tiny, [5], scope, target="next")
    with pytest.raises(ValueError, match=r"the target ' are old' is 2 tokens: `ids` are"):
        _ = tls.SemanticScope(" are old")(lin).target.id
    with pytest.raises(ValueError, match=r"LeaveOneOut takes one target, got the set"):
        LeaveOneOut(quantity="log_prob", target={1, 2})(lin)  # type: ignore[arg-type]


def test_where_prompt_and_answer_meet(tiny: Any) -> None:
    """They are tokenised apart; a note says so where it makes a difference."""
    apart = tls.attribute(tiny, "The ke", tls.SemanticScope(), answer="ys are")
    assert any("prompt and answer are tokenised apart" in note for note in apart.notes)
    fine = tls.attribute(tiny, KEYS, tls.SemanticScope(), answer=" are")
    assert not any("apart" in note for note in fine.notes)
    # The same for targets, whichever way they come to stand behind the prompt; once, and not for ids.
    scope, ids = tls.SemanticScope("ys are"), tiny.to_tokens("The ke")[0]
    (many,) = tls.attribute_many(tiny, ["The ke"], tls.SemanticScope(), targets=["ys are"])
    for found in (
        tls.attribute(tiny, "The ke", scope),
        tls.attribute(tiny, ids, scope),
        scope(tls.linearize(tiny, "The ke")),
        many,
    ):
        assert sum("prompt and target are tokenised apart" in note for note in found.notes) == 1
    foil = tls.attribute(tiny, "The ke", tls.SemanticScope(" are old", versus="ys are"))
    assert sum("prompt and versus are tokenised apart" in note for note in foil.notes) == 1
    given = tls.attribute(tiny, "The ke", tls.SemanticScope(), answer=tls.generate(tiny, "The ke", 2))
    assert not any("apart" in note for note in given.notes)


# -- many prompts -----------------------------------------------------------------------------------------------------


def test_many_answers(specimen: Specimen) -> None:
    """Batches of answers of different lengths, targets and foils are what `attribute` gives for each."""
    model = specimen.model
    prompts, answers = [PROMPT, PROMPT[:3], [*PROMPT, 9]], [ANSWER, [4], [6, 2]]
    scope = tls.SemanticScope()
    for one, prompt, said in zip(
        tls.attribute_many(model, prompts, scope, answers=answers, batch_size=3), prompts, answers, strict=True
    ):
        alone = tls.attribute(model, prompt, scope, answer=said)
        assert one is not None
        assert_close(one.scores, alone.scores, **EXACT)
        assert (one.target, one.quantity) == (alone.target, alone.quantity)
    targets: list[Any] = [ANSWER, 4, {6, 2}]
    foils: list[Any] = [OTHER, 5, 9]
    many = tls.attribute_many(model, prompts, scope, targets=targets, foils=foils, batch_size=2, on_error="raise")
    for one, prompt, target, foil in zip(many, prompts, targets, foils, strict=True):
        alone = tls.attribute(model, prompt, tls.SemanticScope(target, versus=foil))
        assert one is not None
        assert_close(one.scores, alone.scores, **EXACT)
        assert_close(one.value, alone.value, **EXACT)
        assert (one.versus, one.unit) == (alone.versus, alone.unit)
    fisher = [tls.FisherScope(exact=True), tls.TemperatureScope(norm="logits"), LeaveOneOut(quantity="log_prob")]
    for other in fisher:
        (one,) = tls.attribute_many(model, [PROMPT], other, answers=[ANSWER])
        assert one is not None
        assert_close(one.scores, tls.attribute(model, PROMPT, other, answer=ANSWER).scores, **EXACT)


def test_many_answers_that_cannot_be(tiny: Any, no_type_checks: None) -> None:
    scope, prompts = tls.SemanticScope(), ["The keys", "The old"]
    for options, message in (
        ({"answers": [" are", " is"], "targets": [1, 2]}, "give answers or targets, not both"),
        ({"foils": [" are", " is"]}, "foils are what answers or targets are compared with"),
        ({"answers": [" are"]}, "answers must be one for each prompt: got 1 for 2 prompts"),
    ):
        with pytest.raises(ValueError, match=message):
            tls.attribute_many(tiny, prompts, scope, **options)
    with pytest.raises(TypeError, match="answers must be one for each prompt, in a list, got ' are'"):
        tls.attribute_many(tiny, prompts, scope, answers=" are")
    with pytest.raises(
        ValueError, match=r"FisherScope\(\) does not compare two answers, so that it has no use for foils"
    ):
        tls.attribute_many(tiny, prompts, tls.FisherScope(), targets=[1, 2], foils=[3, 4])
    with pytest.raises(ValueError, match="prompt 1 has no answer, target or foil"):
        list(tls.attribute_many(tiny, iter(prompts), scope, answers=iter([" are"])))
    gap = list(tls.attribute_many(tiny, prompts, scope, answers=[" are", float("nan")]))  # type: ignore[list-item]
    found = list(tls.attribute_many(tiny, prompts, scope, answers=[" are", None]))
    assert [one and one.quantity for one in gap] == [one and one.quantity for one in found]
    assert [one and one.value for one in found[1:]] == [tls.attribute(tiny, prompts[1], scope).value]


# -- circuits ---------------------------------------------------------------------------------------------------------


def test_parts_of_an_answer_sum_to_its_score(tiny: Any) -> None:
    """What carries the influence on an answer of several tokens: its parts sum to the score, at every layer."""
    double = tls.load_tiny(dtype=torch.float64)
    lin = tls.linearize(double, KEYS, answer=" are old.")
    scope = tls.SemanticScope()
    paths = tls.carried_by(lin, scope, tokens=2)
    total = paths.values.sum(1) + paths.around
    assert_close(total[:, 0], scope(lin).scores[2].expand(len(total)), rtol=1e-9, atol=1e-9)
    named = tls.carried_by(tls.linearize(double, KEYS), tls.SemanticScope(" are old."), tokens=2)
    assert_close(named.values, paths.values, **EXACT)
    assert tls.Paths.from_json(paths.to_json()).target == paths.target
    with pytest.raises(ValueError, match="two answers that are compared go through the model as two texts"):
        tls.carried_by(lin, tls.SemanticScope(versus=" is old."), tokens=2)


# -- faithfulness -----------------------------------------------------------------------------------------------------


def test_answers_are_evaluated(tiny: Any) -> None:
    """What is measured is the log-probability of the whole answer, of which one token is what it was."""
    from tl_scopes.faithfulness import Perturbation

    perturbation = Perturbation(replacements=("zero",), fractions=(0.2, 0.5), samples=2, randomise=True)
    scopes = {"semantic": tls.SemanticScope(), "fisher": tls.FisherScope(8), "out": LeaveOneOut(quantity="log_prob")}
    found = tls.evaluate(tiny, [KEYS], scopes, perturbation, answers=[" are old."])
    assert set(found.target) == {" are old."}
    lin = tls.linearize(tiny, KEYS, answer=" are old.")
    assert isinstance(lin, tls.Span)
    whole = found[(found.measure == "deletion") & (found.quantity == "log_prob") & (found.fraction == 1.0)]
    moved = lin.embeddings.clone()
    moved[1:10] = 0
    expected = tls.SemanticScope()(lin).value - tls.SemanticScope()(lin.at(moved)).value
    assert whole.value.tolist() == pytest.approx([expected] * 3, rel=1e-4)
    one = tls.evaluate(
        tiny, [KEYS], {"semantic": tls.SemanticScope(quantity="log_prob")}, perturbation, answers=[" are"]
    )
    same = tls.evaluate(
        tiny, [KEYS], {"semantic": tls.SemanticScope(quantity="log_prob")}, perturbation, targets=[" are"]
    )
    assert one.value.tolist() == pytest.approx(same.value.tolist(), rel=1e-5, nan_ok=True)
    with pytest.raises(ValueError, match="give answers, or targets and foils: an answer is what is measured"):
        tls.evaluate(tiny, [KEYS], scopes, perturbation, answers=[" a"], targets=[" b"])
    with pytest.raises(ValueError, match="there must be one answer per prompt: got 2 for 1"):
        tls.evaluate(tiny, [KEYS], scopes, perturbation, answers=[" a", " b"])


@pytest.mark.parametrize("species", ["bridge llama", "bridge gpt2"])
@pytest.mark.parametrize("replacement", ["zero", "resample"])
def test_the_versus_of_a_scope_is_another_answer(species: str, replacement: str) -> None:
    """The log-odds are those of both answers, each behind the same replaced prompt, by hand."""
    from tl_scopes.faithfulness import Perturbation

    perturbation = Perturbation((replacement,), (0.2, 0.6), steps=1, samples=0, randomise=False)
    prompts, scores = [PROMPT, [9, 4, 30, 2]], torch.tensor([3.0, 1.0, 5.0, 2.0, 4.0])
    order = scores.argsort(descending=True)
    with zoo.Float64():
        model = zoo.specimen(species).model
        answers, scopes = [ANSWER, [4]], {"longer": Ranked(scores, OTHER), "one": Ranked(scores, [6])}
        found = tls.evaluate(model, prompts, scopes, perturbation, answers=answers)
        drawn = zoo_instead(model, PROMPT, ANSWER, prompts[1]) if replacement == "resample" else None
        for name, versus in (("longer", OTHER), ("one", [6])):
            spans = [tls.linearize(model, PROMPT, answer=said) for said in (ANSWER, versus)]

            def odds(positions: torch.Tensor, spans: list[tls.Span] = spans) -> float:
                values = []
                for lin in spans:
                    moved = lin.embeddings.clone()
                    moved[positions] = 0 if drawn is None else drawn[positions]
                    other = lin.at(moved)
                    values.append(float(lin.answer_log_prob(other.log_probs)))
                return values[0] - values[1]

            rows = found[(found.prompt == 0) & (found.scope == name) & (found.quantity == "log_odds")]
            deletion = rows[rows.measure == "deletion"].set_index("fraction").value
            insertion = rows[rows.measure == "insertion"].set_index("fraction").value
            for fraction in perturbation.grid(len(PROMPT)):
                k = round(fraction * len(PROMPT))
                without, alone = odds(order[:k]), odds(order[k:])
                assert deletion[fraction] == pytest.approx(odds(order[:0]) - without, rel=1e-7, abs=1e-9)
                assert insertion[fraction] == pytest.approx(alone - odds(order), rel=1e-7, abs=1e-9)


def zoo_instead(model: Any, prompt: list[int], answer: list[int], other: list[int]) -> torch.Tensor:
    """What `evaluate` puts in place of the prompt's embeddings when it draws from the only other prompt."""
    from tl_scopes.faithfulness import Perturbation
    from tl_scopes.faithfulness.perturbation import Substitutes
    from tl_scopes.jacobian.randomness import prompt_generator

    lin = tls.linearize(model, prompt, answer=answer)
    prompts = {0: torch.tensor(prompt), 1: torch.tensor(other)}
    substitutes = Substitutes.of(model, Perturbation(("resample",)), prompts)
    return substitutes(lin, "resample", 0, prompt_generator(lin, "resample", 0))


def test_one_token_beside_another_is_measured_alike(tiny: Any) -> None:
    """As answers, and as a target with its foil."""
    from tl_scopes.faithfulness import Perturbation

    perturbation = Perturbation(("zero",), (0.2, 0.5), steps=2, samples=0, randomise=False)
    scope = tls.SemanticScope(versus=" is")
    one = tls.evaluate(tiny, [KEYS], [scope], perturbation, answers=[" are"])
    same = tls.evaluate(tiny, [KEYS], [scope], perturbation, targets=[" are"])
    assert one.value.tolist() == pytest.approx(same.value.tolist(), rel=1e-4, abs=1e-4)
    assert one[one.quantity == "log_odds"].value.abs().max() > 1


@pytest.mark.parametrize(
    ("scope", "options", "message"),
    [
        (tls.SemanticScope(" are old"), {}, "asks about ' are old', 2 tokens: give what is said after each prompt as"),
        (tls.SemanticScope(versus=" is old"), {"targets": [" are"]}, "asks about ' is old', 2 tokens: give what is"),
        (tls.SemanticScope({" are", " were"}), {}, r"asks about ' are\| were', a set of tokens, which is not measured"),
        (
            tls.SemanticScope(versus={" is", " was"}),
            {"answers": [" are"]},
            "a set of tokens, which is not measured: na",
        ),
    ],
)
def test_what_is_not_measured(tiny: Any, scope: tls.Scope, options: dict[str, Any], message: str) -> None:
    """Several tokens are measured as an answer, and sets are not."""
    from tl_scopes.faithfulness import Perturbation

    with pytest.raises(ValueError, match=message):
        tls.evaluate(tiny, [KEYS], [scope], Perturbation(("zero",), (0.5,)), on_error="raise", **options)


# -- how many points go through the model together --------------------------------------------------------------------


def test_rows_are_not_texts(specimen: Specimen, span: tls.Span, both: tls.Span) -> None:
    """Predictions of one text take its memory once, and their logits each; two answers are two texts."""
    text = tls.linearize(specimen.model, [*PROMPT, *ANSWER[:-1]])
    assert span.at_once(Work.GRAPH) == text.at_once(Work.GRAPH)
    assert both.at_once(Work.GRAPH) == pytest.approx(text.at_once(Work.GRAPH) / 2, abs=1)
    one, several = text.at_once(Work.PREDICTION), span.at_once(Work.PREDICTION)
    assert one / len(ANSWER) < several < one
    assert several / 2 <= both.at_once(Work.PREDICTION) < several


def test_a_comparison_takes_no_more_memory_than_an_answer(
    specimen: Specimen, span: tls.Span, both: tls.Span, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the line of an integral as many texts go through the model together, on half as many points."""
    seen, trace = [], models.trace

    def counted(model: Any, tokens: torch.Tensor, **options: Any) -> models.Trace:
        seen.append(len(tokens))
        return trace(model, tokens, **options)

    of_one = 512 * 2**20 / span.at_once(Work.GRAPH)
    monkeypatch.setattr(models, "trace", counted)
    monkeypatch.setattr(memory, "available_bytes", lambda device: int(4 * 8.5 * of_one))
    for lin in (span, both):
        seen.clear()
        integrate(lin, lin.answer_log_prob, torch.zeros_like(lin.embeddings), 8)
        assert max(seen) == 8
