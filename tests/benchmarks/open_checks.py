"""The first open checks of the Jacobian Scopes paper (arXiv:2601.16407) on a real model: `python -m
tests.benchmarks.open_checks --model FOLDER`, some forty minutes for SmolLM2-135M-Instruct on one idle core.

    translation  Temperature Scope against Fisher Scope on a long translation prompt: what they cost, whether they rank
                 alike, and where their scores sit
    sinks        how much the first tokens get in every scope, on 50 diverse prompts, and what the corrections change
    linearity    how far the first order holds at the same prompts, contradictory instructions among them

What is measured goes into `tests/data/open_checks.json`, from which the notebook on the open checks draws its tables;
without a model what is stored there is printed. What the file has already is not measured again, so that a run that was
interrupted goes on where it stopped.

Command: python -m tests.real.model && python -m tests.benchmarks.open_checks --model tests/real/.model
"""

import argparse
import json
import math
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

import tl_scopes as tls
from tests.benchmarks.setting import CLOCK
from tests.benchmarks.translations import DANTE
from tl_scopes import models
from tl_scopes.bootstrap import bootstrap
from tl_scopes.rank_correlation import spearman
from tl_scopes.scopes.baselines import AttentionRollout, GradientTimesInput, LeaveOneOut

FILE = Path(__file__).parent.parent / "data" / "open_checks.json"
DIVERSE = Path(__file__).with_name("diverse.json")
"""Fifty prompts of ten kinds, written for this, in turns, so that the first of them are diverse too. Contradictory
instructions have a consistent counterpart."""
SECTIONS = ("translation", "sinks", "linearity")
_SHORT = 512
"""Up to so many tokens the default Fisher Scope is asked too, and the graph is kept whole."""

Record: TypeAlias = dict[str, Any]


class Prompt(NamedTuple):
    """One of the diverse prompts.

    Attributes:
        kind: what sort of text it is.
        prompt: the text, or the messages of a chat.
        consistent: for contradictory instructions the same text without the contradiction.
    """

    kind: str
    prompt: Any
    consistent: str | None = None


def diverse() -> list[Prompt]:
    """The fifty prompts."""
    written = json.loads(DIVERSE.read_text(encoding="utf-8"))
    return [Prompt(one["kind"], one.get("chat", one.get("text")), one.get("consistent")) for one in written]


def linearized(model: Any, prompt: Any) -> tls.Linearization:
    """The model at a prompt; a chat is written out in words where the tokenizer has no template for it."""
    if isinstance(prompt, list) and not getattr(models.tokenizer_of(model), "chat_template", None):
        prompt = "\n".join(f"{one['role'].capitalize()}: {one['content']}" for one in prompt) + "\nAssistant:"
    return tls.linearize(model, prompt)


def named(prompt: Any) -> str:
    """How a prompt is called in the file."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)


# -- translation ------------------------------------------------------------------------------------------------------


class Poem(NamedTuple):
    """A translation prompt: lines of Italian, then their English, up to before the last word of a line.

    Attributes:
        ids: the token ids.
        region: for each token "first" (BOS), "source", "translation", or "frame" (what stands around both).
        line: for each token the number of its line in the poem; −1 for those of no line.
        asked: the number of the line whose last word comes next.
        following: the id of the token that comes next in Longfellow's translation.
    """

    ids: list[int]
    region: list[str]
    line: list[int]
    asked: int
    following: int


def poem(model: Any, lines: int, asked: int) -> Poem:
    """The prompt with so many lines of Italian, broken off before the last word of an English line."""
    pairs = json.loads(DANTE.read_text(encoding="utf-8"))[:lines]
    tokenizer = models.tokenizer_of(model)
    pieces = [("frame", -1, "Italian:\n"), *(("source", i, f"{italian}\n") for i, (italian, _) in enumerate(pairs))]
    pieces += [("frame", -1, "\nEnglish:\n")]
    pieces += [("translation", i, f"{english}\n") for i, (_, english) in enumerate(pairs[:asked])]
    begun, last = pairs[asked][1].rsplit(" ", 1)
    pieces += [("translation", asked, begun)]
    bos = getattr(tokenizer, "bos_token_id", None)
    found = Poem([] if bos is None else [bos], ["first"][: bos is not None], [-1][: bos is not None], asked, 0)
    for region, line, text in pieces:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        found.ids.extend(ids)
        found.region.extend([region] * len(ids))
        found.line.extend([line] * len(ids))
    return found._replace(following=tokenizer(f" {last}", add_special_tokens=False)["input_ids"][0])


def lines_for(model: Any, length: int) -> int:
    """How many lines make a prompt of nearly this many tokens, and not more."""
    most = len(json.loads(DANTE.read_text(encoding="utf-8")))
    return max(n for n in range(2, most + 1) if n == 2 or len(poem(model, n, n - 1).ids) <= length)


def translation(model: Any, lengths: Iterable[int], known: set[str]) -> Iterator[Record]:
    """One record for each place that is asked about: the costs, the ranks in common, and where the scores sit.

    At short lengths also the default `FisherScope()`, against which the two cheap ones are held.
    """
    for length in lengths:
        lines = lines_for(model, length)
        # The last line, with the whole prompt before it, and where that is not too dear some in the middle.
        most = 4 if length <= _SHORT else 2 if length <= 1500 else 1
        for asked in sorted({lines * (most - i) // most - 1 for i in range(most)}):
            if (name := f"{length} tokens, line {asked}") not in known:
                yield {"name": name, "length": length, **of_poem(model, poem(model, lines, asked), length <= _SHORT)}


def of_poem(model: Any, given: Poem, thorough: bool) -> Record:
    """What the scopes say at one place of the poem, and what each cost in forward passes."""
    scopes: dict[str, tls.Scope] = {
        "Temperature": tls.TemperatureScope(),
        "Fisher, rank 1": tls.FisherScope(rank=1),
        "Fisher, 4 probes": tls.FisherScope(probes=4),
    }
    if thorough:
        scopes["Fisher"] = tls.FisherScope()
    checkpoint = len(given.ids) > _SHORT
    tokens = torch.tensor([given.ids], device=next(model.parameters()).device)
    forward = [seconds(lambda: models.predict(model, tokens))[1]]
    lin, linearize_seconds = seconds(lambda: tls.linearize(model, given.ids, checkpoint=checkpoint))
    answers, spent = {}, {}
    for name, scope in scopes.items():
        answers[name], spent[name] = seconds(lambda scope=scope: scope(lin))
        forward.append(seconds(lambda: models.predict(model, tokens))[1])
    bare = statistics.median(forward)
    best = lin.token()
    regions = torch.tensor([REGIONS.index(one) for one in given.region])
    lines = torch.tensor(given.line)
    source = regions == REGIONS.index("source")
    # The pieces are ranked apart too: in the whole prompt most tokens get next to nothing in any scope.
    return {
        "tokens": len(given.ids),
        "asked": given.asked,
        "lines": int(lines.max()) + 1,
        "checkpoint": checkpoint,
        "says": [best.text, rounded(float(lin.log_probs[best.id].exp()))],
        "probability": rounded(float(lin.log_probs[given.following].exp())),
        "forward_seconds": rounded(bare),
        "linearize": rounded(linearize_seconds / bare),
        "cost": {name: rounded((linearize_seconds + each) / bare) for name, each in spent.items()},
        "trace_share": rounded(float(answers["Fisher, rank 1"].trace_share)),
        "score_share": rounded(float(answers["Fisher, rank 1"].score_share)),
        "spearman": {pair: rounded(r) for pair, r in pairs_of(answers, slice(None))},
        "spearman in the source": {pair: rounded(r) for pair, r in pairs_of(answers, source)},
        "even": sums(torch.full((len(regions),), 1 / len(regions)), regions, lines, given.asked),
        "share": {name: sums(answer.share, regions, lines, given.asked) for name, answer in answers.items()},
        "by line": {name: by_line(answer.share, source, lines) for name, answer in answers.items()},
        "top": {
            name: [
                [one.token, rounded(one.share), given.region[one.position], given.line[one.position]]
                for one in answer.top(8)
            ]
            for name, answer in answers.items()
        },
    }


REGIONS = ("first", "frame", "source", "translation")


def sums(share: Tensor, region: Tensor, line: Tensor, asked: int) -> dict[str, float]:
    """The share of each part of the prompt; of the source also that of the line asked about, and of the lines beside;
    of the translation also that of the line that is being written.
    """
    found = {name: share[region == i].sum() for i, name in enumerate(REGIONS)}
    source, written = region == REGIONS.index("source"), region == REGIONS.index("translation")
    found["source line"] = share[source & (line == asked)].sum()
    found["source line and those beside"] = share[source & ((line - asked).abs() <= 1)].sum()
    found["line being written"] = share[written & (line == asked)].sum()
    return {name: rounded(float(value)) for name, value in found.items()}


def by_line(share: Tensor, source: Tensor, line: Tensor) -> list[float]:
    """The share of each line of the source."""
    return [rounded(float(share[source & (line == i)].sum())) for i in range(int(line[source].max()) + 1)]


def pairs_of(answers: dict[str, tls.Attribution], some: Any) -> Iterator[tuple[str, float]]:
    """Spearman's rank correlation of each scope with those after it, over some tokens."""
    names = list(answers)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            yield f"{one} / {other}", spearman(answers[one].scores[some], answers[other].scores[some])


def seconds(work: Callable[[], Any]) -> tuple[Any, float]:
    """What a function returns, and how long it computed."""
    start = CLOCK()
    return work(), CLOCK() - start


# -- sinks ------------------------------------------------------------------------------------------------------------

SCOPES: dict[str, tls.Scope] = {
    "Semantic": tls.SemanticScope(),
    "Semantic, log_prob": tls.SemanticScope(quantity="log_prob"),
    "Temperature": tls.TemperatureScope(),
    "Fisher": tls.FisherScope(probes=24),
    "Spectral": tls.SpectralScope(rank=8),
    "gradient x input": GradientTimesInput(),
    "relevance, linear rules": tls.UnderRulesScope(tls.RelevanceScope(), rules="linear"),
    "relevance, lookup rules": tls.UnderRulesScope(tls.RelevanceScope(), rules="lookup"),
    "attention rollout": AttentionRollout(),
    "leave-one-out": LeaveOneOut(),
    "frozen attention": tls.FrozenAttentionScope(tls.SemanticScope()),
    "position corrected": tls.PositionCorrectedScope(tls.SemanticScope(), shuffles=4),
}
"""What is asked at every prompt."""
DEAR: dict[str, tls.Scope] = {
    "path-integrated": tls.PathIntegratedScope(steps=24, start=0.3),
    "HETA": tls.HetaScope(probes=1),
}
"""What is asked at every fifth prompt, since it costs a hundred forward passes and more."""


def sinks(model: Any, prompts: Iterable[Prompt], known: set[str]) -> Iterator[Record]:
    """One record for each prompt: what BOS and the token after it draw and get, and what becomes of the prediction."""
    for number, (kind, prompt, _) in enumerate(prompts):
        if (name := named(prompt)) in known:
            continue
        lin = linearized(model, prompt)
        report = tls.sink_report(lin, SCOPES | (DEAR if number % 5 == 0 else {}), early=2)
        scores = {scope: answer.scores.abs() for scope, answer in report.answers.items()}
        lead = scores["leave-one-out"][1:]
        heads = {(head.layer, head.head) for head in report.sink_heads if head.position == 0}
        norms = [head.value_norm for head in report.sink_heads if head.position == 0]
        yield {
            "name": name,
            "kind": kind,
            "tokens": len(report.tokens),
            "first": list(report.str_tokens[:2]),
            "attention": [rounded(one) for one in report.mean_mass[:2].tolist()],
            "uniform": rounded(float(report.uniform[0])),
            "sink heads": rounded(len(heads) / report.mass[:, :, 0].numel()),
            "value norm": rounded(statistics.median(norms)) if norms else None,
            "kl": {way: [rounded(one) for one in kl] for way, kl in zip(_WAYS, report.kl.tolist(), strict=True)},
            "stays": {
                way: said[0] == report.prediction.token.text
                for way, said in zip(_WAYS, report.likeliest, strict=True)
            },
            # Magnitudes, since some scopes have signs; and where each token stands among those after BOS, 0 on top.
            "share": {scope: [rounded(one) for one in (s / s.sum())[:2].tolist()] for scope, s in scores.items()},
            "rank": {scope: rounded(float(place(s[1:]))) for scope, s in scores.items()},
            "leave-one-out": {scope: rounded(spearman(s[1:], lead)) for scope, s in scores.items()},
        }  # fmt: skip


_WAYS = ("removed", "masked", "replaced", "zeroed")


def place(scores: Tensor) -> float:
    """Where the first of some scores stands among them: 0 on top, 1 at the bottom."""
    return float((scores > scores[0]).sum()) / max(1, len(scores) - 1)


# -- linearity --------------------------------------------------------------------------------------------------------


def linear(model: Any, prompts: Iterable[Prompt], known: set[str]) -> Iterator[Record]:
    """One record for each prompt, and for the consistent counterpart of a contradictory one."""
    for kind, prompt, consistent in prompts:
        for text, of_kind in ((prompt, kind), (consistent, "consistent instructions")):
            if text is None or (name := named(text)) in known:
                continue
            lin = linearized(model, text)
            answer = tls.SemanticScope()(lin)
            top = [one.position for one in answer.top(3)]
            report = tls.linearity(lin, tls.SemanticScope(), positions=top, directions=1)
            yield {
                "name": name,
                "kind": of_kind,
                "counterpart": named(prompt) if text is consistent else None,
                "tokens": len(lin.tokens),
                "top": list(report.str_tokens),
                "probability": rounded(report.probability or 0),
                "saturated": report.saturated,
                "distance": [rounded(one) for one in report.nearest_distance.tolist()],
                "nearest": list(report.nearest_token),
                "radius": [[rounded(one) for one in kind] for kind in report.radius.tolist()],
                "predicted": [[rounded(one) for one in kind] for kind in report.predicted_radius.tolist()],
            }


# -- tables -----------------------------------------------------------------------------------------------------------


def rounded(number: float) -> float:
    """Three digits that matter; infinity and NaN, which JSON does not know, become large and missing numbers."""
    return float(f"{number:.3g}") if math.isfinite(number) else (1e9 if number == math.inf else -1e9)


def interval(values: Iterable[float]) -> tuple[float, float, float]:
    """The mean over prompts, and its 95% bootstrap interval."""
    mean, low, high, _ = bootstrap(torch.tensor(list(values)).double()[:, None], 0.95, 2000, 0)
    return float(mean), float(low), float(high)


def told(values: Iterable[float], form: str = ".2f") -> str:
    """The mean with its interval, in words."""
    mean, low, high = interval(values)
    return f"{mean:{form}} ({low:{form}} to {high:{form}})"


def told_ratio(values: Iterable[float], form: str = ".2f") -> str:
    """The geometric mean with its interval, for ratios."""
    mean, low, high = (math.exp(one) for one in interval(math.log(max(value, 1e-9)) for value in values))
    return f"{mean:{form}} ({low:{form}} to {high:{form}})"


def of_translation(records: list[Record]) -> str:
    """What it cost, how alike the scopes rank, and where the scores sit, by length."""
    lines = ["| tokens | places | bare forward pass, s | linearise | Temperature | Fisher, rank 1 | Fisher, 4 probes |"
             " Fisher | Spearman Temperature / Fisher, rank 1 | / 4 probes | / Fisher |", "|-" * 11 + "|"]  # fmt: skip
    for length, some in grouped(records, "length"):
        cells = [f"{length}", f"{len(some)}"]
        cells += [f"{statistics.median(one[key] for one in some):.2f}" for key in ("forward_seconds", "linearize")]
        for name in ("Temperature", "Fisher, rank 1", "Fisher, 4 probes", "Fisher"):
            costs = [one["cost"][name] for one in some if name in one["cost"]]
            cells.append(f"{statistics.median(costs):.1f}" if costs else "")
        for name in ("Fisher, rank 1", "Fisher, 4 probes", "Fisher"):
            found = [one["spearman"].get(f"Temperature / {name}") for one in some]
            cells.append(f"{statistics.mean(found):.2f}" if None not in found else "")
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| tokens | scope | first | frame | source | translation | source line | and beside | this line |",
              "|-" * 9 + "|"]  # fmt: skip
    parts = (*REGIONS, "source line", "source line and those beside", "line being written")
    for length, some in grouped(records, "length"):
        for name in ("even", *some[0]["share"]):
            shares = [one["even"] if name == "even" else one["share"][name] for one in some]
            cells = [f"{statistics.mean(one[part] for one in shares):.1%}" for part in parts]
            lines.append(f"| {length} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def of_sinks(records: list[Record]) -> str:
    """Attention and shares on BOS and on the token after it, over an even share, and the interventions."""
    attention, uniform = ([one[key] for one in records] for key in ("attention", "uniform"))
    lines = [
        f"{len(records)} prompts. BOS draws {told([a[0] for a in attention])} of the attention, uniform "
        f"{told(uniform)}; {told([one['sink heads'] for one in records])} of the heads rest on it.",
        *(
            f"{way}: KL {statistics.median(one['kl'][way][0] for one in records):.3g} in the median, "
            f"{max(one['kl'][way][0] for one in records):.3g} at most; the likeliest token stays at "
            f"{sum(one['stays'][way] for one in records)} of {len(records)}"
            for way in _WAYS
        ),
        "",
        "| scope | prompts | share on BOS over an even share | on the token after it | its rank, 0 on top | Spearman "
        "with leave-one-out |",
        "|-" * 6 + "|",
    ]
    for name in (*SCOPES, *DEAR):
        some = [one for one in records if name in one["share"]]
        if not some:
            continue
        over = [[share * one["tokens"] for share in one["share"][name]] for one in some]
        cells = [told_ratio(share[i] for share in over) for i in (0, 1)]
        cells += [told(one["rank"][name] for one in some), told(one["leave-one-out"][name] for one in some)]
        lines.append(f"| {name} | {len(some)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def of_linearity(records: list[Record]) -> str:
    """The radius over the distance to the nearest other token, by kind of prompt, and what curvature predicts."""
    lines = ["| kind | prompts | radius / distance, median | range | geometric mean | predicted / measured, median |"
             " range |", "|-" * 7 + "|"]  # fmt: skip
    everything = [one for one in records if one["counterpart"] is None]
    for kind, some in [("all", everything), *grouped(records, "kind")]:
        reach = [reached(one) for one in some]
        ratio = [p / r for one in some for p, r in zip(one["predicted"][0], one["radius"][0], strict=True) if p > 0]
        lines.append(
            f"| {kind} | {len(some)} | {statistics.median(reach):.1%} | {min(reach):.1%} to {max(reach):.1%} | "
            f"{told_ratio(reach, '.1%')} | {statistics.median(ratio):.2f} | {min(ratio):.2f} to {max(ratio):.2f} |"
        )
    by_name = {one["name"]: reached(one) for one in records}
    pairs = [(by_name[one["counterpart"]], by_name[one["name"]]) for one in records if one["counterpart"] in by_name]
    if pairs:
        less = told_ratio(one / other for one, other in pairs)
        lines.append(f"\nContradictory over consistent, {len(pairs)} pairs: {less} times as far.")
    return "\n".join(lines)


def reached(record: Record) -> float:
    """How far of the way to the nearest other token the first order holds, steepest: the median of the tokens."""
    return statistics.median(
        min(r / d, 1e3) for r, d in zip(record["radius"][0], record["distance"], strict=True)
    )  # fmt: skip


def grouped(records: Iterable[Record], key: str) -> list[tuple[Any, list[Record]]]:
    """Records by what stands under a key, in the order in which they come."""
    found: dict[Any, list[Record]] = {}
    for one in records:
        found.setdefault(one[key], []).append(one)
    return list(found.items())


TABLES = {"translation": of_translation, "sinks": of_sinks, "linearity": of_linearity}


def main() -> None:
    """Measure, store, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model's folder or name; without it, what is stored is shown")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--lengths", nargs="+", type=int, default=[256, 1024, 2048], help="of the translation prompt")
    parser.add_argument("--prompts", type=int, default=50, help="how many of the diverse prompts")
    parser.add_argument("--into", type=Path, default=FILE)
    options = parser.parse_args()
    stored = json.loads(options.into.read_text(encoding="utf-8")) if options.into.exists() else {}
    if options.model:
        model = models.load(options.model)
        prompts = diverse()[: options.prompts]
        known = {section: {one["name"] for one in stored.get(section, ())} for section in SECTIONS}
        measured = {
            "translation": lambda: translation(model, options.lengths, known["translation"]),
            "sinks": lambda: sinks(model, prompts, known["sinks"]),
            "linearity": lambda: linear(model, prompts, known["linearity"]),
        }
        for section in options.only:
            for record in measured[section]():
                stored.setdefault(section, []).append(record)
                options.into.write_text(json.dumps(stored, ensure_ascii=False), encoding="utf-8")
                print(f"{section}: {record['name'][:60]!r}", flush=True)
    for section in options.only:
        if stored.get(section):
            print(f"\n{TABLES[section](stored[section])}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="the contributions of the tokens sum to")
    main()
