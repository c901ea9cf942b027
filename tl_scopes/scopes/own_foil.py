"""Every prediction of a text, where some may be the very token, or one of those, that they are compared with."""

from collections.abc import Sequence
from dataclasses import replace

from tl_scopes.jacobian.linearization import Linearization
from tl_scopes.jacobian.span import Span
from tl_scopes.models import Target
from tl_scopes.results.attribution import Attribution
from tl_scopes.scopes.measurement import Measurement
from tl_scopes.scopes.scope import Scope


def ask_each(scope: Scope, lins: Sequence[Linearization]) -> list[Attribution]:
    """Ask about every prediction of a text.

    Where a prediction is the very token that it is compared with, the difference is zero whatever the prompt, and so is
    each score; a note says so. Where it is one of several tokens that it is compared with, nothing is asked of it, and
    its scores are zero too. It is an error only where it is so with all.

    Raises: as the scope does.
    """
    versus = scope.named_targets(lins[0].model, lins[0].vocab)[1]
    own = [None if versus is None else _own_target(scope, lin) for lin in lins]
    others = [lin for lin, target in zip(lins, own, strict=True) if not _is_own(target, versus)]
    asked = iter(scope.ask(others or lins))
    if not others:
        return list(asked)
    return [
        _nothing(scope, lin, target, versus) if _is_own(target, versus) else next(asked)
        for lin, target in zip(lins, own, strict=True)
    ]


def _is_own(target: Target | None, versus: Target | None) -> bool:
    return target is not None and versus is not None and target.overlaps(versus)


def _own_target(scope: Scope, lin: Linearization) -> Target | None:
    """What the prediction itself says is explained, where the scope names no target."""
    if scope.named_targets(lin.model, lin.vocab)[0] is not None:
        return None
    return lin.answer if isinstance(lin, Span) else Target((lin.token(),))


def _nothing(scope: Scope, lin: Linearization, target: Target | None, versus: Target | None) -> Attribution:
    """The answer about the difference of a token and itself, or of a token and several, itself among them."""
    assert target is not None
    assert versus is not None
    zeros = lin.readout.new_zeros(len(lin.tokens))
    details = {"signed": zeros} if scope.grouping == "signed" else {}
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
