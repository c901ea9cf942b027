"""Linear rules on every architecture of the table: values stay bit for bit, and what is left adds up, or is refused.

`pytest -m families -n auto` runs them.
"""

import re

import pytest
import torch

import tl_scopes as tls
from tests.families.family import PROMPT, Family, families, precisely

pytestmark = pytest.mark.families
RUNNING = [family for family in families() if family.runs()]

ROUNDED = {"recurrent_gemma": 1e-6}
"""Architectures that round to float32 inside a float64 model."""
WITH_CONSTANTS = {"gpt_oss", "openai-gpt", "xglm"}
"""Architectures with constants that are not called a bias, (up + 1)·glu or positions: these count as biases."""
REFUSED = {"bloom": "no rule for 'GeLUFunction'"}
"""Architectures with an operation that no rule knows, and the message."""
ENOUGH = 70


@pytest.mark.parametrize("family", RUNNING, ids=lambda family: family.name)
def test_rules(family: Family) -> None:
    with precisely():
        model = family.boot()
        with torch.no_grad():  # so that nothing but the tokens can speak for a logit
            for name, parameter in model.named_parameters():
                if re.search(r"bias|wpe|embed_positions|position_emb", name):
                    parameter.zero_()
        bridge = family.wrap(model)
        own = tls.linearize(bridge, PROMPT)
        if family.name in REFUSED:
            with pytest.raises(ValueError, match=REFUSED[family.name]):
                tls.linearize(bridge, PROMPT, rules="linear")
            return
        lookup, linear = (tls.linearize(bridge, PROMPT, rules=names) for names in ("lookup", "linear"))
        best, second = own.logits.topk(2).indices.tolist()
        answer = tls.RelevanceScope(best, versus=second)(linear)
    assert torch.equal(lookup.logits, own.logits)
    assert torch.equal(linear.logits, own.logits)
    assert answer.value == pytest.approx(float(own.logits[best] - own.logits[second]), rel=1e-9)
    if family.name not in WITH_CONSTANTS:
        assert answer.biases == pytest.approx(0, abs=ROUNDED.get(family.name, 1e-10) * abs(answer.value))


def test_enough_architectures() -> None:
    """Variants of one architecture count once."""
    covered = {family.architecture for family in RUNNING if family.name not in REFUSED}
    assert len(covered) >= ENOUGH
