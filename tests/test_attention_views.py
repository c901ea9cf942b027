"""Attention heads, as a person sees them: small heat maps, and circuitsvis' attention heads in a browser."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.pictures import CANVAS, NASTY, PROBE, Reader, browse, canvas, needs_browser
from tl_scopes.views import attention as attention_views
from tl_scopes.views import figure as figure_parts
from tl_scopes.views.palette import color

TOKENS = ["<s>", "The", " keys", " near"]
NAMES = ["L0H0", "L0H1", "L1H0"]


def attention(heads: int, tokens: int) -> torch.Tensor:
    scores = torch.randn(heads, tokens, tokens, generator=torch.Generator().manual_seed(0))
    return scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -torch.inf).softmax(-1)


ATTENTION = attention(3, 4)


def wanted(pattern: torch.Tensor) -> list[list[str]]:
    """The colours: white at 0, full at 1, by the square root."""
    return [
        [color(part**0.5) if key <= query else "" for key, part in enumerate(line)]
        for query, line in enumerate(pattern.tolist())
    ]


def is_near(hue: str, wanted: str, distance: int) -> bool:
    channels = zip(bytes.fromhex(hue[1:]), bytes.fromhex(wanted[1:]), strict=True)
    return max(abs(a - b) for a, b in channels) <= distance


def test_every_cell_has_the_colour_of_its_attention() -> None:
    *panels, bar = attention_views.plot(ATTENTION, TOKENS, NAMES).axes
    assert [axes.get_title() for axes in panels] == NAMES
    for axes, pattern in zip(panels, ATTENTION, strict=True):
        image = axes.images[0]
        cells = image.to_rgba(image.get_array(), bytes=True)
        for row, line in zip(cells, wanted(pattern), strict=True):
            for cell, hue in zip(row, line, strict=True):
                assert is_near("#" + bytes(cell[:3]).hex(), hue or "#f3f5f7", 2)
    assert [text.get_text() for text in bar.get_yticklabels()][-1] == "1"


@pytest.mark.parametrize("heads", [1, 3, 24])
def test_tokens_are_at_the_left_and_below(heads: int) -> None:
    """Of every row of panels, and of every column, the last row being shorter."""
    *panels, _ = attention_views.plot(attention(heads, 4), TOKENS, [str(i) for i in range(heads)]).axes
    lefts = {axes.get_position().x0 for axes in panels}
    for axes in panels:
        is_left = axes.get_position().x0 == min(lefts)
        below = [other for other in panels if other.get_position().x0 == axes.get_position().x0]
        is_lowest = bool(axes.get_position().y0 == min(other.get_position().y0 for other in below))
        assert bool(axes.get_yticklabels()) == is_left
        assert [text.get_text() for text in axes.get_xticklabels()] == ["<s>", "The", "·keys", "·near"] * is_lowest


def test_card() -> None:
    html = attention_views.fragment(ATTENTION, TOKENS, NAMES, title="Heads & <b>")
    reader = Reader(html)
    assert "Heads & <b>" in reader.text
    assert "rows attend to columns" in reader.text
    (alt,) = (attributes["alt"] for name, attributes in reader.elements if name == "img")
    first = ATTENTION[:, :, 0].mean(1)
    assert alt == (
        "Attention of 3 heads between 4 tokens. The head that attends most to the first token is "
        f"{NAMES[int(first.argmax())]}, with {first.max():.0%} on average."
    )
    assert "<script" not in html


@pytest.mark.parametrize("draw", [attention_views.plot, attention_views.attention_heads_view])
@pytest.mark.parametrize(
    ("pattern", "tokens", "names", "message"),
    [
        (
            ATTENTION,
            TOKENS[:3],
            NAMES,
            r"\[3, 3, 3\], after 3 names and 3 tokens, at least one of each, got \[3, 4, 4\]",
        ),
        (
            ATTENTION,
            TOKENS,
            NAMES[:1],
            r"\[1, 4, 4\], after 1 names and 4 tokens, at least one of each, got \[3, 4, 4\]",
        ),
        (ATTENTION[:0], TOKENS, [], "at least one of each"),
        (ATTENTION * 2, TOKENS, NAMES, "attention is between 0 and 1, got values from 0 to 2"),
        (ATTENTION * torch.nan, TOKENS, NAMES, "attention is between 0 and 1, got values from nan to nan"),
    ],
)
def test_bad_input(draw: Any, pattern: torch.Tensor, tokens: list[str], names: list[str], message: str) -> None:
    title = {"title": "x"} if draw is attention_views.attention_heads_view else {}
    with pytest.raises(ValueError, match=message):
        draw(pattern, tokens, names, **title)


@needs_browser
def test_attention_heads_in_a_browser(tmp_path: Path) -> None:
    """All heads, then the first of them large, in the colours of the static picture; hovering tells the attention."""
    size, pattern = len(NASTY), attention(2, len(NASTY))
    view = attention_views.attention_heads_view(pattern, NASTY, ["<b>one</b>", "two"], title="Heads")
    dom = browse(f"<!doctype html>{CANVAS}{view._repr_html_()}{PROBE}", tmp_path)
    assert 'data-requests="0"' in dom
    assert "data-hacked" not in dom
    assert "&lt;b&gt;one&lt;/b&gt; Zoomed" in dom
    fills = canvas(dom, "fills")
    drawn = [fills[i : i + size**2] for i in range(len(fills) - size**2 + 1)]
    for head in pattern:
        hues = [hue for line in wanted(head) for hue in line]
        # On its way to blue circuitsvis' mixture leaves what a screen can show, and is redder than ours by up to 17.
        assert any(all(is_near(a, b, 17) for a, b in zip(area, hues, strict=True) if b) for area in drawn)
    texts = canvas(dom, "texts")
    assert {f"{figure_parts.shortened(token)} ({i})" for i, token in enumerate(NASTY)} <= set(texts)
    told = {f"Val: {part:.3g}" for line in pattern[0].tolist() for part in line}
    values = {text for text in texts if text.startswith("Val: ")}
    assert values
    assert values <= told
