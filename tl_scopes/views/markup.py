"""HTML of the pictures: elements with inline styles, which notebook previews and mail clients keep.

Each colour is written twice, for a light ground and for both, `light-dark(#ffffff, #1f1f1f)`. A card follows the
computer's setting; a small style sheet in it follows the theme of the notebook instead, where that has one.

What is put into an element is plain text, and is escaped, unless it is `Html`. Only this file makes `Html`, so that no
picture can forget to escape a token, a number that is none, or the name of a model.
"""

import re
import unicodedata
from base64 import b64encode
from collections.abc import Iterable, Sequence
from functools import cache
from html import escape
from pathlib import Path
from typing import NamedTuple, TypeVar

from tl_scopes.views.palette import color, dark, text_color, text_on

Text = TypeVar("Text", bound=str)

INK, MUTED, BAR = "#1f2328", "#59636e", "#8c959f"
SMALL = f"font-size:12px;color:{MUTED};margin-top:4px"
_PAPER = f"background-color:#ffffff;color:{INK};border:0"
_CARD = (
    f"{_PAPER};border:1px solid #d8dee4;border-radius:8px;padding:16px 20px;margin:4px 0;"
    "box-sizing:border-box;color-scheme:light dark;direction:ltr;text-align:left;line-height:1.5;"
    "overflow-wrap:anywhere;"
    "font-family:system-ui,-apple-system,Segoe UI,Roboto,Helvetica,Arial,sans-serif;"
    "-webkit-print-color-adjust:exact;print-color-adjust:exact"  # else printers leave backgrounds out
)
_TITLE = "font:600 15px ui-monospace,SFMono-Regular,Menlo,Consolas,DejaVu Sans Mono,monospace"
# A token keeps its place in the text, whichever way its letters and those beside it are written.
_TOKEN = "unicode-bidi:isolate;border-radius:3px"
_EACH_LINE = "-webkit-box-decoration-break:clone;box-decoration-break:clone"  # a frame that goes on is closed
_TABLE = f"{_PAPER};margin:0;border-collapse:collapse;table-layout:auto;font-size:inherit"
# Numbers and names stay on one line; a narrow card wraps tokens and sentences.
_CELL = (
    "border:0;padding:1px 14px 1px 0;vertical-align:middle;text-align:left;max-width:none;line-height:1.6;"
    "white-space:nowrap"
)
_TOKEN_CELL = "text-align:left;white-space:normal;overflow-wrap:break-word"
_ASIDE = "#eceef1"
_EMPTY = ("br", "wbr", "meta", "img")
"""Elements that hold nothing and are not closed."""


class Html(str):
    """Text that is markup. Any other text is escaped where it enters an element.

    So is what `+`, `join` and f-strings make of `Html`, for they return a plain `str`: see `joined`.
    """

    __slots__ = ()


def joined(*parts: str, by: str = "") -> Html:
    """The parts that are not empty, one after another: `Html` as it is, other text escaped."""
    return Html(_escaped(by).join(_escaped(part) for part in parts if part))


def _escaped(text: str) -> Html:
    return text if isinstance(text, Html) else Html(escape(text))


def tag(name: str, style: str = "", /, *parts: str, **attributes: str) -> Html:
    """An element around its parts. Attributes without a value are left out.

    Example:
        >>> from tl_scopes.views.markup import tag
        >>> tag("b", "color:red", "1 < 2", tag("br"), title="a 'b'")
        '<b style="color:red" title="a &#x27;b&#x27;">1 &lt; 2<br></b>'
    """
    given = {"style": _themed(style)} | attributes
    start = name + "".join(f' {key}="{escape(value)}"' for key, value in given.items() if value)
    return Html(f"<{start}>" if name in _EMPTY else f"<{start}>{joined(*parts)}</{name}>")


@cache
def _themed(style: str) -> str:
    """The style, with each colour followed by its like for both grounds, which browsers before 2024 pass over."""
    declarations = []
    given = dict(line.split(":", 1) for line in style.split(";") if ":" in line)
    ground = given.get("background-color", "").strip()

    def both(found: re.Match[str]) -> str:
        hue = found[0]
        # Black or white letters on a ground are those that can be read there.
        on = hue in ("#000000", "#ffffff") and name.strip() == "color" and _HEX.fullmatch(ground)
        return f"light-dark({hue},{text_on(dark(ground)) if on else dark(hue)})"

    for line in style.split(";"):
        declarations.append(line)
        name, _, value = line.partition(":")
        if _HEX.search(value):
            declarations.append(f"{name}:{_HEX.sub(both, value)}")
    return ";".join(declarations)


_HEX = re.compile("#[0-9a-f]{6}")


# ---------------------------------------------------------------------------------------------------------------------
# The frame

_SHOWN_DARK = """[data-jp-theme-light="false"] X, html[theme="dark"] X, [data-theme="dark"] X, body.vscode-dark X,
body.vscode-high-contrast X, body.dark X"""
_SHOWN_LIGHT = """[data-jp-theme-light="true"] X, html[theme="light"] X, [data-theme="light"] X, body.vscode-light X,
body.light X"""
_IMAGE = ":is(.tl-scopes img, .tl-scopes .tl-light):not(.tl-light img)"
_TURNED = "filter: invert(0.88) hue-rotate(180deg)"  # white becomes the card's dark ground, and blue stays blue
THEMES = Html(
    "<style>"
    f"@media (prefers-color-scheme: dark) {{ {_IMAGE} {{ {_TURNED} }} }}\n"
    f"{_SHOWN_DARK.replace('X', '.tl-scopes')} {{ color-scheme: dark !important }}\n"
    f"{_SHOWN_DARK.replace('X', _IMAGE)} {{ {_TURNED} }}\n"
    f"{_SHOWN_LIGHT.replace('X', '.tl-scopes')} {{ color-scheme: light !important }}\n"
    f"{_SHOWN_LIGHT.replace('X', _IMAGE)} {{ filter: none }}"
    "</style>"
)
"""What makes cards dark in the dark themes of JupyterLab, Colab, Sphinx, VS Code and marimo, and light in the light."""


def sheet(rules: Iterable[tuple[str, str]]) -> Html:
    """A style sheet of selectors and styles, which win over those that stand in the elements."""
    lines = (f"{at} {{ {_themed(style).replace(';', ' !important; ')} !important }}" for at, style in rules)
    return Html(f"<style>{' '.join(lines)}</style>")


def lit(*parts: str, **attributes: str) -> Html:
    """A light place for what has no dark colours; in the dark its light is turned around."""
    style = f"{_PAPER};color-scheme:light;padding:1px 15px"  # the rows of circuitsvis stand out by 15 pixels
    return tag("div", style, *parts, **{"class": "tl-light"} | attributes)


def saved(text: Text, path: str | Path | None) -> Text:
    """The same page, or other text, written to a file if there is a path."""
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text


def page(title: str, *cards: str, footer: object = None) -> Html:
    """A complete page: no script, no network. The footer says what it was made with, where that is known."""
    head = tag(
        "head",
        "",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width"),
        tag("title", "", title),
    )
    made = tag("footer", f"{SMALL};font-family:system-ui,sans-serif", f"Made with {footer}") if footer else Html()
    ground = "margin:24px;background-color:#ffffff;color-scheme:light dark"
    body = tag("body", ground, "\n", joined(*cards, made, by="\n"), "\n")
    return joined(Html("<!doctype html>\n"), tag("html", "", head, "\n", body, lang="en"), "\n")


def distinct(notes: Iterable[str]) -> list[str]:
    """Notes on many answers, of which those that differ in probabilities alone are shown once."""
    found: dict[str, str] = {}
    for note in notes:
        found.setdefault(re.sub(r"p = [\d.e+-]+", "", note), note)
    return list(found.values())


def card(title: str, *parts: str, notes: Iterable[str] = (), width: str = "860px") -> Html:
    """The frame of every picture, with its own ground and text colours, for light and dark notebooks."""
    noted = [tag("div", SMALL, "Note: ", note) for note in notes]
    within = joined(THEMES, tag("div", _TITLE, title), *parts, *noted, by="\n")
    return tag("div", f"{_CARD};max-width:{width}", within, **{"class": "tl-scopes"})


def image(png: bytes, alt: str, width: int, height: int) -> Html:
    """A picture that holds its own data. In a narrow card it shrinks, down to two thirds, and scrolls beyond that."""
    source = f"data:image/png;base64,{b64encode(png).decode()}"
    style = f"max-width:none;display:block;width:min({width}px,max(100%,{2 * width // 3}px));height:auto"
    drawn = tag("img", style, alt=alt, width=str(width), height=str(height), src=source)
    return tag("div", "overflow-x:auto;margin:12px 0 4px", drawn)


# ---------------------------------------------------------------------------------------------------------------------
# Tables


class Cell(NamedTuple):
    """One cell of a table, which may span several columns."""

    content: str
    style: str = ""
    columns: int = 1


def rows(lines: Iterable[Iterable[Cell]]) -> Html:
    """A table."""
    # Every element has a ground of its own, for notebooks give one to rows.
    return tag("table", _TABLE, *(tag("tr", _PAPER, *map(_cell, line)) for line in lines))


def _cell(cell: Cell) -> Html:
    columns = str(cell.columns) if cell.columns > 1 else ""
    return tag("td", f"{_CELL};{cell.style}", cell.content, colspan=columns)


def table(title: str, head: Sequence[str], lines: Sequence[tuple[Sequence[str], float]], hue: str) -> Html:
    """Rows of cells, each with its part of the whole at the end, as a number and as a bar; nothing for no rows."""
    if not lines:
        return Html()
    longest = max((abs(part) for _, part in lines)) or 1.0
    words = {"token": _TOKEN_CELL, "component": "text-align:left", "at": "text-align:left"}
    styles = [words.get(name, "text-align:right") for name in head]
    drawn = [[Cell(name, f"{style};color:{MUTED}") for name, style in zip(head, styles, strict=True)]]
    for cells, part in lines:
        bar = f"width:{100 * abs(part) / longest:.0f}%;height:9px;background-color:{hue if part >= 0 else color(-1.0)}"
        # In a narrow card bars become short before a token breaks within a word.
        drawn.append([*map(Cell, [*cells, f"{part:.1%}"], styles), Cell(tag("div", bar), "width:72px")])
    style = "display:inline-block;vertical-align:top;margin-top:12px;font-size:12px"
    style += ";box-sizing:border-box;padding-right:28px;max-width:100%;overflow-x:auto"  # a wide one scrolls
    return tag("div", style, tag("b", "font-weight:600", title), rows(drawn))


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


def chip(
    text: str,
    strength: float | None = 0.0,
    title: str = "",
    mark: str = "",
    outlined: bool = False,
    underlined: bool = False,
) -> Html:
    """A token on the colour of its strength; in grey where it has none."""
    style = chip_style(strength, outlined, underlined)
    return tag("span", style, _told(text), mark and tag("span", "font-size:11px;margin-left:3px", mark), title=title)


def chip_style(strength: float | None, outlined: bool = False, underlined: bool = False) -> str:
    """The style of a token on the colour of its strength."""
    hues = (_ASIDE, MUTED) if strength is None else (color(strength), text_color(strength))
    style = f"background-color:{hues[0]};color:{hues[1]};padding:2px;margin:0 1px;{_TOKEN}"
    style += f";outline:2px solid {INK};outline-offset:-1px" if outlined else ""
    return style + (f";border-bottom:3px double {INK}" if underlined else "")


def boxed(text: str, title: str = "", line: str = "solid", arrow: str = "") -> Html:
    """A token that is predicted, in a frame."""
    style = f"color:{INK};border:1.5px {line} {INK};padding:1px 4px;{_TOKEN};{_EACH_LINE}"
    return joined(arrow and f"\u2002{arrow}\u2002", tag("span", style, _told(text), title=title))


def _told(text: str) -> Html:
    """`visible(text)`, in which what stands for something else is fainter or smaller; lines may end before a space."""
    parts: list[Html | str] = []
    for i, (char, shown) in enumerate(zip(text, _shown(text), strict=True)):
        if i and char == " " and not text[i - 1].isspace():
            parts.append(tag("wbr"))
        style = "font-size:.75em" if len(shown) > 2 else "opacity:.5"
        parts.append(shown if shown == char else tag("span", style, shown))
    return joined(*parts) or tag("span", "opacity:.5", visible(text))


def in_short(texts: Sequence[str], length: int = 160) -> str:
    r"""The tokens of a prompt as one line of text, of a long one the beginning and the end.

    Example:
        >>> from tl_scopes.views.markup import in_short
        >>> in_short([" a", " b\n"]), in_short(["word "] * 99, 24)
        (' a b↵', 'word word wor … rd word ')
    """
    whole = "".join(texts)
    if len(whole) > length:
        end = length // 3
        whole = f"{whole[: length - end - 3].rstrip()} … {whole[-end:].lstrip()}"
    return "".join(" " if char == " " else shown for char, shown in zip(whole, _shown(whole), strict=True))


def about(what: str, texts: Sequence[str]) -> Html:
    """What an answer is about, before the text of its prompt."""
    quoted = tag("span", "unicode-bidi:isolate", f"“{in_short(texts)}”")
    return tag("div", f"color:{INK};margin-top:4px;font-size:13px", f"{what} ", quoted)


def is_right_to_left(text: str) -> bool:
    """Whether any of its letters is written from right to left, and so may reorder what stands beside it."""
    return any(unicodedata.bidirectional(char) in ("R", "AL", "AN") for char in text)


def isolated(text: str) -> str:
    """Plain text that does not reorder what stands beside it, for where no style can see to that."""
    return f"\u2068{text}\u2069" if is_right_to_left(text) else text


def visible(text: str) -> str:
    r"""A token's text on one line, with everything in it visible.

    Example:
        >>> from tl_scopes.views.markup import visible
        >>> visible(" are\n"), visible("a\u200bb"), visible(""), visible("<0xE2>")
        ('·are↵', 'aU+200Bb', '∅', '<0xE2>')
    """
    return "".join(_shown(text)) or "∅"


def _shown(text: str) -> Iterable[str]:
    """The text that is shown for each character: itself, where it can be seen."""
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
