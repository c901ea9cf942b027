"""J between hooks that are divided into heads: queries, keys, values and what heads give out are perturbed or read."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import tl_scopes as tls
from tests import zoo
from tests.test_attention import MORE
from tests.zoo import PROMPT, Specimen
from tl_scopes.models import components

EXACT = {"rtol": 1e-10, "atol": 1e-12}
SEMANTIC = tls.SemanticScope(7)
SPECIES = ["bridge gpt2", "bridge llama", "native rotary grouped", "multi-query"]
SPECIES += [name for name in zoo.SPECIES if name.startswith("hooked")]
HOOKS = [f"blocks.1.attn.hook_{part}" for part in "qkvz"]


@pytest.fixture(params=SPECIES)
def specimen(request: pytest.FixtureRequest) -> Iterator[Specimen]:
    with zoo.Float64():
        yield zoo.specimen(request.param) if request.param in zoo.SPECIES else MORE[request.param]()


@pytest.fixture
def llama() -> Iterator[Any]:
    with zoo.Float64():
        yield zoo.specimen("bridge llama").model


def size_at(model: Any, hook: str) -> tuple[int, int]:
    """Heads and d_head of a hook's value."""
    seen: list[tuple[int, int]] = []

    def look(value: Tensor, hook: Any) -> None:
        seen.append((value.shape[2], value.shape[3]))

    with torch.no_grad(), model.hooks(fwd_hooks=[(hook, look)]):
        model(torch.tensor([PROMPT]))
    return seen[0]


@pytest.mark.parametrize("hook", HOOKS)
def test_the_slope_of_what_a_hook_adds(specimen: Specimen, hook: str) -> None:
    """The gradient at a token and head is the derivative of the logit when the user's own hook adds to that place."""
    model = specimen.model
    heads, width = size_at(model, hook)
    lin = tls.linearize(model, PROMPT, wrt=hook)
    assert lin.embeddings.shape == (len(PROMPT), heads * width)
    pulled = lin.vjp(SEMANTIC.cotangents(lin))[0].unflatten(-1, (heads, width))
    step, at, head = torch.linspace(-1, 1, width, dtype=torch.float64), 5, heads - 1

    def logit(h: float) -> float:
        def add(value: Tensor, hook: Any) -> Tensor:
            value = value.clone()
            value[0, at, head] += h * step
            return value

        with torch.no_grad(), model.hooks(fwd_hooks=[(hook, add)]):
            return model(torch.tensor([PROMPT]))[0, -1, 7].item()

    slope = (logit(1e-4) - logit(-1e-4)) / 2e-4
    assert (pulled[at, head] @ step).item() == pytest.approx(slope, rel=1e-4, abs=1e-7)
    answer = SEMANTIC(lin)
    assert_close(answer.scores, pulled.flatten(1).norm(dim=-1), **EXACT)
    assert answer.unit == f"logit per unit of norm at {hook}"


def test_a_head_map_is_j_at_every_layer(specimen: Specimen) -> None:
    """`head_map` has the norms by head that `linearize` gives for one layer at a time."""
    model = specimen.model
    found = tls.head_map(model, PROMPT, SEMANTIC)
    for row, layer in enumerate(found.layers):
        lin = tls.linearize(model, PROMPT, wrt=f"blocks.{layer}.attn.hook_z")
        by_head = lin.vjp(SEMANTIC.cotangents(lin))[0].unflatten(-1, (found.scores.shape[1], -1)).norm(dim=-1)
        assert_close(found.scores[row], by_head.T, **EXACT)


@pytest.mark.parametrize("hook", HOOKS)
def test_what_moves_a_head(specimen: Specimen, hook: str) -> None:
    """J that ends at heads: vjp, jvp, the matrix and a finite difference agree, and nothing later matters."""
    model = specimen.model
    heads, width = size_at(model, hook)
    lin = tls.linearize(model, PROMPT, of=hook)
    assert lin.readout.shape == (heads * width,)
    matrix = lin.as_matrix()
    step = torch.randn(lin.embeddings.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert_close(torch.einsum("dte,te->d", matrix, step), lin.jvp(step[None])[0], **EXACT)
    h = 1e-5
    ahead, behind = (lin.evaluate((lin.embeddings + sign * h * step)[None])[0][0] for sign in (1, -1))
    assert_close((ahead - behind) / (2 * h), lin.jvp(step[None])[0], rtol=1e-5, atol=1e-7)
    assert_close(lin.at(lin.embeddings).readout, lin.readout, **EXACT)
    direction = torch.zeros(heads, width)
    direction[heads - 1] = 1
    answer = tls.DirectionScope(direction.flatten(), hook, name="last head")(lin)
    assert_close(answer.scores, matrix.unflatten(0, (heads, width))[-1].sum(0).norm(dim=-1), **EXACT)
    assert answer.unit == "last head per unit of embedding norm"


def test_every_scope_takes_them(llama: Any) -> None:
    """Methods that move the point, and those that need second derivatives."""
    hook = "blocks.0.attn.hook_v"
    scopes = (tls.FisherScope(8), tls.SpectralScope(), tls.TemperatureScope(), tls.PathIntegratedScope(7, steps=4))
    for scope in scopes:
        answer = tls.attribute(llama, PROMPT, scope, wrt=hook)
        assert (len(answer.scores), answer.wrt) == (len(PROMPT), hook)
    saving = tls.linearize(llama, PROMPT, wrt=hook, checkpoint=True)
    assert_close(SEMANTIC(saving).scores, tls.attribute(llama, PROMPT, SEMANTIC, wrt=hook).scores, **EXACT)


def test_paths_from_a_head_on(llama: Any) -> None:
    """Parts of a score between heads and the prediction sum to it, in every mode."""
    for checkpoint in (False, True):
        lin = tls.linearize(llama, PROMPT, wrt="blocks.0.attn.hook_z", checkpoint=checkpoint)
        paths = tls.carried_by(lin, SEMANTIC, "head", [2, 5])
        assert_close(paths.scores, SEMANTIC(lin).scores[[2, 5]], **EXACT)
        assert_close(paths.values.sum(1) + paths.around, paths.scores.expand_as(paths.around), **EXACT)
        assert_close(
            paths.around[0], torch.zeros(2, dtype=torch.float64), **EXACT
        )  # all of it is in that layer's heads
    to_queries = tls.linearize(llama, PROMPT, of="blocks.1.attn.hook_q")
    direction = tls.DirectionScope(torch.ones(len(to_queries.readout)), "blocks.1.attn.hook_q")
    assert tls.carried_by(to_queries, direction, "head", 2).layers == (0,)


def test_maps_and_many(llama: Any) -> None:
    hook = "blocks.1.attn.hook_z"
    one = tls.attribute(llama, PROMPT, SEMANTIC, wrt=hook)
    assert_close(tls.attribution_map(llama, PROMPT, SEMANTIC, wrt=hook)[-1].scores, one.scores, **EXACT)
    assert_close(next(iter(tls.attribute_many(llama, [PROMPT], SEMANTIC, wrt=hook))).scores, one.scores, **EXACT)


@pytest.mark.parametrize(
    ("hook", "match"),
    [
        ("blocks.0.attn.hook_pattern", r"neither \[batch pos d\] nor \[batch pos head d_head\] but \(1, 2, 2, 2\)"),
        ("blocks.0.attn.hook_attn_scores", r"neither \[batch pos d\] nor \[batch pos head d_head\] but \(1, 2, 2, 2\)"),
    ],
)
def test_patterns_are_not_heads(hook: str, match: str) -> None:
    """Of two tokens and two heads, where shapes alone would not tell."""
    with zoo.Float64():
        model = zoo.specimen("bridge gpt2").model
        for end in ("wrt", "of"):
            with pytest.raises(ValueError, match=match):
                tls.linearize(model, PROMPT[:2], **{end: hook})


def test_heads_before_positions() -> None:
    """Latent attention, at a prompt of as many tokens as heads too; what its heads give out can be asked."""
    with zoo.Float64():
        model = MORE["latent"]().model
        heads = components(model, "z")[0].heads
        for end in ("wrt", "of"):
            with pytest.raises(ValueError, match=r"is \[batch head pos d_head\].*take 'blocks.1.attn.hook_z'"):
                tls.linearize(model, PROMPT[:heads], **{end: "blocks.1.attn.hook_k"})
        assert tls.attribute(model, PROMPT, SEMANTIC, wrt="blocks.0.attn.hook_z").scores.all()
