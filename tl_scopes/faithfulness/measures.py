"""The measures of faithfulness, of one prompt: curves, comprehensiveness and sufficiency, soft and hard."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_scopes.faithfulness.perturbation import Protocol
from tl_scopes.jacobian.linearization import Linearization
from tl_scopes.jacobian.replacement import effects


class Value(NamedTuple):
    """One number about the scores of one scope at one prompt."""

    measure: str
    quantity: str
    fraction: float | None
    value: float


def ranking(
    scores: Float[Tensor, "token"], candidates: Sequence[int], generator: torch.Generator
) -> Int[Tensor, " rank"]:
    """The candidates, best score first; those with the same score in random order."""
    positions = torch.tensor(candidates)[torch.randperm(len(candidates), generator=generator)]
    return positions[scores[positions].argsort(descending=True, stable=True)]


def spearman(a: Float[Tensor, " n"], b: Float[Tensor, " n"]) -> float:
    """Rank correlation, equal numbers sharing their mean rank; NaN where all are equal."""
    ranks = [((x[:, None] > x).sum(1) + (x[:, None] >= x).sum(1)).double() for x in (a, b)]
    x, y = (rank - rank.mean() for rank in ranks)
    return float((x @ y) / (x.norm() * y.norm()))


@dataclass(frozen=True, eq=False)
class Removal:
    """A prompt whose embeddings are replaced by `instead`, and its prediction."""

    lin: Linearization
    instead: Float[Tensor, "#token d_model"]
    candidates: Sequence[int]
    """Positions that may be replaced; the others stay."""

    def effects(
        self, kept: Bool[Tensor, "row token #d_model"], targets: Sequence[int]
    ) -> tuple[Float[Tensor, "target row"], Float[Tensor, " row"]]:
        """Log-probability of the targets and KL(p ‖ p'), one perturbed prompt per row."""
        device = self.lin.tokens.device
        log_probs, divergences = effects(self.lin, self.instead, kept.to(device), torch.tensor(targets, device=device))
        return log_probs.T.cpu(), divergences.cpu()

    def kept(self, removed: Sequence[Int[Tensor, " _"]]) -> Bool[Tensor, "row token"]:
        """A row per set of positions: all others are kept."""
        kept = torch.ones(len(removed), len(self.lin.tokens), dtype=torch.bool)
        for row, positions in zip(kept, removed, strict=True):
            row[positions] = False
        return kept


def count(fraction: float, tokens: int) -> int:
    """How many of so many tokens a fraction of them is: rounded, halves up."""
    return math.floor(fraction * tokens + 0.5)


def hard_measures(
    removal: Removal,
    orders: Mapping[str, Int[Tensor, " rank"]],
    targets: Mapping[str, int],
    protocol: Protocol,
    foils: Mapping[str, int | None] | None = None,
) -> dict[str, list[Value]]:
    """Deletion, insertion and leave-one-out of several scopes at one prompt; each perturbed prompt is run once.

    Let q be log p(target), for the quantity "log_odds" log p(target) − log p(foil), which is a difference of logits,
    for "kl" −KL(p ‖ p'), at the prompt itself; q(without k) with the k best tokens replaced, q(k alone) with all others
    replaced.

        deletion        q − q(without k)           insertion   q(k alone) − q(none)

    The area is the mean of the curve over the share of tokens replaced or inserted (trapezoidal). In probabilities, and
    averaged over `protocol.fractions`,

        comprehensiveness   p − p(without k)       sufficiency   p − p(k alone)

    For all but sufficiency more is better.

    Source: deletion and insertion, Petsiuk et al. 2018 (arXiv:1806.07421); comprehensiveness and sufficiency, DeYoung
        et al. 2020 (ERASER, arXiv:1911.03429), equations 1 and 2, averaged as their AOPC.
    """
    candidates = torch.tensor(removal.candidates)
    n = len(candidates)
    counts = [count(fraction, n) for fraction in protocol.grid]
    removed = [part for order in orders.values() for k in counts for part in (order[:k], order[k:])]
    kept = removal.kept([*removed, *candidates[:, None]])
    unique, where = torch.unique(kept, dim=0, return_inverse=True)
    against = {name: foil for name, foil in (foils or {}).items() if foil is not None}
    ids = sorted({*targets.values(), *against.values()})
    log_probs, divergences = removal.effects(unique[..., None], ids)
    curves = (len(orders), len(counts), 2)
    log_probs = log_probs[:, where[:-n]].view(len(ids), *curves)
    divergences, single = divergences[where[:-n]].view(curves), divergences[where[-n:]]

    values = {}
    chosen = [protocol.grid.index(fraction) for fraction in protocol.fractions]
    for i, (name, order) in enumerate(orders.items()):
        q = float(removal.lin.log_probs[targets[name]])
        without, alone = log_probs[ids.index(targets[name]), i].T
        kl_without, kl_alone = divergences[i].T
        comprehensiveness, sufficiency = (float((math.exp(q) - x[chosen].exp()).mean()) for x in (without, alone))
        first = int((candidates == order[0]).nonzero())
        odds: list[Value] = []
        if name in against:
            other = log_probs[ids.index(against[name]), i].T
            before = q - float(removal.lin.log_probs[against[name]])
            (odds_without, odds_alone) = (one - two for one, two in zip((without, alone), other, strict=True))
            odds += _curve("deletion", "log_odds", before - odds_without, counts, protocol)
            odds += _curve("insertion", "log_odds", odds_alone - odds_alone[0], counts, protocol)
        values[name] = [
            *_curve("deletion", "log_prob", q - without, counts, protocol),
            *_curve("deletion", "kl", kl_without, counts, protocol),
            *_curve("insertion", "log_prob", alone - alone[0], counts, protocol),
            *_curve("insertion", "kl", kl_alone[0] - kl_alone, counts, protocol),
            *odds,
            Value("comprehensiveness", "probability", None, comprehensiveness),
            Value("sufficiency", "probability", None, sufficiency),
            Value("leave-one-out of the first", "kl", None, float(single[first])),
            Value("leave-one-out rank of the first", "rank", None, float((single > single[first]).sum() + 1)),
        ]
    return values


def drop_of_all(values: Sequence[Value]) -> float:
    """What replacing everything takes from log p(target): the end of the deletion curve among the hard measures."""
    return next(v.value for v in values if (v.measure, v.quantity, v.fraction) == ("deletion", "log_prob", 1.0))


def _curve(
    measure: str, quantity: str, points: Float[Tensor, " point"], counts: Sequence[int], protocol: Protocol
) -> list[Value]:
    share = torch.tensor(counts, dtype=points.dtype) / counts[-1]
    area = float(torch.trapezoid(points, share))
    curve = [Value(measure, quantity, f, v) for f, v in zip(protocol.grid, points.tolist(), strict=True)]
    return [*curve, Value(f"{measure} area", quantity, None, area)]


LEAST = 0.01
"""Probability that replacing everything must take from the target: a smaller one is no scale to measure by."""


def soft_measures(
    removal: Removal,
    scores: Float[Tensor, "token"],
    target: int,
    drop: float,
    samples: int,
    generator: torch.Generator,
) -> list[Value]:
    """Every entry of an embedding is kept, or replaced, with a probability as large as the token's score.

        a_t = score_t / max score
        soft comprehensiveness   max(0, p − p') / (p − p₀)              entries kept with probability 1 − a_t
        soft sufficiency         1 − max(0, p − p') / (p − p₀)          entries kept with probability a_t

    p is the target's probability, p' with some entries replaced, p₀ with all tokens replaced. More is better in both.
    NaN where p − p₀ is below 0.01. Unlike all other measures, these depend on the scores themselves, not their order:
    a square (Fisher) and its root come out differently.

    Args:
        drop: log p − log p₀, the end of any deletion curve.

    Source: Zhao & Aletras 2023 (arXiv:2305.10496), Soft-NC and Soft-NS.
    Departure: their entries are set to zero, ours to any replacement; negative scores count as zero; the mean over
        several masks.
    """
    candidates = torch.tensor(removal.candidates)
    chance = torch.zeros(len(scores), 1, dtype=scores.dtype)
    positive = scores[candidates].clamp(min=0)
    chance[candidates, 0] = positive / positive.max().clamp(min=torch.finfo(scores.dtype).tiny)
    d_model = removal.lin.embeddings.shape[-1]
    drawn = torch.rand(samples, len(scores), d_model, generator=generator, dtype=scores.dtype)
    entries = torch.cat([drawn >= chance, drawn < chance])
    entries[:, [i for i in range(len(scores)) if i not in removal.candidates]] = True
    after = removal.effects(entries, [target])[0].exp()
    q = float(removal.lin.log_probs[target])
    before, base = math.exp(q), math.exp(q - drop)
    scale = before - base if before - base >= LEAST else math.nan
    drops = (before - after).clamp(min=0).view(2, samples).mean(1) / scale
    return [
        Value("soft comprehensiveness", "probability", None, float(drops[0])),
        Value("soft sufficiency", "probability", None, float(1 - drops[1])),
    ]
