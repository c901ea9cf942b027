"""How cost and memory grow with the prompt, the width, the depth, the batch and the number of cotangents.

`tests/benchmarks/report.py` draws demos/cost.png of it, and gives the slope of each line.
"""

from typing import Any

import pytest

from tests.benchmarks.rows import ROWS, Row, Work, cotangents, measure, naive_rows
from tests.benchmarks.setting import CLOCK, setting
from tests.benchmarks.throughput import ours
from tl_scopes.models.memory import _Living

SIZES = {
    "tokens": (16, 32, 64, 128, 256, 512, 1024, 2048),
    "width": (128, 256, 384, 512, 768),
    "layers": (2, 4, 8, 12, 16),
}
LINES = {name: ROWS[name] for name in ("Semantic Scope", "Temperature Scope", "captum Saliency, ‖gradient‖₂")}
LINES["each further cotangent"] = Row(cotangents(16), per=16)
WITH_MEMORY = ("Semantic Scope", "captum Saliency, ‖gradient‖₂")
BATCHED = "attribute_many, each prompt"

POINTS = [(axis, value) for axis, values in SIZES.items() for value in values]


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize(("axis", "value"), POINTS)
@pytest.mark.benchmark(group="growth", timer=CLOCK)
def test_growth(benchmark: Any, axis: str, value: int, name: str) -> None:
    row, here = LINES[name], setting(**{axis: value})
    held = {"bytes": height(row.make(here))} if name in WITH_MEMORY else {}
    measure(benchmark, row, here, rounds=3, name=name, axis=axis, value=value, **held)


@pytest.mark.parametrize("count", [1, 2, 4, 8, 16])
@pytest.mark.benchmark(group="growth", timer=CLOCK)
def test_growth_with_the_batch(benchmark: Any, count: int) -> None:
    """Prompts of 32 tokens that go through the model together; the cost of each in forward passes of one."""
    here = setting(tokens=32)
    row = Row(lambda s: ours(s.model, [s.prompt] * count, count), per=count)
    measure(benchmark, row, here, rounds=3, name=BATCHED, axis="batch", value=count, bytes=height(row.make(here)))


def height(work: Work) -> int:
    """The most bytes that the tensors take which work makes, the model's own left out."""
    work()  # what is found out once about a model is known from here on
    with _Living() as living:
        work()
    return max(living.after)


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
