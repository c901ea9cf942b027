"""The numbers behind the checks of one answer, each computed once."""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tl_scopes.diagnostics.linearity import linearity, others_at
from tl_scopes.diagnostics.radius import curvature_radius, nearest_rows, radius, relative_error
from tl_scopes.jacobian.linearization import Linearization
from tl_scopes.jacobian.metric import LocalObservable, Rays
from tl_scopes.jacobian.replacement import divergence
from tl_scopes.results.attribution import Attribution
from tl_scopes.scopes.scope import Scope

TOLERANCE = 0.1
"""The relative error that is still called linear, as in `linearity`."""
_REPLACED, _FOLLOWED = 5, 3
"""How many of the top tokens are replaced, and at how many of them the first order is followed."""
_PROBES = 2
"""For the norm of a vector's Jacobian, which only has to be told from one ten times as large."""


class Reach(NamedTuple):
    """How far the first order reaches, for a few tokens."""

    radius: Float[Tensor, " some"]
    """Where it is off by 10%; a lower bound where only a step so long was tried."""
    distance: Float[Tensor, " some"]
    """To the nearest other token."""
    how: str
    cost: str


class Effects(NamedTuple):
    """What becomes of the prediction when the average embedding takes a token's place, one at a time."""

    positions: list[int]
    """The `top` first ones are the scope's, the others were drawn at random, or are all there are."""
    top: int
    divergence: Float[Tensor, " some"] | None
    """KL(p ‖ p'), in nats; None where the linearisation ends before the logits."""
    change: Float[Tensor, " some"] | None
    """‖Δq‖ of the quantity that the scope asks about, where that is not known of the target's log-probability; None
    where there is no such thing."""


class Checked:
    """An answer, its linearisation made anew, and what several checks need of them."""

    def __init__(self, answer: Attribution, lin: Linearization, scope: Scope | None, thorough: bool) -> None:
        self.answer, self.lin, self.scope, self.thorough = answer, lin, scope, thorough
        self.shares = dict(zip(answer.positions, answer.share.tolist(), strict=True))
        self.random = torch.Generator().manual_seed(0)

    def named(self, positions: Sequence[int]) -> str:
        """Tokens as they are written in a sentence."""
        return ", ".join(f"{self.lin.str_tokens[i]!r} at {i}" for i in positions)

    def top(self, count: int) -> list[int]:
        """The positions of the most influential tokens, at most half of all."""
        return [row.position for row in self.answer.top(max(1, min(count, len(self.shares) // 2)))]

    @cached_property
    def q(self) -> LocalObservable | None:
        """The quantity that the scope asks about."""
        observable = None if self.scope is None else self.scope.observable(self.lin)
        return None if observable is None else LocalObservable(self.lin, observable)

    @cached_property
    def others(self) -> tuple[Tensor, Tensor]:
        """The values that other tokens have, and which of them are the prompt's own."""
        return others_at(self.lin)

    @cached_property
    def average(self) -> Float[Tensor, " d_model"]:
        """Of the other tokens' values."""
        return self.others[0].mean(0)

    @cached_property
    def probability(self) -> float | None:
        """Of the most likely next token."""
        return None if self.lin.trace.logits is None else float(self.lin.log_probs.max().exp())

    @cached_property
    def effects(self) -> Effects:
        """Of the top tokens and of as many others; of all of them, if thorough.

        Cost: one forward pass per token.
        """
        top = self.top(_REPLACED)
        rest = [i for i in self.shares if i not in top]
        some = torch.randperm(len(rest), generator=self.random)[: len(top)].tolist()
        chosen = top + (rest if self.thorough else [rest[i] for i in sorted(some)])
        q, vocab = self.q, 0 if self.lin.trace.logits is None else len(self.lin.logits)
        explained = [token.id for token in (self.answer.target, self.answer.versus) if token is not None]

        def both(readout: Tensor, logits: Tensor) -> Tensor:
            log_probs = logits.log_softmax(-1)
            asked = log_probs[explained].diff() if len(explained) == 2 else log_probs[explained]
            return torch.cat([log_probs, asked if q is None else q.function(readout, logits).reshape(-1)])

        point, divergences, changes = LocalObservable(self.lin, both), [], []
        before = point.value
        for i in range(0, len(chosen), point.batch):
            after = point.replaced(chosen[i : i + point.batch], self.average)
            divergences.append(divergence(before[:vocab], after[:, :vocab]))
            changes.append((after - before)[:, vocab:].norm(dim=-1))
        return Effects(
            chosen,
            len(top),
            torch.cat(divergences).cpu() if vocab else None,
            torch.cat(changes).cpu() if len(before) > vocab else None,
        )

    def slopes(self, positions: Sequence[int]) -> Float[Tensor, " some"]:
        """‖∂q/∂x_t‖: of a number the steepest slope; of a vector the Frobenius norm, estimated, which is no less.

        Cost: one backward pass; of a vector two.
        """
        assert self.q is not None
        chosen = list(positions)
        if len(self.q.value) == 1:
            return self.q.gradient[chosen].norm(dim=-1).cpu()
        signs = torch.randint(0, 2, (_PROBES, len(self.q.value)), generator=self.random) * 2 - 1
        pulled = self.q.pull(signs.to(self.q.value))[:, chosen]
        return pulled.square().sum(-1).mean(0).sqrt().cpu()

    def understated(self, effects: Effects) -> Float[Tensor, " some"]:
        """|Δq| / (slope · distance) of each replacement, as `LinearityReport.understated`."""
        assert effects.change is not None
        away = (self.average - self.lin.embeddings[effects.positions]).norm(dim=-1).cpu()
        return (effects.change / (self.slopes(effects.positions) * away)).nan_to_num(0, posinf=torch.inf)

    @cached_property
    def reach(self) -> Reach:
        """How far the first order holds at the first tokens: predicted from the curvature along the steepest direction,
        or for want of a curvature from one step towards the nearest token; measured if thorough.

        Raises:
            NoSecondDerivativeError: of a vector, under an attention kernel that has no double backward.
        """
        q, lin, top = self.q, self.lin, self.top(_FOLLOWED)
        assert q is not None
        table, own = self.others
        distances, rows = nearest_rows(lin.embeddings[top], table, own[top], 1)
        distance = distances[:, 0].cpu()
        if self.thorough:
            assert self.scope is not None
            report = linearity(lin.model, lin.tokens, self.scope, wrt=lin.wrt, of=lin.of, positions=top)
            passes = 7 * (len(top) + 1) * (len(report.sizes) + 2)
            return Reach(report.radius[0], distance, "measured", f"some {passes} forward passes")
        none = lin.embeddings.new_zeros(0, *lin.embeddings.shape)
        at = torch.tensor(top, device=lin.embeddings.device)
        if len(q.value) == 1:
            steepest = Rays(at, q.gradient[top], none)
            bends = q.curvatures(steepest)
            if bends is not None:
                found = curvature_radius(q.slopes(steepest).norm(dim=-1, keepdim=True), bends[:, None], TOLERANCE)
                cost = f"2 backward passes, {len(top)} Hessian products"
                return Reach(found.cpu(), distance, "predicted", cost)
        away = Rays(at, table[rows[:, 0]] - lin.embeddings[top], none)
        slopes = q.slopes(away)
        step = TOLERANCE * distances.median().to(q.precise)[None]
        residuals = q.residuals(away, slopes, step)
        error = relative_error(residuals[:, None], slopes.norm(dim=-1, keepdim=True), step, TOLERANCE)
        found = radius(step, error, TOLERANCE)
        # Where the step is within the tolerance, nothing is known beyond it.
        found = found.clamp(max=float(step)).cpu()
        how = f"from a step of {float(step):.2g} towards it, the longest tried"
        return Reach(found, distance, how, f"{len(top) + 1} forward and {len(top) + 1} backward passes")
