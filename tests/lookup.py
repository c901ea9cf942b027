"""Prompts that can only be continued by looking them up: one random map for each, on the network of `tests.induction`.

It is a file of its own since tests, the notebook and the table of time series ask the same network the same prompts.
The network has learned to go on with what it has seen, and the map of a prompt stands nowhere but in the prompt.
"""

import torch
from torch import Tensor

from tests.induction import VOCAB

LENGTH = 24
RESTARTS = 0.5


def orbit(generator: torch.Generator) -> tuple[Tensor, int]:
    """A prompt and the number that follows: x' = f(x) with a random map f, and every now and then a new beginning.

    The last number has stood before with its successor behind it, and not only at the end.
    """
    while True:
        follows = torch.randint(VOCAB, (VOCAB,), generator=generator)
        x = torch.randint(VOCAB, (LENGTH,), generator=generator)
        jumps = torch.rand(LENGTH, generator=generator) < RESTARTS
        for i in range(1, LENGTH):
            x[i] = x[i] if jumps[i] else follows[x[i - 1]]
        last = x[-1]
        seen = (x[:-2] == last) & (x[1:-1] == follows[last])
        only = bool(((x[:-1] == last) == torch.cat([seen, torch.zeros(1, dtype=torch.bool)])).all())
        if 1 <= int(seen.sum()) <= 2 and only and follows[last] != last:
            return x, int(follows[last])


def orbits(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Prompts [prompt number], and the number that follows each."""
    generator = torch.Generator().manual_seed(seed)
    found = [orbit(generator) for _ in range(count)]
    return torch.stack([x for x, _ in found]), torch.tensor([number for _, number in found])
