"""Train the bundled model: `python -m tl_scopes.tiny.train --out FOLDER`.

It writes a folder in the Hugging Face layout (config.json, model.safetensors, tokenizer files) and prints the table of
`evaluate` on held-out examples. Everything is drawn from `--seed`; with the same machine and number of threads the
result is the same.
"""

import argparse
import json
import math
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tl_scopes.tiny.example import Example
from tl_scopes.tiny.markov import MarkovChain
from tl_scopes.tiny.tasks import MIXTURES, SERIES, TASKS, Mixture, documents, examples

CONTEXT = 256
STAGES = ((4500, 6500, 3e-3), (1000, 4500, 2e-3), (1600, 3500, 2e-3), (2000, 2000, 2e-3))
"""The stages of the curriculum, one for each of `tasks.MIXTURES`: steps, the step at which the decay would end, and the
highest learning rate."""
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"


def train_tokenizer(seed: int, vocab_size: int = 1664) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE: any text has a tokenisation, and the words of the corpus are one token each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for text, _ in islice(documents(seed, MIXTURES[0]), 100_000)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A small Llama: 6 layers, 4 heads of 32 dimensions."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=32,
            max_position_embeddings=CONTEXT,
            rms_norm_eps=1e-6,
            initializer_range=0.05,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=False,
        )
    )


class Packed:
    """Endless batches of rows of `CONTEXT` tokens, each packed with whole documents."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, mixture: Mixture, seed: int, rows: int) -> None:
        self.stream, self.tokenizer, self.rows = documents(seed, mixture), tokenizer, rows
        self.random = torch.Generator().manual_seed(seed)
        self.waiting: list[tuple[list[int], list[float]]] = []

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token ids, the number of the document each belongs to (0 for padding) and its weight in the loss, each of the
        shape [row position]."""
        tokens = torch.full((self.rows, CONTEXT), self.tokenizer.pad_token_id)
        owner = torch.zeros(self.rows, CONTEXT, dtype=torch.long)
        weight = torch.zeros(self.rows, CONTEXT)
        for row in range(self.rows):
            used, document = 0, 0
            while True:
                if len(self.waiting) < 64:
                    self._refill()
                fitting = next((i for i, (ids, _) in enumerate(self.waiting) if used + len(ids) <= CONTEXT), None)
                if fitting is None:
                    break
                ids, weights = self.waiting.pop(fitting)
                document += 1
                tokens[row, used : used + len(ids)] = torch.tensor(ids)
                owner[row, used : used + len(ids)] = document
                weight[row, used : used + len(ids)] = torch.tensor(weights)
                used += len(ids)
        return tokens, owner, weight

    def _refill(self) -> None:
        texts, starts = zip(*islice(self.stream, 256), strict=True)
        batch = self.tokenizer(list(texts), return_offsets_mapping=True)
        # One document in ten goes without BOS, so that the model also knows prompts without it.
        bare = (torch.rand(len(texts), generator=self.random) < 0.1).tolist()
        for ids, offsets, start, no_bos in zip(batch["input_ids"], batch["offset_mapping"], starts, bare, strict=True):
            # What cannot be predicted counts a tenth, or its noise would drown the rest for thousands of steps.
            weights = [1.0 if end > start else 0.1 for _, end in offsets]
            self.waiting.append((ids[no_bos:], weights[no_bos:]))


def loss_of(model: LlamaForCausalLM, tokens: torch.Tensor, owner: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The weighted mean of the next-token cross-entropy within documents, in nats; attention stays within them too."""
    same = owner[:, :, None] == owner[:, None, :]
    causal = torch.ones(CONTEXT, CONTEXT, dtype=torch.bool, device=tokens.device).tril()
    index = torch.arange(CONTEXT, device=tokens.device).expand_as(tokens)
    first = torch.zeros_like(owner)
    first[:, 1:] = torch.where(owner[:, 1:] != owner[:, :-1], index[:, 1:], 0)
    positions = index - first.cummax(dim=1).values
    logits = model(tokens, attention_mask=(same & causal)[:, None], position_ids=positions, use_cache=False).logits
    within = (owner[:, 1:] == owner[:, :-1]) & (owner[:, 1:] > 0)
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
    weights = (weight[:, 1:] * within).flatten()
    return (losses * weights).sum() / weights.sum()


def train(model: LlamaForCausalLM, data: Packed, steps: int, horizon: int, peak: float, device: str) -> None:
    """Take `steps` steps of AdamW, with a linear warm-up and a cosine decay that would end at `horizon`."""
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.1)
    warmup = min(200, horizon // 10 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min((s + 1) / warmup, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, s / horizon)))),
    )
    start = time.monotonic()
    for step in range(steps):
        tokens, owner, weight = (part.to(device) for part in next(data))
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
            loss = loss_of(model, tokens, owner, weight)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step:6d}  loss {loss.item():.4f}  {time.monotonic() - start:7.0f} s", flush=True)
        if (step + 1) % 1000 == 0 and step + 1 < steps:
            accuracy = {row["task"]: row["accuracy"] for row in evaluate(model, data.tokenizer, count=100, series=0)}
            print(accuracy, flush=True)
            model.train()


def markov_loss(task: str, test: list[Example], *, order: int = 2, series: int = 20_000) -> float:
    """The mean loss, in nats, of an interpolated (Witten-Bell) Markov chain of numbers on the targets of `test`.

    It says what a predictor can know that looks at the last `order` numbers alone. The chain is fitted on `series`
    series of the training split, about as many as the model sees.
    """
    chain = MarkovChain((e.key.split(",") for e in examples(task, series, seed=1, split="train")), order)
    losses = []
    for example in test:
        losses.append(-math.log(chain.probability(example.target, example.prompt.rstrip(",").split(","))))
    return sum(losses) / len(losses)


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, tokenizer: Any, count: int = 1000, series: int = 20_000) -> list[dict[str, Any]]:
    """Measure the held-out accuracy of the most likely next token per task.

    For tasks in numbers also the loss of a Markov chain that is fitted on so many `series`; with 0 it is left out.
    """
    model.eval()
    rows = []
    for task in TASKS:
        test = examples(task, count, seed=2)
        log_probs = _next_log_probs(model, tokenizer, [example.prompt for example in test])
        targets = [tokenizer(example.target, add_special_tokens=False)["input_ids"] for example in test]
        assert all(len(target) == 1 for target in targets), targets
        right = torch.tensor(targets, device=model.device)[:, 0]
        rows.append(
            {
                "task": task,
                "accuracy": (log_probs.argmax(-1) == right).double().mean().item(),
                "loss": -log_probs[range(count), right].mean().item(),
                "order-2 Markov loss": markov_loss(task, test, series=series) if series and task in SERIES else None,
            }
        )
    return rows


def _next_log_probs(model: LlamaForCausalLM, tokenizer: Any, prompts: list[str]) -> Float[Tensor, "prompt vocab"]:
    """What is said after each prompt; prompts of one length go through the model together."""
    every = [tuple(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    found: dict[tuple[int, ...], Tensor] = {}
    for length in {len(ids) for ids in every}:
        some = list(dict.fromkeys(ids for ids in every if len(ids) == length))
        for start in range(0, len(some), 32):
            batch = some[start : start + 32]
            logits = model(torch.tensor(batch, device=model.device), use_cache=False, logits_to_keep=1).logits[:, 0]
            found |= dict(zip(batch, logits.double().log_softmax(-1), strict=True))
    return torch.stack([found[ids] for ids in every])


def table(rows: list[dict[str, Any]]) -> str:
    """The rows of `evaluate` as a Markdown table."""
    lines = ["| task | accuracy | loss (nats) | order-2 Markov loss |", "|---|---|---|---|"]
    for row in rows:
        markov = row["order-2 Markov loss"]
        baseline = "" if markov is None else f"{markov:.2f}"
        lines.append(f"| {row['task']} | {row['accuracy']:.1%} | {row['loss']:.3f} | {baseline} |")
    return "\n".join(lines)


def main() -> None:
    """Train the model, save and evaluate it, or evaluate one that was trained."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write, or to read with --evaluate-only")
    parser.add_argument("--max-steps", type=int, help="end each stage early, to try the script out")
    parser.add_argument("--rows", type=int, default=16, help=f"rows of {CONTEXT} tokens per step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--examples", type=int, default=1000, help="held-out examples per task in the table")
    parser.add_argument("--series", type=int, default=20_000, help="series that the Markov chain is fitted on")
    parser.add_argument("--evaluate-only", action="store_true")
    options = parser.parse_args()

    if options.evaluate_only:
        tokenizer = AutoTokenizer.from_pretrained(options.out)
        model = LlamaForCausalLM.from_pretrained(options.out)
    else:
        torch.manual_seed(options.seed)
        tokenizer = train_tokenizer(options.seed)
        model = build_model(tokenizer)
        parameters = sum(p.numel() for p in model.parameters())
        print(f"{parameters:,} parameters, {len(tokenizer)} tokens in the vocabulary")
        for stage, (mixture, (steps, horizon, rate)) in enumerate(zip(MIXTURES, STAGES, strict=True)):
            data = Packed(tokenizer, mixture, options.seed + stage, options.rows)
            train(model, data, min(steps, options.max_steps or steps), horizon, rate, options.device)
        model.save_pretrained(options.out)
        tokenizer.save_pretrained(options.out)
    rows = evaluate(model, tokenizer, options.examples, options.series)
    print(table(rows))
    (options.out / "evaluation.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
