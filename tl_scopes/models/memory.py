"""Memory: how much there is, whether a graph will fit, and how many entries of a batch go through the model at once."""

import ctypes
import gc
import math
import platform
import traceback
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tl_scopes.models.causality import silenced
from tl_scopes.models.supported import Model, device_of

_CGROUP, _OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")

# -- how much there is ------------------------------------------------------------------------------------------------


def available_bytes(device: torch.device) -> int | None:
    """How many bytes are still free on a device; None where neither torch nor the system tells.

    On the CPU that is the least of what the machine has free and of what the limits of the process (`ulimit -v`) and
    of its container leave.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
        fraction = getattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)  # torch 2.6 has none
        allowed = int(total * fraction(device))
        return max(0, min(int(free) + reserved, allowed) - allocated)
    if device.type != "cpu":
        return None
    return max(0, min([int(psutil.virtual_memory().available), *_left_to_process(), *_left_to_container()]))


def _left_to_process() -> Iterator[int]:
    """What the limits on the addresses and on the data of this process leave; nothing where it has none."""
    if hasattr(psutil, "RLIMIT_AS"):  # psutil reads limits on Linux alone; elsewhere the system does not enforce these
        process = psutil.Process()
        used = process.memory_info()
        for kind, taken in ((psutil.RLIMIT_AS, used.vms), (psutil.RLIMIT_DATA, used.data)):
            limit, _ = process.rlimit(kind)
            if limit != psutil.RLIM_INFINITY:
                yield limit - taken


def _left_to_container() -> Iterator[int]:
    """What the limits of the control groups that this process is in, and of those around them, leave."""
    groups = []
    with suppress(OSError):
        for line in _OWN_CGROUPS.read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if not kinds:
                groups.append((_CGROUP, path, ("memory.max", "memory.current", "inactive_file")))
            elif "memory" in kinds.split(","):
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
                groups.append((_CGROUP / "memory", path, names))
    for root, path, (limit, usage, cache) in groups:
        own = root / path.lstrip("/")  # a container may see its own group as the root, where this is not found
        for group in (own, *own.parents[: len(own.parts) - len(root.parts)]):
            with suppress(OSError, ValueError):  # there is no limit, or it is "max"
                left = int((group / limit).read_text()) - int((group / usage).read_text())
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                yield left + int(stat.get(cache, 0))  # files that were read are dropped when memory is wanted


# -- whether a graph will fit -----------------------------------------------------------------------------------------


class NotEnoughMemoryError(MemoryError):
    """The memory does not suffice; the message says what would fit."""


Run = Callable[[Tensor, bool], None]
"""Makes a forward and a backward pass over some tokens [batch token], with a checkpoint or without."""


def require_memory(model: Model, tokens: Tensor, checkpoint: bool, run: Run) -> None:
    """Refuse a pass that will not fit, before it takes any memory.

    The need is measured in passes over parts of the first prompt and extrapolated, so that it holds for every
    architecture, precision and attention kernel. The user's hooks do not act in them.

    Cost: some look-ups. Where it could be close, passes over an eighth of one prompt in all; and the allocator is told
        to hand back what is freed, in the whole process and for good.

    Raises:
        MemoryError: with the estimate and what would fit.
    """
    size, device = next(model.parameters()).element_size(), device_of(model)
    available = available_bytes(device)
    batch, length = tokens.shape
    least = _least_bytes(model, tokens.numel(), length, size)
    if available is None or 8 * least * len(model.blocks) < available:
        return
    _hand_back_what_is_freed()

    def find(checkpoint: bool) -> Callable[[int, int], float] | None:
        with suppress(Exception), silenced(model):  # what goes wrong here goes wrong below, and is told better there
            return _need(tokens, lambda some: run(some, checkpoint))
        return None

    need = find(checkpoint)
    if need is None or need(batch, length) <= available:
        return
    fits = []
    if batch > 1 and (entries := _most(batch, available, lambda count: need(count, length))):
        fits.append(f"a batch of {entries}")
    if not checkpoint and (other := find(True)):
        if other(batch, length) <= available:
            fits.append(f"checkpoint=True ({_gib(other(batch, length))})")
        elif longest := _most(length, available, lambda count: other(batch, count)):
            fits.append(f"checkpoint=True with at most {longest} tokens")
    if longest := _most(length, available, lambda count: need(batch, count)):
        fits.append(f"a prompt of at most {longest} tokens")
    if size > 2 and (half := 2 * need(batch, length) / size) <= available:
        fits.append(f"the model in bfloat16 ({_gib(half)})")
    raise NotEnoughMemoryError(
        f"the graph of {batch} x {length} tokens through {len(model.blocks)} blocks would need about "
        f"{_gib(need(batch, length))}, and {_gib(available)} are left on {device}. What would fit: "
        f"{', '.join([*fits, 'a device with more memory'])}."
    )


@contextmanager
def told(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], checkpoint: bool) -> Iterator[None]:
    """Inside, an allocator's error becomes one that says what to do.

    Args:
        device, dtype: the model's.
        shape: how many prompts there are, and how many tokens each has.
        checkpoint: whether blocks are run again in the backward pass.

    Raises:
        MemoryError: when memory runs out inside.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, NotEnoughMemoryError) or not _is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they would keep what has been computed so far
        remedies = [
            *(["a smaller batch"] if shape[0] > 1 else []),
            *([] if checkpoint else ["checkpoint=True"]),
            "a shorter prompt",
            *(["the model in bfloat16"] if dtype.itemsize > 2 else []),
            "a device with more memory",
        ]
        raise NotEnoughMemoryError(
            f"memory ran out on {device} at {shape[0]} x {shape[1]} tokens: try {', '.join(remedies)}."
        ) from error


def _is_out_of_memory(error: Exception) -> bool:
    """Whether an allocator raised this; those of CPUs and of libraries have no class of their own."""
    texts = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED", "bad_alloc")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(text in str(error) for text in texts)


def _hand_back_what_is_freed() -> None:
    """Have glibc give memory back to the system when a tensor of a MiB or more is freed, from now on.

    By its own rules it comes to keep blocks of up to 32 MiB in a heap, where holes of one size do not take the next
    tensor of that size: a pass was seen to take twice to four times what its tensors need, so that an estimate from
    its tensors would let passes begin that do not fit.

    This is for the whole process, and cannot be undone: glibc tells nobody what held before, and once it was told a
    threshold it no longer adjusts it by itself. `linearize` and "How it works" say so.
    """
    if platform.libc_ver()[0] == "glibc":
        M_MMAP_THRESHOLD = -3
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)


def _need(tokens: Tensor, run: Callable[[Tensor], None]) -> Callable[[int, int], float]:
    """How many bytes a pass takes at its height, as a function of the number of prompts and of their length.

    What lives after an operation is a polynomial of the second degree in the length: it is found for each operation
    from three short prompts, and the height is the largest of them all. Beside what each prompt takes there is what is
    there once, such as weights that are unpacked for the pass. Where the number of operations depends on the length
    (state-space models that go from token to token), the heights themselves are taken for such a polynomial.
    """
    length = tokens.shape[1]
    longest = max(min(length, 12), length // 16)
    longest -= longest % 16 if longest > 64 else 0  # some kernels fill up to round numbers
    lengths = sorted({max(1, longest // 2), max(1, 3 * longest // 4), longest})
    living = [_living(run, tokens[:1, :count]) for count in lengths]
    living += [_living(run, tokens[:1, : lengths[0]].expand(2, -1))] if len(tokens) > 1 else []
    if len({*map(len, living)}) > 1:
        living = [living_of_one.max(keepdims=True) for living_of_one in living]
    of_one = np.polynomial.polynomial.polyfit(lengths, np.stack(living[: len(lengths)]), len(lengths) - 1)
    once = np.maximum(0, 2 * living[0] - living[-1]) if len(tokens) > 1 else np.zeros(1)

    def need(batch: int, length: int) -> float:
        return float((once + batch * (np.polynomial.polynomial.polyval(length, of_one) - once)).max())

    return need


def _living(run: Callable[[Tensor], None], tokens: Tensor) -> np.ndarray:
    """The bytes of the tensors of a pass that live after each of its operations."""
    with _Living() as living:
        run(tokens)
    gc.collect(1)  # the graph of a checkpointed pass goes round in circles; it is young, and a search for all is slow
    return np.array(living.after, dtype=np.float64)


class _Living(TorchDispatchMode):
    """Inside, the memory of all tensors that come to be is counted as long as they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: dict[int, tuple[object, int]] = {}
        self.now = 0
        self.after: list[int] = []
        """What lived after each operation."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(value.untyped_storage()) for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
        found = func(*args, **(kwargs or {}))
        for value in tree_leaves(found):
            if isinstance(value, Tensor) and id(value.untyped_storage()) not in given:
                self._count(value.untyped_storage())
        self.after.append(self.now)
        return found

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = weakref.ref(storage, lambda _: self._gone(key)), storage.nbytes()
            self.now += storage.nbytes()

    def _gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key)[1]


def _most(limit: int, available: int, need: Callable[[int], float]) -> int:
    """The largest number below the limit that needs no more than there is; 0 where there is none."""
    return bisect_right(range(1, limit), available, key=lambda count: math.ceil(need(count)))


def _gib(count: float | int) -> str:
    return f"{count / 2**30:.2g} GiB"


# -- how many entries go through the model at once --------------------------------------------------------------------


class Work(Enum):
    """What an entry of a batch is there for. It decides what the entry keeps alive, and how much a batch may take."""

    PULLBACK = (16 * 2**20, 512 * 2**20)
    """A cotangent on its way back keeps the gradients inside one block; on a CPU small batches stay near its caches."""
    CURVATURE = (128 * 2**20, 512 * 2**20)
    """A Hessian-vector product keeps what it found for the activations of all layers until its end."""
    GRAPH = (512 * 2**20, 512 * 2**20)
    """A forward pass with its graph keeps the activations of all layers."""
    PREDICTION = (256 * 2**20, 256 * 2**20)
    """A forward pass without a graph keeps the activations of one block, and the logits of the predictions."""
    EMBEDDING = (16 * 2**20, 64 * 2**20)
    """A forward pass that ends at the embedding keeps the embeddings; on a CPU small batches stay in its caches."""
    PATTERN = (2**30, 2**30)
    """A layer whose attention is cached keeps the patterns of all heads."""


def at_once(model: Model, tokens: int, work: Work, *, texts: int = 1, rows: int = 1, size: int | None = None) -> int:
    """How many entries of this work fit into the working memory that a batch of it may take; at least 1.

    A batch never takes more than a quarter of what is free.

    Args:
        model: a checked model.
        tokens: how many tokens a text has.
        work: what the entries are there for.
        texts: how many texts one entry consists of, which all go through the model.
        rows: how many predictions of an entry are read; it counts for work that ends at logits in float64.
        size: bytes of one number; None is that of the model's own.
    """
    cfg, device = model.cfg, device_of(model)
    d_mlp, patterns = getattr(cfg, "d_mlp", None) or 0, cfg.n_heads * tokens
    widths = {
        Work.PULLBACK: max(4 * d_mlp, 8 * cfg.d_model, 3 * patterns),
        Work.CURVATURE: cfg.n_layers * (4 * d_mlp + 8 * cfg.d_model + 3 * patterns),
        Work.GRAPH: cfg.n_layers * (4 * d_mlp + 8 * cfg.d_model + 3 * patterns),
        Work.PREDICTION: max(4 * d_mlp, 8 * cfg.d_model, 3 * patterns),
        Work.EMBEDDING: cfg.d_model,
        Work.PATTERN: patterns,
    }
    needed = texts * tokens * widths[work] * (size or next(model.parameters()).element_size())
    if work is Work.PREDICTION:
        needed += rows * 8 * 8 * cfg.d_vocab  # log-probabilities are taken in float64, and some copies of them
    available = available_bytes(device)
    most = work.value[device.type != "cpu"]
    return max(1, (most if available is None else min(most, available // 4)) // needed)


def _least_bytes(model: Model, tokens: int, length: int, size: int) -> int:
    """What one block keeps at least: attention weights, and some copies of the residual stream and of the MLP."""
    cfg = model.cfg
    return tokens * size * (cfg.n_heads * length + 4 * cfg.d_model + (getattr(cfg, "d_mlp", None) or 0))
