"""One prompt in, answers out: `linearize` and ask; or `attribute`, or `attribution_map`, in one line."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, SupportsIndex

from tl_scopes import models
from tl_scopes.answers import AnswerMap
from tl_scopes.jacobian.linearization import Linearization, linearize_places, linearize_prompt
from tl_scopes.jacobian.span import Exchange, Span, linearize_answers
from tl_scopes.models import Answer, Generated, LinearRules, Model, Prompt, ReadPrompt, Rules, Target
from tl_scopes.models.arguments import as_flag
from tl_scopes.results.attribution import Attribution
from tl_scopes.results.attribution_map import AttributionMap
from tl_scopes.scopes.own_foil import ask_each
from tl_scopes.scopes.scope import Scope, require_scope, warn
from tl_scopes.scopes.semantic import SemanticScope
from tl_scopes.scopes.written import as_written


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
    rules: Rules = None,
) -> Linearization:
    """Linearise a model at a prompt: y(x + δ) ≈ y + Σ_t J_t δ_t.

    Args:
        model: a `HookedTransformer` or a `TransformerBridge`, in evaluation mode. It is left as found; hooks that you
            have set act, so that inside `model.hooks(...)` the patched model is explained.
        prompt: text; token ids in a list or a tensor; what a tokenizer returned for one text; or a chat, a list of
            messages such as {"role": "user", "content": "Hello!"}, which the tokenizer's template writes. What the
            template says by itself, a default system prompt too, counts as template and not as "system".
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
            by its square. At a hook that is divided into heads, [batch pos head d_head] ("blocks.3.attn.hook_z", and
            hook_q, hook_k, hook_v), a token's vector is that of all heads, one after another: its score is the norm
            over them, `lin.vjp(...).unflatten(-1, (heads, -1))` has them apart, and so has `tls.head_map`.
        of: the hook where the value is read. The paper's is the final norm, "ln_final": whatever the unembedding reads,
            also in models without a final norm. At a hook that is divided into heads y is theirs, one after another, so
            that a direction of one head is zero for the others.
        prepend_bos: whether text gets a BOS token in front; None is TransformerLens' own default for the model, which
            is True for most, also where the tokenizer alone adds none (SmolLM2). Ids are taken as they are.
        checkpoint: for long prompts, keep only the residual stream between blocks, and run each block again in every
            backward pass: the same numbers from far less memory.
        rules: what differentiates the model in place of some of its own derivatives; the values stay, bit for bit.
            "linear" makes constant what only rescales or routes, so that the network is linear at this prompt and
            inputs times derivatives add up to the logit (`RelevanceScope`): the denominators of norms, the secants
            act(x)/x of activations, attention patterns, and each factor of a gated product in turn, half and half.
            "lookup" keeps what moves attention, with both products of attention shared out in halves instead: it finds
            what is found by looking it up, and nothing adds up. Single rules may be chosen too: ("norms", "patterns").
            None, the default, is the Jacobian itself, as in the paper.

    Cost: one forward pass; the unembedding runs at one position, or where the answer's tokens are predicted. Where the
        graph could come close to the memory there is, it is measured first in passes over an eighth of the prompt. Then
        one setting outlasts the call, for the whole process: on Linux the C library (glibc) is told to hand memory back
        to the system when a tensor of 1 MiB or more is freed, which it has no way to take back. See "How it works".

    Raises:
        TypeError: for something that is not a TransformerLens model, a compiled model, an encoder; for something that
            is not a prompt; for a position that is not an integer; for an option that is not a bool.
        ValueError: for a model in training mode; an empty or too long prompt or answer, ids or a position out of range;
            a chat without a template, or with an unknown role; a hook that does not exist, never fires, or does not
            influence `of`; NaN or infinite activations; unknown rules, and a model in which they do not know an
            operation, with the module that runs it.
        MemoryError: when the graph will not fit, with an estimate and the remedies.
        RuntimeError: under `torch.inference_mode`.

    Source: Liu et al. 2026 (arXiv:2601.16407), section 2. Rules: Achtibat et al. 2024 (arXiv:2402.05602), AttnLRP;
        Rezaei Jafari et al. 2025 (arXiv:2508.21258), RelP. The authors of LXT, the code of AttnLRP, say that layer-wise
        relevance propagation is patented, and free for personal and scientific purposes only.

    Example:
        >>> lin = tls.linearize(model, "The keys to the old cabinet near the door")
        >>> lin
        Linearization(ln_final at position 9 wrt hook_embed; 10 tokens, tiny)
        >>> tls.linearize(model, "The keys to the old cabinet near the door", answer=" are old")
        Span(' are old' after position 9; ln_final wrt hook_embed, 2 tokens after 10, tiny)
    """
    models.check_model(model)
    checkpoint, ruled = as_flag(checkpoint, "checkpoint"), LinearRules.read(rules)
    read = models.read_prompt(model, prompt, prepend_bos).up_to(position)
    exchange = None
    if answer is not None:
        said, notes = models.read_answer(model, answer, read.tokens)
        exchange = Exchange.of(model, read._replace(notes=read.notes + notes), said)
    return _linearized(model, read, exchange, wrt, of, as_flag(score_answer, "score_answer"), checkpoint, ruled)


def attribute(
    model: Model,
    prompt: Prompt,
    scope: Scope = SemanticScope(),
    position: int | SupportsIndex = -1,
    *,
    answer: Answer | None = None,
    score_answer: bool = False,
    wrt: str = models.EMBEDDING,
    of: str = models.READOUT,
    prepend_bos: bool | None = None,
    checkpoint: bool = False,
    rules: Rules = None,
) -> Attribution:
    """`scope(linearize(model, prompt, position))`, in one line.

    Args:
        model: a `HookedTransformer` or a `TransformerBridge`, in evaluation mode.
        prompt: text, token ids in a list or a tensor, or what a tokenizer returned for one text.
        scope: the question, `SemanticScope(target=" are")` say; by default what moves the logit of the likeliest token,
            or the log-probability of an answer.
        position: where the prediction is read.
        answer, score_answer: what is said after the prompt, as in `linearize`: it is explained as a whole.
        wrt, of: the hooks between which the Jacobian is taken, as in `linearize`.
        prepend_bos: whether text gets a BOS token; None is TransformerLens' own default for the model.
        checkpoint, rules: as in `linearize`.

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
    checkpoint, ruled = as_flag(checkpoint, "checkpoint"), LinearRules.read(rules)
    read = models.read_prompt(model, prompt, prepend_bos).up_to(position)
    exchange = _exchange(model, scope, read, answer)
    return scope(_linearized(model, read, exchange, wrt, of, as_flag(score_answer, "score_answer"), checkpoint, ruled))


def attribution_map(
    model: Model,
    prompt: Prompt,
    scope: Scope = SemanticScope(),
    *,
    target: Literal["likeliest", "next"] = "likeliest",
    wrt: str = models.EMBEDDING,
    of: str = models.READOUT,
    prepend_bos: bool | None = None,
    checkpoint: bool = False,
    rules: Rules = None,
) -> AttributionMap:
    """Which token moves which prediction of the prompt: `attribute` at every position, from one forward pass.

    Args:
        model: a `HookedTransformer` or a `TransformerBridge`, in evaluation mode.
        prompt: text, token ids in a list or a tensor, or what a tokenizer returned for one text.
        scope: the question; by default `SemanticScope()`.
        target: what `SemanticScope()` and other questions without a target of their own explain at each position: the
            most likely token after it; or with "next" the token that stands there in the text, and so not at the last
            position, behind which nothing stands. Where that is the scope's `versus` itself, the difference is zero,
            and so is each score of the row; so it is where a set of tokens is `versus`, and has that one in it. A
            warning and a note say where.
        wrt, of: the hooks between which the Jacobian is taken, as in `linearize`.
        prepend_bos: whether text gets a BOS token; None is TransformerLens' own default for the model.
        checkpoint, rules: as in `linearize`.

    Cost: one forward pass, and per position what the scope says; several positions go back together. Memory for
        four copies of token x vocab logits while it is computed.

    Raises: as `attribute` does. ValueError for another `target`, for a text of one token with "next", and for a scope
        whose own target is several tokens, since these are predicted at several positions.
    """
    require_scope(scope)
    models.check_model(model)
    checkpoint, ruled = as_flag(checkpoint, "checkpoint"), LinearRules.read(rules)
    if target not in ("likeliest", "next"):
        raise ValueError(f'target is "likeliest" or "next", got {target!r}: a token is named in the scope.')
    require_one_token(model, scope)
    read = models.read_prompt(model, prompt, prepend_bos)
    if target == "next":
        if len(read.tokens) < 2:
            raise ValueError('the text is one token, behind which nothing stands: target="next" needs two at least.')
        said = Target(tuple(models.token(model, id) for id in read.tokens[1:].tolist()))
        first = read.up_to(0)
        whole = _linearized(model, first, Exchange.of(model, first, said), wrt, of, False, checkpoint, ruled)
        assert isinstance(whole, Span)
        each = [whole.part(k, k + 1) for k in range(len(said))]
        # The text after the first token is not an answer of somebody's, with notes of its own.
        rows = [
            replace(one, parts=read.parts[: k + 1], notes=read.up_to(k).notes, of_answer=False)
            for k, one in enumerate(each)
        ]
        return AttributionMap(_asked(scope, rows))
    places = [(0, position) for position in range(len(read.tokens))]
    lins = linearize_places(model, [read], wrt, of, places, checkpoint=checkpoint, rules=ruled)
    return AttributionMap(_asked(scope, lins))


def answer_map(
    model: Model,
    prompt: Prompt,
    answer: Answer,
    scope: Scope = SemanticScope(),
    *,
    wrt: str = models.EMBEDDING,
    of: str = models.READOUT,
    prepend_bos: bool | None = None,
    checkpoint: bool = False,
    rules: Rules = None,
) -> AnswerMap:
    """Which token moves which token of an answer: one row for each of its tokens, from one forward pass.

    Args:
        model: a `HookedTransformer` or a `TransformerBridge`, in evaluation mode.
        prompt: as in `linearize`; also a chat.
        answer: text, token ids, or what `generate` returned.
        scope: the question. `SemanticScope()`, the default, explains the log-probability of each token, so that the
            gradient of a span is the sum of those of its rows.
        wrt, of: the hooks between which the Jacobian is taken, as in `linearize`.
        prepend_bos: whether text gets a BOS token; None is TransformerLens' own default for the model.
        checkpoint, rules: as in `linearize`.

    Cost: one forward pass over prompt and answer, and per token of the answer what the scope says; several go back
        together, and through the unembedding all. The map keeps the graph of the pass, from which `rows[" Paris"]` asks
        for a span.

    Raises: as `attribute` does. ValueError for a scope that names a target or a `versus` of its own.

    Example:
        >>> rows = tls.answer_map(model, "The keys to the old cabinet near the door", " are old.", tls.SemanticScope())
        >>> rows
        AnswerMap(' are old.' from SemanticScope(): 3 tokens of the answer, 10 of the prompt)
        >>> rows[" are"].top(1)[0].token, rows.scores.shape
        (' keys', torch.Size([3, 12]))
    """
    require_scope(scope)
    models.check_model(model)
    checkpoint, ruled = as_flag(checkpoint, "checkpoint"), LinearRules.read(rules)
    read = models.read_prompt(model, prompt, prepend_bos)
    if scope.named_targets(model, models.output_size(model))[1] is not None:
        raise ValueError(
            f"{as_written(scope)} compares, and a map has a row for each token of one answer: leave `versus` out, or "
            "compare two answers by attribute."
        )
    if answer is None:
        raise TypeError(
            "answer_map takes the answer whose tokens are the rows, got None: what tls.generate returns, say."
        )
    whole = _linearized(model, read, _exchange(model, scope, read, answer), wrt, of, False, checkpoint, ruled)
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
            those of its `generate`. The likeliest token is taken each time, unless `do_sample=True` is given. It ends
            at `eos_token_id` too.

    Cost: a forward pass per token, with a key-value cache where the model has one.

    Raises: as `linearize` does for prompts. ValueError for max_new_tokens below 1, a prompt that leaves no room in the
        context, where the model says nothing but its end of sequence, for `temperature` and other options of sampling
        without `do_sample=True`, and for several answers and options that are set here. TypeError for
        max_new_tokens that is not an integer.

    Example:
        >>> said = tls.generate(model, "The keys to the old cabinet near the door", 3)
        >>> said.text
        ' are new.'
    """
    models.check_model(model)
    read = models.read_prompt(model, prompt, prepend_bos)
    count = models.as_count(max_new_tokens, "max_new_tokens must be at least 1")
    return Generated.of(model, models.generate(model, read.tokens, count, **options))


# -- private ----------------------------------------------------------------------------------------------------------


def _linearized(
    model: Model,
    read: ReadPrompt,
    exchange: Exchange | None,
    wrt: str,
    of: str,
    score_answer: bool,
    checkpoint: bool,
    rules: LinearRules | None,
) -> Linearization:
    """The prompt linearised at its last position, or at the tokens of what is said after it.

    Raises:
        ValueError: for `score_answer` without an answer.
    """
    if exchange is None:
        if score_answer:
            raise ValueError("score_answer=True scores the tokens of an answer, and none is given: give answer=.")
        return linearize_prompt(model, read, wrt, of, checkpoint=checkpoint, rules=rules)
    options: dict[str, Any] = {"score_answer": score_answer, "checkpoint": checkpoint, "rules": rules}
    (lin,) = linearize_answers(model, [exchange], wrt, of, **options)
    lin.require_finite()
    return lin


def _exchange(model: Model, scope: Scope, read: ReadPrompt, answer: Answer | None) -> Exchange | None:
    """The prompt and what is said after it, an answer given or one that the scope names, where there is one."""
    said = None
    if answer is not None:
        said, notes = models.read_answer(model, answer, read.tokens)
        read = read._replace(notes=read.notes + notes)
    return scope.exchange(model, read, said, vocab=models.output_size(model))


def require_one_token(model: Model, scope: Scope) -> None:
    """Refuse a scope whose target is several tokens, for a map.

    Raises:
        ValueError: with what to do instead.
    """
    for target in scope.named_targets(model, models.output_size(model)):
        if target is not None and target.is_span:
            raise ValueError(
                f"the target {target.text!r} is {len(target)} tokens, which are predicted at several positions, and a "
                "map asks at each position: call attribute, or answer_map for the tokens of an answer."
            )


def _asked(scope: Scope, lins: Sequence[Linearization]) -> tuple[Attribution, ...]:
    for lin in lins:
        lin.require_finite()
    answers = ask_each(scope, lins)
    warn(scope, answers)
    return tuple(answers)
