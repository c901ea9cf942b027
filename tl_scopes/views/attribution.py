"""Pictures of an `Attribution`: a static card that works everywhere, and circuitsvis' tokens for a live notebook."""

from collections.abc import Collection, Iterator
from dataclasses import replace
from math import floor, log10
from typing import TYPE_CHECKING, NamedTuple

from tl_scopes.views import bars, markup
from tl_scopes.views.figure import shortened
from tl_scopes.views.live import MOST_TOKENS, LiveView, Written, as_html, require_drawable
from tl_scopes.views.markup import Cell, Html, boxed, chip, joined, rows, table, tag, visible
from tl_scopes.views.palette import COLORS, Colors, Scale, color, require_colors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tl_scopes.results.attribution import Attribution


def strengths(attribution: "Attribution", colors: Colors = "root") -> list[float]:
    """How strongly to colour each token: 0 for a score of zero, 1 for the strongest; negative where the score is."""
    scale = scale_of(attribution, colors)
    return [
        scale.strength(score) if counted else 0.0
        for score, counted in zip(attribution.scores.tolist(), attribution.is_counted, strict=True)
    ]


def scale_of(attribution: "Attribution", colors: Colors = "root") -> Scale:
    """The scale of the scores that count."""
    require_colors(colors)
    pairs = zip(attribution.scores.tolist(), attribution.is_counted, strict=True)
    return Scale.of((score for score, counted in pairs if counted), colors)


def plot(attribution: "Attribution", colors: Colors = "root") -> "Figure":
    """A bar for each token, as high as its share; tokens that do not count have none."""
    return bars.bars(
        attribution.share.tolist(),
        strengths(attribution, colors),
        [shortened(text) for text in attribution.labels],
        names=("token", "share of the scores"),
        title=attribution.question,
    )


def page(attribution: "Attribution", *below: str, colors: Colors = "root") -> Html:
    """The static card as a complete page, without script or network. Other cards may stand below."""
    card = fragment(attribution, colors=colors)
    return markup.page(attribution.question, card, *below, footer=attribution.provenance)


def fragment(attribution: "Attribution", *tables: Html, colors: Colors = "root") -> Html:
    """The static card, to be put into another page. Other tables may stand beside its own."""
    return _card(attribution, running_text(attribution, colors=colors), *tables, colors=colors)


def colored_tokens(attribution: "Attribution") -> LiveView:
    """circuitsvis' coloured tokens for a live notebook, as the static card draws them; a tooltip tells the score.

    Raises:
        ValueError: for more than 4,000 tokens.
    """
    require_drawable(len(attribution.scores), MOST_TOKENS, "tokens")
    return replace(
        live_text(attribution), frame=lambda live: _card(attribution, live), about=f"ColoredTokens: {attribution!r}"
    )


class _Shown(NamedTuple):
    """A token as pictures show it."""

    text: str
    breaks: bool
    """Whether a line may end before it."""
    strength: float | None
    """How strongly it is coloured; None where it does not count."""
    about: str
    told: str
    """Its score and share."""
    mark: str
    """Its share, where its score lies over the scale."""
    outlined: bool
    """Whether it is a token that is explained."""
    underlined: bool


def running_text(
    answer: "Attribution", *, marks: bool = True, underlined: Collection[int] = (), colors: Colors = "root"
) -> Html:
    """The prompt, each token on its colour; `marks` write the share beside a token whose score is over the scale.

    Tokens at the `underlined` positions differ from those of another prompt.
    """
    parts: list[Html] = []
    for token in _shown(answer, marks=marks, underlined=underlined, colors=colors):
        title = f"{token.about}\n{token.told}"
        # Lines break between words, and after every newline, within a token too.
        if token.breaks:
            parts.append(tag("wbr"))
        *ended, last = token.text.split("\n")
        for line in ended:
            parts += [chip(line + "\n", token.strength, title, "", token.outlined, token.underlined), tag("br")]
        if last or token.mark or not ended:
            parts.append(chip(last, token.strength, title, token.mark, token.outlined, token.underlined))
    return joined(*parts)


def live_text(
    answer: "Attribution", *, marks: bool = True, underlined: Collection[int] = (), colors: Colors = "root"
) -> LiveView:
    """The same as circuitsvis' coloured tokens.

    Departure: circuitsvis has one look for a light ground. Each token gets the style of its chip instead.
    """
    shown = list(_shown(answer, marks=marks, underlined=underlined, colors=colors))
    breaks = [*(token.breaks for token in shown[1:]), False]
    # After a space without width a line may break.
    texts = (
        as_html(visible(token.text) + token.mark) + "\u200b" * ended + "\n" * token.text.count("\n")
        for token, ended in zip(shown, breaks, strict=True)
    )
    rules = [(".colored-tokens", "display:inline;padding:0")]
    for i, token in enumerate(shown, start=1):
        style = markup.chip_style(token.strength, token.outlined, token.underlined)
        at = f".colored-tokens>span:nth-of-type({i})>span"
        rules.append((at, f"display:inline;line-height:inherit;border:0;{style}"))
    props = {
        "tokens": list(texts),
        "values": [Written(token.strength or 0.0, token.told.replace("\n", ", ")) for token in shown],
        "minValue": -1,
        "maxValue": 1,
        "positiveColor": color(1.0),
        "negativeColor": color(-1.0),
    }
    static = running_text(answer, marks=marks, underlined=underlined, colors=colors)
    return LiveView("ColoredTokens", props, static, rules=tuple(rules))


def _shown(answer: "Attribution", *, marks: bool, underlined: Collection[int], colors: Colors) -> Iterator[_Shown]:
    """The tokens one after another."""
    before = ""
    scores, shares = answer.scores.tolist(), answer.share.tolist()
    scale = scale_of(answer, colors)
    named = answer.target.ids if answer.target is not None and not answer.target.is_span else []
    spoken = answer.target is not None and answer.target.is_span
    parts_of = answer.parts or ("",) * len(scores)
    lines = zip(
        answer.positions,
        answer.str_tokens,
        answer.shown_tokens,
        answer.tokens.tolist(),
        scores,
        shares,
        parts_of,
        answer.is_counted,
        strict=True,
    )
    for position, own, text, id, score, share, part, counted in lines:
        said = spoken and position > answer.position  # it is a part of the answer explained
        about = f"{own!r}, id {id}" + (", the token explained" if id in named else ", of the answer explained" * said)
        about += f", {part}" if part else ""
        yield _Shown(
            text,
            text[:1].isspace() or not before[-1:].isalnum(),
            scale.strength(score) if counted else None,
            f"position {position}: {about}",
            f"score {score:.3g} {answer.unit}\n" + (f"share {share:.1%}" if counted else "not counted in shares"),
            _mark(scale, score, share) if marks and counted else "",
            id in named or said,
            position in underlined,
        )
        before = text


def about(answer: "Attribution") -> str:
    """The model, the hooks and the position of the answer, as plain text."""
    return f"{answer.model} · {answer.dtype} · {answer.wrt} → {answer.of} · predicts after position {answer.position}"


def explains(answer: "Attribution") -> Html:
    """The tokens that the answer explains; empty where it is about the whole prediction."""
    named = [boxed(token.text) for token in (answer.target, answer.versus) if token is not None]
    told = joined("explains ", joined(*named, by=" against ")) if named else Html()
    if answer.value is None or answer.quantity is None:
        return told
    value = f"{answer.quantity} = {answer.value:.4g}"
    return joined(told, value, by=" · ")


def sums(answer: "Attribution") -> str:
    """The parts that a value is made of, by name: the tokens that count, parts of the prompt that do not, tokens set
    aside, and what no token brings; empty for scores that are not parts of a value.
    """
    rest = next((name for name in ("biases", "gap") if name in answer.details), None)
    if answer.value is None or rest is None:
        return ""
    scores, left = answer.scores.double().tolist(), answer.details[rest]
    parts = {"tokens": sum(score for score, counted in zip(scores, answer.is_counted, strict=True) if counted)}
    for name in answer.uncounted:
        if name in answer.parts:
            parts[name] = sum(score for score, part in zip(scores, answer.parts, strict=True) if part == name)
    aside = answer.value - sum(scores) - left
    if abs(aside) > 1e-3 * (sum(map(abs, scores)) + abs(aside)):  # and not rounding
        parts["tokens set aside"] = aside
    around = rest == "biases" and answer.wrt != "hook_embed"
    parts["biases and what goes around the hook" if around else rest] = left
    size = max(abs(answer.value), *map(abs, scores))
    places = max(2, 2 - floor(log10(size))) if size else 2

    def written(number: float) -> str:
        return f"{round(number, places) + 0.0:.{places}f}"

    told = f"{' + '.join(f'{name} {written(part)}' for name, part in parts.items())} = {written(answer.value)}"
    return told if rest == "biases" else f"{told}; the gap has no meaning of its own"


def next_token(answer: "Attribution") -> Html:
    """An arrow to the token explained, or to the most likely one."""
    if answer.target is not None:
        # A part of the answer may stand among the scored tokens already.
        pairs = zip(answer.positions, answer.str_tokens, strict=True)
        scored = "".join(text for at, text in pairs if answer.target.is_span and at > answer.position)
        left = answer.target.text.removeprefix(scored)
        what = "the answer explained" if answer.target.is_span else "the token explained"
        return joined(tag("wbr"), boxed(left, what, arrow="" if scored else "→"))
    if answer.predictions:
        likeliest = answer.predictions[0].token.text
        return joined(tag("wbr"), boxed(likeliest, "the most likely next token", "dashed", arrow="→"))
    return Html()


def _card(answer: "Attribution", tokens: Html, *tables: Html, colors: Colors = "root") -> Html:
    scale = scale_of(answer, colors)
    named = dict(zip(answer.positions, answer.labels, strict=True))
    top = [([str(i), chip(named[i], scale.strength(s)), f"{s:.3g}"], share) for i, _, s, share in answer.top()]
    heading = f"Most influential tokens, {len(top)} of {sum(answer.is_counted)}"
    predictions = [([str(token.id), chip(token.text)], probability) for token, probability in answer.predictions]
    return markup.card(
        answer.question,
        tag("div", markup.SMALL, joined(explains(answer), about(answer), by=" · ")),
        tag("div", "font-size:16px;line-height:2;margin:14px 0 12px", tokens, next_token(answer)),
        _legend(answer, scale, colors),
        *[tag("div", markup.SMALL, "sum: ", told) for told in [sums(answer)] if told],
        table(heading, ("position", "token", "score", "share"), top, color(1.0)),
        table("Most likely next tokens", ("id", "token", "probability"), predictions, markup.BAR),
        *tables,
        notes=answer.notes,
    )


def _legend(answer: "Attribution", scale: Scale, colors: Colors) -> Html:
    scores = [score for score, counted in zip(answer.scores.tolist(), answer.is_counted, strict=True) if counted]
    if not scores:
        return tag("div", markup.SMALL, "no token counts: answer.with_template() counts those of the template")
    if scale.end == 0:
        return tag("div", markup.SMALL, f"every score is 0, in {answer.unit}")
    low = -1.0 if min(scores) < 0 else 0.0
    hues = [color(scale.top * (low + (1 - low) * (i + 0.5) / 24)) for i in range(24)]
    bar = [tag("span", f"display:inline-block;padding:6px 4.5px;background-color:{hue}") for hue in hues]
    ticks = zip(("left", "center", "right"), (low, (low + 1) / 2, 1.0), strict=True)
    # In the middle of a scale with two sides white are all up to an even share.
    told = [(side, "±" * (tick == 0 > low and scale.floor > 0), scale.score(scale.top * tick)) for side, tick in ticks]
    numbers = [Cell(f"{sign}{score:.3g}", f"text-align:{side};width:72px;padding:0") for side, sign, score in told]
    drawn = tag("div", "line-height:0;white-space:nowrap", *bar), rows([numbers])
    said = [f"score in {answer.unit}", tag("br"), f"colour: {COLORS[colors].format('score')}"]
    if not all(answer.is_counted):
        said += ["; grey: ", ", ".join(answer.uncounted), ", not counted"]
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
