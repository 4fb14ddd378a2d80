"""Make up for the mean error that rounding the weights brings.

Rounded weights W' shift the mean of output channel o by Σ (W' - W)[o, c, …] E[x_c], which is not zero where inputs are
not centred, and after a Relu they never are. Subtracting the shift from the bias costs nothing at run time
(Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, ICCV 2019, section 4.2).
"""

import numpy as np
import onnx_ir as ir

from qcompiler.graph import data_input, integer, is_op, shape_of


def input_channel_axis(node: ir.Node) -> int | None:
    """The axis of a product's first input that runs along its weights' input channels; None if not corrected.

    A transposed convolution is not: how many taps meet in a pixel depends on where it is.
    """
    if is_op(node, "Conv"):
        return 1
    if is_op(node, "Gemm", "MatMul") and len(shape_of(data_input(node, 1))) == 2:
        return len(shape_of(data_input(node))) - 1
    return None


def bias_shift(node: ir.Node, weights: np.ndarray, rounded: np.ndarray, means: np.ndarray) -> np.ndarray:
    """What to add to the bias of a Conv, Gemm or MatMul.

    Args:
        weights: the float weights, in the node's own layout.
        rounded: the same after quantizing and dequantizing.
        means: [input channels] mean of the first input.

    Returns:
        float64 [output channels]. Borders, where padding takes part, are treated like the inside.
    """
    error = rounded.astype(np.float64) - weights
    if is_op(node, "Conv"):
        outputs, group = weights.shape[0], integer(node, "group", 1)
        per_input = error.sum(axis=tuple(range(2, weights.ndim)))
        seen = means.reshape(group, -1).repeat(outputs // group, axis=0)
        return -(per_input * seen).sum(axis=1)
    transposed = is_op(node, "Gemm") and integer(node, "transB", 0)
    return -(error @ means if transposed else means @ error)
