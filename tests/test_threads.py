"""What is asked of a model acts in the asking thread alone; a fork, or an interrupt at any line, leaves no trace."""

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import tl_scopes as tls
from tests import zoo
from tests.zoo import PROMPT
from tl_scopes import models

KINDS = ["bridge llama", *(["hooked layer norm"] if zoo.HookedTransformer else [])]
TOKENS, OTHER = torch.tensor([PROMPT]), torch.tensor([[7, 1, 30, 12, 12], [5, 6, 7, 8, 9]])
SCOPE = tls.SemanticScope(3)


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> Any:
    model = zoo.SPECIES[request.param]().model
    model(TOKENS)  # a bridge registers a hook of its own at the first run
    return model


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads change places as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


# -- what the user's threads do ---------------------------------------------------------------------------------------


def plain(model: Any) -> list[Tensor]:
    with torch.no_grad():
        return [model(OTHER)]


def written(model: Any) -> list[Tensor]:
    """The likeliest tokens, one after another."""
    tokens = OTHER[:1]
    with torch.no_grad():
        for _ in range(3):
            tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], dim=1)
    return [tokens]


def trained(model: Any) -> list[Tensor]:
    """The gradients of a training step."""
    parameters = list(model.parameters())
    loss = torch.nn.functional.cross_entropy(model(OTHER)[:, :-1].flatten(0, 1), OTHER[:, 1:].flatten())
    return list(torch.autograd.grad(loss, parameters, allow_unused=True))


def stepped(model: Any) -> list[Tensor]:
    """What a step leaves in .grad."""
    model(OTHER).logsumexp(-1).sum().backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


# -- what is asked of the model meanwhile -----------------------------------------------------------------------------


def asked(model: Any) -> list[Tensor]:
    answer, prompt_map = tls.attribute(model, PROMPT, SCOPE), tls.attribution_map(model, PROMPT, tls.TemperatureScope())
    return [answer.scores, prompt_map.scores]


def checkpointed(model: Any) -> list[Tensor]:
    lin = tls.linearize(model, PROMPT, checkpoint=True)
    return [lin.squared_norms(torch.eye(16).double()[:3]), lin.jvp(lin.embeddings[None])]


def evaluated(model: Any) -> list[Tensor]:
    return [models.predict(model, OTHER), models.embed(model, OTHER)]


def held(model: Any) -> list[Tensor]:
    with models.held_attention(model, [0]):
        lin = tls.linearize(model, PROMPT)
    with models.masked_attention(model, [1]):
        return [SCOPE(lin).scores, models.predict(model, OTHER)]


def exchanged(model: Any) -> list[Tensor]:
    with models.exchanged_weights(model, models.shuffled_weights(model, torch.Generator().manual_seed(0))):
        return [tls.attribute(model, PROMPT, SCOPE, checkpoint=checkpoint).scores for checkpoint in (False, True)]


def read(model: Any) -> list[Tensor]:
    return [layer.pattern for layer in models.attention_layers(model, TOKENS[0])]


Work = Callable[[Any], list[Tensor]]
THEIRS: list[Work] = [plain, written, trained, stepped]
OURS: list[Work] = [asked, checkpointed, evaluated, held, exchanged, read]


def same(found: list[Tensor], expected: list[Tensor]) -> None:
    """To the last bit, but for gradients, which autograd may add up in another order."""
    for one, other in zip(found, expected, strict=True):
        if one is not None:
            assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("ours", OURS, ids=lambda work: work.__name__)
def test_threads_do_not_meet(model: Any, ours: Work) -> None:
    """The user's own passes, text and training steps are what they are alone, and so are the answers beside them."""
    alone = {work: work(model) for work in (*THEIRS, ours)}
    done = threading.Event()
    rounds: dict[Work, int] = {}

    def again_and_again(work: Work) -> None:
        while not done.is_set() or work not in rounds:
            same(work(model), alone[work])
            rounds[work] = rounds.get(work, 0) + 1

    with ThreadPoolExecutor(len(THEIRS)) as pool:
        jobs = [pool.submit(again_and_again, work) for work in THEIRS]
        try:
            for _ in range(4):
                same(ours(model), alone[ours])
        finally:
            done.set()
        for job in jobs:
            job.result(timeout=60)
    assert set(rounds) == set(THEIRS)


def beside(work: Callable[[], Any]) -> Any:
    """The result of work that another thread does now."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result(timeout=60)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("hook", ["blocks.1.hook_resid_pre", "unembed.hook_in"])
def test_a_pass_in_the_middle_of_ours(model: Any, hook: str, checkpoint: bool) -> None:
    """Another thread runs and trains the model just when ours is half way, hooks and all."""
    alone = {work: work(model) for work in (plain, trained)}
    found: dict[Work, list[Tensor]] = {}

    def meanwhile(value: Tensor, hook: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            found.update(beside(lambda: {work: work(model) for work in (plain, trained)}))

    expected = asked(model)
    with model.hooks(fwd_hooks=[(hook, meanwhile)]):
        lin = tls.linearize(model, PROMPT, checkpoint=checkpoint)
        forward = dict(found)
        found.clear()
        scores = SCOPE(lin).scores
    assert_close(scores, expected[0])
    for passes in (forward, found) if checkpoint and hook.startswith("blocks") else (forward,):
        for work, results in passes.items():
            same(results, alone[work])
        assert set(passes) == {plain, trained}


def test_held_attention_holds_in_one_thread(model: Any) -> None:
    """Gradients of another thread's pass go through the patterns; inside exchanged weights it computes with its own."""
    expected = trained(model), plain(model)
    with models.held_attention(model):
        same(beside(lambda: trained(model)), expected[0])
        assert_all_different(trained(model), expected[0])
    with models.exchanged_weights(model, models.shuffled_weights(model, torch.Generator().manual_seed(0))):
        same(beside(lambda: plain(model)), expected[1])
        assert_all_different(plain(model), expected[1])


def assert_all_different(found: list[Tensor], expected: list[Tensor]) -> None:
    assert any(one is not None and not torch.allclose(one, other) for one, other in zip(found, expected, strict=True))


def test_a_second_run_of_a_block_is_one_threads(model: Any) -> None:
    """While a block runs again under the hooks of its forward pass, other threads run it under those of the moment."""
    seen: list[Tensor] = []

    def then(value: Tensor, hook: Any) -> Tensor:
        if threading.current_thread() is threading.main_thread() and armed:
            seen.append(beside(lambda: model(TOKENS)).detach())
        return value * torch.linspace(1, 2, value.shape[1], dtype=value.dtype)[:, None]

    armed: list[int] = []
    with model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", then)]):
        lin = tls.linearize(model, PROMPT, checkpoint=True)
        expected = SCOPE(lin).scores
    with model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", lambda value, hook: value * 3)]):
        now = model(TOKENS).detach()
        armed.append(1)
        assert_close(SCOPE(lin).scores, expected)
    assert seen
    assert_close(torch.stack(seen), now.expand(len(seen), *now.shape))


# -- forks ------------------------------------------------------------------------------------------------------------


def _answer_in_a_child(model: Any, results: Any) -> None:
    results.put((tls.attribute(model, PROMPT, SCOPE).scores.tolist(), models.predict(model, OTHER).tolist()))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_fork_while_another_thread_asks(model: Any) -> None:
    """The child does not wait for a lock that nobody in it holds, and its model is as it was found."""
    expected = tls.attribute(model, PROMPT, SCOPE).scores.tolist(), models.predict(model, OTHER).tolist()
    fork, started, done = multiprocessing.get_context("fork"), threading.Event(), threading.Event()

    def slow(value: Tensor, hook: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            started.set()
            done.wait(0.3)

    def ask() -> Any:
        with model.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", slow)]):
            return tls.attribute(model, PROMPT, SCOPE).scores.tolist()

    with ThreadPoolExecutor(1) as pool:
        job: Future[Any] = pool.submit(ask)
        assert started.wait(60)
        results = fork.SimpleQueue()
        child = fork.Process(target=_answer_in_a_child, args=(model, results))
        child.start()
        child.join(60)
        hangs = child.is_alive()
        child.kill()
        assert not hangs
        assert results.get() == expected
        assert job.result(timeout=60) == expected[0]
