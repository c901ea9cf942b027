"""What a person sees: the static card, and circuitsvis' tokens in a browser."""

import gzip
import re
import socket
import subprocess
import sys
import unicodedata
import urllib.request
from base64 import b64decode
from dataclasses import replace
from html import unescape
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tl_scopes as tls
from tests.browser import Browser
from tests.pictures import ARE, IS, NASTY, PROBE, SENTENCE, Reader, answer, browse, needs_browser
from tl_scopes.models import Target, Token
from tl_scopes.results.attribution_map import AttributionMap
from tl_scopes.views import attribution as card
from tl_scopes.views import markup
from tl_scopes.views.live import LiveView
from tl_scopes.views.markup import THEMES, visible
from tl_scopes.views.palette import Scale, color, dark, text_color

# ---------------------------------------------------------------------------------------------------------------------
# Visible text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" are", "·are"),
        ("   ", "···"),
        ("a\n\n", "a↵↵"),
        ("\t", "⇥"),
        ("\r\n", "U+000D↵"),
        ("", "∅"),
        ("<0xE2>", "<0xE2>"),
        ("a\u200bb\u202e", "aU+200BbU+202E"),
        ("\xa0", "U+00A0"),
        ("\u0301a", "◌\u0301a"),
        ("e\u0301", "e\u0301"),
        ("\ufe0f", "U+FE0F"),
        ("\ud83d", "U+D83D"),
        ("größte 日本 😀", "größte·日本·😀"),
    ],
)
def test_visible(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_nothing_stays_invisible() -> None:
    """No control, format, private or space character comes through; nearly all others do."""
    for char in map(chr, [*range(0x3100), *range(0xD800, 0x10000), *range(0xE0000, 0xE0080)]):
        hidden = unicodedata.category(char) in ("Cc", "Cf", "Co", "Cs", "Zs", "Zl", "Zp")
        assert hidden == (char not in visible(f"a{char}")) or char in "\u034f\u115f\u1160\u2800\uffa0", hex(ord(char))


# ---------------------------------------------------------------------------------------------------------------------
# Colour


@pytest.mark.parametrize("sinks", [[], [50.0], [80.0, 20.0], [90.0, 80.0, 70.0]], ids=len)
def test_stronger_where_the_score_is_larger(sinks: list[float]) -> None:
    scores = [*sinks, *torch.rand(20, generator=torch.Generator().manual_seed(0)).tolist()]
    strengths = card.strengths(answer(["a"] * len(scores), scores))
    ordered = [strength for _, strength in sorted(zip(scores, strengths, strict=True))]
    assert all(a <= b for a, b in pairwise(ordered))
    assert len(set(ordered)) >= 20
    assert 0 <= ordered[0] < 0.3
    assert ordered[-1] == 1


@pytest.mark.parametrize("sinks", [1, 2, 3])
def test_a_sink_does_not_wash_out_the_rest(sinks: int) -> None:
    """Sinks hold 90%, the others differ by a factor of 10: their colours still tell them apart."""
    strengths = card.strengths(
        answer(["a"] * (sinks + 7), [0.9 / sinks] * sinks + torch.linspace(0.05, 0.005, 7).tolist())
    )
    assert strengths[:sinks] == [1.0] * sinks
    assert max(strengths[sinks:]) < 1
    assert max(strengths[sinks:]) - min(strengths[sinks:]) > 0.4


def test_square_root_where_no_token_is_a_sink() -> None:
    assert card.strengths(answer(["a", "b", "c"], [0.25, 1.0, 0.5])) == pytest.approx([0.5, 1.0, 0.5**0.5])
    assert card.strengths(answer(["a"], [0.3])) == [1.0]


def test_rounding_noise_stays_white() -> None:
    assert max(card.strengths(answer(["a"] * 5, [1.0, 1e-7, 2e-8, 1e-7, 0.0]))[1:]) < 0.001


def test_scores_below_zero_have_the_other_hue() -> None:
    strengths = card.strengths(answer(["a", "b"], [0.5, -1.0]))
    assert strengths == pytest.approx([0.5**0.5, -1.0])
    assert color(-1.0) == "#d55e00"
    assert "-1" in Reader(card.fragment(answer(["a", "b"], [0.5, -1.0]))).text


LONG = [0.9, *[0.011, 0.05, 0.005, 0.007, 0.01, 0.017] * 10]


def test_colors_that_let_few_tokens_stand_out() -> None:
    """By "linear" strengths are in proportion; by "even" all up to an even share are white."""
    one = answer(["a"] * 4, [0.4, -0.3, 0.2, 0.1])
    assert card.strengths(one, "linear") == pytest.approx([1.0, -0.75, 0.5, 0.25])
    assert card.strengths(one, "even") == pytest.approx([1.0, -1 / 3, 0.0, 0.0])
    long = answer(["a"] * len(LONG), LONG)
    for colors in ("root", "linear", "even"):
        assert card.strengths(long, colors)[0] == 1  # type: ignore[arg-type]
    assert sum(strength > 0.1 for strength in card.strengths(long)[1:]) == 60
    assert sum(strength > 0.1 for strength in card.strengths(long, "linear")[1:]) == 50
    assert sum(strength > 0.1 for strength in card.strengths(long, "even")[1:]) == 10
    assert card.strengths(answer(["a", "b"], [0.5, 0.5]), "even") == [0.0, 0.0]
    assert card.strengths(answer(["a", "b"], [0.0, 0.0]), "even") == [0.0, 0.0]


def test_a_scale_of_sinks_alone() -> None:
    """Where nothing else is above an even share, the scale ends with the largest and not below an even share."""
    sink = answer(["a"] * 8, [0.9, *[0.02] * 7])
    assert card.scale_of(sink, "even") == Scale(pytest.approx(0.9), 1.0, pytest.approx(1.04 / 8), 1.0)  # type: ignore[arg-type]
    assert card.strengths(sink, "even") == [1.0, *[0.0] * 7]


def test_hops_that_bring_nothing_are_one_row() -> None:
    """The trace of a long answer has a row for what comes after the last hop that a number shows."""
    hops = torch.zeros(40, 7)
    hops[:3, 0] = torch.tensor([0.5, 0.3, 0.1999])
    told = Reader(tls.Traced(hops, 0.0, SENTENCE).to_html()).text
    assert "320.0%4 to 400.0%" in told
    assert "33" not in told.partition("What arrives")[2]
    assert " to " not in Reader(tls.Traced(hops[:3], 0.0, SENTENCE).to_html()).text.partition("What arrives at the")[2]


def test_too_many_tokens_to_show() -> None:
    assert answer(["a"] * 4_000, [1.0] * 4_000).show()
    with pytest.raises(ValueError, match="4,001 tokens are too many for a browser.*or the static picture"):
        answer(["a"] * 4_001, [1.0] * 4_001).show()


@pytest.mark.parametrize("colors", ["root", "linear", "even"])
def test_scores_and_strengths_are_inverse(colors: Any) -> None:
    scores = torch.randn(30, generator=torch.Generator().manual_seed(0)).tolist()
    scale = Scale.of(scores, colors)
    for score in scores:
        if scale.strength(score) not in (0.0, 1.0, -1.0):
            assert scale.score(scale.strength(score)) == pytest.approx(score)


def test_the_legend_says_which_colors() -> None:
    html = {colors: Reader(SENTENCE.to_html(colors=colors)).text for colors in ("root", "linear", "even")}  # type: ignore[arg-type]
    assert "colour: square root of the score" in html["root"]
    assert "00.0250.05score" in html["linear"]
    assert "colour: in proportion to the score" in html["linear"]
    assert "colour: the score above an even one" in html["even"]
    signed = Reader(answer(["a"] * 4, [0.4, -0.3, 0.2, 0.1]).to_html(colors="even")).text
    assert "-0.4±0.250.4score" in signed


@pytest.mark.parametrize("draw", [SENTENCE.to_html, SENTENCE.plot, AttributionMap((SENTENCE,)).plot])
def test_colors_that_do_not_exist(draw: Any, no_type_checks: None) -> None:
    with pytest.raises(ValueError, match="colors is one of 'root', 'linear', 'even', got 'log'"):
        draw(colors="log")


def luminance(color: str) -> float:
    assert re.fullmatch("#[0-9a-f]{6}", color)
    channels = [byte / 255 for byte in bytes.fromhex(color[1:])]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("sign", [1, -1])
def test_colors_darken_and_stay_legible(sign: int) -> None:
    strengths = [sign * i / 200 for i in range(201)]
    lights = [luminance(color(strength)) for strength in strengths]
    assert lights[0] == pytest.approx(1)
    assert all(a > b for a, b in pairwise(lights))
    for strength, light in zip(strengths, lights, strict=True):
        text = luminance(text_color(strength))
        assert (max(text, light) + 0.05) / (min(text, light) + 0.05) >= 4.5, strength


# ---------------------------------------------------------------------------------------------------------------------
# The card


@pytest.mark.parametrize("draw", [card.page, card.fragment])
@pytest.mark.parametrize("tokens", [NASTY, list(SENTENCE.str_tokens), ["one"]], ids=["nasty", "sentence", "single"])
def test_every_token_is_there_in_order(draw: Any, tokens: list[str]) -> None:
    html = draw(answer(tokens, [1.0 / (i + 1) for i in range(len(tokens))]))
    assert [text for _, _, text in Reader(html).tokens] == [visible(text) for text in tokens]


@pytest.mark.parametrize("draw", [card.page, card.fragment])
def test_self_contained(draw: Any) -> None:
    """No script, no address: nothing to load. The one style sheet is about the classes of cards alone."""
    html = draw(answer(NASTY, [1.0] * len(NASTY), scope="Custom('<script>')", notes=("<script>x</script>",)))
    html.encode("utf-8")
    assert html.count(THEMES) == 1
    assert all(".tl-scopes" in rule for rule in re.findall(r"[^{};>]*\{", THEMES) if "@media" not in rule)
    html = html.replace(THEMES, "")
    for word in ("<script", "<style", "<link", "<img", "http", "href=", "@import", "url(", "<!--"):
        assert word not in html
    for _, attributes in Reader(html).elements:
        assert set(attributes) <= {"style", "class", "title", "lang", "charset", "name", "content"}


def test_page_is_a_document() -> None:
    html = card.page(SENTENCE)
    assert html.startswith("<!doctype html>")
    assert '<meta charset="utf-8">' in html
    assert "<title>SemanticScope(target=&#x27; are&#x27;)</title>" in html


def test_card_brings_its_own_colors() -> None:
    """So that it is legible in any notebook: those of a light ground for browsers that know no others, and both."""
    outermost = card.fragment(SENTENCE).split(">")[0]
    assert "background-color:#ffffff;background-color:light-dark(#ffffff,#1f1f1f)" in outermost
    assert ";color:#1f2328;color:light-dark(#1f2328,#ecf1f8)" in outermost
    assert "color-scheme:light dark" in outermost


@pytest.mark.parametrize("strength", [i / 50 for i in range(-50, 51)])
def test_every_token_is_legible_on_both_grounds(strength: float) -> None:
    """By WCAG's measure of contrast, 4.5; in the dark a stronger colour is a lighter one."""
    style = markup.chip("x", strength)
    hues = re.findall(r"light-dark\((#\w+),(#\w+)\)", style)
    for ground, text in zip(*hues, strict=True):
        a, b = luminance(ground), luminance(text)
        assert (max(a, b) + 0.05) / (min(a, b) + 0.05) >= 4.5
    assert hues[0] == (color(strength), dark(color(strength)))
    assert luminance(dark(color(strength))) >= luminance(dark(color(0.9 * strength))) - 1e-3  # of rounding


def test_texts_are_legible_in_the_dark() -> None:
    for hue in (markup.INK, markup.MUTED):
        assert (luminance(dark(hue)) + 0.05) / (luminance(dark("#ffffff")) + 0.05) >= 4.5


def test_hover() -> None:
    title, style, text = Reader(card.fragment(SENTENCE)).tokens[2]
    assert text == "·keys"
    assert title == ("position 2: ' keys', id 1002\nscore 0.05 logit per unit of embedding norm\nshare 5.0%")
    assert f"background-color:{color(card.strengths(SENTENCE)[2])};" in style


def test_lines_break_where_the_text_does() -> None:
    html = card.fragment(answer(["a", "\n", "b", "\n  ", "c"], [0.1] * 5))
    shown = re.sub("<[^>]*>", "", html.replace("<br>", "|"))
    assert "a↵|b↵|··c" in shown


def test_words_stay_whole() -> None:
    html = card.fragment(SENTENCE)
    shown = re.sub("<[^>]*>", "", html.replace("<wbr>", "|"))
    assert "|The|·keys|·near|·the|·cabinet|" in shown


def test_an_answer_of_many_words_breaks_between_them() -> None:
    said = Target((Token(1, " a long"), Token(2, " answer.\n\nAnd  more")))
    html = card.fragment(replace(SENTENCE, target=said))
    shown = re.sub("<[^>]*>", "", html.replace("<wbr>", "|"))
    assert shown.count("·a|·long|·answer.↵↵And|··more") == 2


def test_the_target_is_marked() -> None:
    marked = answer([" are", " they", " are"], [0.3, 0.2, 0.1], versus=IS)
    reader = Reader(card.fragment(replace(marked, tokens=torch.tensor([ARE.id, 5, ARE.id]))))
    assert ["outline" in style for _, style, _ in reader.tokens] == [True, False, True]
    assert "the token explained" in reader.tokens[0][0]
    assert reader.titled[-1][0] == "the token explained"
    assert "→ " in reader.text.replace("\u2002", " ")
    assert "explains ·are against ·is" in reader.text


def test_the_prediction_is_marked_where_there_is_no_target() -> None:
    reader = Reader(card.fragment(answer(["a"], [1.0], target=None)))
    assert [(title, text) for title, _, text in reader.titled][-1][0] == "the most likely next token"
    assert "explains" not in reader.text
    bare = Reader(card.fragment(answer(["a"], [1.0], target=None, predictions=())))
    assert len(bare.titled) == 1
    assert "next token" not in bare.text


def test_legend() -> None:
    """Unit, the true scores along the scale, and the true maximum."""
    text = Reader(card.fragment(SENTENCE)).text
    assert "score in logit per unit of embedding norm" in text
    assert "00.01250.05score" in text  # 0, a quarter in the middle of the square root, the end below the sink
    assert "up to 0.9" in text
    assert "<s>▲90.0%" in text
    assert text.count("▲") == 2

    text = Reader(card.fragment(SENTENCE.without([0]))).text
    assert "00.01250.05score" in text
    assert "▲" not in text


def test_tables() -> None:
    text = Reader(card.fragment(SENTENCE)).text
    assert "Most influential tokens, 5 of 7" in text
    assert "0<s>0.990.0%2·keys0.055.0%6inet0.0171.7%" in text
    assert "389·are62.0%374·is21.4%" in text


def test_cells_are_aligned_by_themselves() -> None:
    """Jupyter aligns those that are not to the right."""
    cells = [attributes["style"] or "" for name, attributes in Reader(card.fragment(SENTENCE)).elements if name == "td"]
    assert len(cells) > 30
    assert all("text-align:" in style for style in cells)


def test_model_and_notes_are_told() -> None:
    text = Reader(card.fragment(answer(["a"], [1.0], notes=("the weights were folded.", "second")))).text
    assert "some-model · float32 · hook_embed → ln_final · predicts after position 0" in text
    assert "Note: the weights were folded." in text
    assert "Note: second" in text


def test_all_scores_zero() -> None:
    html = card.fragment(answer(["a", "b"], [0.0, 0.0]))
    assert "every score is 0, in logit per unit of embedding norm" in html
    assert [style.split(";")[0] for _, style, _ in Reader(html).tokens] == ["background-color:#ffffff"] * 2


def test_a_long_prompt_stays_small() -> None:
    tokens = [str(i) if i % 2 else "," for i in range(300)]
    html = card.page(answer(tokens, [1.0 + i for i in range(300)]))
    assert len(Reader(html).tokens) == 300
    assert len(html) < 150_000
    assert html.count("<wbr>") > 140


def test_plot() -> None:
    """A bar for each token that counts, as high as its share and in the card's colours."""
    shown = answer([f" word{i}" for i in range(30)], [1.0 + i for i in range(30)], parts=("template", *["user"] * 29))
    axes = shown.plot().axes[0]
    assert [bar.get_height() for bar in axes.patches] == pytest.approx(shown.share.tolist())
    for bar, strength in zip(axes.patches, card.strengths(shown), strict=True):
        assert bar.get_facecolor()[:3] == pytest.approx([b / 255 for b in bytes.fromhex(color(strength)[1:])])
    assert [label.get_text() for label in axes.get_xticklabels()] == [f"·word{i}" for i in range(30)]
    assert axes.get_title(loc="left") == shown.scope
    linear = shown.plot("linear").axes[0].patches[15].get_facecolor()
    assert linear != axes.patches[15].get_facecolor()
    assert shown.plot()._repr_png_().startswith(b"\x89PNG")  # type: ignore[attr-defined]


@pytest.mark.parametrize("size", [1, 8, 55, 90, 500])
def test_labels_of_bars_do_not_overlap(size: int) -> None:
    figure = answer([f" word{i}" for i in range(size)], [1.0 + i for i in range(size)]).plot()
    assert figure.get_size_inches()[0] < 13.5
    boxes = [label.get_window_extent() for label in figure.axes[0].get_xticklabels()]
    assert all(a.x1 <= b.x0 + 0.5 for a, b in pairwise(boxes))
    assert len(boxes) == size if size <= 55 else len(boxes) >= 40  # every second one, and so on


def test_attribution_draws_itself(tmp_path: Path) -> None:
    assert SENTENCE.to_html(tmp_path / "answer.html") == card.page(SENTENCE)
    assert (tmp_path / "answer.html").read_text(encoding="utf-8") == card.page(SENTENCE)
    assert SENTENCE._repr_html_() == card.fragment(SENTENCE)
    assert isinstance(SENTENCE.show(), LiveView)
    assert repr(SENTENCE.show()) == f"LiveView(ColoredTokens: {SENTENCE!r})"


def test_import_loads_nothing_heavy() -> None:
    heavy = ("circuitsvis", "matplotlib", "pandas", "IPython", "transformer_lens")
    code = f"import sys, tl_scopes.views.attribution; print([name for name in {heavy} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


# ---------------------------------------------------------------------------------------------------------------------
# circuitsvis


def payload(html: str) -> str:
    found = re.search('const source = "([^"]*)"', html)
    assert found
    return found[1]


def test_show_reaches_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("reached for the network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    view = SENTENCE.show()
    for html in (view._repr_html_(), view._repr_mimebundle_()["text/html"]):
        assert "http" not in html.replace(payload(html), "")


def test_the_script_is_the_installed_one() -> None:
    script = gzip.decompress(b64decode(payload(SENTENCE.show()._repr_html_())))
    assert script == files("circuitsvis").joinpath("dist/cdn/iife.js").read_bytes()


def test_no_text_can_end_the_script() -> None:
    html = answer(NASTY, [1.0] * len(NASTY), unit="</script><!-- per unit").show()._repr_html_()
    script = html[html.index("<script>") + 8 :]
    assert html.count("<script") == 1
    assert script.index("</script>") == len(script) - len("</script>")
    assert "<!--" not in html


def test_the_script_travels_once_in_a_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each run of a notebook cell carries it once; a view that is asked for by itself always does."""
    shell = SimpleNamespace(get_parent=lambda: {"header": {"msg_id": "first run"}})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))

    def carries() -> bool:
        return payload(SENTENCE.show()._repr_mimebundle_()["text/html"]) != ""

    assert [carries(), carries(), carries()] == [True, False, False]
    assert payload(SENTENCE.show()._repr_html_()) != ""
    shell.get_parent = lambda: {"header": {"msg_id": "second run"}}
    assert [carries(), carries()] == [True, False]
    shell.get_parent = dict
    assert [carries(), carries()] == [True, True]


# ---------------------------------------------------------------------------------------------------------------------
# In a browser

COUNT = """<script>let count = 0, library;
Object.defineProperty(window, "CircuitsVis", {get: () => library, set(value) {
  library = value; document.documentElement.dataset.evaluated = ++count}})</script>"""

# As notebooks do: HTML put into the page, its scripts then made anew so that they run.
LATER = """<template id="later">%s</template><div id="cell"></div><script>setTimeout(() => {
  const cell = document.getElementById("cell");
  cell.innerHTML = document.getElementById("later").innerHTML;
  for (const old of cell.querySelectorAll("script")) {
    const script = document.createElement("script");
    script.textContent = old.textContent;
    old.replaceWith(script);
  }}, 1000)</script>"""

HOVER = """<script>setTimeout(() => document.querySelectorAll(".colored-tokens > span")[2].dispatchEvent(
  new MouseEvent("mouseenter", {clientX: 9, clientY: 9})), 2000)</script>"""


@needs_browser
def test_a_narrow_page_shows_whole_tokens_and_the_whole_picture(browser: Browser, tmp_path: Path) -> None:
    """Bars become short before a token of a table breaks within a word; a small map shrinks and is not cut off."""
    one = answer(["<|begin_of_text|>", " incomprehensibly", " a"], [1.0, 2.0, 3.0])
    cells = "[...document.querySelectorAll('td span')]"
    bars = "Math.max(...[...document.querySelectorAll('td div')].map(e => e.getBoundingClientRect().width))"
    broken = f"{cells}.filter(e => e.getClientRects().length > 1).map(e => e.textContent)"
    lengths = []
    for width in (1100, 320):
        (tmp_path / "page.html").write_text(one.to_html(), encoding="utf-8")
        browser.open(f"file://{tmp_path / 'page.html'}", width=width)
        assert browser.run(broken) == []
        lengths.append(browser.run(bars))
    assert lengths[0] == pytest.approx(72, abs=1)
    assert 5 < lengths[1] < 72
    rows = [answer(["<s>", " the", " old", " keys", " to", " the"][: n + 1], [1.0] * (n + 1)) for n in range(6)]
    (tmp_path / "map.html").write_text(tls.AttributionMap(tuple(rows)).to_html(), encoding="utf-8")
    shown = "(e => [e.width, e.parentElement.clientWidth, e.width / e.height])(document.images[0])"
    ratios = []
    for width in (1100, 400):
        browser.open(f"file://{tmp_path / 'map.html'}", width=width)
        drawn, room, ratio = browser.run(shown)
        assert drawn <= room
        ratios.append(ratio)
    assert ratios[0] == pytest.approx(ratios[1], rel=0.02)


@needs_browser
def test_page_in_a_browser(tmp_path: Path) -> None:
    dom = browse(card.page(answer(NASTY, [1.0] * len(NASTY))) + PROBE, tmp_path)
    assert 'data-requests="0"' in dom
    assert "data-hacked" not in dom
    assert "".join(visible(text) for text in NASTY) in Reader(dom).text
    assert 'data-requests="1"' in browse(
        '<img src="http://localhost:9/none.png">' + PROBE, tmp_path
    )  # the probe does count


@needs_browser
def test_two_views_load_the_script_once(tmp_path: Path) -> None:
    nasty = answer(NASTY, [1.0] * len(NASTY))
    first, second = SENTENCE.show()._repr_html_(), nasty.show()._repr_html_()
    dom = browse(f"<!doctype html>{COUNT}{first}{LATER % second}{HOVER}{PROBE}", tmp_path)
    assert 'data-evaluated="1"' in dom
    assert 'data-requests="0"' in dom
    assert "data-hacked" not in dom

    pattern = r"background-color: rgb\((\d+), (\d+), (\d+)\); color: \w+; line-height: 1em;[^>]*>(.*?)</span>"
    shown = re.findall(pattern, dom)
    texts = [unescape(text).replace("\u2060", "").replace("\xa0", "").replace("\u200b", "") for *_, text in shown]
    expected = [visible(text) for text in (*SENTENCE.str_tokens, *NASTY)]
    assert texts == ["<s>▲90.0%", *expected[1:]]
    strengths = card.strengths(SENTENCE) + card.strengths(nasty)
    for (*channels, _), strength in zip(shown, strengths, strict=True):
        static = bytes.fromhex(color(strength)[1:])
        assert max(abs(int(a) - b) for a, b in zip(channels, static, strict=True)) <= 4
    assert "<strong>·keys\u200b</strong><br>score 0.05 logit per unit of embedding norm, share 5.0%</div>" in dom


LOOKS = """[...document.querySelectorAll("%s")].filter(e => e.title.startsWith("pos") || e.closest(".colored-tokens"))
  .map(e => (s => ["backgroundColor", "color", "outline", "borderBottom", "padding", "margin", "borderRadius",
    "lineHeight", "fontSize", "display"].map(name => s[name]).join("|"))(getComputedStyle(e)))"""


@needs_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_live_tokens_look_as_the_static_ones_do(browser: Browser, tmp_path: Path, dark: bool) -> None:
    """Colours, frames and lines of each token, on both grounds; the token explained is marked, inside and behind."""
    one = answer(
        [*NASTY, " are", " are", "x"],
        [*map(float, range(len(NASTY))), -3.0, 9.0, 2.0],
        parts=("template", *["user"] * 18),
    )
    one = replace(one, tokens=torch.tensor([*one.tokens.tolist()[:-2], ARE.id, 5]))
    page = tmp_path / "page.html"
    shown = {}
    for kind, html in (("static", one._repr_html_()), ("live", one.show()._repr_html_())):
        page.write_text(f'<!doctype html><meta charset="utf-8">{html}', encoding="utf-8")
        browser.open(f"file://{page}", dark=dark)
        if kind == "live":
            browser.run(
                "new Promise(done => { const look = () => document.querySelector('.colored-tokens') ? done() "
                ": setTimeout(look, 20); look() })"
            )
        selector = ".colored-tokens > span > span" if kind == "live" else "span[title]"
        shown[kind] = browser.run(LOOKS % selector)
        height = browser.run("document.querySelector('.tl-scopes').offsetHeight")
        shown[f"{kind} height"] = height
        assert "→" in browser.run("document.querySelector('[style*=\"line-height:2\"]').innerText")
    assert len(shown["static"]) == 19
    assert shown["live"] == shown["static"]
    assert abs(shown["live height"] - shown["static height"]) <= 30  # no empty space


def test_a_text_of_many_tokens_breaks_between_words() -> None:
    tokens = SENTENCE.show().props["tokens"]
    assert [token.endswith("\u200b") for token in tokens] == [True, True, True, True, True, False, False]
