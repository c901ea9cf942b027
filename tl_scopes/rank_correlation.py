"""How alike two lists of numbers rank.

This is a file of its own since the checks and the evaluation of scopes both need it, and neither may import the other.
"""

from jaxtyping import Float
from torch import Tensor


def spearman(a: Float[Tensor, " n"], b: Float[Tensor, " n"]) -> float:
    """Spearman's rank correlation, with equal numbers at their mean rank; NaN where all of one list are equal."""
    import pandas as pd

    one, other = (pd.Series(values.double().tolist()).rank() for values in (a, b))
    return float(one.corr(other)) if one.nunique() > 1 < other.nunique() else float("nan")


def kendall(a: Float[Tensor, " n"], b: Float[Tensor, " n"]) -> float:
    """Kendall's rank correlation τ_b, in which pairs that are equal in one list count half; NaN where all of one are.

    Cost: n² numbers.
    """
    one, other = ((values[:, None] - values).sign().double() for values in (a.double(), b.double()))
    scale = (one.square().sum() * other.square().sum()).sqrt()
    return float((one * other).sum() / scale) if scale > 0 else float("nan")
