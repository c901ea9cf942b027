"""Pictures of `Paths`: heat maps of components, and the flow of a token's influence through depth and positions."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tl_scopes.views import heat_map, markup
from tl_scopes.views.figure import shortened
from tl_scopes.views.live import LiveView, require_drawable
from tl_scopes.views.markup import MUTED, SMALL, Cell, Html, isolated, tag, visible
from tl_scopes.views.palette import Scale, color, text_color

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tl_scopes.circuits.paths import Paths

_COLUMNS = 14
"""How many positions the flow picture shows; the others are summed in one column."""
_NOTABLE = 0.05
"""The share of the score from which a head is named in the flow picture."""
_NUMBER = "padding:0 4px;text-align:center;line-height:15px;font-size:11px;min-width:26px"
_LABEL = f"padding:0 8px 0 0;text-align:right;line-height:15px;font-size:11px;color:{MUTED}"


class _Grid(NamedTuple):
    """Shares of a score in rows and columns."""

    shares: Float[Tensor, "row column"]
    rows: list[str]
    columns: list[str]
    names: tuple[str, str]
    """What rows and columns are."""


def plot(paths: "Paths", column: int) -> "Figure":
    """A heat map of the shares of one source token.

    Raises:
        ValueError: by "neuron".
    """
    grid = _grid(paths, column)
    if grid is None:
        raise ValueError("neurons are too many for a heat map: take `top` or `to_dataframe`.")
    scale = Scale.of(grid.shares.flatten().tolist())
    source = visible(paths.str_tokens[paths.positions[column]])
    title = f"{paths.question}, from {source}"
    return heat_map.heat_map(
        grid.shares, scale, grid.rows, grid.columns, names=(*grid.names, "share of the score"), title=title
    )


def page(paths: "Paths", column: int) -> Html:
    """The static card as a complete page, without script or network."""
    return markup.page(paths.question, fragment(paths, column), footer=paths.provenance)


def fragment(paths: "Paths", column: int) -> Html:
    """The static card: a heat map with tooltips, and the components that carry most."""
    grid, first = _grid(paths, column), _first(paths, column)
    if grid is None:
        return _card(paths, column, first)
    scale = Scale.of(grid.shares.flatten().tolist())
    size = _size(paths, column)
    lines = [[Cell("", _LABEL), *(Cell(name, f"{_NUMBER};color:{MUTED}") for name in grid.columns)]]
    for label, line in zip(grid.rows, grid.shares.tolist(), strict=True):
        told = [
            f"{label} {name}: {share * size:.3g}, {share:.1%}" for name, share in zip(grid.columns, line, strict=True)
        ]
        cells = [_number(share, scale, title) for share, title in zip(line, told, strict=True)]
        lines.append([Cell(label, _LABEL), *cells])
    legend = f"{grid.names[0]} by {grid.names[1]}; numbers are percent of the score, {_vermilion(paths, column)}"
    return _card(paths, column, _scrolled(markup.rows(lines)), tag("div", SMALL, legend), first)


def flow_page(paths: "Paths", column: int) -> Html:
    """The flow picture as a complete page, without script or network."""
    return markup.page(paths.question, flow(paths, column), footer=paths.provenance)


def flow(paths: "Paths", column: int) -> Html:
    """The flow picture: a row for the stream before each layer, a column for each position that matters.

    A number says how many percent of the score stand at a position there; behind each row stand the heads of that
    layer that move a notable part, and where they write it.
    """
    return _card(paths, column, _flow(paths, column))


def _flow(paths: "Paths", column: int) -> Html:
    """The rows of the flow picture, and what they say."""
    assert paths.stream is not None
    size = _size(paths, column)
    shares = paths.stream[..., column] / size
    source = paths.positions[column]
    shown = _positions(shares, source)
    others = [i for i in range(shares.shape[1]) if i not in shown]
    rest = shares[:, others].sum(1, keepdim=True)
    values = torch.cat([shares[:, shown], rest], 1) if rest.abs().max() >= 0.005 else shares[:, shown]
    texts = [shortened(paths.str_tokens[i], 10) for i in shown] + ["others"] * (values.shape[1] - len(shown))
    scale = Scale(1.0)
    style = f"{_NUMBER};color:{MUTED}"
    lines = [[Cell("", _LABEL), *(Cell(text, style) for text in texts), Cell("heads that move it", _side())]]
    names = _depths(paths.stream_layers)
    for layer, name, line in zip(paths.stream_layers, names, values.tolist(), strict=True):
        told = [f"before {name}, at {text}: {share * size:.3g}" for text, share in zip(texts, line, strict=True)]
        cells = [_number(share, scale, title) for share, title in zip(line, told, strict=True)]
        lines.append([Cell(name, _LABEL), *cells, Cell(_movers(paths, column, layer), _side())])
    legend = (
        "rows: the residual stream before each layer; numbers: percent of the score that stand at a position there, "
        f"{_vermilion(paths, column)}; heads: at most three of a layer that carry {_NOTABLE:.0%} or more, and where "
        "they write"
    )
    return markup.joined(_scrolled(markup.rows(lines)), tag("div", SMALL, legend))


def live_flow(paths: "Paths") -> LiveView:
    """circuitsvis' view of activations, with depths for layers and source tokens for neurons.

    Departure: circuitsvis colours by the largest number in sight, and it has no heads. Which of them move the influence
    stands in the static picture.

    Raises:
        ValueError: for more than 160,000 numbers.
    """
    assert paths.stream is not None
    require_drawable(paths.stream.numel())
    scores = paths.scores.where(paths.scores != 0, torch.ones_like(paths.scores)).abs()
    shares = (paths.stream / scores).permute(1, 0, 2)
    props = {
        "tokens": [isolated(shortened(text)) for text in paths.str_tokens],
        "activations": [[[round(one, 4) for one in line] for line in rows] for rows in shares.tolist()],
        "firstDimensionName": "before layer",
        "secondDimensionName": "from token",
        "firstDimensionLabels": _depths(paths.stream_layers),
        "secondDimensionLabels": [f"{visible(paths.str_tokens[i])} ({i})" for i in paths.positions],
    }
    about = f"TextNeuronActivations: where the influence of {len(paths.positions)} tokens stands before each layer"
    column = paths.column()
    legend = "colour: which part of a source token's score stands at each token before a layer; red works against it"
    static = markup.joined(_from(paths, column), _flow(paths, column))
    return LiveView(
        "TextNeuronActivations",
        props,
        static,
        lambda live: _framed(paths, live, tag("div", SMALL, legend)),
        about,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Parts of a card


def _card(paths: "Paths", column: int, *parts: str) -> Html:
    return _framed(paths, _from(paths, column), *parts)


def _from(paths: "Paths", column: int) -> Html:
    """The source token and its score."""
    position = paths.positions[column]
    source = markup.chip(paths.str_tokens[position])
    return tag(
        "div",
        "margin:6px 0 10px",
        "from ",
        source,
        f" at position {position}: score {paths.scores[column].item():.3g} {paths.unit}",
    )


def _framed(paths: "Paths", *parts: str) -> Html:
    ends = tag("div", SMALL, f"{paths.model} · {paths.dtype} · {paths.wrt} → {paths.of} · by {paths.by}")
    asked = markup.about(f"{paths.quantity or 'the prediction'} after", paths.str_tokens[: paths.position + 1])
    return markup.card(paths.question, asked, ends, *parts, notes=paths.notes, width="max-content")


def _size(paths: "Paths", column: int) -> float:
    """What shares are parts of: the size of the source token's score. So a share has the sign of its value."""
    return abs(paths.scores[column].item()) or 1.0


def _vermilion(paths: "Paths", column: int) -> str:
    """What a negative share means."""
    if paths.scores[column] < 0:
        return "vermilion ones are below zero, as the score is"
    return "vermilion ones work against it"


def _scrolled(table: Html) -> Html:
    return tag("div", "overflow-x:auto;max-width:100%", table)


def _number(share: float, scale: Scale, title: str) -> Cell:
    strength = scale.strength(share)
    percent = f"{100 * share:z.0f}"
    shown = percent if percent != "0" else ""
    ground = f"background-color:{color(strength)};color:{text_color(strength)};border:1px solid #ffffff"
    return Cell(tag("div", "min-height:15px", shown, title=title), f"{_NUMBER};{ground}")


def _side() -> str:
    return f"padding:0 0 0 12px;line-height:15px;font-size:11px;white-space:normal;color:{MUTED}"


def _movers(paths: "Paths", column: int, layer: int) -> Html:
    """The heads of a layer that carry a notable part, the largest first."""
    if layer not in paths.layers:
        return Html()
    of_layer = paths.at(layer).top(3, token=paths.positions[column])
    told = []
    for row in of_layer:
        if abs(row.share) >= _NOTABLE:
            tone = "#0072b2" if row.value >= 0 else "#b34700"
            where = f" → {visible(row.at)}" if row.at is not None else ""
            style = f"color:{tone};margin-right:10px;display:inline-block;white-space:nowrap"  # on a phone they wrap
            told.append(tag("span", style, f"{row.name}{where} {row.share:.0%}"))
    return markup.joined(*told)


def _first(paths: "Paths", column: int) -> Html:
    """The components that carry most, as a table."""
    rows = paths.top(8, token=paths.positions[column])
    heading = "Where most of it stands" if paths.by == "position" else "Carried most"
    names = ("component", "value", "share") if rows[0].at is None else ("component", "at", "value", "share")
    lines = [
        ([row.name, *([] if row.at is None else [visible(row.at)]), f"{row.value:.3g}"], row.share) for row in rows
    ]
    return markup.table(heading, names, lines, color(1.0))


# ---------------------------------------------------------------------------------------------------------------------
# What is drawn


def _positions(shares: Float[Tensor, "layer position"], source: int) -> list[int]:
    """The positions that the flow picture shows, in their order: the source, the end, and where most passes."""
    last = shares.shape[1] - 1
    largest = shares.abs().amax(0)
    order = largest.sort(descending=True, stable=True).indices.tolist()
    kept = [source, last, *(i for i in order if i not in (source, last) and largest[i] >= 0.02)]
    return sorted(set(kept[:_COLUMNS]))


def _grid(paths: "Paths", column: int) -> _Grid | None:
    """The shares as a matrix; None by "neuron"."""
    if paths.by == "neuron":
        return None
    shares = (paths.values[..., column] / _size(paths, column)).flatten(1)
    labels: Sequence[str]
    names = [f"L{layer}" for layer in paths.layers]
    if paths.by == "position":
        labels, what = [shortened(text, 10) for text in paths.str_tokens], "position"
        names = _depths(paths.layers)
    else:
        size = paths.values.shape[1:-1]
        places = [tuple(int(j) for j in torch.unravel_index(torch.tensor(i), size)) for i in range(size.numel())]
        labels = [paths.name(0, *place).removeprefix("L0").strip() for place in places]
        what = " ".join(paths.axis_names[1:-1])
    return _Grid(shares, names, list(labels), ("before layer" if paths.by == "position" else "layer", what))


def _depths(layers: Sequence[int]) -> list[str]:
    """The layers before which the stream stands, and "end" behind the last one; a layer by itself has its name."""
    return [*(f"L{layer}" for layer in layers[:-1]), "end"] if len(layers) > 1 else [f"L{layers[0]}"]
