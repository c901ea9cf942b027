"""Where random numbers come from: a generator that was given, or one that belongs to the prompt."""

import zlib

import torch

from tl_scopes.jacobian.linearization import Linearization


def prompt_generator(lin: Linearization, *purpose: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A source of random numbers that belongs to this prompt and purpose, whatever was drawn before."""
    seed = zlib.crc32(repr((*purpose, lin.tokens.tolist())).encode())
    return torch.Generator(device).manual_seed(seed)


def source(lin: Linearization, generator: torch.Generator | None, purpose: str) -> torch.Generator:
    """The generator given; without any, one on the model's device that belongs to the prompt and the purpose.

    The same prompt gets the same numbers, alone or in a batch, and another one others: with the same for all, the
    errors of similar prompts would go together, and no average over a corpus would ever lose them.

    Raises:
        TypeError: for a generator that is none.
        ValueError: for one on another device than the model.
    """
    device = lin.readout.device
    if generator is None:
        return prompt_generator(lin, purpose, device=device)
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator must be a torch.Generator or None, got {generator!r}: take torch.Generator({device.type!r})"
            f"{f'.manual_seed({generator})' if isinstance(generator, int) else ''}."
        )
    if generator.device.type != device.type:
        raise ValueError(
            f"the generator is on {generator.device}, the model on {device}: take torch.Generator({device.type!r})."
        )
    return generator
