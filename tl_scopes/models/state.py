"""The hooks and weights that a forward pass ran with, by which a later pass tells whether it would compute the same.

This is a file of its own since everything that runs a model again asks it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tl_scopes.models.hooks import user_hooks
from tl_scopes.models.substitution import in_use
from tl_scopes.models.supported import Model, autocast_of, parameters_of, run_by


@dataclass(frozen=True, eq=False)
class ModelState:
    """What decides, beside the prompt, what a model computes.

    It is compared exactly and without running the model. A hook counts by the function that was given, a parameter by
    its identity, where its numbers are, and how often it was changed in place. What it cannot see is what a hook's
    function keeps to itself, and numbers that are written in place through `.data`.
    """

    hooks: Mapping[str, tuple[object, ...]]
    """The user's functions on each hook point."""
    weights: tuple[tuple[int, int, int], ...]
    """The `versions` of all parameters."""
    autocast: torch.dtype | None
    """The precision of torch.autocast, inside of it."""

    @classmethod
    def of(
        cls,
        model: Model,
        parameters: Sequence[nn.Parameter] | None = None,
        points: Mapping[str, Any] | None = None,
    ) -> "ModelState":
        """The state of a model now; its parameters and its hook points can be handed in, since both take a while."""
        weights = parameters_of(run_by(model)) if parameters is None else parameters
        return cls(user_hooks(model, points), versions(weights), autocast_of(model))

    def require_unchanged(self, model: Model) -> None:
        """Refuse a model whose hooks or weights are others now.

        Raises:
            ValueError: with what has changed, and where; for another precision.
        """
        now = ModelState.of(model)
        points = {*self.hooks, *now.hooks}
        changed = sorted(name for name in points if not _same(self.hooks.get(name, ()), now.hooks.get(name, ())))
        if changed:
            raise ValueError(
                f"the hooks at {', '.join(map(repr, changed[:3]))}{', ...' * (len(changed) > 3)} are not those under "
                "which the model was linearised, and this question has to run it again: linearise and ask inside the "
                "same model.hooks(...)."
            )
        if self.autocast != now.autocast:
            raise ValueError(
                f"the model was linearised {_inside(self.autocast)} and would run {_inside(now.autocast)} now, and "
                "this question has to run it again: linearise and ask inside the same torch.autocast."
            )
        if self.weights != now.weights:
            raise ValueError(
                "the weights have changed since the model was linearised, and this question has to run it again: "
                "linearise again."
            )


def versions(parameters: Iterable[Tensor]) -> tuple[tuple[int, int, int], ...]:
    """The identity of what this thread takes for each parameter, how often it was changed in place, and where its
    numbers are, which are elsewhere after `model.to(dtype)`.

    An offloaded parameter is another object after every pass, and has no numbers to change meanwhile. A quantised one
    is made of several tensors, which do not say where they are.
    """
    known = map(in_use, parameters)
    return tuple((0, 0, 0) if weight.is_meta else (id(weight), weight._version, _address(weight)) for weight in known)


def _address(weight: Tensor) -> int:
    return weight.data_ptr() if type(weight) in (Tensor, nn.Parameter) else 0


def _inside(autocast: torch.dtype | None) -> str:
    return "outside of torch.autocast" if autocast is None else f"in {autocast} (torch.autocast)"


def _same(before: tuple[object, ...], now: tuple[object, ...]) -> bool:
    if len(before) != len(now):
        return False
    return all(a is b or (isinstance(a, str) and a == b) for a, b in zip(before, now, strict=True))


@contextmanager
def unwritten() -> Iterator[None]:
    """Inside, torch's error about a tensor of the graph that was written to in place says what to do.

    Raises:
        ValueError: in the place of that error.
    """
    try:
        yield
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise ValueError(
            "a weight, or a tensor that a hook holds, was written to in place since the model was linearised, so that "
            "no derivative can be taken through that pass any more: linearise again."
        ) from error
