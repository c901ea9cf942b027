"""Save memory by keeping only the residual stream between blocks and running each block again in the backward pass."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from typing import Any, TypeAlias

from torch import nn
from torch.utils.checkpoint import checkpoint

from tl_scopes.models.hooks import StopForward
from tl_scopes.models.supported import Model


@contextmanager
def checkpointed(model: Model) -> Iterator[dict[str, Any]]:
    """Inside, a forward pass keeps only what enters each block. Yields the options to run the model with.

    A block is run again under the hooks that it had in the forward pass, so that the numbers are the same inside and
    outside of the user's `model.hooks(...)`. A block whose weights have changed refuses to run again.

    Source: Chen et al. 2016 (arXiv:1604.06174), one segment per block.
    """
    blocks = list(model.blocks)
    own = {block: vars(block)["forward"] for block in blocks if "forward" in vars(block)}
    try:
        for block in blocks:
            # Past __setattr__, which on a bridge hands the attribute on to the Hugging Face block.
            vars(block)["forward"] = _Recomputed(model, block, block.forward)
        config = getattr(getattr(model, "original_model", None), "config", None)
        text = getattr(config, "get_text_config", lambda: config)()  # a part of the configuration of models with images
        # A key-value cache would be filled twice.
        yield {"use_cache": False} if any(getattr(part, "use_cache", False) for part in (config, text)) else {}
    finally:
        for block in blocks:
            vars(block).pop("forward", None)
            vars(block).update({"forward": own[block]} if block in own else {})


class _Recomputed:
    """A block's forward method that keeps nothing but its inputs."""

    def __init__(self, model: Model, block: nn.Module, forward: Any) -> None:
        self.model, self.block, self.forward = model, block, forward
        self.hooks, self.versions = _hooks(block), _versions(block)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        again = _Again(self.model, self.block, self.hooks, self.versions)

        def once(*args: Any, **kwargs: Any) -> Any:
            # The pass that stopped within this block stops there again; the backward pass goes on from what it found.
            with suppress(StopForward) if again.entered else nullcontext():
                return self.forward(*args, **kwargs)

        return checkpoint(once, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), again), **kwargs)


class _Again(AbstractContextManager[None]):
    """Inside, a block has the hooks that it had in the forward pass, and its parameters take no gradients."""

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
        self.stack.enter_context(frozen(list(self.model.parameters())))
        self.stack.callback(_set_hooks, _hooks(self.block))
        _set_hooks(self.hooks)

    def __exit__(self, *error: object) -> None:
        self.stack.close()
        self.entered -= 1


def _versions(block: nn.Module) -> list[tuple[int, int]]:
    """The identity of each parameter, and how often it was changed in place."""
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
def frozen(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, parameters take no gradients, so that the graph keeps no activations for their sake."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
