"""Deletion and insertion curves, drawn."""

from typing import TYPE_CHECKING

from tl_scopes.faithfulness.statistics import summary

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


_DRAWN = ("deletion", "deletion area", "insertion", "insertion area")

_UNITS = {
    "log_prob": "log-probability of the target",
    "log_odds": "log-odds of the target against the foil",
    "kl": "KL from the undisturbed prediction",
}


def plot(results: "pd.DataFrame", replacement: str | None = None, quantity: str = "log_prob") -> "Figure":
    """Draw what `evaluate` measured: how much replacing the first tokens takes, and how much putting them back gives.

    A curve is the mean over prompts, with its 95% bootstrap band. The legend has the area, also with its interval.

    Args:
        results: what `evaluate` returned.
        replacement: one of those evaluated; None is the first.
        quantity: "log_prob" of the target, its "log_odds" against a foil, or "kl" from the undisturbed prediction.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: for a replacement or quantity that was not evaluated; for results without curves, or without their
            areas.
    """
    whole = "prompt" in results and "replacement" in results
    known = [name for name in dict.fromkeys(results["replacement"] if whole else ()) if name]
    if not known:
        raise ValueError("there are no curves among these results: take what evaluate returned, with all its rows.")
    replacement = known[0] if replacement is None else replacement
    chosen = results[(results["replacement"] == replacement) & (results["quantity"] == quantity)]
    chosen = chosen[chosen["measure"].isin(_DRAWN)]
    if not len(chosen):
        raise ValueError(
            f"there are no curves of {quantity!r} with the replacement {replacement!r}: the replacements are "
            f'{", ".join(map(repr, known))}, the quantities "log_prob", "kl" and, with foils, "log_odds".'
        )
    for scope, rows in chosen.groupby("scope", sort=False):
        missing = [name for name in _DRAWN if name not in set(rows["measure"])]
        if missing:
            raise ValueError(f"{scope} has no {missing[0]!r} among these results: a plot takes {', '.join(_DRAWN)}.")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5.5), layout="constrained")
    table = summary(chosen)
    unit = _UNITS[quantity]
    texts = {"deletion": f"taken: {unit}, nats", "insertion": f"given back: {unit}, nats"}
    for axes, (measure, text) in zip(figure.subplots(1, 2), texts.items(), strict=True):
        for scope in dict.fromkeys(table["scope"]):
            rows = table[table["scope"] == scope]
            curve, area = rows[rows["measure"] == measure], rows[rows["measure"] == f"{measure} area"].iloc[0]
            label = f"{scope}  {area['mean']:.2f} ({area['low']:.2f} to {area['high']:.2f})"
            axes.plot(100 * curve["fraction"], curve["mean"], label=label, marker=".")
            axes.fill_between(100 * curve["fraction"], curve["low"], curve["high"], alpha=0.15, linewidth=0)
        replaced = "replaced" if measure == "deletion" else "put back"
        axes.set(title=f"{measure} ({replacement})", xlabel=f"first tokens {replaced}, %", ylabel=text)
        axes.legend(fontsize=7, title="area", title_fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.14))
        axes.spines[["top", "right"]].set_visible(False)
    return figure
