"""Chats, words and sentences, and tokens that are bytes: what people have on a real tokenizer."""

import dataclasses
from typing import Any

import pytest
from torch.testing import assert_close
from transformers import PreTrainedTokenizerFast

import tl_scopes as tls
from tests import zoo
from tl_scopes.models import readable
from tl_scopes.results.units import grouped, offsets, shown
from tl_scopes.scopes.baselines import GradientTimesInput, LeaveOneOut
from tl_scopes.views.terminal import report

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " Where are the keys? "},
    {"role": "assistant", "content": "<think>He asks for keys.</think>Near the door."},
    {"role": "user", "content": "Which door?"},
]


@pytest.fixture
def chatty() -> Any:
    """The bundled model with a chat template, as a chat model has one."""
    model = tls.load_tiny()
    model.tokenizer.chat_template = TEMPLATE
    return model


def test_a_chat_is_written_by_its_template(chatty: Any) -> None:
    answer = tls.attribute(chatty, CHAT, tls.SemanticScope(), answer=" The old one.")
    text = chatty.tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert answer.tokens.tolist() == chatty.tokenizer(text, add_special_tokens=False)["input_ids"]
    of_parts: dict[str, str] = {}
    for part, token in zip(answer.parts, answer.str_tokens, strict=True):
        of_parts[part] = of_parts.get(part, "") + token
    assert of_parts["system"] == "Be brief."
    assert of_parts["user 1"].strip() == "Where are the keys?"
    assert of_parts["user 2"].strip() == "Which door?"
    assert of_parts["reasoning"] == "<think>He asks for keys.</think>"
    assert of_parts["assistant"] == "Near the door."
    assert "im_start" in of_parts["template"]


def test_template_tokens_stand_outside_of_shares(chatty: Any) -> None:
    answer = tls.attribute(chatty, CHAT, tls.SemanticScope())
    aside = [i for i, part in enumerate(answer.parts) if part == "template"]
    assert not answer.share[aside].any()
    assert float(answer.share.sum()) == pytest.approx(1, rel=1e-6)
    assert not {row.position for row in answer.top(99)} & set(aside)
    whole = answer.with_template()
    assert whole.share[aside].any()
    assert float(whole.share.sum()) == pytest.approx(1, rel=1e-6)
    users = answer.part("user")
    assert set(users.parts) == {"user 1", "user 2"}
    assert float(users.share.sum()) == pytest.approx(1, rel=1e-6)
    assert "".join(answer.part("user 2").str_tokens).strip() == "Which door?"
    assert answer.part("template").share.any()
    with pytest.raises(ValueError, match="the answer has no part 'tool': it has 'template', 'system', 'user 1'"):
        answer.part("tool")
    with pytest.raises(ValueError, match="it has no parts, since its prompt was not a chat"):
        tls.attribute(chatty, "The keys", tls.SemanticScope()).part("user")
    html = answer.to_html()
    assert "grey: template, not counted" in html
    assert "not counted in shares" in html
    again = tls.Attribution.from_json(answer.to_json())
    assert (again.parts, again.uncounted) == (answer.parts, answer.uncounted)
    assert set(answer.to_dataframe().part) == set(answer.parts)


def test_chats_everywhere(chatty: Any) -> None:
    """Wherever a prompt goes, a chat goes."""
    alone = tls.attribute(chatty, CHAT, tls.SemanticScope())
    (many,) = tls.attribute_many(chatty, [CHAT], tls.SemanticScope())
    assert many is not None
    assert_close(many.scores, alone.scores)
    assert many.parts == alone.parts
    mapped = tls.attribution_map(chatty, CHAT, tls.SemanticScope())
    assert mapped[-1].parts == alone.parts
    beginning = mapped[:2]  # where nothing but the template was read
    assert not beginning.share.any()
    assert 'alt="Heat map of 2 predictions by 2 tokens."' in beginning.to_html()
    rows = tls.answer_map(chatty, CHAT, tls.generate(chatty, CHAT, 3), tls.SemanticScope())
    assert rows[-1].parts[-2:] == ("answer", "answer")
    assert rows.traced().parts == alone.parts
    with pytest.raises(ValueError, match="goes over several parts of the chat, 'template', 'system', which are"):
        rows.by([(0, alone.parts.index("system") + 1)])
    short = tls.answer_map(chatty, CHAT[1:2], " a b", tls.SemanticScope())
    lone = dataclasses.replace(short, answers=tuple(map(_without_messages, short.answers)))
    assert "no token that is counted; " in repr(lone.traced())
    cells = rows.plot().axes[0].images[0].get_array()
    assert [bool(cell) for cell in cells.mask[-1]] == [part == "template" for part in rows[-1].parts]
    assert "grey: template, not counted" in rows.to_html()


@pytest.mark.parametrize("space", ["", " ", "\n", "\n\n ", "\t"])
@pytest.mark.parametrize("template", [TEMPLATE, TEMPLATE.replace(" | trim", "")], ids=["stripped", "as it is"])
def test_blank_space_around_a_message_is_the_messages(chatty: Any, template: str, space: str) -> None:
    """Where the template strips it, there is none; a message is never taken for the template's."""
    chatty.tokenizer.chat_template = template
    said = ["Where are the keys?", "<think>He asks for keys.</think>Near the door.", "Which door?"]
    roles = ["user", "assistant", "user"]
    chat = [{"role": role, "content": space + text + space} for role, text in zip(roles, said, strict=True)]
    lin = tls.linearize(chatty, chat)
    found: dict[str, str] = {}
    for part, token in zip(lin.parts, lin.str_tokens, strict=True):
        found[part] = found.get(part, "") + token
    assert found["user 1"].strip() == said[0]
    assert found["user 2"].strip() == said[2]
    assert found["reasoning"].strip() == "<think>He asks for keys.</think>"
    assert found["assistant"].strip() == "Near the door."
    assert not set(found["template"].split()) & {"Where", "keys?", "Near", "Which"}


@pytest.mark.parametrize(
    ("write", "said", "expected"),
    [
        ("[INST] {{ m.content }} [/INST]", "A keys", " A keys"),
        ("{{ m.content | upper }}", "a key", "A KEY"),
        ("{{ m.content | replace('keys', 'old keys') }}", "the keys", "the old keys"),
    ],
)
def test_what_the_template_makes_of_a_message(chatty: Any, write: str, said: str, expected: str) -> None:
    """The first word too, whose token begins with the template's space; and a message that it writes otherwise."""
    chatty.tokenizer.chat_template = "{% for m in messages %}" + write + "{% endfor %}\n"
    lin = tls.linearize(chatty, [{"role": "user", "content": said}])
    found = "".join(token for token, part in zip(lin.str_tokens, lin.parts, strict=True) if part == "user")
    assert found == expected


def test_a_template_that_moves_what_was_thought(chatty: Any) -> None:
    """One that writes thoughts of its own accord, and one that leaves them out of earlier answers."""
    write = (
        "{% if m.role == 'assistant' and '</think>' in m.content %}{{ THOUGHT }}{% else %}{{ m.content }}{% endif %}"
    )
    split = "m.content.split('</think>')"
    kept = "<think>\n{{ " + split + "[0].split('<think>')[1] }}\n</think>\n\n{{ " + split + "[1] }}"
    for thought, reasoning in ((kept, "<think>\nHe asks for keys.\n</think>\n\n"), ("{{ " + split + "[1] }}", "")):
        chatty.tokenizer.chat_template = TEMPLATE.replace("{{ m.content | trim }}", write).replace(
            "{{ THOUGHT }}", thought
        )
        lin = tls.linearize(chatty, CHAT)
        texts = dict.fromkeys(lin.parts, "")
        for part, token in zip(lin.parts, lin.str_tokens, strict=True):
            texts[part] += token
        assert texts["assistant"] == "Near the door."
        assert texts.get("reasoning", "") == reasoning


def _without_messages(answer: tls.Attribution) -> tls.Attribution:
    """Every token of the prompt as if the template had written it."""
    return dataclasses.replace(
        answer, parts=tuple("answer" if part == "answer" else "template" for part in answer.parts)
    )


def test_a_report_where_no_token_counts(chatty: Any, capsys: pytest.CaptureFixture[str]) -> None:
    answer = _without_messages(tls.attribute(chatty, CHAT[1:2], tls.SemanticScope()))
    report(answer, "the logit", "how steeply {what} can change", 5, None)
    assert "no token counts: up to here there is nothing but template" in capsys.readouterr().out


def test_turns_are_told_apart(chatty: Any) -> None:
    """A role that has the word once is called by its name, others by number; reasoning has that of its answer."""
    thought = {"role": "assistant", "content": "<think>Hm.</think>Yes."}
    for chat, expected in (
        (CHAT[1:2], {"user", "template"}),
        (CHAT[1:], {"user 1", "user 2", "assistant", "reasoning", "template"}),
        ([*CHAT[1:], thought, CHAT[1]], {"user 3", "assistant 2", "reasoning 2", "reasoning 1", "user 1", "user 2"}),
    ):
        assert set(tls.linearize(chatty, chat).parts) >= expected
    answer = tls.attribute(chatty, [*CHAT[1:], thought, CHAT[1]], tls.SemanticScope())
    assert "".join(answer.part("reasoning 2").str_tokens) == "<think>Hm.</think>"
    assert set(answer.part("assistant").parts) == {"assistant 1", "assistant 2"}
    with pytest.raises(ValueError, match="the answer has no part 'user 4': it has"):
        answer.part("user 4")


def test_what_the_template_says_by_itself(chatty: Any) -> None:
    """A system prompt that the template puts in is template; as a message it is the system's."""
    default = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
    chatty.tokenizer.chat_template = default + TEMPLATE
    injected, written = (tls.linearize(chatty, chat) for chat in (CHAT[1:2], CHAT[:2]))
    assert injected.tokens.tolist() == written.tokens.tolist()
    assert "system" not in injected.parts
    assert "".join(t for t, p in zip(written.str_tokens, written.parts, strict=True) if p == "system") == "Be brief."


def test_where_a_chat_and_its_answer_meet(chatty: Any) -> None:
    chatty.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}The ke"
    answer = tls.attribute(chatty, CHAT[1:2], tls.SemanticScope(), answer="ys are")
    assert any("prompt and answer are tokenised apart" in note for note in answer.notes)
    fine = tls.attribute(chatty, CHAT[1:2], tls.SemanticScope(), answer=" are")
    assert not any("apart" in note for note in fine.notes)


def test_bad_chats(chatty: Any) -> None:
    for chat, message in (
        (
            [{"role": "oracle", "content": "a"}],
            "message 0 of the chat has the role 'oracle': roles are system",
        ),
        ([{"role": "user"}], "message 0 of the chat must have its text as 'content', got None"),
        ([*CHAT, {"role": "assistant", "content": "That one."}], "the chat ends with what the assistant says"),
        ([{"role": "user", "content": "\ud800"}], "not valid Unicode"),
    ):
        with pytest.raises(ValueError, match=message):
            tls.linearize(chatty, chat)
    with pytest.raises(ValueError, match="the model's tokenizer has no chat template"):
        tls.linearize(tls.load_tiny(), CHAT)
    chatty.tokenizer.chat_template = "{{ raise_exception('no systems here') }}"
    with pytest.raises(ValueError, match="the model's chat template refuses this chat: no systems here"):
        tls.linearize(chatty, CHAT)
    with pytest.raises(ValueError, match="the model has no tokenizer"):
        tls.linearize(zoo.specimen("bridge llama").model, CHAT)


# -- words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "unit", "expected"),
    [
        (["<s>", "The", " ke", "ys", ",", " don", "'t"], "word", ["<s>", "The", " keys", ",", " don't"]),
        (["\u8bf7", "\u6c42", " a"], "word", ["\u8bf7", "\u6c42", " a"]),
        (["x", "<0xE8>", "<0xAF>", "<0xB7>", "y"], "word", ["x", "\u8bf7", "y"]),
        ([" ", "<0xF0><0x9F>", "<0x98>", "<0x80>", "!"], "word", [" ", "\U0001f600", "!"]),
        (["Hi", ".", " It", " is", " 3", ".", "1", "4", " now", "."], "sentence", ["Hi.", " It is 3.14 now."]),
        (["a", " ", "1", "2", ".", "5", "+", "3", " keys"], "number", ["a", " ", "12.5", "+", "3", " keys"]),
        (["до", "м", "а", " ", "тут"], "word", ["дома", " ", "тут"]),
    ],
)
def test_units(texts: list[str], unit: Any, expected: list[str]) -> None:
    groups = grouped(texts, unit, [""] * len(texts))
    assert [readable("".join(texts[i] for i in group)) for group in groups] == expected
    assert [i for group in groups for i in group] == list(range(len(texts)))


def test_units_end_where_parts_do() -> None:
    assert grouped(["ke", "ys"], "word", ["user", "template"]) == [range(1), range(1, 2)]


def test_bytes_are_shown_as_text() -> None:
    texts = ("a", "<0xE8>", "<0xAF>", "<0xB7>", "<0xE8>", " b", "<0xFF>")
    assert shown(texts) == ("a", "\u8bf7", "⋯", "⋯", "<0xE8>", " b", "<0xFF>")
    whole, places = offsets(texts)
    assert whole == "a\u8bf7<0xE8> b<0xFF>"
    assert places[1:4] == [(1, 2)] * 3


def test_grouped_scores(tiny: Any, no_type_checks: None) -> None:
    """√Σ score² for norms, as of the gradients written one after another; sums for Fisher; |Σ signed|."""
    prompt = "The keys to the unheard door"
    lin = tls.linearize(tiny, prompt)
    scope = tls.SemanticScope()
    answer = scope(lin)
    words = answer.by("word")
    word = next(i for i, text in enumerate(words.str_tokens) if text.strip() == "unheard")
    inside = [i for i, text in enumerate(answer.str_tokens) if text in " unheard" and len(text) > 0]
    inside = [i for i in inside if words.positions[word] <= i < words.positions[word + 1]]
    assert len(inside) > 1
    gradient = lin.vjp(scope.cotangents(lin))[0][inside]
    assert_close(words.scores[word], gradient.norm().float())
    fisher = tls.FisherScope(exact=True)(lin)
    assert_close(fisher.by("word").scores[word], fisher.scores[inside].sum())
    times = GradientTimesInput()(lin)
    assert_close(times.by("word").scores[word], times.signed[inside].sum().abs())
    assert_close(times.by("word").signed[word], times.signed[inside].sum())
    assert float(words.share.sum()) == pytest.approx(1, rel=1e-6)
    assert "the score of a word is √Σ score² over its tokens" in words.notes[-1]
    assert len(words.to_dataframe()) == len(words.scores)
    assert tls.Attribution.from_json(words.to_json()).str_tokens == words.str_tokens
    spans = answer.by([(1, 3), range(4, 6)])
    assert spans.positions[:4] == (0, 1, 3, 4)
    assert_close(spans.scores[1], answer.scores[1:3].norm())
    with pytest.raises(ValueError, match='grouped by "word", "sentence", "number", or a list of spans, got \'line\''):
        answer.by("line")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"the span \(2, 99\) is not in the answer, whose positions are 0 to"):
        answer.by([(2, 99)])
    with pytest.raises(TypeError, match=r"a span is a range of positions or a pair \(start, stop\), got \(1, 2, 3\)"):
        answer.by([(1, 2, 3)])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"the span \(2, 4\) overlaps another one"):
        answer.by([(1, 3), (2, 4)])
    with pytest.raises(ValueError, match=r"the scores of LeaveOneOut\(\) do not tell what several tokens have"):
        LeaveOneOut()(lin).by("word")
    with pytest.raises(ValueError, match=r"the tokens of this answer were put together by word before: ask the answer"):
        words.by("sentence")
    chat = dataclasses.replace(answer, parts=("template", *["user"] * (len(answer.scores) - 1)))
    assert len(chat.by([(1, 3)]).scores) == len(chat.scores) - 1
    with pytest.raises(ValueError, match=r"the span \(0, 3\) goes over several parts of the chat, 'template', 'user'"):
        chat.by([(0, 3)])


def test_grouping_spans_by_number(no_type_checks: None, tiny: Any) -> None:
    with pytest.raises(ValueError, match="or a list of spans, got 3"):
        tls.attribute(tiny, "The keys", tls.SemanticScope()).by(3)  # type: ignore[arg-type]


# -- two tokenizers ---------------------------------------------------------------------------------------------------


def _tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer trained on a few lines: byte-level as GPT-2's, or SentencePiece's way with bytes for the unknown."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    lines = ["The maison is near the old door.", "la maison du chat", "maisons et portes 12 345", "the keys"] * 20
    if kind == "byte-level":
        built = Tokenizer(models.BPE())
        built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        built.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<s>"])
    else:
        built = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        built.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        built.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        special = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=len(special) + 45, special_tokens=special)
    built.train_from_iterator(lines, trainer)
    unknown = "<unk>" if "<unk>" in built.get_vocab() else None
    return PreTrainedTokenizerFast(tokenizer_object=built, bos_token="<s>", unk_token=unknown)


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_answers_and_words_on_a_tokenizer(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tl_scopes.models import read_target, token_text

    class Model:
        tokenizer = _tokenizer(kind)
        cfg = type("cfg", (), {"d_vocab": len(tokenizer)})

    for text in (" maisonette", "maisonette", "\u8bf7 keys", " the old door"):
        target = read_target(Model(), text)
        assert target.text == text
        assert len(target) > 1
        ids = target.ids
        texts = [token_text(Model(), id) for id in ids]
        words = grouped(texts, "word", [""] * len(texts))
        assert [readable("".join(texts[i] for i in group)).strip() for group in words if group][-1] == text.split()[-1]
