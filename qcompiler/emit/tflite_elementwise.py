"""Elementwise operators, tables and softmax as TFLite."""

import numpy as np
import onnx_ir as ir
from ai_edge_litert import schema_py_generated as schema

from qcompiler.emit.tflite_emitter import (
    ACTIVATION,
    OP,
    OPTIONS,
    Emitter,
    check_factors,
    factors_of,
    refusal,
    require_one_width,
    require_tflite,
)
from qcompiler.emit.tflite_model import Tensor
from qcompiler.graph import (
    const_of,
    data_input,
    dtype_of,
    input_of,
    shape_of,
)
from qcompiler.integer import ops
from qcompiler.integer.formats import TensorFormat
from qcompiler.quant import arithmetic, interpolation, tflite_functions


def emit_add(emitter: Emitter, node: ir.Node) -> None:
    op = ops.QAdd.of(node)
    require_tflite(node, op.requantize)
    require_one_width(node)
    eight = dtype_of(data_input(node)).itemsize == 1
    scales = [emitter.format(value, node).scale for value in (data_input(node), data_input(node, 1), node.outputs[0])]
    factors = (op.multiplier_a, op.shift_a, op.multiplier_b, op.shift_b, op.multiplier_y, op.shift_y)
    if arithmetic.add_factors(scales[0], scales[1], scales[2], "tflite", bits=8 if eight else 16) != factors:
        raise refusal(node, "its rescale factors do not follow from its tensors' scales")

    def make(output: Tensor, activation: int) -> None:
        inputs = [emitter.of(data_input(node)), emitter.of(data_input(node, 1))]
        if op.subtract:
            options = schema.SubOptionsT(potScaleInt16=eight, fusedActivationFunction=activation)
            emitter.add(OP.SUB, inputs, output, OPTIONS.SubOptions, options)
        else:
            options = schema.AddOptionsT(potScaleInt16=eight, fusedActivationFunction=activation)
            emitter.add(OP.ADD, inputs, output, OPTIONS.AddOptions, options)

    emitter.clamped(node, (op.clamp_min, op.clamp_max), make)


def emit_mul(emitter: Emitter, node: ir.Node) -> None:
    op = ops.QMul.of(node)
    require_tflite(node, op.requantize)
    require_one_width(node)
    a, b, y = (
        np.float32(emitter.format(value, node).scale)
        for value in (data_input(node), data_input(node, 1), node.outputs[0])
    )
    # mul.cc alone computes its factor in float32.
    check_factors(node, np.atleast_1d(np.float64(a * b / y)), *factors_of(node, 2))

    def make(output: Tensor, activation: int) -> None:
        options = schema.MulOptionsT(fusedActivationFunction=activation)
        inputs = [emitter.of(data_input(node)), emitter.of(data_input(node, 1))]
        emitter.add(OP.MUL, inputs, output, OPTIONS.MulOptions, options)

    emitter.clamped(node, (op.clamp_min, op.clamp_max), make)


def emit_requantize(emitter: Emitter, node: ir.Node) -> None:
    op = ops.QRequantize.of(node)
    require_tflite(node, op.requantize)
    x, y = data_input(node), node.outputs[0]
    factor = np.float64(emitter.format(x, node).scale) / np.float64(emitter.format(y, node).scale)
    check_factors(node, np.atleast_1d(factor), *factors_of(node, 1))
    limits = np.iinfo(dtype_of(y))
    clamp = (op.clamp_min, op.clamp_max)

    def make(output: Tensor, activation: int) -> None:
        if activation != ACTIVATION.NONE:
            # QUANTIZE has none; the caller's bounds follow.
            raise AssertionError(activation)
        emitter.add(OP.QUANTIZE, [emitter.of(x)], output, OPTIONS.QuantizeOptions, schema.QuantizeOptionsT())

    if clamp == (limits.min, limits.max):
        emitter.clamped(node, clamp, make)
        return
    output = emitter.result(y)
    plain = emitter.temporary(output, output.shape, f"{node.name}.unclamped")
    make(plain, ACTIVATION.NONE)
    _bound(emitter, plain, clamp, output)


def emit_clip(emitter: Emitter, node: ir.Node) -> None:
    limits = np.iinfo(dtype_of(node.outputs[0]))
    low, high = const_of(input_of(node, 1)), const_of(input_of(node, 2))
    clamp = (int(limits.min) if low is None else int(low), int(limits.max) if high is None else int(high))
    _bound(emitter, emitter.of(data_input(node)), (min(clamp), clamp[1]), emitter.result(node.outputs[0]))


def _bound(emitter: Emitter, tensor: Tensor, clamp: tuple[int, int], output: Tensor) -> None:
    """MAXIMUM, then MINIMUM."""
    lower = emitter.model.constant("lower", np.array([clamp[0]], tensor.dtype), tensor.format)
    upper = emitter.model.constant("upper", np.array([clamp[1]], tensor.dtype), tensor.format)
    inner = emitter.temporary(tensor, tensor.shape, "bounded")
    options = schema.MaximumMinimumOptionsT()
    emitter.add(OP.MAXIMUM, [tensor, lower], inner, OPTIONS.MaximumMinimumOptions, options)
    emitter.add(OP.MINIMUM, [inner, upper], output, OPTIONS.MaximumMinimumOptions, options)


def emit_lookup(emitter: Emitter, node: ir.Node) -> None:
    """LOGISTIC where that kernel computes the same table; else the table itself, read by GATHER.

    TFLite has interpolated tables of 16 bits only inside kernels whose points are its own, so all 65536 results are
    written.
    """
    x, y, table = data_input(node), node.outputs[0], const_of(data_input(node, 1))
    assert table is not None
    if dtype_of(x) == np.int16:
        table = interpolation.interpolate(np.arange(-(1 << 15), 1 << 15).astype(np.int16), table)
    if _is_logistic(emitter, node, table):
        emitter.add(OP.LOGISTIC, [emitter.of(x)], emitter.result(y))
        return
    wide = emitter.model.tensor(f"{node.name}.wide", shape_of(x), "int32")
    index = emitter.model.tensor(f"{node.name}.index", shape_of(x), "int32")
    cast = schema.CastOptionsT(inDataType=emitter.of(x).type_code, outDataType=wide.type_code)
    emitter.add(OP.CAST, [emitter.of(x)], wide, OPTIONS.CastOptions, cast)
    first = emitter.numbers([-int(np.iinfo(dtype_of(x)).min)], f"{node.name}.first")
    emitter.add(OP.ADD, [wide, first], index, OPTIONS.AddOptions, schema.AddOptionsT())
    entries = emitter.model.constant(f"{node.name}.table", table, emitter.format(y, node))
    options = schema.GatherOptionsT(axis=0)
    emitter.add(OP.GATHER, [entries, index], emitter.result(y), OPTIONS.GatherOptions, options)


def _is_logistic(emitter: Emitter, node: ir.Node, table: np.ndarray) -> bool:
    x, y = data_input(node), node.outputs[0]
    fmt, out = emitter.format(x, node), emitter.format(y, node)
    if dtype_of(x) == np.int16:
        return False
    unit = TensorFormat((tflite_functions.LOGISTIC_OUTPUT_SCALE,), int(np.iinfo(dtype_of(y)).min))
    if ops.QLookup.of(node).function != "Sigmoid" or out != unit or dtype_of(x) != dtype_of(y):
        return False
    return np.array_equal(table, tflite_functions.logistic_table(fmt.scale, fmt.zero_point, dtype_of(x)))


def emit_softmax(emitter: Emitter, node: ir.Node) -> None:
    op = ops.QSoftmax.of(node)
    x, y, table = data_input(node), node.outputs[0], const_of(data_input(node, 1))
    assert table is not None
    limits, wide = np.iinfo(dtype_of(y)), dtype_of(x) == np.int16
    if op.inverse_scale != ops.TFLITE_SOFTMAX or (op.clamp_min, op.clamp_max) != (limits.min, limits.max):
        raise refusal(node, "TFLite's softmax has the output scale 1/256 and no activation")
    made = interpolation.softmax_table if wide else tflite_functions.softmax_table
    if not np.array_equal(table, made(emitter.format(x, node).scale)):
        raise refusal(node, "its table of exponentials is not the one TFLite computes")
    options = schema.SoftmaxOptionsT(beta=1.0)
    emitter.add(OP.SOFTMAX, [emitter.of(x)], emitter.result(y), OPTIONS.SoftmaxOptions, options)
