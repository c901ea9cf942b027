"""The shape of the package: which folder may import which, and what importing it may do."""

import ast
import inspect
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import tl_scopes

ROOT = Path(tl_scopes.__file__).parent
PROJECT = Path(__file__).parent.parent
FILES = sorted(ROOT.rglob("*.py"))
LINT = [sys.executable, "-c", "import sys; from importlinter.cli import lint_imports_command; lint_imports_command()"]


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*LINT, "--no-cache"], cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package and of the contracts."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT, folder / "tl_scopes", ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    shutil.copy(PROJECT / "pyproject.toml", folder)
    return folder


def test_imports_run_one_way(copied: Path) -> None:
    """No circle, at most eight floors, one door to TransformerLens: the contracts in pyproject.toml."""
    run = lint(copied)
    assert run.returncode == 0, run.stdout
    assert "3 kept, 0 broken" in run.stdout
    [layers] = [c for c in contracts() if c["type"] == "layers"]
    assert len(layers["layers"]) <= 8


def contracts() -> list[dict[str, object]]:
    return tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]


@pytest.mark.parametrize(
    ("path", "line", "contract"),
    [
        ("models/hooks.py", "from tl_scopes.scopes.semantic import SemanticScope", "Imports run one way"),
        ("views/markup.py", "import tl_scopes.models", "Imports run one way"),
        ("models/hooks.py", "from tl_scopes.models.forward import trace", "No folder and no file"),
        ("scopes/semantic.py", "from transformer_lens import HookPoint", "One door"),
    ],
)
def test_an_import_inside_a_function_is_seen(copied: Path, path: str, line: str, contract: str) -> None:
    file = copied / "tl_scopes" / path
    before = file.read_text()
    file.write_text(f"{before}\n\ndef _late() -> None:\n    {line}\n")
    try:
        run = lint(copied)
    finally:
        file.write_text(before)
    assert run.returncode == 1
    assert re.search(f"{contract}.*BROKEN", run.stdout)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_one_door_to_the_models_attributes(path: Path) -> None:
    """What depends on the kind of model is asked of `models`."""
    if path.relative_to(ROOT).parts[0] == "models":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and node.attr in ("cfg", "tokenizer", "hook_dict"):
            assert not ast.unparse(node.value).endswith("model"), f"line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_says_what_it_is(path: Path) -> None:
    """In a docstring; a short one also says why it stands alone."""
    text = path.read_text()
    docstring = ast.get_docstring(ast.parse(text))
    assert docstring
    if path.name not in ("__init__.py", "__main__.py") and len(text.splitlines()) < 60:
        assert "file of its own" in docstring or path.parent.name in ("scopes", "views", "tiny"), path


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
    """They stand once, in the stub; each has a docstring that says more than its signature."""
    assert sorted(tl_scopes.__all__) == tl_scopes.__all__
    for name in tl_scopes.__all__:
        assert len(inspect.getdoc(getattr(tl_scopes, name)) or "") > 30, name
    assert set(tl_scopes.__all__) <= set(dir(tl_scopes))
    modules = {path.stem for path in ROOT.iterdir()}
    assert not modules & set(tl_scopes.__all__)  # importing a module puts it under its name into the package
    with pytest.raises(AttributeError, match="No tl_scopes attribute fisher"):
        _ = tl_scopes.fisher


def test_the_command_line_does_not_wait_for_torch() -> None:
    code = "import sys, tl_scopes.cli; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
