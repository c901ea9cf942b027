"""Whether scores say what moves the model: what replacing tokens does, and causes that are known.

`tl_scopes.evaluate` and `tl_scopes.known_causes` measure it; here is what to give them, and what to do with their
results.
"""

from tl_scopes.faithfulness.curves import plot
from tl_scopes.faithfulness.english import english
from tl_scopes.faithfulness.examples import Confirmation, KnownCause, confirm
from tl_scopes.faithfulness.perturbation import Perturbation
from tl_scopes.faithfulness.statistics import aligned, differences, summary

__all__ = [
    "Confirmation",
    "KnownCause",
    "Perturbation",
    "aligned",
    "confirm",
    "differences",
    "english",
    "plot",
    "summary",
]
