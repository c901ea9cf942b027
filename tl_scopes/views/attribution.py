"""Pictures of an `Attribution`: a static card that works everywhere, and circuitsvis' tokens for a live notebook."""

from html import escape

from tl_scopes.results.attribution import Attribution
from tl_scopes.views import markup
from tl_scopes.views.live import LiveView, Written, as_html
from tl_scopes.views.markup import boxed, chip, rows, table, tag, visible
from tl_scopes.views.palette import Scale, color


def strengths(attribution: Attribution) -> list[float]:
    """How strongly to colour each token: 0 for a score of zero, 1 for the strongest; negative where the score is."""
    scores = attribution.scores.tolist()
    return list(map(Scale.of(scores).strength, scores))


def page(attribution: Attribution, *below: str) -> str:
    """A complete page: no script, no network. Other cards may stand below."""
    return markup.page(attribution.scope, "\n".join([fragment(attribution), *below]))


def fragment(attribution: Attribution) -> str:
    """The same for a place in another page."""
    return _card(attribution, running_text(attribution))


def colored_tokens(attribution: Attribution) -> LiveView:
    """circuitsvis' coloured tokens for a live notebook; in a tooltip is the score."""
    scores, shares = attribution.scores.tolist(), attribution.share.tolist()
    scale, tokens, values = Scale.of(scores), [], []
    for text, score, share in zip(attribution.str_tokens, scores, shares, strict=True):
        tokens.append(as_html(visible(text) + _mark(scale, score, share)) + "\n" * text.count("\n"))
        values.append(Written(scale.strength(score), f"{score:.3g} {attribution.unit}, {share:.1%}"))
    props = {"tokens": tokens, "values": values, "minValue": -1, "maxValue": 1}
    props |= {"positiveColor": color(1.0), "negativeColor": color(-1.0)}
    return LiveView(
        "ColoredTokens", props, running_text(attribution), lambda live: _card(attribution, live), repr(attribution)
    )


def running_text(answer: Attribution, *, marks: bool = True) -> str:
    """The prompt, each token on its colour; `marks` write the share beside what lies over the scale."""
    html, before = "", ""
    scores, shares = answer.scores.tolist(), answer.share.tolist()
    scale = Scale.of(scores)
    lines = zip(answer.positions, answer.str_tokens, answer.tokens.tolist(), scores, shares, strict=True)
    for position, text, id, score, share in lines:
        is_target = answer.target is not None and id == answer.target.id
        about = f"{text!r}, id {id}" + (", the token explained" if is_target else "")
        title = f"position {position}: {about}\nscore {score:.3g} {answer.unit}\nshare {share:.1%}"
        # Lines break between words, and after every newline, within a token too.
        html += "<wbr>" if text[:1].isspace() or not before[-1:].isalnum() else ""
        *ended, last = text.split("\n")
        html += "".join(chip(line + "\n", scale.strength(score), title, "", is_target) + "<br>" for line in ended)
        mark = _mark(scale, score, share) if marks else ""
        html += chip(last, scale.strength(score), title, mark, is_target) if last or mark or not ended else ""
        before = text
    return html


def about(answer: Attribution) -> str:
    """Where it was asked."""
    return f"{answer.model} · {answer.dtype} · {answer.wrt} → {answer.of} · predicts after position {answer.position}"


def explains(answer: Attribution) -> str:
    """What it explains, as HTML; empty where that is the whole prediction."""
    named = [boxed(token.text) for token in (answer.target, answer.versus) if token is not None]
    return f"explains {' against '.join(named)}" if named else ""


def next_token(answer: Attribution) -> str:
    """An arrow to the token explained, or to the most likely one."""
    if answer.target is not None:
        return boxed(answer.target.text, "the token explained", arrow="→")
    if answer.predictions:
        return boxed(answer.predictions[0].token.text, "the most likely next token", "dashed", arrow="→")
    return ""


def _card(answer: Attribution, tokens: str) -> str:
    scale = Scale.of(answer.scores.tolist())
    top = [([str(i), chip(text, scale.strength(s)), f"{s:.3g}"], share) for i, text, s, share in answer.top()]
    heading = f"Most influential tokens, {len(top)} of {len(answer.scores)}"
    predictions = [([str(token.id), chip(token.text)], probability) for token, probability in answer.predictions]
    return markup.card(
        answer.scope,
        tag("div", markup.SMALL, " · ".join(filter(None, (explains(answer), escape(about(answer)))))),
        tag("div", "font-size:16px;line-height:2;margin:14px 0 12px", tokens + next_token(answer)),
        _legend(answer, scale),
        table(heading, ("position", "token", "score", "share"), top, color(1.0)),
        table("Most likely next tokens", ("id", "token", "probability"), predictions, markup.BAR)
        if predictions
        else "",
        notes=answer.notes,
    )


def _legend(answer: Attribution, scale: Scale) -> str:
    unit, scores = escape(answer.unit), answer.scores.tolist()
    if scale.end == 0:
        return tag("div", markup.SMALL, f"every score is 0, in {unit}")
    low = -1.0 if min(scores) < 0 else 0.0
    hues = [color(scale.top * (low + (1 - low) * (i + 0.5) / 24)) for i in range(24)]
    bar = "".join(tag("span", f"display:inline-block;padding:6px 4.5px;background-color:{hue}", "") for hue in hues)
    ticks = zip(("left", "center", "right"), (low, (low + 1) / 2, 1.0), strict=True)
    numbers = [
        (f"text-align:{side};width:72px;padding:0", f"{scale.score(scale.top * tick):.3g}") for side, tick in ticks
    ]
    drawn = tag("div", "line-height:0;white-space:nowrap", bar) + rows([numbers])
    said = f"score in {unit}<br>colour: square root of the score"
    if scale.top < 1:
        said += f"; {chip('▲', 1.0)} over the scale, up to {max(scores, key=abs):.3g}, with its share"
    return tag("div", "font-size:12px", rows([[("", drawn), (f"text-align:left;color:{markup.MUTED}", said)]]))


def _mark(scale: Scale, score: float, share: float) -> str:
    return f"▲{share:.1%}" if scale.is_over(score) else ""
