"""How an evaluation perturbs prompts: the settings of `evaluate`, written beside its results."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_scopes import models
from tl_scopes.jacobian.linearization import Linearization
from tl_scopes.jacobian.replacement import padding_token, substitute
from tl_scopes.models import Model

REPLACEMENTS = ("zero", "mean", "pad", "resample")


@dataclass(frozen=True, repr=False)
class Protocol:
    """What is replaced, by what, and how much of it.

    Raises:
        ValueError: for an unknown replacement, or one given twice; for numbers out of range.
        TypeError: for a seed that is no integer.
    """

    replacements: tuple[str, ...] = ("resample",)
    """What stands in place of an embedding: "zero", the "mean" of the vocabulary's embeddings, that of the padding
    token ("pad"), or that of a token drawn from the other prompts ("resample", the same ones for every scope)."""
    fractions: tuple[float, ...] = (0.05, 0.1, 0.2)
    """Of the tokens, best first, that comprehensiveness and sufficiency are averaged over."""
    steps: int = 10
    """Of the curves, from no token replaced to all; shorter prompts go token by token."""
    bos: bool = False
    """Whether the BOS token is ranked and replaced as well. Else it stays, and its score does not count."""
    samples: int = 4
    """Random masks per soft measure; 0 leaves the soft measures out."""
    randomise: bool = True
    """Whether scores are compared with those of the model with shuffled weights: one more linearisation."""
    seed: int = 0
    """Of what the evaluation itself draws: tokens to put in place, masks, the order of equal scores, shuffled weights.
    Every prompt draws for itself, so that its order does not matter. Scopes have seeds or generators of their own."""

    def __post_init__(self) -> None:
        for name, values in (("replacements", self.replacements), ("fractions", self.fractions)):
            if isinstance(values, str) or not isinstance(values, Sequence) or not values:
                raise ValueError(f"{name} are given as a tuple, of one at least, got {values!r}.")
            object.__setattr__(self, name, tuple(values))
        for replacement in self.replacements:
            if replacement not in REPLACEMENTS:
                known = ", ".join(map(repr, REPLACEMENTS))
                raise ValueError(f"there is no replacement {replacement!r}: choose from {known}.")
        if len(set(self.replacements)) < len(self.replacements):
            raise ValueError(f"each replacement is given once, got {self.replacements!r}.")
        object.__setattr__(self, "seed", models.as_int(self.seed, "seed must be an integer"))
        for fraction in self.fractions:
            if not 0 < fraction <= 1:
                raise ValueError(f"a fraction of the tokens lies between 0 and 1, got {fraction!r}.")
        for name, least in (("steps", 1), ("samples", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is a number, {least} at least, got {value!r}.")

    def __repr__(self) -> str:
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return f"Protocol({', '.join(f'{name}={value!r}' for name, value in given.items())})"

    @property
    def grid(self) -> tuple[float, ...]:
        """The fractions at which curves are measured, `fractions` among them."""
        return tuple(sorted({*(step / self.steps for step in range(self.steps + 1)), *self.fractions}))


@dataclass(frozen=True, eq=False)
class Substitutes:
    """What stands in place of the embeddings of a prompt."""

    model: Model
    mean: Float[Tensor, " d_model"] | None
    prompts: Sequence[Int[Tensor, " _"]]
    """Without their BOS tokens: where "resample" draws from."""

    @classmethod
    def of(cls, model: Model, protocol: Protocol, prompts: Sequence[Tensor]) -> "Substitutes":
        """Prepared for a model and its prompts.

        Raises: as `check` does.
        """
        cls.check(model, protocol, prompts)
        length = max(map(len, prompts))
        return cls(model, models.mean_embedding(model, length) if "mean" in protocol.replacements else None, prompts)

    @staticmethod
    def check(model: Model, protocol: Protocol, prompts: Sequence[Tensor]) -> None:
        """Whether there is what is to be put in place.

        Raises:
            ValueError: "pad" without a padding token, "resample" with no other prompt to draw from.
        """
        if "pad" in protocol.replacements:
            padding_token(model)
        if "resample" in protocol.replacements and len(prompts) < 2:
            raise ValueError(
                'to "resample" takes tokens of other prompts, and there is only one prompt: give more of them, or '
                f"{replace(protocol, replacements=('zero',))}."
            )

    def __call__(
        self, lin: Linearization, replacement: str, index: int, generator: torch.Generator
    ) -> Float[Tensor, "#token d_model"]:
        """For the prompt of this index, one embedding per token or one for all."""
        if self.mean is not None and replacement == "mean":
            return self.mean[None]
        if replacement != "resample":
            return substitute(lin, replacement)
        others = torch.cat([tokens for i, tokens in enumerate(self.prompts) if i != index])
        drawn = torch.randint(len(others), (len(lin.tokens),), generator=generator)
        return models.embed(self.model, others[drawn.to(others.device)][None])[0]
