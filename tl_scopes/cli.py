"""The `tl-scopes` command: one prompt, one question, the answer in the terminal, as a page or as JSON."""

import os
import re
import shlex
import sys
import warnings
from ast import literal_eval
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from enum import StrEnum
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.text import Text

from tl_scopes.views.terminal import report, report_rows

# torch and TransformerLens take seconds to import, so functions import what needs them, and --help does not wait.

HELP = """Show which tokens of a prompt move a language model's prediction, and by how much.

Without --model it asks the small model that comes with the package and needs no network.

Examples:
  tl-scopes "The keys to the old cabinet near the door"
  tl-scopes "The keys to the old cabinet" --target " are" --versus " is"
  tl-scopes "The keys to the old cabinet" --scope fisher --html answer.html
  tl-scopes "The capital of France is" --model Qwen/Qwen3-0.6B --answer " Paris, of course"
  tl-scopes "The keys to the old cabinet" --answer " are old." --rows
  tl-scopes --chat "What is the capital of France?" --model Qwen/Qwen3-0.6B --generate 20
  tl-scopes - --json - < prompt.txt | jq .scores
  tl-scopes corpus prompts.jsonl --out scores/   (a file of prompts: tl-scopes corpus --help)
  tl-scopes serve --model Qwen/Qwen3-0.6B   (a page to type prompts in: tl-scopes serve --help)"""

EPILOG = """[bold]Exit codes[/bold]: [bold]0[/bold] success; [bold]1[/bold] the model could not be loaded or run, \
or a file could not be written; [bold]2[/bold] the command line is wrong, or the question has no answer (an empty \
prompt, an unknown target, a position out of range). The answer goes to stdout, everything else to stderr."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")

_Question = partial(typer.Option, rich_help_panel="Question")
_Model = partial(typer.Option, rich_help_panel="Model")
_Output = partial(typer.Option, rich_help_panel="Output")


class Scope(StrEnum):
    """The questions."""

    SEMANTIC = "semantic"
    TEMPERATURE = "temperature"
    FISHER = "fisher"
    PATH_INTEGRATED = "path-integrated"
    SPECTRAL = "spectral"
    HETA = "heta"
    RELEVANCE = "relevance"


class Question(NamedTuple):
    """How a question is asked and told."""

    scope: str
    """The class, in `tl_scopes`."""
    score: str
    """What a score is."""
    tokens: tuple[str, ...] = ()
    """Which of target and versus it takes."""
    subject: str = "the logit of"
    """What the scores are about; the target follows, where there is one."""
    options: Mapping[str, Any] = {}

    def about(self, named: Mapping[str, str | None]) -> Any:
        """The scope that asks it about these tokens."""
        import tl_scopes as tls

        return getattr(tls, self.scope)(**self.options, **{name: as_token(token) for name, token in named.items()})


QUESTIONS = {
    Scope.SEMANTIC: Question(
        "SemanticScope", "how steeply {what} can change as the token's embedding moves", ("target", "versus")
    ),
    Scope.TEMPERATURE: Question(
        "TemperatureScope",
        "how steeply the inverse temperature can change as the token's embedding moves",
        subject="the model's confidence",
    ),
    Scope.FISHER: Question(
        "FisherScope",
        "how fast the prediction moves, in KL divergence, as the token's embedding moves at random",
        subject="the whole prediction",
    ),
    Scope.PATH_INTEGRATED: Question(
        "PathIntegratedScope",
        "how much the token's embedding contributes to {what} on the way from zero to the prompt",
        ("target", "versus"),
    ),
    Scope.SPECTRAL: Question(
        "SpectralScope",
        "how far one unit step of the token's embedding can move the prediction, √(2 KL)",
        subject="the whole prediction",
        # The exact answer, and that of the readout, take a backward pass per dimension.
        options={"space": "distribution", "rank": 16},
    ),
    Scope.HETA: Question(
        "HetaScope",
        "attention flow from the token × (curvature + information lost without it)",
        ("target",),
        "the log-probability of",
    ),
    Scope.RELEVANCE: Question(
        "RelevanceScope",
        "how much of {what} the token's embedding brings: for it above zero, against it below",
        ("target", "versus"),
    ),
}


class Dtype(StrEnum):
    """The precisions that `models.load` knows."""

    FLOAT32 = "float32"
    FLOAT64 = "float64"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


_PROMPT = "The text, or - to read it from stdin (less one final line break)."
_SCOPE = """semantic: what moves the logit of one token? temperature: what moves the model's confidence?
fisher: what moves the whole prediction? path-integrated: what built the logit up, from nothing to the prompt?
spectral: how far can each token move the prediction at most? heta: attention, curvature and information lost; slow.
relevance: what speaks for one token, and what against? With --rules linear the parts add up."""
_TARGET = 'What to explain, as text (" are", mind the space; it may be several tokens) or as id (id:42).'
_ANSWER = "What is said after the prompt: it is explained as a whole; with spectral and heta it is one token."
_GENERATE = "Let the model say so many tokens at most, and explain them as with --answer."
_ROWS = "Explain each token of the answer by itself, from the prompt and the answer before it."
_CHAT = "The prompt is what a user says to a chat model, whose template is put around it."
_POSITION = "The token after which the prediction is read: 0 is the first, -1 the last."
_NAME = "A model on the Hugging Face Hub, a folder in its layout, or a GGUF file; any that TransformerLens can load."
_CHECKPOINT = "For long prompts: keep less in memory, and run each block again on the way back."
_RULES = """Differentiate by rules that make the network linear: linear, lookup, or single rules after commas. With
--scope relevance a logit is split exactly into what speaks for it and what against."""
_CHECK = "Add what a careful reviewer would ask: sinks, linearity, saturation, weights, leaving tokens out."
_JSON = "Write the whole answer, for Attribution.from_json; to - for stdout, in place of the report."
_HTML = "Write the answer as a web page; to - for stdout, in place of the report."


# What all commands ask.
ModelName = Annotated[str | None, _Model(metavar="NAME", show_default="the bundled model", help=_NAME)]
Device = Annotated[
    str | None, _Model(metavar="NAME", show_default="a GPU where there is one", help="cpu, cuda:1, mps ...")
]
Precision = Annotated[Dtype, _Model(metavar="NAME", help="float32, float64, bfloat16 or float16.")]
Bos = Annotated[
    bool | None,
    _Model("--bos/--no-bos", show_default="as the model expects", help="Put a beginning-of-sequence token first."),
]
Checkpoint = Annotated[bool, _Model("--checkpoint", help=_CHECKPOINT)]
RuleNames = Annotated[str | None, _Question(metavar="NAMES", help=_RULES)]

_FLAGS: dict[str, str | Callable[[re.Match[str]], str]] = {
    r"\btarget=(\d+)": r"--target id:\1",
    r"\bdevice='(\w+)'": r"--device \1",
    r"\bcheckpoint=True\b": "--checkpoint",
    r"\bprepend_bos=True\b": "--bos",
    r"\bprepend_bos=False\b": "--no-bos",
    r"\bcolumns=(\{[^{}]*\})": lambda found: " ".join(map(column_option, literal_eval(found[1]).items())),
    r"\bcolumns names the columns for": "--column says the columns for",
    r"\bstrongest=(\d+)": r"--strongest \1",
    r"\bgive carried_by, \"head\" say": "give --carried-by head, say",
    r"\bcarried_by='(\w+)'": r"--carried-by \1",
    r"\bpredictions=\"every\"": "--predictions every",
    r"\bask (it of )?lin\.under\(None\)": "leave --rules out",
    r"\bask RelevanceScope\b": "take --scope relevance",
    r", or set tokenizer\.chat_template": "",
}
"""Arguments in the library's errors and warnings, and the options of the command line that they are."""


def column_option(named: tuple[str, str | None]) -> str:
    """The option of `tl-scopes corpus` for a column of ours, and what it is called in the file."""
    ours, theirs = named
    return "--column " + shlex.quote(f"{ours}={theirs or ''}")


def named_tokens(scope: Scope, target: str | None, versus: str | None) -> dict[str, str]:
    """The tokens that a question names.

    Raises:
        ValueError: for one that the scope does not take, and for an id that is not a number.
    """
    named = {name: token for name, token in (("target", target), ("versus", versus)) if token is not None}
    for name in set(named) - set(QUESTIONS[scope].tokens):
        takers = ", ".join(other for other, asked in QUESTIONS.items() if name in asked.tokens)
        raise ValueError(f"--{name} goes with --scope {takers}, not with {scope}.")
    for name, token in named.items():
        if token.startswith("id:") and isinstance(as_token(token), str):
            raise ValueError(f"--{name} {token} is not the id of a token: after id: stands a number, id:42 say.")
    return named


def rule_names(rules: str | None) -> str | list[str] | None:
    """A set of rules, or single ones that were written after commas."""
    return rules.split(",") if rules and "," in rules else rules


def _show_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"tl-scopes {version('tl-scopes')}")
        raise typer.Exit
    return wanted


@app.command(help=HELP, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
def main(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", show_default=False, help=_PROMPT)],
    scope: Annotated[Scope, _Question(metavar="NAME", help=_SCOPE)] = Scope.SEMANTIC,
    target: Annotated[
        str | None, _Question(metavar="TOKEN", show_default="the most likely next token", help=_TARGET)
    ] = None,
    versus: Annotated[str | None, _Question(metavar="TOKEN", help="Why the target rather than this?")] = None,
    answer: Annotated[str | None, _Question(metavar="TEXT", help=_ANSWER)] = None,
    generate: Annotated[int | None, _Question(metavar="N", min=1, help=_GENERATE)] = None,
    rows: Annotated[bool, _Question("--rows", help=_ROWS)] = False,
    chat: Annotated[bool, _Question("--chat", help=_CHAT)] = False,
    position: Annotated[int, _Question(metavar="N", help=_POSITION)] = -1,
    model: ModelName = None,
    device: Device = None,
    dtype: Precision = Dtype.FLOAT32,
    bos: Bos = None,
    checkpoint: Checkpoint = False,
    rules: RuleNames = None,
    check: Annotated[bool, _Output("--check", help=_CHECK)] = False,
    top: Annotated[int, _Output(metavar="N", min=1, help="How many of the most influential tokens to list.")] = 8,
    html: Annotated[Path | None, _Output(metavar="FILE", help=_HTML)] = None,
    json: Annotated[Path | None, _Output(metavar="FILE", help=_JSON)] = None,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Answer one question about one prompt."""
    with exits(2, ValueError):
        text = _read(prompt, target, versus, answer)
        question, named = QUESTIONS[scope], named_tokens(scope, target, versus)
        if generate is not None and position != -1:
            raise ValueError("--generate goes on after the whole prompt, and --position reads within it: give one.")
        if answer is not None and generate is not None:
            raise ValueError("--answer says what is said, and --generate lets the model say it: give one of them.")
        if rows and answer is None and generate is None:
            raise ValueError("--rows has a row for each token of an answer: give --answer or --generate as well.")
        for name, given in (("position", position != -1), ("check", check), ("versus", versus is not None)):
            if rows and given:
                raise ValueError(f"--rows explains each token of an answer, and --{name} is about one: leave one out.")
        if check and Path("-") in (html, json):
            raise ValueError(
                "--check prints below the report, in place of which --json - and --html - write: name a file."
            )
        if html == json == Path("-"):
            raise ValueError("--html - and --json - would both write to stdout: name a file for one of them.")
        for name, path in (("html", html), ("json", json)):
            _require_writable(name, path)

    with redirect_stdout(sys.stderr), plain_warnings():  # what libraries print is not a part of the answer
        from transformers.utils import logging

        import tl_scopes as tls
        from tl_scopes.views import attribution as card

        if model is None or Path(model).exists() or not sys.stderr.isatty():
            logging.disable_progress_bar()  # nothing is downloaded, or nobody watches
        loaded = loader(model, device, dtype)()
        with exits(2, ValueError), exits(1, RuntimeError, MemoryError):
            asked = question.about(named)
            asked_of: Any = as_chat(text) if chat else text
            said = answer if generate is None else tls.generate(loaded, asked_of, generate, prepend_bos=bos)
            options: dict[str, Any] = {
                "answer": said,
                "prepend_bos": bos,
                "checkpoint": checkpoint,
                "rules": rule_names(rules),
            }
            if rows:
                del options["answer"]
                mapped = tls.answer_map(loaded, asked_of, said, asked, **options)  # type: ignore[arg-type]
            elif check:
                checks = tls.check(tls.linearize(loaded, asked_of, position, **options), asked)
                found = checks.answer
            else:
                checks, found = None, tls.attribute(loaded, asked_of, asked, position, **options)

    with _quiet_pipe(), exits(1, OSError):
        if rows:
            if Path("-") not in (html, json):
                report_rows(mapped, question.score, top)
            _write_all((html, mapped.to_html), (json, mapped.to_json))
            return
        if Path("-") not in (html, json):
            report(found, question.subject, question.score, top, checks)
        page = partial(card.page, found, *([checks._repr_html_()] if checks else []))
        _write_all((html, page), (json, found.to_json))


def loader(model: str | None, device: str | None, dtype: str) -> Callable[[], Any]:
    """A function that loads the model of this name, or the one that comes with the package where there is no name.

    It ends the command with exit code 1 for a model that cannot be loaded, or not be asked.
    """
    import tl_scopes as tls
    from tl_scopes import models

    def load() -> Any:
        named = tls.load_tiny if model is None else partial(models.load, model)
        with exits(1, Exception):
            loaded = named(device=device, dtype=str(dtype))
            models.check_model(loaded)
        return loaded

    return load


def _require_writable(name: str, path: Path | None) -> None:
    """Refuse, before anything is computed, a path that cannot be written to.

    Raises:
        ValueError: for a folder, or a path in a folder that does not exist.
    """
    if path is None or path == Path("-"):
        return
    if path.is_dir():
        raise ValueError(f"--{name} {path} is a folder: give the path of a file in it.")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--{name} {path}: there is no folder {path.absolute().parent}. Make it first.")


@contextmanager
def _quiet_pipe() -> Iterator[None]:
    """Inside, a reader that wants no more (`| head`) ends the command without a word, as other commands end."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes stdout once more when it ends, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(141) from None  # 128 + SIGPIPE, as in a shell


@contextmanager
def exits(code: int, *kinds: type[Exception]) -> Iterator[None]:
    """At these exceptions, print their message as one paragraph on stderr and end with this exit code."""
    try:
        yield
    except typer.Exit:  # a RuntimeError, which has said why
        raise
    except kinds as error:
        console = Console(stderr=True, highlight=False)
        reason = with_options(str(error).strip().replace("\n", " ")) or type(error).__name__
        console.print(Text.assemble(("error: ", "bold red"), reason), soft_wrap=not console.is_terminal)
        raise typer.Exit(code) from None


def with_options(told: str) -> str:
    """What the library says, with options as they are written on the command line."""
    for pattern, flag in _FLAGS.items():
        told = re.sub(pattern, flag, told)
    return told


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Inside, a warning is one line on stderr, without the place in the code: the code is not the user's."""

    def line(message: Warning | str, category: type[Warning], *place: Any) -> str:
        if not issubclass(category, UserWarning):
            return before(message, category, *place)
        return f"warning: {with_options(str(message))}\n"

    before, warnings.formatwarning = warnings.formatwarning, line  # type: ignore[assignment]
    try:
        yield
    finally:
        warnings.formatwarning = before


def as_chat(text: str) -> list[dict[str, str]]:
    """What a user says to a chat model.

    Raises:
        ValueError: for a text that is empty, or only white space.
    """
    if not text.strip():
        raise ValueError("the prompt is empty: give at least one character.")
    return [{"role": "user", "content": text}]


def _read(prompt: str, *tokens: str | None) -> str:
    """The prompt, from stdin for "-"."""
    try:
        text = sys.stdin.buffer.read().decode() if prompt == "-" else prompt
        "".join([text, *filter(None, tokens)]).encode()  # fails where the shell handed over other bytes
    except UnicodeError as error:
        raise ValueError(f"the prompt and the tokens must be UTF-8: {error}.") from error
    return re.sub(r"\r?\n\Z", "", text) if prompt == "-" else text


def _write_all(*written: tuple[Path | None, Callable[[], str]]) -> None:
    for path, render in written:
        if path is not None:
            _write(path, render())


def _write(path: Path, text: str) -> None:
    """Write to a file, or to stdout for "-": UTF-8 whatever the locale."""
    data = f"{text.rstrip()}\n".encode()
    if path == Path("-"):
        typer.echo(data, nl=False)
    else:
        path.write_bytes(data)


def as_token(text: str | None) -> str | int | None:
    """A token as the command line names it: "id:42" is an id, all else is text."""
    return int(text.removeprefix("id:")) if text and re.fullmatch("id:[0-9]+", text) else text
