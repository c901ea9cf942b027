"""Spectral Scope: what can a token say at all, and in how many ways?"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor

from tl_scopes import models
from tl_scopes.jacobian import spectrum
from tl_scopes.jacobian.fisher_information import fisher_root, weighted_logits
from tl_scopes.jacobian.linearization import Linearization
from tl_scopes.jacobian.randomness import source
from tl_scopes.jacobian.spectrum import Sketch
from tl_scopes.models import Token
from tl_scopes.scopes.scope import Measurement, Observable, Scope

_LISTED = 5


class Ranked(NamedTuple):
    """A token in one of the lists of a `SingularDirection`."""

    token: Token
    value: float


@dataclass(frozen=True, eq=False, repr=False)
class SingularDirection:
    """One way in which a token can move the prediction: A_t v = σ u.

    Signs are arbitrary: (−u, −v) is the same direction, with all four lists turned round together. Here the token that
    changes most is among the raised ones.
    """

    position: int
    """Of the token."""
    token: str
    """Its text."""
    singular_value: float
    """σ."""
    share: float
    """σ² over the sum of all squared singular values of this token."""
    step: Float[Tensor, " d_model"]
    """v, of norm 1: the step of the token's embedding."""
    effect: Float[Tensor, " d_of"]
    """J_t v, the change of the readout; with of="distribution" up to what the distribution does not notice."""
    raises: tuple[Ranked, ...]
    """The tokens whose logit grows most along the step; with of="distribution", whose probability does. Per unit."""
    lowers: tuple[Ranked, ...]
    """Whose logit, or probability, falls most."""
    towards: tuple[Ranked, ...]
    """The tokens whose embeddings have the largest cosine with the step; empty when the tokens are not perturbed at
    the embedding."""
    away: tuple[Ranked, ...]
    """Those with the most negative cosine."""

    def __repr__(self) -> str:
        def listed(tokens: tuple[Ranked, ...]) -> str:
            return ", ".join(repr(row.token.text) for row in tokens[:3])

        towards = f"towards {listed(self.towards)}, away from {listed(self.away)}: " if self.towards else ""
        return (
            f"SingularDirection({self.token!r} at {self.position}, {self.singular_value:.3g}, {self.share:.0%}: "
            f"{towards}raises {listed(self.raises)}, lowers {listed(self.lowers)}, or the opposite)"
        )


@dataclass(frozen=True)
class SpectralScope(Scope):
    """The singular values σ_1 ≥ σ_2 ≥ … of each token's Jacobian, A_t = J_t or √F J_t, in one number:

        largest: σ_1      frobenius: √(Σσ²) = ‖A_t‖_F      effective_rank: (Σσ²)² / Σσ⁴

    which are the farthest that a unit step of the token's embedding can move the prediction; √d_model times the root
    mean square over random unit steps; and how many independent things the token can say, from 1 to the rank of A_t. F
    is the Fisher information of the prediction: with it, frobenius² is the Fisher Scope, and no folding or centring of
    the weights changes the numbers. The readout's own depend on its coordinates: a folded gain is missing from them.

    All of them are in the answer: `answer.largest`, `frobenius`, `effective_rank`, `singular_values` [k token].

    With `rank`, from products with J alone, σ_1 and the singular values are lower bounds, `answer.largest_at_most` is
    an upper one (it holds for 98% of tokens), `answer.frobenius_error` and `effective_rank_error` are standard errors.
    Without, all is exact. `answer.method` says which, `answer.backward_passes` how many were needed.

    Args:
        statistic: which number is the score.
        of: "readout" for J_t, "distribution" for √F J_t: squares are then twice the KL divergence of a small step.
        rank: None for the exact answer; else how many directions to look for, the same ones for all tokens. 16 find
            σ_1 to 0.2% for the distribution, 32 to 3% for the readout (mean over the tokens of the bundled model's
            tasks). The exact answer where that is no dearer.
        generator: source of the random numbers, on the model's device. None is one of its own for every prompt, seeded
            by its tokens: the same prompt gets the same numbers, another one others.

    Unit: readout, or nat^½, per unit of embedding norm; the effective rank is a number of directions.
    Cost: d_of backward passes (with "distribution", as many as F has directions) and d_of x token x d_model numbers;
        with `rank`, 2 rank + 8 passes. "distribution" needs two products with the unembedding per dimension of the
        readout.
    Raises: ValueError for an unknown statistic or `of`; a rank below 1 or above d_of; for "distribution", a
        linearisation that does not end at the readout; for a generator on another device. TypeError for a generator
        that is none.
    Source: the Jacobian of Liu et al. 2026 (arXiv:2601.16407). Effective rank: R₀ of Bartlett et al. 2020
        (arXiv:1906.11300), the participation ratio. Singular vectors of a token's Jacobian, read as tokens: Golden
        2025 (arXiv:2505.24293). Algorithm: see `tl_scopes.jacobian.spectrum`.
    Departure: no paper's scope. The effective rank is the participation ratio, not the exponential of an entropy: sums
        of σ² and σ⁴ have unbiased estimates from a few products, a sum of σ² log σ² has not.

    Example:
        >>> lin = tls.linearize(model, "The keys to the old cabinet near the door")
        >>> answer = tls.SpectralScope("effective_rank", of="distribution")(lin)
        >>> answer.unit, answer.str_tokens[2], round(answer.scores[2].item(), 1)
        ('independent directions', ' keys', 1.3)
    """

    statistic: Literal["largest", "frobenius", "effective_rank"] = "largest"
    of: Literal["readout", "distribution"] = "readout"
    rank: int | None = None
    generator: torch.Generator | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.statistic not in ("largest", "frobenius", "effective_rank"):
            raise ValueError(f'statistic is "largest", "frobenius" or "effective_rank", got {self.statistic!r}.')
        if self.of not in ("readout", "distribution"):
            raise ValueError(f'of is "readout" or "distribution", got {self.of!r}.')
        if self.rank is not None:
            rank = models.as_count(self.rank, "rank is a number of directions, 1 at least")
            object.__setattr__(self, "rank", rank)

    def observable(self, lin: Linearization) -> Observable:
        return weighted_logits(lin) if self.of == "distribution" else lambda readout, logits: readout

    def unit(self, lin: Linearization) -> str:
        if self.statistic == "effective_rank":
            return "independent directions"
        moved = (
            "nat^½" if self.of == "distribution" else "readout" if models.is_readout(lin.of) else f"norm at {lin.of}"
        )
        return f"{moved} per {lin.unit}"

    def measure(self, lin: Linearization) -> Measurement:
        sketch = self._sketch(lin, self.rank)
        details = sketch.moments()
        details["singular_values"] = details["singular_values"][: self.rank]
        method = "exact" if sketch.is_exact else f"{len(sketch.U)} directions and {len(sketch.unseen)} random probes"
        return Measurement(
            details[self.statistic], details | {"method": method, "backward_passes": sketch.backward_passes}
        )

    def directions(
        self, lin: Linearization, position: SupportsIndex, count: SupportsIndex = 3
    ) -> tuple[SingularDirection, ...]:
        """What the leading singular vectors of one token mean: which step of its embedding, to which effect.

        Args:
            lin: of the readout.
            position: of the token in the prompt.
            count: how many, the largest singular value first (all of them where there are fewer).

        Cost: as for the scores; with `rank`, the directions are sought for this token alone, and are better for it.

        Raises:
            ValueError: for a position that is not there, a count below 1, a linearisation that does not end at the
                readout, and as the scope does.
            TypeError: for a position that is no integer.

        Source: Golden 2025 (arXiv:2505.24293), of the Jacobian with frozen nonlinearities; here of J itself.

        Example:
            >>> lin = tls.linearize(model, "The keys to the old cabinet near the door")
            >>> [first] = tls.SpectralScope(of="distribution").directions(lin, 2, count=1)
            >>> first.raises[0].token.text, first.lowers[0].token.text
            (' are', ' that')
        """
        lin.require_readout()
        position = models.as_int(position, "position must be an integer")
        if not -len(lin.tokens) <= position < len(lin.tokens):
            raise ValueError(
                f"there is no token at position {position}: up to the prediction the prompt has {len(lin.tokens)}, "
                f"at 0 to {len(lin.tokens) - 1}."
            )
        count = models.as_count(count, "count must be at least 1")
        position %= len(lin.tokens)
        rank = self.rank and max(self.rank, min(count, len(lin.readout)))
        sketch = self._sketch(lin, rank, position)
        total = sketch.moments()["frobenius"][position].square()
        total = total.clamp(min=torch.finfo(total.dtype).tiny)
        left, sigma, steps = torch.linalg.svd(sketch.seen[:, position], full_matrices=False)
        images = (sigma[:, None] * left.T) @ sketch.U.to(left)
        root = sketch.root.to(left)
        # R's rows are orthogonal, so its inverse on their span is Rᵀ over their squared norms.
        effects = (images / root.square().sum(-1).clamp(min=torch.finfo(root.dtype).tiny)) @ root
        return tuple(
            self._direction(lin, position, float(sigma[i]), float(sigma[i] ** 2 / total), steps[i], effects[i])
            for i in range(min(count, len(sigma)))
        )

    def _direction(
        self, lin: Linearization, position: int, value: float, share: float, step: Tensor, effect: Tensor
    ) -> SingularDirection:
        change = lin.logits_jvp(effect[None])[0].to(lin.log_probs)
        if self.of == "distribution":
            p = lin.log_probs.exp()
            change = p * (change - (p * change).sum())
        sign = 1 if change.max() >= -change.min() else -1
        step, effect, change = sign * step, sign * effect, sign * change
        cosines = change[:0]
        if lin.wrt == "hook_embed":
            vocabulary = models.embedding_matrix(lin.model).to(step)
            cosines = vocabulary @ step / vocabulary.norm(dim=-1).clamp(min=torch.finfo(step.dtype).tiny)
        raises, lowers, towards, away = (
            _ranked(lin, values, largest) for values in (change, cosines) for largest in (True, False)
        )
        return SingularDirection(
            position, lin.str_tokens[position], value, share, step, effect, raises, lowers, towards, away
        )

    def _sketch(self, lin: Linearization, rank: int | None, position: int | None = None) -> Sketch:
        d_of = len(lin.readout)
        if rank is not None and rank > d_of:
            raise ValueError(f"rank={rank} is more than the {d_of} dimensions of the readout: leave it out.")
        generator = source(lin, self.generator, "SpectralScope")
        root = torch.eye(d_of, device=lin.readout.device) if self.of == "readout" else fisher_root(lin)
        if not len(root):  # a prediction so sure that nothing moves it
            root = lin.log_probs.new_zeros(1, d_of)
        if rank is None or spectrum.passes(rank) >= len(root):
            return spectrum.exact(lin, root)
        return spectrum.sketch(lin, root, rank, generator, position)


def _ranked(lin: Linearization, values: Float[Tensor, " vocab"], largest: bool) -> tuple[Ranked, ...]:
    top = values.topk(min(_LISTED, len(values)), largest=largest)
    return tuple(
        Ranked(Token(id, models.token_text(lin.model, id)), value)
        for id, value in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    )
