"""LSTM, GRU and RNN in float: the recurrence alone, step by step.

The simplified graph multiplies the inputs beforehand (see `qcompiler.recurrent`), so a step multiplies the hidden state
[hidden] by the recurrent weights, a matrix that is read once a step, and then computes the gates element by element.
Formulas are those of the ONNX operators' specification.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import tirx as _tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as _builder

from qcompiler.backends import te
from qcompiler.backends.base import HostCode, Kernel, Lowering
from qcompiler.backends.cpu_elementwise import constant_input
from qcompiler.backends.float_elementwise import sigmoid, softplus
from qcompiler.backends.te import Expr
from qcompiler.graph import const_of, data_input, input_of, producer, shape_of
from qcompiler.recurrent import (
    INITIAL_CELL,
    INITIAL_HIDDEN,
    OPS,
    PEEPHOLES,
    SEQUENCE_LENGTHS,
    Cell,
    Function,
    UnknownCellError,
    cells_of,
    hidden_size,
    is_projected,
)

# TVM's annotations are too narrow for what its functions take.
tirx: Any = _tirx
builder: Any = _builder
Buffer = Any

_REGISTERS = 8
"""Vectors of sums that stay in registers while a row of weights after the other is read, at most."""


def refusal(node: ir.Node) -> str | None:
    """Why there is no code for a recurrent node of a simplified graph, or None if there is."""
    try:
        cells_of(node)
    except UnknownCellError as error:
        return str(error)
    for index, name in ((1, "weights"), (2, "recurrent weights"), (3, "bias"), (PEEPHOLES, "peepholes")):
        value = input_of(node, index)
        if value is not None and const_of(value) is None and producer(value, "DequantizeLinear") is None:
            return f"its {name} are computed at run time"
    lengths = input_of(node, SEQUENCE_LENGTHS)
    if lengths is not None and const_of(lengths) is None:
        return "its sequence lengths are computed at run time; give all sequences one length"
    if lengths is not None:
        return f"its sequence lengths are not within 0 and {shape_of(data_input(node))[0]}"
    return None if is_projected(node) else "its weights share scales in blocks"


def recurrent(node: ir.Node, host: HostCode) -> Lowering:
    """A node that `refusal` has nothing against."""
    (cell,), hidden = cells_of(node), hidden_size(node)
    matrix = constant_input(node, 2)[0].astype(np.float32)
    products = (matrix[: 2 * hidden], matrix[2 * hidden :]) if cell.kind == "GRU" else (matrix,)
    packed = [pack(rows, host.vector_bytes // 4) for rows in products]
    vectors = [_bias(node, hidden)] if cell.kind == "GRU" else []
    if cell.kind == "LSTM" and input_of(node, PEEPHOLES) is not None:
        vectors.append(constant_input(node, PEEPHOLES)[0].astype(np.float32))
    states = [value for index in (INITIAL_HIDDEN, INITIAL_CELL) if (value := input_of(node, index)) is not None]
    inputs = (data_input(node), *states)
    steps, batch, _ = shape_of(data_input(node))
    starts = input_of(node, INITIAL_HIDDEN) is not None
    form = Form(cell, steps, batch, hidden, starts, len(states), len(node.outputs))
    return Kernel(_function(form, inputs, packed, vectors), inputs, (*packed, *vectors))


def _bias(node: ir.Node, hidden: int) -> np.ndarray:
    """What GRU adds to the product of the hidden state before it resets it."""
    bias = const_of(input_of(node, 3))
    return np.zeros(hidden, np.float32) if bias is None else bias[0, -hidden:].astype(np.float32)


def pack(matrix: np.ndarray, lanes: int) -> np.ndarray:
    """[outputs, depth] as [blocks, depth, registers, lanes], filled up with zeros: columns as a step reads them."""
    outputs, depth = matrix.shape
    vectors = -(-outputs // lanes)
    blocks = -(-vectors // _REGISTERS)
    registers = -(-vectors // blocks)
    full = np.zeros((blocks * registers * lanes, depth), np.float32)
    full[:outputs] = matrix
    return np.ascontiguousarray(full.reshape(blocks, registers, lanes, depth).transpose(0, 3, 1, 2))


@dataclass(frozen=True)
class Form:
    """A sequence's sizes, and which optional tensors there are."""

    cell: Cell
    steps: int
    batch: int
    hidden: int
    starts: bool
    """Whether the initial hidden state is given."""
    states: int
    """How many initial states are given."""
    outputs: int


@dataclass(frozen=True)
class _Buffers:
    """What the code of a step reads and writes; vectors of floats but for the arguments."""

    x: Buffer
    """[steps, batch, gates * hidden]."""
    packed: list[Buffer]
    vectors: list[Buffer]
    h: Buffer
    c: Buffer
    sums: list[Buffer]
    """Of each product."""
    reset: Buffer
    """GRU: the hidden state, reset."""
    update: Buffer
    """GRU: the update gate."""


def _function(form: Form, inputs: tuple[ir.Value, ...], packed: list[np.ndarray], vectors: list[np.ndarray]) -> Any:
    """``function(X, states…, packed…, vectors…, outputs…)``."""
    hidden, sizes = form.hidden, [array.shape[0] * array.shape[2] * array.shape[3] for array in packed]
    with IRBuilder() as ir_builder:
        with builder.prim_func(s_tir=True):
            builder.func_attr({"tirx.noalias": True})

            def argument(name: str, shape: tuple[int, ...]) -> Buffer:
                return builder.arg(name, builder.Buffer(shape, "float32"))

            x = argument("x", shape_of(inputs[0]))
            states = [argument(f"state{i}", shape_of(value)) for i, value in enumerate(inputs[1:])]
            weights = [argument(f"weights{i}", array.shape) for i, array in enumerate(packed)]
            small = [argument(f"vector{i}", array.shape) for i, array in enumerate(vectors)]
            shapes = [(form.steps, 1, form.batch, hidden), (1, form.batch, hidden), (1, form.batch, hidden)]
            outputs = [argument(f"output{i}", shape) for i, shape in enumerate(shapes[: form.outputs])]

            def scratch(size: int) -> Buffer:
                return builder.sblock_alloc_buffer((size,), "float32")

            sums = [scratch(size) for size in sizes]
            h, c, reset, update = (scratch(hidden) for _ in range(4))
            buffers = _Buffers(x, weights, small, h, c, sums, reset, update)
            with builder.serial(0, form.batch) as b:
                _start(form, buffers, states, b)
                with builder.serial(0, form.steps) as step:
                    t = form.steps - 1 - step if form.cell.reverse else step
                    _STEPS[form.cell.kind](form, buffers, t, b)
                    with builder.serial(0, hidden) as j:
                        builder.buffer_store(outputs[0], buffers.h[j], [t, 0, b, j])
                for output, state in zip(outputs[1:], (buffers.h, buffers.c), strict=False):
                    with builder.serial(0, hidden) as j:
                        builder.buffer_store(output, state[j], [0, b, j])
        return ir_builder.get()


def _start(form: Form, buffers: _Buffers, states: list[Buffer], b: Any) -> None:
    given = iter(states)
    for state, present in ((buffers.h, form.starts), (buffers.c, form.states > form.starts)):
        source = next(given) if present else None
        with builder.serial(0, form.hidden) as j:
            builder.buffer_store(state, tirx.const(0.0, "float32") if source is None else source[0, b, j], [j])


# --- steps --------------------------------------------------------------------------------------------------


def _multiply(packed: Buffer, state: Buffer, sums: Buffer) -> None:
    """sums = packed · state.

    Vectors are written out: of a loop over lanes TVM makes masked ones for CPUs whose vectors have no fixed length.
    """
    blocks, depth, registers, lanes = (int(dim) for dim in packed.shape)

    def vector(start: Any) -> Any:
        return tirx.Ramp(start, 1, lanes)

    with builder.serial(0, blocks) as block:
        total = builder.sblock_alloc_buffer((registers * lanes,), "float32", scope="local")
        for register in range(registers):
            builder.buffer_store(total, tirx.Broadcast(tirx.const(0.0, "float32"), lanes), [vector(register * lanes)])
        with builder.serial(0, depth) as k:
            factor = tirx.Broadcast(state[k], lanes)
            for register in range(registers):
                at = vector(register * lanes)
                product = factor * packed[block, k, register, vector(0)]
                builder.buffer_store(total, total[at] + product, [at])
        for register in range(registers):
            start = register * lanes
            builder.buffer_store(sums, total[vector(start)], [vector(block * (registers * lanes) + start)])


def _lstm(form: Form, on: _Buffers, t: Any, b: Any) -> None:
    cell, hidden, (f, g, h) = form.cell, form.hidden, form.cell.functions
    _multiply(on.packed[0], on.h, on.sums[0])
    with builder.serial(0, hidden) as j:

        def gate(index: int, state: Any = None, peephole: int = 0) -> Any:
            total = on.x[t, b, index * hidden + j] + on.sums[0][index * hidden + j]
            if on.vectors and state is not None:
                total = total + on.vectors[0][peephole * hidden + j] * state
            return _clipped(total, cell)

        past = on.c[j]
        into = apply(f, gate(0, past))
        keep = 1.0 - into if cell.coupled else apply(f, gate(2, past, 2))
        builder.buffer_store(on.c, keep * past + into * apply(g, gate(3)), [j])
        builder.buffer_store(on.h, apply(f, gate(1, on.c[j], 1)) * apply(h, on.c[j]), [j])


def _gru(form: Form, on: _Buffers, t: Any, b: Any) -> None:
    cell, hidden, (f, g) = form.cell, form.hidden, form.cell.functions
    _multiply(on.packed[0], on.h, on.sums[0])
    with builder.serial(0, hidden) as j:
        update = on.x[t, b, j] + on.sums[0][j]
        reset = apply(f, _clipped(on.x[t, b, hidden + j] + on.sums[0][hidden + j], cell))
        builder.buffer_store(on.update, apply(f, _clipped(update, cell)), [j])
        builder.buffer_store(on.reset, reset if cell.linear_before_reset else reset * on.h[j], [j])
    _multiply(on.packed[1], on.h if cell.linear_before_reset else on.reset, on.sums[1])
    with builder.serial(0, hidden) as j:
        product = on.sums[1][j] + on.vectors[0][j]
        product = on.reset[j] * product if cell.linear_before_reset else product
        candidate = apply(g, _clipped(on.x[t, b, 2 * hidden + j] + product, cell))
        builder.buffer_store(on.h, (1.0 - on.update[j]) * candidate + on.update[j] * on.h[j], [j])


def _rnn(form: Form, on: _Buffers, t: Any, b: Any) -> None:
    _multiply(on.packed[0], on.h, on.sums[0])
    with builder.serial(0, form.hidden) as j:
        total = _clipped(on.x[t, b, j] + on.sums[0][j], form.cell)
        builder.buffer_store(on.h, apply(form.cell.functions[0], total), [j])


_STEPS = {"LSTM": _lstm, "GRU": _gru, "RNN": _rnn}


def _clipped(x: Expr, cell: Cell) -> Expr:
    return x if cell.clip == math.inf else te.clamp(x, -cell.clip, cell.clip)


def apply(function: Function, x: Expr) -> Expr:
    """An activation function of the list in the ONNX operators' specification."""
    alpha, beta = function.alpha, function.beta
    match function.name:
        case "Affine":
            return x * alpha + beta
        case "Elu":
            return te.where(x >= 0, x, (te.exp(x) - 1.0) * alpha)
        case "HardSigmoid":
            return te.clamp(x * alpha + beta, 0.0, 1.0)
        case "LeakyRelu":
            return te.where(x >= 0, x, x * alpha)
        case "Relu":
            return te.maximum(x, 0.0)
        case "ScaledTanh":
            return te.tanh(x * beta) * alpha
        case "Sigmoid":
            return sigmoid(x)
        case "Softplus":
            return softplus(x)
        case "Softsign":
            return x / (te.absolute(x) + 1.0)
        case "Tanh":
            return te.tanh(x)
        case "ThresholdedRelu":
            return te.where(x > alpha, x, te.const(0.0, "float32"))
    raise AssertionError(f"no code for the activation {function.name}")


LOWERINGS: Mapping[str, Any] = {op: recurrent for op in OPS}
