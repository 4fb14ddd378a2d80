"""Rewrite operators that carry their own scales (QLinearConv…) as DequantizeLinear → operator → QuantizeLinear."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from qcompiler import graph as g
from qcompiler.errors import QCompilerError

MICROSOFT = "com.microsoft"


class QdqBuilder:
    """Collects the nodes that stand in for one operator; shapes are left to shape inference."""

    def __init__(self, node: ir.Node) -> None:
        self.node = node
        self.graph = g.graph_of(node)
        self.nodes: list[ir.Node] = []

    def constant(self, hint: str, array: np.ndarray) -> ir.Value:
        return g.add_initializer(self.graph, f"{self.node.name}_{hint}", array)

    def emit(
        self,
        op_type: str,
        inputs: list[ir.Value | None],
        dtype: ir.DataType,
        attributes: dict[str, g.Attribute] | None = None,
    ) -> ir.Value:
        hint = f"{self.node.name}_{op_type}_{len(self.nodes)}"
        output = ir.Value(name=g.fresh_name(self.graph, hint), type=ir.TensorType(dtype))
        self.nodes.append(g.make_node(op_type, inputs, [output], attributes, name=hint))
        return output

    def parameters(self, scale: int, zero_point: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Constant scale and zero point (None where absent) at these inputs; of size one, they become scalars."""
        found: list[np.ndarray | None] = []
        for index in (scale, zero_point):
            value = g.input_of(self.node, index)
            array = g.const_of(value)
            if value is not None and array is None:
                raise QCompilerError(
                    f"node {self.node.name!r} ({self.node.op_type}) computes its scale or zero point {value.name!r} at "
                    "run time; only constant ones can be compiled, so export the model with static quantization"
                )
            found.append(array.reshape(()) if array is not None and array.size == 1 else array)
        assert found[0] is not None, f"{self.node.op_type} {self.node.name} lacks input {scale}"
        return found[0], found[1]

    def dequantize(self, index: int, *, scale: int, zero_point: int, axis: int | None = None) -> ir.Value:
        """DequantizeLinear of input `index`; `axis` is where a scale with several entries lies."""
        return self.dequantize_value(g.data_input(self.node, index), *self.parameters(scale, zero_point), axis)

    def dequantize_value(
        self, value: ir.Value, scale: np.ndarray, zero_point: np.ndarray | None, axis: int | None
    ) -> ir.Value:
        if zero_point is not None:
            # One scale with many zero points, or the reverse, is legal in QLinear forms but not in DequantizeLinear.
            scale, zero_point = np.broadcast_arrays(scale, zero_point)
        many = scale.ndim > 0
        if many and axis is None:
            raise QCompilerError(
                f"node {self.node.name!r} ({self.node.op_type}) has several scales for {value.name!r}, "
                "where only one can be compiled"
            )
        inputs: list[ir.Value | None] = [value, self.constant("scale", scale)]
        if zero_point is not None:
            inputs.append(self.constant("zero_point", zero_point))
        attributes: dict[str, g.Attribute] = {"axis": axis} if many and axis is not None else {}
        return self.emit("DequantizeLinear", inputs, ir.DataType.FLOAT, attributes)

    def quantize(self, value: ir.Value, *, scale: int, zero_point: int) -> ir.Value:
        scale_array, zero = self.parameters(scale, zero_point)
        if scale_array.ndim > 0:
            raise QCompilerError(
                f"node {self.node.name!r} ({self.node.op_type}) has several output scales; only one can be compiled"
            )
        zero = np.zeros((), np.uint8) if zero is None else zero
        zero_value = self.constant("zero_point", zero)
        assert zero_value.dtype is not None
        return self.emit("QuantizeLinear", [value, self.constant("scale", scale_array), zero_value], zero_value.dtype)

    def finish(self, output: ir.Value) -> None:
        g.replace_node(self.node, self.nodes, [output])


def _attributes(node: ir.Node, *names: str) -> dict[str, g.Attribute]:
    """Copy the attributes that are present."""
    return {name: node.attributes[name].value for name in names if name in node.attributes}


_CONV = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")
_POOL = ("auto_pad", "ceil_mode", "count_include_pad", "kernel_shape", "pads", "strides")
FLOAT = ir.DataType.FLOAT


def _conv(node: ir.Node) -> None:
    b = QdqBuilder(node)
    inputs: list[ir.Value | None] = [
        b.dequantize(0, scale=1, zero_point=2),
        b.dequantize(3, scale=4, zero_point=5, axis=0),
    ]
    bias = g.input_of(node, 8)
    if bias is not None:
        bias_scale = b.parameters(1, 2)[0] * b.parameters(4, 5)[0]
        inputs.append(b.dequantize_value(bias, np.asarray(bias_scale, np.float32), None, axis=0))
    b.finish(b.quantize(b.emit("Conv", inputs, FLOAT, _attributes(node, *_CONV)), scale=6, zero_point=7))


def _matmul(node: ir.Node) -> None:
    b = QdqBuilder(node)
    left = b.dequantize(0, scale=1, zero_point=2, axis=-2)
    right = b.dequantize(3, scale=4, zero_point=5, axis=-1)
    b.finish(b.quantize(b.emit("MatMul", [left, right], FLOAT), scale=6, zero_point=7))


def _gemm(node: ir.Node) -> None:
    """com.microsoft.QGemm: y = alpha * A' B' + C, where C is int32 in units of alpha * a_scale * b_scale."""
    b = QdqBuilder(node)
    alpha, trans_b = g.real(node, "alpha", 1.0), g.integer(node, "transB", 0)
    inputs: list[ir.Value | None] = [
        b.dequantize(0, scale=1, zero_point=2),
        b.dequantize(3, scale=4, zero_point=5, axis=0 if trans_b else 1),
    ]
    bias = g.input_of(node, 6)
    if bias is not None:
        scale = np.float32(alpha) * b.parameters(1, 2)[0] * b.parameters(4, 5)[0]
        inputs.append(b.dequantize_value(bias, np.asarray(scale, np.float32), None, axis=-1))
    y = b.emit("Gemm", inputs, FLOAT, _attributes(node, "alpha", "transA", "transB"))
    has_output_scale = g.input_of(node, 7) is not None
    b.finish(b.quantize(y, scale=7, zero_point=8) if has_output_scale else y)


def _binary(op_type: str) -> Callable[[ir.Node], None]:
    def rewrite(node: ir.Node) -> None:
        b = QdqBuilder(node)
        y = b.emit(op_type, [b.dequantize(0, scale=1, zero_point=2), b.dequantize(3, scale=4, zero_point=5)], FLOAT)
        b.finish(b.quantize(y, scale=6, zero_point=7))

    return rewrite


def _unary(op_type: str, *attributes: str) -> Callable[[ir.Node], None]:
    def rewrite(node: ir.Node) -> None:
        b = QdqBuilder(node)
        y = b.emit(op_type, [b.dequantize(0, scale=1, zero_point=2)], FLOAT, _attributes(node, *attributes))
        b.finish(b.quantize(y, scale=3, zero_point=4))

    return rewrite


def _pool(op_type: str, *attributes: str) -> Callable[[ir.Node], None]:
    """QLinearAveragePool and QLinearGlobalAveragePool; channels_last becomes a pair of transposes."""

    def rewrite(node: ir.Node) -> None:
        b = QdqBuilder(node)
        x = b.dequantize(0, scale=1, zero_point=2)
        last = g.integer(node, "channels_last", 0) == 1
        if last:
            x = b.emit("Transpose", [x], FLOAT, {"perm": (0, 3, 1, 2)})
        y = b.emit(op_type, [x], FLOAT, _attributes(node, *attributes))
        if last:
            y = b.emit("Transpose", [y], FLOAT, {"perm": (0, 2, 3, 1)})
        b.finish(b.quantize(y, scale=3, zero_point=4))

    return rewrite


def _concat(node: ir.Node) -> None:
    b = QdqBuilder(node)
    parts: list[ir.Value | None] = [
        b.dequantize(i, scale=i + 1, zero_point=i + 2) for i in range(2, len(node.inputs), 3)
    ]
    y = b.emit("Concat", parts, FLOAT, {"axis": g.integer(node, "axis")})
    b.finish(b.quantize(y, scale=0, zero_point=1))


def _softmax(node: ir.Node) -> None:
    """com.microsoft.QLinearSoftmax; its `opset` attribute says whether dimensions after `axis` are flattened (< 13)."""
    b = QdqBuilder(node)
    x = b.dequantize(0, scale=1, zero_point=2)
    if g.integer(node, "opset") >= 13:
        y = b.emit("Softmax", [x], FLOAT, {"axis": g.integer(node, "axis", -1)})
    else:
        shape = b.emit("Shape", [x], ir.DataType.INT64)
        flat = b.emit("Flatten", [x], FLOAT, {"axis": g.integer(node, "axis", 1)})
        y = b.emit("Reshape", [b.emit("Softmax", [flat], FLOAT, {"axis": 1}), shape], FLOAT)
    b.finish(b.quantize(y, scale=3, zero_point=4))


def _standard_domain(node: ir.Node) -> None:
    """com.microsoft.QuantizeLinear and DequantizeLinear are the standard operators of opset 21."""
    b = QdqBuilder(node)
    (output,) = node.outputs
    dtype = ir.DataType.FLOAT if node.op_type == "DequantizeLinear" else output.dtype or ir.DataType.UINT8
    zero_point = g.input_of(node, 2)
    if node.op_type == "QuantizeLinear" and zero_point is not None and zero_point.dtype is not None:
        dtype = zero_point.dtype
    scale = g.const_of(g.data_input(node, 1))
    inputs, attributes = list(node.inputs), _attributes(node, "axis")
    if scale is not None and scale.shape == (1,):
        inputs = [node.inputs[0], b.constant("scale", scale.reshape(()))]
        zero = g.const_of(zero_point)
        inputs += [] if zero is None else [b.constant("zero_point", zero.reshape(()))]
        attributes = {}
    b.finish(b.emit(node.op_type, inputs, dtype, attributes))


REWRITES: tuple[tuple[str, str, Callable[[ir.Node], None]], ...] = (
    ("", "QLinearConv", _conv),
    (MICROSOFT, "QLinearConv", _conv),
    ("", "QLinearMatMul", _matmul),
    (MICROSOFT, "QGemm", _gemm),
    (MICROSOFT, "QLinearAdd", _binary("Add")),
    (MICROSOFT, "QLinearMul", _binary("Mul")),
    (MICROSOFT, "QLinearAveragePool", _pool("AveragePool", *_POOL)),
    (MICROSOFT, "QLinearGlobalAveragePool", _pool("GlobalAveragePool")),
    (MICROSOFT, "QLinearLeakyRelu", _unary("LeakyRelu", "alpha")),
    (MICROSOFT, "QLinearSigmoid", _unary("Sigmoid")),
    (MICROSOFT, "QLinearSoftmax", _softmax),
    (MICROSOFT, "QLinearConcat", _concat),
    (MICROSOFT, "QuantizeLinear", _standard_domain),
    (MICROSOFT, "DequantizeLinear", _standard_domain),
)


class RewriteQLinear(ir.passes.InPlacePass):
    """QLinear* and QGemm, standard or com.microsoft  ⇒  DequantizeLinear → float operator → QuantizeLinear.

    Needs no shapes. Results are those of onnxruntime's fused kernels to within one step of the output: these rescale an
    int32 accumulator where the QDQ form rounds a float32 sum (well under 1% of elements differ), and QLinearSoftmax
    truncates a table of exponentials (a sixth of them differ).

    Raises:
        QCompilerError: scales that are not constant.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        table = {(domain, op_type): rewrite for domain, op_type, rewrite in REWRITES}
        found = [(node, table.get((node.domain, node.op_type))) for node in model.graph]
        for node, rewrite in found:
            if rewrite is not None:
                rewrite(node)
        modified = any(rewrite is not None for _, rewrite in found)
        if modified:
            g.remove_dead(model)
        return ir.passes.PassResult(model, modified=modified)
