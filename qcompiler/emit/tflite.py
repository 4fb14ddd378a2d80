"""An integer region as a .tflite file that TFLite's reference kernels run with the same results, bit for bit.

TFLite's kernels derive their multipliers from the scales of the tensors, in float64. So the file carries the scales
that the integer graph was made from, and emission checks that they give the very multipliers of the integer operators;
where they do not, or where no TFLite operator computes what ours does, the region is refused with the reason.

With 16-bit activations biases have 64 bits, which makes convolutions add up as many (with 32 they would not), and sums
say that their scales are no powers of two.

Some operators have another form here: means and average pools are depthwise convolutions by ones (TFLite's pool rounds
before it rescales), and padding that neither SAME nor VALID describes is a PAD of its own, which Vela folds back.

The kernels are those of LiteRT's `BUILTIN_REF` resolver; its default ones (XNNPACK) differ from them by one.
Source: tensorflow/lite/kernels/*.cc and kernels/internal/reference.
"""

from collections.abc import Callable, Mapping

import onnx_ir as ir

from qcompiler.emit.nodes import emit_nodes
from qcompiler.emit.tflite_elementwise import emit_add, emit_clip, emit_lookup, emit_mul, emit_requantize, emit_softmax
from qcompiler.emit.tflite_emitter import Emitter, refusal
from qcompiler.emit.tflite_movement import emit_concat, emit_pad, emit_reshape, emit_slice, emit_split, emit_transpose
from qcompiler.emit.tflite_pools import emit_average_pool, emit_max_pool, emit_reduce_mean, emit_resize_nearest
from qcompiler.emit.tflite_products import emit_conv, emit_conv_transpose, emit_gemm, emit_matmul
from qcompiler.integer.formats import QUANTIZED
from qcompiler.partition import Region

_EMITTERS: Mapping[str, Callable[[Emitter, ir.Node], None]] = {
    "QConv": emit_conv,
    "QConvTranspose": emit_conv_transpose,
    "QGemm": emit_gemm,
    "QMatMul": emit_matmul,
    "QAdd": emit_add,
    "QMul": emit_mul,
    "QMaxPool": emit_max_pool,
    "QAveragePool": emit_average_pool,
    "QReduceMean": emit_reduce_mean,
    "QRequantize": emit_requantize,
    "QLookup": emit_lookup,
    "QSoftmax": emit_softmax,
    "QResizeNearest": emit_resize_nearest,
    "Reshape": emit_reshape,
    "Flatten": emit_reshape,
    "Squeeze": emit_reshape,
    "Unsqueeze": emit_reshape,
    "Identity": emit_reshape,
    "Transpose": emit_transpose,
    "Concat": emit_concat,
    "Slice": emit_slice,
    "Split": emit_split,
    "Pad": emit_pad,
    "Clip": emit_clip,
}
"""QResizeLinear is missing: TFLite's weights have 10 bits, ours 11, and its halves round away from zero."""


def tflite_of(region: Region) -> bytes:
    """The file. Inputs and outputs are those of the region, in its order, layout and types.

    Raises:
        QCompilerError: an operator that TFLite cannot compute the way the integer graph does.
    """
    emitter = Emitter(region)
    emit_nodes(region, emitter, _EMITTERS, "TFLite", refusal, QUANTIZED)
    inputs = [emitter.of(value) for value in region.inputs]
    return emitter.model.serialize(inputs, [emitter.of(value) for value in region.outputs])
