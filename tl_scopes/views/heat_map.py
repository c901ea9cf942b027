"""Heat maps: matrices of scores between tokens, on the colours of `palette`."""

from collections.abc import Sequence
from math import ceil, floor, log10
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from tl_scopes.views.figure import LEGIBLE, axes_at, default_style, drawable, fitted, label_ticks
from tl_scopes.views.markup import INK, MUTED
from tl_scopes.views.palette import Scale, color, text_color

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

_LARGEST = 8.4
"""How many inches wide and high a map is at most: 60 rows of it can all be labelled."""
_VOID = "#f3f5f7"  # not white, which is a score of zero
_RIM = "#d8dee4"


def heat_map(
    values: Float[Tensor, "row column"],
    scale: Scale,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    names: tuple[str, str, str],
    title: str = "",
    percent: bool = True,
) -> "Figure":
    """One large map.

    Args:
        values: the values, shares say; NaN where there is none.
        scale: from values to colours.
        rows: the labels of the rows.
        columns: the labels of the columns.
        names: what the rows, the columns and the values are.
        title: written over the map.
        percent: whether values are written in percent.
    """
    size = max(len(rows), len(columns))
    annotated = size <= 16
    # A large map is made to fit into a page, its colour bar too: cells shrink, down or across, as they become many.
    width, height = (count * (0.36 if annotated else min(0.2, _LARGEST / count)) for count in values.shape[::-1])
    tall = min(max(height, 1.2), 2.4)
    with default_style():
        figure, (axes, bar) = axes_at((0.0, 0.0, width, height), (width + 0.2, height - tall, 0.13, tall))
        image = _cells(axes, values, scale, grid=size <= LEGIBLE)
        label_ticks(axes, rows, columns, (height, width), turned=45 if annotated else 90)
        if annotated:
            _annotate(axes, values, scale, percent=percent)
        axes.set_ylabel(names[0], fontsize=8, color=MUTED)
        axes.set_xlabel(names[1], fontsize=8, color=MUTED)
        (title,), style = drawable([title], 10)
        axes.set_title(title, loc="left", **style)
        _color_bar(figure, bar, image, scale, names[2], percent=percent)
        return fitted(figure)


def small_multiples(
    matrices: Float[Tensor, "panel row column"], scale: Scale, tokens: Sequence[str], titles: Sequence[str], name: str
) -> "Figure":
    """Many small maps of the same tokens against themselves.

    Args:
        matrices: the values, NaN where there is none.
        scale: from values to colours, the same in all panels.
        tokens: the labels of the rows and of the columns.
        titles: one for each panel.
        name: what the values are.
    """
    side = min(max(0.12 * len(tokens), 1.3), 2.4)
    across = min(len(matrices), max(1, int(10 / (side + 0.2))))
    down = ceil(len(matrices) / across)
    places = [
        ((i % across) * (side + 0.2), (down - 1 - i // across) * (side + 0.35), side, side)
        for i in range(len(matrices))
    ]
    top = down * (side + 0.35) - 0.35
    with default_style():
        figure, (*panels, bar) = axes_at(*places, (across * (side + 0.2) + 0.1, top - side, 0.13, side))
        for i, (axes, matrix, title) in enumerate(zip(panels, matrices, titles, strict=True)):
            image = _cells(axes, matrix, scale, grid=False)
            is_left, is_lowest = i % across == 0, i + across >= len(matrices)
            label_ticks(axes, tokens if is_left else (), tokens if is_lowest else (), (side, side), turned=90, size=7)
            axes.set_title(title, fontsize=8, color=INK, pad=3, parse_math=False)
        _color_bar(figure, bar, image, scale, name, percent=False)
        return fitted(figure)


# ---------------------------------------------------------------------------------------------------------------------
# Parts of a figure


def _cells(axes: "Axes", values: Tensor, scale: Scale, *, grid: bool) -> "AxesImage":
    strengths = [[scale.strength(value) if value == value else value for value in line] for line in values.tolist()]
    low = -scale.top if (values < 0).any() else 0.0
    image = axes.imshow(strengths, cmap=_colormap(low, scale.top), vmin=low, vmax=scale.top, aspect="auto")
    axes.spines[:].set_visible(False)
    if grid:
        axes.set_xticks([column - 0.5 for column in range(1, values.shape[1])], minor=True)
        axes.set_yticks([row - 0.5 for row in range(1, values.shape[0])], minor=True)
        axes.grid(which="minor", color="white", linewidth=0.75)
    axes.tick_params(which="both", length=0)
    return image


def _annotate(axes: "Axes", values: Tensor, scale: Scale, *, percent: bool) -> None:
    """Write the value into each cell."""
    for row, line in enumerate(values.tolist()):
        for column, value in enumerate(line):
            if value == value:
                hue = text_color(scale.strength(value))
                told = f"{100 * value:z.0f}" if percent else f"{value:z.1f}"  # z: no zero below zero
                axes.text(column, row, told, fontsize=7, ha="center", va="center", color=hue)


def _color_bar(figure: "Figure", axes: "Axes", image: "AxesImage", scale: Scale, name: str, *, percent: bool) -> None:
    is_signed, is_cut = image.norm.vmin != 0, scale.top < 1
    extend = ("both" if is_signed else "max") if is_cut else "neither"
    bar = figure.colorbar(image, cax=axes, extend=extend)
    scores = _ticks(scale, 0.36 if is_signed else 0.18)
    labels = [f"{100 * score:.3g}%" if percent else f"{score:.3g}" for score in scores]
    if is_signed:  # in the middle are all up to the floor
        labels = [*(f"-{label}" for label in labels[1:]), f"{'±' * (scale.floor > 0)}{labels[0]}", *labels[1:]]
        scores = [*(-score for score in scores[1:]), *scores]
    bar.set_ticks([scale.strength(score) for score in scores], labels=labels, fontsize=8, color=INK)
    bar.set_label(name, fontsize=8, color=MUTED, parse_math=False)
    bar.outline.set(edgecolor=_RIM, linewidth=0.8)
    axes.tick_params(length=2, color=MUTED)


def _ticks(scale: Scale, apart: float) -> list[float]:
    """Where the scale begins and round numbers, no two of them closer than this part of the scale."""
    if scale.end <= scale.floor:
        return [scale.floor]
    ticks, above = [scale.floor], scale.top
    power = floor(log10(scale.end))
    for score in (digit * 10.0**k for k in range(power, power - 4, -1) for digit in (5, 2, 1)):
        strength = scale.strength(score)
        if score <= scale.end and apart * scale.top <= strength <= above:
            ticks.append(score)
            above = strength - apart * scale.top
    if len(ticks) == 1 and scale.floor > 0:  # no round number lies between its ends
        ticks.append(scale.end)
    return sorted(ticks)


def _colormap(low: float, top: float) -> "Colormap":
    from matplotlib.colors import ListedColormap

    steps = [low + (top - low) * i / 255 for i in range(256)]
    return ListedColormap([color(step) for step in steps]).with_extremes(over=color(1.0), under=color(-1.0), bad=_VOID)
