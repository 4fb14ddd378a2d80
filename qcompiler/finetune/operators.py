"""ONNX operators in torch, as simplified convolutional and fully connected networks have them.

Shapes are those of one sample in the ONNX file; `network` maps whole batches over them.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir
import torch  # pyright: ignore[reportMissingImports]
from torch.nn import functional as F  # noqa: N812  # pyright: ignore[reportMissingImports]

from qcompiler.graph import const_of, input_of, integer, ints, real, shape_of, string

Tensors = Sequence[torch.Tensor | None]
Operator = Callable[[ir.Node, Tensors], torch.Tensor | tuple[torch.Tensor, ...]]


def refusal(node: ir.Node) -> str | None:
    """Why this operator cannot be trained through, or None if it can."""
    if node.domain not in ("", "ai.onnx") or node.op_type not in OPERATORS:
        return "it is none of the operators that finetuning knows"
    for index in _CONSTANT_INPUTS.get(node.op_type, ()):
        value = input_of(node, index)
        if value is not None and const_of(value) is None:
            return f"its input {index} is computed at run time"
    if node.op_type in ("MaxPool", "AveragePool"):
        if len(node.outputs) > 1 and node.outputs[1].uses():
            return "its indices are used"
        if integer(node, "ceil_mode", 0):
            return "it rounds its size up"
    if node.op_type == "AveragePool" and any(step != 1 for step in ints(node, "dilations", ())):
        return "it is dilated"
    if node.op_type in _WINDOWS and string(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return "its padding is automatic"
    if node.op_type in _WINDOWS and not 3 <= len(shape_of(node.outputs[0])) <= 5:
        return "it has more than three spatial axes"
    if node.op_type == "Pad" and string(node, "mode", "constant") != "constant":
        return "it pads with other than a constant"
    if node.op_type == "Slice" and any(step < 1 for step in _numbers(node, 4, (1,))):
        return "it reverses an axis"
    return None


_WINDOWS = ("Conv", "ConvTranspose", "MaxPool", "AveragePool")
_CONSTANT_INPUTS: Mapping[str, Sequence[int]] = {
    "Clip": (1, 2), "Pad": (1, 2, 3), "Slice": (1, 2, 3, 4), "ReduceMean": (1,), "ReduceSum": (1,), "Split": (1,),
}  # fmt: skip


def _numbers(node: ir.Node, index: int, default: Sequence[int] = ()) -> tuple[int, ...]:
    """A constant input of integers."""
    array = const_of(input_of(node, index))
    return tuple(default) if array is None else tuple(int(number) for number in array.reshape(-1))


def _given(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    return tensor


# --- windows ------------------------------------------------------------------------------------------------


def _spatial(node: ir.Node) -> int:
    return len(shape_of(node.outputs[0])) - 2


def _pads(node: ir.Node) -> list[int]:
    """In torch's order: the last axis first, its beginning and end side by side."""
    rank = _spatial(node)
    pads = ints(node, "pads", (0,) * (2 * rank))
    return [pads[axis + end * rank] for axis in reversed(range(rank)) for end in (0, 1)]


def _conv(node: ir.Node, inputs: Tensors) -> torch.Tensor:
    x, weights = _given(inputs[0]), _given(inputs[1])
    rank = _spatial(node)
    x = F.pad(x, _pads(node)) if any(_pads(node)) else x
    function = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    return function(
        x,
        weights,
        inputs[2] if len(inputs) > 2 else None,
        stride=ints(node, "strides", (1,) * rank),
        dilation=ints(node, "dilations", (1,) * rank),
        groups=integer(node, "group", 1),
    )


def _conv_transpose(node: ir.Node, inputs: Tensors) -> torch.Tensor:
    x, weights = _given(inputs[0]), _given(inputs[1])
    rank = _spatial(node)
    function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
    whole = function(
        x,
        weights,
        inputs[2] if len(inputs) > 2 else None,
        stride=ints(node, "strides", (1,) * rank),
        output_padding=ints(node, "output_padding", (0,) * rank),
        groups=integer(node, "group", 1),
        dilation=ints(node, "dilations", (1,) * rank),
    )
    return F.pad(whole, [-pad for pad in _pads(node)])


def _max_pool(node: ir.Node, inputs: Tensors) -> torch.Tensor:
    rank = _spatial(node)
    x = F.pad(_given(inputs[0]), _pads(node), value=-torch.inf)
    function = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[rank - 1]
    kernel, strides = ints(node, "kernel_shape"), ints(node, "strides", (1,) * rank)
    return function(x, kernel, strides, dilation=ints(node, "dilations", (1,) * rank))


def _average_pool(node: ir.Node, inputs: Tensors) -> torch.Tensor:
    rank, x = _spatial(node), _given(inputs[0])
    function = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[rank - 1]
    kernel, strides = ints(node, "kernel_shape"), ints(node, "strides", (1,) * rank)
    means = function(F.pad(x, _pads(node)), kernel, strides)
    if integer(node, "count_include_pad", 0) or not any(_pads(node)):
        return means
    return means / function(F.pad(torch.ones_like(x), _pads(node)), kernel, strides)


def _global_pool(node: ir.Node, inputs: Tensors) -> torch.Tensor:
    axes = tuple(range(2, len(shape_of(node.outputs[0]))))
    x = _given(inputs[0])
    return x.mean(axes, keepdim=True) if node.op_type == "GlobalAveragePool" else x.amax(axes, keepdim=True)


# --- products and arithmetic --------------------------------------------------------------------------------


def _gemm(node: ir.Node, inputs: Tensors) -> torch.Tensor:
    a, b = _given(inputs[0]), _given(inputs[1])
    a = a.mT if integer(node, "transA", 0) else a
    b = b.mT if integer(node, "transB", 0) else b
    product = real(node, "alpha", 1.0) * (a @ b)
    bias = inputs[2] if len(inputs) > 2 else None
    return product if bias is None else product + real(node, "beta", 1.0) * bias


def _clip(node: ir.Node, inputs: Tensors) -> torch.Tensor:
    low, high = (const_of(input_of(node, index)) for index in (1, 2))
    return _given(inputs[0]).clamp(
        None if low is None else float(low.reshape(())), None if high is None else float(high.reshape(()))
    )


def _gelu(node: ir.Node, inputs: Tensors) -> torch.Tensor:
    return F.gelu(_given(inputs[0]), approximate=string(node, "approximate", "none"))


def _hard_sigmoid(node: ir.Node, inputs: Tensors) -> torch.Tensor:
    return (_given(inputs[0]) * real(node, "alpha", 0.2) + real(node, "beta", 0.5)).clamp(0, 1)


def _leaky_relu(node: ir.Node, inputs: Tensors) -> torch.Tensor:
    return F.leaky_relu(_given(inputs[0]), real(node, "alpha", 0.01))


def _elu(node: ir.Node, inputs: Tensors) -> torch.Tensor:
    return F.elu(_given(inputs[0]), real(node, "alpha", 1.0))


def _softmax(node: ir.Node, inputs: Tensors) -> torch.Tensor:
    return _given(inputs[0]).softmax(integer(node, "axis", -1))


def _reduce(node: ir.Node, inputs: Tensors) -> torch.Tensor:
    x = _given(inputs[0])
    axes = _numbers(node, 1) or ints(node, "axes", ()) or tuple(range(x.dim()))
    keep = bool(integer(node, "keepdims", 1))
    return x.mean(axes, keepdim=keep) if node.op_type == "ReduceMean" else x.sum(axes, keepdim=keep)


def _unary(function: Callable[[torch.Tensor], torch.Tensor]) -> Operator:
    return lambda _, inputs: function(_given(inputs[0]))


def _binary(function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Operator:
    return lambda _, inputs: function(_given(inputs[0]), _given(inputs[1]))


# --- data movement ------------------------------------------------------------------------------------------


def _reshape(node: ir.Node, inputs: Tensors) -> torch.Tensor:
    return _given(inputs[0]).reshape(shape_of(node.outputs[0]))


def _expand(node: ir.Node, inputs: Tensors) -> torch.Tensor:
    return _given(inputs[0]).expand(shape_of(node.outputs[0]))


def _transpose(node: ir.Node, inputs: Tensors) -> torch.Tensor:
    x = _given(inputs[0])
    return x.permute(ints(node, "perm", tuple(reversed(range(x.dim())))))


def _concat(node: ir.Node, inputs: Tensors) -> torch.Tensor:
    return torch.cat([_given(part) for part in inputs], integer(node, "axis"))


def _split(node: ir.Node, inputs: Tensors) -> tuple[torch.Tensor, ...]:
    axis = integer(node, "axis", 0)
    return torch.split(_given(inputs[0]), [shape_of(output)[axis] for output in node.outputs], axis)


def _pad(node: ir.Node, inputs: Tensors) -> torch.Tensor:
    x, pads = _given(inputs[0]), _numbers(node, 1)
    axes = [axis % x.dim() for axis in _numbers(node, 3, range(x.dim()))]
    by_axis = {axis: (pads[place], pads[place + len(axes)]) for place, axis in enumerate(axes)}
    fill = const_of(input_of(node, 2))
    flat = [pad for axis in reversed(range(x.dim())) for pad in by_axis.get(axis, (0, 0))]
    return F.pad(x, flat, value=0.0 if fill is None or not fill.size else float(fill.reshape(())))


def _slice(node: ir.Node, inputs: Tensors) -> torch.Tensor:
    x, starts, ends = _given(inputs[0]), _numbers(node, 1), _numbers(node, 2)
    axes, steps = _numbers(node, 3, range(len(starts))), _numbers(node, 4, (1,) * len(starts))
    index = [slice(None)] * x.dim()
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        index[axis] = slice(start, end, step)
    return x[tuple(index)]


OPERATORS: Mapping[str, Operator] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "MatMul": _binary(torch.matmul),
    "Add": _binary(torch.add),
    "Sub": _binary(torch.sub),
    "Mul": _binary(torch.mul),
    "Div": _binary(torch.div),
    "Pow": _binary(torch.pow),
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": _global_pool,
    "GlobalMaxPool": _global_pool,
    "ReduceMean": _reduce,
    "ReduceSum": _reduce,
    "Relu": _unary(torch.relu),
    "Clip": _clip,
    "LeakyRelu": _leaky_relu,
    "Elu": _elu,
    "Sigmoid": _unary(torch.sigmoid),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _unary(F.hardswish),
    "Mish": _unary(F.mish),
    "Gelu": _gelu,
    "Softplus": _unary(F.softplus),
    "Softsign": _unary(F.softsign),
    "Tanh": _unary(torch.tanh),
    "Exp": _unary(torch.exp),
    "Log": _unary(torch.log),
    "Sqrt": _unary(torch.sqrt),
    "Erf": _unary(torch.erf),
    "Abs": _unary(torch.abs),
    "Neg": _unary(torch.neg),
    "Softmax": _softmax,
    "Reshape": _reshape,
    "Flatten": _reshape,
    "Squeeze": _reshape,
    "Unsqueeze": _reshape,
    "Expand": _expand,
    "Transpose": _transpose,
    "Concat": _concat,
    "Split": _split,
    "Pad": _pad,
    "Slice": _slice,
    "Identity": _unary(lambda x: x),
}


def tensor_of(array: np.ndarray) -> torch.Tensor:
    """A copy in torch; constants of a model are not to be written to."""
    return torch.from_numpy(np.array(array, order="C"))
