"""Shared fixtures. The zoo of models is in zoo.py."""

import os

# Before transformers is imported: no test may reach a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"
# Before torch: in processes that tests start, several threads beside other tests would wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator
from typing import Any

import jaxtyping
import pytest
import torch

import tl_scopes as tls
from tests import zoo
from tests.browser import Browser
from tl_scopes.models.threads import one_at_a_time

torch.set_num_threads(1)  # tests run in several processes


@pytest.fixture(params=list(zoo.SPECIES))
def specimen(request: pytest.FixtureRequest) -> Iterator[zoo.Specimen]:
    """One of every kind of model, in true float64."""
    with zoo.Float64():
        yield zoo.specimen(request.param)


@pytest.fixture(scope="session")
def tiny() -> Any:
    """The bundled model as a TransformerBridge."""
    return tls.load_tiny()


@pytest.fixture(params=["bridge", *(["hooked"] if zoo.HookedTransformer else [])])
def golden_model(request: pytest.FixtureRequest) -> Any:
    """The random Llama that the paper authors' code was run on, as both kinds of model."""
    return zoo.llama(zoo.GOLDEN, request.param)


@pytest.fixture(autouse=True)
def _nothing_is_held() -> Iterator[None]:
    """No test leaves the lock of our passes with its thread, where all other threads would wait for it."""
    yield
    assert not one_at_a_time._is_owned()  # type: ignore[attr-defined]


def _without_type_checks() -> Iterator[None]:
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture
def no_type_checks() -> Iterator[None]:
    """As users run it: the type checks that all other tests run under would be faster than our own messages."""
    yield from _without_type_checks()


@pytest.fixture(scope="module")
def no_type_checks_here() -> Iterator[None]:
    """For what is made once for all tests of a file, and would take too long under type checks."""
    yield from _without_type_checks()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Chromium, for the tests of one file."""
    browser = Browser(tmp_path_factory.mktemp("profile"))
    try:
        yield browser
    finally:
        browser.close()


_LONG = ("test_training", "test_demos_run", "test_series_beat", "test_held_out", "honest")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that no process waits for another in the end."""
    items.sort(key=lambda item: not any(part in item.name for part in _LONG))
