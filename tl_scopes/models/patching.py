"""Activation patching, which is TransformerLens' own."""

from collections.abc import Callable, Sequence
from inspect import signature
from itertools import product
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_scopes.models.hooks import READOUT, attached, hook_point, hook_points
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
    unpatched: Sequence[float],
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
        unpatched: what each gives at the corrupted prompt as it is.
        site: what is patched.

    Cost: one forward pass of each pair for every component. Before the first token that differs in any of the pairs
        both runs are the same, and positions there are left out.
    """
    import pandas as pd
    from transformer_lens import patching

    patch: Any = getattr(patching, _FUNCTIONS[site])
    layers, first = model.cfg.n_layers, int((clean != corrupted).any(0).nonzero()[0])
    options: dict[str, Any] = {}
    if site != "head_out" and first:
        places = list(product(range(layers), range(first, clean.shape[1])))
        options = {"index_axis_names": None, "index_df": pd.DataFrame(places, columns=["layer", "pos"])}

    def whole(found: Float[Tensor, "..."], value: float) -> Float[Tensor, "layer component"]:
        if not options:
            return found
        filled = found.new_full((layers, clean.shape[1]), value)
        filled[:, first:] = found.reshape(layers, -1)
        return filled

    names = {f"blocks.{layer}.{_HOOKS[site]}" for layer in range(layers)}

    def kept_apart(logits: Tensor) -> Tensor:
        return torch.stack([metric(one[None]).reshape(()) for metric, one in zip(metrics, logits, strict=True)])

    # Metrics read the last position, and the unembedding of the others is a fifth of a small model's forward pass.
    readout = hook_point(hook_points(model), READOUT)
    with one_at_a_time, attached(readout, lambda value, hook: value[:, -1:]):
        if "reduce" in signature(patching.generic_activation_patch).parameters:
            _, cache = model.run_with_cache(clean, names_filter=lambda name: name in names)
            found = patch(model, corrupted, cache, kept_apart, reduce="none", **options).values
            return [whole(of_pair, value) for of_pair, value in zip(found.movedim(-1, 0).cpu(), unpatched, strict=True)]
        patched = []
        for one, other, metric, value in zip(clean, corrupted, metrics, unpatched, strict=True):
            _, cache = model.run_with_cache(one[None], names_filter=lambda name: name in names)
            found = patch(model, other[None], cache, lambda logits, m=metric: m(logits).reshape(()), **options)
            patched.append(whole(found.cpu(), value))
        return patched
