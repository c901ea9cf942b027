"""From a prompt to token ids, and from ids to text that can be shown."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

from tl_scopes.models.kinds import Model

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
        ids = model.to_tokens(prompt, prepend_bos=prepend_bos, truncate=False)
    elif isinstance(prompt, Tensor):
        if prompt.is_floating_point() or prompt.is_complex() or prompt.dtype == torch.bool:
            raise TypeError(f"token ids must be integers, got a tensor of {prompt.dtype}.")
        ids = prompt
    elif isinstance(prompt, Sequence) and not isinstance(prompt, bytes):
        if any(isinstance(item, str | Sequence | Tensor) and not _is_scalar(item) for item in prompt):
            raise ValueError(
                f"expected one prompt, got a batch of {len(prompt)}: call linearize or attribute once for each."
            )
        if not all(isinstance(item, int) or _is_scalar(item) for item in prompt):
            raise TypeError(f"token ids must be integers, got {prompt!r}.")
        ids = torch.tensor([int(item) for item in prompt], dtype=torch.long)
    else:
        raise TypeError(f"a prompt is a str, a list of token ids or a 1-D tensor of them, got {type(prompt).__name__}.")
    if ids.ndim == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.ndim != 1:
        raise ValueError(f"expected one prompt, got token ids of shape {tuple(ids.shape)}: pass one row of them.")
    if len(ids) == 0:
        raise ValueError("the prompt is empty: give at least one token.")
    vocab, context = model.cfg.d_vocab, model.cfg.n_ctx
    outside = ids[(ids < 0) | (ids >= vocab)]
    if len(outside):
        raise ValueError(f"token id {outside[0].item()} is outside the vocabulary of {vocab} (ids 0 to {vocab - 1}).")
    if context and len(ids) > context:
        raise ValueError(
            f"the prompt has {len(ids)} tokens, the model's context is {context}: shorten it, or pass a part of it."
        )
    return ids.to(device=_device(model), dtype=torch.long)


def _is_scalar(item: Any) -> bool:
    return isinstance(item, Tensor) and item.ndim == 0 and not item.is_floating_point()


def _device(model: Model) -> torch.device:
    return next(model.parameters()).device


def token(model: Model, target: str | int) -> Token:
    """The vocabulary entry meant by a text or an id.

    Raises:
        ValueError: a text of several tokens or of none, an id out of range, text without a tokenizer.
        TypeError: neither text nor id.
    """
    if isinstance(target, bool) or not isinstance(target, str | int):
        raise TypeError(f"a target is a token as text or as id, got {target!r}.")
    vocab = model.cfg.d_vocab
    if isinstance(target, int):
        if not 0 <= target < vocab:
            raise ValueError(f"target {target} is outside the vocabulary of {vocab} (ids 0 to {vocab - 1}).")
        return Token(target, token_text(model, target))
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise ValueError(f"the model has no tokenizer: pass the target {target!r} as a token id.")
    ids = tokenizer.encode(target, add_special_tokens=False)
    if len(ids) != 1 and target.startswith(" "):
        # SentencePiece writes the space itself: "Paris" alone is the piece "▁Paris", the token of " Paris".
        bare = tokenizer.encode(target[1:], add_special_tokens=False)
        if len(bare) == 1 and str(tokenizer.convert_ids_to_tokens(bare[0])).startswith("▁"):
            ids = bare
    if not ids or ids == [getattr(tokenizer, "unk_token_id", None)]:
        raise ValueError(f"the target {target!r} is unknown to the tokenizer: pass the token id.")
    if len(ids) > 1:
        pieces = [Token(i, token_text(model, i)) for i in ids]
        listed = ", ".join(f"{piece.text!r} (id {piece.id})" for piece in pieces)
        hint = "" if target.startswith(" ") else f" A leading space may be missing: {' ' + target!r}."
        raise ValueError(
            f"the target {target!r} is {len(ids)} tokens: {listed}. "
            f"Pass one of them, say the first, target={pieces[0].text!r}.{hint}"
        )
    return Token(ids[0], token_text(model, ids[0]))


def token_text(model: Model, id: int) -> str:
    """One token as text; bytes that are no whole character show as <0xE2>, ids without a tokenizer as <17>."""
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        return f"<{id}>"
    text: str = tokenizer.decode([id], clean_up_tokenization_spaces=False)
    piece = str(tokenizer.convert_ids_to_tokens(id))
    if "\ufffd" in text:
        to_byte = _byte_of_character()
        if all(character in to_byte for character in piece):
            return "".join(f"<0x{to_byte[character]:02X}>" for character in piece)
        return piece
    if piece.startswith("▁") and not text.startswith(" "):  # decoding a single piece drops its space
        return " " + text
    return text


def _byte_of_character() -> dict[str, int]:
    """Which byte each character of a byte-level BPE vocabulary stands for (the printable alphabet of GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
