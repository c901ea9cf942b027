"""Tensors that are given from outside: what derivatives cannot be taken with is refused, by name.

This is a file of its own since linearisations, scopes and diagnostics take tensors, and it depends on nothing.
"""

import torch
from torch import Tensor


def require_real(value: object, what: str, axes: str) -> None:
    """Refuse what is not a dense tensor of real numbers.

    Args:
        value: what was given.
        what: what it is for, as errors call it: "a direction".
        axes: the shape it should have, as errors show it: "[d_of]".

    Raises:
        TypeError: for something that is not a tensor.
        ValueError: for a sparse or complex tensor, and for one without values (on the meta device).
    """
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{what} must be a tensor of the shape {axes}, got {type(value).__name__}: torch.as_tensor makes one."
        )
    if value.layout is not torch.strided:
        raise ValueError(f"{what} must be a dense tensor, got one of the layout {value.layout}: call .to_dense().")
    if value.device.type == "meta":
        raise ValueError(f"{what} must have values, got a tensor on the meta device, which has none.")
    if value.is_complex():
        raise ValueError(
            f"{what} must be real, got {value.dtype}, whose imaginary part would be lost: take .real or .imag."
        )


def require_finite(value: Tensor, what: str) -> None:
    """Refuse NaN and infinite entries.

    Raises:
        ValueError: where there are any.
    """
    if not value.isfinite().all():
        raise ValueError(f"{what} must be finite, got NaN or infinite entries.")
