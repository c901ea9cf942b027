"""Many prompts: answers in their order, from batches."""

from collections.abc import Iterable, Iterator, Set, Sized
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, SupportsIndex

from tl_scopes import models
from tl_scopes.corpus.job import Asked, Job, Settings, names_target
from tl_scopes.corpus.source import cell
from tl_scopes.failures import Failures
from tl_scopes.models import Answer, Model, Prompt, Rules
from tl_scopes.models.arguments import as_flag
from tl_scopes.progress import no_progress, progress_bar
from tl_scopes.results.attribution import Attribution
from tl_scopes.scopes.scope import Scope, require_scope, warn
from tl_scopes.scopes.semantic import SemanticScope
from tl_scopes.scopes.written import as_written

_WINDOW = 16
"""Batches' worth of prompts that are read ahead and sorted by length, so that a batch needs little padding."""


def attribute_many(
    model: Model,
    prompts: Iterable[Prompt],
    scope: Scope = SemanticScope(),
    *,
    answers: Iterable[Answer | None] | None = None,
    targets: Iterable[Any] | None = None,
    foils: Iterable[Any] | None = None,
    generate: int | SupportsIndex | None = None,
    score_answer: bool = False,
    wrt: str = models.EMBEDDING,
    of: str = models.READOUT,
    batch_size: int | SupportsIndex = 8,
    prepend_bos: bool | None = None,
    on_error: Literal["warn", "raise"] = "warn",
    progress: bool = True,
    checkpoint: bool = False,
    rules: Rules = None,
) -> Iterator[Attribution | None]:
    """`attribute` for each prompt, at its last position, from batches: answers in the order of the prompts.

    Prompts are read some batches ahead and never kept, so that they may come from anywhere and be of any number. On
    several GPUs let each process take its own: `prompts[rank::world_size]`.

    Args:
        model: a `HookedTransformer` or a `TransformerBridge`, in evaluation mode.
        prompts: each as in `linearize`; or what a tokenizer returned for several texts.
        scope: the question; by default `SemanticScope()`.
        answers: what is said after each prompt, as `answer` in `linearize`: it is explained as a whole. For a prompt
            with None, or NaN as pandas has it, the scope's own target is, or the most likely next token.
        targets: what each prompt's question is about: as in `SemanticScope`. None as for answers. An answer or target
            that a prompt has goes before a target that the scope names.
        foils: what each answer or target, or the target that the scope names, is compared with. A foil goes before
            `versus` in the scope, which is for the prompts with None.
        generate: let the model say so many tokens at most after each prompt that has neither answer nor target, the
            likeliest ones as `tls.generate` does, and explain them as its answer. Each is a forward pass more.
        score_answer: whether the tokens of the answers get scores too.
        wrt, of: the hooks between which the Jacobian is taken, as in `linearize`.
        batch_size: how many prompts go through the model together. They are filled up on the right, where a causal
            model looks at nothing, whatever the tokenizer's padding side. While hooks of yours are set a batch has
            prompts of one length, since a hook may count positions from the end.
        prepend_bos: whether text gets a BOS token; None is TransformerLens' own default for the model.
        on_error: "warn": a prompt that cannot be answered is reported with its number, None stands in its place, and
            the others go on; but when none of the first 16 batches can be answered, the first error is raised, for it
            will be the fault of all. "raise": the first error ends it.
        progress: whether to show a progress bar, where this runs on a terminal.
        checkpoint, rules: as in `linearize`.

    Yields:
        One Attribution per prompt, or None.

    Cost: as `attribute`; on a GPU, and for small models, a batch takes about as long as one prompt.

    Raises:
        TypeError: for something that is not a scope, for one prompt or a table where there must be several prompts, for
            `progress` or `checkpoint` that is neither True nor False, for a batch_size or `generate` that is not an
            integer.
        ValueError: for a batch_size or `generate` below 1, and for another on_error; for `generate` with a scope that
            names its target; for answers together with targets, foils without
            either; where there are fewer or more of them than prompts. Else as `attribute` does.
        RuntimeError: when the model's hooks are no longer those of the call: answers are computed as they are asked
            for, so inside `model.hooks(...)` they must be taken inside as well.

    Example:
        >>> prompts = ["The keys near the door", "The key near the doors"]
        >>> answers = tls.attribute_many(model, prompts, tls.SemanticScope())
        >>> [answer.target.text for answer in answers]
        [' are', ' is']
        >>> answers = tls.attribute_many(model, prompts, tls.SemanticScope(), answers=[" are old", " is new"])
        >>> [answer.quantity for answer in answers]
        ["log p(' are old')", "log p(' is new')"]
    """
    require_scope(scope)
    models.check_model(model)
    options = {"score_answer": score_answer, "checkpoint": checkpoint, "rules": rules, "batch_size": batch_size}
    checked = Settings.checked(**options, scope=scope, generate=generate, prepend_bos=prepend_bos)
    settings = Settings(wrt=wrt, of=of, **checked)
    failures, progress = Failures("attribute_many", on_error, prompts), as_flag(progress, "progress")
    asked = _AllAsked.of(models.each_prompt(prompts), answers, targets, foils)
    if foils is not None and not names_target(scope) and all(given is None for given in (answers, targets, generate)):
        raise ValueError("foils are what answers or targets are compared with: give these as well.")
    if asked.foils is not None and not scope.compares:
        raise ValueError(f"{as_written(scope)} does not compare two answers, so that it has no use for foils.")
    return _answers(Job(model, settings, models.user_hooks(model)), asked, failures, progress)


@dataclass(frozen=True, eq=False)
class _AllAsked:
    """The prompts of a call, with what is asked about each."""

    prompts: Any
    answers: Iterable[Answer | None] | None
    targets: Iterable[Any] | None
    foils: Iterable[Any] | None

    @classmethod
    def of(cls, prompts: Any, answers: Any, targets: Any, foils: Any) -> "_AllAsked":
        """Refuse what cannot be, before any work.

        Raises:
            ValueError: for answers together with targets, and other numbers of them than prompts, where both are known.
            TypeError: for a single answer, target or foil.
        """
        if answers is not None and targets is not None:
            raise ValueError("give answers or targets, not both: either is what is explained after each prompt.")
        for name, given in (("answers", answers), ("targets", targets), ("foils", foils)):
            if given is not None and (isinstance(given, str | bytes | Set) or not isinstance(given, Iterable)):
                raise TypeError(f"{name} must be one for each prompt, in a list, got {given!r}.")
            if isinstance(given, Sized) and isinstance(prompts, Sized) and len(given) != len(prompts):
                count = models.counted(len(prompts), "prompt")
                raise ValueError(f"{name} must be one for each prompt: got {len(given)} for {count}.")
        return cls(prompts, answers, targets, foils)

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[Asked]:
        beside = [None if given is None else iter(given) for given in (self.answers, self.targets, self.foils)]
        missing = object()
        for number, prompt in enumerate(self.prompts):
            found = [None if column is None else next(column, missing) for column in beside]
            if any(one is missing for one in found):
                raise ValueError(f"prompt {number} has no answer, target or foil: give one for each prompt.")
            yield Asked(prompt, *map(cell, found))
        if any(column is not None and next(column, missing) is not missing for column in beside):
            raise ValueError("there are more answers, targets or foils than prompts: give one for each prompt.")


def _answers(job: Job, prompts: _AllAsked, failures: Failures, progress: bool) -> Iterator[Attribution | None]:
    numbered, warned = enumerate(prompts), False
    total = len(prompts) if isinstance(prompts.prompts, Sized) else None
    with no_progress(not progress):
        bar = progress_bar(total, "prompts", unit="prompt", delay=0)
    with bar:
        end: Exception | None = None
        while end is None:
            window, end = _read(islice(numbered, _WINDOW * job.settings.batch_size))
            if not window:
                break
            found = job.answers(window, bar, progress)
            answered = {number: one for number, one in sorted(found.items()) if isinstance(one, Attribution)}
            warned = warned or warn(job.settings.scope, [*answered.values()], [*answered])
            if answered:
                failures.answered()
            for number, _ in window:
                answer = found[number]
                if isinstance(answer, Attribution):
                    yield answer
                else:
                    failures.add(number, answer)
                    failures.require_answer()
                    yield None
        if end is not None:
            raise end


def _read(numbered: Iterator[tuple[int, Asked]]) -> tuple[list[tuple[int, Asked]], Exception | None]:
    """The next prompts, and the error that ended them, if one did: the prompts before it are still answered."""
    window = []
    try:
        for numbered_prompt in numbered:
            window.append(numbered_prompt)
    except Exception as error:
        return window, error
    return window, None
