"""The picture of `Checks`: a static card, to stand beside that of an answer."""

from typing import TYPE_CHECKING

from tl_scopes.views import markup
from tl_scopes.views.markup import MUTED, Html, tag
from tl_scopes.views.palette import color

if TYPE_CHECKING:
    from tl_scopes.diagnostics.check_report import Check, Checks

_BLOCK = "display:inline-block;vertical-align:top"
# The finding stands beside the verdict, or in a narrow card below it, as wide as the card.
_LEFT, _RIGHT = f"{_BLOCK};width:220px", f"{_BLOCK};width:calc(100% - 220px);min-width:min(100%, 400px)"


def fragment(checks: "Checks") -> Html:
    """The static card, to be put into another page."""
    return markup.card(
        f"Checks of {checks.answer.question}",
        tag("div", markup.SMALL, f"{checks.answer.model} · predicts after position {checks.answer.position}"),
        tag("div", "margin-top:4px;font-size:12px", *map(_line, checks)),
    )


def _line(check: "Check") -> Html:
    # The verdict is written in a word; the colour only helps to find it.
    ground = f"background-color:{color(-0.5)}" if check.verdict == "look" else f"color:{MUTED}"
    name = tag("b", f"{_BLOCK};font-weight:600;width:110px", check.name)
    verdict = tag("span", f"{ground};padding:1px 6px;border-radius:3px", check.verdict)
    cost = "" if check.cost == "none" else tag("span", f"color:{MUTED}", f" [{check.cost}]")
    return tag("div", "margin-top:6px", tag("div", _LEFT, name, verdict), tag("div", _RIGHT, check.finding, cost))
