"""The results of `known_causes` as Markdown, printed or put into a page."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from tl_scopes.faithfulness.statistics import differences, summary

if TYPE_CHECKING:
    import pandas as pd

BEGIN, END = "<!-- known causes: begin -->", "<!-- known causes: end -->"
"""Around the table in a page."""


def to_markdown(results: "pd.DataFrame", measure: str, reference: str | None = None) -> str:
    """One measure as a Markdown table, a row per scope, a column per task and one for all examples: mean, 95% interval.

    Args:
        results: what `known_causes` returned.
        measure: one of those.
        reference: a scope, for a last column with the paired difference to it over all examples.

    Raises:
        ValueError: as `summary` and `differences` do.
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
    """How many examples were confirmed, as a sentence."""
    counts = results.groupby(["task", "examples"], sort=False)["prompt"].nunique()
    return "Confirmed: " + ", ".join(f"{task} {n} of {drawn}" for (task, drawn), n in counts.items()) + "."


def put_into(path: Path, text: str) -> None:
    """Replace what stands between the marks of a page.

    Raises:
        ValueError: for a page without them.
    """
    page = path.read_text(encoding="utf-8")
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"{str(path)!r} has no place for the table: put the lines {BEGIN} and {END} into it.")
    page = re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n{text}\n{END}", page, flags=re.DOTALL)
    path.write_text(page, encoding="utf-8")
