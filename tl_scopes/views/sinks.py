"""Pictures of a `SinkReport`: a static card, a heat map over layers and heads, circuitsvis' attention heads."""

from html import escape
from typing import TYPE_CHECKING

import torch

from tl_scopes import models
from tl_scopes.diagnostics.sink_report import INTERVENTIONS, SinkReport
from tl_scopes.models import Model
from tl_scopes.views import attention as attention_views
from tl_scopes.views import heat_map, markup
from tl_scopes.views.live import LiveView
from tl_scopes.views.markup import MUTED, SMALL, boxed, chip, rows, tag
from tl_scopes.views.palette import Scale

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SCALE = Scale(1.0)  # the same in every picture: attention is a part of a whole
_LEGEND = "colour: square root of the attention that a token draws from a later one, on average over all heads"
_COLUMNS = "value norm: of what the heads with a sink there write from the token, over the other tokens' median"
_SHOWN = 6


def plot(report: SinkReport, position: int | None = None) -> "Figure":
    """The mass of one token in each layer and head."""
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
        title=f"{heat_map.shortened(report.str_tokens[position])} (position {position % tokens})",
    )


def attention(report: SinkReport, layer: int | None = None, model: Model | None = None) -> LiveView:
    """The patterns of the strongest sink heads, or of a layer."""
    patterns = dict(report.patterns) if layer is None else _of_layer(report, layer, model)
    if not patterns:
        raise ValueError(
            f"no patterns of {len(report.tokens)} tokens can be drawn: make the report of a shorter prompt, or see "
            "plot(), which needs none."
        )
    names = [f"L{layer}H{head}" for layer, head in patterns]
    title = "Heads with the strongest sinks" if layer is None else f"Heads of layer {layer}"
    # Rounding in half precision: rows sum to one only roughly.
    values = torch.stack(list(patterns.values())).clamp(0, 1)
    return attention_views.attention_heads_view(values, report.str_tokens, names, title=title)


def fragment(report: SinkReport) -> str:
    """A static card: the prompt coloured by attention, and a table of the first tokens."""
    token, p = report.prediction
    about = f"{report.model} · {len(report.tokens)} tokens · predicts {boxed(token.text)} ({p:.0%})"
    heads = [
        [f"{head.layer}", f"{head.head}", f"{head.position}", chip(head.token), f"{head.value_norm:.2g}"]
        for head in report.sink_heads[:_SHOWN]
    ]
    columns = ("layer", "head", "position", "token", "value norm", "attention")
    heading = f"Strongest sinks, {len(heads)} of {len(report.sink_heads)}"
    strongest = [(cells, head.mass) for cells, head in zip(heads, report.sink_heads, strict=False)]
    none = tag("div", f"{SMALL};margin-top:12px", f"no head has a sink above {report.threshold:.0%}")
    return markup.card(
        "Attention sinks",
        tag("div", SMALL, about),
        tag("div", "font-size:16px;line-height:2;margin:14px 0 4px", _prompt(report)),
        tag("div", SMALL, _LEGEND),
        _table(report),
        tag("div", SMALL, _COLUMNS),
        markup.table(heading, columns, strongest, markup.BAR) or none,
        notes=report.notes,
        width="max-content",
    )


def _prompt(report: SinkReport) -> str:
    """The prompt, each token on the colour of the attention that it draws."""
    html = ""
    for i, (text, mass) in enumerate(zip(report.str_tokens, report.mean_mass.tolist(), strict=True)):
        html += "<wbr>" if text[:1].isspace() else ""
        html += chip(text, _SCALE.strength(mass), f"position {i}: {text!r}\nattention {mass:.1%}")
    return tag("div", "max-width:820px", html)


def _table(report: SinkReport) -> str:
    """One row per early token: attention, shares, what becomes of the prediction."""
    right, group = "text-align:right", f"text-align:center;color:{MUTED};border-bottom:1px solid #d8dee4"
    shares, changes = [escape(name) for name in report.answers], list(INTERVENTIONS)
    names = ["position", "token", "heads with a sink", "value norm", "attention", "uniform", *shares, *changes]
    lines = [[(f"{right if name != 'token' else 'text-align:left'};color:{MUTED}", name) for name in names]]
    for row in report.to_dataframe().to_dict("records"):
        i = row["position"]
        cells = [str(i), chip(row["token"], _SCALE.strength(row["attention"])), f"{row['sink_heads']}"]
        cells += [_number(row["value_norm"]), f"{row['attention']:.1%}", f"{row['uniform']:.1%}"]
        cells += [f"{row[f'share {name}']:.1%}" for name in report.answers]
        cells += [
            _number(row[f"kl_{name}"]) + _instead(report, texts[i])
            for name, texts in zip(INTERVENTIONS, report.likeliest, strict=True)
        ]
        lines.append([(right if name != "token" else "", cell) for name, cell in zip(names, cells, strict=True)])
    groups = ((6, ""), (len(shares), "share of the influence"), (len(changes), "change of the prediction, nats"))
    head = "".join(f'<td colspan="{n}" style="{group if name else "border:0"}">{name}</td>' for n, name in groups)
    table = rows(lines).replace("<tr", f"<tr>{head}</tr><tr", 1)
    whole = "overflow-wrap:normal;white-space:nowrap"  # no number is broken: a narrow cell scrolls instead
    return tag("div", f"margin:12px 0 0;font-size:12px;overflow-x:auto;{whole}", table)


def _instead(report: SinkReport, text: str) -> str:
    """Another token that is the most likely one then."""
    return f" {boxed(text, arrow='→')}" if text not in ("", report.prediction.token.text) else ""


def _number(value: float) -> str:
    return f"{value:.2g}" if value == value else "–"


def _of_layer(report: SinkReport, layer: int, model: Model | None) -> dict[tuple[int, int], torch.Tensor]:
    layers = len(report.mass)
    if not 0 <= layer < layers:
        raise ValueError(f"there is no layer {layer}: the model has layers 0 to {layers - 1}.")
    if model is None:
        raise ValueError(
            f"the report keeps the patterns of the strongest sink heads alone: show({layer}, model) runs the model "
            "again for those of a layer."
        )
    models.check_model(model)
    tokens = report.tokens.to(next(model.parameters()).device)
    pattern = next(each.pattern for each in models.attention_layers(model, tokens) if each.layer == layer)
    pattern = pattern.cpu().to(report.mass.dtype)
    after = torch.arange(len(tokens) - 1, -1, -1).clamp(min=1)
    if pattern.shape[0] != report.mass.shape[1] or not torch.allclose(
        pattern.tril(-1).sum(1) / after, report.mass[layer], atol=1e-2
    ):
        raise ValueError(
            f"layer {layer} of {models.model_name(model)!r} attends otherwise than the report says: give the model of "
            "the report, under the same hooks."
        )
    return {(layer, head): one for head, one in enumerate(pattern)}
