"""Several answers side by side, as a person sees them."""

import re
from dataclasses import replace
from html import escape, unescape
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


def test_named_by_what_differs(tiny: Any) -> None:
    """Where the scope is one: by what is explained, or the prompt, the position, the model."""
    texts = ["The keys to the old cabinet near the door", "The key to the old cabinet near the doors"]
    keys, key = (tls.attribute(tiny, text, tls.SemanticScope()) for text in texts)
    both = tls.compare([keys, key])
    assert list(both.answers) == ["SemanticScope() about ' are'", "SemanticScope() about ' is'"]
    note = "the answers are about different numbers: logit of ' are', logit of ' is'"
    assert f"Note: {escape(note)}" in both.to_html()
    are = [tls.attribute(tiny, text, tls.SemanticScope(" are")) for text in texts]
    given = "SemanticScope(target=' are') on '<|bos|>The key"
    assert [name[: len(given) + 1] for name in tls.compare(are).answers] == [f"{given}s", f"{given} "]
    assert "different numbers" not in tls.compare(are).to_html()
    places = [tls.attribute(tiny, texts[0], tls.SemanticScope(" are"), position) for position in (2, 5)]
    assert [name[-16:] for name in tls.compare([places[0], replace(places[0], position=5)]).answers] == [
        "after position 2",
        "after position 5",
    ]
    assert list(tls.compare([keys, replace(keys, model="other")]).answers)[1] == "SemanticScope() of other"


def test_a_text_that_stands_twice_is_told_with_its_place(tiny: Any) -> None:
    one = answer(["a", " the", " cat", " the"], [1.0, 3.0, 2.0, 4.0])
    assert "' the' at 3 40%, ' the' at 1 30%, ' cat' 20%" in repr(one)
    assert "·the at 3 40.0%" in Reader(tls.compare([one])._repr_html_()).text
    traced = tls.answer_map(tiny, "The the keys the", " are old.", tls.SemanticScope()).traced()
    assert re.search(r"' the' at \d", repr(traced))


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


def test_signs_are_explained() -> None:
    """A comparison has no bar of colours: words say what the second colour is."""
    signed = answer(["a", "b", "c"], [1.0, -0.5, 0.1], scope="RelevanceScope()")
    assert "its own scale; vermilion: below zero" in Reader(tls.compare({"a": signed, "b": signed}).to_html()).text
    assert "vermilion" not in Reader(tls.compare({"a": SENTENCE}).to_html()).text


def test_too_much_to_draw() -> None:
    several = {str(n): SENTENCE for n in range(1 + 4_000 // len(SENTENCE.scores))}
    with pytest.raises(ValueError, match=r"4,\d+ tokens are too many for a browser"):
        tls.compare(several).show()


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
        ({1: SENTENCE, "1": SECOND, 2: SECOND}, ValueError, "the name '1' is that of an earlier answer, as text: give"),
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
    assert pair.str_tokens[6] == "inet| x"
    assert list(pair.to_dataframe().index.get_level_values("token"))[6] == "inet| x"
    assert "differ in 1 token, underlined" in pair.to_html()
    assert pair.to_html().count("3px double #1f2328") == 2
    longer = tls.compare({"a": SENTENCE, "b": answer([*WORDS, " x"], [1.0] * 8)})
    assert not longer.aligned
    assert "prompts of different lengths" in longer.to_html()
    assert longer.to_dataframe()[("b", "token")].tolist()[-1] == " x"
    assert [len(view.props["tokens"]) for view in longer.show().views] == [7, 8]


# ---------------------------------------------------------------------------------------------------------------------
# circuitsvis

HOVER = """<script>setTimeout(() => document.querySelectorAll(".colored-tokens")[1].children[2].dispatchEvent(
  new MouseEvent("mouseenter", {clientX: 9, clientY: 9})), 2500)</script>"""


def test_live_as_in_the_static_card() -> None:
    """Each answer on its own scale, with what stands around it; only the tokens are alive."""
    view = BOTH.show()
    assert repr(view) == f"LiveView(ColoredTokens: {BOTH!r})"
    for part, one in zip(view.views, BOTH.answers.values(), strict=True):
        assert [written.fields["number"] for written in part.props["values"]] == card.strengths(one)
        written = part.props["values"][2].fields["written"]
        assert written == f"score {one.scores[2]:.3g} {one.unit}, share {one.share[2]:.1%}"
    frame = Reader(view.frame(Html(), Html())).text
    static = Reader(BOTH._repr_html_()).text
    assert len(frame) > 200
    assert "colour: square root of the score, each answer on its own scale" in frame
    assert frame[-200:] == static[-200:]
    assert "Bound" not in frame


def test_colors() -> None:
    """Texts and tables have the colours asked for, and the legend says which."""
    pages = {colors: BOTH.to_html(colors=colors) for colors in ("root", "linear", "even")}  # type: ignore[arg-type]
    assert pages["root"] == BOTH.to_html()
    for colors, told in (("linear", "in proportion to the score"), ("even", "the score above an even one")):
        reader = Reader(pages[colors])
        assert f"colour: {told}, each answer on its own scale" in reader.text
        strengths = card.strengths(SENTENCE, colors) + card.strengths(SECOND, colors)  # type: ignore[arg-type]
        for (_, style, _), strength in zip(reader.tokens, strengths, strict=True):
            assert f"background-color:{color(strength)};" in style


def test_the_texts_stay_where_no_script_runs() -> None:
    html = BOTH.show()._repr_html_()
    shown = Reader(html[: html.index("<script>")]).tokens
    assert [text for _, _, text in shown] == 2 * [visible(text) for text in WORDS]


@needs_browser
def test_both_answers_in_a_browser(tmp_path: Path) -> None:
    """Each has its colours; a tooltip has the score and the share."""
    scores = torch.rand(len(NASTY), generator=torch.Generator().manual_seed(0)).tolist()
    first, second = answer(NASTY, scores[::-1]), answer(NASTY, scores, target=IS, versus=ARE)
    view = tls.compare({"clean": first, "<patched>": second}).show()
    dom = browse(f"<!doctype html>{view._repr_html_()}{HOVER}{PROBE}", tmp_path)
    assert 'data-requests="0"' in dom
    assert "data-hacked" not in dom
    assert "&lt;patched&gt;" in dom

    pattern = r"background-color: rgb\((\d+), (\d+), (\d+)\); color: \w+; line-height: 1em;[^>]*>(.*?)</span>"
    shown = re.findall(pattern, dom)
    texts = [unescape(text).replace("\u2060", "").replace("\xa0", "").replace("\u200b", "") for *_, text in shown]
    assert texts == 2 * [visible(text) for text in NASTY]
    strengths = card.strengths(first) + card.strengths(second)
    for (*channels, _), strength in zip(shown, strengths, strict=True):
        static = bytes.fromhex(color(strength)[1:])
        # On its way to blue circuitsvis' own mixture is redder by up to 17; the rules of the view put ours over it.
        assert max(abs(int(a) - b) for a, b in zip(channels, static, strict=True)) <= 17
    assert f"<br>score {second.scores[2]:.3g} {second.unit}, share {second.share[2]:.1%}</div>" in dom
