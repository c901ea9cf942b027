"""Activation patching, which is TransformerLens' own."""

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_scopes.models.supported import Model
from tl_scopes.models.threads import one_at_a_time

PatchingSite: TypeAlias = Literal["resid_pre", "attn_out", "mlp_out", "head_out"]
"""What is patched: "head_out" is what a head gives out, at all positions together; the others go by position."""

_FUNCTIONS = {
    "resid_pre": "get_act_patch_resid_pre",
    "attn_out": "get_act_patch_attn_out",
    "mlp_out": "get_act_patch_mlp_out",
    "head_out": "get_act_patch_attn_head_out_all_pos",
}
_HOOKS = {
    "resid_pre": "hook_resid_pre",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "head_out": "attn.hook_z",
}


@torch.no_grad()
def activation_patching(
    model: Model,
    clean: Int[Tensor, "batch token"],
    corrupted: Int[Tensor, "batch token"],
    metrics: Sequence[Callable[[Float[Tensor, "1 token vocab"]], Tensor]],
    site: PatchingSite,
) -> list[Float[Tensor, "layer component"]]:
    """What each pair's metric becomes when one component of the corrupted run is replaced by that of the clean run.

    It calls `transformer_lens.patching`; where that can keep the numbers of each prompt of a batch apart
    (TransformerLens 4), all pairs go together.

    Args:
        model: a checked model.
        clean: prompts of one length.
        corrupted: the other prompt of each pair.
        metrics: for each pair a function of its logits that gives one number.
        site: what is patched.

    Cost: one forward pass of each pair for every component.
    """
    from transformer_lens import patching

    patch: Any = getattr(patching, _FUNCTIONS[site])
    names = {f"blocks.{layer}.{_HOOKS[site]}" for layer in range(model.cfg.n_layers)}

    def kept_apart(logits: Tensor) -> Tensor:
        return torch.stack([metric(one[None]).reshape(()) for metric, one in zip(metrics, logits, strict=True)])

    with one_at_a_time:
        if "reduce" in signature(patching.generic_activation_patch).parameters:
            _, cache = model.run_with_cache(clean, names_filter=lambda name: name in names)
            found = patch(model, corrupted, cache, kept_apart, reduce="none").values
            return list(found.movedim(-1, 0).cpu())
        patched = []
        for one, other, metric in zip(clean, corrupted, metrics, strict=True):
            _, cache = model.run_with_cache(one[None], names_filter=lambda name: name in names)
            patched.append(patch(model, other[None], cache, lambda logits, m=metric: m(logits).reshape(())).cpu())
        return patched
