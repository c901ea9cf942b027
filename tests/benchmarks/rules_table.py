"""Linear rules, and other scopes that might do better, which `known_causes_table` compares on a real model."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import tl_scopes as tls
from tests.benchmarks.known_causes_table import Method
from tl_scopes import models
from tl_scopes.jacobian.linearization import Linearization
from tl_scopes.jacobian.pullback import vjps
from tl_scopes.scopes.baselines import GradientTimesInput
from tl_scopes.scopes.target import TargetScope

REST = ("norms", "activations", "gates")
RULES: dict[str, Any] = {
    "linear": "linear",
    "lookup": "lookup",
    "no attention rule": REST,
}


@dataclass(frozen=True)
class Contrast(TargetScope):
    """g_t · (x_t − x̄) with the mean embedding x̄ of the vocabulary: what a token says more than any token would."""

    def measure(self, lin: Linearization) -> tls.Measurement:
        gradient = vjps([lin], [lin.cotangent(self.function(lin))[None]])[0][0]
        return tls.Measurement((gradient * (lin.embeddings - _mean(lin))).sum(-1))

    def unit(self, lin: Linearization) -> str:
        return self.quantity_unit(lin)


_means: dict[int, torch.Tensor] = {}


def _mean(lin: Linearization) -> torch.Tensor:
    """The mean embedding of the vocabulary, which takes a while: once for each model."""
    if id(lin.model) not in _means:
        _means[id(lin.model)] = models.mean_embedding(lin.model, len(lin.tokens))
    return _means[id(lin.model)]


KINDS: dict[str, Callable[..., tls.Scope]] = {
    "Semantic": tls.SemanticScope,
    "relevance": tls.RelevanceScope,
    "relevance, baseline prompt": partial(tls.RelevanceScope, baseline="prompt"),
    "gradient · (x − mean)": Contrast,
    "sizes": GradientTimesInput,
}


def _method(kind: Callable[..., tls.Scope], rules: Any) -> Method:
    def made(example: Any) -> tls.Scope:
        asked = {} if example is None else {"target": example.target, "versus": example.foil}
        scope = kind(**asked)
        return scope if rules is None else tls.UnderRulesScope(scope, rules)

    return made


METHODS: dict[str, Method] = {
    f"{name}, {called}": _method(kind, rules)
    for called, rules in {"own derivative": None, **RULES}.items()
    for name, kind in KINDS.items()
    if (name, rules) not in (("Semantic", None), ("sizes", None))  # are in the table already
}
