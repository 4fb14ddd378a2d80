"""Fold multiplication and addition of constants per channel into the convolution or product beside them."""

import numpy as np
import onnx_ir as ir

from qcompiler.graph import (
    Shape,
    const_of,
    data_input,
    dtype_of,
    input_of,
    integer,
    ints,
    only_user,
    producer,
    real,
    shape_of,
)
from qcompiler.passes.normalize_matmul import bias_vector
from qcompiler.passes.rewriting import (
    Rewrite,
    constant_operand,
    next_in_chain,
    no_auto_pad,
    until_settled,
    weight_dequantize,
)

LINEAR = ("Conv", "ConvTranspose", "Gemm")
_AFFINE = ("Mul", "Add", "Sub", "Div")


class FoldAffine(ir.passes.InPlacePass):
    """Conv, ConvTranspose or Gemm, then Mul/Add/Sub/Div by a constant per channel => the former alone.

    Also a Mul, Div, Add or Sub before a Conv or Gemm; an addition only where no padding brings in zeros it does not
    reach. Weights must be initializers; with a quantized weight only an Add of DequantizeLinear(int32) after it folds,
    as its bias. The constants are multiplied in float64.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        return until_settled(
            model,
            (*LINEAR, *_AFFINE),
            lambda node: _absorb_bias(node) or _fold_before(node) if node.op_type in LINEAR else _fold_after(node),
        )


def scale_and_shift(node: ir.Node, channel_axis: int) -> tuple[np.ndarray, np.ndarray] | None:
    """A node as y = x * scale + shift with one number per channel (float64 [C]), or None if it is not that."""
    operands = constant_operand(node)
    if operands is None:
        return None
    value, constant, index = operands
    shape = shape_of(value)
    vector = _per_channel(constant, shape, channel_axis)
    if vector is None or shape_of(node.outputs[0]) != shape:
        return None
    one, zero = np.ones_like(vector), np.zeros_like(vector)
    match node.op_type:
        case "Mul":
            return vector, zero
        case "Add":
            return one, vector
        case "Sub":
            return (-one, vector) if index == 0 else (one, -vector)
        case "Div" if index == 1 and bool(vector.all()):
            return one / vector, zero
        case _:
            return None


def _per_channel(constant: np.ndarray, shape: Shape, axis: int) -> np.ndarray | None:
    """A constant broadcast to `shape` that varies along `axis` only, as float64 [shape[axis]]."""
    if constant.ndim > len(shape):
        return None
    padded = constant.reshape((1,) * (len(shape) - constant.ndim) + constant.shape)
    if any(dim != 1 for position, dim in enumerate(padded.shape) if position != axis):
        return None
    if padded.shape[axis] not in (1, shape[axis]):
        return None  # it widens x
    return np.broadcast_to(padded.astype(np.float64).ravel(), (shape[axis],))


def _is_plain_gemm(node: ir.Node) -> bool:
    return (
        integer(node, "transA", 0) == 0
        and integer(node, "transB", 0) == 1
        and real(node, "alpha", 1.0) == real(node, "beta", 1.0) == 1
    )


def _constants(node: ir.Node) -> tuple[np.ndarray, np.ndarray] | None:
    """(weight, bias [out channels]) of a linear node, both float64, or None if they are not constants."""
    weight, bias_value = const_of(data_input(node, 1)), input_of(node, 2)
    channels = shape_of(node.outputs[0])[1]
    bias = const_of(bias_value) if bias_value is not None else np.zeros(channels)
    if weight is None or bias is None or (node.op_type == "Gemm" and not _is_plain_gemm(node)):
        return None
    if bias.shape != (channels,):
        return None
    return weight.astype(np.float64), bias.astype(np.float64)


def _scale_outputs(node: ir.Node, weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    if node.op_type != "ConvTranspose":
        return weight * scale.reshape(-1, *(1,) * (weight.ndim - 1))
    group = integer(node, "group", 1)
    # [in, out / group, …]: the input channels of one group share its output channels.
    grouped = weight.reshape(group, weight.shape[0] // group, *weight.shape[1:])
    return (grouped * scale.reshape(group, 1, -1, *(1,) * (weight.ndim - 2))).reshape(weight.shape)


def fold_into_linear(linear: ir.Node, after: ir.Node, scale: np.ndarray, shift: np.ndarray) -> bool:
    """Let `linear` compute what `after`, y = x * scale + shift per channel, did; False if it cannot."""
    constants = _constants(linear)
    if constants is None:
        return False
    weight, bias = constants
    return _replace(after, linear, data_input(linear), _scale_outputs(linear, weight, scale), bias * scale + shift)


def linear_behind(value: ir.Value) -> tuple[ir.Node, int] | None:
    """The linear node that alone makes `value`, and the axis its channels have there, or None.

    A Reshape that leaves the channels an axis of their own may stand between: [N, C, 1, W] to [N, C, W] behind what was
    a 1-D convolution, [rows, N] to [batch, time, N] behind a Gemm.
    """
    reshape = producer(value, "Reshape")
    source = data_input(reshape) if reshape is not None else value
    linear = producer(source, *LINEAR)
    if linear is None or only_user(source) is None or only_user(value) is None:
        return None
    before, behind = shape_of(source), shape_of(value)
    if linear.op_type == "Gemm":
        return (linear, len(behind) - 1) if before[-1] == behind[-1] else None
    return (linear, 1) if before[:2] == behind[:2] else None


def _replace(old: ir.Node, linear: ir.Node, x: ir.Value, weight: np.ndarray, bias: np.ndarray) -> bool:
    dtype = dtype_of(x)
    rewrite = Rewrite(old)
    weight_value = rewrite.constant(weight.astype(dtype), f"{data_input(linear, 1).name}_folded")
    bias_value = rewrite.constant(bias.astype(dtype), f"{linear.name}_bias")
    attributes = {name: attribute.value for name, attribute in linear.attributes.items()}
    folded = rewrite.node(linear.op_type, [x, weight_value, bias_value], attributes, layer=linear)
    return rewrite.replace(rewrite.reshape(folded, shape_of(old.outputs[0])))


def _fold_after(node: ir.Node) -> bool:
    operands = constant_operand(node)
    behind = linear_behind(operands[0]) if operands is not None else None
    if behind is None:
        return False
    linear, axis = behind
    affine = scale_and_shift(node, axis)
    return affine is not None and fold_into_linear(linear, node, *affine)


def _absorb_bias(linear: ir.Node) -> bool:
    """A quantized Conv without bias, Add(DequantizeLinear of int32) => with bias."""
    add = next_in_chain(linear.outputs[0], "Add")
    shape = shape_of(linear.outputs[0])
    if add is None or linear.op_type == "Gemm" or input_of(linear, 2) is not None or shape_of(add.outputs[0]) != shape:
        return False
    other = data_input(add, 1 if data_input(add) is linear.outputs[0] else 0)
    dequantize = weight_dequantize(other)
    # Per channel here means along the axis behind the batch.
    if dequantize is None or _per_channel(np.empty(shape_of(other)), shape, 1) is None:
        return False
    array = const_of(data_input(dequantize))
    if array is None or shape_of(data_input(dequantize, 1)) not in ((), (1,)):
        return False
    rewrite = Rewrite(add)
    vector = rewrite.constant(array.reshape(-1), f"{linear.name}_bias")
    bias = bias_vector(rewrite, rewrite.node("DequantizeLinear", [vector, *dequantize.inputs[1:]]), shape[1])
    if bias is None:
        return rewrite.abandon()
    attributes = {name: attribute.value for name, attribute in linear.attributes.items()}
    return rewrite.replace(
        rewrite.node(linear.op_type, [data_input(linear), data_input(linear, 1), bias], attributes, layer=linear)
    )


def _fold_before(linear: ir.Node) -> bool:
    before = producer(data_input(linear), *_AFFINE)
    constants = _constants(linear)
    if before is None or constants is None or linear.op_type == "ConvTranspose":
        return False
    if next_in_chain(before.outputs[0], linear.op_type) is not linear:
        return False
    affine = scale_and_shift(before, 1)
    operands = constant_operand(before)
    if affine is None or operands is None:
        return False
    (scale, shift), (weight, bias) = affine, constants
    padded = linear.op_type == "Conv" and (
        any(ints(linear, "pads", (0,) * 2 * (weight.ndim - 2))) or not no_auto_pad(linear)
    )
    if padded and shift.any():
        return False
    group = integer(linear, "group", 1)
    # Row o of [out, in / group, …] reads the input channels of its group.
    rows = (group, weight.shape[0] // group, weight.shape[1], *weight.shape[2:])
    per_input = (group, 1, weight.shape[1], *(1,) * (weight.ndim - 2))
    grouped = weight.reshape(rows)
    extra = (grouped * shift.reshape(per_input)).reshape(weight.shape[0], -1).sum(axis=1)
    scaled = (grouped * scale.reshape(per_input)).reshape(weight.shape)
    return _replace(linear, linear, operands[0], scaled, bias + extra)
