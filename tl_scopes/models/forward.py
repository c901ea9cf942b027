"""One forward pass, with the graph from one hook to another."""

import difflib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_scopes.models.checkpointing import StopForward, checkpointed, frozen
from tl_scopes.models.memory import enough_memory
from tl_scopes.models.supported import Model, has_backward_hooks

READOUT = "ln_final"
"""The paper's name for the end of the Jacobian: what the unembedding reads."""

# `ln_final.hook_normalized` is before the gain and the bias, and a side branch on the bridge: scores read there are
# wrong. The input of the unembedding is the same tensor on every kind of model, also on those without a final norm.
_READOUT_HOOK = "unembed.hook_in"
_READOUT_NAMES = (READOUT, "ln_final.hook_out", _READOUT_HOOK)


@dataclass(frozen=True, eq=False)
class Trace:
    """One forward pass, with the graph from a perturbation at the `wrt` hooks to the values at the `of` hook.

    The perturbations are zeros, so the values are the model's own; they are there to be differentiated.
    """

    places: tuple[tuple[int, int], ...]
    """Where the rows below were read: entry of the batch, position."""

    inputs: dict[str, Float[Tensor, "batch token d_model"]]
    """Detached value at each `wrt` hook."""
    perturbations: dict[str, Float[Tensor, "batch token d_model"]]
    """The zero leaves that were added there."""
    output: Float[Tensor, "row d_of"]
    """Values at the `of` hook; the root of the graph."""
    readout: Float[Tensor, "row d_of"] | None
    """`output`, where the way to `logits` begins. None when `of` is no readout."""
    logits: Float[Tensor, "row vocab"] | None
    """The model's own logits there, soft-caps and scales included: a function of `readout`, and through it of the
    perturbations."""
    unembedded: Float[Tensor, "row 1 vocab"] | None
    """What the unembedding gave out, on the way from `readout` to `logits`."""
    hooked: bool = False
    """Whether backward hooks of the user's are in the graph."""
    checkpointed: bool = False
    """Whether its blocks are run again in the backward pass."""
    graphs: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """The `readout_graph` that was asked for last: of all rows they would take as much again as `logits`."""

    @cached_property
    def slope(self) -> Float[Tensor, "row vocab"]:
        """Derivative of each logit with respect to its own entry of `unembedded`: of scales and soft-caps."""
        assert self.logits is not None
        assert self.unembedded is not None
        return torch.autograd.grad(self.logits.sum(), self.unembedded, retain_graph=True)[0][:, 0]

    def probe(self, row: int) -> Float[Tensor, " vocab"]:
        """A cotangent of the logits of a row, to check one row's graph with."""
        assert self.logits is not None
        return torch.linspace(-1, 1, self.logits.shape[-1]).to(self.logits).roll(7 * row)

    @cached_property
    def probed(self) -> Float[Tensor, "row d_of"]:
        """What the graph of all rows makes of their probes."""
        assert self.logits is not None
        assert self.readout is not None
        cotangent = torch.empty_like(self.logits)
        for row, of_row in enumerate(cotangent):
            of_row.copy_(self.probe(row))
        return torch.autograd.grad(self.logits, self.readout, cotangent, retain_graph=True)[0]


one_at_a_time = threading.RLock()
"""Hooks belong to the model: a second thread's would meet the first one's activations."""


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
    places: Sequence[tuple[int, int]] | None = None,
    values: Mapping[str, Float[Tensor, "batch token d_model"]] | None = None,
    checkpoint: bool = False,
) -> Trace:
    """Run the model once, keeping the graph from the `wrt` hooks to the `of` hook.

    Hooks that the user has set act as in any other run. The model is left as found, also after an exception.

    Args:
        model: a checked model.
        tokens: prompts; shorter ones are filled up on the right, where nothing matters to a causal model.
        wrt: hooks where the perturbations enter.
        of: hook where the value is read.
        places: where it is read: entry of the batch, position. None is the last position of each entry.
        values: what to put in place of the activation at some of the `wrt` hooks.
        checkpoint: keep only the residual stream between blocks, and run each block again in the backward pass.

    Cost: one forward pass. At the readout only the places go on to the unembedding; elsewhere the pass stops.

    Raises:
        ValueError: a hook that does not exist, never fires, has no [batch pos d] value, or comes too late.
        MemoryError: when the graph will not fit.
    """
    inputs: dict[str, Tensor] = {}
    perturbations: dict[str, Tensor] = {}
    outputs: list[Tensor] = []
    readout: list[Tensor] = []
    unembedded: list[Tensor] = []
    read_once: list[bool] = []
    replacements = values or {}
    places = as_places(tokens, places)
    entries, positions = (list(numbers) for numbers in zip(*places, strict=True))

    def perturb(name: str) -> Callable[..., Tensor]:
        def hook_function(value: Tensor, hook: Any) -> Tensor:
            check_value(name, value, tokens)
            if name in replacements:
                value = replacements[name].to(value)
            if name not in perturbations:  # else a block that is run again for its backward pass
                # A zero leaf, rather than requires_grad on the value: it works whether parameters are frozen or not,
                # and where the hook hands out a view.
                perturbations[name] = torch.zeros_like(value, requires_grad=True)
                inputs[name] = value.detach()
            return value + perturbations[name]

        return hook_function

    def read(value: Tensor, hook: Any) -> Tensor:
        check_value(of, value, tokens)
        chosen = value[entries, positions]
        if not read_once:  # else a block that is run again
            outputs.append(chosen)
        read_once.append(True)
        if not is_readout(of):
            raise StopForward
        readout.append(chosen)
        return chosen[:, None]  # the unembedding runs at the places only

    def read_unembedded(value: Tensor, hook: Any) -> None:
        unembedded.append(value)

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
        stack.enter_context(one_at_a_time)
        stack.enter_context(torch.enable_grad())
        stack.enter_context(frozen(model))
        stack.callback(_let_go, model)
        for name in wrt:
            stack.enter_context(attached(model.hook_dict[points[name]], perturb(name)))
        stack.enter_context(attached(model.hook_dict[points[of]], read))
        stack.enter_context(attached(model.hook_dict["unembed.hook_out"], read_unembedded))
        stack.enter_context(enough_memory(model, tokens, checkpoint))
        options = stack.enter_context(checkpointed(model)) if checkpoint else {}
        with suppress(StopForward):
            logits = model(tokens, return_type="logits", **options)[:, -1]

    if not outputs:
        raise ValueError(f"the hook {of!r} never fired: this model does not run it, or an option switches it off.")
    silent = [name for name in wrt if name not in perturbations]
    if silent:
        raise ValueError(
            f"the hook {silent[0]!r} did not fire before {of!r}: wrt must come before of, and not be switched off."
        )
    if not outputs[0].requires_grad:
        raise independence(wrt, of)
    leaf, last = (values[0] if values else None for values in (readout, unembedded))
    output = outputs[0]
    # A block that is to be run again keeps the hooks above: what they keep must not lead back to its graph.
    for kept in (outputs, readout, unembedded):
        kept.clear()
    hooked = has_backward_hooks(model)
    return Trace(places, inputs, perturbations, output, leaf, logits, last, hooked, checkpoint)


def readout_graph(model: Model, trace: Trace, row: int) -> tuple[Float[Tensor, "1 d_of"], Float[Tensor, "1 vocab"]]:
    """A readout of a trace as a leaf, and the logits as a function of it, of that row alone.

    A backward pass from one row of `trace.logits` would go through the unembedding of all rows.

    Cost: the unembedding of one row, when there are several.
    """
    assert trace.readout is not None
    assert trace.logits is not None
    if len(trace.places) == 1:
        return trace.readout, trace.logits
    if known := trace.graphs.get(row):
        return known
    with one_at_a_time, torch.enable_grad():
        leaf = trace.readout[row : row + 1].detach().requires_grad_()
        unembedded = model.unembed(leaf[:, None])[:, 0]
        # What stands between the unembedding and the logits, a scale or a soft-cap, acts on each logit by itself.
        logits = trace.logits[row : row + 1].detach() + trace.slope[row] * (unembedded - unembedded.detach())
    (found,), expected = torch.autograd.grad(logits, leaf, trace.probe(row)[None], retain_graph=True), trace.probed[row]
    if not torch.allclose(found[0], expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max())):
        raise ValueError(
            "a hook of yours changes the unembedding or mixes its logits, so that one prediction cannot be told from "
            "the others of the same forward pass: ask for one prompt and one position at a time."
        )
    trace.graphs.clear()
    trace.graphs[row] = leaf, logits
    return leaf, logits


def as_places(tokens: Tensor, places: Sequence[tuple[int, int]] | None) -> tuple[tuple[int, int], ...]:
    """The places given, or the last position of each entry."""
    return tuple(places or ((entry, tokens.shape[1] - 1) for entry in range(len(tokens))))


def undisturbed(trace: Trace) -> AbstractContextManager[Any]:
    """Keep other threads' passes out of a backward pass that runs blocks again, which sets their hooks."""
    return one_at_a_time if trace.checkpointed else nullcontext()


def user_hooks(model: Model) -> dict[str, tuple[int, ...]]:
    """Which hooks are set, but for those of another thread's pass: the same as long as nobody adds or takes any."""
    with one_at_a_time:
        return {name: tuple(id(h.hook) for h in at.fwd_hooks) for name, at in model.hook_dict.items() if at.fwd_hooks}


def independence(wrt: Sequence[str], of: str) -> ValueError:
    """What to raise when `of` does not depend on `wrt`."""
    return ValueError(
        f"the value at {of!r} does not depend on {', '.join(map(repr, wrt))}: it is a side branch, "
        "or a hook of yours replaces everything in between."
    )


def check_value(name: str, value: Any, tokens: Tensor) -> None:
    """Refuse a hook whose value is no residual stream.

    Raises:
        ValueError: with the shape it has.
    """
    if not isinstance(value, Tensor) or value.ndim != 3 or value.shape[:2] != tokens.shape:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"the hook {name!r} has no [batch pos d] value but {shape}: choose a residual-stream hook.")


def _let_go(model: Model) -> None:
    """Some bridges (GPT-2, Pythia) keep their last attention pattern, and with it the graph that led to it."""
    for part in model.modules():
        kept = vars(part).get("_pattern")
        if isinstance(kept, Tensor):
            vars(part)["_pattern"] = kept.detach()


@contextmanager
def attached(point: Any, function: Callable[..., Tensor | None]) -> Iterator[None]:
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
