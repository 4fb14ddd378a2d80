"""What each operator means to quantization: the tables calibration and planning share.

They describe the float graph after simplification. Every operator accepted here is one that
`qcompiler.integer.realize` turns into integer operators once its tensors are quantized.
"""

from collections.abc import Sequence
from difflib import get_close_matches

import numpy as np
import onnx_ir as ir

from qcompiler.errors import QCompilerError
from qcompiler.graph import (
    const_of,
    data_input,
    input_of,
    integer,
    ints,
    is_op,
    only_user,
    real,
    shape_of,
    string,
    users,
)
from qcompiler.integer.facts import LOOKUP_FUNCTIONS
from qcompiler.layer_names import JOINT

MAC_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Operators that multiply and accumulate."""

MOVEMENT_OPS = (
    "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Split", "Gather", "Pad", "MaxPool",
    "GlobalMaxPool", "Resize", "DepthToSpace", "SpaceToDepth", "Expand", "Tile", "Identity",
)  # fmt: skip
"""Operators whose outputs hold values of their first input (or between them), and so share its format."""

BINARY_OPS = ("Add", "Sub", "Mul")

CLAMP_OPS = ("Relu", "Clip")

_CLAMP_HOSTS = (*MAC_OPS, *BINARY_OPS, "AveragePool", "GlobalAveragePool", "ReduceMean")
"""Operators that run a following Relu or Clip inside their own output clamp."""

ACTIVATION_OPS = (
    "Relu", "Clip", "LeakyRelu", "Elu", "Celu", "Selu", "Sigmoid", "HardSigmoid", "Tanh", "HardSwish", "Swish",
    "Mish", "Gelu", "Softplus", "Softsign",
)  # fmt: skip
"""Functions networks use between layers, as opposed to arithmetic on decoded results."""

_ARITHMETIC = ("Add", "Sub", "Mul", "Div", "Pow")
"""Binary operators that may be part of a lookup table, if all but one input are single constants."""

UNIT_OUTPUTS: tuple[tuple[str, float, float], ...] = (
    ("Softmax", 0.0, 255 / 256),
    ("Sigmoid", 0.0, 255 / 256),
    ("HardSigmoid", 0.0, 255 / 256),
    ("Tanh", -1.0, 127 / 128),
)
"""Operators with a bounded output, and the interval that gives 8-bit formats the scale 1/256 or 1/128."""
UNIT_OUTPUTS_INT16: tuple[tuple[str, float, float], ...] = tuple(
    (op_type, low and -32767 / 32768, 32767 / 32768) for op_type, low, _ in UNIT_OUTPUTS
)
"""The interval that gives 16-bit formats the scale 1/32768."""


def is_float(value: ir.Value | None) -> bool:
    return value is not None and value.dtype == ir.DataType.FLOAT


def is_activation(value: ir.Value | None) -> bool:
    """A float tensor computed at run time."""
    return is_float(value) and const_of(value) is None


def activation_inputs(node: ir.Node) -> list[ir.Value]:
    """The distinct float inputs computed at run time."""
    return list(dict.fromkeys(value for value in node.inputs if value is not None and is_activation(value)))


def clamp_of(node: ir.Node) -> ir.Node | None:
    """The Relu or Clip that runs inside `node`, if there is one."""
    if not is_op(node, *_CLAMP_HOSTS):
        return None
    reader = only_user(node.outputs[0])
    return reader if reader is not None and is_op(reader, *CLAMP_OPS) and refusal(reader) is None else None


def is_fused_clamp(node: ir.Node) -> bool:
    """True if this Relu or Clip runs inside the operator before it."""
    host = data_input(node).producer() if is_op(node, *CLAMP_OPS) else None
    return host is not None and clamp_of(host) is node


def _host(clamp: ir.Node) -> ir.Node:
    host = data_input(clamp).producer()
    assert host is not None, f"{clamp.name} is not fused"
    return host


def lookup_region(node: ir.Node) -> tuple[ir.Node, ...]:
    """The elementwise nodes, ending in `node`, that one lookup table of one tensor replaces; () if none.

    x * Sigmoid(x) is such a region, and Add(x, 3) → Clip → Mul(x) → Div(6). Only its last output is read outside.
    Nodes come in execution order.
    """
    region: tuple[ir.Node, ...] = (node,)
    best: tuple[ir.Node, ...] = ()
    if not _may_look_up(node):
        return ()
    while True:
        frontier = dict.fromkeys(value for member in region for value in member.inputs if is_activation(value))
        outside = [value for value in frontier if value is not None and value.producer() not in region]
        if len(outside) == 1:
            best = region
        growth = next((value for value in outside if _may_join(value, region)), None)
        if growth is None:
            break
        maker = growth.producer()
        assert maker is not None
        region = (maker, *region)
    order = {member: index for index, member in enumerate(node.graph or ())} if len(best) > 1 else {}
    return tuple(sorted(best, key=lambda member: order.get(member, 0)))


def _may_look_up(node: ir.Node) -> bool:
    if not is_float(node.outputs[0]):
        return False
    if is_op(node, *LOOKUP_FUNCTIONS):
        return True
    if is_op(node, "Clip"):
        return refusal(node) is None
    if is_op(node, "Relu"):
        return True
    constants = [const_of(value) for value in node.inputs]
    return is_op(node, *_ARITHMETIC) and all(constant is None or constant.size == 1 for constant in constants)


def _may_join(value: ir.Value, region: tuple[ir.Node, ...]) -> bool:
    maker = value.producer()
    return (
        maker is not None
        and _may_look_up(maker)
        and not (is_fused_clamp(maker) and not _may_look_up(_host(maker)))
        and not value.is_graph_output()
        and all(reader in region for reader in users(value))
        and shape_of(value) == shape_of(region[-1].outputs[0])
    )


def lookup_regions(nodes: Sequence[ir.Node]) -> dict[ir.Node, tuple[ir.Node, ...]]:
    """The lookup tables of a graph: last node to all members, each node in one region at most."""
    regions: dict[ir.Node, tuple[ir.Node, ...]] = {}
    claimed: set[ir.Node] = set()
    for node in reversed(nodes):
        if node in claimed or (is_fused_clamp(node) and not _may_look_up(_host(node))):
            continue
        if region := lookup_region(node):
            regions[node] = region
            claimed |= set(region)
    return regions


def interior_values(nodes: Sequence[ir.Node]) -> set[ir.Value]:
    """Values that never exist in the integer graph: before a fused clamp, or inside a lookup region."""
    before_clamps = {data_input(node) for node in nodes if is_fused_clamp(node)}
    regions = lookup_regions(nodes)
    return before_clamps | {node.outputs[0] for last, region in regions.items() for node in region if node is not last}


def refusal(node: ir.Node) -> str | None:
    """Why `node` has no integer form, or None if it has one."""
    if node.domain not in ("", "ai.onnx"):
        return f"{node.op_type} of the domain {node.domain} has no integer form"
    # A constant first operand is fine where the operator takes either order.
    any_order = is_op(node, *BINARY_OPS, "MatMul", "Concat") and activation_inputs(node)
    if not any_order and not (node.inputs and is_activation(node.inputs[0])):
        return f"{node.op_type} does not work on float activations"
    if node.op_type in LOOKUP_FUNCTIONS:
        return None
    check = _CHECKS.get(node.op_type)
    if check is None:
        return f"{node.op_type} has no integer form"
    return check(node)


def _conv(node: ir.Node) -> str | None:
    if const_of(data_input(node, 1)) is None:
        return "its weights are not constant"
    bias = input_of(node, 2)
    if bias is not None and const_of(bias) is None:
        return "its bias is not constant"
    return None if len(shape_of(data_input(node))) in (3, 4) else "only 1-D and 2-D convolutions have an integer form"


def _gemm(node: ir.Node) -> str | None:
    if const_of(data_input(node, 1)) is None:
        return "its weights are not constant"
    bias = input_of(node, 2)
    constant = const_of(bias)
    if bias is not None and constant is None:
        return "its bias is not constant"
    if constant is not None and constant.size != shape_of(node.outputs[0])[-1]:
        return "its bias is not one value per output"
    if real(node, "alpha", 1.0) != 1.0 or (bias is not None and real(node, "beta", 1.0) != 1.0):
        return "alpha and beta are not 1"
    return "its first input is transposed" if integer(node, "transA", 0) else None


def _matmul(node: ir.Node) -> str | None:
    if not is_activation(node.inputs[0]):
        return "its first operand is constant"
    short = any(len(shape_of(data_input(node, index))) < 2 for index in (0, 1))
    return "an operand is a vector" if short else None


def _binary(node: ir.Node) -> str | None:
    return None if is_float(node.outputs[0]) else "it works on integers"


def _constant_arguments(node: ir.Node) -> str | None:
    variable = any(value is not None and const_of(value) is None for value in node.inputs[1:])
    return "its arguments are computed at run time" if variable else None


def _clip(node: ir.Node) -> str | None:
    if (refused := _constant_arguments(node)) is not None:
        return refused
    low, high = clamp_bounds(node)
    # Zero must stay among the outputs: a format represents nothing that excludes it.
    return None if low <= 0 <= high else f"it clips to [{low:g}, {high:g}], which does not hold 0"


def _pool(node: ir.Node) -> str | None:
    if len(node.outputs) > 1 and node.outputs[1].uses():
        return "its indices are used"
    if len(shape_of(data_input(node))) not in (3, 4):
        return "only 1-D and 2-D pools have an integer form"
    if is_op(node, "AveragePool"):
        if any(dilation != 1 for dilation in ints(node, "dilations", ())):
            return "it is dilated"
        if integer(node, "ceil_mode", 0) and integer(node, "count_include_pad", 0):
            return "it counts padding and rounds its size up"
    return None


def _reduce_mean(node: ir.Node) -> str | None:
    return _constant_arguments(node)


def _softmax(node: ir.Node) -> str | None:
    rank = len(shape_of(data_input(node)))
    axis = integer(node, "axis", -1) % rank
    return None if axis == rank - 1 or (axis == 1 and rank in (3, 4)) else f"it runs over axis {axis}"


def _resize(node: ir.Node) -> str | None:
    if (refused := _constant_arguments(node)) is not None:
        return refused
    before, after = shape_of(data_input(node)), shape_of(node.outputs[0])
    if len(before) != 4 or before[:2] != after[:2]:
        return "only height and width of a feature map can be resized in integers"
    mode = string(node, "mode", "nearest")
    return None if mode in ("nearest", "linear") else f"{mode} interpolation has no integer form"


def _pad(node: ir.Node) -> str | None:
    return _constant_arguments(node)


def _free(node: ir.Node) -> None:
    """Nothing more to ask."""


_CHECKS = {
    "Conv": _conv,
    "ConvTranspose": _conv,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Add": _binary,
    "Sub": _binary,
    "Mul": _binary,
    "Relu": _free,
    "Clip": _clip,
    "MaxPool": _pool,
    "GlobalMaxPool": _pool,
    "AveragePool": _pool,
    "GlobalAveragePool": _pool,
    "ReduceMean": _reduce_mean,
    "Softmax": _softmax,
    "Resize": _resize,
    "Pad": _pad,
    "Concat": _free,
    "ArgMax": _free,
    "Identity": _free,
    **dict.fromkeys(
        ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Split", "Gather", "DepthToSpace",
         "SpaceToDepth", "Expand", "Tile"),
        _constant_arguments,
    ),
}  # fmt: skip
"""Operators with an integer form, and what else has to hold."""


def clamp_bounds(node: ir.Node) -> tuple[float, float]:
    """The interval a Relu or Clip confines its output to."""
    if is_op(node, "Relu"):
        return 0.0, np.inf
    low, high = const_of(input_of(node, 1)), const_of(input_of(node, 2))
    return (
        -np.inf if low is None else float(low.reshape(())),
        np.inf if high is None else float(high.reshape(())),
    )


def inherits_format(node: ir.Node) -> bool:
    """True if the output holds values of the first input, so that it needs no range of its own."""
    return is_op(node, *MOVEMENT_OPS) and refusal(node) is None


def own_producer(value: ir.Value) -> ir.Node | None:
    """The node that makes `value`, looking through operators that only move values."""
    maker = value.producer()
    while maker is not None and inherits_format(maker):
        maker = data_input(maker).producer()
    return maker


def pads_of(node: ir.Node) -> tuple[int, ...]:
    """The pads of a window operator; (1,) stands for automatic padding that is not known to be none."""
    automatic = string(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    return (1,) if automatic else ints(node, "pads", ())


def has_weights(node: ir.Node) -> bool:
    return is_op(node, *MAC_OPS) and const_of(data_input(node, 1)) is not None


EVERYTHING = "all"
"""The name that stands for every operator."""


def named_nodes(nodes: Sequence[ir.Node], names: Sequence[str], option: str) -> set[ir.Node]:
    """The nodes of these names, and those each of them is one integer operator with.

    Layers of several nodes go by their names joined, as in reports; "all" stands for all nodes. Raises QCompilerError,
    in terms of the option that gives the names, if there is none.
    """
    by_name = {node.name or "": node for node in nodes}
    lasts = {member: last for last, region in lookup_regions(nodes).items() for member in region}
    found: set[ir.Node] = set()
    for name in names:
        if name == EVERYTHING and name not in by_name:
            return set(nodes)
        parts = [name] if name in by_name else name.split(JOINT)
        for part in parts:
            node = by_name.get(part)
            if node is None:
                near = get_close_matches(part, list(by_name), n=1, cutoff=0.4)
                hint = f"did you mean {near[0]!r}?" if near else "`qcompile explain` lists them."
                raise QCompilerError(f"{option} {name}: the simplified model has no operator {part!r}; {hint}")
            host = data_input(node).producer() if is_fused_clamp(node) else None
            found |= {lasts.get(node, node), host or node}
    return found
