"""One forward pass, with the graph from one hook to another."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_scopes.models.checkpointing import checkpointed
from tl_scopes.models.coverage import not_covered, uncovered
from tl_scopes.models.gradient_check import gradients_pass, named_graph
from tl_scopes.models.hooks import (
    EMBEDDING,
    StopForward,
    as_stream,
    attached,
    hook_point,
    hook_points,
    is_readout,
    meet_gradients,
    require_own_place,
    require_positions_first,
)
from tl_scopes.models.linear_rules import LinearRules, within
from tl_scopes.models.memory import require_memory, told
from tl_scopes.models.state import ModelState, unwritten
from tl_scopes.models.substitution import frozen
from tl_scopes.models.supported import (
    Model,
    batches_cotangents,
    device_of,
    parameters_of,
    parts_of,
    run_by,
)
from tl_scopes.models.threads import here, one_at_a_time


@dataclass(frozen=True, eq=False)
class Trace:
    """One forward pass, with the graph from a perturbation at the `wrt` hooks to the values at the `of` hook.

    The perturbations are zeros, so that the values are the model's own; they are there to be differentiated.
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
    """`output`, where the way to `logits` begins. None when `of` is not the readout."""
    logits: Float[Tensor, "row vocab"] | None
    """The model's own logits there, soft-caps and scales included: a function of `readout`, and through it of the
    perturbations."""
    unembedded: Float[Tensor, "row 1 vocab"] | None
    """What the unembedding gave out, on the way from `readout` to `logits`."""
    state: ModelState
    """The user's hooks and the weights that the pass ran with."""
    moved: bool = False
    """Whether other values than the model's own were put at a `wrt` hook."""
    exchanges: tuple[Any, ...] = ()
    """The exchanges of weights that the pass ran inside of."""
    hooked: bool = False
    """Whether backward hooks of the user's are in the graph."""
    parts: tuple[nn.Module, ...] = ()
    """The model's modules and hook points, each once, which take a bridge some time to list."""
    checkpointed: bool = False
    """Whether its blocks are run again in the backward pass."""
    rules: LinearRules | None = None
    """The rules that differentiate it, in place of some of the model's own derivatives."""
    kept: dict[str, Tensor] = field(default_factory=dict)
    """The values of further hooks between both ends, in the graph."""
    graphs: dict[tuple[tuple[int, ...], bool], tuple[Tensor, Tensor]] = field(default_factory=dict)
    """The `readout_graph` that was asked for last. Those of all rows would take as much memory again as `logits`."""

    @property
    def root(self) -> Tensor:
        """The end of the graph: the logits, or where it ends before them, `output`."""
        return self.output if self.logits is None else self.logits

    @property
    def meets_backward_hooks(self) -> bool:
        """Whether the user's backward hooks are in the graph, or on the model now, where what is run again meets them.

        They could neither read nor keep the tensors of torch.vmap, by which several cotangents would go back at once.
        """
        return self.hooked or meet_gradients(self.parts)

    @cached_property
    def slope(self) -> Float[Tensor, "row vocab"]:
        """The derivative of each logit with respect to its own entry of `unembedded`: what scales and soft-caps do."""
        assert self.logits is not None
        assert self.unembedded is not None
        with torch.enable_grad():
            total = self.logits.sum()
        with unwritten():
            return torch.autograd.grad(total, self.unembedded, retain_graph=True)[0][:, 0]

    @cached_property
    def bend(self) -> Float[Tensor, "row vocab"] | None:
        """The derivative of `slope` likewise, which soft-caps have; None where nothing acts on what was unembedded."""
        assert self.logits is not None
        assert self.unembedded is not None
        if torch.equal(self.logits.detach(), self.unembedded[:, 0].detach()):
            return None
        with torch.enable_grad(), unwritten():
            (slope,) = torch.autograd.grad(self.logits.sum(), self.unembedded, create_graph=True)
        if not slope.requires_grad:  # a scale
            return None
        (bent,) = torch.autograd.grad(slope.sum(), self.unembedded, retain_graph=True, allow_unused=True)
        return None if bent is None else bent[:, 0]

    def probe(self, row: int) -> Float[Tensor, " vocab"]:
        """A cotangent of the logits of a row, by which the graph of that row alone is checked."""
        assert self.logits is not None
        return torch.linspace(-1, 1, self.logits.shape[-1], device=self.logits.device).to(self.logits).roll(7 * row)

    @cached_property
    def probed(self) -> Float[Tensor, "row d_of"]:
        """The vector-Jacobian products of all rows with their probes, through the graph of the whole pass."""
        assert self.logits is not None
        assert self.readout is not None
        cotangent = torch.empty_like(self.logits)
        for row, of_row in enumerate(cotangent):
            of_row.copy_(self.probe(row))
        with unwritten():
            return torch.autograd.grad(self.logits, self.readout, cotangent, retain_graph=True)[0]


def trace(
    model: Model,
    tokens: Int[Tensor, "batch token"],
    *,
    wrt: Sequence[str],
    of: str,
    places: Sequence[tuple[int, int]] | None = None,
    values: Mapping[str, Float[Tensor, "batch token d_model"]] | None = None,
    checkpoint: bool = False,
    keep: Sequence[str] = (),
    rules: LinearRules | None = None,
) -> Trace:
    """Run the model once, keeping the graph from the `wrt` hooks to the `of` hook.

    Hooks that the user has set act as in any other run. The model is left as found, also after an exception.

    Args:
        model: a checked model.
        tokens: prompts; shorter ones are filled up on the right, where nothing matters to a causal model.
        wrt: hooks where the perturbations enter. A value [batch pos head d_head] counts as [batch pos d], the heads
            one after another.
        of: hook where the value is read, likewise.
        places: where it is read: entry of the batch, position. None is the last position of each entry.
        values: what to put in place of the activation at some of the `wrt` hooks.
        checkpoint: keep only the residual stream between blocks, and run each block again in the backward pass.
        keep: further hooks whose values are wanted. Those that fire after `wrt` and before `of` become `Trace.kept`.
        rules: what differentiates the model in place of some of its own derivatives.

    Cost: one forward pass. At the readout only the places go on to the unembedding; elsewhere the pass stops.

    Raises:
        ValueError: for no prompts; for a hook that does not exist, never fires, whose value is not [batch pos d], or
            that comes too late; for a module that no gradient passes, and one whose operations the rules do not know.
        MemoryError: when the graph will not fit.
    """
    places = as_places(tokens, places)

    with one_at_a_time:
        sample = partial(_sample, model, tokens, places, wrt=wrt, of=of, keep=keep, rules=rules)
        require_memory(model, tokens, checkpoint, sample)
        with told(device_of(model), next(model.parameters()).dtype, tuple(tokens.shape), checkpoint):
            return _trace(model, tokens, wrt, of, places, checkpoint, values, keep, rules)


def _sample(
    model: Model,
    tokens: Int[Tensor, "batch token"],
    places: Sequence[tuple[int, int]],
    some: Int[Tensor, "_ _"],
    checkpoint: bool,
    **options: Any,
) -> None:
    """A pass over some of the first tokens of some prompts, with the same share of its places, and back again."""
    share = some.shape[1] / tokens.shape[1]
    chosen = {(entry, int(position * share)) for entry in range(len(some)) for at, position in places if at == 0}
    found = _trace(model, some, places=sorted(chosen), checkpoint=checkpoint, **options)
    leaves = tuple(found.perturbations.values())
    with undisturbed(found):
        torch.autograd.grad(found.output, leaves, torch.ones_like(found.output), allow_unused=True)


def _trace(
    model: Model,
    tokens: Int[Tensor, "batch token"],
    wrt: Sequence[str],
    of: str,
    places: Sequence[tuple[int, int]],
    checkpoint: bool,
    values: Mapping[str, Float[Tensor, "batch token d_model"]] | None = None,
    keep: Sequence[str] = (),
    rules: LinearRules | None = None,
    check_rules: bool = True,
) -> Trace:
    """`trace`, however much memory that takes; without a check it does not matter what the rules do not know."""
    met = _Met(tokens, of, places, values or {})
    logits = None
    known, parameters = hook_points(model), parameters_of(run_by(model))
    points = {name: hook_point(known, name) for name in (*wrt, of, *keep)}
    for name in wrt:
        require_own_place(points[name], name)
    for name in (*wrt, of):
        require_positions_first(known, name)
    with ExitStack() as stack:
        stack.enter_context(one_at_a_time)
        # Frozen weights are innermost, so that rules meet them as constants.
        state, weights = ModelState.of(model, parameters, known), within(rules, frozen(parameters))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(weights)
        stack.callback(_let_go, model)
        for name in wrt:
            stack.enter_context(attached(points[name], partial(met.perturb, name)))
        for name in keep:
            stack.enter_context(attached(points[name], partial(met.retain, name)))
        stack.enter_context(attached(points[of], met.read))
        stack.enter_context(attached(known["unembed.hook_out"], met.read_unembedded))
        stack.enter_context(gradients_pass(model, parameters, whole=EMBEDDING in wrt and is_readout(of)))
        options = stack.enter_context(checkpointed(model, weights)) if checkpoint else {}
        with suppress(StopForward):
            logits = model(tokens, return_type="logits", **options)[:, -1]

    inner: Any = getattr(model, "original_model", model)
    parts = parts_of(model, inner, *known.values())
    output, unembedded, kept = met.handed_over()
    if output is None:
        raise ValueError(f"the hook {of!r} never fired: this model does not run it, or an option switches it off.")
    silent = [name for name in wrt if name not in met.perturbations]
    if silent:
        raise ValueError(
            f"the hook {silent[0]!r} did not fire before {of!r}: wrt must come before of, and not be switched off."
        )
    if not output.requires_grad:
        raise independence(wrt, of, rules)
    found = Trace(
        tuple(places),
        met.inputs,
        met.perturbations,
        output,
        output if is_readout(of) else None,
        logits,
        unembedded,
        state,
        moved=met.moved,
        exchanges=here.exchanges,
        hooked=meet_gradients(parts),
        parts=tuple(parts),
        checkpointed=checkpoint,
        rules=rules,
        kept=kept,
    )
    if rules is not None and check_rules and uncovered(found.root, rules) is not None:
        with named_graph(model):
            named = _trace(model, tokens, wrt, of, places, checkpoint, values, keep, rules, check_rules=False)
        raise not_covered(rules, uncovered(named.root, rules))
    return found


@dataclass(eq=False)
class _Met:
    """The hook functions of one pass, and what they have met; a block that is run again meets them again."""

    tokens: Int[Tensor, "batch token"]
    of: str
    places: Sequence[tuple[int, int]]
    """Where the value at `of` is read: entry of the batch, position."""
    replacements: Mapping[str, Float[Tensor, "batch token d_model"]]
    """What is put in place of the activation, by the name of the hook."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    perturbations: dict[str, Tensor] = field(default_factory=dict)
    moved: bool = False
    has_read: bool = False
    output: Tensor | None = None
    unembedded: Tensor | None = None
    kept: dict[str, Tensor] = field(default_factory=dict)

    def perturb(self, name: str, value: Tensor, hook: Any) -> Tensor:
        """Put the replacement of a `wrt` hook there, and add the zero leaf."""
        stream = as_stream(name, value, self.tokens)
        if name in self.replacements:
            instead = self.replacements[name].to(value).reshape(value.shape)
            self.moved |= not torch.equal(instead, value)
            value = instead
        if name not in self.perturbations:  # a block that is run again for its backward pass has them already
            # A zero leaf, rather than requires_grad on the value, works whether parameters are frozen or not, and
            # where the hook hands out a view.
            self.perturbations[name] = torch.zeros_like(stream, requires_grad=True)
            self.inputs[name] = value.detach().reshape(stream.shape)
        return value + self.perturbations[name].reshape(value.shape)

    def retain(self, name: str, value: Tensor, hook: Any) -> Tensor:
        """Keep the value of a hook between both ends."""
        if self.perturbations and not self.has_read:  # a block that is run again comes after the reading
            self.kept.setdefault(name, value)
        return value  # where a bridge converts the value, it goes on with what is returned

    def read(self, value: Tensor, hook: Any) -> Tensor:
        """Read the places at the `of` hook, which alone go on to the unembedding."""
        entries, positions = (list(numbers) for numbers in zip(*self.places, strict=True))
        chosen = as_stream(self.of, value, self.tokens)[entries, positions]
        if not self.has_read:
            self.output = chosen
        self.has_read = True
        if not is_readout(self.of):
            raise StopForward
        return chosen[:, None]

    def read_unembedded(self, value: Tensor, hook: Any) -> None:
        """Read what the unembedding gives out."""
        self.unembedded = value

    def handed_over(self) -> tuple[Tensor | None, Tensor | None, dict[str, Tensor]]:
        """The output, what was unembedded, and what was kept, all of which this object lets go.

        A block that is to be run again keeps its hooks; what these keep must not lead back to its graph.
        """
        found = self.output, self.unembedded, self.kept
        self.output, self.unembedded, self.kept = None, None, {}
        return found


def goes_back_together(model: Model, trace: Trace) -> bool:
    """Whether several cotangents may go back through the graph of this pass as one batch."""
    return batches_cotangents(model) and not trace.meets_backward_hooks


def as_places(tokens: Tensor, places: Sequence[tuple[int, int]] | None) -> tuple[tuple[int, int], ...]:
    """The places given, or the last position of each entry.

    Raises:
        ValueError: for no prompts, and prompts without tokens.
    """
    if not tokens.numel():
        raise ValueError(
            f"there is nothing to run the model on: the ids have the shape {list(tokens.shape)}. Give one prompt at "
            "least, with one token at least."
        )
    return tuple(places or ((entry, tokens.shape[1] - 1) for entry in range(len(tokens))))


@contextmanager
def undisturbed(trace: Trace) -> Iterator[None]:
    """Inside, a backward pass has no other thread's pass beside it that would meet the hooks of blocks run again.

    Raises:
        MemoryError: when memory runs out inside.
        ValueError: when a tensor of the graph was written to in place since the forward pass.
    """
    shape = tuple(next(iter(trace.inputs.values())).shape)
    with (
        unwritten(),
        told(trace.output.device, trace.output.dtype, shape, trace.checkpointed),
        one_at_a_time if trace.checkpointed else nullcontext(),
    ):
        yield


def independence(wrt: Sequence[str], of: str, rules: LinearRules | None = None) -> ValueError:
    """The error to raise when `of` does not depend on `wrt`, under rules where there are some."""
    held = f", or the {rules} rules hold constant what leads from there, as they do queries and keys" if rules else ""
    instead = ": ask without rules" if rules else ""
    return ValueError(
        f"the value at {of!r} does not depend on {', '.join(map(repr, wrt))}: it is a side branch, or a hook of yours "
        f"replaces everything in between{held}{instead}."
    )


def _let_go(model: Model) -> None:
    """Free the graph behind the last attention pattern, which some bridges (GPT-2, Pythia) keep."""
    for block in model.blocks:
        attention = vars(getattr(block, "attn", block))
        kept = attention.get("_pattern")
        if isinstance(kept, Tensor):
            attention["_pattern"] = kept.detach()
