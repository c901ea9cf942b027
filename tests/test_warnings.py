"""Warnings point at the line of the user's that called the package, not at a line of the package."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import warnings

import tl_scopes as tls


class Wrapped(tls.SemanticScope):  # a frame of the user's within one of the package's
    def __call__(self, lin, **given):
        return super().__call__(lin, **given)


model, prompt = tls.load_tiny(), "The keys to the old cabinet near the door"
lin = tls.linearize(model, prompt)
warnings.simplefilter("always")
with warnings.catch_warnings(record=True) as caught:
    tls.attribute(model, prompt, tls.SemanticScope("are"))  # here
    tls.SemanticScope("are")(lin)  # here
    tls.attribute(model, prompt, Wrapped("are"))  # here
    tls.attribution_map(model, prompt, tls.SemanticScope("is"))  # here
    for _ in tls.attribute_many(model, [prompt, "", prompt], tls.SemanticScope(" are")):  # here
        pass
    tls.PromptPair(model, prompt, "The key to the old cabinet near the door", answer=" are", wrong="is")  # here
print(*sorted({warning.lineno for warning in caught}), *{warning.filename for warning in caught})
"""


def test_the_line_of_the_user(tmp_path: Path) -> None:
    """Each way of asking warns at its own line; run-time type checks, which put frames in between, are off."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    ran = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "JAXTYPING_DISABLE": "1"},
    )
    here = [i for i, line in enumerate(SCRIPT.splitlines(), 1) if line.endswith("# here")]
    assert ran.stdout.split() == [*map(str, here), str(script)]
