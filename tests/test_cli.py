"""The tl-scopes command, from the outside: what it prints, where, and how it ends."""

import re
import subprocess
import sys
from collections.abc import Callable
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import tl_scopes as tls
from tl_scopes import models
from tl_scopes.cli import app

PROMPT = "The keys to the old cabinet"
CONTEXT = 48


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama in the Hugging Face layout, with a byte-level tokenizer that puts a BOS token first."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<bos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([f"{PROMPT} near the door is are"] * 9, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", pad_token="<pad>")
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    generator = torch.Generator().manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise + (parameter.ndim == 1))
    path = tmp_path_factory.mktemp("models") / "small"
    model.save_pretrained(path)
    fast.save_pretrained(path)
    return path


@pytest.fixture
def run(folder: Path) -> Callable[..., Any]:
    """Run the command on the small model, in a terminal of 80 columns that is none."""
    runner = CliRunner(
        env={"COLUMNS": "80", "NO_COLOR": None, "FORCE_COLOR": None, "TERM": "xterm", "COLORTERM": "truecolor"}
    )

    def run(*args: str, input: str | bytes | None = None, **env: str) -> Any:
        given = [] if "--model" in args else [f"--model={folder}"]
        return runner.invoke(app, [*given, *args], input=input, env=env)

    return run


@pytest.fixture
def ask(run: Callable[..., Any]) -> Callable[..., tls.Attribution]:
    """The answer of the command, by way of JSON on stdout."""

    def ask(*args: str, **kwargs: Any) -> tls.Attribution:
        result = run("--json", "-", *args, **kwargs)
        assert result.exit_code == 0, result.stderr
        return tls.Attribution.from_json(result.stdout)

    return ask


# ---------------------------------------------------------------------------------------------------------------------
# The answer


@pytest.mark.parametrize(
    ("args", "scope"),
    [
        ([], tls.SemanticScope()),
        (["--target", " the"], tls.SemanticScope(" the")),
        (["--target", "id:42", "--versus", " old"], tls.SemanticScope(42, " old")),
        (["--scope", "temperature"], tls.TemperatureScope()),
        (["--scope", "fisher", "--position", "3"], tls.FisherScope()),
        (["--scope", "path-integrated", "--target", " the", "--versus", "id:42"], tls.PathIntegratedScope(" the", 42)),
        (["--scope", "spectral"], tls.SpectralScope(space="distribution", rank=16)),
        (["--scope", "heta", "--target", " the"], tls.HetaScope(" the")),
        (["--target", " the old"], tls.SemanticScope(" the old")),
        (["--target", " the", "--versus", " the old"], tls.SemanticScope(" the", " the old")),
        (["--rules", "linear", "--scope", "relevance", "--versus", " the"], tls.RelevanceScope(versus=" the")),
        (["--rules", "norms,patterns"], tls.SemanticScope()),
    ],
)
def test_the_answer_is_the_librarys(
    ask: Callable[..., tls.Attribution], folder: Path, args: list[str], scope: tls.Scope
) -> None:
    rules = args[args.index("--rules") + 1].split(",") if "--rules" in args else None
    position = 3 if "--position" in args else -1
    expected = tls.attribute(
        models.load(folder), PROMPT, scope, position, rules=rules and (rules if rules[1:] else rules[0])
    )
    assert ask(PROMPT, *args).to_json() == expected.to_json()


def test_bos(ask: Callable[..., tls.Attribution]) -> None:
    assert ask(PROMPT).str_tokens == ask(PROMPT, "--bos").str_tokens == ("<bos>", *ask(PROMPT, "--no-bos").str_tokens)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_dtype(ask: Callable[..., tls.Attribution], dtype: str) -> None:
    assert ask(PROMPT, "--dtype", dtype).dtype == dtype


@pytest.mark.parametrize("scope", ["spectral", "heta"])
def test_answers_of_one_token_for_scopes_of_one_prediction(run: Callable[..., Any], scope: str) -> None:
    """As --help says."""
    assert run(PROMPT, "--scope", scope, "--answer", " the").exit_code == 0
    assert "is about one prediction at a time" in run(PROMPT, "--scope", scope, "--answer", " the old").stderr


def test_a_token_named_by_id_is_the_same_token(ask: Callable[..., tls.Attribution]) -> None:
    by_text = ask(PROMPT, "--target", " the")
    assert by_text.target is not None
    assert ask(PROMPT, "--target", f"id:{by_text.target.id}").target == by_text.target


@pytest.mark.parametrize(("stdin", "prompt"), [("a b\n", "a b"), ("a b\r\n", "a b"), ("a b", "a b"), ("a\n\n", "a\n")])
def test_prompt_from_stdin_loses_one_line_break(ask: Callable[..., tls.Attribution], stdin: str, prompt: str) -> None:
    assert ask("-", input=stdin).tokens.tolist() == ask(prompt).tokens.tolist()


def test_a_prompt_may_start_with_a_dash(ask: Callable[..., tls.Attribution]) -> None:
    assert "".join(ask("--no-bos", "--", "--json x").str_tokens) == "--json x"


def test_without_a_model_the_bundled_one_answers() -> None:
    result = CliRunner().invoke(app, [PROMPT])
    assert result.exit_code == 0, result.stderr
    assert "model  tiny, float32" in result.stdout


# ---------------------------------------------------------------------------------------------------------------------
# The report


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (
            ["--target", " the"],
            ["What moves the logit of ·the?", "how steeply this logit can change", "logit per unit of embedding norm"],
        ),
        (
            ["--target", " the", "--versus", " old"],
            ["What moves the logit of ·the against ·old?", "how steeply the difference can change"],
        ),
        (["--scope", "temperature"], ["What moves the model's confidence?", "inverse temperature per unit"]),
        (["--scope", "fisher"], ["What moves the whole prediction?", "KL divergence", "nat per squared unit"]),
        (["--scope", "heta", "--target", " the"], ["What moves the log-probability of ·the?", "attention flow"]),
        (["--scope", "path-integrated", "--target", " the"], ["moves the logit of ·the?", "contributes to this logit"]),
        (["--scope", "spectral"], ["What moves the whole prediction?", "√(2 KL)", "nat^½ per unit"]),
        (
            ["--target", " the", "--rules", "linear"],
            ["What moves the logit of ·the under linear rules?", "derivative under linear rules, not the model's own"],
        ),
        (
            ["--scope", "relevance", "--target", " the", "--versus", " old", "--rules", "linear"],
            ["against ·old under linear rules?", "how much of the difference", "sum    tokens ", " + biases "],
        ),
        (
            ["--scope", "relevance", "--target", " the"],
            [
                "score  the derivative times the embedding; ",
                'give --rules linear (rules="linear") for parts that add up',
                "sum    tokens ",
                " + gap ",
            ],
        ),
        (["--scope", "fisher", "--answer", " the old"], ["What moves the whole prediction over the answer ·the·old?"]),
        (
            ["--scope", "relevance", "--answer", " the old"],
            ["score  the derivative times the embedding; the parts of a log-probability do not add up"],
        ),
        (
            ["--scope", "relevance", "--answer", " the", "--rows"],
            ["score  the derivative times the embedding; the parts of a log-probability do not add up"],
        ),
        (
            ["--answer", " the", "--rows", "--rules", "linear"],
            ["What moves each token of ·the under linear rules?", "under linear rules, not the model's own"],
        ),
    ],
)
def test_the_report_says_what_was_asked(run: Callable[..., Any], args: list[str], words: list[str]) -> None:
    result = run(PROMPT, *args)
    assert (result.exit_code, result.stderr) == (0, "")
    whole = [] if "--rows" in args else ["Next token after ·cabinet", f"<bos>{PROMPT} →"]
    printed = re.sub(r" *\n {7}", " ", result.stdout)  # long sentences go on in the next line
    for text in [*words, *whole, "/small, float32"]:
        assert text in printed


def test_the_report_shows_the_numbers(run: Callable[..., Any], ask: Callable[..., tls.Attribution]) -> None:
    printed, answer = run(PROMPT, "--top", "3").stdout, ask(PROMPT)
    rows = re.findall(r"^ +(\d+)  (\S+) +([\d.]+) +([\d.]+)%", printed, re.MULTILINE)
    assert [int(position) for position, *_ in rows] == [row.position for row in answer.top(3)]
    for (_, token, score, share), row in zip(rows, answer.top(3), strict=True):
        assert token == row.token.replace(" ", "·")
        assert float(score) == pytest.approx(row.score, rel=0.01)
        assert float(share) == pytest.approx(100 * row.share, abs=0.05)
    for prediction in answer.predictions:
        assert f"{prediction.probability:.1%}" in printed


def test_rows_tell_the_same_token_by_its_place(run: Callable[..., Any]) -> None:
    printed = run("a a a", "--answer", " a", "--rows").stdout
    assert re.search(r"a at 5 \d+%", " ".join(printed.split()))


@pytest.mark.parametrize(("scale", "shown"), [(1e-9, "e-"), (1e-2, "0.0"), (1.0, "."), (1e9, "e+"), (0.0, "0.00")])
def test_scores_of_any_size(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, scale: float, shown: str) -> None:
    cotangents = tls.SemanticScope.cotangents
    monkeypatch.setattr(tls.SemanticScope, "cotangents", lambda self, lin: cotangents(self, lin) * scale)
    assert shown in run(PROMPT, "--top", "1").stdout.split("share")[1].split("%")[0]


def test_checks_stand_below_the_report(
    run: Callable[..., Any], ask: Callable[..., tls.Attribution], folder: Path, tmp_path: Path
) -> None:
    record, page = tmp_path / "answer.json", tmp_path / "answer.html"
    result = run(PROMPT, "--check", "--json", str(record), "--html", str(page))
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith(run(PROMPT).stdout)
    printed = " ".join(result.stdout.split("Can it be trusted?")[1].split())
    for check in tls.check(tls.linearize(models.load(folder), PROMPT), tls.SemanticScope()):
        assert f"{check.name} {check.verdict} {' '.join(check.finding.split())}" in printed
        assert escape(check.finding) in page.read_text(encoding="utf-8")
    assert tls.Attribution.from_json(record.read_text(encoding="utf-8")).to_json() == ask(PROMPT).to_json()


def test_colours_only_where_they_can_be_seen(run: Callable[..., Any]) -> None:
    assert "\x1b" not in run(PROMPT).stdout
    assert re.search(r"\x1b\[38;2;\d+;\d+;\d+;48;2;", run(PROMPT, FORCE_COLOR="1").stdout)
    assert not re.search(r"\x1b\[[0-9;]*[34]8;", run(PROMPT, FORCE_COLOR="1", NO_COLOR="1").stdout)


def test_tokens_are_shown_as_they_are(run: Callable[..., Any]) -> None:
    result = run("[red]a[/] [/nonsense] :cat: \x1b[31m\tb\n\\")
    assert result.exit_code == 0
    assert "<bos>[red]a[/] [/nonsense] :cat: U+001B[31m⇥b↵\n  \\ →" in result.stdout.replace("␛", "U+001B")
    assert "\x1b" not in result.stdout


@pytest.mark.parametrize("columns", [24, 40, 80, 200])
def test_lines_fit_the_terminal(run: Callable[..., Any], columns: int) -> None:
    lines = run(f"{PROMPT} near the door", COLUMNS=str(columns)).stdout.splitlines()
    assert max(map(len, lines)) <= min(columns, 100)
    assert "".join(lines).replace(" ", "").count("nearthedoor") == 1


def test_a_terminal_without_unicode(folder: Path) -> None:
    result = CliRunner(charset="ascii").invoke(app, [PROMPT, f"--model={folder}"])
    assert result.exit_code == 0
    assert "Next token after ?cabinet" in result.stdout


# ---------------------------------------------------------------------------------------------------------------------
# Files, and who writes where


def test_files_are_written_beside_the_report(run: Callable[..., Any], tmp_path: Path) -> None:
    page, record = tmp_path / "answer.html", tmp_path / "answer.json"
    result = run(PROMPT, "--html", str(page), "--json", str(record))
    assert result.exit_code == 0
    assert "What moves" in result.stdout
    answer = tls.Attribution.from_json(record.read_text(encoding="utf-8"))
    assert page.read_text(encoding="utf-8").rstrip() == answer.to_html().rstrip()


def test_html_on_stdout(run: Callable[..., Any]) -> None:
    result = run(PROMPT, "--html", "-")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith("<!doctype html>")
    assert result.stdout.endswith("</html>\n")


def test_what_libraries_print_stays_out_of_stdout(
    ask: Callable[..., tls.Attribution], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = models.load
    monkeypatch.setattr(models, "load", lambda *args, **kwargs: print("Loaded!") or load(*args, **kwargs))
    ask(PROMPT)


# ---------------------------------------------------------------------------------------------------------------------
# How it ends


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ([""], 2, "the prompt is empty"),
        (["a\udcff"], 2, "must be UTF-8"),
        (["a " * CONTEXT], 2, f"the model's context is {CONTEXT}"),
        ([PROMPT, "--position", "99"], 2, "position 99 is out of range"),
        ([PROMPT, "--scope", "heta", "--target", " the old"], 2, "the target ' the old' is 2 tokens"),
        ([PROMPT, "--answer", " a", "--generate", "3"], 2, "--answer says what is said, and --generate lets"),
        ([PROMPT, "--answer", ""], 2, "the answer is empty"),
        ([PROMPT, "--position", "1", "--generate", "3"], 2, "--generate goes on after the whole prompt"),
        ([PROMPT, "--chat"], 2, "how a chat is written: give the text of the whole prompt.\n"),
        ([" ", "--chat"], 2, "the prompt is empty: give at least one character"),
        ([PROMPT, "--target", ""], 2, "the target is empty"),
        ([PROMPT, "--rules", "linear", "--scope", "heta"], 2, "is constant: leave --rules out.\n"),
        (
            [PROMPT, "--rules", "linear", "--scope", "path-integrated"],
            2,
            "than the model's: leave --rules out, or take --scope relevance.\n",
        ),
        ([PROMPT, "--target", "id:99999"], 2, "target 99999 is outside the vocabulary"),
        ([PROMPT, "--target", "id:x"], 2, "--target id:x is not the id of a token: after id: stands a number, id:42"),
        ([PROMPT, "--versus", "id:-1"], 2, "--versus id:-1 is not the id of a token"),
        ([PROMPT, "--versus", "a\udcff"], 2, "must be UTF-8"),
        ([PROMPT, "--target", " the", "--versus", " the"], 2, "are the same token"),
        (
            [PROMPT, "--scope", "fisher", "--target", " the"],
            2,
            "goes with --scope semantic, path-integrated, heta, relevance, not",
        ),
        (
            [PROMPT, "--scope", "heta", "--versus", ""],
            2,
            "--versus goes with --scope semantic, path-integrated, relevance, not with",
        ),
        ([PROMPT, "--check", "--json", "-"], 2, "--check prints below the report"),
        ([PROMPT, "--device", "toaster"], 1, "toaster"),
        ([PROMPT, "--device", "cuda:99"], 1, "cuda:99"),
        ([PROMPT, "--model", "no/such-model"], 1, "'no/such-model'"),
        ([PROMPT, "--model", "no model"], 1, "'no model'"),
        ([PROMPT, "--model", "/"], 1, "is not a folder with a config.json"),
        (
            [PROMPT, "--html", "/no/such/folder/answer.html"],
            2,
            "there is no folder /no/such/folder. Make it first",
        ),
        ([PROMPT, "--json", "/"], 2, "/ is a folder: give the path of a file in it"),
    ],
)
def test_an_error_is_one_paragraph_on_stderr(run: Callable[..., Any], args: list[str], code: int, message: str) -> None:
    result = run(*args)
    assert result.exit_code == code
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == "" or "/" in args[-1]  # the report does not wait for its files


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "PROMPT"),
        ([PROMPT, "--scope", "astrological"], "astrological"),
        ([PROMPT, "--dtype", "int8"], "int8"),
        ([PROMPT, "--position", "last"], "--position"),
        ([PROMPT, "--top", "0"], "--top"),
        ([PROMPT, "--tpo", "3"], "--tpo"),
        ([PROMPT, "and", "more"], "and"),
    ],
)
def test_a_wrong_command_line(run: Callable[..., Any], args: list[str], message: str) -> None:
    result = run(*args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Usage" in result.stderr
    assert message in result.stderr


def test_stdin_that_is_no_text(run: Callable[..., Any]) -> None:
    result = run("-", input=b"\xff")
    assert result.exit_code == 2
    assert "must be UTF-8" in result.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [(torch.OutOfMemoryError("out of memory\ntry this"), 1), (ValueError("out of memory\ntry this"), 2)],
)
def test_a_failure_while_the_model_runs(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, error: Exception, code: int
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(tls.SemanticScope, "cotangents", fail)
    result = run(PROMPT)
    assert (result.exit_code, result.stdout, result.stderr) == (code, "", "error: out of memory try this\n")


def test_a_bug_is_not_hidden(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls.SemanticScope, "cotangents", lambda self: None)
    assert isinstance(run(PROMPT).exception, TypeError)


# ---------------------------------------------------------------------------------------------------------------------
# Help


def test_help(run: Callable[..., Any]) -> None:
    result = run("--help")
    text = re.sub(r"\x1b\[[0-9;]*m", "", result.stdout)
    assert (result.exit_code, result.stderr) == (0, "")
    options = "scope target versus position model device dtype bos no-bos check top html json version help"
    for word in [
        *(f"--{option}" for option in options.split()),
        "Examples",
        "Question",
        "Model",
        "Output",
        "Exit codes",
    ]:
        assert word in text


def test_version(run: Callable[..., Any]) -> None:
    assert run("--version").stdout == f"tl-scopes {version('tl-scopes')}\n"


# -- what a shell does with it ----------------------------------------------------------------------------------------


def test_one_document_on_stdout(run: Callable[..., Any]) -> None:
    result = run(PROMPT, "--html", "-", "--json", "-")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "--html - and --json - would both write to stdout: name a file for one of them" in flat(result.stderr)


@pytest.mark.parametrize("option", ["--html", "--json"])
def test_where_nothing_can_be_written_nothing_is_computed(
    run: Callable[..., Any], option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(models, "load")
    result = run(PROMPT, option, str(tmp_path / "nowhere" / "x"))
    assert result.exit_code == 2
    assert f"{option} {tmp_path}/nowhere/x: there is no folder {tmp_path}/nowhere. Make it first." in flat(
        result.stderr
    )
    result = run(PROMPT, option, str(tmp_path))
    assert result.exit_code == 2
    assert f"{option} {tmp_path} is a folder" in flat(result.stderr)


def test_errors_name_the_options(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are written on the command line; and memory that is too small is not a traceback."""
    result = run(PROMPT, "--device", "cuda:99")
    assert result.exit_code == 1
    assert "Use --device cpu" in flat(result.stderr)

    def too_large(*_: Any, **__: Any) -> None:
        raise MemoryError("the graph would need 99 GiB: try checkpoint=True, a shorter prompt.")

    monkeypatch.setattr(tls, "attribute", too_large)
    result = run(PROMPT)
    assert (result.exit_code, result.exception.__class__) == (1, SystemExit)
    assert "try --checkpoint, a shorter prompt" in flat(result.stderr)


def test_checkpoint_changes_no_number(run: Callable[..., Any]) -> None:
    assert run(PROMPT, "--checkpoint", "--json", "-").stdout == run(PROMPT, "--json", "-").stdout


def test_a_reader_that_wants_no_more(folder: Path) -> None:
    """`| head` ends it without a word."""
    command = f"{sys.executable} -m tl_scopes 'The keys' --model {folder} --html - | head -c 10"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stdout == "<!doctype "
    assert "Broken pipe" not in done.stderr
    assert "Traceback" not in done.stderr


def flat(text: str) -> str:
    """Without the line breaks of a terminal."""
    return " ".join(text.split())


def test_an_answer_is_explained_as_a_whole(ask: Callable[..., tls.Attribution], folder: Path) -> None:
    model = models.load(folder)
    given = tls.attribute(model, PROMPT, tls.FisherScope(), answer=" the old")
    assert ask(PROMPT, "--answer", " the old", "--scope", "fisher").to_json() == given.to_json()
    said = tls.generate(model, PROMPT, 3)
    assert ask(PROMPT, "--generate", "3").target.ids == list(said.ids)


def test_rows_of_an_answer(run: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    """`--rows` is `answer_map`: printed, as a page, and as JSON."""
    model = models.load(folder)
    expected = tls.answer_map(model, PROMPT, " the old", tls.SemanticScope())
    printed = run(PROMPT, "--answer", " the old", "--rows", "--top", "2")
    assert printed.exit_code == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", printed.stdout)
    lines = [line for line in text.splitlines() if re.match(r"  ·\w+ ", line)]
    assert len(lines) == len(expected)
    for line, row in zip(lines, expected, strict=True):
        assert f"{row.value:.2f}" in line
        assert all(f"{one.share:.0%}" in line for one in row.top(2))
    page = tmp_path / "rows.html"
    written = run(PROMPT, "--answer", " the old", "--rows", "--json", "-", "--html", str(page))
    assert written.stdout.strip() == expected.to_json()
    assert page.read_text().startswith("<!doctype html>")
    assert run(PROMPT, "--generate", "2", "--rows", "--scope", "fisher").exit_code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rows"], "--rows has a row for each token of an answer: give --answer or --generate as well"),
        (["--rows", "--answer", " a", "--check"], "--rows explains each token of an answer, and --check is about one"),
        (["--rows", "--answer", " a", "--position", "1"], "and --position is about one: leave one out"),
        (["--rows", "--answer", " a", "--versus", " b"], "and --versus is about one: leave one out"),
    ],
)
def test_rows_that_cannot_be(run: Callable[..., Any], options: list[str], message: str) -> None:
    result = run(PROMPT, *options)
    assert result.exit_code == 2
    assert message in flat(result.stderr)
