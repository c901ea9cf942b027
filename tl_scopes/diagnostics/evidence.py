"""The numbers behind the checks of one prediction, each computed once and only when a check asks for it."""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple, SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor

from tl_scopes import models
from tl_scopes.diagnostics.linearity import average_at, linearity, nearest_others
from tl_scopes.diagnostics.radius import curvature_radius, radius, relative_error
from tl_scopes.jacobian.linearization import Linearization
from tl_scopes.jacobian.metric import LocalMetric, Rays
from tl_scopes.jacobian.randomness import prompt_generator
from tl_scopes.jacobian.replacement import divergence
from tl_scopes.jacobian.softmax import left_open
from tl_scopes.results.attribution import Attribution
from tl_scopes.scopes.corrections import PositionCorrectedScope
from tl_scopes.scopes.scope import Scope

TOLERANCE = 0.1
"""The relative error that is still called linear, as in `linearity`."""
_TOP = 3
"""How many of the top tokens are replaced, and at how many of them the first order is followed. Three and three others
tell Semantic Scope from random scores as well as five and five do: on 40 natural prompts of SmolLM2-135M 65% and 66% of
its answers are fine by KL, and a quarter of random scores."""
_STEP = 0.01
"""The length of the step that predicts the radius, as a part of the distance to the nearest other token. It is as long
as `REACH` of the checks, where the verdict is decided."""
_VISIBLE, _NOISE = 32, 4
"""In units of `LocalMetric.rounding_unit`: how large 10% of the first-order change has to be for the step to be used at
all, and up to what size an error at its end counts as rounding alone."""
_PROBES = 2
"""The probes for the norm of a vector metric's Jacobian. It has only to be told from one ten times as large."""


class Reach(NamedTuple):
    """How far the first order reaches, for a few tokens."""

    radius: Float[Tensor, " some"]
    """The size of a step at which it is off by 10%; where a longer one was not tried, a lower bound."""
    distance: Float[Tensor, " some"]
    """The distance to the nearest other token."""
    how: str
    """How the radius was found."""
    cost: str
    """The passes that it took."""


class ReplacementEffects(NamedTuple):
    """What becomes of the prediction when the average embedding takes the place of one token at a time."""

    positions: list[int]
    """Which tokens: first those that the scope puts first; then others, drawn at random, or all others."""
    top: int
    """How many of them the scope puts first."""
    divergence: Float[Tensor, " some"] | None
    """KL(p ‖ p'), in nats; None where the linearisation ends before the logits."""
    change: Float[Tensor, " some"] | None
    """‖Δq‖ of the scope's metric q, or of the target's log-probability; None where the question has neither."""


class Evidence:
    """A scope's answer, and what several checks need to know about it."""

    shuffles = 2
    """How often the prompt is shuffled."""

    def __init__(
        self,
        lin: Linearization,
        scope: Scope,
        answer: Attribution,
        thorough: bool,
        without: Sequence[SupportsIndex] = (),
    ) -> None:
        self.lin, self.scope, self.thorough = lin, scope, thorough
        self.scores = answer.scores
        """Those of all tokens, also of the ones that are set aside."""
        self.answer = answer.without(without) if without else answer
        self.shares = dict(zip(self.answer.positions, self.answer.share.tolist(), strict=True))
        self.random = prompt_generator(lin, "check")

    def named(self, positions: Sequence[int]) -> str:
        """These tokens, as a sentence names them."""
        return ", ".join(f"{self.lin.str_tokens[i]!r} at {i}" for i in positions)

    def top(self, count: int) -> list[int]:
        """The positions of the most influential tokens, at most half of all."""
        return [row.position for row in self.answer.top(max(1, min(count, len(self.shares) // 2)))]

    @cached_property
    def expected(self) -> dict[int, float]:
        """The share of each place when the prompt's tokens are shuffled; of scores with a sign, that of their sizes.

        Cost: that of the scope, and a forward pass, for each shuffle.
        """
        own = self.scores.to(self.lin.embeddings.device)
        _, shares, _ = PositionCorrectedScope(self.scope, shuffles=self.shuffles).shares(self.lin, own, True)
        kept = {i: float(shares[i]) for i in self.shares}
        total = sum(kept.values()) or 1.0  # where no place of these gets anything
        return {i: share / total for i, share in kept.items()}

    @cached_property
    def q(self) -> LocalMetric | None:
        """The scope's metric, near the prompt."""
        metric = self.scope.joint_metric(self.lin)
        return None if metric is None else LocalMetric(self.lin, metric)

    @cached_property
    def average(self) -> Float[Tensor, " d_model"]:
        """What takes a token's place: see `average_at`."""
        return average_at(self.lin)

    @cached_property
    def probability(self) -> float | None:
        """The probability of the most likely next token; None where the linearisation ends before the logits."""
        return None if self.lin.trace.logits is None else float(self.lin.single[0].log_probs.max().exp())

    @cached_property
    def left_open(self) -> float:
        """What that probability leaves to all other tokens, with all digits."""
        return float(left_open(self.lin.single[0].log_probs.exp()))

    @cached_property
    def effects(self) -> ReplacementEffects:
        """The effects of replacing the top tokens and as many others; all tokens, if thorough.

        Cost: one forward pass per token.
        """
        top = self.top(_TOP)
        rest = [i for i in self.shares if i not in top]
        some = torch.randperm(len(rest), device="cpu", generator=self.random)[: len(top)].tolist()
        chosen = top + (rest if self.thorough else [rest[i] for i in sorted(some)])
        q, vocab = self.q, 0 if self.lin.trace.logits is None else self.lin.logits.numel()
        named = [target for target in (self.answer.target, self.answer.versus) if target is not None]
        single = len(self.lin.single) == 1 and all(len(target) == 1 for target in named)
        explained = [target.id for target in named] if single else []

        def both(readout: Tensor, logits: Tensor) -> Tensor:
            log_probs = logits.log_softmax(-1).flatten()  # of several predictions, whose divergences add up
            if q is not None:
                return torch.cat([log_probs, q.function(readout, logits).reshape(-1)])
            asked = log_probs[explained].diff() if len(explained) == 2 else log_probs[explained]
            return torch.cat([log_probs, asked])

        point = LocalMetric(self.lin, both)
        before, divergences, changes = point.value, [], []
        for i in range(0, len(chosen), point.batch):
            after = point.replaced(chosen[i : i + point.batch], self.average)
            divergences.append(divergence(before[:vocab], after[:, :vocab]))
            changes.append((after - before)[:, vocab:].norm(dim=-1))
        return ReplacementEffects(
            chosen,
            len(top),
            torch.cat(divergences).cpu() if vocab else None,
            torch.cat(changes).cpu() if len(before) > vocab else None,
        )

    def slopes(self, positions: Sequence[int]) -> Float[Tensor, " some"]:
        """‖∂q/∂x_t‖: for a number the steepest slope; for a vector an estimate of the (larger) Frobenius norm.

        Cost: one backward pass; for a vector two.
        """
        assert self.q is not None
        chosen = list(positions)
        if len(self.q.value) == 1:
            return models.precise(self.q.gradient[chosen]).norm(dim=-1).cpu()
        signs = torch.randint(0, 2, (_PROBES, len(self.q.value)), device="cpu", generator=self.random) * 2 - 1
        pulled = models.precise(self.q.pull(signs.to(self.q.value))[:, chosen])
        return pulled.square().sum(-1).mean(0).sqrt().cpu()

    def understated(self, effects: ReplacementEffects) -> Float[Tensor, " some"]:
        """|Δq| / (slope · distance) for each replacement, as in `LinearityReport.understated`."""
        assert effects.change is not None
        away = (self.average - self.lin.embeddings[effects.positions]).norm(dim=-1).cpu()
        return (effects.change / (self.slopes(effects.positions) * away)).nan_to_num(0, posinf=torch.inf)

    @cached_property
    def reach(self) -> Reach:
        """How far the first order holds at the first tokens.

        A thorough check measures it. Otherwise it is predicted by how far the metric departs from the first order at a
        short step in the steepest direction, or by the curvature at the prompt where rounding would hide that. A vector
        metric is followed along one step towards the nearest token.

        Raises:
            NoSecondDerivativeError: for a vector metric under an attention kernel that has no double backward.
        """
        assert self.q is not None
        top = self.top(_TOP)
        distances, _, nearest = nearest_others(self.lin, top, 1)
        distance = distances[:, 0].cpu()
        if self.thorough:
            return self._measured_reach(top, distance)
        return self._predicted_reach(top, distance) or self._stepped_reach(top, distance, nearest[:, 0])

    def _measured_reach(self, top: list[int], distance: Tensor) -> Reach:
        report = linearity(self.lin, self.scope, positions=top)
        passes = 7 * (len(top) + 1) * (len(report.sizes) + 2)
        return Reach(report.radius[0], distance, "measured", f"some {passes} forward passes")

    def _predicted_reach(self, top: list[int], distance: Tensor) -> Reach | None:
        q = self.q
        assert q is not None
        if len(q.value) > 1:
            return None
        steepest = self._rays(top, q.gradient[top])
        slopes = q.slopes(steepest)
        size, step = slopes.norm(dim=-1), _STEP * distance.to(slopes)
        if bool((TOLERANCE * size * step < _VISIBLE * q.rounding_unit).any()):
            bends = q.curvatures(steepest)
            cost = f"{1 + len(top)} forward, 2 backward passes, {len(top)} Hessian products"
        else:
            bent = q.residuals(steepest, slopes, step[:, None])[:, 0]
            bends = 2 * bent.where(bent > _NOISE * q.rounding_unit, 0.0) / step**2
            cost = f"{2 + 2 * len(top)} forward passes, 1 backward pass"
        if bends is None:
            return None
        predicted = curvature_radius(size[:, None], bends[:, None], TOLERANCE)
        # Near an inflection the second order says nothing, however far it is followed: so the change is measured, at
        # the predicted radius of each token, or at the nearest token where that lies beyond it.
        near, noise = step, _NOISE * q.rounding_unit
        far = torch.minimum(predicted, distance.to(predicted))
        first = size * far
        # What rounding may have added does not count.
        beyond = (q.residuals(steepest, slopes, far[:, None])[:, 0] - noise).clamp(min=0)
        error = (beyond / first).where(first > 0, 0.0)
        # A measured error a little above the tolerance is what the prediction says; a larger one cuts it short.
        cut = error > 2 * TOLERANCE
        before = torch.maximum(bends * near**2 / 2, bends.new_tensor(noise)) / (size * near)
        found = torch.where(cut, _crossing(near, before, far, error), predicted)
        if bool(cut.any()):
            how = "predicted, and cut short by a measured change"
        elif bool((noise > TOLERANCE * first).any()):
            how = "predicted, and rounding hides the change there"
        else:
            how = "predicted, and measured there"
        return Reach(found.cpu(), distance, how, cost)

    def _stepped_reach(self, top: list[int], distance: Tensor, nearest: Tensor) -> Reach:
        q = self.q
        assert q is not None
        away = self._rays(top, nearest - self.lin.embeddings[top])
        slopes = q.slopes(away)
        step = TOLERANCE * distance.median().to(slopes)[None]
        residuals = q.residuals(away, slopes, step[None])
        error = relative_error(residuals[:, None], slopes.norm(dim=-1, keepdim=True), step, TOLERANCE)
        # Where the step is within the tolerance, what lies beyond it is not known.
        found = radius(step, error, TOLERANCE).clamp(max=float(step)).cpu()
        how = f"from a step of {float(step):.2g} towards it, the longest tried"
        return Reach(found, distance, how, f"{len(top) + 1} forward and {len(top) + 1} backward passes")

    def _rays(self, top: list[int], directions: Tensor) -> Rays:
        x = self.lin.embeddings
        return Rays(torch.tensor(top, device=x.device), directions, x.new_zeros(0, *x.shape))


def _crossing(
    near: Float[Tensor, " some"], before: Float[Tensor, " some"], far: Float[Tensor, " some"], error: Tensor
) -> Float[Tensor, " some"]:
    """Where an error of `before` at the near size and of `error` at the far one passes the tolerance.

    As in `radius`: between the two it is a power of the size, and proportional to it where the near one says nothing.
    """
    power = (error / before).log() / (far / near).log()
    between = near * (TOLERANCE / before) ** (1 / power)
    return between.where((near < far) & (before < TOLERANCE) & (before > 0), far * TOLERANCE / error)
