"""What the README, the docstrings and the demos show is what happens."""

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from typer.testing import CliRunner

import tl_scopes as tls
from tl_scopes.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
MODULES = [info.name for info in pkgutil.walk_packages(tls.__path__, "tl_scopes.")]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str, tiny: Any) -> None:
    """Examples know `tls` and `model`, the bundled one."""
    module = importlib.import_module(name)
    assert doctest.testmod(module, extraglobs={"tls": tls, "model": tiny}, optionflags=FLAGS).failed == 0


def test_docstring_examples_exist() -> None:
    """Lest the test above pass because there is nothing to test."""
    finder = doctest.DocTestFinder()
    count = sum(len(test.examples) for name in MODULES for test in finder.find(importlib.import_module(name)))
    assert count >= 10


def examples_of(page: str, text: str, names: dict[str, Any]) -> doctest.DocTest:
    """Every Python block of a page, from top to bottom, in one namespace."""
    blocks = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    return doctest.DocTestParser().get_doctest(blocks, names, page, page, 0)


def test_readme_python() -> None:
    """In a namespace of its own, which has nothing."""
    test = examples_of("README.md", README, {})
    assert len(test.examples) >= 6
    assert doctest.DocTestRunner(optionflags=FLAGS).run(test).failed == 0


@pytest.mark.parametrize("page", [page for page in DOCS if "```python" in DOCS[page]])
def test_docs_python(page: str, tiny: Any) -> None:
    """Pages know `tls` and `model`, the bundled one."""
    test = examples_of(page, DOCS[page], {"tls": tls, "model": tiny})
    assert test.examples
    assert doctest.DocTestRunner(optionflags=FLAGS).run(test).failed == 0


def test_docs_that_run() -> None:
    """Lest the test above pass because it finds nothing."""
    assert sum("```python" in text for text in DOCS.values()) >= 8


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 180
    assert len(README.split()) <= 1500


def test_links_lead_somewhere() -> None:
    for name, text in {"README.md": README, **{f"docs/{name}": text for name, text in DOCS.items()}}.items():
        targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
        assert [one for one in targets if not ((ROOT / name).parent / one).exists()] == []


def console_blocks() -> list[tuple[str, str]]:
    """Commands `$ tl-scopes ...` and the output shown under them."""
    blocks = re.findall(r"```console\n(.*?)```", "\n".join([README, *DOCS.values()]), re.DOTALL)
    return [re.match(r"\$ (tl-scopes [^\n]*)\n(.*)", b, re.DOTALL).groups() for b in blocks if "$ tl-scopes" in b]  # type: ignore[union-attr,misc]


def test_commands_shown() -> None:
    """The output shown is the output."""
    assert console_blocks()
    for command, shown in console_blocks():
        result = CliRunner().invoke(app, shlex.split(command)[1:], env={"COLUMNS": "100", "NO_COLOR": "1"})
        assert result.exit_code == 0, result.output
        lines = [line.rstrip() for line in result.stdout.strip().splitlines()]
        assert lines == [line.rstrip() for line in shown.strip().splitlines()]


DEMOS = sorted((ROOT / "demos").glob("*.ipynb"))


def executed(path: Path) -> Any:
    """The notebook, run from top to bottom, without what libraries print about their progress."""
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=1200, resources=resources, coalesce_streams=True, record_timing=False).execute()
    for cell in notebook.cells:
        cell.outputs = [one for one in cell.get("outputs", ()) if one.get("name") != "stderr"]
        if cell.cell_type != "code":
            del cell["outputs"]
    return notebook


def layouts(notebook: Any) -> list[str]:
    """The markup of each card in it, without texts, colours and numbers."""
    shown = [one.data for cell in notebook.cells for one in cell.get("outputs", ()) if "data" in one]
    cards = [data["text/html"] for data in shown if data["text/plain"].startswith((*tls.__all__, "Checks of"))]
    marked = (re.sub(r'(?<=>)[^<>]+(?=<)| (?:title|src)="[^"]*"', "", card) for card in cards)
    plain = (re.sub(r"#[0-9a-f]{3,6}|[\d.]+", "#", card) for card in marked)
    # Marks of spaces, and places where a line may end, depend on the text.
    return [card.replace('<span style="opacity:#"></span>', "").replace("<wbr>", "") for card in plain]


@pytest.mark.parametrize("path", DEMOS, ids=lambda path: path.name)
def test_demos_run(path: Path) -> None:
    """Each notebook runs from top to bottom, and is committed with its output, in today's layout.

    `python -m tests.test_docs` stores them as they run now.
    """
    stored = nbformat.read(path, as_version=4)
    cells = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells), "commit the notebook with its output"
    assert sum(bool(cell.outputs) for cell in cells) >= len(cells) / 2
    assert all(one.output_type != "error" and one.get("name") != "stderr" for cell in cells for one in cell.outputs)
    assert layouts(stored) == layouts(executed(path)), "the stored pictures are old: store the notebook again"


def test_there_are_demos() -> None:
    assert DEMOS


# -- what is named exists ---------------------------------------------------------------------------------------------

PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")}
PAGES |= {f"docs/{name}": text for name, text in DOCS.items()}
PAGES |= {path.name: "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells) for path in DEMOS}
MIGRATION = re.findall(r"^\| (.*?) \| (.*?) \|$", PAGES["CHANGELOG.md"], re.MULTILINE)
"""What 0.1 called it, and what it is called now."""
PAGES["CHANGELOG.md"] = re.sub(r"^\| .*? \| ", "| ", PAGES["CHANGELOG.md"], flags=re.MULTILINE)

DOTTED = r"\b(?:tls|tl_scopes|tests)(?:\.[A-Za-z_]\w*)+"


def exists(dotted: str) -> bool:
    """Whether a module, or what can be reached in it, has this name."""
    parts = dotted.split(".")
    if parts[0] == "tls":
        parts[0] = "tl_scopes"
    for count in range(len(parts), 0, -1):
        name = ".".join(parts[:count])
        try:
            found: Any = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise
            continue
        for attribute in parts[count:]:
            if not hasattr(found, attribute) and attribute not in getattr(found, "__annotations__", {}):
                return False
            found = getattr(found, attribute, None)
        return True
    return False


def named(text: str) -> list[str]:
    """Every name in `tls`, `tl_scopes` and `tests` that a page mentions, also by `from ... import`; not files."""
    imported = re.findall(r"from ((?:tl_scopes|tests)[\w.]*) import ([\w, ]+)", text)
    names = [f"{module}.{name.split(' as ')[0].strip()}" for module, names in imported for name in names.split(",")]
    dotted = re.findall(rf"(?<![\w./-]){DOTTED}(?!\w|/)", text)
    return sorted({*names, *(name for name in dotted if not name.endswith((".ipynb", ".md", ".py")))})


@pytest.mark.parametrize("page", PAGES)
def test_names_exist(page: str) -> None:
    assert [name for name in named(PAGES[page]) if not exists(name)] == []


def test_names_are_looked_for() -> None:
    """Else the test above might pass because it finds nothing."""
    text = "`tls.check`, `tl_scopes.nowhere.Thing`, `python -m tests.zoo`; from tl_scopes.views import card"
    assert [(name, exists(name)) for name in named(text)] == [
        ("tests.zoo", True),
        ("tl_scopes.nowhere.Thing", False),
        ("tl_scopes.views", True),
        ("tl_scopes.views.card", False),
        ("tls.check", True),
    ]
    assert sum(len(named(text)) for text in DOCS.values()) >= 40


@pytest.mark.parametrize("page", PAGES)
def test_files_exist(page: str) -> None:
    files = re.findall(r"(?<![\w./-])((?:tl_scopes|tests|demos|\.ci)/[\w./-]*\w|[A-Z]+\.md)\b", PAGES[page])
    assert [file for file in files if not (ROOT / file).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_calls_can_be_made(page: str) -> None:
    """Calls of public functions and classes in the text have arguments that these take."""
    for code in re.findall(r"`([^`\n]+)`", PAGES[page]):
        try:
            tree = ast.parse(code)
        except SyntaxError:  # a formula, a command
            continue
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func).removeprefix("tls.")
            if name in tls.__all__:
                options = {keyword.arg: None for keyword in call.keywords if keyword.arg}
                try:
                    inspect.signature(getattr(tls, name)).bind(*call.args, **options)
                except TypeError as error:
                    pytest.fail(f"`{code}`: {error}")


def test_what_migrates_is_gone() -> None:
    """A module that the migration table calls moved is no longer where it was."""
    old = [found[1] for was, _ in MIGRATION if (found := re.fullmatch(r"`(tl_scopes\.[\w.]+)`", was))]
    assert len(old) >= 30
    assert [name for name in old if exists(name)] == []


def test_the_floors_are_listed() -> None:
    """The folders and files of the package, from the top floor down, as import-linter's contract has them."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    [layers] = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    floors = [re.findall(r"\w+", layer) for layer in layers]
    table = DOCS["how_it_works.md"].partition("| folder or file | what it holds |")[2].partition("\n\n")[0]
    listed = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert listed == [name for floor in floors for name in sorted(floor, key=listed.index)]


if __name__ == "__main__":
    for demo in DEMOS:
        nbformat.write(executed(demo), demo)
