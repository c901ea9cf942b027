"""What Semantic Scope costs beside the same gradient written by hand: `python -m tests.benchmarks.by_hand [FOLDER]`.

By hand is `torch.autograd.grad` through the Hugging Face model with frozen weights, eager attention and no cache, and
with the logits of the last position alone; and the same through the hooks of TransformerLens' model, which is what that
library's own forward pass costs. FOLDER is a model that `models.load` takes; without it the random Llama
of the other benchmarks is taken. CPU time of the process on one thread, 128 tokens; medians, in brackets the fastest
rounds.
"""

import argparse
import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch

import tl_scopes as tls
from tests.benchmarks.answers import PROMPT
from tests.benchmarks.setting import hugging_face, in_turns, setting
from tl_scopes import models


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", metavar="FOLDER")
    parser.add_argument("--rounds", type=int, default=20)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.folder:
        loaded, frozen = models.load(given.folder), models.load(given.folder)
        inner, ids = hugging_face(given.folder), loaded.to_tokens(PROMPT * 8)[0][:128]
    else:
        loaded, frozen = setting().model, copy.deepcopy(setting().model)
        inner, ids = setting().hf, setting().tokens[0]
    for name, (median, fastest) in measured(loaded, frozen, inner, ids, given.rounds).items():
        print(f"| {name} | {median:.2f} ({fastest:.2f}) |")


def measured(loaded: Any, frozen: Any, inner: Any, ids: torch.Tensor, rounds: int) -> dict[str, tuple[float, float]]:
    """The median and the fastest round of each way, in those of the gradient by hand."""
    inner.requires_grad_(False)

    def by_hand(**options: int) -> object:
        embedded = inner.get_input_embeddings()(ids[None]).detach().requires_grad_()
        logits = inner(inputs_embeds=embedded, use_cache=False, **options).logits[0, -1]
        return torch.autograd.grad(logits.max(), embedded)

    def through_hooks() -> object:
        entered: list[torch.Tensor] = []

        def enter(value: torch.Tensor, hook: Any) -> torch.Tensor:
            entered.append(value.detach().requires_grad_())
            return entered[0]

        def last(value: torch.Tensor, hook: Any) -> torch.Tensor:
            return value[:, -1:]

        with frozen.hooks(fwd_hooks=[("hook_embed", enter), ("unembed.hook_in", last)]):
            logits = frozen(ids[None], return_type="logits")[0, -1]
        return torch.autograd.grad(logits.max(), entered)

    scope = tls.SemanticScope()
    ways: dict[str, Callable[[], object]] = {
        "by hand": lambda: by_hand(logits_to_keep=1),
        "by hand, logits of every position": by_hand,
        "by hand through TransformerLens' hooks, frozen": through_hooks,
        "Semantic Scope, the model loaded as usual": lambda: tls.attribute(loaded, ids, scope),
        "Semantic Scope, frozen before": lambda: tls.attribute(frozen, ids, scope),
    }
    frozen.requires_grad_(False)
    seconds = in_turns(ways, rounds)
    hand = seconds["by hand"]
    return {
        name: (statistics.median(some) / statistics.median(hand), min(some) / min(hand))
        for name, some in seconds.items()
    }


if __name__ == "__main__":
    main()
