"""Maps of a whole prompt, as a person sees them: the figure, the card, and circuitsvis in a browser."""

import pickle
import re
import subprocess
import sys
import warnings
from base64 import b64decode
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib import style

import tl_scopes as tls
from tests.pictures import CANVAS, LINEARITY, NASTY, PROBE, Reader, answer, browse, canvas, needs_browser
from tl_scopes.views import attribution_map as map_views
from tl_scopes.views import figure as figure_parts
from tl_scopes.views.markup import THEMES, visible
from tl_scopes.views.palette import Scale, color

VOID = "#f3f5f7"


def prompt_map(tokens: list[str], scores: torch.Tensor, **changes: Any) -> tls.AttributionMap:
    """From a square of scores, of which the upper triangle is left out."""
    rows = [scores[i, : i + 1].tolist() for i in range(len(tokens))]
    return tls.AttributionMap(tuple(answer(tokens[: i + 1], row, **changes) for i, row in enumerate(rows)))


def random(size: int) -> torch.Tensor:
    return torch.rand(size, size, generator=torch.Generator().manual_seed(0)) ** 3 + 0.01


WORDS = ["<s>", "The", " keys", " near", " the", " cab", "inet", " of"]
WITH_SINK = random(8).index_fill(1, torch.tensor([0]), 20.0)
MAP = prompt_map(WORDS, WITH_SINK)
SIGNED = prompt_map(WORDS, torch.randn(8, 8, generator=torch.Generator().manual_seed(0)), unit="logit")


def drawn(figure: Any) -> list[list[str]]:
    """The colours of the cells, row by row."""
    image = figure.axes[0].images[0]
    return [["#" + bytes(cell[:3]).hex() for cell in row] for row in image.to_rgba(image.get_array(), bytes=True)]


def labels(axis: Any) -> dict[float, str]:
    return {
        float(place): text.get_text() for place, text in zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
    }


# ---------------------------------------------------------------------------------------------------------------------
# The figure


@pytest.mark.parametrize("shown", [MAP, SIGNED, MAP.without([0]), MAP.without([3])], ids=str)
def test_every_cell_has_the_colour_of_its_value(shown: tls.AttributionMap) -> None:
    scale = map_views._scale(map_views._values(shown))
    colors = drawn(shown.plot())
    assert len(colors) == len(shown)
    for line, row, one in zip(colors, shown.share.tolist(), shown, strict=True):
        inside = len(one.scores)
        assert line[inside:] == [VOID] * (len(row) - inside)
        for hue, value in zip(line[:inside], row, strict=False):
            wanted = bytes.fromhex(color(scale.strength(value))[1:])  # of 256 steps of colour
            assert max(abs(a - b) for a, b in zip(bytes.fromhex(hue[1:]), wanted, strict=True)) <= 2


def test_a_sink_does_not_wash_out_the_rest() -> None:
    """The first token holds about 90% of every prediction; the others still differ."""
    scale = map_views._scale(map_views._values(MAP))
    strengths = [scale.strength(share) for share in MAP.share[-1].tolist()]
    assert strengths[0] == 1
    assert max(strengths[1:]) <= 0.8
    assert max(strengths[1:]) - min(strengths[1:]) > 0.4


def test_one_scale_up_to_the_largest_where_nothing_stands_apart() -> None:
    even = prompt_map(WORDS, torch.ones(8, 8))
    assert map_views._scale(map_views._values(even)) == Scale(pytest.approx(0.2), 0.8)  # type: ignore[arg-type]
    assert map_views._scale(map_views._values(prompt_map(WORDS[:2], torch.ones(2, 2)))) == Scale(1.0, 1.0)


def test_labels() -> None:
    axes = MAP.plot().axes[0]
    assert labels(axes.xaxis) == dict(enumerate(map(visible, WORDS)))
    assert labels(axes.yaxis) == {i: f"{visible(text)} → ·are" for i, text in enumerate(WORDS)}
    free = prompt_map(WORDS[:2], random(2), target=None)
    assert labels(free.plot().axes[0].yaxis) == {0: "<s> → ·are", 1: "The → ·are"}
    bare = prompt_map(WORDS[:2], random(2), target=None, predictions=())
    assert labels(bare.plot().axes[0].yaxis) == {0: "<s>", 1: "The"}
    assert labels(MAP.without([3]).plot().axes[0].yaxis)[3] == "(3) → ·are"


@pytest.mark.parametrize("size", [60, 61, 150])
def test_labels_are_thinned(size: int) -> None:
    tokens = [f"t{i}" for i in range(size)]
    axes = prompt_map(tokens, random(size)).plot().axes[0]
    for axis in (axes.xaxis, axes.yaxis):
        assert 30 <= len(labels(axis)) <= 60
        assert all(text.split(" → ")[0] == f"t{place:.0f}" for place, text in labels(axis).items())


def test_labels_do_not_overlap() -> None:
    figure = prompt_map([f" token{i}" for i in range(60)], random(60)).plot()
    for axis, side in ((figure.axes[0].xaxis, "x"), (figure.axes[0].yaxis, "y")):
        boxes = [label.get_window_extent() for label in axis.get_ticklabels()]
        spans = sorted((getattr(box, f"{side}0"), getattr(box, f"{side}1")) for box in boxes)
        assert all(end <= start + 0.5 for (_, end), (start, _) in pairwise(spans))


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 20), (3, 300), (40, 300), (200, 200), (17, 17)])
def test_a_slice_draws_what_it_holds(rows: int, columns: int) -> None:
    """Its few predictions are as high as ever, each with its label, and no label touches another."""
    shown = prompt_map([f" token{i}" for i in range(columns)], random(columns))[-rows:]
    figure = shown.plot()
    grid = drawn(figure)
    assert (len(grid), len(grid[0])) == (rows, columns)
    axes = figure.axes[0]
    assert len(labels(axes.yaxis)) == (rows if rows <= 60 else pytest.approx(50, abs=11))
    for axis, side in ((axes.xaxis, "x"), (axes.yaxis, "y")):
        boxes = [label.get_window_extent() for label in axis.get_ticklabels()]
        spans = sorted((getattr(box, f"{side}0"), getattr(box, f"{side}1")) for box in boxes)
        assert (side == "x" and columns <= 16) or all(end <= start + 0.5 for (_, end), (start, _) in pairwise(spans))


@pytest.mark.parametrize("size", [60, 120])
def test_a_large_map_fits_a_page(size: int) -> None:
    """Its bar of colours is in sight, on a page of 1,100 pixels: what is cut off at the right nobody misses."""
    figure = prompt_map([" word"] * size, random(size)).plot()
    assert 96 * figure.get_size_inches()[0] <= 1050


def test_nothing_but_a_sink_above_an_even_share() -> None:
    scores = torch.full((8, 8), 0.01).index_fill(1, torch.tensor([0]), 1.0)
    values = map_views._values(prompt_map(WORDS, scores), "even")
    scale = map_views._scale(values, "even")
    assert scale.end > 1
    assert scale.strength(values[-1, 0].item()) > 0.9
    assert scale.strength(values[-1, 1].item()) == 0


@pytest.mark.parametrize("shown", [MAP, SIGNED], ids=["shares", "signed"])
@pytest.mark.parametrize("colors", ["linear", "even"])
def test_colors_of_a_map(shown: tls.AttributionMap, colors: Any) -> None:
    """By "even" a cell is how many times an even share it is; up to one it is white, and a number is at its colour."""
    figure = shown.plot(colors)
    values = map_views._values(shown, colors)
    scale = map_views._scale(values, colors)
    for line, row, one in zip(drawn(figure), values.tolist(), shown, strict=True):
        for hue, value, share in zip(line, row[: len(one.scores)], one.share.tolist(), strict=False):
            assert value == pytest.approx(share * (len(one.scores) if colors == "even" else 1), rel=1e-5)
            wanted = bytes.fromhex(color(scale.strength(value))[1:])
            assert max(abs(a - b) for a, b in zip(bytes.fromhex(hue[1:]), wanted, strict=True)) <= 2
            assert colors != "even" or abs(value) > 1.02 or min(bytes.fromhex(hue[1:])) > 252
    bar = labels(figure.axes[1].yaxis)
    assert figure.axes[1].get_ylabel() == ("times an even share" if colors == "even" else "share of the scores")
    for place, text in bar.items():
        value = float(text.lstrip("±").removesuffix("%")) / (100 if text.endswith("%") else 1)
        assert scale.strength(value) == pytest.approx(place, abs=1e-6)
    told = {"linear": "colour: in proportion to the share", "even": "colour: the share above an even one"}[colors]
    assert told in Reader(shown.to_html(colors=colors)).text


def test_colors_and_texts_of_an_answer(tiny: Any) -> None:
    """An answer map takes colours as other maps do, and is alive as one text for each token of the answer."""
    rows = tls.answer_map(tiny, "The keys to the old cabinet", " are old", tls.SemanticScope())
    for colors, told in (("linear", "in proportion to the share"), ("even", "the share above an even one")):
        assert f"colour: {told}" in Reader(rows.to_html(colors=colors)).text  # type: ignore[arg-type]
        assert drawn(rows.plot(colors)) == drawn(rows.map.plot(colors))  # type: ignore[arg-type]
        assert drawn(rows.plot(colors)) != drawn(rows.plot())  # type: ignore[arg-type]
    assert [len(view.props["tokens"]) for view in rows.show().views] == [len(one.scores) for one in rows]


def test_everything_is_in_the_figure() -> None:
    """Long tokens, a long title: the figure is as large as they need."""
    figure = prompt_map(["a" * 40, " b" * 30], random(2), scope="CustomScope(" + "x" * 60 + ")").plot()
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert box.x0 > 0
    assert box.y0 > 0
    assert box.x1 < width
    assert box.y1 < height
    assert labels(figure.axes[0].xaxis)[0] == "a" * 15 + "…"


@pytest.mark.parametrize("shown", [MAP, SIGNED], ids=["shares", "signed"])
def test_color_bar(shown: tls.AttributionMap) -> None:
    """Its numbers stand at their colours, and its label says what they are."""
    figure, scale = shown.plot(), map_views._scale(map_views._values(shown))
    bar = labels(figure.axes[1].yaxis)
    assert len(bar) >= 4
    for place, text in bar.items():
        assert scale.strength(float(text.removesuffix("%")) / 100) == pytest.approx(place, abs=1e-6)
    assert min(bar) == (0 if shown is MAP else pytest.approx(-max(bar)))
    assert figure.axes[1].get_ylabel() == "share of the scores"


def test_the_color_bar_of_even_shares() -> None:
    """In the middle of a scale with two sides are all up to an even share; every side has a number."""
    for shown, low in ((MAP, "1"), (SIGNED, "±1")):
        bar = labels(shown.plot(colors="even").axes[1].yaxis)
        assert bar[0.0] == low
        assert len(bar) >= (2 if shown is MAP else 3)
        sizes = [float(text.lstrip("±-")) for text in bar.values()]
        assert min(sizes) == 1 < max(sizes)


@pytest.mark.parametrize("tokens", [["$x$", "$\\frac{$"], ["日本", "𐎠"], NASTY[:2], ["one"]], ids=repr)
def test_any_token_can_be_drawn(tokens: list[str]) -> None:
    """No formulas, and no character that no font here has."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = prompt_map(tokens, random(len(tokens)), scope="Custom('$x$ $\\frac{$')").plot()
        assert figure._repr_png_().startswith(b"\x89PNG")  # type: ignore[attr-defined]


def test_a_character_that_no_font_has(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"DejaVu Sans": frozenset("tokens ab→·are")}
    monkeypatch.setattr(figure_parts, "_fonts", lambda characters: known)
    assert labels(prompt_map(["a", "b日"], random(2)).plot().axes[0].xaxis) == {0: "a", 1: "bU+65E5"}


def test_values_are_written_into_few_large_cells() -> None:
    def written(shown: tls.AttributionMap) -> list[str]:
        return [text.get_text() for text in shown.plot().axes[0].texts]

    two = torch.tensor([[1.0, 0.0], [1.0, 3.0]])
    assert written(prompt_map(["a", "b"], two)) == ["100", "25", "75"]
    assert written(prompt_map(["a", "b"], torch.tensor([[1.0, 0.0], [1.0, -3.0]]))) == ["100", "25", "-75"]
    assert written(prompt_map(["a"] * 17, random(17))) == []


def test_all_scores_zero() -> None:
    figure = prompt_map(WORDS, torch.zeros(8, 8)).plot()
    assert {hue for row in drawn(figure) for hue in row} == {"#ffffff", VOID}
    assert labels(figure.axes[1].yaxis) == {0: "0%"}


def test_the_style_in_force_does_not_matter() -> None:
    plain = MAP.plot()._repr_png_()  # type: ignore[attr-defined]
    with style.context(["dark_background", {"font.size": 30, "axes.grid": True}]):
        assert MAP.plot()._repr_png_() == plain  # type: ignore[attr-defined]


def test_linearity_has_a_style_of_its_own() -> None:
    plain = LINEARITY.plot()._repr_png_()  # type: ignore[attr-defined]
    with style.context("dark_background"):
        assert LINEARITY.plot()._repr_png_() == plain  # type: ignore[attr-defined]


def test_pyplot_stays_out() -> None:
    """Nor does a setting of matplotlib change."""
    code = (
        "import sys\nfrom matplotlib import rcParams\n"
        "def state(): return {name: rcParams[name] for name in rcParams if name != 'backend'}\n"  # which imports pyplot
        "from tests.test_map_views import MAP\n"
        "from tests.pictures import LINEARITY\n"
        "before = state(); MAP.to_html(); MAP.show()._repr_html_(); LINEARITY._repr_html_()\n"
        "print('matplotlib.pyplot' in sys.modules, before == state())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False True"


def test_a_figure_is_the_users() -> None:
    """It can be saved elsewhere, and sent to another process."""
    assert pickle.loads(pickle.dumps(MAP.plot()))._repr_png_() == MAP.plot()._repr_png_()  # type: ignore[attr-defined]


# ---------------------------------------------------------------------------------------------------------------------
# The card


def test_card() -> None:
    shown = prompt_map(["<b>", "&"], torch.tensor([[1.0, 0.0], [0.25, 0.75]]), notes=("first", "<script>"))
    for html in (shown._repr_html_(), shown.to_html()):
        reader = Reader(html)
        assert "SemanticScope(target=' are')" in reader.text
        assert "score in logit per unit of embedding norm; colour: square root of the share" in reader.text
        assert "some-model · float32 · hook_embed → ln_final · 2 predictions" in reader.text
        assert reader.text.count("Note: first") == 1
        assert "Note: <script>" in reader.text
        (image,) = (attributes for name, attributes in reader.elements if name == "img")
        assert image["alt"] == (
            "Heat map of 2 predictions by 2 tokens. The largest share, 75%, is that of '&' at position 1 in the "
            "prediction after position 1."
        )
        source = image["src"] or ""
        assert source.startswith("data:image/png;base64,")
        png = b64decode(source.removeprefix("data:image/png;base64,"))
        size = [int.from_bytes(png[i : i + 4], "big") / 2 for i in (16, 20)]  # two pixels for each of the screen's
        assert [float(image["width"] or 0), float(image["height"] or 0)] == pytest.approx(size, abs=1)
        html = html.replace(THEMES, "")
        for word in ("<script", "<style", "<link", "http", "href=", "@import", "url("):
            assert word not in html


def test_scores_below_zero() -> None:
    """A share of what cancels is no larger than the whole, and the largest is so by its size."""
    html = prompt_map(["a", "b"], torch.tensor([[1.0, 0.0], [1.0, -3.0]]))._repr_html_()
    assert "The largest share, -75%, is that of &#x27;b&#x27; at position 1" in html
    assert "colour: square root of the share" in html


def test_map_draws_itself(tmp_path: Path) -> None:
    assert MAP.to_html(tmp_path / "map.html") == map_views.page(MAP)
    assert (tmp_path / "map.html").read_text(encoding="utf-8") == map_views.page(MAP)
    assert MAP.to_html().startswith("<!doctype html>")
    assert MAP._repr_html_() in MAP.to_html()
    assert repr(MAP.show()) == f"LiveView(AttentionPattern: {MAP!r})"


def test_import_loads_no_matplotlib() -> None:
    code = "import sys, tl_scopes.views.attribution_map, tl_scopes.views.attention; print('matplotlib' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


# ---------------------------------------------------------------------------------------------------------------------
# circuitsvis


def test_the_figure_stays_where_no_script_runs() -> None:
    html = MAP.show()._repr_html_()
    before_scripts = html[: html.index("<script>")]
    assert re.search('<div [^>]*id="tl-scopes-[^"]*"><div [^>]*><img [^>]*alt="Heat map of 8', before_scripts)


def test_a_square_without_bos_has_no_empty_rows() -> None:
    props = MAP.without([0]).show().props
    assert props["tokens"] == [visible(text) for text in WORDS[1:]]
    assert [len(line) for line in props["attention"]] == [7] * 7
    told = [[cell.fields["written"] for cell in line[: i + 1]] for i, line in enumerate(props["attention"])]
    assert all("logit per unit" in text for line in told for text in line)


def test_tokens_that_do_not_count_say_so() -> None:
    chat = tls.AttributionMap(tuple(replace(one, parts=("template",) + ("user",) * one.position) for one in MAP))
    for line in chat.show().props["attention"][1:]:
        assert line[0].fields == {"number": 0.0, "written": "not counted in shares"}


@pytest.mark.parametrize("shown", [MAP[-3:], MAP[2:3], MAP.without([3])], ids=str)
def test_what_is_no_square_is_drawn_as_texts(shown: tls.AttributionMap) -> None:
    """One for each prediction that the map holds, and nothing for the others."""
    view = shown.show()
    assert repr(view) == f"LiveView(ColoredTokens: {shown!r})"
    for part, one in zip(view.views, shown, strict=True):
        texts = [text.replace("\u200b", "").replace("\u2060", "") for text in part.props["tokens"]]
        assert texts == [visible(text) for text in one.str_tokens]
    html = view._repr_html_()
    static = Reader(html[: html.index("<script>")])
    assert len(static.tokens) == sum(len(one.scores) for one in shown)
    assert static.text.count("→\u2002·are") == len(shown)
    assert "each prediction on its own scale" in static.text


def test_too_many_for_a_browser() -> None:
    rows = tuple(answer(["a"] * i, [1.0] * i) for i in range(1, 402))
    with pytest.raises(ValueError, match="160,801 cells are too many for a browser.*: take fewer tokens, predictions"):
        tls.AttributionMap(rows).show()
    with pytest.raises(ValueError, match="4,356 tokens are too many for a browser"):
        tls.AttributionMap(rows[-11:]).show()


@needs_browser
def test_attention_pattern_in_a_browser(tmp_path: Path) -> None:
    """The same colours as in the figure; hovering tells the score; no token is taken for anything but text."""
    shown = prompt_map(NASTY, random(len(NASTY))).without([0])
    dom = browse(f"<!doctype html>{CANVAS}{shown.show()._repr_html_()}{PROBE}", tmp_path)
    assert 'data-requests="0"' in dom
    assert "data-hacked" not in dom
    assert "<img" not in dom[dom.index("<canvas") : dom.index("</canvas>")]

    size, scale = len(NASTY) - 1, map_views._scale(map_views._values(shown))
    fills = canvas(dom, "fills")[-(size**2) :]
    for row in range(size):
        shares = dict(enumerate(shown.answers[row].share.tolist()))
        for column in range(size):
            wanted = VOID if column > row else color(scale.strength(shares.get(column, 0.0)))
            hue = fills[row * size + column]
            assert max(abs(a - b) for a, b in zip(*(bytes.fromhex(h[1:]) for h in (hue, wanted)), strict=True)) <= 4

    texts = canvas(dom, "texts")
    for i, token in enumerate(NASTY[1:]):
        assert f"{figure_parts.shortened(token)} ({i})" in texts
    values = [text for text in texts if text.startswith("Val: ")]
    told = {
        f"Val: {score:.3g} {one.unit}, {share:.1%} → ·are"
        for one in shown
        for score, share in zip(one.scores.tolist(), one.share.tolist(), strict=True)
    }
    assert values
    assert set(values) <= told
