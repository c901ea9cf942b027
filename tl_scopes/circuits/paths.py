"""The answer of `carried_by`: how much of each token's score runs through each part of the network."""

from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsIndex

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_scopes.circuits import paths_record
from tl_scopes.circuits.source_tokens import as_positions
from tl_scopes.models import Provenance, Target, Token, as_count, as_int, counted
from tl_scopes.models.linear_rules import under
from tl_scopes.results.attribution import Attribution, Prediction
from tl_scopes.views import paths as card
from tl_scopes.views.live import LiveView
from tl_scopes.views.markup import in_short, saved

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_QKV = ("q", "k", "v")
_BRANCHES = ("attention", "MLP")


class Passage(NamedTuple):
    """One row of `Paths.top`.

    Attributes:
        name: the component, "L9H9" for head 9 of layer 9.
        at: the text of the token at whose position most of it is written; None where positions are not known.
        value: the part of the score that runs through it, in the answer's unit.
        share: that part over the size of the score: it has the sign of the value, and may be more than 1.
        token: the text of the source token.
        layer: the component's layer.
        position: where `at` stands in the prompt.
    """

    name: str
    at: str | None
    value: float
    share: float
    token: str
    layer: int
    position: int | None

    def __repr__(self) -> str:
        at = "" if self.at is None else f" at {self.at!r}"
        return f"({self.name}{at}, {self.value:.3g}, {self.share:.0%})"


@dataclass(frozen=True, eq=False, repr=False)
class Paths:
    """How much of each token's score runs through each part of the network. It never changes.

    Attributes:
        values: [layer, position | branch | head | head part | neuron, token], what each component carries, in `unit`,
            with a sign. On the CPU, in float32; in float64 for a float64 model, and where float32 does not hold them.
            `axis_names` names the axes.
        around: [layer, token], what goes around the cut of each layer; [layer, branch, token] by "layer", where
            attention and MLP are a cut each. `values` and `around` of a layer sum to the score.
        scores: [token], the scores of the source tokens.
        where: the values by the position where the component stands, on one more axis before the last; None where
            backward mode was cheaper, which tells the sum over positions only, and by "neuron".
        standard_error: as `values`, for a Fisher score that is estimated; None where nothing was.
        stream: [layer, position, token], what stands in the residual stream at each position before each of
            `stream_layers`, which comes along by "head" in forward mode; else None.
        stream_layers: the layers of `stream`; the last one is behind the last block.
        layers: the layers of the first axis. By "position" layer n is the stream before block n, and the last one the
            stream behind the last block.
        by: what each layer was cut into.
        mode: "forward" or "backward", whichever was cheaper. The numbers are the same.
        positions: where the source tokens, those of the last axis, stand in the prompt.
        tokens: [prompt], the ids of the prompt's tokens up to where the prediction was read. On the CPU.
        str_tokens: their text.
        position: the position after which the prediction was read.
        predictions: the most likely next tokens with their probabilities, the best first.
        target: the token explained; None where the scope asks about the whole prediction.
        versus: the token that the target is compared with; else None.
        scope: the question, as it is written in Python.
        unit: the unit of a value, in words.
        wrt: the name of the hook where the tokens were perturbed.
        of: the name of the hook where the effect was read.
        model: the name of the model.
        dtype: the precision of the model, such as "float32".
        rules: the rules that differentiated the model in place of some of its own derivatives, "linear" say; else None.
        notes: what a reader of the values should know.
        quantity: the number that the scores are about, "logit of ' are'" say; None where it has no name.
        provenance: the versions, the model and its revision, the device and the day with which the answer was made;
            None where it is not known.
    """

    values: Float[Tensor, "layer *component token"]
    around: Float[Tensor, "layer *branch token"]
    scores: Float[Tensor, "token"]
    where: Float[Tensor, "layer *component position token"] | None
    standard_error: Float[Tensor, "layer *component token"] | None
    stream: Float[Tensor, "depth position token"] | None
    stream_layers: tuple[int, ...]
    layers: tuple[int, ...]
    by: str
    mode: str
    positions: tuple[int, ...]
    tokens: Int[Tensor, "prompt"]
    str_tokens: tuple[str, ...]
    position: int
    predictions: tuple[Prediction, ...]
    target: Target | None
    versus: Target | None
    scope: str
    unit: str
    wrt: str
    of: str
    model: str
    dtype: str
    rules: str | None = None
    notes: tuple[str, ...] = field(default=())
    quantity: str | None = None
    provenance: Provenance | None = None

    def __post_init__(self) -> None:
        shape = (len(self.layers), len(self.positions))
        if (self.values.shape[0], self.values.shape[-1]) != shape or self.scores.shape[0] != shape[1]:
            raise ValueError(
                f"values must have {shape[0]} layers on the first axis and {shape[1]} tokens on the last, as many as "
                f"layers and scores, got {list(self.values.shape)}."
            )
        if not self.values.isfinite().all():
            raise ValueError(
                f"NaN or infinite values from {self.scope}: the model, in {self.dtype}, overflows on the way. Load it "
                "in float32 or bfloat16, and check its weights and your hooks."
            )

    def __repr__(self) -> str:
        layers = f"{len(self.layers)} layers" if len(self.layers) > 1 else f"layer {self.layers[0]}"
        first = self.top(1)
        shown = f"{first[0]!r} from {first[0].token!r}; " if first else ""
        tokens = counted(len(self.positions), "token")
        prompt = in_short(self.str_tokens[: self.position + 1], 60)
        return (
            f"Paths({self.question} by {self.by}: {shown}{layers}, {tokens}, {self.unit}; "
            f"{self.quantity or 'the prediction'} after {prompt!r})"
        )

    @property
    def question(self) -> str:
        """The scope, with the rules it was asked under."""
        return under(self.scope, self.rules)

    # -- names --------------------------------------------------------------------------------------------------------

    @property
    def axis_names(self) -> tuple[str, ...]:
        """The axes of `values`."""
        middle = {"layer": ("branch",), "qkv": ("head", "part")}.get(self.by, (self.by,))
        return ("layer", *middle, "token")

    def name(self, layer: int, *component: int) -> str:
        """What a component is called, by its layer and its place on the axes behind: "L9H9", "L9H9.v", "L9 MLP"."""
        if self.by == "position":
            return f"before L{layer}"
        if self.by == "layer":
            return f"L{layer} {_BRANCHES[component[0]]}"
        if self.by == "qkv":
            return f"L{layer}H{component[0]}.{_QKV[component[1]]}"
        return f"L{layer}{'H' if self.by == 'head' else 'N'}{component[0]}"

    @property
    def names(self) -> tuple[str, ...]:
        """What each component is called, in the order of `values.flatten(0, -2)`; by "position" with the position:
        "before L3 at 7"."""
        at = " at {}" if self.by == "position" else ""
        inner = list(product(*map(range, self.values.shape[1:-1])))
        return tuple(self.name(layer, *place) + at.format(*place) for layer in self.layers for place in inner)

    # -- what stands out ----------------------------------------------------------------------------------------------

    def top(self, count: int | SupportsIndex = 5, *, token: str | SupportsIndex | None = None) -> tuple[Passage, ...]:
        """The components that carry most, by size; where two carry the same, the earlier one first.

        Args:
            count: how many; all of them where there are fewer.
            token: the source token, as text or position in the prompt; None is the one with the largest score, by size.

        Raises:
            TypeError: for a count that is not an integer.
            ValueError: for a count below 1, and a token that is not among the source tokens.
        """
        count = as_count(count, "count must be at least 1")
        column = self.column(token)
        flat = self.values[..., column].flatten()
        order = flat.abs().sort(descending=True, stable=True).indices[:count].tolist()
        return tuple(self._passage(i, column) for i in order)

    def _passage(self, flat: int, column: int) -> Passage:
        place = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), self.values.shape[:-1]))
        value, score = self.values[(*place, column)].item(), self.scores[column].item()
        at = place[1] if self.by == "position" else None
        if self.where is not None:
            at = int(self.where[place][:, column].abs().argmax())
        layer = self.layers[place[0]]
        text = None if at is None else self.str_tokens[at]
        source = self.str_tokens[self.positions[column]]
        return Passage(
            self.name(layer, *place[1:]), text, value, value / abs(score) if score else 0.0, source, layer, at
        )

    def column(self, token: str | SupportsIndex | None = None) -> int:
        """The place of a source token on the last axis; None is that of the token with the largest score.

        Raises:
            ValueError: for a token that is not in the prompt, or not among the source tokens.
        """
        if token is None:
            return int(self.scores.abs().argmax())
        (position,) = as_positions(token, self.str_tokens)
        if position not in self.positions:
            raise ValueError(
                f"{self.str_tokens[position]!r} at position {position} is not among the source tokens of this answer, "
                f"{', '.join(repr(self.str_tokens[p]) for p in self.positions[:20])}: ask carried_by with it in tokens."
            )
        return self.positions.index(position)

    def through(self, name: str) -> Attribution:
        """The source tokens as they are seen through one component: an answer whose scores are what it carries.

        Args:
            name: what `name` gives, "L9H9" say.

        Raises:
            ValueError: for a component that does not exist, with those that do.
        """
        place = self._place(name)
        kept = list(self.positions)
        return Attribution(
            scores=self.values[place],
            tokens=self.tokens[kept],
            str_tokens=tuple(self.str_tokens[i] for i in kept),
            positions=self.positions,
            position=self.position,
            target=self.target,
            versus=self.versus,
            scope=f"{self.scope} through {name}",
            unit=self.unit,
            predictions=self.predictions,
            wrt=self.wrt,
            of=self.of,
            model=self.model,
            dtype=self.dtype,
            rules=self.rules,
            notes=self.notes,
            provenance=self.provenance,
            details={"whole_scores": self.scores},
        )

    def at(self, layer: int | SupportsIndex) -> "Paths":
        """The same answer for one layer.

        Raises:
            ValueError: for a layer that the answer does not have.
            TypeError: for a layer that is not an integer.
        """
        wanted = as_int(layer, "layer must be an integer")
        if wanted not in self.layers:
            raise ValueError(f"there is no layer {wanted} in this answer: {self._there_is()}.")
        row = [self.layers.index(wanted)]
        return replace(
            self,
            layers=(wanted,),
            values=self.values[row],
            around=self.around[row],
            where=None if self.where is None else self.where[row],
            standard_error=None if self.standard_error is None else self.standard_error[row],
            stream=None,
            stream_layers=(),
        )

    def _place(self, name: str) -> tuple[int, ...]:
        if self.by == "position":
            raise ValueError(f'positions have no names: index `values`, or ask by="head", got {name!r}.')
        if name in self.names:
            flat = torch.tensor(self.names.index(name))
            return tuple(int(i) for i in torch.unravel_index(flat, self.values.shape[:-1]))
        raise ValueError(f"there is no component {name!r} in this answer: {self._there_is()}.")

    def _there_is(self) -> str:
        first, last = self.layers[0], self.layers[-1]
        layers = f"it has the layers {first} to {last}" if last > first else f"it has layer {first}"
        if last - first + 1 > len(self.layers):
            layers = f"it has the layers {', '.join(map(str, self.layers))}"
        if self.by == "position":
            return layers
        end = [size - 1 for size in self.values.shape[1:-1]]
        return f"{layers}, from {self.name(first, *[0] * len(end))} to {self.name(last, *end)}"

    # -- other forms --------------------------------------------------------------------------------------------------

    def to_dataframe(self) -> "pd.DataFrame":
        """One row for each component and source token: layer, the place on the other axes, name, token, value, share.

        `at` is the position where most of the value stands, where positions are known.
        """
        import pandas as pd

        places = list(product(*map(range, self.values.shape[:-1])))
        layer, *others = zip(*places, strict=True)
        layers = [self.layers[i] for i in layer]
        names = [self.name(n, *place[1:]) for n, place in zip(layers, places, strict=True)]
        frames = []
        for column, source in enumerate(self.positions):
            at: Any = others[0] if self.by == "position" else None
            if self.where is not None:
                at = self.where[..., column].abs().argmax(-1).flatten().tolist()
            score, values = self.scores[column].item(), self.values[..., column].flatten().double()
            share = values / abs(score) if score else torch.zeros_like(values)
            columns: dict[str, Any] = {"layer": layers} | dict(zip(self.axis_names[1:-1], others, strict=True))
            columns |= {"name": names, "source": source, "token": self.str_tokens[source]}
            frames.append(pd.DataFrame(columns | {"value": values.tolist(), "share": share.tolist(), "at": at}))
        return pd.concat(frames, ignore_index=True)

    def to_json(self, path: str | Path | None = None) -> str:
        """The whole answer as text that `from_json` reads back without loss; `path` is where to write it."""
        return saved(paths_record.written(dict(vars(self))), path)

    @classmethod
    def from_json(cls, text: str | Path) -> "Paths":
        """Read what `to_json` wrote. A warning says so where it was made with other versions of the model's libraries.

        Args:
            text: the text itself, or the path of the file that holds it, as a `pathlib.Path`.

        Raises:
            TypeError: for something that is neither.
            OSError: for a file that cannot be read.
            ValueError: for text that is not a Paths, or that a later version has written.
        """
        found = paths_record.read(text)
        if found["provenance"] is not None:
            found["provenance"].warn_of_other_versions("this answer")
        found["predictions"] = tuple(Prediction(Token(*token), p) for token, p in found["predictions"])
        return cls(**found)

    # -- pictures -----------------------------------------------------------------------------------------------------

    def plot(self, token: str | SupportsIndex | None = None) -> "Figure":
        """A heat map of the shares of one source token, layers from top to bottom.

        Args:
            token: the source token; None is the one with the largest score.

        Raises:
            ValueError: by "neuron", which are too many to see, and for a token that is not among the source tokens.
        """
        return card.plot(self, self.column(token))

    def to_html(self, path: str | Path | None = None, token: str | SupportsIndex | None = None) -> str:
        """A static page of the heat map for one source token, with tooltips, without script or network.

        Args:
            path: where to write it.
            token: the source token; None is the one with the largest score.
        """
        return saved(card.page(self, self.column(token)), path)

    def flow(self, path: str | Path | None = None, token: str | SupportsIndex | None = None) -> str:
        """The flow picture of one source token, as a static page: at which position its influence stands before each
        layer, and which heads move it.

        Args:
            path: where to write it.
            token: the source token; None is the one with the largest score.

        Raises:
            ValueError: for an answer without `stream`: one by something else than heads, or by backward mode.
        """
        self._require_stream()
        return saved(card.flow_page(self, self.column(token)), path)

    def show(self) -> LiveView:
        """circuitsvis' view of activations, for a live notebook: choose a depth and a source token, and each token of
        the prompt is coloured by the share of the score that stands at its position there.

        Its script comes from the installed package. Where no script runs the flow picture stays in its place.

        Raises:
            ValueError: for an answer without `stream`, as `flow` does, and for more than 160,000 numbers.
        """
        self._require_stream()
        return card.live_flow(self)

    def _require_stream(self) -> None:
        if self.stream is None and self.by == "head" and self.mode == "forward":
            raise ValueError(
                "where the influence stands was not kept, or something goes around the stream of this model: for "
                "paths of a corpus, which does not keep it, call carried_by for the prompt."
            )
        if self.by == "position":
            raise ValueError(
                "this answer, by 'position', says where the influence stands after each layer, which a page shows with "
                "a slider: tls.explore(model, prompt, scope, carried=paths)."
            )
        if self.stream is None:
            raise ValueError(
                f"this answer, by {self.by!r} in {self.mode} mode, does not know where the influence stands: ask "
                'carried_by(lin, scope, "head", tokens=...) with fewer source tokens.'
            )

    def _repr_html_(self) -> str:
        draw = card.fragment if self.stream is None else card.flow
        return draw(self, self.column())
