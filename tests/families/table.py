"""Print the table of architectures for the documentation, after running it on the installed TransformerLens.

    python -m tests.families.table [NAME ...]

What it says of the other version of TransformerLens is what the tests prove there.
"""

import os
import sys
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers.utils import logging

from tests.families.family import MAJOR, OPERATIONS, TOLERANCE, Family, examine, families

VERSIONS = {"4": "TransformerLens 4.x", "3": "TransformerLens 3.9"}


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    chosen = [family for family in families() if not names or family.name in names]
    print(f"| architecture | configuration | {' | '.join(VERSIONS.values())} | refused, and why |")
    print("|---|---|---|---|---|")
    agree: set[str] = set()
    for family in sorted(chosen, key=lambda family: (family.architecture.lower(), family.name)):
        found = examine(family)
        here, wrong = _verdict(family, found), _unexpected(family, found)
        if here == "agrees" and not wrong:
            agree.add(family.architecture)
        verdicts = [
            f"**{wrong}**" if wrong and major == MAJOR else here if major == MAJOR else _expected(family, major)
            for major in VERSIONS
        ]
        print(f"| {family.architecture} | `{family.name}` | {' | '.join(verdicts)} | {_reasons(family)} |", flush=True)
    print(f"\n{len(agree)} architectures agree to {TOLERANCE:g} on TransformerLens {MAJOR}, variants counted once.")


def _verdict(family: Family, found: dict[str, float | Exception]) -> str:
    if "boot" in found:
        return "does not run"
    return "refused" if "model" in found else "agrees"


def _expected(family: Family, major: str) -> str:
    if "boot" in family.refusals(major):
        return "does not run"
    return "agrees" if family.runs(major) else "refused"


def _unexpected(family: Family, found: dict[str, float | Exception]) -> str:
    """What the run gave that the table does not say."""
    refusals, said = family.refusals(), []
    for name, outcome in found.items():
        if name in refusals:
            said += [] if refusals[name].matches(outcome) else [f"{name}: {_short(outcome)}"]
        elif isinstance(outcome, Exception) or (outcome >= TOLERANCE and name != "logits"):
            said.append(f"{name}: {_short(outcome)}")
    return "; ".join(said)


def _short(outcome: float | Exception) -> str:
    if isinstance(outcome, Exception):
        return f"{type(outcome).__name__}: {str(outcome)[:120]}".replace("\n", " ").replace("|", "/")
    return f"differs by {outcome:.1g}"


def _reasons(family: Family) -> str:
    """What is refused on which version; and where "hook_embed" stands, if not behind the embedding module alone."""
    said = []
    for refusal in family.refused:
        what = OPERATIONS[refusal.what][0] if refusal.what in OPERATIONS else ""
        both = len(refusal.on) == len(VERSIONS) or "TransformerLens 3.9" in refusal.why
        where = "" if both else f" (on {' and '.join(VERSIONS[major] for major in refusal.on)})"
        said.append(f"{what}{': ' if what else ''}{refusal.why}{where}")
    if family.embedding:
        behind = family.embedding.get("module") or family.embedding["scale"]
        where = "" if len(family.embedding["on"]) == len(VERSIONS) else f" on {VERSIONS[family.embedding['on'][0]]}"
        said.append(f"`hook_embed` stands behind `{behind}`{where}")
    return "; ".join(said)


if __name__ == "__main__":
    main(sys.argv[1:])
