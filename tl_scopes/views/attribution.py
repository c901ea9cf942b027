"""Pictures of an `Attribution`: a static card that works everywhere, and circuitsvis' tokens for a live notebook."""

from typing import TYPE_CHECKING

from tl_scopes.views import markup
from tl_scopes.views.live import LiveView, Written, as_html
from tl_scopes.views.markup import Cell, Html, boxed, chip, joined, rows, table, tag, visible
from tl_scopes.views.palette import Scale, color

if TYPE_CHECKING:
    from tl_scopes.results.attribution import Attribution


def strengths(attribution: "Attribution") -> list[float]:
    """How strongly to colour each token: 0 for a score of zero, 1 for the strongest; negative where the score is."""
    scores = attribution.scores.tolist()
    return list(map(Scale.of(scores).strength, scores))


def page(attribution: "Attribution", *below: str) -> Html:
    """The static card as a complete page, without script or network. Other cards may stand below."""
    return markup.page(attribution.scope, fragment(attribution), *below)


def fragment(attribution: "Attribution") -> Html:
    """The static card, to be put into another page."""
    return _card(attribution, running_text(attribution))


def colored_tokens(attribution: "Attribution") -> LiveView:
    """circuitsvis' coloured tokens for a live notebook; a tooltip tells the score."""
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


def running_text(answer: "Attribution", *, marks: bool = True) -> Html:
    """The prompt, each token on its colour; `marks` write the share beside a token whose score is over the scale."""
    parts: list[Html] = []
    before = ""
    scores, shares = answer.scores.tolist(), answer.share.tolist()
    scale = Scale.of(scores)
    lines = zip(answer.positions, answer.str_tokens, answer.tokens.tolist(), scores, shares, strict=True)
    for position, text, id, score, share in lines:
        is_target = answer.target is not None and id == answer.target.id
        about = f"{text!r}, id {id}" + (", the token explained" if is_target else "")
        title = f"position {position}: {about}\nscore {score:.3g} {answer.unit}\nshare {share:.1%}"
        # Lines break between words, and after every newline, within a token too.
        if text[:1].isspace() or not before[-1:].isalnum():
            parts.append(tag("wbr"))
        *ended, last = text.split("\n")
        for line in ended:
            parts += [chip(line + "\n", scale.strength(score), title, "", is_target), tag("br")]
        mark = _mark(scale, score, share) if marks else ""
        if last or mark or not ended:
            parts.append(chip(last, scale.strength(score), title, mark, is_target))
        before = text
    return joined(*parts)


def about(answer: "Attribution") -> str:
    """The model, the hooks and the position of the answer, as plain text."""
    return f"{answer.model} · {answer.dtype} · {answer.wrt} → {answer.of} · predicts after position {answer.position}"


def explains(answer: "Attribution") -> Html:
    """The tokens that the answer explains; empty where it is about the whole prediction."""
    named = [boxed(token.text) for token in (answer.target, answer.versus) if token is not None]
    return joined("explains ", joined(*named, by=" against ")) if named else Html()


def next_token(answer: "Attribution") -> Html:
    """An arrow to the token explained, or to the most likely one."""
    if answer.target is not None:
        return joined(tag("wbr"), boxed(answer.target.text, "the token explained", arrow="→"))
    if answer.predictions:
        likeliest = answer.predictions[0].token.text
        return joined(tag("wbr"), boxed(likeliest, "the most likely next token", "dashed", arrow="→"))
    return Html()


def _card(answer: "Attribution", tokens: Html) -> Html:
    scale = Scale.of(answer.scores.tolist())
    top = [([str(i), chip(text, scale.strength(s)), f"{s:.3g}"], share) for i, text, s, share in answer.top()]
    heading = f"Most influential tokens, {len(top)} of {len(answer.scores)}"
    predictions = [([str(token.id), chip(token.text)], probability) for token, probability in answer.predictions]
    return markup.card(
        answer.scope,
        tag("div", markup.SMALL, joined(explains(answer), about(answer), by=" · ")),
        tag("div", "font-size:16px;line-height:2;margin:14px 0 12px", tokens, next_token(answer)),
        _legend(answer, scale),
        table(heading, ("position", "token", "score", "share"), top, color(1.0)),
        table("Most likely next tokens", ("id", "token", "probability"), predictions, markup.BAR),
        notes=answer.notes,
    )


def _legend(answer: "Attribution", scale: Scale) -> Html:
    scores = answer.scores.tolist()
    if scale.end == 0:
        return tag("div", markup.SMALL, f"every score is 0, in {answer.unit}")
    low = -1.0 if min(scores) < 0 else 0.0
    hues = [color(scale.top * (low + (1 - low) * (i + 0.5) / 24)) for i in range(24)]
    bar = [tag("span", f"display:inline-block;padding:6px 4.5px;background-color:{hue}") for hue in hues]
    ticks = zip(("left", "center", "right"), (low, (low + 1) / 2, 1.0), strict=True)
    numbers = [
        Cell(f"{scale.score(scale.top * tick):.3g}", f"text-align:{side};width:72px;padding:0") for side, tick in ticks
    ]
    drawn = tag("div", "line-height:0;white-space:nowrap", *bar), rows([numbers])
    said = [f"score in {answer.unit}", tag("br"), "colour: square root of the score"]
    if scale.top < 1:
        said += ["; ", chip("▲", 1.0), f" over the scale, up to {max(scores, key=abs):.3g}, with its share"]
    beside = "display:inline-block;vertical-align:middle"  # or below, in a narrow card
    return tag(
        "div",
        "font-size:12px;line-height:1.6",
        tag("div", f"{beside};margin-right:14px", *drawn),
        tag("div", f"{beside};color:{markup.MUTED}", *said),
    )


def _mark(scale: Scale, score: float, share: float) -> str:
    return f"▲{share:.1%}" if scale.is_over(score) else ""
