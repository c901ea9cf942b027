"""Which cotangents a scope asks with, how tokens move, and how its scores are made of the gradients."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_scopes.circuits.cut import steepest
from tl_scopes.jacobian.linearization import Linearization
from tl_scopes.jacobian.randomness import raised
from tl_scopes.scopes.first_order import JacobianScope
from tl_scopes.scopes.fisher import LEAST_DRAWS, FisherScope
from tl_scopes.scopes.relevance import RelevanceScope
from tl_scopes.scopes.scope import Scope
from tl_scopes.scopes.written import as_written


@dataclass(frozen=True, eq=False)
class Question:
    """score = √Σ_c ‖g_c‖², or for Fisher Σ_l ‖g_l‖² + mean_v ‖g_v‖², with a gradient g_c = cᵀJ for each cotangent; or
    g_t · δ_t, signed, where it is known how each token moves."""

    cotangents: Float[Tensor, "probe d_of"]
    summed: int
    """How many of them, the first ones, are summed; the others are draws, and are averaged."""
    squared: bool
    """Whether the score is the sum of squares itself (Fisher), and not its root."""
    moves: Float[Tensor, "token d_model"] | None = None
    """δ_t, where the scores are slopes along it (RelevanceScope); None where each token moves in the direction of its
    gradient, along which the slope is the gradient's norm."""

    def steps(self, pulled: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_model"]:
        """How each token moves, for these gradients."""
        return steepest(pulled) if self.moves is None else self.moves

    def combined(self, of_probes: Float[Tensor, "probe ..."]) -> Float[Tensor, "..."]:
        """The sum over the cotangents of something that each of them has."""
        drawn = of_probes[self.summed :]
        return of_probes[: self.summed].sum(0) + (drawn.mean(0) if len(drawn) else 0)

    def scores(self, squared_norms: Float[Tensor, "probe ..."]) -> Float[Tensor, "..."]:
        """The scores, from the squared norm for each cotangent."""
        total = self.combined(squared_norms)
        return total if self.squared else total.sqrt()

    def error(self, of_probes: Float[Tensor, "probe ..."]) -> Float[Tensor, "..."] | None:
        """The standard error of `combined`; None where nothing was drawn."""
        drawn = of_probes[self.summed :]
        n = len(drawn)
        if not n:
            return None
        if n < LEAST_DRAWS:
            return torch.full_like(drawn[0], torch.inf)
        return drawn.std(0) / n**0.5 * raised(n)


def question_of(
    scope: Scope, lin: Linearization, asking: str, or_slopes: bool = False, of_one: bool = False
) -> Question:
    """What a scope asks a linearisation.

    Args:
        scope: the scope.
        lin: the linearisation.
        asking: the name of the function that wants to know.
        or_slopes: whether scores may be slopes as well, those of a RelevanceScope.
        of_one: whether they must be about one number, so that errors name no FisherScope.

    Raises:
        TypeError: for a scope whose scores are something else than norms.
    """
    require_norms(scope, asking, or_slopes, of_one)
    if isinstance(scope, RelevanceScope):
        return Question(scope.cotangents(lin), 1, squared=False, moves=scope.moves(lin))
    if isinstance(scope, FisherScope):
        directions, draws = scope.all_cotangents(lin)
        return Question(torch.cat([directions, draws]), len(directions), squared=True)
    assert isinstance(scope, JacobianScope)
    cotangents = scope.joint_cotangents(lin)
    return Question(cotangents, len(cotangents), squared=False)


def require_one_prediction(scope: Scope, lin: Linearization, reader: str) -> None:
    """Refuse targets of several tokens where one prediction is read.

    Args:
        scope: the scope.
        lin: the linearisation of the prompt.
        reader: what reads one prediction, as the error says it: "a map is about".

    Raises:
        ValueError: with the target.
    """
    for target in scope.named_targets(lin.model, lin.vocab):
        if target is not None and target.is_span:
            raise ValueError(
                f"{target.text!r} is {len(target)} tokens, which are predicted at several positions, and {reader} one "
                "prediction: name one token, or ask carried_by of the prompt, which takes a target of several."
            )


def require_norms(scope: Scope, asking: str, or_slopes: bool = False, of_one: bool = False) -> None:
    """Refuse a scope whose scores are not made of the norms of gradients, of cotangents that are known before; or of
    their slopes, where these may be asked about too.

    Raises:
        TypeError: with the scopes that can be asked.
    """
    if isinstance(scope, FisherScope):
        if scope.rtol is not None:
            raise TypeError(f"{as_written(scope)} chooses its probes as it goes: give their number, FisherScope(32).")
        return
    own = ["measure"]
    for kind in (JacobianScope, *([RelevanceScope] if or_slopes else [])):
        if isinstance(scope, kind):
            methods = [name for name in ("measure", "measure_many", "combine") if hasattr(kind, name)]
            own = [name for name in methods if getattr(type(scope), name) is not getattr(kind, name)]
    if own:
        fisher = "" if of_one else "FisherScope, "
        raise TypeError(
            f"{asking} takes scopes whose scores are norms of cᵀJ{' or slopes of one number' if or_slopes else ''}, "
            f"and those of {as_written(scope)} are not (it has its own `{own[0]}`): take SemanticScope, "
            f"{'RelevanceScope, ' if or_slopes else ''}DirectionScope, TemperatureScope, MetricScope, {fisher}or "
            "a JacobianScope of your own."
        )
