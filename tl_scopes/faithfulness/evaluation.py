"""Does replacing the tokens that a scope names change the prediction? Scopes against baselines, over many prompts."""

import math
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex

import torch
from torch import Tensor
from tqdm.auto import tqdm

from tl_scopes import models
from tl_scopes.api import linearize, names
from tl_scopes.faithfulness.log import Log, Record
from tl_scopes.faithfulness.measures import (
    Removal,
    Value,
    count,
    drop_of_all,
    hard_measures,
    ranking,
    soft_measures,
    spearman,
)
from tl_scopes.faithfulness.perturbation import Protocol, Substitutes
from tl_scopes.faithfulness.settings import settings
from tl_scopes.jacobian.linearization import Linearization
from tl_scopes.jacobian.randomness import prompt_generator
from tl_scopes.models import Model, Prompt
from tl_scopes.results.attribution import Attribution
from tl_scopes.scopes.baselines import LeaveOneOut
from tl_scopes.scopes.scope import Scope

if TYPE_CHECKING:
    import pandas as pd


def evaluate(
    model: Model,
    prompts: Iterable[Prompt],
    scopes: Sequence[Scope] | Mapping[str, Scope],
    protocol: Protocol | None = None,
    *,
    targets: Sequence[str | SupportsIndex | None] | None = None,
    foils: Sequence[str | SupportsIndex | None] | None = None,
    prepend_bos: bool | None = None,
    path: str | Path | None = None,
    on_error: Literal["warn", "raise"] = "warn",
) -> "pd.DataFrame":
    """Measure the faithfulness of scopes at many prompts, each at its last position.

    For every prompt, scope and replacement: deletion and insertion curves and their areas, comprehensiveness and
    sufficiency (see `faithfulness.measures.hard_measures`), their soft forms (`soft_measures`), what replacing the
    scope's first token alone does and which rank that has among all tokens; and the rank correlation of the scores with
    those of the same model with shuffled weights: 1 for scores that owe nothing to what was learned. What is left over
    0 comes from the architecture and the position of the tokens.

    What is explained is what is measured: the log-probability of a token, the scope's own target or else the prompt's,
    which is fixed before anything is replaced; where the scope compares it with another (`versus`), or the prompt has a
    foil, also the log-odds of the two, a difference of logits; and for all scopes KL(p ‖ p') from the undisturbed
    prediction, for those that explain no target (Fisher, Temperature). A single logit, which the softmax does not know,
    is measured by the log-probability.

    Tokens rank by the score itself, the most positive first, which is what speaks for the target where scores have
    signs (`LeaveOneOut(of="log_prob")`); `Attribution.top` goes by the size.

    Args:
        model: a `HookedTransformer` or a `TransformerBridge`, in evaluation mode. It is left as found.
        prompts: texts, or lists of token ids.
        scopes: what to compare, with names of their own if given as a dict.
        protocol: what is replaced by what; None is `Protocol()`.
        targets: one per prompt, for scopes that have none of their own; None is the most likely next token.
        foils: one per prompt, or None: tokens to measure the log-odds against, for all scopes but those that have their
            own `versus`.
        prepend_bos: whether texts get a BOS token; None is TransformerLens' own default for the model.
        path: a file of JSON lines. Results are appended after each prompt, and those found there are not computed
            again: an interrupted evaluation goes on where it stopped, to the same numbers, unless a scope draws from a
            generator that it was given. Not for a model with hooks of yours: the file could not tell.
        on_error: "warn": a prompt that cannot be answered is reported with its number and left out, in the file too, so
            that a later run tries again, and the others go on; but when nothing could be answered so far, the error is
            raised, for it will be the fault of all. "raise": the first error ends it.

    Returns:
        One row per number: prompt, tokens (how many), target, scope, replacement, measure, quantity, fraction, value.
        `summary`, `differences` and `plot` of `tl_scopes.faithfulness` take it from there. The quantity is the unit:
        nats of "log_prob", "log_odds" or "kl", a "probability", a "rank". More is better of deletion and insertion, of
        comprehensiveness, both soft measures and leave-one-out of the first; less of sufficiency, of that rank, and of
        the correlation with shuffled weights. NaN stands where there is no
        number: the correlation with a shuffled model that overflows, say.

    Cost: per prompt one linearisation and the scopes, twice with `protocol.randomise`; per replacement two forward
        passes for each point of each scope's curves, one per token, and 2 · `samples` per scope, in batches. Once the
        embedding of the whole vocabulary for a "mean", and for `LeaveOneOut("mean")`. The shuffled weights take the
        memory of the model once more.

    Raises:
        ValueError: no prompts or no scopes, two scopes of one name; a prompt with fewer than two tokens to rank, or so
            few that the smallest fraction rounds to none; a file with results of other settings; hooks of yours with
            `path`; another `on_error`. Else as `linearize` and the scopes do, for the first prompt or with "raise".
        TypeError: for scopes that are none, and for prompts, targets or a protocol that are not what they should be.

    Source: Petsiuk et al. 2018 (arXiv:1806.07421), DeYoung et al. 2020 (arXiv:1911.03429), Zhao & Aletras 2023
        (arXiv:2305.10496); for shuffled weights, Adebayo et al. 2018 (arXiv:1810.03292).
    Departure: Adebayo et al. initialise weights anew; shuffling each parameter keeps its scale on any architecture.

    Example:
        >>> from tl_scopes.scopes.baselines import RandomBaseline
        >>> from tl_scopes.faithfulness import Protocol
        >>> prompts = ["The keys to the old cabinet near the door", "The wheel of the cars near the old bridge"]
        >>> protocol = Protocol(fractions=(0.1, 0.2))
        >>> results = tls.evaluate(model, prompts, [tls.SemanticScope(), RandomBaseline()], protocol)
        >>> areas = results[(results.measure == "deletion area") & (results.quantity == "kl")]
        >>> areas[["prompt", "scope", "target"]].values.tolist()
        [[0, 'SemanticScope()', ' are'], [0, 'RandomBaseline()', ' are'],
         [1, 'SemanticScope()', ' is'], [1, 'RandomBaseline()', ' is']]
    """
    protocol = Protocol() if protocol is None else protocol
    if not isinstance(protocol, Protocol):
        raise TypeError(f"protocol is a Protocol, such as Protocol(fractions=(0.2, 0.5)), got {protocol!r}.")
    models.check_model(model)
    named = names(scopes)
    tokens = _tokens(model, prompts, prepend_bos)
    if on_error not in ("warn", "raise"):
        raise ValueError(f'on_error is "warn" or "raise", got {on_error!r}.')
    asked = list(zip(_ids(model, "target", targets, len(tokens)), _ids(model, "foil", foils, len(tokens)), strict=True))
    inner = [ids[len(ids) - len(candidates(model, ids, bos=False)) :] for ids in tokens]
    _check_lengths([len(candidates(model, ids, protocol.bos)) for ids in tokens], protocol)
    Substitutes.check(model, protocol, inner)
    log = Log.open(path, {} if path is None else settings(model, named, protocol, tokens))
    keys = [zlib.crc32(repr((ids.tolist(), of_one)).encode()) for ids, of_one in zip(tokens, asked, strict=True)]
    left = [i for i, key in enumerate(keys) if not log.has(i, key)]
    evaluation = _Evaluation.of(model, named, protocol, inner) if left else None
    for i in tqdm(left, desc="prompts", delay=3, leave=False):
        assert evaluation is not None
        try:
            record = evaluation.record(i, keys[i], tokens[i], *asked[i])
        except (ValueError, TypeError, MemoryError) as error:
            error.add_note(f"prompt {i} of evaluate")
            if on_error == "raise" or not log.records:
                raise
            warnings.warn(f"prompt {i} has no answer: {error}", stacklevel=2)
        else:
            log.append(record)
    return log.to_dataframe(len(tokens))


@dataclass(frozen=True, eq=False)
class _Evaluation:
    """What all prompts share."""

    model: Model
    scopes: Mapping[str, Scope]
    protocol: Protocol
    substitutes: Substitutes
    shuffled: Sequence[Tensor] | None
    means: tuple[Tensor | None, Tensor | None]
    """The mean embedding of the model, and of the shuffled one, where a scope asks for it at every prompt."""

    @classmethod
    def of(cls, model: Model, scopes: Mapping[str, Scope], protocol: Protocol, inner: list[Tensor]) -> "_Evaluation":
        random = torch.Generator().manual_seed(protocol.seed)
        shuffled = models.shuffled_weights(model, random) if protocol.randomise else None
        substitutes = Substitutes.of(model, protocol, inner)
        own: Tensor | None = None
        other: Tensor | None = None
        if any(map(_asks_for_mean, scopes.values())):
            length = max(map(len, inner))
            with models.exchanged_weights(model, shuffled) if shuffled else nullcontext():
                other = models.mean_embedding(model, length) if shuffled else None
            own = models.mean_embedding(model, length) if substitutes.mean is None else substitutes.mean
        return cls(model, scopes, protocol, substitutes, shuffled, (own, other))

    def record(self, index: int, key: int, tokens: Tensor, asked: int | None, foil: int | None) -> Record:
        """All that is measured at one prompt."""
        lin = linearize(self.model, tokens)
        target = lin.token(asked)
        aimed = {name: scope.aimed(lin, target.id) for name, scope in self.scopes.items()}
        answers = {name: _with_mean(scope, self.means[0])(lin) for name, scope in aimed.items()}
        shown = {name: answer.target or target for name, answer in answers.items()}
        ids = {name: token.id for name, token in shown.items()}
        foils = {name: answer.versus.id if answer.versus else foil for name, answer in answers.items()}
        free = candidates(self.model, tokens, self.protocol.bos)
        orders = {
            name: ranking(answer.scores, free, prompt_generator(lin, "ties", self.protocol.seed))
            for name, answer in answers.items()
        }
        found: list[tuple[str, str, list[Value]]] = []
        for replacement in self.protocol.replacements:
            drawn = prompt_generator(lin, replacement, self.protocol.seed)
            removal = Removal(lin, self.substitutes(lin, replacement, index, drawn), free)
            hard = hard_measures(removal, orders, ids, self.protocol, foils)
            for name, answer in answers.items():
                masks = prompt_generator(lin, "masks", self.protocol.seed)
                samples = self.protocol.samples
                found.append((name, replacement, hard[name]))
                if samples:
                    drop = drop_of_all(hard[name])
                    hard[name] += soft_measures(removal, answer.scores, ids[name], drop, samples, masks)
        for name, correlation in self._sanity(lin, aimed, answers, free).items():
            found.append((name, "", [Value("shuffled weights", "rank correlation", None, correlation)]))
        return {
            "prompt": index,
            "key": key,
            "tokens": len(tokens),
            "results": [
                {"scope": name, "target": shown[name].text, "replacement": replacement, "values": values}
                for name, replacement, values in found
            ],
        }

    def _sanity(
        self, lin: Linearization, scopes: Mapping[str, Scope], answers: Mapping[str, Attribution], free: list[int]
    ) -> dict[str, float]:
        """Rank correlation with the scores of the shuffled model."""
        if self.shuffled is None:
            return {}
        found = dict.fromkeys(answers, math.nan)
        # What was answered with the learned weights fails with others where numbers overflow.
        with models.exchanged_weights(self.model, self.shuffled), suppress(ValueError):
            other = linearize(self.model, lin.tokens)
            for name, scope in scopes.items():
                with suppress(ValueError):
                    scores = _with_mean(scope, self.means[1])(other).scores
                    found[name] = spearman(answers[name].scores[free], scores[free])
        return found


def _asks_for_mean(scope: Scope) -> bool:
    return isinstance(scope, LeaveOneOut) and scope.replacement == "mean" and scope.mean is None


def _with_mean(scope: Scope, mean: Tensor | None) -> Scope:
    """The mean embedding handed in, so that it is not computed for each prompt."""
    return replace(scope, mean=mean) if isinstance(scope, LeaveOneOut) and _asks_for_mean(scope) else scope


def candidates(model: Model, tokens: Tensor, bos: bool) -> list[int]:
    """The positions that are ranked and replaced."""
    return list(range(int(not bos and models.starts_with_bos(model, tokens)), len(tokens)))


def _tokens(model: Model, prompts: Iterable[Prompt], prepend_bos: bool | None) -> list[Tensor]:
    if isinstance(prompts, str | Tensor) or not isinstance(prompts, Iterable):
        raise TypeError(f"prompts are several, texts or lists of token ids, got {type(prompts).__name__}: give a list.")
    found = [_numbered(i, lambda prompt: models.tokenize(model, prompt, prepend_bos), p) for i, p in enumerate(prompts)]
    if not found:
        raise ValueError("there are no prompts to evaluate on: give one at least.")
    return found


def _ids(model: Model, name: str, tokens: Sequence[Any] | None, prompts: int) -> list[int | None]:
    """Of the targets, or the foils: the same token has several spellings."""
    if tokens is None:
        return [None] * prompts
    if isinstance(tokens, str):
        raise TypeError(f"{name}s are one per prompt, got the text {tokens!r}: give a list, or a scope that has it.")
    if len(tokens) != prompts:
        raise ValueError(f"there must be one {name} per prompt: got {len(tokens)} for {prompts} prompts.")

    def id_of(token: Any) -> int | None:
        return None if token is None else models.token(model, token, model.cfg.d_vocab).id

    return [_numbered(i, id_of, token) for i, token in enumerate(tokens)]


def _numbered(index: int, function: Callable[[Any], Any], value: Any) -> Any:
    """Say which prompt an error is about."""
    try:
        return function(value)
    except (ValueError, TypeError) as error:
        raise (TypeError if isinstance(error, TypeError) else ValueError)(f"prompt {index}: {error}") from error


def _check_lengths(tokens: Sequence[int], protocol: Protocol) -> None:
    least = min(protocol.fractions)
    short = [i for i, n in enumerate(tokens) if n < 2 or count(least, n) < 1]
    if not short:
        return
    index, n = short[0], tokens[short[0]]
    others = f" ({len(short) - 1} more are as short)" if len(short) > 1 else ""
    if n < 2:
        raise ValueError(f"prompt {index} has {n} token{'s' * (n != 1)} to rank{others}: it takes two at least.")
    larger = replace(protocol, fractions=(max(0.2, round(0.5 / n, 2)), 0.5))
    raise ValueError(
        f"prompt {index} has {n} tokens to rank{others}, and {least:.0%} of them is less than half a token: leave it "
        f"out, or give larger fractions, {larger} say."
    )
