"""The command tl-scopes corpus, from the outside."""

import json
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import tl_scopes as tls
from tl_scopes import models
from tl_scopes.__main__ import main
from tl_scopes.circuits.cut import By
from tl_scopes.cli import plain_warnings
from tl_scopes.cli_corpus import Cut, Predictions, app
from tl_scopes.corpus.job import Predictions as KnownPredictions
from tl_scopes.corpus.worker import Worker

TEXTS = ["The keys near the door", "The key near the doors", ""]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"id": f"p{i}", "question": text}) + "\n" for i, text in enumerate(TEXTS)))
    return path


def run(*args: object) -> Any:
    return CliRunner(env={"COLUMNS": "80", "NO_COLOR": "1"}).invoke(app, list(map(str, args)))


def test_the_command_is_the_function(prompts: Path, tmp_path: Path) -> None:
    """Its folder is the function's, byte for byte, and it goes on where it stands."""
    given = ["--out", tmp_path / "a", "--column", "prompt=question", "--scope", "semantic", "--target", " are"]
    for _ in range(2):
        with pytest.warns(UserWarning, match="1 of 3 prompts have no answer"):
            result = run(prompts, *given, "--rules", "norms,patterns", "--batch-size", "2")
        assert result.exit_code == 0, result.output
        assert result.stdout == f"3 prompts in {tmp_path / 'a'}, 1 without an answer\n"
    with pytest.warns(UserWarning, match="1 of 3 prompts have no answer"):
        tls.attribute_corpus(
            prompts, tmp_path / "b", tls.SemanticScope(" are"), columns={"prompt": "question"}, batch_size=2,
            rules=["norms", "patterns"],
        )  # fmt: skip
    assert pd.read_parquet(tmp_path / "a").target.tolist()[:2] == [" are"] * 2
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_maps_and_paths(prompts: Path, tmp_path: Path) -> None:
    """The options for every prediction, and for parts of the network, are the function's."""
    for option, given in {
        "--predictions every": {"predictions": "every"},
        "--carried-by head --strongest 2": {"carried_by": "head", "strongest": 2},
        "--generate 2": {"generate": 2},
    }.items():
        ours, theirs = (tmp_path / f"{name} {option}" for name in "ab")
        with pytest.warns(UserWarning, match="1 of 3 prompts have no answer"):
            result = run(prompts, "--out", ours, "--column", "prompt=question", *option.split())
        assert result.exit_code == 0, result.output
        with pytest.warns(UserWarning, match="1 of 3 prompts have no answer"):
            tls.attribute_corpus(prompts, theirs, tls.SemanticScope(), columns={"prompt": "question"}, **given)
        for path in ours.iterdir():
            assert path.read_bytes() == (theirs / path.name).read_bytes()
    assert {one.value for one in Cut} == set(get_args(By))
    assert {one.value for one in Predictions} == set(get_args(KnownPredictions))


def test_the_split_of_a_difference_of_logits(prompts: Path, tmp_path: Path) -> None:
    """With `--scope relevance --rules linear` each part carries what it brings, with its sign."""
    options = "--column prompt=question --scope relevance --versus id:5 --rules linear --carried-by head".split()
    with pytest.warns(UserWarning, match="1 of 3 prompts have no answer"):
        result = run(prompts, "--out", tmp_path / "a", *options)
    assert result.exit_code == 0, result.output
    (found, *_) = (one for one in tls.read_corpus(tmp_path / "a") if one is not None)
    assert (found.unit, found.rules) == ("logit", "linear")
    assert torch.allclose(found.values.sum(1) + found.around, found.scores, atol=1e-4)


def test_a_corpus_without_any_answer_fails(prompts: Path, tmp_path: Path) -> None:
    """Its rows keep their errors, and the warning says what to do."""
    given = ["--out", tmp_path / "out", "--column", "prompt=question", "--target", "id:99999"]
    message = (
        r"none of the 3 prompts has an answer, so that something is probably wrong with the call, or with all prompts; "
        r"the first, 'p0': target 99999 is outside .* Another run does not try these prompts again: correct what is "
        r"wrong, and give another folder than '.*out', or delete that one"
    )
    with pytest.warns(UserWarning, match=message):
        result = run(prompts, *given)
    assert result.exit_code == 2
    assert result.stdout == f"3 prompts in {tmp_path / 'out'}, 3 without an answer\n"
    assert len(tls.read_corpus(tmp_path / "out").errors) == 3


def test_columns_of_two_words_are_written_as_a_shell_takes_them(tmp_path: Path) -> None:
    for lines, args, message in [
        (['{"the question": "a"}'], [], "--column 'prompt=the question' say"),
        (
            ['"a"'],
            ["--column", "prompt=x", "--column", "id=y"],
            "so that --column prompt=x --column id=y names nothing",
        ),
    ]:
        (tmp_path / "p.jsonl").write_text("\n".join(lines))
        result = run(tmp_path / "p.jsonl", "--out", tmp_path / "a", *args)
        assert (result.exit_code, message in result.stderr) == (2, True), result.stderr


def test_a_target_for_every_foil(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "The keys to the cabinet", "foil": " is"}')
    assert run(tmp_path / "p.jsonl", "--out", tmp_path / "a", "--target", " are").exit_code == 0
    (found,) = tls.read_corpus(tmp_path / "a")
    expected = tls.attribute(tls.load_tiny(), "The keys to the cabinet", tls.SemanticScope(" are", versus=" is"))
    assert (found.value, found.quantity) == (expected.value, expected.quantity)


def test_a_target_for_every_prompt_that_has_none_of_its_own(tmp_path: Path) -> None:
    rows = ['{"prompt": "The keys near the door", "target": " is"}', '{"prompt": "The keys near the door"}']
    (tmp_path / "p.jsonl").write_text("\n".join(rows))
    assert run(tmp_path / "p.jsonl", "--out", tmp_path / "a", "--target", " are").exit_code == 0
    corpus = tls.read_corpus(tmp_path / "a")
    assert [answer and answer.target and answer.target.text for answer in corpus] == [" is", " are"]


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text("")
    with pytest.warns(UserWarning, match="there is no prompt in what was given, and so no answer in '.*a'"):
        result = run(tmp_path / "p.jsonl", "--out", tmp_path / "a")
    assert (result.exit_code, result.stdout) == (2, f"0 prompts in {tmp_path / 'a'}, 0 without an answer\n")


def test_ctrl_c_says_what_is_kept(prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compute, given = Worker.compute, [prompts, "--out", tmp_path / "a", "--column", "prompt=question"]

    def interrupted(self: Worker, rows: Any, *others: Any) -> Any:
        if rows[0].id == "p1":
            raise KeyboardInterrupt
        return compute(self, rows, *others)

    with monkeypatch.context() as patched:
        patched.setattr(Worker, "compute", interrupted)
        result = run(*given, "--part-size", "1")
        assert (result.exit_code, result.stdout) == (130, "")
        assert result.stderr == "interrupted: 1 of 3 prompts are kept; run it again to go on.\n"
        patched.setattr(Worker, "__init__", lambda *args: interrupted(*args[:1], [SimpleNamespace(id="p1")]))
        assert run(*given).stderr == "interrupted: nothing was computed.\n"
    with pytest.warns(UserWarning, match="1 of 3 prompts have no answer"):
        assert run(*given, "--part-size", "1").exit_code == 0


def test_long_lists_are_shortened_in_errors(tmp_path: Path) -> None:
    rows = [{"prompt": "The", "target": list(range(5, 300)), "foil": list(range(7, 300))}]
    with pytest.raises(ValueError, match=r"the foil \[7, 8, 9, 10, 11, … 293 in all\], and FisherScope\(\) does not"):
        tls.attribute_corpus(rows, tmp_path / "out", tls.FisherScope())
    with pytest.raises(ValueError, match=r"is 295 tokens: `ids` are \[5, 6, 7, 8, 9, … 295 in all\]"):
        print(models.read_target(tls.load_tiny(), rows[0]["target"]).id)
    with pytest.warns(UserWarning, match=r"the only prompt has no answer.* the first, 'xxx.*x…': the prompt is empty"):
        tls.attribute_corpus([{"id": "x" * 500, "prompt": ""}], tmp_path / "out", tls.FisherScope())


def test_warnings_are_lines_for_who_types_a_command(tmp_path: Path) -> None:
    """They do not show the place in the code: the code is not the user's."""
    code = "import sys; sys.argv[0] = 'tl-scopes'; from tl_scopes.__main__ import main; main()"
    args = ["The keys to the old cabinet near the door", "--target", "is", "--json", str(tmp_path / "answer.json")]
    ran = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=True)
    assert ran.stderr.startswith("warning: ' is' (p = 0.001) is far likelier here than 'is'")
    assert "UserWarning" not in ran.stderr


def test_what_is_wrong(prompts: Path, tmp_path: Path) -> None:
    for args, message in [
        (
            ["--scope", "fisher", "--target", " are"],
            "--target goes with --scope semantic, path-integrated",
        ),
        (["--column", "question"], "--column is written NAME=COLUMN, prompt=question say, got 'question'"),
        (
            [],
            "has no column 'prompt': it has 'id', 'question'. Say which one holds the prompts, --column prompt=",
        ),
        (
            ["--column", "text=question"],
            "--column says the columns for id, prompt, answer, target, foil, and not for 'te",
        ),
        (["--column", "text=question"], "write --column prompt=question for prompts in a column called question"),
        (["--column", "prompt=question", "--column", "foil=id"], "leave the column of foils out, --column foil=."),
        (["--predictions", "every", "--carried-by", "head"], "--carried-by head splits the score of one prediction"),
        (["--column", "prompt=question", "--column", "id=key"], "has no column 'key'"),
        (["--column", "prompt=question", "--strongest", "2"], "--strongest 2 says how many tokens' scores are split"),
        (
            ["--column", "prompt=question", "--model", "./nothing", "--scope", "heta", "--carried-by", "head"],
            "error: carried_by takes scopes whose scores are norms of cᵀJ",
        ),
    ]:
        result = run(prompts, "--out", tmp_path / "a", *args)
        assert result.exit_code == 2
        assert message in result.stderr
        assert result.stdout == ""
    assert not (tmp_path / "a").exists()


def test_a_model_that_cannot_be_loaded(prompts: Path, tmp_path: Path) -> None:
    """It ends as the other commands end."""
    result = run(prompts, "--out", tmp_path / "a", "--column", "prompt=question", "--model", "./nothing")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: there is no folder './nothing'")
    assert result.stderr.count("error: ") == 1


def test_warnings_name_the_options(prompts: Path, tmp_path: Path) -> None:
    given = ["--out", tmp_path / "out", "--column", "prompt=question", "--scope", "heta", "--rules", "linear"]
    with pytest.warns(UserWarning, match="what curves the network is constant") as warned:
        result = run(prompts, *given)
    assert result.exit_code == 2
    with plain_warnings():
        [line] = {warnings.formatwarning(one.message, one.category, "", 0) for one in warned}
    assert line.startswith("warning: ")
    assert "what curves the network is constant: leave --rules out." in line


def test_both_commands_are_one(prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The first word decides; help does not wait for torch."""
    for args, text in [(["corpus", "--help"], "tl-scopes corpus [OPTIONS]"), (["--help"], "tl-scopes [OPTIONS]")]:
        monkeypatch.setattr(sys, "argv", ["tl-scopes", *args])
        with pytest.raises(SystemExit):
            main()
        assert text in capsys.readouterr().out
    code = "import sys, tl_scopes.__main__; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
