"""How an evaluation perturbs prompts: what it replaces, and what it puts in place."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_scopes import models
from tl_scopes.jacobian.linearization import Linearization
from tl_scopes.jacobian.replacement import substitute
from tl_scopes.models import Model
from tl_scopes.models.arguments import as_flag, as_number

FRACTIONS = (0.05, 0.1, 0.2)
"""The fractions that count where none are given."""
REPLACEMENTS = ("zero", "mean", "pad", "resample")


@dataclass(frozen=True, repr=False)
class Perturbation:
    """How `evaluate` perturbs prompts: what is replaced, by what, and how much of it.

    Raises:
        ValueError: for an unknown replacement, or one given twice; for numbers out of range.
        TypeError: for steps, samples or a seed that are not integers, a fraction that is not a number, and for `bos` or
            `randomise` that are neither True nor False.
    """

    replacements: tuple[str, ...] = ("resample",)
    """What takes the place of an embedding: "zero", the "mean" of the vocabulary's embeddings, the embedding of the
    padding token ("pad"), or of a token drawn from the other prompts ("resample", the same ones for every scope)."""
    fractions: tuple[float, ...] | None = None
    """The shares of the tokens, best first, over which comprehensiveness and sufficiency are averaged. None is 5%, 10%
    and 20%, but for those that are less than half a token of a short prompt, which have no numbers there: 5% counts
    from 10 tokens on, 10% from 5 and 20% from 3. Given ones count for every prompt, which is left out if it is too
    short."""
    steps: int = 10
    """The number of steps of a curve, from no token replaced to all; shorter prompts go token by token."""
    bos: bool = False
    """Whether the BOS token is ranked and replaced as well. If not, it stays, and its score does not count."""
    samples: int = 4
    """The number of random masks per soft measure; 0 leaves the soft measures out."""
    randomise: bool = True
    """Whether scores are compared with those of the model with shuffled weights: one more linearisation."""
    cascade: tuple[float, ...] = ()
    """The shares of the blocks whose weights are shuffled, the last ones first, to compare scores with theirs:
    (0.25, 0.5, 1.0) is the last quarter, the last half and all of them. Each is one more linearisation."""
    seed: int = 0
    """The seed of what the evaluation itself draws: tokens to put in place, masks, the order of equal scores, shuffled
    weights. Every prompt draws for itself, so its place in the list does not matter. Scopes have seeds or generators of
    their own."""

    def __post_init__(self) -> None:
        for name, values in (("replacements", self.replacements), ("fractions", self.fractions)):
            if values is None and name == "fractions":
                continue
            if isinstance(values, str) or not isinstance(values, Sequence) or not values:
                raise ValueError(f"{name} are given as a tuple of at least one, got {values!r}.")
        object.__setattr__(self, "replacements", tuple(self.replacements))
        for replacement in self.replacements:
            if replacement not in REPLACEMENTS:
                known = ", ".join(map(repr, REPLACEMENTS))
                raise ValueError(f"there is no replacement {replacement!r}: choose from {known}.")
        if len(set(self.replacements)) < len(self.replacements):
            raise ValueError(f"each replacement is given once, got {self.replacements!r}.")
        rule = "a fraction of the tokens is a number between 0 and 1"
        if self.fractions is not None:
            object.__setattr__(self, "fractions", tuple(as_number(fraction, rule) for fraction in self.fractions))
        for fraction in self.fractions or ():
            if not 0 < fraction <= 1:
                raise ValueError(f"{rule}, got {fraction!r}.")
        rule = "cascade is a tuple of shares of the blocks, such as (0.25, 0.5, 1.0)"
        if isinstance(self.cascade, str) or not isinstance(self.cascade, Sequence):
            raise TypeError(f"{rule}, got {self.cascade!r}.")
        shares = tuple(as_number(share, rule, lambda share: 0 < share <= 1) for share in self.cascade)
        object.__setattr__(self, "cascade", shares)
        for name, least in (("steps", 1), ("samples", 0)):
            value = models.as_count(getattr(self, name), f"{name} must be at least {least}", least)
            object.__setattr__(self, name, value)
        object.__setattr__(self, "seed", models.as_int(self.seed, "seed must be an integer"))
        for name in ("bos", "randomise"):
            object.__setattr__(self, name, as_flag(getattr(self, name), name))

    def __repr__(self) -> str:
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return f"Perturbation({', '.join(f'{name}={value!r}' for name, value in given.items())})"

    def shares(self, tokens: int) -> tuple[float, ...]:
        """The fractions that count for a prompt with so many tokens to rank."""
        if self.fractions is not None:
            return self.fractions
        return tuple(fraction for fraction in FRACTIONS if count(fraction, tokens))

    def grid(self, tokens: int) -> tuple[float, ...]:
        """The fractions at which curves of such a prompt are measured, its `shares` among them."""
        return tuple(sorted({*(step / self.steps for step in range(self.steps + 1)), *self.shares(tokens)}))


def count(fraction: float, tokens: int) -> int:
    """How many of so many tokens a fraction stands for: rounded, halves up."""
    return math.floor(fraction * tokens + 0.5)


@dataclass(frozen=True, eq=False)
class Substitutes:
    """What takes the place of the embeddings of a prompt."""

    model: Model
    mean: Float[Tensor, " d_model"] | None
    """The mean embedding, where it is one of the replacements."""
    prompts: Mapping[int, Int[Tensor, " _"]]
    """The prompts by their index, without their BOS tokens: "resample" draws from them."""

    @classmethod
    def of(cls, model: Model, perturbation: Perturbation, prompts: Mapping[int, Tensor]) -> "Substitutes":
        """Prepare them for a model and its prompts, after `require_possible`."""
        length = max(map(len, prompts.values()))
        mean = models.mean_embedding(model, length) if "mean" in perturbation.replacements else None
        return cls(model, mean, prompts)

    @staticmethod
    def require_possible(model: Model, perturbation: Perturbation, prompts: Mapping[int, Tensor]) -> None:
        """Refuse a perturbation for which model or prompts lack something.

        Raises:
            ValueError: for "pad" without a padding token, and for "resample" without another prompt to draw from.
        """
        if "pad" in perturbation.replacements:
            models.padding_token(model)
        if "resample" in perturbation.replacements and len(prompts) < 2:
            raise ValueError(
                'to "resample" takes tokens of other prompts, and there is only one prompt to evaluate: give more of '
                f"them, or {replace(perturbation, replacements=('zero',))}."
            )

    def __call__(
        self, lin: Linearization, replacement: str, index: int, generator: torch.Generator
    ) -> Float[Tensor, "#token d_model"]:
        """The substitutes for the prompt of this index: one embedding per token, or one for all."""
        if self.mean is not None and replacement == "mean":
            return self.mean[None]
        if replacement != "resample":
            return substitute(lin, replacement)
        others = torch.cat([tokens for i, tokens in self.prompts.items() if i != index])
        drawn = torch.randint(len(others), (len(lin.tokens),), generator=generator)
        return models.embed(self.model, others[drawn.to(others.device)][None])[0]
