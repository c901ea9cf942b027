"""Pictures of a `Comparison`: the prompt once for each answer as a static card, and circuitsvis' tokens, live."""

from typing import TYPE_CHECKING

from tl_scopes.views import attribution as card
from tl_scopes.views import markup
from tl_scopes.views.live import LiveView, as_html
from tl_scopes.views.markup import MUTED, SMALL, Html, chip, joined, tag, visible
from tl_scopes.views.palette import Scale

if TYPE_CHECKING:
    from tl_scopes.results.comparison import Comparison

_STATIC = "colour: square root of the score, each answer on its own scale"
_LIVE = "colour: share, white at 0 and full at Positive Bound"


def page(comparison: "Comparison") -> Html:
    """The static card as a complete page, without script or network."""
    made = dict.fromkeys(str(one.provenance) for one in comparison.answers.values() if one.provenance is not None)
    return markup.page(", ".join(comparison.answers), fragment(comparison), footer=" · ".join(made))


def fragment(comparison: "Comparison") -> Html:
    """The static card, to be put into another page."""
    return _card(comparison, _texts(comparison), _STATIC)


def colored_tokens(comparison: "Comparison") -> LiveView:
    """circuitsvis' tokens with a choice of the answer, for a live notebook.

    Departure: circuitsvis has one bound for all answers and colours in proportion to the value, so it is given shares.
    The bound is the largest share that lies on the scale of its own answer; a reader can change it in the picture.
    """
    if not comparison.aligned:
        raise ValueError(
            "the answers are about prompts of different lengths, and circuitsvis draws one text: show each of them, or "
            "take the static card, to_html()."
        )
    answers = comparison.answers
    shares = [answer.share.tolist() for answer in answers.values()]
    bound = max(Scale.of(line).end for line in shares) or 1.0
    props = {
        "tokens": [as_html(visible(text)) + "\n" * text.count("\n") for text in comparison.str_tokens],
        "values": list(zip(*shares, strict=True)),
        "labels": list(answers),
        "positiveBounds": [bound] * len(shares),
        "negativeBounds": [-bound] * len(shares),
    }
    return LiveView(
        "ColoredTokensMulti",
        props,
        _texts(comparison),
        lambda live: _card(comparison, live, _LIVE),
        repr(comparison),
    )


def _card(comparison: "Comparison", body: Html, legend: str) -> Html:
    answers = comparison.answers.values()
    places = dict.fromkeys(card.about(answer) for answer in answers)
    notes = dict.fromkeys(note for answer in answers for note in answer.notes)
    return markup.card(
        f"{len(answers)} answer{'s' * (len(answers) > 1)} about {_prompts(comparison)}",
        *(tag("div", SMALL, place) for place in places if len(places) == 1),
        tag("div", "margin:14px 0 6px", body),
        tag("div", SMALL, legend),
        _most_influential(comparison, say_where=len(places) > 1),
        notes=notes,
    )


def _prompts(comparison: "Comparison") -> str:
    if not comparison.aligned:
        return "prompts of different lengths"
    count = len(comparison.differing)
    return f"prompts that differ in {count} token{'s' * (count > 1)}, underlined" if count else "one prompt"


def _texts(comparison: "Comparison") -> Html:
    """The prompt once for each answer."""
    parts: list[Html] = []
    for name, answer in comparison.answers.items():
        tokens = card.running_text(answer, marks=False, underlined=comparison.differing), card.next_token(answer)
        parts.append(tag("div", "font-weight:600;font-size:13px", name))
        parts.append(tag("div", "font-size:16px;line-height:2;margin-bottom:8px", *tokens))
    return joined(*parts)


def _most_influential(comparison: "Comparison", *, say_where: bool) -> Html:
    """The top tokens of each answer with their shares, its unit, and on request where it was asked."""
    parts = [tag("div", f"color:{MUTED}", "Most influential tokens and their shares")]
    for name, answer in comparison.answers.items():
        scale = card.scale_of(answer)
        told = f"in {answer.unit}", card.explains(answer), card.about(answer) if say_where else ""
        about = tag("span", f"color:{MUTED}", joined(*told, by=" · "))
        parts.append(tag("div", "margin-top:6px", tag("b", "font-weight:600", name), " ", about))
        apart = "display:inline-block;margin-right:10px"
        top = [
            tag("span", apart, chip(text, scale.strength(score)), f" {share:.1%}")
            for _, text, score, share in answer.top()
        ]
        parts.append(tag("div", "line-height:1.8", *top))
    return tag("div", "margin-top:14px;font-size:12px", *parts)
