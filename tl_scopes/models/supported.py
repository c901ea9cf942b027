"""Which models there are, and which cannot be linearised."""

from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

Model: TypeAlias = Any
"""A `HookedTransformer` (TransformerLens 3.9) or a `TransformerBridge` (3.9 and 4.x)."""


def check_model(model: Model) -> None:
    """Refuse what cannot be linearised, with what to do about it.

    Raises:
        TypeError: not a TransformerLens model, a compiled one, or not a causal language model.
        ValueError: a model in training mode.
        RuntimeError: under `torch.inference_mode`, or for a model created in it.
    """
    kind = type(model).__name__
    if isinstance(model, torch._dynamo.OptimizedModule) or getattr(model, "_compiled_call_impl", None) is not None:
        raise TypeError(
            "the model is compiled: its hooks and its second backward pass are not reliable. "
            "Pass the model as it was before torch.compile."
        )
    if kind in ("HookedEncoder", "HookedEncoderDecoder", "HookedAudioEncoder"):
        raise TypeError(f"{kind} is not a causal language model: scopes explain a next-token prediction.")
    if not all(hasattr(model, name) for name in ("hook_dict", "cfg", "to_tokens")):
        raise TypeError(
            f"expected a HookedTransformer or a TransformerBridge, got {kind}. "
            "Load one with TransformerBridge.boot_transformers(name), or wrap a Hugging Face model with "
            "TransformerBridge.boot_transformers(name, hf_model=model)."
        )
    hf_config = getattr(getattr(model, "original_model", None), "config", None)
    architecture = str(getattr(model.cfg, "architecture", None) or kind)
    if (
        getattr(model.cfg, "attention_dir", "causal") == "bidirectional"
        or getattr(hf_config, "is_encoder_decoder", False)
        or "MaskedLM" in architecture  # TransformerLens 3.9 calls every bridge causal, BERT too
        or getattr(model.cfg, "d_vocab", 0) <= 0  # images, sounds
    ):
        raise TypeError(f"{architecture} is not a causal language model: scopes explain a next-token prediction.")
    if architecture in _WRONG_ON_3 and version("transformer-lens").startswith("3."):
        raise TypeError(
            f"TransformerLens {version('transformer-lens')} computes {architecture} wrongly, its logits are not the "
            "model's: upgrade to TransformerLens 4, which is right."
        )
    inner: Any = getattr(model, "original_model", model)
    parts = [part for module in (model, inner) for part in module.modules()]
    if model.training or any(map(_is_random, parts)):
        raise ValueError(
            "the model is in training mode, or a part of it, where dropout makes scores random: call model.eval() first"
            " (on a bridge also model.original_model.eval())."
        )
    if torch.is_inference_mode_enabled() or next(model.parameters()).is_inference():
        raise RuntimeError(
            "gradients cannot be taken under torch.inference_mode, or of a model that was created in it: "
            "leave the block (torch.no_grad is fine), and load the model outside of it."
        )


def _is_random(part: nn.Module) -> bool:
    """Whether a part of a model drops out; folding leaves parts in training mode to which it makes no difference."""
    rates = [getattr(part, name, 0.0) for name in ("p", "dropout", "attention_dropout")]
    return part.training and any(isinstance(rate, float) and rate > 0 for rate in rates)


_WRONG_ON_3 = ("CohereForCausalLM", "Cohere2ForCausalLM", "HunYuanDenseV1ForCausalLM")
"""What the 3.9 bridge gets wrong by 5 to 30%, measured against Hugging Face's own forward pass."""

_SEQUENTIAL = ("MambaForCausalLM", "FalconMambaForCausalLM", "JambaForCausalLM")
"""Scans over the sequence in Python: batched cotangents are ten times slower there than one after another."""


def batches_cotangents(model: Model) -> bool:
    """Whether several cotangents may go back through the graph at once.

    Backward hooks of the user's would be handed tensors of torch.vmap's, which they can neither read nor keep.
    """
    return not has_backward_hooks(model) and getattr(model.cfg, "architecture", None) not in _SEQUENTIAL


def has_backward_hooks(model: Model) -> bool:
    """Whether the user has set any: a graph that is made now goes through them as long as it lives."""
    return any(point.bwd_hooks for point in model.hook_dict.values())


def model_name(model: Model) -> str:
    """The name the model was loaded under; of a folder, its last part."""
    return Path(str(getattr(model.cfg, "model_name", None) or "unnamed")).name


def has_constant_readout_norm(model: Model) -> bool:
    """Whether the final norm has no gain of its own, so that every readout has the same norm, ‖y‖ = const.

    So it is after `fold_ln` (the default of `HookedTransformer.from_pretrained` and of `enable_compatibility_mode`),
    and in a freshly initialised model.
    """
    norm = getattr(model, "ln_final", None)
    if norm is None or getattr(model.cfg, "normalization_type", None) is None:
        return False
    parameters = [p.detach() for p in norm.parameters()]
    gains = [p for p in parameters if p.any()]
    return all(bool((p == p.flatten()[0]).all()) for p in gains) and len(gains) <= 1
