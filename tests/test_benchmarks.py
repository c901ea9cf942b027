"""The scripts under tests/benchmarks run, at their smallest; what they measure is of no account here."""

import copy
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.benchmarks import by_hand, gpu, passes, precision, report, throughput
from tests.benchmarks.precision import Difference, differences
from tests.benchmarks.setting import hugging_face, setting
from tl_scopes import models
from tl_scopes.tiny import FOLDER


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the script for GPUs writes on a CPU."""
    folder = tmp_path_factory.mktemp("gpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(gpu, "BATCHES", (1, 2))
        gpu.main(["--minutes", "60", "--into", str(folder)])
    return folder


@pytest.fixture
def record(measured: Path) -> dict[str, Any]:
    return json.loads((measured / "gpu.json").read_text(encoding="utf-8"))


def test_the_gpu_script_measures_every_row(record: dict[str, Any]) -> None:
    wanted = {*gpu.rows(gpu.SMALL, 8), *gpu.batched_rows(gpu.SMALL), "bare forward pass"}
    rows = record["measured"]
    assert {row["attention"] for row in rows} == {"eager", "sdpa"}
    assert {row["tokens"] for row in rows} == {*gpu.SMALL.tokens, f"to {gpu.SMALL.batched}"}
    # The batches of the test are smaller than those of the script, whose rows are named by them.
    assert {row["name"] for row in rows} >= {name for name in wanted if "batches of" not in name}
    failed = {row["name"]: row["note"] for row in rows if row["seconds"] is None and row["note"] != gpu.NOT_THERE}
    assert not failed


def test_its_tables_say_what_was_not_measured(measured: Path) -> None:
    text = (measured / "gpu.md").read_text(encoding="utf-8")
    for shape in gpu.SHAPES:
        assert f"**{shape}**: not measured." in text
        assert f"| {shape} | not measured | prompts x seconds for each / 3600 |" in text
    assert "**small, bfloat16, eager**, in forward passes" in text


def test_half_precision_is_compared_for_each_scope(record: dict[str, Any]) -> None:
    found = record["float32 against half"]
    assert [one["scope"] for one in found] == ["Semantic Scope", "Temperature Scope", "Fisher Scope"]
    assert all(one["dtype"] == "bfloat16" and 0 < one["error"] < 0.2 for one in found)


def test_hours_are_of_the_fastest_batch() -> None:
    rows = [{"shape": "1B", "name": f"{gpu.MANY} {size}", "seconds": each} for size, each in ((1, 0.02), (64, 0.009))]
    assert gpu.hours(rows, "1B") == "2.5 | 9 ms each, batches of 64"
    assert gpu.hours(rows, "8B").startswith("not measured")


@pytest.mark.parametrize(
    ("one", "said"),
    [
        ({"name": "linearize", "seconds": 0.2, "passes": 1.234, "bytes": 2**29, "note": ""}, "1.23 (0.5)"),
        ({"name": "bare forward pass", "seconds": 0.0123, "passes": 1.0, "bytes": None, "note": ""}, "12.3 ms"),
        ({"name": "linearize", "seconds": None, "passes": None, "bytes": None, "note": gpu.NO_MEMORY}, "out of memory"),
        ({"name": "linearize", "seconds": None, "passes": None, "bytes": None, "note": ""}, "not measured"),
    ],
)
def test_a_cell_says_its_number_or_why_there_is_none(one: dict[str, Any], said: str) -> None:
    assert gpu._cell(one) == said


def test_a_row_without_time_or_memory_or_library_says_so() -> None:
    def full() -> None:
        raise MemoryError

    run, nothing = gpu.Run(torch.device("cpu"), 1, None), None
    for row, taken in (
        (gpu.Row(lambda s: full), 1.0),
        (gpu.Row(lambda s: full), 1e9),
        (gpu.Row(lambda s: full, there=False), 1.0),
        (gpu.Row(lambda s: lambda: 1 / 0), 1.0),
    ):
        run.measure("x", gpu.Timed(row, taken), nothing, 1e-3, shape="1B")  # type: ignore[arg-type]
    notes = [one["note"] for one in run.measured]
    assert notes == [gpu.NO_MEMORY, gpu.NO_TIME, gpu.NOT_THERE, "ZeroDivisionError: division by zero"]


def test_a_shape_without_time_or_memory_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(gpu.Shape, "built", full)
    for minutes, note in ((1, gpu.NO_MEMORY), (0, gpu.NO_TIME)):
        run = gpu.Run(torch.device("cpu"), minutes, None)
        gpu.measured(run, "1B", gpu.SHAPES["1B"], torch.bfloat16, ("eager", "sdpa"))
        assert [(one["attention"], one["note"]) for one in run.measured] == [("eager", note), ("sdpa", note)]
        assert note in gpu.tables(run, ["1B"])


def test_a_gradient_by_hand_is_compared() -> None:
    small = setting(8, 64, 1)
    found = by_hand.measured(small.model, small.model, copy.deepcopy(small.hf), small.tokens[0], 1)
    assert found["by hand"] == (1, 1)
    assert len(found) == 5


def test_differences_between_precisions_are_of_ranks_and_of_the_largest_score() -> None:
    whole = [{"s": torch.tensor([1.0, 2.0, 4.0])}, {"s": torch.tensor([1.0, 2.0, 4.0])}]
    half = [{"s": torch.tensor([1.0, 2.0, 4.4])}, {"s": torch.tensor([4.0, 2.0, 1.0])}]
    (found,) = differences(torch.float16, "the weights as loaded", half, whole)
    record = found.record()
    assert found.correlations == (1.0, -1.0)
    assert record["largest error"] == pytest.approx(0.75)
    assert record["error"] == pytest.approx((0.1 + 0.75) / 2)
    assert record["another token first"] == 1
    assert "| 0.0000 (-1.000) | 43% (75%) | 1 of 2 |" in Difference.table([record])


def run(main: Callable[[], None], *arguments: str) -> None:
    """Run a script with these arguments; it may take one thread."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["script", *arguments])
        try:
            main()
        finally:
            torch.set_num_threads(threads)


def test_precision_puts_its_table_behind_its_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "costs.md"
    page.write_text("| other |\n\n`python -m tests.benchmarks.precision`:\n\n| old |\n| old |\n\nBehind it.\n")
    run(precision.main, "--count", "2", "--into", str(page))
    table = capsys.readouterr().out.split("\n\n", 1)[1].rstrip("\n")
    assert table.count("| the weights as loaded |") == table.count("| the rounded weights |") == 6
    assert page.read_text() == f"| other |\n\n`python -m tests.benchmarks.precision`:\n\n{table}\n\nBehind it.\n"


def test_costs_in_forward_passes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(passes, "LENGTHS", {8: 1, 12: 1})
    page = tmp_path / "costs.md"
    page.write_text("`python -m tests.benchmarks.passes`\n\n| old |\n\nBehind it.\n")
    run(passes.main, "--into", str(page))
    assert "\n\n| forward passes | 8 tokens | 12 tokens |\n|---|--:|--:|\n| Semantic" in capsys.readouterr().out
    assert page.read_text().count("\n| ") == 5
    assert page.read_text().endswith("\n\nBehind it.\n")


def test_the_baseline_is_without_a_bridge() -> None:
    """A bridge puts its own modules into the Hugging Face model, which then costs what the bridge does."""
    plain = hugging_face(FOLDER)
    assert {type(part).__module__.split(".")[0] for part in plain.modules()} == {"torch", "transformers"}
    inside = models.load(FOLDER).original_model
    assert "transformer_lens" in {type(part).__module__.split(".")[0] for part in inside.modules()}


def test_throughput_compares_with_what_is_installed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throughput, "find_spec", lambda name: None if name == "inseq" else find_spec(name))
    run(throughput.main, "--count", "3", "--batch", "2", "--rounds", "1")
    said = capsys.readouterr().out
    assert "tiny, 3 prompts of 6 to 40 tokens, batches of 2, 1 rounds" in said
    rows = [line.split(" | ") for line in said.splitlines() if line.startswith("| attribute") or "captum" in line]
    assert rows[0][2:] == ["1.00", "1.00 to 1.00 |"]
    assert len(rows) == (3 if find_spec("captum") else 1)


def test_what_is_timed_together_computes_the_same() -> None:
    pytest.importorskip("captum")
    hf, model = gpu.SMALL.built(torch.device("cpu"), torch.float32, "eager")
    prompts = [[3, 9, 30, 12], [5, 6, 7, 8, 9, 10, 11], [40, 41]]
    ours = throughput.ours(model, prompts, 2)()
    for by_length in (False, True):
        captums = throughput.captum_batches(hf, prompts, 2, by_length)()
        for own, other in zip(ours, captums, strict=True):  # type: ignore[call-overload]
            torch.testing.assert_close(own.scores, other, rtol=1e-4, atol=1e-7)


def test_slopes_are_powers_and_the_picture_is_drawn(tmp_path: Path) -> None:
    def point(axis: str, value: int, name: str) -> dict[str, Any]:
        ratio = 1.5 if axis == "batch" else 0.1 * value
        return {"axis": axis, "value": value, "name": name, "ratio": ratio, "forward": 2.0, "bytes": 1000 * value**2}

    points = [point(axis, value, "Semantic Scope") for axis in report.AXES for value in (1, 4, 8)]
    lines = report.slopes(points).splitlines()
    assert "| tokens | Semantic Scope | 1.00 | 1.00 | 2.00 |" in lines
    assert "| batch | Semantic Scope | 1.00 | 1.00 | 2.00 |" in lines
    report.picture(points, tmp_path / "cost.png")
    assert (tmp_path / "cost.png").stat().st_size > 10_000
