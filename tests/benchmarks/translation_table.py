"""Does influence follow a long translation word by word? `python -m tests.benchmarks.translation_table FOLDER`.

The paper's case of Dante (its figure 6): a text of more than 400 tokens with its translation, where each row is one
token of the translation. The model reads source and translation as they stand (teacher forcing), and each scope is
asked what moves the first token of each translated word. It writes what it finds to `tests/data/translation.json`,
which the notebook on it shows; it goes on where it was stopped. Without a folder it prints what is stored there.
For the two texts on SmolLM2-135M-Instruct it asks some 1,150 rows of about 450 tokens, at about 2 seconds of one core
each: .7 forward passes, and for Fisher the leading direction besides. `--questions`, `--texts` and `--file` measure a
part.

What is measured, on the words of a lexicon by hand (`tests.benchmarks.translations`), is the diagonal: the share that
the source word has in the row of its translation, among all words in front. Its control are the same rows and the same
columns with the pairing swapped: for two pairs (r, s) and (r', s') of one passage, the cells (r, s') and (r', s), which
are as far along in both texts, and whose rows and columns are as strong.

Command: python -m tests.real.model && python -m tests.benchmarks.translation_table tests/real/.model
"""

import argparse
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

import tl_scopes as tls
from tests.benchmarks.translations import Translation, read
from tl_scopes import models
from tl_scopes.bootstrap import bootstrap
from tl_scopes.jacobian.fisher_information import fisher_products
from tl_scopes.results.units import offsets

FILE = Path(__file__).parent.parent / "data" / "translation.json"
SCALE = 10_000
"""Shares are stored as integers, in parts of this."""


class LeadingFisher(tls.JacobianScope):
    """The leading direction of the Fisher information, the paper's truncation to rank 1: score_t = √λ ‖uᵀ J_t‖.

    The scores are the roots of `FisherScope(rank=1)`'s, for a third of its cost, since what the truncation leaves out
    is not estimated here.
    """

    def cotangents(self, lin: tls.Linearization) -> Float[Tensor, "1 d_of"]:
        """√λ u, by subspace iteration."""
        block = torch.randn(6, len(lin.readout), generator=torch.Generator().manual_seed(0)).to(lin.readout)
        for _ in range(8):
            block = torch.linalg.qr(fisher_products(lin, models.precise(block)).T).Q.T
        products = fisher_products(lin, block)
        eigenvalues, columns = torch.linalg.eigh((block @ products.T + products @ block.T) / 2)
        return eigenvalues[-1:].sqrt() * (columns[:, -1] @ block)[None]

    def unit(self, lin: tls.Linearization) -> str:
        return f"√nat per {lin.unit}"


QUESTIONS: dict[str, tuple[tls.Scope, str | None]] = {
    "Temperature": (tls.TemperatureScope(), None),
    "Fisher": (LeadingFisher(), None),
    "Semantic": (tls.SemanticScope(), None),
    "Temperature, linear": (tls.TemperatureScope(), "linear"),
    "Fisher, linear": (LeadingFisher(), "linear"),
    "Semantic, linear": (tls.SemanticScope(), "linear"),
    "relevance, linear": (tls.RelevanceScope(), "linear"),
}
WHOLE = ("Temperature", "Fisher")
"""These have a row for every token, as in the paper's figure; the others for the words of the lexicon alone."""


class Layout:
    """Where the words of a source and of its translation stand among the tokens of prompt and answer.

    Attributes:
        source: the words of the source.
        spans: for each, its positions, from and to.
        said: the positions of each other word, from and to.
        rows: for each pair of the lexicon, which token of the answer is asked: the first of the translated word.
        columns: for each pair, which source word it is.
    """

    def __init__(self, text: Translation, prompt: Sequence[str], answer: Sequence[str]) -> None:
        whole, places = offsets([*prompt, *answer])
        skipped = whole.index(text.prompt[:40])
        self.source: list[str] = []
        self.spans: list[tuple[int, int]] = []
        self.said: list[tuple[int, int]] = []
        taken, starts = 0, []
        for one in re.finditer(r"\w+", whole[skipped:]):
            a, b = one.start() + skipped, one.end() + skipped
            inside = [i for i, (start, stop) in enumerate(places) if start < b and stop > a and i >= taken]
            if not inside:  # the token before holds this word too
                continue
            taken = inside[-1] + 1
            of_source = any(start <= one.start() < stop for start, stop in text.source)
            (self.spans if of_source else self.said).append((inside[0], taken))
            if of_source:
                self.source.append(one[0])
                starts.append(one.start())
        self.rows = [token_of(places, skipped + pair.translated[0]) - len(prompt) for pair in text.pairs]
        self.columns = [max(i for i, start in enumerate(starts) if start <= pair.source[0]) for pair in text.pairs]

    def shares(self, answer: tls.Attribution) -> list[int]:
        """The share of each source word, of all other words so far, and of all else; BOS is left out."""
        seen = answer.positions[-1] + 1
        spans, said = ([span for span in some if span[1] <= seen] for some in (self.spans, self.said))
        words = answer.without([0]).by(sorted([*spans, *said]))
        size = dict(zip(words.positions, (words.share.abs() * SCALE).tolist(), strict=True))
        each = [size.pop(start) for start, _ in spans] + [0.0] * (len(self.spans) - len(spans))
        return [round(one) for one in (*each, sum(size.pop(start) for start, _ in said), sum(size.values()))]


def token_of(places: Sequence[tuple[int, int]], character: int) -> int:
    """The token that holds a character."""
    return next(i for i, (_, stop) in enumerate(places) if stop > character)


def measured(
    model: Any,
    text: Translation,
    record: dict[str, Any],
    keep: Any,
    whole: bool,
    questions: Sequence[str] = tuple(QUESTIONS),
    at_once: int = 8,
) -> None:
    """Fill in the record of a text, and keep it after every few rows."""
    began = time.process_time()
    plain = tls.linearize(model, text.prompt, answer=text.answer)
    forward = time.process_time() - began
    layout = Layout(text, plain.str_tokens[: plain.prompt_length], [one.text for one in plain.answer.tokens])
    if not record:
        alone = tls.linearize(model, text.alone[0], answer=text.alone[1])
        _, places = offsets([one.text for one in alone.answer.tokens])
        bare = [token_of(places, pair.alone[0] - len(text.alone[0])) for pair in text.pairs]
        record |= {
            "name": text.name,
            "tokens": [plain.prompt_length, plain.answer.steps],
            "source": layout.source,
            "answer": [one.text for one in plain.answer.tokens],
            "passages": [pair.passage for pair in text.pairs],
            "words": [pair.words for pair in text.pairs],
            "rows": layout.rows,
            "columns": layout.columns,
            "log_p": _log_probs(plain, layout.rows),
            "log_p_alone": _log_probs(alone, bare),
            "says": _said(model, plain, layout.rows),
            "says_alone": _said(model, alone, bare),
            "generated": tls.generate(model, text.prompt, 60).text,
            "shares": {},
            "seconds": {"forward": round(forward, 1)},
        }
        keep()
    everything = [*layout.rows, *(k for k in range(plain.answer.steps) if k not in layout.rows)]
    jobs = [(name, layout.rows) for name in questions] + [(name, everything) for name in WHOLE if whole]
    for name, rows in jobs:
        scope, rules = QUESTIONS[name]
        found = record["shares"].setdefault(name, {})
        missing = [k for k in dict.fromkeys(rows) if str(k) not in found]
        if not missing:
            continue
        lin, began = plain.under(rules) if rules else plain, time.process_time()
        for first in range(0, len(missing), at_once):
            some = missing[first : first + at_once]
            answers = scope.ask([lin.part(k, k + 1) for k in some])
            found |= {str(k): layout.shares(answer) for k, answer in zip(some, answers, strict=True)}
            keep()
        record["seconds"][name] = round((time.process_time() - began) / len(missing), 2)
        keep()


def _log_probs(lin: Any, rows: Sequence[int]) -> list[float]:
    ids = torch.tensor([lin.answer.tokens[row].id for row in rows])
    return [round(one, 3) for one in lin.logits[list(rows)].log_softmax(-1)[range(len(rows)), ids].tolist()]


def _said(model: Any, lin: Any, rows: Sequence[int]) -> list[str]:
    return [models.token_text(model, int(lin.logits[row].argmax())) for row in rows]


# -- the diagonal -----------------------------------------------------------------------------------------------------


class Diagonal:
    """How much a translated word owes to its source word, by one scope, over the words that were asked.

    Attributes:
        on: [pair], the share of the source word.
        swapped: [pair], the mean of the cells in which the pairing is swapped with another pair of the passage.
        wins: [pair], how often the first is larger than these.
        source: the mean share of the whole source in these rows.
        first: how often the source word is first of all source words.
    """

    def __init__(self, record: dict[str, Any], question: str) -> None:
        shares = record["shares"][question]
        asked = [i for i, row in enumerate(record["rows"]) if str(row) in shares]
        table = torch.tensor([shares[str(record["rows"][i])] for i in asked]).double() / SCALE  # [pair word]
        of_source = table[:, : len(record["source"])]
        columns, passages = (torch.tensor(record[name])[asked] for name in ("columns", "passages"))
        cells = of_source[:, columns]  # [pair pair]: the row of one, the column of another
        self.on = cells.diagonal()
        beside = (passages[:, None] == passages) & (columns[:, None] != columns)
        count = 2 * beside.sum(1).clamp(min=1)
        self.swapped = ((cells + cells.T) * beside).sum(1) / count
        mine = self.on[:, None]
        larger = sum((mine > one).double() + (mine == one).double() / 2 for one in (cells, cells.T))
        self.wins = (larger * beside).sum(1) / count
        self.source = float(of_source.sum(1).mean())
        self.first = float((of_source.amax(1) <= self.on).double().mean())

    def __str__(self) -> str:
        return (
            f"{len(self.on)} | {self.on.mean():.1%} | {interval(self.on - self.swapped)} | "
            f"{interval(self.wins, '.0%')} | {self.first:.0%} | {self.source:.0%}"
        )


def interval(values: Float[Tensor, " word"], form: str = "+.1%", draws: int = 4000) -> str:
    """The mean, and the middle 95% of means over words drawn with replacement."""
    mean, low, high, _ = bootstrap(values[:, None], 0.95, draws, seed=0)
    return f"{mean.item():{form}} ({low.item():{form}} to {high.item():{form}})"


def gain(record: dict[str, Any]) -> Float[Tensor, " word"]:
    """By how much the source makes each word of the lexicon likelier, in nats, at its first token."""
    return torch.tensor(record["log_p"]).double() - torch.tensor(record["log_p_alone"]).double()


def right(record: dict[str, Any], what: str) -> float:
    """How many of the words of the lexicon are what the model would say."""
    words = [record["answer"][row] for row in record["rows"]]
    return sum(one == other for one, other in zip(record[what], words, strict=True)) / len(words)


def table(records: list[dict[str, Any]]) -> str:
    """What the model knows of each text, and the diagonal by each scope."""
    lines = []
    for record in records:
        found = gain(record)
        lines += [
            f"{record['name']}: {record['tokens'][0]} + {record['tokens'][1]} tokens, {len(found)} words of the "
            f"lexicon. The source makes them likelier by {interval(found, '.2f')} nats, "
            f"{(found > 0).double().mean():.0%} of them; {right(record, 'says'):.0%} are what the model would say, "
            f"{right(record, 'says_alone'):.0%} without the source.",
            f"Left to itself it says {record['generated'][:160]!r}.",
            "",
            "| scope | words | on the source word | above the swapped pairing | larger than swapped (chance 50%) | "
            f"first of {len(record['source'])} source words | on the source |",
            "|-|-|-|-|-|-|-|",
            *(f"| {name} | {Diagonal(record, name)} |" for name, rows in record["shares"].items() if rows),
            "",
            f"Seconds of one core for each row: {record['seconds']}.",
            "",
        ]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    """Measure, store, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", help="a model's folder; without it, what is stored is shown")
    parser.add_argument("--passages", type=int, help="only the first so many of each text")
    parser.add_argument("--texts", type=int, nargs="+", help="only these, counted from 0")
    parser.add_argument("--whole", type=int, nargs="*", default=[0], help="a row for every token of these texts")
    parser.add_argument("--questions", nargs="+", default=list(QUESTIONS), choices=list(QUESTIONS))
    parser.add_argument("--anew", action="store_true", help="forget what is stored: for another model")
    parser.add_argument("--file", type=Path, default=FILE)
    options = parser.parse_args()
    records = json.loads(options.file.read_text(encoding="utf-8")) if options.file.exists() and not options.anew else []
    if options.model:
        model = models.load(options.model)
        texts = read(options.passages)
        records = [next((one for one in records if one["name"] == text.name), {}) for text in texts]
        for n in options.texts or range(len(texts)):

            def keep() -> None:
                stored = [one for one in records if one]
                options.file.write_text(json.dumps(stored, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")

            measured(model, texts[n], records[n], keep, n in options.whole, options.questions)
    print(table([one for one in records if one]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
