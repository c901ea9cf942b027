"""Maps of whole prompts and many prompts at once are the loop, only faster."""

import dataclasses
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import tl_scopes as tls
from tests import zoo
from tests.zoo import PROMPT, Specimen
from tl_scopes import models
from tl_scopes.jacobian.linearization import linearize_places
from tl_scopes.jacobian.pullback import cotangents_of
from tl_scopes.tiny.tasks import examples

EXACT = {"rtol": 1e-9, "atol": 1e-12}
PROMPTS = [PROMPT, PROMPT[:3], [7], PROMPT[2:7], PROMPT[:3], [5, 5, 5, 5]]
SCOPES = [
    tls.SemanticScope(7),
    tls.SemanticScope(quantity="log_prob"),
    tls.TemperatureScope(),
    tls.FisherScope(probes=6),
]


@dataclasses.dataclass(frozen=True)
class First(tls.Scope):
    """A scope that knows nothing of batches, and runs the model itself."""

    def measure(self, lin: tls.Linearization) -> tls.Measurement:
        moved = lin.at(1.1 * lin.embeddings).logits[0] - lin.logits[0]
        return tls.Measurement(lin.squared_norms(lin.readout[None])[0] + moved, {"moved": float(moved)})

    def unit(self, lin: tls.Linearization) -> str:
        return lin.unit


def same(found: tls.Attribution, expected: tls.Attribution, **tolerance: float) -> None:
    """The same answer up to rounding."""
    assert_close(found.scores, expected.scores, **tolerance or EXACT)
    for name in ("str_tokens", "positions", "position", "target", "versus", "scope", "unit", "notes"):
        assert getattr(found, name) == getattr(expected, name)
    assert found.tokens.tolist() == expected.tokens.tolist()
    assert [p.token for p in found.predictions] == [p.token for p in expected.predictions]
    assert found.details.keys() == expected.details.keys()


@pytest.fixture
def model() -> Any:
    return zoo.specimen("bridge llama").model


# -- maps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", [*SCOPES, First()], ids=str)
def test_a_map_is_its_positions(specimen: Specimen, scope: tls.Scope) -> None:
    """map[position] = attribute(position), from one forward pass."""
    runs: list[int] = []
    point = specimen.model.hook_dict["hook_embed"]
    handle = point.register_forward_hook(lambda *_: runs.append(1))
    try:
        prompt_map = tls.attribution_map(specimen.model, PROMPT, scope)
    finally:
        handle.remove()
    assert len(runs) == (1 if not isinstance(scope, First) else 1 + len(PROMPT))
    for position in (0, 3, len(PROMPT) - 1):
        same(prompt_map[position], tls.attribute(specimen.model, PROMPT, scope, position))


def test_map() -> None:
    """A map has rows, shares, positions from both ends, a table, and a form with fewer tokens."""
    prompt_map = tls.attribution_map(zoo.specimen("bridge llama").model, PROMPT, tls.SemanticScope())
    T = len(PROMPT)
    assert prompt_map.scores.shape == (T, T)
    assert not prompt_map.scores.triu(1).any()
    assert_close(prompt_map.share.sum(-1), torch.ones(T, dtype=torch.float64))
    assert prompt_map[-1] is prompt_map[T - 1] is prompt_map.answers[-1]
    assert [answer.position for answer in prompt_map] == list(range(T))
    frame = prompt_map.to_dataframe()
    assert len(frame) == T * (T + 1) / 2
    assert list(frame.columns[:3]) == ["prediction", "position", "token"]
    assert frame[frame.prediction == 3].score.tolist() == prompt_map[3].scores.tolist()
    rest = prompt_map.without([0])
    assert [one.positions for one in prompt_map.without([-1])] == [
        answer.without(set(answer.positions) & {prompt_map[-1].position}).positions for answer in prompt_map
    ]
    assert (len(rest), rest.scores.shape, rest[-1].positions[0]) == (T - 1, (T - 1, T - 1), 1)
    assert repr(rest) == f"AttributionMap(SemanticScope(): {T - 1} predictions, {T - 1} tokens, {rest[-1].unit})"


def test_a_map_by_word(tiny: Any) -> None:
    """Rows and columns are words: each row is the prediction after a word, with its tokens put together."""
    text = "The unheard keys near the cabinet"
    prompt_map = tls.attribution_map(tiny, text, tls.SemanticScope())
    words = prompt_map.by("word")
    assert words.str_tokens == ("<|bos|>", "The", " unheard", " keys", " near", " the", " cabinet")
    assert repr(words).endswith("7 predictions, 7 words, logit per unit of embedding norm)")
    ends = [prompt_map.str_tokens.index(end) for end in ("<|bos|>", "The", "d", " keys", " near", " the", " cabinet")]
    for number, (row, end) in enumerate(zip(words, ends, strict=True)):
        whole = prompt_map[end].by("word")
        assert (row.position, row.positions) == (number, tuple(range(number + 1)))
        assert_close(row.scores, whole.scores)
        assert (row.target, row.str_tokens, row.predictions) == (whole.target, whole.str_tokens, whole.predictions)
    assert words[2] is words.answers[2]
    assert repr(words.show()).startswith("LiveView(AttentionPattern")  # a square
    assert words.plot().axes[0].get_xlabel() == "word"
    assert "Heat map of 7 predictions by 7 words." in words.to_html()
    assert tls.AttributionMap.from_json(words.to_json()).str_tokens == words.str_tokens
    assert [len(row.scores) for row in prompt_map.without([0]).by("word")] == [1, 2, 3, 4, 5, 6]
    spans = prompt_map.by([(1, 3)])
    assert spans.str_tokens[:2] == ("<|bos|>", "The un")
    assert len(spans) == len(prompt_map) - 1
    with pytest.raises(ValueError, match="no prediction of this map is read after the last token of a word: take the"):
        prompt_map[3:4].without([3]).by("word")
    with pytest.raises(ValueError, match="the tokens of this answer were put together by word before"):
        words.by("sentence")


def test_a_part_of_a_map() -> None:
    """A slice takes predictions by their positions in the prompt, and is a map like any other."""
    prompt_map = tls.attribution_map(zoo.specimen("bridge llama").model, PROMPT, tls.SemanticScope())
    part = prompt_map[2:5]
    assert list(part) == [prompt_map[position] for position in (2, 3, 4)]
    assert part.scores.shape == part.share.shape == (3, 5)
    assert part[3] is part[-2] is prompt_map[3]
    assert list(prompt_map[-3:]) == list(prompt_map)[5:]
    assert list(prompt_map[:]) == list(prompt_map[::-1]) == list(prompt_map)
    assert [answer.position for answer in prompt_map.without([0])[0:3]] == [1, 2]
    assert [answer.position for answer in prompt_map[np.int64(1) : 7 : 2]] == [1, 3, 5]
    for drawn in (part, part.without([0, 3])):
        assert "SemanticScope()" in drawn._repr_html_()
        assert drawn.plot().axes
        assert drawn.show()._repr_html_()


def test_a_map_keeps_few_copies_of_the_logits() -> None:
    """What one position needs is let go at the next: [token vocab] is the largest thing there is."""

    def held() -> int:
        gc.collect()
        tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
        storages = [thing.untyped_storage() for thing in tensors if thing.shape[-1:] == (zoo.VOCAB,)]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    model, places = zoo.specimen("bridge llama").model, [(0, position) for position in range(len(PROMPT))]
    before = held()
    lins = linearize_places(model, [models.read_prompt(model, PROMPT)], "hook_embed", "ln_final", places)
    forward = held() - before
    tls.SemanticScope(quantity="log_prob").ask(lins)
    slope = 8 * len(PROMPT) * zoo.VOCAB  # bytes, of the logits' scale or soft-cap
    assert held() - before < forward + 1.5 * slope


@pytest.mark.parametrize(
    "change",
    [lambda value, hook: (value / 2).tanh() * 2, lambda value, hook: value - value.flip(-1)],
    ids=["cap", "mix"],
)
def test_hooks_on_logits_act(specimen: Specimen, change: Any) -> None:
    """The unembedding of one row is the user's own, hooks and all."""
    model, scope = specimen.model, tls.SemanticScope(3)
    with model.hooks(fwd_hooks=[("unembed.hook_out", change)]):
        found, expected = tls.attribution_map(model, PROMPT, scope)[4], tls.attribute(model, PROMPT, scope, 4)
    same(found, expected)


def test_hooks_on_logits_that_are_gone_are_missed() -> None:
    """Places of one forward pass run the unembedding again; what a hook made of it would silently be missing."""
    lin = tls.linearize(zoo.specimen("bridge llama").model, PROMPT)
    with lin.model.hooks(fwd_hooks=[("unembed.hook_out", lambda value, hook: value - value.flip(-1))]):
        points = lin.at_each(torch.stack([lin.embeddings, lin.embeddings]))
    with pytest.raises(ValueError, match="'unembed.hook_out' are not those under which the model was linearised"):
        tls.SemanticScope(3)(points[1])
    with lin.model.hooks(fwd_hooks=[("unembed.hook_out", lambda value, hook: value + value.flip(0))]):
        points = lin.at_each(torch.stack([lin.embeddings, 2 * lin.embeddings]))
        with pytest.raises(ValueError, match="one prediction cannot be told from the others of the same forward pass"):
            tls.SemanticScope(3)(points[1])


def test_cotangents_go_through_the_unembedding_together(specimen: Specimen, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one by one, also of spans; one by one where two read the same row, or a hook might mix the rows."""
    span = tls.linearize(specimen.model, PROMPT, answer=[5, 7, 9])
    assert isinstance(span, tls.Span)
    parts, scope = [span.part(2, 3), span.part(0, 2)], tls.SemanticScope()
    functions = [scope.function(part) for part in parts]
    expected = [part.cotangent(function) for part, function in zip(parts, functions, strict=True)]
    for found, one in zip(cotangents_of(parts, functions), expected, strict=True):
        assert_close(found, one, rtol=1e-10, atol=1e-12)
    alone, cotangent = [], tls.Linearization.cotangent

    def counted(lin: tls.Linearization, function: Any) -> torch.Tensor:
        alone.append(lin)
        return cotangent(lin, function)

    monkeypatch.setattr(tls.Linearization, "cotangent", counted)
    cotangents_of(parts, functions)
    assert not alone
    cotangents_of([parts[0], parts[0]], [functions[0]] * 2)
    assert len(alone) == 2
    monkeypatch.undo()
    with specimen.model.hooks(fwd_hooks=[("unembed.hook_out", lambda value, hook: value * 2)]):
        hooked = tls.linearize(specimen.model, PROMPT, answer=[5, 7, 9])
        parts = [hooked.part(k, k + 1) for k in range(3)]  # type: ignore[attr-defined]
        functions = [scope.function(part) for part in parts]
        for found, part, function in zip(cotangents_of(parts, functions), parts, functions, strict=True):
            assert_close(found, part.cotangent(function), rtol=0, atol=0)


# -- many prompts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", [*SCOPES, First()], ids=str)
def test_many_are_one_at_a_time(specimen: Specimen, scope: tls.Scope) -> None:
    """Prompts of different lengths share a batch, and answers come in their order."""
    answers = list(tls.attribute_many(specimen.model, PROMPTS, scope, batch_size=4, progress=False))
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert answer is not None
        same(answer, tls.attribute(specimen.model, prompt, scope))


@pytest.mark.parametrize("kind", ["bridge", *(["hooked"] if zoo.HookedTransformer else [])])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_side_does_not_matter(kind: str, side: str) -> None:
    """Answers are the same in float32, whichever side the tokenizer pads."""
    model = tls.load_tiny(kind)
    model.tokenizer.padding_side = side
    prompts = [example.prompt for task in ("agreement", "translation", "logistic") for example in examples(task, 3)]
    for answer, prompt in zip(tls.attribute_many(model, prompts, tls.SemanticScope()), prompts, strict=True):
        assert answer is not None
        alone = tls.attribute(model, prompt, tls.SemanticScope())
        assert (answer.scores - alone.scores).norm() < 1e-5 * alone.scores.norm()


def test_prompts_are_read_as_they_are_needed() -> None:
    """So an endless corpus needs little memory."""
    read = []

    def corpus() -> Iterator[list[int]]:
        while True:
            read.append(1)
            yield PROMPT[:3]

    answers = tls.attribute_many(zoo.specimen("bridge llama").model, corpus(), tls.SemanticScope(3), batch_size=2)
    assert not read
    assert next(answers) is not None
    assert len(read) == 2 * 16


def test_a_bad_prompt_loses_no_other() -> None:
    """It is reported with its number, and None stands in its place."""
    model = zoo.specimen("bridge llama").model
    prompts = [PROMPT, [1, 99], [], PROMPT[:4]]
    with pytest.warns(UserWarning, match="has no answer") as warned:
        answers = list(tls.attribute_many(model, prompts, tls.SemanticScope(3)))
    assert [answer is None for answer in answers] == [False, True, True, False]
    assert [str(w.message).split(":")[0] for w in warned] == [f"prompt {i} has no answer" for i in (1, 2)]
    assert "token id 99 is outside the vocabulary" in str(warned[0].message)


def test_a_bad_prompt_can_end_it() -> None:
    answers = tls.attribute_many(
        zoo.specimen("bridge llama").model, [PROMPT, [1, 99]], tls.SemanticScope(3), on_error="raise"
    )
    assert next(answers) is not None
    with pytest.raises(ValueError, match="token id 99 is outside the vocabulary") as error:
        next(answers)
    assert error.value.__notes__ == ["prompt 1 of attribute_many"]


def test_overflow_in_one_prompt_of_a_batch(specimen: Specimen) -> None:
    """A prompt whose activations are not finite is set aside; the rest of its batch is answered."""

    def overflow(value: torch.Tensor, hook: Any) -> torch.Tensor:
        return torch.where((value[:, :1] == value[:, 1:2]).all(-1, keepdim=True), torch.inf, value)

    model = specimen.model
    with (
        model.hooks(fwd_hooks=[("hook_embed", overflow)]),
        pytest.warns(UserWarning, match="prompt 1 has no answer: NaN"),
    ):
        answers = list(tls.attribute_many(model, [PROMPT, [5, 5, 5], PROMPT[:4]], tls.SemanticScope(3)))
    assert [answer is None for answer in answers] == [False, True, False]


def test_what_is_wrong_with_every_prompt_is_an_error() -> None:
    """Nobody wants a million warnings: there is one, and then the error, before the corpus is gone through."""

    def corpus() -> Iterator[list[int]]:
        while True:
            yield PROMPT

    model = zoo.specimen("bridge llama").model
    for prompts in ([PROMPT] * 5, corpus()):
        with pytest.warns(UserWarning, match="prompt 0 has no answer: target 99 is outside") as warned:
            with pytest.raises(ValueError, match="target 99 is outside the vocabulary") as caught:
                next(tls.attribute_many(model, prompts, tls.SemanticScope(99), batch_size=1))
        assert len(warned) == 1
        assert caught.value.__notes__ == ["prompt 0 of attribute_many"]


def test_errors_of_other_kinds_do_not_end_it() -> None:
    """A scope of the user's may fail in any way, also for a whole batch of which one prompt is the cause."""

    class Short(First):
        def measure(self, lin: tls.Linearization) -> tls.Measurement:
            lin.tokens[3]
            return super().measure(lin)

    model = zoo.specimen("bridge llama").model
    with pytest.warns(UserWarning, match="prompt 0 has no answer: IndexError: index 3 is out of bounds") as warned:
        answers = list(tls.attribute_many(model, [[1, 2], PROMPT, PROMPT[:4]], Short()))
    assert len(warned) == 1
    assert [answer is None for answer in answers] == [True, False, False]


def test_failed_prompts_keep_no_graph() -> None:
    """Errors wait for their place among the answers, and hold no forward pass."""
    graphs: list[Any] = []

    class Failing(First):
        def measure(self, lin: tls.Linearization) -> tls.Measurement:
            gc.collect()
            assert not any(graph() is not None for tokens, graph in graphs if tokens != len(lin.tokens))
            graphs.append((len(lin.tokens), weakref.ref(lin.trace.output)))
            if len(lin.tokens) > 3:
                raise ValueError("too long")
            return super().measure(lin)

    with pytest.warns(UserWarning, match="prompt 1 has no answer: too long"):
        answers = list(
            tls.attribute_many(
                zoo.specimen("bridge llama").model, [PROMPT[:3], PROMPT[:4], PROMPT], Failing(), batch_size=1
            )
        )
    assert [answer is None for answer in answers] == [False, True, True]


def test_bad_options(no_type_checks: None) -> None:
    """They are refused at the call, not at the first answer."""
    model = zoo.specimen("bridge llama").model
    for options, error, message in [
        ({"on_error": "skip"}, ValueError, 'on_error is "warn" or "raise", got \'skip\''),
        ({"on_error": True}, ValueError, 'on_error is "warn" or "raise", got True'),
        ({"progress": "no"}, TypeError, "progress is True or False, got 'no'"),
        ({"checkpoint": "no"}, TypeError, "checkpoint is True or False, got 'no'"),
    ]:
        with pytest.raises(error, match=message):
            tls.attribute_many(model, [PROMPT], tls.SemanticScope(3), **options)  # type: ignore[arg-type]


def test_no_prompts_no_answers() -> None:
    assert list(tls.attribute_many(zoo.specimen("bridge llama").model, [], tls.SemanticScope(3))) == []


def test_hooks_that_are_gone(model: Any) -> None:
    """Answers are computed as they are asked for, so those of a patched model are taken inside the patch."""
    patch = [("hook_embed", lambda value, hook: value * 2)]
    with model.hooks(fwd_hooks=patch):
        answers = tls.attribute_many(model, [PROMPT], tls.SemanticScope(3))
        (inside,) = tls.attribute_many(model, [PROMPT], tls.SemanticScope(3))
        alone = tls.attribute(model, PROMPT, tls.SemanticScope(3))
    assert inside is not None
    same(inside, alone)
    with pytest.raises(RuntimeError, match=r"hooks have changed since attribute_many was called.* inside as well"):
        next(answers)


def test_a_corpus_that_fails(model: Any) -> None:
    """What came before the failure is answered."""

    def corpus() -> Iterator[list[int]]:
        yield PROMPT
        yield PROMPT[:3]
        raise OSError("the disk is gone")

    answers = tls.attribute_many(model, corpus(), tls.SemanticScope(3))
    assert [next(answers) is not None for _ in range(2)] == [True, True]
    with pytest.raises(OSError, match="the disk is gone"):
        next(answers)


def test_a_prompt_that_does_not_fit(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is reported like any other that cannot be answered."""
    monkeypatch.setattr("tl_scopes.models.memory.available_bytes", lambda device: 30_000)
    with pytest.warns(UserWarning, match="prompt 1 has no answer: the graph of 1 x 24 tokens"):
        first, second = tls.attribute_many(model, [[1, 2], [3] * 24], tls.SemanticScope(3))
    assert first is not None
    assert second is None


def test_prepend_bos_is_a_bool(tiny: Any, no_type_checks: None) -> None:
    with pytest.raises(TypeError, match="prepend_bos"):
        tls.attribute_many(tiny, ["The keys"], tls.SemanticScope(), prepend_bos="yes")  # type: ignore[arg-type]
