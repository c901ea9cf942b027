"""What a model is called, where it comes from a folder."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import tl_scopes as tls
from tests import zoo
from tl_scopes.models import load, model_name
from tl_scopes.tiny import FOLDER


def folder(at: Path, **said: Any) -> Path:
    """A copy of the bundled model, whose config.json says this too."""
    shutil.copytree(FOLDER, at, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    config = json.loads((at / "config.json").read_text()) | said
    (at / "config.json").write_text(json.dumps(config))
    return at


def test_two_checkpoints_of_one_last_name(tmp_path: Path) -> None:
    """Neither an answer nor a results file takes one for the other."""
    named = [folder(tmp_path / run / "final") for run in ("first", "second")]
    names = [model_name(load(at, device="cpu")) for at in named]
    assert names == ["folder first/final", "folder second/final"]


@pytest.mark.parametrize(
    ("at", "said", "name"),
    [
        ("run/checkpoint-1000", {"_name_or_path": "owner/model"}, "owner/model"),
        ("run/checkpoint-1000", {"_name_or_path": "/home/somebody/model"}, "folder run/checkpoint-1000"),
        ("run/checkpoint-1000", {"_name_or_path": ""}, "folder run/checkpoint-1000"),
        ("run/checkpoint-1000", {"_name_or_path": 3}, "folder run/checkpoint-1000"),
        ("hub/models--owner--a-model/snapshots/0123abcd", {}, "owner/a-model"),
    ],
)
def test_names_of_folders(at: str, said: dict[str, Any], name: str, tmp_path: Path) -> None:
    """By the configuration, by the cache of the hub, or by the path."""
    model = load(folder(tmp_path / at, **said), device="cpu")
    assert model_name(model) == name
    assert tls.attribute(model, zoo.PROMPT, tls.SemanticScope(3)).model == name


@pytest.mark.parametrize("kind", ["bridge", *(["hooked"] if zoo.HookedTransformer else [])])
def test_the_bundled_model_has_a_name_of_its_own(kind: Any) -> None:
    assert model_name(tls.load_tiny(kind)) == "tiny"


def test_other_names_stay() -> None:
    """A name that is not a folder is the hub's, or the user's own."""
    model = zoo.SPECIES["bridge llama"]().model
    for given, name in (("EleutherAI/pythia-70m", "pythia-70m"), ("wrapped", "wrapped"), ("", "unnamed")):
        model.cfg.model_name = given
        assert model_name(model) == name
