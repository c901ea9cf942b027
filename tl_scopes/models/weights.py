"""All weights of a model together: exchanged for others for a while, shuffled, told apart."""

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from tl_scopes.models.hooks import one_at_a_time
from tl_scopes.models.supported import Model


def learned(model: Model) -> list[Tensor]:
    """The parameters, and the other tensors that were learned; tables and masks are left out.

    TransformerLens 4 keeps the bias that is folded into the unembedding in a buffer. Routers of experts (DeepSeek) keep
    in a buffer a bias that was learned without a gradient. In compatibility mode TransformerLens 3.9 computes gated
    MLPs with tensors that are plain attributes.
    """
    with one_at_a_time:
        biases = [b for name, b in model.named_buffers() if name.endswith("bias") and b.is_floating_point() and b.ndim]
        held = [item for part in _parts(model) for item in vars(part).items()]
        processed = [value for name, value in held if name.startswith("_processed_") and isinstance(value, Tensor)]
        return list({id(tensor): tensor for tensor in [*model.parameters(), *biases, *processed]}.values())


def _parts(model: Model) -> list[nn.Module]:
    """All modules: those of a bridge and those of the model that it wraps."""
    inner: Any = getattr(model, "original_model", model)
    return list({part: None for whole in (model, inner) for part in whole.modules()})


def shuffled_weights(model: Model, generator: torch.Generator) -> list[Tensor]:
    """Each weight with its numbers in random order: what was learned is gone, the sizes of the numbers stay.

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

    No copy is made, since a copy of a bridge would share hooks and modules with the bridge itself. The modules of the
    model hold other parameters for a while, and then their own again, which nobody has touched. A graph keeps the
    parameters that it was made with, so that a linearisation made outside can be asked inside, and the other way round,
    in this thread and in others. Only what runs the model again (`Linearization.at`) runs it with the weights of the
    moment; a graph made with checkpoint=True refuses to.
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
    """A tensor of the same class (parameter or buffer) with other numbers."""
    other = copy(tensor)
    other.data = data
    return other


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
