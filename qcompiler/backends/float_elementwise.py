"""ONNX operators that work element by element, for the types ONNX gives them, mostly float32.

Formulas are those of the ONNX operator specification.
"""

import math
from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from qcompiler.backends import te
from qcompiler.backends.base import HostCode, Kernel
from qcompiler.backends.elementwise import Formula, elementwise
from qcompiler.backends.te import Expr
from qcompiler.graph import const_of, data_input, dtype_of, input_of, integer, real, shape_of, string

Unary = Callable[[Expr], Expr]
FormulaOf = Callable[[ir.Node], Formula]


def _map(formula: Unary) -> FormulaOf:
    return lambda node: Formula([data_input(node)], formula)


def _binary(formula: Callable[[Expr, Expr], Expr]) -> FormulaOf:
    return lambda node: Formula([data_input(node), data_input(node, 1)], formula)


def _fold(formula: Callable[[Expr, Expr], Expr]) -> FormulaOf:
    """An operator of any number of inputs, taken together from the left."""

    def lower(node: ir.Node) -> Formula:
        def expression(first: Expr, *others: Expr) -> Expr:
            for other in others:
                first = formula(first, other)
            return first

        return Formula([data_input(node, i) for i in range(len(node.inputs))], expression)

    return lower


def _with(make: Callable[[ir.Node], Unary]) -> FormulaOf:
    """A unary operator with attributes."""
    return lambda node: Formula([data_input(node)], make(node))


def sigmoid(x: Expr) -> Expr:
    return 1.0 / (te.exp(-x) + 1.0)


def softplus(x: Expr) -> Expr:
    # log(1 + e^x) without overflow.
    return te.maximum(x, 0.0) + te.log1p(te.exp(-te.absolute(x)))


def _sign(x: Expr) -> Expr:
    one, zero = te.like(1, x), te.like(0, x)
    return te.where(x > 0, one, te.where(x < 0, te.like(-1, x), zero))


def _divide(a: Expr, b: Expr) -> Expr:
    return a / b if te.dtype_of(a).startswith("float") else te.truncated_divide(a, b)


def _exclusive_or(a: Expr, b: Expr) -> Expr:
    # TVM compares truth values as floats, which LLVM refuses.
    return te.any_of(te.all_of(a, te.negate(b)), te.all_of(te.negate(a), b))


def _equal(a: Expr, b: Expr) -> Expr:
    return te.negate(_exclusive_or(a, b)) if te.dtype_of(a) == "bool" else a.equal(b)


def _power(x: Expr, y: Expr) -> Expr:
    if te.dtype_of(x).startswith("float"):
        return te.power(x, y.astype(te.dtype_of(x)))
    return te.rint(te.power(x.astype("float64"), y.astype("float64"))).astype(te.dtype_of(x))


def power(node: ir.Node) -> Formula:
    """Pow; squares, cubes and roots by constant exponents do without a call of pow."""
    exponent = const_of(input_of(node, 1))
    base = data_input(node)
    simple: Mapping[float, Unary] = {
        1.0: lambda x: x,
        2.0: lambda x: x * x,
        3.0: lambda x: x * x * x,
        0.5: te.sqrt,
        -1.0: lambda x: 1.0 / x,
    }
    if exponent is not None and exponent.size == 1 and dtype_of(base).kind == "f" and float(exponent.item()) in simple:
        return Formula([base], simple[float(exponent.item())])
    return _binary(_power)(node)


def modulo(node: ir.Node) -> Formula:
    truncated = bool(integer(node, "fmod", 0))
    return _binary(te.truncated_modulo if truncated else te.floor_modulo)(node)


def mean(node: ir.Node) -> Formula:
    count = len(node.inputs)

    def expression(first: Expr, *others: Expr) -> Expr:
        for other in others:
            first = first + other
        return first * (1.0 / count)

    return Formula([data_input(node, i) for i in range(count)], expression)


def where(node: ir.Node) -> Formula:
    operands = [data_input(node, index) for index in range(3)]
    return Formula(operands, te.where)


def cast(node: ir.Node) -> Formula:
    source, wanted = dtype_of(data_input(node)), str(dtype_of(node.outputs[0]))
    if wanted == "bool":
        return Formula([data_input(node)], lambda x: te.not_equal(x, te.like(0, x)))
    if source == np.bool_:
        return Formula([data_input(node)], lambda x: te.where(x, te.const(1, wanted), te.const(0, wanted)))
    return Formula([data_input(node)], lambda x: x.astype(wanted))


def clip(node: ir.Node) -> Formula:
    dtype = dtype_of(data_input(node))
    limits = np.finfo(dtype) if dtype.kind == "f" else np.iinfo(dtype)
    low, high = const_of(input_of(node, 1)), const_of(input_of(node, 2))
    lowest, highest = (limits.min if low is None else low.item()), (limits.max if high is None else high.item())
    kind = str(dtype)
    # ONNX wants the maximum wherever the bounds cross, so the upper bound is applied last.
    return Formula(
        [data_input(node)], lambda x: te.minimum(te.maximum(x, te.const(lowest, kind)), te.const(highest, kind))
    )


def prelu(node: ir.Node) -> Formula:
    return Formula([data_input(node), data_input(node, 1)], lambda x, slope: te.where(x < 0, x * slope, x))


def batch_normalization(node: ir.Node) -> Formula:
    """At inference: (x - mean) / sqrt(variance + epsilon) * scale + bias, along axis 1."""
    epsilon, rank = real(node, "epsilon", 1e-5), len(shape_of(data_input(node)))
    constants = [const_of(data_input(node, index)) for index in range(1, 5)]
    arrays = [array.astype(np.float64) for array in constants if array is not None]
    assert len(arrays) == 4, f"{node.name}: statistics are not constant"
    scale, bias, average, variance = arrays
    factor = scale / np.sqrt(variance + epsilon)
    along = [1, -1] + [1] * (rank - 2)
    return Formula(
        [
            data_input(node),
            factor.astype(np.float32).reshape(along),
            (bias - average * factor).astype(np.float32).reshape(along),
        ],
        lambda x, multiplier, offset: x * multiplier + offset,
    )


def _leaky_relu(node: ir.Node) -> Unary:
    slope = real(node, "alpha", 0.01)
    return lambda x: te.where(x < 0, x * slope, x)


def _elu(node: ir.Node) -> Unary:
    alpha = real(node, "alpha", 1.0)
    return lambda x: te.where(x < 0, (te.exp(x) - 1.0) * alpha, x)


def _celu(node: ir.Node) -> Unary:
    alpha = real(node, "alpha", 1.0)
    return lambda x: te.maximum(x, 0.0) + te.minimum((te.exp(x / alpha) - 1.0) * alpha, 0.0)


def _selu(node: ir.Node) -> Unary:
    alpha = real(node, "alpha", 1.67326319217681884765625)
    gamma = real(node, "gamma", 1.05070102214813232421875)
    return lambda x: te.where(x < 0, (te.exp(x) - 1.0) * alpha, x) * gamma


def _gelu(node: ir.Node) -> Unary:
    if string(node, "approximate", "none") == "tanh":
        root = math.sqrt(2 / math.pi)
        return lambda x: x * 0.5 * (te.tanh((x + x * x * x * 0.044715) * root) + 1.0)
    return lambda x: x * 0.5 * (te.erf(x * math.sqrt(0.5)) + 1.0)


def _hard_sigmoid(node: ir.Node) -> Unary:
    alpha, beta = real(node, "alpha", 0.2), real(node, "beta", 0.5)
    return lambda x: te.clamp(x * alpha + beta, 0.0, 1.0)


def _thresholded_relu(node: ir.Node) -> Unary:
    alpha = real(node, "alpha", 1.0)
    return lambda x: te.where(x > alpha, x, te.like(0, x))


def _relu(x: Expr) -> Expr:
    return te.maximum(x, te.like(0, x))


FORMULAS: Mapping[str, FormulaOf] = {
    "Abs": _map(te.absolute),
    "Add": _binary(lambda a, b: a + b),
    "And": _binary(te.all_of),
    "BatchNormalization": batch_normalization,
    "Cast": cast,
    "Ceil": _map(te.ceil),
    "Celu": _with(_celu),
    "Clip": clip,
    "Cos": _map(te.cos),
    "Div": _binary(_divide),
    "Elu": _with(_elu),
    "Equal": _binary(_equal),
    "Erf": _map(te.erf),
    "Exp": _map(te.exp),
    "Floor": _map(te.floor),
    "Gelu": _with(_gelu),
    "Greater": _binary(lambda a, b: a > b),
    "GreaterOrEqual": _binary(lambda a, b: a >= b),
    "HardSigmoid": _with(_hard_sigmoid),
    "HardSwish": _map(lambda x: x * te.clamp(x * (1 / 6) + 0.5, 0.0, 1.0)),
    "LeakyRelu": _with(_leaky_relu),
    "Less": _binary(lambda a, b: a < b),
    "LessOrEqual": _binary(lambda a, b: a <= b),
    "Log": _map(te.log),
    "Max": _fold(te.maximum),
    "Mean": mean,
    "Min": _fold(te.minimum),
    "Mish": _map(lambda x: x * te.tanh(softplus(x))),
    "Mod": modulo,
    "Mul": _binary(lambda a, b: a * b),
    "Neg": _map(lambda x: -x),
    "Not": _map(te.negate),
    "Or": _binary(te.any_of),
    "PRelu": prelu,
    "Pow": power,
    "Reciprocal": _map(lambda x: 1.0 / x),
    "Relu": _map(_relu),
    "Round": _map(te.rint),
    "Selu": _with(_selu),
    "Sigmoid": _map(sigmoid),
    "Sign": _map(_sign),
    "Sin": _map(te.sin),
    "Softplus": _map(softplus),
    "Softsign": _map(lambda x: x / (te.absolute(x) + 1.0)),
    "Sqrt": _map(te.sqrt),
    "Sub": _binary(lambda a, b: a - b),
    "Sum": _fold(lambda a, b: a + b),
    "Tanh": _map(te.tanh),
    "ThresholdedRelu": _with(_thresholded_relu),
    "Where": where,
    "Xor": _binary(_exclusive_or),
}


def _lowered(formula_of: FormulaOf) -> Callable[[ir.Node, HostCode], Kernel]:
    def lower(node: ir.Node, host: HostCode) -> Kernel:
        formula = formula_of(node)
        return elementwise(formula.operands, node.outputs[0], formula.expression, host)

    return lower


LOWERINGS: Mapping[str, Callable[[ir.Node, HostCode], Kernel]] = {
    name: _lowered(formula) for name, formula in FORMULAS.items()
}
