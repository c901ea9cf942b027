"""One prompt in, answers out: `linearize` and ask; or `attribute`, or `attribution_map`, in one line."""

from typing import SupportsIndex

from tl_scopes import models
from tl_scopes.jacobian.linearization import Linearization, linearize_places, linearize_tokens
from tl_scopes.models import Model, Prompt
from tl_scopes.models.arguments import as_flag
from tl_scopes.results.attribution import Attribution
from tl_scopes.results.attribution_map import AttributionMap
from tl_scopes.scopes.scope import Scope, require_scope, warn


def linearize(
    model: Model,
    prompt: Prompt,
    position: int | SupportsIndex = -1,
    *,
    wrt: str = models.EMBEDDING,
    of: str = models.READOUT,
    prepend_bos: bool | None = None,
    checkpoint: bool = False,
) -> Linearization:
    """Linearise a model at a prompt: y(x + δ) ≈ y + Σ_t J_t δ_t.

    Args:
        model: a `HookedTransformer` or a `TransformerBridge`, in evaluation mode. It is left as found; hooks that you
            have set act, so that inside `model.hooks(...)` the patched model is explained.
        prompt: text, token ids in a list or a tensor, or what a tokenizer returned for one text.
        position: where the prediction is read; tokens after it are not run, since they cannot matter.
        wrt: the hook where perturbations enter. The paper's is the token embedding, "hook_embed"; any hook with a
            [batch pos d] value will do, "blocks.3.hook_resid_pre" say. On a bridge the value at "hook_embed" is what
            the embedding module gives out: already normalised where a norm belongs to it (Bloom, the decoder of
            ModernBERT), positions and norm included for BERT, and on TransformerLens 4, not on 3.9, already scaled by
            the embedding multiplier of Granite, so that Granite's scores on 3.9 are larger by that factor, and Fisher's
            by its square.
        of: the hook where the value is read. The paper's is the final norm, "ln_final": whatever the unembedding reads,
            also in models without a final norm.
        prepend_bos: whether text gets a BOS token; None is TransformerLens' own default for the model.
        checkpoint: for long prompts, keep only the residual stream between blocks, and run each block again in every
            backward pass: the same numbers from far less memory.

    Cost: one forward pass; the unembedding runs at one position.

    Raises:
        TypeError: for something that is not a TransformerLens model, a compiled model, an encoder; for something that
            is not a prompt; for a position that is not an integer; for an option that is not a bool.
        ValueError: for a model in training mode; an empty or too long prompt, ids or a position out of range; a hook
            that does not exist, never fires, or does not influence `of`; NaN or infinite activations.
        MemoryError: when the graph will not fit, with an estimate and the remedies.
        RuntimeError: under `torch.inference_mode`.

    Source: Liu et al. 2026 (arXiv:2601.16407), section 2.

    Example:
        >>> lin = tls.linearize(model, "The keys to the old cabinet near the door")
        >>> lin
        Linearization(ln_final at position 9 wrt hook_embed; 10 tokens, tiny)
    """
    models.check_model(model)
    prepend_bos, checkpoint = _flags(prepend_bos, checkpoint)
    tokens, notes = models.read_prompt(model, prompt, prepend_bos)
    tokens = tokens[: models.as_position(position, len(tokens)) + 1]
    return linearize_tokens(model, tokens, wrt, of, checkpoint=checkpoint, notes=notes)


def attribute(
    model: Model,
    prompt: Prompt,
    scope: Scope,
    position: int | SupportsIndex = -1,
    *,
    wrt: str = models.EMBEDDING,
    of: str = models.READOUT,
    prepend_bos: bool | None = None,
    checkpoint: bool = False,
) -> Attribution:
    """`scope(linearize(model, prompt, position))`, in one line.

    Args:
        model: a `HookedTransformer` or a `TransformerBridge`, in evaluation mode.
        prompt: text, token ids in a list or a tensor, or what a tokenizer returned for one text.
        scope: the question, `SemanticScope(target=" are")` say.
        position: where the prediction is read.
        wrt, of: the hooks between which the Jacobian is taken, as in `linearize`.
        prepend_bos: whether text gets a BOS token; None is TransformerLens' own default for the model.
        checkpoint: as in `linearize`.

    Cost: one forward pass and what the scope says.

    Raises:
        TypeError: for something that is not a scope. Else as `linearize` and the scope do.

    Example:
        >>> tls.attribute(model, "The keys to the old cabinet near the door", tls.SemanticScope()).target.text
        ' are'
    """
    require_scope(scope)
    lin = linearize(model, prompt, position, wrt=wrt, of=of, prepend_bos=prepend_bos, checkpoint=checkpoint)
    return scope(lin)


def attribution_map(
    model: Model,
    prompt: Prompt,
    scope: Scope,
    *,
    wrt: str = models.EMBEDDING,
    of: str = models.READOUT,
    prepend_bos: bool | None = None,
    checkpoint: bool = False,
) -> AttributionMap:
    """Which token moves which prediction of the prompt: `attribute` at every position, from one forward pass.

    Args:
        model: a `HookedTransformer` or a `TransformerBridge`, in evaluation mode.
        prompt: text, token ids in a list or a tensor, or what a tokenizer returned for one text.
        scope: the question. With `SemanticScope()` each position explains the most likely token after it.
        wrt, of: the hooks between which the Jacobian is taken, as in `linearize`.
        prepend_bos: whether text gets a BOS token; None is TransformerLens' own default for the model.
        checkpoint: as in `linearize`.

    Cost: one forward pass, and per position what the scope says; several positions go back together. Memory for
        four copies of token x vocab logits while it is computed.

    Raises: as `attribute` does.
    """
    require_scope(scope)
    models.check_model(model)
    prepend_bos, checkpoint = _flags(prepend_bos, checkpoint)
    tokens, notes = models.read_prompt(model, prompt, prepend_bos)
    texts = tuple(models.token_text(model, id) for id in tokens.tolist())
    places = [(0, position) for position in range(len(tokens))]
    lins = linearize_places(model, tokens[None], [texts], wrt, of, places=places, checkpoint=checkpoint, notes=[notes])
    for lin in lins:
        lin.require_finite()
    answers = scope.ask(lins)
    warn(scope, answers)
    return AttributionMap(tuple(answers))


def _flags(prepend_bos: object, checkpoint: object) -> tuple[bool | None, bool]:
    bos = None if prepend_bos is None else as_flag(prepend_bos, "prepend_bos")
    return bos, as_flag(checkpoint, "checkpoint")
