"""The NPU's commands: one table shared by the driver generator, the C ABI and the cost model.

A driver issues commands by calling ``qrt_<name>(int32, …)`` of `runtime_stubs/abi/qrt.h`. The simulator logs each
call as int32 words ``code, argument…``; the generator can produce the same words without running anything. The
cost model reads words and nothing else, so a static estimate and a simulated run cannot disagree.

Registers (`ifm`, `ofm`, `wrap`, `kernel`, `weights`, `scales`) hold until overwritten, as in the Ethos-U command
stream; `conv`, `pool`… run with what they find. An address is a base and a byte offset: base 0 is the
scratchpad, others are external buffers bound by the host. Strides are in bytes. Commands issue in
order; `dma` and `fill` run on the DMA engine, operations on their engine, both asynchronously; `barrier`
waits for everything outstanding. Two commands between the same barriers must not touch the same
bytes unless both only read (the simulator checks it).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Opcode:
    """One command: its number and its argument names."""

    code: int
    name: str
    arguments: tuple[str, ...]


LAYER = Opcode(1, "layer", ("index",))
"""The commands that follow belong to node `index` of the region."""
ALLOC = Opcode(2, "alloc", ("offset", "bytes"))
"""Reserve scratchpad; every later access must lie in a live reservation, and reservations must not overlap."""
FREE = Opcode(3, "free", ("offset", "bytes"))
DMA = Opcode(
    4,
    "dma",
    (
        "dst_base", "dst_offset", "dst_plane_stride", "dst_row_stride",
        "src_base", "src_offset", "src_plane_stride", "src_row_stride",
        "planes", "rows", "row_bytes",
    ),
)  # fmt: skip
FILL = Opcode(5, "fill", ("base", "offset", "plane_stride", "row_stride", "planes", "rows", "row_bytes", "value"))
BARRIER = Opcode(6, "barrier", ())
IFM = Opcode(
    10,
    "ifm",
    (
        "slot",
        "base",
        "offset",
        "height",
        "width",
        "depth",
        "stride_y",
        "stride_x",
        "stride_c",
        "dtype",
        "zero_point",
    ),
)
"""Input feature map `slot` (0, or 1 for the second operand). A stride of 0 broadcasts; `stride_c` is that or the
element's size."""
OFM = Opcode(
    11,
    "ofm",
    (
        "base",
        "offset",
        "height",
        "width",
        "depth",
        "stride_y",
        "stride_x",
        "dtype",
        "zero_point",
        "clamp_min",
        "clamp_max",
    ),
)
KERNEL = Opcode(
    12,
    "kernel",
    ("height", "width", "stride_y", "stride_x", "dilation_y", "dilation_x", "pad_top", "pad_left"),
)
"""Padding below and to the right follows from the IFM's size: reads outside it see the zero point. `pad_top` and
`pad_left` are negative where a tile's windows start inside its IFM. A transposed convolution's output (y, x)
gathers pixels with ``y + pad_top == iy * stride_y + ky * dilation_y``."""
WEIGHTS = Opcode(13, "weights", ("base", "offset", "dtype", "zero_point", "group"))
"""[OFM depth, kernel height, kernel width, IFM depth per group], dense. int4: two to a byte, the first in the low
nibble; int2: four to a byte; int1, which stands for 2 * bit - 1: eight to a byte. The first weight lies lowest, and
every OFM channel starts at a whole byte (`arithmetic.pack_bits`). int8_2of4: two weights of every four neighbours along
the IFM depth and where they stand, as `integer.sparsity.pack_2_of_4` lays out an OFM channel. With a `group` they are
codes of int4, int2 or int1 that become int8 as they are loaded: every so many neighbours along the IFM depth are
multiplied by a factor, which stands, less 1, behind the channel's codes: in a nibble beside int4, else in a byte."""
SCALES = Opcode(14, "scales", ("base", "offset", "variant"))
"""One record a channel: bias int32, multiplier (int32, or the bits of a float32), shift int32."""
WRAP = Opcode(15, "wrap", ("map", "height", "offset"))
"""Rows of a map from `height` on lie from `offset` of its base on: it is the part of a rolling buffer that holds the
tile, and wraps around. `map` is an IFM slot, or 2 for the OFM, set before; setting it anew makes it whole."""
CONV = Opcode(20, "conv", ("ifm_group_depth", "ofm_group_depth"))
CONV_TRANSPOSE = Opcode(21, "conv_transpose", ("ifm_group_depth", "ofm_group_depth"))
MAX_POOL = Opcode(22, "max_pool", ())
AVERAGE_POOL = Opcode(23, "average_pool", ("count_include_pad",))
"""If `count_include_pad`, every window counts as whole and `scales` holds one record; else it holds one per count,
entry n-1 for n elements inside the IFM."""
ADD = Opcode(
    24,
    "add",
    ("subtract", "multiplier_a", "shift_a", "multiplier_b", "shift_b", "multiplier_y", "shift_y", "variant"),
)
MUL = Opcode(25, "mul", ())
REQUANTIZE = Opcode(26, "requantize", ())
"""`mul` and `requantize` use the first record of `scales`."""
LOOKUP = Opcode(27, "lookup", ("base", "offset"))
"""256 entries of the OFM's type, of 8 bits; or 513 int16 between which int16 IFMs are interpolated."""
SOFTMAX = Opcode(28, "softmax", ("base", "offset", "inverse_scale"))
"""`lookup` and `softmax` find the tables of `integer.ops` at an address."""
RESIZE_NEAREST = Opcode(29, "resize_nearest", ("base", "y_index", "x_index", "y_origin"))
RESIZE_LINEAR = Opcode(30, "resize_linear", ("base", "y_index", "y_weight", "x_index", "x_weight", "y_origin"))
"""Table offsets of `integer.ops`; `y_origin` is the row of the whole IFM that row 0 of the tile holds."""

OPCODES: tuple[Opcode, ...] = (
    LAYER, ALLOC, FREE, DMA, FILL, BARRIER, IFM, OFM, KERNEL, WEIGHTS, SCALES, WRAP, CONV, CONV_TRANSPOSE, MAX_POOL,
    AVERAGE_POOL, ADD, MUL, REQUANTIZE, LOOKUP, SOFTMAX, RESIZE_NEAREST, RESIZE_LINEAR,
)  # fmt: skip
BY_CODE: dict[int, Opcode] = {opcode.code: opcode for opcode in OPCODES}

SCRATCHPAD = 0
OFM_MAP = 2
"""`map` of `wrap`; the IFMs' are their slots."""
DTYPES: tuple[str, ...] = ("int8", "uint8", "int16", "int32", "int4", "int2", "int1", "int8_2of4")
"""`dtype` arguments index this. Those from int4 on are for weights only."""
BITS: tuple[int, ...] = (8, 8, 16, 32, 4, 2, 1, 5)
"""Of one element, by index of `DTYPES`."""
SPARSE_WEIGHTS = DTYPES.index("int8_2of4")
VARIANTS: tuple[str, ...] = ("float32", "tflite", "tosa", "shift")
"""`variant` arguments index this."""


def element_bytes(dtype: int) -> int:
    """Of one element of a feature map."""
    return BITS[dtype] // 8


@dataclass(frozen=True)
class Command:
    """One decoded command."""

    index: int
    opcode: Opcode
    arguments: tuple[int, ...]

    def __getitem__(self, name: str) -> int:
        return self.arguments[self.opcode.arguments.index(name)]


def decode(words: Sequence[int]) -> Iterator[Command]:
    """Split a log into commands."""
    position = index = 0
    while position < len(words):
        opcode = BY_CODE[int(words[position])]
        end = position + 1 + len(opcode.arguments)
        yield Command(index, opcode, tuple(int(word) for word in words[position + 1 : end]))
        position, index = end, index + 1
