"""RASP programs compiled into transformers by Tracr, in which the program is the truth about what every head does.

It is a file of its own since the test and the compiler (`python -m tests.tracr_programs`, which needs tracr-pypi, jax
and torch) both know the programs. `tests/data/tracr.safetensors` holds what Tracr 1.0.0 compiled:
its weights as they are, one matrix for each module of its Haiku model, with causal masks, without norms.

Source: Lindner et al. 2023, Tracr (arXiv:2301.05062), Apache-2.0; loaded as TransformerLens' demo of Tracr does.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FILE = Path(__file__).parent / "data" / "tracr.safetensors"
BOS, LONGEST = "BOS", 8
PROGRAMS = {
    "fraction": "the fraction of x among the tokens so far",
    "previous": "the token before",
    "count": "how often the token stood there so far",
}
VOCAB = ("w", "x", "y", "z")


def _compiled() -> dict[str, Any]:
    from tracr.compiler import compiling, lib
    from tracr.rasp import rasp

    same = rasp.Select(rasp.tokens, rasp.tokens, rasp.Comparison.EQ)
    sources = {
        "fraction": lib.make_frac_prevs(rasp.tokens == "x"),
        "previous": lib.shift_by(1, rasp.tokens),
        "count": rasp.SelectorWidth(same),
    }
    return {
        name: compiling.compile_rasp_to_model(
            source.named(name), vocab=set(VOCAB), max_seq_len=LONGEST, compiler_bos=BOS, causal=True
        )
        for name, source in sources.items()
    }


def main() -> None:
    """Compile the programs and write them down."""
    import numpy as np
    from safetensors.numpy import save_file

    tensors, about = {}, {}
    for name, model in _compiled().items():
        config = model.model_config
        for module, parameters in model.params.items():
            for kind, value in parameters.items():
                tensors[f"{name}/{module}/{kind}"] = np.array(value, dtype=np.float32)
        about[name] = json.dumps(
            {
                "heads": config.num_heads, "layers": config.num_layers, "d_head": config.key_size,
                "d_mlp": config.mlp_hidden_size, "tokens": model.input_encoder.encoding_map,
                "stream": model.residual_labels,
            }
        )  # fmt: skip
        print(name, about[name], model.apply([BOS, "w", "x", "x", "y"]).decoded)
    save_file(tensors, FILE, metadata=about | {"compiler": "tracr-pypi 1.0.0"})


class Program:
    """A compiled program in TransformerLens."""

    def __init__(self, name: str) -> None:
        from safetensors import safe_open

        with safe_open(FILE, "pt") as saved:
            about = json.loads(saved.metadata()[name])
            weights = {key: saved.get_tensor(key) for key in saved.keys() if key.startswith(f"{name}/")}  # noqa: SIM118
        self.name, self.ids, self.stream = name, about["tokens"], about["stream"]
        self.width, self.layers = len(self.stream), about["layers"]
        self.model = _loaded({key.removeprefix(f"{name}/"): value for key, value in weights.items()}, about, self.width)

    def prompt(self, text: str) -> list[int]:
        return [self.ids[BOS], *(self.ids[letter] for letter in text)]

    def output(self, value: str | None = None) -> Tensor:
        """The direction of the stream where the program's answer stands: that number, or that this is the token."""
        named = rf"{self.name}_\d+" + ("" if value is None else f":{value}")
        (place,) = (i for i, label in enumerate(self.stream) if re.fullmatch(named, label))
        return torch.eye(self.width, dtype=torch.float64)[place]

    @property
    def end(self) -> str:
        return f"blocks.{self.layers - 1}.hook_resid_post"


_MODULES = {
    "attn.q": "attn/query", "attn.k": "attn/key", "attn.v": "attn/value", "attn.o": "attn/linear",
    "mlp.fc_in": "mlp/linear_1", "mlp.fc_out": "mlp/linear_2",
}  # fmt: skip


def _loaded(weights: dict[str, Tensor], about: dict[str, Any], width: int) -> Any:
    heads, d_head, vocab = about["heads"], about["d_head"], len(about["tokens"])
    config = {
        "n_layers": about["layers"], "d_model": width, "d_head": d_head, "n_heads": heads, "d_mlp": about["d_mlp"],
        "d_vocab": vocab, "d_vocab_out": width, "n_ctx": len(weights["pos_embed/embeddings"]), "act_fn": "relu",
        "normalization_type": None, "dtype": torch.float64, "device": "cpu", "seed": 0,
    }  # fmt: skip
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
    except ImportError:
        from transformer_lens.config import TransformerBridgeConfig
        from transformer_lens.model_bridge import TransformerBridge

        model: Any = TransformerBridge.boot_native(TransformerBridgeConfig(**config))
        own = {name.replace("_original_component.", ""): p for name, p in model.original_model.named_parameters()}
        targets = {"tok_embed.weight": "token_embed/embeddings", "pos.weight": "pos_embed/embeddings"}
        for i in range(about["layers"]):
            for ours, theirs in _MODULES.items():
                targets[f"layers.{i}.{ours}.weight"] = f"transformer/layer_{i}/{theirs}/w"
                targets[f"layers.{i}.{ours}.bias"] = f"transformer/layer_{i}/{theirs}/b"
        with torch.no_grad():
            for name, parameter in own.items():
                if name == "head.weight":
                    parameter.copy_(torch.eye(width))
                    continue
                value = weights[targets[name]]
                parameter.copy_(value.T if targets[name].endswith("/w") else value)
        return model.eval()
    model = HookedTransformer(HookedTransformerConfig(**config))
    state = {"embed.W_E": weights["token_embed/embeddings"], "pos_embed.W_pos": weights["pos_embed/embeddings"]}
    state |= {"unembed.W_U": torch.eye(width), "unembed.b_U": torch.zeros(width)}
    for i in range(about["layers"]):
        layer = f"transformer/layer_{i}"
        for ours, theirs in (("Q", "query"), ("K", "key"), ("V", "value")):
            state[f"blocks.{i}.attn.W_{ours}"] = (
                weights[f"{layer}/attn/{theirs}/w"].reshape(width, heads, d_head).transpose(0, 1)
            )
            state[f"blocks.{i}.attn.b_{ours}"] = weights[f"{layer}/attn/{theirs}/b"].reshape(heads, d_head)
        state[f"blocks.{i}.attn.W_O"] = weights[f"{layer}/attn/linear/w"].reshape(heads, d_head, width)
        state[f"blocks.{i}.attn.b_O"] = weights[f"{layer}/attn/linear/b"]
        for ours, theirs in (("in", "linear_1"), ("out", "linear_2")):
            state[f"blocks.{i}.mlp.W_{ours}"] = weights[f"{layer}/mlp/{theirs}/w"]
            state[f"blocks.{i}.mlp.b_{ours}"] = weights[f"{layer}/mlp/{theirs}/b"]
    model.load_state_dict({name: value.double() for name, value in state.items()}, strict=False)
    return model.eval()


if __name__ == "__main__":
    main()
