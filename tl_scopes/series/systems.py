"""Systems that write a time series: those of the paper."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor

from tl_scopes.models import as_count
from tl_scopes.tiny.series import logistic_orbit, lorenz_orbit

_APPROACH, _FAR = 40, 1e6


@dataclass(frozen=True)
class System(ABC):
    """Something that moves, and is looked at in equal intervals. Its fields are its parameters."""

    @abstractmethod
    def orbit(self, generator: torch.Generator) -> Iterator[float]:
        """The numbers that are seen, without end, from a random beginning."""

    def draw(self, count: int, generator: torch.Generator) -> Float[Tensor, " number"]:
        """One series of so many numbers, in float64.

        Raises:
            ValueError: for a system that diverges, and for a count below 1.
            TypeError: for a count that is not an integer.
        """
        count = as_count(count, "count must be at least 1")
        values: list[float] = []
        for value in islice(self.orbit(generator), count):
            if not abs(value) < _FAR:
                break
            values.append(value)
        if len(values) < count:
            raise ValueError(
                f"{self} diverges: of {count} numbers the first {len(values)} are below {_FAR:g}, and then it leaves "
                "them behind. Take parameters, or an interval, at which it stays where it is."
            )
        return torch.tensor(values, dtype=torch.float64)


@dataclass(frozen=True)
class LogisticMap(System):
    """The logistic map, where each number follows from the last one alone,

        x' = r x (1 − x) + noise · ε,   ε standard normal

    chaotic for most r above 3.57. With noise, what would leave [0, 1] is put back inside, as far from the end as it had
    gone past it, since the map diverges out there. The first 40 numbers are left out.

    Args:
        r: how fast it grows.
        noise: the standard deviation of the noise.

    Source: Liu et al. 2026 (arXiv:2601.16407), section 3.3.

    Example:
        >>> import torch
        >>> from tl_scopes import series
        >>> values = series.LogisticMap().draw(60, torch.Generator().manual_seed(0))
        >>> bool(torch.allclose(values[1:], 3.9 * values[:-1] * (1 - values[:-1])))
        True
    """

    r: float = 3.9
    noise: float = 0.0

    def orbit(self, generator: torch.Generator) -> Iterator[float]:
        x = float(torch.rand((), generator=generator, dtype=torch.float64)) * 0.9 + 0.05
        return islice(self._noisy(x, generator) if self.noise else logistic_orbit(x, self.r), _APPROACH, None)

    def _noisy(self, x: float, generator: torch.Generator) -> Iterator[float]:
        while True:
            noise = float(torch.randn((), generator=generator, dtype=torch.float64))
            x = next(logistic_orbit(x, self.r)) + self.noise * noise
            x = x if x < -1 or x > 2 else 1 - abs(1 - abs(x))
            yield x


@dataclass(frozen=True)
class Lorenz(System):
    """The x coordinate of the Lorenz system,

        x' = σ (y − x),   y' = x (ρ − z) − y,   z' = x y − β z,   σ = 10, β = 8/3

    of which the last few numbers together say where it goes. The approach to the orbit is left out.

    Args:
        interval: the time between two numbers.
        drift: what is added to every next number once more, so that the series climbs.
        rho: the parameter ρ.

    Source: Liu et al. 2026 (arXiv:2601.16407), section 3.3.
    """

    interval: float = 0.07
    drift: float = 0.0
    rho: float = 28.0

    def orbit(self, generator: torch.Generator) -> Iterator[float]:
        x, y, z = (2 * torch.rand(3, generator=generator, dtype=torch.float64) - 1).tolist()
        states = islice(lorenz_orbit((15 * x, 20 * y, 25 + 15 * z), self.interval, rho=self.rho), _APPROACH, None)
        return (x if math.isnan(x) else x + self.drift * i for i, (x, _, _) in enumerate(states))


@dataclass(frozen=True)
class BrownianMotion(System):
    """A random walk, x' = x + ε with ε standard normal: all that can be known of the next number stands in the last.

    So nothing is gained by looking for a similar past: it is the control of `neighbor_test`.

    Source: Liu et al. 2026 (arXiv:2601.16407), section 3.3.
    """

    def orbit(self, generator: torch.Generator) -> Iterator[float]:
        x = 0.0
        while True:
            x += float(torch.randn((), generator=generator, dtype=torch.float64))
            yield x
