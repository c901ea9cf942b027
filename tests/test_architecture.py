"""The shape of the package: which module may import which, and what importing it may do."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tl_scopes

ROOT = Path(tl_scopes.__file__).parent

ORDER = """
    models pullback linearization randomness centering curvature origin attribution maps question api many
    fisher_information spectrum scopes corrections replacement diagnostics baselines tiny faithfulness views comparison
    terminal cli __main__
""".split()
"""A module imports from those before it. `attribution` also reaches forward, inside functions: it draws itself."""


def imports(path: Path, *, top_level_only: bool) -> set[str]:
    """Modules of this package that a file imports, as layer names."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    names: list[str] = []
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("tl_scopes.")}


def test_the_readme_lists_the_modules() -> None:
    """In this order."""
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    listing = readme[readme.index("imports only from those before it") :].split("\n\n")[0]
    assert re.findall(r"`(\w+)/?`", listing) == ORDER[:-1]


def layer(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


FILES = [path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    own = layer(path)
    for name in imports(path, top_level_only=True):
        assert ORDER.index(name) <= ORDER.index(own), f"{own} imports {name}, which comes after it"


def test_scopes_do_not_import_one_another() -> None:
    for path in (ROOT / "scopes").glob("*.py"):
        assert "scopes" not in imports(path, top_level_only=False)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_one_door_to_transformer_lens(path: Path) -> None:
    text = path.read_text()
    if layer(path) != "models":
        assert "import transformer_lens" not in text
        assert "from transformer_lens" not in text


def test_files_stay_short() -> None:
    long = {path.name: lines for path in FILES if (lines := len(path.read_text().splitlines())) > 300}
    assert not long


def test_import_is_quiet() -> None:
    """Importing the package, all of its public names, loads nothing that draws, and prints nothing."""
    code = (
        "import sys; from tl_scopes import *; "
        "print([name for name in ('circuitsvis', 'matplotlib', 'pandas', 'IPython', 'transformer_lens', 'transformers',"
        " 'typer') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
    assert run.stderr == ""


def test_public_names() -> None:
    assert sorted(tl_scopes.__all__) == tl_scopes.__all__
    assert all(getattr(tl_scopes, name).__doc__ for name in tl_scopes.__all__)
    assert dir(tl_scopes) == tl_scopes.__all__
    modules = {path.stem for path in ROOT.iterdir()}
    assert not modules & set(tl_scopes.__all__)  # importing a module puts it under its name into the package
    with pytest.raises(AttributeError, match="module 'tl_scopes' has no attribute 'fisher'"):
        _ = tl_scopes.fisher


def test_the_command_line_does_not_wait_for_torch() -> None:
    code = "import sys, tl_scopes.cli; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
