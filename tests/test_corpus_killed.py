"""A corpus that is killed at any moment goes on, and ends with the files of a run without interruptions."""

import multiprocessing
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tl_scopes as tls
from tl_scopes.corpus.parts import MANIFEST
from tl_scopes.tiny.tasks import examples

if not hasattr(os, "fork"):
    pytest.skip("a process that is killed is a fork of this one", allow_module_level=True)

FORK = multiprocessing.get_context("fork")
PROMPTS = [{"id": f"p{i}", "prompt": example.prompt} for i, example in enumerate(examples("agreement", 24))]
PROMPTS[7]["prompt"] = ""


def attribute(model: Any, out: Path, before: Callable[[], object] = lambda: None) -> None:
    before()
    tls.attribute_corpus(PROMPTS, out, tls.SemanticScope(), model=model, part_size=4, batch_size=2, progress=False)


def started(*args: Any) -> Any:
    process = FORK.Process(target=attribute, args=args)
    process.start()
    return process


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


@pytest.fixture(scope="module")
def whole(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a run without interruptions."""
    out = tmp_path_factory.mktemp("whole") / "scores"
    with pytest.warns(UserWarning, match="1 of 24 prompts have no answer"):
        attribute(tiny, out)
    return files(out)


def slow_disk() -> None:
    """Let the disk take its time, so that a process is killed while it writes as often as while it computes."""
    fsync, rng = os.fsync, random.Random(os.getpid())

    def slow(descriptor: int) -> None:
        time.sleep(rng.random() / 20)
        fsync(descriptor)
        time.sleep(rng.random() / 20)

    os.fsync = slow


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random(tiny: Any, tmp_path: Path, whole: dict[str, bytes], kills: int) -> None:
    """As often as it is killed, whatever it is doing, nothing is lost and nothing is there twice."""
    rng, done, killed = random.Random(kills), 0, 0
    while killed < kills:
        out = tmp_path / f"scores{done}"
        process = started(tiny, out, slow_disk)
        process.join(rng.uniform(0.05, 1.5))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            killed += process.exitcode == -signal.SIGKILL
        if process.exitcode == 0:
            assert files(out) == whole
            done += 1
    with pytest.warns(UserWarning, match="1 of 24 prompts have no answer"):
        attribute(tiny, out)
    assert files(out) == whole


def dies_at(call: int) -> Callable[[], None]:
    """Kill this process at the so-manieth moment that matters: before and after each fsync and each renaming."""

    def prepare() -> None:
        left, fsync, replace = iter(range(call, -1, -1)), os.fsync, Path.replace

        def moment() -> None:
            if not next(left):
                os.kill(os.getpid(), signal.SIGKILL)

        def dying_fsync(descriptor: int) -> None:
            moment()
            fsync(descriptor)
            moment()

        def dying_replace(path: Path, target: Path) -> Path:
            moment()
            found = replace(path, target)
            moment()
            return found

        os.fsync, Path.replace = dying_fsync, dying_replace  # type: ignore[method-assign,assignment]

    return prepare


@pytest.mark.parametrize("call", range(0, 12, 1))
def test_killed_while_a_part_is_written(tiny: Any, tmp_path: Path, whole: dict[str, bytes], call: int) -> None:
    """The first line, the temporary file, its renaming, the entry in the log: whichever was the last."""
    out = tmp_path / "scores"
    process = started(tiny, out, dies_at(call))
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with pytest.warns(UserWarning, match="1 of 24 prompts have no answer"):
        attribute(tiny, out)
    assert files(out) == whole


@pytest.mark.parametrize("size", [1, 40, 200])
def test_a_line_of_the_log_that_was_cut_off(tiny: Any, tmp_path: Path, whole: dict[str, bytes], size: int) -> None:
    """Power fails in the middle of a line, be it the first one."""
    out = tmp_path / "scores"
    out.mkdir()
    for name, data in whole.items():
        (out / name).write_bytes(data)
    log = whole[MANIFEST]
    (out / MANIFEST).write_bytes(log[:size] if size > 40 else log[:-size])
    if size == 200:  # half of a first line, and parts that nobody knows of
        for part in out.glob("*.parquet"):
            part.unlink()
    with pytest.warns(UserWarning, match="1 of 24 prompts have no answer"):
        attribute(tiny, out)
    assert files(out) == whole


def test_a_disk_that_is_full_in_the_middle_of_a_part(tiny: Any, tmp_path: Path, whole: dict[str, bytes]) -> None:
    """The system itself refuses to write on; a process dies of it with an error, and the next one goes on."""
    out = tmp_path / "scores"

    def little_room() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    process = started(tiny, out, little_room)
    process.join()
    assert process.exitcode == 1
    assert list(files(out)) == [MANIFEST, f"{MANIFEST}.lock"]
    with pytest.warns(UserWarning, match="1 of 24 prompts have no answer"):
        attribute(tiny, out)
    assert files(out) == whole


def test_two_at_once(tiny: Any, tmp_path: Path, whole: dict[str, bytes]) -> None:
    """Of two that are started on one folder by mistake one is refused, and the other is not disturbed."""
    out = tmp_path / "scores"
    processes = [started(tiny, out, slow_disk) for _ in range(2)]
    for process in processes:
        process.join()
    assert sorted(process.exitcode for process in processes) == [0, 1]
    assert files(out) == whole
