"""Do scopes find causes that are known?

The causes are known by construction, and each example is checked here: do they decide the model's answer too?
"""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_scopes import models
from tl_scopes.api import attribute, linearize
from tl_scopes.faithfulness.english import KINDS, english
from tl_scopes.faithfulness.examples import Confirmation, KnownCause, confirm, log_probs_of, positions
from tl_scopes.faithfulness.measures import candidates, ranking
from tl_scopes.jacobian.linearization import Linearization
from tl_scopes.jacobian.randomness import prompt_generator
from tl_scopes.models import Model
from tl_scopes.models.arguments import as_flag
from tl_scopes.progress import progress_bar
from tl_scopes.scopes.baselines import (
    AttentionRollout,
    GradientTimesInput,
    IntegratedGradients,
    LeaveOneOut,
    RandomBaseline,
)
from tl_scopes.scopes.corrections import Around, FrozenAttentionScope, PositionCorrectedScope, UnderRulesScope
from tl_scopes.scopes.fingerprint import names
from tl_scopes.scopes.fisher import FisherScope
from tl_scopes.scopes.heta import HetaScope
from tl_scopes.scopes.path_integrated import PathIntegratedScope
from tl_scopes.scopes.relevance import RelevanceScope
from tl_scopes.scopes.scope import Scope
from tl_scopes.scopes.semantic import SemanticScope
from tl_scopes.scopes.spectral import SpectralScope
from tl_scopes.scopes.target import TargetScope
from tl_scopes.scopes.temperature import TemperatureScope
from tl_scopes.scopes.written import as_written
from tl_scopes.tiny import load_tiny
from tl_scopes.tiny.counterfactuals import TASKS, counterfactuals
from tl_scopes.tiny.example import Example
from tl_scopes.tiny.tasks import examples as held_out

if TYPE_CHECKING:
    import pandas as pd

Known: TypeAlias = Example | KnownCause
"""What has a prompt, a `target`, a `foil` and `causes`, which are ranges of its characters."""

Asker: TypeAlias = Scope | Callable[[Known], Scope]
"""A scope, or a function that makes one for an example."""

RANK_MEASURES = ("precision at 1", "precision at n", "average precision", "reciprocal rank")
"""The measures that depend on the order alone."""

MEASURES = (*RANK_MEASURES, "evidence less distractor")

BUNDLED = "tiny"
"""What the bundled model is called."""


def all_scopes() -> dict[str, Asker]:
    """All scopes, baselines and corrections, by name.

    Those that explain a token are there twice: about the answer, and about the answer against the foil.
    """
    kinds = (SemanticScope, PathIntegratedScope, GradientTimesInput, IntegratedGradients)
    asked: dict[type[Scope], Asker] = {kind: partial(_against_foil, kind) for kind in kinds}
    listed: list[Scope] = [
        SemanticScope(), SemanticScope(quantity="log_prob"), PathIntegratedScope(), TemperatureScope(), FisherScope(),
        SpectralScope(), HetaScope(), GradientTimesInput(), IntegratedGradients(), AttentionRollout(), LeaveOneOut(),
        LeaveOneOut("mean"), RandomBaseline(),
    ]  # fmt: skip
    named: dict[str, Asker] = {}
    for scope in listed:
        if type(scope) in asked:
            named[f"{type(scope).__name__}(versus=foil)"] = asked.pop(type(scope))
        named[as_written(scope)] = scope
    wrapped: list[tuple[type[Around], type[TargetScope]]] = [
        (PositionCorrectedScope, SemanticScope), (FrozenAttentionScope, SemanticScope),
        (UnderRulesScope, SemanticScope), (UnderRulesScope, RelevanceScope),
    ]  # fmt: skip
    for around, kind in wrapped:
        named[f"{around.__name__}({kind.__name__}(versus=foil))"] = partial(_around, around, kind)
    return named


def _against_foil(kind: type[TargetScope], example: Known) -> Scope:
    return kind(example.target, versus=example.foil)


def _around(around: type[Around], kind: type[TargetScope], example: Known) -> Scope:
    return around(_against_foil(kind, example))


def known_causes(
    model: Model | None = None,
    tasks: Iterable[str] | None = None,
    count: int = 100,
    scopes: Sequence[Scope] | Mapping[str, Asker] | None = None,
    *,
    examples: Iterable[KnownCause] | None = None,
    share: float = 0.5,
    seed: int = 0,
    bos: bool = False,
) -> "pd.DataFrame":
    """Measure how high scopes and baselines rank the tokens that are known to cause the answer.

    Only confirmed examples count. Of your own examples, and of the English ones of the package (`english.KINDS`), these
    are the ones where the model prefers the answer to the foil, by a lead of which at least `share` is gone when any
    one of the causes is replaced (`faithfulness.confirm`). Of the bundled model's tasks (`tiny.counterfactuals.TASKS`)
    more is known: there the model gives the right answer; it gives the answer that is then right when any one of the
    causes is replaced; and it stays with its answer when any other word is replaced that has an alternative of its
    kind.

    Tokens are ranked by score, the most positive first, unlike `Attribution.top`, which goes by the size; BOS is set
    aside unless `bos` is set. Let r_1 < … < r_n be the ranks of the n causes:

        precision at k            share of causes among the k first, for k = 1 and k = n
        average precision         (1/n) Σ_i i/r_i
        reciprocal rank           1/r_1
        evidence less distractor  share of the causes in the sum of |scores|, less that of a distractor of equal length

    The distractor is the example's own, or else all ranked tokens that are not causes; its mean share per token is
    taken as often as there are causes. This measure depends on the scores themselves: a square (Fisher) and its root
    come out differently.

    A token that is not a cause may be needed all the same, to know that this is a question and of what kind. A scope
    that ranks it first is right about the model, and wrong about what decides between the answers.

    Args:
        model: None is the bundled model.
        tasks: which prompts: some of the bundled model's tasks, which only that model knows, or of the kinds of English
            prompts; None is all tasks for the bundled model, and all kinds for any other.
        count: how many examples to draw per task, none of which the bundled model was trained on; of a kind of English
            prompts as many as there are.
        scopes: the scopes to compare, with names of their own if given as a dict; there a function from the example
            (its `target` and its `foil`) to a scope will do too. Scopes without a target are about the right answer,
            of several tokens as a whole, or about its first token where they take one prediction at a time. None is all
            scopes and baselines.
        examples: your own examples, in place of tasks.
        share: the share of the lead that each cause must be good for; not of the bundled model's tasks.
        seed: the seed of the examples.
        bos: whether the BOS token is ranked as well; it is never a cause.

    Returns:
        One row per task or kind, confirmed example, scope and measure: task, examples (how many were drawn), prompt,
        scope, measure, value. `faithfulness.summary` and `faithfulness.differences` take it from there. How many were
        confirmed is the number of prompts; a warning names the kinds of which none was.

    Unit: shares from 0 to 1, the last measure from −1 to 1; more is better.

    Cost: per example a forward pass for each of its words, or for the prompt and each of its causes; one linearisation,
        and the scopes. All scopes on 600 examples of the bundled model take some twenty minutes of a CPU core.

    Raises:
        ValueError: for no tasks, an unknown task, or one given twice; for tasks together with examples, and for no
            examples; for a count below 1; for a task of the bundled model of which no example was confirmed, and where
            none is confirmed at all, with what the model said; for a model whose tokens are not those of its tokenizer.
            Of your own examples as `faithfulness.confirm` does. Else as `linearize` and the scopes do.
        TypeError: for something that is not a scope, for tasks that are one text, for a count or a seed that is not an
            integer, for examples that are not `KnownCause`, and for `bos` that is neither True nor False.

    Source: average precision and reciprocal rank, Manning et al. 2008, Introduction to Information Retrieval, ch. 8;
        evidence less distractor, Pramanik et al. 2026, HETA (arXiv:2604.13258), whose texts are a passage that is asked
        about and one that is not.

    Example:
        >>> results = tls.known_causes(model, ["agreement"], 5, [tls.SemanticScope()])
        >>> set(results.measure) == set(MEASURES), results.prompt.nunique()
        (True, 5)
        >>> from tl_scopes.faithfulness import KnownCause
        >>> own = KnownCause.marked("The [keys|key] to the old cabinet near the {door}", " are", " is")
        >>> results = tls.known_causes(model, examples=[own], scopes=[tls.SemanticScope()])
        >>> results[results.measure == "reciprocal rank"].value.tolist()
        [1.0]
    """
    import pandas as pd

    model = load_tiny() if model is None else model
    models.check_model(model)
    askers = _askers(all_scopes() if scopes is None else scopes)
    bos = as_flag(bos, "bos")
    rows = []
    drawn = _confirmed(model, tasks, count, examples, share, seed)
    total = sum(len(found) for _, found in drawn.values())
    with progress_bar(total, "examples") as bar:
        for task, (number, found) in drawn.items():
            for i, example in found:
                for name, values in _of_one(model, example, askers, bos).items():
                    rows += [(task, number, i, name, measure, value) for measure, value in values.items()]
                bar.update()
    return pd.DataFrame(rows, columns=["task", "examples", "prompt", "scope", "measure", "value"])


Drawn: TypeAlias = dict[str, tuple[int, list[tuple[int, Known]]]]
"""By task: how many examples were drawn, and those that are confirmed, with their numbers."""


def _confirmed(
    model: Model,
    tasks: Iterable[str] | None,
    count: int,
    own: Iterable[KnownCause] | None,
    share: float,
    seed: int,
) -> Drawn:
    """The confirmed examples.

    Raises:
        ValueError: where there are none.
    """
    count, seed = models.as_count(count, "count must be at least 1"), models.as_int(seed, "seed must be an integer")
    if own is not None and tasks is not None:
        raise ValueError("give tasks, or examples of your own, which are grouped by their kind.")
    if own is not None:
        listed = list(own)
        if not listed:
            raise ValueError("there are no examples: give one KnownCause at least.")
        return _by_kind(confirm(model, listed, share=share))
    if tasks is None:
        tasks = TASKS if models.model_name(model) == BUNDLED else KINDS
    tasks = _checked(tasks)
    drawn = [example for kind in tasks if kind in KINDS for example in _drawn(english(kind), count, seed)]
    found = _by_kind(confirm(model, drawn, share=share, strict=False)) if drawn else {}
    for task in tasks:
        if task in TASKS:
            tried = enumerate(held_out(task, count, seed=seed))
            found[task] = count, [(i, example) for i, example in tried if is_confirmed(model, example)]
            if not found[task][1]:
                raise ValueError(
                    f"none of {count} examples of {task!r} was confirmed: the model does not know this task; leave it "
                    "out."
                )
    return {task: found[task] for task in tasks if task in found}


def _drawn(examples: list[KnownCause], count: int, seed: int) -> list[KnownCause]:
    """Some of the examples, in their order."""
    chosen = random.Random(seed).sample(range(len(examples)), min(count, len(examples)))
    return [examples[i] for i in sorted(chosen)]


def _by_kind(confirmations: Sequence[Confirmation]) -> Drawn:
    found: Drawn = {}
    for one in confirmations:
        number, kept = found.get(one.example.kind, (0, []))
        found[one.example.kind] = number + 1, [*kept, *([(number, one.example)] if one.is_confirmed else [])]
    none = {kind: number for kind, (number, kept) in found.items() if not kept}
    if len(none) == len(found):
        lines = [f"{one.example!r}: {one.why_not}" for one in confirmations]
        more = [f"and {len(lines) - 10} more"] if len(lines) > 10 else []
        raise ValueError(
            f"none of {len(lines)} examples was confirmed, so that nothing is known of what decides this model's "
            "answers: give examples that it can do.\n" + "\n".join([*lines[:10], *more])
        )
    if none:
        listed = ", ".join(f"{number} of {kind!r}" for kind, number in none.items())
        models.warn(f"none was confirmed of {listed}, which are left out: the model does not do them.")
    return {kind: drawn for kind, drawn in found.items() if kind not in none}


def is_confirmed(model: Model, example: Example) -> bool:
    """Whether the known causes, and nothing else, turn the model's prediction.

    Raises:
        ValueError: for a task that has no counterfactuals.
    """
    others = counterfactuals(example)
    prompts = [models.tokenize(model, text) for text in (example.prompt, *(other.prompt for other in others))]
    texts = [example.target, *(other.answer for other in others)]
    try:
        answers = [models.token(model, text).id for text in texts]
    except ValueError:  # to this tokenizer an answer is several tokens
        return False
    said, _ = log_probs_of(model, [(tokens, [answer]) for tokens, answer in zip(prompts, answers, strict=True)])
    return said.tolist() == answers


def _checked(tasks: Iterable[str]) -> tuple[str, ...]:
    if isinstance(tasks, str):
        raise TypeError(f"tasks are several, got the text {tasks!r}: write [{tasks!r}].")
    tasks, known = tuple(tasks), f"{', '.join(TASKS)}; in English {', '.join(KINDS)}"
    if not tasks:
        raise ValueError(f"there are no tasks: choose from {known}.")
    for task in tasks:
        if task not in (*TASKS, *KINDS):
            raise ValueError(f"the causes of the task {task!r} cannot be confirmed: choose from {known}.")
        if tasks.count(task) > 1:
            raise ValueError(f"each task is given once, got {task!r} {tasks.count(task)} times.")
    return tasks


def _of_one(model: Model, example: Known, askers: Mapping[str, Asker], bos: bool) -> dict[str, dict[str, float]]:
    lin = linearize(model, example.prompt)
    causes = cause_positions(lin, example)
    free = candidates(model, lin.tokens, bos)
    distractor = [i for i in free if i not in causes]
    if isinstance(example, KnownCause) and example.distractor is not None:
        distractor = positions(lin.str_tokens, example.prompt, [example.distractor])
    found = {}
    for name, asker in askers.items():
        scores = _scores(lin, example, asker)
        order = ranking(scores, free, prompt_generator(lin, "ties"))
        shares = scores.double() / scores[free].double().abs().sum()
        evidence = len(causes) * float(shares[causes].mean() - (shares[distractor].mean() if distractor else 0))
        found[name] = retrieval(order, causes) | {"evidence less distractor": evidence}
    return found


def _scores(lin: Linearization, example: Known, asker: Asker) -> Float[Tensor, "token"]:
    """What a scope says about the answer, from this linearisation where the answer is one token.

    A scope that takes one prediction at a time is asked about the first token of a longer answer.
    """
    scope = asker if isinstance(asker, Scope) else asker(example)
    said = [models.read_target(lin.model, text) for text in (example.target, example.foil) if text is not None]
    if all(len(one) == 1 for one in said) or not scope.takes_spans:
        return (scope.with_target(lin, said[0].ids[0]) if isinstance(asker, Scope) else scope)(lin).scores
    named = scope.named_targets(lin.model)[0] is not None
    return attribute(lin.model, lin.tokens, scope, answer=None if named else example.target).scores[: len(lin.tokens)]


def cause_positions(lin: Linearization, example: Known) -> list[int]:
    """Where the causes stand among the tokens of a prompt.

    Raises:
        ValueError: when the tokenizer splits the prompt in another way than the model does.
    """
    return positions(lin.str_tokens, example.prompt, example.causes)


def retrieval(order: Int[Tensor, " rank"], causes: Sequence[int]) -> dict[str, float]:
    """The measures of `known_causes` that depend on the order of the tokens alone.

    Args:
        order: the positions, best first.
        causes: those of them that are causes.
    """
    hits = torch.isin(order, torch.tensor(causes)).double()
    ranks = hits.nonzero()[:, 0] + 1
    n = len(ranks)
    precision: Float[Tensor, " cause"] = torch.arange(1, n + 1) / ranks
    values = (hits[0], hits[:n].mean(), precision.mean(), 1 / ranks[0])
    return {measure: float(value) for measure, value in zip(RANK_MEASURES, values, strict=True)}


def _askers(scopes: Sequence[Scope] | Mapping[str, Asker]) -> dict[str, Asker]:
    if not isinstance(scopes, Mapping):
        return dict(names(scopes))
    ready = {name: asker for name, asker in scopes.items() if isinstance(asker, Scope | type) or not callable(asker)}
    if ready or not scopes:
        names(ready)  # type: ignore[arg-type]
    return dict(scopes)
