"""What a question costs in forward passes: `python -m tests.benchmarks.passes FOLDER [--into docs/costs.md]`.

The unit is a bare forward pass of the Hugging Face model, with eager attention, without a cache and with the logits of
every position, that takes its turn in each round. FOLDER is a model that `models.load` takes; without it the bundled
model is taken. CPU time of the process on one thread, with a short prompt and a long one; medians.
"""

import argparse
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import tl_scopes as tls
from tests.benchmarks.answers import PROMPT, put_behind
from tests.benchmarks.setting import hugging_face, in_turns
from tl_scopes import models
from tl_scopes.tiny import FOLDER

LENGTHS = {24: 9, 162: 5}
"""How many rounds there are for each number of tokens."""


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", metavar="FOLDER", default=str(FOLDER))
    parser.add_argument("--into", type=Path, metavar="FILE")
    given = parser.parse_args()
    model, inner = models.load(given.folder), hugging_face(given.folder)
    ids = model.to_tokens(PROMPT * 10)[0]
    found = {tokens: measured(model, inner, ids[:tokens], rounds) for tokens, rounds in LENGTHS.items()}
    print(f"{models.model_name(model)}\n\n{table(found)}")
    if given.into:
        put_behind(given.into, "python -m tests.benchmarks.passes", table(found))


def measured(model: Any, inner: Any, ids: torch.Tensor, rounds: int) -> dict[str, float]:
    """The median cost of each question about a prompt, in forward passes."""
    lin = tls.linearize(model, ids)

    def bare() -> None:
        with torch.no_grad():
            inner(ids[None], use_cache=False)

    ways: dict[str, Callable[[], object]] = {
        "bare": bare,
        "Semantic Scope": lambda: tls.attribute(model, ids, tls.SemanticScope()),
        "`FisherScope()`": lambda: tls.attribute(model, ids, tls.FisherScope()),
        "`FisherScope(rank=1)`": lambda: tls.attribute(model, ids, tls.FisherScope(rank=1)),
        "`tls.check` of a Semantic Scope that is linearised": lambda: tls.check(lin, tls.SemanticScope()),
    }
    seconds = {name: statistics.median(some) for name, some in in_turns(ways, rounds).items()}
    unit = seconds.pop("bare")
    return {name: some / unit for name, some in seconds.items()}


def table(found: Mapping[int, Mapping[str, float]]) -> str:
    """A Markdown table with a column for each number of tokens."""
    lines = [
        f"| forward passes | {' | '.join(f'{tokens} tokens' for tokens in found)} |",
        "|---|" + "--:|" * len(found),
    ]
    names = next(iter(found.values()))
    lines += [f"| {name} | {' | '.join(f'{column[name]:.2g}' for column in found.values())} |" for name in names]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
