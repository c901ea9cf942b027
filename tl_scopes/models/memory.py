"""Whether the graph of a forward pass will fit, asked after its first block."""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from tl_scopes.models.supported import Model

_CGROUP = Path("/sys/fs/cgroup")


def available_bytes(device: torch.device) -> int | None:
    """Memory that can still be had on a device; None where nobody says."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    if device.type != "cpu":
        return None
    free = int(psutil.virtual_memory().available)
    try:  # a container may have less than its machine
        limit, used = (int((_CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        used -= sum(int(n) for n in re.findall(r"^inactive_file (\d+)$", (_CGROUP / "memory.stat").read_text(), re.M))
    except (OSError, ValueError):  # none, or "max"
        return free
    return min(free, limit - used)


@contextmanager
def enough_memory(model: Model, tokens: Tensor, checkpoint: bool) -> Iterator[None]:
    """Within, a forward pass whose graph will not fit ends after the first block.

    What the first block keeps is counted, not guessed, so that this holds for every architecture, precision and
    attention kernel; a checkpointed block, which keeps nothing yet, is taken at what any Transformer's needs.

    Raises:
        MemoryError: with an estimate and the remedies.
    """
    parameter = next(model.parameters())
    available, blocks = available_bytes(parameter.device), len(model.blocks)
    least = _least_bytes(model, tokens.numel(), tokens.shape[1], parameter.element_size())
    # Counting costs a call per tensor that is kept: only where it could be close.
    if available is None or blocks < 2 or 8 * least * blocks < available:
        yield
        return
    known = {t.untyped_storage().data_ptr() for t in chain(model.parameters(), model.buffers())}
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    def decide(*_: Any) -> None:
        # Beside the graph of all blocks, the backward pass holds the gradients within one.
        need = sum(kept.values()) * (blocks - 1) + (2 * least if checkpoint else sum(kept.values()))
        if need > available:
            remedies = ["a shorter prompt", "bfloat16", "a device with more memory"]
            remedies = remedies if checkpoint else ["checkpoint=True", *remedies]
            remedies = remedies if len(tokens) == 1 else ["a smaller batch", *remedies]
            raise MemoryError(
                f"the graph of {len(tokens)} x {tokens.shape[1]} tokens through {blocks} blocks would need about "
                f"{need / 2**30:.2g} GiB, and {available / 2**30:.2g} GiB are left on {parameter.device}: "
                f"try {', '.join(remedies)}."
            )

    with ExitStack() as stack:
        handle = model.blocks[1].register_forward_pre_hook(decide)
        stack.callback(handle.remove)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor))
        yield


def _least_bytes(model: Model, tokens: int, length: int, size: int) -> int:
    """What one block keeps at least: attention weights, and some copies of the residual stream and of the MLP."""
    cfg = model.cfg
    return tokens * size * (cfg.n_heads * length + 4 * cfg.d_model + (getattr(cfg, "d_mlp", None) or 0))
