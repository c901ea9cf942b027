"""A word that is asked about without the space with which the model would write it."""

import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import tl_scopes as tls
from tl_scopes import models
from tl_scopes.cli import app
from tl_scopes.models import SpacingNote

PROMPT = "The keys to the old cabinet near the door"
ARE = r"' are' \(p = 0.86\) is far likelier here than 'are' \(first token 'ar' of 2, p = 1.8e-08\), which is asked"


def about_spaces(answer: Any) -> list[str]:
    return [note for note in answer.notes if note.endswith(": mind the space")]


@pytest.mark.parametrize(
    "scope",
    [
        tls.SemanticScope("are"),
        tls.SemanticScope("are", versus=" is"),
        tls.SemanticScope(" is", versus="are"),
        tls.RelevanceScope("are"),
        tls.PositionCorrectedScope(tls.SemanticScope("are")),
    ],
    ids=repr,
)
def test_a_target_without_its_space(tiny: Any, scope: tls.Scope) -> None:
    """The answer is to what was asked; a warning and a note tell both probabilities."""
    with pytest.warns(UserWarning, match=ARE):
        answer = tls.attribute(tiny, PROMPT, scope)
    assert len(about_spaces(answer)) == 1
    with pytest.warns(UserWarning, match=ARE):
        assert about_spaces(scope(tls.linearize(tiny, PROMPT)))


def test_one_token_without_its_space(tiny: Any) -> None:
    """The probabilities are those of the prediction."""
    scope = tls.SemanticScope("is")
    lin = tls.linearize(tiny, PROMPT)
    with pytest.warns(UserWarning, match=r"' is' \(p = 0.001\) is far likelier here than 'is' \(p = 2.1e-09\)"):
        answer = scope(lin)
    spaced, bare = (float(lin.log_probs[models.token(tiny, text).id].exp()) for text in (" is", "is"))
    told = f"' is' (p = {spaced:.2g}) is far likelier here than 'is' (p = {bare:.2g}), which is asked about"
    (note,) = about_spaces(answer)
    assert note == f"{told}: mind the space"
    assert isinstance(pickle.loads(pickle.dumps(note)), SpacingNote)


def test_an_answer_without_its_space(tiny: Any) -> None:
    """Of the kind: answers, maps of them, and foils."""
    with pytest.warns(
        UserWarning, match=r"' are old' \(first token ' are' of 2, p = 0.86\) is far likelier here than 'are"
    ):
        tls.attribute(tiny, PROMPT, tls.SemanticScope(), answer="are old")
    with pytest.warns(UserWarning, match="' are old' .*mind the space.$"):
        tls.answer_map(tiny, PROMPT, "are old", tls.SemanticScope())
    assert about_spaces(tls.linearize(tiny, PROMPT, answer="are old"))
    with pytest.warns(UserWarning, match=ARE):
        (answer,) = tls.attribute_many(tiny, [PROMPT], tls.SemanticScope(), targets=[" is"], foils=["are"])
    assert answer is not None
    assert about_spaces(answer)


def test_a_set_without_spaces(tiny: Any) -> None:
    """The probabilities are those of all members together."""
    with pytest.warns(UserWarning, match=r"' in\| is' \(p = .* than 'in\|is'"):
        answer = tls.attribute(tiny, PROMPT, tls.SemanticScope({"is", "in"}))
    assert len(about_spaces(answer)) == 1


@pytest.mark.parametrize(
    ("prompt", "scope"),
    [
        (PROMPT, tls.SemanticScope(" are")),
        (PROMPT, tls.SemanticScope(".")),  # no word
        (PROMPT, tls.SemanticScope("are", versus=" are")),  # the space itself is asked about
        (PROMPT, tls.SemanticScope({"is", " is"})),
        (PROMPT, tls.SemanticScope(3)),  # an id means what it says
        (PROMPT + "\n", tls.SemanticScope("is")),
        (" ", tls.SemanticScope(" is")),
        ("<|bos|>", tls.SemanticScope("is")),
    ],
    ids=repr,
)
def test_there_is_nothing_to_say(tiny: Any, prompt: str, scope: tls.Scope) -> None:
    """Where no space is missing, or there is no evidence that one is."""
    assert about_spaces(tls.attribute(tiny, prompt, scope)) == []


def test_a_prompt_with_a_space_at_its_end(tiny: Any) -> None:
    """The tokenizer would put it into the next word, and left alone it is a token after which no word comes."""
    note = "the prompt ends with a space, which the next word would bring itself: mind the space"
    with pytest.warns(UserWarning, match=note):
        answer = tls.attribute(tiny, f"{PROMPT} ", tls.SemanticScope())
    assert about_spaces(answer) == [note]
    assert not about_spaces(tls.attribute(tiny, f"{PROMPT} ", tls.SemanticScope(), position=4))  # before it
    assert not about_spaces(tls.attribute(tiny, "2 + 2 = ", tls.SemanticScope()))  # a number takes no space into it


def test_the_next_token_of_a_text_is_what_it_is(tiny: Any) -> None:
    """In a map of a text nobody chose the spaces."""
    found = tls.attribution_map(tiny, "are old", tls.SemanticScope(), target="next", prepend_bos=False)
    assert not any(map(about_spaces, found))


def test_a_map_says_it_once(tiny: Any) -> None:
    with pytest.warns(UserWarning, match=r"far likelier here than .* \d+ of 10 predictions have such a note"):
        found = tls.attribution_map(tiny, PROMPT, tls.SemanticScope(versus="is"))
    assert sum(map(len, map(about_spaces, found))) > 1
    assert found.to_html().count("mind the space") == 1
    with pytest.warns(UserWarning, match="mind the space"):
        page = tls.explore(tiny, PROMPT, tls.SemanticScope(versus="is"))
    assert page.to_html().split('id="data"')[1].count("mind the space") == 1


def test_the_answers_of_a_pair(tiny: Any) -> None:
    other = "The key to the old cabinet near the door"
    with pytest.warns(UserWarning, match=r"' is' \(p = 0.001\) is far likelier here than 'is' .* mind the space"):
        tls.PromptPair(tiny, PROMPT, other, answer=" are", wrong="is")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tls.PromptPair(tiny, PROMPT, other, answer=" are", wrong=" is")


def test_the_command_says_it(tmp_path: Path) -> None:
    """Below the answer; in a corpus in the notes of the row, and once in a warning."""
    with pytest.warns(UserWarning, match=ARE):
        result = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(app, [PROMPT, "--target", "are"])
    assert "' are' (p = 0.86) is far likelier here" in " ".join(result.stdout.split())
    rows = [{"prompt": PROMPT, "target": "are"}, {"prompt": PROMPT, "target": " are"}]
    with pytest.warns(UserWarning, match=ARE):
        corpus = tls.attribute_corpus(rows, tmp_path / "out", tls.SemanticScope())
    assert [len(about_spaces(answer)) for answer in corpus] == [1, 0]


def test_of_many_prompts_it_is_said_which(tiny: Any, tmp_path: Path) -> None:
    """By its id in a corpus, by its number elsewhere: the first of them, and how many there are."""
    prompts = [PROMPT, f"{PROMPT} is old ", f"{PROMPT} ", f"{PROMPT} is "]
    rows = [{"id": f"r{i}", "prompt": text} for i, text in enumerate(prompts)]
    said = "the prompt ends with a space, which the next word would bring itself: mind the space."
    with pytest.warns(UserWarning, match=rf"^prompt 'r1': {said} 3 of 4 predictions have such a note\.$"):
        tls.attribute_corpus(rows, tmp_path / "several")
    with pytest.warns(UserWarning, match=rf"^prompt 'r1': {said}$"):
        tls.attribute_corpus(rows[:2], tmp_path / "one", predictions="every")
    with pytest.warns(UserWarning, match=rf"^prompt 1: {said} 3 of 4 predictions have such a note\.$"):
        list(tls.attribute_many(tiny, prompts))


@pytest.mark.parametrize("target", ["likeliest", "next"])
def test_in_a_map_the_last_row_alone_ends_with_the_space(tiny: Any, target: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = tls.attribution_map(tiny, f"{PROMPT} ", tls.SemanticScope(), target=target)
    ends = [any("ends with a space" in note for note in row.notes) for row in found]
    assert ends == [False] * (len(ends) - 1) + [target == "likeliest"]
