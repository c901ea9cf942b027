"""The chat that the gallery shows, as a real model answers it: it is stored in `docs/gallery/chat.json`.

Command: python -m tests.real.model && python -m tests.benchmarks.gallery tests/real/.model
"""

import argparse
from dataclasses import replace
from pathlib import Path

import tl_scopes as tls
from tl_scopes import models

FILE = Path(__file__).parent.parent.parent / "docs" / "gallery" / "chat.json"
NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
CHAT = [{"role": "user", "content": "I grew up in Lisbon. My sister lives in Rome. In which country did I grow up?"}]


def main() -> None:
    """Ask the model, and store what it said and why."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="SmolLM2-135M-Instruct, a folder")
    model = models.load(parser.parse_args().model)
    said = tls.generate(model, CHAT, max_new_tokens=40)
    answer = tls.attribute(model, CHAT, tls.SemanticScope(), answer=said)
    made = answer.provenance and replace(answer.provenance, model=NAME)
    FILE.write_text(replace(answer, model=NAME, provenance=made).to_json() + "\n", encoding="utf-8")
    print(said, answer, sep="\n")


if __name__ == "__main__":
    main()
