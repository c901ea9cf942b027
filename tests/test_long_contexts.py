"""What a checkpoint keeps and gives back, and contexts that will not fit."""

import gc
import os
import re
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
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


def ablate(value: Tensor, hook: Any) -> Tensor:
    """The README's own: a token cut out in place."""
    value[:, 2] = 0
    return value


def steer(value: Tensor, hook: Any) -> None:
    """In place, other than the first time if it were done twice to the same stream."""
    value[:, 1] += 1.5


@pytest.mark.parametrize("change", [ablate, steer])
@pytest.mark.parametrize("block", [0, 1])
def test_hooks_that_change_the_stream_in_place(specimen: Specimen, change: Any, block: int) -> None:
    """What enters a block is kept as it was before its hooks."""
    hook = f"blocks.{block}.hook_resid_pre"
    hook = hook if hook in specimen.model.hook_dict else f"blocks.{block}.hook_in"
    with specimen.model.hooks(fwd_hooks=[(hook, change)]):
        plain = tls.linearize(specimen.model, PROMPT, POSITION)
        again = tls.linearize(specimen.model, PROMPT, POSITION, checkpoint=True)
    assert_close(again.logits, plain.logits, **EXACT)
    assert_close(again.as_matrix(), plain.as_matrix(), **EXACT)


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


@pytest.mark.parametrize("hook", ["ln1.hook_normalized", "ln1.hook_scale", "ln2.hook_normalized"])
def test_from_within_a_norm(tiny: Any, hook: str) -> None:
    """A bridge's norm computes another way where hooks are on it: also in its second run, and not for later hooks."""
    wrt = f"blocks.1.{hook}"
    expected = tls.SemanticScope()(tls.linearize(tiny, PROMPT, wrt=wrt)).scores
    assert_close(tls.SemanticScope()(tls.linearize(tiny, PROMPT, wrt=wrt, checkpoint=True)).scores, expected)
    with tiny.hooks([(wrt, lambda value, hook: 0.5 * value)]):
        patched = tls.SemanticScope()(tls.linearize(tiny, PROMPT)).scores
        lin = tls.linearize(tiny, PROMPT, checkpoint=True)
    assert_close(tls.SemanticScope()(lin).scores, patched)
    with tiny.hooks([(wrt, lambda value, hook: None)]):
        assert_close(tls.SemanticScope()(lin).scores, patched)
        assert len(tls.models.user_hooks(tiny)) == 1
    assert not tls.models.user_hooks(tiny)


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


LONG = [(7 * i + 3) % zoo.VOCAB for i in range(zoo.CONTEXT)]


def height(model: Any, tokens: Tensor, checkpoint: bool) -> int:
    """What tensors take at the height of a forward and a backward pass over the whole prompt."""

    def run(tokens: Tensor) -> None:
        trace = models.trace(model, tokens, wrt=["hook_embed"], of="ln_final", checkpoint=checkpoint)
        with models.undisturbed(trace):
            torch.autograd.grad(trace.output.sum(), trace.perturbations["hook_embed"])

    return int(memory._living(run, tokens).max())


@pytest.mark.parametrize(("batch", "checkpoint"), [(1, False), (3, True)])
def test_the_estimate_is_what_a_pass_takes(
    specimen: Specimen, batch: int, checkpoint: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made from half of the prompt: a pass that needs a quarter more than there is, is refused, another is not."""
    tokens = torch.tensor([LONG] * batch)
    true = height(specimen.model, tokens, checkpoint)
    if not checkpoint and batch == 1:
        assert true > kept_bytes(specimen.model)
    monkeypatch.setattr(memory, "available_bytes", lambda device: int(0.8 * true))
    message = rf"{batch} x 24 tokens through 2 blocks would need about .* GiB are left on cpu. What would fit: "
    with pytest.raises(MemoryError, match=message):
        height(specimen.model, tokens, checkpoint)
    monkeypatch.setattr(memory, "available_bytes", lambda device: int(1.25 * true))
    height(specimen.model, tokens, checkpoint)


@pytest.mark.parametrize(("available", "told"), [(2**62, 0), (None, 0), (2**10, 1)])
def test_the_allocator_is_left_alone(available: int | None, told: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless memory could be close: then it is told to hand back what is freed, which `linearize` says."""
    calls: list[int] = []
    monkeypatch.setattr(memory, "available_bytes", lambda device: available)
    monkeypatch.setattr(memory, "_hand_back_what_is_freed", lambda: calls.append(1))
    with suppress(MemoryError):
        tls.linearize(zoo.specimen("bridge llama").model, PROMPT)
    assert len(calls) == told
    assert "for the whole process" in " ".join(str(tls.linearize.__doc__).split())


def test_no_block_runs_before_the_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither over the whole prompt, nor under hooks of the user's, which may be made for this prompt."""
    model, seen = zoo.specimen("bridge llama").model, []
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1000)
    handle = model.blocks[0].register_forward_pre_hook(lambda block, args: seen.append(args[0].shape[1]))
    calls: list[object] = []
    try:
        with (
            model.hooks(fwd_hooks=[("blocks.0.hook_in", lambda value, hook: calls.append(value))]),
            pytest.raises(MemoryError, match="would need about"),
        ):
            tls.linearize(model, LONG)
    finally:
        handle.remove()
    assert 0 < max(seen) <= 12
    assert not calls


MEASURED = """
import gc, sys, torch, transformers
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from tl_scopes import models
from tl_scopes.models import memory

def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024

torch.set_num_threads(1)
heads, wide, kernel = {heads}, {wide}, {kernel!r}
config = transformers.LlamaConfig(
    hidden_size=wide, intermediate_size=4 * wide, num_hidden_layers=6, num_attention_heads=heads,
    num_key_value_heads=heads, vocab_size=100, max_position_embeddings=1200, attn_implementation=kernel,
)
hf = transformers.LlamaForCausalLM(config).eval()
model = build_bridge_from_module(hf, "LlamaForCausalLM", hf_config=config, model_name="measured")
"""

TRUTH = """
estimates, found = [], memory._need
def need(tokens, run):
    of = found(tokens, run)
    estimates.append(of(*tokens.shape))
    return of
memory._need = need
memory._least_bytes = lambda *sizes: 2**60

def run(length, checkpoint):
    tokens = torch.arange(length)[None] % 100
    trace = models.trace(model, tokens, wrt=["hook_embed"], of="ln_final", checkpoint=checkpoint)
    torch.autograd.grad(trace.output.sum(), trace.perturbations["hook_embed"])

for checkpoint in (False, True):
    run(20, checkpoint)
    gc.collect()
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    run(1100, checkpoint)
    print(estimates[-1] / (status("VmHWM") - before))
"""

LIMITED = """
import resource
limit = status("VmSize") + 300 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
tokens = torch.arange(1100)[None] % 100
before = status("VmHWM")
for blind in (False, True):
    if blind:
        memory.available_bytes = lambda device: None
    try:
        models.trace(model, tokens, wrt=["hook_embed"], of="ln_final")
    except MemoryError as error:
        print(error, type(error.__cause__).__name__, (status("VmHWM") - before) // 2**20)
"""


def in_a_process(script: str, **options: Any) -> list[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(tls.__file__).parents[1])}
    script = MEASURED.format(**options) + script
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system counts no heights")
@pytest.mark.parametrize(
    "options", [{"heads": 8, "wide": 256, "kernel": "eager"}, {"heads": 8, "wide": 512, "kernel": "sdpa"}]
)
def test_the_estimate_is_what_the_system_counts(options: dict[str, Any]) -> None:
    """The resident set of a process, before and at the height of a pass, plain and checkpointed."""
    for ratio in map(float, in_a_process(TRUTH, **options)):
        assert 0.7 < ratio < 1.35


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not enforce the limit")
def test_a_limit_on_the_process_counts() -> None:
    """`ulimit -v`: refused before the memory is taken; and where it was not foreseen, the allocator's error is told."""
    refused, failed = in_a_process(LIMITED, heads=8, wide=256, kernel="eager")
    message, taken = refused.rsplit(maxsplit=1)
    assert re.search(r"need about 0.\d+ GiB, and 0.2\d* GiB are left on cpu. What would fit: checkpoint=True", message)
    assert message.endswith("NoneType")
    assert int(taken) < 150
    assert re.search(r"^memory ran out on cpu at 1 x 1100 tokens: try checkpoint=True, .* RuntimeError \d+$", failed)


OUT_OF_MEMORY = [
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried to"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    MemoryError(),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("back", [False, True])
def test_errors_of_allocators_are_told(error: Exception, checkpoint: bool, back: bool) -> None:
    """In the forward pass and on the way back."""

    def fail(*_: Any) -> None:
        raise error

    def hook(value: Tensor, hook: Any) -> None:
        value.register_hook(fail) if back else fail()

    model = zoo.specimen("bridge llama").model
    tried = "a shorter prompt" if checkpoint else "checkpoint=True, a shorter prompt"
    with (
        model.hooks(fwd_hooks=[("blocks.1.hook_in", hook)]),
        pytest.raises(MemoryError, match=rf"memory ran out on cpu at 1 x 8 tokens: try {tried}, the model in bfloat16"),
    ):
        tls.SemanticScope(3)(tls.linearize(model, PROMPT, checkpoint=checkpoint))


def test_other_errors_stay_what_they_are() -> None:
    def fail(value: Tensor, hook: Any) -> None:
        raise RuntimeError("the shapes do not fit")

    model = zoo.specimen("bridge llama").model
    with model.hooks(fwd_hooks=[("blocks.1.hook_in", fail)]), pytest.raises(RuntimeError, match="the shapes do not"):
        tls.linearize(model, PROMPT)


def test_counting_changes_no_number(specimen: Specimen, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward pass that is watched gives the same first and second derivatives."""
    plain = tls.linearize(specimen.model, PROMPT, POSITION)
    monkeypatch.setattr(memory, "_least_bytes", lambda *sizes: 2**60)
    monkeypatch.setattr(memory, "available_bytes", lambda device: 2**62)
    watched = tls.linearize(specimen.model, PROMPT, POSITION)
    tangents = torch.ones(1, *plain.embeddings.shape, dtype=torch.float64)
    assert_close(watched.as_matrix(), plain.as_matrix(), **EXACT)
    assert_close(watched.jvp(tangents), plain.jvp(tangents), **EXACT)


def test_what_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the message recommends is accepted; what is tried already is not recommended."""
    model = zoo.specimen("bridge llama").model
    tokens = torch.tensor([LONG] * 3)
    true = height(model, tokens, checkpoint=False)
    checkpointed = height(model, tokens, checkpoint=True)
    monkeypatch.setattr(memory, "available_bytes", lambda device: (true + checkpointed) // 2)
    with pytest.raises(
        MemoryError, match=r"What would fit: a batch of \d, checkpoint=True \(.* GiB\), a prom"
    ) as found:
        height(model, tokens, checkpoint=False)
    batch = int(re.findall(r"a batch of (\d+)", str(found.value))[0])
    longest = int(re.findall(r"at most (\d+) tokens", str(found.value))[0])
    height(model, tokens[:batch], checkpoint=False)
    height(model, tokens[:, :longest], checkpoint=False)
    height(model, tokens, checkpoint=True)
    assert re.search(r"tokens, the model in bfloat16 \(.* GiB\), a device with more memory\.$", str(found.value))
    for room in (true, checkpointed):
        monkeypatch.setattr(memory, "available_bytes", lambda device, room=room: room // 2)
        with pytest.raises(MemoryError, match="What would fit: ") as found:
            height(model, tokens, checkpoint=room == checkpointed)
        assert "checkpoint=True (" not in str(found.value)
    monkeypatch.setattr(memory, "available_bytes", lambda device: 10)
    with pytest.raises(MemoryError, match=r"What would fit: a device with more memory"):
        tls.linearize(model, LONG)
    monkeypatch.undo()
    assert not any("forward" in vars(block) or block._forward_pre_hooks for block in model.blocks)
    tls.linearize(model, PROMPT)


def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str) -> None:
    """A system with 1000 bytes free, and a process in these control groups."""
    (tmp_path / "own").write_text(own)
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    monkeypatch.setattr(memory, "_OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(memory, "_left_to_process", lambda: iter(()))
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000}))


def write(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("files", "expected"), [({"memory.max": "max"}, 1000), ({"memory.max": "700"}, 400), ({}, 1000)]
)
def test_available_memory(files: dict[str, str], expected: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's limit counts, where it has one."""
    groups(tmp_path, monkeypatch, "0::/\n")
    write(tmp_path, files | {"memory.current": "400", "memory.stat": "anon 7\ninactive_file 100\n"})
    assert memory.available_bytes(torch.device("cpu")) == expected
    assert memory.available_bytes(torch.device("mps")) is None


def test_limits_of_groups_around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The least that any group leaves, of the process itself or around it."""
    groups(tmp_path, monkeypatch, "1:cpu:/\n0::/user.slice/mine.service\n")
    rest = {"memory.current": "100", "memory.stat": "anon 7\n"}
    write(tmp_path / "user.slice" / "mine.service", rest | {"memory.max": "900"})
    assert memory.available_bytes(torch.device("cpu")) == 800
    write(tmp_path / "user.slice", rest | {"memory.max": "300"})
    assert memory.available_bytes(torch.device("cpu")) == 200
    write(tmp_path / "user.slice", rest | {"memory.max": "30"})
    assert memory.available_bytes(torch.device("cpu")) == 0


def test_limits_of_older_control_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Version 1, where memory has a tree of its own; a container sees its group as the root of it."""
    groups(tmp_path, monkeypatch, "5:cpu,memory:/docker/abc\n0::/\n")
    files = {"memory.usage_in_bytes": "400", "memory.stat": "inactive_file 1\ntotal_inactive_file 100\n"}
    write(tmp_path / "memory", files | {"memory.limit_in_bytes": "700"})
    assert memory.available_bytes(torch.device("cpu")) == 400
    write(tmp_path / "memory" / "docker" / "abc", files | {"memory.limit_in_bytes": "600"})
    assert memory.available_bytes(torch.device("cpu")) == 300


def test_batches_take_no_more_than_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of what is free, at most."""
    model = zoo.specimen("bridge llama").model
    plenty = memory.at_once(model, 8, memory.Work.GRAPH)
    monkeypatch.setattr(memory, "available_bytes", lambda device: 2**20)
    assert 1 <= memory.at_once(model, 8, memory.Work.GRAPH) < plenty
    monkeypatch.setattr(memory, "available_bytes", lambda device: 0)
    assert memory.at_once(model, 8, memory.Work.GRAPH) == 1
