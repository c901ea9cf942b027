"""Answers and reports to draw, what a picture shows, and a browser that shows it."""

import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import tl_scopes as tls
from tl_scopes.diagnostics.linearity_report import KINDS
from tl_scopes.models import Target, Token
from tl_scopes.results.attribution import Prediction

ARE, IS = Target((Token(389, " are"),)), Target((Token(374, " is"),))
NASTY = [
    "<script>alert(1)</script>",
    '<img src="x" onerror="document.documentElement.dataset.hacked=1">',
    "<!-- <b>",
    "&amp;",
    "\"q'",
    "",
    "\t",
    "  ",
    "<0xE2>",
    "a\u200bb",
    "\u202e",
    "\u0301",
    "\r",
    "\ud83d",
    "übermäßig",
    "100%s",
]


def answer(tokens: list[str], scores: list[float], **changes: Any) -> tls.Attribution:
    fields: dict[str, Any] = {
        "scores": torch.tensor(scores),
        "tokens": torch.arange(len(tokens)) + 1000,
        "str_tokens": tuple(tokens),
        "positions": tuple(range(len(tokens))),
        "position": len(tokens) - 1,
        "target": ARE,
        "versus": None,
        "scope": "SemanticScope(target=' are')",
        "unit": "logit per unit of embedding norm",
        "predictions": (Prediction(ARE.tokens[0], 0.62), Prediction(IS.tokens[0], 0.214)),
        "wrt": "hook_embed",
        "of": "ln_final",
        "model": "some-model",
        "dtype": "float32",
    }
    return tls.Attribution(**fields | changes)


SENTENCE = answer(
    ["<s>", "The", " keys", " near", " the", " cab", "inet"], [0.9, 0.011, 0.05, 0.005, 0.007, 0.01, 0.017]
)


CHECKS = tls.Checks(
    (
        tls.Check(
            "sinks",
            "look",
            "'<|bos|>' at 0 holds 46% of the scores, where an even share is 10%, and 63% of the attention",
            "1 forward pass",
        ),
        tls.Check("leave-one-out", "fine", "replaced, 2 of the top 3 change the prediction", "10 forward passes"),
        tls.Check("estimation", "not applicable", "nothing was estimated", "none"),
    ),
    SENTENCE,
)

_TWO = torch.tensor([0.5, 1.0], dtype=torch.float64)
LINEARITY = tls.LinearityReport(
    str_tokens=(" keys", " door"),
    positions=(2, 9),
    scope="SemanticScope()",
    unit="unit of embedding norm",
    tolerance=0.1,
    sizes=_TWO,
    error=_TWO.expand(len(KINDS), 2, 2),
    radius=_TWO.expand(len(KINDS), 2),
    predicted_radius=_TWO.expand(len(KINDS), 2),
    joint_error=_TWO.expand(len(KINDS), 2),
    joint_radius=_TWO[:1].expand(len(KINDS)),
    joint_predicted_radius=_TWO[:1].expand(len(KINDS)),
    slope=_TWO,
    nearest_distance=_TWO,
    nearest_token=(" key", " doors"),
    removal_change=_TWO.flip(0),
    removal_distance=_TWO,
    probability=0.5,
    left_open=0.5,
)

_MASS = torch.tensor([0.9, *[0.1] * 6, 0.0]).expand(1, 1, 8)
SINKS = tls.SinkReport(
    model="some-model",
    tokens=torch.arange(8),
    str_tokens=(*SENTENCE.str_tokens, " of"),
    position=7,
    threshold=0.3,
    mass=_MASS,
    value_norms=_MASS + 0.1,
    answers={"FisherScope()": answer([*SENTENCE.str_tokens, " of"], [1.0] * 8)},
    prediction=Prediction(ARE.tokens[0], 0.62),
    kl=torch.tensor([[0.1, 0.2]] * 4, dtype=torch.float64),
    likeliest=((" is", " are"),) * 4,
    patterns={(0, 0): torch.ones(8, 8).tril() / torch.arange(1, 9)[:, None]},
)


class Reader(HTMLParser):
    """What HTML shows: its text without markup, its elements, and whether every element is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.open, self.elements = "", list[str](), list[tuple[str, dict[str, str | None]]]()
        self.titled: list[tuple[str, str, str]] = []  # title, style and text of elements with a tooltip
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("br", "wbr", "meta", "img", "input"):
            self.open.append(tag)
        if title := dict(attrs).get("title"):
            self.titled.append((title, dict(attrs).get("style") or "", ""))
            self.depth = len(self.open)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["style"]:
            return
        self.text += data
        if self.titled and len(self.open) >= self.depth:
            title, style, text = self.titled[-1]
            self.titled[-1] = (title, style, text + data)

    @property
    def tokens(self) -> list[tuple[str, str, str]]:
        return [row for row in self.titled if row[0].startswith("position")]


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this computer")

PROBE = """<script>setTimeout(() => Object.assign(document.documentElement.dataset, {
  requests: performance.getEntriesByType("resource").length, text: document.body.innerText}), 3000)</script>"""

# What is drawn on canvases: texts, and the colours of areas in their order. Frames and the clock go on: a browser
# without a screen draws only a few.
CANVAS = """<script>{
  let now = 1e12;
  Date.now = () => now += 20;
  window.requestAnimationFrame = callback => setTimeout(callback, 10, now);
  const texts = new Set(), fills = [], {fillText, fill} = CanvasRenderingContext2D.prototype;
  CanvasRenderingContext2D.prototype.fillText = function(...given) { texts.add(given[0]); fillText.apply(this, given) };
  CanvasRenderingContext2D.prototype.fill = function(...given) { fills.push(this.fillStyle); fill.apply(this, given) };
  setInterval(() => {
    const canvas = [...document.querySelectorAll("canvas")].pop(), shown = document.documentElement.dataset;
    if (!canvas || now < 1e12 + 4000) return;  // until it has its size
    const box = canvas.getBoundingClientRect();
    shown.fills ??= JSON.stringify(fills);
    shown.texts = JSON.stringify([...texts]);
    canvas.dispatchEvent(new MouseEvent("mousemove",
      {clientX: box.left + 0.3 * box.width + now % 3, clientY: box.top + 0.8 * box.height, bubbles: true}));
  }, 50);
}</script>"""


def canvas(dom: str, kind: str) -> list[str]:
    """What `CANVAS` recorded: "texts" or "fills"."""
    found = re.search(f'data-{kind}="([^"]*)"', dom)
    assert found
    return json.loads(unescape(found[1]))


def browse(html: str, folder: Path) -> str:
    """The page after three seconds, as the browser has it."""
    (folder / "page.html").write_text(html, encoding="utf-8")
    assert BROWSER
    options = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    command = [BROWSER, *options.split(), "--disable-sync", "--disable-component-update"]
    command += ["--virtual-time-budget=6000", "--dump-dom"]
    command += [f"--user-data-dir={folder / 'profile'}", f"file://{folder / 'page.html'}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
