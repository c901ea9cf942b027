"""A prompt whose answer turns on words that are known, and which of such prompts a model answers by these words."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_scopes import models
from tl_scopes.models import Model, Work
from tl_scopes.models.arguments import as_number
from tl_scopes.results.units import offsets

Span: TypeAlias = tuple[int, int]
"""Where something stands in a text, in characters: from the first up to the second."""


@dataclass(frozen=True)
class KnownCause:
    """A prompt, its answer, and the words in it that are known to decide between the answer and a wrong one.

    What is known is put to the test with each model (`confirm`): it must prefer the answer to the foil, and prefer it
    less, or not at all, when any one of the causes is replaced.

    Args:
        prompt: the text whose last prediction is asked about.
        answer: what is right after it, a token or several; with the space in front, where there is one.
        foil: what is wrong after it, and what the causes decide against.
        causes: the words that decide, as texts that stand once in the prompt, or as ranges of characters.
        counterfactual: the prompt with other words in the place of the causes, with as many tokens to the model's
            tokenizer. The foil may be right after it, or neither.
        kind: what results are grouped by.
        distractor: a word that does not decide, though one might think so, as a text or as a range; None is any other
            word.

    Raises:
        ValueError: for causes or a distractor that do not stand in the prompt, or stand there several times, or that
            overlap; for no causes; for a counterfactual that is the prompt; for a foil that is the answer.
        TypeError: for something that is not text, and for causes that are neither texts nor ranges.

    Example:
        >>> from tl_scopes.faithfulness import KnownCause
        >>> KnownCause("The keys near the door", " are", " is", causes="keys", counterfactual="The key near the door")
        KnownCause('The [keys] near the door' → ' are', not ' is')
    """

    prompt: str
    answer: str
    foil: str
    causes: tuple[Span, ...] = field(kw_only=True)
    counterfactual: str = field(kw_only=True)
    kind: str = field(kw_only=True, default="own")
    distractor: Span | None = field(kw_only=True, default=None)

    def __init__(
        self,
        prompt: str,
        answer: str,
        foil: str,
        *,
        causes: str | Span | Sequence[str | Span],
        counterfactual: str,
        kind: str = "own",
        distractor: str | Span | None = None,
    ) -> None:
        texts = {"prompt": prompt, "answer": answer, "foil": foil, "counterfactual": counterfactual, "kind": kind}
        for name, text in texts.items():
            if not isinstance(text, str):
                raise TypeError(f"the {name} of a known cause is a text, got {text!r}.")
            if not text:
                raise ValueError(f"the {name} of a known cause is empty: give a text.")
            object.__setattr__(self, name, text)
        if answer == foil:
            raise ValueError(f"answer and foil are both {answer!r}: the foil is a wrong answer.")
        if prompt == counterfactual:
            raise ValueError(f"the counterfactual is the prompt {prompt!r} itself: put other words for its causes.")
        alone = isinstance(causes, str) or (isinstance(causes, tuple) and len(causes) == 2 and _is_int(causes[0]))
        listed = [causes] if alone else causes
        if not isinstance(listed, Sequence) or not listed:
            raise ValueError(f"the causes are texts or ranges of characters, one at least, got {causes!r}.")
        spans = sorted(_span(prompt, cause, "cause") for cause in listed)
        other = () if distractor is None else (_span(prompt, distractor, "distractor"),)
        ordered = sorted([*spans, *other])
        for (_, stop), (start, end) in pairwise(ordered):
            if start < stop:
                raise ValueError(f"{prompt[start:end]!r} belongs to two causes, or to a cause and the distractor.")
        object.__setattr__(self, "causes", tuple(spans))
        object.__setattr__(self, "distractor", other[0] if other else None)

    @classmethod
    def marked(cls, text: str, answer: str, foil: str, kind: str = "own") -> "KnownCause":
        """Read a prompt in which a cause stands as "[this|that]", with what replaces it, and a distractor as "{this}".

        Raises: ValueError for a text without a cause, and as the class does.

        Example:
            >>> from tl_scopes.faithfulness import KnownCause
            >>> KnownCause.marked("The [keys|key] near the {door}", " are", " is").counterfactual
            'The key near the door'
        """
        prompt, counterfactual = "", ""
        causes: list[Span] = []
        distractor: Span | None = None
        for piece in re.split(r"(\[[^\]|]*\|[^\]|]*\]|\{[^}]*\})", text):
            own, other = piece, piece
            if piece.startswith("["):
                own, other = piece[1:-1].split("|")
                causes.append((len(prompt), len(prompt) + len(own)))
            elif piece.startswith("{"):
                own = other = piece[1:-1]
                distractor = (len(prompt), len(prompt) + len(own))
            prompt, counterfactual = prompt + own, counterfactual + other
        if not causes:
            raise ValueError(f'there is no cause in {text!r}: write it as "[this|that]", with what replaces it.')
        return cls(prompt, answer, foil, causes=causes, counterfactual=counterfactual, kind=kind, distractor=distractor)

    def __repr__(self) -> str:
        shown = self.prompt
        for start, stop in reversed(self.causes):
            shown = f"{shown[:start]}[{shown[start:stop]}]{shown[stop:]}"
        return f"KnownCause({shown!r} → {self.answer!r}, not {self.foil!r})"

    @property
    def target(self) -> str:
        """The answer, which is what scopes explain."""
        return self.answer


@dataclass(frozen=True)
class Confirmation:
    """What a model makes of a known cause.

    Attributes:
        example: the known cause.
        said: the token that the model thinks likeliest after the prompt.
        lead: log p(answer) − log p(foil) after the prompt, in nats. Of one token each it is the difference of logits.
        lead_without: the same with one cause replaced; of several causes the one without which it is largest.
        why_not: None where the cause is confirmed; else a sentence that says why it is not.
    """

    example: KnownCause
    said: str | None
    lead: float
    lead_without: float
    why_not: str | None

    @property
    def is_confirmed(self) -> bool:
        """Whether the model prefers the answer, and owes that to each of the causes."""
        return self.why_not is None

    @property
    def is_said(self) -> bool:
        """Whether the answer is what the model says, or begins so."""
        return self.said is not None and self.example.answer.startswith(self.said)


def confirm(
    model: Model, examples: Iterable[KnownCause], *, share: float = 0.5, strict: bool = True
) -> list[Confirmation]:
    """Test known causes with a model: does it prefer the answer, and does that turn on each of the causes?

    An example is confirmed where the answer's lead over the foil, L = log p(answer) − log p(foil), is positive after
    the prompt and falls by `share` of itself at least when any one cause is replaced by what the counterfactual has in
    its place:

        L > 0   and   L − L(one cause replaced) ≥ share · L   for every cause

    Args:
        model: a `HookedTransformer` or a `TransformerBridge`.
        examples: the known causes.
        share: the share of the lead that each cause must be good for. With 1, the foil must win or draw without it.
        strict: whether an example that this model's tokenizer makes useless is an error; else it is not confirmed.

    Returns:
        A Confirmation for each.

    Cost: a forward pass for each prompt and for each of its causes, in batches, which are of one length while hooks of
        yours are set; where answer or foil are several tokens, one for each of both.

    Raises:
        ValueError: with `strict`, for a counterfactual that has another number of tokens than its prompt, that differs
            elsewhere than at the causes, or that leaves a cause as it is; for a share that is not positive; for a model
            without a tokenizer. Else as `models.read_target` does.
        TypeError: for something that is not a KnownCause.
    """
    share = as_number(share, "share is the part of the lead that each cause must be good for, a number above 0")
    if share <= 0:
        raise ValueError(f"share is the part of the lead that each cause must be good for, above 0, got {share!r}.")
    models.check_model(model)
    models.tokenizer_of(model)
    examples = list(examples)
    found: list[Confirmation | None] = []
    runs: list[tuple[Tensor, list[int]]] = []
    for example in examples:
        if not isinstance(example, KnownCause):
            raise TypeError(f"known causes are given as KnownCause, got {example!r}.")
        tokens, other = (models.tokenize(model, text) for text in (example.prompt, example.counterfactual))
        fault = _fault(model, example, tokens, other)
        if fault and strict:
            raise ValueError(f"{example!r} cannot be confirmed: {fault}")
        found.append(Confirmation(example, None, float("nan"), float("nan"), fault) if fault else None)
        if not fault:
            ids = [models.read_target(model, text, what="answer").ids for text in (example.answer, example.foil)]
            prompts = [tokens, *_each_replaced(model, example, tokens, other)]
            runs += [(prompt, said) for prompt in prompts for said in ids]
    said, scores = log_probs_of(model, runs)
    leads, texts = (scores[::2] - scores[1::2]).tolist(), said[::2].tolist()
    at, confirmations = 0, []
    for one, example in zip(found, examples, strict=True):
        if one is None:
            end = at + 1 + len(example.causes)
            one = _confirmation(example, models.token_text(model, texts[at]), leads[at], leads[at + 1 : end], share)
            at = end
        confirmations.append(one)
    return confirmations


def _each_replaced(
    model: Model, example: KnownCause, tokens: Int[Tensor, "token"], other: Int[Tensor, "token"]
) -> list[Int[Tensor, "token"]]:
    """The tokens of the prompt with one cause at a time as in the counterfactual."""
    texts, found = [models.token_text(model, id) for id in tokens.tolist()], []
    for span in example.causes:
        at = positions(texts, example.prompt, [span])
        found.append(tokens.clone())
        found[-1][at] = other[at]
    return found


def _confirmation(example: KnownCause, said: str, lead: float, without: list[float], share: float) -> Confirmation:
    most = max(without)
    why = None
    if lead <= 0:
        why = f"the model says {said!r}, and prefers {example.foil!r} to {example.answer!r} by {-lead:.2f} nats"
    elif lead - most < share * lead:
        cause = example.prompt[slice(*example.causes[without.index(most)])]
        why = (
            f"the model says {said!r}, and the lead of {example.answer!r}, {lead:.2f} nats, is still {most:.2f} when "
            f"{cause!r} is replaced"
        )
    return Confirmation(example, said, lead, most, why)


def log_probs_of(
    model: Model, runs: Sequence[tuple[Int[Tensor, " _"], list[int]]]
) -> tuple[Int[Tensor, " run"], Float[Tensor, " run"]]:
    """The likeliest next token after each prompt, and the log-probability of what is said there, in nats.

    Hooks of the user's may count positions from the end, where a shorter text would be filled up: with hooks set a
    batch has one length.
    """
    hooked = bool(models.user_hooks(model))
    whole = [(*prompt.tolist(), *said[:-1]) for prompt, said in runs]
    left = sorted(dict.fromkeys(whole), key=len)  # answers of one token share a run
    steps = max((len(said) for _, said in runs), default=1)
    first, scores = torch.zeros(len(runs), dtype=torch.long), torch.zeros(len(runs), dtype=torch.float64)
    while left:
        size = models.at_once(model, len(left[-1]), Work.PREDICTION, rows=steps)
        some = [text for text in left[-size:] if not hooked or len(text) == len(left[-1])]
        left = left[: -len(some)]
        asked = [(run, some.index(text)) for run, text in enumerate(whole) if text in some]
        batch = models.as_batch([runs[0][0].new_tensor(text) for text in some])
        places = [(row, len(runs[run][0]) - 1 + k) for run, row in asked for k in range(len(runs[run][1]))]
        unique = sorted(set(places))
        log_probs = models.precise(models.predict(model, batch, places=unique)).log_softmax(-1).cpu()
        for run, row in asked:
            at = unique.index((row, len(runs[run][0]) - 1))
            said = torch.tensor(runs[run][1])
            first[run] = log_probs[at].argmax()
            scores[run] = log_probs[range(at, at + len(said)), said].sum()
    return first, scores


def _fault(model: Model, example: KnownCause, tokens: Int[Tensor, " a"], other: Int[Tensor, " b"]) -> str | None:
    """Why the tokens of a prompt and of its counterfactual cannot be compared; None where they can be."""
    if len(tokens) != len(other):
        return (
            f"the prompt has {len(tokens)} tokens, the counterfactual {example.counterfactual!r} {len(other)}: choose "
            "words of as many tokens as each other."
        )
    texts = [models.token_text(model, id) for id in tokens.tolist()]
    causes = [positions(texts, example.prompt, [span]) for span in example.causes]
    changed = set((tokens != other).nonzero()[:, 0].tolist())
    elsewhere = changed - {position for cause in causes for position in cause}
    if elsewhere:
        named = [texts[position] for position in sorted(elsewhere)]
        return f"the counterfactual also replaces {named!r}, which is not a cause: replace the causes only."
    for span, cause in zip(example.causes, causes, strict=True):
        if not changed & set(cause):
            return f"the counterfactual does not replace the cause {example.prompt[slice(*span)]!r}."
    return None


def positions(texts: Sequence[str], prompt: str, spans: Iterable[Span]) -> list[int]:
    """Which tokens of a prompt hold a part of some ranges of its characters.

    Args:
        texts: the text of each token, of a BOS token as well.
        prompt: the text that they make up.
        spans: the ranges.

    Raises:
        ValueError: where the tokens make up another text.
    """
    whole, places = offsets(texts)
    ahead = len(whole) - len(prompt)
    if not whole.endswith(prompt):
        raise ValueError(
            f"the tokenizer splits {prompt!r} otherwise than the model, so that its causes have no place among the "
            "tokens: take a model that uses its tokenizer as it is."
        )
    ranges = [(start + ahead, stop + ahead) for start, stop in spans]
    return [i for i, (begin, end) in enumerate(places) if any(begin < stop and start < end for start, stop in ranges)]


def _span(prompt: str, part: object, what: str) -> Span:
    """Where a cause stands in the prompt."""
    if isinstance(part, str):
        places = [found.span() for found in re.finditer(re.escape(part), prompt)] if part else []
        if len(places) != 1:
            stands = f"stands {len(places)} times in" if places else "does not stand in"
            ranges = f": give one of {places}, in characters" if places else ""
            raise ValueError(f"the {what} {part!r} {stands} the prompt {prompt!r}{ranges}.")
        return places[0]
    if not isinstance(part, Sequence) or len(part) != 2 or not all(map(_is_int, part)):
        raise TypeError(f"a {what} is a text, or a range of characters such as (4, 8), got {part!r}.")
    start, stop = (models.as_int(end, "a range is given in characters") for end in part)
    if not 0 <= start < stop <= len(prompt):
        raise ValueError(f"the {what} {(start, stop)} is not a range of the {len(prompt)} characters of {prompt!r}.")
    return start, stop


def _is_int(value: object) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)
