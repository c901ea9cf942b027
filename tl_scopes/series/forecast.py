"""What a model says comes next in a series, and how well it says so as the context grows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, SupportsIndex

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_scopes import models
from tl_scopes.models import Model
from tl_scopes.series.numbers import KINDS, Numbers, Spelling, require_fits
from tl_scopes.tiny.markov import MarkovChain
from tl_scopes.views import series as pictures

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, repr=False)
class Forecast:
    """The predicted distribution over the next number.

    Attributes:
        probabilities: [100], of the numbers 00 to 99; they sum to 1 less `elsewhere`.
        numbers: the series so far.
    """

    probabilities: Float[Tensor, " 100"]
    numbers: Numbers

    def __repr__(self) -> str:
        best = self.probabilities.argsort(descending=True)[:3].tolist()
        told = ", ".join(f"{number:02d} {self.probabilities[number]:.0%}" for number in best)
        numbers = models.counted(len(self.numbers), "number")
        return f"Forecast({told}; mean {self.mean:.1f} ± {self.deviation:.1f}, after {numbers})"

    @property
    def elsewhere(self) -> float:
        """The probability that no number of two digits comes next."""
        return 1 - float(self.probabilities.sum())

    @property
    def mean(self) -> float:
        """The mean of the next number, given that one comes."""
        return float((self.probabilities * torch.arange(KINDS)).sum() / self.probabilities.sum())

    @property
    def deviation(self) -> float:
        """The standard deviation of the next number, given that one comes."""
        squares = (torch.arange(KINDS) - self.mean).square()
        return float((self.probabilities * squares).sum() / self.probabilities.sum()) ** 0.5

    def loss(self, truth: int | SupportsIndex) -> float:
        """−log p of the number that came next, in nats.

        Raises:
            ValueError: for a number that has not two digits.
            TypeError: for something that is not an integer.
        """
        rule = f"the number that came next is one of two digits, 0 to {KINDS - 1}"
        number = models.as_count(truth, rule, least=0)
        if number >= KINDS:
            raise ValueError(f"{rule}, got {truth!r}.")
        return -float(self.probabilities[number].log())


@torch.no_grad()
def forecast(model: Model, numbers: Numbers) -> Forecast:
    """What comes next after a series: the probability of each number of two digits.

    Where a number is several tokens its probability is the product over them, each given the ones before it.

    Cost: one forward pass for each beginning of a number: one where numbers are single tokens, 11 where digits are.

    Raises:
        ValueError: for numbers that do not tokenise alike, and for a series that the context does not hold.

    Example:
        >>> from tl_scopes import series
        >>> series.forecast(model, series.Numbers.of([0.0, 0.4, 1.0, 0.2, 0.7])).elsewhere < 0.01
        True
    """
    models.check_model(model)
    spelling = Spelling.of(model, numbers.delimiter)
    prompt = spelling.ids(numbers)
    require_fits(model, numbers, len(prompt) + spelling.tokens.shape[1])
    total = torch.zeros(KINDS, dtype=torch.float64)
    for piece in range(spelling.tokens.shape[1]):
        begun = [tuple(tokens[:piece]) for tokens in spelling.tokens.tolist()]
        kinds = {one: row for row, one in enumerate(dict.fromkeys(begun))}
        said = [_log_probs(model, torch.cat([prompt, torch.tensor(one).long()])) for one in kinds]
        total += torch.stack(said)[[kinds[one] for one in begun], spelling.tokens[:, piece]]
    return Forecast(total.exp(), numbers)


@dataclass(frozen=True, eq=False, repr=False)
class Losses:
    """How well a model continues several series, as the context grows.

    Attributes:
        values: [series number], −log p of each number given the ones before it, in nats; NaN of the first where the
            model has no BOS token, before which it says nothing. Means leave it out.
        markov: the same of a Markov chain; None without one.
    """

    values: Float[Tensor, "series number"]
    markov: Float[Tensor, "series number"] | None = None

    def __repr__(self) -> str:
        half = self.values.shape[1] // 2
        chain = f"; Markov chain {self.markov[:, half:].mean():.2f}" if self.markov is not None else ""
        late, early = float(self.values[:, half:].nanmean()), float(self.values[:, :half].nanmean())
        return f"Losses({early:.2f} in the first half, {late:.2f} in the second{chain}; {len(self.values)} series, nat)"

    def plot(self) -> "Figure":
        """The mean over the series by how many numbers stand before, with the Markov chain's and the uniform's."""
        return pictures.losses(self)


@torch.no_grad()
def losses(model: Model, series: Sequence[Numbers], chain: MarkovChain[int] | None = None) -> Losses:
    """−log p of each number of each series, by the model and by a Markov chain that was fitted on other series.

    A model without a BOS token says nothing of what a prompt begins with: the loss of the first number is NaN then.

    Cost: one forward pass for each series.

    Raises:
        ValueError: for series of different lengths; as `forecast` does.
    """
    models.check_model(model)
    lengths = sorted({len(numbers) for numbers in series})
    if len(lengths) != 1:
        raise ValueError(f"series that are averaged are of one length, got {', '.join(map(str, lengths)) or 'none'}.")
    rows = []
    for numbers in series:
        spelling = Spelling.of(model, numbers.delimiter)
        prompt = spelling.ids(numbers)
        require_fits(model, numbers, len(prompt))
        width = spelling.tokens.shape[1]
        step = width + len(spelling.delimiter)
        starts = torch.arange(len(numbers)) * step + len(spelling.start)
        read = (starts[:, None] + torch.arange(width)).flatten()
        known = read[read > 0]  # without BOS nothing is said of the first token
        said = _log_probs(model, prompt, (known - 1).tolist())
        each = torch.full((len(read),), torch.nan, dtype=torch.float64)
        each[read > 0] = -said[torch.arange(len(known)), prompt[known]]
        rows.append(each.view(-1, width).sum(1))
    of_chain = None if chain is None else torch.tensor([chain.losses(one.numbers) for one in series]).double()
    return Losses(torch.stack(rows), of_chain)


def _log_probs(model: Model, tokens: Int[Tensor, " token"], at: Sequence[int] = (-1,)) -> Float[Tensor, "*row vocab"]:
    """The log-probabilities that are read at some positions; without a first axis for the last one alone."""
    ids = tokens[None].to(next(model.parameters()).device)
    _, logits = models.evaluate(model, ids, places=[(0, i % len(tokens)) for i in at])
    assert logits is not None
    found = logits.double().cpu().log_softmax(-1)
    return found[0] if at == (-1,) else found
