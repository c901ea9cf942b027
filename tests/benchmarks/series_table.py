"""How a model continues the paper's time series, and whether it looks at neighbours: `python -m
tests.benchmarks.series_table FOLDER`, about twenty minutes for SmolLM2-135M-Instruct on one core.

It writes the influence of every number, and what corrupting some of them does, to `tests/data/series.json`, from which
the notebook on time series draws its figures of the real model; without a folder it prints the tables of what is stored
there. `--seed 1` measures other series of the systems, which are stored beside the first.

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


def first_digit(model: Any) -> series.Forecaster:
    """The probability of each number as far as its first digit goes, from one forward pass where `forecast` takes 11.

    The ten numbers that begin with a digit share what the model gives it, so that what is measured is about the digit.
    """

    @torch.no_grad()
    def said(texts: list[tuple[int, ...]]) -> torch.Tensor:
        spelling = series.Spelling.of(model)
        ids = torch.stack([spelling.ids(series.Numbers(text)) for text in texts])
        _, logits = models.evaluate(model, ids, places=[(row, ids.shape[1] - 1) for row in range(len(ids))])
        assert logits is not None
        return logits.double().softmax(-1)[:, spelling.tokens[:, 0]] / 10

    return said


def corrupted(model: Any, drawn: list[series.Numbers], seed: int) -> series.Intervention:
    """The successors of five neighbours, and five matched others."""
    shown = [numbers[:LENGTH] for numbers in drawn]
    return series.intervention(first_digit(model), shown, generator=torch.Generator().manual_seed(seed), draws=2)


def asked(model: Any, numbers: series.Numbers) -> Iterator[tuple[str, series.SeriesInfluence]]:
    """What moves the number that comes next, by three questions."""
    shown, following = numbers[:LENGTH], f"{numbers.numbers[LENGTH]:02d}"
    lin = tls.linearize(model, shown.text)
    first = int(models.tokenize(model, shown.text + following)[len(lin.tokens)])
    scope = tls.SemanticScope(first, quantity="log_prob")
    yield "Temperature", series.influence(tls.TemperatureScope()(lin))
    yield "Semantic", series.influence(scope(lin))
    yield "Semantic, lookup", series.influence(scope(lin.under("lookup")))


def measured(model: Any, count: int, names: list[str], seed: int) -> Iterator[dict[str, Any]]:
    """The record of each system as it grows: after each of its series, and with the intervention at last."""
    for name in names:
        record: dict[str, Any] = {"system": name, "seed": seed, "numbers": [], "influence": {}, "losses": []}
        some = drawn(name, count, seed_of(seed))
        for numbers in some:
            record["numbers"].append(list(numbers.numbers))
            for question, found in asked(model, numbers):
                record["influence"].setdefault(question, []).append([float(f"{s:.3g}") for s in found.scores])
            record["losses"].append([round(one, 3) for one in series.losses(model, [numbers]).values[0].tolist()])
            yield record
        record["intervention"] = stored(corrupted(model, some, seed))
        yield record


def seed_of(seed: int) -> int:
    """The seed of a system's series: 1 is that of the series that the Markov chain was fitted on."""
    return seed if seed == 0 else 100 + seed


def stored(found: series.Intervention) -> dict[str, Any]:
    """What is kept of an intervention."""
    return {
        name: [[float(f"{one:.3g}") for one in pair] for pair in getattr(found, name).tolist()]
        for name in ("moved", "copied")
    } | {"p": [found.p_moved, found.p_copied], "balance": [round(one, 3) for one in found.balance]}


def pooled(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One record for each system, of the series of all seeds."""
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        one = found.setdefault(
            record["system"], {"system": record["system"], "numbers": [], "influence": {}, "losses": []}
        )
        for part in ("numbers", "losses"):
            one[part] = one[part] + record[part]
        for question, scores in record["influence"].items():
            one["influence"][question] = one["influence"].get(question, []) + scores
    return list(found.values())


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
    """Losses and shares, the tests, by seed and of all seeds together, and what corrupting does."""
    whole = pooled(records)
    lines = of_losses(whole)
    lines += ["", "All seeds together.", "", *of_tests(whole)]
    for seed in sorted({record.get("seed", 0) for record in records}):
        some = [record for record in records if record.get("seed", 0) == seed]
        counts = ", ".join(f"{record['system']} {len(record['numbers'])}" for record in some)
        lines += ["", f"Seed {seed}; series: {counts}.", "", *of_tests(some)]
    return "\n".join([*lines, "", *of_interventions(records)])


def of_interventions(records: list[dict[str, Any]]) -> list[str]:
    """The effect on the first digit of what comes next."""
    lines = [
        "| corrupted, seed | prediction moved, successors | others | p | numbers put in became likelier, successors | "
        "others | p | balance: log₂ lag, likeness |",
        "|-|-|-|-|-|-|-|-|",
    ]
    for record in records:
        found = record.get("intervention")
        if found is None:
            continue
        (near, far), (put, other) = (torch.tensor(found[name]).mean(0).tolist() for name in ("moved", "copied"))
        lag, likeness = found["balance"]
        lines.append(
            f"| {record['system']}, {record.get('seed', 0)} | {near:.3f} | {far:.3f} | {found['p'][0]:.3f} | "
            f"{put:+.2f} | {other:+.2f} | {found['p'][1]:.3f} | {lag:+.2f}, {likeness:+.2f} |"
        )
    return lines


def of_losses(records: list[dict[str, Any]]) -> list[str]:
    """How well the model does, and how much of the influence is on recent numbers."""
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
        early, late = values[:, :half].nanmean(), values[:, half:].mean()
        lines.append(f"| {record['system']} | {early:.2f} | {late:.2f} | {markov:.2f} | {last:.2f} |")
    return lines


def of_tests(records: list[dict[str, Any]]) -> list[str]:
    """The gain of neighbours with its p, for each scope and what is held fixed."""
    lines = [f"| question, given | {' | '.join(r['system'] for r in records)} |", "|-" * (len(records) + 1) + "|"]
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
    return lines


def main() -> None:
    """Measure, store, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", help="a model's folder; without it, what is stored is shown")
    parser.add_argument("--series", type=int, default=16)
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--corrupt", action="store_true", help="add the intervention alone to what is stored")
    options = parser.parse_args()
    records = json.loads(FILE.read_text()) if FILE.exists() else []
    if options.model:
        model = models.load(options.model)
        for name in options.systems if options.corrupt else ():
            record = next(r for r in records if (r["system"], r.get("seed", 0)) == (name, options.seed))
            numbers = [series.Numbers(tuple(one)) for one in record["numbers"]]
            record["intervention"] = stored(corrupted(model, numbers, options.seed))
            print(name, record["intervention"]["p"], flush=True)
            FILE.write_text(json.dumps(records))
        for record in measured(model, options.series, [] if options.corrupt else options.systems, options.seed):
            key = record["system"], options.seed
            records = [one for one in records if (one["system"], one.get("seed", 0)) != key] + [record]
            FILE.write_text(json.dumps(records))
            print(record["system"], len(record["numbers"]), "intervention" in record, flush=True)
    print(tables(records))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
