"""Pictures of `Effects`: one heat map, as a figure and in a static card."""

from typing import TYPE_CHECKING

from tl_scopes.views import heat_map, markup
from tl_scopes.views.figure import embedded, shortened
from tl_scopes.views.markup import SMALL, Html, tag
from tl_scopes.views.palette import Scale

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tl_scopes.circuits.effects import Effects


def plot(effects: "Effects", title: str | None = None) -> "Figure":
    """Layers from top to bottom, heads or positions from left to right; as parts of the whole difference."""
    by_head = effects.site == "head_out"
    columns = [f"H{i}" for i in range(effects.values.shape[1])] if by_head else map(shortened, effects.str_tokens)
    return heat_map.heat_map(
        effects.normalized,
        Scale(float(effects.normalized.abs().max())),
        [f"L{layer}" for layer in effects.layers],
        list(columns),
        names=("layer", "head" if by_head else "token of the corrupted prompt", "part of the whole difference"),
        title=_heading(effects) if title is None else title,
    )


def page(effects: "Effects") -> Html:
    """The static card as a complete page, without script or network."""
    return markup.page(_heading(effects), fragment(effects))


def fragment(effects: "Effects") -> Html:
    """The static card, to be put into another page."""
    (first,) = effects.top(1)
    largest = f"the largest is {first.value:.3g}, {first.part:.0%} of the whole, {first.name}"
    legend = f"the whole difference is {effects.scale:.3g}; {largest}"
    picture = embedded(plot(effects, ""), f"Heat map of {len(effects.layers)} layers: {largest}.")
    asked = markup.about("replaced in", effects.str_tokens)
    parts = (asked, picture, tag("div", SMALL, legend))
    return markup.card(_heading(effects), *parts, notes=(), width="max-content")


def _heading(effects: "Effects") -> str:
    return f"{effects.method} of {effects.site}"
