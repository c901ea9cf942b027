"""The parts of a corpus on several processes or machines: actors of Ray's, each with a model of its own.

Ray starts the actors, hands them prompts, and starts an actor again that died. What is kept is kept by the process that
asks, as without Ray: so the folder need not be shared, and the files are the same, byte for byte.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from tqdm import tqdm

from tl_scopes.corpus.worker import Computed, Loader, Options, Part, Worker, is_given


class Actors:
    """Models in actors, which take part after part as they come to be free."""

    def __init__(self, actors: list[Any]) -> None:
        self.actors = actors

    def about(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The settings, and the provenance of the answers.

        Raises:
            ValueError: where actors have other versions, weights or kinds of devices.
        """
        import ray

        (settings, made), *others = ray.get([actor.about.remote() for actor in self.actors])
        for other, _ in others:
            different = [name for name in settings if settings[name] != other[name]]
            if different:
                listed = "; ".join(f"{name} is {settings[name]!r} and {other[name]!r}" for name in different)
                raise ValueError(f"the actors of Ray differ ({listed}): give all machines the same model and packages.")
        return settings, made

    def all(self, parts: Iterator[Part], made: Mapping[str, Any], bar: tqdm) -> Iterator[tuple[Part, Computed]]:
        """The answers to all prompts, in the order in which parts are done."""
        import ray

        free = list(self.actors)
        working: dict[Any, tuple[Any, Part]] = {}

        def done() -> tuple[Part, Computed]:
            [result], _ = ray.wait(list(working), num_returns=1)
            actor, part = working.pop(result)
            free.append(actor)
            bar.update(len(part[1]))
            return part, ray.get(result)

        for part in parts:
            if not free:
                yield done()
            actor = free.pop()
            working[actor.compute.remote(list(part[1]), dict(made))] = actor, part
        while working:
            yield done()


@contextmanager
def actors(load: Loader, options: Options, count: int | None, num_gpus: int | float) -> Iterator[Actors]:
    """Actors with models, until the end of the block; Ray is started on this machine, if it is not running.

    Args:
        load: what gives an actor its model.
        options: what is the same for all prompts.
        count: how many; None is one for each GPU, or one.
        num_gpus: how many GPUs each has to itself, or which part of one.

    Raises:
        ImportError: where Ray is not installed.
        ValueError: for a model that is loaded already; for more actors than there are processors, or GPUs, which Ray
            would wait for without end.
    """
    if find_spec("ray") is None:
        raise ImportError('engine="ray" takes the package Ray, which is not installed: pip install "tl-scopes[ray]".')
    if is_given(load):
        raise ValueError(
            'with engine="ray" every actor loads the model for itself: give its name, its folder, or a function that '
            "loads it, model=lambda: TransformerBridge.boot_transformers(name) say."
        )
    import ray

    ours = not ray.is_initialized()
    if ours:
        ray.init(include_dashboard=False, log_to_driver=False)
    try:
        there = ray.cluster_resources()
        if count is None:
            count = max(1, int(there.get("GPU", 0) // num_gpus)) if num_gpus else 1
        for kind, each, remedy in (
            ("GPU", num_gpus, "give num_gpus=0 to compute on processors"),
            ("CPU", 1, f"give fewer actors, or ray.init(num_cpus={count}) before, which counts processors as you say"),
        ):
            if there.get(kind, 0) < count * each:
                raise ValueError(
                    f"{count} actors take {count * each:g} {kind}s, and Ray has {there.get(kind, 0):g}, so that it "
                    f"would wait without end: {remedy}."
                )
        remote = ray.remote(Worker).options(num_cpus=1, num_gpus=num_gpus, max_restarts=-1, max_task_retries=2)
        yield Actors([remote.remote(load, options) for _ in range(count)])
    finally:
        if ours:
            ray.shutdown()
