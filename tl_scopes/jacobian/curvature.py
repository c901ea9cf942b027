"""H = ∂² log p / ∂x²: how the slope of a prediction changes with the embeddings, from Hessian-vector products."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from tqdm.auto import tqdm

from tl_scopes import models
from tl_scopes.jacobian import pullback
from tl_scopes.jacobian.linearization import Linearization
from tl_scopes.models import Model, Token

_WORKING_BYTES, _WORKING_BYTES_OF_CPU = 2**29, 2**27
"""Working memory that one batch of Hessian-vector products may take."""


def block_norms(
    lins: Sequence[Linearization], targets: Sequence[Token], directions: Sequence[Shaped[Tensor, "_ _ d_model"]]
) -> list[Float[Tensor, "_ _"]]:
    """‖H_ii r‖₁ of every token i for each direction r of its embedding, with H_ii = ∂² log p(target) / ∂x_i².

    Args:
        lins: linearisations of one forward pass; different prompts go through the network together.
        targets: one for each of them.
        directions: r [probe token d_model] for each of them.

    Returns: [probe token] for each of them, in float32 or float64.

    Cost: a Hessian-vector product for each probe and token, about two backward passes, in batches of bounded memory;
        and the graph of a backward pass, about as large as that of the forward pass. A progress bar appears after a
        few seconds.

    Raises:
        RuntimeError: under an attention kernel that has no double backward.
    """
    trace, log_p = lins[0].trace, lins[0].log_probs
    assert trace.logits is not None
    leaf = trace.perturbations[lins[0].wrt]
    size = 1 if trace.hooked else batch_size(lins[0].model, leaf)
    found: dict[int, Tensor] = {}
    rounds = _rounds(lins)
    jobs = [_jobs(len(directions[0]), max(len(lins[i].tokens) for i in some)) for some in rounds]
    with tqdm(total=sum(map(len, jobs)), desc="Hessian products", delay=3, leave=False) as bar:
        for some, of_round in zip(rounds, jobs, strict=True):
            rows = [lins[i].row for i in some]
            ids = torch.tensor([[targets[i].id] for i in some], device=leaf.device)
            with torch.enable_grad():
                total = trace.logits[rows].to(log_p).log_softmax(-1).gather(1, ids).sum()
                (gradient,) = torch.autograd.grad(total, leaf, create_graph=True)
            blocks = directions[0].new_zeros(len(directions[0]), *leaf.shape)
            for i in some:
                blocks[:, trace.places[lins[i].row][0], : len(lins[i].tokens)] = directions[i]
            norms = torch.zeros(
                blocks.shape[:-1], dtype=torch.promote_types(leaf.dtype, torch.float32), device=leaf.device
            )
            for probes, tokens in (batch.unbind(1) for batch in of_round.split(size)):
                slots = torch.arange(len(probes))
                tangents = leaf.new_zeros(len(probes), *leaf.shape)
                tangents[slots, :, tokens] = blocks[probes, :, tokens].to(leaf)
                many = len(probes) > 1
                with pullback.differentiated_twice():
                    (products,) = torch.autograd.grad(
                        gradient, leaf, tangents if many else tangents[0], is_grads_batched=many, retain_graph=True
                    )
                products = products if many else products[None]
                norms[probes, :, tokens] = products[slots, :, tokens].to(norms).abs().sum(-1)
                bar.update(len(probes))
            for i in some:
                found[i] = norms[:, trace.places[lins[i].row][0], : len(lins[i].tokens)]
    return [found[i] for i in range(len(lins))]


def _rounds(lins: Sequence[Linearization]) -> list[list[int]]:
    """Prompts of a batch do not influence one another, so that they share a round; positions of one prompt queue."""
    rounds: list[list[int]] = []
    seen: dict[int, int] = {}
    for i, lin in enumerate(lins):
        entry = lin.trace.places[lin.row][0]
        turn = seen[entry] = seen.get(entry, -1) + 1
        if turn == len(rounds):
            rounds.append([])
        rounds[turn].append(i)
    return rounds


def _jobs(probes: int, tokens: int) -> Int[Tensor, "_ 2"]:
    return torch.cartesian_prod(torch.arange(probes), torch.arange(tokens))


def batch_size(model: Model, leaf: Float[Tensor, "batch token d_model"]) -> int:
    """How many Hessian-vector products go in one batch."""
    if not models.batches_cotangents(model):
        return 1
    # What the backward pass of a backward pass finds for the activations of all layers is kept until the end.
    (batch, tokens, d_model), cfg = leaf.shape, model.cfg
    width = 4 * (getattr(cfg, "d_mlp", None) or 0) + 8 * d_model + 3 * cfg.n_heads * tokens
    working_bytes = _WORKING_BYTES_OF_CPU if leaf.device.type == "cpu" else _WORKING_BYTES
    return max(1, int(working_bytes / (batch * tokens * width * cfg.n_layers * leaf.element_size())))
