"""How far the linear picture holds, as a static card."""

from html import escape

from tl_scopes.diagnostics.linearity_report import LinearityReport
from tl_scopes.views import heat_map, markup
from tl_scopes.views.markup import SMALL, tag


def fragment(report: LinearityReport) -> str:
    """The findings in words over the two plots."""
    findings = "".join(tag("div", SMALL, escape(line)) for line in report.summary().splitlines())
    picture = heat_map.embedded(report.plot(), repr(report))
    return markup.card("Linearity", findings, picture, width="max-content")
