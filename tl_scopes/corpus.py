"""Many prompts: answers in their order, from batches."""

import traceback
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, SupportsIndex

import torch
from tqdm.auto import tqdm

from tl_scopes import models
from tl_scopes.failures import Failures
from tl_scopes.jacobian.linearization import linearize_places
from tl_scopes.models import Model, Prompt, ReadPrompt
from tl_scopes.models.arguments import as_flag
from tl_scopes.results.attribution import Attribution
from tl_scopes.scopes.scope import Scope, require_scope, warn

_WINDOW = 16
"""Batches' worth of prompts that are read ahead and sorted by length, so that a batch needs little padding."""


def attribute_many(
    model: Model,
    prompts: Iterable[Prompt],
    scope: Scope,
    *,
    wrt: str = models.EMBEDDING,
    of: str = models.READOUT,
    batch_size: int | SupportsIndex = 8,
    prepend_bos: bool | None = None,
    on_error: Literal["warn", "raise"] = "warn",
    progress: bool = True,
    checkpoint: bool = False,
) -> Iterator[Attribution | None]:
    """`attribute` for each prompt, at its last position, from batches: answers in the order of the prompts.

    Prompts are read some batches ahead and never kept, so that they may come from anywhere and be of any number. On
    several GPUs let each process take its own: `prompts[rank::world_size]`.

    Args:
        model: a `HookedTransformer` or a `TransformerBridge`, in evaluation mode.
        prompts: each as in `linearize`; or what a tokenizer returned for several texts.
        scope: the question.
        wrt, of: the hooks between which the Jacobian is taken, as in `linearize`.
        batch_size: how many prompts go through the model together. They are filled up on the right, where a causal
            model looks at nothing, whatever the tokenizer's padding side. While hooks of yours are set a batch has
            prompts of one length, since a hook may count positions from the end.
        prepend_bos: whether text gets a BOS token; None is TransformerLens' own default for the model.
        on_error: "warn": a prompt that cannot be answered is reported with its number, None stands in its place, and
            the others go on; but when none of the first 16 batches can be answered, the first error is raised, for it
            will be the fault of all. "raise": the first error ends it.
        progress: whether to show a progress bar.
        checkpoint: as in `linearize`.

    Yields:
        One Attribution per prompt, or None.

    Cost: as `attribute`; on a GPU, and for small models, a batch takes about as long as one prompt.

    Raises:
        TypeError: for something that is not a scope, for one prompt or a table where there must be several prompts, for
            `progress` or `checkpoint` that is neither True nor False.
        ValueError: for a batch_size below 1, and for another on_error. Else as `attribute` does.
        RuntimeError: when the model's hooks are no longer those of the call: answers are computed as they are asked
            for, so inside `model.hooks(...)` they must be taken inside as well.

    Example:
        >>> prompts = ["The keys near the door", "The key near the doors"]
        >>> answers = tls.attribute_many(model, prompts, tls.SemanticScope())
        >>> [answer.target.text for answer in answers]
        [' are', ' is']
    """
    require_scope(scope)
    models.check_model(model)
    batch_size = models.as_count(batch_size, "batch_size must be at least 1")
    job = _Job(model, scope, wrt, of, as_flag(checkpoint, "checkpoint"), models.user_hooks(model))
    failures, progress = Failures("attribute_many", on_error), as_flag(progress, "progress")
    return _answers(job, models.each_prompt(prompts), batch_size, prepend_bos, failures, progress)


@dataclass(frozen=True, eq=False)
class _Job:
    """What is the same for all batches of a call."""

    model: Model
    scope: Scope
    wrt: str
    of: str
    checkpoint: bool
    hooks: dict[str, tuple[object, ...]]
    """The user's hooks at the call."""

    def batches(self, prompts: dict[int, ReadPrompt], size: int) -> Iterator[list[int]]:
        """The numbers of the prompts that go through the model together.

        The longest come first, so that it shows at once where memory does not suffice. Hooks of the user's may count
        positions from the end, where a shorter prompt would be filled up: with hooks set a batch has one length.
        """
        order = sorted(prompts, key=lambda number: len(prompts[number].tokens), reverse=True)
        while order:
            batch = order[:size]
            if self.hooks:
                longest = len(prompts[batch[0]].tokens)
                batch = [number for number in batch if len(prompts[number].tokens) == longest]
            order = order[len(batch) :]
            yield batch

    def ask(self, prompts: Sequence[ReadPrompt]) -> list[Attribution | Exception]:
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

    def _together(self, prompts: Sequence[ReadPrompt]) -> list[Attribution]:
        """An answer for each prompt, from one forward pass."""
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
            notes=[prompt.notes for prompt in prompts],
        )
        for lin in lins:
            lin.require_finite()
        return list(self.scope.ask(lins))


def _answers(
    job: _Job, prompts: Iterable[Any], batch_size: int, prepend_bos: bool | None, failures: Failures, progress: bool
) -> Iterator[Attribution | None]:
    numbered, warned = enumerate(prompts), False
    total = len(prompts) if isinstance(prompts, Sized) else None
    with tqdm(total=total, desc="prompts", unit="prompt", leave=False, disable=not progress) as bar:
        end: Exception | None = None
        while end is None:
            window, end = _read(islice(numbered, _WINDOW * batch_size))
            if not window:
                break
            read: dict[int, ReadPrompt] = {}
            found: dict[int, Attribution | Exception] = {}
            for number, prompt in window:
                try:
                    read[number] = models.read_prompt(job.model, prompt, prepend_bos)
                except Exception as error:
                    found[number] = error
            bar.update(len(found))
            for batch in job.batches(read, batch_size):
                answers = job.ask([read[number] for number in batch])
                warned = warned or warn(job.scope, [answer for answer in answers if isinstance(answer, Attribution)])
                found |= dict(zip(batch, answers, strict=True))
                bar.update(len(batch))
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


def _read(numbered: Iterator[tuple[int, Prompt]]) -> tuple[list[tuple[int, Prompt]], Exception | None]:
    """The next prompts, and the error that ended them, if one did: the prompts before it are still answered."""
    window = []
    try:
        for numbered_prompt in numbered:
            window.append(numbered_prompt)
    except Exception as error:
        return window, error
    return window, None
