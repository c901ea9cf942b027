"""y(x + δ) ≈ y + Σ_t J_t δ_t: the model at one prompt, made linear."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import SupportsIndex, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_scopes import models
from tl_scopes.jacobian import pullback
from tl_scopes.models import Model, Token, Trace


@dataclass(frozen=True, eq=False, repr=False)
class Linearization:
    """A model linearised at one prompt, between two hooks: the Jacobian as an object.

    Made by `tl_scopes.linearize`. It keeps the graph of its one forward pass, so that every question asked of it costs
    backward passes only; the graph is freed with the object.
    """

    model: Model
    """The model, used again by `at` alone."""
    tokens: Int[Tensor, "token"]
    """Token ids up to and including the position, on the model's device."""
    str_tokens: tuple[str, ...]
    """Their text, one string per token."""
    position: int
    """Where the prediction is read: the index of the last of `tokens`."""
    wrt: str
    """The hook where perturbations enter: the domain of J."""
    of: str
    """The hook where the value is read: the range of J."""
    trace: Trace
    """The forward pass: of this prompt alone, or shared with other prompts or positions."""
    row: int = 0
    """Which of the places that the forward pass reads is this one."""

    def __repr__(self) -> str:
        return (
            f"Linearization({self.of} at position {self.position} wrt {self.wrt}; "
            f"{len(self.tokens)} tokens, {models.model_name(self.model)})"
        )

    # -- the point ----------------------------------------------------------------------------------------------------

    @property
    def embeddings(self) -> Float[Tensor, "token d_model"]:
        """x, the value at the `wrt` hook where the model is linearised."""
        return self.trace.inputs[self.wrt][self.trace.places[self.row][0], : len(self.tokens)]

    @property
    def readout(self) -> Float[Tensor, " d_of"]:
        """y, the value at the `of` hook at the position: for "ln_final", what the unembedding reads."""
        return self.trace.output[self.row].detach()

    @property
    def logits(self) -> Float[Tensor, " vocab"]:
        """The model's logits at the position.

        Raises:
            ValueError: when `of` is not the readout.
        """
        self.require_readout()
        return cast(Tensor, self.trace.logits)[self.row].detach()

    @property
    def log_probs(self) -> Float[Tensor, " vocab"]:
        """Log-probabilities of the next token, in nats, in float64: in float32 a sure prediction leaves nothing.

        Raises:
            ValueError: when `of` is not the readout.
        """
        return _as_float64(self.logits).log_softmax(-1)

    @property
    def unit(self) -> str:
        """What a score is counted per: a unit of the norm of δ."""
        return "unit of embedding norm" if self.wrt == "hook_embed" else f"unit of norm at {self.wrt}"

    def require_readout(self) -> None:
        """Refuse to answer a question about the prediction when `of` is some other hook.

        Raises:
            ValueError: when `of` is not the readout.
        """
        if self.trace.logits is None:
            raise ValueError(
                f"this question needs the logits, and the linearisation ends at {self.of!r}: "
                'linearise with of="ln_final", the default.'
            )

    def require_finite(self) -> None:
        """Refuse a forward pass that overflowed.

        Raises:
            ValueError: for NaN or infinite activations, with the hook where they are.
        """
        logits = self.readout if self.trace.logits is None else self.logits
        for name, value in ((self.wrt, self.embeddings), (self.of, self.readout), ("the logits", logits)):
            if not value.isfinite().all():
                raise ValueError(
                    f"NaN or infinite activations at {name!r}: check the weights and your hooks; "
                    f"{value.dtype} may overflow where float32 or bfloat16 does not."
                )

    def token(self, target: str | SupportsIndex | None = None) -> Token:
        """The vocabulary entry that a text or an id means; None means the most likely next token.

        Raises:
            ValueError: a text of several tokens, or unknown to the tokenizer; an id out of range.
            TypeError: neither text nor id.
        """
        return models.token(self.model, self.logits.argmax() if target is None else target, len(self.logits))

    # -- the Jacobian -------------------------------------------------------------------------------------------------

    def vjp(self, cotangents: Float[Tensor, "probe d_of"]) -> Float[Tensor, "probe token d_model"]:
        """cᵀJ for every probe c: the gradient of cᵀy with respect to each token's embedding.

        Cost: about 0.6 of a forward pass per probe, in batches; the result takes probe x token x d_model numbers.

        Raises:
            ValueError: cotangents of another shape.
        """
        self._check("cotangents", cotangents, (None, *self.readout.shape), "[probe d_of]")
        return pullback.vjps(self.model, self.trace, self.wrt, [self.row], [cotangents])[0]

    def squared_norms(self, cotangents: Float[Tensor, "probe d_of"]) -> Float[Tensor, "probe token"]:
        """‖cᵀJ_t‖² for every probe c and token t: what all first-order scopes are made of.

        In float32, or float64 for a float64 model. A progress bar appears after a few seconds.

        Cost: about 0.6 of a forward pass per probe; memory for one batch.

        Raises:
            ValueError: cotangents of another shape.
        """
        self._check("cotangents", cotangents, (None, *self.readout.shape), "[probe d_of]")
        return pullback.squared_norms(self.model, self.trace, self.wrt, [self.row], [cotangents])[0]

    def jvp(self, tangents: Float[Tensor, "probe token d_model"]) -> Float[Tensor, "probe d_of"]:
        """Σ_t J_t δ_t for every probe δ: the first-order change of y.

        The transpose of `vjp`, by differentiating it with respect to its cotangent.

        Cost: one backward pass, and about one more per probe, in batches.

        Raises:
            ValueError: tangents of another shape.
            RuntimeError: under an attention kernel that has no double backward.
        """
        self._check("tangents", tangents, (None, *self.embeddings.shape), "[probe token d_model]")
        return pullback.jvps(self.model, self.trace, self.wrt, self.row, tangents)

    def as_matrix(self) -> Float[Tensor, "d_of token d_model"]:
        """J itself: `as_matrix()[:, t]` is J_t.

        Cost: d_of vector-Jacobian products and d_of x token x d_model numbers: for small models and tests.
        """
        return self.vjp(torch.eye(len(self.readout), dtype=self.readout.dtype, device=self.readout.device))

    def at(self, embeddings: Float[Tensor, "token d_model"]) -> "Linearization":
        """The same question at another point: these values in place of `embeddings`.

        Hooks that were active when this object was made act only if they still are.

        Cost: one forward pass.

        Raises:
            ValueError: embeddings of another shape; a model in training mode by now; NaN or infinite activations.
            RuntimeError: under `torch.inference_mode`.
        """
        self._check("embeddings", embeddings, tuple(self.embeddings.shape), "[token d_model]")
        return self.at_each(embeddings[None])[0]

    def at_each(self, embeddings: Float[Tensor, "point token d_model"]) -> tuple["Linearization", ...]:
        """`at` for several points, as one batch: they share a forward pass, and their backward passes too.

        Cost: one forward pass over all points.

        Raises: as `at` does.
        """
        models.check_model(self.model)
        self._check("embeddings", embeddings, (None, *self.embeddings.shape), "[point token d_model]")
        tokens, texts = self.tokens.expand(len(embeddings), -1), [self.str_tokens] * len(embeddings)
        checkpoint = self.trace.checkpointed
        lins = linearize_places(self.model, tokens, texts, self.wrt, self.of, values=embeddings, checkpoint=checkpoint)
        for lin in lins:
            lin.require_finite()
        return lins

    # -- the readout --------------------------------------------------------------------------------------------------

    def cotangent(self, function: Callable[[Float[Tensor, " vocab"]], Tensor]) -> Float[Tensor, " d_of"]:
        """∂f/∂y, for a number f computed from the logits: the cotangent whose `vjp` is the gradient of f.

        Through the model's real unembedding, soft-caps, scales and biases included.

        Args:
            function: from logits [vocab], in float64, to a number.

        Raises:
            ValueError: when `of` is not the readout; when the function's value is not one finite number.

        Example:
            >>> lin = tls.linearize(model, "The keys to the old cabinet near the door")
            >>> confidence = lin.cotangent(lambda logits: logits.log_softmax(-1).max())
            >>> lin.vjp(confidence[None]).shape
            torch.Size([1, 10, 128])
        """
        readout, logits = self._readout_and_logits
        with torch.enable_grad():
            value = function(_as_float64(logits[0]))
            if not isinstance(value, Tensor) or value.numel() != 1 or not value.isfinite():
                raise ValueError(f"the function of the logits must give one finite number, got {value!r}.")
            (gradient,) = torch.autograd.grad(value, readout, retain_graph=True)
        return gradient[0]

    def logits_vjp(self, cotangents: Float[Tensor, "probe vocab"]) -> Float[Tensor, "probe d_of"]:
        """cᵀ ∂logits/∂y for every probe c.

        Raises:
            ValueError: when `of` is not the readout; cotangents of another shape.
        """
        readout, logits = self._readout_and_logits
        self._check("cotangents", cotangents, (None, logits.shape[-1]), "[probe vocab]")
        return pullback.products(logits, readout, cotangents.to(logits)[:, None], batched=self._unembeds_together)[:, 0]

    def logits_jvp(self, tangents: Float[Tensor, "probe d_of"]) -> Float[Tensor, "probe vocab"]:
        """∂logits/∂y · δ for every probe δ.

        Raises:
            ValueError: when `of` is not the readout; tangents of another shape.
        """
        readout, logits = self._readout_and_logits
        self._check("tangents", tangents, (None, readout.shape[-1]), "[probe d_of]")
        cotangent = torch.zeros_like(logits, requires_grad=True)
        (pulled,) = torch.autograd.grad(logits, readout, cotangent, create_graph=True)
        directions = tangents.to(readout)[:, None]
        return pullback.products(pulled, cotangent, directions, batched=self._unembeds_together)[:, 0]

    # -- private ------------------------------------------------------------------------------------------------------

    @property
    def _readout_and_logits(self) -> tuple[Float[Tensor, "1 d_of"], Float[Tensor, "1 vocab"]]:
        self.require_readout()
        return models.readout_graph(self.model, self.trace, self.row)

    @property
    def _unembeds_together(self) -> bool:
        """Backward hooks of the user's would be handed tensors of torch.vmap's."""
        return not (self.trace.hooked or models.has_backward_hooks(self.model))

    def _check(self, what: str, value: Tensor, shape: tuple[int | None, ...], axes: str) -> None:
        expected = [str(n) if n is not None else "any number" for n in shape]
        if not isinstance(value, Tensor):
            raise TypeError(f"{what} must be a tensor of the shape {axes}, got {type(value).__name__}.")
        if value.ndim != len(shape) or any(n not in (None, m) for n, m in zip(shape, value.shape, strict=True)):
            raise ValueError(f"{what} must have the shape {axes} = [{', '.join(expected)}], got {list(value.shape)}.")


def linearize_places(
    model: Model,
    tokens: Int[Tensor, "batch token"],
    str_tokens: Sequence[tuple[str, ...]],
    wrt: str,
    of: str,
    *,
    places: Sequence[tuple[int, int]] | None = None,
    values: Float[Tensor, "batch token d_model"] | None = None,
    checkpoint: bool = False,
) -> tuple[Linearization, ...]:
    """Linearise at several places of one forward pass (see `models.trace`); ask each whether its numbers are finite."""
    replacements = None if values is None else {wrt: values.detach()}
    trace = models.trace(model, tokens, wrt=[wrt], of=of, places=places, values=replacements, checkpoint=checkpoint)
    return tuple(
        Linearization(
            model, tokens[entry, : position + 1], str_tokens[entry][: position + 1], position, wrt, of, trace, row
        )
        for row, (entry, position) in enumerate(trace.places)
    )


def _as_float64(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.device.type == "mps" else tensor.double()  # Apple's GPUs have none
