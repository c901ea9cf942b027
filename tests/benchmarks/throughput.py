"""How many prompts a second: `attribute_many` beside captum and inseq, in batches of prompts of mixed lengths.

    python -m tests.benchmarks.throughput [FOLDER]

Each gives the norms of the gradient of the likeliest next token's logit for every prompt. captum and inseq run the
Hugging Face model, loaded from the same folder: captum's `Saliency` on batches that are filled up on the right, with an
attention mask, once in the order in which the prompts come, which is what captum's documentation shows, and once sorted
by length by hand, which is what `attribute_many` does by itself; inseq's `saliency` as its `attribute` makes batches,
of a token that is given and not the likeliest one, which costs the same.
Times are CPU time of the process on one thread, medians of rounds in which all take turns.
"""

import argparse
import copy
import random
import statistics
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import tl_scopes as tls
from tests.benchmarks.answers import PROMPT
from tests.benchmarks.rows import inseq_tokenizer
from tests.benchmarks.setting import hugging_face, in_turns
from tl_scopes import models
from tl_scopes.tiny import FOLDER

ROUNDS, BATCH, COUNT = 5, 8, 48


def ours(model: Any, prompts: Sequence[Any], size: int) -> Callable[[], object]:
    """Work that asks all prompts in batches."""
    return lambda: list(
        tls.attribute_many(model, prompts, tls.SemanticScope(), batch_size=size, progress=False, on_error="raise")
    )


def captum_batches(
    hf: Any, prompts: Sequence[Sequence[int]], size: int, by_length: bool = True
) -> Callable[[], list[Tensor]]:
    """The same by captum's `Saliency`, with the logits of every position, as the model gives them when it is called."""
    from captum.attr import Saliency

    embed = hf.get_input_embeddings()
    order = list(range(len(prompts)))
    if by_length:
        order.sort(key=lambda i: len(prompts[i]), reverse=True)
    batches = [[torch.tensor(prompts[i]) for i in order[start : start + size]] for start in range(0, len(order), size)]

    def likeliest(embeddings: Tensor, mask: Tensor) -> Tensor:
        logits = hf(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).logits
        return logits[torch.arange(len(mask), device=hf.device), mask.sum(1) - 1].max(dim=-1).values

    method = Saliency(likeliest)

    def work() -> list[Tensor]:
        found = []
        for batch in batches:
            ids = pad_sequence(batch, batch_first=True).to(hf.device)
            mask = pad_sequence([torch.ones_like(one) for one in batch], batch_first=True).to(hf.device)
            embeddings = embed(ids).detach().requires_grad_()
            gradient = method.attribute(embeddings, abs=False, additional_forward_args=(mask,))
            found += [of_one.norm(dim=-1)[: len(ids)] for of_one, ids in zip(gradient, batch, strict=True)]
        return [found[order.index(i)].detach() for i in range(len(prompts))]

    return work


def inseq_batches(hf: Any, prompts: Sequence[Sequence[int]], size: int, tokenizer: Any = None) -> Callable[[], object]:
    """The same by inseq's `saliency`, which takes text; the token that is explained is given."""
    import inseq

    if tokenizer is None:
        tokenizer = inseq_tokenizer(hf.config.vocab_size)
        texts = [" ".join(f"w{id}" for id in ids) for ids in prompts]
        whole = [f"{text} w3" for text in texts]
    else:
        texts = [tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in prompts]
        whole = [f"{text} is" for text in texts]
    model = inseq.load_model(hf, "saliency", tokenizer=tokenizer, device=str(hf.device))
    quiet = {"show_progress": False, "pretty_progress": False}
    return lambda: model.attribute(texts, whole, attributed_fn="logit", batch_size=size, **quiet)


def short_prompts(tokenizer: Any, count: int) -> list[list[int]]:
    """Token ids of prompts of 6 to 40 tokens, in an order of chance."""
    ids = tokenizer.encode(PROMPT * 4)
    lengths = torch.linspace(6, 40, count).round().int().tolist()
    random.Random(0).shuffle(lengths)
    return [ids[start % 40 :][:length] for start, length in enumerate(lengths)]


def main() -> None:
    """Print prompts a second, and how many times as many as the others ours are."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", metavar="FOLDER", default=str(FOLDER))
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    given = parser.parse_args()
    model = models.load(given.folder)
    hf = hugging_face(given.folder)
    prompts = short_prompts(model.tokenizer, given.count)
    lengths = [len(ids) for ids in prompts]
    work = {"attribute_many": ours(model, prompts, given.batch)}
    if find_spec("captum"):
        work["captum Saliency, in the order given"] = captum_batches(hf, prompts, given.batch, by_length=False)
        work["captum Saliency, sorted by length"] = captum_batches(hf, prompts, given.batch)
    if find_spec("inseq"):
        work["inseq saliency"] = inseq_batches(copy.deepcopy(hf), prompts, given.batch, model.tokenizer)
    times = in_turns(work, given.rounds)
    print(
        f"{models.model_name(model)}, {len(prompts)} prompts of {min(lengths)} to {max(lengths)} tokens, batches of "
        f"{given.batch}, {given.rounds} rounds after one to warm up\n"
    )
    print("| | prompts a second | attribute_many is faster by | lowest to highest |\n|---|--:|--:|--:|")
    for name, seconds in times.items():
        ratios = sorted(other / own for other, own in zip(seconds, times["attribute_many"], strict=True))
        rate = len(prompts) / statistics.median(seconds)
        print(f"| {name} | {rate:.2f} | {statistics.median(ratios):.2f} | {ratios[0]:.2f} to {ratios[-1]:.2f} |")


if __name__ == "__main__":
    main()
