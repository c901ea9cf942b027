"""Do scopes find known causes, and what do they take by deletion? The tables of docs/evidence.md and docs/decided.md.

    python -m tests.benchmarks.known_causes_table [--into docs/evidence.md]
    python -m tests.benchmarks.known_causes_table --model FOLDER [--into docs/evidence.md docs/decided.md]
    python -m tests.benchmarks.known_causes_table --stored [--into docs/evidence.md docs/decided.md]

The first is about the bundled model, by the causes of its tasks, and takes some twenty minutes; the second about a real
one, by causes of English prompts that are known, and by deletion on natural prompts, with our scopes and baselines, and
with what is asked under rules (`rules_table`): for SmolLM2-135M-Instruct some forty minutes on one core.

What is found at every prompt is stored in `tests/data/known_causes_bundled.json` and `known_causes_real.json` (`--file`
names another), and what stands there already is not measured again (`--anew` does), so that a run that was stopped goes
on. The tables are made from there; `--stored` measures nothing. Further scopes take part with `--also module:METHODS`,
a dict of functions as in `METHODS`; a page takes ours alone.

Command: python -m tests.real.model && python -m tests.benchmarks.known_causes_table --model tests/real/.model
"""

import argparse
import importlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

import tl_scopes as tls
from tests.benchmarks.stored import DATA, made, page_with_marks, put_into, read, rounded, started, with_ends, write
from tl_scopes import models
from tl_scopes.faithfulness import KnownCause, Perturbation, differences, summary
from tl_scopes.faithfulness.english import KINDS, english
from tl_scopes.faithfulness.known_causes import MEASURES, Known, _drawn, all_scopes, known_causes
from tl_scopes.scopes.baselines import (
    AttentionRollout,
    GradientTimesInput,
    IntegratedGradients,
    LeaveOneOut,
    RandomBaseline,
)
from tl_scopes.scopes.written import as_written
from tl_scopes.tiny.counterfactuals import TASKS
from tl_scopes.tiny.tasks import examples as held_out

if TYPE_CHECKING:
    import pandas as pd

BUNDLED_FILE, REAL_FILE = DATA / "known_causes_bundled.json", DATA / "known_causes_real.json"
BEGIN, END = "<!-- known causes: begin -->", "<!-- known causes: end -->"
"""The marks around the table of the bundled model in a page."""
REAL_BEGIN, REAL_END = "<!-- real model: begin -->", "<!-- real model: end -->"
"""The marks around the table of a real model in a page."""
RULES_BEGIN, RULES_END = "<!-- rules: begin -->", "<!-- rules: end -->"
"""The marks around the table of what rules do, of the same model."""

NATURAL = Path(__file__).with_name("natural.json")
"""Prompts of 20 to 40 tokens, written for this, each broken off before a word that can be guessed."""
DELETION = Perturbation(("zero",), steps=1, samples=0, randomise=False)
"""Embeddings set to zero, the first 5%, 10% and 20% of the tokens, as in the paper."""

_SHOWN, _REFERENCE, _BUNDLED_REFERENCE = "average precision", "Semantic", "SemanticScope(versus=foil)"

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

UNDER_RULES = {
    "Semantic": "`SemanticScope`, the norm of the gradient",
    "Semantic, linear": 'the same under "linear"',
    "Semantic, lookup": 'the same under "lookup"',
    "relevance, linear": '`RelevanceScope` under "linear", with its sign',
    "relevance, lookup": '`RelevanceScope` under "lookup", with its sign',
    "sizes, linear": 'its sizes alone (`GradientTimesInput`) under "linear"',
    "sizes, lookup": 'its sizes alone under "lookup"',
    "relevance, baseline prompt, linear": '`RelevanceScope(baseline="prompt")` under "linear"',
    "relevance, baseline prompt, lookup": '`RelevanceScope(baseline="prompt")` under "lookup"',
    "gradient x input": "gradient times input, without rules",
    "leave-one-out": "leave-one-out, a forward pass for each token",
    "integrated gradients": "integrated gradients, 16 points",
    "random": "random",
}
"""The rows of the table of rules, and what it calls them."""

BUNDLED_RULES = (
    "Semantic, lookup",
    "Semantic, no attention rule",
    "sizes, linear",
    "sizes, lookup",
    "relevance, baseline prompt, linear",
    "relevance, baseline prompt, lookup",
)
"""What else the bundled model is asked under rules, of which docs/decided.md tells: methods of `rules_table`."""


def to_markdown(results: "pd.DataFrame", measure: str, reference: str | None = None) -> str:
    """Write one measure as a Markdown table of means with their 95% intervals.

    There is a row per scope, a column per task, one for all examples, and with a `reference` a last one with the paired
    difference to that scope over all examples.
    """
    chosen = results[results["measure"] == measure]
    everything = _everything(chosen)
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


def _everything(causes: "pd.DataFrame") -> "pd.DataFrame":
    """The prompts of all tasks as those of one."""
    return causes.assign(prompt=causes.groupby(["task", "prompt"], sort=False).ngroup(), task="all", examples=0)


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


# -- what is measured and stored --------------------------------------------------------------------------------------


def written(asker: "tls.Scope | Callable[..., tls.Scope]") -> str:
    """The scope that a method makes, as it is written in Python: of an example, where it takes one."""
    example = KnownCause("the cause", "the answer", "the other", causes="cause", counterfactual="the reason")
    return as_written(asker if isinstance(asker, tls.Scope) else asker(example))


def by_causes(
    model: models.Model,
    methods: "Mapping[str, Any]",
    tasks: Iterable[str],
    options: argparse.Namespace,
    stored: dict[str, Any],
) -> "Iterator[pd.DataFrame]":
    """Fill in what `known_causes` finds, task by task, and give what was found now, with all of its measures."""
    for task in tasks:
        record = stored["tasks"].setdefault(task, {"drawn": options.count, "values": {}})
        missing = {name: method for name, method in methods.items() if name not in record["values"]}
        if not missing:
            continue
        found = known_causes(model, [task], options.count, missing, seed=options.seed, bos=options.bos)
        chosen = found[found["measure"] == _SHOWN]
        drawn = _examples(task, options.count, options.seed)
        record |= {"drawn": int(found["examples"].iloc[0]), "examples": found["prompt"].unique().tolist()}
        record["prompts"] = [drawn[i].prompt for i in record["examples"]]
        for name, rows in chosen.groupby("scope", sort=False):
            record["values"][name] = [rounded(value) for value in rows["value"]]
        write(options.file, stored)
        yield found


def _examples(task: str, count: int, seed: int) -> Sequence[Known]:
    """What `known_causes` draws."""
    return _drawn(english(task), count, seed) if task in KINDS else held_out(task, count, seed=seed)


def by_deletion(
    model: models.Model, methods: Mapping[str, Method], prompts: list[str], path: Path, stored: dict[str, Any]
) -> None:
    """Fill in what deletion takes, method by method."""
    record = stored.setdefault("natural", {"prompts": prompts, "values": {}})
    for name in [name for name in methods if name not in record["values"]]:
        found = deleted(model, {name: methods[name]}, prompts)
        record["values"][name] = [rounded(value) for value in found.sort_values("prompt")["value"]]
        write(path, stored)
        print(f"deletion: {name}", flush=True)


def causes_of(stored: Mapping[str, Any], only: Iterable[str] | None = None) -> "pd.DataFrame":
    """What is stored of known causes, as `known_causes` returns it: its average precision alone."""
    import pandas as pd

    rows = [
        (task, record["drawn"], prompt, name, _SHOWN, value)
        for task, record in stored["tasks"].items()
        for name in (record["values"] if only is None else only)
        for prompt, value in zip(record["examples"], record["values"][name], strict=True)
    ]
    return pd.DataFrame(rows, columns=["task", "examples", "prompt", "scope", "measure", "value"])


def deletion_of(stored: Mapping[str, Any], only: Iterable[str] | None = None) -> "pd.DataFrame":
    """What is stored of deletion, as `deleted` returns it."""
    import pandas as pd

    record = stored["natural"]
    rows = [
        (prompt, name, value, "nats taken", "natural", 0)
        for name in (record["values"] if only is None else only)
        for prompt, value in enumerate(record["values"][name])
    ]
    return pd.DataFrame(rows, columns=["prompt", "scope", "value", "measure", "task", "examples"])


def deleted(model: models.Model, methods: Mapping[str, Method], prompts: Iterable[str]) -> "pd.DataFrame":
    """What taking the first 5%, 10% and 20% of the tokens takes from log p of the likeliest next token: their mean."""
    scopes = {name: method(None) for name, method in methods.items()}
    results = tls.evaluate(model, prompts, scopes, DELETION)
    drops = results[
        (results.measure == "deletion") & (results.quantity == "log_prob") & results.fraction.between(0.01, 0.5)
    ]
    means = drops.groupby(["prompt", "scope"], sort=False)["value"].mean().reset_index()
    return means.assign(measure="nats taken", task="natural", examples=0)


def of_a_real_model(causes: "pd.DataFrame", deletion: "pd.DataFrame") -> str:
    """One table of both judges: the average precision of each kind and of all, and nats taken by deletion."""
    chosen = causes[causes["measure"] == _SHOWN]
    everything = _everything(chosen)
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


def of_rules(stored: Mapping[str, Any]) -> str:
    """The table of what rules do, by both judges; the best of each is bold."""
    columns = []
    for results, digits in ((_everything(causes_of(stored, UNDER_RULES)), 2), (deletion_of(stored, UNDER_RULES), 1)):
        means = told(summary(results), digits=digits)
        best = max(float(text.split()[0]) for text in means.values())
        for name, text in means.items():
            mean, ends = text.split(" ", 1)
            means[name] = f"**{mean}** {ends}" if float(mean) == best else text
        columns += [means, told(differences(results, _REFERENCE), "difference", "+", digits)]
    lines = [
        "| | known causes | less `SemanticScope` | nats taken | less `SemanticScope` |",
        "|---|---|---|---|---|",
    ]
    for name, label in UNDER_RULES.items():
        cells = " | ".join(column.get(name, "") for column in columns)
        lines.append(f"| {label} | {cells} |".replace("|  |", "| |"))
    return "\n".join(lines)


def told(table: "pd.DataFrame", column: str = "mean", sign: str = "", digits: int = 2) -> dict[str, str]:
    """A column of `summary` or `differences`, by scope, with its intervals."""
    rows = zip(table["scope"], table[column], table["low"], table["high"], strict=True)
    return {str(scope): with_ends(mean, low, high, sign, digits) for scope, mean, low, high in rows}


def of_bundled(stored: Mapping[str, Any]) -> str:
    """The table of the bundled model."""
    causes = causes_of(stored, all_scopes())
    return f"{to_markdown(causes, _SHOWN, _BUNDLED_REFERENCE)}\n\n{confirmed(causes)}"


def of_real(stored: Mapping[str, Any], only: Iterable[str] | None = None) -> str:
    """The table of a real model."""
    return of_a_real_model(causes_of(stored, only), deletion_of(stored, only))


def pages(stored: Mapping[str, Any]) -> dict[tuple[str, str], str]:
    """The tables that can be made of what is stored, by the marks around them in a page."""
    if "natural" not in stored:
        return {(BEGIN, END): of_bundled(stored)}
    have = stored["natural"]["values"]
    found = {(REAL_BEGIN, REAL_END): of_real(stored, [name for name in METHODS if name in have])}
    if all(name in have for name in UNDER_RULES):
        found[RULES_BEGIN, RULES_END] = of_rules(stored)
    return found


def methods(also: str | None, only: Iterable[str] | None) -> dict[str, Method]:
    """The methods to compare: ours, those under rules, and those of `module:NAME`; or only some of them."""
    found = METHODS | importlib.import_module("tests.benchmarks.rules_table").METHODS
    if also is not None:
        module, _, name = also.partition(":")
        found |= getattr(importlib.import_module(module), name or "METHODS")
    chosen = found if only is None else {name: found[name] for name in only}
    return {_REFERENCE: SEMANTIC} | chosen


def of_the_bundled_model() -> dict[str, Any]:
    """What the bundled model is asked: the scopes that `known_causes` compares by itself, and some under rules."""
    return all_scopes() | {name: methods(None, None)[name] for name in BUNDLED_RULES}


def _measured(options: argparse.Namespace) -> dict[str, Any]:
    """Measure what is not stored yet."""
    if options.model:
        model, askers = models.load(options.model, device="cpu"), methods(options.also, options.only)
        tasks, prompts = options.tasks or KINDS, json.loads(NATURAL.read_text(encoding="utf-8"))[: options.prompts]
    else:
        model, askers, tasks, prompts = tls.load_tiny(), of_the_bundled_model(), options.tasks or TASKS, []
    settings = {"measure": _SHOWN, "examples of a task": options.count, "seed": options.seed, "BOS": options.bos}
    if options.model:
        settings |= {"natural prompts": options.prompts, "deletion": repr(DELETION)}
    if options.anew:
        options.file.unlink(missing_ok=True)
    stored = started(options.file, settings, made(model, options.model))
    scopes = {name: written(asker) for name, asker in askers.items()}
    other = [name for name, one in stored.setdefault("scopes", scopes).items() if scopes.get(name, one) != one]
    if other:
        raise SystemExit(f"{', '.join(other)} is another scope in {options.file.name}: add --anew.")
    stored["scopes"] |= scopes
    stored.setdefault("tasks", {})
    for found in by_causes(model, askers, tasks, options, stored):
        print("\n\n".join([confirmed(found), *(to_markdown(found, measure) for measure in MEASURES), ""]), flush=True)
    if prompts:
        # What did not help at known causes is not asked of deletion, unless it is named.
        asked = askers if options.only or options.also else {n: askers[n] for n in (*METHODS, *UNDER_RULES)}
        by_deletion(model, asked, prompts, options.file, stored)
    return stored


def main() -> None:
    """Measure, store, print the tables of a model, and put them into pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="FOLDER", help="that save_pretrained wrote; else the bundled model is taken")
    parser.add_argument("--stored", action="store_true", help="make the tables of both models, and measure nothing")
    parser.add_argument("--count", type=int, help="examples per task; by default 100, and 10 with --model")
    parser.add_argument("--tasks", nargs="+", choices=[*TASKS, *KINDS])
    parser.add_argument("--also", help="further methods for --model, as module:NAME of a dict such as METHODS")
    parser.add_argument("--only", nargs="+", help="the methods for --model, by name")
    parser.add_argument("--prompts", type=int, default=16, help="natural prompts for --model")
    parser.add_argument("--seed", type=int, default=0, help="seed of the examples")
    parser.add_argument("--bos", action="store_true", help="rank the BOS token as well")
    parser.add_argument("--anew", action="store_true", help="forget what is stored: for another model")
    parser.add_argument("--file", type=Path, help="where it is stored")
    parser.add_argument("--into", type=Path, nargs="+", default=[], help="pages that have marks for the tables")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.count = options.count or (10 if options.model else 100)
    real = ((REAL_BEGIN, REAL_END), (RULES_BEGIN, RULES_END))
    marks = [*real, (BEGIN, END)] if options.stored else real if options.model else [(BEGIN, END)]
    for page in options.into:  # before twenty minutes of work
        if not any(begin in page.read_text(encoding="utf-8") for begin, _ in marks):
            page_with_marks(page, *marks[0])
    if options.stored:
        files = [options.file] if options.file else [REAL_FILE, BUNDLED_FILE]
        every = [read(file) for file in files if file.exists()]
    else:
        options.file = options.file or (REAL_FILE if options.model else BUNDLED_FILE)
        every = [_measured(options)]
    for stored in every:
        if "natural" in stored:
            print(f"\n{of_real(stored, stored['natural']['values'])}")
        for (begin, end), text in pages(stored).items():
            print(f"\n{text}")
            for page in options.into:
                if begin in page.read_text(encoding="utf-8"):
                    put_into(page, text, begin, end)


if __name__ == "__main__":
    main()
