"""Hook points: how they are named on each kind of model, and how a hook of ours comes and goes."""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from torch import Tensor, nn

from tl_scopes.models.supported import Model
from tl_scopes.models.threads import OnlyHere, one_at_a_time, put_back

EMBEDDING = "hook_embed"
"""The hook behind the token embedding: the paper's inputs x."""
READOUT = "ln_final"
"""The paper's name for the end of the Jacobian: what the unembedding reads."""

# `ln_final.hook_normalized` is before the gain and the bias, and a side branch on the bridge: scores read there are
# wrong. The input of the unembedding is the same tensor on every kind of model, also on those without a final norm.
_READOUT_HOOK = "unembed.hook_in"
_READOUT_NAMES = (READOUT, "ln_final.hook_out", _READOUT_HOOK)

# Attention patterns have four axes too, [batch head query key], so that shapes alone would not tell them from heads.
_BY_HEAD = re.compile(r"blocks\.\d+\.attn\.(hook_[qkvz]|hook_rot_[qk]|hook_result|[qkv]\.hook_out|o\.hook_in)")


class StopForward(BaseException):
    """Ends a forward pass at a hook."""


def is_readout(of: str) -> bool:
    """Whether `of` names what the unembedding reads."""
    return of in _READOUT_NAMES


def hook_points(model: Model) -> dict[str, Any]:
    """All hook points of a model by name, under TransformerLens' older names too ("hook_embed").

    A bridge builds its `hook_dict` anew whenever it is asked for, which takes a while: ask once. The bridge of sae-lens
    leaves the older names out.
    """
    points = dict(model.hook_dict)
    if EMBEDDING not in points and hasattr(model, "_add_aliases_to_hooks"):
        model._add_aliases_to_hooks(points)
    return points


def hook_point(points: Mapping[str, Any], name: str) -> Any:
    """The hook point of this name among a model's `hook_points`; the readout's names all mean the unembedding's input.

    Raises:
        ValueError: for a name that the model does not have.
        TypeError: for a name that is not a str.
    """
    if is_readout(name):
        name = _READOUT_HOOK
    if not isinstance(name, str):
        raise TypeError(f"a hook is named by a str, got {name!r}.")
    if name not in points:
        close = difflib.get_close_matches(name, list(points), n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else " model.hook_dict lists them."
        raise ValueError(f"the model has no hook {name!r}.{hint}")
    return points[name]


def require_own_place(point: Any, name: str) -> None:
    """Refuse a hook point that is not at the place in the network which its name says.

    Raises:
        ValueError: for "hook_resid_mid" of a bridge, which has no point between attention and MLP on the stream itself:
            its alias is the branch into the MLP alone.
    """
    if name.endswith("hook_resid_mid") and not point.name.endswith("hook_resid_mid"):
        raise ValueError(
            f"on a TransformerBridge {name!r} is only the branch into the MLP, without the residual stream beside it: "
            f"take {name.replace('resid_mid', 'attn_out')!r}, which adds to the same place of the stream."
        )


def require_positions_first(points: Mapping[str, Any], name: str) -> None:
    """Refuse a hook where heads come before positions.

    Raises:
        ValueError: for the queries, keys and values of latent attention (DeepSeek).
    """
    block, _, part = name.partition(".attn.")
    if part in ("hook_q", "hook_k", "hook_v") and f"{block}.attn.hook_kv_latent" in points:
        raise ValueError(
            f"the value at the hook {name!r} is [batch head pos d_head], with heads before positions, as in latent "
            f"attention: take {block + '.attn.hook_z'!r}, what the heads give out, or {block + '.hook_attn_out'!r}."
        )


def as_stream(name: str, value: Any, tokens: Tensor) -> Tensor:
    """The value at a hook as [batch pos d]: where it is divided into heads, theirs one after another.

    Raises:
        ValueError: for a value of another shape, with the shape that it has.
    """
    is_by_head = isinstance(value, Tensor) and value.ndim == 4 and _BY_HEAD.fullmatch(name)
    if not isinstance(value, Tensor) or not (value.ndim == 3 or is_by_head) or value.shape[:2] != tokens.shape:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"the value at the hook {name!r} is neither [batch pos d] nor [batch pos head d_head] but {shape}: choose "
            "a hook of the residual stream, or of queries, keys, values or outputs of attention heads."
        )
    return value.flatten(2)


@contextmanager
def attached(point: Any, function: Callable[..., Tensor | None]) -> Iterator[None]:
    """Inside, one more forward hook acts on a HookPoint, in this thread and after the user's; it alone goes at the end.

    `model.hooks(...)` would not do: in compatibility mode it calls the function once for every alias of the point.
    """
    act = OnlyHere(function)
    with put_back() as afterwards:
        afterwards(_detach, point, act)
        point.add_hook(act)
        yield


def run(model: Model, tokens: Tensor, *hooks: tuple[str, Callable[..., Tensor | None]]) -> Tensor | None:
    """The logits [batch token vocab] of the model with hooks of ours, each with its name; None where one of them stops
    the forward pass. No other thread's pass runs beside it.

    Raises:
        ValueError: for a hook that the model does not have.
    """
    with ExitStack() as stack:
        stack.enter_context(one_at_a_time)
        points = hook_points(model)
        for name, function in hooks:
            stack.enter_context(attached(hook_point(points, name), function))
        stack.enter_context(suppress(StopForward))
        logits: Tensor = model(tokens, return_type="logits")
        return logits
    return None


def _detach(point: Any, function: Callable[..., Any]) -> None:
    """Take a hook function off a HookPoint, which names torch's hook by the function that it was given."""
    for id, hook in list(point._forward_hooks.items()):
        if getattr(hook, "__name__", None) == repr(function):
            point._forward_hooks.pop(id, None)
    for handle in list(point.fwd_hooks):
        if handle.hook.id not in point._forward_hooks:
            point.fwd_hooks.remove(handle)


def meet_gradients(parts: Iterable[nn.Module]) -> bool:
    """Whether a backward hook is on any of these modules; that of a hook point is a module's as well."""
    return any(part._backward_hooks or part._backward_pre_hooks for part in parts)


def kinds_of_hooks(point: nn.Module) -> tuple[Any, ...]:
    """The hooks of a module, of all kinds."""
    return point._forward_hooks, point._forward_pre_hooks, point._backward_hooks, point._backward_pre_hooks


def user_hooks(model: Model, points: Mapping[str, Any] | None = None) -> dict[str, tuple[object, ...]]:
    """The functions that the user has hooked to each point; another thread's pass is waited for, so as not to see ours.

    On TransformerLens 3.9, which does not keep the functions, these are their representations, which hold their
    addresses. The model's `hook_points` can be handed in.
    """
    with one_at_a_time:
        known = hook_points(model) if points is None else points
        return {name: tuple(map(_function, point.fwd_hooks)) for name, point in known.items() if point.fwd_hooks}


def has_backward_hooks(model: Model) -> bool:
    """Whether the user has set backward hooks. A graph that is made now goes through them as long as it lives."""
    return any(point.bwd_hooks for point in hook_points(model).values())


def _function(handle: Any) -> object:
    given = getattr(handle, "user_hook", None)
    return given if given is not None else handle.hook.hooks_dict_ref()[handle.hook.id].__name__
