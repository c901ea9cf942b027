"""What the cards look like in narrow pages, in dark notebooks, and with text that runs from right to left."""

import json
import re
from html import unescape
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import tl_scopes as tls
from tests.browser import Browser
from tests.pictures import CHECKS, LINEARITY, PROBE, SENTENCE, SINKS, Reader, answer, browse, needs_browser
from tl_scopes.views import linearity as linearity_views
from tl_scopes.views.figure import arrowed, drawable, new_figure
from tl_scopes.views.markup import isolated

MEASURE = """<script>setTimeout(() => document.documentElement.dataset.measured = JSON.stringify(
  [...document.querySelectorAll('%s')].map(element => {
    const box = element.getBoundingClientRect();
    return {text: element.textContent, pieces: element.getClientRects().length, left: box.left, right: box.right,
      width: box.width, height: box.height, overflow: element.scrollWidth - element.clientWidth};
  })), 2500)</script>"""


def measure(html: str, selector: str, folder: Path, width: int | None = None) -> list[dict[str, Any]]:
    """Where a browser puts the elements."""
    style = "" if width is None else f' style="width:{width}px"'
    body = f"<div{style}>{html}</div>"
    dom = browse(f'<!doctype html><meta charset="utf-8">{body}{MEASURE % selector}{PROBE}', folder)
    found = re.search('data-measured="([^"]*)"', dom)
    assert found
    return json.loads(unescape(found[1]))


# -- narrow and dark --------------------------------------------------------------------------------------------------


@needs_browser
@pytest.mark.parametrize("width", [420, 1200])
def test_findings_of_checks_can_be_read(tmp_path: Path, width: int) -> None:
    """In a narrow card they stand below the verdicts, as wide as the card."""
    html = CHECKS._repr_html_()
    lines = measure(html, "div > div > div > div:last-child", tmp_path, width)
    findings = [line for line in lines if any(line["text"].startswith(check.finding) for check in CHECKS)]
    assert len(findings) == len(CHECKS)
    for finding in findings:
        assert finding["width"] > 300
        assert finding["height"] < 60  # three lines
    left = {round(finding["left"]) for finding in findings}
    assert len(left) == 1
    assert (left.pop() > 200) == (width == 1200)


def test_card_of_checks() -> None:
    """Every name, verdict and finding, and the cost where there was any."""
    reader = Reader(CHECKS._repr_html_())
    assert "Checks of SemanticScope(target=' are')" in reader.text
    assert "some-model · predicts after position 6" in reader.text
    for check in CHECKS:
        assert f"{check.name}{check.verdict}{check.in_full}" in reader.text
    assert "none" not in reader.text


@needs_browser
@pytest.mark.parametrize("shown", [SENTENCE, SINKS], ids=["Attribution", "SinkReport"])
def test_numbers_and_headings_stay_on_one_line(shown: Any, tmp_path: Path) -> None:
    cells = measure(shown._repr_html_(), "td", tmp_path, 372)  # 420 less the margins of a page
    assert len(cells) > 30
    assert all(cell["height"] < 30 for cell in cells)


@needs_browser
@pytest.mark.parametrize(
    "shown", [SENTENCE, tls.compare([SENTENCE]), CHECKS, LINEARITY, SINKS], ids=lambda shown: type(shown).__name__
)
def test_nothing_leaves_a_narrow_card(shown: Any, tmp_path: Path) -> None:
    cards = measure(shown._repr_html_(), "body > div > div", tmp_path, 420)
    assert [card["overflow"] for card in cards] == [0]


@pytest.mark.parametrize("shown", [SENTENCE, SINKS], ids=["Attribution", "SinkReport"])
def test_every_row_has_its_own_ground(shown: Any) -> None:
    """Notebooks give one to rows: that of a dark notebook would be black, under dark text."""
    rows = [given["style"] or "" for name, given in Reader(shown._repr_html_()).elements if name in ("table", "tr")]
    assert len(rows) >= 8
    ground = "background-color:#ffffff;background-color:light-dark(#ffffff,#1f1f1f);color:#1f2328;"
    assert all(ground in style for style in rows)


# -- 420 pixels, and the dark ------------------------------------------------------------------------------------------

CARDS = [SENTENCE, tls.AttributionMap((SENTENCE,)), tls.compare([SENTENCE]), CHECKS, LINEARITY, SINKS]

# Words of cards that stand on more than one line, although they would fit on one.
BROKEN = """(() => {
  const found = [], texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), range = new Range();
  while (texts.nextNode()) {
    const node = texts.currentNode;
    if (node.parentNode.closest("style, script")) continue;
    for (const word of node.data.matchAll(/\\S+/g)) {
      range.setStart(node, word.index);
      range.setEnd(node, word.index + word[0].length);
      const lines = new Set([...range.getClientRects()].map(box => Math.round(box.top)));
      if (lines.size > 1 && range.getBoundingClientRect().width < 370 && word[0].length < 40) found.push(word[0]);
    }
  }
  return found;
})()"""


@needs_browser
@pytest.mark.parametrize("shown", CARDS, ids=lambda shown: type(shown).__name__)
def test_no_word_of_a_narrow_card_is_broken(shown: Any, browser: Browser, tmp_path: Path) -> None:
    browser.open(saved(shown, tmp_path), width=420)
    assert browser.run(BROKEN) == []
    assert browser.run("document.documentElement.scrollWidth") <= 420


def saved(shown: Any, folder: Path, body: str = "<body>") -> str:
    (folder / "page.html").write_text(f'<!doctype html><meta charset="utf-8">{body}{shown._repr_html_()}', "utf-8")
    return f"file://{folder / 'page.html'}"


THEMES = {
    '<body data-jp-theme-light="X">': {"false": "dark", "true": "light"},
    '<html theme="X"><body>': {"dark": "dark", "light": "light"},
    '<html data-theme="X"><body>': {"dark": "dark", "light": "light"},
    '<body class="X">': {"vscode-dark": "dark", "vscode-light": "light", "dark": "dark", "other": "computer"},
}


@needs_browser
@pytest.mark.parametrize("shown", CARDS, ids=lambda shown: type(shown).__name__)
@pytest.mark.parametrize("is_dark", [False, True], ids=["light computer", "dark computer"])
def test_cards_follow_the_theme(shown: Any, is_dark: bool, browser: Browser, tmp_path: Path) -> None:
    """Of the notebook, or where it has none of the computer: ground, letters, and pictures, which are turned around."""
    for body, themes in THEMES.items():
        for name, theme in themes.items():
            browser.open(saved(shown, tmp_path, body.replace("X", name)), dark=is_dark)
            style = "getComputedStyle(document.querySelector('.tl-scopes'))"
            ground, ink = browser.run(f"[{style}.backgroundColor, {style}.color]")
            wanted = is_dark if theme == "computer" else theme == "dark"
            assert ground == ("rgb(31, 31, 31)" if wanted else "rgb(255, 255, 255)"), (body, name)
            assert ink == ("rgb(236, 241, 248)" if wanted else "rgb(31, 35, 40)")
            filters = browser.run("[...document.querySelectorAll('img')].map(e => getComputedStyle(e).filter)")
            assert set(filters) <= {"invert(0.88) hue-rotate(180deg)" if wanted else "none"}


@needs_browser
def test_a_canvas_is_turned_around_in_a_dark_card(browser: Browser, tmp_path: Path) -> None:
    """It has colours for a light ground alone; tokens have those of the card."""
    square = tls.AttributionMap((answer(["a"], [1.0]), answer(["a", "b"], [1.0, 2.0])))
    shown = "(e => getComputedStyle(document.querySelector(e)).%s)"
    for theme, filtered in (("dark", "invert(0.88) hue-rotate(180deg)"), ("light", "none")):
        page = f'<!doctype html><meta charset="utf-8"><body class="{theme}">{square.show()._repr_html_()}'
        (tmp_path / "page.html").write_text(page, "utf-8")
        browser.open(f"file://{tmp_path / 'page.html'}", dark=theme == "light")
        assert browser.run(f"{shown % 'backgroundColor'}('.tl-light')") == "rgb(255, 255, 255)"
        assert browser.run(f"{shown % 'filter'}('.tl-light')") == filtered
    assert 'class="tl-light"' not in SENTENCE.show()._repr_html_()


# -- right to left ----------------------------------------------------------------------------------------------------

HEBREW = ["<s>", "של", "ום", " ", "<0xD7>", "<0xA2>", "ולם", " abc", " مرحبا", "<0xD7>", "12", "!"]
CARD = answer(HEBREW, [0.1 * (1 + i % 5) for i in range(len(HEBREW))], predictions=())


@needs_browser
@pytest.mark.parametrize("way", ["ltr", "rtl"])
def test_tokens_stay_whole_and_in_order(tmp_path: Path, way: str) -> None:
    """One piece each, from left to right, whatever their letters, in a notebook of any direction."""
    html = f'<div dir="{way}">{CARD._repr_html_()}</div>'
    tokens = measure(html, 'span[title^="position"]', tmp_path)
    assert len(tokens) == len(HEBREW)
    assert all(token["pieces"] == 1 for token in tokens)
    assert all(a["right"] <= b["left"] + 0.5 for a, b in pairwise(tokens))


@needs_browser
def test_live_tokens_stay_whole_and_in_order(tmp_path: Path) -> None:
    tokens = measure(CARD.show()._repr_html_(), ".colored-tokens > span", tmp_path)
    assert len(tokens) == len(HEBREW)
    assert all(a["right"] <= b["left"] + 0.5 for a, b in pairwise(tokens))


def test_labels_of_a_figure_run_from_left_to_right() -> None:
    """An unseen mark says so where letters run the other way."""
    texts, _ = drawable([arrowed("של", "ום"), arrowed("a", "ום"), arrowed("של", ""), arrowed("a", "b")])
    assert texts == ["\u200eשל\u200e → ום", "\u200ea → ום", "\u200eשל", "a → b"]


def test_labels_on_a_canvas_do_not_reorder_their_numbers() -> None:
    rows = (answer(HEBREW[: i + 1], [1.0] * (i + 1)) for i in range(len(HEBREW)))
    shown = tls.AttributionMap(tuple(rows)).show()
    assert shown.props["tokens"][:5] == ["<s>", "\u2068של\u2069", "\u2068ום\u2069", "·", "<0xD7>"]


@pytest.mark.parametrize(
    ("text", "kept"), [("·abc", "·abc"), ("<0xD7>", "<0xD7>"), ("של", "\u2068של\u2069"), ("·م!", "\u2068·م!\u2069")]
)
def test_isolated(text: str, kept: str) -> None:
    assert isolated(text) == kept


# -- the axes of linearity --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high"), [(0.3, 0.7), (0.012, 0.085), (0.01, 1.0), (0.0014, 0.9), (2e-7, 30.0), (1e-30, 1e9)]
)
def test_labels_of_a_logarithmic_axis(low: float, high: float) -> None:
    """Few round numbers that do not overlap, and at least one where the range has one."""
    figure = new_figure(figsize=(5.5, 4))
    axes = figure.subplots()
    axes.set(xscale="log", xlim=(low, high))
    linearity_views._label_scale(axes.xaxis)
    figure.draw_without_rendering()
    labels = [label for label in axes.get_xticklabels(which="both") if label.get_text()]
    inside = [label for label in labels if low <= float(label.get_text()) <= high]
    assert 1 <= len(inside) <= 12
    boxes = sorted((label.get_window_extent() for label in inside), key=lambda box: box.x0)
    assert all(a.x1 < b.x0 for a, b in pairwise(boxes))
    assert all(float(f"{float(label.get_text()):.1e}") == float(label.get_text()) for label in labels)


def test_labels_of_two_positions_do_not_overlap() -> None:
    """As in `linearity(positions=[2, 9])`, whose radii lie within less than two powers of ten."""
    figure = LINEARITY.plot()
    figure.draw_without_rendering()
    for axes in figure.axes:
        boxes = [label.get_window_extent() for label in axes.get_xticklabels(which="both") if label.get_text()]
        assert all(a.x1 < b.x0 for a, b in pairwise(sorted(boxes, key=lambda box: box.x0)))
