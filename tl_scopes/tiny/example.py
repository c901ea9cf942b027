"""A prompt whose answer, and the cause of its answer, are known by construction."""

import re
import zlib
from dataclasses import dataclass
from typing import Any, Literal

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Example:
    """One prompt with its answer and the cause of the answer."""

    task: str
    prompt: str
    target: str
    """The text of the one token that follows `prompt`, leading space included."""
    foil: str | None
    """A wrong answer of the same kind, the natural `versus` of a logit difference; None for numbers."""
    causes: tuple[tuple[int, int], ...]
    """Character spans of `prompt`, half-open; when what stands in one changes, so does the right answer."""
    rest: str
    """What follows the target in the training document."""
    key: str
    """The text that decides the split: examples with the same key are all trained on or all held out."""

    @property
    def split(self) -> Split:
        """Whether the example may be trained on: about every tenth key, by its checksum, never is."""
        return "test" if zlib.crc32(f"{self.task} {self.key}".encode()) % 10 == 0 else "train"

    def cause_positions(self, tokenizer: Any) -> tuple[int, ...]:
        """Positions of the causes in `tokenizer(prompt)`; a BOS token counts where the tokenizer adds one."""
        offsets = tokenizer(self.prompt, return_offsets_mapping=True)["offset_mapping"]
        return tuple(
            position
            for position, (start, stop) in enumerate(offsets)
            if any(start < end and begin < stop for begin, end in self.causes)
        )


def marked_example(
    task: str, marked: str, target: str, foil: str | None = None, rest: str = ".", key: str | None = None
) -> Example:
    """Build an example from a prompt whose causes stand between ⟦ and ⟧."""
    prompt, causes = "", []
    for piece in re.split(r"(⟦.*?⟧)", marked):
        text = piece.strip("⟦⟧")
        if text != piece:
            causes.append((len(prompt), len(prompt) + len(text)))
        prompt += text
    return Example(task, prompt, target, foil, tuple(causes), rest, key or prompt)
