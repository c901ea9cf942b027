"""The command `tl-scopes corpus`: a file of prompts in, a folder of answers out."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from tl_scopes.cli import (
    QUESTIONS,
    Bos,
    Checkpoint,
    Device,
    Dtype,
    ModelName,
    Precision,
    RuleNames,
    Scope,
    exits,
    loader,
    named_tokens,
    plain_warnings,
    rule_names,
)

# torch and TransformerLens take seconds to import, so functions import what needs them, and --help does not wait.

HELP = """Ask about every prompt in a file, and keep the answers in a folder of Parquet files.

Run it again after an interruption, and it goes on. Without --model it asks the small model that comes with the package.
The exit code is 2 where no prompt has an answer, as in an empty file.

Examples:
  tl-scopes corpus prompts.jsonl --out scores/
  tl-scopes corpus prompts.jsonl --out heads/ --carried-by head --strongest 3
  tl-scopes corpus questions.csv --out scores/ --column prompt=question --model Qwen/Qwen3-0.6B
  python -c "import pandas; print(pandas.read_parquet('scores'))\""""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")


class Predictions(StrEnum):
    """Which predictions of a prompt are explained."""

    LAST = "last"
    EVERY = "every"


class Cut(StrEnum):
    """What `carried_by` cuts a network into."""

    POSITION = "position"
    LAYER = "layer"
    HEAD = "head"
    QKV = "qkv"
    NEURON = "neuron"


_Question = partial(typer.Option, rich_help_panel="Question")
_Model = partial(typer.Option, rich_help_panel="Model")
_Output = partial(typer.Option, rich_help_panel="Output")

_FILE = """JSON lines (.jsonl), CSV or Parquet, or a folder of Parquet files. A column "prompt" (or text, or messages),
and if you like "id", "answer", "target" and "foil"."""
_VERSUS = "Why the target rather than this? For every prompt that has no foil of its own."
_GENERATE = """Let the model say so many tokens at most after each prompt that has neither answer nor target, and
explain them as its answer."""
_COLUMN = "What a column is called, prompt=question say; target= for one that means another thing. Repeat it."
_PREDICTIONS = """"last" explains what comes after each prompt, "every" each prediction in it, or each token of its
answer."""
_CARRIED = "Keep how much of each score runs through each part of the network."
_STRONGEST = "With --carried-by: split the N largest scores alone."
_PART = "How many prompts a file holds: as many are computed again after an interruption."


@app.command(help=HELP, context_settings={"help_option_names": ["-h", "--help"]})
def corpus(
    prompts: Annotated[Path, typer.Argument(metavar="FILE", show_default=False, help=_FILE)],
    out: Annotated[Path, _Output(metavar="FOLDER", show_default=False, help="Where the answers go.")],
    scope: Annotated[Scope, _Question(metavar="NAME", help="As for one prompt: tl-scopes --help.")] = Scope.SEMANTIC,
    target: Annotated[
        str | None, _Question(metavar="TOKEN", help="What to explain after every prompt that has none of its own.")
    ] = None,
    versus: Annotated[str | None, _Question(metavar="TOKEN", help=_VERSUS)] = None,
    generate: Annotated[int | None, _Question(metavar="N", min=1, help=_GENERATE)] = None,
    column: Annotated[list[str] | None, _Question(metavar="NAME=COLUMN", help=_COLUMN)] = None,
    rules: RuleNames = None,
    predictions: Annotated[Predictions, _Question(metavar="last|every", help=_PREDICTIONS)] = Predictions.LAST,
    carried_by: Annotated[Cut | None, _Question(metavar="head|qkv|layer|...", help=_CARRIED)] = None,
    strongest: Annotated[int | None, _Question(metavar="N", min=1, help=_STRONGEST)] = None,
    model: ModelName = None,
    device: Device = None,
    dtype: Precision = Dtype.FLOAT32,
    bos: Bos = None,
    checkpoint: Checkpoint = False,
    batch_size: Annotated[int, _Model(metavar="N", min=1, help="How many prompts run together.")] = 8,
    part_size: Annotated[int, _Output(metavar="N", min=1, help=_PART)] = 128,
) -> None:
    """Answer one question about every prompt of a file."""
    question = QUESTIONS[scope]
    with exits(2, ValueError):
        named = named_tokens(scope, target, versus)
        columns = dict(map(_column, column or []))

    # What libraries print is not a part of the answer.
    with redirect_stdout(sys.stderr), plain_warnings(), _interruptible():
        import tl_scopes as tls
        from tl_scopes import models

        kept: dict[str, Any] = {"predictions": predictions.value, "carried_by": carried_by and carried_by.value}
        with exits(2, ValueError):
            asked = question.about(named)
        if carried_by is not None:
            from tl_scopes.circuits.carried import require_parts

            with exits(2, TypeError):
                require_parts(asked)
        with exits(2, ValueError), exits(1, RuntimeError, MemoryError, OSError):
            found = tls.attribute_corpus(
                prompts,
                out,
                asked,
                model=loader(model, device, dtype),
                columns=columns,
                generate=generate,
                rules=rule_names(rules),
                prepend_bos=bos,
                checkpoint=checkpoint,
                batch_size=batch_size,
                part_size=part_size,
                strongest=strongest,
                **kept,
            )
    failed = sum(entry["errors"] for entry in found.entries)
    typer.echo(f"{models.counted(len(found), 'prompt')} in {out}, {failed} without an answer")
    if failed == len(found):
        raise typer.Exit(2)  # the warning has said why


@contextmanager
def _interruptible() -> Iterator[None]:
    """Inside, Ctrl+C ends the command with a line that says what is kept."""
    try:
        yield
    except KeyboardInterrupt as interruption:
        told = str(interruption) or "nothing was computed."
        typer.echo(f"interrupted: {told}", err=True)
        raise typer.Exit(130) from None  # 128 + SIGINT, as in a shell


def _column(text: str) -> tuple[str, str | None]:
    """The name of a column of ours, and that of the file's.

    Raises:
        ValueError: for text without an equals sign.
    """
    name, equals, theirs = text.partition("=")
    if not equals:
        raise ValueError(f"--column is written NAME=COLUMN, prompt=question say, got {text!r}.")
    return name, theirs or None
