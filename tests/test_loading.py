"""What a model is called, where it comes from a folder."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import tl_scopes as tls
from tests import zoo
from tl_scopes import models
from tl_scopes.cli import Dtype
from tl_scopes.models import load, model_name
from tl_scopes.models.loading import DTYPES
from tl_scopes.tiny import FOLDER

LOADERS = [models.load, models.load_hooked_llama]


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


@pytest.mark.parametrize("load", [tls.load_tiny, lambda **options: models.load(FOLDER, **options)])
@pytest.mark.parametrize("name", [*Dtype])
def test_a_precision_by_its_name(load: Any, name: Dtype) -> None:
    """The names of the command line, or torch's own."""
    for dtype in (str(name), getattr(torch, name)):
        assert {parameter.dtype for parameter in load(device="cpu", dtype=dtype).parameters()} == {getattr(torch, name)}


def test_the_command_line_has_all_precisions() -> None:
    assert [*Dtype] == [*DTYPES]


@pytest.mark.parametrize(
    ("dtype", "error", "got"),
    [
        ("bf16", ValueError, "'bf16'"),
        (torch.int8, ValueError, "torch.int8"),
        ("float32 ", ValueError, "'float32 '"),
        (16, TypeError, "16"),
        (None, TypeError, "None"),
    ],
)
@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.usefixtures("no_type_checks")
def test_no_precision(load: Any, dtype: Any, error: type[Exception], got: str) -> None:
    """The value and the list; nothing is said of spelling and network, and nothing is loaded."""
    rule = "a model's dtype is 'float32', 'float64', 'bfloat16', 'float16' or torch's of that name"
    with pytest.raises(error, match=rf"^{rule}, got {got}\.$"):
        load("/no/such/folder", dtype=dtype)


def test_no_name(no_type_checks: None) -> None:
    with pytest.raises(TypeError, match="loaded by its name, a folder or a GGUF file, as text or a path, got 3"):
        models.load(3)  # type: ignore[arg-type]


OTHER_LLAMAS: dict[str, tuple[str, dict[str, Any], str]] = {
    "qwen2": ("Qwen2", {}, "this is a qwen2"),
    "attention": ("Llama", {"attention_bias": True}, "this one has attention_bias=True and mlp_bias=False"),
    "mlp": ("Llama", {"mlp_bias": True}, "this one has attention_bias=False and mlp_bias=True"),
    **{
        kind: ("Llama", {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, **more}},
               rf"the positions of this one are scaled \(rope_type='{kind}'\)")
        for kind, more in {
            "linear": {},
            "dynamic": {},
            "yarn": {"original_max_position_embeddings": 16},
            "llama3": {"original_max_position_embeddings": 16, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        }.items()
    },
}  # fmt: skip


def hugging_face(name: str, **options: Any) -> Any:
    config = getattr(transformers, f"{name}Config")(**zoo._LLAMA, vocab_size=zoo.VOCAB, **options)
    model = getattr(transformers, f"{name}ForCausalLM")(config).double().eval()
    zoo._randomise(model)
    return model


@pytest.mark.parametrize("kind", OTHER_LLAMAS)
def test_a_llama_that_would_have_other_logits(kind: str) -> None:
    name, options, found = OTHER_LLAMAS[kind]
    with pytest.raises(ValueError, match=rf"would have other logits here: {found}\. Take the TransformerBridge"):
        models.hooked_from_llama(hugging_face(name, **options), tokenizer=None)


@pytest.mark.skipif(zoo.HookedTransformer is None, reason="TransformerLens 4 has no HookedTransformer")
@pytest.mark.parametrize("theta", [1e4, 500.5])
def test_a_hooked_llama_has_the_logits_of_hugging_face(theta: float) -> None:
    plain = hugging_face("Llama", rope_parameters={"rope_type": "default", "rope_theta": theta})
    ids = torch.tensor([zoo.PROMPT])
    with zoo.Float64():
        torch.testing.assert_close(models.hooked_from_llama(plain, tokenizer=None)(ids), plain(ids).logits)


def test_other_names_stay() -> None:
    """A name that is not a folder is the hub's, or the user's own."""
    model = zoo.SPECIES["bridge llama"]().model
    for given, name in (("EleutherAI/pythia-70m", "pythia-70m"), ("wrapped", "wrapped"), ("", "unnamed")):
        model.cfg.model_name = given
        assert model_name(model) == name
