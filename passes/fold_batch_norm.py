"""Fold BatchNormalization into the convolution or product before it."""

import numpy as np
import onnx_ir as ir

from qcompiler.graph import const_of, data_input, dtype_of, integer, real, shape_of
from qcompiler.passes.fold_affine import fold_into_linear, linear_behind
from qcompiler.passes.rewriting import Rewrite, until_settled


class FoldBatchNorm(ir.passes.InPlacePass):
    """Conv, ConvTranspose or Gemm, BatchNormalization => the former alone, if nothing else reads it.

    Elsewhere (behind a Concat, or a quantized weight) the normalization becomes Mul and Add by constants per channel.
    Both are exact in real numbers: y = x * s + (bias - mean * s) with s = scale / sqrt(var + epsilon), in float64.
    Training mode and parameters that are not constant are left alone.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        return until_settled(model, ("BatchNormalization",), _fold)


def _fold(norm: ir.Node) -> bool:
    parameters = [const_of(value) for value in norm.inputs[1:5]]
    arrays = [parameter.astype(np.float64) for parameter in parameters if parameter is not None]
    if len(arrays) != 4 or integer(norm, "training_mode", 0):
        return False
    weight, bias, mean, variance = arrays
    scale = weight / np.sqrt(variance + real(norm, "epsilon", 1e-5))
    shift = bias - mean * scale
    x = data_input(norm)
    behind = linear_behind(x)
    if behind is not None and behind[1] == 1 and fold_into_linear(behind[0], norm, scale, shift):
        return True
    rewrite = Rewrite(norm)
    broadcast = (-1, *(1,) * (len(shape_of(x)) - 2))
    dtype = dtype_of(x)
    factor = rewrite.constant(scale.astype(dtype).reshape(broadcast), f"{norm.name}_scale")
    offset = rewrite.constant(shift.astype(dtype).reshape(broadcast), f"{norm.name}_shift")
    return rewrite.replace(rewrite.node("Add", [rewrite.node("Mul", [x, factor], layer=norm), offset]))
