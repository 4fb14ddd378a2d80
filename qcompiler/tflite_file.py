"""Read a .tflite file as an ONNX model: integer tensors become QuantizeLinear/DequantizeLinear around float operators.

Inputs and outputs keep their names, types and layout (channels last). Inside, images are [N, C, H, W], as ONNX has
them; a tensor is transposed only where an operator wants the other layout. Operators come from
`tflite_operators.OPERATORS`; the first that is not there is refused by its name.

The schema is that of `ai-edge-litert`, of the extra 'tflite'.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType

import ml_dtypes
import numpy as np
import onnx
from onnx import helper, numpy_helper

from qcompiler.errors import QCompilerError
from qcompiler.quant.arithmetic import unpack_int4

IDENTIFIER = b"TFL3"
IDENTIFIER_OFFSET = 4
_OPSET = 21
_IR_VERSION = 10

_DTYPES: tuple[tuple[str, type[np.generic]], ...] = (
    ("FLOAT32", np.float32),
    ("FLOAT16", np.float16),
    ("INT8", np.int8),
    ("UINT8", np.uint8),
    ("INT16", np.int16),
    ("INT32", np.int32),
    ("INT64", np.int64),
    ("BOOL", np.bool_),
    ("INT4", ml_dtypes.int4),
)
_QUANTIZED = (np.int8, np.uint8, np.int16, ml_dtypes.int4)

_TO_NCHW, _TO_NHWC = (0, 3, 1, 2), (0, 2, 3, 1)


def is_tflite(data: bytes) -> bool:
    """Does a file of these bytes hold a TFLite model? Asks the content, not the name."""
    return data[IDENTIFIER_OFFSET : IDENTIFIER_OFFSET + len(IDENTIFIER)] == IDENTIFIER


@dataclass(frozen=True)
class Tensor:
    """A tensor of the file. `scales` is empty where it is not quantized; `data` None where it is computed."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    scales: np.ndarray
    zero_points: np.ndarray
    axis: int
    data: np.ndarray | None

    @property
    def is_quantized(self) -> bool:
        """Does it stand for real numbers, by scale and zero point?"""
        return self.scales.size > 0 and self.dtype in _QUANTIZED


@dataclass(frozen=True)
class Operator:
    """An operator of the file: its builtin name, its tensors' indices (-1: absent) and its table of options."""

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: object


@dataclass(frozen=True)
class Subgraph:
    """What a .tflite file holds."""

    tensors: tuple[Tensor, ...]
    operators: tuple[Operator, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def read_tflite(data: bytes, path: Path) -> onnx.ModelProto:
    """The model of a .tflite file's bytes; `path` is for errors.

    Raises:
        QCompilerError: a broken file, several subgraphs, a type or an operator that cannot be expressed, a missing
            package.
    """
    # The table of operators needs this module's classes.
    from qcompiler.tflite_operators import OPERATORS

    subgraph = parse_tflite(data, path)
    unknown = sorted({operator.name for operator in subgraph.operators if operator.name not in OPERATORS})
    if unknown:
        raise QCompilerError(
            f"{path} has TFLite operators that cannot be imported: {', '.join(unknown)}; export the model without them"
        )
    try:
        network = Network(subgraph, path)
        for operator in subgraph.operators:
            network.begin(operator)
            OPERATORS[operator.name](network, operator)
        return network.finish()
    except (IndexError, AttributeError, TypeError, ValueError) as error:
        # Indices beyond the file's tables, options that an operator must have, shapes of another rank.
        raise QCompilerError(f"{path} is a broken TensorFlow Lite model: {error}; convert it again") from error


# --- the file ----------------------------------------------------------------------------------------------


def _schema(path: Path) -> ModuleType:
    try:
        from ai_edge_litert import schema_py_generated
    except ImportError:
        raise QCompilerError(
            f"{path} is a TensorFlow Lite model; reading it needs the package ai-edge-litert: "
            "pip install 'qcompiler[tflite]'"
        ) from None
    return schema_py_generated


def parse_tflite(data: bytes, path: Path) -> Subgraph:
    """What a file's bytes hold. Raises QCompilerError, as `read_tflite` does."""
    schema = _schema(path)
    try:
        model = schema.ModelT.InitFromPackedBuf(data, 0)
        subgraphs = [] if model.subgraphs is None else model.subgraphs
        if len(subgraphs) != 1 or not len(_list(subgraphs[0].operators)):
            raise QCompilerError(
                f"{path} has {len(subgraphs)} subgraphs{'' if len(subgraphs) != 1 else ' and no operators'}; "
                "only models of one, with operators in it, can be imported"
            )
        graph, names = subgraphs[0], _constants(schema.BuiltinOperator)
        tensors = _named(
            [_tensor(tensor, model.buffers, _constants(schema.TensorType), path) for tensor in graph.tensors],
            (*_list(graph.inputs), *_list(graph.outputs)),
        )
        operators = tuple(_operator(operator, model.operatorCodes, names) for operator in graph.operators)
        return Subgraph(tensors, operators, _list(graph.inputs), _list(graph.outputs))
    except (struct.error, IndexError, TypeError, ValueError, AttributeError, AssertionError, KeyError) as error:
        # The generated reader trusts its file; what it trips over differs.
        raise QCompilerError(
            f"{path} is a broken or truncated TensorFlow Lite model ({len(data)} bytes): {error}; fetch it again"
        ) from None


def _constants(enumeration: type) -> dict[int, str]:
    return {number: name for name, number in vars(enumeration).items() if isinstance(number, int)}


def _list(numbers: Sequence[int] | None) -> tuple[int, ...]:
    """A vector of the file, which may be absent."""
    return () if numbers is None else tuple(numbers)


def _tensor(tensor, buffers, types: dict[int, str], path: Path) -> Tensor:
    name, shape = (tensor.name or b"").decode(errors="replace"), tuple(int(size) for size in _list(tensor.shape))
    dtype = dict(_DTYPES).get(types[tensor.type])
    if dtype is None:
        raise QCompilerError(f"{path}: the tensor {name!r} is of type {types[tensor.type]}, which cannot be imported")
    if tensor.sparsity is not None:
        raise QCompilerError(f"{path}: the weights {name!r} are stored sparse; export the model with dense ones")
    raw = buffers[tensor.buffer].data
    array = None if raw is None or not len(raw) else _array(np.asarray(raw, np.uint8), np.dtype(dtype), shape)
    quantization = tensor.quantization
    if quantization is None or quantization.scale is None:
        return Tensor(name, shape, np.dtype(dtype), np.zeros(0, np.float32), np.zeros(0, np.int64), 0, array)
    scales = np.array(quantization.scale, np.float32)
    zeros = _list(quantization.zeroPoint) or (0,)
    zeros = np.broadcast_to(np.array(zeros, np.int64), scales.shape)
    axis = quantization.quantizedDimension if scales.size > 1 else 0
    return Tensor(name, shape, np.dtype(dtype), scales, zeros, axis, array)


def _array(raw: np.ndarray, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    if dtype == ml_dtypes.int4:
        return unpack_int4(raw, int(np.prod(shape))).reshape(shape).astype(dtype)
    return np.frombuffer(raw.tobytes(), dtype.newbyteorder("<")).astype(dtype).reshape(shape)


def _named(tensors: list[Tensor], borders: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Every tensor with a name of its own; inputs and outputs of the model choose first, constants last.

    Converters join the names of all that was fused into a tensor by semicolons: the first one serves.
    """
    taken: set[str] = set()
    named = list(tensors)
    computed = [index for index, tensor in enumerate(tensors) if tensor.data is None]
    for index in dict.fromkeys((*borders, *computed, *range(len(tensors)))):
        base = tensors[index].name or f"tensor_{index}"
        base = base if index in borders else base.split(";")[0]
        name = base if base not in taken else f"{base}_{index}"
        taken.add(name)
        named[index] = replace(tensors[index], name=name)
    return tuple(named)


def _operator(operator, codes, names: dict[int, str]) -> Operator:
    code = codes[operator.opcodeIndex]
    # Codes below 127 are in the field that old writers know, and some write nothing else.
    number = max(code.builtinCode, code.deprecatedBuiltinCode)
    name = names[number] if code.customCode is None else f"custom operator {code.customCode.decode(errors='replace')}"
    return Operator(name, _list(operator.inputs), _list(operator.outputs), operator.builtinOptions)


# --- the ONNX graph ----------------------------------------------------------------------------------------


@dataclass
class _Views:
    """The real value of a tensor in each layout it has been asked for: by "is [N, C, H, W]"."""

    values: dict[bool, str] = field(default_factory=dict)


class Network:
    """The ONNX graph under construction. Values are names; those of `read` are real (float32) numbers."""

    def __init__(self, subgraph: Subgraph, path: Path) -> None:
        self.path = path
        self._subgraph = subgraph
        self._tensors = list(subgraph.tensors)
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}
        self._views: dict[int, _Views] = {}
        self._names = {tensor.name for tensor in subgraph.tensors}
        self._label = ""
        for index in subgraph.inputs:
            tensor = self._tensors[index]
            value = self._dequantize(tensor.name, tensor) if tensor.is_quantized else tensor.name
            self._views[index] = _Views({False: value})

    def begin(self, operator: Operator) -> None:
        """Nodes added from now on are this operator's, and named by the tensor it makes."""
        self._label = self._tensors[operator.outputs[0]].name

    def tensor(self, index: int) -> Tensor:
        """The tensor of this index."""
        return self._tensors[index]

    def refuse(self, operator: Operator, problem: str) -> QCompilerError:
        """The error for an operator that cannot be expressed."""
        return QCompilerError(
            f"{self.path}: the operator {operator.name} that makes {self._label!r} {problem}; "
            "export the model without it"
        )

    def constant_of(self, operator: Operator, place: int) -> np.ndarray:
        """The constant input at this place: axes, sizes, paddings. Raises where it is computed."""
        tensor = self.tensor(operator.inputs[place])
        if tensor.data is None:
            raise self.refuse(operator, f"computes its input {place} ({tensor.name!r}), which must be a constant")
        return tensor.data

    def real_constant_of(self, operator: Operator, place: int) -> np.ndarray:
        """The real numbers behind a constant that has one scale or none."""
        array, tensor = self.constant_of(operator, place), self.tensor(operator.inputs[place])
        return (array.astype(np.float64) - tensor.zero_points) * tensor.scales if tensor.is_quantized else array

    def alias(self, new: int, old: int) -> None:
        """Let one tensor be another one: the real numbers behind a constant."""
        self._tensors[new] = replace(self._tensors[old], name=self._tensors[new].name)

    def is_nchw(self, index: int) -> bool:
        """Is this tensor at hand as [N, C, H, W], and not otherwise?"""
        computed = index in self._views and self.tensor(index).data is None
        return computed and False not in self._views[index].values

    # Reading and writing tensors.

    def read(self, index: int, nchw: bool = False) -> str:
        """The tensor's real value. As [N, C, H, W] it must have four dimensions, or fewer if it is a constant."""
        tensor = self.tensor(index)
        views = self._views.setdefault(index, _Views())
        if nchw not in views.values:
            if tensor.data is not None:
                views.values[nchw] = self._constant_view(tensor, nchw)
            else:
                assert views.values, f"{tensor.name} is read before it is made"
                views.values[nchw] = self._transposed(views.values[not nchw], tensor, nchw)
        return views.values[nchw]

    def weights(self, index: int, permutation: Sequence[int]) -> str:
        """A constant with permuted axes, scales included, as a real value."""
        tensor = self.tensor(index)
        assert tensor.data is not None
        return self._real(tensor, tensor.data.transpose(permutation), tuple(permutation).index(tensor.axis))

    def bias(self, index: int, scales: np.ndarray) -> str:
        """A vector added to sums of products whose scales these are, of one element or one for each output."""
        tensor = self.tensor(index)
        if tensor.data is None:
            return self.read(index)
        if tensor.dtype not in (np.int32, np.int64):
            return self.read(index)
        wide = tensor.data.astype(np.int64).ravel()
        if np.abs(wide).max(initial=0) >= 1 << 31:
            raise QCompilerError(f"{self.path}: the bias {tensor.name!r} does not fit in 32 bits; quantize it anew")
        bias = replace(tensor, dtype=np.dtype(np.int32), zero_points=np.zeros(scales.shape, np.int64), scales=scales)
        return self._dequantize(self.constant(tensor.name, wide.astype(np.int32)), bias, axis=0)

    def rounded(self, value: str, index: int) -> str:
        """The value rounded as this tensor is: what stands between an operator and a change of shape."""
        tensor = self.tensor(index)
        if not tensor.is_quantized:
            return value
        return self._dequantize(self._quantize(value, tensor, self._fresh(f"{tensor.name}/rounded")), tensor)

    def write(self, index: int, value: str, nchw: bool = False) -> None:
        """Record a freshly made real value as that of a tensor: rounded, if the tensor is quantized."""
        tensor = self.tensor(index)
        if tensor.is_quantized:
            name = self._fresh(f"{tensor.name}/nchw") if nchw else tensor.name
            value = self._dequantize(self._quantize(value, tensor, name), tensor)
        self._views[index] = _Views({nchw: value})

    # Making nodes.

    def op(self, op_type: str, *inputs: str, **attributes: int | float | str | Sequence[int]) -> str:
        """Append a node of one output; returns its name."""
        return self.ops(op_type, inputs, 1, **attributes)[0]

    def ops(
        self, op_type: str, inputs: Sequence[str], outputs: int, **attributes: int | float | str | Sequence[int]
    ) -> list[str]:
        """Append a node; returns the names of its outputs."""
        made = [self._fresh(f"{self._label}/{op_type}") for _ in range(outputs)]
        node = helper.make_node(op_type, inputs, made, name=made[0])
        node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
        self._nodes.append(node)
        return made

    def constant(self, hint: str, array: np.ndarray) -> str:
        """A new constant."""
        name = self._fresh(f"{hint}/constant")
        self._constants[name] = numpy_helper.from_array(np.array(array, order="C"), name)
        return name

    def shape(self, sizes: Sequence[int]) -> str:
        """A constant of int64."""
        return self.constant(self._label, np.array(sizes, np.int64))

    def number(self, value: float) -> str:
        """A scalar constant of float32."""
        return self.constant(self._label, np.array(value, np.float32))

    def finish(self) -> onnx.ModelProto:
        """The model."""
        for index in self._subgraph.outputs:
            tensor = self.tensor(index)
            self._label = tensor.name
            value = self.read(index)
            made = {name for node in self._nodes for name in node.output}
            if tensor.name not in made and index not in self._subgraph.inputs:
                if tensor.is_quantized:
                    self._quantize(value, tensor, tensor.name)
                else:
                    self._nodes.append(helper.make_node("Identity", [value], [tensor.name], name=tensor.name))
        graph = helper.make_graph(
            self._nodes,
            self.path.stem,
            [self._info(index) for index in self._subgraph.inputs],
            [self._info(index) for index in self._subgraph.outputs],
            list(self._constants.values()),
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION)

    def _info(self, index: int) -> onnx.ValueInfoProto:
        tensor = self.tensor(index)
        return helper.make_tensor_value_info(
            tensor.name, helper.np_dtype_to_tensor_dtype(tensor.dtype), list(tensor.shape)
        )

    def _fresh(self, hint: str) -> str:
        name, suffix = hint, 0
        while name in self._names:
            suffix += 1
            name = f"{hint}_{suffix}"
        self._names.add(name)
        return name

    def _constant_view(self, tensor: Tensor, nchw: bool) -> str:
        array, axis = tensor.data, tensor.axis
        assert array is not None
        if nchw:
            axis += 4 - array.ndim
            array = array.reshape((*[1] * (4 - array.ndim), *array.shape)).transpose(_TO_NCHW)
            axis = _TO_NCHW.index(axis)
        return self._real(tensor, array, axis)

    def _real(self, tensor: Tensor, array: np.ndarray, axis: int) -> str:
        if tensor.is_quantized:
            return self._dequantize(self.constant(tensor.name, array), tensor, axis=axis)
        wide = array.astype(np.float32) if array.dtype == np.float16 else array
        return self.constant(tensor.name, wide)

    def _transposed(self, value: str, tensor: Tensor, nchw: bool) -> str:
        """The other layout of a real value, rounded as it was."""
        assert len(tensor.shape) == 4, tensor.name
        permutation = _TO_NCHW if nchw else _TO_NHWC
        batch, height, width, channels = tensor.shape
        if channels == 1 or height == width == 1:
            shape = (batch, channels, height, width) if nchw else tensor.shape
            made = self.op("Reshape", value, self.shape(shape))
        else:
            made = self.op("Transpose", value, perm=permutation)
        if not tensor.is_quantized:
            return made
        name = self._fresh(f"{tensor.name}/nchw") if nchw else tensor.name
        return self._dequantize(self._quantize(made, tensor, name), tensor)

    def _quantize(self, value: str, tensor: Tensor, name: str) -> str:
        inputs = [value, *self._parameters(tensor)]
        self._nodes.append(helper.make_node("QuantizeLinear", inputs, [name], name=f"{name}/QuantizeLinear"))
        return name

    def _dequantize(self, value: str, tensor: Tensor, axis: int = 0) -> str:
        made = self._fresh(f"{value}/DequantizeLinear")
        inputs = [value, *self._parameters(tensor)]
        self._nodes.append(helper.make_node("DequantizeLinear", inputs, [made], name=made, axis=axis))
        return made

    def _parameters(self, tensor: Tensor) -> tuple[str, str]:
        """Scale and zero point, as scalars where one serves for all."""
        shape = tensor.scales.shape if tensor.scales.size > 1 else ()
        zero_points = tensor.zero_points.astype(tensor.dtype).reshape(shape)
        scale = self.constant(f"{tensor.name}/scale", tensor.scales.reshape(shape).astype(np.float32))
        return scale, self.constant(f"{tensor.name}/zero_point", zero_points)
