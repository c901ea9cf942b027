"""cᵀJ for many cotangents c of one forward pass, in batched backward passes; Jδ, and products in general.

All of them are linear in c or δ. So each vector goes through the network at a norm near 1, where half precision and
float32 neither underflow nor overflow, and what comes back is multiplied by the power of two that it was divided by.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_scopes import models
from tl_scopes.models import Model, Trace, Work
from tl_scopes.progress import progress_bar


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


def pulls(ends: Sequence[Ends], cotangents: Sequence[Tensor]) -> list[Pull]:
    """Cotangents [probe d_of] of several Jacobians, dealt out to as few slots as possible, in the order given.

    Prompts of a batch do not influence one another, so that a slot takes one cotangent of each; those that read from
    one prompt have to queue.
    """
    filled: dict[int, int] = {}
    dealt = []
    for one, of_one in zip(ends, cotangents, strict=True):
        for cotangent, scale in zip(*near_one(of_one), strict=True):
            slot = max(filled.get(entry, 0) for entry in one.entries)
            filled |= dict.fromkeys(one.entries, slot + 1)
            dealt.append(Pull(one, slot, cotangent, scale))
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


def pull(model: Model, trace: Trace, wrt: str, dealt: Sequence[Pull]) -> Iterator[list[tuple[int, Tensor, float]]]:
    """Yield, batch by batch, for each cotangent its index, cᵀJ [token d_model], and the scale to multiply that by.

    Raises:
        ValueError: when the output does not depend on the input.
    """
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
        cotangents = output.new_zeros(max(slots) + 1, *output.shape)
        given = torch.cat([dealt[i].cotangent.reshape(-1, output.shape[1]) for i in batch])
        cotangents[[slot for slot, _ in starts], [row for _, row in starts]] = given.to(output)
        with models.undisturbed(trace):
            (pulled,) = gradients(output, [leaf], cotangents, together=size > 1)
        if pulled is None:  # the value depends on something else that is trainable, such as a tensor in a hook
            raise models.independence([wrt], "the end of the Jacobian")
        yield [(i, dealt[i].ends.gathered(pulled[slot]), dealt[i].scale) for i, slot in zip(batch, slots, strict=True)]


def vjps(
    model: Model, trace: Trace, wrt: str, ends: Sequence[Ends], cotangents: Sequence[Float[Tensor, "_ d_of"]]
) -> list[Float[Tensor, "_ _ d_model"]]:
    """cᵀJ [probe token d_model] for the cotangents [probe d_of] of each Jacobian.

    In float32, or float64 for a float64 model.
    """
    output, d_model = trace.output, trace.perturbations[wrt].shape[-1]
    dtype = models.sum_dtype(output)
    pulled = [
        output.new_empty(len(c), one.count, d_model, dtype=dtype) for one, c in zip(ends, cotangents, strict=True)
    ]
    slots = [slot for of_one in pulled for slot in of_one]
    for batch in pull(model, trace, wrt, pulls(ends, cotangents)):
        for i, gradient, scale in batch:
            slots[i].copy_(gradient).mul_(scale)
    return pulled


def squared_norms(
    model: Model, trace: Trace, wrt: str, ends: Sequence[Ends], cotangents: Sequence[Float[Tensor, "_ d_of"]]
) -> list[Float[Tensor, "_ _"]]:
    """‖cᵀJ_t‖² [probe token] for the cotangents [probe d_of] of each Jacobian.

    In float64, with memory for one batch of cotangents. A progress bar appears on a terminal after a few seconds.
    """
    precise = models.precise(trace.output.detach())
    norms = [precise.new_empty(len(c), one.count) for one, c in zip(ends, cotangents, strict=True)]
    slots = [slot for of_one in norms for slot in of_one]
    with progress_bar(len(slots), "cotangents") as bar:
        for batch in pull(model, trace, wrt, pulls(ends, cotangents)):
            for i, gradient, scale in batch:
                slots[i].copy_(models.precise(gradient).square().sum(-1) * scale**2)
            bar.update(len(batch))
    return norms


def jvps(
    model: Model, trace: Trace, wrt: str, ends: Sequence[Ends], tangents: Sequence[Float[Tensor, "_ _ d_model"]]
) -> list[Float[Tensor, "_ d_of"]]:
    """Σ_t J_t δ_t for the tangents δ of each Jacobian: the derivative of cᵀJ δ with respect to c, in batches.

    They begin at different prompts of the batch, which do not influence one another, so that they go together.

    Raises:
        NoSecondDerivativeError: under an attention kernel that has no double backward.
    """
    leaf, output = trace.perturbations[wrt], trace.output
    size = batch_size(model, trace, leaf, Work.PULLBACK)
    cotangent = torch.zeros_like(output, requires_grad=True)
    scaled = [near_one(of_one) for of_one in tangents]
    dtype = models.sum_dtype(output)
    pushed = [
        output.new_empty(len(of_one), len(one.rows) * output.shape[1], dtype=dtype)
        for one, of_one in zip(ends, tangents, strict=True)
    ]
    with differentiated_twice(", or multiply by as_matrix()"), models.undisturbed(trace):
        (pulled,) = torch.autograd.grad(output, leaf, cotangent, create_graph=True)
        for some in torch.arange(max(map(len, tangents)), device="cpu").split(size):
            directions = leaf.new_zeros(len(some), *leaf.shape)
            for one, (units, _) in zip(ends, scaled, strict=True):
                mine = some[some < len(units)]
                one.spread(units[mine].to(leaf), directions[: len(mine)])
            found = products(pulled, cotangent, directions, together=size > 1)
            for one, of_one in zip(ends, pushed, strict=True):
                mine = some[some < len(of_one)]
                of_one[mine] = found[: len(mine), list(one.rows)].flatten(1).to(of_one)
    scales = (of_one.new_tensor(each)[:, None] for of_one, (_, each) in zip(pushed, scaled, strict=True))
    return [of_one * scale for of_one, scale in zip(pushed, scales, strict=True)]


def products(output: Tensor, leaf: Tensor, cotangents: Tensor, *, together: bool) -> Tensor:
    """∂(cᵀ output)/∂leaf for every cotangent c; zeros where the output does not depend on the leaf."""
    (found,) = gradients(output, [leaf], cotangents, together=together)
    return leaf.new_zeros(len(cotangents), *leaf.shape) if found is None else found


def gradients(output: Tensor, inputs: Sequence[Tensor], cotangents: Tensor, *, together: bool) -> list[Tensor | None]:
    """∂(cᵀ output)/∂x for every cotangent c, for each of the inputs x: in one batch, or one after another.

    It is None for an input that the output does not depend on. A single cotangent is faster without torch's batching
    rules, and under `torch.autograd.detect_anomaly` there are none.
    """
    if together and len(cotangents) > 1 and not torch.is_anomaly_enabled():
        batched = {"is_grads_batched": True, "retain_graph": True, "allow_unused": True}
        return list(torch.autograd.grad(output, inputs, cotangents, **batched))
    one_by_one = [torch.autograd.grad(output, inputs, c, retain_graph=True, allow_unused=True) for c in cotangents]
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
