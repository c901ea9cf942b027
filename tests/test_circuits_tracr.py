"""On programs that Tracr compiled, in which the program is the truth: what `carried_by` finds, and where it cannot.

Tracr's attention is hard and its selections are sharp. What moves by value is found exactly. Where tokens decide what
is attended to, a small step decides nothing, or, at a tie, everything; and an answer that was rounded has no slope.
"""

from collections.abc import Iterator

import pytest
import torch
from torch.testing import assert_close

import tl_scopes as tls
from tests import zoo
from tests.tracr_programs import PROGRAMS, Program

EXACT = {"rtol": 1e-9, "atol": 1e-9}
NEAR = {"rtol": 1e-6, "atol": 1e-6}  # attention is hard but for e⁻²⁵


@pytest.fixture(params=PROGRAMS)
def program(request: pytest.FixtureRequest) -> Iterator[Program]:
    with zoo.Float64():
        yield Program(request.param)


@pytest.fixture
def previous() -> Iterator[Program]:
    with zoo.Float64():
        yield Program("previous")


@pytest.fixture
def fraction() -> Iterator[Program]:
    with zoo.Float64():
        yield Program("fraction")


@pytest.fixture
def count() -> Iterator[Program]:
    with zoo.Float64():
        yield Program("count")


def expected(name: str, text: str) -> str | float | int:
    """What the program says after the last letter."""
    if name == "fraction":
        return text.count("x") / len(text)
    return text[-2] if name == "previous" else text.count(text[-1])


@pytest.mark.parametrize("text", ["wx", "wxxy", "xyzzxw", "zzzzz", "yxwxzx"])
def test_the_network_computes_the_program(program: Program, text: str) -> None:
    lin = tls.linearize(program.model, program.prompt(text), of=program.end)
    truth = expected(program.name, text)
    if isinstance(truth, float):
        assert (program.output() @ lin.readout.double()).item() == pytest.approx(truth, abs=1e-4)
    else:
        assert (program.output(str(truth)) @ lin.readout.double()).item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("by", ["layer", "head", "qkv", "position"])
def test_parts_sum_to_the_score(program: Program, by: str) -> None:
    text = "wxyxzx"
    value = None if program.name == "fraction" else str(expected(program.name, text))
    scope = tls.DirectionScope(program.output(value), program.end)
    lin = tls.linearize(program.model, program.prompt(text), of=program.end)
    paths = tls.carried_by(lin, scope, by)  # type: ignore[arg-type]
    inner = tuple(range(1, paths.values.ndim - 1)) if by != "layer" else ()
    whole = (paths.values.sum(inner) if inner else paths.values) + paths.around
    assert_close(whole, scope(lin).scores.expand_as(whole), **EXACT)


@pytest.mark.parametrize("text", ["wxyzxw", "xxyz", "zw"])
def test_what_is_moved_by_value_is_found(previous: Program, text: str) -> None:
    """The head moves the token before, all of it by its values, and nothing else: 1, and less than 1e-5."""
    lin = tls.linearize(previous.model, previous.prompt(text), of=previous.end)
    scope = tls.DirectionScope(previous.output(text[-2]), previous.end)
    paths = tls.carried_by(lin, scope, "qkv")
    before = len(text) - 1
    assert paths.values[0, 0, 2, before].item() == pytest.approx(1, abs=1e-5)
    others = paths.values[0, 0].clone()
    others[2, before] = 0
    assert others.abs().max() < 1e-4
    assert tls.carried_by(lin, scope, "head", before).top(1)[0].name == "L0H0"


def test_a_rounded_answer_has_no_slope(count: Program) -> None:
    """The count is written as one of nine numbers by steps that are flat where they stand: nothing is carried, and no
    token but the last, whose own place is read, has a score."""
    text = "wxyxzx"
    lin = tls.linearize(count.model, count.prompt(text), of=count.end)
    scope = tls.DirectionScope(count.output("3"), count.end)
    assert not scope(lin).scores[:-1].any()
    assert not tls.carried_by(lin, scope, "head").values.any()


def test_a_lookup_is_seen_where_it_is_tied(count: Program) -> None:
    """Before it is rounded: tokens that are counted stand in a tie, which their keys can break; a token that is not
    counted has no slope, though it would be counted if it were another."""
    text = "wxyxzx"
    lin = tls.linearize(count.model, count.prompt(text), of="blocks.0.hook_attn_out")
    width = count.stream.index(next(label for label in count.stream if "width_attn" in label))
    scope = tls.DirectionScope(torch.eye(count.width)[width], "blocks.0.hook_attn_out")
    paths = tls.carried_by(lin, scope, "qkv")
    counted = [1 + i for i, letter in enumerate(text[:-1]) if letter == text[-1]]
    others = [1 + i for i, letter in enumerate(text[:-1]) if letter != text[-1]]
    assert (paths.scores[counted] > 1).all()
    assert (paths.values[0, 0, 1, counted] > 0.9 * paths.scores[counted]).all()  # through keys
    assert paths.scores[others].max() < 1e-9


def test_the_steepest_direction_need_not_be_a_token(fraction: Program) -> None:
    """The program averages a mark over all tokens. But keys answer a thousand times more steeply to the coordinates of
    positions, which no token has, so that the steepest direction goes there; with patterns held it is the program."""
    text = "wxxyx"
    lin = tls.linearize(fraction.model, fraction.prompt(text), of=fraction.end)
    scope = tls.DirectionScope(fraction.output(), fraction.end)
    tokens = list(range(1, len(text)))
    free = tls.carried_by(lin, scope, "qkv", tokens)
    assert (free.values[1, 0, 1] > 0.9 * free.scores).all()
    held = tls.carried_by(lin, tls.FrozenAttentionScope(scope), "qkv", tokens)
    assert not held.values[:, :, :2].any()
    assert_close(held.values[1, 0, 2], held.scores, **NEAR)  # all of it by the values of the head in layer 1
    mark = fraction.stream.index(next(label for label in fraction.stream if label.startswith("map")))
    with tls.models.held_attention(fraction.model):
        slope = lin.at(lin.embeddings).vjp(scope.cotangents(lin))[0]
    assert_close(slope[tokens, mark], torch.full((len(tokens),), 1 / len(text), dtype=slope.dtype), **NEAR)


def test_a_pair_of_prompts_asks_about_tokens(fraction: Program) -> None:
    """The difference between two tokens has no position: attribution patching finds the program where the steepest
    direction does not, and is exact, since the program is linear in the mark."""
    clean, corrupted = fraction.prompt("wxxyx"), fraction.prompt("wxzyx")
    runs = [tls.linearize(fraction.model, tokens, of=fraction.end).readout for tokens in (clean, corrupted)]
    place = int(fraction.output().argmax())
    pair = tls.PromptPair(fraction.model, clean, corrupted, answer=place, wrong=fraction.stream.index("indices:7"))
    found, truth = pair.attribution_patching(), pair.activation_patching()
    assert_close(found.values, truth.values.double(), rtol=1e-4, atol=1e-5)
    assert found.normalized[1, 0].item() == pytest.approx(1, abs=1e-4)
    assert (runs[0] - runs[1])[place].item() == pytest.approx(1 / len("wxxyx"), abs=1e-4)
