"""What a target's rules may ask about an operator, read off the node.

`facts_of_float` describes the integer operator a float or QDQ node would become, so that legalization and
planning can ask the target before anything is quantized; `facts_of_integer` describes a node of the realized
graph, float fallbacks included. Both speak the names of `target.RULE_FIELDS`.
"""

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from qcompiler.graph import (
    QCOMPILER_DOMAIN,
    Shape,
    const_of,
    data_input,
    dtype_of,
    element_count,
    input_of,
    integer,
    ints,
    producer,
    shape_of,
    string,
)
from qcompiler.integer import ops
from qcompiler.integer.used import four_bit_type
from qcompiler.integer.weight_types import stored_type
from qcompiler.target import FactValue, OpFacts

Facts = dict[str, FactValue]

LOOKUP_FUNCTIONS: frozenset[str] = frozenset(
    (
        "Abs", "Celu", "Cos", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Log", "Mish",
        "Neg", "Reciprocal", "Selu", "Sigmoid", "Sin", "Softplus", "Softsign", "Sqrt", "Swish", "Tanh",
    )
)  # fmt: skip
"""Float operators of one input that become a table."""

_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_WEIGHTS_AT: Mapping[str, int] = {**dict.fromkeys(_WEIGHTED, 1), "ConvInteger": 3, "MatMulInteger": 3}
"""Which input of an integer operator has the weights, by its ONNX name."""
_BROADCASTING = ("Add", "Sub", "Mul", "Div", "Min", "Max", "Pow", "Where")
_INTEGER_NAMES: Mapping[str, str] = {
    "QConv": "Conv",
    "QConvTranspose": "ConvTranspose",
    "QGemm": "Gemm",
    "QConvDynamic": "ConvInteger",
    "QGemmDynamic": "MatMulInteger",
    "QMatMul": "MatMul",
    "QMul": "Mul",
    "QMaxPool": "MaxPool",
    "QAveragePool": "AveragePool",
    "QReduceMean": "ReduceMean",
    "QRequantize": "Requantize",
    "QLookup": "Lookup",
    "QSoftmax": "Softmax",
    "QResizeNearest": "Resize",
    "QResizeLinear": "Resize",
    "QRoundHalf": "Cast",
    "WeightOnlyGemm": "Gemm",
}


def facts_of_float(node: ir.Node, activation_dtype: str = "int8") -> OpFacts:
    """Facts of a standard ONNX node on NCHW float tensors, as the integer operator it would become.

    Activations count as `activation_dtype` and weights as int8, unless a DequantizeLinear on the way in says
    otherwise. A MatMul by a constant matrix is "Gemm", global pools are pools, functions of one input are "Lookup",
    Relu is "Clip".
    """
    op = _float_name(node)
    activations = _quantized_dtype(data_input(node)) if node.inputs else None
    precision = activations or activation_dtype
    if op in _WEIGHTED:
        weights = input_of(node, 1)
        second = _quantized_dtype(weights) or ("int8" if _is_constant(weights) else activation_dtype)
        precision = f"{precision}*{second}"
    return OpFacts(op, precision, _float_facts(node, op))


def facts_of_integer(node: ir.Node) -> OpFacts:
    """Facts of a node of the realized graph: `qcompiler` operators (NHWC), integer data movement, float fallbacks.

    The precision of anything that reads or writes floating point is "float32".
    """
    if node.domain == QCOMPILER_DOMAIN and node.op_type == "WeightOnlyGemm":
        return OpFacts("Gemm", "float32", _sizes(node.outputs[0]) | _gemm(node))
    if node.domain == QCOMPILER_DOMAIN:
        return _integer_op_facts(node)
    values = [value for value in (*node.inputs, *node.outputs) if value is not None]
    if any(value.dtype is not None and value.dtype.is_floating_point() for value in values):
        op = _float_name(node)
        return OpFacts(op, "float32", _float_facts(node, op))
    # Gather and its like read int64 indices; what matters is the data.
    first = data_input(node).dtype if node.inputs else None
    precision = str(np.dtype(first.numpy())) if first is not None else "int8"
    return OpFacts(node.op_type, precision, _float_facts(node, node.op_type))


def _result(node: ir.Node) -> str:
    """The output's type, if it is of another width than the input's."""
    before, after = dtype_of(data_input(node)), dtype_of(node.outputs[0])
    return str(after) if after.itemsize != before.itemsize else ""


def _float_name(node: ir.Node) -> str:
    if node.op_type in LOOKUP_FUNCTIONS:
        return "Lookup"
    if node.op_type == "MatMul" and _is_constant(node.inputs[1]) and len(shape_of(data_input(node, 1))) == 2:
        return "Gemm"
    renamed = {"Relu": "Clip", "GlobalAveragePool": "AveragePool", "GlobalMaxPool": "MaxPool"}
    return renamed.get(node.op_type, node.op_type)


def _quantized_dtype(value: ir.Value | None) -> str | None:
    """The dtype behind a DequantizeLinear, or None."""
    dequantize = producer(value, "DequantizeLinear")
    return str(dtype_of(data_input(dequantize))) if dequantize is not None else None


def _is_constant(value: ir.Value | None) -> bool:
    """Known at compile time, directly or behind a DequantizeLinear."""
    dequantize = producer(value, "DequantizeLinear")
    return const_of(data_input(dequantize) if dequantize is not None else value) is not None


def _is_symmetric(value: ir.Value | None) -> bool:
    """Zero point 0 behind a DequantizeLinear; a float weight will be quantized as the target likes."""
    dequantize = producer(value, "DequantizeLinear")
    zero_point = const_of(input_of(dequantize, 2)) if dequantize is not None else None
    return zero_point is None or not zero_point.any()


def _sizes(value: ir.Value | None) -> Facts:
    if value is None or value.shape is None:
        return {}
    shape = shape_of(value)
    return {"rank": len(shape), "elements": element_count(shape), "batch": shape[0] if shape else 1}


def _maps(ifm: Shape, ofm: Shape, *, channels_last: bool) -> Facts:
    """Sizes of feature maps; a 1-D map counts as one row."""
    if len(ifm) not in (3, 4) or len(ofm) != len(ifm):
        return {}
    facts: Facts = {}
    for prefix, shape in (("ifm", ifm), ("ofm", ofm)):
        spatial = shape[1:-1] if channels_last else shape[2:]
        height, width = spatial if len(spatial) == 2 else (1, spatial[0])
        channels = shape[-1] if channels_last else shape[1]
        facts |= {f"{prefix}_h": height, f"{prefix}_w": width, f"{prefix}_channels": channels}
    return facts


def _window(kernel: Shape, strides: Shape, dilations: Shape, pads: Shape) -> Facts:
    if len(kernel) == 1:
        kernel, strides, dilations = (1, *kernel), (1, *strides), (1, *dilations)
    if len(kernel) != 2:
        return {}
    return {
        "kernel_h": kernel[0],
        "kernel_w": kernel[1],
        "kernel_area": kernel[0] * kernel[1],
        "stride_h": strides[0],
        "stride_w": strides[1],
        "dilation_h": dilations[0],
        "dilation_w": dilations[1],
        "padded": any(pads),
    }


def _strides(node: ir.Node, ofm: Shape) -> Shape:
    """Strides, 1 along axes with a single output, where no step is taken."""
    strides = ints(node, "strides", (1,) * (len(ofm) - 2))
    if node.op_type == "ConvTranspose":
        return strides
    return tuple(1 if count == 1 else stride for stride, count in zip(strides, ofm[2:], strict=True))


def _is_depthwise(group: int, ifm_channels: int, ofm_channels: int) -> bool:
    return group == ifm_channels == ofm_channels and group > 1


def _float_facts(node: ir.Node, op: str) -> Facts:
    facts = _sizes(node.outputs[0])
    if facts and any(value is not None and value.shape is None for value in node.inputs):
        return facts
    describe = _DESCRIBE.get(op)
    if describe is not None:
        facts |= describe(node)
    if op in _BROADCASTING:
        shapes = {shape_of(value) for value in node.inputs if value is not None}
        facts["broadcast"] = len(shapes) > 1
    return facts


def _conv(node: ir.Node) -> Facts:
    ifm, weights, ofm = shape_of(data_input(node)), shape_of(data_input(node, 1)), shape_of(node.outputs[0])
    spatial, group = len(ifm) - 2, integer(node, "group", 1)
    ones = (1,) * spatial
    pads = ints(node, "pads", (0,) * (2 * spatial))
    padded = pads if string(node, "auto_pad", "NOTSET") in ("NOTSET", "VALID") else (1,)
    return {
        **_maps(ifm, ofm, channels_last=False),
        **_window(weights[2:], _strides(node, ofm), ints(node, "dilations", ones), padded),
        "group": group,
        "depthwise": _is_depthwise(group, ifm[1], ofm[1]),
        "constant_weights": _is_constant(node.inputs[1]),
        "symmetric_weights": _is_symmetric(node.inputs[1]),
    }


def _pool(node: ir.Node) -> Facts:
    ifm, ofm = shape_of(data_input(node)), shape_of(node.outputs[0])
    ones = (1,) * (len(ifm) - 2)
    if node.op_type.startswith("Global"):
        kernel, strides, pads = ifm[2:], ones, (0,) * (2 * len(ones))
    else:
        kernel, strides = ints(node, "kernel_shape"), _strides(node, ofm)
        pads = ints(node, "pads", (0,) * (2 * len(ones)))
        pads = pads if string(node, "auto_pad", "NOTSET") in ("NOTSET", "VALID") else (1,)
    facts = _maps(ifm, ofm, channels_last=False) | _window(kernel, strides, ints(node, "dilations", ones), pads)
    if "AveragePool" in node.op_type:
        facts["pad_counted"] = bool(integer(node, "count_include_pad", 0)) and any(pads)
    return facts


def _gemm(node: ir.Node) -> Facts:
    ifm, ofm, weights = shape_of(data_input(node)), shape_of(node.outputs[0]), node.inputs[1]
    transposed = node.op_type == "Gemm" and integer(node, "transA", 0) == 1
    return {
        "ifm_channels": ifm[0] if transposed else ifm[-1],
        "ofm_channels": ofm[-1] if ofm else 1,
        "batch": element_count(ofm[:-1]),
        "constant_weights": _is_constant(weights),
        "symmetric_weights": _is_symmetric(weights),
    }


def _axis_size(node: ir.Node, default: int) -> Facts:
    shape = shape_of(data_input(node))
    return {"reduced": shape[integer(node, "axis", default)]} if shape else {}


def _reduce(node: ir.Node) -> Facts:
    shape = shape_of(data_input(node))
    constant = const_of(input_of(node, 1))
    axes = tuple(int(axis) for axis in constant) if constant is not None else ints(node, "axes", ())
    return {"reduced": element_count(shape[axis] for axis in axes or range(len(shape)))}


def _resize(node: ir.Node) -> Facts:
    maps = _maps(shape_of(data_input(node)), shape_of(node.outputs[0]), channels_last=False)
    return {**maps, **_resize_factors(maps), "mode": string(node, "mode", "nearest")}


def _resize_factors(maps: Facts) -> Facts:
    """Output size over input size, a string ("1.5") where that is not whole."""
    factors: Facts = {}
    for axis in ("h", "w"):
        before, after = maps.get(f"ifm_{axis}"), maps.get(f"ofm_{axis}")
        if isinstance(before, int) and isinstance(after, int) and before:
            factors[f"scale_{axis}"] = after // before if after % before == 0 else f"{after / before:.3g}"
    return factors


def _lookup(node: ir.Node) -> Facts:
    return {"function": node.op_type}


_DESCRIBE: Mapping[str, Callable[[ir.Node], Facts]] = {
    "Conv": _conv,
    "ConvTranspose": _conv,
    "MaxPool": _pool,
    "AveragePool": _pool,
    "Gemm": _gemm,
    "MatMul": _gemm,
    "Softmax": lambda node: _axis_size(node, -1),
    "ArgMax": lambda node: _axis_size(node, 0),
    "ReduceMean": _reduce,
    "ReduceSum": _reduce,
    "ReduceMax": _reduce,
    "Resize": _resize,
    "Lookup": _lookup,
}


def _integer_op_facts(node: ir.Node) -> OpFacts:
    op, narrow = _INTEGER_NAMES.get(node.op_type, "Add"), None
    ifm, ofm = shape_of(data_input(node)), shape_of(node.outputs[0])
    facts = _sizes(node.outputs[0])
    precision = str(dtype_of(data_input(node)))
    match node.op_type:
        case "QConv" | "QConvTranspose":
            conv = (ops.QConv if node.op_type == "QConv" else ops.QConvTranspose).of(node)
            facts |= _maps(ifm, ofm, channels_last=True)
            facts |= _window(conv.kernel_shape, conv.strides, conv.dilations, conv.pads)
            facts |= {
                "group": conv.group,
                "depthwise": _is_depthwise(conv.group, ifm[-1], ofm[-1]),
                "constant_weights": const_of(node.inputs[1]) is not None,
                "symmetric_weights": conv.w_zero_point == 0,
            }
        case "QGemm":
            facts |= {
                "ifm_channels": ifm[-1],
                "ofm_channels": ofm[-1],
                "constant_weights": const_of(node.inputs[1]) is not None,
                "symmetric_weights": ops.QGemm.of(node).w_zero_point == 0,
            }
        case "QConvDynamic":
            dynamic = ops.QConvDynamic.of(node)
            facts |= _maps(ifm, ofm, channels_last=True)
            facts |= _window(dynamic.kernel_shape, dynamic.strides, dynamic.dilations, dynamic.pads)
            facts |= {"group": dynamic.group, "depthwise": _is_depthwise(dynamic.group, ifm[-1], ofm[-1])}
        case "QGemmDynamic":
            facts |= {"ifm_channels": ifm[-1], "ofm_channels": ofm[-1]}
        case "QMatMul":
            facts |= {
                "ifm_channels": ifm[-1],
                "ofm_channels": ofm[-1],
                "batch": element_count(ofm[:-1]),
                "constant_weights": const_of(node.inputs[1]) is not None,
                "symmetric_weights": ops.QMatMul.of(node).b_zero_point == 0,
            }
        case "QAdd":
            op = "Sub" if ops.QAdd.of(node).subtract else "Add"
            facts["broadcast"] = ifm != shape_of(data_input(node, 1))
        case "QMul":
            facts["broadcast"] = ifm != shape_of(data_input(node, 1))
        case "QMaxPool":
            pool = ops.QMaxPool.of(node)
            facts |= _maps(ifm, ofm, channels_last=True)
            facts |= _window(pool.kernel_shape, pool.strides, pool.dilations, pool.pads)
        case "QAveragePool":
            pool = ops.QAveragePool.of(node)
            facts |= _maps(ifm, ofm, channels_last=True) | _window(pool.kernel_shape, pool.strides, (1, 1), pool.pads)
            facts["pad_counted"] = bool(pool.count_include_pad) and any(pool.pads)
        case "QReduceMean":
            facts["reduced"] = element_count(ifm[axis] for axis in ops.QReduceMean.of(node).axes)
        case "QSoftmax":
            facts["reduced"] = ifm[-1]
        case "QLookup":
            facts["function"] = ops.QLookup.of(node).function
        case "QResizeNearest" | "QResizeLinear":
            maps = _maps(ifm, ofm, channels_last=True)
            facts |= maps | _resize_factors(maps)
            facts["mode"] = "nearest" if node.op_type == "QResizeNearest" else "linear"
        case "QRequantize" | "QRoundHalf":
            assert op in ("Requantize", "Cast")
        case _:
            raise AssertionError(f"{node.op_type} is not an integer operator")
    if op in _WEIGHTS_AT:
        second = data_input(node, _WEIGHTS_AT[op])
        weights = const_of(second)
        second_type = str(dtype_of(second)) if weights is None else stored_type(weights)
        precision, eight = f"{precision}*{second_type}", precision in ("int8", "uint8")
        if weights is not None and eight and (few := four_bit_type(data_input(node))) is not None:
            narrow = f"{few}*{second_type}"
    return OpFacts(op, precision, facts, narrow, _result(node))
