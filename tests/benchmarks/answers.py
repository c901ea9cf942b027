"""What it costs to explain an answer of 1, 8 and 32 tokens, beside captum and inseq, on one model in one run.

    python -m tests.benchmarks.answers [FOLDER] [--into docs/answers.md]

All of them give the gradient of each answer token's log-probability, or of their sum, with respect to the prompt. The
unit is a bare forward pass: the Hugging Face model called with `use_cache=False` under `torch.no_grad` on the prompt
and the answer but for its last token, which is what all of the others run too, with the logits of every position. Times
are medians of CPU time of the process, on one thread; the order of the rows is shuffled in every round, so that a slow
moment of the machine hits all of them. FOLDER is a model in Hugging Face's layout; without it the bundled one is taken.
`--into` writes the table to where the file has the last one, behind the line that names this command.
"""

import argparse
import copy
import statistics
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import tl_scopes as tls
from tests.benchmarks.setting import hugging_face, in_turns
from tl_scopes import models
from tl_scopes.tiny import FOLDER

ROUNDS, COUNTS = 5, (1, 8, 32)
MAP = "a row for each token: `answer_map`"
PROMPT = "The capital of France is a city on a river, and many people who have been there say that it is beautiful. "


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", metavar="FOLDER", default=str(FOLDER))
    parser.add_argument("--into", type=Path, metavar="FILE")
    given = parser.parse_args()
    model: Any = models.load(given.folder)
    model.requires_grad_(False)
    inner = hugging_face(given.folder)
    ids = model.to_tokens(PROMPT * 4)[0][:96]
    print(f"{models.model_name(model)}, prompt of {len(ids)} tokens, {ROUNDS} rounds, medians in forward passes")
    rows: dict[str, list[str]] = {}
    for count in COUNTS:
        said = [int(id) for id in ids[10 : 10 + count]]
        found = {
            name: statistics.median(some) for name, some in in_turns(ways(model, inner, ids, said), ROUNDS).items()
        }
        base, linearised = found.pop("forward pass"), found.pop("linearize")
        for name, seconds in found.items():
            rows.setdefault(name, []).append(f"{seconds / base:.2f}")
            if name == MAP:
                rows.setdefault("of which each row", []).append(f"{(seconds - linearised) / base / count:.2f}")
        rows.setdefault("*a bare forward pass, in ms*", []).append(f"{1000 * base:.0f}")
        print(f"{count}: done", file=sys.stderr)
    lines = ["| | 1 token | 8 tokens | 32 tokens |", "|---|--:|--:|--:|"]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    print(*lines, sep="\n")
    if given.into:
        put_behind(given.into, "python -m tests.benchmarks.answers", "\n".join(lines))


def put_behind(path: Path, command: str, table: str) -> None:
    """Put a table in the place of the first one behind the name of a command, in a page."""
    text = path.read_text(encoding="utf-8")
    start = text.index("\n|", text.index(command)) + 1
    path.write_text(text[:start] + table + text[text.index("\n\n", start) :], encoding="utf-8")


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
        "linearize": lambda: tls.linearize(model, ids, answer=said),
        MAP: lambda: tls.answer_map(model, ids, said, scope),
    }
    if find_spec("captum"):
        found["captum `LLMGradientAttribution`, gradient × activation"] = captum_rows(model, inner, ids, said)
    if find_spec("inseq"):
        found["inseq `saliency`, of each logit"] = inseq_rows(model, copy.deepcopy(inner), ids, said)
    return found


def captum_rows(model: Any, inner: Any, ids: torch.Tensor, said: list[int]) -> Callable[[], object]:
    """A forward and a backward pass for each token of the answer."""
    from captum.attr import LayerGradientXActivation, LLMGradientAttribution, TextTokenInput

    text = model.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    attribution = LLMGradientAttribution(LayerGradientXActivation(inner, inner.get_input_embeddings()), model.tokenizer)
    prompt = TextTokenInput(text, model.tokenizer, skip_tokens=[])
    return lambda: attribution.attribute(prompt, target=torch.tensor(said))


def inseq_rows(model: Any, inner: Any, ids: torch.Tensor, said: list[int]) -> Callable[[], object]:
    """The gradient of each logit by inseq, which takes text; its cross entropy fails for answers of one token."""
    import inseq

    wrapped = inseq.load_model(inner, "saliency", tokenizer=model.tokenizer)
    decode = partial(model.tokenizer.decode, clean_up_tokenization_spaces=False, skip_special_tokens=True)
    prompt, whole = decode(ids), decode([*ids.tolist(), *said])
    quiet = {"show_progress": False, "pretty_progress": False}
    return lambda: wrapped.attribute(prompt, whole, attributed_fn="logit", **quiet)


if __name__ == "__main__":
    main()
