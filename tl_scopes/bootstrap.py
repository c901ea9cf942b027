"""Means over prompts, with bootstrap confidence intervals.

This is a file of its own since circuits and the evaluation of scopes both need it, and neither may import the other.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def bootstrap(
    values: Float[Tensor, "prompt column"], confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[Float[Tensor, " column"], Float[Tensor, " column"], Float[Tensor, " column"], Int[Tensor, " column"]]:
    """The mean of each column, the two ends of its percentile bootstrap interval, and how many prompts it is over.

    All columns share the resampled prompts. NaN and infinity count as missing.

    Args:
        values: a row for each prompt.
        confidence: how often the interval should hold the mean over all prompts of the kind, between 0 and 1.
        resamples: how many times as many prompts are drawn, with replacement.
        seed: of the draws.

    Source: Efron & Tibshirani 1993, chapter 13.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(values), (resamples, len(values)), generator=generator)
    weights = torch.zeros(resamples, len(values), dtype=values.dtype).scatter_add_(
        1, drawn, torch.ones(drawn.shape, dtype=values.dtype)
    )
    there = values.isfinite()
    counted, present = values.where(there, 0), there.to(values.dtype)
    means = (weights @ counted) / (weights @ present)
    ends = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=values.dtype)
    parts = [torch.nanquantile(part, ends, dim=0) for part in means.split(1000, dim=1)]  # which takes no large tensors
    low, high = torch.cat(parts, dim=1)
    return counted.sum(0) / present.sum(0), low, high, there.sum(0)
