"""The two functions to begin with: `linearize`, then ask; or `attribute`, both in one line."""

from collections.abc import Iterable, Mapping
from typing import SupportsIndex

from tl_scopes import models
from tl_scopes.jacobian.linearization import Linearization, linearize_places
from tl_scopes.models import Model, Prompt
from tl_scopes.results.attribution import Attribution
from tl_scopes.scopes.scope import Scope, as_written


def linearize(
    model: Model,
    prompt: Prompt,
    position: SupportsIndex = -1,
    *,
    wrt: str = "hook_embed",
    of: str = models.READOUT,
    prepend_bos: bool | None = None,
    checkpoint: bool = False,
) -> Linearization:
    """Linearise a model at a prompt: y(x + δ) ≈ y + Σ_t J_t δ_t.

    Args:
        model: a `HookedTransformer` or a `TransformerBridge`, in evaluation mode. It is left as found; hooks that you
            have set act, so that inside `model.hooks(...)` the patched model is explained.
        prompt: text, a list of token ids, or a tensor of them.
        position: where the prediction is read; tokens after it are not run, since they cannot matter.
        wrt: the hook where perturbations enter. The paper's is the token embedding, "hook_embed"; any hook with a
            [batch pos d] value will do, "blocks.3.hook_resid_pre" say. On a bridge the value at "hook_embed" is what
            the embedding module gives out: already scaled by the embedding multiplier of Granite, and already
            normalised where a norm belongs to it (Bloom).
        of: the hook where the value is read. The paper's is the final norm, "ln_final": whatever the unembedding reads,
            also in models without a final norm.
        prepend_bos: whether text gets a BOS token; None is TransformerLens' own default for the model.
        checkpoint: for long prompts, keep only the residual stream between blocks, and run each block again in every
            backward pass: the same numbers from far less memory.

    Cost: one forward pass; the unembedding runs at one position.

    Raises:
        TypeError: no TransformerLens model, a compiled one, an encoder; no prompt; no integer position.
        ValueError: a model in training mode; an empty or too long prompt, ids or a position out of range; a hook that
            does not exist, never fires, or does not influence `of`; NaN or infinite activations.
        MemoryError: when the graph will not fit, with an estimate and the remedies.
        RuntimeError: under `torch.inference_mode`.

    Source: Liu et al. 2026 (arXiv:2601.16407), section 2.

    Example:
        >>> lin = tls.linearize(model, "The keys to the old cabinet near the door")
        >>> lin
        Linearization(ln_final at position 9 wrt hook_embed; 10 tokens, tiny)
    """
    models.check_model(model)
    tokens = models.tokenize(model, prompt, prepend_bos)
    position = models.as_int(position, "position must be an integer")
    if not -len(tokens) <= position < len(tokens):
        raise ValueError(
            f"position {position} is out of range: the prompt has {len(tokens)} tokens, "
            f"so it runs from 0 to {len(tokens) - 1}, or from -{len(tokens)} to -1."
        )
    tokens = tokens[: position % len(tokens) + 1]
    str_tokens = tuple(models.token_text(model, id) for id in tokens.tolist())
    (lin,) = linearize_places(model, tokens[None], [str_tokens], wrt, of, checkpoint=checkpoint)
    lin.require_finite()
    return lin


def attribute(
    model: Model,
    prompt: Prompt,
    scope: Scope,
    position: SupportsIndex = -1,
    *,
    prepend_bos: bool | None = None,
    checkpoint: bool = False,
) -> Attribution:
    """`scope(linearize(model, prompt, position))`, in one line.

    Args:
        model: a `HookedTransformer` or a `TransformerBridge`, in evaluation mode.
        prompt: text, a list of token ids, or a tensor of them.
        scope: the question, `SemanticScope(target=" are")` say.
        position: where the prediction is read.
        prepend_bos: whether text gets a BOS token; None is TransformerLens' own default for the model.
        checkpoint: as in `linearize`.

    Cost: one forward pass and what the scope says.

    Raises:
        TypeError: for a scope that is none. Else as `linearize` and the scope do.

    Example:
        >>> tls.attribute(model, "The keys to the old cabinet near the door", tls.SemanticScope()).target.text
        ' are'
    """
    require_scope(scope)
    return scope(linearize(model, prompt, position, prepend_bos=prepend_bos, checkpoint=checkpoint))


def require_scope(scope: object) -> None:
    """Refuse what is no scope.

    Raises:
        TypeError: with a hint for a scope's class.
    """
    if not isinstance(scope, Scope):
        hint = f": write {scope.__name__}()" if isinstance(scope, type) else ""
        raise TypeError(f"expected a scope such as SemanticScope(), got {scope!r}{hint}.")


def names(scopes: Scope | Iterable[Scope] | Mapping[str, Scope]) -> dict[str, Scope]:
    """Scopes by name: as given, or as they are written.

    Raises:
        ValueError: none at all, or two of the same name.
        TypeError: for one that is no scope.
    """
    given = scopes.values() if isinstance(scopes, Mapping) else scopes
    listed = list(given) if isinstance(given, Iterable) else [given]
    if not listed:
        raise ValueError("there are no scopes to evaluate: give one at least, [SemanticScope()] say.")
    for scope in listed:
        require_scope(scope)
    if isinstance(scopes, Mapping):
        return dict(scopes)
    named = {as_written(scope): scope for scope in listed}
    if len(named) < len(listed):
        raise ValueError(f"there are {len(listed)} scopes and {len(named)} names: name them, in a dict.")
    return named
