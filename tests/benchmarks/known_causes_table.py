"""The README's table of known causes: `python -m tests.benchmarks.known_causes_table --into README.md`.

Without `--into` it prints the tables of all measures.
"""

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from tl_scopes.faithfulness import differences, summary
from tl_scopes.faithfulness.known_causes import MEASURES, known_causes
from tl_scopes.tiny.counterfactuals import TASKS

if TYPE_CHECKING:
    import pandas as pd

BEGIN, END = "<!-- known causes: begin -->", "<!-- known causes: end -->"
"""The marks around the table in a page."""

_SHOWN, _REFERENCE = "average precision", "SemanticScope(versus=foil)"


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
        found = differences(everything, reference)
        cells |= {
            (row.scope, head): f"{row.difference:+.2f} ({row.low:+.2f} to {row.high:+.2f})"
            for row in found.itertuples()
        }
    lines = [f"| {measure} | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    scopes = dict.fromkeys(scope for scope, _ in cells)
    lines += [f"| `{scope}` | {' | '.join(cells.get((scope, head), '') for head in heads)} |" for scope in scopes]
    return "\n".join(lines)


def confirmed(results: "pd.DataFrame") -> str:
    """Say in a sentence how many examples were confirmed."""
    counts = results.groupby(["task", "examples"], sort=False)["prompt"].nunique()
    return "Confirmed: " + ", ".join(f"{task} {n} of {drawn}" for (task, drawn), n in counts.items()) + "."


def page_with_marks(path: Path) -> str:
    """Read a page, and refuse one that has no place for the table."""
    page = path.read_text(encoding="utf-8")
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"{str(path)!r} has no place for the table: put the lines {BEGIN} and {END} into it.")
    return page


def put_into(path: Path, text: str) -> None:
    """Replace what stands between the marks of a page."""
    page = re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n{text}\n{END}", page_with_marks(path), flags=re.DOTALL)
    path.write_text(page, encoding="utf-8")


def main() -> None:
    """Print the tables of the bundled model, or put the main one into a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="held-out examples per task")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--seed", type=int, default=0, help="seed of the examples")
    parser.add_argument("--bos", action="store_true", help="rank the BOS token as well")
    parser.add_argument("--into", type=Path, help=f"a page to put the {_SHOWN} into, between {BEGIN} and {END}")
    options = parser.parse_args()
    if options.into:
        page_with_marks(options.into)  # before twenty minutes of work
    results = known_causes(tasks=options.tasks, count=options.count, seed=options.seed, bos=options.bos)
    tables = {measure: to_markdown(results, measure, _REFERENCE) for measure in MEASURES}
    print("\n\n".join([confirmed(results), *tables.values()]))
    if options.into:
        put_into(options.into, f"{tables[_SHOWN]}\n\n{confirmed(results)}")


if __name__ == "__main__":
    main()
