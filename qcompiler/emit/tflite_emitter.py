"""What writing TFLite shares: the file and the values in it, clamps, padding, and checks of rescale factors."""

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
from ai_edge_litert import schema_py_generated as schema

from qcompiler.emit.tflite_model import Operation, Tensor, TfliteModel
from qcompiler.emit.windows import Padded
from qcompiler.errors import QCompilerError
from qcompiler.graph import (
    Shape,
    const_of,
    data_input,
    dtype_of,
    input_of,
    shape_of,
    value_name,
)
from qcompiler.integer.formats import TensorFormat, formats_of
from qcompiler.partition import Region
from qcompiler.quant import arithmetic

OP = schema.BuiltinOperator

OPTIONS = schema.BuiltinOptions

ACTIVATION = schema.ActivationFunctionType

_VERSIONS: dict[int, int] = {
    OP.ADD: 2,
    OP.BATCH_MATMUL: 2,
    OP.CAST: 1,
    OP.CONCATENATION: 2,
    OP.CONV_2D: 3,
    OP.DEPTHWISE_CONV_2D: 3,
    OP.GATHER: 2,
    OP.LOGISTIC: 2,
    OP.MAX_POOL_2D: 2,
    OP.MAXIMUM: 2,
    OP.MINIMUM: 2,
    OP.MUL: 2,
    OP.PAD: 2,
    OP.PADV2: 2,
    OP.QUANTIZE: 2,
    OP.RESHAPE: 1,
    OP.RESIZE_NEAREST_NEIGHBOR: 3,
    OP.SOFTMAX: 2,
    OP.STRIDED_SLICE: 2,
    OP.SUB: 2,
    OP.TRANSPOSE: 2,
    OP.TRANSPOSE_CONV: 3,
}
_WIDE_VERSIONS: dict[int, int] = {
    OP.ADD: 3,
    OP.CONCATENATION: 3,
    OP.CONV_2D: 4,
    OP.GATHER: 4,
    OP.DEPTHWISE_CONV_2D: 5,
    OP.MAX_POOL_2D: 3,
    OP.MAXIMUM: 4,
    OP.MINIMUM: 4,
    OP.MUL: 4,
    OP.PAD: 3,
    OP.PADV2: 3,
    OP.RESIZE_NEAREST_NEIGHBOR: 4,
    OP.SOFTMAX: 3,
    OP.SUB: 5,
    OP.TRANSPOSE: 5,
}
"""Where 16-bit tensors came in later (tflite/tools/versioning/op_version.cc)."""


def refusal(node: ir.Node, reason: str) -> QCompilerError:
    """Why a node cannot be written as TFLite."""
    return QCompilerError(
        f"{node.name!r} ({node.op_type}) cannot be written as TFLite with the same arithmetic: {reason}"
    )


class Emitter:
    """The file being made, and which of its tensors holds each value of the region."""

    def __init__(self, region: Region) -> None:
        self.model = TfliteModel(f"qcompiler region {region.name}")
        self._formats = formats_of(region.nodes)
        self._tensors: dict[ir.Value, Tensor] = {}
        for value in region.inputs:
            self.result(value)

    def of(self, value: ir.Value) -> Tensor:
        """The tensor that holds a value."""
        constant = const_of(value)
        if value not in self._tensors and constant is not None:
            self._tensors[value] = self.model.constant(value_name(value), constant, self._formats.get(value))
        return self._tensors[value]

    def format(self, value: ir.Value, node: ir.Node) -> TensorFormat:
        known = self._formats.get(value)
        if known is None:
            raise refusal(node, f"the scale of {value_name(value)!r} is not known")
        return known

    def result(self, value: ir.Value) -> Tensor:
        """A new tensor for a value that an operator is about to make."""
        made = self.model.tensor(value_name(value), shape_of(value), str(dtype_of(value)), self._formats.get(value))
        self._tensors[value] = made
        return made

    def alias(self, value: ir.Value, tensor: Tensor) -> None:
        self._tensors[value] = tensor

    def temporary(self, like: Tensor, shape: Shape, hint: str) -> Tensor:
        """A tensor between two operators, of the type and format of another."""
        return self.model.tensor(hint, shape, like.dtype, like.format)

    def numbers(self, values: Sequence[int] | np.ndarray, hint: str) -> Tensor:
        """Shapes, permutations and the like."""
        return self.model.constant(hint, np.asarray(values, np.int32))

    def add(
        self,
        code: int,
        inputs: Sequence[Tensor],
        output: Tensor,
        options_type: int = OPTIONS.NONE,
        options: object = None,
    ) -> None:
        wide = any(tensor.dtype == "int16" for tensor in (*inputs, output))
        version = _WIDE_VERSIONS.get(code, _VERSIONS[code]) if wide else _VERSIONS[code]
        self.model.operator(Operation(code, version), inputs, [output], options_type, options)

    def reshaped(self, tensor: Tensor, shape: Shape, hint: str) -> Tensor:
        if tensor.shape == shape:
            return tensor
        output = self.temporary(tensor, shape, hint)
        self.reshape(tensor, output)
        return output

    def reshape(self, tensor: Tensor, output: Tensor) -> None:
        options = schema.ReshapeOptionsT(newShape=list(output.shape))
        dims = self.numbers(output.shape, "shape")
        self.add(OP.RESHAPE, [tensor, dims], output, OPTIONS.ReshapeOptions, options)

    def clamped(
        self, node: ir.Node, clamp: tuple[int, int], make: Callable[[Tensor, int], None], shape: Shape | None = None
    ) -> None:
        """Let `make` write the node's result, given the tensor and the activation that gives the clamp.

        A clamp that is no activation of TFLite follows as MAXIMUM and MINIMUM. `shape` is that of the operator's own
        output where the result is a reshape of it.
        """
        output = self.result(node.outputs[0])
        assert output.format is not None, f"{node.name} has no output format"
        limits = np.iinfo(output.dtype)
        activation = _activation(clamp, output.format, (int(limits.min), int(limits.max)))
        fits = shape is None or shape == output.shape
        if activation is not None and fits:
            make(output, activation)
            return
        made = self.temporary(output, shape or output.shape, f"{node.name}.unclamped")
        make(made, ACTIVATION.NONE if activation is None else activation)
        if activation is not None:
            self.reshape(made, output)
            return
        bounds = [
            (code, bound)
            for code, bound, limit in (
                (OP.MAXIMUM, clamp[0], limits.min),
                (OP.MINIMUM, clamp[1], limits.max),
            )
            if bound != limit
        ]
        made = self.reshaped(made, output.shape, f"{node.name}.reshaped")
        for position, (code, bound) in enumerate(bounds):
            other = self.model.constant(f"{node.name}.bound", np.array([bound], output.dtype), output.format)
            last = position == len(bounds) - 1
            target = output if last else self.temporary(output, output.shape, f"{node.name}.bounded")
            self.add(code, [made, other], target, OPTIONS.MaximumMinimumOptions, schema.MaximumMinimumOptionsT())
            made = target

    def pad(self, tensor: Tensor, pads: np.ndarray, value: int, output: Tensor) -> None:
        """`pads`: [rank, 2], before and after each axis."""
        assert tensor.format is not None
        table = self.numbers(pads, "paddings")
        if value == tensor.format.zero_point:
            self.add(OP.PAD, [tensor, table], output, OPTIONS.PadOptions, schema.PadOptionsT())
            return
        fill = self.model.constant("fill", np.array([value], tensor.dtype), tensor.format)
        self.add(OP.PADV2, [tensor, table, fill], output, OPTIONS.PadV2Options, schema.PadV2OptionsT())

    def padded(self, tensor: Tensor, padding: Padded, value: int, hint: str) -> Tensor:
        """An NHWC map with the explicit part of the padding."""
        if not padding.explicit:
            return tensor
        n, h, w, c = tensor.shape
        shape = (n, h + padding.before[0] + padding.after[0], w + padding.before[1] + padding.after[1], c)
        output = self.temporary(tensor, shape, f"{hint}.padded")
        spatial = list(zip(padding.before, padding.after, strict=True))
        self.pad(tensor, np.array([(0, 0), *spatial, (0, 0)]), value, output)
        return output


def _activation(clamp: tuple[int, int], fmt: TensorFormat, limits: tuple[int, int]) -> int | None:
    """The fused activation with exactly these bounds (`CalculateActivationRangeQuantized`), or None."""

    def code(real: float) -> int:
        # TFLite divides in float32 and rounds halves away from zero.
        ratio = float(np.float32(real) / np.float32(fmt.scale))
        return fmt.zero_point + int(np.copysign(np.floor(abs(ratio) + 0.5), ratio))

    low, high = limits
    bounds = {
        ACTIVATION.NONE: limits,
        ACTIVATION.RELU: (max(low, code(0.0)), high),
        ACTIVATION.RELU6: (max(low, code(0.0)), min(high, code(6.0))),
        ACTIVATION.RELU_N1_TO_1: (max(low, code(-1.0)), min(high, code(1.0))),
    }
    return next((activation for activation, found in bounds.items() if found == clamp), None)


def padding_code(padding: Padded) -> int:
    return schema.Padding.SAME if padding.mode == "same" else schema.Padding.VALID


def check_factors(node: ir.Node, factors: np.ndarray, multiplier: np.ndarray, shift: np.ndarray) -> None:
    """Whether TFLite computes the node's own multipliers from the scales that are written."""
    wanted = arithmetic.multipliers(factors, "tflite")
    if not all(np.array_equal(ours, theirs) for ours, theirs in zip((multiplier, shift), wanted, strict=True)):
        raise refusal(node, "its rescale factor does not follow from its tensors' scales")


def factors_of(node: ir.Node, first: int) -> tuple[np.ndarray, np.ndarray]:
    multiplier, shift = const_of(input_of(node, first)), const_of(input_of(node, first + 1))
    assert multiplier is not None and shift is not None
    return multiplier, shift


def require_tflite(node: ir.Node, variant: str) -> None:
    if variant != "tflite":
        raise refusal(node, f"the target rescales as {variant!r} does, TFLite in its own way")


def require_one_width(node: ir.Node) -> None:
    """Of the feature maps an operator reads and makes."""
    before, after = dtype_of(data_input(node)), dtype_of(node.outputs[0])
    if before.itemsize != after.itemsize:
        raise refusal(node, f"TFLite's operator makes no {after} of {before}")


def bias_type(x: ir.Value) -> type[np.signedinteger]:
    """What TFLite wants as a bias: its type is that of the sums."""
    return np.int64 if dtype_of(x) == np.int16 else np.int32


def dense(
    emitter: Emitter,
    inputs: Sequence[Tensor],
    output: Tensor,
    padding: Padded,
    dilations: tuple[int, int],
    activation: int,
) -> None:
    options = schema.Conv2DOptionsT(
        padding=padding_code(padding),
        strideH=padding.strides[0],
        strideW=padding.strides[1],
        dilationHFactor=dilations[0],
        dilationWFactor=dilations[1],
        fusedActivationFunction=activation,
    )
    emitter.add(OP.CONV_2D, inputs, output, OPTIONS.Conv2DOptions, options)


def depthwise(
    emitter: Emitter,
    inputs: Sequence[Tensor],
    output: Tensor,
    padding: Padded,
    dilations: tuple[int, int],
    activation: int,
) -> None:
    options = schema.DepthwiseConv2DOptionsT(
        padding=padding_code(padding),
        strideH=padding.strides[0],
        strideW=padding.strides[1],
        depthMultiplier=output.shape[3] // inputs[0].shape[3],
        dilationHFactor=dilations[0],
        dilationWFactor=dilations[1],
        fusedActivationFunction=activation,
    )
    emitter.add(OP.DEPTHWISE_CONV_2D, inputs, output, OPTIONS.DepthwiseConv2DOptions, options)
