"""The bundled model: a small Llama trained on `tl_scopes.tiny.tasks`, whose causes are known by construction."""

from pathlib import Path
from typing import Literal

import torch

from tl_scopes import models
from tl_scopes.models import Model

FOLDER = Path(__file__).parent
"""The folder with config.json, model.safetensors and the tokenizer, in the Hugging Face layout."""


def load_tiny(
    kind: Literal["bridge", "hooked"] = "bridge",
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str = torch.float32,
) -> Model:
    """Load the bundled model from the installed package, without the network.

    Args:
        kind: "bridge" for a `TransformerBridge`; "hooked" for a `HookedTransformer`, which TransformerLens 4 lacks.
        device: where to put it; None lets TransformerLens choose.
        dtype: its precision, as for `models.load`.

    Raises:
        ValueError: for another kind, and for a device or a precision that cannot be used.
        TypeError: for a precision that is neither a name nor torch's.
        ImportError: for "hooked" on TransformerLens 4.

    Example:
        >>> tls.load_tiny().cfg.n_layers
        6
    """
    if kind not in ("bridge", "hooked"):
        raise ValueError(f'kind is "bridge" or "hooked", got {kind!r}.')
    load = models.load if kind == "bridge" else models.load_hooked_llama
    return load(FOLDER, device=device, dtype=dtype, called="tiny")
