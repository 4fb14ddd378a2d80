"""The integer operators: the `qcompiler` ONNX domain, version 1.

A realized model is an ordinary ONNX graph in which every quantized tensor really is int8, uint8 or int16. It holds
these operators, standard data movement on integer tensors (Reshape, Transpose, Concat, Split, Slice, Pad,
Clip, ArgMax…), QuantizeLinear and DequantizeLinear at the borders, and whatever stays in float.

16-bit tensors have zero point 0. Their products with weights, and their means, which are products with ones,
accumulate in 64 bits and end in `arithmetic.rescale_wide`; everything else stays within 32. Interpolation takes 8 bits.

Feature maps are NHWC, convolution weights OHWI (``[out, kernel_h, kernel_w, in / group]``), and the
arithmetic is spelt out: zero points and clamps are attributes, rescale factors are constant inputs
encoded by `qcompiler.quant.arithmetic.multipliers`. Each dataclass below is one operator's attributes, one
ONNX attribute per field; its docstring gives inputs, output and formula, and `qcompiler.integer.reference`
executes it. ``requant(acc)`` means `arithmetic.requantize(acc, multiplier, shift, requantize, y_zero_point,
(clamp_min, clamp_max), y.dtype)`; the clamp already holds a fused activation.
"""

from dataclasses import dataclass, fields
from typing import ClassVar, Self

import onnx_ir as ir

from qcompiler.graph import QCOMPILER_DOMAIN, Attribute, make_node


@dataclass(frozen=True)
class IntegerOp:
    """Base of the attribute records; converts between fields and ONNX attributes."""

    op_type: ClassVar[str]

    @classmethod
    def of(cls, node: ir.Node) -> Self:
        """Read the attributes of a node of this type."""
        assert node.domain == QCOMPILER_DOMAIN and node.op_type == cls.op_type, f"{node.op_type} is not {cls.op_type}"
        values = {field.name: node.attributes[field.name].value for field in fields(cls)}
        return cls(
            **{name: tuple(value) if isinstance(value, list | tuple) else value for name, value in values.items()}
        )

    def node(self, inputs: list[ir.Value], output: ir.Value, name: str) -> ir.Node:
        """A node with these attributes, not yet in a graph."""
        attributes: dict[str, Attribute] = {field.name: getattr(self, field.name) for field in fields(self)}
        return make_node(self.op_type, inputs, [output], attributes, domain=QCOMPILER_DOMAIN, name=name)


@dataclass(frozen=True)
class QConv(IntegerOp):
    """2-D convolution, grouped and depthwise (group == in channels) included.

    Inputs: x [N,H,W,C] int8|uint8|int16; w [O,KH,KW,C/group] int2|int4|int8|uint8; bias [O] int32; multiplier [O];
    shift [O].
    Output: y [N,OH,OW,O].  y = requant(bias + Σ (x - x_zero_point)(w - w_zero_point)); padding adds nothing.
    pads: top, left, bottom, right.
    """

    op_type: ClassVar[str] = "QConv"
    kernel_shape: tuple[int, int]
    strides: tuple[int, int]
    pads: tuple[int, int, int, int]
    dilations: tuple[int, int]
    group: int
    x_zero_point: int
    w_zero_point: int
    y_zero_point: int
    clamp_min: int
    clamp_max: int
    requantize: str


@dataclass(frozen=True)
class QConvTranspose(IntegerOp):
    """2-D transposed convolution. Inputs and formula as QConv, w [O,KH,KW,C/group] too.

    Output pixel (oy, ox) gathers inputs with ``oy + pad_top == iy * stride + ky * dilation``; the output's
    size is that of the output value's shape (output_padding is already in it).
    """

    op_type: ClassVar[str] = "QConvTranspose"
    kernel_shape: tuple[int, int]
    strides: tuple[int, int]
    pads: tuple[int, int, int, int]
    dilations: tuple[int, int]
    group: int
    x_zero_point: int
    w_zero_point: int
    y_zero_point: int
    clamp_min: int
    clamp_max: int
    requantize: str


@dataclass(frozen=True)
class QGemm(IntegerOp):
    """Fully connected. x [M,K]; w [N,K] int2|int4|int8|uint8; bias [N] int32; multiplier [N]; shift [N] → y [M,N].

    y = requant(bias + Σ_k (x - x_zero_point)(w - w_zero_point)).
    """

    op_type: ClassVar[str] = "QGemm"
    x_zero_point: int
    w_zero_point: int
    y_zero_point: int
    clamp_min: int
    clamp_max: int
    requantize: str


@dataclass(frozen=True)
class QConvDynamic(IntegerOp):
    """2-D convolution of a tensor quantized at run time, with a float result.

    Inputs: x [N,H,W,C] uint8|int8; x_scale [] float32; x_zero_point [] of x's type; w [O,KH,KW,C/group];
    w_scale [O] float32; bias [O] float32.
    Output: y [N,OH,OW,O] float32.  y = clip(float32(acc) * (x_scale * w_scale) + bias, clamp_min, clamp_max), with
    acc = Σ (x - x_zero_point)(w - w_zero_point) exact, in int32; padding adds nothing. The rest agrees to rounding,
    for compilers contract a multiplication and an addition.
    """

    op_type: ClassVar[str] = "QConvDynamic"
    kernel_shape: tuple[int, int]
    strides: tuple[int, int]
    pads: tuple[int, int, int, int]
    dilations: tuple[int, int]
    group: int
    w_zero_point: int
    clamp_min: float
    clamp_max: float


@dataclass(frozen=True)
class QGemmDynamic(IntegerOp):
    """Fully connected, of a tensor quantized at run time. x [M,K]; w [N,K]; the rest as `QConvDynamic` → y [M,N]."""

    op_type: ClassVar[str] = "QGemmDynamic"
    w_zero_point: int
    clamp_min: float
    clamp_max: float


@dataclass(frozen=True)
class QMatMul(IntegerOp):
    """Product of two activations. a [...,M,K]; b [...,K,N] (numpy batch broadcasting); multiplier [1]; shift [1].

    y = requant(Σ_k (a - a_zero_point)(b - b_zero_point)).
    """

    op_type: ClassVar[str] = "QMatMul"
    a_zero_point: int
    b_zero_point: int
    y_zero_point: int
    clamp_min: int
    clamp_max: int
    requantize: str


@dataclass(frozen=True)
class QAdd(IntegerOp):
    """a ± b with numpy broadcasting. y = saturate(arithmetic.add(a - a_zero_point, b - b_zero_point) + y_zero_point).

    Inputs: a, b. The six factors are `arithmetic.add_factors`; subtract is 0 or 1.
    """

    op_type: ClassVar[str] = "QAdd"
    subtract: int
    a_zero_point: int
    b_zero_point: int
    y_zero_point: int
    multiplier_a: int
    shift_a: int
    multiplier_b: int
    shift_b: int
    multiplier_y: int
    shift_y: int
    clamp_min: int
    clamp_max: int
    requantize: str


@dataclass(frozen=True)
class QMul(IntegerOp):
    """a * b with numpy broadcasting. Inputs: a, b, multiplier [1], shift [1].

    y = requant((a - a_zero_point) * (b - b_zero_point)).
    """

    op_type: ClassVar[str] = "QMul"
    a_zero_point: int
    b_zero_point: int
    y_zero_point: int
    clamp_min: int
    clamp_max: int
    requantize: str


@dataclass(frozen=True)
class QMaxPool(IntegerOp):
    """Maximum over windows of x [N,H,W,C]; padding never wins; scale and zero point pass through. Then the clamp."""

    op_type: ClassVar[str] = "QMaxPool"
    kernel_shape: tuple[int, int]
    strides: tuple[int, int]
    pads: tuple[int, int, int, int]
    dilations: tuple[int, int]
    clamp_min: int
    clamp_max: int


@dataclass(frozen=True)
class QAveragePool(IntegerOp):
    """Mean over windows of x [N,H,W,C]. Inputs: x, multiplier [KH*KW], shift [KH*KW].

    n is the number of window positions inside the input (count_include_pad = 0) or always KH*KW
    (count_include_pad = 1); entry n-1 of multiplier/shift holds the factor input_scale / (n * output_scale).
    y = requant(Σ (x - x_zero_point)) with that entry.
    """

    op_type: ClassVar[str] = "QAveragePool"
    kernel_shape: tuple[int, int]
    strides: tuple[int, int]
    pads: tuple[int, int, int, int]
    count_include_pad: int
    x_zero_point: int
    y_zero_point: int
    clamp_min: int
    clamp_max: int
    requantize: str


@dataclass(frozen=True)
class QReduceMean(IntegerOp):
    """Mean over `axes` (sorted, not negative). Inputs: x, multiplier [1], shift [1] (factor includes 1/count).

    The output's shape (with or without the reduced axes) is that of the output value.
    y = requant(Σ (x - x_zero_point)).
    """

    op_type: ClassVar[str] = "QReduceMean"
    axes: tuple[int, ...]
    x_zero_point: int
    y_zero_point: int
    clamp_min: int
    clamp_max: int
    requantize: str


@dataclass(frozen=True)
class QRequantize(IntegerOp):
    """Change of scale, zero point or signedness. Inputs: x, multiplier [1], shift [1].

    y = requant(x - x_zero_point).
    """

    op_type: ClassVar[str] = "QRequantize"
    x_zero_point: int
    y_zero_point: int
    clamp_min: int
    clamp_max: int
    requantize: str


@dataclass(frozen=True)
class QLookup(IntegerOp):
    """Any unary function. Inputs: x, table [256] of the output's dtype, or [513] for 16 bits.

    y = table[x - lowest], lowest = -128 for int8, 0 for uint8; y = `interpolation.interpolate` of int16, with an output
    of int16. `function` names what it stands for.
    """

    op_type: ClassVar[str] = "QLookup"
    function: str


TFLITE_SOFTMAX = 0
"""The inverse_scale of a QSoftmax that TFLite's kernel defines; no output scale has this inverse."""


@dataclass(frozen=True)
class QSoftmax(IntegerOp):
    """Softmax over the last axis. Inputs: x, table [256] int32, or [1028] for 16 bits.

    `arithmetic.softmax`; or, where inverse_scale is `TFLITE_SOFTMAX`, `tflite_functions.softmax`, whose output scale is
    1/256. 16 bits have but one: `interpolation.softmax`, whose output is int16 of the scale 1/32768.
    """

    op_type: ClassVar[str] = "QSoftmax"
    inverse_scale: int
    y_zero_point: int
    clamp_min: int
    clamp_max: int


@dataclass(frozen=True)
class QResizeNearest(IntegerOp):
    """y[n,i,j,c] = x[n, y_index[i], x_index[j], c]. Inputs: x [N,H,W,C], y_index [OH] int32, x_index [OW] int32."""

    op_type: ClassVar[str] = "QResizeNearest"


@dataclass(frozen=True)
class QResizeLinear(IntegerOp):
    """Bilinear with 11-bit weights; scale and zero point pass through.

    Inputs: x [N,H,W,C]; y_index [OH,2], y_weight [OH,2], x_index [OW,2], x_weight [OW,2], all int32, each pair
    of weights adding to 2048.  y = (Σ y_weight * x_weight * x + 2^21) >> 22.
    """

    op_type: ClassVar[str] = "QResizeLinear"


@dataclass(frozen=True)
class WeightOnlyGemm(IntegerOp):
    """Fully connected, of float activations: weights alone are integers, and share scales in groups.

    Inputs: x [M,K] float32; w [N,K] int4|int8|uint8; scale [N,ceil(K/group)] float32; zero_point of that shape, of the
    type of w; bias [N] float32 → y [M,N] float32.
    y = bias + arithmetic.weight_only_matmul(x, w, scale, zero_point, group, compute), to float32's rounding.
    """

    op_type: ClassVar[str] = "WeightOnlyGemm"
    group: int
    compute: str


@dataclass(frozen=True)
class QRoundHalf(IntegerOp):
    """x float32 → y float32 of its shape, rounded to the nearest "float16" or "bfloat16", ties to even."""

    op_type: ClassVar[str] = "QRoundHalf"
    half: str


INTEGER_OPS: tuple[type[IntegerOp], ...] = (
    QConv,
    QConvTranspose,
    QGemm,
    QConvDynamic,
    QGemmDynamic,
    QMatMul,
    QAdd,
    QMul,
    QMaxPool,
    QAveragePool,
    QReduceMean,
    QRequantize,
    QLookup,
    QSoftmax,
    QResizeNearest,
    QResizeLinear,
    QRoundHalf,
    WeightOnlyGemm,
)

DOMAIN_VERSION = 1
