"""What an evaluation is asked: prompts, each with its target and its foil."""

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Int
from torch import Tensor

from tl_scopes import models
from tl_scopes.faithfulness.measures import candidates
from tl_scopes.faithfulness.perturbation import FRACTIONS, Perturbation, count
from tl_scopes.models import Model, Prompt, Target


@dataclass(frozen=True, eq=False)
class Case:
    """One prompt of an evaluation, and what is asked of it."""

    index: int
    """Its place among the prompts."""
    tokens: Int[Tensor, "token"]
    free: list[int]
    """The positions that are ranked and replaced."""
    target: int | None
    foil: int | None
    answer: Target | None = None
    """What is said after the prompt, in place of a target."""

    @classmethod
    def of(
        cls,
        model: Model,
        index: int,
        prompt: Prompt,
        target: Any,
        foil: Any,
        answer: Any,
        prepend_bos: bool | None,
        perturbation: Perturbation,
    ) -> "Case":
        """Tokenise a prompt, and look up its target and its foil, or its answer.

        Raises:
            ValueError: for a prompt with fewer than two tokens to rank, or so few that the smallest fraction of them
                rounds to none (the largest, where no fractions were given); for a foil that is the target. Else as
                `models.tokenize` and `models.token` do.
            TypeError: as they do.
        """
        tokens = models.tokenize(model, prompt, prepend_bos)
        asked = (("target", target), ("foil", foil))
        ids = [None if one is None else models.token(model, one, what=what).id for what, one in asked]
        if ids[0] is not None and ids[0] == ids[1]:
            text = models.token(model, ids[0]).text
            raise ValueError(f"target and foil are the same token, {text!r}: their difference is zero.")
        free = candidates(model, tokens, perturbation.bos)
        _require_length(len(free), perturbation)
        said = None if answer is None else models.read_answer(model, answer, tokens)[0]
        return cls(index, tokens, free, ids[0], ids[1], said)

    def inner(self, model: Model) -> Int[Tensor, " _"]:
        """The tokens without a BOS token."""
        return self.tokens[candidates(model, self.tokens, bos=False)]

    @property
    def key(self) -> int:
        """A checksum that is another one for other tokens, another target and another foil."""
        said = () if self.answer is None else (self.answer.ids,)
        return zlib.crc32(repr((self.tokens.tolist(), (self.target, self.foil), *said)).encode())


def one_per_prompt(
    prompts: Iterable[Prompt],
    targets: Iterable[Any] | None,
    foils: Iterable[Any] | None,
    answers: Iterable[Any] | None = None,
) -> list[tuple[Prompt, Any, Any, Any]]:
    """Each prompt with its target, its foil and its answer.

    Raises:
        TypeError: for one prompt, a table or one target where there must be several.
        ValueError: for no prompts, and for targets, foils or answers that are not one per prompt; for answers together
            with targets or foils.
    """
    if isinstance(prompts, str | Tensor) or not isinstance(prompts, Iterable):
        raise TypeError(f"prompts are several, texts or lists of token ids, got {type(prompts).__name__}: give a list.")
    listed = list(models.each_prompt(prompts))
    if not listed:
        raise ValueError("there are no prompts to evaluate on: give one at least.")
    if answers is not None and (targets is not None or foils is not None):
        raise ValueError("give answers, or targets and foils: an answer is what is measured after its prompt.")
    columns = []
    for name, tokens in (("target", targets), ("foil", foils), ("answer", answers)):
        if isinstance(tokens, str | Mapping) or not isinstance(tokens, Iterable | None):
            raise TypeError(f"{name}s are one per prompt, got {tokens!r}: give a list, or a scope that has it.")
        column = [None] * len(listed) if tokens is None else list(tokens)
        if len(column) != len(listed):
            raise ValueError(f"there must be one {name} per prompt: got {len(column)} for {len(listed)} prompts.")
        columns.append(column)
    return list(zip(listed, *columns, strict=True))


def _require_length(tokens: int, perturbation: Perturbation) -> None:
    least = max(FRACTIONS) if perturbation.fractions is None else min(perturbation.fractions)
    if tokens < 2:
        raise ValueError(f"the prompt has {models.counted(tokens, 'token')} to rank: it takes at least two.")
    if count(least, tokens) < 1:
        larger = replace(perturbation, fractions=(max(0.2, round(0.5 / tokens, 2)), 0.5))
        raise ValueError(
            f"the prompt has {tokens} tokens to rank, and {100 * least:g}% of them is less than half a token: leave it "
            f"out, or give larger fractions, {larger} say."
        )
