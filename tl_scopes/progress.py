"""Progress bars: on a terminal, for work that takes a while, and gone when it is done.

In a notebook a widget would stay behind in the saved file as "Loading widget...", and in a log every step is a line. So
a bar is drawn nowhere but on a terminal. This is a file of its own since every floor draws bars.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm


class _Here(threading.local):
    hidden = False
    """Whether this thread is inside of `no_progress`."""


_here = _Here()


def progress_bar(total: int | None, what: str, *, unit: str = "it", delay: int = 3) -> tqdm:
    """A bar that is updated by hand, inside `with`.

    Args:
        total: how many steps there are, if that is known. There is no bar for one step.
        what: what is counted.
        unit: what a step is.
        delay: it appears after so many seconds.
    """
    hidden = True if _here.hidden or total == 1 else None  # None is what keeps tqdm to terminals
    return tqdm(total=total, desc=what, unit=unit, delay=delay, leave=False, disable=hidden)


@contextmanager
def no_progress(hidden: bool = True) -> Iterator[None]:
    """Inside, this thread draws no bar."""
    before, _here.hidden = _here.hidden, _here.hidden or hidden
    try:
        yield
    finally:
        _here.hidden = before
