"""Known causes: the confirmations, the retrieval measures against exact answers, the table."""

import itertools
import json
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tl_scopes as tls
from tests import zoo
from tests.benchmarks import known_causes_table as table
from tests.benchmarks.known_causes_table import BEGIN, END, confirmed, to_markdown
from tests.benchmarks.stored import put_into
from tl_scopes.faithfulness import KnownCause, confirm, differences, english, summary
from tl_scopes.faithfulness.english import KINDS
from tl_scopes.faithfulness.known_causes import (
    MEASURES,
    RANK_MEASURES,
    all_scopes,
    cause_positions,
    is_confirmed,
    known_causes,
    retrieval,
)
from tl_scopes.scopes.baselines import AttentionRollout, RandomBaseline
from tl_scopes.tiny.counterfactuals import TASKS, counterfactuals, replaced
from tl_scopes.tiny.example import Example
from tl_scopes.tiny.language import ASIDES, GERMAN_NOUNS, HOLDERS, NOUNS, THINGS
from tl_scopes.tiny.tasks import examples

ROOT = Path(__file__).parent.parent
ALSO = {"random again": lambda _: RandomBaseline()}


@dataclass(frozen=True)
class Oracle(tls.Scope):
    """A scope that knows the causes of one example; with sign=-1 it ranks them last."""

    example: Example
    sign: float = 1.0

    def measure(self, lin: tls.Linearization) -> tls.Measurement:
        scores = torch.zeros(len(lin.tokens))
        scores[cause_positions(lin, self.example)] = self.sign
        return tls.Measurement(scores)

    def unit(self, lin: tls.Linearization) -> str:
        return "truth"


# -- retrieval --------------------------------------------------------------------------------------------------------


def test_an_oracle_is_perfect(tiny: Any) -> None:
    """A scope that knows the causes is at 1 in all measures; one that ranks them last has a precision of 0."""
    scopes = {"oracle": lambda example: Oracle(example), "liar": lambda example: Oracle(example, -1.0)}
    results = known_causes(tiny, TASKS, 3, scopes)
    assert set(results[results.scope == "oracle"].value) == {1.0}
    liar = results[results.scope == "liar"].set_index("measure").value
    assert set(liar["precision at 1"]) == {0.0}
    assert liar["reciprocal rank"].max() < 0.5


@pytest.mark.parametrize("causes", [1, 2, 3])
def test_chance(causes: int) -> None:
    """The mean over all orders of n tokens is what chance gives: for precision the share of causes, say."""
    n, orders = 6, list(itertools.permutations(range(6)))
    found = [retrieval(torch.tensor(order), range(causes)) for order in orders]
    mean = {measure: sum(one[measure] for one in found) / len(found) for measure in RANK_MEASURES}
    assert mean["precision at 1"] == pytest.approx(causes / n)
    assert mean["precision at n"] == pytest.approx(causes / n)
    # The expected precision at the rank of a cause: of the others before it, a share of (c − 1)/(n − 1) are causes.
    precision = [(1 + (causes - 1) * (rank - 1) / (n - 1)) / rank for rank in range(1, n + 1)]
    assert mean["average precision"] == pytest.approx(sum(precision) / n)
    if causes == 1:
        assert mean["reciprocal rank"] == pytest.approx(sum(1 / rank for rank in range(1, n + 1)) / n)


def test_retrieval_by_hand() -> None:
    found = retrieval(torch.tensor([4, 2, 7, 1, 3]), [2, 1])
    assert found == pytest.approx(dict(zip(RANK_MEASURES, (0, 0.5, (1 / 2 + 2 / 4) / 2, 1 / 2), strict=True)))


def test_evidence_less_distractor_by_hand(tiny: Any) -> None:
    """The share of the causes, less that of as many tokens of the distractor, or of all other tokens."""

    @dataclass(frozen=True)
    class Given(tls.Scope):
        def measure(self, lin: tls.Linearization) -> tls.Measurement:
            assert lin.str_tokens == ("<|bos|>", "The", " keys", " near", " the", " old", " door")
            return tls.Measurement(torch.tensor([100.0, 1, 4, 2, 0, 1, 2]))

        def unit(self, lin: tls.Linearization) -> str:
            return "test"

    for text, expected in {
        "The [keys|key] near the old {door}": 0.4 - 0.2,
        "The [keys|key] near {the old} door": 0.4 - 0.05,
        "The [keys|key] near the old door": 0.4 - 0.6 / 5,
        "[The keys|The key] near the old {door}": 0.5 - 2 * 0.2,
    }.items():
        example = KnownCause.marked(text, " are", " is")
        results = known_causes(tiny, examples=[example], scopes={"given": Given()})
        assert results[results.measure == "evidence less distractor"].value.item() == pytest.approx(expected)


def test_chance_on_the_tasks(tiny: Any) -> None:
    """The interval of the random baseline holds what chance gives: its share of causes."""
    results = known_causes(tiny, ["agreement"], 40, [RandomBaseline()])
    found = summary(results[results.measure == "precision at n"])
    prompts = [
        (tiny.tokenizer(e.prompt)["input_ids"], e.cause_positions(tiny.tokenizer)) for e in examples("agreement", 40)
    ]
    share = sum(len(causes) / (len(tokens) - 1) for tokens, causes in prompts) / 40
    assert found["low"].item() <= share <= found["high"].item()


# -- confirmation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_counterfactuals_are_close(tiny: Any, task: str) -> None:
    """There is one for each cause and some for other words, of words the model knows, and the same ones every time."""
    known = tiny.tokenizer.get_vocab()
    for example in examples(task, 30):
        found = counterfactuals(example)
        assert found == counterfactuals(example)
        assert {other.cause for other in found} - {None} == set(example.causes)
        assert any(other.cause is None for other in found)
        for other in found:
            assert (other.answer == example.target) == (other.cause is None)
            words, changed = (re.findall(r"\w+", prompt) for prompt in (example.prompt, other.prompt))
            new = [word for word in changed if word not in words]
            assert all({f"Ġ{word}", word} & known.keys() for word in new if word.isascii())
            if task != "association" and len(words) == len(changed):
                different = [(a, b) for a, b in zip(words, changed, strict=True) if a != b]
                exchanged = len(different) == 2 and different[0] == different[1][::-1]
                assert len(different) == 1 or exchanged or any(aside in example.prompt for aside in ASIDES)


def test_agreement_turns_on_the_number() -> None:
    for example in examples("agreement_far", 60):
        for other in counterfactuals(example):
            if other.cause is not None and example.prompt[slice(*other.cause)] != "Yesterday":
                assert {other.answer, example.target} in ({" is", " are"}, {" was", " were"})
                start, stop = other.cause
                assert other.prompt[start:stop].endswith("s") != example.prompt[start:stop].endswith("s") or (
                    other.prompt[stop : stop + 1] == "s"
                )


def test_inference_answers_are_who_has_what() -> None:
    """Each counterfactual's answer follows from its own facts and question, read from its text."""
    for task in ("inference_who", "inference_what"):
        for example in examples(task, 60):
            for other in counterfactuals(example):
                had = dict(re.findall(r"The (\w+) had the (\w+)\.", other.prompt))
                named = re.findall(r"The \w+ was the (\w+)\. The \w+ is the$", other.prompt)[0]
                answer = had[named] if named in HOLDERS else {thing: who for who, thing in had.items()}[named]
                assert other.answer == f" {answer}"
                assert (answer in THINGS) == (task == "inference_what")


def test_translation_answers_are_translations() -> None:
    nouns = {german: english for german, _, english in GERMAN_NOUNS}
    genders = {german: gender for german, gender, _ in GERMAN_NOUNS}
    seen = 0
    for example in examples("translation", 100):
        for other in counterfactuals(example):
            word = example.prompt[slice(*example.causes[0])]
            if other.cause is not None and word in nouns:
                start = other.cause[0]
                new = re.match(r"\w+", other.prompt[start:])
                assert new is not None
                assert other.answer == f" {nouns[new[0]]}"
                assert genders[new[0]] == genders[word]
                seen += 1
    assert seen > 20


def test_replaced() -> None:
    assert replaced("a bb c", ((2, 4), "long word"), ((0, 1), "x")) == "x long word c"
    assert replaced("a bb c") == "a bb c"


@pytest.mark.parametrize("task", TASKS)
def test_the_bundled_models_causes_are_confirmed(tiny: Any, task: str) -> None:
    assert sum(is_confirmed(tiny, example) for example in examples(task, 10)) >= 9


def test_wrong_causes_are_not_confirmed(tiny: Any) -> None:
    """A wrong answer, a wrong cause and a missing cause are each noticed."""
    for example in examples("agreement_far", 10):
        assert is_confirmed(tiny, example)
        assert not is_confirmed(tiny, replace(example, target=example.foil, foil=example.target))
        assert not is_confirmed(tiny, replace(example, target=" several tokens"))
    inference = examples("inference_who", 1)[0]
    assert not is_confirmed(tiny, replace(inference, target=inference.foil))
    for example in [e for e in examples("agreement_far", 20) if len(e.causes) == 1]:
        nouns = [m.span() for m in re.finditer(r"\w+", example.prompt) if m[0].removesuffix("s") in NOUNS]
        assert not is_confirmed(tiny, replace(example, causes=(nouns[-1],)))


def test_only_confirmed_examples_count(tiny: Any) -> None:
    """A model that was broken has no confirmed example, and is said not to know the task."""
    broken = zoo.specimen("bridge llama").model  # knows nothing, has no tokenizer
    with pytest.raises(ValueError, match="no tokenizer"):
        known_causes(broken, ["agreement"], 2, [tls.SemanticScope()])
    with tiny.hooks(fwd_hooks=[("blocks.3.hook_resid_post", lambda value, hook: 0 * value)]):
        with pytest.raises(ValueError, match="none of 4 examples of 'inference_who' was confirmed: the model does not"):
            known_causes(tiny, ["inference_who"], 4, [tls.SemanticScope()])


# -- examples of one's own, and in English ----------------------------------------------------------------------------

CLEAN, CHANGED = "The keys to the old cabinet near the door", "The key to the old cabinet near the door"
KEYS = KnownCause(CLEAN, " are", " is", causes="keys", counterfactual=CHANGED, distractor="door", kind="mine")


def test_own_examples(tiny: Any) -> None:
    """Their kinds are the tasks of the results, their numbers count within each kind, and only confirmed ones count."""
    wrong = replace(KEYS, answer=" is", foil=" are")
    other = KnownCause.marked("The [wheel|wheels] of the {cars}", " is", " are", kind="other")
    scopes = {"oracle": lambda example: Oracle(example)}
    results = known_causes(tiny, examples=[wrong, KEYS, other, KEYS], scopes=scopes)
    found = results[results.measure == "average precision"]
    rows = [["mine", 3, 1, 1.0], ["mine", 3, 2, 1.0], ["other", 1, 0, 1.0]]
    assert sorted(found[["task", "examples", "prompt", "value"]].values.tolist()) == rows
    with pytest.warns(UserWarning, match="none was confirmed of 1 of 'mine', which are left out"):
        results = known_causes(tiny, examples=[wrong, other], scopes=scopes)
    assert set(results.task) == {"other"}


def test_confirmation_by_hand(tiny: Any) -> None:
    """The leads are differences of log-probabilities, from a forward pass each; the share decides."""
    (found,) = confirm(tiny, [KEYS])
    lead, without = (
        float(lin.log_probs[lin.token(" are").id] - lin.log_probs[lin.token(" is").id])
        for lin in (tls.linearize(tiny, CLEAN), tls.linearize(tiny, CHANGED))
    )
    assert (found.lead, found.lead_without) == pytest.approx((lead, without), abs=1e-4)
    assert found.is_confirmed
    assert found.is_said
    assert found.said == " are"
    fallen = (lead - without) / lead
    assert confirm(tiny, [KEYS], share=0.99 * fallen)[0].is_confirmed
    (found,) = confirm(tiny, [KEYS], share=1.01 * fallen)
    assert found.why_not is not None
    assert re.fullmatch(r"the model says ' are', and the lead of ' are', \d.\d\d nats, is still -.*", found.why_not)
    (found,) = confirm(tiny, [replace(KEYS, answer=" is", foil=" are")])
    assert found.why_not == f"the model says ' are', and prefers ' are' to ' is' by {lead:.2f} nats"
    assert not found.is_said


def test_each_cause_is_confirmed_by_itself(tiny: Any) -> None:
    """Of two causes the one that does not matter is named; the leads are those with one of them replaced."""
    text = "The [keys|key] to the [old|small] cabinet near the door"
    (found,) = confirm(tiny, [KnownCause.marked(text, " are", " is")])
    assert found.why_not is not None
    assert re.search(r"the lead of ' are', .* is still \d.\d\d when 'old' is replaced", found.why_not)
    lin = tls.linearize(tiny, "The keys to the small cabinet near the door")
    lead = float(lin.log_probs[lin.token(" are").id] - lin.log_probs[lin.token(" is").id])
    assert found.lead_without == pytest.approx(lead, abs=1e-4)


def test_hooks_meet_no_filling(tiny: Any) -> None:
    """A hook that counts positions from the end finds the same whatever else is confirmed beside an example."""

    def last_is_zero(value: torch.Tensor, hook: Any) -> torch.Tensor:
        value = value.clone()
        value[:, -1] = 0
        return value

    own = [
        KnownCause.marked("The [keys|key] to the old cabinet near the door", " are", " is"),
        KnownCause.marked("The [keys|key]", " are", " is"),
        KnownCause.marked("The [keys|key] near the door", " are old", " is"),
    ]
    held = list(examples("association", 30))
    assert any(len({len(tiny.to_tokens(one.prompt)[0]) for one in counterfactuals(example)}) > 1 for example in held)
    with tiny.hooks(fwd_hooks=[("blocks.3.hook_resid_pre", last_is_zero)]):
        for found, example in zip(confirm(tiny, own), own, strict=True):
            (alone,) = confirm(tiny, [example])
            assert (found.said, found.is_confirmed) == (alone.said, alone.is_confirmed)
            assert [found.lead, found.lead_without] == pytest.approx([alone.lead, alone.lead_without], abs=1e-4)
        for example in held:
            texts = [(example.prompt, example.target), *((one.prompt, one.answer) for one in counterfactuals(example))]
            said = [tls.linearize(tiny, prompt).token().text == answer for prompt, answer in texts]
            assert is_confirmed(tiny, example) == all(said)


def test_confirmation_of_longer_answers(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several tokens, of different lengths, and in batches of any size: the log-probability of the whole text."""
    long = replace(KEYS, answer=" are old", foil=" is")
    found = confirm(tiny, [KEYS, long, KEYS])
    spans = [tls.linearize(tiny, CLEAN, answer=answer) for answer in (" are old", " is")]
    lead = [float(span.answer_log_prob(span.log_probs[None])[0]) for span in spans]
    assert found[1].lead == pytest.approx(lead[0] - lead[1], abs=1e-4)
    zoo.batches_of(monkeypatch, 1)
    for one, other in zip(found, confirm(tiny, [KEYS, long, KEYS]), strict=True):
        assert (one.lead, one.lead_without) == pytest.approx((other.lead, other.lead_without), abs=1e-4)


def test_longer_answers_are_explained_whole(tiny: Any) -> None:
    """Scopes with and without a target of their own give what `attribute` gives for the answer, and those that take one
    prediction at a time what they give for the first."""
    example = replace(KEYS, answer=" are old", foil=" is old.")
    scopes = {
        "versus": lambda e: tls.SemanticScope(e.target, versus=e.foil),
        "plain": tls.SemanticScope(),
        "one at a time": AttentionRollout(),
    }
    results = known_causes(tiny, examples=[example], scopes=scopes)
    asked = {
        "one at a time": tls.attribute(tiny, CLEAN, AttentionRollout()),
        "versus": tls.attribute(tiny, CLEAN, tls.SemanticScope(" are old", versus=" is old.")),
        "plain": tls.attribute(tiny, CLEAN, tls.SemanticScope(), answer=" are old"),
    }
    for name, answer in asked.items():
        scores = answer.scores[1 : len(tls.linearize(tiny, CLEAN).tokens)].abs()
        shares = scores / scores.sum()
        value = results[(results.scope == name) & (results.measure == "evidence less distractor")].value.item()
        assert value == pytest.approx(float(shares[1] - shares[-1]), abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_english_examples_are_well_made(kind: str) -> None:
    """There are at least 30 of each kind, in four frames or more, all different; a counterfactual answers the foil."""
    found = english(kind)
    assert len(found) >= 30
    assert len({(one.prompt, one.answer) for one in found}) == len(found)
    assert found == english(kind)
    assert all(one.kind == kind for one in found)
    assert all("[" not in one.prompt + one.counterfactual and "{" not in one.prompt for one in found)
    frames = json.loads((ROOT / "tl_scopes/faithfulness/english.json").read_text(encoding="utf-8"))
    assert len({frame["prompt"] for frame in frames if frame["kind"] == kind}) >= 4


def test_there_are_200_english_examples() -> None:
    assert sum(len(english(kind)) for kind in KINDS) >= 200


def test_a_model_that_knows_no_english() -> None:
    """By default a model that is not the bundled one gets the English examples; what fits none of them says so."""
    model = zoo.specimen("bridge llama").model
    with pytest.raises(ValueError, match="no tokenizer"):
        known_causes(model, scopes=[RandomBaseline()])


def test_causes_as_ranges() -> None:
    assert KnownCause(CLEAN, " are", " is", causes=(4, 8), counterfactual=CHANGED).causes == ((4, 8),)
    assert KnownCause(CLEAN, " are", " is", causes=[(4, 8), "door"], counterfactual=CHANGED).causes == (
        (4, 8),
        (37, 41),
    )
    marked = KnownCause.marked("[A|B] and [C|D] or {E}", " x", " y")
    assert (marked.prompt, marked.counterfactual) == ("A and C or E", "B and D or E")
    assert (marked.causes, marked.distractor) == (((0, 1), (6, 7)), (11, 12))


def test_bad_examples(tiny: Any, no_type_checks: None) -> None:
    good = {"prompt": CLEAN, "answer": " are", "foil": " is", "causes": "keys", "counterfactual": CHANGED}
    for change, error, message in [
        ({"causes": "dogs"}, ValueError, "the cause 'dogs' does not stand in the prompt 'The keys"),
        (
            {"causes": "the"},
            ValueError,
            r"the cause 'the' stands 2 times in .*: give one of \[\(12, 15\), \(33, 36\)\]",
        ),
        ({"distractor": "dogs"}, ValueError, "the distractor 'dogs' does not stand in"),
        ({"distractor": "keys to"}, ValueError, "'keys to' belongs to two causes, or to a cause and the distractor"),
        ({"causes": []}, ValueError, r"the causes are texts or ranges of characters, one at least, got \[\]"),
        ({"causes": (4, 99)}, ValueError, r"the cause \(4, 99\) is not a range of the 41 characters of"),
        ({"causes": [7]}, TypeError, r"a cause is a text, or a range of characters such as \(4, 8\), got 7"),
        ({"causes": [(1.5, 8)]}, TypeError, r"a cause is a text, or a range of characters .*, got \(1.5, 8\)"),
        ({"foil": " are"}, ValueError, "answer and foil are both ' are': the foil is a wrong answer"),
        ({"counterfactual": CLEAN}, ValueError, "the counterfactual is the prompt 'The keys .*' itself"),
        ({"prompt": 3}, TypeError, "the prompt of a known cause is a text, got 3"),
        ({"answer": ""}, ValueError, "the answer of a known cause is empty: give a text"),
    ]:
        with pytest.raises(error, match=message):
            KnownCause(**(good | change))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="there is no cause in 'The keys': write it as \"\\[this|that\\]\""):
        KnownCause.marked("The keys", " are", " is")
    for change, message in [
        (
            {"counterfactual": "The key near the old cabinet"},
            "the prompt has 10 tokens, the counterfactual .* 7: choose",
        ),
        ({"counterfactual": CHANGED.replace("door", "wall")}, r"also replaces \[' door'\], which is not a cause"),
        ({"causes": ["keys", "door"]}, "the counterfactual does not replace the cause 'door'"),
    ]:
        with pytest.raises(ValueError, match=message):
            known_causes(tiny, examples=[KnownCause(**(good | change))], scopes=[RandomBaseline()])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="known causes are given as KnownCause, got 'The keys'"):
        confirm(tiny, ["The keys"])  # type: ignore[list-item]
    with pytest.raises(
        ValueError, match="share is the part of the lead that each cause must be good for, above 0, got 0"
    ):
        confirm(tiny, [KEYS], share=0)
    with pytest.raises(TypeError, match="share is the part of the lead .*, got 'half'"):
        confirm(tiny, [KEYS], share="half")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no English prompts of the kind 'rhyme': choose from subject and verb"):
        english("rhyme")
    with pytest.raises(ValueError, match="give tasks, or examples of your own"):
        known_causes(tiny, ["agreement"], examples=[KEYS])
    with pytest.raises(ValueError, match="there are no examples: give one KnownCause at least"):
        known_causes(tiny, examples=[])
    wrong = replace(KEYS, answer=" is", foil=" are")
    with pytest.raises(
        ValueError, match=r"none of 11 examples was confirmed(?s:.*)the model says ' are'(?s:.*)and 1 more"
    ):
        known_causes(tiny, examples=[wrong] * 11, scopes=[RandomBaseline()])


# -- the table --------------------------------------------------------------------------------------------------------


def test_scopes_beat_chance_at_translation(tiny: Any) -> None:
    """The paper's scopes find the German word; the difference to chance does not hold 0."""
    scopes = [tls.SemanticScope(), tls.TemperatureScope(), tls.FisherScope(), RandomBaseline()]
    results = known_causes(tiny, ["translation"], 12, scopes)
    lead = differences(results[results.measure == "average precision"], "RandomBaseline()")
    assert (lead.low > 0.5).all()


def test_all_scopes(tiny: Any) -> None:
    """By default every scope and baseline takes part, and those about a token do so twice."""
    results = known_causes(tiny, ["agreement"], 1)
    assert list(results.columns) == ["task", "examples", "prompt", "scope", "measure", "value"]
    assert list(dict.fromkeys(results.scope)) == list(all_scopes())
    assert len(results) == len(all_scopes()) * len(MEASURES)
    public = {name for name in tls.__all__ if name.endswith("Scope")} - {
        "Scope",
        "JacobianScope",
        "DirectionScope",
        "MetricScope",
    }
    assert public <= {kind for name in all_scopes() for kind in re.findall(r"\w+Scope", name)}


def test_scopes_are_about_the_answer(tiny: Any) -> None:
    """A scope without a target is about the right answer, one with a target about that."""
    asked = []

    def remember(example: Example) -> tls.Scope:
        asked.append(example)
        return tls.SemanticScope(example.target)

    scopes = {"plain": tls.SemanticScope(), "made": remember, "fixed": tls.SemanticScope(" is")}
    results = known_causes(tiny, ["agreement"], 6, scopes)
    values = {name: results[results.scope == name].value.tolist() for name in scopes}
    assert values["plain"] == values["made"] != values["fixed"]
    assert asked == examples("agreement", 6)


def test_markdown(tiny: Any) -> None:
    results = known_causes(
        tiny, ["agreement", "translation"], 4, {"oracle": lambda e: Oracle(e), "chance": RandomBaseline()}
    )
    lines = to_markdown(results, "average precision", "chance").splitlines()
    assert lines[:2] == ["| average precision | agreement | translation | all | all, less `chance` |", "|---" * 5 + "|"]
    assert lines[2].startswith("| `oracle` | 1.00 (1.00 to 1.00) | 1.00 (1.00 to 1.00) | 1.00 (1.00 to 1.00) | +0.")
    assert re.fullmatch(r"\| `chance` \| 0\.\d\d \(0\.\d\d to [01]\.\d\d\) \| .* \|  \|", lines[3])
    assert confirmed(results) == "Confirmed: agreement 4 of 4, translation 4 of 4."


def test_tasks_may_come_from_anywhere(tiny: Any) -> None:
    """A generator is gone through once."""
    results = known_causes(tiny, (task for task in ("agreement", "translation")), 1, [RandomBaseline()])
    assert results.task.unique().tolist() == ["agreement", "translation"]


def test_the_table_of_a_real_model(tiny: Any) -> None:
    """Both judges in one table, with their means and paired differences; --also brings further methods, by name."""
    methods = table.methods("tests.test_known_causes:ALSO", ["Semantic", "random", "random again"])
    assert list(methods) == ["Semantic", "random", "random again"]
    other = KnownCause.marked("The [wheel|wheels] of the {cars}", " is", " are", kind="other")
    causes = known_causes(tiny, examples=[KEYS, other], scopes=methods)
    prompts = [example.prompt for example in examples("translation", 2)]
    deletion = table.deleted(tiny, methods, prompts)
    lines = table.of_a_real_model(causes, deletion).splitlines()
    assert lines[0] == "| | mine | other | all | all, less Semantic | nats taken | less Semantic |"
    precision = causes[(causes.scope == "Semantic") & (causes.measure == "average precision")].value
    nats = deletion[deletion.scope == "Semantic"].value.mean()
    assert lines[2].startswith(
        f"| Semantic | {precision.iloc[0]:.2f} | {precision.iloc[1]:.2f} | {precision.mean():.2f} |  |"
    )
    assert lines[2].endswith(f"| {nats:.2f} |  |")
    assert lines[3].split("|")[2:] == lines[4].split("|")[2:]
    assert lines[-1] == "Confirmed: mine 1 of 1, other 1 of 1. Deletion: 2 prompts."
    results = tls.evaluate(tiny, prompts, [tls.SemanticScope()], table.DELETION)
    chosen = results[(results.measure == "deletion") & (results.quantity == "log_prob")]
    expected = [chosen[(chosen.prompt == i) & chosen.fraction.isin([0.05, 0.1, 0.2])].value.mean() for i in range(2)]
    assert deletion[deletion.scope == "Semantic"].value.tolist() == pytest.approx(expected)


def test_natural_prompts() -> None:
    prompts = json.loads(table.NATURAL.read_text(encoding="utf-8"))
    assert len(set(prompts)) == len(prompts) == 24
    assert all(20 <= len(prompt.split()) <= 36 for prompt in prompts)


def test_all_tasks_together(tiny: Any) -> None:
    """The last column is the mean over the examples of all tasks."""
    results = known_causes(tiny, ["agreement", "translation"], 3, [tls.SemanticScope(), RandomBaseline()])
    results = results[results.measure == "reciprocal rank"]
    for scope, line in zip(
        ("SemanticScope()", "RandomBaseline()"), to_markdown(results, "reciprocal rank").splitlines()[2:], strict=True
    ):
        of_one = results[results.scope == scope].value
        assert len(of_one) == 6
        assert line.split("|")[4].startswith(f" {of_one.mean():.2f} (")


def test_bos_is_ranked_when_asked(tiny: Any) -> None:
    """A scope that always names BOS first has its first cause second then."""

    @dataclass(frozen=True)
    class Bos(tls.Scope):
        example: Example

        def measure(self, lin: tls.Linearization) -> tls.Measurement:
            scores = Oracle(self.example).measure(lin).scores
            scores[0] = 10
            return tls.Measurement(scores)

        def unit(self, lin: tls.Linearization) -> str:
            return "none"

    for bos, rank in ((False, 1.0), (True, 0.5)):
        results = known_causes(tiny, ["translation"], 3, {"bos": lambda e: Bos(e)}, bos=bos)
        assert (results[results.measure == "reciprocal rank"].value == rank).all()


def test_the_command(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"above\n{BEGIN}\nold\n{END}\nbelow\n")
    command = [sys.executable, "-m", "tests.benchmarks.known_causes_table", "--count", "1", "--tasks", "agreement"]
    command += ["--file", str(tmp_path / "stored.json")]
    run = subprocess.run([*command, "--into", str(page)], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.startswith("Confirmed: agreement 1 of 1.")
    assert all(f"| {measure} | agreement |" in run.stdout for measure in MEASURES)
    above, table, below = re.split(f"{BEGIN}\n|\n{END}\n", page.read_text())
    assert (above, below) == ("above\n", "below\n")
    assert table.startswith("| average precision | agreement |")
    assert table.endswith("Confirmed: agreement 1 of 1.")
    assert "old" not in table
    page.write_text("no marks")
    refused = subprocess.run([*command, "--into", str(page)], capture_output=True, text=True, check=False, cwd=ROOT)
    assert "has no place for the table" in refused.stderr
    assert not refused.stdout  # before anything is computed


def test_the_readme_has_this_table() -> None:
    """It has all scopes, all tasks and enough examples; `--into docs/evidence.md` makes it anew."""
    page = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    table = page[page.index(BEGIN) : page.index(END)]
    assert re.findall(r"^\| `(.*?)` \|", table, re.MULTILINE) == list(all_scopes())
    assert table.splitlines()[1].startswith(f"| average precision | {' | '.join(TASKS)} | all | all, less")
    counts = re.findall(r"(\d+) of (\d+)", table[table.index("Confirmed") :])
    assert len(counts) == len(TASKS)
    assert all(int(n) >= 50 for n, _ in counts)


def test_the_readme_has_the_table_of_a_real_model() -> None:
    """It has the methods of the command, kinds of English prompts, and enough of them."""
    page = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    found = page[page.index(table.REAL_BEGIN) : page.index(table.REAL_END)]
    rows = [line.split("|")[1].strip() for line in found.splitlines() if line.startswith("|")]
    assert rows[0] == ""
    assert set(rows[2:]) <= set(table.METHODS)
    assert len(rows) >= 12
    counts = re.findall(r"([\w ]+?) (\d+) of (\d+)[,.]", found[found.index("Confirmed: ") + len("Confirmed:") :])
    assert [kind.strip() for kind, _, _ in counts] == list(KINDS)
    assert sum(int(n) for _, n, _ in counts) >= 60


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_a_page_without_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"{BEGIN}\nold\n")
    with pytest.raises(ValueError, match=r"page\.md' has no place for the table: put the lines"):
        put_into(page, "new", BEGIN, END)
    assert page.read_text() == f"{BEGIN}\nold\n"


def test_bad_input(tiny: Any, no_type_checks: None) -> None:
    for arguments, error, message in [
        ((["logistic"],), ValueError, "causes of the task 'logistic' cannot be confirmed: choose from agreement"),
        (([],), ValueError, "there are no tasks: choose from agreement, agreement_far"),
        ((["agreement", "translation", "agreement"],), ValueError, "each task is given once, got 'agreement' 2 times"),
        ((["agreement"], "3"), TypeError, "count must be at least 1, and an integer, got '3'"),
        (("agreement",), TypeError, r"tasks are several, got the text 'agreement': write \['agreement'\]"),
        ((["agreement"], 0), ValueError, "count must be at least 1, got 0"),
        ((["agreement"], 1, []), ValueError, "there are no scopes to evaluate"),
        ((["agreement"], 1, {}), ValueError, "there are no scopes to evaluate"),
        ((["agreement"], 1, {"a": tls.SemanticScope}), TypeError, r"write SemanticScope\(\)"),
        ((["agreement"], 1, {"a": "SemanticScope()"}), TypeError, "expected a scope such as"),
    ]:
        with pytest.raises(error, match=message):
            known_causes(tiny, *arguments)  # type: ignore[arg-type]
    for options, message in [
        ({"bos": "no"}, "bos is True or False, got 'no'"),
        ({"seed": "x"}, "seed must be an integer, got 'x'"),
    ]:
        with pytest.raises(TypeError, match=message):
            known_causes(tiny, ["agreement"], 1, [RandomBaseline()], **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no counterfactuals for the task 'lorenz'"):
        counterfactuals(examples("lorenz", 1)[0])
    example = examples("agreement", 1)[0]
    elsewhere = tls.linearize(tiny, "Something else")
    with pytest.raises(ValueError, match="otherwise than the model, so that its causes have no place"):
        cause_positions(elsewhere, example)
    assert cause_positions(tls.linearize(tiny, example.prompt, prepend_bos=False), example) == [
        position - 1 for position in cause_positions(tls.linearize(tiny, example.prompt), example)
    ]
