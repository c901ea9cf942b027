"""Path-integrated Semantic Scope: what built this token's logit up, on the way from a baseline to the prompt?"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex

import numpy as np
import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from tl_scopes import models
from tl_scopes.jacobian.linearization import Linearization
from tl_scopes.results.attribution import Attribution
from tl_scopes.scopes.scope import Measurement, TargetScope, vjps

_TOKENS_AT_ONCE = 1024
"""Points of the line run together up to this many tokens: memory as for one prompt of that length."""
_TOLERABLE = 0.05
"""Completeness gap, as a share of Σ|signed|, beyond which there is a warning."""


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
        steps: how many points the integrand is evaluated at (Gauss-Legendre). A warning says when they are too few.
        baseline: x₀: "zero"; "mean", of the embedding matrix; a token at every position, as id or as "token:" and its
            text ("token: the"); or a tensor [token d_model] or [d_model]. On other hooks than "hook_embed": "zero" or a
            tensor. A tensor whose row 0 is `lin.embeddings[0]` leaves the BOS token as it is.
        start: s, where on the line to begin. 0 is the integral of the equations.

    Unit: logit (nat for "log_prob"): not a sensitivity but a share of a change, though without sign.
    Cost: `steps` forward and backward passes, and two forward passes and one backward pass for the ends; memory for the
        graph of 1,024 tokens, or of the prompt if it is longer (whole, also where `linearize` had checkpoint=True).
    Raises: ValueError for what `SemanticScope` refuses; a baseline of another shape, NaN or infinite, a token that is
        unknown or several, an unknown word; steps below 1; a start outside of [0, 1); hooks set or removed since the
        linearisation was made. TypeError for a baseline or steps of another type.
    Source: Liu et al. 2026 (arXiv:2601.16407), appendix A.5, equations 9 and 10; integrated gradients: Sundararajan et
        al. 2017 (arXiv:1703.01365). `profile` is what the paper's figure 15 draws.
    Departure: s = 0.01, as in the paper's code. A network with norms and without biases hardly sees the scale of its
        input, so that α = 0 is singular: on the bundled model f still swings by several logits between α = 1e-6 and
        1e-3, and after 100 steps the integral from 0 misses f(x) − f(0) by 10 to 60%. From 0.01, 48 steps miss scores
        by less than 2% (its text tasks). The paper's code takes the mean over 100 equidistant points.
        For the same reason f may change little from x(0.01) to x: compare `value` with `baseline_value`; the other
        baselines are no shrunken copies of the prompt.
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
        if not 0 <= self.start < 1:
            raise ValueError(f"start is the α in [0, 1) where the line begins, got {self.start!r}.")
        kinds = 'baseline is "zero", "mean", "token:" and the text of a token, a token id or a tensor'
        if not isinstance(self.baseline, str | Tensor):
            object.__setattr__(self, "baseline", models.as_int(self.baseline, kinds))
        elif isinstance(self.baseline, str) and not re.match("zero$|mean$|token:", self.baseline):
            raise ValueError(
                f"{kinds}, got {self.baseline!r}. For the token of this text: baseline={'token:' + self.baseline!r}."
            )

    def unit(self, lin: Linearization) -> str:
        return self.quantity_unit

    def caveat(self, answers: Sequence[Attribution]) -> str | None:
        missed = [a for a in answers if abs(a.completeness_gap) > _TOLERABLE * float(a.signed.abs().sum())]
        if not missed:
            return None
        worst = max(missed, key=lambda a: abs(a.completeness_gap))
        often = f" So it is, this being the worst, in {len(missed)} of {len(answers)} predictions."
        return (
            f"the contributions of the tokens sum to {float(worst.signed.sum()):.3g}, not to the change "
            f"of {worst.value - worst.baseline_value:.3g} along the line: steps={self.steps} is too few. Take more, a "
            f'start farther from the baseline than {self.start}, or another baseline, such as "mean".'
        ) + (often if len(answers) > 1 else "")

    def measure(self, lin: Linearization) -> Measurement:
        function = self.function(lin)
        x = lin.embeddings.to(torch.promote_types(lin.embeddings.dtype, torch.float32))
        begin = torch.lerp(self._baseline(lin).to(x), x, self.start)
        first, last = lin.at_each(torch.stack([begin, x]))
        _require_the_same(lin, last)

        nodes, weights = _gauss_legendre(self.steps)
        weights = torch.as_tensor(weights, dtype=x.dtype, device=x.device)
        mean = x.new_zeros(2, *x.shape)  # by the rule, and by every other point
        profile: list[Tensor] = []
        for some, gradients in self._gradients(lin, function, begin, x, nodes):
            mean += einsum(weights[:, some], gradients, "rule alpha, alpha token d_model -> rule token d_model")
            profile.append(gradients.norm(dim=-1))
        profile.append(lin.vjp(lin.cotangent(function)[None]).to(x.dtype).norm(dim=-1))

        attributed, roughly = (x - begin) * mean
        scores, rough_error = attributed.norm(dim=-1), (attributed - roughly).norm(dim=-1)
        # The rule on half the points is off by far more than the rule itself, whose error falls with the number of
        # points like a power, here the square. Measured to hold for nine tokens in ten, and to exaggerate by five.
        error = rough_error * (rough_error.sum() / scores.sum()).nan_to_num(0).clamp(max=1)
        signed = attributed.sum(-1)
        value, baseline_value = (_number(function, point) for point in (lin, first))
        gap = float(signed.sum()) - (value - baseline_value)
        return Measurement(
            scores,
            {
                "signed": signed,
                "value": value,
                "baseline_value": baseline_value,
                "completeness_gap": gap,
                "quadrature_error": error,
                "alphas": (*(self.start + (1 - self.start) * nodes).tolist(), 1.0),
                "profile": torch.cat(profile),
            },
        )

    def _gradients(
        self, lin: Linearization, function: Callable[[Tensor], Tensor], begin: Tensor, end: Tensor, nodes: Any
    ) -> Iterator[tuple[slice, Float[Tensor, "alpha token d_model"]]]:
        """∂f/∂x at the nodes on the line from begin to end, in groups that are run together."""
        size = max(1, _TOKENS_AT_ONCE // len(end))
        with tqdm(total=len(nodes), desc="path", delay=3, leave=False) as bar:
            for i in range(0, len(nodes), size):
                some = slice(i, min(i + size, len(nodes)))
                alphas = torch.as_tensor(nodes[some], dtype=end.dtype, device=end.device)
                points = lin.at_each(begin + alphas[:, None, None] * (end - begin))
                gradients = vjps(points, [point.cotangent(function)[None] for point in points])
                yield some, torch.cat(gradients).to(end)
                bar.update(some.stop - some.start)

    def _baseline(self, lin: Linearization) -> Float[Tensor, "token d_model"]:
        x, baseline = lin.embeddings, self.baseline
        if isinstance(baseline, Tensor):
            if baseline.shape not in (x.shape, x.shape[1:]):
                raise ValueError(
                    f"a baseline has the shape [token d_model] = {list(x.shape)} or [d_model] = {list(x.shape[1:])}, "
                    f"got {list(baseline.shape)}."
                )
            if not baseline.isfinite().all():
                raise ValueError("the baseline has NaN or infinite entries.")
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
        token = models.token(lin.model, named, lin.model.cfg.d_vocab, "baseline")
        return models.embed(lin.model, torch.full_like(lin.tokens, token.id)[None])[0]


def _gauss_legendre(steps: int) -> tuple[Any, Any]:
    """Points in [0, 1], and two rows of weights: of the Gauss-Legendre rule, exact for polynomials of degree
    2·steps − 1, and of the rule on every other point, exact for as many powers as it has points.
    """
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    some = slice(steps % 2 == 0, None, 2)
    powers = np.polynomial.legendre.legvander(nodes[some], len(nodes[some]) - 1).T
    rougher = np.zeros(steps)
    rougher[some] = np.linalg.solve(powers, [2.0, *[0.0] * (len(powers) - 1)])
    return (1 + nodes) / 2, np.stack([weights, rougher]) / 2


def _number(function: Callable[[Tensor], Tensor], lin: Linearization) -> float:
    return float(function(lin.logits.cpu().double()))


def _require_the_same(lin: Linearization, again: Linearization) -> None:
    """Refuse when the model computes something else at the prompt than it did when it was linearised.

    Raises:
        ValueError: then.
    """
    difference = float((again.readout - lin.readout).norm() / lin.readout.norm())
    if difference > max(torch.finfo(lin.readout.dtype).eps, 1e-7) ** 0.5:
        raise ValueError(
            f"the model no longer answers as it did when it was linearised (the readout differs by {difference:.1%}): "
            "hooks or weights have changed since. Linearise and ask inside the same model.hooks(...)."
        )
