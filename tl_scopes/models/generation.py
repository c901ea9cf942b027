"""What a model says after a prompt, by its own generation."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_scopes.models.hooks import user_hooks
from tl_scopes.models.supported import Model
from tl_scopes.models.tokens import context_length, readable, special_id, token_text
from tl_scopes.models.wording import counted


@dataclass(frozen=True, eq=False, repr=False)
class Generated:
    """What a model said after a prompt.

    Attributes:
        text: the text, without the end of sequence.
        ids: its token ids.
        str_tokens: the text of each token.
    """

    text: str
    ids: tuple[int, ...]
    str_tokens: tuple[str, ...]

    @classmethod
    def of(cls, model: Model, ids: list[int]) -> "Generated":
        """The text that these ids are.

        Raises:
            ValueError: where there are no ids.
        """
        if not ids:
            raise ValueError("the model said nothing but its end of sequence: there is no answer to explain.")
        texts = tuple(token_text(model, id) for id in ids)
        return cls(readable("".join(texts)), tuple(ids), texts)

    def __repr__(self) -> str:
        return f"Generated({self.text!r}: {counted(len(self.ids), 'token')})"

    def __str__(self) -> str:
        return self.text

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """Where each token stands in the text: its first character, and the one behind its last."""
        ends = [len(readable("".join(self.str_tokens[: i + 1]))) for i in range(len(self.str_tokens))]
        return tuple(zip([0, *ends[:-1]], ends, strict=True))


@torch.no_grad()
def generate(model: Model, tokens: Int[Tensor, "token"], count: int, **options: Any) -> list[int]:
    """The ids that the model's own method appends to a prompt, up to its end of sequence, or one of `eos_token_id`.

    On a bridge this is the method of the wrapped Hugging Face model. Its key-value cache is used where it is right: on
    TransformerLens 3.9 and 4.3 with transformers 5.24 bridges of some architectures (Llama) write another text with a
    cache than without one, by either method.

    Raises:
        ValueError: for a prompt that leaves no room in the context; for options of sampling where nothing is sampled;
            for several answers (`num_return_sequences`), and for options that are set here.
    """
    _require_one_answer(options)
    _require_sampling(options)
    context = context_length(model)
    if context is not None and len(tokens) + count > context:
        raise ValueError(
            f"the prompt has {counted(len(tokens), 'token')} and {count} are to follow, the model's context is "
            f"{context}: shorten the prompt, or take fewer max_new_tokens."
        )
    inner: Any = getattr(model, "original_model", None)
    if inner is not None and hasattr(inner, "generate"):
        # Hooks of the user's may count positions, of which a pass with a cache has one.
        cached = not user_hooks(model) and _cache_is_right(inner, tokens)
        settings = {"do_sample": False, "max_new_tokens": count, "use_cache": cached, **options}
        if (pad := special_id(model, "pad")) is not None:
            settings.setdefault("pad_token_id", pad)
        whole = inner.generate(tokens[None], attention_mask=torch.ones_like(tokens[None]), **settings)
    else:
        method: Any = model.generate
        settings = {"do_sample": False, "max_new_tokens": count, "verbose": False, "return_type": "tokens"}
        settings |= {"use_past_kv_cache": not user_hooks(model), **options}
        if getattr(model, "tokenizer", None) is None:
            settings.setdefault("stop_at_eos", False)
        whole = method(tokens[None], **settings)
    whole = getattr(whole, "sequences", whole)
    ids: list[int] = whole[0, len(tokens) :].tolist()
    configured = getattr(getattr(inner, "generation_config", None), "eos_token_id", None)
    ends = {special_id(model, "eos"), *_each(configured), *_each(options.get("eos_token_id"))}
    stop = next((i for i, id in enumerate(ids) if id in ends), len(ids))
    return ids[:stop]


def _each(ends: Any) -> list[Any]:
    """The ids of `eos_token_id`, which is one, several or None."""
    ends = ends.tolist() if isinstance(ends, Tensor) else ends
    return list(ends) if isinstance(ends, Sequence) else [ends]


def _require_one_answer(options: Mapping[str, Any]) -> None:
    """Refuse options that ask for more than one answer, or for another form than this function reads.

    Raises:
        ValueError: with what to do instead.
    """
    for name in ("return_type", "verbose", "attention_mask", "generation_config"):
        if name in options:
            raise ValueError(
                f"generate takes no {name}, which it sets itself, or parts of it: leave it out, and give other options "
                "one by one, do_sample=True say."
            )
    if options.get("num_return_sequences", 1) not in (None, 1):
        raise ValueError(
            f"num_return_sequences={options['num_return_sequences']!r} asks for several answers, and generate returns "
            "one: call it once for each."
        )


SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Options that change how a token is drawn, and so nothing where the likeliest one is taken."""


def _require_sampling(options: Mapping[str, Any]) -> None:
    """Refuse options of sampling without `do_sample=True`, which the models' own methods pass over in silence.

    Raises:
        ValueError: with what to do instead.
    """
    given = [f"{name}={options[name]!r}" for name in SAMPLING if options.get(name) is not None]
    if given and not options.get("do_sample") and "penalty_alpha" not in options:
        raise ValueError(
            f"{', '.join(given)} would change nothing, since the likeliest token is taken each time: add "
            f"do_sample=True, or leave {'it' if len(given) == 1 else 'them'} out."
        )


def _cache_is_right(inner: Any, tokens: Int[Tensor, "token"]) -> bool:
    """Whether the last token gets the same logits from a cache of the tokens before it as from all tokens."""
    if len(tokens) < 2:
        return False
    expected = inner(tokens[None], use_cache=False).logits[0, -1]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # a bridge hands the cache on under its older name
            cache = inner(tokens[None, :-1], use_cache=True).past_key_values
            found = inner(tokens[None, -1:], past_key_values=cache, use_cache=True).logits[0, -1]
    except (TypeError, AttributeError, ValueError, RuntimeError):  # a model without such a cache
        return False
    # A broken cache is off by much; where half precision makes it unsure, the slower way is the right one.
    rounding = min(0.03, 100 * torch.finfo(expected.dtype).eps) * float(expected.abs().max())
    return bool((found - expected).abs().max() <= rounding)
