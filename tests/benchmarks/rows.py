"""What is timed: each row has a name, and a function that prepares the work and returns it. A new row is one entry."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import tl_scopes as tls
from tests.benchmarks.setting import VOCAB, Setting
from tl_scopes.tiny.tasks import examples

Work = Callable[[], Any]


@dataclass(frozen=True)
class Row:
    """Something to time."""

    make: Callable[[Setting], Work]
    """Prepares the work: what it does itself is not timed."""
    per: int = 1
    """How many pieces of work one call does; the cost is that of one piece."""
    rounds: int = 9
    there: bool = True
    """Whether its library is installed."""


def measure(benchmark: Any, row: Row, setting: Setting, *, rounds: int | None = None, **info: Any) -> None:
    """Time a row, with bare forward passes just before and just after each round, and keep the ratio.

    Writes into the benchmark's `extra_info`: `ratio` (median over the rounds), `low` and `high`, `forward` in seconds.
    """
    if not row.there:
        pytest.skip("not there")
    work, rounds, forward = row.make(setting), rounds or row.rounds, []
    benchmark.pedantic(
        work, setup=lambda: forward.append(setting.forward_seconds()), rounds=rounds, warmup_rounds=int(rounds > 3)
    )
    if benchmark.stats is None:  # --benchmark-disable
        return
    forward = [*forward[-rounds:], setting.forward_seconds()]
    around = [(before + after) / 2 for before, after in pairwise(forward)]
    seconds = benchmark.stats.stats.data
    ratios = sorted(time / bare / row.per for time, bare in zip(seconds, around, strict=True))
    benchmark.extra_info |= info | {
        "ratio": ratios[rounds // 2],
        "low": ratios[0],
        "high": ratios[-1],
        "forward": sorted(forward)[rounds // 2],
    }


# -- tl_scopes --------------------------------------------------------------------------------------------------------


def scope(*scopes: tls.Scope, **options: Any) -> Callable[[Setting], Work]:
    """Work that linearises, then asks."""

    def make(s: Setting) -> Work:
        def work() -> list[tls.Attribution]:
            lin = tls.linearize(s.model, s.prompt, **options)
            return [ask(lin) for ask in scopes]

        return work

    return make


def cotangents(count: int, *, linearize: bool = False) -> Callable[[Setting], Work]:
    """Work that pulls back `count` random cotangents, with or without the forward pass."""

    def make(s: Setting) -> Work:
        def lin() -> tls.Linearization:
            return tls.linearize(s.model, s.prompt)

        kept = lin()
        probes = torch.randn(count, len(kept.readout), generator=torch.Generator().manual_seed(1))
        return lambda: (lin() if linearize else kept).squared_norms(probes)

    return make


def loop_over_positions(s: Setting) -> Work:
    """Work that does by hand what `attribution_map` does."""
    return lambda: [tls.attribute(s.model, s.prompt, tls.SemanticScope(), i) for i in range(len(s.prompt))]


def short_prompts() -> list[str]:
    """256 prompts of the bundled model's tasks."""
    tasks = ("agreement", "association", "translation", "inference_what")
    return [example.prompt for task in tasks for example in examples(task, 64)]


def many(s: Setting) -> Work:
    prompts = short_prompts()
    return lambda: list(tls.attribute_many(s.model, prompts, tls.SemanticScope(), batch_size=8, progress=False))


def loop_over_prompts(s: Setting) -> Work:
    prompts = short_prompts()
    return lambda: [tls.attribute(s.model, prompt, tls.SemanticScope()) for prompt in prompts]


TL_SCOPES = {
    "linearize": Row(lambda s: lambda: tls.linearize(s.model, s.prompt)),
    "Semantic Scope": Row(scope(tls.SemanticScope())),
    "Semantic Scope, checkpointed": Row(scope(tls.SemanticScope(), checkpoint=True)),
    "Temperature Scope": Row(scope(tls.TemperatureScope())),
    "Semantic and Temperature Scope, one linearisation": Row(scope(tls.SemanticScope(), tls.TemperatureScope())),
    "each further cotangent": Row(cotangents(32), per=32, rounds=5),
    "Fisher Scope, 32 probes": Row(scope(tls.FisherScope()), rounds=3),
    # All d_model cotangents take a minute, so there is one round.
    "Fisher Scope, exact, each of 512 cotangents": Row(scope(tls.FisherScope(exact=True)), per=512, rounds=1),
    "attribution_map, each of 128 positions": Row(
        lambda s: lambda: tls.attribution_map(s.model, s.prompt, tls.SemanticScope()), per=128, rounds=1
    ),
    "attribute in a loop, each of 128 positions": Row(loop_over_positions, per=128, rounds=1),
}

BUNDLED = {
    "attribution_map, each of 128 positions": TL_SCOPES["attribution_map, each of 128 positions"],
    "attribute in a loop, each of 128 positions": TL_SCOPES["attribute in a loop, each of 128 positions"],
    "attribute_many, each of 256 short prompts": Row(many, per=256, rounds=3),
    "attribute in a loop, each of 256 short prompts": Row(loop_over_prompts, per=256, rounds=3),
}

# -- by hand ----------------------------------------------------------------------------------------------------------


def readout_and_embeddings(s: Setting) -> tuple[Tensor, Tensor]:
    """y at the last position, and the embeddings x from which its graph begins."""
    embeddings = s.embeddings()
    return s.hf.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state[0, -1], embeddings


def naive_gradient(s: Setting) -> Tensor:
    """∂z_v/∂x, [token d_model]."""
    embeddings = s.embeddings()
    return torch.autograd.grad(s.last_logits(embeddings)[0, s.target], embeddings)[0][0]


def naive_rows(s: Setting, count: int) -> Tensor:
    """The first rows of ∂y/∂x, one backward pass each, [row token d_model]."""
    readout, embeddings = readout_and_embeddings(s)
    rows = [torch.autograd.grad(y, embeddings, retain_graph=True)[0][0] for y in readout[:count]]
    return torch.stack(rows)


def naive_row_after_row(s: Setting) -> Work:
    """Work that takes eight rows of ∂y/∂x, without the forward pass."""
    readout, embeddings = readout_and_embeddings(s)
    return lambda: [torch.autograd.grad(y, embeddings, retain_graph=True) for y in readout[:8]]


BY_HAND = {
    "TransformerBridge forward pass": Row(lambda s: torch.no_grad()(lambda: s.model(s.tokens))),
    "torch.autograd.grad of the logit": Row(lambda s: lambda: naive_gradient(s).norm(dim=-1)),
    "each row of the Jacobian, in a loop": Row(naive_row_after_row, per=8, rounds=5),
}

# -- captum -----------------------------------------------------------------------------------------------------------


def captum_saliency(s: Setting) -> Work:
    """‖∂z_v/∂x_t‖₂, which is Semantic Scope under another name."""
    from captum.attr import Saliency

    method = Saliency(s.last_logits)
    return lambda: method.attribute(s.embeddings(), target=s.target, abs=False)[0].norm(dim=-1)


def captum_saliency_last(s: Setting) -> Work:
    """The same with the unembedding at one position only."""
    from captum.attr import Saliency

    method = Saliency(lambda x: s.hf(inputs_embeds=x, use_cache=False, logits_to_keep=1).logits[:, -1])
    return lambda: method.attribute(s.embeddings(), target=s.target, abs=False)[0].norm(dim=-1)


def captum_input_x_gradient(s: Setting) -> Work:
    from captum.attr import InputXGradient

    method = InputXGradient(s.last_logits)
    return lambda: method.attribute(s.embeddings(), target=s.target)[0].sum(-1)


def captum_integrated_gradients(steps: int) -> Callable[[Setting], Work]:
    """Integrated gradients from the zero embedding."""

    def make(s: Setting) -> Work:
        from captum.attr import IntegratedGradients

        method = IntegratedGradients(s.last_logits)
        return lambda: method.attribute(s.embeddings(), target=s.target, n_steps=steps, internal_batch_size=10)

    return make


def captum_feature_ablation(s: Setting) -> Work:
    """Feature ablation, which replaces each token in turn by token 0."""
    from captum.attr import FeatureAblation

    @torch.no_grad()
    def last_logits(tokens: Tensor) -> Tensor:
        return s.hf(tokens, use_cache=False).logits[:, -1]

    method = FeatureAblation(last_logits)
    return lambda: method.attribute(s.tokens, target=s.target, perturbations_per_eval=8)


_CAPTUM = find_spec("captum") is not None

CAPTUM = {
    "captum Saliency, ‖gradient‖₂": Row(captum_saliency, there=_CAPTUM),
    "captum Saliency, `logits_to_keep=1`": Row(captum_saliency_last, there=_CAPTUM),
    "captum InputXGradient": Row(captum_input_x_gradient, there=_CAPTUM),
    "captum IntegratedGradients, 50 steps": Row(captum_integrated_gradients(50), rounds=3, there=_CAPTUM),
    "captum FeatureAblation, each token": Row(captum_feature_ablation, rounds=3, there=_CAPTUM),
}

# -- inseq ------------------------------------------------------------------------------------------------------------


def inseq_tokenizer(vocab: int = VOCAB) -> Any:
    """A tokenizer with the words "w3", "w4" and so on for the ids, since inseq takes only text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<bos>", "<eos>", *(f"w{i}" for i in range(3, vocab))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def inseq_attribution(method: str, **options: Any) -> Callable[[Setting], Work]:
    """Work that attributes the logit of one generated token through inseq's public interface."""

    def make(s: Setting) -> Work:
        import inseq

        tokenizer = inseq_tokenizer(s.hf.config.vocab_size)
        model = inseq.load_model(s.hf, method, tokenizer=tokenizer, device=str(s.hf.device))
        text = " ".join(f"w{i}" for i in s.prompt)
        quiet = {"show_progress": False, "pretty_progress": False}

        def work() -> Tensor:
            out = model.attribute(text, f"{text} w{s.target}", attributed_fn="logit", **quiet, **options)
            return out.sequence_attributions[0].target_attributions[:-1, 0]  # [token d_model], of the one token

        return work

    return make


_INSEQ = find_spec("inseq") is not None

INSEQ = {
    "inseq saliency": Row(inseq_attribution("saliency"), there=_INSEQ),
    "inseq input_x_gradient": Row(inseq_attribution("input_x_gradient"), there=_INSEQ),
    "inseq integrated_gradients, 50 steps": Row(
        inseq_attribution("integrated_gradients", n_steps=50, internal_batch_size=10), rounds=3, there=_INSEQ
    ),
}

ROWS = TL_SCOPES | BY_HAND | CAPTUM | INSEQ
