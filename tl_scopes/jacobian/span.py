"""Several predictions of one text as one: those of the tokens of an answer, each read where the model makes it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_scopes import models
from tl_scopes.jacobian.linearization import Linearization
from tl_scopes.jacobian.pullback import Ends
from tl_scopes.models import LinearRules, Model, ReadPrompt, Target


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Span(Linearization):
    """A model linearised at all predictions of an answer to a prompt together: Y = (y_1, …, y_m), one readout for each
    token of the answer, as a function of the embeddings of the prompt and of the answer.

    Made by `tl_scopes.linearize(model, prompt, answer=...)`, from one forward pass over prompt and answer (teacher
    forcing). It has all verbs of a Linearization. Its `readout` is the readouts one after another, [row · d_of], its
    `logits` are [row vocab]; so a cotangent of a span is a cotangent of every prediction in it, and one backward pass
    gives the gradient of their sum. `single` are the predictions, each for itself.

    `tokens` are those of the prompt and of the answer, up to the last that is read; its own last token moves nothing.
    Where two answers are compared, which may have different lengths, both go through the model in one batch, `tokens`
    ends with those of the other answer, and its predictions are the last rows.
    """

    answer: Target
    """The answer, a token for each of the first rows."""
    against: Target | None = None
    """The other answer, a token for each of the last rows; where both are one token they share a row. It is None where
    nothing is compared."""
    rows: tuple[int, ...] = ()
    """The rows of the forward pass that it consists of."""
    prompt_length: int = 0
    """How many of `tokens` are the prompt."""
    of_answer: bool = False
    """Whether it is a part of a longer answer, so that even a single token is explained by its log-probability."""
    score_answer: bool = False
    """Whether the answer's own tokens get scores as well, but for its last, which moves nothing."""

    def __repr__(self) -> str:
        other = "" if self.against is None else f" against {self.against.text!r}"
        said = models.counted(self.answer.steps, "token")
        return (
            f"Span({self.answer.text!r}{other} after position {self.position}; {self.of} wrt {self.wrt}, "
            f"{said} after {self.prompt_length}, {models.model_name(self.model)})"
        )

    def part(self, start: int, stop: int) -> "Span":
        """The tokens from `start` up to `stop` of the answer; what was said before them counts as the prompt.

        A set of tokens, of which any is meant, is one prediction and stays whole.
        """
        before = self.prompt_length + start
        return replace(
            self,
            tokens=self.tokens[: before + stop - start - 1],
            str_tokens=self.str_tokens[: before + stop - start - 1],
            position=before - 1,
            row=self.rows[start],
            answer=self.answer if self.answer.any_of else Target(self.answer.tokens[start:stop]),
            against=None,
            rows=self.rows[start:stop],
            prompt_length=before,
            parts=(*self.parts, *["answer"] * start) if self.parts else (),
            of_answer=True,
            score_answer=False,
        )

    @property
    def run_tokens(self) -> Int[Tensor, "token"]:
        """The ids of prompt and answer that went through the model, up to the last after which is read."""
        return self.tokens[self.ends.tokens[0]]

    @property
    def scored(self) -> int:
        """How many of the tokens answers have scores for, from the first on: the prompt, and the answer if wanted."""
        return self.prompt_length + (self.answer.steps - 1 if self.score_answer else 0)

    @cached_property
    def ends(self) -> Ends:
        """Which part of the forward pass this is: the tokens where J begins, the rows where it ends."""
        tokens = torch.arange(len(self.tokens), device=self.tokens.device)
        own = self.prompt_length + self.answer.steps - 1
        standing, entries = [tokens[:own]], [self.trace.places[self.rows[0]][0]]
        if len(self.rows) > self.answer.steps:
            standing.append(torch.cat([tokens[: self.prompt_length], tokens[own:]]))
            entries.append(self.trace.places[self.rows[-1]][0])
        return Ends(self.rows, tuple(entries), tuple(standing), len(self.tokens))

    @cached_property
    def single(self) -> tuple[Linearization, ...]:
        """The predictions of the answer, each for itself, and after them those of the other answer."""
        found = []
        for row in self.rows:
            entry, at = self.trace.places[row]
            standing = self.ends.tokens[self.ends.entries.index(entry)][: at + 1]
            texts = tuple(self.str_tokens[i] for i in standing.tolist())
            tokens = self.tokens[standing]
            parts = (*self.parts, *["answer"] * len(texts))[: len(texts)] if self.parts else ()
            one = Linearization(self.model, tokens, texts, at, self.wrt, self.of, self.trace, row, self.notes, parts)
            found.append(one)
        return tuple(found)

    @property
    def embeddings(self) -> Float[Tensor, "token d_model"]:
        """x, the value at the `wrt` hook where the model is linearised."""
        value = self.trace.inputs[self.wrt]
        if len(self.ends.entries) == 1:
            return value[self.ends.entries[0], : len(self.tokens)]
        x = value.new_empty(len(self.tokens), value.shape[-1])
        for entry, standing in zip(self.ends.entries, self.ends.tokens, strict=True):
            x[standing] = value[entry, : len(standing)]
        return x

    @property
    def readout(self) -> Float[Tensor, " d_of"]:
        """The readouts of all predictions, one after another."""
        return self.trace.output[list(self.rows)].detach().flatten()

    @property
    def logits(self) -> Float[Tensor, "row vocab"]:
        """The logits of each prediction."""
        self.require_readout()
        assert self.trace.logits is not None
        return self.trace.logits[list(self.rows)].detach()

    @property
    def signs(self) -> Float[Tensor, " row"]:
        """1 for each prediction of the answer, −1 for each of the other one."""
        signs = models.precise(self.readout).new_ones(len(self.rows))
        signs[self.answer.steps :] = -1
        return signs

    def answer_log_prob(self, log_probs: Float[Tensor, "*some row vocab"]) -> Float[Tensor, "*some"]:
        """S = Σ_k log p(y_k | …), less that of the other answer where two are compared."""
        ids = [*self.answer.ids, *(self.against.ids if self.against else ())][: len(self.rows)]
        return log_probs[..., range(len(self.rows)), ids] @ self.signs.to(log_probs)

    # -- elsewhere ----------------------------------------------------------------------------------------------------

    def _at_each(
        self, embeddings: Float[Tensor, "point token d_model"], rules: LinearRules | None
    ) -> tuple[Linearization, ...]:
        texts = [self.str_tokens] * len(embeddings)
        return _linearized(self, self.tokens.expand(len(embeddings), -1), texts, embeddings, rules)

    def _at_tokens(self, tokens: Int[Tensor, "token"]) -> Linearization:
        texts = models.token_texts(self.model, tokens)
        (lin,) = _linearized(self, tokens[None], [texts], None, self.rules)
        lin.require_finite()
        return lin

    def evaluate(
        self, embeddings: Float[Tensor, "point token d_model"]
    ) -> tuple[Float[Tensor, "point d_of"], Float[Tensor, "point row vocab"] | None]:
        """Readouts and logits at other points, without a graph, as `Linearization.evaluate` gives them."""
        tokens, places = self._laid_out(self.tokens.expand(len(embeddings), -1))
        values = self._laid_out_values(embeddings, tokens)
        readout, logits = models.evaluate(self.model, tokens, wrt=self.wrt, of=self.of, places=places, values=values)
        rows = len(self.rows)
        return readout.unflatten(0, (-1, rows)).flatten(1), None if logits is None else logits.unflatten(0, (-1, rows))

    def _laid_out(self, tokens: Int[Tensor, "point token"]) -> tuple[Int[Tensor, "entry place"], list[tuple[int, int]]]:
        """A batch with an entry for each point and each of its answers, and the places where the rows are read."""
        ends, length = self.ends, max(map(len, self.ends.tokens))
        entries = tokens[:, :1].repeat(1, len(ends.entries)).reshape(-1, 1).expand(-1, length).clone()  # as at first
        where = {entry: i for i, entry in enumerate(ends.entries)}
        for i, standing in enumerate(ends.tokens):
            entries[i :: len(ends.entries), : len(standing)] = tokens[:, standing]
        own = [(where[self.trace.places[row][0]], self.trace.places[row][1]) for row in self.rows]
        return entries, [(point * len(ends.entries) + i, at) for point in range(len(tokens)) for i, at in own]

    def _laid_out_values(self, values: Float[Tensor, "point token d_model"], tokens: Tensor) -> Tensor:
        ends = self.ends
        own = self.trace.inputs[self.wrt][list(ends.entries), : tokens.shape[1]]  # what fills up a shorter text stays
        laid = own.repeat(len(values), 1, 1).to(values)
        for i, standing in enumerate(ends.tokens):
            laid[i :: len(ends.entries), : len(standing)] = values[:, standing]
        return laid


def _linearized(
    span: Span,
    tokens: Int[Tensor, "point token"],
    texts: Sequence[tuple[str, ...]],
    values: Tensor | None,
    rules: LinearRules | None,
) -> tuple[Span, ...]:
    """The same span at other tokens or embeddings, several in one forward pass."""
    entries, places = span._laid_out(tokens)
    trace = models.trace(
        span.model,
        entries,
        wrt=[span.wrt],
        of=span.of,
        places=places,
        values=None if values is None else {span.wrt: span._laid_out_values(values.detach(), entries)},
        checkpoint=span.trace.checkpointed,
        rules=rules,
    )
    rows = len(span.rows)
    return tuple(
        replace(span, tokens=ids, str_tokens=text, trace=trace, row=start, rows=tuple(range(start, start + rows)))
        for ids, text, start in zip(tokens, texts, range(0, len(trace.places), rows), strict=True)
    )


@dataclass(frozen=True, eq=False)
class Exchange:
    """A prompt and what is said after it."""

    prompt: Int[Tensor, "token"]
    answer: Target
    against: Target | None = None
    """Another answer to compare with."""
    parts: tuple[str, ...] = ()
    """The part of a chat that each token of the prompt belongs to; empty for other prompts."""
    notes: tuple[str, ...] = ()
    """Sentences about prompt and answer that a reader of the scores should know."""

    @classmethod
    def of(cls, model: Model, read: ReadPrompt, answer: Target, against: Target | None = None) -> "Exchange":
        """A prompt that was read, and what is said after it.

        Raises:
            ValueError: for an answer for which the context has no room; for a set that is compared with several tokens.
        """
        found = cls(read.tokens, answer, against, read.parts, tuple(dict.fromkeys(read.notes)))
        found._require_answerable(model)
        return found

    @property
    def is_span(self) -> bool:
        """Whether either of the answers is several tokens, so that predictions at several positions are read."""
        return self.answer.is_span or (self.against is not None and self.against.is_span)

    @property
    def texts(self) -> list[tuple[Target, Int[Tensor, "token"]]]:
        """What goes through the model: each answer, and the tokens up to the last of its predictions.

        Two single tokens share a prediction.
        """
        said = [self.answer, self.against] if self.is_span else [self.answer]
        return [(one, torch.cat([self.prompt, self._before_last(one)])) for one in said if one is not None]

    @property
    def tokens(self) -> Int[Tensor, "token"]:
        """The tokens of the prompt, and of each answer but for its last."""
        return torch.cat([self.prompt, *(text[len(self.prompt) :] for _, text in self.texts)])

    def _before_last(self, answer: Target) -> Int[Tensor, "token"]:
        return self.prompt.new_tensor(answer.ids[:-1] if answer.is_span else [])

    def require_one_length(self) -> None:
        """Refuse two answers of different length, of which hooks that count positions from the end would meet filling.

        Raises:
            ValueError: with what to do instead.
        """
        if len({len(text) for _, text in self.texts}) > 1:
            raise ValueError(
                "two answers of different length are filled up to go through the model together, which your hooks "
                "would meet where they count positions from the end: linearise each answer, or take the hooks off."
            )

    def _require_answerable(self, model: Model) -> None:
        """Refuse an answer for which the context has no room.

        Raises:
            ValueError: with the lengths; for a set that is compared with several tokens.
        """
        both = [self.answer, self.against] if self.against is not None else [self.answer]
        if any(one.any_of for one in both) and any(one.is_span for one in both):
            raise ValueError(
                f"{both[0].text!r} and {both[1].text!r} cannot be compared: one is a set of which any token is meant, "
                "and the other several tokens one after another. Ask about each of them."
            )
        context = models.context_length(model)
        longest = max(target.steps for target in (self.answer, self.against) if target is not None)
        if context is not None and len(self.prompt) + longest - 1 > context:
            raise ValueError(
                f"prompt and answer have {len(self.prompt)} + {longest} tokens, the model's context is {context}: "
                "shorten one of them."
            )


def linearize_answers(
    model: Model,
    exchanges: Sequence[Exchange],
    wrt: str,
    of: str,
    *,
    score_answer: bool = False,
    checkpoint: bool = False,
    rules: LinearRules | None = None,
) -> tuple[Span, ...]:
    """Linearise a checked model at the answers to several prompts, in one forward pass.

    They are filled up on the right. Each must still be asked whether its numbers are finite.

    Cost: one forward pass over prompts and answers; the unembedding runs where an answer's tokens are predicted.

    Raises: as `models.trace` does. ValueError for two answers of different length while hooks of the user's are set.
    """
    texts: list[Tensor] = []
    places: list[tuple[int, int]] = []
    if models.user_hooks(model):
        for one in exchanges:
            one.require_one_length()
    for one in exchanges:
        for target, text in one.texts:
            places += [(len(texts), len(one.prompt) - 1 + k) for k in range(target.steps)]
            texts.append(text)
    batch = models.as_batch(texts)
    trace = models.trace(model, batch, wrt=[wrt], of=of, places=places, checkpoint=checkpoint, rules=rules)
    spans, row = [], 0
    for one in exchanges:
        tokens = one.tokens
        rows = tuple(range(row, row + sum(target.steps for target, _ in one.texts)))
        row += len(rows)
        notes = one.notes
        if trace.logits is not None:
            compared = [target for target in (one.answer, one.against) if target is not None]
            notes += models.missing_spaces(model, one.prompt, trace.logits[rows[0]].detach(), compared)
        spans.append(
            Span(
                model=model,
                tokens=tokens,
                str_tokens=models.token_texts(model, tokens),
                position=len(one.prompt) - 1,
                wrt=wrt,
                of=of,
                trace=trace,
                row=rows[0],
                notes=notes,
                parts=one.parts,
                answer=one.answer,
                against=one.against,
                rows=rows,
                prompt_length=len(one.prompt),
                score_answer=score_answer,
            )
        )
    return tuple(spans)
