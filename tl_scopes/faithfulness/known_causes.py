"""Do scopes find causes that are known?

In the bundled model's tasks the cause of each answer is known by construction, and each example is checked here: does
that cause decide the model's answer too?
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_scopes import models
from tl_scopes.api import linearize
from tl_scopes.faithfulness.fingerprint import names
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
from tl_scopes.scopes.corrections import FrozenAttentionScope, PositionCorrectedScope
from tl_scopes.scopes.fisher import FisherScope
from tl_scopes.scopes.heta import HetaScope
from tl_scopes.scopes.path_integrated import PathIntegratedScope
from tl_scopes.scopes.scope import Scope, TargetScope, as_written
from tl_scopes.scopes.semantic import SemanticScope
from tl_scopes.scopes.spectral import SpectralScope
from tl_scopes.scopes.temperature import TemperatureScope
from tl_scopes.tiny import load_tiny
from tl_scopes.tiny.counterfactuals import TASKS, counterfactuals
from tl_scopes.tiny.example import Example
from tl_scopes.tiny.tasks import examples

if TYPE_CHECKING:
    import pandas as pd

Asker: TypeAlias = Scope | Callable[[Example], Scope]
"""A scope, or a function that makes one for an example."""

MEASURES = ("precision at 1", "precision at n", "average precision", "reciprocal rank")


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
    for around in (PositionCorrectedScope, FrozenAttentionScope):
        named[f"{around.__name__}(SemanticScope(versus=foil))"] = partial(_around_semantic, around)
    return named


def _against_foil(kind: type[TargetScope], example: Example) -> Scope:
    return kind(example.target, versus=example.foil)


def _around_semantic(kind: Callable[[Scope], Scope], example: Example) -> Scope:
    return kind(_against_foil(SemanticScope, example))


def known_causes(
    model: Model | None = None,
    tasks: Iterable[str] = TASKS,
    count: int = 100,
    scopes: Sequence[Scope] | Mapping[str, Asker] | None = None,
    *,
    seed: int = 0,
    bos: bool = False,
) -> "pd.DataFrame":
    """Measure how high scopes and baselines rank the tokens that are known to cause the answer.

    Only confirmed examples count. There the model gives the right answer; it gives the answer that is then right when
    any one of the causes is replaced; and it stays with its answer when any other word is replaced that has an
    alternative of its kind (`tiny.counterfactuals`). Tokens are ranked by score, the most positive first, unlike
    `Attribution.top`, which goes by the size; BOS is set aside unless `bos` is set. Let r_1 < … < r_n be the ranks of
    the n causes:

        precision at k      share of causes among the k first, for k = 1 and k = n
        average precision   (1/n) Σ_i i/r_i
        reciprocal rank     1/r_1

    A token that is not a cause may be needed all the same, to know that this is a question and of what kind. A scope
    that ranks it first is right about the model, and wrong about what decides between the answers.

    Args:
        model: None is the bundled model.
        tasks: some of `tiny.counterfactuals.TASKS`.
        count: the number of examples to draw per task, none of which the bundled model was trained on.
        scopes: the scopes to compare, with names of their own if given as a dict; there a function from the `Example`
            to a scope will do too. Scopes without a target are about the right answer. None is all scopes and
            baselines.
        seed: the seed of the examples.
        bos: whether the BOS token is ranked as well; it is never a cause.

    Returns:
        One row per task, confirmed example, scope and measure: task, examples (how many were drawn), prompt, scope,
        measure, value. `faithfulness.summary` and `faithfulness.differences` take it from there.

    Unit: all measures are shares, from 0 to 1; more is better.

    Cost: per example a forward pass for each of its words, one linearisation, and the scopes. All scopes on 600
        examples of the bundled model take some twenty minutes of a CPU core.

    Raises:
        ValueError: for no tasks, an unknown task, or one given twice; for a count below 1; for a task of which no
            example was confirmed; for a model whose tokens are not those of its tokenizer. Else as `linearize` and the
            scopes do.
        TypeError: for something that is not a scope, for tasks that are one text, for a seed that is not an integer,
            and for `bos` that is neither True nor False.

    Source: average precision and reciprocal rank, Manning et al. 2008, Introduction to Information Retrieval, ch. 8.

    Example:
        >>> results = tls.known_causes(model, ["agreement"], 5, [tls.SemanticScope()])
        >>> set(results.measure) == set(MEASURES), results.prompt.nunique()
        (True, 5)
    """
    import pandas as pd

    model = load_tiny() if model is None else model
    models.check_model(model)
    askers = _askers(all_scopes() if scopes is None else scopes)
    tasks, bos = _checked(tasks), as_flag(bos, "bos")
    rows = []
    drawn = [(task, i, example) for task in tasks for i, example in enumerate(examples(task, count, seed=seed))]
    with progress_bar(len(drawn), "examples") as bar:
        for task, i, example in drawn:
            if is_confirmed(model, example):
                lin = linearize(model, example.prompt)
                for name, values in _of_one(lin, example, askers, bos).items():
                    rows += [(task, count, i, name, measure, value) for measure, value in values.items()]
            bar.update()
    for task in tasks:
        if all(task != row[0] for row in rows):
            raise ValueError(
                f"none of {count} examples of {task!r} was confirmed: the model does not know this task; leave it out."
            )
    return pd.DataFrame(rows, columns=["task", "examples", "prompt", "scope", "measure", "value"])


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
    batch = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
    places = [(row, len(tokens) - 1) for row, tokens in enumerate(prompts)]
    return models.predict(model, batch, places=places).argmax(-1).tolist() == answers


def _checked(tasks: Iterable[str]) -> tuple[str, ...]:
    if isinstance(tasks, str):
        raise TypeError(f"tasks are several, got the text {tasks!r}: write [{tasks!r}].")
    tasks = tuple(tasks)
    if not tasks:
        raise ValueError(f"there are no tasks: choose from {', '.join(TASKS)}.")
    for task in tasks:
        if task not in TASKS:
            raise ValueError(f"the causes of the task {task!r} cannot be confirmed: choose from {', '.join(TASKS)}.")
        if tasks.count(task) > 1:
            raise ValueError(f"each task is given once, got {task!r} {tasks.count(task)} times.")
    return tasks


def _of_one(
    lin: Linearization, example: Example, askers: Mapping[str, Asker], bos: bool
) -> dict[str, dict[str, float]]:
    causes = cause_positions(lin, example)
    target = lin.token(example.target).id
    free = candidates(lin.model, lin.tokens, bos)
    found = {}
    for name, asker in askers.items():
        scope = asker.aimed(lin, target) if isinstance(asker, Scope) else asker(example)
        order = ranking(scope(lin).scores, free, prompt_generator(lin, "ties"))
        found[name] = retrieval(order, causes)
    return found


def cause_positions(lin: Linearization, example: Example) -> list[int]:
    """Where the causes stand among the tokens of a prompt.

    Raises:
        ValueError: when the tokenizer splits the prompt in another way than the model does.
    """
    ids = models.tokenizer_of(lin.model)(example.prompt)["input_ids"]
    ahead = len(lin.tokens) - len(ids)  # a BOS token that one of the two adds
    if ahead not in (-1, 0, 1) or lin.tokens.tolist()[max(ahead, 0) :] != ids[max(-ahead, 0) :]:
        raise ValueError(
            f"the tokenizer splits {example.prompt!r} otherwise than the model, so that its causes have no place among "
            "the tokens: take a model that uses its tokenizer as it is."
        )
    return [position + ahead for position in example.cause_positions(models.tokenizer_of(lin.model))]


def retrieval(order: Int[Tensor, " rank"], causes: Sequence[int]) -> dict[str, float]:
    """The measures of `known_causes`.

    Args:
        order: the positions, best first.
        causes: those of them that are causes.
    """
    hits = torch.isin(order, torch.tensor(causes)).double()
    ranks = hits.nonzero()[:, 0] + 1
    n = len(ranks)
    precision: Float[Tensor, " cause"] = torch.arange(1, n + 1) / ranks
    values = (hits[0], hits[:n].mean(), precision.mean(), 1 / ranks[0])
    return {measure: float(value) for measure, value in zip(MEASURES, values, strict=True)}


def _askers(scopes: Sequence[Scope] | Mapping[str, Asker]) -> dict[str, Asker]:
    if not isinstance(scopes, Mapping):
        return dict(names(scopes))
    ready = {name: asker for name, asker in scopes.items() if isinstance(asker, Scope | type) or not callable(asker)}
    if ready or not scopes:
        names(ready)  # type: ignore[arg-type]
    return dict(scopes)
