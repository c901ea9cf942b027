"""Small random models of every kind, each beside a plain copy for the oracle.

A `Specimen` holds the model that tl_scopes is given, and a way to differentiate a copy of it without tl_scopes and
without TransformerLens' hooks.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

from tl_scopes.models import hooked_from_llama

try:
    from transformer_lens import HookedTransformer, HookedTransformerConfig
except ImportError:  # TransformerLens 4
    HookedTransformer = HookedTransformerConfig = None

VOCAB, WIDTH, CONTEXT = 37, 16, 24
GOLDEN = Path(__file__).parent / "data" / "random-llama"
PROMPT = [3, 14, 15, 9, 26, 5, 35, 8]


class Float64(TorchFunctionMode):
    """Hugging Face models take norms and softmaxes in float32 whatever their precision; here they stay in float64.

    Without it, gradients in "float64" are linear in the cotangent to 1e-7 only, and laws could not be tested beyond.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.autograd.grad:  # blocks may be run again within
            with patch(
                "torch.autograd._engine_run_backward", partial(_in_float64, torch.autograd._engine_run_backward)
            ):
                return func(*args, **kwargs)
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            if func is Tensor.to:
                args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def _in_float64(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with Float64():
        return function(*args, **kwargs)


@dataclass(frozen=True)
class Specimen:
    model: Any
    plain: torch.nn.Module
    """The same weights, untouched by tl_scopes."""
    embed: torch.nn.Module
    """Of `plain`: its output is where perturbations enter."""
    unembed: torch.nn.Module
    """Of `plain`: its input is the readout."""

    def forward(self, tokens: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Readouts and logits [pos d], [pos vocab] with `delta` added to the embeddings."""
        seen = []
        handles = [
            self.embed.register_forward_hook(lambda module, args, out: out + delta),
            self.unembed.register_forward_pre_hook(lambda module, args: seen.append(args[0])),
        ]
        out = self.plain(tokens[None])
        for handle in handles:
            handle.remove()
        return seen[0][0], getattr(out, "logits", out)[0]


def oracle(specimen: Specimen, tokens: list[int], position: int, target: int) -> dict[str, Tensor]:
    """Readout, Jacobian and scores straight from the equations: a backward pass per number, over the whole prompt."""
    ids = torch.tensor(tokens)
    delta = torch.zeros(len(tokens), WIDTH, dtype=torch.float64, requires_grad=True)
    readouts, all_logits = specimen.forward(ids, delta)
    y, z = readouts[position], all_logits[position]
    J = torch.stack([torch.autograd.grad(component, delta, retain_graph=True)[0] for component in y])
    G = torch.stack([torch.autograd.grad(logit, delta, retain_graph=True)[0] for logit in z])  # [vocab token d_model]
    p = z.detach().softmax(-1)
    mean = torch.einsum("v,vtd->td", p, G)
    direction = (y / y.norm()).detach()
    return {
        "readout": y.detach(),
        "logits": z.detach(),
        "jacobian": J,
        "semantic": G[target].norm(dim=-1),
        "log_prob": (G[target] - mean).norm(dim=-1),
        "temperature": torch.einsum("k,ktd->td", direction, J).norm(dim=-1),
        "fisher": torch.einsum("v,vtd->t", p, (G - mean) ** 2),
    }


def _randomise(module: torch.nn.Module, seed: int = 0) -> None:
    """Weights far from initialisation: gains and biases differ, logits are not flat."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            scale = 0.3 if parameter.ndim > 1 else 0.2
            parameter.copy_(noise * scale + (1.0 if "norm" in name.lower() or "ln" in name else 0.0))


def _bridge(architecture: str, config_class: str, **options: Any) -> Specimen:
    config = getattr(transformers, config_class)(
        vocab_size=VOCAB, bos_token_id=0, eos_token_id=1, pad_token_id=2, attn_implementation="eager", **options
    )
    torch.manual_seed(0)
    hf = getattr(transformers, architecture)(config).double().eval()
    _randomise(hf)
    plain = copy.deepcopy(hf)
    model = build_bridge_from_module(hf, architecture, hf_config=config, dtype=torch.float64)
    return Specimen(model, plain, plain.get_input_embeddings(), plain.get_output_embeddings())


def _hooked(**options: Any) -> Specimen:
    config = {
        "n_layers": 2, "d_model": WIDTH, "d_head": 8, "n_heads": 2, "d_mlp": 24, "d_vocab": VOCAB, "n_ctx": CONTEXT,
        "act_fn": "gelu", "normalization_type": "LN", "dtype": torch.float64, "seed": 0, "device": "cpu",
    }  # fmt: skip
    model = HookedTransformer(HookedTransformerConfig(**config | options))
    _randomise(model)
    model.eval()
    plain = copy.deepcopy(model)
    return Specimen(model, plain, plain.embed, plain.unembed)


def _native(**options: Any) -> Specimen:
    from transformer_lens.config import TransformerBridgeConfig

    config = {
        "n_layers": 2, "d_model": WIDTH, "d_head": 8, "n_heads": 2, "d_mlp": 24, "d_vocab": VOCAB, "n_ctx": CONTEXT,
        "act_fn": "gelu", "normalization_type": "LN", "dtype": torch.float64, "seed": 0, "device": "cpu",
    }  # fmt: skip
    model = TransformerBridge.boot_native(TransformerBridgeConfig(**config | options)).double().eval()
    _randomise(model.original_model)
    plain = copy.deepcopy(model.original_model)
    return Specimen(model, plain, plain.tok_embed, plain.head)


_LLAMA = {
    "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8,
    "num_key_value_heads": 2, "max_position_embeddings": CONTEXT, "tie_word_embeddings": False,
}  # fmt: skip

SPECIES: dict[str, Callable[[], Specimen]] = {
    "bridge gpt2": lambda: _bridge(
        "GPT2LMHeadModel", "GPT2Config", n_embd=WIDTH, n_layer=2, n_head=2, n_positions=CONTEXT
    ),
    "bridge llama": lambda: _bridge("LlamaForCausalLM", "LlamaConfig", **_LLAMA),
    "bridge qwen2": lambda: _bridge(
        "Qwen2ForCausalLM", "Qwen2Config", **{name: value for name, value in _LLAMA.items() if name != "head_dim"}
    ),
    "bridge gemma2": lambda: _bridge(
        "Gemma2ForCausalLM", "Gemma2Config", **_LLAMA, final_logit_softcapping=3.0, query_pre_attn_scalar=8
    ),
    "bridge pythia": lambda: _bridge(
        "GPTNeoXForCausalLM", "GPTNeoXConfig", hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=CONTEXT, use_parallel_residual=True,
    ),
    "bridge phi": lambda: _bridge(
        "PhiForCausalLM", "PhiConfig", hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=CONTEXT,
    ),
    "bridge mixtral": lambda: _bridge(
        "MixtralForCausalLM", "MixtralConfig", **_LLAMA, num_local_experts=3, num_experts_per_tok=2,
        experts_implementation="eager",
    ),
    "bridge mamba": lambda: _bridge(
        "MambaForCausalLM", "MambaConfig", hidden_size=WIDTH, num_hidden_layers=2, state_size=4
    ),
    "native layer norm": _native,
    "native no norm": lambda: _native(normalization_type=None),
    "native rotary grouped": lambda: _native(
        normalization_type="RMS", positional_embedding_type="rotary", rotary_dim=8, n_heads=4, n_key_value_heads=2
    ),
    "native attention only": lambda: _native(attn_only=True),
    "native soft cap": lambda: _native(output_logits_soft_cap=3.0),
}  # fmt: skip
if HookedTransformer is not None:
    SPECIES |= {
        "hooked layer norm": _hooked,
        "hooked rms rotary grouped": lambda: _hooked(
            normalization_type="RMS", positional_embedding_type="rotary", rotary_dim=8, n_heads=4, n_key_value_heads=2,
            gated_mlp=True, act_fn="silu", final_rms=True,
        ),
        "hooked no norm": lambda: _hooked(normalization_type=None),
        "hooked attention only": lambda: _hooked(attn_only=True, d_mlp=None, act_fn=None),
        "hooked soft cap": lambda: _hooked(output_logits_soft_cap=3.0),
        "hooked parallel": lambda: _hooked(parallel_attn_mlp=True),
    }  # fmt: skip


@cache
def specimen(species: str) -> Specimen:
    """One specimen of each species per process: tests must leave it as they found it, and that is tested too."""
    return SPECIES[species]()


def llama(folder: Any, kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """A Llama without a tokenizer from a local folder, as either kind of model."""
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    if kind == "bridge":
        return build_bridge_from_module(hf, "LlamaForCausalLM", hf_config=hf.config, model_name=str(folder))
    return hooked_from_llama(hf, tokenizer=None)


def linear_toy(target: int = 7) -> Specimen:
    """A model whose logits are zero but for the target's, which is linear in the embeddings: a sum over the tokens.

    Attention alone, even over all tokens, without norms, positions and biases.
    """
    specimen = _native(normalization_type=None, attn_only=True)
    with torch.no_grad():
        for name, parameter in specimen.model.original_model.named_parameters():
            if any(part in name for part in (".q.", ".k.", "pos.", "bias")):
                parameter.zero_()
            elif "head" in name:
                parameter[[row for row in range(VOCAB) if row != target]] = 0
                parameter *= -4  # for the prompts of the tests the target is then likely
    specimen.plain.load_state_dict(specimen.model.original_model.state_dict())
    return specimen


def batches_of(monkeypatch: Any, count: int) -> None:
    """From here on every batch, of cotangents, forward passes or layers, has so many entries."""
    for module in ("models", "models.attention", "models.embedding"):
        monkeypatch.setattr(f"tl_scopes.{module}.at_once", lambda *_, **__: count)
