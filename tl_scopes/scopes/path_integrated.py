"""Path-integrated Semantic Scope: what built this token's logit up, on the way from a baseline to the prompt?"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor

from tl_scopes import models
from tl_scopes.jacobian.line_integral import integrate, integrate_in_panels
from tl_scopes.jacobian.linearization import Linearization
from tl_scopes.jacobian.tensor_arguments import require_finite, require_real
from tl_scopes.models.arguments import as_number
from tl_scopes.results.attribution import Attribution
from tl_scopes.scopes.measurement import Estimate, Measurement, estimate_by, how_often
from tl_scopes.scopes.target import TargetScope

_TOLERABLE = 0.05
"""With a fixed number of steps, a warning is given where the completeness gap is a larger share of Σ|signed|."""
_COMPLETE = 0.02
"""The share of the change that may be missed by default."""
_MOST = 600
"""How many points there are at most by default."""
_ALIKE = (
    " This baseline is the same at all positions, so that each of them may begin as an attention sink, as a first "
    'token does, and f jumps where one after another stops being one: baseline="zero" avoids that.'
)


@dataclass(frozen=True, eq=False)
class PathIntegratedScope(TargetScope):
    """Integrated gradients: how much each token's embedding adds to one token's logit f = z_v along the straight line
    x(α) = x₀ + α(x − x₀) from a baseline x₀ to the prompt's embeddings x:

        a_t = (x_t − x_t(s)) ⊙ mean over α in [s, 1] of ∂f/∂x_t at x(α),   score_t = ‖a_t‖₂

    The answer also holds, by name (`answer.signed`):

        signed            [token] Σ_d a_td, the signed contributions: in sum they are f(x) − f(x(s)), with f(x) the
                          answer's `value`
        baseline_value    f(x(s)), where the line begins
        completeness_gap  Σ_t signed_t − (value − baseline_value), the quadrature's error of the whole
        quadrature_error  [token] its estimate for each token, from how far off the rule on every other point is
        alphas            the points α, the last of them 1
        profile           [alpha token] ‖∂f/∂x_t‖₂ at x(α): `SemanticScope`'s scores at the point x(α), so that the last
                          row is that of the prompt itself

    Args:
        target: as in `SemanticScope`; None is the most likely next token (at the prompt, and all along the line). For a
            target of several tokens f is its log-probability, and the line moves the prompt alone.
        versus: what to compare with: f = z_v − z_u.
        quantity: "logit", as in the paper, or "log_prob", as in `SemanticScope`.
        steps: at how many points the integrand is evaluated (Gauss-Legendre). None puts them where the integrand is
            rough, until the contributions sum to the change within 2%, at 42 points or more and 600 at most. A warning
            says when they are too few.
        baseline: x₀: "zero"; "mean", of the embedding matrix; a token at every position, as id or as "token:" and its
            text ("token: the"); or a tensor [token d_model] or [d_model]. On other hooks than "hook_embed": "zero" or a
            tensor. A tensor whose row 0 is `lin.embeddings[0]` leaves the BOS token as it is.
        start: s, where on the line to begin. 0 is the integral of the equations.

    Unit: logit (nat for "log_prob"): not a sensitivity but a part of a change, though without sign.
    Cost: a forward and a backward pass per point, and one more of each for the ends of the line; by default also a
        forward pass for each end of a panel in between, six at first and two more for each that is divided. Memory for
        graphs of some 512 MiB, or that of the prompt if it is larger.
    Raises: ValueError for what `SemanticScope` refuses; for a baseline of another shape, complex, NaN or infinite, for
        one that is an unknown word, or a token that is unknown or several; for steps below 1; for a start that is not a
        number in [0, 1); under rules; when the model's hooks or weights have changed since it was linearised. TypeError
        for a baseline or steps of another type.
    Source: Liu et al. 2026 (arXiv:2601.16407), appendix A.5, equations 9 and 10; integrated gradients: Sundararajan et
        al. 2017 (arXiv:1703.01365). `profile` is what the paper's figure 15 draws.
    Departure: s = 0.01, as in the paper's code. A network with norms and without biases hardly sees the scale of its
        input, so that α = 0 is singular: on the bundled model f still swings by several logits between α = 1e-6 and
        1e-3, and after 100 steps the integral from 0 misses f(x) − f(0) by 10 to 60%. From 0.01, 48 steps miss its
        scores by less than 2% (its text tasks). The paper's code takes the mean over 100 equidistant points.
        On a real model f also jumps on the way, above all from a baseline that is the same at every position ("mean", a
        token): each position sees copies of itself alone, as a first token does, and so each is an attention sink. On
        the way to the prompt one after another stops being one. At "The capital of France is" (SmolLM2-135M) the
        residual norm at layer 15 is 28,400 at all six positions of the "mean", and at the prompt 25,000 at BOS and
        below 210 elsewhere; the logit of " Paris" falls by 20 where " of" leaves that state (α = 0.138 to 0.15) and
        rises by 20 within 0.001 at α = 0.186. The default divides the line where f bends, and
        misses the change from the "mean" by −0.18 of 12.5 at that prompt, after 360 points, and by −0.17 of 15.4 at
        "The opposite of hot is", after 396; 294 points in panels that are halved missed −2.4 and 0.5. From "zero" 132
        to 276 points missed 0.05 at most at four prompts; where they are too few a warning says so.
        For the same reason f may change little from x(0.01) to x: compare `value` with `baseline_value`.
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

    steps: int | None = None
    baseline: str | SupportsIndex | Tensor = "zero"
    start: float | int = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps is not None:
            steps = models.as_count(self.steps, "steps is a number of points on the line, 1 at least")
            object.__setattr__(self, "steps", steps)
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
        if lin.rules is not None:
            raise ValueError(
                f"{type(self).__name__} adds up the model's own derivative along a line, and that of {lin.rules} rules "
                "would sum to another change than the model's: ask it of lin.under(None), or ask RelevanceScope."
            )
        f = self.function(lin)
        x = models.precise(lin.embeddings)
        x_s = torch.lerp(self._baseline(lin).to(x), x, self.start)
        x_s[lin.scored :] = x[lin.scored :]  # an answer that is given, and gets no scores, stays as it is
        if self.steps is None:
            line = integrate_in_panels(lin, f, x_s, self._panels(), _COMPLETE, _MOST)
        else:
            line = integrate(lin, f, x_s, self.steps)
        a = (x - x_s) * line.mean
        scores, signed, (baseline_value, value) = a.norm(dim=-1), a.sum(-1), line.ends
        return Measurement(
            scores,
            {
                "signed": signed,
                "baseline_value": baseline_value,
                "completeness_gap": float(signed.sum()) - (value - baseline_value),
                "quadrature_error": line.error(x - x_s),
                "alphas": tuple(self.start + (1 - self.start) * alpha for alpha in line.alphas),
                "profile": line.profile,
            },
        )

    def unit(self, lin: Linearization) -> str:
        return self.quantity_unit(lin)

    def caveat(self, answers: Sequence[Attribution]) -> str | None:
        missed = [a for a in answers if not self._is_complete(a)]
        if not missed:
            return None
        worst = max(missed, key=lambda a: abs(a.completeness_gap))
        change = worst.value - worst.baseline_value
        too_few = f"steps={self.steps} is too few" if self.steps else f"{len(worst.alphas) - 1} points are too few"
        more = "Leave steps out, which puts points where they are needed, or take more" if self.steps else "Take steps"
        begin = self.baseline
        alike = begin.ndim == 1 or bool((begin == begin[:1]).all()) if isinstance(begin, Tensor) else begin != "zero"
        farther = 0.3 if self.start < 0.3 else round((1 + self.start) / 2, 2)
        return (
            f"the contributions of the tokens sum to {float(worst.signed.sum()):.3g}, not to the change of "
            f"{change:.3g} along the line: {too_few}. {more}, or a start farther from the baseline than {self.start}, "
            f"such as {farther}: near the baseline f swings most, and it jumps where attention turns to another token."
            f"{_ALIKE if alike else ''}"
            f"{how_often(missed, answers)}"
        )

    def _is_complete(self, answer: Attribution) -> bool:
        """Whether the contributions sum to the change, as nearly as can be asked for."""
        contributed = float(answer.signed.abs().sum())
        if self.steps is not None:
            return abs(answer.completeness_gap) <= _TOLERABLE * contributed
        change = abs(answer.value - answer.baseline_value)
        rounding = 1e-4 * contributed
        return abs(answer.completeness_gap) <= _COMPLETE * max(change, 0.1 * contributed) + rounding

    def _panels(self) -> list[float]:
        """The ends of the first panels as parts of the line: α doubles from one to the next, as f does its turns."""
        alphas = [2.0**-k for k in range(7)]
        inside = [alpha for alpha in alphas if alpha > 1.2 * self.start]
        return [0.0, *((alpha - self.start) / (1 - self.start) for alpha in reversed(inside))]

    # -- what kind of scope it is -------------------------------------------------------------------------------------

    @property
    def grouping(self) -> Literal["norm", "sum", "signed"]:
        return "norm"

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
