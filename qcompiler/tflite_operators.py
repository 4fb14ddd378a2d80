"""TFLite's operators in terms of ONNX's, on real values; `tflite_file.Network` puts the rounding between them.

Source of shapes, paddings and options: tensorflow/compiler/mlir/lite/schema/schema.fbs and tensorflow/lite/kernels.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol, cast

import numpy as np

from qcompiler.tflite_file import Network, Operator

Import = Callable[[Network, Operator], None]

_NCHW_AXES = (0, 2, 3, 1)
"""Where each axis of [N, H, W, C] is in [N, C, H, W]."""


class _Fields(Protocol):
    """The fields of the schema's option tables that are read here, by its names; each table has some of them."""

    padding: int
    strideH: int  # noqa: N815
    strideW: int  # noqa: N815
    dilationHFactor: int  # noqa: N815
    dilationWFactor: int  # noqa: N815
    filterHeight: int  # noqa: N815
    filterWidth: int  # noqa: N815
    fusedActivationFunction: int  # noqa: N815
    keepDims: bool  # noqa: N815
    axis: int
    alpha: float
    beta: float
    adjX: bool  # noqa: N815
    adjY: bool  # noqa: N815
    alignCorners: bool  # noqa: N815
    halfPixelCenters: bool  # noqa: N815
    beginMask: int  # noqa: N815
    endMask: int  # noqa: N815
    ellipsisMask: int  # noqa: N815
    newAxisMask: int  # noqa: N815
    shrinkAxisMask: int  # noqa: N815
    blockSize: int  # noqa: N815
    mode: int
    approximate: bool


def _options(operator: Operator) -> _Fields:
    return cast(_Fields, operator.options)


def _activated(network: Network, operator: Operator, value: str) -> str:
    """The value behind the operator's fused activation."""
    function = getattr(operator.options, "fusedActivationFunction", 0)
    if function == 0:
        return value
    if function not in _ACTIVATIONS:
        raise network.refuse(operator, f"has the fused activation {function}")
    return _ACTIVATIONS[function](network, value)


def _relu(network: Network, value: str) -> str:
    return network.op("Relu", value)


def _clip(network: Network, value: str, low: float, high: float) -> str:
    return network.op("Clip", value, network.number(low), network.number(high))


_ACTIVATIONS: Mapping[int, Callable[[Network, str], str]] = {
    1: _relu,
    2: partial(_clip, low=-1.0, high=1.0),
    3: partial(_clip, low=0.0, high=6.0),
    4: lambda network, value: network.op("Tanh", value),
}
"""By the schema's ActivationFunctionType."""


# --- convolutions and products -----------------------------------------------------------------------------


def _pads(operator: Operator, size: tuple[int, ...], kernel: tuple[int, int], dilations: tuple[int, int]) -> list[int]:
    """ONNX's pads of SAME (0) or VALID (1) padding: the odd pixel goes to the end."""
    options = _options(operator)
    before, after = [], []
    for length, extent, stride, dilation in zip(
        size, kernel, (options.strideH, options.strideW), dilations, strict=True
    ):
        reach = (extent - 1) * dilation + 1
        total = max((-(-length // stride) - 1) * stride + reach - length, 0) if options.padding == 0 else 0
        before.append(total // 2)
        after.append(total - total // 2)
    return before + after


def _sum_scales(network: Network, x: int, w: int) -> np.ndarray:
    """The scales of the sums of products."""
    return np.atleast_1d(network.tensor(x).scales * network.tensor(w).scales).astype(np.float32)


def _with_bias(network: Network, operator: Operator, x: int, w: int, place: int) -> tuple[str, ...]:
    """The bias input, if there is one."""
    if len(operator.inputs) <= place or operator.inputs[place] < 0:
        return ()
    return (network.bias(operator.inputs[place], _sum_scales(network, x, w)),)


def _constant_weights(network: Network, operator: Operator, place: int) -> tuple[int, ...]:
    """The shape of the weights. Raises where they are computed."""
    return network.constant_of(operator, place).shape


def _conv(network: Network, operator: Operator, *, depthwise: bool) -> None:
    x, w = operator.inputs[:2]
    _, height, width, channels = network.tensor(x).shape
    shape, options = _constant_weights(network, operator, 1), _options(operator)
    kernel, dilations = (shape[1], shape[2]), (options.dilationHFactor, options.dilationWFactor)
    value = network.op(
        "Conv",
        network.read(x, nchw=True),
        network.weights(w, (3, 0, 1, 2) if depthwise else (0, 3, 1, 2)),
        *_with_bias(network, operator, x, w, 2),
        kernel_shape=kernel,
        strides=[options.strideH, options.strideW],
        dilations=dilations,
        pads=_pads(operator, (height, width), kernel, dilations),
        group=channels if depthwise else channels // shape[3],
    )
    network.write(operator.outputs[0], _activated(network, operator, value), nchw=True)


def _transpose_conv(network: Network, operator: Operator) -> None:
    w, x = operator.inputs[1:3]
    shape, options = _constant_weights(network, operator, 1), _options(operator)
    kernel, strides = shape[1:3], (options.strideH, options.strideW)
    sizes, made = network.tensor(x).shape[1:3], network.tensor(operator.outputs[0]).shape[1:3]
    before, after, extra = [], [], []
    for size, out, extent, stride in zip(sizes, made, kernel, strides, strict=True):
        full = (size - 1) * stride + extent
        total = max(full - out, 0) if options.padding == 0 else 0
        before.append(total // 2)
        # VALID keeps the first `out` rows of the full result.
        after.append(max(full - out, 0) - total // 2)
        extra.append(max(out - full, 0))
    if any(amount >= stride for amount, stride in zip(extra, strides, strict=True)):
        raise network.refuse(operator, f"makes {made}, more than its kernel reaches")
    value = network.op(
        "ConvTranspose",
        network.read(x, nchw=True),
        network.weights(w, (3, 0, 1, 2)),
        *_with_bias(network, operator, x, w, 3),
        kernel_shape=kernel,
        strides=strides,
        pads=before + after,
        output_padding=extra,
    )
    network.write(operator.outputs[0], _activated(network, operator, value), nchw=True)


def _fully_connected(network: Network, operator: Operator) -> None:
    x, w = operator.inputs[:2]
    outputs, inputs = _constant_weights(network, operator, 1)
    value, rows = network.read(x), int(np.prod(network.tensor(x).shape)) // inputs
    made = network.tensor(operator.outputs[0]).shape
    if network.tensor(x).shape != (rows, inputs):
        value = network.rounded(network.op("Reshape", value, network.shape((rows, inputs))), x)
    weights = network.weights(w, (0, 1))
    value = network.op("Gemm", value, weights, *_with_bias(network, operator, x, w, 2), transB=1)
    value = _activated(network, operator, value)
    if made != (rows, outputs):
        value = network.op("Reshape", network.rounded(value, operator.outputs[0]), network.shape(made))
    network.write(operator.outputs[0], value)


def _batch_matmul(network: Network, operator: Operator) -> None:
    options, values = _options(operator), []
    for index, swapped in zip(operator.inputs, (options.adjX, options.adjY), strict=True):
        value, rank = network.read(index), len(network.tensor(index).shape)
        if swapped:
            order = (*range(rank - 2), rank - 1, rank - 2)
            value = network.rounded(network.op("Transpose", value, perm=order), index)
        values.append(value)
    network.write(operator.outputs[0], network.op("MatMul", *values))


# --- element by element ------------------------------------------------------------------------------------


def _together(network: Network, indices: tuple[int, ...]) -> bool:
    """Should these be read as [N, C, H, W]? If one is at hand so only, and all can be."""
    fits = all(
        len(network.tensor(index).shape) == 4
        or (network.tensor(index).data is not None and len(network.tensor(index).shape) < 4)
        for index in indices
    )
    return fits and any(network.is_nchw(index) for index in indices)


def _elementwise(network: Network, operator: Operator, *, op_type: str) -> None:
    nchw = _together(network, operator.inputs)
    value = network.op(op_type, *(network.read(index, nchw) for index in operator.inputs))
    network.write(operator.outputs[0], _activated(network, operator, value), nchw)


def _unary(network: Network, operator: Operator, make: Callable[[Network, str], str]) -> None:
    nchw = network.is_nchw(operator.inputs[0])
    network.write(operator.outputs[0], make(network, network.read(operator.inputs[0], nchw)), nchw)


def _leaky_relu(network: Network, operator: Operator) -> None:
    alpha = _options(operator).alpha
    _unary(network, operator, lambda net, value: net.op("LeakyRelu", value, alpha=float(alpha)))


def _gelu(network: Network, operator: Operator) -> None:
    form = "tanh" if _options(operator).approximate else "none"
    _unary(network, operator, lambda net, value: net.op("Gelu", value, approximate=form))


def _softmax(network: Network, operator: Operator) -> None:
    if _options(operator).beta != 1:
        raise network.refuse(operator, f"has the factor {_options(operator).beta}, not 1")
    network.write(operator.outputs[0], network.op("Softmax", network.read(operator.inputs[0]), axis=-1))


def _quantize(network: Network, operator: Operator) -> None:
    _unary(network, operator, lambda net, value: value)


def _dequantize(network: Network, operator: Operator) -> None:
    if network.tensor(operator.inputs[0]).data is not None:
        network.alias(operator.outputs[0], operator.inputs[0])
    else:
        _unary(network, operator, lambda net, value: value)


# --- pools and means ---------------------------------------------------------------------------------------


def _pool(network: Network, operator: Operator, *, average: bool) -> None:
    x, options = operator.inputs[0], _options(operator)
    kernel, strides = (options.filterHeight, options.filterWidth), (options.strideH, options.strideW)
    pads = _pads(operator, network.tensor(x).shape[1:3], kernel, (1, 1))
    value = network.read(x, nchw=True)
    if average:
        value = network.op("AveragePool", value, kernel_shape=kernel, strides=strides, pads=pads, count_include_pad=0)
    else:
        value = network.op("MaxPool", value, kernel_shape=kernel, strides=strides, pads=pads)
    network.write(operator.outputs[0], _activated(network, operator, value), nchw=True)


def _axes(network: Network, operator: Operator, place: int, rank: int) -> tuple[int, ...]:
    """A constant list of axes, counted from the front, each once."""
    listed = np.atleast_1d(network.constant_of(operator, place))
    return tuple(sorted({int(axis) % rank for axis in listed}))


def _reduce(network: Network, operator: Operator, *, op_type: str) -> None:
    x = operator.inputs[0]
    rank, keep = len(network.tensor(x).shape), bool(_options(operator).keepDims)
    axes = _axes(network, operator, 1, rank)
    # Without its image axes [N, C, H, W] is [N, C] in either layout.
    nchw = network.is_nchw(x) and (keep or axes == (1, 2))
    places = tuple(_NCHW_AXES[axis] for axis in axes) if nchw else axes
    value = network.op(op_type, network.read(x, nchw), network.shape(places), keepdims=int(keep))
    network.write(operator.outputs[0], value, nchw and keep)


def _resize(network: Network, operator: Operator, *, mode: str) -> None:
    x, options = operator.inputs[0], _options(operator)
    batch, _, _, channels = network.tensor(x).shape
    height, width = (int(size) for size in network.constant_of(operator, 1))
    centres = "half_pixel" if options.halfPixelCenters else "asymmetric"
    centres = "align_corners" if options.alignCorners else centres
    value = network.op(
        "Resize",
        network.read(x, nchw=True),
        "",
        "",
        network.shape((batch, channels, height, width)),
        mode=mode,
        coordinate_transformation_mode=centres,
        nearest_mode="floor" if centres == "asymmetric" else "round_prefer_ceil",
    )
    network.write(operator.outputs[0], value, nchw=True)


# --- moving elements ---------------------------------------------------------------------------------------


def _reshape(network: Network, operator: Operator) -> None:
    shape = network.tensor(operator.outputs[0]).shape
    value = network.read(operator.inputs[0])
    network.write(operator.outputs[0], network.op("Reshape", value, network.shape(shape)))


def _transpose(network: Network, operator: Operator) -> None:
    order = [int(axis) for axis in network.constant_of(operator, 1)]
    value = network.op("Transpose", network.read(operator.inputs[0]), perm=order)
    network.write(operator.outputs[0], value)


def _axis(axis: int, rank: int, nchw: bool) -> int:
    return _NCHW_AXES[axis % rank] if nchw else axis % rank


def _concat(network: Network, operator: Operator) -> None:
    nchw = _together(network, operator.inputs)
    rank = len(network.tensor(operator.outputs[0]).shape)
    values = [network.read(index, nchw) for index in operator.inputs]
    value = network.op("Concat", *values, axis=_axis(_options(operator).axis, rank, nchw))
    network.write(operator.outputs[0], _activated(network, operator, value), nchw)


def _split(network: Network, operator: Operator, *, x_place: int, axis_place: int) -> None:
    x = operator.inputs[x_place]
    nchw, shape = network.is_nchw(x), network.tensor(x).shape
    along = int(network.constant_of(operator, axis_place).ravel()[0]) % len(shape)
    sizes = network.shape([network.tensor(index).shape[along] for index in operator.outputs])
    axis = _axis(along, len(shape), nchw)
    values = network.ops("Split", (network.read(x, nchw), sizes), len(operator.outputs), axis=axis)
    for index, value in zip(operator.outputs, values, strict=True):
        network.write(index, value, nchw)


def _pack(network: Network, operator: Operator) -> None:
    rank = len(network.tensor(operator.outputs[0]).shape)
    axis = _options(operator).axis % rank
    parts = [
        network.rounded(network.op("Unsqueeze", network.read(index), network.shape([axis])), index)
        for index in operator.inputs
    ]
    network.write(operator.outputs[0], network.op("Concat", *parts, axis=axis))


def _mirror_pad(network: Network, operator: Operator) -> None:
    if _options(operator).mode != 0:
        raise network.refuse(operator, "repeats the border (SYMMETRIC)")
    _pad(network, operator, mode="reflect")


def _pad(network: Network, operator: Operator, *, mode: str) -> None:
    x = operator.inputs[0]
    nchw, widths = network.is_nchw(x), network.constant_of(operator, 1).astype(np.int64)
    if nchw:
        widths = widths[[0, 3, 1, 2]]
    filler = (network.number(0.0),) if mode == "constant" else ()
    if len(operator.inputs) > 2:
        filler = (network.number(float(network.real_constant_of(operator, 2).ravel()[0])),)
    value = network.op("Pad", network.read(x, nchw), network.shape(widths.T.ravel().tolist()), *filler, mode=mode)
    network.write(operator.outputs[0], value, nchw)


def _sliced(network: Network, x: int, nchw: bool, bounds: list[tuple[int, int, int]]) -> str:
    """x[begin:end:step, …]: `bounds` by the file's axes."""
    places = [_axis(axis, len(bounds), nchw) for axis in range(len(bounds))]
    begins, ends, steps = (network.shape(column) for column in zip(*bounds, strict=True))
    return network.op("Slice", network.read(x, nchw), begins, ends, network.shape(places), steps)


def _slice(network: Network, operator: Operator) -> None:
    x = operator.inputs[0]
    begins, made = network.constant_of(operator, 1), network.tensor(operator.outputs[0]).shape
    bounds = [(int(begin), int(begin) + size, 1) for begin, size in zip(begins, made, strict=True)]
    nchw = network.is_nchw(x)
    network.write(operator.outputs[0], _sliced(network, x, nchw, bounds), nchw)


_BEYOND = 2**31 - 1
"""An end that ONNX's Slice takes for "to the end"; its negative, going backwards, for the beginning."""


def _strided_slice(network: Network, operator: Operator) -> None:
    x, options = operator.inputs[0], _options(operator)
    if options.ellipsisMask or options.newAxisMask:
        raise network.refuse(operator, "has an ellipsis or a new axis")
    shape, made = network.tensor(x).shape, network.tensor(operator.outputs[0]).shape
    columns = [network.constant_of(operator, place).astype(int).tolist() for place in (1, 2, 3)]
    bounds = [(0, size, 1) for size in shape]
    for axis, (begin, end, step) in enumerate(zip(*columns, strict=True)):
        first = begin if not options.beginMask >> axis & 1 else (0 if step > 0 else _BEYOND)
        last = end if not options.endMask >> axis & 1 else (_BEYOND if step > 0 else -_BEYOND)
        if options.shrinkAxisMask >> axis & 1:
            bounds[axis] = (begin % shape[axis], begin % shape[axis] + 1, 1)
        else:
            bounds[axis] = (first, last, step)
    nchw = network.is_nchw(x) and len(made) == 4
    value = _sliced(network, x, nchw, bounds)
    if options.shrinkAxisMask:
        value = network.op("Reshape", network.rounded(value, x), network.shape(made))
    network.write(operator.outputs[0], value, nchw)


def _blocks(network: Network, operator: Operator, *, op_type: str) -> None:
    value = network.op(op_type, network.read(operator.inputs[0], nchw=True), blocksize=_options(operator).blockSize)
    network.write(operator.outputs[0], value, nchw=True)


def _plain(op_type: str) -> Import:
    return partial(_unary, make=lambda network, value: network.op(op_type, value))


OPERATORS: Mapping[str, Import] = {
    "CONV_2D": partial(_conv, depthwise=False),
    "DEPTHWISE_CONV_2D": partial(_conv, depthwise=True),
    "TRANSPOSE_CONV": _transpose_conv,
    "FULLY_CONNECTED": _fully_connected,
    "BATCH_MATMUL": _batch_matmul,
    "ADD": partial(_elementwise, op_type="Add"),
    "SUB": partial(_elementwise, op_type="Sub"),
    "MUL": partial(_elementwise, op_type="Mul"),
    "DIV": partial(_elementwise, op_type="Div"),
    "MAXIMUM": partial(_elementwise, op_type="Max"),
    "MINIMUM": partial(_elementwise, op_type="Min"),
    "PRELU": partial(_elementwise, op_type="PRelu"),
    "RELU": partial(_unary, make=_relu),
    "RELU6": partial(_unary, make=partial(_clip, low=0.0, high=6.0)),
    "RELU_N1_TO_1": partial(_unary, make=partial(_clip, low=-1.0, high=1.0)),
    "LEAKY_RELU": _leaky_relu,
    "LOGISTIC": _plain("Sigmoid"),
    "TANH": _plain("Tanh"),
    "HARD_SWISH": _plain("HardSwish"),
    "ELU": _plain("Elu"),
    "GELU": _gelu,
    "EXP": _plain("Exp"),
    "ABS": _plain("Abs"),
    "NEG": _plain("Neg"),
    "SQRT": _plain("Sqrt"),
    "SOFTMAX": _softmax,
    "QUANTIZE": _quantize,
    "DEQUANTIZE": _dequantize,
    "MAX_POOL_2D": partial(_pool, average=False),
    "AVERAGE_POOL_2D": partial(_pool, average=True),
    "MEAN": partial(_reduce, op_type="ReduceMean"),
    "SUM": partial(_reduce, op_type="ReduceSum"),
    "REDUCE_MAX": partial(_reduce, op_type="ReduceMax"),
    "RESIZE_NEAREST_NEIGHBOR": partial(_resize, mode="nearest"),
    "RESIZE_BILINEAR": partial(_resize, mode="linear"),
    "RESHAPE": _reshape,
    "SQUEEZE": _reshape,
    "EXPAND_DIMS": _reshape,
    "TRANSPOSE": _transpose,
    "CONCATENATION": _concat,
    "SPLIT": partial(_split, x_place=1, axis_place=0),
    "SPLIT_V": partial(_split, x_place=0, axis_place=2),
    "PACK": _pack,
    "PAD": partial(_pad, mode="constant"),
    "PADV2": partial(_pad, mode="constant"),
    "MIRROR_PAD": _mirror_pad,
    "SLICE": _slice,
    "STRIDED_SLICE": _strided_slice,
    "DEPTH_TO_SPACE": partial(_blocks, op_type="DepthToSpace"),
    "SPACE_TO_DEPTH": partial(_blocks, op_type="SpaceToDepth"),
}
"""By the schema's BuiltinOperator."""
