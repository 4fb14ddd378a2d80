"""What a compute engine is asked to do, and what that costs it: the vocabulary of the engine models."""

from dataclasses import dataclass
from math import ceil
from typing import Literal, Self

from qcompiler.target import Memory

OpClass = Literal["conv", "depthwise", "max_pool", "average_pool", "add", "mul", "requantize", "lookup", "softmax",
                  "resize_nearest", "resize_linear"]  # fmt: skip

Dims = tuple[int, int, int]
"""Height, width, depth."""

SCALE_RECORD_BYTES = 12
"""Bias, multiplier and shift of one channel, as `isa.SCALES` reads them."""


@dataclass(frozen=True, slots=True)
class Shape:
    """One command's geometry. Feature maps are height, width, depth; bits are those of one element."""

    op: OpClass
    ofm: Dims
    ifm: Dims
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    """Convolutions only: independent convolutions over ifm[2] / groups and ofm[2] / groups channels."""
    ifm_bits: int
    ofm_bits: int
    weight_bits: float
    """On average: weights in groups take their codes' bits and a share of their factors'."""
    upsampling: int
    """Output positions per input position of a transposed convolution, else 1."""
    second: Dims | None = None
    """The other operand of an elementwise operation; 1 along an axis it is broadcast along."""
    sparse_speedup: float = 1.0
    """How many times faster the engine multiplies because it skips zero weights."""

    @property
    def ofm_elements(self) -> int:
        return self.ofm[0] * self.ofm[1] * self.ofm[2]

    @property
    def ifm_elements(self) -> int:
        return self.ifm[0] * self.ifm[1] * self.ifm[2]

    @property
    def window(self) -> int:
        return self.kernel[0] * self.kernel[1]

    @property
    def has_weights(self) -> bool:
        return self.op in ("conv", "depthwise")

    @property
    def weight_elements(self) -> int:
        return self.window * self.ofm[2] * (self.ifm[2] // self.groups) if self.has_weights else 0

    @property
    def macs(self) -> int:
        """Multiplications with an input element, padding included (as everyone counts)."""
        if not self.has_weights:
            return 0
        return ceil(self.ofm_elements * self.window * (self.ifm[2] // self.groups) / self.upsampling)


@dataclass(frozen=True, slots=True)
class Work:
    """What one command asks of its engine."""

    cycles: float
    ifm_bytes: float
    """Read from the input feature map's memory, repeated reads included."""
    weight_bytes: float
    ofm_bytes: float


@dataclass(frozen=True, slots=True)
class Port:
    """A memory as an engine sees it."""

    bandwidth: float
    """Bytes a cycle."""
    latency: float
    """Cycles."""
    burst: int
    """Bytes; shorter runs cost as much."""

    @classmethod
    def of(cls, memory: Memory, clock: float) -> Self:
        return cls(memory.bandwidth.per_cycle(clock), memory.latency.cycles(clock), max(1, memory.burst))


@dataclass(frozen=True, slots=True)
class Feed:
    """The memories an engine works from."""

    ifm: Port
    ofm: Port
    scales: Port
