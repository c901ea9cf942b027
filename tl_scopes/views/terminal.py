"""An answer as the `tl-scopes` command prints it."""

import sys
from io import TextIOWrapper
from math import floor, log10
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

# Nothing here imports torch: `tl-scopes --help` would wait for it.
from tl_scopes.views.attribution import strengths, sums
from tl_scopes.views.markup import visible
from tl_scopes.views.palette import color, text_color

if TYPE_CHECKING:
    from tl_scopes.answers import AnswerMap
    from tl_scopes.diagnostics.check_report import Checks
    from tl_scopes.results.attribution import Attribution


def report(answer: "Attribution", subject: str, score: str, top: int, checks: "Checks | None") -> None:
    """Print the prediction, the question, the coloured prompt with its most influential tokens, and the checks.

    Args:
        answer: an answer that has predictions.
        subject: what the scores are about; the target is written after it, where there is one.
        score: what a score is, with {what} in place of the number explained.
        top: how many tokens to list.
        checks: the checks of the answer, or None.
    """
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows "?"
    console = Console(highlight=False, markup=False, emoji=False)  # every text is shown as it is
    console.width = min(console.width, 100)
    bar_width = min(24, max(4, console.width - 44))

    def name(token: str) -> Text:
        return Text(visible(token), "bold")

    def bar(fraction: float) -> Text:
        halves = round(2 * bar_width * fraction)
        return Text("━" * (halves // 2) + "╸" * (halves % 2), color(0.6))

    predictions = _table("left", "right", "left")
    for token, probability in answer.predictions:
        predictions.add_row(name(token.text), f"{probability:.1%}", bar(probability))

    logs = answer.quantity is not None and answer.quantity.startswith("log p")
    asked = Text(subject.replace("the logit", "the log-probability") if logs else subject)
    what = "the difference" if answer.versus else "this log-probability" if logs else "this logit"
    if answer.target is not None:
        over = " " if subject.endswith(" of") else " over the answer "  # whose predictions a scope takes as wholes
        asked.append(over).append(name(answer.target.text))
    if answer.versus is not None:
        asked.append(" against ").append(name(answer.versus.text))
    asked.append(_under(answer.rules))

    prompt = Text()
    for text, strength in zip(answer.shown_tokens, strengths(answer), strict=True):
        shown = text if text.isprintable() else visible(text)  # spaces stay spaces, where lines may break
        prompt.append(shown, f"{text_color(strength)} on {color(strength)}")
        prompt.append("\n" if text.endswith("\n") else "")
    prompt.append(" → ", "dim").append(name((answer.target or answer.predictions[0].token).text))

    rows = answer.top(top)
    number = _number_format(rows[0].score) if rows else ""
    named = dict(zip(answer.positions, answer.labels, strict=True))
    influences = _table("right", "left", "right", "right", "left")
    influences.add_row("position", "token", "score", "share", style="dim")
    for row in rows:
        length = bar(abs(row.share / rows[0].share) if rows[0].share else 0.0)
        influences.add_row(
            str(row.position), name(named[row.position]), format(row.score, number), f"{row.share:.1%}", length
        )

    legend = Table.grid(padding=(0, 2))
    facts = {"score": _meant(score.format(what=what), answer), "unit": answer.unit}
    if answer.value is not None and answer.quantity is not None:
        facts["value"] = f"{answer.quantity} = {answer.value:.4g}"
    facts["sum"] = sums(answer)
    facts["note"] = "; ".join(answer.notes)
    for label, fact in (facts | {"model": f"{answer.model}, {answer.dtype}"}).items():
        if fact:
            legend.add_row(label, Text(fact), style="dim")

    console.print(Text.assemble("Next token after ", name(_last_read(answer))))
    console.print(Padding(predictions, (0, 0, 1, 2), expand=False))
    console.print(Text.assemble("What moves ", asked, "?"))
    console.print(Padding(prompt, (0, 0, 1, 2), expand=False))
    alone = f"no token counts: up to here there is nothing but {' and '.join(answer.uncounted)}"
    console.print(Padding(influences if rows else alone, (0, 0, 1, 2), expand=False))
    console.print(legend)
    if checks is not None:
        console.print("\nCan it be trusted?")
        console.print(Padding(_verdicts(checks), (0, 0, 0, 2), expand=False))


def report_rows(rows: "AnswerMap", score: str, top: int) -> None:
    """Print what moves each token of an answer: a line for each, with its most influential tokens and their shares.

    Args:
        rows: one answer for each token.
        score: what a score is, with {what} in place of the number explained.
        top: how many tokens to list beside each.
    """
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    console = Console(highlight=False, markup=False, emoji=False)
    console.width = min(console.width, 100)
    last = rows.answers[-1]
    listed = Table.grid(padding=(0, 2))
    listed.add_column("token", no_wrap=True)
    listed.add_column("value", no_wrap=True, justify="right")
    listed.add_column("moved by")
    listed.add_row("token", "value", "moved by", style="dim")
    for text, answer in zip(rows.answer_labels, rows, strict=True):
        strength = dict(zip(answer.positions, strengths(answer), strict=True))
        named = dict(zip(answer.positions, answer.labels, strict=True))
        moved = Text()
        for one in answer.top(top):
            hue = strength[one.position]
            moved.append(visible(named[one.position]), f"{text_color(hue)} on {color(hue)}")
            moved.append(f"{answer.place(one.position)} {one.share:.0%}  ")
        value = "" if answer.value is None else f"{answer.value:.2f}"
        listed.add_row(Text(visible(text), "bold"), value, moved)

    legend = Table.grid(padding=(0, 2))
    meant = _meant(score.format(what="its log-probability"), last)
    facts = {"score": meant, "unit": last.unit, "note": "; ".join(last.notes)}
    if last.quantity is not None:
        facts["value"] = "of each token: " + last.quantity.split("(")[0]
    for label, fact in (facts | {"model": f"{last.model}, {last.dtype}"}).items():
        if fact:
            legend.add_row(label, Text(fact), style="dim")
    console.print(Text.assemble("What moves each token of ", (visible(rows.text), "bold"), _under(last.rules), "?"))
    console.print(Padding(listed, (0, 0, 1, 2), expand=False))
    console.print(legend)


def _under(rules: str | None) -> str:
    return "" if rules is None else f" under {rules} rules"


def _meant(score: str, answer: "Attribution") -> str:
    """What a score is; under rules it is not about the model's own derivative, and with a gap nothing adds up."""
    said = ["the derivative times the embedding" if "gap" in answer.details else score]
    if answer.rules is not None:
        said.append(f"by the derivative under {answer.rules} rules, not the model's own")
    if "gap" in answer.details and answer.quantity is not None and answer.quantity.startswith("log p"):
        said.append("the parts of a log-probability do not add up")
    elif "gap" in answer.details:
        said.append('give --rules linear (rules="linear") for parts that add up')
    return "; ".join(said)


def _last_read(answer: "Attribution") -> str:
    """The token after which the first prediction is read."""
    if answer.position not in answer.positions:
        return answer.str_tokens[-1]
    return answer.str_tokens[answer.positions.index(answer.position)]


def _verdicts(checks: "Checks") -> Table:
    table = Table.grid(padding=(0, 2))
    for column in ("check", "verdict"):
        table.add_column(column, no_wrap=True)
    table.add_column("finding")
    for check in checks:
        style = {"look": "bold", "not applicable": "dim"}.get(check.verdict, "")
        table.add_row(check.name, Text(check.verdict, style), Text(check.in_full, "dim"))
    return table


def _table(*columns: Literal["left", "right"]) -> Table:
    """A table without lines."""
    table = Table.grid(padding=(0, 2))
    for justify in columns:
        table.add_column(justify=justify, no_wrap=True, overflow="ellipsis")
    return table


def _number_format(largest: float) -> str:
    """The format of numbers up to this one: three digits of the largest, and as many decimals in all of them."""
    if largest and not 1e-3 <= abs(largest) < 1e6:
        return ".2e"
    return f".{max(0, 2 - floor(log10(abs(largest) or 1)))}f"
