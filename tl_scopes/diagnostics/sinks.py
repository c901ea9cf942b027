"""Attention sinks: tokens on which most attention rests, whatever they say."""

from collections.abc import Iterable, Mapping
from heapq import nlargest
from typing import SupportsIndex

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_scopes import models
from tl_scopes.diagnostics.sink_report import INTERVENTIONS, SinkReport, can_be_sinks, uniform_mass
from tl_scopes.jacobian.linearization import Linearization, require_linearization
from tl_scopes.jacobian.replacement import divergence, predictions, substitute
from tl_scopes.models import AttentionOutOfReachError, Model
from tl_scopes.models.arguments import as_number
from tl_scopes.results.attribution import Prediction
from tl_scopes.scopes.fingerprint import names_as_written
from tl_scopes.scopes.fisher import FisherScope
from tl_scopes.scopes.scope import Scope
from tl_scopes.scopes.semantic import SemanticScope
from tl_scopes.scopes.temperature import TemperatureScope

_HEADS, _CELLS = 6, 160_000
"""How many patterns a report keeps, and how many numbers they may have in all: what circuitsvis can draw."""


def attention_mass(model: Model, tokens: Int[Tensor, "token"]) -> Float[Tensor, "layer head token"]:
    """How much attention each token draws from those after it, on average:

        α_k = mean over queries i > k of A[i, k]

    No token comes after the last one, whose mass is 0. In float32 (float64 for a float64 model), on the model's device.

    Args:
        model: a checked model.
        tokens: the prompt.

    Unit: a part of a query's attention, from 0 to 1.
    Cost: that of `models.attention_layers`: one forward pass; for a long prompt one for each group of layers whose
        patterns fit into 1 GiB. Of each layer only the result is kept.
    Raises: ValueError for a model without attention patterns, as `models.attention_layers` does.
    Source: Gu et al. 2024 (arXiv:2410.10781), the importance score of their sink metric.
    Departure: there the token's own query counts too (i ≥ k). The first token can only attend to itself, which has
        nothing to do with a sink, and in a prompt of 10 tokens would lift its mass from 0 to 0.1.

    Example:
        >>> from tl_scopes.diagnostics.sinks import attention_mass
        >>> mass = attention_mass(model, model.to_tokens("The keys to the old cabinet near the door")[0])
        >>> mass.shape, bool(mass[..., -1].any())
        (torch.Size([6, 4, 10]), False)
    """
    return torch.stack([mass_of(layer.pattern) for layer in models.attention_layers(model, tokens)])


def mass_of(pattern: Float[Tensor, "head query key"]) -> Float[Tensor, "head key"]:
    """The mean attention that each key gets from the queries after it; 0 where there are none."""
    dtype = models.sum_dtype(pattern)
    after = torch.arange(pattern.shape[-1] - 1, -1, -1, device=pattern.device)
    return pattern.tril(-1).sum(1, dtype=dtype) / after.clamp(min=1)


def sink_report(
    lin: Linearization,
    scopes: Scope | Iterable[Scope] | Mapping[str, Scope] | None = None,
    *,
    early: SupportsIndex = 4,
    threshold: float = 0.3,
) -> SinkReport:
    """Where attention rests at a prompt, what is written from there, how much of each scope's influence the first
    tokens get, and whether the prediction changes without them.

    A head has a *sink* where a token's mass α_k, the attention that it draws from a later token on average (see
    `attention_mass`), is above `threshold`. A position can be a sink if a quarter of the prompt follows it, and more
    than 1/threshold tokens; without that rule, each head that looks back at the token before would have its sinks among
    the last ones.

    Each of the first tokens is changed in four ways, and the report says by how much the prediction changes,
    KL(p ‖ p') in nats:

        removed   the token is taken out of the prompt, and those after it move up
        masked    no later token attends to it, in any layer or head (`models.masked_attention`)
        replaced  the mean embedding of the vocabulary takes the place of its own
        zeroed    its values are zero in every head, and attention stays as it is (`models.zeroed_values`)

    Only the last says what a sink does. When it is removed, masked or replaced the next token becomes the sink: on 21
    prompts of SmolLM2-135M the KL is 0.026 and 0.005 then, whatever sinks do; zeroed it is 0.05 in the median, and 0.94
    on a chat prompt.

    For the first token, removing and masking are the same where only distances between tokens count (rotary positions).

    Args:
        lin: a linearisation at the prompt, from the embedding to the readout.
        scopes: the scopes whose influence is shared out: one, several, or several by name. By default they are
            `SemanticScope`, `TemperatureScope` where the final norm has a gain, and `FisherScope`.
        early: how many tokens from the start to change; at most those before the position.
        threshold: the mass above which a token is a head's sink.

    Unit: masses and shares are parts of a whole; KL in nats.
    Cost: one forward pass (for a long prompt more, see `attention_mass`), the scopes, four forward passes for each of
        the early tokens, and the embedding of the whole vocabulary. Memory for the patterns of one layer at a time (of
        a short prompt for several, up to 1 GiB), beside the graph of the linearisation.
    Raises:
        TypeError: for something that is not a Linearization or not a scope; for an `early` that is not an integer.
        ValueError: for fewer than two tokens up to the position; for an `early` below 1, and a threshold that is not a
            number between 0 and 1; for a linearisation that does not run from the embedding to the readout, that `at`
            moved, or whose model has other hooks or weights by now; for a model in which tokens mix other than by
            attention patterns. Else as the scopes do.
    Source: sinks of Xiao et al. 2023 (arXiv:2309.17453); the threshold of Gu et al. 2024 (arXiv:2410.10781).
    Departure: Gu et al. look at the first token of prompts of 64 tokens; which others may be sinks is our rule. In
        short prompts even uniform attention rests on the first tokens (a fifth on the first of 11): see
        `SinkReport.uniform`.

    Example:
        >>> lin = tls.linearize(model, "The keys to the old cabinet near the door")
        >>> report = tls.sink_report(lin, tls.SemanticScope())
        >>> report
        SinkReport(tiny: 5 of 24 heads have a sink above 30%, at '<|bos|>', 'The', ' keys'; uniform attention puts
        21% on the first of 10 tokens, 1 scope)
        >>> report.to_dataframe()["share SemanticScope()"].round(2).tolist()
        [0.1, 0.19, 0.22, 0.07]
    """
    require_linearization(lin, "sink_report")
    named = None if scopes is None else names_as_written(scopes)
    count = models.as_count(early, "early is how many tokens from the start to look at, 1 at least")
    rule = "threshold is a part of the attention between 0 and 1"
    threshold = as_number(threshold, rule, lambda mass: 0 < mass < 1)
    lin.require_readout()
    if len(lin.single) > 1:
        raise ValueError(
            f"a sink report is about one prediction, and this answer has {len(lin.single)}: ask it of one of "
            "lin.single."
        )
    if lin.wrt != models.EMBEDDING:
        raise ValueError(
            f'sinks are looked for from the embedding on, not from {lin.wrt!r}: linearise with wrt="hook_embed".'
        )
    lin.require_repeatable()
    asked, (lin,) = lin, lin.single  # scopes explain the token that an answer says
    model, tokens = lin.model, len(lin.tokens)
    if tokens < 2:
        raise ValueError(
            f"the prompt has one token up to the position, {lin.str_tokens[0]!r}: nothing comes after it that could "
            "attend to it. Give two tokens at least, or a later position."
        )
    mass, norms, patterns = _attention(model, lin.tokens, can_be_sinks(tokens, threshold))
    notes = [] if float(uniform_mass(tokens)[0]) <= threshold else [_too_short(tokens, threshold)]
    if named is None:
        named = names_as_written([SemanticScope(), TemperatureScope(), FisherScope()])
        if models.has_constant_readout_norm(model):
            del named["TemperatureScope()"]
            notes.append(
                "no TemperatureScope: the final norm has no gain, so that the readout's norm is constant; name "
                'TemperatureScope(norm="logits") among the scopes for the spread of the logits'
            )
    answers = {name: scope(asked) for name, scope in named.items()}
    kl, likeliest, refusals = _interventions(lin, min(count, tokens - 1))
    best = lin.token()
    return SinkReport(
        model=models.model_name(model),
        tokens=lin.tokens.cpu(),
        str_tokens=lin.str_tokens,
        position=lin.position,
        threshold=threshold,
        mass=mass,
        value_norms=norms,
        answers=answers,
        prediction=Prediction(best, float(lin.log_probs[best.id].exp())),
        kl=kl,
        likeliest=likeliest,
        patterns=patterns,
        notes=(*notes, *refusals),
    )


def _attention(
    model: Model, tokens: Tensor, eligible: Tensor
) -> tuple[
    Float[Tensor, "layer head token"], Float[Tensor, "layer head token"], dict[tuple[int, int], Float[Tensor, "_ _"]]
]:
    """Masses, value norms, and the patterns of the heads with the strongest sinks, strongest first."""
    mass, norms = [], []
    kept: list[tuple[float, int, int, Tensor]] = []
    count = min(_HEADS, _CELLS // len(tokens) ** 2)
    for layer in models.attention_layers(model, tokens):
        mass.append(mass_of(layer.pattern).cpu())
        norms.append(layer.written_norms().cpu())
        strengths = mass[-1][:, eligible if eligible.any() else slice(1)].amax(-1).tolist()
        found = [(strength, layer.layer, head, layer.pattern[head]) for head, strength in enumerate(strengths)]
        strongest = nlargest(count, [*kept, *found], key=lambda of_one: of_one[0])
        # They are copies, since a view of one head would keep the patterns of all.
        kept = [(s, at, head, pattern.to(mass[-1], copy=True)) for s, at, head, pattern in strongest]
    return torch.stack(mass), torch.stack(norms), {(layer, head): pattern for _, layer, head, pattern in kept}


def _interventions(lin: Linearization, early: int) -> tuple[Tensor, tuple[tuple[str, ...], ...], list[str]]:
    """KL and the most likely next token for each intervention and early token, and what could not be done.

    Cost: four forward passes per token, and the embedding of the vocabulary.
    """
    model, tokens, mean = lin.model, lin.tokens[None], substitute(lin, "mean")

    def removed(i: int) -> Tensor:
        return models.predict(model, torch.cat([tokens[:, :i], tokens[:, i + 1 :]], dim=1))

    def masked(i: int) -> Tensor:
        with models.masked_attention(model, [i]):
            return models.predict(model, tokens)

    def replaced(i: int) -> Tensor:
        kept = torch.arange(len(lin.tokens), device=lin.tokens.device) != i
        return next(predictions(lin, mean, kept[None, :, None]))

    def zeroed(i: int) -> Tensor:
        with models.zeroed_values(model, [i]):
            return models.predict(model, tokens)

    ways = {"removed": removed, "masked": masked, "replaced": replaced, "zeroed": zeroed}
    kl = torch.full((len(INTERVENTIONS), early), torch.nan, dtype=torch.float64, device="cpu")
    likeliest, refusals = [], dict[str, None]()
    for row, name in zip(kl, INTERVENTIONS, strict=True):
        texts = [""] * early
        for i in range(early):
            try:
                logits = ways[name](i)[0]
            except AttentionOutOfReachError as error:
                refusals[f"some tokens could not be {name}: {str(error).rstrip('.')}"] = None
                continue
            row[i] = divergence(lin.log_probs, logits.to(lin.log_probs).log_softmax(-1)).cpu()
            texts[i] = lin.token(logits.argmax()).text
        likeliest.append(tuple(texts))
    return kl, tuple(likeliest), [*refusals]


def _too_short(tokens: int, threshold: float) -> str:
    return (
        f"in a prompt of {tokens} tokens even uniform attention puts {float(uniform_mass(tokens)[0]):.0%} on the "
        f"first: a threshold of {threshold:.0%} says little"
    )
