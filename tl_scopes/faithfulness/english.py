"""Prompts in English whose causes are known, of eight kinds that small models can do; they stand in english.json.

Each entry there is a frame with rows of words for its places {0}, {1} and so on. In the frame a cause stands as
"[this|that]", with what replaces it, and a distractor as "{this}" (`KnownCause.marked`). Which of them hold for a model
is for `confirm` to find out. This is a file of its own since it reads data, where `examples.py` says what an example
is.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

from tl_scopes.faithfulness.examples import KnownCause

KINDS = (
    "subject and verb", "capital", "recall", "name", "into English", "antonym", "what comes next", "sentiment",
)  # fmt: skip
"""The kinds of English prompts whose causes are known."""


def english(kind: str) -> list[KnownCause]:
    """The English prompts of one kind, always the same ones.

    Args:
        kind: one of `KINDS`.

    Raises:
        ValueError: for another kind.

    Example:
        >>> from tl_scopes.faithfulness import english
        >>> english("capital")[0]
        KnownCause('The capital of [France] is' → ' Paris', not ' Berlin')
    """
    if kind not in KINDS:
        raise ValueError(f"there are no English prompts of the kind {kind!r}: choose from {', '.join(KINDS)}.")
    return [
        KnownCause.marked(*(frame[part].format(*row.split("/")) for part in ("prompt", "answer", "foil", "kind")))
        for frame in _frames()
        if frame["kind"] == kind
        for row in frame["words"]
    ]


@cache
def _frames() -> list[dict[str, Any]]:
    return json.loads(Path(__file__).with_name("english.json").read_text(encoding="utf-8"))
