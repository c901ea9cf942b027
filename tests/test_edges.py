"""What a careful reviewer tried first: sure predictions, odd tokenizers, odd vocabularies, hooks and threads."""

import copy
import dataclasses
import pickle
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import islice
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from torch.testing import assert_close
from transformers import PreTrainedTokenizerFast

import tl_scopes as tls
from tests import zoo
from tests.zoo import PROMPT, VOCAB
from tl_scopes import models
from tl_scopes.jacobian import pullback
from tl_scopes.jacobian.pullback import pull
from tl_scopes.tiny.tasks import MIXTURES, documents


@pytest.fixture
def model() -> Any:
    return zoo.SPECIES["bridge llama"]().model


# -- predictions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("firmness", [6, 9, 12])
@pytest.mark.parametrize(
    "scope", [tls.SemanticScope(quantity="log_prob"), tls.FisherScope()], ids=["log_prob", "fisher"]
)
def test_sure_predictions(scope: tls.Scope, firmness: float) -> None:
    """A float32 model that is sure to 1e-5 ... 1e-10 still has the float64 model's scores: softmaxes are in float64."""
    answers = []
    for dtype in (torch.float32, torch.float64):
        golden = zoo.llama(zoo.GOLDEN, "bridge", dtype)
        with golden.hooks(fwd_hooks=[("unembed.hook_in", lambda value, hook: value * firmness)]):
            answers.append(tls.attribute(golden, PROMPT, scope))
    assert answers[1].predictions[0].probability > 1 - 2e-5
    error = (answers[0].scores - answers[1].scores).norm() / answers[1].scores.norm()
    assert error < 1e-3


def test_a_prediction_beyond_doubt(model: Any) -> None:
    """One-hot to the last bit: nothing can move it, so Fisher is zero."""
    with model.hooks(fwd_hooks=[("unembed.hook_in", lambda value, hook: value * 1e5)]):
        lin = tls.linearize(model, PROMPT)
    assert tls.FisherScope()(lin).scores.tolist() == [0.0] * len(PROMPT)


def test_no_probes(model: Any) -> None:
    lin = tls.linearize(model, PROMPT)
    none = torch.zeros(0, len(lin.readout), dtype=torch.float64)
    assert lin.vjp(none).shape == (0, *lin.embeddings.shape)
    assert lin.squared_norms(none).shape == (0, len(PROMPT))
    assert lin.jvp(torch.zeros(0, *lin.embeddings.shape)).shape == (0, len(lin.readout))


# -- tokens -----------------------------------------------------------------------------------------------------------

CORPUS = [text for text, _ in islice(documents(0, MIXTURES[0]), 300)]


def _byte_level() -> Tokenizer:
    tokenizer = Tokenizer(tokenizer_models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    return tokenizer


def _sentence_piece() -> Tokenizer:
    """Llama 2's kind: pieces with ▁, a space put before the text, bytes as a last resort."""
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(tokenizer_models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", *fallback])
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _word_piece() -> Tokenizer:
    tokenizer = Tokenizer(tokenizer_models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]"]))
    return tokenizer


@dataclasses.dataclass
class Config:
    d_vocab: int


@dataclasses.dataclass
class Speaker:
    """As much of a model as its tokens need."""

    tokenizer: Any
    cfg: Config


@pytest.mark.parametrize("make", [_byte_level, _sentence_piece, _word_piece])
def test_what_is_shown_can_be_passed(make: Any) -> None:
    """token(token_text(i)) is i, for every token whose text is its own: continuation pieces, bytes and spaces too."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make())
    size = len(tokenizer)
    speaker = Speaker(tokenizer, Config(size))
    texts = [models.token_text(speaker, id) for id in range(size)]
    unique = [id for id in range(size) if texts.count(texts[id]) == 1]
    assert len(unique) > 0.7 * size  # SentencePiece has ASCII twice, as characters and as bytes
    assert [models.token(speaker, texts[id], size).id for id in unique] == unique
    assert models.token_text(speaker, size + 3) == f"<{size + 3}>"  # padding of the vocabulary


def test_sentence_piece_spaces() -> None:
    """A continuation is not the word: "ing" and " ing" are different tokens, and neither stands for the other."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_sentence_piece())
    speaker = Speaker(tokenizer, Config(len(tokenizer)))
    assert tokenizer.convert_ids_to_tokens(models.token(speaker, " the", len(tokenizer)).id) == "▁the"
    pieces = {tokenizer.convert_ids_to_tokens(id) for id in range(len(tokenizer))}
    piece = next(p for p in sorted(pieces) if len(p) > 1 and f"▁{p}" in pieces and "<" not in p)
    assert tokenizer.convert_ids_to_tokens(models.token(speaker, piece, len(tokenizer)).id) == piece
    assert models.token(speaker, "<0xE2>", len(tokenizer)).text == "<0xE2>"


def test_a_known_unknown() -> None:
    """In GPT-2 the unknown token is also the end of text, and may be asked for by its name."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_byte_level(), unk_token="<|endoftext|>")
    speaker = Speaker(tokenizer, Config(len(tokenizer)))
    assert models.token(speaker, "<|endoftext|>", len(tokenizer)).id == tokenizer.unk_token_id


@pytest.mark.skipif(zoo.HookedTransformer is None, reason="TransformerLens 4 has no HookedTransformer")
@pytest.mark.parametrize("outputs", [5, 60])
def test_outputs_that_are_no_tokens(outputs: int) -> None:
    """Models of algorithmic tasks have an output vocabulary of their own: it counts, and has no names."""
    model = zoo._hooked(d_vocab_out=outputs).model
    lin = tls.linearize(model, PROMPT)
    assert len(lin.logits) == outputs
    answer = tls.SemanticScope()(lin)
    assert answer.target is not None
    assert answer.target.text == f"<{answer.target.id}>"
    with pytest.raises(ValueError, match=f"target {outputs} is outside the vocabulary of {outputs}"):
        tls.SemanticScope(target=outputs)(lin)


@pytest.mark.parametrize("species", zoo.SPECIES)
def test_sizes_are_those_of_the_weights(species: str) -> None:
    """Whatever the configuration says since a tokenizer was assigned."""
    model = zoo.specimen(species).model
    before = model.cfg.d_vocab, model.cfg.d_vocab_out
    with zoo.Float64():
        outputs = model(torch.tensor([PROMPT]), return_type="logits").shape[-1]
    assert (models.vocabulary_size(model), models.output_size(model)) == (VOCAB, outputs)
    if species.startswith("hooked"):
        return
    try:
        model.cfg.d_vocab, model.cfg.d_vocab_out = 5, 5
        assert (models.vocabulary_size(model), models.output_size(model)) == (VOCAB, outputs)
    finally:
        model.cfg.d_vocab, model.cfg.d_vocab_out = before


def test_a_tokenizer_that_is_assigned_to_a_padded_vocabulary() -> None:
    """It may be smaller than the vocabulary: text is understood, and all ids may be given, before and after."""
    tokenizer = tls.load_tiny().tokenizer
    size = len(tokenizer) + 43
    config = transformers.LlamaConfig(**zoo._LLAMA, vocab_size=size)
    hf = transformers.LlamaForCausalLM(config).eval()
    model = zoo.build_bridge_from_module(hf, "LlamaForCausalLM", hf_config=config, tokenizer=tokenizer)
    expected = tls.attribute(model, "The keys", tls.SemanticScope(" are"))
    model.tokenizer = tokenizer
    assert torch.equal(tls.attribute(model, "The keys", tls.SemanticScope(" are")).scores, expected.scores)
    assert tls.attribute(model, [size - 1], tls.SemanticScope(size - 1)).str_tokens == (f"<{size - 1}>",)


@pytest.mark.parametrize("make", [lambda lin: lin.logits.argmax(), lambda lin: lin.logits.argmax().numpy()])
def test_targets_of_every_form(model: Any, make: Any) -> None:
    lin = tls.linearize(model, PROMPT)
    assert lin.token(make(lin)) == lin.token()


def test_a_context_without_limit() -> None:
    """Mamba has none, whatever TransformerLens writes down for it."""
    mamba = zoo.SPECIES["bridge mamba"]().model
    mamba.cfg.n_ctx = 4
    with zoo.Float64():
        assert len(tls.linearize(mamba, PROMPT).tokens) == len(PROMPT)


# -- hooks and threads ------------------------------------------------------------------------------------------------


def test_backward_hooks_see_plain_gradients(model: Any) -> None:
    """A backward hook of the user's runs in our backward passes: it gets real tensors, and what it does counts."""
    seen: list[float] = []
    lin = tls.linearize(model, PROMPT)
    cotangents = torch.eye(16, dtype=torch.float64)[:3]
    before = lin.vjp(cotangents)
    with model.hooks(bwd_hooks=[("blocks.1.hook_resid_pre", lambda g, hook: seen.append(g.abs().max().item()))]):
        inside = tls.linearize(model, PROMPT)
        assert_close(inside.vjp(cotangents), before)
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "hook point") for name in ("unembed.hook_in", "unembed.hook_out", "blocks.1.hook_resid_pre")),
        *(
            (name, kind)
            for name in ("unembed", "blocks.1")
            for kind in ("full_backward_hook", "full_backward_pre_hook")
        ),
    ],
)
@pytest.mark.parametrize("species", ["bridge llama", *(["hooked layer norm"] if zoo.HookedTransformer else [])])
def test_backward_hooks_everywhere(species: str, name: str, kind: str) -> None:
    """At the unembedding and on plain modules too, for every product, and for as long as the graph lives that they are
    in."""
    model = zoo.specimen(species).model
    eye = torch.eye(zoo.VOCAB, dtype=torch.float64)

    def results(lin: tls.Linearization) -> list[torch.Tensor]:
        scopes = [tls.FisherScope(probes=8), tls.SpectralScope(rank=2), tls.HetaScope(3, probes=2)]
        verbs = [lin.vjp(eye[:3, :16]), lin.jvp(lin.embeddings.repeat(3, 1, 1))]
        verbs += [lin.logits_vjp(eye[:3]), lin.logits_jvp(eye[:3, :16])]
        return verbs + [scope(lin).scores for scope in (*scopes, tls.SemanticScope(3))]

    with zoo.Float64():
        expected = results(tls.linearize(model, PROMPT))
        expected.append(tls.attribution_map(model, PROMPT, tls.SemanticScope(3)).scores)
        seen: list[float] = []

        def note(*args: Any, **kwargs: Any) -> None:
            gradient = args[0] if "hook" in kwargs else args[-1][0]
            seen.append(gradient.abs().max().item())

        with ExitStack() as stack:
            if kind == "hook point":
                stack.enter_context(model.hooks(bwd_hooks=[(name, note)]))
            else:
                register = getattr(model.get_submodule(name), f"register_{kind}")
                stack.callback(register(note).remove)
            lin = tls.linearize(model, PROMPT)
            found = [*results(lin), tls.attribution_map(model, PROMPT, tls.SemanticScope(3)).scores]
        outside = results(lin)
    assert seen
    assert_close(found, expected, rtol=1e-6, atol=1e-9)
    assert_close(outside, expected[:-1], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("together", [1, 2, 5])
def test_tangents_go_in_batches(model: Any, monkeypatch: pytest.MonkeyPatch, together: int) -> None:
    """As many at once as cotangents do: memory for one batch of them."""
    lin, sizes = tls.linearize(model, PROMPT), []
    tangents = torch.randn(5, *lin.embeddings.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole, products = lin.jvp(tangents), pullback.products

    def watch(output: torch.Tensor, leaf: torch.Tensor, some: torch.Tensor, **options: Any) -> torch.Tensor:
        sizes.append(len(some))
        return products(output, leaf, some, **options)

    zoo.batches_of(monkeypatch, together)
    monkeypatch.setattr(pullback, "products", watch)
    assert_close(lin.jvp(tangents), whole)
    assert max(sizes) == together
    assert sum(sizes) == 5


def test_mamba_goes_one_by_one() -> None:
    """Its scan has no batching rules: batched cotangents would take ten times as long."""
    with zoo.Float64():
        lin = tls.linearize(zoo.specimen("bridge mamba").model, PROMPT)
        assert [len(batch) for batch in pull([lin], [torch.eye(16).double()[:3]])] == [1, 1, 1]
    other = tls.linearize(zoo.specimen("bridge llama").model, PROMPT)
    assert [len(batch) for batch in pull([other], [torch.eye(16).double()[:3]])] == [3]


def test_threads(model: Any) -> None:
    """Two threads on one model take turns in the forward pass, and get their own numbers."""
    prompts = [[i % 30 + 1 for i in range(start, start + 8)] for start in range(20)]
    alone = [tls.attribute(model, prompt, tls.SemanticScope(target=3)).scores for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda prompt: tls.attribute(model, prompt, tls.SemanticScope(target=3)), prompts))
    for expected, answer in zip(alone, together, strict=True):
        assert_close(answer.scores, expected)


@pytest.mark.skipif(zoo.HookedTransformer is None, reason="TransformerLens 4 computes Cohere rightly")
def test_what_the_bridge_gets_wrong_is_refused() -> None:
    specimen = zoo._bridge(
        "CohereForCausalLM", "CohereConfig", **{k: v for k, v in zoo._LLAMA.items() if k != "head_dim"}
    )
    with pytest.raises(TypeError, match="computes CohereForCausalLM wrongly.*upgrade to TransformerLens 4"):
        tls.linearize(specimen.model, PROMPT)


def test_attn_out_and_resid_post(model: Any) -> None:
    """Perturbing what attention adds is perturbing the stream after it: what replaces hook_resid_mid on a bridge."""
    if zoo.HookedTransformer is None:
        pytest.skip("needs both kinds")
    hooked, bridge = (zoo.llama(zoo.GOLDEN, kind, torch.float64) for kind in ("hooked", "bridge"))
    with zoo.Float64():
        mid = tls.linearize(hooked, PROMPT, wrt="blocks.1.hook_resid_mid").as_matrix()
        out = tls.linearize(bridge, PROMPT, wrt="blocks.1.hook_attn_out").as_matrix()
    assert_close(out, mid, rtol=1e-4, atol=1e-5)


def test_a_pickled_or_copied_answer_map_leaves_its_model_behind(tiny: Any) -> None:
    rows = tls.answer_map(tiny, "The keys to the old cabinet near the door", " are new.", tls.SemanticScope())
    for one in (rows, rows.by("word")):
        for copied in (pickle.loads(pickle.dumps(one)), copy.deepcopy(one)):
            assert (copied.to_json(), repr(copied)) == (one.to_json(), repr(one))
            with pytest.raises(ValueError, match="this map was read back, and has no model to ask again"):
                copied[0:2]
    assert len(rows[0:2].scores) == 10


@pytest.mark.parametrize(
    "ask",
    [
        lambda model: tls.attribute(model, PROMPT, tls.SemanticScope(5)),
        lambda model: tls.attribute(model, PROMPT, tls.SemanticScope(3, versus={5})),
        lambda model: tls.attribute(model, PROMPT, tls.HetaScope(5, probes=1)),
        lambda model: tls.evaluate(model, [PROMPT] * 2, [tls.FisherScope(4)], targets=[5, 5], on_error="raise"),
        lambda model: tls.evaluate(
            model, [PROMPT] * 2, [tls.FisherScope(4)], targets=[3, 3], foils=[5, 5], on_error="raise"
        ),
    ],
)
def test_a_token_that_cannot_come_is_no_target(ask: Any) -> None:
    """A hook that rules it out gives it a logit of minus infinity, of which nothing can be asked."""
    model = zoo.specimen("bridge llama").model

    def rule_out(value: torch.Tensor, hook: Any) -> torch.Tensor:
        return value.index_fill(-1, torch.tensor([5]), -torch.inf)

    with model.hooks(fwd_hooks=[("unembed.hook_out", rule_out)]):
        with pytest.raises(ValueError, match="cannot come here: a hook gives it a logit of minus infinity. Ask"):
            ask(model)


@pytest.mark.parametrize("answer", [[5], [5, 9]])
def test_metrics_of_readout_and_logits_on_answers(answer: list[int]) -> None:
    """A metric may read both; and a direction at an inner hook is asked about after an answer as well."""

    @dataclasses.dataclass(frozen=True)
    class Both(tls.JacobianScope):
        def cotangents(self, lin: tls.Linearization) -> torch.Tensor:
            return (2 * lin.readout + lin.cotangent(lambda z: z[..., 3].sum()))[None]

        def metric(self, lin: tls.Linearization) -> Any:
            return lambda readout, logits: readout.square().sum() + logits[..., 3].sum()

        def unit(self, lin: tls.Linearization) -> str:
            return "one"

    with zoo.Float64():
        model = zoo.specimen("bridge llama").model
        lin = tls.linearize(model, PROMPT, answer=answer)
        scope, direction = Both(), torch.arange(16).double()
        report = tls.linearity(lin, scope)
        assert_close(report.slope, scope(lin).scores)
        assert "must have" not in repr(tls.check(lin, scope))
        hook = "blocks.0.hook_resid_post"
        inner = tls.linearize(model, PROMPT, answer=answer, of=hook)
        tls.linearity(inner, tls.DirectionScope(direction, hook))
        assert "dimension" not in repr(tls.check(inner, tls.DirectionScope(direction, hook)))
