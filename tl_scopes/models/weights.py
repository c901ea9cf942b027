"""The weights as a whole: exchanged for others for a while, and told apart."""

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from tl_scopes.models.forward import one_at_a_time
from tl_scopes.models.supported import Model


def learned(model: Model) -> list[Tensor]:
    """The parameters, and what was learned but is none: no tables, no masks.

    TransformerLens 4 keeps the bias that is folded into the unembedding in a buffer, routers of experts (DeepSeek) one
    that was learned without a gradient; in compatibility mode TransformerLens 3.9 computes gated MLPs with tensors that
    are plain attributes.
    """
    with one_at_a_time:
        biases = [b for name, b in model.named_buffers() if name.endswith("bias") and b.is_floating_point() and b.ndim]
        held = [item for part in _parts(model) for item in vars(part).items()]
        processed = [value for name, value in held if name.startswith("_processed_") and isinstance(value, Tensor)]
        return list({id(tensor): tensor for tensor in [*model.parameters(), *biases, *processed]}.values())


def _parts(model: Model) -> list[nn.Module]:
    """All modules, those of a bridge and those of the model it goes around."""
    inner: Any = getattr(model, "original_model", model)
    return list({part: None for whole in (model, inner) for part in whole.modules()})


def shuffled_weights(model: Model, generator: torch.Generator) -> list[Tensor]:
    """For each of the weights, the same numbers in random order: what was learned is gone, the sizes are as they were.

    Args:
        generator: source of the random numbers, on the CPU.
    """
    return [
        p.detach().flatten()[torch.randperm(p.numel(), generator=generator).to(p.device)].view_as(p)
        for p in learned(model)
    ]


@contextmanager
def exchanged_weights(model: Model, weights: Sequence[Tensor]) -> Iterator[None]:
    """Inside, the model computes with these weights; other threads that would run it wait.

    A copy of a bridge would share hooks and modules with the bridge itself. So none is made, on either kind of model:
    its modules hold other parameters for a while, and then their own again, which nobody has touched. A graph keeps the
    parameters that it was made with, so what was linearised outside can be asked inside, and the other way round, in
    this thread and in others; only what runs the model again (`Linearization.at`) runs it with the weights of the
    moment, and a graph made with checkpoint=True says so instead.
    """
    # A bridge's modules hold some of its parameters a second time, as plain attributes.
    holders: list[dict[str, Any]] = [
        held for part in _parts(model) for held in (part._parameters, part._buffers, vars(part))
    ]
    with one_at_a_time:
        others = {id(own): (own, _with_data(own, other)) for own, other in zip(learned(model), weights, strict=True)}
        places = [(held, name, *others[id(v)]) for held in holders for name, v in held.items() if id(v) in others]
        try:
            for held, name, _, other in places:
                held[name] = other
            yield
        finally:
            for held, name, own, _ in places:
                held[name] = own


def _with_data(tensor: Tensor, data: Tensor) -> Tensor:
    """Of the same kind, with other numbers."""
    other = copy(tensor)
    other.data = data
    return other


def fingerprint(model: Model) -> int:
    """A checksum of all weights, to the last bit: another one for other weights, as good as always.

    Cost: a pass over the weights, on the CPU.
    """
    checksum = 0
    for tensor in learned(model):
        numbers = tensor.detach().flatten().cpu()
        checksum = zlib.crc32(repr(tensor.shape).encode(), checksum)
        checksum = zlib.crc32(numbers.view(torch.uint8).numpy().data, checksum)
    return checksum
