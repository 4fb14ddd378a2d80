"""What writing TOSA shares: the text with the region's values in it, signed zero points, and rescale factors."""

import numpy as np
import onnx_ir as ir

from qcompiler.emit.tosa_text import Scale, Tensor, TosaText, power_of_two
from qcompiler.errors import QCompilerError
from qcompiler.graph import (
    const_of,
    dtype_of,
    input_of,
    shape_of,
)
from qcompiler.integer import ops
from qcompiler.partition import Region

_SHORTEST_SHIFT, _LONGEST_SHIFT = 2, 62
"""Of a RESCALE."""


def refusal(node: ir.Node, reason: str) -> QCompilerError:
    """Why a node cannot be written as TOSA."""
    return QCompilerError(
        f"{node.name!r} ({node.op_type}) cannot be written as TOSA with the same arithmetic: {reason}"
    )


def offset_of(value: ir.Value) -> int:
    """What is subtracted from a value's integers to make them int8."""
    return 128 if dtype_of(value) == np.uint8 else 0


class Emitter:
    """The text being written, and which tensor holds each value of the region."""

    def __init__(self, region: Region) -> None:
        self.text = TosaText()
        self._tensors: dict[ir.Value, Tensor] = {}
        self._arguments: list[Tensor] = []
        for index, value in enumerate(region.inputs):
            given = self.text.argument(index, shape_of(value), "int8")
            self._arguments.append(given)
            self._tensors[value] = given
            if offset_of(value):
                signed = self.text.rescale(given, power_of_two(0), "int8", y_zero_point=-128, from_unsigned=True)
                self._tensors[value] = signed

    def module(self, region: Region) -> str:
        outputs: list[Tensor] = []
        for value in region.outputs:
            made = self.of(value)
            if offset_of(value):
                made = self.text.rescale(made, power_of_two(0), "int8", x_zero_point=-128, to_unsigned=True)
            elif any(made.name == other.name for other in (*outputs, *self._arguments)):
                made = self.text.op("identity", [made], made.shape, made.dtype)
            outputs.append(made)
        return self.text.module(self._arguments, outputs)

    def of(self, value: ir.Value) -> Tensor:
        constant = const_of(value)
        if value not in self._tensors and constant is not None:
            self._tensors[value] = self.text.constant(constant.astype(np.int16) - offset_of(value), "int8")
        return self._tensors[value]

    def store(self, value: ir.Value, tensor: Tensor) -> None:
        assert tensor.shape == shape_of(value), (value.name, tensor.shape, shape_of(value))
        self._tensors[value] = tensor

    def finish(self, node: ir.Node, tensor: Tensor, clamp: tuple[int, int]) -> None:
        """Clamp an int8 result to the node's bounds and let it stand for the node's output."""
        output = node.outputs[0]
        low, high = (bound - offset_of(output) for bound in clamp)
        if (low, high) != (-128, 127):
            attributes = {
                "min_val": f"{low} : i8",
                "max_val": f"{high} : i8",
                "nan_mode": "#tosa.nan_mode<PROPAGATE>",
            }
            tensor = self.text.op("clamp", [tensor], tensor.shape, "int8", attributes)
        self.store(output, self.text.reshape(tensor, shape_of(output)))


def scale_of(node: ir.Node, multiplier: np.ndarray, shift: np.ndarray, variant: str) -> Scale:
    """The encoded factor of an integer operator as RESCALE takes it."""
    if variant == "float32":
        raise refusal(node, "the target rescales in floating point")
    if variant == "shift":
        multiplier, shift = np.full(multiplier.shape, 1 << 30), shift + 1
    right = 31 - shift.astype(np.int64)
    if right.min() < _SHORTEST_SHIFT or right.max() > _LONGEST_SHIFT:
        raise refusal(node, f"a RESCALE shifts by {_SHORTEST_SHIFT} to {_LONGEST_SHIFT}, this by {right.max()}")
    if np.unique(np.stack((multiplier, shift)), axis=1).shape[1] == 1:
        multiplier, right = multiplier[:1], right[:1]
    return Scale(multiplier, right, "DOUBLE_ROUND" if variant == "tflite" else "SINGLE_ROUND")


def factors_of(node: ir.Node, first: int) -> tuple[np.ndarray, np.ndarray]:
    multiplier, shift = const_of(input_of(node, first)), const_of(input_of(node, first + 1))
    assert multiplier is not None and shift is not None
    return multiplier, shift


def signed_zero_point(value: ir.Value, zero_point: int) -> int:
    return zero_point - offset_of(value)


def requantized(
    emitter: Emitter,
    node: ir.Node,
    total: Tensor,
    op: ops.QConv | ops.QConvTranspose | ops.QGemm | ops.QMatMul | ops.QMul,
    first: int,
) -> None:
    """The accumulators, rescaled by the node's inputs `first` and the next, and clamped."""
    scale = scale_of(node, *factors_of(node, first), op.requantize)
    zero_point = signed_zero_point(node.outputs[0], op.y_zero_point)
    scaled = emitter.text.rescale(total, scale, "int8", y_zero_point=zero_point)
    emitter.finish(node, scaled, (op.clamp_min, op.clamp_max))
