"""Pictures of a `LinearityReport`: curves of the error with each token's radii, and a static card around them."""

from typing import TYPE_CHECKING

import torch

from tl_scopes.views import markup
from tl_scopes.views.figure import default_style, drawable, embedded, new_figure
from tl_scopes.views.markup import SMALL, Html, tag

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

    from tl_scopes.diagnostics.linearity_report import LinearityReport

_KINDS = ("steepest", "random", "towards other tokens")  # the kinds of directions, in the report's order
_COLORS, _GREY = ("#1b6ca8", "#d1731f", "#3f8f4f"), "#555555"


def plot(report: "LinearityReport") -> "Figure":
    """Error against size, the middle half of the tokens shaded, and each token's radii beside its nearest token."""
    with default_style():
        height = max(4.0, 1.2 + 0.24 * len(report.positions))
        figure = new_figure(figsize=(11, height), layout="constrained")
        curves, radii = figure.subplots(1, 2, width_ratios=(5, 6))
        _draw_curves(curves, report)
        _draw_radii(radii, report)
        for axes, columns in ((curves, 2), (radii, 3)):
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(fontsize=8, frameon=False, ncols=columns, loc="lower center", bbox_to_anchor=(0.5, 1.0))
        (title,), style = drawable([f"How far is it linear? {report.scope}"], 10)
        figure.suptitle(title, **style)
        return figure


def fragment(report: "LinearityReport") -> Html:
    """The findings in words over the two plots, as a static card to be put into another page."""
    findings = [tag("div", SMALL, line) for line in report.summary().splitlines()]
    return markup.card("Linearity", *findings, embedded(plot(report), repr(report)), width="max-content")


def _draw_curves(axes: "Axes", report: "LinearityReport") -> None:
    """The error of the first-order prediction by the size of the perturbation."""
    sizes, quartiles = report.sizes.tolist(), torch.tensor([0.25, 0.5, 0.75], dtype=report.error.dtype)
    for kind, errors, hue in zip(_KINDS, report.error, _COLORS, strict=True):
        low, middle, high = errors.nanquantile(quartiles, dim=0)
        axes.fill_between(sizes, low, high, color=hue, alpha=0.15, linewidth=0)
        axes.plot(sizes, middle, color=hue, marker="o", markersize=3, label=kind)
    axes.plot(sizes, report.joint_error[0], color=_COLORS[0], linestyle="--", label="steepest, all tokens together")
    nearest = report.nearest_distance.sort().values[len(report.positions) // 2].item()
    axes.axvline(nearest, color=_GREY, linestyle=":", label="nearest other token")
    axes.axhline(report.tolerance, color=_GREY, linewidth=0.8)
    axes.set(xscale="log", yscale="log")
    axes.set_xlabel(f"size of the perturbation ({report.unit})", parse_math=False)
    axes.set_ylabel("relative error")
    _label_scale(axes.xaxis)
    _label_scale(axes.yaxis)


def _draw_radii(axes: "Axes", report: "LinearityReport") -> None:
    """How far the first-order prediction holds, token by token."""
    heights = list(range(len(report.positions)))
    for measured, predicted, hue in zip(report.radius, report.predicted_radius, _COLORS, strict=True):
        axes.plot(measured, heights, "o", color=hue, markersize=5)
        axes.plot(predicted, heights, "x", color=hue, markersize=5)
    for mark, name in (("o", "measured"), ("x", "from curvature")):
        axes.plot([], [], mark, color=_GREY, markersize=5, label=name)
    axes.plot(report.nearest_distance, heights, "|", color=_GREY, markersize=10, label="nearest other token")
    axes.set(xscale="log")
    axes.set_xlabel(f"radius of {report.tolerance:.0%} error ({report.unit})", parse_math=False)
    tokens, style = drawable(repr(token)[1:-1] for token in report.str_tokens)
    axes.set_yticks(heights, tokens, **style)
    axes.invert_yaxis()
    _label_scale(axes.xaxis)


def _label_scale(axis: "Axis") -> None:
    """Label a logarithmic axis with few round numbers: matplotlib's own labels overlap on a short one."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    steps = (1.0, 2.0, 5.0) if high < 30 * low else (1.0, 3.0) if high < 300 * low else (1.0,)
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
