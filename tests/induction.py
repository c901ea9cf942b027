"""A network of two layers of attention alone that has learned to go on with what it has seen: induction heads.

It is a file of its own since the test and the training (`python -m tests.induction`, about a minute) both build the
network. Sequences of random tokens stand twice, and the second time is predicted.

Source: Elhage et al. 2021, A Mathematical Framework for Transformer Circuits; Olsson et al. 2022 (arXiv:2209.11895).
"""

from math import cos, pi
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge

FILE = Path(__file__).parent / "data" / "induction.safetensors"
VOCAB, LONGEST, STEPS = 24, 14, 1000


def network() -> Any:
    """The untrained network."""
    config = TransformerBridgeConfig(
        n_layers=2, d_model=48, d_head=12, n_heads=4, d_vocab=VOCAB, n_ctx=2 * LONGEST, act_fn="gelu", attn_only=True,
        normalization_type="LN", device="cpu", seed=0, dtype=torch.float32,
    )  # fmt: skip
    return TransformerBridge.boot_native(config)


def trained() -> Any:
    """The trained network."""
    model = network()
    saved = load_file(FILE)
    with torch.no_grad():
        for name, parameter in zip(sorted(saved), model.original_model.parameters(), strict=True):
            parameter.copy_(saved[name])
    return model.eval()


def twice(count: int, length: int, generator: torch.Generator) -> Tensor:
    """Random sequences without repetition, each followed by itself."""
    once = torch.rand(count, VOCAB, generator=generator).argsort(-1)[:, :length]
    return torch.cat([once, once], 1)


def main() -> None:
    """Train it."""
    torch.manual_seed(0)
    net, generator = network().original_model, torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.01)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1, step / 100) * (1 + cos(pi * step / STEPS)) / 2
        length = int(torch.randint(5, LONGEST + 1, (1,), generator=generator))
        tokens = twice(64, length, generator)
        out = net(tokens)
        logits = getattr(out, "logits", out)[:, length - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, VOCAB), tokens[:, length:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 200 == 0:
            print(step, loss.item(), flush=True)
    print(loss.item())
    save_file({f"{i:03d}": parameter.detach() for i, parameter in enumerate(net.parameters())}, FILE)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
