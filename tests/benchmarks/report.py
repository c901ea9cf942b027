"""The table of costs in docs/costs.md and demos/cost.png, from the JSON of pytest-benchmark.

`python -m tests.benchmarks.report costs.json` prints the one and draws the other.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

PICTURE = Path(__file__).parent.parent.parent / "demos" / "cost.png"

AXES = {
    "tokens": "tokens",
    "width": "width",
    "layers": "layers",
    "batch": "prompts of 32 tokens in a batch, each",
    "cotangents": "cotangents, forward pass included",
}
COLORS = ["#4c3bcf", "#d1495b", "#2a9d8f", "#8a8a8a"]


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of costs in forward passes, with their range over the rounds."""
    lines = ["| | forward passes | lowest to highest |", "|---|--:|--:|"]
    lines += [f"| {r['name']} | {short(r['ratio'])} | {short(r['low'])} to {short(r['high'])} |" for r in rows]
    return "\n".join(lines)


def short(ratio: float) -> str:
    """A ratio to three digits: 1.43, 17.5, 330."""
    return f"{ratio:.{2 if ratio < 10 else 1 if ratio < 100 else 0}f}"


def slopes(points: Sequence[dict[str, Any]]) -> str:
    """A Markdown table: by which power of each size seconds and memory grow, fitted over all points of a line, and for
    seconds from the last point but one to the last.

    The seconds of a batch are those of all its prompts.
    """
    lines = ["| | | seconds | at the end | memory |", "|---|---|--:|--:|--:|"]
    for axis in AXES:
        here = [point for point in points if point["axis"] == axis]
        for name in dict.fromkeys(point["name"] for point in here):
            line = sorted((point for point in here if point["name"] == name), key=lambda point: point["value"])
            sizes = [point["value"] for point in line]
            each = [point["ratio"] * point["forward"] for point in line]
            seconds = [one * size for one, size in zip(each, sizes, strict=True)] if axis == "batch" else each
            memory = power(sizes, [point["bytes"] for point in line]) if "bytes" in line[0] else ""
            powers = f"{power(sizes, seconds)} | {power(sizes[-2:], seconds[-2:])}"
            lines.append(f"| {axis} | {name} | {powers} | {memory} |")
    return "\n".join(lines)


def power(sizes: Sequence[float], values: Sequence[float]) -> str:
    """The slope of a line in a plot with two logarithmic axes; nothing for one point."""
    return "" if len(sizes) < 2 else f"{np.polyfit(np.log(sizes), np.log(values), 1)[0]:.2f}"


def picture(points: list[dict[str, Any]], path: Path) -> None:
    """Draw a panel per axis: costs in forward passes of the same model, and under each size the time of such a pass."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, 3, figsize=(15, 7.6), layout="constrained")
    *drawn, memory = panels.flat
    for panel, (axis, label) in zip(drawn, AXES.items(), strict=True):
        here = [point for point in points if point["axis"] == axis]
        for color, name in zip(COLORS, dict.fromkeys(point["name"] for point in here), strict=False):
            line = sorted((point["value"], point["ratio"]) for point in here if point["name"] == name)
            panel.plot(*zip(*line, strict=True), "o-", color=color, label=name, linewidth=2, markersize=5)
        panel.set_xlabel(label, fontsize=11)
        panel.grid(axis="y", color="#e6e6e6")
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        if axis == "cotangents":
            panel.set_ylim(bottom=0)
            panel.set_xticks([1, 8, 16, 32, 64])
            panel.legend(frameon=False)
            continue
        seconds = {point["value"]: point["forward"] for point in here}
        panel.set_ylim(bottom=0)
        if axis in ("tokens", "batch"):
            panel.set_xscale("log", base=2)
            panel.minorticks_off()
        panel.set_xticks(list(seconds), [f"{value}\n{time(bare)}" for value, bare in seconds.items()])
    _memory(memory, [point for point in points if point["axis"] == "tokens" and "bytes" in point])
    for panel in panels[:, 0]:
        panel.set_ylabel("cost in forward passes")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    where = "A random Llama: 128 tokens, width 512, 8 layers where nothing else is said. One CPU core, float32."
    figure.supxlabel(f"{where} Below: one bare forward pass.", fontsize=9, color="#555555")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def time(seconds: float) -> str:
    """A time to two digits or three: 53 ms, 2.0 s."""
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _memory(panel: Any, points: Sequence[dict[str, Any]]) -> None:
    """Draw what tensors take against the length of the prompt, with two logarithmic axes."""
    for color, name in zip((COLORS[0], COLORS[2]), dict.fromkeys(point["name"] for point in points), strict=False):
        line = sorted((point["value"], point["bytes"] / 2**20) for point in points if point["name"] == name)
        panel.plot(*zip(*line, strict=True), "o-", color=color, linewidth=2, markersize=5)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log", base=2)
    panel.set_xlabel("tokens", fontsize=11)
    panel.set_ylabel("MiB of tensors, weights left out")
    panel.spines[["top", "right"]].set_visible(False)


def main(*sources: str) -> None:
    """Print the table; draw the picture if its points were measured."""
    files = [json.loads(Path(source).read_text()) for source in sources]
    rows = [benchmark["extra_info"] for file in files for benchmark in file["benchmarks"]]
    if costs := [row for row in rows if "axis" not in row]:
        print(table(costs))
    if points := [row for row in rows if "axis" in row]:
        print(f"\n{slopes(points)}")
        picture(points, PICTURE)
        print(f"\nwrote demos/{PICTURE.name}")


if __name__ == "__main__":
    main(*sys.argv[1:])
