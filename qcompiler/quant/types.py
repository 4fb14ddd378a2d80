"""What calibration and planning hand on: ranges and formats of tensors."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np

RangeMethod = Literal["minmax", "moving_average", "percentile", "entropy", "mse", "auto"]
"""How the interval of an activation follows from what was seen; see `qcompiler.calibrate.calibrate`."""
Quality = Literal["fast", "balanced", "best"]
"""How much time to spend on repairing the quantized model; see `qcompiler.quant.repair.EFFORTS`."""
Technique = Literal["absorb", "equalize", "migrate", "scales", "gptq", "adaround", "feedback", "bias", "tune"]
"""What qualities are made of: passes over the float model, steps of `qcompiler.quant.repair`, and `tune_scales`."""
TECHNIQUES: tuple[Technique, ...] = get_args(Technique)
DTypeName = Literal["int1", "int2", "int4", "int8", "uint8", "int16", "int32"]
"""int1 holds -1 and 1."""
WeightType = Literal["int8", "int4", "int2", "binary"]
"""int8 stands for the target's first 8-bit type; binary weights are -1 or 1 times their scale."""


ActivationType = Literal["int8", "int16", "dynamic", "float"]
"""int8 stands for the target's first 8-bit type; dynamic: float tensors, quantized to uint8 where they are multiplied,
each by its own range at run time; float: only weights are quantized. Where weights have scales in groups, dynamic
rounds each group of a row to int8."""


Scheme = Literal["rtn", "hqq", "gptq", "awq"]
"""How weights that share scales in groups are rounded; see `qcompiler.quant.weight_only`."""


@dataclass(frozen=True)
class WeightRequest:
    """What weights are to be stored as, and activations computed in."""

    default: WeightType = "int8"
    by_layer: Mapping[str, WeightType] = field(default_factory=dict)
    """Layers that differ, by name as in reports."""
    activations: ActivationType = "int8"
    edges: bool = False
    """Whether layers next to inputs and outputs have `default` too; else they keep 8 bits."""
    group: int | None = None
    """How many weights of one output share a scale, along the input axis; None for all of them. Beside integer
    activations it is for weights of less than 8 bits."""
    scheme: Scheme | None = None
    """Of weights in groups beside float activations; None leaves the choice to the quality."""
    groups: Mapping[str, int] = field(default_factory=dict)
    """Layers in which another number of weights than `group` shares a scale; 0 for all of them."""
    activations_by_layer: Mapping[str, "WideType"] = field(default_factory=dict)
    """Layers whose inputs have another type than `activations`, beside int8 and int16; by name as in reports."""


WideType = Literal["int8", "int16"]
"""What a layer reads its activations as; int8 stands for the target's first 8-bit type."""

HalfType = Literal["float16", "bfloat16"]
"""Floats of 16 bits."""


@dataclass(frozen=True)
class PruneRequest:
    """How many weights become zero: a fraction, or two of every four neighbours along the input channels."""

    fraction: float = 0.5
    two_of_four: bool = False


@dataclass(frozen=True)
class Range:
    """The chosen real interval of one tensor, low <= 0 <= high, and where it came from."""

    low: float
    high: float
    observed_low: float
    observed_high: float


@dataclass(frozen=True)
class Ranges:
    """Activation ranges by value name, of every float tensor of the simplified model whose format is its own."""

    by_name: Mapping[str, Range]
    method: RangeMethod
    samples: int
    synthetic: bool
    """True if no calibration data was given and random inputs stood in."""
    wide: Mapping[str, Range] | None = None
    """As `by_name`, for formats of 16 bits, where `by_name` is for 8 and there are both."""
    channel_means: Mapping[str, np.ndarray] = field(default_factory=dict)
    """By name of each node with constant weights: the mean of its input per channel; empty if synthetic."""


@dataclass(frozen=True)
class TensorFormat:
    """Affine quantization of one tensor: real = (q - zero_point) * scale.

    scale and zero_point are 0-d for per-tensor formats and [channels] along `axis` for per-channel ones. With a `block`
    they have the tensor's shape but for `axis`, along which each serves so many elements, the last perhaps fewer.
    """

    dtype: DTypeName
    scale: np.ndarray
    zero_point: np.ndarray
    axis: int | None = None
    block: int | None = None
    factor: np.ndarray | None = None
    """Of weights in groups beside integer activations, uint8 of the shape of `scale`: how many times the output
    channel's unit each scale is; see `qcompiler.quant.grouped_weights`."""
    used: tuple[int, int] | None = None
    """Of an activation: the smallest and largest integer it may hold, if fewer than the type; see
    `qcompiler.finetune.four_bits`."""

    @property
    def per_channel(self) -> bool:
        return self.axis is not None


@dataclass(frozen=True)
class Conversion:
    """A tensor that some operators read in another format than it is made in."""

    format: TensorFormat
    readers: frozenset[str]
    """Names of nodes."""


@dataclass(frozen=True)
class QuantPlan:
    """Which tensors get which format, and which nodes stay float and why."""

    activations: Mapping[str, TensorFormat]
    """By value name: these values get a QuantizeLinear/DequantizeLinear pair."""
    weights: Mapping[str, TensorFormat]
    """By initializer name: stored quantized, behind a DequantizeLinear."""
    biases: Mapping[str, TensorFormat]
    """By node name (a constant may serve several): int32, scale = input scale * weight scale."""
    float_nodes: Mapping[str, str] = field(default_factory=dict)
    """Node name to the reason it stays in float."""
    bias_shifts: Mapping[str, np.ndarray] = field(default_factory=dict)
    """By node name, [output channels]: what to add to the bias to make up for the rounding of the weights."""
    rounded: Mapping[str, np.ndarray] = field(default_factory=dict)
    """By initializer name: the integers of weights that are not each rounded to the nearest."""
    pruned: frozenset[str] = frozenset()
    """Names of nodes whose zero weights stay zero when integers are learned."""
    dynamic: frozenset[str] = frozenset()
    """Names of nodes whose first input is quantized by its range at run time; their outputs and biases are float."""
    conversions: Mapping[str, Conversion] = field(default_factory=dict)
    """By name of values of `activations`."""

    def read(self, value: str, node: str) -> TensorFormat:
        """The format in which a node reads a quantized value, by their names."""
        conversion = self.conversions.get(value)
        return conversion.format if conversion is not None and node in conversion.readers else self.activations[value]
