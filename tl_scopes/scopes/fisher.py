"""Fisher Scope: what moves the whole predictive distribution?"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tl_scopes import models
from tl_scopes.jacobian import fisher_information
from tl_scopes.jacobian.curvature import rounds
from tl_scopes.jacobian.fisher_information import Seen, weighted_logits
from tl_scopes.jacobian.linearization import Linearization
from tl_scopes.jacobian.metric import Metric
from tl_scopes.jacobian.pullback import NoSecondDerivativeError, squared_norms, vjps
from tl_scopes.jacobian.randomness import raised, source
from tl_scopes.models.arguments import as_flag, as_number
from tl_scopes.results.attribution import Attribution
from tl_scopes.scopes.measurement import Estimate, Measurement, how_often
from tl_scopes.scopes.scope import Scope

_PROBES = 32
_TOGETHER = 16
"""How many draws are kept at a time, to compare them in pairs."""
LEAST_DRAWS = 12
"""The fewest draws that say how good their mean is. From 24 passes on, at least so many are draws. With fewer the
deviation in units of the standard error was found to spread up to 3.7 times as wide as it should (SmolLM2-135M)."""
_SHARE_PROBES = 8
"""The draws that tell which share of the scores a truncation holds. From 4 the share, .32 at a prompt of SmolLM2-135M,
was found to spread by .05 and to be off by as much as .16; from 8 it spreads by .03."""


@dataclass(frozen=True)
class FisherScope(Scope):
    """How fast the predictive distribution moves, in KL divergence, under a random step in each token's embedding:

        score_t = tr(J_tᵀ F J_t) = Σ_l ‖lᵀ J_t‖² + E ‖vᵀ J_t‖²,   F = LᵀL + E[v vᵀ]

    with F the Fisher information of the prediction (`fisher_information`), l the rows of L and v random. Neither
    folding the norms nor centring the unembedding changes it.

    `FisherScope()` spends 32 passes. For 6 leading directions l of F it takes lᵀJ, and J(Jᵀl) by double backward; this
    shows 6 directions that count in the scores, which are taken too; 14 passes go to random draws of what all of these
    leave. The estimate is unbiased. `answer.standard_error` says how good it is, if there were 24 passes or more; from
    fewer nothing can be said, and it is infinite. A prediction that has no more than 32 directions gets the exact
    answer. `answer.backward_passes` says how many passes were needed. Where an attention kernel cannot be
    differentiated twice, 8 leading directions of F and 24 draws take their place.

    Args: at most one of the first four.
        probes: how many passes to spend.
        rtol: spend as many as make the standard error less than this share of the score, for every token whose score is
            at least average. There is a warning where that would take more than the exact answer does.
        exact: take the trace itself, with one pass per direction of F that matters, at most d_model.
        rank: take the `rank` leading directions of F alone, the paper's truncation. The scores are too small, and
            folding and centring change them. `answer.score_share` is the share of the scores that they hold, all tokens
            together, estimated from 8 more passes; `answer.trace_share` is the share of tr F, which says little about
            it. On SmolLM2-135M rank 1 holds 42% of tr F and 10% of the scores at one prompt.
        generator: source of the random numbers, on the model's device. By default each prompt has its own, seeded by
            its tokens: the same prompt gets the same numbers, another prompt gets others.

    Unit: nat per squared unit of embedding norm.
    Cost: about 0.6 of a forward pass per backward pass, of which a double backward pass takes 1.2. Memory for the
        gradients of 16 draws. `exact` needs all of F: two products with the unembedding per dimension of the
        readout; `rank` some ten products per direction, or where the readout has fewer than 16 dimensions per
        direction, all of F.
    Raises: ValueError for a linearisation that does not end at the readout; for numbers out of range; for a generator
        on another device. TypeError for numbers of passes that are not integers, for a generator that is not a
        torch.Generator, and for an `exact` that is not a bool.
    Source: Liu et al. 2026 (arXiv:2601.16407), Fisher Scope. Splitting off a leading part that is exact: Hutch++ (Meyer
        et al. 2021, arXiv:2010.09649), with the remainder as in Nyström++ (Persson et al. 2022, arXiv:2109.10659).
    Departure: the paper's code keeps the leading direction only. The default is an estimate since the exact answer is
        out of reach where d_model is thousands. On four prompts of SmolLM2-135M of 6 to 10 tokens, with
        six draws each, 32 passes (the cost of 34 backward passes) miss the exact scores by 1.5% of their sum in the
        mean, and by 3.0% in the worst draw; the deviation in units of the standard error has a standard deviation of
        0.90. `python -m tests.benchmarks.fisher` takes longer prompts and other numbers of passes.

    Example:
        >>> lin = tls.linearize(model, "The keys to the old cabinet near the door")
        >>> answer = tls.FisherScope()(lin)
        >>> answer.unit, answer.backward_passes
        ('nat per squared unit of embedding norm', 32)
    """

    probes: int | None = None
    rtol: float | None = None
    exact: bool = False
    rank: int | None = None
    generator: torch.Generator | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "exact", as_flag(self.exact, "exact"))
        given = {name: getattr(self, name) for name in ("probes", "rtol", "exact", "rank")}
        given = {name: value for name, value in given.items() if value is not None and value is not False}
        if len(given) > 1:
            options = ", ".join(f"{name}={value}" for name, value in given.items())
            raise ValueError(f"give at most one of probes, rtol, exact and rank, got {options}.")
        for name in ("probes", "rank"):
            if name in given:
                count = models.as_count(given[name], f"{name} is a number of backward passes, 1 at least")
                object.__setattr__(self, name, count)
        if self.rtol is not None:
            rule = "rtol is a relative error between 0 and 1"
            object.__setattr__(self, "rtol", as_number(self.rtol, rule, lambda error: 0 < error < 1))

    def measure_many(self, lins: Sequence[Linearization]) -> list[Measurement]:
        for lin in lins:
            self._require_askable(lin)
        if self.rtol is not None:
            return [self._estimated([lin], self.rtol)[0] for lin in lins]
        if self.rank is not None:
            return self._truncated(lins, self.rank)
        roots = {i: root for i, lin in enumerate(lins) if (root := self._root(lin)) is not None}
        norms = squared_norms([lins[i] for i in roots], [*roots.values()]) if roots else []
        found = {i: self._exact(of_one) for i, of_one in zip(roots, norms, strict=True)}
        others = [i for i in range(len(lins)) if i not in found]
        for some in rounds([lins[i] for i in others]):
            chosen = [others[i] for i in some]
            found |= dict(zip(chosen, self._estimated([lins[i] for i in chosen]), strict=True))
        return [found[i] for i in range(len(lins))]

    def measure(self, lin: Linearization) -> Measurement:
        return self.measure_many([lin])[0]

    def unit(self, lin: Linearization) -> str:
        return f"nat per squared {lin.unit}"

    # -- what kind of scope it is -------------------------------------------------------------------------------------

    def metric(self, lin: Linearization) -> Metric:
        return weighted_logits(lin)

    @property
    def takes_spans(self) -> bool:
        return True

    @property
    def grouping(self) -> Literal["sum"]:
        return "sum"

    @property
    def depends_on_basis(self) -> bool:
        return self.rank is not None

    def estimate(self, answer: Attribution) -> Estimate | None:
        if self.rank is None:
            return super().estimate(answer)
        share = answer.score_share
        return Estimate(1 - share, f"the directions kept hold {share:.0%} of the scores")

    def caveat(self, answers: Sequence[Attribution]) -> str | None:
        if self.rtol is None:
            return None
        errors = [float((a.standard_error / a.scores)[a.scores >= a.scores.mean()].max()) for a in answers]
        missed = [error for error in errors if error > self.rtol * 1.0001]  # less would be rounding
        if not missed:
            return None
        spent = max(a.backward_passes for a in answers)
        return (
            f"the relative standard error is {max(missed):.1%} after {spent} backward passes, not the rtol of "
            f"{self.rtol:.2g}: FisherScope(exact=True) costs no more than that.{how_often(missed, answers)}"
        )

    # -- private ------------------------------------------------------------------------------------------------------

    def _root(self, lin: Linearization) -> Float[Tensor, "direction d_of"] | None:
        """All of F, where the options ask for it or it has no more directions than there are passes to spend."""
        if self.exact:
            return fisher_information.fisher_root(lin)
        return fisher_information.root_if_small(lin, self._passes(lin))

    def _passes(self, lin: Linearization) -> int:
        return self.probes or min(_PROBES, len(lin.readout))

    def _exact(self, norms: Float[Tensor, "direction token"]) -> Measurement:
        """Σ_l ‖lᵀ J_t‖² over all of F."""
        known = {"backward_passes": len(norms), "standard_error": norms.new_zeros(norms.shape[1])}
        return Measurement(norms.sum(0), known)

    def _truncated(self, lins: Sequence[Linearization], rank: int) -> list[Measurement]:
        """Σ_l ‖lᵀ J_t‖² over the leading directions, and the share of the scores and of tr F that they hold."""
        parts = [self._leading(lin, rank) for lin in lins]
        found = []
        norms = squared_norms(lins, [leading for leading, _, _ in parts])
        for lin, (leading, others, trace), of_one in zip(lins, parts, norms, strict=True):
            scores, left = of_one.sum(0), lin.squared_norms(others).sum()
            details = {
                "backward_passes": len(leading) + len(others),
                "score_share": _share(float(scores.sum()), float(scores.sum() + left)),
                "trace_share": _share(float(leading.square().sum()), trace),
            }
            found.append(Measurement(scores, details))
        return found

    def _leading(
        self, lin: Linearization, rank: int
    ) -> tuple[Float[Tensor, "direction d_of"], Float[Tensor, "other d_of"], float]:
        """The leading directions of F; cotangents v of the rest, Σ v vᵀ = F − LᵀL, exactly or in the mean; tr F."""
        alone = fisher_information.leading_root(lin, rank)
        if alone is not None:
            leading, trace = alone
            part = Seen(leading / leading.square().sum(-1, keepdim=True), leading)
            draws = fisher_information.remainder_probes(lin, _SHARE_PROBES, part, self._random(lin))
            return leading, draws / _SHARE_PROBES**0.5, trace
        root = fisher_information.fisher_root(lin)
        leading, others = root[:rank], root[rank:]
        if len(others) > _SHARE_PROBES:
            # Sums of the rows of a root with random signs are draws of what it is the root of.
            shape, random = (_SHARE_PROBES, len(others)), self._random(lin)
            others = torch.randn(shape, generator=random, device=root.device).to(root).sign() @ others
            others = others / _SHARE_PROBES**0.5
        return leading, others, float(root.square().sum())

    def _estimated(self, lins: Sequence[Linearization], rtol: float | None = None) -> list[Measurement]:
        """Σ_l ‖lᵀ J_t‖² + E ‖vᵀ J_t‖² for linearisations of different prompts; draws are added until `rtol` is met."""
        if rtol is not None and (root := self._root(lins[0])) is not None:
            return [self._exact(lins[0].squared_norms(root))]
        generators = [self._random(lin) for lin in lins]
        parts, scores, passes = self._sketch(lins, generators)
        draws = [Draws(len(lin.tokens), of_one.device) for lin, of_one in zip(lins, scores, strict=True)]
        wanted = [self._passes(lin) - spent for lin, spent in zip(lins, passes, strict=True)]
        while any(wanted):
            some = [min(count, _TOGETHER) for count in wanted]
            given = zip(lins, some, parts, generators, strict=True)
            v = [fisher_information.remainder_probes(lin, n, part, random) for lin, n, part, random in given]
            for of_one, pulled in zip(draws, vjps(lins, v), strict=True):
                of_one.add(pulled)
            wanted = [count - n for count, n in zip(wanted, some, strict=True)]
            if rtol is not None and not any(wanted):
                wanted = [self._more(lins[0], rtol, scores[0], draws[0], passes[0])]
        return [
            Measurement(
                exact + of_one.mean, {"backward_passes": spent + of_one.count, "standard_error": of_one.standard_error}
            )
            for exact, of_one, spent in zip(scores, draws, passes, strict=True)
        ]

    def _more(self, lin: Linearization, rtol: float, exact: Tensor, draws: "Draws", spent: int) -> int:
        """How many more draws the tolerance takes: as many again, but no more passes than the exact answer."""
        scores = exact + draws.mean
        matter = scores >= scores.mean()
        if bool((draws.standard_error <= rtol * scores)[matter].all()):
            return 0
        return min(draws.count, len(lin.readout) - spent - draws.count)

    def _sketch(
        self, lins: Sequence[Linearization], generators: Sequence[torch.Generator]
    ) -> tuple[list[Seen | None], list[Float[Tensor, "_"]], list[int]]:
        """Directions that hold most of the scores, what they hold of each score, and the passes that it took."""
        passes = [self._passes(lin) for lin in lins]
        count = min(passes) // 5
        if min(passes) >= 2 * LEAST_DRAWS:
            count = min(count, (min(passes) - LEAST_DRAWS) // 3)  # each direction takes three passes
        if not count:
            none = [models.precise(lin.readout).new_zeros(len(lin.tokens)) for lin in lins]
            return [None] * len(lins), none, [0] * len(lins)

        parts, pulled = _leading(lins, count, generators)
        scores = [_squares(of_one).sum(0) for of_one in pulled]
        spent = [2 * len(part.L) for part in parts]
        try:
            further = fisher_information.pulled_further(lins, parts, pulled)
        except NoSecondDerivativeError:
            parts, pulled = _leading(lins, min(passes) // 4, generators)
            return list(parts), [_squares(of_one).sum(0) for of_one in pulled], [len(part.L) for part in parts]
        norms = squared_norms(lins, [part.L for part in further])
        scores = [one + of_one.sum(0) for one, of_one in zip(scores, norms, strict=True)]
        spent = [passes + len(part.L) for passes, part in zip(spent, further, strict=True)]
        return [one.and_also(other) for one, other in zip(parts, further, strict=True)], scores, spent

    def all_cotangents(self, lin: Linearization) -> tuple[Float[Tensor, "direction d_of"], Float[Tensor, "draw d_of"]]:
        """The cotangents that the scores are made of: score_t = Σ_l ‖lᵀ J_t‖² + mean_v ‖vᵀ J_t‖².

        They are directions l and draws v, with the numbers of `measure`; there are no draws where the directions are
        all of F, or its leading ones. With `rtol` how many draws there are is known in the end only: see
        `circuits.question`, which refuses it.

        Cost: that of the directions.

        Raises:
            ValueError: as for the scores.
        """
        self._require_askable(lin)
        none = lin.log_probs.new_zeros(0, len(lin.readout))
        if self.rank is not None:
            return self._leading(lin, self.rank)[0], none
        if (root := self._root(lin)) is not None:
            return root, none
        generator = self._random(lin)
        (part,), _, (spent,) = self._sketch([lin], [generator])
        left, draws = self._passes(lin) - spent, []
        while left:
            n = min(left, _TOGETHER)
            draws.append(fisher_information.remainder_probes(lin, n, part, generator))
            left -= n
        return none if part is None else part.L, torch.cat([none, *draws])

    def _random(self, lin: Linearization) -> torch.Generator:
        return source(lin, self.generator, "FisherScope")

    def _require_askable(self, lin: Linearization) -> None:
        lin.require_readout()
        for name in ("probes", "rank"):
            value = getattr(self, name)
            if value is not None and value > len(lin.readout):
                raise ValueError(
                    f"{name}={value} is more than the {len(lin.readout)} dimensions of the readout: "
                    "FisherScope(exact=True) needs no more backward passes than these."
                )
        self._random(lin)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 1.0


def _squares(pulled: Float[Tensor, "probe token d_model"]) -> Float[Tensor, "probe token"]:
    return models.precise(pulled).square().sum(-1)


def _leading(
    lins: Sequence[Linearization], count: int, generators: Sequence[torch.Generator]
) -> tuple[list[Seen], list[Float[Tensor, "_ token d_model"]]]:
    """Leading directions of each F, and their vector-Jacobian products."""
    given = zip(lins, generators, strict=True)
    parts = [fisher_information.leading_part(lin, count, random) for lin, random in given]
    return parts, vjps(lins, [part.L for part in parts])


class Draws:
    """The mean over draws y = Jᵀv of ‖y_t‖², and its standard error, from one group of draws after another.

    ‖y_t‖² = εᵀA_tε is a quadratic form of random signs ε, of which Var ‖y_t‖² = 2 (tr A_t² − Σ_i (A_t)_ii²), for its
    diagonal is the same in all draws. Without what is subtracted, which would be a form of normal numbers, it is an
    upper bound; and tr A_t² is also E (y_t · y'_t)² for two draws. Pairs are many: they tell it better than the spread
    of the draws does, which depends on a few large ones. Where the diagonal is most of A_t the error is overstated.
    """

    def __init__(self, tokens: int, device: torch.device) -> None:
        self.count, self._pairs = 0, 0
        self._sum = torch.zeros(tokens, dtype=models.precise_dtype(device), device=device)
        self._squares = torch.zeros_like(self._sum)

    def add(self, pulled: Float[Tensor, "draw token d_model"]) -> None:
        """Count some more draws."""
        for t, of_token in enumerate(pulled.unbind(1)):
            y = models.precise(of_token)
            products = y @ y.T
            self._sum[t] += products.trace()
            self._squares[t] += products.triu(1).square().sum()
        self.count += len(pulled)
        self._pairs += len(pulled) * (len(pulled) - 1) // 2

    @property
    def mean(self) -> Float[Tensor, "token"]:
        """The mean of the draws; 0 without any."""
        return self._sum / max(1, self.count)

    @property
    def standard_error(self) -> Float[Tensor, "token"]:
        """The standard error of the mean: infinite where there are too few draws to know it."""
        n = self.count
        if n < LEAST_DRAWS:
            return torch.full_like(self._sum, math.inf)
        return (2 * self._squares / self._pairs / n).sqrt() * raised(n)
