"""One run on a GPU: what each scope costs beside captum and inseq, on random Llamas of 135M, 1B and 8B parameters.

    python -m tests.benchmarks.gpu [--into FOLDER] [--minutes 8] [--shapes 1B 8B 135M]

It prints the tables, and writes `gpu.json` and `gpu.md` into the folder. Every figure is of one process, and the JSON
is written after each, so that a run which is cut off leaves what it has measured. What would take longer than what is
left of the minutes, or more memory than there is, is named so in its place. Without a GPU it runs on the CPU, with a
small Llama, which shows that the script works and measures no GPU: each table of the large ones says "not measured".

The unit is a bare forward pass of the same Hugging Face model on the same tokens, `use_cache=False` under
`torch.no_grad`, with the logits of every position. Memory is the most that was allocated, less what was there before.
"""

import argparse
import copy
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformers import LlamaConfig, LlamaForCausalLM

import tl_scopes as tls
from tests.benchmarks import throughput
from tests.benchmarks.precision import Difference, differences, scores
from tests.benchmarks.rows import CAPTUM, INSEQ, Row, naive_gradient, scope
from tests.benchmarks.setting import Setting

NOT_MEASURED, NO_MEMORY, NO_TIME, NOT_THERE = "not measured", "out of memory", "out of time", "not installed"
SEMANTIC = tls.SemanticScope()
MANY = "attribute_many, each prompt, batches of"
BATCHES = (1, 4, 16, 64)
LONGEST_ROW = 40.0
"""No single row takes more seconds."""


@dataclass(frozen=True)
class Shape:
    """The size of a Llama."""

    width: int
    layers: int
    heads: int
    key_value_heads: int
    mlp: int
    vocab: int
    tokens: tuple[int, ...] = (128, 256, 512, 2048, 8192)
    batched: int = 256
    """How long the longest of the prompts are that go through the model in batches."""

    def built(self, device: torch.device, dtype: torch.dtype, attention: str) -> tuple[LlamaForCausalLM, Any]:
        """A random model, and a bridge which shares its weights."""
        config = LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.width,
            intermediate_size=self.mlp,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            max_position_embeddings=2 * max(self.tokens),
            attn_implementation=attention,
        )
        before = torch.get_default_dtype()
        torch.manual_seed(0)
        torch.set_default_dtype(dtype)
        try:
            with device:
                hf = LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(before)
        hf.requires_grad_(False)
        with torch.no_grad():
            for name, parameter in hf.named_parameters():
                if "norm" in name:  # gains, without which every readout has the same norm
                    parameter.add_(0.2 * torch.randn_like(parameter))
                elif "lm_head" in name:  # a prediction of a few nats
                    parameter.normal_(std=3.5 / self.width**0.5)
        shared = copy.deepcopy(hf, {id(parameter): parameter for parameter in hf.parameters()})
        bridge = build_bridge_from_module(shared, "LlamaForCausalLM", hf_config=config, model_name="random")
        return hf, bridge.eval()


SHAPES = {
    "1B": Shape(2048, 16, 32, 8, 8192, 128_256),
    "8B": Shape(4096, 32, 32, 8, 14_336, 128_256),
    "135M": Shape(576, 30, 9, 3, 1536, 49_152),
}
"""Llama-3.2-1B's, Llama-3.1-8B's and SmolLM2-135M's, in the order of what is wanted most."""
SMALL = Shape(64, 2, 4, 2, 128, 64, tokens=(8,), batched=8)


@dataclass(frozen=True)
class Timed:
    """A row of the tables."""

    row: Row
    passes: float
    """About how many forward passes it takes at most, all in all: it is left out where there is no time for them."""


def rows(shape: Shape, tokens: int) -> dict[str, Timed]:
    """What is measured at one length."""
    found = {
        "gradient by hand, logits of one position": Timed(Row(_by_hand), 3),
        "gradient by hand, logits of every position": Timed(Row(lambda s: lambda: naive_gradient(s).norm(dim=-1)), 3),
        "linearize": Timed(Row(lambda s: lambda: tls.linearize(s.model, s.prompt)), 2),
        "Semantic Scope": Timed(Row(scope(SEMANTIC)), 4),
        "Semantic Scope, checkpointed": Timed(Row(scope(SEMANTIC, checkpoint=True)), 5),
        "Temperature Scope": Timed(Row(scope(tls.TemperatureScope())), 4),
        "Fisher Scope, 32 probes": Timed(Row(scope(tls.FisherScope(probes=32)), rounds=3), 80),
        "carried_by, heads, one token": Timed(Row(_carried, rounds=3), 12),
        "captum Saliency": Timed(CAPTUM["captum Saliency, ‖gradient‖₂"], 3),
        "inseq saliency": Timed(INSEQ["inseq saliency"], 4),
    }
    if tokens <= 512:
        found |= {
            "attribution_map, all positions": Timed(Row(_map, rounds=1), 2 + 2 * tokens),
            "Fisher Scope, exact": Timed(Row(scope(tls.FisherScope(exact=True)), rounds=1), 2 + 2 * shape.width),
        }
    return found


def _by_hand(s: Setting) -> Callable[[], object]:
    def work() -> object:
        embeddings = s.embeddings()
        logits = s.hf(inputs_embeds=embeddings, use_cache=False, logits_to_keep=1).logits[0, -1]
        return torch.autograd.grad(logits[s.target], embeddings)[0][0].norm(dim=-1)

    return work


def _map(s: Setting) -> Callable[[], object]:
    return lambda: tls.attribution_map(s.model, s.prompt, SEMANTIC)


def _carried(s: Setting) -> Callable[[], object]:
    return lambda: tls.carried_by(tls.linearize(s.model, s.prompt), SEMANTIC, tokens=0)


def batched_rows(shape: Shape) -> dict[str, Timed]:
    """What is measured for batches of prompts of mixed lengths."""
    count = max(BATCHES)
    found = {
        f"{MANY} {size}": Timed(
            Row(lambda s, size=size: throughput.ours(s.model, _prompts(shape, count), size), per=count, rounds=2),
            5 * count,
        )
        for size in BATCHES
    }
    others = {
        "captum Saliency": (throughput.captum_batches, CAPTUM["captum Saliency, ‖gradient‖₂"].there),
        "inseq saliency": (throughput.inseq_batches, INSEQ["inseq saliency"].there),
    }
    for name, (make, there) in others.items():
        for size in (1, 16, 64):
            row = Row(lambda s, size=size, make=make: make(s.hf, _prompts(shape, count), size), count, 2, there)
            found[f"{name}, each prompt, batches of {size}"] = Timed(row, 8 * count)
    return found


def _prompts(shape: Shape, count: int) -> list[list[int]]:
    """Token ids of prompts between half as long as the longest and that."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.linspace(shape.batched // 2, shape.batched, count).round().int().tolist()
    return [torch.randint(3, shape.vocab, (length,), generator=generator).tolist() for length in lengths]


class Run:
    """The measurements of a run, and how much time is left to it."""

    def __init__(self, device: torch.device, minutes: float, into: Path | None) -> None:
        self.device, self.into = device, into
        self.end = time.monotonic() + 60 * minutes
        self.measured: list[dict[str, Any]] = []
        self.differences: list[dict[str, Any]] = []

    def left(self) -> float:
        return self.end - time.monotonic()

    def clock(self) -> float:
        """Seconds: of the GPU once it has done what it was given, else of this process on the CPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return time.perf_counter()
        return time.process_time()

    def seconds(self, work: Callable[[], object], rounds: int) -> list[float]:
        times = []
        for _ in range(rounds):
            start = self.clock()
            work()
            times.append(self.clock() - start)
        return times

    def measure(self, name: str, timed: Timed, setting: Setting, forward: float, **where: Any) -> None:
        """Time one row, after a round to warm up, and keep what came of it."""
        found = {**where, "name": name, "seconds": None, "passes": None, "bytes": None, "note": ""}
        self.measured.append(found)
        expected = timed.passes * forward
        if not timed.row.there:
            found["note"] = NOT_THERE
        elif 2 * expected > min(self.left(), LONGEST_ROW):
            found["note"] = NO_TIME
        else:
            try:
                work = timed.row.make(setting)
                (first,) = self.seconds(work, 1)
                found["bytes"], times = self.height(lambda: self.seconds(work, 1))
                most = timed.row.rounds if self.device.type == "cuda" else 1
                rounds = max(1, min(most, int(min(3, self.left() / 4) / max(first, 1e-9))))
                found["seconds"] = statistics.median([*times, *self.seconds(work, rounds - 1)]) / timed.row.per
                found["passes"] = found["seconds"] / forward
            except (MemoryError, torch.OutOfMemoryError):
                found["note"] = NO_MEMORY
            except Exception as error:  # one row must not cost the others
                found["note"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        self.free()
        self.save()

    def height(self, work: Callable[[], Any]) -> tuple[int | None, Any]:
        """How many bytes more than before were allocated at most, and what the work returned."""
        if self.device.type != "cuda":
            return None, work()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        found = work()
        return torch.cuda.max_memory_allocated(self.device) - before, found

    def free(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def save(self) -> None:
        if self.into is not None:
            self.into.mkdir(parents=True, exist_ok=True)
            record = {
                "device": self.name(),
                "versions": {
                    name: version(name) for name in ("tl_scopes", "torch", "transformers", "transformer-lens")
                },
                "measured": self.measured,
                "float32 against half": self.differences,
            }
            (self.into / "gpu.json").write_text(json.dumps(record, indent=1), encoding="utf-8")

    def name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"


def measured(run: Run, name: str, shape: Shape, dtype: torch.dtype, attentions: Sequence[str]) -> None:
    """All rows of one shape: at each length, in batches, and what half precision does to scores."""
    for attention in attentions:
        where = {"shape": name, "dtype": str(dtype).removeprefix("torch."), "attention": attention}
        if run.left() <= 0:
            run.measured.append(_bare({**where, "tokens": shape.tokens[0]}, NO_TIME))
            continue
        try:
            hf, model = shape.built(run.device, dtype, attention)
        except (MemoryError, torch.OutOfMemoryError):
            run.measured.append(_bare({**where, "tokens": shape.tokens[0]}, NO_MEMORY))
            run.free()
            continue
        for tokens in shape.tokens:
            setting = _setting(hf, model, tokens, shape)
            forward = _forward(run, setting, {**where, "tokens": tokens})
            for row, timed in rows(shape, tokens).items() if forward else ():
                run.measure(row, timed, setting, forward, **where, tokens=tokens)
            if forward and tokens == shape.batched and attention == attentions[0]:
                for row, timed in batched_rows(shape).items():
                    run.measure(row, timed, setting, forward, **where, tokens=f"to {shape.batched}")
        if attention == attentions[0] and run.left() > 20:
            run.differences += [{"shape": name, **found.record()} for found in _differences(model, shape, dtype)]
            run.save()
        del hf, model
        run.free()


def _setting(hf: LlamaForCausalLM, model: Any, tokens: int, shape: Shape) -> Setting:
    ids = torch.randint(3, shape.vocab, (1, tokens), generator=torch.Generator().manual_seed(tokens))
    return Setting(hf, model, ids.to(hf.device), 3)


def _bare(where: dict[str, Any], note: str) -> dict[str, Any]:
    """The row of a bare forward pass before it is measured, or with the reason why it is not."""
    return {**where, "name": "bare forward pass", "seconds": None, "passes": 1.0, "bytes": None, "note": note}


def _forward(run: Run, setting: Setting, where: dict[str, Any]) -> float | None:
    """The seconds of a bare forward pass, which is kept as a row; None where there is no room or no time for one."""
    found = _bare(where, NO_TIME if run.left() <= 0 else "")
    run.measured.append(found)
    if found["note"]:
        return None
    try:
        run.seconds(setting.forward, 1)
        found["bytes"], times = run.height(lambda: run.seconds(setting.forward, 5))
    except (MemoryError, torch.OutOfMemoryError):
        found["note"] = NO_MEMORY
        run.free()
        return None
    found["seconds"] = statistics.median(times)
    return statistics.median(times)


def _differences(model: Any, shape: Shape, dtype: torch.dtype) -> Iterator[Difference]:
    """Scores in half precision against those of the same weights in float32, to which the model is turned."""
    if dtype == torch.float32:
        return
    prompts = _prompts(shape, 4)
    half = scores(model, prompts)
    try:
        whole = scores(model.to(torch.float32), prompts)
    except (MemoryError, torch.OutOfMemoryError):
        return
    yield from differences(dtype, "the same weights", half, whole)


# -- tables -----------------------------------------------------------------------------------------------------------


def tables(run: Run, shapes: Iterable[str]) -> str:
    """Markdown: a table for each shape and attention; hours for a million prompts; half precision."""
    text = [f"Measured on {run.name()}, by `python -m tests.benchmarks.gpu`."]
    for shape in shapes:
        mine = [one for one in run.measured if one["shape"] == shape]
        for attention in dict.fromkeys(one["attention"] for one in mine):
            text.append(f"**{shape}, {mine[0]['dtype']}, {attention}**, in forward passes (GiB of memory)")
            text.append(_table([one for one in mine if one["attention"] == attention]))
        if not mine:
            text.append(f"**{shape}**: {NOT_MEASURED}.")
    lines = ["| | GPU hours | from |", "|---|--:|---|"]
    lines += [f"| {shape} | {hours(run.measured, shape)} |" for shape in shapes]
    text += ["**A million prompts of some 256 tokens, Semantic Scope**", "\n".join(lines)]
    if run.differences:
        text += ["**Half precision against float32**", Difference.table(run.differences)]
    return "\n\n".join(text) + "\n"


def _table(measurements: Sequence[dict[str, Any]]) -> str:
    lengths = list(dict.fromkeys(one["tokens"] for one in measurements))
    names = list(dict.fromkeys(one["name"] for one in measurements))
    cells = {(one["name"], one["tokens"]): _cell(one) for one in measurements}
    lines = ["| tokens | " + " | ".join(map(str, lengths)) + " |", "|---|" + "--:|" * len(lengths)]
    lines += [f"| {name} | {' | '.join(cells.get((name, length), '') for length in lengths)} |" for name in names]
    return "\n".join(lines)


def _cell(one: dict[str, Any]) -> str:
    if one["seconds"] is None:
        return one["note"] or NOT_MEASURED
    said = f"{1000 * one['seconds']:.3g} ms" if one["name"] == "bare forward pass" else f"{one['passes']:.3g}"
    return said if one["bytes"] is None else f"{said} ({one['bytes'] / 2**30:.2g})"


def hours(measurements: Iterable[dict[str, Any]], shape: str, prompts: int = 1_000_000) -> str:
    """How long `attribute_many` takes for so many prompts on one such GPU, at the fastest batch that was measured."""
    mine = [one for one in measurements if one["shape"] == shape and MANY in one["name"] and one["seconds"]]
    if not mine:
        return f"{NOT_MEASURED} | prompts x seconds for each / 3600"
    best = min(mine, key=lambda one: one["seconds"])
    each = best["seconds"]
    return f"{prompts * each / 3600:.3g} | {1000 * each:.3g} ms each, {best['name'].split(', ')[-1]}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", type=Path, metavar="FOLDER")
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), default=list(SHAPES))
    given = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = Run(device, given.minutes - 0.5 if given.minutes > 1 else given.minutes, given.into)
    if device.type == "cuda":
        for name in given.shapes:
            measured(run, name, SHAPES[name], torch.bfloat16, ("eager", "sdpa"))
    else:
        measured(run, "small", SMALL, torch.bfloat16, ("eager", "sdpa"))
    text = tables(run, [*([] if device.type == "cuda" else ["small"]), *given.shapes])
    print(text)
    if given.into:
        run.save()
        (given.into / "gpu.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
