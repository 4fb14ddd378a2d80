"""An integer region as a .tflite file that TFLite's reference kernels run with the same results, bit for bit.

TFLite's kernels derive their multipliers from the scales of the tensors, in float64. So the file carries the scales
that the integer graph was made from, and emission checks that they give the very multipliers of the integer operators;
where they do not, or where no TFLite operator computes what ours does, the region is refused with the reason.

Some operators have another form here: means and average pools are depthwise convolutions by ones (TFLite's pool rounds
before it rescales), and padding that neither SAME nor VALID describes is a PAD of its own, which Vela folds back.

The kernels are those of LiteRT's `BUILTIN_REF` resolver; its default ones (XNNPACK) differ from them by one.
Source: tensorflow/lite/kernels/*.cc and kernels/internal/reference.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from ai_edge_litert import schema_py_generated as schema

from qcompiler.emit.tflite_model import Operation, Tensor, TfliteModel
from qcompiler.emit.windows import Padded, padded, windows_of
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
    value_name,
)
from qcompiler.integer import ops
from qcompiler.integer.formats import EIGHT_BITS, TensorFormat, formats_of
from qcompiler.partition import Region
from qcompiler.quant import arithmetic, tflite_functions

_OP = schema.BuiltinOperator
_OPTIONS = schema.BuiltinOptions
_ACTIVATION = schema.ActivationFunctionType

_VERSIONS: dict[int, int] = {
    _OP.ADD: 2,
    _OP.BATCH_MATMUL: 2,
    _OP.CAST: 1,
    _OP.CONCATENATION: 2,
    _OP.CONV_2D: 3,
    _OP.DEPTHWISE_CONV_2D: 3,
    _OP.GATHER: 2,
    _OP.LOGISTIC: 2,
    _OP.MAX_POOL_2D: 2,
    _OP.MAXIMUM: 2,
    _OP.MINIMUM: 2,
    _OP.MUL: 2,
    _OP.PAD: 2,
    _OP.PADV2: 2,
    _OP.QUANTIZE: 2,
    _OP.RESHAPE: 1,
    _OP.RESIZE_NEAREST_NEIGHBOR: 3,
    _OP.SOFTMAX: 2,
    _OP.STRIDED_SLICE: 2,
    _OP.SUB: 2,
    _OP.TRANSPOSE: 2,
    _OP.TRANSPOSE_CONV: 3,
}


def tflite_of(region: Region) -> bytes:
    """The file. Inputs and outputs are those of the region, in its order, layout and types.

    Raises:
        QCompilerError: an operator that TFLite cannot compute the way the integer graph does.
    """
    emitter = _Emitter(region)
    for node in region.nodes:
        emit = _EMITTERS.get(node.op_type)
        if emit is None:
            raise refusal(node, "TFLite has no such operator on integers")
        if (wide := next((value for value in node.outputs if value.dtype not in EIGHT_BITS), None)) is not None:
            raise refusal(node, f"it makes {wide.dtype}, and only 8-bit tensors are written")
        emit(emitter, node)
    inputs = [emitter.of(value) for value in region.inputs]
    return emitter.model.serialize(inputs, [emitter.of(value) for value in region.outputs])


def refusal(node: ir.Node, reason: str) -> QCompilerError:
    """Why a node cannot be written as TFLite."""
    return QCompilerError(
        f"{node.name!r} ({node.op_type}) cannot be written as TFLite with the same arithmetic: {reason}"
    )


class _Emitter:
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
        options_type: int = _OPTIONS.NONE,
        options: object = None,
    ) -> None:
        self.model.operator(Operation(code, _VERSIONS[code]), inputs, [output], options_type, options)

    def reshaped(self, tensor: Tensor, shape: Shape, hint: str) -> Tensor:
        if tensor.shape == shape:
            return tensor
        output = self.temporary(tensor, shape, hint)
        self.reshape(tensor, output)
        return output

    def reshape(self, tensor: Tensor, output: Tensor) -> None:
        options = schema.ReshapeOptionsT(newShape=list(output.shape))
        dims = self.numbers(output.shape, "shape")
        self.add(_OP.RESHAPE, [tensor, dims], output, _OPTIONS.ReshapeOptions, options)

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
        make(made, _ACTIVATION.NONE if activation is None else activation)
        if activation is not None:
            self.reshape(made, output)
            return
        bounds = [
            (code, bound)
            for code, bound, limit in (
                (_OP.MAXIMUM, clamp[0], limits.min),
                (_OP.MINIMUM, clamp[1], limits.max),
            )
            if bound != limit
        ]
        made = self.reshaped(made, output.shape, f"{node.name}.reshaped")
        for position, (code, bound) in enumerate(bounds):
            other = self.model.constant(f"{node.name}.bound", np.array([bound], output.dtype), output.format)
            last = position == len(bounds) - 1
            target = output if last else self.temporary(output, output.shape, f"{node.name}.bounded")
            self.add(code, [made, other], target, _OPTIONS.MaximumMinimumOptions, schema.MaximumMinimumOptionsT())
            made = target

    def pad(self, tensor: Tensor, pads: np.ndarray, value: int, output: Tensor) -> None:
        """`pads`: [rank, 2], before and after each axis."""
        assert tensor.format is not None
        table = self.numbers(pads, "paddings")
        if value == tensor.format.zero_point:
            self.add(_OP.PAD, [tensor, table], output, _OPTIONS.PadOptions, schema.PadOptionsT())
            return
        fill = self.model.constant("fill", np.array([value], tensor.dtype), tensor.format)
        self.add(_OP.PADV2, [tensor, table, fill], output, _OPTIONS.PadV2Options, schema.PadV2OptionsT())

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
        _ACTIVATION.NONE: limits,
        _ACTIVATION.RELU: (max(low, code(0.0)), high),
        _ACTIVATION.RELU6: (max(low, code(0.0)), min(high, code(6.0))),
        _ACTIVATION.RELU_N1_TO_1: (max(low, code(-1.0)), min(high, code(1.0))),
    }
    return next((activation for activation, found in bounds.items() if found == clamp), None)


def _padding(padding: Padded) -> int:
    return schema.Padding.SAME if padding.mode == "same" else schema.Padding.VALID


def _check_factors(node: ir.Node, factors: np.ndarray, multiplier: np.ndarray, shift: np.ndarray) -> None:
    """Whether TFLite computes the node's own multipliers from the scales that are written."""
    wanted = arithmetic.multipliers(factors, "tflite")
    if not all(np.array_equal(ours, theirs) for ours, theirs in zip((multiplier, shift), wanted, strict=True)):
        raise refusal(node, "its rescale factor does not follow from its tensors' scales")


def _factors(node: ir.Node, first: int) -> tuple[np.ndarray, np.ndarray]:
    multiplier, shift = const_of(input_of(node, first)), const_of(input_of(node, first + 1))
    assert multiplier is not None and shift is not None
    return multiplier, shift


def _require_tflite(node: ir.Node, variant: str) -> None:
    if variant != "tflite":
        raise refusal(node, f"the target rescales as {variant!r} does, TFLite in its own way")


# --- products -----------------------------------------------------------------------------------------------


def _product_constants(
    emitter: _Emitter, node: ir.Node, filters: np.ndarray, axis: int, w_zero_point: int
) -> list[Tensor]:
    """Weights (outputs along `axis`) and bias, after a check of the rescale factors."""
    x, w, y = data_input(node), data_input(node, 1), node.outputs[0]
    weights, x_scale = emitter.format(w, node), emitter.format(x, node).scale
    scales = np.array(weights.scales, np.float64)
    multiplier, shift = _factors(node, 3)
    factors = np.float64(x_scale) * scales / np.float64(emitter.format(y, node).scale)
    _check_factors(node, np.broadcast_to(factors, multiplier.shape), multiplier, shift)
    if w_zero_point and filters.dtype == np.int8:
        raise refusal(node, "TFLite's int8 weights are symmetric")
    if len(set(weights.scales)) == 1:
        weights = TensorFormat(weights.scales[:1], weights.zero_point)
    elif filters.dtype != np.int8:
        raise refusal(node, "TFLite's uint8 weights have one scale")
    if filters.dtype != dtype_of(x):
        raise refusal(node, f"TFLite has no {dtype_of(x)} by {filters.dtype} product")
    bias = const_of(data_input(node, 2))
    assert bias is not None
    products = tuple(float(np.float32(x_scale) * np.float32(scale)) for scale in weights.scales)
    return [
        emitter.model.constant(value_name(w), filters, weights, axis=axis),
        emitter.model.constant(f"{node.name}.bias", bias, TensorFormat(products, 0)),
    ]


def _conv(emitter: _Emitter, node: ir.Node) -> None:
    op = ops.QConv.of(node)
    _require_tflite(node, op.requantize)
    x, w = data_input(node), const_of(data_input(node, 1))
    assert w is not None
    padding = padded(
        *windows_of(shape_of(x), shape_of(node.outputs[0]), op.kernel_shape, op.strides, op.dilations, op.pads)
    )
    source = emitter.padded(emitter.of(x), padding, op.x_zero_point, str(node.name))
    channels = shape_of(x)[3]
    depthwise = op.group == channels > 1
    # [outputs, height, width, 1] to [1, height, width, outputs].
    filters = w.transpose(3, 1, 2, 0) if depthwise else w
    constants = _product_constants(emitter, node, filters, 3 if depthwise else 0, op.w_zero_point)
    convolve = _depthwise if depthwise else _dense
    emitter.clamped(
        node,
        (op.clamp_min, op.clamp_max),
        lambda output, activation: convolve(emitter, [source, *constants], output, padding, op.dilations, activation),
    )


def _dense(
    emitter: _Emitter,
    inputs: Sequence[Tensor],
    output: Tensor,
    padding: Padded,
    dilations: tuple[int, int],
    activation: int,
) -> None:
    options = schema.Conv2DOptionsT(
        padding=_padding(padding),
        strideH=padding.strides[0],
        strideW=padding.strides[1],
        dilationHFactor=dilations[0],
        dilationWFactor=dilations[1],
        fusedActivationFunction=activation,
    )
    emitter.add(_OP.CONV_2D, inputs, output, _OPTIONS.Conv2DOptions, options)


def _depthwise(
    emitter: _Emitter,
    inputs: Sequence[Tensor],
    output: Tensor,
    padding: Padded,
    dilations: tuple[int, int],
    activation: int,
) -> None:
    options = schema.DepthwiseConv2DOptionsT(
        padding=_padding(padding),
        strideH=padding.strides[0],
        strideW=padding.strides[1],
        depthMultiplier=output.shape[3] // inputs[0].shape[3],
        dilationHFactor=dilations[0],
        dilationWFactor=dilations[1],
        fusedActivationFunction=activation,
    )
    emitter.add(_OP.DEPTHWISE_CONV_2D, inputs, output, _OPTIONS.DepthwiseConv2DOptions, options)


def _conv_transpose(emitter: _Emitter, node: ir.Node) -> None:
    """The whole plane that the kernel reaches, then the part that ONNX keeps."""
    op = ops.QConvTranspose.of(node)
    _require_tflite(node, op.requantize)
    if op.group != 1 or op.dilations != (1, 1):
        raise refusal(node, "TFLite's transposed convolution has neither groups nor dilation")
    x, y, w = data_input(node), node.outputs[0], const_of(data_input(node, 1))
    assert w is not None
    constants = _product_constants(emitter, node, w, 0, op.w_zero_point)
    (n, *size, _), (*_, outputs) = shape_of(x), shape_of(y)
    wanted = shape_of(y)[1:3]
    reached = [
        (count - 1) * stride + kernel for count, stride, kernel in zip(size, op.strides, op.kernel_shape, strict=True)
    ]
    plane = tuple(max(a, p + b) for a, b, p in zip(reached, wanted, op.pads[:2], strict=True))
    options = schema.TransposeConvOptionsT(
        padding=schema.Padding.VALID,
        strideH=op.strides[0],
        strideW=op.strides[1],
        fusedActivationFunction=_ACTIVATION.NONE,
    )

    def make(output: Tensor, activation: int) -> None:
        options.fusedActivationFunction = activation
        full = output
        if plane != wanted:
            full = emitter.temporary(output, (n, *plane, outputs), f"{node.name}.plane")
        dims = emitter.numbers(full.shape, "shape")
        inputs = [dims, constants[0], emitter.of(x), constants[1]]
        emitter.add(_OP.TRANSPOSE_CONV, inputs, full, _OPTIONS.TransposeConvOptions, options)
        if full is not output:
            starts = (0, op.pads[0], op.pads[1], 0)
            _strided_slice(emitter, full, starts, (1, 1, 1, 1), output)

    emitter.clamped(node, (op.clamp_min, op.clamp_max), make)


def _gemm(emitter: _Emitter, node: ir.Node) -> None:
    """A 1×1 convolution over a column of rows: LiteRT's FULLY_CONNECTED rounds once, all its other kernels twice."""
    op = ops.QGemm.of(node)
    _require_tflite(node, op.requantize)
    w = const_of(data_input(node, 1))
    assert w is not None
    constants = _product_constants(emitter, node, w[:, None, None, :], 0, op.w_zero_point)
    rows, depth = shape_of(data_input(node))
    source = emitter.reshaped(emitter.of(data_input(node)), (1, rows, 1, depth), f"{node.name}.column")
    padding = Padded("valid", (1, 1), (0, 0), (0, 0))
    emitter.clamped(
        node,
        (op.clamp_min, op.clamp_max),
        lambda output, activation: _dense(emitter, [source, *constants], output, padding, (1, 1), activation),
        shape=(1, rows, 1, len(w)),
    )


def _matmul(emitter: _Emitter, node: ir.Node) -> None:
    op = ops.QMatMul.of(node)
    _require_tflite(node, op.requantize)
    a, b = data_input(node), data_input(node, 1)
    scales = [np.float64(emitter.format(value, node).scale) for value in (a, b, node.outputs[0])]
    _check_factors(node, np.atleast_1d(scales[0] * scales[1] / scales[2]), *_factors(node, 2))

    def make(output: Tensor, activation: int) -> None:
        made = output
        if activation != _ACTIVATION.NONE:
            raise refusal(node, "TFLite's batched product has no activation")
        options = schema.BatchMatMulOptionsT(adjX=False, adjY=False)
        inputs = [emitter.of(a), emitter.of(b)]
        emitter.add(_OP.BATCH_MATMUL, inputs, made, _OPTIONS.BatchMatMulOptions, options)

    emitter.clamped(node, (op.clamp_min, op.clamp_max), make)


# --- elementwise --------------------------------------------------------------------------------------------


def _add(emitter: _Emitter, node: ir.Node) -> None:
    op = ops.QAdd.of(node)
    _require_tflite(node, op.requantize)
    scales = [emitter.format(value, node).scale for value in (data_input(node), data_input(node, 1), node.outputs[0])]
    factors = (op.multiplier_a, op.shift_a, op.multiplier_b, op.shift_b, op.multiplier_y, op.shift_y)
    if arithmetic.add_factors(scales[0], scales[1], scales[2], "tflite") != factors:
        raise refusal(node, "its rescale factors do not follow from its tensors' scales")

    def make(output: Tensor, activation: int) -> None:
        inputs = [emitter.of(data_input(node)), emitter.of(data_input(node, 1))]
        if op.subtract:
            options = schema.SubOptionsT(fusedActivationFunction=activation)
            emitter.add(_OP.SUB, inputs, output, _OPTIONS.SubOptions, options)
        else:
            options = schema.AddOptionsT(fusedActivationFunction=activation)
            emitter.add(_OP.ADD, inputs, output, _OPTIONS.AddOptions, options)

    emitter.clamped(node, (op.clamp_min, op.clamp_max), make)


def _mul(emitter: _Emitter, node: ir.Node) -> None:
    op = ops.QMul.of(node)
    _require_tflite(node, op.requantize)
    a, b, y = (
        np.float32(emitter.format(value, node).scale)
        for value in (data_input(node), data_input(node, 1), node.outputs[0])
    )
    # mul.cc alone computes its factor in float32.
    _check_factors(node, np.atleast_1d(np.float64(a * b / y)), *_factors(node, 2))

    def make(output: Tensor, activation: int) -> None:
        options = schema.MulOptionsT(fusedActivationFunction=activation)
        inputs = [emitter.of(data_input(node)), emitter.of(data_input(node, 1))]
        emitter.add(_OP.MUL, inputs, output, _OPTIONS.MulOptions, options)

    emitter.clamped(node, (op.clamp_min, op.clamp_max), make)


def _requantize(emitter: _Emitter, node: ir.Node) -> None:
    op = ops.QRequantize.of(node)
    _require_tflite(node, op.requantize)
    x, y = data_input(node), node.outputs[0]
    factor = np.float64(emitter.format(x, node).scale) / np.float64(emitter.format(y, node).scale)
    _check_factors(node, np.atleast_1d(factor), *_factors(node, 1))
    limits = np.iinfo(dtype_of(y))
    clamp = (op.clamp_min, op.clamp_max)

    def make(output: Tensor, activation: int) -> None:
        if activation != _ACTIVATION.NONE:
            # QUANTIZE has none; the caller's bounds follow.
            raise AssertionError(activation)
        emitter.add(_OP.QUANTIZE, [emitter.of(x)], output, _OPTIONS.QuantizeOptions, schema.QuantizeOptionsT())

    if clamp == (limits.min, limits.max):
        emitter.clamped(node, clamp, make)
        return
    output = emitter.result(y)
    plain = emitter.temporary(output, output.shape, f"{node.name}.unclamped")
    make(plain, _ACTIVATION.NONE)
    _bound(emitter, plain, clamp, output)


def _bound(emitter: _Emitter, tensor: Tensor, clamp: tuple[int, int], output: Tensor) -> None:
    """MAXIMUM, then MINIMUM."""
    lower = emitter.model.constant("lower", np.array([clamp[0]], tensor.dtype), tensor.format)
    upper = emitter.model.constant("upper", np.array([clamp[1]], tensor.dtype), tensor.format)
    inner = emitter.temporary(tensor, tensor.shape, "bounded")
    options = schema.MaximumMinimumOptionsT()
    emitter.add(_OP.MAXIMUM, [tensor, lower], inner, _OPTIONS.MaximumMinimumOptions, options)
    emitter.add(_OP.MINIMUM, [inner, upper], output, _OPTIONS.MaximumMinimumOptions, options)


def _clip(emitter: _Emitter, node: ir.Node) -> None:
    limits = np.iinfo(dtype_of(node.outputs[0]))
    low, high = const_of(input_of(node, 1)), const_of(input_of(node, 2))
    clamp = (int(limits.min) if low is None else int(low), int(limits.max) if high is None else int(high))
    _bound(emitter, emitter.of(data_input(node)), (min(clamp), clamp[1]), emitter.result(node.outputs[0]))


def _lookup(emitter: _Emitter, node: ir.Node) -> None:
    """LOGISTIC where that kernel computes the same table; else the table itself, read by GATHER."""
    x, y, table = data_input(node), node.outputs[0], const_of(data_input(node, 1))
    assert table is not None
    if _is_logistic(emitter, node, table):
        emitter.add(_OP.LOGISTIC, [emitter.of(x)], emitter.result(y))
        return
    wide = emitter.model.tensor(f"{node.name}.wide", shape_of(x), "int32")
    index = emitter.model.tensor(f"{node.name}.index", shape_of(x), "int32")
    cast = schema.CastOptionsT(inDataType=emitter.of(x).type_code, outDataType=wide.type_code)
    emitter.add(_OP.CAST, [emitter.of(x)], wide, _OPTIONS.CastOptions, cast)
    first = emitter.numbers([-int(np.iinfo(dtype_of(x)).min)], f"{node.name}.first")
    emitter.add(_OP.ADD, [wide, first], index, _OPTIONS.AddOptions, schema.AddOptionsT())
    entries = emitter.model.constant(f"{node.name}.table", table, emitter.format(y, node))
    options = schema.GatherOptionsT(axis=0)
    emitter.add(_OP.GATHER, [entries, index], emitter.result(y), _OPTIONS.GatherOptions, options)


def _is_logistic(emitter: _Emitter, node: ir.Node, table: np.ndarray) -> bool:
    x, y = data_input(node), node.outputs[0]
    fmt, out = emitter.format(x, node), emitter.format(y, node)
    unit = TensorFormat((tflite_functions.LOGISTIC_OUTPUT_SCALE,), int(np.iinfo(dtype_of(y)).min))
    if ops.QLookup.of(node).function != "Sigmoid" or out != unit or dtype_of(x) != dtype_of(y):
        return False
    return np.array_equal(table, tflite_functions.logistic_table(fmt.scale, fmt.zero_point, dtype_of(x)))


def _softmax(emitter: _Emitter, node: ir.Node) -> None:
    op = ops.QSoftmax.of(node)
    x, y, table = data_input(node), node.outputs[0], const_of(data_input(node, 1))
    assert table is not None
    limits = np.iinfo(dtype_of(y))
    if op.inverse_scale != ops.TFLITE_SOFTMAX or (op.clamp_min, op.clamp_max) != (limits.min, limits.max):
        raise refusal(node, "TFLite's softmax has the output scale 1/256 and no activation")
    if not np.array_equal(table, tflite_functions.softmax_table(emitter.format(x, node).scale)):
        raise refusal(node, "its table of exponentials is not the one TFLite computes")
    options = schema.SoftmaxOptionsT(beta=1.0)
    emitter.add(_OP.SOFTMAX, [emitter.of(x)], emitter.result(y), _OPTIONS.SoftmaxOptions, options)


# --- pools and means ----------------------------------------------------------------------------------------


def _max_pool(emitter: _Emitter, node: ir.Node) -> None:
    op = ops.QMaxPool.of(node)
    x, y = data_input(node), node.outputs[0]
    if op.dilations != (1, 1):
        raise refusal(node, "TFLite's pools have no dilation")
    padding = padded(*windows_of(shape_of(x), shape_of(y), op.kernel_shape, op.strides, op.dilations, op.pads))
    source = emitter.padded(emitter.of(x), padding, int(np.iinfo(dtype_of(x)).min), str(node.name))

    def make(output: Tensor, activation: int) -> None:
        options = schema.Pool2DOptionsT(
            padding=_padding(padding),
            strideH=padding.strides[0],
            strideW=padding.strides[1],
            filterHeight=op.kernel_shape[0],
            filterWidth=op.kernel_shape[1],
            fusedActivationFunction=activation,
        )
        emitter.add(_OP.MAX_POOL_2D, [source], output, _OPTIONS.Pool2DOptions, options)

    emitter.clamped(node, (op.clamp_min, op.clamp_max), make)


def _ones(emitter: _Emitter, node: ir.Node, kernel: Shape, channels: int, count: int) -> list[Tensor]:
    """Weights and bias of a depthwise convolution that averages `count` elements."""
    x, y = emitter.format(data_input(node), node), emitter.format(node.outputs[0], node)
    share = np.float32(1 / count)
    multiplier, shift = _factors(node, 1)
    factor = np.atleast_1d(np.float64(x.scale) * np.float64(share) / np.float64(y.scale))
    _check_factors(node, factor, multiplier[-1:], shift[-1:])
    dtype = dtype_of(data_input(node))
    weights = TensorFormat((float(share),), 0)
    bias = TensorFormat((float(np.float32(x.scale) * share),), 0)
    return [
        emitter.model.constant(f"{node.name}.ones", np.ones((1, *kernel, channels), dtype), weights, axis=3),
        emitter.model.constant(f"{node.name}.bias", np.zeros(channels, np.int32), bias),
    ]


def _average_pool(emitter: _Emitter, node: ir.Node) -> None:
    op = ops.QAveragePool.of(node)
    _require_tflite(node, op.requantize)
    x, y = data_input(node), node.outputs[0]
    windows = windows_of(shape_of(x), shape_of(y), op.kernel_shape, op.strides, (1, 1), op.pads)
    if not op.count_include_pad and any(window.pad > 0 or window.pad_after > 0 for window in windows):
        raise refusal(node, "windows at the border average fewer elements, and TFLite rounds those before it rescales")
    padding = padded(*windows)
    source = emitter.padded(emitter.of(x), padding, op.x_zero_point, str(node.name))
    constants = _ones(emitter, node, op.kernel_shape, shape_of(x)[3], element_count(op.kernel_shape))
    emitter.clamped(
        node,
        (op.clamp_min, op.clamp_max),
        lambda output, activation: _depthwise(emitter, [source, *constants], output, padding, (1, 1), activation),
    )


def _reduce_mean(emitter: _Emitter, node: ir.Node) -> None:
    """Neighbouring axes become height and width of a map, those after them its channels."""
    op = ops.QReduceMean.of(node)
    _require_tflite(node, op.requantize)
    shape, axes = shape_of(data_input(node)), op.axes
    if axes != tuple(range(axes[0], axes[-1] + 1)):
        raise refusal(node, "it averages axes that are not neighbours")
    outer, inner = element_count(shape[: axes[0]]), element_count(shape[axes[-1] + 1 :])
    kernel = (element_count(shape[axes[0] : axes[-1]]), shape[axes[-1]])
    source = emitter.reshaped(emitter.of(data_input(node)), (outer, *kernel, inner), f"{node.name}.map")
    constants = _ones(emitter, node, kernel, inner, element_count(kernel))
    padding = Padded("valid", (1, 1), (0, 0), (0, 0))
    emitter.clamped(
        node,
        (op.clamp_min, op.clamp_max),
        lambda output, activation: _depthwise(emitter, [source, *constants], output, padding, (1, 1), activation),
        shape=(outer, 1, 1, inner),
    )


# --- movement -----------------------------------------------------------------------------------------------


def _reshape(emitter: _Emitter, node: ir.Node) -> None:
    emitter.reshape(emitter.of(data_input(node)), emitter.result(node.outputs[0]))


def _transpose(emitter: _Emitter, node: ir.Node) -> None:
    x = data_input(node)
    perm = ints(node, "perm", tuple(reversed(range(len(shape_of(x))))))
    inputs = [emitter.of(x), emitter.numbers(perm, "perm")]
    output = emitter.result(node.outputs[0])
    emitter.add(_OP.TRANSPOSE, inputs, output, _OPTIONS.TransposeOptions, schema.TransposeOptionsT())


def _concat(emitter: _Emitter, node: ir.Node) -> None:
    inputs = [emitter.of(value) for value in node.inputs if value is not None]
    axis = integer(node, "axis") % len(inputs[0].shape)
    options = schema.ConcatenationOptionsT(axis=axis, fusedActivationFunction=_ACTIVATION.NONE)
    output = emitter.result(node.outputs[0])
    emitter.add(_OP.CONCATENATION, inputs, output, _OPTIONS.ConcatenationOptions, options)


def _slice(emitter: _Emitter, node: ir.Node) -> None:
    x = data_input(node)
    starts, axes, steps = (const_of(input_of(node, index)) for index in (1, 3, 4))
    assert starts is not None
    rank = len(shape_of(x))
    chosen = range(len(starts)) if axes is None else [int(axis) % rank for axis in axes]
    begin, strides = [0] * rank, [1] * rank
    for position, axis in enumerate(chosen):
        size, start = shape_of(x)[axis], int(starts[position])
        begin[axis] = min(max(start + size if start < 0 else start, 0), size)
        strides[axis] = 1 if steps is None else int(steps[position])
    if min(strides) < 1:
        raise refusal(node, "it slices backwards")
    _strided_slice(emitter, emitter.of(x), begin, strides, emitter.result(node.outputs[0]))


def _split(emitter: _Emitter, node: ir.Node) -> None:
    x = data_input(node)
    axis = integer(node, "axis", 0) % len(shape_of(x))
    first = 0
    for value in node.outputs:
        begin = [first if other == axis else 0 for other in range(len(shape_of(x)))]
        _strided_slice(emitter, emitter.of(x), begin, [1] * len(begin), emitter.result(value))
        first += shape_of(value)[axis]


def _strided_slice(
    emitter: _Emitter, tensor: Tensor, begin: Sequence[int], strides: Sequence[int], output: Tensor
) -> None:
    """The elements from `begin` on, `strides` apart, as many as the output holds.

    Along height and width of a map in one go; Vela takes strides along no other axis, so channels are picked by a
    convolution and other axes brought to the width.
    """
    strided = [axis for axis, stride in enumerate(strides) if stride > 1]
    if len(tensor.shape) != 4 or not set(strided) <= {1, 2}:
        for axis in strided:
            tensor, begin, strides = _take_every(emitter, tensor, axis, begin, strides, output.shape[axis])
    if tensor.shape == output.shape:
        emitter.reshape(tensor, output)
        return
    end = [first + (count - 1) * step + 1 for first, count, step in zip(begin, output.shape, strides, strict=True)]
    inputs = [tensor, emitter.numbers(begin, "begin"), emitter.numbers(end, "end"), emitter.numbers(strides, "strides")]
    emitter.add(_OP.STRIDED_SLICE, inputs, output, _OPTIONS.StridedSliceOptions, schema.StridedSliceOptionsT())


def _take_every(
    emitter: _Emitter, tensor: Tensor, axis: int, begin: Sequence[int], strides: Sequence[int], count: int
) -> tuple[Tensor, list[int], list[int]]:
    """Slice one axis as the width of a map; what remains to slice comes back with the result."""
    shape = tensor.shape
    if len(shape) == 4 and axis == 3:
        result = _pick_channels(emitter, tensor, range(begin[3], shape[3], strides[3])[:count])
        return result, [*begin[:3], 0], [*strides[:3], 1]
    as_map = (1, element_count(shape[:axis]), shape[axis], element_count(shape[axis + 1 :]))
    source = emitter.reshaped(tensor, as_map, "strided.map")
    taken = emitter.temporary(tensor, (*as_map[:2], count, as_map[3]), "strided.taken")
    _strided_slice(emitter, source, (0, 0, begin[axis], 0), (1, 1, strides[axis], 1), taken)
    result = emitter.reshaped(taken, (*shape[:axis], count, *shape[axis + 1 :]), "strided")
    rest = [(0, 1) if other == axis else (begin[other], strides[other]) for other in range(len(shape))]
    return result, [first for first, _ in rest], [step for _, step in rest]


def _pick_channels(emitter: _Emitter, tensor: Tensor, channels: Sequence[int]) -> Tensor:
    """A 1×1 convolution whose filters have a single one: elements a byte apart are slow to copy, quick to multiply."""
    assert tensor.format is not None
    filters = np.zeros((len(channels), 1, 1, tensor.shape[3]), tensor.dtype)
    filters[np.arange(len(channels)), 0, 0, list(channels)] = 1
    bias = np.zeros(len(channels), np.int32)
    inputs = [
        tensor,
        emitter.model.constant("pick", filters, TensorFormat((1.0,), 0)),
        emitter.model.constant("pick.bias", bias, TensorFormat((tensor.format.scale,), 0)),
    ]
    output = emitter.temporary(tensor, (*tensor.shape[:3], len(channels)), "picked")
    _dense(emitter, inputs, output, Padded("valid", (1, 1), (0, 0), (0, 0)), (1, 1), _ACTIVATION.NONE)
    return output


def _pad(emitter: _Emitter, node: ir.Node) -> None:
    x = data_input(node)
    pads, fill, axes = (const_of(input_of(node, index)) for index in (1, 2, 3))
    assert pads is not None
    if string(node, "mode", "constant") != "constant" or pads.min() < 0:
        raise refusal(node, "TFLite pads with constants only, and never crops")
    rank = len(shape_of(x))
    chosen = range(rank) if axes is None else [int(axis) % rank for axis in axes]
    table = np.zeros((rank, 2), np.int64)
    for position, axis in enumerate(chosen):
        table[axis] = pads.reshape(2, -1)[:, position]
    value = 0 if fill is None else int(fill.reshape(()))
    emitter.format(x, node)
    emitter.pad(emitter.of(x), table, value, emitter.result(node.outputs[0]))


def _resize_nearest(emitter: _Emitter, node: ir.Node) -> None:
    x, y = data_input(node), node.outputs[0]
    rows, columns = const_of(data_input(node, 1)), const_of(data_input(node, 2))
    assert rows is not None and columns is not None
    for align, half in ((False, False), (False, True), (True, False), (True, True)):
        found = [
            _nearest(size, count, align=align, half=half)
            for size, count in zip(shape_of(x)[1:3], shape_of(y)[1:3], strict=True)
        ]
        if np.array_equal(found[0], rows) and np.array_equal(found[1], columns):
            break
    else:
        raise refusal(node, "no coordinate mode of TFLite picks the same pixels")
    options = schema.ResizeNearestNeighborOptionsT(alignCorners=align, halfPixelCenters=half)
    inputs = [emitter.of(x), emitter.numbers(shape_of(y)[1:3], "size")]
    output = emitter.result(y)
    emitter.add(_OP.RESIZE_NEAREST_NEIGHBOR, inputs, output, _OPTIONS.ResizeNearestNeighborOptions, options)


def _nearest(size: int, count: int, *, align: bool, half: bool) -> np.ndarray:
    """`GetNearestNeighbor` of resize_nearest_neighbor.h, in its float32."""
    whole = align and count > 1
    scale = np.float32(size - 1) / np.float32(count - 1) if whole else np.float32(size) / np.float32(count)
    at = (np.arange(count, dtype=np.float32) + np.float32(0.5 if half else 0)) * scale
    nearest = np.floor(at + np.float32(0.5)) if align else np.floor(at)
    return np.clip(nearest, 0, size - 1).astype(np.int32)


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
"""QResizeLinear is missing: TFLite's weights have 10 bits, ours 11, and its halves round away from zero."""
