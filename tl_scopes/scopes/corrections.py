"""Scopes around another scope, which correct it for where a token stands, or take another Jacobian."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal, SupportsIndex

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_scopes import models
from tl_scopes.jacobian.linearization import Linearization
from tl_scopes.jacobian.randomness import error_of_mean, source
from tl_scopes.models import Target
from tl_scopes.results.attribution import Attribution
from tl_scopes.scopes.measurement import Estimate, Measurement
from tl_scopes.scopes.path_integrated import PathIntegratedScope
from tl_scopes.scopes.scope import Scope, require_scope, targets_of
from tl_scopes.scopes.written import as_written


@dataclass(frozen=True)
class Around(Scope):
    """Another way to ask the question of a scope. What the question is about stays as that scope says."""

    scope: Scope
    """The scope whose question it is."""

    def __post_init__(self) -> None:
        require_scope(self.scope)

    def explained(self, lin: Linearization) -> tuple[Target | None, Target | None]:
        return self.scope.explained(lin)

    def named_targets(self, model: models.Model, vocab: int | None = None) -> tuple[Target | None, Target | None]:
        return self.scope.named_targets(model, vocab)

    def quantity_explained(self, lin: Linearization) -> str | None:
        return self.scope.quantity_explained(lin)

    def value(self, lin: Linearization) -> float | None:
        return self.scope.value(lin)

    @property
    def takes_spans(self) -> bool:
        return self.scope.takes_spans

    @property
    def compares(self) -> bool:
        return self.scope.compares

    def with_target(self, lin: Linearization, target: int) -> Scope:
        return replace(self, scope=self.scope.with_target(lin, target))

    def giving_way(
        self, model: models.Model, target: Target | None, versus: Target | None, vocab: int | None = None
    ) -> Scope:
        return replace(self, scope=self.scope.giving_way(model, target, versus, vocab))

    @property
    def asks_for_mean(self) -> bool:
        return self.scope.asks_for_mean

    def with_mean(self, mean: Tensor) -> Scope:
        return replace(self, scope=self.scope.with_mean(mean))

    @property
    def saturates(self) -> bool:
        return self.scope.saturates

    @property
    def depends_on_basis(self) -> bool:
        return self.scope.depends_on_basis

    def depends_on_mean_logit(self, lin: Linearization) -> bool:
        return self.scope.depends_on_mean_logit(lin)

    def notes(self, lin: Linearization) -> tuple[str, ...]:
        return self.scope.notes(lin)

    def caveat(self, answers: Sequence[Attribution]) -> str | None:
        return self.scope.caveat(answers)

    def estimate(self, answer: Attribution) -> Estimate | None:
        return self.scope.estimate(answer)

    @property
    def is_slope(self) -> bool:
        return self.scope.is_slope

    @property
    def grouping(self) -> Literal["norm", "sum", "signed"] | None:
        return self.scope.grouping

    @property
    def runs_again(self) -> Literal["point", "prompt"]:
        return "prompt" if self.scope.runs_again == "prompt" else "point"

    def unit(self, lin: Linearization) -> str:
        return self.scope.unit(lin)

    def rules_of(self, lin: Linearization) -> models.LinearRules | None:
        return self.scope.rules_of(lin)


@dataclass(frozen=True)
class Elsewhere(Around):
    """The question of a scope, asked of another linearisation of the same prediction."""

    @abstractmethod
    def other(self, lin: Linearization) -> AbstractContextManager[Linearization]:
        """Inside, the linearisation that the question is asked of."""

    def measure(self, lin: Linearization) -> Measurement:
        with self.other(lin) as other:
            return self.scope.measure(other)


@dataclass(frozen=True)
class PositionCorrectedScope(Around):
    """How many times more of the influence a token has than its position gets anyway:

        score_t = share_t / mean_π share_t(π x)

    The mean is over shuffles π of the prompt's tokens, which keep a BOS token in front. It divides out what a position
    gets whatever token stands there (attention sinks, recency): 1 is what any token of the prompt would get there. A
    prompt with a single token to shuffle scores 1 throughout.

    Args:
        scope: the scope whose shares are compared. It explains the same target at the shuffles as at the prompt.
        shuffles: how many shuffles, two at least.
        generator: source of the random numbers, on the model's device. By default each prompt has its own, seeded by
            its tokens.

    Unit: times the expected share. `answer.expected` is the expected share itself, `answer.uncorrected` the score of
        the scope, `answer.standard_error` the error of the ratio, from the number of shuffles and from the
        `standard_error` of the scope's own scores, where they have one; infinite for fewer than four shuffles.
    Cost: `shuffles` + 1 times that of the scope, and a forward pass per shuffle; memory as for one.
    Raises: ValueError for fewer than two shuffles, and for a scope with negative scores; TypeError for something that
        is not a scope, for a number of shuffles that is not an integer, and for a generator that is not a
        torch.Generator; else as the scope does.
    Source: ours. It finds what decides between two answers: over 300 held-out prompts the average precision of known
        causes rises by 0.07 (0.04 to 0.09), with a sink made by hand on BOS by 0.16 (0.12 to 0.20). It does not find
        what the prediction needs: the tokens it names first are not those whose deletion costs most nats
        (`demos/03_attention_sinks.ipynb`, `tests/benchmarks/corrections.py`).

    Example:
        >>> lin = tls.linearize(model, "The keys to the old cabinet near the door")
        >>> answer = tls.PositionCorrectedScope(tls.SemanticScope(" are", versus=" is"))(lin)
        >>> answer.top(1)[0].token, bool(answer.top(1)[0].score > 1.5)
        (' keys', True)
    """

    shuffles: int = 8
    generator: torch.Generator | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        rule = "shuffles is a number, 2 at least"
        object.__setattr__(self, "shuffles", models.as_count(self.shuffles, rule))
        if self.shuffles < 2:
            raise ValueError(f"{rule}, got {self.shuffles}.")

    @property
    def runs_again(self) -> Literal["prompt"]:
        return "prompt"

    def measure(self, lin: Linearization) -> Measurement:
        own = self.scope.measure(lin)
        share, expected, error = self.shares(lin, own.scores)
        scores = torch.where(expected > 0, share / expected, 0)
        spread = torch.where(expected > 0, error / expected, 0)
        if "standard_error" in own.details:  # the scope's own score is an estimate
            spread = (spread.square() + (own.details["standard_error"] / own.scores).square().nan_to_num(0.0)).sqrt()
        error = torch.where(scores > 0, scores * spread, 0)
        found = {"expected": expected, "uncorrected": own.scores, "standard_error": error}
        return Measurement(scores, {**own.details, **found})

    def shares(
        self, lin: Linearization, scores: Float[Tensor, " token"], of_sizes: bool = False
    ) -> tuple[Float[Tensor, " token"], Float[Tensor, " token"], Float[Tensor, " token"]]:
        """The share of each token, the share that shuffles give its position, and the standard error of the latter.

        Args:
            lin: the linearisation.
            scores: the scope's scores there, which need not be computed again.
            of_sizes: whether scores with a sign count by their sizes, where else they are refused.

        Cost: that of the scope, and a forward pass, for each shuffle.

        Raises:
            ValueError: for negative scores, unless sizes count. Else as the scope does.
        """
        first = int(models.starts_with_bos(lin.model, lin.tokens))
        target, _ = targets_of(self.scope, lin)
        # An answer of several tokens stays behind the shuffled prompt, and so the target stays what it is.
        scope = self.scope if target is None or len(target) > 1 else self.scope.with_target(lin, target.id)
        generator = source(lin, self.generator, "shuffles")
        share, shuffled = self._share(scores, lin.scored, of_sizes), []
        prompt = lin.single[0].tokens
        for _ in range(self.shuffles):
            other = lin.at_tokens(torch.cat([_shuffled(prompt, first, generator), lin.tokens[len(prompt) :]]))
            shuffled.append(self._share(scope.measure(other).scores[: len(scores)], lin.scored, of_sizes))
        others = torch.stack(shuffled)
        # Where no shuffle gives a position anything, the prompt is counted as one of its own arrangements.
        expected = torch.where(others.mean(0) > 0, others.mean(0), share.to(others) / (self.shuffles + 1))
        return share, expected, error_of_mean(others)

    def _share(self, scores: Tensor, scored: int, of_sizes: bool) -> Tensor:
        if scores.min() < 0 and not of_sizes:
            raise ValueError(
                f"{as_written(self.scope)} has negative scores, {scores.min():.3g} for one token, and how many times "
                "the score of its place a token has is asked of scores without a sign alone: take a scope of those."
            )
        counted = scores.abs()
        counted[scored:] = 0
        return counted / counted.sum().clamp(min=torch.finfo(counted.dtype).tiny)

    @property
    def is_slope(self) -> bool:
        return False  # a ratio of shares

    def unit(self, lin: Linearization) -> str:
        return "times the share expected at the position"

    @property
    def grouping(self) -> None:
        return None  # shares of several tokens together are expected otherwise than one by one

    def estimate(self, answer: Attribution) -> Estimate | None:
        return Scope.estimate(self, answer)


@dataclass(frozen=True)
class FrozenAttentionScope(Elsewhere):
    """The scope's score with attention patterns frozen: what the tokens move through the values attended to, not by
    drawing attention to themselves or away.

        J_t = ∂y/∂x_t at constant attention weights

    Args:
        scope: the scope whose question is asked.
        keys: positions whose attention weights are held constant, such as those of sinks, negative ones from the end of
            the tokens that get scores; None holds all patterns.

    Unit: that of the scope.
    Cost: that of the scope, and a forward pass.
    Raises: TypeError for something that is not a scope, and for keys that are not several positions; ValueError for a
        path-integrated scope without `steps`, whose contributions do not sum to a change here; as
        `models.held_attention` does, for models in which attention cannot be held; else as the scope does.
    Source: freezing attention patterns to make a transformer linear in its values, Elhage et al. 2021, A Mathematical
        Framework for Transformer Circuits. Measured as `PositionCorrectedScope` was, the average precision of known
        causes changes by 0.04 (0.02 to 0.06): by 0.21 where a name is to be found, by −0.09 where what is asked for has
        to be looked up. Deletion is as before, insertion too or a little worse. Freezing sinks alone helped nowhere.

    Example:
        >>> lin = tls.linearize(model, "The keys to the old cabinet near the door")
        >>> tls.FrozenAttentionScope(tls.SemanticScope(" are", versus=" is"))(lin).top(1)[0].token
        ' keys'
    """

    keys: tuple[SupportsIndex, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keys is not None:
            if not isinstance(self.keys, Iterable):
                raise TypeError(
                    f"keys are several positions, or None for all, got {self.keys!r}: write ({self.keys!r},)."
                )
            object.__setattr__(self, "keys", tuple(self.keys))
        line = self._line
        if line is not None and line.steps is None:
            raise ValueError(
                f"{as_written(line)} adds points to its line until the contributions sum to the change along it, which "
                "they do not with attention frozen: give their number, steps=50 say."
            )

    @property
    def _line(self) -> PathIntegratedScope | None:
        """The scope in the middle, where it is one along a line."""
        scope = self.scope
        while isinstance(scope, Around):
            scope = scope.scope
        return scope if isinstance(scope, PathIntegratedScope) else None

    def caveat(self, answers: Sequence[Attribution]) -> str | None:
        # That of a line counts on a sum which does not hold here.
        return self.scope.caveat(answers) if self._line is None else None

    @contextmanager
    def other(self, lin: Linearization) -> Iterator[Linearization]:
        """The same linearisation with these patterns held, for as long as they are."""
        keys, what = self.keys, "attention cannot be held: position"
        if keys is not None:  # those of the prompt: the model runs it with an answer behind it, filled up on the right
            keys = tuple(models.as_position(key, lin.scored, what) for key in keys)
        with models.held_attention(lin.model, keys):
            yield lin.at(lin.embeddings)


@dataclass(frozen=True)
class UnderRulesScope(Elsewhere):
    """The scope's question, asked of the network as these rules differentiate it: as under `linearize(..., rules=)`.

    It is for lists of scopes that are compared, `evaluate` or `known_causes`; elsewhere give the rules to `linearize`
    or `attribute`.

    Args:
        scope: the scope whose question is asked.
        rules: "linear", "lookup", or names of single rules, as in `linearize`.

    Unit: that of the scope.
    Cost: that of the scope, and a forward pass.
    Raises: TypeError for something that is not a scope, or not names of rules; ValueError for unknown rules and for
        None, for a model that they do not cover, and where other rules are given to `linearize` or `attribute` as well;
        else as the scope does.
    Source: as `linearize` says.

    Example:
        >>> lin = tls.linearize(model, "The keys to the old cabinet near the door")
        >>> tls.UnderRulesScope(tls.SemanticScope(" are", versus=" is"))(lin).top(1)[0].token
        ' keys'
    """

    rules: models.Rules = field(default="linear", metadata={"always": True})

    def __post_init__(self) -> None:
        super().__post_init__()
        read = models.LinearRules.read(self.rules)
        if read is None:
            raise ValueError(
                "UnderRulesScope asks under rules, got rules=None: take the scope itself, at lin.under(None) where the "
                "linearisation is under rules."
            )
        object.__setattr__(self, "rules", self.rules if isinstance(self.rules, str) else read.names)

    @property
    def is_slope(self) -> bool:
        return False  # of the model itself

    def rules_of(self, lin: Linearization) -> models.LinearRules | None:
        read = models.LinearRules.read(self.rules)
        if lin.rules is not None and read != lin.rules:
            raise ValueError(
                f"{as_written(self)} asks under {read} rules, and {lin.rules} rules are given as well: leave one of "
                "them out."
            )
        return read

    @contextmanager
    def other(self, lin: Linearization) -> Iterator[Linearization]:
        """The same linearisation under the rules."""
        self.rules_of(lin)  # refuses others
        yield lin.under(self.rules)


def _shuffled(tokens: Int[Tensor, "token"], first: int, generator: torch.Generator) -> Int[Tensor, "token"]:
    """The same tokens in another order, but for those before `first`, which stay where they are."""
    order = torch.randperm(len(tokens) - first, generator=generator, device=tokens.device)
    return torch.cat([tokens[:first], tokens[first:][order]])
