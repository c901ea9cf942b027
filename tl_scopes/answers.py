"""The answer map: which token of the prompt, and of the answer before it, moves which token of an answer."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsIndex

from jaxtyping import Float
from torch import Tensor

from tl_scopes import models
from tl_scopes.jacobian.span import Span
from tl_scopes.models import readable
from tl_scopes.models.arguments import as_int
from tl_scopes.results import units
from tl_scopes.results.attribution import Attribution
from tl_scopes.results.attribution_map import AttributionMap, answers_of, written
from tl_scopes.results.json_text import parsed, text_of
from tl_scopes.results.traced import Traced
from tl_scopes.results.units import Unit
from tl_scopes.scopes.scope import Scope, warn
from tl_scopes.views import answer_map as card
from tl_scopes.views.live import LiveView, LiveViews
from tl_scopes.views.markup import saved
from tl_scopes.views.palette import Colors

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

VERSION = 1


class AnswerInfluence(NamedTuple):
    """One row of `AnswerMap.top`.

    Attributes:
        row: which token of the answer is moved, counted from 0.
        answer_token: its text.
        position: where the token that moves it stands, counted from the start of the prompt.
        token: its text.
        score: its score, in the scope's unit.
        share: the score over the sum of the sizes of all scores of the row.
    """

    row: int
    answer_token: str
    position: int
    token: str
    score: float
    share: float


@dataclass(frozen=True, eq=False, repr=False)
class AnswerMap:
    """How much each token of a prompt, and each earlier token of the answer, moves each token of the answer.

    Made by `tl_scopes.answer_map`. `rows[3]` is the `Attribution` of one token; `rows[" Paris"]`, `rows[2:5]` and
    `rows.span(...)` are that of several together, for which one more backward pass goes through the graph that the map
    keeps. `rows.by("word")` has a row and a column for each word.

    Attributes:
        answers: one Attribution for each row, in their order: the scores of the prompt's tokens and of the answer's
            tokens before it.
        groups: which tokens each unit consists of, counted from the start of the prompt: those of the prompt, and those
            of the answer, which are the rows. A unit is a token, except in what `by` returns.
        prompt_length: how many of the units, and so of the columns, are of the prompt.
        answer_texts: the text of each row.
        scope: the question; None in a map that was read back, from JSON or a pickle, and in a copy.
        lin: the linearised answer; None in a map that was read back.
    """

    answers: tuple[Attribution, ...]
    groups: tuple[range, ...]
    prompt_length: int
    answer_texts: tuple[str, ...]
    scope: Scope | None = None
    lin: Span | None = None

    @classmethod
    def of(cls, scope: Scope, lin: Span) -> "AnswerMap":
        """Ask a scope about each token of a linearised answer.

        Raises: as the scope does.
        """
        lin.require_finite()
        groups = tuple(range(i, i + 1) for i in range(lin.prompt_length + lin.answer.steps))
        return cls._asked(scope, lin, groups)

    @classmethod
    def of_tokens(cls, answers: Sequence[Attribution], texts: Iterable[str]) -> "AnswerMap":
        """A map with no model to ask again, of the Attribution and the text of each token of an answer.

        Raises:
            ValueError: where there are no answers.
        """
        if not answers:
            raise ValueError("an answer map has a row for each token of the answer, got none: give one at least.")
        n = len(answers[0].tokens)
        groups = tuple(range(i, i + 1) for i in range(n + len(answers)))
        return cls(tuple(answers), groups, n, tuple(map(readable, texts)))

    @classmethod
    def _asked(cls, scope: Scope, lin: Span, groups: tuple[range, ...]) -> "AnswerMap":
        n = lin.prompt_length
        rows = [group for group in groups if group.start >= n]
        answers = scope.ask([lin.part(row.start - n, row.stop - n) for row in rows])
        warn(scope, answers)
        tokens = lin.answer.tokens
        texts = tuple(readable("".join(token.text for token in tokens[r.start - n : r.stop - n])) for r in rows)
        return cls(tuple(answers), groups, len(groups) - len(rows), texts, scope, lin)

    def __repr__(self) -> str:
        rows = models.counted(len(self), "token")
        if any(len(group) > 1 for group in self.groups):
            rows = f"{models.counted(len(self), 'group')} of tokens"
        return (
            f"AnswerMap({self.text!r} from {self.answers[0].question}: {rows} of the answer, "
            f"{self.prompt_length} of the prompt)"
        )

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled and copied are the rows, as in JSON, and neither the model nor the graph of its pass."""
        return {**vars(self), "scope": None, "lin": None}

    def __len__(self) -> int:
        return len(self.answers)

    def __iter__(self) -> Iterator[Attribution]:
        return iter(self.answers)

    @property
    def text(self) -> str:
        """The answer."""
        return readable("".join(self.answer_texts))

    @property
    def str_tokens(self) -> tuple[str, ...]:
        """The text of each column: the prompt's tokens, and the answer's but for the last."""
        return self.answers[-1].str_tokens

    @property
    def answer_labels(self) -> tuple[str, ...]:
        """The text of each row as tables and axes name it: as `Attribution.labels` names the tokens of columns."""
        before = self.str_tokens[: self.prompt_length]
        return units.labels((*before, *self.answer_texts))[self.prompt_length :]

    @cached_property
    def map(self) -> AttributionMap:
        """The rows as a map of predictions, by the position after which each is read; columns that `by` has put
        together count as one position.
        """
        if all(len(group) == 1 for group in self.groups):
            return AttributionMap(self.answers)
        return AttributionMap(
            tuple(
                replace(answer, positions=tuple(range(len(answer.scores))), position=len(answer.scores) - 1)
                for answer in self.answers
            )
        )

    @property
    def scores(self) -> Float[Tensor, "answer token"]:
        """One row for each token of the answer, in the scope's unit; zero for what comes after it."""
        return self.map.scores

    @property
    def share(self) -> Float[Tensor, "answer token"]:
        """One row for each token of the answer: shares, whose sizes sum to 1; zero for what comes after it."""
        return self.map.share

    def top(self, count: int | SupportsIndex = 5) -> tuple[AnswerInfluence, ...]:
        """The cells of the map with the largest shares, over all rows.

        The first rows have fewer columns, among which the shares are larger: to compare within a row, ask
        `rows[3].top()`; for the answer as a whole, `rows[:].top()`.

        Raises:
            TypeError: for a count that is not an integer.
            ValueError: for a count below 1.
        """
        count = models.as_count(count, "count must be at least 1")
        cells = [
            AnswerInfluence(row, text, *one)
            for row, (answer, text) in enumerate(zip(self.answers, self.answer_texts, strict=True))
            for one in answer.top(count)
        ]
        return tuple(sorted(cells, key=lambda cell: -abs(cell.share))[:count])

    def by(self, unit: Unit | Iterable[tuple[int, int] | range]) -> "AnswerMap":
        """The map with tokens put together to words, sentences, numbers or spans of your own, in rows and columns.

        The score of a column is what the tokens have together, as in `Attribution.by`. A row is the span of its tokens,
        the gradient of the sum of their log-probabilities, which their scores one by one do not tell: each is asked
        again. A unit never goes from the prompt over into the answer.

        Args:
            unit: "word", "sentence", "number", or spans of tokens, counted from the start of the prompt.

        Cost: one backward pass for each row, for a SemanticScope.

        Raises: as `Attribution.by` does. ValueError for a span that goes from the prompt over into the answer, and for
            a map that was read back, which has no model to ask.

        Example:
            >>> rows = tls.answer_map(model, "The unheard keys", " near the cabinet", tls.SemanticScope())
            >>> rows.by("word").answer_texts, rows.by("word").top(1)[0].token
            ((' near', ' the', ' cabinet'), ' unheard')
        """
        scope, lin = self._source
        self.answers[0].require_grouping()
        n, last = lin.prompt_length, lin.answer.tokens[-1].text
        parts = (*lin.parts[:n], *["answer"] * lin.answer.steps) if lin.parts else ("",) * (n + lin.answer.steps)
        if isinstance(unit, str):
            apart = [(part, i >= n) for i, part in enumerate(parts)]
            groups, how = units.grouped((*lin.str_tokens, last), unit, apart), str(unit)
        else:
            groups, how = units.spanned(range(len(parts)), unit, parts), "span"
        over = [group for group in groups if group.start < n < group.stop]
        if over:
            raise ValueError(
                f"the span ({over[0].start}, {over[0].stop}) goes from the prompt over into the answer, which begins "
                f"at {n}: give a span on either side."
            )
        found = AnswerMap._asked(scope, lin, tuple(groups))
        return replace(found, answers=tuple(found._columns(answer, how) for answer in found.answers))

    def _columns(self, answer: Attribution, how: str = "unit") -> Attribution:
        """An answer with its tokens put together as the columns are."""
        if all(len(group) == 1 for group in self.groups):
            return answer
        return answer.grouped([group for group in self.groups if group.stop <= len(answer.scores)], how)

    @property
    def _source(self) -> tuple[Scope, Span]:
        """The question and the linearised answer.

        Raises:
            ValueError: for a map that was read back.
        """
        if self.scope is None or self.lin is None:
            raise ValueError(
                "this map was read back, and has no model to ask again: its rows are there, and for spans and "
                "words call answer_map."
            )
        return self.scope, self.lin

    def __getitem__(self, which: int | SupportsIndex | slice | str) -> Attribution:
        """The Attribution of one row, by its number; or of several together, by a slice of numbers or by their text.

        Raises:
            IndexError: for a number that is not there, and a slice without tokens.
            ValueError: for a text that the answer does not hold, or holds more than once; for several rows of a map
                that was read back.
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
            raise IndexError(
                f"there is no token {index} in the answer: it has {len(self)}, {list(self.answer_texts)[:20]}."
            )
        return self.answers[index]

    def span(self, where: str | tuple[int, int]) -> Attribution:
        """The Attribution of a part of the answer: the gradient of the sum of its tokens' log-probabilities, or
        whatever the scope sums over an answer. What stands before the part counts as the prompt.

        Args:
            where: a text in the answer, or a pair of characters (start, stop). Tokens that it touches belong to it.

        Cost: one backward pass for a SemanticScope.

        Raises:
            ValueError: for a text that the answer does not hold, or holds more than once; for characters out of range.
            TypeError: for anything else.
        """
        text, places = units.offsets(self.answer_texts)
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
        if stop - start == 1:
            return self.answers[start]
        scope, lin = self._source
        first, last = self.groups[self.prompt_length + start], self.groups[self.prompt_length + stop - 1]
        return self._columns(scope(lin.part(first.start - lin.prompt_length, last.stop - lin.prompt_length)))

    def traced(self, hops: int | SupportsIndex | None = None, *, span: slice | None = None) -> Traced:
        """How much of the answer goes back to each token of the prompt, also through what stands between.

        Each row's shares are split into those of the prompt R [answer, token] and those of earlier tokens of the answer
        Q [answer, answer], which is strictly lower triangular. The weight of a token of the answer passes to what moved
        it, and from earlier tokens on to what moved these:

            total = w + w Q + w Q² + … times R = w (I − Q)⁻¹ R

        The sum is finite, since nothing moves what stands before it, so that after as many hops as the answer has
        tokens all weight has come to the prompt. What is multiplied here are shares, not derivatives: a statement about
        how much each step is moved by what, and not the derivative of anything. Shares with a sign (`RelevanceScope`)
        count by their sizes: what spoke against a token of the answer moved it too.

        Args:
            hops: how many steps weight takes: 1 is straight to the prompt, 2 also through one token of the answer, and
                so on; None is until nothing is left.
            span: which rows are explained, `slice(5, 8)` say, each with the same weight; None is all.

        Raises:
            TypeError: for hops that are not an integer, and a span that is not a slice.
            ValueError: for hops below 1, and an empty span.

        Source: the recursive hops of FlashTrace, Pan et al. 2026 (arXiv:2602.01914), for the shares of any scope.
        Departure: theirs go through the reasoning before a span and leave out what one token of the span owes to
            another; here weight passes through every earlier token of the answer. For one token they are the same. A
            hop of theirs is one more than the first here, which goes straight to the prompt.
        """
        if span is not None and not isinstance(span, slice):
            raise TypeError(f"the span of a trace is a slice of the rows, slice(5, 8) say, got {span!r}.")
        if hops is not None:
            hops = models.as_count(hops, "hops must be at least 1")
        chosen = range(len(self))[span or slice(None)]
        if not len(chosen):
            raise ValueError(f"the span {span} holds no token of the answer, which has {len(self)}.")
        return Traced.of(self.answers, self.share, chosen, len(self) if hops is None else hops)

    def to_dataframe(self) -> "pd.DataFrame":
        """One row for each cell: the number and text of the answer's token, and the columns of
        `Attribution.to_dataframe`.
        """
        import pandas as pd

        frames = [
            answer.to_dataframe().assign(row=k, answer_token=text)
            for k, (answer, text) in enumerate(zip(self.answers, self.answer_texts, strict=True))
        ]
        whole = pd.concat(frames, ignore_index=True)
        return whole[["row", "answer_token", *[name for name in whole if name not in ("row", "answer_token")]]]

    def to_json(self, path: str | Path | None = None) -> str:
        """The rows as text that `from_json` reads back without loss. The model is not in it, so that what was read back
        cannot be asked about spans.

        Args:
            path: where to write it.
        """
        groups = [[group.start, group.stop] for group in self.groups]
        more = {"groups": groups, "prompt_length": self.prompt_length, "answer_texts": self.answer_texts}
        return saved(written("AnswerMap", VERSION, self.answers, **more), path)

    @classmethod
    def from_json(cls, text: str | Path) -> "AnswerMap":
        """Read what `to_json` wrote.

        Args:
            text: the text itself, or the path of the file that holds it, as a `pathlib.Path`.

        Raises:
            TypeError: for something that is neither.
            OSError: for a file that cannot be read.
            ValueError: for text that is not an AnswerMap, or that a later version has written.
        """
        record = parsed(text_of(text), "an AnswerMap", VERSION)
        try:
            answers = answers_of(record)
            groups = tuple(range(start, stop) for start, stop in record["groups"])
            found = cls(answers, groups, int(record["prompt_length"]), tuple(map(str, record["answer_texts"])))
        except (KeyError, TypeError) as error:
            raise ValueError(f"this AnswerMap does not hold what it should: {error!r}.") from error
        if not answers or not len(answers) == len(found.answer_texts) == len(groups) - found.prompt_length:
            raise ValueError(
                f"this AnswerMap has {len(answers)} rows, {len(found.answer_texts)} texts and "
                f"{len(groups) - found.prompt_length} groups of the answer: every row needs one text and one group."
            )
        return found

    # -- pictures -----------------------------------------------------------------------------------------------------

    def plot(self, colors: Colors = "root") -> "Figure":
        """A heat map: the answer from top to bottom, prompt and earlier answer from left to right.

        Args:
            colors: how shares become colours, as in `Attribution.to_html`.
        """
        return card.plot(self, colors)

    def to_html(self, path: str | Path | None = None, *, colors: Colors = "root") -> str:
        """A static page of the heat map. It has no script and needs no network.

        Args:
            path: where to write it.
            colors: how shares become colours, as in `Attribution.to_html`.
        """
        return saved(card.page(self, colors), path)

    def show(self) -> LiveView | LiveViews:
        """circuitsvis' tokens for each row, for a live notebook; their script comes from the installed package."""
        return self.map.show()

    def _repr_html_(self) -> str:
        return card.fragment(self)
