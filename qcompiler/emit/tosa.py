"""An integer region as a TOSA 1.1 function, whose RESCALEs carry our multipliers and shifts as they are.

`tosa_of` writes MLIR text and needs nothing; `serialize` turns it into a .tosa file with `tosa-opt` of the package
tosa-tools. All tensors are int8: uint8 ones are held with 128 subtracted, and converted at the region's border.

RESCALE with DOUBLE_ROUND is our ``tflite`` arithmetic, and TFLite's: for p = value * multiplier both are
``floor((floor((p ± 2^30) / 2^31) + 2^(e-1)) / 2^e)``, the sign that of the value. With SINGLE_ROUND it is ``tosa``.

Source: the TOSA 1.0 specification, https://www.mlplatform.org/tosa/tosa_spec.html.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qcompiler.emit.tosa_softmax import softmax
from qcompiler.emit.tosa_text import Scale, Tensor, TosaText, integers, power_of_two
from qcompiler.emit.windows import Window, windows_of
from qcompiler.errors import QCompilerError
from qcompiler.graph import (
    Shape,
    const_of,
    data_input,
    dtype_of,
    element_count,
    input_of,
    integer,
    ints,
    shape_of,
    string,
)
from qcompiler.integer import ops
from qcompiler.integer.formats import EIGHT_BITS
from qcompiler.partition import Region
from qcompiler.quant.arithmetic import TFLITE_ADD_LEFT_SHIFT

_SHORTEST_SHIFT, _LONGEST_SHIFT = 2, 62
"""Of a RESCALE."""
_RESIZE_WEIGHT_BITS = 22
"""Bits of the product of two weights of a QResizeLinear."""


def tosa_of(region: Region) -> str:
    """The MLIR text. Inputs and outputs are those of the region, in its order and layout; uint8 is typed i8.

    Raises:
        QCompilerError: an operator that TOSA cannot compute the way the integer graph does.
    """
    emitter = _Emitter(region)
    for node in region.nodes:
        emit = _EMITTERS.get(node.op_type)
        if emit is None:
            raise refusal(node, "TOSA has no such operator on integers")
        if (wide := next((value for value in node.outputs if value.dtype not in EIGHT_BITS), None)) is not None:
            raise refusal(node, f"it makes {wide.dtype}, and only 8-bit tensors are written")
        emit(emitter, node)
    return emitter.module(region)


def serialize(text: Path) -> Path:
    """Turn FILE.mlir into FILE.tosa beside it.

    Raises:
        QCompilerError: tosa-tools is not installed, or refuses the file.
    """
    program = tosa_program("tosa-opt")
    file = text.with_suffix(".tosa")
    command = [program, f"--tosa-serialize=tosa-flatbuffer-filename={file}", str(text), "-o", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not file.exists():
        raise QCompilerError(f"tosa-opt cannot serialize {text}: {done.stderr.strip()[:500]}")
    return file


def tosa_program(name: str) -> str:
    """A program of tosa-tools: beside this Python, or on PATH. Raises QCompilerError if there is none."""
    folders = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    found = shutil.which(name, path=folders)
    if found is None:
        raise QCompilerError(
            f"{name} is not on PATH; it comes with tosa-tools, which wants an old numpy and so an environment of its "
            "own: python3 -m venv tosa && tosa/bin/pip install tosa-tools"
        )
    return found


def refusal(node: ir.Node, reason: str) -> QCompilerError:
    """Why a node cannot be written as TOSA."""
    return QCompilerError(
        f"{node.name!r} ({node.op_type}) cannot be written as TOSA with the same arithmetic: {reason}"
    )


def _offset(value: ir.Value) -> int:
    """What is subtracted from a value's integers to make them int8."""
    return 128 if dtype_of(value) == np.uint8 else 0


class _Emitter:
    """The text being written, and which tensor holds each value of the region."""

    def __init__(self, region: Region) -> None:
        self.text = TosaText()
        self._tensors: dict[ir.Value, Tensor] = {}
        self._arguments: list[Tensor] = []
        for index, value in enumerate(region.inputs):
            given = self.text.argument(index, shape_of(value), "int8")
            self._arguments.append(given)
            self._tensors[value] = given
            if _offset(value):
                signed = self.text.rescale(given, power_of_two(0), "int8", y_zero_point=-128, from_unsigned=True)
                self._tensors[value] = signed

    def module(self, region: Region) -> str:
        outputs: list[Tensor] = []
        for value in region.outputs:
            made = self.of(value)
            if _offset(value):
                made = self.text.rescale(made, power_of_two(0), "int8", x_zero_point=-128, to_unsigned=True)
            elif any(made.name == other.name for other in (*outputs, *self._arguments)):
                made = self.text.op("identity", [made], made.shape, made.dtype)
            outputs.append(made)
        return self.text.module(self._arguments, outputs)

    def of(self, value: ir.Value) -> Tensor:
        constant = const_of(value)
        if value not in self._tensors and constant is not None:
            self._tensors[value] = self.text.constant(constant.astype(np.int16) - _offset(value), "int8")
        return self._tensors[value]

    def store(self, value: ir.Value, tensor: Tensor) -> None:
        assert tensor.shape == shape_of(value), (value.name, tensor.shape, shape_of(value))
        self._tensors[value] = tensor

    def finish(self, node: ir.Node, tensor: Tensor, clamp: tuple[int, int]) -> None:
        """Clamp an int8 result to the node's bounds and let it stand for the node's output."""
        output = node.outputs[0]
        low, high = (bound - _offset(output) for bound in clamp)
        if (low, high) != (-128, 127):
            attributes = {
                "min_val": f"{low} : i8",
                "max_val": f"{high} : i8",
                "nan_mode": "#tosa.nan_mode<PROPAGATE>",
            }
            tensor = self.text.op("clamp", [tensor], tensor.shape, "int8", attributes)
        self.store(output, self.text.reshape(tensor, shape_of(output)))


def _scale(node: ir.Node, multiplier: np.ndarray, shift: np.ndarray, variant: str) -> Scale:
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


def _factors(node: ir.Node, first: int) -> tuple[np.ndarray, np.ndarray]:
    multiplier, shift = const_of(input_of(node, first)), const_of(input_of(node, first + 1))
    assert multiplier is not None and shift is not None
    return multiplier, shift


def _zero_point(value: ir.Value, zero_point: int) -> int:
    return zero_point - _offset(value)


# --- products -----------------------------------------------------------------------------------------------


def _cropped(emitter: _Emitter, x: Tensor, windows: Sequence[Window]) -> tuple[Tensor, tuple[int, ...]]:
    """The input without the rows and columns that no window reads, and its top, bottom, left and right padding.

    TOSA wants the windows to fit the padded input exactly.
    """
    size = [window.size + min(window.pad_after, 0) for window in windows]
    x = emitter.text.slice(x, (0, 0, 0, 0), (x.shape[0], *size, x.shape[3]))
    return x, tuple(pad for window in windows for pad in (window.pad, max(window.pad_after, 0)))


def _convolve(
    emitter: _Emitter,
    name: str,
    x: Tensor,
    filters: np.ndarray,
    bias: np.ndarray,
    zero_points: tuple[int, int],
    shape: Shape,
    attributes: Mapping[str, str],
) -> Tensor:
    text = emitter.text
    inputs = [x, text.constant(filters, "int8"), text.constant(bias, "int32")]
    inputs += [text.number(zero_point, "int8") for zero_point in zero_points]
    return text.op(name, inputs, shape, "int32", {"acc_type": "i32", **attributes})


def _weights(node: ir.Node) -> tuple[np.ndarray, np.ndarray]:
    """Signed weights, and the bias."""
    w, bias = const_of(data_input(node, 1)), const_of(data_input(node, 2))
    assert w is not None and bias is not None
    return w.astype(np.int16) - _offset(data_input(node, 1)), bias


def _conv(emitter: _Emitter, node: ir.Node) -> None:
    op = ops.QConv.of(node)
    x, y = data_input(node), node.outputs[0]
    channels = shape_of(x)[3]
    filters, bias = _weights(node)
    depthwise = op.group == channels > 1
    if op.group > 1 and not depthwise:
        raise refusal(node, "TOSA has no grouped convolution")
    if depthwise:
        each = len(filters) // channels
        filters = filters.reshape(channels, each, *op.kernel_shape).transpose(2, 3, 0, 1)
    windows = windows_of(shape_of(x), shape_of(y), op.kernel_shape, op.strides, op.dilations, op.pads)
    source, pads = _cropped(emitter, emitter.of(x), windows)
    zero_points = (_zero_point(x, op.x_zero_point), _zero_point(data_input(node, 1), op.w_zero_point))
    attributes = {"pad": integers(pads), "stride": integers(op.strides), "dilation": integers(op.dilations)}
    name = "depthwise_conv2d" if depthwise else "conv2d"
    total = _convolve(emitter, name, source, filters, bias, zero_points, shape_of(y), attributes)
    _requantized(emitter, node, total, op, 3)


def _requantized(
    emitter: _Emitter,
    node: ir.Node,
    total: Tensor,
    op: ops.QConv | ops.QConvTranspose | ops.QGemm | ops.QMatMul | ops.QMul,
    first: int,
) -> None:
    """The accumulators, rescaled by the node's inputs `first` and the next, and clamped."""
    scale = _scale(node, *_factors(node, first), op.requantize)
    zero_point = _zero_point(node.outputs[0], op.y_zero_point)
    scaled = emitter.text.rescale(total, scale, "int8", y_zero_point=zero_point)
    emitter.finish(node, scaled, (op.clamp_min, op.clamp_max))


def _conv_transpose(emitter: _Emitter, node: ir.Node) -> None:
    op = ops.QConvTranspose.of(node)
    x, y = data_input(node), node.outputs[0]
    if op.group != 1 or op.dilations != (1, 1):
        raise refusal(node, "TOSA's transposed convolution has neither groups nor dilation")
    filters, bias = _weights(node)
    zero_points = (_zero_point(x, op.x_zero_point), _zero_point(data_input(node, 1), op.w_zero_point))
    out_pads: list[int] = []
    for axis in range(2):
        reached = (shape_of(x)[1 + axis] - 1) * op.strides[axis] + op.kernel_shape[axis]
        out_pads += [-op.pads[axis], shape_of(y)[1 + axis] + op.pads[axis] - reached]
    attributes = {"out_pad": integers(out_pads), "stride": integers(op.strides)}
    total = _convolve(emitter, "transpose_conv2d", emitter.of(x), filters, bias, zero_points, shape_of(y), attributes)
    _requantized(emitter, node, total, op, 3)


def _gemm(emitter: _Emitter, node: ir.Node) -> None:
    """A 1×1 convolution over a column of rows; TOSA has no dense layer."""
    op = ops.QGemm.of(node)
    x = data_input(node)
    filters, bias = _weights(node)
    rows, depth = shape_of(x)
    column = emitter.text.reshape(emitter.of(x), (1, rows, 1, depth))
    zero_points = (_zero_point(x, op.x_zero_point), _zero_point(data_input(node, 1), op.w_zero_point))
    attributes = {"pad": integers((0,) * 4), "stride": integers((1, 1)), "dilation": integers((1, 1))}
    shape = (1, rows, 1, len(filters))
    total = _convolve(emitter, "conv2d", column, filters[:, None, None], bias, zero_points, shape, attributes)
    _requantized(emitter, node, total, op, 3)


def _matmul(emitter: _Emitter, node: ir.Node) -> None:
    op = ops.QMatMul.of(node)
    a, b, y = data_input(node), data_input(node, 1), node.outputs[0]
    batch = element_count(shape_of(a)[:-2])
    if element_count(shape_of(b)[:-2]) != batch:
        raise refusal(node, "TOSA's matrix product does not broadcast")
    text = emitter.text
    left, right = (text.reshape(emitter.of(value), (batch, *shape_of(value)[-2:])) for value in (a, b))
    zero_points = (_zero_point(a, op.a_zero_point), _zero_point(b, op.b_zero_point))
    inputs = [left, right, *(text.number(zero_point, "int8") for zero_point in zero_points)]
    total = text.op("matmul", inputs, (batch, *shape_of(y)[-2:]), "int32")
    _requantized(emitter, node, total, op, 2)


# --- elementwise --------------------------------------------------------------------------------------------


def _operands(emitter: _Emitter, node: ir.Node, zero_points: Sequence[int], exponent: int) -> list[Tensor]:
    """Both inputs of a binary operator without zero points, times 2^exponent, int32, in the output's rank."""
    rank = len(shape_of(node.outputs[0]))
    made: list[Tensor] = []
    for index, zero_point in enumerate(zero_points):
        value = data_input(node, index)
        shape = shape_of(value)
        source = emitter.text.reshape(emitter.of(value), ((1,) * (rank - len(shape)) + shape))
        signed = _zero_point(value, zero_point)
        made.append(emitter.text.rescale(source, power_of_two(exponent), "int32", x_zero_point=signed))
    return made


def _add(emitter: _Emitter, node: ir.Node) -> None:
    op = ops.QAdd.of(node)
    text, y = emitter.text, node.outputs[0]
    name, shape = "sub" if op.subtract else "add", shape_of(y)
    zero_points = (op.a_zero_point, op.b_zero_point)
    zero_point = _zero_point(y, op.y_zero_point)
    if op.requantize == "tflite":
        encoded = ((op.multiplier_a, op.shift_a), (op.multiplier_b, op.shift_b), (op.multiplier_y, op.shift_y))
        scales = [_scale(node, np.array([m]), np.array([s]), "tflite") for m, s in encoded]
        shifted = _operands(emitter, node, zero_points, TFLITE_ADD_LEFT_SHIFT)
        a, b = (text.rescale(operand, scale, "int32") for operand, scale in zip(shifted, scales[:2], strict=True))
        total = text.op(name, [a, b], shape, "int32")
        result = text.rescale(total, scales[2], "int8", y_zero_point=zero_point)
    else:
        # (a * multiplier_a ± b * multiplier_b + 2^(shift - 1)) >> shift
        rank = len(shape)
        products = [
            text.op("mul", [operand, text.number(m, "int32", rank), text.number(0, "int8")], operand.shape, "int32")
            for operand, m in zip(
                _operands(emitter, node, zero_points, 0), (op.multiplier_a, op.multiplier_b), strict=True
            )
        ]
        total = text.op(name, products, shape, "int32")
        result = text.rescale(total, power_of_two(-op.shift_y), "int8", y_zero_point=zero_point)
    emitter.finish(node, result, (op.clamp_min, op.clamp_max))


def _mul(emitter: _Emitter, node: ir.Node) -> None:
    op = ops.QMul.of(node)
    a, b = _operands(emitter, node, (op.a_zero_point, op.b_zero_point), 0)
    product = emitter.text.op("mul", [a, b, emitter.text.number(0, "int8")], shape_of(node.outputs[0]), "int32")
    _requantized(emitter, node, product, op, 2)


def _requantize(emitter: _Emitter, node: ir.Node) -> None:
    op = ops.QRequantize.of(node)
    x, y = data_input(node), node.outputs[0]
    scale = _scale(node, *_factors(node, 1), op.requantize)
    scaled = emitter.text.rescale(
        emitter.of(x),
        scale,
        "int8",
        x_zero_point=_zero_point(x, op.x_zero_point),
        y_zero_point=_zero_point(y, op.y_zero_point),
    )
    emitter.finish(node, scaled, (op.clamp_min, op.clamp_max))


def _clip(emitter: _Emitter, node: ir.Node) -> None:
    limits = np.iinfo(dtype_of(node.outputs[0]))
    low, high = const_of(input_of(node, 1)), const_of(input_of(node, 2))
    clamp = (int(limits.min) if low is None else int(low), int(limits.max) if high is None else int(high))
    emitter.finish(node, emitter.of(data_input(node)), (min(clamp), clamp[1]))


def _lookup(emitter: _Emitter, node: ir.Node) -> None:
    table, y = const_of(data_input(node, 1)), node.outputs[0]
    assert table is not None
    entries = emitter.text.constant(table.astype(np.int16) - _offset(y), "int8")
    emitter.store(y, emitter.text.op("table", [emitter.of(data_input(node)), entries], shape_of(y), "int8"))


def _softmax(emitter: _Emitter, node: ir.Node) -> None:
    op, table = ops.QSoftmax.of(node), const_of(data_input(node, 1))
    assert table is not None
    if op.inverse_scale != ops.TFLITE_SOFTMAX:
        raise refusal(node, "it divides 64-bit integers")
    zero_point = _zero_point(node.outputs[0], op.y_zero_point)
    made = softmax(emitter.text, emitter.of(data_input(node)), table, zero_point)
    emitter.finish(node, made, (op.clamp_min, op.clamp_max))


# --- pools, means, interpolation ----------------------------------------------------------------------------


def _max_pool(emitter: _Emitter, node: ir.Node) -> None:
    op = ops.QMaxPool.of(node)
    x, y = data_input(node), node.outputs[0]
    if op.dilations != (1, 1):
        raise refusal(node, "TOSA's pools have no dilation")
    windows = windows_of(shape_of(x), shape_of(y), op.kernel_shape, op.strides, op.dilations, op.pads)
    source, pads = _cropped(emitter, emitter.of(x), windows)
    attributes = {
        "kernel": integers(op.kernel_shape),
        "stride": integers(op.strides),
        "pad": integers(pads),
        "nan_mode": "#tosa.nan_mode<PROPAGATE>",
    }
    pooled = emitter.text.op("max_pool2d", [source], shape_of(y), "int8", attributes)
    emitter.finish(node, pooled, (op.clamp_min, op.clamp_max))


def _sums(
    emitter: _Emitter, x: Tensor, zero_point: int, windows: Sequence[Window], kernel: Shape, shape: Shape
) -> Tensor:
    """Sums over windows, int32: a depthwise convolution by ones."""
    source, pads = _cropped(emitter, x, windows)
    channels = x.shape[3]
    attributes = {
        "pad": integers(pads),
        "stride": integers([window.stride for window in windows]),
        "dilation": integers((1, 1)),
    }
    ones = np.ones((*kernel, channels, 1), np.int8)
    bias = np.zeros(channels, np.int32)
    return _convolve(emitter, "depthwise_conv2d", source, ones, bias, (zero_point, 0), shape, attributes)


def _average_pool(emitter: _Emitter, node: ir.Node) -> None:
    op = ops.QAveragePool.of(node)
    text, x, y = emitter.text, data_input(node), node.outputs[0]
    shape = shape_of(y)
    windows = windows_of(shape_of(x), shape, op.kernel_shape, op.strides, (1, 1), op.pads)
    zero_point = _zero_point(x, op.x_zero_point)
    total = _sums(emitter, emitter.of(x), zero_point, windows, op.kernel_shape, shape)
    multiplier, shift = _factors(node, 1)
    counts = np.full(shape[1:3], element_count(op.kernel_shape))
    if not op.count_include_pad:
        counts = np.outer(*(_elements_inside(window) for window in windows))
    scale = _scale(node, multiplier[counts.reshape(-1) - 1], shift[counts.reshape(-1) - 1], op.requantize)
    out = _zero_point(y, op.y_zero_point)
    if scale.multiplier.size == 1:
        scaled = text.rescale(total, scale, "int8", y_zero_point=out)
    else:
        # RESCALE has one factor per element of the last axis, so the windows go there.
        n, h, w, c = shape
        moved = text.transpose(text.reshape(total, (n, h * w, c)), (0, 2, 1))
        scaled = text.transpose(text.rescale(moved, scale, "int8", y_zero_point=out), (0, 2, 1))
    emitter.finish(node, text.reshape(scaled, shape), (op.clamp_min, op.clamp_max))


def _elements_inside(window: Window) -> np.ndarray:
    """How many elements of the input each window covers."""
    first = np.arange(window.count) * window.stride - window.pad
    return np.minimum(first + window.kernel, window.size) - np.maximum(first, 0)


def _reduce_mean(emitter: _Emitter, node: ir.Node) -> None:
    """Neighbouring axes become height and width of a map, those after them its channels."""
    op = ops.QReduceMean.of(node)
    x, y = data_input(node), node.outputs[0]
    shape, axes = shape_of(x), op.axes
    if axes != tuple(range(axes[0], axes[-1] + 1)):
        raise refusal(node, "it averages axes that are not neighbours")
    outer, inner = element_count(shape[: axes[0]]), element_count(shape[axes[-1] + 1 :])
    kernel = (element_count(shape[axes[0] : axes[-1]]), shape[axes[-1]])
    windows = [Window(size, 1, size, 1, 1, 0) for size in kernel]
    source = emitter.text.reshape(emitter.of(x), (outer, *kernel, inner))
    zero_point = _zero_point(x, op.x_zero_point)
    total = _sums(emitter, source, zero_point, windows, kernel, (outer, 1, 1, inner))
    scale = _scale(node, *_factors(node, 1), op.requantize)
    scaled = emitter.text.rescale(total, scale, "int8", y_zero_point=_zero_point(y, op.y_zero_point))
    emitter.finish(node, scaled, (op.clamp_min, op.clamp_max))


def _resize_nearest(emitter: _Emitter, node: ir.Node) -> None:
    x, y = data_input(node), node.outputs[0]
    axes: list[_Axis] = []
    for position, (size, count) in enumerate(zip(shape_of(x)[1:3], shape_of(y)[1:3], strict=True)):
        table = const_of(data_input(node, 1 + position))
        assert table is not None
        found = next((axis for axis in _axes(size, count) if np.array_equal(axis.nearest(), table)), None)
        if found is None:
            raise refusal(node, "no scale and offset of RESIZE pick the same pixels")
        axes.append(found)
    emitter.store(y, _resized(emitter, emitter.of(x), axes, "NEAREST_NEIGHBOR", "int8", shape_of(y)))


def _resize_linear(emitter: _Emitter, node: ir.Node) -> None:
    """RESIZE interpolates exactly; its denominator must be a power of two, which the rounding shift then removes."""
    x, y = data_input(node), node.outputs[0]
    axes: list[_Axis] = []
    for position, (size, count) in enumerate(zip(shape_of(x)[1:3], shape_of(y)[1:3], strict=True)):
        index, weight = const_of(data_input(node, 1 + 2 * position)), const_of(data_input(node, 2 + 2 * position))
        assert index is not None and weight is not None
        found = next((axis for axis in _axes(size, count) if axis.interpolates(index, weight)), None)
        if found is None:
            raise refusal(node, "no scale and offset of RESIZE give the same weights")
        axes.append(found)
    total = _resized(emitter, emitter.of(x), axes, "BILINEAR", "int32", shape_of(y))
    bits = sum(axis.scale.bit_length() - 1 for axis in axes)
    emitter.store(y, emitter.text.rescale(total, power_of_two(-bits), "int8"))


class _Axis:
    """RESIZE along one axis: output o lies at (o * step + offset) / scale."""

    def __init__(self, size: int, count: int, scale: int, step: int, offset: int) -> None:
        self.scale, self.step, self.offset = scale, step, offset
        self.border = (count - 1) * step - (size - 1) * scale + offset
        self._size = size
        self._at = np.arange(count) * step + offset

    def nearest(self) -> np.ndarray:
        whole, rest = np.divmod(self._at, self.scale)
        return np.clip(whole + (2 * rest >= self.scale), 0, self._size - 1).astype(np.int32)

    def interpolates(self, index: np.ndarray, weight: np.ndarray) -> bool:
        """Whether the weights of every input element, [count, size], are the table's."""
        if self.scale & (self.scale - 1):
            return False
        whole, rest = np.divmod(self._at, self.scale)
        ours, theirs = (np.zeros((len(whole), self._size), np.int64) for _ in range(2))
        rows = np.arange(len(whole))
        for pixel, share in ((whole, self.scale - rest), (whole + 1, rest)):
            np.add.at(ours, (rows, np.clip(pixel, 0, self._size - 1)), share)
        for side in range(2):
            np.add.at(theirs, (rows, index[:, side]), weight[:, side])
        return np.array_equal(ours << (_RESIZE_WEIGHT_BITS // 2), theirs * self.scale)


def _axes(size: int, count: int) -> list[_Axis]:
    """Every way to lay `count` outputs over `size` inputs at even distances: their ratio, or from end to end."""
    found: list[_Axis] = []
    for numerator, denominator in ((count, size), (max(count - 1, 1), max(size - 1, 1))):
        common = int(np.gcd(numerator, denominator))
        # Twice over, so that the offset may be half of an output.
        scale, step = 2 * numerator // common, 2 * denominator // common
        found += [_Axis(size, count, scale, step, offset) for offset in range(-scale, scale)]
    return [axis for axis in found if -16 * axis.scale <= axis.border < axis.scale]


def _resized(emitter: _Emitter, x: Tensor, axes: Sequence[_Axis], mode: str, dtype: str, shape: Shape) -> Tensor:
    text = emitter.text
    scale = [number for axis in axes for number in (axis.scale, axis.step)]
    inputs = [
        x,
        text.shape_constant(scale),
        text.shape_constant([axis.offset for axis in axes]),
        text.shape_constant([axis.border for axis in axes]),
    ]
    return text.op("resize", inputs, shape, dtype, {"mode": f"#tosa.resize_mode<{mode}>"})


# --- movement -----------------------------------------------------------------------------------------------


def _reshape(emitter: _Emitter, node: ir.Node) -> None:
    y = node.outputs[0]
    emitter.store(y, emitter.text.reshape(emitter.of(data_input(node)), shape_of(y)))


def _transpose(emitter: _Emitter, node: ir.Node) -> None:
    x = emitter.of(data_input(node))
    perm = ints(node, "perm", tuple(reversed(range(len(x.shape)))))
    emitter.store(node.outputs[0], emitter.text.transpose(x, perm))


def _concat(emitter: _Emitter, node: ir.Node) -> None:
    y = node.outputs[0]
    axis = integer(node, "axis") % len(shape_of(y))
    inputs = [emitter.of(value) for value in node.inputs if value is not None]
    emitter.store(y, emitter.text.op("concat", inputs, shape_of(y), "int8", {"axis": f"{axis} : i32"}))


def _slice(emitter: _Emitter, node: ir.Node) -> None:
    x = data_input(node)
    starts, axes, steps = (const_of(input_of(node, index)) for index in (1, 3, 4))
    assert starts is not None
    rank = len(shape_of(x))
    chosen = range(rank)[: len(starts)] if axes is None else [int(axis) % rank for axis in axes]
    made = emitter.of(x)
    for position, axis in enumerate(chosen):
        size, start = shape_of(x)[axis], int(starts[position])
        step = 1 if steps is None else int(steps[position])
        if step < 1:
            raise refusal(node, "it slices backwards")
        begin = min(max(start + size if start < 0 else start, 0), size)
        made = _take(emitter, made, axis, begin, step, shape_of(node.outputs[0])[axis])
    emitter.store(node.outputs[0], made)


def _take(emitter: _Emitter, x: Tensor, axis: int, begin: int, step: int, count: int) -> Tensor:
    """`count` elements of one axis, from `begin` on, `step` apart: TOSA slices without gaps."""
    text, shape = emitter.text, list(x.shape)
    missing = begin + count * step - shape[axis] if step > 1 else 0
    if missing > 0:
        pads = np.zeros((len(shape), 2), np.int64)
        pads[axis, 1] = missing
        x = text.pad(x, pads, 0)
    start = [0] * len(shape)
    start[axis], shape[axis] = begin, count * step
    x = text.slice(x, start, tuple(shape))
    if step == 1:
        return x
    outer, inner = element_count(shape[:axis]), element_count(shape[axis + 1 :])
    split = text.reshape(x, (outer, count, step, inner))
    shape[axis] = count
    return text.reshape(text.slice(split, (0, 0, 0, 0), (outer, count, 1, inner)), tuple(shape))


def _split(emitter: _Emitter, node: ir.Node) -> None:
    x = emitter.of(data_input(node))
    axis = integer(node, "axis", 0) % len(x.shape)
    first = 0
    for value in node.outputs:
        emitter.store(value, _take(emitter, x, axis, first, 1, shape_of(value)[axis]))
        first += shape_of(value)[axis]


def _pad(emitter: _Emitter, node: ir.Node) -> None:
    x = data_input(node)
    pads, fill, axes = (const_of(input_of(node, index)) for index in (1, 2, 3))
    assert pads is not None
    if string(node, "mode", "constant") != "constant" or pads.min() < 0:
        raise refusal(node, "TOSA pads with constants only, and never crops")
    rank = len(shape_of(x))
    chosen = range(rank) if axes is None else [int(axis) % rank for axis in axes]
    table = np.zeros((rank, 2), np.int64)
    for position, axis in enumerate(chosen):
        table[axis] = pads.reshape(2, -1)[:, position]
    value = (0 if fill is None else int(fill.reshape(()))) - _offset(x)
    emitter.store(node.outputs[0], emitter.text.pad(emitter.of(x), table, value))


_EMITTERS: Mapping[str, Callable[[_Emitter, ir.Node], None]] = {
    "QConv": _conv,
    "QConvTranspose": _conv_transpose,
    "QGemm": _gemm,
    "QMatMul": _matmul,
    "QAdd": _add,
    "QMul": _mul,
    "QMaxPool": _max_pool,
    "QAveragePool": _average_pool,
    "QReduceMean": _reduce_mean,
    "QRequantize": _requantize,
    "QLookup": _lookup,
    "QSoftmax": _softmax,
    "QResizeNearest": _resize_nearest,
    "QResizeLinear": _resize_linear,
    "Reshape": _reshape,
    "Flatten": _reshape,
    "Squeeze": _reshape,
    "Unsqueeze": _reshape,
    "Identity": _reshape,
    "Transpose": _transpose,
    "Concat": _concat,
    "Slice": _slice,
    "Split": _split,
    "Pad": _pad,
    "Clip": _clip,
}
