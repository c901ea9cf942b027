"""What becomes of a prediction when the embeddings of some tokens are replaced."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_scopes import models
from tl_scopes.jacobian.linearization import Linearization
from tl_scopes.jacobian.span import Span
from tl_scopes.jacobian.tensor_arguments import require_finite, require_real
from tl_scopes.models import Work


def substitute(
    lin: Linearization, replacement: str, mean: Float[Tensor, " d_model"] | None = None
) -> Float[Tensor, "#token d_model"]:
    """The embedding that takes the place of a token's own.

    Args:
        lin: a linearisation at the prompt.
        replacement: "zero"; "mean", of the embeddings of the vocabulary; "pad", the embedding of the padding token.
        mean: the mean embedding, where it is known already.

    Cost: for a "mean" that is not known, the embedding of every token of the vocabulary.

    Raises:
        ValueError: for another name; for "mean" and "pad" elsewhere than at the embedding; for "pad" where the
            tokenizer has no padding token; for a mean that is not as wide as the embeddings, or not real and finite.
        TypeError: for a mean that is not a tensor.
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
        return (models.mean_embedding(lin.model, len(lin.tokens)) if mean is None else _fitting(mean, lin))[None]
    return models.embed(lin.model, torch.tensor([[models.padding_token(lin.model)]], device=lin.tokens.device))[0]


def _fitting(mean: Tensor, lin: Linearization) -> Float[Tensor, " d_model"]:
    require_real(mean, "the mean embedding", "[d_model]")
    if mean.shape != lin.embeddings.shape[1:]:
        raise ValueError(
            f"the mean embedding has the shape {list(mean.shape)}, this model's embeddings have "
            f"{list(lin.embeddings.shape[1:])}: leave it out, and it is computed."
        )
    require_finite(mean, "the mean embedding")
    return mean.to(lin.embeddings)


def with_replaced(
    x: Float[Tensor, "token d_model"], positions: Sequence[int], instead: Float[Tensor, " d_model"]
) -> Float[Tensor, "position token d_model"]:
    """The embeddings x with another one in the place of each of these tokens, one token at a time."""
    points = x.repeat(len(positions), 1, 1)
    points[range(len(positions)), list(positions)] = instead.to(x)
    return points


def predictions(
    lin: Linearization, instead: Float[Tensor, "#token d_model"], kept: Bool[Tensor, "row token #d_model"]
) -> Iterator[Float[Tensor, "_ *row vocab"]]:
    """Yield, in batches of rows, the log-probabilities p' after some embeddings are replaced. In float64.

    Args:
        lin: a linearisation that ends at the readout.
        instead: what takes the place of the embeddings: one for each token, or one for all.
        kept: one perturbed prompt per row: which embeddings, or which of their entries, stay as they are.

    Cost: a forward pass per row.

    Raises:
        ValueError: when the model's hooks or weights have changed since the linearisation.
    """
    lin.require_unchanged()
    for rows in kept.split(lin.at_once(Work.PREDICTION)):
        values = torch.where(rows, lin.embeddings, instead.to(lin.embeddings))
        _, logits = lin.evaluate(values)
        assert logits is not None
        yield models.precise(logits).log_softmax(-1)


def effects(
    lin: Linearization,
    instead: Float[Tensor, "#token d_model"],
    kept: Bool[Tensor, "row token #d_model"],
    targets: Int[Tensor, " target"],
) -> tuple[Float[Tensor, "row target"], Float[Tensor, " row"]]:
    """log p'(target) and KL(p ‖ p'), in nats, of the predictions p' with some embeddings replaced (`predictions`).

    Of an answer of several tokens the target is the answer itself, whatever tokens are asked for, and the divergences
    of its predictions are summed.

    Args:
        lin, instead, kept: as for `predictions`.
        targets: the tokens whose log-probability is asked for.

    Cost: a forward pass per row.

    Raises: as `predictions` does.
    """
    found, divergences = [], []
    for log_probs in predictions(lin, instead, kept):
        if isinstance(lin, Span):
            found.append(lin.answer_log_prob(log_probs)[:, None].expand(-1, len(targets)))
            divergences.append(divergence(lin.log_probs, log_probs).sum(-1))
        else:
            found.append(log_probs[:, targets])
            divergences.append(divergence(lin.log_probs, log_probs))
    return torch.cat(found), torch.cat(divergences)


def each_alone(tokens: int, device: torch.device) -> Bool[Tensor, "row token 1"]:
    """The rows for `predictions` in which one token is replaced at a time."""
    return ~torch.eye(tokens, dtype=torch.bool, device=device)[..., None]


def divergence(before: Float[Tensor, "*prediction vocab"], after: Float[Tensor, "*row vocab"]) -> Float[Tensor, "*row"]:
    """KL(p ‖ p') in nats, from log-probabilities; the last axes of p' are those of p."""
    p = before.exp()
    # Padded vocabularies hold logits of minus infinity, which count in neither prediction.
    return torch.where(p > 0, p * (before - after), 0).sum(-1).clamp(min=0)
