"""The verdict beside the picture: what a careful reviewer would ask about the scores of one prediction."""

from collections.abc import Callable, Iterable, Sequence
from math import isnan
from typing import NamedTuple, SupportsIndex

import torch
from torch import Tensor

from tl_scopes import models
from tl_scopes.diagnostics.check_report import Check, Checks
from tl_scopes.diagnostics.evidence import TOLERANCE, Evidence
from tl_scopes.diagnostics.linearity_report import CONFIDENT, is_saturated
from tl_scopes.diagnostics.sink_report import can_be_sinks, uniform_mass
from tl_scopes.diagnostics.sinks import attention_mass
from tl_scopes.jacobian.linearization import Linearization, require_linearization
from tl_scopes.models.arguments import as_flag
from tl_scopes.models.wording import first_sentence
from tl_scopes.rank_correlation import spearman
from tl_scopes.scopes.scope import Scope, require_scope
from tl_scopes.scopes.semantic import SemanticScope

# Where "look" begins. These are conventions, unless it says otherwise.
SINK = 0.3
"""The mean attention from later tokens that makes a sink: the threshold of Gu et al. 2024 (arXiv:2410.10781, section
3.2) for a head, here for the mean over all heads. It has to be twice that of uniform attention as well, since heads
that look for a word are not a reason to set the word aside."""
SINK_SHARE = 0.3
"""A share of the scores on sinks; setting them aside makes all other shares half as large again."""
REACH = 0.01
"""The part of the way to the nearest other token up to which the first order should hold. At that token the second
order is then ten times the first. The first order hardly ever reaches the token itself, since that is a variant of the
same word in case or spacing, but less than this is unusual: of 11 logits of SmolLM2-135M, whose median was 3.4%, it was
less for 3, two of which were a contradictory instruction and a recall between distractors."""
ROUNDINGS = 8
"""Two scores of a half-precision model that differ by fewer roundings have no known order. On the bundled model's
tasks, in bfloat16 and float16, half of the scores were off by 1 to 2 roundings, one in ten by more than 5 to 14."""
PLACE, FOR_ITSELF = 2.0, 1.5
"""A place counts if whatever stands there gets so many times an even share, a token if it gets so many times its
place's. On SmolLM2-135M the first token after BOS holds 15 to 39% of the scores of a short prompt, whatever it is."""
FEW = 6
"""The least number of tokens of which one half is compared with the other."""
ERROR = 0.05
"""The relative error of the largest score above which to look."""
HALF = 1e-4
"""A precision with a larger rounding than this counts as half: float16 has 1e-3, float32 1e-7."""
CAPPED = 0.5
"""The part of a logit's slope that a soft-cap has to leave."""


def check(
    lin: Linearization,
    scope: Scope = SemanticScope(),
    *,
    without: Iterable[SupportsIndex] = (),
    thorough: bool = False,
) -> Checks:
    """Ask the question of a scope, and ask of its scores what a careful reviewer would, as cheaply as can be.

    "fine" says that nothing is out of the ordinary, "look" that the finding should be read before the scores, "not
    applicable" that the check cannot be made, and why.

        sinks          Do the scores rest on attention sinks? Their share, beside an even one and the attention they
                       draw from later tokens. Look: above 30%, and twice an even share.
        position       Would any token get this in the place of the first one? The share of its place when the prompt's
                       tokens are shuffled, twice. Look: the place gets twice an even share, and its token hardly more.
        repetition     Is the first token the target itself, earlier in the prompt, while the model answers something
                       else? Scopes put it first whether or not it was looked up. Look: if so.
        linearity      How far does the first order reach? The radius of 10% error along the steepest direction of the
                       top 3 tokens, as a part of the distance to the nearest other token. A step of 1% of that distance
                       predicts the radius (the curvature does, where rounding hides such a step), and a second step of
                       that radius tests it. A metric that is a vector gets one step, towards that token. A few percent
                       are usual, since scores are about small moves. Look: below 1%.
        saturation     Has a confident prediction flattened the gradients? `LinearityReport.saturated`.
        weights        Do folding, centring, a soft-cap or half precision change what the scores mean?
        leave-one-out  Do the top 3 tokens change the prediction more than 3 others, drawn at random, when the mean
                       embedding takes their place? By the scope's metric, and in KL divergence. Look: half of the top
                       ones or fewer do, or the first one is not among the first two of six. A quarter of random scores
                       passes.
        estimation     How far off is a score that was estimated, by what the scope says of it? Look: above 5%.

    What the checks need to know about a scope, the scope says itself: its metric, whether its scores are slopes of it,
    whether they saturate, whether they depend on the coordinates of the readout, and how well they are known.

    Args:
        lin: a linearisation at the prompt; of an answer of several tokens too, about which all checks are made that are
            not about a single prediction.
        scope: the question; by default `SemanticScope()`. `Checks.answer` is its answer.
        without: positions to set aside first, as by `Attribution.without`; shares are then of the other tokens.
        thorough: replace every token, and give the rank correlation; measure the radius, by `linearity`.

    Cost: three times the scope's own, at the prompt and at two shuffles of its tokens; some 15 forward passes, and
        a backward pass. Each line says what it took. With `thorough` ten times as much and more: as `linearity` of
        three tokens, and a forward pass for every token.

    Raises:
        TypeError: for something that is not a Linearization, or not a scope; for positions that are not several
            integers; for a `thorough` that is not a bool.
        ValueError: when the model's hooks or weights have changed since it was linearised, for a linearisation that
            `at` moved, and for a `without` that leaves nothing but the template of a chat. Else as the scope does.

    Source: sinks: Gu et al. 2024 (arXiv:2410.10781). Radius and saturation: see `linearity`. Leave-one-out: Li et al.
        2016 (arXiv:1612.08220).

    Example:
        >>> lin = tls.linearize(model, "The keys to the old cabinet near the door")
        >>> checks = tls.check(lin, tls.SemanticScope())
        >>> checks["sinks"].verdict, checks["leave-one-out"].verdict
        ('fine', 'fine')
    """
    require_linearization(lin, "check")
    require_scope(scope)
    thorough = as_flag(thorough, "thorough")
    aside = _several(without)
    lin.require_repeatable()
    scope, lin = scope.about(lin)
    evidence = Evidence(lin, scope, scope(lin), thorough, aside)
    if not any(evidence.answer.is_counted):
        where = f"without {aside} the prompt has" if aside else "up to this position the prompt has"
        raise ValueError(
            f"there is no token whose share counts: {where} nothing but {' and '.join(evidence.answer.uncounted)}."
        )
    return Checks(tuple(_made(name, ask, evidence) for name, ask in _CHECKS.items()), evidence.answer)


class Finding(NamedTuple):
    """What a check found."""

    looked: bool
    """Whether the finding should be read before the scores."""
    said: str
    """The finding, in a sentence."""
    cost: str
    """What it took to find out."""


class NotApplicableError(ValueError):
    """A check cannot be made, for a reason that the message says, up to its first full stop."""


def _made(name: str, ask: Callable[[Evidence], Finding], evidence: Evidence) -> Check:
    """A check; where it cannot be made, the reason in its place, so that the others are made all the same."""
    try:
        looked, said, cost = ask(evidence)
    except (ValueError, RuntimeError, MemoryError) as error:
        return Check(name, "not applicable", first_sentence(error), "none")
    return Check(name, "look" if looked else "fine", said, cost)


def _several(positions: object) -> list[SupportsIndex]:
    if not isinstance(positions, Iterable):
        raise TypeError(f"without takes several positions, got {positions!r}: write [{positions!r}].")
    return list(positions)


# -- the checks -------------------------------------------------------------------------------------------------------


def _sinks(one: Evidence) -> Finding:
    tokens = len(one.lin.run_tokens)
    if tokens < 2:
        raise NotApplicableError("the prompt has one token, which no later one attends to")
    mass = attention_mass(one.lin.model, one.lin.run_tokens).mean((0, 1)).cpu()
    rests = (mass > (2 * uniform_mass(tokens)).clamp(min=SINK)) & can_be_sinks(tokens, SINK)
    sinks = sorted({0, *rests.nonzero()[:, 0].tolist()})
    here = [k for k in sinks if k in one.shares]
    held, even = sum(abs(one.shares[k]) for k in here), len(here) / len(one.shares)
    looked = held > max(SINK_SHARE, 2 * even)

    if here:
        said = (
            f"{one.named(here)} {'hold' if len(here) > 1 else 'holds'} {held:.0%} of the scores, where an even share "
            f"is {even:.0%}, and {' and '.join(f'{float(mass[k]):.0%}' for k in here)} of the attention from later "
            "tokens"
        )
        if looked:
            said += f": answer.without({here}) sets aside"
        elif held <= 2 * even and any(bool(rests[k]) for k in here):
            said += ": attention rests there, and the scores do not"
    else:
        said = f"{one.named(sinks)} {'are' if len(sinks) > 1 else 'is'} set aside"
    return Finding(looked, said, "1 forward pass")


def _position(one: Evidence) -> Finding:
    if not one.scope.is_slope:
        raise NotApplicableError("this check is for scores that are slopes at the prompt, and these are not")
    if len(one.shares) < 3:
        raise NotApplicableError("there are too few tokens to shuffle")
    expected = one.expected
    first, even = one.answer.top(1)[0].position, 1 / len(one.shares)
    held, of_place = abs(one.shares[first]), expected[first]
    looked = of_place >= PLACE * even and held <= FOR_ITSELF * of_place
    said = (
        f"{one.named([first])} holds {held:.0%} of the scores, other tokens of the prompt in its place "
        f"{of_place:.0%} (mean of {one.shuffles} shuffles)"
    )
    if looked:
        said += ": its place explains it"
        said += ", which PositionCorrectedScope divides out" if one.scores.min() >= 0 else ""
    return Finding(looked, said, f"the scope at {one.shuffles} shuffles")


def _repetition(one: Evidence) -> Finding:
    target = one.answer.target
    if target is None:
        raise NotApplicableError("no token is explained")
    _require_one(one)
    if target.any_of:
        raise NotApplicableError("any of several tokens is explained")
    (lin,) = one.lin.single
    first, answered = one.answer.top(1)[0], lin.token()
    if int(lin.tokens[first.position]) != target.id:
        return Finding(False, f"the first token is not {target.text!r} itself", "none")
    if answered.id == target.id:
        return Finding(False, f"the first token is {target.text!r} itself, which the model answers", "none")
    p = float(lin.log_probs[target.id].exp())
    said = (
        f"the first token is {target.text!r} itself at {first.position}, and the model answers {answered.text!r} "
        f"(p({target.text!r}) = {p:.1%}): scopes name a token's own earlier occurrence whether or not it was looked up"
    )
    return Finding(True, said, "none")


def _linearity(one: Evidence) -> Finding:
    _require_reach(one)
    reach = one.reach
    parts = reach.radius / reach.distance
    middle = int(parts.argsort()[(len(parts) - 1) // 2])
    part, size = float(parts[middle]), float(reach.radius[middle])
    if isnan(size):
        raise NotApplicableError(f"in {one.answer.dtype} rounding hides the changes")
    looked = not part >= REACH

    up_to = f"up to a norm of {size:.2g}, {part:.0%} of the way" if part < 1 else "all the way"
    tokens = f"median of the top {len(parts)}" if len(parts) > 1 else "the first token"
    said = f"the first order is within {TOLERANCE:.0%} {up_to} to the nearest other token ({reach.how}; {tokens})"
    return Finding(looked, said, reach.cost)


def _require_one(one: Evidence) -> None:
    """Refuse several predictions, for a check that is about one."""
    if len(one.lin.single) > 1:
        raise NotApplicableError(f"it is about one prediction, and this answer has {len(one.lin.single)}")


def _require_reach(one: Evidence) -> None:
    """Refuse what has no radius, before any is sought."""
    lin = one.lin
    if one.q is None:
        raise NotApplicableError(_no_metric(one))
    if not one.scope.is_slope:
        raise NotApplicableError("the scores are not slopes of anything at the prompt")
    if lin.rules is not None:
        raise NotApplicableError(_not_its_own(one))
    if len(lin.tokens) < 2 and lin.wrt != models.EMBEDDING:
        raise NotApplicableError(f"at {lin.wrt!r} there is no other token to go to")
    if len(one.q.value) > 1 and torch.finfo(lin.readout.dtype).eps > HALF and not one.thorough:
        raise NotApplicableError(f"in {one.answer.dtype} rounding hides a small step")


def _saturation(one: Evidence) -> Finding:
    if one.probability is None:
        raise NotApplicableError(f"the scores end at {one.lin.of!r}, before the prediction")
    _require_one(one)
    best = f"p({one.lin.token().text!r}) = {_shown(one)}"
    if one.probability <= CONFIDENT:
        return Finding(False, f"{best}, which leaves the gradients room", "none")
    if not one.scope.saturates:
        return Finding(False, f"{best}, but the gradients come from along a path", "none")
    if one.lin.rules is not None:
        raise NotApplicableError(f"{best}; {_not_its_own(one)}")
    if one.q is None:
        raise NotApplicableError(f"{best}; {_no_metric(one)}")
    effects = one.effects
    assert effects.change is not None
    understated = one.understated(effects)
    looked = is_saturated(one.probability, effects.change, understated)

    worst = int(effects.change.argmax())
    times = float(understated[worst])
    said = (
        f"{best}; replacing {one.named([effects.positions[worst]])} does "
        f"{f'{times:,.0f}' if times >= 10 else f'{times:.1f}'} times what its slope allows"
        + (": scores are too small for what matters, ask for a logit or a difference of logits" if looked else "")
    )
    return Finding(looked, said, "as leave-one-out" + ("" if len(one.q.value) == 1 else ", 2 backward passes"))


def _shown(one: Evidence) -> str:
    """The probability of the most likely next token; of a sure one, what is missing from 1."""
    p = one.probability
    assert p is not None
    return f"{p:.1%}" if p < 0.999 else f"1 − {one.left_open:.0e}"


def _weights(one: Evidence) -> Finding:
    parts = [part for part in (_folded(one), _centred(one), _capped(one), _rounded(one)) if part is not None]
    looked = any(part[0] for part in parts)
    said = "; ".join(part[1] for part in parts) or f"neither folded, centred nor capped, in {one.answer.dtype}"
    return Finding(looked, said, "none")


def _folded(one: Evidence) -> tuple[bool, str] | None:
    if one.lin.trace.logits is None or not models.has_constant_readout_norm(one.lin.model):
        return None
    if one.scope.depends_on_basis:
        so = "which makes the scores incomparable with those of unfolded weights"
    else:
        so = "which does not change these scores"
    return one.scope.depends_on_basis, f"the final norm has no gain (folded, or untrained), {so}"


def _centred(one: Evidence) -> tuple[bool, str] | None:
    if one.lin.trace.logits is None or not one.lin.is_centered:
        return None
    if one.scope.depends_on_mean_logit(one.lin):
        so = "so that the logit is counted from the vocabulary's mean: ask for `versus`"
    else:
        so = "which does not change these scores"
    return one.scope.depends_on_mean_logit(one.lin), f"the unembedding is centred, {so}"


def _capped(one: Evidence) -> tuple[bool, str] | None:
    if one.lin.trace.logits is None:
        return None
    slope = one.lin.trace.slope[one.lin.row]
    if float(slope.min()) >= 0.999 * float(slope.max()):
        return None
    token = one.answer.target.tokens[0] if one.answer.target else one.lin.token()
    left = float(slope[token.id] / slope.max())
    return left < CAPPED, f"a soft-cap leaves {left:.0%} of the slope of {token.text!r}"


def _rounded(one: Evidence) -> tuple[bool, str] | None:
    eps = torch.finfo(one.lin.readout.dtype).eps
    first, *others = one.answer.top(2)
    if eps <= HALF or not others:
        return None
    gap = 1 - abs(others[0].score / first.score) if first.score else 0.0
    close = gap < ROUNDINGS * eps
    order = "too close for its rounding" if close else "farther apart than its rounding"
    return close, f"{one.answer.dtype} rounds to {eps:.1%}, and the first two scores are {order} ({gap:.1%})"


def _leave_one_out(one: Evidence) -> Finding:
    if len(one.shares) < FEW:
        raise NotApplicableError(f"fewer than {FEW} tokens are too few to compare")
    effects = one.effects
    # The scope's metric first, where it has one; then KL, where there is a prediction.
    known = [values for values in (effects.change, effects.divergence) if values is not None]
    if not known:
        raise NotApplicableError(_no_metric(one))
    count, tokens = effects.top, len(effects.positions)
    more = [int((values[:count] > values[count:].median()).sum()) for values in known]
    ranks = [1 + int((values > values[0]).sum()) for values in known]
    # By chance the first condition holds in half of all cases, the second in two thirds.
    looked = 2 * more[0] <= count or 3 * ranks[0] > tokens + 2

    def said(numbers: Sequence[object]) -> str:
        first, *kl = numbers
        return f"{first} (KL: {kl[0]})" if kl else f"{first}"

    what = "the prediction, in KL," if effects.change is None else "what is asked about"
    finding = (
        f"replaced, {said(more)} of the top {count} change {what} more than the median of the other {tokens - count}; "
        f"the first is number {said(ranks)} of {tokens}"
    )
    if one.thorough:
        finding += f"; rank correlation {said([f'{r:.2f}' for r in _correlations(one, known)])}"
    return Finding(looked, finding, f"{tokens} forward passes")


def _correlations(one: Evidence, effects: Sequence[Tensor]) -> list[float]:
    scores = dict(zip(one.answer.positions, one.answer.scores.abs(), strict=True))
    listed = torch.stack([scores[i] for i in one.effects.positions])
    return [spearman(listed, values) for values in effects]


def _estimation(one: Evidence) -> Finding:
    estimate = one.scope.estimate(one.answer)
    if estimate is None:
        raise NotApplicableError("nothing was estimated")
    return Finding(not estimate.relative_error <= ERROR, estimate.finding, "none")


def _not_its_own(one: Evidence) -> str:
    """Why scores under rules say nothing of small moves."""
    return f"under {one.lin.rules} rules scores are not slopes of the model"


def _no_metric(one: Evidence) -> str:
    return f"{type(one.scope).__name__} has no metric of which its scores would be slopes"


_CHECKS: dict[str, Callable[[Evidence], Finding]] = {
    "sinks": _sinks,
    "position": _position,
    "repetition": _repetition,
    "linearity": _linearity,
    "saturation": _saturation,
    "weights": _weights,
    "leave-one-out": _leave_one_out,
    "estimation": _estimation,
}
