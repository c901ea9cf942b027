"""The measures of faithfulness at one prompt: curves, comprehensiveness and sufficiency, soft and hard."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_scopes import models
from tl_scopes.faithfulness.perturbation import Perturbation, count
from tl_scopes.jacobian.linearization import Linearization
from tl_scopes.jacobian.replacement import effects
from tl_scopes.jacobian.span import Span
from tl_scopes.models import Model
from tl_scopes.rank_correlation import kendall, spearman


class Value(NamedTuple):
    """One number about the scores of one scope at one prompt."""

    measure: str
    quantity: str
    """What is measured, which is the unit of the value: "log_prob", "log_odds" and "kl" are in nats."""
    fraction: float | None
    """The share of the tokens that is replaced or put back; None for what is not a point of a curve."""
    value: float


def candidates(model: Model, tokens: Int[Tensor, "token"], bos: bool) -> list[int]:
    """The positions that are ranked and replaced: all, or all but the BOS token's."""
    return list(range(int(not bos and models.starts_with_bos(model, tokens)), len(tokens)))


def ranking(
    scores: Float[Tensor, "token"], candidates: Sequence[int], generator: torch.Generator
) -> Int[Tensor, " rank"]:
    """The candidates, best score first; those of the same score are in random order."""
    positions = torch.tensor(candidates)[torch.randperm(len(candidates), generator=generator)]
    return positions[scores[positions].argsort(descending=True, stable=True)]


@dataclass(frozen=True, eq=False)
class Removal:
    """A prompt, some of whose embeddings are replaced: what that does to its prediction."""

    lin: Linearization
    instead: Float[Tensor, "#token d_model"]
    """What takes the place of the embeddings: one for each token, or one for all."""
    candidates: Sequence[int]
    """The positions that may be replaced; the others stay."""
    others: Mapping[int, Span] = field(default_factory=dict)
    """Where an answer is explained: the prompt with another answer behind it, by a number that stands for that one."""

    def effects(
        self, kept: Bool[Tensor, "row token #d_model"], targets: Sequence[int]
    ) -> tuple[Float[Tensor, "target row"], Float[Tensor, " row"]]:
        """The targets' log-probabilities and KL(p ‖ p'), in nats, of perturbed prompts, one per row of `kept`."""
        device = self.lin.tokens.device
        log_probs, divergences = effects(self.lin, self.instead, kept.to(device), torch.tensor(targets, device=device))
        return log_probs.T.cpu(), divergences.cpu()

    def log_probs_of_other(self, number: int, kept: Bool[Tensor, "row token #d_model"]) -> Float[Tensor, " row"]:
        """The log-probability of another answer, with the same replaced in the prompt."""
        other = self.others[number]
        prompt, kept = other.prompt_length, kept.to(other.tokens.device)
        stays = kept.new_ones(len(kept), len(other.tokens) - prompt, kept.shape[-1])
        instead = self.instead
        if len(instead) > 1:
            instead = other.embeddings.clone()
            instead[:prompt] = self.instead[:prompt]
        return effects(other, instead, torch.cat([kept[:, :prompt], stays], dim=1), other.tokens[:1])[0][:, 0].cpu()

    def log_prob(self, target: int) -> float:
        """log p(target) at the prompt itself; of an answer of several tokens that of the answer."""
        lin = self.others.get(target, self.lin)
        return float(lin.answer_log_prob(lin.log_probs) if isinstance(lin, Span) else lin.log_probs[target])

    def kept(self, removed: Sequence[Int[Tensor, " _"]]) -> Bool[Tensor, "row token"]:
        """The rows for `effects`, one for each set of positions that are replaced."""
        kept = torch.ones(len(removed), len(self.lin.tokens), dtype=torch.bool)
        for row, positions in zip(kept, removed, strict=True):
            row[positions] = False
        return kept


def hard_measures(
    removal: Removal,
    orders: Mapping[str, Int[Tensor, " rank"]],
    targets: Mapping[str, int],
    perturbation: Perturbation,
    foils: Mapping[str, int | None] | None = None,
    left_out: Float[Tensor, "token"] | None = None,
) -> dict[str, list[Value]]:
    """Deletion, insertion and leave-one-out of several scopes at one prompt; each perturbed prompt is run once.

    A quantity q is measured at the prompt itself (q), with the k best tokens replaced (q(without k)), and with all
    others replaced (q(k alone)): for "log_prob" it is log p(target), for "log_odds" log p(target) − log p(foil), which
    is a difference of logits, and for "kl" −KL(p ‖ p') from the prediction at the prompt itself.

        deletion        q − q(without k)           insertion   q(k alone) − q(none)

    The area is the mean of the curve over the share of tokens that are replaced or put back (trapezoidal). In
    probabilities, and averaged over the fractions that count for the prompt (`perturbation.shares`),

        comprehensiveness   p − p(without k)       sufficiency   p − p(k alone)

    More is better for all but sufficiency. The whole ranking is compared with that of leaving one token out, by KL: by
    the rank correlations of Spearman and Kendall, and by the overlap |A ∩ B| / |A ∪ B| of the first tenth of both.

    Args:
        removal: the prompt, and what takes the place of its embeddings.
        orders: for each scope the candidates, best first.
        targets: for each scope the token whose probability is measured.
        perturbation: the fractions and steps at which it is measured.
        foils: for a scope the token that the target is compared with, or the number of another answer in
            `removal.others`, if there is one.
        left_out: KL(p ‖ p') with each token alone replaced, where it is known.

    Cost: a forward pass for each candidate where this is not known, and up to two per scope and point of its curves, in
        batches; as many on its curves again for a scope that compares with another answer.

    Source: deletion and insertion, Petsiuk et al. 2018 (arXiv:1806.07421); comprehensiveness and sufficiency, DeYoung
        et al. 2020 (ERASER, arXiv:1911.03429), equations 1 and 2, averaged as their AOPC.
    """
    free = torch.tensor(removal.candidates)
    n = len(free)
    grid = perturbation.grid(n)
    counts = [count(fraction, n) for fraction in grid]
    removed = [part for order in orders.values() for k in counts for part in (order[:k], order[k:])]
    on_curves = len(removed)
    kept = removal.kept([*removed, *(free[:, None] if left_out is None else ())])
    unique, where = torch.unique(kept, dim=0, return_inverse=True)
    against = {name: foil for name, foil in (foils or {}).items() if foil is not None}
    ids = sorted({*targets.values(), *against.values()} - set(removal.others))
    log_probs, divergences = removal.effects(unique[..., None], ids)
    single = divergences[where[on_curves:]] if left_out is None else left_out[free].to(divergences)
    where = where[:on_curves].view(len(orders), len(counts), 2)
    log_probs, divergences = log_probs[:, where], divergences[where]
    other_answers: dict[str, Tensor] = {}
    for number in set(against.values()) & set(removal.others):
        names = [name for name in orders if against.get(name) == number]
        rows, at = torch.unique(where[[i for i, name in enumerate(orders) if name in names]], return_inverse=True)
        found = removal.log_probs_of_other(number, unique[rows, :, None])
        other_answers |= dict(zip(names, found[at], strict=True))

    values = {}
    chosen = [grid.index(fraction) for fraction in perturbation.shares(n)]
    for i, (name, order) in enumerate(orders.items()):
        q = removal.log_prob(targets[name])
        without, alone = log_probs[ids.index(targets[name]), i].T
        kl_without, kl_alone = divergences[i].T
        comprehensiveness, sufficiency = (float((math.exp(q) - x[chosen].exp()).mean()) for x in (without, alone))
        first = int((free == order[0]).nonzero())
        odds: list[Value] = []
        if name in against:
            other = (other_answers[name] if name in other_answers else log_probs[ids.index(against[name]), i]).T
            before = q - removal.log_prob(against[name])
            (odds_without, odds_alone) = (one - two for one, two in zip((without, alone), other, strict=True))
            odds += _curve("deletion", "log_odds", before - odds_without, counts, grid)
            odds += _curve("insertion", "log_odds", odds_alone - odds_alone[0], counts, grid)
        values[name] = [
            *_curve("deletion", "log_prob", q - without, counts, grid),
            *_curve("deletion", "kl", kl_without, counts, grid),
            *_curve("insertion", "log_prob", alone - alone[0], counts, grid),
            *_curve("insertion", "kl", kl_alone[0] - kl_alone, counts, grid),
            *odds,
            Value("comprehensiveness", "probability", None, comprehensiveness),
            Value("sufficiency", "probability", None, sufficiency),
            Value("leave-one-out of the first", "kl", None, float(single[first])),
            Value("leave-one-out rank of the first", "rank", None, float((single > single[first]).sum() + 1)),
            *_agreement(torch.stack([(order == i).nonzero()[0, 0] for i in free]), single),
        ]
    return values


def _agreement(places: Int[Tensor, " candidate"], single: Float[Tensor, " candidate"]) -> list[Value]:
    """How a whole ranking agrees with that of leaving one token out.

    Args:
        places: the place of each candidate in the ranking, 0 for the first.
        single: what replacing each candidate alone does.
    """
    tenth = max(1, count(0.1, len(places)))
    first, other = set(places.argsort()[:tenth].tolist()), set(single.argsort(descending=True)[:tenth].tolist())
    return [
        Value("leave-one-out Spearman", "rank correlation", None, spearman(-places.double(), single)),
        Value("leave-one-out Kendall", "rank correlation", None, kendall(-places.double(), single)),
        Value("leave-one-out first tenth", "overlap", None, len(first & other) / len(first | other)),
    ]


def drop_of_all(values: Sequence[Value]) -> float:
    """What replacing everything takes from log p(target), in nats: the end of the deletion curve."""
    return next(v.value for v in values if (v.measure, v.quantity, v.fraction) == ("deletion", "log_prob", 1.0))


def _curve(
    measure: str, quantity: str, points: Float[Tensor, " point"], counts: Sequence[int], grid: Sequence[float]
) -> list[Value]:
    share = torch.tensor(counts, dtype=points.dtype) / counts[-1]
    area = float(torch.trapezoid(points, share))
    curve = [Value(measure, quantity, f, v) for f, v in zip(grid, points.tolist(), strict=True)]
    return [*curve, Value(f"{measure} area", quantity, None, area)]


LEAST = 0.01
"""The probability that replacing everything must take from the target: less is too little to measure by."""


def soft_measures(
    removal: Removal,
    scores: Float[Tensor, "token"],
    target: int,
    drop: float,
    samples: int,
    generator: torch.Generator,
) -> list[Value]:
    """Keep or replace every entry of an embedding with a probability that grows with the token's score; half in all.

        a_t = min(1, λ score_t), with the λ at which the mean of a_t over the tokens is a half
        soft comprehensiveness   max(0, p − p') / (p − p₀)              entries kept with probability 1 − a_t
        soft sufficiency         1 − max(0, p − p') / (p − p₀)          entries kept with probability a_t

    p is the target's probability, p' with some entries replaced, p₀ with all tokens replaced. More is better in both.
    Both are NaN where p − p₀ is below 0.01. Every scope keeps as much: with a_t = score_t / max score, as published, a
    scope with one large score would keep next to nothing, and how much is kept would decide
    (arXiv:2601.03089). Unlike all other measures, these depend on the scores themselves and not only on their order: a
    square (Fisher) and its root come out differently.

    Args:
        removal: the prompt, and what takes the place of its embeddings.
        scores: one per token.
        target: the token whose probability is measured.
        drop: log p − log p₀, the end of any deletion curve.
        samples: how many masks are drawn.
        generator: the source of the random numbers, on the CPU.

    Cost: two forward passes per mask, in batches.

    Source: Zhao & Aletras 2023 (arXiv:2305.10496), Soft-NC and Soft-NS; at equal retained mass, arXiv:2601.03089.
    Departure: their entries are set to zero, ours to any replacement; negative scores count as zero; values are means
        over several masks.
    """
    free = torch.tensor(removal.candidates)
    chance = torch.zeros(len(scores), 1, dtype=scores.dtype)
    chance[free, 0] = _half_in_all(scores[free].clamp(min=0))
    d_model = removal.lin.embeddings.shape[-1]
    drawn = torch.rand(samples, len(scores), d_model, generator=generator, dtype=scores.dtype)
    entries = torch.cat([drawn >= chance, drawn < chance])
    entries[:, [i for i in range(len(scores)) if i not in removal.candidates]] = True
    answered = len(removal.lin.tokens) - len(scores)  # tokens of an answer, which stay
    entries = torch.nn.functional.pad(entries, (0, 0, 0, answered), value=True)
    after = removal.effects(entries, [target])[0].exp()
    q = removal.log_prob(target)
    before, base = math.exp(q), math.exp(q - drop)
    scale = before - base if before - base >= LEAST else math.nan
    drops = (before - after).clamp(min=0).view(2, samples).mean(1) / scale
    return [
        Value("soft comprehensiveness", "probability", None, float(drops[0])),
        Value("soft sufficiency", "probability", None, float(1 - drops[1])),
    ]


def _half_in_all(scores: Float[Tensor, " candidate"]) -> Float[Tensor, " candidate"]:
    """min(1, λ score) with the λ at which its mean is a half; scores of zero share what the others cannot take."""
    n, order = len(scores), scores.argsort(descending=True)
    ranked = scores[order].double()
    left, rest = n / 2 - torch.arange(n), ranked.flip(0).cumsum(0).flip(0)
    # With the first k at 1, λ is what is left over the sum of the rest; k is the first at which no other passes 1.
    fits = (left > 0) & (rest > 0) & (ranked * left <= rest)
    k = int(fits.nonzero()[0, 0]) if fits.any() else int((ranked > 0).sum())
    chance = torch.ones(n, dtype=torch.float64)
    chance[k:] = ranked[k:] * left[k] / rest[k] if fits.any() else max(0.0, n / 2 - k) / max(1, n - k)
    return torch.empty_like(scores).scatter_(0, order, chance.to(scores))
