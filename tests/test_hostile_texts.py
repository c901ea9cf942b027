"""No text becomes markup or script, whatever field of whatever answer it stands in."""

import ast
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tl_scopes as tls
from tests.pictures import LINEARITY, PROBE, SENTENCE, SINKS, Reader, answer, browse, needs_browser
from tl_scopes import views
from tl_scopes.models import Target, Token
from tl_scopes.results.attribution import Prediction
from tl_scopes.views import attribution as card
from tl_scopes.views.markup import Html, joined, tag

# Types in annotations are not checked here: what was read from a file has texts where numbers belong.
pytestmark = pytest.mark.usefixtures("no_type_checks")


def evil(field: str) -> str:
    """A text that says where it ran, if it does."""
    return f"<img src=x onerror=\"document.documentElement.dataset.hacked='{field}'\"></script>&lt;$\\frac{{$"


def hostile_answer(**changes: Any) -> tls.Attribution:
    return answer(
        [evil("token"), "a", "b"],
        [0.5, 0.2, 0.3],
        **{
            "target": Target((Token(evil("target id"), evil("target")),)),  # type: ignore[arg-type]
            "versus": Target((Token(7, evil("versus")),)),
            "scope": evil("scope"),
            "unit": evil("unit"),
            "predictions": (Prediction(Token(evil("prediction id"), evil("prediction")), 0.5),),  # type: ignore[arg-type]
            "wrt": evil("wrt"),
            "of": evil("of"),
            "model": evil("model"),
            "dtype": evil("dtype"),
            "notes": (evil("note"),),
        }
        | changes,
    )


PLACED: dict[str, Any] = {"positions": (evil("position"), 1, 2), "position": evil("read position")}


def hostile_map() -> tls.AttributionMap:
    first = replace(hostile_answer(), position=0).without([1, 2])
    return tls.AttributionMap((first, hostile_answer()))


def hostile_comparison(**changes: Any) -> tls.Comparison:
    return tls.compare({evil("name"): hostile_answer(**changes), "plain": hostile_answer(**changes, model="other")})


def hostile_checks() -> tls.Checks:
    fields: list[Any] = [evil(field) for field in ("check", "verdict", "finding", "cost")]
    return tls.Checks((tls.Check(*fields),), hostile_answer(**PLACED))


def hostile_linearity() -> tls.LinearityReport:
    return replace(
        LINEARITY,
        str_tokens=(evil("token"), "b"),
        positions=(evil("position"), 1),
        scope=evil("scope"),
        unit=evil("unit"),
        nearest_token=(evil("nearest"), "c"),
        notes=(evil("note"),),
    )


def hostile_sinks() -> tls.SinkReport:
    tokens = [evil("token"), *SINKS.str_tokens[1:]]
    return replace(
        SINKS,
        model=evil("model"),
        str_tokens=tuple(tokens),
        answers={evil("name"): answer(tokens, [1.0] * 8)},
        prediction=Prediction(Token(3, evil("prediction")), 0.5),
        likeliest=((evil("instead"), "x"),) * 4,
        notes=(evil("note"),),
    )


ASKED = ("scope", "unit", "note", "model", "dtype", "wrt", "of")
TOKENS = ("token", "target", "versus", "prediction")
STATIC: dict[str, tuple[Callable[[], str], tuple[str, ...]]] = {
    "Attribution": (
        lambda: hostile_answer(**PLACED).to_html(),
        (*ASKED, *TOKENS, "prediction id", "position", "read position"),
    ),
    "Attribution, fragment": (lambda: hostile_answer(**PLACED)._repr_html_(), (*ASKED, *TOKENS, "prediction id")),
    "AttributionMap": (lambda: hostile_map().to_html(), (*ASKED, "token")),
    "AttributionMap, fragment": (lambda: hostile_map()._repr_html_(), (*ASKED, "token")),
    "Comparison": (lambda: hostile_comparison(**PLACED).to_html(), ("name", "unit", "note", "model", *TOKENS[:3])),
    "Comparison, fragment": (lambda: hostile_comparison(**PLACED)._repr_html_(), ("name", "position")),
    "Checks": (
        lambda: hostile_checks()._repr_html_(),
        ("check", "verdict", "finding", "cost", "scope", "model", "read position"),
    ),
    "Checks below an Attribution": (
        lambda: card.page(hostile_answer(), hostile_checks()._repr_html_()),
        ("check", "token", "verdict", "prediction id"),
    ),
    "LinearityReport": (lambda: hostile_linearity()._repr_html_(), ("scope", "unit", "note", "token", "position")),
    "SinkReport": (
        lambda: hostile_sinks()._repr_html_(),
        ("model", "token", "name", "prediction", "instead", "note"),
    ),
}
LIVE: dict[str, Callable[[], Any]] = {
    "Attribution": lambda: hostile_answer(**PLACED).show(),
    "AttributionMap": lambda: hostile_map().show(),
    "Comparison": lambda: hostile_comparison(**PLACED).show(),
    "SinkReport": lambda: hostile_sinks().show(),
}


def assert_no_markup(html: str) -> Reader:
    reader = Reader(html)
    for name, attributes in reader.elements:
        assert name != "script"
        assert name != "img" or str(attributes["src"]).startswith("data:image/png;base64,")
        assert not [key for key in attributes if key.startswith("on")]
    return reader


@pytest.mark.parametrize("name", STATIC)
def test_no_text_becomes_markup(name: str) -> None:
    """Every field is shown, in the text, in a tooltip or in what stands for an image, and is text there."""
    draw, fields = STATIC[name]
    reader = assert_no_markup(draw())
    attributes = [value or "" for _, given in reader.elements for value in given.values()]
    for field in fields:
        shown = f"hacked='{field}'"
        assert any(shown in text.replace("·", " ").replace("\\'", "'") for text in (reader.text, *attributes)), field


@pytest.mark.parametrize("name", LIVE)
def test_no_text_becomes_markup_or_script_in_a_live_view(name: str) -> None:
    view = LIVE[name]()
    html = view._repr_html_()
    scripts = re.findall("<script>(.*?)</script>", html, re.DOTALL)
    assert html.count("<script") == html.count("</script") == len(scripts) == len(getattr(view, "views", [view]))
    for outside in re.split("<script>.*?</script>", html, flags=re.DOTALL):
        assert_no_markup(outside)
    for script in scripts:
        assert "<" not in script[script.index("props = ") : script.index("};", script.index("props = "))]


@needs_browser
def test_nothing_runs_in_a_browser(tmp_path: Path) -> None:
    """Nor in circuitsvis' own elements, tooltips among them."""
    hover = """<script>setTimeout(() => document.querySelectorAll(".colored-tokens > span, .colored-tokens-multi span")
      .forEach(span => span.dispatchEvent(new MouseEvent("mouseenter", {clientX: 9, clientY: 9}))), 2000)</script>"""
    shown = [draw() for draw, _ in STATIC.values()] + [draw()._repr_html_() for draw in LIVE.values()]
    dom = browse("<!doctype html>" + "\n".join(shown) + hover + PROBE, tmp_path)
    assert "data-hacked" not in dom
    assert 'data-requests="0"' in dom
    assert dom.count("<canvas") >= 2  # circuitsvis has drawn
    assert "hacked" in dom


def test_an_answer_read_from_json() -> None:
    """Either it is refused, or its texts stay texts where numbers belong."""
    record = json.loads(SENTENCE.to_json())
    for change in (
        {"positions": [evil("position"), *range(1, 7)]},
        {"predictions": [[[evil("prediction id"), "a"], 0.5]]},
        {"target": [evil("target id"), "a"]},
    ):
        try:
            read = tls.Attribution.from_json(json.dumps(record | change))
        except ValueError:
            continue
        assert_no_markup(read.to_html())
        assert_no_markup(read._repr_html_())


def test_a_model_in_a_folder_named_like_a_tag() -> None:
    report = replace(SINKS, model="<img src=x onerror=alert(1)>")
    assert "&lt;img src=x onerror=alert(1)&gt; · 8 tokens" in report._repr_html_()


# -- where it is seen to ----------------------------------------------------------------------------------------------


def test_what_is_not_html_is_escaped() -> None:
    bold = tag("b", "", "1 < 2")
    assert bold == "<b>1 &lt; 2</b>"
    assert tag("i", "", bold, "&") == "<i><b>1 &lt; 2</b>&amp;</i>"
    assert tag("i", "", title='"') == '<i title="&quot;"></i>'
    assert joined(bold, "", "<", by=" & ") == "<b>1 &lt; 2</b> &amp; &lt;"
    assert isinstance(joined("a"), Html)
    # What is put together in another way is taken for text, which is seen at once and runs nothing.
    for mistake in (bold + "<", f"{bold}<", "".join([bold, "<"])):
        assert tag("i", "", mistake) == "<i>&lt;b&gt;1 &amp;lt; 2&lt;/b&gt;&lt;</i>"


def test_html_is_made_in_one_file() -> None:
    """Others can make none of their own: they neither escape nor write tags."""
    for path in Path(views.__path__[0]).glob("*.py"):
        # live.py writes its script below a finished element; explorer.py its own script and style, files of ours, and
        # what it shows as JSON (tests/test_explorer.py has hostile tokens in a browser).
        if path.name in ("markup.py", "live.py", "explorer.py"):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "Html" or not node.args, f"{path.name}, line {node.lineno}"
            if isinstance(node, ast.ImportFrom):
                assert node.module != "html", path.name
