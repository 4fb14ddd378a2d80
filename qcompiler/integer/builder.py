"""What realizing shares: reading quantized values off a QDQ graph, and adding integer nodes to it."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir

from qcompiler.graph import (
    Attribute,
    Shape,
    const_of,
    data_input,
    input_of,
    integer,
    make_node,
    producer,
    shape_of,
    value_name,
)
from qcompiler.integer.ops import IntegerOp
from qcompiler.integer.weight_types import narrowed
from qcompiler.passes.rewriting import infer_types
from qcompiler.quant import arithmetic
from qcompiler.quant.arithmetic import RequantizeVariant

EIGHT_BITS = (ir.DataType.INT8, ir.DataType.UINT8)

_STORED = (ml_dtypes.uint2, ml_dtypes.int2, ml_dtypes.uint4, ml_dtypes.int4, np.int8, np.uint8, np.int32)

TO_NHWC, TO_NCHW = (0, 2, 3, 1), (0, 3, 1, 2)
TABLE_SIZE = 256


@dataclass(frozen=True)
class Format:
    """Per-tensor quantization in 8 bits, or in 16 with zero point 0: real = (q - zero_point) * scale."""

    dtype: ir.DataType
    scale: np.float32
    zero_point: int

    @property
    def bits(self) -> int:
        return 8 * self.dtype.numpy().itemsize

    @property
    def limits(self) -> tuple[int, int]:
        info = np.iinfo(self.dtype.numpy())
        return int(info.min), int(info.max)

    def quantize(self, real: np.ndarray | float) -> np.ndarray:
        return arithmetic.quantize(np.asarray(real), self.scale, self.zero_point, self.dtype.numpy())

    def dequantize(self, q: np.ndarray) -> np.ndarray:
        return arithmetic.dequantize(q, self.scale, self.zero_point)

    def codes(self) -> np.ndarray:
        """All 256 integers of 8 bits, lowest first: the order of a QLookup table."""
        assert self.bits == 8
        low, high = self.limits
        return np.arange(low, high + 1).astype(self.dtype.numpy())


@dataclass(frozen=True)
class Quantized:
    """An integer tensor and what its integers mean."""

    value: ir.Value
    format: Format

    @property
    def shape(self) -> Shape:
        return shape_of(self.value)


@dataclass(frozen=True)
class Constant:
    """Quantized constants behind a DequantizeLinear: per tensor (axis None) or per channel along axis."""

    array: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray
    axis: int | None

    @property
    def real(self) -> np.ndarray:
        return arithmetic.dequantize(self.array, self._along(self.scale), self._along(self.zero_point))

    def _along(self, parameter: np.ndarray) -> np.ndarray:
        if self.axis is None:
            return parameter.reshape(())
        shape = [1] * self.array.ndim
        shape[self.axis] = -1
        return parameter.reshape(shape)


@dataclass(frozen=True)
class Output:
    """What an operator must make: a format, a clamp inside it, a shape, and a name to build others from."""

    format: Format
    clamp: tuple[int, int]
    shape: Shape
    name: str


def format_of(node: ir.Node) -> Format | None:
    """The format a QuantizeLinear makes or a DequantizeLinear reads; None if it is not constant or no `Format`."""
    quantized = node.outputs[0] if node.op_type == "QuantizeLinear" else data_input(node)
    scale, zero_point = const_of(input_of(node, 1)), const_of(input_of(node, 2))
    has_zero_point = input_of(node, 2) is not None
    if (
        quantized.dtype not in (*EIGHT_BITS, ir.DataType.INT16)
        or scale is None
        or scale.size != 1
        or scale.dtype != np.float32
    ):
        return None
    if has_zero_point and (zero_point is None or zero_point.size != 1):
        return None
    assert quantized.dtype is not None
    zero = int(zero_point.reshape(())) if zero_point is not None else 0
    if quantized.dtype == ir.DataType.INT16 and zero:
        return None
    return Format(quantized.dtype, np.float32(scale.reshape(())), zero)


def constant_of(value: ir.Value | None) -> Constant | None:
    """Quantized constants behind a DequantizeLinear, seen through a Transpose; None if there are none."""
    if (transpose := producer(value, "Transpose")) is not None:
        inner = constant_of(data_input(transpose))
        if inner is None:
            return None
        order = transpose.attributes.get("perm")
        perm = tuple(order.as_ints()) if order is not None else tuple(reversed(range(inner.array.ndim)))
        axis = perm.index(inner.axis) if inner.axis is not None else None
        return Constant(inner.array.transpose(perm), inner.scale, inner.zero_point, axis)
    dequantize = producer(value, "DequantizeLinear")
    if dequantize is None or integer(dequantize, "block_size", 0):
        return None
    array, scale = const_of(data_input(dequantize)), const_of(input_of(dequantize, 1))
    zero_point = const_of(input_of(dequantize, 2))
    if array is None or scale is None or array.dtype not in _STORED:
        return None
    zero_point = np.zeros(scale.shape, np.int32) if zero_point is None else zero_point.astype(np.int32)
    if array.dtype in (ml_dtypes.uint4, ml_dtypes.uint2):
        # The same numbers as int4: targets have no other 4-bit weights.
        middle = 8 if array.dtype == ml_dtypes.uint4 else 2
        array, zero_point = (array.astype(np.int8) - middle).astype(ml_dtypes.int4), zero_point - middle
    if array.dtype == ml_dtypes.int2:
        array = array.astype(np.int8).astype(ml_dtypes.int4)  # `narrowed` decides what the target stores
    axis = integer(dequantize, "axis", 1) % max(array.ndim, 1) if scale.size > 1 else None
    return Constant(array, scale.astype(np.float32), zero_point, axis)


def real_constant(value: ir.Value | None) -> np.ndarray | None:
    """A float constant, stored as float or quantized."""
    if (array := const_of(value)) is not None:
        return array
    constant = constant_of(value)
    return constant.real if constant is not None else None


class Builder:
    """Adds integer nodes before an insertion point of a graph, under fresh names and with types set."""

    def __init__(
        self,
        graph: ir.Graph,
        variant: RequantizeVariant,
        weight_types: Collection[str] = (),
        group_multiple: int | None = None,
    ) -> None:
        self.graph = graph
        self.variant: RequantizeVariant = variant
        self.weight_types = weight_types
        """What the target can store weights as."""
        self.group_multiple = group_multiple
        """Of what the sizes of groups are multiples that share a factor where it stores weights, if any do."""
        self._before: ir.Node | None = None
        self._names = {value.name for node in graph for value in node.outputs}
        self._names |= set(graph.initializers) | {value.name for value in graph.inputs}
        self._transposed: dict[tuple[ir.Value, tuple[int, ...]], ir.Value] = {}

    def insert_before(self, node: ir.Node) -> None:
        """Later nodes go right before `node`."""
        self._before = node

    def weights(self, array: np.ndarray, hint: str) -> ir.Value:
        """Constant weights, in the fewest bits the target has for them."""
        return self.constant(narrowed(array, self.weight_types), hint)

    def constant(self, array: np.ndarray, hint: str) -> ir.Value:
        # ascontiguousarray makes a vector of a scalar.
        tensor = ir.tensor(np.ascontiguousarray(array).reshape(array.shape))
        value = self._value(hint, array.shape, tensor.dtype)
        value.const_value = tensor
        self.graph.register_initializer(value)
        return value

    def operator(
        self, op: IntegerOp, inputs: Iterable[ir.Value], shape: Sequence[int], dtype: ir.DataType, hint: str
    ) -> ir.Value:
        """Add an integer operator."""
        output = self._value(hint, shape, dtype)
        self._insert(op.node(list(inputs), output, value_name(output)))
        return output

    def standard(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        hint: str,
        attributes: dict[str, Attribute] | None = None,
        *,
        outputs: int = 1,
    ) -> list[ir.Value]:
        """Add an ONNX operator; types follow from ONNX's shape inference."""
        values = [ir.Value(name=self._fresh(hint)) for _ in range(outputs)]
        node = make_node(op_type, inputs, values, attributes)
        infer_types(node)
        self._insert(node)
        return values

    def transpose(self, value: ir.Value, perm: Sequence[int], hint: str) -> ir.Value:
        """Transposed `value`; one node however often it is asked for."""
        key = (value, tuple(perm))
        if key not in self._transposed:
            self._transposed[key] = self.standard("Transpose", [value], hint, {"perm": tuple(perm)})[0]
        return self._transposed[key]

    def reshape(self, value: ir.Value, shape: Sequence[int], hint: str) -> ir.Value:
        """Reshaped `value`, itself if it has the shape."""
        if shape_of(value) == tuple(shape):
            return value
        dims = self.constant(np.asarray(shape, np.int64), f"{hint}.shape")
        return self.standard("Reshape", [value, dims], hint)[0]

    def encoded(self, factors: np.ndarray, hint: str) -> list[ir.Value]:
        """The multiplier and shift inputs for real `factors`."""
        multiplier, shift = arithmetic.multipliers(factors, self.variant)
        return [self.constant(multiplier, f"{hint}.multiplier"), self.constant(shift, f"{hint}.shift")]

    def has_factors(self, factors: np.ndarray) -> bool:
        """Whether the target can rescale by real `factors`: some can by powers of two only."""
        return self.variant != "shift" or bool((np.frexp(factors)[0] == 0.5).all())

    def factor(self, scales: Sequence[np.ndarray | np.float32], out: np.float32) -> np.ndarray:
        """Product of `scales` over `out`, [channels] or [1].

        In float32 for the float32 variant, as onnxruntime's QLinearConv computes it, else in float64, as TFLite does.
        """
        dtype = np.float32 if self.variant == "float32" else np.float64
        product = np.ones(1, dtype)
        for scale in scales:
            product = product * np.asarray(scale, dtype)
        return np.atleast_1d(product / dtype(out)).astype(np.float64)

    def feature_map(self, value: ir.Value, hint: str) -> ir.Value:
        """[N,C,H,W] or [N,C,L] as [N,H,W,C], a 1-D map as one row."""
        if len(shape_of(value)) == 4:
            return self.transpose(value, TO_NHWC, f"{hint}.nhwc")
        moved = self.transpose(value, (0, 2, 1), f"{hint}.nlc")
        batch, length, channels = shape_of(moved)
        return self.reshape(moved, (batch, 1, length, channels), f"{hint}.nhwc")

    def to_channels_first(self, value: ir.Value, shape: Shape, hint: str) -> ir.Value:
        """The inverse of `feature_map`; `shape` is that of the result."""
        if len(shape) == 4:
            return self.transpose(value, TO_NCHW, hint)
        flat = self.reshape(value, (shape[0], shape[2], shape[1]), f"{hint}.nlc")
        return self.transpose(flat, (0, 2, 1), hint)

    def spatial(self, out: Output, make: Callable[[Output], ir.Value]) -> ir.Value:
        """Build an operator on NHWC maps and bring its result to the channels-first shape of `out`."""
        batch, channels, *size = out.shape
        height, width = size if len(size) == 2 else (1, size[0])
        inner = Output(out.format, out.clamp, (batch, height, width, channels), f"{out.name}.nhwc")
        return self.to_channels_first(make(inner), out.shape, out.name)

    def _insert(self, node: ir.Node) -> None:
        assert self._before is not None
        self.graph.insert_before(self._before, node)

    def _value(self, hint: str, shape: Sequence[int], dtype: ir.DataType) -> ir.Value:
        return ir.Value(name=self._fresh(hint), shape=ir.Shape(shape), type=ir.TensorType(dtype))

    def _fresh(self, hint: str) -> str:
        name, suffix = hint, 0
        while name in self._names:
            suffix += 1
            name = f"{hint}_{suffix}"
        self._names.add(name)
        return name


def window_pads(
    node: ir.Node, size: Sequence[int], out: Sequence[int], kernel: Shape, strides: Shape, dilations: Shape
) -> Shape:
    """The explicit pads of a Conv or pool: starts, then ends."""
    attribute, mode = node.attributes.get("pads"), node.attributes.get("auto_pad")
    spatial = len(kernel)
    if mode is None or mode.as_string() == "NOTSET":
        return tuple(attribute.as_ints()) if attribute is not None else (0,) * (2 * spatial)
    if mode.as_string() == "VALID":
        return (0,) * (2 * spatial)
    total = [
        max(0, (o - 1) * s + (k - 1) * d + 1 - i)
        for o, s, k, d, i in zip(out, strides, kernel, dilations, size, strict=True)
    ]
    less, more = [t // 2 for t in total], [t - t // 2 for t in total]
    return (*less, *more) if mode.as_string() == "SAME_UPPER" else (*more, *less)


def needed_strides(strides: Sequence[int], out: Sequence[int]) -> Shape:
    """Strides, 1 along axes with a single output: no step is ever taken there, and engines limit strides."""
    return tuple(1 if count == 1 else stride for stride, count in zip(strides, out, strict=True))


def rows_and_columns(numbers: Sequence[int], default: int) -> tuple[int, int]:
    """One number per spatial axis as (vertical, horizontal); a 1-D map has a single row."""
    return (numbers[0], numbers[1]) if len(numbers) == 2 else (default, numbers[0])


def four_pads(pads: Sequence[int]) -> tuple[int, int, int, int]:
    """top, left, bottom, right."""
    return (pads[0], pads[1], pads[2], pads[3]) if len(pads) == 4 else (0, pads[0], 0, pads[1])
