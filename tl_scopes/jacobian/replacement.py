"""What becomes of a prediction when the embeddings of some tokens are replaced."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_scopes import models
from tl_scopes.jacobian.linearization import Linearization
from tl_scopes.models import Model

_WORKING_BYTES = 256 * 2**20
"""Memory that a batch of perturbed prompts may take."""


def substitute(
    lin: Linearization, replacement: str, mean: Float[Tensor, " d_model"] | None = None
) -> Float[Tensor, "#token d_model"]:
    """What to put in place of a token's embedding.

    Args:
        replacement: "zero"; "mean", of the embeddings of the vocabulary; "pad", the embedding of the padding token.
        mean: the mean embedding, where it is known already.

    Cost: for a "mean" that is not known, the embedding of every token of the vocabulary.

    Raises:
        ValueError: another name; "mean" and "pad" elsewhere than at the embedding; a tokenizer without padding token.
    """
    if replacement == "zero":
        return torch.zeros_like(lin.embeddings[:1])
    if replacement not in ("mean", "pad"):
        raise ValueError(f'an embedding is replaced by "zero", "mean" or "pad", got {replacement!r}.')
    if lin.wrt != models.EMBEDDING:
        raise ValueError(
            f'there is no {replacement} embedding at {lin.wrt!r}: replace by "zero", or linearise with '
            'wrt="hook_embed", the default.'
        )
    if replacement == "mean":
        return (models.mean_embedding(lin.model, len(lin.tokens)) if mean is None else mean)[None]
    return models.embed(lin.model, torch.tensor([[padding_token(lin.model)]], device=lin.tokens.device))[0]


def padding_token(model: Model) -> int:
    """Its id.

    Raises:
        ValueError: for a tokenizer without one, or none at all.
    """
    pad = getattr(getattr(model, "tokenizer", None), "pad_token_id", None)
    if pad is None:
        raise ValueError('the model has no padding token: replace embeddings by "mean" or "zero" instead of "pad".')
    return int(pad)


def effects(
    lin: Linearization,
    instead: Float[Tensor, "#token d_model"],
    kept: Bool[Tensor, "row token #d_model"],
    targets: Int[Tensor, " target"],
) -> tuple[Float[Tensor, "row target"], Float[Tensor, " row"]]:
    """log p'(target) and KL(p ‖ p'), in nats, of the predictions p' with some embeddings replaced.

    Args:
        instead: what stands in their place.
        kept: one perturbed prompt per row: which embeddings, or which of their entries, stay as they are.
        targets: the tokens whose log-probability is asked for.

    Cost: a forward pass per row, in batches.
    """
    tokens, d_model = lin.embeddings.shape
    width = max(8 * d_model, 3 * lin.model.cfg.n_heads * tokens)
    before = lin.log_probs  # whose numbers may be wider than the model's
    row_bytes = lin.embeddings.element_size() * tokens * width + 8 * before.element_size() * len(before)
    size = max(1, _WORKING_BYTES // row_bytes)
    found, divergences = [], []
    for rows in kept.split(size):
        values = torch.where(rows, lin.embeddings, instead.to(lin.embeddings))
        logits = models.predict(lin.model, lin.tokens.expand(len(rows), -1), wrt=lin.wrt, values=values)
        after = logits.to(before).log_softmax(-1)
        found.append(after[:, targets])
        divergences.append(divergence(before, after))
    return torch.cat(found), torch.cat(divergences)


def divergence(before: Float[Tensor, " vocab"], after: Float[Tensor, "*row vocab"]) -> Float[Tensor, "*row"]:
    """KL(p ‖ p') in nats, from log-probabilities."""
    p = before.exp()
    # Padded vocabularies hold logits of minus infinity, which neither prediction has any use for.
    return torch.where(p > 0, p * (before - after), 0).sum(-1).clamp(min=0)
