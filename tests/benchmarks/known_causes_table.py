"""The tables of methods in docs/evidence.md: `python -m tests.benchmarks.known_causes_table --into docs/evidence.md`.

With `--model FOLDER` they are of that model: by causes that are known, of English prompts, and by deletion on natural
prompts. Without it they are of the bundled model, by the causes of its tasks. Without `--into` all tables are printed.

Further scopes take part with `--also module:METHODS`, a dict of functions as in `METHODS`.
"""

import argparse
import importlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

import tl_scopes as tls
from tl_scopes import models
from tl_scopes.faithfulness import Perturbation, differences, summary
from tl_scopes.faithfulness.english import KINDS
from tl_scopes.faithfulness.known_causes import MEASURES, Known, known_causes
from tl_scopes.scopes.baselines import (
    AttentionRollout,
    GradientTimesInput,
    IntegratedGradients,
    LeaveOneOut,
    RandomBaseline,
)
from tl_scopes.tiny.counterfactuals import TASKS

if TYPE_CHECKING:
    import pandas as pd

BEGIN, END = "<!-- known causes: begin -->", "<!-- known causes: end -->"
"""The marks around the table of the bundled model in a page."""
REAL_BEGIN, REAL_END = "<!-- real model: begin -->", "<!-- real model: end -->"
"""The marks around the table of a real model in a page."""

NATURAL = Path(__file__).with_name("natural.json")
"""Prompts of 20 to 40 tokens, written for this, each broken off before a word that can be guessed."""
DELETION = Perturbation(("zero",), fractions=(0.05, 0.1, 0.2), steps=1, samples=0, randomise=False)
"""Embeddings set to zero, the first 5%, 10% and 20% of the tokens, as in the paper."""

_SHOWN, _REFERENCE = "average precision", "Semantic"

Method: TypeAlias = Callable[[Known | None], tls.Scope]
"""Makes a scope that asks for an example's answer against its foil; or, without an example, for the likeliest token."""


def _versus(kind: Callable[..., tls.Scope], **options: Any) -> Method:
    def made(example: Known | None) -> tls.Scope:
        asked = {} if example is None else {"target": example.target, "versus": example.foil}
        return kind(**asked, **options)

    return made


def _about_answer(kind: Callable[..., tls.Scope], **options: Any) -> Method:
    def made(example: Known | None) -> tls.Scope:
        return kind(**({} if example is None else {"target": example.target}), **options)

    return made


def _around(around: Callable[[tls.Scope], tls.Scope], method: Method) -> Method:
    return lambda example: around(method(example))


SEMANTIC = _versus(tls.SemanticScope)
METHODS: dict[str, Method] = {
    "Semantic": SEMANTIC,
    "Semantic, log_prob": _about_answer(tls.SemanticScope, quantity="log_prob"),
    "Temperature": lambda _: tls.TemperatureScope(),
    "Fisher": lambda _: tls.FisherScope(),
    "position corrected": _around(tls.PositionCorrectedScope, SEMANTIC),
    "frozen attention": _around(tls.FrozenAttentionScope, SEMANTIC),
    "gradient x input": _versus(GradientTimesInput),
    "integrated gradients": _versus(IntegratedGradients, steps=16),
    "leave-one-out": lambda _: LeaveOneOut(),
    "attention rollout": lambda _: AttentionRollout(),
    "random": lambda _: RandomBaseline(),
}
"""What is compared on a real model. All but log_prob, Fisher, Temperature and the last three compare with the foil.

What is asked under rules stands in `rules_table.py`.
"""


def to_markdown(results: "pd.DataFrame", measure: str, reference: str | None = None) -> str:
    """Write one measure as a Markdown table of means with their 95% intervals.

    There is a row per scope, a column per task, one for all examples, and with a `reference` a last one with the paired
    difference to that scope over all examples.
    """
    chosen = results[results["measure"] == measure]
    everything = chosen.assign(prompt=chosen.groupby(["task", "prompt"], sort=False).ngroup(), task="all", examples=0)
    columns = [chosen] if chosen["task"].nunique() == 1 else [chosen, everything]
    cells = {
        (row.scope, row.task): f"{mean:.2f} ({row.low:.2f} to {row.high:.2f})"
        for table in map(summary, columns)
        for row, mean in zip(table.itertuples(), table["mean"], strict=True)
    }
    heads = list(dict.fromkeys(task for _, task in cells))
    if reference is not None:
        head = f"all, less `{reference}`"
        heads.append(head)
        cells |= {(name, head): text for name, text in _less(everything, reference).items()}
    lines = [f"| {measure} | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    scopes = dict.fromkeys(scope for scope, _ in cells)
    lines += [f"| `{scope}` | {' | '.join(cells.get((scope, head), '') for head in heads)} |" for scope in scopes]
    return "\n".join(lines)


def _less(results: "pd.DataFrame", reference: str) -> dict[str, str]:
    """The paired difference of each scope to the reference, with its interval."""
    return {
        str(row.scope): f"{row.difference:+.2f} ({row.low:+.2f} to {row.high:+.2f})"
        for row in differences(results, reference).itertuples()
    }


def confirmed(results: "pd.DataFrame") -> str:
    """Say in a sentence how many examples were confirmed."""
    counts = results.groupby(["task", "examples"], sort=False)["prompt"].nunique()
    return "Confirmed: " + ", ".join(f"{task} {n} of {drawn}" for (task, drawn), n in counts.items()) + "."


def by_causes(
    model: models.Model, methods: Mapping[str, Method], kinds: Iterable[str], options: argparse.Namespace
) -> "pd.DataFrame":
    """What `known_causes` finds, kind by kind; what stands in the folder `options.keep` is not found again."""
    import pandas as pd

    found = []
    for kind in kinds:
        file = options.keep and options.keep / f"{kind}.csv"
        if file and file.exists():
            found.append(pd.read_csv(file))
            continue
        found.append(known_causes(model, [kind], options.count or 10, methods, seed=options.seed, bos=options.bos))
        if file:
            found[-1].to_csv(file, index=False)
    return pd.concat(found, ignore_index=True)


def deleted(
    model: models.Model, methods: Mapping[str, Method], prompts: Iterable[str], path: Path | None = None
) -> "pd.DataFrame":
    """What taking the first 5%, 10% and 20% of the tokens takes from log p of the likeliest next token: their mean."""
    scopes = {name: method(None) for name, method in methods.items()}
    results = tls.evaluate(model, prompts, scopes, DELETION, path=path)
    drops = results[
        (results.measure == "deletion") & (results.quantity == "log_prob") & results.fraction.between(0.01, 0.5)
    ]
    means = drops.groupby(["prompt", "scope"], sort=False)["value"].mean().reset_index()
    return means.assign(measure="nats taken", task="natural", examples=0)


def of_a_real_model(causes: "pd.DataFrame", deletion: "pd.DataFrame") -> str:
    """One table of both judges: the average precision of each kind and of all, and nats taken by deletion."""
    chosen = causes[causes["measure"] == _SHOWN]
    everything = chosen.assign(prompt=chosen.groupby(["task", "prompt"], sort=False).ngroup(), task="all", examples=0)
    by_kind = chosen.groupby(["scope", "task"], sort=False)["value"].mean()
    mean, nats = (
        {row.scope: (value, row) for row, value in zip(table.itertuples(), table["mean"], strict=True)}
        for table in (summary(everything), summary(deletion))
    )
    less = (_less(everything, _REFERENCE), _less(deletion, _REFERENCE))
    kinds, prompts = list(dict.fromkeys(chosen["task"])), deletion["prompt"].nunique()
    lines = [
        f"| | {' | '.join(kinds)} | all | all, less {_REFERENCE} | nats taken | less {_REFERENCE} |",
        "|---" * (len(kinds) + 5) + "|",
    ]
    for name in dict.fromkeys(chosen["scope"]):
        cells = [f"{by_kind[name, kind]:.2f}" for kind in kinds]
        cells += [f"{mean[name][0]:.2f}", less[0].get(name, ""), f"{nats[name][0]:.2f}", less[1].get(name, "")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + f"\n\n{confirmed(causes)} Deletion: {prompts} prompts."


def page_with_marks(path: Path, begin: str = BEGIN, end: str = END) -> str:
    """Read a page, and refuse one that has no place for the table."""
    page = path.read_text(encoding="utf-8")
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"{str(path)!r} has no place for the table: put the lines {begin} and {end} into it.")
    return page


def put_into(path: Path, text: str, begin: str = BEGIN, end: str = END) -> None:
    """Replace what stands between the marks of a page."""
    page = page_with_marks(path, begin, end)
    page = re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n{text}\n{end}", page, flags=re.DOTALL)
    path.write_text(page, encoding="utf-8")


def methods(also: str | None, only: Iterable[str] | None) -> dict[str, Method]:
    """The methods to compare: ours, and those of `module:NAME`; or only some of them."""
    found = dict(METHODS)
    if also is not None:
        module, _, name = also.partition(":")
        found |= getattr(importlib.import_module(module), name or "METHODS")
    chosen = found if only is None else {name: found[name] for name in only}
    return {_REFERENCE: SEMANTIC} | chosen


def _real(options: argparse.Namespace) -> None:
    model = models.load(options.model, device="cpu")
    chosen = methods(options.also, options.only)
    if options.keep:
        options.keep.mkdir(parents=True, exist_ok=True)
    causes = by_causes(model, chosen, options.tasks or KINDS, options)
    print("\n\n".join(to_markdown(causes, measure, _REFERENCE) for measure in MEASURES), flush=True)
    prompts = json.loads(NATURAL.read_text(encoding="utf-8"))[: options.prompts]
    deletion = deleted(model, chosen, prompts, options.keep and options.keep / "deletion.jsonl")
    table = of_a_real_model(causes, deletion)
    print(f"\n{table}")
    if options.into:
        put_into(options.into, table, REAL_BEGIN, REAL_END)


def main() -> None:
    """Print the tables of a model, or put the main one into a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", help="a folder that save_pretrained wrote; else the bundled model is taken")
    parser.add_argument("--count", type=int, help="examples per task; by default 100, and 10 with --model")
    parser.add_argument("--tasks", nargs="+", choices=[*TASKS, *KINDS])
    parser.add_argument("--also", help="further methods for --model, as module:NAME of a dict such as METHODS")
    parser.add_argument("--only", nargs="+", help="the methods for --model, by name")
    parser.add_argument("--keep", type=Path, help="a folder for the results of --model, to go on where it stopped")
    parser.add_argument("--prompts", type=int, default=16, help="natural prompts for --model")
    parser.add_argument("--seed", type=int, default=0, help="seed of the examples")
    parser.add_argument("--bos", action="store_true", help="rank the BOS token as well")
    parser.add_argument("--into", type=Path, help=f"a page to put the {_SHOWN} into, between {BEGIN} and {END}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.into:  # before twenty minutes of work
        page_with_marks(options.into, *((REAL_BEGIN, REAL_END) if options.model else (BEGIN, END)))
    if options.model:
        _real(options)
        return
    tasks = options.tasks or TASKS
    results = known_causes(tasks=tasks, count=options.count or 100, seed=options.seed, bos=options.bos)
    tables = {measure: to_markdown(results, measure, "SemanticScope(versus=foil)") for measure in MEASURES}
    print("\n\n".join([confirmed(results), *tables.values()]))
    if options.into:
        put_into(options.into, f"{tables[_SHOWN]}\n\n{confirmed(results)}")


if __name__ == "__main__":
    main()
