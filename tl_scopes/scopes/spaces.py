"""Notes on texts that name a token and lack the space with which a model would write it."""

from collections.abc import Set
from typing import Any

from tl_scopes import models
from tl_scopes.jacobian.linearization import Linearization
from tl_scopes.jacobian.span import Span


def notes_on_spaces(lin: Linearization, *named: Any) -> tuple[str, ...]:
    """A note for each text, as which a scope names a token, that lacks the space with which the model would write it.

    Those of a span's answers are among the span's own notes.
    """
    if lin.trace.logits is None:
        return ()
    first = lin.single[0]
    read = [
        models.read_target(lin.model, one, lin.vocab)
        for one in named
        if isinstance(one, str) or (isinstance(one, Set) and all(isinstance(member, str) for member in one))
    ]
    known = (lin.answer, lin.against) if isinstance(lin, Span) else ()
    others = [*read, *(one for one in known if one is not None)]
    return tuple(
        note
        for one in read
        if one not in known
        for other in [next((other for other in others if other != one), None)]
        for note in models.missing_space(lin.model, first.tokens, first.logits, one, other)
    )
