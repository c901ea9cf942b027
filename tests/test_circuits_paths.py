"""What `carried_by` answers: its rows, names, other forms and pictures; and the maps of layers and heads."""

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch.testing import assert_close

import tl_scopes as tls
from tests import zoo
from tests.pictures import Reader, browse, needs_browser
from tests.test_layout import measure
from tests.zoo import PROMPT
from tl_scopes.circuits.paths import Passage
from tl_scopes.models import components
from tl_scopes.views import component_map
from tl_scopes.views.palette import Scale

TEXT = "The keys to the old cabinet near the door"
SCOPE = tls.SemanticScope(" are", versus=" is")
EXACT = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture(scope="module")
def lin(tiny: Any) -> tls.Linearization:
    return tls.linearize(tiny, TEXT)


@pytest.fixture(scope="module")
def paths(lin: tls.Linearization) -> tls.Paths:
    return tls.carried_by(lin, SCOPE, tokens=[" keys", " cabinet"])


# -- rows and names ---------------------------------------------------------------------------------------------------


def test_top(paths: tls.Paths) -> None:
    """The largest parts of one source token, with the place where they are written."""
    first, *others = paths.top(5, token=" keys")
    assert repr(first) == "(L2H2 at ' door', 15.7, 60%)"
    assert (first.token, first.layer, first.position) == (" keys", 2, 9)
    sizes = [abs(row.value) for row in (first, *others)]
    assert sizes == sorted(sizes, reverse=True)
    assert first.value == paths.values[2, 2, 0].item()
    assert first.share == pytest.approx(first.value / paths.scores[0].item())
    assert paths.top(1) == paths.top(1, token=2)  # the token with the largest score
    assert len(paths.top(10_000)) == 24
    assert repr(Passage("L1H1", None, 2.0, 0.5, " a", 1, None)) == "(L1H1, 2, 50%)"


def test_in_one_line(paths: tls.Paths) -> None:
    assert repr(paths) == (
        "Paths(SemanticScope(target=' are', versus=' is') by head: (L2H2 at ' door', 15.7, 60%) from ' keys'; "
        "6 layers, 2 tokens, logit per unit of embedding norm; logit of ' are' − logit of ' is' after "
        "'<|bos|>The keys to the old cabinet near the door')"
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        paths.by = "layer"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("by", "axes", "name", "last"),
    [
        ("position", ("layer", "position", "token"), "before L0", "before L6"),
        ("layer", ("layer", "branch", "token"), "L0 attention", "L5 MLP"),
        ("head", ("layer", "head", "token"), "L0H0", "L5H3"),
        ("qkv", ("layer", "head", "part", "token"), "L0H0.q", "L5H3.v"),
        ("neuron", ("layer", "neuron", "token"), "L0N0", "L5N383"),
    ],
)
def test_axes_and_names(lin: tls.Linearization, by: Any, axes: tuple[str, ...], name: str, last: str) -> None:
    """Every cut has rows, names, a frame, JSON and, where it can be drawn, a picture."""
    found = tls.carried_by(lin, SCOPE, by, " keys")
    assert found.axis_names == axes
    end = [size - 1 for size in found.values.shape[1:-1]]
    assert (found.name(0, *[0] * len(end)), found.name(found.layers[-1], *end)) == (name, last)
    assert found.top(3)
    frame = found.to_dataframe()
    assert frame["value"].tolist() == found.values.flatten().tolist()
    assert set(axes[:-1]) < set(frame.columns)
    assert frame["share"].sum() == pytest.approx((found.values.sum() / found.scores[0]).item(), rel=1e-4)
    largest = frame.loc[frame["value"].abs().nlargest(3).index]
    for row, first in zip(largest.itertuples(), found.top(3), strict=False):
        assert (row.name, row.token, row.at, row.layer) == (first.name, first.token, first.position, first.layer)
    assert repr(tls.Paths.from_json(found.to_json())) == repr(found)
    assert "<script" not in found.to_html()
    if by == "neuron":
        with pytest.raises(ValueError, match="neurons are too many for a heat map"):
            found.plot()
    else:
        assert found.plot().axes


def test_through_one_head(lin: tls.Linearization) -> None:
    """An Attribution of the tokens, as they are seen through the head."""
    paths = tls.carried_by(lin, SCOPE)
    answer = paths.through("L2H2")
    assert isinstance(answer, tls.Attribution)
    assert torch.equal(answer.scores, paths.values[2, 2])
    assert answer.top(1)[0].token == " keys"
    assert answer.scope == "SemanticScope(target=' are', versus=' is') through L2H2"
    assert answer.unit == SCOPE(lin).unit
    assert tls.Attribution.from_json(answer.to_json()).scope == answer.scope
    attention = tls.carried_by(lin, SCOPE, "layer", " keys").through("L2 attention")
    assert attention.scores.shape == (1,)


def test_one_layer(paths: tls.Paths) -> None:
    layer = paths.at(2)
    assert layer.layers == (2,)
    assert torch.equal(layer.values, paths.values[2:3])
    assert torch.equal(layer.around, paths.around[2:3])
    assert layer.top(1) == paths.top(1)


@pytest.mark.parametrize("name", ["L99H0", "L2H9", "L2H22", "head", "L2"])
def test_no_such_component(paths: tls.Paths, name: str) -> None:
    with pytest.raises(
        ValueError, match=f"no component '{name}' in this answer: it has the layers 0 to 5, from L0H0 to"
    ):
        paths.through(name)


def test_bad_questions(paths: tls.Paths, lin: tls.Linearization, no_type_checks: None) -> None:
    with pytest.raises(ValueError, match="there is no layer 6 in this answer: it has the layers 0 to 5"):
        paths.at(6)
    with pytest.raises(TypeError, match="layer must be an integer"):
        paths.at("2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        paths.top(0)
    with pytest.raises(
        ValueError, match="' door' at position 9 is not among the source tokens of this answer, ' keys'"
    ):
        paths.top(token=" door")
    with pytest.raises(ValueError, match="there is no token 'keys' in the prompt.* Did you mean ' keys'"):
        tls.carried_by(lin, SCOPE, tokens="keys")
    with pytest.raises(ValueError, match="the token ' the' stands at the positions 4, 8: give one of these"):
        tls.carried_by(lin, SCOPE, tokens=" the")
    with pytest.raises(ValueError, match="positions have no names"):
        tls.carried_by(lin, SCOPE, "position", " keys").through("L0")
    with pytest.raises(ValueError, match="this answer, by 'layer' in .* does not know where the influence stands"):
        tls.carried_by(lin, SCOPE, "layer", " keys").flow()
    with pytest.raises(ValueError, match=r"by 'position', .* which a page shows with a slider: tls.explore\(model"):
        tls.carried_by(lin, SCOPE, "position", " keys").show()


def test_values_that_overflow(paths: tls.Paths, no_type_checks: None) -> None:
    with pytest.raises(ValueError, match="NaN or infinite values from SemanticScope"):
        dataclasses.replace(paths, values=paths.values * float("nan"))
    with pytest.raises(ValueError, match="values must have 6 layers on the first axis and 2 tokens on the last"):
        dataclasses.replace(paths, values=paths.values[1:])


# -- JSON -------------------------------------------------------------------------------------------------------------


def test_json(paths: tls.Paths) -> None:
    """Read back without loss."""
    again = tls.Paths.from_json(paths.to_json())
    for field in dataclasses.fields(paths):
        one, other = getattr(paths, field.name), getattr(again, field.name)
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, field.name


def test_json_of_an_estimate(lin: tls.Linearization) -> None:
    found = tls.carried_by(lin, tls.FisherScope(6), "head", " keys")
    assert found.standard_error is not None
    assert_close(tls.Paths.from_json(found.to_json()).standard_error, found.standard_error)


def test_broken_json(paths: tls.Paths, no_type_checks: None) -> None:
    record = json.loads(paths.to_json())
    with pytest.raises(TypeError, match="a Paths is read from the text that to_json wrote, got dict"):
        tls.Paths.from_json(record)
    with pytest.raises(ValueError, match="not a Paths but broken JSON"):
        tls.Paths.from_json("{")
    with pytest.raises(ValueError, match='not a Paths: its "format" is not "tl_scopes.Paths"'):
        tls.Paths.from_json("{}")
    with pytest.raises(ValueError, match="written by a later version of tl_scopes"):
        tls.Paths.from_json(json.dumps(record | {"version": 2}))
    with pytest.raises(ValueError, match="a field of this Paths is not what it should be: by: Input should be"):
        tls.Paths.from_json(json.dumps(record | {"by": "heads"}))
    with pytest.raises(ValueError, match="values does not hold numbers of the type float32"):
        tls.Paths.from_json(json.dumps(record | {"values": {"dtype": "float32", "values": [["a"]]}}))


# -- pictures ---------------------------------------------------------------------------------------------------------


def test_a_hook_that_is_random(tiny: Any) -> None:
    """The parts would be those of another run."""

    def noise(value: torch.Tensor, hook: Any) -> torch.Tensor:
        return value + torch.randn_like(value)

    with tiny.hooks(fwd_hooks=[("blocks.2.hook_resid_pre", noise)]):
        lin = tls.linearize(tiny, "The keys to the old cabinet near the door")
        with pytest.raises(
            ValueError, match="the model gave another value at 'ln_final' when it was run again: a hook is random"
        ):
            tls.carried_by(lin, tls.SemanticScope())


def test_places_have_a_column_where_there_are_any(tiny: Any) -> None:
    lin = tls.linearize(tiny, "The keys to the old cabinet near the door")
    placed, whole = (tls.carried_by(lin, tls.SemanticScope(), by).to_html() for by in ("head", "neuron"))
    assert [">at<" in html for html in (placed, whole)] == [True, False]


def test_the_flow_picture(paths: tls.Paths, tmp_path: Any) -> None:
    """A row for each depth, a column for each position that matters, and the heads that move the influence."""
    html = paths.flow(tmp_path / "flow.html", token=" keys")
    assert (tmp_path / "flow.html").read_text(encoding="utf-8") == html
    assert html.count("<tr") == 1 + 7
    assert "L2H2 → ·door 60%" in html
    assert 'title="before L3, at ·door' in html
    assert "<script" not in html
    assert "http" not in html
    assert paths._repr_html_() in html
    assert "from" in paths.to_html(tmp_path / "heads.html", " keys")


def test_a_layer_that_stands_apart() -> None:
    """The first layer of many models answers twenty times faster than the others: it lies over the scale of a map."""
    shares = torch.tensor([[1.0, 0.8], [0.05, 0.04], [0.02, 0.01], [0.03, 0.02]])
    assert component_map._scale(shares) == Scale(pytest.approx(0.05), 0.8)  # type: ignore[arg-type]
    assert component_map._scale(shares[1:]) == Scale(pytest.approx(0.05), 1.0)  # type: ignore[arg-type]


def test_the_live_view(paths: tls.Paths, lin: tls.Linearization) -> None:
    """Depths for layers, source tokens for neurons: the shares of the stream, at each position."""
    view = paths.show()
    assert repr(view) == "LiveView(TextNeuronActivations: where the influence of 2 tokens stands before each layer)"
    shares = torch.tensor(view.props["activations"])
    assert shares.shape == (10, 7, 2)
    assert_close(shares.sum(0), torch.ones(7, 2), rtol=0, atol=2e-3)
    assert view.props["firstDimensionLabels"] == ["L0", "L1", "L2", "L3", "L4", "L5", "end"]
    assert view.props["secondDimensionLabels"] == ["·keys (2)", "·cabinet (6)"]
    html = view._repr_html_()
    assert "heads that move it" in html  # where no script runs
    assert html.count('class="tl-scopes"') == 1  # in the frame of the other cards
    assert "score stands at each token before a layer; red works against it" in html
    with pytest.raises(ValueError, match="this answer, by 'layer' in .* does not know where the influence stands"):
        tls.carried_by(lin, SCOPE, "layer", " keys").show()


@needs_browser
def test_the_live_view_in_a_browser(paths: tls.Paths, tmp_path: Path) -> None:
    dom = browse(f"<!doctype html><meta charset='utf-8'>{paths.show()._repr_html_()}", tmp_path)
    assert "before layer" in dom
    assert "<option" in dom
    assert "heads that move it" not in dom.split("<script")[0]  # the component stands in the static picture's place


@needs_browser
def test_the_flow_in_a_narrow_page(paths: tls.Paths, tmp_path: Path) -> None:
    """The heads wrap, so that all of them can be read without scrolling."""
    cards = measure(paths.flow(), "div", tmp_path, 420)
    assert max(card["overflow"] for card in cards) == 0


def test_pictures_escape(paths: tls.Paths) -> None:
    """Tokens, names of models and notes are text."""
    evil = "<b onclick='x'>&"
    texts = tuple(evil for _ in paths.str_tokens)
    odd = dataclasses.replace(paths, str_tokens=texts, model=evil, notes=(evil,), scope=evil)
    for html in (odd.flow(), odd.to_html()):
        assert "<b on" not in html
        assert "&lt;b" in html


def test_answers_say_what_they_are_about(tiny: Any, lin: tls.Linearization) -> None:
    """The token that was explained, though the scope leaves it open, and the prompt; of a long one both ends."""
    features = tls.Features(torch.eye(128)[:9], "blocks.2.hook_resid_post", decoder=torch.eye(128)[:9])
    scope = tls.SemanticScope()
    found = [
        tls.carried_by(lin, scope, "layer", " keys"),
        tls.carried_by(lin, scope, "head", " keys"),
        tls.layer_map(tiny, TEXT, scope),
        tls.head_map(tiny, TEXT, scope),
        tls.feature_map(tiny, TEXT, features, scope),
    ]
    for one in found:
        assert one.quantity == scope(lin).quantity == "logit of ' are'"
        told = Reader(one.to_html()).text
        assert f"logit of ' are' after “<|bos|>{TEXT}”" in told
        if not isinstance(one, tls.FeatureMap):
            assert repr(one).endswith(f"; logit of ' are' after '<|bos|>{TEXT}')")
    assert f"features that fire in “<|bos|>{TEXT}”" in Reader(tls.feature_map(tiny, TEXT, features).to_html()).text
    assert "the prediction after “<|bos|>" in Reader(tls.head_map(tiny, TEXT, tls.FisherScope(8)).to_html()).text
    long = dataclasses.replace(found[2], str_tokens=("<b>begin\n", *[" and"] * 90, " end"))
    assert re.search("after “<b>begin↵ and .* … .* and end”", Reader(long.to_html()).text)
    assert len(repr(long)) < 260


def test_pictures_of_signed_scores(tiny: Any) -> None:
    """A share has the sign of its value: what speaks against the target is below zero, also of a token that does."""
    lin = tls.linearize(tiny, TEXT, rules="linear")
    paths = tls.carried_by(lin, tls.RelevanceScope(" is", versus=" are"))
    assert paths.column() == 2
    assert paths.scores[2] < 0
    for row in (*paths.top(9), *paths.top(9, token=-1)):
        assert (row.share > 0) == (row.value > 0)
    assert sum(row.share for row in paths.at(2).top(9)) + paths.around[2, 2] / -paths.scores[2] == pytest.approx(-1)
    shares = paths.to_dataframe()
    assert ((shares["share"] > 0) == (shares["value"] > 0)).all()
    told = Reader(paths.to_html()).text
    assert "vermilion ones are below zero, as the score is" in told
    assert "vermilion ones work against it" in Reader(paths.to_html(token=int(paths.scores.argmax()))).text
    assert tls.Paths.from_json(paths.to_json()).quantity == paths.quantity


def test_many_positions_are_summed(paths: tls.Paths) -> None:
    """The flow picture stays narrow: fifteen columns at most, of which the last one is the sum of the others."""
    stream = torch.ones(7, 60, 2)
    wide = dataclasses.replace(paths, stream=stream, str_tokens=tuple(f" t{i}" for i in range(60)), where=None)
    html = wide.flow(token=2)
    assert html.count("<td") == 8 * (1 + 15 + 1)
    assert "others" in html


# -- maps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", ["resid_pre", "attn_out", "mlp_out"])
@pytest.mark.parametrize("species", ["bridge llama", "bridge gpt2", "native soft cap"])
def test_a_layer_map_is_the_scope_at_each_hook(species: str, at: Any) -> None:
    """‖cᵀ ∂y/∂k‖ is what the scope says of a linearisation with respect to that hook."""
    with zoo.Float64():
        model, scope = zoo.specimen(species).model, tls.SemanticScope(7)
        found = tls.layer_map(model, PROMPT, scope, at=at)
        for component in components(model, at):
            own = tls.attribute(model, PROMPT, scope, wrt=component.hook)
            assert_close(found.scores[component.layer], own.scores, **EXACT)
            assert found.unit == own.unit.replace(f"blocks.{component.layer}.", "blocks.N.")
    assert found.axis_names == ("layer", "position")


@pytest.mark.parametrize("scope", [tls.SemanticScope(7), tls.FisherScope(exact=True)], ids=["norm", "Fisher"])
def test_a_head_map(scope: Any) -> None:
    """What the heads of a layer give out, in the coordinates of the heads: finite differences of one."""
    with zoo.Float64():
        model = zoo.specimen("bridge llama").model
        found = tls.head_map(model, PROMPT, scope)
        assert found.scores.shape == (2, 4, 8)
        lin = tls.linearize(model, PROMPT)
        hook, h = "blocks.1.attn.hook_z", 1e-5
        moved = []
        for d in range(8):
            rows = []
            for sign in (1, -1):
                step = torch.zeros(1, 8, 4, 8, dtype=torch.float64)
                step[0, 7, 2, d] = sign * h
                with model.hooks(fwd_hooks=[(hook, lambda value, hook, step=step: value + step)]), torch.no_grad():
                    rows.append(model(torch.tensor([PROMPT]))[0, -1])
            moved.append((rows[0] - rows[1]) / (2 * h))
        slopes = torch.stack(moved)  # [d_head vocab]
        if isinstance(scope, tls.SemanticScope):
            expected = slopes[:, 7].norm()
        else:
            p = lin.log_probs.exp()
            expected = (p * (slopes - (slopes * p).sum(-1, keepdim=True)) ** 2).sum()
        assert_close(found.scores[1, 2, 7], expected, rtol=1e-5, atol=1e-9)
    whole = found.scores.sum(-1) if isinstance(scope, tls.FisherScope) else found.scores.square().sum(-1).sqrt()
    assert_close(found.summed, whole)


@dataclass(frozen=True, eq=False)
class FisherScopeOfMine(tls.JacobianScope):
    """A scope whose scores are norms, whatever its name."""

    def cotangents(self, lin: tls.Linearization) -> torch.Tensor:
        return torch.eye(len(lin.readout), dtype=torch.float64)[:2]

    def unit(self, lin: tls.Linearization) -> str:
        return "readout"


class Information(tls.FisherScope):
    """The same as a FisherScope, by another name."""


def test_a_map_of_a_scope_of_ones_own_is_summed_as_its_scores_are(tiny: Any) -> None:
    found = tls.layer_map(tiny, TEXT, FisherScopeOfMine())
    assert_close(found.summed, found.scores.square().sum(-1).sqrt())
    found = tls.layer_map(tiny, TEXT, Information(8))
    assert_close(found.summed, found.scores.sum(-1))


def test_autocast_is_reported(tiny: Any) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        lin = tls.linearize(tiny, TEXT)
        assert {tls.head_map(tiny, TEXT, SCOPE).dtype, tls.carried_by(lin, SCOPE).dtype} == {"bfloat16"}


def test_a_map_in_other_forms(tiny: Any, tmp_path: Any) -> None:
    found = tls.head_map(tiny, TEXT, SCOPE)
    first = found.top(1)[0]
    assert first.score == found.scores.max().item()
    assert first.name.startswith("L")
    frame = found.to_dataframe()
    assert isinstance(frame, pd.DataFrame)
    assert frame["score"].max() == first.score
    assert len(frame) == 6 * 4 * 10
    assert found.plot().axes
    found.to_html(tmp_path / "map.html")
    assert found._repr_html_() in (tmp_path / "map.html").read_text(encoding="utf-8")
    layers = tls.layer_map(tiny, TEXT, SCOPE, at="mlp_out")
    assert repr(layers) == (
        "ComponentMap(SemanticScope(target=' are', versus=' is') at mlp_out: 6 x 10 layer, position; "
        "logit per unit of norm at blocks.N.hook_mlp_out; logit of ' are' − logit of ' is' after "
        "'<|bos|>The keys to the old cabinet near the door')"
    )
    assert layers.plot().axes


def test_a_map_costs_one_forward_pass(tiny: Any) -> None:
    runs: list[int] = []
    with tiny.hooks(fwd_hooks=[("hook_embed", lambda value, hook: runs.append(1))]):
        tls.layer_map(tiny, TEXT, SCOPE)
        tls.head_map(tiny, TEXT, SCOPE, 4)
    assert len(runs) == 2


def test_a_map_of_a_linearisation(lin: tls.Linearization, no_type_checks: None) -> None:
    """The error says what to write, whether or not Python would miss an argument."""
    ask: Any
    for ask in (tls.head_map, tls.layer_map, tls.feature_map):
        for others in ((), (SCOPE,), (SCOPE, -1)):
            match = (
                rf"{ask.__name__} takes a model and a prompt, .* got a Linearization: write tls.{ask.__name__}\(model"
            )
            with pytest.raises(TypeError, match=match):
                ask(lin, *others)


def test_bad_maps(tiny: Any, no_type_checks: None) -> None:
    with pytest.raises(ValueError, match='at is "resid_pre", "attn_out" or "mlp_out", got \'z\'; for heads there is'):
        tls.layer_map(tiny, TEXT, SCOPE, at="z")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a map takes scopes whose scores are norms"):
        tls.head_map(tiny, TEXT, tls.SpectralScope())
    with pytest.raises(TypeError, match="expected a scope such as SemanticScope"):
        tls.head_map(tiny, TEXT, "are")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="' are old' is 2 tokens, .* a map is about one prediction: name one token"):
        tls.layer_map(tiny, TEXT, tls.SemanticScope(" are old"))
    with pytest.raises(ValueError, match="count must be at least 1"):
        tls.head_map(tiny, TEXT, SCOPE).top(0)
    with zoo.Float64():
        with pytest.raises(ValueError, match="MambaForCausalLM has no hook on its attention heads"):
            tls.head_map(zoo.specimen("bridge mamba").model, PROMPT, tls.SemanticScope(7))
