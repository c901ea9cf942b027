"""Through which parts of the network a token's influence runs: `carried_by`."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, SupportsIndex, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from tl_scopes import models
from tl_scopes.circuits.cut import PARTS, By, Carried, Mode, backward, forward
from tl_scopes.circuits.paths import Paths
from tl_scopes.circuits.question import Question, question_of, require_norms
from tl_scopes.circuits.source_tokens import as_positions
from tl_scopes.circuits.traced import ComponentTrace, traced
from tl_scopes.jacobian import pullback
from tl_scopes.jacobian.linearization import Linearization, require_linearization
from tl_scopes.progress import progress_bar
from tl_scopes.scopes.corrections import Elsewhere
from tl_scopes.scopes.scope import Scope, circumstances, most_likely, require_scope, targets_of
from tl_scopes.scopes.semantic import SemanticScope
from tl_scopes.scopes.written import as_written

_ROUNDING = {torch.float64: 1e-5, torch.float32: 1e-3}
"""The largest part of a score that rounding can be: many models take norms and softmaxes in float32."""


def carried_by(
    lin: Linearization,
    scope: Scope = SemanticScope(),
    by: By = "head",
    tokens: str | SupportsIndex | Iterable[str | SupportsIndex] | None = None,
) -> Paths:
    """How much of each token's score runs through each part of the network, signed; the parts sum to the score.

    With g_t = cᵀJ_t the scope's gradient at token t and ĝ_t = g_t/‖g_t‖ its steepest direction, a component k of the
    network carries

        carried_t^k = ⟨G_k, T_k⟩,   G_k = ∂(cᵀy)/∂k,   T_k = (∂k/∂x_t) ĝ_t:

    how the prediction answers to k, times how k answers to the token. Over any cut of the network the parts, and what
    goes around the cut, sum to ⟨g_t, ĝ_t⟩ = ‖g_t‖, which is the score. A negative part works against the others.

    A scope with several cotangents is the norm over all of them, and its parts are those along the joint direction:
    Σ_c ‖g_t^c‖ carried_t^{k,c} / score_t. The parts of a Fisher score, which is a sum of squares, are
    Σ_c ‖g_t^c‖ carried_t^{k,c}; where it is estimated, so are they, with `paths.standard_error`.

    The score of a `RelevanceScope`, g_t · x_t, is the slope along x_t, which then takes the place of ĝ_t: its parts,
    ⟨G_k, (∂k/∂x_t) x_t⟩, sum to it, and like it are above zero where they speak for the target.

    Args:
        lin: a linearisation.
        scope: the question: `SemanticScope`, `RelevanceScope`, `DirectionScope`, `TemperatureScope`, `FisherScope`, a
            `JacobianScope` of your own with one score for each token, or one of these in a `FrozenAttentionScope` or
            an `UnderRulesScope`; by default `SemanticScope()`.
        by: what the cut of each layer is made of.
            "position": the residual stream at each position before every layer and after the last, [layer, position,
            token]. Nothing goes around it.
            "layer": the layer's attention and its MLP, which are two cuts, [layer, branch, token].
            "head": the attention heads, [layer, head, token].
            "qkv": the heads' queries, keys and values, which together carry what the head does: what a head moves from
            where it reads (values), and what comes of where it looks (queries and keys), [layer, head, part, token].
            "neuron": the neurons of the MLP, [layer, neuron, token].
        tokens: the source tokens, as positions or as texts that stand in the prompt once; None is all that get a score.

    Unit: that of the scope.
    Cost: one forward pass, a backward pass for each cotangent, and for each cotangent the cheaper of two ways: another
        backward pass for each source token (forward mode, which also tells positions), or half a one for each
        component (backward mode). Measured for one source token of a scope with one cotangent on SmolLM2-135M, four
        prompts of 6 to 25 tokens: 3.8 to 5.5 bare forward passes of the Hugging Face model by "head", "layer" and
        "position", 4.2 to 5.6 by "qkv", with the 1.0 to 1.4 that `linearize` takes of them (`docs/circuits.md`). A
        progress bar says how many backward passes there are; it appears on a terminal after three seconds. Until the
        end it takes the memory of three linearisations; of one made with `checkpoint=True` little more than that one,
        at three forward passes for each source token.

    Raises:
        TypeError: for something that is not a linearisation, or a scope; for a scope whose scores are neither norms of
            cᵀJ_t nor slopes along the tokens, and so are not split.
        ValueError: for another `by`; for tokens that are not in the prompt; for a model in which the components cannot
            be reached, with its name; when the model has changed since it was linearised.
        NoSecondDerivativeError: for "position" and "neuron" under an attention kernel without a second derivative.

    Departure: this is the first order. A head that looks something up so surely that its pattern no longer moves
        carries nothing through its queries and keys, however much depends on them
        (`tests/test_circuits_induction.py`).
    Source: ours. The product of a gradient and a tangent is the first-order effect of Taylor attribution, with the
        tangent of a token in the place of a difference between prompts (attribution patching, Nanda 2023).

    Example:
        >>> lin = tls.linearize(model, "The keys to the old cabinet near the door")
        >>> paths = tls.carried_by(lin, tls.SemanticScope(" are", versus=" is"), tokens=" keys")
        >>> paths.top(1)
        ((L2H2 at ' door', 15.7, 60%),)
        >>> bool((paths.values.sum(1) + paths.around - paths.scores).abs().max() < 1e-4)
        True
    """
    require_linearization(lin, "carried_by")
    require_scope(scope)
    if by not in get_args(By):
        raise ValueError(f"by is one of {', '.join(map(repr, get_args(By)))}, got {by!r}.")
    require_parts(scope)
    lin = scope.with_answer(lin)
    sources = as_positions(tokens, lin.str_tokens[: lin.scored])
    if isinstance(scope, Elsewhere):
        lin.require_unchanged()
        with scope.other(lin) as other:
            inner = carried_by(other, scope.scope, by, sources)
        return replace(inner, scope=as_written(scope))
    question = question_of(scope, lin, "carried_by", or_slopes=True)
    of = traced(lin, *PARTS[by])
    found = _found(of, by, question, sources)
    target, versus = targets_of(scope, lin)
    return Paths(
        **found,
        **circumstances(scope, lin),
        by=by,
        positions=tuple(sources),
        tokens=lin.tokens.cpu(),
        str_tokens=lin.str_tokens,
        predictions=most_likely(lin),
        target=target,
        versus=versus,
        wrt=lin.wrt,
        quantity=scope.quantity_explained(lin),
    )


def require_parts(scope: Scope) -> None:
    """Refuse a scope whose scores `carried_by` cannot split.

    Raises:
        TypeError: with the scopes that it can.
    """
    while isinstance(scope, Elsewhere):
        scope = scope.scope
    require_norms(scope, "carried_by", or_slopes=True)


def _found(of: ComponentTrace, by: By, question: Question, sources: Sequence[int]) -> dict[str, Any]:
    """The fields of the answer that hold numbers."""
    mode = forward if _is_forward_cheaper(of, by, len(sources)) else backward
    raw: dict[str, list[Tensor]] = {"parts": [], "stream": [], "slope": [], "size": []}
    layers: dict[str, tuple[int, ...]] = {"stream": ()}
    cotangents = question.cotangents
    products = [len(cotangents) * _products(of, by, one, len(sources)) for one in (mode, backward)]
    with progress_bar(products[0], f"paths by {by}", unit="backward pass") as bar:
        for cotangent in cotangents:
            try:
                carried = mode(of, by, cotangent, question.steps, sources, bar.update)
            except pullback.NoSecondDerivativeError:
                if by in ("position", "neuron"):
                    raise
                mode = backward
                bar.reset(products[1])
                carried = mode(of, by, cotangent, question.steps, sources, bar.update)
            scale, steps = carried.gradients.scale, carried.steps[list(sources)]
            pulled = models.precise(carried.gradients.pulled[list(sources)])
            slopes, sizes = (pulled * steps).sum(-1) * scale, pulled.norm(dim=-1) * steps.norm(dim=-1) * scale
            # The joint direction of several cotangents is that of their gradients one after another.
            weights = slopes if question.moves is None else torch.ones_like(slopes)
            layers["parts"], parts = _arranged(carried, by)
            if by == "qkv":
                _require_separate(of, layers["parts"], parts)
                parts = parts[:, :, 1:]
            raw["parts"].append(parts * weights * scale)
            raw["slope"].append(slopes * weights)
            raw["size"].append(sizes)
            if by == "head" and mode is forward:
                layers["stream"], depths = _arranged(carried, "position")
                raw["stream"].append(depths * weights * scale)
    every = {name: torch.stack(rows) for name, rows in raw.items() if rows}
    whole = {name: question.combined(of_probes) for name, of_probes in every.items()}
    errors = question.error(_values(every["parts"], by))
    score = whole.pop("slope")
    if not question.squared and question.moves is None:
        score = score.sqrt()
        whole = {name: parts / score.where(score > 0, torch.ones_like(score)) for name, parts in whole.items()}
    # The largest score; of signed ones what it would be if their terms did not cancel.
    largest = score.max() if question.moves is None else whole["size"].max()
    largest = largest.clamp(min=torch.finfo(largest.dtype).tiny)
    values = _values(whole["parts"], by)
    inner = tuple(range(1, values.ndim - 1)) if by != "layer" else ()
    around = score - (values.sum(inner) if inner else values)
    if by == "position":
        _require_complete(of, layers["parts"], around, largest)
    stream = whole.get("stream")
    if stream is not None and (score - stream.sum(1)).abs().max() > _rounding(of) * largest:
        stream = None  # something goes around it, and it does not tell where all of the influence is
    numbers: dict[str, Tensor | None] = {
        "values": values,
        "around": around,
        "scores": score,
        "where": whole["parts"] if mode is forward and by not in ("position", "neuron") else None,
        "standard_error": errors,
        "stream": stream,
    }
    dtype = models.kept_dtype(of.lin.readout.dtype, score, values)
    return {
        "layers": layers["parts"],
        "stream_layers": () if stream is None else layers["stream"],
        "mode": "forward" if mode is forward else "backward",
    } | {name: None if one is None else one.to("cpu", dtype) for name, one in numbers.items()}


def _is_forward_cheaper(of: ComponentTrace, by: By, sources: int) -> bool:
    if by == "neuron":
        return True
    dearer = 3 if of.trace.checkpointed else 1
    return 2 * sources * dearer <= _products(of, by, backward, sources)


def _products(of: ComponentTrace, by: By, mode: Mode, sources: int) -> int:
    """How many products with a Jacobian it takes for each cotangent: one for each source token, or each component."""
    if mode is forward:
        return sources
    return sum(
        len(of.lin.tokens) if by == "position" else site.as_heads(site.value).shape[-2]
        for site in (of.of("z") if by == "head" else of.sites)
    )


def _arranged(carried: Carried, by: By) -> tuple[tuple[int, ...], Float[Tensor, "layer ... source"]]:
    """The layers, and all parts in one tensor: [layer, component, (part,) position or 1, source]."""
    if by == "position":
        stream = [pair for pair in carried.parts if pair[0].site.component.part in PARTS["position"]]
        rows = [piece.site.component.layer + (piece.site.component.part == "resid_post") for piece, _ in stream]
        order = sorted(range(len(rows)), key=rows.__getitem__)
        return tuple(rows[i] for i in order), torch.stack([stream[i][1][0] for i in order])
    held = {(piece.site.component.layer, piece.site.component.part): one for piece, one in carried.parts}
    names = [name for name in PARTS[by] if name not in PARTS["position"] and any(part == name for _, part in held)]
    layers = sorted({layer for layer, part in held if part in names})
    nothing = torch.zeros_like(next(one for (_, part), one in held.items() if part in names))
    stacked = torch.stack(
        [torch.stack([held.get((layer, name), nothing) for name in names], dim=1) for layer in layers]
    )  # [layer head part position source]
    if by == "layer":
        return tuple(layers), stacked[:, 0]
    return tuple(layers), stacked if by == "qkv" else stacked[:, :, 0]


def _require_separate(
    of: ComponentTrace, layers: Sequence[int], parts: Float[Tensor, "layer head part position source"]
) -> None:
    """Refuse heads whose queries, keys and values do not determine what they give out.

    Raises:
        ValueError: with the layer.
    """
    whole, within = parts[:, :, 0].sum(-2), parts[:, :, 1:].sum((2, -2))
    missing = (whole - within).abs().amax((1, 2))
    if (missing > _rounding(of) * whole.abs().amax()).any():
        layer = layers[int(missing.argmax())]
        raise ValueError(
            f"the heads of layer {layer} of {models.architecture(of.lin.model)} give out something else than their own "
            'queries, keys and values determine, since a norm, a gate or another layer\'s keys mix in: ask by="head".'
        )


def _values(parts: Float[Tensor, "... position source"], by: By) -> Float[Tensor, "... source"]:
    """The parts of whole components, at all positions together."""
    return parts if by == "position" else parts.sum(-2)


def _require_complete(of: ComponentTrace, layers: tuple[int, ...], around: Tensor, largest: Tensor) -> None:
    """Refuse a model that carries something from block to block beside the stream.

    Raises:
        ValueError: with the layer, and how much is missing.
    """
    missing = around.abs().max(-1).values / largest
    if missing.max() > _rounding(of):
        worst = int(missing.argmax())
        raise ValueError(
            f"{missing.max():.1%} of a score goes around the residual stream before layer {layers[worst]} of "
            f"{models.architecture(of.lin.model)}: this model, or a hook of yours, hands something from block to block "
            'beside it. Ask by="head" or by="layer", which count what goes around.'
        )


def _rounding(of: ComponentTrace) -> float:
    return _ROUNDING.get(of.lin.readout.dtype, 0.1)
