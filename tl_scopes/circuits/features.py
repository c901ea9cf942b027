"""Features of the stream: sparse autoencoders and Jacobian lenses, from the prompt's tokens and to the prediction."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor

from tl_scopes import models
from tl_scopes.circuits.cut import steepest
from tl_scopes.circuits.question import question_of, require_one_prediction
from tl_scopes.circuits.source_tokens import Sources, as_positions
from tl_scopes.jacobian import pullback
from tl_scopes.jacobian.linearization import Linearization, linearize_prompt, takes_a_model
from tl_scopes.jacobian.tensor_arguments import require_finite, require_real, require_shape
from tl_scopes.models import Model, Prompt, Provenance, Rules, Work
from tl_scopes.models.arguments import require_name
from tl_scopes.models.linear_rules import under
from tl_scopes.scopes.direction import DirectionScope
from tl_scopes.scopes.fisher import FisherScope
from tl_scopes.scopes.scope import Scope, require_scope
from tl_scopes.scopes.written import as_written
from tl_scopes.views import feature_map as card
from tl_scopes.views.markup import saved

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Encode = Callable[[Float[Tensor, "token ..."]], Float[Tensor, "token feature"]]
"""From what stands at a hook to the activations of features."""


@dataclass(frozen=True, eq=False, repr=False)
class Features:
    """Features that are read, and perhaps written, at a hook h:

        a = max(0, E h + b),   h ≈ Σ_f a_f d_f + …

    with an encoder row E_f and a decoder row d_f for each feature f. `Features.of_sae` takes them from a sparse
    autoencoder of SAELens, with its own activation function.

    Args:
        encoder: E, [feature d]. At a hook that is divided into heads d goes over all heads, one after another.
        hook: where h stands, "blocks.3.hook_resid_post" say.
        bias: b, [feature]; None is zero. Where an autoencoder takes its decoder's bias off first, b holds −E b_dec too.
        decoder: [feature d], the rows d_f; None where it is not known what features write.
        encode: from h [token ...] to the activations [token feature], where these are not max(0, E h + b). It gives one
            for each row of the encoder, and torch must be able to differentiate it.
        name: what the features are called together.

    Raises:
        TypeError: for vectors that are not tensors, and a hook that is not a str.
        ValueError: for vectors of another shape, that are not real or not finite.

    Example:
        >>> E = torch.eye(128)[:20]
        >>> tls.Features(E, "blocks.3.hook_resid_post", decoder=E)
        Features(20 of 128 dimensions at blocks.3.hook_resid_post)
    """

    encoder: Float[Tensor, "feature d"]
    hook: str
    bias: Float[Tensor, " feature"] | None = None
    decoder: Float[Tensor, "feature d"] | None = None
    encode: Encode | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        require_real(self.encoder, "an encoder", "[feature d]")
        if self.encoder.ndim != 2:
            raise ValueError(f"an encoder has a row for each feature, [feature d], got {list(self.encoder.shape)}.")
        count, width = self.encoder.shape
        for what, value, shape in (("a bias", self.bias, [count]), ("a decoder", self.decoder, [count, width])):
            if value is None:
                continue
            require_real(value, what, str(shape))
            if list(value.shape) != shape:
                raise ValueError(
                    f"{what} of these {count} features of {width} dimensions has the shape {shape}, got "
                    f"{list(value.shape)}: each feature has a row."
                )
            require_finite(value, what)
        require_finite(self.encoder, "an encoder")
        require_name(self.name, "features")
        if not isinstance(self.hook, str):
            raise TypeError(f"features belong to the hook where they are read, named by a str, got {self.hook!r}.")

    def __repr__(self) -> str:
        count, width = self.encoder.shape
        called = "" if self.name is None else f"{self.name}: "
        return f"Features({called}{count} of {width} dimensions at {self.hook})"

    @classmethod
    def of_sae(cls, sae: Any, hook: str | None = None) -> "Features":
        """The features of a sparse autoencoder of SAELens, which has W_enc, W_dec and `encode`.

        Args:
            sae: the autoencoder.
            hook: where it belongs; None is what its own configuration says.

        Raises:
            TypeError: for something without an encoder; for a transcoder, which reads at one hook and writes at
                another: give its vectors to `Features`, without a decoder.
            ValueError: where it is not known which hook it belongs to; for one that rescales what it reads, so that
                its decoder's rows are not what a feature writes.
        """
        if not all(hasattr(sae, name) for name in ("W_enc", "W_dec", "encode")):
            raise TypeError(
                f"expected a sparse autoencoder with W_enc, W_dec and encode, got {type(sae).__name__}: give plain "
                "vectors to Features(encoder, hook, bias=, decoder=)."
            )
        if "Transcoder" in type(sae).__name__:
            raise TypeError(
                f"a {type(sae).__name__} reads at one hook and writes at another: write Features(sae.W_enc.T, hook, "
                "encode=sae.encode), without a decoder."
            )
        cfg = getattr(sae, "cfg", None)
        own = getattr(getattr(cfg, "metadata", None), "hook_name", None) or getattr(cfg, "hook_name", None)
        if hook is None and own is None:
            raise ValueError('the autoencoder does not say which hook it belongs to: give it, hook="blocks.3...".')
        scaled = getattr(cfg, "normalize_activations", "none")
        if scaled not in ("none", None):
            raise ValueError(
                f"the autoencoder rescales what it reads (normalize_activations={scaled!r}), so that its decoder's "
                "rows are not what features write: fold the factor in first, as sae-lens does by "
                "fold_activation_norm_scaling_factor, or give plain vectors to Features."
            )
        by_head = bool(getattr(sae, "hook_z_reshaping_mode", False))
        name = type(sae).__name__

        def encode(value: Float[Tensor, "token ..."]) -> Float[Tensor, "token feature"]:
            return sae.encode(value if by_head else value.flatten(1))

        return cls(
            sae.W_enc.detach().T,
            str(own if hook is None else hook),
            decoder=sae.W_dec.detach(),
            encode=encode,
            name=name,
        )

    def scope(self, feature: int | SupportsIndex) -> DirectionScope:
        """The Direction Scope of one feature's encoder row: what moves it, whether or not it is active.

        Raises:
            ValueError: for a feature that does not exist.
            TypeError: for a feature that is not an integer.
        """
        index = models.as_int(feature, "a feature is a number")
        if not 0 <= index < len(self.encoder):
            raise ValueError(f"there are {len(self.encoder)} features, from 0 on, got {index}.")
        return DirectionScope(self.encoder[index], self.hook, name=f"feature {index}")

    def activations(self, value: Float[Tensor, "token ..."]) -> Float[Tensor, "token feature"]:
        """a, for what stands at the hook.

        Raises:
            ValueError: for a value of another width; for an `encode` that gives another shape, or NaN and infinities.
            TypeError: for one that does not give a tensor.
        """
        width, found = self.encoder.shape[1], value.flatten(1).shape[1]
        if width != found:
            raise ValueError(
                f"the features have {width} dimensions, and the value at {self.hook!r} has {found}: name the hook "
                "where they were found."
            )
        if self.encode is not None:
            encoded = self.encode(value)
            require_shape(encoded, "what encode gives", (len(value), len(self.encoder)), "[token feature]")
            require_finite(encoded, "what encode gives")
            return encoded
        before = value.flatten(1) @ self.encoder.to(value).T
        return (before if self.bias is None else before + self.bias.to(value)).relu()


@dataclass(frozen=True, eq=False, repr=False)
class FeatureMap:
    """Which tokens of a prompt make features fire, and what these do to the prediction. It never changes.

    Attributes:
        scores: [firing, token], the steepest change of the feature's activation that a unit step in a token's embedding
            can make, ‖∂a_f/∂x_t‖. On the CPU.
        activations: [firing], a.
        features: the number of each feature that fires, the strongest of the first position first.
        positions: where each fires.
        effects: [firing], what the feature's part of the stream gives to the question, to first order: a_f dᵀG; None
            without a question.
        carried: [firing, token], the part of each token's score in the question that runs through the feature; None
            without a question.
        around: [token], what is left of the score: it runs through other positions, through features that do not fire
            here, and through what the autoencoder leaves out.
        hook: where the features are read.
        str_tokens: the text of each token.
        scope: the question, as it is written in Python; None without one.
        unit: of `carried` and `around`; None without a question.
        wrt: the hook where the tokens were perturbed.
        model: the name of the model.
        rules: the rules that differentiated the model in place of some of its own derivatives, "linear" say; else None.
        notes: what a reader of the scores should know.
        quantity: the number that the scores are about, "logit of ' are'" say; None where it has no name.
        provenance: the versions, the model and its revision, the device and the day with which the map was made.
    """

    scores: Float[Tensor, "firing token"]
    activations: Float[Tensor, " firing"]
    features: tuple[int, ...]
    positions: tuple[int, ...]
    effects: Float[Tensor, " firing"] | None
    carried: Float[Tensor, "firing token"] | None
    around: Float[Tensor, " token"] | None
    hook: str
    str_tokens: tuple[str, ...]
    scope: str | None
    unit: str | None
    wrt: str
    model: str
    rules: str | None = None
    notes: tuple[str, ...] = field(default=())
    quantity: str | None = None
    provenance: Provenance | None = None

    def __repr__(self) -> str:
        where = sorted(set(self.positions))
        at = f"at {self.str_tokens[where[0]]!r}" if len(where) == 1 else f"at {len(where)} positions"
        asked = "" if self.scope is None else f", {self.scope}"
        count = (
            f"{models.counted(len(self.features), 'feature')} {'fires' if len(self.features) == 1 else 'fire'} {at} of "
            f"{self.hook}; {models.counted(len(self.str_tokens), 'token')}{asked}"
        )
        return f"FeatureMap({under(count, self.rules)})"

    @property
    def question(self) -> str:
        """What was asked, with the rules it was asked under."""
        return under("features that fire" + ("" if self.scope is None else f", {self.scope}"), self.rules)

    @property
    def names(self) -> tuple[str, ...]:
        """What each row is called: "F17", with the token where several positions are asked about."""
        several = len(set(self.positions)) > 1
        both = zip(self.features, self.positions, strict=True)
        return tuple(f"F{f} at {self.str_tokens[p]!r}" if several else f"F{f}" for f, p in both)

    def top(self, count: int | SupportsIndex = 5) -> "FeatureMap":
        """The rows that matter most, the first one first: by the size of their effect, or without a question by their
        activation. What the others carry is then in `around`.

        Raises:
            TypeError: for a count that is not an integer.
            ValueError: for a count below 1.
        """
        count = models.as_count(count, "count must be at least 1")
        by = self.activations if self.effects is None else self.effects.abs()
        kept = by.sort(descending=True, stable=True).indices[:count]
        rows = kept.tolist()
        carried, around = self.carried, self.around
        if carried is not None and around is not None:
            around = around + carried.sum(0) - carried[kept].sum(0)
        return replace(
            self,
            scores=self.scores[kept],
            activations=self.activations[kept],
            features=tuple(self.features[i] for i in rows),
            positions=tuple(self.positions[i] for i in rows),
            effects=None if self.effects is None else self.effects[kept],
            carried=None if carried is None else carried[kept],
            around=around,
        )

    def to_dataframe(self) -> "pd.DataFrame":
        """One row for each feature that fires and each token."""
        import pandas as pd

        rows = []
        for i, (feature, position) in enumerate(zip(self.features, self.positions, strict=True)):
            for t, text in enumerate(self.str_tokens):
                row: dict[str, object] = {"feature": feature, "at": position, "activation": float(self.activations[i])}
                row |= {"position": t, "token": text, "score": float(self.scores[i, t])}
                if self.effects is not None and self.carried is not None:
                    row |= {"effect": float(self.effects[i]), "carried": float(self.carried[i, t])}
                rows.append(row)
        return pd.DataFrame(rows)

    def plot(self) -> "Figure":
        """A heat map, features from top to bottom, tokens from left to right: what is carried, or else the scores."""
        return card.plot(self)

    def to_html(self, path: str | Path | None = None) -> str:
        """A static page of the heat map. It has no script and needs no network; `path` is where to write it."""
        return saved(card.page(self), path)

    def _repr_html_(self) -> str:
        return card.fragment(self)


@takes_a_model
def feature_map(
    model: Model,
    prompt: Prompt,
    features: Features,
    scope: Scope | None = None,
    *,
    at: Sources = -1,
    wrt: str = models.EMBEDDING,
    prepend_bos: bool | None = None,
    rules: Rules = None,
) -> FeatureMap:
    """Which tokens make each feature fire, for all features that fire, and what these do to the prediction.

    With the activation a_f of a feature, the scope's gradient g = cᵀJ and its gradient G at the features' hook:

        score_t^f = ‖∂a_f/∂x_t‖,   effect^f = a_f d_fᵀG,   carried_t^f = (d_fᵀG) (∂a_f/∂x_t · g_t/‖g_t‖)

    The last is the part of `carried_by`'s stream at that position which lies along the feature: over all features and
    positions, and what the autoencoder leaves out, the parts sum to the score ‖g_t‖.

    Args:
        model: a `HookedTransformer` or a `TransformerBridge`, in evaluation mode.
        prompt: text, token ids in a list or a tensor, or what a tokenizer returned for one text. The prediction is the
            one after its last token.
        features: where they are read and written.
        scope: the question about the prediction, one with one cotangent; None asks about the features alone.
        at: where features are read, as a position or a text that stands in the prompt once, or several; None is all,
            and by default it is the last token.
        wrt: the hook where the tokens are perturbed, before the features' hook.
        prepend_bos: whether text gets a BOS token; None is TransformerLens' own default for the model.
        rules: what differentiates the model, as in `linearize`. The features themselves are read by their own
            derivative.

    Unit: of the scores, activation per unit of embedding norm.
    Cost: one forward pass, a backward pass for the question, and for every feature that fires a backward pass from its
        hook to the tokens, in batches. Where rules hold what comes of the features' hook, so that their effects are
        zero, another forward pass makes sure of it.

    Raises:
        TypeError: for something that is not `Features`; for a scope that is not one number's slope.
        ValueError: for features of another width than the value at their hook, without a decoder where there is a
            question; where none fires; for a hook that is not between `wrt` and the prediction, or does not lead to it
            where there is a question; for an `encode` that cannot be differentiated, or does not fit the encoder. Else
            as `linearize`.

    Source: gradient times activation against a zero baseline is that of Marks et al. 2024 (arXiv:2403.19647).

    Example:
        >>> E = torch.eye(128)[:6]
        >>> features = tls.Features(E, "blocks.2.hook_resid_post", decoder=E)
        >>> found = tls.feature_map(model, "The keys to the old cabinet near the door", features, at=" keys")
        >>> found.scores.shape[1], bool((found.activations > 0).all())
        (10, True)
    """
    if not isinstance(features, Features):
        raise TypeError(
            f"expected Features, got {type(features).__name__}: write Features(encoder, hook) or of_sae(sae)."
        )
    models.check_model(model)
    if scope is not None:
        require_scope(scope)
        if features.decoder is None:
            raise ValueError(
                f"{features!r} have no decoder, so that it is not known what they give to the prediction: give the "
                "rows, Features(..., decoder=), or ask without a scope."
            )
    read = models.read_prompt(model, prompt, prepend_bos)
    texts = models.token_texts(model, read.tokens)
    where = as_positions(at, texts)
    hook = features.hook
    ruled = models.LinearRules.read(rules)
    lin = linearize_prompt(model, read, wrt, models.READOUT, rules=ruled, keep=[hook])
    if hook not in lin.trace.kept:
        raise ValueError(f"the features' hook {hook!r} does not lie between {wrt!r} and the prediction.")
    value = lin.trace.kept[hook]
    with torch.enable_grad():
        activations = features.activations(value[0])
        _require_derivative(lin, features, value, activations)
    firing = [(p, f) for p in where for f in _strongest(activations[p])]
    if not firing:
        raise ValueError(f"no feature of {features!r} fires at {', '.join(repr(texts[p]) for p in where[:10])}.")
    rows, numbers = (list(some) for some in zip(*firing, strict=True))
    fired = activations[rows, numbers]
    pulled = _pulled(lin, fired)
    known: dict[str, Tensor | None] = {"effects": None, "carried": None, "around": None}
    if scope is not None:
        known = _of_prediction(lin, scope, features, value, rows, numbers, fired.detach(), pulled)
    numeric = known | {"scores": pulled.norm(dim=-1), "activations": fired.detach()}
    dtype = models.kept_dtype(lin.readout.dtype, numeric["scores"], numeric["effects"], numeric["carried"])
    return FeatureMap(
        **{name: None if one is None else one.to("cpu", dtype) for name, one in numeric.items()},  # type: ignore[arg-type]
        features=tuple(numbers),
        positions=tuple(rows),
        hook=hook,
        str_tokens=texts,
        scope=None if scope is None else as_written(scope),
        unit=None if scope is None else scope.unit(lin),
        quantity=None if scope is None else scope.quantity_explained(lin),
        wrt=wrt,
        model=models.model_name(model),
        rules=None if ruled is None else str(ruled),
        notes=lin.notes if scope is None else (*lin.notes, *scope.notes(lin)),
        provenance=Provenance.of(model, lin.trace.state.weights),
    )


def _require_derivative(
    lin: Linearization, features: Features, value: Tensor, activations: Float[Tensor, "token feature"]
) -> None:
    """Refuse features without a derivative with respect to what they read, and what does not follow from the tokens.

    Raises:
        ValueError: with what to do.
    """
    if not value.requires_grad:
        raise models.independence([lin.wrt], features.hook, lin.rules)
    seen = None
    if activations.requires_grad:
        (seen,) = torch.autograd.grad(activations.sum(), value, retain_graph=True, allow_unused=True)
    if seen is None:
        raise ValueError(
            f"the activations of {features!r} cannot be differentiated with respect to what they read: let encode "
            "compute them from its argument, without torch.no_grad, detach or item."
        )


def _strongest(activations: Float[Tensor, " feature"]) -> list[int]:
    """The features that fire, the strongest first."""
    order = activations.detach().sort(descending=True, stable=True)
    return order.indices[: int((order.values > 0).sum())].tolist()


def _pulled(lin: Linearization, fired: Float[Tensor, " firing"]) -> Float[Tensor, "firing token d_model"]:
    """∂a_f/∂x for every feature that fires."""
    leaf = lin.trace.perturbations[lin.wrt]
    together = models.goes_back_together(lin.model, lin.trace)
    size = models.at_once(lin.model, len(lin.tokens), Work.PULLBACK, size=leaf.element_size()) if together else 1
    found = []
    for some in torch.eye(len(fired), dtype=fired.dtype, device=fired.device).split(size):
        with models.undisturbed(lin.trace):
            found.append(models.precise(pullback.products(fired, leaf, some, together=size > 1)[:, 0]))
    return torch.cat(found)


def _of_prediction(
    lin: Linearization,
    scope: Scope,
    features: Features,
    value: Tensor,
    rows: Sequence[int],
    numbers: Sequence[int],
    fired: Float[Tensor, " firing"],
    pulled: Float[Tensor, "firing token d_model"],
) -> dict[str, Tensor | None]:
    """What the features that fire give to the question."""
    require_one_prediction(scope, lin, "a feature's effect is on")
    question = None if isinstance(scope, FisherScope) else question_of(scope, lin, "feature_map", of_one=True)
    count = "many" if question is None else len(question.cotangents)
    if question is None or count != 1:
        raise TypeError(
            f"{as_written(scope)} asks with {count} cotangents, and a feature's effect is on one number: take "
            "SemanticScope, DirectionScope or MetricScope."
        )
    assert features.decoder is not None
    leaf, output = lin.trace.perturbations[lin.wrt], lin.trace.output
    unit, (scale,) = pullback.near_one(question.cotangents)
    with models.undisturbed(lin.trace):
        seed = unit.to(output).reshape(output.shape)
        g, G = torch.autograd.grad(output, [leaf, value], seed, retain_graph=True, allow_unused=True)
    if g is None:
        raise models.independence([lin.wrt], lin.of, lin.rules)
    if G is None:
        if not _is_held(lin, features.hook):
            raise models.independence([features.hook], lin.of)
        G = torch.zeros_like(value)
    written = models.precise(features.decoder[numbers].to(value.device))
    slope = (written * models.precise(G[0].flatten(1))[rows]).sum(-1) * scale  # dᵀG
    carried = slope[:, None] * (pulled * steepest(g[0])).sum(-1)
    around = models.precise(g[0]).norm(dim=-1) * scale - carried.sum(0)
    return {"effects": models.precise(fired) * slope, "carried": carried, "around": around}


def _is_held(lin: Linearization, hook: str) -> bool:
    """Whether it is for the rules alone that nothing comes of a hook: they hold the pattern that it makes, say.

    Cost: one forward pass under rules; else none.
    """
    if lin.rules is None:
        return False
    free = linearize_prompt(lin.model, models.ReadPrompt(lin.tokens, ()), lin.wrt, lin.of, keep=[hook]).trace
    (seen,) = torch.autograd.grad(free.output.sum(), free.kept[hook], allow_unused=True)
    return seen is not None


def lens_direction(
    lens: Any,
    model: Model,
    token: str | SupportsIndex,
    layer: int | SupportsIndex,
    versus: str | SupportsIndex | None = None,
) -> DirectionScope:
    """The direction of a word in the stream behind a layer, as a Jacobian lens has it: which tokens put it there?

    With the lens' matrix J_l, the mean Jacobian from that layer to the last, and the token's column w of the
    unembedding, the direction is J_lᵀ w. Its projection is what the lens reads for the word before the final norm.

    Args:
        lens: a fitted `JacobianLens` (`transformer_lens.tools.analysis`, TransformerLens 4.3 or later).
        model: the model that it was fitted on.
        token: the word, as text or id.
        layer: the layer behind whose block the stream is read.
        versus: a word whose direction is subtracted.

    Returns:
        A Direction Scope, for a linearisation that ends at its `hook`.

    Raises:
        TypeError: for something that is not a lens; for a token or a layer that is neither text nor number.
        ValueError: for a token that the model does not know; and as the lens does, for another model than its own, and
            a layer that it was not fitted at.

    Source: Gurnee et al. 2026, Verbalizable Representations Form a Global Workspace in Language Models.

    Example:
        >>> from transformer_lens.tools.analysis import JacobianLens  # doctest: +SKIP
        >>> lens = JacobianLens.fit(model, prompts, corpus="mine")  # doctest: +SKIP
        >>> scope = tls.lens_direction(lens, model, " are", layer=3, versus=" is")  # doctest: +SKIP
        >>> tls.attribute(model, prompt, scope, of=scope.hook).top(1)[0].token  # doctest: +SKIP
        ' keys'
    """
    models.check_model(model)
    if not callable(getattr(lens, "lens_vectors", None)):
        raise TypeError(
            f"expected a fitted JacobianLens, got {type(lens).__name__}: TransformerLens 4.3 has it, "
            "transformer_lens.tools.analysis.JacobianLens.fit(model, prompts, corpus=...)."
        )
    at = models.as_int(layer, "a layer is an integer")
    size = models.vocabulary_size(model)
    words = [
        models.token(model, one, size, what) for one, what in ((token, "token"), (versus, "versus")) if one is not None
    ]
    vectors = lens.lens_vectors(model, [word.id for word in words], at)
    direction = vectors[0] - vectors[1] if len(words) > 1 else vectors[0]
    at = at % len(model.blocks)
    called = f"lens {words[0].text!r}" + (f" − {words[1].text!r}" if len(words) > 1 else "")
    return DirectionScope(direction.detach(), f"blocks.{at}.hook_resid_post", name=called)
