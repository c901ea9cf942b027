"""Small random models of many architectures, each asked by tl_scopes and differentiated by plain autograd beside it.

The table of architectures is tests/data/families.json. To add one, write down the least configuration that
`transformers` makes a model of; `python -m tests.families.table NAME` shows what comes of it.
"""

import copy
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import tl_scopes as tls
from tests import zoo
from tl_scopes import models

MAJOR = version("transformer-lens").split(".")[0]
PROMPT = [3, 14, 15, 9, 26, 5, 35, 8, 21, 11]
PROMPTS = [PROMPT, PROMPT[:4], PROMPT[2:9], PROMPT[::-1]]
MIDDLE = "blocks.1.hook_resid_pre"

TOLERANCE = 1e-7
"""The largest difference that passes, relative to the norm of what autograd gives.

Most architectures agree to 1e-14. Routers of DeepSeek, GLM and RecurrentGemma's recurrence round to float32 inside a
float64 model, each time it runs, and agree to 1e-8.
"""


@dataclass(frozen=True)
class Refusal:
    """What is not answered for an architecture, and why."""

    what: str
    """An operation; "model" where tl_scopes refuses the model; "boot" where TransformerLens cannot run it."""
    on: list[str]
    """Major versions of TransformerLens."""
    error: str
    """The message, as a regular expression."""
    why: str
    """The reason in a few words."""
    logits_off_by: float = 0.0
    """How far TransformerLens' logits are from Hugging Face's, relative to their norm."""

    def matches(self, outcome: object) -> bool:
        return isinstance(outcome, Exception) and re.search(self.error, str(outcome), re.DOTALL) is not None


@dataclass(frozen=True)
class Family:
    """One line of the table: an architecture in its smallest form, and what is known of it."""

    name: str
    model_type: str
    config: dict[str, Any]
    architecture: str
    """As TransformerLens calls it."""
    attention: str = "eager"
    """The attention kernel."""
    embedding: dict[str, Any] | None = None
    """Where "hook_embed" stands, if it is not the output of the embedding module: behind another module, or behind a
    scale; on some versions of TransformerLens."""
    refused: tuple[Refusal, ...] = ()

    def refusals(self, major: str = MAJOR) -> dict[str, Refusal]:
        return {refusal.what: refusal for refusal in self.refused if major in refusal.on}

    def runs(self, major: str = MAJOR) -> bool:
        return not {"boot", "model"} & set(self.refusals(major))

    @property
    def place(self) -> dict[str, Any]:
        """`embedding`, on this version of TransformerLens."""
        return self.embedding if self.embedding and MAJOR in self.embedding["on"] else {}

    def boot(self) -> nn.Module:
        """A Hugging Face model with random weights, in float64."""
        config = CONFIG_MAPPING[self.model_type](attn_implementation=self.attention, **self.config)
        made_by = getattr(transformers, self.architecture, None) or getattr(
            transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[self.model_type]
        )
        torch.manual_seed(0)
        model: nn.Module = made_by(config).double().eval()
        zoo._randomise(model)
        return model

    def wrap(self, model: nn.Module) -> Any:
        """The bridge around it, which changes the model itself."""
        return build_bridge_from_module(model, self.architecture, hf_config=model.config, dtype=torch.float64)


def families() -> list[Family]:
    table = json.loads((Path(__file__).parents[1] / "data" / "families.json").read_text())
    found = []
    for name, line in table.items():
        model_type = line.pop("model_type", name)
        architecture = line.pop("architecture", None) or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
        refused = tuple(Refusal(**refusal) for refusal in line.pop("refused", ()))
        found.append(Family(name, model_type, architecture=architecture, refused=refused, **line))
    return found


@contextmanager
def precisely() -> Iterator[None]:
    """Inside, models in float64 compute in float64, also where they make tensors of their own (XGLM)."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with zoo.Float64():
            yield
    finally:
        torch.set_default_dtype(before)


class Plain:
    """A Hugging Face model at one prompt, differentiated one number at a time: no tl_scopes, no TransformerLens."""

    def __init__(self, model: nn.Module, family: Family, prompt: list[int], *, middle: bool = False) -> None:
        """Run it with zeros added to the embedding, or to what enters its block 1."""
        place, readouts = family.place, []
        scale = getattr(model.config, place["scale"]) if "scale" in place else 1.0

        def behind(module: nn.Module, args: Any, out: Tensor) -> Tensor:
            self.delta = torch.zeros_like(out, requires_grad=True)
            return out + self.delta / scale

        def before(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Any:
            stream, *others = args or (kwargs["hidden_states"],)
            self.delta = torch.zeros_like(stream, requires_grad=True)
            moved = stream + self.delta
            return ((moved, *others), kwargs) if args else ((), kwargs | {"hidden_states": moved})

        embedding = model.get_submodule(place["module"]) if "module" in place else model.get_input_embeddings()
        handles = [
            _blocks(model)[1].register_forward_pre_hook(before, with_kwargs=True)
            if middle
            else embedding.register_forward_hook(behind),
            model.get_output_embeddings().register_forward_pre_hook(lambda module, args: readouts.append(args[0][0])),
        ]
        try:
            self.logits = model(torch.tensor([prompt]), use_cache=False).logits[0]
        finally:
            for handle in handles:
                handle.remove()
        self.readout = readouts[0]
        self.end = len(prompt) - 1

    def gradient(self, number: Tensor) -> Tensor:
        return torch.autograd.grad(number, self.delta, retain_graph=True)[0][0]

    def semantic(self, position: int) -> Tensor:
        """‖∂z_v/∂x_t‖ for the most likely token v."""
        logits = self.logits[position]
        return self.gradient(logits[logits.argmax()]).norm(dim=-1)[: position + 1]

    def temperature(self) -> Tensor:
        """‖∂(ŷ·y)/∂x_t‖"""
        y = self.readout[self.end]
        return self.gradient(y @ (y / y.norm()).detach()).norm(dim=-1)

    def fisher(self) -> Tensor:
        """Σ_v p_v ‖∂z_v/∂x_t − Σ_u p_u ∂z_u/∂x_t‖²"""
        z = self.logits[self.end]
        G, p = torch.stack([self.gradient(logit) for logit in z]), z.detach().softmax(-1)
        return torch.einsum("v,vtd->t", p, (G - torch.einsum("v,vtd->td", p, G)).square())


def _blocks(model: nn.Module) -> nn.ModuleList:
    """The list of blocks, whatever it is called."""
    count = model.config.get_text_config().num_hidden_layers
    return next(part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == count)


def _semantic(model: Any, **options: Any) -> list[Tensor]:
    return [tls.attribute(model, PROMPT, tls.SemanticScope(), **options).scores]


OPERATIONS: dict[str, tuple[str, Callable[[Any], list[Tensor]], Callable[["Expected"], list[Tensor]]]] = {
    "semantic": ("Semantic", _semantic, lambda plain: [plain.whole.semantic(plain.whole.end)]),
    "temperature": (
        "Temperature",
        lambda model: [tls.attribute(model, PROMPT, tls.TemperatureScope()).scores],
        lambda plain: [plain.whole.temperature()],
    ),
    "fisher": (
        "exact Fisher",
        lambda model: [tls.attribute(model, PROMPT, tls.FisherScope(exact=True)).scores],
        lambda plain: [plain.whole.fisher()],
    ),
    "map": (
        "map",
        lambda model: [row.scores for row in tls.attribution_map(model, PROMPT, tls.SemanticScope())],
        lambda plain: [plain.whole.semantic(position) for position in range(len(PROMPT))],
    ),
    "many": (
        "prompts of several lengths in one batch",
        lambda model: [
            answer.scores
            for answer in tls.attribute_many(model, PROMPTS, tls.SemanticScope(), progress=False, on_error="raise")
            if answer is not None
        ],
        lambda plain: [alone.semantic(alone.end) for alone in plain.alone],
    ),
    "checkpoint": (
        "checkpoint=True",
        lambda model: _semantic(model, checkpoint=True),
        lambda plain: [plain.whole.semantic(plain.whole.end)],
    ),
    "middle": (
        f'wrt="{MIDDLE}"',
        lambda model: _semantic(model, wrt=MIDDLE),
        lambda plain: [plain.middle.semantic(plain.middle.end)],
    ),
}
"""What is asked: its name in words, of tl_scopes, and of plain autograd."""


@dataclass(frozen=True)
class Expected:
    """What plain autograd gives: each run is made when it is asked for."""

    model: nn.Module
    family: Family

    @cached_property
    def whole(self) -> Plain:
        return Plain(self.model, self.family, PROMPT)

    @cached_property
    def middle(self) -> Plain:
        return Plain(self.model, self.family, PROMPT, middle=True)

    @cached_property
    def alone(self) -> list[Plain]:
        return [Plain(self.model, self.family, prompt) for prompt in PROMPTS]


def examine(family: Family) -> dict[str, float | Exception]:
    """How far tl_scopes is from plain autograd in each operation, or the error that it raised there.

    Under "logits" stands how far TransformerLens itself is from Hugging Face. Where the model is refused, or
    TransformerLens cannot run it, "model" or "boot" holds the error, and no operation is tried.
    """
    found: dict[str, float | Exception] = {}
    with precisely():
        model = family.boot()
        expected = Expected(copy.deepcopy(model), family)
        try:
            bridge = family.wrap(model)
            logits = bridge(torch.tensor([PROMPT]), return_type="logits")
        except Exception as error:
            return {"boot": error}
        found["logits"] = _difference([logits[0]], [expected.whole.logits])
        try:
            models.check_model(bridge)
        except TypeError as error:
            return found | {"model": error}
        for name, (_, asked, wanted) in OPERATIONS.items():
            # The oracle comes first and outside, so that an error of its own is not taken for a refusal.
            values = None if name in family.refusals() else wanted(expected)
            try:
                answers = asked(bridge)
            except Exception as error:
                found[name] = error
            else:
                found[name] = torch.inf if values is None else _difference(answers, values)
    return found


def _difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative difference among some answers; infinite where one is not finite, or zero."""
    worst = 0.0
    for one, other in zip(found, expected, strict=True):
        size = float(other.norm())
        difference = float((one - other).norm()) / size if size else torch.inf
        worst = max(worst, difference if torch.isfinite(torch.tensor(difference)) else torch.inf)
    return worst
