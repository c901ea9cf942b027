"""What `sink_report` found: masses, heads, shares, interventions, a table and pictures."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median_low
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_scopes import models
from tl_scopes.jacobian.linearization import Linearization
from tl_scopes.results.attribution import Attribution, Prediction
from tl_scopes.views import sinks as sink_views
from tl_scopes.views.live import LiveView

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

INTERVENTIONS = ("removed", "masked", "replaced", "zeroed")
"""What is done to a token, to see whether the prediction changes: see `sink_report`."""


class SinkHead(NamedTuple):
    """A head, and a token that it rests on.

    Attributes:
        layer: the layer of the head, counted from 0.
        head: which head of the layer it is, counted from 0.
        position: where the token stands in the prompt.
        token: the text of the token.
        mass: the attention that the token draws from a later one, on average, from 0 to 1.
        value_norm: the norm of what the head writes from this token, over the median of the other tokens' norms.
    """

    layer: int
    head: int
    position: int
    token: str
    mass: float
    value_norm: float


def uniform_mass(tokens: int) -> Float[Tensor, "token"]:
    """The masses of a head that attends to all tokens alike."""
    # Query i divides its attention among i + 1 keys.
    parts = 1 / torch.arange(2, tokens + 1, dtype=torch.float64, device="cpu")
    sums = parts.flip(0).cumsum(0).flip(0)
    return torch.cat([sums / torch.arange(tokens - 1, 0, -1, device="cpu"), sums.new_zeros(1)])


def can_be_sinks(tokens: int, threshold: float) -> Bool[Tensor, "token"]:
    """Which tokens are followed by enough others for a sink: a quarter of the prompt, and more than 1/threshold."""
    after = torch.arange(tokens - 1, -1, -1, device="cpu")
    return (after > 1 / threshold) & (4 * after >= tokens)


@dataclass(frozen=True, eq=False, repr=False)
class SinkReport:
    """Attention sinks at one prompt, and whether they matter. All tensors are on the CPU.

    Attributes:
        model: the name of the model.
        tokens: [token], the ids of the tokens up to the position.
        str_tokens: the text of each token.
        position: the position after which the prediction was read.
        threshold: the mass from which on a token is a head's sink.
        mass: [layer head token], the mean attention that each token draws from those after it, from 0 to 1.
        value_norms: [layer head token], ‖value · W_O‖: the norm of what a head would write into the stream if it
            attended to this token alone.
        answers: the answer of each scope, by name.
        prediction: the most likely next token and its probability.
        kl: [intervention early], KL(p ‖ p') in nats after each of `INTERVENTIONS` on each of the first tokens; NaN
            where an intervention could not be made (see `notes`).
        likeliest: for each intervention and early token, the text of the token that is then the most likely; empty
            where it is not known.
        patterns: by layer and head the attention pattern [query key] of the few heads with the strongest sinks, the
            strongest first; none for very long prompts.
        notes: what a reader of the numbers should know.
    """

    model: str
    tokens: Int[Tensor, "token"]
    str_tokens: tuple[str, ...]
    position: int
    threshold: float
    mass: Float[Tensor, "layer head token"]
    value_norms: Float[Tensor, "layer head token"]
    answers: Mapping[str, Attribution]
    prediction: Prediction
    kl: Float[Tensor, "intervention early"]
    likeliest: tuple[tuple[str, ...], ...]
    patterns: Mapping[tuple[int, int], Float[Tensor, "_ _"]] = field(default_factory=dict)
    notes: tuple[str, ...] = field(default=())

    def __repr__(self) -> str:
        heads, named = self._having_sinks(), ", ".join(repr(self.str_tokens[i]) for i in self.sinks[:3])
        where = f", at {named}{', ...' * (len(self.sinks) > 3)}" if named else ""
        tokens = models.counted(len(self.tokens), "token")
        return (
            f"SinkReport({self.model}: {heads} of {self._heads} heads have a sink above {self.threshold:.0%}{where}; "
            f"uniform attention puts {self.uniform[0]:.0%} on the first of {tokens}, "
            f"{models.counted(len(self.answers), 'scope')})"
        )

    # -- attention ----------------------------------------------------------------------------------------------------

    @property
    def early(self) -> int:
        """How many tokens from the start were looked at."""
        return self.kl.shape[1]

    @property
    def mean_mass(self) -> Float[Tensor, "token"]:
        """The attention that each token draws from a later one, on average over all heads; from 0 to 1."""
        return self.mass.mean((0, 1))

    @property
    def uniform(self) -> Float[Tensor, "token"]:
        """What `mean_mass` would be if all heads attended to all tokens alike."""
        return uniform_mass(len(self.tokens))

    @property
    def sink_heads(self) -> tuple[SinkHead, ...]:
        """The heads with their sinks, the strongest first; a head may have several sinks."""
        found = (self.mass > self.threshold) & can_be_sinks(len(self.tokens), self.threshold)
        places = [tuple(place) for place in found.nonzero().tolist()]
        heads = [
            SinkHead(layer, head, i, self.str_tokens[i], float(self.mass[layer, head, i]), self._norm(layer, head, i))
            for layer, head, i in places
        ]
        return tuple(sorted(heads, key=lambda head: -head.mass))

    @property
    def sinks(self) -> tuple[int, ...]:
        """The positions of the tokens that are a sink of at least one head."""
        return tuple(sorted({head.position for head in self.sink_heads}))

    @property
    def share(self) -> Mapping[str, Float[Tensor, "token"]]:
        """Each token's share of the influence, for each scope by name."""
        return {name: answer.share for name, answer in self.answers.items()}

    @property
    def _heads(self) -> int:
        return self.mass.shape[0] * self.mass.shape[1]

    def _having_sinks(self) -> int:
        return len({(head.layer, head.head) for head in self.sink_heads})

    def _norm(self, layer: int, head: int, position: int) -> float:
        """The norm of what a head writes from a token, over the median of the other tokens' norms."""
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
            done = "With its values zeroed" if name == "zeroed" else name.capitalize()
            now = f"{token.text!r} stays" if likeliest[0] == token.text else f"{likeliest[0]!r} becomes"
            lines.append(f"{done}, it changes the prediction by {kl[0]:.2g} nats; {now} the most likely.")
        return [f"The most likely next token is {token.text!r}, with {p:.0%}.", *lines]

    def to_dataframe(self) -> "pd.DataFrame":
        """One row for each early token: position, token, attention (its mean mass), uniform, sink_heads (how many),
        value_norm (the median over these heads, NaN where there are none), a share for each scope, and kl_removed,
        kl_masked, kl_replaced and kl_zeroed."""
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
            position: which token; None is the one with the strongest sink head, or the first token where there is none.

        Raises:
            ValueError: for a position outside of the prompt.
        """
        return sink_views.plot(self, position)

    def show(self, layer: int | None = None, lin: Linearization | None = None) -> LiveView:
        """circuitsvis' attention heads, for a live notebook: the heads with the strongest sinks, or those of a layer.

        Args:
            layer: which one; None is the strongest sink heads, whose patterns the report keeps.
            lin: the linearisation that the report is about, whose model has to run again for the patterns of a layer.

        Cost: none, or for a layer what `models.attention_layers` costs: one forward pass.

        Raises:
            ValueError: for a layer that there is not, or without its linearisation; for the linearisation of another
                model or prompt; when the model's hooks or weights have changed since it was linearised; for a prompt
                that is too long to draw.
            TypeError: for a layer that is not an integer, and something that is not a Linearization.
        """
        if layer is None:
            return sink_views.attention(self, self.patterns, "Heads with the strongest sinks")
        layer, layers = models.as_int(layer, "layer must be an integer"), len(self.mass)
        if not 0 <= layer < layers:
            raise ValueError(f"there is no layer {layer}: the model has layers 0 to {layers - 1}.")
        if lin is None:
            raise ValueError(
                f"the report keeps the patterns of the strongest sink heads alone: show({layer}, lin), with the "
                "linearisation that it is about, runs the model again for those of a layer."
            )
        return sink_views.attention(self, self._patterns_of(layer, lin), f"Heads of layer {layer}")

    def _patterns_of(self, layer: int, lin: Linearization) -> dict[tuple[int, int], Tensor]:
        """The patterns [query key] of all heads of a layer, from another run of the model."""
        if not isinstance(lin, Linearization):
            raise TypeError(
                f"show({layer}, lin) takes the Linearization that the report is about, got {type(lin).__name__}: write "
                "lin = tls.linearize(model, prompt)."
            )
        if not torch.equal(lin.tokens.cpu(), self.tokens) or models.model_name(lin.model) != self.model:
            raise ValueError(
                f"this is the report of {len(self.tokens)} tokens on {self.model!r}, and {lin!r} is of another prompt "
                "or model: give the linearisation that the report was made from."
            )
        lin.require_repeatable()
        pattern = next(each.pattern for each in models.attention_layers(lin.model, lin.tokens) if each.layer == layer)
        return {(layer, head): one for head, one in enumerate(pattern.cpu().to(self.mass.dtype))}

    def _repr_html_(self) -> str:
        return sink_views.fragment(self)
