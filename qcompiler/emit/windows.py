"""Sliding windows in the two paddings that TFLite knows."""

from dataclasses import dataclass
from typing import Literal

from qcompiler.graph import Shape


@dataclass(frozen=True)
class Window:
    """How a window slides along one axis."""

    size: int
    count: int
    """Input and output elements."""
    kernel: int
    stride: int
    dilation: int
    pad: int
    """Before the first element."""

    @property
    def extent(self) -> int:
        """Elements from the first to the last tap."""
        return (self.kernel - 1) * self.dilation + 1

    @property
    def pad_after(self) -> int:
        """What the last window reads beyond the end; negative where elements at the end go unread."""
        return (self.count - 1) * self.stride + self.extent - self.size - self.pad

    @property
    def is_valid(self) -> bool:
        return self.pad == 0 and (self.size - self.extent) // self.stride + 1 == self.count

    @property
    def is_same(self) -> bool:
        total = max((self.count - 1) * self.stride + self.extent - self.size, 0)
        return -(-self.size // self.stride) == self.count and self.pad == total // 2


@dataclass(frozen=True)
class Padded:
    """Windows with TFLite's padding, over an input that may first need explicit padding."""

    mode: Literal["same", "valid"]
    strides: tuple[int, int]
    before: tuple[int, int]
    after: tuple[int, int]
    """Explicit padding, vertical and horizontal, zero in most cases."""

    @property
    def explicit(self) -> bool:
        return any((*self.before, *self.after))


def padded(rows: Window, columns: Window) -> Padded:
    """The paddings and strides with which TFLite computes exactly the outputs wanted."""
    windows = (rows, columns)
    for choice in (windows, tuple(_single(window) for window in windows)):
        strides = (choice[0].stride, choice[1].stride)
        if all(window.is_valid for window in choice):
            return Padded("valid", strides, (0, 0), (0, 0))
        if all(window.is_same for window in choice):
            return Padded("same", strides, (0, 0), (0, 0))
    before = (rows.pad, columns.pad)
    after = (max(rows.pad_after, 0), max(columns.pad_after, 0))
    filled = tuple(
        _single(Window(window.size + first + last, window.count, window.kernel, window.stride, window.dilation, 0))
        for window, first, last in zip(windows, before, after, strict=True)
    )
    assert all(window.is_valid for window in filled), (rows, columns)
    return Padded("valid", (filled[0].stride, filled[1].stride), before, after)


def _single(window: Window) -> Window:
    """A lone output takes any stride; with one this long TFLite computes no second."""
    if window.count > 1:
        return window
    stride = max(window.stride, window.size - window.extent + 1)
    return Window(window.size, window.count, window.kernel, stride, window.dilation, window.pad)


def windows_of(
    ifm: Shape, ofm: Shape, kernel: Shape, strides: Shape, dilations: Shape, pads: Shape
) -> tuple[Window, Window]:
    """The windows along height and width of NHWC maps; `pads` is top, left, bottom, right."""
    rows, columns = (
        Window(ifm[1 + axis], ofm[1 + axis], kernel[axis], strides[axis], dilations[axis], pads[axis])
        for axis in range(2)
    )
    return rows, columns
