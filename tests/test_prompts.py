"""What may be a prompt: text with and without BOS, ids, what a tokenizer returned; and what is told of it."""

import copy
from html import escape
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import tl_scopes as tls
from tests import zoo
from tl_scopes import models
from tl_scopes.faithfulness import Perturbation

TEXT = "The keys to the old cabinet"
KINDS = ["bridge", *(["hooked"] if zoo.HookedTransformer else [])]


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> Any:
    return tls.load_tiny(request.param)


def ids(model: Any, prompt: Any, **options: Any) -> list[int]:
    return models.tokenize(model, prompt, **options).tolist()


def test_text_that_begins_with_bos_gets_no_second_one(model: Any) -> None:
    """As a chat template writes it; with the same scores as the plain text, and a note that says so."""
    plain = tls.attribute(model, TEXT, tls.SemanticScope())
    begun = tls.attribute(model, "<|bos|>" + TEXT, tls.SemanticScope())
    assert torch.equal(begun.tokens, plain.tokens)
    assert torch.equal(begun.scores, plain.scores)
    assert plain.notes == ()
    assert begun.notes == ("the text begins with '<|bos|>', so that no second one was put in front",)
    assert escape(begun.notes[0]) in begun.to_html()


def test_every_entry_point_notes_it(model: Any) -> None:
    text, scope = "<|bos|>" + TEXT, tls.SemanticScope()
    prompt_map = tls.attribution_map(model, text, scope)
    [many] = tls.attribute_many(model, [text], scope, progress=False)
    for answer in (prompt_map[-1], prompt_map[0], many, scope(tls.linearize(model, text))):
        assert "no second one was put in front" in answer.notes[0]
        assert answer.str_tokens.count("<|bos|>") == 1


def test_without_bos_text_is_as_it_is(model: Any) -> None:
    assert ids(model, "<|bos|>" + TEXT, prepend_bos=False) == ids(model, TEXT, prepend_bos=True)
    assert models.read_prompt(model, "<|bos|>" + TEXT, prepend_bos=False).notes == ()


@pytest.mark.parametrize("prepend_bos", [None, True, False])
@pytest.mark.parametrize("count", [2, 3])
def test_text_with_two_bos_is_taken_as_it_is(model: Any, count: int, prepend_bos: bool | None) -> None:
    """With the note on ids like it; none of them is taken for one that was put in front."""
    read = models.read_prompt(model, "<|bos|>" * count + TEXT, prepend_bos)
    assert read.tokens.tolist() == [model.tokenizer.bos_token_id] * (count - 1) + ids(model, TEXT, prepend_bos=True)
    assert read.notes == ("the text begins with '<|bos|>' twice",)


def test_ids_with_two_bos_are_taken_as_they_are(model: Any) -> None:
    twice = [model.tokenizer.bos_token_id, *ids(model, TEXT)]
    read = models.read_prompt(model, twice)
    assert read.tokens.tolist() == twice
    assert read.notes == ("the ids begin with '<|bos|>' twice",)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tensors", [None, "pt", "np"])
def test_what_a_tokenizer_returned(model: Any, side: str, tensors: str | None) -> None:
    """Ids and mask: padding on either side goes, and the answers are those of the texts."""
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.padding_side = side
    texts = [TEXT, "The keys"]
    expected = [tokenizer(text)["input_ids"] for text in texts]
    batch = tokenizer(texts, padding=True, return_tensors=tensors)
    answers = list(tls.attribute_many(model, batch, tls.SemanticScope(), progress=False))
    assert [answer.tokens.tolist() for answer in answers if answer] == expected
    alone = tls.attribute(model, tokenizer([TEXT], return_tensors=tensors), tls.SemanticScope())
    assert alone.tokens.tolist() == expected[0]
    assert alone.notes == ()


@pytest.mark.parametrize("side", ["begin", "end"])
def test_padded_rows_of_ids_are_noted(model: Any, side: str) -> None:
    padding = [model.tokenizer.pad_token_id] * 3
    row = padding + ids(model, TEXT) if side == "begin" else ids(model, TEXT) + padding
    answer = tls.attribute(model, row, tls.SemanticScope())
    assert len(answer.tokens) == len(row)
    assert (
        f"the ids {side} with padding (3 of '{model.tokenizer.pad_token}'), which is taken for a part"
        in (answer.notes[0])
    )


def test_masks_that_do_not_fit(model: Any) -> None:
    row = ids(model, TEXT)
    for mask, message in (
        ([1] * (len(row) - 1), f"must have a 0 or 1 for each of the {len(row)} ids"),
        ([2] * len(row), f"must have a 0 or 1 for each of the {len(row)} ids"),
        ([1, 0, *[1] * (len(row) - 2)], "leaves out ids in the middle of the prompt"),
    ):
        with pytest.raises(ValueError, match=message):
            models.tokenize(model, {"input_ids": row, "attention_mask": mask})
    with pytest.raises(ValueError, match="the prompt is empty"):
        models.tokenize(model, {"input_ids": row, "attention_mask": [0] * len(row)})


@pytest.mark.usefixtures("no_type_checks")
def test_tables_are_not_prompts(model: Any) -> None:
    """Their iteration would give the names of the columns."""
    table = pd.DataFrame({"text": [TEXT], "label": [1]})
    for prompts in (table, {"text": [TEXT], "label": [1]}):
        with pytest.raises(TypeError, match=r"with \['text', 'label'\]: give one of its columns, prompts\['text'\]"):
            tls.attribute_many(model, prompts, tls.SemanticScope())
    with pytest.raises(TypeError, match=r"a chat is a list of messages, got one message: write \[message\]"):
        tls.linearize(model, {"role": "user", "content": "Hello"})
    with pytest.raises(TypeError, match=r"this dict has \['text'\] and no 'input_ids'"):
        tls.attribute(model, {"text": TEXT}, tls.SemanticScope())
    with pytest.raises(TypeError, match="a prompt is a str or token ids, got a DataFrame: give one of its cells"):
        tls.attribute(model, table, tls.SemanticScope())
    assert len(list(tls.attribute_many(model, table["text"], tls.SemanticScope(), progress=False))) == 1


def test_arrays_of_ids(model: Any) -> None:
    row = ids(model, TEXT)
    for prompt in (np.array(row), np.array([row]), torch.tensor([row]), tuple(row)):
        assert ids(model, prompt) == row


def test_half_a_character(model: Any) -> None:
    with pytest.raises(ValueError, match=r"the prompt 'a\\ud800b' is not valid Unicode: at 1 it has '\\ud800', half"):
        models.tokenize(model, "a\ud800b")
    with pytest.raises(ValueError, match=r"the target '\\udc80' is not valid Unicode: at 0"):
        tls.attribute(model, TEXT, tls.SemanticScope("\udc80"))


# -- hooks of the user's that count from the end ----------------------------------------------------------------------


def louder(value: torch.Tensor, hook: Any) -> torch.Tensor:
    value = value.clone()
    value[:, -1] *= 3
    return value


def test_hooks_that_count_from_the_end_meet_no_padding(model: Any) -> None:
    """With hooks of the user's set, prompts of a batch have one length."""
    prompts = [TEXT, "The keys", "The wheel", TEXT + " near", "The old keys to"]
    with model.hooks(fwd_hooks=[("blocks.2.hook_resid_pre", louder)]):
        many = list(tls.attribute_many(model, prompts, tls.SemanticScope(), progress=False))
        alone = [tls.attribute(model, prompt, tls.SemanticScope()) for prompt in prompts]
    for one, other in zip(many, alone, strict=True):
        assert one is not None
        torch.testing.assert_close(one.scores, other.scores)
        assert one.target == other.target


@pytest.mark.usefixtures("no_type_checks")
def test_evaluate_reads_prompts_alike() -> None:
    """What a tokenizer returned for several texts; a table is refused."""
    model, perturbation = tls.load_tiny(), Perturbation(("zero",), (0.5,), samples=0, randomise=False)
    texts = [TEXT, "The keys near the door"]
    results = tls.evaluate(model, model.tokenizer(texts, padding=True), [tls.SemanticScope()], perturbation)
    expected = tls.evaluate(model, texts, [tls.SemanticScope()], perturbation)
    pd.testing.assert_frame_equal(results, expected)
    with pytest.raises(TypeError, match=r"with \['text'\]: give one of its columns, prompts\['text'\]"):
        tls.evaluate(model, {"text": texts}, [tls.SemanticScope()], perturbation)  # type: ignore[arg-type]
