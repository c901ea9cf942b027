"""Progress bars: on a terminal, for many steps, gone at the end; and none where they are switched off."""

import io
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import logging

import tl_scopes as tls
from tests import zoo
from tests.zoo import PROMPT
from tl_scopes import progress
from tl_scopes.faithfulness import Perturbation
from tl_scopes.progress import no_progress, progress_bar

FEW = Perturbation(("zero",), (0.5,), samples=0, randomise=False)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal on which bars appear at once."""
    shown = Terminal()
    bar = progress.tqdm
    monkeypatch.setattr(progress, "tqdm", lambda **options: bar(file=shown, **options | {"delay": 0, "mininterval": 0}))
    return shown


def left(text: str) -> str:
    """What a terminal shows in the end."""
    line = ""
    for part in re.split(r"\r|\n|\x1b\[A", text):
        line = part + line[len(part) :]
    return line.strip()


def ask(model: Any, **options: Any) -> list[Any]:
    return list(tls.attribute_many(model, [PROMPT] * 3, tls.FisherScope(exact=True), batch_size=2, **options))


def test_bars_on_a_terminal(terminal: Terminal) -> None:
    """One for the prompts, one for the cotangents, and nothing is left of them."""
    ask(zoo.specimen("bridge llama").model)
    assert "prompts: " in terminal.getvalue()
    assert "cotangents: " in terminal.getvalue()
    assert left(terminal.getvalue()) == ""


def test_none_where_they_are_switched_off(terminal: Terminal) -> None:
    """`progress=False` means those of the scopes too, and not those of whoever asks for the answers."""
    model = zoo.specimen("bridge llama").model
    for scope in (tls.FisherScope(exact=True), tls.HetaScope(3, probes=1), tls.PathIntegratedScope(3, steps=4)):
        answers = tls.attribute_many(model, [PROMPT] * 3, scope, progress=False)
        next(answers)
        assert terminal.getvalue() == ""
    tls.attribute(model, PROMPT, tls.FisherScope(exact=True))
    assert "cotangents: " in terminal.getvalue()
    list(answers)
    assert "prompts" not in terminal.getvalue()


def test_a_bar_for_a_whole_spectrum(terminal: Terminal) -> None:
    tls.attribute(zoo.specimen("bridge llama").model, PROMPT, tls.SpectralScope(space="distribution"))
    assert "cotangents: " in terminal.getvalue()


def test_none_for_one_cotangent(terminal: Terminal) -> None:
    tls.attribute(zoo.specimen("bridge llama").model, PROMPT, tls.SemanticScope(3))
    assert terminal.getvalue() == ""


@pytest.mark.parametrize("ask", [ask, lambda model: tls.evaluate(model, [PROMPT] * 2, [tls.SemanticScope(3)], FEW)])
def test_none_in_notebooks_and_logs(ask: Callable[[Any], Any], capfd: pytest.CaptureFixture[str]) -> None:
    """Their stderr is not a terminal, and what is written there stays."""
    ask(zoo.specimen("bridge llama").model)
    captured = capfd.readouterr()
    assert captured.err == captured.out == ""


def test_a_thread_of_its_own(terminal: Terminal) -> None:
    """What is hidden comes back, also after an error, and inside of another that hides."""
    with pytest.raises(KeyError), no_progress():
        raise KeyError
    with no_progress(), no_progress(hidden=False), progress_bar(5, "steps") as bar:
        assert bar.disable
    with progress_bar(5, "steps") as bar:
        assert not bar.disable


@pytest.mark.parametrize("kind", ["bridge", *(["hooked"] if zoo.HookedTransformer else [])])
@pytest.mark.parametrize("shown", [True, False])
def test_loading_what_is_there_draws_no_bar(
    kind: Any, shown: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """And the user's own setting is as it was."""
    before = logging.is_progress_bar_enabled()
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
    try:
        tls.load_tiny(kind)
        assert "Loading weights" not in capfd.readouterr().err
        assert logging.is_progress_bar_enabled() is shown
        shutil.copy(zoo.GOLDEN / "config.json", tmp_path)
        with pytest.raises(ValueError, match="cannot load the model"):
            tls.models.load(tmp_path, device="cpu")
        assert logging.is_progress_bar_enabled() is shown
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()
