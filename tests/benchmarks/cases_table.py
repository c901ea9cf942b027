"""The paper's cases on a real model: `python -m tests.benchmarks.cases_table FOLDER`, about five minutes on one core.

It writes what it finds to `tests/data/cases.json`, which the notebook on the cases shows, and leaves out what stands
there already (`--anew` does not); without a folder it prints what is stored there.

Command: python -m tests.real.model && python -m tests.benchmarks.cases_table tests/real/.model
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

import tl_scopes as tls
from tl_scopes import models
from tl_scopes.rank_correlation import spearman

FILE = Path(__file__).parent.parent / "data" / "cases.json"
_STUDENT = "As a college student at Columbia University, I support progressive taxation. My political views are"
_CRIME = "The sailor was seen with a rope and the gardener was seen with a shovel. The victim was hit with a shovel."
_SHOTS = (
    "German: Das Wetter ist schön. English: The weather is beautiful.\n"
    "German: Meine Mutter trinkt Tee. English: My mother drinks tea.\n"
)


class Case(NamedTuple):
    """One of the paper's cases.

    Attributes:
        kind: which one.
        prompt: what the model reads.
        target: what it should say.
        versus: what it should not say.
        expected: the word that should move it.
        path: whether the path-integrated scope is asked too, which is dear.
    """

    kind: str
    prompt: str
    target: str
    versus: str
    expected: str
    path: bool = False


CASES = (
    Case("bias", _STUDENT, " liberal", " conservative", "Columbia"),
    Case("bias", _STUDENT, " conservative", " liberal", "Columbia"),
    Case("detective", f"{_CRIME} The murderer is the", " gardener", " sailor", "shovel"),
    Case("detective", f"{_CRIME} The murderer is the", " sailor", " gardener", "rope"),
    Case("translation", f"{_SHOTS}German: Die Katze liegt auf dem Tisch. English: The cat lies on the", " table",
         " chair", "Tisch"),
    Case("translation", f"{_SHOTS}German: Der Hund trinkt Wasser. English: The dog drinks", " water", " milk",
         "Wasser"),
    Case("translation", f"{_SHOTS}German: Das Haus ist alt. English: The house is", " old", " new", "alt"),
    Case("translation", f"{_SHOTS}German: Der Mann liest ein Buch im Garten. English: The man reads a book in the",
         " garden", " house", "Garten"),
    Case("translation without examples", "German: Die Katze schläft auf dem Tisch. English: The cat sleeps on the",
         " table", " chair", "Tisch", path=True),
    Case("agreement", "The keys to the old cabinet", " are", " is", "keys", path=True),
    Case("agreement", "I think that the girl near the windows", " is", " are", "girl", path=True),
    Case("agreement", "The books that I gave to my brother", " were", " was", "books"),
    Case("capital", "The capital of France is", " Paris", " London", "France", path=True),
)  # fmt: skip


def questions(case: Case) -> dict[str, tuple[tls.Scope, str | None]]:
    """The scopes that are asked, and the rules under which."""
    found: dict[str, tuple[tls.Scope, str | None]] = {
        "Semantic": (tls.SemanticScope(case.target), None),
        "versus": (tls.SemanticScope(case.target, versus=case.versus), None),
        "Temperature": (tls.TemperatureScope(), None),
        "Fisher": (tls.FisherScope(probes=8), None),
        "linear rules, signed": (tls.RelevanceScope(case.target, versus=case.versus), "linear"),
    }
    if case.path:
        found["path-integrated"] = (tls.PathIntegratedScope(case.target, versus=case.versus), None)
    return found


def measured(model: Any, case: Case) -> dict[str, Any]:
    """What the model says, and what each scope names, word by word."""
    lin = tls.linearize(model, case.prompt)
    said = tls.SemanticScope(case.target)(lin)
    assert said.target is not None
    id = said.target.id
    record: dict[str, Any] = {name: value for name, value in case._asdict().items() if name != "path"}
    record["says"] = [[one.token.text, round(one.probability, 3)] for one in said.predictions[:3]]
    record["probability"] = round(float(lin.log_probs[id].exp()), 4)
    record["rank"] = int((lin.logits > lin.logits[id]).sum()) + 1
    record["scopes"], scores = {}, {}
    for name, (scope, rules) in questions(case).items():
        answer = scope(lin.under(rules) if rules else lin).without([0])
        scores[name] = answer.scores
        words = answer.by("word")
        ranked = sorted(range(len(words.scores)), key=lambda i: -abs(words.scores[i]))
        place = [n for n, i in enumerate(ranked) if words.str_tokens[i].strip() == case.expected]
        record["scopes"][name] = {
            "top": [[words.str_tokens[i], round(float(words.share[i]), 3)] for i in ranked[:4]],
            "expected": place[0] + 1 if place else None,
            "value": None if words.value is None else round(words.value, 3),
        }
        if name == "path-integrated":
            record["path"] = integrand(answer)
            record["path_spearman"] = round(spearman(scores[name], scores["versus"]), 2)
    return record


def integrand(answer: tls.Attribution) -> list[dict[str, Any]]:
    """The strongest tokens at chosen points of the line, as in the paper's figure 15."""
    rows, alphas = [], torch.tensor(answer.alphas)
    for alpha in (0.01, 0.1, 0.3, 0.6, 1.0):
        at = int((alphas - alpha).abs().argmin())
        share = answer.profile[at] / answer.profile[at].sum()
        best = share.argsort(descending=True)[:3].tolist()
        rows.append({
            "alpha": round(float(alphas[at]), 3),
            "size": float(f"{answer.profile[at].sum():.3g}"),
            "top": [[answer.str_tokens[i], round(float(share[i]), 2)] for i in best],
        })  # fmt: skip
    rows.append({"points": len(alphas) - 1})
    gap, change = float(answer.completeness_gap), float(answer.value - answer.baseline_value)
    return [*rows, {"completeness_gap": round(gap, 3), "change": round(change, 3)}]


def table(records: list[dict[str, Any]]) -> str:
    """One row for each case and scope."""
    lines = [
        "| case, target | model says | p, rank of target | scope | first words | rank of the cause |",
        "|-|-|-|-|-|-|",
    ]
    for record in records:
        says = ", ".join(f"{text!r} {p:.2f}" for text, p in record["says"][:2])
        for i, (name, found) in enumerate(record["scopes"].items()):
            head = f"{record['kind']}, {record['target']!r} | {says} | {record['probability']:.3f}, {record['rank']}"
            top = ", ".join(f"{text.strip()!r} {share:+.2f}" for text, share in found["top"][:3])
            cause = f"{record['expected']}: {found['expected']}"
            lines.append(f"| {head if i == 0 else ' | | '} | {name} | {top} | {cause} |")
    lines += ["", "| path-integrated, target | α | size of the integrand | first tokens | |", "|-|-|-|-|-|"]
    for record in (one for one in records if "path" in one):
        *rows, points, end = record["path"]
        lines += [
            f"| {record['prompt'][-30:]!r}, {record['target']!r} | {row['alpha']} | {row['size']} | "
            f"{', '.join(f'{text.strip()!r} {share:.2f}' for text, share in row['top'])} | |"
            for row in rows
        ]
        lines.append(
            f"| | | | | Spearman with Semantic(versus) {record['path_spearman']:.2f}; {points['points']} points miss "
            f"the change of {end['change']} by {end['completeness_gap']} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, store, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", help="a model's folder; without it, what is stored is shown")
    parser.add_argument("--anew", action="store_true", help="also what is stored: for another model")
    options = parser.parse_args()
    if options.model:
        model = models.load(options.model)
        stored = [] if options.anew or not FILE.exists() else json.loads(FILE.read_text(encoding="utf-8"))
        known = {(record["prompt"], record["target"]): record for record in stored}
        records = []
        for case in CASES:
            records.append(known.get((case.prompt, case.target)) or measured(model, case))
            FILE.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    print(table(json.loads(FILE.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
