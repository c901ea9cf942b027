"""Tokens, ids and positions: what a text or a number means, and how a token is shown."""

import re
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

from jaxtyping import Int
from torch import Tensor

from tl_scopes.models.arguments import as_int
from tl_scopes.models.supported import Model


class Token(NamedTuple):
    """A vocabulary entry."""

    id: int
    text: str


def starts_with_bos(model: Model, tokens: Int[Tensor, "token"]) -> bool:
    """Whether the first of these tokens is the tokenizer's BOS token."""
    return int(tokens[0]) == getattr(getattr(model, "tokenizer", None), "bos_token_id", None)


def require_text(text: str, what: str) -> None:
    """Refuse text that holds half a character, which no tokenizer takes.

    Raises:
        ValueError: for a lone surrogate, with its place.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the {what} {text[:40]!r} is not valid Unicode: at {error.start} it has {text[error.start]!r}, half of a "
            "character. Decode the text that it comes from as UTF-8."
        ) from error


def vocabulary_size(model: Model) -> int:
    """How many token ids the model has."""
    return int(model.cfg.d_vocab)


def tokenizer_of(model: Model) -> Any:
    """The model's tokenizer.

    Raises:
        ValueError: for a model without one.
    """
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise ValueError("the model has no tokenizer: pass token ids instead of text.")
    return tokenizer


def padding_token(model: Model) -> int:
    """The id of the padding token.

    Raises:
        ValueError: for a tokenizer without one, or a model without a tokenizer.
    """
    pad = getattr(getattr(model, "tokenizer", None), "pad_token_id", None)
    if pad is None:
        raise ValueError('the model has no padding token: replace embeddings by "mean" or "zero" instead of "pad".')
    return int(pad)


def context_length(model: Model) -> int | None:
    """The length of the longest prompt; None where Hugging Face has no limit, where TransformerLens makes one up."""
    config = getattr(getattr(model, "original_model", None), "config", None)
    names = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length")
    if hasattr(config, "model_type") and not any(getattr(config, name, None) for name in names):
        return None
    return int(model.cfg.n_ctx)


def token(model: Model, target: Any, vocab: int | None = None, what: str = "target") -> Token:
    """The entry of a vocabulary that a text or an id means.

    Args:
        model: a checked model.
        target: text or id.
        vocab: how many entries there are; None is as many as the model has token ids.
        what: what the entry is for, as errors call it.

    Raises:
        ValueError: for a text of several tokens or of none, an id out of range, text without a tokenizer.
        TypeError: for something that is neither text nor id.
    """
    vocab = vocabulary_size(model) if vocab is None else vocab
    named = vocab == vocabulary_size(model)  # else the outputs are not tokens, as in models of algorithmic tasks
    if not isinstance(target, str):
        id = as_int(target, f"a {what} is a token as text or as id")
        if not 0 <= id < vocab:
            raise ValueError(f"{what} {id} is outside the vocabulary of {vocab} (ids 0 to {vocab - 1}).")
        return Token(id, token_text(model, id) if named else f"<{id}>")
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None or not named:
        raise ValueError(f"the model has no tokenizer for its output: pass the {what} {target!r} as a token id.")
    require_text(target, what)
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
    """The ways in which a tokenizer may write a token of this text: as it is, in SentencePiece, in byte-level BPE."""
    yield text
    yield text.replace(" ", "▁")
    named = re.findall("<0x([0-9A-F]{2})>", text)
    data = bytes.fromhex("".join(named)) if named and len(text) == 6 * len(named) else text.encode(errors="replace")
    if len(data) == 1:
        yield f"<0x{data[0]:02X}>"
    to_character = {byte: character for character, byte in byte_of_character().items()}
    yield "".join(to_character[byte] for byte in data)


def token_text(model: Model, id: int) -> str:
    """One token as text; bytes that are not a whole character show as <0xE2>, ids without a name as <17>."""
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
    """The byte that each character of a byte-level BPE vocabulary stands for (the printable alphabet of GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
