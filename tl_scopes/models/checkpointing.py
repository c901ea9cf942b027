"""Memory for time: keep the residual stream between blocks, run each block again in the backward pass."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from typing import Any, TypeAlias

from torch import nn
from torch.utils.checkpoint import checkpoint

from tl_scopes.models.supported import Model


class StopForward(BaseException):
    """Ends a forward pass at a hook."""


@contextmanager
def checkpointed(model: Model) -> Iterator[dict[str, Any]]:
    """Within, a forward pass keeps only what enters each block. Gives the options to run the model with.

    A block is run again under the hooks it had in the forward pass, whatever has changed since: the numbers are the
    same inside and outside of the user's `model.hooks(...)`. Weights that have changed are noticed.

    Source: Chen et al. 2016 (arXiv:1604.06174), one segment per block.
    """
    blocks = list(model.blocks)
    own = {block: vars(block)["forward"] for block in blocks if "forward" in vars(block)}
    try:
        for block in blocks:
            # Past __setattr__, which on a bridge hands the attribute on to the Hugging Face block.
            vars(block)["forward"] = _Recomputed(model, block, block.forward)
        config = getattr(getattr(model, "original_model", None), "config", None)
        # A key-value cache would be filled twice.
        yield {"use_cache": False} if getattr(config, "use_cache", False) else {}
    finally:
        for block in blocks:
            vars(block).pop("forward", None)
            vars(block).update({"forward": own[block]} if block in own else {})


class _Recomputed:
    """A block's forward method that keeps its inputs alone."""

    def __init__(self, model: Model, block: nn.Module, forward: Any) -> None:
        self.model, self.block, self.forward = model, block, forward
        self.hooks, self.versions = _hooks(block), _versions(block)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        again = _Again(self.model, self.block, self.hooks, self.versions)

        def once(*args: Any, **kwargs: Any) -> Any:
            # The pass that stopped within this block stops there again, which is no concern of the backward pass.
            with suppress(StopForward) if again.entered else nullcontext():
                return self.forward(*args, **kwargs)

        return checkpoint(once, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), again), **kwargs)


class _Again(AbstractContextManager[None]):
    """A block as it was in the forward pass: its hooks, and parameters without gradients."""

    def __init__(self, model: Model, block: nn.Module, hooks: "_Hooks", versions: list[tuple[int, int]]) -> None:
        self.model, self.block, self.hooks, self.versions = model, block, hooks, versions
        self.entered = 0

    def __enter__(self) -> None:
        if _versions(self.block) != self.versions:
            raise RuntimeError(
                "the weights have changed since the linearisation was made with checkpoint=True, which runs the blocks "
                "again: linearise again."
            )
        self.entered += 1
        self.stack = ExitStack()
        self.stack.enter_context(frozen(self.model))
        self.stack.callback(_set_hooks, _hooks(self.block))
        _set_hooks(self.hooks)

    def __exit__(self, *error: object) -> None:
        self.stack.close()
        self.entered -= 1


def _versions(block: nn.Module) -> list[tuple[int, int]]:
    """Which parameters there are, and how often each was changed in place."""
    return [(id(parameter), parameter._version) for parameter in block.parameters()]


_Hooks: TypeAlias = dict[nn.Module, tuple[dict[int, Any], dict[int, Any]]]


def _hooks(block: nn.Module) -> _Hooks:
    return {part: (part._forward_hooks.copy(), part._forward_pre_hooks.copy()) for part in block.modules()}


def _set_hooks(hooks: _Hooks) -> None:
    for part, (after, before) in hooks.items():
        for current, wanted in ((part._forward_hooks, after), (part._forward_pre_hooks, before)):
            current.clear()
            current.update(wanted)


@contextmanager
def frozen(model: Model) -> Iterator[None]:
    """Parameters without gradients: the graph then keeps no activations for their sake."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
