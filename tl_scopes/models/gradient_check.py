"""Watching plain modules as they run: whether gradients pass each one, which those of quantised activations do not.

This is a file of its own since everything else here looks at hook points.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tl_scopes.models.supported import Model
from tl_scopes.models.threads import here, put_back

_passed: WeakKeyDictionary[nn.Module, tuple[int, ...]] = WeakKeyDictionary()
"""The models that were found to pass gradients, by the identity of their parameters."""


@contextmanager
def gradients_pass(model: Model, parameters: Sequence[nn.Parameter], whole: bool) -> Iterator[None]:
    """Inside, a forward pass with a graph is watched: a module that takes gradients and gives none ends in an error.

    Without it the Jacobian would be that of the residual stream beside the module, and nobody would be told. A model is
    watched until one whole pass has been fine; that costs some calls per module, once.

    Args:
        model: a checked model.
        parameters: its parameters.
        whole: whether the pass runs from the embedding to the logits.

    Raises:
        ValueError: with the first module that stops gradients, and what to do.
    """
    known = tuple(map(id, parameters))
    if _passed.get(model) == known:
        yield
        return
    blocked: list[str] = []
    with put_back() as afterwards:
        for name, module in model.named_modules():
            if not any(True for _ in module.children()) and isinstance(getattr(module, "weight", None), Tensor):
                hook = partial(_note_blocked, blocked, name.replace("._original_component", ""))
                afterwards(_unhook, module, hook)
                module.register_forward_hook(hook)
        yield
    if blocked:
        raise ValueError(
            f"no gradient passes {blocked[0]}{f' and {len(blocked) - 1} other modules' if len(blocked) > 1 else ''}: "
            "they compute with quantised activations or with weights that are still packed. Load the model without "
            "quantisation, with its weights alone quantised, or dequantised."
        )
    if whole:
        _passed[model] = known


def _note_blocked(blocked: list[str], name: str, module: nn.Module, inputs: Any, output: Any) -> None:
    """Add a module to a list if a graph leads into it and does not lead out; a hook on that module."""
    if torch.is_grad_enabled() and _takes(inputs) and not _takes(output) and _is_value(output):
        blocked.append(f"{name} ({type(module).__name__})")


@contextmanager
def named_graph(model: Model) -> Iterator[None]:
    """Inside, this thread's passes write on the nodes of their graph which module made them (`made_by`)."""
    with put_back() as afterwards:
        for path, module in model.named_modules():
            shown = path.replace("._original_component", "").replace("_original_component.", "")
            hook = partial(_name, here.maker, shown)
            afterwards(_unhook, module, hook)
            module.register_forward_hook(hook)
        yield


def _name(maker: object, path: str, module: nn.Module, inputs: Any, output: Any) -> None:
    """Name the module on the graph of what it gives out, in passes of one thread; a hook on that module."""
    if here.maker is maker:
        for value in output if isinstance(output, tuple | list) else (output,):
            if isinstance(value, Tensor):
                _write(value.grad_fn, f"{path} ({type(module).__name__})")


def _unhook(module: nn.Module, hook: object) -> None:
    """Take a forward hook off a module, if it is there."""
    for id, known in list(module._forward_hooks.items()):
        if known is hook:
            module._forward_hooks.pop(id, None)


def made_by(node: Any) -> str | None:
    """The innermost module that made a node of a graph; None outside of modules, and of `named_graph`."""
    return node.metadata.get("module")


def _write(node: Any, module: str) -> None:
    """Name the module on a node, and on those behind it that are new."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if node is not None and "module" not in node.metadata:
            node.metadata["module"] = module
            waiting += [earlier for earlier, _ in node.next_functions]


def _takes(values: Any) -> bool:
    """Whether any tensor among these has a graph."""
    some = values if isinstance(values, tuple | list) else (values,)
    return any(isinstance(value, Tensor) and value.requires_grad for value in some)


def _is_value(output: Any) -> bool:
    """Whether the output is one tensor of numbers; indices and masks have no gradient in any model."""
    return isinstance(output, Tensor) and output.is_floating_point()
