"""How the cost grows with the prompt, the width, the depth and the number of cotangents: demos/cost.png."""

from typing import Any

import pytest

from tests.benchmarks.rows import ROWS, Row, cotangents, measure, naive_rows
from tests.benchmarks.setting import CLOCK, setting

SIZES = {
    "tokens": (32, 64, 128, 256, 512),
    "width": (128, 256, 384, 512, 768),
    "layers": (2, 4, 8, 12, 16),
}
LINES = {name: ROWS[name] for name in ("Semantic Scope", "Temperature Scope", "captum Saliency, ‖gradient‖₂")}
LINES["each further cotangent"] = Row(cotangents(16), per=16)

POINTS = [(axis, value) for axis, values in SIZES.items() for value in values]


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize(("axis", "value"), POINTS)
@pytest.mark.benchmark(group="growth", timer=CLOCK)
def test_growth(benchmark: Any, axis: str, value: int, name: str) -> None:
    measure(benchmark, LINES[name], setting(**{axis: value}), rounds=3, name=name, axis=axis, value=value)


@pytest.mark.parametrize("count", [1, 2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("name", ["tl_scopes, in batches", "a loop of torch.autograd.grad"])
@pytest.mark.benchmark(group="growth", timer=CLOCK)
def test_growth_with_cotangents(benchmark: Any, count: int, name: str) -> None:
    """These costs include the forward pass."""
    row = {
        "tl_scopes, in batches": Row(cotangents(count, linearize=True)),
        "a loop of torch.autograd.grad": Row(lambda s: lambda: naive_rows(s, count)),
    }[name]
    measure(benchmark, row, setting(), rounds=3, name=name, axis="cotangents", value=count)
