"""The table of long translations: its lexicon stands in the texts, and its diagonal is counted right."""

from typing import Any

import pytest
import torch

import tl_scopes as tls
from tests.benchmarks import translation_table as table
from tests.benchmarks import translations


def test_the_lexicon_stands_in_the_texts() -> None:
    for text in translations.read():
        assert len(text.pairs) > 50
        whole, without = text.prompt + text.answer, "".join(text.alone)
        for pair in text.pairs:
            assert whole[slice(*pair.source)] == pair.words[0]
            assert whole[slice(*pair.translated)] == without[slice(*pair.alone)] == pair.words[1]
            assert text.source[pair.passage][0] <= pair.source[0] < text.source[pair.passage][1]
            assert pair.source < pair.translated
            assert pair.translated[0] >= len(text.prompt)
    first, whole = translations.read(1)[0], translations.read()[0]
    assert whole.prompt.startswith(first.prompt[: first.source[0][1]])
    assert {pair.passage for pair in first.pairs} == {0}


def test_a_word_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="'sole' is not a word of the passage 'la selva': mend the lexicon"):
        translations.found("sole", "la selva", 0)


def test_leading_fisher(tiny: Any) -> None:
    """The scores are the roots of those of rank 1, for each token of an answer."""
    lin = tls.linearize(tiny, "German: der kleine Hund sieht die rote Katze. English:", answer=" the small dog")
    for k in range(3):
        part = lin.part(k, k + 1)
        one, other = table.LeadingFisher()(part), tls.FisherScope(rank=1)(part)
        torch.testing.assert_close(one.scores, other.scores.sqrt().to(one.scores), rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def record(tiny: Any) -> dict[str, Any]:
    """What is found of a sentence that the bundled model translates."""
    text = translations.laid_out(
        {
            "name": "a sentence",
            "language": "German",
            "between": True,
            "passages": [
                {
                    "source": "der kleine Hund sieht die rote Katze.",
                    "translation": "the small dog sees the red cat",
                    "pairs": [("kleine", "small"), ("Hund", "dog"), ("rote", "red"), ("Katze", "cat")],
                }
            ],
        }
    )
    found: dict[str, Any] = {}
    table.measured(tiny, text, found, lambda: None, whole=True)
    return found


def test_a_sentence(record: dict[str, Any]) -> None:
    """The rows are those of the translated words, the columns the source words, and shares sum to 1."""
    assert [record["source"][i] for i in record["columns"]] == ["kleine", "Hund", "rote", "Katze"]
    assert [record["answer"][k].strip() for k in record["rows"]] == ["small", "dog", "red", "cat"]
    assert len(record["shares"]["Temperature"]) == 7 > len(record["shares"]["Semantic"]) == 4
    for rows in record["shares"].values():
        for shares in rows.values():
            assert len(shares) == len(record["source"]) + 2
            assert sum(shares) == pytest.approx(table.SCALE, abs=10)
    assert table.gain(record).mean() > 1
    told = table.table([record])
    assert all(f"| {name} |" in told for name in table.QUESTIONS)


def test_the_diagonal_of_a_model_that_translates(record: dict[str, Any]) -> None:
    found = table.Diagonal(record, "Semantic, linear")
    assert (found.on > found.swapped).all()
    assert found.wins.mean() > 0.9
    assert found.first > 0.7


def test_no_diagonal() -> None:
    """Rows that are all alike have none, however strong a column is; a diagonal is what the pairing adds."""
    rows = {str(k): [700, 200, 100, 0, 0] for k in range(3)}
    record = {
        "source": ["a", "b", "c"],
        "rows": [0, 1, 2],
        "columns": [0, 1, 2],
        "passages": [0, 0, 0],
        "shares": {"q": rows},
    }
    found = table.Diagonal(record, "q")
    assert float((found.on - found.swapped).mean()) == pytest.approx(0)
    assert float(found.wins.mean()) == pytest.approx(0.5)
    assert found.first == pytest.approx(1 / 3)
    for k in range(3):
        rows[str(k)] = [1000 if i == k else 0 for i in range(3)] + [0, 0]
    found = table.Diagonal(record, "q")
    assert float((found.on - found.swapped).mean()) == pytest.approx(0.1)
    assert float(found.wins.mean()) == found.first == 1
