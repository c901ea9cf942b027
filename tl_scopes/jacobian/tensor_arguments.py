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


def require_shape(value: Tensor, what: str, shape: tuple[int | None, ...], axes: str) -> None:
    """Refuse a tensor of another shape.

    Args:
        value: what was given.
        what: what it is, as errors call it: "cotangents".
        shape: the shape it must have, in which None is any number.
        axes: the names of its axes, as errors show them: "[probe d_of]".

    Raises: as `require_real` does; ValueError for another shape.
    """
    require_real(value, what, axes)
    if value.ndim != len(shape) or any(n not in (None, m) for n, m in zip(shape, value.shape, strict=True)):
        expected = [str(n) if n is not None else "any number" for n in shape]
        raise ValueError(f"{what} must have the shape {axes} = [{', '.join(expected)}], got {list(value.shape)}.")
