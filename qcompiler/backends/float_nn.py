"""Convolutions, pools, matrix products and resizing of float tensors, in ONNX's channels-first layout."""

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from qcompiler.backends import te
from qcompiler.backends.base import HostCode, Kernel, Lowering, parameters_of, placeholder
from qcompiler.backends.schedules.loops import schedule_float_conv, schedule_matmul
from qcompiler.backends.te import Expr, Tensor
from qcompiler.graph import Shape, data_input, dtype_of, element_count, input_of, integer, ints, real, shape_of, string
from qcompiler.integer.resize import float_cubic_tables, float_linear_tables, nearest_table, spatial_scales


def window(node: ir.Node, kernel: Shape) -> tuple[Shape, Shape, Shape]:
    """Strides, dilations, and padding before the first element, along each spatial axis."""
    ones = (1,) * len(kernel)
    strides, dilations = ints(node, "strides", ones), ints(node, "dilations", ones)
    mode = string(node, "auto_pad", "NOTSET")
    if mode in ("NOTSET", "VALID"):
        return strides, dilations, ints(node, "pads", (0,) * (2 * len(kernel)))[: len(kernel)]
    size, out = shape_of(data_input(node))[2:], shape_of(node.outputs[0])[2:]
    axes = zip(size, out, kernel, strides, dilations, strict=True)
    total = [max(0, (o - 1) * s + (k - 1) * d + 1 - i) for i, o, k, s, d in axes]
    return strides, dilations, tuple(t // 2 if mode == "SAME_UPPER" else t - t // 2 for t in total)


def _padded(x: Tensor, before: Shape, extents: Sequence[int], fill: float) -> Tensor:
    """x [N,C,…] with `before` elements of `fill` in front of each spatial axis, cut or grown to `extents`."""
    n, c, *size = te.shape_of(x)
    if not any(before) and all(extent <= i for extent, i in zip(extents, size, strict=True)):
        return x

    def element(b: Expr, channel: Expr, *index: Expr) -> Expr:
        source = [i - low for i, low in zip(index, before, strict=True)]
        inside = [test for i, limit in zip(source, size, strict=True) for test in (i >= 0, i < limit)]
        return te.if_then_else(te.inside(*inside), x[(b, channel, *source)], te.const(fill, x.dtype))

    return te.compute((n, c, *extents), element, "padded")


def _extents(out: Shape, kernel: Shape, strides: Shape, dilations: Shape) -> list[int]:
    """How far the windows reach along each axis."""
    return [(o - 1) * s + (k - 1) * d + 1 for o, k, s, d in zip(out, kernel, strides, dilations, strict=True)]


def local_response_normalization(node: ir.Node, host: HostCode) -> Lowering:
    """LRN: x / (bias + alpha / size * Σ x²)^beta, the sum over `size` neighbouring channels."""
    x_value = data_input(node)
    (n, channels, *rest), size = shape_of(x_value), integer(node, "size")
    alpha, beta, bias = real(node, "alpha", 1e-4), real(node, "beta", 0.75), real(node, "bias", 1.0)
    pixels, before = element_count(rest), (size - 1) // 2
    x = placeholder(x_value, (n, channels, pixels))
    k = te.reduce_axis(size, "k")

    def square(b: Expr, c: Expr, p: Expr) -> Expr:
        neighbour = c + k - before
        value = te.if_then_else(
            te.all_of(neighbour >= 0, neighbour < channels), x[b, neighbour, p], te.const(0.0, x.dtype)
        )
        return te.reduce_sum(value * value, [k])

    total = te.compute((n, channels, pixels), square, "total")

    def normalized(*at: Expr) -> Expr:
        base = total[at] * (alpha / size) + bias
        if beta == 0.75:
            # As nearly every network has it; LLVM has no vector code for powers.
            root = te.sqrt(base)
            return x[at] / (root * te.sqrt(root))
        return x[at] / te.power(base, te.const(beta, x.dtype))

    return Kernel(te.prim_func([x, te.compute((n, channels, pixels), normalized, "output")]), (x_value,))


def conv(node: ir.Node, host: HostCode) -> Lowering:
    x_value, w_value, b_value = data_input(node), data_input(node, 1), input_of(node, 2)
    shape, (n, outs, *size) = shape_of(w_value), shape_of(node.outputs[0])
    kernel, depth = shape[2:], shape[1]
    per_group = outs // integer(node, "group", 1)
    strides, dilations, before = window(node, kernel)
    x, w = placeholder(x_value), placeholder(w_value)
    padded = _padded(x, before, _extents(tuple(size), kernel, strides, dilations), 0.0)

    def product(b: Expr, o: Expr, *index: Expr) -> Expr:
        source = [i * s + t * d for i, s, t, d in zip(index, strides, taps, dilations, strict=True)]
        return te.reduce_sum(padded[(b, o // per_group * depth + c, *source)] * w[(o, c, *taps)], [c, *taps])

    c = te.reduce_axis(depth, "c")
    taps = [te.reduce_axis(k, f"t{axis}") for axis, k in enumerate(kernel)]
    return _with_bias(te.compute((n, outs, *size), product, "accumulator"), [x, w], [x_value, w_value], b_value, host)


def _with_bias(
    accumulator: Tensor, tensors: list[Tensor], values: list[ir.Value], bias_value: ir.Value | None, host: HostCode
) -> Kernel:
    """Finish a convolution: [N,O,…] plus a bias per channel."""
    shape = te.shape_of(accumulator)
    if bias_value is None:
        output = te.compute(shape, lambda *index: accumulator[index], "output")
    else:
        bias = placeholder(bias_value)
        output = te.compute(shape, lambda *index: accumulator[index] + bias[index[1]], "output")
        tensors, values = [*tensors, bias], [*values, bias_value]
    function = te.prim_func([*tensors, output])
    return Kernel(schedule_float_conv(function, host, rank=len(shape)), tuple(values))


def conv_transpose(node: ir.Node, host: HostCode) -> Lowering:
    """A convolution, with the kernel turned round, of the input spread out by the strides."""
    x_value, w_value, b_value = data_input(node), data_input(node, 1), input_of(node, 2)
    (_, channels, *size), (n, outs, *out) = shape_of(x_value), shape_of(node.outputs[0])
    kernel, group = shape_of(w_value)[2:], integer(node, "group", 1)
    per_group, depth = outs // group, channels // group
    strides, dilations, _ = window(node, kernel)
    pads = transposed_pads(node, kernel, strides, dilations)
    lead = [(k - 1) * d - p for k, d, p in zip(kernel, dilations, pads, strict=True)]
    x, w = placeholder(x_value), placeholder(w_value)
    extents = _extents(tuple(out), kernel, (1,) * len(kernel), dilations)

    def spread(b: Expr, channel: Expr, *index: Expr) -> Expr:
        source = [i - low for i, low in zip(index, lead, strict=True)]
        tests = [
            test
            for i, s, limit in zip(source, strides, size, strict=True)
            for test in (i >= 0, i < (limit - 1) * s + 1, (i % s).equal(0))
        ]
        at = tuple(i // s for i, s in zip(source, strides, strict=True))
        return te.if_then_else(te.all_of(*tests), x[(b, channel, *at)], te.const(0.0, x.dtype))

    padded = te.compute((n, channels, *extents), spread, "padded")
    c = te.reduce_axis(depth, "c")
    taps = [te.reduce_axis(k, f"t{axis}") for axis, k in enumerate(kernel)]

    def product(b: Expr, o: Expr, *index: Expr) -> Expr:
        source = [i + t * d for i, t, d in zip(index, taps, dilations, strict=True)]
        turned = [k - 1 - t for k, t in zip(kernel, taps, strict=True)]
        channel = o // per_group * depth + c
        return te.reduce_sum(padded[(b, channel, *source)] * w[(channel, o % per_group, *turned)], [c, *taps])

    return _with_bias(te.compute((n, outs, *out), product, "accumulator"), [x, w], [x_value, w_value], b_value, host)


def transposed_pads(node: ir.Node, kernel: Shape, strides: Shape, dilations: Shape) -> Shape:
    """Padding in front of each axis; derived from the output's size if that is what the node gives."""
    size, out = shape_of(data_input(node))[2:], shape_of(node.outputs[0])[2:]
    mode = string(node, "auto_pad", "NOTSET")
    extra = ints(node, "output_padding", (0,) * len(kernel))
    if mode in ("NOTSET", "VALID") and "output_shape" not in node.attributes:
        return ints(node, "pads", (0,) * (2 * len(kernel)))[: len(kernel)]
    axes = zip(size, out, kernel, strides, dilations, extra, strict=True)
    total = [s * (i - 1) + e + (k - 1) * d + 1 - o for i, o, k, s, d, e in axes]
    return tuple(t - t // 2 if mode == "SAME_LOWER" else t // 2 for t in total)


def max_pool(node: ir.Node, host: HostCode) -> Lowering:
    x_value, out = data_input(node), shape_of(node.outputs[0])
    kernel = ints(node, "kernel_shape")
    strides, dilations, before = window(node, kernel)
    dtype = dtype_of(x_value)
    lowest = float(np.finfo(dtype).min) if dtype.kind == "f" else int(np.iinfo(dtype).min)
    x = placeholder(x_value)
    padded = _padded(x, before, _extents(out[2:], kernel, strides, dilations), lowest)
    taps = [te.reduce_axis(k, f"t{axis}") for axis, k in enumerate(kernel)]

    def source(index: Sequence[Expr], taps: Sequence[Expr]) -> list[Expr]:
        return [i * s + t * d for i, s, t, d in zip(index, strides, taps, dilations, strict=True)]

    highest = te.compute(out, lambda b, c, *index: te.reduce_max(padded[(b, c, *source(index, taps))], taps), "output")
    if not has_indices(node):
        return Kernel(te.prim_func([x, highest]), (x_value,))
    size = shape_of(x_value)[2:]
    again = [te.reduce_axis(k, f"i{axis}") for axis, k in enumerate(kernel)]
    beyond = te.const(element_count(size), "int32")

    def first(b: Expr, c: Expr, *index: Expr) -> Expr:
        """Row by row, the first place inside the input that holds the maximum."""
        at = source(index, again)
        places = [i - low for i, low in zip(at, before, strict=True)]
        inside = [test for i, limit in zip(places, size, strict=True) for test in (i >= 0, i < limit)]
        found = te.all_of(*inside, padded[(b, c, *at)].equal(highest[(b, c, *index)]))
        return te.reduce_min(te.where(found, _flat(places, size).astype("int32"), beyond), again)

    place = te.compute(out, first, "place")
    plane, channels = element_count(size), shape_of(x_value)[1]
    by_column = bool(integer(node, "storage_order", 0))

    def index_in_tensor(b: Expr, c: Expr, *index: Expr) -> Expr:
        flat = place[(b, c, *index)].astype("int64")
        if by_column:  # ONNX has that for two axes
            flat = flat % size[-1] * (plane // size[-1]) + flat // size[-1]
        return (b * channels + c).astype("int64") * plane + flat

    indices = te.compute(out, index_in_tensor, "indices")
    return Kernel(te.prim_func([x, highest, indices]), (x_value,))


def _flat(index: Sequence[Expr], size: Shape) -> Expr:
    """A position in a row-major array."""
    flat = index[0]
    for i, limit in zip(index[1:], size[1:], strict=True):
        flat = flat * limit + i
    return flat


def has_indices(node: ir.Node) -> bool:
    """Whether anybody reads a MaxPool's second output, the place of each maximum."""
    return any(output.uses() or output.is_graph_output() for output in node.outputs[1:])


def average_pool(node: ir.Node, host: HostCode) -> Lowering:
    x_value, out = data_input(node), shape_of(node.outputs[0])
    kernel = ints(node, "kernel_shape")
    strides, _, before = window(node, kernel)
    x = placeholder(x_value)
    padded = _padded(x, before, _extents(out[2:], kernel, strides, (1,) * len(kernel)), 0.0)
    taps = [te.reduce_axis(k, f"t{axis}") for axis, k in enumerate(kernel)]

    def total(b: Expr, c: Expr, *index: Expr) -> Expr:
        source = [i * s + t for i, s, t in zip(index, strides, taps, strict=True)]
        return te.reduce_sum(padded[(b, c, *source)], taps)

    accumulator = te.compute(out, total, "accumulator")

    def average(*index: Expr) -> Expr:
        return accumulator[index] / averaged_count(node, index[2:]).astype(x.dtype)

    return Kernel(te.prim_func([x, te.compute(out, average, "output")]), (x_value,))


def averaged_count(node: ir.Node, position: Sequence[Expr]) -> Expr:
    """How many elements an AveragePool divides by, at a position along the spatial axes of its output."""
    size, kernel = shape_of(data_input(node))[2:], ints(node, "kernel_shape")
    strides, _, before = window(node, kernel)
    after = ints(node, "pads", (0,) * (2 * len(kernel)))[len(kernel) :]
    padding_counts = bool(integer(node, "count_include_pad", 0))
    count: Expr | None = None
    for i, s, k, low, high, limit in zip(position, strides, kernel, before, after, size, strict=True):
        start = i * s - low
        first, last = (-low, limit + high) if padding_counts else (0, limit)
        counted = te.minimum(start + k, last) - te.maximum(start, first)
        count = counted if count is None else count * counted
    assert count is not None
    return count


def global_pool(*, maximum: bool) -> Callable[[ir.Node, HostCode], Lowering]:
    def lower(node: ir.Node, host: HostCode) -> Lowering:
        n, c, *size = shape_of(data_input(node))
        area = element_count(size)
        x = placeholder(data_input(node), (n * c, area))
        k = te.reduce_axis(area, "k")
        combine = te.reduce_max if maximum else te.reduce_sum
        total = te.compute((n * c,), lambda r: combine(x[r, k], [k]), "accumulator")
        output = te.compute((n * c,), lambda r: total[r] if maximum else total[r] / float(area), "output")
        return Kernel(te.prim_func([x, output]), (data_input(node),))

    return lower


# --- products ----------------------------------------------------------------------------------------------


def matmul(node: ir.Node, host: HostCode) -> Lowering:
    a_value, b_value = data_input(node), data_input(node, 1)
    a_shape, b_shape = shape_of(a_value), shape_of(b_value)
    # numpy's rule for vectors: a row on the left, a column on the right.
    a_shape = (1, *a_shape) if len(a_shape) == 1 else a_shape
    b_shape = (*b_shape, 1) if len(b_shape) == 1 else b_shape
    batch = np.broadcast_shapes(a_shape[:-2], b_shape[:-2])
    a, b = placeholder(a_value, a_shape), placeholder(b_value, b_shape)
    k = te.reduce_axis(a_shape[-1], "k")

    def product(*index: Expr) -> Expr:
        *outer, row, column = index
        left = a[(*_broadcast(outer, a_shape[:-2]), row, k)]
        right = b[(*_broadcast(outer, b_shape[:-2]), k, column)]
        return te.reduce_sum(left * right, [k])

    shape = (*batch, a_shape[-2], b_shape[-1])
    accumulator = te.compute(shape, product, "accumulator")
    output = te.compute(shape, lambda *index: accumulator[index], "output")
    return Kernel(schedule_matmul(te.prim_func([a, b, output]), host), (a_value, b_value))


def _broadcast(outer: Sequence[Expr], shape: Shape) -> tuple[Expr | int, ...]:
    own = outer[len(outer) - len(shape) :]
    return tuple(0 if dim == 1 else position for position, dim in zip(own, shape, strict=True))


def gemm(node: ir.Node, host: HostCode) -> Lowering:
    a_value, b_value, c_value = data_input(node), data_input(node, 1), input_of(node, 2)
    (m, n), alpha, beta = shape_of(node.outputs[0]), real(node, "alpha", 1.0), real(node, "beta", 1.0)
    a, b = placeholder(a_value), placeholder(b_value)
    a_transposed, b_transposed = integer(node, "transA", 0), integer(node, "transB", 0)
    depth = te.shape_of(a)[0 if a_transposed else 1]
    values, tensors = [a_value, b_value], [a, b]
    if b_transposed:
        # Columns must be contiguous for the vectors of the schedule.
        b = te.compute((depth, n), lambda i, j: tensors[1][j, i], "transposed")
    k = te.reduce_axis(depth, "k")
    accumulator = te.compute(
        (m, n), lambda i, j: te.reduce_sum((a[k, i] if a_transposed else a[i, k]) * b[k, j], [k]), "accumulator"
    )

    def finish(i: Expr, j: Expr) -> Expr:
        total = accumulator[i, j] if alpha == 1 else accumulator[i, j] * alpha
        if c is None:
            return total
        addend = c[0 if rows == 1 else i, 0 if columns == 1 else j]
        return total + (addend if beta == 1 else addend * beta)

    c: Tensor | None = None
    rows, columns = m, n
    if c_value is not None:
        rows, columns = (1, 1, *shape_of(c_value))[-2:]
        c = placeholder(c_value, (rows, columns))
        values, tensors = [*values, c_value], [*tensors, c]
    output = te.compute((m, n), finish, "output")
    return Kernel(schedule_matmul(te.prim_func([*tensors, output]), host), tuple(values))


def einsum(node: ir.Node, host: HostCode) -> Lowering:
    """A sum of products over the letters that the result lacks. Equations with an ellipsis are refused earlier."""
    inputs, result = einsum_letters(string(node, "equation"))
    values = [data_input(node, index) for index in range(len(inputs))]
    sizes = {
        letter: size
        for own, value in zip(inputs, values, strict=True)
        for letter, size in zip(own, shape_of(value), strict=True)
    }
    tensors = [placeholder(value) for value in values]
    summed = {letter: te.reduce_axis(size, letter) for letter, size in sizes.items() if letter not in result}

    def element(*index: Expr) -> Expr:
        position = dict(zip(result, index, strict=False)) | summed
        factors = [
            tensor[tuple(position[letter] for letter in own)] for tensor, own in zip(tensors, inputs, strict=True)
        ]
        product = factors[0]
        for factor in factors[1:]:
            product = product * factor
        return te.reduce_sum(product, list(summed.values())) if summed else product

    out = tuple(sizes[letter] for letter in result) or (1,)
    return Kernel(te.prim_func([*tensors, te.compute(out, element, "output")]), tuple(values))


def einsum_letters(equation: str) -> tuple[list[str], str]:
    """The letters of each operand and of the result; without an arrow, those that occur once, sorted."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    inputs = left.split(",")
    if not arrow:
        joined = "".join(inputs)
        right = "".join(sorted(letter for letter in set(joined) if joined.count(letter) == 1))
    return inputs, right


# --- resizing ----------------------------------------------------------------------------------------------


def resize(node: ir.Node, host: HostCode) -> Lowering:
    x_value, out = data_input(node), shape_of(node.outputs[0])
    size, scales = shape_of(x_value)[2:], spatial_scales(node)
    if string(node, "mode", "nearest") == "nearest":
        tables = [nearest_table(node, i, o, s) for i, o, s in zip(size, out[2:], scales, strict=True)]
        rows, columns = parameters_of(tables)
        x = placeholder(x_value)
        output = te.compute(out, lambda b, c, i, j: x[b, c, rows[i], columns[j]], "output")
        return Kernel(te.prim_func([x, rows, columns, output]), (x_value,), tuple(tables))
    make_tables = float_cubic_tables if string(node, "mode") == "cubic" else float_linear_tables
    tables = list(
        itertools.chain.from_iterable(make_tables(node, i, o, s) for i, o, s in zip(size, out[2:], scales, strict=True))
    )
    y_index, y_weight, x_index, x_weight = parameters_of(tables)
    x = placeholder(x_value)
    taps = range(tables[0].shape[1])

    def element(b: Expr, c: Expr, i: Expr, j: Expr) -> Expr:
        def row(p: int) -> Expr:
            return _total([x[b, c, y_index[i, p], x_index[j, q]] * x_weight[j, q] for q in taps])

        return _total([row(p) * y_weight[i, p] for p in taps])

    output = te.compute(out, element, "output")
    return Kernel(te.prim_func([x, y_index, y_weight, x_index, x_weight, output]), (x_value,), tuple(tables))


def _total(terms: Sequence[Expr]) -> Expr:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


LOWERINGS: Mapping[str, Callable[[ir.Node, HostCode], Lowering]] = {
    "AveragePool": average_pool,
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "Einsum": einsum,
    "Gemm": gemm,
    "GlobalAveragePool": global_pool(maximum=False),
    "GlobalMaxPool": global_pool(maximum=True),
    "LRN": local_response_normalization,
    "MatMul": matmul,
    "MaxPool": max_pool,
    "Resize": resize,
}
