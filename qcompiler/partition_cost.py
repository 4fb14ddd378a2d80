"""Estimates that decide whether an island is worth the crossing: one operator on the host, and on an engine.

They price an operator whole, before it is tiled; the exact figures come from the command words, later.
"""

from collections.abc import Mapping

import onnx_ir as ir

from qcompiler.graph import Shape as TensorShape
from qcompiler.graph import const_of, data_input, dtype_of, element_count, ints, is_op, shape_of, users
from qcompiler.host_cpu import HALF_CONVERSIONS
from qcompiler.integer.weight_groups import stored_bytes
from qcompiler.integer.weight_types import as_half
from qcompiler.quant.operators import MAC_OPS
from qcompiler.recurrent import OPS as RECURRENT
from qcompiler.simulator.cost import host_cost
from qcompiler.simulator.engines import work
from qcompiler.simulator.workload import Feed, OpClass, Port, Shape
from qcompiler.target import FactValue, Gpu, Host, Npu, OpFacts, Target

_CLASSES: Mapping[str, OpClass] = {
    "Conv": "conv",
    "ConvTranspose": "conv",
    "Gemm": "conv",
    "MatMul": "conv",
    "MaxPool": "max_pool",
    "AveragePool": "average_pool",
    "ReduceMean": "average_pool",
    "Add": "add",
    "Sub": "add",
    "Mul": "mul",
    "Requantize": "requantize",
    "Clip": "requantize",
    "Lookup": "lookup",
    "Softmax": "softmax",
}
"""The command class of an operator; what is missing moves data."""

_ROW_OPS = ("Gemm", "MatMul", "MatMulInteger")
_WEIGHT_BITS = {"int4": 4, "int2": 2, "int1": 1}
_FREE = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity")


def host_seconds(node: ir.Node, facts: OpFacts, target: Target) -> float:
    """The operator on the CPU, which reads weights from where a driven accelerator would, waiting for every burst."""
    elements = max((element_count(shape_of(value)) for value in (*_tensors(node), *node.outputs)), default=0)
    if facts.op in _FREE:
        elements = 0
    cost = host_cost(
        target.host, precision=facts.precision, macs=multiplications(node, facts), elements=elements, transferred=0
    )
    driven = next((unit for unit in target.accelerators.values() if isinstance(unit, Npu)), None)
    if driven is None:
        return cost.seconds
    memory = driven.memories[driven.weight_memory]
    burst = memory.latency.cycles(driven.clock) + memory.burst / memory.bandwidth.per_cycle(driven.clock)
    return max(cost.seconds, _weight_bytes(node) / memory.burst * burst / driven.clock)


def accelerator_seconds(node: ir.Node, facts: OpFacts, engine: str, unit: Npu | Gpu) -> float:
    """The operator on an engine of an accelerator."""
    return _gpu_seconds(node, facts, engine, unit) if isinstance(unit, Gpu) else _npu_seconds(node, facts, engine, unit)


def _gpu_seconds(node: ir.Node, facts: OpFacts, engine_name: str, gpu: Gpu) -> float:
    """One launch, then whichever takes longer: computing, or reading and writing every tensor once."""
    if facts.op in _FREE:
        return 0.0
    engine, macs = gpu.engines[engine_name], multiplications(node, facts)
    if macs and (precision := facts.among(engine.precisions)) is not None:
        busy = macs / engine.precisions[precision].rate
    else:
        busy = max(element_count(shape_of(value)) for value in (*_tensors(node), *node.outputs)) / engine.element_rate
    moved = sum(tensor_bytes(value) for value in (*node.inputs, *node.outputs) if value is not None)
    return (gpu.launch.cycles(gpu.clock) + max(busy, moved / gpu.memory.bandwidth.per_cycle(gpu.clock))) / gpu.clock


def _npu_seconds(node: ir.Node, facts: OpFacts, engine_name: str, npu: Npu) -> float:
    """The operator on an engine, from scratchpad, with its weights streamed in beside it."""
    engine = npu.engines[engine_name]
    kind = _command_class(facts)
    if kind is None:
        path = npu.path_between(npu.memory_name("external"), npu.memory_name("scratchpad"))
        assert path is not None
        moved = 0 if facts.op in _FREE else _bytes_in_bursts(node, npu)
        return moved / npu.dma[path].bandwidth.per_cycle(npu.clock) / npu.clock
    memory = npu.memories[npu.weight_memory]
    inside = Port.of(npu.scratchpad, npu.clock)
    feed = Feed(ifm=inside, ofm=inside, scales=Port.of(memory, npu.clock))
    busy = work(_shape(node, facts, kind), engine, facts.precision, feed).cycles + engine.issue.cycles(npu.clock)
    return max(busy, _weight_bytes(node) / memory.bandwidth.per_cycle(npu.clock)) / npu.clock


def inward_seconds(unit: Npu | Gpu) -> float:
    """What a byte takes between external memory and scratchpad, where an accelerator has one."""
    if isinstance(unit, Gpu):
        return 0.0
    path = unit.path_between(unit.memory_name("external"), unit.memory_name("scratchpad"))
    assert path is not None
    speeds = (unit.dma[path].bandwidth, unit.external.bandwidth, unit.scratchpad.bandwidth)
    return 1 / min(speed.per_cycle(unit.clock) for speed in speeds) / unit.clock


def _bytes_in_bursts(node: ir.Node, npu: Npu) -> int:
    """What moving the output takes from the scratchpad: a transpose reads every run of kept elements as a burst."""
    moved = tensor_bytes(node.outputs[0])
    if not is_op(node, "Transpose"):
        return moved
    shape, order = shape_of(node.outputs[0]), ints(node, "perm")
    kept = len(order)
    while kept and order[kept - 1] == kept - 1:
        kept -= 1
    run = element_count(shape[kept:]) * dtype_of(node.outputs[0]).itemsize
    return max(moved, moved // run * npu.scratchpad.burst)


def multiplications(node: ir.Node, facts: OpFacts) -> int:
    """Multiply-accumulates, padding included; 0 for operators without any."""
    elements = element_count(shape_of(node.outputs[0])) if node.outputs[0].shape is not None else 0
    if facts.op in _ROW_OPS:
        return elements * _whole(facts, "ifm_channels", 1)
    if is_op(node, *RECURRENT):
        steps, batch = shape_of(data_input(node))[:2]
        return steps * batch * element_count(shape_of(data_input(node, 2)))
    if facts.op not in ("Conv", "ConvTranspose", "ConvInteger"):
        return 0
    per_output = _whole(facts, "kernel_area", 1) * _whole(facts, "ifm_channels", 1) // _whole(facts, "group", 1)
    if facts.op == "ConvTranspose":
        per_output = per_output // (_whole(facts, "stride_h", 1) * _whole(facts, "stride_w", 1))
    return elements * per_output


def tensor_bytes(value: ir.Value) -> int:
    assert value.dtype is not None
    grouped = stored_bytes(value)
    return int(element_count(shape_of(value)) * value.dtype.itemsize) if grouped is None else grouped


def constant_bytes(value: ir.Value, host: Host) -> int:
    """Of a constant as it is stored: weights of float products that are 16-bit floats take two bytes where CPUs can."""
    array = const_of(value)
    if array is None or not is_op(next(iter(users(value)), None), *MAC_OPS) or array.ndim < 2:
        return 0 if array is None else tensor_bytes(value)
    return as_half(array).nbytes if HALF_CONVERSIONS & host.features() else array.nbytes


def _weight_bytes(node: ir.Node) -> int:
    if is_op(node, *RECURRENT):  # which reads no identity
        return tensor_bytes(data_input(node, 2))
    return sum(tensor_bytes(value) for value in node.inputs if value is not None and const_of(value) is not None)


def _tensors(node: ir.Node) -> list[ir.Value]:
    """Inputs computed at run time."""
    return [value for value in node.inputs if value is not None and const_of(value) is None]


def _command_class(facts: OpFacts) -> OpClass | None:
    if facts.op == "Resize":
        return "resize_nearest" if facts.facts.get("mode") == "nearest" else "resize_linear"
    if facts.op == "Conv" and facts.facts.get("depthwise"):
        return "depthwise"
    return _CLASSES.get(facts.op)


def _shape(node: ir.Node, facts: OpFacts, kind: OpClass) -> Shape:
    """The whole operator as one command; a matrix product is a 1x1 convolution over its rows."""
    after = shape_of(node.outputs[0])
    before = shape_of(_tensors(node)[0]) if _tensors(node) else after
    window = (_whole(facts, "kernel_h", 1), _whole(facts, "kernel_w", 1))
    if facts.op == "ReduceMean":
        window = (1, _whole(facts, "reduced", 1))
    return Shape(
        op=kind,
        ofm=_map(after),
        ifm=_map(before),
        kernel=window,
        stride=(_whole(facts, "stride_h", 1), _whole(facts, "stride_w", 1)),
        dilation=(_whole(facts, "dilation_h", 1), _whole(facts, "dilation_w", 1)),
        groups=_whole(facts, "group", 1),
        ifm_bits=8 * dtype_of(data_input(node)).itemsize,
        ofm_bits=8 * dtype_of(node.outputs[0]).itemsize,
        weight_bits=_WEIGHT_BITS.get(facts.precision.partition("*")[2], 8),
        upsampling=_whole(facts, "stride_h", 1) * _whole(facts, "stride_w", 1) if facts.op == "ConvTranspose" else 1,
    )


def _map(shape: TensorShape) -> tuple[int, int, int]:
    """Height, width, depth; whatever is not a feature map counts as one row of its leading elements."""
    if len(shape) == 4:
        return shape[0] * shape[1], shape[2], shape[3]
    return 1, element_count(shape[:-1]), shape[-1] if shape else 1


def _whole(facts: OpFacts, name: str, default: int) -> int:
    value: FactValue = facts.facts.get(name, default)
    assert isinstance(value, int), f"{name} is {value!r}"
    return int(value)
