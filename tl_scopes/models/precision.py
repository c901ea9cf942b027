"""In which precision to compute what must not be rounded as coarsely as the model's own numbers.

This is a file of its own since every folder needs it and it depends on nothing.
"""

import torch
from torch import Tensor


def sum_dtype(tensor: Tensor) -> torch.dtype:
    """The precision in which sums over these numbers are taken: float32 at least, float64 for float64."""
    return torch.promote_types(tensor.dtype, torch.float32)


def precise_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on Apple's GPUs, which have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def precise(tensor: Tensor) -> Tensor:
    """The same numbers in the widest precision that their device has (`precise_dtype`)."""
    return tensor.to(precise_dtype(tensor.device))
