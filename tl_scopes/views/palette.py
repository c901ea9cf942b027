"""The colour of a score, the same in every picture."""

from collections.abc import Iterable
from math import copysign
from typing import NamedTuple

# Okabe and Ito's blue, and their vermilion below zero: every kind of colour vision tells them apart. They are mixed
# with white in CIE Lab, as circuitsvis does, so that equal steps of strength are equal steps of lightness, and static
# and live pictures have the same colours.
_BLUE = ("#ffffff", "#cddaec", "#9ab6d8", "#6493c5", "#0072b2")
_VERMILION = ("#ffffff", "#f9d5c1", "#f0ac84", "#e48448", "#d55e00")


def color(strength: float) -> str:
    """The colour of a strength from -1 to 1, as "#rrggbb": white at 0, blue at 1, vermilion at -1."""
    ramp = _VERMILION if strength < 0 else _BLUE
    place = min(abs(strength), 1.0) * (len(ramp) - 1)
    i = min(int(place), len(ramp) - 2)
    ends = zip(bytes.fromhex(ramp[i][1:]), bytes.fromhex(ramp[i + 1][1:]), strict=True)
    return "#" + bytes(round(a + (b - a) * (place - i)) for a, b in ends).hex()


def text_color(strength: float) -> str:
    """Black or white on `color(strength)`, whichever can be read better, at a contrast of at least 4.5 (WCAG AA)."""
    return "#ffffff" if strength > 0.93 else "#000000"


class Scale(NamedTuple):
    """A map from scores to strengths and back, by the square root, because scores are heavy-tailed.

    Attributes:
        end: the score where the scale ends; every score over it has strength 1.
        top: the strength at the end, which is less than 1 where some score lies over it.
    """

    end: float
    top: float = 1.0

    @classmethod
    def of(cls, scores: Iterable[float]) -> "Scale":
        """A scale that ends below the sinks, on which most influence tends to rest: they would wash out the others."""
        sizes = sorted(map(abs, scores), reverse=True) or [0.0]
        count = sinks(sizes)
        return cls(sizes[count], 0.8 if count else 1.0)

    def strength(self, score: float) -> float:
        """How strongly to colour a score: 0 for a score of zero, 1 for the strongest; negative where the score is."""
        within = self.top * (abs(score) / (self.end or 1.0)) ** 0.5
        return copysign(1.0 if self.is_over(score) else within, score)

    def score(self, strength: float) -> float:
        """The score that has this strength, within the scale."""
        return copysign(self.end * (strength / self.top) ** 2, strength)

    def is_over(self, score: float) -> bool:
        """Whether a score lies over the end of the scale."""
        return abs(score) > self.end


def sinks(sizes: list[float]) -> int:
    """How many of these sizes, given the largest first, stand apart from the rest.

    They are those before the widest gap, at most three, and fewer than half of all. The gap must be wider than 4, where
    the square root leaves the others half of the colours. Where one size holds everything, the rounding noise beside it
    does not count as a rest.
    """
    gaps = {i: sizes[i - 1] / sizes[i] for i in range(1, min(4, (len(sizes) + 1) // 2)) if sizes[i] > 1e-5 * sizes[0]}
    widest = max(gaps, key=gaps.__getitem__, default=0)
    return widest if widest and gaps[widest] > 4 else 0
