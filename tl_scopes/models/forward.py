"""One forward pass, with the graph from one hook to another."""

import difflib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_scopes.models.kinds import Model

READOUT = "ln_final"
"""The paper's name for the end of the Jacobian: what the unembedding reads."""

# `ln_final.hook_normalized` is before the gain and the bias, and a side branch on the bridge: scores read there are
# wrong. The input of the unembedding is the same tensor on every kind of model, also on those without a final norm.
_READOUT_HOOK = "unembed.hook_in"
_READOUT_NAMES = (READOUT, "ln_final.hook_out", _READOUT_HOOK)


@dataclass(frozen=True, eq=False)
class Trace:
    """One forward pass, with the graph from a perturbation at the `wrt` hooks to the value at the `of` hook.

    The perturbations are zeros, so the values are the model's own; they are there to be differentiated.
    """

    inputs: dict[str, Float[Tensor, "batch token d_model"]]
    """Detached value at each `wrt` hook."""
    perturbations: dict[str, Float[Tensor, "batch token d_model"]]
    """The zero leaves that were added there."""
    output: Float[Tensor, "batch d_of"]
    """Value at the `of` hook, at the last position; the root of the graph."""
    readout: Float[Tensor, "batch d_of"] | None
    """`output` cut off from the graph, as a leaf: where the graph of `logits` begins. None when `of` is no readout."""
    logits: Float[Tensor, "batch vocab"] | None
    """The model's own logits at the last position, soft-caps and scales included, as a function of `readout`."""


_one_at_a_time = threading.RLock()
"""Hooks belong to the model: a second thread's would meet the first one's activations."""


class _StopForward(BaseException):
    """Ends a forward pass at a hook."""


def is_readout(of: str) -> bool:
    """Whether `of` names what the unembedding reads."""
    return of in _READOUT_NAMES


def hook_name(model: Model, name: str) -> str:
    """The name under which the model knows a hook; the readout's names all mean the input of the unembedding.

    Raises:
        ValueError: for a name the model does not have.
        TypeError: for a name that is no str.
    """
    if is_readout(name):
        name = _READOUT_HOOK
    if not isinstance(name, str):
        raise TypeError(f"a hook is named by a str, got {name!r}.")
    if name not in model.hook_dict:
        close = difflib.get_close_matches(name, list(model.hook_dict), n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else " model.hook_dict lists them."
        raise ValueError(f"the model has no hook {name!r}.{hint}")
    return name


def trace(
    model: Model,
    tokens: Int[Tensor, "batch token"],
    *,
    wrt: Sequence[str],
    of: str,
    values: dict[str, Float[Tensor, "batch token d_model"]] | None = None,
) -> Trace:
    """Run the model once, keeping the graph from the `wrt` hooks to the `of` hook at the last position.

    Hooks that the user has set act as in any other run. The model is left as found, also after an exception.

    Args:
        model: a checked model.
        tokens: of one length; the prediction is read after the last.
        wrt: hooks where the perturbations enter.
        of: hook where the value is read.
        values: what to put in place of the activation at some of the `wrt` hooks.

    Cost: one forward pass. At the readout only the last position goes on to the unembedding; elsewhere the pass stops.

    Raises:
        ValueError: a hook that does not exist, never fires, has no [batch pos d] value, or comes too late.
    """
    inputs: dict[str, Tensor] = {}
    perturbations: dict[str, Tensor] = {}
    outputs: list[Tensor] = []
    readout: list[Tensor] = []
    replacements = values or {}

    def perturb(name: str) -> Callable[..., Tensor]:
        def hook_function(value: Tensor, hook: Any) -> Tensor:
            _check_value(name, value, tokens)
            if name in replacements:
                value = replacements[name].to(value)
            # A zero leaf, rather than requires_grad on the value: it works whether parameters are frozen or not, and
            # where the hook hands out a view.
            leaf = torch.zeros_like(value, requires_grad=True)
            inputs[name], perturbations[name] = value.detach(), leaf
            return value + leaf

        return hook_function

    def read(value: Tensor, hook: Any) -> Tensor:
        _check_value(of, value, tokens)
        outputs.append(value[:, -1])
        if not is_readout(of):
            raise _StopForward
        leaf = value[:, -1].detach().requires_grad_()
        readout.append(leaf)
        return leaf[:, None]  # the unembedding runs at one position only

    logits = None
    points = {name: hook_name(model, name) for name in (*wrt, of)}
    for name in wrt:
        # A bridge has no point between attention and MLP on the stream itself: its alias is the MLP's branch alone.
        if name.endswith("hook_resid_mid") and not model.hook_dict[name].name.endswith("hook_resid_mid"):
            raise ValueError(
                f"on a TransformerBridge {name!r} is only the branch into the MLP, without the residual stream beside "
                f"it: take {name.replace('resid_mid', 'attn_out')!r}, which adds to the same place of the stream."
            )
    with ExitStack() as stack:
        stack.enter_context(_one_at_a_time)
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_frozen(model))
        for name in wrt:
            stack.enter_context(_attached(model.hook_dict[points[name]], perturb(name)))
        stack.enter_context(_attached(model.hook_dict[points[of]], read))
        with suppress(_StopForward):
            logits = model(tokens, return_type="logits")[:, -1]

    if not outputs:
        raise ValueError(f"the hook {of!r} never fired: this model does not run it, or an option switches it off.")
    silent = [name for name in wrt if name not in perturbations]
    if silent:
        raise ValueError(
            f"the hook {silent[0]!r} did not fire before {of!r}: wrt must come before of, and not be switched off."
        )
    if not outputs[0].requires_grad:
        raise independence(wrt, of)
    return Trace(inputs, perturbations, outputs[0], readout[0] if readout else None, logits)


def independence(wrt: Sequence[str], of: str) -> ValueError:
    """What to raise when `of` does not depend on `wrt`."""
    return ValueError(
        f"the value at {of!r} does not depend on {', '.join(map(repr, wrt))}: it is a side branch, "
        "or a hook of yours replaces everything in between."
    )


def _check_value(name: str, value: Any, tokens: Tensor) -> None:
    if not isinstance(value, Tensor) or value.ndim != 3 or value.shape[:2] != tokens.shape:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"the hook {name!r} has no [batch pos d] value but {shape}: choose a residual-stream hook.")


@contextmanager
def _attached(point: Any, function: Callable[..., Tensor | None]) -> Iterator[None]:
    """Add one forward hook to a HookPoint, after the user's, and take away that one alone.

    Not `model.hooks(...)`: in compatibility mode it calls the function once for every alias of the point.
    """
    point.add_hook(function)
    handle = point.fwd_hooks[-1]
    try:
        yield
    finally:
        handle.hook.remove()
        point.fwd_hooks[:] = [other for other in point.fwd_hooks if other is not handle]


@contextmanager
def _frozen(model: Model) -> Iterator[None]:
    """Parameters without gradients: the graph then keeps no activations for their sake."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
