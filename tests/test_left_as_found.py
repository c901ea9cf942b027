"""The model is left as it was found, also after an exception, and the user's own hooks act."""

import dis
import importlib
import inspect
import itertools
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import tl_scopes as tls
from tests import zoo
from tests.zoo import PROMPT
from tl_scopes import models
from tl_scopes.models import gradient_check
from tl_scopes.models.threads import one_at_a_time

FOLDER = str(Path(models.__file__).parent)
PUTTING_BACK = ("threads", "hooks", "checkpointing")
OFTEN = 100
"""Calls of one function after which it is not looked at any more."""
KINDS = ["bridge llama", *(["hooked layer norm"] if zoo.HookedTransformer else [])]


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A fresh one: these tests change it."""
    model = zoo.SPECIES[request.param]().model
    with zoo.Float64():
        model(torch.tensor([PROMPT]))  # a bridge registers a hook of its own at the first run
        yield model


def state(model: Any) -> dict[str, Any]:
    """Everything a run could leave behind."""
    modules = getattr(model, "original_model", model)
    parts = [*model.modules(), *modules.modules()]
    return {
        "training": [m.training for m in modules.modules()],
        "requires_grad": [p.requires_grad for p in modules.parameters()],
        "grad": [p.grad for p in modules.parameters()],
        "weights": [p.detach().clone() for p in modules.parameters()],
        "torch hooks": [(list(m._forward_hooks.items()), list(m._forward_pre_hooks.items())) for m in parts],
        "keyword hooks": [(dict(m._forward_hooks_with_kwargs), dict(m._forward_pre_hooks_with_kwargs)) for m in parts],
        "forward methods": [vars(m).get("forward") for m in parts],
        "function modes": torch.overrides._get_current_function_mode_stack(),
        "hooks": {name: len(point.fwd_hooks) + len(point.bwd_hooks) for name, point in model.hook_dict.items()},
        "context level": getattr(model, "context_level", 0),
        "rng": torch.get_rng_state(),
        "grad mode": torch.is_grad_enabled(),
    }


@contextmanager
def unchanged(model: Any) -> Iterator[None]:
    before = state(model)
    yield
    assert_unchanged(before, state(model))


def assert_unchanged(before: dict[str, Any], after: dict[str, Any], where: object = "") -> None:
    for name, value in before.items():
        if name == "weights":
            assert all(map(torch.equal, value, after[name])), where
        elif name == "rng":
            assert torch.equal(value, after[name]), where
        else:
            assert value == after[name], (name, where)


def every_scope(model: Any) -> None:
    lin = tls.linearize(model, PROMPT)
    for scope in (tls.SemanticScope(), tls.TemperatureScope(), tls.FisherScope(), tls.SpectralScope(rank=2)):
        scope(lin)
    lin.at(lin.embeddings).jvp(lin.embeddings[None])


@pytest.mark.parametrize("frozen", [True, False, "mixed"])
def test_after_success(model: Any, frozen: bool | str) -> None:
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 2 == 0 if frozen == "mixed" else not frozen)
    with unchanged(model):
        every_scope(model)


def test_under_no_grad(model: Any) -> None:
    with torch.no_grad(), unchanged(model):
        every_scope(model)


def failing(value: Tensor, hook: Any) -> Tensor:
    raise ZeroDivisionError("the user's hook fails")


@pytest.mark.parametrize("name", ["blocks.1.hook_resid_pre", "unembed.hook_in", "hook_embed"])
def test_after_a_failure_on_the_way(model: Any, name: str) -> None:
    """The user's hook raises in the middle of the forward pass: their hook stays, ours goes."""
    model.hook_dict[name].add_hook(failing)
    with unchanged(model), pytest.raises(ZeroDivisionError, match="the user's hook fails"):
        tls.linearize(model, PROMPT)


def test_after_bad_input(model: Any) -> None:
    with unchanged(model), pytest.raises(ValueError, match="no hook 'hook_nothing'"):
        tls.linearize(model, PROMPT, wrt="hook_nothing")
    with unchanged(model), pytest.raises(ValueError, match="did not fire before 'hook_embed'"):
        tls.linearize(model, PROMPT, wrt="blocks.1.hook_resid_pre", of="hook_embed")


def patched(value: Tensor, hook: Any) -> Tensor:
    """Cut a token out of the stream at block 1."""
    value = value.clone()
    value[:, 2] = 0.5
    return value


Setting = Callable[[Any], Any]


@contextmanager
def with_add_hook(model: Any) -> Iterator[None]:
    model.hook_dict["blocks.1.hook_resid_pre"].add_hook(patched)
    yield
    model.reset_hooks()


@pytest.mark.parametrize(
    "setting", [with_add_hook, lambda model: model.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", patched)])]
)
def test_the_users_patch_is_explained(model: Any, setting: Setting) -> None:
    """Inside the user's patching hooks the patched model is explained: its logits, its Jacobian."""
    plain = tls.linearize(model, PROMPT)
    with setting(model), unchanged(model):
        lin = tls.linearize(model, PROMPT)
        logits = model(torch.tensor([PROMPT]))[0, -1]
        step = 1e-5 * torch.ones_like(lin.embeddings)
        difference = (lin.at(lin.embeddings + step).readout - lin.at(lin.embeddings - step).readout) / 2
    assert_close(lin.logits, logits.detach())
    assert not torch.allclose(lin.logits, plain.logits)
    assert_close(lin.jvp(step[None])[0], difference, rtol=1e-3, atol=1e-8)
    # Beyond the patch, token 2 still acts through block 0, so its influence is less but there.
    assert lin.squared_norms(lin.readout[None])[0, 2] != plain.squared_norms(plain.readout[None])[0, 2]
    assert_close(tls.linearize(model, PROMPT).logits, plain.logits)


def test_the_users_patch_at_both_ends(model: Any) -> None:
    """A patch at the embedding is where the model is linearised; one at the readout is what the unembedding reads."""
    with model.hooks(fwd_hooks=[("hook_embed", lambda v, hook: v * 2), ("unembed.hook_in", lambda v, hook: v * 3)]):
        lin = tls.linearize(model, PROMPT)
        logits = model(torch.tensor([PROMPT]))[0, -1]
    with model.hooks(fwd_hooks=[("hook_embed", lambda v, hook: v * 2)]):
        other = tls.linearize(model, PROMPT)
    assert_close(lin.logits, logits.detach())
    assert_close(lin.embeddings, 2 * tls.linearize(model, PROMPT).embeddings)
    assert_close(lin.as_matrix(), 3 * other.as_matrix())


def test_compatibility_mode_counts_once() -> None:
    """In compatibility mode a hook has several names; the perturbation enters once all the same."""
    model = zoo.SPECIES["bridge llama"]().model
    before = tls.attribute(model, PROMPT, tls.SemanticScope(target=3))
    model.enable_compatibility_mode(no_processing=True)
    after = tls.attribute(model, PROMPT, tls.SemanticScope(target=3))
    assert_close(after.scores, before.scores)


def test_the_model_does_not_keep_the_graph(specimen: zoo.Specimen) -> None:
    """No tensor that the model holds after a run leads back to the activations."""
    tls.linearize(specimen.model, PROMPT)
    parts = [*specimen.model.modules(), *getattr(specimen.model, "original_model", specimen.model).modules()]
    held = [value for part in parts for value in vars(part).values() if isinstance(value, Tensor)]
    assert not [value for value in held if value.grad_fn is not None]


def test_the_answer_does_not_keep_the_graph(model: Any) -> None:
    """A linearisation is freed with its last reference, and an Attribution is none."""
    import gc
    import weakref

    lin = tls.linearize(model, PROMPT)
    answer = tls.FisherScope()(lin)
    root = weakref.ref(lin.trace.output)
    assert not answer.scores.requires_grad
    del lin
    gc.collect()
    assert root() is None


# -- interrupts -------------------------------------------------------------------------------------------------------


def ask(model: Any, **options: bool) -> None:
    tls.SemanticScope(3)(tls.linearize(model, PROMPT[:3], **options))


def ask_again(model: Any) -> None:
    ask(model, checkpoint=True)


def embed(model: Any) -> None:
    models.embed(model, torch.tensor([PROMPT[:3]]))


def read_attention(model: Any) -> None:
    list(models.attention_layers(model, torch.tensor(PROMPT[:3])))


def hold_attention(model: Any) -> None:
    with models.held_attention(model, [0]):
        models.predict(model, torch.tensor([PROMPT[:3]]))


def exchange_weights(model: Any) -> None:
    with models.exchanged_weights(model, models.shuffled_weights(model, torch.Generator().manual_seed(0))):
        ask_again(model)


CHANGING: list[Callable[[Any], None]] = [
    embed,
    hold_attention,
    read_attention,
    ask,
    ask_again,
    exchange_weights,
]
"""Whatever changes something about the model for a while."""

LEAVING = ["LOAD_CONST"] * 3
"""How the code begins that leaves a `with` block. An interrupt comes there from a tracing function alone: a signal is
looked at after calls, at the begin of functions and at the end of loops."""


def may_be_interrupted(frame: FrameType, event: str) -> bool:
    """Whether a signal may be looked at near this place of a function."""
    if event != "line" and (event != "call" or frame.f_code.co_flags & inspect.CO_GENERATOR):
        return False  # what is raised when a generator goes on passes by its handlers in Python 3.11
    names = [instruction.opname for instruction in instructions(frame.f_code, frame.f_lasti)]
    return names != LEAVING and names[0] not in ("PUSH_EXC_INFO", "WITH_EXCEPT_START")


@cache
def instructions(code: CodeType, start: int) -> list[dis.Instruction]:
    return [instruction for instruction in dis.get_instructions(code) if instruction.offset >= start][:3]


Place = tuple[str, str, int]


@contextmanager
def traced(visit: Callable[[Place], None]) -> Iterator[None]:
    """Inside, a function is called at the begin of every line and of every function in `models`."""

    calls: Counter[CodeType] = Counter()

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(FOLDER):
            return None
        calls[frame.f_code] += event == "call"
        if calls[frame.f_code] > OFTEN:
            return None
        if may_be_interrupted(frame, event):
            visit((f"{Path(frame.f_code.co_filename).stem} {frame.f_code.co_qualname}", event, frame.f_lineno))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def interrupting(number: int, struck: list[Place]) -> Callable[[Place], None]:
    """A function that raises at a visit, counted from 0, and adds its place to a list."""
    count = itertools.count()

    def interrupt(place: Place) -> None:
        if next(count) == number:
            struck.append(place)
            raise KeyboardInterrupt

    return interrupt


@pytest.mark.parametrize("kind", KINDS[-1:])
def test_an_interrupt_at_any_line(kind: str, no_type_checks: None) -> None:
    """KeyboardInterrupt at every line of `models` that is run leaves nothing behind: when it is visited first, and
    where something is put back also when it is visited last."""
    model = zoo.SPECIES[kind]().model
    model(torch.tensor([PROMPT]))
    known: set[Place] = set()
    before = state(model)
    for change in CHANGING:
        visited: list[Place] = []
        change(model)  # what is looked up once
        gradient_check._passed.clear()  # the first pass over a model is watched, so that it visits more
        with traced(visited.append):
            change(model)
        assert_unchanged(before, state(model), change)
        first = {place: number for number, place in reversed(list(enumerate(visited))) if place not in known}
        last = {place: number for number, place in enumerate(visited) if place[0].startswith(PUTTING_BACK)}
        tried = {*first.values(), *(last.values() if change is ask_again else ())}
        known |= first.keys()
        for number in sorted(tried):
            struck: list[Place] = []
            gradient_check._passed.clear()
            with suppress(KeyboardInterrupt), warnings.catch_warnings(), traced(interrupting(number, struck)):
                warnings.simplefilter("ignore")  # in the end of a generator it is not raised, but told of
                change(model)
            assert struck == [visited[number]]
            if one_at_a_time._is_owned():  # type: ignore[attr-defined]
                # It would be in the way of all other threads. Where `with` is left, the trace tells of its line before
                # the lock is released, where no signal can fall; that alone is excused.
                name, _, line = visited[number]
                source = Path(
                    inspect.getsourcefile(importlib.import_module(f"tl_scopes.models.{name.split()[0]}")) or ""
                )
                assert "with one_at_a_time" in source.read_text().splitlines()[line - 1], (change, visited[number])
                one_at_a_time.release()
            assert_unchanged(before, state(model), (change, visited[number]))
    assert len(known) > 200
