"""A `Scope` is a question: asked of a `Linearization`, it gives an `Attribution`."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import is_dataclass, replace
from typing import Any, Literal

from torch import Tensor

from tl_scopes import models
from tl_scopes.jacobian.linearization import Linearization
from tl_scopes.jacobian.metric import Metric
from tl_scopes.jacobian.span import Exchange, Span, linearize_answers
from tl_scopes.models import Target, Token
from tl_scopes.results.attribution import Attribution, Prediction
from tl_scopes.scopes.measurement import Estimate, Measurement, estimate_by, kept, require_measurement
from tl_scopes.scopes.written import as_written

_PREDICTIONS = 5


class Scope(ABC):
    """A question about a linearised prediction: call it on a `Linearization` to get an `Attribution`.

    A scope of your own is a frozen dataclass whose fields are its options. It needs two methods: `measure`, its
    equation, and `unit`. Where the question is the gradient of a number that is computed from the prediction, derive it
    from `JacobianScope`, which needs `cotangents` in place of `measure`.

    A scope also says what kind of number its scores are: `metric`, `is_slope`, `saturates`, `depends_on_basis`,
    `depends_on_mean_logit` and `estimate`. That is all that `tl_scopes.check` knows about it.
    """

    @abstractmethod
    def measure(self, lin: Linearization) -> Measurement:
        """The scope's equation: one number per token."""

    @abstractmethod
    def unit(self, lin: Linearization) -> str:
        """The unit of a score."""

    def measure_many(self, lins: Sequence[Linearization]) -> list[Measurement]:
        """`measure` for several linearisations of one forward pass, which a scope may take together."""
        return [self.measure(lin) for lin in lins]

    # -- what the scores are about ------------------------------------------------------------------------------------

    def explained(self, lin: Linearization) -> tuple[Target | None, Target | None]:
        """The target, and what it is compared with; None where the question has none."""
        return None, None

    def with_target(self, lin: Linearization, target: int) -> "Scope":
        """The same question about this target, where the scope has left its target to the prediction."""
        if isinstance(lin, Span):
            return self  # what is said is what is explained
        if is_dataclass(self) and getattr(self, "target", 0) is None and self.explained(lin)[0] is not None:
            return replace(self, target=target)
        return self

    def named_targets(self, model: models.Model, vocab: int | None = None) -> tuple[Target | None, Target | None]:
        """The target and what it is compared with, as far as the scope itself names them.

        Args:
            model: a checked model.
            vocab: how many logits it has; None is as many as it has token ids.
        """
        return None, None

    def giving_way(
        self, model: models.Model, target: Target | None, versus: Target | None, vocab: int | None = None
    ) -> "Scope":
        """The same question without a target or `versus` of its own where a prompt has another one.

        Args:
            model: a checked model.
            target, versus: what the prompt has; None where it has none, so that the scope's counts.
            vocab: how many logits the model has; None is as many as it has token ids.
        """
        both = zip(("target", "versus"), self.named_targets(model, vocab), (target, versus), strict=True)
        differ = [name for name, named, given in both if named is not None and given is not None and named != given]
        left = {name: None for name in differ if hasattr(self, name)}
        return replace(self, **left) if left and is_dataclass(self) else self

    def quantity_explained(self, lin: Linearization) -> str | None:
        """What `value` is, as a formula or in words: "log p(' Paris')"; None where it has no name."""
        return None

    def value(self, lin: Linearization) -> float | None:
        """The number that the scores are about, where `metric` is one: a logit, a log-probability."""
        metric = self.joint_metric(lin)
        logits = lin.readout[:0] if lin.trace.logits is None else lin.logits
        found = None if metric is None else metric(models.precise(lin.readout), models.precise(logits))
        return float(found) if found is not None and found.numel() == 1 else None

    def metric(self, lin: Linearization) -> Metric | None:
        """The quantity that the scores are about, as a function of readout and logits; None where there is none.

        What it depends on beside these, such as the target that was most likely or a cotangent, stays as it is at
        `lin`.
        """
        return None

    def joint_metric(self, lin: Linearization) -> Metric | None:
        """`metric` as the scores are slopes of it, also where an answer of several tokens was linearised.

        A scope that is asked about each prediction of an answer has a metric of each, and scores of their sum.
        """
        return self.metric(lin)

    # -- what kind of number a score is -------------------------------------------------------------------------------

    @property
    def is_slope(self) -> bool:
        """Whether scores are slopes of `metric` at the prompt, so that they predict its change under small moves.

        The size of a gradient is one, the slope of the steepest move; a gradient times an input is another, the slope
        of the move that takes the input away. An average of slopes along a path is not a slope at the prompt.
        """
        return True

    @property
    def saturates(self) -> bool:
        """Whether scores shrink where a sure prediction has flattened the gradients at the prompt."""
        return True

    @property
    def asks_for_mean(self) -> bool:
        """Whether the scope computes the mean embedding of the vocabulary at each prompt, since it was given no `mean`.

        A call on many prompts computes it once and hands it in.
        """
        return False

    def with_mean(self, mean: Tensor) -> "Scope":
        """The same question with this mean embedding handed in, where the scope asks for one."""
        return replace(self, mean=mean) if self.asks_for_mean and is_dataclass(self) else self

    @property
    def runs_again(self) -> Literal["no", "point", "prompt"]:
        """What the scope has to run the model on again: nothing, points near the linearisation's, or the prompt itself.

        The scope then refuses a model whose hooks or weights have changed since it was linearised; and where it runs
        the prompt itself, it refuses a point that `Linearization.at` moved to.
        """
        return "no"

    @property
    def depends_on_basis(self) -> bool:
        """Whether scores depend on the coordinates of the readout, which folding the final norm's gain changes."""
        return False

    def depends_on_mean_logit(self, lin: Linearization) -> bool:
        """Whether scores depend on the mean of all logits, which centring the unembedding sets to zero."""
        return False

    @property
    def takes_spans(self) -> bool:
        """Whether the scope can be asked about all predictions of an answer together, a `Span`."""
        return False

    @property
    def compares(self) -> bool:
        """Whether the scope can be asked about the difference of two answers."""
        return False

    @property
    def grouping(self) -> Literal["norm", "sum", "signed"] | None:
        """How the score of several tokens together follows from the scores of each; None where it does not.

        "norm" is √Σ score², for norms of gradients, which are written one after another. "sum" is Σ score. "signed" is
        |Σ signed|, for sizes of signed numbers, which the answer has as its detail "signed".
        """
        return None

    def estimate(self, answer: Attribution) -> Estimate | None:
        """How well the scores of an answer to this question are known; None where nothing was estimated.

        Unless a scope says otherwise, it is read from the detail "standard_error".
        """
        error = answer.details.get("standard_error")
        return None if error is None else estimate_by(answer, error, "standard error")

    def notes(self, lin: Linearization) -> tuple[str, ...]:
        """Sentences that a reader of the scores should know."""
        return ()

    def caveat(self, answers: Sequence[Attribution]) -> str | None:
        """A warning about these answers, one for all answers of a call; None where there is nothing to warn of."""
        return None

    def rules_of(self, lin: Linearization) -> models.LinearRules | None:
        """The rules under which the question is asked; None where it is asked of the model's own derivative."""
        return lin.rules

    # -- asking it ----------------------------------------------------------------------------------------------------

    def __init_subclass__(cls) -> None:
        # This runs before @dataclass, which writes a repr only where there is none. Its own would show every default,
        # and tensors in full.
        if "__repr__" not in vars(cls):
            cls.__repr__ = cls.__repr__  # type: ignore[method-assign]

    def __repr__(self) -> str:
        return as_written(self) if is_dataclass(self) else super().__repr__()

    def __call__(self, lin: Linearization) -> Attribution:
        """Ask the question.

        Raises:
            TypeError: for something that is not a Linearization, such as a model. Else as the scope does.
        """
        if not isinstance(lin, Linearization):
            raise TypeError(
                f"a scope is asked of a Linearization, got {type(lin).__name__}: write "
                "attribute(model, prompt, scope), or scope(linearize(model, prompt))."
            )
        answers = self.ask([lin])
        warn(self, answers)
        return answers[0]

    def ask(self, lins: Sequence[Linearization]) -> list[Attribution]:
        """Ask it of several linearisations of one forward pass, together where the scope can.

        Raises: as the scope does.
        """
        if not self.takes_spans and all(isinstance(lin, Span) and len(lin.rows) == 1 for lin in lins):
            asked = [self.about(lin) for lin in lins]
            return [answer for scope, lin in asked for answer in scope.ask([lin])]
        # The targets come first, so that an unknown one is refused before the work.
        answered = [self.with_answer(lin) for lin in lins]
        if any(one is not lin for one, lin in zip(answered, lins, strict=True)) and len(lins) > 1:
            return [answer for lin in lins for answer in self.ask([lin])]  # they no longer share a forward pass
        lins = answered
        explained = [targets_of(self, lin) for lin in lins]
        for lin in lins:
            self._require_model(lin)
            self._require_single(lin)
        found = self.measure_many(lins)
        return [self._answer(lin, *tokens, one) for lin, tokens, one in zip(lins, explained, found, strict=True)]

    def exchange(
        self,
        model: models.Model,
        read: models.ReadPrompt,
        answer: Target | None = None,
        against: Target | None = None,
        vocab: int | None = None,
    ) -> Exchange | None:
        """The prompt with the answer that the question is about; None where it is about the next prediction.

        The answer is the one that is given; or else the target that the scope names, where the target or what it is
        compared with is several tokens.

        Args:
            model: a checked model.
            read: the prompt.
            answer, against: what is said after it, and what that is compared with; None where it is not given.
            vocab: how many logits the model has; None is as many as it has token ids.

        Raises:
            ValueError: where the scope names another target, or another one to compare with, than is given; and as
                `Exchange.of` does.
        """
        own = self.named_targets(model, vocab)
        for named, given in zip(own, (answer, against), strict=True):
            if named is not None and given is not None and named != given:
                raise ValueError(
                    f"{as_written(self)} asks about {named.text!r}, and what is given to be explained after the "
                    f"prompt is {given.text!r}: leave one of them out."
                )
        notes = tuple(
            note
            for name, named, given in zip(("target", "versus"), own, (answer, against), strict=True)
            if named is not None and named.is_span and given is None
            for note in models.where_they_meet(model, read.tokens, named, name)
        )
        named, versus = answer or own[0], against or own[1]
        if named is None or not (answer is not None or named.is_span or (versus is not None and versus.is_span)):
            return None
        return Exchange.of(model, read._replace(notes=read.notes + notes), named, versus)

    def with_answer(self, lin: Linearization) -> Linearization:
        """The linearisation that the question is about: the one given, unless the scope names several tokens.

        Such an answer is put behind the prompt and linearised with it.

        Cost: a forward pass where there is such an answer.

        Raises:
            ValueError: when the model's hooks or weights have changed since it was linearised; when the linearisation
                is of another answer than the one that the question names.
        """
        said, against, length, score_answer = None, None, len(lin.tokens), False
        if isinstance(lin, Span):
            said, against, length, score_answer = lin.answer, lin.against, lin.prompt_length, lin.score_answer
        target, versus = self.named_targets(lin.model, lin.vocab)
        if said is None and target is None and versus is not None and versus.is_span:
            said = Target((lin.token(),))
        read = models.ReadPrompt(lin.tokens[:length], lin.notes, lin.parts)
        exchange = self.exchange(lin.model, read, said, against, lin.vocab)
        if exchange is None or not exchange.is_span or (isinstance(lin, Span) and exchange.against == against):
            return lin
        lin.require_repeatable()
        lin.require_readout()
        options: dict[str, Any] = {"checkpoint": lin.trace.checkpointed, "rules": lin.rules}
        (span,) = linearize_answers(lin.model, [exchange], lin.wrt, lin.of, score_answer=score_answer, **options)
        span.require_finite()
        return span

    def about(self, lin: Linearization) -> tuple["Scope", Linearization]:
        """The question and the linearisation that it is about, as `ask` takes them.

        That is the linearisation of `with_answer`; one token of an answer is an ordinary prediction to a scope that
        takes no spans, and its target is that token.

        Raises: as `with_answer` does; ValueError for an answer that the scope cannot be asked about.
        """
        lin = self.with_answer(lin)
        if isinstance(lin, Span) and len(lin.rows) == 1 and not self.takes_spans:
            aimed = self.with_target(lin.single[0], lin.answer.tokens[0].id)
            if lin.answer.any_of and aimed != self:
                raise ValueError(
                    f"{as_written(self)} explains one token, got the set {lin.answer.text!r}: ask once for each token."
                )
            return aimed, lin.single[0]
        self._require_single(lin)
        return self, lin

    def _require_single(self, lin: Linearization) -> None:
        """Refuse an answer of several tokens where the question is about one prediction.

        Raises:
            ValueError: with what to do instead.
        """
        if isinstance(lin, Span) and lin.against is not None and not self.compares:
            raise ValueError(
                f"{as_written(self)} does not compare two answers, and this is {lin.answer.text!r} against "
                f"{lin.against.text!r}: linearise each of them."
            )
        if isinstance(lin, Span) and not self.takes_spans:
            raise ValueError(
                f"{as_written(self)} is about one prediction at a time, and this is the answer {lin.answer.text!r} of "
                f"{len(lin.answer)} tokens: ask it of each, by answer_map (in a terminal --rows) or as [scope(one) for "
                "one in lin.single]."
            )

    def _answer(
        self, lin: Linearization, target: Target | None, versus: Target | None, found: Measurement
    ) -> Attribution:
        asked = as_written(self)
        require_measurement(found, asked, lin)
        unit = self.unit(lin)
        if not isinstance(unit, str):
            raise TypeError(f"the unit of {asked} must be a text, got {unit!r}.")
        return self.recorded(lin, target, versus, found, self.value(lin), self.quantity_explained(lin))

    def recorded(
        self,
        lin: Linearization,
        target: Target | None,
        versus: Target | None,
        found: Measurement,
        value: float | None,
        quantity: str | None,
    ) -> Attribution:
        """The answer that keeps this measurement.

        Args:
            lin: the linearisation that was asked.
            target, versus: what was explained, and what that was compared with; None where there is no such token.
            found: the scores and details, of all tokens.
            value, quantity: the number that the scores are about, and its name; None where there is no such number.
        """
        scored, keeps = lin.scored, kept(found, lin)
        return Attribution(
            scores=keeps.scores,
            tokens=lin.tokens[:scored].cpu(),
            str_tokens=lin.str_tokens[:scored],
            positions=tuple(range(scored)),
            **circumstances(self, lin),
            target=lin.answer if target is None and isinstance(lin, Span) else target,
            versus=versus,
            predictions=most_likely(lin),
            wrt=lin.wrt,
            parts=(*lin.parts, *["answer"] * scored)[:scored] if lin.parts else (),
            grouping=self.grouping,
            details=keeps.details,
            value=value,
            quantity=quantity,
        )

    def _require_model(self, lin: Linearization) -> None:
        """Refuse a model that would compute something else now, where the scope runs it again.

        Raises:
            ValueError: for hooks or weights that have changed, and for a point that `at` moved to: see `runs_again`.
        """
        if self.runs_again == "prompt":
            lin.require_repeatable()
        elif self.runs_again == "point":
            lin.require_unchanged()


def circumstances(scope: Scope, lin: Linearization) -> dict[str, Any]:
    """The fields that every kind of answer has beside its numbers: what was asked, where, and with what."""
    rules = scope.rules_of(lin)
    return {
        "position": lin.position,
        "scope": as_written(scope),
        "unit": scope.unit(lin),
        "of": lin.of,
        "model": models.model_name(lin.model),
        "dtype": lin.computed_in,
        "rules": None if rules is None else str(rules),
        "notes": (*lin.notes, *scope.notes(lin)),
        "provenance": models.Provenance.of(lin.model, lin.trace.state.weights),
    }


def targets_of(scope: Scope, lin: Linearization) -> tuple[Target | None, Target | None]:
    """What a scope explains, and what that is compared with; a user's scope may give a Token for a Target."""
    target, versus = (Target((one,)) if isinstance(one, Token) else one for one in scope.explained(lin))
    return target, versus


def most_likely(lin: Linearization) -> tuple[Prediction, ...]:
    """The most likely next tokens, best first; empty where the linearisation ends before the logits."""
    if lin.trace.logits is None:
        return ()
    first = lin.single[0]
    best = first.log_probs.exp().topk(min(_PREDICTIONS, len(first.log_probs)))
    return tuple(
        Prediction(lin.token(id), p) for id, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    )


def caveat_of(scope: Scope, answers: Sequence[Attribution], prompts: Sequence[int | str] | None = None) -> str | None:
    """The warning about these answers, one for all answers of a call; None where there is nothing to warn of.

    Args:
        scope: the question.
        answers: what was found.
        prompts: what the prompt of each is called; None where all are about one prompt.
    """
    same = [answer for answer in answers if _is_own_foil(answer)]
    asked = [answer for answer in answers if not _is_own_foil(answer)]
    said = [scope.caveat(asked)] if asked else []
    named = [""] * len(answers) if prompts is None else [f"prompt {models.abridged(name)}: " for name in prompts]
    notes = [next((note for note in answer.notes if isinstance(note, models.SpacingNote)), None) for answer in answers]
    found = [
        (name, note)
        for name, note, answer in zip(named, notes, answers, strict=True)
        if note is not None and not _is_own_foil(answer)
    ]
    if found:
        of = f" {len(found)} of {len(answers)} predictions have such a note." if len(set(found)) > 1 else ""
        said.append(f"{''.join(found[0])}.{of}")
    if same:
        versus = same[0].versus
        assert versus is not None
        places = ", ".join(str(answer.position) for answer in same[:8]) + (", …" if len(same) > 8 else "")
        said.append(
            f"{len(same)} of {len(answers)} predictions (after position {places}) "
            f"{'is' if len(same) == 1 else 'are'} {'one of ' if versus.any_of else ''}{versus.text!r}, with which all "
            f"are compared: {'nothing is asked' if versus.any_of else 'the difference is zero'} there, and "
            f"{'each score is zero' if versus.any_of else 'so is each score'}."
        )
    return " ".join(one for one in said if one is not None) or None


def _is_own_foil(answer: Attribution) -> bool:
    target, versus = answer.target, answer.versus
    if target is None or versus is None:
        return False
    # A scope of the user's may know how to compare two sets that share a token.
    return target == versus or (target.overlaps(versus) and not answer.scores.any())


def warn(scope: Scope, answers: Sequence[Attribution], prompts: Sequence[int | str] | None = None) -> bool:
    """Give the warning about these answers, if there is one, and return whether there is."""
    caveat = caveat_of(scope, answers, prompts)
    if caveat is not None:
        models.warn(caveat)
    return caveat is not None


def require_scope(scope: object) -> None:
    """Refuse what is not a scope.

    Raises:
        TypeError: with a hint where it is a scope's class.
    """
    if not isinstance(scope, Scope):
        hint = f": write {scope.__name__}()" if isinstance(scope, type) else ""
        raise TypeError(f"expected a scope such as SemanticScope(), got {scope!r}{hint}.")
