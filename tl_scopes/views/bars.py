"""Bars: one for each token, from left to right. It stands alone because a bar chart is not a heat map."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tl_scopes.views.figure import axes_at, default_style, drawable, fitted, label_ticks
from tl_scopes.views.markup import MUTED
from tl_scopes.views.palette import color

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_RIM = "#8c959f"


def bars(
    values: Sequence[float],
    strengths: Sequence[float],
    labels: Sequence[str],
    *,
    names: tuple[str, str],
    title: str = "",
) -> "Figure":
    """A bar for each value.

    Args:
        values: how high the bars are, as parts of a whole.
        strengths: how strongly to colour each, from -1 to 1.
        labels: what each bar is about.
        names: what the bars and the values are.
        title: written over the bars.
    """
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    width, height = min(max(0.22 * len(values), 2.0), 12.0), 2.2
    with default_style():
        figure, (axes,) = axes_at((0.0, 0.0, width, height))
        hues = [color(strength) for strength in strengths]
        axes.bar(range(len(values)), values, 0.8, color=hues, edgecolor=_RIM, linewidth=0.5)
        axes.axhline(0, color=_RIM, linewidth=0.8)
        axes.set_xlim(-0.6, len(values) - 0.4)
        label_ticks(axes, (), labels, (height, width), turned=90)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.3g}%"))
        axes.tick_params(axis="y", labelsize=8, color=MUTED)
        axes.tick_params(axis="x", length=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel(names[0], fontsize=8, color=MUTED)
        axes.set_ylabel(names[1], fontsize=8, color=MUTED)
        (title,), style = drawable([title], 10)
        axes.set_title(title, loc="left", **style)
        return fitted(figure)
