"""What each part of a network does to the difference between two prompts: the result of every kind of patching."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd


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
