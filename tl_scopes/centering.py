"""Whether the weights were processed so that a logit is no longer the model's own."""

from weakref import WeakKeyDictionary

import torch

from tl_scopes.jacobian.linearization import Linearization
from tl_scopes.models import Trace


def is_centered(lin: Linearization) -> bool:
    """Whether the unembedding is centred: ∂(mean logit)/∂y = 0, so that every logit is "logit minus vocabulary mean".

    Raises:
        ValueError: when the linearisation does not end at the readout.
    """
    if lin.trace in _centered:
        return _centered[lin.trace]
    vocab = len(lin.logits)
    ids = torch.arange(0, vocab, max(1, vocab // 8), device=lin.logits.device)
    some = lin.logits.new_zeros(len(ids), vocab).scatter_(1, ids[:, None], 1)
    *rows, mean = lin.logits_vjp(torch.cat([some, torch.full_like(some[:1], 1 / vocab)])).norm(dim=-1)
    # The mean of `vocab` unrelated rows is shorter than one of them by √vocab; that of a centred matrix is rounding.
    _centered[lin.trace] = bool(mean < 0.05 * sum(rows) / len(rows) / vocab**0.5)
    return _centered[lin.trace]


_centered: WeakKeyDictionary[Trace, bool] = WeakKeyDictionary()
"""The same for all predictions of a forward pass."""
