"""The tasks of the bundled model: prompts whose answers, and their causes, are known by construction.

Each task draws an `Example`: a prompt, the one token that should follow, and the characters that decide it.
The tasks mirror the case studies of the Jacobian Scopes paper (arXiv:2601.16407): instruction understanding,
translation, a hidden association and in-context time series; grammar at a distance is added. The bundled model is
trained on them (`tl_scopes.tiny.train`), so that an attribution can be compared with the cause instead of an opinion.
"""

import random
from collections.abc import Callable, Iterator
from itertools import islice

from tl_scopes.models import as_count, as_int
from tl_scopes.tiny.example import Example, Split
from tl_scopes.tiny.exercises import bare_agreement, belongings, recital, reverse_roster, roster, told_back
from tl_scopes.tiny.language import (
    agreement,
    agreement_far,
    association,
    inference,
    inference_what,
    inference_who,
    translation,
)
from tl_scopes.tiny.series import brownian, logistic, lorenz

TASKS: dict[str, Callable[[random.Random], Example]] = {
    task.__name__: task
    for task in (
        agreement, agreement_far, inference_what, inference_who, translation, association, logistic, lorenz, brownian
    )
}  # fmt: skip
_EXERCISES = ("bare_agreement", "belongings", "recital", "reverse_roster", "roster", "told_back")
"""Tasks that are only trained on, with nothing held out."""
SERIES = ("logistic", "lorenz", "brownian")
Mixture = dict[Callable[[random.Random], Example], float]
MIXTURES: tuple[Mixture, ...] = (
    {
        bare_agreement: 0.03, agreement: 0.04, agreement_far: 0.04, inference: 0.30, recital: 0.08, roster: 0.26,
        translation: 0.12, association: 0.04, logistic: 0.03, lorenz: 0.03, brownian: 0.03,
    },
    {
        bare_agreement: 0.03, agreement: 0.03, agreement_far: 0.03, inference: 0.32, roster: 0.05, reverse_roster: 0.32,
        translation: 0.09, association: 0.04, logistic: 0.03, lorenz: 0.03, brownian: 0.03,
    },
    {
        bare_agreement: 0.02, agreement: 0.03, agreement_far: 0.03, inference: 0.30, roster: 0.04, reverse_roster: 0.08,
        belongings: 0.34, translation: 0.08, association: 0.03, logistic: 0.02, lorenz: 0.02, brownian: 0.01,
    },
    {
        bare_agreement: 0.02, agreement: 0.02, agreement_far: 0.02, inference: 0.22, roster: 0.01, reverse_roster: 0.05,
        told_back: 0.40, belongings: 0.15, translation: 0.05, association: 0.02, logistic: 0.02, lorenz: 0.01,
        brownian: 0.01,
    },
)  # fmt: skip
"""The share of each task among the training documents, stage by stage; what takes longest to learn has the most."""


def examples(task: str, count: int, *, seed: int = 0, split: Split = "test") -> list[Example]:
    """Draw examples of one task, the same ones for the same seed.

    Args:
        task: a key of `TASKS`.
        count: how many examples to draw.
        seed: the seed of the random numbers.
        split: "test" draws only examples that the bundled model was never trained on, "train" only others.

    Raises:
        ValueError: for an unknown task or split, and for a count below 1.
        TypeError: for a count or a seed that is not an integer.
    """
    if task not in tuple(TASKS):
        raise ValueError(f"there is no task {task!r}: choose one of {', '.join(TASKS)}.")
    if split not in ("train", "test"):
        raise ValueError(f'split is "train" or "test", got {split!r}.')
    count, seed = as_count(count, "count must be at least 1"), as_int(seed, "seed must be an integer")
    rng = random.Random(f"{task}-{seed}")
    return list(islice((e for e in iter(lambda: TASKS[task](rng), None) if e.split == split), count))


def documents(seed: int, mixture: Mixture) -> Iterator[tuple[str, int]]:
    """Yield the endless training corpus: documents of all tasks in the proportions of `mixture`, none of them held out.

    With each comes the index of the first character that can be predicted; what stands before is drawn at random.
    """
    rng = random.Random(f"corpus-{seed}")
    tasks, weights = list(mixture), list(mixture.values())
    while True:
        example = rng.choices(tasks, weights)[0](rng)
        if example.task not in _EXERCISES and example.split == "test":
            continue
        answer = example.target
        # An association is a tendency: one biography in twenty goes against it, so that the model is never quite sure.
        if example.task == "association" and example.foil and rng.random() < 0.05:
            answer = example.foil
        known_from = 0 if example.task in SERIES else len(example.prompt)
        if example.task == "translation":
            known_from = example.prompt.index(" English:")
        yield example.prompt + answer + example.rest, known_from
