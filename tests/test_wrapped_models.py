"""Models as people have them: with adapters, quantised, in half precision, spliced. Right, or refused with the remedy.

peft and optimum-quanto are in the test extra. torchao and bitsandbytes are not: they take seconds to import in every
process and bring GPU libraries; their tests run where they are installed.
"""

import copy
from collections.abc import Callable
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
    assert len(found) == 6
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
