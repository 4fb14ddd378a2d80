"""A model as C-callable functions, constants, and one list of calls over a statically planned arena.

The kernels are those of the CPU backend (`mcu_kernels`), lowered by `mcu_functions`. A QuantizeLinear that only
reads a graph input, and a DequantizeLinear that only makes a graph output, become functions of their own
(`Port.border`): the model itself then takes and gives the integers, and who has floats converts them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256

import numpy as np
import onnx_ir as ir
from tvm import tirx

from qcompiler.backends.base import HostCode, Kernel, View, host_code
from qcompiler.backends.mcu_functions import MIN_ALIGNMENT, RawFunction, RawModule, lower_functions
from qcompiler.backends.mcu_kernels import lower_node
from qcompiler.backends.npu_memory import Buffer, MemoryPlan, plan_memory
from qcompiler.graph import Shape, const_of, data_input, dtype_of, element_count, input_of, is_op, shape_of, value_name
from qcompiler.target import Target

_QUANTIZE, _DEQUANTIZE = "model_quantize_input", "model_dequantize_output"


# --- where an argument lies --------------------------------------------------------------------------------


@dataclass(frozen=True)
class InputPlace:
    """The caller's buffer of an input."""

    index: int


@dataclass(frozen=True)
class OutputPlace:
    """The caller's buffer of an output."""

    index: int


@dataclass(frozen=True)
class ConstantPlace:
    index: int


@dataclass(frozen=True)
class ArenaPlace:
    """A named buffer of the memory plan."""

    name: str


Place = InputPlace | OutputPlace | ConstantPlace | ArenaPlace


# --- the program -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    function: str
    arguments: tuple[Place, ...]
    """One per pointer of the function, its workspace included."""


@dataclass(frozen=True)
class Copy:
    """An output that is also an input, a constant or another output."""

    source: Place
    destination: OutputPlace
    bytes: int


@dataclass(frozen=True)
class Quantization:
    """real = (q - zero_point) * scale, per tensor."""

    scale: float
    zero_point: int


@dataclass(frozen=True)
class Border:
    """The conversion of an input from float, or of an output to float."""

    function: str
    """Its name in C, ``void function(const float *real, T *quantized)`` or the reverse."""
    kernel: str
    """The kernel it calls, with the constants between its input and its output."""
    constants: tuple[int, ...]


@dataclass(frozen=True)
class Port:
    """An input or output as `model_run` takes it."""

    name: str
    """In the user's model."""
    shape: Shape
    dtype: str
    quantization: Quantization | None
    border: Border | None
    value: str
    """Of the integer graph, whose reference execution yields it."""

    @property
    def elements(self) -> int:
        return element_count(self.shape)

    @property
    def bytes(self) -> int:
        return self.elements * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class McuProgram:
    module: RawModule
    constants: tuple[np.ndarray, ...]
    steps: tuple[Call | Copy, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    arena: MemoryPlan
    alignment: int
    """Bytes, of every buffer: kernels load whole vectors."""

    @property
    def constant_bytes(self) -> int:
        return sum(array.nbytes for array in self.constants)


def lower(model: ir.Model, target: Target) -> McuProgram:
    """Lower an integer graph, all of it, for the target's CPU.

    Args:
        model: the realized graph, after the layout passes; `float_ops.unsupported` must have found nothing in it.
        target: says what CPU the code is for. The code runs in one thread, however many the chip has.
    """
    return _Lowering(model.graph, replace(host_code(target.host), threads=1)).run()


@dataclass(frozen=True)
class _Step:
    """A kernel before lowering: its name is then its function's."""

    name: str
    kernel: Kernel
    outputs: tuple[ir.Value, ...]


@dataclass
class _Constants:
    """Arrays, equal ones once."""

    arrays: list[np.ndarray] = field(default_factory=list)
    indices: dict[tuple[bytes, str], int] = field(default_factory=dict)

    def index(self, array: np.ndarray) -> int:
        key = (sha256(np.ascontiguousarray(array).data).digest(), str(array.dtype))
        if key not in self.indices:
            self.indices[key] = len(self.arrays)
            self.arrays.append(np.ascontiguousarray(array))
        return self.indices[key]


class _Lowering:
    """Kernels first; then storage for every value; then calls, and the plan of what lives in the arena."""

    def __init__(self, graph: ir.Graph, host: HostCode) -> None:
        self._graph, self._host = graph, host
        self._alignment = max(MIN_ALIGNMENT, host.vector_bytes)
        self._constants = _Constants()
        self._storage: dict[ir.Value, ir.Value] = {}
        """The value whose memory a view shares."""

    def run(self) -> McuProgram:
        quantizers = {node: index for index, value in enumerate(self._graph.inputs) if (node := _quantizer(value))}
        dequantizers = {node: index for index, value in enumerate(self._graph.outputs) if (node := _dequantizer(value))}
        borders: dict[ir.Node, _Step] = {}
        steps: list[_Step] = []
        for number, node in enumerate(self._graph):
            lowering = lower_node(node, self._host)
            if isinstance(lowering, View):
                self._storage[node.outputs[0]] = lowering.input
                continue
            if node in quantizers:
                borders[node] = _Step(f"{_QUANTIZE}{quantizers[node]}_kernel", lowering, tuple(node.outputs))
            elif node in dequantizers:
                borders[node] = _Step(f"{_DEQUANTIZE}{dequantizers[node]}_kernel", lowering, tuple(node.outputs))
            else:
                steps.append(_Step(f"model_{number:03}_{node.op_type}", lowering, tuple(node.outputs)))
        module = lower_functions(_functions([*steps, *borders.values()]), self._host.target, self._alignment)
        signatures = {function.name: function for function in module.functions}
        inputs = tuple(self._port(value, _quantizer(value), borders) for value in self._graph.inputs)
        outputs = tuple(self._port(value, _dequantizer(value), borders) for value in self._graph.outputs)
        places, copies = self._ports_in_memory()
        calls, arena = self._calls(steps, signatures, places)
        return McuProgram(
            module, tuple(self._constants.arrays), (*calls, *copies), inputs, outputs, arena, self._alignment
        )

    def _port(self, value: ir.Value, border: ir.Node | None, borders: Mapping[ir.Node, _Step]) -> Port:
        inner = value if border is None else _inner(border)
        step = None if border is None else borders[border]
        return Port(
            name=value_name(value),
            shape=shape_of(value),
            dtype=str(dtype_of(inner)),
            quantization=None if border is None else _quantization(border),
            border=None
            if step is None
            else Border(step.name.removesuffix("_kernel"), step.name, self._indices(step.kernel.parameters)),
            value=value_name(inner),
        )

    def _indices(self, arrays: Sequence[np.ndarray]) -> tuple[int, ...]:
        return tuple(self._constants.index(array) for array in arrays)

    # --- storage -------------------------------------------------------------------------------------------

    def _root(self, value: ir.Value) -> ir.Value:
        while value in self._storage:
            value = self._storage[value]
        return value

    def _ports_in_memory(self) -> tuple[dict[ir.Value, Place], list[Copy]]:
        """Values that live in the caller's buffers, and the outputs that have to be copied there."""
        places: dict[ir.Value, Place] = {}
        for index, value in enumerate(self._graph.inputs):
            border = _quantizer(value)
            places[value if border is None else _inner(border)] = InputPlace(index)
        copies: list[Copy] = []
        for index, value in enumerate(self._graph.outputs):
            border = _dequantizer(value)
            root = self._root(value if border is None else _inner(border))
            size = element_count(shape_of(root)) * dtype_of(root).itemsize
            if (array := const_of(root)) is not None:
                copies.append(Copy(ConstantPlace(self._constants.index(array)), OutputPlace(index), size))
            elif root in places:
                copies.append(Copy(places[root], OutputPlace(index), size))
            else:
                places[root] = OutputPlace(index)
        return places, copies

    def _place(self, value: ir.Value, places: Mapping[ir.Value, Place]) -> Place:
        root = self._root(value)
        array = const_of(root)
        return ConstantPlace(self._constants.index(array)) if array is not None else places[root]

    # --- calls ---------------------------------------------------------------------------------------------

    def _calls(
        self, steps: Sequence[_Step], signatures: Mapping[str, RawFunction], places: dict[ir.Value, Place]
    ) -> tuple[list[Call], MemoryPlan]:
        calls: list[Call] = []
        born: dict[ArenaPlace, tuple[int, int]] = {}
        last: dict[ArenaPlace, int] = {}
        for time, step in enumerate(steps):
            signature = signatures[step.name]
            for position, value in enumerate(step.outputs):
                if value not in places:
                    places[value] = ArenaPlace(f"{step.name}.{position}")
                    born[ArenaPlace(f"{step.name}.{position}")] = (time, _bytes(value))
            workspace = [ArenaPlace(f"{step.name}.workspace")] if signature.workspace else []
            for place in workspace:
                born[place] = (time, signature.workspace)
            arguments = [
                *(self._place(value, places) for value in step.kernel.inputs),
                *(ConstantPlace(index) for index in self._indices(step.kernel.parameters)),
                *(places[value] for value in step.outputs),
                *workspace,
            ]
            last |= {place: time for place in arguments if isinstance(place, ArenaPlace)}
            calls.append(Call(step.name, tuple(arguments)))
        buffers = [Buffer(place.name, size, first, last[place]) for place, (first, size) in born.items()]
        return calls, plan_memory(buffers, self._alignment)


def _functions(steps: Sequence[_Step]) -> dict[str, tirx.PrimFunc]:
    functions = {step.name: step.kernel.function for step in steps}
    assert len(functions) == len(steps)
    return functions


def _bytes(value: ir.Value) -> int:
    return element_count(shape_of(value)) * dtype_of(value).itemsize


# --- borders -----------------------------------------------------------------------------------------------


def _quantizer(value: ir.Value) -> ir.Node | None:
    """The per-tensor QuantizeLinear that is all that reads a graph input, or None."""
    readers = [use.node for use in value.uses()]
    alone = len(readers) == 1 and not value.is_graph_output() and is_op(readers[0], "QuantizeLinear")
    node = readers[0] if alone else None
    return node if node is not None and not node.outputs[0].is_graph_output() and _quantization(node) else None


def _dequantizer(value: ir.Value) -> ir.Node | None:
    """The per-tensor DequantizeLinear that makes a graph output nobody else reads, or None."""
    node = value.producer()
    if node is None or not is_op(node, "DequantizeLinear") or value.uses() or const_of(data_input(node)) is not None:
        return None
    return node if _quantization(node) else None


def _inner(border: ir.Node) -> ir.Value:
    """The integer side of a border."""
    return border.outputs[0] if is_op(border, "QuantizeLinear") else data_input(border)


def _quantization(node: ir.Node) -> Quantization | None:
    scale, zero_point = const_of(data_input(node, 1)), const_of(input_of(node, 2))
    if scale is None or scale.size != 1:
        return None
    return Quantization(float(scale.item()), 0 if zero_point is None else int(zero_point.item()))
