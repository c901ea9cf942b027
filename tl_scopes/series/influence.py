"""How much each number of a series moves the prediction of the next one."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor

from tl_scopes.models import as_count, counted
from tl_scopes.results.attribution import Attribution
from tl_scopes.results.units import offsets
from tl_scopes.views import series as pictures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tl_scopes.series.forecast import Forecast


@dataclass(frozen=True, eq=False, repr=False)
class SeriesInfluence:
    """The scores of an answer number by number; delimiters and BOS are left out.

    Attributes:
        scores: [number], in the answer's unit.
        numbers: the numbers that stand in the prompt.
        answer: where the scores are from.
    """

    scores: Float[Tensor, " number"]
    numbers: tuple[int, ...]
    answer: Attribution

    def __repr__(self) -> str:
        best = self.scores.abs().argsort(descending=True, stable=True)[:3].tolist()
        told = ", ".join(f"{self.numbers[i]:02d} ({len(self) - i} back) {self.share[i]:.0%}" for i in best)
        return f"SeriesInfluence({self.answer.question}: {told}; {counted(len(self), 'number')}, {self.answer.unit})"

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def share(self) -> Float[Tensor, " number"]:
        """Each score over the sum of the sizes of all numbers' scores."""
        total = self.scores.abs().sum()
        return self.scores / total if total > 0 else torch.zeros_like(self.scores)

    def of_last(self, count: int | SupportsIndex) -> float:
        """The share of the last so many numbers together, in size.

        Raises:
            ValueError: for a count below 0.
            TypeError: for a count that is not an integer.
        """
        count = as_count(count, "count is how many of the last numbers, 0 or more", least=0)
        return float(self.share[max(0, len(self) - count) :].abs().sum())

    def plot(self, forecast: "Forecast | None" = None, truth: int | None = None) -> "Figure":
        """The influence as bars along the series, the series itself as a line, and beside it the forecast with the
        number that came next."""
        return pictures.influence(self, forecast, truth)

    def _repr_png_(self) -> bytes:
        return self.plot()._repr_png_()  # type: ignore[attr-defined]


def influence(answer: Attribution) -> SeriesInfluence:
    """An answer about a series, number by number: the tokens of a number are put together, all else is left out.

    A number is what stands between two texts without digits, whatever tokens it is made of, and ends where tokens were
    set aside. Its score is what the scope would find for its tokens together, as in `answer.by`.

    Unit: the answer's.

    Raises:
        ValueError: for an answer whose tokens hold no number, or one in which a token holds a number and something else
            together; where the scores of the scope do not tell what several tokens have together.

    Example:
        >>> from tl_scopes import series
        >>> answer = tls.attribute(model, "15,50,85,20,", tls.TemperatureScope())
        >>> series.influence(answer).numbers
        (15, 50, 85, 20)
    """
    # Where tokens were set aside, what stood beside them does not belong together.
    beside = zip((answer.positions[0] - 1, *answer.positions), answer.positions, answer.str_tokens, strict=False)
    whole, places = offsets([text if at == before + 1 else f" {text}" for before, at, text in beside])
    spans, numbers = [], []
    for found in re.finditer(r"\d+", whole):
        start, stop = found.span()
        inside = [i for i, (a, b) in enumerate(places) if a < stop and b > start]
        text = "".join(answer.str_tokens[i] for i in inside)
        if text.strip() != found[0]:
            raise ValueError(
                f"the tokens {' '.join(repr(answer.str_tokens[i]) for i in inside)} hold the number {found[0]} and "
                "something else together, so that its influence is not known apart: take another delimiter."
            )
        spans.append(inside)
        numbers.append(int(found[0]))
    if not numbers:
        raise ValueError(f"the prompt {whole[:40]!r} holds no number in digits.")
    if all(len(inside) == 1 for inside in spans):
        scores = answer.scores[[inside[0] for inside in spans]]
    else:
        pairs = [(answer.positions[inside[0]], answer.positions[inside[-1]] + 1) for inside in spans]
        grouped = answer.by(pairs)
        firsts = {start for start, _ in pairs}
        scores = grouped.scores[[i for i, position in enumerate(grouped.positions) if position in firsts]]
    return SeriesInfluence(scores, tuple(numbers), answer)
