"""How far `carried_by` and attribution patching of both orders agree with activation patching, on pairs of four kinds.

    python -m tests.benchmarks.circuits_table [FOLDER] [--into docs/circuits.md] [--pairs N] [--anew]

It writes what it finds at every pair to `tests/data/circuits.json`, and leaves out what stands there already (`--anew`
does not), so that a run that was stopped goes on: some forty minutes for SmolLM2-135M-Instruct on one core. Without a
folder it prints what is stored there. `--into` puts the table into a page, between its marks.

Only pairs count to which the model gives the right answer at both prompts; of each kind the first N such pairs (6 by
default). Brackets are 95% bootstrap intervals over pairs, and the last column has the mean Pearson correlation of each
kind. Below the table stands by how much linear rules make a method agree better, pair by pair, and whether the second
order tells where the first one is wrong, over the components that matter.

`--costs` measures anew what the methods cost at the first pair of each kind, in bare forward passes of the Hugging Face
model over the same prompt (CPU time, the order of all ways shuffled in every round), in some five minutes.

Command: python -m tests.real.model && python -m tests.benchmarks.circuits_table tests/real/.model
"""

import argparse
from collections.abc import Iterator
from functools import partial
from inspect import signature
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch

import tl_scopes as tls
from tests.benchmarks.setting import in_turns
from tests.benchmarks.stored import (
    DATA,
    interval,
    made,
    page_with_marks,
    put_into,
    read,
    rounded,
    short,
    started,
    write,
)
from tl_scopes import models
from tl_scopes.rank_correlation import spearman

FILE = DATA / "circuits.json"
BEGIN, END = "<!-- circuits: begin -->", "<!-- circuits: end -->"
"""The marks around the table in a page."""

SITES = {
    "head_out": "heads",
    "attn_out": "attention, by position",
    "mlp_out": "MLP, by position",
    "resid_pre": "stream, by position",
}
METHODS = {
    "carried": "`carried_by`",
    "carried under linear rules": 'the same under "linear"',
    "attribution patching": "attribution patching",
    "second order": "second order",
    "attribution patching under linear rules": 'first order under "linear" (RelP)',
}
"""What `tls.agreement` compares with activation patching, and what the table calls it."""
RULES, TOP, MATTER = "linear", 10, 0.02
"""The rules; how many components the overlap is of; the part of the effect from which on a component matters."""
NUMBERS = ("pearson", "spearman", "overlap", "same_first")
"""What is stored of each method at each pair, in this order."""


def agreement() -> Iterator[tuple[str, str, str, str]]:
    """The number of the subject decides the verb."""
    nouns = [
        ("key", "keys"),
        ("book", "books"),
        ("dog", "dogs"),
        ("car", "cars"),
        ("boy", "boys"),
        ("picture", "pictures"),
    ]
    places = ["to the old cabinet", "near the big house", "on the small table", "behind the door"]
    for place, (one, many) in product(places, nouns):
        yield f"The {many} {place}", f"The {one} {place}", " are", " is"


def capitals() -> Iterator[tuple[str, str, str, str]]:
    """The country decides the city."""
    cities = {
        "France": " Paris", "Germany": " Berlin", "Italy": " Rome", "Spain": " Madrid", "Japan": " Tokyo",
        "Russia": " Moscow", "China": " Beijing", "England": " London", "Egypt": " Cairo", "Greece": " Athens",
    }  # fmt: skip
    names = list(cities)
    for i, country in enumerate(names):
        other = names[(i + 1) % len(names)]
        yield f"The capital of {country} is", f"The capital of {other} is", cities[country], cities[other]


def names() -> Iterator[tuple[str, str, str, str]]:
    """Who is named twice is not the one who is given something (Wang et al. 2022, IOI)."""
    people = ["John", "Mary", "Tom", "Anna", "James", "Sarah", "David", "Lisa"]
    places = [("store", "a drink"), ("park", "a book"), ("school", "a letter")]
    for (place, thing), i in product(places, range(0, len(people), 2)):
        a, b = people[i], people[i + 1]
        start = f"When {a} and {b} went to the {place},"
        yield f"{start} {b} gave {thing} to", f"{start} {a} gave {thing} to", f" {a}", f" {b}"


def translation() -> Iterator[tuple[str, str, str, str]]:
    """The foreign word decides the English one."""
    words = {
        "perro": " dog", "gato": " cat", "casa": " house", "agua": " water", "libro": " book", "rojo": " red",
        "sol": " sun", "mano": " hand", "noche": " night", "amigo": " friend", "leche": " milk", "verde": " green",
    }  # fmt: skip
    start = "Spanish: uno. English: one. Spanish: dos. English: two. Spanish:"
    for one, other in product(words, words):
        if one != other:
            yield f"{start} {one}. English:", f"{start} {other}. English:", words[one], words[other]


KINDS = {"agreement": agreement, "capitals": capitals, "names": names, "translation": translation}


def pairs(model: Any, kind: str, count: int) -> list[tls.PromptPair]:
    """The first pairs of a kind that the model gets right on both sides; a clean prompt is taken once."""
    found: dict[str, tls.PromptPair] = {}
    for clean, corrupted, answer, wrong in KINDS[kind]():
        if clean in found:
            continue
        try:
            pair = tls.PromptPair(model, clean, corrupted, answer=answer, wrong=wrong)
        except ValueError:  # of another length, or an answer of several tokens
            continue
        if pair.is_confirmed:
            found[clean] = pair
        if len(found) == count:
            break
    return list(found.values())


def measured(model: Any, folder: str, count: int) -> dict[str, Any]:
    """Measure what is not stored yet, kind by kind and site by site, and store it."""
    products = signature(tls.PromptPair.attribution_patching).parameters["products"].default
    settings = {"pairs of a kind": count, "rules": RULES, "components that overlap": TOP, "matters from": MATTER}
    settings |= {"Hessian products": products}
    stored = started(FILE, settings, made(model, folder))
    stored.setdefault("numbers", list(NUMBERS))
    for part in ("pairs", "values", "components"):
        stored.setdefault(part, {})
    for kind in KINDS:
        some = pairs(model, kind, count)
        stored["pairs"][kind] = [[pair.clean, pair.corrupted, pair.answer, pair.wrong] for pair in some]
        for site in SITES:
            if kind in stored["values"].get(site, {}):
                continue
            found = tls.agreement(some, sites=[site], top=TOP, order=2, rules=RULES)  # type: ignore[list-item]
            stored["values"].setdefault(site, {})[kind] = numbers(found)
            stored["components"].setdefault(site, {})[kind] = components(found, site)
            write(FILE, stored)
            print(f"{kind}, {site}: {len(some)} pairs", flush=True)
    return stored


BARE, ROUNDS = "bare forward pass", 7


def costs(model: Any, pair: tls.PromptPair, rounds: int = ROUNDS) -> dict[str, Any]:
    """The seconds of each method at each site, in every round, with the forward pass of the clean prompt included."""
    ids = models.tokenize(model, pair.clean)[None]
    inner = model.original_model

    def bare() -> object:
        with torch.no_grad():
            return inner(ids, use_cache=False)

    def parts() -> object:
        return tls.carried_by(tls.linearize(model, pair.clean), pair.scope, "qkv", list(pair.differing))

    ways: dict[str, Any] = {BARE: bare, "linearize": lambda: tls.linearize(model, pair.clean), "carried, qkv": parts}
    for site in SITES:
        ways |= {
            f"carried, {site}": partial(pair.carried, site),
            f"attribution patching, {site}": partial(pair.attribution_patching, site),
            f"second order, {site}": partial(pair.attribution_patching, site, order=2),
        }
    seconds = {way: [rounded(one, 4) for one in some] for way, some in in_turns(ways, rounds).items()}
    return {"tokens": ids.shape[1], "differing": len(pair.differing), "seconds": seconds}


def numbers(found: tls.Agreement) -> dict[str, list[list[float | None]]]:
    """For each method the `NUMBERS` of each pair."""
    rows: dict[str, list[list[float | None]]] = {}
    for row in found.to_dataframe().to_dict("records"):
        rows.setdefault(row["method"], []).append([rounded(float(row[name])) for name in NUMBERS])
    return rows


def components(found: tls.Agreement, site: str) -> list[list[list[float | None]]]:
    """For each pair the relative error of the first order, and 1 − reliability, of every component that matters."""
    told = []
    both = zip(found.effects[site, "second order"], found.effects[site, "activation patching"], strict=True)
    for said, truth in both:
        assert said.first_order is not None
        matters = truth.values.abs() > MATTER * abs(truth.scale)
        wrong = ((said.first_order - truth.values).abs() / truth.values.abs())[matters]
        doubted = 1 - said.reliability[matters]
        told.append([[rounded(x, 4) for x in one] for one in zip(wrong.tolist(), doubted.tolist(), strict=True)])
    return told


# -- what is stored, in words -----------------------------------------------------------------------------------------


def values(stored: dict[str, Any], site: str, method: str, number: str, kind: str | None = None) -> torch.Tensor:
    """One number at every pair, or at those of a kind."""
    of, at = stored["values"][site], stored["numbers"].index(number)
    return torch.tensor([row[at] for name in ([kind] if kind else of) for row in of[name][method]]).double()


def table(stored: dict[str, Any]) -> str:
    """A row for each site and method."""
    kinds = list(stored["pairs"])
    titles = ("what is replaced", "method", "Pearson", "least", "Spearman", f"same in the first {TOP}", "same first")
    lines = [f"| {' | '.join(titles)} | {', '.join(kinds)} |", "|---" * (len(titles) + 1) + "|"]
    for site, methods in stored["values"].items():
        for i, method in enumerate(sorted(methods[kinds[0]], key=list(METHODS).index)):
            pearson, rank, overlap, first = (values(stored, site, method, number) for number in NUMBERS)
            of_kinds = (short(values(stored, site, method, "pearson", kind).mean().item()) for kind in kinds)
            lines.append(
                f"| {SITES[site] if i == 0 else ''} | {METHODS[method]} | {interval(pearson)} | "
                f"{short(pearson.min().item())} | {interval(rank)} | {overlap.mean():.0%} | {first.mean():.0%} | "
                f"{' '.join(of_kinds)} |".replace("|  |", "| |")
            )
    return "\n".join(lines)


def gain(stored: dict[str, Any], site: str, method: str) -> str:
    """By how much a method agrees better under rules, pair by pair."""
    ruled = values(stored, site, f"{method} under {stored['settings']['rules']} rules", "pearson")
    return interval(ruled - values(stored, site, method, "pearson"), "+")


def warning(stored: dict[str, Any], site: str) -> dict[str, str]:
    """Whether the second order tells where the first one is wrong: over the components that matter, the rank
    correlation of error and doubt, and the median errors where reliability is below a half, and elsewhere."""
    rows = [row for some in stored["components"][site].values() for pair in some for row in pair]
    wrong, doubted = torch.tensor(rows).double().T
    far = doubted > 0.5
    return {
        "components": str(len(rows)),
        "correlation": short(spearman(wrong, doubted)),
        "below a half": f"{wrong[far].median():.0%}",
        "elsewhere": f"{wrong[~far].median():.0%}",
    }


def passes(stored: dict[str, Any], way: str) -> list[float]:
    """What something costs at each pair whose costs are stored, in bare forward passes: medians over the rounds."""
    seconds = [one["seconds"] for one in stored["costs"].values()]
    return [median(one[way]) / median(one[BARE]) for one in seconds]


def span(stored: dict[str, Any], *ways: str) -> str:
    """The lowest and the highest of these costs: 2.4 to 4.2."""
    every = [cost for way in ways for cost in passes(stored, way)]
    return f"{min(every):.1f} to {max(every):.1f}"


def below(stored: dict[str, Any]) -> str:
    """What stands below the table."""
    lines = []
    for site in stored["values"]:
        lines += [f"{site}: {method} gains {gain(stored, site, method)} under rules" for method in METHODS if
                  f"{method} under {RULES} rules" in METHODS]  # fmt: skip
        lines.append(f"{site}: {warning(stored, site)}")
    if "costs" in stored:
        lines += [f"tokens: {[one['tokens'] for one in stored['costs'].values()]}, in {BARE}es:"]
        ways = next(iter(stored["costs"].values()))["seconds"]
        lines += [f"{way}: {', '.join(f'{one:.2f}' for one in passes(stored, way))}" for way in ways]
    return "\n".join(lines)


def main() -> None:
    """Measure, store, print."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", metavar="FOLDER")
    parser.add_argument("--pairs", type=int, default=6, metavar="N")
    parser.add_argument("--anew", action="store_true", help="forget what is stored: for another model")
    parser.add_argument("--costs", action="store_true", help="measure what the methods cost, and nothing else")
    parser.add_argument("--into", type=Path, metavar="FILE")
    given = parser.parse_args()
    if given.into:  # before forty minutes of work
        page_with_marks(given.into, BEGIN, END)
    if given.anew:
        FILE.unlink(missing_ok=True)
    if given.model and not given.costs:
        measured(models.load(given.model), given.model, given.pairs)
    stored = read(FILE)
    if given.model and given.costs:
        model = models.load(given.model)
        stored["costs"] = {kind: costs(model, pairs(model, kind, 1)[0]) for kind in KINDS}
        write(FILE, stored)
    print(f"{table(stored)}\n\n{below(stored)}")
    if given.into:
        put_into(given.into, table(stored), BEGIN, END)


if __name__ == "__main__":
    main()
