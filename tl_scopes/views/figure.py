"""What every matplotlib figure here needs: a style of its own, a place in HTML, and labels in any script."""

from collections.abc import Iterable, Sequence
from functools import cache, partial
from io import BytesIO
from math import ceil
from typing import TYPE_CHECKING, Any

from tl_scopes.views import markup
from tl_scopes.views.markup import INK, Html, is_right_to_left, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEGIBLE = 60
"""How many tokens along an edge are all labelled. Of more than these every other one is, or every third, and so on."""


def default_style() -> Any:
    """matplotlib's own style, for the figures drawn within, whatever style is in force.

    The colours of text and ground belong together.
    """
    from matplotlib import style

    return style.context("default")


def new_figure(**options: Any) -> "Figure":
    """An empty figure that a notebook draws at the end of a cell; pyplot knows nothing of it."""
    from matplotlib.figure import Figure

    figure = Figure(facecolor="white", **options)
    # Without this method a notebook draws a figure only if pyplot was imported.
    figure._repr_png_ = partial(_png, figure)  # type: ignore[attr-defined]
    return figure


def embedded(figure: "Figure", alt: str) -> Html:
    """The figure as an HTML image, twice as fine as the screen's pixels."""
    width, height = (round(96 * inches) for inches in figure.get_size_inches())
    return markup.image(_png(figure), alt, width, height)


def _png(figure: "Figure") -> bytes:
    data = BytesIO()
    figure.savefig(data, format="png", dpi=192, facecolor="auto", metadata={"Software": None})
    return data.getvalue()


def axes_at(*places: tuple[float, float, float, float]) -> tuple["Figure", list["Axes"]]:
    """Axes at places in inches, in a figure of one inch until it is `_fitted`."""
    figure = new_figure(figsize=(1, 1))
    return figure, [figure.add_axes(place) for place in places]


def fitted(figure: "Figure") -> "Figure":
    """The figure, made as large as what is in it."""
    box, rim = figure.get_tightbbox(), 0.08
    width, height = box.width + 2 * rim, box.height + 2 * rim
    places = [axes.get_position().bounds for axes in figure.axes]
    figure.set_size_inches(width, height)
    for axes, (x, y, w, h) in zip(figure.axes, places, strict=True):
        axes.set_position(((x - box.x0 + rim) / width, (y - box.y0 + rim) / height, w / width, h / height))
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# Labels


def shortened(text: str, length: int = 16) -> str:
    """A token's visible text, cut where it is long."""
    shown = visible(text)
    return shown if len(shown) <= length else shown[: length - 1] + "…"


def arrowed(text: str, other: str) -> str:
    """One text, an arrow and another text, from left to right whatever their letters; one text where one is empty."""
    # The mark, which cannot be seen, ends what runs from right to left.
    arrow = "\u200e → " if is_right_to_left(text) else " → "
    return arrow.join(filter(None, (text, other)))


def drawable(texts: Iterable[str], size: int = 8) -> tuple[list[str], dict[str, Any]]:
    """Texts as the fonts of this computer can write them, and the style to write them in.

    A line runs from left to right, whatever the letters in it. A character that no font has is spelled as its code
    point, and a dollar sign does not begin a formula.
    """
    texts = [f"\u200e{text}" if is_right_to_left(text) else text for text in texts]
    fonts = _fonts(frozenset("".join(texts)))
    known = frozenset().union(*fonts.values())
    spelled = ["".join(char if char in known else f"U+{ord(char):04X}" for char in text) for text in texts]
    return spelled, {"fontsize": size, "family": [*fonts], "color": INK, "parse_math": False}


def label_ticks(
    axes: "Axes",
    rows: Sequence[str],
    columns: Sequence[str],
    inches: tuple[float, float],
    *,
    turned: int,
    size: int = 8,
) -> None:
    """Name the rows and columns, or of many every second, every third: so many that no two labels touch.

    Args:
        axes: where rows and columns are numbered from 0.
        rows: the labels from top to bottom.
        columns: the labels from left to right.
        inches: the height and the width of the axes.
        turned: how far the labels of the columns are turned, in degrees.
        size: the size of the letters, in points.
    """
    texts, style = drawable([*rows, *columns], size)
    rows, columns = texts[: len(rows)], texts[len(rows) :]
    # A line of letters is 1.2 times as high as its size; those that are turned by 45° stand askew.
    line = 1.2 * size / 72 * (2**0.5 if turned == 45 else 1)
    down, across = (
        max(1, ceil(max(line / long, 1 / LEGIBLE) * len(texts) - 1e-9))
        for texts, long in zip((rows, columns), inches, strict=True)
    )
    axes.set_yticks(range(0, len(rows), down), rows[::down], **style)
    aligned: dict[str, Any] = {
        "rotation": turned,
        "ha": "right",
        "rotation_mode": "anchor",
        "va": "top" if turned < 90 else "center_baseline",
    }
    axes.set_xticks(range(0, len(columns), across), columns[::across], **style, **aligned)
    axes.tick_params(axis="both", which="major", pad=3)


@cache
def _fonts(characters: frozenset[str]) -> dict[str, frozenset[str]]:
    """Fonts that together have these characters, as far as any font here has, and which of them each font adds."""
    from matplotlib import font_manager

    fonts: dict[str, frozenset[str]] = {}
    missing = set(characters)
    upright = (font for font in font_manager.fontManager.ttflist if (font.style, font.weight) == ("normal", 400))
    # matplotlib's own fonts for formulas and for nothing have other signs at the code points of letters.
    files = {font.name: font.fname for font in upright if not font.name.startswith(("Last Resort", "STIX", "cm"))}
    for name in ("DejaVu Sans", *sorted(files)):
        added = {char for char in missing if ord(char) in font_manager.get_font(files[name]).get_charmap()}
        if added or not fonts:
            fonts[name] = frozenset(added)
        missing -= added
        if not missing:
            break
    return fonts
