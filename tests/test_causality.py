"""A probe decides whether a model is causal, and leaves no trace of having asked."""

import gc
import threading
from typing import Any
from weakref import ref

import pytest
import torch
import transformers

import tl_scopes as tls
from tests import zoo
from tests.zoo import VOCAB, WIDTH
from tl_scopes import models
from tl_scopes.models import causality
from tl_scopes.models.causality import backward_influence

PROMPT = [3, 14, 15, 9]
REFUSED = r"is not a causal language model: scopes explain .* a later token moves an earlier prediction"


def bert(is_decoder: bool) -> Any:
    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        is_decoder=is_decoder,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertLMHeadModel(config).eval()
    return zoo.build_bridge_from_module(model, "BertLMHeadModel", hf_config=config)


def gemma(bidirectional: bool) -> Any:
    config = transformers.Gemma3TextConfig(
        **zoo._LLAMA, vocab_size=VOCAB, use_bidirectional_attention=bidirectional, attn_implementation="eager"
    )
    torch.manual_seed(0)
    model = transformers.Gemma3ForCausalLM(config).eval()
    return zoo.build_bridge_from_module(model, "Gemma3ForCausalLM", hf_config=config)


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models that are probed from here on."""
    probed = []

    def counted(model: Any) -> float | None:
        probed.append(type(model))
        return backward_influence(model)

    monkeypatch.setattr(causality, "backward_influence", counted)
    return probed


BIDIRECTIONAL = {
    "bert": lambda: bert(is_decoder=False),
    "gemma": lambda: gemma(bidirectional=True),
    "native": lambda: zoo._native(attention_dir="bidirectional").model,
}
if zoo.HookedTransformer:
    BIDIRECTIONAL["hooked"] = lambda: zoo._hooked(attention_dir="bidirectional").model


@pytest.mark.parametrize("make", list(BIDIRECTIONAL.values()), ids=list(BIDIRECTIONAL))
def test_bidirectional_models_are_refused(make: Any) -> None:
    """By every entry, since each of them cuts or fills up prompts, or reads several positions of one pass."""
    model = make()
    assert backward_influence(model) > 1e-3
    for ask in (
        lambda: tls.linearize(model, PROMPT),
        lambda: tls.attribution_map(model, PROMPT, tls.SemanticScope()),
        lambda: tls.attribute_many(model, [PROMPT], tls.SemanticScope()),
    ):
        with pytest.raises(TypeError, match=REFUSED):
            ask()


def test_the_message_says_how_far_and_what_to_do() -> None:
    with pytest.raises(
        TypeError, match=r"by 0.9\d times what it moves its own. If .* \(BERT needs is_decoder=True\).$"
    ):
        tls.linearize(gemma(bidirectional=True), PROMPT)
    with pytest.raises(TypeError, match=r"lost with its attention kernel, 'sdpa': call .*mplementation\(\"eager\"\).$"):
        tls.linearize(bert(is_decoder=False), PROMPT)


def test_a_causal_bert_is_answered() -> None:
    """With `is_decoder=True` it looks back only, whatever TransformerLens says of it."""
    assert len(tls.attribute(bert(is_decoder=True), PROMPT, tls.SemanticScope()).scores) == len(PROMPT)


def test_every_species_is_causal_to_the_last_digit(specimen: zoo.Specimen) -> None:
    """Both prompts are rows of one batch, which are rounded alike; experts are told apart by their rows."""
    assert backward_influence(specimen.model) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("species", ["bridge llama", "bridge mixtral", "bridge mamba"])
def test_rounding_is_not_taken_for_influence(species: str, dtype: torch.dtype) -> None:
    specimen = zoo.SPECIES[species]()
    model = specimen.model.to(dtype)
    influence = backward_influence(model)
    assert influence is not None
    assert influence <= torch.finfo(dtype).eps  # an eighth of what passes
    models.check_model(model)


def test_it_is_asked_once(probes: list[Any]) -> None:
    model = gemma(bidirectional=False)
    lin = tls.linearize(model, PROMPT)
    lin.at(lin.embeddings)
    tls.attribution_map(model, PROMPT, tls.SemanticScope())
    assert len(probes) == 1
    models.check_model(gemma(bidirectional=False))
    assert len(probes) == 2


def test_it_is_asked_again_of_another_kernel(probes: list[Any]) -> None:
    model = gemma(bidirectional=False)
    for attention in ("eager", "sdpa", "sdpa"):
        model.original_model.set_attn_implementation(attention)
        models.check_model(model)
    assert len(probes) == 2


def test_it_keeps_no_model_alive() -> None:
    model = gemma(bidirectional=False)
    models.check_model(model)
    gone = ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_hooks_of_the_users_see_nothing_of_it() -> None:
    """They may be made for one prompt: here for one length, and they are all there afterwards, in their order."""
    model, seen = gemma(bidirectional=False), []

    def of_one_prompt(value: torch.Tensor, hook: Any) -> torch.Tensor:
        seen.append(value.shape[1])
        assert value.shape[1] == len(PROMPT)
        return value

    before = {name: list(point._forward_hooks.items()) for name, point in model.hook_dict.items()}
    generator = torch.get_rng_state()
    with model.hooks(fwd_hooks=[("blocks.0.hook_out", of_one_prompt), ("hook_embed", of_one_prompt)]):
        during = {name: list(point._forward_hooks.items()) for name, point in model.hook_dict.items()}
        models.check_model(model)
        assert not seen
        assert during == {name: list(point._forward_hooks.items()) for name, point in model.hook_dict.items()}
        tls.linearize(model, PROMPT)
    assert seen == [len(PROMPT)] * 2
    assert before == {name: list(point._forward_hooks.items()) for name, point in model.hook_dict.items()}
    assert torch.equal(generator, torch.get_rng_state())


def test_hooks_act_in_other_threads_meanwhile() -> None:
    model, seen = gemma(bidirectional=False), []
    with model.hooks(fwd_hooks=[("blocks.0.hook_out", lambda value, hook: seen.append(threading.get_ident()))]):
        with causality.silenced(model):
            model(torch.tensor([PROMPT]))
            assert not seen
            other = threading.Thread(target=model, args=(torch.tensor([PROMPT]),))
            other.start()
            other.join()
            assert seen == [other.ident]
        model(torch.tensor([PROMPT]))
    assert seen == [other.ident, threading.get_ident()]


def test_a_hook_that_goes_meanwhile_stays_away() -> None:
    model, seen = gemma(bidirectional=False), []
    point = model.hook_dict["blocks.0.hook_out"]
    point.add_hook(lambda value, hook: seen.append(1))
    with causality.silenced(model):
        point.remove_hooks()
    model(torch.tensor([PROMPT]))
    assert not seen
    assert not point._forward_hooks


def test_what_cannot_be_asked_goes_by_its_configuration() -> None:
    """A model that does not run on the probe's prompt fails on the user's, or not; that is not for the probe to say."""
    one_position = zoo._native(n_ctx=1).model
    assert backward_influence(one_position) is None
    models.check_model(one_position)
    broken = gemma(bidirectional=False)
    broken.original_model.model.norm.forward = None
    assert backward_influence(broken) is None
    models.check_model(broken)
    one_position.cfg.attention_dir = "bidirectional"
    with pytest.raises(TypeError, match="is not a causal language model: scopes explain a next-token prediction.$"):
        models.check_model(one_position)


def test_few_positions_and_tokens() -> None:
    """Models of algorithmic tasks have contexts of two or three positions, and small vocabularies."""
    small = {"d_vocab": 2, "n_ctx": 2}
    assert backward_influence(zoo._native(**small).model) == 0
    assert backward_influence(zoo._native(**small, attention_dir="bidirectional").model) > 1e-3
    assert backward_influence(zoo._native(d_vocab=1).model) is None


def test_a_constant_model_is_causal() -> None:
    model = zoo._native().model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert backward_influence(model) == 0


def test_models_without_a_list_of_blocks() -> None:
    """HRM-Text runs its stacks in cycles, the first of them without gradients."""
    config = transformers.HrmTextConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        head_dim=8, L_cycles=2, attn_implementation="eager",
    )  # fmt: skip
    model = transformers.HrmTextForCausalLM(config).eval()
    bridge = zoo.build_bridge_from_module(model, "HrmTextForCausalLM", hf_config=config)
    with pytest.raises(TypeError, match="is not one list of blocks .* no gradient of theirs is the derivative"):
        tls.linearize(bridge, PROMPT)
