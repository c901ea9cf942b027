"""A corpus on actors of Ray's gives the files of one process."""

import dataclasses
import importlib.util
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tl_scopes as tls
from tl_scopes.corpus.on_ray import Actors
from tl_scopes.tiny.tasks import examples

PROMPTS = [{"id": f"p{i}", "prompt": example.prompt} for i, example in enumerate(examples("agreement", 30))]
FASTER: dict[str, Any] = {"part_size": 4, "batch_size": 2, "progress": False}


def parts(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.parquet"))}


def test_bad_engines(tiny: Any, tmp_path: Path, no_type_checks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are refused before anything is started or written."""
    for options, error, message in [
        ({"engine": "dask"}, ValueError, 'engine is "local" or "ray", got \'dask\''),
        ({"actors": 2}, ValueError, 'actors and num_gpus are for engine="ray": in this process there is one model'),
        ({"num_gpus": 1}, ValueError, 'actors and num_gpus are for engine="ray"'),
        ({"actors": 0, "engine": "ray"}, ValueError, "actors must be at least 1, got 0"),
    ]:
        with pytest.raises(error, match=message):
            tls.attribute_corpus(PROMPTS, tmp_path / "s", tls.SemanticScope(), model=tiny, **options)  # type: ignore[arg-type]
    monkeypatch.setattr("tl_scopes.corpus.on_ray.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'engine="ray" takes the package Ray, which is not installed: pip install'):
        tls.attribute_corpus(PROMPTS, tmp_path / "s", tls.SemanticScope(), engine="ray")
    monkeypatch.setattr("tl_scopes.corpus.on_ray.find_spec", lambda name: name)
    with pytest.raises(ValueError, match='with engine="ray" every actor loads the model for itself: give its name'):
        tls.attribute_corpus(PROMPTS, tmp_path / "s", tls.SemanticScope(), model=tiny, engine="ray")
    assert not (tmp_path / "s").exists()


@pytest.mark.ray
def test_actors_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """Machines of a cluster with other versions or weights never answer one corpus."""
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "get", list)
    found = [SimpleNamespace(about=SimpleNamespace(remote=lambda v=v: ({"torch": v, "model": "m"}, {}))) for v in "12"]
    with pytest.raises(
        ValueError, match=r"the actors of Ray differ \(torch is '1' and '2'\): give all machines the same"
    ):
        Actors(found).about()


@pytest.mark.ray
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_actors_give_the_same_files(tiny: Any, tmp_path: Path) -> None:
    """Two actors, one of which is killed, and a folder that was begun without Ray."""
    import ray

    @dataclasses.dataclass(frozen=True)
    class Dying(tls.TemperatureScope):
        """A scope that kills its process once."""

        flag: str = str(tmp_path / "killed")

        def cotangents(self, lin: tls.Linearization) -> Any:
            if lin.str_tokens[1:] == self.tokens and not os.path.exists(self.flag):
                open(self.flag, "w").close()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().cotangents(lin)

        tokens: tuple[str, ...] = tls.linearize(tiny, PROMPTS[17]["prompt"]).str_tokens[1:]

    out, whole, scope = tmp_path / "scores", tmp_path / "whole", Dying()
    (tmp_path / "killed").touch()
    tls.attribute_corpus(PROMPTS, whole, scope, model=tiny, **FASTER)
    tls.attribute_corpus(PROMPTS[:6], out, scope, model=tiny, **FASTER)
    (tmp_path / "killed").unlink()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        for options, message in [
            ({"actors": 3}, r"3 actors take 3 CPUs, and Ray has 2, so that it would wait .* ray\.init\(num_cpus=3\)"),
            (
                {"num_gpus": 1},
                r"1 actors take 1 GPUs, and Ray has 0, so .* give num_gpus=0 to compute on processors",
            ),
        ]:
            with pytest.raises(ValueError, match=message):
                tls.attribute_corpus(PROMPTS, out, scope, engine="ray", **FASTER | options)  # type: ignore[arg-type]
        corpus = tls.attribute_corpus(PROMPTS, out, scope, engine="ray", actors=2, **FASTER)
    finally:
        ray.shutdown()
    assert len(corpus) == 30
    assert (tmp_path / "killed").exists()
    assert parts(out) == parts(whole)
