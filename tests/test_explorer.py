"""The explorer: what its page holds, and what it does under a mouse, in a real browser."""

import json
import re
from html import unescape
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import tl_scopes as tls
from tests.browser import Browser
from tests.pictures import NASTY, Reader, answer, needs_browser
from tl_scopes.explorer import Explorer, explore
from tl_scopes.models import Target, Token
from tl_scopes.views import explorer as view
from tl_scopes.views.markup import visible
from tl_scopes.views.palette import Scale, color, dark

PROMPT = "The keys to the old cabinet near the door"


def prompt_map(tokens: list[str], scores: torch.Tensor, **changes: Any) -> tls.AttributionMap:
    """From a square of scores, of which the upper triangle is left out."""
    parts = changes.pop("parts", ())
    rows = [scores[i, : i + 1].tolist() for i in range(len(tokens))]
    return tls.AttributionMap(
        tuple(answer(tokens[: i + 1], row, parts=parts[: i + 1], **changes) for i, row in enumerate(rows))
    )


def random(size: int) -> torch.Tensor:
    return torch.rand(size, size, generator=torch.Generator().manual_seed(0)) ** 3 + 0.01


WORDS = ["<s>", "The", " keys", " near", " the", " cab", "inet", " of"]
SCORES = random(8).index_fill(1, torch.tensor([0]), 20.0)
SIGNED = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
PARTS = ("template", "template", *["user"] * 5, "template")
TWO = Explorer(
    (
        prompt_map(WORDS, SCORES),
        prompt_map(WORDS, SIGNED, scope="RelevanceScope()", unit="logit", notes=("a note <b>",)),
    ),
    bos=True,
)


def held(html: str) -> dict[str, Any]:
    """The data in a page."""
    found = re.search('<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert found
    return json.loads(found[1])


# ---------------------------------------------------------------------------------------------------------------------
# The page


def test_explore(tiny: Any) -> None:
    """Each map is that of `attribution_map`, with its options."""
    scopes = [tls.SemanticScope(" are"), tls.RelevanceScope(" are", versus=" is")]
    explored = tls.explore(tiny, PROMPT, scopes, rules="linear")
    both = "SemanticScope(target=' are')", "RelevanceScope(target=' are', versus=' is')"
    written = ", ".join(f"{one} under linear rules" for one in both)
    assert repr(explored) == f"Explorer({written}: 10 tokens, tiny)"
    data = held(explored.to_html())
    for scope, one, shown in zip(scopes, explored.maps, data["maps"], strict=True):
        wanted = tls.attribution_map(tiny, PROMPT, scope, rules="linear")
        assert torch.equal(one.scores, wanted.scores)
        for i, row in enumerate(shown["rows"]):
            assert row == pytest.approx(wanted.scores[i, : i + 1].tolist(), rel=1e-3)
        assert shown["scope"] == wanted[-1].scope + " under linear rules"
    assert data["bos"]
    assert [text for text, *_ in data["tokens"]] == [visible(text) for text in explored.str_tokens]
    assert data["next"][-1][0] == ["·are", pytest.approx(explored.maps[0][-1].predictions[0].probability, rel=1e-3)]
    assert data["maps"][1]["explained"] == ["·are against ·is"] * 10
    assert data["carried"] is None
    assert not tls.explore(tiny, PROMPT, tls.SemanticScope(), prepend_bos=False).bos


def test_the_next_token_of_the_text(tiny: Any) -> None:
    """Each token of the text, its last too, has the row of its own prediction."""
    explored = tls.explore(tiny, PROMPT, tls.SemanticScope(), target="next")
    assert repr(explored) == "Explorer(SemanticScope(): 10 tokens, tiny)"
    data = held(explored.to_html())
    said = ["The", " keys", " to", " the", " old", " cabinet", " near", " the", " door"]
    assert data["said"]
    assert [text for text, *_ in data["tokens"][1:]] == [visible(text) for text in said]
    assert data["maps"][0]["explained"] == [None, *map(visible, said)]
    assert [row and len(row) for row in data["maps"][0]["rows"]] == [None, *range(1, 10)]
    assert not held(tls.explore(tiny, PROMPT, tls.SemanticScope()).to_html())["said"]


def test_an_answer(tiny: Any) -> None:
    """The tokens of an answer are explained, and no others: each has the row of `answer_map`."""
    scopes = [tls.SemanticScope(), tls.RelevanceScope()]
    explored = tls.explore(tiny, PROMPT, scopes, answer=" are old.", rules="linear")
    written = "SemanticScope() under linear rules, RelevanceScope() under linear rules"
    assert repr(explored) == f"Explorer({written}: 10 tokens and 3 of an answer, tiny)"
    data = held(explored.to_html())
    assert [text for text, *_ in data["tokens"][9:]] == ["·door", "·are", "·old", "."]
    assert [len(found) for found in data["next"][10:]] == [5, 5, 5]
    for scope, shown in zip(scopes, data["maps"], strict=True):
        wanted = tls.answer_map(tiny, PROMPT, " are old.", scope, rules="linear")
        assert shown["rows"][:10] == [None] * 10
        for row, one in zip(shown["rows"][10:], wanted, strict=True):
            assert row == pytest.approx(one.scores.tolist(), rel=1e-3, abs=1e-6)
        assert shown["explained"][10:] == ["·are", "·old", "."]


@pytest.mark.parametrize(("scopes", "got"), [(None, "None"), (5, "5"), ("semantic", "'semantic'"), ([3], "3")])
def test_no_scopes(tiny: Any, scopes: Any, got: str, no_type_checks: None) -> None:
    with pytest.raises(TypeError, match=f"expected a scope such as SemanticScope.., got {got}"):
        tls.explore(tiny, PROMPT, scopes)


def test_layers_of_an_answer(tiny: Any) -> None:
    """Where the influence on a whole answer stands, and what it is about."""
    lin = tls.linearize(tiny, PROMPT, answer=" are old.")
    paths = tls.carried_by(lin, tls.SemanticScope(), by="position")
    carried = held(tls.explore(tiny, PROMPT, answer=" are old.", carried=paths).to_html())["carried"]
    assert carried["answer"] == "·are·old."
    assert len(carried["values"][0]) == len(lin.tokens)
    plain = tls.carried_by(tls.linearize(tiny, PROMPT), tls.SemanticScope(), by="position")
    assert held(tls.explore(tiny, PROMPT, carried=plain).to_html())["carried"]["answer"] is None


def test_the_token_explained_is_framed_beside_another(tiny: Any) -> None:
    """The page compares the likeliest tokens with the target alone, whatever it is compared with."""
    shown = held(tls.explore(tiny, PROMPT, tls.SemanticScope(versus=" is")).to_html())["maps"][0]
    assert shown["targets"][-1] == "·are"
    assert shown["explained"][-1] == "·are against ·is"


def test_self_contained(tmp_path: Path) -> None:
    """One script, at most 20 KB; no address; the policy allows nothing else."""
    html = TWO.to_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == html
    assert len(files("tl_scopes.views").joinpath("explorer.js").read_bytes()) <= 20_480
    assert html.count("<script") == 2
    for word in ("http:", "https:", "<link", "@import", "url(", "innerHTML", "eval(", "fetch("):
        assert word not in html
    policy = re.search('http-equiv="Content-Security-Policy" content="([^"]*)"', html)
    assert policy
    assert unescape(policy[1]).startswith("default-src 'none'; script-src 'sha256-")


def test_no_text_can_end_the_data() -> None:
    html = Explorer((prompt_map(NASTY, random(len(NASTY)), unit="</script><!--", notes=("</script>",)),)).to_html()
    html.encode("utf-8")
    assert html.count("</script>") == 2
    assert "<!--" not in html
    data = held(html)
    assert [text for text, *_ in data["tokens"]] == [visible(text) for text in NASTY]
    assert data["maps"][0]["unit"] == "</script><!--"


def test_a_notebook_gets_a_frame() -> None:
    """It holds the whole page, and may not reach the notebook."""
    html = TWO._repr_html_()
    found = re.search('<iframe class="tl-scopes" sandbox="allow-scripts" [^>]*srcdoc="([^"]*)"></iframe>$', html)
    assert found
    assert unescape(found[1]) == TWO.to_html()
    assert "height:600px" in html
    assert "height:900px" in Explorer((prompt_map(["word"] * 300, random(300)),))._repr_html_()


def test_without_a_script_the_static_map_shows() -> None:
    assert TWO.maps[0]._repr_html_() in TWO.to_html()
    without = Reader(re.sub(".*<noscript>(.*)</noscript>.*", r"\1", TWO.to_html(), flags=re.DOTALL))
    assert "SemanticScope(target=' are')" in without.text


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


def test_too_large_a_page_is_refused_before_anything_is_computed(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view, "LARGEST", 100)
    monkeypatch.setattr("tl_scopes.explorer.attribution_map", None)
    with pytest.raises(
        ValueError, match="would hold 110 scores of 10 tokens, .* ask fewer scopes than 2, or a shorter"
    ):
        explore(tiny, PROMPT, [tls.SemanticScope(), tls.FisherScope()])
    monkeypatch.setattr(view, "LARGEST", 50)
    with pytest.raises(ValueError, match=r"would hold 55 scores .*opens 50 well: ask a shorter prompt, or call attri"):
        explore(tiny, PROMPT, tls.SemanticScope())


def test_a_page_of_an_answer_that_is_too_large(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view, "LARGEST", 30)
    monkeypatch.setattr("tl_scopes.explorer.answer_map", None)
    with pytest.raises(ValueError, match="would hold 36 scores of 12 tokens"):
        explore(tiny, PROMPT, tls.SemanticScope(), answer=" are old.")


def test_an_answer_or_the_tokens_of_the_text(tiny: Any) -> None:
    with pytest.raises(ValueError, match="target='next' is about the tokens of the prompt, and answer= about those of"):
        explore(tiny, PROMPT, tls.SemanticScope(), answer=" are old.", target="next")


def test_layers_under_other_rules(tiny: Any) -> None:
    scope = tls.SemanticScope(" are", versus=" is")
    lin = tls.linearize(tiny, PROMPT, rules="linear")
    carried = tls.carried_by(lin, scope, by="position")
    with pytest.warns(
        UserWarning,
        match=r"carried splits the scores of SemanticScope.* under linear rules, and the page "
        r"shows those of SemanticScope\(.*'\): linearise for carried_by with rules=None, as the maps are",
    ):
        tls.explore(tiny, PROMPT, scope, carried=carried)
    tls.explore(tiny, PROMPT, scope, carried=carried, rules="linear")
    tls.explore(tiny, PROMPT, [tls.TemperatureScope(), tls.UnderRulesScope(scope)], carried=carried)


def test_what_does_not_belong_together(tiny: Any, no_type_checks: None) -> None:
    one = prompt_map(WORDS, SCORES)
    with pytest.raises(ValueError, match="at least one map, got none: give at least one scope"):
        explore(tiny, PROMPT, [])
    with pytest.raises(ValueError, match="about different tokens, 8 of .* and 3 of .*: make them from one prompt"):
        Explorer((one, prompt_map(WORDS[:3], SCORES[:3, :3])))
    with pytest.raises(ValueError, match="lacks tokens that were set aside .*: give the whole map"):
        Explorer((one.without([0]),))
    with pytest.raises(TypeError, match="scope"):
        explore(tiny, PROMPT, ["semantic"])  # type: ignore[list-item]
    with pytest.raises(
        TypeError, match=r'carried takes what carried_by\(lin, scope, by="position"\) returns, got a str'
    ):
        explore(tiny, PROMPT, tls.SemanticScope(), carried="x")  # type: ignore[arg-type]
    lin = tls.linearize(tiny, PROMPT)
    heads = tls.carried_by(lin, tls.SemanticScope(), by="head")
    with pytest.raises(ValueError, match="carried is by 'head', and the slider of layers needs positions"):
        explore(tiny, PROMPT, tls.SemanticScope(), carried=heads)
    other = tls.carried_by(tls.linearize(tiny, "The old door"), tls.SemanticScope(), by="position")
    with pytest.raises(ValueError, match="carried is about 4 tokens with which the prompt of 10 does not begin"):
        explore(tiny, PROMPT, tls.SemanticScope(), carried=other)


# ---------------------------------------------------------------------------------------------------------------------
# In a browser


def opened(browser: Browser, explored: Explorer, folder: Path, after: str = "", **options: Any) -> None:
    explored.to_html(folder / "page.html")
    browser.open(f"file://{folder / 'page.html'}{after}", **options)
    assert browser.complaints == []
    assert browser.requests == []


def token(i: int) -> str:
    return f'#text .token[data-i="{i}"]'


def text(browser: Browser, id: str) -> str:
    return browser.run(f"document.getElementById('{id}').innerText")


def grounds(browser: Browser) -> list[str]:
    """The ground of each token, as "#rrggbb"; empty where it has none."""
    found = browser.run(
        "[...document.querySelectorAll('#text .token')]"
        ".map(e => e.style.backgroundColor && getComputedStyle(e).backgroundColor)"
    )
    return [ground and "#" + bytes(map(int, re.findall(r"\d+", ground)[:3])).hex() for ground in found]


def expected(numbers: list[float | None], colors: Any = "root") -> list[str]:
    """The colours of `palette.Scale` for numbers, of which None is not coloured."""
    scale = Scale.of((number for number in numbers if number is not None), colors)
    return ["" if number is None else color(scale.strength(number)) for number in numbers]


def alike(found: list[str], wanted: list[str], apart: int = 2) -> bool:
    return len(found) == len(wanted) and all(
        a == b
        or (
            a
            and b
            and max(abs(x - y) for x, y in zip(bytes.fromhex(a[1:]), bytes.fromhex(b[1:]), strict=True)) <= apart
        )
        for a, b in zip(found, wanted, strict=True)
    )


@needs_browser
def test_hover_and_shift(browser: Browser, tmp_path: Path) -> None:
    """The row of the token under the mouse, in the static card's colours; its column while Shift is held."""
    opened(browser, TWO, tmp_path)
    shares = TWO.maps[0].share
    assert text(browser, "what").startswith("What moves the prediction after ·of (7), explaining ·are")
    assert alike(grounds(browser), expected(shares[7].tolist()))
    browser.mouse(token(4))
    assert text(browser, "what").startswith("What moves the prediction after ·the (4)")
    assert alike(grounds(browser), expected([*shares[4, :5].tolist(), None, None, None]))
    assert "·are" in text(browser, "next")
    assert "62.0%" in text(browser, "next")
    top = TWO.maps[0][4].top(1)[0]
    assert f"{top.share:.1%}" in text(browser, "top")
    browser.mouse(token(2), shift=True)
    assert text(browser, "what").startswith("What ·keys (2) moves")
    assert alike(grounds(browser), expected([None, None, *shares[2:, 2].tolist()]))
    browser.away()
    assert text(browser, "what").startswith("What moves the prediction after ·of (7)")


@needs_browser
def test_hover_over_an_answer(browser: Browser, tmp_path: Path, tiny: Any) -> None:
    """A token of the answer shows what moved it, one of the prompt what it moves."""
    carried = tls.carried_by(tls.linearize(tiny, PROMPT), tls.SemanticScope(), by="position")
    explored = tls.explore(tiny, PROMPT, tls.SemanticScope(), answer=" are old.", carried=carried)
    opened(browser, explored, tmp_path)
    assert text(browser, "what") == "What moves the prediction of . (12)"
    browser.mouse(token(10))
    assert text(browser, "what") == "What moves the prediction of ·are (10)"
    assert text(browser, "after") == "Likeliest in the place of ·are (10)"
    assert browser.run("document.querySelector('#next .focus').innerText") == "·are"
    assert "·keys" in browser.run("document.querySelector('#top tbody tr').innerText")
    browser.mouse(token(2))
    told = "What ·keys (2) moves: the predictions of these tokens"
    assert text(browser, "what") == told
    assert browser.run("document.querySelectorAll('#top tbody tr').length") == 3
    browser.mouse(token(11), shift=True)
    assert browser.run("document.querySelector('#top tbody').innerText").startswith("12")
    browser.away()
    browser.choose("layer", 1)
    assert text(browser, "after") == "Likeliest in the place of ·are (10)"
    assert browser.complaints == []


@needs_browser
def test_pin(browser: Browser, tmp_path: Path) -> None:
    """A pinned token stays while the mouse tells the numbers of others; another click lets it go."""
    opened(browser, TWO, tmp_path)
    browser.mouse(token(5), click=True)
    browser.mouse(token(2))
    assert text(browser, "what").startswith("What moves the prediction after ·cab (5)")
    row = TWO.maps[0][5]
    assert text(browser, "told") == (
        f"·keys (2): {row.scores[2]:.3g} logit per unit of embedding norm, share {row.share[2]:.1%}"
    )
    assert browser.run("document.querySelectorAll('.pinned').length") == 1
    browser.mouse(token(5), click=True)
    assert browser.run("document.querySelectorAll('.pinned').length") == 0
    browser.mouse(token(1), click=True, shift=True)
    browser.away()
    assert text(browser, "what").startswith("What The (1) moves")


@needs_browser
def test_keys(browser: Browser, tmp_path: Path) -> None:
    opened(browser, TWO, tmp_path)
    for key, told in [
        ("ArrowLeft", "What moves the prediction after inet (6)"),
        ("ArrowLeft", "What moves the prediction after ·cab (5)"),
        ("ArrowRight", "What moves the prediction after inet (6)"),
        ("Home", "What moves the prediction after <s> (0)"),
        ("s", "What <s> (0) moves"),
        ("End", "What ·of (7) moves"),
        ("s", "What moves the prediction after ·of (7)"),
    ]:
        browser.press(key)
        assert text(browser, "what").startswith(told), key
    browser.press("ArrowDown")
    assert browser.run("document.getElementById('scope').value") == "1"
    assert alike(grounds(browser), expected(TWO.maps[1].share[7].tolist()))
    assert text(browser, "notes") == "Note: a note <b>"
    browser.press("ArrowUp")
    browser.press("Escape")
    assert browser.run("location.hash") == ""


@needs_browser
def test_scopes_and_signs(browser: Browser, tmp_path: Path) -> None:
    """Scores below zero have the other hue, and the legend says both ends."""
    opened(browser, TWO, tmp_path)
    browser.choose("scope", 1)
    assert alike(grounds(browser), expected(SIGNED[7].tolist()))
    low, middle, high = text(browser, "ends").split("%")[:3]
    assert float(low) == -float(high)
    assert float(middle) == 0
    browser.choose("value", "score")
    assert text(browser, "unit").startswith("logit; vermilion: below zero")


@needs_browser
@pytest.mark.parametrize("colour", ["linear", "log", "even"])
def test_colours(browser: Browser, tmp_path: Path, colour: str) -> None:
    """Each scale does what its name says."""
    line = torch.tensor([0.4, 0.3, 0.2, 0.05, 0.05])
    opened(browser, Explorer((prompt_map(WORDS[:5], line.expand(5, 5)),)), tmp_path)
    browser.choose("colour", colour)
    strengths = {
        "linear": (line / 0.4).tolist(),
        "log": (1 + (line / 0.4).log10() / 3).tolist(),
        "even": [1.0, 0.5, 0.0, 0.0, 0.0],
    }[colour]
    assert alike(grounds(browser), [color(strength) for strength in strengths])
    if colour != "log":  # which the cards do not have
        assert alike(grounds(browser), expected(line.tolist(), colour))
    assert text(browser, "ends").split()[-1] == ("2×" if colour == "even" else "40.0%")
    told = text(browser, "unit")
    assert "vermilion" not in told
    assert told == ("times an even share" if colour == "even" else "share")


@needs_browser
def test_scores_of_all_predictions_on_one_scale(browser: Browser, tmp_path: Path) -> None:
    """By shares a weak prediction has strong colours too; by scores it is pale beside a strong one."""
    scores = torch.tensor([[1.0, 0.0, 0.0], [0.02, 0.01, 0.0], [2.0, 3.0, 1.0]])
    opened(browser, Explorer((prompt_map(WORDS[:3], scores),)), tmp_path)
    browser.mouse(token(1))
    assert grounds(browser)[0] == color(1.0)
    browser.choose("value", "score")
    assert alike(grounds(browser)[:2], [color((0.02 / 3) ** 0.5), color((0.01 / 3) ** 0.5)])


@needs_browser
def test_bos_and_template(browser: Browser, tmp_path: Path) -> None:
    """Template tokens are out until they are asked for; shares are those of the rest."""
    chat = prompt_map(WORDS, SCORES, parts=PARTS)
    opened(browser, Explorer((chat,), bos=True), tmp_path)
    assert alike(grounds(browser), expected([None, None, *chat.share[7, 2:7].tolist(), None]))
    assert browser.run("document.querySelectorAll('.aside').length") == 3
    browser.choose("template", True)
    whole = tls.AttributionMap(tuple(one.with_template() for one in chat.answers))
    assert alike(grounds(browser), expected(whole.share[7].tolist()))
    browser.choose("bos", False)
    assert alike(grounds(browser), expected([None, *whole[7].without([0]).share.tolist()]))
    opened(browser, Explorer((prompt_map(WORDS, SCORES),)), tmp_path)
    for id in ("bos", "template"):
        assert browser.run(f"document.getElementById('{id}').parentNode.hidden")


@needs_browser
def test_the_link_restores_the_view(browser: Browser, tmp_path: Path) -> None:
    opened(browser, TWO, tmp_path)
    browser.choose("scope", 1)
    browser.choose("colour", "log")
    browser.mouse(token(3), click=True, shift=True)
    browser.away()
    hash = browser.run("location.hash")
    assert browser.run("document.getElementById('link').hash") == hash
    seen = text(browser, "app"), grounds(browser)
    opened(browser, TWO, tmp_path, hash)
    assert (text(browser, "app"), grounds(browser)) == seen


@needs_browser
@pytest.mark.parametrize(
    "hash", ["#pin=99&scope=-1&layer=3", "#pin=1e9&colour=<b>&value=&column=x", "#%", "#scope=1.5"]
)
def test_a_link_that_is_wrong(browser: Browser, tmp_path: Path, hash: str) -> None:
    opened(browser, TWO, tmp_path, hash)
    assert text(browser, "what").startswith("What moves the prediction after ·of (7)")


@needs_browser
def test_layers(browser: Browser, tmp_path: Path, tiny: Any) -> None:
    """The slider shows where the influence of a token stands: at first at itself, in the end at the last."""
    lin = tls.linearize(tiny, PROMPT)
    paths = tls.carried_by(lin, tls.SemanticScope(), by="position")
    explored = tls.explore(tiny, PROMPT, tls.SemanticScope(), carried=paths)
    assert "7 layers" in repr(explored)
    opened(browser, explored, tmp_path)
    browser.mouse(token(2))
    for layer, where in ((0, 2), (6, 9)):
        browser.choose("layer", layer)
        assert re.match(
            r"Where the influence of ·keys \(2\) .* stands (before layer 0|behind the last layer)",
            text(browser, "what"),
        )
        assert [i for i, ground in enumerate(grounds(browser)) if ground == color(1.0)] == [where]
    browser.choose("layer", 3)
    assert alike(grounds(browser), expected(paths.values[3, :, 2].tolist()))
    browser.away()
    assert "of all tokens" in text(browser, "what")
    browser.choose("layer", -1)
    assert text(browser, "what").startswith("What moves the prediction")


@needs_browser
def test_a_page_with_layers_says_what_it_lists(browser: Browser, tmp_path: Path, tiny: Any) -> None:
    """The heading over the table goes with what is shown, and what changes nothing cannot be chosen."""
    paths = tls.carried_by(tls.linearize(tiny, PROMPT), tls.SemanticScope(), by="position")
    opened(browser, tls.explore(tiny, PROMPT, tls.SemanticScope(), carried=paths), tmp_path)
    assert text(browser, "order") == "Most influential"
    browser.choose("column", 1)
    browser.mouse(token(2))
    assert text(browser, "order") == "Moved most by ·keys (2)"
    browser.choose("layer", 0)
    assert text(browser, "order") == "Where most of it stands"
    assert text(browser, "top").split()[:2] == ["at", "token"]
    assert browser.run("document.querySelectorAll('#top tbody tr').length") == 1  # the others hold nothing
    off = "['scope', 'column', 'bos', 'template'].map(id => document.getElementById(id).disabled)"
    assert browser.run(off) == [True] * 4
    browser.choose("layer", -1)
    assert browser.run(off) == [False] * 4


@needs_browser
def test_no_token_that_counts(browser: Browser, tmp_path: Path) -> None:
    """Before the first message of a chat all is template: no scale is drawn. BOS is a part of it."""
    opened(browser, Explorer((prompt_map(WORDS, SCORES, parts=PARTS),), bos=True), tmp_path)
    assert browser.run("document.getElementById('bos').disabled")
    browser.mouse(token(1))
    assert text(browser, "unit") == "no token here has a share"
    assert text(browser, "order") == ""
    assert browser.run("document.getElementById('ramp').parentNode.hidden")
    browser.choose("template", True)
    assert not browser.run("document.getElementById('bos').disabled")
    assert not browser.run("document.getElementById('ramp').parentNode.hidden")


@needs_browser
def test_the_pinned_token_is_in_sight(browser: Browser, tmp_path: Path) -> None:
    """A long prompt scrolls: to the token that a link pins, and to the one that a key goes to."""
    many = Explorer((prompt_map([f" w{i}" for i in range(300)], random(300)),))
    seen = (
        "(() => { const t = document.querySelector('.pinned').getBoundingClientRect(), "
        "b = document.getElementById('text').getBoundingClientRect(); "
        "return t.top >= Math.max(0, b.top - 1) && t.bottom <= Math.min(innerHeight, b.bottom + 1) })()"
    )
    opened(browser, many, tmp_path, "#pin=290", height=400)
    assert browser.run(seen)
    for key in ("Home", "End"):
        browser.press(key)
        assert browser.run(seen), key
    browser.press("ArrowDown")  # one scope: the page may scroll
    assert "scope" not in browser.run("location.hash")


@needs_browser
def test_the_heading_is_not_covered(browser: Browser, tmp_path: Path) -> None:
    """The frame around the text, which a key shows, stays below the line over it."""
    opened(browser, TWO, tmp_path)
    browser.run("document.getElementById('text').focus()")
    browser.press("End")
    gap, frame = browser.run(
        "(e => [e.getBoundingClientRect().top - document.getElementById('what').getBoundingClientRect().bottom, "
        "parseFloat(getComputedStyle(e).outlineOffset) + 2])(document.getElementById('text'))"
    )
    assert gap >= frame


def test_the_title_of_a_chat_leaves_the_template_out() -> None:
    parts = ("template", "user", "user", "template", "assistant", "user", "user", "template")
    one = prompt_map(["<s>", "Who", "?", "<a>", "Me.", "Wh", "y?", "<a>"], random(8), parts=parts)
    assert held(Explorer((one,)).to_html())["title"] == "tl_scopes: 'Who? / Me. / Why?'"
    joined = prompt_map(
        ["<s>", "It's \U0001f469\u200d\U0001f4bb", ".\n", "So?"], random(4), parts=("template", *["user"] * 3)
    )
    assert held(Explorer((joined,)).to_html())["title"] == "tl_scopes: 'It's \U0001f469\u200d\U0001f4bb. So?'"


def test_the_title_spells_no_bytes() -> None:
    """Tokens that are bytes of one character are that character in the title."""
    assert "🎉" in Explorer((prompt_map(["<0xF0>", "<0x9F>", "<0x8E>", "<0x89>"], random(4)),)).to_html()[:900]


@needs_browser
def test_a_long_prompt(browser: Browser, tmp_path: Path) -> None:
    """300 tokens: a hover is drawn before the eye sees it."""
    scores = random(300)
    explored = Explorer((prompt_map([f" w{i}" for i in range(300)], scores),) * 2)
    assert len(explored.to_html()) < 2_000_000
    opened(browser, explored, tmp_path)
    browser.mouse(token(150))
    assert "·w150 (150)" in text(browser, "what")
    took = browser.run(
        "(() => { const start = performance.now(); for (let i = 100; i < 120; i++) document.querySelector("
        "`.token[data-i='${i}']`).dispatchEvent(new MouseEvent('mousemove', {bubbles: true})); "
        "return (performance.now() - start) / 20 })()"
    )
    assert took < 200


@needs_browser
def test_hostile_tokens(browser: Browser, tmp_path: Path) -> None:
    """Every token is there as text, and none as markup."""
    target = Target((Token(1, "<img src=x onerror=alert(1)>"),))
    nasty = prompt_map(NASTY, random(len(NASTY)), target=target, scope="<script>alert(1)</script>", notes=("<b>x</b>",))
    opened(browser, Explorer((nasty,)), tmp_path)
    shown = browser.run("[...document.querySelectorAll('#text .token')].map(e => e.textContent)")
    assert shown == [visible(token) for token in NASTY]
    for i in range(len(NASTY)):
        browser.mouse(token(i), click=True)
    assert browser.run("document.querySelectorAll('#app img, #app b, #app script').length") == 0
    assert browser.run("document.documentElement.dataset.hacked") is None
    assert browser.complaints == []


@needs_browser
def test_right_to_left(browser: Browser, tmp_path: Path) -> None:
    hebrew = ["<s>", "של", "ום", " ", "<0xD7>", "<0xA2>", "ולם", " abc", " مرحبا", "12", "!"]
    opened(browser, Explorer((prompt_map(hebrew, random(len(hebrew))),)), tmp_path)
    boxes = browser.run(
        "[...document.querySelectorAll('#text .token')].map(e => [...e.getClientRects()].map(r => [r.left, r.right]))"
    )
    assert all(len(box) == 1 for box in boxes)
    assert all(a[0][1] <= b[0][0] + 0.5 for a, b in pairwise(boxes))


@needs_browser
@pytest.mark.parametrize("is_dark", [False, True])
def test_narrow_and_dark(browser: Browser, tmp_path: Path, is_dark: bool) -> None:
    """420 pixels hold the page; in the dark a stronger colour is a lighter one, and letters can be read."""
    long = prompt_map([*WORDS, " incomprehensibilities", "." * 70], random(10), scope="CustomScope(" + "x" * 80 + ")")
    opened(browser, Explorer((long, TWO.maps[0])[:1], bos=True), tmp_path, width=420, dark=is_dark)
    assert browser.run("document.documentElement.scrollWidth") <= 420
    ground = browser.run("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(31, 31, 31)" if is_dark else "rgb(255, 255, 255)")
    wanted = expected(long.share[9].tolist())
    assert alike(grounds(browser), [dark(hue) for hue in wanted] if is_dark else wanted, apart=16)
    pieces = browser.run(
        "[...document.querySelectorAll('#text .token')].slice(0, 9).map(e => e.getClientRects().length)"
    )
    assert pieces == [1] * 9  # no word is broken


@needs_browser
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_frame_follows_the_notebook(browser: Browser, tmp_path: Path, theme: str) -> None:
    """Its script runs, and it has the colours of JupyterLab's theme, whatever those of the computer are."""
    page = f'<!doctype html><meta charset="utf-8"><body data-jp-theme-light="{str(theme == "light").lower()}">'
    (tmp_path / "page.html").write_text(page + TWO._repr_html_(), encoding="utf-8")
    browser.open(f"file://{tmp_path / 'page.html'}", dark=theme == "light")
    for _ in range(100):  # on a busy computer the frame is drawn later than the page around it
        browser.picture(tmp_path / "frame.png")
        colors = Image.open(tmp_path / "frame.png").convert("RGB").crop((20, 20, 600, 400)).getcolors(1 << 20)
        if len(colors or []) > 20:
            break
    most = max(colors or [])[1]
    assert most == ((255, 255, 255) if theme == "light" else (31, 31, 31))
    assert len(colors or []) > 20  # tokens are drawn
    assert browser.complaints == []


@needs_browser
def test_a_browser_without_script(browser: Browser, tmp_path: Path) -> None:
    opened(browser, TWO, tmp_path, script=False)
    browser.picture(tmp_path / "static.png")
    tree = browser.call("DOM.getDocument", depth=-1)
    found = browser.call("DOM.querySelector", nodeId=tree["root"]["nodeId"], selector="noscript img")["nodeId"]
    box = browser.call("DOM.getBoxModel", nodeId=found)["model"]
    assert box["width"] > 200
