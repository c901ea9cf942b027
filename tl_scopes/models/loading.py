"""Load a model by name or from a folder."""

from pathlib import Path
from typing import Any

import torch

from tl_scopes.models.supported import Model


def load(name: str | Path, *, device: str | torch.device | None = None, dtype: torch.dtype = torch.float32) -> Model:
    """A `TransformerBridge` by model name or from a folder in the Hugging Face layout; a folder needs no network.

    Args:
        name: any name that `TransformerBridge.boot_transformers` takes, or a folder.
        device: where to put it; None lets TransformerLens choose.
        dtype: its precision.

    Raises:
        ValueError: a name or folder that cannot be loaded, or a device that cannot be used.
    """
    if device is not None:
        try:
            torch.ones(1, device=device).item()  # .item(): "meta" takes tensors, but has no values
        except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
            reason = str(error).splitlines()[0].rstrip(".")
            raise ValueError(f"the device {str(device)!r} cannot be used here: {reason}. Use device='cpu'.") from error
    folder = Path(name).expanduser()
    if folder.exists() and not (folder / "config.json").is_file():
        raise ValueError(f"{str(name)!r} is not a folder with a config.json: give a folder that save_pretrained wrote.")
    if not folder.exists() and str(name).startswith(("/", ".", "~")):
        raise ValueError(f"there is no folder {str(name)!r}: give one that save_pretrained wrote, or a model's name.")
    from transformer_lens.model_bridge import TransformerBridge

    source = str(folder) if folder.exists() else str(name)
    try:
        model = TransformerBridge.boot_transformers(source, device=device, dtype=dtype)
    except Exception as error:  # whatever the loaders raise: safetensors and pickle have exceptions of their own
        raise ValueError(
            f"cannot load the model {str(name)!r}: {_first_sentence(error)} Check the spelling and the network, "
            "or give a folder that save_pretrained wrote."
        ) from error
    return model.eval()


def _first_sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text.split(". ")[0].rstrip(".") + "."


def load_hooked_llama(
    folder: Path, *, device: str | torch.device | None = None, dtype: torch.dtype = torch.float32
) -> Model:
    """The Llama in a local folder as an unprocessed `HookedTransformer` (TransformerLens 3.9).

    Raises:
        ImportError: on TransformerLens 4, which has no HookedTransformer.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hf_model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device or "cpu")
    return hooked_from_llama(hf_model, AutoTokenizer.from_pretrained(folder), name=folder.name)


def hooked_from_llama(hf_model: Any, tokenizer: Any, name: str = "llama") -> Model:
    """A `HookedTransformer` with the weights of a Hugging Face Llama, unprocessed (TransformerLens 3.9).

    `HookedTransformer.from_pretrained` takes only names from its own list, and asks the hub about them.

    Raises:
        ImportError: on TransformerLens 4, which has no HookedTransformer.
    """
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
        from transformer_lens.pretrained.weight_conversions import convert_llama_weights
    except ImportError as error:
        raise ImportError(
            "this TransformerLens has no HookedTransformer: take the TransformerBridge, or install "
            "'transformer-lens<4'."
        ) from error

    config = hf_model.config
    cfg = HookedTransformerConfig(
        model_name=name,
        original_architecture="LlamaForCausalLM",
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        d_head=config.head_dim,
        n_heads=config.num_attention_heads,
        n_key_value_heads=config.num_key_value_heads,
        d_mlp=config.intermediate_size,
        d_vocab=config.vocab_size,
        n_ctx=config.max_position_embeddings,
        eps=config.rms_norm_eps,
        act_fn=config.hidden_act,
        gated_mlp=True,
        normalization_type="RMS",
        final_rms=True,
        positional_embedding_type="rotary",
        rotary_adjacent_pairs=False,
        rotary_dim=config.head_dim,
        rotary_base=int(config.rope_parameters["rope_theta"]),
        device=str(hf_model.device),
        dtype=hf_model.dtype,
    )
    model = HookedTransformer(cfg, tokenizer)
    model.load_and_process_state_dict(
        convert_llama_weights(hf_model, model.cfg),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return model.eval()
