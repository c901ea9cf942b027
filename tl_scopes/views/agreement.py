"""A scatter of what methods say about the same parts of a network."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from tl_scopes.views.figure import default_style, new_figure
from tl_scopes.views.markup import INK, MUTED
from tl_scopes.views.palette import color

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tl_scopes.circuits.effects import Effects

_NAMED = 6


def plot(effects: Mapping[str, Sequence["Effects"]], site: str) -> "Figure":
    """One panel for each method but activation patching, which is on the horizontal axis; one dot for each component.

    Sizes are parts of the largest at their pair, so that pairs can be seen together.
    """
    truth = effects["activation patching"]
    others = [method for method in effects if method != "activation patching"]
    with default_style():
        figure = new_figure(figsize=(4.2 * len(others), 4.0), layout="constrained")
        for i, method in enumerate(others):
            axes = figure.add_subplot(1, len(others), i + 1)
            named: list[tuple[float, float, str]] = []
            for one, other in zip(truth, effects[method], strict=True):
                x, y = (e.values.abs().flatten() / (e.values.abs().max().item() or 1.0) for e in (one, other))
                axes.scatter(x.tolist(), y.tolist(), s=9, color=color(1.0), alpha=0.35, linewidths=0)
                first = x.argsort(descending=True)[:2].tolist()
                named += [(float(x[j]), float(y[j]), one.names[j]) for j in first]
            for across, up, name in sorted(named, reverse=True)[:_NAMED]:
                axes.annotate(
                    name, (across, up), fontsize=7, color=INK, xytext=(-3, 3), textcoords="offset points", ha="right"
                )
            axes.plot([0, 1], [0, 1], color="#d8dee4", linewidth=0.8, zorder=0)
            axes.set_xlabel(f"|activation patching|, {site}", fontsize=8, color=MUTED)
            axes.set_ylabel(f"|{method}|", fontsize=8, color=MUTED)
            axes.tick_params(labelsize=7, color=MUTED)
            axes.spines[["top", "right"]].set_visible(False)
        return figure
