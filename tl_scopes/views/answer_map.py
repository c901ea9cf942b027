"""Pictures of an `AnswerMap` and of what `AnswerMap.traced` found: a heat map of answer by prompt, and a card."""

from typing import TYPE_CHECKING

from tl_scopes.views import attribution, attribution_map, markup
from tl_scopes.views.figure import embedded, shortened
from tl_scopes.views.markup import Html, table
from tl_scopes.views.palette import Colors, color

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tl_scopes.answers import AnswerMap
    from tl_scopes.results.traced import Traced


def plot(rows: "AnswerMap", colors: Colors = "root") -> "Figure":
    """A heat map of the shares: the answer from top to bottom; prompt and earlier answer from left to right, with a
    line between them.
    """
    labels = [shortened(text) for text in rows.answer_labels]
    names = "answer", "prompt | answer", "share of the scores"
    figure = attribution_map.figure(rows.map, rows=labels, names=names, colors=colors)
    if rows.prompt_length < len(rows.str_tokens):
        figure.axes[0].axvline(rows.prompt_length - 0.5, color=markup.INK, linewidth=1)
    return figure


def page(rows: "AnswerMap", colors: Colors = "root") -> Html:
    """The static card as a complete page, without script or network."""
    last = rows.answers[-1]
    return markup.page(last.question, fragment(rows, colors), footer=last.provenance)


def fragment(rows: "AnswerMap", colors: Colors = "root") -> Html:
    """The static card, to be put into another page."""
    strongest = rows.top(1)
    told = ""
    if strongest:
        (one,) = strongest
        told = f" The largest share, {one.share:.0%}, is that of {one.token!r} in {one.answer_token!r}."
    alt = f"Heat map of {len(rows)} parts of an answer by {len(rows.str_tokens)} of prompt and answer.{told}"
    return attribution_map.card(rows.map, embedded(plot(rows, colors), alt), colors)


def traced_page(traced: "Traced") -> Html:
    """The static card of a trace as a complete page, without script or network."""
    return markup.page(traced.answer.question, traced_fragment(traced), footer=traced.answer.provenance)


def traced_fragment(traced: "Traced") -> Html:
    """The prompt coloured by what arrives at each token, and how much arrives at each hop."""
    weights = traced.hops.sum(1).tolist()
    # The last hops of a long answer bring nothing that a number shows.
    shown = max((hop for hop, weight in enumerate(weights, start=1) if abs(weight) >= 0.0005), default=len(weights))
    shown = len(weights) if shown == len(weights) - 1 else shown
    lines = [([str(hop)], weight) for hop, weight in enumerate(weights[:shown], start=1)]
    lines += [([f"{shown + 1} to {len(weights)}"], sum(weights[shown:]))] if len(weights) > shown else []
    lines += [(["left in the answer"], traced.left)] if traced.left else []
    return attribution.fragment(
        traced.answer, table("What arrives at the prompt", ("hop", "weight"), lines, color(1.0))
    )
