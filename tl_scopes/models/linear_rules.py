"""A model made linear at a prompt: what only rescales or routes is constant for differentiation; its values stay."""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch.overrides import TorchFunctionMode

from tl_scopes.models.rewritten import Rewritten

Rules: TypeAlias = str | Iterable[str] | None
"""The name of a set of rules, "linear" or "lookup"; names of single rules; None for the model's own derivative."""

RULES: Mapping[str, str] = {
    "norms": "the denominators of norms are constant",
    "activations": "an activation act(x) is its secant act(x)/x, a constant, times x",
    "gates": "a product a·b is ½(a·b̄ + ā·b), with ā and b̄ constant: each factor has half of it",
    "patterns": "attention patterns, and all softmaxes, are constant",
    "pattern_value": "the product of attention pattern and values is shared out in halves",
    "query_key": "the product of queries and keys is shared out in halves",
}
"""Every rule, and what it does to derivatives."""

_REST = ("norms", "activations", "gates")
SETS: Mapping[str, tuple[str, ...]] = {
    "linear": (*_REST, "patterns"),
    "lookup": (*_REST, "pattern_value", "query_key"),
}
"""Sets of rules. Under "linear" the whole network is linear, so that inputs times derivatives add up to its value.
"lookup" keeps what moves attention, and so finds what is found by looking it up, and nothing adds up."""


@dataclass(frozen=True)
class LinearRules:
    """Which rules differentiate a model, in place of some of its own derivatives.

    Source: Achtibat et al. 2024 (arXiv:2402.05602), AttnLRP; Rezaei Jafari et al. 2025 (arXiv:2508.21258), RelP.
    Departure: they are rules for the derivative, so that every question that is asked of a Jacobian can be asked.
    """

    names: tuple[str, ...]

    @classmethod
    def read(cls, given: Rules) -> "LinearRules | None":
        """The rules that are named; None for None.

        Raises:
            ValueError: for an unknown name, no name, and rules that exclude one another.
            TypeError: for something that is not names.
        """
        if given is None or isinstance(given, LinearRules):
            return given
        names = [given] if isinstance(given, str) else list(given) if isinstance(given, Iterable) else [given]
        if isinstance(given, str) and given in SETS:
            names = list(SETS[given])
        if not all(isinstance(name, str) for name in names):
            raise TypeError(f'rules are named by texts, "linear" say, got {given!r}.')
        for name in names:
            if name in SETS:
                raise ValueError(
                    f"{name!r} is a set of rules, {listed(SETS[name])}: give it alone, rules={name!r}, or name single "
                    "rules."
                )
            if name not in RULES:
                raise ValueError(
                    f"there are no rules called {name!r}: sets of rules are {listed(SETS)}, single ones "
                    f"{listed(RULES)}."
                )
        if not names:
            raise ValueError("rules=() are no rules: leave them out, or take None, for the model's own derivative.")
        if "patterns" in names and ({"pattern_value", "query_key"} & set(names)):
            raise ValueError(
                'under "patterns" attention patterns are constant, so that "pattern_value" and "query_key" have '
                "nothing to share out: take one or the other."
            )
        return cls(tuple(name for name in RULES if name in names))

    def __str__(self) -> str:
        return next((name for name, rules in SETS.items() if set(rules) == set(self.names)), " + ".join(self.names))

    @property
    def conserve(self) -> bool:
        """Whether the whole network is linear under these rules, so that inputs times derivatives add up."""
        return set(SETS["linear"]) <= set(self.names)

    def applied(self) -> TorchFunctionMode:
        """Inside, what this thread computes is differentiated by the rules; no value changes by a bit."""
        return Rewritten(frozenset(self.names))


class _Within(ExitStack):
    """Several contexts as one, as often as it is entered."""

    def __init__(self, *contexts: AbstractContextManager[object]) -> None:
        super().__init__()
        self.contexts = contexts

    def __enter__(self) -> Any:
        for context in self.contexts:
            self.enter_context(context)
        return self


def within(rules: LinearRules | None, inner: AbstractContextManager[object]) -> AbstractContextManager[object]:
    """A context that is entered within rules, if there are any; as often as one likes."""
    return inner if rules is None else _Within(rules.applied(), inner)


def under(question: str, rules: "LinearRules | str | None") -> str:
    """A question as repr and pictures say it, with the rules it was asked under, unless it is written with them."""
    return question if rules is None or "UnderRulesScope(" in question else f"{question} under {rules} rules"


def listed(names: Iterable[str]) -> str:
    """Names, as errors list them."""
    return ", ".join(map(repr, names))
