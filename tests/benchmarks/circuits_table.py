"""How far `carried_by` and attribution patching of both orders agree with activation patching, on pairs of four kinds.

    python -m tests.benchmarks.circuits_table MODEL [SITE ...] [--pairs N] [--rules NAME]

MODEL is a name or a folder that `tl_scopes.models.load` takes. Only pairs count to which the model gives the right
answer at both prompts; of each kind the first N such pairs (6 by default). It prints a table in Markdown, in which
brackets are 95% bootstrap intervals over pairs, and the last columns the mean Pearson correlation of each kind. With
`--rules` both methods are compared under these rules too, and by how much each of them is better there, in Pearson's
correlation with its interval over pairs.
"""

import argparse
from collections.abc import Iterator, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import torch

import tl_scopes as tls
from tl_scopes import models
from tl_scopes.bootstrap import bootstrap
from tl_scopes.rank_correlation import spearman

if TYPE_CHECKING:
    import pandas as pd

SITES = ("head_out", "attn_out", "mlp_out", "resid_pre")


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


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("sites", nargs="*", metavar="SITE", default=SITES)
    parser.add_argument("--pairs", type=int, default=6, metavar="N")
    parser.add_argument("--rules", metavar="NAME")
    given = parser.parse_args()
    compare(models.load(given.model), given.sites, given.pairs, given.rules)


def compare(model: Any, sites: Sequence[str], count: int, rules: str | None) -> None:
    """Print a row for each site and method, and below it what the second order and the rules are worth."""
    of_kind = {kind: pairs(model, kind, count) for kind in KINDS}
    print({kind: len(found) for kind, found in of_kind.items()}, flush=True)
    kinds = [kind for kind, found in of_kind.items() for _ in found]
    every = [pair for found in of_kind.values() for pair in found]
    titles = ("site", "method", "Pearson", "least", "Spearman", "same in the first 10", "same first", *KINDS)
    print("| " + " | ".join(titles) + " |\n" + "|---" * len(titles) + "|", flush=True)
    for site in sites:  # one after another, so that what is there is not lost where the time ends
        whole = tls.agreement(every, sites=[site], order=2, rules=rules)  # type: ignore[list-item]
        table = whole.to_dataframe()
        table["kind"] = kinds * (len(table) // len(kinds))
        of_kinds = table.groupby(["method", "kind"])["pearson"].mean()
        for row in whole.summary().itertuples():
            print(
                f"| {row.site} | {row.method} | {row.pearson:.2f} ({row.pearson_low:.2f} to {row.pearson_high:.2f}) | "
                f"{row.least_pearson:.2f} | {row.spearman:.2f} ({row.spearman_low:.2f} to {row.spearman_high:.2f}) | "
                f"{row.overlap:.0%} | {row.same_first:.0%} | "
                + " | ".join(f"{of_kinds[row.method, kind]:.2f}" for kind in KINDS)
                + " |",
                flush=True,
            )
        print(f"{site}: {_warning(whole, site)}", flush=True)
        if rules is not None:
            for method in ("carried", "attribution patching"):
                print(f"{site}: {method} {_gain(table, method, rules)}", flush=True)


def _gain(table: "pd.DataFrame", method: str, rules: str) -> str:
    """By how much a method agrees better under rules, pair by pair."""
    of = table.set_index("method")["pearson"]
    gains = torch.tensor(of[f"{method} under {rules} rules"].to_numpy() - of[method].to_numpy())
    mean, low, high, _ = bootstrap(gains[:, None], 0.95, 10_000, seed=0)
    return f"gains {mean.item():+.2f} ({low.item():+.2f} to {high.item():+.2f}) under {rules} rules"


def _warning(whole: tls.Agreement, site: str) -> str:
    """Whether the second order tells where the first one is wrong, over the components that matter."""
    both = zip(whole.effects[site, "second order"], whole.effects[site, "activation patching"], strict=True)
    wrong, doubted = [], []
    for found, truth in both:
        assert found.first_order is not None
        matter = truth.values.abs() > 0.02 * abs(truth.scale)
        wrong.append(((found.first_order - truth.values).abs() / truth.values.abs())[matter])
        doubted.append(1 - found.reliability[matter])
    a, b = torch.cat(wrong), torch.cat(doubted)
    far = b > 0.5
    return (
        f"of {len(a)} components with 2% of the effect or more the relative error of the first order and 1 − "
        f"reliability have the rank correlation {spearman(a, b):.2f}; where reliability is below a half ({far.sum()}) "
        f"the median error is {a[far].median():.0%}, elsewhere {a[~far].median():.0%}"
    )


if __name__ == "__main__":
    main()
