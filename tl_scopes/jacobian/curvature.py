"""H = ∂² log p / ∂x²: how the slope of a prediction changes with the embeddings, from Hessian-vector products."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from tqdm import tqdm

from tl_scopes import models
from tl_scopes.jacobian import pullback
from tl_scopes.jacobian.linearization import Linearization
from tl_scopes.jacobian.softmax import log_prob
from tl_scopes.models import Token, Work
from tl_scopes.progress import progress_bar


def block_norms(
    lins: Sequence[Linearization], targets: Sequence[Token], directions: Sequence[Shaped[Tensor, "_ _ d_model"]]
) -> list[Float[Tensor, "_ _"]]:
    """‖H_ii r‖₁ of every token i for each direction r of its embedding, with H_ii = ∂² log p(target) / ∂x_i².

    Args:
        lins: linearisations of one forward pass; different prompts go through the network together.
        targets: one for each linearisation.
        directions: r [probe token d_model] for each linearisation.

    Returns: the norms [probe token] for each linearisation, in float64.

    Cost: a Hessian-vector product for each probe and token, about two backward passes, in batches of bounded memory;
        and the graph of a backward pass, about as large as that of the forward pass. A progress bar appears after a
        few seconds.

    Raises:
        RuntimeError: under an attention kernel that has no double backward.
    """
    found: dict[int, Tensor] = {}
    turns = rounds(lins)
    jobs = [_jobs(len(directions[0]), max(len(lins[i].tokens) for i in some)) for some in turns]
    with progress_bar(sum(map(len, jobs)), "Hessian products") as bar:
        for some, of_round in zip(turns, jobs, strict=True):
            chosen = [lins[i] for i in some]
            slope, scales = _slope(chosen, [targets[i] for i in some])
            norms = _products(chosen, slope, [directions[i] for i in some], of_round, bar)
            for i, scale in zip(some, scales, strict=True):
                found[i] = norms[:, _entry(lins[i]), : len(lins[i].tokens)] * scale
    return [found[i] for i in range(len(lins))]


def _slope(
    lins: Sequence[Linearization], targets: Sequence[Token]
) -> tuple[Float[Tensor, "batch token d_model"], list[float]]:
    """∂(Σ log p / scale)/∂x, to be differentiated again, and the scales.

    A log-probability has slopes in proportion to 1 − p. Divided by a power of two near that, they fit into any
    precision.
    """
    trace = lins[0].trace
    assert trace.logits is not None
    with torch.enable_grad():
        log_p = [
            log_prob(models.precise(trace.logits[lin.row]), target.id)
            for lin, target in zip(lins, targets, strict=True)
        ]
        scales = [pullback.power_of_two(-math.expm1(value.item())) for value in log_p]
        total = torch.stack([value / scale for value, scale in zip(log_p, scales, strict=True)]).sum()
        return torch.autograd.grad(total, _leaf(lins[0]), create_graph=True)[0], scales


def _products(
    lins: Sequence[Linearization],
    slope: Float[Tensor, "batch token d_model"],
    directions: Sequence[Shaped[Tensor, "_ _ d_model"]],
    jobs: Int[Tensor, "_ 2"],
    bar: tqdm,
) -> Float[Tensor, "probe batch token"]:
    """‖∂(slope · r)/∂x_i‖₁ for the jobs (probe, token i), with r at the token i of every prompt."""
    leaf = _leaf(lins[0])
    blocks = directions[0].new_zeros(len(directions[0]), *leaf.shape)
    for lin, of_one in zip(lins, directions, strict=True):
        blocks[:, _entry(lin), : len(lin.tokens)] = of_one
    size = pullback.batch_size(lins[0].model, lins[0].trace, leaf, Work.CURVATURE)
    norms = models.precise(leaf).new_zeros(blocks.shape[:-1])
    for probes, tokens in (batch.unbind(1) for batch in jobs.split(size)):
        slots = torch.arange(len(probes), device="cpu")
        tangents = leaf.new_zeros(len(probes), *leaf.shape)
        tangents[slots, :, tokens] = blocks[probes, :, tokens].to(leaf)
        with pullback.differentiated_twice():
            bent = pullback.products(slope, leaf, tangents, together=size > 1)
        norms[probes, :, tokens] = models.precise(bent[slots, :, tokens]).abs().sum(-1)
        bar.update(len(probes))
    return norms


def _leaf(lin: Linearization) -> Float[Tensor, "batch token d_model"]:
    return lin.trace.perturbations[lin.wrt]


def _entry(lin: Linearization) -> int:
    """Which prompt of the batch it is."""
    return lin.trace.places[lin.row][0]


def rounds(lins: Sequence[Linearization]) -> list[list[int]]:
    """The linearisations that go together: one per prompt of the batch, since positions of one prompt would mix."""
    rounds: list[list[int]] = []
    seen: dict[int, int] = {}
    for i, lin in enumerate(lins):
        entry = _entry(lin)
        turn = seen[entry] = seen.get(entry, -1) + 1
        if turn == len(rounds):
            rounds.append([])
        rounds[turn].append(i)
    return rounds


def _jobs(probes: int, tokens: int) -> Int[Tensor, "_ 2"]:
    return torch.cartesian_prod(torch.arange(probes, device="cpu"), torch.arange(tokens, device="cpu"))
