"""Pictures of a `Comparison`: the prompt once for each answer, as a static card and as circuitsvis' tokens, live."""

from typing import TYPE_CHECKING

from tl_scopes.views import attribution as card
from tl_scopes.views import markup
from tl_scopes.views.live import MOST_TOKENS, LiveViews, require_drawable
from tl_scopes.views.markup import MUTED, SMALL, Html, chip, joined, tag
from tl_scopes.views.palette import COLORS, Colors

if TYPE_CHECKING:
    from tl_scopes.results.comparison import Comparison


def page(comparison: "Comparison", colors: Colors = "root") -> Html:
    """The static card as a complete page, without script or network."""
    made = dict.fromkeys(str(one.provenance) for one in comparison.answers.values() if one.provenance is not None)
    return markup.page(", ".join(comparison.answers), fragment(comparison, colors), footer=" · ".join(made))


def fragment(comparison: "Comparison", colors: Colors = "root") -> Html:
    """The static card, to be put into another page."""
    texts = (
        card.running_text(answer, marks=False, underlined=comparison.differing, colors=colors)
        for answer in comparison.answers.values()
    )
    return _card(comparison, *texts, colors=colors)


def colored_tokens(comparison: "Comparison") -> LiveViews:
    """circuitsvis' tokens for each answer, for a live notebook, as the static card draws them."""
    require_drawable(sum(len(answer.scores) for answer in comparison.answers.values()), MOST_TOKENS, "tokens")
    views = (
        card.live_text(answer, marks=False, underlined=comparison.differing) for answer in comparison.answers.values()
    )
    return LiveViews(tuple(views), lambda *live: _card(comparison, *live), f"ColoredTokens: {comparison!r}")


def _card(comparison: "Comparison", *texts: Html, colors: Colors = "root") -> Html:
    """The frame around the prompt, once for each answer."""
    answers = comparison.answers.values()
    places = dict.fromkeys(card.about(answer) for answer in answers)
    notes = markup.distinct(note for answer in answers for note in answer.notes)
    notes += [comparison.caveat] if comparison.caveat else []
    legend = f"colour: {COLORS[colors].format('score')}, each answer on its own scale"
    legend += "; vermilion: below zero" if any((answer.scores < 0).any() for answer in answers) else ""
    lines: list[Html] = []
    for (name, answer), text in zip(comparison.answers.items(), texts, strict=True):
        lines.append(tag("div", "font-weight:600;font-size:13px", name))
        lines.append(tag("div", "font-size:16px;line-height:2;margin-bottom:8px", text, card.next_token(answer)))
    return markup.card(
        f"{len(answers)} answer{'s' * (len(answers) > 1)} about {_prompts(comparison)}",
        *(tag("div", SMALL, place) for place in places if len(places) == 1),
        tag("div", "margin:14px 0 6px", *lines),
        tag("div", SMALL, legend),
        _most_influential(comparison, say_where=len(places) > 1, colors=colors),
        notes=notes,
    )


def _prompts(comparison: "Comparison") -> str:
    if not comparison.aligned:
        return "prompts of different lengths"
    count = len(comparison.differing)
    return f"prompts that differ in {count} token{'s' * (count > 1)}, underlined" if count else "one prompt"


def _most_influential(comparison: "Comparison", *, say_where: bool, colors: Colors) -> Html:
    """The top tokens of each answer with their shares, its unit, and on request where it was asked."""
    parts = [tag("div", f"color:{MUTED}", "Most influential tokens and their shares")]
    for name, answer in comparison.answers.items():
        scale = card.scale_of(answer, colors)
        told = f"in {answer.unit}", card.explains(answer), card.about(answer) if say_where else ""
        about = tag("span", f"color:{MUTED}", joined(*told, by=" · "))
        parts.append(tag("div", "margin-top:6px", tag("b", "font-weight:600", name), " ", about))
        apart = "display:inline-block;margin-right:10px"
        top = [
            tag("span", apart, chip(text, scale.strength(score)), f"{answer.place(position)} {share:.1%}")
            for position, text, score, share in answer.top()
        ]
        parts.append(tag("div", "line-height:1.8", *top))
    return tag("div", "margin-top:14px;font-size:12px", *parts)
