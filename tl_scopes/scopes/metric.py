"""Metric Scope: what moves this number?"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_scopes.jacobian.linearization import Linearization
from tl_scopes.jacobian.metric import Metric
from tl_scopes.models import precise
from tl_scopes.models.arguments import require_name
from tl_scopes.scopes.first_order import JacobianScope


@dataclass(frozen=True, eq=False)
class MetricScope(JacobianScope):
    """The steepest change of a metric m of the logits that a unit step in each token's embedding can make:

        score_t = ‖(∂m/∂y) J_t‖₂

    m is what activation patching in TransformerLens measures: a function of logits [batch, position, vocab] that gives
    one number. It sees the logits of one prompt at the position where the prediction is read, [1, 1, vocab], so that
    `logits[:, -1]` and `logits[0, -1]` are these.

    Args:
        function: m.
        name: what to call it; by default the function's own name.

    Unit: m, by its name, per unit of embedding norm.
    Cost: one backward pass.
    Raises: TypeError for something that is not a function. ValueError for a function that looks at another position;
        that gives no single finite number; that cannot be differentiated; for a linearisation that does not end at the
        readout.
    Source: the paper's construction (Liu et al. 2026, arXiv:2601.16407, section 2), with a cotangent of your own.

    Example:
        >>> def logit_difference(logits):
        ...     return logits[0, -1, 1] - logits[0, -1, 0]
        >>> lin = tls.linearize(model, "The keys to the old cabinet near the door")
        >>> tls.MetricScope(logit_difference)(lin).unit
        'logit_difference per unit of embedding norm'
    """

    function: Callable[[Float[Tensor, "1 1 vocab"]], Tensor] = field(repr=False)
    name: str | None = None

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(
                f"a metric is a function of the logits [batch, position, vocab], got {self.function!r}: write "
                "MetricScope(lambda logits: logits[0, -1, 7] - logits[0, -1, 3])."
            )
        require_name(self.name, "a metric")
        own = getattr(self.function, "__name__", "metric")
        object.__setattr__(self, "name", self.name or ("metric" if own == "<lambda>" else own))

    def cotangents(self, lin: Linearization) -> Float[Tensor, "1 d_of"]:
        return lin.cotangent(self._value)[None]

    def metric(self, lin: Linearization) -> Metric:
        return lambda readout, logits: self._value(logits)

    def quantity_explained(self, lin: Linearization) -> str | None:
        return self.name

    def unit(self, lin: Linearization) -> str:
        return f"{self.name} per {lin.unit}"

    def notes(self, lin: Linearization) -> tuple[str, ...]:
        each = [precise(one.logits) for one in lin.single]
        moves = (not torch.isclose(self._value(z), self._value(z + 1), rtol=1e-9) for z in each)
        if lin.is_centered and any(moves):
            return ("the unembedding is centred: the metric counts logits from the vocabulary mean",)
        return ()

    def _value(self, logits: Float[Tensor, " vocab"]) -> Any:
        try:
            value = self.function(logits[None, None])
        except IndexError as error:
            raise ValueError(
                f"the metric {self.name} looks for something that is not there ({error}): it sees the logits of one "
                "position, [1, 1, vocab], the one where the prediction is read. Read it from logits[:, -1]."
            ) from error
        return value.squeeze() if isinstance(value, Tensor) else value
