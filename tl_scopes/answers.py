"""The answer map: which token moves which token of what was said, and spans of it; and through earlier tokens."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor

from tl_scopes import models
from tl_scopes.jacobian.span import Span
from tl_scopes.models.arguments import as_int
from tl_scopes.results.attribution import Attribution
from tl_scopes.results.attribution_map import AttributionMap
from tl_scopes.results.units import offsets
from tl_scopes.scopes.scope import Scope, warn
from tl_scopes.views.live import LiveView

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, repr=False)
class AnswerMap:
    """How much each token of a prompt, and each earlier token of the answer, moves each token of the answer.

    Made by `tl_scopes.answer_map`. `rows[3]` is the `Attribution` of one token said; `rows[" Paris"]`, `rows[2:5]` and
    `rows.span(...)` are that of several together, for which one more backward pass goes through the graph that the map
    keeps.

    Attributes:
        answers: one Attribution for each token of the answer, in their order: the scores of the prompt's tokens and of
            the answer's tokens before it.
        scope: the question.
        lin: the linearised answer.
    """

    answers: tuple[Attribution, ...]
    scope: Scope
    lin: Span

    @classmethod
    def of(cls, scope: Scope, lin: Span) -> "AnswerMap":
        """Ask a scope about each token of a linearised answer.

        Raises: as the scope does.
        """
        lin.require_finite()
        parts = [lin.part(k, k + 1) for k in range(lin.answer.steps)]
        answers = scope.ask(parts)
        warn(scope, answers)
        return cls(tuple(answers), scope, lin)

    def __repr__(self) -> str:
        return (
            f"AnswerMap({self.text!r} from {self.answers[0].scope}: {len(self)} tokens said, "
            f"{self.prompt_length} tokens of the prompt)"
        )

    def __len__(self) -> int:
        return len(self.answers)

    def __iter__(self) -> Iterator[Attribution]:
        return iter(self.answers)

    @property
    def text(self) -> str:
        """The answer."""
        return self.lin.answer.text

    @property
    def prompt_length(self) -> int:
        """How many of the columns are tokens of the prompt; the others are the answer's, but for its last."""
        return self.lin.prompt_length

    @property
    def str_tokens(self) -> tuple[str, ...]:
        """The text of each column: the prompt's tokens, and the answer's but for the last."""
        return self.answers[-1].str_tokens

    @property
    def spoken(self) -> tuple[str, ...]:
        """The text of each row: the answer's tokens."""
        return tuple(token.text for token in self.lin.answer.tokens)

    @cached_property
    def map(self) -> AttributionMap:
        """The rows as a map of predictions, by the position after which each is read."""
        return AttributionMap(self.answers)

    @property
    def scores(self) -> Float[Tensor, "answer token"]:
        """One row for each token said, in the scope's unit; zero for what comes after it."""
        return self.map.scores

    @property
    def share(self) -> Float[Tensor, "answer token"]:
        """One row for each token said: shares, whose sizes sum to 1; zero for what comes after it."""
        return self.map.share

    def __getitem__(self, which: int | SupportsIndex | slice | str) -> Attribution:
        """The Attribution of one token said, by its number; or of several, by a slice of numbers or by their text.

        Raises:
            IndexError: for a number that is not there, and a slice without tokens.
            ValueError: for a text that the answer does not hold, or holds more than once.
            TypeError: for anything else.
        """
        if isinstance(which, str):
            return self.span(which)
        if isinstance(which, slice):
            start, stop, step = which.indices(len(self))
            if step != 1 or start >= stop:
                raise IndexError(f"a span is one token or more that follow one another, got {which} of {len(self)}.")
            return self._of(start, stop)
        index = as_int(which, "a token of the answer is named by its number, or by text")
        if not -len(self) <= index < len(self):
            raise IndexError(f"there is no token {index} in the answer: it has {len(self)}, {list(self.spoken)[:20]}.")
        return self.answers[index]

    def span(self, where: str | tuple[int, int]) -> Attribution:
        """The Attribution of a part of the answer: the gradient of the sum of its tokens' log-probabilities, or
        whatever the scope sums over an answer. What was said before the part counts as the prompt.

        Args:
            where: a text in the answer, or a pair of characters (start, stop). Tokens that it touches belong to it.

        Cost: one backward pass for a SemanticScope.

        Raises:
            ValueError: for a text that the answer does not hold, or holds more than once; for characters out of range.
            TypeError: for anything else.
        """
        text, places = offsets(self.spoken)
        if isinstance(where, str):
            if not where or where not in text:
                raise ValueError(f"the answer does not hold {where!r}: it is {text!r}.")
            if text.count(where) > 1:
                found = [i for i in range(len(text)) if text.startswith(where, i)]
                raise ValueError(
                    f"the answer holds {where!r} at the characters {found}: give (start, stop), or a longer text."
                )
            start = text.index(where)
            stop = start + len(where)
        else:
            try:
                start, stop = (as_int(end, "characters are counted by integers") for end in where)
            except (TypeError, ValueError) as error:
                raise TypeError(f"a span is a text or a pair of characters (start, stop), got {where!r}.") from error
            if not 0 <= start < stop <= len(text):
                raise ValueError(f"the answer has the characters 0 to {len(text)}, got ({start}, {stop}).")
        touched = [k for k, (begin, end) in enumerate(places) if begin < stop and end > start]
        return self._of(touched[0], touched[-1] + 1)

    def _of(self, start: int, stop: int) -> Attribution:
        return self.answers[start] if stop - start == 1 else self.scope(self.lin.part(start, stop))

    def traced(self, hops: int | SupportsIndex | None = None, *, span: slice | None = None) -> "Traced":
        """How much of the answer goes back to each token of the prompt, also through what was said in between.

        Each row's shares are split into those of the prompt R [answer, token] and those of earlier tokens of the answer
        Q [answer, answer], which is strictly lower triangular. The weight of a token said passes to what moved it, and
        from earlier tokens on to what moved these:

            total = w + w Q + w Q² + … times R = w (I − Q)⁻¹ R

        The sum is finite, since nothing moves what was said before it, so that after as many hops as the answer has
        tokens all weight has come to the prompt. What is multiplied here are shares, not derivatives: a statement about
        how much each step is moved by what, and not the derivative of anything.

        Args:
            hops: how many steps weight takes: 1 is straight to the prompt, 2 also through one token of the answer, and
                so on; None is until nothing is left.
            span: which tokens said are explained, `slice(5, 8)` say, each with the same weight; None is all.

        Raises:
            TypeError: for a span that is not a slice.
            ValueError: for hops below 1, and an empty span.

        Source: the recursion of FlashTrace (see the documentation), with the shares of any scope.
        """
        if span is not None and not isinstance(span, slice):
            raise TypeError(f"the span of a trace is a slice of the tokens said, slice(5, 8) say, got {span!r}.")
        if hops is not None:
            hops = models.as_count(hops, "hops must be at least 1")
        chosen = range(len(self))[span or slice(None)]
        if not len(chosen):
            raise ValueError(f"the span {span} holds no token of the answer, which has {len(self)}.")
        share = self.share.abs().double()
        n = self.prompt_length
        R, Q = share[:, :n], share.new_zeros(len(self), len(self))
        Q[:, : share.shape[1] - n] = share[:, n:]
        weight = share.new_zeros(len(self))
        weight[list(chosen)] = 1 / len(chosen)
        arrived = []
        for _ in range(len(self) if hops is None else hops):
            arrived.append(weight @ R)
            weight = weight @ Q
        while len(arrived) > 1 and not arrived[-1].any():
            arrived.pop()
        last = self.answers[-1]
        return Traced(
            torch.stack(arrived), float(weight.sum()), last.str_tokens[:n], last.parts[:n], last.scope, last.model
        )

    def to_dataframe(self) -> "pd.DataFrame":
        """One row for each token said and token: the number and text of what was said, and the columns of
        `Attribution.to_dataframe`.
        """
        import pandas as pd

        frames = [
            answer.to_dataframe().assign(said=k, said_token=text)
            for k, (answer, text) in enumerate(zip(self.answers, self.spoken, strict=True))
        ]
        whole = pd.concat(frames, ignore_index=True)
        return whole[["said", "said_token", *[name for name in whole if name not in ("said", "said_token")]]]

    # -- pictures -----------------------------------------------------------------------------------------------------

    def plot(self) -> "Figure":
        """A heat map: what was said from top to bottom, tokens from left to right."""
        return self.map.plot()

    def to_html(self, path: str | Path | None = None) -> str:
        """A static page of the heat map. It has no script and needs no network; `path` is where to write it."""
        return self.map.to_html(path)

    def show(self) -> LiveView:
        """circuitsvis' attention view, for a live notebook; its script comes from the installed package."""
        return self.map.show()

    def _repr_html_(self) -> str:
        return self.map._repr_html_()


@dataclass(frozen=True, eq=False, repr=False)
class Traced:
    """How much of an answer goes back to each token of the prompt, per hop through tokens of the answer.

    Shares are multiplied here, not derivatives: see `AnswerMap.traced`.

    Attributes:
        hops: [hop, token], what arrives at each token of the prompt directly, after passing through one token of the
            answer, through two, and so on.
        left: the weight that is still at tokens of the answer; 0 where all hops were taken.
        str_tokens: the text of each token of the prompt.
        parts: of a chat, whose each token is.
        scope: the question.
        model: the name of the model.
    """

    hops: Float[Tensor, "hop token"]
    left: float
    str_tokens: tuple[str, ...]
    parts: tuple[str, ...] = field(default=())
    scope: str = ""
    model: str = ""

    @property
    def total(self) -> Float[Tensor, "token"]:
        """What arrives at each token of the prompt in all; with `left` it sums to 1."""
        return self.hops.sum(0)

    def __repr__(self) -> str:
        order = self.total.argsort(descending=True)[:3].tolist()
        shown = ", ".join(f"{self.str_tokens[i]!r} {self.total[i]:.0%}" for i in order)
        return f"Traced({self.scope}: {shown}; {len(self.hops)} hops, {self.left:.0%} left; shares, not derivatives)"

    def to_dataframe(self) -> "pd.DataFrame":
        """One row for each token of the prompt: position, token, total, and a column for each hop."""
        import pandas as pd

        columns = {f"hop_{i}": of_hop.tolist() for i, of_hop in enumerate(self.hops)}
        named = {"position": range(len(self.str_tokens)), "token": self.str_tokens, "total": self.total.tolist()}
        return pd.DataFrame(named | columns)
