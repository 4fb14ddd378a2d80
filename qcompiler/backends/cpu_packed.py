"""Templates of everything on the CPU that sums over windows or rows: convolutions and fully connected layers.

Maps are NHWC. `packed_convolution` is everything with a reduction over channels: it computes, for a strip of pixels
and some blocks of output channels, `lanes` channels to a vector register, with a dot-product instruction where the
operands are bytes and the CPU has one, else by multiplying and adding (in float, one FMA). It ends in a `Finish`,
computed while the sums are in registers. Depthwise convolutions are in `cpu_depthwise`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import onnx_ir as ir

from qcompiler.backends import packed_bits, te
from qcompiler.backends.base import HostCode, Kernel, parameters_of, placeholder
from qcompiler.backends.schedules import conv as schedule
from qcompiler.backends.schedules.dot import DotProduct
from qcompiler.backends.schedules.loops import threads_for
from qcompiler.backends.te import Expr
from qcompiler.backends.tiles import Tiling
from qcompiler.graph import Shape, dtype_of
from qcompiler.integer.weight_groups import Groups


@dataclass(frozen=True)
class Geometry:
    """A convolution, a transposed one being a convolution of the input with `dilate - 1` zeros between pixels."""

    x_shape: Shape
    """[N, H, W, C]."""
    dilate: tuple[int, int]
    weights: np.ndarray
    """[O, KH, KW, C/group]."""
    strides: tuple[int, int]
    dilations: tuple[int, int]
    pad: tuple[int, int]
    """Rows above and columns left of the input; may be negative for transposed convolutions."""
    out_size: tuple[int, int]
    group: int

    @property
    def is_depthwise(self) -> bool:
        return self.weights.shape[3] == 1 and self.weights.shape[0] == self.group

    @property
    def macs(self) -> int:
        return self.x_shape[0] * self.out_size[0] * self.out_size[1] * self.weights.size


@dataclass(frozen=True)
class Operands:
    """What the templates multiply: x' = x + x_offset by w', in whose terms `bias` is."""

    x_offset: int
    x_dtype: str
    x_zero_point: int
    """Of x': what padding is filled with."""
    weights: np.ndarray
    """int8 or float32 [O, KH, KW, C/group]."""
    w_zero_point: int
    bias: np.ndarray
    """[O]."""
    bits: int
    """Bits of a stored weight. Less than 8: several to a byte. One: -1 and 1, and two where padding adds zeros."""
    sums: str
    """The accumulators' type."""
    groups: Groups | None = None
    """How the weights share factors, if they do."""
    zero_scalar: int | None = None
    """Which of the Finish's scalars holds the zero point of x, where it is known at run time only: `x_zero_point` is
    then what a zero point of 0 would make, and the Finish takes in the rest."""


@dataclass(frozen=True)
class Finish:
    """What becomes of a sum with its bias: ``expression(total, channel array elements, map elements and scalars)``."""

    dtype: str
    """Of the result."""
    channels: tuple[np.ndarray, ...]
    """Arrays [O]."""
    maps: tuple[ir.Value, ...]
    """Tensors of the result's shape."""
    expression: Callable[[Expr, Sequence[Expr], Sequence[Expr]], Expr]
    scalars: tuple[ir.Value, ...] = ()
    """Tensors of one element."""

    def then(self, after: "Finish") -> "Finish":
        """First this, then `after` with the result."""
        channels, maps, all_maps = len(self.channels), len(self.maps), len(self.maps) + len(after.maps)
        first_scalars = slice(all_maps, all_maps + len(self.scalars))
        return Finish(
            after.dtype,
            (*self.channels, *after.channels),
            (*self.maps, *after.maps),
            lambda total, arrays, elements: after.expression(
                self.expression(total, arrays[:channels], [*elements[:maps], *elements[first_scalars]]),
                arrays[channels:],
                [*elements[maps:all_maps], *elements[first_scalars.stop :]],
            ),
            (*self.scalars, *after.scalars),
        )


_G = TypeVar("_G", bound=Geometry)


def flattened(geometry: _G) -> _G:
    """A 1x1 convolution without strides or padding sees its pixels as one row."""
    n, h, w, c = geometry.x_shape
    plain = (
        geometry.weights.shape[1:3] == (1, 1)
        and geometry.strides == (1, 1)
        and geometry.dilate == (1, 1)
        and geometry.pad == (0, 0)
        and geometry.out_size == (h, w)
    )
    return replace(geometry, x_shape=(1, 1, n * h * w, c), out_size=(1, n * h * w)) if plain else geometry


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def takes_maps(geometry: Geometry, host: HostCode) -> bool:
    """Whether a Finish may read maps: blocks of channels must not reach beyond the last one."""
    lanes = host.vector_bytes // 4
    return geometry.is_depthwise or geometry.weights.shape[0] // geometry.group % lanes == 0


# --- channels reduced --------------------------------------------------------------------------------------


def packed_convolution(
    geometry: Geometry, operands: Operands, finish: Finish, x_value: ir.Value, host: HostCode, dot: DotProduct | None
) -> Kernel:
    """A convolution in which every output channel reads all channels of its group; `dot` takes the operands."""
    geometry = flattened(geometry)
    quad = dot.length if dot else 1
    lanes = dot.lanes if dot else host.vector_bytes // 4
    sums = operands.sums
    n, h, w, c = geometry.x_shape
    (oh, ow), group = geometry.out_size, geometry.group
    out_channels, kh, kw, depth = operands.weights.shape
    (sy, sx), (dy, dx) = geometry.strides, geometry.dilations

    # A window row of adjacent pixels is one run of elements: if the depth does not fill quads, reduce over the run.
    run = depth % quad != 0 and dx == 1 and group == 1 and operands.groups is None
    padded_depth = depth if run else round_up(depth, quad)
    pitch = group * padded_depth
    taps, run_length = (1, kw * depth) if run else (kw, padded_depth)
    quads = -(-run_length // quad)
    per_group = out_channels // group
    blocks = -(-per_group // lanes)
    threads = threads_for(host, geometry.macs, quad * lanes)
    tiles = schedule.conv_tiles(ow, blocks, registers=host.vector_registers)
    tiling = Tiling(workload("packed", geometry, operands, finish, threads), tiles)
    tile = host.tiles(tiling)
    wide = round_up(ow, tile.pixels)

    rows = (oh - 1) * sy + (kh - 1) * dy + 1
    row_length = max((wide - 1) * sx * pitch + (taps - 1) * dx * pitch + (group - 1) * padded_depth + quads * quad, 1)
    as_is = (
        operands.x_dtype == str(dtype_of(x_value))
        and geometry.pad == (0, 0)
        and geometry.dilate == (1, 1)
        and pitch == c
        and rows <= h
        and row_length <= w * c
    )
    x = placeholder(x_value, (n, h, w * c))
    scalars = [placeholder(value, (1,)) for value in finish.scalars]
    zero = zero_of(operands, scalars)
    staged = x if as_is else stage(x, geometry, operands, (rows, row_length), (pitch, padded_depth, depth), zero)

    def pack(weights: np.ndarray) -> np.ndarray:
        return _pack(weights, group, blocks, lanes, quads, quad, run=run)

    stored = packed_bits.store_packed(operands.weights, operands.bits, operands.groups, pack, _QUADS)
    arrays = [*stored.arrays, *_per_lane([operands.bias, *finish.channels], group, blocks, lanes)]
    parameters = parameters_of(arrays)
    weights, (bias, *channels) = stored.read(parameters)
    maps = [placeholder(value, (n, oh, ow, group, blocks, lanes)) for value in finish.maps]

    ky, kx = te.reduce_axis(kh, "ky"), te.reduce_axis(taps, "kx")
    q, r = te.reduce_axis(quads, "q"), te.reduce_axis(quad, "r")

    def product(b: Expr, i: Expr, j: Expr, g: Expr, o: Expr, v: Expr) -> Expr:
        column = (j * sx + kx * dx) * pitch + g * padded_depth + q * quad + r
        pixel = staged[b, i * sy + ky * dy, column].astype(sums)
        return te.reduce_sum(pixel * weights[g, o, ky, kx, q, v, r].astype(sums), axis=[ky, kx, q, r])

    accumulator = te.compute((n, oh, wide, group, blocks, lanes), product, "accumulator")
    window_sum = _window_sum(staged, geometry, operands, (wide, pitch, padded_depth)) if operands.w_zero_point else None

    def finished(b: Expr, i: Expr, j: Expr, g: Expr, o: Expr, v: Expr) -> Expr:
        total = accumulator[b, i, j, g, o, v] + bias[g, o, v].astype(sums)
        if window_sum is not None:
            total = total - window_sum[b, i, j, g] * operands.w_zero_point
        # Pixels past the row's end are cut off below; what they read must only exist.
        column = te.minimum(j, ow - 1) if wide != ow else j
        elements = [*(tensor[b, i, column, g, o, v] for tensor in maps), *(scalar[0] for scalar in scalars)]
        return finish.expression(total, [array[g, o, v] for array in channels], elements)

    output = te.compute(te.shape_of(accumulator), finished, "output")
    if wide != ow or blocks * lanes != per_group:

        def crop(b: Expr, i: Expr, j: Expr, o: Expr) -> Expr:
            inside = o % per_group
            return output[b, i, j, o // per_group, inside // lanes, inside % lanes]

        result = te.compute((n, oh, ow, out_channels), crop, "cropped")
    else:
        result = output
    function = te.prim_func([x, *maps, *scalars, *parameters, result])
    scheduled = schedule.schedule_dot_convolution(function, dot, tile, threads=threads)
    scheduled = stored.scheduled(scheduled, threads=threads)
    return Kernel(scheduled, (x_value, *finish.maps, *finish.scalars), tuple(arrays), tiling)


def workload(template: str, geometry: Geometry, operands: Operands, finish: Finish, threads: int) -> str:
    """What the best tile of a template depends on, in words."""
    weights = operands.weights
    parts = (
        f"{template} {_by(geometry.x_shape)} {operands.x_dtype} by {_by(weights.shape)} {weights.dtype}",
        f"in {operands.bits} bits" if operands.bits < 8 else "",
        f"by the {operands.groups.size}" if operands.groups is not None else "",
        f"in {geometry.group} groups" if geometry.group > 1 else "",
        f"to {_by(geometry.out_size)} {finish.dtype}",
        f"strides {_by(geometry.strides)} dilations {_by(geometry.dilations)} padding {_by(geometry.pad)}",
        f"spread {_by(geometry.dilate)}" if geometry.dilate != (1, 1) else "",
        f"from {operands.x_offset}" if operands.x_offset else "",
        "less a zero point" if operands.w_zero_point else "",
        f"and {len(finish.maps)} maps" if finish.maps else "",
        f"{threads} threads",
    )
    return " ".join(part for part in parts if part)


def _by(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


def stage(
    x: te.Tensor,
    geometry: Geometry,
    operands: Operands,
    size: tuple[int, int],
    layout: tuple[int, int, int],
    zero: Expr,
) -> te.Tensor:
    """The input as x' with padding, dilation and every group's depth filled up by `zero`; [N, rows, row elements]."""
    return te.compute((geometry.x_shape[0], *size), staged_element(x, geometry, operands, layout, zero), "staged")


def staged_element(
    x: te.Tensor, geometry: Geometry, operands: Operands, layout: tuple[int, int, int], zero: Expr
) -> Callable[[Expr, Expr, Expr], Expr]:
    """What `stage` has at a batch, a row and a place in the row."""
    _, h, w, c = geometry.x_shape
    (top, left), (up_y, up_x) = geometry.pad, geometry.dilate
    pitch, padded_depth, depth = layout

    def element(b: Expr, i: Expr, column: Expr) -> Expr:
        y = i - top
        if pitch == c and up_x == 1:
            source = column - left * c
            inside = [source >= 0, source < w * c]
        else:
            pixel, channel = column // pitch - left, column % pitch
            inside = [pixel >= 0, pixel < (w - 1) * up_x + 1, pixel % up_x == 0, channel % padded_depth < depth]
            source = pixel // up_x * c + channel // padded_depth * depth + channel % padded_depth
        rows = [y >= 0, y < (h - 1) * up_y + 1, y % up_y == 0]
        load = _shifted(x[b, y // up_y, source], operands.x_offset, operands.x_dtype)
        return te.if_then_else(te.all_of(*rows, *inside), load, zero)

    return element


def zero_of(operands: Operands, scalars: Sequence[te.Tensor]) -> Expr:
    """The zero point of x'."""
    if operands.zero_scalar is None:
        return te.const(operands.x_zero_point, operands.x_dtype)
    return _shifted(scalars[operands.zero_scalar][0], operands.x_offset, operands.x_dtype)


def _shifted(x: Expr, offset: int, dtype: str) -> Expr:
    return x.astype(dtype) if offset == 0 else (x.astype("int32") + offset).astype(dtype)


def _window_sum(staged: te.Tensor, geometry: Geometry, operands: Operands, layout: tuple[int, int, int]) -> te.Tensor:
    """Σ x' under each window and group, for weights whose zero point is not 0."""
    wide, pitch, padded_depth = layout
    _, kh, kw, depth = operands.weights.shape
    (sy, sx), (dy, dx) = geometry.strides, geometry.dilations
    ky, kx, k = te.reduce_axis(kh, "ky"), te.reduce_axis(kw, "kx"), te.reduce_axis(depth, "k")
    return te.compute(
        (geometry.x_shape[0], geometry.out_size[0], wide, geometry.group),
        lambda b, i, j, g: te.reduce_sum(
            staged[b, i * sy + ky * dy, (j * sx + kx * dx) * pitch + g * padded_depth + k].astype("int32"),
            axis=[ky, kx, k],
        ),
        "window_sum",
    )


_QUADS = 4
"""The axis of the quads in what `_pack` returns."""


def _pack(weights: np.ndarray, group: int, blocks: int, lanes: int, quads: int, quad: int, *, run: bool) -> np.ndarray:
    """[O, KH, KW, C/group] to [group, blocks, KH, KW, quads, lanes, quad].

    Zeros fill up what is reduced; lanes past the last channel, whose sums nobody reads, hold ones.
    """
    out_channels, kh, kw, depth = weights.shape
    if run:
        weights, kw, depth = weights.reshape(out_channels, kh, 1, kw * depth), 1, kw * depth
    per_group = out_channels // group
    filled = np.zeros((group, blocks * lanes, kh, kw, quads * quad), weights.dtype)
    filled[:, per_group:] = 1
    filled[:, :per_group, :, :, :depth] = weights.reshape(group, per_group, kh, kw, depth)
    split = filled.reshape(group, blocks, lanes, kh, kw, quads, quad)
    return np.ascontiguousarray(split.transpose(0, 1, 3, 4, 5, 2, 6))


def _per_lane(arrays: Sequence[np.ndarray], group: int, blocks: int, lanes: int) -> list[np.ndarray]:
    """Per-channel arrays [O] as [group, blocks, lanes], filled up with zeros."""
    packed: list[np.ndarray] = []
    for array in arrays:
        per_group = array.reshape(group, -1)
        filled = np.zeros((group, blocks * lanes), array.dtype)
        filled[:, : per_group.shape[1]] = per_group
        packed.append(filled.reshape(group, blocks, lanes))
    return packed
