"""Evidence about scopes that a real model gives: causes that are known, of prompts that it can do."""

from typing import Any

import pytest
import torch

import tl_scopes as tls
from tl_scopes import models
from tl_scopes.faithfulness import confirm, english
from tl_scopes.faithfulness.english import KINDS


def test_most_english_examples_are_confirmed(real: Any) -> None:
    """At least 20 of each kind, and 250 in all: the model prefers the answer, and owes that to the causes."""
    found = {kind: confirm(real, english(kind)) for kind in KINDS}  # as strictly as one's own: all of them fit
    answers = {text for some in found.values() for one in some for text in (one.example.answer, one.example.foil)}
    assert all(len(models.read_target(real, text)) == 1 for text in answers)
    counts = {kind: sum(one.is_confirmed for one in some) for kind, some in found.items()}
    assert min(counts.values()) >= 20, counts
    assert sum(counts.values()) >= 250, counts


def test_known_causes_of_a_real_model(real: Any) -> None:
    """By default they are the English ones, of as many tokens as the model's tokenizer makes of them."""
    scopes = {"versus": lambda example: tls.SemanticScope(example.target, versus=example.foil)}
    results = tls.known_causes(real, count=2, scopes=scopes)
    assert set(results.task) == set(KINDS)
    precision = results[results.measure == "average precision"].groupby("task").value.mean()
    assert precision["antonym"] > 0.3


@pytest.mark.filterwarnings("error::UserWarning:tl_scopes")
def test_the_default_path_is_complete(real: Any) -> None:
    """Its points go where the logit swings: the contributions sum to the change within 2%, without a warning."""
    answer = tls.attribute(real, "The opposite of hot is", tls.PathIntegratedScope())
    assert abs(answer.completeness_gap) < 0.02 * abs(answer.value - answer.baseline_value)


@pytest.mark.filterwarnings("error::UserWarning:tl_scopes")
def test_a_path_from_the_mean_is_complete(real: Any) -> None:
    """There every position is a sink, and the logit jumps by 20 where one after another stops being one."""
    answer = tls.attribute(real, "The capital of France is", tls.PathIntegratedScope(baseline="mean"))
    assert abs(answer.completeness_gap) < 0.02 * abs(answer.value - answer.baseline_value)


def test_every_position_of_the_mean_is_a_sink(real: Any) -> None:
    """Where all hold the same vector the last one, too, sees copies of itself alone, and has a first token's norm."""
    lin = tls.linearize(real, "The capital of France is", of="blocks.15.hook_resid_post")
    mean = models.mean_embedding(real, len(lin.tokens)).to(lin.embeddings).expand_as(lin.embeddings)
    alike, own = lin.evaluate(torch.stack([mean, lin.embeddings]))[0].norm(dim=-1).tolist()
    assert alike > 50 * own


def test_a_predicted_radius_is_cut_short(real: Any) -> None:
    """The curvature vanishes along " The" in this prompt, where the prediction alone was off by 99 times."""
    lin = tls.linearize(real, "The capital of France is")
    report = tls.linearity(lin, tls.SemanticScope(), positions=[1], directions=1)
    assert float(report.predicted_radius[0, 0]) <= 2 * float(report.radius[0, 0])
