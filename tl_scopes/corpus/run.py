"""A corpus in, a folder of answers out, which goes on after any interruption."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, SupportsIndex, get_args

from tl_scopes import models
from tl_scopes.circuits.carried import require_parts
from tl_scopes.circuits.cut import By
from tl_scopes.corpus import on_ray
from tl_scopes.corpus.job import Predictions, names_target
from tl_scopes.corpus.parts import Parts
from tl_scopes.corpus.saved import Corpus, read_corpus
from tl_scopes.corpus.source import Row, Source
from tl_scopes.corpus.worker import Computed, Loader, Options, Part, Worker, loader
from tl_scopes.models import Model, Prompt, Rules
from tl_scopes.models.arguments import as_flag
from tl_scopes.progress import no_progress, progress_bar
from tl_scopes.scopes.fingerprint import identity
from tl_scopes.scopes.scope import Scope, require_scope
from tl_scopes.scopes.semantic import SemanticScope
from tl_scopes.scopes.written import as_written


def attribute_corpus(
    prompts: str | Path | Iterable[Prompt] | Iterable[Mapping[str, Any]],
    out: str | Path,
    scope: Scope = SemanticScope(),
    *,
    model: Model | str | Path | Loader | None = None,
    columns: Mapping[str, str | None] | None = None,
    generate: int | SupportsIndex | None = None,
    score_answer: bool = False,
    wrt: str = models.EMBEDDING,
    of: str = models.READOUT,
    batch_size: int | SupportsIndex = 8,
    part_size: int | SupportsIndex = 128,
    predictions: Predictions = "last",
    carried_by: By | None = None,
    strongest: int | SupportsIndex | None = None,
    prepend_bos: bool | None = None,
    checkpoint: bool = False,
    rules: Rules = None,
    engine: Literal["local", "ray"] = "local",
    actors: int | SupportsIndex | None = None,
    num_gpus: int | float = 0,
    progress: bool = True,
) -> Corpus:
    """`attribute` for each prompt of a corpus, at its last position, kept in a folder of Parquet files; or a map of all
    its predictions, or the paths of its score through the network.

    Run it again after any interruption, and it goes on: nothing is lost but the part that was being computed, nothing
    is computed twice, and the files are those of a run without interruptions, byte for byte, on the same machine.

    Each row has the columns id, prompt, scores, token_ids, tokens, target, value, quantity, scope, unit,
    standard_error, notes, error, provenance; and record, from which `tl_scopes.read_corpus` makes the Attribution. A
    prompt that is not a text (a chat, token ids) stands in its column as JSON. A prompt that has no answer is a row
    with its error, and is not tried again. Where every prediction is asked about, each has a row, with two columns
    more: position, and answer_token, its text. Where paths are asked for, scores are those of the source tokens, and
    there are three columns more: positions, where these stand, parts, the names of the components, and values, for each
    component what it carries of each score; value, quantity and standard_error are empty then, and what goes around the
    parts stands in the record.

    Args:
        prompts: the path of a file in JSON lines (.jsonl), CSV or Parquet, or of a folder of Parquet files; or an
            iterable, a `datasets.Dataset` say, of prompts as in `linearize`, or of dicts; or a table of pandas or
            polars. A line in JSON is a text, a chat, a list of token ids, or an object. What has columns must have one
            for the prompts: prompt, text, messages, or input_ids. It may have id, texts or integers that are all
            different, else the number of the row is the id; and answer, target and foil, as in `attribute_many`: what a
            row has goes before the target and `versus` of the scope. A row that has no answer or target of its own, or
            null, NaN or an empty text, is asked about the scope's target, or the most likely next token. A number such
            as 5.0, which pandas makes of 5 in a column with gaps, is the id 5. Other columns are left alone.
        out: the folder. It belongs to one job: one scope, model, weights, settings and versions.
        scope: the question; by default `SemanticScope()`.
        model: a `HookedTransformer` or a `TransformerBridge`; or what `models.load` takes, a name or a folder; or a
            function without arguments that loads one; None is the bundled model.
        columns: what the columns are called, {"prompt": "question", "answer": "reply"} say; None for one that is there
            and does not mean this, {"target": None} say.
        generate: let the model say so many tokens at most after each prompt that has neither answer nor target, the
            likeliest ones as `tls.generate` does, and explain them as its answer. Each is a forward pass more.
        score_answer, wrt, of, checkpoint, rules: as in `linearize`.
        batch_size: how many prompts go through the model together.
        part_size: how many prompts a file holds, all of which are computed again when the process is killed before the
            last of them.
        predictions: "last" explains the prediction after the prompt, or the answer as a whole. "every" explains every
            prediction of the prompt, as `attribution_map` does, or every token of the answer where the row has one, as
            `answer_map` does; a target of the row's own counts as its answer. Prompts then go through the model one by
            one, whatever the batch_size.
        carried_by: keeps how much of each score runs through each part of the network, as `carried_by(lin, scope, by)`
            does: "head", "qkv", "layer", "neuron" or "position". Prompts then go through the model one by one, whatever
            the batch_size.
        strongest: with `carried_by`, how many tokens' scores are split, those with the largest; None is all of them. It
            takes the scope once more to know which, so that it saves time where prompts are long.
        prepend_bos: whether text gets a BOS token; None is TransformerLens' own default for the model.
        engine: "local" computes in this process. "ray" computes in actors of Ray's, each with a model of its own, on
            this machine or on a cluster (`ray.init(address="auto")` before); it takes the package Ray
            (`tl-scopes[ray]`). The folder is written by this process alone, need not be shared, and is the same.
        actors: how many of them; None is one for each GPU, or one.
        num_gpus: how many GPUs each actor has to itself, or which part of one.
        progress: whether to show how many prompts are done, how fast, and the time left, where this runs on a terminal.

    Returns:
        The `Corpus`, as `tl_scopes.read_corpus(out)` gives it.

    Cost: as `attribute_many`, or for each prompt as `attribution_map`, `answer_map` or `carried_by`; and a pass over
        the weights, the prompts and the parts that are there. Memory for one part, and for the ids.

    Raises:
        TypeError: for something that is not a scope, or a scope whose scores `carried_by` cannot split; for a table
            whose rows cannot be taken; for an option that is not a bool, or not an integer; for a scope with an option
            whose contents cannot be read.
        ValueError: for another `predictions` or `carried_by`, for both together, for `strongest` without the latter;
            for a scope that names a target of several tokens, or score_answer, where every prediction is asked about;
            for a foil there, or for a scope that does not compare, or where no row has an answer or target, of an
            iterator none of the first part;
            for prompts that cannot be read, with the line; for ids that are missing or twice, and columns that
            are not there; for a folder of another job, with other prompts, or with a part that was cut off or changed;
            for a model with hooks of yours; for a part_size, batch_size or `generate` below 1, and `generate` with a
            scope that names its target. Where no prompt of a whole first part has an answer, the first error is
            raised; where there are fewer prompts than a part, a warning says that none of them has an answer, and why.
        ImportError: for engine="ray" without Ray. ValueError for another engine, for actors or num_gpus without Ray,
            for more actors or GPUs than Ray has, and for a model with Ray that is loaded already.
        RuntimeError: while another process writes into the folder.
        OSError: where a part cannot be written, on a full disk say; what was kept before stays.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> prompts = [{"id": "a", "prompt": "The keys near the door"}, {"id": "b", "prompt": "The key near the doors"}]
        >>> corpus = tls.attribute_corpus(prompts, folder, tls.SemanticScope())
        >>> corpus["b"].target.text
        ' is'
    """
    require_scope(scope)
    progress = as_flag(progress, "progress")
    given = {"score_answer": score_answer, "checkpoint": checkpoint, "rules": rules, "batch_size": batch_size}
    options = Options(
        wrt=wrt,
        of=of,
        **Options.checked(**given, scope=scope, generate=generate, prepend_bos=prepend_bos),
        part_size=models.as_count(part_size, "part_size must be at least 1"),
        predictions=predictions,
        carried_by=carried_by,
        strongest=None if strongest is None else models.as_count(strongest, "strongest must be at least 1"),
    )
    _require_one_kind(options)
    if options.kind != "prediction":
        options = replace(options, batch_size=1)
    count = None if actors is None else models.as_count(actors, "actors must be at least 1")
    source = Source.of(prompts, columns or {})
    # Better before hours of work than after them.
    total = sum(1 for _ in _rows(source, options)) if source.is_rereadable else None
    with _workers(engine, loader(model), options, count, num_gpus, progress) as workers:
        settings, made = workers.about()
        settings["scopes"] = {"scope": identity(scope, "scope")}
        with Parts.open(Path(out), settings, {"provenance": made}) as parts:
            _go_on(source, total, parts, workers, options, progress)
    corpus = read_corpus(out)
    failed = sum(entry["errors"] for entry in corpus.entries)
    if failed:
        models.warn(_about_errors(corpus, failed))
    if not len(corpus):
        models.warn(f"there is no prompt in what was given, and so no answer in {str(out)!r}.")
    return corpus


def _about_errors(corpus: Corpus, failed: int) -> str:
    """How many prompts have no answer, and why the first has none."""
    id, error = next(iter(corpus.errors.items()))
    first = f"the first, {models.abridged(id)}: {error if len(error) <= 400 else error[:399] + '…'}"
    if failed < len(corpus):
        return f"{failed} of {len(corpus)} prompts have no answer, for the reasons in the column 'error'; {first}"
    none = "the only prompt has no answer" if failed == 1 else f"none of the {failed} prompts has an answer"
    return (
        f"{none}, so that something is probably wrong with the call, or with all prompts; {first} Another run does not "
        f"try these prompts again: correct what is wrong, and give another folder than {str(corpus.path)!r}, or delete "
        "that one."
    )


def _require_one_kind(options: Options) -> None:
    """Refuse what cannot be kept of a prompt, before a model is loaded.

    Raises:
        ValueError: with what to do instead.
        TypeError: for a scope whose scores `carried_by` cannot split.
    """
    if options.predictions not in ("last", "every"):
        raise ValueError(f'predictions is "last" or "every", got {options.predictions!r}.')
    if options.carried_by not in (None, *get_args(By)):
        raise ValueError(f"carried_by is one of {', '.join(map(repr, get_args(By)))}, got {options.carried_by!r}.")
    if options.carried_by is None and options.strongest is not None:
        raise ValueError(
            f"strongest={options.strongest} says how many tokens' scores are split over the network: give carried_by, "
            '"head" say.'
        )
    if options.predictions == "every" and options.carried_by is not None:
        raise ValueError(
            f'carried_by={options.carried_by!r} splits the score of one prediction: leave predictions="every" out, and '
            "give another folder for it."
        )
    if options.carried_by is not None:
        require_parts(options.scope)
    if options.predictions == "every" and options.score_answer:
        raise ValueError('predictions="every" scores earlier tokens of an answer in any case: leave score_answer out.')


def _rows(source: Source, options: Options) -> Iterator[Row]:
    """The rows of the prompts, after a look at their foils.

    All are looked at before the first is computed where they can be read twice, and else those of the first part.

    Raises:
        ValueError: for a foil that nothing would be compared with; as the source does.
    """
    alone, compared = None, names_target(options.scope) or options.generate is not None
    for number, row in enumerate(source, 1):
        compared = compared or bool(row.asked.keys() & {"answer", "target"})
        if row.asked.get("foil") is not None:
            if options.predictions == "every":
                raise _useless_foil(row, 'predictions="every" explains one answer: leave')
            if not options.scope.compares:
                raise _useless_foil(row, f"{as_written(options.scope)} does not compare two answers: leave")
            alone = alone or row
        if number == options.part_size and not source.is_rereadable:
            if alone is not None and not compared:
                break
            compared = True  # what is computed is kept, and a foil alone from here on is the error of its row
        yield row
    if alone is not None and not compared:  # where others have one, that is the error of this row alone
        why = "no answer or target that is compared with it: give these as well, or leave"
        raise _useless_foil(alone, why)


def _useless_foil(row: Row, why: str) -> ValueError:
    foil = models.abridged(row.asked["foil"])
    return ValueError(
        f"the prompt {models.abridged(row.id)} has the foil {foil}, and {why} the column of foils out, "
        "columns={'foil': None}."
    )


def _workers(
    engine: str, load: Loader, options: Options, actors: int | None, num_gpus: int | float, progress: bool
) -> AbstractContextManager[Worker | on_ray.Actors]:
    """What computes, in this process or in others.

    Raises:
        ValueError: for another engine, and for actors or GPUs of Ray's without Ray.
    """
    if engine == "ray":
        return on_ray.actors(load, options, actors, num_gpus)
    if engine != "local":
        raise ValueError(f'engine is "local" or "ray", got {engine!r}.')
    if actors is not None or num_gpus:
        raise ValueError(
            'actors and num_gpus are for engine="ray": in this process there is one model, on the device it was loaded '
            "to."
        )
    return nullcontext(Worker(load, options, progress))


def _go_on(
    source: Source, total: int | None, parts: Parts, workers: Worker | on_ray.Actors, options: Options, progress: bool
) -> None:
    """Compute the parts that are not there."""
    made, count, warned, answered = parts.log.about["provenance"], 0, False, bool(parts.entries)

    def missing() -> Iterator[Part]:
        nonlocal count
        rows = _rows(source, options)
        while (part := list(islice(rows, options.part_size))) or not count:
            if not parts.has(count, part):
                yield count, part
            else:
                bar.update(len(part))
                bar.initial = bar.n  # these do not count in the rate
            count += 1

    with no_progress(not progress):
        bar = progress_bar(total, "prompts", unit="prompt", delay=0)
    try:
        with bar:
            for (number, rows), computed in workers.all(missing(), made, bar):
                _require_answers(computed, rows, options, answered)
                answered = True
                if computed.caveat is not None and not warned:
                    models.warn(computed.caveat)
                    warned = True
                parts.write(number, rows, computed.table, computed.errors)
    except KeyboardInterrupt:
        kept = sum(entry["rows"] for entry in parts.entries.values())
        of = "the prompts given" if total is None else models.counted(total, "prompt")
        raise KeyboardInterrupt(f"{kept} of {of} are kept; run it again to go on.") from None
    beyond = [other for other in parts.entries if other >= count]
    if beyond:
        raise ValueError(
            f"{str(parts.path(min(beyond)))!r} holds answers to more prompts than were given: give all prompts of the "
            "job, or another folder."
        )


def _require_answers(computed: Computed, rows: Any, options: Options, answered: bool) -> None:
    """Where a whole first part fails, it will be the fault of all.

    Raises:
        Exception: the first error.
    """
    if computed.first is not None and not answered and len(rows) == options.part_size > 1:
        computed.first.add_note(f"none of the first {len(rows)} prompts of attribute_corpus has an answer")
        raise computed.first
