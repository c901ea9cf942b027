"""The colour of a score, the same in every picture."""

from collections.abc import Iterable
from functools import cache
from math import copysign
from operator import mul
from typing import Literal, NamedTuple

# Okabe and Ito's blue, and their vermilion below zero: every kind of colour vision tells them apart. They are mixed
# with white in CIE Lab, as circuitsvis does, so that equal steps of strength are equal steps of lightness, and static
# and live pictures have the same colours.
_BLUE = ("#ffffff", "#cddaec", "#9ab6d8", "#6493c5", "#0072b2")
_VERMILION = ("#ffffff", "#f9d5c1", "#f0ac84", "#e48448", "#d55e00")
RAMPS = (_BLUE, _VERMILION)
"""The colours from a strength of 0 to one of 1, above zero and below it."""


def color(strength: float) -> str:
    """The colour of a strength from -1 to 1, as "#rrggbb": white at 0, blue at 1, vermilion at -1."""
    ramp = RAMPS[strength < 0]
    place = min(abs(strength), 1.0) * (len(ramp) - 1)
    i = min(int(place), len(ramp) - 2)
    ends = zip(bytes.fromhex(ramp[i][1:]), bytes.fromhex(ramp[i + 1][1:]), strict=True)
    return "#" + bytes(round(a + (b - a) * (place - i)) for a, b in ends).hex()


def text_color(strength: float) -> str:
    """Black or white on `color(strength)`, whichever can be read better, at a contrast of at least 4.5 (WCAG AA)."""
    return "#ffffff" if strength > 0.93 else "#000000"


@cache
def dark(hue: str) -> str:
    """What stands on a dark ground for a colour on a white one, both as "#rrggbb".

    Hue and chroma in CIE Lab stay, and lightness turns around, L → 112 − L up to 95: white becomes the ground,
    "#1f1f1f", and a stronger colour is a lighter one.
    """
    to_lab, to_rgb = _LAB
    xyz = [sum(map(mul, line, _linear(hue))) for line in to_lab]
    x, y, z = (v ** (1 / 3) if v > _KNEE**3 else v / (3 * _KNEE**2) + 4 / 29 for v in xyz)
    lifted = (min(95.0, 112 - (116 * y - 16)) + 16) / 116
    roots = lifted + (x - y), lifted, lifted + (z - y)
    xyz = [v**3 if v > _KNEE else 3 * _KNEE**2 * (v - 4 / 29) for v in roots]
    linear = [min(max(sum(map(mul, line, xyz)), 0.0), 1.0) for line in to_rgb]
    channels = [12.92 * c if c <= 0.0031308 else 1.055 * c ** (1 / 2.4) - 0.055 for c in linear]
    return "#" + bytes(round(255 * c) for c in channels).hex()


def text_on(ground: str) -> str:
    """Black or white, whichever has the larger contrast to a ground "#rrggbb": 4.5 at least, as there is always one."""
    luminance = sum(map(mul, (0.2126, 0.7152, 0.0722), _linear(ground)))
    return "#000000" if luminance > 0.179 else "#ffffff"


def _linear(hue: str) -> list[float]:
    """The channels of a colour, in proportion to light."""
    channels = [byte / 255 for byte in bytes.fromhex(hue[1:])]
    return [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]


_KNEE = 6 / 29  # of CIE Lab's cube root, which is a line near zero
# Linear RGB to XYZ, whose white is 1, and back.
_LAB = (
    ((0.43389, 0.37622, 0.18989), (0.21264, 0.71517, 0.07219), (0.01775, 0.10945, 0.87280)),
    ((3.08040, -1.53738, -0.54302), (-0.92122, 1.87597, 0.04526), (0.05287, -0.20398, 1.15110)),
)


Colors = Literal["root", "linear", "even"]
"""How scores become colours. "root": by the square root, since scores are heavy-tailed. "linear": in proportion, so
that the few largest stand out. "even": in proportion to what a score is above an even share; all others are white."""
COLORS: dict[Colors, str] = {
    "root": "square root of the {}",
    "linear": "in proportion to the {}",
    "even": "the {} above an even one",
}


def require_colors(colors: object) -> None:
    """Refuse a scale that does not exist.

    Raises:
        ValueError: with those there are.
    """
    if colors not in COLORS:
        raise ValueError(f"colors is one of {', '.join(map(repr, COLORS))}, got {colors!r}.")


class Scale(NamedTuple):
    """A map from scores to strengths and back: top · ((|score| − floor) / (end − floor))^power, with the score's sign.

    Attributes:
        end: the score where the scale ends; every score over it has strength 1.
        top: the strength at the end, which is less than 1 where some score lies over it.
        floor: the size up to which a score has no strength.
        power: 0.5 for the square root, 1 for a line.
    """

    end: float
    top: float = 1.0
    floor: float = 0.0
    power: float = 0.5

    @classmethod
    def of(cls, scores: Iterable[float], colors: Colors = "root") -> "Scale":
        """A scale that ends below the sinks, on which most influence tends to rest: they would wash out the others."""
        sizes = sorted(map(abs, scores), reverse=True) or [0.0]
        floor = sum(sizes) / len(sizes) if colors == "even" else 0.0
        # Where nothing but the sinks is above an even share, the scale is theirs.
        count = n if sizes[n := sinks(sizes)] > floor else 0
        return cls(sizes[count], 0.8 if count else 1.0, floor, 0.5 if colors == "root" else 1.0)

    def strength(self, score: float) -> float:
        """How strongly to colour a score: 0 for a score of zero, 1 for the strongest; negative where the score is."""
        above = max(abs(score) - self.floor, 0.0)
        within = (
            self.top * (above / (self.end - self.floor)) ** self.power if above and not self.is_over(score) else 0.0
        )
        return copysign(1.0 if self.is_over(score) else within, score)

    def score(self, strength: float) -> float:
        """The score that has this strength, within the scale."""
        room = max(self.end - self.floor, 0.0)
        return copysign(self.floor + room * abs(strength / self.top) ** (1 / self.power), strength)

    def is_over(self, score: float) -> bool:
        """Whether a score lies over the end of the scale."""
        return abs(score) > max(self.end, self.floor)


def sinks(sizes: list[float]) -> int:
    """How many of these sizes, given the largest first, stand apart from the rest.

    They are those before the widest gap, at most three, and fewer than half of all. The gap must be wider than 4, where
    the square root leaves the others half of the colours. Where one size holds everything, the rounding noise beside it
    does not count as a rest.
    """
    gaps = {i: sizes[i - 1] / sizes[i] for i in range(1, min(4, (len(sizes) + 1) // 2)) if sizes[i] > 1e-5 * sizes[0]}
    widest = max(gaps, key=gaps.__getitem__, default=0)
    return widest if widest and gaps[widest] > 4 else 0
