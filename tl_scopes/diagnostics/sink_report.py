"""What `sink_report` found: masses, heads, shares, interventions, a table and pictures."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median_low
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_scopes.models import Model
from tl_scopes.results.attribution import Attribution, Prediction

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

INTERVENTIONS = ("removed", "masked", "replaced")
"""What is done to a token."""


class SinkHead(NamedTuple):
    """A head, and a token that it rests on."""

    layer: int
    head: int
    position: int
    token: str
    mass: float
    """The attention that the token draws from a later one, on average."""
    value_norm: float
    """The norm of what the head writes from this token, over the median of the other tokens'."""


def uniform_mass(tokens: int) -> Float[Tensor, "token"]:
    """The masses of a head that attends to all tokens alike."""
    parts = 1 / torch.arange(2, tokens + 1, dtype=torch.float64)  # query i shares its attention out among i + 1
    sums = parts.flip(0).cumsum(0).flip(0)
    return torch.cat([sums / torch.arange(tokens - 1, 0, -1), sums.new_zeros(1)])


def can_be_sinks(tokens: int, threshold: float) -> Bool[Tensor, "token"]:
    """Which tokens are followed by enough others for a sink: a quarter of the prompt, and more than 1/threshold."""
    after = torch.arange(tokens - 1, -1, -1)
    return (after > 1 / threshold) & (4 * after >= tokens)


@dataclass(frozen=True, eq=False, repr=False)
class SinkReport:
    """Attention sinks at one prompt, and whether they matter. All tensors are on the CPU."""

    model: str
    """Name of the model."""
    tokens: Int[Tensor, "token"]
    """Token ids up to the position."""
    str_tokens: tuple[str, ...]
    """Their text."""
    position: int
    """Where the prediction was read."""
    threshold: float
    """The mass from which on a token is a head's sink."""
    mass: Float[Tensor, "layer head token"]
    """Mean attention that each token draws from those after it."""
    value_norms: Float[Tensor, "layer head token"]
    """‖value · W_O‖: the norm of what a head that attends to this token alone writes into the stream."""
    answers: Mapping[str, Attribution]
    """Each scope's answer."""
    prediction: Prediction
    """The most likely next token."""
    kl: Float[Tensor, "intervention early"]
    """KL(p ‖ p') in nats for `INTERVENTIONS` on the first tokens; NaN where one could not be made (see `notes`)."""
    likeliest: tuple[tuple[str, ...], ...]
    """Text of the then most likely next token, for each intervention and early token; empty where it is not known."""
    patterns: Mapping[tuple[int, int], Float[Tensor, "_ _"]] = field(default_factory=dict)
    """Attention patterns [query key] by layer and head, of the few heads with the strongest sinks, strongest first; of
    very long prompts none."""
    notes: tuple[str, ...] = field(default=())
    """What a reader of the numbers should know."""

    def __repr__(self) -> str:
        heads, named = self._having_sinks(), ", ".join(repr(self.str_tokens[i]) for i in self.sinks[:3])
        where = f", at {named}{', ...' * (len(self.sinks) > 3)}" if named else ""
        return (
            f"SinkReport({self.model}: {heads} of {self._heads} heads have a sink above {self.threshold:.0%}{where}; "
            f"uniform attention puts {self.uniform[0]:.0%} on the first of {len(self.tokens)} tokens, "
            f"{len(self.answers)} scope{'s' * (len(self.answers) != 1)})"
        )

    # -- attention ----------------------------------------------------------------------------------------------------

    @property
    def early(self) -> int:
        """How many tokens from the start were looked at."""
        return self.kl.shape[1]

    @property
    def mean_mass(self) -> Float[Tensor, "token"]:
        """The attention each token draws, on average over all heads."""
        return self.mass.mean((0, 1))

    @property
    def uniform(self) -> Float[Tensor, "token"]:
        """What it would be if all heads attended to all tokens alike."""
        return uniform_mass(len(self.tokens))

    @property
    def sink_heads(self) -> tuple[SinkHead, ...]:
        """Heads with their sinks, strongest first; a head may have several."""
        found = (self.mass > self.threshold) & can_be_sinks(len(self.tokens), self.threshold)
        places = [tuple(place) for place in found.nonzero().tolist()]
        heads = [
            SinkHead(layer, head, i, self.str_tokens[i], float(self.mass[layer, head, i]), self._norm(layer, head, i))
            for layer, head, i in places
        ]
        return tuple(sorted(heads, key=lambda head: -head.mass))

    @property
    def sinks(self) -> tuple[int, ...]:
        """Positions that are a sink of one head at least."""
        return tuple(sorted({head.position for head in self.sink_heads}))

    @property
    def share(self) -> Mapping[str, Float[Tensor, "token"]]:
        """Each token's share of each scope's influence."""
        return {name: answer.share for name, answer in self.answers.items()}

    @property
    def _heads(self) -> int:
        return self.mass.shape[0] * self.mass.shape[1]

    def _having_sinks(self) -> int:
        return len({(head.layer, head.head) for head in self.sink_heads})

    def _norm(self, layer: int, head: int, position: int) -> float:
        """The norm of what is written from a token over the median of the other tokens'."""
        norms = self.value_norms[layer, head]
        return float(norms[position] / torch.cat([norms[:position], norms[position + 1 :]]).median())

    # -- other forms --------------------------------------------------------------------------------------------------

    def summary(self) -> str:
        """The findings in a few sentences."""
        lines = [self._attention_in_words(), self._shares_in_words(), *self._interventions_in_words()]
        return "\n".join([*lines, *(f"Note: {note}." for note in self.notes)])

    def _attention_in_words(self) -> str:
        heads, first = self.sink_heads, self.mean_mass[0]
        compared = (
            f"On average over the heads {self.str_tokens[0]!r} draws {first:.0%} of a later token's attention, uniform "
            f"attention would give it {self.uniform[0]:.0%}."
        )
        if not heads:
            return f"No head has a sink, a token with more than {self.threshold:.0%} of the attention. {compared}"
        counts = {i: sum(head.position == i for head in heads) for i in self.sinks}
        named = ", ".join(f"{self.str_tokens[i]!r} (position {i}) for {n}" for i, n in counts.items())
        norm = median_low([head.value_norm for head in heads])
        return (
            f"{self._having_sinks()} of {self._heads} heads have a sink, a token with more than {self.threshold:.0%} "
            f"of the attention: {named}. What they write from it has {norm:.2g} times the norm of other "
            f"tokens' (median). {compared}"
        )

    def _shares_in_words(self) -> str:
        shares = ", ".join(f"{share[0]:.1%} in {name}" for name, share in self.share.items())
        return (
            f"Its share of the influence is {shares}; an equal share of {len(self.tokens)} tokens would be "
            f"{1 / len(self.tokens):.1%}."
        )

    def _interventions_in_words(self) -> list[str]:
        token, p = self.prediction
        lines = []
        for name, kl, likeliest in zip(INTERVENTIONS, self.kl.tolist(), self.likeliest, strict=True):
            if kl[0] != kl[0]:
                continue
            now = f"{token.text!r} stays" if likeliest[0] == token.text else f"{likeliest[0]!r} becomes"
            lines.append(f"{name.capitalize()}, it changes the prediction by {kl[0]:.2g} nats; {now} the most likely.")
        return [f"The most likely next token is {token.text!r}, with {p:.0%}.", *lines]

    def to_dataframe(self) -> "pd.DataFrame":
        """One row per early token: position, token, attention (its mean mass), uniform, sink_heads (how many),
        value_norm (median over these; NaN without), a share for each scope, and kl_removed, kl_masked, kl_replaced."""
        import pandas as pd

        n, heads = self.early, self.sink_heads
        norms = [[head.value_norm for head in heads if head.position == i] for i in range(n)]
        return pd.DataFrame(
            {
                "position": range(n),
                "token": self.str_tokens[:n],
                "attention": self.mean_mass[:n].tolist(),
                "uniform": self.uniform[:n].tolist(),
                "sink_heads": [len(of_one) for of_one in norms],
                "value_norm": [median_low(of_one) if of_one else float("nan") for of_one in norms],
            }
            | {f"share {name}": share[:n].tolist() for name, share in self.share.items()}
            | {f"kl_{name}": kl for name, kl in zip(INTERVENTIONS, self.kl.tolist(), strict=True)}
        )

    # -- pictures -----------------------------------------------------------------------------------------------------

    def plot(self, position: int | None = None) -> "Figure":
        """A heat map: how much attention a token draws in each layer and head.

        Args:
            position: which token; None is the one with the strongest sink head, or the first.

        Raises:
            ValueError: for a position outside of the prompt.
        """
        from tl_scopes.views import sinks as sink_views

        return sink_views.plot(self, position)

    def show(self, layer: int | None = None, model: Model | None = None) -> Any:
        """circuitsvis' attention heads, for a live notebook: of the heads with the strongest sinks, or of a layer.

        Args:
            layer: which one; None is the strongest sink heads, whose patterns the report keeps.
            model: the model of the report, which has to run again for the patterns of a layer.

        Raises:
            ValueError: for a layer without its model, one that there is not, a model whose attention is not that of
                the report; a prompt that is too long to draw.
        """
        from tl_scopes.views import sinks as sink_views

        return sink_views.attention(self, layer, model)

    def _repr_html_(self) -> str:
        from tl_scopes.views import sinks as sink_views

        return sink_views.fragment(self)
