"""A directive of the documentation, `shown`: code, run when the site is built, and the picture that it ends with.

So no picture grows old but those of stored answers. The code of a page has one namespace, from top to bottom, and
`here`, the folder of the pages. With the option `hide` the code is not shown.
"""

import ast
import warnings
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.util.docutils import SphinxDirective

HERE = Path(__file__).parent


def names() -> dict[str, Any]:
    """A namespace for the code of one page."""
    return {"__name__": "__main__", "here": HERE}


def evaluated(code: str, known: dict[str, Any]) -> Any:
    """Run code, and return the value of its last line where that is an expression."""
    tree = ast.parse(code)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a stored answer was made with other versions, say
        exec(compile(tree, "<shown>", "exec"), known)
        return eval(compile(ast.Expression(last.value), "<shown>", "eval"), known) if last else None


def picture(value: Any) -> str:
    """The HTML of a value that has a picture; empty for one that is told in words."""
    return str(value._repr_html_()) if hasattr(value, "_repr_html_") else ""


class Shown(SphinxDirective):
    """Code, and what it ends with."""

    has_content = True
    option_spec = {"hide": directives.flag}  # noqa: RUF012

    def run(self) -> list[nodes.Node]:
        """Called by Sphinx."""
        code = "\n".join(self.content)
        value = evaluated(code, self.env.temp_data.setdefault("shown", names()))
        parts: list[nodes.Node] = []
        if "hide" not in self.options:
            parts.append(nodes.literal_block(code, code, language="python"))
        if html := picture(value):
            parts.append(nodes.raw("", f'<div class="shown">{html}</div>', format="html"))
        elif value is not None:
            parts.append(nodes.literal_block(repr(value), repr(value), language="text"))
        return parts


def setup(app: Any) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_directive("shown", Shown)
    return {"parallel_read_safe": True}
