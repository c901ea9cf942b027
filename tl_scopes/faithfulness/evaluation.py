"""Does replacing the tokens that a scope names change the prediction? Scopes against baselines, over many prompts."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex

import torch
from torch import Tensor
from tqdm.auto import tqdm

from tl_scopes import models
from tl_scopes.api import linearize, names
from tl_scopes.attribution import Attribution
from tl_scopes.faithfulness.log import Log, Record
from tl_scopes.faithfulness.measures import Removal, Value, count, hard_measures, ranking, soft_measures, spearman
from tl_scopes.faithfulness.protocol import Protocol, Substitutes
from tl_scopes.linearization import Linearization
from tl_scopes.models import Model, Prompt
from tl_scopes.question import Scope, as_written
from tl_scopes.randomness import prompt_generator

if TYPE_CHECKING:
    import pandas as pd


def evaluate(
    model: Model,
    prompts: Sequence[Prompt],
    scopes: Sequence[Scope] | Mapping[str, Scope],
    protocol: Protocol | None = None,
    *,
    targets: Sequence[str | SupportsIndex | None] | None = None,
    prepend_bos: bool | None = None,
    path: str | Path | None = None,
) -> "pd.DataFrame":
    """Measure the faithfulness of scopes at many prompts, each at its last position.

    For every prompt, scope and replacement: deletion and insertion curves and their areas, comprehensiveness and
    sufficiency (see `faithfulness.measures.hard_measures`), their soft forms (`soft_measures`), what replacing the
    scope's first token alone does and which rank that has among all tokens; and the rank correlation of the scores with
    those of the same model with shuffled weights: 1 for scores that owe nothing to what was learned. What is left over
    0 comes from the architecture and the position of the tokens.

    What is explained is what is measured: the log-probability of the scope's own target, or of the prompt's target,
    which is fixed before anything is replaced. Scopes that explain no target (Fisher, Temperature) are measured by it
    all the same; for them look at the quantity "kl", KL(p ‖ p') from the undisturbed prediction, which is measured for
    all.

    Args:
        model: a `HookedTransformer` or a `TransformerBridge`, in evaluation mode. It is left as found.
        prompts: texts, or lists of token ids.
        scopes: what to compare, with names of their own if given as a dict.
        protocol: what is replaced by what; None is `Protocol()`.
        targets: one per prompt, for scopes that have none of their own; None is the most likely next token.
        prepend_bos: whether texts get a BOS token; None is TransformerLens' own default for the model.
        path: a file of JSON lines. Results are appended after each prompt, and those found there are not computed
            again: an interrupted evaluation goes on where it stopped, to the same numbers, unless a scope draws from a
            generator that it was given.

    Returns:
        One row per number: prompt, tokens (how many), target, scope, replacement, measure, quantity, fraction, value.
        `summary`, `differences` and `plot` of `tl_scopes.faithfulness` take it from there.

    Cost: per prompt one linearisation and the scopes, twice with `protocol.randomise`; per replacement two forward
        passes for each point of each scope's curves, one per token, and 2 · `samples` per scope, in batches. The
        shuffled weights take the memory of the model once more.

    Raises:
        ValueError: no prompts or no scopes, two scopes of one name; a prompt with fewer than two tokens to rank, or so
            few that the smallest fraction rounds to none; a file with results of other settings. Else as `linearize`
            and the scopes do.
        TypeError: for scopes that are none.

    Source: Petsiuk et al. 2018 (arXiv:1806.07421), DeYoung et al. 2020 (arXiv:1911.03429), Zhao & Aletras 2023
        (arXiv:2305.10496); for shuffled weights, Adebayo et al. 2018 (arXiv:1810.03292).
    Departure: Adebayo et al. initialise weights anew; shuffling each parameter keeps its scale on any architecture.

    Example:
        >>> from tl_scopes.baselines import RandomBaseline
        >>> from tl_scopes.faithfulness import Protocol
        >>> prompts = ["The keys to the old cabinet near the door", "The wheel of the cars near the old bridge"]
        >>> protocol = Protocol(fractions=(0.1, 0.2))
        >>> results = tls.evaluate(model, prompts, [tls.SemanticScope(), RandomBaseline()], protocol)
        >>> areas = results[(results.measure == "deletion area") & (results.quantity == "kl")]
        >>> areas[["prompt", "scope", "target"]].values.tolist()
        [[0, 'SemanticScope()', ' are'], [0, 'RandomBaseline()', ' are'],
         [1, 'SemanticScope()', ' is'], [1, 'RandomBaseline()', ' is']]
    """
    protocol = protocol or Protocol()
    models.check_model(model)
    named = names(scopes)
    tokens = _tokens(model, prompts, prepend_bos)
    if targets is not None and len(targets) != len(tokens):
        raise ValueError(f"there must be one target per prompt: got {len(targets)} for {len(tokens)} prompts.")
    inner = [ids[len(ids) - len(candidates(model, ids, bos=False)) :] for ids in tokens]
    for i, ids in enumerate(tokens):
        _check_length(i, len(candidates(model, ids, protocol.bos)), protocol)
    log = Log.open(path, _settings(model, named, protocol, tokens))
    asked = [None if targets is None else targets[i] for i in range(len(tokens))]
    keys = [zlib.crc32(repr((ids.tolist(), target)).encode()) for ids, target in zip(tokens, asked, strict=True)]
    evaluation: _Evaluation | None = None
    for i, ids in enumerate(tqdm(tokens, desc="prompts", delay=3, leave=False)):
        if not log.has(i, keys[i]):
            if evaluation is None:
                evaluation = _Evaluation.of(model, named, protocol, inner)
            log.append(evaluation.record(i, keys[i], ids, asked[i]))
    return log.to_dataframe(len(tokens))


@dataclass(frozen=True, eq=False)
class _Evaluation:
    """What all prompts share."""

    model: Model
    scopes: Mapping[str, Scope]
    protocol: Protocol
    substitutes: Substitutes
    shuffled: Sequence[Tensor] | None

    @classmethod
    def of(cls, model: Model, scopes: Mapping[str, Scope], protocol: Protocol, inner: list[Tensor]) -> "_Evaluation":
        random = torch.Generator().manual_seed(protocol.seed)
        shuffled = models.shuffled_weights(model, random) if protocol.randomise else None
        return cls(model, scopes, protocol, Substitutes.of(model, protocol, inner), shuffled)

    def record(self, index: int, key: int, tokens: Tensor, asked: str | SupportsIndex | None) -> Record:
        """All that is measured at one prompt."""
        lin = linearize(self.model, tokens)
        target = lin.token(asked)
        aimed = {name: scope.aimed(lin, target.id) for name, scope in self.scopes.items()}
        answers = {name: scope(lin) for name, scope in aimed.items()}
        shown = {name: answer.target or target for name, answer in answers.items()}
        ids = {name: token.id for name, token in shown.items()}
        free = candidates(self.model, tokens, self.protocol.bos)
        orders = {
            name: ranking(answer.scores, free, prompt_generator(lin, "ties", self.protocol.seed))
            for name, answer in answers.items()
        }
        found: list[tuple[str, str, list[Value]]] = []
        for replacement in self.protocol.replacements:
            drawn = prompt_generator(lin, replacement, self.protocol.seed)
            removal = Removal(lin, self.substitutes(lin, replacement, index, drawn), free)
            hard = hard_measures(removal, orders, ids, self.protocol)
            for name, answer in answers.items():
                masks = prompt_generator(lin, "masks", self.protocol.seed)
                samples = self.protocol.samples
                soft = soft_measures(removal, answer.scores, ids[name], samples, masks) if samples else []
                found.append((name, replacement, [*hard[name], *soft]))
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
        with models.exchanged_weights(self.model, self.shuffled):
            other = linearize(self.model, lin.tokens)
            scores = {name: scope(other).scores for name, scope in scopes.items()}
        return {name: spearman(answers[name].scores[free], scores[name][free]) for name in answers}


def candidates(model: Model, tokens: Tensor, bos: bool) -> list[int]:
    """The positions that are ranked and replaced."""
    return list(range(int(not bos and models.starts_with_bos(model, tokens)), len(tokens)))


def _tokens(model: Model, prompts: Sequence[Prompt], prepend_bos: bool | None) -> list[Tensor]:
    if isinstance(prompts, str | Tensor) or not isinstance(prompts, Sequence):
        raise TypeError(f"prompts are a list, of texts or of lists of token ids, got {type(prompts).__name__}.")
    if not prompts:
        raise ValueError("there are no prompts to evaluate on: give one at least.")
    return [models.tokenize(model, prompt, prepend_bos) for prompt in prompts]


def _check_length(index: int, tokens: int, protocol: Protocol) -> None:
    if tokens < 2:
        raise ValueError(f"prompt {index} has {tokens} token{'s' * (tokens != 1)} to rank: it takes two at least.")
    least = min(protocol.fractions)
    if count(least, tokens) < 1:
        raise ValueError(
            f"prompt {index} has {tokens} tokens to rank, and {least:.0%} of them is less than half a token: leave it "
            f"out, or give larger fractions, Protocol(fractions=({max(0.2, 0.5 / tokens):.2g}, 0.5)) say."
        )


def _settings(
    model: Model, scopes: Mapping[str, Scope], protocol: Protocol, tokens: Sequence[Tensor]
) -> dict[str, Any]:
    settings = {
        "model": models.model_name(model),
        "weights": models.fingerprint(model),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "scopes": {name: as_written(scope) for name, scope in scopes.items()},
    } | asdict(protocol)
    if "resample" in protocol.replacements:
        settings["prompts to resample from"] = zlib.crc32(repr([ids.tolist() for ids in tokens]).encode())
    return settings
