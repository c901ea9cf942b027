"""cᵀJ for many cotangents c of one forward pass, in batched backward passes; Jδ, and products in general.

All of them are linear in c or δ. So each vector goes through the network at a norm near 1, where half precision and
float32 neither underflow nor overflow, and what comes back is multiplied by the power of two that it was divided by.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_scopes import models
from tl_scopes.models import Model, Trace, Work


@dataclass(frozen=True)
class Pull:
    """One cotangent on its way back."""

    row: int
    """The row of the trace's output where it starts."""
    slot: int
    """Cotangents of one slot go back together: there is at most one for each prompt of the batch."""
    cotangent: Float[Tensor, " d_of"]
    """It has a norm near 1."""
    scale: float
    """The power of two that it was divided by."""


def pulls(rows: Sequence[int], places: Sequence[tuple[int, int]], cotangents: Sequence[Tensor]) -> list[Pull]:
    """Cotangents [probe d_of] of several rows, dealt out to as few slots as possible, in the order given.

    Prompts of a batch do not influence one another, so that a slot takes one cotangent of each; the rows of one
    prompt have to queue.
    """
    filled: dict[int, int] = {}
    dealt = []
    for row, of_row in zip(rows, cotangents, strict=True):
        entry = places[row][0]
        for cotangent, scale in zip(*near_one(of_row), strict=True):
            slot = filled.get(entry, 0)
            filled[entry] = slot + 1
            dealt.append(Pull(row, slot, cotangent, scale))
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
    size = _batch_size(model, trace, leaf)
    by_slot = sorted(range(len(dealt)), key=lambda i: dealt[i].slot)
    while by_slot:
        first = dealt[by_slot[0]].slot
        batch = [i for i in by_slot if dealt[i].slot < first + size]
        by_slot = by_slot[len(batch) :]
        slots = [dealt[i].slot - first for i in batch]
        rows = [dealt[i].row for i in batch]
        cotangents = output.new_zeros(max(slots) + 1, *output.shape)
        cotangents[slots, rows] = torch.stack([dealt[i].cotangent for i in batch]).to(output)
        with models.undisturbed(trace):
            (pulled,) = gradients(output, [leaf], cotangents, together=size > 1)
        if pulled is None:  # the value depends on something else that is trainable, such as a tensor in a hook
            raise models.independence([wrt], "the end of the Jacobian")
        yield [
            (i, pulled[slot, trace.places[row][0], : trace.places[row][1] + 1], dealt[i].scale)
            for i, slot, row in zip(batch, slots, rows, strict=True)
        ]


def jvps(
    model: Model, trace: Trace, wrt: str, row: int, tangents: Float[Tensor, "probe token d_model"]
) -> Float[Tensor, "probe d_of"]:
    """Σ_t J_t δ_t for the tangents δ of one row: the derivative of cᵀJ δ with respect to c, in batches.

    Raises:
        NoSecondDerivativeError: under an attention kernel that has no double backward.
    """
    leaf, output, (entry, position) = trace.perturbations[wrt], trace.output, trace.places[row]
    size = _batch_size(model, trace, leaf)
    cotangent = torch.zeros_like(output, requires_grad=True)
    units, scales = near_one(tangents)
    pushed = output.new_empty(len(tangents), output.shape[1], dtype=models.sum_dtype(output))
    with differentiated_twice(", or multiply by as_matrix()"), models.undisturbed(trace):
        (pulled,) = torch.autograd.grad(output, leaf, cotangent, create_graph=True)
        for some in torch.arange(len(tangents), device="cpu").split(size):
            directions = leaf.new_zeros(len(some), *leaf.shape)
            directions[:, entry, : position + 1] = units[some].to(leaf)
            pushed[some] = products(pulled, cotangent, directions, together=size > 1)[:, row].to(pushed)
    return pushed * pushed.new_tensor(scales)[:, None]


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


def _batch_size(model: Model, trace: Trace, leaf: Float[Tensor, "batch token d_model"]) -> int:
    """How many cotangents go back through this graph as one batch."""
    if not models.goes_back_together(model, trace):
        return 1
    batch, tokens, _ = leaf.shape
    return models.at_once(model, tokens, Work.PULLBACK, batch=batch, size=leaf.element_size())


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
        if "derivative for" not in str(error):
            raise
        raise NoSecondDerivativeError(
            f"this model's attention kernel cannot be differentiated twice ({error}): "
            f'load the model with attn_implementation="eager"{otherwise}.'
        ) from error
