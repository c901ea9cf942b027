"""`python -m tl_scopes` is `tl-scopes`: one prompt, or with a command as the first word, a file of them or a page."""

import sys
from importlib import import_module

from tl_scopes.cli import app

_COMMANDS = {"corpus": "tl_scopes.cli_corpus", "serve": "tl_scopes.cli_serve"}


def main() -> None:
    """Run the command. A prompt that is the name of a command is written after --."""
    name = "".join(sys.argv[1:2])
    if name in _COMMANDS:
        import_module(_COMMANDS[name]).app(args=sys.argv[2:], prog_name=f"tl-scopes {name}")
    else:
        app(prog_name="tl-scopes")


if __name__ == "__main__":
    main()
