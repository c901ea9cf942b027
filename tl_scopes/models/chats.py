"""A chat as the model's template writes it: its token ids, and for each token whose it is.

Some templates put a system prompt in front ("You are a helpful assistant.") where the chat has none. It counts as
template, which has no share, since nobody in the chat said it. To give it one, write it into the chat as a message of
the role "system".
"""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from tl_scopes.models.supported import Model
from tl_scopes.models.tokens import require_text, tokenizer_of

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Who may say something in a chat."""
TEMPLATE, REASONING = "template", "reasoning"
"""The other parts of a chat: what the template puts around messages, and what is thought before an answer."""

_MARK = "\u2063\u2064\u2063"
"""A text that no message holds."""


def is_chat(prompt: object) -> bool:
    """Whether a prompt is a list of messages."""
    return isinstance(prompt, Sequence) and len(prompt) > 0 and all(isinstance(one, Mapping) for one in prompt)


def read_chat(model: Model, messages: Any) -> tuple[list[int], tuple[str, ...]]:
    """The token ids of a chat, up to where the assistant answers, and for each the part that it belongs to.

    The parts are the roles, "template" for all that the template writes of its own (a system prompt too, where the chat
    has none), and "reasoning" for what stands between <think> and </think> in what the assistant said. Where a role has
    the word several times its turns are numbered, "user 1" and "user 2"; reasoning has the number of its answer.

    Raises:
        ValueError: for a model without a tokenizer or a tokenizer without a template; a message without role or
            content; an unknown role; a chat that ends with what the assistant says; one that the template refuses.
    """
    tokenizer = tokenizer_of(model)
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "the model's tokenizer has no chat template, so that it is not known how a chat is written: give the text "
            "of the whole prompt, or set tokenizer.chat_template."
        )
    roles = [_role(message, i) for i, message in enumerate(messages)]
    if roles[-1] == "assistant":
        raise ValueError(
            "the chat ends with what the assistant says: leave that message out, and explain it by answer=, or add "
            "what the user says next."
        )

    def written(said: Sequence[Mapping[str, Any]]) -> str:
        chat = [dict(one) for one in said]
        return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))

    try:
        text = written(messages)
    except Exception as error:  # templates are programs, and raise what they like
        raise ValueError(f"the model's chat template refuses this chat: {error}") from error

    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=bool(tokenizer.is_fast))
    ids: list[int] = list(encoded["input_ids"])
    ranges = _ranges(text, messages, written, _turns(roles))
    if not tokenizer.is_fast:  # it does not say where its tokens stand
        return ids, ()
    return ids, tuple(_part(text, ranges, start, end) for start, end in encoded["offset_mapping"])


def _role(message: Mapping[str, Any], number: int) -> str:
    """The role of a message.

    Raises:
        ValueError: for an unknown role, and for a content that is not a text, or not valid Unicode.
    """
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"message {number} of the chat has the role {role!r}: roles are {', '.join(ROLES)}.")
    if not isinstance(content, str):
        raise ValueError(f"message {number} of the chat must have its text as 'content', got {content!r}.")
    require_text(content, "message")
    return str(role)


def _turns(roles: Sequence[str]) -> list[str]:
    """For each message the number of its turn, with a space in front; nothing where its role has the word once."""
    return [f" {roles[: i + 1].count(role)}" if roles.count(role) > 1 else "" for i, role in enumerate(roles)]


def _ranges(
    text: str,
    messages: Sequence[Mapping[str, Any]],
    written: Callable[[Sequence[Mapping[str, Any]]], str],
    turns: Sequence[str],
) -> list[tuple[int, int, str]]:
    """Where in the text of a chat its messages stand, each found by writing the chat with a mark in its place.

    Templates may strip messages, and leave out what was thought before an earlier answer. What a message has of blank
    space, and the template writes, is the message's.
    """
    found = []
    for i, message in enumerate(messages):
        marked = ""
        with suppress(Exception):  # a template may refuse the mark
            marked = written([*messages[:i], {**message, "content": _MARK}, *messages[i + 1 :]])
        before, mark, after = marked.partition(_MARK)
        start, end = len(before), len(before) + len(_said(text, before, after, message["content"]))
        if not mark or start == end:
            continue
        thought = re.compile(r"\s*<think>.*?</think>\s*", re.DOTALL).match(text, start, end)
        if thought and message["role"] == "assistant":
            found.append((start, thought.end(), REASONING + turns[i]))
            start = thought.end()
        found.append((start, end, str(message["role"]) + turns[i]))
    return found


def _said(text: str, before: str, after: str, content: str) -> str:
    """What the template made of a message; empty where that is not known.

    It is what stands between the text before and after a mark in its place. Where the template writes something else
    after it, the message is looked for as it is, with and without blank space and what was thought.
    """
    start, end = len(before), len(text) - len(after)
    if start <= end and text.startswith(before) and text.endswith(after):
        return text[start:end]
    answered = re.sub(r"^\s*<think>.*?</think>\s*", "", content, flags=re.DOTALL)
    ways = (content, content.lstrip(), content.rstrip(), content.strip(), answered, answered.strip())
    return next((way for way in ways if way.strip() and text.startswith(way, start)), "")


def _part(text: str, ranges: Sequence[tuple[int, int, str]], start: int, end: int) -> str:
    """The part in which most of a token stands; blank space around its letters does not count."""
    if letters := text[start:end].strip():
        start = text.index(letters, start)
        end = start + len(letters)
    shares = [(min(end, stop) - max(start, begin), part) for begin, stop, part in ranges]
    most, part = max(shares, default=(0, TEMPLATE))
    return part if 2 * most >= max(1, end - start) else TEMPLATE
