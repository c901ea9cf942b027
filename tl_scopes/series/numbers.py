"""A series as text: scaled to numbers of two digits, with a delimiter behind each, and the tokens that they become."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_scopes import models
from tl_scopes.models import Model

KINDS = 100
"""How many numbers of two digits there are."""


@dataclass(frozen=True, eq=False, repr=False)
class Numbers:
    """A series of numbers of two digits.

    Attributes:
        numbers: the numbers, from 0 to 99.
        delimiter: what stands behind each.
    """

    numbers: tuple[int, ...]
    delimiter: str = ","

    def __post_init__(self) -> None:
        wrong = [number for number in self.numbers if not 0 <= number < KINDS]
        if wrong:
            raise ValueError(f"a number of two digits is 0 to 99, got {wrong[0]}: scale the series by Numbers.of.")
        if not self.delimiter or any(character.isdigit() for character in self.delimiter):
            raise ValueError(f"a delimiter is a text without digits, else no one could tell, got {self.delimiter!r}.")

    @classmethod
    def of(
        cls,
        values: Float[Tensor, " number"] | Iterable[float | int],
        low: int = 15,
        high: int = 85,
        delimiter: str = ",",
    ) -> "Numbers":
        """A series scaled so that its least value becomes `low` and its largest `high`.

            number = round(low + (high − low) (x − min) / (max − min))

        Raises:
            ValueError: for a series that is constant, of fewer than two numbers, or with NaN or infinite values; for
                `low` and `high` that are not 0 ≤ low < high ≤ 99.

        Source: Liu et al. 2026 (arXiv:2601.16407), section A.2; the series of its code run from 14 or 15 to 84.
        Departure: numbers are rounded, where that code cuts off digits.

        Example:
            >>> from tl_scopes import series
            >>> series.Numbers.of([0.0, 0.5, 1.0]).text
            '15,50,85,'
        """
        series = torch.as_tensor(values if isinstance(values, Tensor) else list(values), dtype=torch.float64)
        if series.ndim != 1 or len(series) < 2:
            raise ValueError(f"a series is two numbers or more in a row, got the shape {list(series.shape)}.")
        if not series.isfinite().all():
            at = int((~series.isfinite()).nonzero()[0])
            raise ValueError(f"number {at} of the series is {series[at].item()}: leave it out, or fill it in.")
        bottom, top = series.min(), series.max()
        if bottom == top:
            raise ValueError(f"the series is constant, {bottom.item():g} throughout, so that it has no scale.")
        if not 0 <= low < high < KINDS:
            raise ValueError(f"the scale runs from low to high with 0 ≤ low < high ≤ 99, got {low} and {high}.")
        scaled = low + (high - low) * (series - bottom) / (top - bottom)
        return cls(tuple(round(one) for one in scaled.tolist()), delimiter)

    def __repr__(self) -> str:
        shown = self.text if len(self) <= 8 else f"{self[:4].text}…{self[-3:].text}"
        return f"Numbers({shown!r}; {models.counted(len(self), 'number')})"

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, part: Any) -> "Numbers":
        """A part of the series on the same scale."""
        if not isinstance(part, slice):
            raise TypeError(f"a part of a series is a slice, numbers[:60] say, got {part!r}: numbers.numbers has each.")
        return replace(self, numbers=self.numbers[part])

    @property
    def text(self) -> str:
        """The prompt: each number as two digits, and the delimiter behind it."""
        return "".join(f"{number:02d}{self.delimiter}" for number in self.numbers)

    @property
    def values(self) -> Float[Tensor, " number"]:
        """The numbers as a tensor."""
        return torch.tensor(self.numbers, dtype=torch.float64)


class Spelling(NamedTuple):
    """How a tokenizer writes numbers of two digits.

    Attributes:
        tokens: [number piece], the ids of each number.
        delimiter: [piece], the ids of what stands behind it.
        start: the ids that a prompt begins with, such as BOS.
    """

    tokens: Int[Tensor, "100 piece"]
    delimiter: Int[Tensor, " piece"]
    start: Int[Tensor, " piece"]

    @classmethod
    def of(cls, model: Model, delimiter: str = ",") -> "Spelling":
        """Ask the tokenizer.

        Raises:
            ValueError: for numbers that are not all written with as many tokens, or whose tokens depend on what stands
                beside them.
        """
        read = {number: _read(model, f"50{delimiter}{number:02d}{delimiter}") for number in range(KINDS)}
        before, behind = _read(model, f"50{delimiter}"), _read(model, "")
        start = behind if before[: len(behind)] == behind else []
        fifty, marks = cls._split(before[len(start) :], read[50][len(before) :], delimiter, model)
        tokens = {}
        for number, ids in read.items():
            own = ids[len(before) : len(ids) - len(marks)]
            if ids[: len(before)] != before or ids[len(ids) - len(marks) :] != marks or not own:
                raise ValueError(
                    f"the tokens of {number:02d} depend on what stands beside it: {_texts(model, ids)}. Take another "
                    f"delimiter than {delimiter!r}, one that is a token of its own behind a digit."
                )
            tokens[number] = own
        for number, own in tokens.items():
            if len(own) != len(fifty):
                raise ValueError(
                    f"numbers of two digits do not tokenise alike: 50 is {_texts(model, fifty)}, {number:02d} is "
                    f"{_texts(model, own)}. A forecast needs one way to write each number. The influence per number "
                    "does not: series.influence groups the tokens of each."
                )
        return cls(torch.tensor([tokens[n] for n in range(KINDS)]), torch.tensor(marks), torch.tensor(start).long())

    @staticmethod
    def _split(first: list[int], second: list[int], delimiter: str, model: Model) -> tuple[list[int], list[int]]:
        """The tokens of "50" and those of the delimiter, from two that follow one another."""
        texts = [models.token_text(model, id) for id in second]
        digits = [i for i, text in enumerate(texts) if any(c.isdigit() for c in text)]
        if first != second or not digits or any(not texts[i].strip().isdigit() for i in digits):
            raise ValueError(
                f"a token holds a digit and the delimiter {delimiter!r} together, or what stands first is written "
                f"otherwise: {_texts(model, first)} and {_texts(model, second)}. Take another delimiter."
            )
        return second[: digits[-1] + 1], second[digits[-1] + 1 :]

    def ids(self, numbers: Numbers) -> Int[Tensor, " token"]:
        """The prompt of a series."""
        each = [torch.cat([self.tokens[number], self.delimiter]) for number in numbers.numbers]
        return torch.cat([self.start, *each])


def require_fits(model: Model, numbers: Numbers, tokens: int) -> None:
    """Refuse a series that the context does not hold.

    Raises:
        ValueError: for more tokens than that, with how many numbers it holds.
    """
    limit = models.context_length(model)
    if limit is not None and tokens > limit:
        held = limit * len(numbers) // tokens
        raise ValueError(
            f"the series of {len(numbers)} numbers is {tokens} tokens long, and the model's context holds {limit}: "
            f"take about the last {held} numbers, numbers[-{held}:]."
        )


def _read(model: Model, text: str) -> list[int]:
    if not text:
        tokens = models.tokenize(model, "50")
        return tokens[:1].tolist() if models.starts_with_bos(model, tokens) else []
    return models.tokenize(model, text).tolist()


def _texts(model: Model, ids: Iterable[int]) -> str:
    return " ".join(repr(models.token_text(model, id)) for id in ids)
