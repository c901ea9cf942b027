"""What it costs to explain an answer of 1, 8 and 32 tokens, beside captum and inseq, on one model in one run.

    python -m tests.benchmarks.answers [FOLDER]

All of them give the gradient of each answer token's log-probability, or of their sum, with respect to the prompt. Times
are medians, in forward passes of the Hugging Face model over prompt and answer without a graph; the order of the rows
is shuffled in every round, so that a slow moment of the machine hits all of them. FOLDER is a model in Hugging Face's
layout; without it the bundled one is taken.
"""

import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

import tl_scopes as tls
from tl_scopes import models

ROUNDS = 7
PROMPT = "The capital of France is a city on a river, and many people who have been there say that it is beautiful. "


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    model: Any = models.load(sys.argv[1]) if len(sys.argv) > 1 else tls.load_tiny()
    model.requires_grad_(False)
    inner = model.original_model
    ids = model.to_tokens(PROMPT * 4)[0][:96]
    print(f"{models.model_name(model)}, prompt of {len(ids)} tokens, {ROUNDS} rounds, medians in forward passes")
    rows: dict[str, list[str]] = {}
    for count in (1, 8, 32):
        said = [int(id) for id in ids[10 : 10 + count]]
        found = measured(ways(model, inner, ids, said))
        base = found.pop("forward pass")
        for name, seconds in found.items():
            rows.setdefault(name, []).append(f"{seconds / base:.2f}")
        rows.setdefault("one forward pass, in ms", []).append(f"{1000 * base:.0f}")
    print("| | 1 token | 8 tokens | 32 tokens |\n|---|---:|---:|---:|")
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join(cells)} |")


def ways(model: Any, inner: Any, ids: torch.Tensor, said: list[int]) -> dict[str, Callable[[], object]]:
    """What is measured, by name."""
    text = torch.cat([ids, torch.tensor(said)])[None]
    scope = tls.SemanticScope(quantity="log_prob")

    def plain() -> object:
        embedded = inner.get_input_embeddings()(text[:, :-1]).detach().requires_grad_()
        logits = inner(inputs_embeds=embedded, use_cache=False).logits[0, len(ids) - 1 :]
        total = logits.log_softmax(-1).gather(-1, torch.tensor(said)[:, None]).sum()
        return torch.autograd.grad(total, embedded)

    def bare() -> object:
        with torch.no_grad():
            return inner(text[:, :-1], use_cache=False)

    found: dict[str, Callable[[], object]] = {
        "forward pass": bare,
        "a gradient written by hand": plain,
        "the whole answer: `attribute(..., answer=)`": lambda: tls.attribute(model, ids, scope, answer=said),
        "a row for each token: `answer_map`": lambda: tls.answer_map(model, ids, said, scope),
    }
    if find_spec("captum"):
        found["captum `LLMGradientAttribution`, gradient × activation"] = captum_rows(model, inner, ids, said)
    if find_spec("inseq"):
        found["inseq `saliency` of the log-probability"] = inseq_rows(model, inner, ids, said)
    return found


def captum_rows(model: Any, inner: Any, ids: torch.Tensor, said: list[int]) -> Callable[[], object]:
    """A forward and a backward pass for each token of the answer."""
    from captum.attr import LayerGradientXActivation, LLMGradientAttribution, TextTokenInput

    text = model.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    attribution = LLMGradientAttribution(LayerGradientXActivation(inner, inner.get_input_embeddings()), model.tokenizer)
    prompt = TextTokenInput(text, model.tokenizer, skip_tokens=[])
    return lambda: attribution.attribute(prompt, target=torch.tensor(said))


def inseq_rows(model: Any, inner: Any, ids: torch.Tensor, said: list[int]) -> Callable[[], object]:
    """The same by inseq, which takes text."""
    import inseq

    wrapped = inseq.load_model(inner, "saliency", tokenizer=model.tokenizer)
    decode = partial(model.tokenizer.decode, clean_up_tokenization_spaces=False, skip_special_tokens=True)
    prompt, whole = decode(ids), decode([*ids.tolist(), *said])
    quiet = {"show_progress": False, "pretty_progress": False}
    return lambda: wrapped.attribute(prompt, whole, attributed_fn="logit", **quiet)


def measured(work: dict[str, Callable[[], object]]) -> dict[str, float]:
    """The median seconds of each."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(ROUNDS + 1):
        for name in random.sample(list(work), len(work)):
            start = time.perf_counter()
            work[name]()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}


if __name__ == "__main__":
    main()
