"""One prompt in, answers out: `linearize` and ask; or `attribute`, or `attribution_map`, in one line."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, SupportsIndex

from tl_scopes import models
from tl_scopes.answers import AnswerMap
from tl_scopes.jacobian.linearization import Linearization, linearize_places, linearize_tokens
from tl_scopes.jacobian.span import Exchange, Span, linearize_answers
from tl_scopes.models import Answer, Generated, Model, Prompt, ReadPrompt, Target
from tl_scopes.models.arguments import as_flag
from tl_scopes.results.attribution import Attribution
from tl_scopes.results.attribution_map import AttributionMap
from tl_scopes.scopes.scope import Scope, as_written, require_scope, warn


def linearize(
    model: Model,
    prompt: Prompt,
    position: int | SupportsIndex = -1,
    *,
    answer: Answer | None = None,
    score_answer: bool = False,
    wrt: str = models.EMBEDDING,
    of: str = models.READOUT,
    prepend_bos: bool | None = None,
    checkpoint: bool = False,
) -> Linearization:
    """Linearise a model at a prompt: y(x + δ) ≈ y + Σ_t J_t δ_t.

    Args:
        model: a `HookedTransformer` or a `TransformerBridge`, in evaluation mode. It is left as found; hooks that you
            have set act, so that inside `model.hooks(...)` the patched model is explained.
        prompt: text; token ids in a list or a tensor; what a tokenizer returned for one text; or a chat, a list of
            messages such as {"role": "user", "content": "Hello!"}, which the tokenizer's template writes.
        position: where the prediction is read; tokens after it are not run, since they cannot matter.
        answer: text or token ids that follow the prompt: then this is the `Span` of all predictions of the answer's
            tokens, each given the ones before it, and scopes ask about all of them together. It is tokenised apart from
            the prompt, with a note where that makes a difference.
        score_answer: whether the answer's own tokens get scores too, beside those of the prompt.
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

    Cost: one forward pass; the unembedding runs at one position, or where the answer's tokens are predicted.

    Raises:
        TypeError: for something that is not a TransformerLens model, a compiled model, an encoder; for something that
            is not a prompt; for a position that is not an integer; for an option that is not a bool.
        ValueError: for a model in training mode; an empty or too long prompt or answer, ids or a position out of range;
            a chat without a template, or with an unknown role; a hook that does not exist, never fires, or does not
            influence `of`; NaN or infinite activations.
        MemoryError: when the graph will not fit, with an estimate and the remedies.
        RuntimeError: under `torch.inference_mode`.

    Source: Liu et al. 2026 (arXiv:2601.16407), section 2.

    Example:
        >>> lin = tls.linearize(model, "The keys to the old cabinet near the door")
        >>> lin
        Linearization(ln_final at position 9 wrt hook_embed; 10 tokens, tiny)
        >>> tls.linearize(model, "The keys to the old cabinet near the door", answer=" are old")
        Span(' are old' after position 9; ln_final wrt hook_embed, 2 tokens after 10, tiny)
    """
    models.check_model(model)
    prepend_bos, checkpoint = _flags(prepend_bos, checkpoint)
    read = _read(model, prompt, position, prepend_bos)
    said = None if answer is None else models.read_answer(model, answer, _whole(prompt, read), read.tokens)
    return _linearized(model, read, said, None, wrt, of, as_flag(score_answer, "score_answer"), checkpoint)


def attribute(
    model: Model,
    prompt: Prompt,
    scope: Scope,
    position: int | SupportsIndex = -1,
    *,
    answer: Answer | None = None,
    score_answer: bool = False,
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
        answer, score_answer: what is said after the prompt, as in `linearize`: it is explained as a whole.
        wrt, of: the hooks between which the Jacobian is taken, as in `linearize`.
        prepend_bos: whether text gets a BOS token; None is TransformerLens' own default for the model.
        checkpoint: as in `linearize`.

    Cost: one forward pass, over prompt and answer where there is one, and what the scope says. The answer to a target
        of several tokens costs no second pass here.

    Raises:
        TypeError: for something that is not a scope. ValueError for an answer together with a scope that names another
            target. Else as `linearize` and the scope do.

    Example:
        >>> prompt = "The keys to the old cabinet near the door"
        >>> tls.attribute(model, prompt, tls.SemanticScope()).target.text
        ' are'
        >>> tls.attribute(model, prompt, tls.SemanticScope(versus=" is old"), answer=" are old").quantity
        "log p(' are old') − log p(' is old')"
    """
    require_scope(scope)
    models.check_model(model)
    prepend_bos, checkpoint = _flags(prepend_bos, checkpoint)
    read = _read(model, prompt, position, prepend_bos)
    said, against = _explained(model, scope, read, prompt, answer)
    return scope(_linearized(model, read, said, against, wrt, of, as_flag(score_answer, "score_answer"), checkpoint))


def attribution_map(
    model: Model,
    prompt: Prompt,
    scope: Scope,
    *,
    target: Literal["likeliest", "next"] = "likeliest",
    wrt: str = models.EMBEDDING,
    of: str = models.READOUT,
    prepend_bos: bool | None = None,
    checkpoint: bool = False,
) -> AttributionMap:
    """Which token moves which prediction of the prompt: `attribute` at every position, from one forward pass.

    Args:
        model: a `HookedTransformer` or a `TransformerBridge`, in evaluation mode.
        prompt: text, token ids in a list or a tensor, or what a tokenizer returned for one text.
        scope: the question.
        target: what `SemanticScope()` and other questions without a target of their own explain at each position: the
            most likely token after it; or with "next" the token that stands there in the text, and so not at the last
            position, behind which nothing stands.
        wrt, of: the hooks between which the Jacobian is taken, as in `linearize`.
        prepend_bos: whether text gets a BOS token; None is TransformerLens' own default for the model.
        checkpoint: as in `linearize`.

    Cost: one forward pass, and per position what the scope says; several positions go back together. Memory for
        four copies of token x vocab logits while it is computed.

    Raises: as `attribute` does. ValueError for another `target`, for a text of one token with "next", and for a scope
        whose own target is several tokens, since these are predicted at several positions.
    """
    require_scope(scope)
    models.check_model(model)
    prepend_bos, checkpoint = _flags(prepend_bos, checkpoint)
    if target not in ("likeliest", "next"):
        raise ValueError(f'target is "likeliest" or "next", got {target!r}: a token is named in the scope.')
    _require_one_token(model, scope)
    read = _read(model, prompt, -1, prepend_bos)
    if target == "next":
        if len(read.tokens) < 2:
            raise ValueError('the text is one token, behind which nothing stands: target="next" needs two at least.')
        said = Target(tuple(models.token(model, id) for id in read.tokens[1:].tolist()))
        whole = _linearized(model, read._replace(tokens=read.tokens[:1]), (said, ()), None, wrt, of, False, checkpoint)
        assert isinstance(whole, Span)
        rows = [replace(whole.part(k, k + 1), parts=read.parts[: k + 1], of_answer=False) for k in range(len(said))]
        return AttributionMap(_asked(scope, rows))
    texts = tuple(models.token_text(model, id) for id in read.tokens.tolist())
    places = [(0, position) for position in range(len(read.tokens))]
    lins = linearize_places(
        model, read.tokens[None], [texts], wrt, of, places=places, checkpoint=checkpoint, notes=[read.notes]
    )
    return AttributionMap(_asked(scope, [replace(lin, parts=read.parts[: lin.position + 1]) for lin in lins]))


def answer_map(
    model: Model,
    prompt: Prompt,
    answer: Answer,
    scope: Scope,
    *,
    wrt: str = models.EMBEDDING,
    of: str = models.READOUT,
    prepend_bos: bool | None = None,
    checkpoint: bool = False,
) -> AnswerMap:
    """Which token moves which token of an answer: one row for each token said, from one forward pass.

    Args:
        model: a `HookedTransformer` or a `TransformerBridge`, in evaluation mode.
        prompt: as in `linearize`; also a chat.
        answer: text, token ids, or what `generate` returned.
        scope: the question. `SemanticScope()` explains the log-probability of each token, so that the gradient of a
            span is the sum of those of its rows.
        wrt, of: the hooks between which the Jacobian is taken, as in `linearize`.
        prepend_bos: whether text gets a BOS token; None is TransformerLens' own default for the model.
        checkpoint: as in `linearize`.

    Cost: one forward pass over prompt and answer, and per token of the answer what the scope says; several go back
        together. The map keeps the graph of the pass, from which `rows[" Paris"]` asks for a span.

    Raises: as `attribute` does. ValueError for a scope that names a target or a `versus` of its own.

    Example:
        >>> rows = tls.answer_map(model, "The keys to the old cabinet near the door", " are old.", tls.SemanticScope())
        >>> rows
        AnswerMap(' are old.' from SemanticScope(): 3 tokens said, 10 tokens of the prompt)
        >>> rows[" are"].top(1)[0].token, rows.scores.shape
        (' keys', torch.Size([3, 12]))
    """
    require_scope(scope)
    models.check_model(model)
    prepend_bos, checkpoint = _flags(prepend_bos, checkpoint)
    read = _read(model, prompt, -1, prepend_bos)
    if scope.said(model, models.output_size(model))[1] is not None:
        raise ValueError(
            f"{as_written(scope)} compares, and a map has a row for each token of one answer: leave `versus` out, or "
            "compare two answers by attribute."
        )
    if answer is None:
        raise TypeError(
            "answer_map takes the answer whose tokens are the rows, got None: what tls.generate returns, say."
        )
    said, _ = _explained(model, scope, read, prompt, answer)
    whole = _linearized(model, read, said, None, wrt, of, False, checkpoint)
    assert isinstance(whole, Span)
    return AnswerMap.of(scope, whole)


def generate(
    model: Model,
    prompt: Prompt,
    max_new_tokens: int | SupportsIndex = 50,
    *,
    prepend_bos: bool | None = None,
    **options: Any,
) -> Generated:
    """What the model says after a prompt, by its own generation; it goes straight into `answer_map`.

    Args:
        model: a `HookedTransformer` or a `TransformerBridge`, in evaluation mode.
        prompt: as in `linearize`; also a chat.
        max_new_tokens: how many tokens at most. It ends earlier where the model says its end of sequence.
        prepend_bos: whether text gets a BOS token; None is TransformerLens' own default for the model.
        options: for the model's own method: of a bridge those of Hugging Face's `generate`, of a HookedTransformer
            those of its `generate`. Without any the likeliest token is taken each time.

    Cost: a forward pass per token, with a key-value cache where the model has one.

    Raises: as `linearize` does for prompts. ValueError for max_new_tokens below 1, a prompt that leaves no room in the
        context, and where the model says nothing but its end of sequence.

    Example:
        >>> said = tls.generate(model, "The keys to the old cabinet near the door", 3)
        >>> said.text
        ' are new.'
    """
    models.check_model(model)
    read = _read(model, prompt, -1, _flags(prepend_bos, False)[0])
    count = models.as_count(max_new_tokens, "max_new_tokens must be at least 1")
    return Generated.of(model, models.generate(model, read.tokens, count, **options))


# -- private ----------------------------------------------------------------------------------------------------------


def _read(model: Model, prompt: Prompt, position: int | SupportsIndex, prepend_bos: bool | None) -> ReadPrompt:
    """The prompt, up to the position."""
    read = models.read_prompt(model, prompt, prepend_bos)
    length = models.as_position(position, len(read.tokens)) + 1
    is_cut = length < len(read.tokens)
    return read._replace(tokens=read.tokens[:length], parts=read.parts[:length], is_cut=is_cut)


def _whole(prompt: Prompt, read: ReadPrompt) -> Prompt:
    """The prompt, or where it was cut at a position the token ids that are left."""
    return read.tokens if read.is_cut else prompt


def _linearized(
    model: Model,
    read: ReadPrompt,
    said: tuple[Target, tuple[str, ...]] | None,
    against: Target | None,
    wrt: str,
    of: str,
    score_answer: bool,
    checkpoint: bool,
) -> Linearization:
    """The prompt linearised at its last position, or at the tokens of what is said after it.

    Raises:
        ValueError: for `score_answer` without an answer.
    """
    if said is None:
        if score_answer:
            raise ValueError("score_answer=True scores the tokens of an answer, and none is given: give answer=.")
        lin = linearize_tokens(model, read.tokens, wrt, of, checkpoint=checkpoint, notes=read.notes)
    else:
        target, notes = said
        exchange = Exchange(read.tokens, target, against, read.parts, (*read.notes, *notes))
        exchange.require_answerable(model)
        options = {"score_answer": score_answer, "checkpoint": checkpoint}
        (lin,) = linearize_answers(model, [exchange], wrt, of, **options)
        lin.require_finite()
    return replace(lin, parts=read.parts) if read.parts else lin


def _explained(
    model: Model, scope: Scope, read: ReadPrompt, prompt: Prompt, answer: Answer | None
) -> tuple[tuple[Target, tuple[str, ...]] | None, Target | None]:
    """What is said after the prompt, and what that is compared with, where either is several tokens."""
    target, versus = scope.said(model, models.output_size(model))
    if answer is not None:
        said = models.read_answer(model, answer, _whole(prompt, read), read.tokens)
        if target is not None and target != said[0]:
            raise ValueError(
                f"the answer is {said[0].text!r}, and {as_written(scope)} asks about {target.text!r}: leave one out."
            )
    elif target is not None and (target.is_span or (versus is not None and versus.is_span)):
        said = target, ()
    else:
        return None, None
    several = versus is not None and (versus.is_span or said[0].is_span)
    return said, versus if several else None


def _require_one_token(model: Model, scope: Scope) -> None:
    """Refuse a scope whose target is several tokens, for a map.

    Raises:
        ValueError: with what to do instead.
    """
    for target in scope.said(model, models.output_size(model)):
        if target is not None and target.is_span:
            raise ValueError(
                f"the target {target.text!r} is {len(target)} tokens, which are predicted at several positions, and a "
                "map asks at each position: call attribute, or answer_map for the tokens of an answer."
            )


def _asked(scope: Scope, lins: Sequence[Linearization]) -> tuple[Attribution, ...]:
    for lin in lins:
        lin.require_finite()
    answers = scope.ask(lins)
    warn(scope, answers)
    return tuple(answers)


def _flags(prepend_bos: object, checkpoint: object) -> tuple[bool | None, bool]:
    bos = None if prepend_bos is None else as_flag(prepend_bos, "prepend_bos")
    return bos, as_flag(checkpoint, "checkpoint")
