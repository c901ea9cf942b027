"""From a prompt to token ids, and from ids to text that can be shown."""

import operator
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

from tl_scopes.models.supported import Model

Prompt: TypeAlias = str | Sequence[int] | Tensor


class Token(NamedTuple):
    """A vocabulary entry."""

    id: int
    text: str


def tokenize(model: Model, prompt: Prompt, prepend_bos: bool | None = None) -> Int[Tensor, "token"]:
    """Token ids of one prompt, on the model's device.

    Text is tokenised as TransformerLens does it, BOS included by the same default; ids are taken as they are.

    Raises:
        ValueError: empty prompt, several prompts, ids out of range, longer than the context, text without a tokenizer.
        TypeError: anything that is no prompt.
    """
    if isinstance(prompt, str):
        if prompt == "":
            raise ValueError("the prompt is empty: give at least one character.")
        if getattr(model, "tokenizer", None) is None:
            raise ValueError("the model has no tokenizer: pass token ids instead of text.")
        ids = model.to_tokens(prompt, prepend_bos=prepend_bos, truncate=False)[0].tolist()
    else:
        ids = _ids(prompt)
    if not ids:
        raise ValueError("the prompt is empty: give at least one token.")
    vocab, context = model.cfg.d_vocab, _context(model)
    for id in ids:
        if not 0 <= id < vocab:
            raise ValueError(f"token id {id} is outside the vocabulary of {vocab} (ids 0 to {vocab - 1}).")
    if context is not None and len(ids) > context:
        raise ValueError(
            f"the prompt has {len(ids)} tokens, the model's context is {context}: shorten it, or pass a part of it."
        )
    return torch.tensor(ids, device=next(model.parameters()).device)


def starts_with_bos(model: Model, tokens: Int[Tensor, "token"]) -> bool:
    """Whether the first of these tokens is the tokenizer's BOS token."""
    return int(tokens[0]) == getattr(getattr(model, "tokenizer", None), "bos_token_id", None)


def _ids(prompt: Any) -> list[int]:
    """Token ids from a list or from a tensor or array of one row."""
    values = prompt.tolist() if isinstance(prompt, Tensor) or hasattr(prompt, "__array__") else prompt
    if not isinstance(values, Sequence) or isinstance(values, bytes):
        raise TypeError(f"a prompt is a str, a list of token ids or a 1-D tensor of them, got {type(prompt).__name__}.")
    if len(values) == 1 and isinstance(values[0], list) and values is not prompt:
        values = values[0]  # the one row that model.to_tokens returns
    if any(isinstance(value, str | Sequence) for value in values):
        raise ValueError(
            f"expected one prompt, got a batch of {len(values)}: call attribute_many, or linearize once for each."
        )
    return [as_int(value, "token ids must be integers") for value in values]


def as_int(value: Any, rule: str) -> int:
    """An integer of Python's, numpy's or torch's; no bool and no float.

    Raises:
        TypeError: for anything else.
    """
    if not isinstance(value, bool) and getattr(value, "dtype", None) is not torch.bool:
        with suppress(TypeError):
            return operator.index(value)
    raise TypeError(f"{rule}, got {value!r}.")


def as_count(value: Any, rule: str) -> int:
    """An integer from 1 on, of Python's, numpy's or torch's.

    Raises:
        ValueError: for anything else.
    """
    with suppress(TypeError):
        if (count := as_int(value, rule)) >= 1:
            return count
    raise ValueError(f"{rule}, got {value!r}.")


def _context(model: Model) -> int | None:
    """The longest prompt; None where Hugging Face knows no limit, for TransformerLens then makes one up."""
    config = getattr(getattr(model, "original_model", None), "config", None)
    names = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length")
    if hasattr(config, "model_type") and not any(getattr(config, name, None) for name in names):
        return None
    return int(model.cfg.n_ctx)


def token(model: Model, target: Any, vocab: int, what: str = "target") -> Token:
    """The entry of a vocabulary of size `vocab` that is meant by a text or an id; errors call it by `what` it is for.

    Raises:
        ValueError: a text of several tokens or of none, an id out of range, text without a tokenizer.
        TypeError: neither text nor id.
    """
    named = vocab == model.cfg.d_vocab  # else outputs are no tokens, as in models of algorithmic tasks
    if not isinstance(target, str):
        id = as_int(target, f"a {what} is a token as text or as id")
        if not 0 <= id < vocab:
            raise ValueError(f"{what} {id} is outside the vocabulary of {vocab} (ids 0 to {vocab - 1}).")
        return Token(id, token_text(model, id) if named else f"<{id}>")
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None or not named:
        raise ValueError(f"the model has no tokenizer for its output: pass the {what} {target!r} as a token id.")
    for piece in _pieces(target):
        id = tokenizer.convert_tokens_to_ids(piece)
        if id is not None and tokenizer.convert_ids_to_tokens(id) == piece and token_text(model, id) == target:
            return Token(id, target)
    ids = tokenizer.encode(target, add_special_tokens=False)
    if not ids or ids == [getattr(tokenizer, "unk_token_id", None)]:
        raise ValueError(f"the {what} {target!r} is unknown to the tokenizer: pass the token id.")
    found = [Token(id, token_text(model, id)) for id in ids]
    if len(found) == 1 and found[0].text.strip() == target.strip():
        return found[0]
    listed = ", ".join(f"{piece.text!r} (id {piece.id})" for piece in found)
    spaced = tokenizer.encode(f" {target}", add_special_tokens=False)
    hint = f" With a leading space it is one token: {' ' + target!r}." if len(spaced) == 1 else ""
    raise ValueError(
        f"the {what} {target!r} is {len(found)} token{'s' * (len(found) > 1)}: {listed}.{hint} "
        f"Pass the id of one of them, say the first, {what}={found[0].id}."
    )


def _pieces(text: str) -> Iterator[str]:
    """How a tokenizer may write a token of this text: as it is, in SentencePiece, in byte-level BPE."""
    yield text
    yield text.replace(" ", "▁")
    named = re.findall("<0x([0-9A-F]{2})>", text)
    data = bytes.fromhex("".join(named)) if named and len(text) == 6 * len(named) else text.encode(errors="replace")
    if len(data) == 1:
        yield f"<0x{data[0]:02X}>"
    to_character = {byte: character for character, byte in byte_of_character().items()}
    yield "".join(to_character[byte] for byte in data)


def token_text(model: Model, id: int) -> str:
    """One token as text; bytes that are no whole character show as <0xE2>, ids without a name as <17>."""
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None or id >= len(tokenizer):  # a vocabulary may be padded
        return f"<{id}>"
    text: str = tokenizer.decode([id], clean_up_tokenization_spaces=False)
    piece = str(tokenizer.convert_ids_to_tokens(id))
    if "\ufffd" in text and piece != "\ufffd":
        to_byte = byte_of_character()
        if re.fullmatch("<0x[0-9A-F]{2}>", piece) or not all(character in to_byte for character in piece):
            return piece
        return "".join(f"<0x{to_byte[character]:02X}>" for character in piece)
    if piece.startswith("▁") and not text.startswith(" "):  # decoding a single piece drops its space
        return " " + text
    return text or piece


@cache
def byte_of_character() -> dict[str, int]:
    """Which byte each character of a byte-level BPE vocabulary stands for (the printable alphabet of GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
