"""Models as people have them: with adapters, quantised, in half precision, spliced. Right, or refused with the remedy.

peft and optimum-quanto are in the test extra. torchao and bitsandbytes are not: they take seconds to import in every
process and bring GPU libraries; their tests run where they are installed.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.testing import assert_close
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

import tl_scopes as tls
from tests import zoo
from tests.zoo import PROMPT
from tl_scopes.faithfulness import Perturbation
from tl_scopes.scopes.baselines import AttentionRollout, LeaveOneOut
from tl_scopes.tiny import FOLDER

TARGET = 3


def hugging_face(**options: Any) -> Any:
    """The golden Llama without TransformerLens."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        zoo.GOLDEN, dtype=options.pop("dtype", torch.float32), attn_implementation="eager", **options
    ).eval()


def bridge(model: Any) -> Any:
    return build_bridge_from_module(model, "LlamaForCausalLM", hf_config=model.config, model_name="wrapped")


def by_autograd(model: Any) -> Tensor:
    """Semantic scores by plain autograd through the embeddings of a Hugging Face model."""
    embeddings = model.get_input_embeddings()(torch.tensor([PROMPT])).detach().requires_grad_()
    logit = model(inputs_embeds=embeddings).logits[0, -1, TARGET]
    (gradient,) = torch.autograd.grad(logit.float(), embeddings)
    return gradient[0].float().norm(dim=-1)


def assert_right(model: Any, expected: Tensor, rtol: float = 1e-4) -> None:
    """Scores alone, in a map, in a batch and checkpointed."""
    scope = tls.SemanticScope(TARGET)
    found = tls.attribute(model, PROMPT, scope)
    assert_close(found.scores, expected, rtol=rtol, atol=rtol * float(expected.max()))
    [batched] = tls.attribute_many(model, [PROMPT], scope, progress=False)
    for other in (
        tls.attribution_map(model, PROMPT, scope)[-1],
        batched,
        tls.attribute(model, PROMPT, scope, checkpoint=True),
    ):
        assert other is not None
        assert_close(other.scores, expected, rtol=rtol, atol=rtol * float(expected.max()))


def assert_checks_say(model: Any) -> None:
    """Every check is made, or says why it cannot be."""
    found = tls.check(tls.linearize(model, PROMPT), tls.SemanticScope(TARGET))
    assert len(found) == 8
    for check in found:
        assert len(check.finding) > 10
        if check.name in ("saturation", "weights"):
            assert check.verdict != "not applicable"


# -- adapters ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def lora() -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(hugging_face(), config).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def test_adapters_inside_the_bridge(lora: Any) -> None:
    """`base_model.model` is the Hugging Face model with the adapters in it."""
    expected = by_autograd(lora.base_model.model)
    assert (expected - by_autograd(hugging_face())).norm() > 0.1 * expected.norm()
    model = bridge(lora.base_model.model)
    assert_right(model, expected)
    assert_checks_say(model)


def test_merged_adapters(lora: Any) -> None:
    expected = by_autograd(lora.base_model.model)
    assert_right(bridge(lora.merge_and_unload()), expected)


def test_a_peft_model_itself_is_refused_with_the_remedy(lora: Any) -> None:
    with pytest.raises(TypeError, match=r"got PeftModelForCausalLM.*hf_model=model.base_model.model\)"):
        tls.attribute(lora, PROMPT, tls.SemanticScope(TARGET))


# -- quantised weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["qint8", "qint4"])
def test_quanto(weights: str) -> None:
    """Weights alone are quantised: gradients pass, and are those of the quantised model."""
    quanto = pytest.importorskip("optimum.quanto")
    model = hugging_face()
    quanto.quantize(model, weights=getattr(quanto, weights))
    quanto.freeze(model)
    expected = by_autograd(model)
    assert (expected - by_autograd(hugging_face())).norm() > 0.01 * expected.norm()
    wrapped = bridge(model)
    assert_right(wrapped, expected)
    assert_checks_say(wrapped)


def test_torchao_weights() -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao takes seconds to import")
    model = hugging_face()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    expected = by_autograd(model)
    wrapped = bridge(model)
    assert_right(wrapped, expected)
    assert_checks_say(wrapped)


def test_torchao_activations_are_refused() -> None:
    """No gradient passes int8 activations; the scores would be those of the residual stream beside the blocks."""
    quantization = pytest.importorskip("torchao.quantization", reason="torchao takes seconds to import")
    model = hugging_face()
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(
        ValueError, match=r"no gradient passes .* and \d+ other modules: they compute with quantised act"
    ):
        tls.attribute(bridge(model), PROMPT, tls.SemanticScope(TARGET))


@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes(bits: int) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes brings 120 MB of GPU libraries")
    config = transformers.BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)
    model = hugging_face(quantization_config=config)
    expected = by_autograd(model)
    found = tls.attribute(bridge(model), PROMPT, tls.SemanticScope(TARGET))
    assert_close(found.scores, expected, rtol=0.05, atol=0.05 * float(expected.max()))
    assert_checks_say(bridge(model))


class Blocked(torch.nn.Linear):
    """A layer that computes without a graph, as packed or quantised ones do."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.detach()).detach()


def test_a_module_that_stops_gradients_is_named() -> None:
    model = hugging_face()
    layer = model.model.layers[0].mlp.down_proj
    layer.__class__ = Blocked
    wrapped = bridge(model)
    with pytest.raises(ValueError, match=r"no gradient passes blocks.0.*\(Blocked\): they compute with quantised act"):
        tls.linearize(wrapped, PROMPT)
    layer.__class__ = torch.nn.Linear
    assert_right(wrapped, by_autograd(hugging_face()))


# -- precision and devices --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.bfloat16, 0.1), (torch.float16, 0.01)])
def test_half_precision(dtype: torch.dtype, rtol: float) -> None:
    """Close to the float32 scores of the same weights."""
    exact = by_autograd(copy.deepcopy(hugging_face(dtype=dtype)).float())
    answer = tls.attribute(bridge(hugging_face(dtype=dtype)), PROMPT, tls.SemanticScope(TARGET))
    assert answer.dtype == str(dtype).removeprefix("torch.")
    assert_close(answer.scores, exact, rtol=rtol, atol=rtol * float(exact.max()))


SCOPES: list[tls.Scope] = [
    tls.SemanticScope(TARGET), tls.TemperatureScope(norm="logits"), tls.FisherScope(), tls.FisherScope(exact=True),
    tls.SpectralScope(), tls.SpectralScope(rank=2), tls.PathIntegratedScope(TARGET, steps=4),
    tls.HetaScope(TARGET, probes=1), tls.PositionCorrectedScope(tls.SemanticScope(TARGET)),
    tls.FrozenAttentionScope(tls.SemanticScope(TARGET)),
]  # fmt: skip
QUESTIONS: dict[str, Callable[[tls.Linearization], Any]] = {
    **{repr(scope): scope for scope in SCOPES},
    "check": lambda lin: repr(tls.check(lin, tls.FisherScope())),
    "linearity": lambda lin: repr(tls.linearity(lin, tls.SemanticScope(TARGET), directions=1)),
    "sink_report": lambda lin: repr(tls.sink_report(lin, [tls.SemanticScope(TARGET)])),
    "directions": lambda lin: repr(tls.SpectralScope().directions(lin, 1)),
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_another_default_device_changes_nothing(name: str) -> None:
    """Where tensors are made, they are made on the model's device, or on the CPU where they stay."""
    lin = tls.linearize(zoo.llama(zoo.GOLDEN, "bridge"), PROMPT)
    expected = QUESTIONS[name](lin)
    torch.set_default_device("meta")  # which has no numbers: whatever is made there cannot be used
    try:
        found = QUESTIONS[name](lin)
    finally:
        torch.set_default_device(None)
    assert repr(found) == repr(expected)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_reported(dtype: torch.dtype, checkpoint: bool) -> None:
    """Scores under torch.autocast are as exact as its precision, and say so; what runs the model again stays in it."""
    model, exact = bridge(hugging_face()), by_autograd(hugging_face())
    scope = tls.SemanticScope(TARGET)
    with torch.autocast("cpu", dtype):
        lin = tls.linearize(model, PROMPT, checkpoint=checkpoint)
        inside = scope(lin)
        [many] = tls.attribute_many(model, [PROMPT], scope, progress=False, checkpoint=checkpoint)
        circuits = (tls.carried_by(lin, scope, tokens=0), tls.layer_map(model, PROMPT, scope))
    assert {found.dtype for found in circuits} == {str(dtype).removeprefix("torch.")}
    answers = [inside, scope(lin), many]
    for answer in answers:
        assert answer is not None
        assert answer.dtype == str(dtype).removeprefix("torch.")
        assert_close(answer.scores, exact, rtol=0.1, atol=0.1 * float(exact.max()))
    with pytest.raises(ValueError, match=rf"linearised in {dtype} \(torch.autocast\) and would run outside of torc"):
        tls.PathIntegratedScope(TARGET, steps=4)(lin)
    plain = tls.linearize(model, PROMPT)
    assert scope(plain).dtype == "float32"
    with (
        torch.autocast("cpu", dtype),
        pytest.raises(ValueError, match="linearised outside of torch.autocast and would run in torch"),
    ):
        tls.check(plain, scope)
    with torch.autocast("cpu", enabled=False):
        assert scope(tls.linearize(model, PROMPT)).dtype == "float32"


# -- offloaded weights ------------------------------------------------------------------------------------------------


def cpu_offload(folder: Path) -> Any:
    accelerate = pytest.importorskip("accelerate")
    return accelerate.cpu_offload(hugging_face(), execution_device=torch.device("cpu"))


def disk_offload(folder: Path) -> Any:
    accelerate = pytest.importorskip("accelerate")
    model = hugging_face()
    accelerate.disk_offload(model, str(folder), execution_device=torch.device("cpu"))
    return model


def device_map(folder: Path) -> Any:
    """Hugging Face's own: the last layers on disk."""
    pytest.importorskip("accelerate")
    layers = transformers.AutoConfig.from_pretrained(zoo.GOLDEN).num_hidden_layers
    places = {f"model.layers.{i}": "cpu" if i == 0 else "disk" for i in range(layers)}
    places |= dict.fromkeys(("model.embed_tokens", "model.norm", "lm_head", "model.rotary_emb"), "cpu")
    return hugging_face(device_map=places, offload_folder=str(folder))


@pytest.mark.parametrize("offload", [cpu_offload, disk_offload, device_map])
def test_offloaded_weights(offload: Callable[[Path], Any], tmp_path: Path) -> None:
    """Fetched for each pass, and again for each backward pass of a checkpoint: right; or refused with the remedy."""
    expected = by_autograd(hugging_face())
    model = bridge(offload(tmp_path))
    if offload is not device_map and zoo.HookedTransformer is not None:
        with pytest.raises(ValueError, match=r"cannot run a model whose unembedding is offloaded, .* keep the unem"):
            tls.linearize(model, PROMPT)
        return
    assert any(parameter.is_meta for parameter in model.parameters())
    fetched = [parameter.is_meta for parameter in model.parameters()]
    assert_right(model, expected)
    assert [parameter.is_meta for parameter in model.parameters()] == fetched
    assert_checks_say(model)
    lin, plain = tls.linearize(model, PROMPT), tls.linearize(bridge(hugging_face()), PROMPT)
    for scope in (tls.PathIntegratedScope(TARGET, steps=4), tls.FisherScope(), tls.TemperatureScope()):
        assert_close(scope(lin).scores, scope(plain).scores, rtol=1e-4, atol=1e-5)
    perturbation = Perturbation(("zero",), (0.5,), randomise=False)
    with pytest.raises(ValueError, match=r"some weights of the model are offloaded, .* load the model without offload"):
        tls.evaluate(model, [PROMPT], [tls.SemanticScope(TARGET)], perturbation, path=tmp_path / "results.jsonl")


def test_a_model_without_weights_is_refused() -> None:
    model = hugging_face().to("meta")
    with pytest.raises(ValueError, match="the model is on the device 'meta', which keeps shapes and no numbers: load"):
        tls.linearize(bridge(model), PROMPT)


# -- sparse autoencoders ----------------------------------------------------------------------------------------------


def test_a_spliced_autoencoder() -> None:
    """The scores are those of the model with the autoencoder in it, by finite differences."""
    sae_lens = pytest.importorskip("sae_lens", reason="sae-lens needs TransformerLens 3")
    if zoo.HookedTransformer is None:
        pytest.skip("sae-lens splices into a HookedTransformer")
    model = sae_lens.HookedSAETransformer(zoo.specimen("hooked layer norm").model.cfg)
    model.load_state_dict(zoo.specimen("hooked layer norm").model.state_dict())
    model.eval()
    hook = "blocks.1.hook_resid_pre"
    config = sae_lens.StandardSAEConfig(d_in=zoo.WIDTH, d_sae=32, dtype="float64")
    config.metadata.hook_name = hook
    torch.manual_seed(0)
    sae = sae_lens.StandardSAE(config).double()
    plain = tls.attribute(model, PROMPT, tls.SemanticScope(TARGET))
    model.add_sae(sae)
    try:
        lin = tls.linearize(model, PROMPT)
        spliced = tls.SemanticScope(TARGET)(lin)
        direction = torch.zeros_like(lin.embeddings)
        direction[2] = torch.randn(zoo.WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        step = 1e-6
        ahead, behind = (lin.at(lin.embeddings + s * step * direction).logits[TARGET] for s in (1, -1))
        gradient = lin.vjp(lin.cotangent(lambda logits: logits[TARGET])[None])[0]
    finally:
        model.reset_saes()
    assert_close((ahead - behind) / (2 * step), (gradient * direction).sum(), rtol=1e-5, atol=1e-8)
    assert (spliced.scores - plain.scores).norm() > 0.01 * plain.scores.norm()


def test_the_bridge_of_sae_lens() -> None:
    """Its hook_dict leaves TransformerLens' older names out, "hook_embed" among them."""
    pytest.importorskip("sae_lens", reason="sae-lens needs TransformerLens 3")
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    text, scope = "The keys to the old cabinet near the door", tls.SemanticScope(" are")
    model, plain = SAETransformerBridge.boot_transformers(str(FOLDER), device="cpu").eval(), tls.load_tiny()
    assert "hook_embed" not in model.hook_dict
    for options in ({}, {"wrt": "blocks.1.hook_resid_pre"}, {"of": "blocks.1.hook_resid_post"}):
        asked = scope if "of" not in options else tls.SpectralScope(space="readout")
        expected = tls.attribute(plain, text, asked, **options).scores
        assert_close(tls.attribute(model, text, asked, **options).scores, expected)
    assert_close(tls.attribution_map(model, text, scope).scores, tls.attribution_map(plain, text, scope).scores)
    assert_checks_say(model)
    for asked in (tls.PathIntegratedScope(" are", steps=4), LeaveOneOut("mean"), AttentionRollout()):
        assert_close(tls.attribute(model, text, asked).scores, tls.attribute(plain, text, asked).scores)
    assert not tls.linearity(tls.linearize(model, text), scope, directions=1).saturated
