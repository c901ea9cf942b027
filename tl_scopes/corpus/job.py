"""One model and one question: answers to many prompts, in batches where they can go together."""

import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

from tqdm import tqdm

from tl_scopes import models
from tl_scopes.answers import AnswerMap
from tl_scopes.circuits.carried import carried_by
from tl_scopes.circuits.cut import By
from tl_scopes.circuits.paths import Paths
from tl_scopes.jacobian.linearization import Linearization, linearize_places
from tl_scopes.jacobian.span import Exchange, linearize_answers
from tl_scopes.models import Answer, Generated, LinearRules, Model, Prompt, ReadPrompt
from tl_scopes.models.arguments import as_flag
from tl_scopes.progress import no_progress
from tl_scopes.results.attribution import Attribution
from tl_scopes.results.attribution_map import AttributionMap
from tl_scopes.scopes.corrections import Around
from tl_scopes.scopes.own_foil import ask_each
from tl_scopes.scopes.scope import Scope
from tl_scopes.scopes.written import as_written

Found: TypeAlias = Attribution | AttributionMap | AnswerMap | Paths
"""What may be known of a prompt."""

Predictions: TypeAlias = Literal["last", "every"]
"""Which predictions of a prompt are explained."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is asked about all prompts of a call."""

    scope: Scope
    wrt: str
    of: str
    score_answer: bool
    checkpoint: bool
    rules: LinearRules | None
    batch_size: int
    prepend_bos: bool | None
    generate: int | None = None
    """How many tokens the model says at most after a prompt without an answer or target, which are its answer then."""

    @staticmethod
    def checked(**given: Any) -> dict[str, Any]:
        """The options that both calls on many prompts share, each of its type.

        Raises:
            TypeError: for an option that is not a bool, and a batch_size or `generate` that is not an integer.
            ValueError: for a batch_size or `generate` below 1, for `generate` and a scope that names its target, and
                unknown rules.
        """
        bos, generate = given["prepend_bos"], given["generate"]
        if generate is not None:
            generate = models.as_count(generate, "generate is how many tokens are said at most, 1 at least")
            if names_target(given["scope"]):
                raise ValueError(
                    f"{as_written(given['scope'])} names its target, and generate={generate} explains what the model "
                    "says: leave one of them out."
                )
        return given | {
            "score_answer": as_flag(given["score_answer"], "score_answer"),
            "checkpoint": as_flag(given["checkpoint"], "checkpoint"),
            "rules": LinearRules.read(given["rules"]),
            "batch_size": models.as_count(given["batch_size"], "batch_size must be at least 1"),
            "prepend_bos": None if bos is None else as_flag(bos, "prepend_bos"),
            "generate": generate,
        }


class Asked(NamedTuple):
    """A prompt, and what is asked about it."""

    prompt: Prompt
    answer: Answer | None
    target: Any
    foil: Any
    wrong: str = ""
    """Why it is not a prompt, where it is not."""

    def read(self, model: Model, settings: Settings) -> Exchange | ReadPrompt:
        """The tokens of the prompt, and of what is said after it.

        Raises:
            ValueError: for what is not a prompt; for an answer together with a target; for a foil that nothing is
                compared with; as `read_prompt` and `read_target` do.
        """
        if self.wrong:
            raise ValueError(self.wrong)
        if self.answer is not None and self.target is not None:
            raise ValueError(
                f"it has the answer {models.abridged(self.answer)} and the target {models.abridged(self.target)}, "
                "either of which is what is explained: give one of them, or leave a column out, columns={'target': "
                "None} say."
            )
        read = models.read_prompt(model, self.prompt, settings.prepend_bos)
        vocab, said, foil, notes = models.output_size(model), None, None, read.notes
        answer = self.answer
        if answer is None and self.target is None and settings.generate is not None:
            context = models.context_length(model)
            room = settings.generate if context is None else max(1, context - len(read.tokens))
            answer = Generated.of(model, models.generate(model, read.tokens, min(room, settings.generate)))
        if answer is not None:
            said, more = models.read_answer(model, answer, read.tokens)
            notes += more
        elif self.target is not None:
            said = models.read_target(model, self.target, vocab)
        if self.foil is not None:
            foil = models.read_target(model, self.foil, vocab, "foil")
        scope = settings.scope.giving_way(model, said, foil, vocab)
        if foil is not None:
            said = said or scope.named_targets(model, vocab)[0]
            if said is None:
                raise ValueError(
                    f"it has the foil {foil.text!r}, and no answer or target that is compared with it: give one, or "
                    "leave the foil out."
                )
        for name, given in (("target", said if answer is None else None), ("foil", foil)):
            if given is not None and given.is_span:
                notes += models.where_they_meet(model, read.tokens, given, name)
        return scope.exchange(model, read._replace(notes=notes), said, foil, vocab) or read


@dataclass(frozen=True, eq=False)
class Job:
    """It answers each prompt with an `Attribution` of its last prediction, and holds what is the same for all."""

    model: Model
    settings: Settings
    hooks: dict[str, tuple[object, ...]]
    """The user's hooks at the call."""

    def answers(self, window: Sequence[tuple[int, Asked]], bar: tqdm, shown: bool) -> dict[int, Any]:
        """What was found, or an error, for each numbered prompt, from batches of prompts of about the same length."""
        read: dict[int, ReadPrompt | Exchange] = {}
        found: dict[int, Found | Exception] = {}
        for number, prompt in window:
            try:
                read[number] = prompt.read(self.model, self.settings)
            except Exception as error:
                found[number] = error
        bar.update(len(found))
        for batch in self.batches(read, self.settings.batch_size):
            with no_progress(not shown):  # not over a yield, which would hide the bars of whoever asks
                answers = self.ask([read[number] for number in batch])
            found |= dict(zip(batch, answers, strict=True))
            bar.update(len(batch))
        return found

    def batches(self, prompts: dict[int, ReadPrompt | Exchange], size: int) -> Iterator[list[int]]:
        """The numbers of the prompts that go through the model together: with answers, or without, and of one question.

        The longest come first, so that it shows at once where memory does not suffice. Hooks of the user's may count
        positions from the end, where a shorter prompt would be filled up: with hooks set a batch has one length.
        """
        longest_first = sorted(prompts, key=lambda number: len(prompts[number].tokens), reverse=True)
        kinds: dict[Any, list[int]] = {}
        for number in longest_first:
            names = self.scope_of(prompts[number]).named_targets(self.model, models.output_size(self.model))
            kind = (type(prompts[number]), *(name is None for name in names))
            kinds.setdefault(kind, []).append(number)
        for order in kinds.values():
            while order:
                batch = order[:size]
                if self.hooks:
                    longest = _lengths(prompts[batch[0]])
                    batch = [number for number in batch if _lengths(prompts[number]) == longest]
                order = order[len(batch) :]
                yield batch

    def ask(self, prompts: Sequence[ReadPrompt | Exchange]) -> list[Found | Exception]:
        """What was found, or an error, for each prompt; where a batch fails, each is asked alone, lest one cost the
        others."""
        if models.user_hooks(self.model) != self.hooks:
            raise RuntimeError(
                "the model's hooks have changed since attribute_many was called, and answers are computed as they are "
                "asked for: inside model.hooks(...) take them inside as well, with list(...) say."
            )
        try:
            return [*self.found(prompts)]
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # they would keep the graph until the error is reported
            if len(prompts) == 1:
                return [error]
        return [answer for prompt in prompts for answer in self.ask([prompt])]

    def found(self, prompts: Sequence[ReadPrompt | Exchange]) -> Sequence[Found]:
        """An answer for each prompt, from one forward pass."""
        return self.scope_of(prompts[0]).ask(self.linearized(prompts))

    def scope_of(self, prompt: ReadPrompt | Exchange) -> Scope:
        """The question, which leaves it to the prompt what to explain where that has another answer than it names."""
        if not isinstance(prompt, Exchange):
            return self.settings.scope
        vocab = models.output_size(self.model)
        return self.settings.scope.giving_way(self.model, prompt.answer, prompt.against, vocab)

    def linearized(
        self, prompts: Sequence[ReadPrompt | Exchange], places: Sequence[tuple[int, int]] | None = None
    ) -> list[Linearization]:
        """The prompts in one forward pass: each at its last position or its answer, or all at other places.

        Raises:
            ValueError: for NaN or infinite activations.
        """
        asked = self.settings
        lins: list[Linearization] = []
        options: dict[str, Any] = {"checkpoint": asked.checkpoint, "rules": asked.rules}
        exchanges = [one for one in prompts if isinstance(one, Exchange)]
        if len(exchanges) == len(prompts):
            lins += linearize_answers(
                self.model, exchanges, asked.wrt, asked.of, score_answer=asked.score_answer, **options
            )
        else:
            read = [prompt for prompt in prompts if isinstance(prompt, ReadPrompt)]
            at = places or [(entry, len(prompt.tokens) - 1) for entry, prompt in enumerate(read)]
            lins += linearize_places(self.model, read, asked.wrt, asked.of, at, **options)
        for lin in lins:
            lin.require_finite()
        return lins


class Alone(Job):
    """Prompts one by one, since there is much to compute for each."""

    def batches(self, prompts: dict[int, ReadPrompt | Exchange], size: int) -> Iterator[list[int]]:
        """The number of each prompt by itself."""
        return super().batches(prompts, 1)

    def found(self, prompts: Sequence[ReadPrompt | Exchange]) -> Sequence[Found]:
        """What is found of the prompt."""
        (prompt,) = prompts
        return [self.of_one(prompt)]

    def of_one(self, prompt: ReadPrompt | Exchange) -> Found:
        """What is found of a prompt."""
        raise NotImplementedError


class EveryPrediction(Alone):
    """Every prediction of a prompt, an `AttributionMap`; or of its answer where it has one, an `AnswerMap`."""

    def of_one(self, prompt: ReadPrompt | Exchange) -> Found:
        """A map of the prompt, or of its answer.

        Raises:
            ValueError: for a prompt whose answer is compared with another, or is a set of tokens.
        """
        scope = self.scope_of(prompt)
        if not isinstance(prompt, Exchange):
            lins = self.linearized([prompt], [(0, position) for position in range(len(prompt.tokens))])
            return AttributionMap(tuple(ask_each(scope, lins)))
        if prompt.against is not None:
            raise ValueError(
                f"its answer is compared with {prompt.against.text!r}, and every prediction is asked about one answer: "
                "leave foils and `versus` out."
            )
        if prompt.answer.any_of:
            raise ValueError(
                f"its target {prompt.answer.text!r} is a set, of which any token is meant, and every prediction is "
                "asked about one answer: give one token, or a text."
            )
        (whole,) = linearize_answers(
            self.model,
            [prompt],
            self.settings.wrt,
            self.settings.of,
            checkpoint=self.settings.checkpoint,
            rules=self.settings.rules,
        )
        whole.require_finite()
        answers = scope.ask([whole.part(k, k + 1) for k in range(whole.answer.steps)])
        return AnswerMap.of_tokens(answers, [token.text for token in prompt.answer.tokens])


@dataclass(frozen=True, eq=False)
class CarriedBy(Alone):
    """Through which parts of the network each prompt's score runs: `Paths`."""

    by: By
    strongest: int | None
    """How many source tokens, those with the largest scores; None is all of them."""

    def of_one(self, prompt: ReadPrompt | Exchange) -> Found:
        """The paths of the prompt's score."""
        (lin,) = self.linearized([prompt])
        scope, tokens = self.scope_of(prompt), None
        if self.strongest is not None and self.strongest < lin.scored:
            (answer,) = scope.ask([lin])
            tokens = sorted(one.position for one in answer.top(self.strongest))
        return carried_by(lin, scope, self.by, tokens)


def names_target(scope: Scope) -> bool:
    """Whether the scope itself names what it explains, with which a foil can be compared."""
    while isinstance(scope, Around):
        scope = scope.scope
    return getattr(scope, "target", None) is not None


def _lengths(prompt: ReadPrompt | Exchange) -> list[int]:
    """How many tokens each text has that goes through the model."""
    return [len(text) for _, text in prompt.texts] if isinstance(prompt, Exchange) else [len(prompt.tokens)]
