"""Two prompts that differ in what is asked, and what each part of the network does to the difference."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, SupportsIndex, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_scopes import models
from tl_scopes.circuits.carried import carried_by
from tl_scopes.circuits.effects import Effects
from tl_scopes.circuits.paths import Paths
from tl_scopes.circuits.question import require_one_prediction
from tl_scopes.circuits.second_order import curvature
from tl_scopes.circuits.traced import ComponentTrace, linearize_with
from tl_scopes.jacobian.linearization import Linearization, linearize_prompt
from tl_scopes.jacobian.metric import LocalMetric
from tl_scopes.jacobian.randomness import source
from tl_scopes.models import LinearRules, Model, ModelState, Part, PatchingSite, Prompt, ReadPrompt, Rules, Target
from tl_scopes.models.linear_rules import under
from tl_scopes.scopes.scope import Scope, require_scope
from tl_scopes.scopes.semantic import SemanticScope

_NOISE = 4
"""In units of `LocalMetric.rounding_unit`: up to what size a difference of the metric counts as rounding alone."""
_PARTS: dict[str, Part] = {"resid_pre": "resid_pre", "attn_out": "attn_out", "mlp_out": "mlp_out", "head_out": "z"}


@dataclass(frozen=True, eq=False)
class _Run:
    """One prompt of a pair."""

    tokens: Int[Tensor, "token"]
    str_tokens: tuple[str, ...]
    logits: Float[Tensor, " vocab"]
    target: Target | None
    versus: Target | None
    metric: Callable[[Float[Tensor, "batch token vocab"]], Tensor]
    state: ModelState
    """The hooks and weights that the model ran with."""
    rounding: float
    """How far the metric moves when one of the numbers that it reads is rounded."""


@dataclass(frozen=True, eq=False, repr=False)
class PromptPair:
    """A clean and a corrupted prompt of the same length, whose answers differ.

    The metric is the difference of the logits of both answers after the last token: large at the clean prompt, small at
    the corrupted one. A pair belongs to the model with the hooks and weights that it was made with, and is asked inside
    the same `model.hooks(...)`.

    Args:
        model: a `HookedTransformer` or a `TransformerBridge`, in evaluation mode.
        clean: the prompt whose answer is explained, as text or token ids.
        corrupted: the same prompt with something else in it.
        answer: what the clean prompt is answered with, as text or id.
        wrong: what the corrupted prompt is answered with; None is to take the log-probability of the answer alone.
        prepend_bos: whether texts get a BOS token; None is TransformerLens' own default for the model.

    Raises:
        ValueError: for prompts of different lengths, with what differs; for equal prompts, or such that the metric is
            the same; for answers that are not one token each. What asks a pair refuses a model whose hooks or weights
            have changed since. Else as `linearize` does.

    Example:
        >>> clean, corrupted = "The keys to the old cabinet near the door", "The key to the old cabinet near the door"
        >>> pair = tls.PromptPair(model, clean, corrupted, answer=" are", wrong=" is")
        >>> pair
        PromptPair(' are' against ' is': ' keys' for ' key' of 10 tokens; 6.7 and -7.9)
    """

    model: Model
    clean: Prompt
    corrupted: Prompt
    answer: str | int = field(kw_only=True)
    wrong: str | int | None = field(kw_only=True, default=None)
    prepend_bos: bool | None = field(kw_only=True, default=None)

    def __post_init__(self) -> None:
        a, b = (run.str_tokens for run in self._runs)
        if len(a) != len(b):
            at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            raise ValueError(
                f"the prompts of a pair must have the same number of tokens, so that positions correspond, got "
                f"{len(a)} and {len(b)}. From position {at} they read {list(a[at:])!r} and {list(b[at:])!r}: "
                "choose words of as many tokens as each other."
            )
        if not self.differing:
            raise ValueError(f"the prompts of the pair are the same, {''.join(a)!r}: nothing can be learned from them.")
        if abs(self.clean_value - self.corrupted_value) <= _NOISE * max(run.rounding for run in self._runs):
            raise ValueError(
                f"the metric is {self.clean_value:.3g} at both prompts: what differs, "
                f"{[a[i] for i in self.differing]!r}, does not matter to it."
            )
        run = self._runs[0]
        targets = [(self.answer, run.target), (self.wrong, run.versus)]
        compared = [target for _, target in targets if target is not None]
        as_text = [target for given, target in targets if target is not None and isinstance(given, str)]
        for note in models.missing_spaces(self.model, run.tokens, run.logits, as_text, compared):
            models.warn(f"{note}.")

    def __repr__(self) -> str:
        ours, theirs = (run.str_tokens for run in self._runs)
        changed = ", ".join(f"{ours[i]!r} for {theirs[i]!r}" for i in self.differing)
        against = f" against {self.wrong!r}" if self.wrong is not None else ""
        return (
            f"PromptPair({self.answer!r}{against}: {changed} of {len(ours)} tokens; {self.clean_value:.2g} and "
            f"{self.corrupted_value:.2g})"
        )

    # -- both runs ----------------------------------------------------------------------------------------------------

    def linearized(self) -> tuple[Linearization, Linearization]:
        """The clean and the corrupted prompt, linearised.

        Cost: two forward passes.
        """
        models.check_model(self.model)
        clean, corrupted = (
            self._linearized(models.read_prompt(self.model, p, self.prepend_bos)) for p in (self.clean, self.corrupted)
        )
        return clean, corrupted

    def _linearized(self, read: ReadPrompt, rules: Rules = None) -> Linearization:
        ruled = LinearRules.read(rules)
        return linearize_prompt(self.model, read, models.EMBEDDING, models.READOUT, rules=ruled)

    @cached_property
    def _runs(self) -> tuple["_Run", "_Run"]:
        """What is kept of both prompts, without their graphs."""
        clean, corrupted = map(self._run, self.linearized())
        return clean, corrupted

    def _run(self, lin: Linearization) -> "_Run":
        scope = self.scope
        require_one_prediction(scope, lin, "the metric of a pair is about")
        target, versus = scope.explained(lin)
        rounding = LocalMetric(lin, scope.metric(lin)).rounding_unit
        metric, state = patching_metric(scope, lin), lin.trace.state
        return _Run(lin.tokens, lin.str_tokens, lin.logits, target, versus, metric, state, rounding)

    @property
    def scope(self) -> SemanticScope:
        """The question that belongs to the pair: the answer's logit against the other's."""
        quantity = "logit" if self.wrong is not None else "log_prob"
        return SemanticScope(self.answer, self.wrong, quantity)  # type: ignore[arg-type]

    def metric(self, logits: Float[Tensor, "1 token vocab"]) -> Tensor:
        """What `scope` explains, as TransformerLens' patching takes it: a function of logits that gives a number."""
        return self._runs[0].metric(logits)

    @cached_property
    def clean_value(self) -> float:
        """The metric at the clean prompt."""
        return self.metric(self._runs[0].logits[None, None]).item()

    @cached_property
    def corrupted_value(self) -> float:
        """The metric at the corrupted prompt."""
        return self.metric(self._runs[1].logits[None, None]).item()

    @property
    def is_confirmed(self) -> bool:
        """Whether the model gives each prompt its own answer."""
        return self.wrong is not None and self.clean_value > 0 > self.corrupted_value

    @property
    def differing(self) -> tuple[int, ...]:
        """The positions where the prompts differ."""
        ours, theirs = (run.tokens for run in self._runs)
        return tuple((ours != theirs).nonzero()[:, 0].tolist())

    # -- what parts of the network do ---------------------------------------------------------------------------------

    def attribution_patching(
        self,
        site: PatchingSite = "head_out",
        order: Literal[1, 2] = 1,
        *,
        products: int | SupportsIndex = 8,
        generator: torch.Generator | None = None,
        rules: Rules = None,
    ) -> Effects:
        """What the derivatives at the corrupted run say about replacing each part of it by that of the clean run:

            Δ_kᵀ G_k (+ ½ Δ_kᵀ H_kk Δ_k),   Δ_k = k_clean − k_corrupted,   G_k = ∂m/∂k,   H_kk = ∂²m/∂k²

        with the metric m; the term in brackets is of the second order. A Hessian product for every component would cost
        as much as activation patching. One with Σ_k ε_k Δ_k and random signs ε is for all components together, and
        ε_k Δ_kᵀ H ε Δ is unbiased for the term of each.

        Args:
            site: what kind of part.
            order: 1, or 2 for the second order too, with `first_order`, `reliability` and `standard_error`.
            products: how many Hessian products are averaged. From as many on as there are components they are exact,
                and `standard_error` is None; of fewer than four it is infinite, since they do not tell.
            generator: the source of the signs, on the model's device; by default one that is seeded by the prompts.
            rules: what differentiates the model, as in `linearize`; with "linear" this is RelP.

        Cost: two forward passes and a backward pass, for all components. The second order takes a backward pass that
            can be differentiated, and half to one forward pass for each Hessian product, with the memory of two graphs.

        Raises:
            ValueError: for another site or order, a number of products below 1, a model without such components, and
                the second order under rules, which make what curves the network constant.
            TypeError: for a number of products that is not an integer, and something else than a generator.
            NoSecondDerivativeError: for the second order under an attention kernel without a second derivative.

        Source: Nanda 2023, Attribution Patching; Kramár et al. 2024 (arXiv:2403.00745). The second order: Zhang and
            Wang 2026 (arXiv:2606.09899). RelP: Rezaei Jafari et al. 2025 (arXiv:2508.21258).
        Departure: that paper has one Hessian product for each component that is looked at; random signs, as in the
            estimate of a diagonal by Bekas et al. 2007, are for all of them, and `reliability` is ours.
        """
        part = self._part(site)
        if order not in (1, 2):
            raise ValueError(f"the order is 1 or 2, got {order!r}: from the third on, activation_patching is cheaper.")
        count = models.as_count(products, "products is a number of Hessian products, 1 at least")
        if order == 2 and rules is not None:
            raise ValueError(f"under rules={rules!r} what curves the network is constant: take order=1, or no rules.")
        self._require_unchanged()
        clean, corrupted = (linearize_with(self.model, run.tokens, -1, [part], rules=rules) for run in self._runs)
        both = list(zip(clean.sites, corrupted.sites, strict=True))
        changes = torch.stack(
            [
                models.precise(b.as_heads(a.value.detach())) - models.precise(b.as_heads(b.value.detach()))
                for a, b in both
            ]
        )  # [layer position head d_head]
        by_head = site == "head_out"
        if order == 2:
            random = source(corrupted.lin, generator, "attribution_patching")
            found = curvature(corrupted, self._of_logits, changes, by_head, count, random)
            error = None if found.error is None else found.error / 2
            return self._effects(found.slope + found.bend / 2, site, "second order", corrupted, found.slope, error)
        gradients = corrupted.gradients(self.scope.cotangents(corrupted.lin)[0])
        slopes = torch.stack([one.as_heads(g) for one, g in zip(corrupted.sites, gradients.of_sites, strict=True)])
        moved = (models.precise(slopes) * changes).sum((1, 3) if by_head else (2, 3)) * gradients.scale
        return self._effects(moved, site, under("attribution patching", corrupted.lin.rules), corrupted)

    def activation_patching(self, site: PatchingSite = "head_out") -> Effects:
        """What becomes of the metric when each part of the corrupted run is replaced by that of the clean one.

        Cost: one forward pass for each component, by `transformer_lens.patching`.

        Raises:
            ValueError: for another site.
        """
        return patched([self], site)[0]

    def carried(self, site: PatchingSite = "head_out", scope: Scope | None = None, *, rules: Rules = None) -> Effects:
        """How much each part carries of what the tokens that differ do to the clean prompt; no corrupted run is needed.

        Args:
            site: what kind of part.
            scope: the question, about the same prediction; None is the pair's own.
            rules: what differentiates the model, as in `linearize`.

        Cost: one forward pass, and that of `carried_by` for the tokens that differ.

        Raises: as `carried_by` does; ValueError for another site, and for a target of several tokens, whose influence
            runs through positions that patching does not have.
        """
        part, asked = self._part(site), self.scope if scope is None else scope
        require_scope(asked)
        self._require_unchanged()
        by = {"z": "head", "resid_pre": "position"}.get(part, "layer")
        lin = self._linearized(models.read_prompt(self.model, self._runs[0].tokens), rules)
        require_one_prediction(asked, lin, "patching, which this is compared with, is about")
        paths = carried_by(lin, asked, by, list(self.differing))  # type: ignore[arg-type]
        method = under("carried", paths.rules)
        return Effects(_along(paths, part), site, method, _layers(paths), self._runs[1].str_tokens, self._scale)

    # -- private ------------------------------------------------------------------------------------------------------

    def _require_unchanged(self) -> None:
        """Refuse a model that is not the one whose metric, at both prompts, the pair has kept.

        Raises:
            ValueError: when hooks or weights have changed since.
            TypeError, RuntimeError: when the model can no longer be linearised: see `models.check_model`.
        """
        models.check_model(self.model)
        try:
            self._runs[0].state.require_unchanged(self.model)
        except ValueError as error:
            raise ValueError(
                f"{self!r} keeps what the model gave when the pair was made, so make another PromptPair: {error}"
            ) from error

    def _effects(
        self,
        values: Float[Tensor, "layer component"],
        site: str,
        method: str,
        of: ComponentTrace,
        first_order: Tensor | None = None,
        error: Tensor | None = None,
    ) -> Effects:
        layers = tuple(one.component.layer for one in of.sites)
        dtype = models.kept_dtype(of.lin.readout.dtype, values)
        first, second = (None if one is None else one.to("cpu", dtype) for one in (first_order, error))
        texts = self._runs[1].str_tokens
        return Effects(values.to("cpu", dtype), site, method, layers, texts, self._scale, first, second)

    def _of_logits(self, logits: Float[Tensor, " vocab"]) -> Tensor:
        return self.metric(logits[None, None])

    @property
    def _scale(self) -> float:
        return self.clean_value - self.corrupted_value

    def _part(self, site: str) -> Part:
        if site not in _PARTS:
            raise ValueError(f"a site is one of {', '.join(map(repr, get_args(PatchingSite)))}, got {site!r}.")
        return _PARTS[site]


def _along(paths: Paths, part: Part) -> Float[Tensor, "layer component"]:
    """The values of one kind of component, summed over the source tokens."""
    if part == "z":
        return paths.values.sum(-1)
    if part == "resid_pre":
        return paths.values[:-1].sum(-1)
    if paths.where is None:
        raise ValueError(
            "so many tokens differ that where their influence runs is not computed: make a pair that differs in fewer."
        )
    return paths.where[:, ("attn_out", "mlp_out").index(part)].sum(-1)


def _layers(paths: Paths) -> tuple[int, ...]:
    return paths.layers[:-1] if paths.by == "position" else paths.layers


def patched(pairs: Sequence[PromptPair], site: PatchingSite) -> list[Effects]:
    """The activation patching of several pairs, those of one length together.

    Cost: one forward pass of each pair for every component, but for positions before the first token that differs.
    """
    found: dict[int, Effects] = {}
    lengths: dict[int, list[int]] = {}
    for i, pair in enumerate(pairs):
        pair._part(site)
        pair._require_unchanged()
        lengths.setdefault(len(pair._runs[0].tokens), []).append(i)
    for of_one_length in lengths.values():
        some = [pairs[i] for i in of_one_length]
        clean, corrupted = (torch.stack([pair._runs[which].tokens for pair in some]) for which in (0, 1))
        unpatched = [pair.corrupted_value for pair in some]
        values = models.activation_patching(
            some[0].model, clean, corrupted, [pair.metric for pair in some], unpatched, site
        )
        for i, pair, one in zip(of_one_length, some, values, strict=True):
            layers = tuple(range(len(one)))
            effect = one - pair.corrupted_value
            found[i] = Effects(effect, site, "activation patching", layers, pair._runs[1].str_tokens, pair._scale)
    return [found[i] for i in range(len(pairs))]


def patching_metric(scope: Scope, lin: Linearization) -> Callable[[Float[Tensor, "batch token vocab"]], Tensor]:
    """What a scope explains, as a metric that TransformerLens' patching takes.

    Args:
        scope: the question.
        lin: a linearisation, which decides what the scope left open, such as the target that is most likely.

    Returns:
        A function of logits [batch, position, vocab], which reads the last position: a number for a batch of one, else
        one for each prompt.

    Raises:
        TypeError: for something that is not a scope.
        ValueError: for a scope whose scores are not about the logits, or about several numbers; for an answer of
            several tokens, which several positions predict.

    Example:
        >>> lin = tls.linearize(model, "The keys to the old cabinet near the door")
        >>> metric = tls.patching_metric(tls.SemanticScope(" are", versus=" is"), lin)
        >>> round(metric(model(lin.tokens[None])).item(), 1)
        6.7
    """
    require_scope(scope)
    scope, lin = scope.about(lin)
    if len(lin.single) > 1:
        raise ValueError(
            f"a patching metric reads the last position, and {scope!r} is about {len(lin.single)} predictions here: "
            "name a target of one token, or take one of lin.single."
        )
    metric = scope.joint_metric(lin)
    if metric is None:
        raise ValueError(f"{scope!r} is not about a number of the logits, which a patching metric is.")
    lin.require_readout()
    nothing = models.precise(lin.readout) * float("nan")
    value = metric(nothing, models.precise(lin.logits))
    if value.numel() != 1 or not value.isfinite():
        raise ValueError(
            f"{scope!r} is about {'the readout' if value.numel() == 1 else f'{value.numel()} numbers'}, and a patching "
            'metric is one number of the logits: take SemanticScope, MetricScope, or TemperatureScope(norm="logits").'
        )

    shape = lin.logits.shape  # the function keeps no graph

    def of_logits(logits: Float[Tensor, "batch token vocab"]) -> Tensor:
        values = [metric(nothing, models.precise(one[-1]).reshape(shape)).reshape(()) for one in logits]
        return values[0] if len(values) == 1 else torch.stack(values)

    return of_logits
