"""Scopes as a user writes them, and what their options may hold, for the tests and the processes that they start.

It is a file of its own since pytest rewrites the code of test files, which another process would find as it was.
"""

import functools
import operator
import pathlib
import re
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import InitVar, dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

import tl_scopes as tls


class Plain(tls.Scope):
    """Not a dataclass, so that its repr has an address."""

    def __init__(self, alpha: Any) -> None:
        self.alpha = alpha

    def measure(self, lin: tls.Linearization) -> tls.Measurement:
        alpha = torch.as_tensor(self.alpha)[: len(lin.tokens)] if isinstance(self.alpha, pd.Series) else self.alpha
        return tls.Measurement(alpha * torch.arange(len(lin.tokens)).double())

    def unit(self, lin: tls.Linearization) -> str:
        return "test"


class Named(Plain):
    """A repr of its own that says nothing of its options."""

    def __repr__(self) -> str:
        return "Named()"


class Slotted:
    __slots__ = ("a",)

    def __init__(self, a: Any) -> None:
        self.a = a


@dataclass(frozen=True, eq=False)
class Holding(Plain):
    """A scope that holds anything."""

    alpha: float = 1.0
    option: Any = None


@dataclass(frozen=True)
class Derived(tls.SemanticScope):
    """An argument that is not kept, but for what was made of it."""

    scale: InitVar[float] = 1.0
    factor: float = field(init=False)
    cache: list[int] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self, scale: float) -> None:  # type: ignore[override]
        super().__post_init__()
        object.__setattr__(self, "factor", 2 * scale)


class Undecorated(tls.SemanticScope):
    """Derived from a dataclass, without being made one itself."""

    def __init__(self, alpha: float) -> None:
        super().__init__()
        object.__setattr__(self, "alpha", alpha)


class Lazy(Plain):
    """What it works out and keeps is not one of its options."""

    @functools.cached_property
    def table(self) -> Tensor:
        return torch.ones(3)


class Secretive(Plain):
    """Holds a lock-like thing, and says what counts."""

    def __init__(self, alpha: float) -> None:
        super().__init__(alpha)
        self.stream = (number for number in range(3))

    def __getstate__(self) -> dict[str, Any]:
        return {"alpha": self.alpha}


class Color(Enum):
    RED = 1
    BLUE = 2


FACTOR = 3


def helper(x: float) -> float:
    return FACTOR * x


def uses_helper(x: float) -> float:
    """With a docstring."""
    return sum([helper(y) for y in (x,)])


TABLE = {"a": 1, "b": [2, (3, {"x", "y", 4.0})]}
FUNCTIONS = {helper, uses_helper, abs}
"""A set of which two parts refer to one another, in another order in each process."""


class Settings:
    step = 2


@functools.cache
def cached(x: float) -> float:
    return helper(x)


def looks_up(x: float) -> float:
    return float(TABLE["a"]) * Settings.step + len(FUNCTIONS) + cached(x)  # type: ignore[arg-type]


def scaled(alpha: float) -> Callable[[float], float]:
    return lambda x: alpha * x


def local_class(alpha: float) -> type[Plain]:
    class Local(Plain):
        def unit(self, lin: tls.Linearization) -> str:
            return f"{alpha}"

    return Local


def with_hook(function: Callable[..., Any]) -> nn.Module:
    module = linear(0)
    module.register_forward_hook(function)
    return module


def linear(seed: int) -> nn.Module:
    module = nn.Linear(3, 2)
    with torch.no_grad():
        module.weight.fill_(seed)
        module.bias.fill_(1.0)
    return module


def loop() -> list[Any]:
    found: list[Any] = [1]
    found.append(found)
    return found


def looked_at() -> Lazy:
    lazy = Lazy(1.0)
    assert lazy.table is not None
    return lazy


# fmt: off
ALL_DIFFERENT: tuple[Callable[[], Any], ...] = (
    lambda: None, lambda: 1, lambda: True, lambda: 1.0, lambda: "1", lambda: b"1", lambda: 1j, lambda: ..., lambda: (),
    lambda: [1, 2], lambda: (1, 2), lambda: range(1, 3), lambda: slice(1, 2), lambda: torch.Size([1, 2]), loop,
    # Tensors and arrays
    lambda: torch.ones(2), lambda: torch.ones(2, dtype=torch.bfloat16), lambda: torch.ones(1, 2),
    lambda: torch.empty(0),
    lambda: torch.tensor(1.0), lambda: torch.tensor([True]), lambda: torch.eye(3)[:, ::2], lambda: torch.ones(2).to(1j),
    lambda: np.arange(5000), lambda: -np.arange(5000), lambda: np.float64(1), lambda: np.float32(1),
    lambda: np.array([1, "a"], object), lambda: np.array([1, "b"], object), lambda: np.ma.array([1, 2], mask=[0, 1]),
    lambda: pd.Series(range(5000)), lambda: pd.Series([*range(2500), -1, *range(2501, 5000)]),
    lambda: pd.Series(["a", "b"]), lambda: pd.Series(["a", "b"], dtype="category"), lambda: pd.DataFrame({"a": [1, 2]}),
    lambda: torch.float32, lambda: torch.float64, lambda: torch.device("cpu"), lambda: torch.device("meta"),
    # Modules
    lambda: linear(0), lambda: linear(1), lambda: linear(0).eval(), lambda: nn.Sequential(linear(0), nn.GELU()),
    lambda: nn.Sequential(linear(0), nn.ReLU()), lambda: with_hook(helper), lambda: with_hook(uses_helper),
    # Containers
    lambda: {"a": [1, (2, "x")]}, lambda: {"a": [1, (2, "y")]}, lambda: {"b", "c", "d"}, lambda: frozenset("bcd"),
    lambda: OrderedDict(a=1), lambda: defaultdict(list, a=1), lambda: Counter(a=1), lambda: deque([1]),
    lambda: {1: {2}}, lambda: {1: {3}},
    # Functions and classes
    lambda: helper, lambda: uses_helper, lambda: looks_up, lambda: cached, lambda: FUNCTIONS, lambda: {helper, abs},
    lambda: torch.relu, lambda: torch.tanh, lambda: torch.vmap(helper),
    lambda: (lambda x: x), lambda: (lambda x: -x), lambda: (lambda x, y=1: x), lambda: (lambda x, y=2: x),
    lambda: scaled(1.0), lambda: scaled(2.0), lambda: functools.partial(helper, 1),
    lambda: functools.partial(helper, 2),
    lambda: operator.itemgetter(1), lambda: operator.itemgetter(2), lambda: [].append, lambda: Plain(1.0).unit,
    lambda: Plain, lambda: Named, lambda: local_class(1.0), lambda: local_class(2.0), lambda: torch.nn,
    # Other objects
    lambda: Color.RED, lambda: Color.BLUE, lambda: pathlib.Path("a"), lambda: re.compile("a"), lambda: re.compile("b"),
    lambda: Slotted(1), lambda: Slotted(2),
    # Scopes
    lambda: Plain(1.0), lambda: Plain(-1.0), lambda: Plain(torch.ones(2)), lambda: Plain(Plain(1.0)), lambda: Lazy(1.0),
    lambda: Named(1.0), lambda: Named(-1.0), lambda: Secretive(1.0), lambda: Secretive(2.0),
    lambda: local_class(1.0)(1.0), lambda: local_class(2.0)(1.0), lambda: Holding(),
    lambda: Holding(option=linear(0)), lambda: Holding(option=linear(1)),
    lambda: Plain(pd.Series(range(99))), lambda: Derived(), lambda: Derived(scale=2.0),
    lambda: Undecorated(1.0), lambda: Undecorated(2.0), lambda: tls.SemanticScope(3), lambda: tls.FisherScope(),
    lambda: tls.PositionCorrectedScope(tls.SemanticScope(3)),
)
ALIKE: tuple[tuple[Callable[[], Any], Callable[[], Any]], ...] = (
    (torch.Generator, lambda: torch.Generator().manual_seed(3)),
    (lambda: np.random.default_rng(1), lambda: np.random.default_rng(2)),
    (lambda: torch.eye(3).to_sparse(), lambda: torch.eye(3)),
    (lambda: torch.ones(3, requires_grad=True), lambda: torch.ones(3)),
    (lambda: Lazy(1.0), looked_at),
    (lambda: {"a": 1}, lambda: MappingProxyType({"a": 1})),
    (lambda: linear(0), lambda: linear(0).requires_grad_(False)),
)
# fmt: on
