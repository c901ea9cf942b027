"""The real model, loaded once; without it every test here is skipped, with the line that gets it."""

from pathlib import Path
from typing import Any

import pytest

from tests.real.model import FOLDER, is_there
from tl_scopes import models


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.real)
            item.add_marker(
                pytest.mark.skipif(not is_there(), reason="the model is not here: run python -m tests.real.model")
            )


@pytest.fixture(scope="session")
def real() -> Any:
    """SmolLM2-135M-Instruct as a TransformerBridge, in float32."""
    return models.load(FOLDER, device="cpu")
