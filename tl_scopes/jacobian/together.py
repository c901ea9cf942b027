"""What several linearisations of one forward pass find together, in fewer passes than one by one."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tl_scopes import models
from tl_scopes.jacobian import pullback
from tl_scopes.jacobian.linearization import Linearization


def vjps(
    lins: Sequence[Linearization], cotangents: Sequence[Float[Tensor, "_ d_of"]]
) -> list[Float[Tensor, "_ _ d_model"]]:
    """`Linearization.vjp` [probe token d_model] of several linearisations, each with cotangents of its own."""
    one = lins[0]
    return pullback.vjps(one.model, one.trace, one.wrt, [lin.ends for lin in lins], cotangents)


def squared_norms(
    lins: Sequence[Linearization], cotangents: Sequence[Float[Tensor, "_ d_of"]]
) -> list[Float[Tensor, "_ _"]]:
    """`Linearization.squared_norms` [probe token] of several linearisations, each with cotangents of its own."""
    one = lins[0]
    return pullback.squared_norms(one.model, one.trace, one.wrt, [lin.ends for lin in lins], cotangents)


def jvps(
    lins: Sequence[Linearization], tangents: Sequence[Float[Tensor, "_ _ d_model"]]
) -> list[Float[Tensor, "_ d_of"]]:
    """`Linearization.jvp` [probe d_of] of several linearisations, each with tangents [probe token d_model] of its own.

    They are of different prompts of a batch.

    Raises:
        NoSecondDerivativeError: under an attention kernel that has no double backward.
    """
    one = lins[0]
    return pullback.jvps(one.model, one.trace, one.wrt, [lin.ends for lin in lins], tangents)


def cotangents_of(
    lins: Sequence[Linearization], functions: Sequence[Callable[[Float[Tensor, "*row vocab"]], Tensor]]
) -> list[Float[Tensor, " d_of"]]:
    """`Linearization.cotangent` for a function of each of several linearisations of one forward pass.

    They go back through the unembedding together, which is read once and not once for each of them. Where two of them
    read the same row, or a hook may mix the rows, they go one by one.

    Raises: as `Linearization.cotangent` does.
    """
    one, rows = lins[0], [row for lin in lins for row in lin.ends.rows]
    if len(lins) == 1 or len(set(rows)) < len(rows) or not models.rows_are_apart(one.model, one.trace):
        return [lin.cotangent(function) for lin, function in zip(lins, functions, strict=True)]
    for lin in lins:
        lin.require_readout()
    readout, logits = models.readout_graph(one.model, one.trace, rows)
    gradient, scales = torch.empty_like(logits), []
    sizes = [len(lin.ends.rows) for lin in lins]
    for lin, function, written in zip(lins, functions, gradient.split(sizes), strict=True):
        units, of_one = pullback.near_one(lin.logits_gradient(function)[None])
        written.copy_(units.reshape(written.shape))
        scales += of_one
    (pulled,) = torch.autograd.grad(logits, readout, gradient, retain_graph=True)
    return [models.precise(of_lin).flatten() * scale for of_lin, scale in zip(pulled.split(sizes), scales, strict=True)]
