"""What a scope finds at one prompt, how well it is known, and what of it an answer keeps."""

import math
from collections.abc import Mapping, Sized
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tl_scopes import models
from tl_scopes.jacobian.linearization import Linearization
from tl_scopes.jacobian.tensor_arguments import require_real
from tl_scopes.results.attribution import Attribution


@dataclass(frozen=True, eq=False)
class Measurement:
    """What a scope finds at one prompt."""

    scores: Float[Tensor, "token"]
    """One number per token."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What else is worth keeping: tensors with the tokens on their last axis; numbers, texts, and lists of these. They
    become `Attribution.details`."""


class Estimate(NamedTuple):
    """How well estimated scores are known."""

    relative_error: float
    """The error of the largest score, as a part of that score; infinite where it is not known."""
    finding: str
    """A sentence that says so."""


def estimate_by(answer: Attribution, error: Float[Tensor, "token"], kind: str) -> Estimate | None:
    """How well the largest score is known, from an error of this kind for each token; None where all of them are 0, or
    no token counts."""
    if not error.any() or not any(answer.is_counted):
        return None
    (first,) = answer.top(1)
    relative = float(error[answer.positions.index(first.position)]) / (abs(first.score) or 1.0)
    if not math.isfinite(relative):
        return Estimate(relative, "how far off the scores are is not known: give the scope more probes")
    return Estimate(relative, f"the score of {first.token!r} is known to {relative:.1%} ({kind})")


def how_often(missed: Sized, answers: Sized) -> str:
    """The end of a warning about the worst of several answers, which says how many others missed too."""
    if len(answers) == 1:
        return ""
    return f" This is the worst of {len(missed)} such predictions, of {len(answers)} in all."


def require_measurement(found: object, asked: str, lin: Linearization) -> None:
    """Refuse what `measure` of a user's own scope may give by mistake.

    Args:
        found: what it gave.
        asked: the scope, as errors call it.
        lin: what it was asked of.

    Raises:
        TypeError: for something that is not a Measurement; for a detail that could not be saved.
        ValueError: for scores that are not one real number per token.
    """
    if not isinstance(found, Measurement):
        raise TypeError(
            f"measure of {asked} must give a Measurement, got {type(found).__name__}: write Measurement(scores)."
        )
    scores = found.scores
    if not isinstance(scores, Tensor) or scores.shape != lin.tokens.shape:
        got = f"shape {list(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"{asked} must give one score per token, a tensor of shape [{len(lin.tokens)}], got {got}.")
    require_real(scores, f"the scores of {asked}", "[token]")
    for name, value in found.details.items():
        if isinstance(value, Tensor):
            require_real(value, f"the detail {name!r} of {asked}", "[... token]")
        elif not _can_be_kept(value):
            raise TypeError(
                f"the detail {name!r} of {asked} is a {type(value).__name__}, which an answer cannot keep: make it a "
                "tensor with the tokens on its last axis, a number, a text, or a list of these."
            )


def kept(found: Measurement, lin: Linearization) -> Measurement:
    """What an answer keeps of a measurement: the tokens that get scores, without the graph, on the CPU."""
    scores = found.scores[: lin.scored]
    details = {
        name: value[..., : lin.scored] if isinstance(value, Tensor) else value for name, value in found.details.items()
    }
    dtype = models.kept_dtype(lin.readout.dtype, scores)
    return Measurement(_kept(scores, dtype), {name: _kept(value, dtype) for name, value in details.items()})


def _kept(value: Any, dtype: torch.dtype) -> Any:
    """A value as an answer keeps it: a tensor without its graph, on the CPU, floats in the precision of the scores; a
    list as a tuple, which does not change, and which JSON gives back."""
    if isinstance(value, list | tuple):
        return tuple(_kept(one, dtype) for one in value)
    if not isinstance(value, Tensor):
        return value
    return value.detach().to("cpu", dtype if value.is_floating_point() else value.dtype)


def _can_be_kept(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_can_be_kept, value))
    return value is None or isinstance(value, str | bool | int | float)
