"""Whether linear rules have made a graph linear: each of its operations is linear, or one that they know.

A rule that silently does nothing on some architecture would give plausible numbers that are not what they say.
"""

from typing import Any

from torch import Tensor

from tl_scopes.models.gradient_check import made_by
from tl_scopes.models.linear_rules import RULES, LinearRules, listed
from tl_scopes.models.rewritten import SHARED

_LINEAR = frozenset(
    "AccumulateGrad Add Sub Neg Alias Clone Copy Copys ToCopy View ReshapeAlias Reshape UnsafeView AsStrided Transpose "
    "T Permute Expand Squeeze Unsqueeze Select Slice Split SplitWithSizes Chunk Unbind Narrow Cat Stack Index "
    "IndexSelect IndexPut IndexAdd IndexCopy IndexFill IndexPutImpl Gather Scatter ScatterAdd ScatterReduce Embedding "
    "Where MaskedFill MaskedFillScalar MaskedScatter MaskedSelect Sum Mean Cumsum Flip Roll Repeat RepeatInterleave "
    "Movedim Diagonal Triu Tril ConstantPadNd Topk Sort Max Amax Unfold UnfoldCopy AsStridedScatter SelectScatter "
    "SliceScatter Pad Identity CopySlices Rsub Dropout NativeDropout FusedDropout Swapaxes "
    "ViewAsReal ViewAsComplex RealView Zero Fill Detach MulScalar Lift Tile Diff Contiguous "
    "UnsafeSplit NanToNum Maximum Minimum Complex _ScaledHookGradient".split()
)
"""Nodes of a graph that are linear in what leads into them."""

_PRODUCTS = frozenset("Mul Mm Bmm Addmm Baddbmm Addbmm Mv Addmv Dot Convolution Addcmul GroupedMm".split())
"""Nodes that are linear in one factor while the others are constant."""


_NORMS = "NativeLayerNorm NativeGroupNorm FusedRmsNorm RmsNorm Rsqrt Sqrt Reciprocal LinalgVectorNorm Norm Std Var"
_ACTIVATIONS = (
    "Silu Gelu Relu LeakyRelu Elu Mish Hardswish Hardtanh Tanh Sigmoid Erf Exp Expm1 Softplus Pow Clamp ClampMin "
    "ClampMax Abs Log Log1P Cos Sin LogSigmoid Hardsigmoid Softsign"
)
_OWN = (
    dict.fromkeys(_NORMS.split(), "norms")
    | dict.fromkeys(_ACTIVATIONS.split(), "activations")
    | dict.fromkeys(("Softmax", "SafeSoftmax", "LogSoftmax"), "patterns")
)
"""The rule that an operation falls under; without that rule it keeps its own derivative."""


def uncovered(root: Tensor, rules: LinearRules) -> Any:
    """The first node behind a value, from its end, that is not linear though the rules should have made it so; None
    where there is none."""
    waiting: list[Any] = [root.grad_fn]
    seen = {root.grad_fn}
    while waiting:
        node = waiting.pop()
        if not _is_linear(node, rules):
            return node
        new = {earlier for earlier, _ in node.next_functions if earlier is not None} - seen
        seen |= new
        waiting += new
    return None


def not_covered(rules: LinearRules, node: Any) -> ValueError:
    """The error to raise for a node that the rules should have made linear."""
    module = made_by(node)
    return ValueError(
        f"rules={str(rules)!r} do not cover this model: they know no rule for {_operation(node)!r}"
        f"{f', in {module}' if module else ''}, so that what they leave would not be what they say. Leave rules out, "
        f"for the model's own derivative{f'; or choose among {listed(RULES)}' if len(rules.names) > 1 else ''}."
    )


def _operation(node: Any) -> str:
    return str(node.name().rsplit("::", 1)[-1].split("Backward")[0])


def _is_linear(node: Any, rules: LinearRules) -> bool:
    name = _operation(node)
    leads = [earlier is not None for earlier, _ in node.next_functions]
    if name in _LINEAR:
        return True
    if name == "Div":
        return len(leads) < 2 or not leads[1] or "norms" not in rules.names
    if name in _PRODUCTS:
        factors = leads[1:] if name in ("Addmm", "Baddbmm", "Addbmm", "Addmv", "Addcmul") else leads
        if sum(factors) < 2 or SHARED in node.metadata:
            return True
        return "gates" not in rules.names if name == "Mul" else not rules.conserve
    if name == "LinalgSolveTriangular":
        return not leads[0] or "patterns" not in rules.names
    if name.startswith("ScaledDotProduct"):
        return "patterns" not in rules.names or not any(leads[:2])
    own = _OWN.get(name)
    return own is not None and own not in rules.names
