"""In which precision to compute what must not be rounded as coarsely as the model's own numbers.

This is a file of its own since every folder needs it and it depends on nothing.
"""

import math

import torch
from torch import Tensor


def sum_dtype(tensor: Tensor) -> torch.dtype:
    """The precision in which sums over these numbers are taken: float32 at least, float64 for float64."""
    return torch.promote_types(tensor.dtype, torch.float32)


def precise_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on Apple's GPUs, which have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def kept_dtype(computed_in: torch.dtype, *numbers: Tensor | None) -> torch.dtype:
    """The precision in which an answer keeps its numbers: float32; float64 for a float64 model, and where float32
    cannot hold the largest of some of them with all digits.

    Args:
        computed_in: the precision of the model.
        numbers: each of the tensors that the answer is about; None where there is none.
    """
    held = torch.finfo(torch.float32)
    for some in numbers:
        largest = 0.0 if some is None or not some.numel() else float(some.detach().abs().max())
        if 0 < largest < held.tiny / held.eps or held.max < largest < math.inf:
            return torch.float64
    return torch.float64 if computed_in == torch.float64 else torch.float32


def precise(tensor: Tensor) -> Tensor:
    """The same numbers in the widest precision that their device has (`precise_dtype`)."""
    return tensor.to(precise_dtype(tensor.device))
