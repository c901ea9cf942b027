"""What is measured is kept in `tests/data`, and the tables of the pages are made from there."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tests.real.model import FOLDER, GGUF, PACKAGE
from tl_scopes import models
from tl_scopes.bootstrap import bootstrap

DATA = Path(__file__).parent.parent / "data"


def made(model: models.Model, folder: str | None = None) -> dict[str, Any]:
    """With what a model is measured: versions, the model's name and weights, precision and attention."""
    found = asdict(models.Provenance.of(model))
    if folder is not None and Path(folder).resolve() == FOLDER.resolve():
        found["model"] = f"{GGUF.stem} ({PACKAGE})"
    return {name: value for name, value in found.items() if value is not None}


def rounded(value: float, digits: int = 5) -> float | None:
    """A number to so many significant digits; None where it is not one."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def read(path: Path) -> dict[str, Any]:
    """What is stored; nothing, where there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write(path: Path, stored: Mapping[str, Any]) -> None:
    """Store something, at once or not at all, so that a run that is stopped leaves a file that can be read."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(stored, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
    part.replace(path)


def started(path: Path, settings: Mapping[str, Any], made_with: Mapping[str, Any]) -> dict[str, Any]:
    """What is stored, to go on with; or the beginning of it.

    Raises:
        SystemExit: where what is stored was measured otherwise, with what differs.
    """
    stored = read(path) or {"settings": dict(settings), "made with": dict(made_with)}
    for part, wanted in (("settings", settings), ("made with", made_with)):
        have = stored[part]
        other = [name for name in {**have, **wanted} if name != "date" and have.get(name) != wanted.get(name)]
        if other:
            told = "; ".join(f"{name}: {have.get(name)!r}, now {wanted.get(name)!r}" for name in other)
            raise SystemExit(f"{path.name} was measured otherwise ({told}): go on as it was, or add --anew.")
    return stored


# -- numbers in words -------------------------------------------------------------------------------------------------


def short(value: float, sign: str = "", digits: int = 2) -> str:
    """A number as the pages write it: .84, 1.00, −.06; with the sign "+" also +.05. Nothing has no sign."""
    if not float(f"{value:.{digits}f}"):
        return f".{'0' * digits}"
    text = f"{value:{sign}.{digits}f}".replace("-", "−")
    return text.replace("0.", ".", 1) if abs(float(f"{value:.{digits}f}")) < 1 else text


def with_ends(mean: float, low: float, high: float, sign: str = "", digits: int = 2) -> str:
    """A mean with the ends of its interval: .84 (.80 to .88)."""
    return "{} ({} to {})".format(*(short(one, sign, digits) for one in (mean, low, high)))


def interval(values: torch.Tensor, sign: str = "") -> str:
    """The mean with its 95% bootstrap interval, as `faithfulness.summary` and `agreement` draw it."""
    mean, low, high, _ = bootstrap(values.double()[:, None], 0.95, 2000, seed=0)
    return with_ends(mean.item(), low.item(), high.item(), sign)


# -- pages ------------------------------------------------------------------------------------------------------------


def page_with_marks(path: Path, begin: str, end: str) -> str:
    """Read a page, and refuse one that has no place for the table."""
    page = path.read_text(encoding="utf-8")
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"{str(path)!r} has no place for the table: put the lines {begin} and {end} into it.")
    return page


def between(path: Path, begin: str, end: str) -> str:
    """What stands between the marks of a page."""
    page = page_with_marks(path, begin, end)
    return page[page.index(begin) + len(begin) : page.index(end)].strip("\n")


def put_into(path: Path, text: str, begin: str, end: str) -> None:
    """Replace what stands between the marks of a page."""
    page = page_with_marks(path, begin, end)
    page = re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n{text}\n{end}", page, flags=re.DOTALL)
    path.write_text(page, encoding="utf-8")
