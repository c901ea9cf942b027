"""Path-integrated Semantic Scope: what built this token's logit up, on the way from a baseline to the prompt?"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor

from tl_scopes import models
from tl_scopes.jacobian.line_integral import OfLogits, integrate
from tl_scopes.jacobian.linearization import Linearization
from tl_scopes.jacobian.tensor_arguments import require_finite, require_real
from tl_scopes.models.arguments import as_number
from tl_scopes.results.attribution import Attribution
from tl_scopes.scopes.scope import Estimate, Measurement, TargetScope, estimate_by, how_often

_TOLERABLE = 0.05
"""A warning is given where the completeness gap is a larger share of Σ|signed|."""


@dataclass(frozen=True, eq=False)
class PathIntegratedScope(TargetScope):
    """Integrated gradients: how much each token's embedding adds to one token's logit f = z_v along the straight line
    x(α) = x₀ + α(x − x₀) from a baseline x₀ to the prompt's embeddings x:

        a_t = (x_t − x_t(s)) ⊙ mean over α in [s, 1] of ∂f/∂x_t at x(α),   score_t = ‖a_t‖₂

    The answer also holds, by name (`answer.signed`):

        signed            [token] Σ_d a_td, the signed contributions: in sum they are f(x) − f(x(s))
        value             f(x)
        baseline_value    f(x(s)), where the line begins
        completeness_gap  Σ_t signed_t − (value − baseline_value), the quadrature's error of the whole
        quadrature_error  [token] its estimate for each token, from how far off the rule on every other point is
        alphas            the points α, the last of them 1
        profile           [alpha token] ‖∂f/∂x_t‖₂ at x(α): `SemanticScope`'s scores at the point x(α), so that the last
                          row is that of the prompt itself

    Args:
        target: the token, as text or id; None is the most likely next token (at the prompt, and all along the line).
        versus: a token to compare with: f = z_v − z_u.
        quantity: "logit", as in the paper, or "log_prob".
        steps: at how many points the integrand is evaluated (Gauss-Legendre). A warning says when they are too few.
        baseline: x₀: "zero"; "mean", of the embedding matrix; a token at every position, as id or as "token:" and its
            text ("token: the"); or a tensor [token d_model] or [d_model]. On other hooks than "hook_embed": "zero" or a
            tensor. A tensor whose row 0 is `lin.embeddings[0]` leaves the BOS token as it is.
        start: s, where on the line to begin. 0 is the integral of the equations.

    Unit: logit (nat for "log_prob"): not a sensitivity but a part of a change, though without sign.
    Cost: `steps` forward and backward passes, and a forward and a backward pass for the ends; memory for graphs of some
        512 MiB, or that of the prompt if it is larger (whole, also where `linearize` had checkpoint=True).
    Raises: ValueError for what `SemanticScope` refuses; for a baseline of another shape, complex, NaN or infinite, for
        one that is an unknown word, or a token that is unknown or several; for steps below 1; for a start that is not a
        number in [0, 1); when the model's hooks or weights have changed since it was linearised. TypeError for a
        baseline or steps of another type.
    Source: Liu et al. 2026 (arXiv:2601.16407), appendix A.5, equations 9 and 10; integrated gradients: Sundararajan et
        al. 2017 (arXiv:1703.01365). `profile` is what the paper's figure 15 draws.
    Departure: s = 0.01, as in the paper's code. A network with norms and without biases hardly sees the scale of its
        input, so that α = 0 is singular: on the bundled model f still swings by several logits between α = 1e-6 and
        1e-3, and after 100 steps the integral from 0 misses f(x) − f(0) by 10 to 60%. From 0.01, 48 steps miss scores
        by less than 2% (its text tasks). The paper's code takes the mean over 100 equidistant points.
        For the same reason f may change little from x(0.01) to x: compare `value` with `baseline_value`. The other
        baselines are not shrunken copies of the prompt.
        In a mixture of experts f jumps where another expert is chosen; no gradient knows of it, and the gap stays.
        Unlike `signed`, the score depends on the choice of axes in the embedding space.

    Example:
        >>> lin = tls.linearize(model, "The keys to the old cabinet near the door")
        >>> answer = tls.PathIntegratedScope(" are", versus=" is")(lin)
        >>> answer.top(1)[0].token, answer.unit
        (' keys', 'logit')
        >>> bool(abs(answer.signed.sum() - (answer.value - answer.baseline_value)) < 0.05)
        True
    """

    steps: int = 48
    baseline: str | SupportsIndex | Tensor = "zero"
    start: float | int = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "steps", models.as_int(self.steps, "steps is a number of points on the line"))
        if self.steps < 1:
            raise ValueError(f"steps is a number of points on the line, 1 at least, got {self.steps}.")
        rule = "start is the α in [0, 1) where the line begins"
        object.__setattr__(self, "start", as_number(self.start, rule, lambda alpha: 0 <= alpha < 1))
        kinds = 'baseline is "zero", "mean", "token:" and the text of a token, a token id or a tensor'
        if not isinstance(self.baseline, str | Tensor):
            object.__setattr__(self, "baseline", models.as_int(self.baseline, kinds))
        elif isinstance(self.baseline, str) and not re.match("zero$|mean$|token:", self.baseline):
            raise ValueError(
                f"{kinds}, got {self.baseline!r}. For the token of this text: baseline={'token:' + self.baseline!r}."
            )

    def measure(self, lin: Linearization) -> Measurement:
        f = self.function(lin)
        x = models.precise(lin.embeddings)
        x_s = torch.lerp(self._baseline(lin).to(x), x, self.start)
        baseline_value, value = (_value(f, point) for point in (lin.at(x_s), lin))

        line = integrate(lin, f, x_s, self.steps)
        a = (x - x_s) * line.mean
        scores, signed = a.norm(dim=-1), a.sum(-1)
        return Measurement(
            scores,
            {
                "signed": signed,
                "value": value,
                "baseline_value": baseline_value,
                "completeness_gap": float(signed.sum()) - (value - baseline_value),
                "quadrature_error": line.error(x - x_s),
                "alphas": tuple(self.start + (1 - self.start) * alpha for alpha in line.alphas),
                "profile": line.profile,
            },
        )

    def unit(self, lin: Linearization) -> str:
        return self.quantity_unit

    def caveat(self, answers: Sequence[Attribution]) -> str | None:
        missed = [a for a in answers if abs(a.completeness_gap) > _TOLERABLE * float(a.signed.abs().sum())]
        if not missed:
            return None
        worst = max(missed, key=lambda a: abs(a.completeness_gap))
        return (
            f"the contributions of the tokens sum to {float(worst.signed.sum()):.3g}, not to the change "
            f"of {worst.value - worst.baseline_value:.3g} along the line: steps={self.steps} is too few. Take more, a "
            f'start farther from the baseline than {self.start}, or another baseline, such as "mean".'
            f"{how_often(missed, answers)}"
        )

    # -- what kind of scope it is -------------------------------------------------------------------------------------

    @property
    def runs_again(self) -> Literal["point"]:
        return "point"

    @property
    def is_slope(self) -> bool:
        return False

    @property
    def saturates(self) -> bool:
        return False  # the gradients come from all along the line

    def estimate(self, answer: Attribution) -> Estimate | None:
        return estimate_by(answer, answer.quadrature_error, "quadrature error")

    # -- private ------------------------------------------------------------------------------------------------------

    def _baseline(self, lin: Linearization) -> Float[Tensor, "token d_model"]:
        """x₀."""
        x, baseline = lin.embeddings, self.baseline
        if isinstance(baseline, Tensor):
            require_real(baseline, "the baseline", "[token d_model] or [d_model]")
            if baseline.shape not in (x.shape, x.shape[1:]):
                raise ValueError(
                    f"a baseline has the shape [token d_model] = {list(x.shape)} or [d_model] = {list(x.shape[1:])}, "
                    f"got {list(baseline.shape)}."
                )
            require_finite(baseline, "the baseline")
            return baseline.detach().to(x).expand_as(x)
        if isinstance(baseline, str) and baseline == "zero":
            return torch.zeros_like(x)
        if lin.wrt != models.EMBEDDING:
            raise ValueError(
                f"the baseline {baseline!r} is known at {models.EMBEDDING!r} only, and this line runs at {lin.wrt!r}: "
                'take "zero", or a tensor of values at that hook.'
            )
        if isinstance(baseline, str) and baseline == "mean":
            return models.mean_embedding(lin.model, len(lin.tokens)).expand_as(x)
        named = baseline.removeprefix("token:") if isinstance(baseline, str) else baseline
        token = models.token(lin.model, named, what="baseline")
        return models.embed(lin.model, torch.full_like(lin.tokens, token.id)[None])[0]


def _value(f: OfLogits, lin: Linearization) -> float:
    return float(f(lin.logits.cpu().double()))
