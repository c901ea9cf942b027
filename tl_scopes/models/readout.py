"""What stands between the readout and the logits: its graph, and what processing of the weights has done to it."""

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from tl_scopes.models.forward import Trace
from tl_scopes.models.substitution import as_then, in_use
from tl_scopes.models.supported import Model
from tl_scopes.models.threads import one_at_a_time
from tl_scopes.models.weights import fetched


def readout_graph(
    model: Model, trace: Trace, rows: Sequence[int], *, twice: bool = False
) -> tuple[Float[Tensor, "row d_of"], Float[Tensor, "row vocab"]]:
    """The readout of some rows as a leaf, and their logits as a function of it.

    A backward pass from one row of `trace.logits` would go through the unembedding of all rows. The graph is right to
    the first derivative, or if it is to be differentiated `twice` to the second, for which a soft-cap takes two
    more numbers for every logit of the forward pass.

    Cost: the unembedding of these rows, when there are others.

    Raises:
        ValueError: when a hook of the user's mixes the rows, so that one row has no graph of its own; when the
            unembedding is another one by now.
    """
    assert trace.readout is not None
    assert trace.logits is not None
    if list(rows) == list(range(len(trace.places))):
        return trace.readout, trace.logits
    if known := trace.graphs.get((tuple(rows), twice)):
        return known
    some = list(rows)
    with one_at_a_time, as_then(trace.exchanges), torch.enable_grad():
        leaf = trace.readout[some].detach().requires_grad_()
        unembedded = model.unembed(leaf[:, None])[:, 0]
        # What stands between the unembedding and the logits, a scale or a soft-cap, acts on each logit by itself.
        # A logit of minus infinity does not move.
        moved = torch.where(unembedded.isfinite(), unembedded - unembedded.detach(), 0)
        logits = trace.logits[some].detach() + trace.slope[some] * moved
        if twice and trace.bend is not None:
            logits = logits + trace.bend[some] / 2 * moved.square()
    probes, expected = torch.stack([trace.probe(row) for row in some]), trace.probed[some]
    (found,) = torch.autograd.grad(logits, leaf, probes, retain_graph=True)
    if not torch.allclose(found, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max())):
        with as_then(trace.exchanges):
            trace.state.require_unchanged(model)
        raise ValueError(
            "a hook of yours changes the unembedding or mixes its logits, so that one prediction cannot be told from "
            "the others of the same forward pass: ask for one prompt and one position at a time."
        )
    trace.graphs.clear()
    trace.graphs[tuple(rows), twice] = leaf, logits
    return leaf, logits


def unembedding(model: Model, trace: Trace, row: int) -> Float[Tensor, "vocab d_of"] | None:
    """W with ∂z_v/∂y = `trace.slope[row, v]` W_v, read from the weights without a copy.

    It is None where they do not say it: a hook changes what is unembedded, weights are packed or offloaded, or an
    adapter adds to them. That is found out by one product.
    """
    assert trace.logits is not None
    shape = trace.logits.shape[1], trace.output.shape[1]
    with as_then(trace.exchanges):
        weights = [in_use(weight).detach() for weight in model.unembed.parameters()]
    for weight in (one for own in weights if own.is_floating_point() and own.ndim == 2 for one in (own, own.T)):
        if weight.shape == shape and not weight.is_meta:
            product = (trace.probe(row) * trace.slope[row]).to(weight) @ weight
            expected = trace.probed[row]
            if torch.allclose(product.to(expected), expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max())):
                return weight
    return None


def rows_are_apart(model: Model, trace: Trace) -> bool:
    """Whether it is certain that no row of the logits depends on the readout of another: no hook is there to mix them.

    Where one is, `readout_graph` compares each row with the graph of the whole pass.
    """
    hooked = any(one._forward_hooks or one._forward_pre_hooks for one in model.unembed.modules())
    return not (trace.state.hooks or trace.hooked or hooked)


def has_constant_readout_norm(model: Model) -> bool:
    """Whether the final norm has no gain of its own, so that every readout has the same norm, ‖y‖ = const.

    That is the case after `fold_ln` (the default of `HookedTransformer.from_pretrained` and of
    `enable_compatibility_mode`), and in a freshly initialised model.
    """
    norm = getattr(model, "ln_final", None)
    if norm is None or getattr(model.cfg, "normalization_type", None) is None:
        return False
    gains = [p for p in fetched(norm) if p.any()]
    return all(bool((p == p.flatten()[0]).all()) for p in gains) and len(gains) <= 1


def is_centered(model: Model, trace: Trace, row: int) -> bool:
    """Whether the unembedding is centred: ∂(mean logit)/∂y = 0, so that every logit is "logit minus vocabulary mean".

    It is the same for all rows of a forward pass, and found out once; where the logits are what the unembedding gives
    out, and no hooks are set, once for the weights.

    Cost: ten backward passes through the unembedding, the first time.
    """
    if trace not in _centered:
        state = (trace.state.weights, trace.state.autocast) if _is_linear(trace) else None
        known = _centered_weights.get(model)
        if state is None or known is None or known[0] != state:
            known = state, _has_no_mean(model, trace, row)
        if state is not None:
            _centered_weights[model] = known
        _centered[trace] = known[1]
    return _centered[trace]


def _is_linear(trace: Trace) -> bool:
    """Whether nothing but the weights decides on the way from the readout to the logits."""
    assert trace.logits is not None
    assert trace.unembedded is not None
    alone = not trace.state.hooks and not trace.hooked and (0, 0, 0) not in trace.state.weights  # none is offloaded
    return alone and torch.equal(trace.logits.detach(), trace.unembedded[:, 0].detach())


def _has_no_mean(model: Model, trace: Trace, row: int) -> bool:
    readout, logits = readout_graph(model, trace, [row])
    vocab = logits.shape[-1]
    ids = torch.arange(0, vocab, max(1, vocab // 8), device=logits.device)
    some = logits.new_zeros(len(ids), vocab).scatter_(1, ids[:, None], 1)
    probes = torch.cat([some, torch.full_like(some[:1], 1 / vocab)])
    pulled = [torch.autograd.grad(logits, readout, probe[None], retain_graph=True)[0] for probe in probes]
    *rows, mean = (float(one.norm()) for one in pulled)
    # The mean of `vocab` unrelated rows is shorter than one of them by √vocab; of a centred matrix it is rounding.
    return mean < 0.05 * sum(rows) / len(rows) / vocab**0.5


_centered: WeakKeyDictionary[Trace, bool] = WeakKeyDictionary()
_centered_weights: WeakKeyDictionary[Model, tuple[object, bool]] = WeakKeyDictionary()
"""For each model its weights and precision, and what was found."""
