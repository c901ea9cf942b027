"""Parts of a score sum to it over every cut, by every way of computing them, on every kind of model, in float64."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import tl_scopes as tls
from tests import zoo
from tests.test_attention import MORE, WITH_ATTENTION
from tests.test_left_as_found import unchanged
from tests.zoo import PROMPT, Specimen
from tl_scopes.circuits import carried, cut
from tl_scopes.models import components
from tl_scopes.progress import progress_bar

EXACT = {"rtol": 1e-10, "atol": 1e-12}
TARGET, SOURCES = 7, [2, 5]
SEMANTIC = tls.SemanticScope(TARGET)
OTHERS = ["opt", "window", "multi-query", "linear biases", "sink logits", "latent", "mamba beside", "clipped values"]
NEURONS = [name for name in WITH_ATTENTION if "only" not in name and name != "bridge mixtral"]
BY = ["position", "layer", "head", "qkv"]


@pytest.fixture
def specimen(request: pytest.FixtureRequest) -> Iterator[Specimen]:
    with zoo.Float64():
        yield zoo.specimen(request.param) if request.param in zoo.SPECIES else MORE[request.param]()


@pytest.fixture
def llama() -> Iterator[Any]:
    """A fresh one: these tests change it."""
    model = zoo.SPECIES["bridge llama"]().model
    with zoo.Float64():
        model(torch.tensor([PROMPT]))
        yield model


def of_species(*names: str) -> Any:
    return pytest.mark.parametrize("specimen", names, indirect=True)


@contextmanager
def by_mode(monkeypatch: pytest.MonkeyPatch, is_forward: bool) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(carried, "_is_forward_cheaper", lambda *_: is_forward)
        yield


def steepest(lin: tls.Linearization, scope: tls.JacobianScope) -> Tensor:
    """ĝ [token d_model] of a scope with one cotangent."""
    return cut.steepest(lin.vjp(scope.cotangents(lin))[0])


def total(paths: tls.Paths) -> Tensor:
    """Parts and what goes around, [layer, token] (and a branch by "layer")."""
    inner = tuple(range(1, paths.values.ndim - 1)) if paths.by != "layer" else ()
    return (paths.values.sum(inner) if inner else paths.values) + paths.around


# -- the identity -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", BY)
@of_species(*WITH_ATTENTION, *OTHERS)
def test_parts_sum_to_the_score(specimen: Specimen, by: Any) -> None:
    lin = tls.linearize(specimen.model, PROMPT)
    paths = tls.carried_by(lin, SEMANTIC, by, SOURCES)
    assert_close(paths.scores, SEMANTIC(lin).scores[SOURCES], **EXACT)
    assert_close(total(paths), paths.scores.expand_as(paths.around), **EXACT)
    assert paths.values.shape[-1] == len(SOURCES)
    assert paths.layers == tuple(range(specimen.model.cfg.n_layers + (by == "position")))


@of_species(*WITH_ATTENTION, *OTHERS)
def test_nothing_goes_around_the_stream(specimen: Specimen) -> None:
    """Every position of the stream before and after every layer: the parts themselves are the score."""
    lin = tls.linearize(specimen.model, PROMPT)
    paths = tls.carried_by(lin, SEMANTIC, "position")
    scores = SEMANTIC(lin).scores
    assert_close(paths.values.sum(1), scores.expand(3, -1), **EXACT)
    assert_close(paths.values[0], scores.diag(), **EXACT)  # at first all of it stands at the token
    assert_close(paths.values[-1, -1], scores, **EXACT)  # in the end where the prediction is read


@pytest.mark.parametrize("part", ["z", "attn_out", "mlp_out"])
@of_species(*WITH_ATTENTION, *OTHERS)
def test_what_goes_around_is_what_is_left_when_the_components_are_held(specimen: Specimen, part: Any) -> None:
    """The derivative along ĝ with a layer's heads, attention or MLP constant is `around`, measured without it."""
    model = specimen.model
    lin = tls.linearize(model, PROMPT)
    paths = tls.carried_by(lin, SEMANTIC, "head" if part == "z" else "layer", SOURCES)
    if part == "mlp_out" and paths.values.shape[1] == 1:
        pytest.skip("the network is attention alone")
    around = paths.around if part == "z" else paths.around[:, ("attn_out", "mlp_out").index(part)]
    directions = steepest(lin, SEMANTIC)
    for component in components(model, part):
        with model.hooks(fwd_hooks=[(component.hook, lambda value, hook: value.detach())]):
            held = tls.linearize(model, PROMPT)
        left = (held.vjp(SEMANTIC.cotangents(held))[0] * directions).sum(-1)[SOURCES]
        assert_close(around[component.layer], left, **EXACT)


@of_species("bridge gpt2", "bridge llama", "bridge gemma2", "bridge pythia", "native rotary grouped")
def test_a_part_is_the_patching_of_a_small_step(specimen: Specimen) -> None:
    """Activation patching of one head, from the prompt with its token moved by h along ĝ, changes the logit by h times
    what the head carries: the other parts are held."""
    model = specimen.model
    lin = tls.linearize(model, PROMPT)
    paths = tls.carried_by(lin, SEMANTIC, "head", SOURCES[:1])
    step = torch.zeros_like(lin.embeddings)
    step[SOURCES[0]] = steepest(lin, SEMANTIC)[SOURCES[0]]
    h = 1e-4

    def patched(size: float, layer: int, head: int) -> float:
        kept: list[Tensor] = []
        name = f"blocks.{layer}.attn.hook_z"

        def keep(value: Tensor, hook: Any) -> Tensor:
            kept.append(value.detach().clone())
            return value

        def put(value: Tensor, hook: Any) -> Tensor:
            value = value.clone()
            value[:, :, head] = kept[0][:, :, head]
            return value

        with torch.no_grad():
            with model.hooks(fwd_hooks=[("hook_embed", lambda v, hook: v + size * step), (name, keep)]):
                model(lin.tokens[None])
            with model.hooks(fwd_hooks=[(name, put)]):
                return model(lin.tokens[None])[0, -1, TARGET].item()

    for layer in range(2):
        for head in range(model.cfg.n_heads):
            slope = (patched(h, layer, head) - patched(-h, layer, head)) / (2 * h)
            assert paths.values[layer, head, 0].item() == pytest.approx(slope, rel=1e-4, abs=1e-7)


# -- the ways to it ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", BY)
@of_species(*WITH_ATTENTION, *OTHERS)
def test_forward_and_backward_agree(specimen: Specimen, by: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Double backward, dual numbers without a graph, and a backward pass for each component."""
    lin = tls.linearize(specimen.model, PROMPT)
    with by_mode(monkeypatch, True):
        forward = tls.carried_by(lin, SEMANTIC, by, SOURCES)
        dual = tls.carried_by(tls.linearize(specimen.model, PROMPT, checkpoint=True), SEMANTIC, by, SOURCES)
    with by_mode(monkeypatch, False):
        backward = tls.carried_by(lin, SEMANTIC, by, SOURCES)
    assert (forward.mode, dual.mode, backward.mode) == ("forward", "forward", "backward")
    assert_close(forward.values, backward.values, **EXACT)
    assert_close(forward.values, dual.values, **EXACT)
    if by != "position":
        assert_close(forward.where.sum(-2), forward.values, **EXACT)  # type: ignore[union-attr]
        assert_close(forward.where, dual.where, **EXACT)
        assert backward.where is None


@of_species(*WITH_ATTENTION, *OTHERS)
def test_queries_keys_and_values_are_the_head(specimen: Specimen) -> None:
    """Of each query head by itself, also where several share a key."""
    lin = tls.linearize(specimen.model, PROMPT)
    parts = tls.carried_by(lin, SEMANTIC, "qkv", SOURCES)
    heads = tls.carried_by(lin, SEMANTIC, "head", SOURCES)
    assert_close(parts.values.sum(2), heads.values, **EXACT)
    assert_close(parts.around, heads.around, **EXACT)


@of_species(*[name for name in WITH_ATTENTION if not name.startswith("native")])
def test_values_are_what_is_left_of_a_frozen_pattern(specimen: Specimen) -> None:
    """In the first layer, which no pattern comes before: with patterns constant a head carries what its values do."""
    lin = tls.linearize(specimen.model, PROMPT)
    last = specimen.model.cfg.n_layers - 1
    stream = f"blocks.{last}.hook_resid_pre"
    lin = tls.linearize(specimen.model, PROMPT, wrt=stream)
    parts = tls.carried_by(lin, SEMANTIC, "qkv", SOURCES)
    directions = steepest(lin, SEMANTIC)
    with tls.models.held_attention(specimen.model):
        held = lin.at(lin.embeddings)
        around = tls.carried_by(held, SEMANTIC, "head", SOURCES)
    pulled = held.vjp(SEMANTIC.cotangents(held))[0]
    through_values = (pulled * directions).sum(-1)[SOURCES] - parts.around[0]
    assert_close(parts.values[0, :, 2].sum(0), through_values, **EXACT)
    assert around.layers == (last,)


@of_species(*NEURONS)
def test_neurons_are_the_mlp(specimen: Specimen) -> None:
    lin = tls.linearize(specimen.model, PROMPT)
    neurons = tls.carried_by(lin, SEMANTIC, "neuron", SOURCES)
    branches = tls.carried_by(lin, SEMANTIC, "layer", SOURCES)
    assert_close(neurons.values.sum(1), branches.values[:, 1], **EXACT)
    assert neurons.values.shape[1] == specimen.model.cfg.d_mlp


@of_species("bridge llama", "native soft cap")
def test_batches_change_no_number(specimen: Specimen, monkeypatch: pytest.MonkeyPatch) -> None:
    lin = tls.linearize(specimen.model, PROMPT)
    for is_forward in (True, False):
        with by_mode(monkeypatch, is_forward):
            whole = tls.carried_by(lin, SEMANTIC, "head")
            with monkeypatch.context() as patch:
                zoo.batches_of(patch, 1)
                assert_close(tls.carried_by(lin, SEMANTIC, "head").values, whole.values, **EXACT)


def test_the_cheaper_mode_is_taken(llama: Any) -> None:
    """8 heads: forward for one token, backward for all of a prompt of eight. By position forward always is cheaper."""
    lin = tls.linearize(llama, PROMPT)
    assert tls.carried_by(lin, SEMANTIC, "head", 3).mode == "forward"
    assert tls.carried_by(lin, SEMANTIC, "head").mode == "backward"
    assert tls.carried_by(lin, SEMANTIC, "position").mode == "forward"


def test_one_forward_pass(llama: Any) -> None:
    """Whatever is asked, the model runs once; by dual numbers twice."""
    runs: list[int] = []
    with llama.hooks(fwd_hooks=[("hook_embed", lambda value, hook: runs.append(len(value)))]):
        lin, saving = tls.linearize(llama, PROMPT), tls.linearize(llama, PROMPT, checkpoint=True)
        for by in BY:
            runs.clear()
            tls.carried_by(lin, SEMANTIC, by, 3)  # type: ignore[arg-type]
            assert runs == [1]
        runs.clear()
        tls.carried_by(saving, SEMANTIC, "position", SOURCES)
        assert runs == [1, 2]


@pytest.mark.parametrize(("by", "tokens", "passes"), [("head", 3, 1), ("head", None, 8), ("position", [2, 5], 2)])
def test_the_cost_is_told(llama: Any, by: Any, tokens: Any, passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A progress bar counts the backward passes beside those of the cotangents, and comes to its end."""
    bars: list[Any] = []

    def told(total: int, what: str, *, unit: str) -> Any:
        bars.append(progress_bar(total, what, unit=unit))
        bars[-1].seen = []
        monkeypatch.setattr(bars[-1], "update", bars[-1].seen.append)
        return bars[-1]

    monkeypatch.setattr(carried, "progress_bar", told)
    tls.carried_by(tls.linearize(llama, PROMPT), SEMANTIC, by, tokens)
    (bar,) = bars
    assert (bar.total, sum(bar.seen)) == (passes, passes)


def test_under_a_kernel_without_a_second_derivative(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward mode needs none; by position and by neuron, where it would be dear, the error says what to load."""
    model = MORE["opt"]().model.float()
    expected = tls.carried_by(tls.linearize(model, PROMPT), SEMANTIC, "head", 3)
    monkeypatch.setattr(model.original_model.config, "_attn_implementation", "sdpa")
    lin = tls.linearize(model, PROMPT)
    paths = tls.carried_by(lin, SEMANTIC, "head", 3)
    assert (expected.mode, paths.mode) == ("forward", "backward")
    assert_close(paths.values, expected.values, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match='cannot be differentiated twice .*attn_implementation="eager"'):
        tls.carried_by(lin, SEMANTIC, "position", 3)


# -- the scopes -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Three(tls.JacobianScope):
    """Three cotangents at once."""

    def cotangents(self, lin: tls.Linearization) -> Tensor:
        return torch.eye(len(lin.readout), dtype=torch.float64)[3:6] * torch.tensor([[1.0], [-2.0], [3e3]])

    def unit(self, lin: tls.Linearization) -> str:
        return "test"


SCOPES = {
    "against": tls.SemanticScope(TARGET, versus=3),
    "log_prob": tls.SemanticScope(TARGET, quantity="log_prob"),
    "temperature": tls.TemperatureScope(),
    "direction": tls.DirectionScope(torch.arange(16.0) - 5, "ln_final"),
    "three": Three(),
    "exact Fisher": tls.FisherScope(exact=True),
    "rank": tls.FisherScope(rank=2),
    "probes": tls.FisherScope(8),
}


@pytest.mark.parametrize("by", ["position", "head", "qkv"])
@pytest.mark.parametrize("name", SCOPES)
def test_every_scope(llama: Any, name: str, by: Any) -> None:
    """Of several cotangents too, with the scope's own scores and unit."""
    lin = tls.linearize(llama, PROMPT)
    answer, paths = SCOPES[name](lin), tls.carried_by(lin, SCOPES[name], by, SOURCES)
    assert_close(paths.scores, answer.scores[SOURCES], **EXACT)
    assert_close(total(paths), paths.scores.expand_as(paths.around), rtol=1e-10, atol=1e-10)
    assert (paths.unit, paths.scope, paths.target) == (answer.unit, answer.scope, answer.target)


def test_fisher_says_how_well_parts_are_known(llama: Any, tiny: Any) -> None:
    """The parts of the exact trace lie within the standard errors of the estimated ones, as often as they should; of
    few draws nothing is known."""
    few = tls.carried_by(tls.linearize(llama, PROMPT), tls.FisherScope(15), "head", SOURCES).standard_error
    assert few is not None
    assert few.isinf().all()
    lin = tls.linearize(tiny, "The keys to the old cabinet near the door")
    exact = tls.carried_by(lin, tls.FisherScope(exact=True), "head", SOURCES)
    assert exact.standard_error is None or not exact.standard_error.any()
    off = []
    for seed in range(12):
        scope = tls.FisherScope(32, generator=torch.Generator().manual_seed(seed))
        paths = tls.carried_by(lin, scope, "head", SOURCES)
        assert paths.standard_error is not None
        assert paths.standard_error.shape == paths.values.shape
        off.append((paths.values - exact.values) / paths.standard_error)
    z = torch.stack(off)
    assert 0.5 < z.square().mean().sqrt() < 1.5
    assert (z.abs() > 3).double().mean() < 0.05


def test_under_held_attention(llama: Any) -> None:
    """A scope of frozen patterns: queries and keys carry nothing then."""
    lin, scope = tls.linearize(llama, PROMPT), tls.FrozenAttentionScope(SEMANTIC)
    paths = tls.carried_by(lin, scope, "qkv", SOURCES)
    assert_close(paths.scores, scope(lin).scores[SOURCES], **EXACT)
    assert_close(total(paths), paths.scores.expand_as(paths.around), **EXACT)
    assert not paths.values[:, :, :2].any()
    assert paths.scope == "FrozenAttentionScope(scope=SemanticScope(target=7))"


RELEVANCE = tls.RelevanceScope(TARGET, versus=3)


@pytest.mark.parametrize("rules", [None, "linear", "lookup"])
@pytest.mark.parametrize("baseline", ["zero", "prompt"])
@of_species("bridge gpt2", "bridge llama", "native soft cap", *(["hooked layer norm"] if zoo.HookedTransformer else []))
def test_signed_scores_are_split(
    specimen: Specimen, baseline: Any, rules: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parts of g_t · x_t sum to it over every cut, forward as backward; of all positions at first they are it."""
    lin = tls.linearize(specimen.model, PROMPT, rules=rules)
    scope = replace(RELEVANCE, baseline=baseline)
    scores = scope(lin).scores
    assert scores.min() < 0 < scores.max()
    for by in (*BY, "neuron"):
        with by_mode(monkeypatch, True):
            forward = tls.carried_by(lin, scope, by)  # type: ignore[arg-type]
        assert_close(forward.scores, scores, **EXACT)
        assert_close(total(forward), scores.expand_as(forward.around), **EXACT)
        assert (forward.unit, forward.rules) == ("logit", rules)
        if by != "neuron":
            with by_mode(monkeypatch, False):
                backward = tls.carried_by(lin, scope, by)  # type: ignore[arg-type]
            assert_close(forward.values, backward.values, **EXACT)
        if by == "position":
            assert_close(forward.values[0], scores.diag(), **EXACT)
            assert_close(forward.values[-1, -1], scores, **EXACT)


def test_heads_share_out_a_difference_of_logits(llama: Any) -> None:
    """Where the network is linear: all that each layer's heads carry, what goes around them, and the biases are it."""
    lin = tls.linearize(llama, PROMPT, rules="linear")
    answer, paths = RELEVANCE(lin), tls.carried_by(lin, RELEVANCE)
    difference = (lin.logits[TARGET] - lin.logits[3]).item()
    shared = paths.values.sum((1, 2)) + paths.around.sum(1)
    assert_close(shared + answer.biases, torch.full_like(shared, difference), **EXACT)


def test_a_token_whose_parts_cancel(llama: Any) -> None:
    """Its score is zero, which is not a sign of something beside the stream."""
    lin = tls.linearize(llama, PROMPT)
    g, x = lin.vjp(RELEVANCE.cotangents(lin))[0, 2], lin.embeddings.clone()
    x[2] -= (x[2] @ g) / (g @ g) * g
    moved = lin.at(x)
    for _ in range(20):  # to where its gradient there is orthogonal to it
        g = moved.vjp(RELEVANCE.cotangents(moved))[0, 2]
        x[2] -= (x[2] @ g) / (g @ g) * g
        moved = lin.at(x)
    paths = tls.carried_by(moved, RELEVANCE, "position", 2)
    assert_close(paths.values.sum(1), paths.scores.expand(3, -1), rtol=0, atol=1e-10)


@pytest.mark.parametrize("scope", [SEMANTIC, RELEVANCE, tls.FrozenAttentionScope(SEMANTIC)])
def test_a_scope_under_rules_of_its_own(llama: Any, scope: tls.Scope) -> None:
    """It is the scope of a linearisation under these rules, by another name."""
    lin, own = tls.linearize(llama, PROMPT), tls.UnderRulesScope(scope, "lookup")
    for by in BY:
        paths = tls.carried_by(lin, own, by, SOURCES)  # type: ignore[arg-type]
        expected = tls.carried_by(lin.under("lookup"), scope, by, SOURCES)  # type: ignore[arg-type]
        assert_close(paths.scores, own(lin).scores[SOURCES], **EXACT)
        assert_close(paths.values, expected.values, **EXACT)
        assert (paths.question, paths.rules) == (own(lin).question, own(lin).rules)


# -- an answer of several tokens --------------------------------------------------------------------------------------

SAID = tls.SemanticScope([7, 11, 4])


@pytest.mark.parametrize("score_answer", [False, True])
@pytest.mark.parametrize(
    "scope", [tls.SemanticScope(), tls.RelevanceScope(), tls.FrozenAttentionScope(tls.SemanticScope(), keys=(-1,))]
)
def test_the_scores_of_an_answer_are_split(llama: Any, scope: tls.Scope, score_answer: bool) -> None:
    """Those that the scope gives, and no others."""
    lin = tls.linearize(llama, PROMPT, answer=[7, 11, 4], score_answer=score_answer)
    answer, paths = scope(lin), tls.carried_by(lin, scope)
    assert_close(paths.scores, answer.scores, **EXACT)
    assert paths.positions == answer.positions
    assert_close(total(paths), paths.scores.expand_as(paths.around), **EXACT)
    last = tls.carried_by(lin, scope, tokens=-1)
    assert last.positions == answer.positions[-1:]
    with pytest.raises(ValueError, match=f"position {len(answer.scores)} is outside the prompt of"):
        tls.carried_by(lin, scope, tokens=len(answer.scores))


@pytest.mark.parametrize("scope", [SAID, tls.FrozenAttentionScope(SAID), tls.UnderRulesScope(SAID)])
def test_a_scope_that_names_an_answer(llama: Any, scope: tls.Scope) -> None:
    lin = tls.linearize(llama, PROMPT)
    assert_close(tls.carried_by(lin, scope).scores, scope(lin).scores, **EXACT)


# -- where J begins and ends ------------------------------------------------------------------------------------------


def test_between_inner_hooks(llama: Any) -> None:
    """Only components between both ends are in the answer."""
    after = tls.carried_by(tls.linearize(llama, PROMPT, wrt="blocks.1.hook_resid_pre"), SEMANTIC, "head", SOURCES)
    assert after.layers == (1,)
    lin = tls.linearize(llama, PROMPT, of="blocks.0.hook_resid_post")
    scope = tls.DirectionScope(torch.arange(16.0) - 5, "blocks.0.hook_resid_post")
    before = tls.carried_by(lin, scope, "head", SOURCES)
    assert before.layers == (0,)
    assert_close(total(before)[0], scope(lin).scores[SOURCES], **EXACT)
    stream = tls.carried_by(lin, scope, "position", SOURCES)
    assert stream.layers[0] == 0
    with pytest.raises(ValueError, match="no component of the kind asked for .* between 'blocks.1.hook_resid_post'"):
        tls.carried_by(tls.linearize(llama, PROMPT, wrt="blocks.1.hook_resid_post"), SEMANTIC, "head")


@pytest.mark.parametrize("wrt", ["blocks.0.attn.hook_z", "blocks.0.attn.hook_k"])
def test_from_behind_the_queries_on(llama: Any, wrt: str) -> None:
    """The layer's heads lie behind that hook and its queries do not: the model has them all the same."""
    lin = tls.linearize(llama, PROMPT, wrt=wrt)
    match = f"'blocks.0.attn.hook_q' does not lie between '{wrt}' and 'ln_final'.*: linearise from an earlier hook"
    with pytest.raises(ValueError, match=match):
        tls.carried_by(lin, SEMANTIC, "qkv")
    assert tls.carried_by(lin, SEMANTIC, "head").layers == (0, 1)


@of_species("bridge pythia")
def test_what_runs_beside_the_ends(specimen: Specimen) -> None:
    """Attention and MLP of a layer side by side: neither reads the other, and it is not the model that lacks hooks."""
    of = "blocks.1.hook_mlp_out"
    scope = tls.DirectionScope(torch.arange(16.0) - 5, of)
    lin = tls.linearize(specimen.model, PROMPT, of=of)
    with pytest.raises(ValueError, match=f"the value at '{of}' does not depend on 'blocks.1.attn.hook_z'"):
        tls.carried_by(lin, scope, "head", SOURCES)
    of = "blocks.1.hook_resid_pre"
    scope = tls.DirectionScope(torch.arange(16.0) - 5, of)
    lin = tls.linearize(specimen.model, PROMPT, wrt="blocks.0.attn.hook_z", of=of)
    paths = tls.carried_by(lin, scope, "neuron", SOURCES)
    assert not paths.values.any()
    assert_close(paths.around[0], scope(lin).scores[SOURCES], **EXACT)


def test_at_another_point(llama: Any) -> None:
    """`at` moves the point, and the parts are those of the point."""
    lin = tls.linearize(llama, PROMPT)
    moved = lin.at(lin.embeddings * 1.1)
    paths = tls.carried_by(moved, SEMANTIC, "position", SOURCES)
    assert_close(paths.scores, SEMANTIC(moved).scores[SOURCES], **EXACT)
    assert_close(total(paths), paths.scores.expand_as(paths.around), **EXACT)


def test_a_position_before_the_end(llama: Any) -> None:
    early = tls.carried_by(tls.linearize(llama, PROMPT, 4), SEMANTIC, "head")
    assert_close(early.values, tls.carried_by(tls.linearize(llama, PROMPT[:5]), SEMANTIC, "head").values, **EXACT)


@pytest.mark.parametrize("species", ["bridge gpt2", *(["hooked layer norm"] if zoo.HookedTransformer else [])])
def test_in_compatibility_mode(species: str) -> None:
    """Folded and centred weights: a difference of logits has the same parts there as in the raw model."""
    scope = tls.SemanticScope(TARGET, versus=3)
    with zoo.Float64():
        model = zoo.SPECIES[species]().model
        raw = {by: tls.carried_by(tls.linearize(model, PROMPT), scope, by, SOURCES) for by in BY}  # type: ignore[arg-type]
        if species.startswith("bridge"):
            model.enable_compatibility_mode()
        else:
            model.process_weights_(fold_ln=True, center_writing_weights=True, center_unembed=True)
        lin = tls.linearize(model, PROMPT)
        for by, expected in raw.items():
            paths = tls.carried_by(lin, scope, by, SOURCES)  # type: ignore[arg-type]
            assert_close(total(paths), paths.scores.expand_as(paths.around), **EXACT)
            if by == "head" and species.startswith("hooked"):
                assert paths.values.shape == expected.values.shape


# -- the user's hooks, and the model left as found --------------------------------------------------------------------


def test_the_users_hooks_act(llama: Any) -> None:
    """A head that is set to zero carries nothing; a layer whose heads are constants neither."""

    def without(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        value[:, :, 1] = 0
        return value

    with llama.hooks(fwd_hooks=[("blocks.0.attn.hook_z", without)]):
        lin = tls.linearize(llama, PROMPT)
        paths = tls.carried_by(lin, SEMANTIC, "head", SOURCES)
    assert not paths.values[0, 1].any()
    assert paths.values[0, [0, 2, 3]].all()
    with llama.hooks(fwd_hooks=[("blocks.0.attn.hook_z", lambda value, hook: torch.zeros_like(value))]):
        paths = tls.carried_by(tls.linearize(llama, PROMPT), SEMANTIC, "head", SOURCES)
    assert not paths.values[0].any()
    assert_close(paths.around[0], paths.scores, **EXACT)
    with pytest.raises(ValueError, match="hooks at 'blocks.0.attn.hook_z'.* are not those under which"):
        tls.carried_by(lin, SEMANTIC)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_the_model_is_left_as_found(llama: Any, checkpoint: bool) -> None:
    with unchanged(llama):
        lin = tls.linearize(llama, PROMPT, checkpoint=checkpoint)
        for by in BY:
            tls.carried_by(lin, SEMANTIC, by)  # type: ignore[arg-type]


def test_after_a_failure(llama: Any) -> None:
    lin = tls.linearize(llama, PROMPT)

    def failing(value: Tensor, hook: Any) -> Tensor:
        raise ZeroDivisionError("the user's hook fails")

    with unchanged(llama), pytest.raises(ValueError, match="linearise and ask inside the same"):
        with llama.hooks(fwd_hooks=[("blocks.1.attn.hook_z", failing)]):
            tls.carried_by(lin, SEMANTIC)


# -- bad input --------------------------------------------------------------------------------------------------------


@of_species("bridge mamba")
def test_layers_without_attention(specimen: Specimen) -> None:
    lin = tls.linearize(specimen.model, PROMPT)
    for by, what in (("head", "attention heads"), ("layer", "attention"), ("neuron", "MLP neurons")):
        with pytest.raises(ValueError, match=f"MambaForCausalLM has no hook on its {what}"):
            tls.carried_by(lin, SEMANTIC, by)  # type: ignore[arg-type]
    assert_close(tls.carried_by(lin, SEMANTIC, "position").values[-1, -1], SEMANTIC(lin).scores, **EXACT)


@of_species("convolutions")
def test_layers_with_and_without_attention(specimen: Specimen) -> None:
    """The layers that have heads are in the answer, and the error for another one says which."""
    lin = tls.linearize(specimen.model, PROMPT)
    for by in BY:  # the first layer has none
        paths = tls.carried_by(lin, SEMANTIC, by, SOURCES)  # type: ignore[arg-type]
        assert_close(total(paths), paths.scores.expand_as(paths.around), **EXACT)
    paths = tls.carried_by(lin, SEMANTIC, "head")
    assert paths.layers == (1,)
    with pytest.raises(ValueError, match=r"there is no layer 0 in this answer: it has layer 1, from L1H0 to L1H3"):
        paths.at(0)


@of_species("bridge mixtral")
def test_experts_are_not_neurons(specimen: Specimen) -> None:
    with pytest.raises(ValueError, match="MixtralForCausalLM has no hook on its MLP neurons in the layers 0, 1"):
        tls.carried_by(tls.linearize(specimen.model, PROMPT), SEMANTIC, "neuron")


@of_species("norm between")
def test_heads_that_are_mixed(specimen: Specimen) -> None:
    lin = tls.linearize(specimen.model, PROMPT)
    with pytest.raises(ValueError, match="heads of layer . of BitNetForCausalLM give out something else"):
        tls.carried_by(lin, SEMANTIC, "qkv")
    paths = tls.carried_by(lin, SEMANTIC, "head")
    assert_close(total(paths), paths.scores.expand_as(paths.around), **EXACT)


def test_something_beside_the_stream(llama: Any) -> None:
    """A hook of the user's that carries the embedding past the blocks."""
    seen: list[Tensor] = []

    def take(value: Tensor, hook: Any) -> None:
        seen[:] = [value]

    def add(value: Tensor, hook: Any) -> Tensor:
        return value + seen[0]

    with llama.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", take), ("blocks.1.hook_resid_post", add)]):
        with pytest.raises(ValueError, match="goes around the residual stream before layer"):
            tls.carried_by(tls.linearize(llama, PROMPT), SEMANTIC, "position")


def test_scopes_that_are_not_norms(llama: Any) -> None:
    lin = tls.linearize(llama, PROMPT)
    for scope, method in ((tls.PathIntegratedScope(TARGET), "measure"), (tls.SpectralScope(), "measure")):
        with pytest.raises(TypeError, match=f"carried_by takes scopes whose scores are norms .* its own `{method}"):
            tls.carried_by(lin, scope)

    class Summed(Three):
        def combine(self, lin: tls.Linearization, squared_norms: Tensor) -> tls.Measurement:
            return tls.Measurement(squared_norms.sum(0))

    with pytest.raises(TypeError, match=r"its own `combine`"):
        tls.carried_by(lin, Summed())
    with pytest.raises(TypeError, match="chooses its probes as it goes: give their number"):
        tls.carried_by(lin, tls.FisherScope(rtol=0.1))

    class Doubled(tls.RelevanceScope):
        def measure_many(self, lins: Sequence[tls.Linearization]) -> list[tls.Measurement]:
            return [replace(one, scores=2 * one.scores) for one in super().measure_many(lins)]

    with pytest.raises(TypeError, match=r"its own `measure_many`"):
        tls.carried_by(lin, Doubled(TARGET))
    with pytest.raises(TypeError, match=r"PositionCorrectedScope.*its own `measure`"):
        tls.carried_by(lin, tls.UnderRulesScope(tls.PositionCorrectedScope(SEMANTIC)))
    with pytest.raises(TypeError, match=r"a map takes scopes whose scores are norms of cᵀJ, and .*RelevanceScope"):
        tls.head_map(llama, PROMPT, RELEVANCE)


def test_arguments(llama: Any, no_type_checks: None) -> None:
    lin = tls.linearize(llama, PROMPT)
    with pytest.raises(TypeError, match="carried_by takes a Linearization, got TransformerBridge"):
        tls.carried_by(llama, SEMANTIC)
    with pytest.raises(TypeError, match="expected a scope such as SemanticScope"):
        tls.carried_by(lin, tls.SemanticScope)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="by is one of 'position', 'layer', 'head', 'qkv', 'neuron', got 'heads'"):
        tls.carried_by(lin, SEMANTIC, "heads")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="position 8 is outside the prompt of 8 tokens"):
        tls.carried_by(lin, SEMANTIC, tokens=8)
    with pytest.raises(TypeError, match="a source token is a text or a position, got 1.5"):
        tls.carried_by(lin, SEMANTIC, tokens=[1.5])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="no source tokens are given"):
        tls.carried_by(lin, SEMANTIC, tokens=[])
    with pytest.raises(ValueError, match="there is no token ' nothing' in the prompt: its tokens are"):
        tls.carried_by(lin, SEMANTIC, tokens=" nothing")
