"""The parts of a network that influence can run through: their hooks, and their values as heads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from jaxtyping import Float
from torch import Tensor

from tl_scopes.models.attention import listed
from tl_scopes.models.hooks import hook_points
from tl_scopes.models.supported import Model, architecture

Part: TypeAlias = Literal["resid_pre", "resid_post", "attn_out", "mlp_out", "z", "q", "k", "v", "post"]
"""What a hook of a block holds, by the name that the field gives it."""

_HOOKS: Mapping[str, str] = {
    "resid_pre": "hook_resid_pre",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "z": "attn.hook_z",
    "q": "attn.hook_q",
    "k": "attn.hook_k",
    "v": "attn.hook_v",
    "post": "mlp.hook_post",
}
_NAMES = {
    "resid_pre": "residual stream",
    "resid_post": "residual stream",
    "attn_out": "attention",
    "mlp_out": "MLP",
    "z": "attention heads",
    "q": "queries",
    "k": "keys",
    "v": "values",
    "post": "MLP neurons",
}


@dataclass(frozen=True)
class Component:
    """One part of one block, with the place of heads and coordinates in its hook's value."""

    part: Part
    layer: int
    hook: str
    """The name of the hook."""
    heads: int
    """How many heads a value is divided into whose hook does not divide it; 1 where it has none."""
    heads_first: bool = False
    """Whether the heads come before the positions, as in latent attention (DeepSeek)."""

    def as_heads(self, value: Float[Tensor, "..."], raw: int) -> Float[Tensor, "... token head d_head"]:
        """The hook's value as one vector for each position and head.

        Args:
            value: the value at the hook, or a tensor of its shape behind further axes.
            raw: how many axes the value at the hook has itself, that of the batch included.
        """
        if self.heads_first:
            return value.transpose(-2, -3)
        # Keys and values may have fewer heads. Queries have all, some with the gates of their heads beside them.
        if raw == 4 and (self.part in ("k", "v") or (self.part == "q" and value.shape[-2] % self.heads)):
            return value
        return value.reshape(*value.shape[: value.ndim - raw + 2], self.heads, -1)

    def as_hooked(self, heads: Float[Tensor, "... token head d_head"], like: Tensor) -> Tensor:
        """`as_heads` undone for a batch of one: vectors for each position and head in the shape of the hook's value.

        Args:
            heads: with any axes in front of them.
            like: the value at the hook.
        """
        turned = heads.transpose(-2, -3) if self.heads_first else heads
        return turned.reshape(*heads.shape[:-3], *like.shape)


def components(model: Model, part: Part) -> list[Component]:
    """The hooks on this part in every layer that has one, in order.

    Raises:
        ValueError: for a model that has it in no layer.
    """
    points = hook_points(model)
    found = [
        Component(part, layer, name, *_layout(model, part, f"blocks.{layer}.attn.hook_kv_latent" in points))
        for layer in range(model.cfg.n_layers)
        if (name := f"blocks.{layer}.{_HOOKS[part]}") in points
    ]
    if not found:
        raise absent(model, part)
    return found


def absent(model: Model, part: Part, layers: Sequence[int] = ()) -> ValueError:
    """The error to raise for a model without this part, or whose layers show it on a side branch only."""
    where = f" in the layers {listed(list(layers))}" if layers else ""
    return ValueError(
        f"{architecture(model)} has no hook on its {_NAMES[part]}{where} (blocks.N.{_HOOKS[part]}) through which the "
        "computation runs, so that influence cannot be followed through them. The residual stream can be asked in "
        'most models: by="position".'
    )


def _layout(model: Model, part: Part, latent: bool) -> tuple[int, bool]:
    cfg: Any = model.cfg
    if part in ("z", "q", "k", "v"):
        return int(cfg.n_heads), latent and part != "z"
    return (int(getattr(cfg, "d_mlp", None) or 1), False) if part == "post" else (1, False)
