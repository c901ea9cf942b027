"""The weights as a whole: exchanged for others for a while, and told apart."""

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from tl_scopes.models.forward import one_at_a_time
from tl_scopes.models.kinds import Model


def shuffled_weights(model: Model, generator: torch.Generator) -> list[Tensor]:
    """For each parameter, the same numbers in random order: what was learned is gone, the sizes are as they were.

    Args:
        generator: source of the random numbers, on the CPU.
    """
    return [
        p.detach().flatten()[torch.randperm(p.numel(), generator=generator).to(p.device)].view_as(p)
        for p in model.parameters()
    ]


@contextmanager
def exchanged_weights(model: Model, weights: Sequence[Tensor]) -> Iterator[None]:
    """Inside, the model computes with these weights; other threads that would run it wait.

    A copy of a bridge would share hooks and modules with the bridge itself. So none is made, on either kind of model:
    each parameter points to other numbers for a while, and then to its own again, which nobody has written to.
    """
    parameters = list(model.parameters())
    with one_at_a_time:
        own = [parameter.data for parameter in parameters]
        try:
            for parameter, other in zip(parameters, weights, strict=True):
                parameter.data = other
            yield
        finally:
            for parameter, data in zip(parameters, own, strict=True):
                parameter.data = data


def fingerprint(model: Model) -> int:
    """A checksum of the beginning of every parameter: another one for other weights, as good as always."""
    start = [p.detach().flatten()[:64].double().cpu() for p in model.parameters()]
    return zlib.crc32(torch.cat(start).numpy().tobytes())
