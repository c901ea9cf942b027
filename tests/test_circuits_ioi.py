"""GPT-2 small's heads for indirect objects, against the published list: `pytest -m weights`, where the weights are.

The weights are those of a folder named by TL_SCOPES_GPT2, or of the Hugging Face cache; nothing is downloaded.
"""

import os
from typing import Any

import pytest
import torch

import tl_scopes as tls
from tl_scopes import models

pytestmark = pytest.mark.weights

PUBLISHED = {
    "name movers": ("L9H9", "L10H0", "L9H6"),
    "negative name movers": ("L10H7", "L11H10"),
    "backup name movers": ("L9H0", "L9H7", "L10H1", "L10H2", "L10H6", "L10H10", "L11H2", "L11H9"),
    "S-inhibition": ("L7H3", "L7H9", "L8H6", "L8H10"),
    "induction": ("L5H5", "L5H8", "L5H9", "L6H9"),
    "duplicate token": ("L0H1", "L0H10", "L3H0"),
    "previous token": ("L2H2", "L4H11"),
}
"""Wang et al. 2022 (arXiv:2211.00593), figure 2: 26 of 144 heads."""
NAMES = [("John", "Mary"), ("Tom", "James"), ("Dan", "Sid"), ("Martin", "Amy")]
PLACES = [("store", "drink"), ("park", "ball"), ("office", "letter")]


def weights() -> str | None:
    """The folder or name to load, if it is at hand."""
    if folder := os.environ.get("TL_SCOPES_GPT2"):
        return folder
    from huggingface_hub import try_to_load_from_cache

    found = (try_to_load_from_cache(name, "model.safetensors") for name in ("openai-community/gpt2", "gpt2"))
    return "gpt2" if any(isinstance(path, str) for path in found) else None


@pytest.fixture(scope="module")
def gpt2() -> Any:
    name = weights()
    if name is None:
        pytest.skip("GPT-2 small is not here: name its folder in TL_SCOPES_GPT2")
    return models.load(name, device="cpu")


@pytest.fixture(scope="module")
def pairs(gpt2: Any) -> list[tls.PromptPair]:
    """Who gave is named twice; in the corrupted prompt the other name is."""
    found = []
    for a, b in [*NAMES, *((b, a) for a, b in NAMES)]:
        for place, thing in PLACES:
            start = f"When {a} and {b} went to the {place},"
            clean, corrupted = f"{start} {b} gave a {thing} to", f"{start} {a} gave a {thing} to"
            found.append(tls.PromptPair(gpt2, clean, corrupted, answer=f" {a}", wrong=f" {b}"))
    return [pair for pair in found if pair.is_confirmed]


def first_heads(effects: list[tls.Effects], count: int) -> list[str]:
    mean = torch.stack([one.normalized for one in effects]).mean(0).abs().flatten()
    return [effects[0].names[i] for i in mean.topk(count).indices.tolist()]


def test_the_model_does_the_task(pairs: list[tls.PromptPair]) -> None:
    assert len(pairs) >= 16


def test_published_heads_stand_first(pairs: list[tls.PromptPair]) -> None:
    """Of 15 heads drawn at random fewer than 3 would be in the list of 26; carried_by sees the clean prompts alone."""
    known = {head for heads in PUBLISHED.values() for head in heads}
    for effects in ([pair.carried() for pair in pairs], [pair.attribution_patching() for pair in pairs]):
        first = first_heads(effects, 15)
        assert len(known & set(first)) >= 8, first
        assert {"L7H9", "L8H6", "L8H10", "L9H9"} & set(first), first


def test_heads_agree_with_patching(pairs: list[tls.PromptPair]) -> None:
    summary = tls.agreement(pairs[:6]).summary().set_index("method")
    assert summary.loc["carried", "pearson"] > 0.6
    assert summary.loc["attribution patching", "pearson"] > 0.8
