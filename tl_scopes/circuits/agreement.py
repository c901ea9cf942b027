"""How far carried parts and attribution patching agree with activation patching, over pairs of prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tl_scopes.bootstrap import bootstrap
from tl_scopes.circuits.effects import Effects
from tl_scopes.circuits.pairs import PromptPair, patched
from tl_scopes.models import PatchingSite, Rules, as_count
from tl_scopes.rank_correlation import spearman
from tl_scopes.scopes.scope import Scope
from tl_scopes.views import agreement as card

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_TRUTH = "activation patching"


@dataclass(frozen=True, eq=False, repr=False)
class Agreement:
    """What several methods say about the same parts of the network, at the same pairs of prompts.

    Sizes are compared: |carried|, |attribution patching| and, where it was asked for, |second order| with |activation
    patching|, over all components of a site.

    Attributes:
        effects: for each site and method the effects at each pair, `effects["head_out", "carried"][3]` say.
        pairs: the pairs, in words.
        sites: what was replaced.
        top: how many components the overlap is of.
    """

    effects: dict[tuple[str, str], tuple[Effects, ...]]
    pairs: tuple[str, ...]
    sites: tuple[str, ...]
    top: int

    def __repr__(self) -> str:
        table = self.summary()
        told = [
            f"{row.site} {row.method} {row.pearson:.2f} ({row.pearson_low:.2f} to {row.pearson_high:.2f})"
            for row in table.itertuples()
        ]
        return f"Agreement(Pearson with activation patching over {len(self.pairs)} pairs: {'; '.join(told)})"

    def to_dataframe(self) -> "pd.DataFrame":
        """One row for each site, method and pair: Pearson's and Spearman's correlation with activation patching, which
        part of the `top` components is the same, and whether the first one is."""
        import pandas as pd

        rows = []
        for site in self.sites:
            for method in [m for s, m in self.effects if s == site and m != _TRUTH]:
                both = zip(self.effects[site, method], self.effects[site, _TRUTH], strict=True)
                for pair, (one, truth) in zip(self.pairs, both, strict=True):
                    a, b = one.values.flatten().abs(), truth.values.flatten().abs()
                    rows.append({"site": site, "method": method, "pair": pair} | _alike(a, b, self.top))
        return pd.DataFrame(rows)

    def summary(self, seed: int = 0) -> "pd.DataFrame":
        """The mean over pairs of each number of `to_dataframe`, with percentile bootstrap intervals over pairs, and the
        least correlation of a pair.

        Args:
            seed: of the resampling.
        """
        import pandas as pd

        rows = []
        for (site, method), some in self.to_dataframe().groupby(["site", "method"], sort=False):
            names = ["pearson", "spearman", "overlap", "same_first"]
            mean, low, high, _ = bootstrap(torch.tensor(some[names].to_numpy(dtype=float)), seed=seed)
            row: dict[str, object] = {"site": site, "method": method, "pairs": len(some)}
            for i, name in enumerate(names):
                row |= {name: float(mean[i]), f"{name}_low": float(low[i]), f"{name}_high": float(high[i])}
            rows.append(row | {"least_pearson": float(some["pearson"].min())})
        return pd.DataFrame(rows)

    def plot(self, site: str | None = None) -> "Figure":
        """A scatter of the sizes that both methods give against activation patching, with the names of the largest.

        Args:
            site: which components; None is the first site.

        Raises:
            ValueError: for a site that was not compared.
        """
        chosen = self.sites[0] if site is None else site
        if chosen not in self.sites:
            raise ValueError(f"the sites compared are {', '.join(self.sites)}, got {site!r}.")
        effects = {method: some for (site, method), some in self.effects.items() if site == chosen}
        return card.plot(effects, chosen)


def agreement(
    pairs: Sequence[PromptPair],
    scope: Scope | None = None,
    sites: Sequence[PatchingSite] = ("head_out",),
    *,
    top: int = 10,
    order: Literal[1, 2] = 1,
    rules: Rules = None,
) -> Agreement:
    """Compare `carried_by` and attribution patching with activation patching, at the same components and pairs.

    `carried_by` sees the clean prompt alone, and is told which tokens differ; the others see both prompts.

    Args:
        pairs: pairs of prompts of one model.
        scope: the question that is asked of the clean prompt; None is each pair's own.
        sites: "resid_pre", "attn_out" and "mlp_out" by position, "head_out" for whole heads.
        top: how many components the overlap is of.
        order: 2 compares attribution patching of the second order too.
        rules: with them `carried_by` and attribution patching under these rules are compared too, as in `linearize`.

    Cost: for each pair and site one forward pass for every component, by `transformer_lens.patching` (pairs of one
        length together on TransformerLens 4), and some three to five for each of the other methods, seven to
        thirteen for the second order.

    Raises:
        ValueError: for no pairs or no sites, for one that is given twice, for pairs of several models, for another site
            or order, for a `top` below 1, and as `carried_by` does.
        TypeError: for something that is not a PromptPair, for one pair or one site that is not in a list, and for a
            `top` that is not an integer.

    Source: the comparison is that of Syed et al. 2023 (arXiv:2310.10348) and of RelP (arXiv:2508.21258).
    """
    count = as_count(top, "top is a number of components, 1 at least")
    if order not in (1, 2):
        raise ValueError(f"attribution patching has the order 1 or 2, got {order!r}.")
    if isinstance(sites, str):
        raise TypeError(f"sites are several, got the text {sites!r}: write [{sites!r}].")
    if not sites:
        raise ValueError("there are no sites to compare: give one at least, ['head_out'] say.")
    if isinstance(pairs, PromptPair):
        raise TypeError("pairs are several PromptPairs, got one: put it into a list.")
    if not pairs:
        raise ValueError("there are no pairs to compare at: give one PromptPair at least.")
    for i, pair in enumerate(pairs):
        if not isinstance(pair, PromptPair):
            raise TypeError(
                f"expected PromptPairs, got {type(pair).__name__}: write PromptPair(model, clean, corrupted)."
            )
        if pair.model is not pairs[0].model:
            raise ValueError(
                f"pair {i}, {pair!r}, is of another model than pair 0: compare the pairs of one model at a time."
            )
    given: list[object] = [*sites, *pairs]
    for one in given:
        if given.count(one) > 1:
            raise ValueError(
                f"{one!r} is given {given.count(one)} times, and would count as often in the means and intervals: give "
                "it once."
            )
    effects: dict[tuple[str, str], tuple[Effects, ...]] = {}
    for site in sites:
        found = [patched(pairs, site), [pair.carried(site, scope) for pair in pairs]]
        found.append([pair.attribution_patching(site) for pair in pairs])
        if order == 2:
            found.append([pair.attribution_patching(site, order=2) for pair in pairs])
        if rules is not None:
            found.append([pair.carried(site, scope, rules=rules) for pair in pairs])
            found.append([pair.attribution_patching(site, rules=rules) for pair in pairs])
        effects |= {(site, of_pairs[0].method): tuple(of_pairs) for of_pairs in found}
    return Agreement(effects, tuple(map(repr, pairs)), tuple(sites), count)


def _alike(a: Float[Tensor, " n"], b: Float[Tensor, " n"], top: int) -> dict[str, float | bool]:
    first, other = (set(x.topk(min(top, len(x))).indices.tolist()) for x in (a, b))
    return {
        "pearson": float(torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1]),
        "spearman": spearman(a, b),
        "overlap": len(first & other) / len(first),
        "same_first": bool(a.argmax() == b.argmax()),
    }
