"""The one door to TransformerLens: what kind of model this is, its hooks, its tokens, one forward pass.

Everything that depends on the kind of model stands here. The rest of the package is mathematics on the tensors that
`trace` returns.
"""

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

Model: TypeAlias = Any
"""A `HookedTransformer` (TransformerLens 3.9) or a `TransformerBridge` (3.9 and 4.x)."""

Prompt: TypeAlias = str | Sequence[int] | Tensor

READOUT = "ln_final"
"""The paper's name for the end of the Jacobian: what the unembedding reads."""

# `ln_final.hook_normalized` is before the gain and the bias, and a side branch on the bridge: scores read there are
# wrong. The input of the unembedding is the same tensor on every kind of model, also on those without a final norm.
_READOUT_HOOK = "unembed.hook_in"
_READOUT_NAMES = (READOUT, "ln_final.hook_out", _READOUT_HOOK)


class Token(NamedTuple):
    """A vocabulary entry."""

    id: int
    text: str


@dataclass(frozen=True, eq=False)
class Trace:
    """One forward pass, with the graph from a perturbation at the `wrt` hooks to the value at the `of` hook.

    The perturbations are zeros, so the values are the model's own; they are there to be differentiated.
    """

    inputs: dict[str, Float[Tensor, "batch token d_model"]]
    """Detached value at each `wrt` hook."""
    perturbations: dict[str, Float[Tensor, "batch token d_model"]]
    """The zero leaves that were added there."""
    output: Float[Tensor, "batch d_of"]
    """Value at the `of` hook, at the last position; the root of the graph."""
    readout: Float[Tensor, "batch d_of"] | None
    """`output` cut off from the graph, as a leaf: where the graph of `logits` begins. None when `of` is no readout."""
    logits: Float[Tensor, "batch vocab"] | None
    """The model's own logits at the last position, soft-caps and scales included, as a function of `readout`."""


class _Stop(Exception):
    """Ends a forward pass at a hook."""


# ---------------------------------------------------------------------------------------------------------------------
# Which models


def check_model(model: Model) -> None:
    """Refuse what cannot be linearised, with what to do about it.

    Raises:
        TypeError: not a TransformerLens model, a compiled one, or not a causal language model.
        ValueError: a model in training mode.
        RuntimeError: under `torch.inference_mode`, or for a model created in it.
    """
    kind = type(model).__name__
    if isinstance(model, torch._dynamo.OptimizedModule) or getattr(model, "_compiled_call_impl", None) is not None:
        raise TypeError(
            "the model is compiled: its hooks and its second backward pass are not reliable. "
            "Pass the model as it was before torch.compile."
        )
    if kind in ("HookedEncoder", "HookedEncoderDecoder", "HookedAudioEncoder"):
        raise TypeError(f"{kind} is not a causal language model: scopes explain a next-token prediction.")
    if not all(hasattr(model, name) for name in ("hook_dict", "cfg", "to_tokens")):
        raise TypeError(
            f"expected a HookedTransformer or a TransformerBridge, got {kind}. "
            "Load one with TransformerBridge.boot_transformers(name), or wrap a Hugging Face model with "
            "TransformerBridge.boot_transformers(name, hf_model=model)."
        )
    hf_config = getattr(getattr(model, "original_model", None), "config", None)
    architecture = str(getattr(model.cfg, "architecture", None) or kind)
    if (
        getattr(model.cfg, "attention_dir", "causal") == "bidirectional"
        or getattr(hf_config, "is_encoder_decoder", False)
        or "MaskedLM" in architecture  # TransformerLens 3.9 calls every bridge causal, BERT too
    ):
        raise TypeError(f"{architecture} is not a causal language model: scopes explain a next-token prediction.")
    if model.training:
        raise ValueError("the model is in training mode, where dropout makes scores random: call model.eval() first.")
    if torch.is_inference_mode_enabled() or next(model.parameters()).is_inference():
        raise RuntimeError(
            "gradients cannot be taken under torch.inference_mode, or of a model that was created in it: "
            "leave the block (torch.no_grad is fine), and load the model outside of it."
        )


def model_name(model: Model) -> str:
    """The name the model was loaded under."""
    return str(getattr(model.cfg, "model_name", None) or "unnamed")


def embedding_rows(model: Model) -> Float[Tensor, "vocab d_model"]:
    """The token embedding matrix."""
    return model.W_E


def has_constant_readout_norm(model: Model) -> bool:
    """Whether the final norm has no gain of its own, so that every readout has the same norm, ‖y‖ = const.

    So it is after `fold_ln` (the default of `HookedTransformer.from_pretrained` and of `enable_compatibility_mode`),
    and in a freshly initialised model.
    """
    norm = getattr(model, "ln_final", None)
    if norm is None or getattr(model.cfg, "normalization_type", None) is None:
        return False
    parameters = [p.detach() for p in norm.parameters()]
    gains = [p for p in parameters if p.any()]
    return all(bool((p == p.flatten()[0]).all()) for p in gains) and len(gains) <= 1


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


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


# ---------------------------------------------------------------------------------------------------------------------
# One forward pass


def is_readout(of: str) -> bool:
    """Whether `of` names what the unembedding reads."""
    return of in _READOUT_NAMES


def hook_name(model: Model, name: str) -> str:
    """The name under which the model knows a hook; the readout's names all mean the input of the unembedding.

    Raises:
        ValueError: for a name the model does not have.
    """
    if is_readout(name):
        name = _READOUT_HOOK
    if name not in model.hook_dict:
        close = difflib.get_close_matches(name, list(model.hook_dict), n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else " model.hook_dict lists them."
        raise ValueError(f"the model has no hook {name!r}.{hint}")
    return name


def trace(
    model: Model,
    tokens: Int[Tensor, "batch token"],
    *,
    wrt: Sequence[str],
    of: str,
    values: dict[str, Float[Tensor, "batch token d_model"]] | None = None,
) -> Trace:
    """Run the model once, keeping the graph from the `wrt` hooks to the `of` hook at the last position.

    Hooks that the user has set act as in any other run. The model is left as found, also after an exception.

    Args:
        model: a checked model.
        tokens: of one length; the prediction is read after the last.
        wrt: hooks where the perturbations enter.
        of: hook where the value is read.
        values: what to put in place of the activation at some of the `wrt` hooks.

    Cost: one forward pass. At the readout only the last position goes on to the unembedding; elsewhere the pass stops.

    Raises:
        ValueError: a hook that does not exist, never fires, has no [batch pos d] value, or comes too late.
    """
    inputs: dict[str, Tensor] = {}
    perturbations: dict[str, Tensor] = {}
    outputs: list[Tensor] = []
    readout: list[Tensor] = []
    replacements = values or {}

    def perturb(name: str) -> Callable[..., Tensor]:
        def hook_function(value: Tensor, hook: Any) -> Tensor:
            _check_value(name, value, tokens)
            if name in replacements:
                value = replacements[name].to(value)
            # A zero leaf, rather than requires_grad on the value: it works whether parameters are frozen or not, and
            # where the hook hands out a view.
            leaf = torch.zeros_like(value, requires_grad=True)
            inputs[name], perturbations[name] = value.detach(), leaf
            return value + leaf

        return hook_function

    def read(value: Tensor, hook: Any) -> Tensor:
        _check_value(of, value, tokens)
        outputs.append(value[:, -1])
        if not is_readout(of):
            raise _Stop
        leaf = value[:, -1].detach().requires_grad_()
        readout.append(leaf)
        return leaf[:, None]  # the unembedding runs at one position only

    logits = None
    points = {name: hook_name(model, name) for name in (*wrt, of)}
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_frozen(model))
        for name in wrt:
            stack.enter_context(_attached(model.hook_dict[points[name]], perturb(name)))
        stack.enter_context(_attached(model.hook_dict[points[of]], read))
        try:
            logits = model(tokens, return_type="logits")[:, -1]
        except _Stop:
            pass

    if not outputs:
        raise ValueError(f"the hook {of!r} never fired: this model does not run it, or an option switches it off.")
    silent = [name for name in wrt if name not in perturbations]
    if silent:
        raise ValueError(
            f"the hook {silent[0]!r} did not fire before {of!r}: wrt must come before of, and not be switched off."
        )
    if not outputs[0].requires_grad:
        raise ValueError(
            f"the value at {of!r} does not depend on {', '.join(map(repr, wrt))}: it is a side branch, "
            "or a hook of yours replaces everything in between."
        )
    return Trace(inputs, perturbations, outputs[0], readout[0] if readout else None, logits)


def _check_value(name: str, value: Any, tokens: Tensor) -> None:
    if not isinstance(value, Tensor) or value.ndim != 3 or value.shape[:2] != tokens.shape:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"the hook {name!r} has no [batch pos d] value but {shape}: choose a residual-stream hook.")


@contextmanager
def _attached(point: Any, function: Callable[..., Tensor | None]) -> Iterator[None]:
    """Add one forward hook to a HookPoint, after the user's, and take away that one alone.

    Not `model.hooks(...)`: in compatibility mode it calls the function once for every alias of the point.
    """
    point.add_hook(function)
    handle = point.fwd_hooks[-1]
    try:
        yield
    finally:
        handle.hook.remove()
        point.fwd_hooks[:] = [other for other in point.fwd_hooks if other is not handle]


@contextmanager
def _frozen(model: Model) -> Iterator[None]:
    """Parameters without gradients: the graph then keeps no activations for their sake."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
