"""Pictures of a time series: what moves its next number, what is said to come, and how well."""

from textwrap import wrap
from typing import TYPE_CHECKING, Any

from tl_scopes.views.figure import default_style, drawable, new_figure
from tl_scopes.views.markup import INK, MUTED
from tl_scopes.views.palette import color

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tl_scopes.series.forecast import Forecast, Losses
    from tl_scopes.series.influence import SeriesInfluence
    from tl_scopes.series.neighbors import NeighborTest

_GRAY = "#8c959f"


def influence(found: "SeriesInfluence", forecast: "Forecast | None", truth: int | None) -> "Figure":
    """Bars of influence behind the line of the series; on the right, turned, the distribution of the next number."""
    with default_style():
        figure = new_figure(figsize=(10 if forecast else 8.5, 2.8), layout="constrained")
        if forecast is None:
            bars, beside = figure.subplots(), None
        else:
            bars, beside = figure.subplots(1, 2, width_ratios=(6, 1))
        at = range(len(found))
        scores = found.scores.tolist()
        bars.bar(at, scores, width=0.9, color=[color(0.6 if score >= 0 else -0.6) for score in scores])
        # A long unit stands in two lines, or it would be cut.
        bars.set_ylabel("\n".join(wrap(found.answer.unit, 30)), fontsize=8, color=MUTED)
        bars.set_xlabel("number", fontsize=8, color=MUTED)
        line = bars.twinx()
        line.plot(at, found.numbers, color=INK, linewidth=1, marker=".", markersize=3)
        line.set_ylim(0, 100)
        line.set_ylabel("series (line)", fontsize=8, color=MUTED)
        if truth is not None:
            line.plot([len(found)], [truth], color="#d55e00", marker="o", markersize=4, linestyle="")
        titles, style = drawable([found.answer.question])
        bars.set_title(titles[0], loc="left", **style)
        _plain(bars, line)
        if beside is not None and forecast is not None:
            beside.barh(range(100), forecast.probabilities.tolist(), height=1, color=color(0.8))
            beside.set_ylim(0, 100)
            if truth is not None:
                beside.axhline(truth, color="#d55e00", linewidth=1)
            beside.set_title("next number", loc="left", fontsize=8, color=INK)
            beside.set_xlabel("probability", fontsize=8, color=MUTED)
            _plain(beside)
        return figure


def losses(found: "Losses") -> "Figure":
    """The loss of each number by how many stand before it."""
    with default_style():
        figure = new_figure(figsize=(6, 3), layout="constrained")
        axes = figure.subplots()
        axes.plot(found.values.nanmean(0).tolist(), color=color(1.0), label="model")
        if found.markov is not None:
            axes.plot(found.markov.mean(0).tolist(), color=color(-1.0), label="Markov chain")
        axes.axhline(4.605, color=_GRAY, linewidth=0.8, linestyle=":", label="uniform")
        axes.set(ylim=(0, None))
        axes.set_xlabel("numbers before", fontsize=8, color=MUTED)
        axes.set_ylabel("loss, nat", fontsize=8, color=MUTED)
        axes.legend(fontsize=7, frameon=False)
        _plain(axes)
        return figure


def neighbors(found: "NeighborTest") -> "Figure":
    """The null distribution, and where the statistic stands in it."""
    with default_style():
        figure = new_figure(figsize=(5, 2.6), layout="constrained")
        axes = figure.subplots()
        axes.hist(found.null.tolist(), bins=40, color=color(0.4), label="permuted")
        axes.axvline(found.statistic, color="#d55e00", linewidth=1.5, label=f"found, p = {found.p:.3f}")
        axes.set_xlabel("statistic", fontsize=8, color=MUTED)
        axes.set_ylabel("permutations", fontsize=8, color=MUTED)
        axes.legend(fontsize=7, frameon=False)
        _plain(axes)
        return figure


def _plain(*several: Any) -> None:
    for axes in several:
        axes.tick_params(labelsize=7, color=MUTED)
        axes.spines[["top"]].set_visible(False)
