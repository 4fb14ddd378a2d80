"""A .tflite file under construction: tensors, constants and operators of one subgraph."""

from collections.abc import Sequence
from dataclasses import dataclass

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from qcompiler.graph import Shape
from qcompiler.integer.formats import TensorFormat

_TYPES: dict[str, int] = {
    "int8": schema.TensorType.INT8,
    "uint8": schema.TensorType.UINT8,
    "int16": schema.TensorType.INT16,
    "int32": schema.TensorType.INT32,
    "int64": schema.TensorType.INT64,
}
_SCHEMA_VERSION = 3
_LAST_SHORT_CODE = 127
"""Operator codes beyond this one are left out of the field that old readers know."""


@dataclass(frozen=True)
class Tensor:
    """A tensor of the subgraph."""

    index: int
    shape: Shape
    dtype: str
    format: TensorFormat | None

    @property
    def type_code(self) -> int:
        """The schema's number for the type."""
        return _TYPES[self.dtype]


@dataclass(frozen=True)
class Operation:
    """Which builtin operator, in which version: the first that takes the types used here."""

    code: int
    version: int


class TfliteModel:
    """Collects tensors and operators, in execution order, and serializes them."""

    def __init__(self, description: str) -> None:
        self._description = description
        # By convention buffer 0 is empty and belongs to tensors without data.
        self._buffers = [schema.BufferT()]
        self._tensors: list[schema.TensorT] = []
        self._operators: list[schema.OperatorT] = []
        self._codes: list[Operation] = []
        self._names: set[str] = set()

    def tensor(self, name: str, shape: Sequence[int], dtype: str, fmt: TensorFormat | None = None) -> Tensor:
        """A tensor computed at run time."""
        return self._add(name, shape, dtype, fmt, axis=0, buffer=0)

    def constant(self, name: str, array: np.ndarray, fmt: TensorFormat | None = None, *, axis: int = 0) -> Tensor:
        """A constant; `axis` is the one its scales run along."""
        little_endian = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        self._buffers.append(schema.BufferT(data=np.frombuffer(little_endian.tobytes(), np.uint8)))
        return self._add(name, array.shape, str(array.dtype), fmt, axis=axis, buffer=len(self._buffers) - 1)

    def operator(
        self,
        operation: Operation,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        options_type: int = schema.BuiltinOptions.NONE,
        options: object = None,
    ) -> None:
        """Append an operator; `options` is the table that `options_type` names."""
        if operation not in self._codes:
            self._codes.append(operation)
        made = schema.OperatorT(
            opcodeIndex=self._codes.index(operation),
            inputs=[tensor.index for tensor in inputs],
            outputs=[tensor.index for tensor in outputs],
            builtinOptionsType=options_type,
            builtinOptions=options,
        )
        self._operators.append(made)

    def serialize(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> bytes:
        """The file, with these tensors as the subgraph's inputs and outputs."""
        subgraph = schema.SubGraphT(
            name="main",
            tensors=self._tensors,
            operators=self._operators,
            inputs=[tensor.index for tensor in inputs],
            outputs=[tensor.index for tensor in outputs],
        )
        model = schema.ModelT(
            version=_SCHEMA_VERSION,
            description=self._description,
            subgraphs=[subgraph],
            buffers=self._buffers,
            operatorCodes=[_operator_code(operation) for operation in self._codes],
        )
        builder = flatbuffers.Builder(1024)
        builder.Finish(model.Pack(builder), b"TFL3")
        return bytes(builder.Output())

    def _add(
        self, name: str, shape: Sequence[int], dtype: str, fmt: TensorFormat | None, *, axis: int, buffer: int
    ) -> Tensor:
        quantization = None
        if fmt is not None:
            quantization = schema.QuantizationParametersT(
                scale=list(fmt.scales), zeroPoint=[fmt.zero_point] * len(fmt.scales), quantizedDimension=axis
            )
        made = schema.TensorT(
            name=self._unused(name), shape=list(shape), type=_TYPES[dtype], buffer=buffer, quantization=quantization
        )
        self._tensors.append(made)
        return Tensor(len(self._tensors) - 1, tuple(shape), dtype, fmt)

    def _unused(self, name: str) -> str:
        """Tools key their reports by tensor name."""
        unused, suffix = name, 0
        while unused in self._names:
            suffix += 1
            unused = f"{name}_{suffix}"
        self._names.add(unused)
        return unused


def _operator_code(operation: Operation) -> schema.OperatorCodeT:
    return schema.OperatorCodeT(
        builtinCode=operation.code,
        version=operation.version,
        deprecatedBuiltinCode=min(operation.code, _LAST_SHORT_CODE),
    )
