"""Execute an integer graph in numpy: the reading of `integer.ops` that TVM code and the simulator must match.

Integer operators follow `quant.arithmetic`; QuantizeLinear and DequantizeLinear too. Everything else (integer data
movement, float fallbacks) is a standard ONNX operator and runs in onnxruntime, a node at a time, or in
onnx's own reference where onnxruntime has no kernel for the type.

Products are summed by BLAS in floating point, which is exact: every partial sum is an integer below 2^24
(float32) or 2^53 (float64). Sums wrap to int32 as the hardware's do.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from numpy.lib.stride_tricks import sliding_window_view
from onnx.reference import ReferenceEvaluator
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors  # pyright: ignore[reportAttributeAccessIssue]

from qcompiler.graph import QCOMPILER_DOMAIN, Shape, const_of, dtype_of, integer, is_op, shape_of, value_name
from qcompiler.integer import ops
from qcompiler.quant import arithmetic, interpolation, tflite_functions

Array = np.ndarray

_IR_VERSION = 10
"""ONNX IR version of single-node models; onnxruntime refuses versions newer than it knows."""


def execute(
    model: ir.Model, feeds: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None
) -> dict[str, np.ndarray]:
    """Run a model once.

    Args:
        model: an integer graph, or any graph of standard operators.
        feeds: one array per graph input, of its shape and dtype.
        outputs: names of the values to return, inner ones included; the graph outputs if None.

    Returns:
        Arrays by value name.
    """
    return Executor(model).run(feeds, outputs)


class Executor:
    """A model prepared to run many times; keeps the onnxruntime sessions of standard operators."""

    def __init__(self, model: ir.Model) -> None:
        self._graph = model.graph
        self._opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items()]
        self._runners: dict[ir.Node, Callable[[Sequence[Array | None]], Sequence[Array]]] = {}

    def run(self, feeds: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """As `execute`."""
        wanted = [value_name(value) for value in self._graph.outputs] if outputs is None else list(outputs)
        values: dict[ir.Value, Array] = {}
        for value in self._graph.inputs:
            array = np.asarray(feeds[value_name(value)])
            assert array.shape == shape_of(value) and array.dtype == dtype_of(value), (
                f"{value.name} wants {dtype_of(value)}{shape_of(value)}, got {array.dtype}{array.shape}"
            )
            values[value] = array
        for value in self._graph.initializers.values():
            constant = const_of(value)
            if constant is not None:
                values[value] = constant
        for node in self._graph:
            results = self.run_node(node, [None if value is None else values[value] for value in node.inputs])
            values.update(zip(node.outputs, results, strict=True))
        by_name = {value_name(value): array for value, array in values.items()}
        return {name: by_name[name] for name in wanted}

    def run_node(self, node: ir.Node, inputs: Sequence[Array | None]) -> Sequence[Array]:
        """One node of the graph, on arrays for its inputs; None for an absent one."""
        if node not in self._runners:
            self._runners[node] = self._prepare(node)
        return self._runners[node](inputs)

    def _prepare(self, node: ir.Node) -> Callable[[Sequence[Array | None]], Sequence[Array]]:
        if node.domain == QCOMPILER_DOMAIN:
            function = INTEGER_FUNCTIONS[node.op_type]
            form = Form(shape_of(node.outputs[0]), dtype_of(node.outputs[0]))
            return lambda inputs: [function(node, form, *_present(inputs))]
        if is_op(node, "QuantizeLinear"):
            return lambda inputs: [_quantize_linear(node, *_present(inputs))]
        if is_op(node, "DequantizeLinear"):
            return lambda inputs: [_dequantize_linear(node, *_present(inputs))]
        return StandardNode(node, self._opsets)


class StandardNode:
    """One standard operator, as a model of its own. The session is made at the first call, from the arrays it gets."""

    def __init__(self, node: ir.Node, opsets: Sequence[onnx.OperatorSetIdProto]) -> None:
        self._proto = ir.to_proto(node)
        assert isinstance(self._proto, onnx.NodeProto)
        self._proto.input[:] = [f"in{i}" if value is not None else "" for i, value in enumerate(node.inputs)]
        self._proto.output[:] = [f"out{i}" if value.name else "" for i, value in enumerate(node.outputs)]
        self._constant = [const_of(value) is not None for value in node.inputs]
        self._opsets = opsets
        self._run: Callable[[dict[str, Array]], Sequence[Array]] | None = None

    def __call__(self, inputs: Sequence[Array | None]) -> Sequence[Array]:
        given = {f"in{i}": array for i, array in enumerate(inputs) if array is not None}
        if self._run is None:
            self._run = self._make(given)
        return self._run({name: array for name, array in given.items() if not self._constant[int(name[2:])]})

    def _make(self, given: Mapping[str, Array]) -> Callable[[dict[str, Array]], Sequence[Array]]:
        model = self._model(given)
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        try:
            session = onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except (ort_errors.NotImplemented, ort_errors.InvalidGraph):
            evaluator = ReferenceEvaluator(model)
            return lambda feeds: [np.asarray(array) for array in evaluator.run(None, feeds)]
        return lambda feeds: [np.asarray(array) for array in session.run(None, feeds)]

    def _model(self, given: Mapping[str, Array]) -> onnx.ModelProto:
        helper = onnx.helper
        inputs, initializers = [], []
        for name, array in given.items():
            if self._constant[int(name[2:])]:
                initializers.append(
                    onnx.numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)
                )
            else:
                element = helper.np_dtype_to_tensor_dtype(array.dtype)
                inputs.append(helper.make_tensor_value_info(name, element, array.shape))
        outputs = [helper.make_empty_tensor_value_info(name) for name in self._proto.output if name]
        graph = helper.make_graph([self._proto], "node", inputs, outputs, initializers)
        model = helper.make_model(graph, opset_imports=self._opsets, ir_version=_IR_VERSION)
        return onnx.shape_inference.infer_shapes(model)


def _present(inputs: Sequence[Array | None]) -> list[Array]:
    """Inputs up to the first absent one; none of our operators leaves a hole."""
    return [array for array in inputs if array is not None]


def _quantize_linear(node: ir.Node, x: Array, scale: Array, zero_point: Array | None = None) -> Array:
    dtype = dtype_of(node.outputs[0])
    zero_point = np.zeros(scale.shape, dtype) if zero_point is None else zero_point
    return arithmetic.quantize(x, _along(node, scale, x), _along(node, zero_point, x), dtype)


def _dequantize_linear(node: ir.Node, q: Array, scale: Array, zero_point: Array | None = None) -> Array:
    zero_point = np.zeros(scale.shape, np.int32) if zero_point is None else zero_point
    return arithmetic.dequantize(q, _along(node, scale, q), _along(node, zero_point, q))


def _along(node: ir.Node, parameter: Array, x: Array) -> Array:
    """A parameter per channel or per block shaped to broadcast along the node's axis."""
    if block := integer(node, "block_size", 0):
        axis = integer(node, "axis", 1)
        return parameter.take(np.arange(x.shape[axis]) // block, axis)
    if parameter.size == 1:
        return parameter.reshape(())
    shape = [1] * x.ndim
    shape[integer(node, "axis", 1)] = -1
    return parameter.reshape(shape)


# --- the integer operators -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """Shape and dtype of the output."""

    shape: Shape
    dtype: np.dtype


def _minus(x: Array, zero_point: int) -> np.ndarray:
    return x.astype(np.int32) - np.int32(zero_point)


def _matmul(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Exact product of small integers, as int64."""
    bound = float(np.abs(a).max(initial=0)) * float(np.abs(b).max(initial=0)) * a.shape[-1]
    assert bound < 2**53
    exact = np.float32 if bound < 2**24 else np.float64
    return (a.astype(exact) @ b.astype(exact)).astype(np.int64)


def _wrap(acc: np.ndarray) -> np.ndarray:
    return acc.astype(np.int64).astype(np.int32)


def _requantize(
    op: ops.QConv
    | ops.QConvTranspose
    | ops.QGemm
    | ops.QMatMul
    | ops.QMul
    | ops.QAveragePool
    | ops.QReduceMean
    | ops.QRequantize,
    form: Form,
    acc: np.ndarray,
    multiplier: Array,
    shift: Array,
    *,
    wide: bool = False,
) -> Array:
    assert op.requantize in arithmetic.REQUANTIZE_VARIANTS
    clamp = (op.clamp_min, op.clamp_max)
    return arithmetic.requantize(acc, multiplier, shift, op.requantize, op.y_zero_point, clamp, form.dtype, wide=wide)


def _finish(
    op: ops.QConv | ops.QConvTranspose | ops.QGemm | ops.QAveragePool | ops.QReduceMean,
    form: Form,
    x: Array,
    acc: np.ndarray,
    multiplier: Array,
    shift: Array,
) -> Array:
    """Sums over a window: of 16-bit activations as they are, of 8-bit ones wrapped to int32."""
    wide = x.dtype == np.int16
    return _requantize(op, form, acc if wide else _wrap(acc), multiplier, shift, wide=wide)


def _windows(
    x: np.ndarray, kernel: Shape, strides: Shape, pads: Shape, dilations: Shape, size: Shape, fill: int
) -> np.ndarray:
    """View of x [N,H,W,C] as [N,OH,OW,C,KH,KW]. What lies outside x, however far, reads `fill`."""
    reach = [(o - 1) * s + (k - 1) * d + 1 for o, s, k, d in zip(size, strides, kernel, dilations, strict=True)]
    after = [max(0, r - pads[i] - x.shape[1 + i]) for i, r in enumerate(reach)]
    padded = np.pad(x, ((0, 0), (pads[0], after[0]), (pads[1], after[1]), (0, 0)), constant_values=fill)
    extent = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    view = sliding_window_view(padded, extent, axis=(1, 2))
    view = view[:, : reach[0] - extent[0] + 1 : strides[0], : reach[1] - extent[1] + 1 : strides[1]]
    return view[..., :: dilations[0], :: dilations[1]]


def conv(node: ir.Node, form: Form, x: Array, w: Array, bias: Array, multiplier: Array, shift: Array) -> Array:
    """QConv."""
    op = ops.QConv.of(node)
    acc = _convolved(op, form, _minus(x, op.x_zero_point), _minus(w, op.w_zero_point))
    return _finish(op, form, x, acc + bias, multiplier, shift)


def _convolved(op: ops.QConv | ops.QConvDynamic, form: Form, centred: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Sums of products, int64, of the output's shape; zero points are off already."""
    columns = _windows(centred, op.kernel_shape, op.strides, op.pads, op.dilations, form.shape[1:3], 0)
    n, height, width, channels = columns.shape[:4]
    taps = op.kernel_shape[0] * op.kernel_shape[1]
    if op.group == channels == weights.shape[0]:
        acc = np.zeros(form.shape, np.int64)
        for ky in range(op.kernel_shape[0]):
            for kx in range(op.kernel_shape[1]):
                acc += columns[..., ky, kx] * weights[:, ky, kx, 0]
    else:
        depth, outputs = channels // op.group, weights.shape[0] // op.group
        parts = []
        for group in range(op.group):
            part = columns[:, :, :, group * depth : (group + 1) * depth].transpose(0, 1, 2, 4, 5, 3)
            filters = weights[group * outputs : (group + 1) * outputs].reshape(outputs, taps * depth)
            parts.append(_matmul(part.reshape(n * height * width, taps * depth), filters.T))
        acc = np.concatenate(parts, axis=1).reshape(form.shape)
    return acc


def conv_transpose(
    node: ir.Node, form: Form, x: Array, w: Array, bias: Array, multiplier: Array, shift: Array
) -> Array:
    """QConvTranspose: every input pixel is scattered through the kernel."""
    op = ops.QConvTranspose.of(node)
    centred, weights = _minus(x, op.x_zero_point), _minus(w, op.w_zero_point)
    n, height, width, channels = centred.shape
    depth, outputs = channels // op.group, weights.shape[0] // op.group
    rows = (height - 1) * op.strides[0] + (op.kernel_shape[0] - 1) * op.dilations[0] + 1
    cols = (width - 1) * op.strides[1] + (op.kernel_shape[1] - 1) * op.dilations[1] + 1
    rows, cols = max(rows, op.pads[0] + form.shape[1]), max(cols, op.pads[1] + form.shape[2])
    canvas = np.zeros((n, rows, cols, weights.shape[0]), np.int64)
    for ky in range(op.kernel_shape[0]):
        for kx in range(op.kernel_shape[1]):
            top, left = ky * op.dilations[0], kx * op.dilations[1]
            target = canvas[
                :,
                top : top + (height - 1) * op.strides[0] + 1 : op.strides[0],
                left : left + (width - 1) * op.strides[1] + 1 : op.strides[1],
            ]
            for group in range(op.group):
                out = slice(group * outputs, (group + 1) * outputs)
                part = centred[..., group * depth : (group + 1) * depth].reshape(-1, depth)
                target[..., out] += _matmul(part, weights[out, ky, kx].T).reshape(n, height, width, outputs)
    acc = canvas[:, op.pads[0] : op.pads[0] + form.shape[1], op.pads[1] : op.pads[1] + form.shape[2]]
    return _finish(op, form, x, acc + bias, multiplier, shift)


def gemm(node: ir.Node, form: Form, x: Array, w: Array, bias: Array, multiplier: Array, shift: Array) -> Array:
    """QGemm."""
    op = ops.QGemm.of(node)
    acc = _matmul(_minus(x, op.x_zero_point), _minus(w, op.w_zero_point).T)
    return _finish(op, form, x, acc + bias, multiplier, shift)


def conv_dynamic(
    node: ir.Node, form: Form, x: Array, x_scale: Array, x_zero_point: Array, w: Array, w_scale: Array, bias: Array
) -> Array:
    """QConvDynamic."""
    op = ops.QConvDynamic.of(node)
    acc = _convolved(op, form, _minus(x, int(x_zero_point)), _minus(w, op.w_zero_point))
    return _dequantized(op, acc, x_scale, w_scale, bias)


def gemm_dynamic(
    node: ir.Node, form: Form, x: Array, x_scale: Array, x_zero_point: Array, w: Array, w_scale: Array, bias: Array
) -> Array:
    """QGemmDynamic."""
    op = ops.QGemmDynamic.of(node)
    acc = _matmul(_minus(x, int(x_zero_point)), _minus(w, op.w_zero_point).T)
    assert acc.shape == form.shape
    return _dequantized(op, acc, x_scale, w_scale, bias)


def _dequantized(
    op: ops.QConvDynamic | ops.QGemmDynamic, acc: np.ndarray, x_scale: Array, w_scale: Array, bias: Array
) -> Array:
    real = _wrap(acc).astype(np.float32) * (x_scale * w_scale) + bias
    return np.clip(real, np.float32(op.clamp_min), np.float32(op.clamp_max))


def matmul(node: ir.Node, form: Form, a: Array, b: Array, multiplier: Array, shift: Array) -> Array:
    """QMatMul."""
    op = ops.QMatMul.of(node)
    acc = _matmul(_minus(a, op.a_zero_point), _minus(b, op.b_zero_point))
    return _requantize(op, form, _wrap(acc), multiplier, shift)


def add(node: ir.Node, form: Form, a: Array, b: Array) -> Array:
    """QAdd."""
    op = ops.QAdd.of(node)
    assert op.requantize in arithmetic.REQUANTIZE_VARIANTS
    factors = (op.multiplier_a, op.shift_a, op.multiplier_b, op.shift_b, op.multiplier_y, op.shift_y)
    left, right = _minus(a, op.a_zero_point), _minus(b, op.b_zero_point)
    bits = 8 * a.dtype.itemsize
    total = arithmetic.add(left, right, factors, op.requantize, subtract=bool(op.subtract), bits=bits)
    return arithmetic.saturate(total + op.y_zero_point, op.clamp_min, op.clamp_max, form.dtype)


def mul(node: ir.Node, form: Form, a: Array, b: Array, multiplier: Array, shift: Array) -> Array:
    """QMul."""
    op = ops.QMul.of(node)
    acc = _minus(a, op.a_zero_point) * _minus(b, op.b_zero_point)
    return _requantize(op, form, acc, multiplier, shift)


def max_pool(node: ir.Node, form: Form, x: Array) -> Array:
    """QMaxPool."""
    op = ops.QMaxPool.of(node)
    lowest = int(np.iinfo(form.dtype).min)
    windows = _windows(x, op.kernel_shape, op.strides, op.pads, op.dilations, form.shape[1:3], lowest)
    return np.clip(windows.max(axis=(-2, -1)), op.clamp_min, op.clamp_max).astype(form.dtype)


def average_pool(node: ir.Node, form: Form, x: Array, multiplier: Array, shift: Array) -> Array:
    """QAveragePool."""
    op = ops.QAveragePool.of(node)
    geometry = (op.kernel_shape, op.strides, op.pads, (1, 1), form.shape[1:3], 0)
    acc = _windows(_minus(x, op.x_zero_point), *geometry).sum(axis=(-2, -1))
    if op.count_include_pad:
        count = np.full((1, *form.shape[1:3], 1), op.kernel_shape[0] * op.kernel_shape[1])
    else:
        inside = np.ones((1, *x.shape[1:3], 1), np.int32)
        count = _windows(inside, *geometry).sum(axis=(-2, -1))
    return _finish(op, form, x, acc, multiplier[count - 1], shift[count - 1])


def reduce_mean(node: ir.Node, form: Form, x: Array, multiplier: Array, shift: Array) -> Array:
    """QReduceMean."""
    op = ops.QReduceMean.of(node)
    acc = _minus(x, op.x_zero_point).sum(axis=tuple(op.axes), dtype=np.int64).reshape(form.shape)
    return _finish(op, form, x, acc, multiplier, shift)


def requantize(node: ir.Node, form: Form, x: Array, multiplier: Array, shift: Array) -> Array:
    """QRequantize."""
    op = ops.QRequantize.of(node)
    return _requantize(op, form, _minus(x, op.x_zero_point), multiplier, shift)


def lookup(node: ir.Node, form: Form, x: Array, table: Array) -> Array:
    """QLookup."""
    assert node.op_type == "QLookup" and table.dtype == form.dtype
    if x.dtype == np.int16:
        return interpolation.interpolate(x, table)
    return table[x.astype(np.int32) - np.iinfo(x.dtype).min]


def softmax(node: ir.Node, form: Form, x: Array, table: Array) -> Array:
    """QSoftmax."""
    op = ops.QSoftmax.of(node)
    clamp = (op.clamp_min, op.clamp_max)
    if x.dtype == np.int16:
        return arithmetic.saturate(interpolation.softmax(x, table), *clamp, form.dtype)
    if op.inverse_scale == ops.TFLITE_SOFTMAX:
        return tflite_functions.softmax(x, table, op.y_zero_point, clamp, form.dtype)
    return arithmetic.softmax(x.astype(np.int32), table, op.inverse_scale, op.y_zero_point, clamp, form.dtype)


def resize_nearest(node: ir.Node, form: Form, x: Array, y_index: Array, x_index: Array) -> Array:
    """QResizeNearest."""
    assert node.op_type == "QResizeNearest" and x.dtype == form.dtype
    return x[:, y_index][:, :, x_index]


def resize_linear(
    node: ir.Node, form: Form, x: Array, y_index: Array, y_weight: Array, x_index: Array, x_weight: Array
) -> Array:
    """QResizeLinear."""
    assert node.op_type == "QResizeLinear" and x.dtype == form.dtype
    wide = x.astype(np.int64)
    rows = (wide[:, y_index] * y_weight[:, :, None, None]).sum(axis=2)
    total = (rows[:, :, x_index] * x_weight[:, :, None]).sum(axis=3)
    return ((total + (1 << 21)) >> 22).astype(form.dtype)


def weight_only_gemm(
    node: ir.Node, form: Form, x: Array, w: Array, scale: Array, zero_point: Array, bias: Array
) -> Array:
    """WeightOnlyGemm."""
    op = ops.WeightOnlyGemm.of(node)
    assert op.compute in arithmetic.WEIGHT_ONLY_COMPUTES and form.dtype == np.float32
    return arithmetic.weight_only_matmul(x, w, scale, zero_point, op.group, op.compute) + bias


def round_half(node: ir.Node, form: Form, x: Array) -> Array:
    """QRoundHalf."""
    half = np.float16 if ops.QRoundHalf.of(node).half == "float16" else ml_dtypes.bfloat16
    with np.errstate(over="ignore"):
        return x.astype(half).astype(form.dtype)


INTEGER_FUNCTIONS: Mapping[str, Callable[..., Array]] = {
    "QConv": conv,
    "QConvTranspose": conv_transpose,
    "QGemm": gemm,
    "QConvDynamic": conv_dynamic,
    "QGemmDynamic": gemm_dynamic,
    "QMatMul": matmul,
    "QAdd": add,
    "QMul": mul,
    "QMaxPool": max_pool,
    "QAveragePool": average_pool,
    "QReduceMean": reduce_mean,
    "QRequantize": requantize,
    "QLookup": lookup,
    "QSoftmax": softmax,
    "QResizeNearest": resize_nearest,
    "QResizeLinear": resize_linear,
    "QRoundHalf": round_half,
    "WeightOnlyGemm": weight_only_gemm,
}
"""By operator: node, output form, inputs → output."""
