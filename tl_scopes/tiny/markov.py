"""A Markov chain of numbers: what can be known of a series by its last few numbers alone.

It is the baseline of a model that continues the series.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Generic, TypeVar

T = TypeVar("T")


class MarkovChain(Generic[T]):
    """An interpolated Markov chain of numbers: what follows, given the last `order` numbers,

        p(v | c) = (n(c v) + k(c) p(v | c')) / (n(c) + k(c))

    with n(c v) how often v followed the numbers c, n(c) how often anything did, k(c) how many kinds of number did, and
    c' the numbers c but the first; below all stands the uniform distribution.

    Args:
        series: what the chain is fitted on.
        order: how many numbers it looks at.
        kinds: how many numbers there are.

    Source: Witten and Bell 1991, The zero-frequency problem.
    """

    def __init__(self, series: Iterable[Sequence[T]], order: int = 2, kinds: int = 100) -> None:
        self.order, self.kinds = order, kinds
        self._counts: dict[tuple[T, ...], Counter[T]] = defaultdict(Counter)
        for numbers in series:
            for i, number in enumerate(numbers):
                for n in range(min(order, i) + 1):
                    self._counts[tuple(numbers[i - n : i])][number] += 1

    def __repr__(self) -> str:
        return f"MarkovChain(order {self.order}, fitted on {self._size} numbers)"

    @cached_property
    def _size(self) -> int:
        return self._counts[()].total()

    def probability(self, number: T, context: Sequence[T]) -> float:
        """How likely the number is after these numbers, of which the last `order` count."""
        return self._probability(number, tuple(context[-self.order :]) if self.order else ())

    def _probability(self, number: T, context: tuple[T, ...]) -> float:
        shorter = self._probability(number, context[1:]) if context else 1 / self.kinds
        seen = self._counts.get(context, Counter[T]())
        total, kinds = seen.total(), len(seen)
        return (seen[number] + kinds * shorter) / (total + kinds) if total else shorter

    def losses(self, numbers: Sequence[T]) -> list[float]:
        """−log p of each number given the ones before it, in nats."""
        return [-math.log(self.probability(number, numbers[:i])) for i, number in enumerate(numbers)]
