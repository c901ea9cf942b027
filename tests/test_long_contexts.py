"""What a checkpoint keeps and gives back, and contexts that will not fit."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import tl_scopes as tls
from tests import zoo
from tests.zoo import PROMPT, Specimen
from tl_scopes import models
from tl_scopes.models import memory

POSITION = 5
EXACT = {"rtol": 1e-10, "atol": 1e-12}


@pytest.mark.parametrize("ends", [{}, {"wrt": "blocks.1.hook_resid_pre"}, {"of": "blocks.1.hook_resid_post"}], ids=str)
def test_a_checkpoint_changes_no_number(specimen: Specimen, ends: dict[str, str]) -> None:
    """Readout, logits, J and Jδ are the same, between any hooks, for one cotangent and for several."""
    if not set(ends.values()) <= set(specimen.model.hook_dict):
        pytest.skip("this model names its hooks otherwise")
    plain = tls.linearize(specimen.model, PROMPT, POSITION, **ends)
    again = tls.linearize(specimen.model, PROMPT, POSITION, checkpoint=True, **ends)
    assert_close(again.readout, plain.readout, **EXACT)
    assert_close(again.as_matrix(), plain.as_matrix(), **EXACT)
    assert_close(again.vjp(torch.eye(16).double()[:1]), plain.as_matrix()[:1], **EXACT)
    tangents = torch.randn(2, *plain.embeddings.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert_close(again.jvp(tangents), plain.jvp(tangents), **EXACT)


def test_a_block_is_run_again_as_it_was(specimen: Specimen) -> None:
    """Under the hooks and the frozen parameters of the forward pass, whatever is there when gradients are asked for."""
    model = specimen.model
    hook = "blocks.1.hook_resid_pre" if "blocks.1.hook_resid_pre" in model.hook_dict else "blocks.1.hook_in"

    def double(value: Tensor, hook: Any) -> Tensor:
        return value * torch.linspace(1, 2, value.shape[1], dtype=value.dtype)[:, None]

    def patched(checkpoint: bool) -> tls.Linearization:
        with model.hooks(fwd_hooks=[(hook, double)]):
            return tls.linearize(model, PROMPT, POSITION, checkpoint=checkpoint)

    expected, lin = patched(False).as_matrix(), patched(True)
    assert_close(lin.as_matrix(), expected, **EXACT)
    with model.hooks(fwd_hooks=[(hook, lambda value, hook: value * 0)]):
        assert_close(lin.as_matrix(), expected, **EXACT)
    assert not torch.allclose(tls.linearize(model, PROMPT, POSITION).as_matrix(), expected)


def test_changed_weights_are_noticed() -> None:
    """A block that is run again with other weights would give the gradient of another model."""
    model = zoo.SPECIES["bridge llama"]().model
    lin = tls.linearize(model, PROMPT, checkpoint=True)
    with torch.no_grad():
        next(model.blocks[1].parameters()).mul_(1.5)
    with pytest.raises(RuntimeError, match="the weights have changed since the linearisation was made with checkpoint"):
        tls.SemanticScope(3)(lin)


@pytest.mark.parametrize("of", ["ln_final", "blocks.1.hook_resid_post", "blocks.1.hook_resid_pre"])
def test_a_checkpointed_graph_is_freed(of: str) -> None:
    """What a block keeps for its second run does not lead back to the graph that keeps the block."""
    lin = tls.linearize(zoo.specimen("bridge llama").model, PROMPT, of=of, checkpoint=True)
    lin.vjp(torch.eye(16).double()[:2])
    root = weakref.ref(lin.trace.output)
    del lin
    gc.collect()
    assert root() is None


def test_a_forward_method_of_the_users_stays() -> None:
    """A block whose forward method was replaced keeps it."""
    model = zoo.SPECIES["bridge llama"]().model
    tls.models.check_model(model)  # which runs a model once that it has not seen
    block, calls = model.blocks[0], []
    forward = block.forward
    vars(block)["forward"] = mine = lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
    tls.linearize(model, PROMPT, checkpoint=True)
    assert vars(block)["forward"] is mine
    assert calls == [1]


def test_other_points_are_checkpointed_too() -> None:
    lin = tls.linearize(zoo.specimen("bridge llama").model, PROMPT, checkpoint=True)
    assert lin.at(lin.embeddings).trace.checkpointed
    assert tls.attribution_map(lin.model, PROMPT, tls.SemanticScope(3), checkpoint=True).scores.isfinite().all()


def test_threads_with_checkpoints() -> None:
    """Blocks are run again under hooks of their own, which no other thread's pass may meet."""
    model = zoo.specimen("bridge llama").model
    lin = tls.linearize(model, PROMPT, checkpoint=True)
    expected = lin.squared_norms(torch.eye(16).double())
    other = tls.attribute(model, PROMPT, tls.SemanticScope(3)).scores
    with ThreadPoolExecutor(4) as pool:
        mine = [pool.submit(lin.squared_norms, torch.eye(16).double()) for _ in range(8)]
        theirs = [pool.submit(tls.attribute, model, PROMPT, tls.SemanticScope(3)) for _ in range(8)]
    assert all(torch.allclose(job.result(), expected) for job in mine)
    assert all(torch.allclose(job.result().scores, other) for job in theirs)


def kept_bytes(model: Any, **options: Any) -> int:
    """What the graph of a forward pass keeps beside the parameters."""
    known = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept = {}

    def count(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        models.trace(model, torch.tensor([PROMPT[: POSITION + 1]]), wrt=["hook_embed"], of="ln_final", **options)
    return sum(kept.values())


def test_a_checkpoint_keeps_less(specimen: Specimen) -> None:
    """The stream between blocks, instead of everything within them."""
    assert kept_bytes(specimen.model, checkpoint=True) < 0.5 * kept_bytes(specimen.model)


def test_the_estimate_is_what_the_graph_keeps(specimen: Specimen, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted after the first block: a graph that needs a third more than there is, is refused, another is not."""
    true = kept_bytes(specimen.model)
    monkeypatch.setattr(memory, "available_bytes", lambda device: int(0.75 * true))
    message = r"1 x 6 tokens through 2 blocks would need about .* GiB are left on cpu: try checkpoint=True, a sh"
    with pytest.raises(MemoryError, match=message):
        tls.linearize(specimen.model, PROMPT, POSITION)
    monkeypatch.setattr(memory, "available_bytes", lambda device: int(1.33 * true))
    tls.linearize(specimen.model, PROMPT, POSITION)


def test_counting_changes_no_number(specimen: Specimen, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward pass that is watched gives the same first and second derivatives."""
    plain = tls.linearize(specimen.model, PROMPT, POSITION)
    monkeypatch.setattr(memory, "_least_bytes", lambda *sizes: 2**60)
    monkeypatch.setattr(memory, "available_bytes", lambda device: 2**62)
    watched = tls.linearize(specimen.model, PROMPT, POSITION)
    tangents = torch.ones(1, *plain.embeddings.shape, dtype=torch.float64)
    assert_close(watched.as_matrix(), plain.as_matrix(), **EXACT)
    assert_close(watched.jvp(tangents), plain.jvp(tangents), **EXACT)


def test_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried already is not recommended, and the model is as it was after the refusal."""
    model = zoo.specimen("bridge llama").model
    monkeypatch.setattr(memory, "available_bytes", lambda device: 100)
    with pytest.raises(MemoryError, match=r"GiB are left on cpu: try a shorter prompt, bfloat16, a device"):
        tls.linearize(model, PROMPT, checkpoint=True)
    with pytest.raises(MemoryError, match=r"2 x 3 tokens .* try a smaller batch, checkpoint=True"):
        models.trace(model, torch.tensor([[1, 2, 3], [4, 5, 6]]), wrt=["hook_embed"], of="ln_final")
    monkeypatch.undo()
    assert not any("forward" in vars(block) or block._forward_pre_hooks for block in model.blocks)
    tls.linearize(model, PROMPT)


@pytest.mark.parametrize(
    ("files", "expected"), [({"memory.max": "max"}, 1000), ({"memory.max": "700"}, 400), ({}, 1000)]
)
def test_available_memory(files: dict[str, str], expected: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's limit counts, where it has one."""
    for name, text in (files | {"memory.current": "400", "memory.stat": "anon 7\ninactive_file 100\n"}).items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    assert memory.available_bytes(torch.device("cpu")) == expected
    assert memory.available_bytes(torch.device("mps")) is None
