"""circuitsvis' components, alive in a notebook without asking any web site."""

import gzip
import json
import sys
from base64 import b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any
from uuid import uuid4

from tl_scopes.views.markup import Html, joined, lit, sheet, tag

_SCRIPT = """<script>{
  const source = "%(source)s", props = %(props)s;
  if (source) window.tlScopesCircuitsVis ??= new Response(
    new Blob([Uint8Array.from(atob(source), c => c.charCodeAt())]).stream().pipeThrough(new DecompressionStream("gzip"))
  ).text().then(text => {
    document.head.append(Object.assign(document.createElement("script"), {textContent: text}));
    return window.CircuitsVis;
  });
  // A number that is written otherwise: arithmetic takes the number, and whatever shows it the text.
  const revive = value => value?.written
    ? Object.assign([value.written], {valueOf: () => value.number})
    : Array.isArray(value) ? value.map(revive) : value;
  for (const name in props) props[name] = revive(props[name]);
  window.tlScopesCircuitsVis?.then(library => library.render("%(id)s", library["%(component)s"], props));
}</script>"""

_carrier = ""  # the last run of a cell in which a view carried the script


class Written:
    """A number that a component shows as another text.

    circuitsvis colours by a value and writes the same value into the tooltip. Here the value is a strength and the text
    tells the score.
    """

    def __init__(self, number: float, text: str) -> None:
        self.fields = {"number": number, "written": text}


class _Shown:
    """What a notebook shows of one view or of several."""

    about: str

    def __repr__(self) -> str:
        return f"LiveView({self.about})"

    def _repr_html_(self) -> str:
        return self._html(_compressed_script())

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        """The forms in which a notebook may show the view."""
        global _carrier
        shell = getattr(sys.modules.get("IPython"), "get_ipython", object)()
        parent: dict[str, Any] = getattr(shell, "get_parent", dict)()
        run = parent.get("header", {}).get("msg_id", "")
        carried, _carrier = run != "" and run == _carrier, run
        return {"text/html": self._html("" if carried else _compressed_script()), "text/plain": repr(self)}

    def _html(self, source: str) -> str:
        raise NotImplementedError


@dataclass(frozen=True, eq=False, repr=False)
class LiveView(_Shown):
    """One of circuitsvis' components in a live notebook, and a static picture wherever no script runs.

    circuitsvis' script comes from the installed package, and no web site is asked for it. The first view in a page that
    needs the script evaluates it, once. Every view that is asked for by itself carries the script (0.5 MB compressed,
    1.3 MB as it is), so that each works alone: saved, reopened, beside a cleared cell, or where every cell has a frame
    of its own (Colab). Where one run of a notebook cell displays several views, only the first carries it. Where no
    script runs (GitHub, PDF, a notebook that is not trusted) the static picture stays in its place.

    Attributes:
        component: the component's name in circuitsvis.
        props: its properties by their JavaScript names. The values are what JSON knows, and `Written`.
        static: the static picture, whose place the component takes.
        frame: a function that puts the component into what surrounds it.
        about: the component and what it shows, in words, for where there is no HTML.
        rules: selectors within the component, each with the style that it has here. A component with rules stands in
            a line of text and has the colours of the card; one without is turned around for dark cards as a whole.
    """

    component: str
    props: Mapping[str, Any]
    static: Html
    frame: Callable[[Html], Html] = joined
    about: str = ""
    rules: tuple[tuple[str, str], ...] = ()

    def _html(self, source: str) -> str:
        place, script = self.parts(source)
        return self.frame(place) + script

    def parts(self, source: str = "") -> tuple[Html, str]:
        """The place of the component, which holds the static picture, and the script that puts it there."""
        name = f"tl-scopes-{uuid4().hex}"
        # "</script>" would end the script from within a string, and "<!--" hide its end.
        props = json.dumps(self.props, default=lambda written: written.fields).replace("<", "\\u003c")
        fields = {"props": props, "source": source, "id": name, "component": self.component}
        if not self.rules:
            return lit(self.static, id=name), _SCRIPT % fields
        styles = sheet((f"#{name} {selector}", style) for selector, style in self.rules)
        return joined(styles, tag("span", "", self.static, id=name)), _SCRIPT % fields


@dataclass(frozen=True, eq=False, repr=False)
class LiveViews(_Shown):
    """Several components in one frame, which takes the place of each.

    Attributes:
        views: the components.
        frame: a function that puts them into what surrounds them.
        about: what they show, in words, for where there is no HTML.
    """

    views: tuple[LiveView, ...]
    frame: Callable[..., Html]
    about: str

    def _html(self, source: str) -> str:
        parts = [view.parts("" if i else source) for i, view in enumerate(self.views)]
        return self.frame(*(place for place, _ in parts)) + "".join(script for _, script in parts)


def as_html(text: str) -> str:
    """Text for components that read it as HTML: word joiners, which cannot be seen, keep it from becoming markup."""
    return text.replace("<", "<\u2060").replace("&", "&\u2060")


MOST_TOKENS = 4_000
"""How many tokens are drawn as text: each has a style of its own."""


def require_drawable(count: int, most: int = 160_000, what: str = "cells") -> None:
    """Refuse a picture of so many cells or tokens that a browser would stand still.

    Raises:
        ValueError: for more than the most, which take Chromium half a minute.
    """
    if count > most:
        raise ValueError(
            f"{count:,} {what} are too many for a browser, which would stand still: take fewer tokens, predictions or "
            "heads, or the static picture."
        )


@cache
def _compressed_script() -> str:
    return b64encode(gzip.compress(files("circuitsvis").joinpath("dist/cdn/iife.js").read_bytes())).decode()
