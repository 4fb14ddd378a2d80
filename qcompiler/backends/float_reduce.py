"""Reductions, softmax, normalizations and rankings of float (and, where ONNX has them, integer) tensors.

Each works on a view of the tensor with few dimensions: kept axes first, the axis it works along last or in the middle.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import onnx_ir as ir

from qcompiler.backends import te
from qcompiler.backends.base import HostCode, Kernel, Lowering, placeholder
from qcompiler.backends.schedules.loops import schedule_reduction
from qcompiler.backends.te import Expr, Tensor
from qcompiler.graph import const_of, data_input, element_count, input_of, integer, ints, real, shape_of

Reduction = Literal["sum", "max", "min", "product"]


def _reduced_axes(node: ir.Node) -> tuple[int, ...]:
    rank = len(shape_of(data_input(node)))
    constant = const_of(input_of(node, 1))
    axes = constant.tolist() if constant is not None else ints(node, "axes", ())
    if not axes:
        return () if integer(node, "noop_with_empty_axes", 0) else tuple(range(rank))
    return tuple(sorted(int(axis) % rank for axis in axes))


def _combine(kind: Reduction, element: Expr, axes: Sequence[Expr]) -> Expr:
    combine = {"sum": te.reduce_sum, "max": te.reduce_max, "min": te.reduce_min, "product": te.reduce_product}
    return combine[kind](element, axes)


def reduce(
    kind: Reduction,
    before: Callable[[Expr], Expr] = lambda x: x,
    after: Callable[[Expr, int], Expr] = lambda total, count: total,
) -> Callable[[ir.Node, HostCode], Lowering]:
    """A reduction: `before` on each element, combined, `after` on the result and the number of elements."""

    def lower(node: ir.Node, host: HostCode) -> Lowering:
        shape, axes = shape_of(data_input(node)), _reduced_axes(node)
        kept = [axis for axis in range(len(shape)) if axis not in axes]
        x = placeholder(data_input(node))
        reduced = [te.reduce_axis(shape[axis], f"r{axis}") for axis in axes]

        def element(*index: Expr) -> Expr:
            position = dict(zip(kept, index, strict=False)) | dict(zip(axes, reduced, strict=True))
            value = before(x[tuple(position[axis] for axis in range(len(shape)))])
            return _combine(kind, value, reduced) if reduced else value

        out = tuple(shape[axis] for axis in kept) or (1,)
        accumulator = te.compute(out, element, "accumulator")
        count = element_count(shape[axis] for axis in axes)
        output = te.compute(out, lambda *index: after(accumulator[index], count), "output")
        function = te.prim_func([x, output])
        channels_last = bool(kept) and kept[-1] == len(shape) - 1
        return Kernel(schedule_reduction(function, channels_last=channels_last), (data_input(node),))

    return lower


def arg_extreme(*, largest: bool) -> Callable[[ir.Node, HostCode], Lowering]:
    """ArgMax and ArgMin; int64, the first of equals unless select_last_index."""

    def lower(node: ir.Node, host: HostCode) -> Lowering:
        outer, size, inner = _around(node, integer(node, "axis", 0))
        last = bool(integer(node, "select_last_index", 0))
        x = placeholder(data_input(node), (outer, size, inner))
        k = te.reduce_axis(size, "k")
        best = te.reduce_max if largest else te.reduce_min
        extreme = te.compute((outer, inner), lambda i, j: best(x[i, k, j], [k]), "extreme")
        p = te.reduce_axis(size, "p")
        pick = te.reduce_max if last else te.reduce_min
        missed = te.const(-1 if last else size, "int32")

        def place(i: Expr, j: Expr) -> Expr:
            return pick(te.where(x[i, p, j].equal(extreme[i, j]), p.astype("int32"), missed), [p])

        position = te.compute((outer, inner), place, "position")
        output = te.compute((outer, inner), lambda i, j: position[i, j].astype("int64"), "output")
        return Kernel(te.prim_func([x, output]), (data_input(node),))

    return lower


def _around(node: ir.Node, axis: int) -> tuple[int, int, int]:
    """Elements before, along and after an axis."""
    shape = shape_of(data_input(node))
    axis %= max(len(shape), 1)
    return element_count(shape[:axis]), element_count(shape[axis : axis + 1]), element_count(shape[axis + 1 :])


def softmax(*, logarithm: bool) -> Callable[[ir.Node, HostCode], Lowering]:
    def lower(node: ir.Node, host: HostCode) -> Lowering:
        outer, size, inner = _around(node, integer(node, "axis", -1))
        x = placeholder(data_input(node), (outer, size, inner))
        k, p = te.reduce_axis(size, "k"), te.reduce_axis(size, "p")
        highest = te.compute((outer, inner), lambda i, j: te.reduce_max(x[i, k, j], [k]), "highest")
        shape = (outer, size, inner)
        powers = te.compute(shape, lambda i, c, j: te.exp(x[i, c, j] - highest[i, j]), "powers")
        total = te.compute((outer, inner), lambda i, j: te.reduce_sum(powers[i, p, j], [p]), "total")
        if logarithm:
            output = te.compute(shape, lambda i, c, j: x[i, c, j] - highest[i, j] - te.log(total[i, j]), "output")
        else:
            output = te.compute(shape, lambda i, c, j: powers[i, c, j] / total[i, j], "output")
        return Kernel(te.prim_func([x, output]), (data_input(node),))

    return lower


def _normalized(x: Tensor, epsilon: float, affine: Callable[[Expr, Expr, Expr], Expr]) -> Tensor:
    """Rows of x [rows, length] brought to mean 0 and variance 1, then `affine(value, row, column)`."""
    rows, length = te.shape_of(x)
    k, p = te.reduce_axis(length, "k"), te.reduce_axis(length, "p")
    total = te.compute((rows,), lambda r: te.reduce_sum(x[r, k], [k]), "total")
    average = te.compute((rows,), lambda r: total[r] * (1.0 / length), "average")

    def deviation(r: Expr, column: Expr) -> Expr:
        return x[r, column] - average[r]

    squares = te.compute((rows,), lambda r: te.reduce_sum(deviation(r, p) * deviation(r, p), [p]), "squares")
    factor = te.compute((rows,), lambda r: 1.0 / te.sqrt(squares[r] * (1.0 / length) + epsilon), "factor")
    return te.compute((rows, length), lambda r, c: affine(deviation(r, c) * factor[r], r, c), "output")


def layer_normalization(node: ir.Node, host: HostCode) -> Lowering:
    shape = shape_of(data_input(node))
    axis = integer(node, "axis", -1) % len(shape)
    length = element_count(shape[axis:])
    scale, bias = data_input(node, 1), input_of(node, 2)
    values = [data_input(node), scale, *([bias] if bias is not None else [])]
    x = placeholder(values[0], (element_count(shape[:axis]), length))
    parameters = [placeholder(value, (length,)) for value in values[1:]]

    def affine(value: Expr, row: Expr, column: Expr) -> Expr:
        scaled = value * parameters[0][column]
        return scaled + parameters[1][column] if bias is not None else scaled

    output = _normalized(x, real(node, "epsilon", 1e-5), affine)
    return Kernel(te.prim_func([x, *parameters, output]), tuple(values))


def group_normalization(node: ir.Node, host: HostCode) -> Lowering:
    """GroupNormalization (scale and bias per channel, opset 21) and InstanceNormalization (a group per channel)."""
    n, channels, *spatial = shape_of(data_input(node))
    groups = channels if node.op_type == "InstanceNormalization" else integer(node, "num_groups")
    area = element_count(spatial)
    length = channels // groups * area
    values = [data_input(node, index) for index in range(3)]
    x = placeholder(values[0], (n * groups, length))
    scale, bias = (placeholder(value, (channels,)) for value in values[1:])

    def affine(value: Expr, row: Expr, column: Expr) -> Expr:
        channel = row % groups * (channels // groups) + column // area
        return value * scale[channel] + bias[channel]

    output = _normalized(x, real(node, "epsilon", 1e-5), affine)
    return Kernel(te.prim_func([x, scale, bias, output]), tuple(values))


def lp_normalization(node: ir.Node, host: HostCode) -> Lowering:
    outer, size, inner = _around(node, integer(node, "axis", -1))
    order = integer(node, "p", 2)
    x = placeholder(data_input(node), (outer, size, inner))
    k = te.reduce_axis(size, "k")

    def magnitude(value: Expr) -> Expr:
        return value * value if order == 2 else te.absolute(value)

    total = te.compute((outer, inner), lambda i, j: te.reduce_sum(magnitude(x[i, k, j]), [k]), "total")

    def element(i: Expr, c: Expr, j: Expr) -> Expr:
        return x[i, c, j] / (te.sqrt(total[i, j]) if order == 2 else total[i, j])

    return Kernel(te.prim_func([x, te.compute((outer, size, inner), element, "output")]), (data_input(node),))


def cumulative_sum(node: ir.Node, host: HostCode) -> Lowering:
    """CumSum as sums over a triangle: quadratic, but exact in ONNX's order of summation and never hot."""
    axis = const_of(data_input(node, 1))
    assert axis is not None, f"{node.name}: the axis is not constant"
    outer, size, inner = _around(node, int(axis.item()))
    exclusive, backward = integer(node, "exclusive", 0), bool(integer(node, "reverse", 0))
    x = placeholder(data_input(node), (outer, size, inner))
    zero = te.const(0, x.dtype)
    k = te.reduce_axis(size, "k")

    def element(i: Expr, c: Expr, j: Expr) -> Expr:
        counted = k >= c + exclusive if backward else k <= c - exclusive
        return te.reduce_sum(te.where(counted, x[i, k, j], zero), [k])

    return Kernel(te.prim_func([x, te.compute((outer, size, inner), element, "output")]), (data_input(node),))


def top_k(node: ir.Node, host: HostCode) -> Lowering:
    """TopK by counting, for each element, those that rank before it; equals rank by position."""
    outer, size, inner = _around(node, integer(node, "axis", -1))
    largest = bool(integer(node, "largest", 1))
    count = element_count(shape_of(node.outputs[0])) // (outer * inner)
    x = placeholder(data_input(node), (outer, size, inner))
    k, p, q = te.reduce_axis(size, "k"), te.reduce_axis(size, "p"), te.reduce_axis(size, "q")

    def before(i: Expr, c: Expr, j: Expr) -> Expr:
        other, own = x[i, k, j], x[i, c, j]
        beats = other > own if largest else other < own
        tie = te.all_of(other.equal(own), k < c)
        return te.reduce_sum(te.where(te.any_of(beats, tie), te.const(1, "int32"), te.const(0, "int32")), [k])

    rank = te.compute((outer, size, inner), before, "rank")

    def position(i: Expr, place: Expr, j: Expr) -> Expr:
        found = te.where(rank[i, p, j].equal(place), p.astype("int64"), te.const(0, "int64"))
        return te.reduce_sum(found, [p])

    def chosen(i: Expr, place: Expr, j: Expr) -> Expr:
        found = te.where(rank[i, q, j].equal(place), x[i, q, j], te.const(0, x.dtype))
        return te.reduce_sum(found, [q])

    values = te.compute((outer, count, inner), chosen, "values")
    indices = te.compute((outer, count, inner), position, "indices")
    return Kernel(te.prim_func([x, values, indices]), (data_input(node),))


def _average(total: Expr, count: int) -> Expr:
    return (
        total / count if te.dtype_of(total).startswith("float") else te.truncated_divide(total, te.like(count, total))
    )


def _square(x: Expr) -> Expr:
    return x * x


LOWERINGS: Mapping[str, Callable[[ir.Node, HostCode], Lowering]] = {
    "ArgMax": arg_extreme(largest=True),
    "ArgMin": arg_extreme(largest=False),
    "CumSum": cumulative_sum,
    "GroupNormalization": group_normalization,
    "InstanceNormalization": group_normalization,
    "LayerNormalization": layer_normalization,
    "LogSoftmax": softmax(logarithm=True),
    "LpNormalization": lp_normalization,
    "ReduceL1": reduce("sum", te.absolute),
    "ReduceL2": reduce("sum", _square, lambda total, count: te.sqrt(total)),
    "ReduceLogSum": reduce("sum", after=lambda total, count: te.log(total)),
    "ReduceLogSumExp": reduce("sum", te.exp, lambda total, count: te.log(total)),
    "ReduceMax": reduce("max"),
    "ReduceMean": reduce("sum", after=_average),
    "ReduceMin": reduce("min"),
    "ReduceProd": reduce("product"),
    "ReduceSum": reduce("sum"),
    "ReduceSumSquare": reduce("sum", _square),
    "Softmax": softmax(logarithm=False),
    "TopK": top_k,
}
