"""Every refusal says what is wrong, why, and what to do, and shows the offending value."""

import dataclasses
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

import tl_scopes as tls
from tests import zoo
from tests.zoo import CONTEXT, PROMPT, VOCAB
from tl_scopes import models
from tl_scopes.models import tokens
from tl_scopes.scopes.baselines import LeaveOneOut
from tl_scopes.tiny import FOLDER
from tl_scopes.tiny.tasks import examples

pytestmark = pytest.mark.usefixtures("no_type_checks")


@pytest.fixture
def model() -> Any:
    return zoo.specimen("bridge llama").model


@pytest.fixture
def lin(model: Any) -> tls.Linearization:
    return tls.linearize(model, PROMPT)


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ("", ValueError, "prompt is empty: give at least one character"),
        ("hello", ValueError, "no tokenizer: pass token ids instead"),
        ([], ValueError, "prompt is empty: give at least one token"),
        (torch.zeros(0, dtype=torch.long), ValueError, "prompt is empty"),
        (torch.zeros(2, 3, dtype=torch.long), ValueError, "one prompt, got a batch of 2"),
        ([[1, 2], [3]], ValueError, "one prompt, got a batch of 2"),
        (["one", "two"], ValueError, "one prompt, got a batch of 2"),
        ([1, 2.5], TypeError, "token ids must be integers, got 2.5"),
        (torch.tensor([1.0, 2.0]), TypeError, "token ids must be integers, got 1.0"),
        (torch.tensor([True, False]), TypeError, "token ids must be integers, got True"),
        ([2**70], ValueError, "token id 1180591620717411303424 is outside the vocabulary"),
        (torch.tensor(3), TypeError, "got Tensor"),
        ([1, VOCAB], ValueError, rf"token id {VOCAB} is outside the vocabulary of {VOCAB} \(ids 0 to {VOCAB - 1}\)"),
        ([-1], ValueError, "token id -1 is outside the vocabulary"),
        ([1] * (CONTEXT + 1), ValueError, f"has {CONTEXT + 1} tokens, the model's context is {CONTEXT}"),
        (17, TypeError, "got int"),
        (None, TypeError, "got NoneType"),
        (b"bytes", TypeError, "got bytes"),
    ],
)
def test_prompt(model: Any, prompt: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tls.linearize(model, prompt)


def test_prompts_of_every_form(model: Any) -> None:
    """Lists, tensors and arrays, and the one row that `model.to_tokens` returns, are the same prompt."""
    ids = torch.tensor(PROMPT)
    forms = [PROMPT, tuple(PROMPT), ids, ids[None], ids.int(), list(ids), ids.numpy(), list(ids.numpy())]
    readouts = [tls.linearize(model, form).readout for form in forms]
    assert all(torch.equal(readouts[0], other) for other in readouts)


@pytest.mark.parametrize("position", [8, -9, 100])
def test_position(model: Any, position: int) -> None:
    with pytest.raises(ValueError, match=f"position {position} is out of range: the prompt has 8 tokens"):
        tls.linearize(model, PROMPT, position)


@pytest.mark.parametrize("position", [1.0, None, "last", True, torch.tensor(1.0)])
def test_position_that_is_no_integer(model: Any, position: Any) -> None:
    with pytest.raises(TypeError, match="position must be an integer, got "):
        tls.linearize(model, PROMPT, position)


def test_positions_of_every_form(model: Any) -> None:
    assert [tls.linearize(model, PROMPT, p).position for p in (3, -5, np.int64(3), torch.tensor(3))] == [3] * 4  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ({"wrt": "blocks.1.hook_resid_pro"}, "no hook 'blocks.1.hook_resid_pro'. Did you mean 'blocks.1.hook_resid_pr"),
        ({"of": "xyzzy"}, "no hook 'xyzzy'. model.hook_dict lists them"),
        ({"of": "hook_pos_embed"}, "never fired|no .batch pos d. value|not depend"),
        ({"of": "blocks.0.attn.hook_result"}, "'blocks.0.attn.hook_result' never fired"),
        ({"wrt": "blocks.0.attn.hook_result"}, "'blocks.0.attn.hook_result' did not fire before 'ln_final'"),
        ({"wrt": "blocks.1.hook_resid_pre", "of": "blocks.0.hook_resid_pre"}, "did not fire before 'blocks.0.hook_re"),
        (
            {"of": "blocks.0.attn.hook_pattern"},
            r"at the hook 'blocks.0.attn.hook_pattern' is neither \[batch pos d\] nor",
        ),
        (
            {"wrt": "blocks.0.attn.hook_pattern"},
            r"neither \[batch pos d\] nor \[batch pos head d_head\] but \(1, 4, 8, 8\)",
        ),
    ],
)
def test_hooks(model: Any, ends: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tls.linearize(model, PROMPT, **ends)


def test_hook_names(model: Any) -> None:
    with pytest.raises(TypeError, match="a hook is named by a str, got None"):
        tls.linearize(model, PROMPT, wrt=None)  # type: ignore[arg-type]


def test_resid_mid_of_a_bridge(model: Any) -> None:
    """There it is an alias of the MLP's branch: the skip connection would be missing from J."""
    message = "only the branch into the MLP.*take 'blocks.1.hook_attn_out'"
    with pytest.raises(ValueError, match=message):
        tls.linearize(model, PROMPT, wrt="blocks.1.hook_resid_mid")


def test_no_dependence_but_a_gradient(model: Any) -> None:
    """The replacement may be trainable: still nothing of the prompt is in it."""
    weight = torch.ones(16, dtype=torch.float64, requires_grad=True)
    constant = [("blocks.1.hook_resid_pre", lambda value, hook: torch.ones_like(value) * weight)]
    with model.hooks(fwd_hooks=constant), pytest.raises(ValueError, match="does not depend on 'hook_embed'"):
        tls.SemanticScope(target=3)(tls.linearize(model, PROMPT))


def test_no_dependence(model: Any) -> None:
    """A hook of the user's that replaces everything on the way leaves nothing to explain."""
    constant = [("blocks.1.hook_resid_pre", lambda value, hook: torch.ones_like(value))]
    with model.hooks(fwd_hooks=constant), pytest.raises(ValueError, match="does not depend on 'hook_embed'"):
        tls.linearize(model, PROMPT)


@pytest.mark.parametrize(
    "scope",
    [tls.SemanticScope(target=3), tls.TemperatureScope(), tls.TemperatureScope(norm="logits"), tls.FisherScope()],
)
def test_scopes_need_the_readout(model: Any, scope: tls.Scope) -> None:
    middle = tls.linearize(model, PROMPT, of="blocks.1.hook_resid_pre")
    with pytest.raises(ValueError, match="needs the logits, and the linearisation ends at 'blocks.1.hook_resid_pre'"):
        scope(middle)


@pytest.mark.parametrize("verb", ["logits", "log_probs", "logits_vjp", "logits_jvp", "cotangent"])
def test_verbs_need_the_readout(model: Any, verb: str) -> None:
    middle = tls.linearize(model, PROMPT, of="blocks.1.hook_resid_pre")
    with pytest.raises(ValueError, match="needs the logits"):
        getattr(middle, verb) if verb.startswith("log") and verb.endswith("s") else getattr(middle, verb)(
            (lambda z: z.sum()) if verb == "cotangent" else torch.ones(1, 16)
        )


@pytest.mark.parametrize(
    ("verb", "value", "message"),
    [
        ("vjp", torch.ones(16), r"cotangents must have the shape \[probe d_of\] = \[any number, 16\], got \[16\]"),
        ("vjp", torch.ones(2, 5), r"got \[2, 5\]"),
        ("squared_norms", torch.ones(2, 5), r"cotangents must .* got \[2, 5\]"),
        ("jvp", torch.ones(8, 16), r"tangents must have the shape \[probe token d_model\] = \[any number, 8, 16\]"),
        ("at", torch.ones(7, 16), r"embeddings must have the shape \[token d_model\] = \[8, 16\], got \[7, 16\]"),
        ("at", torch.full((8, 16), torch.nan), "NaN or infinite activations at 'hook_embed'"),
        ("logits_vjp", torch.ones(2, 5), r"cotangents must have the shape \[probe vocab\] = .* got \[2, 5\]"),
        ("logits_jvp", torch.ones(2, 5), r"tangents must have the shape \[probe d_of\] = .* got \[2, 5\]"),
        ("cotangent", lambda z: z, "must give one finite number"),
        ("cotangent", lambda z: z.sum() / 0, "must give one finite number"),
        ("cotangent", lambda z: 3.0, "must give one finite number, a real tensor, got 3.0"),
        (
            "cotangent",
            lambda z: torch.tensor(3.0),
            r"gave tensor\(3.\), which cannot be differentiated with respect to",
        ),
        ("cotangent", lambda z: z.detach().max(), "which cannot be differentiated .* without detach, argmax or item"),
        ("cotangent", lambda z: z.argmax(), "which cannot be differentiated with respect to them"),
        (
            "cotangent",
            lambda z: torch.ones(1, requires_grad=True).sum(),
            "cannot be differentiated with respect to them",
        ),
        (
            "vjp",
            torch.ones(1, 16).to_sparse(),
            "cotangents must be a dense tensor, got one of the layout torch.sparse_c",
        ),
        ("vjp", torch.ones(1, 16, device="meta"), "cotangents must have values, got a tensor on the meta device"),
    ],
)
def test_verbs(lin: tls.Linearization, verb: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(lin, verb)(value)


def test_verbs_take_tensors(lin: tls.Linearization) -> None:
    with pytest.raises(TypeError, match=r"cotangents must be a tensor of the shape \[probe d_of\], got list"):
        lin.vjp([[1.0] * 16])  # type: ignore[arg-type]


def test_double_backward_refused(lin: tls.Linearization, monkeypatch: pytest.MonkeyPatch) -> None:
    def grad(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("derivative for aten::_scaled_dot_product_flash_attention_backward is not implemented")

    monkeypatch.setattr(torch.autograd, "grad", grad)
    with pytest.raises(RuntimeError, match='cannot be differentiated twice .* attn_implementation="eager"'):
        lin.jvp(lin.embeddings[None])


def test_nan_activations(model: Any) -> None:
    spoil = [("blocks.1.hook_resid_pre", lambda value, hook: value * torch.inf)]
    with model.hooks(fwd_hooks=spoil), pytest.raises(ValueError, match="NaN or infinite activations at 'ln_final'"):
        tls.linearize(model, PROMPT)


# -- targets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (VOCAB, ValueError, f"target {VOCAB} is outside the vocabulary of {VOCAB}"),
        (-1, ValueError, "target -1 is outside the vocabulary"),
        (" are", ValueError, "no tokenizer for its output: pass the target ' are' as a token id"),
        (1.5, TypeError, "as text or as id, got 1.5"),
        (True, TypeError, "as text or as id, got True"),
        ({None, 3}, TypeError, "a member of the target is a token as text or as id, got None"),
        ({(" a", " b"), 3}, TypeError, r"a member of the target is a token as text or as id, got \(' a', ' b'\)"),
        ("", ValueError, "the target is empty: give at least one character"),
        ({"", 3}, ValueError, "the member of the target is empty: give at least one character"),
    ],
)
@pytest.mark.usefixtures("no_type_checks")
def test_target(lin: tls.Linearization, target: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tls.SemanticScope(target=target)(lin)


def test_target_of_several_tokens(tiny: Any) -> None:
    """Where one token is asked for, the tokens are named, and what to pass; elsewhere a missing space is noted."""
    with pytest.raises(
        ValueError, match=r"' unheard' is \d+ tokens: ' u.*id \d+.*Pass the id of one of them, say the first"
    ):
        tls.attribute(tiny, "The keys", tls.HetaScope(target=" unheard"))
    with pytest.raises(ValueError, match="With a leading space it is one token: ' gardener'"):
        tls.attribute(tiny, "The keys", tls.HetaScope(target="gardener"))
    with pytest.warns(
        UserWarning, match=r"' gardener' \(p = .*\) is far likelier here than 'gardener' \(first token 'g' of 3"
    ):
        tls.attribute(tiny, "The keys", tls.SemanticScope(target="gardener"))
    answer = tls.attribute(tiny, "The keys\n", tls.SemanticScope(target="gardener"))
    assert "the target 'gardener' is explained as 3 tokens. With a leading space it is one token: ' gardener'" in (
        " ".join(answer.notes)
    )


@pytest.mark.parametrize("encoded", [[], [None]])
def test_target_unknown_to_the_tokenizer(tiny: Any, encoded: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny.tokenizer, "encode", lambda *_, **__: [tiny.tokenizer.unk_token_id for _ in encoded])
    with pytest.raises(ValueError, match="target '☃' is unknown to the tokenizer: pass the token id"):
        tls.attribute(tiny, "The keys", tls.SemanticScope(target="☃"))


@pytest.mark.parametrize("target", [" zork", {" zork", " is"}, " zork is"])
def test_a_token_that_the_tokenizer_alone_has(target: Any) -> None:
    """One that was added to it, and not to the model."""
    model = tls.load_tiny()
    size = len(model.tokenizer)
    model.tokenizer.add_tokens([" zork"])
    message = rf"has the token ' zork' \(id {size}\), which the model lacks: its vocabulary of {size} has the ids 0 to"
    with pytest.raises(ValueError, match=message):
        tls.attribute(model, "The keys", tls.SemanticScope(target))


def test_options(lin: tls.Linearization) -> None:
    with pytest.raises(ValueError, match="target and versus are the same token, '<3>'"):
        tls.SemanticScope(target=3, versus=3)(lin)
    with pytest.raises(ValueError, match="quantity is .* got 'probability'"):
        tls.SemanticScope(quantity="probability")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="norm is .* got 'entropy'"):
        tls.TemperatureScope(norm="entropy")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("versus", "error", "message"),
    [
        (VOCAB, ValueError, f"versus {VOCAB} is outside the vocabulary of {VOCAB}"),
        (1.5, TypeError, "a versus is a token as text or as id, got 1.5"),
        (" are", ValueError, "pass the versus ' are' as a token id"),
    ],
)
def test_versus(lin: tls.Linearization, versus: Any, error: type[Exception], message: str) -> None:
    """It is not called a target."""
    with pytest.raises(error, match=message):
        tls.SemanticScope(3, versus=versus)(lin)


@pytest.mark.parametrize("scope", [tls.SemanticScope(), tls.FisherScope(), tls.PathIntegratedScope()], ids=repr)
def test_scopes_are_asked_of_linearisations(model: Any, scope: Any) -> None:
    for thing in (model, "The keys", None):
        message = rf"a scope is asked of a Linearization, got {type(thing).__name__}: write attribute\(model"
        with pytest.raises(TypeError, match=message):
            scope(thing)


@pytest.mark.parametrize("scope", [tls.FisherScope, "fisher", None])
def test_no_scope(model: Any, scope: Any) -> None:
    hint = r": write FisherScope\(\)" if scope is tls.FisherScope else ""
    with pytest.raises(TypeError, match=rf"expected a scope such as SemanticScope\(\), got .*{hint}\."):
        tls.attribute(model, PROMPT, scope)


# -- models -----------------------------------------------------------------------------------------------------------


def test_not_a_model() -> None:
    for thing in ("gpt2", torch.nn.Linear(2, 2), zoo.specimen("bridge llama").plain):
        with pytest.raises(TypeError, match=f"got {type(thing).__name__}. Load one with TransformerBridge"):
            tls.linearize(thing, PROMPT)


def test_training_mode() -> None:
    model = zoo.SPECIES["bridge gpt2"]().model
    lin = tls.linearize(model, PROMPT)
    message = r"training mode, or a part of it, where dropout makes scores random: call model.eval\(\)"
    for part in (model, model.original_model, model.blocks[0]):
        part.train()
        with pytest.raises(ValueError, match=message):
            tls.linearize(model, PROMPT)
        with pytest.raises(ValueError, match=message):
            lin.at(lin.embeddings)
        model.eval()
        model.original_model.eval()
    lin.at(lin.embeddings)


def test_inference_mode(model: Any) -> None:
    with (
        torch.inference_mode(),
        pytest.raises(RuntimeError, match=r"under torch.inference_mode.*torch.no_grad is fine"),
    ):
        tls.linearize(model, PROMPT)
    with torch.inference_mode():
        born = zoo.SPECIES["bridge gpt2"]().model
    with pytest.raises(RuntimeError, match="created in it"):
        tls.linearize(born, PROMPT)


def test_compiled(model: Any) -> None:
    with pytest.raises(TypeError, match="compiled.*as it was before torch.compile"):
        tls.linearize(torch.compile(model), PROMPT)
    other = zoo.SPECIES["bridge gpt2"]().model
    other.compile()
    with pytest.raises(TypeError, match="compiled"):
        tls.linearize(other, PROMPT)


COMPILED: list[Callable[[Any], object]] = [
    lambda model: model.blocks[0].compile(),
    lambda model: model.blocks.__setitem__(0, torch.compile(model.blocks[0])),
    lambda model: model.blocks[1].mlp.compile(),
    lambda model: setattr(model.blocks[0], "forward", torch.compile(model.blocks[0].forward)),
    lambda model: setattr(model, "forward", torch.compile(model.forward)),
    lambda model: model.original_model.compile(),
    lambda model: model.original_model.model.layers[0].mlp.compile(),
    lambda model: setattr(model.original_model, "forward", torch.compile(model.original_model.forward)),
]


@pytest.mark.parametrize("change", COMPILED)
def test_compiled_in_parts(change: Callable[[Any], object]) -> None:
    """A block, a part of one, or a method alone, on the bridge or on the model that it wraps."""
    model = zoo.SPECIES["bridge llama"]().model
    change(model)
    with pytest.raises(TypeError, match=r"compiled.*(leave out torch.compile|as it was before torch.compile)"):
        tls.linearize(model, PROMPT)


def _bert() -> Any:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    return zoo.build_bridge_from_module(BertForMaskedLM(config).eval(), "BertForMaskedLM", hf_config=config)


def _t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=VOCAB, d_model=16, d_kv=8, num_layers=1, num_heads=2, d_ff=24)
    model = T5ForConditionalGeneration(config).eval()
    return zoo.build_bridge_from_module(model, "T5ForConditionalGeneration", hf_config=config)


def _hooked_encoder() -> Any:
    from transformer_lens import HookedEncoder

    config = {"n_layers": 1, "d_model": 16, "d_head": 8, "n_heads": 2, "d_mlp": 24, "d_vocab": VOCAB, "n_ctx": CONTEXT}
    return HookedEncoder(config | {"act_fn": "gelu"}).eval()


def _images() -> Any:
    model = zoo.SPECIES["bridge llama"]().model
    model.cfg.d_vocab = -1
    return model


@pytest.mark.parametrize("make", [_bert, _t5, _images, *([_hooked_encoder] if zoo.HookedTransformer else [])])
def test_encoders(make: Any) -> None:
    with pytest.raises(TypeError, match="is not a causal language model: scopes explain a next-token prediction"):
        tls.linearize(make(), PROMPT)


@pytest.mark.parametrize("kind", ["bridge", *(["hooked"] if zoo.HookedTransformer else [])])
def test_temperature_of_a_folded_norm(kind: str) -> None:
    """Identically zero up to rounding: refused, with two remedies, of which the second works."""
    folder = zoo.GOLDEN
    model = zoo.llama(folder, kind)
    if kind == "bridge":
        model.enable_compatibility_mode()
    else:
        model.process_weights_(fold_ln=True, center_unembed=True)
    lin = tls.linearize(model, PROMPT)
    with pytest.raises(ValueError, match=r'norm constant|constant .* unprocessed .* TemperatureScope\(norm="logits"\)'):
        tls.TemperatureScope()(lin)
    with_gain = tls.linearize(zoo.llama(folder, kind), PROMPT)
    folded, free = tls.TemperatureScope(norm="logits")(lin), tls.TemperatureScope(norm="logits")(with_gain)
    torch.testing.assert_close(folded.scores, free.scores, rtol=1e-4, atol=1e-6)
    # The refused scores would have been noise: see that they are.
    assert lin.squared_norms(lin.readout[None] / lin.readout.norm()).sqrt().max() < 1e-4 * folded.scores.max()


def test_hooked_on_transformer_lens_4() -> None:
    if zoo.HookedTransformer is None:
        with pytest.raises(ImportError, match="no HookedTransformer: take the TransformerBridge"):
            tls.load_tiny("hooked")
    with pytest.raises(ValueError, match='kind is "bridge" or "hooked", got \'hf\''):
        tls.load_tiny("hf")  # type: ignore[arg-type]


# -- answers ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def answer(lin: tls.Linearization) -> tls.Attribution:
    return tls.SemanticScope(target=3)(lin)


def test_answers(answer: tls.Attribution) -> None:
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        answer.top(0)
    with pytest.raises(ValueError, match="no token at position 8: the answer has positions 0 to 7"):
        answer.without([0, 8])
    with pytest.raises(ValueError, match="no token would be left"):
        answer.without(range(8))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "broken JSON"),
        ("[]", "is not an Attribution"),
        ('{"format": "other"}', "is not an Attribution"),
        ('{"format": "tl_scopes.Attribution", "version": 3}', "written by a later version"),
        ('{"format": "tl_scopes.Attribution", "version": 2, "colour": 3}', "tokens: Field required"),
        (
            '{"format": "tl_scopes.Attribution", "version": true}',
            "has the version True, and versions are numbers from 1 on",
        ),
        ("[" * 100_000, "nested too deeply|maximum recursion"),
        (
            "my answers/x.json",
            r"is not an Attribution but looks like the .* Attribution.from_json\(Path\('my answers/x",
        ),
    ],
)
def test_json(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tls.Attribution.from_json(text)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"target": "ab"}, "target: Input should be a valid dict.*, got 'ab'|target: Input should be an object"),
        ({"target": {"tokens": [[-1, "a"]], "any_of": False}}, r"target.tokens.0.0: Input .* equal to 0, got -1"),
        ({"target": {"tokens": [], "any_of": False}}, "target.tokens: List should have at least 1 item"),
        ({"value": "many"}, "value.*'many'"),
        ({"parts": ["user"]}, "parts must be one for each of the 8 tokens, got 1"),
        ({"tokens": [1.5] * 8}, "tokens.0: Input should be a valid integer, got 1.5"),
        ({"tokens": [True] * 8}, "tokens.0: Input should be a valid integer, got True"),
        ({"str_tokens": "abcdefgh"}, "str_tokens: Input should be a valid array, got 'abcdefgh'"),
        ({"positions": [0, 1, 2, 3, 4, 5, 6, 6]}, r"positions must increase, got \[0, 1, 2, 3, 4, 5, 6, 6\]"),
        ({"positions": ["<img src=x onerror=hacked()>", 1, 2, 3, 4, 5, 6, 7]}, "positions.0: .*integer, got '<img"),
        ({"position": 3}, "the prediction was read at position 3, before 7"),
        ({"unit": None}, "unit: Input should be a valid string, got None"),
        ({"predictions": [[["7", "a"], 0.5]]}, "predictions.0.0.0: Input should be a valid integer, got '7'"),
        ({"predictions": [[[7, "a"], 1.5]]}, "predictions.0.1: Input should be less than or equal to 1, got 1.5"),
        ({"scores": {"dtype": "float32", "values": [[1.0]] * 8}}, "scores.values.0: Input should be a valid number"),
        ({"details": {"x": {"dtype": "float32", "values": [[1], [1, 2]]}}}, "the detail 'x' does not hold numbers"),
        ({"details": {"x": {"dtype": "object", "values": [1]}}}, "the detail 'x' .* dtype: Input should be"),
        ({"details": {"x": {"a": 1}}}, "the detail 'x' of this Attribution is not .*Field required"),
        ({"colour": 3}, "colour: Extra inputs are not permitted, got 3"),
    ],
)
def test_json_names_the_field_and_its_value(answer: tls.Attribution, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tls.Attribution.from_json(json.dumps(json.loads(answer.to_json()) | wrong))


def test_json_of_version_1(answer: tls.Attribution) -> None:
    """What 0.1 wrote: targets are pairs, and nothing says what is explained."""
    record = json.loads(answer.to_json())
    for name in ("value", "quantity", "parts", "uncounted", "grouping"):
        del record[name]
    record |= {"version": 1, "target": [7, " a"], "versus": [8, " b"]}
    again = tls.Attribution.from_json(json.dumps(record))
    assert (again.target.id, again.versus.text, again.value) == (7, " b", None)
    assert torch.equal(again.scores, answer.scores)
    infinite = replace(answer, value=float("-inf"))
    assert tls.Attribution.from_json(infinite.to_json()).value == float("-inf")


def test_json_is_text(answer: tls.Attribution, no_type_checks: None) -> None:
    with pytest.raises(TypeError, match="read from the text that to_json wrote, got bytes"):
        tls.Attribution.from_json(answer.to_json().encode())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the detail 'x' cannot be written as JSON: it is a set"):
        replace(answer, details={"x": {1}}).to_json()


@pytest.mark.parametrize(
    "wrong",
    [
        {"scores": {"dtype": "int3", "values": [1]}},
        {"target": 5},
        {"positions": None},
        {"scores": "x"},
        {"predictions": [1]},
        {"details": [1]},
    ],
)
def test_json_of_wrong_fields(answer: tls.Attribution, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="a field of this Attribution is not what it should be"):
        tls.Attribution.from_json(json.dumps(json.loads(answer.to_json()) | wrong))


@pytest.mark.parametrize("scores", [torch.ones(8, 2), torch.ones(7), [1.0] * 8])
def test_scopes_must_score_every_token(lin: tls.Linearization, monkeypatch: pytest.MonkeyPatch, scores: Any) -> None:
    monkeypatch.setattr(tls.FisherScope, "measure_many", lambda self, lins: [tls.Measurement(scores)])
    with pytest.raises(
        ValueError, match=r"FisherScope\(\) must give one score per token, a tensor of shape \[8\], got"
    ):
        tls.FisherScope()(lin)


def test_json_of_unequal_lengths(answer: tls.Attribution) -> None:
    record = json.loads(answer.to_json())
    with pytest.raises(ValueError, match="differ in length: 8, 8, 7, 8"):
        tls.Attribution.from_json(json.dumps(record | {"str_tokens": record["str_tokens"][1:]}))


def test_non_finite_scores(lin: tls.Linearization, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.full((8,), torch.nan)
    monkeypatch.setattr(tls.FisherScope, "measure_many", lambda self, lins: [tls.Measurement(scores)])
    with pytest.raises(
        ValueError, match=r"NaN or infinite scores from FisherScope\(\): the model, in float64, overflo"
    ):
        tls.FisherScope()(lin)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_overflows_is_told_of_wider_numbers(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a float16 model is sent to bfloat16 and float32: the others have their range already."""
    model = zoo.llama(zoo.GOLDEN, "bridge", dtype)
    remedy = "oad .* in float32 or bfloat16, which hold larger numbers than float16"
    spoil = [("blocks.1.hook_resid_pre", lambda value, hook: value * torch.inf)]
    with model.hooks(fwd_hooks=spoil), pytest.raises(ValueError, match=f"at 'ln_final', in {dtype}: check th") as met:
        tls.linearize(model, PROMPT)
    lin, scores = tls.linearize(model, PROMPT), torch.full((8,), torch.inf)
    monkeypatch.setattr(tls.FisherScope, "measure_many", lambda self, lins: [tls.Measurement(scores)])
    with pytest.raises(ValueError, match="overflows on the way back.* Check its weights and your hooks") as answered:
        tls.FisherScope()(lin)
    for error in (met, answered):
        assert bool(re.search(remedy, str(error.value))) == (dtype == torch.float16)


# -- tasks ------------------------------------------------------------------------------------------------------------


def test_tasks() -> None:
    with pytest.raises(ValueError, match="no task 'poetry': choose one of agreement"):
        examples("poetry", 3)
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        examples("agreement", 0)


def test_byte_tokens() -> None:
    """The printable alphabet of byte-level BPE covers all bytes, each once."""
    assert sorted(tokens.byte_of_character().values()) == list(range(256))


# -- loading ----------------------------------------------------------------------------------------------------------


def test_load(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((FOLDER / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"not a model")
    with pytest.raises(
        ValueError, match=r"cannot load the model '.*': .*Check the spelling and the network, or give a"
    ):
        models.load(tmp_path)
    with pytest.raises(ValueError, match=r"there is no folder './nowhere': give one that save_pretrained wrote"):
        models.load("./nowhere")
    with pytest.raises(ValueError, match="cannot load the model 'nobody/nothing'"):
        models.load("nobody/nothing")
    with pytest.raises(ValueError, match=r"model.safetensors' is not a folder with a config.json"):
        models.load(tmp_path / "model.safetensors")


@pytest.mark.parametrize("device", ["abacus", "meta", "cuda:9"])
def test_load_on_no_device(device: str) -> None:
    with pytest.raises(ValueError, match=rf"the device '{device}' cannot be used here: .*\. Use device='cpu'"):
        tls.load_tiny(device=device)


# -- Fisher Scope -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probes": 0}, "probes is a number of backward passes, 1 at least, got 0"),
        ({"probes": -3}, "probes is a number of backward passes, 1 at least, got -3"),
        ({"rank": 0}, "rank is a number of backward passes, 1 at least, got 0"),
        ({"rtol": 0}, "rtol is a relative error between 0 and 1, got 0"),
        ({"rtol": -0.1}, r"rtol is a relative error between 0 and 1, got -0\.1"),
        ({"rtol": 1.5}, r"rtol is a relative error between 0 and 1, got 1\.5"),
        ({"rtol": float("nan")}, "rtol is a relative error between 0 and 1, got nan"),
        ({"probes": 8, "rank": 8}, "at most one of probes, rtol, exact and rank, got probes=8, rank=8"),
        ({"rtol": 0.1, "exact": True}, r"at most one of probes, rtol, exact and rank, got rtol=0\.1, exact=True"),
    ],
)
def test_fisher_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tls.FisherScope(**options)


@pytest.mark.parametrize("number", [10**400, torch.tensor(2.0), np.float32(-1.0)], ids=["long", "torch", "numpy"])
def test_numbers_that_do_not_fit(number: Any) -> None:
    with pytest.raises(
        ValueError, match="rtol is a relative error between 0 and 1, got (a number too large for a float|tensor|np|-1)"
    ):
        tls.FisherScope(rtol=number)


@pytest.mark.parametrize("value", [torch.tensor(True), np.True_, torch.ones(2), torch.ones(2, dtype=torch.bool), 1j])
def test_what_is_no_number(value: Any) -> None:
    with pytest.raises(TypeError, match="rtol is a relative error between 0 and 1, got "):
        tls.FisherScope(rtol=value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probes": 2.5}, r"probes is a number of backward passes, 1 at least, and an integer, got 2\.5"),
        ({"rank": True}, "rank is a number of backward passes, 1 at least, and an integer, got True"),
        ({"rtol": "0.1"}, "rtol is a relative error between 0 and 1, got '0.1'"),
        ({"rtol": True}, "rtol is a relative error between 0 and 1, got True"),
        ({"exact": "no"}, "exact is True or False, got 'no'"),
        ({"exact": 1}, "exact is True or False, got 1"),
        ({"exact": None}, "exact is True or False, got None"),
    ],
)
def test_fisher_options_of_another_type(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        tls.FisherScope(**options)


@pytest.mark.parametrize("flag", ["no", 0, None, "False"])
def test_flags(model: Any, flag: Any) -> None:
    """A text that means no would count as yes."""
    for ask in (tls.linearize, lambda *given, **options: tls.attribute(*given, tls.SemanticScope(3), **options)):
        with pytest.raises(TypeError, match=f"checkpoint is True or False, got {flag!r}"):
            ask(model, PROMPT, checkpoint=flag)
        if flag is not None:
            with pytest.raises(TypeError, match=f"prepend_bos is True or False, got {flag!r}"):
                ask(model, PROMPT, prepend_bos=flag)
            with pytest.raises(TypeError, match=f"prepend_bos is True or False, got {flag!r}"):
                tls.head_map(model, PROMPT, tls.SemanticScope(3), prepend_bos=flag)
    with pytest.raises(TypeError, match=f"checkpoint is True or False, got {flag!r}"):
        tls.attribution_map(model, PROMPT, tls.SemanticScope(3), checkpoint=flag)
    with pytest.raises(TypeError, match=f"thorough is True or False, got {flag!r}"):
        tls.check(tls.linearize(model, PROMPT), tls.SemanticScope(3), thorough=flag)
    assert tls.linearize(model, PROMPT, checkpoint=np.True_).trace.checkpointed  # type: ignore[arg-type]


@pytest.mark.parametrize("option", ["probes", "rank"])
def test_more_probes_than_dimensions(lin: tls.Linearization, option: str) -> None:
    with pytest.raises(
        ValueError, match=rf"{option}=17 is more than the 16 dimensions of .* FisherScope\(exact=True\)"
    ):
        tls.FisherScope(**{option: 17})(lin)


RANDOM: list[Any] = [tls.FisherScope, tls.SpectralScope, tls.HetaScope]


def test_generator_elsewhere(lin: tls.Linearization) -> None:
    class Elsewhere(torch.Generator):
        device = torch.device("cuda")

    message = r"the generator is on cuda, the model on cpu: take torch.Generator\('cpu'\)"
    for scope in RANDOM:
        with pytest.raises(ValueError, match=message):
            scope(generator=Elsewhere())(lin)


@pytest.mark.parametrize("generator", [0, 5, "cpu"])
def test_a_generator_that_is_none(lin: tls.Linearization, generator: Any) -> None:
    """A seed is the usual mistake."""
    hint = rf"torch.Generator\('cpu'\).manual_seed\({generator}\)\." if generator != "cpu" else r"\('cpu'\)\."
    message = rf"generator must be a torch.Generator or None, got {generator!r}: take .*{hint}"
    for scope in RANDOM:
        with pytest.raises(TypeError, match=message):
            scope(generator=generator)(lin)


@pytest.mark.parametrize("cotangents", [torch.ones(16), torch.ones(1, 5), [1.0] * 16])
def test_cotangents_of_a_scope(lin: tls.Linearization, monkeypatch: pytest.MonkeyPatch, cotangents: Any) -> None:
    monkeypatch.setattr(tls.SemanticScope, "cotangents", lambda self, lin: cotangents)
    message = (
        r"the cotangents of SemanticScope\(target=3\) must have the shape \[probe d_of\] = \[any number, 16\], got"
    )
    with pytest.raises(ValueError, match=message):
        tls.SemanticScope(3)(lin)


# -- many -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", ["one prompt", torch.tensor([1, 2]), 5])
def test_one_prompt_is_not_many(model: Any, prompts: Any) -> None:
    with pytest.raises(TypeError, match="prompts must be an iterable of prompts, got one .*: put it into a list"):
        tls.attribute_many(model, prompts, tls.SemanticScope(3))


@pytest.mark.parametrize(
    ("batch_size", "error", "message"),
    [
        (0, ValueError, "at least 1, got 0"),
        (-1, ValueError, "at least 1, got -1"),
        (2.0, TypeError, r"at least 1, and an integer, got 2\.0"),
        (True, TypeError, "at least 1, and an integer, got True"),
    ],
)
def test_batch_size(model: Any, batch_size: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"batch_size must be {message}"):
        tls.attribute_many(model, [[1]], tls.SemanticScope(3), batch_size=batch_size)


def test_on_error(model: Any) -> None:
    with pytest.raises(ValueError, match='on_error is "warn" or "raise", got \'ignore\''):
        tls.attribute_many(model, [[1]], tls.SemanticScope(3), on_error=cast(Any, "ignore"))


@pytest.mark.parametrize("ask", [tls.attribute_many, tls.attribution_map])
def test_no_scope_for_many(model: Any, ask: Any) -> None:
    with pytest.raises(TypeError, match=r"expected a scope such as SemanticScope\(\), got .*: write SemanticScope\(\)"):
        ask(model, [[1]], tls.SemanticScope)


@pytest.mark.parametrize("position", [8, -9])
def test_positions_of_a_map(model: Any, position: int) -> None:
    prompt_map = tls.attribution_map(model, PROMPT, tls.SemanticScope(3))
    with pytest.raises(
        IndexError, match=rf"there is no prediction at position {position}: the map has those from 0 to 7"
    ):
        prompt_map[position]
    message = "no prediction at position 0: the map has those from 1 to 7. .* prompt: map.answers.0. is the first"
    with pytest.raises(IndexError, match=message):
        prompt_map.without([0])[0]
    with pytest.raises(IndexError, match="no prediction at position 8:9: the map has those from 0"):
        prompt_map[8:9]
    for no_integer in (1.0, True, "first", None):
        with pytest.raises(TypeError, match=f"position must be an integer, got {no_integer!r}"):
            prompt_map[cast(Any, no_integer)]
    with pytest.raises(ValueError, match="there is no token at position 8"):
        prompt_map.without([8])
    with pytest.raises(ValueError, match="no token would be left"):
        prompt_map.without(range(8))


def test_an_empty_map() -> None:
    with pytest.raises(ValueError, match="a map needs at least one answer, got none"):
        tls.AttributionMap(())


def test_details_belong_to_tokens(lin: tls.Linearization) -> None:
    answer = tls.SemanticScope(3)(lin)
    message = r"the last axis of the detail 'profile' must be the 8 tokens, got the shape \[8, 2\]"
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(answer, details={"profile": torch.ones(8, 2)})
    with pytest.raises(AttributeError, match=r"an Attribution of SemanticScope\(target=3\) has no 'scroes'"):
        _ = answer.scroes


def test_details_do_not_hide(lin: tls.Linearization) -> None:
    """A detail of the name of a field or a method could not be reached."""
    answer = tls.SemanticScope(3)(lin)
    with pytest.raises(ValueError, match="details may not be called 'scores', 'top': an Attribution has fields or met"):
        dataclasses.replace(answer, details={"scores": torch.ones(8), "fine": 1, "top": 3})


@pytest.mark.parametrize(
    "detail", [{1, 2}, {"a": 1}, np.int64(3), [1, {2}], object(), np.ones(8)], ids=lambda detail: type(detail).__name__
)
def test_details_that_cannot_be_kept(lin: tls.Linearization, monkeypatch: pytest.MonkeyPatch, detail: Any) -> None:
    """They are refused when the question is asked, not when the answer is saved."""
    measured = tls.Measurement(torch.ones(8), {"fine": 1, "seen": detail})
    monkeypatch.setattr(tls.FisherScope, "measure_many", lambda self, lins: [measured])
    message = (
        rf"the detail 'seen' of FisherScope\(\) is a {type(detail).__name__}, which an answer cannot keep: make it a te"
    )
    with pytest.raises(TypeError, match=message):
        tls.FisherScope()(lin)


def test_details_that_can_be_kept(lin: tls.Linearization, monkeypatch: pytest.MonkeyPatch) -> None:
    details = {"a": None, "b": [1, (2.5, "c")], "d": torch.ones(3, 8), "e": np.float64(0.5), "f": True}
    monkeypatch.setattr(tls.FisherScope, "measure_many", lambda self, lins: [tls.Measurement(torch.ones(8), details)])
    assert tls.Attribution.from_json(tls.FisherScope()(lin).to_json()).e == 0.5


def test_measure_gives_a_measurement(lin: tls.Linearization, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls.FisherScope, "measure_many", lambda self, lins: [torch.ones(8)])
    message = r"measure of FisherScope\(\) must give a Measurement, got Tensor: write Measurement\(scores\)"
    with pytest.raises(TypeError, match=message):
        tls.FisherScope()(lin)


@pytest.mark.parametrize("target", [torch.tensor(3), np.int64(3), 3])
def test_targets_are_shown_as_numbers(lin: tls.Linearization, target: Any) -> None:
    assert tls.SemanticScope(target)(lin).scope == "SemanticScope(target=3)"


@pytest.mark.parametrize("target", [torch.tensor([3, 4]), np.array([3, 4]), [3, 4]])
def test_targets_of_several_ids_are_shown_as_numbers(lin: tls.Linearization, target: Any) -> None:
    assert tls.SemanticScope(target)(lin).scope == "SemanticScope(target=(3, 4))"
    left_out = LeaveOneOut(quantity="log_prob", target=target)
    torch.testing.assert_close(left_out(lin).scores, LeaveOneOut(quantity="log_prob", target=[3, 4])(lin).scores)


@pytest.mark.parametrize("target", [b" are", bytearray(b"ab"), {3: "a"}])
def test_bytes_and_mappings_are_no_lists_of_ids(lin: tls.Linearization, target: Any, no_type_checks: None) -> None:
    with pytest.raises(TypeError, match=r"a target is a token as text or as id, got"):
        tls.SemanticScope(target)(lin)


INTEGERS: list[Any] = [np.int64(4), np.uint8(4), torch.tensor(4)]
NO_INTEGERS: list[Any] = [True, np.True_, torch.tensor(True), 4.0, torch.tensor(4.0), "4"]


@pytest.mark.parametrize("four", INTEGERS, ids=repr)
def test_integers_of_every_type(model: Any, lin: tls.Linearization, four: Any) -> None:
    """Whatever counts may be NumPy's or torch's, and is shown as the number that it is."""
    for make in (
        lambda n: tls.FisherScope(probes=n),
        lambda n: tls.FisherScope(rank=n),
        lambda n: tls.SpectralScope(rank=n),
        lambda n: tls.HetaScope(3, probes=n),
        lambda n: tls.PathIntegratedScope(3, steps=n, start=0.9),
    ):
        answer, expected = make(four)(lin), make(4)(lin)
        assert answer.scope == expected.scope
        torch.testing.assert_close(answer.scores, expected.scores)
    path = tls.PathIntegratedScope(3, baseline=np.int64(4), steps=2, start=0.5)
    assert repr(path) == "PathIntegratedScope(target=3, steps=2, baseline=4, start=0.5)"
    assert len(answer.top(four)) == len(tls.SpectralScope().directions(lin, 2, four)) == 4
    assert len(list(tls.attribute_many(model, [PROMPT] * 5, tls.SemanticScope(3), batch_size=four))) == 5


@pytest.mark.parametrize("value", NO_INTEGERS, ids=repr)
def test_what_is_no_integer(model: Any, lin: tls.Linearization, value: Any) -> None:
    for option in ("probes", "rank"):
        with pytest.raises(TypeError, match=f"{option} is a number of backward passes, 1 at least, and an integer"):
            tls.FisherScope(**{option: value})
    with pytest.raises(TypeError, match="rank is a number of directions, 1 at least, and an integer, got "):
        tls.SpectralScope(rank=value)
    with pytest.raises(TypeError, match="probes is a number of random directions per token, 1 at least, and an "):
        tls.HetaScope(probes=value)
    with pytest.raises(TypeError, match="steps is a number of points on the line, 1 at least, and an integer, got "):
        tls.PathIntegratedScope(steps=value)
    with pytest.raises(TypeError, match="batch_size must be at least 1, and an integer, got "):
        tls.attribute_many(model, [PROMPT], tls.SemanticScope(3), batch_size=value)
    with pytest.raises(TypeError, match="count must be at least 1, and an integer, got "):
        tls.SpectralScope().directions(lin, 2, value)
    answer = tls.SemanticScope(3)(lin)
    with pytest.raises(TypeError, match="count must be at least 1, and an integer, got "):
        answer.top(value)
    with pytest.raises(TypeError, match="positions must be integers, got "):
        answer.without([value])
    for positions in (0, "0"):
        with pytest.raises(TypeError, match=r"positions must be integers, in a list such as \[0\], got '?0'?"):
            answer.without(positions)  # type: ignore[arg-type]
    if not isinstance(value, str):
        with pytest.raises(TypeError, match="a target is a token as text or as id, got "):
            tls.SemanticScope(value)(lin)


def test_positions_of_any_integer_type(model: Any, lin: tls.Linearization) -> None:
    answer, prompt_map = tls.SemanticScope(3)(lin), tls.attribution_map(model, PROMPT, tls.SemanticScope(3))
    for zero in (torch.tensor([0]), [np.int64(0)]):
        assert answer.without(zero).positions == prompt_map.without(zero)[-1].positions == tuple(range(1, 8))


def test_temperature_in_float16() -> None:
    """A readout longer than the largest number of float16."""
    model = zoo.llama(zoo.GOLDEN, "bridge", torch.float16)
    with torch.no_grad():
        model.original_model.model.norm.weight.mul_(2.0**14)
        model.original_model.lm_head.weight.mul_(2.0**-14)
    lin = tls.linearize(model, [1, 2, 3])
    assert lin.readout.norm().isinf()
    assert (tls.TemperatureScope()(lin).scores > 0).all()
