"""HTML of the static pictures: tables and inline styles only, which notebook previews and mail clients keep."""

import unicodedata
from collections.abc import Iterable
from html import escape

from tl_scopes.views.palette import color, text_color

INK, MUTED, BAR = "#1f2328", "#59636e", "#8c959f"
SMALL = f"font-size:12px;color:{MUTED};margin-top:4px"
_PAPER = f"background-color:#ffffff;color:{INK};border:0"
_CARD = (
    f"{_PAPER};border:1px solid #d8dee4;border-radius:8px;padding:16px 20px;margin:4px 0;"
    "box-sizing:border-box;color-scheme:light;text-align:left;line-height:1.5;overflow-wrap:anywhere;"
    "font-family:system-ui,-apple-system,Segoe UI,Roboto,Helvetica,Arial,sans-serif;"
    "-webkit-print-color-adjust:exact;print-color-adjust:exact"  # else printers leave backgrounds out
)
_TITLE = "font:600 15px ui-monospace,SFMono-Regular,Menlo,Consolas,DejaVu Sans Mono,monospace"
_CHIP = "padding:2px;margin:0 1px;border-radius:3px"
_TABLE = f"{_PAPER};margin:0;border-collapse:collapse;table-layout:auto;font-size:inherit"
_CELL = "border:0;padding:1px 14px 1px 0;vertical-align:middle;text-align:left;max-width:none;line-height:1.6"


def visible(text: str) -> str:
    r"""A token's text on one line, with everything in it visible.

    Example:
        >>> from tl_scopes.views.markup import visible
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


def page(title: str, body: str) -> str:
    """A complete page: no script, no network."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{escape(title)}</title></head>\n'
        f'<body style="margin:24px;background-color:#ffffff">\n{body}\n</body></html>\n'
    )


def card(title: str, *parts: str, notes: Iterable[str] = (), width: str = "860px") -> str:
    """The frame of every picture; ground and text colours are its own, for light and dark notebooks."""
    noted = (tag("div", SMALL, f"Note: {escape(note)}") for note in notes)
    body = "\n".join([tag("div", _TITLE, escape(title)), *filter(None, parts), *noted])
    return tag("div", f"{_CARD};max-width:{width}", body)


def table(title: str, head: tuple[str, ...], lines: list[tuple[list[str], float]], hue: str) -> str:
    """Rows of cells, each with its part of the whole at the end, as a number and as a bar."""
    if not lines:
        return ""
    longest = max((abs(part) for _, part in lines)) or 1.0
    styles = [f"text-align:{'left' if name == 'token' else 'right'}" for name in head]
    drawn = [[(f"{style};color:{MUTED}", name) for style, name in zip(styles, head, strict=True)]]
    for cells, part in lines:
        bar = f"width:{72 * abs(part) / longest:.0f}px;height:9px;background-color:{hue if part >= 0 else color(-1.0)}"
        drawn.append([*zip(styles, [*cells, f"{part:.1%}"], strict=True), ("", tag("div", bar, ""))])
    style = "display:inline-block;vertical-align:top;margin:12px 28px 0 0;font-size:12px"
    return tag("div", style, tag("b", "font-weight:600", title) + rows(drawn))


def rows(lines: Iterable[Iterable[tuple[str, str]]]) -> str:
    """A table of styles and contents."""
    drawn = ("".join(tag("td", f"{_CELL};{style}", cell) for style, cell in line) for line in lines)
    return tag("table", _TABLE, "".join(tag("tr", _PAPER, line) for line in drawn))


def chip(text: str, strength: float = 0.0, title: str = "", mark: str = "", outlined: bool = False) -> str:
    """A token on the colour of its strength."""
    style = f"background-color:{color(strength)};color:{text_color(strength)};{_CHIP}"
    style += f";outline:2px solid {INK};outline-offset:-1px" if outlined else ""
    return tag("span", style, _markup(text) + (mark and tag("span", "font-size:11px;margin-left:3px", mark)), title)


def boxed(text: str, title: str = "", line: str = "solid", arrow: str = "") -> str:
    """A token that is predicted, in a frame."""
    style = f"color:{INK};border:1.5px {line} {INK};border-radius:3px;padding:1px 4px"
    return (arrow and f"<wbr>&ensp;{arrow}&ensp;") + tag("span", style, _markup(text), title)


def _markup(text: str) -> str:
    """`visible(text)`, in which what stands for something else is fainter or smaller."""
    return "".join(
        escape(shown) if shown == char else tag("span", "font-size:.75em" if len(shown) > 2 else "opacity:.5", shown)
        for char, shown in zip(text, _shown(text), strict=True)
    ) or tag("span", "opacity:.5", visible(text))


def tag(name: str, style: str, body: str, title: str = "") -> str:
    """An element with its style, around HTML."""
    return f'<{name} style="{style}"' + (title and f' title="{escape(title)}"') + f">{body}</{name}>"
