"""Whether a model is causal, that is, whether no token moves a prediction that is made before it.

A position by position answer, a map, a batch of prompts of several lengths and a prompt that is cut at the position
all rely on it. Neither the class nor the configuration of a model says it reliably: the same class is causal or not by
an option (BERT's `is_decoder`, Gemma 3's `use_bidirectional_attention`), TransformerLens leaves the option at "causal"
for most bidirectional models, and its 3.9 loses the mask of latent attention (DeepSeek) under some kernels. So the
model is asked.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from tl_scopes.models.hooks import hook_points, kinds_of_hooks
from tl_scopes.models.supported import (
    Model,
    architecture,
    attention_kernel,
    device_of,
    hf_config,
    not_causal,
    require_supported,
)
from tl_scopes.models.threads import one_at_a_time


def check_model(model: Model) -> None:
    """Refuse a model that cannot be linearised, and say what to do about it.

    Cost: some look-ups. A model that is seen for the first time, or with another attention kernel, is run once, on two
        prompts of three tokens.

    Raises:
        TypeError: for something other than a TransformerLens model, a compiled model, and a model that is not causal.
        ValueError, RuntimeError: see `require_supported`.
    """
    require_supported(model)
    kernel = attention_kernel(model)
    asked_of = kernel, getattr(hf_config(model), "is_decoder", None), getattr(model.cfg, "attention_dir", None)
    known = _influence.get(model)
    if known is None or known[0] != asked_of:
        known = _influence[model] = (asked_of, backward_influence(model))
    influence = known[1]
    if influence is None:  # it could not be asked: what its configuration says must do
        if getattr(model.cfg, "attention_dir", "causal") == "bidirectional":
            raise TypeError(not_causal(architecture(model)))
    elif influence > _tolerance(model):
        lost = (
            f" Or the mask was lost with its attention kernel, {kernel!r}: call "
            'model.original_model.set_attn_implementation("eager").'
        )
        raise TypeError(
            f"{not_causal(architecture(model))} In this one a later token moves an earlier prediction, by "
            f"{influence:.2g} times what it moves its own. If it should be causal, its configuration may not "
            f"say so (BERT needs is_decoder=True).{lost if kernel not in (None, 'eager') else ''}"
        )


@torch.no_grad()
def backward_influence(model: Model) -> float | None:
    """How far later tokens move the first prediction, in units of how far they move the last: 0 in a causal model.

    Two prompts begin with the same token and go on with others, in one batch, so that their rows are rounded alike.
    Hooks on the model's hook points do not act, since they may be made for one prompt.

    Returns None where the model cannot be asked: a context or a vocabulary of one, a model that does not run on three
    tokens, or one whose output is not finite.

    Cost: one forward pass of two prompts of three tokens.
    """
    length, vocab = min(3, getattr(model.cfg, "n_ctx", None) or 3), model.cfg.d_vocab
    if length < 2 or vocab < 2:
        return None
    same, other = vocab // 2, vocab // 2 - 1  # special tokens stand at either end of a vocabulary
    tokens = [[same] * length, [same] + [other] * (length - 1)]
    # What goes wrong here goes wrong with the user's own prompt as well, and is told better there.
    with suppress(Exception), silenced(model):
        ids = torch.tensor(tokens, device=device_of(model))
        logits = model(ids, return_type="logits").double()
        first, *_, last = (logits[0] - logits[1]).norm(dim=-1).tolist()
        if torch.isfinite(logits).all():
            return float(first / last) if last else (torch.inf if first else 0.0)
    return None


def _tolerance(model: Model) -> float:
    """What rounding may look like: rows of one batch are computed alike, but a kernel may treat its last rows apart."""
    dtype = next(model.parameters()).dtype
    return max(1e-4, 8 * torch.finfo(dtype).eps) if dtype.is_floating_point else 0.05


@contextmanager
def silenced(model: Model) -> Iterator[None]:
    """Inside, the hooks that a model's hook points have do not act in this thread; in other threads they go on acting.

    Hooks that are set inside act.
    """
    here, replaced = threading.get_ident(), []

    def elsewhere(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: None if threading.get_ident() == here else function(*args, **kwargs)

    with one_at_a_time:
        try:
            for point in {*hook_points(model).values()}:
                for hooks in kinds_of_hooks(point):
                    for key, function in list(hooks.items()):
                        hooks[key] = elsewhere(function)
                        replaced.append((hooks, key, function))
            yield
        finally:
            for hooks, key, function in replaced:
                if key in hooks:  # another thread may have removed it meanwhile
                    hooks[key] = function


_influence: WeakKeyDictionary[nn.Module, tuple[tuple[object, ...], float | None]] = WeakKeyDictionary()
"""What each model was found to do, and the options under which it did."""
