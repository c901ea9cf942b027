"""The model that is timed: a random Llama, in Hugging Face and as a TransformerBridge with the same weights."""

import copy
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import tl_scopes as tls
from tl_scopes.tiny import FOLDER
from tl_scopes.tiny.tasks import examples

VOCAB = 32_000
CLOCK = time.process_time
"""The seconds that this process computes on the CPU, whatever else runs."""


def in_turns(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """The seconds of each way in each round, after a round to warm up.

    The order is another one in every round, so that a slow moment of the machine hits all of them.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name in random.sample(list(ways), len(ways)):
            start = CLOCK()
            ways[name]()
            if number:
                times[name].append(CLOCK() - start)
    return times


def hugging_face(folder: str | Path) -> Any:
    """The Hugging Face model in a folder, frozen, in float32 and with eager attention, as TransformerLens runs it.

    `original_model` of a bridge will not do: the bridge's own modules are inside it.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class Setting:
    """One model and one prompt."""

    hf: LlamaForCausalLM
    model: Any
    """A `TransformerBridge` with a copy of the weights."""
    tokens: Tensor
    """[1 token]"""
    target: int
    """The most likely next token."""

    @property
    def prompt(self) -> list[int]:
        return self.tokens[0].tolist()

    def embeddings(self) -> Tensor:
        """The embeddings [1 token d_model] as a new leaf."""
        return self.hf.get_input_embeddings()(self.tokens).detach().requires_grad_()

    def last_logits(self, embeddings: Tensor) -> Tensor:
        """The logits [batch vocab] at the last position, as one would write it for captum."""
        return self.hf(inputs_embeds=embeddings, use_cache=False).logits[:, -1]

    @torch.no_grad()
    def forward(self) -> Tensor:
        """The bare forward pass, with which everything is compared."""
        return self.hf(self.tokens, use_cache=False).logits

    def forward_seconds(self, repeats: int = 3) -> float:
        """The median of the time of a few forward passes."""
        times = []
        for _ in range(repeats):
            start = CLOCK()
            self.forward()
            times.append(CLOCK() - start)
        return statistics.median(times)


@lru_cache(maxsize=1)  # one model at a time in memory
def setting(tokens: int = 128, width: int = 512, layers: int = 8) -> Setting:
    """A random Llama with heads of 64 dimensions, an MLP of 2.7 widths, float32 and eager attention.

    The norms get gains, and the unembedding is large enough for a prediction of a few nats.
    """
    generator = torch.Generator().manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=43 * width // 16,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        head_dim=64,
        max_position_embeddings=4096,
        attn_implementation="eager",
    )
    hf = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            spread = 3.5 / width**0.5 if "lm_head" in name else 0.02
            parameter.copy_(1 + 0.2 * noise if "norm" in name else spread * noise)
    bridge = build_bridge_from_module(copy.deepcopy(hf), "LlamaForCausalLM", hf_config=config, model_name="random")
    ids = torch.randint(3, VOCAB, (1, tokens), generator=generator)
    with torch.no_grad():
        return Setting(hf, bridge.eval(), ids, int(hf(ids, use_cache=False).logits[0, -1].argmax()))


@lru_cache(maxsize=1)
def bundled() -> Setting:
    """The bundled model with 128 tokens of its language."""
    model = tls.load_tiny()
    text = " ".join(example.prompt for example in examples("inference_who", 8))
    hf = LlamaForCausalLM.from_pretrained(FOLDER, attn_implementation="eager").eval()
    ids = model.to_tokens(text)[:, :128]
    with torch.no_grad():
        return Setting(hf, model, ids, int(hf(ids, use_cache=False).logits[0, -1].argmax()))
