"""Means over prompts with their intervals, from the bootstrap over prompts, paired where scopes are compared."""

from typing import TYPE_CHECKING

import torch

from tl_scopes import models
from tl_scopes.bootstrap import bootstrap
from tl_scopes.models.arguments import as_number

if TYPE_CHECKING:
    import pandas as pd

_NO_KEY = ("prompt", "tokens", "target", "value", "examples")
"""Columns that tell rows of one group apart; the others name the group."""


def summary(
    results: "pd.DataFrame", *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> "pd.DataFrame":
    """The mean over prompts of everything that `evaluate` or `known_causes` measured, with its interval.

    Args:
        results: what they returned, or some of its rows.
        confidence: the share of intervals that hold the true mean, in the long run.
        resamples: how often the bootstrap draws prompts.
        seed: the seed of its random numbers.

    Returns:
        One row per scope, measure and so on, in the order of `results`: mean, low, high, and the number of prompts they
        are from, among which NaN and infinity do not count. Where all prompts agree the interval has no width, though
        another hundred prompts may hold an exception.

    Raises:
        ValueError: for results without rows, a confidence that is not between 0 and 1, fewer than one resample.
        TypeError: for a confidence that is not a number, and for resamples or a seed that are not integers.
    """
    resamples, seed = _checked(confidence, resamples, seed)
    wide = _wide(results)
    mean, low, high, prompts = bootstrap(torch.tensor(wide.to_numpy(dtype=float)), confidence, resamples, seed)
    table = wide.columns.to_frame(index=False)
    return _named(table, results).assign(mean=mean.numpy(), low=low.numpy(), high=high.numpy(), prompts=prompts.numpy())


def differences(
    results: "pd.DataFrame", reference: str, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> "pd.DataFrame":
    """What each scope has over a reference at the same prompts: the mean difference, with its interval.

    An interval that does not hold 0 tells the two apart, at this confidence and for each row by itself. Among twenty
    rows of scopes that are equal, one such interval is to be expected at a confidence of 95%.

    Args:
        results: what `evaluate` or `known_causes` returned, or some of its rows.
        reference: name of the scope to compare with.
        confidence: as in `summary`.
        resamples: as in `summary`.
        seed: as in `summary`.

    Returns:
        One row per scope, measure and so on, but for the reference: difference, low, high, and the number of prompts.

    Raises:
        ValueError: as `summary` does; for a reference that was not evaluated, or that alone was.
        TypeError: as `summary` does.
    """
    resamples, seed = _checked(confidence, resamples, seed)
    wide = _wide(results)
    known = list(dict.fromkeys(results["scope"]))
    if reference not in known:
        raise ValueError(f"there is no scope {reference!r} among {', '.join(map(repr, known))}.")
    keys = list(wide.columns.names)
    at = keys.index("scope")
    pairs = [
        (column, (*column[:at], reference, *column[at + 1 :])) for column in wide.columns if column[at] != reference
    ]
    pairs = [(one, other) for one, other in pairs if other in wide.columns]
    if not pairs:
        raise ValueError(
            f"there is nothing to compare {reference!r} with: results of another scope, with a measure that both have, "
            f"are missing; the scopes are {', '.join(map(repr, known))}."
        )
    values = torch.tensor(wide[[one for one, _ in pairs]].to_numpy(dtype=float))
    values = values - torch.tensor(wide[[other for _, other in pairs]].to_numpy(dtype=float))
    mean, low, high, prompts = bootstrap(values, confidence, resamples, seed)
    table = wide[[one for one, _ in pairs]].columns.to_frame(index=False)
    return _named(table, results).assign(
        difference=mean.numpy(), low=low.numpy(), high=high.numpy(), prompts=prompts.numpy()
    )


def aligned(results: "pd.DataFrame") -> "pd.DataFrame":
    """The results of the prompts whose targets the model predicts: where the target of every scope has the rank 1.

    What moves a prediction that the model does not make is another question, and scores tend to be worse there.

    Args:
        results: what `evaluate` returned, with all its rows.

    Raises:
        ValueError: for results that do not tell the rank of the target; where no prompt is left.
    """
    ranks = results[results["measure"] == "rank of the target"] if "measure" in results else results[:0]
    if not len(ranks):
        raise ValueError(
            "these results do not tell the rank of the target: take what evaluate returned, with all rows."
        )
    worst = ranks.groupby("prompt")["value"].max()
    kept = results[results["prompt"].isin(worst[worst == 1].index)]
    if not len(kept):
        raise ValueError(f"the model predicts the target at none of {len(worst)} prompts: nothing is left to compare.")
    return kept


def _checked(confidence: float, resamples: int, seed: int) -> tuple[int, int]:
    rule = "a confidence is a number between 0 and 1"
    if not 0 < as_number(confidence, rule) < 1:
        raise ValueError(f"{rule}, got {confidence!r}.")
    return models.as_count(resamples, "resamples must be at least 1"), models.as_int(seed, "seed must be an integer")


def _wide(results: "pd.DataFrame") -> "pd.DataFrame":
    """A table with a row per prompt and a column for everything else, in the order in which results have it."""
    if not len(results):
        raise ValueError("there are no results: an empty table has no mean.")
    keys = [name for name in results.columns if name not in _NO_KEY]
    keyed = results.assign(fraction=results["fraction"].fillna(-1.0)) if "fraction" in keys else results
    if keyed.duplicated(["prompt", *keys]).any():
        raise ValueError("two results of the same scope, measure and prompt: number the prompts of several runs apart.")
    wide = keyed.set_index(["prompt", *keys])["value"].unstack(keys)
    order = keyed[keys].drop_duplicates()
    return wide[[tuple(row) for row in order.itertuples(index=False)]]


def _named(table: "pd.DataFrame", results: "pd.DataFrame") -> "pd.DataFrame":
    if "fraction" in table:
        table["fraction"] = table["fraction"].where(table["fraction"] >= 0)
    return table.astype({name: results[name].dtype for name in table.columns})
