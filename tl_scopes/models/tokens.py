"""Tokens, ids and positions: what a text or a number means, and how a token is shown."""

import re
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

from jaxtyping import Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from tl_scopes.models.arguments import as_int
from tl_scopes.models.supported import Model, hf_config, parts_of
from tl_scopes.models.wording import abridged


class Token(NamedTuple):
    """A vocabulary entry."""

    id: int
    text: str


@dataclass(frozen=True)
class Target:
    """What is explained: one token, the tokens of a text one after another, or any of several tokens.

    Attributes:
        tokens: the tokens, each as id and text.
        any_of: whether one of them is meant, whichever, and not all of them in this order.
    """

    tokens: tuple[Token, ...]
    any_of: bool = False

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def ids(self) -> list[int]:
        """The ids of the tokens."""
        return [token.id for token in self.tokens]

    @property
    def id(self) -> int:
        """The id of a target of one token.

        Raises:
            ValueError: for a target of several tokens.
        """
        if len(self.tokens) != 1:
            raise ValueError(f"the target {self.text!r} is {len(self.tokens)} tokens: `ids` are {abridged(self.ids)}.")
        return self.tokens[0].id

    @property
    def text(self) -> str:
        """The text: of all tokens in their order, or of each of them, with a bar between."""
        if self.any_of:
            return "|".join(token.text for token in self.tokens)
        return readable("".join(token.text for token in self.tokens))

    @property
    def steps(self) -> int:
        """How many predictions it takes: one, or one for each token of a text."""
        return 1 if self.any_of else len(self.tokens)

    @property
    def is_span(self) -> bool:
        """Whether the tokens follow one another, so that they are predicted at several positions."""
        return len(self.tokens) > 1 and not self.any_of

    def overlaps(self, other: "Target") -> bool:
        """Whether both are about the same prediction and have a token in common, or are the same text."""
        if self.is_span or other.is_span:
            return self == other
        return not set(self.ids).isdisjoint(other.ids)


def starts_with_bos(model: Model, tokens: Int[Tensor, "token"]) -> bool:
    """Whether the first of these tokens is the tokenizer's BOS token."""
    return int(tokens[0]) == special_id(model, "bos")


def special_id(model: Model, name: Literal["bos", "eos", "pad", "unk"]) -> int | None:
    """The id of a special token of the tokenizer; None where it has none, or the model has no tokenizer."""
    return getattr(getattr(model, "tokenizer", None), f"{name}_token_id", None)


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
    """How many token ids the model has.

    The weights say so where they can: a bridge of TransformerLens 4 writes the size of a tokenizer that is assigned to
    it into its configuration, and the vocabulary may be padded to more.
    """
    table = _part(model, "embed", nn.Embedding)
    return int(model.cfg.d_vocab if table is None else table.num_embeddings)


def output_size(model: Model) -> int:
    """How many outputs the model has: as many as token ids, but for models of algorithmic tasks."""
    linear = _part(model, "unembed", nn.Linear)
    if linear is not None:
        return int(linear.out_features)
    outputs = getattr(model.cfg, "d_vocab_out", None) or 0
    return int(outputs) if outputs > 0 else vocabulary_size(model)


def _part(model: Model, name: str, kind: type[nn.Module]) -> Any:
    """The first module of this kind in a part of the model; what adapters add stands behind it. None without one."""
    part: Any = getattr(model, name, None)
    return None if part is None else next((one for one in parts_of(part) if isinstance(one, kind)), None)


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
    pad = special_id(model, "pad")
    if pad is None:
        raise ValueError('the model has no padding token: replace embeddings by "mean" or "zero" instead of "pad".')
    return pad


def context_length(model: Model) -> int | None:
    """The length of the longest prompt; None where Hugging Face has no limit, where TransformerLens makes one up."""
    config = hf_config(model)
    names = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length")
    if hasattr(config, "model_type") and not any(getattr(config, name, None) for name in names):
        return None
    return int(model.cfg.n_ctx)


def read_target(model: Model, target: Any, vocab: int | None = None, what: str = "target") -> Target:
    """What a text, an id, several ids in their order, or a set of texts and ids means.

    Text is taken as one token where one has this text, and else as the tokens that the tokenizer makes of it, apart
    from what stands before it. Of a set each member must be one token.

    Args:
        model: a checked model.
        target: text, id, a list of ids, or a set of texts and ids.
        vocab: how many entries the vocabulary has; None is as many as the model has token ids.
        what: what the target is for, as errors call it.

    Raises:
        ValueError: for an empty text, list or set, a text unknown to the tokenizer, an id out of range, text without a
            tokenizer, a member of a set that is several tokens.
        TypeError: for anything else.
    """
    if isinstance(target, Set):
        if not target:
            raise ValueError(f"the {what} is an empty set: give at least one token.")
        rule = f"a member of the {what} is a token as text or as id"
        members = [one if isinstance(one, str) else as_int(one, rule) for one in target]
        in_order = sorted(members, key=lambda one: (isinstance(one, str), one))
        found = [_member(model, one, vocab, what) for one in in_order]
        return Target(tuple(dict.fromkeys(found)), any_of=len(set(found)) > 1)
    if isinstance(target, str):
        return Target(tuple(_tokens_of_text(model, target, vocab, what)))
    is_list = isinstance(target, Sequence) or hasattr(target, "__len__")
    if is_list and not isinstance(target, bytes | bytearray | Mapping) and getattr(target, "ndim", 1) != 0:
        ids = list(target.tolist() if hasattr(target, "tolist") else target)
        if not ids:
            raise ValueError(f"the {what} is empty: give at least one token.")
        if any(isinstance(id, str) for id in ids):
            raise TypeError(
                f"a {what} is a text, an id, a list of ids, or a set of which any one is meant, got {target!r}: write "
                "one text, or a set."
            )
        return Target(tuple(token(model, id, vocab, what) for id in ids))
    return Target((token(model, target, vocab, what),))


def _member(model: Model, one: Any, vocab: int | None, what: str) -> Token:
    if isinstance(one, str):
        pieces = _tokens_of_text(model, one, vocab, f"member of the {what}")
        if len(pieces) > 1:
            raise ValueError(
                f"the {what} is a set, of which {one!r} is {len(pieces)} tokens: its members must be one token each."
                f"{spacing_hint(model, one)}"
            )
    return token(model, one, vocab, f"member of the {what}")


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
    if not isinstance(target, str):
        id = as_int(target, f"a {what} is a token as text or as id")
        if not 0 <= id < vocab:
            raise ValueError(f"{what} {id} is outside the vocabulary of {vocab} (ids 0 to {vocab - 1}).")
        # Where the sizes differ the outputs are not tokens, as in models of algorithmic tasks.
        return Token(id, token_text(model, id) if vocab == vocabulary_size(model) else f"<{id}>")
    found = _tokens_of_text(model, target, vocab, what)
    if len(found) == 1:
        return found[0]
    listed = ", ".join(f"{piece.text!r} (id {piece.id})" for piece in found)
    raise ValueError(
        f"the {what} {target!r} is {len(found)} tokens: {listed}.{spacing_hint(model, target)} "
        f"Pass the id of one of them, say the first, {what}={found[0].id}."
    )


def spacing_hint(model: Model, text: str) -> str:
    """A sentence that says so, where a text of several tokens would be one with a space in front; else nothing."""
    spaced = tokenizer_of(model).encode(f" {text}", add_special_tokens=False)
    return f" With a leading space it is one token: {' ' + text!r}." if len(spaced) == 1 else ""


def _tokens_of_text(model: Model, text: str, vocab: int | None, what: str) -> list[Token]:
    """The tokens of a text that stands by itself, without a space that some tokenizers put in front."""
    if not text:
        raise ValueError(f"the {what} is empty: give at least one character.")
    size = vocabulary_size(model)
    if getattr(model, "tokenizer", None) is None or vocab not in (None, size):
        raise ValueError(f"the model has no tokenizer for its output: pass the {what} {text!r} as a token id.")
    require_text(text, what)
    found = _as_tokenised(model, text, what)
    for piece in found:
        if piece.id >= size:
            raise ValueError(
                f"the {what} {text!r} has the token {piece.text!r} (id {piece.id}), which the model lacks: its "
                f"vocabulary of {size} has the ids 0 to {size - 1}. Give another text, or resize the model's embedding "
                "with its tokenizer."
            )
    return found


def _as_tokenised(model: Model, text: str, what: str) -> list[Token]:
    tokenizer = tokenizer_of(model)
    for piece in _pieces(text):
        id = tokenizer.convert_tokens_to_ids(piece)
        if id is not None and tokenizer.convert_ids_to_tokens(id) == piece and token_text(model, id) == text:
            return [Token(id, text)]
    ids = tokenizer.encode(text, add_special_tokens=False)
    if not ids or ids == [special_id(model, "unk")]:
        raise ValueError(f"the {what} {text!r} is unknown to the tokenizer: pass the token id.")
    found = [Token(id, token_text(model, id)) for id in ids]
    if "".join(piece.text for piece in found) != text:  # SentencePiece puts a space in front of a text
        before = tokenizer.encode("\n", add_special_tokens=False)
        behind = tokenizer.encode(f"\n{text}", add_special_tokens=False)
        if behind[: len(before)] == before and len(behind) > len(before):
            found = [Token(id, token_text(model, id)) for id in behind[len(before) :]]
    made = readable("".join(piece.text for piece in found))
    if made.strip() != text.strip():
        listed = ", ".join(f"{piece.text!r} (id {piece.id})" for piece in found)
        raise ValueError(
            f"the {what} {text!r} is {made!r} to the tokenizer, which is another text: {listed}. Pass the ids."
        )
    return found


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


def token_texts(model: Model, ids: Int[Tensor, "token"]) -> tuple[str, ...]:
    """Each of these tokens as text."""
    return tuple(token_text(model, id) for id in ids.tolist())


def as_batch(prompts: Sequence[Int[Tensor, " _"]]) -> Int[Tensor, "batch token"]:
    """Prompts as a batch: shorter ones are filled up on the right, where nothing matters to a causal model."""
    filling = int(prompts[0][0])  # it must be a token that the model knows
    return pad_sequence(list(prompts), batch_first=True, padding_value=filling)


def readable(text: str) -> str:
    """A text in which bytes that stand side by side, as <0xE8><0xAF><0xB7>, are the characters they make up."""
    return re.sub("(?:<0x[0-9A-F]{2}>)+", _decoded, text)


def _decoded(found: re.Match[str]) -> str:
    try:
        return bytes.fromhex(found[0].replace("<0x", "").replace(">", "")).decode()
    except UnicodeDecodeError:
        return found[0]


@cache
def byte_of_character() -> dict[str, int]:
    """The byte that each character of a byte-level BPE vocabulary stands for (the printable alphabet of GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
