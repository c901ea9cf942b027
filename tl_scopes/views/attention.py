"""Pictures of attention heads: small heat maps side by side, and circuitsvis' attention heads, live."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from tl_scopes.views import heat_map, markup
from tl_scopes.views.figure import embedded, shortened
from tl_scopes.views.live import LiveView, Written, require_drawable
from tl_scopes.views.markup import SMALL, Html, isolated, tag
from tl_scopes.views.palette import Scale, color

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SCALE = Scale(1.0)  # the same in every picture: a query's attention sums to one


def plot(attention: Float[Tensor, "head query key"], tokens: Sequence[str], names: Sequence[str]) -> "Figure":
    """A small heat map for each head, queries from top to bottom, keys from left to right.

    Args:
        attention: how much each query attends to each key, from 0 to 1.
        tokens: the text of the tokens.
        names: the names of the heads.

    Raises:
        ValueError: for shapes that do not fit one another, or attention outside 0 to 1.
    """
    _require_shapes(attention, tokens, names)
    later = torch.ones_like(attention, dtype=torch.bool).triu(1)
    shown = [shortened(text, 12) for text in tokens]
    return heat_map.small_multiples(attention.masked_fill(later, torch.nan), _SCALE, shown, names, "attention")


def fragment(
    attention: Float[Tensor, "head query key"], tokens: Sequence[str], names: Sequence[str], *, title: str
) -> Html:
    """The small heat maps in a static card, to be put into another page."""
    return _card(title, _picture(attention, tokens, names))


def attention_heads_view(
    attention: Float[Tensor, "head query key"], tokens: Sequence[str], names: Sequence[str], *, title: str
) -> LiveView:
    """circuitsvis' attention heads: the small maps choose the large one, and a tooltip tells the attention.

    Args:
        attention: how much each query attends to each key, from 0 to 1.
        tokens: the text of the tokens.
        names: the names of the heads.
        title: the title of the card around them.

    Raises:
        ValueError: for shapes that do not fit one another, attention outside 0 to 1, or more than 160,000 cells.
    """
    picture = _picture(attention, tokens, names)
    require_drawable(attention.numel())
    values = [
        [
            [Written(_SCALE.strength(part), f"{part:.3g}") if key <= query else 0.0 for key, part in enumerate(line)]
            for query, line in enumerate(head)
        ]
        for head in attention.tolist()
    ]
    props = {
        "attention": values,
        "attentionHeadNames": list(names),
        "tokens": [isolated(shortened(text)) for text in tokens],
        "minValue": -1,
        "maxValue": 1,
        "positiveColor": color(1.0),
        "negativeColor": color(-1.0),
    }
    about = f"AttentionHeads: {title}, {len(names)} heads, {len(tokens)} tokens"
    return LiveView("AttentionHeads", props, picture, lambda live: _card(title, live), about)


def _card(title: str, picture: Html) -> Html:
    legend = tag("div", SMALL, "rows attend to columns; colour: square root of the attention, which sums to 1 in a row")
    return markup.card(title, picture, legend, width="max-content")


def _picture(attention: Tensor, tokens: Sequence[str], names: Sequence[str]) -> Html:
    figure = plot(attention, tokens, names)
    first = attention[:, :, 0].mean(1)
    most = int(first.argmax())
    alt = (
        f"Attention of {len(names)} heads between {len(tokens)} tokens. The head that attends most to the first token "
        f"is {names[most]}, with {first[most]:.0%} on average."
    )
    return embedded(figure, alt)


def _require_shapes(attention: Tensor, tokens: Sequence[str], names: Sequence[str]) -> None:
    wanted = [len(names), len(tokens), len(tokens)]
    if list(attention.shape) != wanted or 0 in wanted:
        raise ValueError(
            f"attention must have the shape [head query key] = {wanted}, after {len(names)} names and {len(tokens)} "
            f"tokens, at least one of each, got {list(attention.shape)}."
        )
    low, high = attention.min().item(), attention.max().item()
    if not (low >= 0 and high <= 1 + 1e-3):  # nor may it be NaN
        raise ValueError(f"attention is between 0 and 1, got values from {low:.3g} to {high:.3g}.")
