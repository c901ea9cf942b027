"""A linearised prediction traced once more, with the values of a network's components in its graph."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor

from tl_scopes import models
from tl_scopes.jacobian import pullback
from tl_scopes.jacobian.linearization import Linearization, linearize_prompt
from tl_scopes.models import Component, Model, Part, Prompt, Rules, Trace


@dataclass(frozen=True, eq=False)
class Site:
    """A component's value k in the graph of a forward pass."""

    component: Component
    value: Tensor
    """What the hook held, for a batch of one prompt."""

    def as_heads(self, tensor: Tensor) -> Float[Tensor, "... token head d_head"]:
        """A tensor of the value's shape, behind any axes, as vectors of positions and heads."""
        return self.component.as_heads(tensor, self.value.ndim).squeeze(-4)

    def as_hooked(self, heads: Float[Tensor, "... token head d_head"]) -> Tensor:
        """Vectors of positions and heads in the shape of the value."""
        return self.component.as_hooked(heads, self.value)


@dataclass(frozen=True, eq=False)
class Gradients:
    """The gradients of cᵀy, divided by the power of two that brings the norm of c to between 1 and 2.

    Half precision neither underflows nor overflows there; what is made of them is multiplied by `scale`.
    """

    pulled: Float[Tensor, "token d_model"]
    """g = cᵀJ."""
    of_sites: list[Tensor]
    """G_k = ∂(cᵀy)/∂k for every component k, in the shape of its value."""
    scale: float
    """The power of two."""


@dataclass(frozen=True, eq=False)
class ComponentTrace:
    """The forward pass of a linearisation, made again, with the components that lie between both ends of its J."""

    lin: Linearization
    trace: Trace
    sites: tuple[Site, ...]

    @property
    def leaf(self) -> Float[Tensor, "1 token d_model"]:
        """The perturbation of the tokens."""
        return self.trace.perturbations[self.lin.wrt]

    @property
    def size(self) -> int:
        """How many products with the Jacobian of all components go in one batch."""
        return pullback.batch_size(self.lin.model, self.trace, self.leaf, models.Work.CURVATURE)

    def of(self, *parts: Part) -> list[Site]:
        """The components of these kinds, in the order of the layers."""
        return [site for site in self.sites if site.component.part in parts]

    def gradients(self, cotangent: Float[Tensor, " d_of"]) -> Gradients:
        """The gradients of cᵀy at the tokens and at every component.

        Cost: one backward pass.

        Raises:
            ValueError: for a component that does not lead to y, which runs beside it or is seen on a side branch only.
        """
        values = [site.value for site in self.sites]
        live = [value for value in values if value.requires_grad]
        seed, scale = self._seed(cotangent)
        with models.undisturbed(self.trace):
            found = torch.autograd.grad(
                self.trace.output, [self.leaf, *live], seed, retain_graph=True, allow_unused=True
            )
        if found[0] is None:
            raise models.independence([self.lin.wrt], self.lin.of, self.lin.rules)
        of_live = dict(zip(map(id, live), found[1:], strict=True))
        # Queries and keys lead nowhere under held patterns. Whether they tell what a head does is seen by their parts.
        outer = [s for s in self.sites if s.value.requires_grad and s.component.part not in ("q", "k", "v")]
        lost = [s.component for s in outer if of_live[id(s.value)] is None]
        if lost:
            same = [component for component in lost if component.part == lost[0].part]
            if self.lin.of != models.READOUT:  # it may end in an MLP, say, beside which the attention runs
                raise models.independence([component.hook for component in same], self.lin.of)
            raise models.absent(self.lin.model, lost[0].part, [component.layer for component in same])
        known = (of_live.get(id(value)) for value in values)
        gradients = (torch.zeros_like(v) if g is None else g for v, g in zip(values, known, strict=True))
        return Gradients(found[0][0], list(gradients), scale)

    def _seed(self, cotangent: Float[Tensor, " d_of"]) -> tuple[Tensor, float]:
        """The cotangent at a norm near 1 in the shape of the output, and the power of two that it was divided by."""
        unit, (scale,) = pullback.near_one(cotangent[None])
        return unit.to(self.trace.output).reshape(self.trace.output.shape), scale


def traced(lin: Linearization, *parts: Part) -> ComponentTrace:
    """Trace a linearisation again with the components of these kinds kept.

    Cost: one forward pass.

    Raises:
        ValueError: when the model has changed since it was linearised, or computes something else each time; for two
            answers that are compared; for a model without these components, in the layers that J spans.
    """
    lin.require_unchanged()
    if len(lin.ends.entries) > 1:
        raise ValueError(
            "two answers that are compared go through the model as two texts, which have no components in common: ask "
            "about each of them."
        )
    wanted = _wanted(lin.model, parts)
    trace = models.trace(
        lin.model,
        lin.tokens[None],
        wrt=[lin.wrt],
        of=lin.of,
        places=[(0, lin.trace.places[row][1]) for row in lin.ends.rows],
        values={lin.wrt: lin.embeddings[None]} if lin.trace.moved else None,
        checkpoint=lin.trace.checkpointed,
        rules=lin.trace.rules,
        keep=list(wanted),
    )
    first, again = lin.trace.output[list(lin.ends.rows)].detach(), trace.output.detach()
    if not (again - first).norm() <= torch.finfo(first.dtype).eps ** 0.5 * first.norm():
        raise ValueError(
            f"the model gave another value at {lin.of!r} when it was run again: a hook is random, or changes from run "
            "to run, or weights were written to through `.data`. Parts would sum to the scores of another run: let "
            "hooks do the same each time, and linearise again where weights have changed."
        )
    return _traced(lin, trace, wanted, parts)


def linearize_with(
    model: Model,
    prompt: Prompt,
    position: int | SupportsIndex,
    parts: Sequence[Part],
    *,
    wrt: str = models.EMBEDDING,
    of: str = models.READOUT,
    prepend_bos: bool | None = None,
    rules: Rules = None,
) -> ComponentTrace:
    """`linearize` with the components of these kinds kept, from the same forward pass.

    Cost: one forward pass.

    Raises: as `linearize` does; and a ValueError for a model without these components, in the layers that J spans.
    """
    models.check_model(model)
    read = models.read_prompt(model, prompt, prepend_bos).up_to(position)
    wanted = _wanted(model, parts)
    ruled = models.LinearRules.read(rules)
    lin = linearize_prompt(model, read, wrt, of, rules=ruled, keep=list(wanted))
    return _traced(lin, lin.trace, wanted, parts)


def _traced(lin: Linearization, trace: Trace, wanted: dict[str, Component], parts: Sequence[Part]) -> ComponentTrace:
    _require_neurons(lin, wanted, trace)
    found = sorted(
        (Site(wanted[hook], value) for hook, value in trace.kept.items()),
        key=lambda site: (site.component.layer, parts.index(site.component.part)),
    )
    if not any(site.component.part == parts[0] or len(parts) == 2 for site in found):
        raise ValueError(
            f"no component of the kind asked for ({parts[0]}) lies between {lin.wrt!r} and {lin.of!r}, "
            "where this linearisation begins and ends: linearise from an earlier hook, or to a later one."
        )
    return ComponentTrace(lin, trace, tuple(found))


def _wanted(model: Model, parts: Sequence[Part]) -> dict[str, Component]:
    """The components of these kinds, by their hooks; of the stream behind blocks only the last.

    Raises:
        ValueError: for a model that has none of them, or no attention heads where these are asked for.
    """
    found: dict[str, Component] = {}
    for part in parts:
        try:
            of_part = models.components(model, part)
        except ValueError:
            if part != "mlp_out" or not found:  # a network may be attention alone
                raise
            continue
        found |= {component.hook: component for component in (of_part[-1:] if part == "resid_post" else of_part)}
    return found


def _require_neurons(lin: Linearization, wanted: dict[str, Component], trace: Trace) -> None:
    """Refuse an MLP whose hook does not hold one number for each neuron, as in mixtures of experts.

    Raises:
        ValueError: with the layers.
    """
    of_neurons = [wanted[hook] for hook in trace.kept if wanted[hook].part == "post"]
    wrong = [c.layer for c in of_neurons if trace.kept[c.hook].shape != (1, len(lin.tokens), c.heads)]
    if wrong:
        raise models.absent(lin.model, "post", wrong)


def linearised(of: ComponentTrace, cotangent: Float[Tensor, " d_of"]) -> tuple[Gradients, "Tangents"]:
    """`ComponentTrace.gradients`, and from the same backward pass functions from a step of the tokens to components:

        S(u) = cᵀy + Σ_k u_kᵀ k,   ∂S/∂k = G_k,   ∂S/∂x = g,   ∂²S/∂x∂u_k = ∂k/∂x   at u = 0.

    Cost: one backward pass that can be differentiated.

    Raises: as `ComponentTrace.gradients` does.
        NoSecondDerivativeError: under an attention kernel that has no double backward.
    """
    values = [site.value for site in of.sites]
    live = [value for value in values if value.requires_grad]
    seed, scale = of._seed(cotangent)
    with pullback.differentiated_twice(), models.undisturbed(of.trace):
        dummies = [torch.zeros_like(value, requires_grad=True) for value in live]
        pulled, *found = torch.autograd.grad(
            [of.trace.output, *live],
            [of.leaf, *live],
            [seed, *dummies],
            create_graph=True,
            materialize_grads=True,
        )
    of_live = {id(value): gradient.detach() for value, gradient in zip(live, found, strict=True)}
    if not all(of_live[id(s.value)].any() for s in of.sites if s.value.requires_grad and s.component.part not in "qkv"):
        of.gradients(cotangent)  # says so where a component does not lead to y at all
    gradients = [of_live.get(id(value), torch.zeros_like(value)) for value in values]
    return Gradients(pulled.detach()[0], gradients, scale), Tangents(of, pulled, dummies)


@dataclass(frozen=True, eq=False)
class Tangents:
    """∂k/∂x for every component k, as something to multiply with."""

    of: ComponentTrace
    pulled: Tensor
    dummies: Sequence[Tensor]

    def push(self, steps: Float[Tensor, "step token d_model"]) -> list[Tensor]:
        """T_k = (∂k/∂x) δ for every step δ and component k, [step ...] with the shape of its value.

        Cost: a backward pass for each step, in a batch.
        """
        with pullback.differentiated_twice(), models.undisturbed(self.of.trace):
            together = models.goes_back_together(self.of.lin.model, self.of.trace)
            given = [steps[:, None].to(self.pulled)]
            found = pullback.gradients([self.pulled], self.dummies, given, together=together)
        arrived = iter(found)
        tangents = []
        for site in self.of.sites:
            one = next(arrived) if site.value.requires_grad else None
            tangents.append(site.value.new_zeros(len(steps), *site.value.shape) if one is None else one)
        return tangents
