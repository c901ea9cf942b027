"""Questions about every prediction of a text, some of which may be the very token that all are compared with.

This is a file of its own since maps of one prompt and corpora both ask so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from tl_scopes.jacobian.linearization import Linearization
from tl_scopes.jacobian.span import Span
from tl_scopes.models import Target
from tl_scopes.results.attribution import Attribution
from tl_scopes.scopes.measurement import Measurement
from tl_scopes.scopes.scope import Scope


def ask_each(scope: Scope, lins: Sequence[Linearization]) -> list[Attribution]:
    """Ask about every prediction of a text.

    Where a prediction is the very token that it is compared with, the difference is zero whatever the prompt is, and so
    is each score: the answer has zeros, and a note that says so. Where it is one of several tokens that it is compared
    with, it would stand on both sides, and nothing is asked: the answer has zeros, no value, and a note.

    Raises: as the scope does; ValueError where every prediction is a token that it is compared with.
    """
    target, versus = scope.named_targets(lins[0].model, lins[0].vocab)
    if target is not None or versus is None:
        return scope.ask(lins)
    others = [lin for lin in lins if not _predicted(lin).overlaps(versus)]
    if not others:
        return scope.ask(lins)  # which says what is wrong
    asked = scope.ask(others)
    details, answers = asked[0].details, iter(asked)
    return [_zeros(scope, lin, versus, details) if _predicted(lin).overlaps(versus) else next(answers) for lin in lins]


def _predicted(lin: Linearization) -> Target:
    """What is explained where the scope leaves its target to the prediction."""
    return lin.answer if isinstance(lin, Span) else Target((lin.token(),))


def _zeros(scope: Scope, lin: Linearization, versus: Target, like: Mapping[str, Any]) -> Attribution:
    """The answer about a token beside itself, or beside several of which it is one, with details like another's."""
    target = _predicted(lin)
    zeros = lin.readout.new_zeros(len(lin.tokens))
    of_tokens = {name: detail for name, detail in like.items() if isinstance(detail, Tensor) and detail.ndim == 1}
    details: dict[str, Any] = {name: detail.new_zeros(len(zeros)) for name, detail in of_tokens.items()}
    details |= {name: 0.0 for name, detail in like.items() if isinstance(detail, float)}
    value: float | None = None
    name: str | None = None
    if target == versus:
        value, name = 0.0, f"the difference of {target.text!r} and itself"
        note = f"where the prediction is {target.text!r} itself, the difference is zero, and so is each score"
    else:
        note = (
            f"where the prediction is {target.text!r}, one of those that it would be compared with, nothing is asked, "
            "and each score is zero"
        )
    found = scope.recorded(lin, target, versus, Measurement(zeros, details), value, name)
    return replace(found, notes=(*found.notes, note))
