"""The file that keeps an evaluation's results: taken up again, never mixed up, robust against hands and crashes."""

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import tl_scopes as tls
from tests import zoo
from tests.test_faithfulness import PROMPTS, SHORT, Fixed
from tests.test_left_as_found import KINDS, unchanged
from tests.zoo import PROMPT
from tl_scopes.faithfulness import Perturbation
from tl_scopes.faithfulness.evaluation import evaluate
from tl_scopes.scopes.baselines import RandomBaseline

ZERO = Perturbation(("zero",), (0.5,), steps=2, samples=0, randomise=False)


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A fresh model of each kind."""
    with zoo.Float64():
        yield zoo.SPECIES[request.param]().model


@pytest.fixture
def fixed_model() -> Any:
    return zoo.specimen("bridge llama").model


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results.jsonl"


@pytest.fixture
def written(fixed_model: Any, path: Path) -> Path:
    """A file with the results of three prompts."""
    evaluate(fixed_model, PROMPTS, [Fixed()], ZERO, path=path)
    return path


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def write(path: Path, *texts: str) -> None:
    path.write_text("".join(f"{text}\n" for text in texts))


# -- an evaluation goes on --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("torn", [False, True])
def test_an_interrupted_evaluation_goes_on(model: Any, tmp_path: Path, torn: bool) -> None:
    """One that was stopped at the third prompt, even in the middle of a line, ends with the same table."""
    path = tmp_path / "results.jsonl"
    whole = evaluate(model, PROMPTS, [Fixed(), tls.SemanticScope()], SHORT)
    first = Fixed()
    first.failures[5] = KeyboardInterrupt()
    with unchanged(model), pytest.raises(KeyboardInterrupt):
        evaluate(model, PROMPTS, [first, tls.SemanticScope()], SHORT, path=path)
    if torn:
        with path.open("a") as file:
            file.write('{"prompt": 2, "key"')
    second = Fixed()
    results = evaluate(model, PROMPTS, [second, tls.SemanticScope()], SHORT, path=path)
    pd.testing.assert_frame_equal(results, whole, check_exact=True)
    assert set(second.asked) == {tuple(PROMPTS[2])}
    third = Fixed()
    pd.testing.assert_frame_equal(evaluate(model, PROMPTS, [third, tls.SemanticScope()], SHORT, path=path), whole)
    assert third.asked == []


def test_more_prompts_later(model: Any, tmp_path: Path) -> None:
    """A file may grow, unless other prompts are drawn from."""
    path, perturbation = tmp_path / "results.jsonl", Perturbation(("zero",), (0.5,))
    evaluate(model, PROMPTS[:2], [Fixed()], perturbation, path=path)
    results = evaluate(model, PROMPTS, [Fixed()], perturbation, path=path)
    pd.testing.assert_frame_equal(results, evaluate(model, PROMPTS, [Fixed()], perturbation), check_exact=True)
    assert evaluate(model, PROMPTS[:1], [Fixed()], perturbation, path=path).prompt.unique().tolist() == [0]


def test_results_under_hooks_have_no_file(model: Any, tmp_path: Path) -> None:
    """Hooks cannot be written into it, so results under hooks could not be told from others."""
    perturbation, path = Perturbation(("zero",), (0.5,), samples=0), tmp_path / "results.jsonl"
    for hooks in ({"fwd_hooks": [("hook_embed", lambda v, hook: 2 * v)]}, {"bwd_hooks": [("hook_embed", print)]}):
        with model.hooks(**hooks):
            with pytest.raises(ValueError, match="results under hooks cannot be told from those without: leave `path`"):
                evaluate(model, [PROMPT], [Fixed()], perturbation, path=path)
    with model.hooks(fwd_hooks=[("hook_embed", lambda v, hook: 2 * v)]):
        hooked = evaluate(model, [PROMPT], [Fixed()], perturbation)
    assert not path.exists()
    plain = evaluate(model, [PROMPT], [Fixed()], perturbation, path=path)
    assert not np.allclose(hooked.value, plain.value)


def test_nothing_is_written_before_there_is_something(tmp_path: Path) -> None:
    """Refused arguments and a first prompt that fails leave no file; half of a first line is written anew."""
    model, path = zoo.specimen("bridge llama").model, tmp_path / "results.jsonl"
    failing, zero = Fixed(), Perturbation(("zero",), (0.5,))
    failing.failures[1] = KeyboardInterrupt()
    with pytest.raises(ValueError, match='to "resample" takes tokens of other prompts'):
        evaluate(model, [PROMPT], [Fixed()], Perturbation(("resample",), (0.5,)), path=path)
    with pytest.raises(ValueError, match="the model has no padding token"):
        evaluate(model, PROMPTS, [Fixed()], Perturbation(("pad",), (0.5,)), path=path)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, PROMPTS, [failing], zero, path=path)
    assert not path.exists()
    results = evaluate(model, PROMPTS, [Fixed()], zero, path=path)
    written = path.read_text()
    path.write_text(written[:99])
    pd.testing.assert_frame_equal(evaluate(model, PROMPTS, [Fixed()], zero, path=path), results, check_exact=True)
    assert path.read_text() == written


def test_a_target_has_several_spellings(model: Any, tmp_path: Path) -> None:
    """An id of NumPy's finds the results of the same id of Python's."""
    path, perturbation = tmp_path / "results.jsonl", Perturbation(("zero",), (0.5,))
    results = evaluate(model, [PROMPT], [tls.FisherScope()], perturbation, targets=[5], path=path)
    again = evaluate(model, [PROMPT], [tls.FisherScope()], perturbation, targets=[np.int64(5)], path=path)
    pd.testing.assert_frame_equal(again, results, check_exact=True)


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    """Results of other settings, prompts or models are never mixed in, and the file stays as it is."""
    model, path, zero = zoo.specimen("bridge llama").model, tmp_path / "results.jsonl", Perturbation(("zero",), (0.5,))
    evaluate(model, PROMPTS, [Fixed()], zero, path=path)
    before = path.read_text()
    with pytest.raises(ValueError, match=r"other settings \(steps was 10, is 4\): give another path"):
        evaluate(model, PROMPTS, [Fixed()], Perturbation(("zero",), (0.5,), steps=4), path=path)
    with pytest.raises(ValueError, match="other settings .scopes was .*RandomBaseline"):
        evaluate(model, PROMPTS, [RandomBaseline()], zero, path=path)
    with pytest.raises(ValueError, match="weights was"):
        evaluate(zoo.specimen("bridge qwen2").model, PROMPTS, [Fixed()], zero, path=path)
    with pytest.raises(ValueError, match="prompt 1, or its target, is not the one whose results are in"):
        evaluate(model, [PROMPT, PROMPT], [Fixed()], zero, path=path)
    with pytest.raises(ValueError, match="prompt 0, or its target, is not the one"):
        evaluate(model, PROMPTS, [Fixed()], zero, targets=[1, 1, 1], path=path)
    assert path.read_text() == before
    for text, message in [
        ("Dear diary,\n", "holds no results of an evaluation"),
        ("", ""),
        ('{"format": 1}\n', "holds no results of an evaluation"),
    ]:
        path.write_text(text)
        if message:
            with pytest.raises(ValueError, match=message):
                evaluate(model, PROMPTS, [Fixed()], zero, path=path)
            assert path.read_text() == text
    assert json.loads(before.splitlines()[0])["format"] == "tl_scopes.evaluate"


def test_a_file_of_another_version(fixed_model: Any, written: Path) -> None:
    header, *rest = lines(written)
    for changed in ({"version": 2}, {"settings": None}, {"settings": [1]}):
        write(written, json.dumps(json.loads(header) | changed), *rest)
        with pytest.raises(ValueError, match="holds no results of an evaluation of this version: give another path"):
            evaluate(fixed_model, PROMPTS, [Fixed()], ZERO, path=written)


def test_a_file_that_is_no_text(fixed_model: Any, path: Path) -> None:
    for data in (b"\x89PNG\r\n\x1a\n\xff\xfe", b"[" * 100_000, b"\x00" * 9):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"results\.jsonl' holds no results of an evaluation: give another path"):
            evaluate(fixed_model, PROMPTS, [Fixed()], ZERO, path=path)
        assert path.read_bytes() == data


# -- lines that cannot be used ----------------------------------------------------------------------------------------


def changed_value(record: dict[str, Any]) -> dict[str, Any]:
    record["results"][0]["values"][3][3] += 1
    return record


def without(record: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != name}


def cut_short(record: dict[str, Any]) -> dict[str, Any]:
    del record["results"][0]["values"][-3:]
    return record


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda line: json.dumps(cut_short(json.loads(line))), "is not what was written, some of it was cut off or"),
        (lambda line: json.dumps(changed_value(json.loads(line))), "is not what was written"),
        (lambda line: json.dumps(json.loads(line) | {"results": []}), "is not what was written"),
        (lambda line: json.dumps(without(json.loads(line), "tokens")), "has no 'tokens'"),
        (lambda line: json.dumps(without(json.loads(line), "checksum")), "has no 'checksum'"),
        (lambda line: json.dumps(without(json.loads(line), "prompt")), "has no 'prompt'"),
        (lambda line: line[:99], "is not a record in JSON"),
        (lambda line: "[" * 100_000, "is not a record in JSON"),
        (lambda line: "[1, 2]", "is not a record in JSON"),
    ],
)
def test_a_line_that_cannot_be_used(fixed_model: Any, written: Path, change: Callable[[str], str], why: str) -> None:
    """It is named and left out, its prompt is evaluated again, and the other lines count."""
    whole = evaluate(fixed_model, PROMPTS, [Fixed()], ZERO, path=written)
    header, first, second, third = lines(written)
    write(written, header, first, change(second), third)
    scope = Fixed()
    with pytest.warns(UserWarning, match=rf"results\.jsonl' has lines that are left out: line 3 {why}") as warned:
        results = evaluate(fixed_model, PROMPTS, [scope], ZERO, path=written)
    assert len(warned) == 1
    assert scope.asked == [tuple(PROMPTS[1])]
    pd.testing.assert_frame_equal(results, whole, check_exact=True)
    assert lines(written)[-1] == second


def test_the_first_of_many_lines_are_named(fixed_model: Any, written: Path) -> None:
    header, first, *_ = lines(written)
    write(written, header, first, *["{"] * 7)
    with pytest.warns(UserWarning, match=r"line 7 is not a record in JSON; and 2 more\. Prompts without another line"):
        evaluate(fixed_model, PROMPTS[:1], [Fixed()], ZERO, path=written)


@pytest.mark.parametrize("spoil", [
    lambda data: data.replace(b"\n", b"\n\n  \n"),
    lambda data: data.replace(b"\n", b"\r\n"),
    lambda data: b"\xef\xbb\xbf" + data,
    lambda data: data.removesuffix(b"\n"),
    lambda data: b"\n" + data,
])  # fmt: skip
def test_what_editors_do_is_no_harm(fixed_model: Any, written: Path, spoil: Callable[[bytes], bytes]) -> None:
    """Blank lines, other line ends, a mark at the beginning and a last line without an end lose no results."""
    whole = evaluate(fixed_model, PROMPTS, [Fixed()], ZERO, path=written)
    written.write_bytes(spoil(written.read_bytes()))
    scope = Fixed()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results = evaluate(fixed_model, [*PROMPTS, [1, 2, 3]], [scope], ZERO, path=written)
        again = evaluate(fixed_model, [*PROMPTS, [1, 2, 3]], [scope], ZERO, path=written)
    assert scope.asked == [(1, 2, 3)]
    pd.testing.assert_frame_equal(results[results.prompt < 3], whole, check_exact=True)
    pd.testing.assert_frame_equal(again, results, check_exact=True)


def test_a_file_of_blank_lines_is_begun(fixed_model: Any, path: Path) -> None:
    path.write_text("\n \n")
    evaluate(fixed_model, PROMPTS, [Fixed()], ZERO, path=path)
    assert len(lines(path)) == 4


def test_a_second_first_line(fixed_model: Any, written: Path) -> None:
    """Where two files were joined, the same settings are left out with a warning, and others are refused."""
    header, first, second, third = lines(written)
    write(written, header, first, header, second, third)
    scope = Fixed()
    with pytest.warns(UserWarning, match="left out: line 3 is a second first line"):
        evaluate(fixed_model, PROMPTS, [scope], ZERO, path=written)
    assert not scope.asked
    other = json.loads(header)
    other["settings"]["steps"] = 5
    write(written, header, first, json.dumps(other), second, third)
    with pytest.raises(ValueError, match=r"line 3 of '.*' holds results of other settings \(steps was 5, is 2\)"):
        evaluate(fixed_model, PROMPTS, [scope], ZERO, path=written)


def test_a_prompt_that_stands_there_twice(fixed_model: Any, written: Path, tmp_path: Path) -> None:
    """The same record may stand there twice; of two that differ the first counts."""
    whole = evaluate(fixed_model, PROMPTS, [Fixed()], ZERO, path=written)
    all_lines = lines(written)
    write(written, *all_lines, all_lines[2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(fixed_model, PROMPTS, [Fixed()], ZERO, path=written)
    other = tmp_path / "other.jsonl"
    evaluate(fixed_model, [PROMPTS[0], PROMPTS[2]], [Fixed()], ZERO, path=other)
    write(written, *all_lines, lines(other)[2])
    with pytest.warns(UserWarning, match="left out: line 5 is a second record of prompt 1"):
        results = evaluate(fixed_model, PROMPTS, [Fixed()], ZERO, path=written)
    pd.testing.assert_frame_equal(results, whole, check_exact=True)


# -- files that are none ----------------------------------------------------------------------------------------------


def test_devices_and_pipes_are_refused_at_once(fixed_model: Any, tmp_path: Path) -> None:
    """They would be read without end."""
    os.mkfifo(tmp_path / "pipe")
    scope = Fixed()
    for path in ("/dev/full", "/dev/zero", tmp_path / "pipe"):
        with pytest.raises(ValueError, match=r"is a device or a pipe, from which results cannot be read again: give"):
            evaluate(fixed_model, PROMPTS, [scope], ZERO, path=path)
    assert not scope.asked
    assert [file.name for file in tmp_path.iterdir()] == ["pipe"]


def test_two_processes_on_one_file(fixed_model: Any, path: Path) -> None:
    """The second is refused at once; when the first one is gone, however it went, the file is free."""
    code = "import sys, filelock as f; lock = f.FileLock(sys.argv[1]); lock.acquire(); print(flush=True); input()"
    command = [sys.executable, "-c", code, f"{path}.lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        scope = Fixed()
        with pytest.raises(RuntimeError, match=r"another evaluation is writing to '.*results\.jsonl', and two of them"):
            evaluate(fixed_model, PROMPTS, [scope], ZERO, path=path)
        assert not scope.asked
        other.kill()
    assert len(evaluate(fixed_model, PROMPTS, [scope], ZERO, path=path))


def test_one_process_twice_on_one_file(fixed_model: Any, tmp_path: Path) -> None:
    """A link to the file is the file, and after an error the file is free again."""

    class Nested(Fixed):
        def measure(self, lin: tls.Linearization) -> tls.Measurement:
            evaluate(fixed_model, PROMPTS, [Fixed()], ZERO, path=tmp_path / "link.jsonl")
            return super().measure(lin)

    path = tmp_path / "results.jsonl"
    (tmp_path / "link.jsonl").symlink_to(path)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="another evaluation is writing to '.*link"):
            evaluate(fixed_model, PROMPTS, [Nested()], ZERO, path=path, on_error="raise")
    assert not path.exists()


def test_a_file_that_cannot_be_locked(fixed_model: Any, path: Path) -> None:
    Path(f"{path}.lock").mkdir()
    with pytest.raises(OSError, match=r"no results can be kept in '.*', since the file '.*\.lock' cannot be locked"):
        evaluate(fixed_model, PROMPTS, [Fixed()], ZERO, path=path)
