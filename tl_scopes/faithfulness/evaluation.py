"""Does replacing the tokens that a scope names change the prediction? Scopes against baselines, over many prompts."""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor

from tl_scopes import models
from tl_scopes.api import linearize
from tl_scopes.failures import Failures
from tl_scopes.faithfulness.cases import Case, one_per_prompt
from tl_scopes.faithfulness.log import Log, Record, settings
from tl_scopes.faithfulness.measures import (
    Removal,
    Value,
    drop_of_all,
    hard_measures,
    ranking,
    soft_measures,
)
from tl_scopes.faithfulness.perturbation import Perturbation, Substitutes
from tl_scopes.jacobian.linearization import Linearization
from tl_scopes.jacobian.randomness import prompt_generator
from tl_scopes.jacobian.span import Span
from tl_scopes.models import Answer, Model, Prompt, Target
from tl_scopes.progress import progress_bar
from tl_scopes.rank_correlation import spearman
from tl_scopes.results.attribution import Attribution
from tl_scopes.scopes.baselines import LeaveOneOut
from tl_scopes.scopes.fingerprint import names
from tl_scopes.scopes.scope import Scope

if TYPE_CHECKING:
    import pandas as pd


def evaluate(
    model: Model,
    prompts: Iterable[Prompt],
    scopes: Sequence[Scope] | Mapping[str, Scope],
    perturbation: Perturbation | None = None,
    *,
    targets: Iterable[str | SupportsIndex | None] | None = None,
    foils: Iterable[str | SupportsIndex | None] | None = None,
    answers: Iterable[Answer] | None = None,
    prepend_bos: bool | None = None,
    path: str | Path | None = None,
    on_error: Literal["warn", "raise"] = "warn",
) -> "pd.DataFrame":
    """Measure the faithfulness of scopes at many prompts, each at its last position.

    For every prompt, scope and replacement there are deletion and insertion curves and their areas, comprehensiveness
    and sufficiency (see `faithfulness.measures.hard_measures`), their soft forms (`soft_measures`), what replacing the
    scope's first token alone does, which rank that has among all tokens, and how the whole ranking agrees with that of
    leaving one token out. For every prompt and scope there is also the rank correlation of the scores with those of the
    same model with shuffled weights: of all weights, and with `perturbation.cascade` of the last blocks alone. It is 1
    for scores that owe nothing to what was learned; what is left over 0 comes from the architecture and the position of
    the tokens. And there is the rank of the target in the undisturbed prediction: 1 where the model predicts it, and
    `faithfulness.aligned` keeps the prompts where it does.

    What is explained is what is measured. For every scope that is the log-probability of a token: the scope's own
    target or else the prompt's, which is fixed before anything is replaced. Where the scope compares the target with
    another token (`versus`), or the prompt has a foil, it is also the log-odds of the two, a difference of logits. And
    it is KL(p ‖ p') from the undisturbed prediction, for scopes that explain no target (Fisher, Temperature). A single
    logit, which the softmax does not know, is measured by the log-probability.

    Tokens rank by the score itself, the most positive first, which is what speaks for the target where scores have
    signs (`LeaveOneOut(quantity="log_prob")`); `Attribution.top` goes by the size.

    Args:
        model: a `HookedTransformer` or a `TransformerBridge`, in evaluation mode. It is left as found.
        prompts: texts, or lists of token ids.
        scopes: the scopes to compare, with names of their own if given as a dict.
        perturbation: what is replaced by what; None is `Perturbation()`, which takes the place of embeddings from the
            other prompts, so that there must be two at least, and leaves out fractions of a prompt that are less than
            half a token, so that three tokens to rank are enough.
        targets: one per prompt, for scopes that have no target of their own; None is the most likely next token.
        foils: one per prompt, or None: tokens to measure the log-odds against, for all scopes but those that have their
            own `versus`.
        answers: one per prompt, text or token ids that follow it, in place of targets: what is explained and measured
            is the log-probability of the whole answer, and the KL divergences of its predictions are summed. The
            `versus` of a scope is then another answer to the prompt, measured likewise.
        prepend_bos: whether texts get a BOS token; None is TransformerLens' own default for the model.
        path: a file of JSON lines. The results of each prompt are appended to it, and those found there are not
            computed again: an interrupted evaluation goes on where it stopped, to the same numbers, unless a scope
            draws from a generator that it was given. The file knows scopes by their class and the contents of their
            options; a scope of your own also by its code. It belongs to one evaluation at a time, which is what the
            empty file beside it is for, `path` with ".lock" at the end. A model with hooks of yours can have no file,
            since the file could not tell.
        on_error: "warn": a prompt that cannot be evaluated, because it is too short say, is reported with its number
            and left out, in the file too, so that a later run tries again, and the others go on; where none can be
            evaluated, the first error is raised, and of a single prompt nothing else is said. "raise": the first error
            ends it.

    Returns:
        One row per number: prompt, tokens (how many), target, scope, replacement, measure, quantity, fraction, value.
        `summary`, `differences`, `aligned` and `plot` of `tl_scopes.faithfulness` take it from there. The quantity is
        the unit: nats of "log_prob", "log_odds" or "kl", a "probability", a "rank". More is better for deletion and
        insertion, comprehensiveness, both soft measures, leave-one-out of the first and agreement with leave-one-out;
        less is better for sufficiency, for the rank of the first, and for the correlation with shuffled weights. NaN
        stands where there is no number, as for the correlation with a shuffled model that overflows.

    Cost: per prompt one linearisation and the scopes, twice with `perturbation.randomise` and once more for each share
        of the `cascade`; per replacement two forward passes for each point of each scope's curves, one per token unless
        a `LeaveOneOut` of this replacement has run them, and 2 · `samples` per scope, in batches. Counted for a prompt
        of 32 tokens and one replacement: 65 forward passes with one scope, 26 more for another one, 55 more for
        `LeaveOneOut`, which runs with the shuffled weights too. With `answers` all passes run once more for each
        `versus`. Once the embedding of the whole vocabulary for a "mean", and for `LeaveOneOut("mean")`. The shuffled
        weights take the memory of the model once more.

    Raises:
        ValueError: for no prompts or no scopes, and two scopes of one name; for "resample" with one prompt; for
            targets, foils or answers that are not one per prompt, answers together with the others, and a foil that is
            the target itself; for a scope that names a set of tokens, or several tokens without `answers`; for a file
            with results of other settings, or that is not an ordinary file; for hooks of yours with `path`; for another
            `on_error`. Else as `linearize` and the scopes do, with "raise" or where no prompt can be evaluated.
        TypeError: for something that is not a scope; for prompts, targets or a perturbation that are not what they
            should be; with `path` for a scope that holds something that cannot be compared.
        RuntimeError: while another evaluation has the file.

    Source: Petsiuk et al. 2018 (arXiv:1806.07421), DeYoung et al. 2020 (arXiv:1911.03429), Zhao & Aletras 2023
        (arXiv:2305.10496); for shuffled weights, Adebayo et al. 2018 (arXiv:1810.03292).
    Departure: Adebayo et al. initialise weights anew; shuffling each parameter keeps its scale on any architecture.

    Example:
        >>> from tl_scopes.scopes.baselines import RandomBaseline
        >>> from tl_scopes.faithfulness import Perturbation
        >>> prompts = ["The keys to the old cabinet near the door", "The wheel of the cars near the old bridge"]
        >>> perturbation = Perturbation(fractions=(0.1, 0.2))
        >>> results = tls.evaluate(model, prompts, [tls.SemanticScope(), RandomBaseline()], perturbation)
        >>> areas = results[(results.measure == "deletion area") & (results.quantity == "kl")]
        >>> areas[["prompt", "scope", "target"]].values.tolist()
        [[0, 'SemanticScope()', ' are'], [0, 'RandomBaseline()', ' are'],
         [1, 'SemanticScope()', ' is'], [1, 'RandomBaseline()', ' is']]
    """
    perturbation = Perturbation() if perturbation is None else perturbation
    if not isinstance(perturbation, Perturbation):
        raise TypeError(
            f"perturbation is a Perturbation, such as Perturbation(fractions=(0.2, 0.5)), got {perturbation!r}."
        )
    models.check_model(model)
    named = names(scopes)
    asked = one_per_prompt(prompts, targets, foils, answers)
    failures = Failures("evaluate", on_error, asked)
    cases: dict[int, Case] = {}
    for i, (prompt, target, foil, answer) in enumerate(asked):
        try:
            cases[i] = Case.of(model, i, prompt, target, foil, answer, prepend_bos, perturbation)
        except Exception as error:
            failures.add(i, error)
    if not cases:
        failures.require_answer()
    drawn_from = {i: case.inner(model) for i, case in cases.items()}
    Substitutes.require_possible(model, perturbation, drawn_from)
    whole = {i: case.tokens for i, case in cases.items()}
    with Log.open(path, {} if path is None else settings(model, named, perturbation, whole)) as log:
        left = [case for case in cases.values() if not log.has(case.index, case.key)]
        if len(left) < len(cases):
            failures.answered()
        evaluation = _Evaluation.of(model, named, perturbation, drawn_from) if left else None
        with progress_bar(len(left), "prompts") as bar:
            for case in left:
                assert evaluation is not None
                try:
                    record = evaluation.record(case)
                except Exception as error:
                    failures.add(case.index, error)
                else:
                    log.append(record)
                    failures.answered()
                bar.update()
        failures.require_answer()
        return log.to_dataframe(list(cases))


@dataclass(frozen=True, eq=False)
class _Evaluation:
    """What all prompts share."""

    model: Model
    scopes: Mapping[str, Scope]
    perturbation: Perturbation
    substitutes: Substitutes
    shuffled: Mapping[float | None, Sequence[Tensor]]
    """The weights with which scores are compared: all shuffled (None), or those of a share of the blocks."""
    means: tuple[Tensor | None, Tensor | None]
    """The mean embedding of the model, and of the one with all weights shuffled, where a scope asks for it at every
    prompt."""

    @classmethod
    def of(
        cls, model: Model, scopes: Mapping[str, Scope], perturbation: Perturbation, inner: Mapping[int, Tensor]
    ) -> "_Evaluation":
        shuffled = _shuffled(model, perturbation)
        everything = shuffled.get(None)
        substitutes = Substitutes.of(model, perturbation, inner)
        own: Tensor | None = None
        other: Tensor | None = None
        if any(scope.asks_for_mean for scope in scopes.values()):
            length = max(map(len, inner.values()))
            with models.exchanged_weights(model, everything) if everything else nullcontext():
                other = models.mean_embedding(model, length) if everything else None
            own = models.mean_embedding(model, length) if substitutes.mean is None else substitutes.mean
        return cls(model, scopes, perturbation, substitutes, shuffled, (own, other))

    def record(self, case: Case) -> Record:
        """All that is measured at one prompt."""
        lin, seed = self._linearized(case), self.perturbation.seed
        target = case.answer or Target((lin.token(case.target),))
        lin.require_possible(target, None if case.foil is None else Target((lin.token(case.foil),)))
        aimed: dict[str, Scope] = {}
        answers: dict[str, Attribution] = {}
        for name, scope in self.scopes.items():  # no comprehension, whose frame would keep `lin` in an error
            for one in scope.named_targets(self.model, lin.vocab):
                if one is not None and (case.answer is None or one.any_of):
                    _one_id(name, one)
            aimed[name] = scope.with_target(lin, target.ids[0])
            answers[name] = _with_mean(aimed[name], self.means[0])(lin)
        shown = {name: answer.target or target for name, answer in answers.items()}
        # Where an answer is explained, it is measured as a whole, whatever id stands for it.
        ids = {name: token.ids[0] if case.answer else _one_id(name, token) for name, token in shown.items()}
        others, foils = self._foils(case, answers)
        for name, token in shown.items():
            if foils[name] == ids[name] and not case.answer:
                raise ValueError(
                    f"the foil {token.text!r} is the target of {name} itself: their difference is zero. Give another "
                    "foil, or None."
                )
        orders = {
            name: ranking(answer.scores, case.free, prompt_generator(lin, "ties", seed))
            for name, answer in answers.items()
        }
        found: list[tuple[str, str, list[Value]]] = []
        for replacement in self.perturbation.replacements:
            drawn = prompt_generator(lin, replacement, seed)
            removal = Removal(lin, self.substitutes(lin, replacement, case.index, drawn), case.free, others)
            single = _left_out(replacement, aimed, answers)
            hard = hard_measures(removal, orders, ids, self.perturbation, foils, single)
            for name, answer in answers.items():
                masks = prompt_generator(lin, "masks", seed)
                samples = self.perturbation.samples
                found.append((name, replacement, hard[name]))
                if samples:
                    drop = drop_of_all(hard[name])
                    hard[name] += soft_measures(removal, answer.scores, ids[name], drop, samples, masks)
        for name, token in shown.items():
            found.append((name, "", [Value("rank of the target", "rank", None, _rank(lin, token))]))
        for share in self.shuffled:
            measure = "shuffled weights" if share is None else "shuffled last blocks"
            for name, correlation in self._sanity(case, aimed, answers, share).items():
                found.append((name, "", [Value(measure, "rank correlation", share, correlation)]))
        return {
            "prompt": case.index,
            "key": case.key,
            "tokens": len(case.tokens),
            "results": [
                {"scope": name, "target": shown[name].text, "replacement": replacement, "values": values}
                for name, replacement, values in found
            ],
        }

    def _linearized(self, case: Case, answer: Target | None = None) -> Linearization:
        said = answer or case.answer
        return linearize(self.model, case.tokens, answer=None if said is None else said.ids)

    def _foils(self, case: Case, answers: Mapping[str, Attribution]) -> tuple[dict[int, Span], dict[str, int | None]]:
        """What each scope's target is compared with: a token, or a number for another answer to the prompt."""
        versus = {name: answer.versus for name, answer in answers.items()}
        if case.answer is None:
            return {}, {name: case.foil if one is None else _one_id(name, one) for name, one in versus.items()}
        numbers: dict[tuple[int, ...], int] = {}
        others: dict[int, Span] = {}
        foils: dict[str, int | None] = dict.fromkeys(versus)
        for name, one in versus.items():
            if one is None:
                continue
            foils[name] = number = numbers.setdefault(tuple(one.ids), -1 - len(numbers))
            if number not in others:
                span = self._linearized(case, one)
                assert isinstance(span, Span)
                others[number] = span
        return others, foils

    def _sanity(
        self, case: Case, scopes: Mapping[str, Scope], answers: Mapping[str, Attribution], share: float | None
    ) -> dict[str, float]:
        """Rank correlation with the scores of the model with shuffled weights."""
        found = dict.fromkeys(answers, math.nan)
        mean = self.means[0 if share else 1]
        # What was answered with the learned weights fails with others only where numbers overflow.
        with models.exchanged_weights(self.model, self.shuffled[share]), suppress(ValueError):
            other = self._linearized(case)
            for name, scope in scopes.items():
                with suppress(ValueError):
                    scores = _with_mean(scope, mean)(other).scores
                    found[name] = spearman(answers[name].scores[case.free], scores[case.free])
        return found


def _shuffled(model: Model, perturbation: Perturbation) -> dict[float | None, Sequence[Tensor]]:
    """The weights that scores are compared with; each weight is shuffled once."""
    if not (perturbation.randomise or perturbation.cascade):
        return {}
    random = torch.Generator().manual_seed(perturbation.seed)
    own, other = models.learned(model), models.shuffled_weights(model, random)
    found: dict[float | None, Sequence[Tensor]] = {None: other} if perturbation.randomise else {}
    for share in perturbation.cascade:
        inside = models.in_last_blocks(model, share)
        found[share] = [b if chosen else a for a, b, chosen in zip(own, other, inside, strict=True)]
    return found


def _left_out(
    replacement: str, scopes: Mapping[str, Scope], answers: Mapping[str, Attribution]
) -> Float[Tensor, "token"] | None:
    """What replacing each token alone does to the prediction, where a scope has measured it already."""
    for name, scope in scopes.items():
        asked = type(scope) is LeaveOneOut and (scope.replacement, scope.quantity, scope.mean)
        if asked == (replacement, "kl", None):
            return answers[name].scores
    return None


def _rank(lin: Linearization, target: Target) -> int:
    """The rank of the target among all tokens; of an answer that of its token with the worst one."""
    ids = target.ids if isinstance(lin, Span) else [target.ids[0]]
    rows = lin.log_probs.reshape(-1, lin.log_probs.shape[-1])[: len(ids)]
    own = rows[range(len(ids)), ids]
    return int((rows > own[:, None]).sum(-1).max()) + 1


def _with_mean(scope: Scope, mean: Tensor | None) -> Scope:
    """The scope with the mean embedding handed in, so that it is not computed for each prompt."""
    return scope if mean is None else scope.with_mean(mean)


def _one_id(name: str, target: Target) -> int:
    """The id of the token that is measured.

    Raises:
        ValueError: for several tokens, and for a set of them.
    """
    if len(target) == 1:
        return target.id
    if target.any_of:
        instead = "a set of tokens, which is not measured: name one of them"
    else:
        instead = f"{len(target)} tokens: give what is said after each prompt as `answers`"
    raise ValueError(f"{name} asks about {target.text!r}, {instead}.")
