"""How a model continues a time series: systems, numbers as tokens, influence by number, forecasts, a test of
whether influence sits on neighbours in delay-embedding space, and an intervention that asks the model itself.
"""

from tl_scopes.series.forecast import Forecast, Losses, forecast, losses
from tl_scopes.series.influence import SeriesInfluence, influence
from tl_scopes.series.intervention import Forecaster, Intervention, intervention
from tl_scopes.series.neighbors import NeighborTest, neighbor_test
from tl_scopes.series.numbers import Numbers, Spelling
from tl_scopes.series.systems import BrownianMotion, LogisticMap, Lorenz, System
from tl_scopes.tiny.markov import MarkovChain

__all__ = [
    "BrownianMotion",
    "Forecast",
    "Forecaster",
    "Intervention",
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
    "intervention",
    "losses",
    "neighbor_test",
]
