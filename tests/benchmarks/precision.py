"""What half precision does to scores: a model in bfloat16 and in float16 beside float32, on the same prompts.

    python -m tests.benchmarks.precision [FOLDER] [--count 12] [--into docs/costs.md]

There are two references: the model in float32 as it was loaded, and in float32 with its weights rounded as half
precision rounds them, which tells the error of computing apart from that of storing. For each scope: the Spearman
correlation of the scores over the tokens of a prompt, its mean and its lowest over the prompts; the largest error of a
score, as a part of the largest score of its prompt, its mean over the prompts and its highest; and in how many prompts
another token comes first. All are asked about the same target. `--into` writes the table behind this command in a file.
"""

import argparse
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tl_scopes as tls
from tests.benchmarks.answers import put_behind
from tests.benchmarks.throughput import short_prompts
from tl_scopes import models
from tl_scopes.rank_correlation import spearman
from tl_scopes.tiny import FOLDER


@dataclass(frozen=True)
class Difference:
    """How far the scores of one scope in half precision are from those in float32."""

    dtype: str
    reference: str
    scope: str
    correlations: tuple[float, ...]
    """For each prompt, the rank correlation over its tokens."""
    errors: tuple[float, ...]
    """For each prompt, the largest error as a part of the largest score."""
    other_first: int
    """In how many prompts another token has the largest score."""

    def record(self) -> dict[str, Any]:
        return {
            "dtype": self.dtype,
            "against float32 of": self.reference,
            "scope": self.scope,
            "correlation": statistics.mean(self.correlations),
            "lowest correlation": min(self.correlations),
            "error": statistics.mean(self.errors),
            "largest error": max(self.errors),
            "another token first": self.other_first,
            "prompts": len(self.errors),
        }

    @staticmethod
    def table(records: Sequence[Mapping[str, Any]]) -> str:
        """A Markdown table of several."""
        lines = [
            "| | | float32 of | rank correlation (lowest) | largest error, mean (highest) | another token first |",
            "|---|---|---|--:|--:|--:|",
        ]
        lines += [
            f"| {one.get('shape', '')} {one['dtype']} | {one['scope']} | {one['against float32 of']} | "
            f"{one['correlation']:.4f} ({one['lowest correlation']:.3f}) | "
            f"{100 * one['error']:.2g}% ({100 * one['largest error']:.2g}%) | "
            f"{one['another token first']} of {one['prompts']} |"
            for one in records
        ]
        return "\n".join(lines).replace("|  ", "| ")


def scores(model: Any, prompts: Sequence[Any], targets: Sequence[int] | None = None) -> list[dict[str, Tensor]]:
    """The scores of some scopes for each prompt, by name, in float64 on the CPU.

    Args:
        model: in any precision.
        prompts: texts or token ids.
        targets: what is explained after each prompt: half precision may find another token likeliest.
    """
    found = []
    for prompt, target in zip(prompts, targets or [3] * len(prompts), strict=True):
        lin = tls.linearize(model, prompt)
        scopes = {
            "Semantic Scope": tls.SemanticScope(target),
            "Temperature Scope": tls.TemperatureScope(),
            "Fisher Scope": tls.FisherScope(probes=32),  # its draws come from the tokens: the same in each precision
        }
        found.append({name: scope(lin).scores.cpu().double() for name, scope in scopes.items()})
    return found


def differences(
    dtype: torch.dtype, reference: str, half: Sequence[Mapping[str, Tensor]], whole: Sequence[Mapping[str, Tensor]]
) -> Iterator[Difference]:
    """What `scores` found in half precision against what it found in float32, scope by scope."""
    for scope in whole[0]:
        pairs = [(one[scope], other[scope]) for one, other in zip(half, whole, strict=True)]
        yield Difference(
            str(dtype).removeprefix("torch."),
            reference,
            scope,
            tuple(spearman(one, other) for one, other in pairs),
            tuple(float((one - other).abs().max() / other.max()) for one, other in pairs),
            sum(int(one.argmax()) != int(other.argmax()) for one, other in pairs),
        )


@torch.no_grad()
def rounded(model: Any, dtype: torch.dtype) -> Any:
    """The model with its weights rounded as a precision rounds them; it goes on computing in its own."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))
    return model


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", metavar="FOLDER", default=str(FOLDER))
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument("--into", type=Path, metavar="FILE")
    given = parser.parse_args()
    whole = models.load(given.folder)
    prompts = short_prompts(whole.tokenizer, given.count)
    with torch.no_grad():
        targets = [int(whole(torch.tensor([ids]))[0, -1].argmax()) for ids in prompts]
    loaded = scores(whole, prompts, targets)
    records = []
    for dtype in (torch.bfloat16, torch.float16):
        half = scores(models.load(given.folder, dtype=dtype), prompts, targets)
        same = scores(rounded(models.load(given.folder), dtype), prompts, targets)
        for reference, found in (("the weights as loaded", loaded), ("the rounded weights", same)):
            records += [one.record() for one in differences(dtype, reference, half, found)]
    print(f"{models.model_name(whole)}, {len(prompts)} prompts\n\n{Difference.table(records)}")
    if given.into:
        put_behind(given.into, "python -m tests.benchmarks.precision", Difference.table(records))


if __name__ == "__main__":
    main()
