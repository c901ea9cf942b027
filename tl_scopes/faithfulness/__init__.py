"""Whether scores say what moves the model: by what replacing tokens does, and by causes that are known.

`tl_scopes.evaluate` and `tl_scopes.known_causes` measure; here is what to do with their results.
"""

from tl_scopes.faithfulness.curves import plot
from tl_scopes.faithfulness.perturbation import Protocol
from tl_scopes.faithfulness.statistics import differences, summary

__all__ = ["Protocol", "differences", "plot", "summary"]
