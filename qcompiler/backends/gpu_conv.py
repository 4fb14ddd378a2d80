"""Convolutions, fully connected layers and products of activations on a GPU.

One template: an implicit matrix product [M, K] × [K, N] per group, M the output pixels, N the output channels, K the
window (height, width, channels) in words of four bytes. Groups of work items stage tiles of both operands in shared
memory, the left one gathered from the image (padding, strides and dilation happen there), and each work item keeps a
few pixels times a multiple of four channels in registers. The epilogue (bias, requantize, clamp, an addition that
follows) stores whole words.

Depthwise convolutions have no reduction over channels: a work item makes four channels of one pixel.

Zero points are folded as on the CPU (`cpu_conv.fold_zero_points`); what is left of one on the right costs a second dot
product, Σ x'(w' - zw') = Σ x'w' - Σ x'zw'.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from qcompiler.backends import gpu_tensor_cores as tensor_cores
from qcompiler.backends import te, te_arithmetic
from qcompiler.backends.base import Kernel
from qcompiler.backends.cpu_conv import Problem, fold_zero_points
from qcompiler.backends.cpu_elementwise import constant_input, variant
from qcompiler.backends.cpu_packed import Finish, Operands
from qcompiler.backends.gpu_code import Device, dot4
from qcompiler.backends.gpu_words import (
    SIGN_BITS,
    WORD,
    byte_of,
    from_nibbles,
    pack_nibbles,
    pack_words,
    packed,
    repeated,
)
from qcompiler.backends.schedules import gpu as schedule
from qcompiler.backends.schedules import gpu_mma as mma
from qcompiler.backends.te import Expr
from qcompiler.graph import Shape, data_input, dtype_of, element_count, shape_of
from qcompiler.integer.ops import QMatMul


def convolution(
    problem: Problem,
    x: ir.Value,
    output: ir.Value,
    finish: Finish,
    device: Device,
    layout: tensor_cores.Layout,
    tile: mma.MmaTile | None = None,
) -> Kernel:
    """Any convolution or fully connected layer of 8-bit activations. `finish` turns sums into the output.

    tile: of tensor cores; None leaves the choice to an estimate.
    """
    if problem.is_depthwise:
        return _depthwise(problem, x, finish)
    if (work := tensor_cores.work_of(problem, x, device)) is not None:
        return tensor_cores.product(problem, x, work, output, finish, device, layout, tile)
    return _product(problem, x, finish, device)


# --- where windows lie in the image ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Image:
    """The input, as words if whole words are channels of one pixel and group, else as bytes."""

    problem: Problem
    tensor: te.Tensor
    """int32 [N, H, W, C/4], or bytes [N, H, W, C]."""
    is_words: bool
    zero_point: int
    """x' of padding."""

    def pixel(self, m: Expr) -> tuple[Expr, Expr, Expr]:
        """Batch, row and column of output pixel m."""
        height, width = self.problem.out_size
        return m // (height * width), m // width % height, m % width

    def element(self, m: Expr, ky: Expr, kx: Expr, channel: Expr, *also: Expr) -> Expr:
        """A word or byte (as int32) of x' under an output pixel; the zero point outside the image.

        `also` are further conditions of being inside.
        """
        problem = self.problem
        (_, height, width, _), (up_y, up_x) = problem.x_shape, problem.dilate
        b, i, j = self.pixel(m)
        tests = list(also)
        y = _source(i, ky, 0, problem, height, up_y, tests)
        x = _source(j, kx, 1, problem, width, up_x, tests)
        load = self.tensor[b, y, x, channel]
        if self.is_words:
            inside = load if problem.x_dtype == "int8" else te.bitwise_xor(load, te.const(SIGN_BITS, "int32"))
            outside = te.const(repeated(self.zero_point), "int32")
        else:
            inside = load.astype("int32") - (0 if problem.x_dtype == "int8" else 128)
            outside = te.const(self.zero_point, "int32")
        return te.if_then_else(te.all_of(*tests), inside, outside) if tests else inside


def _source(out: Expr, tap: Expr, axis: int, problem: Problem, size: int, up: int, tests: list[Expr]) -> Expr:
    """The input row or column of an output one and a tap. Appends the conditions under which there is one."""
    stride, dilation, pad = problem.strides[axis], problem.dilations[axis], problem.pad[axis]
    taps, outs = problem.weights.shape[1 + axis], problem.out_size[axis]
    position = out * stride + tap * dilation - pad
    if pad > 0:
        tests.append(position >= 0)
    if (outs - 1) * stride + (taps - 1) * dilation - pad > (size - 1) * up:
        tests.append(position < (size - 1) * up + 1)
    if up == 1:
        return position
    tests.append((position % up).equal(0))
    return position // up


def _image(problem: Problem, *, as_words: bool, zero_point: int) -> _Image:
    n, h, w, c = problem.x_shape
    shape, dtype = ((n, h, w, c // WORD), "int32") if as_words else ((n, h, w, c), problem.x_dtype)
    return _Image(problem, te.placeholder(shape, dtype, "x"), as_words, zero_point)


# --- epilogues ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Store:
    """What turns sums into stored elements, with the tensors it reads."""

    finish: Finish
    shape: Shape
    """Of the output in elements, channels in its last dimensions."""
    arrays: tuple[np.ndarray, ...]
    """Per channel: the bias, and those of `finish`."""
    channels: tuple[te.Tensor, ...]
    maps: tuple[te.Tensor, ...]

    @property
    def lanes(self) -> int:
        """Elements stored at once."""
        return WORD if self.shape[-1] % WORD == 0 and np.dtype(self.finish.dtype).itemsize == 1 else 1

    @property
    def stored_shape(self) -> Shape:
        return (*self.shape[:-1], self.shape[-1] // self.lanes)

    def element(self, sums: Callable[[Expr], Expr], outer: Sequence[Expr], channel: Sequence[Expr]) -> Expr:
        """The word or element at `(*outer, *channel)`. `sums` gives the sum at a value of the last index."""
        *before, last = channel
        loads = [tensor[(*outer, *channel)] for tensor in self.maps]
        elements = []
        for lane in range(self.lanes):
            position = last * self.lanes + lane if self.lanes > 1 else last
            bias, *own = (tensor[(*before, position)] for tensor in self.channels)
            others = [
                byte_of(load, lane, str(dtype_of(value))).astype(str(dtype_of(value))) if self.lanes > 1 else load
                for load, value in zip(loads, self.finish.maps, strict=True)
            ]
            elements.append(self.finish.expression(sums(position) + bias, own, others))
        return packed(elements) if self.lanes > 1 else elements[0]


def _store(finish: Finish, bias: np.ndarray, shape: Shape, channel_rank: int) -> _Store:
    arrays = tuple(np.ascontiguousarray(array).reshape(shape[-channel_rank:]) for array in (bias, *finish.channels))
    channels = tuple(te.placeholder(a.shape, str(a.dtype), f"channels_{i}") for i, a in enumerate(arrays))
    store = _Store(finish, shape, arrays, channels, ())
    maps = tuple(
        te.placeholder(store.stored_shape, "int32" if store.lanes > 1 else str(dtype_of(value)), f"map_{i}")
        for i, value in enumerate(finish.maps)
    )
    return replace(store, maps=maps)


def _kernel(
    image: _Image, x: ir.Value, weights: te.Tensor, array: np.ndarray, store: _Store, output: te.Tensor
) -> Kernel:
    """The unscheduled kernel."""
    function = te.prim_func([image.tensor, *store.maps, weights, *store.channels, output])
    return Kernel(function, (x, *store.finish.maps), (array, *store.arrays))


# --- the matrix product ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sizes:
    """A product [M, K] × [K, N] for each of `groups`; K in words."""

    groups: int
    m: int
    n: int
    k: int


_Operand = Callable[[Expr, Expr, Expr], Expr]
"""A word from group, position along K, and row or column."""


def _product(problem: Problem, x: ir.Value, finish: Finish, device: Device) -> Kernel:
    folded = fold_zero_points(problem, "int8")
    out_channels, *window = problem.weights.shape
    groups, m, length = problem.group, problem.x_shape[0] * element_count(problem.out_size), element_count(window)
    image = _image(problem, as_words=window[-1] % WORD == 0, zero_point=folded.x_zero_point)
    sizes = _Sizes(groups, m, out_channels // groups, -(-length // WORD))
    tile = schedule.product_tile(groups, m, sizes.n, sizes.k, device.local_memory)
    filled = tile.filled(m, sizes.n, sizes.k)
    # [group, block of columns, step, word, column]
    words = _weight_words(folded, sizes, filled).reshape(groups, -1, tile.n, filled.k // tile.k, tile.k)
    array = np.ascontiguousarray(words.transpose(0, 1, 3, 4, 2))
    stored = te.placeholder(array.shape, str(array.dtype), "weights")

    def right(g: Expr, k: Expr, column: Expr) -> Expr:
        return _unpacked(stored[g, column // tile.n, k // tile.k, k % tile.k, column % tile.n], folded)

    def term(a: Expr, b: Expr) -> Expr:
        zero = te.const(0, "int32")
        product = dot4(a, b, zero)
        if folded.w_zero_point == 0:
            return product
        return product - dot4(a, te.const(repeated(folded.w_zero_point), "int32"), zero)

    store = _store(finish, folded.bias, (m, groups, sizes.n), 2)
    accumulator = _accumulated(sizes, filled, _gathered(image, sizes, filled), right, term)
    output = te.compute(
        store.stored_shape,
        lambda i, g, j: store.element(lambda column: accumulator[g, i, column], [i], [g, j]),
        "output",
    )
    kernel = _kernel(image, x, stored, array, store, output)
    return replace(kernel, function=schedule.schedule_product(kernel.function, tile, store.lanes))


def _gathered(image: _Image, sizes: _Sizes, filled: schedule.Filled) -> _Operand:
    """Word k of the window under an output pixel. What lies behind the last one meets weights that add nothing."""
    _, kh, kw, depth = image.problem.weights.shape

    def element(g: Expr, unit: Expr, row: Expr, per_pixel: int, units: int, limit: int) -> Expr:
        """Word or byte `unit`, of `per_pixel` a tap."""
        tap, channel = unit // per_pixel, g * per_pixel + unit % per_pixel
        also = [row < sizes.m] if filled.m > sizes.m else []
        also += [unit < units] if limit > units else []
        return image.element(row, tap // kw, tap % kw, channel, *also)

    def word(g: Expr, k: Expr, row: Expr) -> Expr:
        if image.is_words:
            return element(g, k, row, depth // WORD, sizes.k, filled.k)
        length = kh * kw * depth
        return packed([element(g, k * WORD + lane, row, depth, length, filled.k * WORD) for lane in range(WORD)])

    return word


def _weight_words(folded: Operands, sizes: _Sizes, filled: schedule.Filled) -> np.ndarray:
    """The weights as [groups, N, K in words]; int32, or uint16 where they have four bits or fewer."""
    # Filled up with the zero point, so that what pads the other operand adds nothing.
    matrix = np.full((sizes.groups, filled.n, filled.k * WORD), folded.w_zero_point, np.int8)
    rows = folded.weights.reshape(sizes.groups, sizes.n, -1)
    matrix[:, : sizes.n, : rows.shape[-1]] = rows
    return pack_nibbles(matrix) if folded.bits <= 4 else pack_words(matrix)


def _unpacked(word: Expr, folded: Operands) -> Expr:
    return from_nibbles(word.astype("int32")) if folded.bits <= 4 else word


def _accumulated(
    sizes: _Sizes, filled: schedule.Filled, left: _Operand, right: _Operand, term: Callable[[Expr, Expr], Expr]
) -> te.Tensor:
    """The stages left, right and accumulator [groups, M, N]."""
    lefts = te.compute((sizes.groups, filled.k, filled.m), left, "left")
    rights = te.compute((sizes.groups, filled.k, filled.n), right, "right")
    k = te.reduce_axis(filled.k, "k")
    return te.compute(
        (sizes.groups, filled.m, filled.n),
        lambda g, i, j: te.reduce_sum(term(lefts[g, k, i], rights[g, k, j]), axis=[k]),
        "accumulator",
    )


def matmul(node: ir.Node, device: Device) -> Kernel:
    """QMatMul, its batch as groups: Σa'b' - Σza b' - Σa'zb + K za zb, with a', b' int8 and za, zb their zero points."""
    op = QMatMul.of(node)
    a_value, b_value = data_input(node), data_input(node, 1)
    a_shape, b_shape, out = shape_of(a_value), shape_of(b_value), shape_of(node.outputs[0])
    rows, length, columns = a_shape[-2], a_shape[-1], b_shape[-1]
    batch = out[: len(out) - 2]
    sizes = _Sizes(element_count(batch), rows, columns, -(-length // WORD))
    tile = schedule.product_tile(sizes.groups, rows, columns, sizes.k, device.local_memory)
    filled = tile.filled(rows, columns, sizes.k)
    a_offset, b_offset = (128 if dtype_of(value) == np.uint8 else 0 for value in (a_value, b_value))
    a_zero, b_zero = op.a_zero_point - a_offset, op.b_zero_point - b_offset
    a_words = length % WORD == 0
    a = (
        te.placeholder((*a_shape[:-1], sizes.k), "int32", "a")
        if a_words
        else te.placeholder(a_shape, _name(a_value), "a")
    )
    b = te.placeholder(b_shape, _name(b_value), "b")

    def left(g: Expr, k: Expr, row: Expr) -> Expr:
        index = _batch(g, batch, a_shape[:-2])
        tests = [row < rows] if filled.m > rows else []
        zero = te.const(0, "int32")
        if a_words:
            tests += [k < sizes.k] if filled.k > sizes.k else []
            load = a[(*index, row, k)]
            signed = te.bitwise_xor(load, te.const(SIGN_BITS, "int32")) if a_offset else load
            return te.if_then_else(te.all_of(*tests), signed, zero) if tests else signed
        loads = []
        for lane in range(WORD):
            inside = te.all_of(*tests, k * WORD + lane < length)
            load = a[(*index, row, k * WORD + lane)].astype("int32") - a_offset
            loads.append(te.if_then_else(inside, load, zero))
        return packed(loads)

    def right(g: Expr, k: Expr, column: Expr) -> Expr:
        index = _batch(g, batch, b_shape[:-2])
        loads = []
        for lane in range(WORD):
            inside = te.all_of(k * WORD + lane < length, column < columns)
            load = b[(*index, k * WORD + lane, column)].astype("int32") - b_offset
            loads.append(te.if_then_else(inside, load, te.const(0, "int32")))
        return packed(loads)

    def term(x: Expr, y: Expr) -> Expr:
        zero = te.const(0, "int32")
        total = dot4(x, y, zero)
        if a_zero:
            total = total - dot4(te.const(repeated(a_zero), "int32"), y, zero)
        if b_zero:
            total = total - dot4(x, te.const(repeated(b_zero), "int32"), zero)
        return total

    accumulator = _accumulated(sizes, filled, left, right, term)
    bias = np.full(columns, length * a_zero * b_zero, np.int32)
    store = _store(_matmul_finish(node, op, columns), bias, (sizes.groups, rows, columns), 1)
    output = te.compute(
        store.stored_shape,
        lambda g, i, j: store.element(lambda column: accumulator[g, i, column], [g, i], [j]),
        "output",
    )
    function = te.prim_func([a, b, *store.channels, output])
    scheduled = schedule.schedule_product(function, tile, store.lanes, groups_first=True)
    return Kernel(scheduled, (a_value, b_value), store.arrays)


def _matmul_finish(node: ir.Node, op: QMatMul, columns: int) -> Finish:
    dtype = _name(node.outputs[0])
    arrays = tuple(np.broadcast_to(constant_input(node, index), (columns,)) for index in (2, 3))
    limits = (op.clamp_min, op.clamp_max)

    def expression(total: Expr, factors: Sequence[Expr], _: Sequence[Expr]) -> Expr:
        multiplier, shift = factors
        return te_arithmetic.requantize(
            total, multiplier, shift, variant(op.requantize), op.y_zero_point, limits, dtype
        )

    return Finish(dtype, arrays, (), expression)


def _batch(g: Expr, batch: Shape, own: Shape) -> tuple[Expr | int, ...]:
    """Indices into an operand's batch dimensions, broadcast as numpy does, from the flat index of the output's."""
    index: list[Expr | int] = []
    for axis in range(len(batch)):
        inner = element_count(batch[axis + 1 :])
        index.append(g // inner % batch[axis])
    positions = index[len(batch) - len(own) :]
    return tuple(0 if dim == 1 else position for position, dim in zip(positions, own, strict=True))


def _name(value: ir.Value) -> str:
    return str(dtype_of(value))


# --- depthwise ---------------------------------------------------------------------------------------------


def _depthwise(problem: Problem, x_value: ir.Value, finish: Finish) -> Kernel:
    folded = fold_zero_points(problem, "int8")
    channels, kh, kw, _ = problem.weights.shape
    m = problem.x_shape[0] * element_count(problem.out_size)
    image = _image(problem, as_words=channels % WORD == 0, zero_point=folded.x_zero_point)
    taps = folded.weights[..., 0].transpose(1, 2, 0)
    weights_array = pack_words(taps) if image.is_words else np.ascontiguousarray(taps)
    stored = te.placeholder(weights_array.shape, str(weights_array.dtype), "weights")
    ky, kx = te.reduce_axis(kh, "ky"), te.reduce_axis(kw, "kx")

    def product(row: Expr, channel: Expr) -> Expr:
        if not image.is_words:
            weight = stored[ky, kx, channel].astype("int32") - folded.w_zero_point
            return image.element(row, ky, kx, channel) * weight
        word, lane = channel // WORD, channel % WORD
        # The lane is a constant once the loop over four channels is unrolled.
        pixel = _lane(image.element(row, ky, kx, word), lane)
        return pixel * (_lane(stored[ky, kx, word], lane) - folded.w_zero_point)

    accumulator = te.compute((m, channels), lambda i, c: te.reduce_sum(product(i, c), axis=[ky, kx]), "accumulator")
    store = _store(finish, folded.bias, (m, channels), 1)
    output = te.compute(
        store.stored_shape, lambda i, c: store.element(lambda channel: accumulator[i, channel], [i], [c]), "output"
    )
    kernel = _kernel(image, x_value, stored, weights_array, store, output)
    return replace(kernel, function=schedule.schedule_each(kernel.function))


def _lane(word: Expr, lane: Expr) -> Expr:
    """Byte `lane` of a word as int32, sign extended."""
    up = te.const(24, "int32") - lane * 8
    return te.shift_right(te.shift_left(word, up), te.const(24, "int32"))
