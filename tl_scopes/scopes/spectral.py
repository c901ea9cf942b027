"""Spectral Scope: what can a token say at all, and in how many ways?"""

from dataclasses import dataclass, field
from typing import Literal, SupportsIndex

import torch
from torch import Tensor

from tl_scopes import models
from tl_scopes.jacobian import spectrum
from tl_scopes.jacobian.fisher_information import fisher_root, weighted_logits
from tl_scopes.jacobian.linearization import Linearization
from tl_scopes.jacobian.metric import Metric
from tl_scopes.jacobian.randomness import source
from tl_scopes.jacobian.spectrum import Sketch, jackknife
from tl_scopes.results.attribution import Attribution
from tl_scopes.scopes.measurement import Estimate, Measurement, estimate_by
from tl_scopes.scopes.scope import Scope
from tl_scopes.scopes.singular_directions import SingularDirection, singular_directions


@dataclass(frozen=True)
class SpectralScope(Scope):
    """The singular values σ_1 ≥ σ_2 ≥ … of each token's Jacobian, A_t = J_t or √F J_t, in one number:

        largest: σ_1      frobenius: √(Σσ²) = ‖A_t‖_F      effective_rank: (Σσ²)² / Σσ⁴

    They are the farthest that a unit step of the token's embedding can move the prediction; √d_model times the root
    mean square of its moves under random unit steps; and how many independent things the token can say, from 1 to the
    rank of A_t. F is the Fisher information of the prediction: with it, frobenius² is the Fisher Scope, and no folding
    or centring of the weights changes the numbers. Without it they depend on the coordinates of the readout: a folded
    gain is missing from them.

    The answer has them all: `answer.largest`, `frobenius`, `effective_rank`, `singular_values` [k token].

    Without `rank` all is exact. With it there are only products with J: σ_1 and the singular values are lower bounds,
    `answer.largest_at_most` is an upper bound (it holds for 98% of tokens), and `answer.frobenius_error` and
    `effective_rank_error` are standard errors. `answer.method` says which it was, `answer.backward_passes` how many
    passes were needed.

    Args:
        statistic: which number is the score.
        space: "readout" for J_t, "distribution" for √F J_t: squares are then twice the KL divergence of a small step.
        rank: how many directions to look for, the same ones for all tokens; None is the exact answer. 16 find σ_1 to
            0.2% for the distribution, 32 to 3% for the readout (mean over the tokens of the bundled model's tasks). The
            answer is exact where that costs no more.
        generator: source of the random numbers, on the model's device. By default each prompt has its own, seeded by
            its tokens: the same prompt gets the same numbers, another prompt gets others.

    Unit: readout, or nat^½, per unit of embedding norm; the effective rank is a number of directions.
    Cost: d_of backward passes (with "distribution", as many as F has directions) and d_of x token x d_model numbers;
        with `rank`, 2 rank + 8 passes. "distribution" needs two products with the unembedding per dimension of the
        readout.
    Raises: ValueError for an unknown statistic or `space`; for a rank below 1 or above d_of; with "distribution" for a
        linearisation that does not end at the readout; for a generator on another device. TypeError for a rank
        that is not an integer, and for a generator that is not a torch.Generator.
    Source: the Jacobian of Liu et al. 2026 (arXiv:2601.16407). Effective rank: R₀ of Bartlett et al. 2020
        (arXiv:1906.11300), the participation ratio. Singular vectors of a token's Jacobian, read as tokens: Golden
        2025 (arXiv:2505.24293). Algorithm: see `tl_scopes.jacobian.spectrum`.
    Departure: this scope is not in the paper. The effective rank is the participation ratio, not the exponential of an
        entropy, because sums of σ² and σ⁴ have unbiased estimates from a few products and a sum of σ² log σ² has none.

    Example:
        >>> lin = tls.linearize(model, "The keys to the old cabinet near the door")
        >>> answer = tls.SpectralScope("effective_rank", space="distribution")(lin)
        >>> answer.unit, answer.str_tokens[2], round(answer.scores[2].item(), 1)
        ('independent directions', ' keys', 1.3)
    """

    statistic: Literal["largest", "frobenius", "effective_rank"] = "largest"
    space: Literal["readout", "distribution"] = "readout"
    rank: int | None = None
    generator: torch.Generator | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.statistic not in ("largest", "frobenius", "effective_rank"):
            raise ValueError(f'statistic is "largest", "frobenius" or "effective_rank", got {self.statistic!r}.')
        if self.space not in ("readout", "distribution"):
            raise ValueError(f'space is "readout" or "distribution", got {self.space!r}.')
        if self.rank is not None:
            rank = models.as_count(self.rank, "rank is a number of directions, 1 at least")
            object.__setattr__(self, "rank", rank)

    def measure(self, lin: Linearization) -> Measurement:
        sketch = self._sketch(lin, self.rank)
        details = statistics(sketch)
        details["singular_values"] = details["singular_values"][: self.rank]
        method = "exact" if sketch.is_exact else f"{len(sketch.U)} directions and {len(sketch.unseen)} random probes"
        spent = {"method": method, "backward_passes": sketch.backward_passes}
        return Measurement(details[self.statistic], details | spent)

    def unit(self, lin: Linearization) -> str:
        if self.statistic == "effective_rank":
            return "independent directions"
        if self.space == "distribution":
            return f"nat^½ per {lin.unit}"
        return f"{'readout' if models.is_readout(lin.of) else f'norm at {lin.of}'} per {lin.unit}"

    def directions(
        self, lin: Linearization, position: SupportsIndex, count: SupportsIndex = 3
    ) -> tuple[SingularDirection, ...]:
        """What the leading singular vectors of one token mean: which step of its embedding has which effect.

        Args:
            lin: a linearisation that ends at the readout.
            position: where the token stands in the prompt.
            count: how many, the largest singular value first (all of them where there are fewer).

        Cost: as for the scores; with `rank`, the directions are sought for this token alone, and are better for it.

        Raises:
            ValueError: for a position that is not there, a count below 1, a linearisation that does not end at the
                readout, and as the scope does.
            TypeError: for a position or a count that is not an integer.

        Source: Golden 2025 (arXiv:2505.24293), of the Jacobian with frozen nonlinearities; here of J itself.

        Example:
            >>> lin = tls.linearize(model, "The keys to the old cabinet near the door")
            >>> [first] = tls.SpectralScope(space="distribution").directions(lin, 2, count=1)
            >>> first.raises[0].token.text, first.lowers[0].token.text
            (' are', ' that')
        """
        _, lin = self.about(lin)
        lin.require_readout()
        position = models.as_position(position, len(lin.tokens))
        count = models.as_count(count, "count must be at least 1")
        rank = self.rank and max(self.rank, min(count, len(lin.readout)))
        sketch = self._sketch(lin, rank, position)
        return singular_directions(lin, sketch, position, count, of_probabilities=self.space == "distribution")

    # -- what kind of scope it is -------------------------------------------------------------------------------------

    def metric(self, lin: Linearization) -> Metric:
        return weighted_logits(lin) if self.space == "distribution" else lambda readout, logits: readout

    @property
    def is_slope(self) -> bool:
        return self.statistic != "effective_rank"

    @property
    def depends_on_basis(self) -> bool:
        return self.space == "readout"

    def estimate(self, answer: Attribution) -> Estimate | None:
        if answer.method == "exact":
            return None
        if self.statistic == "largest":
            return estimate_by(answer, answer.largest_at_most - answer.scores, "distance to its upper bound")
        name = f"{self.statistic}_error"
        return estimate_by(answer, answer.details[name], name.replace("_", " "))

    # -- private ------------------------------------------------------------------------------------------------------

    def _sketch(self, lin: Linearization, rank: int | None, position: int | None = None) -> Sketch:
        """A_t = R J_t, with RᵀR = 1 or F: all of it, or what `rank` directions see."""
        d_of = len(lin.readout)
        if rank is not None and rank > d_of:
            raise ValueError(f"rank={rank} is more than the {d_of} dimensions of the readout: leave it out.")
        generator = source(lin, self.generator, "SpectralScope")
        root = torch.eye(d_of, device=lin.readout.device) if self.space == "readout" else fisher_root(lin)
        if not len(root):  # the prediction is so sure that nothing moves it
            root = lin.log_probs.new_zeros(1, d_of)
        if rank is None or spectrum.passes(rank) >= len(root):
            return spectrum.exact(lin, root)
        return spectrum.sketch(lin, root, rank, generator, position)


def statistics(sketch: Sketch) -> dict[str, Tensor]:
    """The three numbers of every token, with what is known of their errors, and the singular values."""
    sums = sketch.sums()
    largest = sums.sigma[0]
    frobenius = sums.second.sqrt()
    effective_rank = torch.where(sums.fourth > 0, sums.second.square() / sums.fourth, 0)
    return {
        "largest": largest,
        "largest_at_most": sums.largest_at_most,
        "frobenius": frobenius[:, 0],
        "frobenius_error": jackknife(frobenius),
        "effective_rank": effective_rank[:, 0],
        "effective_rank_error": jackknife(effective_rank),
        "singular_values": sums.sigma,
    }
