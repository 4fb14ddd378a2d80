"""From a node of the integer graph to what the NPU does for it: a `Work` for an engine, or `Moves` by DMA.

`recipe_of` is the only place that knows operators; planning and emission see works and moves. What cannot be
expressed is answered with a reason.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from qcompiler.backends.npu_emit import Emitter, Index
from qcompiler.backends.npu_tiling import (
    Dims4,
    Grouped,
    MapOperand,
    Repeated,
    Same,
    Sliding,
    Span,
    Stream,
    Tabled,
    Tile,
    Transposed,
    Whole,
    Work,
)
from qcompiler.graph import (
    QCOMPILER_DOMAIN,
    Shape,
    const_of,
    data_input,
    dtype_of,
    element_count,
    input_of,
    integer,
    ints,
    is_op,
    shape_of,
    string,
)
from qcompiler.integer import ops
from qcompiler.integer.facts import facts_of_integer
from qcompiler.integer.sparsity import is_2_of_4, pack_2_of_4
from qcompiler.integer.weight_groups import Groups, groups_of
from qcompiler.integer.weight_types import stored_bits, stored_type
from qcompiler.quant import arithmetic
from qcompiler.simulator import isa
from qcompiler.target import Match, Target


@dataclass(frozen=True)
class Copy:
    """A box of elements from an input of the node to an output.

    The input is seen as `src_shape` and the output as `dst_shape` (reshapes of the value's own shape). Box
    axis k runs along axis `src_axes[k]` of the input from `src_start[k]` in steps of `src_step[k]`, and along axis
    k of the output from `dst_start[k]` on.
    """

    source: int
    src_shape: Shape
    src_axes: tuple[int, ...]
    src_start: Shape
    src_step: Shape
    output: int
    dst_shape: Shape
    dst_start: Shape
    box: Shape

    @property
    def fills_output(self) -> bool:
        return self.box == self.dst_shape

    @property
    def reads_all(self) -> bool:
        """The whole input, in its own order."""
        return self.box == self.src_shape and self.src_axes == tuple(range(len(self.box)))


@dataclass(frozen=True)
class Moves:
    """Pure data movement: fill output 0 with one element, then copy."""

    copies: tuple[Copy, ...]
    fill: bytes | None = None


Recipe = Work | Moves


def recipe_of(node: ir.Node, target: Target) -> Recipe | str:
    """What the NPU does for a node, or one clause that says why it cannot.

    Covers every operator; whether the smallest tile fits the scratchpad is not asked here.
    """
    for value in (node.inputs[0], *node.outputs):
        if value is None or value.dtype not in _types_of(node):
            return _refused_type(node)
        if element_count(shape_of(value)) == 0:
            return "the tensor is empty"
    if node.domain == QCOMPILER_DOMAIN:
        if node.op_type in _PRODUCTS:
            return _PRODUCTS[node.op_type](node, target)
        make = _WORKS.get(node.op_type)
        return make(node) if make is not None else f"the NPU's driver has no {node.op_type}"
    if is_op(node, "Clip"):
        return _clip(node, target)
    if is_op(node, "Transpose"):
        return _transpose(node, target)
    if is_op(node, "Slice"):
        return _slice(node, target)
    make_moves = _MOVES.get(node.op_type) if is_op(node, node.op_type) else None
    return make_moves(node) if make_moves is not None else f"the NPU's driver has no {node.op_type}"


_EIGHT_BITS = (ir.DataType.INT8, ir.DataType.UINT8)
_EIGHT_BITS_ONLY = ("QResizeLinear",)


def _types_of(node: ir.Node) -> tuple[ir.DataType, ...]:
    """Of the feature maps an operator reads and writes."""
    return _EIGHT_BITS if node.op_type in _EIGHT_BITS_ONLY else (*_EIGHT_BITS, ir.DataType.INT16)


def _refused_type(node: ir.Node) -> str:
    return f"{node.op_type} works on {'8-bit' if node.op_type in _EIGHT_BITS_ONLY else '8- and 16-bit'} tensors only"


# --- shapes ----------------------------------------------------------------------------------------------


def as_rows(shape: Shape) -> Dims4:
    """[…, K] as [1, 1, M, K]."""
    depth = shape[-1] if shape else 1
    return 1, 1, element_count(shape) // max(depth, 1), depth


def _maps4(shape: Shape) -> Dims4:
    """NHWC as it is; lower ranks get leading ones; higher ranks become rows."""
    if len(shape) > 4:
        return as_rows(shape)
    n, h, w, c = (*(1,) * (4 - len(shape)), *shape)
    return n, h, w, c


def _broadcast_views(shapes: tuple[Shape, ...], out: Shape) -> tuple[tuple[Dims4, ...], Dims4] | None:
    """Operands and output of a broadcasting operator as four axes each, or None if four do not suffice.

    Neighbouring axes on which every operand behaves alike are merged.
    """
    rank = len(out)
    padded = [(*(1,) * (rank - len(shape)), *shape) for shape in shapes]
    groups: list[tuple[int, ...]] = []
    for axis in range(rank):
        if out[axis] == 1:
            continue
        pattern = tuple(shape[axis] == 1 for shape in padded)
        if groups and pattern == tuple(shape[groups[-1][-1]] == 1 for shape in padded) and rank > 4:
            groups[-1] = (*groups[-1], axis)
        else:
            groups.append((axis,))
    if rank <= 4:
        groups = [(axis,) for axis in range(rank)]
    if len(groups) > 4:
        return None

    def view(shape: Shape) -> Dims4:
        dims = [element_count(shape[axis] for axis in group) for group in groups]
        n, h, w, c = (*(1,) * (4 - len(dims)), *dims)
        return n, h, w, c

    return tuple(view(shape) for shape in padded), view(out)


def _dtype_index(value: ir.Value) -> int:
    return isa.DTYPES.index(str(dtype_of(value)))


def _range_of(value: ir.Value) -> tuple[int, int]:
    info = np.iinfo(dtype_of(value))
    return int(info.min), int(info.max)


def _variant(name: str) -> int:
    return isa.VARIANTS.index(name)


# --- constants -------------------------------------------------------------------------------------------


def _bytes(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array).tobytes()


def _weight_stream(
    weights: np.ndarray, zero_point: int, *, sparse: bool = False, groups: Groups | None = None
) -> Stream:
    """Weights [O, …] as `isa.WEIGHTS` reads them."""
    if groups is not None:
        codes, factors = arithmetic.split_codes(weights, groups.size, weights.ndim - 1, groups.bits)
        less_one = (factors - 1).reshape(factors.shape[0], -1)
        held = arithmetic.pack_bits(less_one.view(np.int8), 4) if groups.factor_bits == 4 else less_one
        packed = [arithmetic.pack_bits(codes.reshape(codes.shape[0], -1), groups.bits), held]
        assert sum(part.shape[1] for part in packed) == groups.row_bytes(weights)
        return Stream(_bytes(np.concatenate(packed, axis=1)), groups.row_bytes(weights))
    if sparse:
        packed = pack_2_of_4(weights.reshape(weights.shape[0], -1))
        return Stream(_bytes(packed), packed.shape[1], "int8", places=packed.shape[1] - weights[0].size // 2)
    rows = weights.reshape(weights.shape[0], -1)
    bits = stored_bits(weights)
    if bits < 8:
        rows = arithmetic.pack_bits(rows, bits)
    dtypes: dict[np.dtype, Literal["int8", "uint8"]] = {np.dtype(np.int8): "int8", np.dtype(np.uint8): "uint8"}
    return Stream(_bytes(rows), rows.nbytes // rows.shape[0], dtypes.get(weights.dtype), zero_point)


def _records(multiplier: np.ndarray, shift: np.ndarray, bias: np.ndarray | None = None) -> bytes:
    """Scale records: bias, multiplier (or the bits of a float32), shift, int32 each, per entry."""
    bits = multiplier.astype(np.float32).view(np.int32) if multiplier.dtype.kind == "f" else multiplier
    columns = (np.zeros_like(shift) if bias is None else bias, bits, shift)
    return _bytes(np.stack([column.astype("<i4") for column in columns], axis=1))


def _scale_stream(node: ir.Node, first: int, *, bias: int | None = None) -> Stream | str:
    """The records from inputs `first` (multiplier) and `first + 1` (shift): per channel if there is a bias."""
    multiplier, shift = const_of(input_of(node, first)), const_of(input_of(node, first + 1))
    offsets = const_of(input_of(node, bias)) if bias is not None else None
    if multiplier is None or shift is None or (bias is not None and offsets is None):
        return "its rescale factors or bias are not constant"
    return Stream(_records(multiplier, shift, offsets), 12 if bias is not None else 0)


RECORD_BYTES = 12
_ONE_RECORD = slice(-RECORD_BYTES, None)


# --- operators with weights ----------------------------------------------------------------------------------


def _conv(node: ir.Node, target: Target) -> Recipe | str:
    op = ops.QConv.of(node)
    ifm, ofm = _maps4(shape_of(data_input(node))), _maps4(shape_of(node.outputs[0]))
    y, x = (Sliding(ifm[1 + i], op.kernel_shape[i], op.strides[i], op.dilations[i], op.pads[i]) for i in range(2))
    return _convolution(node, op, ifm, ofm, y, x, isa.CONV, target)


def _conv_transpose(node: ir.Node, target: Target) -> Recipe | str:
    op = ops.QConvTranspose.of(node)
    ifm, ofm = _maps4(shape_of(data_input(node))), _maps4(shape_of(node.outputs[0]))
    y, x = (Transposed(ifm[1 + i], op.kernel_shape[i], op.strides[i], op.dilations[i], op.pads[i]) for i in range(2))
    return _convolution(node, op, ifm, ofm, y, x, isa.CONV_TRANSPOSE, target)


def _gemm(node: ir.Node, target: Target) -> Recipe | str:
    op = ops.QGemm.of(node)
    ifm, ofm = as_rows(shape_of(data_input(node))), as_rows(shape_of(node.outputs[0]))
    conv = ops.QConv(
        kernel_shape=(1, 1),
        strides=(1, 1),
        pads=(0, 0, 0, 0),
        dilations=(1, 1),
        group=1,
        x_zero_point=op.x_zero_point,
        w_zero_point=op.w_zero_point,
        y_zero_point=op.y_zero_point,
        clamp_min=op.clamp_min,
        clamp_max=op.clamp_max,
        requantize=op.requantize,
    )
    return _convolution(node, conv, ifm, ofm, Sliding(1, 1, 1, 1, 0), Sliding(ifm[2], 1, 1, 1, 0), isa.CONV, target)


def _convolution(
    node: ir.Node,
    op: ops.QConv | ops.QConvTranspose,
    ifm: Dims4,
    ofm: Dims4,
    y: Span,
    x: Span,
    opcode: isa.Opcode,
    target: Target,
) -> Recipe | str:
    weights = const_of(input_of(node, 1))
    if weights is None:
        return "its weights are not constant"
    scales = _scale_stream(node, 3, bias=2)
    if isinstance(scales, str):
        return scales
    in_depth, out_depth = ifm[3] // op.group, ofm[3] // op.group
    groups = groups_of(data_input(node, 1))
    sparse = groups is None and _skips_zeros(node, op, weights, target)
    weights_dtype = isa.SPARSE_WEIGHTS if sparse else isa.DTYPES.index(stored_type(weights))
    if groups is not None:
        weights_dtype = isa.DTYPES.index(f"int{groups.bits}")
    variant = _variant(op.requantize)

    def issue(emit: Emitter, tile: Tile) -> None:
        rows, columns, _ = tile.windows[0]
        emit.call(isa.KERNEL, *op.kernel_shape, *op.strides, *op.dilations, rows.before, columns.before)
        weights_at, scales_at = tile.streams
        size = groups.size if groups is not None else 0
        emit.call(isa.WEIGHTS, weights_at.base, weights_at.offset, weights_dtype, op.w_zero_point, size)
        emit.call(isa.SCALES, scales_at.base, scales_at.offset, variant)
        emit.call(opcode, in_depth, min(out_depth, tile.full_depth) if op.group > 1 else tile.depth)

    c: Span = Grouped(out_depth, in_depth) if op.group > 1 else Whole(ifm[3])
    return Work(
        ofm,
        _dtype_index(node.outputs[0]),
        op.y_zero_point,
        (op.clamp_min, op.clamp_max),
        (MapOperand(0, ifm, y, x, c, _dtype_index(data_input(node)), op.x_zero_point),),
        (_weight_stream(weights, op.w_zero_point, sparse=sparse, groups=groups), scales),
        issue,
        group=out_depth if op.group > 1 else 1,
    )


def _skips_zeros(node: ir.Node, op: ops.QConv | ops.QConvTranspose, weights: np.ndarray, target: Target) -> bool:
    """Whether the weights have the pattern whose zeros the engine skips."""
    if isinstance(op, ops.QConvTranspose) or op.group != 1 or op.w_zero_point or weights.dtype != np.int8:
        return False
    assert target.npu is not None
    if all(engine.sparsity is None for engine in target.npu.engines.values()):
        return False
    facts = facts_of_integer(node)
    match = target.match(facts)
    sparsity = target.npu.engines[match.engine].sparsity if isinstance(match, Match) else None
    return sparsity is not None and facts.precision in sparsity.precisions and is_2_of_4(weights)


# --- pools ---------------------------------------------------------------------------------------------------


def _max_pool(node: ir.Node) -> Recipe | str:
    op = ops.QMaxPool.of(node)
    ifm, ofm = _maps4(shape_of(data_input(node))), _maps4(shape_of(node.outputs[0]))
    y, x = (Sliding(ifm[1 + i], op.kernel_shape[i], op.strides[i], op.dilations[i], op.pads[i]) for i in range(2))

    def issue(emit: Emitter, tile: Tile) -> None:
        rows, columns, _ = tile.windows[0]
        emit.call(isa.KERNEL, *op.kernel_shape, *op.strides, *op.dilations, rows.before, columns.before)
        emit.call(isa.MAX_POOL)

    operand = MapOperand(0, ifm, y, x, Same(), _dtype_index(data_input(node)), 0)
    return Work(ofm, _dtype_index(node.outputs[0]), 0, (op.clamp_min, op.clamp_max), (operand,), (), issue)


def _average_pool(node: ir.Node) -> Recipe | str:
    op = ops.QAveragePool.of(node)
    ifm, ofm = _maps4(shape_of(data_input(node))), _maps4(shape_of(node.outputs[0]))
    y, x = (Sliding(ifm[1 + i], op.kernel_shape[i], op.strides[i], 1, op.pads[i]) for i in range(2))
    inside = all(
        op.pads[i] == 0 and (ofm[1 + i] - 1) * op.strides[i] + op.kernel_shape[i] <= ifm[1 + i] for i in range(2)
    )
    scales = _scale_stream(node, 1)
    if isinstance(scales, str):
        return scales
    whole = bool(op.count_include_pad) or inside
    return _mean(node, op, ifm, ofm, y, x, (*op.kernel_shape, *op.strides), scales, whole)


def _reduce_mean(node: ir.Node) -> Recipe | str:
    op = ops.QReduceMean.of(node)
    shape = shape_of(data_input(node))
    if op.axes != tuple(range(op.axes[0], op.axes[-1] + 1)):
        return "the axes it averages are not neighbours"
    before, after = element_count(shape[: op.axes[0]]), element_count(shape[op.axes[-1] + 1 :])
    scales = _scale_stream(node, 1)
    if isinstance(scales, str):
        return scales
    if len(op.axes) == 2:
        height, width = shape[op.axes[0]], shape[op.axes[1]]
    else:
        height, width = 1, element_count(shape[axis] for axis in op.axes)
    ifm, ofm = (before, height, width, after), (before, 1, 1, after)
    return _mean(
        node, op, ifm, ofm, Sliding(height, height, 1, 1, 0), Sliding(width, width, 1, 1, 0),
        (height, width, 1, 1), scales, True,
    )  # fmt: skip


def _mean(
    node: ir.Node,
    op: ops.QAveragePool | ops.QReduceMean,
    ifm: Dims4,
    ofm: Dims4,
    y: Span,
    x: Span,
    kernel: tuple[int, int, int, int],
    scales: Stream,
    whole: bool,
) -> Recipe:
    """`kernel`: height, width, vertical and horizontal stride. `whole`: every window counts as full."""
    variant = _variant(op.requantize)
    if whole:
        scales = Stream(scales.data[_ONE_RECORD], 0)

    def issue(emit: Emitter, tile: Tile) -> None:
        rows, columns, _ = tile.windows[0]
        emit.call(isa.KERNEL, *kernel, 1, 1, rows.before, columns.before)
        emit.call(isa.SCALES, tile.streams[0].base, tile.streams[0].offset, variant)
        emit.call(isa.AVERAGE_POOL, int(whole))

    operand = MapOperand(0, ifm, y, x, Same(), _dtype_index(data_input(node)), op.x_zero_point)
    clamp = (op.clamp_min, op.clamp_max)
    return Work(ofm, _dtype_index(node.outputs[0]), op.y_zero_point, clamp, (operand,), (scales,), issue)


# --- elementwise ---------------------------------------------------------------------------------------------


def _pair(node: ir.Node, zero_points: tuple[int, int]) -> tuple[Dims4, tuple[MapOperand, ...]] | str:
    """The OFM and both operands of a broadcasting operator."""
    values = (data_input(node, 0), data_input(node, 1))
    views = _broadcast_views((shape_of(values[0]), shape_of(values[1])), shape_of(node.outputs[0]))
    if views is None:
        return "it broadcasts along more axes than the NPU has"
    if dtype_of(values[0]).itemsize != dtype_of(values[1]).itemsize:
        return "its operands are of different widths"
    operands: list[MapOperand] = []
    for index, (value, shape, zero_point) in enumerate(zip(values, views[0], zero_points, strict=True)):
        if value.dtype not in _types_of(node):
            return _refused_type(node)
        y, x, c = (
            Repeated() if size == 1 and full > 1 else Same() for size, full in zip(shape[1:], views[1][1:], strict=True)
        )
        operands.append(MapOperand(index, shape, y, x, c, _dtype_index(value), zero_point))
    return views[1], tuple(operands)


def _add(node: ir.Node) -> Recipe | str:
    op = ops.QAdd.of(node)
    pair = _pair(node, (op.a_zero_point, op.b_zero_point))
    if isinstance(pair, str):
        return pair
    factors = (op.multiplier_a, op.shift_a, op.multiplier_b, op.shift_b, op.multiplier_y, op.shift_y)

    def issue(emit: Emitter, tile: Tile) -> None:
        emit.call(isa.ADD, op.subtract, *factors, _variant(op.requantize))

    clamp = (op.clamp_min, op.clamp_max)
    return Work(pair[0], _dtype_index(node.outputs[0]), op.y_zero_point, clamp, pair[1], (), issue)


def _mul(node: ir.Node) -> Recipe | str:
    op = ops.QMul.of(node)
    pair = _pair(node, (op.a_zero_point, op.b_zero_point))
    scales = _scale_stream(node, 2)
    if isinstance(pair, str) or isinstance(scales, str):
        return pair if isinstance(pair, str) else str(scales)

    def issue(emit: Emitter, tile: Tile) -> None:
        emit.call(isa.SCALES, tile.streams[0].base, tile.streams[0].offset, _variant(op.requantize))
        emit.call(isa.MUL)

    clamp = (op.clamp_min, op.clamp_max)
    return Work(pair[0], _dtype_index(node.outputs[0]), op.y_zero_point, clamp, pair[1], (scales,), issue)


def _unary(
    node: ir.Node,
    zero_points: tuple[int, int],
    clamp: tuple[int, int],
    streams: tuple[Stream, ...],
    issue: Callable[[Emitter, Tile], None],
    *,
    rows: bool = False,
) -> Work:
    """An operator of one feature map, element by element; `rows`: the last axis stays whole."""
    shape = shape_of(data_input(node))
    dims = as_rows(shape) if rows else _maps4(shape)
    operand = MapOperand(0, dims, Same(), Same(), Same(), _dtype_index(data_input(node)), zero_points[0])
    dtype = _dtype_index(node.outputs[0])
    return Work(dims, dtype, zero_points[1], clamp, (operand,), streams, issue, tiled="yx" if rows else "yxc")


def _rescaling(
    node: ir.Node, zero_points: tuple[int, int], clamp: tuple[int, int], scales: Stream, variant: str
) -> Work:
    def issue(emit: Emitter, tile: Tile) -> None:
        emit.call(isa.SCALES, tile.streams[0].base, tile.streams[0].offset, _variant(variant))
        emit.call(isa.REQUANTIZE)

    return _unary(node, zero_points, clamp, (scales,), issue)


def _requantize(node: ir.Node) -> Recipe | str:
    op = ops.QRequantize.of(node)
    scales = _scale_stream(node, 1)
    if isinstance(scales, str):
        return scales
    clamp = (op.clamp_min, op.clamp_max)
    return _rescaling(node, (op.x_zero_point, op.y_zero_point), clamp, scales, op.requantize)


def _clip(node: ir.Node, target: Target) -> Recipe | str:
    """Clip between constants, as a rescale by one in the target's own arithmetic."""
    low, high = _range_of(node.outputs[0])
    bounds = [const_of(input_of(node, index)) for index in (1, 2)]
    if any(bound is None and input_of(node, index + 1) is not None for index, bound in enumerate(bounds)):
        return "its bounds are not constant"
    low = int(bounds[0]) if bounds[0] is not None else low
    high = int(bounds[1]) if bounds[1] is not None else high
    # ONNX: where the bounds cross, every element becomes the upper one.
    low = min(low, high)
    variant = target.quantization.requantize
    multiplier, shift = arithmetic.multipliers(np.ones(1), variant)
    return _rescaling(node, (0, 0), (low, high), Stream(_records(multiplier, shift), 0), variant)


def _lookup(node: ir.Node) -> Recipe | str:
    table = const_of(input_of(node, 1))
    if table is None:
        return "its table is not constant"
    if dtype_of(data_input(node)).itemsize != dtype_of(node.outputs[0]).itemsize:
        return "its table leads to another width"

    def issue(emit: Emitter, tile: Tile) -> None:
        emit.call(isa.LOOKUP, tile.streams[0].base, tile.streams[0].offset)

    return _unary(node, (0, 0), _range_of(node.outputs[0]), (Stream(_bytes(table), 0),), issue)


def _softmax(node: ir.Node) -> Recipe | str:
    op = ops.QSoftmax.of(node)
    table = const_of(input_of(node, 1))
    if table is None:
        return "its table is not constant"

    def issue(emit: Emitter, tile: Tile) -> None:
        emit.call(isa.SOFTMAX, tile.streams[0].base, tile.streams[0].offset, op.inverse_scale)

    streams = (Stream(_bytes(table.astype("<i4")), 0),)
    return _unary(node, (0, op.y_zero_point), (op.clamp_min, op.clamp_max), streams, issue, rows=True)


# --- resize --------------------------------------------------------------------------------------------------


def _resize(node: ir.Node) -> Recipe | str:
    """Both resizes: the tables are streamed whole, and row tiles are unrolled because tables decide what they read."""
    tables = [const_of(input_of(node, index)) for index in range(1, len(node.inputs))]
    arrays = [table.astype("<i4") for table in tables if table is not None]
    if len(arrays) != len(tables):
        return "its tables are not constant"
    linear = node.op_type == "QResizeLinear"
    ifm, ofm = _maps4(shape_of(data_input(node))), _maps4(shape_of(node.outputs[0]))
    rows = arrays[0].reshape(ofm[1], -1)
    y = Tabled(tuple((int(row.min()), int(row.max())) for row in rows))
    entry = 8 if linear else 4  # bytes of one table entry
    starts = np.cumsum([0, *(array.nbytes for array in arrays)])[: len(arrays)]

    def issue(emit: Emitter, tile: Tile) -> None:
        base, origin = tile.streams[0].base, tile.windows[0][0].first
        # The tables of rows come before those of columns.
        at: list[Index] = []
        for index, start in enumerate(starts):
            along = tile.start[0] if index < len(arrays) // 2 else tile.start[1]
            at.append(tile.streams[0].offset + int(start) + along * entry)
        emit.call(isa.RESIZE_LINEAR if linear else isa.RESIZE_NEAREST, base, *at, origin)

    operand = MapOperand(0, ifm, y, Whole(ifm[2]), Same(), _dtype_index(data_input(node)), 0)
    tables_stream = Stream(b"".join(_bytes(array) for array in arrays), 0)
    out = node.outputs[0]
    return Work(ofm, _dtype_index(out), 0, _range_of(out), (operand,), (tables_stream,), issue, unroll=True)


_PRODUCTS: Mapping[str, Callable[[ir.Node, Target], Recipe | str]] = {
    "QConv": _conv,
    "QConvTranspose": _conv_transpose,
    "QGemm": _gemm,
}
_WORKS: Mapping[str, Callable[[ir.Node], Recipe | str]] = {
    "QAdd": _add,
    "QMul": _mul,
    "QMaxPool": _max_pool,
    "QAveragePool": _average_pool,
    "QReduceMean": _reduce_mean,
    "QRequantize": _requantize,
    "QLookup": _lookup,
    "QSoftmax": _softmax,
    "QResizeNearest": _resize,
    "QResizeLinear": _resize,
}


# --- data movement -------------------------------------------------------------------------------------------


def _zeros(rank: int) -> Shape:
    return (0,) * rank


def _ones(rank: int) -> Shape:
    return (1,) * rank


def _reshape(node: ir.Node) -> Recipe | str:
    shape = shape_of(node.outputs[0])
    rank = len(shape)
    axes = tuple(range(rank))
    return Moves((Copy(0, shape, axes, _zeros(rank), _ones(rank), 0, shape, _zeros(rank), shape),))


def _transpose(node: ir.Node, target: Target) -> Recipe | str:
    """By DMA where it finds runs of a burst; else a pool of one element reads along the output's order.

    DMA of single bytes pays a burst for each; the engine reads the scratchpad with any row and column strides.
    """
    source, shape = shape_of(data_input(node)), shape_of(node.outputs[0])
    rank = len(source)
    axes = ints(node, "perm", tuple(reversed(range(rank))))
    swap = _swap(source, axes)
    assert target.npu is not None
    pools = any("MaxPool" in rule.ops for rule in target.npu.rules)
    run = swap[3] * dtype_of(data_input(node)).itemsize if swap is not None else 0
    if swap is None or run >= target.npu.external.burst or not pools:
        return Moves((Copy(0, source, axes, _zeros(rank), _ones(rank), 0, shape, _zeros(rank), shape),))

    def issue(emit: Emitter, tile: Tile) -> None:
        emit.call(isa.KERNEL, 1, 1, 1, 1, 1, 1, 0, 0)
        emit.call(isa.MAX_POOL)

    dtype = _dtype_index(data_input(node))
    operand = MapOperand(0, swap, Same(), Same(), Same(), dtype, 0, transposed=True)
    return Work(swap, dtype, 0, _range_of(node.outputs[0]), (operand,), (), issue)


def _swap(source: Shape, axes: tuple[int, ...]) -> Dims4 | None:
    """[N, B, A, K] if the permutation turns [N, A, B, K] into that, else None."""
    groups: list[list[int]] = []
    for axis in (axis for axis in axes if source[axis] > 1):
        before = groups[-1][-1] if groups else None
        # Axes that stay neighbours, but for axes of length 1 between them, move as one.
        if before is not None and before < axis and element_count(source[before + 1 : axis]) == 1:
            groups[-1].append(axis)
        else:
            groups.append([axis])
    order = tuple(sorted(range(len(groups)), key=lambda group: groups[group][0]))
    sizes = [element_count(source[axis] for axis in group) for group in groups]
    match order:
        case (1, 0):
            return 1, sizes[0], sizes[1], 1
        case (0, 2, 1):
            return sizes[0], sizes[1], sizes[2], 1
        case (1, 0, 2):
            return 1, sizes[0], sizes[1], sizes[2]
        case (0, 2, 1, 3):
            return sizes[0], sizes[1], sizes[2], sizes[3]
        case _:
            return None


def _concat(node: ir.Node) -> Recipe | str:
    shape = shape_of(node.outputs[0])
    rank = len(shape)
    axis = integer(node, "axis") % rank
    copies: list[Copy] = []
    position = 0
    for index in range(len(node.inputs)):
        part = shape_of(data_input(node, index))
        start = tuple(position if k == axis else 0 for k in range(rank))
        if element_count(part):
            copies.append(Copy(index, part, tuple(range(rank)), _zeros(rank), _ones(rank), 0, shape, start, part))
        position += part[axis]
    return Moves(tuple(copies))


def _split(node: ir.Node) -> Recipe | str:
    source = shape_of(data_input(node))
    rank = len(source)
    axis = integer(node, "axis", 0) % rank
    copies: list[Copy] = []
    position = 0
    for index, output in enumerate(node.outputs):
        part = shape_of(output)
        start = tuple(position if k == axis else 0 for k in range(rank))
        copies.append(Copy(0, source, tuple(range(rank)), start, _ones(rank), index, part, _zeros(rank), part))
        position += part[axis]
    return Moves(tuple(copies))


def _slice(node: ir.Node, target: Target) -> Recipe | str:
    """By DMA; every other channel, which has no runs, by a convolution that picks them, on chips that have one."""
    source, shape = shape_of(data_input(node)), shape_of(node.outputs[0])
    rank = len(source)
    constants = [const_of(input_of(node, index)) for index in range(1, 5)]
    if any(constant is None and input_of(node, index + 1) is not None for index, constant in enumerate(constants)):
        return "its starts, ends, axes or steps are not constant"
    starts, _, axes, steps = ([int(item) for item in c.ravel()] if c is not None else None for c in constants)
    assert starts is not None, "Slice has starts"
    axes = axes or list(range(len(starts)))
    steps = steps or [1] * len(starts)
    if min(steps, default=1) < 1:
        return "it slices backwards"
    start, step = [0] * rank, [1] * rank
    for axis, first, stride in zip(axes, starts, steps, strict=True):
        size = source[axis]
        start[axis] = min(max(first + size if first < 0 else first, 0), size)
        step[axis] = stride
    if step[-1] > 1 and shape[-1] > 1 and source[:-1] == shape[:-1] and _multiplies(data_input(node), target):
        channels = np.arange(start[-1], start[-1] + shape[-1] * step[-1], step[-1])
        return _pick(node, channels, target)
    axes_in_order = tuple(range(rank))
    return Moves((Copy(0, source, axes_in_order, tuple(start), tuple(step), 0, shape, _zeros(rank), shape),))


def _multiplies(ifm: ir.Value, target: Target) -> bool:
    """Whether an engine multiplies a feature map by int8 weights."""
    assert target.npu is not None
    pair = f"{dtype_of(ifm)}*int8"
    return any("Conv" in rule.ops and pair in rule.precisions for rule in target.npu.rules)


def _pick(node: ir.Node, channels: np.ndarray, target: Target) -> Work:
    """Some channels of each pixel, by a 1x1 convolution with a weight of one for each and a factor of one."""
    ifm, ofm = as_rows(shape_of(data_input(node))), as_rows(shape_of(node.outputs[0]))
    weights = np.zeros((len(channels), ifm[3]), np.int8)
    weights[np.arange(len(channels)), channels] = 1
    factors = arithmetic.multipliers(np.ones(len(channels)), target.quantization.requantize)
    dtype, variant = _dtype_index(data_input(node)), _variant(target.quantization.requantize)

    def issue(emit: Emitter, tile: Tile) -> None:
        weights_at, scales_at = tile.streams
        emit.call(isa.KERNEL, 1, 1, 1, 1, 1, 1, 0, 0)
        emit.call(isa.WEIGHTS, weights_at.base, weights_at.offset, isa.DTYPES.index("int8"), 0, 0)
        emit.call(isa.SCALES, scales_at.base, scales_at.offset, variant)
        emit.call(isa.CONV, ifm[3], tile.depth)

    streams = (_weight_stream(weights, 0), Stream(_records(*factors, np.zeros(len(channels), np.int32)), RECORD_BYTES))
    operand = MapOperand(0, ifm, Same(), Same(), Whole(ifm[3]), dtype, 0)
    return Work(ofm, dtype, 0, _range_of(node.outputs[0]), (operand,), streams, issue)


def _pad(node: ir.Node) -> Recipe | str:
    if string(node, "mode", "constant") != "constant":
        return f"it pads by {string(node, 'mode')}"
    source, shape = shape_of(data_input(node)), shape_of(node.outputs[0])
    rank = len(source)
    constants = [const_of(input_of(node, index)) for index in range(1, 4)]
    if any(constant is None and input_of(node, index + 1) is not None for index, constant in enumerate(constants)):
        return "its pads, value or axes are not constant"
    pads, value, axes = constants
    assert pads is not None, "Pad has pads"
    if pads.min(initial=0) < 0:
        return "it crops"
    chosen = [int(axis) % rank for axis in axes] if axes is not None else list(range(rank))
    start = [0] * rank
    for index, axis in enumerate(chosen):
        start[axis] = int(pads[index])
    copy = Copy(0, source, tuple(range(rank)), _zeros(rank), _ones(rank), 0, shape, tuple(start), source)
    dtype = dtype_of(data_input(node))
    fill = value.ravel()[:1].astype(dtype) if value is not None and value.size else np.zeros(1, dtype)
    return Moves((copy,), fill.tobytes() if source != shape else None)


_MOVES: Mapping[str, Callable[[ir.Node], Recipe | str]] = {
    "Reshape": _reshape,
    "Flatten": _reshape,
    "Squeeze": _reshape,
    "Unsqueeze": _reshape,
    "Identity": _reshape,
    "Concat": _concat,
    "Split": _split,
    "Pad": _pad,
}
