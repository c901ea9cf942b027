"""A corpus in a folder: what goes in, what comes out, and what is refused."""

import dataclasses
import errno
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import tl_scopes as tls
from tests import zoo
from tl_scopes import models
from tl_scopes.corpus.parts import MANIFEST
from tl_scopes.models import Provenance
from tl_scopes.scopes.baselines import LeaveOneOut

TEXTS = ["The keys near the door", "The key near the doors", "The keys to the old cabinet", "The wheel of the cars"]
SEMANTIC = tls.SemanticScope()
FASTER: dict[str, Any] = {"batch_size": 2, "part_size": 3, "progress": False}


def ask(prompts: Any, out: Path, scope: tls.Scope = SEMANTIC, **options: Any) -> tls.Corpus:
    return tls.attribute_corpus(prompts, out, scope, **FASTER | options)


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "scores"


# -- what comes out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scope",
    [tls.SemanticScope(" are", versus=" is"), tls.FisherScope(probes=4), tls.PathIntegratedScope(steps=4)],
    ids=str,
)
def test_a_corpus_is_attribute_many(tiny: Any, out: Path, scope: tls.Scope) -> None:
    """What is read back is what the batch gave, field by field, in the order of the prompts."""
    corpus = ask(TEXTS, out, scope, model=tiny, part_size=4)
    expected = list(tls.attribute_many(tiny, TEXTS, scope, batch_size=2, progress=False))
    assert len(corpus) == len(TEXTS)
    for found, answer in zip(tls.read_corpus(out), expected, strict=True):
        assert found is not None
        assert answer is not None
        assert found.to_json() == answer.to_json()
        assert found.provenance == answer.provenance


def test_the_columns(tiny: Any, out: Path) -> None:
    """Names and types of the columns, for all who read Parquet without this package."""
    corpus = ask(TEXTS, out, tls.FisherScope(probes=4), model=tiny)
    frame = pd.read_parquet(out)
    answer = corpus[0]
    assert answer is not None
    assert " ".join(frame) == (
        "id prompt scores token_ids tokens target value quantity scope unit standard_error notes error provenance "
        "record"
    )
    assert frame.id.tolist() == [0, 1, 2, 3]
    assert frame.prompt.tolist() == TEXTS
    assert frame.scores[0].tolist() == answer.scores.tolist()
    assert frame.scores[0].dtype == np.float32
    assert frame.standard_error[0].tolist() == answer.standard_error.tolist()
    assert frame.token_ids[0].tolist() == answer.tokens.tolist()
    assert tuple(frame.tokens[0]) == answer.str_tokens
    assert frame.error.isna().all()
    assert frame.scope.tolist() == ["FisherScope(probes=4)"] * 4
    assert frame.unit[0] == answer.unit
    assert frame.provenance[0] == dataclasses.asdict(corpus.provenance)
    pd.testing.assert_frame_equal(corpus.to_dataframe(), frame)
    semantic = pd.read_parquet(ask(TEXTS, out.with_name("semantic"), model=tiny).path)
    assert semantic.target.tolist()[:2] == [" are", " is"]
    assert semantic.quantity.tolist()[:2] == ["logit of ' are'", "logit of ' is'"]
    assert semantic.value.gt(0).all()
    assert semantic.standard_error.isna().all()


def test_every_prediction(tiny: Any, out: Path) -> None:
    """The map of each prompt, and of each answer, read back without loss; a row for each prediction."""
    scope = tls.FisherScope(probes=24)
    maps = ask([*TEXTS, ""], out, scope, model=tiny, predictions="every", part_size=2)
    for found, text in zip(tls.read_corpus(out), TEXTS, strict=False):
        expected = tls.attribution_map(tiny, text, scope)
        assert isinstance(found, tls.AttributionMap)
        assert [one.to_json() for one in found] == [one.to_json() for one in expected]
    assert maps[4] is None
    assert maps.errors.keys() == {4}
    frame = maps.to_dataframe()
    assert frame.position[frame.id == 1].tolist() == list(range(len(maps[1].str_tokens)))
    assert frame.answer_token.isna().all()
    rows = [{"id": text, "prompt": text, "answer": " are old." if i else " is"} for i, text in enumerate(TEXTS)]
    answers = ask(rows, out.with_name("answers"), model=tiny, predictions="every")
    for id, found in answers.items():
        expected = tls.answer_map(tiny, id, " is" if id == TEXTS[0] else " are old.", SEMANTIC)
        assert isinstance(found, tls.AnswerMap)
        assert found.to_json() == expected.to_json()
    frame = answers.to_dataframe()
    assert frame.answer_token[frame.id == TEXTS[1]].tolist() == [" are", " old", "."]


@pytest.mark.parametrize("by", ["head", "layer", "qkv", "position", "neuron"])
def test_paths(tiny: Any, out: Path, by: Any) -> None:
    """What `carried_by` gives, but for where each part acts; of the strongest tokens alone where that is asked."""
    scope = tls.SemanticScope(" are", versus=" is")
    whole = ask(TEXTS[:2], out, scope, model=tiny, carried_by=by)
    some = ask(TEXTS[:2], out.with_name("some"), scope, model=tiny, carried_by=by, strongest=2)
    for (id, found), part, text in zip(whole.items(), some, TEXTS, strict=False):
        lin = tls.linearize(tiny, text)
        expected = tls.carried_by(lin, scope, by)
        assert isinstance(found, tls.Paths)
        kept = dataclasses.replace(expected, where=None, stream=None, stream_layers=())
        assert found.to_json() == kept.to_json()
        assert part.positions == tuple(sorted(one.position for one in scope(lin).top(2)))
        row = pd.read_parquet(out.with_name("some")).iloc[id]
        assert row.positions.tolist() == list(part.positions)
        values = np.stack(row["values"])
        torch.testing.assert_close(torch.tensor(values), part.values.flatten(0, -2))
        if by != "position":
            name = row.parts[int(np.abs(values[:, 0]).argmax())]
            assert part.top(1, token=part.positions[0])[0].name == name


def test_maps_and_paths_go_on(tiny: Any, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a part that was lost, the files are those of an uninterrupted run."""
    for options in ({"predictions": "every"}, {"carried_by": "head", "strongest": 1}):
        folder = out.with_name(str(options))
        ask(TEXTS, folder, model=tiny, **options)
        whole = files(folder)
        (folder / "part-000001.parquet").unlink()
        ask(TEXTS, folder, model=tiny, **options)
        again = files(folder)
        assert {name: again[name] for name in again if name != MANIFEST} == {
            name: whole[name] for name in whole if name != MANIFEST
        }
        with pytest.raises(ValueError, match="holds results of other settings"):
            ask(TEXTS, folder, model=tiny)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"predictions": "all"}, 'predictions is "last" or "every", got \'all\''),
    ({"carried_by": "heads"}, "carried_by is one of 'position', 'layer', 'head', 'qkv', 'neuron', got 'heads'"),
    ({"strongest": 2}, "strongest=2 says how many tokens' scores are split over the network: give carried_by"),
    ({"carried_by": "head", "strongest": 0}, "strongest must be at least 1, got 0"),
    ({"carried_by": "head", "predictions": "every"}, "carried_by='head' splits the score of one prediction"),
    ({"predictions": "every", "score_answer": True}, 'predictions="every" scores earlier tokens of an answer'),
    ({"predictions": "every", "scope": tls.SemanticScope(" are old")}, "the target ' are old' is 2 tokens"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_cannot_be_kept(tiny: Any, out: Path, options: dict[str, Any], message: str, no_type_checks: None) -> None:
    scope = options.get("scope", SEMANTIC)
    with pytest.raises(ValueError, match=re.escape(message)):
        ask(TEXTS, out, scope, model=tiny, **{name: value for name, value in options.items() if name != "scope"})
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"predictions": "every"}, 'predictions="every" explains one answer: leave'),
        ({"scope": tls.FisherScope()}, "FisherScope() does not compare two answers: leave"),
        ({"columns": {"answer": None}}, "no answer or target that is compared with it: give these as well, or leave"),
    ],
    ids=str,
)
def test_foils_that_nothing_is_compared_with(tiny: Any, out: Path, options: dict[str, Any], why: str) -> None:
    """They are refused at once, also where only a later prompt has one, and an iterator is read."""
    rows = [{"prompt": text, "answer": " are", "foil": " is" if i else None} for i, text in enumerate(TEXTS)]
    said = f"the prompt 1 has the foil ' is', and {why} the column of foils out, columns={{'foil': None}}."
    for given in (rows, iter(rows)):
        with pytest.raises(ValueError, match=re.escape(said)):
            ask(given, out, **{"model": tiny} | options)
        assert not list(out.glob("*.parquet"))


@pytest.mark.parametrize(("first", "part_size"), [(0, 3), (2, 3), (0, 1)])
def test_a_foil_before_any_target(tiny: Any, tmp_path: Path, first: int, part_size: int) -> None:
    """It is the error of its row, of an iterator as of a list, unless the first part of an iterator has no target."""
    rows: list[Any] = [{"prompt": text, "target": " are" if i else None} for i, text in enumerate(TEXTS)]
    rows[first] = {"prompt": TEXTS[first], "foil": " is"}
    with pytest.warns(UserWarning, match="1 of 4 prompts have no answer"):
        listed = ask(rows, tmp_path / "list", model=tiny, part_size=part_size)
    assert listed.errors[first].startswith("it has the foil ' is', and no answer or target that is compared with it")
    if part_size == 1:
        with pytest.raises(ValueError, match="the prompt 0 has the foil ' is', and no answer or target that is"):
            ask(iter(rows), tmp_path / "stream", model=tiny, part_size=part_size)
    else:
        with pytest.warns(UserWarning, match="1 of 4 prompts have no answer"):
            ask(iter(rows), tmp_path / "stream", model=tiny, part_size=part_size)
        assert files(tmp_path / "list") == files(tmp_path / "stream")


def test_foils_alone_behind_the_first_part(tiny: Any, out: Path) -> None:
    """What an iterator has given is computed and kept, and nothing ends it."""
    rows = ({"prompt": text, "foil": " is" if i == 3 else None} for i, text in enumerate(TEXTS))
    with pytest.warns(UserWarning, match="1 of 4 prompts have no answer"):
        assert list(ask(rows, out, model=tiny).errors) == [3]


@pytest.mark.parametrize(
    ("scope", "why"),
    [
        (tls.HetaScope(), "carried_by takes scopes whose scores are norms of cᵀJ"),
        (tls.PathIntegratedScope(steps=4), "carried_by takes scopes whose scores are norms of cᵀJ"),
        (tls.FisherScope(rtol=0.1), "chooses its probes as it goes: give their number"),
    ],
    ids=str,
)
def test_scopes_without_parts(out: Path, scope: tls.Scope, why: str) -> None:
    """They are refused before a model is loaded."""
    loaded: list[Any] = []
    with pytest.raises(TypeError, match=why):
        ask(TEXTS, out, scope, model=lambda: loaded.append(1), carried_by="head")
    assert not loaded
    assert not out.exists()


def test_paths_of_answers_and_signed_scores(tiny: Any, out: Path) -> None:
    """The columns are those of the tokens that the scope gives scores to, whether or not the strongest are chosen."""
    rows = [{"prompt": text, "answer": " are very old"} for text in TEXTS[:2]]
    for name, scope in (("semantic", tls.SemanticScope()), ("relevance", tls.RelevanceScope())):
        options: dict[str, Any] = {"model": tiny, "rules": "linear"}
        whole = ask(rows, out.with_name(name), scope, carried_by="head", **options)
        some = ask(rows, out.with_name(f"{name}2"), scope, carried_by="head", strongest=2, **options)
        for row, found, part in zip(rows, whole, some, strict=True):
            answer = tls.attribute(tiny, row["prompt"], scope, answer=row["answer"], rules="linear")
            assert found.positions == answer.positions
            torch.testing.assert_close(found.scores, answer.scores)
            assert part.positions == tuple(sorted(one.position for one in answer.top(2)))


def test_pictures_that_a_corpus_does_not_keep(tiny: Any, out: Path) -> None:
    paths = ask(TEXTS[:1], out, model=tiny, carried_by="head", strongest=1)[0]
    with pytest.raises(ValueError, match="paths of a corpus, which does not keep it, call carried_by for the prompt"):
        paths.flow()


def test_the_batch_size_does_not_matter_one_by_one(tiny: Any, out: Path) -> None:
    ask(TEXTS, out, model=tiny, predictions="every")
    ask(TEXTS, out, model=tiny, predictions="every", batch_size=4)


def test_every_prediction_of_one_answer(tiny: Any, out: Path) -> None:
    """Comparisons that the scope asks for are errors of their rows."""
    rows = [{"prompt": TEXTS[0], "answer": " are old"}, {"prompt": TEXTS[1], "answer": " is new"}]
    with pytest.warns(UserWarning, match="none of the 2 prompts has an answer"):
        corpus = ask(rows, out, tls.SemanticScope(versus=" is"), model=tiny, predictions="every")
    assert "every prediction is asked about one answer: leave foils and `versus` out" in corpus.errors[0]


def test_every_prediction_of_a_set(tiny: Any, out: Path) -> None:
    """A set is no answer with a prediction for each of its tokens: it is an error of its row, which costs no other."""
    rows = [{"prompt": TEXTS[0]}, {"prompt": TEXTS[0], "target": {" are", " is"}}, {"prompt": TEXTS[1]}]
    with pytest.warns(UserWarning, match="1 of 3 prompts have no answer"):
        corpus = ask(rows, out, model=tiny, predictions="every")
    assert list(corpus.errors) == [1]
    assert "is a set, of which any token is meant, and every prediction is asked about one answer" in corpus.errors[1]
    assert [type(found) for found in corpus] == [tls.AttributionMap, type(None), tls.AttributionMap]


def test_what_the_model_says_is_explained(tiny: Any, out: Path) -> None:
    """A row without an answer or target gets the model's own answer; others keep theirs."""
    rows = [{"prompt": TEXTS[0]}, {"prompt": TEXTS[1], "answer": " is old"}, {"prompt": TEXTS[2], "target": " are"}]
    found = list(ask(rows, out, model=tiny, generate=3))
    said = tls.generate(tiny, TEXTS[0], 3)
    assert found[0].target.ids == list(said.ids)
    torch.testing.assert_close(found[0].scores, tls.attribute(tiny, TEXTS[0], answer=said).scores)
    assert [one.target.text for one in found[1:]] == [" is old", " are"]
    many = list(tls.attribute_many(tiny, TEXTS[:2], answers=[None, " is old"], generate=3))
    for one, other in zip(many, found, strict=False):
        assert one is not None
        assert one.target == other.target
        torch.testing.assert_close(one.scores, other.scores)
    (against,) = tls.attribute_many(tiny, TEXTS[:1], foils=[" is"], generate=1)
    assert against is not None
    assert against.versus.text == " is"
    with pytest.raises(ValueError, match=r"holds results of other settings \(generate was 3, is 2\)"):
        ask(rows, out, model=tiny, generate=2)


def test_what_the_model_says_fits_into_the_context(tiny: Any) -> None:
    """So many tokens at most: a long prompt leaves room for fewer."""
    long = " ".join(["The keys"] * 120)
    room = models.context_length(tiny) - len(models.tokenize(tiny, long))
    assert 0 < room < 100
    (found,) = tls.attribute_many(tiny, [long], generate=200, on_error="raise")
    assert found is not None
    assert found.target.ids == list(tls.generate(tiny, long, room).ids)


def test_a_column_that_is_there_twice(tiny: Any, out: Path) -> None:
    with pytest.raises(ValueError, match="the table has 2 columns 'prompt': give each another name"):
        ask(pd.DataFrame([TEXTS[:2]], columns=["prompt", "prompt"]), out, model=tiny)


def test_a_gap_in_a_column_of_prompts_is_null(tiny: Any, out: Path) -> None:
    table = pd.DataFrame({"prompt": [TEXTS[0], float("nan")], "target": [" are", None]})
    with pytest.warns(UserWarning, match="1 of 2 prompts have no answer"):
        found = ask(table, out, model=tiny).to_dataframe()
    assert json.loads(found.prompt[1]) == {"prompt": None, "target": None}


def test_a_map_of_what_the_model_says(tiny: Any, out: Path) -> None:
    (rows,) = ask(TEXTS[:1], out, model=tiny, generate=3, predictions="every")
    assert rows.text == tls.generate(tiny, TEXTS[0], 3).text


@pytest.mark.parametrize("call", ["many", "corpus"])
def test_generation_that_cannot_be(tiny: Any, out: Path, call: str) -> None:
    def asked(scope: tls.Scope, generate: Any) -> Any:
        if call == "many":
            return tls.attribute_many(tiny, TEXTS, scope, generate=generate)
        return ask(TEXTS, out, scope, model=tiny, generate=generate)

    with pytest.raises(ValueError, match="generate is how many tokens are said at most, 1 at least, got 0"):
        asked(SEMANTIC, 0)
    with pytest.raises(
        ValueError, match=r"SemanticScope\(target=' are'\) names its target, and generate=3 explains what"
    ):
        asked(tls.SemanticScope(" are"), 3)
    assert not out.exists()


def test_other_readers(tiny: Any, out: Path, tmp_path: Path) -> None:
    """One line reads it with datasets, and with polars."""
    ask(TEXTS, out, model=tiny)
    datasets = pytest.importorskip("datasets")
    read = datasets.load_dataset("parquet", data_files=f"{out}/*.parquet", split="train", cache_dir=str(tmp_path / "d"))
    assert read["prompt"][:] == TEXTS
    polars = pytest.importorskip("polars")
    assert polars.read_parquet(f"{out}/*.parquet")["prompt"].to_list() == TEXTS


def test_scores_in_double(out: Path) -> None:
    with zoo.Float64():
        model = zoo.specimen("bridge llama").model
        prompts = [zoo.PROMPT, zoo.PROMPT[:3]]
        (first, _) = ask(prompts, out, tls.SemanticScope(7), model=model)
        expected = tls.attribute(model, zoo.PROMPT, tls.SemanticScope(7))
    assert first is not None
    assert first.scores.dtype == torch.float64
    torch.testing.assert_close(first.scores, expected.scores)
    assert pd.read_parquet(out).prompt.tolist() == [str(zoo.PROMPT), str(zoo.PROMPT[:3])]


def test_a_bad_prompt_is_a_row_with_its_error(tiny: Any, out: Path, no_type_checks: None) -> None:
    prompts: list[Any] = [TEXTS[0], "", [10**6], "half of a character: \ud800", None, TEXTS[1]]
    with pytest.warns(UserWarning, match=r"4 of 6 prompts have no answer.*the first, 1: the prompt is empty: give at"):
        corpus = ask(prompts, out, model=tiny)
    assert [answer is None for answer in corpus] == [False, True, True, True, True, False]
    assert list(corpus.errors) == [1, 2, 3, 4]
    assert "token id 1000000 is outside the vocabulary" in corpus.errors[2]
    frame = pd.read_parquet(out)
    assert frame.error.notna().tolist() == [False, True, True, True, True, False]
    assert frame.scores.isna().tolist() == frame.error.notna().tolist()
    assert repr(corpus) == f"Corpus({str(out)!r}: 6 prompts, 4 without an answer, tiny)"
    assert ask([""], out.with_name("one"), model=tiny).errors == {0: frame.error[1]}  # a small corpus may be all bad


def test_a_fault_of_all_prompts_is_an_error(tiny: Any, out: Path) -> None:
    """Nobody wants a million rows with one error; and nothing is kept."""
    with pytest.raises(ValueError, match="99999 is outside the vocabulary") as caught:
        ask(TEXTS, out, tls.SemanticScope(99999), model=tiny)
    assert caught.value.__notes__[-1] == "none of the first 3 prompts of attribute_corpus has an answer"
    assert not list(out.glob("*.parquet"))


def test_answers_targets_and_foils(tiny: Any, out: Path) -> None:
    """They stand in columns, under their own names or others."""
    rows = [{"id": f"a{i}", "prompt": text, "reply": " are old", "foil": " is"} for i, text in enumerate(TEXTS)]
    corpus = ask(rows, out, model=tiny, columns={"answer": "reply"}, score_answer=True)
    many = tls.attribute_many(tiny, TEXTS, SEMANTIC, answers=[" are old"] * 4, foils=[" is"] * 4, score_answer=True)
    for found, expected in zip(corpus, many, strict=True):
        assert found is not None
        assert expected is not None
        assert found.quantity == expected.quantity == "log p(' are old') − log p(' is')"
        torch.testing.assert_close(found.scores, expected.scores)
    targets = ask(
        [{"text": TEXTS[0], "target": " is", "answer": 3}], out.with_name("t"), model=tiny, columns={"answer": None}
    )
    assert [answer and answer.target and answer.target.text for answer in targets] == [" is"]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", ["target", "answer"])
def test_rows_of_unlike_columns(tiny: Any, tmp_path: Path, name: str, turned: bool) -> None:
    """What a row lacks, or has as null, is the default for that row, wherever it stands; what is wrong is its error."""
    rows: list[Any] = [
        {"text": TEXTS[0]},
        {"text": TEXTS[1], name: None},
        {"text": TEXTS[0], name: " is"},
        {"text": TEXTS[1], name: " is", "foil": " are"},
    ]
    rows = rows[::-1] if turned else rows
    bad = [
        ({"text": ""}, "the prompt is empty"),
        ({"txt": "a"}, "it has no column 'text', where the first has its prompt: it has 'txt'"),
        ({"text": None}, "it has null in its column 'text', where the first has its prompt"),
        ("The sky is", "it is a str, and the first prompt is not of that kind: give all as they are, or all as dicts"),
        ({"text": "The sky is", "foil": " is"}, "it has the foil ' is', and no answer or target that is compared"),
    ]
    path = write(tmp_path / "p.jsonl", *map(json.dumps, [*rows, *(row for row, _ in bad)]))
    with pytest.warns(UserWarning, match="5 of 9 prompts have no answer"):
        corpus = ask(path, tmp_path / "out", model=tiny, batch_size=8)
    for found, row in zip(corpus, rows, strict=False):
        scope = tls.SemanticScope(row.get(name), versus=row.get("foil"))
        alone = tls.attribute(tiny, row["text"], scope)
        assert found is not None
        assert found.value == pytest.approx(alone.value, rel=1e-5)
        assert (found.target, found.versus) == (alone.target, alone.versus)
        torch.testing.assert_close(found.scores, alone.scores, rtol=1e-4, atol=1e-5)
    assert list(corpus.errors) == [4, 5, 6, 7, 8]
    for error, (_, message) in zip(corpus.errors.values(), bad, strict=True):
        assert error.startswith(message)


def test_the_scopes_target_is_that_of_a_row_without(tiny: Any, out: Path) -> None:
    scope, foils = tls.FrozenAttentionScope(tls.SemanticScope(" are")), [" is", None]
    rows = [{"prompt": text, "foil": foil} for text, foil in zip(TEXTS, foils, strict=False)]
    corpus = tls.attribute_corpus(rows, out, scope, model=tiny)
    many = tls.attribute_many(tiny, TEXTS[:2], scope, foils=foils)
    for found, other, foil in zip(corpus, many, foils, strict=True):
        assert found is not None
        assert other is not None
        assert found.target is not None
        assert found.target.text == " are"
        assert (found.versus and found.versus.text) == (other.versus and other.versus.text) == foil
        assert found.value == other.value


@pytest.mark.parametrize(
    ("scope", "left"),
    [
        (tls.SemanticScope(" are"), tls.SemanticScope()),
        (tls.FrozenAttentionScope(tls.SemanticScope(" are")), tls.FrozenAttentionScope(tls.SemanticScope())),
        (LeaveOneOut(target=" are", quantity="log_prob"), LeaveOneOut(quantity="log_prob")),
        (tls.HetaScope(" are"), tls.HetaScope()),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["target", "answer"])
def test_what_a_row_has_goes_before_the_scopes_target(
    tiny: Any, out: Path, scope: tls.Scope, left: tls.Scope, name: str
) -> None:
    """A row, and a prompt of attribute_many, is asked about its own target or answer; the others about the scope's."""
    own = [" is", None, " are", None]
    corpus = ask([{"text": text, name: one} for text, one in zip(TEXTS, own, strict=True)], out, scope, model=tiny)
    many = tls.attribute_many(tiny, TEXTS, scope, **{f"{name}s": own}, on_error="raise")  # type: ignore[arg-type]
    assert not corpus.errors
    assert set(pd.read_parquet(out).scope) == {found.scope for found in corpus if found is not None}
    for text, one, found, other in zip(TEXTS, own, corpus, many, strict=True):
        alone = tls.attribute(tiny, text, left if one == " is" else scope, answer=one)
        for batched in (found, other):
            assert batched is not None
            assert (batched.target, batched.quantity, batched.scope) == (alone.target, alone.quantity, alone.scope)
            torch.testing.assert_close(batched.scores, alone.scores, rtol=1e-3, atol=1e-4)


def test_what_a_row_has_goes_before_versus(tiny: Any, out: Path) -> None:
    """What a row lacks of a comparison is the scope's."""
    scope = tls.SemanticScope(" are", versus=" is")
    asked: list[dict[str, Any]] = [{}, {"foil": " was"}, {"target": " was"}, {"answer": " were old", "foil": " was"}]
    corpus = ask([{"text": text, **one} for text, one in zip(TEXTS, asked, strict=True)], out, scope, model=tiny)
    assert not corpus.errors
    compared = [(" are", " is"), (" are", " was"), (" was", " is"), (" were old", " was")]
    for text, (target, versus), found in zip(TEXTS, compared, corpus, strict=True):
        alone = tls.attribute(tiny, text, tls.SemanticScope(target, versus=versus))
        assert found is not None
        assert (found.target, found.versus, found.quantity) == (alone.target, alone.versus, alone.quantity)
        torch.testing.assert_close(found.scores, alone.scores, rtol=1e-4, atol=1e-5)
    many = tls.attribute_many(tiny, TEXTS[:2], scope, foils=[None, " was"], on_error="raise")
    assert [answer and answer.quantity for answer in many] == [answer and answer.quantity for answer in corpus][:2]


def test_maps_and_paths_of_what_a_row_has(tiny: Any, tmp_path: Path) -> None:
    """They are about the row's own target too, where the scope names another."""
    rows, scope = [{"text": TEXTS[0], "target": " is"}, {"text": TEXTS[0]}], tls.SemanticScope(" are")
    own, whole = ask(rows, tmp_path / "maps", scope, model=tiny, predictions="every")
    assert isinstance(own, tls.AnswerMap)
    assert isinstance(whole, tls.AttributionMap)
    assert [own[0].target.text, whole[-1].target.text] == [" is", " are"]  # type: ignore[union-attr]
    paths = ask(rows, tmp_path / "paths", scope, model=tiny, carried_by="layer", strongest=1)
    assert [one.target.text for one in paths] == [" is", " are"]  # type: ignore[union-attr]


def test_a_row_with_an_answer_and_a_target(tiny: Any, out: Path) -> None:
    """Either would be what is explained, so that it is the error of the row."""
    rows = [{"text": TEXTS[0], "answer": " are", "target": " is"}, {"text": TEXTS[1], "answer": "", "target": " is"}]
    with pytest.warns(UserWarning, match="1 of 2 prompts have no answer"):
        corpus = ask(rows, out, model=tiny)
    assert corpus.errors[0].startswith(
        "it has the answer ' are' and the target ' is', either of which is what is explained: give one of them, or "
        "leave a column out, columns={'target': None} say."
    )
    assert [answer and answer.target and answer.target.text for answer in corpus] == [None, " is"]


def test_chats_and_ids(out: Path) -> None:
    model = tls.load_tiny()
    model.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    chat = [{"role": "user", "content": TEXTS[0]}]
    ids = model.to_tokens(TEXTS[1])[0]
    corpus = ask([chat, ids, ids.tolist(), ids.numpy()], out, model=model)
    first, second, *_ = corpus
    assert first is not None
    assert second is not None
    assert "user" in first.parts
    assert second.tokens.tolist() == ids.tolist()
    frame = pd.read_parquet(out)
    assert json.loads(frame.prompt[0]) == chat
    assert frame.prompt[1] == frame.prompt[2] == frame.prompt[3] == str(ids.tolist())


# -- what goes in -----------------------------------------------------------------------------------------------------


def as_jsonl(folder: Path) -> Path:
    return write(folder / "p.jsonl", *(json.dumps({"id": f"p{i}", "prompt": t}) for i, t in enumerate(TEXTS)), "")


def as_csv(folder: Path) -> Path:
    pd.DataFrame({"id": [f"p{i}" for i in range(4)], "prompt": TEXTS}).to_csv(folder / "p.csv", index=False)
    return folder / "p.csv"


def as_parquet(folder: Path) -> Path:
    pd.DataFrame({"id": [f"p{i}" for i in range(4)], "prompt": TEXTS}).to_parquet(folder / "p.parquet")
    return folder / "p.parquet"


def as_folder(folder: Path) -> Path:
    (folder / "parts").mkdir()
    as_parquet(folder).rename(folder / "parts" / "p.parquet")
    return folder / "parts"


def as_dataset(folder: Path) -> Any:
    return pytest.importorskip("datasets").load_dataset(
        "csv", data_files=str(as_csv(folder)), split="train", cache_dir=str(folder / "c")
    )


def as_iterator(folder: Path) -> Iterator[Any]:
    return ({"id": f"p{i}", "prompt": text} for i, text in enumerate(TEXTS))


def as_pandas(folder: Path) -> pd.DataFrame:
    return pd.DataFrame({"id": [f"p{i}" for i in range(4)], "prompt": TEXTS})


def as_polars(folder: Path) -> Any:
    return pytest.importorskip("polars").DataFrame({"id": [f"p{i}" for i in range(4)], "prompt": TEXTS})


SOURCES = [as_jsonl, as_csv, as_parquet, as_folder, as_dataset, as_iterator, as_pandas, as_polars]


@pytest.mark.parametrize("source", SOURCES)
def test_all_sources_are_one(tiny: Any, out: Path, tmp_path: Path, source: Callable[[Path], Any]) -> None:
    """The same rows give the same bytes, wherever they stand."""
    expected = ask([{"id": f"p{i}", "prompt": text} for i, text in enumerate(TEXTS)], tmp_path / "list", model=tiny)
    corpus = ask(source(tmp_path), out, model=tiny)
    assert files(out) == files(tmp_path / "list")
    assert [id for id, _ in corpus.items()] == ["p0", "p1", "p2", "p3"]
    found, same = corpus["p2"], expected["p2"]
    assert found is not None
    assert same is not None
    assert found.str_tokens == same.str_tokens
    with pytest.raises(KeyError, match="there is no prompt with the id 'p9'"):
        corpus["p9"]
    with pytest.raises(KeyError, match="there is no prompt with the id 9 in .*: ids there are strs, such as 'p0'"):
        corpus[9]


def test_lines_that_are_prompts(tiny: Any, out: Path, tmp_path: Path) -> None:
    """A line of JSON may be a text or a list of ids."""
    path = write(tmp_path / "p.jsonl", json.dumps(TEXTS[0]), "[0, 5, 6]")
    assert len(ask(path, out, model=tiny)) == 2


@pytest.mark.parametrize("dtype", [None, "Int64"])
def test_gaps_in_a_table(tiny: Any, out: Path, dtype: Any) -> None:
    """What pandas writes for a gap is one, and what becomes of the integers beside it is an id."""
    are, old = (tls.SemanticScope(text)(tls.linearize(tiny, TEXTS[0])).target for text in (" are", " old"))
    assert are is not None
    assert old is not None
    table = pd.DataFrame(
        {
            "id": pd.array([4, 3, 2, 1], dtype=dtype),
            "prompt": [*TEXTS[:3], None],
            "target": pd.array([are.id, None, None, None], dtype=dtype),
            "answer": [None, " are", np.array([*are.ids, *old.ids]), None],
            "foil": pd.array([None, float("nan"), None, None]),
        }
    )
    for given in (table, table.to_dict("records")):
        with pytest.warns(UserWarning, match="1 of 4 prompts have no answer.*null in its column 'prompt'"):
            corpus = ask(given, out.with_name(type(given).__name__), model=tiny)
        assert [id for id, _ in corpus.items()] == [4, 3, 2, 1]
        targets = [found and found.target and found.target.text for found in corpus]
        assert targets == [" are", " are", " are old", None]
    with pytest.raises(ValueError, match="prompt 1 has no id in its column 'id': give every prompt one"):
        ask(table.assign(id=[1, None, 2, 3]), out, model=tiny)


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("p.jsonl", ['{"prompt": "a"}', "", '{"prompt": '], r"line 3 of '.*p\.jsonl' is not JSON: .*Mend the line, or"),
        ("p.jsonl", ['{"id": 1, "prompt": "a"}', '{"prompt": "b"}'], r"line 2 of .* has no id in its column 'id'"),
        ("p.jsonl", ['{"id": 1, "prompt": "a"}'] * 2, r"line 2 of '.*' has the id 1, which an earlier one has: give"),
        ("p.jsonl", ['{"id": 1.5, "prompt": "a"}'], r"line 1 of '.*' has the id 1\.5: ids are texts or integers"),
        ("p.jsonl", ['{"id": true, "prompt": "a"}'], "has the id True: ids are texts or integers"),
        ("p.jsonl", ['{"id": 1, "prompt": "a"}', '{"id": "b", "prompt": "b"}'], "has the id 'b', and the first id is"),
        ("p.jsonl", ['{"question": "a"}'], r"has no column 'prompt': it has 'question'\. Say which .*'question'} say"),
        ("p.jsonl", ['{"id": 1, "prompt": "a"}', '"b"'], r"line 2 of .* has no id in its column 'id'"),
        ("p.csv", [], r"p\.csv' is empty: its first line must name the columns"),
        ("p.csv", ["id,prompt", "1,a,b"], r"line 2 of .* has 3 fields, and the first line names 2 columns: put a text"),
        ("p.csv", ["id,prompt", '1,"a'], r"line 2 of '.*p\.csv' is not CSV: unexpected end of data"),
        ("p.parquet", ["nothing"], r"p\.parquet' cannot be read as Parquet after 0 rows"),
        ("p.txt", ["a"], r"the prompts in '.*p\.txt' cannot be read: give JSON lines \(\.jsonl\), CSV"),
    ],
)
def test_files_that_cannot_be_read(out: Path, tmp_path: Path, name: str, lines: list[str], message: str) -> None:
    """They are refused with the line, before the model is loaded and anything is written."""
    with pytest.raises(ValueError, match=message):
        ask(write(tmp_path / name, *lines), out, model="no model")
    assert not out.exists()


def test_text_that_is_not_utf8(out: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes(b'"a"\n"\xff"\n')
    with pytest.raises(ValueError, match=r"line 2 of '.*p\.jsonl' is not UTF-8: 'utf-8' codec"):
        ask(tmp_path / "p.jsonl", out)


def test_prompts_that_are_none(tiny: Any, out: Path, no_type_checks: None) -> None:
    for prompts, options, error, message in [
        ("The keys near the door", {}, ValueError, "there is no file 'The keys near the door': prompts are the"),
        (SimpleNamespace(columns=["prompt"]), {}, TypeError, "got a SimpleNamespace: give its rows, each as a dict"),
        (7, {}, TypeError, "prompts must be an iterable of prompts, got one int"),
        (TEXTS, {"columns": {"prompt": "x"}}, ValueError, "prompt 0 is a str without columns, so that columns="),
        ([{"prompt": "a"}], {"columns": {"prompt": "x"}}, ValueError, "prompt 0 has no column 'x': it has 'prompt'"),
        ([{"prompt": "a"}], {"columns": {"text": "x"}}, ValueError, "columns names the columns for .* not for 'text'"),
        (TEXTS, {"part_size": 0}, ValueError, "part_size must be at least 1, got 0"),
        (TEXTS, {"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        (TEXTS, {"progress": "no"}, TypeError, "progress is True or False, got 'no'"),
        (TEXTS, {"scope": tls.SemanticScope}, TypeError, r"expected a scope such as SemanticScope\(\)"),
        (TEXTS, {"model": "no/such/model", }, ValueError, "cannot load the model 'no/such/model'"),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            ask(prompts, out, **{"model": tiny} | options)
    assert not out.exists()


def test_models(tiny: Any, out: Path) -> None:
    """None is the bundled model; a name and a function are loaded; hooks are refused."""
    expected = ask(TEXTS[:1], out, model=tiny)
    for number, model in enumerate((None, tls.load_tiny)):
        ask(TEXTS[:1], out.with_name(str(number)), model=model)
        assert files(out.with_name(str(number))) == files(expected.path)
    with tiny.hooks(fwd_hooks=[("hook_embed", lambda value, hook: 2 * value)]):
        with pytest.raises(ValueError, match="the model has hooks of yours, .* attribute outside of model.hooks"):
            ask(TEXTS, out.with_name("hooks"), model=tiny)


# -- folders ----------------------------------------------------------------------------------------------------------


def test_run_again(tiny: Any, out: Path) -> None:
    """What is there is not computed again; more prompts may follow, and give the files of a run with all of them."""
    ask(TEXTS[:2], out, model=tiny)
    before = files(out)
    assert len(ask(TEXTS[:2], out, model=tiny)) == 2
    assert files(out) == before
    ask(TEXTS, out, model=tiny)
    ask(TEXTS, out.with_name("whole"), model=tiny)
    whole = files(out.with_name("whole"))
    assert {name: data for name, data in files(out).items() if name != MANIFEST} == {
        name: data for name, data in whole.items() if name != MANIFEST
    }
    assert len(tls.read_corpus(out)) == 4


def test_no_prompts(tiny: Any, out: Path) -> None:
    """A folder without answers can be read as well, and go on."""
    with pytest.warns(UserWarning, match="there is no prompt in what was given"):
        assert list(ask([], out, model=tiny)) == []
    assert len(pd.read_parquet(out)) == 0
    assert len(ask(iter(TEXTS), out, model=tiny)) == 4


def test_another_job_is_refused(tiny: Any, out: Path) -> None:
    ask(TEXTS, out, model=tiny)
    before = files(out)
    for options, message in [
        ({"scope": tls.TemperatureScope()}, r"holds results of other settings \(scopes was .*Semantic.*, is .*Temp"),
        ({"batch_size": 1}, r"other settings \(batch_size was 2, is 1\): give another folder"),
        ({"rules": "linear"}, r"other settings \(rules was None, is 'linear'\)"),
        ({"prompts": TEXTS[::-1]}, r"the 3 prompts from the id 0 on, .*, are not the 3 whose scores are in"),
        ({"prompts": TEXTS[:3]}, r"part-000001\.parquet' holds answers to more prompts than were given: give all"),
        ({"prompts": TEXTS[:2]}, r"the 2 prompts from the id 0 on, .*, are not the 3 whose scores are in"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            ask(**{"prompts": TEXTS, "out": out, "model": tiny} | options)
    other = tls.load_tiny()
    with torch.no_grad():
        next(other.parameters())[0, 0] += 1
    with pytest.raises(ValueError, match=r"weights was \d+, is \d+"):
        ask(TEXTS, out, model=other)
    assert files(out) == before


def test_folders_of_others(tiny: Any, out: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"there is no {MANIFEST} in '.*': give the folder that attribute_corpus has"):
        tls.read_corpus(tmp_path)
    with pytest.raises(ValueError, match="is a file: give the path of a folder for the answers"):
        ask(TEXTS, write(tmp_path / "file", "a"), model=tiny)
    with pytest.raises(ValueError, match=rf"holds 'file' and no {MANIFEST}, so it is not one of attribute_corpus"):
        ask(TEXTS, tmp_path, model=tiny)
    ask(TEXTS, out, model=tiny)
    pq.write_table(pa.table({"a": [1]}), out / "more.parquet")
    with pytest.raises(ValueError, match=r"also holds 'more\.parquet', which readers of the folder would take for a"):
        ask(TEXTS, out, model=tiny)
    (out / "more.parquet").unlink()
    write(out / MANIFEST, "{}")
    with pytest.raises(ValueError, match="holds no answers to a corpus: give another folder"):
        ask(TEXTS, out, model=tiny)
    with pytest.raises(ValueError, match="holds no answers to a corpus"):
        tls.read_corpus(out)


@pytest.mark.parametrize("spoil", [lambda data: data[:-99], lambda data: data[:99] + b"?" + data[100:]])
def test_a_part_that_was_cut_off_or_changed(tiny: Any, out: Path, spoil: Callable[[bytes], bytes]) -> None:
    """It is refused with what to do, by who reads and by who goes on; deleted, it is computed again."""
    corpus = ask(TEXTS, out, model=tiny)
    before, part = files(out), out / "part-000000.parquet"
    part.write_bytes(spoil(part.read_bytes()))
    message = r"part-000000\.parquet' is not what was written, it was cut off or changed .*: delete it and run"
    with pytest.raises(ValueError, match=message):
        ask(TEXTS, out, model=tiny)
    with pytest.raises(ValueError, match=message):
        list(corpus)
    part.unlink()
    with pytest.raises(ValueError, match=r"part-000000\.parquet' is missing: run attribute_corpus again"):
        list(tls.read_corpus(out))
    ask(TEXTS, out, model=tiny)
    assert {**files(out), MANIFEST: b""} == {**before, MANIFEST: b""}


def test_a_damaged_log(tiny: Any, out: Path) -> None:
    """A line that was edited is refused; without the line its part is computed again."""
    ask(TEXTS, out, model=tiny)
    before, manifest = files(out), out / MANIFEST
    first, second, third = manifest.read_text().splitlines()
    write(manifest, first, second.replace('"rows": 3', '"rows": 2'), third)
    with pytest.raises(ValueError, match=r"line 2 of '.*' is not what was written, .*: delete this line, and its part"):
        ask(TEXTS, out, model=tiny)
    write(manifest, first, third)
    ask(TEXTS, out, model=tiny)
    assert {**files(out), MANIFEST: b""} == {**before, MANIFEST: b""}
    assert sorted(manifest.read_text().splitlines()) == sorted([first, second, third])


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk(tiny: Any, out: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """The error says what is kept and what to do, and the run goes on when there is room."""
    ask(TEXTS, out.with_name("whole"), model=tiny)
    ask(TEXTS[:3], out, model=tiny)
    with monkeypatch.context() as patch:

        def full(*args: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr(*((os, "fsync") if call == "fsync" else (Path, "replace")), full)
        message = r"part-000001\.parquet could not be written \(No space left on device\); the parts before it are kept"
        with pytest.raises(OSError, match=message) as caught:
            ask(TEXTS, out, model=tiny)
        assert caught.value.errno == errno.ENOSPC
    assert len(tls.read_corpus(out)) == 3
    assert not list(out.glob(".*"))
    ask(TEXTS, out, model=tiny)
    assert files(out) == files(out.with_name("whole"))


def test_two_processes_on_one_folder(tiny: Any, out: Path) -> None:
    """The second is refused; reading is allowed meanwhile."""
    ask(TEXTS[:3], out, model=tiny)
    code = "import sys, filelock as f; lock = f.FileLock(sys.argv[1]); lock.acquire(); print(flush=True); input()"
    command = [sys.executable, "-c", code, f"{out.resolve() / MANIFEST}.lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(RuntimeError, match="another attribute_corpus is writing to .* or give another folder"):
            ask(TEXTS, out, model=tiny)
        assert len(list(tls.read_corpus(out))) == 3
        other.kill()
    assert len(ask(TEXTS, out, model=tiny)) == 4


# -- provenance -------------------------------------------------------------------------------------------------------


def test_provenance(tiny: Any) -> None:
    """An answer says what it was made with, in JSON and at the foot of its page."""
    answer = tls.attribute(tiny, TEXTS[0], SEMANTIC)
    made = answer.provenance
    assert made is not None
    assert made == Provenance.of(tiny)
    assert (made.model, made.dtype, made.device, made.attention, made.revision) == (
        "tiny",
        "float32",
        "cpu",
        "eager",
        None,
    )
    assert made.torch == torch.__version__
    assert tls.Attribution.from_json(answer.to_json()).provenance == made
    assert answer.without([0]).provenance == made
    assert str(made) in answer.to_html()
    assert str(made) in tls.attribution_map(tiny, TEXTS[0], SEMANTIC).to_html()
    assert str(made) in tls.compare([answer, tls.attribute(tiny, TEXTS[0], tls.TemperatureScope())]).to_html()
    record = json.loads(answer.to_json())
    del record["provenance"]
    without = tls.Attribution.from_json(json.dumps(record))
    assert without.provenance is None
    assert "<footer" not in without.to_html()
    with pytest.raises(ValueError, match=r"provenance\.date: Field required"):
        tls.Attribution.from_json(
            json.dumps(record | {"provenance": {k: v for k, v in vars(made).items() if k != "date"}})
        )


def test_answers_of_every_kind_say_what_they_were_made_with(tiny: Any, out: Path) -> None:
    """At the foot of their pages; paths also in JSON, through one component, and when they are read from a corpus."""
    made, lin = Provenance.of(tiny), tls.linearize(tiny, TEXTS[0])
    paths = tls.carried_by(lin, SEMANTIC)
    rows = tls.answer_map(tiny, TEXTS[0], " are old", SEMANTIC)
    encoder = torch.eye(128)[:6]
    features = tls.feature_map(tiny, TEXTS[0], tls.Features(encoder, "blocks.2.hook_resid_post"), at=None)
    pages = [paths.to_html(), paths.flow(), tls.layer_map(tiny, TEXTS[0], SEMANTIC).to_html(), features.to_html()]
    assert all(str(made) in page for page in (*pages, rows.to_html(), rows.traced().to_html()))
    assert tls.Paths.from_json(paths.to_json()).provenance == paths.through("L2H2").provenance == made
    (kept,) = ask(TEXTS[:1], out, model=tiny, carried_by="head")
    assert isinstance(kept, tls.Paths)
    assert kept.provenance == made


def test_other_weights_have_another_checksum() -> None:
    """Whatever parameter was trained, and at once."""
    model = tls.load_tiny()
    known = {Provenance.of(model).weights}
    for parameter in list(model.parameters())[::7]:
        with torch.no_grad():
            parameter.mul_(1.01)
        known.add(Provenance.of(model).weights)
    assert len(known) == 1 + len(list(model.parameters())[::7])


def test_other_versions(tiny: Any, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading under other versions of the model's libraries warns, for a corpus once."""
    text = tls.attribute(tiny, TEXTS[0], SEMANTIC).to_json()
    paths = tls.carried_by(tls.linearize(tiny, TEXTS[0]), SEMANTIC).to_json()
    ask(TEXTS, out, model=tiny)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tls.Attribution.from_json(text)
        list(tls.read_corpus(out))
    monkeypatch.setattr("tl_scopes.models.provenance._installed", lambda package: "9.9")
    with pytest.warns(UserWarning, match=r"this answer was made with other versions, .*torch .*\(now 9\.9\), with"):
        tls.Attribution.from_json(text)
    with pytest.warns(UserWarning, match="this answer was made with other versions"):
        tls.Paths.from_json(paths)
    with pytest.warns(UserWarning, match="the corpus in '.*' was made with other versions") as warned:
        list(tls.read_corpus(out))
    assert len(warned) == 1
    with pytest.raises(ValueError, match=r"other settings \(torch was"):
        ask(TEXTS, out, model=tiny)
