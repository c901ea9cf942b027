"""Attention patterns and values of every layer, wherever they live on each kind of model."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_scopes.models.hooks import READOUT, StopForward, hook_points, run
from tl_scopes.models.memory import Work, at_once
from tl_scopes.models.precision import sum_dtype
from tl_scopes.models.supported import Model, architecture, attention_kernel
from tl_scopes.models.wording import counted


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
    """The value of every query head; where heads share one (grouped queries), it is repeated."""
    module: nn.Module = field(repr=False)
    """The layer's attention, which holds the output projection."""

    def __repr__(self) -> str:
        heads, tokens, d_head = self.value.shape
        return f"AttentionLayer(layer {self.layer}; {counted(heads, 'head')} of {d_head}, {counted(tokens, 'token')})"

    @property
    def W_O(self) -> Float[Tensor, "head d_head d_model"]:
        """The output projection, split into heads. It is read when it is asked for: weights that are quantised or
        offloaded cannot be, and patterns do not need it."""
        weights: Any = self.module.W_O
        return weights.detach()

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
        dtype = sum_dtype(self.value)
        heads = zip(self.value, self.W_O, strict=True)
        return torch.stack([torch.linalg.vector_norm(v @ w, ord=ord, dim=-1, dtype=dtype) for v, w in heads])


def attention_layers(model: Model, tokens: Int[Tensor, "token"]) -> Iterator[AttentionLayer]:
    """Every layer's attention at one prompt, in order, without gradients.

    Hooks that the user has set act as in any other run, before the values are read. The model is left as found, also
    after an exception. Arguments are checked at the call; the model runs when the first layer is asked for.

    Args:
        model: a checked model.
        tokens: the prompt.

    Cost: one forward pass, with the unembedding at one position, when all patterns together take at most 1 GiB. For
        longer prompts one pass from the start for each group of layers whose patterns take that much.

    Raises:
        ValueError: for a model in which tokens mix other than by attention (state-space and convolutional layers), one
            whose attention kernel forms no patterns, or whose heads do more than average values (gates, clipping).
    """
    layers = model.cfg.n_layers
    whole, patterns = layers_with(model, "hook_pattern", "hook_v", "hook_z"), layers_with(model, "hook_pattern")
    others = sorted({*range(layers)} - {*patterns} | _layers_with_another_mixer(model))
    if others:
        raise ValueError(
            f"{architecture(model)} has layers in which tokens mix other than by attention patterns "
            f"({listed(others)} of {layers}), but by a state-space model, a convolution, linear attention or attention "
            "that shows no pattern. These would be missing: take a scope that needs no patterns, such as SemanticScope "
            "or FisherScope."
        )
    without = sorted({*range(layers)} - {*whole})
    if without:
        raise ValueError(
            f"{architecture(model)} has layers whose attention has no hooks on its values and on what its heads give "
            f"out ({listed(without)} of {layers}), as in JetMoE, where a router chooses the experts that compute them. "
            "Patterns alone do not explain it: take a scope that needs none, such as SemanticScope or FisherScope."
        )
    return _in_groups(model, tokens, at_once(model, len(tokens), Work.PATTERN))


def _in_groups(model: Model, tokens: Tensor, size: int) -> Iterator[AttentionLayer]:
    layers = range(model.cfg.n_layers)
    for start in layers[::size]:
        group = layers[start : start + size]
        cache = _cached(model, tokens, group)
        for layer in group:
            yield _attention_layer(model, layer, cache)


@torch.no_grad()
def _cached(model: Model, tokens: Tensor, group: range) -> dict[str, Tensor]:
    """Patterns, values and head outputs of some layers, from one forward pass that ends as soon as they are there."""
    names = [part_name(layer, part) for layer in group for part in ("hook_pattern", "hook_v", "hook_z")]
    cache: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook_function(value: Tensor, hook: Any) -> None:
            cache[name] = value.detach()
            if len(cache) == len(names):
                raise StopForward

        return hook_function

    # Not `run_with_cache`, whose hooks would also keep what other threads compute, and which tells the blocks where to
    # stop, those threads' passes too. The pass goes on to the end where a kernel forms no pattern; the logits of one
    # position are enough then.
    run(model, tokens[None], *((name, keep(name)) for name in names), (READOUT, lambda value, hook: value[:, -1:]))
    return cache


def _attention_layer(model: Model, layer: int, cache: dict[str, Tensor]) -> AttentionLayer:
    """Take one layer out of the cache.

    Raises:
        ValueError: for a layer without a pattern, or whose heads do more than average their values.
    """
    if part_name(layer, "hook_pattern") not in cache:
        raise ValueError(
            f"layer {layer} of {architecture(model)} forms no attention pattern: its attention kernel "
            f"({attention_kernel(model)!r}) computes the output without. Load the model with "
            'attn_implementation="eager".'
        )
    pattern, value, z = (cache.pop(part_name(layer, part))[0] for part in ("hook_pattern", "hook_v", "hook_z"))
    if part_name(layer, "hook_kv_latent") not in hook_points(model):  # latent attention (DeepSeek) has heads first
        value = value.transpose(0, 1)
    value = value.repeat_interleave(len(pattern) // len(value), dim=0)
    z = z.reshape(len(z), len(pattern), -1).transpose(0, 1)
    # Heads that do more than average their values (a gate, a clip, a norm in between) cannot be told by name. Their
    # output tells, unless a hook of the user's has changed it.
    if not hook_points(model)[part_name(layer, "hook_z")].fwd_hooks:
        error = (pattern.to(value) @ value - z).abs().max()
        if error > max(2e-3, 2 * torch.finfo(value.dtype).eps) * value.abs().max():
            raise ValueError(
                f"the heads of layer {layer} of {architecture(model)} do not give the average of their values that "
                f"the attention pattern says (off by {error:.2g}): they gate, clip or normalise besides, or a hook of "
                "yours changes a pattern that was already used. Patterns and values do not explain this model."
            )
    return AttentionLayer(layer, pattern, value, model.blocks[layer].attn)


def part_name(layer: int, part: str) -> str:
    """The hook on a part of a layer's attention."""
    return f"blocks.{layer}.attn.{part}"


def layers_with(model: Model, *parts: str) -> list[int]:
    """The layers whose attention has all of these hooks."""
    points = hook_points(model)
    return [i for i in range(model.cfg.n_layers) if all(part_name(i, part) in points for part in parts)]


def _layers_with_another_mixer(model: Model) -> set[int]:
    """The layers where a state-space model runs beside the attention (Falcon-H1)."""
    found = (re.match(r"blocks\.(\d+)\.(?:mamba|mixer)\.", name) for name in hook_points(model))
    return {int(match[1]) for match in found if match}


def listed(layers: list[int]) -> str:
    """The first few numbers of a list, for an error."""
    return ", ".join(map(str, layers[:4])) + (", ..." if len(layers) > 4 else "")
