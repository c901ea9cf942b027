"""HETA's three terms are what their equations say, on every kind of model with attention, in float64."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import tl_scopes as tls
from tests import zoo
from tests.test_attention import MORE
from tests.test_left_as_found import failing, unchanged
from tests.zoo import PROMPT, WIDTH, Specimen
from tl_scopes import models
from tl_scopes.jacobian.curvature import block_norms
from tl_scopes.jacobian.linearization import linearize_places
from tl_scopes.jacobian.randomness import prompt_generator
from tl_scopes.scopes.heta import attention_flow, information

EXACT = {"rtol": 1e-9, "atol": 1e-12}
POSITION, TARGET = 2, 7
IDS = torch.tensor(PROMPT[: POSITION + 1])
WITH_ATTENTION = [name for name in zoo.SPECIES if name != "bridge mamba"]
SOME = ["bridge llama", "bridge gemma2", "bridge mixtral", "native layer norm"]


@pytest.fixture(params=WITH_ATTENTION)
def specimen(request: pytest.FixtureRequest) -> Iterator[Specimen]:
    with zoo.Float64():
        yield zoo.specimen(request.param)


@pytest.fixture
def lin(specimen: Specimen) -> tls.Linearization:
    return tls.linearize(specimen.model, PROMPT, POSITION)


@pytest.fixture
def some_lin(request: pytest.FixtureRequest) -> Iterator[tls.Linearization]:
    with zoo.Float64():
        yield tls.linearize(zoo.specimen(request.param).model, PROMPT, POSITION)


@pytest.fixture
def llama() -> Iterator[Any]:
    with zoo.Float64():
        yield zoo.specimen("bridge llama").model


def dense_blocks(specimen: Specimen) -> Tensor:
    """∂² log p(target) / ∂x_i², [token d_model d_model], of the plain copy: one backward pass per number."""

    def log_p(delta: Tensor) -> Tensor:
        return specimen.forward(IDS, delta)[1][POSITION].log_softmax(-1)[TARGET]

    hessian = torch.autograd.functional.hessian(log_p, torch.zeros(len(IDS), WIDTH, dtype=torch.float64))
    return hessian.diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def plain_log_probs(specimen: Specimen, ids: Tensor, masked: int, value: Tensor | None) -> Tensor:
    """The plain copy's prediction, with another embedding in one place."""

    def replace(module: Any, args: Any, out: Tensor) -> Tensor:
        out = out.clone()
        if value is not None:
            out[..., masked, :] = value
        return out

    handle = specimen.embed.register_forward_hook(replace)
    out = specimen.plain(ids[None])
    handle.remove()
    return getattr(out, "logits", out)[0, POSITION].log_softmax(-1).detach()


# -- S ----------------------------------------------------------------------------------------------------------------


def test_curvature_of_the_dense_hessian(specimen: Specimen, lin: tls.Linearization) -> None:
    """‖H_ii r‖₁ along each axis and along random signs."""
    blocks = dense_blocks(specimen)
    assert all(block.abs().max() > 1e-6 for block in blocks[1:])
    generator = torch.Generator().manual_seed(1)
    signs = torch.randint(0, 2, (3, len(IDS), WIDTH), generator=generator).double() * 2 - 1
    axes = torch.eye(WIDTH, dtype=torch.float64)[:, None].expand(-1, len(IDS), -1)
    directions = torch.cat([signs, axes])
    (found,) = block_norms([lin], [lin.token(TARGET)], [directions])
    assert_close(found, torch.einsum("tde,pte->ptd", blocks, directions).abs().sum(-1), **EXACT)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-2)])
def test_curvature_of_a_sure_prediction(dtype: torch.dtype, rtol: float) -> None:
    """‖H_ii r‖₁ of the log-probability keeps its digits where 1 − p rounds to nothing: of log(1 + Σ exp(z_u − z_v))."""
    with zoo.Float64():
        exact = zoo.SPECIES["native layer norm"]()
        for head in (exact.plain.head, exact.model.original_model.head):
            torch.nn.init.zeros_(head.bias)
            head.weight.data *= 200
        lin = tls.linearize(exact.model.to(dtype), PROMPT, POSITION)
        v = int(lin.logits.argmax())

        def log_p(delta: Tensor) -> Tensor:
            logits = exact.forward(IDS, delta)[1][POSITION]
            return -torch.log1p((torch.cat([logits[:v], logits[v + 1 :]]) - logits[v]).exp().sum())

        zeros = torch.zeros(len(IDS), WIDTH, dtype=torch.float64)
        assert -1e-16 < log_p(zeros) < 0
        blocks = torch.autograd.functional.hessian(log_p, zeros).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    signs = torch.randint(0, 2, (3, len(IDS), WIDTH), generator=torch.Generator().manual_seed(1)).double() * 2 - 1
    (found,) = block_norms([lin], [lin.token(v)], [signs])
    expected = torch.einsum("tde,pte->ptd", blocks, signs).abs().sum(-1)
    assert_close(found, expected, rtol=rtol, atol=0.0)


def test_curvature_is_unbiased() -> None:
    """S scatters about the mean over all 2^16 sign vectors as its standard error says, over tokens and seeds."""
    with zoo.Float64():
        specimen = zoo.specimen("bridge llama")
        lin = tls.linearize(specimen.model, PROMPT, POSITION)
        answers = [
            tls.HetaScope(TARGET, beta=1.0, gamma=0.0, probes=24, generator=torch.Generator().manual_seed(seed))(lin)
            for seed in range(8)
        ]
        every = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * WIDTH)
        exact = torch.stack([(every @ block).abs().sum(-1).mean() for block in dense_blocks(specimen)])
    deviations = torch.stack([(a.scores - a.M * exact) / a.standard_error for a in answers])
    assert deviations.abs().max() < 5
    assert 0.6 < deviations.square().mean() ** 0.5 < 1.5
    assert deviations.mean().abs() < 4 / deviations.numel() ** 0.5
    assert not torch.equal(answers[0].S, answers[1].S)


@pytest.mark.parametrize("some_lin", SOME, indirect=True)
def test_batches_change_no_number(some_lin: tls.Linearization, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch size is about memory alone."""
    scope = tls.HetaScope(TARGET, probes=2)
    whole = scope(some_lin)
    zoo.batches_of(monkeypatch, 1)
    alone = scope(some_lin)
    for term in ("scores", "M", "S", "I"):
        assert_close(getattr(alone, term), getattr(whole, term), **EXACT)


def test_several_places_change_no_number(llama: Any) -> None:
    """Prompts of several lengths, and positions of one prompt, that share a forward pass."""
    tokens = torch.tensor([PROMPT[:5], [*PROMPT[1:4], 0, 0]])
    places = [(0, 2), (1, 2), (0, 4)]
    prompts = [models.read_prompt(llama, ids) for ids in (PROMPT[:5], PROMPT[1:4])]
    lins = linearize_places(llama, prompts, "hook_embed", "ln_final", places)
    scope = tls.HetaScope(TARGET, probes=3)
    for answer, (entry, position) in zip(scope.ask(lins), places, strict=True):
        alone = scope(tls.linearize(llama, tokens[entry], position))
        assert alone.scores.any()
        for term in ("scores", "M", "S", "I"):
            assert_close(getattr(answer, term), getattr(alone, term), **EXACT)


@pytest.mark.parametrize("some_lin", SOME, indirect=True)
def test_checkpoints_change_no_number(some_lin: tls.Linearization) -> None:
    scope = tls.HetaScope(TARGET, probes=2, gamma=0.0)
    again = scope(tls.linearize(some_lin.model, PROMPT, POSITION, checkpoint=True))
    assert_close(again.S, scope(some_lin).S, **EXACT)


def test_logits_hang_on_the_embeddings(lin: tls.Linearization) -> None:
    """The way from the perturbations to the logits is whole: its derivative is that of its two parts."""
    assert lin.trace.logits is not None
    (whole,) = torch.autograd.grad(
        lin.trace.logits[0, TARGET], lin.trace.perturbations["hook_embed"], retain_graph=True
    )
    assert_close(whole, lin.vjp(lin.cotangent(lambda logits: logits[TARGET])[None]), **EXACT)


def test_many_prompts(llama: Any) -> None:
    scope = tls.HetaScope(TARGET, probes=2)
    prompts = [PROMPT[:4], PROMPT[2:5], PROMPT[3:5]]
    for answer, prompt in zip(tls.attribute_many(llama, prompts, scope), prompts, strict=True):
        assert answer is not None
        assert_close(answer.scores, tls.attribute(llama, prompt, scope).scores, **EXACT)


# -- I ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["zero", "mean", 11])
def test_information_of_explicit_masking(specimen: Specimen, lin: tls.Linearization, mask: str | int) -> None:
    """Token by token, on the plain copy."""
    log_p = plain_log_probs(specimen, IDS, 0, None)
    expected = []
    for i in range(len(IDS)):
        ids = IDS.clone()
        value = None
        if isinstance(mask, int):
            ids[i] = mask
        else:
            value = torch.zeros(WIDTH, dtype=torch.float64) if mask == "zero" else lin.embeddings.mean(0)
        log_q = plain_log_probs(specimen, ids, i, value)
        expected.append((log_p.exp() * (log_p - log_q)).sum())
    found = information(lin, mask)
    assert_close(found, torch.stack(expected), rtol=1e-8, atol=1e-13)
    assert found[-1] > 0


def test_masking_a_token_by_itself_loses_nothing(llama: Any) -> None:
    lin = tls.linearize(llama, PROMPT, POSITION)
    assert information(lin, PROMPT[1])[1].abs() < 1e-14
    assert information(tls.linearize(llama, PROMPT[:1]), "mean").abs() < 1e-14


def test_information_of_a_sure_prediction(tiny: Any) -> None:
    """In float64: where one word is certain, what little another token takes away is no rounding noise."""
    prompt = "The soldier had the axe. The tailor had the rope. The gift was the axe. The guest is the"
    lost = information(tls.linearize(tiny, prompt), "zero")
    assert (lost > 0).all()
    assert (lost < 1e-4).sum() > len(lost) / 2


# -- M ----------------------------------------------------------------------------------------------------------------


def rollout(attentions: list[Tensor], written: list[Tensor]) -> Tensor:
    """M by loops over layers, heads and tokens; `written` [head token d_model]."""
    T = len(IDS)
    flow = torch.zeros(T, dtype=torch.float64)
    for last in range(len(attentions)):
        for head in range(attentions[0].shape[1]):
            row = torch.eye(T, dtype=torch.float64)[POSITION]
            for layer in range(last, -1, -1):
                step = 0.5 * attentions[layer][0, head] + 0.5 * torch.eye(T)
                row = row @ torch.stack([one / one.sum() for one in step])
            for i in range(T):
                flow[i] += row[i] * written[last][head, i].abs().sum()
    return flow / flow.sum()


def written_by_llama(plain: Any, hidden: tuple[Tensor, ...]) -> list[Tensor]:
    found = []
    for layer, stream in zip(plain.model.layers, hidden, strict=False):
        attention = layer.self_attn
        values = attention.v_proj(layer.input_layernorm(stream))[0]
        d, heads, groups = attention.head_dim, plain.config.num_attention_heads, plain.config.num_key_value_heads
        of_head = []
        for head in range(heads):
            group = head * groups // heads
            W_O = attention.o_proj.weight[:, head * d : (head + 1) * d]
            of_head.append(values[:, group * d : (group + 1) * d] @ W_O.T)
        found.append(torch.stack(of_head))
    return found


def written_by_gpt2(plain: Any, hidden: tuple[Tensor, ...]) -> list[Tensor]:
    found = []
    for block, stream in zip(plain.transformer.h, hidden, strict=False):
        values = block.attn.c_attn(block.ln_1(stream))[0, :, 2 * WIDTH :].chunk(plain.config.n_head, -1)
        outputs = block.attn.c_proj.weight.chunk(plain.config.n_head, 0)
        found.append(torch.stack([value @ W_O for value, W_O in zip(values, outputs, strict=True)]))
    return found


@pytest.mark.parametrize(
    ("species", "written"),
    [("bridge llama", written_by_llama), ("bridge qwen2", written_by_llama), ("bridge gpt2", written_by_gpt2)],
)
def test_flow_is_the_rollout(species: str, written: Any) -> None:
    """Of Hugging Face's own attentions and hidden states: grouped queries, biases, the norm before attention."""
    with zoo.Float64():
        specimen = zoo.specimen(species)
        out = specimen.plain(IDS[None], output_attentions=True, output_hidden_states=True)
        expected = rollout(out.attentions, written(specimen.plain, out.hidden_states)).detach()
        assert_close(attention_flow(tls.linearize(specimen.model, PROMPT, POSITION)), expected, **EXACT)


def test_flow_with_sink_logits() -> None:
    """Rows of a pattern that sum to less than 1 are scaled up."""
    with zoo.Float64():
        lin = tls.linearize(MORE["sink logits"]().model, PROMPT, POSITION)
        layers = list(tls.models.attention_layers(lin.model, lin.tokens))
        assert all((layer.pattern.sum(-1) < 0.9).any() for layer in layers)
        expected = rollout([layer.pattern[None] for layer in layers], [layer.written for layer in layers])
        assert_close(attention_flow(lin), expected, **EXACT)


def test_flow_from_a_later_layer(llama: Any) -> None:
    """From the stream before the last layer on, only its attention counts."""
    last = tls.linearize(llama, PROMPT, POSITION, wrt="blocks.1.hook_resid_pre")
    _, layer = tls.models.attention_layers(llama, last.tokens)
    row = layer.pattern[:, -1] / 2 + torch.eye(len(IDS), dtype=torch.float64)[-1] / 2
    flow = (row * layer.written_norms(1)).sum(0)
    assert_close(attention_flow(last), flow / flow.sum(), **EXACT)


def test_no_flow_where_no_head_writes(llama: Any) -> None:
    """Then the scores are zeros, not 0/0."""
    silent = [(f"blocks.{layer}.attn.hook_v", lambda value, hook: 0 * value) for layer in range(2)]
    with llama.hooks(fwd_hooks=silent):
        answer = tls.attribute(llama, PROMPT, tls.HetaScope(TARGET, probes=1))
    assert not answer.M.any()
    assert not answer.scores.any()


# -- the scope --------------------------------------------------------------------------------------------------------


def test_scores_are_the_equation(lin: tls.Linearization) -> None:
    """score = M (β S + γ I), of the terms in the answer."""
    answer = tls.HetaScope(TARGET, beta=0.3, gamma=2.0, probes=3)(lin)
    assert_close(answer.scores, answer.M * (0.3 * answer.S + 2 * answer.I), **EXACT)
    assert_close(answer.M, attention_flow(lin), **EXACT)
    assert_close(answer.I, information(lin, "zero"), **EXACT)
    assert answer.target is not None
    assert answer.target.id == TARGET
    assert answer.scores.dtype == torch.float64
    assert tls.Attribution.from_json(answer.to_json()).S.equal(answer.S)


def test_terms_of_weight_zero_are_not_computed(llama: Any) -> None:
    lin = tls.linearize(llama, PROMPT, POSITION)
    both = tls.HetaScope(TARGET, probes=2)(lin)
    bent, lost = tls.HetaScope(TARGET, gamma=0.0, probes=2)(lin), tls.HetaScope(TARGET, beta=0.0)(lin)
    assert_close(bent.scores + lost.scores, both.scores, **EXACT)
    assert "I" not in bent.details
    assert "S" not in lost.details
    assert (bent.unit, lost.unit) == ("nat per squared unit of embedding norm", "nat")
    assert both.unit == "nat per squared unit of embedding norm + nat"
    assert "different units" in both.notes[0]
    assert not bent.notes
    assert not lost.notes


def test_normalized_terms_are_shares(llama: Any) -> None:
    lin = tls.linearize(llama, PROMPT, POSITION)
    answer = tls.HetaScope(TARGET, beta=0.25, gamma=0.75, probes=2, normalize=True)(lin)
    shares = 0.25 * answer.S / answer.S.sum() + 0.75 * answer.I / answer.I.sum()
    assert_close(answer.scores, answer.M * shares, **EXACT)
    assert answer.unit == "weighted share"
    assert not answer.notes
    alone = tls.HetaScope(TARGET, probes=2, normalize=True)(tls.linearize(llama, PROMPT[:1]))
    assert_close(alone.scores, torch.ones(1, dtype=torch.float64))


def test_normalized_terms_that_are_zero(llama: Any) -> None:
    """A token masked by itself loses nothing: its share is 0, not 0/0."""
    answer = tls.attribute(llama, PROMPT[:1], tls.HetaScope(TARGET, beta=0.0, mask=PROMPT[0], normalize=True))
    assert not answer.scores.any()


def test_same_question_at_the_first_layer(llama: Any) -> None:
    """Where nothing is added to the embeddings, the stream before layer 0 is the same place."""
    scope = tls.HetaScope(TARGET, probes=2)
    first = scope(tls.linearize(llama, PROMPT, wrt="blocks.0.hook_resid_pre"))
    assert_close(first.scores, scope(tls.linearize(llama, PROMPT)).scores, **EXACT)
    assert first.unit == "nat per squared unit of norm at blocks.0.hook_resid_pre + nat"


def test_random_numbers(llama: Any) -> None:
    """Without a generator always the same; with one, what comes next."""
    lin = tls.linearize(llama, PROMPT)
    default, again = (tls.HetaScope(TARGET, gamma=0.0, probes=1)(lin).S for _ in range(2))
    assert default.equal(again)
    scope = tls.HetaScope(TARGET, gamma=0.0, probes=1, generator=prompt_generator(lin, "HetaScope"))
    assert scope(lin).S.equal(default)
    assert not scope(lin).S.equal(default)
    assert scope(lin).standard_error.isinf().all()


@pytest.mark.parametrize("species", ["bridge llama", *(["hooked layer norm"] if zoo.HookedTransformer else [])])
def test_left_as_found(species: str) -> None:
    model = zoo.SPECIES[species]().model
    scope = tls.HetaScope(TARGET, probes=1)
    with zoo.Float64():
        model(IDS[None])
        with unchanged(model):
            scope(tls.linearize(model, PROMPT))
        passes = iter(range(9))
        model.hook_dict["blocks.1.hook_resid_pre"].add_hook(
            lambda value, hook: failing(value, hook) if next(passes) else None
        )
        lin = tls.linearize(model, PROMPT)
        with unchanged(model), pytest.raises(ZeroDivisionError):
            scope(lin)


def test_own_hooks_act(llama: Any) -> None:
    """Inside the user's hooks the patched model is explained, in all three terms."""
    cut = [("blocks.1.hook_resid_pre", lambda value, hook: value * (torch.arange(value.shape[1]) != 1)[:, None])]
    with llama.hooks(fwd_hooks=cut):
        patched = tls.attribute(llama, PROMPT, tls.HetaScope(TARGET, probes=1))
    plain = tls.attribute(llama, PROMPT, tls.HetaScope(TARGET, probes=1))
    assert all((getattr(plain, term) - getattr(patched, term)).abs().max() > 1e-6 for term in "MSI")


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": -1.0}, "beta is the weight of a term, a number from 0 on, got -1.0"),
        ({"gamma": float("nan")}, "gamma is the weight of a term, a number from 0 on, got nan"),
        ({"gamma": math.inf}, "gamma is the weight of a term, a number from 0 on, got inf"),
        ({"beta": 0, "gamma": 0}, "beta and gamma are both 0"),
        ({"probes": 0}, "probes is a number of random directions per token, 1 at least, got 0"),
    ],
)
def test_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tls.HetaScope(**options)


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize("probes", [True, 2.0])
def test_probes_are_an_integer(probes: Any) -> None:
    with pytest.raises(TypeError, match=f"1 at least, and an integer, got {probes}"):
        tls.HetaScope(probes=probes)


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": "much"}, "gamma is the weight of a term, a number from 0 on, got 'much'"),
        ({"beta": "0.5"}, "beta is the weight of a term, a number from 0 on, got '0.5'"),
        ({"beta": True}, "beta is the weight of a term, a number from 0 on, got True"),
        ({"normalize": "no"}, "normalize is True or False, got 'no'"),
    ],
)
def test_options_of_another_type(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        tls.HetaScope(**options)


def test_models_without_patterns() -> None:
    with pytest.raises(ValueError, match="tokens mix other than by attention patterns"):
        tls.attribute(zoo.specimen("bridge mamba").model, PROMPT, tls.HetaScope())


def test_middle_of_the_network(llama: Any) -> None:
    with pytest.raises(ValueError, match="needs the logits"):
        tls.HetaScope()(tls.linearize(llama, PROMPT, of="blocks.1.hook_resid_pre"))
    with pytest.raises(ValueError, match="residual stream before a layer, not from 'blocks.0.hook_mlp_out'"):
        tls.HetaScope()(tls.linearize(llama, PROMPT, wrt="blocks.0.hook_mlp_out"))


@pytest.mark.usefixtures("no_type_checks")
def test_masks(llama: Any, tiny: Any) -> None:
    lin = tls.linearize(llama, PROMPT)
    with pytest.raises(ValueError, match='a mask is "zero", "mean" or a token of the vocabulary: mask 99 is outside'):
        tls.HetaScope(mask=99)(lin)
    with pytest.raises(TypeError, match='a mask is "zero", "mean" or a token of the vocabulary: .* got 0.5'):
        tls.HetaScope(mask=0.5)(lin)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mask=5 puts another token into the prompt.*at 'blocks.1.hook_resid_pre'"):
        tls.HetaScope(mask=5)(tls.linearize(llama, PROMPT, wrt="blocks.1.hook_resid_pre"))
    with pytest.raises(ValueError, match='a mask is "zero".* is 2 tokens'):
        tls.HetaScope(mask=" keys door")(tls.linearize(tiny, "The keys"))


def test_masks_that_overflow(llama: Any) -> None:
    """Where a zero cannot be normalised, say."""
    poles = [("blocks.0.hook_resid_pre", lambda value, hook: value + 0 * value.norm(dim=-1, keepdim=True).log())]
    with llama.hooks(fwd_hooks=poles), pytest.raises(ValueError, match=r"with token 0 \('.*'\) masked by 'zero'.*mean"):
        tls.attribute(llama, PROMPT, tls.HetaScope(TARGET, beta=0.0))


def test_another_prediction(llama: Any) -> None:
    """M and I would be of the model as it is now, S of the model as it was."""
    lin = tls.linearize(llama, PROMPT)
    with pytest.raises(ValueError, match="is of a point that `at` moved to"):
        tls.HetaScope()(lin.at(lin.embeddings * 0.5))
    cut = [("blocks.1.hook_resid_pre", lambda value, hook: value / 2)]
    with llama.hooks(fwd_hooks=cut), pytest.raises(ValueError, match="are not those under which the model was"):
        tls.HetaScope()(lin)


def test_training_mode(llama: Any) -> None:
    lin = tls.linearize(llama, PROMPT)
    llama.train()
    llama.training = True
    try:
        with pytest.raises(ValueError, match="training mode"):
            tls.HetaScope()(lin)
    finally:
        llama.eval()


@pytest.mark.usefixtures("no_type_checks")
def test_generator_of_another_device(llama: Any) -> None:
    class Elsewhere(torch.Generator):
        device = torch.device("cuda:0")

    with pytest.raises(ValueError, match="the generator is on cuda:0, the model on cpu: take torch.Generator"):
        tls.HetaScope(generator=Elsewhere())(tls.linearize(llama, PROMPT))


def test_fused_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real kernel without double backward."""
    model = MORE["opt"]().model.float()
    monkeypatch.setattr(model.original_model.config, "_attn_implementation", "sdpa")
    lin = tls.linearize(model, PROMPT)
    message = r'cannot be differentiated twice .*: load the model with attn_implementation="eager"\.$'
    with pytest.raises(RuntimeError, match=message):
        block_norms([lin], [lin.token(TARGET)], [torch.ones(1, *lin.embeddings.shape)])
    with pytest.raises(ValueError, match=r"forms no attention pattern.*\"eager\""):
        tls.HetaScope()(lin)
