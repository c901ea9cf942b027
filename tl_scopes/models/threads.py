"""What this package does to a model acts in one thread, is put back whatever happens, and survives a fork.

This is a file of its own since everything that touches a model goes by it.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

one_at_a_time = threading.RLock()
"""Held while this package has hooks on a model: its passes take turns, in whichever threads they are made.

The user's own passes do not wait for it. TransformerLens lets them be made in several threads at once, but for batches
of different sizes on a bridge with learned positions (GPT-2), which keeps the size of the batch on the model.
"""

if hasattr(os, "register_at_fork"):
    # A fork waits for the pass of another thread, which the child would inherit half done and with nobody to end it.
    os.register_at_fork(
        before=one_at_a_time.acquire,
        after_in_parent=one_at_a_time.release,
        after_in_child=one_at_a_time.release,
    )


class _Here(threading.local):
    """What this thread is doing."""

    def __init__(self) -> None:
        self.maker = object()
        """In whose name this thread computes: in its own, or in that of the pass which it runs again. It is an object,
        since the system gives the numbers of threads away again."""
        self.again: object = None
        """The second run of a block that this thread makes, if it makes one."""
        self.exchanges: tuple[Any, ...] = ()
        """The exchanges of weights that this thread is inside of, the innermost last."""
        self.suspended: tuple[Any, ...] = ()
        """The exchanges that do not act for a while."""


here = _Here()


class OnlyHere:
    """A hook function that acts in the thread that makes it, and lets the values of all others pass."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.maker = function, here.maker

    def __call__(self, value: Any, hook: Any) -> Any:
        """What the function makes of a value; None in another thread."""
        return self.function(value, hook) if here.maker is self.maker else None


@contextmanager
def put_back() -> Iterator[Callable[..., None]]:
    """Yields a function that takes down what to do at the end, before that becomes necessary: steps back.

    All steps run twice, the last one first, so that a KeyboardInterrupt which falls into the first time leaves nothing
    undone. A step that finds nothing to put back must do nothing.
    """
    with ExitStack() as again, ExitStack() as first:
        yield partial(_twice, again, first)


def _twice(again: ExitStack, first: ExitStack, step: Callable[..., object], *args: Any) -> None:
    again.callback(step, *args)
    first.callback(step, *args)
