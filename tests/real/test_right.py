"""The numbers on a real model: the authors' own, plain autograd's, and the same whichever way they are computed."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import tl_scopes as tls
from tests import zoo
from tests.real.model import FOLDER, GGUF
from tl_scopes import models
from tl_scopes.jacobian.fisher_information import fisher_root, leading_part, pulled_further

CASES = json.loads((Path(__file__).parents[1] / "data" / "smollm2.json").read_text())["cases"]
PROMPT = "The capital of France is"


def close(found: torch.Tensor, expected: torch.Tensor, share: float) -> None:
    """No score is off by more than this share of the largest."""
    assert (found.double() - expected.double()).abs().max() <= share * expected.abs().max()


@pytest.fixture(scope="module")
def answers(real: Any) -> list[dict[str, tls.Attribution]]:
    """Three scopes at each of the authors' prompts."""
    found = []
    for case in CASES:
        lin = tls.linearize(real, case["tokens"])
        scopes = {
            "semantic": tls.SemanticScope(case["target"]),
            "temperature": tls.TemperatureScope(),
            "fisher_rank1": tls.FisherScope(rank=1),
        }
        found.append({name: scope(lin) for name, scope in scopes.items()})
    return found


@pytest.mark.parametrize(("name", "share"), [("semantic", 2e-5), ("temperature", 2e-5), ("fisher_rank1", 2e-3)])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_authors_scores(answers: list[dict[str, tls.Attribution]], case: int, name: str, share: float) -> None:
    """Their code gives no score for the first token; their Fisher cancels where p is close to 1."""
    close(answers[case][name].scores[1:], torch.tensor(CASES[case][name]), share)


@pytest.mark.parametrize("case", range(len(CASES)))
def test_hugging_face_autograd(answers: list[dict[str, tls.Attribution]], hf: Any, case: int) -> None:
    """‖∂z_v/∂x_t‖ through `inputs_embeds` of the plain model."""
    ids = torch.tensor([CASES[case]["tokens"]])
    x = hf.get_input_embeddings()(ids).detach().requires_grad_()
    logit = hf(inputs_embeds=x, use_cache=False).logits[0, -1, CASES[case]["target"]]
    (gradient,) = torch.autograd.grad(logit, x)
    close(answers[case]["semantic"].scores, gradient[0].norm(dim=-1), 1e-6)


@pytest.mark.parametrize("case", range(len(CASES)))
def test_a_log_probability(real: Any, hf_in_double: Any, case: int) -> None:
    """‖∂ log p_v/∂x_t‖ through the plain model in float64.

    Plain autograd in float32 is off by 4e-6 to 7e-4 here, most where p is close to 1: its logits are rounded, and
    with them 1 − p.
    """
    ids, target = torch.tensor([CASES[case]["tokens"]]), CASES[case]["target"]
    x = hf_in_double.get_input_embeddings()(ids).detach().requires_grad_()
    log_probs = hf_in_double(inputs_embeds=x, use_cache=False).logits[0, -1].log_softmax(-1)
    (gradient,) = torch.autograd.grad(log_probs[target], x)
    found = tls.SemanticScope(target, quantity="log_prob")(tls.linearize(real, ids[0]))
    close(found.scores, gradient[0].norm(dim=-1), 2e-5)


@pytest.fixture(scope="module")
def hf_in_double(hf: Any) -> Any:
    """The same weights in float64; the rotary frequencies are those of float32, as in the model that is explained."""
    return copy.deepcopy(hf).double()


@pytest.fixture(scope="module")
def hf() -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER, attn_implementation="eager").eval().requires_grad_(False)


def test_an_answer_of_twelve_tokens(real: Any, hf: Any) -> None:
    """∂S/∂x through `inputs_embeds` of the plain model, S the log-probability of a whole answer; and of its rows."""
    answer = " Paris. It is a very large city on the river."
    lin = tls.linearize(real, PROMPT, answer=answer)
    assert isinstance(lin, tls.Span)
    ids, n = torch.tensor([[*lin.tokens.tolist(), lin.answer.ids[-1]]]), lin.prompt_length
    assert len(lin.answer) == 12
    x = hf.get_input_embeddings()(ids).detach().requires_grad_()
    log_probs = hf(inputs_embeds=x, use_cache=False).logits[0, n - 1 : -1].double().log_softmax(-1)
    S = log_probs.gather(-1, ids[0, n:, None]).sum()
    (gradient,) = torch.autograd.grad(S, x)
    found = tls.SemanticScope()(lin)
    close(found.scores, gradient[0, :n].norm(dim=-1), 1e-6)
    assert found.value == pytest.approx(float(S), rel=1e-5)
    rows = tls.answer_map(real, PROMPT, answer, tls.SemanticScope())
    close(rows[0:12].scores, found.scores, 1e-6)


def test_a_chat(real: Any) -> None:
    """The template of the model is applied, and what the model says is the likeliest text."""
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    said = tls.generate(real, chat, 8)
    assert said.text == "The capital of France is Paris."
    answer = tls.attribute(real, chat, tls.SemanticScope(), answer=said)
    assert set(answer.parts) >= {"user", "template"}
    assert answer.part("user").top(1)[0].token in (" capital", " France")


def test_it_is_the_model(real: Any) -> None:
    lin = tls.linearize(real, PROMPT)
    assert lin.str_tokens == ("<|im_start|>", "The", " capital", " of", " France", " is")
    assert lin.token().text == " Paris"
    assert lin.log_probs.max().exp() > 0.7


def test_a_gguf_file(real: Any) -> None:
    """Loaded from the file itself, the model is the same."""
    tokens = real.to_tokens(PROMPT)
    from_file = models.load(GGUF.parent, device="cpu")
    with torch.no_grad():
        assert_close(from_file(tokens), real(tokens), rtol=0, atol=1e-4)


def test_maps(real: Any) -> None:
    """Each row of a map is the answer at that position."""
    found = tls.attribution_map(real, PROMPT, tls.SemanticScope())
    for row in (2, 5):
        alone = tls.attribute(real, PROMPT, tls.SemanticScope(), row)
        close(found.scores[row][: row + 1], alone.scores, 1e-5)


def test_batches(real: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of unequal lengths in one batch, and cotangents in another number of batches."""
    prompts = [PROMPT, "Hot is the opposite of", "The keys to the old cabinet near the door"]
    scope = tls.TemperatureScope()
    alone = [tls.attribute(real, prompt, scope) for prompt in prompts]
    for one, many in zip(alone, tls.attribute_many(real, prompts, scope, batch_size=3), strict=True):
        close(many.scores, one.scores, 1e-4)
    lin = tls.linearize(real, PROMPT)
    cotangents = torch.eye(5, len(lin.readout))
    together = lin.squared_norms(cotangents)
    zoo.batches_of(monkeypatch, 2)
    close(lin.squared_norms(cotangents), together, 1e-5)


def test_checkpointing(real: Any) -> None:
    plain, checkpointed = (
        tls.attribute(real, PROMPT, tls.SemanticScope(), checkpoint=checkpoint) for checkpoint in (False, True)
    )
    close(checkpointed.scores, plain.scores, 1e-6)


def test_fisher_from_few_passes(real: Any) -> None:
    """32 passes of 576 come within a few percent, and their standard error says so; a truncation says what it holds."""
    lin = tls.linearize(real, PROMPT)
    exact, found = tls.FisherScope(exact=True)(lin).scores, tls.FisherScope()(lin)
    assert found.backward_passes == 32
    assert (found.scores - exact).abs().sum() < 0.03 * exact.sum()
    assert ((found.scores - exact) / found.standard_error).abs().max() < 5
    first = tls.FisherScope(rank=1)(lin)
    held = float(first.scores.sum() / exact.sum())
    assert first.score_share == pytest.approx(held, abs=0.12)
    assert first.trace_share > 0.3


def test_the_sketch_sees_more_of_the_scores(real: Any) -> None:
    """J stretches directions in which F is small: as many leading directions of F alone hold less of the scores."""
    lin = tls.linearize(real, PROMPT)
    part = leading_part(lin, 4, torch.Generator().manual_seed(0))
    (further,) = pulled_further([lin], [part], [lin.vjp(part.L)])
    held, plain = (lin.squared_norms(L).sum() for L in (part.and_also(further).L, fisher_root(lin)[:8]))
    assert held > 1.2 * plain
