"""The explorer: one page with a script of its own, in which a person asks which token moved which prediction.

The script and the style sheet lie beside this file. What the page shows travels as JSON, in which `<` is escaped, and
the script sets every text by `textContent`, so that no token can become markup. A content security policy in the page
allows this one script, by its hash, and no request to any network.
"""

import json
from base64 import b64encode
from collections.abc import Iterable
from functools import cache
from hashlib import sha256
from html import escape
from importlib.resources import files
from itertools import groupby
from typing import TYPE_CHECKING, Any

from tl_scopes.views import attribution_map
from tl_scopes.views.markup import THEMES, Html, distinct, joined, tag, visible
from tl_scopes.views.palette import RAMPS, dark

if TYPE_CHECKING:
    from tl_scopes.circuits.paths import Paths
    from tl_scopes.explorer import Explorer
    from tl_scopes.results.attribution_map import AttributionMap

LARGEST = 600_000
"""How many scores one page holds at most: about 5 MB, which a browser opens in a second and a notebook can save."""

_ASKED = "Type a prompt in to see which of its tokens moves which prediction. Ctrl+Enter asks, Enter begins a new line."

_BODY = """<div id="app" hidden>
<h1 id="title"></h1><div class="small" id="about"></div>
<div class="controls">
<label>scope <select id="scope"></select></label> <label>show <select id="column"></select></label>
<label>number <select id="value"></select></label> <label>colour <select id="colour"></select></label>
<label><input type="checkbox" id="bos"> BOS</label> <label><input type="checkbox" id="template"> template</label>
<label id="layers">layer <input type="range" id="layer" min="-1" value="-1"> <span id="layer-name"></span></label>
<a id="link" class="small">link to this view</a>
</div>
<div class="parts">
<div><h2 id="what" aria-live="polite"></h2><div id="text" tabindex="0" role="group" aria-label="the tokens"></div>
<div class="legend"><div><div id="ramp"></div><div id="ends"></div></div><div class="small" id="unit"></div></div>
<div class="small" id="told"></div></div>
<div><h2 id="after"></h2><table id="next"></table><h2 id="order"></h2><table id="top"></table></div>
</div>
<div class="small" id="notes"></div>
</div>"""


def page(explored: "Explorer", *above: Html) -> Html:
    """A complete page, which needs no network; other elements may stand above the explorer.

    Where no script runs, it shows the static card of the first map.
    """
    data = tag("script", "", Html(_written(record(explored))), type="application/json", id="data")
    without = tag("noscript", "", attribution_map.fragment(explored.maps[0]))
    return document(_title(explored), *above, Html(_BODY), without, data, tag("script", "", Html(_asset("js"))))


def asked(title: str, prompt: str = "", error: str = "") -> Html:
    """A page with a form for a prompt, and what was wrong with the last one."""
    told = tag("p", "", error, **{"class": "error", "role": "alert"}) if error else Html()
    help = tag("p", "", _ASKED, **{"class": "small"})
    script = tag("script", "", Html(_asset("js")))
    return document(title, tag("h1", "", title), help, form(prompt, autofocus="autofocus"), told, script)


def form(prompt: str, **attributes: str) -> Html:
    """Where a prompt is typed in."""
    attributes |= {"aria-label": "prompt", "spellcheck": "false"}
    # A line break at the start of a text area is not a part of its text.
    area = tag("textarea", "", "\n" + prompt, name="prompt", **attributes)
    button = tag("button", "", "Explore", title="Ctrl+Enter")
    return tag("form", "", area, button, action="/", method="get", **{"class": "ask"})


def document(title: str, *parts: Html) -> Html:
    """A page in the explorer's style, in which no script runs but the explorer's own."""
    policy = (
        f"default-src 'none'; script-src 'sha256-{_digest()}'; style-src 'unsafe-inline'; img-src data:; "
        "form-action 'self'; base-uri 'none'"
    )
    head = tag(
        "head",
        "",
        tag("meta", charset="utf-8"),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">'),
        tag("meta", name="viewport", content="width=device-width"),
        tag("title", "", title),
        tag("style", "", Html(_asset("css"))),
    )
    return joined(Html("<!doctype html>\n"), tag("html", "", head, tag("body", "", *parts), lang="en"), "\n")


def fragment(explored: "Explorer") -> Html:
    """The page in a frame, to be put into a notebook.

    The frame has no access to the page around it. It follows the colours of the notebook's theme.
    """
    lines = sum(map(len, explored.str_tokens)) / 45
    # Above and below stand controls and notes, and beside the text two tables.
    height = f"{min(900, 190 + max(410, 70 + 31 * lines)):.0f}px"
    style = f"width:100%;height:{height};border:1px solid #d8dee4;border-radius:8px;resize:vertical"
    frame = (
        f'<iframe class="tl-scopes" sandbox="allow-scripts" title="{escape(_title(explored))}" style="{style}" '
        f'srcdoc="{escape(page(explored))}"></iframe>'
    )
    return joined(THEMES, Html(frame))


def record(explored: "Explorer") -> dict[str, Any]:
    """What the page shows, as JSON knows it."""
    last = explored.maps[0].answers[-1]
    said = explored.ending is not None
    texts = last.shown_tokens if explored.ending is None else (*last.shown_tokens, explored.ending)
    predictions: list[Any] = [None] * len(texts)
    for answer in explored.maps[0]:
        predictions[answer.position + said] = [
            [visible(one.token.text), _short(one.probability)] for one in answer.predictions
        ]
    return {
        "title": _title(explored),
        "about": f"{last.model} · {last.dtype} · {last.wrt} → {last.of}",
        "tokens": [list(token) for token in _tokens(texts)],
        "parts": list(last.parts),
        "said": said,
        "bos": explored.bos,
        "ramps": [[_channels(ramp), _channels(map(dark, ramp))] for ramp in RAMPS],
        "maps": [_map(one, len(texts), said) for one in explored.maps],
        "next": predictions,
        "carried": explored.carried and _carried(explored.carried),
    }


def _channels(hues: Iterable[str]) -> list[list[int]]:
    return [list(bytes.fromhex(hue[1:])) for hue in hues]


def _tokens(texts: tuple[str, ...]) -> list[tuple[str, bool, int]]:
    """For each token its visible text, whether a line may break before it, and how many lines end in it."""
    before = ["", *texts[:-1]]
    return [
        (visible(text), text[:1].isspace() or not previous[-1:].isalnum(), text.count("\n"))
        for previous, text in zip(before, texts, strict=True)
    ]


def _map(one: "AttributionMap", size: int, said: bool) -> dict[str, Any]:
    """A row stands at the token after which its prediction is read, or, where that was said, at the predicted token."""
    last = one.answers[-1]
    rows: list[Any] = [None] * size
    explained: list[Any] = [None] * size
    targets: list[Any] = [None] * size
    for answer in one:
        rows[answer.position + said] = [_short(score) for score in answer.scores.tolist()]
        if answer.target is not None:
            against = f" against {visible(answer.versus.text)}" if answer.versus is not None else ""
            targets[answer.position + said] = visible(answer.target.text)
            explained[answer.position + said] = visible(answer.target.text) + against
    notes = [f"Note: {note}" for note in distinct(note for answer in one for note in answer.notes)]
    notes += [f"Made with {last.provenance}"] if last.provenance is not None else []
    return {
        "scope": last.question,
        "unit": last.unit,
        "rows": rows,
        "explained": explained,
        "targets": targets,
        "notes": notes,
    }


def _carried(paths: "Paths") -> dict[str, Any]:
    last = paths.layers[-1]
    return {
        "scope": paths.question,
        "unit": paths.unit,
        "position": paths.position,
        "answer": visible(paths.target.text) if paths.target is not None and paths.target.is_span else None,
        "tokens": list(paths.positions),
        "values": [[[_short(v) for v in of] for of in layer] for layer in paths.values.tolist()],
        "names": [f"before layer {n}" if n < last else "behind the last layer" for n in paths.layers],
    }


def _title(explored: "Explorer") -> str:
    last = explored.maps[0].answers[-1]
    parts = last.parts or ("",) * len(last.shown_tokens)
    said = groupby(zip(last.shown_tokens, parts, strict=True), key=lambda one: one[1])
    messages = ["".join(text for text, _ in one if text != "⋯").strip() for part, one in said if part != "template"]
    # On one line, and as it reads: what joins two signs to one emoji stays.
    text = " ".join(" / ".join(filter(None, messages)).split()) + (explored.ending or "")
    return f"tl_scopes: '{text if len(text) <= 80 else text[:79] + '…'}'"


def _short(value: float) -> float | int:
    """Four digits, which is more than a colour tells."""
    short = float(f"{value:.4g}")
    return int(short) if short.is_integer() else short


def _written(data: object) -> str:
    # "</script>" would end the script from within a string, and "<!--" hide its end.
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


@cache
def _asset(kind: str) -> str:
    return files("tl_scopes.views").joinpath(f"explorer.{kind}").read_text(encoding="utf-8")


@cache
def _digest() -> str:
    return b64encode(sha256(_asset("js").encode()).digest()).decode()
