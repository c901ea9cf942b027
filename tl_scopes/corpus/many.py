"""Many prompts: answers in their order, from batches."""

import traceback
from collections.abc import Iterable, Iterator, Sequence, Set, Sized
from dataclasses import dataclass, replace
from itertools import islice, repeat
from typing import Any, Literal, NamedTuple, SupportsIndex

import torch
from tqdm import tqdm

from tl_scopes import models
from tl_scopes.failures import Failures
from tl_scopes.jacobian.linearization import Linearization, linearize_places
from tl_scopes.jacobian.span import Exchange, linearize_answers
from tl_scopes.models import Answer, LinearRules, Model, Prompt, ReadPrompt, Rules
from tl_scopes.models.arguments import as_flag
from tl_scopes.progress import no_progress, progress_bar
from tl_scopes.results.attribution import Attribution
from tl_scopes.scopes.scope import Scope, as_written, require_scope, warn

_WINDOW = 16
"""Batches' worth of prompts that are read ahead and sorted by length, so that a batch needs little padding."""


def attribute_many(
    model: Model,
    prompts: Iterable[Prompt],
    scope: Scope,
    *,
    answers: Iterable[Answer] | None = None,
    targets: Iterable[Any] | None = None,
    foils: Iterable[Any] | None = None,
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
        scope: the question.
        answers: what is said after each prompt, as `answer` in `linearize`: it is explained as a whole.
        targets: what each prompt's question is about, in place of a target in the scope: as in `SemanticScope`.
        foils: what each answer or target is compared with, in place of `versus` in the scope.
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
            `progress` or `checkpoint` that is neither True nor False.
        ValueError: for a batch_size below 1, and for another on_error; for answers together with targets, foils without
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
    batch_size = models.as_count(batch_size, "batch_size must be at least 1")
    score_answer, checkpoint = as_flag(score_answer, "score_answer"), as_flag(checkpoint, "checkpoint")
    job = Job(model, scope, wrt, of, score_answer, checkpoint, LinearRules.read(rules), models.user_hooks(model))
    failures, progress = Failures("attribute_many", on_error), as_flag(progress, "progress")
    asked = _AllAsked.of(models.each_prompt(prompts), answers, targets, foils)
    if asked.foils is not None and not scope.compares:
        raise ValueError(f"{as_written(scope)} does not compare two answers, so that it has no use for foils.")
    return _answers(job, asked, batch_size, prepend_bos, failures, progress)


class Asked(NamedTuple):
    """A prompt, and what is asked about it."""

    prompt: Prompt
    answer: Answer | None
    target: Any
    foil: Any
    named: bool
    """Whether the call names answers or targets."""

    def read(self, job: "Job", prepend_bos: bool | None) -> "Exchange | ReadPrompt":
        """The tokens of the prompt, and of what is said after it.

        Raises:
            ValueError: for None in the place of an answer or target; as `read_prompt` and `read_target` do.
        """
        if self.named and self.answer is None and self.target is None:
            raise ValueError("its answer or target is None: where some prompts have one, all must.")
        model, read = job.model, models.read_prompt(job.model, self.prompt, prepend_bos)
        vocab, said, foil, notes = models.output_size(model), None, None, read.notes
        if self.answer is not None:
            said, more = models.read_answer(model, self.answer, read.tokens)
            notes += more
        elif self.target is not None:
            said = models.read_target(model, self.target, vocab)
        if self.foil is not None:
            foil = models.read_target(model, self.foil, vocab, "foil")
        for name, given in (("target", said if self.answer is None else None), ("foil", foil)):
            if given is not None and given.is_span:
                notes += models.where_they_meet(model, read.tokens, given, name)
        return job.scope.exchange(model, read._replace(notes=notes), said, foil, vocab) or read


@dataclass(frozen=True, eq=False)
class _AllAsked:
    """The prompts of a call, with what is asked about each."""

    prompts: Any
    answers: Iterable[Answer] | None
    targets: Iterable[Any] | None
    foils: Iterable[Any] | None

    @classmethod
    def of(cls, prompts: Any, answers: Any, targets: Any, foils: Any) -> "_AllAsked":
        """Refuse what cannot be, before any work.

        Raises:
            ValueError: for answers together with targets, foils without either, and other numbers of them than prompts,
                where both are known.
            TypeError: for a single answer, target or foil.
        """
        if answers is not None and targets is not None:
            raise ValueError("give answers or targets, not both: either is what is explained after each prompt.")
        if foils is not None and answers is None and targets is None:
            raise ValueError("foils are what answers or targets are compared with: give these as well.")
        for name, given in (("answers", answers), ("targets", targets), ("foils", foils)):
            if given is not None and (isinstance(given, str | bytes | Set) or not isinstance(given, Iterable)):
                raise TypeError(f"{name} must be one for each prompt, in a list, got {given!r}.")
            if isinstance(given, Sized) and isinstance(prompts, Sized) and len(given) != len(prompts):
                raise ValueError(f"there are {len(prompts)} prompts and {len(given)} {name}: give one for each.")
        return cls(prompts, answers, targets, foils)

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[Asked]:
        columns = [repeat(None) if given is None else given for given in (self.answers, self.targets, self.foils)]
        several = [i for i, given in enumerate((self.answers, self.targets, self.foils)) if given is not None]
        rows = iter(self.prompts)
        beside = [iter(column) for column in columns]
        missing = object()
        for number, prompt in enumerate(rows):
            found = [next(column, missing) for column in beside]
            if any(found[i] is missing for i in several):
                raise ValueError(f"prompt {number} has no answer, target or foil: give one for each prompt.")
            answer, target, foil = found
            yield Asked(prompt, answer, target, foil, bool(several))  # type: ignore[arg-type]
        if any(next(beside[i], missing) is not missing for i in several):
            raise ValueError("there are more answers, targets or foils than prompts: give one for each prompt.")


@dataclass(frozen=True, eq=False)
class Job:
    """What is the same for all batches of a call."""

    model: Model
    scope: Scope
    wrt: str
    of: str
    score_answer: bool
    checkpoint: bool
    rules: LinearRules | None
    hooks: dict[str, tuple[object, ...]]
    """The user's hooks at the call."""

    def answers(
        self, window: Sequence[tuple[int, Asked]], batch_size: int, prepend_bos: bool | None, bar: tqdm, shown: bool
    ) -> dict[int, Attribution | Exception]:
        """An answer or an error for each numbered prompt, from batches of prompts of about the same length."""
        read: dict[int, ReadPrompt | Exchange] = {}
        found: dict[int, Attribution | Exception] = {}
        for number, prompt in window:
            try:
                read[number] = prompt.read(self, prepend_bos)
            except Exception as error:
                found[number] = error
        bar.update(len(found))
        for batch in self.batches(read, batch_size):
            with no_progress(not shown):  # not over a yield, which would hide the bars of whoever asks
                answers = self.ask([read[number] for number in batch])
            found |= dict(zip(batch, answers, strict=True))
            bar.update(len(batch))
        return found

    def batches(self, prompts: dict[int, ReadPrompt | Exchange], size: int) -> Iterator[list[int]]:
        """The numbers of the prompts that go through the model together.

        The longest come first, so that it shows at once where memory does not suffice. Hooks of the user's may count
        positions from the end, where a shorter prompt would be filled up: with hooks set a batch has one length.
        """
        order = sorted(prompts, key=lambda number: len(prompts[number].tokens), reverse=True)
        while order:
            batch = order[:size]
            if self.hooks:
                longest = _lengths(prompts[batch[0]])
                batch = [number for number in batch if _lengths(prompts[number]) == longest]
            order = order[len(batch) :]
            yield batch

    def ask(self, prompts: Sequence[ReadPrompt | Exchange]) -> list[Attribution | Exception]:
        """An answer or an error for each prompt; where a batch fails, each is asked alone, lest one cost the others."""
        if models.user_hooks(self.model) != self.hooks:
            raise RuntimeError(
                "the model's hooks have changed since attribute_many was called, and answers are computed as they are "
                "asked for: inside model.hooks(...) take them inside as well, with list(...) say."
            )
        try:
            return [*self._together(prompts)]
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # they would keep the graph until the error is reported
            if len(prompts) == 1:
                return [error]
        return [answer for prompt in prompts for answer in self.ask([prompt])]

    def _together(self, prompts: Sequence[ReadPrompt | Exchange]) -> list[Attribution]:
        """An answer for each prompt, from one forward pass."""
        lins = [*self._linearized(prompts)]
        for lin in lins:
            lin.require_finite()
        return list(self.scope.ask(lins))

    def _linearized(self, prompts: Sequence[ReadPrompt | Exchange]) -> Sequence[Linearization]:
        exchanges = [one for one in prompts if isinstance(one, Exchange)]
        if len(exchanges) == len(prompts):
            return linearize_answers(
                self.model,
                exchanges,
                self.wrt,
                self.of,
                score_answer=self.score_answer,
                checkpoint=self.checkpoint,
                rules=self.rules,
            )
        tokens = [prompt.tokens for prompt in prompts]
        # It does not matter what fills them up, but it must be a token that the model knows.
        padded = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=int(tokens[0][0]))
        lins = linearize_places(
            self.model,
            padded,
            [tuple(models.token_text(self.model, id) for id in ids.tolist()) for ids in tokens],
            self.wrt,
            self.of,
            places=[(entry, len(ids) - 1) for entry, ids in enumerate(tokens)],
            checkpoint=self.checkpoint,
            rules=self.rules,
            notes=[prompt.notes for prompt in prompts],
        )
        return [replace(lin, parts=prompt.parts) for lin, prompt in zip(lins, prompts, strict=True)]


def _answers(
    job: Job, prompts: _AllAsked, batch_size: int, prepend_bos: bool | None, failures: Failures, progress: bool
) -> Iterator[Attribution | None]:
    numbered, warned = enumerate(prompts), False
    total = len(prompts) if isinstance(prompts.prompts, Sized) else None
    with no_progress(not progress):
        bar = progress_bar(total, "prompts", unit="prompt", delay=0)
    with bar:
        end: Exception | None = None
        while end is None:
            window, end = _read(islice(numbered, _WINDOW * batch_size))
            if not window:
                break
            found = job.answers(window, batch_size, prepend_bos, bar, progress)
            warned = warned or warn(job.scope, [one for one in found.values() if isinstance(one, Attribution)])
            if any(isinstance(answer, Attribution) for answer in found.values()):
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


def _lengths(prompt: ReadPrompt | Exchange) -> list[int]:
    """How many tokens each text has that goes through the model."""
    return [len(text) for _, text in prompt.texts] if isinstance(prompt, Exchange) else [len(prompt.tokens)]


def _read(numbered: Iterator[tuple[int, Asked]]) -> tuple[list[tuple[int, Asked]], Exception | None]:
    """The next prompts, and the error that ended them, if one did: the prompts before it are still answered."""
    window = []
    try:
        for numbered_prompt in numbered:
            window.append(numbered_prompt)
    except Exception as error:
        return window, error
    return window, None
