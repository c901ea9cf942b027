"""Maps with a row whose prediction is the token that all are compared with."""

from pathlib import Path
from typing import Any

import pytest

import tl_scopes as tls

PROMPT = "The keys to the old cabinet near the door"


@pytest.mark.parametrize(
    "scope",
    [
        tls.SemanticScope(versus=" cabinet"),
        tls.RelevanceScope(versus=" cabinet"),
        tls.PathIntegratedScope(versus=" cabinet", steps=50),
        tls.FrozenAttentionScope(tls.SemanticScope(versus=" cabinet")),
    ],
    ids=repr,
)
def test_the_difference_of_a_token_and_itself_is_zero(tiny: Any, scope: tls.Scope, tmp_path: Path) -> None:
    """The row says so, and the other rows are what they are in a map without it."""
    with pytest.warns(UserWarning, match=r"1 of 9 predictions \(after position 5\) is ' cabinet', with which all are"):
        found = tls.attribution_map(tiny, PROMPT, scope, target="next")
    assert len(found) == 9
    row = found[5]
    assert not row.scores.any()
    assert (row.value, row.quantity) == (0.0, "the difference of ' cabinet' and itself")
    assert "where the prediction is ' cabinet' itself, the difference is zero, and so is each score" in row.notes
    assert not row.share.any()
    numbers = {name for name, detail in found[4].details.items() if isinstance(detail, float)}
    assert all(row.details[name] == 0 for name in numbers)  # what is missing from a difference of zero
    alone = tls.attribute(tiny, PROMPT, scope, 4, answer=" old")
    assert found[4].target == alone.target
    assert found[4].value == pytest.approx(alone.value, abs=1e-4)
    assert found[4].scores.tolist() == pytest.approx(alone.scores.tolist(), rel=1e-3, abs=1e-4)
    assert tls.Attribution.from_json(row.to_json()).versus == row.target
    if row.grouping == "signed":
        assert not row.by("word").scores.any()
    found.to_html(tmp_path / "map.html")
    found.plot()


def test_the_likeliest_token_too(tiny: Any, tmp_path: Path) -> None:
    """In maps, pages and corpora, where every prediction is asked about."""
    scope = tls.SemanticScope(versus=" are")
    with pytest.warns(UserWarning, match=r"predictions \(after position .*9\) (is|are) ' are', with which"):
        found = tls.attribution_map(tiny, PROMPT, scope)
    assert len(found) == 10
    assert not found[-1].scores.any()
    assert found[1].scores.any()
    with pytest.warns(UserWarning, match="with which all are compared"):
        page = tls.explore(tiny, PROMPT, [scope, tls.TemperatureScope()])
    assert len(page.maps[0]) == len(page.maps[1])
    with pytest.warns(UserWarning, match="with which all are compared"):
        (kept,) = tls.attribute_corpus([PROMPT], tmp_path / "out", scope, predictions="every")
    assert isinstance(kept, tls.AttributionMap)
    assert not kept[-1].scores.any()


def test_where_no_row_is_left(tiny: Any) -> None:
    """As in a single answer, where the error says what to do."""
    for ask in (tls.attribute, tls.attribution_map):
        with pytest.raises(ValueError, match="same token, ' is': their difference is zero. Name another token to comp"):
            ask(tiny, PROMPT, tls.SemanticScope(" is", versus=" is"))
    likeliest = (
        "same token, ' are': their difference is zero. The target is what the model predicts here: name another token"
    )
    with pytest.raises(ValueError, match=likeliest):
        tls.attribute(tiny, PROMPT, tls.SemanticScope(versus=" are"))
    with pytest.raises(ValueError, match="same token, ' keys': their difference is zero"):
        tls.attribution_map(tiny, "The keys", tls.SemanticScope(versus=" keys"), target="next", prepend_bos=False)


def test_one_of_several_that_all_are_compared_with(tiny: Any, tmp_path: Path) -> None:
    """The row asks nothing, and the others are what they are alone."""
    scope = tls.SemanticScope(versus={" cabinet", " are"})
    with pytest.warns(UserWarning, match=r"2 of 10 .* are one of ' are\| cabinet', with which all are compared: noth"):
        found = tls.attribution_map(tiny, f"{PROMPT} are", scope, target="next")
    row = found[5]
    assert not row.scores.any()
    assert (row.value, row.quantity) == (None, None)
    assert "where the prediction is ' cabinet', one of those that it would be compared with" in row.notes[-1]
    alone = tls.attribute(tiny, PROMPT, tls.SemanticScope(" old", versus={" cabinet", " are"}), 4)
    assert found[4].value == pytest.approx(alone.value, abs=1e-4)
    found.to_html(tmp_path / "map.html")
    with pytest.raises(
        ValueError, match=r"versus ' are\| is' share the token ' are', which would be compared with its"
    ):
        tls.attribute(tiny, PROMPT, tls.SemanticScope(versus={" are", " is"}))
