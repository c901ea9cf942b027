"""Several answers side by side, as a person sees them."""

import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch

import tl_scopes as tls
from tests.pictures import ARE, IS, NASTY, PROBE, SENTENCE, Reader, answer, browse, needs_browser
from tl_scopes.views import attribution as card
from tl_scopes.views.markup import THEMES, Html, visible
from tl_scopes.views.palette import color

WORDS = list(SENTENCE.str_tokens)
SECOND = answer(WORDS, [0.1, 0.3, 0.2, 0.1, 0.1, 0.1, 0.1], scope="FisherScope()", target=None, unit="nat")
BOTH = tls.compare([SENTENCE, SECOND])


def test_named_by_their_scopes() -> None:
    assert list(BOTH.answers.values()) == [SENTENCE, SECOND]
    assert repr(BOTH) == "Comparison(SemanticScope(target=' are'), FisherScope(); 7 tokens)"
    assert list(tls.compare(iter([SECOND] * 3)).answers) == ["FisherScope()", "FisherScope() (2)", "FisherScope() (3)"]
    assert list(tls.compare({"clean": SENTENCE, "patched": SECOND}).answers) == ["clean", "patched"]


def test_to_dataframe() -> None:
    frame = BOTH.to_dataframe()
    assert frame.index.names == ["position", "token"]
    assert list(frame.index) == list(enumerate(WORDS))
    assert list(frame.columns) == ["SemanticScope(target=' are')", "FisherScope()"]
    torch.testing.assert_close(torch.tensor(frame.values.T), torch.stack([SENTENCE.share, SECOND.share]).double())
    assert frame.sum().tolist() == pytest.approx([1.0, 1.0])


def test_every_answer_is_shown_with_its_own_colours() -> None:
    shown = Reader(BOTH._repr_html_()).tokens
    assert [text for _, _, text in shown] == 2 * [visible(text) for text in WORDS]
    strengths = card.strengths(SENTENCE) + card.strengths(SECOND)
    for (_, style, _), strength in zip(shown, strengths, strict=True):
        assert f"background-color:{color(strength)};" in style
    assert shown[2][0] == "position 2: ' keys', id 1002\nscore 0.05 logit per unit of embedding norm\nshare 5.0%"


def test_card() -> None:
    text = Reader(BOTH._repr_html_()).text
    assert "2 answers about one prompt" in text
    assert text.count("some-model · float32 · hook_embed → ln_final · predicts after position 6") == 1
    assert "colour: square root of the score, each answer on its own scale" in text
    assert "<s> 90.0%·keys 5.0%" in text
    assert "The 30.0%·keys 20.0%" in text
    assert "SemanticScope(target=' are') in logit per unit of embedding norm · explains ·are" in text
    assert "FisherScope() in nat" in text
    assert "1 answer about one prompt" in Reader(tls.compare([SENTENCE])._repr_html_()).text


def test_answers_from_different_places_say_so() -> None:
    other = answer(WORDS, [1.0] * 7, model="another", notes=("noted",))
    text = Reader(tls.compare([SENTENCE, other, other])._repr_html_()).text
    assert text.count("some-model · float32") == 1
    assert text.count("another · float32") == 2
    assert text.count("Note: noted") == 1


def test_self_contained(tmp_path: Path) -> None:
    nasty = answer(NASTY, [1.0] * len(NASTY), scope="<script>")
    shown = tls.compare({"<b>": nasty, "&amp;": nasty})
    html = shown.to_html(tmp_path / "comparison.html")
    assert (tmp_path / "comparison.html").read_text(encoding="utf-8") == html
    assert html.startswith("<!doctype html>")
    assert shown._repr_html_() in html
    html = html.replace(THEMES, "")
    for word in ("<script", "<style", "<link", "<img", "http", "href=", "@import", "url(", "<!--"):
        assert word not in html
    reader = Reader(html)
    assert [text for _, _, text in reader.tokens] == 2 * [visible(text) for text in NASTY]
    assert "<b>" in reader.text


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize(
    ("answers", "error", "message"),
    [
        ([], ValueError, "nothing to compare: give at least one answer"),
        ({}, ValueError, "nothing to compare: give at least one answer"),
        (SENTENCE, TypeError, "several Attributions, in a list or by name in a dict, got one Attribution"),
        (None, TypeError, "several Attributions, in a list or by name in a dict, got one NoneType"),
        ([SENTENCE, None], TypeError, "answers must be Attributions, got one NoneType among them"),
        (
            [SENTENCE, SENTENCE.without([0])],
            ValueError,
            r"has 7, .*\(2\) 6, from 0 and 1 on",
        ),
        (
            {"a": SENTENCE.without([0]), "b": SENTENCE.without([1])},
            ValueError,
            "same positions: a has 6, b 6, from 1 and 0 on. Use `without` on all",
        ),
    ],
)
def test_bad_input(answers: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tls.compare(answers)


def test_pairs_of_prompts() -> None:
    """Prompts of one length are aligned, with the differing tokens marked; others stand side by side."""
    other = answer([*WORDS[:6], " x"], [1.0] * 7)
    pair = tls.compare(SENTENCE, other)
    assert pair.aligned
    assert pair.differing == (6,)
    assert pair.str_tokens[6] == "inet |  x"
    assert list(pair.to_dataframe().index.get_level_values("token"))[6] == "inet |  x"
    assert "differ in 1 token, underlined" in pair.to_html()
    assert pair.to_html().count("3px double #1f2328") == 2
    longer = tls.compare({"a": SENTENCE, "b": answer([*WORDS, " x"], [1.0] * 8)})
    assert not longer.aligned
    assert "prompts of different lengths" in longer.to_html()
    assert longer.to_dataframe()[("b", "token")].tolist()[-1] == " x"
    with pytest.raises(ValueError, match="prompts of different lengths, and circuitsvis draws one text"):
        longer.show()


# ---------------------------------------------------------------------------------------------------------------------
# circuitsvis

CHOOSE = """<script>
setTimeout(() => [...document.querySelectorAll("div")].filter(div => div.textContent === "<patched>").pop()
  .dispatchEvent(new MouseEvent("mouseover", {bubbles: true})), 2000);
setTimeout(() => document.querySelectorAll(".colored-tokens > span")[2].dispatchEvent(
  new MouseEvent("mouseenter", {clientX: 9, clientY: 9})), 2500)</script>"""


def test_shares_up_to_the_largest_within_a_scale() -> None:
    """The sink of the first answer lies over its own scale."""
    props = BOTH.show().props
    assert props["positiveBounds"] == [pytest.approx(0.3)] * 2
    assert props["negativeBounds"] == [pytest.approx(-0.3)] * 2
    assert [row[1] for row in props["values"]] == SECOND.share.tolist()
    assert repr(BOTH.show()) == f"LiveView(ColoredTokensMulti: {BOTH!r})"
    assert "colour: share, white at 0 and full at Positive Bound" in Reader(BOTH.show().frame(Html())).text


def test_the_texts_stay_where_no_script_runs() -> None:
    html = BOTH.show()._repr_html_()
    shown = Reader(html[: html.index("<script>")]).tokens
    assert [text for _, _, text in shown] == 2 * [visible(text) for text in WORDS]


@needs_browser
def test_choosing_an_answer_in_a_browser(tmp_path: Path) -> None:
    """The tokens take the colours of the answer under the pointer; a tooltip has the shares of all."""
    scores = torch.rand(len(NASTY), generator=torch.Generator().manual_seed(0)).tolist()
    first, second = answer(NASTY, scores[::-1]), answer(NASTY, scores, target=IS, versus=ARE)
    view = tls.compare({"clean": first, "<patched>": second}).show()
    dom = browse(f"<!doctype html>{view._repr_html_()}{CHOOSE}{PROBE}", tmp_path)
    assert 'data-requests="0"' in dom
    assert "data-hacked" not in dom

    pattern = r"background-color: rgb\((\d+), (\d+), (\d+)\); color: \w+; line-height: 1em;[^>]*>(.*?)</span>"
    shown = re.findall(pattern, dom)
    texts = [unescape(text).replace("\u2060", "").replace("\xa0", "") for *_, text in shown]
    assert texts == [visible(text) for text in NASTY]
    reds = [int(red) for red, *_ in shown]  # from 255 on white to 0 on blue
    assert sorted(range(len(NASTY)), key=reds.__getitem__) == second.scores.argsort(descending=True).tolist()
    for one in (first, second):
        assert f">{one.share[2].item():.6f}</td>" in dom
