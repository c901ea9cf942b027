"""The command `tl-scopes serve`: the explorer in a browser, for prompts that are typed in."""

import sys
import warnings
from contextlib import redirect_stdout
from functools import partial
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
    as_chat,
    exits,
    loader,
    plain_warnings,
    rule_names,
)

# torch and TransformerLens take seconds to import, so functions import what needs them, and --help does not wait.

HELP = """Open a page on this computer in which prompts are typed in and explored.

Without --model it asks the small model that comes with the package. Ctrl+C ends it.

Examples:
  tl-scopes serve
  tl-scopes serve --model Qwen/Qwen3-0.6B --chat --generate 20
  tl-scopes serve --model Qwen/Qwen3-0.6B --scope semantic --scope relevance --rules linear"""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")

_Question = partial(typer.Option, rich_help_panel="Question")
_Server = partial(typer.Option, rich_help_panel="Server")

_SCOPES = (
    "A question that the page can switch to, as in tl-scopes --help. Repeat it for several. "
    "fisher takes some thirty times as long as semantic."
)
_GENERATE = (
    "Let the model say so many tokens at most after the prompt, and explain each of them in place of the prompt's "
    "tokens."
)
_SHORT = "A short text"
"""A prompt that is asked once before anybody asks."""
_HOST = "Another address to listen at. Whoever can reach it can use the model, and what is typed is not encrypted."


@app.command(help=HELP, context_settings={"help_option_names": ["-h", "--help"]})
def serve(
    scope: Annotated[
        list[Scope] | None, _Question(metavar="NAME", show_default="semantic, temperature", help=_SCOPES)
    ] = None,
    chat: Annotated[bool, _Question("--chat", help="A prompt is what a user says to a chat model.")] = False,
    generate: Annotated[int | None, _Question(metavar="N", min=1, help=_GENERATE)] = None,
    rules: RuleNames = None,
    model: ModelName = None,
    device: Device = None,
    dtype: Precision = Dtype.FLOAT32,
    bos: Bos = None,
    checkpoint: Checkpoint = False,
    port: Annotated[int, _Server(metavar="N", help="The port; 0 is any that is free.")] = 8000,
    host: Annotated[str, _Server(metavar="ADDRESS", help=_HOST)] = "127.0.0.1",
) -> None:
    """Serve the explorer until Ctrl+C."""
    asked = list(dict.fromkeys(scope or [Scope.SEMANTIC, Scope.TEMPERATURE]))
    with redirect_stdout(sys.stderr), plain_warnings():  # what libraries print is not a part of the answer
        import tl_scopes as tls
        from tl_scopes import models
        from tl_scopes.serve import PromptServer

        options: dict[str, Any] = {"prepend_bos": bos, "checkpoint": checkpoint}
        options["rules"] = rule_names(rules)

        def explore(prompt: str) -> tls.Explorer:
            said: Any = as_chat(prompt) if chat else prompt
            answer = None if generate is None else tls.generate(loaded, said, generate, prepend_bos=bos)
            return tls.explore(loaded, said, scopes, answer=answer, **options)

        def try_out() -> None:  # what no prompt can be asked is told at once; what is said varies with the prompt
            context = models.context_length(loaded)
            if generate is not None and context is not None and generate >= context:
                raise ValueError(
                    f"--generate {generate} leaves no room for a prompt: the model's context is {context}."
                )
            said: Any = as_chat(_SHORT) if chat else _SHORT
            tls.explore(loaded, said, scopes, answer=None if generate is None else _SHORT, **options)

        with exits(2, ValueError):  # before the model is loaded, which takes a while
            models.LinearRules.read(rule_names(rules))
            scopes = [QUESTIONS[name].about({}) for name in asked]
            server = PromptServer(explore, host, port)
        with server:
            loaded = loader(model, device, dtype)()
            with exits(2, ValueError), exits(1, RuntimeError, MemoryError), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try_out()
            server.title = f"tl_scopes: {models.model_name(loaded)}"
            typer.echo(f"{server.title} at {server.url} (Ctrl+C ends it)", err=True)
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                typer.echo("", err=True)
