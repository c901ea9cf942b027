"""The value that the embedding gives for tokens, for the whole vocabulary and on average.

This is a file of its own since paths, replacements and checks all begin at the embedding.
"""

from contextlib import suppress
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_scopes.models.hooks import EMBEDDING, StopForward, attached, hook_points
from tl_scopes.models.memory import Work, at_once
from tl_scopes.models.precision import sum_dtype
from tl_scopes.models.supported import Model, device_of
from tl_scopes.models.threads import one_at_a_time
from tl_scopes.models.tokens import vocabulary_size


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
    """The value at "hook_embed" of every entry of the vocabulary, scales and norms included; hooks do not act."""
    # The weight alone lacks Gemma's multiplier, and running a bridge's own module would run the user's hooks.
    embed = getattr(model.embed, "original_component", None) or model.embed
    with torch.no_grad():
        return embed(torch.arange(vocabulary_size(model), device=device_of(model))[None])[0]


def mean_embedding(model: Model, length: int) -> Float[Tensor, " d_model"]:
    """The mean over the vocabulary of the values at "hook_embed", from prompts of this length.

    Cost: the embedding of every token of the vocabulary.
    """
    vocab = vocabulary_size(model)
    prompts = torch.arange(-(-vocab // length) * length, device=device_of(model)) % vocab
    sums, left = [], vocab
    for some in prompts.view(-1, length).split(at_once(model, length, Work.EMBEDDING)):
        values = embed(model, some).flatten(0, 1)[:left]
        left -= len(values)
        sums.append(values.sum(0, dtype=sum_dtype(values)))
    return torch.stack(sums).sum(0) / vocab
