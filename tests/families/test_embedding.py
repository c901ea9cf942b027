"""What stands at the embedding hook for the whole vocabulary, behind scales, norms and positions."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import tl_scopes as tls
from tests.families.family import PROMPT, Family, families, precisely
from tl_scopes import models
from tl_scopes.diagnostics.evidence import Evidence
from tl_scopes.scopes.baselines import LeaveOneOut

OTHER_THAN_WEIGHTS = ("bloom", "granite", "modernbert-decoder")
"""Families where the hook stands behind a norm or a scale, on some version of TransformerLens."""
FAMILIES = {family.name: family for family in families() if family.runs()}
EXACT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}
HOLDS_POSITIONS = ("bert",)


def loaded(family: Family) -> Any:
    return family.wrap(family.boot())


@pytest.mark.parametrize(
    "name",
    [
        name if name in OTHER_THAN_WEIGHTS else pytest.param(name, marks=pytest.mark.families)
        for name in FAMILIES
        if name not in HOLDS_POSITIONS
    ],
)
def test_the_matrix_is_what_stands_at_the_hook(name: str) -> None:
    """So is the mean embedding the mean of its rows, and hooks that are set act on neither."""
    with precisely():
        model = loaded(FAMILIES[name])
        assert not models.holds_positions(model)
        with model.hooks(fwd_hooks=[("hook_embed", lambda value, hook: value * 0)]):
            table, mean = models.embedding_matrix(model), models.mean_embedding(model, 5)
        assert len(table) == models.vocabulary_size(model) == models.output_size(model) == model.cfg.d_vocab
        assert_close(table[PROMPT], models.embed(model, torch.tensor([PROMPT]))[0], **EXACT)
        assert_close(table[PROMPT], tls.linearize(model, PROMPT).embeddings, **EXACT)
        assert_close(mean, table.mean(0), **EXACT)


@pytest.mark.parametrize("name", OTHER_THAN_WEIGHTS)
def test_one_mean_takes_a_tokens_place(name: str) -> None:
    """The checks, the report on linearity and leave-one-out replace a token by the same embedding."""
    with precisely():
        lin = tls.linearize(loaded(FAMILIES[name]), PROMPT)
        scope = tls.SemanticScope()
        found = Evidence(lin, scope, scope(lin), thorough=True).effects
        report = tls.linearity(lin, scope, directions=1, sizes=[0.1])
        mean = models.embedding_matrix(lin.model).mean(0)
        assert found.divergence is not None
        assert_close(found.divergence, LeaveOneOut("mean")(lin).scores[found.positions], **EXACT)
        assert_close(report.removal_distance, (mean - lin.embeddings).norm(dim=-1), **EXACT)


@pytest.mark.parametrize("name", HOLDS_POSITIONS)
def test_an_embedding_that_holds_positions(name: str) -> None:
    """It has no matrix; what needs one says so, the other checks are made, and further inside all of them are."""
    with precisely():
        lin = tls.linearize(loaded(FAMILIES[name]), PROMPT)
        assert models.holds_positions(lin.model)
        asked: list[Callable[[], Any]] = [
            lambda: models.embedding_matrix(lin.model),
            lambda: tls.linearity(lin, tls.SemanticScope()),
        ]
        for ask in asked:
            with pytest.raises(ValueError, match=r"the embedding of BertLMHeadModel holds positions at 'hook_embed'"):
                ask()
        checks = tls.check(lin, tls.SemanticScope())
        assert checks["linearity"].verdict == "not applicable"
        assert checks["linearity"].finding.startswith("the embedding of BertLMHeadModel holds positions")
        assert checks["leave-one-out"].verdict != "not applicable"
        (direction,) = tls.SpectralScope().directions(lin, 2, 1)
        assert direction.towards == direction.away == ()
        inside = tls.linearize(lin.model, PROMPT, wrt="blocks.0.hook_resid_pre")
        assert tls.linearity(inside, tls.SemanticScope(), directions=1).radius.isfinite().any()
