"""Pictures of a `ComponentMap`: one heat map, as a figure and in a static card."""

from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from tl_scopes.views import heat_map, markup
from tl_scopes.views.figure import embedded, shortened
from tl_scopes.views.markup import SMALL, Html, tag
from tl_scopes.views.palette import Scale, sinks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tl_scopes.circuits.maps import ComponentMap


def plot(found: "ComponentMap", title: str | None = None) -> "Figure":
    """Layers from top to bottom, positions from left to right; of a head map heads, with their positions together."""
    has_heads = len(found.axis_names) == 3
    values = found.summed if has_heads else found.scores
    columns = [f"H{i}" for i in range(values.shape[1])] if has_heads else [shortened(t) for t in found.str_tokens]
    shares = values / (values.max().item() or 1.0)
    return heat_map.heat_map(
        shares,
        _scale(shares),
        [f"L{layer}" for layer in found.layers],
        columns,
        names=("layer", found.axis_names[1], "part of the largest"),
        title=found.question if title is None else title,
    )


def _scale(shares: Float[Tensor, "layer column"]) -> Scale:
    """A scale that ends below layers that stand apart, as the first does in many models: it would wash out the rest."""
    rows = shares.abs().amax(1).sort(descending=True)
    count = sinks(rows.values.tolist())
    return Scale(rows.values[count].item(), 0.8 if count else 1.0)


def page(found: "ComponentMap") -> Html:
    """The static card as a complete page, without script or network."""
    return markup.page(found.question, fragment(found), footer=found.provenance)


def fragment(found: "ComponentMap") -> Html:
    """The static card, to be put into another page."""
    about = f"{found.model} · {found.dtype} · {found.at} → {found.of}"
    first = found.top(1)[0]
    alt = (
        f"Heat map of {len(found.layers)} layers. The largest score, {first.score:.3g}, is that of {first.name} at "
        f"{first.at!r}."
    )
    legend = f"{found.unit}; the largest is {first.score:.3g}, {first.name} at {first.at!r}"
    picture = embedded(plot(found, ""), alt)
    asked = markup.about(f"{found.quantity or 'the prediction'} after", found.str_tokens)
    parts = (asked, tag("div", SMALL, about), picture, tag("div", SMALL, legend))
    return markup.card(found.question, *parts, notes=found.notes, width="max-content")
