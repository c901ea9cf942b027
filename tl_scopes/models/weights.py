"""All weights of a model together: exchanged for others for a while, shuffled, told apart."""

import math
import zlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from tl_scopes.models.substitution import Substitution, exchanged, in_use
from tl_scopes.models.supported import Model, all_parts, parts_of


def learned(model: Model) -> list[Tensor]:
    """The parameters, and the other tensors that were learned; tables and masks are left out.

    TransformerLens 4 keeps the bias that is folded into the unembedding in a buffer. Routers of experts (DeepSeek) keep
    in a buffer a bias that was learned without a gradient. In compatibility mode TransformerLens 3.9 computes gated
    MLPs with tensors that are plain attributes.

    Raises:
        ValueError: for weights that are offloaded.
    """
    biases = [b for name, b in model.named_buffers() if name.endswith("bias") and b.is_floating_point() and b.ndim]
    held = [item for part in all_parts(model) for item in vars(part).items()]
    processed = [value for name, value in held if name.startswith("_processed_") and isinstance(value, Tensor)]
    found = list({id(tensor): tensor for tensor in [*model.parameters(), *biases, *processed]}.values())
    if any(tensor.is_meta for tensor in found):
        raise ValueError(
            "some weights of the model are offloaded, and this question exchanges or reads all of them: load the model "
            "without offloading, in bfloat16 say."
        )
    return found


def fetched(module: nn.Module) -> list[Tensor]:
    """The parameters of a module; those that are offloaded come from where accelerate keeps them."""
    parts: list[Any] = list(module.modules())
    return [
        part._hf_hook.weights_map[name] if parameter.is_meta else parameter.detach()
        for part in parts
        for name, parameter in part.named_parameters(recurse=False)
    ]


def shuffled_weights(model: Model, generator: torch.Generator) -> list[Tensor]:
    """Each weight with its numbers in random order: what was learned is gone, the sizes of the numbers stay.

    Args:
        generator: source of the random numbers, on the CPU.
    """
    return [
        p.detach().flatten()[torch.randperm(p.numel(), generator=generator).to(p.device)].view_as(p)
        for p in learned(model)
    ]


def in_last_blocks(model: Model, share: float) -> list[bool]:
    """Which of the `learned(model)` belong to the last blocks, this share of all blocks, rounded up.

    What stands outside of the blocks, embedding, final norm and unembedding, belongs to none of them.
    """
    blocks = list(model.blocks)
    inside: set[int] = set()
    for part in parts_of(*blocks[len(blocks) - math.ceil(share * len(blocks)) :]):
        held = [*part.parameters(recurse=False), *part.buffers(recurse=False), *vars(part).values()]
        inside |= {id(value) for value in held if isinstance(value, Tensor)}
    return [id(tensor) in inside for tensor in learned(model)]


def exchanged_weights(model: Model, weights: Sequence[Tensor]) -> AbstractContextManager[None]:
    """Inside, this thread computes with these weights in place of the model's own.

    The model holds its own all the while, so that nothing has to be put back and other threads notice nothing. A graph
    keeps the weights that it was made with: a linearisation made outside can be asked inside, and the other way round,
    in this thread and in others. Only what runs the model again (`Linearization.at`) runs it with the weights of the
    moment; a graph made with checkpoint=True outside refuses to be asked inside.

    Args:
        model: a checked model.
        weights: a tensor for each of `learned(model)`.
    """
    pairs = zip(learned(model), weights, strict=True)
    return exchanged(Substitution((own, other.detach()) for own, other in pairs))


def fingerprint(model: Model) -> int:
    """A checksum of all weights to the last bit; two models with other weights have the same one by chance only.

    Cost: a pass over the weights, on the CPU.
    """
    checksum = 0
    for tensor in learned(model):
        numbers = tensor.detach().flatten().cpu()
        checksum = zlib.crc32(repr(tensor.shape).encode(), checksum)
        checksum = zlib.crc32(numbers.view(torch.uint8).numpy().data, checksum)
    return checksum


def sample(model: Model) -> str | None:
    """A checksum of the first and last numbers of each parameter, which tells apart what was trained apart.

    It takes next to no time, and does not see a change of a few numbers within: `fingerprint` does.

    Returns:
        Eight digits; None where weights are offloaded or cannot be read.
    """
    checksum = 0
    for parameter in model.parameters():
        if parameter.is_meta:
            return None
        weight = in_use(parameter).detach()
        try:
            # The ends of each axis are taken in turn: flattening a whole weight might copy it.
            row = weight if weight.ndim else weight[None]
            while row.ndim > 1:
                row = row[[0, -1]].flatten(0, 1) if row.ndim > 2 else row[[0, -1], :8].flatten()
            ends = torch.cat([row[:16], row[-16:]]).double().cpu()
        except (RuntimeError, IndexError, NotImplementedError, TypeError):  # numbers in blocks
            return None
        checksum = zlib.crc32(repr(tuple(weight.shape)).encode() + ends.numpy().tobytes(), checksum)
    return f"{checksum:08x}"
