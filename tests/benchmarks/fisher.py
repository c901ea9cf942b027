"""How far off is Fisher Scope's estimate, and is its standard error honest? On a real model, against exact traces.

    python -m tests.real.model  # once
    python -m tests.benchmarks.fisher  # 13 prompts of 6 to 91 tokens, some 45 minutes on one core
    python -m tests.benchmarks.fisher --prompts 3 --passes 24 32 64

The Jacobian of each prompt is computed whole, once; many estimates are then products with it.
"""

import argparse
import json
from pathlib import Path
from unittest.mock import patch

import pandas as pd
import torch
from torch import Tensor

import tl_scopes as tls
from tests.real.model import FOLDER
from tl_scopes import models
from tl_scopes.jacobian import fisher_information
from tl_scopes.jacobian.fisher_information import fisher_root
from tl_scopes.scopes import fisher

TEXTS = [
    "The capital of France is",
    "The keys to the old cabinet near the door",
    "Ben likes bananas. Carla likes cherries. Ben likes",
    "When Mary and John went to the store, John gave a drink to",
    "Once upon a time there was a little girl who lived in a small house near the",
    "The movie was a complete waste of time: the plot made no sense, the actors were bored, and I left before the end. "
    "Overall, my opinion of it is very",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) +",
    "English: The cat sleeps on the table. German: Die Katze schläft auf dem Tisch. English: The cat sleeps on the",
    "Water boils at a hundred degrees Celsius and freezes at zero. The human body has a temperature of about "
    "thirty-seven degrees, and a fever begins at about",
    "The old man sat by the window and watched the snow fall. His wife had died many years before, and his children "
    "had moved to the city, where they worked in offices and came home late. Every winter he told himself that he "
    "would visit them, but the roads were bad and his car was old. This year his daughter had written a letter, and he "
    "had read it so often that he knew every word. She asked him to come and",
]


def prompts() -> list[str | list[int]]:
    """Ten texts, and three of the prompts with the authors' scores."""
    cases = json.loads((Path(__file__).parents[1] / "data" / "smollm2.json").read_text())["cases"]
    return [*TEXTS, *(cases[i]["tokens"] for i in (4, 2, 0))]


def errors(lin: tls.Linearization, passes: int, draws: int) -> dict[str, float]:
    """The error of the estimate as a share of the sum of all scores, and how its standard error tells it."""
    J = lin.as_matrix()
    exact = sum((c @ J.flatten(1)).view(len(c), *J.shape[1:]).double().square().sum((0, 2)) for c in _rows(lin))

    def vjps(lins: object, cotangents: list[Tensor]) -> list[Tensor]:
        return [(c.to(J) @ J.flatten(1)).view(len(c), *J.shape[1:]) for c in cotangents]

    def squared_norms(lins: object, cotangents: list[Tensor]) -> list[Tensor]:
        return [c.double().square().sum(-1) for c in vjps(lins, cotangents)]

    def jvps(lins: object, tangents: list[Tensor]) -> list[Tensor]:
        return [t.to(J).flatten(1) @ J.flatten(1).T for t in tangents]

    with (
        patch.object(fisher, "vjps", vjps),
        patch.object(fisher, "squared_norms", squared_norms),
        patch.object(fisher_information, "jvps", jvps),
    ):
        answers = [
            tls.FisherScope(probes=passes, generator=torch.Generator().manual_seed(seed))(lin) for seed in range(draws)
        ]
    off = torch.stack([answer.scores.double() for answer in answers]) - exact
    z = off / torch.stack([answer.standard_error.double() for answer in answers])
    shares = off.abs().sum(-1) / exact.sum()
    return {"error": float(shares.mean()), "worst": float(shares.max()), "sd of z": float(z.std())}


def _rows(lin: tls.Linearization) -> tuple[Tensor, ...]:
    return fisher_root(lin).to(lin.readout).split(64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=13)
    parser.add_argument("--passes", type=int, nargs="+", default=[24, 32])
    parser.add_argument("--draws", type=int, default=24)
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = models.load(FOLDER, device="cpu")
    found = []
    for prompt in prompts()[: given.prompts]:
        lin = tls.linearize(model, prompt)
        for passes in given.passes:
            found.append({"tokens": len(lin.tokens), "passes": passes} | errors(lin, passes, given.draws))
            print(found[-1], flush=True)
    print(
        pd.DataFrame(found).groupby("passes").agg({"error": ["mean", "max"], "worst": "max", "sd of z": ["min", "max"]})
    )


if __name__ == "__main__":
    main()
