"""Many predictions at once: every position of a prompt, every prompt of a corpus."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from functools import partial
from itertools import islice
from typing import Literal, SupportsIndex

import torch
from torch import Tensor
from tqdm.auto import tqdm

from tl_scopes import models
from tl_scopes.api import require_scope
from tl_scopes.jacobian.linearization import linearize_places
from tl_scopes.models import Model, Prompt
from tl_scopes.results.attribution import Attribution
from tl_scopes.results.attribution_map import AttributionMap
from tl_scopes.scopes.scope import Scope, warn

_WINDOW = 16
"""Batches' worth of prompts that are read ahead and sorted by length, so that a batch needs little padding."""


def attribution_map(
    model: Model, prompt: Prompt, scope: Scope, *, prepend_bos: bool | None = None, checkpoint: bool = False
) -> AttributionMap:
    """Which token moves which prediction of the prompt: `attribute` at every position, from one forward pass.

    Args:
        model: a `HookedTransformer` or a `TransformerBridge`, in evaluation mode.
        prompt: text, a list of token ids, or a tensor of them.
        scope: the question. With `SemanticScope()` each position explains the most likely token after it.
        prepend_bos: whether text gets a BOS token; None is TransformerLens' own default for the model.
        checkpoint: as in `linearize`.

    Cost: one forward pass, and per position what the scope says; several positions go back together. Memory for
        four copies of token x vocab logits while it is computed.

    Raises: as `attribute` does.
    """
    require_scope(scope)
    models.check_model(model)
    tokens = models.tokenize(model, prompt, prepend_bos)
    places = [(0, position) for position in range(len(tokens))]
    lins = linearize_places(
        model, tokens[None], [_texts(model, tokens)], "hook_embed", models.READOUT, places=places, checkpoint=checkpoint
    )
    for lin in lins:
        lin.require_finite()
    answers = scope.ask(lins)
    warn(scope, answers)
    return AttributionMap(tuple(answers))


def attribute_many(
    model: Model,
    prompts: Iterable[Prompt],
    scope: Scope,
    *,
    batch_size: SupportsIndex = 8,
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
        prompts: each text, a list of token ids, or a tensor of them.
        scope: the question.
        batch_size: how many prompts go through the model together. They are filled up on the right, where a causal
            model looks at nothing, whatever the tokenizer's padding side.
        prepend_bos: whether text gets a BOS token; None is TransformerLens' own default for the model.
        on_error: "warn": a prompt that cannot be answered is reported with its number, None stands in its place and
            the others go on; but when nothing could be answered so far, the error is raised, for it will be the fault
            of all. "raise": the first error ends it.
        progress: whether to show a progress bar.
        checkpoint: as in `linearize`.

    Yields:
        One Attribution per prompt, or None.

    Cost: as `attribute`; on a GPU, and for small models, the time of a batch is about that of one prompt.

    Raises:
        TypeError: for a scope that is none, prompts that are one prompt.
        ValueError: for a batch_size below 1, another on_error; else as `attribute` does.
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
    if isinstance(prompts, (str, Tensor)) or not isinstance(prompts, Iterable):
        raise TypeError(
            f"prompts must be an iterable of prompts, got one {type(prompts).__name__}: put it into a list, or call "
            "attribute."
        )
    batch_size = models.as_count(batch_size, "batch_size must be at least 1")
    if on_error not in ("warn", "raise"):
        raise ValueError(f'on_error is "warn" or "raise", got {on_error!r}.')
    ask = partial(_ask, model, scope=scope, hooks=models.user_hooks(model), checkpoint=checkpoint)
    return _answers(model, prompts, scope, ask, batch_size, prepend_bos, on_error == "raise", progress)


def _answers(
    model: Model,
    prompts: Iterable[Prompt],
    scope: Scope,
    ask: Callable[[Sequence[Tensor]], list[Attribution | Exception]],
    batch_size: int,
    prepend_bos: bool | None,
    strict: bool,
    progress: bool,
) -> Iterator[Attribution | None]:
    numbered, answered, warned = enumerate(prompts), False, False
    total = len(prompts) if isinstance(prompts, Sized) else None
    with tqdm(total=total, desc="prompts", unit="prompt", leave=False, disable=not progress) as bar:
        failure: Exception | None = None
        while failure is None:
            window, failure = _read(islice(numbered, _WINDOW * batch_size))
            if not window:
                break
            tokens: dict[int, Tensor] = {}
            found: dict[int, Attribution | Exception] = {}
            for number, prompt in window:
                try:
                    tokens[number] = models.tokenize(model, prompt, prepend_bos)
                except (ValueError, TypeError) as error:
                    found[number] = error
            bar.update(len(found))
            # The longest first, so that memory that does not suffice shows at once.
            order = sorted(tokens, key=lambda number: len(tokens[number]), reverse=True)
            while order:
                batch, order = order[:batch_size], order[batch_size:]
                answers = ask([tokens[number] for number in batch])
                warned = warned or warn(scope, [answer for answer in answers if isinstance(answer, Attribution)])
                found |= dict(zip(batch, answers, strict=True))
                bar.update(len(batch))
            for number, _ in window:
                answer = found[number]
                if isinstance(answer, Attribution):
                    answered = True
                    yield answer
                    continue
                answer.add_note(f"prompt {number} of attribute_many")
                if strict or not (answered or any(isinstance(other, Attribution) for other in found.values())):
                    raise answer
                warnings.warn(f"prompt {number} has no answer: {answer}", stacklevel=2)
                yield None
        if failure is not None:
            raise failure


def _read(numbered: Iterator[tuple[int, Prompt]]) -> tuple[list[tuple[int, Prompt]], Exception | None]:
    """The prompts there are, and what ended them: those that came before a failure are still answered."""
    window = []
    try:
        for numbered_prompt in numbered:
            window.append(numbered_prompt)
    except Exception as error:
        return window, error
    return window, None


def _ask(
    model: Model, prompts: Sequence[Tensor], scope: Scope, hooks: object, checkpoint: bool
) -> list[Attribution | Exception]:
    """An answer for each prompt; those that fail are asked again alone, so as to lose no other."""
    if models.user_hooks(model) != hooks:
        raise RuntimeError(
            "the model's hooks have changed since attribute_many was called, and answers are computed as they are "
            "asked for: inside model.hooks(...) take them inside as well, with list(...) say."
        )
    lengths = [len(prompt) for prompt in prompts]
    # What fills them up does not matter, but it must be a token that the model knows.
    padded = torch.nn.utils.rnn.pad_sequence(list(prompts), batch_first=True, padding_value=int(prompts[0][0]))
    places = [(entry, length - 1) for entry, length in enumerate(lengths)]
    texts = [_texts(model, prompt) for prompt in prompts]
    try:
        lins = linearize_places(
            model, padded, texts, "hook_embed", models.READOUT, places=places, checkpoint=checkpoint
        )
        for lin in lins:
            lin.require_finite()
        return list(scope.ask(lins))
    except (ValueError, TypeError, MemoryError) as error:
        if len(prompts) == 1:
            return [error]
        return [answer for prompt in prompts for answer in _ask(model, [prompt], scope, hooks, checkpoint)]


def _texts(model: Model, tokens: Tensor) -> tuple[str, ...]:
    return tuple(models.token_text(model, id) for id in tokens.tolist())
