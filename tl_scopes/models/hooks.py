"""Hook points: how they are named on each kind of model, and how a hook of ours comes and goes."""

import difflib
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from tl_scopes.models.supported import Model

EMBEDDING = "hook_embed"
"""The hook behind the token embedding: the paper's inputs x."""
READOUT = "ln_final"
"""The paper's name for the end of the Jacobian: what the unembedding reads."""

# `ln_final.hook_normalized` is before the gain and the bias, and a side branch on the bridge: scores read there are
# wrong. The input of the unembedding is the same tensor on every kind of model, also on those without a final norm.
_READOUT_HOOK = "unembed.hook_in"
_READOUT_NAMES = (READOUT, "ln_final.hook_out", _READOUT_HOOK)

one_at_a_time = threading.RLock()
"""Held while hooks of ours are on a model: a second thread's hooks would meet the first one's activations."""


class StopForward(BaseException):
    """Ends a forward pass at a hook."""


def is_readout(of: str) -> bool:
    """Whether `of` names what the unembedding reads."""
    return of in _READOUT_NAMES


def hook_point(points: Mapping[str, Any], name: str) -> Any:
    """The hook point of this name among a model's `hook_dict`.

    The readout's names all mean the input of the unembedding. A bridge builds its `hook_dict` anew whenever it is asked
    for, which takes a while: ask once.

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


def check_perturbed(point: Any, name: str) -> None:
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


def check_value(name: str, value: Any, tokens: Tensor) -> None:
    """Refuse a hook whose value does not have the shape of a residual stream.

    Raises:
        ValueError: with the shape that it has.
    """
    if not isinstance(value, Tensor) or value.ndim != 3 or value.shape[:2] != tokens.shape:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"the value at the hook {name!r} is not [batch pos d] but {shape}: choose a hook of the residual stream."
        )


@contextmanager
def attached(point: Any, function: Callable[..., Tensor | None]) -> Iterator[None]:
    """Inside, one more forward hook acts on a HookPoint, after the user's; that one alone is taken away at the end.

    `model.hooks(...)` would not do: in compatibility mode it calls the function once for every alias of the point.
    """
    point.add_hook(function)
    handle = point.fwd_hooks[-1]
    try:
        yield
    finally:
        handle.hook.remove()
        point.fwd_hooks[:] = [other for other in point.fwd_hooks if other is not handle]


def user_hooks(model: Model) -> dict[str, tuple[object, ...]]:
    """The functions that the user has hooked to each point; another thread's pass is waited for, so as not to see ours.

    On TransformerLens 3.9, which does not keep the functions, their representations, which hold their addresses.
    """
    with one_at_a_time:
        hooked = ((name, point.fwd_hooks) for name, point in model.hook_dict.items() if point.fwd_hooks)
        return {name: tuple(map(_function, handles)) for name, handles in hooked}


def has_backward_hooks(model: Model) -> bool:
    """Whether the user has set backward hooks. A graph that is made now goes through them as long as it lives."""
    return any(point.bwd_hooks for point in model.hook_dict.values())


def _function(handle: Any) -> object:
    given = getattr(handle, "user_hook", None)
    return given if given is not None else handle.hook.hooks_dict_ref()[handle.hook.id].__name__
