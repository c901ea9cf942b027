"""Do corrections for attention sinks help? `python -m tests.benchmarks.corrections` prints the documentation's numbers.

Corrections of Semantic Scope, shipped or not, are judged by the causes that are known, with the BOS token ranked and
without, and by deletion and insertion. Differences to the uncorrected scope are paired. The bundled model has no
attention sink (`demos/03_attention_sinks.ipynb`): `--sink 0.15` makes one by hand, on the first token, which leaves the
predictions as they are.
"""

import argparse
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import torch

import tl_scopes as tls
from tl_scopes import models
from tl_scopes.faithfulness import Perturbation, differences
from tl_scopes.jacobian.linearization import Linearization
from tl_scopes.scopes.measurement import Measurement
from tl_scopes.tiny.counterfactuals import TASKS
from tl_scopes.tiny.example import Example
from tl_scopes.tiny.tasks import examples


@dataclass(frozen=True)
class Around(tls.Scope):
    """A scope that asks another scope's question in another way."""

    scope: tls.SemanticScope

    def unit(self, lin: Linearization) -> str:
        return self.scope.unit(lin)

    def explained(self, lin: Linearization) -> tuple[models.Token | None, models.Token | None]:
        return self.scope.explained(lin)

    def with_target(self, lin: Linearization, target: int) -> tls.Scope:
        return type(self)(self.scope.with_target(lin, target))  # type: ignore[arg-type]


class WithoutSinks(Around):
    """Positions that are the sink of a head get no score, as with `answer.without`."""

    def measure(self, lin: Linearization) -> Measurement:
        scores = self.scope.measure(lin).scores.clone()
        scores[list(tls.sink_report(lin, self.scope, early=1).sinks)] = 0
        return Measurement(scores)


class WithoutFirst(Around):
    """The first token gets no score."""

    def measure(self, lin: Linearization) -> Measurement:
        scores = self.scope.measure(lin).scores.clone()
        scores[0] = 0
        return Measurement(scores)


class HeldSinks(Around):
    """The attention weights of the sinks are constant in the Jacobian."""

    def measure(self, lin: Linearization) -> Measurement:
        sinks = tls.sink_report(lin, self.scope, early=1).sinks
        return tls.FrozenAttentionScope(self.scope, sinks).measure(lin)


class TowardsTokens(Around):
    """Steps go towards the vocabulary's embeddings e instead of having unit length: √ mean_e (g_t · (e − x_t))²."""

    def measure(self, lin: Linearization) -> Measurement:
        embeddings = models.embedding_matrix(lin.model)
        (gradient,) = lin.vjp(self.scope.cotangents(lin))
        changes = gradient @ embeddings.T - (gradient * lin.embeddings).sum(-1, keepdim=True)
        return Measurement(changes.square().mean(-1).sqrt())


CANDIDATES: dict[str, Callable[[tls.Scope], tls.Scope]] = {
    "uncorrected": lambda scope: scope,
    "first token dropped": WithoutFirst,
    "all sinks dropped": WithoutSinks,
    "sinks' attention frozen": HeldSinks,
    "all attention frozen": tls.FrozenAttentionScope,
    "position corrected": tls.PositionCorrectedScope,
    "position corrected, all attention frozen": lambda scope: tls.PositionCorrectedScope(
        tls.FrozenAttentionScope(scope)
    ),
    "towards other tokens": TowardsTokens,
}


def aimed_at_answer(around: Callable[[tls.Scope], tls.Scope]) -> Callable[[Example], tls.Scope]:
    """A function from an example to a scope that asks for its answer against its foil."""
    return lambda example: around(tls.SemanticScope(example.target, versus=example.foil))


def line(name: str, table: pd.DataFrame) -> str:
    """A row of a Markdown table, with differences as its cells."""
    cells = [f"{row.difference:+.2f} ({row.low:+.2f} to {row.high:+.2f})" for row in table.itertuples()]
    return f"| {name} | {' | '.join(cells)} |"


def sink(model: models.Model, part: float) -> list[tuple[str, Callable[..., torch.Tensor]]]:
    """Hooks that take the same part of its attention from every token and give it to the first one."""

    def more_on_the_first(pattern: torch.Tensor, hook: object) -> torch.Tensor:
        first = torch.zeros_like(pattern)
        first[..., 0] = 1
        return (1 - part) * pattern + part * first

    return [(f"blocks.{layer}.attn.hook_pattern", more_on_the_first) for layer in range(model.cfg.n_layers)]


def by_known_causes(model: models.Model, count: int, seed: int) -> None:
    """Print what the corrections do to the average precision."""
    scopes = {name: aimed_at_answer(around) for name, around in CANDIDATES.items()}
    for bos in (False, True):
        results = tls.known_causes(model, count=count, scopes=scopes, seed=seed, bos=bos)
        chosen = results[results.measure == "average precision"]
        chosen = pd.concat([chosen, chosen.assign(prompt=chosen.groupby(["task", "prompt"]).ngroup(), task="all")])
        means = chosen[chosen.scope == "uncorrected"].groupby("task", sort=False).value.mean()
        table = differences(chosen.assign(examples=0), "uncorrected")
        print(f"\naverage precision of known causes, {'with' if bos else 'without'} BOS, and difference to uncorrected")
        print(f"| | {' | '.join(dict.fromkeys(table.task))} |")
        print(f"| uncorrected | {' | '.join(f'{mean:.2f}' for mean in means)} |")
        for name in list(CANDIDATES)[1:]:
            print(line(name, table[table.scope == name]), flush=True)


def by_replacement(model: models.Model, count: int, seed: int) -> None:
    """Print what the corrections do to the areas under deletion and insertion curves."""
    held_out = [example for task in TASKS for example in examples(task, count, seed=seed)]
    about = {name: around(tls.SemanticScope()) for name, around in CANDIDATES.items()}
    prompts, targets = [example.prompt for example in held_out], [example.target for example in held_out]
    for bos in (False, True):
        perturbation = Perturbation(("resample", "mean"), fractions=(0.2,), bos=bos, samples=0, randomise=False)
        results = tls.evaluate(model, prompts, about, perturbation, targets=targets)
        areas = results[results.measure.isin(["deletion area", "insertion area"]) & (results.quantity == "log_prob")]
        table = differences(areas, "uncorrected")
        print(f"\nareas in nats of log-probability, {'with' if bos else 'without'} BOS: difference to uncorrected")
        heads = table[["replacement", "measure"]].drop_duplicates().itertuples(index=False)
        print(f"| | {' | '.join(f'{measure} ({replacement})' for replacement, measure in heads)} |")
        for name in list(CANDIDATES)[1:]:
            print(line(name, table[table.scope == name]), flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=50, help="examples per task")
    parser.add_argument("--seed", type=int, default=1, help="seed of the examples: not that of the page's table")
    parser.add_argument("--sink", type=float, default=0.0, help="part of all attention to move to the first token")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", "resource_tracker")
    model = tls.load_tiny()
    with model.hooks(fwd_hooks=sink(model, options.sink) if options.sink else []):
        by_known_causes(model, options.count, options.seed)
        by_replacement(model, options.count, options.seed)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
