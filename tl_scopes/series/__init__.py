"""How a model continues a time series: systems, numbers as tokens, influence by number, forecasts, and a test of
whether it looks at neighbours in delay-embedding space.
"""

from tl_scopes.series.forecast import Forecast, Losses, forecast, losses
from tl_scopes.series.influence import SeriesInfluence, influence
from tl_scopes.series.neighbors import NeighborTest, neighbor_test
from tl_scopes.series.numbers import Numbers, Spelling
from tl_scopes.series.systems import BrownianMotion, LogisticMap, Lorenz, System
from tl_scopes.tiny.markov import MarkovChain

__all__ = [
    "BrownianMotion",
    "Forecast",
    "LogisticMap",
    "Lorenz",
    "Losses",
    "MarkovChain",
    "NeighborTest",
    "Numbers",
    "SeriesInfluence",
    "Spelling",
    "System",
    "forecast",
    "influence",
    "losses",
    "neighbor_test",
]
