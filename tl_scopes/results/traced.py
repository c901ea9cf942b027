"""How much of an answer goes back to each token of the prompt, also through the answer's earlier tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor

from tl_scopes.models import Target, counted
from tl_scopes.models.linear_rules import under
from tl_scopes.results.attribution import Attribution, Influence
from tl_scopes.views import answer_map as card
from tl_scopes.views.markup import saved

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False, repr=False)
class Traced:
    """How much of an answer goes back to each token of the prompt, per hop through tokens of the answer.

    Shares are multiplied here, not derivatives: see `AnswerMap.traced`.

    Attributes:
        hops: [hop, token], what arrives at each token of the prompt directly, after passing through one token of the
            answer, through two, and so on.
        left: the weight that is still at tokens of the answer; 0 where all hops were taken.
        answer: the total as an Attribution, whose scores are what arrives at each token of the prompt in all. Words of
            it are sums: `traced.answer.by("word")`.
    """

    hops: Float[Tensor, "hop token"]
    left: float
    answer: Attribution

    @classmethod
    def of(
        cls,
        rows: Sequence[Attribution],
        share: Float[Tensor, "answer token"],
        chosen: Sequence[int],
        hops: int,
    ) -> "Traced":
        """Follow the shares of some tokens of an answer back to the prompt, hop by hop:

            w R,  w Q R,  w Q² R  and so on

        with the shares R [answer, token] of the prompt's tokens and Q [answer, answer] of the answer's earlier tokens,
        and the same weight w for each row that is explained. Shares with a sign count by their sizes.

        Args:
            rows: the Attribution of each token of the answer.
            share: their shares: R, and behind it Q without its last column; zero for what comes after a row.
            chosen: the rows that are explained.
            hops: how many hops are taken, at most.
        """
        first, last = rows[0], rows[-1]
        n = len(first.scores)
        signed, share = bool((share < 0).any()), share.abs().double()
        R, Q = share[:, :n], share.new_zeros(len(rows), len(rows))
        Q[:, : share.shape[1] - n] = share[:, n:]
        weight = share.new_zeros(len(rows))
        weight[list(chosen)] = 1 / len(chosen)
        arrived = []
        for _ in range(hops):
            arrived.append(weight @ R)
            weight = weight @ Q
        while len(arrived) > 1 and not arrived[-1].any():
            arrived.pop()
        left = float(weight.sum())
        note = "shares passed on through earlier tokens of the answer are multiplied: they are not derivatives"
        note += "; of shares with a sign the sizes" if signed else ""
        if len(chosen) < len(rows):
            note += f"; explained are the tokens {chosen[0] + 1} to {chosen[-1] + 1} of {len(rows)} of the answer"
        unexplained = f"; {left:.1%} of the weight is still in the answer" if left else ""
        answer = replace(
            last.without(last.positions[n:]),
            scores=torch.stack(arrived).sum(0),
            position=first.position,
            target=_joined([rows[row] for row in chosen]),
            versus=None,
            scope=f"{last.scope}, traced",
            unit="share of the answer",
            predictions=() if chosen[0] else first.predictions,
            details={},
            value=None,
            quantity=None,
            grouping="sum",
            notes=(*last.notes, note + unexplained),
        )
        return cls(torch.stack(arrived), left, answer)

    @property
    def total(self) -> Float[Tensor, "token"]:
        """What arrives at each token of the prompt in all; with `left` it sums to 1."""
        return self.hops.sum(0)

    @property
    def str_tokens(self) -> tuple[str, ...]:
        """The text of each token of the prompt."""
        return self.answer.str_tokens

    @property
    def parts(self) -> tuple[str, ...]:
        """The part of a chat that each token of the prompt belongs to; empty for other prompts."""
        return self.answer.parts

    def top(self, count: int | SupportsIndex = 5) -> tuple[Influence, ...]:
        """The tokens of the prompt at which most arrives: `score` is what arrives, `share` its part of all that does.

        Raises:
            TypeError: for a count that is not an integer.
            ValueError: for a count below 1.
        """
        return self.answer.top(count)

    def __repr__(self) -> str:
        place = self.answer.place
        shown = ", ".join(f"{row.token!r}{place(row.position)} {row.score:.0%}" for row in self.top(3))
        shown = shown or "no token that is counted"
        question = under(self.answer.scope.removesuffix(", traced"), self.answer.rules)
        hops = counted(len(self.hops), "hop")
        return f"Traced({question}: {shown}; {hops}, {self.left:.0%} left; shares, not derivatives)"

    def to_dataframe(self) -> "pd.DataFrame":
        """One row for each token of the prompt: position, token, total, and a column for each hop."""
        import pandas as pd

        columns = {f"hop_{i}": of_hop.tolist() for i, of_hop in enumerate(self.hops, start=1)}
        named = {"position": self.answer.positions, "token": self.str_tokens, "total": self.total.tolist()}
        return pd.DataFrame(named | columns)

    def to_html(self, path: str | Path | None = None) -> str:
        """A static page of the coloured prompt, and what arrives at each hop; `path` is where to write it."""
        return saved(card.traced_page(self), path)

    def _repr_html_(self) -> str:
        return card.traced_fragment(self)


def _joined(answers: list[Attribution]) -> Target | None:
    """The targets of several rows, one after another, as one target; None where a row has none."""
    targets = [answer.target for answer in answers if answer.target is not None]
    if len(targets) < len(answers):
        return None
    return Target(tuple(token for target in targets for token in target.tokens))
