"""The source of random numbers: a generator that was given, or one that belongs to the prompt; and the honest error of
what is estimated from a few of them.

This is a file of its own since scopes, checks and evaluations draw from it.
"""

import zlib

import torch
from jaxtyping import Float
from torch import Tensor

from tl_scopes.jacobian.linearization import Linearization


def prompt_generator(lin: Linearization, *purpose: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that is seeded by this prompt and purpose, whatever was drawn before."""
    seed = zlib.crc32(repr((*purpose, lin.tokens.tolist())).encode())
    return torch.Generator(device).manual_seed(seed)


def source(lin: Linearization, generator: torch.Generator | None, purpose: str) -> torch.Generator:
    """The generator that was given, or by default one on the model's device that belongs to the prompt and purpose.

    The same prompt gets the same numbers, alone or in a batch, and another prompt gets others. With the same numbers
    for all prompts, the errors of similar prompts would go together and stay in every average over a corpus.

    Raises: as `require_generator` does.
    """
    require_generator(generator, lin.readout.device)
    return prompt_generator(lin, purpose, device=lin.readout.device) if generator is None else generator


def raised(draws: int) -> float:
    """By how much a standard error from so many draws is raised, four at least: √((n − 1)/(n − 3)).

    It is itself uncertain: the deviation in units of it follows Student's t, whose variance is (n − 1)/(n − 3). With
    that factor it is honest: the deviation is 1 in units of it, root mean square.
    """
    return ((draws - 1) / (draws - 3)) ** 0.5


def error_of_mean(draws: Float[Tensor, "_ *token"]) -> Float[Tensor, "*token"]:
    """The standard error of the mean of independent draws; infinite for fewer than four, which do not tell it."""
    n = len(draws)
    return draws.std(0) / n**0.5 * raised(n) if n > 3 else torch.full_like(draws[0], torch.inf)


def require_generator(generator: object, device: torch.device) -> None:
    """Refuse what is neither None nor a generator on this device.

    Raises:
        TypeError: for something that is not a torch.Generator.
        ValueError: for a generator on another device than the model.
    """
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        seed = f".manual_seed({generator})" if isinstance(generator, int) else ""
        raise TypeError(
            f"generator must be a torch.Generator or None, got {generator!r}: take "
            f"torch.Generator({device.type!r}){seed}."
        )
    if generator.device.type != device.type:
        raise ValueError(
            f"the generator is on {generator.device}, the model on {device}: take torch.Generator({device.type!r})."
        )
