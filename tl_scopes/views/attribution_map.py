"""Pictures of an `AttributionMap`: a heat map as figure and static card, and circuitsvis' views, live."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_scopes.views import attribution, heat_map, markup
from tl_scopes.views.figure import arrowed, embedded, shortened
from tl_scopes.views.live import MOST_TOKENS, LiveView, LiveViews, Written, require_drawable
from tl_scopes.views.markup import SMALL, Html, isolated, tag, visible
from tl_scopes.views.palette import COLORS, Colors, Scale, color, require_colors, sinks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tl_scopes.results.attribution import Attribution
    from tl_scopes.results.attribution_map import AttributionMap


def plot(prompt_map: "AttributionMap", colors: Colors = "root") -> "Figure":
    """A heat map of the shares: predictions from top to bottom, tokens from left to right."""
    return figure(prompt_map, prompt_map.answers[-1].question, colors=colors)


def page(prompt_map: "AttributionMap", colors: Colors = "root") -> Html:
    """The static card as a complete page, without script or network."""
    last = prompt_map.answers[-1]
    return markup.page(last.question, fragment(prompt_map, colors), footer=last.provenance)


def fragment(prompt_map: "AttributionMap", colors: Colors = "root") -> Html:
    """The static card, to be put into another page."""
    return card(prompt_map, embedded(figure(prompt_map, colors=colors), _alt(prompt_map)), colors)


def live(prompt_map: "AttributionMap") -> LiveView | LiveViews:
    """circuitsvis' attention pattern, with predictions for destinations and tokens for sources.

    Departure: circuitsvis takes a square whose rows and columns are the same tokens. A slice, an answer, and a map from
    which tokens in the middle were set aside are no square: they are drawn as texts, one for each prediction.

    Raises:
        ValueError: for a square of more than 400 tokens, and for more than 4,000 tokens in texts.
    """
    last = prompt_map.answers[-1]
    if [answer.position for answer in prompt_map] != list(last.positions):
        require_drawable(sum(len(answer.scores) for answer in prompt_map), MOST_TOKENS, "tokens")
        texts = (attribution.live_text(answer, marks=False) for answer in prompt_map)
        return LiveViews(tuple(texts), lambda *live: _texts_card(prompt_map, *live), f"ColoredTokens: {prompt_map!r}")
    values = _values(prompt_map)
    scale, size = _scale(values), len(last.positions)
    require_drawable(size**2)
    attention: list[list[Any]] = []
    for answer in prompt_map:
        told = f" → {visible(_explained(answer))}" if _explained(answer) else ""
        line = [
            Written(scale.strength(share), f"{score:.3g} {answer.unit}, {share:.1%}{told}")
            if counted
            else Written(0.0, "not counted in shares")
            for score, share, counted in zip(
                answer.scores.tolist(), answer.share.tolist(), answer.is_counted, strict=True
            )
        ]
        attention.append([*line, *[0.0] * (size - len(line))])
    props = {
        "tokens": [isolated(shortened(text)) for text in last.str_tokens],
        "attention": attention,
        "minValue": -1,
        "maxValue": 1,
        "positiveColor": color(1.0),
        "negativeColor": color(-1.0),
        "upperTriColor": "#f3f5f7",
    }
    static = figure(prompt_map)
    width = f"width:{96 * static.get_size_inches()[0]:.0f}px;max-width:100%"  # it would fill the page
    return LiveView(
        "AttentionPattern",
        props,
        embedded(static, _alt(prompt_map)),
        lambda live: card(prompt_map, tag("div", width, live)),
        f"AttentionPattern: {prompt_map!r}",
    )


def _texts_card(prompt_map: "AttributionMap", *texts: Html) -> Html:
    """The card of a live map that is not a square: the tokens of each prediction, and what it explains."""
    last = prompt_map.answers[-1]
    lines = [
        tag("div", "font-size:16px;line-height:2;margin-bottom:6px", text, attribution.next_token(answer))
        for text, answer in zip(texts, prompt_map, strict=True)
    ]
    legend = f"score in {last.unit}; colour: {COLORS['root'].format('score')}, each prediction on its own scale"
    return _framed(prompt_map, tag("div", "margin:14px 0 6px;max-height:70vh;overflow:auto", *lines), legend, "860px")


def card(prompt_map: "AttributionMap", picture: Html, colors: Colors = "root") -> Html:
    """The frame around a picture of the map."""
    last = prompt_map.answers[-1]
    legend = f"score in {last.unit}; colour: {COLORS[colors].format('share')}"
    if _scale(_values(prompt_map, colors), colors).top < 1:
        legend += ", the strongest is over the scale"
    return _framed(prompt_map, picture, legend, "max-content")


def _framed(prompt_map: "AttributionMap", picture: Html, legend: str, width: str) -> Html:
    last = prompt_map.answers[-1]
    about = f"{last.model} · {last.dtype} · {last.wrt} → {last.of} · {_count(prompt_map)}"
    if not all(last.is_counted):
        legend += f"; grey: {', '.join(last.uncounted)}, not counted"
    return markup.card(
        last.question,
        tag("div", SMALL, about),
        picture,
        tag("div", SMALL, legend),
        notes=markup.distinct(note for answer in prompt_map for note in answer.notes),
        width=width,
    )


def _alt(prompt_map: "AttributionMap") -> str:
    last = prompt_map.answers[-1]
    said = f"Heat map of {_count(prompt_map)} by {len(last.positions)} {last.column}s."
    cells = [(row, answer) for answer in prompt_map for row in answer.top(1)]
    if not cells:
        return said
    # A token that stands alone has all of the share.
    row, answer = max(cells, key=lambda cell: (len(cell[1].scores) > 1, abs(cell[0].share)))
    return (
        f"{said} The largest share, {row.share:.0%}, is that of {row.token!r} at position {row.position} in the "
        f"prediction after position {answer.position}."
    )


def figure(
    prompt_map: "AttributionMap",
    title: str = "",
    *,
    rows: Sequence[str] | None = None,
    names: tuple[str, str, str] | None = None,
    colors: Colors = "root",
) -> "Figure":
    """A heat map of the shares.

    Args:
        prompt_map: the map.
        title: what is written over it.
        rows: the label of each row; None is the token read and what is explained after it.
        names: what rows, columns and values are; by default tokens (or what was put together), and shares.
        colors: how shares become colours. By "even" the values are how many times an even share they are.
    """
    require_colors(colors)
    values, texts = _values(prompt_map, colors), _texts(prompt_map)
    if names is None:
        column = prompt_map.answers[-1].column
        names = f"after {column} → prediction", column, "share of the scores"
    if rows is None:
        rows = [
            arrowed(
                shortened(texts[answer.position]) if answer.position in texts else f"({answer.position})",
                shortened(_explained(answer)) if _explained(answer) else "",
            )
            for answer in prompt_map
        ]
    return heat_map.heat_map(
        values,
        _scale(values, colors),
        rows,
        [shortened(text) for text in prompt_map.answers[-1].labels],
        names=(*names[:2], "times an even share") if colors == "even" else names,
        title=title,
        percent=colors != "even",
    )


def _count(prompt_map: "AttributionMap") -> str:
    return f"{len(prompt_map)} prediction{'s' * (len(prompt_map) > 1)}"


def _values(prompt_map: "AttributionMap", colors: Colors = "root") -> Float[Tensor, "position token"]:
    """The shares, or how many times an even share they are; NaN for the tokens after each position, and for those that
    have no share.
    """
    values = prompt_map.share
    for line, answer in zip(values, prompt_map, strict=True):
        line[len(answer.scores) :] = torch.nan
        line[[i for i, counted in enumerate(answer.is_counted) if not counted]] = torch.nan
        if colors == "even":
            line *= sum(answer.is_counted)
    return values


def _scale(values: Float[Tensor, "position token"], colors: Colors = "root") -> Scale:
    """One scale for all predictions, which ends below the sinks, the columns that most predictions rest on.

    One value in fifty may lie over the scale too, so that a few do not wash out the rest. Predictions from fewer than
    five tokens do not count where there are others, because their shares must be large.
    """
    long = values[values.isfinite().sum(1) >= 5]
    sizes = (long if len(long) else values).abs()
    # Among t tokens an even share is 1/t; shares times t can be averaged over predictions.
    parts = sizes / sizes.nansum(1, keepdim=True).clamp(min=1e-30) * sizes.isfinite().sum(1, keepdim=True)
    means = parts.nanmean(0).nan_to_num().sort(descending=True)
    rest = sizes[:, means.indices[sinks(means.values.tolist()) :]]
    rest = rest[rest.isfinite()].sort(descending=True).values
    end = rest[len(rest) // 50].item() if len(rest) else 0.0  # where no token counts
    most = values.abs().nan_to_num().max().item()
    if colors == "even" and end <= 1:  # nothing but sinks is above an even share
        end = most
    top = 0.8 if most > end else 1.0
    return Scale(end, top, 1.0 if colors == "even" else 0.0, 0.5 if colors == "root" else 1.0)


def _texts(prompt_map: "AttributionMap") -> dict[int, str]:
    last = prompt_map.answers[-1]
    return dict(zip(last.positions, last.labels, strict=True))


def _explained(answer: "Attribution") -> str:
    """The token explained, or the most likely one; empty where neither is known."""
    if answer.target is not None:
        return answer.target.text
    return answer.predictions[0].token.text if answer.predictions else ""
