"""Forward passes in which something is replaced: values at one hook, or what tokens attend to."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, SupportsIndex

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd import forward_ad

from tl_scopes.models.arguments import as_int, as_position
from tl_scopes.models.attention import layers_with, listed, part_name
from tl_scopes.models.forward import as_places
from tl_scopes.models.hooks import (
    READOUT,
    StopForward,
    as_stream,
    attached,
    hook_points,
    is_readout,
    run,
)
from tl_scopes.models.linear_rules import LinearRules, within
from tl_scopes.models.precision import sum_dtype
from tl_scopes.models.supported import Model, architecture
from tl_scopes.models.threads import one_at_a_time


@torch.no_grad()
def evaluate(
    model: Model,
    tokens: Int[Tensor, "batch token"],
    *,
    wrt: str = "hook_embed",
    of: str = READOUT,
    places: Sequence[tuple[int, int]] | None = None,
    values: Float[Tensor, "batch token d_model"] | None = None,
) -> tuple[Float[Tensor, "row d_of"], Float[Tensor, "row vocab"] | None]:
    """The value at the `of` hook at some places, and the logits there; other values can be put at the `wrt` hook.

    Args:
        model: a checked model.
        tokens: prompts; shorter ones are filled up on the right.
        wrt: hook whose value is replaced.
        of: hook whose value is read. The logits are None unless it is the readout.
        places: entry of the batch, position. None is the last position of each entry.
        values: what to put at `wrt`; None leaves what is there.

    Cost: one forward pass; the unembedding runs at the places only.

    Raises:
        ValueError: for no prompts; for a hook that does not exist, never fires, or whose value is not [batch pos d] or
            [batch pos head d_head].
    """
    entries, positions = (list(numbers) for numbers in zip(*as_places(tokens, places), strict=True))
    fired, read = [], []

    def replace(value: Tensor, hook: Any) -> Tensor:
        as_stream(wrt, value, tokens)
        fired.append(wrt)
        return value if values is None else values.to(value).reshape(value.shape)

    def choose(value: Tensor, hook: Any) -> Tensor:
        read.append(as_stream(of, value, tokens)[entries, positions])
        if not is_readout(of):
            raise StopForward
        return read[-1][:, None]

    logits = run(model, tokens, (wrt, replace), (of, choose))
    for name, seen in ((wrt, fired), (of, read)):
        if not seen:
            raise ValueError(
                f"the hook {name!r} never fired: this model does not run it, or an option switches it off."
            )
    return read[0], None if logits is None else logits[:, -1]


def predict(
    model: Model,
    tokens: Int[Tensor, "batch token"],
    *,
    wrt: str = "hook_embed",
    places: Sequence[tuple[int, int]] | None = None,
    values: Float[Tensor, "batch token d_model"] | None = None,
) -> Float[Tensor, "row vocab"]:
    """The model's logits at some places, with other values at the `wrt` hook if given: see `evaluate`."""
    logits = evaluate(model, tokens, wrt=wrt, places=places, values=values)[1]
    assert logits is not None
    return logits


@torch.no_grad()
def push(
    model: Model,
    tokens: Int[Tensor, "batch token"],
    tangents: Float[Tensor, "batch token d_model"],
    met: Mapping[str, Callable[[Tensor], None]],
    *,
    wrt: str,
    of: str,
    values: Float[Tensor, "batch token d_model"] | None = None,
    rules: LinearRules | None = None,
) -> Float[Tensor, "batch d_of"]:
    """Tangents δ at the `wrt` hook, carried forward by forward-mode differentiation, as they arrive at other hooks.

    Args:
        model: a checked model.
        tokens: prompts of one length.
        tangents: δ for each.
        met: by the name of a hook, what is to be done with ∂(value at that hook)/∂x δ, which is not kept.
        wrt: hook where they enter.
        of: hook where the result is read, at the last position.
        values: what to put at `wrt`; None leaves what is there.
        rules: what differentiates the model in place of some of its own derivatives.

    Cost: about three forward passes, without a graph.

    Raises:
        NotImplementedError, RuntimeError: for an operation of the model that has no forward-mode derivative.
    """
    arrived: list[Tensor] = []

    def enter(value: Tensor, hook: Any) -> Tensor:
        at = value if values is None else values.to(value).reshape(value.shape)
        return forward_ad.make_dual(at, tangents.to(value).reshape(value.shape))

    def meet(act: Callable[[Tensor], None]) -> Callable[..., Tensor]:
        def hook_function(value: Tensor, hook: Any) -> Tensor:
            tangent = forward_ad.unpack_dual(value).tangent
            if tangent is not None:
                act(tangent)
            return value

        return hook_function

    def leave(value: Tensor, hook: Any) -> None:
        tangent = forward_ad.unpack_dual(value).tangent
        last = torch.zeros_like(value[:, -1]) if tangent is None else tangent[:, -1].clone()
        arrived.append(last.flatten(1))
        raise StopForward

    with one_at_a_time, within(rules, nullcontext()), forward_ad.dual_level():
        run(model, tokens, (wrt, enter), *((name, meet(act)) for name, act in met.items()), (of, leave))
    return arrived[0]


class AttentionOutOfReachError(ValueError):
    """Attention patterns of this model cannot be changed from outside."""


@contextmanager
def held_attention(model: Model, keys: Sequence[SupportsIndex] | None = None) -> Iterator[None]:
    """Inside, the attention paid to these positions is constant for differentiation; no value changes.

    `tl_scopes.linearize` inside gives the Jacobian without the routes through these attention weights, in all layers
    and heads. That holds for linearisations made inside, and for `Linearization.at` called inside. Weights on other
    positions still move, as softmaxes over all scores, those of held positions included.

    Other threads that would run a model through this package wait outside.

    Args:
        model: a checked model. Layers without attention (Jamba) have nothing to hold.
        keys: positions attended to, negative ones from the end of what is run: the whole text of a map, prompt and
            answer where there is one; None holds the whole patterns.

    Raises:
        ValueError: at once for a model without attention patterns; in the forward pass for keys outside of the prompt,
            and an `AttentionOutOfReachError` for attention that runs inside a wrapped Hugging Face module, where a hook
            comes too late (OPT, GPT-J, GPT-Neo; models of `boot_native` on TransformerLens 3.9).
        TypeError: for keys that are not integers.
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

    which are the softmaxes over the scores that are left. A masked token still attends to itself, but no other token
    learns what it says, and all tokens keep their positions. Beside a learned sink logit (GPT-OSS) the sink's part
    counts in the sum. Other threads that would run a model through this package wait outside.

    Args:
        model: a checked model. Layers without attention (Jamba) work as before.
        keys: positions that are not attended to, negative ones from the end.

    Raises:
        ValueError: as `held_attention` does; in the forward pass also where a query had attended to nothing else.
        TypeError: for keys that are not integers.
    """
    positions = [as_int(key, "attention is masked at positions, integers") for key in keys]

    def mask(pattern: Tensor) -> Tensor:
        later = torch.ones(pattern.shape[-2:], dtype=torch.bool, device=pattern.device).tril(-1)
        precise = pattern.to(sum_dtype(pattern))
        left = precise.masked_fill(_at(positions, pattern, "masked") & later, 0)
        # What is missing in a row belongs to a learned sink, or is rounding (softmaxes are taken in float32).
        missing = 1 - precise.sum(-1, keepdim=True)
        rounding = 4 * max(torch.finfo(pattern.dtype).eps, torch.finfo(torch.float32).eps)
        total = left.sum(-1, keepdim=True) + missing.where(missing > rounding, 0)
        if not (total > 0).all():
            raise AttentionOutOfReachError(
                f"attention to {listed(positions)} cannot be masked in {architecture(model)}: in {pattern.dtype} a "
                "query attends to nothing else, and has nothing to share out. Load the model in float32."
            )
        return (left / total).to(pattern)

    with _changed_patterns(model, mask, "mask", "masked"):
        yield


@contextmanager
def zeroed_values(model: Model, keys: Sequence[SupportsIndex]) -> Iterator[None]:
    """Inside, no head writes anything from these positions, in any layer; the attention paid to them stays as it is.

    So it is told what a sink does from where attention would go without it: a masked or removed sink has another token
    take its place. Other threads that would run a model through this package wait outside.

    Args:
        model: a checked model. Layers without attention (Jamba) work as before.
        keys: positions whose values are zero, negative ones from the end.

    Raises: as `masked_attention` does.
    """
    positions = [as_int(key, "values are zeroed at positions, integers") for key in keys]
    # Latent attention (DeepSeek) has heads first.
    axis = 2 if layers_with(model, "hook_kv_latent") else 1

    def zero(value: Tensor) -> Tensor:
        tokens = value.shape[axis]
        chosen = [as_position(position, tokens, "values cannot be zeroed: position") for position in positions]
        return value.index_fill(axis, torch.tensor(chosen, device=value.device), 0)

    with _changed_patterns(model, zero, "zero", "zeroed", "hook_v"):
        yield


@contextmanager
def _changed_patterns(
    model: Model, change: Callable[[Tensor], Tensor], verb: str, done: str, part: str = "hook_pattern"
) -> Iterator[None]:
    """Inside, every attention pattern, or another part of the attention, is changed before it is used."""
    layers = layers_with(model, "hook_pattern", part, "hook_z")
    if not layers:
        if layers_with(model, "hook_pattern"):
            raise AttentionOutOfReachError(
                f"attention cannot be {done} in {architecture(model)}: it has no hook on what its heads give out, "
                "which would tell whether a changed pattern was used."
            )
        raise ValueError(f"{architecture(model)} has no attention patterns: there is nothing to {verb}.")
    changed: set[int] = set()

    def act(layer: int) -> Callable[..., Tensor]:
        def hook_function(pattern: Tensor, hook: Any) -> Tensor:
            changed.add(layer)
            return change(pattern)

        return hook_function

    def check(layer: int) -> Callable[..., None]:
        def hook_function(z: Tensor, hook: Any) -> None:
            # A head's output comes after its pattern. If it comes first, the pattern was formed aside and is not used.
            if layer not in changed:
                raise AttentionOutOfReachError(
                    f"attention cannot be {done} in {architecture(model)}: layer {layer} runs it inside a wrapped "
                    "module, which a hook on the pattern does not reach. Take a HookedTransformer (TransformerLens "
                    "3.9), or for a model of boot_native TransformerLens 4."
                )
            changed.remove(layer)

        return hook_function

    with ExitStack() as stack:
        stack.enter_context(one_at_a_time)
        points = hook_points(model)
        for layer in layers:
            stack.enter_context(attached(points[part_name(layer, part)], act(layer)))
            stack.enter_context(attached(points[part_name(layer, "hook_z")], check(layer)))
        yield


def _at(positions: list[int], pattern: Tensor, done: str) -> Tensor:
    """A mask over the keys of a pattern that is true at these positions.

    Raises:
        ValueError: for a position that the prompt, up to where the prediction is read, does not have.
    """
    tokens = pattern.shape[-1]
    mask = torch.zeros(tokens, dtype=torch.bool, device=pattern.device)
    mask[[as_position(position, tokens, f"attention cannot be {done}: position") for position in positions]] = True
    return mask
