"""Pictures of a `SinkReport`: a static card, a heat map of layers and heads, and circuitsvis' attention heads."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tl_scopes.views import attention as attention_views
from tl_scopes.views import heat_map, markup
from tl_scopes.views.figure import shortened
from tl_scopes.views.live import LiveView
from tl_scopes.views.markup import MUTED, SMALL, Cell, Html, boxed, chip, joined, rows, tag
from tl_scopes.views.palette import Scale

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tl_scopes.diagnostics.sink_report import SinkReport

_SCALE = Scale(1.0)  # the same in every picture: attention is a part of a whole
_LEGEND = "colour: square root of the attention that a token draws from a later one, on average over all heads"
_COLUMNS = "value norm: that of what the heads with a sink there write from the token, over the other tokens' median"
_SHOWN = 6
_CHANGES = ("removed", "masked", "replaced", "zeroed")  # the report's interventions, in its order


def plot(report: "SinkReport", position: int | None = None) -> "Figure":
    """A heat map of how much attention one token draws in each layer and head."""
    tokens = len(report.tokens)
    if position is None:
        position = report.sink_heads[0].position if report.sink_heads else 0
    if not -tokens <= position < tokens:
        raise ValueError(f"position {position} is out of range: the report is about {tokens} tokens.")
    layers, heads, _ = report.mass.shape
    return heat_map.heat_map(
        report.mass[..., position],
        _SCALE,
        [str(layer) for layer in range(layers)],
        [str(head) for head in range(heads)],
        names=("layer", "head", "attention"),
        title=f"{shortened(report.str_tokens[position])} (position {position % tokens})",
    )


def attention(report: "SinkReport", patterns: Mapping[tuple[int, int], Tensor], title: str) -> LiveView:
    """circuitsvis' attention heads, for the attention patterns [query key] of some layers and heads.

    Raises:
        ValueError: for no patterns, or for more than a browser can draw.
    """
    if not patterns:
        raise ValueError(
            f"no patterns of {len(report.tokens)} tokens can be drawn: make the report of a shorter prompt, or see "
            "plot(), which needs none."
        )
    names = [f"L{layer}H{head}" for layer, head in patterns]
    # In half precision rows sum to one only roughly.
    values = torch.stack(list(patterns.values())).clamp(0, 1)
    return attention_views.attention_heads_view(values, report.str_tokens, names, title=title)


def fragment(report: "SinkReport") -> Html:
    """A static card, to be put into another page: the prompt coloured by attention, and a table of the first tokens."""
    token, p = report.prediction
    heads = [
        ([f"{head.layer}", f"{head.head}", f"{head.position}", chip(head.token), f"{head.value_norm:.2g}"], head.mass)
        for head in report.sink_heads[:_SHOWN]
    ]
    columns = ("layer", "head", "position", "token", "value norm", "attention")
    heading = f"Strongest sinks, {len(heads)} of {len(report.sink_heads)}"
    none = tag("div", f"{SMALL};margin-top:12px", f"no head has a sink above {report.threshold:.0%}")
    about = (
        f"{report.model} · {len(report.tokens)} token{'s' * (len(report.tokens) > 1)} · predicts ",
        boxed(token.text),
        f" ({p:.0%})",
    )
    return markup.card(
        "Attention sinks",
        tag("div", SMALL, *about),
        tag("div", "font-size:16px;line-height:2;margin:14px 0 4px", _prompt(report)),
        tag("div", SMALL, _LEGEND),
        _table(report),
        tag("div", SMALL, _COLUMNS),
        markup.table(heading, columns, heads, markup.BAR) or none,
        notes=report.notes,
        width="max-content",
    )


def _prompt(report: "SinkReport") -> Html:
    """The prompt, each token on the colour of the attention that it draws."""
    parts: list[Html] = []
    for i, (text, mass) in enumerate(zip(report.str_tokens, report.mean_mass.tolist(), strict=True)):
        if text[:1].isspace():
            parts.append(tag("wbr"))
        parts.append(chip(text, _SCALE.strength(mass), f"position {i}: {text!r}\nattention {mass:.1%}"))
    return tag("div", "max-width:820px", *parts)


def _table(report: "SinkReport") -> Html:
    """One row for each early token: its attention, its shares, and what becomes of the prediction without it."""
    right, muted = "text-align:right", f"color:{MUTED}"
    centred = f"text-align:center;{muted};border-bottom:1px solid #d8dee4"
    shares, changes = list(report.answers), list(_CHANGES)
    # The name of a scope stands in several lines, or it would push the last columns out of sight.
    named = f"{right};white-space:normal;overflow-wrap:anywhere;min-width:90px"
    names = ["position", "token", "heads with a sink", "value norm", "attention", "uniform", *shares, *changes]
    styles = ["text-align:left" if i == 1 else right for i in range(len(names))]
    groups = [
        Cell("", columns=6),
        Cell("share of the influence", centred, len(shares)),
        Cell("change of the prediction, nats", centred, len(changes)),
    ]
    lines = [
        [group for group in groups if group.columns],
        [
            Cell(name, f"{named if name in shares else style};{muted};vertical-align:bottom")
            for name, style in zip(names, styles, strict=True)
        ],
    ]
    for row in report.to_dataframe().to_dict("records"):
        i = row["position"]
        cells = [f"{i}", chip(row["token"], _SCALE.strength(row["attention"])), f"{row['sink_heads']}"]
        cells += [_number(row["value_norm"]), f"{row['attention']:.1%}", f"{row['uniform']:.1%}"]
        cells += [f"{row[f'share {name}']:.1%}" for name in report.answers]
        cells += [
            joined(_number(row[f"kl_{name}"]), _instead(report, texts[i]))
            for name, texts in zip(_CHANGES, report.likeliest, strict=True)
        ]
        lines.append(list(map(Cell, cells, styles)))
    # No number is broken: a narrow card scrolls instead.
    return tag("div", "margin:12px 0 0;font-size:12px;overflow-x:auto;overflow-wrap:normal", rows(lines))


def _instead(report: "SinkReport", text: str) -> Html:
    """The token that is then the most likely one, where that is another."""
    is_another = text not in ("", report.prediction.token.text)
    return joined(" ", boxed(text, arrow="→")) if is_another else Html()


def _number(value: float) -> str:
    return f"{value:.2g}" if value == value else "–"
