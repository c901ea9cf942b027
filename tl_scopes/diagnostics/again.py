"""The prediction that an answer is about, made anew."""

import ast
import math

import torch

import tl_scopes
from tl_scopes.api import linearize
from tl_scopes.jacobian.linearization import Linearization
from tl_scopes.models import Model
from tl_scopes.results.attribution import Attribution
from tl_scopes.scopes.scope import Scope


def linearize_again(answer: Attribution, model: Model | None) -> tuple[Linearization, Scope | None]:
    """The linearisation that an answer came from, and its scope, where it is known.

    Cost: one forward pass.

    Raises:
        ValueError: without a model; for an answer that lacks tokens and does not know its prompt; where the model
            computes something else than it did. Else as `linearize` does.
    """
    origin = answer._origin
    found = model if model is not None or origin is None else origin.model()
    if found is None:
        why = "was read from JSON or a pickle" if origin is None else "has outlived its model"
        raise ValueError(f"this answer {why}, and its checks run the model again: pass it, answer.checks(model).")
    absent = set(range(answer.position + 1)) - set(answer.positions)
    if origin is None and absent:
        raise ValueError(
            f"this answer lacks the token at position {min(absent)}, and no longer knows its prompt: check the whole "
            "one, or cut it (`without`) after reading it."
        )
    tokens, checkpoint = (answer.tokens, False) if origin is None else (origin.tokens, origin.checkpointed)
    lin = linearize(found, tokens, wrt=answer.wrt, of=answer.of, checkpoint=checkpoint)
    _require_same(answer, lin)
    scope = read_scope(answer.scope) if origin is None else origin.scope
    # What was the most likely token then may be a near tie.
    return lin, scope if scope is None or answer.target is None else scope.aimed(lin, answer.target.id)


def _require_same(answer: Attribution, lin: Linearization) -> None:
    """Refuse a model that computes something else than it did, be it the hooks, the weights or another point.

    Raises:
        ValueError: then.
    """
    eps = max(torch.finfo(dtype).eps for dtype in (lin.readout.dtype, getattr(torch, answer.dtype)))
    closeness, said = max(eps, 1e-7) ** 0.5, ""
    if lin.trace.logits is not None:
        tolerance = closeness * float(lin.logits.where(lin.logits.isfinite(), 0).abs().max())
        for token, p in answer.predictions:
            now = float(lin.log_probs[token.id]) if token.id < len(lin.log_probs) else -math.inf
            if p > 0 and not abs(now - math.log(p)) <= tolerance:
                said = said or f"p({token.text!r}) was {p:.3g} and is {math.exp(now):.3g}"
    elif answer._origin is not None:
        then, norm = answer._origin.readout_norm, float(lin.readout.float().norm())
        said = "" if abs(norm - then) <= closeness * then else f"‖y‖ at {lin.of!r} was {then:.4g} and is {norm:.4g}"
    if said:
        raise ValueError(
            f"the model computes something else now than for this answer, {said}: hooks or weights have changed, or "
            "the answer is of another point (`Linearization.at`). Check it inside the same model.hooks(...)."
        )


def read_scope(text: str) -> Scope | None:
    """A public scope from how it is written in Python; None for others, and where tensors are among its options.

    Example:
        >>> from tl_scopes.diagnostics.again import read_scope
        >>> read_scope("SemanticScope(target=' are')")
        SemanticScope(target=' are')
        >>> read_scope("__import__('os').remove('file')")
    """
    try:
        call = ast.parse(text, mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            return None
        kind = getattr(tl_scopes, call.func.id) if call.func.id in tl_scopes.__all__ else None
        if not isinstance(kind, type) or not issubclass(kind, Scope):
            return None
        return kind(**{option.arg: ast.literal_eval(option.value) for option in call.keywords if option.arg})
    except (SyntaxError, ValueError, TypeError):
        return None
