"""What `linearity` found: curves, radii, a table and a picture."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from jaxtyping import Bool, Float
from torch import Tensor

from tl_scopes import models
from tl_scopes.views import linearity as linearity_views

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

KINDS = ("steepest", "random", "swap")
"""The kinds of directions tried: the gradient's, random ones, and those towards other tokens."""
_UNDERSTATED, CONFIDENT = 10.0, 0.9


@dataclass(frozen=True, eq=False, repr=False)
class LinearityReport:
    """How far the first-order prediction holds, for each token and for all of them together.

    The axis `kind` is the kind of direction in which the tokens were perturbed, in the order of `KINDS`: "steepest"
    (the gradient's), "random", and "swap" (towards the nearest other tokens). The quantity is what the scope is about.
    All tensors are on the CPU, in float64.

    Attributes:
        str_tokens: the text of each token that was perturbed.
        positions: where each of these tokens stands in the prompt, counted from 0.
        scope: the question, as it is written in Python.
        unit: the unit of sizes, radii and distances, in words.
        tolerance: the relative error that is still called linear.
        sizes: [size], the norms of the perturbations tried, in `unit`.
        error: [kind token size], the relative error of the first-order prediction; NaN where rounding hides it.
        radius: [kind token], the size where the error passes the tolerance, in `unit`; infinite where it passes it at
            none of the sizes.
        predicted_radius: [kind token], the radius that the curvature at the prompt predicts, in `unit`, but no more
            than the smallest of `sizes` where the error passes `tolerance`; NaN where the curvature could not be taken
            (see `notes`).
        joint_error: [kind size], the error where all tokens are perturbed together, by the norm of the whole
            perturbation.
        joint_radius: [kind], the radius of all tokens together, in `unit`.
        joint_predicted_radius: [kind], the predicted radius of all tokens together, in `unit`.
        slope: [token], how much the quantity changes per `unit` along the steepest direction: for a number the norm of
            its gradient, the score of a first-order scope; for a vector (`FisherScope`, `SpectralScope`) the largest
            singular value of its Jacobian, as far as a few power iterations find it.
        nearest_distance: [token], how far away the nearest other token's embedding is, in `unit`.
        nearest_token: the text of that token.
        removal_change: [token], how much the quantity changes where the average embedding takes the token's place.
        removal_distance: [token], how far away the average embedding is, in `unit`.
        probability: the probability of the most likely next token; None where the linearisation ends before the logits.
        left_open: the probability of all other tokens together, 1 − `probability` without its rounding; None likewise.
        notes: what a reader of the numbers should know.
    """

    str_tokens: tuple[str, ...]
    positions: tuple[int, ...]
    scope: str
    unit: str
    tolerance: float
    sizes: Float[Tensor, " size"]
    error: Float[Tensor, "kind token size"]
    radius: Float[Tensor, "kind token"]
    predicted_radius: Float[Tensor, "kind token"]
    joint_error: Float[Tensor, "kind size"]
    joint_radius: Float[Tensor, " kind"]
    joint_predicted_radius: Float[Tensor, " kind"]
    slope: Float[Tensor, " token"]
    nearest_distance: Float[Tensor, " token"]
    nearest_token: tuple[str, ...]
    removal_change: Float[Tensor, " token"]
    removal_distance: Float[Tensor, " token"]
    probability: float | None
    left_open: float | None
    notes: tuple[str, ...] = field(default=())

    def __repr__(self) -> str:
        tokens = models.counted(len(self.positions), "token")
        return (
            f"LinearityReport({self.scope}: within {self.tolerance:.0%} up to {_median(self.radius[0]):.2g}, nearest "
            f"other token at {_median(self.nearest_distance):.2g} (medians of {tokens})"
            f"{'; saturated' if self.saturated else ''})"
        )

    @property
    def understated(self) -> Float[Tensor, " token"]:
        """How many times more the removal of a token changes the quantity than any first-order change that far can.

            |Δq| / (slope · distance)

        Above 1 the score is too small for what the token does.
        """
        return self.removal_change / (self.slope * self.removal_distance)

    @property
    def saturated(self) -> bool:
        """Whether a confident prediction has flattened the gradients: the most likely token has a probability above
        0.9, and the token whose removal changes the quantity most is understated more than tenfold.

        By Cauchy-Schwarz a first-order change over a distance is at most slope · distance, so no direction explains
        such a change. Ask for a logit or a difference of logits, which flatten less, or integrate along a path. On the
        bundled model's tasks 10 answers with p > 0.9 were tried. Their log-probabilities were understated 48 to 20,000
        times, their logits and temperatures 0.3 to 5 times.
        """
        return is_saturated(self.probability, self.removal_change, self.understated)

    @property
    def reaches_a_token(self) -> Bool[Tensor, " token"]:
        """Whether the first-order prediction holds all the way to the nearest other token, in the kind "swap"."""
        return self.radius[KINDS.index("swap")] >= self.nearest_distance

    def summary(self) -> str:
        """The findings in a few sentences."""
        steepest, random, swap = (f"{_median(radii):.2g}" for radii in self.radius)
        worst = int(self.removal_change.argmax())
        lines = [
            f"{self.scope}: the first-order prediction is within {self.tolerance:.0%} up to a perturbation of "
            f"{steepest} along the steepest direction, {random} at random, {swap} towards other tokens ({self.unit}; "
            f"medians of {models.counted(len(self.positions), 'token')}).",
            f"All tokens together: {', '.join(f'{r:.2g}' for r in self.joint_radius.tolist())}.",
            f"The nearest other token is {_median(self.nearest_distance):.2g} away; the first order holds that far for "
            f"{int(self.reaches_a_token.sum())} of them.",
        ]
        if self.predicted_radius[0].isfinite().any():
            ratio = (self.predicted_radius / self.radius).flatten()
            lines.append(f"Curvature predicts the radii at {_median(ratio[ratio.isfinite()]):.2f} times the measured.")
        lines.append(
            f"Removing {self.str_tokens[worst]!r} (position {self.positions[worst]}) changes the quantity most: by "
            f"{self.removal_change[worst]:.3g}, {self.understated[worst]:.2g} times the steepest first-order change."
        )
        if self.saturated:
            lines.append(
                f"Saturated: the prediction is sure (1 − p = {self.left_open or 0:.1e}) and its gradients have "
                "vanished, so that scores understate what matters; ask for a logit or a difference of logits."
            )
        return "\n".join([*lines, *(f"Note: {note}." for note in self.notes)])

    def to_dataframe(self) -> "pd.DataFrame":
        """One row for each token: its slope, its radii of each kind, its nearest token, and its removal."""
        import pandas as pd

        columns = {"position": self.positions, "token": self.str_tokens, "slope": self.slope.tolist()}
        for name, radii in (("radius", self.radius), ("predicted_radius", self.predicted_radius)):
            columns |= {f"{name}_{kind}": of_kind.tolist() for kind, of_kind in zip(KINDS, radii, strict=True)}
        return pd.DataFrame(
            columns
            | {
                "nearest_distance": self.nearest_distance.tolist(),
                "nearest_token": self.nearest_token,
                "removal_change": self.removal_change.tolist(),
                "understated": self.understated.tolist(),
            }
        )

    def plot(self) -> "Figure":
        """Error against size, the middle half of the tokens shaded, and each token's radii beside its nearest token."""
        return linearity_views.plot(self)

    def _repr_html_(self) -> str:
        return linearity_views.fragment(self)


def is_saturated(
    probability: float | None, removal_change: Float[Tensor, " token"], understated: Float[Tensor, " token"]
) -> bool:
    """The criterion of `LinearityReport.saturated`, which gives the reason."""
    return (
        probability is not None
        and probability > CONFIDENT
        and bool(understated[removal_change.argmax()] > _UNDERSTATED)
    )


def _median(values: Tensor) -> float:
    """The median of the values that are not NaN; NaN where all are."""
    known = values[~values.isnan()]
    return float(known.sort().values[len(known) // 2]) if len(known) else float("nan")
