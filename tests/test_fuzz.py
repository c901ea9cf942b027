"""Whatever is read gets a right answer or an error of ours that names the value, and the model is left as found.

Each test says how many examples it draws; together they are more than two thousand.
"""

import json
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import tl_scopes as tls
from tests import zoo
from tests.test_left_as_found import state
from tests.zoo import PROMPT
from tl_scopes import models
from tl_scopes.cli import app

PACKAGE = str(Path(tls.__file__).parent)
KNOWN = (ValueError, TypeError, IndexError)
MODEL = zoo.llama(zoo.GOLDEN, "bridge")
TINY = tls.load_tiny()
for _model in (MODEL, TINY):
    _model(torch.tensor([PROMPT]))  # a bridge registers a hook of its own at the first run
ANSWER = tls.attribute(MODEL, PROMPT, tls.FisherScope(probes=8))

pytestmark = pytest.mark.usefixtures("no_type_checks", "_left_as_found")


@pytest.fixture(autouse=True)
def _left_as_found() -> Iterator[None]:
    """After all the examples of a test the models are as they were before."""
    before = [state(model) for model in (MODEL, TINY)]
    yield
    for model, then in zip((MODEL, TINY), before, strict=True):
        now = state(model)
        assert all(map(torch.equal, then["weights"], now["weights"]))
        assert [name for name in then if name not in ("weights", "rng") and then[name] != now[name]] == []


def fuzzed(examples: int) -> Callable[..., Any]:
    """So many examples, the same at every run, and no limit on the time of one."""
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much]
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=checks)


def asked(ask: Callable[[], Any]) -> Any:
    """The answer; None where it was refused in words of ours."""
    try:
        return ask()
    except KNOWN as error:
        refusal = error
    where = traceback.extract_tb(refusal.__traceback__)[-1]
    assert where.filename.startswith(PACKAGE), f"{type(refusal).__name__} from {where.filename}: {refusal}"
    assert len(str(refusal)) > 20
    return None


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8), st.just("\ud800"),
    st.sampled_from(["zero", "mean", "token: the", " are", "-1", "no", "1e9", "<|bos|>", "\u202e", "🤷‍♀️"]),
)  # fmt: skip
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)
NUMBERS = st.sampled_from(
    [torch.ones(3), torch.tensor(2), torch.tensor([1.5]), torch.zeros(2, 2, dtype=torch.complex64)]
)
VALUES = st.one_of(ANYTHING, NUMBERS, st.builds(object), st.just(float), st.sets(st.integers(0, 9), max_size=3))


# -- what is read -----------------------------------------------------------------------------------------------------


@fuzzed(600)
@given(name=st.sampled_from(sorted(json.loads(ANSWER.to_json()))), value=ANYTHING)
def test_a_field_of_an_answer(name: str, value: Any) -> None:
    text = json.dumps(json.loads(ANSWER.to_json()) | {name: value})
    answer = asked(lambda: tls.Attribution.from_json(text))
    if answer is not None:
        assert tls.Attribution.from_json(answer.to_json()).to_json() == answer.to_json()
        assert "<script" not in answer.to_html()


@fuzzed(200)
@given(text=st.one_of(st.text(), st.builds(json.dumps, ANYTHING), st.sampled_from(["[" * 10**5, '{"a":' * 10**4])))
def test_any_text_as_an_answer(text: str) -> None:
    assert asked(lambda: tls.Attribution.from_json(text)) is None


@fuzzed(200)
@given(cut=st.integers(0, len(ANSWER.to_json())), put=st.text(max_size=3))
def test_a_damaged_answer(cut: int, put: str) -> None:
    text = ANSWER.to_json()
    asked(lambda: tls.Attribution.from_json(text[:cut] + put + text[cut + 1 :]))


@fuzzed(150)
@given(details=st.dictionaries(st.text(max_size=6), VALUES, max_size=3))
def test_details_survive_the_journey(details: dict[str, Any]) -> None:
    def journey() -> None:
        answer = replace(ANSWER, details=details)
        again = tls.Attribution.from_json(answer.to_json())
        assert again.to_json() == answer.to_json()
        assert set(again.details) == set(details)

    asked(journey)


# -- questions --------------------------------------------------------------------------------------------------------

PROMPTS = st.one_of(
    st.lists(st.integers(-2, 130), max_size=6), st.text(max_size=12), VALUES,
    st.lists(st.integers(0, 40), min_size=1, max_size=5).map(torch.tensor),
    st.lists(st.integers(0, 40), min_size=1, max_size=5).map(lambda ids: torch.tensor([ids])),
)  # fmt: skip


@fuzzed(250)
@given(prompt=PROMPTS, position=st.one_of(st.integers(-9, 9), SCALARS), data=st.data())
def test_prompts_and_positions(prompt: Any, position: Any, data: st.DataObject) -> None:
    """As many scores as tokens, or a refusal."""
    model = data.draw(st.sampled_from([MODEL, TINY]))
    answer = asked(lambda: tls.attribute(model, prompt, tls.SemanticScope(), position))
    if answer is not None:
        assert len(answer.scores) == len(answer.str_tokens) == answer.position + 1
        assert answer.scores.isfinite().all()


@fuzzed(150)
@given(target=VALUES, versus=VALUES, quantity=st.sampled_from(["logit", "log_prob", "loss", None, 3]))
def test_targets(target: Any, versus: Any, quantity: Any) -> None:
    lin = tls.linearize(TINY, "The keys to the old")
    answer = asked(lambda: tls.SemanticScope(target, versus, quantity)(lin))
    assert answer is None or answer.target is not None


@fuzzed(150)
@given(said=st.one_of(PROMPTS, st.text(max_size=12)), versus=st.one_of(st.none(), VALUES), scored=st.booleans())
def test_answers(said: Any, versus: Any, scored: bool) -> None:
    """What follows a prompt gets scores for it, or a refusal."""
    scope, prompt = tls.SemanticScope(versus=versus), "The keys to the old"
    answer = asked(lambda: tls.attribute(TINY, prompt, scope, answer=said, score_answer=scored))
    if answer is not None:
        assert len(answer.scores) >= 6
        assert answer.scores.isfinite().all()
        assert tls.Attribution.from_json(answer.to_json()).target == answer.target


CHATTY = tls.load_tiny()
CHATTY.tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}\n{% endfor %}"
MESSAGES = st.lists(
    st.dictionaries(
        st.sampled_from(["role", "content", "name"]),
        st.one_of(st.sampled_from(["user", "assistant", "system", "x"]), st.text(max_size=9), ANYTHING),
        max_size=3,
    ),
    min_size=1,
    max_size=3,
)


@fuzzed(100)
@given(chat=MESSAGES, unit=st.one_of(st.sampled_from(["word", "sentence", "number"]), VALUES))
def test_chats_and_units(chat: Any, unit: Any) -> None:
    answer = asked(lambda: tls.attribute(CHATTY, chat, tls.SemanticScope()))
    if answer is not None:
        assert len(answer.parts) == len(answer.scores)
        asked(lambda: answer.by(unit))


ROWS = tls.answer_map(TINY, "The keys to the old", " door are new.", tls.SemanticScope())


@fuzzed(100)
@given(where=st.one_of(VALUES, st.tuples(st.integers(-2, 20), st.integers(-2, 20)), st.text("dorane .", max_size=6)))
def test_parts_of_an_answer(where: Any) -> None:
    asked(lambda: ROWS.span(where))
    asked(lambda: ROWS[where])
    asked(lambda: ROWS.traced(where))
    asked(lambda: ROWS.by(where))
    asked(lambda: ROWS.top(where))
    asked(lambda: tls.AnswerMap.from_json(where))


OPTIONS: dict[Callable[..., Any], tuple[str, ...]] = {
    tls.FisherScope: ("probes", "rtol", "exact", "rank", "generator"),
    tls.SpectralScope: ("statistic", "space", "rank", "generator"),
    tls.TemperatureScope: ("norm",),
    tls.PathIntegratedScope: ("target", "steps", "baseline", "start"),
    tls.HetaScope: ("target", "beta", "gamma", "probes", "mask", "normalize", "generator"),
    tls.DirectionScope: ("direction", "hook", "name"),
}
SMALL = st.one_of(VALUES, st.integers(-2, 4), st.floats(-1, 2))


@fuzzed(300)
@given(kind=st.sampled_from(sorted(OPTIONS, key=lambda kind: kind.__name__)), data=st.data())
def test_options_of_scopes(kind: Callable[..., Any], data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from(OPTIONS[kind]), unique=True, max_size=2))
    options = {name: data.draw(SMALL, label=name) for name in names}
    small: dict[Any, dict[str, Any]] = {
        tls.PathIntegratedScope: {"steps": 2},
        tls.HetaScope: {"probes": 1},
        tls.DirectionScope: {"direction": torch.ones(MODEL.cfg.d_model), "hook": "ln_final"},
    }
    if any(isinstance(value, int) and abs(value) > 99 for value in options.values()):
        return  # a right answer, after a long time
    asked(lambda: kind(**{**small.get(kind, {}), **options})(tls.linearize(MODEL, PROMPT[:3])))


@fuzzed(150)
@given(name=st.sampled_from(["wrt", "of", "prepend_bos", "checkpoint"]), value=VALUES)
def test_options_of_linearize(name: str, value: Any) -> None:
    asked(lambda: tls.linearize(MODEL, PROMPT[:3], **{name: value}))


@fuzzed(100)
@given(
    ask=st.sampled_from(["linearity", "sink_report", "check"]),
    name=st.sampled_from(["positions", "tolerance", "sizes", "generator", "early", "threshold", "scopes", "without"]),
    value=VALUES,
)
def test_options_of_diagnostics(ask: str, name: str, value: Any) -> None:
    known = {"linearity": ("positions", "tolerance", "sizes", "generator"), "check": ("without",)}
    known["sink_report"] = ("early", "threshold", "scopes")
    if name not in known[ask]:
        return
    lin, scope = tls.linearize(MODEL, PROMPT[:4]), tls.SemanticScope(3)
    first = [] if name == "scopes" else [[scope] if ask == "sink_report" else scope]
    asked(lambda: getattr(tls, ask)(lin, *first, **{name: value}, **({"directions": 1} if ask == "linearity" else {})))


@fuzzed(100)
@given(
    prompts=st.one_of(VALUES, st.lists(PROMPTS, max_size=3)),
    batch_size=SMALL,
    on_error=st.sampled_from(["warn", "raise", 1]),
)
@pytest.mark.filterwarnings("ignore")
def test_many_prompts(prompts: Any, batch_size: Any, on_error: Any) -> None:
    scope = tls.SemanticScope(3)
    asked(
        lambda: list(
            tls.attribute_many(MODEL, prompts, scope, batch_size=batch_size, on_error=on_error, progress=False)
        )
    )


# -- the command line -------------------------------------------------------------------------------------------------

WORDS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        "--scope --target --versus --position --model --device --dtype --bos --no-bos --check --top semantic fisher "
        "temperature spectral heta id:3 id:-1 -1 0 9 99 cpu float16 float99 nowhere/ - -- --json --html".split()
    ),
)


@fuzzed(200)
@given(arguments=st.lists(WORDS, max_size=5))
def test_the_command_line(arguments: list[str]) -> None:
    """An exit code of 0 to 2, an answer or a reason, and no traceback."""
    if any(word in arguments for word in ("--json", "--html", "heta")) or "\x00" in "".join(arguments):
        return  # files would be written anywhere
    with patch.object(tls, "load_tiny", lambda **_: TINY), patch.object(models, "load", lambda *_, **__: TINY):
        result = CliRunner().invoke(app, ["The keys", *arguments])
    assert result.exit_code in (0, 1, 2)
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert "Traceback" not in result.stderr
    assert result.stdout if result.exit_code == 0 else result.stderr
