"""From text, a chat, ids or what a tokenizer returned to the token ids of a prompt, with notes on what looks odd."""

from collections.abc import Mapping, Sequence, Set
from itertools import count as count_from
from typing import Any, NamedTuple, SupportsIndex, TypeAlias

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from tl_scopes.models.arguments import as_flag, as_int, as_position
from tl_scopes.models.chats import is_chat, read_chat
from tl_scopes.models.generation import Generated
from tl_scopes.models.spacing import SpacingNote, space_at_the_end
from tl_scopes.models.supported import Model, device_of
from tl_scopes.models.tokens import (
    Target,
    context_length,
    read_target,
    require_text,
    special_id,
    token_text,
    tokenizer_of,
    vocabulary_size,
)

Prompt: TypeAlias = str | Sequence[int] | Tensor | np.ndarray | Mapping[str, Any] | Sequence[Mapping[str, str]]
"""Text; token ids in a list, or in a tensor or array of one row; what a tokenizer returned for one text; or a chat, a
list of messages such as {"role": "user", "content": "Hello!"}."""

Answer: TypeAlias = str | Sequence[int] | Tensor | np.ndarray | Generated
"""What follows a prompt: text, token ids, or what was generated."""


class ReadPrompt(NamedTuple):
    """A prompt as the model takes it."""

    tokens: Int[Tensor, "token"]
    """Token ids, on the model's device."""
    notes: tuple[str, ...]
    """Sentences about it that a reader of the scores should know."""
    parts: tuple[str, ...] = ()
    """The part of a chat that each token belongs to: "user" say, or "template" for what stands around the messages."""

    def up_to(self, position: SupportsIndex) -> "ReadPrompt":
        """The prompt as far as a position, whose token is its last one.

        Raises: as `as_position` does.
        """
        length = as_position(position, len(self.tokens)) + 1
        whole = length == len(self.tokens)  # a space at the end is noted where the end is read
        notes = tuple(note for note in self.notes if whole or not isinstance(note, SpacingNote))
        return self._replace(tokens=self.tokens[:length], parts=self.parts[:length], notes=notes)


def read_prompt(model: Model, prompt: Prompt, prepend_bos: bool | None = None) -> ReadPrompt:
    """The token ids of one prompt.

    Text is tokenised as TransformerLens does it, BOS included by the same default; but a text that already begins with
    BOS, as a chat template writes it, does not get a second one. A chat is written by the tokenizer's template, up to
    where the assistant answers, and gets a BOS from nobody else. Ids are taken as they are, but for those that an
    attention mask leaves out.

    Raises:
        ValueError: for an empty prompt, several prompts, ids out of range, a prompt longer than the context, text where
            the model has no tokenizer, text that is not valid Unicode, a chat that `read_chat` refuses.
        TypeError: for anything that is not a prompt; for a `prepend_bos` that is neither a bool nor None.
    """
    bos = None if prepend_bos is None else as_flag(prepend_bos, "prepend_bos")
    notes: list[str] = []
    parts: tuple[str, ...] = ()
    if isinstance(prompt, str):
        ids = _of_text(model, prompt, bos, notes)
        notes += space_at_the_end(model, prompt)
    elif is_chat(prompt):
        ids, parts = read_chat(model, prompt)
    else:
        ids = _of_mapping(prompt) if isinstance(prompt, Mapping) else _ids(prompt)
        notes += _about_ids(model, ids)
    if not ids:
        raise ValueError("the prompt is empty: give at least one token.")
    vocab, context = vocabulary_size(model), context_length(model)
    for id in ids:
        if not 0 <= id < vocab:
            raise ValueError(f"token id {id} is outside the vocabulary of {vocab} (ids 0 to {vocab - 1}).")
    if context is not None and len(ids) > context:
        raise ValueError(
            f"the prompt has {len(ids)} tokens, the model's context is {context}: shorten it, or pass a part of it."
        )
    return ReadPrompt(torch.tensor(ids, device=device_of(model)), tuple(notes), parts)


def read_answer(model: Model, answer: Any, tokens: Int[Tensor, "token"]) -> tuple[Target, tuple[str, ...]]:
    """The tokens of an answer that follows a prompt, and notes.

    The answer is tokenised apart from the prompt, so that the prompt's tokens are the same whatever is said after it,
    and one answer can be compared with another. A note says where that makes a difference: see `where_they_meet`.

    Args:
        model: a checked model.
        answer: text; token ids in a list or a tensor; what was generated.
        tokens: the token ids of the prompt.

    Raises:
        ValueError: for an empty answer, and as `read_target` does.
        TypeError: for something that is neither text nor ids.
    """
    if isinstance(answer, Set):
        raise TypeError(f"an answer is a text or token ids in their order, got {answer!r}: a set is a scope's target.")
    if answer is None or isinstance(answer, bytes):
        raise TypeError(f"an answer is a text or token ids in their order, got {type(answer).__name__}.")
    if isinstance(answer, str) and not answer:
        raise ValueError("the answer is empty: give at least one character.")
    if isinstance(answer, Mapping):
        answer = _of_mapping(answer)
        answer = (
            answer[1:] if answer[:1] == [special_id(model, "bos")] else answer
        )  # which tokenizers put in front of every text
    elif not isinstance(answer, str | Generated):
        answer = _ids(answer, what="an answer")
        if not answer:
            raise ValueError("the answer is empty: give at least one token.")
    target = read_target(model, answer.ids if isinstance(answer, Generated) else answer, what="answer")
    return target, where_they_meet(model, tokens, target, "answer") if isinstance(answer, str) else ()


def where_they_meet(model: Model, tokens: Int[Tensor, "token"], target: Target, what: str) -> tuple[str, ...]:
    """A note where the tokenizer, given a prompt and what follows as one text, makes other tokens of the place where
    they meet than of each by itself.

    There is none where the ids of either are not what the tokenizer makes of their text, so that nobody would expect
    it to make them of both together.

    Args:
        model: a checked model.
        tokens: the token ids of the prompt; also of a chat.
        target: what follows.
        what: what it is, as the note calls it.
    """
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None or target.any_of or read_target(model, target.text).ids != target.ids:
        return ()
    before = tokenizer.decode(tokens.tolist(), clean_up_tokenization_spaces=False)
    alone, together = (tokenizer.encode(text, add_special_tokens=False) for text in (before, before + target.text))
    apart = [*tokens.tolist(), *target.ids]
    if not alone or tokens.tolist()[-len(alone) :] != alone or apart[-len(together) :] == together:
        return ()
    pairs = enumerate(zip(apart[::-1], together[::-1], strict=False))
    same = next((i for i, (a, b) in pairs if a != b), min(len(apart), len(together)))
    there = [token_text(model, id) for id in together[: len(together) - same][-3:]]
    here = [token_text(model, id) for id in apart[: len(apart) - same][-3:]]
    note = (
        f"prompt and {what} are tokenised apart: where they meet the tokens are … {' '.join(map(repr, here))}; as one "
        f"text they would be … {' '.join(map(repr, there))}"
    )
    return (note,)


def tokenize(model: Model, prompt: Prompt, prepend_bos: bool | None = None) -> Int[Tensor, "token"]:
    """The token ids of one prompt: see `read_prompt`."""
    return read_prompt(model, prompt, prepend_bos).tokens


def each_prompt(prompts: Any) -> Any:
    """The prompts of a call on many: an iterable as it is, or the rows of what a tokenizer returned for several texts.

    Raises:
        TypeError: for one prompt, and for tables and mappings, whose iteration gives the names of their columns.
    """
    if isinstance(prompts, Mapping) and "input_ids" in prompts:
        rows = prompts["input_ids"]
        masks = prompts.get("attention_mask", [None] * len(rows))
        pairs = zip(rows, masks, strict=True)
        return [
            {"input_ids": row} if mask is None else {"input_ids": row, "attention_mask": mask} for row, mask in pairs
        ]
    if isinstance(prompts, Mapping) or hasattr(prompts, "columns"):
        names = list(prompts.columns if hasattr(prompts, "columns") else prompts)
        example = next(iter(map(str, names)), "text")
        raise TypeError(
            f"prompts must be an iterable of prompts, got a {type(prompts).__name__} with {names[:5]}: give one of its "
            f"columns, prompts[{example!r}], or what the tokenizer returned for them."
        )
    if isinstance(prompts, str | bytes | Tensor) or not hasattr(prompts, "__iter__"):
        raise TypeError(
            f"prompts must be an iterable of prompts, got one {type(prompts).__name__}: put it into a list, or call "
            "attribute."
        )
    return prompts


def _of_text(model: Model, prompt: str, prepend_bos: bool | None, notes: list[str]) -> list[int]:
    if prompt == "":
        raise ValueError("the prompt is empty: give at least one character.")
    require_text(prompt, "prompt")
    tokenizer = tokenizer_of(model)
    ids: list[int] = model.to_tokens(prompt, prepend_bos=prepend_bos, truncate=False)[0].tolist()
    bos, begin = special_id(model, "bos"), getattr(tokenizer, "bos_token", None)
    if bos is None or not begin:
        return ids
    own = next(count for count in count_from(0) if not prompt.startswith(begin * (count + 1)))
    if own and ids[: own + 1] == [bos] * (own + 1):
        del ids[0]
        if own == 1:
            notes.append(f"the text begins with {begin!r}, so that no second one was put in front")
    if own > 1 and ids[:2] == [bos, bos]:
        notes.append(f"the text begins with {begin!r} twice")
    return ids


def _of_mapping(prompt: Mapping[str, Any]) -> list[int]:
    """The ids that a tokenizer returned, without those that its mask leaves out."""
    if {"role", "content"} <= set(prompt):
        raise TypeError("a chat is a list of messages, got one message: write [message].")
    if "input_ids" not in prompt:
        raise TypeError(
            f"a prompt is a str, token ids, or what a tokenizer returned; this {type(prompt).__name__} has "
            f"{list(prompt)[:5]} and no 'input_ids'."
        )
    ids = _ids(prompt["input_ids"], returned=True)
    mask = _ids(prompt["attention_mask"], returned=True) if prompt.get("attention_mask") is not None else [1] * len(ids)
    if len(mask) != len(ids) or not set(mask) <= {0, 1}:
        raise ValueError(f"the attention_mask must have a 0 or 1 for each of the {len(ids)} ids, got {mask[:20]}.")
    seen = [i for i, one in enumerate(mask) if one]
    if seen and len(seen) != seen[-1] - seen[0] + 1:
        raise ValueError(
            f"the attention_mask leaves out ids in the middle of the prompt, {mask[:20]}: only padding may go."
        )
    return [ids[i] for i in seen]


def _about_ids(model: Model, ids: list[int]) -> list[str]:
    """Notes on ids that look as if they were not meant so."""
    tokenizer: Any = getattr(model, "tokenizer", None)
    bos, eos, pad = special_id(model, "bos"), special_id(model, "eos"), special_id(model, "pad")
    notes = []
    if bos is not None and ids[:2] == [bos, bos]:
        notes.append(f"the ids begin with {tokenizer.bos_token!r} twice")
    if pad is not None:
        padding = [id == pad for id in ids]
        before = padding.index(False) if False in padding else len(ids)
        behind = padding[::-1].index(False) if False in padding else 0
        least = 2 if pad in (bos, eos) else 1  # a single one may be meant
        for count, place in ((before, "begin"), (behind, "end")):
            if count >= least:
                notes.append(
                    f"the ids {place} with padding ({count} of {tokenizer.pad_token!r}), which is taken for a part of "
                    "the prompt: give what the tokenizer returned, with its attention_mask"
                )
    return notes


def _ids(prompt: Any, *, returned: bool = False, what: str = "a prompt") -> list[int]:
    """Token ids from a list, or from the one row of a tensor, of an array, or of what a tokenizer returned."""
    if hasattr(prompt, "columns"):
        raise TypeError(f"a prompt is a str or token ids, got a {type(prompt).__name__}: give one of its cells.")
    values = prompt.tolist() if isinstance(prompt, Tensor) or hasattr(prompt, "__array__") else prompt
    if not isinstance(values, Sequence) or isinstance(values, bytes):
        raise TypeError(f"{what} is a str, a list of token ids or a 1-D tensor of them, got {type(prompt).__name__}.")
    if len(values) == 1 and isinstance(values[0], list) and (returned or values is not prompt):
        values = values[0]  # the one row that model.to_tokens and tokenizers return
    if any(isinstance(value, str | Sequence) for value in values):
        raise ValueError(
            f"expected {what.replace('a ', 'one ').replace('an ', 'one ')}, got a batch of {len(values)}: call "
            "attribute_many, or linearize once for each."
        )
    return [as_int(value, "token ids must be integers") for value in values]
