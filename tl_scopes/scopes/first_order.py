"""First-order scopes: the sizes of gradients, cᵀJ_t for cotangents c of the readout."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tl_scopes.jacobian.linearization import Linearization
from tl_scopes.jacobian.metric import Metric
from tl_scopes.jacobian.pullback import squared_norms
from tl_scopes.jacobian.span import Span
from tl_scopes.jacobian.tensor_arguments import require_real
from tl_scopes.scopes.measurement import Measurement
from tl_scopes.scopes.scope import Scope
from tl_scopes.scopes.written import as_written


class JacobianScope(Scope):
    """A first-order scope: the norms of cᵀJ_t for some cotangents c of the readout,

        score_t = √(Σ_c ‖cᵀ J_t‖²),

    for one cotangent the size of a gradient. It needs `cotangents` and `unit`; several prompts and positions go
    through the network together. Where the question is about a number f of the logits, `lin.cotangent(f)[None]` is its
    cotangent; give it the `metric` f as well, so that the checks measure f, and not its first order at the prompt.

    About an answer of several tokens it is asked for each prediction: the cotangents belong together, and what is
    explained is the sum of their metrics.

    Source: Liu et al. 2026 (arXiv:2601.16407), section 2.
    """

    @abstractmethod
    def cotangents(self, lin: Linearization) -> Float[Tensor, "probe d_of"]:
        """The directions of the readout that the question is about."""

    def metric(self, lin: Linearization) -> Metric | None:
        """The numbers c·y, with the cotangents c of this point at every other point too."""
        cotangents = self.joint_cotangents(lin)
        return lambda readout, logits: cotangents.to(readout) @ readout

    def joint_metric(self, lin: Linearization) -> Metric | None:
        if not isinstance(lin, Span) or self._knows_spans or type(self).metric is JacobianScope.metric:
            return self.metric(lin)
        each = [metric for one in lin.single if (metric := self.metric(one)) is not None]
        if len(each) < len(lin.single):
            return None

        def total(readout: Tensor, logits: Tensor) -> Tensor:
            rows = readout.reshape(len(each), -1)
            of_each = logits if logits.numel() else [logits] * len(each)
            return sum(metric(y, z) for metric, y, z in zip(each, rows, of_each, strict=True))  # type: ignore[return-value]

        return total

    def value(self, lin: Linearization) -> float | None:
        """None where no metric is given: c·y changes with the prompt as the cotangents c do, and is not a quantity."""
        return None if type(self).metric is JacobianScope.metric else super().value(lin)

    def combine(self, lin: Linearization, squared_norms: Float[Tensor, "probe token"]) -> Measurement:
        """The scores √(Σ_c ‖cᵀJ_t‖²), from the squared norms for each cotangent."""
        return Measurement(squared_norms.sum(0).sqrt())

    def measure(self, lin: Linearization) -> Measurement:
        return self.measure_many([lin])[0]

    def measure_many(self, lins: Sequence[Linearization]) -> list[Measurement]:
        if type(self).measure is not JacobianScope.measure:  # a scope of the user's with an equation of its own
            return [self.measure(lin) for lin in lins]
        cotangents = self._cotangents_of(lins)
        norms = squared_norms(lins, cotangents)
        return [self.combine(lin, of_one) for lin, of_one in zip(lins, norms, strict=True)]

    @property
    def takes_spans(self) -> bool:
        return True

    @property
    def grouping(self) -> Literal["norm", "sum", "signed"] | None:
        own = type(self).combine is not JacobianScope.combine or type(self).measure is not JacobianScope.measure
        return None if own else "norm"

    def _cotangents_of(self, lins: Sequence[Linearization]) -> list[Tensor]:
        """The cotangents of several linearisations of one forward pass, which a scope may find together."""
        return [self.joint_cotangents(lin) for lin in lins]

    _knows_spans = False
    """Whether `cotangents` takes a Span itself; else it is asked about each prediction of it."""

    def joint_cotangents(self, lin: Linearization) -> Float[Tensor, "probe d_of"]:
        """`cotangents`, checked, and for a span of several predictions those of all of them together.

        Raises:
            ValueError: for cotangents of another shape; for a span where there are several for one prediction.
            TypeError: for something that is not a tensor.
        """
        if isinstance(lin, Span) and not self._knows_spans:
            return self._joined(lin)
        found = self.cotangents(lin)
        if not isinstance(found, Tensor) or found.shape[1:] != lin.readout.shape:
            got = f"shape {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"the cotangents of {as_written(self)} must have the shape [probe d_of] = "
                f"[any number, {len(lin.readout)}], got {got}."
            )
        require_real(found, f"the cotangents of {as_written(self)}", "[probe d_of]")
        return found

    def _joined(self, span: Span) -> Float[Tensor, "1 d_of"]:
        """One cotangent of the span: that of each prediction in it, so that their gradients are summed.

        Raises:
            ValueError: for a question that has several cotangents at one prediction, whose norms would not add up.
        """
        each = [self.joint_cotangents(one) for one in span.single]
        if any(len(found) != 1 for found in each):
            raise ValueError(
                f"{as_written(self)} has {max(map(len, each))} cotangents at one prediction, and how those of several "
                "predictions belong together is not known: ask it of each, [scope(one) for one in lin.single]."
            )
        return torch.cat(each, dim=1)
