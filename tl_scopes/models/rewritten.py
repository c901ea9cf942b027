"""Torch's functions with the derivatives of linear rules in place of their own; their values stay, bit for bit.

They are met one by one, as a thread calls them (`TorchFunctionMode`), so that it does not matter which architecture
calls them, nor whether TransformerLens has a hook there. What they miss is found in the graph (`coverage`).
"""

from collections.abc import Callable, Sequence, Set
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode

SHARED = "shared"
"""The entry in a node's metadata that says its product is shared out."""


class Rewritten(TorchFunctionMode):
    """Inside, torch's functions give the same values with the derivatives of the rules."""

    def __init__(self, rules: frozenset[str]) -> None:
        super().__init__()
        self.rules = rules
        chosen: dict[str, Callable[..., Any]] = {}
        if "norms" in rules:
            chosen |= dict.fromkeys(_DENOMINATORS, _constant)
            chosen |= dict.fromkeys(_QUOTIENTS, _quotient)
            chosen |= {"layer_norm": _layer_norm, "rms_norm": _rms_norm, "group_norm": _group_norm}
        if "activations" in rules:
            chosen |= dict.fromkeys(_GATES, _constant)
            chosen |= dict.fromkeys(_ACTIVATIONS, _secant)
            chosen |= dict.fromkeys(("add", "__add__", "__radd__"), _sum)
        if {"norms", "activations"} & rules:
            chosen |= dict.fromkeys(("pow", "__pow__", "square"), _power)
        if {"gates", "activations"} & rules:
            chosen |= dict.fromkeys(_TIMES, _product)
        if "patterns" in rules:
            chosen["softmax"] = _constant
        if {"pattern_value", "query_key"} & rules:
            chosen["softmax"] = _marked_softmax
            chosen |= dict.fromkeys(_KEEPING_PATTERNS, _marked)
        if {"patterns", "pattern_value", "query_key"} & rules:
            chosen |= dict.fromkeys(("solve_triangular", "linalg_solve_triangular"), _solved)
            chosen |= dict.fromkeys(_MATRIX_PRODUCTS, _matrix_product)
            chosen["scaled_dot_product_attention"] = _attention
        self.chosen = chosen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name in _WITH_FACTORS:
            fixed = _fixed if name in _FACTORS_ALONE else _fixed_matrix
            args, kwargs = tuple(map(fixed, args)), {key: fixed(value) for key, value in kwargs.items()}
        rule = self.chosen.get(name)
        return func(*args, **kwargs) if rule is None else rule(self, func, args, kwargs)


_DENOMINATORS = tuple("rsqrt sqrt reciprocal norm vector_norm linalg_vector_norm std var __rdiv__ __rtruediv__".split())
_QUOTIENTS = tuple("div div_ divide true_divide __truediv__ __div__ __itruediv__ __idiv__".split())
_GATES = tuple("sigmoid expit hardsigmoid erf exp softplus logsigmoid log cos sin".split())
"""Functions that are not zero at zero: where they are factors of an activation, x·sigmoid(x), they are its secant."""
_ACTIVATIONS = tuple(
    "silu gelu relu relu6 leaky_relu elu celu selu mish hardswish tanh expm1 hardtanh softsign softshrink clamp clip "
    "clamp_min clamp_max abs".split()
)
_TIMES = ("mul", "multiply", "__mul__", "__rmul__")
_MATRIX_PRODUCTS = tuple("matmul __matmul__ bmm einsum baddbmm".split())
_FACTORS_ALONE = frozenset((*_TIMES, *_MATRIX_PRODUCTS))
_WITH_FACTORS = frozenset((*_FACTORS_ALONE, "linear", "conv1d", "addmm"))
"""Functions that multiply, those alone, and those that may add a bias as well."""
_KEEPING_PATTERNS = tuple(
    "to type_as dropout float half bfloat16 double type __getitem__ nan_to_num where masked_fill reshape view "
    "contiguous transpose permute expand flatten unflatten squeeze unsqueeze clone".split()
)
"""Functions of an attention pattern that give an attention pattern."""


_GATE, _PATTERN = "_tl_scopes_gate", "_tl_scopes_pattern"


def _mark(value: Tensor, what: str) -> None:
    """Say on a tensor what it is."""
    setattr(value, what, True)


def _has(value: Any, what: str) -> bool:
    return hasattr(value, what)


def _fixed(value: Any) -> Any:
    """A parameter as a constant. The model's are frozen, and those of a user's hook, of a linear probe say, are not;
    in their products with the stream there is one factor that the input moves, and nothing to share out."""
    return value.detach() if isinstance(value, Parameter) and value.requires_grad else value


def _fixed_matrix(value: Any) -> Any:
    """The same, but for a bias."""
    return _fixed(value) if isinstance(value, Parameter) and value.ndim > 1 else value


def _moves(value: Any) -> bool:
    """Whether a value carries a derivative: a tangent in forward mode, which keeps no graph, and else a graph."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    if value.requires_grad and torch.is_grad_enabled():
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(value).tangent is not None


def _still(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _constant(mode: Rewritten, func: Any, args: Any, kwargs: Any) -> Any:
    """f(x), as a constant."""
    out = func(*map(_still, args), **kwargs)
    return tuple(map(_still, out)) if isinstance(out, tuple) else out


def _secant(mode: Rewritten, func: Any, args: Any, kwargs: Any) -> Any:
    """act(x) = s·x with the secant s = act(x)/x constant."""
    x, *others = args if args else (kwargs.pop("input"),)
    if not _moves(x):
        return func(x, *others, **kwargs)
    kwargs = {name: False if name == "inplace" else _still(value) for name, value in kwargs.items()}
    still, others = x.detach(), list(map(_still, others))
    out = func(still, *others, **kwargs)
    secant = (out / still).where(still != 0, _secant_at_zero(func, others, kwargs, still))
    change = secant * (x - still)
    if x.dtype == torch.float16 and not change.isfinite().all():  # powers within GELU overflow, to no effect
        change = change.where(change.isfinite(), 0)
    out = _same_value(out, change)
    if func.__name__ == "tanh":
        _mark(out, _GATE)
    return out


def _secant_at_zero(func: Any, others: Any, kwargs: Any, like: Tensor) -> Tensor:
    """The secant at a number just below zero, which of a kink at zero is the side that torch's derivatives take."""
    below = like.new_full((1,) * like.ndim, -(torch.finfo(like.dtype).eps ** 0.5))
    with torch.no_grad():
        return func(below, *others, **kwargs) / below


def _power(mode: Rewritten, func: Any, args: Any, kwargs: Any) -> Any:
    """xⁿ = xⁿ⁻¹·x with xⁿ⁻¹ constant, a secant; for other powers than 1, 2, 3, … a denominator, constant."""
    x, exponent = args[0], 2 if func.__name__ == "square" else (args[1] if len(args) > 1 else kwargs.get("exponent"))
    if not _moves(x) or isinstance(exponent, Tensor):
        return func(*args, **kwargs)
    if exponent == 2:
        return x * x.detach() if "activations" in mode.rules else func(*args, **kwargs)
    if exponent == int(exponent) and exponent > 0:
        return _secant(mode, func, args, kwargs) if "activations" in mode.rules else func(*args, **kwargs)
    return _constant(mode, func, args, kwargs) if "norms" in mode.rules else func(*args, **kwargs)


def _quotient(mode: Rewritten, func: Any, args: Any, kwargs: Any) -> Any:
    """a/b with b constant."""
    return func(args[0], *map(_still, args[1:]), **{name: _still(value) for name, value in kwargs.items()})


def _product(mode: Rewritten, func: Any, args: Any, kwargs: Any) -> Any:
    """a·b = ½(a·b̄ + ā·b); where b is 1 + tanh(x), as in GELU, it is a part of the secant, and constant."""
    if len(args) != 2:
        return func(*args, **kwargs)
    a, b = args
    if not (_moves(a) and _moves(b)):
        out = func(a, b, **kwargs)
        if _has(a, _GATE) or _has(b, _GATE):
            _mark(out, _GATE)
        return out
    for gate, other in ((a, b), (b, a)):
        if _has(gate, _GATE) and "activations" in mode.rules:
            return other * gate.detach()
    out = func(a, b, **kwargs)
    return _shared_out(out, args) if "gates" in mode.rules else out


def _sum(mode: Rewritten, func: Any, args: Any, kwargs: Any) -> Any:
    out = func(*args, **kwargs)
    if any(_has(one, _GATE) for one in args) and not all(map(_moves, args[:2])):
        _mark(out, _GATE)
    return out


def _matrix_product(mode: Rewritten, func: Any, args: Any, kwargs: Any) -> Any:
    """A·B = ½(A·B̄ + Ā·B) for the rule that the product falls under.

    Under "patterns" that is for products which no softmax makes constant, such as those of a state space.
    """
    out = func(*args, **kwargs)
    factors = [one for one in args if _moves(one)]
    if len(factors) < 2:
        return out
    rule = "pattern_value" if any(_has(one, _PATTERN) for one in factors) else "query_key"
    return _shared_out(out, factors) if {rule, "patterns"} & mode.rules else out


def _solved(mode: Rewritten, func: Any, args: Any, kwargs: Any) -> Any:
    """A⁻¹B with A constant: in delta networks it routes, as an attention pattern does."""
    return func(args[0].detach(), *args[1:], **kwargs) if "patterns" in mode.rules else func(*args, **kwargs)


def _marked_softmax(mode: Rewritten, func: Any, args: Any, kwargs: Any) -> Any:
    out = func(*args, **kwargs)
    _mark(out, _PATTERN)
    return out


def _marked(mode: Rewritten, func: Any, args: Any, kwargs: Any) -> Any:
    out = func(*args, **kwargs)
    if isinstance(out, Tensor) and any(_has(one, _PATTERN) for one in args):
        _mark(out, _PATTERN)
    return out


def _layer_norm(mode: Rewritten, func: Any, args: Any, kwargs: Any) -> Any:
    """(x − mean x) / d · gain + bias with the denominator d constant."""
    return _normalised(func, args, kwargs, ("input", "normalized_shape", "weight", "bias", "eps"), centred=True)


def _rms_norm(mode: Rewritten, func: Any, args: Any, kwargs: Any) -> Any:
    """x / d · gain with the denominator d constant."""
    return _normalised(func, args, kwargs, ("input", "normalized_shape", "weight", "eps"), centred=False)


def _normalised(func: Any, args: Any, kwargs: Any, names: tuple[str, ...], centred: bool) -> Any:
    given = dict(zip(names, args, strict=False)) | kwargs
    x = given["input"]
    if not _moves(x):
        return func(*args, **kwargs)
    still = x.detach()
    out = func(**given | {"input": still})
    axes = tuple(range(-len(given["normalized_shape"]), 0))
    eps = given.get("eps", 1e-5 if centred else None)
    wide = still.to(torch.promote_types(still.dtype, torch.float32))
    spread = (wide - wide.mean(axes, keepdim=True) if centred else wide).square().mean(axes, keepdim=True)
    scale = (spread + (torch.finfo(x.dtype).eps if eps is None else eps)).rsqrt().to(still)
    if given.get("weight") is not None:
        scale = scale * given["weight"].detach()
    moved = x - still
    change = (moved - moved.mean(axes, keepdim=True) if centred else moved) * scale
    return _same_value(out, change + _moved(given.get("bias")))


def _group_norm(mode: Rewritten, func: Any, args: Any, kwargs: Any) -> Any:
    """A group norm is a layer norm of each group of channels."""
    given = dict(zip(("input", "num_groups", "weight", "bias", "eps"), args, strict=False)) | kwargs
    x = given["input"]
    if not _moves(x):
        return func(*args, **kwargs)
    still = x.detach()
    out = func(**given | {"input": still})
    groups, channels = given["num_groups"], x.shape[1]

    def grouped(value: Tensor) -> Tensor:
        return value.reshape(len(value), groups, -1)

    spread = grouped(still).var(-1, unbiased=False, keepdim=True)
    moved = grouped(x - still)
    moved = ((moved - moved.mean(-1, keepdim=True)) * (spread + given.get("eps", 1e-5)).rsqrt()).reshape(x.shape)
    if given.get("weight") is not None:
        moved = moved * given["weight"].detach().reshape(1, channels, *[1] * (x.ndim - 2))
    return _same_value(out, moved)


def _moved(bias: Tensor | None) -> Tensor | float:
    """The derivative of a bias, where it is wanted."""
    return bias - bias.detach() if bias is not None and _moves(bias) else 0.0


_SDPA = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def _attention(mode: Rewritten, func: Any, args: Any, kwargs: Any) -> Any:
    """Attention in one function: its pattern is constant, or each product in it is shared out."""
    given = dict(zip(_SDPA, args, strict=False)) | kwargs
    of_value = 0.5 if "pattern_value" in mode.rules else 1.0
    of_pattern = 0.0 if "patterns" in mode.rules else of_value * (0.5 if "query_key" in mode.rules else 1.0)
    for name, part in (("query", of_pattern), ("key", of_pattern), ("value", of_value)):
        given[name] = _damped(given[name], part)
    return func(**given)


def _damped(value: Tensor, part: float) -> Tensor:
    """A value with a part of its derivative."""
    if part == 1 or not _moves(value):
        return value
    return value.detach() if part == 0 else _same_value(value, part * (value - value.detach()))


def _shared_out(product: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """½(a·b̄ + ā·b), which has half of the derivative of a·b."""
    if product.grad_fn is not None:
        _mark_shared(product.grad_fn, {one.grad_fn for one in factors})
    return _damped(product, 0.5)


def _same_value(value: Tensor, change: Tensor) -> Tensor:
    """A value with the derivative of a change, which is zero."""
    return value.detach() + change


def _mark_shared(node: Any, ends: Set[Any]) -> None:
    """Write on the nodes that make a product of its factors that it is shared out."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in ends:
            node.metadata[SHARED] = True
            waiting += [earlier for earlier, _ in node.next_functions]
