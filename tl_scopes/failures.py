"""What becomes of a prompt that cannot be answered, in a call on many prompts: a warning, or the end of the call."""

import traceback
from collections.abc import Sized

from tl_scopes import models


class Failures:
    """The errors of single prompts in one call on many.

    With on_error="raise" the first error ends the call. With "warn" the prompt is left out, a warning says which one
    and why, and the call goes on. As long as nothing has been answered an error may be the fault of all prompts, a
    target that does not exist say: then only the first is warned of, the others wait for an answer, and where none
    ever comes the first error is raised.

    Args:
        call: the name of the function that was called; a note on each error names it, with the prompt's number.
        on_error: "warn" or "raise".
        prompts: the prompts. Of a single one that has no answer nothing is warned of, since its error is raised.

    Raises:
        ValueError: for another `on_error`.
    """

    def __init__(self, call: str, on_error: str, prompts: object = None) -> None:
        if not isinstance(on_error, str) or on_error not in ("warn", "raise"):
            raise ValueError(f'on_error is "warn" or "raise", got {on_error!r}.')
        self._call, self._strict = call, on_error == "raise"
        self._answered = False
        self._only = isinstance(prompts, Sized) and len(prompts) == 1
        self._first: Exception | None = None
        self._waiting: list[str] = []

    def add(self, number: int, error: Exception) -> None:
        """Take note of a prompt that has no answer.

        Raises:
            Exception: the error itself, with on_error="raise".
        """
        error.add_note(f"prompt {number} of {self._call}")
        if self._strict:
            raise error
        traceback.clear_frames(error.__traceback__)  # they would keep the graph of the failed forward pass
        self._waiting.append(f"prompt {number} has no answer: {reason(error)}")
        if self._answered or (self._first is None and not self._only):
            self._warn()
        self._first = error if self._first is None else self._first

    def answered(self) -> None:
        """Take note that a prompt has an answer, so that errors are not the fault of all."""
        self._answered = True
        self._warn()

    def require_answer(self) -> None:
        """Nothing was answered so far: make that an error.

        Raises:
            Exception: the first error, where there is one and nothing was answered.
        """
        if self._first is not None and not self._answered:
            raise self._first

    def _warn(self) -> None:
        for text in self._waiting:
            models.warn(text)
        self._waiting.clear()


def reason(error: Exception) -> str:
    """The message alone where it is a sentence of ours, which also says what to do; else with the kind of the error."""
    ours = isinstance(error, ValueError | TypeError | MemoryError) and str(error)
    return str(error) if ours else f"{type(error).__name__}: {error}"
