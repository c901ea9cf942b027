"""How the documentation is built: `sphinx-build -W docs docs/_build`, which needs `pip install .[docs]`."""

import importlib.metadata
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

project = "tl_scopes"
author = "the tl_scopes authors"
copyright = "2026, the tl_scopes authors"
release = importlib.metadata.version("tl-scopes")
html_title = f"tl_scopes {release}"

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "myst_nb",
    "sphinx_copybutton",
    "shown",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_static_path: list[str] = []
default_role = "code"
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_attr_annotations = False
napoleon_preprocess_types = False
highlight_language = "python3"
add_module_names = False
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": False}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
smartquotes = False
nb_execution_mode = "off"  # the tests run the notebooks, and compare them with their stored output
suppress_warnings = ["misc.highlighting_failure"]

SLOT = re.compile(r"(Unit|Cost|Raises|Source|Departure|Args|Yields|Returns): +(\S.*)")
"""A slot of our docstrings whose text begins on its line."""


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """A docstring as reStructuredText: slots in bold, equations as they are written, other text without markup."""
    within = ""  # what the indented lines belong to
    for line in lines:
        indented, slot = line.startswith("    "), SLOT.fullmatch(line)
        if slot:
            within = "slot"
            yield from ("", f"**{slot[1]}.** {_plain(slot[2])}")
        elif re.fullmatch(r"(Args|Raises|Yields|Returns|Attributes|Example):", line):
            within = "section"
            yield from ("", line)
        elif indented and within == "slot":
            yield _plain(line.strip())
        elif indented and not within:
            within = "equation"
            yield from ("", ".. code-block:: text", "", line)
        elif indented and within == "section" and ">>>" not in line and not line.strip().startswith(("...", "(")):
            yield line if within == "example" else _plain(line)
        else:
            if line and not indented:
                if within == "equation":
                    yield ""
                within = ""
            yield line if indented else _plain(line)


def _plain(text: str) -> str:
    """Text whose bars, stars and underscores mean nothing, outside of code."""
    parts = text.split("`")
    return "`".join(part if i % 2 else re.sub(r"([|*]|_(?=\W|$))", r"\\\1", part) for i, part in enumerate(parts))


def _rewrite(app: Any, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    lines[:] = list(_paragraphs(lines))


def _notebooks(app: Any) -> None:
    """The notebooks, beside the pages that show them."""
    target = HERE / "notebooks"
    target.mkdir(exist_ok=True)
    for notebook in sorted((HERE.parent / "demos").glob("*.ipynb")):
        shutil.copyfile(notebook, target / notebook.name)


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", _rewrite, priority=400)  # before napoleon
    app.connect("builder-inited", _notebooks)
