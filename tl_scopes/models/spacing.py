"""Spaces that are missing in what is asked about, or that stand where the next word would bring its own."""

import math

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
"""How many times as likely the text with a space must be for the model to say so."""

MIND_THE_SPACE = ": mind the space"
"""How each note on spaces ends, by which warnings know them."""


def missing_space(
    model: Model,
    tokens: Int[Tensor, "token"],
    logits: Float[Tensor, " vocab"],
    target: Target,
    against: Target | None = None,
) -> tuple[str, ...]:
    """A note where a word is asked about without a space in front, and the model writes it with one there.

    Tokens hold their space: after "The capital of France is" comes " Paris", and "Paris" is another token, with which
    the model would write "isParis". Of several tokens the first are compared, which costs no pass.

    Args:
        model: a checked model.
        tokens: the token ids of the prompt.
        logits: the prediction after it.
        target: what is asked about.
        against: what it is compared with: there is no note where that is the text with the space, so that spaces
            themselves are asked about.
    """
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None or output_size(model) != vocabulary_size(model):
        return ()
    last = int(tokens[-1])  # after BOS nothing has begun
    if last == special_id(model, "bos") or token_text(model, last)[-1:].isspace():
        return ()
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
    meant = " | ".join(one.text for one in spaced)
    return (
        f"{_likely(meant, spaced, found[0], target.any_of)} is far likelier here than "
        f"{_likely(target.text, [target], found[1], target.any_of)}, which is asked about{MIND_THE_SPACE}",
    )


def space_at_the_end(model: Model, prompt: str) -> tuple[str, ...]:
    """A note where a prompt ends with a space that the tokenizer would put into the next word.

    Left alone it is a token that hardly ever stands there in texts, and what follows it is something else than words.

    Args:
        model: a checked model with a tokenizer.
        prompt: the text.
    """
    if not prompt.endswith(" ") or not prompt.strip():
        return ()
    end = tokenizer_of(model).encode(f"{prompt[-20:]}a", add_special_tokens=False)
    if not end or token_text(model, end[-1]) != " a":
        return ()
    return (f"the prompt ends with a space, which the next word would bring itself{MIND_THE_SPACE}",)


def _words_begin(model: Model, logits: Float[Tensor, " vocab"]) -> bool:
    """Whether the likeliest tokens begin a word rather than go on with one."""
    best = precise(logits).log_softmax(0).exp().topk(min(20, len(logits)))
    begun, gone_on = 0.0, 0.0
    for id, p in zip(best.indices.tolist(), best.values.tolist(), strict=True):
        text = token_text(model, id)
        begun, gone_on = begun + p * text[:1].isspace(), gone_on + p * text[:1].isalnum()
    return begun > gone_on


def _likely(text: str, targets: list[Target], p: float, any_of: bool) -> str:
    """A text and how likely it is, or its first token, where it is several."""
    first: Token = targets[0].tokens[0]
    several = not any_of and len(targets[0]) > 1
    return f"{text!r} ({f'first token {first.text!r} of {len(targets[0])}, ' if several else ''}p = {p:.2g})"
