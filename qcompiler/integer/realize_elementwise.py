"""Elementwise arithmetic of two tensors, and lookup tables for everything with one."""

import numpy as np
import onnx
import onnx_ir as ir

from qcompiler.errors import QCompilerError
from qcompiler.graph import shape_of
from qcompiler.integer import ops
from qcompiler.integer.builder import Builder, Format, Output, Quantized, real_constant
from qcompiler.integer.facts import LOOKUP_FUNCTIONS
from qcompiler.integer.formats import record
from qcompiler.integer.realize_movement import Forms
from qcompiler.integer.reference import StandardNode
from qcompiler.quant import arithmetic, interpolation, tflite_functions

_ELEMENTWISE: frozenset[str] = LOOKUP_FUNCTIONS | {
    "Add", "And", "BitShift", "Cast", "Ceil", "Clip", "Div", "Equal", "Floor", "Greater", "GreaterOrEqual", "Identity",
    "Less", "LessOrEqual", "Max", "Min", "Mod", "Mul", "Not", "Or", "PRelu", "Pow", "Relu", "Round", "Sign", "Sub",
    "Tan", "Where", "Xor",
}  # fmt: skip
"""Operators whose output element depends on the input elements at its own place only."""


def add(builder: Builder, forms: Forms, node: ir.Node, out: Output) -> ir.Value | None:
    """Add and Sub, broadcasting; one operand may be constant."""
    operands = _operands(builder, forms, node, out)
    if operands is None:
        return None
    a, b = operands
    if a.format.bits != b.format.bits:
        return None
    try:
        factors = arithmetic.add_factors(
            float(a.format.scale), float(b.format.scale), float(out.format.scale), builder.variant, bits=a.format.bits
        )
    except QCompilerError:
        # The scales lie too far apart for the integer formula; floating point has no such limit.
        return None
    op = ops.QAdd(
        int(node.op_type == "Sub"),
        a.format.zero_point,
        b.format.zero_point,
        out.format.zero_point,
        *factors,
        *out.clamp,
        builder.variant,
    )
    return builder.operator(op, [a.value, b.value], out.shape, out.format.dtype, out.name)


def mul(builder: Builder, forms: Forms, node: ir.Node, out: Output) -> ir.Value | None:
    """Mul, broadcasting; one operand may be constant. Div by a constant multiplies by its reciprocal."""
    operands = _operands(builder, forms, node, out)
    if operands is None:
        return None
    a, b = operands
    op = ops.QMul(a.format.zero_point, b.format.zero_point, out.format.zero_point, *out.clamp, builder.variant)
    factor = builder.factor([a.format.scale, b.format.scale], out.format.scale)
    if builder.variant == "tflite":
        # TFLite's mul.cc, unlike its other kernels, computes the factor in float32.
        factor = np.atleast_1d(a.format.scale * b.format.scale / out.format.scale).astype(np.float64)
    factors = builder.encoded(factor, out.name)
    return builder.operator(op, [a.value, b.value, *factors], out.shape, out.format.dtype, out.name)


def _operands(builder: Builder, forms: Forms, node: ir.Node, out: Output) -> tuple[Quantized, Quantized] | None:
    forms_of = [forms.of(value) for value in node.inputs]
    fixed = [real_constant(value) for value in node.inputs]
    if node.op_type == "Div":
        divisor = fixed[1]
        if divisor is None or not divisor.all():
            return None
        forms_of[1], fixed[1] = None, np.float32(1) / divisor
    other = next((form for form in forms_of if form is not None), None)
    if other is None or all(constant is not None for constant in fixed):
        return None
    pair: list[Quantized] = []
    for form, constant in zip(forms_of, fixed, strict=True):
        if form is not None:
            pair.append(form)
        elif constant is not None:
            pair.append(_quantize_constant(builder, constant, other.format.dtype, f"{out.name}.operand"))
        else:
            return None
    return pair[0], pair[1]


def _quantize_constant(builder: Builder, array: np.ndarray, dtype: ir.DataType, hint: str) -> Quantized:
    """Constants over their own range: symmetric and signed, or asymmetric uint8, as the other operand is."""
    low, high = min(float(array.min(initial=0)), 0.0), max(float(array.max(initial=0)), 0.0)
    signed = dtype != ir.DataType.UINT8
    scale = np.float32(max(high, -low) / np.iinfo(dtype.numpy()).max if signed else (high - low) / 255)
    if scale == 0:
        scale = np.float32(1)
    fmt = Format(dtype, scale, 0 if signed else int(np.clip(np.rint(-low / scale), 0, 255)))
    value = builder.constant(fmt.quantize(array), hint)
    record(value, fmt.scale, fmt.zero_point)
    return Quantized(value, fmt)


def lookup(builder: Builder, forms: Forms, value: ir.Value, out: Output) -> ir.Value | None:
    """Any elementwise computation on one quantized tensor and single constants, as a table of its 256 results.

    The table holds what DequantizeLinear, the float operators and QuantizeLinear make of every integer; for a Sigmoid
    on targets of TFLite's arithmetic, what TFLite's kernel makes of it. For 16 bits it holds points of the function,
    and None is returned where straight lines between them would be coarser than `_MOST_STEPS_OFF`.
    """
    expression = _Expression(forms)
    if not expression.add(value) or expression.leaf is None or expression.leaf.shape != shape_of(value):
        return None
    leaf = expression.leaf
    if leaf.format.bits != out.format.bits:
        return None
    function = "+".join(node.op_type for node in expression.nodes)
    if leaf.format.bits == 16:
        table = _interpolated(expression, leaf, value, builder.graph.opset_imports[""], out)
        if table is None:
            return None
        constant = builder.constant(table, f"{out.name}.table")
        return builder.operator(ops.QLookup(function), [leaf.value, constant], out.shape, out.format.dtype, out.name)
    unit = (np.float32(tflite_functions.LOGISTIC_OUTPUT_SCALE), out.format.limits[0])
    kernel = (builder.variant, function, leaf.format.dtype) == ("tflite", "Sigmoid", out.format.dtype)
    if kernel and (out.format.scale, out.format.zero_point) == unit:
        # Within one of the float function, and the same as TFLite's kernel, which has this one output format.
        codes = tflite_functions.logistic_table(
            float(leaf.format.scale), leaf.format.zero_point, out.format.dtype.numpy()
        )
    else:
        everything = leaf.format.dequantize(leaf.format.codes())
        codes = out.format.quantize(expression.evaluate(value, builder.graph.opset_imports[""], everything))
    table = np.clip(codes, *out.clamp).astype(out.format.dtype.numpy())
    constant = builder.constant(table, f"{out.name}.table")
    op = ops.QLookup(function)
    return builder.operator(op, [leaf.value, constant], out.shape, out.format.dtype, out.name)


_MOST_STEPS_OFF = 128
"""Of an output's 65536, that straight lines may be away from a function: half a step of a table of 8 bits."""
_EXACT_OTHERWISE, _FREE = ("Add", "Sub", "Mul", "Div"), ("Clip", "Relu", "Identity")


def _interpolated(
    expression: "_Expression", leaf: Quantized, value: ir.Value, opset: int, out: Output
) -> np.ndarray | None:
    """The table of a function of 16 bits, or None if it is too coarse or if an operator of its own is exact."""
    computing = [node.op_type for node in expression.nodes if node.op_type not in _FREE]
    if not computing or (len(computing) == 1 and computing[0] in _EXACT_OTHERWISE):
        return None

    def steps(q: np.ndarray) -> np.ndarray:
        real = q.astype(np.float32) * leaf.format.scale
        return expression.evaluate(value, opset, real).astype(np.float64) / np.float64(out.format.scale)

    every = np.arange(-(1 << 15), 1 << 15).astype(np.int16)
    table = interpolation.table_of(steps(interpolation.points()), out.clamp)
    off = np.abs(interpolation.interpolate(every, table) - np.clip(steps(every), *out.clamp)).max()
    return table if off <= _MOST_STEPS_OFF else None


class _Expression:
    """The float operators between one quantized tensor and a value."""

    def __init__(self, forms: Forms) -> None:
        self.leaf: Quantized | None = None
        self.nodes: list[ir.Node] = []
        """In execution order."""
        self._forms = forms
        self._leaves: set[ir.Value] = set()
        self._constants: dict[ir.Value, np.ndarray] = {}

    def add(self, value: ir.Value) -> bool:
        """Take in what computes `value`; False if it is not elementwise on a single tensor."""
        if value in self._leaves or value in self._constants:
            return True
        constant = real_constant(value)
        if constant is not None:
            self._constants[value] = constant.reshape(())[()] if constant.size == 1 else constant
            return constant.size == 1
        form = self._forms.of(value)
        if form is not None:
            self._leaves.add(value)
            self.leaf = self.leaf or form
            return self.leaf == form
        node = value.producer()
        if node is None or node.domain not in ("", "ai.onnx") or node.op_type not in _ELEMENTWISE:
            return False
        if node in self.nodes:
            return True
        inputs = [operand for operand in node.inputs if operand is not None]
        if not all(self.add(operand) for operand in inputs):
            return False
        self.nodes.append(node)
        return True

    def evaluate(self, value: ir.Value, opset: int, everything: np.ndarray) -> np.ndarray:
        """`value` where the tensor holds each of these float32 numbers."""
        known: dict[ir.Value, np.ndarray] = {leaf: everything for leaf in self._leaves}
        known |= {constant: np.asarray(array) for constant, array in self._constants.items()}
        for node in self.nodes:
            inputs = [None if operand is None else known[operand] for operand in node.inputs]
            (known[node.outputs[0]],) = StandardNode(node, [onnx.helper.make_opsetid("", opset)])(inputs)
        result = np.broadcast_to(known[value], everything.shape).astype(np.float32)
        # What float makes NaN (a root of a negative) has no integer; zero is in every format.
        return np.nan_to_num(result, nan=0.0, posinf=np.inf, neginf=-np.inf)
