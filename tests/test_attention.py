"""Attention patterns and values are what the model used, and held attention is constant, on every kind of model."""

import copy
import dataclasses
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close

import tl_scopes as tls
from tests import zoo
from tests.test_left_as_found import failing, unchanged
from tests.zoo import CONTEXT, PROMPT, WIDTH, Specimen
from tl_scopes.models import AttentionLayer, attention, attention_layers, held_attention, masked_attention

EXACT = {"rtol": 1e-10, "atol": 1e-12}
POSITION, KEYS = 5, [0, 2]
TOKENS = torch.tensor(PROMPT)

WITH_ATTENTION = [name for name in zoo.SPECIES if name != "bridge mamba"]
WRAPPED = [name for name in zoo.SPECIES if name.startswith("native") and version("transformer-lens").startswith("3.")]
"""Attention runs inside a module that hooks on the pattern do not reach."""
HOLDABLE = [name for name in WITH_ATTENTION if name not in WRAPPED]
BRIDGES = [name for name in WITH_ATTENTION if name.startswith("bridge")]

_GROUPED = {
    "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": CONTEXT,
}  # fmt: skip
MORE: dict[str, Callable[[], Specimen]] = {
    "opt": lambda: zoo._bridge(
        "OPTForCausalLM", "OPTConfig", hidden_size=WIDTH, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=CONTEXT, word_embed_proj_dim=WIDTH,
    ),
    "window": lambda: zoo._bridge("MistralForCausalLM", "MistralConfig", **_GROUPED, sliding_window=3),
    "multi-query": lambda: zoo._bridge(
        "GPTBigCodeForCausalLM", "GPTBigCodeConfig", n_embd=WIDTH, n_layer=2, n_head=2, n_positions=CONTEXT
    ),
    "linear biases": lambda: zoo._bridge("BloomForCausalLM", "BloomConfig", hidden_size=WIDTH, n_layer=2, n_head=2),
    "sink logits": lambda: zoo._bridge(
        "GptOssForCausalLM", "GptOssConfig", **_GROUPED, head_dim=8, num_local_experts=3, num_experts_per_tok=2,
        experts_implementation="eager",
    ),
    "latent": lambda: zoo._bridge(
        "DeepseekV3ForCausalLM", "DeepseekV3Config", hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, head_dim=4,
        v_head_dim=6, qk_nope_head_dim=4, first_k_dense_replace=2,
    ),
    "convolutions": lambda: zoo._bridge(
        "Lfm2ForCausalLM", "Lfm2Config", **_GROUPED, layer_types=["conv", "full_attention"]
    ),
    "mamba beside": lambda: zoo._bridge(
        "FalconH1ForCausalLM", "FalconH1Config", **_GROUPED, mamba_d_ssm=16, mamba_n_heads=2, mamba_d_head=8,
        mamba_n_groups=1, mamba_d_state=4,
    ),
    "norm between": lambda: zoo._bridge("BitNetForCausalLM", "BitNetConfig", **_GROUPED),
    "clipped values": lambda: zoo._bridge("OlmoForCausalLM", "OlmoConfig", **_GROUPED, clip_qkv=0.5),
}  # fmt: skip


@pytest.fixture
def specimen(request: pytest.FixtureRequest) -> Iterator[Specimen]:
    with zoo.Float64():
        yield zoo.specimen(request.param) if request.param in zoo.SPECIES else MORE[request.param]()


@pytest.fixture
def model() -> Iterator[Any]:
    """A fresh one: these tests change it."""
    model = zoo.SPECIES["hooked layer norm" if zoo.HookedTransformer else "bridge llama"]().model
    with zoo.Float64():
        model(TOKENS[None])
        yield model


def of_species(*names: str) -> Any:
    return pytest.mark.parametrize("specimen", names, indirect=True)


def without_bias(model: Any, layer: int) -> Tensor:
    """What the output projection gave in a run of its own, less the bias."""
    name = next(name for name in ("attn.o.hook_out", "hook_attn_out") if f"blocks.{layer}.{name}" in model.hook_dict)
    _, cache = model.run_with_cache(TOKENS[None], names_filter=f"blocks.{layer}.{name}")
    bias = model.blocks[layer].attn.b_O
    return cache[f"blocks.{layer}.{name}"][0].detach() - (0 if bias is None else bias.detach())


# -- patterns and values ----------------------------------------------------------------------------------------------


@of_species(*WITH_ATTENTION, "opt", "window", "multi-query", "linear biases", "sink logits", "latent")
def test_the_heads_add_up(specimen: Specimen) -> None:
    """Σ_h pattern_h value_h W_O_h + b_O is what the attention of each layer gives."""
    layers = list(attention_layers(specimen.model, TOKENS))
    assert [layer.layer for layer in layers] == list(range(specimen.model.cfg.n_layers))
    for layer in layers:
        assert_close(
            torch.einsum("hqk,hkd->qd", layer.pattern, layer.written),
            without_bias(specimen.model, layer.layer),
            **EXACT,
        )


@of_species(*BRIDGES, "opt", "window", "multi-query", "linear biases", "sink logits", "latent")
def test_patterns_are_hugging_faces(specimen: Specimen) -> None:
    """The plain model returns the same attention weights."""
    expected = specimen.plain(TOKENS[None], output_attentions=True).attentions
    for layer, pattern in zip(attention_layers(specimen.model, TOKENS), expected, strict=True):
        assert_close(layer.pattern, pattern[0].detach(), **EXACT)


@of_species(*WITH_ATTENTION)
def test_rows_are_distributions_over_the_past(specimen: Specimen) -> None:
    for layer in attention_layers(specimen.model, TOKENS):
        assert_close(layer.pattern.sum(-1), torch.ones_like(layer.pattern[..., 0]), **EXACT)
        assert not layer.pattern.triu(1).any()
        assert not layer.pattern.requires_grad
        assert not layer.value.requires_grad
        assert not layer.W_O.requires_grad


def test_rows_beside_a_sink_logit() -> None:
    """What a learned sink takes away is missing from the rows."""
    with zoo.Float64():
        for layer in attention_layers(MORE["sink logits"]().model, TOKENS):
            assert (layer.pattern.sum(-1) < 1).all()


@pytest.mark.parametrize("ord", [1, 2])
def test_written_norms(model: Any, ord: int) -> None:
    """written_norms = ‖written‖, without holding all of it."""
    for layer in attention_layers(model, TOKENS):
        assert_close(layer.written_norms(ord), layer.written.norm(p=ord, dim=-1), **EXACT)


def test_written_norms_of_half_precision(model: Any) -> None:
    layer = next(attention_layers(model, TOKENS))
    module = torch.nn.Module()
    module.register_buffer("W_O", layer.W_O.half())
    half = AttentionLayer(0, layer.pattern.half(), layer.value.half(), module)
    assert half.written_norms(1).dtype == torch.float32
    assert_close(half.written_norms(1).double(), layer.written_norms(1), rtol=1e-2, atol=1e-2)


def test_a_layer_in_one_line(model: Any) -> None:
    layer = next(attention_layers(model, TOKENS))
    heads, tokens, d_head = layer.value.shape
    assert repr(layer) == f"AttentionLayer(layer 0; {heads} heads of {d_head}, {tokens} tokens)"
    with pytest.raises(dataclasses.FrozenInstanceError):
        layer.layer = 1  # type: ignore[misc]


# -- memory -----------------------------------------------------------------------------------------------------------


@of_species(*WITH_ATTENTION)
@pytest.mark.parametrize("kept", [1, 2])
def test_groups_change_no_number(specimen: Specimen, monkeypatch: pytest.MonkeyPatch, kept: int) -> None:
    """One pass while the patterns fit, else one per group of layers, that ends behind the group."""
    model, runs = specimen.model, {0: 0, 1: 0}
    whole = list(attention_layers(model, TOKENS))
    zoo.batches_of(monkeypatch, kept)

    def count(value: Tensor, hook: Any) -> None:
        runs[hook.layer()] += 1

    with model.hooks(fwd_hooks=[(f"blocks.{layer}.attn.hook_z", count) for layer in runs]):
        again = list(attention_layers(model, TOKENS))
    assert runs == ({0: 1, 1: 1} if kept == 2 else {0: 2, 1: 1})
    for layer, other in zip(whole, again, strict=True):
        assert layer.layer == other.layer
        for field in ("pattern", "value", "W_O"):
            assert torch.equal(getattr(layer, field), getattr(other, field))


def test_only_patterns_and_values_are_cached(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the pass ends as soon as they are there, before the unembedding."""
    caches, unembedded, cached = [], [], attention._cached

    def spy(*args: Any) -> Any:
        caches.append(cached(*args))
        assert len(caches[-1]) == 3
        return caches[-1]

    monkeypatch.setattr(attention, "_cached", spy)
    zoo.batches_of(monkeypatch, 1)
    with model.hooks(fwd_hooks=[("unembed.hook_out", lambda value, hook: unembedded.append(value.shape[1]))]):
        first, second = attention_layers(model, TOKENS)
    assert (first.layer, second.layer) == (0, 1)
    assert unembedded == []
    assert caches == [{}, {}]  # handed over, and nothing else was there


def test_gradients_go_on_where_layers_are_used(model: Any) -> None:
    """The generator, while it waits, leaves the caller's gradient mode alone."""
    for layer in attention_layers(model, TOKENS):
        assert torch.is_grad_enabled()
        assert layer.pattern.grad_fn is None


# -- the user's hooks, and the model left as found --------------------------------------------------------------------


def test_the_users_hooks_act(model: Any) -> None:
    """What is read is what the patched model used."""

    def first_head_off(pattern: Tensor, hook: Any) -> Tensor:
        pattern = pattern.clone()
        pattern[:, 0] = 0
        return pattern

    hooks = [("blocks.0.attn.hook_pattern", first_head_off), ("blocks.1.attn.hook_v", lambda v, hook: v * 2)]
    plain = list(attention_layers(model, TOKENS))
    with model.hooks(fwd_hooks=hooks):
        with unchanged(model):
            patched = list(attention_layers(model, TOKENS))
        given = [without_bias(model, layer) for layer in range(2)]
    assert not patched[0].pattern[0].any()
    assert torch.equal(patched[0].pattern[1:], plain[0].pattern[1:])
    for layer, expected in zip(patched, given, strict=True):
        assert_close(torch.einsum("hqk,hkd->qd", layer.pattern, layer.written), expected, **EXACT)


def test_a_patched_head_output_is_no_fault(model: Any) -> None:
    """A hook on the heads' output says nothing about patterns and values."""
    plain = list(attention_layers(model, TOKENS))
    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_z", lambda z, hook: z * 0)]):
        patched = list(attention_layers(model, TOKENS))
    assert torch.equal(patched[1].value, plain[1].value)


@pytest.mark.parametrize("kind", [name for name in ("bridge llama", "hooked layer norm") if name in zoo.SPECIES])
@pytest.mark.parametrize("layers", [1, 9])
def test_left_as_found(kind: str, layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """After success, after an exception on the way, after layers that nobody asks for, and under no_grad."""
    zoo.batches_of(monkeypatch, layers)
    model = zoo.SPECIES[kind]().model
    model(TOKENS[None])
    with unchanged(model):
        list(attention_layers(model, TOKENS))
    with unchanged(model):
        next(attention_layers(model, TOKENS))
    with unchanged(model), torch.no_grad(), held_attention(model, KEYS):
        list(attention_layers(model, TOKENS))
    with unchanged(model), held_attention(model):
        tls.SemanticScope()(tls.linearize(model, PROMPT))
    model.hook_dict["blocks.1.hook_resid_pre"].add_hook(failing)
    with unchanged(model), pytest.raises(ZeroDivisionError, match="the user's hook fails"):
        list(attention_layers(model, TOKENS))
    with unchanged(model), pytest.raises(ZeroDivisionError, match="the user's hook fails"), held_attention(model):
        tls.linearize(model, PROMPT)


def test_compatibility_mode() -> None:
    """In compatibility mode hooks have several names; nothing is read or held twice."""
    model = zoo.SPECIES["bridge llama"]().model
    with zoo.Float64():
        before = list(attention_layers(model, TOKENS))
        with held_attention(model, KEYS):
            matrix = tls.linearize(model, PROMPT).as_matrix()
        model.enable_compatibility_mode(no_processing=True)
        for layer, other in zip(before, attention_layers(model, TOKENS), strict=True):
            assert_close(layer.pattern, other.pattern, **EXACT)
            assert_close(layer.written, other.written, **EXACT)
        with held_attention(model, KEYS):
            assert_close(tls.linearize(model, PROMPT).as_matrix(), matrix, **EXACT)


# -- attention that is held -------------------------------------------------------------------------------------------


@of_species(*HOLDABLE, "window", "multi-query", "linear biases", "sink logits", "latent")
@pytest.mark.parametrize("keys", [KEYS, None, []], ids=["some", "all", "none"])
def test_held_attention_is_constant(specimen: Specimen, keys: list[int] | None) -> None:
    """Same Jacobian as with the numbers put in place of these weights; same values as ever, to the last bit."""
    model, prompt = specimen.model, PROMPT[: POSITION + 1]
    numbers = [layer.pattern for layer in attention_layers(model, TOKENS[: POSITION + 1])]
    columns = slice(None) if keys is None else keys

    def put(pattern: Tensor, hook: Any) -> Tensor:
        pattern = pattern.clone()
        pattern[0, ..., columns] = numbers[hook.layer()][..., columns]
        return pattern

    plain = tls.linearize(model, prompt)
    with model.hooks(fwd_hooks=[(f"blocks.{layer}.attn.hook_pattern", put) for layer in range(len(numbers))]):
        expected = tls.linearize(model, prompt)
    with held_attention(model, keys):
        lin = tls.linearize(model, PROMPT, POSITION)
    assert torch.equal(lin.logits, plain.logits)
    assert_close(lin.as_matrix(), expected.as_matrix(), **EXACT)
    changed = (lin.as_matrix() - plain.as_matrix()).norm() / plain.as_matrix().norm()
    assert changed > 1e-3 if keys != [] else changed == 0


@of_species(*BRIDGES)
@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("keys", [KEYS, None], ids=["some", "all"])
def test_held_attention_by_hand(
    specimen: Specimen, kernel: str, keys: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same Jacobian as the plain Hugging Face model's, its attention written out with detached weights."""

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float | None = None,
        softcap: float | None = None, **rest: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
        scores = query @ key.transpose(-2, -1) * (scaling or query.shape[-1] ** -0.5)
        scores = scores if softcap is None else softcap * (scores / softcap).tanh()
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        pattern = scores.masked_fill(future, -torch.inf).softmax(-1)
        columns = [
            column.detach() if keys is None or i in keys else column for i, column in enumerate(pattern.unbind(-1))
        ]
        return (torch.stack(columns, -1) @ value).transpose(1, 2).contiguous(), None

    plain = copy.deepcopy(specimen.plain)
    monkeypatch.setattr(sys.modules[type(plain).__module__], "eager_attention_forward", attention)
    by_hand = Specimen(None, plain, plain.get_input_embeddings(), plain.get_output_embeddings())
    truth = zoo.oracle(by_hand, PROMPT, POSITION, 0)
    monkeypatch.setattr(specimen.model.original_model.config, "_attn_implementation", kernel)
    with held_attention(specimen.model, keys):
        lin = tls.linearize(specimen.model, PROMPT, POSITION)
    assert_close(lin.readout, truth["readout"], **EXACT)
    assert_close(lin.as_matrix(), truth["jacobian"][:, : POSITION + 1], **EXACT)


@of_species(*HOLDABLE)
def test_patterns_are_in_use(specimen: Specimen) -> None:
    """Where attention can be held, a hook on the pattern reaches the logits."""
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(specimen.model.cfg.n_layers)]
    logits = specimen.model(TOKENS[None])
    with specimen.model.hooks(fwd_hooks=[(name, lambda pattern, hook: pattern * 0) for name in names]):
        assert not torch.allclose(specimen.model(TOKENS[None]), logits)


def test_held_positions_count_from_both_ends(model: Any) -> None:
    matrices = []
    for keys in ([1, -1], [1, POSITION, 1]):
        with held_attention(model, keys):
            matrices.append(tls.linearize(model, PROMPT, POSITION).as_matrix())
    assert torch.equal(*matrices)


def test_attention_is_free_again(model: Any) -> None:
    """Outside, also for `at`, and in other threads, attention moves as ever."""

    def elsewhere() -> Tensor:
        with zoo.Float64():
            return tls.linearize(model, PROMPT).as_matrix()

    plain = elsewhere()
    with ThreadPoolExecutor() as pool, held_attention(model):
        lin = tls.linearize(model, PROMPT)
        held = lin.as_matrix()
        assert_close(lin.at(lin.embeddings).as_matrix(), held, **EXACT)
        with held_attention(model, KEYS):  # whole patterns are held already
            assert_close(tls.linearize(model, PROMPT).as_matrix(), held, **EXACT)
        other = pool.submit(elsewhere)
    assert not torch.allclose(held, plain)
    assert_close(other.result(), plain, **EXACT)
    assert_close(tls.linearize(model, PROMPT).as_matrix(), plain, **EXACT)


# -- attention that is masked -----------------------------------------------------------------------------------------


@of_species(*BRIDGES, "window", "sink logits", "latent", "multi-query")
@pytest.mark.parametrize("keys", [[0], [1, -2]], ids=str)
def test_masked_attention_by_hand(specimen: Specimen, keys: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Same logits as the plain Hugging Face model's, with scores of minus infinity there."""
    plain = copy.deepcopy(specimen.plain)
    module = sys.modules[type(plain).__module__]
    blocked = torch.zeros(len(PROMPT), len(PROMPT), dtype=torch.float64)
    blocked[:, keys] = -torch.inf
    eager = module.eager_attention_forward

    def attention(
        layer: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *given: Any, **named: Any
    ) -> Any:
        return eager(layer, query, key, value, mask + blocked.tril(-1), *given, **named)

    monkeypatch.setattr(module, "eager_attention_forward", attention)
    by_hand = plain(TOKENS[None]).logits.detach()
    monkeypatch.undo()
    with masked_attention(specimen.model, keys), torch.no_grad():
        found = specimen.model(TOKENS[None])
    assert_close(found, by_hand, **EXACT)
    assert not torch.allclose(found, plain(TOKENS[None]).logits)


class BlockedSoftmax(TorchFunctionMode):
    """Softmaxes between tokens are taken of scores of minus infinity where a later token looks at `keys`."""

    def __init__(self, keys: list[int]) -> None:
        super().__init__()
        self.blocked = torch.zeros(len(PROMPT), len(PROMPT), dtype=torch.float64)
        self.blocked[:, keys] = -torch.inf
        self.blocked = self.blocked.tril(-1)
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.softmax, torch.nn.functional.softmax, Tensor.softmax) and args[0].shape[-2:] == (8, 8):
            self.count += 1
            args = (args[0] + self.blocked, *args[1:])
        return func(*args, **(kwargs or {}))


@of_species(*HOLDABLE, "window", "linear biases")
@pytest.mark.parametrize("keys", [[0], [1, -2]], ids=str)
def test_masked_attention_from_scores(specimen: Specimen, keys: list[int]) -> None:
    """Same logits as the plain model's, whose softmaxes leave these scores out."""
    with torch.no_grad(), BlockedSoftmax(keys) as oracle:
        expected = specimen.forward(TOKENS, torch.zeros(len(PROMPT), WIDTH, dtype=torch.float64))[1]
    assert oracle.count == specimen.model.cfg.n_layers
    with masked_attention(specimen.model, keys), torch.no_grad():
        assert_close(specimen.model(TOKENS[None])[0], expected, **EXACT)


@of_species(*HOLDABLE, "window", "multi-query", "linear biases", "sink logits", "latent")
def test_a_masked_token_tells_nobody(specimen: Specimen) -> None:
    """Another token in its place changes no other prediction, nor does the Jacobian know of it; its own does change."""
    other = TOKENS.clone()
    other[2] = 20
    with masked_attention(specimen.model, [2]), torch.no_grad():
        ours, theirs = specimen.model(TOKENS[None])[0], specimen.model(other[None])[0]
        lin = tls.linearize(specimen.model, PROMPT)
    rest = [i for i in range(len(PROMPT)) if i != 2]
    assert_close(ours[rest], theirs[rest], **EXACT)
    assert not torch.allclose(ours[2], theirs[2])
    influence = lin.as_matrix().norm(dim=(0, 2))
    assert influence[2] < 1e-12 * influence.max()
    with torch.no_grad():
        assert_close(ours[:3], specimen.model(TOKENS[None])[0, :3], **EXACT)  # nothing is later


def test_nothing_masked_changes_nothing(model: Any) -> None:
    """Neither no keys, nor the last one, to which no other token attends."""
    with torch.no_grad():
        logits = model(TOKENS[None])
        for keys in ([], [-1]):
            with masked_attention(model, keys), unchanged(model):
                assert_close(model(TOKENS[None]), logits, **EXACT)


def test_masking_where_nothing_else_is_attended_to(model: Any) -> None:
    def only_first(pattern: Tensor, hook: Any) -> Tensor:
        return torch.zeros_like(pattern).index_fill(-1, torch.tensor([0]), 1)

    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", only_first)]), unchanged(model):
        with pytest.raises(ValueError, match=r"attention to 0 cannot be masked .* attends to nothing else.*float32"):
            with masked_attention(model, [0]):
                tls.linearize(model, PROMPT)


def test_a_small_rest_is_shared_out_precisely() -> None:
    """Of rows that lie on the masked token but for a part in a million, in float32."""
    model = zoo.SPECIES["bridge llama"]().model.float()
    rest = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]) * 1e-8
    row = torch.cat([1 - rest.sum()[None], rest])
    seen = []

    def put(pattern: Tensor, hook: Any) -> Tensor:
        return torch.cat([pattern[..., :-1, :], row.expand_as(pattern[..., -1:, :])], dim=-2)

    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", put)]), masked_attention(model, [0]), torch.no_grad():
        read = ("blocks.1.attn.hook_pattern", lambda pattern, hook: seen.append(pattern[0, :, -1]))
        with model.hooks(fwd_hooks=[read]):
            model(TOKENS[None])
    assert_close(seen[0], torch.cat([torch.zeros(1), rest / rest.sum()]).expand_as(seen[0]), rtol=1e-5, atol=0)


@of_species("opt", *WRAPPED)
def test_wrapped_attention_cannot_be_masked(specimen: Specimen) -> None:
    specimen.model(TOKENS[None])
    with unchanged(specimen.model), pytest.raises(ValueError, match="attention cannot be masked in .*: layer 0"):
        with masked_attention(specimen.model, KEYS):
            tls.linearize(specimen.model, PROMPT)


@pytest.mark.parametrize(
    ("species", "keys", "error", "message"),
    [
        ("bridge mamba", [0], ValueError, "MambaForCausalLM has no attention patterns: there is nothing to mask"),
        ("bridge llama", [8], ValueError, "masked: position 8 is out of range: the prompt has 8 tokens"),
        ("bridge llama", [True], TypeError, "attention is masked at positions, integers, got True"),
    ],
)
def test_what_cannot_be_masked(species: str, keys: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message), masked_attention(zoo.specimen(species).model, keys):
        tls.linearize(zoo.specimen(species).model, PROMPT)


# -- refusals ---------------------------------------------------------------------------------------------------------


@of_species("bridge mamba", "convolutions", "mamba beside")
def test_other_mixers(specimen: Specimen) -> None:
    listed = {"MambaForCausalLM": "0, 1 of 2", "Lfm2ForCausalLM": "0 of 2", "FalconH1ForCausalLM": "0, 1 of 2"}
    architecture = specimen.model.cfg.architecture
    with pytest.raises(ValueError, match=rf"{architecture} has layers in which .* \({listed[architecture]}\)"):
        attention_layers(specimen.model, TOKENS)


def test_nothing_to_hold() -> None:
    with (
        pytest.raises(ValueError, match="MambaForCausalLM has no attention patterns"),
        held_attention(zoo.specimen("bridge mamba").model),
    ):
        pass


@of_species("convolutions")
def test_held_where_there_is_attention(specimen: Specimen) -> None:
    plain = tls.linearize(specimen.model, PROMPT)
    with held_attention(specimen.model):
        lin = tls.linearize(specimen.model, PROMPT)
    assert torch.equal(lin.logits, plain.logits)
    assert not torch.allclose(lin.as_matrix(), plain.as_matrix())


@of_species("opt")
def test_a_kernel_without_patterns(specimen: Specimen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(specimen.model.original_model.config, "_attn_implementation", "sdpa")
    with pytest.raises(ValueError, match=r"layer 0 of OPTForCausalLM forms no attention pattern.*'sdpa'.*\"eager\""):
        next(attention_layers(specimen.model, TOKENS))


@of_species("norm between", "clipped values")
def test_heads_that_do_more(specimen: Specimen) -> None:
    with pytest.raises(ValueError, match="heads of layer 0 of .* do not give the average of their values"):
        next(attention_layers(specimen.model, TOKENS))


@of_species("opt", *WRAPPED)
def test_wrapped_attention_cannot_be_held(specimen: Specimen) -> None:
    specimen.model(TOKENS[None])  # a bridge registers a hook of its own at the first run
    with unchanged(specimen.model), pytest.raises(ValueError, match="attention cannot be held in .*: layer 0"):
        with held_attention(specimen.model, KEYS):
            tls.linearize(specimen.model, PROMPT)


@pytest.mark.parametrize("key", [8, -9])
def test_keys_outside_of_the_prompt(model: Any, key: int) -> None:
    with (
        unchanged(model),
        pytest.raises(ValueError, match=f"held: position {key} is out of range: the prompt has 8"),
    ):
        with held_attention(model, [0, key]):
            tls.linearize(model, PROMPT)


def test_keys_that_are_no_positions(model: Any) -> None:
    with pytest.raises(TypeError, match=r"attention is held at positions, integers, got True"):
        with held_attention(model, [True]):
            pass
