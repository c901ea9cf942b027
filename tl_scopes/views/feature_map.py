"""Pictures of a `FeatureMap`: one heat map, as a figure and in a static card."""

from typing import TYPE_CHECKING

from tl_scopes.views import heat_map, markup
from tl_scopes.views.figure import embedded, shortened
from tl_scopes.views.markup import SMALL, Html, tag
from tl_scopes.views.palette import Scale

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tl_scopes.circuits.features import FeatureMap

_ROWS = 40
"""How many features are drawn, those that matter most."""


def plot(found: "FeatureMap", title: str | None = None) -> "Figure":
    """Features from top to bottom, tokens from left to right."""
    shown = found.top(_ROWS)
    values = shown.scores if shown.carried is None else shown.carried
    shares = values / (values.abs().max().item() or 1.0)
    what = "score" if shown.carried is None else "carried"
    return heat_map.heat_map(
        shares,
        Scale.of(shares.flatten().tolist()),
        list(shown.names),
        [shortened(text) for text in shown.str_tokens],
        names=("feature", "token", f"{what}, part of the largest"),
        title=repr(found) if title is None else title,
    )


def page(found: "FeatureMap") -> Html:
    """The static card as a complete page, without script or network."""
    return markup.page("features", fragment(found), footer=found.provenance)


def fragment(found: "FeatureMap") -> Html:
    """The static card, to be put into another page."""
    first = found.top(1)
    values = first.scores if first.carried is None else first.carried
    most = int(values[0].abs().argmax())
    unit = "activation per unit of embedding norm" if found.unit is None else found.unit
    alt = (
        f"Heat map of {len(found.features)} features and {len(found.str_tokens)} tokens. {first.names[0]} answers most "
        f"to {first.str_tokens[most]!r}."
    )
    hidden = len(found.features) - _ROWS
    legend = f"{unit}; {first.names[0]}: {values[0, most].item():.3g} from {first.str_tokens[most]!r}"
    legend += f"; {hidden} more features are not drawn" if hidden > 0 else ""
    about = f"{found.model} · {found.wrt} → {found.hook}"
    what = "features that fire in" if found.scope is None else f"{found.quantity or 'the prediction'} after"
    asked = markup.about(what, found.str_tokens)
    parts = (asked, tag("div", SMALL, about), embedded(plot(found, ""), alt), tag("div", SMALL, legend))
    return markup.card(found.question, *parts, notes=found.notes, width="max-content")
