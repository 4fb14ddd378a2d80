"""What convolutions for microcontrollers and DSPs begin and end with: the copied input, and requantizing."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qcompiler.backends import te, te_arithmetic
from qcompiler.backends.cpu_conv import Epilogue, Problem
from qcompiler.backends.cpu_packed import Operands
from qcompiler.backends.te import Expr
from qcompiler.graph import Shape
from qcompiler.quant.arithmetic import RequantizeVariant


def stage(x: te.Tensor, problem: Problem, folded: Operands, shape: Shape) -> te.Tensor:
    """The input as x' with padding and, for transposed convolutions, zeros between; [N, rows, row bytes]."""
    _, h, w, c = problem.x_shape
    (top, left), (up_y, up_x) = problem.pad, problem.dilate
    zero = te.const(folded.x_zero_point, folded.x_dtype)

    def element(b: Expr, i: Expr, column: Expr) -> Expr:
        y, before = i - top, column - left * c
        if up_x == 1:
            source, inside = before, [before >= 0, before < w * c]
        else:
            pixel, channel = column // c - left, column % c
            source = pixel // up_x * c + channel
            inside = [pixel >= 0, pixel < (w - 1) * up_x + 1, pixel % up_x == 0]
        load = x[b, y // up_y, source]
        if folded.x_offset:
            load = (load.astype("int32") + folded.x_offset).astype(folded.x_dtype)
        rows = [y >= 0, y < (h - 1) * up_y + 1, *([y % up_y == 0] if up_y > 1 else [])]
        # Columns are marked, one by one as LoopPartition wants them: what remains are copies and fills. Marked rows
        # would triple the code, as all of a row's work is in one loop.
        for condition in reversed(inside):
            load = te.if_then_else(te.inside(condition), load, zero)
        return te.if_then_else(te.all_of(*rows), load, zero)

    return te.compute(shape, element, "staged")


@dataclass(frozen=True)
class HighFactors:
    """Factors of a `tosa` rescaling of which the high half of the product suffices.

    (a m + 2^(t-1)) >> t with t > 32 is ((a m >> 32) + 2^(t-33)) >> (t - 32): one high multiply. Where t is less,
    a 2^k has a t that is k more, if a is small enough for that.
    """

    left: int
    """k."""
    arrays: tuple[np.ndarray, np.ndarray, np.ndarray]
    """int32 multiplier, rounding and shift."""

    def rescale(self, acc: Expr, multiplier: Expr, rounding: Expr, shift: Expr) -> Expr:
        """`te_arithmetic.rescale` of an int32 by elements of the arrays."""
        wide = te.shift_left(acc, te.const(self.left, "int32")) if self.left else acc
        product = wide.astype("int64") * multiplier.astype("int64")
        upper = te.shift_right(product, te.const(32, "int64")).astype("int32")
        return te.shift_right(upper + rounding, shift)


def high_factors(
    multiplier: np.ndarray, shift: np.ndarray, variant: RequantizeVariant, largest: int
) -> HighFactors | None:
    """The factors for accumulators of magnitude up to `largest`; None where low halves of products matter."""
    total = 31 - shift.astype(np.int64)
    left = max(0, 33 - int(total.min()))
    if variant != "tosa" or total.max() + left >= 63 or (left > 0 and largest << left >= 1 << 31):
        return None
    total += left
    return HighFactors(left, (multiplier, (1 << (total - 33)).astype(np.int32), (total - 32).astype(np.int32)))


@dataclass(frozen=True)
class Requantizing:
    """Bias and requantization: parameters by output channel, and what follows the sums."""

    arrays: tuple[np.ndarray, ...]
    """[O] each, the bias first."""
    epilogue: Epilogue
    high: HighFactors | None
    """If the high half of the product suffices."""

    def output(self, total: Expr, parameters: Sequence[Expr]) -> Expr:
        """A sum with its bias, requantized; `parameters` are its channel's elements of the other arrays."""
        epilogue = self.epilogue
        zero_point, limits, dtype = epilogue.zero_point, epilogue.limits, epilogue.dtype
        if self.high is not None:
            return te_arithmetic.saturate(self.high.rescale(total, *parameters), zero_point, limits, dtype)
        return te_arithmetic.requantize(
            total, parameters[0], parameters[-1], epilogue.variant, zero_point, limits, dtype
        )


def requantizing(folded: Operands, epilogue: Epilogue) -> Requantizing:
    """For an epilogue whose bias is replaced by the folded one."""
    sums = 255 * np.abs(folded.weights.astype(np.int64)).sum(axis=(1, 2, 3)) + np.abs(folded.bias.astype(np.int64))
    high = high_factors(epilogue.multiplier, epilogue.shift, epilogue.variant, int(sums.max()))
    if high is not None:
        return Requantizing((folded.bias, *high.arrays), epilogue, high)
    shift = [] if epilogue.variant == "float32" else [epilogue.shift]
    return Requantizing((folded.bias, epilogue.multiplier, *shift), epilogue, None)
