"""The findings of `tl_scopes.check`: a few lines, a table, a card."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tl_scopes.results.attribution import Attribution
from tl_scopes.views import checks as card

if TYPE_CHECKING:
    import pandas as pd

Verdict = Literal["fine", "look", "not applicable"]


@dataclass(frozen=True)
class Check:
    """One question that a careful reviewer would ask of an answer, and what was found.

    Attributes:
        name: the question, in a word.
        verdict: "fine"; "look", where the scores should not be read without the finding; or "not applicable".
        finding: one sentence with the numbers; where the check is not applicable, the reason.
        cost: what it took to find out, in forward and backward passes; "none" where it was free.
    """

    name: str
    verdict: Verdict
    finding: str
    cost: str

    @property
    def in_full(self) -> str:
        """The finding, followed by what it cost, unless it was free."""
        return self.finding if self.cost == "none" else f"{self.finding} [{self.cost}]"


@dataclass(frozen=True, eq=False, repr=False)
class Checks:
    """The checks of one answer. `checks["sinks"]` is one of them.

    Attributes:
        found: the checks, in the order in which a reviewer would ask.
        answer: the scores that were checked, without the positions that were set aside.
    """

    found: tuple[Check, ...]
    answer: Attribution

    def __repr__(self) -> str:
        answer = self.answer
        lines = [f"Checks of {answer.question} on {answer.model}, after position {answer.position}:"]
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
            KeyError: for a name that no check has.
        """
        for check in self.found:
            if check.name == name:
                return check
        raise KeyError(f"there is no check {name!r}: there are {', '.join(check.name for check in self.found)}.")

    def to_dataframe(self) -> "pd.DataFrame":
        """One row for each check: its name, verdict, finding and cost."""
        import pandas as pd

        return pd.DataFrame([vars(check) for check in self.found]).rename(columns={"name": "check"})

    def _repr_html_(self) -> str:
        return card.fragment(self)
