"""Attention patterns and values: where they live on each kind of model, read or held still."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, SupportsIndex

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_scopes.models.forward import READOUT, attached, hook_name, one_at_a_time
from tl_scopes.models.supported import Model
from tl_scopes.models.tokens import as_int

_CACHED_BYTES = 2**30
"""Attention patterns that may be cached at once."""


@dataclass(frozen=True, eq=False, repr=False)
class AttentionLayer:
    """What one layer's attention did with one prompt: Σ_h Σ_key pattern[h, query, key] · value[h, key] W_O[h].

    That sum, and the output bias, is what the output projection gives; a norm or a scale may follow before the stream
    (Gemma 2, Granite). Values carry their bias.
    """

    layer: int
    pattern: Float[Tensor, "head query key"]
    """Attention weights, after the softmax. A row sums to 1, or to less beside a learned sink logit (GPT-OSS)."""
    value: Float[Tensor, "head token d_head"]
    """Values, of every query head: where heads share one (grouped queries), it is repeated."""
    W_O: Float[Tensor, "head d_head d_model"]
    """The output projection, split into heads."""

    def __repr__(self) -> str:
        heads, tokens, d_head = self.value.shape
        return f"AttentionLayer(layer {self.layer}; {heads} heads of {d_head}, {tokens} tokens)"

    @property
    def written(self) -> Float[Tensor, "head token d_model"]:
        """What each head writes into the stream when it attends to nothing but this token: value · W_O.

        Cost: head x token x d_model numbers; `written_norms` needs those of one head at a time.
        """
        return self.value @ self.W_O

    def written_norms(self, ord: int | float = 2) -> Float[Tensor, "head token"]:
        """‖value · W_O‖ of every head and token, in float32 (float64 for a float64 model).

        Args:
            ord: which norm, as in `torch.linalg.vector_norm`: 1, 2, inf.
        """
        dtype = torch.promote_types(self.value.dtype, torch.float32)
        heads = zip(self.value, self.W_O, strict=True)
        return torch.stack([torch.linalg.vector_norm(v @ w, ord=ord, dim=-1, dtype=dtype) for v, w in heads])


def attention_layers(model: Model, tokens: Int[Tensor, "token"]) -> Iterator[AttentionLayer]:
    """Every layer's attention at one prompt, in order, without gradients.

    Hooks that the user has set act as in any other run, before the values are read. The model is left as found, also
    after an exception. Arguments are checked at once, the model runs when the first layer is asked for.

    Args:
        model: a checked model.
        tokens: the prompt.

    Cost: one forward pass, without the unembedding but for one position, when all patterns together take at most
    1 GiB. Longer prompts: one pass from the start for each group of layers whose patterns do, up to that group.

    Raises:
        ValueError: a model in which tokens mix other than by attention (state-space and convolutional layers), one
            whose attention kernel forms no patterns, or whose heads do more than average values (gates, clipping).
    """
    layers = model.cfg.n_layers
    whole = _layers_with(model, "hook_pattern", "hook_v", "hook_z")
    others = sorted({*range(layers)} - {*whole} | _layers_with_another_mixer(model))
    if others:
        raise ValueError(
            f"{_architecture(model)} has layers in which tokens mix other than by attention patterns "
            f"({_listed(others)} of {layers}), but by a state-space model, a convolution or linear attention. These "
            "would be missing: take a scope that needs no patterns, such as SemanticScope or FisherScope."
        )
    per_layer = model.cfg.n_heads * len(tokens) ** 2 * next(model.parameters()).element_size()
    size = max(1, _CACHED_BYTES // per_layer)
    return _in_groups(model, tokens, size)


def _in_groups(model: Model, tokens: Tensor, size: int) -> Iterator[AttentionLayer]:
    layers = range(model.cfg.n_layers)
    for start in layers[::size]:
        group = layers[start : start + size]
        cache = _cached(model, tokens, group)
        for layer in group:
            yield _attention_layer(model, layer, cache)


@torch.no_grad()
def _cached(model: Model, tokens: Tensor, group: range) -> dict[str, Tensor]:
    """Patterns, values and head outputs of some layers, from one forward pass that ends behind them."""
    names = {_name(layer, part) for layer in group for part in ("hook_pattern", "hook_v", "hook_z")}
    options: dict[str, Any] = {}
    if hasattr(model, "original_model"):
        # Else run_with_cache asks the wrapped model for the patterns of all layers besides, which it collects by
        # hooks that stay.
        options["output_attentions"] = False
    with ExitStack() as stack:
        stack.enter_context(one_at_a_time)
        if group.stop < model.cfg.n_layers:
            options["stop_at_layer"] = group.stop
        else:
            stack.enter_context(attached(model.hook_dict[hook_name(model, READOUT)], lambda value, hook: value[:, -1:]))
        _, cache = model.run_with_cache(
            tokens[None], names_filter=names.__contains__, return_cache_object=False, **options
        )
    return cache


def _attention_layer(model: Model, layer: int, cache: dict[str, Tensor]) -> AttentionLayer:
    """Take one layer out of the cache.

    Raises:
        ValueError: see `attention_layers`.
    """
    if _name(layer, "hook_pattern") not in cache:
        kernel = getattr(getattr(getattr(model, "original_model", None), "config", None), "_attn_implementation", None)
        raise ValueError(
            f"layer {layer} of {_architecture(model)} forms no attention pattern: its attention kernel ({kernel!r}) "
            'computes the output without. Load the model with attn_implementation="eager".'
        )
    pattern, value, z = (cache.pop(_name(layer, part))[0] for part in ("hook_pattern", "hook_v", "hook_z"))
    if _name(layer, "hook_kv_latent") not in model.hook_dict:  # latent attention (DeepSeek) has heads first
        value = value.transpose(0, 1)
    value = value.repeat_interleave(len(pattern) // len(value), dim=0)
    z = z.reshape(len(z), len(pattern), -1).transpose(0, 1)
    # Heads that do more than average their values (a gate, a clip, a norm in between) cannot be told by name, but by
    # their output; unless a hook of the user's has changed it.
    if not model.hook_dict[_name(layer, "hook_z")].fwd_hooks:
        error = (pattern.to(value) @ value - z).abs().max()
        if error > max(2e-3, 2 * torch.finfo(value.dtype).eps) * value.abs().max():
            raise ValueError(
                f"the heads of layer {layer} of {_architecture(model)} do not give the average of their values that "
                f"the attention pattern says (off by {error:.2g}): they gate, clip or normalise besides, or a hook of "
                "yours changes a pattern that was already used. Patterns and values do not explain this model."
            )
    return AttentionLayer(layer, pattern, value, model.blocks[layer].attn.W_O.detach())


class AttentionOutOfReachError(ValueError):
    """Attention patterns of this model cannot be changed from outside."""


@contextmanager
def held_attention(model: Model, keys: Sequence[SupportsIndex] | None = None) -> Iterator[None]:
    """Inside, the attention paid to these positions is constant for differentiation; no value changes.

    `tl_scopes.linearize` inside gives the Jacobian without the routes through these attention weights, in all layers
    and heads; it is for the linearisation made inside, and for `Linearization.at` called inside. Weights on other
    positions still move, as softmaxes over all scores, those of held positions included.

    Other threads that would linearise a model wait outside.

    Args:
        model: a checked model. Layers without attention (Jamba) have nothing to hold.
        keys: positions attended to, negative ones from the end; None holds the whole patterns.

    Raises:
        ValueError: at once for a model without attention patterns; in the forward pass for keys outside of the prompt,
            and an `AttentionOutOfReachError` for attention that runs inside a wrapped Hugging Face module, where a hook
            comes too late (OPT, GPT-J, GPT-Neo; models of `boot_native` on TransformerLens 3.9).
        TypeError: keys that are no integers.
    """
    positions = None if keys is None else [as_int(key, "attention is held at positions, integers") for key in keys]

    def hold(pattern: Tensor) -> Tensor:
        still = pattern.detach()
        return still if positions is None else torch.where(_at(positions, pattern, "held"), still, pattern)

    with _changed_patterns(model, hold, "hold", "held"):
        yield


@contextmanager
def masked_attention(model: Model, keys: Sequence[SupportsIndex]) -> Iterator[None]:
    """Inside, no later token attends to these positions, in any layer or head:

        A'[i, j] = A[i, j] / Σ_m A[i, m],   j and m not masked, or i itself

    which are the softmaxes over the scores left. A token still attends to itself. What it says reaches nobody, and
    everything stays in its place. Beside a learned sink logit (GPT-OSS) the sink's part counts in the sum.
    Other threads that would run a model here wait outside.

    Args:
        model: a checked model. Layers without attention (Jamba) are as ever.
        keys: positions that are not attended to, negative ones from the end.

    Raises:
        ValueError: as `held_attention` does; in the forward pass also where a query had attended to nothing else.
        TypeError: keys that are no integers.
    """
    positions = [as_int(key, "attention is masked at positions, integers") for key in keys]

    def mask(pattern: Tensor) -> Tensor:
        later = torch.ones(pattern.shape[-2:], dtype=torch.bool, device=pattern.device).tril(-1)
        precise = pattern.to(torch.promote_types(pattern.dtype, torch.float32))
        left = precise.masked_fill(_at(positions, pattern, "masked") & later, 0)
        # What is missing in a row is rounding (softmaxes of any precision are taken in float32), or a learned sink's.
        missing = 1 - precise.sum(-1, keepdim=True)
        rounding = 4 * max(torch.finfo(pattern.dtype).eps, torch.finfo(torch.float32).eps)
        total = left.sum(-1, keepdim=True) + missing.where(missing > rounding, 0)
        if not (total > 0).all():
            raise AttentionOutOfReachError(
                f"attention to {_listed(positions)} cannot be masked in {_architecture(model)}: in {pattern.dtype} a "
                "query attends to nothing else, and has nothing to share out. Load the model in float32."
            )
        return (left / total).to(pattern)

    with _changed_patterns(model, mask, "mask", "masked"):
        yield


@contextmanager
def _changed_patterns(model: Model, change: Callable[[Tensor], Tensor], verb: str, done: str) -> Iterator[None]:
    """Inside, every attention pattern is changed before it is used."""
    layers = _layers_with(model, "hook_pattern", "hook_z")
    if not layers:
        raise ValueError(f"{_architecture(model)} has no attention patterns: there is nothing to {verb}.")
    changed: set[int] = set()

    def act(layer: int) -> Callable[..., Tensor]:
        def hook_function(pattern: Tensor, hook: Any) -> Tensor:
            changed.add(layer)
            return change(pattern)

        return hook_function

    def check(layer: int) -> Callable[..., None]:
        def hook_function(z: Tensor, hook: Any) -> None:
            # What a pattern makes cannot come before it: this one was formed beside, or behind, and is not used.
            if layer not in changed:
                raise AttentionOutOfReachError(
                    f"attention cannot be {done} in {_architecture(model)}: layer {layer} runs it inside a wrapped "
                    "module, which a hook on the pattern does not reach. Take a HookedTransformer (TransformerLens "
                    "3.9), or for a model of boot_native TransformerLens 4."
                )
            changed.remove(layer)

        return hook_function

    with ExitStack() as stack:
        stack.enter_context(one_at_a_time)
        for layer in layers:
            stack.enter_context(attached(model.hook_dict[_name(layer, "hook_pattern")], act(layer)))
            stack.enter_context(attached(model.hook_dict[_name(layer, "hook_z")], check(layer)))
        yield


def _at(positions: list[int], pattern: Tensor, done: str) -> Tensor:
    """Which keys of a pattern are meant.

    Raises:
        ValueError: for a position outside of the prompt.
    """
    tokens = pattern.shape[-1]
    for position in positions:
        if not -tokens <= position < tokens:
            raise ValueError(
                f"attention cannot be {done} at position {position}: the prompt has {tokens} tokens, up to where the "
                "prediction is read."
            )
    mask = torch.zeros(tokens, dtype=torch.bool, device=pattern.device)
    mask[positions] = True
    return mask


def _name(layer: int, part: str) -> str:
    return f"blocks.{layer}.attn.{part}"


def _layers_with(model: Model, *parts: str) -> list[int]:
    """Layers whose attention has all of these hooks."""
    layers = range(model.cfg.n_layers)
    return [layer for layer in layers if all(_name(layer, part) in model.hook_dict for part in parts)]


def _layers_with_another_mixer(model: Model) -> set[int]:
    """Layers where a state-space model runs beside the attention (Falcon-H1)."""
    found = (re.match(r"blocks\.(\d+)\.(?:mamba|mixer)\.", name) for name in model.hook_dict)
    return {int(match[1]) for match in found if match}


def _listed(layers: list[int]) -> str:
    return ", ".join(map(str, layers[:4])) + (", ..." if len(layers) > 4 else "")


def _architecture(model: Model) -> str:
    return str(getattr(model.cfg, "architecture", None) or type(model).__name__)
