"""LSTM, GRU and RNN as ONNX defines them, read off a node.

In the simplified graph such a node has one direction, its sequence in time-major layout, no `sequence_lens`, and the
identity for input weights: a Gemm before it has multiplied all time steps at once and added the bias (see
`passes.normalize_recurrent` and `passes.project_recurrent`). What is left is the recurrence alone.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Literal

import numpy as np
import onnx_ir as ir

from qcompiler.graph import Attribute, const_of, data_input, input_of, integer, is_op, real, shape_of, string

RecurrentKind = Literal["LSTM", "GRU", "RNN"]

GATES: Mapping[RecurrentKind, int] = {"LSTM": 4, "GRU": 3, "RNN": 1}
"""Blocks of `hidden` rows in the weights: i, o, f, c of LSTM; z, r, h of GRU."""

OPS = tuple(GATES)

_DEFAULTS: Mapping[RecurrentKind, tuple[str, ...]] = {
    "LSTM": ("Sigmoid", "Tanh", "Tanh"),
    "GRU": ("Sigmoid", "Tanh"),
    "RNN": ("Tanh",),
}


@dataclass(frozen=True)
class _Parameters:
    """The defaults of a function's alpha and beta; None where it has no such parameter."""

    alpha: float | None = None
    beta: float | None = None
    required: bool = False
    """Whether a node must give them: ONNX names no default, and onnxruntime one of its own."""


FUNCTIONS: Mapping[str, _Parameters] = {
    "Affine": _Parameters(1.0, 0.0, required=True),
    "Elu": _Parameters(1.0),
    "HardSigmoid": _Parameters(0.2, 0.5),
    "LeakyRelu": _Parameters(0.01),
    "Relu": _Parameters(),
    "ScaledTanh": _Parameters(1.0, 1.0, required=True),
    "Sigmoid": _Parameters(),
    "Softplus": _Parameters(),
    "Softsign": _Parameters(),
    "Tanh": _Parameters(),
    "ThresholdedRelu": _Parameters(1.0, required=True),
}
"""The functions ONNX lists for recurrent operators."""

SEQUENCE_LENGTHS, INITIAL_HIDDEN, INITIAL_CELL, PEEPHOLES = 4, 5, 6, 7
"""Indices of optional inputs."""


@dataclass(frozen=True)
class Function:
    """An activation function: a key of `FUNCTIONS` and its parameters, 0 where it has none."""

    name: str
    alpha: float = 0.0
    beta: float = 0.0


@dataclass(frozen=True)
class Cell:
    """What one step of one direction computes; the formulas are those of the ONNX operators' specification."""

    kind: RecurrentKind
    functions: tuple[Function, ...]
    """f, g and h of LSTM, f and g of GRU, f of RNN."""
    clip: float = inf
    """What is put into f and g is clamped to ±clip; the cell that LSTM puts into h is not, as in onnxruntime."""
    coupled: bool = False
    """LSTM: the forget gate is one minus the input gate (`input_forget`)."""
    linear_before_reset: bool = False
    """GRU: the reset gate multiplies the product of the hidden state, bias included, instead of the state."""
    reverse: bool = field(default=False)
    """Whether time runs backward."""

    @property
    def gates(self) -> int:
        return GATES[self.kind]


class UnknownCellError(Exception):
    """A node computes nothing we know; the message says why."""


def kind_of(node: ir.Node) -> RecurrentKind:
    for kind in GATES:
        if is_op(node, kind):
            return kind
    raise AssertionError(f"{node.op_type} {node.name} is not recurrent")


def directions_of(node: ir.Node) -> tuple[bool, ...]:
    """For each direction whether time runs backward."""
    return {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}[
        string(node, "direction", "forward")
    ]


def hidden_size(node: ir.Node) -> int:
    return shape_of(data_input(node, 2))[2]


def cells_of(node: ir.Node) -> tuple[Cell, ...]:
    """One per direction.

    Raises:
        UnknownCellError: an activation function that is not in `FUNCTIONS`, or lacks a parameter; or a sequence
            that is not time first, which onnxruntime has no code for either.
    """
    if integer(node, "layout", 0):
        raise UnknownCellError("its layout is batch first; transpose the sequence before it")
    kind, directions = kind_of(node), directions_of(node)
    functions = _functions(node, kind, len(directions))
    each = len(functions) // len(directions)
    return tuple(
        Cell(
            kind,
            functions[index * each : (index + 1) * each],
            real(node, "clip", inf),
            coupled=kind == "LSTM" and bool(integer(node, "input_forget", 0)),
            linear_before_reset=kind == "GRU" and bool(integer(node, "linear_before_reset", 0)),
            reverse=reverse,
        )
        for index, reverse in enumerate(directions)
    )


def _functions(node: ir.Node, kind: RecurrentKind, directions: int) -> tuple[Function, ...]:
    attribute, wanted = node.attributes.get("activations"), _DEFAULTS[kind] * directions
    names = wanted if attribute is None else tuple(attribute.as_strings())
    if len(names) != len(wanted):
        raise UnknownCellError(f"it lists {len(names)} activations where {kind} has {len(wanted)}")
    alphas, betas = _numbers(node, "activation_alpha"), _numbers(node, "activation_beta")
    return tuple(_function(name, alphas, betas) for name in names)


def _numbers(node: ir.Node, name: str) -> Iterator[float]:
    attribute = node.attributes.get(name)
    return iter(() if attribute is None else tuple(attribute.as_floats()))


def _function(given: str, alphas: Iterator[float], betas: Iterator[float]) -> Function:
    """The functions that have parameters take them from the lists in turn."""
    known = {name.lower(): name for name in FUNCTIONS}
    if given.lower() not in known:
        raise UnknownCellError(f"its activation {given} is none of {', '.join(FUNCTIONS)}")
    name = known[given.lower()]
    expected, values = FUNCTIONS[name], []
    for label, default, numbers in (("alpha", expected.alpha, alphas), ("beta", expected.beta, betas)):
        value = 0.0 if default is None else next(numbers, None)
        if value is None and expected.required:
            raise UnknownCellError(f"its activation {name} lacks activation_{label}, which has no default")
        values.append(default if value is None else value)
    return Function(name, *values)


def attributes_of(cell: Cell, hidden: int) -> dict[str, Attribute]:
    """The attributes of a node of one direction that is this cell."""
    attributes: dict[str, Attribute] = {
        "hidden_size": hidden,
        "direction": "reverse" if cell.reverse else "forward",
        "activations": [function.name for function in cell.functions],
    }
    for name, numbers in (
        ("activation_alpha", [f.alpha for f in cell.functions if FUNCTIONS[f.name].alpha is not None]),
        ("activation_beta", [f.beta for f in cell.functions if FUNCTIONS[f.name].beta is not None]),
    ):
        if numbers:
            attributes[name] = numbers
    if cell.clip != inf:
        attributes["clip"] = cell.clip
    if cell.kind == "LSTM":
        attributes["input_forget"] = int(cell.coupled)
    if cell.kind == "GRU":
        attributes["linear_before_reset"] = int(cell.linear_before_reset)
    return attributes


# --- the simplified form ------------------------------------------------------------------------------------


def is_projected(node: ir.Node) -> bool:
    """Whether the node is the recurrence alone: its input weights are the identity, its input bias zero."""
    weights, bias = const_of(data_input(node, 1)), const_of(input_of(node, 3))
    if weights is None or weights.shape[0] != 1 or weights.shape[1] != weights.shape[2]:
        return False
    if input_of(node, 3) is not None and (bias is None or _projected_bias(node, bias).any()):
        return False
    return np.array_equal(weights[0], np.eye(weights.shape[1], dtype=weights.dtype))


def _projected_bias(node: ir.Node, bias: np.ndarray) -> np.ndarray:
    """What of B [1, 2 * gates * hidden] `project_recurrent` moves before the node: all but what GRU resets."""
    kept = bias.copy()
    if cells_of(node)[0].linear_before_reset:
        kept[:, -hidden_size(node) :] = 0
    return kept


def constants_read(graph: ir.Graph) -> list[ir.Value]:
    """A simplified graph's constants, but for the identities of recurrent operators, which no code reads."""
    identities = {data_input(node, 1) for node in graph if is_op(node, *OPS)}
    return [value for value in graph.initializers.values() if value not in identities]
