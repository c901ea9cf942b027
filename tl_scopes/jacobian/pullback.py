"""cᵀJ and Jδ for linearisations of one forward pass, in batched passes that all of them share; products in general.

All of them are linear in c or δ. So each vector goes through the network at a norm near 1, where half precision and
float32 neither underflow nor overflow, and what comes back is multiplied by the power of two that it was divided by.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_scopes import models
from tl_scopes.models import Model, Trace, Work
from tl_scopes.progress import progress_bar

if TYPE_CHECKING:
    from tl_scopes.jacobian.linearization import Linearization


_BLOCKED, _MANY = 8, 64
"""So many rows of a matrix product are summed in blocks; so many summands are many."""


@dataclass(frozen=True)
class Pull:
    """One cotangent on its way back."""

    ends: "Ends"
    """Where it starts, and where it arrives."""
    slot: int
    """Cotangents of one slot go back together: there is at most one for each prompt of the batch."""
    cotangent: Float[Tensor, " d_of"]
    """It has a norm near 1."""
    scale: float
    """The power of two that it was divided by."""


@dataclass(frozen=True, eq=False)
class Ends:
    """Which part of a trace a Jacobian is: from the embeddings of some tokens to the outputs in some rows."""

    rows: tuple[int, ...]
    """The rows of the trace's output, whose values one after another are the value."""
    entries: tuple[int, ...]
    """The prompts of the batch that these rows are read from."""
    tokens: tuple[Int[Tensor, " _"], ...]
    """For each of these prompts: which of the Jacobian's tokens stand there, one after another from the first place.
    Some may stand in several prompts."""
    count: int
    """How many tokens the Jacobian has."""

    def spread(self, values: Float[Tensor, "*some token d"], whole: Float[Tensor, "*some batch place d"]) -> Tensor:
        """Values of the Jacobian's tokens, written to where these stand in the whole batch, which is returned."""
        for entry, tokens in zip(self.entries, self.tokens, strict=True):
            whole[..., entry, : len(tokens), :] = values[..., tokens, :]
        return whole

    def gathered(self, whole: Float[Tensor, "batch place d"]) -> Float[Tensor, "token d"]:
        """Gradients for the whole batch, summed over the places where each of the Jacobian's tokens stands."""
        if len(self.entries) == 1:
            return whole[self.entries[0], : self.count]
        summed = whole.new_zeros(self.count, whole.shape[-1])
        for entry, tokens in zip(self.entries, self.tokens, strict=True):
            summed.index_add_(0, tokens, whole[entry, : len(tokens)])
        return summed


def _dealt(lins: "Sequence[Linearization]", cotangents: Sequence[Tensor]) -> list[Pull]:
    """Cotangents [probe d_of] of several linearisations, dealt out to as few slots as possible, in the order given.

    Prompts of a batch do not influence one another, so that a slot takes one cotangent of each; those that read from
    one prompt have to queue.
    """
    filled: dict[int, int] = {}
    dealt = []
    for lin, of_lin in zip(lins, cotangents, strict=True):
        for cotangent, scale in zip(*near_one(of_lin), strict=True):
            slot = max(filled.get(entry, 0) for entry in lin.ends.entries)
            filled |= dict.fromkeys(lin.ends.entries, slot + 1)
            dealt.append(Pull(lin.ends, slot, cotangent, scale))
    return dealt


def near_one(vectors: Float[Tensor, "probe ..."]) -> tuple[Float[Tensor, "probe ..."], list[float]]:
    """Each vector divided by the power of two that brings its norm to between 1 and 2, and these powers.

    A power of two rounds nothing. Vectors that are zero or not finite stay as they are.
    """
    exact = models.precise(vectors)
    norms: list[float] = exact.flatten(1).norm(dim=1).tolist()
    scales = list(map(power_of_two, norms))
    return exact / exact.new_tensor(scales).reshape(-1, *[1] * (vectors.ndim - 1)), scales


def power_of_two(number: float) -> float:
    """The largest power of two that is not above a positive number; 1 for zero and for what is not finite."""
    return 2.0 ** (math.frexp(number)[1] - 1) if 0 < number < math.inf else 1.0


def pull(
    lins: "Sequence[Linearization]", cotangents: Sequence[Float[Tensor, "_ d_of"]]
) -> Iterator[list[tuple[int, Tensor, float]]]:
    """Yield, batch by batch, for each cotangent its index, cᵀJ [token d_model], and the scale to multiply that by.

    Args:
        lins: linearisations of one forward pass.
        cotangents: some [probe d_of] for each of them, which are counted one after another.

    Raises:
        ValueError: when the output does not depend on the input.
    """
    model, trace, wrt, dealt = lins[0].model, lins[0].trace, lins[0].wrt, _dealt(lins, cotangents)
    leaf, output = trace.perturbations[wrt], trace.output
    # It is not asked for a single slot, since it looks up the free memory.
    size = batch_size(model, trace, leaf, Work.PULLBACK) if any(one.slot for one in dealt) else 1
    by_slot = sorted(range(len(dealt)), key=lambda i: dealt[i].slot)
    while by_slot:
        first = dealt[by_slot[0]].slot
        batch = [i for i in by_slot if dealt[i].slot < first + size]
        by_slot = by_slot[len(batch) :]
        slots = [dealt[i].slot - first for i in batch]
        starts = [(slot, row) for i, slot in zip(batch, slots, strict=True) for row in dealt[i].ends.rows]
        whole = output.new_zeros(max(slots) + 1, *output.shape)
        values = torch.cat([dealt[i].cotangent.reshape(-1, output.shape[1]) for i in batch])
        whole[[slot for slot, _ in starts], [row for _, row in starts]] = values.to(output)
        with models.undisturbed(trace):
            (pulled,) = gradients([output], [leaf], [whole], together=size > 1)
        if pulled is None:  # the value depends on something else that is trainable, such as a tensor in a hook
            raise models.independence([wrt], "the end of the Jacobian", lins[0].rules)
        yield [(i, dealt[i].ends.gathered(pulled[slot]), dealt[i].scale) for i, slot in zip(batch, slots, strict=True)]


def vjps(
    lins: "Sequence[Linearization]", cotangents: Sequence[Float[Tensor, "_ d_of"]]
) -> list[Float[Tensor, "_ _ d_model"]]:
    """`Linearization.vjp` of several, each with cotangents of its own: cᵀJ [probe token d_model]."""
    output, d_model = lins[0].trace.output, lins[0].embeddings.shape[-1]
    dtype = models.sum_dtype(output)
    pulled = [
        output.new_empty(len(c), lin.ends.count, d_model, dtype=dtype) for lin, c in zip(lins, cotangents, strict=True)
    ]
    slots = [slot for of_lin in pulled for slot in of_lin]
    with progress_bar(len(slots), "cotangents") as bar:
        for batch in pull(lins, cotangents):
            for i, gradient, scale in batch:
                slots[i].copy_(gradient).mul_(scale)
            bar.update(len(batch))
    return pulled


def squared_norms(
    lins: "Sequence[Linearization]", cotangents: Sequence[Float[Tensor, "_ d_of"]]
) -> list[Float[Tensor, "_ _"]]:
    """`Linearization.squared_norms` of several, each with cotangents of its own: ‖cᵀJ_t‖² [probe token]."""
    precise = models.precise(lins[0].trace.output.detach())
    norms = [precise.new_empty(len(c), lin.ends.count) for lin, c in zip(lins, cotangents, strict=True)]
    slots = [slot for of_lin in norms for slot in of_lin]
    with progress_bar(len(slots), "cotangents") as bar:
        for batch in pull(lins, cotangents):
            for i, gradient, scale in batch:
                slots[i].copy_(models.precise(gradient).square().sum(-1) * scale**2)
            bar.update(len(batch))
    return norms


def jvps(
    lins: "Sequence[Linearization]", tangents: Sequence[Float[Tensor, "_ _ d_model"]]
) -> list[Float[Tensor, "_ d_of"]]:
    """`Linearization.jvp` of several, each with tangents of its own: Σ_t J_t δ_t, the derivative of cᵀJ δ by c.

    They begin at different prompts of the batch, which do not influence one another, so that they go together.

    Raises:
        NoSecondDerivativeError: under an attention kernel that has no double backward.
    """
    model, trace = lins[0].model, lins[0].trace
    leaf, output = trace.perturbations[lins[0].wrt], trace.output
    size = batch_size(model, trace, leaf, Work.PULLBACK)
    cotangent = torch.zeros_like(output, requires_grad=True)
    scaled = [near_one(of_lin) for of_lin in tangents]
    dtype = models.sum_dtype(output)
    pushed = [
        output.new_empty(len(of_lin), len(lin.ends.rows) * output.shape[1], dtype=dtype)
        for lin, of_lin in zip(lins, tangents, strict=True)
    ]
    with differentiated_twice(", or multiply by as_matrix()"), models.undisturbed(trace):
        (pulled,) = torch.autograd.grad(output, leaf, cotangent, create_graph=True)
        for some in torch.arange(max(map(len, tangents)), device="cpu").split(size):
            directions = leaf.new_zeros(len(some), *leaf.shape)
            for lin, (units, _) in zip(lins, scaled, strict=True):
                mine = some[some < len(units)]
                lin.ends.spread(units[mine].to(leaf), directions[: len(mine)])
            found = products(pulled, cotangent, directions, together=size > 1)
            for lin, of_lin in zip(lins, pushed, strict=True):
                mine = some[some < len(of_lin)]
                of_lin[mine] = found[: len(mine), list(lin.ends.rows)].flatten(1).to(of_lin)
    scales = (of_lin.new_tensor(each)[:, None] for of_lin, (_, each) in zip(pushed, scaled, strict=True))
    return [of_lin * scale for of_lin, scale in zip(pushed, scales, strict=True)]


def cotangents_of(
    lins: "Sequence[Linearization]", functions: Sequence[Callable[[Float[Tensor, "*row vocab"]], Tensor]]
) -> list[Float[Tensor, " d_of"]]:
    """`Linearization.cotangent` for a function of each of several linearisations of one forward pass.

    They go back through the unembedding together, which is read once and not once for each of them. Where two of them
    read the same row, or a hook may mix the rows, they go one by one.

    Raises: as `Linearization.cotangent` does.
    """
    one, rows = lins[0], [row for lin in lins for row in lin.ends.rows]
    if len(lins) == 1 or len(set(rows)) < len(rows) or not models.rows_are_apart(one.model, one.trace):
        return [lin.cotangent(function) for lin, function in zip(lins, functions, strict=True)]
    for lin in lins:
        lin.require_readout()
    readout, logits = models.readout_graph(one.model, one.trace, rows)
    gradient, scales = torch.empty_like(logits), []
    sizes = [len(lin.ends.rows) for lin in lins]
    for lin, function, written in zip(lins, functions, gradient.split(sizes), strict=True):
        units, of_one = near_one(lin.logits_gradient(function)[None])
        written.copy_(units.reshape(written.shape))
        scales += of_one
    together = one.unembeds_together
    (pulled,) = summed_over_vocabulary(logits, readout, gradient[None], together=together)
    return [models.precise(of_lin).flatten() * scale for of_lin, scale in zip(pulled.split(sizes), scales, strict=True)]


def summed_over_vocabulary(
    logits: Float[Tensor, "row vocab"],
    readout: Float[Tensor, "row d_of"],
    cotangents: Float[Tensor, "probe row vocab"],
    *,
    together: bool,
) -> Float[Tensor, "probe row d_of"]:
    """`products` through the unembedding, to the last digits of float32 also for a single cotangent of many tokens.

    On a CPU the product of one row and the unembedding is summed one token after another (off by 1e-4 for 49,152
    tokens), that of several in blocks (4e-7). So rows of zeros are added, which takes some milliseconds.
    """
    missing = _BLOCKED - cotangents[..., 0].numel()
    summed = logits.device.type == "cpu" and logits.dtype == torch.float32
    if together and summed and missing > 0 and int(cotangents.count_nonzero()) > _MANY:
        zeros = cotangents.new_zeros(missing, *cotangents.shape[1:])
        return products(logits, readout, torch.cat([cotangents, zeros]), together=True)[: len(cotangents)]
    return products(logits, readout, cotangents, together=together)


def products(output: Tensor, leaf: Tensor, cotangents: Tensor, *, together: bool) -> Tensor:
    """∂(cᵀ output)/∂leaf for every cotangent c; zeros where the output does not depend on the leaf."""
    (found,) = gradients([output], [leaf], [cotangents], together=together)
    return leaf.new_zeros(len(cotangents), *leaf.shape) if found is None else found


@models.unwritten()
def gradients(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Float[Tensor, "probe ..."]],
    *,
    together: bool,
) -> list[Float[Tensor, "probe ..."] | None]:
    """Σ_k ∂(c_kᵀ y_k)/∂x over the outputs y_k, for every cotangent c and each of the inputs x: in one batch, or one
    after another.

    It is None for an input that no output depends on. A single cotangent is faster without torch's batching rules, and
    under `torch.autograd.detect_anomaly` there are none.

    Raises:
        ValueError: when a tensor of the graph was written to in place since the forward pass.
    """
    if not inputs:
        return []
    options = {"retain_graph": True, "allow_unused": True}
    if together and len(cotangents[0]) > 1 and not torch.is_anomaly_enabled():
        return list(torch.autograd.grad(outputs, inputs, cotangents, is_grads_batched=True, **options))
    each = zip(*cotangents, strict=True)
    one_by_one = [torch.autograd.grad(outputs, inputs, one, **options) for one in each]
    of_inputs = zip(*one_by_one, strict=True) if one_by_one else [(None,)] * len(inputs)
    return [None if of_one[0] is None else torch.stack(of_one) for of_one in of_inputs]


def batch_size(model: Model, trace: Trace, leaf: Float[Tensor, "batch token d_model"], work: Work) -> int:
    """How many cotangents go back through this graph as one batch, for this work."""
    if not models.goes_back_together(model, trace):
        return 1
    batch, tokens, _ = leaf.shape
    return models.at_once(model, tokens, work, texts=batch, size=leaf.element_size())


class NoSecondDerivativeError(RuntimeError):
    """A fused attention kernel cannot be differentiated twice."""


@contextmanager
def differentiated_twice(otherwise: str = "") -> Iterator[None]:
    """Inside, torch's error for a fused attention kernel without a second derivative says what to do.

    Args:
        otherwise: another way, for the end of the message.

    Raises:
        NoSecondDerivativeError: when the kernel has no second derivative.
    """
    try:
        yield
    except RuntimeError as error:
        if not any(part in str(error) for part in ("derivative for", "once_differentiable")):
            raise
        raise NoSecondDerivativeError(
            f"this model's attention kernel cannot be differentiated twice ({error}): "
            f'load the model with attn_implementation="eager"{otherwise}.'
        ) from error
