"""The bundled model knows its tasks, and the tasks know their causes."""

import re
import subprocess
import sys
from functools import cache
from itertools import islice
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

import tl_scopes as tls
from tests import zoo
from tl_scopes import models
from tl_scopes.tiny import FOLDER, train
from tl_scopes.tiny.tasks import MIXTURES, TASKS, Mixture, documents, examples

TOKENIZER = AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def plain() -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER).eval()


@pytest.fixture(scope="module")
def table(plain: Any, no_type_checks_here: None) -> dict[str, dict[str, Any]]:
    return {row["task"]: row for row in train.evaluate(plain, TOKENIZER, 200, series=0)}


@pytest.mark.parametrize(
    ("task", "accuracy"),
    [
        ("agreement", 0.99),
        ("agreement_far", 0.99),
        ("inference_what", 0.99),
        ("translation", 0.97),
        ("association", 0.95),
    ],
)
def test_held_out_accuracy(table: dict[str, dict[str, Any]], task: str, accuracy: float) -> None:
    assert table[task]["accuracy"] >= accuracy


@pytest.mark.usefixtures("no_type_checks_here")
@pytest.mark.parametrize(("task", "ratio"), [("logistic", 0.6), ("lorenz", 0.6), ("brownian", 0.97)])
def test_series_beat_a_markov_chain(table: dict[str, dict[str, Any]], task: str, ratio: float) -> None:
    """They beat it by far, but for the random walk, of which only the size of its steps can be learned."""
    assert table[task]["loss"] < ratio * train.markov_loss(task, examples(task, 200, seed=2), series=5000)


def test_size() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) < 10e6


@pytest.mark.parametrize("kind", ["bridge", *(["hooked"] if zoo.HookedTransformer else [])])
def test_all_kinds_compute_the_same(plain: Any, kind: str) -> None:
    """Plain transformers, the bridge and HookedTransformer agree on logits and scores."""
    model = tls.load_tiny(kind)  # type: ignore[arg-type]
    prompt = "German: der kleine Hund sieht die rote Katze. English: the small dog sees the red"
    lin = tls.linearize(model, prompt)
    ids = torch.tensor([TOKENIZER(prompt)["input_ids"]])
    assert lin.tokens.tolist() == ids[0].tolist()
    assert_close(lin.logits, plain(ids).logits[0, -1].detach(), rtol=1e-4, atol=1e-4)
    answer = tls.SemanticScope()(lin)
    assert answer.target is not None
    assert answer.target.text == " cat"
    reference = tls.attribute(tls.load_tiny(), prompt, tls.SemanticScope())
    assert_close(answer.scores, reference.scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_load_tiny_in_other_precision(dtype: torch.dtype) -> None:
    assert tls.attribute(tls.load_tiny(dtype=dtype), "The keys", tls.SemanticScope()).dtype == str(dtype)[6:]


@pytest.mark.parametrize("text", ["naïve café ☃ 😀", "\n\t  <script>&", "Hello, world! 2026", "日本語", "\x00\x7f"])
def test_any_text_tokenises(tiny: Any, text: str) -> None:
    """Any text comes out as it went in, no token is unknown, and every one can be shown."""
    lin = tls.linearize(tiny, text)
    assert TOKENIZER.decode(lin.tokens, skip_special_tokens=True) == text
    assert lin.str_tokens[0] == "<|bos|>"
    assert not any("\ufffd" in token or token == "" for token in lin.str_tokens)


def test_bytes_are_named(tiny: Any) -> None:
    assert tls.linearize(tiny, "☃", prepend_bos=False).str_tokens == ("<0xE2>", "<0x98>", "<0x83>")


def test_prepend_bos(tiny: Any) -> None:
    assert tls.linearize(tiny, "The keys").tokens[0] == TOKENIZER.bos_token_id
    assert tls.linearize(tiny, "The keys", prepend_bos=False).str_tokens == ("The", " keys")


# -- tasks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_examples(task: str) -> None:
    """Examples are reproducible and held out, and their causes are whole words or numbers of the prompt."""
    some = examples(task, 50)
    assert some == examples(task, 50)
    assert some != examples(task, 50, seed=1)
    assert {e.split for e in some} == {"test"}
    assert {e.split for e in examples(task, 20, split="train")} == {"train"}
    for example in some:
        assert example.causes
        assert example.target != example.foil
        assert len(TOKENIZER(example.target, add_special_tokens=False)["input_ids"]) == 1
        words = [example.prompt[start:stop] for start, stop in example.causes]
        assert all(re.fullmatch(r"\w+", word) for word in words)
        positions = example.cause_positions(TOKENIZER)
        ids = TOKENIZER(example.prompt)["input_ids"]
        assert {TOKENIZER.decode([ids[p]]).strip() for p in positions} == set(words)
        assert len(positions) == len(words)


def test_bad_examples(no_type_checks: None) -> None:
    """An unknown split, of which no example would ever be found, is refused like all else."""
    for arguments, error, message in [
        (("agrement", 1), ValueError, r"no task 'agrement': choose one of agreement, .*brownian\."),
        ((["agreement"], 1), ValueError, r"no task \['agreement'\]"),
        (("agreement", 0), ValueError, "count must be at least 1, got 0"),
        (("agreement", "3"), TypeError, "count must be at least 1, and an integer, got '3'"),
        (("agreement", 2.5), TypeError, "count must be at least 1, and an integer, got 2.5"),
    ]:
        with pytest.raises(error, match=message):
            examples(*arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='split is "train" or "test", got \'dev\''):
        examples("agreement", 1, split="dev")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="seed must be an integer, got '0'"):
        examples("agreement", 1, seed="0")  # type: ignore[arg-type]


def test_the_cause_decides_agreement() -> None:
    """In every example the marked noun has the number of the verb."""
    for example in examples("agreement_far", 100):
        noun = example.prompt[slice(*example.causes[-1])]
        assert noun.endswith("s") == (example.target in (" are", " were"))


@cache
def held_out_prompts() -> tuple[str, ...]:
    return tuple(e.prompt for task in TASKS if task != "translation" for e in examples(task, 200))


@pytest.mark.usefixtures("no_type_checks_here")
@pytest.mark.parametrize("mixture", MIXTURES)
def test_training_never_sees_the_held_out(mixture: Mixture) -> None:
    """No document of the training corpus begins with a held-out prompt, none has a held-out German sentence."""
    corpus = [text for text, _ in islice(documents(0, mixture), 5000)]
    prompts = held_out_prompts()
    assert not [text for text in corpus if text.startswith(prompts)]
    seen = {m[1] for text in corpus if (m := re.match(r"German: (.*)\. English:", text))}
    assert len(seen) > 100
    assert not {e.key for e in examples("translation", 500)} & seen


def test_what_can_be_known() -> None:
    """The loss counts fully where a document can be predicted: the answer, the English sentence, a whole series."""
    starts = {"German": " English:", "The": " ", "List": " "}
    for text, start in islice(documents(0, MIXTURES[0]), 500):
        kind = re.match(r"\w+", text)
        assert kind is not None
        assert 0 <= start < len(text)
        if kind[0].isdigit():
            assert start == 0
        elif kind[0] in starts:
            assert text[start:].startswith(starts[kind[0]])


def test_mixture() -> None:
    for mixture in MIXTURES:
        assert {task.split("_wh")[0] for task in TASKS} <= {task.__name__ for task in mixture}
        assert sum(mixture.values()) == pytest.approx(1)


def test_training_runs(tmp_path: Any) -> None:
    """After two steps the script that made the bundled model has written a folder that loads, and the table."""
    command = [sys.executable, "-m", "tl_scopes.tiny.train", "--out", str(tmp_path), "--max-steps", "2", "--rows", "2"]
    few = ["--examples", "2", "--series", "100"]
    run = subprocess.run([*command, *few], capture_output=True, text=True, check=True)
    assert "| association |" in run.stdout
    assert models.load(tmp_path).cfg.n_layers == 6
