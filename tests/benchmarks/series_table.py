"""How a model continues the paper's time series, and whether it looks at neighbours: `python -m
tests.benchmarks.series_table FOLDER`, about twenty minutes for SmolLM2-135M-Instruct on one core.

It writes the influence of every number to `tests/data/series.json`, from which the notebook on time series draws
its figures of the real model; without a folder it prints the tables of what is stored there.

Command: python -m tests.real.model && python -m tests.benchmarks.series_table tests/real/.model
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import tl_scopes as tls
from tl_scopes import models, series

FILE = Path(__file__).parent.parent / "data" / "series.json"
LENGTH = 60
SYSTEMS: dict[str, series.System] = {
    "logistic": series.LogisticMap(),
    "Brownian": series.BrownianMotion(),
    "Lorenz": series.Lorenz(),
    "Lorenz with drift": series.Lorenz(drift=0.4),
    "noisy logistic": series.LogisticMap(noise=0.02),
}
GIVEN: tuple[tuple[str, ...], ...] = (
    ("recency",),
    ("recency", "value"),
    ("recency", "value", "next"),
)


def drawn(name: str, count: int, seed: int = 0) -> list[series.Numbers]:
    """Series of a system, each with one number more than is shown to the model."""
    generator = torch.Generator().manual_seed(seed)
    return [series.Numbers.of(SYSTEMS[name].draw(LENGTH + 1, generator)) for _ in range(count)]


def asked(model: Any, numbers: series.Numbers) -> Iterator[tuple[str, series.SeriesInfluence]]:
    """What moves the number that comes next, by three questions."""
    shown, following = numbers[:LENGTH], f"{numbers.numbers[LENGTH]:02d}"
    lin = tls.linearize(model, shown.text)
    first = int(models.tokenize(model, shown.text + following)[len(lin.tokens)])
    scope = tls.SemanticScope(first, quantity="log_prob")
    yield "Temperature", series.influence(tls.TemperatureScope()(lin))
    yield "Semantic", series.influence(scope(lin))
    yield "Semantic, lookup", series.influence(scope(lin.under("lookup")))


def measured(model: Any, count: int, names: list[str]) -> Iterator[dict[str, Any]]:
    """One record for each system, of all its series."""
    for name in names:
        record: dict[str, Any] = {"system": name, "numbers": [], "influence": {}, "losses": []}
        for numbers in drawn(name, count):
            record["numbers"].append(list(numbers.numbers))
            for question, found in asked(model, numbers):
                record["influence"].setdefault(question, []).append([float(f"{s:.3g}") for s in found.scores])
            record["losses"].append([round(one, 3) for one in series.losses(model, [numbers]).values[0].tolist()])
        yield record


def test(record: dict[str, Any], question: str, **options: Any) -> series.NeighborTest:
    """The test on what is stored."""
    numbers = torch.tensor(record["numbers"]).double()
    influence = torch.tensor(record["influence"][question])
    generator = torch.Generator().manual_seed(0)
    following = numbers[:, -1]
    return series.neighbor_test(influence, numbers[:, :-1], generator=generator, following=following, **options)


def chain_of(name: str, count: int = 2000) -> series.MarkovChain[int]:
    """An order-2 chain that knows the system from many other series."""
    return series.MarkovChain([numbers.numbers for numbers in drawn(name, count, seed=1)])


def tables(records: list[dict[str, Any]]) -> str:
    """Losses and shares, and the tests."""
    lines = [
        "| | loss, first half | second half | order-2 Markov chain | share of the last 10 (even .17) |",
        "|-|-|-|-|-|",
    ]
    for record in records:
        values = torch.tensor(record["losses"])
        chain, half = chain_of(record["system"]), LENGTH // 2
        markov = torch.tensor([chain.losses(numbers)[half:] for numbers in record["numbers"]]).mean()
        scores = torch.tensor(record["influence"]["Temperature"]).abs()
        last = (scores[:, -10:].sum(1) / scores.sum(1)).mean()
        early, late = values[:, :half].mean(), values[:, half:].mean()
        lines.append(f"| {record['system']} | {early:.2f} | {late:.2f} | {markov:.2f} | {last:.2f} |")
    lines += ["", f"| question, given | {' | '.join(r['system'] for r in records)} |", "|-" * (len(records) + 1) + "|"]
    for question in records[0]["influence"]:
        for given in GIVEN:
            cells = [test(record, question, given=given) for record in records]
            told = " | ".join(f"{cell.gain:+.3f} ({cell.p:.3f})" for cell in cells)
            lines.append(f"| {question}; {', '.join(given)} | {told} |")
        cells = [test(record, question, mirrored=True) for record in records]
        told = " | ".join(f"{cell.gain:+.3f} ({cell.p:.3f})" for cell in cells)
        lines.append(f"| {question}; recency, value, mirrored | {told} |")
        cells = [test(record, question, dimension=3, given=("recency", "value", "previous")) for record in records]
        told = " | ".join(f"{cell.gain:+.3f} ({cell.p:.3f})" for cell in cells)
        lines.append(f"| {question}; E = 3 beyond E = 1 | {told} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, store, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", help="a model's folder; without it, what is stored is shown")
    parser.add_argument("--series", type=int, default=16)
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS))
    options = parser.parse_args()
    records = json.loads(FILE.read_text()) if FILE.exists() else []
    if options.model:
        model = models.load(options.model)
        for record in measured(model, options.series, options.systems):
            records = [one for one in records if one["system"] != record["system"]] + [record]
            FILE.write_text(json.dumps(records))
            print(record["system"], "measured", flush=True)
    print(tables(records))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
