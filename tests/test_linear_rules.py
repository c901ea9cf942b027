"""Linear rules: the values stay, what is left is linear, and it is what an independent statement of the rules gives."""

import math
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import tl_scopes as tls
from tests import zoo
from tests.zoo import PROMPT, Specimen
from tl_scopes.models import LinearRules
from tl_scopes.models.linear_rules import RULES, SETS

EXACT = {"rtol": 1e-10, "atol": 1e-12}
KEYS = "The keys to the old cabinet near the door"
TARGET, OTHER = 7, 30
SCOPE = tls.RelevanceScope(TARGET, versus=OTHER)


def rules(names: Any) -> Any:
    read = LinearRules.read(names)
    assert read is not None
    return read.applied()


def derivative(function: Callable[[Tensor], Tensor], x: Tensor, names: Any) -> Tensor:
    """What the rules make of ∂Σf(x)/∂x."""
    x = x.clone().requires_grad_()
    with rules(names):
        out = function(x)
    assert torch.equal(out, function(x.detach())), "a value has changed"
    if not out.requires_grad:
        return torch.zeros_like(x)
    return torch.autograd.grad(out.sum(), x, allow_unused=True, materialize_grads=True)[0]


# -- the rules, on functions whose derivatives are closed forms -------------------------------------------------------

X = torch.tensor([[-2.0, -0.3, 0.0, 0.4, 1.7]], dtype=torch.float64)


def gelu_new(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


@pytest.mark.parametrize(
    "act",
    [
        F.silu, F.gelu, F.relu, torch.relu, torch.tanh, F.leaky_relu, F.mish, F.hardswish, F.elu, torch.square,
        gelu_new, lambda x: F.silu(x, inplace=True), lambda x: F.gelu(x, approximate="tanh"),
        lambda x: x * torch.sigmoid(1.702 * x),
        lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))), lambda x: F.relu(x) ** 2, lambda x: x * x * x,
        lambda x: x.clamp(-1, 1), lambda x: torch.where(x > 0, x * x + x, (torch.expm1(x) - x) * 0.8 + x),
    ],
)  # fmt: skip
def test_an_activation_is_its_secant(act: Callable[[Tensor], Tensor]) -> None:
    """act(x) = (act(x)/x)·x, also where it is written out in several operations, and has no jump at zero."""
    found = derivative(lambda x: act(x.clone()), X, ("activations", "gates"))
    near = torch.where(X == 0, -1e-9, X)
    assert_close(found, act(near.clone()) / near, rtol=1e-6, atol=1e-6)


def test_what_overflows_to_no_effect_in_half_precision() -> None:
    found = derivative(gelu_new, torch.tensor([60.0, -60.0, 1.0], dtype=torch.float16), ("activations", "gates"))
    assert_close(found, torch.tensor([1.0, 0.0, 0.841], dtype=torch.float16), rtol=1e-2, atol=1e-2)


def test_constants() -> None:
    for function in (torch.sigmoid, torch.exp, F.softplus):
        assert not derivative(function, X, "activations").any()
    assert not derivative(lambda x: torch.softmax(x, -1), X, "patterns").any()
    for function in (torch.rsqrt, torch.sqrt, torch.reciprocal, lambda x: x.pow(-0.5), lambda x: 1 / x):
        assert not derivative(function, X.abs() + 1, "norms").any()


def test_norms() -> None:
    gain, bias = torch.linspace(1, 2, 5).double(), torch.linspace(-1, 1, 5).double()
    centre = torch.eye(5).double() - 1 / 5
    scale = (X.var(unbiased=False) + 1e-5).rsqrt()
    expected = (centre * scale) @ gain
    for norm in (
        lambda x: F.layer_norm(x, (5,), gain, bias),
        lambda x: (x - x.mean(-1, True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() * gain + bias,
    ):
        assert_close(derivative(norm, X, "norms")[0], expected, **EXACT)
    rms = gain * (X.square().mean() + 1e-5).rsqrt()
    for norm in (
        lambda x: F.rms_norm(x, (5,), gain, 1e-5),
        lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * gain,
    ):
        assert_close(derivative(norm, X, "norms")[0], rms, **EXACT)
    channels = torch.randn(1, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    grouped = derivative(lambda x: F.group_norm(x, 2).square(), channels, "norms")
    own = channels.clone().requires_grad_()
    parts = own.reshape(1, 2, 6)
    by_hand = (parts - parts.mean(-1, True)) * (parts.var(-1, unbiased=False, keepdim=True) + 1e-5).rsqrt().detach()
    assert_close(grouped, torch.autograd.grad(by_hand.square().sum(), own)[0], **EXACT)


def test_products() -> None:
    """A gated product gives half of itself to each factor; a product of attention does under its own rule."""
    assert_close(derivative(lambda x: x.sin() * x, X, "gates"), (X.cos() * X + X.sin()) / 2, **EXACT)
    W = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def attention(x: Tensor) -> Tensor:
        return torch.softmax(x.T @ (x @ W), -1) @ x.T

    def turned(x: Tensor) -> Tensor:
        return (x @ torch.softmax(x.T @ (x @ W), -1).transpose(0, 1)).transpose(0, 1)

    def cast(x: Tensor) -> Tensor:
        return F.dropout(torch.softmax(x.T @ (x @ W), -1, dtype=torch.float32).to(x.dtype), 0.1, False) @ x.T

    def fused(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x.T[None], (x @ W).T[None], x.T[None], scale=1.0)

    def by_hand(x: Tensor, value: float, key: float, pattern: float) -> Tensor:
        def part(a: Tensor, share: float) -> Tensor:
            return a.detach() + share * (a - a.detach())

        x = x.clone().requires_grad_()
        scores = part(x.T @ (x @ W), key)
        return torch.autograd.grad(part(part(torch.softmax(scores, -1), pattern) @ x.T, value).sum(), x)[0]

    for names, shares in (
        ("pattern_value", (0.5, 1, 1)),
        ("query_key", (1, 0.5, 1)),
        (("pattern_value", "query_key"), (0.5, 0.5, 1)),
        ("patterns", (1, 1, 0)),
    ):
        for function in (attention, turned, fused):
            assert_close(derivative(function, X, names), by_hand(X, *shares), **EXACT)
        # A pattern in float32 that is cast to the model's precision, as Hugging Face models do, is still a pattern.
        assert_close(derivative(cast, X, names), by_hand(X, *shares), rtol=1e-6, atol=1e-6)


# -- laws on every kind of model --------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [*SETS, *RULES])
def test_values_stay_bit_for_bit(specimen: Specimen, names: str) -> None:
    own, ruled = (tls.linearize(specimen.model, PROMPT, rules=one) for one in (None, names))
    assert torch.equal(own.logits, ruled.logits)
    assert torch.equal(own.readout, ruled.readout)
    assert str(ruled.rules) == names


def test_parts_and_biases_add_up(specimen: Specimen) -> None:
    """Σ g·x over the tokens, and over all biases, is the difference of the logits; the scope reports both."""
    biases = {
        name: parameter
        for name, parameter in specimen.plain.named_parameters()
        if re.search(r"bias|wpe|W_pos|pos_embed|pos\.|(\.|^)_?b(_\w+)?$", name)
    }
    delta = torch.zeros(len(PROMPT), zoo.WIDTH, dtype=torch.float64, requires_grad=True)
    frozen = {name: p.requires_grad_(name in biases) for name, p in specimen.plain.named_parameters()}
    with rules("linear"):
        logits = specimen.forward(torch.tensor(PROMPT), delta)[1][-1]
    value = logits[TARGET] - logits[OTHER]
    of_tokens, *of_biases = torch.autograd.grad(value, [delta, *biases.values()], allow_unused=True)
    for parameter in frozen.values():
        parameter.requires_grad_(True)
    rest = sum(float((b.detach() * g).sum()) for b, g in zip(biases.values(), of_biases, strict=True) if g is not None)
    answer = SCOPE(tls.linearize(specimen.model, PROMPT, rules="linear"))
    x = tls.linearize(specimen.model, PROMPT).embeddings
    assert_close(answer.scores, (of_tokens * x).sum(-1), **EXACT)
    assert answer.biases == pytest.approx(rest, rel=1e-9, abs=1e-10)
    assert float(answer.scores.sum()) + answer.biases == pytest.approx(float(value), rel=1e-10)
    assert answer.value == pytest.approx(float(value), rel=1e-10)


def test_ways_through(specimen: Specimen) -> None:
    """A batch, a checkpoint, a hook further up, spans and maps, forward and backward mode: the same Jacobian."""
    model = specimen.model
    lin = tls.linearize(model, PROMPT, rules="linear")
    for other in (
        tls.linearize(model, PROMPT, rules="linear", checkpoint=True),
        tls.linearize(model, PROMPT).under("linear"),
        lin.at(lin.embeddings),
        lin.under(None).under("linear"),
        lin.at_tokens(lin.tokens),
    ):
        assert_close(other.as_matrix(), lin.as_matrix(), **EXACT)
    scopes = (SCOPE, tls.SemanticScope(TARGET), tls.TemperatureScope(), tls.FisherScope(exact=True))
    for scope in scopes[:3]:
        alone = [tls.attribute(model, prompt, scope, rules="linear") for prompt in (PROMPT, PROMPT[:4])]
        many = tls.attribute_many(model, [PROMPT, PROMPT[:4]], scope, rules="linear")
        for one, other in zip(alone, many, strict=True):
            assert other is not None
            assert_close(one.scores, other.scores, **EXACT)
            assert one.rules == other.rules == "linear"
        rows = tls.attribution_map(model, PROMPT, scope, rules="linear")
        assert_close(rows[3].scores, alone[1].scores, **EXACT)
    tangent = torch.randn(1, *lin.embeddings.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pushed = torch.einsum("dtk,tk->d", lin.as_matrix(), tangent[0])
    assert_close(lin.jvp(tangent)[0], pushed, **EXACT)
    for names in (None, "linear", "lookup") if "mamba" not in type(specimen.plain).__name__.lower() else ():
        plain, saved = (tls.linearize(model, PROMPT, rules=names, checkpoint=keep) for keep in (False, True))
        expected, dual = (tls.carried_by(one, tls.SemanticScope(TARGET), "position", 2) for one in (plain, saved))
        assert_close(dual.values, expected.values, rtol=1e-8, atol=1e-9)
    spans = tls.answer_map(model, PROMPT[:5], PROMPT[5:7], tls.SemanticScope(), rules="linear")
    log_prob = tls.SemanticScope(PROMPT[6], quantity="log_prob")
    assert_close(spans[1].scores[:5], tls.attribute(model, PROMPT[:6], log_prob, rules="linear").scores[:5], **EXACT)


def test_it_is_linear(specimen: Specimen) -> None:
    """From a hook to the readout: the value changes exactly as the Jacobian says when what is constant is kept."""
    lin = tls.linearize(specimen.model, PROMPT, rules="linear")
    assert lin.rules is not None
    assert lin.rules.conserve
    second = lin.jvp(torch.ones(1, *lin.embeddings.shape, dtype=torch.float64))
    assert_close(second[0], lin.as_matrix().sum((1, 2)), **EXACT)


def test_parts_carried_sum_to_the_score(specimen: Specimen) -> None:
    for checkpoint in (False, True):
        lin = tls.linearize(specimen.model, PROMPT, rules="linear", checkpoint=checkpoint)
        try:
            paths = tls.carried_by(lin, tls.SemanticScope(TARGET, versus=OTHER), by="head")
        except ValueError as error:
            assert "mamba" in str(error).lower()  # noqa: PT017
            return
        assert_close(paths.values.sum(1) + paths.around, paths.scores.expand_as(paths.around), rtol=1e-8, atol=1e-10)


def test_the_model_is_left_as_found(specimen: Specimen) -> None:
    before = tls.attribute(specimen.model, PROMPT, tls.SemanticScope(TARGET))
    tls.attribute(specimen.model, PROMPT, SCOPE, rules="lookup")
    after = tls.attribute(specimen.model, PROMPT, tls.SemanticScope(TARGET))
    assert torch.equal(before.scores, after.scores)
    assert after.rules is None


def test_a_set_of_rules_stands_alone(tiny: Any) -> None:
    for rules in (["linear"], ("linear", "norms"), ("linear", "lookup")):
        with pytest.raises(ValueError, match="'linear' is a set of rules, .*: give it alone, rules='linear', or name"):
            tls.linearize(tiny, "The keys", rules=rules)


@pytest.mark.parametrize("part", ["q", "k"])
def test_what_rules_hold_says_so(tiny: Any, part: str) -> None:
    """From queries and keys nothing leads on under constant patterns."""
    lin: dict[str, Any] = {"wrt": f"blocks.3.attn.hook_{part}"}
    with pytest.raises(ValueError, match="or the linear rules hold constant what leads from there, .*: ask without"):
        tls.attribute(tiny, "The keys to the old cabinet", rules="linear", **lin)
    assert tls.attribute(tiny, "The keys to the old cabinet", **lin).scores.any()


def test_pairs_under_rules(tiny: Any) -> None:
    """RelP: Δ·G under rules. At the stream before the first block the parts are those of the embeddings."""
    pair = tls.PromptPair(tiny, KEYS, KEYS.replace("keys", "key"), answer=" are", wrong=" is")
    found = pair.attribution_patching("resid_pre", rules="linear").values
    clean, corrupted = (tls.linearize(tiny, one, rules="linear") for one in (pair.clean, pair.corrupted))
    g = corrupted.vjp(corrupted.cotangent(lambda z: pair.metric(z[None, None]))[None])[0]
    assert_close(found[0], ((clean.embeddings - corrupted.embeddings) * g).sum(-1), rtol=1e-4, atol=1e-4)
    heads = pair.carried("head_out", rules="linear")
    assert not torch.allclose(heads.values, pair.carried("head_out").values)
    agreement = tls.agreement([pair], rules="linear")
    assert set(agreement.summary()["method"]) == {
        "carried", "attribution patching", "carried under linear rules", "attribution patching under linear rules",
    }  # fmt: skip
    scope = tls.UnderRulesScope(pair.scope)
    ruled = pair.carried("head_out", scope)
    assert ruled.method == "carried under linear rules"
    assert_close(ruled.values, heads.values)
    assert set(tls.agreement([pair], scope, rules="linear").summary()["method"]) == {
        "attribution patching", "carried under linear rules", "attribution patching under linear rules",
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"under rules='linear' what curves the network is constant: take order=1"):
        pair.attribution_patching(order=2, rules="linear")


def test_layer_maps_under_rules(tiny: Any) -> None:
    scope = tls.SemanticScope(" are", versus=" is")
    found = tls.layer_map(tiny, KEYS, scope, at="resid_pre", rules="linear")
    assert_close(found.scores[0], tls.attribute(tiny, KEYS, scope, rules="linear").scores)
    assert tls.head_map(tiny, KEYS, scope, rules="linear").scores.isfinite().all()


def test_every_answer_says_its_rules(tiny: Any) -> None:
    """Where it is printed, where it is drawn, and in its JSON."""
    scope = tls.SemanticScope(" are", versus=" is")
    lin = tls.linearize(tiny, KEYS, rules="lookup")
    paths = tls.carried_by(lin, scope)
    shown = [
        tls.attribution_map(tiny, KEYS, scope, rules="lookup"),
        tls.answer_map(tiny, KEYS, " are old", tls.SemanticScope(), rules="lookup"),
        tls.layer_map(tiny, KEYS, scope, rules="lookup"),
        paths,
        paths.through("L2H2"),
        tls.compare([scope(lin), scope(lin.under(None))]),
        tls.check(lin, scope),
        tls.explore(tiny, KEYS, [scope], rules="lookup"),
    ]
    for answer in shown:
        assert "under lookup rules" in repr(answer), repr(answer)
        page = answer.to_html() if hasattr(answer, "to_html") else answer._repr_html_()
        assert "under lookup rules" in page
    assert tls.Paths.from_json(paths.to_json()).rules == "lookup"
    traced = shown[1].traced()
    assert "under lookup rules" in repr(traced)
    assert "under lookup rules" in traced.to_html()


# -- an independent statement of the rules ----------------------------------------------------------------------------


class PlainRules:
    """Hugging Face's own code with the rules written into it: other norms, activations and attention functions."""

    def __init__(self, model: nn.Module, lookup: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model = model
        for module in model.modules():
            kind = type(module).__name__
            if kind.endswith("RMSNorm"):
                shift = 1.0 if kind.startswith("Gemma") else 0.0
                module.forward = self._rms(module, shift)  # type: ignore[method-assign]
            elif isinstance(module, nn.LayerNorm):
                module.forward = self._layer(module)  # type: ignore[method-assign]
            elif "activation" in kind.lower() or kind in ("SiLU", "GELU", "GELUTanh"):
                module.forward = self._secant(module.forward)  # type: ignore[method-assign]
            elif hasattr(module, "gate_proj"):
                module.forward = self._gated(module)  # type: ignore[method-assign]
        source = __import__(type(model).__module__, fromlist=["x"])
        monkeypatch.setattr(source, "eager_attention_forward", self._attention(lookup))

    @staticmethod
    def _rms(module: Any, shift: float) -> Callable[[Tensor], Tensor]:
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        return lambda x: (shift + module.weight) * (x / (x.square().mean(-1, True) + eps).sqrt().detach())

    @staticmethod
    def _layer(module: Any) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            centred = x - x.mean(-1, True)
            return (
                module.weight * centred / (centred.square().mean(-1, True) + module.eps).sqrt().detach() + module.bias
            )

        return forward

    @staticmethod
    def _secant(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: x * (function(x) / x).detach()

    @staticmethod
    def _gated(module: Any) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            a, b = module.act_fn(module.gate_proj(x)), module.up_proj(x)
            return module.down_proj((a * b.detach() + a.detach() * b) / 2)

        return forward

    @staticmethod
    def _attention(lookup: bool) -> Callable[..., Any]:
        def half(product: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
            return (product(a, b.detach()) + product(a.detach(), b)) / 2 if lookup else product(a, b)

        def forward(
            module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: Any = None, **rest: Any
        ) -> Any:
            groups = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
            scale = q.shape[-1] ** -0.5 if scaling is None else scaling
            scores = half(lambda a, b: a @ b.transpose(2, 3), q, k) * scale
            if rest.get("softcap") is not None:
                scores = PlainRules._secant(lambda s: torch.tanh(s / rest["softcap"]) * rest["softcap"])(scores)
            causal = torch.full(scores.shape[-2:], -torch.inf, dtype=torch.float64).triu(1)
            pattern = torch.softmax(scores + causal, -1)
            out = half(torch.matmul, pattern if lookup else pattern.detach(), v)
            return out.transpose(1, 2).contiguous(), None

        return forward

    def gradient(self, tokens: list[int], cap: float | None) -> Tensor:
        x = self.model.get_input_embeddings()(torch.tensor([tokens])).detach().requires_grad_()  # type: ignore[operator]
        readouts: list[Tensor] = []
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        handle = head.register_forward_pre_hook(lambda module, args: readouts.append(args[0][0, -1]))
        self.model(inputs_embeds=x, use_cache=False)
        handle.remove()
        z = head(readouts[0])
        if cap is not None:
            z = self._secant(lambda s: torch.tanh(s / cap) * cap)(z)
        return torch.autograd.grad(z[TARGET] - z[OTHER], x)[0][0]


@pytest.mark.parametrize("names", ["linear", "lookup"])
@pytest.mark.parametrize("species", ["bridge llama", "bridge gpt2", "bridge gemma2", "bridge pythia"])
def test_a_patched_hugging_face_model(species: str, names: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with zoo.Float64():
        one = zoo.SPECIES[species]()
        lin = tls.linearize(one.model, PROMPT, rules=names)
        found = lin.vjp(lin.cotangent(lambda z: z[TARGET] - z[OTHER])[None])[0]
        plain = PlainRules(one.plain, names == "lookup", monkeypatch)
        expected = plain.gradient(PROMPT, getattr(one.plain.config, "final_logit_softcapping", None))
    assert_close(found, expected, rtol=1e-8, atol=1e-10)


# -- what no rule knows -----------------------------------------------------------------------------------------------


class Cube(torch.autograd.Function):
    """An operation of its own, which passes torch's functions by."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * 3 * ctx.saved_tensors[0] ** 2


class CubeModule(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Cube.apply(x)  # type: ignore[no-any-return]


def test_an_operation_without_a_rule_is_named() -> None:
    model = zoo.SPECIES["bridge llama"]().model
    model.blocks[1].mlp.original_component.act_fn = CubeModule()
    with pytest.raises(ValueError, match=r"do not cover this model.*'Cube', in .*1\.mlp.*act_fn \(CubeModule\)"):
        tls.linearize(model, PROMPT, rules="linear")
    assert tls.linearize(model, PROMPT).rules is None  # the model itself is fine
    assert not any("named_graph" in repr(hook) for module in model.modules() for hook in module._forward_hooks.values())


@pytest.mark.parametrize("kind", [*(["hooked"] if zoo.HookedTransformer else []), "bridge"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rule", "hook"), [("pattern_value", "hook_z"), ("query_key", "hook_attn_scores")])
def test_each_product_of_attention_has_a_rule_of_its_own(kind: Any, dtype: torch.dtype, rule: str, hook: str) -> None:
    """Also where what is done to the pattern on its way, another precision or a mask, makes a new tensor of it."""
    model = tls.load_tiny(kind, dtype=dtype)

    def half(value: Tensor, hook: Any) -> Tensor:
        return value.detach() + 0.5 * (value - value.detach()).nan_to_num()  # scores ahead are minus infinity

    found = tls.attribute(model, KEYS, tls.SemanticScope(" are"), rules=(rule,)).scores
    with model.hooks(fwd_hooks=[(f"blocks.{layer}.attn.{hook}", half) for layer in range(model.cfg.n_layers)]):
        expected = tls.attribute(model, KEYS, tls.SemanticScope(" are")).scores
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.03, "atol": 0.01}
    assert_close(found, expected, **close)


def test_parameters_of_a_users_hook_are_constants(tiny: Any) -> None:
    """A probe's or an autoencoder's, which may be trained: their products with the stream are not gated products."""
    width = tiny.cfg.d_model
    scale, identity, linear = nn.Parameter(torch.ones(width)), nn.Parameter(torch.eye(width)), nn.Linear(width, width)
    with torch.no_grad():
        linear.weight.copy_(identity)
        linear.bias.zero_()
    expected = tls.attribute(tiny, KEYS, tls.RelevanceScope(" are"), rules="linear")
    for act in (
        lambda value: value * scale,
        lambda value: scale * scale * value,
        lambda value: torch.addmm(linear.bias, value[0], identity)[None],
        lambda value: value @ identity,
        lambda value: torch.einsum("bpd, de -> bpe", value, identity),
        linear,
    ):
        with tiny.hooks(fwd_hooks=[("blocks.2.hook_resid_post", lambda value, hook, act=act: act(value))]):
            answer = tls.attribute(tiny, KEYS, tls.RelevanceScope(" are"), rules="linear")
        assert_close(answer.scores, expected.scores)
        assert answer.biases == pytest.approx(expected.biases, abs=1e-4)
    assert scale.requires_grad
    assert linear.weight.requires_grad


def test_a_hook_of_the_users_without_a_rule(tiny: Any) -> None:
    with (
        tiny.hooks(fwd_hooks=[("blocks.1.hook_resid_post", lambda value, hook: Cube.apply(value))]),
        pytest.raises(ValueError, match="no rule for 'Cube'"),
    ):
        tls.linearize(tiny, KEYS, rules="linear")


# -- use --------------------------------------------------------------------------------------------------------------


def test_a_difference_is_split_by_token(tiny: Any) -> None:
    answer = tls.attribute(tiny, KEYS, tls.RelevanceScope(" are", versus=" is"), rules="linear")
    assert answer.top(1)[0].token == " keys"
    assert float(answer.scores.sum()) + answer.biases == pytest.approx(answer.value, rel=1e-5)
    other = tls.attribute(tiny, KEYS, tls.RelevanceScope(" is", versus=" are"), rules="linear")
    assert_close(other.scores, -answer.scores)
    words = answer.by("word")
    assert float(words.scores.sum()) == pytest.approx(float(answer.scores.sum()), rel=1e-5)
    read = tls.Attribution.from_json(answer.to_json())
    assert (read.rules, read.biases) == ("linear", answer.biases)
    assert "under linear rules" in repr(answer)
    assert "linear" in answer.to_html()


def test_what_does_not_add_up_has_a_gap(tiny: Any) -> None:
    for scope, names in (
        (tls.RelevanceScope(" are", versus=" is"), None),
        (tls.RelevanceScope(" are", versus=" is"), "lookup"),
        (tls.RelevanceScope(" are", quantity="log_prob"), "linear"),
        (tls.RelevanceScope({" are", " is"}), "linear"),
        (tls.RelevanceScope(" are old"), "linear"),
    ):
        answer = tls.attribute(tiny, KEYS, scope, rules=names, score_answer=False)
        assert "biases" not in answer.details
        assert float(answer.scores.sum()) + answer.gap == pytest.approx(answer.value, rel=1e-5)


def test_a_baseline_of_the_prompt(tiny: Any) -> None:
    """g · (x − the mean of the other tokens), which is nothing for tokens that are all alike."""
    scope = tls.RelevanceScope(" are", versus=" is", baseline="prompt")
    lin = tls.linearize(tiny, KEYS, rules="linear")
    answer = scope(lin)
    g = lin.vjp(lin.cotangent(tls.RelevanceScope(" are", versus=" is").function(lin))[None])[0]
    x = lin.embeddings
    others = torch.stack([torch.cat([x[:t], x[t + 1 :]]).mean(0) for t in range(len(x))])
    assert_close(answer.scores, (g * (x - others)).sum(-1), rtol=1e-4, atol=1e-4)
    assert "gap" in answer.details
    alike = tls.attribute(tiny, [5, 5, 5, 5], tls.RelevanceScope(" are", versus=" is", baseline="prompt"))
    assert_close(alike.scores, torch.zeros(4), rtol=0, atol=1e-5)
    assert tls.attribute(tiny, [5], tls.RelevanceScope(" are", baseline="prompt")).scores.isfinite().all()


def test_the_baseline_leaves_out_an_answer_without_scores(tiny: Any) -> None:
    """Of two answers, of different length, nothing that is said is among the prompt's other tokens."""
    scope = tls.RelevanceScope(" are old", versus=" is", baseline="prompt")
    lin = scope.with_answer(tls.linearize(tiny, KEYS))
    n, answer = lin.scored, scope(lin)
    g = lin.vjp(lin.cotangent(scope.function(lin))[None])[0, :n]
    x = lin.embeddings[:n]
    others = torch.stack([torch.cat([x[:t], x[t + 1 :]]).mean(0) for t in range(n)])
    assert_close(answer.scores, (g * (x - others)).sum(-1), rtol=1e-4, atol=1e-4)
    assert float(answer.scores.sum()) + answer.gap == pytest.approx(answer.value, rel=1e-5)


def test_another_baseline(no_type_checks: None) -> None:
    with pytest.raises(ValueError, match='baseline is "zero" or "prompt".* got \'mean\''):
        tls.RelevanceScope(baseline="mean")  # type: ignore[arg-type]


def test_a_scope_under_rules(tiny: Any) -> None:
    lin = tls.linearize(tiny, KEYS)
    scope = tls.SemanticScope(" are", versus=" is")
    found = tls.UnderRulesScope(scope)(lin)
    assert torch.equal(found.scores, scope(tls.linearize(tiny, KEYS, rules="linear")).scores)
    assert found.unit == scope.unit(lin)
    assert tls.UnderRulesScope(scope, ("patterns", "norms")).rules == ("norms", "patterns")
    assert (found.rules, found.question) == ("linear", found.scope)
    assert found.scope == f"UnderRulesScope(scope={scope!r}, rules='linear')"
    assert tls.Attribution.from_json(found.to_json()).rules == "linear"


@pytest.mark.parametrize("around", [lambda scope: scope, tls.PositionCorrectedScope, tls.FrozenAttentionScope])
def test_an_answer_says_the_rules_that_made_it(tiny: Any, around: Any) -> None:
    """Whether they are the scope's, or those of a scope within, or given beside it; two that differ are refused."""
    scope = around(tls.UnderRulesScope(tls.SemanticScope(" are"), "linear"))
    plain = tls.attribute(tiny, KEYS, scope)
    same = tls.attribute(tiny, KEYS, scope, rules="linear")
    assert plain.rules == same.rules == "linear"
    assert torch.equal(plain.scores, same.scores)
    with pytest.raises(
        ValueError, match=r"rules='linear'\) asks under linear rules, and lookup rules are given as well"
    ):
        tls.attribute(tiny, KEYS, scope, rules="lookup")
    twice = tls.UnderRulesScope(scope, "lookup")
    with pytest.raises(ValueError, match="asks under linear rules, and lookup rules are given as well: leave one of"):
        tls.attribute(tiny, KEYS, twice)


@pytest.mark.parametrize("rules", ["linear", None])
def test_pictures_say_what_the_parts_sum_to(tiny: Any, rules: str | None) -> None:
    answer = tls.attribute(tiny, KEYS, tls.RelevanceScope(" are", versus=" is"), rules=rules)
    total, first, value, shorter = (
        float(answer.scores.sum()),
        float(answer.scores[0]),
        answer.value,
        answer.without([0]),
    )
    assert value is not None
    if rules:
        told = f"sum: tokens {total:.2f} + biases {abs(answer.biases):.2f} = {value:.2f}"
        rest = f"sum: tokens {total - first:.2f} + tokens set aside {first:.2f} + biases 0.00 = {value:.2f}"
    else:
        gap = f"gap {answer.gap:.2f} = {value:.2f}; the gap has no meaning of its own"
        told = f"sum: tokens {total:.2f} + {gap}"
        rest = f"sum: tokens {total - first:.2f} + tokens set aside {first:.2f} + {gap}"
    assert told in answer.to_html()
    assert rest in shorter.to_html()
    name = "biases" if rules else "gap"
    note = f"tokens are set aside, so that the scores and the {name} no longer add up to the value"
    assert note not in answer.notes
    assert shorter.without([1]).notes == (*answer.notes, note)
    assert "sum:" not in tls.attribute(tiny, KEYS, tls.SemanticScope(" are", versus=" is")).to_html()


def test_biases_of_another_hook_are_also_what_goes_around_it(tiny: Any) -> None:
    scope = tls.RelevanceScope(" are", versus=" is")
    whole = tls.attribute(tiny, KEYS, scope, rules="linear")
    heads = tls.attribute(tiny, KEYS, scope, rules="linear", wrt="blocks.1.attn.hook_z")
    assert "goes around" not in whole.to_html()
    assert f" + biases and what goes around the hook {heads.biases:.2f} = {heads.value:.2f}" in heads.to_html()


@pytest.mark.parametrize("rules", ["linear", None])
def test_the_sum_names_the_parts_that_are_not_counted(tiny: Any, rules: str | None) -> None:
    prompt = tls.attribute(tiny, KEYS, tls.RelevanceScope(" are", versus=" is"), rules=rules)
    count = len(prompt.scores)
    answer = replace(prompt, parts=("template", *["user"] * (count - 2), "template"))
    user, template = float(answer.scores[1:-1].sum()), float(answer.scores[0] + answer.scores[-1])
    assert f"sum: tokens {user:.2f} + template {template:.2f} + " in answer.to_html()
    assert f"sum: tokens {user + template:.2f} + " in answer.with_template().to_html()
    assert f"sum: tokens {user:.2f} + tokens set aside {template:.2f} + " in answer.part("user").to_html()


def test_why_an_answer_has_no_biases(tiny: Any) -> None:
    scope = tls.RelevanceScope(" are", versus=" is", baseline="prompt")
    answer = tls.attribute(tiny, KEYS, scope, rules="linear")
    for one in (answer, answer.without([0])):
        with pytest.raises(
            AttributeError,
            match=r"no biases, because its parts do not add up.*`gap` \(-?[\d.]+\) is what is left to `value` by the "
            "scores of all tokens, those set aside included",
        ):
            _ = one.biases


def test_checks_know_about_rules(tiny: Any) -> None:
    lin = tls.linearize(tiny, KEYS, rules="linear")
    checks = tls.check(lin, tls.SemanticScope(" are", versus=" is"))
    assert "not slopes of the model" in checks["linearity"].finding
    assert checks["leave-one-out"].verdict == "fine"
    with pytest.raises(ValueError, match=r"under linear rules .* ask lin.under\(None\)"):
        tls.linearity(lin, tls.SemanticScope())
    with pytest.raises(ValueError, match="HetaScope is about curvature"):
        tls.HetaScope()(lin)


def test_rules_act_in_their_own_thread(tiny: Any) -> None:
    """A pass of the user's in another thread has the model's own derivative."""
    found = []

    def run() -> None:
        with torch.enable_grad():
            logits = tiny(torch.tensor([[1, 2, 3]]), return_type="logits")
            found.append("Silu" in _names(logits.grad_fn))

    with rules("linear"):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert found == [True]


def _names(node: Any) -> str:
    names, waiting, seen = [], [node], {node}
    while waiting:
        one = waiting.pop()
        names.append(one.name())
        for earlier, _ in one.next_functions:
            if earlier is not None and earlier not in seen:
                seen.add(earlier)
                waiting.append(earlier)
    return " ".join(names)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("linaer", ValueError, "no rules called 'linaer': sets of rules are 'linear', 'lookup', single ones 'norms'"),
        (("norms", "gate"), ValueError, "no rules called 'gate'"),
        ((), ValueError, r"rules=\(\) are no rules: leave them out"),
        (5, TypeError, "rules are named by texts"),
        (("patterns", "query_key"), ValueError, "take one or the other"),
    ],
)
def test_bad_rules(tiny: Any, no_type_checks: None, given: Any, error: type[Exception], message: str) -> None:
    for ask in (
        lambda: tls.linearize(tiny, KEYS, rules=given),
        lambda: tls.attribute(tiny, KEYS, tls.SemanticScope(), rules=given),
        lambda: tls.attribution_map(tiny, KEYS, tls.SemanticScope(), rules=given),
        lambda: list(tls.attribute_many(tiny, [KEYS], tls.SemanticScope(), rules=given)),
        lambda: tls.UnderRulesScope(tls.SemanticScope(), given),
        lambda: tls.linearize(tiny, KEYS).under(given),
    ):
        with pytest.raises(error, match=message):
            ask()


def test_under_rules_needs_the_model_as_it_was(tiny: Any) -> None:
    lin = tls.linearize(tiny, KEYS)
    with (
        tiny.hooks(fwd_hooks=[("blocks.0.hook_resid_post", lambda value, hook: value)]),
        pytest.raises(ValueError, match="hooks at"),
    ):
        lin.under("linear")


def test_readme_models_in_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused attention kernel of Hugging Face has the rules of the written-out one."""
    config = transformers.LlamaConfig(vocab_size=zoo.VOCAB, **zoo._LLAMA)
    scores = []
    for kernel in ("eager", "sdpa"):
        config._attn_implementation = kernel
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).double().eval()
        zoo._randomise(model)
        x = model.get_input_embeddings()(torch.tensor([PROMPT])).detach().requires_grad_()
        for names in ("linear", "lookup"):
            with rules(names), zoo.Float64():
                logits = model(inputs_embeds=x, use_cache=False).logits[0, -1]
            scores.append(torch.autograd.grad(logits[TARGET] - logits[OTHER], x)[0])
    assert_close(scores[0], scores[2], **EXACT)
    assert_close(scores[1], scores[3], **EXACT)
