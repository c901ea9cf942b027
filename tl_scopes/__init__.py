"""Jacobian Scopes for TransformerLens: which input tokens move a prediction, and by how much."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tl_scopes.api import attribute, linearize
    from tl_scopes.corpus import attribute_many, attribution_map
    from tl_scopes.diagnostics.check_report import Check, Checks
    from tl_scopes.diagnostics.linearity import linearity
    from tl_scopes.diagnostics.linearity_report import LinearityReport
    from tl_scopes.diagnostics.sink_report import SinkReport
    from tl_scopes.diagnostics.sinks import sink_report
    from tl_scopes.faithfulness.evaluation import evaluate
    from tl_scopes.faithfulness.known_causes import known_causes
    from tl_scopes.jacobian.linearization import Linearization
    from tl_scopes.results.attribution import Attribution
    from tl_scopes.results.attribution_map import AttributionMap
    from tl_scopes.results.comparison import Comparison, compare
    from tl_scopes.scopes.corrections import FrozenAttentionScope, PositionCorrectedScope
    from tl_scopes.scopes.direction import DirectionScope
    from tl_scopes.scopes.fisher import FisherScope
    from tl_scopes.scopes.heta import HetaScope
    from tl_scopes.scopes.path_integrated import PathIntegratedScope
    from tl_scopes.scopes.scope import JacobianScope, Measurement, Scope
    from tl_scopes.scopes.semantic import SemanticScope
    from tl_scopes.scopes.spectral import SpectralScope
    from tl_scopes.scopes.temperature import TemperatureScope
    from tl_scopes.tiny import load_tiny

__all__ = [
    "Attribution",
    "AttributionMap",
    "Check",
    "Checks",
    "Comparison",
    "DirectionScope",
    "FisherScope",
    "FrozenAttentionScope",
    "HetaScope",
    "JacobianScope",
    "LinearityReport",
    "Linearization",
    "Measurement",
    "PathIntegratedScope",
    "PositionCorrectedScope",
    "Scope",
    "SemanticScope",
    "SinkReport",
    "SpectralScope",
    "TemperatureScope",
    "attribute",
    "attribute_many",
    "attribution_map",
    "compare",
    "evaluate",
    "known_causes",
    "linearity",
    "linearize",
    "load_tiny",
    "sink_report",
]

_HOME = {
    "Attribution": "results.attribution",
    "AttributionMap": "results.attribution_map",
    "Check": "diagnostics.check_report",
    "Checks": "diagnostics.check_report",
    "Comparison": "results.comparison",
    "DirectionScope": "scopes.direction",
    "FisherScope": "scopes.fisher",
    "FrozenAttentionScope": "scopes.corrections",
    "HetaScope": "scopes.heta",
    "JacobianScope": "scopes.scope",
    "LinearityReport": "diagnostics.linearity_report",
    "Linearization": "jacobian.linearization",
    "Measurement": "scopes.scope",
    "PathIntegratedScope": "scopes.path_integrated",
    "PositionCorrectedScope": "scopes.corrections",
    "Scope": "scopes.scope",
    "SemanticScope": "scopes.semantic",
    "SinkReport": "diagnostics.sink_report",
    "SpectralScope": "scopes.spectral",
    "TemperatureScope": "scopes.temperature",
    "attribute": "api",
    "attribute_many": "corpus",
    "attribution_map": "corpus",
    "compare": "results.comparison",
    "evaluate": "faithfulness.evaluation",
    "known_causes": "faithfulness.known_causes",
    "linearity": "diagnostics.linearity",
    "linearize": "api",
    "load_tiny": "tiny",
    "sink_report": "diagnostics.sinks",
}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use: torch takes a second, and `tl-scopes --help` needs none of it."""
    if name not in _HOME:
        raise AttributeError(f"module 'tl_scopes' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"tl_scopes.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return __all__
