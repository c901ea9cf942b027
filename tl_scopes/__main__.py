"""`python -m tl_scopes` is `tl-scopes`."""

from tl_scopes.cli import app

if __name__ == "__main__":
    app(prog_name="tl-scopes")
