"""What each part of a network does to the difference between two prompts: the result of every kind of patching."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor

from tl_scopes.models import as_count
from tl_scopes.views import effects as card
from tl_scopes.views.markup import saved

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


class Effect(NamedTuple):
    """One row of `Effects.top`."""

    name: str
    """What the component is called, "L9H9" or "L9 at ' door'"."""
    value: float
    """The change of the metric."""
    part: float
    """The change as a part of the whole difference between the two prompts."""


@dataclass(frozen=True, eq=False, repr=False)
class Effects:
    """What becomes of the answer when parts of the corrupted run are replaced by those of the clean one.

    Attributes:
        values: [layer, head] for "head_out", else [layer, position]: the change of the metric that each replacement
            makes, or is said to make. On the CPU.
        site: what was replaced.
        method: "activation patching", "attribution patching", "second order" or "carried"; with the rules it was under.
        layers: the layers of the first axis.
        str_tokens: the text of the corrupted prompt's tokens.
        scale: the metric at the clean prompt less that at the corrupted one.
        first_order: the part of `values` that is of the first order; None where they are of one order only.
        standard_error: that of `values`, where their second order is estimated; else None.
    """

    values: Float[Tensor, "layer component"]
    site: str
    method: str
    layers: tuple[int, ...]
    str_tokens: tuple[str, ...]
    scale: float
    first_order: Float[Tensor, "layer component"] | None = None
    standard_error: Float[Tensor, "layer component"] | None = None

    def __repr__(self) -> str:
        best = int(self.values.abs().argmax())
        size = " x ".join(map(str, self.values.shape))
        share = self.values.flatten()[best].item() / self.scale
        return f"Effects({self.method} of {self.site}: {size}; the largest is {self.names[best]}, {share:.0%})"

    @property
    def normalized(self) -> Float[Tensor, "layer component"]:
        """The effects with 0 for the corrupted run and 1 for the clean one."""
        return self.values / self.scale

    @property
    def reliability(self) -> Float[Tensor, "layer component"]:
        """How far the first order can be relied on: |first order| / (|first order| + |second order|), from 0 to 1.

        It is 1 where the metric is linear along the way from one run to the other, and near 0 where its slope says
        little about what happens there. Where the second order is estimated, so is this.

        Raises:
            ValueError: for effects that are not attribution patching of the second order.
        """
        if self.first_order is None:
            raise ValueError(
                f"reliability compares the first order with the second, and {self.method} has no orders: ask "
                f"pair.attribution_patching({self.site!r}, order=2)."
            )
        first, second = self.first_order.abs(), (self.values - self.first_order).abs()
        return torch.where(first + second > 0, first / (first + second), torch.ones_like(first))

    @property
    def names(self) -> list[str]:
        """What each component is called, layer by layer: "L9H9", or "L9 at ' door'"."""
        if self.site == "head_out":
            return [f"L{layer}H{head}" for layer in self.layers for head in range(self.values.shape[1])]
        return [f"L{layer} at {text!r}" for layer in self.layers for text in self.str_tokens]

    def top(self, count: int | SupportsIndex = 5) -> tuple[Effect, ...]:
        """The components with the largest effects, by size; where two are equal, the earlier one first.

        Raises:
            TypeError: for a count that is not an integer.
            ValueError: for a count below 1.
        """
        values, parts, names = self.values.flatten(), self.normalized.flatten(), self.names
        order = values.abs().sort(descending=True, stable=True).indices[: as_count(count, "count must be at least 1")]
        return tuple(Effect(names[i], float(values[i]), float(parts[i])) for i in order.tolist())

    def plot(self) -> "Figure":
        """A heat map of `normalized`: layers from top to bottom, heads or positions from left to right."""
        return card.plot(self)

    def to_html(self, path: str | Path | None = None) -> str:
        """A static page of the heat map. It has no script and needs no network; `path` is where to write it."""
        return saved(card.page(self), path)

    def _repr_html_(self) -> str:
        return card.fragment(self)

    def to_dataframe(self) -> "pd.DataFrame":
        """One row for each component: its name, its effect, and the effect as a part of the whole; of the second order
        also the first order alone, and its reliability."""
        import pandas as pd

        columns = {"effect": self.values.flatten().tolist(), "normalized": self.normalized.flatten().tolist()}
        if self.first_order is not None:
            columns |= {
                "first_order": self.first_order.flatten().tolist(),
                "reliability": self.reliability.flatten().tolist(),
            }
        return pd.DataFrame({"name": self.names} | columns)
