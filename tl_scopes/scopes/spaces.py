"""Notes on the texts by which a scope names tokens, where they lack the space with which the model writes them.

This is a file of its own since `TargetScope` and `HetaScope` both name tokens, and neither is the other.
"""

from collections.abc import Set
from typing import Any

from tl_scopes import models
from tl_scopes.jacobian.linearization import Linearization
from tl_scopes.jacobian.span import Span


def notes_on_spaces(lin: Linearization, *named: Any) -> tuple[str, ...]:
    """A note for each text that names a token and lacks the space with which the model writes it.

    A span notes the same about its own answers, which therefore get no second note.

    Args:
        lin: the linearisation that is asked.
        named: the options by which the scope names tokens. Ids mean what they say, and get no note.
    """
    if lin.trace.logits is None:
        return ()
    first = lin.single[0]
    read = [
        models.read_target(lin.model, one, lin.vocab)
        for one in named
        if isinstance(one, str) or (isinstance(one, Set) and all(isinstance(member, str) for member in one))
    ]
    noted = [one for one in (lin.answer, lin.against) if one is not None] if isinstance(lin, Span) else []
    new = [one for one in read if one not in noted]
    return models.missing_spaces(lin.model, first.tokens, first.logits, new, noted)
