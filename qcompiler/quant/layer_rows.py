"""Convolutions and products as plain matrix products: output rows = input rows @ weight rows transposed.

Everything is stacked by group: input rows [groups, rows, K], weight rows [groups, outputs / groups, K], where K counts
input channels of a group times taps of the kernel. A depthwise convolution is C groups of K = kernel area.
"""

import numpy as np
import onnx_ir as ir

from qcompiler.graph import data_input, integer, ints, is_op, shape_of


def has_rows(node: ir.Node) -> bool:
    """Whether the node is a Conv, a Gemm with plain first input, or a MatMul by a matrix."""
    if is_op(node, "Conv"):
        return len(shape_of(data_input(node))) in (3, 4)
    return is_op(node, "Gemm", "MatMul") and len(shape_of(data_input(node, 1))) == 2 and not integer(node, "transA", 0)


def weight_rows(node: ir.Node, weights: np.ndarray) -> np.ndarray:
    """Weights, or anything of their shape, as [groups, outputs / groups, K]."""
    if is_op(node, "Conv"):
        group = integer(node, "group", 1)
        return weights.reshape(group, weights.shape[0] // group, -1)
    transposed = is_op(node, "Gemm") and integer(node, "transB", 0)
    return (weights if transposed else weights.T)[None]


def from_weight_rows(node: ir.Node, rows: np.ndarray) -> np.ndarray:
    """The inverse of `weight_rows`."""
    if is_op(node, "Conv"):
        return rows.reshape(shape_of(data_input(node, 1)))
    transposed = is_op(node, "Gemm") and integer(node, "transB", 0)
    return np.ascontiguousarray(rows[0] if transposed else rows[0].T)


def input_rows(node: ir.Node, x: np.ndarray, limit: int, offset: int = 0) -> np.ndarray:
    """The rows of the first input that make up outputs, float32 [groups, rows, K], padding included.

    Args:
        x: the input tensor.
        limit: about how many rows to keep, evenly spread over the outputs.
        offset: where the spreading starts; take another for each sample.
    """
    if not is_op(node, "Conv"):
        flat = x.reshape(-1, x.shape[-1])
        return flat[_spread(len(flat), limit, offset)][None]
    kernel = shape_of(data_input(node, 1))[2:]
    rank, group = len(kernel), integer(node, "group", 1)
    pads, ones = ints(node, "pads", (0,) * 2 * rank), (1,) * rank
    strides, dilations = ints(node, "strides", ones), ints(node, "dilations", ones)
    padded = np.pad(x, [(0, 0), (0, 0), *zip(pads[:rank], pads[rank:], strict=True)])
    outputs = shape_of(node.outputs[0])[2:]
    places = np.unravel_index(_spread(int(np.prod(outputs)), limit, offset), outputs)
    taps = np.unravel_index(np.arange(int(np.prod(kernel))), kernel)
    at = tuple(
        place[:, None] * stride + tap[None, :] * dilation
        for place, tap, stride, dilation in zip(places, taps, strides, dilations, strict=True)
    )
    windows = padded[(slice(None), slice(None), *at)]  # [batch, channels, places, taps]
    batch, channels, count, area = windows.shape
    stacked = windows.reshape(batch, group, channels // group, count, area).transpose(1, 0, 3, 2, 4)
    return np.ascontiguousarray(stacked, np.float32).reshape(group, batch * count, channels // group * area)


def _spread(count: int, limit: int, offset: int) -> np.ndarray:
    # An odd step does not fall in with the rows of feature maps, whose sizes are mostly even.
    step = -(-count // limit) | 1 if count > limit else 1
    return np.arange(offset % step, count, step)
