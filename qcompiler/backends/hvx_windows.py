"""Windows over rows of pixels times channels, of which a vector of HVX takes 128 bytes at a time.

An output row is one run of pixels times channels, and what one tap of the window reads for it is another: the same run
further on. With a stride between columns it is so after a copy that sorts the columns by their place within a stride.
"""

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from qcompiler.backends import te
from qcompiler.backends.base import placeholder
from qcompiler.backends.schedules import vrmpy
from qcompiler.backends.te import Expr
from qcompiler.graph import dtype_of, shape_of


@dataclass(frozen=True)
class Window:
    """Of a depthwise convolution or a pool."""

    kernel: tuple[int, int]
    strides: tuple[int, int]
    dilations: tuple[int, int]
    pad: tuple[int, int]
    """Rows above and columns left of the input."""
    out_size: tuple[int, int]

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]


@dataclass(frozen=True)
class RowWindows:
    """A map as its windows read it."""

    x: te.Tensor
    staged: bool
    """Whether rows are copied, in a block of that name."""
    wide: int
    """Elements computed per output row: whole vectors."""
    tap: Callable[[Expr, Expr, int, int, Expr], Expr]
    """Image, output row, row and column of the window, element of the output row: the input there."""


def row_windows(value: ir.Value, window: Window, fill: int) -> RowWindows:
    """Read an int8 or uint8 map [N, H, W, C], `fill` around it."""
    n, h, w, c = shape_of(value)
    (kh, kw), (sy, sx), (dy, dx) = window.kernel, window.strides, window.dilations
    oh, ow = window.out_size
    x = placeholder(value, (n, h, w * c))
    wide = -(-ow * c // vrmpy.VECTOR_BYTES) * vrmpy.VECTOR_BYTES
    rows = (oh - 1) * sy + (kh - 1) * dy + 1
    part = wide + (kw - 1) * dx // sx * c
    if sx > 1:
        staged = _sorted_columns(x, value, window, fill, rows, -(-part // c))

        def sorted_tap(b: Expr, i: Expr, ky: int, kx: int, f: Expr) -> Expr:
            element = f + kx * dx // sx * c
            return staged[b, i * sy + ky * dy, kx * dx % sx, element // c, element % c]

        return RowWindows(x, True, wide, sorted_tap)
    plain = window.pad == (0, 0) and rows <= h and part <= w * c
    source = x if plain else _padded_rows(x, value, window, fill, rows, part)
    return RowWindows(x, not plain, wide, lambda b, i, ky, kx, f: source[b, i * sy + ky * dy, f + kx * dx * c])


def _padded_rows(x: te.Tensor, value: ir.Value, window: Window, fill: int, rows: int, part: int) -> te.Tensor:
    """[N, rows, part]."""
    n, h, w, c = shape_of(value)
    (top, left), filled = window.pad, te.const(fill, str(dtype_of(value)))

    def element(b: Expr, i: Expr, column: Expr) -> Expr:
        y, source = i - top, column - left * c
        load = x[b, y, source]
        # Marked one by one, as LoopPartition wants them: what remains are copies and fills.
        for condition in (source < w * c, source >= 0):
            load = te.if_then_else(te.inside(condition), load, filled)
        return te.if_then_else(te.all_of(y >= 0, y < h), load, filled)

    return te.compute((n, rows, part), element, "staged")


def _sorted_columns(x: te.Tensor, value: ir.Value, window: Window, fill: int, rows: int, columns: int) -> te.Tensor:
    """[N, rows, SX, columns, C]: columns whose number leaves the same rest, divided by the stride, adjacent."""
    n, h, w, c = shape_of(value)
    (top, left), sx = window.pad, window.strides[1]
    filled = te.const(fill, str(dtype_of(value)))

    def element(b: Expr, i: Expr, place: Expr, j: Expr, k: Expr) -> Expr:
        y, column = i - top, j * sx + place - left
        load = x[b, y, column * c + k]
        return te.if_then_else(te.all_of(column >= 0, column < w, y >= 0, y < h), load, filled)

    return te.compute((n, rows, sx, columns, c), element, "staged")


def cropped_rows(rows: te.Tensor, width: int) -> tuple[te.Tensor, bool]:
    """[N, OH, wide] without what lies past `width`, and whether anything does."""
    n, oh, wide = te.shape_of(rows)
    if wide == width:
        return rows, False
    return te.compute((n, oh, width), lambda *index: rows[index], "cropped"), True
