"""Notes on spaces: one that is missing in front of a word, and one at the end of a prompt that belongs to a word."""

import math
from collections.abc import Sequence

from jaxtyping import Float, Int
from torch import Tensor

from tl_scopes.models.precision import precise
from tl_scopes.models.supported import Model
from tl_scopes.models.tokens import (
    Target,
    Token,
    output_size,
    read_target,
    special_id,
    token_text,
    tokenizer_of,
    vocabulary_size,
)

MUCH = 10
"""How many times as likely the text with a space must be for a note."""


class SpacingNote(str):
    """A note on spaces, which is given as a warning as well."""

    __slots__ = ()


def missing_spaces(
    model: Model,
    tokens: Int[Tensor, "token"],
    logits: Float[Tensor, " vocab"],
    named: Sequence[Target],
    beside: Sequence[Target] = (),
) -> tuple[SpacingNote, ...]:
    """A note for each word that is asked about without a space in front, where the model writes it with one.

    Tokens hold their space: after "The capital of France is" comes " Paris", and "Paris" is another token, with which
    the model would write "isParis". Of an answer of several tokens the first is compared, which costs no pass.

    Args:
        model: a checked model.
        tokens: the token ids of the prompt.
        logits: the prediction after it.
        named: the answers that are asked about, which may get a note.
        beside: what they are compared with, which gets none. An answer that is compared with itself behind a space gets
            no note either: the space is what is asked about.
    """
    compared = [*named, *beside]
    return tuple(
        note
        for one in named
        for note in _missing_space(
            model, tokens, logits, one, next((other for other in compared if other != one), None)
        )
    )


def _missing_space(
    model: Model,
    tokens: Int[Tensor, "token"],
    logits: Float[Tensor, " vocab"],
    target: Target,
    against: Target | None,
) -> tuple[SpacingNote, ...]:
    """The note on one of them, or nothing."""
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None or output_size(model) != vocabulary_size(model):
        return ()
    last = int(tokens[-1])
    if last == special_id(model, "bos") or token_text(model, last)[-1:].isspace():
        return ()  # a word that begins a text or a line, or stands behind a space, brings none
    words = [token.text for token in target.tokens] if target.any_of else [target.text]
    if not all(word[:1].isalnum() for word in words):
        return ()
    spaced = [read_target(model, f" {word}") for word in words]
    if against is not None and set(against.tokens) & {one.tokens[0] for one in spaced}:
        return ()
    asked = set(target.tokens) if target.any_of else {target.tokens[0]}
    written = {one.tokens[0] for one in spaced}
    if asked & written:
        return ()
    of_asked, of_written = (precise(logits)[[token.id for token in one]].logsumexp(0) for one in (asked, written))
    if of_written - of_asked < math.log(MUCH) or not _words_begin(model, logits):
        return ()
    total = precise(logits).logsumexp(0)
    found = [float((one - total).exp()) for one in (of_written, of_asked)]
    meant = "|".join(one.text for one in spaced)
    note = (
        f"{_likely(meant, spaced, found[0], target.any_of)} is far likelier here than "
        f"{_likely(target.text, [target], found[1], target.any_of)}, which is asked about: mind the space"
    )
    return (SpacingNote(note),)


def space_at_the_end(model: Model, prompt: str) -> tuple[SpacingNote, ...]:
    """A note where a prompt ends with a space that the tokenizer would put into the next word.

    A space alone is a token that texts hardly ever have between words, so that the model expects no word behind it.
    Many tokenizers put none into a number, and then there is no note near digits: "2 + 2 = " ends as it should.

    Args:
        model: a checked model with a tokenizer.
        prompt: the text.
    """
    if not prompt.endswith(" ") or not prompt.strip():
        return ()
    tail = prompt[-20:]
    if not _joins(model, tail, "a") or (any(map(str.isdigit, tail)) and not _joins(model, tail, "7")):
        return ()
    return (SpacingNote("the prompt ends with a space, which the next word would bring itself: mind the space"),)


def _joins(model: Model, text: str, next: str) -> bool:
    """Whether the space at the end of a text and what comes next are one token."""
    ids = tokenizer_of(model).encode(text + next, add_special_tokens=False)
    return bool(ids) and token_text(model, ids[-1]) == f" {next}"


def _words_begin(model: Model, logits: Float[Tensor, " vocab"]) -> bool:
    """Whether the likeliest tokens rather begin a word than go on with one."""
    best = precise(logits).log_softmax(0).exp().topk(min(20, len(logits)))
    begun, gone_on = 0.0, 0.0
    for id, p in zip(best.indices.tolist(), best.values.tolist(), strict=True):
        text = token_text(model, id)
        begun, gone_on = begun + p * text[:1].isspace(), gone_on + p * text[:1].isalnum()
    return begun > gone_on


def _likely(text: str, targets: list[Target], p: float, any_of: bool) -> str:
    """A text and how likely it is; where it is several tokens, how likely the first is."""
    first: Token = targets[0].tokens[0]
    several = not any_of and len(targets[0]) > 1
    return f"{text!r} ({f'first token {first.text!r} of {len(targets[0])}, ' if several else ''}p = {p:.2g})"
