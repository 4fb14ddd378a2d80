"""Rounding that gradients pass through, with learned scales.

A value v becomes s * round(clamp(v / s, low - z, high - z)). Rounding has the gradient 1 (straight-through estimator,
Bengio et al. 2013), everything else its own, which gives the scale s the gradient of LSQ (Esser et al., Learned Step
Size Quantization, ICLR 2020, equation 3). Learned is the logarithm of s, so that s stays positive and a step changes it
by a ratio (Jain et al., Trained Quantization Thresholds, MLSys 2020); LSQ's factor for the gradient of s only fits it
to the size of weights' gradients, which Adam does as well.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]

from qcompiler.quant.formats import ZERO_SPAN, dequantize_array, weight_limits
from qcompiler.quant.types import TensorFormat


class FakeQuantize(nn.Module):
    """Rounds to a format whose zero point stays and whose scale is learned, unless it is `fixed`.

    Args:
        fmt: per tensor or per channel, without blocks.
        rank: of the tensors it gets.
        weights: whether they are weights, whose symmetric formats leave out the lowest integer.
        power_of_two: whether scales are rounded to powers of two.
    """

    def __init__(
        self, fmt: TensorFormat, rank: int, *, weights: bool = False, power_of_two: bool = False, fixed: bool = False
    ) -> None:
        super().__init__()
        assert fmt.block is None
        self._fmt = fmt
        self._power_of_two = power_of_two
        self._binary = fmt.dtype == "int1"
        narrow = weights and not fmt.zero_point.any()
        self._low, self._high = fmt.used or weight_limits(fmt.dtype, narrow=narrow)
        shape = _along(rank, fmt.axis)
        scale = torch.tensor(np.maximum(fmt.scale, ZERO_SPAN), dtype=torch.float32).reshape(shape)
        self.log_scale = nn.Parameter(scale.log(), requires_grad=not fixed)
        self._zero_point = torch.tensor(fmt.zero_point, dtype=torch.float32).reshape(shape)

    def scale(self) -> torch.Tensor:
        """Positive, in a shape that broadcasts."""
        if not self._power_of_two:
            return self.log_scale.exp()
        exponent = self.log_scale / np.log(2)
        return torch.exp2(_straight_through(exponent, torch.round(exponent)))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        scale = self.scale()
        if self._binary:
            inside = (values / scale).clamp(-1, 1)
            return _straight_through(inside, torch.where(values < 0, -1.0, 1.0)) * scale
        steps = (values / scale).clamp(self._low - self._zero_point, self._high - self._zero_point)
        return _straight_through(steps, torch.round(steps)) * scale

    def learned(self) -> TensorFormat:
        """The format with the present scale."""
        scale = self.scale().detach().numpy().reshape(self._fmt.scale.shape)
        return replace(self._fmt, scale=scale.astype(np.float32))


class FixedIntegers(nn.Module):
    """Weights whose integers are chosen: whatever it gets, it gives these times a scale that is learned.

    Args:
        integers: in the layout of the weights.
        fmt: as of `FakeQuantize`; with blocks the scales stay, too.
        fixed: whether they stay in any case.
    """

    def __init__(self, integers: np.ndarray, fmt: TensorFormat, *, fixed: bool = False) -> None:
        super().__init__()
        self._fmt = fmt
        fixed = fixed or fmt.block is not None
        shape = _along(integers.ndim, fmt.axis) if fmt.block is None else fmt.scale.shape
        scale = torch.tensor(np.maximum(fmt.scale, ZERO_SPAN), dtype=torch.float32).reshape(shape)
        self.log_scale = nn.Parameter(scale.log(), requires_grad=not fixed)
        # What does not change is multiplied once, by the numbers as they are.
        self._real = torch.from_numpy(dequantize_array(integers, fmt)) if fixed else None
        zero_point = 0 if fmt.block is not None else torch.tensor(fmt.zero_point, dtype=torch.float32).reshape(shape)
        self._integers = torch.tensor(integers, dtype=torch.float32) - zero_point

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        assert values.shape == self._integers.shape
        return self._integers * self.log_scale.exp() if self._real is None else self._real

    def learned(self) -> TensorFormat:
        """The format with the present scale."""
        if self._real is not None:
            return self._fmt
        scale = self.log_scale.detach().exp().numpy().reshape(self._fmt.scale.shape)
        return replace(self._fmt, scale=scale.astype(np.float32))


def _straight_through(values: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """`rounded`, with the gradient of `values`."""
    return rounded.detach() + (values - values.detach())


def _along(rank: int, axis: int | None) -> Sequence[int]:
    return [-1 if index == axis else 1 for index in range(rank)] if axis is not None else []
