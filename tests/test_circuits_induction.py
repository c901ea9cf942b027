"""On a circuit that is known, of two layers of attention: the previous-token head, the induction heads, and the keys by
which these look up what it wrote (K-composition); and where `carried_by` is blind to it."""

from importlib.metadata import version
from typing import Any

import pytest
import torch
from torch import Tensor

import tl_scopes as tls
from tests import induction

LENGTH, KNOWN = 10, 5
pytestmark = pytest.mark.skipif(
    version("transformer-lens").startswith("3."), reason="the native model of 3.9 has other weights"
)


@pytest.fixture(scope="module")
def model() -> Any:
    return induction.trained()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """A sequence twice, the second time up to a token whose successor is to come."""
    tokens = induction.twice(8, LENGTH, torch.Generator().manual_seed(7))
    return [row[: LENGTH + KNOWN + 1].tolist() for row in tokens]


def heads_by_attention(model: Any, prompts: list[list[int]], layer: int, offset: int, queries: slice) -> set[int]:
    """The heads that attend mostly from where they stand to so many positions before, as papers find them."""
    found = torch.zeros(4)
    for prompt in prompts:
        _, cache = model.run_with_cache(torch.tensor([prompt]))
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"][0]
        found += pattern.diagonal(-offset, -2, -1)[:, queries].mean(-1) / len(prompts)
    return set((found > 0.6).nonzero()[:, 0].tolist())


def ask(model: Any, prompt: list[int], by: Any, tokens: Any) -> tls.Paths:
    """What the token that comes next, in the second round, owes to earlier tokens."""
    lin = tls.linearize(model, prompt)
    return tls.carried_by(lin, tls.SemanticScope(prompt[KNOWN + 1]), by, tokens)


def softened(value: Tensor, hook: Any) -> Tensor:
    """Queries that look less sharply."""
    return 0.3 * value


def test_the_network_has_learned(model: Any, prompts: list[list[int]]) -> None:
    for prompt in prompts:
        assert int(tls.linearize(model, prompt).logits.argmax()) == prompt[KNOWN + 1]
    assert heads_by_attention(model, prompts, 0, 1, slice(0, LENGTH - 1)) == {2}
    assert heads_by_attention(model, prompts, 1, LENGTH - 1, slice(-4, None)) == {0, 1, 3}


def test_the_induction_heads(model: Any, prompts: list[list[int]]) -> None:
    """What the answer's own earlier occurrence does is carried by induction heads, through the values read there."""
    induction_heads = heads_by_attention(model, prompts, 1, LENGTH - 1, slice(-4, None))
    for prompt in prompts:
        heads = ask(model, prompt, "head", KNOWN + 1)
        assert {int(row.name[-1]) for row in heads.at(1).top(2)} < induction_heads
        assert heads.values[1, list(induction_heads)].sum() > 0.7 * heads.scores.sum()
        part = ask(model, prompt, "qkv", KNOWN + 1).at(1).top(1)[0]
        assert (part.name[-2:], part.position) == (".v", KNOWN + 1)


def test_a_saturated_lookup_has_no_slope(model: Any, prompts: list[list[int]]) -> None:
    """Where an induction head attends with .9 to one token, its pattern hardly moves, and what comes through its keys
    is hardly there: a first-order method does not see K-composition then."""
    for prompt in prompts:
        parts = ask(model, prompt, "qkv", KNOWN)
        assert parts.values[1, :, 1].sum().abs() < 0.1 * parts.scores.sum()


def test_the_previous_token_head_and_k_composition(model: Any, prompts: list[list[int]]) -> None:
    """With queries of a third, under which the answers stay right, the slope is there: the token before is moved to its
    successor by the previous-token head of layer 0, and read there through the induction heads' keys."""
    moved, read = 0, 0
    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_q", softened)]):
        for prompt in prompts:
            assert int(tls.linearize(model, prompt).logits.argmax()) == prompt[KNOWN + 1]
            first = ask(model, prompt, "head", KNOWN).at(0).top(1)[0]
            moved += (first.name, first.position) == ("L0H2", KNOWN + 1)
            part = ask(model, prompt, "qkv", KNOWN).at(1).top(1)[0]
            read += (part.name, part.position) in {(f"L1H{head}.k", KNOWN + 1) for head in (0, 1, 3)}
    assert (moved, read) >= (6, 5)
