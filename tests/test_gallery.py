"""The gallery: its code runs, each page has a picture, a number and a caveat, and the pictures need no network."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("sphinx", reason="the documentation's packages are not installed")

DOCS = Path(__file__).parent.parent / "docs"
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted((DOCS / "gallery").glob("*.md"))}


def extension() -> ModuleType:
    """The directive that the pages use."""
    found = importlib.util.spec_from_file_location("shown", DOCS / "shown.py")
    assert found
    assert found.loader
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES)
def test_page(page: str) -> None:
    """The first block ends with a picture; the number is told; no picture asks for anything that is not in it."""
    shown, text = extension(), PAGES[page]
    known = shown.names()
    blocks = [code.replace(":hide:\n", "") for code in re.findall(r"```\{shown\}\n(.*?)```", text, re.DOTALL)]
    values: list[Any] = [shown.evaluated(code, known) for code in blocks]
    assert len(values) == 2
    picture = shown.picture(values[0])
    assert len(picture) > 500
    assert not re.search(r"""(?:src|href)=["'](?!data:)|url\(|@import|https?://""", picture)
    assert shown.picture(values[1]) == ""
    assert values[1] is not None
    assert text.index("**The number.**") < text.index("**The caveat.**")


def test_every_page_is_listed() -> None:
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^gallery/(\w+)$", index, re.MULTILINE)) == sorted(PAGES)
    assert len(PAGES) >= 8


def test_links_lead_somewhere() -> None:
    for page, text in PAGES.items():
        targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
        there = [target.replace("../notebooks/", "../../demos/") for target in targets]
        assert [target for target in there if not (DOCS / "gallery" / target).exists()] == [], page


def test_what_is_told_without_a_picture() -> None:
    shown = extension()
    assert shown.evaluated("x = 1", {}) is None
    assert shown.picture(shown.evaluated("x = 1\nx + 1", {})) == ""
