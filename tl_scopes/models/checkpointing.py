"""Save memory by keeping only the residual stream between blocks and running each block again in the backward pass."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from tl_scopes.models.hooks import StopForward
from tl_scopes.models.state import versions
from tl_scopes.models.substitution import exchanged
from tl_scopes.models.supported import Model
from tl_scopes.models.threads import here, put_back


@contextmanager
def checkpointed(model: Model, weights: AbstractContextManager[object]) -> Iterator[dict[str, Any]]:
    """Inside, a forward pass of this thread keeps only what enters each block. Yields options to run the model with.

    A block is run again under the hooks that it had in the forward pass, so that the numbers are the same inside and
    outside of the user's `model.hooks(...)`. A block whose weights have changed refuses to run again.

    Args:
        model: a checked model.
        weights: what the blocks are run inside of, which decides what takes gradients.

    Source: Chen et al. 2016 (arXiv:1604.06174), one segment per block.
    """
    blocks = list(model.blocks)
    with put_back() as afterwards:
        for block in blocks:
            afterwards(_set_forward, block, vars(block).get("forward"))
            _set_forward(block, _Recomputed(block, block.forward, weights))
        config = getattr(getattr(model, "original_model", None), "config", None)
        text = getattr(config, "get_text_config", lambda: config)()  # a part of the configuration of models with images
        # A key-value cache would be filled twice.
        yield {"use_cache": False} if any(getattr(part, "use_cache", False) for part in (config, text)) else {}


def _set_forward(block: nn.Module, forward: Callable[..., Any] | None) -> None:
    """Give a block a forward method of its own, or take it away."""
    # Past __setattr__, which on a bridge hands the attribute on to the Hugging Face block.
    vars(block).pop("forward", None)
    vars(block).update({} if forward is None else {"forward": forward})


class _Recomputed:
    """A block's forward method that keeps nothing but its inputs, for passes of the thread that made it."""

    def __init__(self, block: nn.Module, forward: Callable[..., Any], weights: AbstractContextManager[object]) -> None:
        self.block, self.forward, self.weights = block, forward, weights
        self.maker, self.exchanges = here.maker, here.exchanges
        self.hooks, self.lists, self.versions = _hooks(block), _listed(block), versions(block.parameters())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if here.maker is not self.maker:
            return self.forward(*args, **kwargs)

        def once(*args: Any, **kwargs: Any) -> Any:
            # The pass that stopped within this block stops there again; the backward pass goes on from what it found.
            with nullcontext() if here.again is None else suppress(StopForward):
                return self.forward(*map(_own, args), **{name: _own(value) for name, value in kwargs.items()})

        # The second run may end as soon as it has what the backward pass needs; but offloaded weights that were fetched
        # for it would then stay.
        with set_checkpoint_early_stop(not any(weight.is_meta for weight in self.block.parameters())):
            again = _Again(self)
            return checkpoint(once, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), again), **kwargs)

    @contextmanager
    def as_it_was(self) -> Iterator[None]:
        """Inside, the block has the hooks and the weights of the forward pass, in this thread."""
        with exchanged(*self.exchanges):
            if versions(self.block.parameters()) != self.versions:
                raise RuntimeError(
                    "the weights have changed since the linearisation was made with checkpoint=True, which runs the "
                    "blocks again: linearise again."
                )
            with self.weights, _rehooked(self.hooks, self.lists, self.maker):
                yield


class _Again(ExitStack):
    """`as_it_was`, as often as torch enters it."""

    def __init__(self, block: _Recomputed) -> None:
        super().__init__()
        self.block = block

    def __enter__(self) -> Any:
        return self.enter_context(self.block.as_it_was())


def _own(value: Any) -> Any:
    """A copy of the residual stream, which hooks of the user's may change in place: a block starts twice from it."""
    return value.clone() if isinstance(value, Tensor) and value.requires_grad else value


@dataclass(frozen=True)
class _Hooks:
    """Hooks of one kind, before or after, on one part of a block."""

    live: dict[int, Any]
    """Those of the moment, which torch calls."""
    with_kwargs: dict[int, bool]
    """Which of them are handed keyword arguments."""
    register: Callable[..., Any]
    then: dict[int, Any]
    """Those of the forward pass."""
    then_with_kwargs: dict[int, bool]


def _hooks(block: nn.Module) -> list[_Hooks]:
    kinds = [
        kind
        for part in block.modules()
        for kind in (
            (part._forward_hooks, part._forward_hooks_with_kwargs, part.register_forward_hook),
            (part._forward_pre_hooks, part._forward_pre_hooks_with_kwargs, part.register_forward_pre_hook),
        )
    ]
    return [_Hooks(live, with_kwargs, register, dict(live), dict(with_kwargs)) for live, with_kwargs, register in kinds]


def _listed(block: nn.Module) -> list[tuple[Any, list[Any]]]:
    """The parts of a block that list their forward hooks, with the list of the moment.

    The lists are TransformerLens' own. The norms of a bridge ask them which way to compute.
    """
    lists = [(part, vars(part).get("fwd_hooks")) for part in block.modules()]
    return [(part, list(handles)) for part, handles in lists if isinstance(handles, list)]


@contextmanager
def _rehooked(hooks: Sequence[_Hooks], lists: Sequence[tuple[Any, list[Any]]], maker: object) -> Iterator[None]:
    """Inside, the hooks of the forward pass act in this thread, in place of those of the moment."""
    again = object()
    with put_back() as afterwards:
        afterwards(setattr, here, "maker", here.maker)
        afterwards(setattr, here, "again", here.again)
        for kind in hooks:
            if kind.live or kind.then:
                afterwards(_unhook, kind, again)
                for id, hook in list(kind.live.items()):
                    kind.live[id] = _Only(hook, again, inside=False)
                for id, hook in kind.then.items():
                    kind.register(_Only(hook, again, inside=True), with_kwargs=id in kind.then_with_kwargs)
        for part, then in lists:
            if part.fwd_hooks or then:
                afterwards(_relist, part, then, list(part.fwd_hooks))
                part.fwd_hooks = list(then)
        here.maker, here.again = maker, again
        yield


def _relist(part: Any, then: list[Any], before: list[Any]) -> None:
    """Give a part the list back that it had before, with what another thread has done to it meanwhile."""
    now = part.fwd_hooks
    gone = [handle for handle in then if handle not in now]
    new = [handle for handle in now if handle not in then and handle not in before]
    part.fwd_hooks = [handle for handle in before if handle not in gone] + new


def _unhook(kind: _Hooks, again: object) -> None:
    """Undo what `_rehooked` has done to hooks."""
    for id, hook in list(kind.live.items()):
        if isinstance(hook, _Only) and hook.again is again:
            if hook.inside:
                kind.live.pop(id, None)
                kind.with_kwargs.pop(id, None)
            else:
                kind.live[id] = hook.hook


@dataclass(frozen=True, eq=False)
class _Only:
    """A hook that acts only inside of one second run of a block, in the thread that makes it; or only outside of it."""

    hook: Callable[..., Any]
    again: object
    inside: bool

    def __call__(self, *args: Any) -> Any:
        return self.hook(*args) if (here.again is self.again) is self.inside else None
