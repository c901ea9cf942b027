"""Maps of a network: how fast a prediction answers to each part of it, from one forward and one backward pass."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor

from tl_scopes import models
from tl_scopes.circuits.question import question_of, require_one_prediction
from tl_scopes.circuits.traced import linearize_with
from tl_scopes.jacobian.linearization import takes_a_model
from tl_scopes.models import Model, Part, Prompt, Provenance, Rules, Target
from tl_scopes.models.linear_rules import under
from tl_scopes.scopes.scope import Scope, circumstances, require_scope, targets_of
from tl_scopes.scopes.semantic import SemanticScope
from tl_scopes.views import component_map as card
from tl_scopes.views.markup import in_short, saved

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


class Place(NamedTuple):
    """One row of `ComponentMap.top`.

    Attributes:
        name: the component, "L9H9" for a head, "L9" for a layer.
        at: the text of the token at whose position it stands.
        score: its score, in the map's unit.
        position: where that is.
    """

    name: str
    at: str
    score: float
    position: int


@dataclass(frozen=True, eq=False, repr=False)
class ComponentMap:
    """How fast a prediction answers to each part of the network: ‖cᵀ ∂y/∂k‖ for every component k. It never changes.

    Attributes:
        scores: [layer, position] of a layer map, [layer, head, position] of a head map, in `unit`. On the CPU.
        at: what the components are: "resid_pre", "attn_out", "mlp_out", or "z", what heads give out.
        layers: the layers of the first axis.
        str_tokens: the text of the token at each position.
        position: the position after which the prediction was read.
        target: the token explained; None where the scope asks about the whole prediction.
        versus: the token that the target is compared with; else None.
        scope: the question, as it is written in Python.
        unit: the unit of a score, in words.
        of: the name of the hook where the effect was read.
        model: the name of the model.
        dtype: the precision of the model.
        rules: the rules that differentiated the model in place of some of its own derivatives, "linear" say; else None.
        notes: what a reader of the scores should know.
        is_squared: whether scores are sums of squares, as those of a FisherScope, so that those of several positions
            add up; else they are norms.
        quantity: the number that the scores are about, "logit of ' are'" say; None where it has no name.
        provenance: the versions, the model and its revision, the device and the day with which the map was made.
    """

    scores: Float[Tensor, "layer *head position"]
    at: str
    layers: tuple[int, ...]
    str_tokens: tuple[str, ...]
    position: int
    target: Target | None
    versus: Target | None
    scope: str
    unit: str
    of: str
    model: str
    dtype: str
    rules: str | None = None
    notes: tuple[str, ...] = field(default=())
    is_squared: bool = False
    quantity: str | None = None
    provenance: Provenance | None = None

    def __repr__(self) -> str:
        size = " x ".join(map(str, self.scores.shape))
        axes, prompt = ", ".join(self.axis_names), in_short(self.str_tokens, 60)
        return (
            f"ComponentMap({self.question} at {self.at}: {size} {axes}; {self.unit}; "
            f"{self.quantity or 'the prediction'} after {prompt!r})"
        )

    @property
    def question(self) -> str:
        """The scope, with the rules it was asked under."""
        return under(self.scope, self.rules)

    @property
    def axis_names(self) -> tuple[str, ...]:
        """The axes of `scores`."""
        return ("layer", "head", "position") if self.scores.ndim == 3 else ("layer", "position")

    @property
    def summed(self) -> Float[Tensor, "layer *head"]:
        """The score of each component as a whole, √Σ over the positions of the squares; by Fisher the sum."""
        exact = self.scores.double()  # whose squares float32 may not hold
        return (exact.sum(-1) if self.is_squared else exact.square().sum(-1).sqrt()).to(self.scores)

    def top(self, count: int | SupportsIndex = 5) -> tuple[Place, ...]:
        """The components and positions with the largest scores; where two are equal, the earlier one first.

        Raises:
            TypeError: for a count that is not an integer.
            ValueError: for a count below 1.
        """
        count = models.as_count(count, "count must be at least 1")
        order = self.scores.flatten().sort(descending=True, stable=True).indices[:count].tolist()
        return tuple(map(self._place, order))

    def to_dataframe(self) -> "pd.DataFrame":
        """One row for each component and position: layer, head, position, token, score."""
        import pandas as pd

        axes = torch.cartesian_prod(*(torch.arange(size) for size in self.scores.shape)).T.tolist()
        columns: dict[str, object] = dict(zip(self.axis_names, axes, strict=True))
        columns["layer"] = [self.layers[i] for i in axes[0]]
        columns["token"] = [self.str_tokens[i] for i in axes[-1]]
        return pd.DataFrame(columns | {"score": self.scores.flatten().tolist()})

    def plot(self) -> "Figure":
        """A heat map: layers from top to bottom, positions, or for a head map heads, from left to right."""
        return card.plot(self)

    def to_html(self, path: str | Path | None = None) -> str:
        """A static page of the heat map. It has no script and needs no network; `path` is where to write it."""
        return saved(card.page(self), path)

    def _repr_html_(self) -> str:
        return card.fragment(self)

    def _place(self, flat: int) -> Place:
        *place, position = (int(i) for i in torch.unravel_index(torch.tensor(flat), self.scores.shape))
        name = f"L{self.layers[place[0]]}" + "".join(f"H{head}" for head in place[1:])
        score = self.scores.flatten()[flat].item()
        return Place(name, self.str_tokens[position], score, position)


@takes_a_model
def layer_map(
    model: Model,
    prompt: Prompt,
    scope: Scope = SemanticScope(),
    position: int | SupportsIndex = -1,
    *,
    at: Literal["resid_pre", "attn_out", "mlp_out"] = "resid_pre",
    of: str = models.READOUT,
    prepend_bos: bool | None = None,
    rules: Rules = None,
) -> ComponentMap:
    """How fast the prediction answers to the stream, the attention or the MLP of every layer, at every position:

        score = ‖cᵀ ∂y/∂k‖₂

    which is the scope's own score with the tokens perturbed there and not at the embedding.

    Args:
        model: a `HookedTransformer` or a `TransformerBridge`, in evaluation mode.
        prompt: text, token ids in a list or a tensor, or what a tokenizer returned for one text.
        scope: the question, one whose scores are norms; by default `SemanticScope()`.
        position: where the prediction is read.
        at: what is perturbed.
        of: the hook where the value is read, as in `linearize`.
        prepend_bos: whether text gets a BOS token; None is TransformerLens' own default for the model.
        rules: what differentiates the model, as in `linearize`.

    Unit: that of the scope, with the norm at the component in the place of the embedding's.
    Cost: one forward pass and one backward pass for each cotangent, whatever the number of layers.

    Raises:
        TypeError: for a scope whose scores are not norms; for a linearisation in the model's place. Else as `linearize`
            does.
        ValueError: for another `at`; for a model without such components. Else as `linearize` does.

    Example:
        >>> found = tls.layer_map(model, "The keys to the old cabinet near the door", tls.SemanticScope(" are"))
        >>> found
        ComponentMap(SemanticScope(target=' are') at resid_pre: 6 x 10 layer, position; logit per unit of norm at \
blocks.N.hook_resid_pre; logit of ' are' after '<|bos|>The keys to the old cabinet near the door')
    """
    if at not in ("resid_pre", "attn_out", "mlp_out"):
        raise ValueError(f'at is "resid_pre", "attn_out" or "mlp_out", got {at!r}; for heads there is head_map.')
    return _map(model, prompt, scope, position, at, of, prepend_bos, rules)


@takes_a_model
def head_map(
    model: Model,
    prompt: Prompt,
    scope: Scope = SemanticScope(),
    position: int | SupportsIndex = -1,
    *,
    of: str = models.READOUT,
    prepend_bos: bool | None = None,
    rules: Rules = None,
) -> ComponentMap:
    """How fast the prediction answers to what every attention head gives out, at every position: `layer_map` for heads.

    Args: as for `layer_map`.

    Unit: that of the scope, with the norm of a head's output in the place of the embedding's.
    Cost: one forward pass and one backward pass for each cotangent, whatever the number of heads.

    Raises: as `layer_map` does.

    Example:
        >>> found = tls.head_map(model, "The keys to the old cabinet near the door", tls.SemanticScope(" are"))
        >>> found.axis_names, found.summed.shape
        (('layer', 'head', 'position'), torch.Size([6, 4]))
    """
    return _map(model, prompt, scope, position, "z", of, prepend_bos, rules)


def _map(
    model: Model,
    prompt: Prompt,
    scope: Scope,
    position: int | SupportsIndex,
    at: Part,
    of: str,
    prepend_bos: bool | None,
    rules: Rules,
) -> ComponentMap:
    require_scope(scope)
    traced = linearize_with(model, prompt, position, [at], of=of, prepend_bos=prepend_bos, rules=rules)
    lin = traced.lin
    require_one_prediction(scope, lin, "a map is about")
    question = question_of(scope, lin, "a map")
    found = []
    for cotangent in question.cotangents:
        gradients = traced.gradients(cotangent)
        heads = [site.as_heads(one) for site, one in zip(traced.sites, gradients.of_sites, strict=True)]
        found.append(torch.stack([models.precise(one).square().sum(-1).T for one in heads]) * gradients.scale**2)
    scores = question.scores(torch.stack(found))  # [layer head position]
    target, versus = targets_of(scope, lin)
    first = traced.sites[0].component
    every_layer = first.hook.replace(f".{first.layer}.", ".N.", 1)
    dtype = models.kept_dtype(lin.readout.dtype, scores)
    return ComponentMap(
        **circumstances(scope, lin) | {"unit": scope.unit(replace(lin, wrt=every_layer))},
        scores=(scores if at == "z" else scores[:, 0]).to("cpu", dtype),
        at=at,
        layers=tuple(site.component.layer for site in traced.sites),
        str_tokens=lin.str_tokens,
        target=target,
        versus=versus,
        quantity=scope.quantity_explained(lin),
        is_squared=question.squared,
    )
