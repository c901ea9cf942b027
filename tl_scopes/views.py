"""Pictures of an `Attribution`: a static card that works everywhere, and circuitsvis' tokens for a live notebook."""

import gzip
import sys
import unicodedata
from base64 import b64encode
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib.resources import files
from math import copysign
from typing import Any, NamedTuple
from uuid import uuid4

from tl_scopes.attribution import Attribution

# Okabe and Ito's blue, and vermilion below zero, which any colour vision tells apart; mixed with white in CIE Lab, as
# circuitsvis mixes: equal steps of strength are equal steps of lightness, and both views have the same colours.
_BLUE = ("#ffffff", "#cddaec", "#9ab6d8", "#6493c5", "#0072b2")
_VERMILION = ("#ffffff", "#f9d5c1", "#f0ac84", "#e48448", "#d55e00")


def visible(text: str) -> str:
    r"""A token's text on one line, with everything in it visible.

    Example:
        >>> visible(" are\n"), visible("a\u200bb"), visible(""), visible("<0xE2>")
        ('·are↵', 'aU+200Bb', '∅', '<0xE2>')
    """
    return "".join(_shown(text)) or "∅"


def _shown(text: str) -> Iterable[str]:
    """What is shown for each character: itself, where it can be seen."""
    for i, char in enumerate(text):
        category = unicodedata.category(char)
        if char in " \n\t":
            yield {" ": "·", "\n": "↵", "\t": "⇥"}[char]
        # The characters listed are blank, although Unicode counts them as letters, marks and symbols.
        elif category in ("Cc", "Cf", "Co", "Cs", "Zl", "Zp", "Zs") or char in "\u034f\u115f\u1160\u2800\u3164\uffa0":
            yield f"U+{ord(char):04X}"
        elif i == 0 and category[0] == "M":  # an accent would sit on the token before
            yield f"U+{ord(char):04X}" if "\ufe00" <= char <= "\ufe0f" else "◌" + char
        else:
            yield char


def strengths(attribution: Attribution) -> list[float]:
    """How strongly to colour each token: 0 for a score of zero, 1 for the strongest; negative where the score is."""
    return list(map(_scale(attribution).strength, attribution.scores.tolist()))


def color(strength: float) -> str:
    """The colour of a strength from -1 to 1, as "#rrggbb": white at 0, blue at 1, vermilion at -1."""
    ramp = _VERMILION if strength < 0 else _BLUE
    place = min(abs(strength), 1.0) * (len(ramp) - 1)
    i = min(int(place), len(ramp) - 2)
    ends = zip(bytes.fromhex(ramp[i][1:]), bytes.fromhex(ramp[i + 1][1:]), strict=True)
    return "#" + bytes(round(a + (b - a) * (place - i)) for a, b in ends).hex()


def text_color(strength: float) -> str:
    """Black or white on `color(strength)`, whichever reads better; their contrast is at least 4.5 (WCAG AA)."""
    return "#ffffff" if strength > 0.93 else "#000000"


class _Scale(NamedTuple):
    """From scores to strengths and back: the square root, for scores are heavy-tailed."""

    end: float
    """The score where the scale ends; whatever lies over it has strength 1."""
    top: float
    """Strength at the end: less than 1 where something lies over it."""

    def strength(self, score: float) -> float:
        within = self.top * (abs(score) / (self.end or 1.0)) ** 0.5
        return copysign(1.0 if abs(score) > self.end else within, score)

    def score(self, strength: float) -> float:
        return copysign(self.end * (strength / self.top) ** 2, strength)

    def mark(self, score: float, share: float) -> str:
        return f"▲{share:.1%}" if abs(score) > self.end else ""


def _scale(attribution: Attribution) -> _Scale:
    """A scale that ends below the sinks, on which most influence tends to rest: they would wash out all others."""
    sizes = sorted((abs(score) for score in attribution.scores.tolist()), reverse=True) or [0.0]
    # At most three tokens, and fewer than half, before the widest gap. A gap of 4 is where the square root would leave
    # the others half of the colours. Rounding noise beside a token that has it all is no rest to show.
    gaps = {i: sizes[i - 1] / sizes[i] for i in range(1, min(4, (len(sizes) + 1) // 2)) if sizes[i] > 1e-5 * sizes[0]}
    sinks = max(gaps, key=gaps.__getitem__, default=0)
    return _Scale(sizes[sinks], 0.8) if sinks and gaps[sinks] > 4 else _Scale(sizes[0], 1.0)


# ---------------------------------------------------------------------------------------------------------------------
# The static card: tables and inline styles only, which notebook previews and mail clients keep

_INK, _MUTED, _BAR = "#1f2328", "#59636e", "#8c959f"
_PAPER = f"background-color:#ffffff;color:{_INK};border:0"
_CARD = (
    f"{_PAPER};border:1px solid #d8dee4;border-radius:8px;padding:16px 20px;margin:4px 0;max-width:860px;"
    "box-sizing:border-box;color-scheme:light;text-align:left;line-height:1.5;overflow-wrap:anywhere;"
    "font-family:system-ui,-apple-system,Segoe UI,Roboto,Helvetica,Arial,sans-serif;"
    "-webkit-print-color-adjust:exact;print-color-adjust:exact"  # else printers leave backgrounds out
)
_TITLE = "font:600 15px ui-monospace,SFMono-Regular,Menlo,Consolas,DejaVu Sans Mono,monospace"
_SMALL = f"font-size:12px;color:{_MUTED};margin-top:4px"
_CHIP = "padding:2px;margin:0 1px;border-radius:3px"
_TABLE = f"{_PAPER};margin:0;border-collapse:collapse;table-layout:auto;font-size:inherit"
_TICK = "width:72px;padding:0"
_CELL = "border:0;padding:1px 14px 1px 0;vertical-align:middle;max-width:none;line-height:1.6"


def page(attribution: Attribution) -> str:
    """A complete page: no script, no network."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{escape(attribution.scope)}</title></head>\n'
        f'<body style="margin:24px;background-color:#ffffff">\n{fragment(attribution)}\n</body></html>\n'
    )


def fragment(attribution: Attribution) -> str:
    """The same for a place in another page; its ground and text colours are its own, for light and dark notebooks."""
    scale = _scale(attribution)
    return _card(attribution, scale, _running_text(attribution, scale))


def _card(answer: Attribution, scale: _Scale, tokens: str) -> str:
    about = f"{answer.model} · {answer.dtype} · {answer.wrt} → {answer.of} · predicts after position {answer.position}"
    explains = " against ".join(_boxed(token.text) for token in (answer.target, answer.versus) if token is not None)
    if answer.target is not None:
        tokens += _boxed(answer.target.text, "the token explained", arrow="→")
    elif answer.predictions:
        tokens += _boxed(answer.predictions[0].token.text, "the most likely next token", "dashed", arrow="→")
    top = [([str(i), _chip(text, scale.strength(s)), f"{s:.3g}"], share) for i, text, s, share in answer.top()]
    heading = f"Most influential tokens, {len(top)} of {len(answer.scores)}"
    predictions = [([str(token.id), _chip(token.text)], probability) for token, probability in answer.predictions]
    parts = [
        _tag("div", _TITLE, escape(answer.scope)),
        _tag("div", _SMALL, (explains and f"explains {explains} · ") + escape(about)),
        _tag("div", "font-size:16px;line-height:2;margin:14px 0 12px", tokens),
        _legend(answer, scale),
        _table(heading, ("position", "token", "score", "share"), top, color(1.0)),
        _table("Most likely next tokens", ("id", "token", "probability"), predictions, _BAR) if predictions else "",
        *(_tag("div", _SMALL, f"Note: {escape(note)}") for note in answer.notes),
    ]
    return _tag("div", _CARD, "\n".join(parts))


def _running_text(answer: Attribution, scale: _Scale) -> str:
    html, before = "", ""
    scores, shares = answer.scores.tolist(), answer.share.tolist()
    rows = zip(answer.positions, answer.str_tokens, answer.tokens.tolist(), scores, shares, strict=True)
    for position, text, id, score, share in rows:
        is_target = answer.target is not None and id == answer.target.id
        about = f"{text!r}, id {id}" + (", the token explained" if is_target else "")
        title = f"position {position}: {about}\nscore {score:.3g} {answer.unit}\nshare {share:.1%}"
        # Lines break between words, and after every newline, within a token too.
        html += "<wbr>" if text[:1].isspace() or not before[-1:].isalnum() else ""
        *lines, last = text.split("\n")
        html += "".join(_chip(line + "\n", scale.strength(score), title, "", is_target) + "<br>" for line in lines)
        mark = scale.mark(score, share)
        html += _chip(last, scale.strength(score), title, mark, is_target) if last or mark or not lines else ""
        before = text
    return html


def _legend(answer: Attribution, scale: _Scale) -> str:
    unit, scores = escape(answer.unit), answer.scores.tolist()
    if scale.end == 0:
        return _tag("div", _SMALL, f"every score is 0, in {unit}")
    low = -1.0 if min(scores) < 0 else 0.0
    hues = [color(scale.top * (low + (1 - low) * (i + 0.5) / 24)) for i in range(24)]
    bar = "".join(_tag("span", f"display:inline-block;padding:6px 4.5px;background-color:{hue}", "") for hue in hues)
    ticks = zip(("left", "center", "right"), (low, (low + 1) / 2, 1.0), strict=True)
    numbers = [(f"text-align:{side};{_TICK}", f"{scale.score(scale.top * tick):.3g}") for side, tick in ticks]
    drawn = _tag("div", "line-height:0;white-space:nowrap", bar) + _rows([numbers])
    said = f"score in {unit}<br>colour: square root of the score"
    if scale.top < 1:
        said += f"; {_chip('▲', 1.0)} over the scale, up to {max(scores, key=abs):.3g}, with its share"
    return _tag("div", "font-size:12px", _rows([[("", drawn), (f"text-align:left;color:{_MUTED}", said)]]))


def _table(title: str, head: tuple[str, ...], rows: list[tuple[list[str], float]], hue: str) -> str:
    """Rows of cells, each with its part of the whole at the end, as a number and as a bar."""
    longest = max((abs(part) for _, part in rows), default=0.0) or 1.0
    styles = [f"text-align:{'left' if name == 'token' else 'right'}" for name in head]
    lines = [[(f"{style};color:{_MUTED}", name) for style, name in zip(styles, head, strict=True)]]
    for cells, part in rows:
        bar = f"width:{72 * abs(part) / longest:.0f}px;height:9px;background-color:{hue if part >= 0 else color(-1.0)}"
        lines.append([*zip(styles, [*cells, f"{part:.1%}"], strict=True), ("", _tag("div", bar, ""))])
    style = "display:inline-block;vertical-align:top;margin:12px 28px 0 0;font-size:12px"
    return _tag("div", style, _tag("b", "font-weight:600", title) + _rows(lines))


def _rows(rows: list[list[tuple[str, str]]]) -> str:
    """A table of styles and contents."""
    lines = ("".join(_tag("td", f"{_CELL};{style}", cell) for style, cell in row) for row in rows)
    return _tag("table", _TABLE, "".join(_tag("tr", _PAPER, line) for line in lines))


def _chip(text: str, strength: float = 0.0, title: str = "", mark: str = "", outlined: bool = False) -> str:
    style = f"background-color:{color(strength)};color:{text_color(strength)};{_CHIP}"
    style += f";outline:2px solid {_INK};outline-offset:-1px" if outlined else ""
    return _tag("span", style, _markup(text) + (mark and _tag("span", "font-size:11px;margin-left:3px", mark)), title)


def _boxed(text: str, title: str = "", line: str = "solid", arrow: str = "") -> str:
    style = f"color:{_INK};border:1.5px {line} {_INK};border-radius:3px;padding:1px 4px"
    return (arrow and f"<wbr>&ensp;{arrow}&ensp;") + _tag("span", style, _markup(text), title)


def _markup(text: str) -> str:
    """`visible(text)`, in which what stands for something else is fainter or smaller."""
    return "".join(
        escape(shown) if shown == char else _tag("span", "font-size:.75em" if len(shown) > 2 else "opacity:.5", shown)
        for char, shown in zip(text, _shown(text), strict=True)
    ) or _tag("span", "opacity:.5", visible(text))


def _tag(name: str, style: str, body: str, title: str = "") -> str:
    return f'<{name} style="{style}"' + (title and f' title="{escape(title)}"') + f">{body}</{name}>"


# ---------------------------------------------------------------------------------------------------------------------
# circuitsvis

_SCRIPT = """<script>{
  const source = "%(source)s", props = %(props)s;
  if (source) window.tlScopesCircuitsVis ??= new Response(
    new Blob([Uint8Array.from(atob(source), c => c.charCodeAt())]).stream().pipeThrough(new DecompressionStream("gzip"))
  ).text().then(text => {
    document.head.append(Object.assign(document.createElement("script"), {textContent: text}));
    return window.CircuitsVis;
  });
  // circuitsvis colours by a value and writes the same value into the tooltip: a strength, written as the score.
  props.values = props.values.map((strength, i) => Object.assign([props.tooltips[i]], {valueOf: () => strength}));
  window.tlScopesCircuitsVis?.then(({render, ColoredTokens}) => render("%(id)s", ColoredTokens, props));
}</script>"""

_carrier = ""  # the last run of a cell in which a view carried the script


@dataclass(frozen=True)
class ColoredTokens:
    """circuitsvis' coloured tokens, in the card, for a live notebook.

    circuitsvis' script comes from the installed package, without asking any web site, and is evaluated once in a page,
    by the first view that needs it. Compressed (0.5 MB instead of 1.3 MB) it is part of every view that is asked for by
    itself, so that each works alone: saved, reopened, beside a cleared cell, or where every cell has a frame of its own
    (Colab). Of the views that one run of a notebook cell displays, only the first carries it. Where no script runs
    (GitHub, PDF, a notebook that is not trusted) the static tokens stay in its place.
    """

    attribution: Attribution

    def _repr_html_(self) -> str:
        return self._html(_compressed_script())

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        """What a notebook asks for."""
        global _carrier
        shell = getattr(sys.modules.get("IPython"), "get_ipython", object)()
        parent: dict[str, Any] = getattr(shell, "get_parent", dict)()
        run = parent.get("header", {}).get("msg_id", "")
        carried, _carrier = run != "" and run == _carrier, run
        return {"text/html": self._html("" if carried else _compressed_script()), "text/plain": repr(self)}

    def _html(self, source: str) -> str:
        from circuitsvis.utils.convert_props import convert_props

        answer, scale, name = self.attribution, _scale(self.attribution), f"tl-scopes-{uuid4().hex}"
        tokens, tooltips = [], []
        for text, score, share in zip(answer.str_tokens, answer.scores.tolist(), answer.share.tolist(), strict=True):
            # circuitsvis takes a token for HTML: a word joiner, which cannot be seen, keeps it from being any.
            shown = (visible(text) + scale.mark(score, share)).replace("<", "<\u2060").replace("&", "&\u2060")
            tokens.append(shown + "\n" * text.count("\n"))
            tooltips.append(f"{score:.3g} {answer.unit}, {share:.1%}")
        props = {"tokens": tokens, "values": strengths(answer), "minValue": -1, "maxValue": 1, "tooltips": tooltips}
        props |= {"positiveColor": color(1.0), "negativeColor": color(-1.0)}
        # "</script>" would end the script from within a string, and "<!--" hide its end.
        fields = {"props": convert_props(props).replace("<", "\\u003c"), "source": source, "id": name}
        return _card(answer, scale, f'<div id="{name}">{_running_text(answer, scale)}</div>') + _SCRIPT % fields


@cache
def _compressed_script() -> str:
    return b64encode(gzip.compress(files("circuitsvis").joinpath("dist/cdn/iife.js").read_bytes())).decode()


def colored_tokens(attribution: Attribution) -> ColoredTokens:
    """circuitsvis' coloured tokens for a live notebook; in a tooltip is the score."""
    return ColoredTokens(attribution)
