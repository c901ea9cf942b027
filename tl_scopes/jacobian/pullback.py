"""cᵀJ for many cotangents c of one forward pass, in batched backward passes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from tl_scopes import models
from tl_scopes.models import Model, Trace

_WORKING_BYTES, _WORKING_BYTES_OF_CPU = 512 * 2**20, 16 * 2**20
"""Working memory that one batch of cotangents may take in a block: on a CPU what stays near its caches."""


@dataclass(frozen=True)
class Pull:
    """One cotangent on its way back."""

    row: int
    """Of the trace's output: where it starts."""
    slot: int
    """Cotangents of one slot go back together: there is at most one for each prompt of the batch."""
    cotangent: Float[Tensor, " d_of"]


def pulls(rows: Sequence[int], places: Sequence[tuple[int, int]], cotangents: Sequence[Tensor]) -> list[Pull]:
    """Cotangents [probe d_of] of several rows, dealt out to as few slots as possible, in the order given.

    Prompts of a batch do not influence one another, so that a slot takes one cotangent of each; the rows of one
    prompt have to queue.
    """
    filled: dict[int, int] = {}
    dealt = []
    for row, of_row in zip(rows, cotangents, strict=True):
        entry = places[row][0]
        for cotangent in of_row:
            slot = filled.get(entry, 0)
            filled[entry] = slot + 1
            dealt.append(Pull(row, slot, cotangent))
    return dealt


def pull(model: Model, trace: Trace, wrt: str, dealt: Sequence[Pull]) -> Iterator[list[tuple[int, Tensor]]]:
    """Batch by batch, the index of each cotangent and its cᵀJ [token d_model].

    Raises:
        ValueError: when the output does not depend on the input after all.
    """
    leaf, output = trace.perturbations[wrt], trace.output
    size = batch_size(model, leaf) if batches(model, trace) else 1
    by_slot = sorted(range(len(dealt)), key=lambda i: dealt[i].slot)
    while by_slot:
        first = dealt[by_slot[0]].slot
        batch = [i for i in by_slot if dealt[i].slot < first + size]
        by_slot = by_slot[len(batch) :]
        slots = [dealt[i].slot - first for i in batch]
        rows = [dealt[i].row for i in batch]
        cotangents = output.new_zeros(max(slots) + 1, *output.shape)
        cotangents[slots, rows] = torch.stack([dealt[i].cotangent for i in batch]).to(output)
        many = len(cotangents) > 1  # one goes without the batching rules, which cost something
        with models.undisturbed(trace):
            (pulled,) = torch.autograd.grad(
                output,
                leaf,
                cotangents if many else cotangents[0],
                is_grads_batched=many,
                retain_graph=True,
                allow_unused=True,
            )
        if pulled is None:  # the value hung on something else that is trainable, a tensor in a hook say
            raise models.independence([wrt], "the end of the Jacobian")
        pulled = pulled if many else pulled[None]
        yield [
            (i, pulled[slot, trace.places[row][0], : trace.places[row][1] + 1])
            for i, slot, row in zip(batch, slots, rows, strict=True)
        ]


def vjps(
    model: Model, trace: Trace, wrt: str, rows: Sequence[int], cotangents: Sequence[Float[Tensor, "_ d_of"]]
) -> list[Float[Tensor, "_ _ d_model"]]:
    """cᵀJ [probe token d_model] for the cotangents [probe d_of] of each row."""
    pulled = [
        trace.perturbations[wrt].new_empty(len(of_row), trace.places[row][1] + 1, trace.perturbations[wrt].shape[-1])
        for row, of_row in zip(rows, cotangents, strict=True)
    ]
    slots = [slot for of_row in pulled for slot in of_row]
    for batch in pull(model, trace, wrt, pulls(rows, trace.places, cotangents)):
        for i, gradient in batch:
            slots[i].copy_(gradient)
    return pulled


def squared_norms(
    model: Model, trace: Trace, wrt: str, rows: Sequence[int], cotangents: Sequence[Float[Tensor, "_ d_of"]]
) -> list[Float[Tensor, "_ _"]]:
    """‖cᵀJ_t‖² [probe token] for the cotangents [probe d_of] of each row, in float32 or float64.

    Memory for one batch of cotangents. A progress bar appears after a few seconds.
    """
    dtype = torch.promote_types(trace.output.dtype, torch.float32)
    norms = [
        trace.output.new_empty(len(of_row), trace.places[row][1] + 1, dtype=dtype)
        for row, of_row in zip(rows, cotangents, strict=True)
    ]
    slots = [slot for of_row in norms for slot in of_row]
    with tqdm(total=len(slots), desc="cotangents", delay=3, leave=False) as bar:
        for batch in pull(model, trace, wrt, pulls(rows, trace.places, cotangents)):
            for i, gradient in batch:
                slots[i].copy_(gradient.to(dtype).square().sum(-1))
            bar.update(len(batch))
    return norms


def jvps(
    model: Model, trace: Trace, wrt: str, row: int, tangents: Float[Tensor, "probe token d_model"]
) -> Float[Tensor, "probe d_of"]:
    """Σ_t J_t δ_t for the tangents δ of one row: the derivative of cᵀJ δ with respect to c, in batches.

    Raises:
        NoSecondDerivativeError: under an attention kernel that has no double backward.
    """
    leaf, output, (entry, position) = trace.perturbations[wrt], trace.output, trace.places[row]
    size = batch_size(model, leaf) if batches(model, trace) else 1
    cotangent = torch.zeros_like(output, requires_grad=True)
    pushed = output.new_empty(len(tangents), output.shape[1])
    with differentiated_twice(", or multiply by as_matrix()"), models.undisturbed(trace):
        (pulled,) = torch.autograd.grad(output, leaf, cotangent, create_graph=True)
        for some in torch.arange(len(tangents)).split(size):
            directions = leaf.new_zeros(len(some), *leaf.shape)
            directions[:, entry, : position + 1] = tangents[some].to(leaf)
            pushed[some] = products(pulled, cotangent, directions, batched=size > 1)[:, row]
    return pushed


def products(output: Tensor, leaf: Tensor, cotangents: Tensor, *, batched: bool) -> Tensor:
    """∂(cᵀ output)/∂leaf for every c, together or one after another."""
    if batched and len(cotangents):
        return torch.autograd.grad(output, leaf, cotangents, is_grads_batched=True, retain_graph=True)[0]
    found = leaf.new_zeros(len(cotangents), *leaf.shape)
    for of_one, cotangent in zip(found, cotangents, strict=True):
        of_one.copy_(torch.autograd.grad(output, leaf, cotangent, retain_graph=True)[0])
    return found


def batches(model: Model, trace: Trace) -> bool:
    """Whether several cotangents may go back through the graph of this forward pass at once."""
    return models.batches_cotangents(model) and not trace.hooked


def batch_size(model: Model, leaf: Float[Tensor, "batch token d_model"]) -> int:
    """How many cotangents, or how many forward passes over the same tokens without a graph, go in one batch."""
    # The widest thing alive per cotangent: the gradients inside one MLP, or one attention pattern.
    (batch, tokens, d_model), cfg = leaf.shape, model.cfg
    width = max(4 * (getattr(cfg, "d_mlp", None) or 0), 8 * d_model, 3 * cfg.n_heads * tokens)
    working_bytes = _WORKING_BYTES_OF_CPU if leaf.device.type == "cpu" else _WORKING_BYTES
    return max(1, int(working_bytes / (batch * tokens * width * leaf.element_size())))


class NoSecondDerivativeError(RuntimeError):
    """A fused attention kernel cannot be differentiated twice."""


@contextmanager
def differentiated_twice(otherwise: str = "") -> Iterator[None]:
    """Say what to do where a fused attention kernel has no second derivative.

    Raises:
        NoSecondDerivativeError: then, with `otherwise` for another way.
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
