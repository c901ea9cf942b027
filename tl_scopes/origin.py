"""Where an answer comes from: what it takes to ask again, without keeping a model or a graph alive."""

from copy import copy
from dataclasses import dataclass, fields, is_dataclass
from typing import Any
from weakref import ReferenceType, ref

from jaxtyping import Int
from torch import Tensor

from tl_scopes.jacobian.linearization import Linearization
from tl_scopes.models import Model


@dataclass(frozen=True, eq=False)
class Origin:
    """What an answer remembers for `Attribution.checks`."""

    model: "ReferenceType[Model]"
    scope: Any
    """The question, as an object: see `without_graphs`."""
    tokens: Int[Tensor, "token"]
    """The whole prompt, up to where the prediction was read; on the CPU."""
    readout_norm: float
    """Of the value at the `of` hook: to tell whether the model still computes the same."""
    checkpointed: bool
    """Whether blocks were run again in the backward pass."""

    @classmethod
    def of(cls, lin: Linearization, scope: Any) -> "Origin":
        """Of an answer to `scope` from `lin`."""
        return cls(ref(lin.model), scope, lin.tokens.cpu(), float(lin.readout.float().norm()), lin.trace.checkpointed)


def without_graphs(question: Any) -> Any:
    """A question with tensors of its own, also within: a direction taken from the weights would keep them alive."""
    if isinstance(question, Tensor):
        return question.detach().clone()
    if type(question) in (tuple, list):
        return type(question)(map(without_graphs, question))
    if type(question) is dict:
        return {key: without_graphs(value) for key, value in question.items()}
    if not is_dataclass(question) or isinstance(question, type):
        return question
    own = copy(question)
    for part in (part for part in fields(question) if hasattr(question, part.name)):
        object.__setattr__(own, part.name, without_graphs(getattr(question, part.name)))
    return own
