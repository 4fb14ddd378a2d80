"""Recognise activations written out in elementary operators."""

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qcompiler.graph import const_of, data_input, dtype_of, input_of, producer, real, shape_of
from qcompiler.passes.rewriting import Rewrite, constant_operand, is_float, scalar_of, until_settled

_OP_TYPES = ("Relu", "Clip", "Min", "Max", "LeakyRelu", "PRelu", "Mul", "Div")
_SIXTH = 1 / 6


class FuseActivation(ir.passes.InPlacePass):
    """Elementary operators that spell an activation become that activation.

    - Relu, Clip, Min, Max by constants, one after another: one Relu, or one Clip
    - LeakyRelu of slope 0, PRelu of one slope: Relu, LeakyRelu
    - clip(x + 3, 0, 6) / 6: HardSigmoid; x * that: HardSwish
    - x / 2 * (1 + erf(x / sqrt 2)): Gelu, and with tanh(sqrt(2 / pi) * (x + 0.044715 x^3)): Gelu(approximate="tanh")
    - x * tanh(softplus(x)): Mish

    Products match in any order and grouping. x * sigmoid(x) stays: opset 21 has no name for it.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        return until_settled(model, _OP_TYPES, lambda node: is_float(node.outputs[0]) and (_clamp(node) or _fuse(node)))


# --- clamps ------------------------------------------------------------------------------------------------


def clamp_bounds(node: ir.Node) -> tuple[ir.Value, float, float] | None:
    """A node as (x, low, high): y = min(max(x, low), high); None if it is no clamp by constants."""
    x = data_input(node)
    if node.op_type == "Relu":
        return x, 0.0, math.inf
    if node.op_type == "Clip":
        low, high = _bound(input_of(node, 1), -math.inf), _bound(input_of(node, 2), math.inf)
        return None if low is None or high is None else (x, low, high)
    if node.op_type in ("Min", "Max") and len(node.inputs) == 2:
        operands = constant_operand(node)
        if operands is None or operands[1].size != 1 or shape_of(operands[0]) != shape_of(node.outputs[0]):
            return None
        limit = float(operands[1].reshape(()))
        return (operands[0], limit, math.inf) if node.op_type == "Max" else (operands[0], -math.inf, limit)
    return None


def _bound(value: ir.Value | None, default: float) -> float | None:
    return default if value is None else scalar_of(value)


def _clamp(node: ir.Node) -> bool:
    """A clamp, with the clamp before it, in its plainest form."""
    outer = clamp_bounds(node)
    if outer is None:
        return _leaky(node)
    x, low, high = outer
    before = producer(x, "Relu", "Clip", "Min", "Max")
    inner = clamp_bounds(before) if before is not None else None
    if inner is not None:
        x = inner[0]
        low, high = (min(max(limit, low), high) for limit in inner[1:])
    low = min(low, high)  # ONNX: with the bounds crossed, the upper one holds
    relu = low == 0 and high == math.inf
    if inner is None and (relu if node.op_type == "Relu" else node.op_type == "Clip" and not relu):
        return False
    if low == -math.inf and high == math.inf:
        return False
    rewrite = Rewrite(node)
    if relu:
        return rewrite.replace(rewrite.node("Relu", [x], layer=node))
    dtype = dtype_of(x)
    minimum = rewrite.constant(np.array(low, dtype), f"{node.name}_min") if low != -math.inf else None
    maximum = [rewrite.constant(np.array(high, dtype), f"{node.name}_max")] if high != math.inf else []
    return rewrite.replace(rewrite.node("Clip", [x, minimum, *maximum], layer=node))


def _leaky(node: ir.Node) -> bool:
    rewrite = Rewrite(node)
    if node.op_type == "LeakyRelu" and real(node, "alpha", 0.01) == 0:
        return rewrite.replace(rewrite.node("Relu", [data_input(node)], layer=node))
    slopes = const_of(data_input(node, 1)) if node.op_type == "PRelu" else None
    if slopes is None or np.unique(slopes).size != 1 or shape_of(data_input(node)) != shape_of(node.outputs[0]):
        return False
    return rewrite.replace(rewrite.node("LeakyRelu", [data_input(node)], {"alpha": float(slopes.flat[0])}, layer=node))


# --- products ----------------------------------------------------------------------------------------------


def _factors(value: ir.Value) -> tuple[float, list[ir.Value]]:
    """A value as constant * product of values, looking through Mul, and Div by a constant, of scalars."""
    node = producer(value, "Mul", "Div")
    if node is None:
        return 1.0, [value]
    left, right = data_input(node, 0), data_input(node, 1)
    a, b = scalar_of(left), scalar_of(right)
    if node.op_type == "Div":
        if b is None or b == 0:
            return 1.0, [value]
        constant, rest = _factors(left)
        return constant / b, rest
    constant, rest = 1.0, []
    for operand, scalar in ((left, a), (right, b)):
        part, values = (scalar, []) if scalar is not None else _factors(operand)
        constant *= part
        rest += values
    return constant, rest


def _plus_one(value: ir.Value) -> ir.Value | None:
    """u, if value is u + 1."""
    return _plus(value, 1.0)


def _plus(value: ir.Value, number: float) -> ir.Value | None:
    node = producer(value, "Add")
    operands = constant_operand(node) if node is not None else None
    if operands is None or operands[1].size != 1 or not _close(float(operands[1].reshape(())), number):
        return None
    return operands[0]


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-4)


def _other(values: Sequence[ir.Value]) -> tuple[tuple[ir.Value, ir.Value], ...]:
    """The ways to call one of two factors x and the other f."""
    return ((values[0], values[1]), (values[1], values[0])) if len(values) == 2 else ()


def _fuse(node: ir.Node) -> bool:
    if node.op_type not in ("Mul", "Div"):
        return False
    constant, values = _factors(node.outputs[0])
    found = _hard_sigmoid(constant, values)
    for x, f in _other(values):
        found = found or _gated(constant, x, f)
    if found is None:
        return False
    x, op_type, attributes = found
    if shape_of(x) != shape_of(node.outputs[0]):
        return False
    rewrite = Rewrite(node)
    return rewrite.replace(rewrite.node(op_type, [x], attributes, layer=node))


Activation = tuple[ir.Value, str, dict[str, float | str]]


def _hard_sigmoid(constant: float, values: Sequence[ir.Value]) -> Activation | None:
    x = _relu6_of_plus_3(values[0]) if len(values) == 1 and _close(constant, _SIXTH) else None
    return (x, "HardSigmoid", {"alpha": _SIXTH, "beta": 0.5}) if x is not None else None


def _relu6_of_plus_3(value: ir.Value) -> ir.Value | None:
    clip = producer(value, "Clip")
    bounds = clamp_bounds(clip) if clip is not None else None
    return _plus(bounds[0], 3.0) if bounds is not None and bounds[1:] == (0.0, 6.0) else None


def _gated(constant: float, x: ir.Value, f: ir.Value) -> Activation | None:
    """What constant * x * f is, if f is a known gate of x."""
    if _close(constant, _SIXTH) and _relu6_of_plus_3(f) is x:
        return x, "HardSwish", {}
    gate = f.producer()
    if gate is None:
        return None
    if _close(constant, 1) and gate.op_type == "HardSigmoid" and data_input(gate) is x:
        right = _close(real(gate, "alpha", 0.2), _SIXTH) and _close(real(gate, "beta", 0.5), 0.5)
        return (x, "HardSwish", {}) if right else None
    if _close(constant, 1) and gate.op_type == "Tanh":
        softplus = producer(data_input(gate), "Softplus")
        return (x, "Mish", {}) if softplus is not None and data_input(softplus) is x else None
    inner = _plus_one(f)
    function = producer(inner, "Erf", "Tanh")
    if not _close(constant, 0.5) or function is None:
        return None
    factor, arguments = _factors(data_input(function))
    if function.op_type == "Erf":
        return (x, "Gelu", {}) if _close(factor, math.sqrt(0.5)) and arguments == [x] else None
    is_gelu = _close(factor, math.sqrt(2 / math.pi)) and _is_cubic(arguments, x)
    return (x, "Gelu", {"approximate": "tanh"}) if is_gelu else None


def _is_cubic(values: list[ir.Value], x: ir.Value) -> bool:
    """Whether the product is x + 0.044715 x^3, or x * (1 + 0.044715 x^2)."""
    for linear, rest in _other(values):
        square = _plus_one(rest) if linear is x else None
        if square is not None and _is_power(square, x, 2):
            return True
    add = producer(values[0], "Add") if len(values) == 1 else None
    if add is None:
        return False
    left, right = data_input(add, 0), data_input(add, 1)
    return (left is x and _is_power(right, x, 3)) or (right is x and _is_power(left, x, 3))


def _is_power(value: ir.Value, x: ir.Value, exponent: int) -> bool:
    """Whether value is 0.044715 * x^exponent, by Pow or by repeated Mul."""
    constant, values = _factors(value)
    total = 0.0
    for factor in values:
        power = producer(factor, "Pow")
        if factor is x:
            total += 1
        elif power is not None and data_input(power) is x:
            total += scalar_of(data_input(power, 1)) or math.nan
        else:
            return False
    return _close(constant, 0.044715) and total == exponent
