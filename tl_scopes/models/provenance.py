"""What an answer was made with: versions, model, precision, device and date, so that it can be made again."""

from collections.abc import Hashable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from weakref import WeakKeyDictionary

import torch

from tl_scopes.models.state import versions
from tl_scopes.models.supported import (
    Model,
    attention_kernel,
    autocast_of,
    device_of,
    hf_config,
    model_name,
    parameters_of,
    run_by,
)
from tl_scopes.models.weights import sample
from tl_scopes.models.wording import warn

_LIBRARIES = {
    "tl_scopes": "tl-scopes",
    "transformer_lens": "transformer-lens",
    "transformers": "transformers",
    "torch": "torch",
}
"""The fields that are versions, and the packages that they are of."""


@dataclass(frozen=True)
class Provenance:
    """What an answer was made with.

    Attributes:
        tl_scopes, transformer_lens, transformers, torch: the versions.
        model: the name of the model.
        revision: the commit on the Hugging Face Hub that the model was loaded from; None for a model from elsewhere.
        weights: a checksum of a few numbers of each weight, by which models of one name are told apart; None where
            weights are offloaded or cannot be read.
        dtype: the precision of the model.
        device: where it was.
        attention: how attention was computed, "eager" or "sdpa" say; None where the model does not tell.
        date: the day, in UTC.
    """

    tl_scopes: str
    transformer_lens: str
    transformers: str
    torch: str
    model: str
    revision: str | None
    weights: str | None
    dtype: str
    device: str
    attention: str | None
    date: str

    @classmethod
    def of(cls, model: Model, weights: Hashable = None) -> "Provenance":
        """What an answer of this model is made with now.

        Args:
            model: a checked model.
            weights: the `versions` of its parameters, where they are known already.

        Cost: a few numbers of each weight are read once, and again after a weight has changed.
        """
        device = device_of(model)
        name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
        return cls(
            **{field: _installed(package) for field, package in _LIBRARIES.items()},
            model=model_name(model),
            revision=getattr(hf_config(model), "_commit_hash", None),
            weights=_weights(model, weights),
            dtype=str(autocast_of(model) or next(model.parameters()).dtype).removeprefix("torch."),
            device=f"{device}{name}",
            attention=attention_kernel(model),
            date=f"{datetime.now(UTC):%Y-%m-%d}",
        )

    def __str__(self) -> str:
        revision = f" at {self.revision[:12]}" if self.revision else ""
        weights = f" (weights {self.weights})" if self.weights else ""
        attention = f", {self.attention} attention" if self.attention else ""
        return (
            f"{self.model}{revision}{weights}, {self.dtype}{attention}, on {self.device}; tl_scopes {self.tl_scopes}, "
            f"TransformerLens {self.transformer_lens}, transformers {self.transformers}, torch {self.torch}; "
            f"{self.date}"
        )

    def other_versions(self) -> list[str]:
        """The libraries of the model that are installed in another version now, with both versions."""
        return [
            f"{package} {then} (now {_installed(package)})"
            for field, package in _LIBRARIES.items()
            if field != "tl_scopes" and (then := getattr(self, field)) != _installed(package)
        ]

    def warn_of_other_versions(self, what: str) -> None:
        """Say that something was made with other versions of the model's libraries, if it was."""
        if others := self.other_versions():
            warn(
                f"{what} was made with other versions, {', '.join(others)}, with which the same model may compute "
                "other numbers: ask again before you compare it with answers of today."
            )


@cache
def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


_known: WeakKeyDictionary[Model, tuple[Hashable, str | None]] = WeakKeyDictionary()
"""For each model the state of its weights, and their checksum."""


def _weights(model: Model, state: Hashable) -> str | None:
    state = versions(parameters_of(run_by(model))) if state is None else state
    known = _known.get(model)
    if known is None or known[0] != state:
        _known[model] = known = state, sample(model)
    return known[1]
