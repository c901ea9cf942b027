"""What `linearity` found: curves, radii, a table and a picture."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

KINDS = ("steepest", "random", "swap")
"""The directions tried: the gradient's, random ones, those towards other tokens."""
_NAMES = {"steepest": "steepest", "random": "random", "swap": "towards other tokens"}

_UNDERSTATED, CONFIDENT = 10.0, 0.9


@dataclass(frozen=True, eq=False, repr=False)
class LinearityReport:
    """How far the first-order prediction holds, per token and for all of them together.

    Axes: `kind` is the directions tried, in the order of `KINDS`: "steepest", "random", "swap" (towards the nearest
    other tokens). All tensors are on the CPU, in float64.
    """

    str_tokens: tuple[str, ...]
    """The tokens perturbed."""
    positions: tuple[int, ...]
    """Where each of them stands in the prompt."""
    scope: str
    """The question, as it is written in Python."""
    unit: str
    """Of sizes, radii and distances."""
    tolerance: float
    """The relative error that is still called linear."""
    sizes: Float[Tensor, " size"]
    """Norms of the perturbations tried."""
    error: Float[Tensor, "kind token size"]
    """Relative error of the first-order prediction; NaN where rounding hides it."""
    radius: Float[Tensor, "kind token"]
    """The size where the error passes the tolerance; infinite where it does at none of the sizes."""
    predicted_radius: Float[Tensor, "kind token"]
    """The same from the curvature at the prompt alone; NaN where it could not be taken (see `notes`)."""
    joint_error: Float[Tensor, "kind size"]
    """As `error`, of all tokens perturbed together, by the norm of the whole perturbation."""
    joint_radius: Float[Tensor, " kind"]
    """As `radius`, of all tokens together."""
    joint_predicted_radius: Float[Tensor, " kind"]
    """As `predicted_radius`, of all tokens together."""
    slope: Float[Tensor, " token"]
    """Change of the quantity per unit of size along the steepest direction: of a number the norm of its gradient, the
    score of a first-order scope; of a vector (`FisherScope`, `SpectralScope`) the largest singular value of its
    Jacobian, as far as a few power iterations find it."""
    nearest_distance: Float[Tensor, " token"]
    """How far the nearest other token's embedding is."""
    nearest_token: tuple[str, ...]
    """Which one it is."""
    removal_change: Float[Tensor, " token"]
    """How much the quantity changes when the average embedding takes the token's place."""
    removal_distance: Float[Tensor, " token"]
    """How far away that is."""
    probability: float | None
    """Of the most likely next token; None where the linearisation ends before the logits."""
    notes: tuple[str, ...] = field(default=())
    """What a reader of the numbers should know."""

    def __repr__(self) -> str:
        return (
            f"LinearityReport({self.scope}: within {self.tolerance:.0%} up to {_median(self.radius[0]):.2g}, nearest "
            f"other token at {_median(self.nearest_distance):.2g} (medians of {len(self.positions)} tokens)"
            f"{'; saturated' if self.saturated else ''})"
        )

    @property
    def understated(self) -> Float[Tensor, " token"]:
        """How many times more the removal of a token changes the quantity than any first-order change that far can:
        |Δq| / (slope · distance). Above 1 the score is too small for what the token does.
        """
        return self.removal_change / (self.slope * self.removal_distance)

    @property
    def saturated(self) -> bool:
        """Whether a confident prediction has flattened the gradients: the most likely token has a probability above
        0.9, and the token whose removal changes the quantity most is understated more than tenfold.

        By Cauchy-Schwarz a first-order change over a distance is at most slope · distance, so no direction explains
        such a change. Ask for a logit or a difference of logits, which flatten less, or integrate along a path. On the
        bundled model's tasks the log-probabilities of all 10 answers tried with p > 0.9 were understated 48 to 20,000
        times, their logits and temperatures 0.3 to 5 times.
        """
        return is_saturated(self.probability, self.removal_change, self.understated)

    @property
    def reaches_a_token(self) -> Bool[Tensor, " token"]:
        """Whether the linear picture holds all the way to the nearest other token, in its kind "swap"."""
        return self.radius[KINDS.index("swap")] >= self.nearest_distance

    def summary(self) -> str:
        """The findings in a few sentences."""
        steepest, random, swap = (f"{_median(radii):.2g}" for radii in self.radius)
        worst = int(self.removal_change.argmax())
        lines = [
            f"{self.scope}: the first-order prediction is within {self.tolerance:.0%} up to a perturbation of "
            f"{steepest} along the steepest direction, {random} at random, {swap} towards other tokens ({self.unit}; "
            f"medians of {len(self.positions)} tokens).",
            f"All tokens together: {', '.join(f'{r:.2g}' for r in self.joint_radius.tolist())}.",
            f"The nearest other token is {_median(self.nearest_distance):.2g} away; the picture reaches it for "
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
                f"Saturated: the prediction is sure (1 − p = {1 - (self.probability or 0):.1e}) and its gradients have "
                "vanished, so that scores understate what matters; ask for a logit or a difference of logits."
            )
        return "\n".join([*lines, *(f"Note: {note}." for note in self.notes)])

    def to_dataframe(self) -> "pd.DataFrame":
        """One row per token."""
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
        import matplotlib.pyplot as plt

        figure, (curves, radii) = plt.subplots(
            1, 2, figsize=(11, max(4.0, 1.2 + 0.24 * len(self.positions))), layout="constrained", width_ratios=(5, 6)
        )
        colors, near = ("#1b6ca8", "#d1731f", "#3f8f4f"), "#555555"
        sizes, heights = self.sizes.tolist(), list(range(len(self.positions)))
        for kind, errors, of_token, predicted, hue in zip(
            KINDS, self.error, self.radius, self.predicted_radius, colors, strict=True
        ):
            low, middle, high = errors.nanquantile(torch.tensor([0.25, 0.5, 0.75], dtype=errors.dtype), dim=0)
            curves.fill_between(sizes, low, high, color=hue, alpha=0.15, linewidth=0)
            curves.plot(sizes, middle, color=hue, marker="o", markersize=3, label=_NAMES[kind])
            radii.plot(of_token, heights, "o", color=hue, markersize=5)
            radii.plot(predicted, heights, "x", color=hue, markersize=5)
        curves.plot(sizes, self.joint_error[0], color=colors[0], linestyle="--", label="steepest, all tokens together")
        for mark, name in (("o", "measured"), ("x", "from curvature")):
            radii.plot([], [], mark, color=near, markersize=5, label=name)
        curves.axhline(self.tolerance, color=near, linewidth=0.8)
        curves.axvline(_median(self.nearest_distance), color=near, linestyle=":", label="nearest other token")
        radii.plot(self.nearest_distance, heights, "|", color=near, markersize=10, label="nearest other token")
        curves.set(
            xscale="log", yscale="log", xlabel=f"size of the perturbation ({self.unit})", ylabel="relative error"
        )
        radii.set(xscale="log", xlabel=f"radius of {self.tolerance:.0%} error ({self.unit})")
        radii.set_yticks(heights, [repr(token)[1:-1] for token in self.str_tokens], fontsize=8)
        radii.invert_yaxis()
        radii.legend(fontsize=8, frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
        curves.legend(fontsize=8, frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
        for axes in (curves, radii):
            axes.spines[["top", "right"]].set_visible(False)
        figure.suptitle(f"How far is it linear? {self.scope}", fontsize=10)
        plt.close(figure)  # else a notebook would show it twice
        return figure

    def _repr_html_(self) -> str:
        from tl_scopes.views import linearity as linearity_card

        return linearity_card.fragment(self)


def is_saturated(
    probability: float | None, removal_change: Float[Tensor, " token"], understated: Float[Tensor, " token"]
) -> bool:
    """The criterion of `LinearityReport.saturated`, whose docstring gives the reason."""
    return (
        probability is not None
        and probability > CONFIDENT
        and bool(understated[removal_change.argmax()] > _UNDERSTATED)
    )


def _median(values: Tensor) -> float:
    """Of what is known."""
    known = values[~values.isnan()]
    return float(known.sort().values[len(known) // 2]) if len(known) else float("nan")
