"""The answer: small, frozen, printable, and the same after every journey."""

import dataclasses
import inspect
import json
import pickle
import re
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import tl_scopes as tls
from tests import zoo
from tests.zoo import PROMPT
from tl_scopes.diagnostics.sink_report import SinkHead
from tl_scopes.models import Target, Token
from tl_scopes.results.attribution import Influence, Prediction
from tl_scopes.scopes.baselines import LeaveOneOut
from tl_scopes.scopes.measurement import Measurement

WORDS = ("<|bos|>", "The", " keys", " <b>&\n", " é")


@pytest.fixture
def answer() -> tls.Attribution:
    return tls.Attribution(
        scores=torch.tensor([8.0, 1.0, 6.0, 1 / 3, 2.0]),
        tokens=torch.tensor([0, 5, 9, 7, 3]),
        str_tokens=WORDS,
        positions=(0, 1, 2, 3, 4),
        position=4,
        target=Target((Token(12, " are"),)),
        versus=None,
        scope="SemanticScope(target=' are')",
        unit="logit per unit of embedding norm",
        predictions=(Prediction(Token(12, " are"), 0.75), Prediction(Token(13, " is"), 0.125)),
        wrt="hook_embed",
        of="ln_final",
        model="tiny",
        dtype="float32",
        notes=("a note",),
    )


def same(a: tls.Attribution, b: tls.Attribution) -> bool:
    def equal(x: Any, y: Any) -> bool:
        if isinstance(x, torch.Tensor):
            return torch.equal(x, y) and x.dtype == y.dtype
        if isinstance(x, dict):
            return x.keys() == y.keys() and all(equal(x[key], y[key]) for key in x)
        return x == y and type(x) is type(y)

    return all(equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))


def test_a_question_that_is_not_asked(tiny: Any) -> None:
    """What asks one question asks `SemanticScope()` where none is given."""
    text, scope = "The keys to the old cabinet", tls.SemanticScope()
    lin = tls.linearize(tiny, text)
    for plain, asked in [
        (tls.attribute(tiny, text), tls.attribute(tiny, text, scope)),
        (tls.attribution_map(tiny, text)[-1], tls.attribution_map(tiny, text, scope)[-1]),
        (tls.answer_map(tiny, text, " are old")[1], tls.answer_map(tiny, text, " are old", scope)[1]),
        (next(tls.attribute_many(tiny, [text])), next(tls.attribute_many(tiny, [text], scope))),
        (tls.check(lin).answer, tls.check(lin, scope).answer),
        (tls.explore(tiny, text).maps[0][-1], tls.explore(tiny, text, scope).maps[0][-1]),
    ]:
        assert same(plain, asked)
    assert_close(tls.carried_by(lin).values, tls.carried_by(lin, scope).values)
    assert_close(tls.head_map(tiny, text).summed, tls.head_map(tiny, text, scope).summed)
    assert_close(tls.layer_map(tiny, text).summed, tls.layer_map(tiny, text, scope).summed)
    assert_close(tls.linearity(lin).radius, tls.linearity(lin, scope).radius)


def test_top_and_share(answer: tls.Attribution) -> None:
    total = 17 + 1 / 3
    assert [row.position for row in answer.top(3)] == [0, 2, 4]
    assert answer.top(2)[1] == (2, " keys", 6.0, pytest.approx(6 / total))
    assert answer.top(99)[-1].token == " <b>&\n"
    assert_close(answer.share.sum(), torch.tensor(1.0))


def test_share_of_nothing(answer: tls.Attribution) -> None:
    silent = dataclasses.replace(answer, scores=torch.zeros(5))
    assert silent.share.tolist() == [0.0] * 5


def test_scores_below_zero(answer: tls.Attribution) -> None:
    """They count by their size, so that a sum that cancels makes no share larger than the whole."""
    signed = dataclasses.replace(answer, scores=torch.tensor([4.0, -5.0, 0.0, -2.0, 3.0 - 1e-6]))
    assert [row.position for row in signed.top()] == [1, 0, 4, 3, 2]
    assert_close(signed.share, signed.scores / 14)
    assert repr(signed).startswith("Attribution(SemanticScope(target=' are'): 'The' -36%, '<|bos|>' 29%, ' é' 21%; 5")
    frame = signed.to_dataframe()
    assert frame.share.abs().sum() == pytest.approx(1)
    assert (frame.share * frame.score >= 0).all()


def test_without(answer: tls.Attribution) -> None:
    """Positions stay those of the prompt, shares are of the rest, and the first answer is as it was."""
    rest = answer.without([0, 3])
    assert rest.positions == (1, 2, 4)
    assert rest.str_tokens == ("The", " keys", " é")
    assert rest.tokens.tolist() == [5, 9, 3]
    assert_close(rest.share, torch.tensor([1.0, 6.0, 2.0]) / 9)
    assert rest.top(1)[0].position == 2
    assert rest.without([2]).positions == (1, 4)
    assert len(answer.scores) == 5


def test_frozen(answer: tls.Attribution) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field 'unit'"):
        answer.unit = "metre"  # type: ignore[misc]


def test_checks_are_asked_of_a_linearization(answer: tls.Attribution) -> None:
    """An answer is plain data, and knows no model that it could run."""
    with pytest.raises(AttributeError, match=r"no longer runs the model again: write tls\.check\(lin, scope\)"):
        answer.checks()
    assert not hasattr(answer, "checks")
    assert "checks" not in dir(answer)


def test_repr_is_one_line(answer: tls.Attribution) -> None:
    assert repr(answer) == (
        "Attribution(SemanticScope(target=' are'): '<|bos|>' 46%, ' keys' 35%, ' é' 12%; "
        "5 tokens, logit per unit of embedding norm)"
    )


def test_json_round_trip(answer: tls.Attribution) -> None:
    """Nothing is lost: not a bit of a score, not a name."""
    assert same(tls.Attribution.from_json(answer.to_json()), answer)
    double = dataclasses.replace(
        answer, scores=answer.scores.double() / 3, versus=Target((Token(13, " is"),)), target=None
    )
    assert same(tls.Attribution.from_json(double.to_json()), double)
    assert json.loads(answer.to_json())["unit"] == answer.unit
    assert same(pickle.loads(pickle.dumps(answer)), answer)


def test_lists_among_details_are_kept_as_tuples(tiny: Any) -> None:
    """They change no more, and JSON gives them back as they are."""

    class WithLists(tls.SemanticScope):
        def measure(self, lin: tls.Linearization) -> Measurement:
            scores = lin.vjp(self.cotangents(lin))[0].norm(dim=-1)
            return Measurement(scores, {"steps": [1, 2, (3, [4])], "names": ["a"]})

        def measure_many(self, lins: Any) -> list[Measurement]:
            return [self.measure(lin) for lin in lins]

    answer = WithLists()(tls.linearize(tiny, "The keys"))
    assert answer.steps == (1, 2, (3, (4,)))
    assert same(tls.Attribution.from_json(answer.to_json()), answer)


def test_json_has_no_infinity(answer: tls.Attribution) -> None:
    """Strict JSON, whatever the details are; and the same after it, in type and in every bit."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    odd = [torch.inf, -torch.inf, torch.nan, 0.1, -0.0]
    details = {
        "unknown": torch.tensor(odd),
        "matrix": torch.tensor([odd, odd], dtype=torch.float64),
        "ranks": torch.tensor([3, 1, 2, 2**60 + 1, 4]),
        "known": torch.tensor([True, False, True, True, False]),
        "flags": torch.tensor([1, 2, 3, 4, 255], dtype=torch.uint8),
        "worst": torch.inf,
        "undefined": torch.nan,
        "some": (0.5, -torch.inf, ("a", torch.inf)),
        "text": "NaN",
        "count": 3,
        "exact": True,
        "nothing": None,
    }
    written = dataclasses.replace(answer, details=details).to_json()
    assert json.loads(written, parse_constant=refuse)["details"]["unknown"]["values"][:2] == ["Infinity", "-Infinity"]
    read = tls.Attribution.from_json(written)
    assert read.details.keys() == details.keys()
    for name, value in details.items():
        assert type(read.details[name]) is type(value)
        if isinstance(value, torch.Tensor):
            assert_close(read.details[name], value, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(read.details[name].signbit(), value.signbit())
        elif name == "undefined":
            assert read.undefined != read.undefined
        else:
            assert read.details[name] == value
    assert same(
        tls.Attribution.from_json(answer.to_json().replace('"details": {}', '"details": {"bad": Infinity}')),
        dataclasses.replace(answer, details={"bad": torch.inf}),
    )  # as it was written before


def test_details_keep_their_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts and flags stay what they are; other precisions become that of the scores."""
    details = {"count": torch.arange(8), "flag": torch.arange(8) > 3, "half": torch.ones(8).half()}
    measured = tls.Measurement(torch.ones(8), details)
    monkeypatch.setattr(tls.FisherScope, "measure_many", lambda self, lins: [measured])
    answer = tls.attribute(zoo.specimen("bridge llama").model, PROMPT, tls.FisherScope())
    assert [value.dtype for value in answer.details.values()] == [torch.int64, torch.bool, torch.float64]
    assert same(tls.Attribution.from_json(answer.to_json()), answer)
    assert answer.without([0]).count.tolist() == list(range(1, 8))
    assert answer.to_dataframe().flag.tolist() == [False] * 4 + [True] * 4


def test_to_dataframe(answer: tls.Attribution) -> None:
    frame = answer.to_dataframe()
    assert list(frame.columns) == ["position", "token", "id", "score", "share"]
    assert frame.token.tolist() == list(WORDS)
    assert frame.score.tolist() == answer.scores.tolist()
    assert answer.without([0]).to_dataframe().position.tolist() == [1, 2, 3, 4]


def test_to_html_writes_a_file(answer: tls.Attribution, tmp_path: Any) -> None:
    html = answer.to_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == html
    assert "keys" in html


@pytest.mark.parametrize(
    "scope",
    [
        tls.SemanticScope(target=3),
        tls.SemanticScope(3, versus=4),
        tls.TemperatureScope(norm="logits"),
        tls.FisherScope(),
    ],
)
def test_a_scope_says_what_it_asked(scope: tls.Scope) -> None:
    """The question in the answer is the Python that asked it."""
    answer = tls.attribute(zoo.specimen("bridge llama").model, PROMPT, scope)
    assert eval(answer.scope, {name: getattr(tls, name) for name in tls.__all__}) == scope
    assert "None" not in answer.scope
    assert same(tls.Attribution.from_json(answer.to_json()), answer)


@dataclasses.dataclass(frozen=True)
class OwnScope(tls.JacobianScope):
    name: str = ""
    tensor: torch.Tensor | None = dataclasses.field(default=None, repr=False)

    def cotangents(self, lin: tls.Linearization) -> torch.Tensor:
        return lin.readout[None]

    def unit(self, lin: tls.Linearization) -> str:
        return self.name


@dataclasses.dataclass(frozen=True)
class Shouting(OwnScope):
    def __repr__(self) -> str:
        return "OWN"


@dataclasses.dataclass(frozen=True)
class LouderStill(Shouting):
    pass


@pytest.mark.parametrize(
    ("scope", "written"),
    [
        (tls.SemanticScope(), "SemanticScope()"),
        (tls.SemanticScope(" are", versus=" is"), "SemanticScope(target=' are', versus=' is')"),
        (tls.TemperatureScope(norm="logits"), "TemperatureScope(norm='logits')"),
        (tls.FisherScope(generator=torch.Generator()), "FisherScope()"),
        (tls.SpectralScope(rank=3), "SpectralScope(rank=3)"),
        (tls.HetaScope(beta=1.0), "HetaScope(beta=1.0)"),
        (tls.PathIntegratedScope(baseline=torch.ones(4)), "PathIntegratedScope(baseline=<4 tensor of norm 2>)"),
        (
            tls.DirectionScope(torch.ones(4), "ln_final"),
            "DirectionScope(direction=<4 tensor of norm 2>, hook='ln_final')",
        ),
        (LeaveOneOut(), "LeaveOneOut()"),
        (OwnScope("x"), "OwnScope(name='x')"),
        (Shouting("x"), "OWN"),
        (LouderStill("x"), "OWN"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_scopes_are_written_alike(scope: tls.Scope, written: str) -> None:
    """Without what is as by default; a repr of one's own stays."""
    assert repr(scope) == written


def test_a_scope_of_ones_own() -> None:
    """Adding a scope is a frozen dataclass with an equation and a unit."""

    @dataclasses.dataclass(frozen=True)
    class EntropyScope(tls.JacobianScope):
        def cotangents(self, lin: tls.Linearization) -> torch.Tensor:
            return lin.cotangent(lambda z: -(z.softmax(-1) * z.log_softmax(-1)).sum())[None]

        def unit(self, lin: tls.Linearization) -> str:
            return f"nat per {lin.unit}"

    def entropy(lin: tls.Linearization) -> torch.Tensor:
        return -(lin.log_probs.exp() * lin.log_probs).sum()

    with zoo.Float64():
        lin = tls.linearize(zoo.specimen("bridge llama").model, PROMPT)
        answer = EntropyScope()(lin)
        gradient = lin.vjp(lin.cotangent(lambda z: -(z.softmax(-1) * z.log_softmax(-1)).sum())[None])[0]
        step = torch.zeros_like(lin.embeddings)
        step[2] = 1e-6 * gradient[2] / gradient[2].norm()
        change = entropy(lin.at(lin.embeddings + step)) - entropy(lin.at(lin.embeddings - step))
    assert answer.unit == "nat per unit of embedding norm"
    assert_close(change / 2e-6, answer.scores[2], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision(dtype: torch.dtype) -> None:
    """Scores of a half-precision model are float32 on the CPU, and near those of the float64 model."""
    exact = zoo.llama(zoo.GOLDEN, "bridge", torch.float64)
    model = zoo.llama(zoo.GOLDEN, "bridge", dtype)
    for scope in (tls.SemanticScope(target=3), tls.TemperatureScope(), tls.FisherScope()):
        answer, truth = tls.attribute(model, PROMPT, scope), tls.attribute(exact, PROMPT, scope)
        assert answer.scores.dtype == torch.float32
        assert answer.dtype == str(dtype).removeprefix("torch.")
        assert truth.scores.dtype == torch.float64
        bound = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-1}[dtype]
        assert (answer.scores - truth.scores).norm() < bound * truth.scores.norm()


def test_a_centred_unembedding_is_named() -> None:
    """Centring changes a raw logit, not a log-probability, a difference or the distribution."""
    plain, centred = zoo.llama(zoo.GOLDEN, "bridge"), zoo.llama(zoo.GOLDEN, "bridge")
    centred.enable_compatibility_mode()
    before, after = tls.linearize(plain, PROMPT), tls.linearize(centred, PROMPT)
    assert after.is_centered
    assert not before.is_centered
    logit = tls.SemanticScope(target=3)
    assert logit(before).notes == ()
    assert logit(after).notes[0].startswith("the unembedding is centred: the logit explained is the logit minus the")
    assert not torch.allclose(logit(after).scores, logit(before).scores, rtol=1e-2)
    for scope in (
        tls.SemanticScope(target=3, quantity="log_prob"),
        tls.SemanticScope(target=3, versus=4),
        tls.FisherScope(),
    ):
        assert scope(after).notes == ()
        assert_close(scope(after).scores, scope(before).scores, rtol=1e-4, atol=1e-6)


def test_inner_hooks_name_their_unit() -> None:
    lin = tls.linearize(zoo.specimen("bridge llama").model, PROMPT, wrt="blocks.1.hook_resid_pre")
    assert tls.FisherScope()(lin).unit == "nat per squared unit of norm at blocks.1.hook_resid_pre"
    assert repr(lin).startswith("Linearization(ln_final at position 7 wrt blocks.1.hook_resid_pre; 8 tokens")


# -- what a reader of `tls.Attribution?` sees ------------------------------------------------------------------------

RESULTS = [
    tls.Attribution,
    tls.AttributionMap,
    tls.Check,
    tls.Checks,
    tls.Comparison,
    tls.LinearityReport,
    tls.SinkReport,
    Influence,
    Prediction,
    SinkHead,
]


@pytest.mark.parametrize("kind", RESULTS, ids=lambda kind: kind.__name__)
def test_every_field_is_documented(kind: Any) -> None:
    """In the docstring of the class, a tensor with its shape and its unit."""
    documentation = inspect.getdoc(kind) or ""
    entries = dict(
        re.findall(r"^    (\w+): (.*(?:\n        .*)*)", documentation.split("Attributes:\n")[1], re.MULTILINE)
    )
    fields = kind._fields if hasattr(kind, "_fields") else [f.name for f in dataclasses.fields(kind)]
    assert list(entries) == list(fields)
    for name, type in kind.__annotations__.items():
        if hasattr(type, "dim_str"):
            assert entries[name].startswith(f"[{type.dim_str.strip()}], "), name


@pytest.mark.parametrize("kind", RESULTS, ids=lambda kind: kind.__name__)
def test_signatures_can_be_read(kind: Any) -> None:
    """Python shows a bare `SupportsIndex` as `<class 'SupportsIndex'>`."""
    for _, function in [("", kind), *inspect.getmembers(kind, inspect.isfunction)]:
        assert "<class" not in str(inspect.signature(function))


def test_scores_whose_squares_or_sum_float32_cannot_hold(tiny: Any) -> None:
    answer = tls.attribute(tiny, PROMPT, tls.SemanticScope(3))
    n = len(answer.scores)
    for size in (1e-30, 1e-22, 1e30):
        words = dataclasses.replace(answer, scores=torch.full((n,), size)).by([(0, 4)])
        assert float(words.scores[0]) == pytest.approx(2 * size, rel=1e-6)
    large = dataclasses.replace(answer, scores=torch.full((n,), 3e38))
    torch.testing.assert_close(large.share, torch.full((n,), 1 / n))
