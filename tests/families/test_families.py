"""Every architecture of the table agrees with plain Hugging Face autograd, or is refused for the reason given there.

The README's command leaves these out; `pytest -m families -n auto` runs them.
"""

import pytest
import torch

import tl_scopes as tls
from tests.families.family import MAJOR, OPERATIONS, PROMPT, TOLERANCE, Family, examine, families, precisely
from tl_scopes import models

pytestmark = pytest.mark.families
FAMILIES = families()
ENOUGH = {"3": 70, "4": 75}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_family(family: Family) -> None:
    found, refusals = examine(family), family.refusals()
    asked = set(refusals) if not family.runs() else {*OPERATIONS}
    assert asked <= set(found), "an operation was not tried, or something that was refused works now"
    wrong = {
        name: outcome
        for name, outcome in found.items()
        if not (refusals[name].matches(outcome) if name in refusals else _agrees(outcome) or name == "logits")
    }
    assert not wrong
    off = next((refusal.logits_off_by for refusal in refusals.values()), 0.0)
    if off:
        assert found["logits"] == pytest.approx(off, rel=0.1), "lift the refusal if it is right by now"
    elif family.runs():
        assert _agrees(found["logits"]), "TransformerLens computes something else than Hugging Face"


def _agrees(outcome: float | Exception) -> bool:
    return isinstance(outcome, float) and outcome < TOLERANCE


def test_enough_architectures() -> None:
    """Variants of one architecture count once."""
    assert len({family.architecture for family in FAMILIES if family.runs()}) >= ENOUGH[MAJOR]


def _bridge(name: str) -> object:
    (family,) = (family for family in FAMILIES if family.name == name)
    return family.wrap(family.boot())


def test_attention_without_hooks_on_its_values() -> None:
    """JetMoE mixes tokens by attention patterns, but its values and heads are chosen by a router and have no hooks."""
    with precisely():
        model = _bridge("jetmoe")
        with pytest.raises(ValueError, match="no hooks on its values .* a router chooses .* SemanticScope or Fisher"):
            models.attention_layers(model, torch.tensor(PROMPT))
        with pytest.raises(models.AttentionOutOfReachError, match="cannot be held in JetMoe.*what its heads give out"):
            with models.held_attention(model):
                tls.linearize(model, PROMPT)


@pytest.mark.skipif(MAJOR != "3", reason="TransformerLens 4 keeps the mask")
def test_the_remedy_for_a_lost_mask() -> None:
    """DeepSeek under sdpa is refused on 3.9, and the advice in the message is enough."""
    with precisely():
        model, eager = _bridge("deepseek_v3_sdpa"), _bridge("deepseek_v3")
        with pytest.raises(TypeError, match=r'call model.original_model.set_attn_implementation\("eager"\)'):
            tls.linearize(model, PROMPT)
        model.original_model.set_attn_implementation("eager")
        scores = [tls.attribute(model, PROMPT, tls.SemanticScope()).scores for model in (model, eager)]
    torch.testing.assert_close(*scores)
