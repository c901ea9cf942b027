"""Two prompts that differ in what is asked, and what each part of the network does to the difference."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_scopes import models
from tl_scopes.api import linearize
from tl_scopes.circuits.carried import carried_by
from tl_scopes.circuits.paths import Paths
from tl_scopes.circuits.traced import Traced, traced
from tl_scopes.jacobian.linearization import Linearization
from tl_scopes.models import Model, Part, PatchingSite, Prompt, Target
from tl_scopes.scopes.scope import Scope
from tl_scopes.scopes.semantic import SemanticScope

if TYPE_CHECKING:
    import pandas as pd

_PARTS: dict[str, Part] = {"resid_pre": "resid_pre", "attn_out": "attn_out", "mlp_out": "mlp_out", "head_out": "z"}


@dataclass(frozen=True, eq=False, repr=False)
class Effects:
    """What becomes of the answer when parts of the corrupted run are replaced by those of the clean one.

    Attributes:
        values: [layer, head] for "head_out", else [layer, position]: the change of the metric that each replacement
            makes, or is said to make. On the CPU.
        site: what was replaced.
        method: "activation patching", "attribution patching" or "carried".
        layers: the layers of the first axis.
        str_tokens: the text of the corrupted prompt's tokens.
        scale: the metric at the clean prompt less that at the corrupted one.
    """

    values: Float[Tensor, "layer component"]
    site: str
    method: str
    layers: tuple[int, ...]
    str_tokens: tuple[str, ...]
    scale: float

    def __repr__(self) -> str:
        best = int(self.values.abs().argmax())
        size = " x ".join(map(str, self.values.shape))
        share = self.values.flatten()[best].item() / self.scale
        return f"Effects({self.method} of {self.site}: {size}; the largest is {self.names[best]}, {share:.0%})"

    @property
    def normalized(self) -> Float[Tensor, "layer component"]:
        """The effects with 0 for the corrupted run and 1 for the clean one."""
        return self.values / self.scale

    @property
    def names(self) -> list[str]:
        """What each component is called, layer by layer: "L9H9", or "L9 at ' door'"."""
        if self.site == "head_out":
            return [f"L{layer}H{head}" for layer in self.layers for head in range(self.values.shape[1])]
        return [f"L{layer} at {text!r}" for layer in self.layers for text in self.str_tokens]

    def to_dataframe(self) -> "pd.DataFrame":
        """One row for each component: its name, its effect, and the effect as a part of the whole."""
        import pandas as pd

        columns = {"effect": self.values.flatten().tolist(), "normalized": self.normalized.flatten().tolist()}
        return pd.DataFrame({"name": self.names} | columns)


@dataclass(frozen=True, eq=False)
class _Run:
    """One prompt of a pair."""

    tokens: Int[Tensor, "token"]
    str_tokens: tuple[str, ...]
    logits: Float[Tensor, " vocab"]
    target: Target
    versus: Target | None


@dataclass(frozen=True, eq=False, repr=False)
class PromptPair:
    """A clean and a corrupted prompt of the same length, whose answers differ.

    The metric is the difference of the logits of both answers after the last token: large at the clean prompt, small at
    the corrupted one.

    Args:
        model: a `HookedTransformer` or a `TransformerBridge`, in evaluation mode.
        clean: the prompt whose answer is explained, as text or token ids.
        corrupted: the same prompt with something else in it.
        answer: what the clean prompt is answered with, as text or id.
        wrong: what the corrupted prompt is answered with; None is to take the log-probability of the answer alone.
        prepend_bos: whether texts get a BOS token; None is TransformerLens' own default for the model.

    Raises:
        ValueError: for prompts of different lengths, with what differs; for equal prompts, or such that the metric is
            the same; for answers that are not tokens. Else as `linearize` does.

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
        if abs(self.clean_value - self.corrupted_value) < 1e-6:
            raise ValueError(
                f"the metric is {self.clean_value:.3g} at both prompts: what differs, "
                f"{[a[i] for i in self.differing]!r}, does not matter to it."
            )

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
        prompts = (self.clean, self.corrupted)
        clean, corrupted = (linearize(self.model, prompt, prepend_bos=self.prepend_bos) for prompt in prompts)
        return clean, corrupted

    @cached_property
    def _runs(self) -> tuple["_Run", "_Run"]:
        """What is kept of both prompts, without their graphs."""
        clean, corrupted = (
            _Run(lin.tokens, lin.str_tokens, lin.logits, *self.scope.explained(lin)) for lin in self.linearized()
        )
        return clean, corrupted

    @property
    def scope(self) -> SemanticScope:
        """The question that belongs to the pair: the answer's logit against the other's."""
        quantity = "logit" if self.wrong is not None else "log_prob"
        return SemanticScope(self.answer, self.wrong, quantity)  # type: ignore[arg-type]

    def metric(self, logits: Float[Tensor, "1 token vocab"]) -> Tensor:
        """The metric, as TransformerLens' patching takes it: a function of logits that gives a number."""
        last, run = logits[0, -1], self._runs[0]
        if run.versus is not None:
            return last[run.target.id] - last[run.versus.id]
        return last.log_softmax(-1)[run.target.id]

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

    def attribution_patching(self, site: PatchingSite = "head_out") -> Effects:
        """The first-order effect of replacing each part of the corrupted run by that of the clean one:

            (k_clean − k_corrupted) · ∂metric/∂k at the corrupted run.

        Cost: four forward passes and a backward pass, for all components.

        Raises:
            ValueError: for another site, and a model without such components.

        Source: Nanda 2023, Attribution Patching; Kramár et al. 2024 (arXiv:2403.00745).
        """
        part = self._part(site)
        clean, corrupted = (traced(lin, part) for lin in self.linearized())
        _, gradients = corrupted.gradients(self.scope.cotangents(corrupted.lin)[0])
        effects = []
        for site_clean, site_corrupted, gradient in zip(clean.sites, corrupted.sites, gradients, strict=True):
            moved = models.precise(site_clean.value.detach() - site_corrupted.value.detach()) * models.precise(gradient)
            effects.append(site_corrupted.as_heads(moved).sum(-1))  # [position head]
        return self._effects(torch.stack(effects), site, "attribution patching", corrupted)

    def activation_patching(self, site: PatchingSite = "head_out") -> Effects:
        """What becomes of the metric when each part of the corrupted run is replaced by that of the clean one.

        Cost: one forward pass for each component, by `transformer_lens.patching`.

        Raises:
            ValueError: for another site.
        """
        return patched([self], site)[0]

    def carried(self, site: PatchingSite = "head_out", scope: Scope | None = None) -> Effects:
        """How much each part carries of what the tokens that differ do to the clean prompt; no corrupted run is needed.

        Args:
            site: what kind of part.
            scope: the question; None is the pair's own.

        Cost: that of `carried_by`, for the tokens that differ.

        Raises: as `carried_by` does; ValueError for another site.
        """
        part, asked = self._part(site), self.scope if scope is None else scope
        by = {"z": "head", "resid_pre": "position"}.get(part, "layer")
        paths = carried_by(self.linearized()[0], asked, by, list(self.differing))  # type: ignore[arg-type]
        return Effects(_along(paths, part), site, "carried", _layers(paths), self._runs[0].str_tokens, self._scale)

    # -- private ------------------------------------------------------------------------------------------------------

    def _effects(self, values: Tensor, site: str, method: str, of: Traced) -> Effects:
        values = values.sum(1) if site == "head_out" else values[..., 0]
        layers = tuple(one.component.layer for one in of.sites)
        return Effects(values.float().cpu(), site, method, layers, self._runs[1].str_tokens, self._scale)

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

    Cost: one forward pass of each pair for every component.
    """
    found: dict[int, Effects] = {}
    lengths: dict[int, list[int]] = {}
    for i, pair in enumerate(pairs):
        pair._part(site)
        lengths.setdefault(len(pair._runs[0].tokens), []).append(i)
    for of_one_length in lengths.values():
        some = [pairs[i] for i in of_one_length]
        clean, corrupted = (torch.stack([pair._runs[which].tokens for pair in some]) for which in (0, 1))
        values = models.activation_patching(some[0].model, clean, corrupted, [pair.metric for pair in some], site)
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
        ValueError: for a scope whose scores are not about the logits, or about several numbers.

    Example:
        >>> lin = tls.linearize(model, "The keys to the old cabinet near the door")
        >>> metric = tls.patching_metric(tls.SemanticScope(" are", versus=" is"), lin)
        >>> round(metric(model(lin.tokens[None])).item(), 1)
        6.7
    """
    metric = scope.metric(lin) if isinstance(scope, Scope) else None
    if metric is None:
        if not isinstance(scope, Scope):
            raise TypeError(f"expected a scope such as SemanticScope(), got {scope!r}.")
        raise ValueError(f"{scope!r} is not about a number of the logits, which a patching metric is.")
    lin.require_readout()
    nothing = models.precise(lin.readout) * float("nan")
    value = metric(nothing, models.precise(lin.logits))
    if value.numel() != 1 or not value.isfinite():
        raise ValueError(
            f"{scope!r} is about {'the readout' if value.numel() == 1 else f'{value.numel()} numbers'}, and a patching "
            'metric is one number of the logits: take SemanticScope, MetricScope, or TemperatureScope(norm="logits").'
        )

    def of_logits(logits: Float[Tensor, "batch token vocab"]) -> Tensor:
        values = [metric(nothing, models.precise(one[-1])).reshape(()) for one in logits]
        return values[0] if len(values) == 1 else torch.stack(values)

    return of_logits
