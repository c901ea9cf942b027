"""Attention sinks: tokens that most attention rests on, whatever they say."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_scopes import models
from tl_scopes.models import Model


def attention_mass(model: Model, tokens: Int[Tensor, "token"]) -> Float[Tensor, "layer head token"]:
    """How much attention each token draws from those after it, on average:

        α_k = mean over queries i > k of A[i, k]

    The last token has none after it: its mass is 0. In float32 (float64 for a float64 model), on the model's device.

    Args:
        model: a checked model.
        tokens: the prompt.

    Unit: a part of a query's attention, from 0 to 1.
    Cost: as `models.attention_layers`: one forward pass, of long prompts one for each group of layers whose patterns
        fit into 1 GiB. Nothing but the result is kept of a layer.
    Raises: ValueError for a model without attention patterns, as `models.attention_layers`.
    Source: Gu et al. 2024 (arXiv:2410.10781), section 3.2, whose sinks are the heads with α_k > 0.3.
    Departure: there the token's own query counts too (i ≥ k). The first token can only attend to itself, which has
        nothing to do with a sink, and in a prompt of 10 tokens would lift its mass from 0 to 0.1.

    Example:
        >>> from tl_scopes.diagnostics.sinks import attention_mass
        >>> mass = attention_mass(model, model.to_tokens("The keys to the old cabinet near the door")[0])
        >>> mass.shape, bool(mass[..., -1].any())
        (torch.Size([6, 4, 10]), False)
    """
    return torch.stack([mass_of(layer.pattern) for layer in models.attention_layers(model, tokens)])


def mass_of(pattern: Float[Tensor, "head query key"]) -> Float[Tensor, "head key"]:
    """The mean attention that each key gets from the queries after it, 0 where there are none."""
    dtype = torch.promote_types(pattern.dtype, torch.float32)
    after = torch.arange(pattern.shape[-1] - 1, -1, -1, device=pattern.device)
    return pattern.tril(-1).sum(1, dtype=dtype) / after.clamp(min=1)
