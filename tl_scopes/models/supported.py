"""Which models can be linearised, and why the others are refused."""

import json
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

Model: TypeAlias = Any
"""A `HookedTransformer` (TransformerLens 3.9) or a `TransformerBridge` (3.9 and 4.x)."""


def require_supported(model: Model) -> None:
    """Refuse what cannot be linearised, by what the model and its configuration say; it is not run.

    Raises:
        TypeError: for something other than a TransformerLens model, a model that is compiled or has a compiled part,
            one that does not predict the next token, one without a list of blocks, and one that TransformerLens
            computes wrongly.
        ValueError: for a model in training mode, one without weights, and on TransformerLens 3.9 one whose unembedding
            is offloaded.
        RuntimeError: under `torch.inference_mode`, or for a model that was created in it.
    """
    kind = type(model).__name__
    if _is_compiled(model):
        raise TypeError(
            "the model is compiled: its hooks and its second backward pass are not reliable. "
            "Pass the model as it was before torch.compile."
        )
    if kind in ("HookedEncoder", "HookedEncoderDecoder", "HookedAudioEncoder"):
        raise TypeError(not_causal(kind))
    if not all(hasattr(model, name) for name in ("hook_dict", "cfg", "to_tokens")):
        wrapped = "model.base_model.model" if hasattr(model, "peft_config") else "model"  # adapters stay in it
        raise TypeError(
            f"expected a HookedTransformer or a TransformerBridge, got {kind}. "
            "Load one with TransformerBridge.boot_transformers(name), or wrap a Hugging Face model with "
            f"TransformerBridge.boot_transformers(name, hf_model={wrapped})."
        )
    name = architecture(model)
    if (
        getattr(hf_config(model), "is_encoder_decoder", False)
        or "MaskedLM" in name
        or getattr(model.cfg, "d_vocab", 0) <= 0  # images, sounds
    ):
        raise TypeError(not_causal(name))
    if not hasattr(model, "blocks"):
        raise TypeError(
            f"{name} is not one list of blocks (model.blocks): it runs parts of itself in cycles. HRM-Text and Huginn "
            "run all but their last cycles without gradients, also in evaluation, so that no gradient of theirs is the "
            "derivative of the prediction."
        )
    if name in _WRONG_ON_3 and _transformer_lens().startswith("3."):
        raise TypeError(
            f"TransformerLens {version('transformer-lens')} computes {name} wrongly, its logits are not the "
            "model's: upgrade to TransformerLens 4, which is right."
        )
    parts = all_parts(model)
    compiled = _compiled(parts)
    if compiled:
        raise TypeError(
            f"a part of the model is compiled, a {_kind(compiled[0])}: its hooks and its second backward pass are not "
            "reliable. Load the model again, and leave out torch.compile."
        )
    device_of(model)
    if _transformer_lens().startswith("3.") and any(p.is_meta for p in model.unembed.parameters()):
        raise ValueError(
            f"TransformerLens {version('transformer-lens')} cannot run a model whose unembedding is offloaded, since "
            "it adds a bias that cannot be fetched: keep the unembedding on a device (lm_head in device_map), or "
            "upgrade to TransformerLens 4."
        )
    if model.training or any(_is_random(part) for part in parts if part.training):
        raise ValueError(
            "the model is in training mode, or a part of it, where dropout makes scores random: call model.eval() first"
            " (on a bridge also model.original_model.eval())."
        )
    if torch.is_inference_mode_enabled() or next(model.parameters()).is_inference():
        raise RuntimeError(
            "gradients cannot be taken under torch.inference_mode, or of a model that was created in it: "
            "leave the block (torch.no_grad is fine), and load the model outside of it."
        )


@cache
def _transformer_lens() -> str:
    """The version of TransformerLens, which takes milliseconds to look up."""
    return version("transformer-lens")


def _is_compiled(part: Any) -> bool:
    """Whether torch.compile made this module, or has been asked to compile it in place, or its forward method."""
    forward = getattr(part, "forward", None)
    return (
        isinstance(part, torch._dynamo.OptimizedModule)
        or getattr(part, "_compiled_call_impl", None) is not None
        or hasattr(forward, "_torchdynamo_orig_callable")
    )


def _compiled(parts: Iterable[nn.Module]) -> list[nn.Module]:
    """Those of these modules that are compiled. A class is asked once, and each module for what it has of its own."""
    by_class: dict[type, bool] = {}
    found = []
    for part in parts:
        kind, own = type(part), vars(part)
        if kind not in by_class:
            by_class[kind] = (
                issubclass(kind, torch._dynamo.OptimizedModule)
                or getattr(kind, "_compiled_call_impl", None) is not None
                or hasattr(getattr(kind, "forward", None), "_torchdynamo_orig_callable")
            )
        if by_class[kind] or (("_compiled_call_impl" in own or "forward" in own) and _is_compiled(part)):
            found.append(part)
    return found


def _kind(part: nn.Module) -> str:
    return type(getattr(part, "_orig_mod", part)).__name__


def _is_random(part: nn.Module) -> bool:
    """Whether a part in training mode applies dropout; folding leaves some in that mode that have none."""
    rates = [getattr(part, name, 0.0) for name in ("p", "dropout", "attention_dropout")]
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def all_parts(model: Model) -> list[nn.Module]:
    """All modules: those of a bridge, and those of the model that it wraps."""
    inner: Any = getattr(model, "original_model", model)
    return parts_of(model, inner)


def parts_of(*wholes: nn.Module) -> list[nn.Module]:
    """Modules with all modules in them, each once, in torch's order; `nn.Module.modules` takes ten times as long."""
    found: dict[int, nn.Module] = {}
    left = list(reversed(wholes))
    while left:
        part = left.pop()
        if id(part) not in found:
            found[id(part)] = part
            if part._modules:  # most have none
                left += [child for child in reversed(part._modules.values()) if child is not None]
    return list(found.values())


def run_by(model: Model) -> list[nn.Module]:
    """The modules that a forward pass runs: those of the Hugging Face model that a bridge wraps, or the model's own."""
    inner: Any = getattr(model, "original_model", model)
    return parts_of(inner)


def parameters_of(parts: Iterable[nn.Module]) -> list[nn.Parameter]:
    """What `list(model.parameters())` gives for a model's `run_by`, which takes longer on a bridge."""
    found = (parameter for part in parts for parameter in part._parameters.values() if parameter is not None)
    return list({id(parameter): parameter for parameter in found}.values())


def not_causal(name: str) -> str:
    """What the error says about a model that does not predict each token from those before it."""
    return f"{name} is not a causal language model: scopes explain a next-token prediction."


def hf_config(model: Model) -> Any:
    """The configuration of the Hugging Face model that a bridge wraps; None where there is no such model."""
    return getattr(getattr(model, "original_model", None), "config", None)


def attention_kernel(model: Model) -> str | None:
    """The attention kernel of the model that a bridge wraps, "eager" or "sdpa" say; None where the model does not tell.

    It can be exchanged after the model was loaded.
    """
    return getattr(hf_config(model), "_attn_implementation", None)


def device_of(model: Model) -> torch.device:
    """Where a model computes: where its weights are, or, where all are offloaded, where accelerate fetches them to.

    Raises:
        ValueError: for a model whose weights are nowhere.
    """
    for parameter in model.parameters():
        if parameter.device.type != "meta":
            return parameter.device
    for part in run_by(model):
        fetched_to = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if fetched_to is not None:
            return torch.device(fetched_to)
    raise ValueError(
        "the model is on the device 'meta', which keeps shapes and no numbers: load its weights, with "
        "from_pretrained say, or device_map."
    )


def autocast_of(model: Model) -> torch.dtype | None:
    """The precision that torch.autocast has a model compute in; None outside of it, and in float64, which it leaves."""
    kind = device_of(model).type
    cast = torch.is_autocast_enabled(kind) and next(model.parameters()).dtype != torch.float64
    return torch.get_autocast_dtype(kind) if cast else None


def architecture(model: Model) -> str:
    """The architecture as Hugging Face calls it, or the kind of model."""
    return str(getattr(model.cfg, "architecture", None) or type(model).__name__)


_WRONG_ON_3 = ("CohereForCausalLM", "Cohere2ForCausalLM", "HunYuanDenseV1ForCausalLM")
"""The 3.9 bridge computes other logits for these than Hugging Face does: in small random models by 53%, 29% and 18%
of their norm (tests/families measures it), in others by 5% at least."""

_SEQUENTIAL = ("MambaForCausalLM", "FalconMambaForCausalLM", "JambaForCausalLM")
"""These scan over the sequence in Python, where batched cotangents are ten times slower than one after another."""


def batches_cotangents(model: Model) -> bool:
    """Whether several cotangents go back through the graph of this architecture faster together than one by one."""
    return getattr(model.cfg, "architecture", None) not in _SEQUENTIAL


def model_name(model: Model) -> str:
    """The name that the model was loaded under. A folder is called by what its config.json says, if it says something,
    or "folder" with its path's last two parts: checkpoints are often all called "final" or "checkpoint-1000", and
    "run/final" alone would look like a name on the hub. A GGUF file is called "file" with its folder's and its own
    name, since a folder often has the same model in several precisions."""
    return _called(str(getattr(model.cfg, "model_name", None) or "unnamed"))


FOLDER_PREFIX = "folder "
"""What the name of a model begins with that is called by its folder."""


@cache
def _called(name: str) -> str:
    config, path = Path(name).expanduser() / "config.json", Path(name)
    if is_gguf(path.expanduser()):
        return f"{_in_hub_cache(path.parent) or 'file ' + '/'.join(config.parent.absolute().parts[-3:-1])}/{path.name}"
    if not config.is_file():
        return path.name
    with suppress(OSError, ValueError, AttributeError):
        said = json.loads(config.read_text()).get("_name_or_path")
        if isinstance(said, str) and said and not Path(said).is_absolute():
            return said
    return _in_hub_cache(path) or FOLDER_PREFIX + "/".join(config.parent.resolve().parts[-2:])


def is_gguf(path: Path) -> bool:
    """Whether there is a file of this name, which says that it is a GGUF file."""
    return path.suffix.lower() == ".gguf" and path.is_file()


def _in_hub_cache(folder: Path) -> str | None:
    """The name on the Hugging Face hub of a folder in its cache, models--owner--name/snapshots/revision."""
    if folder.parent.name != "snapshots":
        return None
    return folder.parents[1].name.removeprefix("models--").replace("--", "/")
