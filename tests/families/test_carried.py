"""`carried_by` on every architecture of the table: whatever its layers are made of, the parts sum to the score.

`pytest -m families -n auto` runs them.
"""

import re
from typing import get_args

import pytest
from torch.testing import assert_close

import tl_scopes as tls
from tests.families.family import PROMPT, TOLERANCE, Family, families, precisely
from tl_scopes.circuits.cut import By

pytestmark = pytest.mark.families
RUNNING = [family for family in families() if family.runs()]
HYBRID = {"bamba", "jamba", "lfm2", "lfm2_moe", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"}
"""Architectures in which some layers have attention, and others something else."""
REFUSED = r"ForCausalLM has no hook on its|ForCausalLM give out something else|goes around the residual stream before"
"""What may be said of a cut that an architecture cannot be split by."""
SOURCES = [2, 5]


@pytest.mark.parametrize("family", RUNNING, ids=lambda family: family.name)
def test_parts_sum_to_the_score(family: Family) -> None:
    """By every cut, and on layers of every kind; or the cut is refused, in a sentence."""
    scope, answered = tls.SemanticScope(), set[str]()
    with precisely():
        lin = tls.linearize(family.wrap(family.boot()), PROMPT)
        scores = scope(lin).scores[SOURCES]
        for by in get_args(By):
            try:
                paths = tls.carried_by(lin, scope, by, SOURCES)
            except ValueError as error:
                if re.search(REFUSED, str(error)):
                    continue
                raise
            inner = tuple(range(1, paths.values.ndim - 1)) if by != "layer" else ()
            parts = (paths.values.sum(inner) if inner else paths.values) + paths.around
            for found in (paths.scores, parts):
                assert_close(found, scores.expand_as(found), rtol=TOLERANCE, atol=0)
            answered.add(by)
    if family.name in HYBRID:
        assert answered >= {"position", "layer", "head", "qkv"}
