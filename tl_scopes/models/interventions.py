"""Forward passes with other values at one hook, and no gradients: interventions."""

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_scopes.models.checkpointing import StopForward
from tl_scopes.models.forward import READOUT, as_places, attached, check_value, hook_name, is_readout, one_at_a_time
from tl_scopes.models.supported import Model


@torch.no_grad()
def evaluate(
    model: Model,
    tokens: Int[Tensor, "batch token"],
    *,
    wrt: str = "hook_embed",
    of: str = READOUT,
    places: Sequence[tuple[int, int]] | None = None,
    values: Float[Tensor, "batch token d_model"] | None = None,
) -> tuple[Float[Tensor, "row d_of"], Float[Tensor, "row vocab"] | None]:
    """The value at the `of` hook at some places, with other values at the `wrt` hook if given, and the logits there.

    Args:
        model: a checked model.
        tokens: prompts; shorter ones are filled up on the right.
        wrt: hook whose value is replaced.
        of: hook whose value is read. There are logits only where it is the readout.
        places: entry of the batch, position. None is the last position of each entry.
        values: what to put at `wrt`.

    Cost: one forward pass; the unembedding runs at the places only.

    Raises:
        ValueError: a hook that does not exist, never fires, or has no [batch pos d] value.
    """
    entries, positions = (list(numbers) for numbers in zip(*as_places(tokens, places), strict=True))
    fired, read = [], []

    def replace(value: Tensor, hook: Any) -> Tensor:
        check_value(wrt, value, tokens)
        fired.append(wrt)
        return value if values is None else values.to(value)

    def choose(value: Tensor, hook: Any) -> Tensor:
        check_value(of, value, tokens)
        read.append(value[entries, positions])
        if not is_readout(of):
            raise StopForward
        return read[-1][:, None]

    logits = None
    with ExitStack() as stack:
        stack.enter_context(one_at_a_time)
        stack.enter_context(attached(model.hook_dict[hook_name(model, wrt)], replace))
        stack.enter_context(attached(model.hook_dict[hook_name(model, of)], choose))
        with suppress(StopForward):
            logits = model(tokens, return_type="logits")[:, -1]
    for name, seen in ((wrt, fired), (of, read)):
        if not seen:
            raise ValueError(
                f"the hook {name!r} never fired: this model does not run it, or an option switches it off."
            )
    return read[0], logits


def predict(
    model: Model,
    tokens: Int[Tensor, "batch token"],
    *,
    wrt: str = "hook_embed",
    places: Sequence[tuple[int, int]] | None = None,
    values: Float[Tensor, "batch token d_model"] | None = None,
) -> Float[Tensor, "row vocab"]:
    """The model's logits at some places: see `evaluate`."""
    logits = evaluate(model, tokens, wrt=wrt, places=places, values=values)[1]
    assert logits is not None
    return logits
