"""Scopes are told apart by their class and the contents of their options, alike in every process."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig

import tl_scopes as tls
from tests import own_scopes, zoo
from tests.own_scopes import ALIKE, ALL_DIFFERENT, Holding, Named, Plain, helper, linear, looked_at, scaled
from tests.zoo import PROMPT
from tl_scopes.faithfulness import Perturbation
from tl_scopes.faithfulness.evaluation import evaluate
from tl_scopes.scopes.fingerprint import contents, identity, names, without_addresses

ZERO = Perturbation(("zero",), (0.5,), steps=1, samples=0, randomise=False)


@pytest.fixture
def model() -> Any:
    return zoo.specimen("bridge llama").model


def in_another_process(code: str, *arguments: str) -> str:
    """What a new Python prints, in which texts have other hashes."""
    command = [sys.executable, "-c", code, *arguments]
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_contents_are_different_for_what_is_different() -> None:
    """They are also the same for what is made anew, and hold no address in memory."""
    found = [json.dumps(contents(make())) for make in ALL_DIFFERENT]
    assert found == [json.dumps(contents(make())) for make in ALL_DIFFERENT]
    alike = [(i, j) for i, one in enumerate(found) for j in range(i) if one == found[j]]
    assert not alike
    assert not any("0x" in one for one in found)


@pytest.mark.parametrize(("one", "other"), ALIKE)
def test_contents_are_the_same_for_what_is_alike(one: Callable[[], Any], other: Callable[[], Any]) -> None:
    assert contents(one()) == contents(other())


def test_contents_are_the_same_in_every_process() -> None:
    code = """
import json, tl_scopes
from tests.own_scopes import ALL_DIFFERENT
from tl_scopes.scopes.fingerprint import contents
print(json.dumps([contents(make()) for make in ALL_DIFFERENT]))
"""
    found = json.loads(in_another_process(code))
    assert [i for i, make in enumerate(ALL_DIFFERENT) if contents(make()) != found[i]] == []


def test_edited_code_is_noticed() -> None:
    """What a method does, calls and reads in its module counts; docstrings and comments do not."""

    def written(source: str) -> Any:
        module = ModuleType("notebook")
        exec(source, vars(module))
        return contents(module.Own(), "own")

    own = "class Own:\n    def measure(self, x):\n        return {}\n"
    first = written("K = 1\ndef f(x): return x\n" + own.format("f(K * x)"))
    assert written("K = 1\ndef f(x): return x\n" + own.format("f(K * x)  # so")) == first
    assert written("K = 1\ndef f(x):\n    'Says it.'\n    return x\n" + own.format("f(K * x)")) == first
    for source in (
        "K = 1\ndef f(x): return x\n" + own.format("f(K - x)"),
        "K = 2\ndef f(x): return x\n" + own.format("f(K * x)"),
        "K = 1\ndef f(x): return -x\n" + own.format("f(K * x)"),
        "K = 1\ndef f(x): return x\n" + own.format("f(K * x)") + "    alpha = 2\n",
    ):
        assert written(source) != first


VARIABLES = [
    ('T = {"a": 602}', 'T = {"a": 601}', 'T["a"]'),
    ("T = [602, [1]]", "T = [602, [2]]", "T[0]"),
    ("T = (602, 1)", "T = (602, 2)", "T[0]"),
    ('T = {"a", "b"}', 'T = {"a", "c"}', "len(T)"),
    ("class T:\n    a = 602", "class T:\n    a = 601", "T.a"),
    ("class T:\n    def a(): return 602", "class T:\n    def a(): return 601", "T.a()"),
    (
        "class T:\n    def __init__(self): self.a = 602\nT = T()",
        "class T:\n    def __init__(self): self.a = 6\nT = T()",
        "T.a",
    ),
    ("T = SimpleNamespace(a=602)", "T = SimpleNamespace(a=601)", "T.a"),
    ("T = linear(0)", "T = linear(1)", "T(l)"),
    ("T = partial(max, 602)", "T = partial(max, 601)", "T(l)"),
    ("@cache\ndef T(l): return 602", "@cache\ndef T(l): return 601", "T(l)"),
    ('T = [{"a": 602}]\ndef g(): return T', 'T = [{"a": 601}]\ndef g(): return T', "[g() for _ in l]"),
    ('T = {"a": 602}', 'T = {"a": 601}', '(lambda: T["a"])()'),
    ("own.a = 602", "own.a = 601", "own.a"),
    ("own.a = {'b': 602}", "own.a = {'b': 601}", "own.a['b']"),
    (
        "own.inner = ModuleType('inner'); own.inner.a = 602",
        "own.inner = ModuleType('inner'); own.inner.a = 601",
        "own.inner.a",
    ),
    ("own.a = scaled(602)", "own.a = scaled(601)", "own.a(l)"),
    ("from tests.own_scopes import helper as T", "from tests.own_scopes import uses_helper as T", "T(l)"),
]


@pytest.mark.parametrize(("one", "other", "read"), VARIABLES)
def test_what_a_function_reads_of_its_module_is_noticed(one: str, other: str, read: str) -> None:
    """Containers, objects, classes and what stands in modules of one's own; what it does not read is not."""

    def written(source: str, read: str = read) -> Any:
        module = ModuleType("notebook")
        before = "from functools import cache, partial\nfrom types import ModuleType, SimpleNamespace\n"
        before += "from tests.own_scopes import linear, scaled\nown = ModuleType('own')\n"
        exec(f"{before}{source}\ndef f(l): return {read}", vars(module))
        return contents(module.f)

    assert written(one) == written(one)
    assert written(one) != written(other)
    assert written(one, "l.T + l.own.a") == written(other, "l.T + l.own.a")


def test_a_table_that_changes_is_another_scope(model: Any, tmp_path: Path) -> None:
    """Its results were handed back from the file."""
    module, path = ModuleType("notebook"), tmp_path / "results.jsonl"
    exec('T = {"a": 5, "b": 7}\ndef diff(l): return l[0, -1, T["a"]] - l[0, -1, T["b"]]', vars(module))
    scope = tls.MetricScope(module.diff)
    evaluate(model, [PROMPT], {"own": scope}, ZERO, path=path)
    evaluate(model, [PROMPT], {"own": scope}, ZERO, path=path)
    module.T["b"] = 9
    with pytest.raises(ValueError, match=r"holds results of other settings \(scopes was"):
        evaluate(model, [PROMPT], {"own": scope}, ZERO, path=path)
    module.T["b"] = threading.Lock()
    with pytest.raises(TypeError, match=r"the scope 'own'.* \(the variable 'T'\)\['b'\] is a lock, which cannot be"):
        evaluate(model, [PROMPT], {"own": scope}, ZERO, path=path)


def test_a_model_counts_by_its_weights(model: Any) -> None:
    """Also where a function reads it, before it was used and after."""
    other = zoo.specimen("bridge gpt2").model
    found = contents(Plain(model).unit)
    tls.attribute(model, PROMPT, tls.SemanticScope())
    assert contents(Plain(model).unit) == found
    assert contents(Plain(other).unit) != found
    with model.hooks(fwd_hooks=[("hook_embed", lambda value, hook: value)]):
        with pytest.raises(TypeError, match=r"alpha is a \w+, which has hooks of yours, and cannot be told from one"):
            contents(Plain(model), "own")


def test_a_linearisation_counts_by_what_it_is_of(model: Any) -> None:
    """In another process too, where its pass has other ids."""
    lin = tls.linearize(model, PROMPT)
    found = contents(lin)
    tls.SemanticScope()(lin)
    tls.FisherScope(4)(lin)
    assert contents(lin) == contents(tls.linearize(model, PROMPT)) == found
    code = """
import json
import tl_scopes as tls
from tests import zoo
from tl_scopes.scopes.fingerprint import contents
print(json.dumps(contents(tls.linearize(zoo.specimen("bridge llama").model, zoo.PROMPT))))
"""
    assert json.loads(in_another_process(code)) == found
    different = [lin.at(2 * lin.embeddings), tls.linearize(model, PROMPT[:-1]), tls.linearize(model, PROMPT, 1)]
    different += [tls.linearize(model, PROMPT, rules="linear"), tls.linearize(model, PROMPT, answer=[5])]
    assert all(contents(other) != found for other in different)


def test_a_configuration_of_transformers_counts_without_its_hash() -> None:
    """Which is another in each process; a model of Hugging Face's holds it."""
    found, again = (GenerationConfig.from_model_config(LlamaConfig()) for _ in range(2))
    again._original_object_hash = 1
    assert contents(found) == contents(again)
    assert contents(found) != contents(GenerationConfig.from_model_config(LlamaConfig(bos_token_id=7)))


UNREADABLE = [threading.Lock(), (i for i in range(3)), torch.ones(2, device="meta"), sys.__stdin__]


@pytest.mark.parametrize("option", UNREADABLE, ids=lambda option: type(option).__name__)
def test_what_cannot_be_compared_is_refused_by_name(model: Any, option: Any, tmp_path: Path) -> None:
    """Only a file needs the comparison; without one the scope is evaluated."""
    path, kind = tmp_path / "results.jsonl", type(option).__name__
    scopes: dict[str, tls.Scope] = {"good": Plain(1.0), "own": Holding(option={"a": [option]})}
    with pytest.raises(TypeError, match=rf"the scope 'own'\.option\['a'\]\[0\] is a {kind}, which cannot be compared"):
        evaluate(model, [PROMPT], scopes, ZERO, path=path)
    assert not path.exists()
    assert len(evaluate(model, [PROMPT], scopes, ZERO))


def test_endless_nesting_is_refused() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(TypeError, match="the value is a list, which is nested too deeply"):
        contents(deep)


def test_names_have_no_addresses() -> None:
    """Scopes that are not dataclasses, or hold functions, would have them; a name that is given stays as it is."""
    assert list(names([Plain(1.0), Holding(option=helper)])) == [
        "<tests.own_scopes.Plain object>",
        "Holding(option=<function helper>)",
    ]
    assert list(names({"at 0x12": Plain(1.0)})) == ["at 0x12"]
    assert without_addresses("<bound method f of <Own object at 0x7fA0>>") == "<bound method f of <Own object>>"
    with pytest.raises(ValueError, match="there are 2 scopes and 1 names: name them, in a dict"):
        names([Plain(1.0), Plain(-1.0)])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda: Plain(1.0), lambda: Plain(-1.0)),
        (lambda: Named(1.0), lambda: Named(-1.0)),
        (lambda: Holding(option=linear(0)), lambda: Holding(option=linear(1))),
        (lambda: Plain(pd.Series(range(8))), lambda: Plain(pd.Series([*range(7), 9]))),
        (lambda: Holding(option=scaled(1.0)), lambda: Holding(option=scaled(2.0))),
    ],
)
def test_results_of_one_scope_are_none_of_another(
    model: Any, one: Callable[[], Any], other: Callable[[], Any], tmp_path: Path
) -> None:
    path = tmp_path / "results.jsonl"
    results = evaluate(model, [PROMPT], [one()], ZERO, path=path)
    with pytest.raises(ValueError, match=r"holds results of other settings \(scopes was"):
        evaluate(model, [PROMPT], [other()], ZERO, path=path)
    pd.testing.assert_frame_equal(evaluate(model, [PROMPT], [one()], ZERO, path=path), results, check_exact=True)


def test_another_process_goes_on(tiny: Any, tmp_path: Path) -> None:
    """It finds the results of the same scopes, and refuses those of others."""
    path = tmp_path / "results.jsonl"
    evaluate(tiny, ["The keys to the old doors"], [Plain(1.0), Named(2.0)], ZERO, path=path)
    before = path.read_text()
    code = """
import sys
import tl_scopes as tls
from tests.own_scopes import Named, Plain
from tests.test_fingerprint import ZERO
prompts = ["The keys to the old doors"]
print(len(tls.evaluate(tls.load_tiny(), prompts, [Plain(1.0), Named(2.0)], ZERO, path=sys.argv[1])))
try:
    tls.evaluate(tls.load_tiny(), prompts, [Plain(-1.0), Named(2.0)], ZERO, path=sys.argv[1])
except ValueError as error:
    print(error)
"""
    rows, refusal = in_another_process(code, str(path)).splitlines()
    assert int(rows) == sum(len(result["values"]) for result in json.loads(before.splitlines()[1])["results"])
    assert "holds results of other settings (scopes was" in refusal
    assert path.read_text() == before


@dataclass(frozen=True)
class Along(tls.Scope):
    """A scope whose tensor does not show."""

    direction: Tensor = field(repr=False, compare=False)
    generator: torch.Generator | None = field(default=None, repr=False, compare=False)

    def measure(self, lin: tls.Linearization) -> tls.Measurement:
        return tls.Measurement((lin.embeddings @ self.direction).double())

    def unit(self, lin: tls.Linearization) -> str:
        return "test"


def test_tensors_are_told_apart_by_what_they_hold(model: Any, tmp_path: Path) -> None:
    """Two tensors of one shape and norm are different options, whether they show in the name or not."""
    one = torch.arange(zoo.WIDTH, dtype=torch.float64)
    scopes: list[Callable[[Tensor], tls.Scope]] = [
        lambda direction: tls.DirectionScope(direction, "ln_final"),
        Along,
        lambda direction: tls.PositionCorrectedScope(tls.DirectionScope(direction, "ln_final")),
        lambda direction: tls.PathIntegratedScope(7, baseline=direction),
    ]
    for i, made in enumerate(scopes):
        path = tmp_path / str(i)
        results = evaluate(model, [PROMPT], [made(one)], ZERO, path=path)
        with pytest.raises(ValueError, match="holds results of other settings .scopes was"):
            evaluate(model, [PROMPT], [made(one.flip(0))], ZERO, path=path)
        again = evaluate(model, [PROMPT], [made(one.clone())], ZERO, path=path)
        pd.testing.assert_frame_equal(again, results, check_exact=True)
    evaluate(model, [PROMPT], [Along(one, torch.Generator())], ZERO, path=tmp_path / "drawn")
    evaluate(model, [PROMPT], [Along(one, torch.Generator().manual_seed(1))], ZERO, path=tmp_path / "drawn")


def test_a_scope_is_shown_with_its_checksum() -> None:
    assert identity(looked_at(), "own").startswith("<tests.own_scopes.Lazy object> holding ")
    assert identity(tls.SemanticScope(3), "own") != identity(tls.SemanticScope(4), "own")
    assert own_scopes.uses_helper(1.0) == 3.0
