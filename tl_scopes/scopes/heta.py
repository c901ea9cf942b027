"""HETA: where attention flows from, times the curvature there and the information lost without the token."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import SupportsIndex

import torch
from jaxtyping import Float, Int8
from torch import Tensor
from tqdm.auto import tqdm

from tl_scopes import models
from tl_scopes.jacobian import pullback
from tl_scopes.jacobian.curvature import block_norms
from tl_scopes.jacobian.linearization import Linearization
from tl_scopes.jacobian.randomness import source
from tl_scopes.models import Token
from tl_scopes.scopes.scope import Measurement, Observable, Scope


def attention_flow(lin: Linearization) -> Float[Tensor, "token"]:
    """M_i = Σ_l Σ_h Φ^lh_i ‖v^lh_i W_O^lh‖₁ / Z: how much attention carries from token i to the position. Sums to 1.

    Φ^lh is the row of the position in the rollout Â^lh … Â^1h of head h through the layers up to l, with
    Â = ½ A + ½ 1, each row normalised. From the layer where `wrt` is on. All zeros where no head writes anything.

    Cost: one forward pass; head x token³ multiplications per layer; memory for patterns of one layer and the rollout.

    Raises:
        ValueError: a model without attention patterns; a `wrt` that is not the residual stream before a layer.
    """
    dtype = torch.promote_types(lin.readout.dtype, torch.float32)
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
        ValueError: where a masked prompt gives NaN or infinite logits; for a mask that is no token.
    """
    tokens, x = lin.tokens, lin.embeddings
    size = pullback.batch_size(lin.model, lin.trace.perturbations[lin.wrt][:1])
    filler = None if mask in ("zero", "mean") else _mask_token(lin, mask)
    found = []
    with tqdm(total=len(tokens), desc="masked predictions", delay=3, leave=False) as bar:
        for some in torch.arange(len(tokens), device=tokens.device).split(size):
            prompts, values, masked = tokens.repeat(len(some), 1), None, (torch.arange(len(some)), some)
            if filler is not None:
                prompts[masked] = filler.id
            else:
                values = x.repeat(len(some), 1, 1)
                values[masked] = x.mean(0) if mask == "mean" else 0
            logits = models.predict(lin.model, prompts, wrt=lin.wrt, values=values).to(lin.log_probs)
            finite = logits.isfinite().all(-1)
            if not finite.all():
                first = int(some[~finite][0])
                raise ValueError(
                    f"NaN or infinite logits with token {first} ({lin.str_tokens[first]!r}) masked by {mask!r}: "
                    'take another mask, "mean" or a token, or float32 if the model overflows.'
                )
            found.append((lin.log_probs.exp() * (lin.log_probs - logits.log_softmax(-1))).sum(-1).clamp(min=0))
            bar.update(len(some))
    return torch.cat(found)


def _mask_token(lin: Linearization, mask: str | SupportsIndex) -> Token:
    if lin.wrt != "hook_embed":
        raise ValueError(
            f"mask={mask!r} puts another token into the prompt, but tokens are masked at {lin.wrt!r} here, inside the "
            'network: take mask="zero" or "mean".'
        )
    try:
        return models.token(lin.model, mask, lin.model.cfg.d_vocab, what="mask")
    except (TypeError, ValueError) as error:
        raise type(error)(f'a mask is "zero", "mean" or a token of the vocabulary: {error}') from error


def _first_layer(wrt: str) -> int:
    """The first layer whose attention comes after `wrt`."""
    if wrt == "hook_embed":
        return 0
    stream = re.fullmatch(r"blocks\.(\d+)\.hook_resid_pre", wrt)
    if stream is None:
        raise ValueError(
            f"HetaScope follows attention from the residual stream before a layer, not from {wrt!r}: linearise with "
            'wrt="hook_embed", the default, or wrt="blocks.3.hook_resid_pre", say.'
        )
    return int(stream[1])


def _require_own(lin: Linearization) -> None:
    """Refuse a linearisation of another point, or of other hooks, than the model would run now.

    Attention and masked predictions come from new forward passes: they would tell of another prediction.
    """
    models.check_model(lin.model)
    now = models.predict(lin.model, lin.tokens[None], wrt=lin.wrt)[0]
    difference, largest = (now - lin.logits).abs().max(), lin.logits.abs().max()
    if not difference <= max(torch.finfo(now.dtype).eps, 1e-7) ** 0.5 * largest:
        raise ValueError(
            "the model predicts something else now than where it was linearised, logits differ by up to "
            f"{float(difference):.2g}, and HetaScope has to run it again: ask under the same hooks, and at the "
            "prompt's own embeddings, not at a point that `at` moved to."
        )


@dataclass(frozen=True)
class HetaScope(Scope):
    """Attention flow, times curvature plus the information lost without the token (HETA):

        score_i = M_i (β S_i + γ I_i)

        M_i  flow of attention from token i to the position, over layers and heads (`attention_flow`); sums to 1
        S_i  mean of ‖H_ii r‖₁ over random signs r, with H_ii = ∂² log p(target) / ∂x_i²
        I_i  KL(p ‖ p with token i masked)

    The answer has them, unweighted: `answer.M`, `answer.S`, `answer.I`. A term of weight 0 is not computed. S is an
    estimate of a number between 0.7 and 1 times the sum of the lengths of the rows of H_ii; `answer.standard_error` is
    what that makes in the scores, at worst 0.76/√probes of a score.

    Args:
        target: the token, as text or id; None is the most likely next token.
        beta: weight of S.
        gamma: weight of I.
        probes: how many random r per token.
        mask: what takes the place of a token for I: "zero", "mean" (of the embeddings of this prompt), or a token, as
            text or id, `model.tokenizer.pad_token_id` say.
        normalize: divide S and I by their sums over the tokens first, so that β and γ weigh like with like.
        generator: source of the random numbers, on the model's device. None is one of its own for every prompt, seeded
            by its tokens: the same prompt gets the same numbers, another one others.

    Unit: S is in nats per squared unit of embedding norm, I in nats. The paper adds them as they are: on prompts of the
        bundled model S makes anything from 0% to 100% of the scores. With `normalize` both are shares.
    Cost: high. probes x tokens Hessian-vector products, about 2 backward passes each, in batches; tokens + 2 forward
        passes besides. For 100 tokens that is as much as 2,000 Semantic Scopes. A progress bar counts the products.
        Memory for the graph of the forward pass, about as much again, and a batch.
    Raises: ValueError for models without attention patterns (Mamba); for a `wrt` that is neither "hook_embed" nor
        "blocks.L.hook_resid_pre"; for a linearisation moved by `at`, or made under other hooks; for a target or a mask
        that is several tokens or unknown, numbers out of range, a generator on another device. RuntimeError under an
        attention kernel that cannot be differentiated twice: load with attn_implementation="eager". TypeError for a
        generator that is none.
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
            weight = getattr(self, name)
            if not isinstance(weight, int | float) or not 0 <= weight < math.inf:
                raise ValueError(f"{name} is the weight of a term, a number from 0 on, got {weight!r}.")
        if not self.beta + self.gamma:
            raise ValueError("beta and gamma are both 0, so that all scores would be: give one of them a weight.")
        probes = models.as_count(self.probes, "probes is a number of random directions per token, 1 at least")
        object.__setattr__(self, "probes", probes)

    def explained(self, lin: Linearization) -> tuple[Token, None]:
        return lin.token(self.target), None

    def observable(self, lin: Linearization) -> Observable:
        """log p(target), whose curvature S is; M and I are of no single number."""
        target = self.explained(lin)[0].id
        return lambda readout, logits: logits.log_softmax(-1)[target]

    def unit(self, lin: Linearization) -> str:
        if self.normalize:
            return "weighted share"
        units = ((self.beta, f"nat per squared {lin.unit}"), (self.gamma, "nat"))
        return " + ".join(unit for weight, unit in units if weight)

    def notes(self, lin: Linearization) -> tuple[str, ...]:
        if self.normalize or not self.beta or not self.gamma:
            return ()
        return ("curvature and information are added in different units, as in the paper: see normalize=True",)

    def measure(self, lin: Linearization) -> Measurement:
        return self.measure_many([lin])[0]

    def measure_many(self, lins: Sequence[Linearization]) -> list[Measurement]:
        for lin in lins:
            self._check(lin)
        flows = [attention_flow(lin) for lin in lins]
        informations = [information(lin, self.mask) if self.gamma else None for lin in lins]
        norms: Sequence[Tensor | None] = [None] * len(lins)
        if self.beta:
            norms = block_norms(lins, [self.explained(lin)[0] for lin in lins], [self._signs(lin) for lin in lins])
        return [self._combined(*terms) for terms in zip(flows, norms, informations, strict=True)]

    def _check(self, lin: Linearization) -> None:
        lin.require_readout()
        _first_layer(lin.wrt)
        if self.gamma and self.mask not in ("zero", "mean"):
            _mask_token(lin, self.mask)
        self._random(lin)
        _require_own(lin)

    def _signs(self, lin: Linearization) -> Int8[Tensor, "probe token d_model"]:
        generator = self._random(lin)
        shape, device = (self.probes, *lin.embeddings.shape), lin.readout.device
        return torch.randint(0, 2, shape, generator=generator, device=device, dtype=torch.int8) * 2 - 1

    def _random(self, lin: Linearization) -> torch.Generator:
        return source(lin, self.generator, "HetaScope")

    def _combined(self, flow: Tensor, norms: Tensor | None, lost: Tensor | None) -> Measurement:
        details, scores = {"M": flow}, torch.zeros_like(flow)
        if norms is not None:
            curvature, n = norms.mean(0), len(norms)
            weighted = flow * self._weight(self.beta, curvature)
            scores = scores + weighted * curvature
            error = norms.std(0) / n**0.5 if n > 1 else torch.full_like(curvature, torch.inf)
            details |= {"S": curvature, "standard_error": weighted * error}
        if lost is not None:
            scores = scores + flow * self._weight(self.gamma, lost) * lost
            details["I"] = lost
        return Measurement(scores, details)

    def _weight(self, weight: float, term: Tensor) -> float:
        total = float(term.sum()) if self.normalize else 1.0
        return weight / total if total else 0.0
