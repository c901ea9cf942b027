"""The picture of `Checks`: a static card, for beside an answer's own."""

from html import escape

from tl_scopes.diagnostics.check_report import Check, Checks
from tl_scopes.views import markup
from tl_scopes.views.markup import MUTED, rows, tag
from tl_scopes.views.palette import color

_TOP = "vertical-align:top;text-align:left"


def fragment(checks: Checks) -> str:
    """A card to put into a page."""
    return markup.card(
        f"Checks of {checks.scope}",
        tag("div", markup.SMALL, escape(f"{checks.model} · predicts after position {checks.position}")),
        tag("div", "margin-top:10px;font-size:12px", rows(map(_row, checks))),
    )


def _row(check: Check) -> list[tuple[str, str]]:
    # The word says it; the colour only helps to find it.
    ground = f"background-color:{color(-0.5)};" if check.verdict == "look" else f"color:{MUTED};"
    verdict = tag("span", f"{ground}padding:1px 6px;border-radius:3px", check.verdict)
    return [
        (f"{_TOP};font-weight:600;white-space:nowrap", escape(check.name)),
        (f"{_TOP};white-space:nowrap", verdict),
        (_TOP, escape(check.finding)),
        (f"{_TOP};width:130px;color:{MUTED}", escape(check.cost)),
    ]
