"""Memory: how much there is, whether a graph will fit, and how many entries of a batch go through the model at once."""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from enum import Enum
from itertools import chain
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from tl_scopes.models.supported import Model

_CGROUP = Path("/sys/fs/cgroup")


def available_bytes(device: torch.device) -> int | None:
    """How many bytes are still free on a device; None where neither torch nor the system tells."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    if device.type != "cpu":
        return None
    free = int(psutil.virtual_memory().available)
    try:  # a container may be allowed less than its machine has
        limit, used = (int((_CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        used -= sum(int(n) for n in re.findall(r"^inactive_file (\d+)$", (_CGROUP / "memory.stat").read_text(), re.M))
    except (OSError, ValueError):  # there is no limit, or it is "max"
        return free
    return min(free, limit - used)


@contextmanager
def enough_memory(model: Model, tokens: Tensor, checkpoint: bool) -> Iterator[None]:
    """Inside, a forward pass whose graph will not fit ends after the first block.

    What the first block keeps is counted, so that the estimate holds for every architecture, precision and attention
    kernel. A checkpointed block keeps nothing yet and is estimated by what a block of any Transformer keeps at least.

    Raises:
        MemoryError: with the estimate and the remedies.
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


class Work(Enum):
    """What an entry of a batch is there for. It decides what the entry keeps alive, and how much a batch may take."""

    PULLBACK = (16 * 2**20, 512 * 2**20)
    """A cotangent on its way back keeps the gradients inside one block; on a CPU small batches stay near its caches."""
    CURVATURE = (128 * 2**20, 512 * 2**20)
    """A Hessian-vector product keeps what it found for the activations of all layers until its end."""
    GRAPH = (512 * 2**20, 512 * 2**20)
    """A forward pass with its graph keeps the activations of all layers."""
    PREDICTION = (256 * 2**20, 256 * 2**20)
    """A forward pass without a graph keeps the activations of one block, and the logits of one position."""
    EMBEDDING = (64 * 2**20, 64 * 2**20)
    """A forward pass that ends at the embedding keeps the embeddings."""
    PATTERN = (2**30, 2**30)
    """A layer whose attention is cached keeps the patterns of all heads."""


def at_once(model: Model, tokens: int, work: Work, *, batch: int = 1, size: int | None = None) -> int:
    """How many entries of this work fit into the working memory that a batch of it may take; at least 1.

    Args:
        model: a checked model.
        tokens: how many tokens an entry has.
        work: what the entries are there for.
        batch: how many prompts one entry consists of.
        size: bytes of one number; None is that of the model's own.
    """
    cfg, parameter = model.cfg, next(model.parameters())
    d_mlp, patterns = getattr(cfg, "d_mlp", None) or 0, cfg.n_heads * tokens
    widths = {
        Work.PULLBACK: max(4 * d_mlp, 8 * cfg.d_model, 3 * patterns),
        Work.CURVATURE: cfg.n_layers * (4 * d_mlp + 8 * cfg.d_model + 3 * patterns),
        Work.GRAPH: cfg.n_layers * (4 * d_mlp + 8 * cfg.d_model + 3 * patterns),
        Work.PREDICTION: max(4 * d_mlp, 8 * cfg.d_model, 3 * patterns),
        Work.EMBEDDING: cfg.d_model,
        Work.PATTERN: patterns,
    }
    needed = batch * tokens * widths[work] * (size or parameter.element_size())
    if work is Work.PREDICTION:
        needed += batch * 8 * 8 * cfg.d_vocab  # log-probabilities are taken in float64, and some copies of them
    return max(1, work.value[parameter.device.type != "cpu"] // needed)


def _least_bytes(model: Model, tokens: int, length: int, size: int) -> int:
    """What one block keeps at least: attention weights, and some copies of the residual stream and of the MLP."""
    cfg = model.cfg
    return tokens * size * (cfg.n_heads * length + 4 * cfg.d_model + (getattr(cfg, "d_mlp", None) or 0))
