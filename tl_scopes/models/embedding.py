"""The value that the embedding gives for tokens, for the whole vocabulary and on average.

This is a file of its own since paths, replacements and checks all begin at the embedding.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_scopes.models.causality import silenced
from tl_scopes.models.hooks import EMBEDDING, StopForward, attached, hook_points
from tl_scopes.models.memory import Work, at_once
from tl_scopes.models.precision import sum_dtype
from tl_scopes.models.supported import Model, architecture, device_of
from tl_scopes.models.threads import one_at_a_time
from tl_scopes.models.tokens import context_length, vocabulary_size


@torch.no_grad()
def embed(model: Model, tokens: Int[Tensor, "batch token"]) -> Float[Tensor, "batch token d_model"]:
    """The values at "hook_embed" for these prompts.

    They are not the rows of `model.W_E`, which some models scale (Gemma) or normalise (Bloom) before the hook. Hooks
    that the user has set there act as in any other run.

    Cost: a forward pass as far as the embedding.
    """
    found: list[Tensor] = []

    def read(value: Tensor, hook: Any) -> None:
        found.append(value)
        raise StopForward

    with one_at_a_time, attached(hook_points(model)[EMBEDDING], read), suppress(StopForward):
        model(tokens, return_type="logits")
    return found[0]


def embedding_matrix(model: Model) -> Float[Tensor, "vocab d_model"]:
    """The value at "hook_embed" of every entry of the vocabulary, scales and norms included.

    The user's hooks do not act, since they may be made for one prompt.

    Cost: the embedding of every token of the vocabulary; the memory of the matrix, and of one batch.

    Raises:
        ValueError: for a model whose embedding holds positions at that hook (BERT), so that a token has many.
    """
    matrix: Tensor | None = None
    done = 0

    def take(values: Tensor) -> None:
        nonlocal matrix, done
        if matrix is None:
            matrix = values.new_empty(vocabulary_size(model), values.shape[-1])
        matrix[done : (done := done + len(values))] = values

    each_embedding(model, take)
    assert matrix is not None
    return matrix


def embedding_rows(model: Model, ids: Int[Tensor, "*some"]) -> Float[Tensor, "*some d_model"]:
    """Some rows of the `embedding_matrix`, without the others."""
    with silenced(model):
        return embed(model, ids.reshape(-1, 1)).reshape(*ids.shape, -1)


def each_embedding(model: Model, take: Callable[[Tensor], object]) -> None:
    """Hand over the rows [row d_model] of the `embedding_matrix` in their order, a batch at a time.

    Cost: the embedding of every token of the vocabulary; the memory of one batch.

    Raises: as `embedding_matrix` does.
    """
    if holds_positions(model):
        raise ValueError(
            f"the embedding of {architecture(model)} holds positions at {EMBEDDING!r}, so that a token has another "
            "value there at every place, and the vocabulary has no matrix of them. Linearise at a hook inside the "
            'network, wrt="blocks.0.hook_resid_pre" say, where the other tokens are those of the prompt.'
        )
    _go_through(model, 1, take)


def mean_embedding(model: Model, length: int) -> Float[Tensor, " d_model"]:
    """The mean over the vocabulary of the values at "hook_embed".

    The user's hooks do not act, as in `embedding_matrix`.

    Args:
        model: a checked model.
        length: how many tokens the prompts have which the vocabulary is divided into. It matters for a model whose
            embedding holds positions at that hook (BERT): the mean is over the positions of such prompts too.

    Cost: the embedding of every token of the vocabulary; the memory of one batch.
    """
    sums: list[Tensor] = []
    _go_through(model, length, lambda values: sums.append(values.sum(0, dtype=sum_dtype(values))))
    return torch.stack(sums).sum(0) / vocabulary_size(model)


def _go_through(model: Model, length: int, take: Callable[[Tensor], object]) -> None:
    """Hand over the values at "hook_embed" of all entries of the vocabulary, in order, from prompts of this length."""
    left = vocabulary_size(model)
    prompts = torch.arange(-(-left // length) * length, device=device_of(model)) % left
    with silenced(model):
        for some in prompts.view(-1, length).split(at_once(model, length, Work.EMBEDDING)):
            values = embed(model, some).flatten(0, 1)[:left]
            left -= len(values)
            take(values)


def holds_positions(model: Model) -> bool:
    """Whether a token's value at "hook_embed" depends on where it stands, as in BERT.

    Cost: the embedding of two tokens.
    """
    if context_length(model) == 1:
        return False
    with silenced(model):
        first, second = embed(model, torch.zeros(1, 2, dtype=torch.long, device=device_of(model)))[0]
    return bool((first - second).norm() > 0.01 * first.norm())  # no kernel's rounding comes near
