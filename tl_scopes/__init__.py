"""Jacobian Scopes for TransformerLens: which input tokens move a prediction, and by how much."""

from tl_scopes.attribution import Attribution, Scope, attribute
from tl_scopes.linearization import Linearization, linearize
from tl_scopes.scopes.fisher import FisherScope
from tl_scopes.scopes.semantic import SemanticScope
from tl_scopes.scopes.temperature import TemperatureScope
from tl_scopes.tiny import load_tiny

__all__ = [
    "Attribution",
    "FisherScope",
    "Linearization",
    "Scope",
    "SemanticScope",
    "TemperatureScope",
    "attribute",
    "linearize",
    "load_tiny",
]
