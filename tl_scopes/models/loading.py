"""Load a model by name, from a folder, or from a GGUF file."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from tl_scopes.models.supported import Model, is_gguf
from tl_scopes.models.wording import first_sentence

DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}
"""The precisions that a model can be loaded in, by their names."""


def load(
    name: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str = torch.float32,
    called: str | None = None,
) -> Model:
    """A `TransformerBridge` by model name, from a folder in the Hugging Face layout, or from a GGUF file.

    A folder and a file need no network. The weights of a GGUF file are dequantised: no gradient passes its blocks.

    Args:
        name: any name that `TransformerBridge.boot_transformers` takes; a folder; a GGUF file, or a folder with one.
        device: where to put it; None lets TransformerLens choose.
        dtype: its precision: "float32", "float64", "bfloat16" or "float16", or torch's own.
        called: what answers call it; None is `model_name`'s way.

    Raises:
        ValueError: a name, folder or file that cannot be loaded, such as a GGUF file without a tokenizer; or a device
            or a precision that cannot be used.
        TypeError: for a name that is neither text nor a path, and a precision that is neither a name nor torch's.
        ImportError: for a GGUF file where the package gguf is not installed.
    """
    dtype = _read_dtype(dtype)
    if device is not None:
        _require_usable(device)
    if not isinstance(name, str | Path):
        raise TypeError(f"a model is loaded by its name, a folder or a GGUF file, as text or a path, got {name!r}.")
    path = Path(name).expanduser()
    gguf = _gguf_file(path)
    model = _load_folder(name, path, device, dtype) if gguf is None else _load_gguf(gguf, device, dtype)
    if called is None and gguf is not None:
        called = str(gguf)  # TransformerLens knows its folder alone
    if called is not None:
        model.cfg.model_name = called
    return model.eval()


def _read_dtype(dtype: object) -> torch.dtype:
    """A precision, by its name or as torch's own.

    Raises:
        ValueError: for another one, with those that there are.
        TypeError: for something that is neither.
    """
    names = ", ".join(map(repr, DTYPES))
    rule = f"a model's dtype is {names} or torch's of that name"
    if not isinstance(dtype, str | torch.dtype):
        raise TypeError(f"{rule}, got {dtype!r}.")
    for name, known in DTYPES.items():
        if dtype in (name, known):
            return known
    raise ValueError(f"{rule}, got {dtype!r}.")


def _require_usable(device: str | torch.device) -> None:
    """Refuse a device that this machine does not have.

    Raises:
        ValueError: with torch's reason.
    """
    try:
        torch.ones(1, device=device).item()  # .item(): "meta" takes tensors, but has no values
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"the device {str(device)!r} cannot be used here: {reason}. Use device='cpu'.") from error


def _load_folder(name: str | Path, path: Path, device: str | torch.device | None, dtype: torch.dtype) -> Model:
    """The model in a folder, or where there is no such folder, of this name.

    Raises: as `load` does.
    """
    local = path.exists()
    if local and not (path / "config.json").is_file():
        raise ValueError(
            f"{str(name)!r} is not a folder with a config.json, nor a GGUF file: give a folder that save_pretrained "
            "wrote."
        )
    if not local and str(name).startswith(("/", ".", "~")):
        raise ValueError(f"there is no folder {str(name)!r}: give one that save_pretrained wrote, or a model's name.")
    from transformer_lens.model_bridge import TransformerBridge

    try:
        with _no_bars(local):
            return TransformerBridge.boot_transformers(str(path if local else name), device=device, dtype=dtype)
    except Exception as error:  # whatever the loaders raise: safetensors and pickle have exceptions of their own
        raise ValueError(
            f"cannot load the model {str(name)!r}: {first_sentence(error)}. Check the spelling and the network, "
            "or give a folder that save_pretrained wrote."
        ) from error


@contextmanager
def _no_bars(local: bool = True) -> Iterator[None]:
    """Inside, transformers draws no bars where nothing is downloaded; the user's setting is put back."""
    from transformers.utils import logging

    # `disable_progress_bar` would also change the setting of the hub, and `enable_progress_bar` forget parts of it.
    shown = logging._tqdm_active
    logging._tqdm_active = shown and not local
    try:
        yield
    finally:
        logging._tqdm_active = shown


def _gguf_file(path: Path) -> Path | None:
    """The GGUF file that is meant, if one is: this one, or the only one in a folder without a config.json.

    Raises:
        ValueError: for a folder with several.
    """
    if is_gguf(path):
        return path
    if (path / "config.json").is_file():
        return None
    found = sorted(path.glob("*.gguf")) if path.is_dir() else []
    if len(found) > 1:
        raise ValueError(
            f"{str(path)!r} has {len(found)} GGUF files: give the path of one, {str(found[0])!r} say. A model that is "
            "split into several files has to be merged first (llama-gguf-split --merge)."
        )
    return found[0] if found else None


def _load_gguf(path: Path, device: str | torch.device | None, dtype: torch.dtype) -> Model:
    """The model in a GGUF file, dequantised, with the tokenizer beside the file or else the one in it.

    Raises: as `load` does.
    """
    if find_spec("gguf") is None:
        raise ImportError(f"reading {str(path)!r} takes the package gguf, which is not installed: pip install gguf.")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{str(path)!r} is not a GGUF file, in spite of its name: it does not begin with 'GGUF'.")
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder, inside = str(path.parent), {"gguf_file": path.name}
    beside = (path.parent / "tokenizer_config.json").is_file()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **({} if beside else inside))
    except Exception as error:  # tokenizers raises a bare Exception
        raise ValueError(
            f"no tokenizer can be read from {str(path)!r}: {first_sentence(error)}. Put the model's own beside the "
            f"file: tokenizer.save_pretrained({folder!r})."
        ) from error
    try:
        dequantised = GgufConfig(dequantize=True)  # no gradient passes weights that stay in their blocks
        hf_model = AutoModelForCausalLM.from_pretrained(
            folder, **inside, quantization_config=dequantised, dtype=dtype, attn_implementation="eager"
        )
        return TransformerBridge.boot_transformers(
            folder, device=device, dtype=dtype, hf_model=hf_model, tokenizer=tokenizer
        )
    except Exception as error:  # as for folders
        raise ValueError(
            f"cannot load the GGUF file {str(path)!r}: {first_sentence(error)}. Convert it to a folder in the Hugging "
            "Face layout, or check that it is whole."
        ) from error


def load_hooked_llama(
    folder: Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str = torch.float32,
    called: str | None = None,
) -> Model:
    """The Llama in a local folder as an unprocessed `HookedTransformer` (TransformerLens 3.9).

    Raises:
        ImportError: on TransformerLens 4, which has no HookedTransformer.
        ValueError, TypeError: for a precision that is not one, as `load` does; for a model that `hooked_from_llama`
            refuses.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = _read_dtype(dtype)
    with _no_bars():
        hf_model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device or "cpu")
    return hooked_from_llama(hf_model, AutoTokenizer.from_pretrained(folder), name=called or str(folder))


def hooked_from_llama(hf_model: Any, tokenizer: Any, name: str = "llama") -> Model:
    """A `HookedTransformer` with the weights of a Hugging Face Llama, unprocessed (TransformerLens 3.9).

    `HookedTransformer.from_pretrained` takes only names from its own list, and asks the hub about them.

    Raises:
        ImportError: on TransformerLens 4, which has no HookedTransformer.
        ValueError: for another architecture, biases in attention or MLP, and positions that are scaled: the weights of
            a `HookedTransformer` are made without them.
    """
    config = hf_model.config
    _require_plain_llama(config)
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
        from transformer_lens.pretrained.weight_conversions import convert_llama_weights
    except ImportError as error:
        raise ImportError(
            "this TransformerLens has no HookedTransformer: take the TransformerBridge, or install "
            "'transformer-lens<4'."
        ) from error

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
        rotary_base=config.rope_parameters["rope_theta"],
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


def _require_plain_llama(config: Any) -> None:
    """Refuse what TransformerLens' conversion of Llama's weights passes over in silence.

    Raises:
        ValueError: with what it is, and what to load instead.
    """
    if config.model_type != "llama":
        found = f"this is a {config.model_type}"
    elif config.attention_bias or config.mlp_bias:
        found = f"this one has attention_bias={config.attention_bias} and mlp_bias={config.mlp_bias}"
    elif (scaling := config.rope_parameters["rope_type"]) != "default":
        found = f"the positions of this one are scaled (rope_type={scaling!r})"
    else:
        return
    raise ValueError(
        "a HookedTransformer is made of a Llama without biases whose rotary positions are not scaled, and would have "
        f"other logits here: {found}. Take the TransformerBridge, models.load(folder), which has them."
    )
