"""The table of costs in docs/costs.md: 128 tokens, 8 layers, width 512, 32,000 words, float32."""

from typing import Any

import pytest
import torch
from torch.testing import assert_close

import tl_scopes as tls
from tests.benchmarks.rows import BUNDLED, ROWS, captum_saliency, inseq_attribution, measure, naive_gradient, naive_rows
from tests.benchmarks.setting import CLOCK, bundled, setting


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.benchmark(group="cost", timer=CLOCK)
def test_cost(benchmark: Any, name: str) -> None:
    measure(benchmark, ROWS[name], setting(), name=name)


@pytest.mark.parametrize("name", BUNDLED)
@pytest.mark.benchmark(group="bundled", timer=CLOCK)
def test_cost_on_the_bundled_model(benchmark: Any, name: str) -> None:
    measure(benchmark, BUNDLED[name], bundled(), name=f"bundled model: {name}")


# The rows that are compared compute the same numbers.


def test_saliency_is_semantic_scope() -> None:
    """The norms of captum, of inseq and of a plain gradient are the same, token by token."""
    s = setting()
    scores = tls.attribute(s.model, s.prompt, tls.SemanticScope()).scores
    assert_close(naive_gradient(s).norm(dim=-1), scores, rtol=1e-4, atol=0)
    pytest.importorskip("captum")
    assert_close(captum_saliency(s)().detach(), scores, rtol=1e-4, atol=0)
    pytest.importorskip("inseq")
    assert_close(inseq_attribution("saliency")(s)().norm(dim=-1), scores, rtol=1e-4, atol=0)


def test_naive_rows_are_the_jacobian() -> None:
    s = setting()
    lin = tls.linearize(s.model, s.prompt)
    rows = lin.vjp(torch.eye(len(lin.readout))[:8])
    assert (naive_rows(s, 8) - rows).norm() <= 1e-5 * rows.norm()
