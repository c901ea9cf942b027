"""What computes the parts of a corpus: one model, in this process or in an actor of Ray's."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tqdm import tqdm

from tl_scopes import models
from tl_scopes.api import require_one_token
from tl_scopes.circuits.cut import By
from tl_scopes.corpus.job import Asked, CarriedBy, EveryPrediction, Job, Predictions, Settings
from tl_scopes.corpus.source import ASKED, Row
from tl_scopes.corpus.table import Kind, attributions, rows_of, schema
from tl_scopes.models import Model, Provenance
from tl_scopes.progress import no_progress, progress_bar
from tl_scopes.scopes.fingerprint import settings_of
from tl_scopes.scopes.scope import caveat_of
from tl_scopes.scopes.written import as_written
from tl_scopes.tiny import load_tiny

if TYPE_CHECKING:
    import pyarrow as pa

Loader = Callable[[], Model]
"""What loads a model, here or in another process."""

Part = tuple[int, Sequence[Row]]
"""The number of a part, and its prompts."""


class Computed(NamedTuple):
    """The answers to the prompts of a part."""

    table: "pa.Table"
    errors: int
    """How many prompts have no answer."""
    first: Exception | None
    """The first error, where no prompt has an answer."""
    caveat: str | None
    """What the scope has to say about its answers."""


@dataclass(frozen=True, kw_only=True)
class Options(Settings):
    """What is the same for all prompts of a corpus, beside the model."""

    part_size: int
    predictions: Predictions
    carried_by: By | None
    strongest: int | None

    @property
    def kind(self) -> Kind:
        """What is kept of each prompt."""
        if self.carried_by is not None:
            return "paths"
        return "map" if self.predictions == "every" else "prediction"

    def job(self, model: Model) -> Job:
        """What asks the prompts."""
        if self.carried_by is not None:
            return CarriedBy(model, self, {}, self.carried_by, self.strongest)
        return (EveryPrediction if self.predictions == "every" else Job)(model, self, {})

    def settings(self, model: Model, made: Provenance) -> dict[str, Any]:
        """What answers depend on, beside the prompts and the scope.

        The process that keeps the answers names the scope: a class of the user's that was sent to another process can
        look different there.

        Raises: as `settings_of` does.
        """
        found = settings_of(model, {}, "attribute outside of model.hooks(...)")
        found |= {name: getattr(made, name) for name in ("transformer_lens", "transformers", "torch", "attention")}
        found |= {name: value for name, value in vars(self).items() if name not in ("scope", "rules")}
        return found | {"device": made.device.split(":")[0], "rules": self.rules and str(self.rules)}


class Worker:
    """A model that answers the prompts of a corpus.

    Args:
        load: what gives the model.
        options: what is the same for all prompts.
        progress: whether it may draw bars.
    """

    def __init__(self, load: Loader, options: Options, progress: bool = False) -> None:
        self.model, self.options, self.progress = load(), options, progress
        models.check_model(self.model)
        if options.predictions == "every":
            require_one_token(self.model, options.scope)

    def about(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The settings, and the provenance of the answers."""
        made = Provenance.of(self.model)
        return self.options.settings(self.model, made), asdict(made)

    def compute(self, rows: Sequence[Row], made: Mapping[str, Any], bar: tqdm | None = None) -> Computed:
        """The answers to the prompts of a part.

        Args:
            rows: the prompts.
            made: the provenance of all answers of the job.
            bar: what counts the prompts.
        """
        import pyarrow as pa

        options, model = self.options, self.model
        if bar is None:
            with no_progress():
                bar = progress_bar(None, "prompts")
        window = [(i, _asked(row)) for i, row in enumerate(rows)]
        found = options.job(model).answers(window, bar, self.progress)
        failed = [one for _, one in sorted(found.items()) if isinstance(one, Exception)]
        answered = [(rows[i].id, one) for i, answer in sorted(found.items()) for one in attributions(answer)]
        caveat = caveat_of(options.scope, [one for _, one in answered], [id for id, _ in answered])
        scope, provenance = as_written(options.scope), Provenance(**made)
        lines = [line for i, row in enumerate(rows) for line in rows_of(row, found[i], scope, provenance)]
        double = next(model.parameters()).dtype == torch.float64
        table = pa.Table.from_pylist(lines, schema(type(rows[0].id) if rows else int, double, options.kind))
        first = failed[0].with_traceback(None) if failed and len(failed) == len(rows) else None
        return Computed(table, len(failed), first, caveat)

    def all(self, parts: Iterator[Part], made: Mapping[str, Any], bar: tqdm) -> Iterator[tuple[Part, Computed]]:
        """The answers to all prompts, part after part."""
        for number, rows in parts:
            yield (number, rows), self.compute(rows, made, bar)


def loader(model: Model | str | Path | Loader | None) -> Loader:
    """What gives the model that is meant."""
    if model is None:
        return load_tiny
    if isinstance(model, str | Path):
        return _Named(model)
    is_function = callable(model) and not isinstance(model, torch.nn.Module)
    return model if is_function else _Given(model)


@dataclass(frozen=True)
class _Named:
    """A model by its name or path."""

    name: str | Path

    def __call__(self) -> Model:
        return models.load(self.name)


@dataclass(frozen=True, eq=False)
class _Given:
    """A model that is loaded already."""

    model: Model

    def __call__(self) -> Model:
        return self.model


def is_given(load: Loader) -> bool:
    """Whether the model is an object of this process, which no other can load."""
    return isinstance(load, _Given)


def _asked(row: Row) -> Asked:
    answer, target, foil = map(row.asked.get, ASKED)
    return Asked(row.prompt, answer, target, foil, row.wrong)
