"""Derivatives of the softmax that stay exact where a prediction is sure.

From a margin of 37 nats on, float64 rounds p = 1 − 1e-16 to 1. What matters then is what the prediction leaves open,
Σ p_u over the other tokens, and a difference such as 1 − p would lose it. Here it is never taken.

This is a file of its own since metrics, curvature and the Fisher information share it.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def log_prob(logits: Float[Tensor, " vocab"], target: int) -> Float[Tensor, ""]:
    """log p_v = z_v − log Σ_u exp z_u; for the most likely token in the form −log(1 + Σ_{u≠v} exp(z_u − z_v)).

    Their derivatives are the same numbers, but in the second form none is rounded away.
    """
    if logits[target] < logits.max():
        return logits.log_softmax(-1)[target]
    others = torch.cat([logits[:target], logits[target + 1 :]])
    return -torch.log1p((others - logits[target]).exp().sum())


def log_prob_of_any(logits: Float[Tensor, " vocab"], targets: list[int]) -> Float[Tensor, ""]:
    """log Σ_v p_v over some tokens v, in the form −log(1 + Σ_{u∉v} exp z_u / Σ_v exp z_v)."""
    inside = torch.zeros_like(logits, dtype=torch.bool)
    inside[targets] = True
    return -torch.nn.functional.softplus(logits[~inside].logsumexp(0) - logits[inside].logsumexp(0))


def left_open(probabilities: Float[Tensor, " vocab"]) -> Float[Tensor, ""]:
    """1 − max p, as the sum of all other probabilities."""
    return probabilities.sort().values[:-1].sum()


def deviations(
    probabilities: Float[Tensor, "*row vocab"], values: Float[Tensor, "*some vocab"]
) -> Float[Tensor, "*some vocab"]:
    """x − p·x: how far each value is from the mean over the prediction, counted from the most likely token's value.

    The last axes of the values are those of the probabilities.
    """
    best = probabilities.argmax(-1, keepdim=True).expand(*values.shape[:-1], 1)
    # Padded vocabularies hold logits of minus infinity, which weigh nothing.
    relative = torch.where(probabilities > 0, values - values.gather(-1, best), 0)
    return relative - (relative * probabilities).sum(-1, keepdim=True)


def balanced(
    probabilities: Float[Tensor, "*row vocab"], cotangents: Float[Tensor, "*some vocab"]
) -> Float[Tensor, "*some vocab"]:
    """Cotangents of the logits that sum to zero, as all do that come from probabilities, to the last digit.

    The entry of the most likely token, which may have been rounded, becomes minus the sum of the others. The last axes
    of the cotangents are those of the probabilities.
    """
    best = probabilities.argmax(-1, keepdim=True).expand(*cotangents.shape[:-1], 1)
    others = cotangents.scatter(-1, best, 0)
    return others.scatter(-1, best, -others.sum(-1, keepdim=True))
