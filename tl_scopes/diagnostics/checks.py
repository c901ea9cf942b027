"""The verdict beside the picture: what a careful reviewer would ask of an answer."""

from collections.abc import Sequence
from math import isfinite, isnan

import torch
from torch import Tensor

from tl_scopes import models
from tl_scopes.centering import is_centered
from tl_scopes.diagnostics.again import linearize_again
from tl_scopes.diagnostics.check_report import Check, Checks
from tl_scopes.diagnostics.evidence import TOLERANCE, Checked
from tl_scopes.diagnostics.linearity_report import CONFIDENT, is_saturated
from tl_scopes.diagnostics.sink_report import can_be_sinks, uniform_mass
from tl_scopes.diagnostics.sinks import attention_mass
from tl_scopes.jacobian.pullback import NoSecondDerivativeError
from tl_scopes.models import Model
from tl_scopes.results.attribution import Attribution
from tl_scopes.scopes.corrections import Around
from tl_scopes.scopes.direction import DirectionScope
from tl_scopes.scopes.fisher import FisherScope
from tl_scopes.scopes.heta import HetaScope
from tl_scopes.scopes.path_integrated import PathIntegratedScope
from tl_scopes.scopes.spectral import SpectralScope

# Where "look" begins. Conventions, unless it says otherwise.
SINK = 0.3
"""Mean attention from later tokens that makes a sink: the threshold of Gu et al. 2024 (arXiv:2410.10781, section 3.2)
for a head, here for the mean over all heads, which has to be twice that of uniform attention as well: heads that look
for a word are no reason to set the word aside."""
SINK_SHARE = 0.3
"""Share of the scores on sinks; set aside, they make all other shares half as large again."""
REACH = 0.02
"""Part of the way to the nearest other token up to which the first order should hold. At that token the second order is
then five times the first. Hardly ever does it hold that far; less than this is unusual: on 54 prompts of the bundled
model's tasks it was so of 5 logits, of 20 log-probabilities (most of them saturated) and of no temperature."""
ROUNDINGS = 8
"""Two scores of a half-precision model that differ by fewer roundings have no known order: on the bundled model's
tasks, in bfloat16 and float16, half of the scores were off by 1 to 2 of them, one in ten by more than 5 to 14."""
FEW = 6
"""Tokens, half of which are compared with the other half."""
ERROR = 0.05
"""Relative standard error of the largest score."""
HALF = 1e-4
"""Rounding of what counts as half precision: float16 has 1e-3, float32 1e-7."""
CAPPED = 0.5
"""The slope that a soft-cap leaves of a logit."""


def checks(answer: Attribution, model: Model | None = None, *, thorough: bool = False) -> Checks:
    """Ask of an answer what a careful reviewer would, as cheaply as can be: `answer.checks()`.

    "fine" says that nothing is out of the ordinary, "look" that the finding should be read before the scores.

        sinks          Do the scores rest on attention sinks? Their share, beside an even one and the attention they
                       draw from later tokens. Look: above 30%, and twice an even share.
        linearity      How far does the first order reach? The radius of 10% error that curvature predicts along the
                       steepest direction of the top 3 tokens, against the distance to the nearest other token. Of a
                       quantity that is a vector it is measured instead, on the way to that token. A few percent
                       are usual: scores are about small moves. Look: below 2%.
        saturation     Has a confident prediction flattened the gradients? `LinearityReport.saturated`.
        weights        Do folding, centring, a soft-cap or half precision change what the scores mean?
        leave-one-out  Do the top 5 tokens do more than 5 others, drawn at random, when the mean embedding takes their
                       place? To the quantity that the scope asks about, and in KL divergence. Look: half of the top
                       ones or fewer, or a first one among the last half. Of random scores a quarter passes.
        estimation     How far off is a score that was estimated? By its own standard error. Look: above 5%.

    Args:
        answer: of `attribute`, of a map, of `attribute_many`; `without` some tokens, shares are of the rest.
        model: the model, where the answer was read from JSON or a pickle, or has outlived it. The same hooks must be
            set as then.
        thorough: replace every token, and give the rank correlation; measure the radius, by `linearity`.

    Cost: linearises anew. In all, 13 bare forward passes of a Llama of 8 layers for a `SemanticScope`, 12 for a
        `FisherScope` (128 tokens, width 512, one CPU core); 24 of the bundled model, which is so small that its hooks
        count. With `thorough` 260, and 380 of the bundled model: as `linearity` of three tokens, and leave-one-out.

    Raises:
        ValueError: without a model; for an answer that lacks tokens and does not know its prompt; where the model
            predicts something else than the answer says, because hooks or weights have changed or because it is of
            another point (`Linearization.at`). Else as `linearize` does.

    Source: sinks: Gu et al. 2024 (arXiv:2410.10781). Radius and saturation: see `linearity`. Leave-one-out: Li et al.
        2016 (arXiv:1612.08220).

    Example:
        >>> answer = tls.attribute(model, "The keys to the old cabinet near the door", tls.SemanticScope())
        >>> checks = answer.checks()
        >>> checks["sinks"].verdict, checks["leave-one-out"].verdict
        ('fine', 'fine')
    """
    one = Checked(answer, *linearize_again(answer, model), thorough)
    asked = (_sinks, _linearity, _saturation, _weights, _leave_one_out, _estimation)
    return Checks(tuple(ask(one) for ask in asked), answer.scope, answer.model, answer.position)


def _sinks(one: Checked) -> Check:
    name, tokens = "sinks", len(one.lin.tokens)
    if tokens < 2:
        return Check(name, "not applicable", "the prompt has one token, which no later one attends to", "none")
    try:
        mass = attention_mass(one.lin.model, one.lin.tokens).mean((0, 1)).cpu()
    except ValueError as error:
        return Check(name, "not applicable", str(error).split(". ")[0].rstrip("."), "none")
    rests = (mass > (2 * uniform_mass(tokens)).clamp(min=SINK)) & can_be_sinks(tokens, SINK)
    sinks = sorted({0, *rests.nonzero()[:, 0].tolist()})
    here = [k for k in sinks if k in one.shares]
    cost = "1 forward pass"
    if not here:
        return Check(name, "fine", f"{one.named(sinks)} {'are' if len(sinks) > 1 else 'is'} set aside", cost)
    held, drawn = sum(abs(one.shares[k]) for k in here), " and ".join(f"{float(mass[k]):.0%}" for k in here)
    looked = held > max(SINK_SHARE, 2 * len(here) / len(one.shares))
    finding = (
        f"{one.named(here)} {'hold' if len(here) > 1 else 'holds'} {held:.0%} of the scores, where an even share is "
        f"{len(here) / len(one.shares):.0%}, and {drawn} of the attention from later tokens"
        + (f": answer.without({here}) sets aside" if looked else "")
    )
    return Check(name, "look" if looked else "fine", finding, cost)


def _linearity(one: Checked) -> Check:
    lin, name = one.lin, "linearity"
    if one.q is None:
        return Check(name, "not applicable", _no_quantity(one), "none")
    ranks = isinstance(one.scope, SpectralScope) and one.scope.statistic == "effective_rank"
    if ranks or isinstance(one.scope, PathIntegratedScope | HetaScope):
        return Check(name, "not applicable", "the scores are no slopes of anything at the prompt", "none")
    if len(lin.tokens) < 2 and lin.wrt != models.EMBEDDING:
        return Check(name, "not applicable", f"at {lin.wrt!r} there is no other token to go to", "none")
    if len(one.q.value) > 1 and torch.finfo(lin.readout.dtype).eps > HALF and not one.thorough:
        return Check(name, "not applicable", f"in {one.answer.dtype} rounding hides a small step", "none")
    try:
        reach = one.reach
    except NoSecondDerivativeError as error:
        return Check(name, "not applicable", str(error).rstrip("."), "none")
    parts = reach.radius / reach.distance
    middle = int(parts.argsort()[(len(parts) - 1) // 2])
    part, size = float(parts[middle]), float(reach.radius[middle])
    if isnan(size):
        return Check(name, "not applicable", f"in {one.answer.dtype} rounding hides the changes", reach.cost)
    looked = not part >= REACH
    up_to = f"up to a norm of {size:.2g}, {part:.0%} of the way" if isfinite(size) else "all the way"
    tokens = f"median of the top {len(parts)}" if len(parts) > 1 else "the first token"
    finding = f"the first order is within {TOLERANCE:.0%} {up_to} to the nearest other token ({reach.how}; {tokens})"
    return Check(name, "look" if looked else "fine", finding, reach.cost)


def _saturation(one: Checked) -> Check:
    p = one.probability
    if p is None:
        return Check("saturation", "not applicable", f"the scores end at {one.lin.of!r}, before the prediction", "none")
    best = f"p({one.lin.token().text!r}) = {p:.1%}" if p < 0.999 else f"p({one.lin.token().text!r}) = 1 − {1 - p:.0e}"
    if p <= CONFIDENT:
        return Check("saturation", "fine", f"{best}, which leaves the gradients room", "none")
    if isinstance(one.scope, PathIntegratedScope):
        return Check("saturation", "fine", f"{best}, but the gradients come from along a path", "none")
    if one.q is None:
        return Check("saturation", "not applicable", f"{best}; {_no_quantity(one)}", "none")
    effects = one.effects
    assert effects.change is not None
    understated = one.understated(effects)
    worst = int(effects.change.argmax())
    looked = is_saturated(p, effects.change, understated)
    times = float(understated[worst])
    shown = f"{times:,.0f}" if times >= 10 else f"{times:.1f}"
    finding = f"{best}; replacing {one.named([effects.positions[worst]])} does {shown} times what its slope allows" + (
        ": scores are too small for what matters, ask for a logit or a difference of logits" if looked else ""
    )
    cost = "as leave-one-out" + ("" if len(one.q.value) == 1 else ", 2 backward passes")
    return Check("saturation", "look" if looked else "fine", finding, cost)


def _weights(one: Checked) -> Check:
    said, looked = [], False
    lin, scope, answer = one.lin, one.scope, one.answer
    if lin.trace.logits is not None:
        # Questions in which the readout's own coordinates count, which a folded gain changes.
        while isinstance(scope, Around):
            scope = scope.scope
        of_coordinates = isinstance(scope, DirectionScope) or (
            (isinstance(scope, SpectralScope) and scope.of == "readout")
            or (isinstance(scope, FisherScope) and scope.rank is not None)
        )
        if models.has_constant_readout_norm(lin.model):
            looked |= of_coordinates
            counts = "counts here: not comparable with unfolded weights" if of_coordinates else "is all the same here"
            said.append(f"the final norm has no gain (folded, or untrained), which {counts}")
        if is_centered(lin):
            seen = any("centred" in note for note in answer.notes)
            looked |= seen
            what = "the logit is that minus the vocabulary's mean: ask for `versus`" if seen else "no matter here"
            said.append(f"the unembedding is centred, {what}")
        slope = lin.trace.slope[lin.row]
        id = answer.target.id if answer.target else int(lin.logits.argmax())
        left = float(slope[id] / slope.max())
        if float(slope.min()) < 0.999 * float(slope.max()):
            looked |= left < CAPPED
            said.append(f"a soft-cap leaves {left:.0%} of the slope of {lin.token(id).text!r}")
    eps = torch.finfo(lin.readout.dtype).eps
    first, *rest = answer.top(2)
    if eps > HALF and rest:
        gap = 1 - abs(rest[0].score / first.score) if first.score else 0.0
        close = gap < ROUNDINGS * eps
        looked |= close
        order = "too close for its rounding" if close else "farther apart than its rounding"
        said.append(f"{answer.dtype} rounds to {eps:.1%}, and the first two scores are {order} ({gap:.1%})")
    finding = "; ".join(said) or f"neither folded, centred nor capped, in {answer.dtype}"
    return Check("weights", "look" if looked else "fine", finding, "none")


def _leave_one_out(one: Checked) -> Check:
    name = "leave-one-out"
    if len(one.shares) < FEW:
        return Check(name, "not applicable", f"fewer than {FEW} tokens are too few to compare", "none")
    effects = one.effects
    known = [values for values in (effects.change, effects.divergence) if values is not None]
    if not known:
        return Check(name, "not applicable", _no_quantity(one), "none")
    count, tokens = effects.top, len(effects.positions)

    def said(numbers: Sequence[object]) -> str:
        first, *kl = numbers
        return f"{first} (KL: {kl[0]})" if kl else f"{first}"

    more = [int((values[:count] > values[count:].median()).sum()) for values in known]
    ranks = [1 + int((values > values[0]).sum()) for values in known]
    what = "the prediction, in KL," if effects.change is None else "what is asked about"
    finding = (
        f"replaced, {said(more)} of the top {count} change {what} more than the median of the other {tokens - count}; "
        f"the first is number {said(ranks)} of {tokens}"
    )
    if one.thorough:
        finding += f"; rank correlation {said([f'{r:.2f}' for r in _correlations(one, known)])}"
    # By what the scope asks about, where that is known. Chance is half, either way.
    looked = 2 * more[0] <= count or 2 * ranks[0] > tokens + 1
    return Check(name, "look" if looked else "fine", finding, f"{tokens} forward passes")


def _correlations(one: Checked, effects: Sequence[Tensor]) -> list[float]:
    from tl_scopes.faithfulness.measures import spearman  # which comes after the diagnostics

    scores = dict(zip(one.answer.positions, one.answer.scores.abs(), strict=True))
    listed = torch.stack([scores[i] for i in one.effects.positions])
    return [spearman(listed, values) for values in effects]


def _estimation(one: Checked) -> Check:
    name, details, scope = "estimation", one.answer.details, one.scope
    if "trace_share" in details:
        share = details["trace_share"]
        finding = f"the directions kept hold {share:.1%} of the trace"
        return Check(name, "fine" if share >= 1 - ERROR else "look", finding, "none")
    statistic = scope.statistic if isinstance(scope, SpectralScope) else ""
    known = [kind for kind in ("standard_error", "quadrature_error", f"{statistic}_error") if kind in details]
    if statistic == "largest" and "largest_at_most" in details:
        kind, errors = "distance to its upper bound", details["largest_at_most"] - one.answer.scores
    elif known:
        kind, errors = known[0].replace("_", " "), details[known[0]]
    else:
        return Check(name, "not applicable", "nothing was estimated", "none")
    if not errors.any():
        return Check(name, "not applicable", "nothing was estimated", "none")
    first = one.answer.top(1)[0]
    error = float(errors[one.answer.positions.index(first.position)]) / (abs(first.score) or 1.0)
    finding = f"the score of {first.token!r} is known to {error:.1%} ({kind})"
    if not isfinite(error):
        finding = "how far off the scores are is not known: give it more probes"
    return Check(name, "fine" if error <= ERROR else "look", finding, "none")


def _no_quantity(one: Checked) -> str:
    if one.scope is None:
        return "the scope is not known: this answer was read, and its question is no public scope without tensors"
    if isinstance(one.scope, Around):
        return f"scores of {type(one.scope).__name__} are no slopes of the model as it is"
    return f"{type(one.scope).__name__} asks about no quantity of which the scores would be slopes"
