"""HETA: where attention flows from, times the curvature there and the information lost without the token."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, SupportsIndex

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from tl_scopes import models
from tl_scopes.jacobian.curvature import block_norms
from tl_scopes.jacobian.linearization import Linearization
from tl_scopes.jacobian.metric import Metric
from tl_scopes.jacobian.randomness import error_of_mean, source
from tl_scopes.jacobian.replacement import each_alone, effects, substitute
from tl_scopes.jacobian.softmax import log_prob
from tl_scopes.models import Target, Token
from tl_scopes.models.arguments import as_flag, as_number
from tl_scopes.scopes.measurement import Measurement
from tl_scopes.scopes.scope import Scope
from tl_scopes.scopes.spaces import notes_on_spaces


@dataclass(frozen=True)
class HetaScope(Scope):
    """Attention flow, times curvature plus the information lost without the token (HETA):

        score_i = M_i (β S_i + γ I_i)

        M_i  flow of attention from token i to the position, over layers and heads (`attention_flow`); sums to 1
        S_i  mean of ‖H_ii r‖₁ over random signs r, with H_ii = ∂² log p(target) / ∂x_i²
        I_i  KL(p ‖ p with token i masked)

    The answer has them, unweighted: `answer.M`, `answer.S`, `answer.I`. A term of weight 0 is not computed. S is an
    estimate of a number between 0.7 and 1 times the sum of the lengths of the rows of H_ii; `answer.standard_error` is
    the error that this brings into the scores, at worst 0.76/√probes of a score.

    Args:
        target: the token, as text or id; None is the most likely next token.
        beta: weight of S.
        gamma: weight of I.
        probes: how many random r per token.
        mask: what takes the place of a token for I: "zero", "mean" (of the embeddings of this prompt), or a token, as
            text or id, `model.tokenizer.pad_token_id` say.
        normalize: divide S and I by their sums over the tokens first, so that β and γ weigh like with like.
        generator: source of the random numbers, on the model's device. By default each prompt has its own, seeded by
            its tokens: the same prompt gets the same numbers, another prompt gets others.

    Unit: S is in nats per squared unit of embedding norm, I in nats. The paper adds them as they are: on prompts of the
        bundled model S makes anything from 0% to 100% of the scores. With `normalize` both are shares.
    Cost: high. probes x tokens Hessian-vector products, about 2 backward passes each, in batches; and tokens + 2
        forward passes. For 100 tokens that is as much as 2,000 Semantic Scopes. A progress bar counts the products.
        Memory for the graph of the forward pass, about as much again, and a batch.
    Raises: ValueError for a linearisation that does not end at the readout; for one under rules, which make constant
        what curves the network; for models without attention patterns (Mamba); for a `wrt` that is neither "hook_embed"
        nor "blocks.L.hook_resid_pre"; for a linearisation that `at` moved, or whose model has other hooks or weights by
        now; for a target or a mask that is several tokens or unknown, numbers out of range, a generator on another
        device. RuntimeError under an attention kernel that cannot be differentiated twice: load with
        attn_implementation="eager". TypeError for probes that are not an integer, for a generator that is not a
        torch.Generator, and for a `normalize` that is not a bool.
    Source: Pramanik et al. 2026, HETA (arXiv:2604.13258), section 4 and equation 5.
    Departure: from the authors' code, where that departs from the equations. Its values leave out the norm before
        attention and the biases, and cut grouped-query values as if each query head had its own: here they are those
        that the model used. Its "unk" mask is random noise: here it is a token. Its KL is of float32 probabilities cut
        off at 1e-10: here it is of float64 log-probabilities. Kept: only the diagonal blocks of H count, and a head is
        rolled out with the heads of the same number in other layers, though numbering heads otherwise changes no
        prediction (it moves 1% to 4% of M on the bundled model). M depends neither on the target nor on the MLPs.

    Example:
        >>> lin = tls.linearize(model, "The keys to the old cabinet")
        >>> answer = tls.HetaScope(target=" are", probes=2)(lin)
        >>> answer.unit
        'nat per squared unit of embedding norm + nat'
        >>> bool((answer.scores - answer.M * (0.5 * answer.S + 0.5 * answer.I)).abs().max() < 1e-5)
        True
    """

    target: str | SupportsIndex | None = None
    beta: float = 0.5
    gamma: float = 0.5
    probes: int = 10
    mask: str | SupportsIndex = "zero"
    normalize: bool = False
    generator: torch.Generator | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("beta", "gamma"):
            rule = f"{name} is the weight of a term, a number from 0 on"
            weight = as_number(getattr(self, name), rule, lambda weight: 0 <= weight < math.inf)
            object.__setattr__(self, name, weight)
        if not self.beta + self.gamma:
            raise ValueError("beta and gamma are both 0, so that all scores would be: give one of them a weight.")
        probes = models.as_count(self.probes, "probes is a number of random directions per token, 1 at least")
        object.__setattr__(self, "probes", probes)
        object.__setattr__(self, "normalize", as_flag(self.normalize, "normalize"))

    def measure_many(self, lins: Sequence[Linearization]) -> list[Measurement]:
        for lin in lins:
            self._require_askable(lin)
        flows = [attention_flow(lin) for lin in lins]
        bends = self._curvatures(lins) if self.beta else [flow.new_zeros(1, len(flow)) for flow in flows]
        losses = [information(lin, self.mask) for lin in lins] if self.gamma else list(map(torch.zeros_like, flows))
        return [self._scored(*terms) for terms in zip(flows, bends, losses, strict=True)]

    def _scored(
        self, flow: Float[Tensor, "token"], bends: Float[Tensor, "probe token"], lost: Float[Tensor, "token"]
    ) -> Measurement:
        M, S, I = flow, bends.mean(0), lost  # noqa: E741
        beta, gamma = self._weight(self.beta, S), self._weight(self.gamma, I)
        scores = M * (beta * S + gamma * I)
        details = {"M": M}
        if self.beta:
            details |= {"S": S, "standard_error": M * beta * error_of_mean(bends)}
        if self.gamma:
            details |= {"I": I}
        return Measurement(scores, details)

    def measure(self, lin: Linearization) -> Measurement:
        return self.measure_many([lin])[0]

    def named_targets(self, model: models.Model, vocab: int | None = None) -> tuple[Target | None, Target | None]:
        return None if self.target is None else Target((models.token(model, self.target, vocab),)), None

    def explained(self, lin: Linearization) -> tuple[Target, None]:
        target = Target((lin.token(self.target),))
        lin.require_possible(target)
        return target, None

    def unit(self, lin: Linearization) -> str:
        if self.normalize:
            return "weighted share"
        units = ((self.beta, f"nat per squared {lin.unit}"), (self.gamma, "nat"))
        return " + ".join(unit for weight, unit in units if weight)

    def notes(self, lin: Linearization) -> tuple[str, ...]:
        notes = notes_on_spaces(lin, self.target)
        if self.normalize or not self.beta or not self.gamma:
            return notes
        return (
            *notes,
            "curvature and information are added in different units, as in the paper; in Python "
            "HetaScope(normalize=True) weighs like with like",
        )

    # -- what kind of scope it is -------------------------------------------------------------------------------------

    @property
    def runs_again(self) -> Literal["prompt"]:
        return "prompt"

    def metric(self, lin: Linearization) -> Metric:
        """log p(target), the number whose curvature S is. M and I are not about a single number."""
        target = self.explained(lin)[0].id
        return lambda readout, logits: log_prob(logits, target)

    @property
    def is_slope(self) -> bool:
        return False

    # -- private ------------------------------------------------------------------------------------------------------

    def _curvatures(self, lins: Sequence[Linearization]) -> list[Float[Tensor, "probe token"]]:
        """‖H_ii r‖₁ for random signs r."""
        targets = [self.explained(lin)[0].tokens[0] for lin in lins]
        return block_norms(lins, targets, [self._signs(lin) for lin in lins])

    def _signs(self, lin: Linearization) -> Int8[Tensor, "probe token d_model"]:
        generator = self._random(lin)
        shape, device = (self.probes, *lin.embeddings.shape), lin.readout.device
        return torch.randint(0, 2, shape, generator=generator, device=device, dtype=torch.int8) * 2 - 1

    def _weight(self, weight: float, term: Tensor) -> float:
        """The weight of a term; with `normalize`, of its share."""
        total = float(term.sum()) if self.normalize else 1.0
        return weight / total if total else 0.0

    def _random(self, lin: Linearization) -> torch.Generator:
        return source(lin, self.generator, "HetaScope")

    def _require_askable(self, lin: Linearization) -> None:
        lin.require_readout()
        if lin.rules is not None:
            raise ValueError(
                f"HetaScope is about curvature, and under {lin.rules} rules what curves the network is constant: ask "
                "it of lin.under(None)."
            )
        _first_layer(lin.wrt)
        if self.gamma and self.mask not in ("zero", "mean"):
            _mask_token(lin, self.mask)
        self._random(lin)


def attention_flow(lin: Linearization) -> Float[Tensor, "token"]:
    """How much attention carries from token i to the position:

        M_i = Σ_l Σ_h Φ^lh_i ‖v^lh_i W_O^lh‖₁ / Z

    Φ^lh is the row of the position in the rollout Â^lh … Â^1h of head h through the layers up to l, with
    Â = ½ A + ½ 1, each row normalised; Z makes M sum to 1. Layers before the one where `wrt` stands do not count. All
    zeros where no head writes anything.

    Cost: one forward pass; head x token³ multiplications per layer; memory for patterns of one layer and the rollout.

    Raises:
        ValueError: for a model without attention patterns; for a `wrt` that is not the residual stream before a layer.
    """
    dtype = models.sum_dtype(lin.readout)
    first = _first_layer(lin.wrt)
    identity = torch.eye(len(lin.tokens), dtype=dtype, device=lin.readout.device)
    flow = identity.new_zeros(len(lin.tokens))
    rollout = identity
    for layer in models.attention_layers(lin.model, lin.tokens):
        if layer.layer >= first:
            step = (layer.pattern.to(identity) + identity) / 2
            rollout = (step / step.sum(-1, keepdim=True)) @ rollout
            flow += (rollout[:, -1] * layer.written_norms(ord=1)).sum(0)
    return flow / flow.sum().clamp(min=torch.finfo(dtype).tiny)


def information(lin: Linearization, mask: str | SupportsIndex) -> Float[Tensor, "token"]:
    """I_i = KL(p ‖ p with token i masked), in nats: what the prediction loses without it. In float64.

    Args:
        lin: a linearisation that ends at the readout.
        mask: "zero", "mean" (of the embeddings of the prompt), or the token that takes its place.

    Cost: one forward pass per token, in batches of bounded memory.

    Raises:
        ValueError: where a masked prompt gives NaN or infinite logits; for a mask that is not a token.
    """
    none = lin.tokens[:0]
    lost = effects(lin, _masking(lin, mask), each_alone(len(lin.tokens), lin.tokens.device), none)[1]
    if not lost.isfinite().all():
        first = int((~lost.isfinite()).nonzero()[0])
        raise ValueError(
            f"NaN or infinite logits with token {first} ({lin.str_tokens[first]!r}) masked by {mask!r}, in "
            f'{lin.readout.dtype}: take another mask, "mean" or a token'
            f"{', or load the model in float32 or bfloat16' if lin.readout.dtype == torch.float16 else ''}."
        )
    return lost


def _masking(lin: Linearization, mask: str | SupportsIndex) -> Float[Tensor, "1 d_model"]:
    """The embedding that takes a token's place."""
    if mask == "mean":
        return lin.embeddings.mean(0, keepdim=True)
    if mask == "zero":
        return substitute(lin, "zero")
    return models.embed(lin.model, torch.tensor([[_mask_token(lin, mask).id]], device=lin.tokens.device))[0]


def _mask_token(lin: Linearization, mask: str | SupportsIndex) -> Token:
    if lin.wrt != models.EMBEDDING:
        raise ValueError(
            f"mask={mask!r} puts another token into the prompt, but tokens are masked at {lin.wrt!r} here, inside the "
            'network: take mask="zero" or "mean".'
        )
    try:
        return models.token(lin.model, mask, what="mask")
    except (TypeError, ValueError) as error:
        raise type(error)(f'a mask is "zero", "mean" or a token of the vocabulary: {error}') from error


def _first_layer(wrt: str) -> int:
    """The first layer whose attention comes after `wrt`."""
    if wrt == models.EMBEDDING:
        return 0
    stream = re.fullmatch(r"blocks\.(\d+)\.hook_resid_pre", wrt)
    if stream is None:
        raise ValueError(
            f"HetaScope follows attention from the residual stream before a layer, not from {wrt!r}: linearise with "
            'wrt="hook_embed", the default, or wrt="blocks.3.hook_resid_pre", say.'
        )
    return int(stream[1])
