"""What `Attribution.checks` found: a few lines, a table, a card."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import pandas as pd

Verdict = Literal["fine", "look", "not applicable"]


@dataclass(frozen=True)
class Check:
    """One question that a careful reviewer would ask of an answer, and what was found."""

    name: str
    """The question, in a word."""
    verdict: Verdict
    """"fine"; "look", where the scores should not be read without the finding; "not applicable", which says why."""
    finding: str
    """One sentence with the numbers."""
    cost: str
    """What it took to find out."""

    @property
    def in_full(self) -> str:
        """The finding, and behind it what it cost."""
        return self.finding if self.cost == "none" else f"{self.finding} [{self.cost}]"


@dataclass(frozen=True, eq=False, repr=False)
class Checks:
    """The checks of one answer, in the order in which one would ask. `checks["sinks"]` is one of them."""

    found: tuple[Check, ...]
    scope: str
    """The question that was checked, as it is written in Python."""
    model: str
    """Name of the model."""
    position: int
    """Where the prediction was read."""

    def __repr__(self) -> str:
        lines = [f"Checks of {self.scope} on {self.model}, after position {self.position}:"]
        names, verdicts = (max(len(getattr(check, part)) for check in self.found) for part in ("name", "verdict"))
        lines += [f"  {check.name:{names}}  {check.verdict:{verdicts}}  {check.in_full}" for check in self.found]
        return "\n".join(lines)

    def __iter__(self) -> Iterator[Check]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)

    def __getitem__(self, name: str) -> Check:
        """The check of this name.

        Raises:
            KeyError: for a name that none has.
        """
        for check in self.found:
            if check.name == name:
                return check
        raise KeyError(f"there is no check {name!r}: there are {', '.join(check.name for check in self.found)}.")

    def to_dataframe(self) -> "pd.DataFrame":
        """One row per check: its name, verdict, finding and cost."""
        import pandas as pd

        return pd.DataFrame([vars(check) for check in self.found]).rename(columns={"name": "check"})

    def _repr_html_(self) -> str:
        from tl_scopes.views import checks as checks_card

        return checks_card.fragment(self)
