"""Attention masses are what the patterns say, sinks are found wherever they are, interventions are what they say."""

import dataclasses
import math
import re
from collections.abc import Iterator
from html import unescape
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import tl_scopes as tls
from tests import zoo
from tests.pictures import NASTY, Reader
from tests.test_attention import HOLDABLE, MORE, WITH_ATTENTION, WRAPPED
from tests.test_left_as_found import failing, unchanged
from tests.zoo import PROMPT, Specimen
from tl_scopes.diagnostics.sink_report import INTERVENTIONS, can_be_sinks, uniform_mass
from tl_scopes.diagnostics.sinks import attention_mass, mass_of
from tl_scopes.jacobian.replacement import effects, substitute
from tl_scopes.models import attention_layers, masked_attention, zeroed_values

EXACT = {"rtol": 1e-9, "atol": 1e-12}
TOKENS = torch.tensor(PROMPT)
T = len(PROMPT)
MODEL = "hooked layer norm" if zoo.HookedTransformer else "bridge llama"
ROTARY = [name for name in HOLDABLE if name in ("bridge llama", "bridge qwen2", "bridge mixtral") or "rotary" in name]
SEMANTIC = tls.SemanticScope()


def sink_report(
    model: Any, prompt: Any, scopes: Any = None, position: int = -1, prepend_bos: Any = None, **options: Any
) -> tls.SinkReport:
    """The report of one prompt."""
    return tls.sink_report(tls.linearize(model, prompt, position, prepend_bos=prepend_bos), scopes, **options)


@pytest.fixture
def specimen(request: pytest.FixtureRequest) -> Iterator[Specimen]:
    with zoo.Float64():
        yield zoo.specimen(request.param) if request.param in zoo.SPECIES else MORE[request.param]()


@pytest.fixture
def model() -> Iterator[Any]:
    """A fresh one: these tests change it."""
    with zoo.Float64():
        model = zoo.SPECIES[MODEL]().model
        model(TOKENS[None])
        yield model


@pytest.fixture(scope="module")
def report(tiny: Any) -> tls.SinkReport:
    return sink_report(tiny, "The keys to the old cabinet near the door")


def of_species(*names: str) -> Any:
    return pytest.mark.parametrize("specimen", names, indirect=True)


def attending_to(key: int, head: int) -> Any:
    """A hook that lets one head attend to one token, all of it, as soon as it is there."""

    def hook_function(pattern: Tensor, hook: Any) -> Tensor:
        pattern = pattern.clone()
        pattern[:, head, key:] = 0
        pattern[:, head, key:, key] = 1
        return pattern

    return hook_function


# -- attention --------------------------------------------------------------------------------------------------------


@of_species(*WITH_ATTENTION, "window", "sink logits", "latent", "multi-query", "linear biases", "opt")
def test_masses_from_the_cache(specimen: Specimen) -> None:
    """The mean of a column of the cached pattern below its diagonal, in a loop; zero for the last."""
    mass = attention_mass(specimen.model, TOKENS)
    name = "blocks.{}.attn.hook_pattern"
    _, cache = specimen.model.run_with_cache(TOKENS[None])
    assert mass.shape[:2] == (specimen.model.cfg.n_layers, specimen.model.cfg.n_heads)
    for layer, heads in enumerate(mass):
        pattern = cache[name.format(layer)][0].detach()
        for head, row in enumerate(heads):
            for key in range(T - 1):
                column = [float(pattern[head, query, key]) for query in range(key + 1, T)]
                assert float(row[key]) == pytest.approx(sum(column) / len(column), rel=1e-10, abs=1e-14)
            assert row[-1] == 0


@of_species(*WITH_ATTENTION)
def test_what_queries_do_not_keep_to_themselves(specimen: Specimen) -> None:
    """Rows of a pattern sum to one: Σ_k (T − 1 − k) α_k = Σ_i (1 − A_ii)."""
    after = torch.arange(T - 1, -1, -1, dtype=torch.float64)
    for mass, layer in zip(
        attention_mass(specimen.model, TOKENS), attention_layers(specimen.model, TOKENS), strict=True
    ):
        kept = layer.pattern.diagonal(dim1=1, dim2=2)
        assert_close(mass @ after, (1 - kept).sum(-1), **EXACT)


@pytest.mark.parametrize("tokens", [1, 2, 7, 40])
def test_uniform_attention(tokens: int) -> None:
    pattern = torch.ones(1, tokens, tokens, dtype=torch.float64).tril()
    assert_close(mass_of(pattern / pattern.sum(-1, keepdim=True))[0], uniform_mass(tokens), **EXACT)


def test_uniform_attention_of_a_model() -> None:
    """The toy attends evenly in all heads: its masses are the uniform ones, and they all write alike."""
    with zoo.Float64():
        found = sink_report(zoo.linear_toy().model, PROMPT, SEMANTIC)
    assert_close(found.mass, uniform_mass(T).expand_as(found.mass), **EXACT)
    assert_close(found.mean_mass, found.uniform, **EXACT)
    assert found.sink_heads == ()


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.6])
def test_looking_back_is_no_sink(threshold: float) -> None:
    """A head that attends to the token one before, or two, has none in a prompt of any length; one that attends to the
    first has its sink there as soon as enough come after it, one that attends to the middle has it there. A head that
    attends to the beginning of each few words has none either."""
    for tokens in range(3, 80):
        can = can_be_sinks(tokens, threshold)
        for back in (1, 2):
            pattern = torch.eye(tokens)[[max(0, i - back) for i in range(tokens)]][None]
            found = (mass_of(pattern)[0] > threshold) & can
            assert not found[back:].any()
        assert bool(can[0]) == (tokens - 1 > 1 / threshold)
    blocks = torch.eye(80)[[i - i % 6 for i in range(80)]][None]
    assert not ((mass_of(blocks)[0] > 0.25) & can_be_sinks(80, 0.25)).any()
    middle = torch.eye(40)[[min(i, 20) for i in range(40)]][None]
    assert ((mass_of(middle)[0] > threshold) & can_be_sinks(40, threshold)).nonzero().tolist() == [[20]]


@pytest.mark.parametrize("key", [0, 2])
def test_sinks_are_found(model: Any, key: int) -> None:
    """Of a head that was made to rest on one token, with what it writes; its pattern is kept first."""
    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", attending_to(key, head=1))]):
        found = sink_report(model, PROMPT, SEMANTIC)
        norms = list(attention_layers(model, TOKENS))[1].written.norm(dim=-1)[1]
    (sink,) = [head for head in found.sink_heads if (head.layer, head.head) == (1, 1)]
    assert sink == found.sink_heads[0]
    assert (sink.position, sink.token, sink.mass) == (key, found.str_tokens[key], 1.0)
    others = sorted(float(norms[i]) for i in range(T) if i != key)
    assert sink.value_norm == pytest.approx(float(norms[key]) / others[(T - 2) // 2])
    assert key in found.sinks
    first, pattern = next(iter(found.patterns.items()))
    assert first == (1, 1)
    assert torch.equal(pattern[key:, key], torch.ones(T - key, dtype=torch.float64))
    row = found.to_dataframe().iloc[key]
    here = [head for head in found.sink_heads if head.position == key]
    assert row["sink_heads"] == len(here)
    assert row["value_norm"] == sorted(head.value_norm for head in here)[(len(here) - 1) // 2]
    assert f"{found.str_tokens[key]!r} (position {key}) for {len(here)}" in found.summary()


@of_species(*dict.fromkeys(["bridge llama", MODEL]))
def test_sink_heads_are_those_above_the_threshold(specimen: Specimen) -> None:
    for threshold in (0.1, 0.2, 0.9):
        found = sink_report(specimen.model, PROMPT, SEMANTIC, threshold=threshold)
        places = {
            (layer, head, i)
            for layer, heads in enumerate(found.mass.tolist())
            for head, masses in enumerate(heads)
            for i, mass in enumerate(masses)
            if mass > threshold and T - 1 - i > 1 / threshold and T - 1 - i >= T / 4
        }
        assert {head[:3] for head in found.sink_heads} == places
        masses = [head.mass for head in found.sink_heads]
        assert masses == sorted(masses, reverse=True)
        assert found.sinks == tuple(sorted({place[2] for place in places}))


def test_only_a_few_patterns_are_kept(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    """Those of the strongest heads, as copies of their own; of prompts that nobody can draw none."""
    zoo.batches_of(monkeypatch, 1)
    layers = list(attention_layers(model, TOKENS))
    for heads, cells in ((3, 10**6), (6, 2 * T**2), (6, T**2 - 1)):
        monkeypatch.setattr("tl_scopes.diagnostics.sinks._HEADS", heads)
        monkeypatch.setattr("tl_scopes.diagnostics.sinks._CELLS", cells)
        found = sink_report(model, PROMPT, SEMANTIC)
        strongest = found.mass[..., can_be_sinks(T, 0.3)].amax(-1)
        kept = [float(strongest[place]) for place in found.patterns]
        assert kept == sorted(strongest.flatten().tolist(), reverse=True)[: min(heads, cells // T**2)]
        for (layer, head), pattern in found.patterns.items():
            assert torch.equal(pattern, layers[layer].pattern[head])
            assert pattern.untyped_storage().nbytes() == pattern.numel() * pattern.element_size()
    with pytest.raises(ValueError, match="no patterns of 8 tokens can be drawn: make the report of a shorter prompt"):
        found.show()


# -- shares and interventions -----------------------------------------------------------------------------------------


@of_species(*dict.fromkeys(["bridge llama", "bridge gpt2", MODEL]))
def test_shares_are_the_scopes(specimen: Specimen) -> None:
    scopes = {"one": tls.SemanticScope(target=3), "other": tls.FisherScope()}
    found = sink_report(specimen.model, PROMPT, scopes, position=5)
    assert found.position == 5
    assert list(found.share) == list(scopes)
    for name, scope in scopes.items():
        expected = tls.attribute(specimen.model, PROMPT, scope, position=5).share
        assert_close(found.share[name], expected, **EXACT)
        assert_close(torch.tensor(found.to_dataframe()[f"share {name}"].values), expected[:4], **EXACT)


def test_scopes_as_they_come(model: Any) -> None:
    """One, a list, none: Temperature is left out, with a word about it, where the final norm has no gain."""
    assert list(sink_report(model, PROMPT, SEMANTIC).share) == ["SemanticScope()"]
    assert list(sink_report(model, PROMPT, [SEMANTIC, tls.FisherScope()]).share) == [
        "SemanticScope()",
        "FisherScope()",
    ]
    three = ["SemanticScope()", "TemperatureScope()", "FisherScope()"]
    usual = sink_report(model, PROMPT)
    assert (list(usual.share), usual.notes) == (three, ())
    with torch.no_grad():
        gain, *bias = model.ln_final.parameters()
        gain.fill_(1)
        for parameter in bias:
            parameter.zero_()
    folded = sink_report(model, PROMPT)
    assert list(folded.share) == ["SemanticScope()", "FisherScope()"]
    assert folded.notes[0].startswith("no TemperatureScope: the final norm has no gain")


def test_an_answer_of_one_token(tiny: Any) -> None:
    """The report is that of the prompt, and scopes explain the token that was said."""
    text = "The keys to the old cabinet near the door"
    said = tls.sink_report(tls.linearize(tiny, text, answer=" is"), tls.SemanticScope())
    plain = tls.sink_report(tls.linearize(tiny, text), tls.SemanticScope(" is"))
    assert said.prediction == plain.prediction
    assert_close(said.kl, plain.kl)
    assert said.likeliest == plain.likeliest
    assert said.answers["SemanticScope()"].target.text == " is"
    assert_close(said.answers["SemanticScope()"].scores, plain.answers["SemanticScope(target=' is')"].scores)


def kl_of_plain(before: Tensor, after: Tensor) -> float:
    p, q = before.softmax(-1).tolist(), after.softmax(-1).tolist()
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@of_species(*WITH_ATTENTION)
def test_interventions(specimen: Specimen) -> None:
    """KL and the new most likely token are those of the plain model without the token, of scores that leave it out, and
    of the mean embedding in its place."""
    found = sink_report(specimen.model, PROMPT, SEMANTIC, early=3)
    lin = tls.linearize(specimen.model, PROMPT)
    is_blind = specimen.model in [zoo.specimen(name).model for name in WRAPPED]
    with torch.no_grad():
        zero = torch.zeros(T, zoo.WIDTH, dtype=torch.float64)
        before = specimen.forward(TOKENS, zero)[1][-1]
        mean = substitute(lin, "mean")
        for i in range(3):
            rest = torch.cat([TOKENS[:i], TOKENS[i + 1 :]])
            step = zero.clone()
            step[i] = (mean - lin.embeddings[i])[0]
            after = {
                "removed": specimen.forward(rest, zero[1:])[1][-1],
                "replaced": specimen.forward(TOKENS, step)[1][-1],
            }
            if not is_blind:
                with masked_attention(specimen.model, [i]):
                    after["masked"] = specimen.model(TOKENS[None])[0, -1]
            for name, logits in after.items():
                row = INTERVENTIONS.index(name)
                assert float(found.kl[row, i]) == pytest.approx(kl_of_plain(before, logits), rel=1e-9, abs=1e-13)
                assert found.likeliest[row][i] == lin.token(logits.argmax()).text
    kept = torch.ones(3, T, 1, dtype=torch.bool)
    kept[range(3), range(3)] = False
    assert_close(found.kl[2], effects(lin, mean, kept, TOKENS[:1])[1], **EXACT)
    assert found.kl[[0, 2]].isfinite().all()
    assert bool(found.kl[1].isnan().all()) == is_blind
    assert bool(found.notes) == is_blind


@of_species(*ROTARY)
def test_the_first_token_removed_is_the_first_token_masked(specimen: Specimen) -> None:
    """Where only distances count; any other one is not."""
    found = sink_report(specimen.model, PROMPT, SEMANTIC)
    assert_close(found.kl[0, 0], found.kl[1, 0], rtol=1e-6, atol=1e-9)
    assert not torch.allclose(found.kl[0, 1:], found.kl[1, 1:], rtol=1e-2)


@of_species("bridge llama")
def test_zeroed_values(specimen: Specimen) -> None:
    """The prediction is that of the plain model whose value projections give zeros at the token."""
    found = sink_report(specimen.model, PROMPT, SEMANTIC, early=2)
    before = specimen.model(TOKENS[None])[0, -1].detach()
    for i in range(2):

        def zero(module: Any, args: Any, out: Tensor, at: int = i) -> Tensor:
            out = out.clone()
            out[:, at] = 0
            return out

        handles = [layer.self_attn.v_proj.register_forward_hook(zero) for layer in specimen.plain.model.layers]
        after = specimen.plain(TOKENS[None]).logits[0, -1].detach()
        for handle in handles:
            handle.remove()
        assert float(found.kl[3, i]) == pytest.approx(kl_of_plain(before, after), rel=1e-6, abs=1e-12)
    with pytest.raises(ValueError, match="values cannot be zeroed: position 99"), zeroed_values(specimen.model, [99]):
        specimen.model(TOKENS[None])


@pytest.mark.usefixtures("no_type_checks")
def test_values_are_zeroed_at_integers(tiny: Any) -> None:
    for positions in ([0.5], ["0"]):
        with pytest.raises(TypeError, match="values are zeroed at positions, integers, got"):
            with zeroed_values(tiny, positions):  # type: ignore[arg-type]
                pass


@of_species("bridge gpt2")
def test_positions_of_their_own_do_count(specimen: Specimen) -> None:
    found = sink_report(specimen.model, PROMPT, SEMANTIC)
    assert not torch.allclose(found.kl[0], found.kl[1], rtol=1e-2)


@of_species(*HOLDABLE)
def test_a_token_that_nobody_attends_to(specimen: Specimen) -> None:
    """Draws no attention, has no influence, and what is done to it in its place changes nothing."""
    with masked_attention(specimen.model, [1]):
        found = sink_report(specimen.model, PROMPT, [SEMANTIC, tls.FisherScope()])
    assert not found.mass[..., 1].any()
    for share in found.share.values():
        assert share[1] < 1e-12
        assert share[0] > 1e-6
    assert found.kl[1:, 1].max() < 1e-12
    assert found.kl[1:, [0, 2]].min() > 1e-8
    assert found.likeliest[1][1] == found.likeliest[2][1] == found.prediction.token.text


@of_species("opt", *WRAPPED)
def test_what_cannot_be_masked_is_not_known(specimen: Specimen) -> None:
    found = sink_report(specimen.model, PROMPT, SEMANTIC)
    assert found.kl[1].isnan().all()
    assert found.kl[[0, 2]].isfinite().all()
    assert found.likeliest[1] == ("",) * 4
    (note,) = found.notes
    assert note.startswith("some tokens could not be masked: attention cannot be masked in ")
    assert "Masked" not in found.summary()
    assert note in found.summary()
    assert "–" in Reader(found._repr_html_()).text


def test_what_is_all_that_is_attended_to_cannot_be_masked(model: Any) -> None:
    """Others can."""
    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", attending_to(2, head=1))]), unchanged(model):
        found = sink_report(model, PROMPT, SEMANTIC)
    assert found.kl[1].isnan().tolist() == [False, False, True, False]
    assert [text == "" for text in found.likeliest[1]] == [False, False, True, False]
    (note,) = found.notes
    assert "attends to nothing else" in note


def test_early_tokens_end_before_the_position(model: Any) -> None:
    for position, early, expected in ((1, 4, 1), (3, 4, 3), (7, 2, 2), (-1, 100, T - 1)):
        found = sink_report(model, PROMPT, SEMANTIC, position=position, early=early)
        assert found.early == expected == len(found.to_dataframe())
        assert found.mass.shape[-1] == len(found.tokens) == position % T + 1
        assert found.kl.isfinite().all()


def test_short_prompts_say_so(model: Any) -> None:
    for tokens in range(2, 9):
        found = sink_report(model, PROMPT[:tokens], SEMANTIC)
        told = any("even uniform attention puts" in note for note in found.notes)
        assert told == (float(uniform_mass(tokens)[0]) > 0.3) == (tokens <= 5)
        assert tokens >= 5 or found.sinks == ()


@pytest.mark.parametrize("layers", [1, 9])
def test_left_as_found(model: Any, layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """After success and after a failure on the way; a group of layers at a time gives the same numbers."""
    whole = sink_report(model, PROMPT)
    monkeypatch.setattr("tl_scopes.models.attention.at_once", lambda *_: layers)
    with unchanged(model):
        found = sink_report(model, PROMPT)
    for name in ("mass", "value_norms", "kl"):
        assert torch.equal(getattr(found, name), getattr(whole, name))
    model.hook_dict["blocks.1.hook_resid_pre"].add_hook(failing)
    with unchanged(model), pytest.raises(ZeroDivisionError, match="the user's hook fails"):
        sink_report(model, PROMPT)


# -- forms and pictures -----------------------------------------------------------------------------------------------


def test_in_words(report: tls.SinkReport) -> None:
    assert repr(report) == (
        "SinkReport(tiny: 5 of 24 heads have a sink above 30%, at '<|bos|>', 'The', ' keys'; "
        "uniform attention puts 21% on the first of 10 tokens, 3 scopes)"
    )
    said = report.summary()
    share, kl = report.share["SemanticScope()"][0], report.kl[0, 0]
    for part in (
        "5 of 24 heads have a sink", "'The' (position 1) for 3", f"{report.mean_mass[0]:.0%} of a later token's",
        f"{share:.1%} in SemanticScope()", "an equal share of 10 tokens would be 10.0%", "is ' are', with 86%",
        f"Removed, it changes the prediction by {kl:.2g} nats; ' are' stays", "nats; ' is' becomes the most likely",
    ):  # fmt: skip
        assert part in said
    none = dataclasses.replace(report, threshold=0.9)
    assert "0 of 24 heads have a sink above 90%; uniform attention puts 21% on the first of 10 tokens" in repr(none)
    assert none.summary().startswith("No head has a sink, a token with more than 90% of the attention. On average")
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.threshold = 0.1  # type: ignore[misc]


def test_as_a_table(report: tls.SinkReport) -> None:
    table = report.to_dataframe()
    scopes = [f"share {name}" for name in ("SemanticScope()", "TemperatureScope()", "FisherScope()")]
    assert list(table) == [
        "position", "token", "attention", "uniform", "sink_heads", "value_norm", *scopes,
        "kl_removed", "kl_masked", "kl_replaced", "kl_zeroed",
    ]  # fmt: skip
    assert table["token"].tolist() == ["<|bos|>", "The", " keys", " to"]
    assert table["sink_heads"].tolist() == [1, 3, 1, 0]
    assert table["value_norm"].isna().tolist() == [False, False, False, True]
    assert_close(torch.tensor(table["attention"].values), report.mass[..., :4].mean((0, 1)).double())


def test_names_of_scopes_do_not_widen_the_card(report: tls.SinkReport) -> None:
    """They stand in several lines: the table would be cut at the right."""
    cells = re.findall(r'<td style="([^"]*)">([^<]*)</td>', report._repr_html_())
    assert all(("white-space:normal" in style) for style, text in cells if unescape(text) in report.answers)
    assert {unescape(text) for _, text in cells} >= set(report.answers)


def test_card(report: tls.SinkReport) -> None:
    text = Reader(report._repr_html_()).text
    for row in report.to_dataframe().to_dict("records"):
        for name in ("attention", "uniform", "share SemanticScope()", "share FisherScope()"):
            assert f"{row[name]:.1%}" in text
        assert f"{row['kl_removed']:.2g}" in text
    for head in report.sink_heads:
        assert f"{head.mass:.1%}" in text
    assert "Strongest sinks, 5 of 5" in text
    assert "→·is" in text.replace("\u2002", "")
    assert "no head has a sink above 90%" in Reader(dataclasses.replace(report, threshold=0.9)._repr_html_()).text


def test_card_of_any_tokens(report: tls.SinkReport) -> None:
    """Nothing in a token, or in a scope's name, becomes markup."""
    answers = {"<b>": next(iter(report.answers.values()))}
    html = dataclasses.replace(report, str_tokens=tuple(NASTY[:10]), answers=answers)._repr_html_()
    reader = Reader(html)
    assert not {"script", "img"} & {name for name, _ in reader.elements}
    assert "<script>alert(1)</script>" in reader.text
    assert "<b>" in reader.text
    assert "onerror" not in {key for _, attributes in reader.elements for key in attributes}


def test_plot(report: tls.SinkReport) -> None:
    """Layers by heads, of the strongest sink or of any position."""
    for position, shown in ((None, 1), (0, 0), (-2, 8)):
        axes = report.plot(position).axes[0]
        numbers = [int(text.get_text()) for text in axes.texts]
        assert numbers == [round(100 * mass) for mass in report.mass[..., shown].flatten().tolist()]
        assert axes.get_title(loc="left").endswith(f"(position {shown})")
    assert dataclasses.replace(report, threshold=0.9).plot().axes[0].get_title(loc="left") == "<|bos|> (position 0)"


def test_show(report: tls.SinkReport, tiny: Any) -> None:
    """The strongest heads, or all of a layer."""
    view = report.show()
    assert view.component == "AttentionHeads"
    assert view.props["attentionHeadNames"][0] == "L{}H{}".format(*report.sink_heads[0][:2])
    assert len(view.props["attentionHeadNames"]) == len(report.patterns) == 6
    lin = tls.linearize(tiny, report.tokens)
    with unchanged(tiny):
        layer = report.show(3, lin)
    assert layer.props["attentionHeadNames"] == ["L3H0", "L3H1", "L3H2", "L3H3"]
    first = [written.fields["written"] for written in layer.props["attention"][2][9]]
    pattern = list(attention_layers(tiny, report.tokens))[3].pattern[2, 9]
    assert first == [f"{part:.3g}" for part in pattern.tolist()]


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompt": [3]}, ValueError, r"one token up to the position, '<3>': nothing comes after it.*two tokens"),
        ({"position": 0}, ValueError, "one token up to the position, '<3>'"),
        ({"prompt": []}, ValueError, "the prompt is empty"),
        ({"position": 8}, ValueError, "position 8 is out of range"),
        ({"early": 0}, ValueError, "early is how many tokens from the start to look at, 1 at least, got 0"),
        ({"early": 1.5}, TypeError, r"early is how many .*, 1 at least, and an integer, got 1\.5"),
        ({"threshold": 0}, ValueError, "threshold is a part of the attention between 0 and 1, got 0"),
        ({"threshold": 1.0}, ValueError, r"threshold is a part .* got 1\.0"),
        ({"threshold": float("nan")}, ValueError, "threshold is a part .* got nan"),
        ({"threshold": "0.3"}, TypeError, "threshold is a part .* got '0.3'"),
        ({"threshold": True}, TypeError, "threshold is a part .* got True"),
        ({"scopes": []}, ValueError, "there are no scopes to evaluate"),
        ({"scopes": {}}, ValueError, "there are no scopes to evaluate"),
        ({"scopes": tls.SemanticScope}, TypeError, r"got <class .*SemanticScope'>: write SemanticScope\(\)"),
        ({"scopes": [3]}, TypeError, "expected a scope such as SemanticScope.*, got 3"),
        ({"scopes": 3}, TypeError, "expected a scope such as SemanticScope.*, got 3"),
        ({"scopes": [SEMANTIC, tls.SemanticScope()]}, ValueError, "2 scopes and 1 names: name them, in a dict"),
    ],
)
@pytest.mark.usefixtures("no_type_checks")
def test_bad_input(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    model = zoo.specimen(MODEL).model
    with pytest.raises(error, match=message):
        sink_report(model, **({"prompt": PROMPT} | arguments))


@of_species("bridge mamba", "convolutions", "mamba beside")
def test_models_without_patterns(specimen: Specimen) -> None:
    message = "has layers in which tokens mix other than by attention patterns"
    with pytest.raises(ValueError, match=message):
        attention_mass(specimen.model, TOKENS)
    specimen.model(TOKENS[None])
    with unchanged(specimen.model), pytest.raises(ValueError, match=message):
        sink_report(specimen.model, PROMPT)


def test_no_model() -> None:
    with pytest.raises(TypeError, match="expected a HookedTransformer or a TransformerBridge, got str"):
        sink_report("gpt2", PROMPT)


def test_what_cannot_be_drawn(report: tls.SinkReport, tiny: Any) -> None:
    with pytest.raises(ValueError, match="position 10 is out of range: the report is about 10 tokens"):
        report.plot(10)
    lin = tls.linearize(tiny, report.tokens)
    with pytest.raises(ValueError, match="there is no layer 6: the model has layers 0 to 5"):
        report.show(6, lin)
    with pytest.raises(ValueError, match=r"patterns of the strongest sink heads alone: show\(2, lin\), with the lin"):
        report.show(2)


def test_a_layer_of_another_model_or_prompt(report: tls.SinkReport, tiny: Any, no_type_checks: None) -> None:
    """Told by the linearisation, exactly: nothing is guessed from patterns that look alike."""
    lin = tls.linearize(tiny, report.tokens)
    hooks = [("blocks.2.attn.hook_pattern", attending_to(0, head=1))]
    with tiny.hooks(fwd_hooks=hooks), pytest.raises(ValueError, match="are not those under which the model was lin"):
        report.show(2, lin)
    with pytest.raises(ValueError, match="is of a point that `at` moved to"):
        report.show(2, lin.at(lin.embeddings / 2))
    for other in (tls.linearize(tiny, report.tokens, -2), tls.linearize(zoo.specimen(MODEL).model, PROMPT)):
        message = r"report of 10 tokens on 'tiny', and Linearization\(.*\) is of another prompt or model: give the lin"
        with pytest.raises(ValueError, match=message):
            report.show(2, other)
    for thing in (tiny, "gpt2"):
        message = rf"show\(2, lin\) takes the Linearization that the report is about, got {type(thing).__name__}: write"
        with pytest.raises(TypeError, match=message):
            report.show(2, thing)
    with pytest.raises(TypeError, match="layer must be an integer, got '2'"):
        report.show("2", lin)  # type: ignore[arg-type]
