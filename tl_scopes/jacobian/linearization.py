"""y(x + δ) ≈ y + Σ_t J_t δ_t: the model at one prompt, made linear."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, wraps
from typing import Any, ParamSpec, SupportsIndex, TypeVar, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_scopes import models
from tl_scopes.jacobian import pullback
from tl_scopes.jacobian.pullback import Ends
from tl_scopes.jacobian.tensor_arguments import require_shape
from tl_scopes.models import LinearRules, Model, ReadPrompt, Rules, Target, Token, Trace, Work

Given = ParamSpec("Given")
Found = TypeVar("Found")


@dataclass(frozen=True, eq=False, repr=False)
class Linearization:
    """A model linearised at one prompt, between two hooks: the Jacobian as an object.

    Made by `tl_scopes.linearize`. It keeps the graph of its one forward pass, so that every question asked of it costs
    backward passes only; the graph is freed with the object.
    """

    model: Model
    """The model, which `at` runs again."""
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
    """The row of this prediction among those that the forward pass reads."""
    notes: tuple[str, ...] = ()
    """Sentences about the prompt that a reader of the scores should know: that it begins with two BOS tokens, say."""
    parts: tuple[str, ...] = ()
    """The part of a chat that each token belongs to, "user" say, or "template"; empty for other prompts."""

    def __repr__(self) -> str:
        return (
            f"Linearization({self.of} at position {self.position} wrt {self.wrt}; "
            f"{models.counted(len(self.tokens), 'token')}, {models.model_name(self.model)})"
        )

    # -- the point ----------------------------------------------------------------------------------------------------

    @cached_property
    def ends(self) -> Ends:
        """Which part of the forward pass this is: the tokens where J begins, the rows where it ends."""
        entry, tokens = self.trace.places[self.row][0], torch.arange(len(self.tokens), device=self.tokens.device)
        return Ends((self.row,), (entry,), (tokens,), len(self.tokens))

    @property
    def single(self) -> tuple["Linearization", ...]:
        """The predictions that this is about, one by one: here it is one alone."""
        return (self,)

    @property
    def run_tokens(self) -> Int[Tensor, "token"]:
        """The ids that went through the model, one after another."""
        return self.tokens

    @property
    def scored(self) -> int:
        """How many tokens get a score, counted from the first: here all of them."""
        return len(self.tokens)

    @property
    def embeddings(self) -> Float[Tensor, "token d_model"]:
        """x, the value at the `wrt` hook where the model is linearised."""
        return self.trace.inputs[self.wrt][self.trace.places[self.row][0], : len(self.tokens)]

    @property
    def readout(self) -> Float[Tensor, " d_of"]:
        """y, the value at the `of` hook at the position: for "ln_final", what the unembedding reads."""
        return self.trace.output[self.row].detach()

    @property
    def logits(self) -> Float[Tensor, "*row vocab"]:
        """The model's logits at the position.

        Raises:
            ValueError: when `of` is not the readout.
        """
        self.require_readout()
        return cast(Tensor, self.trace.logits)[self.row].detach()

    @property
    def log_probs(self) -> Float[Tensor, "*row vocab"]:
        """Log-probabilities of the next token, in nats, in float64.

        Raises:
            ValueError: when `of` is not the readout.
        """
        return models.precise(self.logits).log_softmax(-1)

    @property
    def vocab(self) -> int | None:
        """How many logits the model has; None where the linearisation ends before them."""
        return None if self.trace.logits is None else self.trace.logits.shape[-1]

    @property
    def is_centered(self) -> bool:
        """Whether the unembedding is centred, so that every logit is counted from the mean over the vocabulary.

        Raises:
            ValueError: when `of` is not the readout.
        """
        self.require_readout()
        return models.is_centered(self.model, self.trace, self.row)

    @property
    def unit(self) -> str:
        """The unit of the norm of δ. Scores are so much per this unit."""
        return "unit of embedding norm" if self.wrt == models.EMBEDDING else f"unit of norm at {self.wrt}"

    @property
    def computed_in(self) -> str:
        """The name of the precision that the model computed in, which torch.autocast may have chosen."""
        return str(self.trace.state.autocast or self.readout.dtype).removeprefix("torch.")

    @property
    def rules(self) -> LinearRules | None:
        """The rules that J was taken under; None where it is the model's own derivative."""
        return self.trace.rules

    def under(self, rules: Rules) -> "Linearization":
        """The same question under other rules, or None; see `tl_scopes.linearize`.

        Cost: one forward pass, unless these are its rules already.

        Raises:
            ValueError: for unknown rules, and a model that they do not cover; when the model's hooks or weights have
                changed since it was linearised.
            TypeError: for something that is not names of rules.
        """
        read = LinearRules.read(rules)
        if read == self.rules:
            return self
        self.require_unchanged()
        return self._finite_at_each(self.embeddings[None], read)[0]

    def require_readout(self) -> None:
        """Refuse a question about the prediction when J ends elsewhere.

        Raises:
            ValueError: when `of` is not the readout.
        """
        if self.trace.logits is None:
            raise ValueError(
                f"this question needs the logits, and the linearisation ends at {self.of!r}: "
                'linearise with of="ln_final", the default.'
            )

    def require_repeatable(self) -> None:
        """Refuse when the model, run again at this prompt, would compute something else than it did.

        Raises:
            ValueError: when the user's hooks or the weights have changed since; when `at` made this linearisation, at
                other embeddings than the prompt's.
        """
        self.require_unchanged()
        if self.trace.moved:
            raise ValueError(
                "this linearisation is of a point that `at` moved to, and this question runs the prompt itself again: "
                "ask it of the linearisation at the prompt."
            )

    def require_unchanged(self) -> None:
        """Refuse when the user's hooks or the weights have changed since the forward pass (`models.ModelState`).

        Raises:
            ValueError: when they have.
            TypeError, RuntimeError: when the model can no longer be linearised: see `models.check_model`.
        """
        models.check_model(self.model)
        self.trace.state.require_unchanged(self.model)

    def require_finite(self) -> None:
        """Refuse a forward pass that overflowed.

        A logit of minus infinity is a token that cannot come, which a hook of the user's or a padded vocabulary may
        say; it weighs nothing in a prediction.

        Raises:
            ValueError: for NaN or infinite activations, with the hook where they are.
        """
        logits = self.readout if self.trace.logits is None else self.logits
        for name, value in ((self.wrt, self.embeddings), (self.of, self.readout), ("the logits", logits)):
            fine = value.isfinite()
            if name == "the logits" and bool(fine.any(-1).all()):
                fine |= value == -torch.inf
            if not fine.all():
                half = "; or load the model in float32 or bfloat16, which hold larger numbers than float16"
                raise ValueError(
                    f"NaN or infinite activations at {name!r}, in {value.dtype}: check the weights and your hooks"
                    f"{half if value.dtype == torch.float16 else ''}."
                )

    def require_possible(self, *named: Target | None) -> None:
        """Refuse targets of one prediction that cannot come, since a hook gives them a logit of minus infinity.

        Raises:
            ValueError: with the target.
        """
        if len(self.single) > 1 or self.trace.logits is None:
            return
        logits = self.single[0].logits
        for target in named:
            if target is not None and not target.is_span and float(logits[target.ids].max()) == -torch.inf:
                raise ValueError(
                    f"{target.text!r} cannot come here: a hook gives it a logit of minus infinity. Ask about another "
                    "token, or take the hook off."
                )

    def token(self, target: str | SupportsIndex | None = None, what: str = "target") -> Token:
        """The vocabulary entry that a text or an id means; None means the most likely next token.

        Args:
            target: text, id or None.
            what: what the entry is for, as errors call it.

        Raises:
            ValueError: for a text that is several tokens or unknown to the tokenizer, and an id out of range.
            TypeError: for something that is neither text nor id.
        """
        logits = self.single[0].logits
        return models.token(self.model, logits.argmax() if target is None else target, len(logits), what)

    # -- the Jacobian -------------------------------------------------------------------------------------------------

    def vjp(self, cotangents: Float[Tensor, "probe d_of"]) -> Float[Tensor, "probe token d_model"]:
        """cᵀJ for every probe c: the gradient of cᵀy with respect to each token's embedding.

        In float32, or float64 for a float64 model.

        Cost: about 0.6 of a forward pass per probe, in batches; the result takes probe x token x d_model numbers.

        Raises:
            ValueError: for cotangents of another shape, and complex or sparse ones.
            TypeError: for something that is not a tensor.
        """
        require_shape(cotangents, "cotangents", (None, *self.readout.shape), "[probe d_of]")
        return pullback.vjps([self], [cotangents])[0]

    def squared_norms(self, cotangents: Float[Tensor, "probe d_of"]) -> Float[Tensor, "probe token"]:
        """‖cᵀJ_t‖² for every probe c and token t, which all first-order scopes are made of.

        In float64, since squares of what float32 holds may be too small or too large for it. A progress bar appears
        on a terminal after a few seconds.

        Cost: about 0.6 of a forward pass per probe; memory for one batch.

        Raises: as `vjp` does.
        """
        require_shape(cotangents, "cotangents", (None, *self.readout.shape), "[probe d_of]")
        return pullback.squared_norms([self], [cotangents])[0]

    def jvp(self, tangents: Float[Tensor, "probe token d_model"]) -> Float[Tensor, "probe d_of"]:
        """Σ_t J_t δ_t for every probe δ: the first-order change of y.

        It is the derivative of `vjp` with respect to its cotangent. In float32, or float64 for a float64 model.

        Cost: one backward pass, and about one more per probe, in batches.

        Raises:
            ValueError: for tangents of another shape, and complex or sparse ones.
            TypeError: for something that is not a tensor.
            RuntimeError: under an attention kernel that has no double backward.
        """
        require_shape(tangents, "tangents", (None, *self.embeddings.shape), "[probe token d_model]")
        return pullback.jvps([self], [tangents])[0]

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
            ValueError: for embeddings of another shape, complex or sparse; for a model that is in training mode by now;
                for NaN or infinite activations.
            TypeError: for something that is not a tensor.
            RuntimeError: under `torch.inference_mode`.
        """
        require_shape(embeddings, "embeddings", tuple(self.embeddings.shape), "[token d_model]")
        return self.at_each(embeddings[None])[0]

    def at_each(self, embeddings: Float[Tensor, "point token d_model"]) -> tuple["Linearization", ...]:
        """`at` for several points, as one batch: they share a forward pass, and their backward passes too.

        Cost: one forward pass over all points.

        Raises: as `at` does; ValueError for no points.
        """
        models.check_model(self.model)
        require_shape(embeddings, "embeddings", (None, *self.embeddings.shape), "[point token d_model]")
        return self._finite_at_each(embeddings, self.rules)

    def _finite_at_each(
        self, embeddings: Float[Tensor, "point token d_model"], rules: LinearRules | None
    ) -> tuple["Linearization", ...]:
        lins = self._at_each(embeddings, rules)
        for lin in lins:
            lin.require_finite()
        return lins

    def _at_each(
        self, embeddings: Float[Tensor, "point token d_model"], rules: LinearRules | None
    ) -> tuple["Linearization", ...]:
        trace = models.trace(
            self.model,
            self.tokens.expand(len(embeddings), -1),
            wrt=[self.wrt],
            of=self.of,
            values={self.wrt: embeddings.detach()},
            checkpoint=self.trace.checkpointed,
            rules=rules,
        )
        return tuple(replace(self, trace=trace, row=row) for row in range(len(embeddings)))

    def evaluate(
        self, embeddings: Float[Tensor, "point token d_model"]
    ) -> tuple[Float[Tensor, "point d_of"], Float[Tensor, "point *row vocab"] | None]:
        """Readout and logits at other points, without a graph; the logits are None where `of` is not the readout.

        Cost: one forward pass over all points.

        Raises: as `models.evaluate` does.
        """
        tokens = self.tokens.expand(len(embeddings), -1)
        return models.evaluate(self.model, tokens, wrt=self.wrt, of=self.of, values=embeddings)

    def at_tokens(self, tokens: Int[Tensor, "token"]) -> "Linearization":
        """The same question at another prompt: these token ids, read at their last position.

        Cost: one forward pass.

        Raises:
            ValueError: for token ids that the model does not know, a model that is in training mode by now, and NaN or
                infinite activations.
            TypeError: for ids that are not integers.
        """
        models.check_model(self.model)
        return self._at_tokens(models.tokenize(self.model, tokens))

    def _at_tokens(self, tokens: Int[Tensor, "token"]) -> "Linearization":
        options: dict[str, Any] = {"checkpoint": self.trace.checkpointed, "rules": self.rules}
        return linearize_prompt(self.model, ReadPrompt(tokens, ()), self.wrt, self.of, **options)

    def at_once(self, work: Work) -> int:
        """How many points of this linearisation go through the model together, for this work.

        Each is as many texts as there are answers, and as many rows as there are predictions.
        """
        texts = self.ends.tokens
        return models.at_once(self.model, max(map(len, texts)), work, texts=len(texts), rows=len(self.ends.rows))

    # -- the readout --------------------------------------------------------------------------------------------------

    def cotangent(self, function: Callable[[Float[Tensor, "*row vocab"]], Tensor]) -> Float[Tensor, " d_of"]:
        """∂f/∂y = (∂f/∂z)ᵀ ∂z/∂y for a number f that is computed from the logits z: its `vjp` is the gradient of f.

        It goes through the model's real unembedding, soft-caps, scales and biases included. In float64.

        Args:
            function: from logits [vocab], in float64, to a number.

        Raises:
            ValueError: when `of` is not the readout; when the function's value is not one finite real number, or does
                not depend on the logits it was given (because it detaches them, or counts, or looks one up).

        Example:
            >>> lin = tls.linearize(model, "The keys to the old cabinet near the door")
            >>> confidence = lin.cotangent(lambda logits: logits.log_softmax(-1).max())
            >>> lin.vjp(confidence[None]).shape
            torch.Size([1, 10, 128])
        """
        return self.logits_vjp(self.logits_gradient(function)[None])[0]

    def logits_gradient(self, function: Callable[[Float[Tensor, "*row vocab"]], Tensor]) -> Float[Tensor, "*row vocab"]:
        """∂f/∂z for a number f that is computed from the logits z. In float64.

        Raises: as `cotangent` does.
        """
        with torch.enable_grad():
            logits = models.precise(self.logits).requires_grad_()
            value = function(logits.clone())  # a copy, which it may write into
            if not isinstance(value, Tensor) or value.numel() != 1 or value.is_complex() or not value.isfinite():
                many = isinstance(value, Tensor) and value.numel() != 1
                got = f"a tensor of shape {list(value.shape)}: sum it up, or choose one" if many else repr(value)
                raise ValueError(f"the function of the logits must give one finite number, a real tensor, got {got}.")
            found = torch.autograd.grad(value, logits, allow_unused=True)[0] if value.requires_grad else None
        if found is None:
            raise ValueError(
                f"the function of the logits gave {value!r}, which cannot be differentiated with respect to them: "
                "compute it from the logits that it is given, without detach, argmax or item."
            )
        return found

    def logits_vjp(self, cotangents: Float[Tensor, "probe *row vocab"]) -> Float[Tensor, "probe d_of"]:
        """cᵀ ∂z/∂y for every probe c, with the logits z as a function of the readout y. In float64.

        Raises:
            ValueError: when `of` is not the readout; for cotangents of another shape, and complex or sparse ones.
            TypeError: for something that is not a tensor.
        """
        readout, logits = self._readout_and_logits
        require_shape(cotangents, "cotangents", (None, *self.logits.shape), "[probe vocab]")
        units, scales = pullback.near_one(cotangents)
        together = self.unembeds_together
        given = units.to(logits).reshape(-1, *logits.shape)
        pulled = pullback.summed_over_vocabulary(logits, readout, given, together=together).flatten(1)
        return models.precise(pulled) * units.new_tensor(scales)[:, None]

    def logits_jvp(self, tangents: Float[Tensor, "probe d_of"]) -> Float[Tensor, "probe *row vocab"]:
        """∂z/∂y · δ for every probe δ, with the logits z as a function of the readout y. In float64.

        Raises:
            ValueError: when `of` is not the readout; for tangents of another shape, and complex or sparse ones.
            TypeError: for something that is not a tensor.
        """
        readout, logits = self._readout_and_logits
        require_shape(tangents, "tangents", (None, *self.readout.shape), "[probe d_of]")
        units, scales = pullback.near_one(tangents)
        units = units.reshape(-1, *readout.shape)
        cotangent = torch.zeros_like(logits, requires_grad=True)
        with models.unwritten():
            (pulled,) = torch.autograd.grad(logits, readout, cotangent, create_graph=True)
        together = self.unembeds_together
        pushed = pullback.products(pulled, cotangent, units.to(readout), together=together)
        pushed = models.precise(pushed) * units.new_tensor(scales)[:, None, None]
        return pushed.reshape(-1, *self.logits.shape)

    @property
    def unembeds_together(self) -> bool:
        """Whether several cotangents may go back through the unembedding as one batch."""
        return not self.trace.meets_backward_hooks

    # -- private ------------------------------------------------------------------------------------------------------

    @property
    def _readout_and_logits(self) -> tuple[Float[Tensor, "row d_of"], Float[Tensor, "row vocab"]]:
        self.require_readout()
        return models.readout_graph(self.model, self.trace, self.ends.rows)


def require_linearization(lin: object, name: str) -> None:
    """Refuse what is not a Linearization. The error names the function that was called.

    Raises:
        TypeError: with the line to write instead.
    """
    if not isinstance(lin, Linearization):
        raise TypeError(
            f"{name} takes a Linearization, got {type(lin).__name__}: write lin = tls.linearize(model, prompt), then "
            f"tls.{name}(lin, ...)."
        )


def takes_a_model(function: Callable[Given, Found]) -> Callable[Given, Found]:
    """Refuse a linearisation in the place of the model, the first argument, whatever comes after it.

    Raises:
        TypeError: with the line to write instead.
    """

    @wraps(function)
    def refusing(*args: Given.args, **options: Given.kwargs) -> Found:
        name = function.__name__
        if args and isinstance(args[0], Linearization):
            raise TypeError(
                f"{name} takes a model and a prompt, which it runs to see inside, got a {type(args[0]).__name__}: "
                f"write tls.{name}(model, prompt, ...)."
            )
        return function(*args, **options)

    return refusing


def linearize_prompt(
    model: Model,
    read: ReadPrompt,
    wrt: str,
    of: str,
    *,
    checkpoint: bool = False,
    rules: LinearRules | None = None,
    keep: Sequence[str] = (),
) -> Linearization:
    """Linearise a checked model at the last position of one prompt.

    Raises:
        ValueError: for NaN or infinite activations; else as `models.trace` does.
    """
    places = [(0, len(read.tokens) - 1)]
    (lin,) = linearize_places(model, [read], wrt, of, places, checkpoint=checkpoint, rules=rules, keep=keep)
    lin.require_finite()
    return lin


def linearize_places(
    model: Model,
    prompts: Sequence[ReadPrompt],
    wrt: str,
    of: str,
    places: Sequence[tuple[int, int]],
    *,
    checkpoint: bool = False,
    rules: LinearRules | None = None,
    keep: Sequence[str] = (),
) -> tuple[Linearization, ...]:
    """Linearise a checked model at several places of one forward pass: number of the prompt, position in it.

    Shorter prompts are filled up on the right. Each linearisation must still be asked whether its numbers are finite
    (`Linearization.require_finite`), since one bad prompt of a batch is not a reason to refuse the others.

    Raises: as `models.trace` does.
    """
    tokens = models.as_batch([read.tokens for read in prompts])
    trace = models.trace(model, tokens, wrt=[wrt], of=of, places=places, checkpoint=checkpoint, rules=rules, keep=keep)
    texts = [models.token_texts(model, read.tokens) for read in prompts]
    return tuple(
        Linearization(
            model=model,
            tokens=tokens[entry, : at + 1],
            str_tokens=texts[entry][: at + 1],
            position=at,
            wrt=wrt,
            of=of,
            trace=trace,
            row=row,
            notes=prompts[entry].up_to(at).notes,
            parts=prompts[entry].parts[: at + 1],
        )
        for row, (entry, at) in enumerate(trace.places)
    )
