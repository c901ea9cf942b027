"""The tasks in numbers of two digits, one token each. Every series has a scale of its own, so that the past matters."""

import random
from collections.abc import Iterator, Sequence
from itertools import islice

from tl_scopes.tiny.example import Example, marked_example

SERIES_LENGTH = 80


def _series(rng: random.Random, task: str, values: Sequence[float], memory: int) -> Example:
    """A series scaled to a random part of 00..99, cut in its second half; the last `memory` numbers are the cause."""
    low, high = rng.uniform(0, 25), rng.uniform(74, 99)
    bottom, top = min(values), max(values)
    numbers = [f"{round(low + (high - low) * (v - bottom) / (top - bottom)):02d}" for v in values]
    cut = rng.randrange(SERIES_LENGTH // 2, SERIES_LENGTH)
    past = "".join(f"{n}," for n in numbers[: cut - memory]) + "".join(f"⟦{n}⟧," for n in numbers[cut - memory : cut])
    rest = "".join(f",{n}" for n in numbers[cut + 1 :])
    return marked_example(task, past, numbers[cut], rest=rest, key=",".join(numbers))


def logistic(rng: random.Random) -> Example:
    """The logistic map x -> 3.9 x (1 - x), chaotic: the next number follows from the last one."""
    values = list(islice(logistic_orbit(rng.uniform(0.05, 0.95)), SERIES_LENGTH))
    return _series(rng, "logistic", values, memory=1)


def logistic_orbit(x: float, r: float = 3.9) -> Iterator[float]:
    """The numbers that follow x under the logistic map, without end."""
    while True:
        x = r * x * (1 - x)
        yield x


def lorenz(rng: random.Random) -> Example:
    """The x coordinate of the Lorenz system (σ 10, ρ 28, β 8/3): the last few numbers together say where it goes."""

    state = (rng.uniform(-15, 15), rng.uniform(-20, 20), rng.uniform(10, 40))
    interval = rng.uniform(0.05, 0.09)
    # The first 40 points are the approach to the orbit and are left out.
    values = [x for x, _, _ in islice(lorenz_orbit(state, interval), 40, 40 + SERIES_LENGTH)]
    return _series(rng, "lorenz", values, memory=3)


def lorenz_orbit(
    state: tuple[float, float, float], interval: float, sigma: float = 10, rho: float = 28, beta: float = 8 / 3
) -> Iterator[tuple[float, float, float]]:
    """The states that the Lorenz system comes through from this one, `interval` apart, without end.

    Each interval is four steps of the classical Runge-Kutta method; the first state is one step ahead.
    """

    (x, y, z), step, i = state, interval / 4, 0
    half, sixth = step / 2, step / 6
    while True:  # written out, which is many times as fast as functions of vectors
        ax, ay, az = sigma * (y - x), x * (rho - z) - y, x * y - beta * z
        u, v, w = x + half * ax, y + half * ay, z + half * az
        bx, by, bz = sigma * (v - u), u * (rho - w) - v, u * v - beta * w
        u, v, w = x + half * bx, y + half * by, z + half * bz
        cx, cy, cz = sigma * (v - u), u * (rho - w) - v, u * v - beta * w
        u, v, w = x + step * cx, y + step * cy, z + step * cz
        dx, dy, dz = sigma * (v - u), u * (rho - w) - v, u * v - beta * w
        x += sixth * (ax + 2 * bx + 2 * cx + dx)
        y += sixth * (ay + 2 * by + 2 * cy + dy)
        z += sixth * (az + 2 * bz + 2 * cz + dz)
        if i % 4 == 0:
            yield x, y, z
        i += 1


def brownian(rng: random.Random) -> Example:
    """A random walk: the last number says where the next one will be, the others only how far off that may be."""
    x, values = 0.0, []
    for _ in range(SERIES_LENGTH):
        x += rng.gauss(0, 1)
        values.append(x)
    return _series(rng, "brownian", values, memory=1)
