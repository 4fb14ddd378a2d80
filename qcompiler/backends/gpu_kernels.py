"""Which kernel runs which operators on a GPU, and what is fused into one."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from tvm.target import Target as TvmTarget

from qcompiler.backends import cpu_conv, cpu_elementwise, cpu_pool, gpu_conv, gpu_tensor_cores, movement, te
from qcompiler.backends.base import HostCode, Kernel, Lowering, View
from qcompiler.backends.cpu_elementwise import constant_input
from qcompiler.backends.cpu_packed import Finish
from qcompiler.backends.elementwise import Formula
from qcompiler.backends.gpu_code import Device
from qcompiler.backends.gpu_elementwise import elementwise
from qcompiler.backends.gpu_tensor_cores import Layout, Piece
from qcompiler.backends.schedules.gpu import schedule_each, schedule_rows
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
    is_op,
    only_user,
    shape_of,
)
from qcompiler.integer.used import four_bit_type

_PRODUCTS = ("QConv", "QConvTranspose", "QGemm")
_FORMULAS: Mapping[str, Callable[[ir.Node], Formula]] = {
    "QAdd": cpu_elementwise.add_formula,
    "QMul": cpu_elementwise.multiply_formula,
    "QRequantize": cpu_elementwise.requantize_formula,
}
_STAGES: Mapping[str, Callable[[ir.Node], Kernel]] = {
    "QMaxPool": cpu_pool.max_pool_stages,
    "QAveragePool": cpu_pool.average_pool_stages,
    "QReduceMean": cpu_pool.reduce_mean_stages,
    "QResizeNearest": cpu_pool.resize_nearest_stages,
    "QResizeLinear": cpu_pool.resize_linear_stages,
}

_ANY_HOST = HostCode(TvmTarget({"kind": "llvm"}), 1, frozenset())
"""For lowerings that leave scheduling to others, and so ask nothing of the host."""


@dataclass(frozen=True)
class Group:
    """What one kernel computes."""

    nodes: tuple[ir.Node, ...]
    outputs: tuple[ir.Value, ...]
    """One, or several views."""

    @property
    def label(self) -> str:
        return "_".join(node.op_type for node in self.nodes)


def refusal(node: ir.Node) -> str | None:
    """Why there is no kernel for a node, or None if there is one."""
    if is_op(node, "QuantizeLinear", "DequantizeLinear"):
        return _border_refusal(node)
    values = [value for value in (*node.inputs[:1], *node.outputs) if value is not None]
    if any(dtype_of(value) not in (np.int8, np.uint8) for value in values):
        return "the GPU's kernels take 8-bit activations"
    known = (*_PRODUCTS, "QMatMul", "QLookup", "QSoftmax", *_FORMULAS, *_STAGES)
    if node.domain == QCOMPILER_DOMAIN:
        return None if node.op_type in known else f"no GPU kernel for {node.op_type}"
    return None if node.op_type in (*movement.LOWERINGS, "Clip") else f"no GPU kernel for {node.op_type}"


def _border_refusal(node: ir.Node) -> str | None:
    """Of a QuantizeLinear or DequantizeLinear."""
    dtypes = {dtype_of(data_input(node)), dtype_of(node.outputs[0])}
    eight_bits = (
        len(dtypes) == 2 and np.dtype(np.float32) in dtypes and dtypes & {np.dtype(np.int8), np.dtype(np.uint8)}
    )
    if not eight_bits or integer(node, "block_size", 0):
        return "the GPU's kernels convert between float32 and eight bits"
    constant = all(value is None or const_of(value) is not None for value in node.inputs[1:])
    return None if constant else "the GPU's kernels take scales that are constants"


# --- fusing ------------------------------------------------------------------------------------------------


def grouped(nodes: Sequence[ir.Node]) -> list[Group]:
    """The nodes of a region as kernels, in execution order.

    An addition goes into the product before it if nobody else reads that, and its other operand, of the same shape,
    is there by then. The change of layout behind the quantizing of the network's input goes with that.
    """
    groups: list[Group] = []
    pending = dict.fromkeys(nodes)
    for node in nodes:
        if node not in pending:
            continue
        del pending[node]
        after = only_user(node.outputs[0]) if node.op_type in (*_PRODUCTS, "QuantizeLinear") else None
        if after in pending and (
            _joins(after, node, pending) if node.op_type in _PRODUCTS else is_op(after, "Transpose")
        ):
            del pending[after]
            groups.append(Group((node, after), tuple(after.outputs)))
        elif is_op(node, "Split"):
            groups += [Group((node,), (value,)) for value in node.outputs]
        else:
            groups.append(Group((node,), tuple(node.outputs)))
    return groups


def _joins(after: ir.Node, node: ir.Node, pending: Mapping[ir.Node, None]) -> bool:
    if is_op(node, "QuantizeLinear"):
        return is_op(after, "Transpose")
    if node.op_type not in _PRODUCTS or not is_op(after, "QAdd", domain=QCOMPILER_DOMAIN):
        return False
    result = node.outputs[0]
    others = [value for value in after.inputs[:2] if value is not result]
    return all(
        value is not None
        and shape_of(value) == shape_of(result)
        and const_of(value) is None
        and value.producer() not in pending
        for value in others
    )


# --- memory ------------------------------------------------------------------------------------------------


_NIBBLES = 8
"""Of a word."""


def layout_of(groups: Sequence[Group], outputs: Collection[ir.Value], device: Device) -> Layout:
    """Which tensors are packed, and which are made in place. outputs: of the region, which others read."""
    products = {group.nodes[0]: group for group in groups if _on_tensor_cores(group.nodes[0], device)}
    made = [value for group in products.values() for value in group.outputs if value not in outputs]
    members = {node: group for group in products.values() for node in group.nodes}
    packed = frozenset(
        value for value in made if "mma_s4" in device.features and _can_be_packed(value, members, device)
    )
    pieces: dict[ir.Value, Piece] = {}
    for group in groups:
        parts = _joined_in_place(group.nodes[0])
        if parts and all(value in made and value not in packed and len(value.uses()) == 1 for value in parts):
            pieces |= parts
    return Layout(packed, pieces)


def _can_be_packed(value: ir.Value, members: Mapping[ir.Node, Group], device: Device) -> bool:
    """Whether a tensor can lie there as two numbers of four bits in a byte: products on tensor cores alone read it."""
    maker = value.producer()
    assert maker is not None
    n = shape_of(value)[-1] // cpu_conv.problem_of(members[maker].nodes[0]).group
    if four_bit_type(value) is None or n % _NIBBLES or not value.uses():
        return False
    return all(
        node in members and (node is not members[node].nodes[0] or _multiplies_four_bits(node, device))
        for node, _ in value.uses()
    )


def _multiplies_four_bits(node: ir.Node, device: Device) -> bool:
    """Whether it does so, and reads whole words."""
    problem = cpu_conv.problem_of(node)
    work = gpu_tensor_cores.work_of(problem, data_input(node), device)
    return work is not None and work.bits == 4 and problem.weights.shape[-1] % _NIBBLES == 0


def _joined_in_place(node: ir.Node) -> dict[ir.Value, Piece]:
    """The inputs of a Concat of channels, as pieces of its output; nothing of another node."""
    if not is_op(node, "Concat") or integer(node, "axis", 0) % len(shape_of(node.outputs[0])) != (
        len(shape_of(node.outputs[0])) - 1
    ):
        return {}
    pieces: dict[ir.Value, Piece] = {}
    first = 0
    for value in node.inputs:
        assert value is not None
        pieces[value] = Piece(node.outputs[0], first)
        first += shape_of(value)[-1]
    return pieces if len(pieces) == len(node.inputs) else {}


def _on_tensor_cores(node: ir.Node, device: Device) -> bool:
    if node.domain != QCOMPILER_DOMAIN or node.op_type not in _PRODUCTS:
        return False
    return gpu_tensor_cores.work_of(cpu_conv.problem_of(node), data_input(node), device) is not None


# --- lowering ----------------------------------------------------------------------------------------------


def lower(group: Group, device: Device, layout: Layout = Layout()) -> Lowering:  # noqa: B008 (it is immutable)
    """The scheduled kernel of a group, or a view. The outputs are the group's."""
    node = group.nodes[0]
    if node.domain != QCOMPILER_DOMAIN:
        return _standard(group)
    if node.op_type in _PRODUCTS:
        problem = cpu_conv.problem_of(node)
        finish = cpu_conv.finish(problem)
        for after in group.nodes[1:]:
            finish = finish.then(_addition(after, node.outputs[0]))
        return gpu_conv.convolution(problem, data_input(node), group.outputs[0], finish, device, layout)
    if node.op_type == "QMatMul":
        return gpu_conv.matmul(node, device)
    if node.op_type == "QLookup":
        lowest = -128 if dtype_of(data_input(node)) == np.int8 else 0
        return elementwise(
            [data_input(node)],
            node.outputs[0],
            lambda x, table: table[x.astype("int32") - lowest],
            tables=[constant_input(node, 1)],
        )
    if node.op_type == "QSoftmax":
        kernel = cpu_elementwise.softmax(node, _ANY_HOST)
        return replace(kernel, function=schedule_rows(kernel.function))
    if node.op_type in _FORMULAS:
        formula = _FORMULAS[node.op_type](node)
        return elementwise(formula.operands, node.outputs[0], formula.expression)
    kernel = _STAGES[node.op_type](node)
    return replace(kernel, function=schedule_each(kernel.function))


def _addition(node: ir.Node, result: ir.Value) -> Finish:
    """A QAdd as what follows the product that makes `result`."""
    formula = cpu_elementwise.add_formula(node)
    others = tuple(value for value in formula.operands if isinstance(value, ir.Value) and value is not result)

    def expression(total: te.Expr, _: Sequence[te.Expr], maps: Sequence[te.Expr]) -> te.Expr:
        remaining = iter(maps)
        return formula.expression(*(total if value is result else next(remaining) for value in formula.operands))

    return Finish(str(dtype_of(node.outputs[0])), (), others, expression)


def _standard(group: Group) -> Lowering:
    node, outputs = group.nodes[0], group.outputs
    if is_op(node, "QuantizeLinear"):
        return _quantized(group)
    if is_op(node, "DequantizeLinear"):
        formula = cpu_elementwise.dequantize_formula(node)
        return elementwise(formula.operands, outputs[0], formula.expression)
    if is_op(node, "Split"):
        return _piece(node, outputs[0])
    if is_op(node, "Clip"):
        low, high = (const_of(input_of(node, index)) for index in (1, 2))
        info = np.iinfo(dtype_of(data_input(node)))
        limits = (info.min if low is None else int(low.item()), info.max if high is None else int(high.item()))
        dtype = str(info.dtype)
        return elementwise([data_input(node)], outputs[0], lambda x: te.clamp(x.astype("int32"), *limits).astype(dtype))
    lowering = movement.LOWERINGS[node.op_type](node, _ANY_HOST)
    return lowering if isinstance(lowering, View) else replace(lowering, function=schedule_each(lowering.function))


def _quantized(group: Group) -> Kernel:
    """A QuantizeLinear, whose output may be transposed."""
    node, shape = group.nodes[0], shape_of(group.outputs[0])
    formula = cpu_elementwise.quantize_formula(node)
    if len(group.nodes) == 1:
        return elementwise(formula.operands, group.outputs[0], formula.expression)
    order = ints(group.nodes[1], "perm", tuple(reversed(range(len(shape)))))
    x, scale, zero_point = formula.operands
    assert isinstance(x, ir.Value) and isinstance(scale, np.ndarray) and isinstance(zero_point, np.ndarray)
    source = te.placeholder(shape_of(x), "float32", "x")
    constants = [te.placeholder(array.shape, str(array.dtype), f"c{i}") for i, array in enumerate((scale, zero_point))]

    def element(*index: te.Expr) -> te.Expr:
        before = tuple(index[order.index(axis)] for axis in range(len(order)))
        loads = [tensor[_broadcast(before, te.shape_of(tensor))] for tensor in constants]
        return formula.expression(source[before], *loads)

    result = te.compute(shape, element, "output")
    return Kernel(schedule_each(te.prim_func([source, *constants, result])), (x,), (scale, zero_point))


def _broadcast(index: Sequence[te.Expr], shape: Shape) -> tuple[te.Expr | int, ...]:
    own = index[len(index) - len(shape) :]
    return tuple(0 if dim == 1 else position for position, dim in zip(own, shape, strict=True))


def _piece(node: ir.Node, output: ir.Value) -> Kernel:
    """One output of a Split."""
    shape, own = shape_of(data_input(node)), shape_of(output)
    axis = integer(node, "axis", 0) % len(shape)
    start = 0
    for value in node.outputs[: list(node.outputs).index(output)]:
        start += element_count(shape_of(value)[axis:])
    outer, width, size = element_count(shape[:axis]), element_count(shape[axis:]), element_count(own[axis:])
    x = te.placeholder((outer, width), str(dtype_of(output)), "x")
    piece = te.compute((outer, size), lambda row, column: x[row, column + start], "output")
    return Kernel(schedule_each(te.prim_func([x, piece])), (data_input(node),))
